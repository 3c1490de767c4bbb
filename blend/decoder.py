"""What selective prefill needs to know of a Hugging Face decoder model, found out once.

No model is forked and no family has code of its own here: layers, windows and rotary functions are read off
the model, what cannot be served right is refused with the reason, and `selfcheck` proves the rest.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from chunkcache.blend.attention import NAME as ROWS_ATTENTION
from chunkcache.blend.attention import additive_mask, register, rows_attention, visible_intervals
from chunkcache.blend.rotary import Rotary
from chunkcache.blend.shadow import shadow_of, uncompiled
from chunkcache.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ROWLESS = ("flash_attention_2", "flash_attention_3", "flex_attention")  # the model's, which take no scattered rows


class Decoder:
    """A decoder-only model with rotary positions, seen from outside.

    Attributes:
        model: the Hugging Face model, never modified; of a compiled one a shadow that is not compiled.
        config: its text config.
        layers: the decoder layers, in order.
        attentions: the attention module of each.
        rotaries: how each layer's keys are rotated; `selfcheck` sets those without RoPE to None.
        heads: (kv_heads, head_dim) of each layer; `selfcheck` sets it.
        max_tokens: longest prompt that is served right, in tokens.

    Raises:
        UnsupportedModelError: the architecture or configuration cannot be served right; the message says why.
        InputError: the model is on the meta device or in training mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        register(ROWS_ATTENTION, rows_attention, sdpa_masks=True)
        self.model: PreTrainedModel = uncompiled(model)
        self.config: PreTrainedConfig = self.model.config.get_text_config(decoder=True)
        self._refuse_unsupported()
        self.layers = self._find_layers()
        self.attentions = [module for layer in self.layers if (module := self._attention_of(layer)) is not None]
        names = {module: name for name, module in self.model.named_modules()}
        self._names = [names[m] for pair in zip(self.layers, self.attentions, strict=True) for m in pair]
        self._types = self._find_layer_types()
        self._windows = self._find_windows()
        self.rotaries: list[Rotary | None] = self._find_rotaries()
        self.heads: list[tuple[int, int]] | None = None
        self.max_tokens = self._find_max_tokens()

    def shadow(self, attention: str | None = None) -> Decoder:
        """Return this decoder over a shadow of the model, free to be hooked.

        Args:
            attention: its attention implementation; by default eager attention if that is the model's, or else one
                that takes scattered rows.
        """
        if attention is None and self.config._attn_implementation != "eager":
            attention = ROWS_ATTENTION
        twin = copy.copy(self)
        twin.model = shadow_of(self.model, self._names, attention)
        twin.layers = [twin.model.get_submodule(name) for name in self._names[0::2]]
        twin.attentions = [twin.model.get_submodule(name) for name in self._names[1::2]]
        return twin

    def attend_as_model(self) -> None:
        """Let a shadow attend as its model does from here on, where that is neither SDPA nor eager attention.

        Decoding then stays the model's own. SDPA's `rows_attention` hands on what is not a prefill of rows.
        """
        if self.config._attn_implementation in ROWLESS:
            config: Any = self.attentions[0].config
            config._attn_implementation = self.config._attn_implementation

    def adopt(self, other: Decoder) -> None:
        """Take over what the self-check found of the same model."""
        self.heads = other.heads
        self.rotaries = [
            None if theirs is None else own for own, theirs in zip(self.rotaries, other.rotaries, strict=True)
        ]

    @property
    def device(self) -> torch.device:
        """Device of the model's input."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's weights, and so of its KV."""
        return self.model.dtype

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in all layers; known once the self-check has run."""
        assert self.heads is not None
        return sum(2 * kv_heads * head_dim for kv_heads, head_dim in self.heads) * self.dtype.itemsize

    def prefill(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Run the model on `input_ids` `[batch, tokens]`, filling `cache`; return last logits `[batch, vocab]`."""
        model: Any = self.model
        keep = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        with torch.no_grad():
            output = model(
                input_ids=input_ids.to(self.device), past_key_values=cache, use_cache=True, return_dict=True, **keep
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    def masks(self, rows: Tensor, length: int, columns: Tensor | None = None) -> Any:
        """Return what the model takes as `attention_mask` for `rows` `[rows]` of a prompt of `length` tokens.

        One mask where all layers see alike, else a dict of one mask per layer type. With `columns` `[columns]` the
        cache gives keys and values of these positions only (sorted, those of `rows` among them).
        """
        windows = dict(zip(self._types, self._windows, strict=True))
        by_type = {kind: self._mask(rows, length, window, columns) for kind, window in windows.items()}
        return by_type if len(by_type) > 1 else next(iter(by_type.values()))

    def mask(self, layer_idx: int, masks: Any) -> Any:
        """Return the one of `masks` that layer `layer_idx` takes."""
        return masks[self._types[layer_idx]] if isinstance(masks, dict) else masks

    @property
    def narrowest_window(self) -> int:
        """The narrowest sliding window, in tokens; 0 if all layers see all."""
        return min((window for window in self._windows if window is not None), default=0)

    def window(self, layer_idx: int) -> int | None:
        """Return the sliding window of a layer, in tokens; None where it sees all."""
        return self._windows[layer_idx]

    def seeing_all(self, layers: Sequence[int]) -> Sequence[int]:
        """Return those of `layers` without a sliding window; without one among them, the nearest below or above.

        A layer with a window shows only what lies in it.
        """
        whole = [index for index, window in enumerate(self._windows) if window is None]
        kept = [index for index in layers if index in whole]
        if kept or not whole:
            return kept or layers
        return [min(whole, key=lambda index: abs(index - layers[len(layers) // 2]))]

    def _mask(self, rows: Tensor, length: int, window: int | None, columns: Tensor | None) -> Tensor:
        intervals = visible_intervals(rows, window, columns)
        if self.config._attn_implementation == "eager":
            return additive_mask(intervals, length if columns is None else len(columns), self.dtype)
        return intervals

    def _refuse_unsupported(self) -> None:
        name = type(self.model).__name__
        if self.model.config.is_encoder_decoder:
            raise UnsupportedModelError(f"{name} is an encoder-decoder; chunkcache serves decoder-only models")
        self._refuse_hidden(name)
        if self.model.training:
            raise InputError(f"{name} is in training mode, where dropout changes the KV: call model.eval() first")
        attention = self.config._attn_implementation
        if attention not in ("sdpa", "eager", *ROWLESS):
            raise UnsupportedModelError(
                f"{name} uses attn_implementation={attention!r}, which is not known here; "
                "load it with attn_implementation='sdpa' (or 'eager')"
            )

    def _refuse_hidden(self, name: str) -> None:
        """Refuse a model whose weights cannot be reached."""
        modules = [(path or "the model", module) for path, module in self.model.named_modules()]
        for path, module in modules:
            away = any(p.is_meta for p in (*module._parameters.values(), *module._buffers.values()) if p is not None)
            if away or getattr(vars(module).get("_hf_hook"), "offload", False):
                raise InputError(
                    f"the weights of {name} are offloaded, or not loaded ({path} is on the meta device): load all of "
                    "it to accelerators, or all to the CPU, without 'cpu' or 'disk' beside one in its device_map"
                )

    def _find_layers(self) -> Sequence[nn.Module]:
        count = self.config.num_hidden_layers
        for module in self.model.modules():
            if (
                isinstance(module, nn.ModuleList)
                and len(module) == count
                and self._attention_of(module[0]) is not None
            ):
                return list(module)
        raise UnsupportedModelError(
            f"{type(self.model).__name__} has no list of {count} decoder layers with attention in each"
        )

    @staticmethod
    def _attention_of(layer: nn.Module) -> nn.Module | None:
        """Return the submodule that holds the layer index, which is the one that updates the cache."""
        for module in layer.modules():
            has_index = isinstance(getattr(module, "layer_idx", None), int)
            if has_index and module is not layer and any(True for _ in module.children()):
                return module
        return None

    def _find_layer_types(self) -> list[str]:
        types = getattr(self.config, "layer_types", None)
        count = self.config.num_hidden_layers
        return list(types)[:count] if types is not None else ["attention"] * count

    def _find_windows(self) -> list[int | None]:
        """Ask transformers which cache each layer would get: that tells full, sliding and all else apart."""
        windows: list[int | None] = []
        for index, layer in enumerate(DynamicCache(config=self.config).layers):
            kind = self._types[index] if index < len(self._types) else type(layer).__name__
            if type(layer) is DynamicSlidingWindowLayer and "chunked" not in kind:
                windows.append(layer.sliding_window)
            elif type(layer) is DynamicLayer:
                windows.append(None)
            else:
                raise UnsupportedModelError(
                    f"layer {index} of {type(self.model).__name__} is of type {kind!r} ({type(layer).__name__}): "
                    "only full and sliding-window attention keep one KV per token that can be reused"
                )
        return windows

    def _find_rotaries(self) -> list[Rotary | None]:
        name = type(self.model).__name__
        embeddings = [m for path, m in self.model.named_modules() if path.endswith(("rotary_emb", "rotary_pos_emb"))]
        apply = getattr(sys.modules[type(self.attentions[0]).__module__], "apply_rotary_pos_emb", None)
        if not embeddings or apply is None:
            raise UnsupportedModelError(
                f"{name} has no rotary position embedding (RoPE): its keys cannot be moved to other positions"
            )
        head_dim = getattr(self.config, "head_dim", None) or (
            self.config.hidden_size // self.config.num_attention_heads
        )
        by_type = {kind: Rotary(embeddings[0], apply, head_dim, kind) for kind in dict.fromkeys(self._types)}
        return [by_type[kind] for kind in self._types]

    def _find_max_tokens(self) -> int:
        """Return the context length, or the length where a RoPE that depends on it would switch."""
        limit = int(self.config.max_position_embeddings)
        parameters = getattr(self.config, "rope_parameters", None) or {}
        nested = [value for value in parameters.values() if isinstance(value, dict)]
        for rope in nested or [parameters]:
            if rope.get("rope_type") == "longrope":
                limit = min(limit, int(rope["original_max_position_embeddings"]))
        return limit
