"""Two replicas of vLLM with chunkcache over one Redis, on Ray Serve: a chunk that one has computed, both have.

It is run by hand, in an environment with vLLM (see docs/vllm.md), where a Redis or Valkey listens:

    pip install "ray[serve]"
    python examples/vllm/ray_serve.py HuggingFaceTB/SmolLM2-135M-Instruct redis://127.0.0.1:6379

`ray[llm]` 2.60 wants vLLM 0.29, for which the connector is not made: so this deploys vLLM's engine itself. With a
GPU, which this has never run on, give each replica one by `ray_actor_options={"num_gpus": 1}`, and leave out `dtype`.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

from ray import serve

PASSAGES = ["Mawdle Fell is 412 metres high.", "The ferry sails twice a day.", "The bridge was opened in 1931."]
QUESTIONS = ["How high is Mawdle Fell?", "How often does the ferry sail?", "When was the bridge opened?"]


@serve.deployment(num_replicas=2, max_ongoing_requests=16, ray_actor_options={"num_cpus": 1})
class Engine:
    """One engine; requests of all its clients are batched by it."""

    def __init__(self, model: str, store: str) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; these two have no meaning on a GPU
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or the replicas share their first cores
        from transformers import AutoTokenizer
        from vllm import AsyncEngineArgs
        from vllm.config import KVTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        from chunkcache.integrations.vllm import transfer_config
        from chunkcache.prompt import PromptBuilder

        transfer = KVTransferConfig(**transfer_config(store=store, policy="query"))
        self.prompts = PromptBuilder(AutoTokenizer.from_pretrained(model))
        args = AsyncEngineArgs(
            model, dtype="float32", max_model_len=2048, enforce_eager=True, kv_transfer_config=transfer
        )
        self.engine = AsyncLLM.from_engine_args(args)

    async def answer(self, request_id: str, question: str, passages: list[str]) -> dict[str, object]:
        """Answer a question over passages."""
        from vllm import SamplingParams

        from chunkcache.integrations.vllm import request_params

        prompt = self.prompts.build(question, passages)
        params = SamplingParams(temperature=0, max_tokens=32, extra_args=request_params(prompt))
        asked = {"prompt_token_ids": list(prompt.token_ids)}
        async for output in self.engine.generate(asked, params, request_id):
            last = output
        return {"process": os.getpid(), "cached": last.num_cached_tokens, "text": last.outputs[0].text}


def main(model: str, store: str) -> None:
    """Ask each question over the passages, in orders that differ, several times at once."""
    handle = serve.run(Engine.bind(model, store), route_prefix=None)

    def ask(number: int) -> dict[str, object]:
        turn = number % len(PASSAGES)
        passages = PASSAGES[turn:] + PASSAGES[:turn]
        return handle.answer.remote(str(number), QUESTIONS[number % len(QUESTIONS)], passages).result()

    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(ask, range(12)):
            print(answer)
    serve.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
