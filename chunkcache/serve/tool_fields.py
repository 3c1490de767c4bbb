"""What requests say of tools: those that there are, and the calls that were made."""

from __future__ import annotations

from typing import Any, Literal

from chunkcache.serve.fields import FunctionName, Json, NonEmpty, Strict, Text


class CalledFunction(Strict):
    """Which function was called, and with what."""

    name: FunctionName
    arguments: Text


class ToolCall(Strict):
    """A call that the assistant made."""

    id: NonEmpty
    type: Literal["function"] = "function"
    function: CalledFunction


class Function(Strict):
    """A function that may be called, with the JSON schema of its arguments."""

    name: FunctionName
    description: Text | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Strict):
    """What a model may call."""

    type: Literal["function"]
    function: Function

    def arguments(self) -> dict[str, Any]:
        """Return the schema of its arguments."""
        return self.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}

    def told(self) -> dict[str, Any]:
        """Return it as chat templates expect it."""
        about = {"name": self.function.name, "description": self.function.description or ""}
        return {"type": "function", "function": {**about, "parameters": self.arguments()}}


class NamedFunction(Strict):
    """A function by its name."""

    name: FunctionName


class NamedTool(Strict):
    """The tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction
