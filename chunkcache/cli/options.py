"""Commands whose options are the fields of one frozen dataclass.

    Policies = Annotated[tuple[str, ...], option("--policy", help="May be given several times.")]

    @dataclass(frozen=True, kw_only=True)
    class LoadOptions:
        data: Annotated[Path, argument()]
        policies: Policies = ("full", "query")
        requests: Annotated[int, option(type=click.IntRange(2))] = 60
        warm: Annotated[bool, option(help="Stores are filled first.")] = False
        model: ModelOptions

    @command("load")
    def bench_load(options: LoadOptions) -> None:
        ...

A field's type gives the option's: `bool` is a flag, a tuple an option that may be given several times. A field that
is itself such a dataclass adds all of its options. `bench_load` is then a click command, and
`bench_load.run(LoadOptions(...))` calls the function itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

import click

from chunkcache.cli.inputs import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STORE_VARIABLE = "CHUNKCACHE_STORE"  # environment variable
FOLDER = click.Path(path_type=Path, file_okay=False)
T = TypeVar("T")
Parameter = Callable[[str, dict[str, Any]], click.Parameter]


def option(*flags: str, **settings: Any) -> Parameter:
    """Mark a field as an option; its flags are `--` and the field's name unless they are given.

    Args:
        flags: such as `--policy`.
        settings: keywords of `click.Option`, such as `help` and `type`.
    """
    return lambda name, known: click.Option([*(flags or [f"--{name.replace('_', '-')}"]), name], **known | settings)


def count(help_text: str | None = None, *flags: str, least: int = 1) -> Parameter:
    """Mark a field as an option that takes a whole number of `least` or more."""
    return option(*flags, type=click.IntRange(least), help=help_text)


def argument(**settings: Any) -> Parameter:
    """Mark a field as an argument; `settings` are keywords of `click.Argument`."""

    def make(name: str, known: dict[str, Any]) -> click.Argument:
        nargs = -1 if known.pop("multiple", False) else 1
        return click.Argument(
            [name], **{"type": known["type"], "required": known["required"], "nargs": nargs} | settings
        )

    return make


class OptionsCommand(click.Command, Generic[T]):
    """A command that gathers its options in one dataclass, and calls `run` with it."""

    def __init__(self, name: str, run: Callable[[T], None], options: type[T]) -> None:
        super().__init__(name, params=list(_parameters(options)), callback=self._call, help=run.__doc__)
        self.run = run
        self._options = options

    def _call(self, **values: Any) -> None:
        self.run(_gathered(self._options, values))


def command(name: str) -> Callable[[Callable[[T], None]], OptionsCommand[T]]:
    """Return a decorator that makes a command of a function whose one parameter is a dataclass of options."""

    def decorate(run: Callable[[T], None]) -> OptionsCommand[T]:
        [options] = [hint for name, hint in get_type_hints(run).items() if name != "return"]
        return OptionsCommand(name, run, options)

    return decorate


def _fields(options: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(options, include_extras=True)
    return ((field, hints[field.name]) for field in dataclasses.fields(options))


def _parameters(options: Any) -> Iterator[click.Parameter]:
    for field, hint in _fields(options):
        if dataclasses.is_dataclass(hint):
            yield from _parameters(hint)
            continue
        hint, make = get_args(hint)
        several = get_origin(hint) is tuple
        [kind] = [part for part in get_args(hint) if part not in (NoneType, ...)] or [hint]
        known = {"type": click.Path(path_type=Path) if kind is Path else kind, "required": field.default is MISSING}
        if kind is bool:
            known |= {"is_flag": True}
        elif field.default not in (MISSING, None, ()):
            known |= {"default": field.default, "show_default": True}
        yield make(field.name, known | ({"multiple": True} if several else {}))


def _gathered(options: type[T], values: dict[str, Any]) -> T:
    nested: dict[str, Any] = {field.name: hint for field, hint in _fields(options) if dataclasses.is_dataclass(hint)}
    own = {field.name: values[field.name] for field, _ in _fields(options) if field.name not in nested}
    return options(**own, **{name: _gathered(hint, values) for name, hint in nested.items()})


ChunkTokens = Annotated[int, count("Length of a chunk at most.", least=32)]
System = Annotated[str | None, option(help="System prompt; the chat template's own by default.")]
PolicyName = Annotated[str, option("--policy", help="Which reused tokens are recomputed.")]
AsJson = Annotated[bool, option("--json", help="Print one JSON object to stdout.")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that a command runs."""

    model_name: Annotated[str, option("--model", help="Alias, local folder, GGUF file or Hugging Face id.")] = (
        "smollm2-135m-instruct"
    )
    device: Annotated[str | None, option(help="cpu, cuda, cuda:1, mps; the fastest there is by default.")] = None
    dtype: Annotated[str, option(help="auto, float32, bfloat16 or float16.")] = "auto"

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load it, with its tokenizer."""
        return load(self.model_name, self.device, self.dtype)


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """The store that a command is about."""

    url: Annotated[str, option("--store", envvar=STORE_VARIABLE, show_envvar=True, help="URL of the chunk KV store.")]


@dataclass(frozen=True, kw_only=True)
class FilterOptions:
    """Which of its entries."""

    model: Annotated[str | None, option(help="Only those of this model: its fingerprint or the start of it, as ls "
                                        "shows it.")] = None  # fmt: skip
    tenant: Annotated[str | None, option(metavar="NAME", help="Only those of this tenant.")] = None
    document: Annotated[str | None, option(metavar="ID", help="Only those computed from this document.")] = None
