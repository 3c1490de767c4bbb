"""The LangChain plug-in from end to end: time to the first token through a chain, with it and without.

One chain, of a retriever, a prompt template and a chat model, runs on each prompt over plain transformers, and over
the plug-in with all chunks precomputed. In turn with it `llm.chat_stream` is called directly with the same messages,
which tells what LangChain itself and the plug-in's own work cost.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnablePassthrough
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from chunkcache.blend import parse_policy
from chunkcache.engine.generation import Generation, TextStream
from chunkcache.errors import PolicyError, PromptError
from chunkcache.eval.answers import f1
from chunkcache.eval.data import Case
from chunkcache.eval.fidelity import ANSWER_TOKENS
from chunkcache.eval.machine import meta_data
from chunkcache.integrations.langchain import ChatChunkCache, ChunkCacheRetriever
from chunkcache.integrations.langchain_messages import as_chat
from chunkcache.llm import CachedLLM

PROMPT = ChatPromptTemplate.from_template(
    "Answer the question from the passages below.\n\n{context}\n\nQuestion: {question}"
)


@dataclass(frozen=True)
class ChainRow:
    """One prompt.

    Attributes:
        prompt: its number.
        chunks: its chunks.
        tokens: its length.
        reused_tokens: of these, tokens that stored KV were put in place for.
        plain_ttft_s: seconds from `chain.stream` to the first piece of the answer, over plain transformers.
        chain_ttft_s: the same over the plug-in; median of the rounds.
        direct_ttft_s: the same of `llm.chat_stream`; median of the rounds.
        retrieve_s: what the plug-in's retriever took of `chain_ttft_s`; median of the rounds.
        overhead_ms: `chain_ttft_s` less `direct_ttft_s`, in milliseconds.
        layer_ms: milliseconds of `chain_ttft_s` that passed outside of `llm.chat_stream`, free of the noise of two
            prefills; median of the rounds.
        speedup: `plain_ttft_s` over `chain_ttft_s`.
        equal: whether the plug-in's answer is the direct call's.
        plain_equal: whether it is plain transformers', too.
        f1: of the plug-in's answer; None without accepted answers.
        plain_f1: of plain transformers' answer.
    """

    prompt: int
    chunks: int
    tokens: int
    reused_tokens: int
    plain_ttft_s: float
    chain_ttft_s: float
    direct_ttft_s: float
    retrieve_s: float
    overhead_ms: float
    layer_ms: float
    speedup: float
    equal: bool
    plain_equal: bool
    f1: float | None
    plain_f1: float | None


@dataclass
class ChainBench:
    """The rows of one run, and what it ran on."""

    meta: dict[str, Any]
    rows: list[ChainRow] = field(default_factory=list)

    def summary(self) -> dict[str, float | None]:
        """Return medians of times and ratios, and means of the rest, over all prompts."""
        found: dict[str, float | None] = {}
        for name in (
            "plain_ttft_s",
            "chain_ttft_s",
            "direct_ttft_s",
            "retrieve_s",
            "overhead_ms",
            "layer_ms",
            "speedup",
        ):
            found[name] = statistics.median(getattr(row, name) for row in self.rows)
        for name in ("equal", "plain_equal", "f1", "plain_f1"):
            values = [float(value) for row in self.rows if (value := getattr(row, name)) is not None]
            found[name] = statistics.mean(values) if values else None
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return meta data, summary and rows as plain dicts for JSON."""
        return {"meta": self.meta, "summary": self.summary(), "rows": [asdict(row) for row in self.rows]}


def bench_chain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    policy: str = "query",
    on_prompt: Callable[[int, int], None] | None = None,
    rounds: int = 3,
) -> ChainBench:
    """Run the chain three ways over `cases`, greedily, with a prompt's chunks precomputed before the clock starts.

    Args:
        model: the model.
        tokenizer: its tokenizer; it needs a chat template.
        cases: the prompts.
        policy: of the plug-in and of the direct call.
        on_prompt: called with (prompts done, prompts in all).
        rounds: how often the plug-in and the direct call run on each prompt, in turn; plain transformers run once.

    Raises:
        PolicyError: the policy stores whole prompts, so that the second of two ways would find what the first left.
        PromptError: the tokenizer has no chat template.
    """
    chosen = parse_policy(policy)
    if chosen.stores_in_context or chosen.versioned:
        raise PolicyError(f"{policy} stores the prompts that it has seen, so no two calls on one are alike")
    if not tokenizer.chat_template:
        raise PromptError("the tokenizer has no chat template, which plain transformers need for chat messages")
    ways = _Ways(model, tokenizer, policy)
    ways.run(Case("Is this only to warm up?", tuple(chunk[:200] for chunk in cases[0].chunks[:2])), 1, 0)
    bench = ChainBench({**meta_data(model, [policy], cases), "rounds": rounds})
    for index, case in enumerate(cases):
        bench.rows.append(ways.run(case, rounds, index))
        if on_prompt is not None:
            on_prompt(index + 1, len(cases))
    return bench


