"""A made-up folder of results for the tests of the report: the numbers mean nothing, the shapes are the real ones."""

from __future__ import annotations

from chunkcache.eval.results import Results

RAN_ON = {
    "model": "tiny",
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "cores": 2,
    "chunkcache": "0.1.0",
    "commit": "0123456789",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "python": "3.11.2",
    "system": "Linux",
}
SPEED = {"full": 1.0, "prefix": 0.8, "query": 0.08, "link:k=8": 0.05, "peer:other": 1.3}  # TTFT over full prefill's
KL = {"full": 0.0, "prefix": 0.0, "query": 0.05, "link:k=8": 0.1, "peer:other": 0.3}
SECRET = "Whose <script>alert(1)</script> is | this?"


def requests(data="hills", chunks=5, prompts=4, lengths=None, repeated=0.0, worse=1.0) -> Results:
    """Return results of `bench quality`, or of a ladder of context lengths.

    `repeated` is the share of chunks that stand twice; all divergences are `worse` times those of `KL`.
    """
    peers = {"other": {"versions": {"other": "0.9"}, "settings": {"threads": 1}}}
    settings = {
        "data": data, "chunks": chunks, "tokens": lengths,
        "policies": [name for name in SPEED if not name.startswith("peer:")], "peers": peers,
        "store": "memory://", "cold": False, "rounds": 1, "answers": True, "seed": 0,
    }  # fmt: skip
    results = Results("requests", settings, RAN_ON)
    for prompt in range(prompts):
        tokens = lengths[prompt % len(lengths)] if lengths else 2800 + 100 * prompt
        for policy, ratio in SPEED.items():
            peer, seconds = policy.startswith("peer:"), ratio * tokens / 1000 * (1 + prompt / 10)
            results.add(
                {
                    "prompt": prompt, "round": 0, "policy": policy, "chunks": 5, "tokens": tokens,
                    "ttft_s": seconds, "error": None,
                    "stages": None if peer else {"recompute": seconds * 0.9, "other": seconds * 0.1},
                    "recomputed_share": None if peer else 0.03, "hits": 5, "misses": 0, "fallbacks": 0,
                    "peak_ratio": None if peer else 1.1, "same_answer": not KL[policy],
                    "kl_first": worse * KL[policy], "kl_mean": None if peer else worse * KL[policy] / 2,
                    "agreement": None if peer else 1 - KL[policy],
                    "question": SECRET, "answer": f"{SECRET} {policy}", "accepted": ["x"],
                    "f1": 0.1 * prompt, "em": float(prompt == 3), "rouge_l": 0.2,
                    "holds_gold": float(prompt > 1), "gold_in_chunks": prompt > 0, "repeated_chunks": repeated,
                }
            )  # fmt: skip
    return results


def heatmap(data=None) -> Results:
    """Return results of `bench heatmap`: six tokens under two policies, of the example documents or of `data`."""
    results = Results("heatmap", {"data": data, "policies": ["query", "link:k=8"]}, RAN_ON)
    roles = ["prefix", "chunk 1", "chunk 1", "chunk 2", "chunk 2", "question"]
    texts = ["System", " <i>high", " hill", " and", "\nsea", " what?"]
    for policy, shares in {"query": (0, 0, 1, 0.5, 0, 1), "link:k=8": (0, 1, 0, 1, 0, 1)}.items():
        for index, (role, text, share) in enumerate(zip(roles, texts, shares, strict=True)):
            results.add({"policy": policy, "index": index, "role": role, "text": text, "share": share})
    return results


def load_section() -> dict:
    """Return a section of a report with tables and plots as the other benches' summaries have them."""
    lines = {
        "kind": "lines", "title": "TTFT p90 against request rate", "x": "requests per second", "y": "TTFT p90, s",
        "logx": True, "logy": True, "caption": "Where a curve turns up, requests queue.",
        "series": [
            {"name": "full", "policy": "full", "points": [[0.1, 3.0], [0.2, 9.0]], "simulated": False},
            {"name": "query", "policy": "query", "points": [[0.1, 0.3], [0.2, 0.0]], "simulated": True},
        ],
    }  # fmt: skip
    bars = {
        "kind": "bars", "title": "Throughput", "y": "requests per second", "caption": "Longer is better.",
        "groups": ["one by one", "grouped"], "series": [{"name": "all", "values": [1.5, None]}],
    }  # fmt: skip
    empty = {**lines, "title": "Nothing", "series": []}
    table = {
        "title": "Load",
        "columns": ["policy", "TTFT", "share", "hits"],
        "rows": [["full", 12.5, [0.5, 0.4, 0.6], None], ["query", 1234, [1.0, 1.0, 1.0], "93%"]],
    }
    return {
        "name": "load-hills", "bench": "load", "settings": {"rates": [0.1, 0.2], "none": None}, "ran_on": RAN_ON,
        "started": "2026-01-02T03:04:05+00:00", "summary": {"tables": [table], "plots": [lines, bars, empty]},
    }  # fmt: skip
