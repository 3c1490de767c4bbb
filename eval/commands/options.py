"""Options that several benchmarks share; see `chunkcache.cli.options`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from chunkcache.cli.options import FOLDER, AsJson, ModelOptions, argument, command, count, option
from chunkcache.eval.commands.inputs import read_cases

if TYPE_CHECKING:
    from chunkcache.eval import Case
    from chunkcache.eval.data import DataSet

__all__ = [
    "FOLDER",
    "Against",
    "AsJson",
    "CaseOptions",
    "FilledCaseOptions",
    "ModelOptions",
    "OutputOptions",
    "Policies",
    "PromptOptions",
    "argument",
    "check_policies",
    "command",
    "count",
    "option",
]

Against = Annotated[str, option(metavar="POLICY", help="Compare the policies with this one of them, too.")]
Policies = Annotated[
    tuple[str, ...],
    option(
        "--policy",
        help="May be given several times; `query@neighbours` has chunks computed behind their nearest of DATA, too, "
        "and behind the prefix alone for the first place; `query@nearest` the former only, `query@first` the latter.",
    ),
]


def check_policies(names: Iterable[str]) -> None:
    """Raise PolicyError for a policy that is unknown, before a model is loaded."""
    from chunkcache.eval.contenders import parse_contender

    for name in names:
        parse_contender(name)


@dataclass(frozen=True, kw_only=True)
class CaseOptions:
    """Which prompts of a data set are used."""

    chunks: Annotated[int, count("Chunks per prompt; 0 for all of each, two or more.", least=0)] = 5
    prompts: Annotated[int, count("Prompts to run.")] = 20
    skip: Annotated[int, count("Prompts to leave out first.", least=0)] = 0

    def read(self, data: Path | DataSet) -> list[Case]:
        """Read them."""
        return read_cases(data, self.chunks, self.prompts, self.skip)


@dataclass(frozen=True, kw_only=True)
class FilledCaseOptions(CaseOptions):
    """Which prompts of a data set are used, and how their chunks are made alike."""

    fill: Annotated[bool, option(help="Give cases with too few chunks some of other cases.")] = False
    chunk_tokens: Annotated[int | None, count("Cut chunks to so many tokens.")] = None

    def read(self, data: Path | DataSet) -> list[Case]:
        """Read them, with their chunks not cut yet: that takes a tokenizer."""
        return read_cases(data, self.chunks, self.prompts, self.skip, self.fill)


@dataclass(frozen=True, kw_only=True)
class PromptOptions(CaseOptions):
    """Prompts of one data set."""

    data: Annotated[Path, argument()]

    def cases(self) -> list[Case]:
        """Read them."""
        return self.read(self.data)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where rows are kept, and how their summary is printed."""

    out: Annotated[Path | None, option(type=FOLDER, help="Folder for the results: rows are kept there as they come, "
                                       "and an interrupted run goes on.")] = None  # fmt: skip
    as_json: AsJson = False

    def path(self, name: str) -> Path | None:
        """Return the results file of this name; None where none is kept."""
        return None if self.out is None else self.out / f"{name}.jsonl"
