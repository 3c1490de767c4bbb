"""The fused cache: a transformers cache that puts stored KV in place, layer by layer, as the model asks for it.

Until its prefill is over it is empty to the outside. In the prefill, `update` gives the model the whole
prompt's keys and values: stored ones re-rotated to their positions, and the fresh rows scattered over them.
Afterwards it is an ordinary `DynamicCache` that grows token by token, into room behind the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from chunkcache.blend.assembly import Assembler
from chunkcache.blend.attention import LOOK_ROWS, contiguous_from
from chunkcache.blend.carried import Carried
from chunkcache.blend.growing import GrowingLayer
from chunkcache.blend.loader import LEAST_DEPTH, Loader
from chunkcache.blend.plan import Plan
from chunkcache.blend.rotary import Rotary
from chunkcache.blend.shift import Shift, Shifting
from chunkcache.kv import ChunkKV, ContextAttention, Layer, Origin, Span
from chunkcache.kv.clock import StageClock
from chunkcache.kv.transfer import place_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from chunkcache.blend.later import Later


def layer_kv(cache: Cache, index: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values `[batch, kv_heads, tokens, head_dim]` that `cache` holds of layer `index`."""
    layer: Any = cache.layers[index]
    return layer.keys, layer.values


def _all_on(layers: Sequence[Layer], device: torch.device) -> bool:
    return all(place_of(layer) == device for layer in layers)


