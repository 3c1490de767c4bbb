"""The three ways of `eval.chain` to answer a question over chunks: two LangChain chains, and a direct call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompt_values import PromptValue
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableLambda, RunnablePassthrough
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from chunkcache.engine.streaming import TextStream
from chunkcache.eval.answers import f1
from chunkcache.eval.data import Case
from chunkcache.eval.fidelity import ANSWER_TOKENS
from chunkcache.eval.results import Row
from chunkcache.integrations.langchain import ChatChunkCache, ChunkCacheRetriever
from chunkcache.integrations.langchain_messages import as_chat
from chunkcache.llm import CachedLLM

PROMPT = ChatPromptTemplate.from_template(
    "Answer the question from the passages below.\n\n{context}\n\nQuestion: {question}"
)


class Ways:
    """The plug-in's chain, `llm.chat_stream`, and the chain over plain transformers."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, policy: str) -> None:
        self._llm = _TimedLLM(model, tokenizer, store="memory://?max_bytes=8GiB", policy=policy)
        self._documents: list[Document] = []
        self._retrieve_s = 0.0
        listed: Runnable[str, list[Document]] = RunnableLambda(lambda _: self._documents)
        cached = ChunkCacheRetriever(retriever=listed, llm=self._llm)
        chat = ChatChunkCache(llm=self._llm, temperature=0, max_tokens=ANSWER_TOKENS)

        def retrieve(question: str) -> list[Document]:
            started = time.perf_counter()
            documents = cached.invoke(question)
            self._retrieve_s = time.perf_counter() - started
            return documents

        self._chain = _chain(RunnableLambda(retrieve), chat | StrOutputParser())
        self._plain = _chain(listed, RunnableGenerator(partial(_plain_pieces, model, tokenizer)))

    def run(self, case: Case, rounds: int, number: int) -> Row:
        """Answer `case`, the ways in an order that depends on its number, and return what it took."""
        self._documents = [Document(page_content=chunk) for chunk in case.chunks]
        self._llm.precompute(case.chunks)
        messages = as_chat(
            PROMPT.invoke({"context": _joined(self._documents), "question": case.question}).to_messages()
        )
        ways: list[Callable[[], Iterable[str]]] = [
            partial(self._chain.stream, case.question),
            partial(self._llm.chat_stream, messages, max_new_tokens=ANSWER_TOKENS, do_sample=False),
            partial(self._plain.stream, case.question),
        ]
        order = [way for turn in range(number, number + rounds) for way in (turn % 2, 1 - turn % 2)]
        times: list[list[float]] = [[], [], []]
        answers = ["", "", ""]
        retrieved, layer = [], []
        for way in (2, *order) if number % 2 else (*order, 2):
            seconds, answers[way] = _first_piece(ways[way])
            times[way].append(seconds)
            if way == 0:
                layer.append(seconds - self._llm.inside_s)
                retrieved.append(self._retrieve_s)
        chain, direct, plain = map(statistics.median, times)
        answer, plain_answer = answers[0], answers[2]
        stats = self._llm.chat(messages, max_new_tokens=1, do_sample=False).stats
        return {
            "chunks": len(case.chunks),
            "tokens": stats.tokens,
            "reused_tokens": stats.reused_tokens,
            "plain_ttft_s": plain,
            "chain_ttft_s": chain,
            "direct_ttft_s": direct,
            "retrieve_s": statistics.median(retrieved),
            "overhead_ms": 1000 * (chain - direct),
            "layer_ms": 1000 * statistics.median(layer),
            "speedup": plain / chain,
            "equal": answer == answers[1].strip(),
            "plain_equal": answer == plain_answer.strip(),
            "f1": f1(answer, case.answers) if case.answers else None,
            "plain_f1": f1(plain_answer, case.answers) if case.answers else None,
        }


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


def _chain(retriever: Runnable[str, list[Document]], chat: Runnable[Any, str]) -> Runnable[str, str]:
    return {"context": retriever | _joined, "question": RunnablePassthrough()} | PROMPT | chat


def _joined(documents: Sequence[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def _plain_pieces(model: Any, tokenizer: Any, prompts: Iterator[PromptValue]) -> Iterator[str]:
    """Answer as a chain does without the plug-in: by the chat template, and transformers' own `generate()`."""
    [prompt] = prompts
    inputs = tokenizer.apply_chat_template(
        as_chat(prompt.to_messages()), add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with ThreadPoolExecutor(1) as pool:
        options = {"max_new_tokens": ANSWER_TOKENS, "do_sample": False}
        generated = pool.submit(model.generate, **inputs, streamer=streamer, **options)
        generated.add_done_callback(lambda _: streamer.end())  # also after an error
        yield from streamer
        generated.result()


class _TimedLLM(CachedLLM):
    """Notes how long the first text of its last stream took."""

    inside_s = 0.0

    def chat_stream(self, *args: Any, **options: Any) -> Any:
        return _TimedStream(self, time.perf_counter(), super().chat_stream(*args, **options))


class _TimedStream:
    def __init__(self, llm: _TimedLLM, started: float, stream: TextStream) -> None:
        self._llm, self._started, self._stream = llm, started, stream

    def __iter__(self) -> Iterator[str]:
        said = False
        for piece in self._stream:
            if piece.strip() and not said:
                self._llm.inside_s, said = time.perf_counter() - self._started, True
            yield piece

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
