"""Whether a Hugging Face process with the same checkpoint may share chunk KV with a worker of vLLM.

Such a process names its KV by a fingerprint of its weights in memory, which vLLM does not have. So the checkpoint is
loaded once by transformers, in a process of its own that ends again, for its fingerprint and the KV of a few tokens.
Where the worker's own KV of these agree, both use one name.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from chunkcache.blend.selfcheck import HALF_TOLERANCE, TOLERANCE, relative_error
from chunkcache.library.encoder import ChunkEncoder, Encoder
from chunkcache.models.cache import cache_dir, make_once

TOKENS = 48


def shared_name(model_config: Any, own: str, encoder: ChunkEncoder) -> str | None:
    """Return the fingerprint that transformers' model of this checkpoint has, or None if its KV are others.

    Args:
        model_config: vLLM's.
        own: identity of the worker's model; what was found is kept under it in the cache folder.
        encoder: computes with vLLM's model.

    Raises:
        CalledProcessError: transformers could not load the checkpoint.
    """
    file = cache_dir() / "vllm" / f"{own}.safetensors"
    dtype = str(model_config.dtype).removeprefix("torch.")
    if not file.is_file():
        command = [sys.executable, "-m", __name__, str(model_config.model), dtype]
        make_once(file, "check of a checkpoint", lambda path: _run([*command, str(path)]))
    with safe_open(file, "pt") as held:
        name: str = held.metadata()["fingerprint"]
        ids = tuple(held.get_tensor("ids").tolist())
        layers = [held.get_tensor(str(index)) for index in range(len(held.keys()) - 1)]
    (kv,) = encoder.encode(None, [ids])
    limit = TOLERANCE.get(model_config.dtype, HALF_TOLERANCE)
    agrees = len(layers) == len(kv.layers) and all(
        isinstance(mine, torch.Tensor) and mine.shape == theirs.shape and relative_error(mine.cpu(), theirs) < limit
        for mine, theirs in zip(kv.layers, layers, strict=True)
    )
    return name if agrees else None


def write_twin(model: str, dtype: str, file: Path) -> None:
    """Load a checkpoint with transformers, and write its fingerprint and the KV of a few tokens to `file`."""
    import chunkcache

    llm = chunkcache.wrap(*chunkcache.load_model(model, device="cpu", dtype=dtype), store="memory://?max_bytes=64MiB")
    decoder = llm.engine.decoder
    embedding: Any = decoder.model.get_input_embeddings()
    drawn = torch.randint(embedding.num_embeddings, (TOKENS,), generator=torch.Generator().manual_seed(0))
    (kv,) = Encoder(decoder).encode(None, [tuple(drawn.tolist())])
    layers = [layer for layer in kv.layers if isinstance(layer, torch.Tensor)]
    tensors = {str(index): layer.contiguous() for index, layer in enumerate(layers)}
    save_file({**tensors, "ids": drawn}, file, {"fingerprint": llm.fingerprint})


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    write_twin(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
