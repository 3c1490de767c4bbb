"""What is done ahead of requests: chunk KV computed, made known, brought near, renewed and deleted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from chunkcache.blend import Policy
from chunkcache.engine.planner import Planner
from chunkcache.errors import PromptError
from chunkcache.kv import ChunkKey, chunk_name, hashed_label
from chunkcache.library.encoder import TokenIds
from chunkcache.library.library import ChunkLibrary, Progress
from chunkcache.prompt.builder import PromptBuilder
from chunkcache.prompt.known_texts import KnownTexts
from chunkcache.store import EntryFilter, Store

PART_TOKENS = 8192  # chunk tokens that `precompute` holds in memory at a time


@dataclass(frozen=True)
class PrecomputeResult:
    """What `precompute` did: how many chunks were asked for, how many of them it computed, and their tokens."""

    chunks: int
    computed: int
    computed_tokens: int


class KeepsChunks(ABC):
    """The part of `CachedLLM` that works before the request.

    Attributes:
        store: the store that holds chunk KV.
        prompts: builds prompts from texts.
    """

    store: Store
    prompts: PromptBuilder
    _known: KnownTexts
    _library: ChunkLibrary
    _planner: Planner

    @abstractmethod
    def resolve_policy(self, policy: str | Policy | None) -> Policy:
        """Return the policy of a call, the wrapper's if it names none, with nothing left open."""

    def precompute(
        self,
        texts: Sequence[str],
        system: str | None = None,
        on_progress: Progress | None = None,
        policy: str | Policy | None = None,
        documents: Sequence[str | None] | None = None,
    ) -> PrecomputeResult:
        """Compute and store the KV of `texts` behind the prefix of `system`; what is stored already is left.

        Args:
            texts: the chunks.
            system: the system prompt that requests will use.
            on_progress: called with (chunks done, chunks to do) after every chunk.
            policy: the policy that requests will use; None for the wrapper's. It says which lead-in stands before
                a chunk while it is computed, and whether what its tokens look at is recorded.
            documents: for each text the id of the document that it is from, by which it can be deleted, or None.

        Raises:
            PolicyError: the policy is unknown.
            PromptError: a text is empty, or there are more or fewer documents than texts.
            ContextLengthError: a text is longer than the model's context.
        """
        chosen = self.resolve_policy(policy)
        chunks = dict(self._know(texts, system, chosen, documents))
        ready = self._library.holds_recorded if chosen.versioned else self._library.holds
        missing = {chunk: behind for chunk, behind in chunks.items() if not ready(behind, chunk)}
        for chunk, behind in chunks.items():
            if documents is not None and chunk not in missing:
                self._library.relabel(behind, chunk)
        done = 0
        for part in _parts(missing):  # neither their KV nor what waits to be written pile up
            counted = None if on_progress is None else partial(_count_on, on_progress, done, len(missing))
            self._library.compute(part, counted, record=chosen.versioned)
            self.store.flush()
            done += len(part)
        return PrecomputeResult(len(chunks), len(missing), sum(map(len, missing)))

    def know(
        self,
        texts: Sequence[str],
        system: str | None = None,
        policy: str | Policy | None = None,
        documents: Sequence[str | None] | None = None,
    ) -> None:
        """Make texts findable in messages and, while attached, in prompts; computes nothing. See `precompute`."""
        self._know(texts, system, self.resolve_policy(policy), documents)

    def keys(
        self, texts: Sequence[str], system: str | None = None, policy: str | Policy | None = None
    ) -> list[ChunkKey]:
        """Return the key under which the chunk KV of each text are stored. See `precompute`."""
        prefix, chosen = self.prompts.prefix(system), self.resolve_policy(policy)
        chunks = [self.prompts.chunk(text) for text in texts]
        return [self._library.key(self._planner.behind(prefix, chunk, chosen), chunk) for chunk in chunks]

    def prefetch(
        self,
        texts: Sequence[str],
        system: str | None = None,
        policy: str | Policy | None = None,
        documents: Sequence[str | None] | None = None,
    ) -> list[str]:
        """Make texts known, start bringing their chunk KV to the store's nearest tier, and return at once.

        Returns:
            the texts, each once, that are not stored. See `precompute` for the rest.
        """
        found = self._know(texts, system, self.resolve_policy(policy), documents)
        keys = {text: self._library.key(behind, ids) for text, (ids, behind) in zip(texts, found, strict=True)}
        held = {text: key for text, key in keys.items() if key in self.store}
        self.store.prefetch(held.values())
        return [text for text in keys if text not in held]

    def update_document(
        self,
        document: str,
        texts: Sequence[str],
        system: str | None = None,
        on_progress: Progress | None = None,
        policy: str | Policy | None = None,
        compute: bool = True,
    ) -> PrecomputeResult:
        """Precompute the chunks of a document that was edited, and delete those that are no longer in it.

        Chunks that are as they were, also those that only moved, keep their KV. With `compute=False` what is new is
        left to the requests that ask for it. See `precompute`.
        """
        try:
            if not compute:
                self.know(texts, system, policy, [document] * len(texts))
                return PrecomputeResult(len(texts), 0, 0)
            return self.precompute(texts, system, on_progress, policy, [document] * len(texts))
        finally:  # what is stale goes, whatever became of the new
            self._known.drop_document(document, but=texts)
            self._library.forget_stale(
                hashed_label("document", document), [self.prompts.chunk(text) for text in texts]
            )

    def forget(self, document: str | None = None, texts: Sequence[str] = ()) -> int:
        """Delete, from every tier, all KV of this model and tenant that were computed from a document or from texts.

        KV of chunks that were computed behind these in a prompt go as well. What is being computed meanwhile, or
        waits to be written, is not stored any more. With neither, everything of this model and tenant is deleted.

        Returns:
            how many entries there were.
        """
        if document is not None:
            self._known.drop_document(document)
            return self._library.forget(EntryFilter(document=hashed_label("document", document)))
        if texts:
            self._known.drop(texts)
            return sum(
                self._library.forget(EntryFilter(chunk=chunk_name(self.prompts.chunk(text)))) for text in texts
            )
        self._known.clear()
        return self._library.forget(EntryFilter())

    def _know(
        self, texts: Sequence[str], system: str | None, policy: Policy, documents: Sequence[str | None] | None
    ) -> list[tuple[TokenIds, TokenIds]]:
        """Make texts findable; return of each its chunk's token ids, and those that it is computed behind."""
        if isinstance(texts, str):
            raise PromptError(f"texts is one string of {len(texts)} characters; pass a list of texts")
        if documents is not None and len(documents) != len(texts):
            raise PromptError(f"{len(documents)} documents for {len(texts)} texts; pass one document id per text")
        prefix = self.prompts.prefix(system)
        chunks = [self.prompts.chunk(text) for text in texts]
        found = [(chunk, self._planner.behind(prefix, chunk, policy)) for chunk in chunks]
        for index, (chunk, behind) in enumerate(found):
            document = None if documents is None else documents[index]
            if document is not None:
                self._library.belongs(chunk, hashed_label("document", document))
            self._known.add(texts[index], system, document)
            self._library.know(behind, chunk)
        return found


def _count_on(on_progress: Progress, before: int, total: int, done: int, _: int) -> None:
    on_progress(before + done, total)


def _parts(chunks: dict[TokenIds, TokenIds]) -> Iterator[dict[TokenIds, TokenIds]]:
    """Divide chunks into parts of `PART_TOKENS`, or of one chunk that is longer."""
    part: dict[TokenIds, TokenIds] = {}
    tokens = 0
    for chunk, behind in chunks.items():
        if part and tokens + len(chunk) > PART_TOKENS:
            yield part
            part, tokens = {}, 0
        part[chunk] = behind
        tokens += len(chunk)
    if part:
        yield part
