"""Entries as bytes: what was written is read, and nothing else ever is, whatever happened to the bytes."""

from __future__ import annotations

import hashlib
import hmac
import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.store import key, kv, random_kv, same

from chunkcache.kv import ChunkKV, ContextAttention, Origin
from chunkcache.kv.quantised import QuantisedLayer, dense
from chunkcache.store.codec import find_codec
from chunkcache.store.entry import MAGIC, PREAMBLE, DamagedError, Header, encode

SECRET = b"of nobody's business"
CONTEXT = ContextAttention(("a", "b"), (0.5, 0.25), 1.5, 0.1, 0.2, torch.arange(5, dtype=torch.float32))
ORIGIN = Origin("model", "tenant", ("d1", "d2"), ("c1",), 1234.5, 0.25)


def written(chunk_kv, compress=False, secret=None, expires=None):
    """Return header and blocks as bytes of their own."""
    header, blocks = encode(key(1), chunk_kv, compress, secret, expires)
    return header, [bytes(block) for block in blocks]


def read(header, blocks, secret=None, expected=None):
    parsed = Header.parse(header, expected, secret)
    layers = [
        block.layer(bytearray(data), parsed.compressed, secret)
        for block, data in zip(parsed.blocks, blocks, strict=True)
    ]
    return parsed, ChunkKV.of(parsed.token_ids, parsed.position, layers, parsed.context, parsed.origin)


@pytest.mark.parametrize("secret", [None, SECRET], ids=["open", "sealed"])
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "zstd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_written_is_read(dtype, compress, secret):
    original = replace(random_kv(dtype=dtype), context=CONTEXT, origin=ORIGIN)
    header, blocks = written(original, compress, secret, expires=99.5)
    parsed, got = read(header, blocks, secret, key(1))
    assert same(original, got)
    assert [layer.dtype for layer in got.layers] == [dtype] * 3
    assert (got.origin, parsed.expires) == (ORIGIN, 99.5)
    assert (got.context.chunks, got.context.inter, got.context.a) == (CONTEXT.chunks, CONTEXT.inter, CONTEXT.a)
    assert torch.equal(got.context.outside, CONTEXT.outside)
    assert sum(parsed.sizes) == sum(map(len, blocks)) == parsed.entry().nbytes


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "zstd"])
def test_quantised_layers_stay_as_they_are(codec, compress):
    kept = find_codec(codec)(random_kv(tokens=70))
    _, got = read(*written(kept, compress))
    for before, after in zip(kept.layers, got.layers, strict=True):
        assert isinstance(after, QuantisedLayer)
        assert torch.equal(dense(before), dense(after))
        assert after.dtype == torch.float32


def test_plain_tensors_are_not_copied():
    original = random_kv()
    _, blocks = encode(key(1), original, False, None, None)
    original.layers[0][0, 0, 0, 0] = 42.0
    assert torch.frombuffer(bytearray(blocks[0]), dtype=torch.float32)[0] == 42.0


def test_an_opaque_value_is_an_entry_too():
    value = ChunkKV.of((), 0, [torch.arange(100, dtype=torch.uint8)])
    _, got = read(*written(value))
    assert same(value, got)


def test_zstd_makes_like_numbers_smaller():
    original = ChunkKV.of(range(64), 3, [torch.full((2, 2, 64, 8), 1.5)])
    assert sum(map(len, written(original, compress=True)[1])) < original.nbytes / 50


@pytest.mark.parametrize(
    ("writer", "reader"), [(None, SECRET), (SECRET, None), (SECRET, b"another")], ids=["unsealed", "sealed", "other"]
)
def test_an_entry_sealed_otherwise_is_none(writer, reader):
    header, _ = written(random_kv(), secret=writer)
    with pytest.raises(DamagedError, match="seal"):
        Header.parse(header, None, reader)


def test_with_a_secret_no_byte_of_a_block_can_be_forged():
    header, blocks = written(random_kv(), secret=SECRET)
    changed = bytearray(blocks[1])
    changed[7] ^= 1
    with pytest.raises(DamagedError, match="checksum"):
        read(header, [blocks[0], changed, blocks[2]], SECRET)


def test_the_entry_of_another_key_or_format_version_is_none():
    header, _ = written(random_kv())
    with pytest.raises(DamagedError, match="another entry"):
        Header.parse(header, key(2), None)
    older = header[:7] + b"\x00" + header[8:]
    with pytest.raises(DamagedError, match="version is 0, not 1"):
        Header.parse(older, None, None)
    with pytest.raises(DamagedError, match="no entry"):
        Header.parse(b"PK\x03\x04" + header[4:], None, None)


