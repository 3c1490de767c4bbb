"""What is told of one request, without any text of its prompt."""

from __future__ import annotations

from typing import Any

from chunkcache.engine.stats import RequestStats
from chunkcache.serve.service import Choice


def by_chunk(stats: RequestStats, choice: Choice) -> list[dict[str, Any]]:
    """Return what clients are told of each chunk of a prompt, in order; nothing where it is not known.

    `guard` is `held` where an approximate chunk passed under the fidelity guard, and `full` where that fell back to
    full prefill; without a guard it is not there.
    """
    if stats.report is None:
        return []
    told = []
    spans = {span.start: span for span in choice.request.prompt.spans}
    guard = "full" if stats.guard_full else "held" if stats.guard_passes else None
    for index, chunk in enumerate(stats.report.chunks):
        document = choice.documents.get(spans[chunk.start].chunk_ids) if chunk.start in spans else None
        told.append(
            {
                "index": index,
                **({} if document is None else {"document": document}),
                "start": chunk.start,
                "tokens": chunk.tokens,
                "source": chunk.source,
                "lead": chunk.lead,
                "reused_tokens": chunk.reused_tokens,
                "recomputed_tokens": chunk.recomputed_tokens,
                "exact": chunk.exact,
                **({} if guard is None or not (guard == "full" or chunk.reused_tokens) else {"guard": guard}),
            }
        )
    return told
