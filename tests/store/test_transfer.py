"""Entries through a tar file: what goes in comes out, and nothing else does."""

from __future__ import annotations

import io
import tarfile
import time

import pytest
from support.store import disk_store, key, kv, memory_store, open_tier, random_kv, same

from chunkcache.errors import InputError
from chunkcache.kv.quantised import dense
from chunkcache.store import EVERYTHING, DiskStore, EntryFilter, MemoryStore, TieredStore, transfer
from chunkcache.store.entry import encode
from chunkcache.store.transfer import export_entries, import_entries


def exported(store, where=EVERYTHING):
    file = io.BytesIO()
    done = export_entries(store, file, where)
    return file.getvalue(), done


def imported(data, store):
    return import_entries(store, io.BytesIO(data))


def tar_of(*members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def members_of(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


@pytest.fixture
def target():
    return MemoryStore()


@pytest.mark.parametrize("options", [{}, {"codec": "bf16", "compress": "zstd"}, {"codec": "int4"}])
def test_what_is_exported_is_imported(tmp_path, target, options):
    store = open_tier("disk", tmp_path, **options)
    for number in range(3):
        store.put(key(number), random_kv(tokens=4 + number))
    data, done = exported(store)
    assert (done.entries, done.lost) == (3, 0)
    back = imported(data, target)
    assert (back.entries, back.nbytes, back.damaged, back.complete) == (3, done.nbytes, 0, True)
    for number in range(3):
        assert same(plain(store.peek(key(number))), plain(target.peek(key(number))))


def plain(kv):
    return kv.of_layers([dense(layer) for layer in kv.layers])


def test_a_member_is_what_the_disk_tier_has_in_its_file(tmp_path):
    store = open_tier("disk", tmp_path)
    store.put(key(1), kv(1, documents=("d",), model="m"))
    [file] = (tmp_path / "store").glob("??/*.ckv")
    assert members_of(exported(store)[0]) == [(file.name, file.read_bytes())]


def test_only_what_is_asked_for_is_exported(tmp_path):
    store = open_tier("disk", tmp_path)
    store.put(key(1), kv(1, documents=("d",)))
    store.put(key(2), kv(2, documents=("e",)))
    assert [name for name, _ in members_of(exported(store, EntryFilter(document="e"))[0])] == [f"{key(2).digest}.ckv"]


class BackupStore(DiskStore):
    """A second tier of its kind needs a name of its own."""


def test_what_is_damaged_in_one_tier_comes_from_the_next(tmp_path, target):
    store = TieredStore([kind(str(tmp_path / kind.__name__), sync="no") for kind in (DiskStore, BackupStore)])
    store.put(key(1), kv(1))
    store.flush()
    damage(tmp_path / "DiskStore")
    data, done = exported(store)
    assert (done.entries, done.lost) == (1, 0)
    assert imported(data, target).entries == 1


def damage(folder):
    [file] = folder.glob("??/*.ckv")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_what_cannot_be_read_is_counted_and_left_out(tmp_path, target):
    store = open_tier("disk", tmp_path)
    store.put(key(1), kv(1))
    damage(tmp_path / "store")
    data, done = exported(store)
    assert (done.entries, done.lost) == (0, 1)
    assert imported(data, target).complete


def test_a_damaged_member_is_left_out_and_the_others_come_in():
    store = MemoryStore()
    for number in range(3):
        store.put(key(number), kv(number))
    first, (name, data), last = members_of(exported(store)[0])
    for position in (3, 9, 20, 60, len(data) - 1):  # magic, length, seal, description, block
        broken = bytearray(data)
        broken[position] ^= 1
        done = imported(tar_of(first, (name, bytes(broken)), last), MemoryStore())
        assert (done.entries, done.damaged, done.complete) == (2, 1, True), position


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:30]])
def test_an_entry_of_another_size_is_damaged(target, change):
    store = MemoryStore()
    store.put(key(1), kv(1))
    [(name, data)] = members_of(exported(store)[0])
    done = imported(tar_of((name, change(data))), target)
    assert (done.entries, done.damaged, done.complete) == (0, 1, True)


