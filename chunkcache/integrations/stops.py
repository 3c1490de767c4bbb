"""Stop strings: an answer ends before the first of them, whether it comes whole or in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from chunkcache.errors import InputError

Stops = str | Sequence[str] | None


def listed(stops: Stops) -> list[str]:
    """Return stop strings as a list; raises InputError when one is empty or not a string."""
    given = [stops] if isinstance(stops, str) else list(stops or ())
    for stop in given:
        if not isinstance(stop, str) or not stop:
            raise InputError(f"a stop string is {stop!r}: give strings of one character or more, or leave it out")
    return given


def cut(text: str, stops: Stops) -> str:
    """Return `text` up to the stop string in it that ends first, or all of it; see `listed`."""
    found = _first(text, listed(stops))
    return text if found is None else text[:found]


def until(pieces: Iterable[str], stops: Stops) -> Iterator[str]:
    """Yield the pieces of a text up to the first stop string, and close the iterator over them there.

    What may be the beginning of a stop string is held back until it is known. Joined, the pieces are
    `cut("".join(pieces), stops)`, wherever the text was divided. Raises as `listed` does, at the call.
    """
    return _until(pieces, listed(stops))


def stripped(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text without the white space before the first word of it and behind the last."""
    space = None  # None before the first word
    for piece in pieces:
        text = piece.lstrip() if space is None else space + piece
        ready = text.rstrip()
        if ready:
            yield ready
        if ready or space is not None:
            space = text[len(ready) :]


def _until(pieces: Iterable[str], stops: list[str]) -> Iterator[str]:
    source = iter(pieces)
    held = ""
    try:
        for piece in source:
            held += piece
            found = _first(held, stops)
            if found is not None:
                held = held[:found]
                break
            ready = len(held) - _unsure(held, stops)
            if ready:
                yield held[:ready]
                held = held[ready:]
        if held:
            yield held
    finally:  # also when the caller stops listening: what decodes the pieces must end too
        close = getattr(source, "close", None)
        if close is not None:
            close()


def _first(text: str, stops: list[str]) -> int | None:
    """Return where the stop string begins that ends first, of two that end together the longer one."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def _unsure(text: str, stops: list[str]) -> int:
    """Return the length of the longest end of `text` that is the beginning of a stop string."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
