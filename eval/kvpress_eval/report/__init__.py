"""What a run shows: one summary of its records, as tables, JSON, CSV and a page.

Nothing here runs a model; a report needs the records and the manifest of a run and no more.
"""

from kvpress_eval.report.summary import Summary, summarize

__all__ = ["Summary", "summarize"]
