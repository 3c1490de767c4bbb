"""`chunkcache ask` answers questions over documents; `chunkcache check-model` says whether a model is supported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import click

from chunkcache.cli.console import out, progress, table
from chunkcache.cli.inputs import answer, indexed, load
from chunkcache.cli.options import (
    FOLDER,
    STORE_VARIABLE,
    AsJson,
    ChunkTokens,
    ModelOptions,
    PolicyName,
    System,
    argument,
    command,
    count,
    option,
)
from chunkcache.defaults import DEFAULT_POLICY
from chunkcache.errors import InputError

MODES = click.Choice(["hybrid", "dense", "keyword"])


@dataclass(frozen=True, kw_only=True)
class AskOptions:
    """Questions over a folder of documents."""

    questions: Annotated[tuple[str, ...], argument(required=True)]
    docs: Annotated[Path, option(help="Folder or file of documents.")]
    index: Annotated[Path | None, option(type=FOLDER, help="Folder to keep the index in: the next time only "
                                         "documents that have changed are read into it.")] = None  # fmt: skip
    model: ModelOptions
    top_k: Annotated[int, count("Chunks per prompt.")] = 4
    chunk_tokens: ChunkTokens = 256
    mode: Annotated[str, option("--search", type=MODES, help="How chunks are searched for.")] = "hybrid"
    policy: PolicyName = DEFAULT_POLICY
    store: Annotated[str, option(envvar=STORE_VARIABLE, show_envvar=True, help="URL of the chunk KV store.")] = (
        "memory://?max_bytes=2GiB"
    )
    system: System = None
    precompute: Annotated[str, option(type=click.Choice(["all", "retrieved"]), help="Chunks to compute ahead: of the "
                                      "whole folder, or those retrieved for the questions.")] = "all"  # fmt: skip
    max_new_tokens: Annotated[int, count()] = 64
    as_json: AsJson = False


@command("ask")
def ask(options: AskOptions) -> None:
    """Answer QUESTIONS over the documents in --docs."""
    from chunkcache.blend import parse_policy
    from chunkcache.corpus import Corpus
    from chunkcache.llm import wrap
    from chunkcache.retriever import load_documents
    from chunkcache.store import open_store

    chosen, opened = parse_policy(options.policy), open_store(options.store)  # bad input shows before any work
    for question in options.questions:
        if not question.strip():
            raise InputError(f"the question is empty ({question!r}); pass the text to be answered")
    documents = load_documents(options.docs)
    model, tokenizer = options.model.load()
    llm = wrap(model, tokenizer, store=opened, policy=chosen)
    everything = options.precompute == "all"
    retriever = indexed(documents, tokenizer, options.chunk_tokens, options.index)
    corpus = Corpus(llm, retriever, system=options.system, precompute=everything)
    with progress("precomputing chunks") as on_progress:
        corpus.sync(documents, on_progress)
        if everything:
            corpus.precompute(on_progress)
    if options.index is not None and retriever.unsaved:
        retriever.save(options.index)
    results = [corpus.search(question, options.top_k, options.mode) for question in options.questions]
    chunks = [hit.chunk for hits in results for hit in hits]
    with progress("precomputing chunks") as on_progress:
        if everything:  # but for these, a small store may have let go of any
            corpus.precompute(on_progress, chunks)
        else:
            texts, owners = [chunk.text for chunk in chunks], [chunk.document_id for chunk in chunks]
            llm.precompute(texts, system=options.system, documents=owners, on_progress=on_progress)
    answers = []
    for question, hits in zip(options.questions, results, strict=True):
        begin = partial(
            llm.stream,
            question,
            corpus.passages(hits),
            system=options.system,
            max_new_tokens=options.max_new_tokens,
        )
        answers.append(answer(question, hits, begin, quiet=options.as_json))
    if options.as_json:
        click.echo(json.dumps({"answers": answers, "store": opened.stats().as_dict()}, indent=2))


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """A model to be checked."""

    model_name: Annotated[str, argument(metavar="MODEL")]
    device: Annotated[str | None, option(help="cpu, cuda, cuda:1, mps; the fastest there is by default.")] = None
    dtype: Annotated[str, option(help="auto, float32, bfloat16 or float16.")] = "auto"
    as_json: AsJson = False


@command("check-model")
def check_model(options: CheckOptions) -> None:
    """Say whether MODEL is supported, and show the figures of its self-check."""
    from chunkcache.blend import Decoder, self_check
    from chunkcache.blend.query import Query
    from chunkcache.blend.scout import scout_layers
    from chunkcache.engine.tuning import Tuning
    from chunkcache.library.fingerprint import fingerprint
    from chunkcache.store import default_store

    model, tokenizer = load(options.model_name, options.device, options.dtype)
    decoder = Decoder(model)
    check = self_check(decoder)
    name = fingerprint(model, tokenizer)
    tuning = Tuning(name, None, len(decoder.layers), decoder.narrowest_window)
    found = tuning.calibration
    unknown = "not measured; run chunkcache calibrate"
    query = tuning.resolve(Query())
    facts = {
        "model": options.model_name,
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "layers": len(decoder.layers),
        "max_tokens": decoder.max_tokens,
        "fingerprint": name,
        "query": str(query),
        "query_looks_at_layers": ", ".join(map(str, scout_layers(decoder, query))),
        "default_store": default_store({weight.device for weight in model.parameters()}),
        "lead_in": unknown if found is None or found.lead is None else "measured",
        "look": unknown if found is None or found.look is None else "measured",
        "query_recomputes_at_most": tuning.look.most,
        "query_looks_from_tokens": tuning.look.least,
        "query_recomputes_by_words": tuning.look.words,
        **check.as_dict(),
    }
    if options.as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    rows = [[name.replace("_", " "), f"{v:.2g}" if isinstance(v, float) else str(v)] for name, v in facts.items()]
    out.print(table("supported: selective prefill agrees with the model's own", ["figure", "value"], rows))
