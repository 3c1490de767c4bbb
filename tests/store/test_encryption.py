"""Entries that are encrypted at rest: nothing of them can be read, nor changed without being noticed."""

from __future__ import annotations

import base64
import io
import json
import sqlite3
import sys

import helpers_redis
import pytest
import torch
from support.store import disk_store, key, kv, memory_store, random_kv, same, with_options

from chunkcache.errors import EntryLostError, InputError, StoreURLError
from chunkcache.kv import ChunkKV
from chunkcache.store import DiskStore, RedisStore, TieredStore, open_store
from chunkcache.store.encryption import KEYS, OVERHEAD, Keyring, new_key, parse_keys
from chunkcache.store.entry import ENCRYPTED, MAGIC, PREAMBLE, DamagedError, ForeignSealError, Header, encode
from chunkcache.store.transfer import export_entries, import_entries

server, shared_server = helpers_redis.server, helpers_redis.shared_server


def encoded(number):
    return base64.b64encode(bytes([number]) * 32).decode()


ONE, TWO, OTHER_ONE = (f"{name}:{encoded(number)}" for name, number in (("one", 1), ("two", 2), ("one", 3)))


# Lists of keys


@pytest.mark.parametrize("text", [f"{ONE},{TWO}", f"{ONE}\n{TWO}\n", f" {ONE} ,\r\n\n {TWO},"])
def test_keys_stand_with_commas_or_line_breaks_between(text):
    assert parse_keys(text, "it") == {"one": bytes([1]) * 32, "two": bytes([2]) * 32}
    assert list(parse_keys(text, "it")) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "key 1 of it"),
        (" \n", "key 1 of it"),
        (encoded(9), "key 1 of it"),
        (f"{ONE},{encoded(9)}", "key 2 of it"),
        (f":{encoded(9)}", "key 1 of it"),
        (f"{encoded(9)}:one", "key 1 of it"),
        ("one:", "key 1 of it"),
        (f"one:{encoded(9)}!", "'one' of it is not base64"),
        (f"one:{encoded(9)[:-1]}", "'one' of it is not base64"),
        (f"one:é{encoded(9)}", "'one' of it is not base64"),
        (f"one:{base64.b64encode(bytes([9]) * 31).decode()}", "'one' of it has 31 bytes"),
        (f"one:{base64.b64encode(bytes([9]) * 33).decode()}", "'one' of it has 33 bytes"),
        (f"{ONE},two:{encoded(9)},{ONE}", "two keys of the id 'one'"),
    ],
)
def test_a_bad_key_is_named_by_its_id_and_not_shown(text, says):
    with pytest.raises(StoreURLError, match=says) as raised:
        parse_keys(text, "it")
    assert encoded(9)[:8] not in str(raised.value)


def test_a_new_key_is_random_and_can_be_listed():
    line, other = new_key("a-1"), new_key("a-1")
    assert line != other
    assert len(parse_keys(line, "it")["a-1"]) == 32
    for bad in ("", "a b", "a:b", "é", "a" * 33):
        with pytest.raises(StoreURLError, match="id of a key"):
            new_key(bad)


def test_the_command_line_makes_a_key(command_line):
    code, out, _ = command_line("store", "key", "--id", "a-1")
    assert code == 0
    assert list(parse_keys(out, "it")) == ["a-1"]
    code, out, _ = command_line("store", "key")
    assert code == 0
    assert len(parse_keys(out, "it")) == 1


def test_bad_keys_stop_a_store_from_opening(tmp_path, monkeypatch):
    folder, path = tmp_path / "store", tmp_path / "keys"
    for content, says in ((b"one:x", "'one'"), (b"", "key 1"), (b"one:\xff", "ASCII")):
        path.write_bytes(content)
        with pytest.raises(StoreURLError, match=says):
            open_store(f"disk://{folder}?encryption_key_file={path}")
    for missing in (tmp_path / "none", ""):
        with pytest.raises(StoreURLError, match="cannot be read"):
            open_store(f"disk://{folder}?encryption_key_file={missing}")
    monkeypatch.setenv(KEYS, "one:x")
    with pytest.raises(StoreURLError, match=KEYS):
        open_store("redis://127.0.0.1:1")
    assert not folder.exists()


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setenv(KEYS, ONE)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(InputError, match=r"chunkcache\[encryption\]"):
        disk_store(tmp_path / "store")


# The format


@pytest.fixture
def keyring():
    pytest.importorskip("cryptography")
    return Keyring(parse_keys(f"{ONE},{TWO}", "it"))


def encrypted(keyring, chunk_kv, name=1):
    header, blocks = encode(key(name), chunk_kv, False, None, None)
    header, blocks = keyring.encrypt(key(name), header, blocks)
    return header, [bytes(block) for block in blocks]


