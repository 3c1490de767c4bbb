"""Precompute, register, prefetch, update and delete chunk KV: the methods of `CachedLLM` that need no request."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from chunkcache.blend import Policy
from chunkcache.engine.near import Lead, NearTexts, neighbours_of
from chunkcache.errors import InputError, PromptError
from chunkcache.kv import ChunkKey, ChunkRef, hashed_label
from chunkcache.library import ChunkLibrary, Progress
from chunkcache.library.neighbours import NearChunks, Neighbours
from chunkcache.prompt import PromptBuilder
from chunkcache.prompt.prompt import text_of
from chunkcache.prompt.template import Options
from chunkcache.store import Store

logger = logging.getLogger("chunkcache")


@dataclass(frozen=True)
class PrecomputeResult:
    """What `precompute` did.

    Attributes:
        chunks: different chunks that were asked for.
        computed: those that were computed; the others were stored already, or are skipped.
        computed_tokens: tokens of these.
        skipped: chunks that are longer than the model's context and were left out.
        near: those of the computed that were computed behind their nearest chunks.
    """

    chunks: int
    computed: int
    computed_tokens: int
    skipped: int = 0
    near: int = 0


class ChunkMethods(ABC):
    """The part of `CachedLLM` that needs no request.

    Attributes:
        store: the store that holds chunk KV.
        prompts: builds prompts from texts.
    """

    store: Store
    prompts: PromptBuilder

    @abstractmethod
    def _session(self, adapter: str | None = None) -> AbstractContextManager[ChunkLibrary]:
        """Return the library of the model as it is now, with one adapter active in the block."""

    @abstractmethod
    def _libraries(self) -> Iterable[ChunkLibrary]:
        """Return the libraries of all that the model has been since it was wrapped."""

    @abstractmethod
    def resolve_policy(self, policy: str | Policy | None) -> Policy:
        """Return the policy of a call, the wrapper's if it names none, with nothing left open."""

    def precompute(
        self,
        texts: Sequence[Any],
        *,
        system: str | None = None,
        policy: str | Policy | None = None,
        documents: Sequence[str | None] | None = None,
        on_progress: Progress | None = None,
        adapter: str | None = None,
        template_options: Options | None = None,
        lead: Lead = "packaged",
    ) -> PrecomputeResult:
        """Compute and store the KV of `texts` after the prefix of `system`; what is stored already is left.

        Of several texts those that are longer than the model's context are left out, which is logged.

        Args:
            texts: the chunks: strings, or documents with `.page_content` or `.text`.
            system: the system prompt that requests will use.
            policy: the policy that requests will use; None for the wrapper's. It says which lead-in stands before
                a chunk while it is computed, and whether what its tokens look at is recorded.
            documents: for each text the id of the document that it is from, by which it can be deleted, or None;
                by default the `.id` of a document, where it has one.
            on_progress: called with (chunks done, chunks to do) after every chunk.
            adapter: the peft adapter that is active meanwhile, and in the requests; None for the one that is.
            template_options: keywords for the chat template that requests will use.
            lead: what a chunk is computed behind for a policy that wants a lead-in: `packaged`, the lead-in alone; or
                `neighbours`, its nearest chunks, too, which are found among the texts; or `Neighbours(...)`, which
                says them. Both are used by the same requests.

        Raises:
            PolicyError: the policy is unknown.
            PromptError: a text is empty, or there are more or fewer documents than texts.
            InputError: there is no such `lead`.
            ContextLengthError: there is one text, and it is longer than the model's context.
        """
        chosen = self.resolve_policy(policy)
        how = neighbours_of(lead, chosen)
        owners = _owners(texts, documents)
        prompts = self.prompts.with_options(template_options)
        with self._session(adapter) as library:
            refs = dict(zip(_register(library, prompts, texts, system, chosen, owners), owners, strict=True))
            too_long = _too_long(library, refs)
            renew = how is not None and how.renew
            missing = [
                ref
                for ref in refs
                if ref not in too_long and (renew or not library.holds(ref, recorded=chosen.versioned))
            ]
            for ref in refs.keys() - too_long - set(missing):
                if refs[ref] is not None:
                    library.add_document(ref)
            todo = list(refs) if len(refs) == 1 and too_long else missing  # one alone is refused by name
            if how is None or not missing:
                library.precompute(todo, on_progress, record=chosen.versioned)
                near = 0
            else:
                chunks = [ref.token_ids for ref in missing]
                nearest = NearTexts(texts, prompts, how).nearest(chunks)
                computing = NearChunks(library, prompts.prefix(system), chosen, nearest, how.tokens, how.first)
                near = computing.compute(chunks, how.extra, on_progress)
                missing = [ref for ref in missing if ref.token_ids in computing.done]
                logger.info("%d of %d chunks were computed behind their nearest chunks", near, len(chunks))
        return PrecomputeResult(
            len(refs), len(missing), sum(len(ref.token_ids) for ref in missing), skipped=len(too_long), near=near
        )

    def overlap(
        self,
        texts: Sequence[Any],
        lead: Neighbours,
        *,
        system: str | None = None,
        policy: str | Policy | None = None,
    ) -> list[float]:
        """Return for each text which share of its nearest chunks its KV were computed behind.

        0 if its KV were computed behind none of them or are not stored, 1 if it has no nearest chunks. What is low is
        worth computing again, with `precompute(lead=Neighbours(..., renew=True))`.
        """
        chosen = self.resolve_policy(policy)
        with self._session() as library:
            chunks = [self.prompts.chunk(text) for text in texts]
            nearest = NearTexts(texts, self.prompts, lead).nearest(list(dict.fromkeys(chunks)))
            near = NearChunks(library, self.prompts.prefix(system), chosen, nearest, lead.tokens)
            return [near.overlap(ids) for ids in chunks]

    def register(
        self,
        texts: Sequence[Any],
        *,
        system: str | None = None,
        policy: str | Policy | None = None,
        documents: Sequence[str | None] | None = None,
        adapter: str | None = None,
        trust: str | None = None,
        template_options: Options | None = None,
    ) -> list[ChunkKey]:
        """Make texts findable in messages and, while attached, in prompts; computes nothing.

        The arguments are those of `precompute`, and:

        Args:
            trust: a label of whoever these texts come from. What is computed of a text behind one of another label is
                not used in other contexts, so that no text can steer answers in which it does not stand.

        Returns:
            the keys under which their KV are stored.
        """
        chosen, owners = self.resolve_policy(policy), _owners(texts, documents)
        prompts = self.prompts.with_options(template_options)
        with self._session(adapter) as library:
            return [ref.key for ref in _register(library, prompts, texts, system, chosen, owners, trust)]

    def keys(
        self,
        texts: Sequence[Any],
        *,
        system: str | None = None,
        policy: str | Policy | None = None,
        adapter: str | None = None,
        template_options: Options | None = None,
    ) -> list[ChunkKey]:
        """Return the key under which the chunk KV of each text are stored. See `precompute`."""
        prompts = self.prompts.with_options(template_options)
        with self._session(adapter) as library:
            return [ref.key for ref in _refs(library, prompts, texts, system, self.resolve_policy(policy))]

    def prefetch(
        self,
        texts: Sequence[Any],
        *,
        system: str | None = None,
        policy: str | Policy | None = None,
        documents: Sequence[str | None] | None = None,
        adapter: str | None = None,
        template_options: Options | None = None,
    ) -> list[Any]:
        """Register texts, start bringing their chunk KV to the store's nearest tier, and return at once.

        Returns:
            the texts, each once, that are not stored. See `precompute` for the rest.
        """
        how: dict[str, Any] = {"system": system, "policy": policy, "template_options": template_options}
        keys = self.register(texts, documents=documents, adapter=adapter, **how)
        held = {key for key in dict.fromkeys(keys) if key in self.store}
        self.store.prefetch(held)
        missing = {key: text for text, key in zip(texts, keys, strict=True) if key not in held}
        return list(missing.values())

    def update_document(
        self,
        document: str,
        texts: Sequence[Any],
        *,
        system: str | None = None,
        policy: str | Policy | None = None,
        on_progress: Progress | None = None,
        compute: bool = True,
        template_options: Options | None = None,
        lead: Lead = "packaged",
    ) -> PrecomputeResult:
        """Precompute the chunks of a document that was edited, and delete those that are no longer in it.

        Chunks that are as they were, also those that only moved, keep their KV. With `compute=False` what is new is
        left to the requests that ask for it. See `precompute`. Nothing is deleted where the arguments are refused;
        where computing fails, what is stale is deleted all the same.
        """
        chosen, owners = self.resolve_policy(policy), [document] * len(texts)
        prompts = self.prompts.with_options(template_options)
        with self._session() as library:
            chunks = [ref.token_ids for ref in _refs(library, prompts, texts, system, chosen)]
        how: dict[str, Any] = {"system": system, "policy": chosen, "template_options": template_options}
        try:
            if not compute:
                self.register(texts, documents=owners, **how)
                return PrecomputeResult(len(texts), 0, 0)
            return self.precompute(texts, documents=owners, on_progress=on_progress, lead=lead, **how)
        finally:
            for library in self._libraries():
                library.delete_stale(hashed_label("document", document), chunks)

    def delete(
        self, *, document: str | None = None, texts: Collection[Any] | None = None, tenant: bool = False
    ) -> int:
        """Delete from every tier all KV of this model and tenant that were computed from a document or from texts.

        This model is all that it has been since it was wrapped, with whichever adapters and weights.

        KV of chunks that were computed after these in a prompt go as well. What is being computed meanwhile, or
        waits to be written, is not stored any more.

        Args:
            document: id of the document.
            texts: the texts.
            tenant: delete everything of this model and tenant.

        Returns:
            how many entries there were.

        Raises:
            InputError: not exactly one of the three is given.
        """
        if (document is not None) + (texts is not None) + tenant != 1:
            raise InputError("name what to delete: one of document=, texts= and tenant=True")
        label = None if document is None else hashed_label("document", document)
        chunks = [self.prompts.chunk(text) for text in texts or ()]
        if texts is not None and not chunks:
            return 0
        return sum(library.delete(document=label, chunks=chunks) for library in self._libraries())


