"""A LlamaIndex LLM that reuses the KV of retrieved nodes, wherever in the messages their texts stand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    LLMMetadata,
    MessageRole,
    TextBlock,
    ThinkingBlock,
)
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from pydantic import Field, InstanceOf

from chunkcache.blend import Policy
from chunkcache.engine.generation import DEFAULT_NEW_TOKENS, Generation, needs_finished_cache, with_length
from chunkcache.errors import PromptError
from chunkcache.integrations.answering import SETTINGS, chat_options, load_llm, model_name, strip_stop
from chunkcache.integrations.llamaindex_errors import let_through
from chunkcache.integrations.stops import listed, stripped, until
from chunkcache.llm import CachedLLM

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}

Chat = list[dict[str, Any]]
Response = TypeVar("Response", ChatResponse, CompletionResponse)


class ChunkCacheLLM(CustomLLM):
    """An LLM on top of `chunkcache.wrap`: known texts in its messages are reused.

    A completion is a chat of one user message. Responses count tokens in `additional_kwargs`: `prompt_tokens`,
    `completion_tokens`, `total_tokens`, and `cached_tokens`, those of the prompt that stored KV were put in place
    for. Their `raw` has the same as `usage`, and beside it `ttft_s` in seconds and the request's `stats`. The last
    response of a stream has them. Async calls run in another thread.

    Keywords of a call go before the fields, and any other keyword is one of transformers' `generate()`.

    An error of a call is a ServingError: LlamaIndex swallows ValueErrors, and answers "Empty Response".

    Attributes:
        llm: the wrapped model.
        model_name: what traces call it; the model's own name by default.
        temperature: 0 is greedy; None is what the model's generation config says.
        max_tokens: length of the answer at most; None as in `llm.generate`.
        stop: strings that end the answer, and are no part of it.
        policy: which reused tokens are recomputed; None for the llm's own.
        options: further keywords of `generate()`.
    """

    llm: InstanceOf[CachedLLM] = Field(exclude=True, repr=False)
    model_name: str = ""
    temperature: float | None = Field(default=None, ge=0)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: list[str] | None = None
    policy: str | InstanceOf[Policy] | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    def __init__(self, llm: CachedLLM, **fields: Any) -> None:
        """Raise PolicyError when the policy is unknown, and InputError for a stop string that is empty."""
        super().__init__(llm=llm, **fields)
        self.llm.resolve_policy(self.policy)
        listed(self.stop)
        if not self.model_name:
            self.model_name = model_name(self.llm)

    @classmethod
    def from_model(cls, name: str, **options: Any) -> ChunkCacheLLM:
        """Load a model by its name and wrap it: `CachedLLM.from_pretrained` and this class in one.

        Args:
            name: alias, folder, GGUF file or Hugging Face id.
            options: fields of this class; all others go to `CachedLLM.from_pretrained`.
        """
        llm, fields = load_llm(name, cls.model_fields, options)
        return cls(llm=llm, **{"model_name": name, **fields})

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex knows this class by."""
        return "ChunkCacheLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex fits prompts to: lengths of context and answer, in tokens.

        The context is what the chat template leaves of the model's: LlamaIndex counts the texts of messages alone.
        """
        framing = len(self.llm.chat_prompt([{"role": "user", "content": "x"}]).token_ids)
        options = with_length(self.llm.model, self._options({}), None)
        return LLMMetadata(
            context_window=self.llm.max_tokens - framing,
            num_output=options["max_new_tokens"] or DEFAULT_NEW_TOKENS,
            is_chat_model=True,
            model_name=self.model_name,
        )

    def token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text, by the model's own tokenizer; good for `Settings.tokenizer`."""
        return list(self.llm.prompts.encode(text))

    # --- chat

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages.

        Raises:
            ServingError: the request cannot be served. Its `__cause__` is the InputError that `llm.chat` raises: a
                PromptError, a ContextLengthError, a PolicyError, and so on.
        """
        return self._answer(partial(as_chat, messages), kwargs, _chat_response)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer messages; see `chat`."""
        return await self._aanswer(partial(as_chat, messages), kwargs, _chat_response)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> Generator[ChatResponse, None, None]:
        """Answer messages piece by piece; leaving the loop early ends the generation. See `chat`."""
        return self._stream(partial(as_chat, messages), kwargs, _chat_response)

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> AsyncGenerator[ChatResponse, None]:
        """Answer messages piece by piece; see `stream_chat`."""
        return _in_thread(self._stream(partial(as_chat, messages), kwargs, _chat_response))

    # --- completion

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer one user message; see `chat`."""
        return self._answer(partial(self._asked, prompt, formatted), kwargs, _completion_response)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer one user message; see `chat`."""
        return await self._aanswer(partial(self._asked, prompt, formatted), kwargs, _completion_response)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> Generator[CompletionResponse, None, None]:
        """Answer one user message piece by piece; see `stream_chat`."""
        return self._stream(partial(self._asked, prompt, formatted), kwargs, _completion_response)

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> AsyncGenerator[CompletionResponse, None]:
        """Answer one user message piece by piece; see `stream_chat`."""
        return _in_thread(self._stream(partial(self._asked, prompt, formatted), kwargs, _completion_response))

    # --- inside

    def _asked(self, prompt: str, formatted: bool) -> Chat:
        text = prompt if formatted or self.completion_to_prompt is None else self.completion_to_prompt(prompt)
        return [{"role": "user", "content": text}]

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords of `llm.chat`."""
        fields = {name: getattr(self, name, None) for name in SETTINGS}
        return chat_options(fields, {**self.options, **given})

    def _answer(
        self, build: Callable[[], Chat], given: dict[str, Any], response: Callable[[str, str | None], Response]
    ) -> Response:
        with let_through():
            options = self._options(given)
            generation = self.llm.chat(build(), **options)
            return _with_usage(response(strip_stop(self.llm, generation, options)[0], None), generation)

    async def _aanswer(
        self, build: Callable[[], Chat], given: dict[str, Any], response: Callable[[str, str | None], Response]
    ) -> Response:
        """Answer in another thread; the generation ends when this is cancelled, but for beam search."""
        with let_through():
            beams = needs_finished_cache(self.llm.model, self._options(given))
        if beams:  # there is no stream of them
            return await asyncio.to_thread(self._answer, build, given, response)
        return await _last(self._stream(build, given, response))

    def _stream(
        self, build: Callable[[], Chat], given: dict[str, Any], response: Callable[[str, str | None], Response]
    ) -> Generator[Response, None, None]:
        with let_through():
            messages, options = build(), self._options(given)
        return self._pieces(messages, options, response)

    def _pieces(
        self, messages: Chat, options: dict[str, Any], response: Callable[[str, str | None], Response]
    ) -> Generator[Response, None, None]:
        with let_through():
            stream = self.llm.chat_stream(messages, **options)  # here, because it begins at once
            text = ""
            try:
                for piece in stripped(until(stream, options.get("stop_strings"))):
                    text += piece
                    yield response(text, piece)
            finally:  # also when the caller stops listening
                stream.close()
            if stream.result is not None:
                yield _with_usage(response(text, ""), stream.result)


def as_chat(messages: Sequence[ChatMessage]) -> Chat:
    """Return LlamaIndex's messages as `llm.chat` takes them; raises PromptError for what is not text."""
    return [{"role": _ROLES.get(message.role, message.role.value), "content": _text(message)} for message in messages]


