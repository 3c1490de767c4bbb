"""One engine of vLLM with the connector, while its Redis is killed, its entries are damaged and its clients leave.

    python -m chunkcache.eval.vllm_chaos MODEL_FOLDER DATA --requests 500 --out chaos.json

Each answer is greedy, and compared with what is right for what it was computed from, as vLLM says in the answer:

- nothing stored: what an engine without the connector answers;
- all chunks stored: what this engine answered before, over a store that was well;
- some of them stored: what it answers afterwards, over a store that holds just these.

Anything else is wrong. It needs the extras `[vllm]` and `[eval]`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chunkcache.eval.data import load_cases
from chunkcache.eval.soak import resident, valkey
from chunkcache.eval.valkey_faults import Faults
from chunkcache.eval.vllm_answers import Answer, Engine, Judge, Kind, running
from chunkcache.kv import TokenIds
from chunkcache.prompt import PromptBuilder

POLICIES = ("link:k=8", "query:ratio=0.15,lead=64")  # a ratio of its own choosing depends on how fast the machine is
ORDERS = 2  # of the chunks of one case
CHUNKS, CHUNK_TOKENS = 3, 120
ABORTED, PLAIN = 0.15, 0.1  # shares of requests that are left half-way, and that name no chunks
TRIES = 5  # of what should go well; on a busy machine the store may be too slow once
TOLD_EVERY = 50  # requests
HANGING_S = 240.0  # an answer that takes longer is taken for lost


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """What an engine goes through.

    Attributes:
        model: a folder.
        requests: how many are asked.
        clients: that ask at once.
        tokens: length of an answer.
        kills: of the Valkey.
        pause_s: seconds that a client waits between two requests.
        seed: of what is drawn.
        options: more of the engine's.
    """

    model: str
    requests: int = 500
    clients: int = 8
    tokens: int = 16
    kills: int = 4
    pause_s: float = 0.0
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    async def run(self, kinds: Sequence[Kind]) -> dict[str, Any]:
        """Ask, and return counts of what came of it, and bytes of the engine's memory before and after."""
        with running(self.model, None, self.options) as engine:
            asked = (self._right(engine, number, kind, False) for number, kind in enumerate(kinds))
            plain = [answer.token_ids for answer in await asyncio.gather(*asked)]
        with valkey() as store:
            url = f"redis://127.0.0.1:{store.port}"
            with running(self.model, url, self.options) as engine:
                fused = {}
                for number, kind in enumerate(kinds):
                    answer = await self._right(engine, number, kind, kind.spec(warm=True))
                    fused[answer.pattern] = {answer.token_ids}
                before, began = _memory(), time.monotonic()
                faults = Faults(store, self.requests, self.kills, random.Random(self.seed))
                counts, answers = await self._ask(engine, kinds, faults)
                seconds, after, unfinished = time.monotonic() - began, _memory(), engine.unfinished()
                counters = engine.counters()
                faults.start()
                judge = Judge(plain, fused)
                for answer in answers:
                    if answer.figures and answer.pattern not in fused:
                        fused[answer.pattern] = await self._partly(engine, faults, kinds[answer.kind], answer)
                    judge.add(answer)
                await self._right(engine, 0, kinds[0], kinds[0].spec(warm=True))
        apart = sum(plain[kind] not in tokens for (kind, _, fresh), tokens in fused.items())
        return {
            "requests": self.requests, **counts, **judge.counts, "unfinished": unfinished, **faults.counts,
            "counters": counters, "kinds": len(kinds), "fused_other_than_plain": f"{apart} of {len(fused)}",
            "seconds": round(seconds, 1), "memory_start": before, "memory_end": after,
        }  # fmt: skip

    async def _right(self, engine: Engine, number: int, kind: Kind, spec: Any) -> Answer:
        """Return an answer that all chunks were reused for, of those that `spec` names."""
        for _ in range(TRIES):
            answer = await engine.ask(number, kind.prompt, spec, self.tokens)
            if answer is not None and (not spec or answer.pattern == (number, *kind.whole)):
                return answer
        raise RuntimeError("over a store that is well, not all chunks were reused")

    async def _ask(
        self, engine: Engine, kinds: Sequence[Kind], faults: Faults
    ) -> tuple[dict[str, int], list[Answer]]:
        """Ask all requests; return counts, and the answers that came whole."""
        counts, answers = dict.fromkeys(("failed", "hanging", "aborted"), 0), []
        numbers = iter(range(self.requests))

        async def one(number: int) -> None:
            draw = random.Random(f"{self.seed} {number}")
            kind = draw.randrange(len(kinds))
            spec = False if draw.random() < PLAIN else kinds[kind].spec()
            patience, leave_after = HANGING_S, None
            if leaves := draw.random() < ABORTED:
                if draw.random() < 0.5:
                    patience = draw.uniform(0.0, 2.0)
                else:
                    leave_after = draw.randrange(1, self.tokens)
            asked = engine.ask(kind, kinds[kind].prompt, spec, self.tokens, leave_after)
            try:
                answer = await asyncio.wait_for(asked, patience)
            except asyncio.TimeoutError:
                counts["aborted" if leaves else "hanging"] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, this client's request failed
                counts["failed"] += 1
                print(f"request {number} failed: {type(error).__name__}: {error}")
            else:
                if answer is None:
                    counts["aborted"] += 1
                else:
                    answers.append(answer)

        async def client() -> None:
            for number in numbers:
                _tell(number)
                await asyncio.to_thread(faults.before, number)
                await one(number)
                await asyncio.sleep(self.pause_s)

        await asyncio.gather(*(client() for _ in range(self.clients)))
        return counts, answers

    async def _partly(self, engine: Engine, faults: Faults, kind: Kind, answer: Answer) -> set[TokenIds]:
        """Return the answers over stores that hold as many chunks and tokens as this answer found."""
        _, hits, fresh = answer.pattern
        found = set()
        for chunks in itertools.combinations(range(len(kind.prompt.spans)), hits):
            for prefix in (True, False):
                if kind.fresh(chunks, prefix) != fresh:
                    continue
                for _ in range(TRIES):
                    faults.clear()
                    await engine.ask(0, kind.prompt, kind.spec(chunks, warm=True), 1)
                    if not prefix:
                        faults.delete(kind.prompt.prefix_tokens)
                    again = await engine.ask(answer.kind, kind.prompt, kind.spec(), self.tokens)
                    if again is not None and again.pattern == answer.pattern:
                        found.add(again.token_ids)
                        break
        return found


