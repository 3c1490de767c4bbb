"""A circuit breaker: a tier that has just failed is not tried for a while, so that it costs one wait."""

from __future__ import annotations

import threading
import time


class Breaker:
    """Closed until a failure; then open for `pause_s`; then it lets one trial through, which closes or reopens it.

    (pybreaker holds its lock while the guarded call runs, so that one slow server would queue up all threads.)

    Args:
        pause_s: seconds between trials.
    """

    def __init__(self, pause_s: float = 1.0) -> None:
        self.pause_s = pause_s
        self._lock = threading.Lock()
        self._open_until = 0.0
        self._failing = False

    def allows(self) -> bool:
        """Return whether to try. While it is open only the first to ask after each pause may."""
        if not self._failing:
            return True
        with self._lock:
            now = time.monotonic()
            if now < self._open_until:
                return False
            self._open_until = now + self.pause_s
            return True

    @property
    def is_open(self) -> bool:
        """Whether something failed and nothing has succeeded since. Asking is no trial."""
        return self._failing

    def succeeded(self) -> None:
        """Close it."""
        self._failing = False

    def failed(self) -> bool:
        """Open it; return whether it was closed before."""
        with self._lock:
            first, self._failing = not self._failing, True
            self._open_until = time.monotonic() + self.pause_s
            return first
