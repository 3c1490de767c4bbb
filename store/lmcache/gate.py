"""A gate that threads pass, and that can be shut to wait until all have left."""

from __future__ import annotations

import threading


class Gate:
    """Lets threads in until it is shut, when one can wait until all have left. A thread may enter twice."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: dict[int, int] = {}
        self._open = True

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            if not self._open and me not in self._inside:
                raise ConnectionError("LMCache is being opened anew, or is closed")
            self._inside[me] = self._inside.get(me, 0) + 1

    def __exit__(self, *error: object) -> None:
        me = threading.get_ident()
        with self._changed:
            self._inside[me] -= 1
            if not self._inside[me]:
                del self._inside[me]
            self._changed.notify_all()

    def shut(self) -> bool:
        """Let no thread in any more; return whether it was open."""
        with self._changed:
            was, self._open = self._open, False
            return was

    def open(self) -> None:
        """Let threads in again."""
        with self._changed:
            self._open = True

    def wait_until_empty(self) -> None:
        """Wait until no thread is inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._inside)
