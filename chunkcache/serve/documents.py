"""Routes of what clients have the server keep: chunk KV that are computed ahead, and documents in indexes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path as FilePath
from pathlib import PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from chunkcache.errors import DocumentError
from chunkcache.retriever import Document
from chunkcache.retriever.readers import CORPUS_SUFFIXES, READERS
from chunkcache.serve import schema
from chunkcache.serve.app import AServer, Server, Who, or_gone
from chunkcache.serve.background import Steps
from chunkcache.serve.errors import HTTPError
from chunkcache.serve.fields import IndexName, Salt
from chunkcache.serve.index_protocol import DocumentsRequest
from chunkcache.serve.precompute import chunk_steps
from chunkcache.serve.protocol import ChunksRequest, salts_of
from chunkcache.serve.tenants import Tenant

SUFFIXES = tuple(sorted(set(READERS) - CORPUS_SUFFIXES))
FILES = 32  # of one request
FIELDS = 8
FIELD_BYTES = 4096
FILE_BYTES = 8 * 2**20
_FIELDS = ("index", "cache_salt", "prompt_cache_key")

Salted = Annotated[Salt | None, Query()]


def _bodies() -> dict[str, Any]:
    """Return what OpenAPI says of the two kinds of body that documents come in."""
    body = DocumentsRequest.model_json_schema()
    [document] = body.pop("$defs").values()
    body["properties"]["documents"]["items"] = document
    text, file = {"type": "string"}, {"type": "string", "format": "binary"}
    fields = {**dict.fromkeys(_FIELDS, text), "file": {"type": "array", "items": file, "maxItems": FILES}}
    form = {"type": "object", "properties": fields, "required": ["index", "file"]}
    content = {"application/json": {"schema": body}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


router = APIRouter()
_CHANGED = {
    **schema.errors(400, 401, 403, 404, 413, 429, 499, 500, 503),
    501: {"model": schema.ErrorBody, "description": "The server has no embedding model."},
}


@router.post("/v1/chunks", responses=_CHANGED)
async def chunks(request: Request, asked: ChunksRequest, tenant: Who, server: AServer) -> dict[str, int]:
    """Compute the KV of texts ahead."""
    llm = await run_in_threadpool(server.service.view, tenant, asked.salts())
    adapter = None if asked.model is None else server.service.adapters.adapter_of(asked.model)
    return await _done(request, server, tenant, chunk_steps(llm, asked, server.options.precompute_tokens, adapter))


@router.post("/v1/documents", openapi_extra=_bodies(), responses=_CHANGED)
async def put(request: Request, tenant: Who, server: AServer) -> dict[str, Any]:
    """Add documents to an index, or update those that it has; as JSON, or as files in a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        form = await _form(request)
        try:
            asked, read = await _uploaded(form)
        finally:
            await form.close()
    elif kind != "application/json":  # a page of another site may send any text, if it does not call it JSON
        raise HTTPError(400, "send documents as application/json, or files as multipart/form-data")
    else:
        asked = _validated(await request.body())
        read = partial(_given, asked)
    indexes, most = server.service.indexes, server.options.precompute_tokens
    return await _done(request, server, tenant, indexes.put(tenant, asked.salts(), asked.index, read, most))


@router.get("/v1/documents", responses=schema.errors(400, 401, 404, 500))
async def listed(
    tenant: Who,
    server: AServer,
    index: Annotated[IndexName | None, Query(description="Without it the indexes are listed.")] = None,
    q: Annotated[str, Query(max_length=512, description="How id or title begin.")] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=512, description="The last id of the page before.")] = "",
    cache_salt: Salted = None,
    prompt_cache_key: Salted = None,
) -> dict[str, Any]:
    """List the documents of an index by id."""
    indexes, salts = server.service.indexes, salts_of(cache_salt, prompt_cache_key)
    if index is None:
        return {"object": "list", "data": indexes.names(tenant, salts), "has_more": False}
    found = await run_in_threadpool(indexes.documents, tenant, salts, index, q, after)
    return {"object": "list", "data": [held.body() for held in found[:limit]], "has_more": len(found) > limit}


