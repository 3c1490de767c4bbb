"""An engine of vLLM with the connector, the models that it serves, and what chunkcache itself answers.

The engine runs in the test's process, so that tests reach both sides of the connector.
"""

from __future__ import annotations

import os
import random
from contextlib import contextmanager

import torch

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", "1")

NEW = 12  # tokens of an answer
POLICIES = ("reuse", "link:k=4", "query:ratio=0.1,lead=64")
COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "head_dim": 32,
    "tie_word_embeddings": False,
    "initializer_range": 0.12,
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "phi3": ("Phi3Config", {}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": 200,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "mistral-wide": ("MistralConfig", {"sliding_window": 2048}),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 200}),
}


def save_model(folder, family, seed=0):
    """Write a tiny random model of a family, with a tokenizer of its size."""
    import transformers
    from helpers_tokenizer import tiny_tokenizer

    kind, options = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**{**COMMON, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.12)
            elif "bias" not in name:
                weight.add_(torch.randn(weight.shape) * 0.1)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tiny_tokenizer(COMMON["vocab_size"]).save_pretrained(folder)
    return str(folder)


@contextmanager
def engine(folder, store="memory://?max_bytes=256MiB", connector=True, extra=None, **options):
    """Start an engine, and end it."""
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    from chunkcache.integrations.vllm import transfer_config

    if connector:
        options["kv_transfer_config"] = KVTransferConfig(**transfer_config(store=store, **(extra or {})))
    options = {"max_model_len": 2048, "dtype": "float32", **options}
    llm = LLM(folder, enforce_eager=True, disable_log_stats=False, seed=0, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del llm
        cleanup_dist_env_and_memory()


def made_prompt(seed, chunks=4, length=160, question=24, prefix=20, pool=0):
    """Return a prompt of random tokens; prompts of one `pool` have the same chunks, in another order."""
    from chunkcache.prompt.prompt import PromptIds

    def tokens(random_, count):
        return tuple(random_.randrange(10, 500) for _ in range(count))

    of_pool, own = random.Random(pool), random.Random(1000 + seed)
    ids = PromptIds(tokens(of_pool, prefix))
    texts = [tokens(of_pool, length + 7 * number) for number in range(chunks)]
    own.shuffle(texts)
    for text in texts:
        ids.add_chunk(text)
    ids.add(tokens(own, question))
    return ids.build(prefix)


def ask(llm, *asked, new=NEW, lora=None, **options):
    """Ask prompts together, each `(prompt, policy)`; return vLLM's outputs.

    With None for a policy nothing is said of chunks, with False that there are to be none. `lora` has an adapter, or
    None, for each.
    """
    prompts, params = zip(*(generation(prompt, policy, new, **options) for prompt, policy in asked), strict=True)
    return llm.generate(prompts, params, use_tqdm=False, lora_request=lora)


def generation(prompt, policy, new=NEW, logprobs=None, **options):
    """Return what vLLM is given for one prompt: it, and its sampling params."""
    from vllm import SamplingParams

    extra = _extra(prompt, policy, options)
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, extra_args=extra, logprobs=logprobs)
    return {"prompt_token_ids": list(prompt.token_ids)}, params


def finish(llm):
    """Step until all requests are answered; return their outputs."""
    outputs = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += [output for output in llm.llm_engine.step() if output.finished]
    return outputs


def _extra(prompt, policy, options):
    from chunkcache.integrations.vllm import request_params

    if policy is False:
        return {"kv_transfer_params": {"chunkcache": False}}
    return None if policy is None else request_params(prompt, policy, **options)


def drain(llm):
    """Step until all chunks that were missing are computed."""
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.connector.has_pending_push_work():
        core.step_fn()
    core.step_fn()


def ids_of(output):
    """Return the token ids of an answer."""
    return list(output.outputs[0].token_ids)


def figures(output):
    """Return what the connector tells of a request, None where nothing was reused."""
    return (output.kv_transfer_params or {}).get("chunkcache")


def sides(llm):
    """Return the connector beside the scheduler and the one in the worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return llm.llm_engine.engine_core.engine_core.scheduler.connector, get_kv_transfer_group()


def counted(llm):
    """Return the counters of engine and connector, by name and tier; None for a tier where there is none."""
    counts = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            label = metric.labels.get("tier") or metric.labels.get("source")
            counts[metric.name.removeprefix("vllm:"), label] = metric.value
    return counts


class Reference:
    """What chunkcache itself answers, on the same weights in transformers."""

    def __init__(self, folder, dtype="float32"):
        import chunkcache

        self.llm = chunkcache.wrap(*chunkcache.load_model(folder, device="cpu", dtype=dtype))

    def answer(self, prompt, policy, new=NEW):
        request = self.llm.engine.prepare(lambda: prompt, policy, new, {"do_sample": False})
        return list(self.llm.engine.generate(request).token_ids)

    def log_probs(self, prompt, policy):
        """Return the log-probabilities `[vocab]` of the first token of an answer."""
        request = self.llm.engine.prepare(lambda: prompt, policy, 1, {"do_sample": False})
        return self.llm.engine.prefill(request).logits.float().log_softmax(-1)