class _Ways:
    """The three ways to answer a question over chunks."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: str) -> None:
        self._llm = _TimedLLM(model, tokenizer, "memory://?max_bytes=8GiB", policy)
        self._found = _Listed()
        self._ready = ChunkCacheRetriever(retriever=self._found, llm=self._llm)
        self._clock = _Clocked(retriever=self._ready)
        self._chat = ChatChunkCache(llm=self._llm, temperature=0, max_tokens=ANSWER_TOKENS)
        self._chain = _chain(self._clock, self._chat)
        self._plain = _chain(self._found, _PlainChat(model=model, tokenizer=tokenizer))

    def run(self, case: Case, rounds: int, index: int) -> ChainRow:
        """Answer `case`, the ways in an order that depends on its index, and return what it took."""
        self._found.documents = [Document(page_content=chunk) for chunk in case.chunks]
        self._llm.precompute(case.chunks)
        messages = as_chat(
            PROMPT.invoke({"context": _joined(self._found.documents), "question": case.question}).to_messages()
        )
        ways: list[Callable[[], Iterable[str]]] = [
            partial(self._chain.stream, case.question),
            partial(self._llm.chat_stream, messages, max_new_tokens=ANSWER_TOKENS, do_sample=False),
        ]
        times: list[list[float]] = [[], []]
        answers = ["", ""]
        retrieved: list[float] = []
        layer: list[float] = []
        plain, plain_answer = _first_piece(partial(self._plain.stream, case.question)) if index % 2 else (0.0, "")
        for turn in range(index, index + rounds):
            for way in (turn % 2, 1 - turn % 2):
                seconds, answers[way] = _first_piece(ways[way])
                times[way].append(seconds)
                if way == 0:
                    layer.append(seconds - self._llm.inside_s)
                    retrieved.append(self._clock.seconds)
        if not index % 2:
            plain, plain_answer = _first_piece(partial(self._plain.stream, case.question))
        chain, direct = map(statistics.median, times)
        stats = self._llm.chat(messages, max_new_tokens=1, do_sample=False).stats
        return ChainRow(
            prompt=index,
            chunks=len(case.chunks),
            tokens=stats.tokens,
            reused_tokens=stats.reused_tokens,
            plain_ttft_s=plain,
            chain_ttft_s=chain,
            direct_ttft_s=direct,
            retrieve_s=statistics.median(retrieved),
            overhead_ms=1000 * (chain - direct),
            layer_ms=1000 * statistics.median(layer),
            speedup=plain / chain,
            equal=answers[0] == answers[1].strip(),
            plain_equal=answers[0] == plain_answer.strip(),
            f1=f1(answers[0], case.answers) if case.answers else None,
            plain_f1=f1(plain_answer, case.answers) if case.answers else None,
        )


def _first_piece(stream: Callable[[], Iterable[str]]) -> tuple[float, str]:
    """Return the seconds to the first piece that is not empty, and the whole answer."""
    started = time.perf_counter()
    first: float | None = None
    answer = ""
    for piece in stream():
        if piece and first is None:
            first = time.perf_counter() - started
        answer += piece
    return (time.perf_counter() - started if first is None else first), answer


def _chain(retriever: BaseRetriever, chat: BaseChatModel) -> Runnable[str, str]:
    return {"context": retriever | _joined, "question": RunnablePassthrough()} | PROMPT | chat | StrOutputParser()


def _joined(documents: Sequence[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


class _TimedLLM(CachedLLM):
    """Notes how long the first text of its last stream took."""

    inside_s = 0.0

    def chat_stream(self, *args: Any, **options: Any) -> Any:
        return _TimedStream(self, time.perf_counter(), super().chat_stream(*args, **options))


class _TimedStream:
    def __init__(self, llm: _TimedLLM, started: float, stream: TextStream) -> None:
        self._llm, self._started, self._stream = llm, started, stream
        self.close = stream.close

    def __iter__(self) -> Iterator[str]:
        said = False
        for piece in self._stream:
            if piece.strip() and not said:
                self._llm.inside_s, said = time.perf_counter() - self._started, True
            yield piece

    @property
    def result(self) -> Generation | None:
        return self._stream.result


class _Listed(BaseRetriever):
    """Returns the Documents that it was given."""

    documents: list[Document] = Field(default_factory=list)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return self.documents


class _Clocked(BaseRetriever):
    """Notes how long another retriever took."""

    retriever: BaseRetriever
    seconds: float = 0.0

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        started = time.perf_counter()
        found = self.retriever.invoke(query, {"callbacks": run_manager.get_child()})
        self.seconds = time.perf_counter() - started
        return found


class _PlainChat(BaseChatModel):
    """What a chain has without the plug-in: the chat template, and transformers' own `generate()`."""

    model: Any
    tokenizer: Any

    @property
    def _llm_type(self) -> str:
        return "transformers"

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        raise NotImplementedError("this one only streams")

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        inputs = self.tokenizer.apply_chat_template(
            as_chat(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with ThreadPoolExecutor(1) as pool:
            options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
            done = pool.submit(self.model.generate, **inputs, streamer=streamer, **options)
            done.add_done_callback(lambda _: streamer.end())  # also after an error
            for piece in streamer:
                yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
            done.result()
