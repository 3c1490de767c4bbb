"""Indexes of the server's own: each is a `Corpus` over a tenant's view of the model.

An index is known by tenant, salts and name, so nobody else can find it, or tell that it is there. Indexes are in
memory. Only the thread of `Background` changes them; any thread may search.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from chunkcache.corpus import Corpus
from chunkcache.errors import InputError
from chunkcache.llm import CachedLLM
from chunkcache.retriever import Chunk, Embedder, Hit, Retriever
from chunkcache.retriever import Document as IndexDocument
from chunkcache.serve.background import Steps
from chunkcache.serve.errors import HTTPError
from chunkcache.serve.precompute import check_tokens
from chunkcache.serve.protocol import ChatRequest, Document
from chunkcache.serve.tenants import Tenant

Owner = tuple[str, ...]  # the tenant's name, and salts
View = Callable[[Tenant, Sequence[str]], CachedLLM]


@dataclass(frozen=True)
class IndexLimits:
    """How much a tenant may keep in indexes.

    Attributes:
        indexes: of one tenant.
        documents: in all of them.
        characters: of all documents.
        chunk_tokens: of a chunk, at most.
    """

    indexes: int = 64
    documents: int = 100_000
    characters: int = 64 * 2**20
    chunk_tokens: int = 256


@dataclass(frozen=True)
class Held:
    """What is told of a document in an index.

    Attributes:
        id: its id.
        title: its title.
        characters: of its text.
        chunks: that it was cut into.
        tokens: of these.
    """

    id: str
    title: str
    characters: int
    chunks: int
    tokens: int

    def body(self) -> dict[str, Any]:
        """Return it as clients read it."""
        return {"object": "document", **vars(self)}


@dataclass(frozen=True)
class Found:
    """What was found for a request, best first.

    Attributes:
        documents: the chunks, as documents of the request.
        told: of each chunk its document's id and title, its place there, and its score.
        ended: to be called when nothing more is computed for the request.
    """

    documents: list[Document]
    told: list[dict[str, Any]]
    ended: Callable[[], None]


@dataclass(eq=False)
class Index:
    """One index. Its documents have its name and theirs as ids, for a tenant's indexes share one store."""

    corpus: Corpus
    held: dict[str, Held] = field(default_factory=dict)


