"""Stores as text: URLs, several tiers, TOML files; every mistake named with its way out, and no password shown."""

from __future__ import annotations

import inspect
import pkgutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.store import in_new_interpreter

from chunkcache.errors import InputError, StoreURLError
from chunkcache.store import TIERS, DeviceStore, DiskStore, MemoryStore, TieredStore, open_store, parse_bytes
from chunkcache.store import url as module
from chunkcache.store.url import redacted


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 2**20),
        ("1", 1),
        ("2GiB", 2**31),
        ("2gib", 2**31),
        ("500MB", 500_000_000),
        ("500 MB", 500_000_000),
        (" 1.5 KiB ", 1536),
        ("0.5kB", 500),
        ("3 TiB", 3 * 2**40),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "0GiB", "0.1", "-1", "-2GiB", "2XB", "GiB", "two", "1e9", "1,5GB", "1.GB", "2GiB2", "nan", "1G"]
)
def test_what_is_no_positive_size_is_refused(text):
    with pytest.raises(StoreURLError, match=r"is not a size in bytes; write for example 2GiB, 500MB or 1048576"):
        parse_bytes(text)


@given(st.integers(1, 10**16))
def test_a_number_of_bytes_is_taken_to_the_byte(size):
    assert parse_bytes(str(size)) == size


@pytest.mark.parametrize(
    ("url", "tier"),
    [
        ("memory://", MemoryStore),
        ("MEMORY://?max_bytes=2GiB", MemoryStore),
        ("device://?device=cpu", DeviceStore),
        ("disk://{}/store?sync=no", DiskStore),
        ("tiered:memory://", TieredStore),
    ],
)
def test_every_tier_that_needs_no_server_opens_by_its_url(url, tier, tmp_path):
    with open_store(url.format(tmp_path)) as store:
        assert type(store) is tier


def test_options_reach_the_constructor(tmp_path):
    assert open_store("memory://").stats().max_bytes is None
    assert open_store("memory://?max_bytes=500%20MB").stats().max_bytes == 500_000_000
    options = "max_bytes=1KiB&evict=lfu&admit=frequent&tenant_bytes=100&codec=int8&compress=zstd&ttl=1.5&secret=s"
    with open_store(f"disk://{tmp_path}/a%20b?{options}&sync=no") as store:
        assert store.folder == tmp_path / "a b"
        assert (store.stats().max_bytes, store.budget.ttl, store.secret, store._sync) == (1024, 1.5, b"s", False)
        assert (store.budget.tenant_bytes, store.budget.admit) == (100, "frequent")


def test_a_folder_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with DiskStore("~/kv") as store:
        assert store.folder == tmp_path / "kv"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", r"no store has the URL ''; the known ones are device://, memory://, disk://, .* and tiered:"),
        ("memory", r"no store has the URL 'memory'"),
        ("tmp://x", r"no store has the URL 'tmp://x'"),
        ("memory://[", r"'memory://\[' is not a URL; write for example memory://\?max_bytes=2GiB"),
        ("memory:///tmp", r"'memory:///tmp' has parts that memory:// does not take; write memory://\?max_bytes=2GiB"),
        ("memory://host", r"has parts that memory:// does not take"),
        ("memory://#x", r"has parts that memory:// does not take"),
        ("disk://tmp", r"'disk://tmp' has parts that disk:// does not take; write disk:///folder\?max_bytes=2GiB"),
        ("disk://", r"'disk://' names no folder; write for example disk:///var/cache/kv"),
        ("disk:///tmp/x?path=/y", r"disk:// has no option 'path'"),
        ("memory://?evict=fifo", r"evict='fifo' is none of lru, lfu, cost"),
        ("memory://?admit=some", r"admit='some' is neither 'frequent' nor 'all'"),
        ("memory://?codec=int2", r"codec='int2' is none of raw, bf16, fp16, int8, int4"),
        (
            "memory://?max_byte=2GiB",
            r"memory:// has no option 'max_byte'; it takes max_bytes, evict, .* \(in 'memory://",
        ),
        ("memory://?max_bytes=", r"'' is not a size in bytes"),
        ("memory://?max_bytes", r"'' is not a size in bytes"),
        ("memory://?max_bytes=lots", r"'lots' is not a size in bytes"),
        ("memory://?max_bytes=0", r"'0' is not a size in bytes"),
        ("memory://?max_bytes=1GiB&max_bytes=2GiB", r"max_bytes is given twice in 'memory://"),
        ("memory://?ttl=soon", r"ttl='soon' is not a number \(of seconds\)"),
        ("memory://?ttl=0", r"ttl=0.0 is no time to live"),
        ("memory://?ttl=nan", r"ttl=nan is no time to live"),
        ("disk:///proc/nowhere/x", r"/proc/nowhere/x cannot be used as a store .*; pass another folder"),
        ("disk:///tmp/x?compress=gzip", r"compress='gzip' is neither 'none' nor 'zstd'"),
        ("device://?device=nothing", r"device='nothing' cannot be used"),
    ],
)
def test_every_mistake_is_named_with_the_way_out(url, message):
    with pytest.raises(StoreURLError, match=message) as caught:
        open_store(url)
    assert isinstance(caught.value, InputError)