def test_an_entry_under_the_name_of_another_is_damaged(target):
    store = MemoryStore()
    store.put(key(1), kv(1))
    [(_, data)] = members_of(exported(store)[0])
    assert imported(tar_of((f"{key(2).digest}.ckv", data)), target).damaged == 1
    assert target.stats().entries == 0


def test_an_entry_that_is_too_large_is_left_out(target, monkeypatch):
    store = MemoryStore()
    store.put(key(1), kv(1))
    data, _ = exported(store)
    monkeypatch.setattr(transfer, "MAX_ENTRY", 100)
    assert imported(data, target).damaged == 1


def test_an_entry_that_would_decompress_to_too_much_is_left_out(target, monkeypatch):
    header, blocks = encode(key(1), kv(*range(9000)), True, None, None)
    data = tar_of((f"{key(1).digest}.ckv", header + b"".join(blocks)))
    assert imported(data, MemoryStore()).entries == 1
    monkeypatch.setattr(transfer, "MAX_ENTRY", 100_000)
    assert len(data) < 100_000 < 9000 * 16
    assert imported(data, target).damaged == 1


def test_other_members_are_left_out_and_nothing_is_written_by_their_names(tmp_path, target, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = MemoryStore()
    store.put(key(1), kv(1))
    [(name, data)] = members_of(exported(store)[0])
    folder, link = tarfile.TarInfo("folder"), tarfile.TarInfo(f"{key(3).digest}.ckv")
    folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
    members = ((folder, b""), (link, b""), ("../up.ckv", b"x" * 600), ("/abs.txt", b""), (f"../../{name}", data))
    done = imported(tar_of(*members), target)
    assert (done.entries, done.damaged, done.other, done.complete) == (1, 0, 2, True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_cut_off_gives_what_it_has():
    store = MemoryStore()
    for number in range(3):
        store.put(key(number), kv(number))
    data, _ = exported(store)
    for end, entries, damaged in ((len(data) - 1024, 3, 0), (len(data) - 1030, 3, 0), (512 + 40, 0, 1)):
        done = imported(data[:end], MemoryStore())
        assert (done.entries, done.damaged, done.complete) == (entries, damaged, False)


@pytest.mark.parametrize("data", [b"", b"no tar file", b"\x1f\x8b" + b"x" * 2000])
def test_what_is_no_tar_file_is_refused(target, data):
    with pytest.raises(InputError, match="no tar file"):
        imported(data, target)


def test_a_sealed_entry_needs_the_secret(tmp_path, target):
    store = open_tier("disk", tmp_path, secret="s")
    store.put(key(1), kv(1))
    data, done = exported(store)
    assert done.entries == 1
    assert imported(data, target).damaged == 1  # no secret
    assert imported(data, disk_store(tmp_path / "b", secret="other")).damaged == 1
    assert imported(data, disk_store(tmp_path / "c", secret="s")).entries == 1


def test_a_store_in_memory_seals_with_the_secret_of_the_environment(monkeypatch):
    store = MemoryStore()
    store.put(key(1), kv(1))
    monkeypatch.setenv("CHUNKCACHE_SECRET", "s")
    data, _ = exported(store)
    assert imported(data, MemoryStore()).entries == 1
    monkeypatch.delenv("CHUNKCACHE_SECRET")
    assert imported(data, MemoryStore()).damaged == 1


def test_what_had_expired_is_left_out(tmp_path, target, monkeypatch):
    store = open_tier("disk", tmp_path, ttl=1000)
    store.put(key(1), kv(1))
    data, _ = exported(store)
    assert imported(data, MemoryStore()).entries == 1
    later = time.time() + 2000
    monkeypatch.setattr(time, "time", lambda: later)
    assert imported(data, target).expired == 1


def test_what_the_store_refuses_is_counted(target):
    store = MemoryStore()
    store.put(key(1), kv(*range(100)))
    data, _ = exported(store)
    assert imported(data, memory_store(64)).refused == 1


def test_progress_is_reported():
    store, seen = MemoryStore(), []
    for number in range(3):
        store.put(key(number), kv(number))
    file = io.BytesIO()
    export_entries(store, file, on_entry=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    file.seek(0)
    counts = []
    import_entries(MemoryStore(), file, lambda done: counts.append(done.entries))
    assert counts == [1, 2, 3]
