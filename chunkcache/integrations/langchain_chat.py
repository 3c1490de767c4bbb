"""A LangChain chat model that reuses the KV of retrieved chunks, wherever in the messages they stand."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.runnables.config import run_in_executor
from langchain_core.tools import BaseTool
from pydantic import ConfigDict, Field, InstanceOf

from chunkcache.blend import Policy
from chunkcache.engine.generation import Generation, needs_finished_cache, setting
from chunkcache.engine.streaming import TextStream
from chunkcache.errors import InputError
from chunkcache.integrations.answering import NO_TOOLS, SETTINGS, chat_options, load_llm, model_name, strip_stop
from chunkcache.integrations.langchain_messages import as_chat
from chunkcache.integrations.stops import listed, stripped, until
from chunkcache.llm import CachedLLM


class ChatChunkCache(BaseChatModel):
    """A chat model on top of `chunkcache.wrap`.

    Known texts (what a `ChunkCacheRetriever` returned, or was precomputed) are found inside ordinary messages. Or a
    user message names its chunks itself: `HumanMessage([document_block(doc), ..., "question"])`, for which blocks of
    plain text (`text-plain`) do as well. Such a message reads as `llm.generate(question, chunks)` does. A Document's
    metadata are not part of the prompt, nor is what a model's message has beside its text: tool calls, thoughts.

    Keywords of a call go before the fields, and any other keyword is one of transformers' `generate()`.

    Attributes:
        llm: the wrapped model.
        model_name: what traces and answers call it; the model's own name by default.
        temperature: 0 is greedy; None is what the model's generation config says.
        top_p: share of the probability that is sampled from.
        max_tokens: length of the answer at most; None as in `llm.generate`.
        stop: strings that end the answer, and are no part of it.
        policy: which reused tokens are recomputed; None for the llm's own.
        streaming: whether `invoke` takes the way of `stream` too, so that callbacks see the tokens.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    llm: InstanceOf[CachedLLM] = Field(repr=False)
    model_name: str = ""
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: list[str] | None = None
    policy: str | InstanceOf[Policy] | None = None
    streaming: bool = False

    @classmethod
    def from_model(cls, name: str, **options: Any) -> ChatChunkCache:
        """Load a model by its name and wrap it: `CachedLLM.from_pretrained` and this class in one.

        Args:
            name: alias, folder, GGUF file or Hugging Face id.
            options: fields of this class; all others go to `CachedLLM.from_pretrained`.
        """
        llm, fields = load_llm(name, cls.model_fields, options)
        return cls(llm=llm, **{"model_name": name, **fields})

    def model_post_init(self, context: Any, /) -> None:
        """Refuse an unknown policy and an empty stop string; like other bad fields they raise a ValidationError."""
        super().model_post_init(context)
        self.llm.resolve_policy(self.policy)
        listed(self.stop)
        if not self.model_name:
            self.model_name = model_name(self.llm)

    # --- answering

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        options = self._options(stop, kwargs)
        return self._result(self.llm.chat(as_chat(messages), **options), options)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        """Answer in another thread, which ends when this is cancelled; under beam search it runs to its end."""
        options = self._options(stop, kwargs)
        if needs_finished_cache(self.llm.model, options):  # there is no stream of beams
            generation = await run_in_executor(None, lambda: self.llm.chat(as_chat(messages), **options))
            return self._result(generation, options)
        stream = self.llm.chat_stream(as_chat(messages), **options)
        try:
            await run_in_executor(None, lambda: list(stream))
        finally:
            await run_in_executor(None, stream.close)
        return self._result(_whole(stream), options)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        options = self._options(stop, kwargs)
        stream = self.llm.chat_stream(as_chat(messages), **options)
        try:
            for chunk in self._chunks(stream, options):
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
        finally:  # also when the caller stops listening
            stream.close()

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        options = self._options(stop, kwargs)
        # Not in another thread: a cancelled caller would lose the stream, and the model would go on talking.
        stream = self.llm.chat_stream(as_chat(messages), **options)
        chunks = self._chunks(stream, options)
        try:
            while (chunk := await run_in_executor(None, next, chunks, None)) is not None:
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
        finally:
            await run_in_executor(None, stream.close)

    def _options(self, stop: list[str] | None, given: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords of `llm.chat`."""
        call = {name: value for name, value in given.items() if name != "stream"}  # LangChain's own
        return chat_options({name: getattr(self, name) for name in SETTINGS}, {**call, "stop": stop})

    def _chunks(self, stream: TextStream, options: dict[str, Any]) -> Iterator[ChatGenerationChunk]:
        """Yield the answer in pieces, and at its end a piece with no text that says how it went."""
        for piece in stripped(until(stream, options.get("stop_strings"))):
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
        generation = _whole(stream)
        _, reason = self._finish_reason(generation, options)
        last = AIMessageChunk(content="", chunk_position="last", **self._metadata(generation))
        yield ChatGenerationChunk(message=last, generation_info={"finish_reason": reason})

    def _result(self, generation: Generation, options: dict[str, Any]) -> ChatResult:
        text, reason = self._finish_reason(generation, options)
        message = AIMessage(content=text, **self._metadata(generation))
        return ChatResult(generations=[ChatGeneration(message=message, generation_info={"finish_reason": reason})])

    def _finish_reason(self, generation: Generation, options: dict[str, Any]) -> tuple[str, str]:
        """Return the answer without its stop string, and why it ended."""
        text, stopped = strip_stop(self.llm, generation, options)
        ends = setting(self.llm.model, options, "eos_token_id")
        ended = generation.token_ids and generation.token_ids[-1] in (ends if isinstance(ends, list) else [ends])
        return text, "stop" if stopped or ended else "length"

    def _metadata(self, generation: Generation) -> dict[str, Any]:
        """Return the metadata of an answer."""
        stats, output = generation.stats, len(generation.token_ids)
        usage = UsageMetadata(
            input_tokens=stats.tokens,
            output_tokens=output,
            total_tokens=stats.tokens + output,
            input_token_details={
                "cache_read": stats.cached_tokens,
                "cache_creation": stats.computed_tokens,
            },
        )
        response = {"model_name": self.model_name, "ttft_s": generation.ttft_s, "chunkcache": stats.as_dict()}
        return {"usage_metadata": usage, "response_metadata": response}

    # --- what LangChain asks of a chat model

    @property
    def _llm_type(self) -> str:
        return "chunkcache"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {
            "model_name": self.model_name,
            "fingerprint": self.llm.fingerprint,
            "policy": str(self.llm.resolve_policy(self.policy)),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "stop": self.stop,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return super()._get_ls_params(stop=stop or self.stop, **kwargs)

    def bind_tools(
        self, tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool], **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Raise NotImplementedError, which says that tools are not served; `with_structured_output` needs them."""
        raise NotImplementedError(NO_TOOLS)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text, by the model's own tokenizer."""
        return list(self.llm.prompts.encode(text))

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Return how many tokens the prompt of these messages has; raises InputError if there are tools."""
        if tools:
            raise InputError(f"{len(tools)} tools: {NO_TOOLS}")
        return len(self.llm.chat_prompt(as_chat(messages)).token_ids)


def _whole(stream: TextStream) -> Generation:
    """Return what a stream that has ended generated."""
    if stream.result is None:
        raise RuntimeError("the stream was closed before it began to answer")
    return stream.result
