"""The benchmarks: RULER, LongBench, NeedleBench and offline stand-ins, each a folder of tasks."""

from kvpress_eval.plugins import import_modules
from kvpress_eval.tasks.base import TASKS, Request, Task, find_tasks, register

__all__ = ["TASKS", "Request", "Task", "find_tasks", "register"]

import_modules(__name__, __path__)
