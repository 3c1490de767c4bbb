"""The disk tier: what was written is there after a restart, whole or not at all, whatever happens to the folder."""

from __future__ import annotations

import gc
import os
import random
import shutil
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from support.store import SIZE, disk_store, in_new_interpreter, in_process, key, kv, random_kv, same

from chunkcache.errors import EntryLostError, StoreURLError
from chunkcache.store import DiskStore, Entry, EntryFilter
from chunkcache.store.codec import find_codec
from chunkcache.store.entry import PREAMBLE


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def opened(folder, **options):
    return disk_store(folder, **options)


def files(folder):
    return sorted(path for path in folder.glob("??/*") if path.is_file())


def filled(folder, count, **options):
    store = opened(folder, **options)
    for token in range(count):
        assert store.put(key(token), kv(token, fill=float(token)))
    return store


def holds_whole(store, count):
    return all(same(store.get(key(token), [token]), kv(token, fill=float(token))) for token in range(count))


@pytest.mark.parametrize("sync", ["yes", "no"])
@pytest.mark.parametrize("options", [{}, {"codec": "bf16"}, {"compress": "zstd"}, {"secret": "s"}])
def test_entries_are_there_after_a_restart(folder, sync, options):
    original = random_kv()
    with opened(folder, sync=sync, **options) as store:
        assert store.put(key(*range(5)), original)
        before = store.get(key(*range(5)), range(5))
        assert same(before, find_codec(options.get("codec", "raw"))(original))
    with opened(folder, sync=sync, **options) as again:
        assert same(again.get(key(*range(5)), range(5)), before)
        assert again.stats().entries == 1


def test_uses_pins_and_origins_are_there_after_a_restart(folder):
    with opened(folder) as store:
        store.put(
            key(1), kv(1, model="m", tenant="t", documents=("d", "e"), chunks=("c",), created=9.0, compute_s=2.0)
        )
        store.get(key(1), [1])
        store.credit(key(1), 2.0)
        store.pin(key(1))
    with opened(folder) as again:
        [entry] = again.entries()
    assert (entry.uses, entry.pinned, entry.documents, entry.chunks) == (3.0, True, ("d", "e"), ("c",))
    assert (entry.model, entry.tenant, entry.created, entry.compute_s) == ("m", "t", 9.0, 2.0)


def test_what_is_not_synced_is_refused_as_a_word():
    with pytest.raises(StoreURLError, match="sync='maybe' is neither 'yes' nor 'no'"):
        DiskStore("/nowhere", sync="maybe")


# The index is lost, or wrong


def test_a_lost_index_is_written_again(folder):
    filled(folder, 20).close()
    for part in folder.glob("index.sqlite*"):
        part.unlink()
    with opened(folder, max_bytes=20 * SIZE) as store:
        assert store.stats().entries == 20
        assert holds_whole(store, 20)
        store.put(key(99), kv(99))
        assert store.stats().nbytes == 20 * SIZE  # what is in the index again can be evicted again
    assert len(files(folder)) == 20


@pytest.mark.parametrize("how", ["noise", "cut", "zeroes", "empty", "another version"])
def test_a_damaged_index_is_written_again(folder, how, caplog):
    filled(folder, 50).close()
    index = folder / "index.sqlite"
    data = bytearray(index.read_bytes())
    if how == "another version":
        database = sqlite3.connect(index)
        database.execute("DROP TABLE entries")
        database.execute("CREATE TABLE entries (something_else)")
        database.execute("PRAGMA user_version=99")
        database.close()
    else:
        damaged = {"noise": random.Random(0).randbytes(9000), "cut": data[:9000], "empty": b""}
        index.write_bytes(damaged.get(how, data[:4096] + bytes(len(data) - 4096)))
    with opened(folder) as store:
        assert store.stats().entries == 50
        assert holds_whole(store, 50)
        assert store.put(key(99), kv(99))
        assert store.stats().errors == 0
    assert ("is written again" in caplog.text) == (how != "empty")