class Probed(Exception):  # noqa: N818 - a jump out of a layer, not an error
    """Carries the keys and values of a layer out of its forward, before attention is computed."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__("probed")
        self.fresh = torch.cat((key, value))


class _Overwritten(Exception):  # noqa: N818 - a jump out of the model, not an error
    """The KV of the last layer are in place; what the model would go on to compute is not wanted."""


class FusedCache(DynamicCache):
    """Keys and values of one plan, assembled lazily.

    Args:
        config: the model's text config, for its layer types.
        plan: what is reused where.
        rotaries: how each layer's keys are rotated; None for a layer without RoPE.
        depth: layers that are loaded ahead of the one that is computed.
        shift: how rows that are not recomputed are corrected in the prefill; None for not at all.
        clock: times its stages; None for one of the host.

    Attributes:
        clock: times its stages.
        started: when the request began, in seconds since the epoch.
        computed_rows: positions `[rows]` that the prefill computed, layer by layer, on the CPU or the device.
        scouted: token-layers computed while scouting.
        scouting: while True, `update` keeps what it assembles for the prefill that follows.
        carried: where a scout stopped, for the prefill to go on from; None without one.
        input_ids: the plan's token ids `[1, tokens]` on the model's device, once they are there.
        look_rows: rows of the question at most that a policy looks at.
        seen: what each token got from the question, `[scout layers, tokens]`; None where no policy looked.
        shown: positions `[n]`, sorted, whose keys and values `update` returns while scouting; None for all.
        later: what is recomputed before anything is decoded on from the first token; None for nothing.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        plan: Plan,
        rotaries: Sequence[Rotary | None],
        depth: int = LEAST_DEPTH,
        shift: Shift | None = None,
        clock: StageClock | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]
        self.started = time.time()
        self._depth = depth
        self._sources: list[Sequence[Layer]] | None = None
        self._loader: Loader | None = None
        self._load_clocks: list[StageClock] = []
        self.plan = plan
        self.prefilled = False
        self.clock = StageClock(torch.device("cpu")) if clock is None else clock
        self.computed_rows: list[Tensor] = []
        self.scouted = 0
        self._rotaries = rotaries
        self.go_on_with(torch.empty(0, dtype=torch.int64))
        self._probing = self._overwriting = False
        self.scouting = False
        self.look_rows = LOOK_ROWS
        self.carried: Carried | None = None
        self.input_ids: Tensor | None = None
        self.seen: Tensor | None = None
        self.shown: Tensor | None = None
        self.later: Later | None = None
        self._shift = shift
        self._shifting: Shifting | None = None
        self._assembled: dict[int, Tensor] = {}

    @property
    def plan(self) -> Plan:
        """What is reused where; may be set anew for the same beginning of the prompt."""
        return self._assembler.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._assembler = Assembler(plan)

    def go_on_with(self, rows: Tensor) -> None:
        """Set the positions `[rows]` (sorted, on the CPU) that the model computes from here on."""
        self._rows: Tensor | None = rows
        self._contiguous = len(rows) > 0 and int(rows[-1] - rows[0]) + 1 == len(rows)
        self._rows_on: dict[torch.device, Tensor] = {}

    def narrow(self, keep: Tensor) -> None:
        """Go on with some of `rows` only: `keep` `[n]`, indices into them; what is on an accelerator stays there."""
        if keep.device.type == "cpu":
            self.go_on_with(self.rows[keep])
            return
        rows = self.rows_on(keep.device).index_select(0, keep)
        self._rows, self._rows_on, self._contiguous = None, {keep.device: rows}, False

    @property
    def rows(self) -> Tensor:
        """Positions `[rows]` that the model computes at the layer it is in, sorted, on the CPU."""
        if self._rows is None:
            self._rows = next(iter(self._rows_on.values())).cpu()
        return self._rows

    def rows_on(self, device: torch.device) -> Tensor:
        """Return `rows` on `device`, copied there once."""
        if device not in self._rows_on:
            known = next(iter(self._rows_on.values())) if self._rows is None else self._rows
            rows = known.to(device, non_blocking=True)
            if self._contiguous:
                contiguous_from(rows, int(self.rows[0]))
            self._rows_on[device] = rows
        return self._rows_on[device]

    def ids_on(self, device: torch.device) -> Tensor:
        """Return the token ids `[1, rows]` of `rows` on `device`; those of the plan are copied there once."""
        if self.input_ids is None or self.input_ids.shape[1] != len(self.plan):
            self.input_ids = torch.tensor([self.plan.token_ids]).to(device, non_blocking=True)
        return self.input_ids.index_select(1, self.rows_on(device))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the fresh KV `[1, kv_heads, rows, head_dim]` of `rows`; return those of the whole prompt."""
        if self._overwriting:
            return self._overwritten(key_states, value_states, layer_idx)
        if self.prefilled:
            self.catch_up()
            keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return keys, values
        if self._probing:
            raise Probed(key_states, value_states)
        both = self.assemble(layer_idx, key_states)
        if not self.scouting and (shifting := self._corrected()) is not None:
            shifting.apply(both, self.rows, key_states, value_states)
        self._scatter(both, key_states, value_states)
        if self.scouting:
            self.scouted += key_states.shape[2]
            both = both if self.shown is None else both.index_select(2, self.shown.to(both.device))
            return both[:1], both[1:]
        self._assembled.pop(layer_idx)
        self.computed_rows.append(self.rows_on(both.device) if self._rows is None else self._rows)
        layer: Any = self.layers[layer_idx]
        layer.lazy_initialization(key_states, value_states)
        layer.keys, layer.values = both[:1], both[1:]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = len(self.plan)
        return layer.keys, layer.values

    def catch_up(self, question: bool = True) -> None:
        """Recompute what was left for later, if that has not been done; `update` does so by itself.

        Args:
            question: whether what stands behind the chunks is recomputed, too.
        """
        if self.later is not None and self.later.rows is None:
            self.later.run(self, question)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Make copies of the sequence, of which none has anything left for later."""
        self.catch_up()
        super().batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Cut the sequence off, of which nothing is left for later."""
        self.catch_up()
        super().crop(tokens_to_remove)

    @contextmanager
    def overwriting(self, rows: Tensor) -> Iterator[None]:
        """In the block, let the model compute `rows` (sorted, on the CPU) anew, in place of the KV that are here.

        It is left at the last layer, as soon as that has its keys and values.
        """
        self.go_on_with(rows)
        self._overwriting = True
        try:
            yield
        except _Overwritten:
            pass
        finally:
            self._overwriting = False

    def _overwritten(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        keys, values = layer_kv(self, layer_idx)
        rows = self.rows_on(keys.device)
        keys.index_copy_(2, rows, key)
        values.index_copy_(2, rows, value)
        if layer_idx + 1 == len(self.layers):
            raise _Overwritten
        return keys, values

    def assemble(self, layer_idx: int, like: Tensor) -> Tensor:
        """Return `[2, kv_heads, tokens, head_dim]` of layer `layer_idx`, stored KV in place, the rest undefined.

        `like` is any tensor `[1, kv_heads, n, head_dim]` of the dtype and device wanted.
        """
        if layer_idx not in self._assembled:
            with self.clock.stage("assemble"):
                group = self._group(layer_idx, like)
                with self.clock.stage("wait"):
                    stored = [self._stored(index, like) for index in group]
                rotary = self._rotaries[layer_idx]
                if len(group) == 1:
                    self._assembled[layer_idx] = self._assembler.assemble(stored[0], rotary, like)
                else:
                    assembled = self._assembler.assemble_group(stored, rotary, like)
                    self._assembled.update(zip(group, assembled, strict=True))
        both = self._assembled[layer_idx]
        if both.device != like.device:  # a group may reach beyond the last layer of a device
            both = self._assembled[layer_idx] = both.to(like.device, non_blocking=True)
        return both

    def _group(self, first: int, like: Tensor) -> Sequence[int]:
        """Return `first` and the layers above it that are put in place with it, in the same few kernels.

        They are rotated and shaped alike. Groups grow on the way up, so that the first layers do not wait for many.
        """
        most = min(self._assembler.layers_at_once(like), first + 1)
        shapes = [span.kv.shapes for span in self.plan.reused[:1] if span.kv is not None] if most > 1 else []
        if not shapes:
            return [first]
        group, shape = [first], shapes[0]
        for index in range(first + 1, min(first + most, len(shape))):
            alike = self._rotaries[index] is self._rotaries[first] and shape[index] == shape[first]
            if not alike or index in self._assembled:
                break
            group.append(index)
        return group

    def _stored(self, layer_idx: int, like: Tensor) -> Sequence[Layer]:
        """Return layer `layer_idx` of each reused span; from a loader where they are not all where `like` is."""
        device = like.device
        if self._sources is None:
            self._sources = [span.kv.layers for span in self.plan.reused if span.kv is not None]
            if not all(isinstance(layers, tuple) and _all_on(layers, device) for layers in self._sources):
                depth = max(self._depth, self._assembler.layers_at_once(like))
                self._loader = Loader(self._sources, device, depth)
        if self._loader is not None:
            return self._loader.take(layer_idx)
        return [layers[layer_idx] for layers in self._sources]

    def probe(
        self, layer: Any, layer_idx: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Run a decoder layer only up to its keys and values, and keep these for all of `rows`.

        Returns:
            fresh and stored KV of `rows` at this layer, each `[2, kv_heads, rows, head_dim]`.
        """
        self._probing = True
        try:
            layer.forward(*args, **kwargs)
        except Probed as probed:
            fresh = probed.fresh
        finally:
            self._probing = False
        both = self.assemble(layer_idx, fresh[:1])
        stored = both.index_select(2, self.rows_on(both.device))
        if (shifting := self._corrected()) is not None:
            shifting.note(self.rows_on(both.device), fresh, stored)
        self._scatter(both, fresh[:1], fresh[1:])
        return fresh, stored

    def _corrected(self) -> Shifting | None:
        """Return what corrects this prefill, made once its plan is settled."""
        if self._shift is not None and self._shifting is None:
            self._shifting = Shifting(self._shift, self.plan)
        return self._shifting

    @property
    def computed(self) -> int:
        """Token-layers computed by the prefill."""
        return sum(map(len, self.computed_rows))

    def selecting(self) -> AbstractContextManager[None]:
        """Count the time of a block, less what it assembles, as selection."""
        return self.clock.stage("select")

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for stored KV."""
        return self.clock.seconds("wait")

    @property
    def assemble_s(self) -> float:
        """Seconds spent waiting for stored KV and re-rotating them."""
        return self.clock.seconds("wait", "assemble")

    @property
    def select_s(self) -> float:
        """Seconds spent choosing what is recomputed."""
        return self.clock.seconds("select")

    @property
    def later_s(self) -> float:
        """Seconds that what was left for later took."""
        return self.clock.seconds("later")

    @property
    def load_s(self) -> float:
        """Seconds that loading stored KV took beside the prefill, once it has stopped."""
        return sum(clock.seconds("load") for clock in self._load_clocks)

    def start_over(self, plan: Plan) -> None:
        """Forget what was assembled and computed, and go on with another plan for the same prompt."""
        self.stop_loading()
        self._sources = self._shifting = None
        self._assembled.clear()
        self.carried = self.seen = self.later = None
        self.plan = plan
        self.computed_rows.clear()
        self.scouted = 0

    def stop_loading(self) -> None:
        """Load no further layers."""
        if self._loader is not None:
            self._loader.close()
            self._load_clocks += self._loader.clocks
            self._loader = None

    def copy_of(self, span: Span, context: ContextAttention | None = None) -> ChunkKV:
        """Return a copy of the KV of a span, before sliding-window layers are trimmed; `context` as in `ChunkKV`."""
        pairs = (layer_kv(self, index) for index in range(len(self.layers)))
        layers = [torch.cat([part[:, :, span.start : span.stop] for part in pair]) for pair in pairs]
        return ChunkKV.of(span.token_ids, span.start, layers, context, Origin(created=self.started))

    def drop_last(self) -> None:
        """Forget the last token, before sliding-window layers are trimmed."""
        for layer in self.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length -= 1
            held: Any = layer
            held.keys, held.values = held.keys[:, :, :-1], held.values[:, :, :-1]

    def trim(self) -> None:
        """Let sliding-window layers forget what lies before their window, as transformers' own cache does."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past:
                keep = layer.sliding_window - 1
                keys, values = layer_kv(self, index)
                layer.keys, layer.values = keys[:, :, -keep:], values[:, :, -keep:]

    def _scatter(self, both: Tensor, key: Tensor, value: Tensor) -> None:
        if self._contiguous:
            torch.cat((key, value), out=both[:, :, int(self.rows[0]) : int(self.rows[-1]) + 1])
        else:
            rows = self.rows_on(both.device)
            both[0].index_copy_(1, rows, key[0])
            both[1].index_copy_(1, rows, value[0])
