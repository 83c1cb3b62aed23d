"""The ten decision slots of a contract, one module each; importing this package fills the registries."""

from kvpress.slots.access import Access, Aggregate
from kvpress.slots.allocation import Allocation
from kvpress.slots.base import Choice
from kvpress.slots.budget import Budget, parse_budget
from kvpress.slots.granularity import Granularity
from kvpress.slots.protection import Protection
from kvpress.slots.query_law import QueryLaw
from kvpress.slots.ranking import Ranking
from kvpress.slots.ranking_value import OutputChange
from kvpress.slots.representation import Representation
from kvpress.slots.retention import Retention
from kvpress.slots.schedule import Schedule

__all__ = [
    "Access",
    "Aggregate",
    "Allocation",
    "Budget",
    "Choice",
    "Granularity",
    "OutputChange",
    "Protection",
    "QueryLaw",
    "Ranking",
    "Representation",
    "Retention",
    "Schedule",
    "parse_budget",
]
