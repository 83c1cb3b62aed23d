"""The names of `import kvpress` mean the same whatever else has been imported."""

import pkgutil

import kvpress


def test_no_public_name_is_shadowed_by_a_module():
    # importing a submodule sets an attribute of its name on the package, in place of what is loaded on first use
    modules = {module.name for module in pkgutil.iter_modules(kvpress.__path__)}
    assert not modules & set(kvpress.__all__)


def test_public_names_stay_after_their_homes_are_imported():
    first = {name: getattr(kvpress, name) for name in kvpress.__all__}
    assert {name: getattr(kvpress, name) for name in kvpress.__all__} == first
