"""One connection to a Redis server, for values of a megabyte and more.

redis-py connects, authenticates and encrypts. Its parser copies each value two or three times; here large values are
received into the buffers that they stay in, at two to five times the rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
import torch
from redis.exceptions import AskError, BusyLoadingError, ClusterDownError, MovedError

from chunkcache.store.entry import DamagedError

Bytes = bytes | memoryview
MIB = 2**20
_LONGEST_LINE = 2**14
_ERRORS: dict[str, Callable[[str], redis.RedisError]] = {
    "MOVED": MovedError,
    "ASK": AskError,
    "CLUSTERDOWN": ClusterDownError,
    "LOADING": BusyLoadingError,
}


class Link:
    """A connection while it is lent.

    Args:
        connection: of redis-py, connected, with no reply outstanding, and speaking RESP2.
        timeout: seconds that the server may take to answer, and again for each MiB that it sends.
    """

    def __init__(self, connection: Any, timeout: float) -> None:
        self._connection = connection
        self._socket = connection._sock  # redis-py has no public name for it
        self._timeout = timeout
        self._ahead = bytearray()  # what was received and belongs to the next line or value

    def send(self, commands: Sequence[Sequence[Bytes]]) -> None:
        """Send commands; their replies come in the same order."""
        self._connection.send_packed_command(_packed(commands))

    def done(self) -> None:
        """Take the reply to a command that returns no value.

        Raises:
            redis.RedisError: the server refused it.
        """
        self._connection.read_response()

    def value(self, least: int, most: int) -> memoryview | None:
        """Take the reply to a GET: a new buffer, or None if there is no such value.

        Raises:
            DamagedError: it is no string of `least` to `most` bytes.
            redis.RedisError: the server refused it.
            OSError: it did not come in time.
        """
        line = self._line()
        if line == b"$-1":
            return None
        if line[:1] == b"-":
            raise _error(line[1:].decode(errors="replace"))
        if line[:1] != b"$" or not line[1:].isdigit():
            raise redis.InvalidResponse("the reply to a GET is none that RESP2 knows")
        nbytes = int(line[1:])
        if not least <= nbytes <= most:
            raise DamagedError(f"a value has {nbytes} bytes")
        value: memoryview = torch.empty(nbytes, dtype=torch.uint8).numpy().data
        self._fill(value)
        if self._line():
            raise redis.InvalidResponse("a value does not end where it should")
        return value

    def _line(self) -> bytes:
        while b"\r\n" not in self._ahead:
            received = self._socket.recv(64)
            if not received:
                raise redis.ConnectionError("the server has closed the connection")
            self._ahead += received
            if len(self._ahead) > _LONGEST_LINE:
                raise redis.InvalidResponse("a line of the reply has no end")
        line, _, self._ahead = self._ahead.partition(b"\r\n")
        return bytes(line)

    def _fill(self, value: memoryview) -> None:
        deadline = time.monotonic() + self._timeout * (1 + len(value) / MIB)
        filled = min(len(self._ahead), len(value))
        value[:filled] = self._ahead[:filled]
        del self._ahead[:filled]
        while filled < len(value):
            received = self._socket.recv_into(value[filled:])
            if not received:
                raise redis.ConnectionError("the server has closed the connection")
            filled += received
            if filled < len(value) and time.monotonic() > deadline:  # slower than the allowed rate
                raise redis.TimeoutError("a value does not come in time")


@contextmanager
def linked(pool: redis.ConnectionPool, timeout: float) -> Iterator[Link]:
    """Lend a connection of `pool`. Whatever goes wrong while it is lent, it is not used again."""
    connection: Any = pool.get_connection()
    try:
        yield Link(connection, timeout)
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _packed(commands: Sequence[Sequence[Bytes]]) -> list[Bytes]:
    """Return commands as they are sent: large arguments uncopied, in pieces that have the whole timeout each."""
    pieces: list[Bytes] = []
    small = bytearray()
    for command in commands:
        small += b"*%d\r\n" % len(command)
        for argument in command:
            small += b"$%d\r\n" % len(argument)
            if len(argument) > 2**14:
                pieces += [bytes(small), *(argument[i : i + MIB] for i in range(0, len(argument), MIB))]
                small.clear()
            else:
                small += argument
            small += b"\r\n"
    return [*pieces, bytes(small)]


def _error(message: str) -> Exception:
    code, _, rest = message.partition(" ")
    if code == "WRONGTYPE":
        return DamagedError("a value is no string")
    return _ERRORS[code](rest) if code in _ERRORS else redis.ResponseError(message)
