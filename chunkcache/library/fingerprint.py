"""The fingerprint of a model: what a stored chunk KV must agree with to be used.

It covers the architecture's config, the dtype, the tokenizer, and a sample of every weight tensor. Two
fine-tunes of one base differ in it; two copies of one checkpoint do not.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from chunkcache.errors import TokenizerMismatchError

SAMPLES = (
    256  # values hashed of each weight tensor, evenly spread: a full hash would read every byte of a large model
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NOT_IDENTITY = ("_name_or_path", "transformers_version", "architectures", "use_cache", "torch_dtype", "dtype")


@torch.no_grad()
def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the identity of model and tokenizer as 64 hexadecimal digits (SHA-256)."""
    sha = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_IDENTITY}
    sha.update(json.dumps(config, sort_keys=True, default=str).encode())
    sha.update(str(model.dtype).encode())
    sha.update(json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])).encode())
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
        sha.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        sha.update(sample.to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


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
