"""Store URLs: sizes, options, and every mistake named with its way out."""

from __future__ import annotations

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.errors import InputError, StoreURLError
from chunkcache.store import TIERS, MemoryStore, open_store, parse_bytes


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


@pytest.mark.parametrize("scheme", TIERS)
def test_every_tier_opens_by_its_scheme_alone(scheme):
    with open_store(f"{scheme}://") as store:
        assert type(store) is TIERS[scheme]


def test_options_reach_the_constructor():
    store = open_store("memory://?max_bytes=2GiB")
    assert isinstance(store, MemoryStore)
    assert store.stats().max_bytes == 2**31
    assert open_store("memory://").stats().max_bytes is None
    assert open_store("MEMORY://?max_bytes=500%20MB").stats().max_bytes == 500_000_000


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", r"no store has the URL ''; the known ones are memory://"),
        ("memory", r"no store has the URL 'memory'"),
        ("disk://tmp", r"no store has the URL 'disk://tmp'; the known ones are memory://"),
        ("memory:///tmp", r"memory:// takes only options, as in memory://\?max_bytes=2GiB: 'memory:///tmp'"),
        ("memory://host", r"memory:// takes only options"),
        ("memory://?evict=fifo", r"evict='fifo' is neither 'lru' nor 'worth'"),
        ("memory://?max_byte=2GiB", r"memory:// has no option 'max_byte'; it takes max_bytes, evict \(in 'memory://"),
        ("memory://?max_bytes=", r"'' is not a size in bytes"),
        ("memory://?max_bytes=lots", r"'lots' is not a size in bytes"),
        ("memory://?max_bytes=0", r"'0' is not a size in bytes"),
    ],
)
def test_every_mistake_is_named_with_the_way_out(url, message):
    with pytest.raises(StoreURLError, match=message) as caught:
        open_store(url)
    assert isinstance(caught.value, InputError)


@pytest.mark.parametrize("url", ["memory://?max_bytes", "memory://?max_bytes=1GiB&max_bytes=2GiB", "memory://#x"])
def test_what_would_be_dropped_in_silence_is_refused(url):
    with pytest.raises(StoreURLError):
        open_store(url)


def test_a_url_that_cannot_be_parsed_is_refused():
    with pytest.raises(StoreURLError):
        open_store("memory://[")


def test_every_option_of_every_tier_has_a_default():
    for tier in TIERS.values():
        assert all(p.default is not p.empty for p in inspect.signature(tier).parameters.values())
