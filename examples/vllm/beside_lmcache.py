"""LMCache for prefixes and chunkcache for chunks, in one engine of vLLM: what each of them does for which request.

It is run by hand, in an environment with vLLM and LMCache (see docs/vllm.md):

    python examples/vllm/beside_lmcache.py HuggingFaceTB/SmolLM2-135M-Instruct

It starts LMCache's server beside it. On a CPU LMCache runs in this way only: its `LMCacheConnectorV1` wants a GPU.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; has no meaning on a GPU
os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")  # it would tell its makers

PASSAGES = [
    "Mawdle Fell is 412 metres high. A path leads to its top from the village of Orme. " * 6,
    "The ferry sails twice a day in winter, and four times in summer. " * 7,
    "The bridge over the river was opened in 1931, and closed to lorries in 1988. " * 6,
]
QUESTION = "When was the bridge opened?"
TOKENS = 16
PATIENCE_S = 60.0


@contextmanager
def lmcache_server() -> Iterator[int]:
    """Run LMCache's server, with 1 GB of memory and chunks of 64 tokens; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lmcache.v1.multiprocess.server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--chunk-size", "64", "--l1-size-gb", "1", "--eviction-policy", "LRU", "--prometheus-port", "0"]
    command += ["--supported-transfer-mode", "auto"]  # by default only what a GPU has
    server = subprocess.Popen(command)
    try:
        yield port
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()


def main(model: str) -> None:
    """Ask plain prompts and prompts with chunks in turn, and check and print what was reused."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    from chunkcache.integrations.vllm import request_params, transfer_config
    from chunkcache.prompt import PromptBuilder

    with lmcache_server() as port:
        lmcache = {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
        }
        both = KVTransferConfig(
            kv_connector="MultiConnector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"connectors": [transfer_config(policy="link:k=8"), lmcache]},
        )
        llm = LLM(
            model, dtype="float32", enforce_eager=True, max_model_len=2048, block_size=32,
            enable_prefix_caching=False,  # vLLM's own, so that what is cached is LMCache's
            disable_log_stats=False, kv_transfer_config=both,
        )  # fmt: skip
        prompts = PromptBuilder(AutoTokenizer.from_pretrained(model))

        def ask(passages: list[str], chunks: bool) -> tuple[list[int], int, dict[str, Any] | None]:
            """Return the answer, how many tokens vLLM had of others, and what chunkcache did."""
            prompt = prompts.build(QUESTION, passages)
            extra = request_params(prompt, warm=True) if chunks else None
            params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, extra_args=extra)
            (output,) = llm.generate([{"prompt_token_ids": list(prompt.token_ids)}], params, use_tqdm=False)
            done = (output.kv_transfer_params or {}).get("chunkcache")
            print(f"{'chunks' if chunks else 'plain'}: {output.num_cached_tokens} tokens cached; {done}")
            return list(output.outputs[0].token_ids), output.num_cached_tokens, done

        def asked_twice(passages: list[str]) -> None:
            """Ask a new plain prompt, and again until LMCache, which stores behind the answer, has it."""
            answer, cached, done = ask(passages, chunks=False)
            assert (cached, done) == (0, None), "a new prompt was taken from what others left"
            end = time.monotonic() + PATIENCE_S
            while cached == 0 and time.monotonic() < end:
                time.sleep(0.5)
                again, cached, done = ask(passages, chunks=False)
                assert (again, done) == (answer, None), "LMCache loaded other KV"
            assert cached > 0, "LMCache did not load what it was to save"

        turned = PASSAGES[1:] + PASSAGES[:1]
        asked_twice(PASSAGES)
        fused, _, done = ask(turned, chunks=True)
        assert done is not None
        assert done["hits"] == len(PASSAGES)
        asked_twice(turned)  # the first time nothing of it is cached: fused KV were not taken for exact ones
        again, _, done = ask(turned, chunks=True)
        assert done is not None
        assert (again, done["hits"]) == (fused, len(PASSAGES))
        print("right")
        llm.llm_engine.engine_core.shutdown()  # while LMCache's server is there


if __name__ == "__main__":
    main(*sys.argv[1:])
