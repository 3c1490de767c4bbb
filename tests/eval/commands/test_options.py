"""A command's options come from a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click
import pytest
from click.testing import CliRunner

from chunkcache.eval.commands.options import ModelOptions, argument, command, option


@dataclass(frozen=True, kw_only=True)
class Options:
    data: Annotated[Path, argument()]
    more: Annotated[tuple[Path, ...], argument()] = ()
    policies: Annotated[tuple[str, ...], option("--policy")] = ("full", "query")
    rates: Annotated[tuple[float, ...], option("--rate")] = ()
    max_batch: Annotated[int, option(type=click.IntRange(1), help="Sequences at once.")] = 8
    bound: Annotated[float | None, option()] = None
    warm: Annotated[bool, option()] = False
    into: Annotated[Path, option()]
    model: ModelOptions


taken: list[Options] = []


@command("try")
def run(options: Options) -> None:
    """Take options."""
    taken.append(options)


def call(*words: str) -> Options:
    result = CliRunner().invoke(run, words)
    assert result.exit_code == 0, result.output
    return taken.pop()


def test_options_that_are_not_given_have_the_dataclass_defaults() -> None:
    assert call("a", "--into", "x") == Options(data=Path("a"), more=(), into=Path("x"), model=ModelOptions())


def test_options_that_are_given_have_the_types_of_their_fields() -> None:
    found = call("a", "b", "c", "--into", "x", "--policy", "link", "--rate", "1", "--rate", "2", "--warm", "--bound",
                 "3", "--max-batch", "2", "--model", "m", "--dtype", "float32")  # fmt: skip
    assert found == Options(
        data=Path("a"), more=(Path("b"), Path("c")), policies=("link",), rates=(1.0, 2.0), max_batch=2, bound=3.0,
        warm=True, into=Path("x"), model=ModelOptions(model_name="m", dtype="float32"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("a",), "Missing option '--into'"),
        (("--into", "x"), "Missing argument 'DATA'"),
        (("a", "--into", "x", "--max-batch", "0"), "0 is not in the range x>=1"),
    ],
)
def test_what_is_wrong_is_refused_as_click_does(words: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(run, words)
    assert result.exit_code == 2
    assert said in result.output


def test_the_help_shows_defaults_and_the_docstring() -> None:
    shown = " ".join(CliRunner().invoke(run, ["--help"]).output.split())
    assert "Take options." in shown
    assert "Sequences at once. [default: 8; x>=1]" in shown
    assert "--policy TEXT [default: full, query]" in shown
    assert "--warm" in shown
