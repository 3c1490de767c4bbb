"""The report of a folder of measurements: results files -> one JSON object -> tables and plots -> HTML and Markdown.

Everything that is shown comes from the JSON object alone, so that a report can be made again from `report.json`.
"""

from __future__ import annotations

from chunkcache.eval.report.data import build_report, read_report, write_report
from chunkcache.eval.report.readme import readme_tables, replace_between

__all__ = ["build_report", "read_report", "readme_tables", "replace_between", "write_report"]
