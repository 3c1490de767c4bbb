"""The model of one worker, with all that serving its chunks needs; refused by name where it cannot be right."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from chunkcache.engine.tuning import Tuning
from chunkcache.errors import InputError, UnsupportedModelError
from chunkcache.integrations.vllm.encoder import PagedEncoder
from chunkcache.integrations.vllm.identity import identity
from chunkcache.integrations.vllm.options import Options
from chunkcache.integrations.vllm.outline import Outline, check
from chunkcache.integrations.vllm.paged import PagedModel
from chunkcache.integrations.vllm.twin import shared_name
from chunkcache.kv import ChunkRef, hashed_label
from chunkcache.library import ChunkLibrary
from chunkcache.library.registry import warn_once
from chunkcache.prompt import Prompt, PromptBuilder
from chunkcache.store import MemoryStore, open_store

logger = logging.getLogger("chunkcache")


class ServedPages:
    """A worker's model and its library.

    Args:
        vllm_config: the engine's config.
        kv_cache_config: its KV cache.
        options: the connector's.

    Attributes:
        options: as given.
        ranks: how many tensor-parallel ranks there are.
        paged: runs the model.
        outline: what the library knows of it.
        encoder: computes chunks.
        store: keeps them.
        library: looks them up.
        tuning: what was measured for it.

    Raises:
        UnsupportedModelError: the model cannot be served right; the message says why.
        CalibrationError: the calibration is not this model's.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, options: Options) -> None:
        self.options = options
        refuse(vllm_config, kv_cache_config, options)
        config = vllm_config.model_config
        self.paged = PagedModel(find_runner(), vllm_config, kv_cache_config)
        self._vocab = config.get_vocab_size()
        self.outline = Outline(config.hf_text_config, config.dtype, self.paged.heads, self.paged.device)
        errors = check(self.paged, self.outline, self._vocab)
        rank, self.ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        self.encoder = PagedEncoder(self.paged, self.outline)
        self.store = open_store(options.store)
        own = name = identity(vllm_config, tokenizer, rank, self.ranks)
        as_saved = not (config.revision or config.hf_overrides or config.quantization)
        share = options.share and not isinstance(self.store, MemoryStore)
        if self.ranks == 1 and as_saved and (share or options.calibration is not None):
            name = self._agreed_name(config, own)
        self.library = ChunkLibrary(
            self.outline,
            self.store,
            name if share else own,
            options.tenant,
            PromptBuilder(tokenizer).lead_in,
            encoder=self.encoder,
        )
        self.tuning = Tuning(name, options.calibration, len(self.paged.heads))
        _ = self.tuning.calibration  # what is wrong with it is told now
        logger.info("chunkcache serves %s as %s; self-check %s", type(self.paged.model).__name__, name[:12], errors)

    def _agreed_name(self, config: Any, own: str) -> str:
        """Return the name that Hugging Face processes have for this model if their KV are the same, else `own`."""
        try:
            name = shared_name(config, own, self.encoder)
        except (OSError, InputError, subprocess.CalledProcessError, SafetensorError) as error:
            warn_once("chunk KV are not shared with transformers: %s", type(error).__name__)
            return own
        if name is None:
            warn_once("chunk KV are not shared with transformers, which computes others from this checkpoint")
        return name or own

    def check_length(self, ref: ChunkRef) -> None:
        """Refuse a chunk that the model has no positions, or no embeddings, for.

        Raises:
            InputError: it is too long behind its context, or has a token id that the model has not.
        """
        tokens = len(ref.context_ids) + len(ref.token_ids)
        most = self.outline.max_tokens
        if tokens > most or max(ref.token_ids, default=0) >= self._vocab:
            raise InputError(
                f"a chunk of {tokens} tokens with its context does not fit the model's {most}, or has a "
                f"token id of {self._vocab} or more"
            )

    def register(self, prompt: Prompt) -> None:
        """Give the chunks of a prompt the trust label of this engine, if it has one."""
        if self.options.trust:
            label = hashed_label("trust", self.options.trust)
            for span in prompt.spans:
                self.library.registry.add(self.library.ref(span.chunk_ids, prompt.context_ids), trust=label)


def refuse(vllm_config: Any, kv_cache_config: Any, options: Options) -> None:
    """Refuse what selective prefill over paged blocks is not right for.

    Raises:
        UnsupportedModelError: the message names it.
    """
    config, parallel = vllm_config.model_config, vllm_config.parallel_config
    groups = kv_cache_config.kv_cache_groups
    kinds = {_kind(group.kv_cache_spec, config.max_model_len) for group in groups}
    draft, device = vllm_config.speculative_config, vllm_config.device_config.device_type
    reasons = {
        f"a {device} device, where this has never run (option untested_device)": device != "cpu"
        and not options.untested_device,
        "experts over data-parallel ranks": parallel.data_parallel_size > 1 and parallel.is_moe_model is not False,
        "latent attention (MLA)": getattr(config, "use_mla", False),
        f"KV caches of kind {', '.join(sorted(kinds))}": kinds != {"FullAttentionSpec"} or len(groups) != 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "a draft model, whose own KV are not loaded": draft is not None and draft.method != "ngram",
        "quantised KV": vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32"),
        "images or sound": config.is_multimodal_model and config.hf_config.get_text_config() is not config.hf_config,
    }
    named = [reason for reason, there in reasons.items() if there]
    if named:
        raise UnsupportedModelError(f"{', '.join(named)}: not served")


def _kind(spec: Any, longest: int) -> str:
    """Return the kind of a KV cache; one with a window that no prompt goes beyond is a full one."""
    window = getattr(spec, "sliding_window", None)
    return "FullAttentionSpec" if window is not None and window >= longest else type(spec).__name__


def find_runner() -> Any:
    """Return vLLM's model runner, which is on the stack while it registers its KV caches: no other way leads to it.

    Raises:
        UnsupportedModelError: it is not there.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if hasattr(owner, "get_model") and hasattr(owner, "attn_groups"):
            return owner
        frame = frame.f_back
    raise UnsupportedModelError("this version of vLLM registers KV caches from elsewhere: its model is out of reach")
