"""The server's log: a line per request and per event, as text or as JSON, and never any text of a prompt."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

from chunkcache.engine.faults import trace_of
from chunkcache.serve.record import Record

logger = logging.getLogger("chunkcache.serve")
_QUIET = ("/health", "/metrics", "/dashboard")  # asked for again and again
_LOGGERS = ("chunkcache", "uvicorn")


def log_request(record: Record) -> None:
    """Write the line of a request that is over."""
    level = logging.DEBUG if record.route.startswith(_QUIET) or record.route == "/" else logging.INFO
    if logger.isEnabledFor(level):
        logger.log(level, "request", extra={"fields": record.summary()})


class Lines(logging.Formatter):
    """One line per event, but for tracebacks in text; errors without their texts.

    Args:
        form: `text`, or `json` for an object per line with `time`, `level`, `event` and what belongs to the event.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        message, fields = record.getMessage(), dict(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:  # of a library's own
            fields["error"] = type(record.exc_info[1]).__name__
            message += "\n" + trace_of(record.exc_info[1])
        elif (error := getattr(record, "error", None)) is not None:
            fields["error"] = error
        if not self._json:
            return " ".join([stamp, record.levelname, message, *_pairs(fields)])
        event, _, trace = message.partition("\n")
        told = {"time": stamp, "level": record.levelname.lower(), "event": event, **fields}
        return json.dumps({**told, "traceback": trace} if trace else told)


def _pairs(fields: dict[str, Any], before: str = "") -> list[str]:
    pairs = []
    for name, value in fields.items():
        if isinstance(value, dict):
            pairs += _pairs(value, f"{before}{name}.")
        else:
            told = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            pairs.append(f"{before}{name}={json.dumps(told) if set(told) & set(' =') or not told else told}")
    return pairs


def configure(form: str, stream: TextIO | None = None) -> None:
    """Write what chunkcache and the HTTP server log to a stream, stderr by default.

    Args:
        form: as in `Lines`.
        stream: where to.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(Lines(form))
    for name in _LOGGERS:
        own = logging.getLogger(name)
        own.handlers, own.propagate = [handler], False
    logging.getLogger("chunkcache").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
