"""The `chunkcache bench` commands round retrieval: what is found, in which order, what hints help, and LangChain."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import click

from chunkcache.errors import InputError
from chunkcache.eval.commands.bench import Policy, PromptBenchOptions, measured
from chunkcache.eval.commands.inputs import about
from chunkcache.eval.commands.options import ModelOptions, OutputOptions, argument, command, option


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions:
    """What is indexed and asked."""

    corpus: Annotated[Path, argument()]
    questions: Annotated[Path, argument()]
    add_context: Annotated[bool, option(help="Add the questions' own paragraphs that the corpus lacks.")] = False
    precompute: Annotated[
        int,
        option(type=click.IntRange(0), help="Documents whose KV are computed as well, packed and one by one."),
    ] = 0
    chunk_tokens: Annotated[int, option(type=click.IntRange(32), help="Length of a chunk at most.")] = 256
    model: ModelOptions
    output: OutputOptions


@command("retrieval")
def bench_retrieval(options: RetrievalOptions) -> None:
    """Measure how much of what supports the answers to QUESTIONS is found in CORPUS, and how fast it is indexed."""
    from chunkcache.eval import retrieval
    from chunkcache.eval.data import checksum
    from chunkcache.eval.machine import ran_on
    from chunkcache.eval.packing import precompute_speed
    from chunkcache.retriever import load_documents

    questions, documents = retrieval.load_questions(options.questions), load_documents(options.corpus)
    setup = retrieval.Setup(size=options.chunk_tokens, add_context=options.add_context)
    settings = {
        **about(options.corpus), "questions_sha256": checksum(options.questions),
        "precompute": options.precompute, **asdict(setup),
    }  # fmt: skip
    model, tokenizer = options.model.load()
    name = f"retrieval-{options.corpus.stem}"
    with measured(name, settings, ran_on(model), options.output) as (results, on_progress):
        retrieval.bench_retrieval(results, documents, questions, tokenizer, setup, on_progress=on_progress)
        if options.precompute and not results.done(kind="precompute"):
            on_progress.say("precomputing chunks")
            speed = precompute_speed(model, tokenizer, documents[: options.precompute], options.chunk_tokens)
            results.add({"kind": "precompute", **speed})


@dataclass(frozen=True, kw_only=True)
class ChainOptions(PromptBenchOptions):
    """The prompts that a chain runs on."""

    rounds: Annotated[int, option(type=click.IntRange(1), help="Runs of each prompt.")] = 3
    policy: Policy = "query"


@command("chain")
def bench_chain(options: ChainOptions) -> None:
    """Measure the time to first token through a LangChain chain, with the plug-in and without, on prompts of DATA."""
    from chunkcache.eval import chain

    cases = options.prompts.cases()
    model, tokenizer = options.model.load()
    with options.measured(chain.BENCH, model, cases, [options.policy], rounds=options.rounds) as (results, on_prompt):
        chain.bench_chain(results, model, tokenizer, cases, options.policy, options.rounds, on_prompt)


@dataclass(frozen=True, kw_only=True)
class HintsOptions:
    """The retrievals that are replayed."""

    sessions: Annotated[Path | None, option(help="Recorded sessions: JSON Lines with turns[].document_ids.")] = None
    blocks: Annotated[Path | None, option(help="A trace in Mooncake's format.")] = None
    seeds: Annotated[int, option(type=click.IntRange(1), help="Seeds of what is drawn.")] = 3
    output: OutputOptions


@command("hints")
def bench_hints(options: HintsOptions) -> None:
    """Replay retrievals (a Zipf law by default) and measure the nearest tier's hit rate, with and without hints."""
    import chunkcache
    from chunkcache.eval import hints, traces
    from chunkcache.eval.machine import code, commit

    source = options.sessions or options.blocks
    if options.sessions is not None:
        made = [traces.session_trace(options.sessions, seed) for seed in range(options.seeds)]
    elif options.blocks is not None:
        made = [traces.block_trace(options.blocks)]
    else:
        made = [traces.zipf_trace(seed) for seed in range(options.seeds)]
    settings = {**({} if source is None else about(source)), **hints.settings(made)}
    code_only = {"chunkcache": chunkcache.__version__, "code": code(), "commit": commit()}  # no model runs
    with measured(f"hints-{made[0].name}", settings, code_only, options.output) as (results, on_step):
        hints.bench_hints(results, made, on_step=on_step)


@dataclass(frozen=True, kw_only=True)
class OrderOptions(PromptBenchOptions):
    """The requests whose chunks are reordered."""

    visits: Annotated[int, option(type=click.IntRange(2), help="How often each prompt comes.")] = 3


@command("order")
def bench_order(options: OrderOptions) -> None:
    """Measure what reordering within a rank tolerance does to reuse and to answers, on prompts like those of DATA."""
    from chunkcache.eval import order

    cases = options.prompts.cases()
    if len(cases) < 2:
        raise InputError(f"{len(cases)} prompts are too few to be like one another; pass --prompts 2 or more")
    model, tokenizer = options.model.load()
    asked = {"tolerances": list(order.TOLERANCES), "store": order.STORE, "visits": options.visits}
    with options.measured(order.BENCH, model, cases, order.POLICIES, **asked) as (results, on_request):
        order.bench_order(results, model, tokenizer, order.similar(cases, options.visits), on_request=on_request)
