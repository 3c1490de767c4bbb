"""Keys and values: a key names one chunk in one context of one model and tenant, and says nothing about it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.kv import ChunkKey, ChunkKV
from chunkcache.kv import chunk as kv

ids = st.lists(st.integers(0, 300), max_size=4)
fields = st.fixed_dictionaries(
    {"fingerprint": st.text("ab", max_size=3), "context": ids, "token_ids": ids, "tenant": st.text("ab", max_size=3)}
)
BASE = {"fingerprint": "f", "context": [1, 2], "token_ids": [3, 4], "tenant": "s"}


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "g"},
        {"context": [1, 5]},
        {"context": [2, 1]},
        {"context": []},
        {"token_ids": [3, 5]},
        {"token_ids": [3, 4, 0]},
        {"tenant": ""},
        {"context": [1], "token_ids": [2, 3, 4]},
        {"context": [1, 2, 3], "token_ids": [4]},
        {"context": [3, 4], "token_ids": [1, 2]},
        {"fingerprint": "fs", "tenant": ""},
        {"fingerprint": "s", "tenant": "f"},
    ],
    ids=str,
)
def test_a_key_changes_with_every_field_and_with_what_moves_between_fields(change):
    assert ChunkKey.of(**{**BASE, **change}) != ChunkKey.of(**BASE)


def test_a_key_changes_with_the_format(monkeypatch):
    before = ChunkKey.of(**BASE)
    monkeypatch.setattr(kv, "FORMAT_VERSION", kv.FORMAT_VERSION + 1)
    assert ChunkKey.of(**BASE) != before


@given(fields, fields)
def test_keys_agree_exactly_when_all_fields_do(one, other):
    assert (ChunkKey.of(**one) == ChunkKey.of(**other)) == (one == other)


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor, iter], ids=["tuple", "numpy", "torch", "range"])
def test_a_key_does_not_depend_on_how_token_ids_are_held(kind):
    held = range(3, 6) if kind is iter else kind([3, 4, 5])
    assert ChunkKey.of("f", (1,), held) == ChunkKey.of("f", [1], [3, 4, 5])


def test_a_key_is_the_same_in_every_process_and_on_every_machine():
    """Outer tiers outlive the process: change FORMAT_VERSION when this changes."""
    assert ChunkKey.of(**BASE).digest[:16] == "08f3fd3fcf18ddee"


def test_a_key_shows_neither_tokens_nor_names():
    key = ChunkKey.of("secret-model", [11, 22], [33, 44], tenant="tenant")
    assert len(key.digest) == 64
    assert set(key.digest) <= set("0123456789abcdef")
    assert str(key) == key.digest[:12]
    assert "secret" not in repr(key)


def test_a_key_can_be_hashed_and_not_changed():
    assert len({ChunkKey.of(**BASE), ChunkKey.of(**BASE)}) == 1
    with pytest.raises(FrozenInstanceError):
        ChunkKey.of(**BASE).digest = "0"


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_chunk_kv_count_the_bytes_of_all_layers(dtype, size):
    chunk = ChunkKV.of([5, 6, 7], 4, [torch.zeros(2, 2, 3, 8, dtype=dtype)] * 5)
    assert chunk.nbytes == 5 * 2 * 2 * 3 * 8 * size
    assert (len(chunk), chunk.token_ids, chunk.position, len(chunk.layers)) == (3, (5, 6, 7), 4, 5)


def test_chunk_kv_are_compared_by_identity():
    layers = [torch.zeros(2, 1, 1, 2)]
    one, other = ChunkKV.of([5], 0, layers), ChunkKV.of([5], 0, layers)
    assert one != other
    assert len({one, other}) == 2


def test_chunk_kv_keep_their_own_list_of_tokens_and_layers():
    token_ids, layers = [5], [torch.zeros(2, 1, 1, 2)]
    chunk = ChunkKV.of(token_ids, 0, layers)
    token_ids.append(6)
    layers.clear()
    assert (chunk.token_ids, len(chunk.layers)) == ((5,), 1)
