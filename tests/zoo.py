"""Tiny randomly initialised models, one per family that is served and some that are refused.

Their weights are large enough for attention to matter: a wrong mask, position or key shows in the logits.
A new family is one line of `FAMILIES`, and appears by itself in the test matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

LAYERS = 4
WINDOW = 8
MAX_POSITIONS = 512
STD = 0.12  # attention scores vary by about one, where the 0.02 of real models would leave them all alike

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
TWO_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
EXPERTS = {"head_dim": 16, "num_experts_per_tok": 4}  # all 4: rounding cannot flip a router's choice
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
DYNAMIC_NTK = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
COMPRESSED = {  # keys and values of different sizes, rotated in their last dimensions only
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": LAYERS,
}
GRANITE = {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}


@dataclass(frozen=True)
class Family:
    """One family: its config class in transformers, what differs from `BASE`, and the attentions it has."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    attentions: tuple[str, ...] = ("sdpa", "eager")


FAMILIES = {
    "llama": Family("LlamaConfig"),
    "llama-llama3-rope": Family("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": Family("LlamaConfig", {"rope_parameters": YARN}),
    "llama-dynamic-ntk": Family("LlamaConfig", {"rope_parameters": DYNAMIC_NTK}),
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config", {"head_dim": 32}),
    "mistral-sliding": Family("MistralConfig", {"sliding_window": WINDOW}),
    "gemma2": Family(
        "Gemma2Config",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, **ALTERNATING},
        attentions=("eager",),
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "rope_parameters": TWO_ROPES, **ALTERNATING},
    ),
    "phi": Family("PhiConfig"),
    "phi3": Family("Phi3Config"),
    "phi3-longrope": Family(
        "Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": MAX_POSITIONS // 2}
    ),
    "olmo2": Family("Olmo2Config"),
    "granite": Family("GraniteConfig", GRANITE),
    "glm": Family("GlmConfig", {"head_dim": 16}),
    "glm4": Family("Glm4Config", {"head_dim": 16}),
    "cohere": Family("CohereConfig", {"logit_scale": 1.0, "use_qk_norm": True}),
    "cohere2": Family("Cohere2Config", {"logit_scale": 1.0, **ALTERNATING}),
    "stablelm": Family("StableLmConfig"),
    "starcoder2": Family("Starcoder2Config", {"sliding_window": WINDOW}),
    "smollm3": Family("SmolLM3Config", {"no_rope_layers": [1, 0, 1, 0]}),
    "gpt-neox": Family("GPTNeoXConfig"),
    "nanochat": Family("NanoChatConfig"),
    "qwen3-moe": Family("Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 32, **EXPERTS}),
    "gpt-oss": Family("GptOssConfig", {"num_local_experts": 4, **EXPERTS, **ALTERNATING}, attentions=("eager",)),
}
SERVED = [(name, attention) for name, family in FAMILIES.items() for attention in family.attentions]

REFUSED = {
    "gpt2": Family("GPT2Config"),
    "bloom": Family("BloomConfig"),
    "mamba": Family("MambaConfig"),
    "qwen3-next": Family(
        "Qwen3NextConfig", {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, **EXPERTS}
    ),
    "t5": Family("T5Config", {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}),
    "llama4": Family(
        "Llama4TextConfig",
        {"head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 96, "attention_chunk_size": WINDOW},
    ),
    "deepseek-v3": Family("DeepseekV3Config", COMPRESSED),
}


def new(
    name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, vocab_size: int = 128, **options: Any
) -> PreTrainedModel:
    """Return a model of its own that a test may change; `options` go into its config."""
    family = FAMILIES.get(name) or REFUSED[name]
    config_class: type[PreTrainedConfig] = getattr(transformers, family.config)
    config = config_class(**{**BASE, "vocab_size": vocab_size, **family.options, **options})
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation=attention, dtype=dtype).eval()
    randomise(model)
    return model


def build(
    name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, vocab_size: int = 128
) -> PreTrainedModel:
    """Return the model of that name, the same one each time; a test must leave it as it was."""
    return _built(name, attention, dtype, vocab_size)  # in one order, however it was asked for


_built = cache(new)


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Fill every parameter from `seed`, the same values in every dtype; norms stay near what they start at."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(STD * noise)
        elif name.endswith("sinks"):
            parameter.copy_(noise)
        else:  # a norm's weight is near 1, or near 0 where the family adds 1 itself; a bias is near 0
            parameter.copy_(parameter.float().mean().round() + STD * noise)