@router.delete("/v1/documents/{document:path}", responses=_CHANGED)
async def delete(
    request: Request,
    tenant: Who,
    server: AServer,
    document: Annotated[str, Path(max_length=512)],
    index: Annotated[IndexName, Query()],
    cache_salt: Salted = None,
    prompt_cache_key: Salted = None,
) -> dict[str, Any]:
    """Delete a document from an index, and its KV from every tier."""
    steps = server.service.indexes.delete(tenant, salts_of(cache_salt, prompt_cache_key), index, document)
    return await _done(request, server, tenant, steps)


async def _done(request: Request, server: Server, tenant: Tenant, steps: Steps[dict[str, Any]]) -> dict[str, Any]:
    """Have a job done in the background; it ends after its step when its client goes away."""
    with server.options.tenants.admitted(tenant):
        job = server.service.background.submit(tenant.name, steps)
        return await or_gone(request, asyncio.wrap_future(job))


def _validated(body: bytes) -> DocumentsRequest:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPError(400, "the body is no JSON; send JSON, or a form with files") from None
    return _checked(given)


def _checked(given: Any) -> DocumentsRequest:
    try:
        return DocumentsRequest.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from None


def _given(asked: DocumentsRequest) -> list[Document]:
    return [Document(each.id, each.title or each.id, each.text) for each in asked.documents]


async def _form(request: Request) -> FormData:
    try:
        return await request.form(max_files=FILES, max_fields=FIELDS, max_part_size=FIELD_BYTES)
    except (UnicodeError, LookupError):  # of the charset that the content type names
        raise HTTPError(400, "the form cannot be read in the charset that it names; send it as UTF-8") from None


async def _uploaded(form: FormData) -> tuple[DocumentsRequest, Callable[[], Sequence[Document]]]:
    """Return what a form asks for, and what reads its files. Their names are labels, and open nothing."""
    fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
    files = [value for name, value in form.multi_items() if isinstance(value, UploadFile) and name == "file"]
    unknown = sorted({name for name, _ in form.multi_items()} - {*_FIELDS, "file"})
    if unknown or not files:
        raise HTTPError(400, "the form has the fields index, file (once or more) and, perhaps, salts", param="file")
    names = [file.filename or "" for file in files]
    asked = _checked({**fields, "documents": [{"id": name, "text": "a file"} for name in names]})
    contents: list[tuple[str, bytes]] = []
    for name, file in zip(names, files, strict=True):
        if PurePosixPath(name).suffix.lower() not in SUFFIXES:
            raise HTTPError(400, f"file {len(contents) + 1} is of no known kind; name it *{', *'.join(SUFFIXES)}",
                            "unsupported_file", "file")  # fmt: skip
        content = await file.read()
        if len(content) > FILE_BYTES:
            raise HTTPError(
                413, f"file {len(contents) + 1} is larger than {FILE_BYTES} bytes; cut it up", param="file"
            )
        contents.append((name, content))
    return asked, lambda: [_read(place, *each) for place, each in enumerate(contents, start=1)]


def _read(place: int, name: str, content: bytes) -> Document:
    """Return the document in a file, by the reader of its suffix; what is logged of it has a neutral name.

    Raises:
        HTTPError: it cannot be read, or has no text.
    """
    suffix = PurePosixPath(name).suffix.lower()
    try:
        parts = READERS[suffix](content, FilePath(f"file-{place}{suffix}")) if content.strip() else []
    except DocumentError as error:
        raise HTTPError(400, str(error), "unreadable_file", "file") from error
    text = "\n".join(part.text for part in parts)
    if not text.strip():
        raise HTTPError(400, f"file {place} has no text", "unreadable_file", "file")
    return Document(name, next((part.title for part in parts if part.title), PurePosixPath(name).stem), text)