def test_every_option_of_every_tier_has_a_default():
    for tier in map(pkgutil.resolve_name, TIERS.values()):
        parameters = inspect.signature(tier).parameters.values()
        assert all(p.default is not p.empty for p in parameters if p.name != "path")


# Several tiers


def test_tiers_are_opened_in_their_order(tmp_path):
    with open_store(f"tiered:?write=evict&queue=3|memory://?max_bytes=2GiB|disk://{tmp_path}?sync=no") as store:
        assert list(store.tiers()) == ["memory", "disk"]
        assert store.tiers()["memory"].stats().max_bytes == 2**31
        assert not store._through


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("tiered:", r"no store has the URL ''"),
        ("tiered:memory://|", r"no store has the URL ''"),
        ("tiered:?write=through", r"needs at least one tier"),
        ("tiered:?write=up|memory://", r"write='up' is neither 'through' nor 'evict'"),
        ("tiered:?queues=3|memory://", r"tiered:// has no option 'queues'; it takes write, queue"),
        ("tiered:?tiers=3|memory://", r"tiered:// has no option 'tiers'"),
        ("tiered:?queue=none|memory://", r"queue='none' is not a whole number"),
        ("tiered:?queue=2KiB|memory://", r"queue='2KiB' is not a whole number"),
        ("tiered:?queue=0|memory://", r"queue=0 holds nothing"),
        ("tiered:memory://|tiered:memory://", r"no store has the URL 'tiered:memory://'"),
        ("tiered:memory://|memory://?ttl=x", r"ttl='x' is not a number"),
    ],
)
def test_mistakes_in_several_tiers_are_named(url, message):
    with pytest.raises(StoreURLError, match=message):
        open_store(url)


def test_if_one_tier_cannot_be_opened_the_others_are_closed():
    closed = []

    class Closing(MemoryStore):
        def close(self):
            closed.append(self)

    with pytest.raises(StoreURLError, match="evict='x'"):
        module.open_store("tiered:a://|a://|a://?evict=x", {"a": Closing}, TieredStore)
    assert len(closed) == 2
    with pytest.raises(StoreURLError, match="write='x'"):
        module.open_store("tiered:?write=x|a://", {"a": Closing}, TieredStore)
    assert len(closed) == 3


# Files


