"""How policies look: the same colour and marker in every plot and table of a report.

Colours are names of CSS variables, which page.css sets for the light and the dark theme. Hues are those of Okabe and
Ito, with darker and lighter ones added; since nobody tells ten hues apart for certain, each has a marker as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from chunkcache.eval.results import FULL, PEER

COLOURS = 10  # --c1 .. --c10; --c0 is full prefill's grey
PARTS = 9  # --s1 .. --s9, for what is no policy's
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")


@dataclass(frozen=True)
class Style:
    """A CSS variable, and a marker of matplotlib's; hollow ones are peers'."""

    colour: str
    marker: str
    hollow: bool = False


def policy_styles(policies: Iterable[str]) -> dict[str, Style]:
    """Give each policy a style, by its place among them."""
    styles = {FULL: Style("--c0", "o")}
    for policy in policies:
        if policy not in styles:
            at = len(styles) - 1
            colour = f"--c{at % COLOURS + 1}"
            styles[policy] = Style(colour, MARKERS[(at + 1) % len(MARKERS)], policy.startswith(PEER))
    return styles


def part_style(at: int) -> Style:
    """Return the style of the part number `at` of something."""
    return Style(f"--s{at % PARTS + 1}", MARKERS[at % len(MARKERS)])
