"""A store that an earlier version wrote is read as it is: keys, entries, index and tombstones.

`data/before` was written by the version at commit 6a2c3eb; each index is kept as the SQL that makes it again.
"""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
import torch
from support.store import disk_store, kv

from chunkcache.kv import ChunkKey, Origin
from chunkcache.kv.quantised import QuantisedLayer, dense
from chunkcache.store import EntryFilter

DATA = Path(__file__).parent / "data" / "before"
ORIGIN = Origin("model", "tenant", ("document",), ("chunk-1",), 1000.0, 0.5)


@pytest.fixture(params=[True, False], ids=["with its index", "index lost"])
def before(request, tmp_path):
    """Return a function that opens one of the stores."""

    def opened(name):
        folder = tmp_path / name
        shutil.copytree(DATA / name, folder)
        sql = (folder / "index.sql").read_text()
        (folder / "index.sql").unlink()
        if request.param:
            with sqlite3.connect(folder / "index.sqlite") as index:
                index.executescript(sql)
            index.close()
        return disk_store(folder)

    opened.has_index = request.param
    return opened


def layers(tokens):
    return [(torch.arange(16.0 * tokens).reshape(2, 2, tokens, 4) + 1 + index) / 8 for index in range(2)]


def test_a_chunk_has_the_key_that_it_had():
    assert ChunkKey.of("model", (9, 8), (1, 2, 3), "tenant").digest == (
        "99f3f6325399cf88b11c899fe54b0dca1fc1b36e303bacc563487592b89f2f16"
    )


def test_a_plain_entry_is_a_hit(before):
    key = ChunkKey.of("model", (9, 8), (1, 2, 3), "tenant")
    with before("raw") as store:
        assert key in store
        got = store.get(key, (1, 2, 3), [(2, 4)] * 2)
        assert (got.position, got.origin) == (3, ORIGIN)
        assert all(map(torch.equal, got.layers, layers(3)))
        [entry] = store.entries(EntryFilter(model="model", document="document"))
        assert (entry.key, entry.nbytes, entry.tokens, entry.compute_s) == (key, 384, 3, 0.5)
        assert (entry.pinned, entry.uses) == ((True, 2.0) if before.has_index else (False, 1.0))
        assert store.stats().damaged == 0


def test_a_quantised_and_compressed_entry_is_a_hit(before):
    key = ChunkKey.of("model", (9, 8), (4, 5, 6, 7), "tenant")
    with before("int8-zstd") as store:
        got = store.get(key, (4, 5, 6, 7), [(2, 4)] * 2)
        for layer, expected in zip(got.layers, layers(4), strict=True):
            assert isinstance(layer, QuantisedLayer)
            torch.testing.assert_close(dense(layer), expected, atol=0.02, rtol=0)


def test_what_an_earlier_version_deleted_stays_deleted(before):
    with before("raw") as store:
        late = kv(1, created=1000.0, documents=("edited",), chunks=("new", "old"))
        assert store.put(ChunkKey("1" * 64), late) is not before.has_index
        assert store.put(ChunkKey("2" * 64), kv(1, created=1000.0, tenant="gone")) is not before.has_index
        assert store.put(ChunkKey("3" * 64), kv(1, created=1000.0, documents=("edited",)))
