"""Errors that nobody expected, in the log: each once, by its type and where it came from, and without its text.

The text of an error may be what it stumbled over, and so the text of a prompt.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator

logger = logging.getLogger("chunkcache")
_LOGGED = "_chunkcache_logged"


def log_fault(what: str, error: BaseException) -> None:
    """Log an error, unless it was logged before.

    Args:
        what: what it ended, in words of our own.
        error: the error.
    """
    if vars(error).get(_LOGGED):
        return
    vars(error)[_LOGGED] = True
    logger.error("%s: %s\n%s", what, type(error).__name__, trace_of(error), extra={"error": type(error).__name__})


def trace_of(error: BaseException) -> str:
    """Return where an error, and those behind it, came from: their types, files, lines and functions."""
    parts = [
        f"{type(each).__module__}.{type(each).__qualname__}\n{''.join(traceback.format_tb(each.__traceback__))}"
        for each in _chain(error)
    ]
    return "after\n".join(parts).rstrip()


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        yield each
        seen.add(id(each))
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
