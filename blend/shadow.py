"""A shadow of a model: what one request may hook and configure while the model itself is never touched.

A shadow shares every weight, buffer and leaf module with its model. Only the modules on the way to what will be
hooked are shallow copies, with hooks of their own and a config of their own. It copies no
tensor, lives as long as one request, and makes requests of several threads independent of one another.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shadow_of(model: PreTrainedModel, modules: Iterable[str], attention: str | None) -> Any:
    """Return a shadow of `model`.

    Args:
        model: the model.
        modules: names, as in `named_modules`, of the modules to hook.
        attention: the attention implementation of the shadow; None for the model's.
    """
    wanted = {""}
    for name in modules:
        parts = name.split(".")
        wanted.update(".".join(parts[: end + 1]) for end in range(len(parts)))
    config = model.config.get_text_config(decoder=True)
    own_config = copy.copy(config)
    if attention is not None:
        own_config._attn_implementation = attention
    return _shadow(model, "", wanted, config, own_config)


def _shadow(module: nn.Module, path: str, wanted: set[str], config: Any, own_config: Any) -> nn.Module:
    twin = type(module).__new__(type(module))
    state = {name: _rebound(value, module, twin) for name, value in module.__dict__.items()}
    state.update({name: state[name].copy() for name in _HOOKS})
    if state.get("config") is config:
        state["config"] = own_config
    children = dict(module._modules)
    for name, child in children.items():
        below = f"{path}.{name}" if path else name
        if child is not None and below in wanted:
            children[name] = _shadow(child, below, wanted, config, own_config)
    state["_modules"] = children
    twin.__dict__.update(state)
    return twin


def _rebound(value: Any, module: nn.Module, twin: nn.Module) -> Any:
    """Bind to `twin` what is bound to `module`: accelerate replaces forward by such attributes."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)
    if isinstance(value, functools.partial) and value.args[:1] == (module,):
        return functools.partial(value.func, twin, *value.args[1:], **value.keywords)
    return value
