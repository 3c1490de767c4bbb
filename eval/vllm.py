"""vLLM with the connector and without: time to the first token, many at once, decoding, memory, and equal answers.

    python -m chunkcache.eval.vllm MODEL_FOLDER DATA --count 8 --out vllm.json

Each arm is a process of its own: chunkcache alone, for the answers; an engine with the connector, in which prompts
are asked with and without their chunks in turn; and an engine without it. It needs the extra `[vllm]`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from chunkcache.eval.data import cut, load_cases
from chunkcache.prompt import Prompt

POLICIES = ("reuse", "link:k=8", "query")
NEW = 32  # tokens of an answer
DECODED = 64  # tokens that decoding is timed over
EACH = 0.3  # GiB of chunk KV that one prompt may take, under all policies together


def store_for(prompts: int) -> str:
    """Return the URL of a store that holds the chunks of so many prompts."""
    return f"memory://?max_bytes={max(2, math.ceil(EACH * prompts))}GiB"


def reference(model: str, data: str, count: int) -> dict[str, Any]:
    """Return the prompts, in orders of their chunks that nothing has seen, and chunkcache's own answers to them.

    The `stored` bytes of chunk KV are what the connector's store holds afterwards, too.
    """
    import chunkcache
    from chunkcache.integrations.vllm import request_params

    llm = chunkcache.wrap(*chunkcache.load_model(model, device="cpu", dtype="float32"), store=store_for(count))
    draw, rows = random.Random(0), []
    for case in cut(load_cases(data, chunks=5, limit=count, fill=True), 512, llm.tokenizer):
        prompt = llm.prompts.build(case.question, draw.sample(case.chunks, len(case.chunks)))
        answers = {}
        for policy in POLICIES:
            request = llm.engine.prepare(partial(_same, prompt), policy, NEW, {"do_sample": False})
            answers[policy] = list(llm.engine.generate(request).token_ids)
        extra = {policy: request_params(prompt, policy) for policy in POLICIES}
        rows.append({"ids": list(prompt.token_ids), "extra": extra, "answers": answers})
    return {"rows": rows, "stored": llm.store.stats().nbytes}


class Arm:
    """One engine; `store` is the URL of our connector's, None for an engine without it."""

    def __init__(self, model: str, store: str | None = None) -> None:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        from chunkcache.integrations.vllm import transfer_config

        options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 8192}
        if store is not None:
            options["kv_transfer_config"] = KVTransferConfig(**transfer_config(store=store))
        self._llm = LLM(model, **options)

    def ask(self, asked: list[tuple[list[int], Any]], new: int) -> tuple[float, list[Any]]:
        """Ask prompts together; return the seconds that it took, and vLLM's outputs."""
        from vllm import SamplingParams

        params = [SamplingParams(max_tokens=new, temperature=0, extra_args=extra) for _, extra in asked]
        began = time.perf_counter()
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids, _ in asked], params, use_tqdm=False)
        return time.perf_counter() - began, outputs

    def decode_s(self, ids: list[int]) -> float:
        """Return the seconds per token of a short prompt without chunks, the best of three."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=DECODED, temperature=0, ignore_eos=True)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            self._llm.generate([{"prompt_token_ids": ids[:64]}], params, use_tqdm=False)
            times.append((time.perf_counter() - began) / DECODED)
        return min(times)


def with_connector(model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure the engine with the connector; requests that name their chunks in turn with plain ones."""
    arm = Arm(model, store_for(len(rows)))
    arm.ask([(rows[0]["ids"][:40], None)], 2)
    result: dict[str, Any] = {"decode_s": arm.decode_s(rows[0]["ids"]), "equal": {}}
    for policy in POLICIES:
        equal, ttft = 0, []
        for row in rows:
            spec = row["extra"][policy]["kv_transfer_params"]["chunkcache"]
            arm.ask([(row["ids"], {"kv_transfer_params": {"chunkcache": {**spec, "warm": True}}})], 1)
            ttft.append(arm.ask([(row["ids"], row["extra"][policy])], 1)[0])
            _, (output,) = arm.ask([(row["ids"], row["extra"][policy])], NEW)
            fused = (output.kv_transfer_params or {}).get("chunkcache", {}).get("hits", 0)
            equal += fused == len(spec["spans"]) and list(output.outputs[0].token_ids) == row["answers"][policy]
        result["equal"][policy], result[f"ttft_{policy}"] = equal, ttft
    pairs = []
    for index, row in enumerate(rows):  # the first tokens differ, so that no block of another turn serves a plain one
        plain = [10 + index, *row["ids"][1:]]
        pairs.append((arm.ask([(row["ids"], row["extra"]["query"])], 1)[0], arm.ask([(plain, None)], 1)[0]))
    result["pairs"] = pairs
    fused = [(row["ids"], row["extra"]["query"]) for row in rows[:8]]
    plain_ones = [([20 + index, *row["ids"][1:]], None) for index, row in enumerate(rows[:8])]
    result["together"] = arm.ask(fused, NEW)[0], arm.ask(plain_ones, NEW)[0]
    return {**result, "memory": _peak()}


def without_connector(model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Measure the engine without the connector."""
    arm = Arm(model)
    arm.ask([(rows[0]["ids"][:40], None)], 2)
    result = {"decode_s": arm.decode_s(rows[0]["ids"])}
    arm.ask([([20 + index, *row["ids"][1:]], None) for index, row in enumerate(rows[:8])], NEW)
    return {**result, "memory": _peak()}


def table(result: dict[str, Any], count: int) -> str:
    """Return what was measured, as lines of text."""
    ours, theirs = result["with"], result["without"]
    ratio = statistics.median(fused / plain for fused, plain in ours["pairs"])
    together = ours["together"][1] / ours["together"][0]
    lines = [f"TTFT query, connector / plain: {ratio:.3f} (median of {count})"]
    lines += [f"answers equal, {policy}: {ours['equal'][policy]} of {count}" for policy in POLICIES]
    lines.append(f"{min(8, count)} at once, requests per second, connector / plain: {together:.2f}")
    lines.append(f"decoding without chunks, connector / none: {theirs['decode_s'] / ours['decode_s']:.3f}")
    memory = (ours["memory"] - result["stored"]) / theirs["memory"]
    lines.append(f"most memory of the process, less what is stored, connector / none: {memory:.3f}")
    return "\n".join(lines)


def main() -> None:
    """Run all arms, each in a process of its own, and write and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("vllm.json"))
    parser.add_argument("--arm", choices=("reference", "with", "without"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm is not None:
        rows = json.loads(given.out.read_text())["rows"] if given.arm != "reference" else []
        known = json.loads(given.out.read_text()) if given.out.exists() else {}
        if given.arm == "reference":
            known.update(reference(given.model, given.data, given.count))
        else:
            measure = with_connector if given.arm == "with" else without_connector
            known[given.arm] = measure(given.model, rows)
        given.out.write_text(json.dumps(known))
        return
    given.out.unlink(missing_ok=True)
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    for arm in ("reference", "without", "with"):
        command = [sys.executable, "-m", "chunkcache.eval.vllm", given.model, given.data]
        command += ["--count", str(given.count), "--out", str(given.out), "--arm", arm]
        subprocess.run(command, check=True, env={**one_process, **os.environ})
    result = json.loads(given.out.read_text())
    print(table(result, len(result["rows"])))


def _same(prompt: Prompt) -> Prompt:
    return prompt


def _peak() -> int:
    """Return the most bytes of memory that this process held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


if __name__ == "__main__":
    main()
