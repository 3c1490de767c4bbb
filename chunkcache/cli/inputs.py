"""Steps that several commands share: load a model, index documents, stream an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from chunkcache.cli.console import err, progress, status
from chunkcache.errors import InputError

if TYPE_CHECKING:  # torch and transformers take seconds to import: only a command that needs them does
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from chunkcache.engine.streaming import TextStream
    from chunkcache.retriever import Hit, Retriever


def load(name: str, device: str | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, showing the progress."""
    with status(f"loading {name}") as on_status:
        from chunkcache.models import load_model

        return load_model(name, device=device, dtype=dtype, on_status=on_status)


def indexed(
    documents: Sequence[Any], tokenizer: PreTrainedTokenizerBase, chunk_tokens: int, folder: Path | None = None
) -> Retriever:
    """Return the index that was saved in a folder, or else one that is built of the documents."""
    from chunkcache.retriever import Retriever

    if folder is None or not Retriever.saved_in(folder):
        with progress("indexing documents") as on_progress:
            return Retriever.build(documents, tokenizer, size=chunk_tokens, on_progress=on_progress)
    retriever = Retriever.load(folder, tokenizer)
    if retriever.size != chunk_tokens:
        raise InputError(
            f"the index in {str(folder)!r} has chunks of {retriever.size} tokens, not {chunk_tokens}: pass "
            f"--chunk-tokens {retriever.size}, or another folder"
        )
    return retriever


def answer(question: str, hits: Sequence[Hit], begin: Callable[[], TextStream], quiet: bool) -> dict[str, Any]:
    """Stream the answer that `begin` begins to stdout unless `quiet`; return it with its sources and stats."""
    if not quiet:
        err.print(f"[bold]{escape(question)}[/]")
    stream = begin()
    for piece in stream:
        if not quiet:
            click.echo(piece, nl=False)
    result = stream.result
    assert result is not None  # the stream has ended without an error
    if not quiet:
        click.echo()
        stats = result.stats
        err.print(
            f"  [dim]{stats.tokens} tokens, {stats.hits} of {stats.chunks} chunks reused, "
            f"{stats.recomputed_share:.1%} recomputed, first token after {result.ttft_s:.2f} s[/]"
        )
    sources = [
        {"document": hit.chunk.document_id, "chunk": hit.chunk.index, "score": round(hit.score, 4)} for hit in hits
    ]
    return {"question": question, "answer": result.text, "sources": sources, "stats": result.stats.as_dict()}
