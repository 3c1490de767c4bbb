"""The report as one JSON object: what each results file comes to, and the rows that plots are drawn from.

{"chunkcache_report": 1, "command": what was run or null, "worst": where each policy is worst, of several data sets,
 "sections": [{"name", "bench", "settings", "ran_on", "started", "summary", "rows" of requests only}]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from chunkcache.errors import ResultsError, missing_extra
from chunkcache.eval.report.overview import worst_by_kind
from chunkcache.eval.results import FULL, Results

FORMAT = 1
SUMMARIES = {  # where each bench's summary(results) is
    "requests": "chunkcache.eval.summary",
    "load": "chunkcache.eval.load_summary",
    "simulation": "chunkcache.eval.simulate",
    "batch": "chunkcache.eval.batch_summary",
    "heatmap": "chunkcache.eval.report.heat",
    "store": "chunkcache.eval.stores",
    "selection": "chunkcache.eval.ablation",
    "packing": "chunkcache.eval.packing",
    "precompute": "chunkcache.eval.precompute",
    "serve": "chunkcache.eval.serving_summary",
    "retrieval": "chunkcache.eval.retrieval",
    "chain": "chunkcache.eval.chain",
    "order": "chunkcache.eval.order",
    "hints": "chunkcache.eval.hints",
}
ORDER = tuple(SUMMARIES)  # of the sections
KEPT = ("prompt", "round", "policy", "tokens", "ttft_s", "recomputed_share", "kl_first", "kl_mean", "agreement",
        "same_answer", "f1", "em", "rouge_l", "holds_gold")  # fmt: skip
TEXTS = ("question", "answer", "full_answer")
BLANK = "▪"  # stands for the text of a token


def build_report(
    results: Mapping[str, Results], *, texts: bool = True, command: str | None = None, against: str = FULL
) -> dict[str, Any]:
    """Return the report of results by their names; those without rows are left out.

    Args:
        results: as `read_folder` returns them.
        texts: whether texts of data sets may be in it: questions, answers, the tokens of heat maps. The example
            documents are of no data set.
        command: what was run, to be shown.
        against: policy that the others are compared with besides full prefill, in results of requests that have it.

    Raises:
        ResultsError: results are of a bench that is unknown, there are no rows at all, or none of `against`.
    """
    unknown = {found.bench for found in results.values()} - SUMMARIES.keys()
    if unknown:
        raise ResultsError(
            f"results of {', '.join(sorted(unknown))} cannot be reported; known are {', '.join(SUMMARIES)}"
        )
    there = sorted((item for item in results.items() if item[1].rows), key=lambda item: _place(*item))
    if not there:
        raise ResultsError("none of the results has a row yet; run the benchmark first")
    requests = [found for _, found in there if found.bench == "requests"]
    named = {policy for found in requests for policy in found.settings["policies"]}
    if against not in named | {FULL}:
        raise ResultsError(
            f"there are no results of {against!r} to compare with; there are of {', '.join(sorted(named))}"
        )
    sections = [_section(name, found, texts, against) for name, found in there]
    worst = worst_by_kind(sections)
    return {
        "chunkcache_report": FORMAT,
        "command": command,
        **({} if worst is None else {"worst": worst}),
        "sections": sections,
    }


def write_report(report: dict[str, Any], html: Path) -> list[Path]:
    """Write `html`, and Markdown and JSON beside it; return the three paths.

    Raises:
        InputError: matplotlib or Jinja is not installed.
    """
    from chunkcache.eval.report.markdown import as_markdown

    try:
        from chunkcache.eval.report.page import as_html
    except ModuleNotFoundError as error:
        raise missing_extra("eval", "a report", error) from None
    html.parent.mkdir(parents=True, exist_ok=True)
    written = {
        html: as_html(report),
        html.with_suffix(".md"): as_markdown(report, html.name),
        html.with_suffix(".json"): json.dumps(report, allow_nan=False, ensure_ascii=False) + "\n",
    }
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    return list(written)


def read_report(path: Path) -> dict[str, Any]:
    """Read what `write_report` wrote as JSON.

    Raises:
        ResultsError: it is no report, or one of another format.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = report["chunkcache_report"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} is no report.json of `chunkcache bench report`: {error!r}") from None
    if found != FORMAT:
        raise ResultsError(f"{path} has format {found}; this version reads {FORMAT}. Make the report again")
    return report


def _place(name: str, results: Results) -> tuple[int, str, float, str]:
    """Return by what sections are sorted: bench, data set, number of chunks; growing lengths come last."""
    data, chunks = results.settings.get("data"), results.settings.get("chunks")
    return ORDER.index(results.bench), str(data), float("inf") if chunks is None else chunks, name


def _section(name: str, results: Results, texts: bool, against: str) -> dict[str, Any]:
    options = {"against": against} if results.bench == "requests" else {}
    summary = import_module(SUMMARIES[results.bench]).summary(results, **options)
    summary = json.loads(json.dumps(summary, allow_nan=False))  # plain values, as they read back
    section = {
        "name": name,
        "bench": results.bench,
        "settings": results.settings,
        "ran_on": results.ran_on,
        "started": results.started,
        "summary": summary if texts else _without_texts(results, summary),
    }
    if results.bench == "requests":
        section["rows"] = [{key: _short(row[key]) for key in KEPT if key in row} for row in results.rows]
    return section


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _without_texts(results: Results, summary: dict[str, Any]) -> dict[str, Any]:
    if results.bench == "requests":
        worst = [{key: value for key, value in row.items() if key not in TEXTS} for row in summary["worst"]]
        return {**summary, "worst": worst}
    if results.bench == "heatmap" and results.settings.get("data") is not None:
        return {
            policy: [{**piece, "texts": [BLANK] * len(piece["texts"])} for piece in pieces]
            for policy, pieces in summary.items()
        }
    return summary
