"""The disk tier: one file per chunk, in a folder that any number of processes may share."""

# ruff: noqa: D102 - what a method does that is inherited is said where it is declared

from __future__ import annotations

import logging
import os
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch

from chunkcache.errors import EntryLostError, StoreURLError
from chunkcache.kv import ChunkKey, Origin
from chunkcache.store.budget import UNBOUNDED, Budget
from chunkcache.store.budgeted import BudgetedTier
from chunkcache.store.bytestore import RAW, ByteStore, Encoding
from chunkcache.store.entry import PREAMBLE, DamagedError, description_length
from chunkcache.store.ledger import Ledger
from chunkcache.store.records import EVERYTHING, Entry, EntryFilter

logger = logging.getLogger("chunkcache.store")
_SUFFIX = ".ckv"
_DIGEST = re.compile("[0-9a-f]{64}")
_STALE_S = 3600.0  # age of a temporary file whose writer was killed


class DiskStore(BudgetedTier, ByteStore):
    """Chunk KV in files `<folder>/<first two digits>/<key>.ckv`, within a byte budget.

    A file is written under a temporary name, synced and renamed, so that a reader sees all of it or nothing, also if
    the writer is killed. Layers are read, not mapped: mapped bytes can change after they were verified, and a file
    that is truncated under the map kills the process.

    `index.sqlite` beside them is the ledger, which also holds the tombstones. No entry is read through it. It is
    brought into line with the files when the store is opened, and written again if it is lost.

    Args:
        path: the folder; it is made if it is missing.
        budget: what is kept.
        encoding: how.
        sync: whether files are synced before they count: `yes`, or `no`, where a power cut may cost entries, which
            are then found damaged.

    Raises:
        StoreURLError: the folder cannot be made or used, or a value is none of these.
    """

    faults: ClassVar[tuple[type[Exception], ...]] = (OSError, sqlite3.Error)
    waits: ClassVar[bool] = False  # the system reads ahead
    _ledger: Ledger

    def __init__(self, path: str, budget: Budget = UNBOUNDED, encoding: Encoding = RAW, sync: str = "yes") -> None:
        super().__init__(budget, encoding)
        if sync not in ("yes", "no"):
            raise StoreURLError(f"sync={sync!r} is neither 'yes' nor 'no'")
        self._sync = sync == "yes"
        self._writing = threading.Lock()  # room is made and used by one thread at a time
        self.folder = Path(path).expanduser()
        self._new = self.folder / "new"
        try:
            self._new.mkdir(parents=True, exist_ok=True)
            self._drop_stale()
            self._open_index()
        except (OSError, sqlite3.Error) as error:
            raise StoreURLError(f"{self.folder} cannot be used as a store ({error}); pass another folder") from None

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self._ledger.close()

    def path(self, key: ChunkKey) -> Path:
        """Return the file of the entry under `key`."""
        return self.folder / key.digest[:2] / f"{key.digest}{_SUFFIX}"

    def _is_current(self, key: ChunkKey) -> bool:
        if not os.path.exists(self.path(key)):
            return False
        current = None
        if self.keyring is None:  # the index does not say which entries are encrypted
            with suppress(sqlite3.Error):  # the header says it, too
                current = self._ledger.is_current(key)
        return super()._is_current(key) if current is None else current

    def _open(self, key: ChunkKey) -> DiskBlob | None:
        try:
            blob = DiskBlob(self.path(key))
            blob.read_ahead()
            return blob
        except FileNotFoundError:
            self._drop_row(key)  # another process deleted the file
            return None
        except DamagedError as damage:
            raise EntryLostError(key, str(damage)) from None

    def _save(self, entry: Entry, header: bytes, blocks: Sequence[memoryview]) -> bool:
        with self._writing:
            if not self._make_room(entry):
                return False
            self._write_file(self.path(entry.key), (header, *blocks))
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
        self._drop_row(key)
        try:
            os.unlink(self.path(key))
        except FileNotFoundError:
            return False
        return True

    def _totals(self) -> tuple[int, int]:
        return self._attempt(super()._totals, (0, 0))

    def _drop_row(self, key: ChunkKey) -> None:
        with suppress(sqlite3.OperationalError):  # a full disk, on which reading and deleting must go on
            self._ledger.drop(key)

    def _record_deletion(self, what: ChunkKey | EntryFilter) -> None:
        super()._record_deletion(what)
        with suppress(sqlite3.Error):  # the tombstones in memory already cover this process
            self._ledger.tombstones.add(what)

    def _is_deleted(self, key: ChunkKey, origin: Origin) -> bool:
        with suppress(sqlite3.Error):
            return super()._is_deleted(key, origin) or self._ledger.tombstones.is_deleted(key, origin)
        return False

    def _reconcile(self) -> None:
        """Bring the index into line with the files: a writer that was killed can have left one without the other."""
        for key in self._ledger.known_keys():
            if not os.path.exists(self.path(key)):
                self._ledger.drop(key)
        unknown = list(ByteStore._entries(self, EVERYTHING))
        self._ledger.add_all(unknown)
        for entry in unknown:
            if self._is_deleted(entry.key, entry):
                self._remove(entry.key)

    def _headers(self) -> Iterator[tuple[ChunkKey, bytes]]:
        """Yield those of the files that the index does not know."""
        known = self._ledger.known_keys()
        for path in self.folder.glob(f"??/*{_SUFFIX}"):
            key = ChunkKey(path.stem)
            if key in known or self.path(key) != path or not _DIGEST.fullmatch(key.digest):
                continue
            try:
                yield key, DiskBlob(path).header
            except OSError:
                continue  # deleted meanwhile, or not readable
            except DamagedError as damage:
                self.drop_damaged(key, str(damage))

    def _open_index(self) -> None:
        index = self.folder / "index.sqlite"
        try:
            self._ledger = Ledger(self.budget, index)
            self._reconcile()
        except sqlite3.OperationalError:  # locked, or not writable
            raise
        except sqlite3.DatabaseError:
            logger.warning("the index of the disk tier is damaged, or of another version: it is written again")
            for part in self.folder.glob("index.sqlite*"):
                part.unlink(missing_ok=True)
            self._ledger = Ledger(self.budget, index)
            self._reconcile()

    def _drop_stale(self) -> None:
        """Delete the temporary files of writers that were killed."""
        for path in self._new.iterdir():
            with suppress(OSError):  # it has gone, or is nothing of ours
                if path.stat().st_mtime < time.time() - _STALE_S:
                    path.unlink()


class DiskBlob:
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
        start, filled = len(self.header) + sum(sizes[:index]), 0
        while filled < len(buffer):
            nbytes = os.preadv(self._fd, [buffer[filled:]], start + filled)
            if not nbytes:
                raise DamagedError(f"the file ends {len(buffer) - filled} bytes too early")
            filled += nbytes
        return buffer

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)
