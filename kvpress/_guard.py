"""Stops the import where NVIDIA's distribution `kvpress` is installed beside this one.

Both distributions install the import package `kvpress`, so whichever was installed last has overwritten files of
the other, and what is imported is a mixture of the two. Nothing at run time can repair that.
"""

from importlib import metadata

OURS = "kvpress-engine"
NAMESAKE = "kvpress"


def refuse_namesake() -> None:
    """Raise ImportError if the metadata of NVIDIA's distribution `kvpress` is found on `sys.path`."""
    try:
        version = metadata.distribution(NAMESAKE).version
    except metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the distributions {NAMESAKE!r} (NVIDIA's, version {version}) and {OURS!r} both install the package "
        f"'kvpress' and cannot share an environment: run `pip uninstall -y {NAMESAKE} {OURS}`, then "
        f"`pip install {OURS}`, or keep each in a virtual environment of its own"
    )