def kinds_of(model: str, data: str, count: int) -> list[Kind]:
    """Return prompts of a data set's cases, each with its chunks in several orders.

    Chunks of a prompt differ in length, so that the number of tokens says which of them were found.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = PromptBuilder(tokenizer)
    kinds: list[Kind] = []
    owner: dict[str, str] = {}
    for case in load_cases(data, chunks=CHUNKS):
        policy = POLICIES[len(kinds) // ORDERS % len(POLICIES)]
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in case.chunks]
        chunks = [str(tokenizer.decode(ids[: CHUNK_TOKENS - 8 * index])) for index, ids in enumerate(texts)]
        if any(owner.setdefault(chunk, policy) != policy for chunk in chunks):
            continue
        orders = itertools.islice(itertools.permutations(chunks), 1, 1 + ORDERS)
        kinds += [Kind(prompts.build(case.question, order), policy) for order in orders]
        if len(kinds) >= count:
            break
    return kinds


def main() -> None:
    """Run it, print what came of it, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--kinds", type=int, default=40, help="prompts that the requests are drawn from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("chaos.json"))
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    chaos = Chaos(model=given.model, requests=given.requests, clients=given.clients, seed=given.seed)
    result = asyncio.run(chaos.run(kinds_of(given.model, given.data, given.kinds)))
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _tell(number: int) -> None:
    if number % TOLD_EVERY == 0:
        print(f"{number} requests asked", flush=True)


def _memory() -> int:
    """Return the resident bytes of the engine's processes."""
    engines = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
    return sum(map(resident, _with_children(engines)))


def _with_children(processes: list[int]) -> list[int]:
    found = []
    for pid in processes:
        files = Path(f"/proc/{pid}/task").glob("*/children")
        found += [pid, *_with_children([int(child) for file in files for child in file.read_text().split()])]
    return found


if __name__ == "__main__":
    main()
