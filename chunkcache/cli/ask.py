"""`chunkcache ask` answers questions over documents; `chunkcache check-model` says whether a model is supported."""

from __future__ import annotations

import json
from pathlib import Path

import click

from chunkcache.cli.console import out, progress, table
from chunkcache.cli.inputs import answer, indexed, load
from chunkcache.cli.options import (
    STORE_VARIABLE,
    device_options,
    json_option,
    model_options,
    policy_option,
    retrieval_options,
    system_option,
)
from chunkcache.errors import InputError


@click.command()
@click.argument("questions", nargs=-1, required=True)
@click.option("--docs", required=True, type=click.Path(path_type=Path), help="Folder or file of documents.")
@click.option(
    "--index",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to keep the index in: the next time only documents that have changed are read into it.",
)
@model_options
@retrieval_options
@click.option(
    "--search",
    "mode",
    type=click.Choice(["hybrid", "dense", "keyword"]),
    default="hybrid",
    show_default=True,
    help="How chunks are searched for.",
)
@policy_option
@click.option(
    "--store",
    envvar=STORE_VARIABLE,
    default="memory://?max_bytes=2GiB",
    show_default=True,
    show_envvar=True,
    help="URL of the chunk KV store.",
)
@system_option
@click.option(
    "--precompute",
    type=click.Choice(["all", "retrieved"]),
    default="all",
    show_default=True,
    help="Chunks to compute ahead: of the whole folder, or those retrieved for the questions.",
)
@click.option("--max-new-tokens", default=64, show_default=True, type=click.IntRange(1))
@json_option
def ask(
    questions: tuple[str, ...],
    docs: Path,
    index: Path | None,
    model_name: str,
    device: str | None,
    dtype: str,
    top_k: int,
    chunk_tokens: int,
    mode: str,
    policy: str,
    store: str,
    system: str | None,
    precompute: str,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Answer QUESTIONS over the documents in --docs."""
    from chunkcache.blend import parse_policy
    from chunkcache.corpus import Corpus
    from chunkcache.llm import wrap
    from chunkcache.retriever import load_documents
    from chunkcache.store import open_store

    chosen, opened = parse_policy(policy), open_store(store)  # bad input shows before any work
    for question in questions:
        if not question.strip():
            raise InputError(f"the question is empty ({question!r}); pass the text to be answered")
    documents = load_documents(docs)
    model, tokenizer = load(model_name, device, dtype)
    llm = wrap(model, tokenizer, store=opened, policy=chosen)
    everything = precompute == "all"
    corpus = Corpus(llm, indexed(documents, tokenizer, chunk_tokens, index), system=system, ahead=everything)
    with progress("precomputing chunks") as on_progress:
        corpus.sync(documents, on_progress)
        if everything:
            corpus.precompute(on_progress)
    if index is not None and corpus.retriever.unsaved:
        corpus.retriever.save(index)
    found = [corpus.search(question, top_k, mode) for question in questions]
    if not everything:
        chunks = [hit.chunk for hits in found for hit in hits]
        with progress("precomputing chunks") as on_progress:
            owners = [chunk.document_id for chunk in chunks]
            llm.precompute([chunk.text for chunk in chunks], system, on_progress, documents=owners)
    answers = [
        answer(llm, question, hits, corpus.passages(hits), system, max_new_tokens, quiet=as_json)
        for question, hits in zip(questions, found, strict=True)
    ]
    if as_json:
        click.echo(json.dumps({"answers": answers, "store": opened.stats().as_dict()}, indent=2))


@click.command("check-model")
@click.argument("model_name", metavar="MODEL")
@device_options
@json_option
def check_model(model_name: str, device: str | None, dtype: str, as_json: bool) -> None:
    """Say whether MODEL is supported, and show the figures of its self-check."""
    from chunkcache.blend import Decoder, self_check
    from chunkcache.library.fingerprint import fingerprint

    model, tokenizer = load(model_name, device, dtype)
    decoder = Decoder(model)
    check = self_check(decoder)
    facts = {
        "model": model_name,
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "layers": len(decoder.layers),
        "max_tokens": decoder.max_tokens,
        "fingerprint": fingerprint(model, tokenizer),
        **check.as_dict(),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    rows = [[name.replace("_", " "), f"{v:.2g}" if isinstance(v, float) else str(v)] for name, v in facts.items()]
    out.print(table("supported: selective prefill agrees with the model's own", ["figure", "value"], rows))
