"""The eval room: data sets, measurements of fidelity, speed and load, and the report of them all.

It stands on top of `chunkcache`; nothing but the command line imports it.
"""

from __future__ import annotations

from chunkcache.eval.compare import Comparison, compare
from chunkcache.eval.data import Case, load_cases
from chunkcache.eval.fidelity import Fidelity, measure_fidelity
from chunkcache.eval.results import Results
from chunkcache.eval.summary import summary

__all__ = ["Case", "Comparison", "Fidelity", "Results", "compare", "load_cases", "measure_fidelity", "summary"]
