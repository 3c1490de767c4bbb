"""vLLM's own model, attention kernels and paged cache, run over chosen rows of a prompt.

Each run of consecutive rows is shown to the attention backend as one request of a batch, all with the same block
table: query rows `[a, b)`, sequence length b. Causal masks of paged attention are aligned to the end, so the row at
position p sees 0 to p, whether stored or fresh. Selective prefill is a batch of chunked prefills over shared blocks.

Keys and values are written by each layer's own backend, which knows its layout, dtype and scales.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import set_forward_context
from vllm.lora.layers import LoRAMapping
from vllm.v1.attention.backend import CommonAttentionMetadata

from chunkcache.errors import InputError, UnsupportedModelError

See = Callable[[Tensor, Tensor, Tensor], None]  # query, key, value of a layer, `[rows, heads, head_dim]` each
_INDEX = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one sequence.

    Attributes:
        table: block ids `[blocks]` of the sequence, as the kernels count them.
        start: position of the first row.
        stop: position right after the last.
    """

    table: Tensor
    start: int
    stop: int


def runs_of(rows: Tensor, table: Tensor) -> list[Run]:
    """Return the runs of sorted positions `[rows]` of one sequence."""
    if not len(rows):
        return []
    cuts = (rows.diff() != 1).nonzero()[:, 0] + 1
    starts, stops = rows[torch.cat((cuts.new_zeros(1), cuts))], rows[torch.cat((cuts - 1, cuts.new_tensor([-1])))] + 1
    return [Run(table, start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]


class PagedModel:
    """The model of one worker.

    Args:
        runner: vLLM's model runner.
        vllm_config: the engine's config.
        kv_cache_config: its one KV cache group, and its blocks.

    Attributes:
        model: vLLM's model.
        attentions: the attention module of each layer, in order.
        heads: (kv_heads, head_dim) of each layer, of this rank.
        block: tokens of a block, as the kernels count them.
        device: where it runs.

    Raises:
        UnsupportedModelError: its cache cannot be written block by block.
    """

    def __init__(self, runner: Any, vllm_config: Any, kv_cache_config: Any) -> None:
        self._runner, self._config = runner, vllm_config
        self.model: Any = runner.get_model()
        (group,) = kv_cache_config.kv_cache_groups
        modules = vllm_config.compilation_config.static_forward_context
        self.names = sorted(group.layer_names, key=_index)
        self.attentions: list[Any] = [modules[name] for name in self.names]
        if [_index(name) for name in self.names] != list(range(len(self.names))):
            raise UnsupportedModelError("the attention layers are not one per decoder layer")
        self.heads = [(layer.num_kv_heads, layer.head_size) for layer in self.attentions]
        ratio = self.attentions[0].kv_cache.shape[0] // kv_cache_config.num_blocks
        if ratio < 1 or not hasattr(self.attentions[0].impl, "do_kv_cache_update"):
            raise UnsupportedModelError("the attention backend's cache is not one of blocks that it writes by slots")
        self._ratio = ratio
        self.block = group.kv_cache_spec.block_size // ratio
        self.device: torch.device = self.attentions[0].kv_cache.device
        paths = {id(module): path for path, module in self.model.named_modules()}
        found = [paths[id(layer)] for layer in self.attentions]
        self.layers: list[nn.Module] = [
            self.model.get_submodule(path[: match.end() - 1]) for path in found if (match := _INDEX.search(path))
        ]

    def table(self, block_ids: Sequence[int]) -> Tensor:
        """Return the block ids `[blocks]` of a request as the kernels count them."""
        ids = torch.tensor(block_ids, dtype=torch.int64)
        if self._ratio > 1:
            ids = (ids[:, None] * self._ratio + torch.arange(self._ratio)).flatten()
        return ids

    def write(self, index: int, table: Tensor, start: int, both: Tensor) -> None:
        """Write `[2, kv_heads, n, head_dim]` of layer `index` to the positions from `start` on."""
        layer = self.attentions[index]
        slots = self._slots([Run(table, start, start + both.shape[2])]).to(self.device, non_blocking=True)
        key, value = both.transpose(1, 2).contiguous()
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)

    def forward(
        self,
        ids: Tensor,
        runs: Sequence[Run],
        *,
        shift: int = 0,
        see: Mapping[int, See] | None = None,
        below: tuple[int, Tensor, Sequence[Run]] | None = None,
    ) -> Tensor:
        """Compute the rows of some runs through all layers; return their hidden states `[rows, hidden]`.

        Args:
            ids: token ids `[rows]`.
            runs: where they stand.
            shift: positions by which they are rotated further.
            see: by layer, what is shown its queries, keys and values before attention is computed.
            below: the first layer that these rows are computed in, and the token ids and runs below it; a hook has
                to put their hidden states in there.
        """
        metadata, slots = self._metadata(runs)
        if below is not None:
            first, ids, lower = below
            lower_metadata, lower_slots = self._metadata(lower)
            metadata.update({name: lower_metadata[name] for name in self.names[:first]})
            slots.update({name: lower_slots[name] for name in self.names[:first]})
        positions = torch.cat([torch.arange(run.start, run.stop) for run in (runs if below is None else lower)])
        with ExitStack() as stack:
            stack.enter_context(self._without_adapters(len(ids)))
            for index, each in (see or {}).items():
                stack.enter_context(self._seeing(index, each))
            stack.enter_context(
                set_forward_context(
                    metadata, self._config, num_tokens=len(ids), slot_mapping=slots, skip_compiled=True
                )
            )
            hidden: Tensor = self.model(
                input_ids=ids.to(self.device),
                positions=(positions + shift).to(self.device),
                intermediate_tensors=None,
            )
        return hidden

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Return the log-probabilities `[vocab]` of the token behind the last of rows `[rows, hidden]`."""
        with self._without_adapters(1):
            logits: Tensor = self.model.compute_logits(hidden[-1:])
        return logits[0].float().log_softmax(-1)

    @contextmanager
    def scratch(self, blocks: int) -> Iterator[None]:
        """Let all layers share one small cache meanwhile: each has its own KV in it while it is computed."""
        if blocks > len(self.attentions[0].kv_cache):
            raise InputError(f"a chunk of {blocks} blocks does not fit the engine's cache; cut it")
        shared: dict[Any, Tensor] = {}
        own = [layer.kv_cache for layer in self.attentions]
        try:
            for layer in self.attentions:
                kind = layer.kv_cache.shape[1:], layer.kv_cache.dtype
                if kind not in shared:
                    shared[kind] = torch.zeros_like(layer.kv_cache[:blocks])
                layer.kv_cache = shared[kind]
            yield
        finally:
            for layer, cache in zip(self.attentions, own, strict=True):
                layer.kv_cache = cache

    def _slots(self, runs: Sequence[Run]) -> Tensor:
        parts = []
        for run in runs:
            at = torch.arange(run.start, run.stop)
            parts.append(run.table[at // self.block] * self.block + at % self.block)
        return torch.cat(parts)

    def _metadata(self, runs: Sequence[Run]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return attention metadata and slots, by layer."""
        lengths = torch.tensor([run.stop - run.start for run in runs])
        starts = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
        seq_lens = torch.tensor([run.stop for run in runs], dtype=torch.int32)
        tables = torch.nn.utils.rnn.pad_sequence([run.table for run in runs], batch_first=True).int()
        slots = self._slots(runs).to(self.device, non_blocking=True)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(self.device),
            num_reqs=len(runs),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=tables.to(self.device),
            slot_mapping=slots,
            causal=True,
            seq_lens_cpu_upper_bound=seq_lens,
            is_prefilling=torch.ones(len(runs), dtype=torch.bool),
        )
        metadata: dict[str, Any] = {}
        for group in self._runner.attn_groups[0]:
            built = group.get_metadata_builder(0).build(common_prefix_len=0, common_attn_metadata=common)
            metadata.update(dict.fromkeys(group.layer_names, built))
        return metadata, dict.fromkeys(metadata, slots)

    @contextmanager
    def _without_adapters(self, rows: int) -> Iterator[None]:
        """Compute `rows` with the model's own weights: the engine's step may be set up for rows of LoRA adapters."""
        lora = getattr(self._runner, "lora_manager", None)
        if lora is None:
            yield
            return
        adapters = lora._adapter_manager
        own = adapters._last_mapping
        adapters.set_adapter_mapping(LoRAMapping((0,) * rows, (0,), is_prefill=True))
        try:
            yield
        finally:
            if own is not None:
                adapters.set_adapter_mapping(own)

    @contextmanager
    def _seeing(self, index: int, see: See) -> Iterator[None]:
        impl = self.attentions[index].impl
        own = impl.forward

        def forward(layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            see(query, key, value)
            return own(layer, query, key, value, *args, **kwargs)

        impl.forward = forward
        try:
            yield
        finally:
            del impl.forward


def _index(name: str) -> int:
    match = _INDEX.search(name)
    if match is None:
        raise UnsupportedModelError(f"the layer {name} has no number in its name")
    return int(match.group(1))
