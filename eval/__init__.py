"""The eval room: data sets, fidelity and speed measurements, and tables of both.

It stands on top of `chunkcache`; nothing but the command line imports it.
"""

from __future__ import annotations

from chunkcache.eval.compare import Comparison, compare
from chunkcache.eval.data import Case, load_cases
from chunkcache.eval.fidelity import Fidelity, measure_fidelity

__all__ = ["Case", "Comparison", "Fidelity", "compare", "load_cases", "measure_fidelity"]
