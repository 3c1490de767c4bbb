"""What the scheduler's side and the workers' side of the connector tell each other, once per engine step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from chunkcache.integrations.vllm.spec import ChunkSpec
from chunkcache.kv import TokenIds

PREFIX = -1  # stands for the prefix among the numbers of spans


@dataclass(frozen=True)
class Lookup:
    """Find out what is stored of a request, and bring it into memory."""

    request_id: str
    token_ids: TokenIds = field(repr=False)
    spec: ChunkSpec


@dataclass(frozen=True)
class Load:
    """Fuse a request that was looked up.

    Attributes:
        request_id: which one.
        block_ids: its blocks, as the block manager counts them.
        missing: numbers of the spans that some rank has no KV of.
        exact: numbers of those whose KV are exact on all ranks.
    """

    request_id: str
    block_ids: list[int]
    missing: frozenset[int]
    exact: frozenset[int]


@dataclass(frozen=True)
class Missing:
    """Compute and store a chunk, behind a context; without a chunk the context itself."""

    chunk: TokenIds = field(repr=False)
    context: TokenIds = field(repr=False)
    policy: str


@dataclass
class Orders(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers are to do in a step."""

    loads: list[Load] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    forget: list[str] = field(default_factory=list)

    def anon_repr(self) -> str:
        """Return what vLLM writes of this to its log when a step fails: no token ids."""
        return repr(self)


@dataclass(frozen=True)
class Report:
    """What is stored of a request.

    Attributes:
        missing: numbers of the spans that some rank has no KV of.
        reused: tokens that KV are there for.
        exact: numbers of the spans whose KV are exact on all ranks.
        sources: by number of a span, the kind of tier that its KV came from.
        ranks: how many ranks have reported.
    """

    missing: frozenset[int] = frozenset()
    reused: int = 0
    exact: frozenset[int] = frozenset()
    sources: dict[int, str] = field(default_factory=dict)
    ranks: int = 1

    def with_rank(self, other: Report) -> Report:
        """Return what all ranks have."""
        return Report(
            self.missing | other.missing,
            min(self.reused, other.reused),
            self.exact & other.exact,
            {**other.sources, **self.sources},
            self.ranks + other.ranks,
        )


@dataclass
class News(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What the workers found and did in a step, by request.

    Attributes:
        reports: what was looked up.
        done: figures of the requests that were fused.
        unloaded: requests whose promised KV could not be put in place.
        unstored: what was computed in vain, or not at all.
    """

    reports: dict[str, Report] = field(default_factory=dict)
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    unloaded: set[str] = field(default_factory=set)
    unstored: set[Missing] = field(default_factory=set)

    def __bool__(self) -> bool:
        """Return whether there is something to tell."""
        return bool(self.reports or self.done or self.unloaded or self.unstored)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Return what two ranks have to say."""
        reports = dict(self.reports)
        for request, report in other.reports.items():
            reports[request] = reports[request].with_rank(report) if request in reports else report
        return News(
            reports, {**other.done, **self.done}, self.unloaded | other.unloaded, self.unstored | other.unstored
        )
