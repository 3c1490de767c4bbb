"""A GGUF file of a few kilobytes: a random model in blocks of Q4_1, with the tiny tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from helpers_tokenizer import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

_ARCHITECTURES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
_BLOCKS = gguf.GGMLQuantizationType.Q4_1


def write_gguf(
    path: Path, chat_template: str, *, pre: str | None = "gpt-2", architecture: str = "llama"
) -> LlamaForCausalLM | Qwen2ForCausalLM:
    """Write the file; return the model that it holds, with its weights as they come out of their blocks.

    `pre` names the pre-tokenizer; the tiny tokenizer's is "gpt-2". `architecture` is "llama" or "qwen2".
    """
    tokenizer = tiny_tokenizer()
    config_class, model_class = _ARCHITECTURES[architecture]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    model = model_class(config).eval()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, chat_template, pre)
    kind = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        values = weight.numpy()
        if values.ndim > 1:
            blocks = gguf.quantize(values, _BLOCKS)
            weight.copy_(torch.from_numpy(gguf.dequantize(blocks, _BLOCKS)))
            values = _interleaved(blocks, heads.get(name.split(".")[-2]) if architecture == "llama" else None)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")),
            values,
            raw_dtype=_BLOCKS if weight.ndim > 1 else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer: gguf.GGUFWriter, chat_template: str, pre: str | None) -> None:
    tokenizer = tiny_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    )
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(chat_template)


def _interleaved(rows: np.ndarray, heads: int | None) -> np.ndarray:
    """Put the rows of queries and keys into llama.cpp's order: the two of each rotary pair beside one another."""
    if heads is None:
        return rows
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
