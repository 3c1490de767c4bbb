"""A comparison has a row per prompt, policy and round, measured beside full prefill of the same prompt."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import zoo
from support.llm import QUESTION, TEXTS, chat_tokenizer, plain, prompt_ids, tiny_model, wrapped
from transformers import DynamicCache

import chunkcache
from chunkcache.errors import PeerError, PolicyError, ResultsError
from chunkcache.eval import Case, Comparison, Results, compare, measure_fidelity, summary
from chunkcache.eval.memory import PeakMemory
from chunkcache.store import MemoryStore

CASES = [Case(QUESTION, TEXTS, ("1931",)), Case("Who wrote down the weather?", TEXTS[::-1])]
POLICIES = ("full", "plain", "prefix", "reuse", "cacheblend:ratio=1", "query")


@pytest.fixture(scope="module")
def results():
    return compare(tiny_model(), chat_tokenizer(), CASES, Comparison(POLICIES))


def test_every_policy_has_a_row_for_every_prompt(results):
    names = results.settings["policies"]
    assert sorted(names) == sorted(POLICIES)
    assert {(row["prompt"], row["policy"]) for row in results.rows} == {(i, name) for i in (0, 1) for name in names}
    assert len(results.rows) == 2 * len(names)


def test_exact_policies_agree_with_full_prefill_and_reuse_does_not(results):
    for row in results.rows:
        if row["policy"].startswith(("full", "plain", "prefix", "cacheblend")):
            assert row["agreement"] == 1
            assert row["same_answer"]
            assert abs(row["kl_first"]) < 1e-4
            assert abs(row["kl_mean"]) < 1e-4
        if row["policy"] == "reuse":
            assert row["kl_first"] > 1e-3


def test_stages_add_up_to_the_time_to_first_token(results):
    for row in results.rows:
        if row["policy"] == "plain":
            assert row["stages"] is None
            continue
        assert sum(row["stages"].values()) == pytest.approx(row["ttft_s"])
        assert all(seconds >= 0 for seconds in row["stages"].values())
        assert row["stages"]["recompute"] > 0


def test_warm_requests_hit_and_cold_ones_compute_within_the_clock(results):
    assert {row["hits"] for row in results.rows if row["policy"] == "reuse"} == {len(TEXTS)}
    cold = compare(
        tiny_model(), chat_tokenizer(), CASES[:1], Comparison(["reuse"], cold=True, rounds=2, answers=False)
    )
    for row in cold.rows:
        if row["policy"] == "reuse":
            assert (row["hits"], row["misses"]) == (0, len(TEXTS))
            assert row["stages"]["compute"] > 0
            assert row["answer"] is None


def test_the_model_alone_is_called_once_with_the_ids_and_a_cache_of_its_own(monkeypatch):
    """It has what a user without chunkcache has: no shadow, no mask, no position."""
    calls = []
    model = zoo.new("llama", vocab_size=512, max_position_embeddings=4096)
    forward = type(model).forward

    @functools.wraps(forward)  # its signature says what it takes
    def noted(self, *args, **kwargs):
        if self is model and args:
            calls.append((args, kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", noted)
    made = compare(model, chat_tokenizer(), CASES[:1], Comparison(["plain"], answers=False))
    (_, _), ((ids,), options) = calls  # the first is to warm up
    assert options.keys() == {"past_key_values", "logits_to_keep"}
    assert type(options["past_key_values"]) is DynamicCache
    assert {row["tokens"] for row in made.rows} == {ids.shape[1]}
    assert made.settings["options"].keys() == {"full"}


def test_answers_are_scored_where_there_are_accepted_ones(results):
    for row in results.rows:
        assert (row["f1"] is None) == (row["prompt"] == 1)
        assert row["question"] == CASES[row["prompt"]].question


def test_rows_say_whether_the_chunks_hold_an_answer_and_what_is_repeated(results):
    assert {row["gold_in_chunks"] for row in results.rows if row["prompt"] == 0} == {True}
    assert {row["gold_in_chunks"] for row in results.rows if row["prompt"] == 1} == {None}
    assert {row["repeated_chunks"] for row in results.rows} == {0}
    twice = Case(QUESTION, (TEXTS[1], TEXTS[0], TEXTS[1]), ("no such thing",))
    made = compare(tiny_model(), chat_tokenizer(), [twice], Comparison([], answers=False))
    assert [(row["gold_in_chunks"], row["repeated_chunks"]) for row in made.rows] == [(False, pytest.approx(2 / 3))]


def test_full_prefill_runs_once_for_a_prompt_however_many_policies_there_are(monkeypatch):
    asked = []
    prefill = chunkcache.CachedLLM.prefill

    def counted(self, question, chunks=(), **options):
        asked.append((question, str(options["policy"])))
        return prefill(self, question, chunks, **options)

    monkeypatch.setattr(chunkcache.CachedLLM, "prefill", counted)
    compare(tiny_model(), chat_tokenizer(), CASES, Comparison(["full", "reuse", "link:k=2", "query"]))
    assert [asked.count((case.question, "full")) for case in CASES] == [1, 1]


@pytest.mark.parametrize("tokens", [1, 5])
def test_answers_have_as_many_tokens_as_asked_for(tokens):
    comparison = Comparison(["reuse"], answer_tokens=tokens)
    echo = _Echo()
    made = compare(tiny_model(), chat_tokenizer(), CASES[:1], comparison, peers=[echo])  # type: ignore[list-item]
    assert made.settings["answer_tokens"] == tokens
    assert set(echo.asked) == {tokens}
    ids = plain(tiny_model(), prompt_ids(wrapped()), max_new_tokens=tokens, do_sample=False)
    [full] = [row for row in made.rows if row["policy"] == "full"]
    assert full["answer"] == chat_tokenizer().decode(ids, skip_special_tokens=True).strip()


def test_a_second_round_does_not_find_what_the_first_left(results):
    twice = compare(
        tiny_model(), chat_tokenizer(), CASES[:1], Comparison(["prefix", "cachecraft"], rounds=2, answers=False)
    )
    for name in ("prefix", "cachecraft"):
        first, second = (row for row in twice.rows if row["policy"] == name)
        assert second["recomputed_share"] >= first["recomputed_share"]


def test_what_the_store_held_is_left_alone():
    store = MemoryStore()
    chunkcache.wrap(tiny_model(), chat_tokenizer(), store=store).precompute(TEXTS)
    before = {entry.key for entry in store.entries()}
    compare(tiny_model(), chat_tokenizer(), CASES[:1], Comparison(["reuse"], store=store, cold=True, answers=False))
    assert before
    assert {entry.key for entry in store.entries()} == before


def test_warming_up_leaves_nothing_of_the_first_prompt(results):
    first, second = (row for row in results.rows if row["policy"] == "prefix")
    assert first["hits"] == second["hits"] == 0


def test_policies_find_nothing_that_others_left(results):
    alone = compare(tiny_model(), chat_tokenizer(), CASES, Comparison(["query:ratio=0.3"], answers=False))
    beside = compare(
        tiny_model(), chat_tokenizer(), CASES, Comparison(["prefix", "reuse", "query:ratio=0.3"], answers=False)
    )
    shares = [
        [row["recomputed_share"] for row in run.rows if row["policy"].startswith("query")] for run in (alone, beside)
    ]
    assert shares[0] == shares[1]


def test_an_interrupted_run_goes_on(tmp_path, results):
    path = tmp_path / "requests.jsonl"
    args = (tiny_model(), chat_tokenizer(), CASES)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(*args, Comparison(["reuse"]), about={"data": "a"}, path=path, on_prompt=interrupt)
    first = path.read_text()
    path.write_text(first + '{"prompt": 1, "pol')  # the power went
    compare(*args, Comparison(["reuse"]), about={"data": "a"}, path=path)
    assert path.read_text().startswith(first)
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()[1:]] == [0, 0, 1, 1]


def test_rows_of_other_settings_are_never_mixed(tmp_path):
    path = tmp_path / "requests.jsonl"
    args = (tiny_model(), chat_tokenizer(), CASES[:1])
    compare(*args, Comparison(["reuse"], answers=False), about={"data": "a"}, path=path)
    with pytest.raises(ResultsError, match="data='a'"):
        compare(*args, Comparison(["reuse"], answers=False), about={"data": "b"}, path=path)
    with pytest.raises(ResultsError, match="options="):
        compare(*args, Comparison(["prefix"], answers=False), about={"data": "a"}, path=path)


def test_a_policy_that_cannot_run_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(PolicyError, match="nonsense"):
        compare(tiny_model(), chat_tokenizer(), CASES, Comparison(["nonsense"]), path=tmp_path / "requests.jsonl")
    assert not list(tmp_path.iterdir())


@dataclass
class _Echo:
    """A peer that answers at once, as full prefill would not."""

    name: str = "echo"
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    warmed: list[Any] = field(default_factory=list)
    ended: bool = False
    asked: list[int] = field(default_factory=list)

    def warm(self, parts: list[list[int]]) -> None:
        self.warmed.append(parts)

    def answer(self, parts: list[list[int]], answer_tokens: int) -> Any:
        self.asked.append(answer_tokens)

        @dataclass
        class Answer:
            ttft_s: float = 0.5
            token_ids: tuple[int, ...] = (5,)
            logits: torch.Tensor | None = None

        return Answer()


def test_a_peer_has_rows_beside_the_policies():
    peer = _Echo()
    results: Results = compare(tiny_model(), chat_tokenizer(), CASES[:1], Comparison(["reuse"]), peers=[peer])  # type: ignore[list-item]
    row = next(row for row in results.rows if row["policy"] == "peer:echo")
    assert row["ttft_s"] == 0.5
    assert row["stages"] is row["kl_first"] is None
    assert not row["same_answer"]
    assert row["tokens"] == results.rows[0]["tokens"]
    assert len(peer.warmed) == 1


class _Broken(_Echo):
    """A peer that fails the first time it is asked about a prompt."""

    calls = 0

    def answer(self, parts: list[list[int]], answer_tokens: int) -> Any:
        self.calls += 1
        if self.calls == 2:  # the first warms up
            raise PeerError("no such luck. It said: /home/someone")
        return super().answer(parts, answer_tokens)


@pytest.mark.parametrize("ended", [False, True])
def test_a_peer_that_fails_does_not_end_the_run(ended):
    peer = _Broken(ended=ended)
    results = compare(tiny_model(), chat_tokenizer(), CASES, Comparison(["reuse"]), peers=[peer])  # type: ignore[list-item]
    first, second = (row for row in results.rows if row["policy"] == "peer:echo")
    assert (first["ttft_s"], first["error"]) == (None, "no such luck")
    assert (second["ttft_s"] is None) == ended
    assert summary(results)["policies"].get("peer:echo", {}).get("prompts", 0) == (0 if ended else 1)


def test_fidelity_is_what_its_formulas_say():
    full = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    policy = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    fidelity = measure_fidelity(full, policy)
    assert fidelity.kl_first == pytest.approx(kl)
    assert fidelity.kl_mean == pytest.approx(kl / 2)
    assert fidelity.agreement == 0.5


def test_peak_memory_sees_what_was_freed_again():
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(64 * 2**20, dtype=torch.uint8).sum()
    assert peak.nbytes is None or peak.nbytes > 60 * 2**20
