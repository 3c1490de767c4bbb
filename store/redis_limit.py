"""How large a value a Redis server takes.

A server that is sent a larger one hangs up, some with an error before, so this looks like an outage. It is none: the
server is asked for its limit, or tried once more where it does not tell.
"""

from __future__ import annotations

import math
import re
import time
from typing import Any

import redis

BELIEVED_S = 3600  # how long a limit is believed: somebody may raise it
_SMALLEST = 2**16  # bytes; a smaller value is no reason to hang up
_COMMAND = 2**10  # bytes that a command may have besides its value
_SETTINGS = (("proto-max-bulk-len", 0), ("client-query-buffer-limit", _COMMAND))  # and bytes of it for other things
_SAID = re.compile(
    r"invalid bulk length|string exceeds maximum|"
    r"(request|record|value|payload) (is |size )?(too (large|big|long)|exceed)"
)


class ValueLimit:
    """What is known of the largest value that one server takes."""

    def __init__(self) -> None:
        self._most: float = math.inf
        self._until = 0.0

    def allows(self, nbytes: int) -> bool:
        """Return whether the server may take a value of so many bytes."""
        return nbytes <= self._most or time.monotonic() > self._until

    def blame(self, fault: Exception, nbytes: int, client: Any, again: bool) -> None:
        """Find out whether a server failed because a value is too large, which is then no longer allowed.

        Where the server does not tell, nothing comes of it before it has failed again.

        Args:
            fault: what sending values ended with.
            nbytes: size of the largest of them.
            client: of redis-py, for the same server.
            again: whether it is the second time.

        Raises:
            redis.RedisError, OSError: it is something else, `fault` or that the server does not answer.
        """
        said = isinstance(fault, redis.ResponseError)
        if nbytes < _SMALLEST or not (_SAID.search(str(fault)) if said else _hung_up(fault)):
            raise fault
        told = _told(client)
        if said or again or nbytes > told:
            self._most, self._until = min(nbytes - 1, told), time.monotonic() + BELIEVED_S


def _hung_up(fault: Exception) -> bool:
    late = isinstance(fault, redis.TimeoutError | TimeoutError)
    return isinstance(fault, redis.ConnectionError | OSError) and not late


def _told(client: Any) -> float:
    """Return the limit by the settings of a server that answers, in bytes; infinity if it does not tell them."""
    try:
        settings = client.config_get(*(name for name, _ in _SETTINGS))
    except redis.ResponseError:  # not permitted, or unknown
        return math.inf
    return min((int(settings[name]) - other for name, other in _SETTINGS if name in settings), default=math.inf)
