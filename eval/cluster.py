"""A cluster that is not here, event by event: replicas with their own memory, and one Redis behind them (simpy).

A replica serves one request at a time, first come first served; batched prefill is not modelled. It looks for a
request's chunks in its memory, then in Redis; what neither has it computes, keeps, and writes to Redis behind the
request. All replicas share the link to Redis, which carries reads and writes at the same time: in each direction
transfers go one after the other, at its full bandwidth, and wait for one another. Chunks that wait to be written are
bounded as in the product, and what finds no place is not written. Both tiers evict the least recently used entries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from chunkcache.errors import missing_extra
from chunkcache.eval.costs import Costs, Reuse, Step, overlapped_s

try:
    import simpy
except ModuleNotFoundError as error:
    raise missing_extra("eval", "a simulation", error) from error

Key = Hashable
Events = Generator[Any, Any, Any]
POLICIES: dict[str, Reuse | None] = {
    "full": None,
    "prefix": Reuse(),
    "cacheblend:ratio=0.15": Reuse(share=0.15, whole=2),
    "query": Reuse(share=0.02, scouts=True, lead=1024),
}
ROUTES = ("round-robin", "least-loaded")
QUEUE = 16  # chunks of a replica that may wait to be written, as in `TieredStore`


class LRU:
    """Which keys a tier of `max_bytes` holds."""

    def __init__(self, max_bytes: float) -> None:
        self._max_bytes = max_bytes
        self._held: OrderedDict[Key, float] = OrderedDict()
        self.nbytes = 0.0

    def use(self, key: Key) -> bool:
        """Return whether `key` is held, as the one used last from now on."""
        if key in self._held:
            self._held.move_to_end(key)
            return True
        return False

    def put(self, key: Key, nbytes: float) -> None:
        """Hold `key`, unless it is larger than the tier; drop those that were not used for longest."""
        if self.use(key) or nbytes > self._max_bytes:
            return
        self._held[key] = nbytes
        self.nbytes += nbytes
        while self.nbytes > self._max_bytes:
            self.nbytes -= self._held.popitem(last=False)[1]


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens: of the system prompt, of each chunk, of each question."""

    prefix: int
    chunk: int
    question: int


@dataclass(frozen=True)
class Cluster:
    """What is simulated; bytes, bytes/s and seconds.

    Attributes:
        costs: of one replica.
        sizes: of the requests.
        replicas: how many there are.
        memory_bytes: for KV, of each replica.
        redis_bytes: for KV, of the one Redis; 0 for none.
        redis_bandwidth: of the link that all share.
        redis_latency_s: of each read or write of a request's chunks.
        route: which replica gets a request.
    """

    costs: Costs
    sizes: Sizes
    replicas: int
    memory_bytes: float
    redis_bytes: float
    redis_bandwidth: float
    redis_latency_s: float
    route: str = "round-robin"

    @property
    def chunk_bytes(self) -> float:
        """Bytes of one chunk's KV."""
        return float(self.sizes.chunk * self.costs.shape.kv_bytes)


@dataclass
class Found:
    """What a run did: TTFTs in the order of arrival, chunks by where they came from, and how busy it was.

    `link_busy` and `busy` are shares of the run's time, of reading over the link and of all replicas; `services` are
    the seconds that each request held its replica.
    """

    ttfts: list[float]
    services: list[float]
    chunks: dict[str, int] = field(default_factory=lambda: {"memory": 0, "redis": 0, "computed": 0})
    link_busy: float = 0.0
    busy: float = 0.0


class _Replica:
    def __init__(self, env: simpy.Environment, memory_bytes: float) -> None:
        self.server = simpy.Resource(env, capacity=1)
        self.memory = LRU(memory_bytes)
        self.waiting = 0
        self.writing = 0