def _refs(
    library: ChunkLibrary, prompts: PromptBuilder, texts: Sequence[Any], system: str | None, policy: Policy
) -> list[ChunkRef]:
    if isinstance(texts, str):
        raise PromptError(f"texts is one string of {len(texts)} characters; pass a list of texts")
    prefix = prompts.prefix(system)
    return [library.held_ref(prompts.chunk(text), prefix, policy) for text in texts]


def _register(
    library: ChunkLibrary,
    prompts: PromptBuilder,
    texts: Sequence[Any],
    system: str | None,
    policy: Policy,
    owners: Sequence[str | None],
    trust: str | None = None,
) -> list[ChunkRef]:
    refs = _refs(library, prompts, texts, system, policy)
    for ref, text, owner in zip(refs, texts, owners, strict=True):
        label = None if owner is None else hashed_label("document", owner)
        library.registry.add(ref, text_of(text), system, label, library.fingerprint, trust)
    return refs


def _owners(texts: Sequence[Any], documents: Sequence[str | None] | None) -> list[str | None]:
    """Return the document id of each text: as given, or its own."""
    if documents is None:
        return [getattr(text, "id", None) for text in texts]
    if len(documents) != len(texts):
        raise PromptError(f"{len(documents)} documents for {len(texts)} texts; pass one document id per text")
    return list(documents)


def _too_long(library: ChunkLibrary, refs: Collection[ChunkRef]) -> set[ChunkRef]:
    """Return the chunks that do not fit the model's context, and say how many they are."""
    too_long = {ref for ref in refs if not library.fits(ref)}
    if too_long:
        logger.warning(
            "%d of %d chunks do not fit the model's context and are left out, the longest has %d tokens: "
            "split them into smaller chunks",
            len(too_long),
            len(refs),
            max(len(ref.token_ids) for ref in too_long),
        )
    return too_long
