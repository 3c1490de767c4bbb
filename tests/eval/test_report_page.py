"""The report's page in a real browser: Chromium, at two sizes, light and dark."""

from __future__ import annotations

import pytest
from support.browser import CONTRASTS, LOOKS
from support.report import heatmap, load_section, requests

from chunkcache.eval.report import build_report, write_report


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    results = {"requests-5": requests(), "lengths": requests(lengths=[1000, 4000], chunks=None), "heatmap": heatmap()}
    report = build_report(results, command="chunkcache bench all")
    report["sections"].insert(2, load_section())
    return write_report(report, tmp_path_factory.mktemp("report") / "report.html")[0].as_uri()


@pytest.fixture(params=LOOKS)
def page(request, browser, address):
    """Open the page; at the end see that it complained of nothing and asked for nothing."""
    (width, height), theme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
    opened = context.new_page()
    complaints, requested = [], []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda asked: requested.append(asked.url))
    opened.goto(address)
    yield opened
    assert (complaints, requested) == ([], [address])
    context.close()


two_looks = pytest.mark.parametrize("page", LOOKS[::3], indirect=True)  # wide and light, narrow and dark


def column(table, at):
    """Return the cells of a column, from top to bottom."""
    return [cell.strip() for cell in table.locator(f"tbody tr > :nth-child({at + 1})").all_inner_texts()]


def test_nothing_is_wider_than_the_window(page):
    width, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= window
    narrow = page.viewport_size["width"] < 500
    wide_tables = page.evaluate(
        "[...document.querySelectorAll('.scroll')].some((b) => b.scrollWidth > b.clientWidth)"
    )
    assert wide_tables or not narrow  # in a box of their own


def test_plots_have_a_size_and_text_can_be_read(page):
    boxes = page.evaluate("[...document.querySelectorAll('svg')].map((s) => [s.clientWidth, s.clientHeight])")
    assert len(boxes) == 8
    assert all(width >= 300 and height >= 80 for width, height in boxes)
    assert page.locator("svg text").count() > 50
    assert page.evaluate(CONTRASTS) == []


@two_looks
def test_tables_sort_by_number_and_back(page):
    table = page.locator("table").first
    given = column(table, 2)
    head = table.locator("thead th").nth(2)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    rising = column(table, 2)
    assert rising == sorted(given, key=lambda text: float(text.split()[0]))
    assert rising != given
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert (head.get_attribute("aria-sort"), column(table, 2)) == ("descending", rising[::-1])
    page.keyboard.press("Space")
    assert (head.get_attribute("aria-sort"), column(table, 2)) == ("none", given)


@two_looks
def test_unknown_values_sort_last(page):
    table = page.locator("table").first
    for _ in range(2):
        table.locator("thead button").nth(5).click()
        assert column(table, 5)[-1] == "n/a"
    table.locator("thead button").nth(0).click()
    assert column(table, 0) == sorted(column(table, 0))


@two_looks
def test_the_theme_can_be_changed(page):
    def paper():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    before = paper()
    page.get_by_role("button", name="theme").click()
    changed = paper()
    assert changed != before
    assert page.evaluate(CONTRASTS) == []
    page.get_by_role("button", name="theme").click()
    assert paper() == before


@two_looks
def test_the_heat_map_shows_one_policy_at_a_time(page):
    assert [view.is_visible() for view in page.locator(".view").all()] == [True, False]
    page.locator(".heat select").select_option("link:k=8")
    assert [view.is_visible() for view in page.locator(".view").all()] == [False, True]
    page.emulate_media(media="print")
    assert all(view.is_visible() for view in page.locator(".view").all())


def test_without_scripts_everything_is_shown(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert all(view.is_visible() for view in page.locator(".view").all())
    assert page.locator("thead button, #theme:visible, select").count() == 0
    context.close()