class Indexes:
    """The indexes of all tenants.

    Args:
        view: returns what a tenant sees of the model.
        limits: how much a tenant may keep.
    """

    def __init__(self, view: View, limits: IndexLimits | None = None) -> None:
        self.limits = limits or IndexLimits()
        self._view = view
        self._lock = threading.Lock()  # of both dictionaries below, and of `held` of all indexes
        self._indexes: dict[Owner, dict[str, Index]] = {}
        self._embedder: Embedder | None = None

    # --- read

    def search(self, asked: ChatRequest, tenant: Tenant) -> Found:
        """Return what `rag` of a request finds for what the user said last.

        Raises:
            HTTPError: there is no such index, or the user said nothing.
        """
        assert asked.rag is not None
        index = self._get(tenant, asked.salts(), asked.rag.index, "rag.index")
        query = _said(asked)
        if not query.strip():
            raise HTTPError(400, "rag searches for what the user said last; pass a message of the user", param="rag")
        hits = index.corpus.search(query, asked.rag.k)
        by_text = {hit.chunk.text: hit for hit in reversed(hits)}
        hits = [by_text[passage.text] for passage in index.corpus.passages(hits)]
        names = [hit.chunk.document_id.partition("/")[2] for hit in hits]
        with self._lock:
            titles = {name: index.held[name].title for name in names if name in index.held}
        return Found(
            [Document(id=name, text=hit.chunk.text) for name, hit in zip(names, hits, strict=True)],
            [_told(hit, name, titles.get(name, "")) for name, hit in zip(names, hits, strict=True)],
            partial(index.corpus.settle, hits),
        )

    def names(self, tenant: Tenant, salts: Sequence[str]) -> list[dict[str, Any]]:
        """Return a tenant's indexes, and how many documents each has."""
        with self._lock:
            found = self._indexes.get((tenant.name, *salts), {})
            return [{"object": "index", "id": name, "documents": len(found[name].held)} for name in sorted(found)]

    def documents(
        self, tenant: Tenant, salts: Sequence[str], name: str, prefix: str = "", after: str = ""
    ) -> list[Held]:
        """Return the documents behind `after` whose id or title begins with `prefix`, in the order of their ids.

        Raises:
            HTTPError: there is no such index.
        """
        index, prefix = self._get(tenant, salts, name), prefix.casefold()
        with self._lock:
            held = list(index.held.values())
        found = [
            each for each in held if each.id > after
            and (each.id.casefold().startswith(prefix) or each.title.casefold().startswith(prefix))
        ]  # fmt: skip
        return sorted(found, key=lambda each: each.id)

    # --- change, from the thread of `Background`

    def put(
        self,
        tenant: Tenant,
        salts: Sequence[str],
        name: str,
        read: Callable[[], Sequence[IndexDocument]],
        most: int | None,
    ) -> Steps[dict[str, Any]]:
        """Add or update documents one by one, and compute the KV of their chunks one by one.

        Each document is found from its own step on. Once a step is done, nothing of what it took out is in any tier.

        Args:
            tenant: whose index it is.
            salts: which divide the tenant.
            name: the index, which is made where there is none.
            read: returns the documents.
            most: tokens of all documents; None for those of the server, which have no bounds.

        Returns:
            what is told of the documents, and how many chunks were computed.

        Raises:
            HTTPError: the documents are too many or too long, or the server cannot index any.
        """
        documents = read()
        check_tokens(self._view(tenant, salts), (document.text for document in documents), most)
        yield
        data: list[Held] = []
        chunks: list[tuple[Corpus, Chunk]] = []
        for document in documents:
            index = self._find(tenant, salts, name) or Index(self._corpus(tenant, salts))
            if most is not None:
                self._check_room(tenant, name, index, document)
            change = index.corpus.update(replace(document, id=f"{name}/{document.id}"))
            found = (*change.kept, *change.added)
            tokens = sum(chunk.tokens for chunk in found)
            held = Held(document.id, document.title, len(document.text), len(found), tokens)
            with self._lock:
                self._indexes.setdefault((tenant.name, *salts), {})[name] = index
                index.held[document.id] = held
            data.append(held)
            chunks += [(index.corpus, chunk) for chunk in found]
            yield
        computed = 0
        for corpus, chunk in chunks:
            if corpus.retriever.has(chunk):  # else another job took it out meanwhile
                computed += corpus.precompute(chunks=[chunk])
            yield
        return {"object": "list", "index": name, "data": [held.body() for held in data], "computed": computed}

    def delete(self, tenant: Tenant, salts: Sequence[str], name: str, document: str) -> Steps[dict[str, Any]]:
        """Delete a document, and its KV from every tier; with its last document an index goes.

        Raises:
            HTTPError: there is no such index or document.
        """
        index = self._get(tenant, salts, name)
        if document not in index.held:
            raise HTTPError(404, f"the index {name!r} has no such document", "document_not_found", "id")
        index.corpus.delete(f"{name}/{document}")
        owner = (tenant.name, *salts)
        with self._lock:
            del index.held[document]
            if not index.held:
                del self._indexes[owner][name]
            if not self._indexes[owner]:
                del self._indexes[owner]
        yield
        return {"id": document, "object": "document.deleted", "deleted": True}

    def _find(self, tenant: Tenant, salts: Sequence[str], name: str) -> Index | None:
        with self._lock:
            index = self._indexes.get((tenant.name, *salts), {}).get(name)
        if index is not None:
            index.corpus.llm = self._view(tenant, salts)  # one that was long unused is made anew
        return index

    def _get(self, tenant: Tenant, salts: Sequence[str], name: str, param: str = "index") -> Index:
        index = self._find(tenant, salts, name)
        if index is None:
            message = f"there is no index {name!r}; add documents to it first, with the same key and salts"
            raise HTTPError(404, message, "index_not_found", param)
        return index

    def _corpus(self, tenant: Tenant, salts: Sequence[str]) -> Corpus:
        llm = self._view(tenant, salts)
        try:
            self._embedder = self._embedder or Embedder()
            retriever = Retriever(llm.tokenizer, embedder=self._embedder, size=self.limits.chunk_tokens)
        except InputError as error:  # no embedding model, or no package for it
            raise HTTPError(501, f"documents cannot be indexed here: {error}", "not_supported") from error
        return Corpus(llm, retriever, precompute=False)

    def _check_room(self, tenant: Tenant, name: str, index: Index, document: IndexDocument) -> None:
        with self._lock:
            indexes = [
                each for owner, own in self._indexes.items() if owner[0] == tenant.name for each in own.values()
            ]
            held = [each for other in indexes for each in other.held.values()]
            new, old = index not in indexes, index.held.get(document.id)
        characters = sum(each.characters for each in held) - (old.characters if old else 0) + len(document.text)
        for what, count, most in (
            ("indexes", len(indexes) + new, self.limits.indexes),
            ("documents", len(held) + (old is None), self.limits.documents),
            ("characters", characters, self.limits.characters),
        ):
            if count > most:
                message = f"{name!r} has no room: {most} {what} are kept for one key; delete some first"
                raise HTTPError(413, message, "index_full", "documents")


def _said(asked: ChatRequest) -> str:
    """Return what the user said last."""
    content = next((each.content for each in reversed(asked.messages) if each.role == "user"), None)
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content if part.prompt_cache_breakpoint is None)


def _told(hit: Hit, name: str, title: str) -> dict[str, Any]:
    return {
        "id": name,
        "title": title,
        "chunk": hit.chunk.index,
        "score": round(hit.score, 6),
    }
