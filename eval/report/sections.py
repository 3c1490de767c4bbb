"""The sections of a report as people read them: what was measured, on what, its tables and its plots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from chunkcache.eval.report import requests
from chunkcache.eval.report.overview import overview_tables
from chunkcache.eval.report.parts import Plot, Table, table_of
from chunkcache.eval.results import PEER

Facts = dict[str, str]
LONGEST = 400  # characters of a setting
TITLES = {
    "load": "Load",
    "simulation": "Load, simulated",
    "batch": "Batches",
    "heatmap": "Which tokens were recomputed",
    "store": "Stores",
    "selection": "Selections",
    "packing": "Packing",
    "precompute": "Precomputing behind nearest chunks",
    "serve": "The server",
    "retrieval": "Retrieval",
    "chain": "LangChain",
    "order": "Order of chunks",
    "hints": "Hints to the store",
}


@dataclass(frozen=True)
class Piece:
    """A part of a heat map's prompt: its tokens, each with the share of layers in which it was recomputed."""

    role: str
    tokens: list[tuple[str, float]]

    @property
    def recomputed(self) -> float:
        """Share of its token-layers that were."""
        return sum(share for _, share in self.tokens) / len(self.tokens)


@dataclass(frozen=True)
class Section:
    """One results file; `name` is the file's, and its anchor. `heat` has the pieces of the prompt by policy."""

    name: str
    title: str
    lead: str
    facts: Facts
    tables: list[Table]
    plots: list[Plot]
    settings: Facts
    heat: dict[str, list[Piece]] = field(default_factory=dict)


def views(report: dict[str, Any]) -> list[Section]:
    """Return the sections of a report, in its order; where it has several data sets, what is over all comes first."""
    shared = facts(report)
    over_all = overview(report)
    return [*([over_all] if over_all else []), *(_view(section, shared) for section in report["sections"])]


def overview(report: dict[str, Any]) -> Section | None:
    """Return what all data sets come to together; None where a report has only one."""
    tables = overview_tables(report)
    lead = "Every policy on every data set, and where it is worst. Each data set has a section of its own below."
    return Section("data-sets", "All data sets", lead, {}, tables, [], {}) if tables else None


def facts(report: dict[str, Any]) -> Facts:
    """Return what all sections ran on."""
    each = [_ran_on(section) for section in report["sections"] if "model" in section["ran_on"]]  # not simulated
    first = each[0] if each else {}
    shared = {name: value for name, value in first.items() if all(other.get(name) == value for other in each)}
    days = sorted(section["started"][:10] for section in report["sections"])
    return {**shared, "measured": days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"}


def machine_line(section: dict[str, Any]) -> str:
    """Return one line on what a section ran on."""
    on = section["ran_on"]
    versions = f"torch {on['torch']}, transformers {on['transformers']}, chunkcache {on['chunkcache']}"
    commit = f" at {on['commit']}" if on["commit"] else ""
    return f"{on['model']}, {on['dtype']}, {on['threads']} threads on {on['device']}; {versions}{commit}."


def policies(report: dict[str, Any]) -> list[str]:
    """Return every policy and peer that a report names, each once, those of plots too."""
    made = views(report)
    named = [policy for each in report["sections"] for policy in each["settings"].get("policies", [])]
    peers = [PEER + name for each in report["sections"] for name in each["settings"].get("peers", {})]
    drawn = [series.policy for view in made for plot in view.plots for series in plot.series if series.policy]
    return list(dict.fromkeys([*named, *peers, *drawn, *(policy for view in made for policy in view.heat)]))


def _view(section: dict[str, Any], shared: Facts) -> Section:
    summary, settings = section["summary"], section["settings"]
    own = {name: value for name, value in _ran_on(section).items() if name not in shared}
    parts: dict[str, Any] = {"tables": [], "plots": []}
    if section["bench"] == "requests":
        prompts = f"{summary['prompts']} prompts of {requests.token_range(summary)}"
        chunks = f"{settings['chunks']} chunks" if settings["chunks"] else "all chunks"
        title = f"{settings['data']}, {'context lengths' if summary.get('growth') else chunks}"
        lead = f"{prompts}; {'no chunk was stored before' if settings['cold'] else 'all chunks were stored before'}."
        parts = {"tables": requests.tables(section), "plots": requests.plots(section)}
    elif section["bench"] == "heatmap":
        title, lead = (
            TITLES["heatmap"],
            "The stronger a token's colour, the more layers recomputed it. Lines part the chunks.",
        )
        parts["heat"] = {policy: [_piece(piece) for piece in pieces] for policy, pieces in summary.items()}
    else:
        title, lead = f"{TITLES[section['bench']]}: {section['name']}", ""
        plots = [Plot.of(plain) for plain in summary["plots"] if plain["series"]]
        parts = {"tables": [table_of(plain) for plain in summary["tables"]], "plots": plots}
    return Section(section["name"], title, lead, own, settings=_shown(settings), **parts)


def _piece(piece: dict[str, Any]) -> Piece:
    return Piece(piece["role"], list(zip(piece["texts"], piece["shares"], strict=True)))


def _ran_on(section: dict[str, Any]) -> Facts:
    return {name: str(value) for name, value in section["ran_on"].items() if value is not None}


def _shown(settings: dict[str, Any]) -> Facts:
    return {name.replace("_", " "): _text(value) for name, value in settings.items() if value not in (None, [], {})}


def _text(value: Any) -> str:
    """Return a setting as people read it; of what is long, the beginning."""
    if isinstance(value, dict):
        value = [f"{name} {_text(each)}" for name, each in value.items()]
    text = ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
