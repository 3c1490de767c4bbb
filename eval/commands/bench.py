"""`chunkcache bench selection`, `store`, `packing` and `precompute`: the parts that requests are made of."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from chunkcache.cli.console import Bar, progress
from chunkcache.errors import DocumentError
from chunkcache.eval.commands.inputs import about
from chunkcache.eval.commands.options import (
    ModelOptions,
    OutputOptions,
    PromptOptions,
    argument,
    command,
    count,
    option,
)  # fmt: skip
from chunkcache.eval.commands.show import show_json, show_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from chunkcache.eval import Case, Results


Policy = Annotated[str, option(help="Which reused tokens are recomputed.")]


@contextmanager
def measured(
    name: str, settings: Mapping[str, Any], ran_on: Mapping[str, Any], output: OutputOptions
) -> Iterator[tuple[Results, Bar]]:
    """Open the results `name`, which begins with the bench's name and `-`, and print what they come to at the end."""
    from chunkcache.eval.report import build_report
    from chunkcache.eval.results import Results

    bench = name.partition("-")[0]
    with Results.open(output.path(name), bench, dict(settings), dict(ran_on)) as results, progress(name) as bar:
        yield results, bar
    if output.as_json:
        show_json(build_report({name: results}))
    else:
        show_report({name: results})


@dataclass(frozen=True, kw_only=True)
class PromptBenchOptions:
    """What a measurement over the prompts of a data set takes."""

    prompts: PromptOptions
    model: ModelOptions
    output: OutputOptions

    @contextmanager
    def measured(
        self, bench: str, model: PreTrainedModel, cases: Sequence[Case], policies: Sequence[str] = (), **settings: Any
    ) -> Iterator[tuple[Results, Bar]]:
        """Open the results of `bench` on these cases under these policies, and print what they come to at the end."""
        from chunkcache.blend import parse_policy
        from chunkcache.eval.fidelity import ANSWER_TOKENS
        from chunkcache.eval.machine import SEED, ran_on

        asked = self.prompts
        settings |= {
            **about(asked.data), "chunks": asked.chunks, "prompts": len(cases), "skip": asked.skip,
            "policies": list(policies), "options": {policy: str(parse_policy(policy)) for policy in policies},
            "answer_tokens": ANSWER_TOKENS, "seed": SEED,
        }  # fmt: skip
        with measured(f"{bench}-{asked.data.stem}-{asked.chunks}", settings, ran_on(model), self.output) as opened:
            yield opened


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(PromptBenchOptions):
    """What is selected from, and how much."""

    ratio: Annotated[float, option(type=click.FloatRange(0, 1), help="Share recomputed.")] = 0.03


@command("selection")
def bench_selection(options: SelectionOptions) -> None:
    """Compare ways to select what is recomputed, at equal cost, by fidelity alone."""
    from chunkcache.eval.ablation import BENCH, ablate

    cases = options.prompts.cases()
    model, tokenizer = options.model.load()
    with options.measured(BENCH, model, cases, ratio=options.ratio) as (results, on_prompt):
        ablate(results, model, tokenizer, cases, options.ratio, on_prompt)


@dataclass(frozen=True, kw_only=True)
class StoreOptions(PromptBenchOptions):
    """The stores that are compared, and the requests that read from them."""

    stores: Annotated[
        tuple[str, ...],
        option("--store", help="URL of a store to compare with memory; may be given several times. By default a "
               "folder on disk, with each of the codecs."),
    ] = ()  # fmt: skip
    policy: Policy = "query"


@command("store")
def bench_store(options: StoreOptions) -> None:
    """Compare stores on the prompts of DATA: put and get, time to first token over memory's, fidelity of codecs."""
    from chunkcache.blend import parse_policy
    from chunkcache.eval.stores import BENCH, CODECS, bench_stores
    from chunkcache.store import open_store
    from chunkcache.store.url import redacted

    parse_policy(options.policy)
    with tempfile.TemporaryDirectory(prefix="chunkcache-") as folder, ExitStack() as opened:
        in_folder = {f"disk://{codec}": f"disk://{folder}/{number}{codec}" for number, codec in enumerate(CODECS)}
        urls = dict(zip(options.stores, options.stores, strict=True)) or in_folder
        stores = {name: opened.enter_context(open_store(url)) for name, url in urls.items()}
        cases = options.prompts.cases()
        model, tokenizer = options.model.load()
        names = list(map(redacted, urls))
        with options.measured(BENCH, model, cases, [options.policy], stores=names) as (results, on_prompt):
            bench_stores(results, model, tokenizer, cases, stores, options.policy, on_prompt)


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """The chunks that are packed."""

    lengths: Annotated[
        tuple[int, ...],
        option("--chunk-tokens", type=click.IntRange(1), help="Length of a chunk; may be given several times."),
    ] = (64, 256, 512)
    rounds: Annotated[int, option(type=click.IntRange(1), help="Runs of each length.")] = 5
    model: ModelOptions
    output: OutputOptions


@command("packing")
def bench_packing(options: PackingOptions) -> None:
    """Measure how many chunks are precomputed per second, packed and one by one."""
    from chunkcache.eval import packing
    from chunkcache.eval.machine import ran_on

    model, tokenizer = options.model.load()
    settings = {"lengths": list(options.lengths), "tokens": packing.TOKENS, "rounds": options.rounds}
    with measured("packing", settings, ran_on(model), options.output) as (results, on_step):
        packing.bench_packing(results, model, tokenizer, options.lengths, packing.TOKENS, options.rounds, on_step)


@dataclass(frozen=True, kw_only=True)
class PrecomputeOptions:
    """The chunks that are computed behind one another."""

    data: Annotated[Path, argument()]
    texts: Annotated[int, count("Chunks to compute.", least=2)] = 16
    chunk_tokens: Annotated[int, count("Cut chunks to so many tokens.")] = 512
    rounds: Annotated[int, count("Times they are computed in each way.")] = 2
    model: ModelOptions
    output: OutputOptions


@command("precompute")
def bench_precompute(options: PrecomputeOptions) -> None:
    """Measure what it costs to precompute the chunks of DATA behind their nearest instead of the lead-in alone."""
    from chunkcache.eval import precompute
    from chunkcache.eval.data import Case, DataSet, cut
    from chunkcache.eval.machine import ran_on
    from chunkcache.eval.neighbours import ChunkPool

    chunks = DataSet.read(options.data).chunks()[: options.texts]
    if len(chunks) < 2:
        raise DocumentError(f"{options.data} has {len(chunks)} chunk: none is nearest to another; give more")
    model, tokenizer = options.model.load()
    texts = list(cut([Case("", chunks)], options.chunk_tokens, tokenizer)[0].chunks)
    settings = {
        **about(options.data), "texts": len(texts), "chunk_tokens": options.chunk_tokens, "rounds": options.rounds,
        "ways": list(precompute.WAYS),
    }  # fmt: skip
    name = f"{precompute.BENCH}-{options.data.stem}"
    with measured(name, settings, ran_on(model), options.output) as (results, on_step):
        nearest = ChunkPool(texts).nearest(texts)
        precompute.bench_precompute(results, model, tokenizer, texts, nearest, options.rounds, on_step)
