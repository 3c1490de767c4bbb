"""A comparison of stores has a row per prompt and store, and leaves nothing behind in them."""

from __future__ import annotations

import pytest
from support.llm import QUESTION, TEXTS, chat_tokenizer, tiny_model, wrapped
from support.redis import Valkey

from chunkcache.eval import Case
from chunkcache.eval.stores import MEMORY, bench_stores
from chunkcache.store import open_store

CASES = [Case(QUESTION, TEXTS), Case("Who wrote down the weather?", TEXTS[::-1])]


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    server = Valkey()
    yield [
        f"disk://{folder}/raw",
        f"disk://{folder}/int4?codec=int4",
        f"tiered:memory://|disk://{folder}/t",
        server.url,
    ]
    server.close()


@pytest.fixture(scope="module")
def measured(urls):
    stores = {url: open_store(url) for url in urls}
    kept = wrapped(tiny_model(), store=stores[urls[0]])
    kept.precompute(TEXTS[:1])
    held = len(list(stores[urls[0]].entries()))
    bench = bench_stores(tiny_model(), chat_tokenizer(), CASES, stores, "query")
    assert [len(list(store.entries())) for store in stores.values()] == [held, 0, 0, 0]
    for store in stores.values():
        store.close()
    return bench


def test_every_store_has_a_row_for_every_prompt(measured, urls):
    assert [(row.prompt, row.store) for row in measured.rows] == [(i, url) for i in (0, 1) for url in (MEMORY, *urls)]
    assert [(s["store"], s["chunks"], s["prompts"]) for s in measured.summaries()] == [
        (u, 3, 2) for u in (MEMORY, *urls)
    ]


def test_ratios_are_to_memory_and_nothing_is_lost(measured):
    for row in measured.rows:
        assert row.lost == 0
        assert row.ttft_s > 0
        if row.store == MEMORY:
            assert (row.ttft_ratio, row.kl_memory, row.cold_ttft_s) == (1.0, 0.0, None)
        else:
            assert min(row.put_s, row.get_s, row.floor_put_s, row.floor_get_s) > 0
        assert (row.cold_ttft_s is not None) == ("disk" in row.store)


def test_only_fewer_bits_change_the_answer_and_the_bytes(measured, urls):
    sizes = {row.store: row.nbytes for row in measured.rows[:5]}
    for row in measured.rows:
        assert (abs(row.kl_memory) > 1e-6) == ("int4" in row.store)
    assert sizes[urls[1]] < sizes[urls[0]] / 2
    assert sizes[urls[0]] == sizes[urls[2]] == sizes[urls[3]] == sizes[MEMORY]


def test_it_goes_into_json(measured):
    as_dict = measured.as_dict()
    assert len(as_dict["rows"]) == 10
    assert {"store", "get_of_floor", "ttft_ratio", "kl_memory"} <= as_dict["summary"][0].keys()