def test_a_file_may_describe_the_store(tmp_path):
    file = tmp_path / "store.toml"
    file.write_text(
        f"""
        [store]
        write = "evict"
        queue = 5

        [[store.tiers]]
        url = "memory://?evict=lfu"
        max_bytes = "1KiB"
        ttl = 60

        [[store.tiers]]
        url = "disk://{tmp_path}/kv"
        max_bytes = 4096
        sync = "no"
        """
    )
    with open_store(str(file)) as store:
        memory, disk = store.tiers().values()
        assert (memory.stats().max_bytes, memory.budget.ttl, disk.stats().max_bytes) == (1024, 60.0, 4096)
        assert not store._through


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not describe a store .*it needs \\[store\\] and, for each tier, \\[\\[store.tiers\\]\\]"),
        ("[store]", "does not describe a store"),
        ("store = 3", "does not describe a store"),
        ("[store\n", "does not describe a store"),
        ("[[store.tiers]]\nurls = 'memory://'", "does not describe a store"),
        ("[store]\ntiers = [1]", "does not describe a store"),
        ("[store]\ntiers = []", "needs at least one tier"),
        ("[[store.tiers]]\nurl = 'memory://'\nmax_byte = 3", "memory:// has no option 'max_byte'"),
        ("[[store.tiers]]\nurl = 'memory://'\nttl = [1]", "ttl=\\[1\\] is not a number"),
        ("[[store.tiers]]\nurl = 'memory://'\nmax_bytes = -3", "'-3' is not a size"),
        ("[[store.tiers]]\nurl = 3", "no store has the URL '3'"),
        ("[store]\nrite = 'evict'\n[[store.tiers]]\nurl = 'memory://'", "tiered:// has no option 'rite'"),
    ],
)
def test_a_file_that_describes_none_is_refused(text, message, tmp_path):
    file = tmp_path / "store.toml"
    file.write_text(text)
    with pytest.raises(StoreURLError, match=message):
        open_store(str(file))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(StoreURLError, match=r"nowhere.toml cannot be read \(No such file or directory\)"):
        open_store(str(tmp_path / "nowhere.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(StoreURLError, match="does not describe a store"):
        open_store(str(tmp_path / "binary.toml"))


# Passwords


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://user:hunter2@host:6379/0", "redis://user:***@host:6379/0"),
        ("redis://:hunter2@host", "redis://:***@host"),
        ("redis://user:hun/ter@2:x@host", "redis://user:***@host"),
        ("redis://host:6379?x=1", "redis://host:6379?x=1"),
        ("disk:///a?secret=hunter2&sync=no", "disk:///a?secret=***&sync=no"),
        ("tiered:redis://:hunter2@a|redis://:hunter2@b", "tiered:redis://:***@a|redis://:***@b"),
        ("disk:///home/me@work/kv", "disk:///home/me@work/kv"),
        ("memory://?max_bytes=2GiB", "memory://?max_bytes=2GiB"),
    ],
)
def test_what_is_shown_has_no_password(url, expected):
    assert redacted(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@host?nothing=1",
        "redis://:hunter2@host:port",
        "redis://:hunter2@[",
        "nothing://user:hunter2@host",
        "memory://user:hunter2@host",
        "disk:///x?secret=hunter2&nothing=1",
        "disk:///x?secret=hunter2&sync=no&sync=no",
        "disk://host/x?secret=hunter2",
        "tiered:memory://|redis://:hunter2@host?nothing=1",
        "tiered:?write=x&write=y|redis://:hunter2@host",
        "tiered:?x=y|redis://:hunter2@host",
    ],
)
def test_no_message_names_a_password(url):
    with pytest.raises(StoreURLError) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


LAZY = """
    from chunkcache.store import open_store

    def imported():
        return {name for name in sys.modules if name == "redis" or name.startswith("chunkcache.store.")}

    needless = {"redis", *(f"chunkcache.store.{name}" for name in ("redis", "redis_cluster", "lmcache", "hints"))}
    with open_store("tiered:memory://|disk://" + sys.argv[1]):
        assert not imported() & needless, imported()
    open_store("redis://").close()
    assert imported() & needless == {"redis", "chunkcache.store.redis"}, imported()
    open_store("redis+cluster://").close()
    assert "chunkcache.store.redis_cluster" in imported()
"""


def test_nothing_of_a_tier_is_imported_before_it_is_opened(tmp_path):
    in_new_interpreter(LAZY, tmp_path)
