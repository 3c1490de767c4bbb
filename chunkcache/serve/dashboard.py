"""A page at `/` that shows what the server does, and the JSON that it is made of.

Only a server that is started with it has it. Each tenant sees requests, texts, hit rates and store entries of its
own. Texts are those of the last requests, as token ids in memory, within bounds; nothing of them is written anywhere.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from chunkcache.engine.detokenizer import UNFINISHED
from chunkcache.engine.provenance import PromptReport
from chunkcache.kv import ChunkKey, TokenIds, hashed_label
from chunkcache.serve.app import AServer, Who
from chunkcache.serve.errors import HTTPError
from chunkcache.serve.loopback import LOOPBACK
from chunkcache.serve.record import Record, by_chunk
from chunkcache.serve.service import Service
from chunkcache.serve.tenants import Tenant
from chunkcache.store import Entry, EntryFilter

KEPT = 64  # requests whose prompts are kept
KEPT_TOKENS = 2**18  # of all of them
SHOWN = 200  # entries of the store that are listed
_FILES = {"page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Shown:
    """A request that is over.

    Attributes:
        number: that of its record.
        tenant: who asked.
        about: what its record says.
        chunks: what was done with its chunks.
        report: what was done with its tokens.
        token_ids: its prompt; of several, the first.
    """

    number: int
    tenant: str
    about: dict[str, Any]
    chunks: list[dict[str, Any]]
    report: PromptReport
    token_ids: TokenIds = field(repr=False)


class Ring:
    """Keeps the last requests for answers, and counts where the chunks of each tenant came from."""

    def __init__(self) -> None:
        self._kept: deque[Shown] = deque()
        self._tokens = 0
        self._sources: dict[str, Counter[tuple[str, str]]] = {}

    def __call__(self, record: Record) -> None:
        """Take note of a request that is over, if its prompt was prefilled."""
        stats = next(iter(record.stats), None)
        if record.answers is None or stats is None or stats.report is None:
            return
        choice = record.answers.choices[0]
        chunks = by_chunk(stats, choice)
        counts = self._sources.setdefault(record.tenant, Counter())
        for chunk in chunks:
            counts[chunk["source"], "chunks"] += 1
            counts[chunk["source"], "tokens"] += chunk["tokens"]
        ids = choice.request.prompt.token_ids
        self._kept.append(Shown(record.number, record.tenant, _about(record), chunks, stats.report, ids))
        self._tokens += len(ids)
        while len(self._kept) > KEPT or (self._tokens > KEPT_TOKENS and len(self._kept) > 1):
            self._tokens -= len(self._kept.popleft().token_ids)

    def of(self, tenant: Tenant) -> list[Shown]:
        """Return the requests of a tenant, the last one first."""
        return [shown for shown in reversed(self._kept) if shown.tenant == tenant.name]

    def sources(self, tenant: Tenant) -> list[dict[str, Any]]:
        """Return how many chunks and tokens of a tenant's prompts came from which tier."""
        counts = self._sources.get(tenant.name, Counter())
        names = sorted({name for name, _ in counts}, key=lambda name: -counts[name, "chunks"])
        return [{"source": n, "chunks": counts[n, "chunks"], "tokens": counts[n, "tokens"]} for n in names]


def _local(request: Request, server: AServer) -> None:
    """Refuse a page of somebody else's that has taken over a name of this machine, where no key is asked for."""
    if not server.options.tenants and request.base_url.hostname not in LOOPBACK:
        raise HTTPError(403, "without API keys the dashboard is for this machine alone: open it as 127.0.0.1")


def _ring(request: Request) -> Ring:
    ring: Ring = request.app.state.ring
    return ring


ARing = Annotated[Ring, Depends(_ring)]
router = APIRouter(dependencies=[Depends(_local)], include_in_schema=False)


def add_to(app: FastAPI) -> None:
    """Let a server have the page."""
    app.state.ring = Ring()
    app.state.recorder.add(app.state.ring)
    app.state.server.service.watched = True
    app.include_router(router)


@router.get("/")
async def page() -> Response:
    """Return the page."""
    return Response(_file("index.html"), media_type="text/html", headers=_HEADERS)


@router.get("/dashboard/{name}")
async def part(name: str) -> Response:
    """Return a part of the page."""
    if name not in _FILES:
        raise HTTPError(404, "the dashboard has no such file")
    return Response(_file(name), media_type=_FILES[name], headers=_HEADERS)


