"""A shadow of a model: what one request may hook and configure while the model itself is never touched.

A shadow shares every weight, buffer and leaf module with its model. Only the modules on the way to what will be
hooked are shallow copies, with hooks of their own and a config of their own. It copies no
tensor, lives as long as one request, and makes requests of several threads independent of one another.

A shadow is not compiled, whatever its model is: what torch.compile traced is the forward of the model's own modules.
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

_WRAPPED = "_orig_mod"  # what torch.compile(module) calls the module inside
_TRACED = "_torchdynamo_orig_callable"  # and where torch.compile(function) keeps the function

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shadow_of(model: PreTrainedModel, modules: Iterable[str], attention: str | None) -> Any:
    """Return a shadow of `model`.

    Args:
        model: the model.
        modules: names, as in `named_modules`, of the modules to hook.
        attention: the attention implementation of the shadow; None for the model's.
    """
    config = model.config.get_text_config(decoder=True)
    own_config = copy.copy(config)
    if attention is not None:
        own_config._attn_implementation = attention
    return _shadow(model, "", _on_the_way(modules), config, own_config)


def uncompiled(model: Any) -> Any:
    """Return the model as it is without torch.compile: itself, or a shadow of it that shares its config, too.

    Compiled may be the model, its forward, or any module or forward inside it.
    """
    model = unwrapped(model)
    compiled = [name for name, module in model.named_modules() if _is_compiled(module)]
    if not compiled:
        return model
    names = [".".join(part for part in name.split(".") if part != _WRAPPED) for name in compiled]
    config = model.config.get_text_config(decoder=True)
    return _shadow(model, "", _on_the_way(names), config, config)


def _on_the_way(modules: Iterable[str]) -> set[str]:
    """Return the names of these modules, and of all that they are in."""
    wanted = {""}
    for name in modules:
        parts = name.split(".")
        wanted.update(".".join(parts[: end + 1]) for end in range(len(parts)))
    return wanted


def _is_compiled(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return module._compiled_call_impl is not None or _WRAPPED in module._modules or hasattr(forward, _TRACED)


def unwrapped(module: Any) -> Any:
    """Return the module that `torch.compile(module)` has put a wrapper round, or the module itself."""
    return getattr(module, "_modules", {}).get(_WRAPPED, module)


def _shadow(module: nn.Module, path: str, wanted: set[str], config: Any, own_config: Any) -> nn.Module:
    twin = type(module).__new__(type(module))
    state = {name: _rebound(value, module, twin) for name, value in module.__dict__.items()}
    state.update({name: state[name].copy() for name in _HOOKS})
    state["_compiled_call_impl"] = None
    if state.get("config") is config:
        state["config"] = own_config
    children = dict(module._modules)
    for name, child in children.items():
        below = f"{path}.{name}" if path else name
        if child is not None and below in wanted:
            children[name] = _shadow(unwrapped(child), below, wanted, config, own_config)
    state["_modules"] = children
    twin.__dict__.update(state)
    return twin


def _rebound(value: Any, module: nn.Module, twin: nn.Module) -> Any:
    """Bind to `twin` what is bound to `module`: accelerate and torch.compile replace forward by such attributes."""
    value = getattr(value, _TRACED, value)
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)
    if isinstance(value, functools.partial) and value.args[:1] == (module,):
        return functools.partial(value.func, twin, *value.args[1:], **value.keywords)
    return value