def _text(message: ChatMessage) -> str:
    texts = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif not isinstance(block, CachePoint | ThinkingBlock):  # a hint, and what a model did not say aloud
            raise PromptError(
                f"a message has a {type(block).__name__}, and this model reads text: pass TextBlocks, or leave it out"
            )
    return "\n".join(texts)


def _chat_response(text: str, delta: str | None) -> ChatResponse:
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=text), delta=delta)


def _completion_response(text: str, delta: str | None) -> CompletionResponse:
    return CompletionResponse(text=text, delta=delta)


def _with_usage(response: Response, generation: Generation) -> Response:
    """Return a response with the numbers of its request."""
    stats, answered = generation.stats, len(generation.token_ids)
    usage = {
        "prompt_tokens": stats.tokens,
        "completion_tokens": answered,
        "total_tokens": stats.tokens + answered,
        "cached_tokens": stats.cached_tokens,
    }
    response.additional_kwargs.update(usage)
    response.raw = {"usage": usage, "ttft_s": generation.ttft_s, "stats": stats.as_dict()}
    return response


async def _in_thread(source: Generator[Response, None, None]) -> AsyncGenerator[Response, None]:
    """Yield what `source` yields, which runs in a thread; it is closed there when the caller stops listening."""
    worker = ThreadPoolExecutor(1, thread_name_prefix="chunkcache-stream")
    loop = asyncio.get_running_loop()
    try:
        while (response := await loop.run_in_executor(worker, partial(next, source, None))) is not None:
            yield response
    finally:
        worker.submit(source.close)  # behind the piece that it may be at
        worker.shutdown(wait=False)


async def _last(source: Generator[Response, None, None]) -> Response:
    """Return the last response of a stream as one of none; the generation ends when this is cancelled."""
    async for response in _in_thread(source):
        last = response
    last.delta = None
    return last
