"""Options given as text, as in a store URL or a policy string, read by the types that a function or class declares.

The fields of a parameter that is a dataclass are options of their own: functions share them by sharing the dataclass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def option_types(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the type of each option of a function or class, in order."""
    types: dict[str, Any] = {}
    for name, kind in _parameters(target).items():
        types.update(option_types(kind) if _is_group(kind) else {name: kind})
    return types


def converter(kind: Any) -> Callable[[str], Any]:
    """Return the function that makes a value of type `kind` of a text; it raises ValueError for a text that is none.

    Args:
        kind: `str`, `int`, `float` or another type that is called with a text; one `Annotated` with a function,
            which is called instead; or either with `| None`.
    """
    if get_origin(kind) is Annotated:
        convert: Callable[[str], Any] = kind.__metadata__[0]
        return convert
    members = [member for member in (*get_args(kind), kind) if member is not NoneType]
    return converter(members[0]) if members[0] is not kind else kind


def call_with_options(target: Callable[..., T], options: Mapping[str, Any]) -> T:
    """Call `target` with options by name; those that are fields of a dataclass parameter are gathered into it."""
    arguments = dict(options)
    for name, kind in _parameters(target).items():
        if _is_group(kind) and name not in options:
            given = [option for option in option_types(kind) if option in arguments]
            if given:
                arguments[name] = call_with_options(kind, {option: arguments.pop(option) for option in given})
    return target(**arguments)


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


def _parameters(target: Any) -> dict[str, Any]:
    if _is_group(target):
        kinds = get_type_hints(target, include_extras=True)
        return {field.name: kinds[field.name] for field in fields(target)}
    constructor: Any = target
    kinds = get_type_hints(constructor.__init__ if isinstance(target, type) else target, include_extras=True)
    kinds.pop("return", None)
    return kinds
