"""A second, slower look at the best hits: a model that reads the query and a text together, and scores the pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from chunkcache.errors import InputError, ModelNotFoundError, missing_extra
from chunkcache.retriever.embedder import no_progress_bars

Item = TypeVar("Item")

_HEADLESS = ("Model", "ForMaskedLM", "ForPreTraining")


class Reranker(Protocol):
    """Whatever scores texts for a query."""

    def scores(self, query: str, texts: Sequence[str]) -> Sequence[float]:
        """Return one score per text, higher for a better answer to the query."""
        ...


class CrossEncoderReranker:
    """A cross-encoder of sentence-transformers, such as `cross-encoder/ms-marco-MiniLM-L6-v2`.

    Args:
        model: a folder, or a name on the Hugging Face hub.
        device: where it runs; by default a GPU if there is one.
        batch_size: pairs that are scored at a time.

    Raises:
        ModelNotFoundError: it cannot be loaded, was not trained to score pairs, or gives several scores for a pair.
    """

    def __init__(self, model: str | Path, device: str | None = None, batch_size: int = 32) -> None:
        try:  # imported here because it takes seconds
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise missing_extra("retriever", "a cross-encoder", error) from error
        try:
            with no_progress_bars():
                self._model = CrossEncoder(str(model), device=device, local_files_only=Path(model).is_dir())
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(
                f"no cross-encoder could be loaded from {str(model)!r} ({error}): give the folder of one, or check "
                "the name and the connection to the Hugging Face hub"
            ) from error
        architectures = getattr(self._model.config, "architectures", None) or ()
        if architectures and all(name.endswith(_HEADLESS) for name in architectures):
            # transformers would give it a random head, and say so only in its log.
            raise ModelNotFoundError(
                f"{str(model)!r} was not trained to score pairs (it is a {architectures[0]}): give a cross-encoder"
            )
        if self._model.num_labels != 1:
            raise ModelNotFoundError(
                f"{str(model)!r} gives {self._model.num_labels} scores for a pair: give a cross-encoder of one"
            )
        self._batch_size = batch_size

    def scores(self, query: str, texts: Sequence[str]) -> list[float]:
        """Return one score per text; of a pair longer than the model reads, the rest is ignored."""
        if not texts:
            return []
        pairs = [(query, text) for text in texts]
        found = self._model.predict(pairs, batch_size=self._batch_size, show_progress_bar=False)
        return [float(score) for score in np.asarray(found)]


def rerank(reranker: Reranker, query: str, items: Sequence[Item], texts: Sequence[str]) -> list[tuple[Item, float]]:
    """Return the items with the reranker's scores of their texts, best first, equal scores in the order given.

    Raises InputError when it does not give one finite score per text.
    """
    scores = [float(score) for score in reranker.scores(query, texts)]
    if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
        raise InputError(
            f"the reranker {type(reranker).__name__} gave the scores {scores} for {len(texts)} texts: "
            "it has to give one finite number for each"
        )
    return sorted(zip(items, scores, strict=True), key=lambda pair: -pair[1])
