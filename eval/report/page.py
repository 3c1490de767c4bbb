"""The report as one HTML file that needs nothing else: styles, script and plots are in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from chunkcache.eval.report.parts import Plot
from chunkcache.eval.report.plots import draw
from chunkcache.eval.report.requests import name_of
from chunkcache.eval.report.sections import facts, policies, views
from chunkcache.eval.report.styles import policy_styles

_HERE = Path(__file__).parent
LEVELS = 10  # of a heat map's background
PROSE = 32  # a cell with more characters than this may be broken into lines


def as_html(report: dict[str, Any]) -> str:
    """Return the report as a page; whatever text is in the results is escaped."""
    styles = policy_styles(policies(report))
    dots = {name_of(policy): style for policy, style in styles.items()}

    def svg(plot: Plot, uid: str) -> Markup:
        return Markup(draw(plot, styles, uid))

    pages = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("page.html").render(
        sections=views(report),
        facts=facts(report),
        command=report["command"],
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        js=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
        svg=svg,
        dots=dots,
        name_of=name_of,
        level=lambda share: round(share * LEVELS),
        levels=range(LEVELS + 1),
        prose=PROSE,
    )
