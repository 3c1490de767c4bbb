"""Options given as text: read by declared types, gathered into dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest

from chunkcache.kv.options import call_with_options, converter, option_types


def percent(text):
    return float(text.removesuffix("%")) / 100


Percent = Annotated[float, percent]


@dataclass(frozen=True)
class Limits:
    kind: ClassVar[str] = "limits"

    share: Percent | None = None
    count: int = 3


class Taker:
    def __init__(self, name: str, limits: Limits = Limits(), wait: float = 1.0) -> None:
        self.taken = (name, limits, wait)


def test_the_fields_of_a_dataclass_are_options_among_the_others():
    assert list(option_types(Limits)) == ["share", "count"]
    assert list(option_types(Taker)) == ["name", "share", "count", "wait"]
    assert call_with_options(Taker, {"name": "n", "count": 5}).taken == ("n", Limits(count=5), 1.0)
    assert call_with_options(Taker, {"name": "n", "limits": Limits(0.5)}).taken == ("n", Limits(0.5), 1.0)


@pytest.mark.parametrize(
    ("option", "text", "value"), [("name", "n", "n"), ("count", "7", 7), ("wait", "2", 2.0), ("share", "5%", 0.05)]
)
def test_a_text_becomes_a_value_of_the_declared_type(option, text, value):
    converted = converter(option_types(Taker)[option])(text)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(("option", "text"), [("count", "7KiB"), ("count", "1.5"), ("wait", "soon"), ("share", "x")])
def test_a_text_that_is_none_of_the_type_is_refused(option, text):
    with pytest.raises(ValueError, match=text):
        converter(option_types(Taker)[option])(text)


def test_an_option_that_is_none_is_refused_by_the_function():
    with pytest.raises(TypeError, match="colour"):
        call_with_options(Taker, {"name": "n", "colour": "red"})