def test_the_index_of_a_process_that_is_writing_is_not_taken_for_damaged(folder):
    with filled(folder, 3) as store:
        other = sqlite3.connect(folder / "index.sqlite")
        other.execute("BEGIN EXCLUSIVE")
        inode = (folder / "index.sqlite").stat().st_ino
        try:
            with opened(folder) as second:
                assert holds_whole(second, 3)
        except StoreURLError:
            pass  # it may say that it cannot use it now
        other.rollback()
        other.close()
        assert (folder / "index.sqlite").stat().st_ino == inode
        assert holds_whole(store, 3)


def test_a_file_that_the_index_does_not_know_is_found_at_the_next_start(folder):
    """A writer was killed after the file was in its place, and before the index knew."""
    with filled(folder, 3) as store:
        for token in range(2):
            store._ledger.drop(key(token))
        assert store.stats().entries == 1
        with opened(folder) as again:
            assert again.stats().entries == 3
        assert store.purge() == 3
    assert files(folder) == []


def test_a_file_that_nobody_knew_of_when_it_was_deleted_is_not_served_and_goes_at_the_next_start(folder):
    with opened(folder) as store:
        for token in range(3):
            store.put(key(token), kv(token, documents=("d",), created=time.time()))
            store._ledger.drop(key(token))
        assert store.purge(EntryFilter(document="d")) == 0
        assert store.get(key(0), [0]) is None
        assert len(files(folder)) == 2
    with opened(folder) as again:
        assert again.stats().entries == 0
    assert files(folder) == []


def test_an_entry_of_the_index_without_a_file_is_struck_out_when_it_is_asked_for_and_at_the_next_start(folder):
    with filled(folder, 3) as store:
        for path in files(folder)[:2]:
            path.unlink()
        missing = [token for token in range(3) if key(token) not in store]
        assert store.get(key(missing[0]), [missing[0]]) is None
        assert store.stats().entries == 2
        with opened(folder) as again:
            assert again.stats().entries == 1


def test_uses_that_cannot_be_written_down_fail_nobody(folder):
    with filled(folder, 3) as store:
        store._ledger._db.execute("PRAGMA busy_timeout=1")
        other = sqlite3.connect(folder / "index.sqlite")
        other.execute("BEGIN IMMEDIATE")
        for _ in range(100):
            assert holds_whole(store, 3)
        assert store.get(key(9), [9]) is None
        other.rollback()
        other.close()
        assert store.stats().errors == 0


# Foreign and damaged files


def test_old_temporary_files_go_and_young_ones_stay(folder):
    filled(folder, 1).close()
    old, young, strange = folder / "new" / "a.ckv", folder / "new" / "b.ckv", folder / "new" / "c"
    for path in (old, young):
        path.write_bytes(b"half an entry")
    strange.mkdir()
    for path in (old, strange):
        os.utime(path, (time.time() - 7200,) * 2)
    with opened(folder) as store:
        assert store.stats().entries == 1
    assert (old.exists(), young.exists(), strange.exists()) == (False, True, True)


