"""Documents that can be searched and asked: a retriever and a wrapped model's store, kept in step.

Whatever changes in a document is searched as it now is from that moment on, and KV of what it no longer says are gone
from every tier when the change returns. What a search finds is on its way to the model before the question is.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from chunkcache.deprecated import renamed_options
from chunkcache.engine.engine import PreparedRequest
from chunkcache.engine.generation import Generation, check_keywords, check_options
from chunkcache.engine.near import Lead, neighbours_of
from chunkcache.engine.refresh import Budget, Refreshed, refresh
from chunkcache.engine.streaming import TextStream
from chunkcache.errors import ContextLengthError, InputError
from chunkcache.kv import chunk_name
from chunkcache.library import Progress
from chunkcache.library.neighbours import ASKED, Neighbours
from chunkcache.llm import CachedLLM
from chunkcache.prompt import PromptChunk
from chunkcache.retriever import Change
from chunkcache.retriever.order import ServedOrders, distinct
from chunkcache.store.hints import Hints

if TYPE_CHECKING:
    from chunkcache.blend import Policy
    from chunkcache.kv import ChunkKey
    from chunkcache.retriever import Chunk, Document, Hit, Retriever

_GUESSES = 4  # of each kind: neighbours of what was found, and what ranked right behind it


@dataclass(frozen=True)
class Answer:
    """The answer to a question, and the chunks it was asked over, best first."""

    generation: Generation
    hits: list[Hit]

    @property
    def text(self) -> str:
        """The answer, without special tokens."""
        return self.generation.text


class Corpus:
    """A retriever and a wrapped model whose index and KV store are updated together.

    Args:
        llm: the wrapped model.
        retriever: holds the documents; change them through the corpus only.
        system: system prompt of all questions; None for the chat template's own.
        policy: which reused tokens are recomputed; None for the wrapper's.
        precompute: whether the KV of documents are computed when they are added or updated, or else when they are
            asked for.
        reorder: by how many ranks a chunk may leave the retriever's order, so that more chunks stand behind the same
            ones as in an earlier prompt. That helps policies that store chunks in their context: `prefix`,
            `cachecraft`. 0 keeps the order.
        hints: whether the store is told what is retrieved, and what is likely to be next; see `Hints`.
        lead: what a chunk is computed behind for a policy that wants a lead-in, as in `precompute`; by default its
            nearest chunks, by the vectors of the retriever.
        refresh: share of all chunks that a change of documents computes again at most, of those that are near to what
            was changed; see `refresh`.

    Raises:
        PolicyError: the policy is unknown.
        InputError: `reorder` is negative, `refresh` no share, or there is no such `lead`.
    """

    def __init__(  # noqa: PLR0913 - everything about a corpus, by name
        self,
        llm: CachedLLM,
        retriever: Retriever,
        *,
        system: str | None = None,
        policy: str | Policy | None = None,
        precompute: bool = True,
        reorder: int = 0,
        hints: bool = True,
        lead: Lead = "neighbours",
        refresh: float = 0.1,
        **renamed: Any,
    ) -> None:
        precompute = renamed_options(renamed, {"ahead": "precompute"}, "Corpus").get("precompute", precompute)
        if reorder < 0:
            raise InputError(f"reorder = {reorder} is no number of ranks: give 0 or more")
        _check_share(refresh)
        self.llm, self.retriever = llm, retriever
        neighbours_of(lead, llm.resolve_policy(policy))  # both refuse what is unknown
        self._system, self._policy = system, policy
        self._precompute, self._reorder = precompute, reorder
        self._orders = ServedOrders()
        self._hints = Hints(llm.store, likely=2 * _GUESSES) if hints else None
        self._changing = threading.Lock()  # or index and store might see two changes in different orders
        self._lead, self._share = lead, refresh

    def precompute(self, on_progress: Progress | None = None, chunks: Sequence[Chunk] | None = None) -> int:
        """Compute and store the KV of chunks, by default all, that the store lacks; return how many these were.

        `on_progress(done, total)` counts chunks. Those that are longer than the model's context are left out, which
        is logged; a question that needs one raises ContextLengthError.
        """
        return self._compute(self.retriever.chunks if chunks is None else chunks, on_progress)

    def add(self, documents: Sequence[Document], on_progress: Progress | None = None) -> Change:
        """Add documents, and compute the KV of their chunks; see `Retriever.add`."""
        with self._changing:
            return self._in_step([self.retriever.add(documents)], on_progress)

    def update(self, document: Document, on_progress: Progress | None = None) -> Change:
        """Put a new version of a document in the place of the old one; see `Retriever.update`.

        Only what is new is computed, and what `refresh` allows. KV of what is gone are gone from every tier when this
        returns, and KV of other chunks that were computed behind it as well.
        """
        with self._changing:
            return self._in_step([self._update(document)], on_progress)

    def delete(self, document_id: str) -> Change:
        """Take out a document, and delete its KV from every tier, but for chunks that other documents have too."""
        with self._changing:
            return self._in_step([self._delete(document_id)])

    def sync(self, documents: Sequence[Document], on_progress: Progress | None = None) -> Change:
        """Make these the documents: add what is new, update what differs, delete the rest.

        `on_progress(done, total)` counts chunks that are computed. Returns all changes as one. Raises InputError when
        two documents have the same id, before anything is changed.
        """
        with self._changing:
            now, before = {document.id for document in documents}, set(self.retriever.documents)
            if len(now) < len(documents):
                raise InputError(f"{len(documents)} documents have {len(now)} ids: give each an id of its own")
            changes = [self.retriever.add([document for document in documents if document.id not in before])]
            self._register(changes[0].added)
            changes += [self._update(document) for document in documents if document.id in before]
            changes += [self._delete(gone) for gone in before - now]  # last: a document may only have a new name
            return self._in_step(changes, on_progress)

    def _update(self, document: Document) -> Change:
        """Change a document, and delete what is no longer in it: nothing new is computed behind that."""
        change = self.retriever.update(document)
        if change.added or change.removed:
            texts = [chunk.text for chunk in (*change.kept, *change.added)]
            how: dict[str, Any] = {"system": self._system, "policy": self._policy}
            self.llm.update_document(document.id, texts, compute=False, **how)
        return change

    def _delete(self, document_id: str) -> Change:
        change = self.retriever.delete(document_id)
        self.llm.update_document(document_id, [])
        return change

    def _in_step(self, changes: Sequence[Change], on_progress: Progress | None = None) -> Change:
        """Compute what changes ask for; return them as one."""
        parts = zip(*((change.added, change.removed, change.kept) for change in changes), strict=True)
        change = Change(*(tuple(chain.from_iterable(each)) for each in parts))
        if self._precompute and (change.added or change.removed):
            changed = [each for each in changes if each.added or each.removed]
            self._compute([chunk for each in changed for chunk in (*each.kept, *each.added)], on_progress)
            self._refresh_near(change)
        return change

    def refresh(self, share: float = 0.1, seconds: float | None = None) -> Refreshed:
        """Compute again KV of chunks whose nearest chunks are others now, those that have least in common first.

        KV that were computed behind chunks that are no longer the nearest stay of use. Those computed behind none,
        such as after a document that was near has gone, come first.

        Args:
            share: of all chunks, at most.
            seconds: after which no more are begun; None for no bound.

        Raises:
            InputError: `share` is none.
        """
        _check_share(share)
        with self._changing:
            return self._refresh([chunk.text for chunk in self.retriever.chunks], share, seconds)

    def search(self, query: str, k: int = 4, mode: str | None = None) -> list[Hit]:
        """Return the best `k` chunks, and start bringing their KV to the store's nearest tier.

        See `Retriever.search`.
        """
        if k < 1:
            raise InputError(f"k = {k} asks for no chunks: give 1 or more")
        found = self.retriever.search(query, k + _GUESSES if self._hints else k, mode)
        hits, near = found[:k], found[k:]
        chunks = [hit.chunk for hit in hits]
        if self._hints is not None:
            beside = [other for chunk in chunks for other in reversed(self.retriever.neighbours(chunk))][:_GUESSES]
            likely = [*beside, *(hit.chunk for hit in near)]
            keys = self._keys([*chunks, *likely])
            self._hints.retrieved(keys[: len(chunks)], keys[len(chunks) :])
        else:
            self.llm.store.prefetch(self._keys(chunks))
        return hits

    def passages(self, hits: Sequence[Hit]) -> list[PromptChunk]:
        """Return what stands in the prompt of these hits, in order.

        A chunk that says nothing new is left out. Of chunks that overlap the later one follows right behind the
        earlier, and goes on where that ends; KV of both are reused.
        """
        texts = self._register([hit.chunk for hit in hits])
        chunks = [hits[index].chunk for index in distinct(texts)]
        runs = _runs(chunks)
        names = [tuple(chunk_name(self.llm.prompts.chunk(chunk.text)) for chunk in run) for run in runs]
        order = self._orders.arrange(names, self._reorder)
        self._orders.record([names[index] for index in order])
        runs = [runs[index] for index in order]
        if not self.llm.tokenizer.is_fast:  # it does not say where in a chunk the overlap ends
            return [PromptChunk(chunk.text) for chunk in chain.from_iterable(runs)]
        return list(chain.from_iterable(map(_joined, runs)))

    def generate(self, question: str, k: int = 4, **options: Any) -> Answer:
        """Answer a question over the best `k` chunks.

        Options are those of `CachedLLM.generate`, but for system prompt and policy, which are the corpus's.
        """
        hits, request = self._prepare(question, k, options)
        return Answer(self._answer(hits, request), hits)

    def stream(self, question: str, k: int = 4, **options: Any) -> tuple[TextStream, list[Hit]]:
        """Answer like `generate`, piece by piece; returns the stream, and the chunks it is asked over."""
        hits, request = self._prepare(question, k, options)
        return self.llm.engine.stream(request, partial(self._answer, hits)), hits

    def _prepare(self, question: str, k: int, options: dict[str, Any]) -> tuple[list[Hit], PreparedRequest]:
        """Return what a question is asked over, and the request."""
        prompts = self.llm.prompts.with_options(options.pop("template_options", None))
        check_options(options)
        check_keywords(self.llm.engine.model, options)
        hits = self.search(question, k)
        length = options.pop("max_new_tokens", None)
        return hits, self.llm.engine.prepare(
            lambda: prompts.build(question, self.passages(hits), self._system), self._policy, length, options
        )

    def _answer(self, hits: Sequence[Hit], request: PreparedRequest) -> Generation:
        generation = self.llm.engine.generate(request)
        self.settle(hits)
        return generation

    def settle(self, hits: Sequence[Hit]) -> None:
        """Delete KV of chunks that were changed away while a request over `hits`, which has ended, computed them."""
        gone = {hit.chunk.text for hit in hits if not self.retriever.has(hit.chunk)}
        gone -= {chunk.text for chunk in self.retriever.chunks} if gone else set()
        if gone:
            self.llm.delete(texts=sorted(gone))

    def _compute(self, chunks: Sequence[Chunk], on_progress: Progress | None) -> int:
        texts, owners = _texts_and_owners(chunks)
        with suppress(ContextLengthError):  # of one chunk alone; among others it would be left out, too
            return self.llm.precompute(
                texts,
                system=self._system,
                policy=self._policy,
                documents=owners,
                on_progress=on_progress,
                lead=self._neighbours() or "packaged",
            ).computed
        return 0

    def _register(self, chunks: Sequence[Chunk]) -> list[str]:
        """Tell the wrapper of chunks and their documents; return their texts."""
        texts, owners = _texts_and_owners(chunks)
        self.llm.register(texts, system=self._system, policy=self._policy, documents=owners)
        return texts

    def _neighbours(self) -> Neighbours | None:
        """Return how chunks are computed behind their nearest; None if they are not."""
        how = neighbours_of(self._lead, self.llm.resolve_policy(self._policy))
        return how if how is None else replace(how, nearest=how.nearest or self._nearest)

    def _nearest(self, texts: Sequence[str]) -> list[list[str]]:
        """Return the texts of the chunks nearest to each of some texts of chunks."""
        by_text = {chunk.text: chunk for chunk in self.retriever.chunks}
        found = self.retriever.nearest([by_text[text] for text in texts], ASKED)
        return [[chunk.text for chunk in near] for near in found]

    def _refresh_near(self, change: Change) -> None:
        """Refresh chunks that are near to what was changed."""
        if self._share and self._neighbours() is not None:
            near = self.retriever.nearest([*change.added, *change.removed], ASKED)
            self._refresh([chunk.text for chunk in chain.from_iterable(near)], self._share)

    def _refresh(self, texts: Sequence[str], share: float, seconds: float | None = None) -> Refreshed:
        how = self._neighbours()
        if how is None:
            return Refreshed()
        owners: dict[str, set[str]] = {}
        for chunk in self.retriever.chunks:
            owners.setdefault(chunk.text, set()).add(chunk.document_id)
        texts = list(dict.fromkeys(texts))
        find = how.nearest if callable(how.nearest) else self._nearest
        nearest = dict(zip(texts, find(texts), strict=True))
        budget = Budget(math.ceil(share * len(owners)), seconds)
        return refresh(self.llm, nearest, owners, how, budget, system=self._system, policy=self._policy)

    def _keys(self, chunks: Sequence[Chunk]) -> list[ChunkKey]:
        return self.llm.keys([chunk.text for chunk in chunks], system=self._system, policy=self._policy)


def _texts_and_owners(chunks: Sequence[Chunk]) -> tuple[list[str], list[str]]:
    return [chunk.text for chunk in chunks], [chunk.document_id for chunk in chunks]


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise InputError(f"refresh={share} is no share of the chunks: give 0 to 1")


def _runs(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Group chunks that overlap in their document, each group at the rank of its best, in the document's order."""
    runs: list[list[Chunk]] = []
    for chunk in chunks:
        touched = [run for run in runs if any(_overlap(chunk, other) for other in run)]
        if not touched:
            runs.append([chunk])
            continue
        touched[0] += [chunk, *chain.from_iterable(touched[1:])]
        touched[0].sort(key=lambda each: each.start)
        runs = [run for run in runs if not any(run is later for later in touched[1:])]
    return runs


def _overlap(one: Chunk, other: Chunk) -> bool:
    first, second = sorted((one, other), key=lambda each: each.start)
    return one.document_id == other.document_id and first.start + len(first.text) > second.start


def _joined(run: Sequence[Chunk]) -> list[PromptChunk]:
    passages, said = [], 0
    for index, chunk in enumerate(run):
        joins_next = index + 1 < len(run)
        passages.append(PromptChunk(chunk.text, max(said - chunk.start, 0) if index else 0, joins_next))
        said = max(said, chunk.start + len(chunk.text))
    return passages
