"""Chunk KV that clients have computed ahead: how many at once, and in which steps."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from chunkcache.errors import ContextLengthError
from chunkcache.library.neighbours import ASKED, Neighbours
from chunkcache.llm import CachedLLM
from chunkcache.serve.background import Steps
from chunkcache.serve.errors import HTTPError
from chunkcache.serve.protocol import ChunksRequest

logger = logging.getLogger("chunkcache")

TOKENS = 65_536  # of one request, by default


def check_tokens(llm: CachedLLM, texts: Iterable[str], most: int | None) -> None:
    """Refuse texts that have more than `most` tokens together.

    Raises:
        HTTPError: they have more.
        PromptError: a text is empty.
    """
    if most is None:
        return
    tokens = 0
    for text in texts:
        tokens += len(llm.prompts.chunk(text))
        if tokens > most:
            message = f"the texts have more than {most} tokens; send them in several requests"
            raise HTTPError(413, message, "too_many_tokens")


def chunk_steps(
    llm: CachedLLM, asked: ChunksRequest, most: int | None, adapter: str | None = None
) -> Steps[dict[str, int]]:
    """Compute the KV of texts with an adapter, one at a step; return how many there are, and how many were new.

    Of several texts those that do not fit the model are left out, and counted as `skipped`.

    Raises:
        HTTPError: documents and texts do not go together, or the texts are too long.
        InputError: a text is empty, or the only one does not fit the model.
    """
    texts, documents = asked.texts, asked.documents
    if documents is not None and len(documents) != len(texts):
        raise HTTPError(400, "documents names one document for each text", param="documents")
    check_tokens(llm, texts, most)
    yield
    near = _nearest(texts) if asked.lead == "neighbours" and llm.resolve_policy(None).neighbours() else None
    told = {"chunks": len(texts), "computed": 0}
    for place, text in enumerate(texts):
        how: dict[str, Any] = {"documents": None if documents is None else [documents[place]]}
        how["lead"] = "packaged" if near is None else Neighbours(nearest=[near[place]])
        try:
            told["computed"] += llm.precompute([text], system=asked.system, adapter=adapter, **how).computed
        except ContextLengthError:
            if len(texts) == 1:
                raise
            told["skipped"] = told.get("skipped", 0) + 1
        yield
    if "skipped" in told:
        logger.warning("%d of %d texts do not fit the model's context", told["skipped"], len(texts))
    return told


def _nearest(texts: list[str]) -> list[list[str]]:
    from chunkcache.retriever.nearest import nearest_texts

    return [[texts[place] for place in places] for places in nearest_texts(texts, texts, ASKED)]