@router.get("/dashboard/api/state")
async def state(request: Request, response: Response, tenant: Who, server: AServer, ring: ARing) -> dict[str, Any]:
    """Return the tenant's requests, those that run first, and where its chunks came from."""
    response.headers.update(_HEADERS)
    running = [each for each in request.app.state.recorder.running if each.tenant == tenant.name and each.kind]
    over = [{**shown.about, "text": True} for shown in ring.of(tenant)]
    service = server.service
    return {
        "model": service.name,
        "policy": str(service.llm.engine.policy),
        "tenant": tenant.name,
        "requests": [*map(_about, reversed(running)), *over],
        "sources": ring.sources(tenant),
    }


@router.get("/dashboard/api/requests/{number}")
async def prompt(number: int, response: Response, tenant: Who, server: AServer, ring: ARing) -> dict[str, Any]:
    """Return the prompt of a request that the tenant sent, token by token, and what was done with each."""
    response.headers.update(_HEADERS)
    shown = next((each for each in ring.of(tenant) if each.number == number), None)
    if shown is None:
        raise HTTPError(404, "this request is not kept, or not of this key")
    return await run_in_threadpool(_prompt, shown, server.service)


@router.get("/dashboard/api/store")
async def store(response: Response, tenant: Who, server: AServer, document: str | None = None) -> dict[str, Any]:
    """Return what the tenant has stored, of one document or at all."""
    response.headers.update(_HEADERS)
    return await run_in_threadpool(_stored, server.service, tenant, document or None)


@router.delete("/dashboard/api/store")
async def forget(response: Response, tenant: Who, server: AServer, document: str) -> dict[str, int]:
    """Delete all KV of the tenant that were computed from a document."""
    response.headers.update(_HEADERS)
    if not document:
        raise HTTPError(400, "name the document whose KV are to be deleted", param="document")
    return {"deleted": await run_in_threadpool(_forget, server.service, tenant, document)}


def _forget(service: Service, tenant: Tenant, document: str) -> int:
    return sum(view.delete(document=document) for view in service.views_of(tenant).values())


def _file(name: str) -> bytes:
    return (files("chunkcache.serve") / "page" / name).read_bytes()


def _about(record: Record) -> dict[str, Any]:
    return {"number": record.number, "at": record.at, "state": record.state, **record.summary()}


def _prompt(shown: Shown, service: Service) -> dict[str, Any]:
    report = shown.report
    attention = report.attention
    return {
        **shown.about,
        "tokens": pieces(service.llm.tokenizer, shown.token_ids),
        "states": report.states,
        "chunks": shown.chunks,
        "prefix": 0 if report.prefix is None else report.prefix.tokens,
        "attention": None if attention is None else [round(share, 7) for share in attention],
    }


def _stored(service: Service, tenant: Tenant, document: str | None) -> dict[str, Any]:
    """Return the entries of a tenant, the last computed first, and what each tier holds of them."""
    label = None if document is None else hashed_label("document", document)
    owners = {hashed_label("tenant", name) for name in service.views_of(tenant)}
    wanted = EntryFilter(document=label)  # each tier is listed once, whatever the number of salts
    tiers: list[dict[str, Any]] = []
    entries: dict[ChunkKey, Entry] = {}
    held: dict[str, list[str]] = {}
    for name, tier in service.llm.store.tiers().items():
        found = [entry for entry in tier.entries(wanted) if entry.tenant in owners]
        tiers.append({"tier": name, "entries": len(found), "nbytes": sum(entry.nbytes for entry in found)})
        for entry in found:
            entries.setdefault(entry.key, entry)
            held.setdefault(entry.key.digest, []).append(name)
    last = sorted(entries.values(), key=lambda entry: -entry.created)[:SHOWN]
    return {
        "tiers": tiers,
        "total": len(entries),
        "entries": [
            {
                "key": str(entry.key),
                "tokens": entry.tokens,
                "nbytes": entry.nbytes,
                "created": entry.created,
                "documents": len(entry.documents),
                "behind": max(0, len(entry.chunks) - 1),
                "tiers": held[entry.key.digest],
            }
            for entry in last
        ],
    }


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token; of a character that several make up, the last one has it."""

    def text(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), clean_up_tokenization_spaces=False))

    texts: list[str] = []
    start = 0  # of the tokens whose text is not given out yet
    for at in range(len(ids)):
        before = ids[max(0, start - 1) : start]  # spaces depend on it
        now = text([*before, *ids[start : at + 1]])
        if now.endswith(UNFINISHED) and at - start < 4 and at + 1 < len(ids):
            texts.append("")
            continue
        texts.append(now[len(text(before)) :] if before else now)
        start = at + 1
    return texts
