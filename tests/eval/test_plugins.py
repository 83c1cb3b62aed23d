"""What is found by itself, and what is said where a library of the extra is missing."""

import builtins
import sys

import pytest

from kvpress.errors import InputError
from kvpress_eval.plugins import EXTRA, needs_extra
from kvpress_eval.scorers import SCORERS
from kvpress_eval.tasks import TASKS


def test_every_metric_of_every_task_module_is_there():
    assert len(TASKS) > 80
    assert {"ruler_all", "qa_f1", "rouge_l", "code_sim", "needle_parallel"} <= SCORERS.keys()


@pytest.mark.parametrize("library", sorted(EXTRA))
def test_a_missing_library_is_named_with_its_remedy(library, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [n for n in sys.modules if n.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match=rf"needs {library}.*kvpress-engine\[eval\]"), needs_extra():
        __import__(library)


def test_another_missing_module_stays_what_it_is():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), needs_extra():
        import no_such_module  # noqa: F401
