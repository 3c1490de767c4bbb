"""What the fields of requests have in common: bounds of texts, and that unknown ones are refused."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator


def is_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return a value that can be written as JSON; raises ValueError for another."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise ValueError("a number or a text in it cannot be written as JSON") from None
    return value


Text = Annotated[str, StringConstraints(max_length=2**20)]
Salt = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
IndexName = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Json = Annotated[dict[str, Any], AfterValidator(is_json)]
Bias = Annotated[float, Field(ge=-100, le=100)]


def _with_nulls(schema: dict[str, Any]) -> None:
    """Let a schema say that a field that may be left out may be null."""
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        kinds = field.get("anyOf", [field])
        if name not in required and all(kind.get("type") != "null" for kind in kinds):
            schema["properties"][name] = {"anyOf": [*kinds, {"type": "null"}]}


class Strict(BaseModel):
    """A part of a request; a field that is null is as if it were not there."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, json_schema_extra=_with_nulls)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: each for name, each in given.items() if each is not None} if isinstance(given, dict) else given
