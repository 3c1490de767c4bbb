"""Errors as LlamaIndex lets them through.

Its synthesizers `compact` and `refine`, and some of its query engines, take a ValueError or a TypeError for an answer
that cannot be read: they log it, and the user reads "Empty Response".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from chunkcache.errors import ServingError


@contextmanager
def let_through() -> Iterator[None]:
    """Raise a ServingError, with the same message, in place of an error that LlamaIndex would swallow.

    Raises:
        ServingError: a ValueError, such as any InputError, or a TypeError was raised inside; it is the `__cause__`.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ServingError(str(error) or type(error).__name__) from error
