"""LMCache's storage manager, as the LMCache tier needs it: named bytes go in, come out and are deleted.

LMCache 0.5.6 leaves some things to its caller. It never overwrites. It does not say whether an object has been
written below. Its Redis client never connects again, and one of the client's eight threads hangs for ever whenever a
value goes between being looked up and being loaded; against these two only a new storage manager helps.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch

from chunkcache.errors import StoreURLError
from chunkcache.kv import ChunkKey
from chunkcache.store.lmcache.below import MODEL, Unsaved, find_below
from chunkcache.store.lmcache.gate import Gate

PATIENCE_S = 0.5  # how long a deletion waits for LMCache to let go of an object
RENEW_S = 10.0  # the least time between two renewals
STUCK_S = 1.0  # an object that LMCache has not written below by then, and is not writing, is lost
HANGING_S = 3.0  # a question that LMCache has not answered by then is never answered
FLUSH_S = 5.0
FULL = 0.6  # of RAM; above it LMCache evicts


class Part(NamedTuple):
    """One object of an entry.

    Attributes:
        group: LMCache's object group, which tells the objects of an entry apart.
        nbytes: its size.
        version: start of the seal of its header, which tells it from the object of an entry that replaced this one.
    """

    group: int
    nbytes: int
    version: bytes = b""


class Manager:
    """One storage manager of LMCache, in this process; the arguments are those of `LMCacheStore`.

    Attributes:
        below: the L2 that the URL names, None if it names none.
    """

    def __init__(self, url: str, max_bytes: int, timeout: float) -> None:
        self.below = find_below(url, timeout)
        self._timeout = timeout
        self._lmcache = import_lmcache()
        self._max_bytes = max_bytes
        self._unsaved = Unsaved()
        self._asked: dict[Any, tuple[ChunkKey, float]] = {}  # what is not answered yet: for which entry, since when
        self._late: deque[Any] = deque()  # of these, the ones that no thread waits for any more
        self._wiping: Counter[ChunkKey] = Counter()
        self._asking = threading.Lock()
        self._attaching = threading.Lock()
        self._opening = threading.Lock()
        self._gate = Gate()
        self._renewed = -RENEW_S
        try:
            self._manager = self._open()
        except (OSError, RuntimeError, ValueError) as error:
            raise StoreURLError(f"LMCache cannot be opened with max_bytes={max_bytes} ({error})") from None

    def in_ram(self, key: ChunkKey, part: Part) -> memoryview | None:
        """Return a copy of one object if LMCache has it in RAM."""
        with self._gate:
            result = self._manager.query_prefetch_status(self._submit(key, [part], ram_only=True))
            if not result.hit_cells[0].popcount():
                return None
            name = self._name(key, part)
            buffer: Any = torch.empty(part.nbytes, dtype=torch.uint8).numpy()
            with self._manager.read_prefetched_results([name]) as objects:
                if objects is None:
                    return None
                memoryview(buffer)[:] = objects[0].byte_array.cast("B")
            self._manager.finish_read_prefetched([name])
            return memoryview(buffer)

    def ask(self, key: ChunkKey, parts: Sequence[Part]) -> Any:
        """Let LMCache start to bring objects, all of one size, from below into RAM; `wait` takes what this returns.

        Returns:
            None if there is nothing below, or the entry is just being deleted.

        Raises:
            OSError, redis.RedisError: the L2 is down.
        """
        if self.below is None:
            return None
        with self._gate:
            if not self._manager.l2_adapters() or self._hangs():
                self.reach()
            with self._asking:
                if key in self._wiping:
                    return None
                asked = self._submit(key, parts, ram_only=False)
                self._asked[asked] = key, time.monotonic()
                return asked

    def wait(self, asked: Any) -> bool:
        """Return whether all that was asked for was there, and is in RAM now.

        Raises:
            TimeoutError: no answer in time, or no room in RAM.
        """
        if asked is None:
            return False
        with self._gate:
            if asked not in self._asked:
                raise ConnectionError("LMCache was opened anew meanwhile")
            if not self._manager.wait_prefetch_status(asked, self._timeout):
                self.forget([asked])
                raise TimeoutError(f"LMCache has not answered within {self._timeout} s")
            result = self._manager.query_prefetch_status(asked)
            self._asked.pop(asked, None)
            if all(row.popcount() for row in result.hit_cells):
                return True
            used, size = self._manager.get_l1_usage()
            if result.found_cells and all(row.popcount() for row in result.found_cells) and used > FULL * size:
                raise TimeoutError("LMCache has no room in RAM for what it found")
            return False

    def forget(self, asked: Iterable[Any]) -> None:
        """Give up on what was asked for."""
        self._late.extend(asked)

    def write(self, key: ChunkKey, objects: Mapping[Part, memoryview]) -> bool:
        """Put objects into RAM, all at once, and let LMCache write them below; False if there is no room."""
        with self._gate:
            # Some may be left of an entry that was evicted in part:
            self._manager.delete_l1_keys([self._name(key, part) for part in objects])
            names = []
            for part, content in objects.items():
                name = self._name(key, part)
                space = self._manager.reserve_write([name], self._layout(part))
                if name not in space:
                    break
                space[name].byte_array.cast("B")[:] = content
                names.append(name)
            if self.below is not None:
                self._unsaved.add(names)
            self._manager.finish_write(names)
            if len(names) < len(objects):
                self.wipe(key, objects)  # there is no other way to give back a reservation
                return False
            return True

    def wipe(self, key: ChunkKey, parts: Iterable[Part]) -> None:
        """Delete objects, in RAM and below.

        Raises:
            TimeoutError: LMCache goes on reading one of them, or writing it below.
        """
        names = [self._name(key, part) for part in parts]
        deadline = time.monotonic() + PATIENCE_S
        with self._gate:
            with self._asking:
                self._wiping[key] += 1
            try:
                for asked, (whose, _) in list(self._asked.items()):
                    if whose == key:  # if it went while it is loaded, LMCache would hang
                        self._manager.wait_prefetch_status(asked, max(0.0, deadline - time.monotonic()))
                while self._manager.delete_l1_keys(names)[1]:
                    if time.monotonic() > deadline:
                        raise TimeoutError("LMCache does not let go of an entry that is to be deleted")
                    time.sleep(0.001)
                for _, adapter in self._manager.l2_adapters():
                    adapter.delete(names)
            finally:
                with self._asking:
                    self._wiping -= Counter([key])
            self._unsaved.drop(names)

    def reach(self) -> None:
        """Connect LMCache to the L2 if it is not; raises OSError or redis.RedisError if it cannot be."""
        if self.below is None:
            return
        self.below.check()
        with self._gate:
            if not self._manager.l2_adapters():
                self._attach()
            elif self.may_renew and (self._hangs() or (self._unsaved.age() > STUCK_S and not self._is_writing())):
                self.renew()

    @property
    def may_renew(self) -> bool:
        """Whether a new connection is worth trying."""
        return self.below is not None and self.below.connects and time.monotonic() > self._renewed + RENEW_S

    def renew(self) -> NoReturn:
        """Open LMCache anew, its RAM empty, as it reaches nothing below any more.

        Raises:
            ConnectionError: always; this takes LMCache some seconds.
        """
        if self._gate.shut():
            self._renewed = time.monotonic()
            threading.Thread(target=self._open_anew, daemon=True).start()
        raise ConnectionError("LMCache has lost its connection")

    def flush(self) -> bool:
        """Wait until what was written has reached what lies below; False if it has not."""
        deadline, idle = time.monotonic() + FLUSH_S, 0
        while self._unsaved and time.monotonic() < deadline and idle < 50:
            try:
                with self._gate:
                    idle = 0 if self._is_writing() else idle + 1  # when it stays idle, the rest has failed
            except ConnectionError:
                return False
            time.sleep(0.002)
        return not self._unsaved

    def close(self) -> None:
        """Stop LMCache's threads and give back its memory."""
        with self._opening:
            self._gate.shut()
            self._gate.wait_until_empty()
            self._manager.close()

    def _attach(self) -> None:
        with self._attaching:
            if self.below is None or self._manager.l2_adapters():
                return
            config = self._lmcache.adapters.get_l2_adapter_config_class(self.below.config["type"])
            try:
                self._manager.add_l2_adapter(config.from_dict(self.below.config))
            except RuntimeError as error:
                raise OSError(f"LMCache cannot use what lies below ({type(error).__name__})") from error

    def _open_anew(self) -> None:
        with self._opening:
            self._gate.wait_until_empty()
            self._manager.close()
            self._asked.clear()
            self._late.clear()
            self._unsaved.clear()
            self._manager = self._open()
            self._gate.open()

    def _hangs(self) -> bool:
        """Return whether LMCache owes an answer for too long; it keeps answers until they are asked for."""
        for _ in range(len(self._late)):
            with suppress(IndexError):  # another thread was faster
                late = self._late.popleft()
                if late not in self._asked:
                    continue
                if self._manager.query_prefetch_status(late) is None:
                    self._late.append(late)
                else:
                    self._asked.pop(late, None)
        since = [self._asked[late][1] for late in list(self._late) if late in self._asked]
        return bool(since) and time.monotonic() - min(since) > HANGING_S

    def _is_writing(self) -> bool:
        status = self._manager.report_status()["store_controller"]
        return bool(status["pending_keys_count"] or status["in_flight_task_count"])

    def _submit(self, key: ChunkKey, parts: Sequence[Part], ram_only: bool) -> Any:
        api = self._lmcache.api
        rows = [api.GroupedObjectKeys([self._name(key, part)], part.group, self._layout(part)) for part in parts]
        # What comes from below is not locked in RAM: an answer that nobody waits for any more would stay locked.
        lock = api.PrefetchLockMode.LOCK if ram_only else api.PrefetchLockMode.NO_LOCK
        return self._manager.submit_prefetch_task(api.PrefetchTaskSpec(rows, lock_mode=lock), skip_l2=ram_only)

    def _name(self, key: ChunkKey, part: Part) -> Any:
        # The size stands where LMCache has the rank of a worker, since it takes for granted that the objects of
        # one rank are of one size.
        return self._lmcache.api.ObjectKey(bytes.fromhex(key.digest) + part.version, MODEL, part.nbytes, part.group)

    def _layout(self, part: Part) -> Any:
        return self._lmcache.api.MemoryLayoutDesc([torch.Size([part.nbytes])], [torch.uint8])

    def _open(self) -> Any:
        config = self._lmcache.config
        ram = config.L1ManagerConfig(config.L1MemoryManagerConfig(self._max_bytes, use_lazy=False, shm_name=""))
        evict = config.EvictionConfig("LRU", trigger_watermark=FULL, eviction_ratio=0.3)
        manager = self._lmcache.storage_manager.StorageManager(config.StorageManagerConfig(ram, evict))
        manager.register_l2_listener(self._unsaved)
        return manager


def import_lmcache() -> Any:
    """Return LMCache's modules, imported with its telemetry switched off.

    Raises:
        StoreURLError: it is not installed, or not whole.
    """
    os.environ["LMCACHE_TRACK_USAGE"] = "false"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "CRITICAL")  # it lists keys by the hundred; faults are logged here
    try:
        from lmcache.v1.distributed import api, config, storage_manager
        from lmcache.v1.distributed.l2_adapters import config as adapters
    except ImportError as error:
        raise StoreURLError(
            f"lmcache:// needs LMCache 0.5 ({error}); install it with: pip install chunkcache[lmcache]"
        ) from None
    return SimpleNamespace(api=api, config=config, storage_manager=storage_manager, adapters=adapters)
