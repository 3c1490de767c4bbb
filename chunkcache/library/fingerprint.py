"""The fingerprint of a model: what a stored chunk KV must agree with to be used.

It covers all that decides keys and values: every byte of every weight, of quantised ones with their scales; rotary
frequencies as they are in memory; the config; what the modules are, and their plain attributes, among them which
adapter is active and how it is scaled; forward hooks; and the tokenizer. Two copies of one checkpoint agree in it,
and so do a model and what torch.compile makes of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import uuid
import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from chunkcache.blend.shadow import uncompiled
from chunkcache.errors import TokenizerMismatchError, UnsupportedModelError
from chunkcache.library.sentinel import plain_attributes
from chunkcache.library.tensors import TensorDigests, model_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NOT_IDENTITY = ("_name_or_path", "transformers_version", "architectures", "use_cache", "torch_dtype", "dtype")
_HARMLESS = ("transformers.", "accelerate.")  # hooks of these libraries record outputs or move tensors
_tokens: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


@torch.no_grad()
def fingerprint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | str, digests: TensorDigests | None = None
) -> str:
    """Return the identity of model and tokenizer as 64 hexadecimal digits (SHA-256).

    Args:
        model: the model.
        tokenizer: its tokenizer, or what `tokenizer_identity` says of it.
        digests: those of the weights that are known already.

    Raises:
        UnsupportedModelError: a weight has no memory that can be read.
    """
    digests = digests or TensorDigests()
    model = uncompiled(model)
    sha = hashlib.sha256()

    def add(*values: Any) -> None:
        sha.update(json.dumps(values, sort_keys=True, default=str).encode() + b"\n")

    add(type(model).__name__, str(model.dtype), _without(model.config.to_dict()))
    add(tokenizer if isinstance(tokenizer, str) else tokenizer_identity(tokenizer))
    for name, module in model.named_modules():
        attributes = [] if module is model or hasattr(module, "config_class") else sorted(plain_attributes(module))
        add(name, type(module).__qualname__, _ordered(attributes), [_token(hook) for hook in _foreign(module)])
    add([_token(hook) for hook in _global_hooks()])
    tensors = []
    for name, tensor in model_tensors(model):
        if tensor.device.type == "meta":
            raise UnsupportedModelError(
                f"the weight {name} is offloaded or not loaded (it is on the meta device): load the whole model "
                "to accelerators, or to the CPU, without device_map entries 'cpu' or 'disk' beside an accelerator"
            )
        tensors.append(tensor)
        add(name, list(tensor.shape), str(tensor.dtype), digests.of(tensor).hex())
    digests.keep(tensors)
    return sha.hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary and of what it does to a text before looking it up there."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    steps = [] if backend is None else [backend.normalizer, backend.pre_tokenizer]
    states = [str(step.__getstate__()) if step is not None else None for step in steps]
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    sha = hashlib.sha256(json.dumps([states, [vocabulary[token] for token in tokens]]).encode())
    sha.update("\0".join(tokens).encode(errors="surrogatepass"))
    return sha.hexdigest()


def _without(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config without what decides no KV, in the configs inside it too."""
    return {
        key: _without(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_IDENTITY
    }


def _ordered(value: Any) -> Any:
    """Return a plain value with its sets in order."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_ordered(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _ordered(item) for key, item in value.items()}
    return value


def _foreign(module: nn.Module) -> Iterator[Callable[..., Any]]:
    """Yield what other people put round a module's forward, but for libraries that change no output by it."""
    forward = vars(module).get("forward")
    bound = isinstance(forward, MethodType) and forward.__func__ is type(module).forward
    own = [] if forward is None or bound or hasattr(module, "_hf_hook") else [forward]
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values(), *own):
        function = hook.func if isinstance(hook, functools.partial) else hook
        if not (getattr(function, "__module__", None) or "").startswith(_HARMLESS):
            yield hook


def _global_hooks() -> list[Callable[..., Any]]:
    return [*nn_module._global_forward_pre_hooks.values(), *nn_module._global_forward_hooks.values()]


def _token(hook: Any) -> str:
    """Return a name for a hook that no other ever has.

    What it does cannot be read off it. KV that are computed under it are for this process, and for as long as it is
    there.
    """
    try:
        return _tokens.setdefault(hook, uuid.uuid4().hex)
    except TypeError:  # it can be no key of a dictionary
        return uuid.uuid4().hex


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot belong to the model.

    Raises:
        TokenizerMismatchError: it has ids that the model has no embedding for, or neither its BOS nor its EOS
            token is the model's.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    embedding: Any = model.get_input_embeddings()
    rows = embedding.num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise TokenizerMismatchError(
            f"the tokenizer {name!r} has ids up to {highest}, the model embeds only {rows}: "
            "load the tokenizer that belongs to the model"
        )
    configs = (model.config.get_text_config(decoder=True), model.generation_config)
    differ = []
    for kind in ("bos_token_id", "eos_token_id"):
        own = {token for config in configs for token in _as_list(getattr(config, kind, None))}
        theirs = getattr(tokenizer, kind)
        differ.append(bool(own) and theirs is not None and theirs not in own)
    if all(differ):
        raise TokenizerMismatchError(
            f"neither the BOS token {tokenizer.bos_token_id} nor the EOS token {tokenizer.eos_token_id} of the "
            f"tokenizer {name!r} is the model's: load the tokenizer that belongs to the model"
        )


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
