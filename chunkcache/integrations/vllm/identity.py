"""Whose KV they are: the identity of the weights that a worker holds, from the files of their checkpoint.

vLLM packs weights for its kernels, and what is in memory says little. So the bytes of the checkpoint are hashed,
with the config, the dtype, the tokenizer, and which part of the heads the worker has.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from blake3 import blake3

from chunkcache.errors import UnsupportedModelError
from chunkcache.library.fingerprint import tokenizer_identity

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
NOT_IDENTITY = ("_name_or_path", "transformers_version", "architectures", "use_cache", "torch_dtype", "dtype")


def identity(vllm_config: Any, tokenizer: Any, rank: int, ranks: int) -> str:
    """Return the identity of a worker's model, as 64 hexadecimal digits.

    Raises:
        UnsupportedModelError: its weights are in no files here.
    """
    config = vllm_config.model_config
    given = config.hf_config.to_dict()
    named = {name: value for name, value in given.items() if name not in NOT_IDENTITY}
    files = _weights(str(config.model), config.revision)
    digests = sorted(_digest(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    part = [str(config.dtype), str(config.quantization), rank, ranks, tokenizer_identity(tokenizer)]
    return hashlib.sha256(
        json.dumps(["vllm", named, part, digests], sort_keys=True, default=str).encode()
    ).hexdigest()


def _weights(model: str, revision: str | None) -> list[Path]:
    folder = Path(model).expanduser()
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
    for pattern in WEIGHTS:
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise UnsupportedModelError(f"there are no weights in {folder}: chunk KV cannot be told from another model's")


@lru_cache(maxsize=256)
def _digest(path: str, size: int, changed: int) -> str:
    """Return a hash of a file, which is read once as long as it is not written."""
    digest: str = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    return digest
