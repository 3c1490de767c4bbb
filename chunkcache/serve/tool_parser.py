"""Reads the function calls in an answer as it comes; whatever is no call is text, and no text is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from chunkcache.engine.detokenizer import overlap


@dataclass(frozen=True)
class CallForm:
    """How a model writes a call: a JSON object with a name and arguments.

    Attributes:
        opening: what stands before calls; empty where an answer that begins with such an object is a call.
        closing: what stands behind them.
        arguments: what the object calls its arguments.
        listed: whether the calls are a JSON list.
    """

    opening: str
    closing: str
    arguments: str = "arguments"
    listed: bool = False


@dataclass(frozen=True)
class CallPiece:
    """A part of a call.

    Attributes:
        index: which call of the answer.
        arguments: what is added to its arguments.
        name: of the function, in the first part.
        identity: of the call, in the first part.
    """

    index: int
    arguments: str = ""
    name: str | None = None
    identity: str | None = None


Read = str | CallPiece
_HEAD = r'\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{}"\s*:\s*(?=\{{)'
_BETWEEN = " \t\r\n,;[]"


class CallParser:
    """Reads one answer.

    Args:
        form: how calls are written.
        names: the functions that there are: a call of another is text.
        most: calls that are told, behind which nothing is; None for all.
        id_length: characters of the ids of calls; None for OpenAI's form.

    Attributes:
        calls: how many calls were found.
    """

    def __init__(
        self, form: CallForm, names: Collection[str], most: int | None = None, id_length: int | None = None
    ) -> None:
        self._form, self._names, self._most, self._id_length = form, names, most, id_length
        self._head = re.compile(_HEAD.format(form.arguments))
        self._step = self._text if form.opening else self._beginning
        self._blank = _BETWEEN.replace(form.closing, "") if form.closing else _BETWEEN
        self._rest = ""
        self._raw = ""  # what was read since the last text or call, to be given out if it is no call
        self._scan = _Scan()
        self._read: list[Read] = []
        self.calls = 0

    def push(self, text: str) -> list[Read]:
        """Return what is certain by now: texts, and parts of calls."""
        self._rest += text
        while self._step():
            pass
        return self._taken()

    def finish(self) -> list[Read]:
        """Return what was held back: no more text comes."""
        left = self._raw + self._rest
        reading = self._step in (self._text, self._beginning, self._between, self._object)
        if reading and not (self.calls and not left.strip(_BETWEEN)):
            self._say(left)
        self._rest = self._raw = ""
        return self._taken()

    # --- states; each returns whether there may be more to read

    def _text(self) -> bool:
        """Read text, in which calls may begin; white space before a call is none of it."""
        opening = self._form.opening
        before, found, behind = self._rest.partition(opening)
        if found:
            self._say(before.rstrip())
            self._raw, self._rest = before[len(before.rstrip()) :] + opening, behind
            self._step = self._between
            return True
        certain = self._rest[: len(self._rest) - overlap(self._rest, opening)].rstrip()
        self._say(certain)
        self._rest = self._rest[len(certain) :]
        return False

    def _beginning(self) -> bool:
        """Decide by its first character whether an answer is a call."""
        first = self._rest.lstrip()[:1]
        if first:
            self._step = self._between if first == "{" else self._plain
        return bool(first)

    def _plain(self) -> bool:
        self._say(self._rest)
        self._rest = ""
        return False

    def _ignored(self) -> bool:
        self._rest = ""
        return False

    def _between(self) -> bool:
        """Read on to the next object, or to the end of the calls."""
        stripped = self._rest.lstrip(self._blank)
        self._raw += self._rest[: len(self._rest) - len(stripped)]
        self._rest, closing = stripped, self._form.closing
        if not stripped or (closing and stripped != closing and closing.startswith(stripped)):
            return False
        if stripped[0] == "{":
            self._step = self._object
        elif closing and stripped.startswith(closing):
            self._raw += closing
            self._rest = stripped[len(closing) :]
            if not self.calls:
                self._say(self._raw)
            self._raw = ""
            self._step = self._text
        else:
            self._refuse()
        return True

    def _object(self) -> bool:
        """Read an object up to its arguments, or all of it if they do not stand where they usually do."""
        head = self._head.match(self._rest)
        if head:
            name = _loaded(head.group(1))
            if name not in self._names:
                self._refuse()
                return True
            self._begin(name)
            self._scan = _Scan()
            self._scan.take(head.group())
            self._rest = self._rest[head.end() :]
            self._step = self._arguments
            return True
        end = _Scan().take(self._rest, until=0)
        if end is None:
            return False
        call = _loaded(self._rest[:end])
        name, arguments = (
            (call.get(key) for key in ("name", self._form.arguments)) if isinstance(call, dict) else "  "
        )
        arguments = _loaded(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict | None):
            self._refuse()
            return True
        self._begin(name)
        self._read.append(CallPiece(self.calls - 1, json.dumps(arguments or {})))
        self._rest = self._rest[end:]
        self._after()
        return True

    def _arguments(self) -> bool:
        """Give arguments out as they come, up to the bracket that closes them."""
        end = self._scan.take(self._rest, until=1)
        piece = self._rest if end is None else self._rest[:end]
        if piece:
            self._read.append(CallPiece(self.calls - 1, piece))
        self._rest = self._rest[len(piece) :]
        if end is not None:
            self._step = self._tail
        return end is not None

    def _tail(self) -> bool:
        """Read what stands in an object behind its arguments."""
        end = self._scan.take(self._rest, until=0)
        self._rest = "" if end is None else self._rest[end:]
        if end is not None:
            self._after()
        return end is not None

    # ---

    def _after(self) -> None:
        self._step = self._between if self._most is None or self.calls < self._most else self._ignored

    def _begin(self, name: str) -> None:
        identity = uuid4().hex[: self._id_length] if self._id_length else f"call_{uuid4().hex[:24]}"
        self._read.append(CallPiece(self.calls, "", name, identity))
        self._raw = ""
        self.calls += 1

    def _refuse(self) -> None:
        """Take what was read as text: it is no call."""
        self._say(self._raw)
        self._raw = ""
        self._step = self._text if self._form.opening else self._plain

    def _say(self, text: str) -> None:
        if text and not (self.calls and text.isspace()):
            self._read.append(text)

    def _taken(self) -> list[Read]:
        read, self._read = self._read, []
        return read


def delta(read: Read) -> dict[str, Any]:
    """Return what was read as OpenAI's streams tell it."""
    if isinstance(read, str):
        return {"content": read}
    first = {"id": read.identity, "type": "function"} if read.name is not None else {}
    function = {"arguments": read.arguments, **({"name": read.name} if read.name is not None else {})}
    return {"tool_calls": [{"index": read.index, **first, "function": function}]}


def message(read: Sequence[Read]) -> dict[str, Any]:
    """Return all that was read of an answer as OpenAI's message."""
    text = "".join(each for each in read if isinstance(each, str))
    calls: list[dict[str, Any]] = []
    for piece in read:
        if isinstance(piece, str):
            continue
        if piece.name is not None:
            calls.append(
                {"id": piece.identity, "type": "function", "function": {"name": piece.name, "arguments": ""}}
            )
        calls[piece.index]["function"]["arguments"] += piece.arguments
    told: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    return {**told, "content": text or None, "tool_calls": calls} if calls else told


class _Scan:
    """Counts the brackets of JSON that are open."""

    def __init__(self) -> None:
        self._open = 0
        self._quoted = self._escaped = False

    def take(self, text: str, until: int | None = None) -> int | None:
        """Read on; return the index behind the bracket that leaves `until` open, None if there is none."""
        for index, char in enumerate(text):
            if self._quoted:
                self._quoted = char != '"' or self._escaped
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._open += 1
            elif char in "}]":
                self._open -= 1
                if self._open == until:
                    return index + 1
        return None


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
