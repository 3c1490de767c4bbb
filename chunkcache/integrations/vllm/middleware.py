"""Documents of a chat become chunks in vLLM's own server.

It is started with `--middleware chunkcache.integrations.vllm.middleware.ChunkMiddleware`. A POST to
`/v1/chat/completions` with `documents` then goes on as one to `/v1/completions`, with the prompt as token ids and
`kv_transfer_params` that say where the chunks stand; its answer comes back in the shape of a chat. All other requests
pass as they are. Prompts are built when the server reads the request, thus behind its own check of the API key.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from chunkcache.errors import ChunkCacheError, InputError
from chunkcache.integrations.vllm.chat import ChatPrompts, ChatStream, chat_answer
from chunkcache.prompt import INSTRUCTION, PromptBuilder

logger = logging.getLogger("chunkcache")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
MAX_BODY = 64 * 2**20  # bytes
_END = b"\n\n"  # of an event


class ChunkMiddleware:
    """ASGI middleware for vLLM's server. To change an attribute, name a subclass with `--middleware`.

    Args:
        app: what answers.

    Attributes:
        instruction: stands before the chunks in every prompt.
        max_body: bytes of the largest chat.
    """

    instruction: str = INSTRUCTION
    max_body: int = MAX_BODY

    def __init__(self, app: App) -> None:
        self.app = app
        self._prompts: ChatPrompts | None = None
        self._lock = threading.Lock()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one connection."""
        root = scope.get("root_path", "")
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].removeprefix(root) != CHAT:
            await self.app(scope, receive, send)
            return
        read = await _read(receive, self.max_body)
        if read is None:
            return  # the client has gone away
        if len(read) > self.max_body:
            await _refuse(send, 413, f"the chat is larger than {self.max_body} bytes; send fewer documents")
            return
        chat = _parsed(read)
        if not chat or not chat.get("documents"):
            await self.app(scope, _replay(read, receive), send)
            return
        likeliest = chat.get("top_logprobs")
        answer = _Answer(send, likeliest if isinstance(likeliest, int) else 0)

        async def completion() -> bytes:
            try:
                prompts = await asyncio.to_thread(self._of_server, scope["app"].state)
                return json.dumps(await asyncio.to_thread(prompts.completion, chat)).encode()
            except InputError as error:
                answer.refuse(400, str(error))
            except ChunkCacheError as error:
                logger.error("a chat with documents failed", exc_info=error)
                answer.refuse(500, str(error))
            return b""  # which vLLM refuses; the client is told of what went wrong here

        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        path = root + COMPLETION
        inner = {**scope, "path": path, "raw_path": path.encode(), "headers": headers}
        await self.app(inner, _lazily(completion, receive), answer.send)
        await answer.finish()

    def _of_server(self, state: Any) -> ChatPrompts:
        """Return what builds prompts, for the model that the server has."""
        with self._lock:
            if self._prompts is None:
                self._prompts = chat_prompts(state, self.instruction)
            return self._prompts


def chat_prompts(state: Any, instruction: str = INSTRUCTION) -> ChatPrompts:
    """Return what builds the prompts of a vLLM server.

    Args:
        state: the server's, with its config, and its renderer for the chat template that it was started with.
        instruction: stands before the chunks.
    """
    from transformers import AutoTokenizer

    model, renderer = state.vllm_config.model_config, state.online_renderer
    tokenizer = AutoTokenizer.from_pretrained(
        model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )
    if renderer.chat_template is not None:
        tokenizer.chat_template = renderer.chat_template
    options = state.args.default_chat_template_kwargs  # the renderer has some of vLLM's own among them
    builder = PromptBuilder(tokenizer, instruction, template_options=options)
    return ChatPrompts(builder, model.max_model_len, model.get_diff_sampling_param().get("max_tokens"))


class _Answer:
    """Sends the answer of a completion on as that of a chat; an error of vLLM's own as it is."""

    def __init__(self, send: Send, likeliest: int) -> None:
        self._send, self._likeliest = send, likeliest
        self._refused: tuple[int, str] | None = None
        self._start: Message | None = None
        self._kind = b""
        self._rest = b""
        self._stream = ChatStream(likeliest)

    def refuse(self, status: int, message: str) -> None:
        """Answer with an error, whatever the app answers."""
        self._refused = status, message

    async def finish(self) -> None:
        """Send what is left to be sent."""
        if self._refused is not None:
            await _refuse(self._send, *self._refused)

    async def send(self, message: Message) -> None:
        """Take a message of the app's."""
        if self._refused is not None:
            return
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"").partition(b";")[0]
            self._kind = kind if message["status"] == 200 else b""
            if self._kind == b"application/json":
                self._start = message  # its length is not known yet
                return
        elif self._kind == b"text/event-stream":
            *events, self._rest = (self._rest + message.get("body", b"")).split(_END)
            body = b"".join(self._event(event) + _END for event in events)
            message = {**message, "body": body if message.get("more_body") else body + self._rest}
        elif self._kind == b"application/json":
            self._rest += message.get("body", b"")
            if message.get("more_body") or self._start is None:
                return
            body = json.dumps(chat_answer(json.loads(self._rest), self._likeliest), ensure_ascii=False).encode()
            others = [each for each in self._start["headers"] if each[0].lower() != b"content-length"]
            length = (b"content-length", str(len(body)).encode())
            await self._send({**self._start, "headers": [*others, length]})
            message = {**message, "body": body}
        await self._send(message)

    def _event(self, event: bytes) -> bytes:
        """Return an event of a stream, or the several that it becomes; a comment as it is."""
        data = event.strip().removeprefix(b"data:").strip()
        if not event.strip().startswith(b"data:") or data == b"[DONE]":
            return event
        pieces = self._stream.pieces(json.loads(data))
        return _END.join(b"data: " + json.dumps(piece, ensure_ascii=False).encode() for piece in pieces)


def _parsed(body: bytes) -> Mapping[str, Any] | None:
    """Return the object that a body is; None for anything else, which vLLM refuses."""
    try:
        chat = json.loads(body)
    except ValueError:
        return None
    return chat if isinstance(chat, dict) else None


async def _read(receive: Receive, limit: int) -> bytes | None:
    """Return the body of a request, cut off behind `limit` bytes; None if the client goes away."""
    parts, size = [], 0
    while size <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if not message.get("more_body"):
            break
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    async def read() -> bytes:
        return body

    return _lazily(read, receive)


def _lazily(read: Callable[[], Awaitable[bytes]], receive: Receive) -> Receive:
    """Return a `receive` with a body that is made when it is asked for; then it goes on as the client's own."""
    given = False

    async def receive_lazily() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": await read(), "more_body": False}

    return receive_lazily


async def _refuse(send: Send, status: int, message: str) -> None:
    """Answer with an error in vLLM's shape, which is OpenAI's."""
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    error = {"message": message, "type": kind, "param": None, "code": status}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