def test_an_entry_is_encrypted_part_by_part_and_decrypted_in_any_order(keyring):
    made = random_kv()
    plain, plain_blocks = encode(key(1), made, False, None, None)
    header, blocks = encrypted(keyring, made)
    assert header.startswith(ENCRYPTED)
    assert [len(block) for block in blocks] == [len(block) + OVERHEAD for block in plain_blocks]
    opened = keyring.open(key(1), header)
    assert opened.header == plain
    for index in (2, 0, 1, 0):
        assert bytes(opened.block(index, blocks[index])) == bytes(plain_blocks[index])
    opened.block(0, blocks[0])[0] = 7  # a buffer of the reader's own


def test_no_two_writes_are_alike(keyring):
    made = random_kv()
    (header, blocks), (other, other_blocks) = encrypted(keyring, made), encrypted(keyring, made)
    nonces = [part[:12] for part in (*blocks, *other_blocks)]
    assert len(set(nonces)) == len(nonces)
    assert header[PREAMBLE - 32 : PREAMBLE] != other[PREAMBLE - 32 : PREAMBLE]


def test_a_part_stands_in_for_no_other(keyring):
    made = random_kv()
    header, blocks = encrypted(keyring, made)
    _, earlier = encrypted(keyring, made)
    _, foreign = encrypted(keyring, made, name=2)
    opened = keyring.open(key(1), header)
    for index, block in ((0, blocks[1]), (1, blocks[0]), (0, earlier[0]), (0, foreign[0]), (2, b""), (2, b"x" * 28)):
        with pytest.raises(DamagedError):
            opened.block(index, block)
    with pytest.raises(DamagedError):
        keyring.open(key(2), header)


def test_a_changed_byte_is_noticed_wherever_it_is(keyring):
    header, blocks = encrypted(keyring, random_kv(tokens=1, dim=2))
    opened = keyring.open(key(1), header)
    for position in range(len(blocks[0])):
        changed = bytearray(blocks[0])
        changed[position] ^= 1
        with pytest.raises(DamagedError):
            opened.block(0, changed)
    for position in range(len(header)):
        changed = bytearray(header)
        changed[position] ^= 1
        with pytest.raises(DamagedError):
            Header.parse(keyring.open(key(1), bytes(changed)).header, key(1), None)
    for end in range(len(header)):
        with pytest.raises(DamagedError):
            keyring.open(key(1), header[:end])


def test_a_key_that_is_not_there_is_told_from_damage(keyring):
    header, _ = encrypted(keyring, random_kv())
    for keys in (TWO, OTHER_ONE, f"{TWO},{OTHER_ONE}"):
        with pytest.raises(ForeignSealError, match="does not have"):
            Keyring(parse_keys(keys, "it")).open(key(1), header)
    with pytest.raises(ForeignSealError, match="not encrypted"):
        keyring.open(key(1), encode(key(1), random_kv(), False, None, None)[0])
    with pytest.raises(ForeignSealError, match="no keys"):
        Header.parse(header, key(1), None)


# Stores


class OnDisk:
    """A folder, as a place that stores are opened at."""

    def __init__(self, tmp_path):
        self.folder = tmp_path / "store"

    def open(self, **options):
        return with_options(DiskStore, path=str(self.folder), sync="no", **options)

    def values(self):
        """Return header and layers, as bytes, of all entries."""
        return [path.read_bytes() for path in self.folder.rglob("*") if path.is_file()]

    def change(self, position):
        """Change a byte, counted from the end, of the last layer of the entry."""
        [path] = self.folder.glob("??/*.ckv")
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)

    def swap_last_layers(self, nbytes):
        """Swap the last two blocks, of `nbytes` bytes each."""
        [path] = self.folder.glob("??/*.ckv")
        data = path.read_bytes()
        path.write_bytes(data[: -2 * nbytes] + data[-nbytes:] + data[-2 * nbytes : -nbytes])


class OnRedis:
    """A server, likewise."""

    def __init__(self, server):
        self._client, self._url = server.client, server.url

    def open(self, **options):
        return with_options(RedisStore, url=self._url, timeout=10.0, **options)

    def _names(self, end):
        return sorted(name for name in self._client.scan_iter() if name.endswith(end))

    def values(self):
        return [self._client.get(name) for name in [*self._names(b":h"), *self._names((b"0", b"1", b"2"))]]

    def change(self, position):
        [name] = self._names(b":2")
        data = bytearray(self._client.get(name))
        data[position] ^= 1
        self._client.set(name, bytes(data))

    def swap_last_layers(self, nbytes):
        [one], [two] = self._names(b":1"), self._names(b":2")
        values = self._client.mget(one, two)
        self._client.mset({one: values[1], two: values[0]})


