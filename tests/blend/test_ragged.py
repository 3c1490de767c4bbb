"""Sequences of different lengths that decode together get the logits that they get alone."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from transformers.cache_utils import DynamicCache

from chunkcache.blend import Decoder
from chunkcache.blend.ragged import RaggedDecoder

LENGTHS = (3, 17, 29, 40)  # shorter and longer than the windows of the zoo
STEPS = 6


def prefilled(decoder, length):
    ids = torch.randint(decoder.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    cache = DynamicCache(config=decoder.config)
    return int(decoder.prefill(ids, cache)[0].argmax()), cache


@pytest.mark.parametrize(("family", "attention"), zoo.SERVED)
def test_sequences_of_all_lengths_get_their_own_logits(family, attention):
    decoder = Decoder(zoo.new(family, attention))
    ragged = RaggedDecoder(decoder)
    starts = [prefilled(decoder, length) for length in LENGTHS]
    alone = [(token, copy.deepcopy(cache)) for token, cache in starts]
    tokens, caches = [token for token, _ in starts], [cache for _, cache in starts]
    for _ in range(STEPS):
        logits = ragged.step(tokens, caches)
        wanted = torch.cat([decoder.prefill(torch.tensor([[t]]), c) for t, (_, c) in zip(tokens, alone, strict=True)])
        torch.testing.assert_close(logits, wanted, rtol=2e-4, atol=2e-5)
        tokens = logits.argmax(-1).tolist()


def test_sequences_join_and_leave_between_steps():
    decoder = Decoder(zoo.new("llama", "sdpa"))
    ragged = RaggedDecoder(decoder)
    (one, first), (two, second) = prefilled(decoder, 9), prefilled(decoder, 21)
    _, kept = prefilled(decoder, 9)
    a = ragged.step([one], [first])
    ragged.step([int(a.argmax()), two], [first, second])
    assert (first.get_seq_length(), second.get_seq_length()) == (11, 22)
    ragged.step([5], [second])
    assert (first.get_seq_length(), second.get_seq_length()) == (11, 23)
    torch.testing.assert_close(a, decoder.prefill(torch.tensor([[one]]), kept), rtol=2e-4, atol=2e-5)