def test_a_header_that_claims_to_be_huge_is_refused_unread():
    with pytest.raises(DamagedError, match="claims 4294967295 bytes"):
        Header.parse(MAGIC + b"\xff" * 4 + bytes(32), None, None)


def test_a_block_that_would_decompress_to_something_larger_is_refused_before_it_is():
    import zstandard

    header, blocks = written(random_kv(), compress=True)
    bomb = zstandard.ZstdCompressor().compress(bytes(10**7))
    hostile = resealed(header, lambda d: d["blocks"][0].__setitem__(slice(3, 5), [len(bomb), checksum(bomb)]))
    with pytest.raises(DamagedError, match="does not say that it is"):
        read(hostile, [bomb, *blocks[1:]])


def checksum(data):
    import xxhash

    return xxhash.xxh3_128_hexdigest(data)


def resealed(header, change):
    """Change the description of an entry as somebody could who knows the format but no secret."""
    description = json.loads(header[PREAMBLE:])
    change(description)
    data = json.dumps(description).encode()
    return MAGIC + len(data).to_bytes(4, "little") + hashlib.sha256(data).digest() + data


HOSTILE = [None, True, -1, 0, 1, 2**31, 2**63, 10**400, 0.5, float("nan"), "", "x", "float64", [], [[]], {}, [1] * 9]


def paths(value, path=()):
    """Yield the path of every value inside a description."""
    yield path
    for name, inside in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from paths(inside, (*path, name))


@pytest.mark.parametrize("codec", ["raw", "int4"])
def test_no_hostile_header_does_more_than_be_refused(codec):
    original = find_codec(codec)(replace(random_kv(tokens=5), context=CONTEXT, origin=ORIGIN))
    header, blocks = written(original)
    places = list(paths(json.loads(header[PREAMBLE:])))[1:]
    refused = 0
    for place in places:
        for value in [*HOSTILE, ...]:  # ... is to leave it out

            def change(description, place=place, value=value):
                for name in place[:-1]:
                    description = description[name]
                if value is ...:
                    del description[place[-1]]
                else:
                    description[place[-1]] = value

            try:
                parsed, got = read(resealed(header, change), blocks)
            except (DamagedError, ValueError):  # ValueError: zip, of another number of blocks
                refused += 1
                continue
            assert len(got.layers) == len(original.layers)
            assert all(layer.shape[2] == len(got) for layer in got.layers)
            hash(parsed.origin)
    assert refused > len(places) * len(HOSTILE) * 0.6


def test_ten_thousand_broken_entries_are_found_out():
    """Bits flipped, bytes cut, doubled, zeroed and taken from other entries: read as it was, or not at all."""
    rng = random.Random(0)
    entries = [
        (written(find_codec(codec)(random_kv(tokens=3, layers=2, dim=4)), compress, secret), secret)
        for codec in ("raw", "int8", "bf16")
        for compress in (False, True)
        for secret in (None, SECRET)
    ]
    whole = 0
    for _ in range(10_000):
        (header, blocks), secret = rng.choice(entries)
        (other, other_blocks), _ = rng.choice(entries)
        parts, others = [header, *blocks], [other, *other_blocks]
        at = rng.randrange(len(parts))
        parts[at] = broken(rng, parts[at], others[at])
        try:
            _, got = read(parts[0], parts[1:], secret)
        except DamagedError:
            continue
        _, original = read(header, blocks, secret)
        assert (parts[0], list(parts[1:])) == (header, blocks) or all(
            torch.equal(dense(a), dense(b)) for a, b in zip(got.layers, original.layers, strict=True)
        )
        whole += 1
    assert whole < 2000  # taking a part from the same entry breaks nothing


def broken(rng, data, other):
    data = bytearray(data)
    at = rng.randrange(len(data))
    how = rng.randrange(6)
    if how == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[at:]
    elif how == 2:
        data[at:at] = data[: rng.randrange(1, 40)]
    elif how == 3:
        data[at : at + 8] = bytes(8)
    elif how == 4:
        return bytes(other)
    else:
        data[at:] = other[at:]
    return bytes(data)


@settings(max_examples=500)
@given(st.binary(max_size=300))
def test_any_bytes_behind_a_true_preamble_are_refused(data):
    forged = MAGIC + len(data).to_bytes(4, "little") + hashlib.sha256(data).digest() + data
    with pytest.raises(DamagedError):
        Header.parse(forged, None, None)


def test_the_seal_is_an_hmac_over_version_and_description():
    header, _ = written(kv(1), secret=SECRET)
    assert header[12:PREAMBLE] == hmac.digest(SECRET, MAGIC + header[PREAMBLE:], "sha256")