@pytest.fixture(params=["disk", "redis"])
def place(request, tmp_path):
    pytest.importorskip("cryptography")
    return OnDisk(tmp_path) if request.param == "disk" else OnRedis(request.getfixturevalue("server"))


@pytest.fixture
def opened(place, tmp_path):
    """Open stores at the place with some keys, which are closed after the test."""
    stores = []

    def open_one(*keys, **options):
        if keys:
            path = tmp_path / f"keys{len(stores)}"
            path.write_text("\n".join(keys))
            options["encryption_key_file"] = str(path)
        stores.append(place.open(**options))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.mark.parametrize(
    "options", [{}, {"compress": "zstd"}, {"secret": "s"}, {"codec": "bf16"}], ids=["plain", "zstd", "sealed", "bf16"]
)
def test_what_was_put_is_got(opened, options):
    made = random_kv(dtype=torch.bfloat16)
    assert opened(ONE, **options).put(key(1), made)
    store = opened(ONE, **options)
    assert key(1) in store
    got = store.get(key(1), range(5))
    assert torch.equal(got.layers[2], made.layers[2])  # each layer by itself
    assert same(got, made)
    assert [entry.key for entry in store.entries()] == [key(1)]
    assert (store.stats().hits, store.stats().entries) == (1, 1)


def test_nothing_of_the_entry_is_in_what_is_stored(place, opened):
    token_ids = tuple(range(31_000, 31_064))
    layers = [torch.randn(2, 2, 64, 8) for _ in range(3)]
    made = ChunkKV.of(token_ids, 3, layers)
    for store in (opened(ONE), opened()):
        store.clear()
        assert store.put(key(1), made)
        store.close()
        stored = b"".join(place.values())
        kv_bytes = [layer[part, 1, 7].numpy().tobytes() for layer in layers for part in (0, 1)]
        ids = [json.dumps(token_ids[:8], separators=(",", ":"))[1:-1].encode()]
        ids += [torch.tensor(token_ids[:4], dtype=dtype).numpy().tobytes() for dtype in (torch.int32, torch.int64)]
        seen = sum(piece in stored for piece in kv_bytes), sum(piece in stored for piece in ids)
        assert seen == ((0, 0) if store.keyring is not None else (6, 1))


def test_the_keys_may_come_from_the_environment(opened, monkeypatch):
    monkeypatch.setenv(KEYS, f"{ONE},{TWO}")
    opened().put(key(1), kv(1))
    assert opened(TWO).get(key(1), [1]) is None  # a file goes before the environment
    monkeypatch.delenv(KEYS)
    assert same(opened(ONE).get(key(1), [1]), kv(1))


def test_keys_are_rotated_by_putting_a_new_one_first(opened):
    opened(ONE).put(key(1), kv(1))
    both = opened(TWO, ONE)
    both.put(key(2), kv(2))
    assert same(both.get(key(1), [1]), kv(1))
    assert same(both.get(key(2), [2]), kv(2))
    after = opened(TWO)
    assert after.get(key(1), [1]) is None
    assert same(after.get(key(2), [2]), kv(2))


@pytest.mark.parametrize(
    ("writer", "reader", "says"),
    [
        ([ONE], [TWO], "under a key"),
        ([ONE], [OTHER_ONE], "under a key"),
        ([ONE], [], "no keys"),
        ([], [ONE], "not encrypted"),
    ],
    ids=["unknown id", "wrong key", "no keys", "not encrypted"],
)
def test_an_entry_of_another_key_is_a_miss_that_stays(opened, writer, reader, says, caplog):
    for number in (1, 2):
        opened(*writer).put(key(number), kv(number))
    store = opened(*reader)
    for number in (1, 2, 1):
        assert store.get(key(number), [number]) is None
    if reader:
        assert key(1) not in store
    stats = store.stats()
    assert (stats.hits, stats.misses, stats.damaged, stats.errors) == (0, 3, 0, 0)
    assert stats.mismatches >= 3
    assert caplog.text.count(says) == len(caplog.records) == 1
    assert not any(encoded(number) in caplog.text for number in (1, 2, 3))
    assert same(opened(*writer).get(key(1), [1]), kv(1))
    store.put(key(1), kv(1, fill=2.0))  # computed again
    assert same(store.get(key(1), [1]), kv(1, fill=2.0))


@pytest.mark.parametrize("harm", ["changed", "swapped"])
def test_a_damaged_layer_is_lost_and_counted(place, opened, harm, caplog):
    store = opened(ONE)
    made = random_kv()
    store.put(key(1), made)
    if harm == "changed":
        place.change(-20)
    else:
        place.swap_last_layers(made.layers[0].nbytes + OVERHEAD)
    got = store.get(key(1), range(5))
    assert torch.equal(got.layers[0], made.layers[0])
    with pytest.raises(EntryLostError, match="does not decrypt"):
        [got.layers[1], got.layers[2]]
    assert (store.stats().hits, store.stats().misses, store.stats().damaged) == (0, 1, 1)
    assert store.get(key(1), range(5)) is None
    assert len(caplog.records) == 1
    assert encoded(1) not in caplog.text