def test_foreign_files_in_the_folder_are_left_alone(folder, caplog):
    filled(folder, 2).close()
    shutil.rmtree(folder / "new")
    foreign = [folder / "README", folder / "ab" / "notes.ckv", folder / "ab" / f"{'c' * 64}.ckv", folder / "zz" / "x"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("not ours")
    (folder / "dd" / f"{'d' * 64}.ckv").mkdir(parents=True)
    (folder / "index.sqlite").unlink()
    with opened(folder) as store:
        assert store.stats().entries == 2
        assert holds_whole(store, 2)
        store.clear()
        assert store.stats().damaged == 0
    assert all(path.read_text() == "not ours" for path in foreign)
    assert caplog.text == ""


def shortened(data):
    return data[:-5]


def flipped(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def flipped_in_the_header(data):
    return data[: PREAMBLE + 9] + bytes([data[PREAMBLE + 9] ^ 1]) + data[PREAMBLE + 10 :]


def of_another_version(data):
    return data[:7] + b"\x00" + data[8:]


DAMAGES = [shortened, flipped, flipped_in_the_header, of_another_version]


def read_all(store, token):
    """Read an entry to its end; return whether it could be had."""
    got = store.get(key(token), [token])
    try:
        return got is not None and len(list(got.layers)) > 0
    except EntryLostError:
        return False


@pytest.mark.parametrize(
    "damage", [*DAMAGES, lambda data: b"", lambda data: data[:30], lambda data: b"PK\x03\x04" * 99]
)
def test_a_damaged_entry_is_a_counted_miss_and_deleted(folder, damage, caplog):
    with filled(folder, 3) as store:
        path = store.path(key(1))
        path.write_bytes(damage(path.read_bytes()))
        assert not read_all(store, 1)
        assert not path.exists()
        stats = store.stats()
        assert (stats.hits, stats.misses, stats.damaged, stats.entries, stats.errors) == (0, 1, 1, 2, 0)
        assert not read_all(store, 1)
        assert store.stats().damaged == 1
        assert all(read_all(store, token) for token in (0, 2))
    [record] = [record for record in caplog.records if "damaged" in record.getMessage()]
    assert str(key(1)) in record.getMessage()


def test_the_entry_of_another_key_is_not_taken(folder):
    with filled(folder, 2) as store:
        shutil.copy(store.path(key(0)), store.path(key(1)))
        assert not read_all(store, 1)
        assert store.stats().damaged == 1
        assert read_all(store, 0)


@pytest.mark.parametrize("damage", DAMAGES[:2])
def test_a_file_that_is_damaged_while_it_is_read_is_a_counted_miss(folder, damage):
    with filled(folder, 1) as store:
        got = store.get(key(0), [0])
        path = store.path(key(0))
        data = damage(path.read_bytes())
        with path.open("r+b") as file:  # the same file that is open, not another of its name
            file.write(data)
            file.truncate()
        with pytest.raises(EntryLostError):
            list(got.layers)
        stats = store.stats()
        assert (stats.hits, stats.misses, stats.damaged) == (0, 1, 1)
        assert key(0) not in store


@pytest.mark.parametrize("gone", ["deleted", "unlinked", "replaced", "evicted", "the folder"])
def test_a_reader_reads_its_entry_to_the_end_whatever_happens_to_the_file(folder, gone):
    with filled(folder, 1, max_bytes=SIZE) as store:
        got = store.get(key(0), [0])
        first = got.layers[0]
        if gone == "deleted":
            store.delete(key(0))
        elif gone == "unlinked":
            store.path(key(0)).unlink()
        elif gone == "replaced":
            store.put(key(0), kv(0, fill=77.0))
        elif gone == "evicted":
            store.put(key(5), kv(5))
        else:
            shutil.rmtree(folder)
        assert same(got, kv(0, fill=0.0))
        assert first.data_ptr() != got.layers[0].data_ptr()


def test_layers_can_be_read_in_any_order_and_are_the_readers_own(folder):
    with opened(folder) as store:
        original = random_kv(layers=4)
        store.put(key(*range(5)), original)
        got = store.get(key(*range(5)), range(5))
        for index in (3, 0, -2, 1, 3):
            assert (got.layers[index] == original.layers[index]).all()
        got.layers[0].zero_()
        assert same(store.get(key(*range(5)), range(5)), original)
        with pytest.raises(IndexError):
            got.layers[4]


def test_files_are_closed_when_the_reader_lets_go(folder):
    def open_files():
        targets = [_target(name) for name in os.listdir("/proc/self/fd")]
        return [path for path in targets if path.startswith(str(folder)) and path.endswith(".ckv")]

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    with filled(folder, 20) as store:
        held = [store.get(key(token), [token]) for token in range(20)]
        assert len(open_files()) == 20
        held.clear()
        gc.collect()
        assert open_files() == []
        path = store.path(key(0))
        path.write_bytes(b"not an entry, not even a preamble")
        assert store.get(key(0), [0]) is None
        assert open_files() == []


def _target(name):
    try:
        return os.readlink(f"/proc/self/fd/{name}").removesuffix(" (deleted)")
    except OSError:
        return ""


# Deleting


def test_deleting_reaches_every_file_of_a_tenant_document_chunk_or_model(folder):
    origins = {
        0: {"tenant": "a", "model": "m", "documents": ("x", "y"), "chunks": ("c0",)},
        1: {"tenant": "a", "model": "n", "documents": ("y",), "chunks": ("c1", "c0")},
        2: {"tenant": "b", "model": "m", "documents": ("z",), "chunks": ("c2",)},
        3: {},
    }
    for where, gone in (
        (EntryFilter(tenant="a"), {0, 1}),
        (EntryFilter(document="y"), {0, 1}),
        (EntryFilter(document="x"), {0}),
        (EntryFilter(chunk="c0"), {0, 1}),
        (EntryFilter(model="m"), {0, 2}),
        (EntryFilter(model="m", tenant="b"), {2}),
        (EntryFilter(tenant="nobody"), set()),
        (EntryFilter(), {0, 1, 2, 3}),
    ):
        with opened(folder) as store:
            for token, origin in origins.items():
                store.put(key(token), kv(token, **origin))
            assert {entry.key for entry in store.entries(where)} == {key(token) for token in gone}
            assert store.purge(where) == len(gone)
            assert {token for token in origins if key(token) not in store} == gone
            assert len(files(folder)) == 4 - len(gone)


def test_what_was_deleted_is_not_stored_by_another_process_afterwards(folder):
    before = time.time()
    with opened(folder) as deleting, opened(folder) as late:
        deleting.delete(key(1))
        deleting.purge(EntryFilter(document="d"))
        deleting.purge(EntryFilter(tenant="t", chunk="c"))
        assert not late.put(key(1), kv(1, created=before))
        assert not late.put(key(2), kv(2, created=before, documents=("e", "d")))
        assert not late.put(key(3), kv(3, created=before, tenant="t", chunks=("b", "c")))
        assert late.stats().refused == 3
        assert late.put(key(4), kv(4, created=before, tenant="u", chunks=("c",)))
        assert late.put(key(1), kv(1, created=time.time()))
        assert late.put(key(2), kv(2, created=time.time(), documents=("d",)))
    with opened(folder) as again:  # nor after a restart
        assert not again.put(key(3), kv(3, created=before, tenant="t", chunks=("c",)))


def test_what_could_not_be_deleted_since_the_tier_was_in_trouble_is_not_served_later(folder):
    with opened(folder) as store:
        store.put(key(1), kv(1, documents=("d",), created=time.time()))
        store.breaker.failed()
        assert store.purge(EntryFilter(document="d")) == 0
        store.breaker.succeeded()
        assert key(1) in store
        assert store.get(key(1), [1]) is None
        assert key(1) not in store


def test_what_is_deleted_while_it_is_written_does_not_stay(folder):
    with opened(folder) as store:
        write_file = store._write_file

        def deleted_meanwhile(path, parts):
            write_file(path, parts)
            store.delete(key(1))

        store._write_file = deleted_meanwhile
        assert not store.put(key(1), kv(1, created=time.time()))
        assert key(1) not in store
        assert store.stats().refused == 1


# Budgets and time


def test_files_keep_within_the_budget_and_go_in_the_order_of_use_also_after_a_restart(folder):
    with filled(folder, 5, max_bytes=5 * SIZE) as store:
        store.get(key(0), [0])
    with opened(folder, max_bytes=5 * SIZE) as store:
        store.put(key(5), kv(5))
        store.put(key(6), kv(6))
        assert [token for token in range(7) if key(token) in store] == [0, 3, 4, 5, 6]
        assert store.stats().evictions == 2
    assert len(files(folder)) == 5


def test_a_smaller_budget_than_before_takes_effect_with_the_next_entry(folder):
    filled(folder, 10).close()
    with opened(folder, max_bytes=3 * SIZE) as store:
        store.put(key(10), kv(10))
        assert store.stats().entries == len(files(folder)) == 3


def test_a_budget_smaller_than_one_entry_refuses_it(folder, caplog):
    with opened(folder, max_bytes=SIZE - 1) as store:
        assert not store.put(key(1), kv(1))
        assert not store.put(key(2), kv(2))
        assert (store.stats().refused, store.stats().errors, files(folder)) == (2, 0, [])
    assert len(caplog.records) == 1


def test_an_entry_past_its_time_to_live_is_a_miss_and_goes(folder, monkeypatch):
    with filled(folder, 2, ttl=60) as store, opened(folder) as other:
        [entry, _] = store.entries()
        assert 0 < entry.expires - time.time() <= 60
        later = time.time() + 61
        monkeypatch.setattr(time, "time", lambda: later)
        assert key(0) not in store
        assert key(1) not in store
        assert store.get(key(0), [0]) is None
        assert (store.stats().expired, store.stats().misses) == (1, 1)
        other.put(key(5), kv(5))  # the next who writes clears away what is left
        assert len(files(folder)) == 1
        assert other.stats().expired == 1


@pytest.mark.parametrize("ttl", [0, -1, float("nan")])
def test_no_time_to_live_is_refused(folder, ttl):
    with pytest.raises(StoreURLError, match="is no time to live"):
        opened(folder, ttl=ttl)


def test_ten_thousand_entries(folder):
    """An index, not a walk through the files: no entry is opened before it is asked for."""
    with filled(folder, 1) as store:
        for number in range(256):
            (folder / f"{number:02x}").mkdir(exist_ok=True)
        entries = [Entry(key=key(token), nbytes=SIZE, tokens=1) for token in range(1, 10_000)]
        for entry in entries:
            os.link(store.path(key(0)), store.path(entry.key))  # each would be found to be another's
        store._ledger.add_all(entries)
    with opened(folder, max_bytes=10_000 * SIZE) as again:
        assert again.stats().entries == 10_000
        assert read_all(again, 0)
        assert again.put(key(123), kv(123))
        assert read_all(again, 123)
        assert again.stats().damaged == 0
        assert again.put(key(10_000), kv(10_000))
        assert again.stats().evictions == 1


# Trouble


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreURLError, match=r"file/store cannot be used as a store .*; pass another folder"):
        opened(tmp_path / "file" / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "index.sqlite").mkdir()
    with pytest.raises(StoreURLError, match="cannot be used"):
        opened(tmp_path / "store")


def test_a_folder_that_is_deleted_under_the_store_is_trouble_and_then_made_again(folder, caplog):
    with filled(folder, 3) as store:
        store.write_breaker.pause_s = store.breaker.pause_s = 0.0
        shutil.rmtree(folder)
        assert [read_all(store, token) for token in range(3)] == [False] * 3
        assert not store.put(key(1), kv(1))
        folder.mkdir()
        (folder / "new").mkdir()
        assert store.put(key(1), kv(1))
        assert read_all(store, 1)
    assert len([record for record in caplog.records if "in trouble" in record.getMessage()]) == 1


def test_after_closing_everything_is_a_miss_and_nothing_fails(folder):
    store = filled(folder, 2)
    store.close()
    store.close()
    assert store.get(key(7), [7]) is None
    assert not store.put(key(7), kv(7))
    assert store.purge() == 0
    assert list(store.entries()) == []
    store.pin(key(0))
    store.credit(key(0), 1.0)
    assert store.stats().entries == 0


FULL = """
    import logging, resource
    from chunkcache.store import DiskStore

    logging.basicConfig(format="%(message)s")
    big = lambda token: ChunkKV.of([token], 3, [torch.full((2, 1, 1, 12_500), float(token))] * 2)
    with DiskStore(sys.argv[1] + "/store") as store:
        store.write_breaker.pause_s = 0.0
        stored = [token for token in range(int(sys.argv[2])) if store.put(key(token), big(token))]
        if sys.argv[3:] == ["limit"]:  # no file may grow beyond this: a real error of write(2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))
        refused = [token for token in range(100, 110) if not store.put(key(token), big(token))]
        assert len(refused) > 5, refused
        assert store.stats().errors >= len(refused), store.stats()
        assert not any(store.folder.glob("new/*")), "half an entry was left behind"
        for _ in range(100):  # enough for the uses to be written down, or not
            for token in stored:
                assert same(store.get(key(token), [token]), big(token))
        assert store.get(key(7777), [7777]) is None
        assert all(key(token) not in store for token in refused)
        assert all([store.delete(key(stored.pop())) for _ in range(min(3, len(stored)))])
        if sys.argv[3:] != ["limit"]:
            assert store.put(key(100), big(100))  # there is room again, and the tier is well again
            assert same(store.get(key(100), [100]), big(100))
        store.write_breaker.pause_s = 60.0
        failed = [store.put(key(token), big(token)) for token in range(200, 220)]
        assert store.stats().skipped > 10, "the breaker stayed closed"
    print(len(stored), file=sys.stderr)
"""


def test_a_disk_that_is_full_refuses_and_still_serves(tmp_path, folder):
    in_process(FULL, tmp_path, 5, "limit")
    with opened(folder) as store:
        assert store.stats().entries == 2


def test_a_file_system_that_is_full_refuses_and_still_serves(tmp_path):
    small = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1200k none "$0" && exec "$@"', str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    said = in_new_interpreter(FULL, tmp_path, 20, before=small)
    assert said.count("in trouble") == 2  # once when it was full, and once when it was full again


DENIED = """
    import logging, os, tempfile
    from chunkcache.errors import StoreURLError
    from chunkcache.store import DiskStore

    root = tempfile.mkdtemp()
    os.chmod(root, 0o777)

    def nobody():
        if os.geteuid() == 0:
            os.setuid(65534)
        folder = os.path.join(root, "store")
        with DiskStore(folder, sync="no") as store:
            store.write_breaker.pause_s = store.breaker.pause_s = 0.0
            for token in range(3):
                assert store.put(key(token), kv(token, created=1.0))
            folders = [folder, *(str(path) for path in store.folder.iterdir() if path.is_dir())]
            for path in folders:
                os.chmod(path, 0o555)
            assert not store.put(key(9), kv(9)), "it was written"
            for token in range(3):
                assert same(store.get(key(token), [token]), kv(token))
            assert not store.delete(key(0))
            assert store.get(key(0), [0]) is None, "what was to be deleted is served"
            os.chmod(store.path(key(1)), 0)
            assert store.get(key(1), [1]) is None
            assert same(store.get(key(2), [2]), kv(2))
            assert store.stats().errors >= 3
            for path in folders:
                os.chmod(path, 0o755)
            assert store.put(key(9), kv(9)), "it did not recover"
        for name in os.listdir(folder):
            if name.startswith("index"):
                os.chmod(os.path.join(folder, name), 0o444)
        os.chmod(folder, 0o555)
        for path in (folder, os.path.join(folder, "below")):
            try:
                DiskStore(path).close()
            except StoreURLError as error:
                assert "cannot be used as a store" in str(error)
            else:
                raise AssertionError(f"{path} was opened")
        os.chmod(folder, 0o755)

    joined(forked(nobody))
    import shutil
    shutil.rmtree(root)
"""


def test_a_folder_without_permission_is_trouble_and_no_failure(tmp_path):
    in_process(DENIED, tmp_path)


# Several processes


SHARED = """
    import random
    from chunkcache.store import DiskStore, EntryFilter

    folder, budget = sys.argv[1] + "/store", 12 * SIZE

    def work(number):
        rng = random.Random(number)
        with disk_store(folder, max_bytes=budget, sync="no") as store:
            hits = 0
            for turn in range(250):
                token = rng.randrange(30)
                store.put(key(token), kv(token, fill=float(token), documents=(f"d{token % 5}",)))
                token = rng.randrange(30)
                got = store.get(key(token), [token])
                if got is not None:
                    assert same(got, kv(token, fill=float(token)))
                    hits += 1
                if turn % 17 == 0:
                    store.delete(key(rng.randrange(30)))
                if turn % 50 == 0:
                    store.purge(EntryFilter(document="d1"))
            stats = store.stats()
            assert (stats.errors, stats.damaged, stats.mismatches, stats.skipped) == (0, 0, 0, 0), stats
            assert (stats.hits, stats.misses) == (hits, 250 - hits)
            assert stats.writes + stats.refused == 250 and hits > 20, stats

    joined(*(forked(work, number) for number in range(3)))
"""


def test_several_processes_write_read_evict_and_delete_in_one_folder(tmp_path, folder):
    in_process(SHARED, tmp_path)
    with opened(folder, max_bytes=12 * SIZE) as store:
        store.put(key(99), kv(99))
        entries = list(store.entries())
        assert sum(entry.nbytes for entry in entries) == store.stats().nbytes <= 12 * SIZE
        assert sorted(store.path(entry.key) for entry in entries) == files(folder)
        assert not any((folder / "new").iterdir())


OPENED_AT_ONCE = """
    from chunkcache.store import DiskStore

    def work(number):
        with DiskStore(sys.argv[1] + "/store", sync="no") as store:
            assert store.put(key(number), kv(number))
            assert store.stats().errors == 0

    joined(*(forked(work, number) for number in range(8)))
"""


def test_many_processes_may_make_the_folder_at_once(tmp_path, folder):
    in_process(OPENED_AT_ONCE, tmp_path)
    with opened(folder) as store:
        assert store.stats().entries == 8


def test_what_another_process_deleted_is_a_miss_and_what_it_wrote_is_a_hit(folder):
    with opened(folder) as one, opened(folder) as other:
        one.put(key(1), kv(1))
        assert read_all(other, 1)
        assert other.delete(key(1))
        assert one.get(key(1), [1]) is None
        assert not one.delete(key(1))
        other.put(key(1), kv(1, fill=5.0))
        assert same(one.get(key(1), [1]), kv(1, fill=5.0))


KILLED = """
    import os, random, signal, time
    from chunkcache.store import DiskStore

    folder, rng = sys.argv[1] + "/store", random.Random(0)

    def big(token, fill):
        return ChunkKV.of([token], 3, [torch.full((2, 1, 1, 40_000), fill)] * 3)

    def write():
        with disk_store(folder, max_bytes=12 * 960_000, sync="yes" if rng.random() < 0.3 else "no") as store:
            start.write(b"!")
            start.flush()
            fill = float(os.getpid())
            while True:
                for token in rng.sample(range(16), 16):
                    store.put(key(token), big(token, fill))
                    if token == 3:
                        store.delete(key(5))

    for _ in range(40):
        rng.random()  # a child draws what its parent would draw next
        ready, start = os.pipe()
        start = os.fdopen(start, "wb")
        child = forked(write)
        os.read(ready, 1)
        time.sleep(rng.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        start.close()
        os.close(ready)

    with disk_store(folder, max_bytes=12 * 960_000, sync="yes") as store:
        served = 0
        for token in range(16):
            got = store.get(key(token), [token])
            if got is not None:
                [fill] = {value for layer in got.layers for value in layer.unique().tolist()}  # of one writer only
                served += fill > 1
        stats = store.stats()
        assert (stats.damaged, stats.mismatches, stats.errors) == (0, 0, 0), stats
        assert served == stats.entries == len(list(store.folder.glob("??/*.ckv"))) > 5, (served, stats)
        assert store.put(key(99), big(99, 1.0))
        assert store.stats().nbytes <= 12 * 960_000
"""


def test_a_writer_that_is_killed_again_and_again_leaves_no_torn_entry(tmp_path, folder):
    in_process(KILLED, tmp_path)
    with opened(folder) as store:
        assert read_all(store, 99)
