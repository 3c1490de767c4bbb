"""The connector that vLLM loads: one instance beside its scheduler, one in each worker.

No exception leaves it once the engine runs: one that did would end the engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import vllm
from torch import distributed
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from chunkcache.integrations.vllm.messages import Load, News, Orders, Report
from chunkcache.integrations.vllm.metrics import ChunkCacheStats, Prometheus
from chunkcache.integrations.vllm.options import Options, check_engine
from chunkcache.integrations.vllm.scheduler import Scheduling
from chunkcache.library.registry import warn_once

with suppress(ValueError):  # it is registered; vLLM's MultiConnector finds the class of counts by its name alone
    KVConnectorFactory.register_connector("ChunkCacheConnector", __name__, "ChunkCacheConnector")


def safely(otherwise: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for the connector's methods: what goes wrong in them is counted, logged once, and borne."""

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: ChunkCacheConnector, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001 - the engine goes on without us
                self.failures += 1
                warn_once("%s failed: %s: %s", method.__name__, type(error).__name__, str(error)[:200])
                return otherwise() if callable(otherwise) else otherwise

        return call

    return decorate


class ChunkCacheConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Serves fused KV to vLLM: all of a prompt but its last token counts as loaded.

    The arguments are vLLM's.

    Attributes:
        failures: exceptions that were borne here.

    Raises:
        InputError: the version of vLLM is untested, an option is wrong, or failed loads would fail requests.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self._options = Options.of(transfer.kv_connector_extra_config)
        check_engine(vllm.__version__, transfer.kv_load_failure_policy, self._options)
        self._block = vllm_config.cache_config.block_size
        self._scheduling = Scheduling(self._options, vllm_config.parallel_config.tensor_parallel_size)
        self._working: Any = None
        self._news = News()
        self._bad_blocks: set[int] = set()
        self.failures = 0

    @property
    def requires_kv_delivery(self) -> bool:
        """False: this is a cache."""
        return False

    # --- beside the scheduler

    @safely(None)
    def on_new_request(self, request: Any) -> None:
        """Take note of a request."""
        self._scheduling.add(request)

    @safely((0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens will be loaded, in the step itself; None to be asked again."""
        return self._scheduling.matched(request, num_computed_tokens), False

    @safely(None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Take note of a request's blocks."""
        self._scheduling.allocated(request, list(blocks.get_block_ids()[0]), num_external_tokens)

    @safely(dict)
    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[CacheHitSource, int]:
        """Return how many of the promised tokens come from which tier."""
        return self._scheduling.sources(request, num_external_tokens)

    @safely(Orders)
    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        """Return the workers' orders."""
        return self._scheduling.orders()

    @safely(None)
    def update_connector_output(self, connector_output: Any) -> None:
        """Take note of what the workers have found."""
        if isinstance(connector_output.kv_connector_worker_meta, News):
            self._scheduling.hear(connector_output.kv_connector_worker_meta)

    @safely((False, None))
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request, and tell its client what was done."""
        return False, self._scheduling.finished(request)

    def has_pending_push_work(self) -> bool:
        """Return whether the engine has to go on stepping, to compute chunks."""
        return self._scheduling.busy

    # --- in a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take hold of the model; where it cannot be served right on all ranks, nothing is reused."""
        working = self._served()
        if agree([working is not None])[0]:
            self._working = working
        elif working is not None:
            working.close()

    @safely(None)
    def _served(self) -> Any:
        from chunkcache.integrations.vllm.model import ServedPages
        from chunkcache.integrations.vllm.worker import Working

        served = ServedPages(self._vllm_config, self._kv_cache_config, self._options)
        return Working(served, agree, tensor_model_parallel_all_reduce)

    def reset_cache(self) -> bool:
        """Return False: stored KV are those of the weights that the engine began with, and are not made anew."""
        return False

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Do what is ordered."""
        orders = self._get_connector_metadata()
        if isinstance(orders, Orders) and not self._obey(orders):
            self._report_failed(orders.loads)

    @safely(False)
    def _obey(self, orders: Orders) -> bool:
        working = self._working
        if working is None:
            self._news.reports.update({lookup.request_id: Report() for lookup in orders.lookups})
            return not orders.loads
        self._report_failed(working.fuse(orders.loads) if orders.loads else ())
        working.forget(orders.forget)
        working.look_up(orders.lookups)
        working.compute(orders.missing)
        return True

    def _report_failed(self, loads: Sequence[Load]) -> None:
        """Have vLLM compute what was promised."""
        for load in loads:
            self._bad_blocks.update(load.block_ids)
            self._news.unloaded.add(load.request_id)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return at once: all is loaded before the forward."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Return at once: chunks are computed by themselves."""

    def wait_for_save(self) -> None:
        """Return at once."""

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks of requests that could not be fused."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    @safely(None)
    def build_connector_worker_meta(self) -> News | None:
        """Return what was found and done in this step."""
        news, self._news = self._news, News()
        if self._working is not None:
            news.reports.update(self._working.reports())
            news.done.update(self._working.done())
            news.unstored.update(self._working.unstored())
        return news or None

    def shutdown(self) -> None:
        """Close the store."""
        if self._working is not None:
            self._working.close()

    # --- metrics

    @safely(None)
    def get_kv_connector_stats(self) -> ChunkCacheStats | None:
        """Return the counts of this side since it was last asked; of several ranks the first has a say."""
        if self.role == KVConnectorRole.WORKER and get_tensor_model_parallel_rank():
            return None
        side = self._scheduling if self.role == KVConnectorRole.SCHEDULER else self._working
        counts = dict(side.counts) if side is not None else {}
        if side is not None:
            side.counts.clear()
        if self.failures:
            counts["failed"] = counts.get("failed", 0) + self.failures
            self.failures = 0
        return ChunkCacheStats(counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ChunkCacheStats:
        """Return stats that were sent from elsewhere."""
        return ChunkCacheStats(dict(data or {}))

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> Prometheus:
        """Return what keeps the counters."""
        return Prometheus(*args)


def agree(flags: Sequence[bool]) -> list[bool]:
    """Return for each flag whether it is set on all tensor-parallel ranks, which then go the same way."""
    if get_tensor_model_parallel_world_size() == 1:
        return list(flags)
    votes = torch.tensor(flags, dtype=torch.int32)
    distributed.all_reduce(votes, distributed.ReduceOp.MIN, group=get_tp_group().cpu_group)
    return votes.bool().tolist()
