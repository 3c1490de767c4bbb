"""Sequences that share their beginning decode together over one copy of its KV (Hydragen, arXiv 2402.05099).

Attention splits by softmax's sums (section 3): the queries of all sequences, stacked, against the shared keys in one
matrix product, and each sequence's against its own keys; the two are merged by the logarithms of their sums of
exponentials. So shared KV are read once per step and layer, however many sequences there are. It is exact up to
rounding.

Sequences are padded on the left of what is their own, right behind the shared tokens: so they all end at the same
index, as transformers' `generate()` wants it, and their positions come out of the attention mask.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from chunkcache.blend.attention import register
from chunkcache.blend.cache import layer_kv
from chunkcache.blend.decoder import Decoder
from chunkcache.blend.selfcheck import DELTA, judge, own_prefill, relative_error, tolerance_of
from chunkcache.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NAME = "chunkcache_shared"
BLOCK_ROWS = 256  # stacked queries whose scores over the shared keys exist at once; more measured no faster on a CPU

logger = logging.getLogger("chunkcache")
KV = tuple[Tensor, Tensor]
Part = tuple[Tensor, Tensor]
# Of some rows: the first shared token that any sees, what of these the stacked ones do not, and what of their own.
Masks = tuple[int, Tensor | None, Tensor]


class SharedCache(DynamicCache):
    """KV of several sequences: one copy of what they share, and what each has behind it.

    Args:
        config: the model's text config, for its sliding windows.
        shared: keys and values of each layer, `[kv_heads, tokens, head_dim]` both; read, never written.
        pads: how many of the first tokens behind the shared ones are padding, for each sequence.
        room: tokens that a sequence may have behind the shared ones, padding included.
    """

    def __init__(self, config: PreTrainedConfig, shared: Sequence[KV], pads: Sequence[int], room: int) -> None:
        super().__init__(config=config)
        self._shared = shared
        self._tokens = shared[0][0].shape[1]
        self._windows: list[int | None] = [getattr(layer, "sliding_window", None) for layer in self.layers]
        self._pads = torch.tensor(pads, device=shared[0][0].device)[:, None]
        self._padded = max(pads)
        self._room = room
        self._own: dict[int, KV] = {}
        self._lengths = [0] * len(shared)
        self._masks: dict[tuple[int | None, torch.device], tuple[tuple[int, ...], Masks]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens a sequence has by now: shared, padding and its own."""
        return self._tokens + self._lengths[layer_idx]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take fresh KV `[sequences, kv_heads, n, head_dim]`; return those of all that is the sequences' own."""
        if layer_idx not in self._own:
            batch, heads, _, dim = key_states.shape
            both = key_states.new_empty(2, batch, heads, self._room, dim)
            self._own[layer_idx] = (both[0], both[1])
        keys, values = self._own[layer_idx]
        start, end = self._lengths[layer_idx], self._lengths[layer_idx] + key_states.shape[2]
        if end > self._room:
            raise InputError(f"a sequence grew to {end} tokens of its own, but the cache has room for {self._room}")
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self._lengths[layer_idx] = end
        return keys[:, :, :end], values[:, :, :end]

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        own: KV,
        scaling: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend from the last tokens of each sequence to the shared ones and to its own.

        Args:
            layer_idx: index of the layer.
            query: `[sequences, heads, n, head_dim]`.
            own: what `update` returned.
            scaling: of the scores; one over the root of head_dim by default.
            softcap: bound on the scores, where the family has one.
            sinks: `[heads]`, a score that each row sees besides, where the family has them.

        Returns:
            `[sequences, n, heads, head_dim]`.
        """
        batch, heads, rows, dim = query.shape
        keys, values = self._shared[layer_idx]
        kv_heads = keys.shape[0]
        window = self._windows[layer_idx]
        grouped = (query * (scaling or dim**-0.5)).reshape(batch, kv_heads, -1, dim)
        stacked = grouped.transpose(0, 1).reshape(kv_heads, -1, dim)

        low, hidden_shared, hidden = self._hidden(window, rows, own[0].shape[2], heads // kv_heads, query.device)
        keys, values = keys[:, low:], values[:, low:]

        parts = []
        for start in range(0, stacked.shape[1], BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            hide = None if hidden_shared is None else hidden_shared[block]
            parts.append(partial_attention(stacked[:, block], keys, values, hide, softcap))
        shared: Any = parts[0] if len(parts) == 1 else [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]
        shared = [each.view(kv_heads, batch, -1, each.shape[-1]).transpose(0, 1) for each in shared]
        output = _merged(shared, partial_attention(grouped, *own, hidden, softcap), sinks)
        return output.reshape(batch, heads, rows, -1).transpose(1, 2).to(query.dtype)

    def _hidden(self, window: int | None, rows: int, own: int, group: int, device: torch.device) -> Masks:
        """Return what the last `rows` of `own` tokens do not see; made once for all layers of a step that see alike.

        Args:
            window: of the layer, in tokens; None without one.
            rows: last tokens of each sequence that attend.
            own: tokens that each sequence has of its own by now.
            group: query heads of each KV head.
            device: of the layer.
        """
        made_for, masks = self._masks.get((window, device), ((), None))
        if masks is None or made_for != (rows, own, group):
            masks = self._made(window, rows, own, group, device)
            self._masks[window, device] = (rows, own, group), masks
        return masks

    def _made(self, window: int | None, rows: int, own: int, group: int, device: torch.device) -> Masks:
        index = torch.arange(own, device=device)
        pads = self._pads.to(device)
        hidden = (index < pads[:, :, None]) | (index > index[-rows:, None])  # [sequences, rows, own]
        low, hidden_shared = 0, None
        if window is not None:
            hidden = hidden | (index <= index[-rows:, None] - window)
            position = self._tokens + index[-rows:] - pads  # [sequences, rows]
            first = max(own - rows - self._padded, 0)  # own tokens before the first row, at least
            low = min(max(self._tokens + first - window + 1, 0), self._tokens - 1)  # one key remains, hidden or not
            at = torch.arange(low, self._tokens, device=device)
            hidden_shared = at <= position[:, :, None] - window  # [sequences, rows, shared]
            hidden_shared = hidden_shared[:, None].expand(-1, group, -1, -1).flatten(0, 2)
        return low, hidden_shared, hidden[:, None].repeat(1, 1, group, 1)


def partial_attention(
    query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, softcap: float | None
) -> Part:
    """Attend to some of the keys.

    Args:
        query: `[..., rows, head_dim]`, scaled; keys and values are `[..., keys, head_dim]`.
        hidden: `[..., rows, keys]`, true where a row must not look.
        softcap: bound on the scores.

    Returns:
        attention `[..., rows, head_dim]`; logarithm of the sum of exponentials of the scores, `[..., rows, 1]`.
    """
    scores = torch.matmul(query, keys.transpose(-1, -2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    weights = weights.div_(total)  # before they meet the values: a sum of thousands does not fit float16
    return torch.matmul(weights.to(values.dtype), values).to(weights.dtype), highest + total.log()


def _merged(one: Part, other: Part, sinks: Tensor | None) -> Tensor:
    """Return the attention `[sequences, kv_heads, rows, head_dim]` over the keys of both parts, and over sinks."""
    whole = _with_sinks(torch.logaddexp(one[1], other[1]), sinks)
    return one[0] * (one[1] - whole).exp_() + other[0] * (other[1] - whole).exp_()


def merge_sinks(part: Part, sinks: Tensor | None) -> Tensor:
    """Return the attention `[sequences, kv_heads, rows, head_dim]` over the keys of one part, and over sinks."""
    return part[0] * (part[1] - _with_sinks(part[1], sinks)).exp_()


def _with_sinks(whole: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the logarithms of the sums `[sequences, kv_heads, rows, 1]` with those of the sinks `[heads]`."""
    if sinks is None:
        return whole
    sinks = sinks.to(whole.dtype).view(1, whole.shape[1], -1, 1)
    return torch.logaddexp(whole, sinks.repeat_interleave(whole.shape[2] // sinks.shape[2], dim=2))


def over_shared(decoder: Decoder, cache: SharedCache) -> Any:
    """Return a shadow of the model whose attention is over `cache`, to be passed to it as `past_key_values`."""
    register(NAME, shared_attention)
    twin = decoder.shadow(NAME)
    for index, module in enumerate(twin.attentions):
        vars(module)["chunkcache_shared"] = partial(cache.attend, index)
    return twin.model


def padded(
    shared: Sequence[int], tails: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, list[int]]:
    """Return ids and attention mask `[sequences, tokens]` of the shared tokens with each tail behind, and the pads.

    What pads a sequence is its first token, which anything that looks at the ids has seen in any case.
    """
    longest = max(map(len, tails))
    pads = [longest - len(tail) for tail in tails]
    ids = [[*shared, *[shared[0]] * pad, *tail] for pad, tail in zip(pads, tails, strict=True)]
    mask = torch.ones(len(tails), len(ids[0]), dtype=torch.int64, device=device)
    for row, pad in zip(mask, pads, strict=True):
        row[len(shared) : len(shared) + pad] = 0
    return torch.tensor(ids, device=device), mask, pads


@torch.no_grad()
def can_share(decoder: Decoder) -> bool:
    """Return whether sequences over shared KV get the logits that they get alone; tried on a few random tokens."""
    embedding: Any = decoder.model.get_input_embeddings()
    ids = torch.randint(embedding.num_embeddings, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    shared, tails = ids[:12], (ids[12:15], ids[15:])
    name = type(decoder.model).__name__
    try:
        alone = [own_prefill(decoder, torch.tensor([[*shared, *tail]]))[0] for tail in tails]
        elsewhere = [own_prefill(decoder, torch.tensor([[*shared, *tail]]), DELTA)[0] for tail in tails]
        own = DynamicCache()
        decoder.prefill(torch.tensor([shared]), own)
        kv = [(keys[0], values[0]) for keys, values in (layer_kv(own, index) for index in range(len(own.layers)))]
        input_ids, mask, pads = padded(shared, tails, decoder.device)
        cache = SharedCache(decoder.config, kv, pads, max(map(len, tails)))
        logits = over_shared(decoder, cache)(
            input_ids=input_ids[:, len(shared) :],
            position_ids=(mask.cumsum(-1) - 1)[:, len(shared) :],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    except Exception as error:  # noqa: BLE001 - whatever a family trips over, its sequences can be decoded one by one
        logger.info("%s cannot decode sequences together (%s: %s)", name, type(error).__name__, error)
        return False
    wanted = torch.stack(alone)
    noise = relative_error(torch.stack(elsewhere), wanted)  # the position changes nothing but how is rounded
    judged = judge(relative_error(logits, wanted), noise, tolerance_of(decoder))
    logger.info(
        "%s decodes sequences together with a relative error of %.2g, under %.2g: %s",
        name, judged.error, judged.limit, judged.passed,
    )  # fmt: skip
    return judged.passed


def shared_attention(  # noqa: PLR0913 - the signature of transformers' attention functions
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by what stands in the module under `chunkcache_shared`: `SharedCache.attend`, say."""
    attend: Any = vars(module)["chunkcache_shared"]
    output: Tensor = attend(query, (key, value), scaling, softcap, s_aux)
    return output, None
