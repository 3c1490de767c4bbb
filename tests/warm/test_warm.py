"""Warming a store: all of a folder in it, nothing computed twice, nothing stale left, by one worker or by several."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import sys
import time
from dataclasses import replace

import pytest
from support.llm import chat_tokenizer, saved_model, tiny_model

import chunkcache
from chunkcache import warm
from chunkcache.cli.console import Bar
from chunkcache.errors import InputError, ModelNotFoundError
from chunkcache.kv import chunk_name, hashed_label
from chunkcache.retriever import Chunk, load_documents, split
from chunkcache.store import DiskStore, EntryFilter
from chunkcache.store.encryption import new_key
from chunkcache.store.entry import ENCRYPTED, MAGIC
from chunkcache.warm import Shard, WarmConfig, local_pool
from chunkcache.warm import ray as warm_ray
from chunkcache.warm.ray import ray_pool

SENTENCES = {
    "bridge": "The bridge over the river was opened to the public in {}, after nine years of work by many people. ",
    "ferry": "In winter the ferry number {} sails only when the sea is calm, and the bread is of yesterday. ",
    "keeper": "The lighthouse keeper wrote down the weather every morning and every evening of the year {}. ",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, sentence in SENTENCES.items():
        write(folder, name, "".join(sentence.format(1900 + year) for year in range(8)))
    return folder


@pytest.fixture
def config(model, tmp_path):
    return WarmConfig(model, f"disk://{tmp_path / 'kv'}?sync=no", chunk_tokens=48)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(warm, "SHARD_TEXTS", 2)


def write(folder, name, text):
    (folder / f"{name}.md").write_text(text)


def run(config, docs, on_progress=None):
    with local_pool(config) as pool:
        return warm.warm(config, load_documents(docs), pool, on_progress)


def pieces(config, docs):
    """What the documents are cut into, by document."""
    return {
        d.id: [c.text.strip() for c in split(d, chat_tokenizer(), size=config.chunk_tokens)]
        for d in load_documents(docs)
    }


def entries(config, document=None):
    with DiskStore(config.store.removeprefix("disk://").partition("?")[0], sync="no") as store:
        return list(store.entries(EntryFilter(document=hashed_label("document", document) if document else None)))


def test_all_of_a_folder_is_stored_and_found_by_requests(config, docs):
    seen = []
    done = run(config, docs, lambda *progress: seen.append(progress))
    cut = pieces(config, docs)
    count = sum(map(len, cut.values()))
    assert count > 12
    assert (done.documents, done.chunks, done.computed, done.skipped, done.deleted) == (3, count, count, 0, 0)
    assert (done.failures, done.workers, done.lost_workers) == (0, 1, 0)
    assert seen == sorted(seen)
    assert seen[-1] == (count, count)
    assert done.nbytes == sum(entry.nbytes for entry in entries(config))
    for document, texts in cut.items():
        assert len(entries(config, document)) == len(texts)
    llm = chunkcache.wrap(tiny_model(), chat_tokenizer(), store=config.store)
    stats = llm.generate("When was it opened?", cut["bridge.md"][:3], max_new_tokens=2).stats
    assert (stats.hits, stats.misses) == (3, 0)


def test_chunks_are_computed_behind_their_nearest(config, docs):
    config, seen = replace(config, lead="neighbours"), []
    done = run(config, docs, lambda *progress: seen.append(progress))
    cut = pieces(config, docs)
    count = sum(map(len, cut.values()))
    assert (done.chunks, done.computed, done.skipped, done.deleted) == (count, count, 0, 0)
    assert count * 0.6 < done.near <= count
    assert seen == sorted(seen)
    assert seen[-1] == (count, count)
    again = run(config, docs)
    assert (again.computed, again.near, again.deleted) == (0, 0, 0)
    llm = chunkcache.wrap(tiny_model(), chat_tokenizer(), store=config.store)
    stats = llm.generate("When was it opened?", cut["bridge.md"][:3], max_new_tokens=2).stats
    assert (stats.hits, stats.misses) == (3, 0)


def test_after_an_edit_nothing_is_left_that_was_computed_behind_what_went(config, docs):
    config = replace(config, lead="neighbours")
    run(config, docs)
    tokens = chunkcache.wrap(tiny_model(), chat_tokenizer(), store="memory://").prompts.chunk
    old = {chunk_name(tokens(text)) for text in pieces(config, docs)["ferry.md"]}
    assert any(old.intersection(entry.chunks[1:]) for entry in entries(config))
    write(docs, "ferry", "It was sold.")
    done = run(config, docs)
    assert done.deleted >= len(old)
    assert not any(old.intersection(entry.chunks) for entry in entries(config))
    texts = {text for cut in pieces(config, docs).values() for text in cut}
    assert {entry.chunks[0] for entry in entries(config) if entry.documents} == {chunk_name(tokens(t)) for t in texts}
    assert run(config, docs).computed == 0


def test_chunks_over_the_context_are_left_out_and_counted(config, docs):
    write(docs, "long", "<s>the sea is calm</s> " * 120)
    config = replace(config, chunk_tokens=2000)
    report = run(config, docs)
    assert (report.chunks, report.computed, report.too_long, report.skipped) == (4, 3, 1, 0)
    write(docs, "long", "<s>the sea is rough</s> " * 110)
    report = run(config, docs)
    assert (report.computed, report.too_long, report.skipped) == (0, 1, 3)


def test_what_is_stored_is_not_computed_again(config, docs):
    first = run(config, docs)
    before = {entry.key: entry.created for entry in entries(config)}
    again = run(config, docs)
    assert (again.chunks, again.computed, again.skipped, again.nbytes) == (first.chunks, 0, first.chunks, 0)
    assert {entry.key: entry.created for entry in entries(config)} == before


def test_after_an_edit_only_what_changed_is_computed_and_what_went_is_deleted(config, docs):
    run(config, docs)
    old = pieces(config, docs)["ferry.md"]
    write(docs, "ferry", (docs / "ferry.md").read_text() + "A last sentence was added on a Tuesday in the spring.")
    new = pieces(config, docs)["ferry.md"]
    done = run(config, docs)
    assert done.computed == len(set(new) - set(old)) < len(new)
    assert done.deleted == len(set(old) - set(new))
    assert len(entries(config, "ferry.md")) == len(new)
    write(docs, "ferry", "It was sold.")
    assert run(config, docs).deleted == len(new)
    assert len(entries(config, "ferry.md")) == 1


def test_a_chunk_that_only_one_of_its_documents_loses_stays(config, docs):
    shared = "The answer is in the second paragraph of the document, which nobody has read since 1931."
    write(docs, "keeper", shared)
    write(docs, "ferry", shared)
    done = run(config, docs)
    assert done.chunks == len(pieces(config, docs)["bridge.md"]) + 1
    [entry] = entries(config, "keeper.md")
    assert set(entry.documents) == {hashed_label("document", "ferry.md"), hashed_label("document", "keeper.md")}
    write(docs, "keeper", "Now it says something else.")
    run(config, docs)
    assert [e.documents for e in entries(config, "ferry.md")] == [(hashed_label("document", "ferry.md"),)]
    assert len(entries(config, "keeper.md")) == 1
    assert run(config, docs).computed == 0


def test_documents_and_tenants_do_not_touch_one_another(config, docs):
    run(config, docs)
    count = len(entries(config))
    other = run(replace(config, tenant="acme"), docs)
    assert other.skipped == 0
    write(docs, "ferry", "Short.")
    run(replace(config, tenant="acme"), docs)
    left = [entry for entry in entries(config) if not entry.tenant]
    assert len(left) == count


def test_bad_input_shows_when_the_pool_is_opened(config, tmp_path):
    with pytest.raises(InputError, match="is gone when this ends"), local_pool(replace(config, store="memory://")):
        pass
    with pytest.raises(ModelNotFoundError), local_pool(replace(config, model=str(tmp_path / "no/model"))):
        pass


def test_tiers_in_memory_are_left_out(config, docs):
    folder = config.store
    config = replace(config, store=f"tiered:?write=evict|memory://|{folder}")
    done = run(config, docs)
    assert len(entries(replace(config, store=folder))) == done.chunks + 1  # and the prefix


def test_a_store_that_is_too_small_says_so(config, docs):
    done = run(replace(config, store=config.store + "&max_bytes=100KiB"), docs)
    assert done.store["evictions"] + done.failures > 0


def test_shards_keep_all_documents_of_a_text_together(monkeypatch):
    monkeypatch.setattr(warm, "SHARD_TOKENS", 100)
    chunks = [Chunk("a", 0, "x", 60), Chunk("a", 1, "y", 30), Chunk("b", 0, "z", 20), Chunk("c", 0, "x", 60)]
    assert list(warm._shards(chunks)) == [Shard({"x": ["a", "c"], "y": ["a"]}), Shard({"z": ["b"]})]
    assert list(warm._shards([Chunk("a", 0, "x", 500)])) == [Shard({"x": ["a"]})]
    assert list(warm._shards([])) == []


def test_the_command_reports_what_it_did(config, docs, command_line):
    args = ("store", "warm", str(docs), "--model", config.model, "--chunk-tokens", "48", "--store", config.store)
    count = sum(map(len, pieces(config, docs).values()))
    for computed in (count, 0):
        code, out, _ = command_line(*args, "--json")
        facts = json.loads(out)
        assert code == 0
        assert (facts["chunks"], facts["computed"], facts["skipped"]) == (count, computed, count - computed)
    code, _, err = command_line(*args)
    assert code == 0
    assert f"{count} chunks of 3 documents: {count} were stored already, 0 computed" in err


def test_an_interrupted_run_goes_on_where_it_was(config, docs, command_line, monkeypatch):
    """A real SIGINT, as soon as five chunks are stored."""
    show = Bar.__call__

    def interrupt(bar, done, total):
        show(bar, done, total)
        if done >= 5:
            signal.raise_signal(signal.SIGINT)

    args = ("store", "warm", str(docs), "--model", config.model, "--chunk-tokens", "48", "--store", config.store)
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Bar, "__call__", interrupt)
            code, out, err = command_line(*args, "--json")
    finally:
        signal.signal(signal.SIGINT, heeded)
    assert (code, out) == (130, "")
    assert "interrupted: what was computed is stored" in err
    kept = {entry.key for entry in entries(config)}
    assert len(kept) >= 5
    code, out, err = command_line(*args, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert 0 < facts["computed"] < facts["chunks"]
    assert facts["skipped"] >= len(kept) - 1  # the prefix is no chunk
    assert kept <= {entry.key for entry in entries(config)}


def test_what_has_expired_is_computed_again(config, docs, monkeypatch):
    config = replace(config, store=config.store + "&ttl=60")
    first = run(config, docs)
    again = run(config, docs)
    assert (again.computed, again.skipped) == (0, first.chunks)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 61)
    later = run(config, docs)
    assert (later.computed, later.skipped) == (first.chunks, 0)
    llm = chunkcache.wrap(tiny_model(), chat_tokenizer(), store=config.store)
    stats = llm.generate("When was it opened?", pieces(config, docs)["bridge.md"][:3], max_new_tokens=2).stats
    assert (stats.hits, stats.misses) == (3, 0)


# --- on a cluster of this machine


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster for two workers; its own start takes seconds."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def on_cluster(cluster):
    def call(config, docs, on_progress=None, **options):
        with ray_pool(config, "local", cpus=1, **options) as pool:
            return warm.warm(config, load_documents(docs), pool, on_progress)

    return call


def test_two_workers_store_what_one_would_with_the_same_secret_and_keys(config, docs, on_cluster, monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_SECRET", "s")
    if importlib.util.find_spec("cryptography") is not None:
        monkeypatch.setenv("CHUNKCACHE_ENCRYPTION_KEYS", new_key("one"))
    seen = []
    done = on_cluster(config, docs, lambda *progress: seen.append(progress), workers=2)
    count = sum(map(len, pieces(config, docs).values()))
    assert (done.chunks, done.computed, done.workers, done.lost_workers, done.failures) == (count, count, 2, 0, 0)
    assert seen[-1] == (count, count)
    local_config = replace(config, store=config.store.replace("/kv", "/kv2"))
    run(local_config, docs)
    assert {e.key for e in entries(config)} == {e.key for e in entries(local_config)}
    write(docs, "ferry", "It was sold.")
    again = run(config, docs)
    assert again.computed == 1
    assert again.deleted == len(entries(local_config, "ferry.md"))
    starts = {path.read_bytes()[:8] for path in docs.parent.rglob("*.ckv")}
    assert starts == {ENCRYPTED if os.environ.get("CHUNKCACHE_ENCRYPTION_KEYS") else MAGIC}


def test_the_work_of_a_worker_that_dies_goes_to_another(config, docs, on_cluster, caplog):
    caplog.set_level("INFO", "chunkcache")
    for number in range(10):
        write(docs, f"more{number}", "".join(SENTENCES["ferry"].format(number * 100 + n) for n in range(10)))
    killed = []

    def kill_one(done, total):
        if not killed:
            killed.append(int(re.findall(r"a worker is process (\d+)", caplog.text)[0]))
            os.kill(killed[0], signal.SIGKILL)

    done = on_cluster(config, docs, kill_one, workers=2)
    assert (done.workers, done.lost_workers) == (2, 1)
    assert "its work goes to another" in caplog.text
    for document, texts in pieces(config, docs).items():
        assert len(entries(config, document)) == len(texts)


def test_what_a_worker_raises_is_what_the_caller_sees(config, docs, on_cluster, tmp_path):
    with pytest.raises(ModelNotFoundError, match="No model can be loaded"):
        on_cluster(replace(config, model=str(tmp_path / "no/model")), docs)
    with pytest.raises(InputError, match="do not fit the Ray cluster, which has 2 CPUs"):
        on_cluster(config, docs, workers=3)


def test_a_cluster_that_does_not_answer_is_bad_input(config):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(InputError, match=f"there is no Ray cluster at '{address}'"):
        warm_ray._connect(warm_ray._import_ray(), address, None)


def test_without_ray_installed_it_says_what_to_install(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "chunkcache\[ray\]"'), ray_pool(config, "local"):
        pass
