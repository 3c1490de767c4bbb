"""What the published methods select: fusionrag, prophetkv and kvshift, by hand.

position  0 1 2 | 3 4 5 6 | 7 | 8 9 | 10 11
          prefix  chunk a   gap  b    question
"""

from __future__ import annotations

import pytest
import torch
import zoo
from support import blend as h
from support.blend import span

from chunkcache.blend import FusedCache, Plan, parse_policy
from chunkcache.blend.fusionrag import FusionRAG
from chunkcache.blend.kvshift import KVShift
from chunkcache.blend.policy import Check
from chunkcache.blend.prophetkv import ProphetKV
from chunkcache.blend.query import Query
from chunkcache.blend.scout import scout
from chunkcache.errors import PolicyError
from chunkcache.kv import ChunkKV

IDS = range(50, 62)


def segment(start, end, exact=False):
    ids = IDS[start:end]
    return span(start, ChunkKV.of(ids, 0, [torch.zeros(2, 1, len(ids), 2)]), exact=exact)


PLAN = Plan.of(IDS, [segment(3, 7), segment(8, 10)], segment(0, 3, exact=True))
CHOICE = [3, 4, 5, 6, 8, 9]
#         0    1    2    3    4    5    6    7    8    9   10   11
SCORES = [9.0, 9.0, 9.0, 0.1, 0.9, 0.2, 0.3, 9.0, 0.8, 0.1, 9.0, 9.0]


@pytest.mark.parametrize("kind", [FusionRAG, ProphetKV])
@pytest.mark.parametrize(
    ("ratio", "selected"), [(0.0, []), (0.01, [4]), (1 / 3, [4, 8]), (0.5, [4, 6, 8]), (1.0, CHOICE)]
)
def test_the_share_with_the_highest_scores_is_recomputed(kind, ratio, selected):
    policy = kind(ratio=ratio)
    assert policy.wants_attention(PLAN) == bool(ratio)
    assert policy.select_by_attention(PLAN, torch.tensor([SCORES])).tolist() == selected
    assert policy.select(PLAN).tolist() == []


def test_prophetkv_averages_over_all_layers():
    first = torch.rand(12)
    seen = torch.stack((first, 2 * torch.tensor(SCORES) - first))
    assert ProphetKV(ratio=0.5).select_by_attention(PLAN, seen).tolist() == [4, 6, 8]
    assert list(ProphetKV().attention_layers(30)) == list(range(30))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3"])
def test_prophetkv_scores_by_a_softmax_over_the_context_of_a_question_over_reused_kv(name, attention):
    ids = h.random_ids()
    decoder = h.decoder(name, attention)
    _, own = h.own_prefill(decoder.model, ids)
    cache = FusedCache(decoder.config, plan := h.right_plan(ids, own), decoder.rotaries)
    seen = scout(decoder.shadow(), plan, cache, ProphetKV().attention_layers(zoo.LAYERS), ProphetKV().pool)
    with torch.no_grad():
        output = zoo.new(name, "eager")(torch.tensor([ids]), output_attentions=True)
    question = h.CHUNKS[-1][1]
    for layer, weights in zip(seen, output.attentions, strict=True):
        context = weights[0, :, question:, :question]
        expected = (context / context.sum(-1, keepdim=True).clamp(min=1e-30)).sum(dim=(0, 1))
        torch.testing.assert_close(layer[:question], expected, atol=1e-4, rtol=1e-4)


def test_fusionrag_looks_blindly_and_in_the_last_layer():
    assert list(FusionRAG().attention_layers(30)) == [29]
    assert FusionRAG().blind()
    assert not any(policy.blind() for policy in (ProphetKV(), Query(), KVShift()))


def test_fusionrag_wants_neighbours_unless_told_otherwise():
    assert FusionRAG().neighbours()
    assert not parse_policy("fusionrag:lead=none").neighbours()
    assert not any(policy.neighbours() for policy in (ProphetKV(), KVShift()))
    assert Query(lead=0).neighbours()
    assert FusionRAG().lead_in() == 0


@pytest.mark.parametrize(
    ("ratio", "selected"),
    [(0.0, []), (0.1, [5, 9]), (0.5, [4, 6, 9]), (0.75, [3, 5, 6, 8, 9]), (1.0, CHOICE)],
)
def test_even_probes_stand_in_the_middle_of_their_share_of_each_chunk(ratio, selected):
    policy = KVShift(ratio=ratio, probes="even")
    assert policy.select(PLAN).tolist() == selected
    assert list(policy.filter_layers(30)) == []


def test_even_probes_of_long_chunks_are_as_many_and_as_far_apart_as_asked():
    kv = ChunkKV.of(range(100), 0, [torch.zeros(2, 1, 100, 2)])
    plan = Plan.of(range(102), [span(0, kv)])
    probes = KVShift(probes="even").select(plan)
    assert probes.tolist() == list(range(5, 100, 10))


#             3    4    5    6    7    8    9   10   11
DEVIATIONS = [0.1, 3.0, 0.2, -4.0, 0.0, 2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("ratio", "probes"), [(0.0, []), (0.1, [6, 8]), (0.5, [4, 6, 8]), (0.75, [4, 5, 6, 8, 9]), (1.0, CHOICE)]
)
def test_top_probes_are_the_tokens_of_each_chunk_whose_keys_deviate_most(ratio, probes):
    rows = torch.arange(3, 12)
    stored = torch.randn(2, 2, len(rows), 4)
    fresh = stored.clone()
    fresh[0, 1, :, 2] += torch.tensor(DEVIATIONS)
    fresh[1] += torch.linspace(9, 0, 9)[None, :, None]
    stored[:, :, [4, 7, 8]] = torch.nan  # nothing is stored there
    policy = KVShift(ratio=ratio)
    kept = rows[policy.filter_rows(Check(PLAN, 1, 30, rows, [], lambda: (fresh, stored)))]
    assert kept.tolist() == sorted([*probes, 7, 10, 11])
    assert policy.select(PLAN).tolist() == CHOICE
    assert list(policy.filter_layers(30)) == [1]


def test_kvshift_weights_by_what_its_probes_know():
    assert KVShift().shift().weight == "deviation"
    assert KVShift(probes="even").shift().weight == "evidence"
    assert all(policy.shift() is None for policy in (FusionRAG(), ProphetKV(), Query()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fusionrag:ratio=2", r"ratio=2\.0 is not between 0 and 1; the paper uses 0\.15"),
        ("fusionrag:lead=5", "lead='5' is none of neighbours, none"),
        ("prophetkv:ratio=-1", r"ratio=-1\.0 is not between 0 and 1; the paper uses 0\.2"),
        ("kvshift:ratio=nan", "ratio=nan is not between 0 and 1"),
        ("kvshift:probes=random", "probes='random' is none of top, even"),
        ("kvshift:layer=0", "layer=0 is below 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(text, message):
    with pytest.raises(PolicyError, match=message):
        parse_policy(text)
