"""A thread that works beside a block, and ends with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beside(act: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `act` in a thread beside the block; the event that it is given is set when the block ends."""
    over = threading.Event()
    thread = threading.Thread(target=act, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
