"""What was done with each chunk and token of a prompt is told as it was."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from support.llm import QUESTION, TEXTS, tiny_model, wrapped

from chunkcache.blend import Decoder, Plan, SelectivePrefill, parse_policy
from chunkcache.blend.guard import GuardedSelection, GuardModel
from chunkcache.engine.stats import RequestStats
from chunkcache.errors import EntryLostError
from chunkcache.kv import ChunkKV, LazyLayers, Span
from chunkcache.library.encoder import Encoder

BRIDGE, FERRY, KEEPER = TEXTS


@pytest.fixture(scope="module")
def llm():
    llm = wrapped(policy="reuse", store="memory://")
    llm.precompute(TEXTS)
    return llm


def told(llm, policy, texts=TEXTS, **options):
    stats = llm.prefill(QUESTION, texts, policy=policy, **options).stats
    assert sum(length for _, length in stats.report.states) == stats.tokens
    return stats, stats.report


def counted(report, state):
    return sum(length for name, length in report.states if name == state)


def test_reused_chunks_name_their_tier_and_what_they_were_computed_behind(llm):
    stats, report = told(llm, "reuse")
    assert [chunk.source for chunk in report.chunks] == ["memory"] * 3
    assert [chunk.exact for chunk in report.chunks] == [True, False, False]
    assert [chunk.lead for chunk in report.chunks] == ["context", "prefix", "prefix"]
    assert [chunk.reused_tokens for chunk in report.chunks] == [chunk.tokens for chunk in report.chunks]
    assert report.prefix.exact
    assert counted(report, "exact") == stats.exact_tokens
    assert counted(report, "reused") == stats.reused_tokens - stats.exact_tokens
    assert [name for name, _ in report.states] == ["exact", "reused", "computed"]


def test_link_recomputes_where_each_later_chunk_begins(llm):
    _, report = told(llm, "link:k=5")
    assert [chunk.recomputed_tokens for chunk in report.chunks] == [0, 5, 5]
    later = report.chunks[1:]
    assert [name for name, _ in report.states] == ["exact", *["recomputed", "reused"] * 2, "computed"]
    assert [length for name, length in report.states if name == "reused"] == [c.tokens - 5 for c in later]


def test_a_token_that_one_layer_recomputes_counts(llm):
    _, report = told(llm, "cacheblend:ratio=0.2")  # its first layer computes all
    assert [chunk.recomputed_tokens for chunk in report.chunks] == [0, *(chunk.tokens for chunk in report.chunks[1:])]
    assert [chunk.exact for chunk in report.chunks] == [True, False, False]


def test_recomputed_in_all_layers_is_exact(llm):
    _, report = told(llm, "query:ratio=1.0,lead=0")
    assert [chunk.exact for chunk in report.chunks] == [True, True, True]
    assert [chunk.reused_tokens for chunk in report.chunks][1:] == [0, 0]


def test_full_prefill_computes_everything(llm):
    stats, report = told(llm, "full")
    assert report.states == [("computed", stats.tokens)]
    assert report.prefix is None
    assert all(chunk.exact and chunk.source == "computed" and chunk.lead is None for chunk in report.chunks)
    assert not any(chunk.reused_tokens or chunk.recomputed_tokens for chunk in report.chunks)


def test_what_was_missing_is_computed_and_found_the_next_time():
    llm = wrapped(policy="query:ratio=0.3,lead=32")
    llm.precompute([FERRY])
    _, report = told(llm, None)
    assert [chunk.source for chunk in report.chunks] == ["computed", "memory", "computed"]
    assert {chunk.lead for chunk in report.chunks} == {"lead-in"}
    assert report.prefix.source == "computed"
    _, report = told(llm, None)
    assert [chunk.source for chunk in report.chunks] == ["memory"] * 3


def test_a_far_tier_is_named_and_then_the_near_one(tmp_path):
    folder = tmp_path / "kv"
    first = wrapped(policy="reuse", store=f"disk://{folder}")
    first.precompute(TEXTS)
    first.store.close()
    llm = wrapped(policy="reuse", store=f"tiered:memory://|disk://{folder}")
    assert {chunk.source for chunk in told(llm, None)[1].chunks} == {"disk"}
    llm.store.flush()
    assert {chunk.source for chunk in told(llm, None)[1].chunks} == {"memory"}
    llm.store.close()


def test_chunks_that_are_only_computed_with_the_prompt_are_not_exact_behind_approximate_ones():
    llm = wrapped(policy="prefix")
    _, report = told(llm, None)
    assert all(chunk.exact and chunk.source == "computed" and not chunk.reused_tokens for chunk in report.chunks)
    _, report = told(llm, None)
    assert [(chunk.source, chunk.lead, chunk.exact) for chunk in report.chunks] == [("memory", "context", True)] * 3


def test_a_conversation_goes_on_from_its_turns(llm):
    talk = llm.conversation()
    talk.generate(QUESTION, TEXTS, max_new_tokens=2, do_sample=False)
    report = talk.prefill("And the ferry?", [KEEPER]).stats.report
    assert report.prefix.source == "conversation"


def test_attention_is_kept_only_where_it_is_asked_for(llm):
    policy = "query:ratio=0.3,lead=0"
    stats, report = told(llm, policy)
    assert report.attention is None
    request = llm.engine.prepare(lambda: llm.prompts.build(QUESTION, TEXTS), policy)
    report = llm.engine.prefill(replace(request, watched=True)).stats.report
    assert len(report.attention) == stats.tokens
    assert sum(report.attention) == pytest.approx(1, abs=1e-3)
    assert min(report.attention) >= 0


def test_it_holds_no_kv_and_can_be_kept(llm):
    stats, report = told(llm, "link:k=5")
    again = pickle.loads(pickle.dumps(stats))  # noqa: S301 - our own
    assert again.report.states == report.states
    assert len(pickle.dumps(report)) < 100_000
    assert {"report", "leads"}.isdisjoint(stats.as_dict())


def stored(decoder, ids, start):
    """Return a span with the KV of some ids as they are computed alone."""
    [kv] = Encoder(decoder).encode(None, [tuple(ids)])
    assert isinstance(kv, ChunkKV)
    return Span(start, start + len(ids), tuple(ids), kv=kv)


@pytest.mark.parametrize("bound", [1e-9, 1e9])
def test_under_a_guard_what_its_passes_recomputed_counts(bound):
    decoder = Decoder(tiny_model())
    ids = list(range(20, 60))
    plan = Plan.of(ids, [stored(decoder, ids[:15], 0), stored(decoder, ids[15:30], 15)])
    policy = parse_policy("query:ratio=0.2,lead=0,guard=0.1")
    model = GuardModel(((0.0, 0.0, 0.0),) * 3, ((1e-9, 0.0), (1e9, 0.0)))  # predicts 1 nat, whatever it sees
    prefill = SelectivePrefill(decoder, plan, policy, select=GuardedSelection(model, bound))
    prefill.run()
    stats = RequestStats(str(policy))
    stats.take(plan, prefill)
    chunks = stats.report.chunks
    assert stats.guard_full == (bound < 1)
    assert all(chunk.exact == stats.guard_full for chunk in chunks)
    recomputed = sum(chunk.recomputed_tokens for chunk in chunks)
    assert recomputed == (30 if stats.guard_full else 6)


class Gone(LazyLayers):
    def read(self, index):
        raise EntryLostError("key", "gone")


def test_a_chunk_that_is_lost_on_the_way_is_computed():
    decoder = Decoder(tiny_model())
    ids = list(range(20, 60))
    kept, lost = stored(decoder, ids[:15], 0), stored(decoder, ids[15:30], 15)
    lost = replace(lost, kv=replace(lost.kv, layers=Gone(lost.kv.shapes, waits=False), source="disk"))
    plan = Plan.of(ids, [kept, lost])
    prefill = SelectivePrefill(decoder, plan, parse_policy("reuse"))
    prefill.run()
    stats = RequestStats("reuse")
    stats.take(plan, prefill)
    assert stats.lost == 1
    assert [chunk.source for chunk in stats.report.chunks] == ["computed", "computed"]
    assert stats.report.states == [("reused", 15), ("computed", 25)]


def test_a_cache_put_aside_is_all_computed():
    ids = list(range(10, 30))
    decoder = Decoder(tiny_model())
    plan = Plan.of(ids, [stored(decoder, ids[:10], 0)])
    stats = RequestStats("reuse")
    stats.take(plan, SelectivePrefill(decoder, plan, parse_policy("reuse")))  # whose cache no forward was handed
    assert stats.report.states == [("computed", 20)]
    assert torch.equal(stats.report._computed, torch.full((20,), 4))
