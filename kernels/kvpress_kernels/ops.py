"""The ops that have a kernel, by the name of their module.

Tools that go over all of them (compile_report, check, bench) read this list. An op is imported when it is used:
decorating a kernel fixes whether it runs compiled or in the interpreter.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

OPS = (
    "ragged_decode",
    "split_reduce",
    "work_list",
    "leave_one_out",
    "joint_change",
    "window_scores",
    "cumulative_mass",
    "append",
    "gather_pages",
    "compact",
    "rerotate",
    "ragged_attention",
    "lowrank_decode",
    "project_append",
)
#: ops of torch functions alone: nothing of theirs is compiled
WITHOUT_KERNEL = ("work_list",)


def load(op: str) -> ModuleType:
    """The module of an op; raises ValueError for a name that is not in OPS."""
    if op not in OPS:
        raise ValueError(f"no op '{op}'; there are {', '.join(OPS)}")
    return import_module(f"kvpress_kernels.{op}")
