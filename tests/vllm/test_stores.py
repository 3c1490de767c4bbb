"""Whose chunks are used: a tenant's own, of one trust label; and a disk that answers late holds up nobody."""

from __future__ import annotations

import threading
import time

import pytest
from support.vllm_engine import (
    ask,
    counted,
    drain,
    engine,
    figures,
    finish,
    generation,
    ids_of,
    made_prompt,
    sides,
)

from chunkcache.kv import hashed_label, in_a_row

POLICY = "link:k=4"
NEAR = "query:ratio=0.1,lead=64"  # a policy that takes chunks as computed behind their neighbours


@pytest.fixture(scope="module")
def llm(folders, tmp_path_factory):
    """An engine of a tenant on a disk that another tenant has warmed."""
    store, prompt = f"disk://{tmp_path_factory.mktemp('kv')}", made_prompt(1, pool=1)
    with engine(folders("llama"), store, extra={"tenant": "one", "share": False}) as llm:
        assert figures(ask(llm, (prompt, POLICY), warm=True)[0])["hits"] == 4
        drain(llm)
    extra = {"tenant": "two", "trust": "mine", "share": False, "lookup_s": 30.0}
    with engine(folders("llama"), store, extra=extra) as llm:
        yield llm


def test_another_tenants_chunks_are_not_used(llm, reference):
    prompt = made_prompt(1, pool=1)
    (output,) = ask(llm, (prompt, POLICY))
    assert figures(output) is None
    assert ids_of(output) == reference.answer(prompt, "full")
    drain(llm)
    (own,) = ask(llm, (prompt, POLICY))
    assert figures(own)["hits"] == 4
    assert ids_of(own) == reference.answer(prompt, POLICY)


def test_kv_that_were_computed_behind_a_chunk_of_another_label_are_not_used(llm, reference):
    prompt = made_prompt(2, pool=2)
    ask(llm, (prompt, NEAR), warm=True)
    library = sides(llm)[1]._working._served.library
    foreign, chunk = made_prompt(3, pool=3).chunks[0], prompt.chunks[-1]
    prefix = library.get_prefix(prompt.prefix)
    (behind,) = library._encoder.encode(prefix, [foreign])
    near = library.ref_near(chunk, prompt.prefix)
    library.compute_behind([near], prefix, in_a_row(library.with_origin(behind)), time.time())
    library.flush()
    assert library.holds(near)
    (output,) = ask(llm, (prompt, NEAR))
    assert ids_of(output) == reference.answer(prompt, NEAR)
    library.registry.add(library.ref(foreign, ()), trust=hashed_label("trust", "mine"))
    (trusting,) = ask(llm, (prompt, NEAR))
    assert figures(trusting)["hits"] == 4
    assert ids_of(trusting) != ids_of(output)


def test_a_disk_that_answers_late_holds_up_nobody(llm, reference, monkeypatch):
    stored, other = made_prompt(4, pool=4), made_prompt(5, pool=5)
    ask(llm, (stored, POLICY), warm=True)
    working, scheduling = sides(llm)[1]._working, sides(llm)[0]._scheduling
    find, may = working._find, threading.Event()

    def late(lookup):
        assert may.wait(60)
        return find(lookup)

    monkeypatch.setattr(working, "_find", late)
    (leaving,) = llm.enqueue(*generation(stored, POLICY), use_tqdm=False)
    llm.enqueue(*generation(stored, POLICY), use_tqdm=False)
    (plain,) = llm.enqueue(*generation(other, False), use_tqdm=False)
    answered = []
    while not answered:
        answered += [output for output in llm.llm_engine.step() if output.finished]
    assert answered[0].request_id.split("-")[0] == plain.split("-")[0]
    assert ids_of(answered[0]) == reference.answer(other, "full")
    assert len(working._reading) == 2
    llm.llm_engine.abort_request([leaving], internal=True)
    llm.llm_engine.step()
    assert len(working._reading) == 1
    may.set()
    before = counted(llm)
    (output,) = finish(llm)
    assert ids_of(output) == reference.answer(stored, POLICY)
    drain(llm)
    assert not any((working._reading, working._found, scheduling._looking, scheduling._requests))
    placed = counted(llm)["chunkcache_tier_tokens", "disk"] - before["chunkcache_tier_tokens", "disk"]
    assert placed == figures(output)["placed"] == output.num_cached_tokens
    assert counted(llm)["prompt_tokens_cached_by_source", "disk"] >= placed
