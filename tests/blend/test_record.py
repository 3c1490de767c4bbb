"""What is recorded of freshly computed chunks is what the model's own attention weights add up to."""

from __future__ import annotations

import pytest
import torch
import zoo
from support import blend as h
from support.blend import span

from chunkcache.blend import Plan, SelectivePrefill
from chunkcache.blend.reuse import Reuse
from chunkcache.kv import Span, chunk_name

IDS = h.random_ids(200)  # more rows than one block
SPANS = [(6, 50), (50, 130), (130, 190)]
CHUNKS = [Span(start, stop, IDS[start:stop]) for start, stop in SPANS]


def recorded(decoder, chunks=CHUNKS):
    prefill = SelectivePrefill(decoder, Plan.of(IDS, chunks), Reuse(), record=True, keep=lambda span: not span.kv)
    prefill.run()
    return {start: kv.context for start, kv in prefill.computed.items()}


@pytest.fixture(scope="module")
def weights():
    """Attention `[tokens, tokens]` of the whole prompt, mean over heads and layers."""
    with torch.no_grad():
        output = zoo.new("llama", "eager")(torch.tensor([IDS]), output_attentions=True)
    return torch.stack([one[0].mean(0) for one in output.attentions]).mean(0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sums_by_chunk(attention, weights):
    contexts = recorded(h.decoder("llama", attention))
    assert list(contexts) == [start for start, _ in SPANS]
    for index, (start, end) in enumerate(SPANS):
        context, n = contexts[start], end - start
        inter = [float(weights[start:end, a:b].sum()) for a, b in SPANS[:index]]
        within = weights[start:end, start:end]
        intra = float(within.sum() - within.diagonal().sum())
        assert context.chunks == tuple(chunk_name(IDS[a:b]) for a, b in SPANS[:index])
        assert context.inter == pytest.approx(inter, rel=1e-4)
        assert context.intra == pytest.approx(intra, rel=1e-4)
        lengths = [b - a for a, b in SPANS[:index]]
        assert context.a == pytest.approx(sum(x / n / m for x, m in zip(inter, lengths, strict=True)), rel=1e-4)
        assert context.b == pytest.approx(intra / n**2, rel=1e-4)
        outside = weights[start:end, 6:start] if index else weights[start:end, 1:6]
        torch.testing.assert_close(context.outside, outside.sum(1), atol=1e-5, rtol=0)


def test_only_chunks_that_are_computed_are_recorded(weights):
    decoder = h.decoder("llama")
    _, cache = h.own_prefill(decoder.model, IDS)
    middle = h.ChunkKV.of(IDS[50:130], 50, h.layers_of(cache, 50, 130))
    contexts = recorded(decoder, [CHUNKS[0], span(50, middle), CHUNKS[2]])
    assert list(contexts) == [6, 130]
    inter = [float(weights[130:190, a:b].sum()) for a, b in SPANS[:2]]
    assert contexts[130].inter == pytest.approx(inter, rel=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "mistral-sliding", "gpt-neox", "phi"])
def test_recording_changes_nothing(name):
    decoder = h.decoder(name)
    plan = Plan.of(IDS, CHUNKS)
    logits = SelectivePrefill(decoder, plan, Reuse(), record=True).run()
    torch.testing.assert_close(logits, h.own_prefill(decoder.model, IDS)[0][-1], atol=1e-4, rtol=0)
