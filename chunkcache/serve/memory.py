"""Gives memory back to the system that the C library keeps of answers that are done.

The KV of a sequence are made and freed by several threads, and glibc keeps what is freed in a heap for each of them:
what a server holds would be the most that each thread ever needed, and grow for hours.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from chunkcache.kv.heap import trim
from chunkcache.serve.beside import beside

PERIOD_S = 10.0


@contextmanager
def trimming(period_s: float = PERIOD_S) -> Iterator[None]:
    """Trim every so many seconds beside the block, where that is possible."""

    def work(over: threading.Event) -> None:
        while not over.wait(period_s) and trim():
            pass

    with beside(work):
        yield
