"""Workers on a Ray cluster that compute chunk KV into one store; see `warm`."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from chunkcache.engine.chunks import PrecomputeResult
from chunkcache.errors import ChunkCacheError, InputError, missing_extra
from chunkcache.store.bytestore import SECRET
from chunkcache.store.encryption import KEYS
from chunkcache.warm import OnStatus, Shard, WarmConfig, Worker, WorkerPool

logger = logging.getLogger("chunkcache")

CONNECT_S = 10.0


@contextmanager
def ray_pool(
    config: WarmConfig, address: str, workers: int | None = None, cpus: int = 4, on_status: OnStatus | None = None
) -> Iterator[WorkerPool]:
    """Yield workers on a Ray cluster, each with its own copy of the model.

    If the cluster has GPUs each gets one of them, which has not been tried out.

    Args:
        config: of every worker. The model and a store in a folder must be there on every machine.
        address: of the cluster, such as `10.0.0.1:6379`; `local` starts one on this machine.
        workers: how many; None for as many as the cluster has CPUs (or GPUs) for.
        cpus: CPUs of each.
        on_status: called with a line before what may take long.

    Raises:
        InputError: Ray is not installed, the address does not answer, or the cluster is too small.
    """
    ray = _import_ray()
    if Path(config.model).exists():
        config = replace(config, model=str(Path(config.model).resolve()))
    if on_status is not None:
        on_status(f"connecting to Ray at {address}")
    started = not ray.is_initialized()
    if started:
        _connect(ray, address, None if workers is None else workers * cpus)
    try:
        held = ray.cluster_resources()
        gpus = 0 if config.device == "cpu" else int(held.get("GPU", 0))
        fit = min(int(held.get("CPU", 0)) // cpus, gpus or 2**31)
        if fit < (workers or 1):
            raise InputError(
                f"{workers or 1} workers of {cpus} CPUs each do not fit the Ray cluster, which has "
                f"{held.get('CPU', 0):.0f} CPUs and {gpus} GPUs; lower --workers or --cpus-per-worker"
            )
        pool = _RayPool(ray, replace(config, threads=cpus), workers or fit, cpus, gpus > 0, on_status)
        try:
            yield pool
        finally:
            pool.close()
    finally:
        if started:
            ray.shutdown()


class _RayPool:
    """Actors on a Ray cluster. One that dies is left out from then on, and its shard goes to another."""

    def __init__(
        self, ray: Any, config: WarmConfig, size: int, cpus: int, gpu: bool, on_status: OnStatus | None
    ) -> None:
        self._ray = ray
        self.size, self.lost = size, 0
        actor = ray.remote(num_cpus=cpus, num_gpus=int(gpu))(Worker)
        # secrets are an argument, since what a runtime environment holds goes to Ray's logs
        secrets = {name: os.environ[name] for name in (SECRET, KEYS) if os.environ.get(name)}
        self._workers = [actor.remote(config, secrets) for _ in range(size)]
        if on_status is not None:
            on_status(f"{size} workers load {config.model}")
        for _, where in self._all("load"):
            logger.info("a worker is %s", where)

    def ask(self, method: str, *args: Any) -> Any:
        while True:
            worker = self._workers[0]
            with self._surviving(worker):
                return self._answer(getattr(worker, method).remote(*args))

    def precompute(self, shards: Sequence[Shard], on_texts: Callable[[int], None]) -> Iterator[PrecomputeResult]:
        waiting, running = deque(shards), dict[Any, tuple[Any, Shard]]()
        idle, done = deque(self._workers), 0
        while waiting or running:
            while waiting and idle:
                worker, shard = idle.popleft(), waiting.popleft()
                running[worker.precompute.remote(shard)] = (worker, shard)
            [reference], _ = self._ray.wait(list(running))
            worker, shard = running.pop(reference)
            answers = []
            with self._surviving(worker):
                answers.append(self._answer(reference))
                idle.append(worker)
                done += len(shard)
            if not answers:
                waiting.append(shard)  # last, in case it was the shard that killed the worker
            yield from answers
            on_texts(done)

    def close(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        for _, of_worker in self._all("close"):
            counted += of_worker
        self._workers = []
        return counted

    def _all(self, method: str) -> list[tuple[Any, Any]]:
        """Call a method of all workers at the same time; return those that live with their results."""
        asked = [(worker, getattr(worker, method).remote()) for worker in self._workers]
        answers = []
        for worker, reference in asked:
            with self._surviving(worker):
                answers.append((worker, self._answer(reference)))
        return answers

    def _answer(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the worker itself raised

    @contextmanager
    def _surviving(self, worker: Any) -> Iterator[None]:
        """Leave out a worker that dies within; raises ChunkCacheError if it was the last."""
        try:
            yield
        except self._ray.exceptions.RayError as error:
            self._ray.kill(worker)  # perhaps it only cannot be reached
            self._workers.remove(worker)
            self.lost += 1
            logger.warning("a worker died (%s): its work goes to another", type(error).__name__)
            if not self._workers:
                raise ChunkCacheError(
                    f"all {self.size} workers died, the last of {type(error).__name__}: what they computed is stored "
                    "and the same command goes on from there; fewer workers need less memory"
                ) from error


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # its telemetry
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise missing_extra("ray", "--ray", error) from error


def _connect(ray: Any, address: str, cpus: int | None) -> None:
    local = {"include_dashboard": False, "num_cpus": cpus} if address == "local" else {}
    try:
        if ":" in address:  # Ray itself would wait for minutes for a host that does not answer
            host, _, port = address.rpartition("://")[2].rpartition(":")
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"there is no Ray cluster at {address!r} ({error}); pass host:port of its head, or local"
        ) from None
