"""The model that is measured, in the forms that peers read: the same weights, value by value."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from chunkcache.errors import PeerError, missing_extra
from chunkcache.eval.peers.registry import spec_of
from chunkcache.library.fingerprint import fingerprint
from chunkcache.models import ALIASES


def peer_weights(
    name: str, folder: Path, model_name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Return the path from which the peer called `name` loads `model`, written below `folder` the first time.

    Args:
        name: the peer.
        folder: that of the peers' environments.
        model_name: what the model was loaded by.
        model: the model.
        tokenizer: its tokenizer.

    Raises:
        PeerError: the peer reads GGUF files, and the model was not loaded from one or is not float32.
    """
    return weights_as(spec_of(name).weights, name, folder, model_name, model, tokenizer)


def weights_as(
    form: str, name: str, folder: Path, model_name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """Return the path of a model in the form of `PeerSpec.weights`, as `peer_weights` does."""
    made = folder / "models"
    if form == "folder":
        return model_folder(made, model, tokenizer)
    made.mkdir(parents=True, exist_ok=True)
    source = ALIASES[model_name].path() if model_name in ALIASES else Path(model_name).expanduser()
    if source.suffix.lower() != ".gguf" or model.dtype != torch.float32:
        raise PeerError(
            f"{name} reads GGUF files, in float32; {model_name} in {str(model.dtype).removeprefix('torch.')} cannot "
            "be given to it with the same weights"
        )
    path = made / f"{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.gguf"
    with FileLock(f"{path}.lock"):
        if not path.is_file():
            float32_gguf(source, path)
    return path


def model_folder(made: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Return the folder below `made` that a model is loaded from, written the first time."""
    made.mkdir(parents=True, exist_ok=True)
    path = made / fingerprint(model, tokenizer)[:16]
    with FileLock(f"{path}.lock"):
        if not path.is_dir():
            _save(path, model, tokenizer)
    return path


def _save(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    partial = Path(f"{path}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(path)


def float32_gguf(source: Path, target: Path) -> None:
    """Write the GGUF file `source` again with every tensor as float32, as transformers computes with it.

    All metadata are kept but those that say how the weights are stored.
    """
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("gguf", f"writing {str(target)!r}", error) from None

    reader = gguf.GGUFReader(source)
    partial = Path(f"{target}.partial")
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(partial, architecture)
    own = {"general.architecture", "general.file_type", "general.quantization_version", "general.alignment"}
    for name, field in reader.fields.items():
        if name in own or name.startswith("GGUF."):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values: Any = gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