class Run:
    """One policy on one cluster; `full` stores nothing, `prefix` only reuses chunks behind the same ones."""

    def __init__(self, cluster: Cluster, policy: str) -> None:
        self._cluster, self._policy = cluster, policy
        self._reuse = POLICIES[policy]
        self._env = simpy.Environment()
        self._reads = simpy.Resource(self._env, capacity=1)
        self._writes = simpy.Resource(self._env, capacity=1)
        self._redis = LRU(cluster.redis_bytes)
        self._replicas = [_Replica(self._env, cluster.memory_bytes) for _ in range(cluster.replicas)]
        self._found = Found([], [])
        self._read_s = 0.0
        self._warm_up = 0

    def serve(self, arrivals: Sequence[float], requests: Sequence[tuple[int, ...]], warm_up: int = 0) -> Found:
        """Simulate requests for chunks, by their numbers, that arrive at these times (s, in order).

        The chunks of the first `warm_up` requests are not counted.
        """
        self._warm_up = warm_up
        self._found.ttfts, self._found.services = [0.0] * len(arrivals), [0.0] * len(arrivals)
        self._env.process(self._arrive(arrivals, requests))
        self._env.run()
        self._found.link_busy = self._read_s / self._env.now
        self._found.busy = sum(self._found.services) / self._env.now / len(self._replicas)
        return self._found

    def _arrive(self, arrivals: Sequence[float], requests: Sequence[tuple[int, ...]]) -> Events:
        for number, (arrival, chunks) in enumerate(zip(arrivals, requests, strict=True)):
            yield self._env.timeout(max(0.0, arrival - self._env.now))
            if self._cluster.route == "round-robin":
                replica = self._replicas[number % len(self._replicas)]
            else:
                replica = min(self._replicas, key=lambda each: each.waiting)
            replica.waiting += 1
            self._env.process(self._request(number, chunks, replica))

    def _request(self, number: int, chunks: tuple[int, ...], replica: _Replica) -> Events:
        came = self._env.now
        with replica.server.request() as turn:
            yield turn
            began = self._env.now
            yield from self._prefill(chunks, replica, counted=number >= self._warm_up)
            self._found.services[number] = self._env.now - began
        replica.waiting -= 1
        self._found.ttfts[number] = self._env.now - came

    def _prefill(self, chunks: tuple[int, ...], replica: _Replica, counted: bool) -> Events:
        sizes, costs = self._cluster.sizes, self._cluster.costs
        if self._reuse is None:
            self._found.chunks["computed"] += counted * len(chunks)
            yield self._env.timeout(costs.full_s(sizes.prefix + len(chunks) * sizes.chunk + sizes.question))
            return
        near, far, missing = self._look_up(self._keys(chunks), replica)
        for name, found in (("memory", near), ("redis", far), ("computed", missing)):
            self._found.chunks[name] += counted * len(found)
        compute_s, steps = self._compute(len(near) + len(far), len(missing))
        yield self._env.timeout(compute_s)
        began = self._env.now
        if far:
            read_s = yield from self._transfer(self._reads, len(far))
            self._read_s += read_s  # not in one line: others add to it meanwhile
        memory_s = costs.load_s(sizes.prefix + (len(near) + len(far)) * sizes.chunk)
        loading_s = self._env.now - began + memory_s
        yield self._env.timeout(overlapped_s(loading_s, steps, costs.shape.layers) - (self._env.now - began))
        for key in (*far, *missing):
            replica.memory.put(key, self._cluster.chunk_bytes)
        if self._cluster.redis_bytes:
            queued = missing[: QUEUE - replica.writing]
            replica.writing += len(queued)
            self._env.process(self._write(queued, replica))

    def _keys(self, chunks: tuple[int, ...]) -> list[Key]:
        if self._policy == "prefix":
            return [chunks[: index + 1] for index in range(len(chunks))]
        return list(chunks)

    def _look_up(self, keys: Sequence[Key], replica: _Replica) -> tuple[list[Key], list[Key], list[Key]]:
        """Return the keys held in memory, those in Redis, and those that have to be computed."""
        near: list[Key] = []
        far: list[Key] = []
        missing: list[Key] = []
        for key in keys:
            if self._policy == "prefix" and missing:
                missing.append(key)
            elif replica.memory.use(key):
                near.append(key)
            elif self._redis.use(key):
                far.append(key)
            else:
                missing.append(key)
        return near, far, missing

    def _compute(self, stored: int, missing: int) -> tuple[float, list[Step]]:
        """Return the seconds of what is computed before KV are fused, and then the steps."""
        sizes, costs = self._cluster.sizes, self._cluster.costs
        assert self._reuse is not None
        if self._policy == "prefix":  # what is missing is prefilled with the question
            held = sizes.prefix + stored * sizes.chunk
            rows = missing * sizes.chunk + sizes.question
            layer = costs.layer_s(rows, held + rows / 2)
            return 0.0, [*((index, layer) for index in range(costs.shape.layers)), costs.head]
        alone = missing * costs.prefill_s(sizes.chunk, sizes.prefix + self._reuse.lead)
        return alone, costs.fused_steps(self._reuse, sizes.prefix, (stored + missing) * sizes.chunk, sizes.question)

    def _transfer(self, direction: simpy.Resource, chunks: int) -> Events:
        """Move chunks over the link, behind whatever goes the same way; returns the seconds that it took them."""
        yield self._env.timeout(self._cluster.redis_latency_s)
        with direction.request() as turn:
            yield turn
            seconds = chunks * self._cluster.chunk_bytes / self._cluster.redis_bandwidth
            yield self._env.timeout(seconds)
        return seconds

    def _write(self, keys: Sequence[Key], replica: _Replica) -> Events:
        for key in keys:
            if not self._redis.use(key):
                yield from self._transfer(self._writes, 1)
                self._redis.put(key, self._cluster.chunk_bytes)
            replica.writing -= 1
