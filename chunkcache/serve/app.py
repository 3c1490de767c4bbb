"""The HTTP side: routes, who may ask, how large a request may be, and what happens when one goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from chunkcache.errors import ChunkCacheError
from chunkcache.serve import adapters, responses, schema
from chunkcache.serve.answers import Answers
from chunkcache.serve.errors import HTTPError
from chunkcache.serve.gates import Bounded, Guarded
from chunkcache.serve.logs import log_request
from chunkcache.serve.memory import trimming
from chunkcache.serve.metrics import Metrics
from chunkcache.serve.openai import Chat, Completion, Form, Shape, gathered
from chunkcache.serve.precompute import TOKENS
from chunkcache.serve.protocol import ChatRequest, CompletionRequest, ResponseRequest, Sampling
from chunkcache.serve.record import Record, Recorder
from chunkcache.serve.seen import Seen
from chunkcache.serve.service import Choice, Service
from chunkcache.serve.tenants import Tenant, Tenants

Scope = MutableMapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class ServeOptions:
    """How a server answers.

    Attributes:
        tenants: who may ask.
        body_bytes: the largest request.
        timeout_s: seconds after which an answer ends; None for as long as it takes.
        drain_s: seconds that running answers get when the server is told to stop.
        observers: called with the record of each request at its end.
        adapter_dir: the folder whose adapters may be loaded by requests; None for none.
        adapter_updates: whether adapters may be loaded and unloaded by requests.
        dashboard: whether there is a page that shows requests, their prompts and the store.
        precompute_tokens: tokens that one request may have computed ahead, or indexed.
    """

    tenants: Tenants = field(default_factory=Tenants)
    body_bytes: int = 8 * 2**20
    timeout_s: float | None = None
    drain_s: float = 30.0
    observers: Sequence[Callable[[Record], None]] = ()
    adapter_dir: Path | None = None
    adapter_updates: bool = False
    dashboard: bool = False
    precompute_tokens: int = TOKENS


@dataclass(frozen=True)
class Server:
    """What the routes work with, in `app.state.server`."""

    service: Service
    options: ServeOptions
    metrics: Metrics

    async def answer(
        self, request: Request, asked: Sampling, tenant: Tenant, prepare: Callable[..., list[Choice]], kind: Any
    ) -> Response:
        """Answer a request with a body, or with a stream of pieces."""
        with ExitStack() as stack:
            stack.enter_context(self.options.tenants.admitted(tenant))
            stack.enter_context(self.service.adapters.used(asked.model))
            self.service.scheduler.check_room(tenant.name)  # `submit` looks again
            choices = await run_in_threadpool(prepare, asked, tenant)
            record: Record = request.state.record
            answers = Answers(
                self.service.scheduler,
                choices,
                self.service.stops(asked),
                tenant.name,
                self.service.seconds(self.options.timeout_s),
                record.watching(self.metrics.watch),
            )
            record.model, record.kind, record.answers = asked.model, kind.operation, answers
            answers.submit()
            stack.callback(answers.cancel)
            told = asked.likeliest() is not None
            form: Form = kind(Shape(asked.model, self.service.token_text, told, calls=choices[0].calls))
            if not asked.stream:
                return JSONResponse(await or_gone(request, gathered(form, answers)))
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return _Stream(form.stream(answers, usage), stack.pop_all())

    def told(self, error: HTTPError, path: str = "") -> JSONResponse:
        """Return the answer to a request that went wrong, in the shape that clients of `path` read."""
        self.metrics.failed(error.status)
        return JSONResponse(error.body(path), error.status, error.headers)


def create_app(service: Service, options: ServeOptions | None = None) -> FastAPI:
    """Return the ASGI application of a service. The service's scheduler ends with it."""
    from chunkcache.serve import cohere, documents  # they need what is below

    options = options or ServeOptions()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with trimming():
            yield
        await run_in_threadpool(service.background.close)
        await run_in_threadpool(service.scheduler.close, options.drain_s)

    app = FastAPI(title="chunkcache", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    server = app.state.server = Server(service, options, Metrics(service.scheduler, service.llm.store))
    app.add_middleware(Bounded, most=options.body_bytes)
    app.add_middleware(Guarded, server=server)  # comes first: who has no key is not listened to
    app.state.recorder = Recorder([log_request, *options.observers])
    app.add_middleware(Seen, recorder=app.state.recorder, failed=server.metrics.failed)  # the outermost
    for each in (router, documents.router, cohere.router):
        app.include_router(each)
    if options.dashboard:
        from chunkcache.serve import dashboard

        dashboard.add_to(app)
    if options.adapter_updates:
        app.include_router(adapters.router)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    for kind in (HTTPError, ChunkCacheError, Exception):
        app.add_exception_handler(kind, _failed)
    return app


router = APIRouter()


def _server(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


def _who(request: Request) -> Tenant:
    tenant = _server(request).options.tenants.find(request.headers.get("authorization"))
    request.state.record.tenant = tenant.name
    return tenant


AServer = Annotated[Server, Depends(_server)]
Who = Annotated[Tenant, Depends(_who)]


@router.post("/v1/chat/completions", responses=schema.ANSWERED)
async def chat(request: Request, asked: ChatRequest, tenant: Who, server: AServer) -> Response:
    """Answer a conversation."""
    return await server.answer(request, asked, tenant, server.service.chat, Chat)


@router.post("/v1/completions", responses=schema.ANSWERED)
async def completion(request: Request, asked: CompletionRequest, tenant: Who, server: AServer) -> Response:
    """Continue a text."""
    return await server.answer(request, asked, tenant, server.service.completion, Completion)


@router.post("/v1/responses", responses=schema.ANSWERED)
async def response(request: Request, asked: ResponseRequest, tenant: Who, server: AServer) -> Response:
    """Answer a conversation, in the shape of the Responses API."""
    return await server.answer(request, asked.as_chat(), tenant, server.service.chat, responses.Response)


@router.get("/v1/models", responses=schema.READ)
async def models(tenant: Who, server: AServer) -> dict[str, Any]:
    """List the model."""
    names = [server.service.name, *server.service.adapters.names]
    return {"object": "list", "data": [server.service.about(name) for name in names]}


@router.get("/v1/models/{name:path}", responses=schema.NAMED)
async def model(name: str, tenant: Who, server: AServer) -> dict[str, Any]:
    """Describe the model."""
    return server.service.about(name)


@router.get("/openapi.json", include_in_schema=False)
async def described(request: Request, tenant: Who, server: AServer) -> JSONResponse:
    """Tell what can be asked, as OpenAPI."""
    return JSONResponse(schema.openapi(request.app, bool(server.options.tenants)))


@router.get("/health", responses=schema.errors(500))
async def health() -> dict[str, str]:
    """Say that the server is up."""
    return {"status": "ok"}


@router.get("/metrics", responses=schema.TEXT, response_class=Response)
async def measured(tenant: Who, server: AServer) -> Response:
    """Tell what was counted, in Prometheus' format."""
    return Response(await run_in_threadpool(server.metrics.text), media_type="text/plain; version=0.0.4")


async def _invalid(request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return await _failed(request, HTTPError(400, f"the body is no JSON, from character {first['loc'][-1]} on"))
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = f"{where}: {first['msg']}" if where else first["msg"]
    return await _failed(request, HTTPError(400, message, param=where or None))


async def _refused(request: Request, error: Any) -> JSONResponse:
    answer = await _failed(request, HTTPError(error.status_code, str(error.detail)))
    answer.headers.update(error.headers or {})
    return answer


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return _server(request).told(HTTPError.of(error), request.scope["path"])


class _Stream(StreamingResponse):
    """Server-sent events; whatever becomes of it, what it holds is let go of."""

    def __init__(self, events: AsyncIterator[bytes], held: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


async def or_gone(request: Request, answer: Awaitable[T]) -> T:
    """Await an answer; if its client goes away meanwhile, end it."""
    task = asyncio.ensure_future(answer)

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.1)
        task.cancel()

    watcher = asyncio.create_task(gone())
    try:
        return await task
    except asyncio.CancelledError:
        if not watcher.done():  # it is the server that ends
            task.cancel()
            raise
        raise HTTPError(499, "the client went away") from None
    finally:
        watcher.cancel()
