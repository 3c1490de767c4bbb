"""A comparison of stores has a row per prompt and store, and leaves nothing behind in them."""

from __future__ import annotations

import pytest
from helpers_redis import Valkey
from support.llm import QUESTION, TEXTS, chat_tokenizer, tiny_model, wrapped

from chunkcache.eval import Case, Results
from chunkcache.eval.stores import BENCH, MEMORY, bench_stores, summary
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
        f"tiered:memory://|{server.url}",
    ]
    server.close()


@pytest.fixture(scope="module")
def measured(urls):
    stores = {url: open_store(url) for url in urls}
    kept = wrapped(tiny_model(), store=stores[urls[0]])
    kept.precompute(TEXTS[:1])
    held = len(list(stores[urls[0]].entries()))
    results = bench_stores(Results(BENCH, {}, {}), tiny_model(), chat_tokenizer(), CASES, stores, "query")
    assert [len(list(store.entries())) for store in stores.values()] == [held, 0, 0, 0, 0]
    for store in stores.values():
        store.close()
    return results


def test_every_store_has_a_row_for_every_prompt(measured, urls):
    names = (MEMORY, *urls)
    assert [(row["prompt"], row["store"]) for row in measured.rows] == [(i, url) for i in (0, 1) for url in names]
    sums = summary(measured)["stores"]
    assert [(each["store"], each["chunks"], each["prompts"]) for each in sums] == [(url, 3, 2) for url in names]


def test_ratios_are_to_memory_and_nothing_is_lost(measured):
    for row in measured.rows:
        assert row["lost"] == 0
        assert row["ttft_s"] > 0
        if row["store"] == MEMORY:
            assert (row["ttft_ratio"], row["kl_memory"], row["cold_ttft_s"]) == (1.0, 0.0, None)
        else:
            assert min(row["put_s"], row["get_s"], row["floor_put_s"], row["floor_get_s"]) > 0
        assert (row["cold_ttft_s"] is not None) == ("disk" in row["store"])


def test_only_fewer_bits_change_the_answer_and_the_bytes(measured, urls):
    sizes = {row["store"]: row["nbytes"] for row in measured.rows[:5]}
    for row in measured.rows:
        assert (abs(row["kl_memory"]) > 1e-6) == ("int4" in row["store"])
    assert sizes[urls[1]] < sizes[urls[0]] / 2
    assert sizes[urls[0]] == sizes[urls[2]] == sizes[urls[3]] == sizes[MEMORY]


def test_tables_have_a_row_for_each_store(measured, urls):
    for each in summary(measured)["tables"]:
        assert [row[0] for row in each["rows"]] == [MEMORY, *urls]
    [memory, *_] = summary(measured)["tables"][1]["rows"]
    assert memory[3:5] == ["1.000", "n/a"]  # no disk, no cold request


def test_what_is_measured_already_is_left_alone():
    stores = {"memory://?codec=int8": open_store("memory://?codec=int8")}
    results = bench_stores(Results(BENCH, {}, {}), tiny_model(), chat_tokenizer(), CASES, stores, "query")
    first, lost = list(results.rows), results.rows.pop()
    assert bench_stores(results, tiny_model(), chat_tokenizer(), CASES, stores, "query") is results
    assert results.rows[:3] == first[:3]
    assert [(row["prompt"], row["store"]) for row in results.rows[3:]] == [(1, MEMORY), (1, lost["store"])]
    assert [each["prompts"] for each in summary(results)["stores"]] == [2, 2]


def test_rows_hold_no_password():
    server = Valkey()
    server.config(requirepass="not-told")
    url = server.url.replace("//", "//:not-told@")
    with open_store(url) as store:
        results = bench_stores(
            Results(BENCH, {}, {}), tiny_model(), chat_tokenizer(), CASES[:1], {url: store}, "query"
        )
    server.close()
    assert results.rows[1]["store"] == url.replace("not-told", "***")
    assert results.rows[1]["floor_get_s"] > 0
