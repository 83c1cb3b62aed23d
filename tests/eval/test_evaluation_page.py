"""docs/evaluation.md names tests, tasks, fields and flags that exist."""

import re
from pathlib import Path

from kvpress_eval.sweep import Sweep
from kvpress_eval.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "eval").glob("test_*.py"))


def test_every_trap_has_the_test_that_is_named():
    named = re.findall(r"`(test_t\d+\w+)`", PAGE)
    assert len(named) >= 20
    assert [name for name in named if f"def {name}(" not in TESTS] == []


def test_every_field_of_a_sweep_is_explained():
    assert [field for field in Sweep.model_fields if field != "name" and f"{field}" not in PAGE] == []


def test_every_family_is_in_the_table():
    families = {re.sub(r"-fixed$", "", task.family) for task in TASKS.values()} - {"toy"}
    said = PAGE.replace("`-v2-", "`needlebench-v2-")
    assert [family for family in sorted(families) if f"`{family}`" not in said] == []


def test_every_flag_is_explained():
    source = "".join((ROOT / "eval" / "kvpress_eval" / name).read_text() for name in ("runner.py", "prompt.py"))
    flags = re.findall(r'yield "(\w+)"', source)
    assert len(flags) >= 6
    assert [flag for flag in flags if f"`{flag}`" not in PAGE] == []
