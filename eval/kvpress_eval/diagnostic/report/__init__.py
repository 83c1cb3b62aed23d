"""What a diagnostic run shows: one summary of its records and findings, as tables, JSON and a page.

Nothing here runs a model; a report needs the records and the manifests of one run or several, and no more.
"""

from kvpress_eval.diagnostic.report.export import to_json
from kvpress_eval.diagnostic.report.html import to_html
from kvpress_eval.diagnostic.report.summary import Summary, summarize
from kvpress_eval.diagnostic.report.tables import tables

__all__ = ["Summary", "summarize", "tables", "to_html", "to_json"]
