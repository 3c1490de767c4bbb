"""Chromium for the tests of pages, and what is looked for in each of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
LOOKS = [
    pytest.param((size, theme), id=f"{size[0]}-{theme}")
    for size in ((1440, 900), (390, 844))
    for theme in ("light", "dark")
]
# Texts whose contrast is below 4.5, the AA bound of WCAG 2.2.
CONTRASTS = """() => {
  const channels = (colour) => {
    const found = colour.match(/[\\d.]+/g).map(Number);
    const scale = colour.startsWith("color(") ? 1 : 255;
    return [...found.slice(0, 3).map((c) => c / scale), found[3] ?? 1];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((c, n) => c * a + below[n] * (1 - a));
  const light = (c) => c.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const paper = channels(getComputedStyle(document.body).backgroundColor);
  const texts = "svg text, p, a, h1, h2, h3, dt, dd, th, td, li, b, span, label, small, mark, button, figcaption";
  return [...document.querySelectorAll(texts + ", summary")]
    .filter((element) => element.checkVisibility() && !element.disabled && !element.closest(":disabled"))
    .map((element) => {
      const style = getComputedStyle(element);
      const below = over(channels(style.backgroundColor), paper);
      const text = over(channels(element instanceof SVGElement ? style.fill : style.color), below);
      const [low, high] = [light(text), light(below)].sort((a, b) => a - b);
      return [(high + 0.05) / (low + 0.05), element.tagName + " " + element.textContent.trim().slice(0, 40)];
    }).filter(([ratio]) => ratio < 4.5);
}"""


@contextmanager
def launched() -> Iterator[Any]:
    """Start the Chromium that is installed; skip the tests where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()
