"""What it costs to compute chunks behind their nearest, against behind the lead-in alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.engine.near import Lead
from chunkcache.eval.measure import OnStep, averages, table
from chunkcache.eval.results import Results
from chunkcache.library.neighbours import Neighbours

BENCH = "precompute"
PACKAGED = "packaged"
WAYS: dict[str, Neighbours | None] = {
    PACKAGED: None,
    "neighbours": Neighbours(),
    "neighbours, first=False": Neighbours(first=False),
    "neighbours, first=False, extra=0.1": Neighbours(first=False, extra=0.1),
    "neighbours, first=False, extra=0": Neighbours(first=False, extra=0),
}
_WARM_UP = "A text for whose sake the lead-in is there before the clock runs."


def bench_precompute(
    results: Results,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    nearest: Sequence[Sequence[str]],
    rounds: int = 2,
    on_step: OnStep | None = None,
) -> Results:
    """Precompute the same texts in each of `WAYS` in turn, each time into an empty store in memory.

    The KV of the prefix and of the lead-in are there before: a corpus of any size needs them once.

    Args:
        results: gets a row of each round and way: `seconds`, the share of the chunks that were computed behind
            nearest ones (`near`), and which share of its nearest a chunk was computed behind (`overlap`, the mean).
        model: the model.
        tokenizer: its tokenizer.
        texts: different chunks.
        nearest: for each of them its nearest among them, best first.
        rounds: of all ways.
        on_step: called with (passes over the texts done, all).
    """
    llm = chunkcache.wrap(model, tokenizer, store="memory://")
    steps = [(number, way) for number in range(rounds) for way in WAYS]
    for done, (number, way) in enumerate(steps, start=1):
        if not results.done(round=number, way=way):
            how = WAYS[way]
            wanted = replace(how or Neighbours(), nearest=nearest)
            lead: Lead = "packaged" if how is None else wanted
            llm.delete(tenant=True)
            llm.precompute([_WARM_UP])
            started = time.perf_counter()
            near = llm.precompute(texts, lead=lead).near / len(texts)
            seconds = time.perf_counter() - started
            overlap = statistics.mean(llm.overlap(texts, wanted))
            results.add({"round": number, "way": way, "seconds": seconds, "near": near, "overlap": overlap})
        if on_step is not None:
            on_step(done, len(steps))
    return results


def summary(results: Results) -> dict[str, Any]:
    """Return medians over the rounds, of the seconds also as ratios to the same round's first way, and a table."""
    of = {"seconds": statistics.median, "near": statistics.mean, "overlap": statistics.mean}
    sums = averages(results.rows, ("way",), "round", of)
    packaged = {row["round"]: row["seconds"] for row in results.rows if row["way"] == PACKAGED}
    for each in sums:
        rows = [row for row in results.rows if row["way"] == each["way"]]
        each["ratio"] = statistics.median(row["seconds"] / packaged[row["round"]] for row in rows)
    columns = {
        "behind": "{way}", "time, s": "{seconds:.1f}", "time / packaged": "{ratio:.2f}",
        "chunks behind nearest": "{near:.0%}", "of their nearest": "{overlap:.0%}",
    }  # fmt: skip
    title = f"{results.settings['texts']} chunks precomputed, medians of {len(packaged)} rounds"
    return {"ways": sums, "tables": [table(title, columns, sums)], "plots": []}