def test_a_layer_of_an_earlier_write_is_lost(tmp_path):
    pytest.importorskip("cryptography")
    path = tmp_path / "keys"
    path.write_text(ONE)
    made = random_kv()
    with disk_store(tmp_path / "store", encryption_key_file=str(path)) as store:
        store.put(key(1), made)
        earlier = store.path(key(1)).read_bytes()
        store.put(key(1), made)
        nbytes = made.layers[0].nbytes + OVERHEAD
        store.path(key(1)).write_bytes(store.path(key(1)).read_bytes()[:-nbytes] + earlier[-nbytes:])
        got = store.get(key(1), range(5))
        with pytest.raises(EntryLostError, match="does not decrypt"):
            got.layers[2]


def test_the_index_is_written_again_from_encrypted_entries(tmp_path, monkeypatch):
    pytest.importorskip("cryptography")
    monkeypatch.setenv(KEYS, ONE)
    with disk_store(tmp_path / "store") as store:
        store.put(key(1), kv(1, tenant="t"))
        before = store.stats().nbytes
    (tmp_path / "store" / "index.sqlite").unlink()
    with disk_store(tmp_path / "store") as store:
        assert store.stats().nbytes == before == kv(1).nbytes
        assert [entry.tenant for entry in store.entries()] == ["t"]
    with sqlite3.connect(tmp_path / "store" / "index.sqlite") as index:
        assert index.execute("SELECT count(*) FROM entries").fetchone() == (1,)
    index.close()


def test_tiers_share_the_keys_and_promote_what_they_decrypt(tmp_path, monkeypatch):
    pytest.importorskip("cryptography")
    monkeypatch.setenv(KEYS, ONE)
    made = random_kv()
    with TieredStore([memory_store(), disk_store(tmp_path / "store")]) as store:
        store.put(key(1), made)
    with TieredStore([memory_store(), disk_store(tmp_path / "store")]) as store:
        assert same(store.get(key(1), range(5)), made)
        store.flush()
        assert key(1) in store.tiers()["memory"]


# Export and import


@pytest.fixture
def keyed(tmp_path, monkeypatch):
    """Open a disk tier in a new folder with keys of the environment."""
    pytest.importorskip("cryptography")

    def open_one(*keys):
        monkeypatch.setenv(KEYS, ",".join(keys))
        return disk_store(tmp_path / str(len(list(tmp_path.iterdir()))))

    return open_one


def moved(source, target):
    file = io.BytesIO()
    done = export_entries(source, file)
    return file.getvalue(), done, import_entries(target, io.BytesIO(file.getvalue()))


def test_an_export_is_encrypted_like_its_store(keyed):
    made = random_kv()
    source = keyed(ONE)
    source.put(key(1), made)
    target = keyed(TWO, ONE)
    data, done, counts = moved(source, target)
    assert (done.entries, done.lost, counts.entries, counts.damaged) == (1, 0, 1, 0)
    assert same(target.get(key(1), range(5)), made)
    assert MAGIC not in data
    assert made.layers[0][0, 0, 0].numpy().tobytes() not in data


@pytest.mark.parametrize("reader", [[TWO], [OTHER_ONE], []], ids=["unknown id", "wrong key", "no keys"])
def test_an_export_of_another_key_is_left_out(keyed, reader):
    source = keyed(ONE)
    source.put(key(1), kv(1))
    _, _, counts = moved(source, keyed(*reader))
    assert (counts.entries, counts.damaged) == (0, 1)


def test_a_changed_byte_of_an_export_is_noticed(keyed):
    source = keyed(ONE)
    source.put(key(1), kv(1))
    target = keyed(ONE)
    data, _, _ = moved(source, memory_store())
    length = 512 + len(source.path(key(1)).read_bytes())
    for position in range(512, length, 7):
        changed = bytearray(data)
        changed[position] ^= 1
        counts = import_entries(target, io.BytesIO(bytes(changed)))
        assert (counts.entries, counts.damaged) == (0, 1)


def test_a_store_that_was_not_encrypted_gets_into_one_that_is(keyed):
    source = keyed()
    source.put(key(1), kv(1))
    data, _, _ = moved(source, memory_store())
    target = keyed(ONE)
    assert import_entries(target, io.BytesIO(data)).entries == 1
    assert same(target.get(key(1), [1]), kv(1))
    assert target.path(key(1)).read_bytes().startswith(ENCRYPTED)
