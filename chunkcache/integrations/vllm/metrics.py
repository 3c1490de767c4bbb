"""The connector's counters in vLLM's metrics: `vllm:chunkcache_<name>`."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "fused": "requests whose prompt was fused",
    "placed_tokens": "prompt tokens that stored KV were put in place for",
    "recomputed_tokens": "of these, tokens that were computed anew",
    "fresh_tokens": "prompt tokens of fused requests that nothing was stored of",
    "hits": "chunks that were found",
    "misses": "chunks that were not found",
    "computed": "chunks and prefixes that were computed and stored",
    "unaccepted": "requests whose guard wanted all of the prompt computed",
    "cold": "requests with too little stored to be fused",
    "refused": "requests with chunks that cannot be fused",
    "malformed": "requests that said wrongly where their chunks stand",
    "timeouts": "requests whose chunks could not be looked up in time",
    "failed": "failures that a request was served in spite of",
}
TIER = "tier:"  # before the kind of a tier, in the name of a count of tokens


class ChunkCacheStats(KVConnectorStats):  # type: ignore[misc]
    """Counts since they were last asked for."""

    def reset(self) -> None:
        """Start anew."""
        self.data: dict[str, int] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Return the sums."""
        return ChunkCacheStats({n: self.data.get(n, 0) + other.data.get(n, 0) for n in {**self.data, **other.data}})

    def reduce(self) -> dict[str, int | float]:
        """Return the counts for the log."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """Return whether nothing happened."""
        return not self.data


class Prometheus(KVConnectorPromMetrics):  # type: ignore[misc]
    """Keeps one counter per name and engine; the arguments are vLLM's."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._counters: dict[str, dict[int, Any]] = {}
        for name, text in COUNTERS.items():
            counter = self._counter_cls(
                name=f"vllm:chunkcache_{name}", documentation=f"chunkcache: {text}.", labelnames=self._labelnames
            )
            labelled = {engine: counter.labels(*values) for engine, values in self.per_engine_labelvalues.items()}
            self._counters[name] = labelled
        self._by_tier = self._counter_cls(
            name="vllm:chunkcache_tier_tokens",
            documentation="chunkcache: placed tokens by the tier that their KV came from.",
            labelnames=[*self._labelnames, "tier"],
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add counts."""
        for name, count in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name][engine_idx].inc(count)
            elif name.startswith(TIER):
                values = self.per_engine_labelvalues[engine_idx]
                self._by_tier.labels(*values, name.removeprefix(TIER)).inc(count)
