"""The disk tier: one file per chunk, in a folder that any number of processes may share."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from chunkcache.errors import EntryLostError, StoreURLError
from chunkcache.kv import ChunkKey
from chunkcache.store.base import EVERYTHING, Entry, EntryFilter, StoreStats
from chunkcache.store.bytestore import ByteStore
from chunkcache.store.entry import PREAMBLE, DamagedError, description_length
from chunkcache.store.ledger import Ledger

logger = logging.getLogger("chunkcache.store")
_SUFFIX = ".ckv"
_DIGEST = re.compile("[0-9a-f]{64}")
_STALE_S = 3600.0  # age of a temporary file that nobody is still writing


class DiskStore(ByteStore):
    """Chunk KV in files `<folder>/<first two digits>/<key>.ckv`, within a byte budget.

    A file is written under a temporary name, synced and renamed, so that a reader sees all of it or nothing, whatever
    kills the writer. Layers are read, not mapped: what is mapped can still change after it was verified, and a file
    that is cut short under the map kills the process.

    `index.sqlite` beside them says what is held, how often it was used, and what was deleted. No entry is read
    through it. It is brought into line with the files when the store is opened, and written again if it is lost.

    Args:
        path: the folder; it is made if it is missing.
        sync: whether files are synced before they count: `yes`, or `no`, where a power cut may cost entries, which
            are then found damaged.

    The others are those of `ByteStore` and `Ledger`.

    Raises:
        StoreURLError: the folder cannot be made or used, or a value is none of these.
    """

    faults: ClassVar[tuple[type[Exception], ...]] = (OSError, sqlite3.Error)
    waits: ClassVar[bool] = False  # the system reads ahead

    def __init__(
        self,
        path: str,
        max_bytes: int | None = None,
        evict: str = "lru",
        admit: str = "all",
        tenant_bytes: int | None = None,
        codec: str = "raw",
        compress: str = "none",
        ttl: float | None = None,
        secret: str = "",
        sync: str = "yes",
    ) -> None:
        super().__init__(max_bytes, codec, compress, ttl, secret)
        if sync not in ("yes", "no"):
            raise StoreURLError(f"sync={sync!r} is neither 'yes' nor 'no'")
        self._sync = sync == "yes"
        self._writing = threading.Lock()  # room is made and used by one thread at a time
        self.folder = Path(path).expanduser()
        self._new = self.folder / "new"
        try:
            self._new.mkdir(parents=True, exist_ok=True)
            self._drop_stale()
            index = self.folder / "index.sqlite"
            self._open_index(partial(Ledger, max_bytes, evict, admit, tenant_bytes, index))
        except (OSError, sqlite3.Error) as error:
            raise StoreURLError(f"{self.folder} cannot be used as a store ({error}); pass another folder") from None

    def delete(self, key: ChunkKey) -> bool:
        self._bury(key)
        return super().delete(key)

    def purge(self, where: EntryFilter = EVERYTHING) -> int:
        self._bury(where)
        return super().purge(where)

    def credit(self, key: ChunkKey, worth: float) -> None:
        self._attempt(lambda: self._ledger.credit(key, worth), None)

    def pin(self, key: ChunkKey, pinned: bool = True) -> None:
        self._attempt(lambda: self._ledger.pin(key, pinned), None)

    def stats(self) -> StoreStats:
        entries, nbytes = self._attempt(self._ledger.totals, (0, 0))
        with self._stats_lock:
            return replace(self._stats, entries=entries, nbytes=nbytes)

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self._ledger.close()

    def __contains__(self, key: ChunkKey) -> bool:
        return os.path.exists(self._path(key))

    def _note(self, key: ChunkKey, hit: bool) -> None:
        self._ledger.asked(key)
        if hit:
            self._ledger.use(key)

    def _open(self, key: ChunkKey) -> _File | None:
        try:
            file = _File(self._path(key))
            file.read_ahead()
            return file
        except FileNotFoundError:
            self._strike_out(key)  # somebody else deleted it
            return None
        except DamagedError as damage:
            raise EntryLostError(key, str(damage)) from None

    def _save(self, entry: Entry, header: bytes, blocks: Sequence[memoryview]) -> bool:
        with self._writing:
            for gone in self._ledger.expired(time.time()):
                self.count(expired=self._remove(gone))
            victims = self._ledger.victims(entry)
            if victims is None:
                return False
            for victim in victims:
                self.count(evictions=self._remove(victim))
            self._write_file(self._path(entry.key), (header, *blocks))
            self._ledger.add(entry)
        return True

    def _write_file(self, path: Path, parts: Sequence[bytes | memoryview]) -> None:
        path.parent.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._new, suffix=_SUFFIX)
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(parts)
                file.flush()
                if self._sync:
                    os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        if self._sync:  # the name, too, has to survive
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _remove(self, key: ChunkKey) -> bool:
        self._strike_out(key)
        try:
            os.unlink(self._path(key))
        except FileNotFoundError:
            return False
        return True

    def _strike_out(self, key: ChunkKey) -> None:
        with suppress(sqlite3.OperationalError):  # on a full disk, where reading and deleting must be possible
            self._ledger.drop(key)

    def _bury(self, what: ChunkKey | EntryFilter) -> None:
        """Let every process know that `what` is deleted."""
        with suppress(sqlite3.Error):  # here it is known in any case
            self._ledger.bury(what)

    def _buried(self, entry: Entry) -> bool:
        with suppress(sqlite3.Error):
            return super()._buried(entry) or self._ledger.buried(entry)
        return False

    def _entries(self, where: EntryFilter) -> Iterable[Entry]:
        return self._ledger.entries(where)

    def _reconcile(self) -> None:
        """Bring the index into line with the files: a writer that was killed can have left one without the other."""
        for key in self._ledger.known():
            if key not in self:
                self._ledger.drop(key)
        found = list(super()._entries(EVERYTHING))
        self._ledger.add_all(found)
        for entry in found:
            if self._buried(entry):  # nobody knew of it when it was deleted
                self._remove(entry.key)

    def _headers(self) -> Iterator[tuple[ChunkKey, bytes]]:
        """Yield those that the index does not know."""
        known = self._ledger.known()
        for path in self.folder.glob(f"??/*{_SUFFIX}"):
            key = ChunkKey(path.stem)
            if key in known or self._path(key) != path or not _DIGEST.fullmatch(key.digest):
                continue
            try:
                yield key, _File(path).header
            except OSError:
                continue  # deleted meanwhile, or nothing that one can read
            except DamagedError as damage:
                self.lose(key, str(damage))

    def _path(self, key: ChunkKey) -> Path:
        return self.folder / key.digest[:2] / f"{key.digest}{_SUFFIX}"

    def _open_index(self, new_ledger: Callable[[], Ledger]) -> None:
        try:
            self._ledger = new_ledger()
            self._reconcile()
        except sqlite3.OperationalError:  # it is locked, or must not be written to
            raise
        except sqlite3.DatabaseError:
            logger.warning("the index of the disk tier is damaged, or of another version: it is written again")
            for part in self.folder.glob("index.sqlite*"):
                part.unlink(missing_ok=True)
            self._ledger = new_ledger()
            self._reconcile()

    def _drop_stale(self) -> None:
        """Delete what writers that were killed have left."""
        for path in self._new.iterdir():
            with suppress(OSError):  # it has gone, or is nothing of ours
                if path.stat().st_mtime < time.time() - _STALE_S:
                    path.unlink()


class _File:
    """An entry in a file that is open: it can be read to its end also when it is deleted meanwhile."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        length = description_length(preamble := os.pread(self._fd, PREAMBLE, 0))
        self.header = preamble + os.pread(self._fd, length, PREAMBLE)

    def read_ahead(self) -> None:
        """Let the system read the whole file into the page cache, meanwhile."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_WILLNEED)

    def block(self, index: int, sizes: Sequence[int]) -> Any:
        buffer = torch.empty(sizes[index], dtype=torch.uint8).numpy().data
        start, done = len(self.header) + sum(sizes[:index]), 0
        while done < len(buffer):
            read = os.preadv(self._fd, [buffer[done:]], start + done)
            if not read:
                raise DamagedError(f"the file ends {len(buffer) - done} bytes too early")
            done += read
        return buffer

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)
