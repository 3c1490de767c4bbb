"""Chunk KV that stream in while the model computes: the same answers, and none lost with what gets lost."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.llm import QUESTION, TEXTS, own_model, wrapped

from chunkcache.blend import POLICIES
from chunkcache.blend.loader import Loader

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def stored(llm):
    return {llm.store.peek(entry.key).token_ids: entry.key for entry in llm.store.entries()}


def file_of(llm, text):
    return llm.store.path(stored(llm)[llm.prompts.chunk(text)])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(data)


def from_disk(tmp_path, policy="reuse", model=None, options=""):
    llm = wrapped(model, store=f"disk://{tmp_path}/kv?sync=no{options}", policy=policy)
    llm.precompute(TEXTS)
    return llm


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", POLICIES)
def test_from_disk_comes_what_comes_from_memory(name, policy, tmp_path):
    model = own_model(name)
    memory, disk = wrapped(model, policy=policy), from_disk(tmp_path, policy, model)
    for llm in (memory, disk):
        llm.precompute(TEXTS)
        llm.prefill(QUESTION, TEXTS[:2])
    expected, got = (llm.prefill(QUESTION, TEXTS) for llm in (memory, disk))
    torch.testing.assert_close(got.logits, expected.logits)
    assert (got.stats.hits, got.stats.lost) == (expected.stats.hits, 0)
    assert memory.generate(QUESTION, TEXTS, **GREEDY).text == disk.generate(QUESTION, TEXTS, **GREEDY).text


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8", "int4"])
def test_what_is_kept_in_fewer_bits_is_near_what_was_computed(codec, tmp_path):
    disk = from_disk(tmp_path, options=f"&codec={codec}")
    memory = wrapped(disk.model, policy="reuse", store=f"memory://?codec={codec}")
    exact = wrapped(disk.model, policy="reuse")
    for llm in (memory, exact):
        llm.precompute(TEXTS)
    got, same, expected = (llm.prefill(QUESTION, TEXTS).logits for llm in (disk, memory, exact))
    torch.testing.assert_close(got, same)
    error = float((got - expected).norm() / expected.norm())
    assert 0 < error < {"bf16": 0.01, "fp16": 0.002, "int8": 0.02, "int4": 0.3}[codec]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", ["first layer", "last layer"])
def test_a_chunk_that_proves_damaged_is_computed_with_the_prompt(policy, where, tmp_path, caplog):
    llm = from_disk(tmp_path, policy)
    full = llm.prefill(QUESTION, TEXTS[:1], policy="full").logits
    path = file_of(llm, TEXTS[0])
    kv_bytes = llm.store.peek(stored(llm)[llm.prompts.chunk(TEXTS[0])]).nbytes
    flip(path, -1 if where == "last layer" else path.stat().st_size - kv_bytes)
    got = llm.prefill(QUESTION, TEXTS[:1])
    if got.stats.hits:
        assert got.stats.lost == 1
        torch.testing.assert_close(got.logits, full, atol=1e-4, rtol=0)
        assert llm.store.stats().damaged == 1
    again = llm.prefill(QUESTION, TEXTS[:1])
    assert again.stats.lost == 0
    assert llm.store.stats().damaged <= 1


def test_the_others_are_reused_when_one_is_lost(tmp_path):
    llm = from_disk(tmp_path)
    for lost in (TEXTS[0], TEXTS[2]):
        flip(file_of(llm, lost), -1)
    got = llm.prefill(QUESTION, TEXTS)
    assert (got.stats.hits, got.stats.lost) == (3, 2)
    kept = len(llm.prompts.chunk(TEXTS[1])) + len(llm.prompts.prefix(None))
    assert got.stats.reused_tokens == kept
    assert (llm.store.stats().damaged, llm.store.stats().misses >= 2) == (2, True)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_answer_goes_on_where_a_chunk_is_lost_on_its_way(policy, tmp_path):
    llm = from_disk(tmp_path, policy)
    flip(file_of(llm, TEXTS[1]), -1)
    stream = llm.stream(QUESTION, TEXTS, **GREEDY)
    assert "".join(stream).strip() == stream.result.text
    assert stream.result.stats.lost <= 1
    with llm.attached():
        flip(file_of(llm, TEXTS[0]), -1)
        inputs = llm.prepare_inputs(QUESTION, TEXTS)["input_ids"]
        assert llm.model.generate(inputs, pad_token_id=3, **GREEDY).shape[1] > inputs.shape[1]


def test_the_file_of_a_chunk_may_go_while_it_is_read(tmp_path, monkeypatch):
    llm = from_disk(tmp_path)
    expected = llm.prefill(QUESTION, TEXTS).logits
    path = file_of(llm, TEXTS[1])
    take = Loader.take

    def gone(self, index):
        path.unlink(missing_ok=True)
        return take(self, index)

    monkeypatch.setattr(Loader, "take", gone)
    got = llm.prefill(QUESTION, TEXTS)
    torch.testing.assert_close(got.logits, expected)
    assert got.stats.lost == 0


def test_an_entry_of_another_models_shape_is_a_counted_miss(tmp_path):
    llm = from_disk(tmp_path)
    key = stored(llm)[llm.prompts.chunk(TEXTS[0])]
    kv = llm.store.peek(key).loaded()
    llm.store.put(key, kv.of_layers(kv.layers[:-1]))
    got = llm.prefill(QUESTION, TEXTS)
    assert (got.stats.hits, got.stats.misses, llm.store.stats().mismatches) == (2, 1, 1)


def test_what_is_lost_is_said_without_a_word_of_the_text(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    llm = from_disk(tmp_path)
    flip(file_of(llm, TEXTS[1]), -1)
    llm.prefill(QUESTION, TEXTS)
    assert "checksum" in caplog.text
    assert not [
        word for text in TEXTS for word in (text[:20], str(llm.prompts.chunk(text)[:4])[1:-1]) if word in caplog.text
    ]


def test_eight_threads_share_a_tiered_store_and_compute_each_chunk_once(tmp_path):
    llm = wrapped(store=f"tiered:memory://?max_bytes=400KB|disk://{tmp_path}/kv?sync=no", policy="reuse")
    expected = {n: llm.prefill(QUESTION, TEXTS[n:], policy="reuse").logits for n in range(3)}
    llm.store.clear()
    written = llm.store.stats().writes

    def ask(number):
        return number % 3, llm.prefill(QUESTION, TEXTS[number % 3 :]).logits

    with ThreadPoolExecutor(8) as pool:
        for number, logits in pool.map(ask, range(48)):
            torch.testing.assert_close(logits, expected[number])
    llm.store.flush()
    assert llm.store.stats().writes - written == 1 + len(TEXTS)  # the prefix, and each chunk


# --- documents that change


def test_an_edited_document_costs_only_its_changed_chunks(tmp_path):
    llm = wrapped(store=f"tiered:memory://|disk://{tmp_path}/kv?sync=no", policy="reuse")
    llm.update_document("guide", TEXTS)
    before = stored_in(llm)
    moved = ["A new beginning stands here now, of some length.", TEXTS[2], TEXTS[0]]
    done = llm.update_document("guide", moved)
    assert (done.chunks, done.computed) == (3, 1)
    llm.store.flush()
    for tier in llm.store.tiers().values():
        now = {entry.chunks[0] for entry in tier.entries()}
        assert len(now & before) == len(before) - 1  # TEXTS[1] is gone
        assert len(now - before) == 1
    assert not llm.prefill(QUESTION, moved).stats.misses


def stored_in(llm):
    return {entry.chunks[0] for entry in llm.store.entries()}


def test_a_forgotten_document_takes_along_what_was_computed_behind_it(tmp_path):
    llm = wrapped(store=f"tiered:memory://|disk://{tmp_path}/kv?sync=no", policy="prefix")
    llm.precompute(TEXTS[:1], policy="reuse", documents=["secret"])
    llm.prefill(QUESTION, TEXTS)  # stores the others behind it
    held = len(list(llm.store.entries()))
    gone = llm.delete(document="secret")
    assert gone >= len(TEXTS)
    assert len(list(llm.store.entries())) == held - gone
    assert llm.prefill(QUESTION, TEXTS[:1], policy="reuse").stats.misses == 1


def test_what_was_computed_behind_a_document_goes_with_it_also_after_an_edit(tmp_path):
    llm = wrapped(store=f"disk://{tmp_path}/kv?sync=no", policy="prefix")
    llm.precompute([TEXTS[0]], policy="reuse", documents=["first"])
    llm.precompute([TEXTS[1]], policy="reuse", documents=["second"])
    llm.prefill(QUESTION, TEXTS[:2])  # stores the second chunk behind the first
    llm.update_document("first", [TEXTS[0], "One more."], policy="reuse")
    behind = [entry for entry in llm.store.entries() if len(entry.chunks) == 2]
    assert [len(entry.documents) for entry in behind] == [2]
    llm.delete(document="first")
    assert not [entry for entry in llm.store.entries() if len(entry.chunks) == 2]


def test_a_document_id_is_in_no_entry_and_other_tenants_are_left_alone(tmp_path):
    mine = wrapped(store=f"disk://{tmp_path}/kv?sync=no", tenant="mine")
    theirs = wrapped(mine.model, store=mine.store, tenant="theirs")
    for llm in (mine, theirs):
        llm.precompute(TEXTS, documents=["guide-of-acme"] * 3)
    held = len(list(mine.store.entries()))
    assert mine.delete(tenant=True) == held / 2
    assert len(list(mine.store.entries())) == held / 2
    assert not mine.prefill(QUESTION, TEXTS).stats.hits
    assert theirs.prefill(QUESTION, TEXTS).stats.hits == 3
    for path in (tmp_path / "kv").rglob("*"):
        assert not path.is_file() or b"acme" not in path.read_bytes()


def test_a_chunk_warmed_without_a_document_learns_of_it(tmp_path):
    llm = from_disk(tmp_path)
    assert llm.precompute(TEXTS, documents=["a", "a", "b"]).computed == 0
    assert llm.delete(document="b") == 1
    assert llm.prefill(QUESTION, TEXTS).stats.misses == 1


def test_forgetting_texts_makes_them_unfindable_too(tmp_path):
    llm = from_disk(tmp_path)
    prompt = llm.prepare_inputs(QUESTION, TEXTS)["input_ids"]
    assert llm.delete(texts=TEXTS[:2]) == 2
    with llm.attached():
        llm.model.generate(prompt, pad_token_id=3, **GREEDY)
        assert (llm.last_stats.hits, llm.last_stats.misses) == (2, 0)  # the prefix is found as well
