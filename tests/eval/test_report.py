"""The report: what is in it, that it needs nothing from outside, and the README's tables."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from pkgutil import iter_modules

import pytest
from support.report import RAN_ON, SECRET, heatmap, load_section, requests

import chunkcache.eval
from chunkcache.errors import InputError, ResultsError
from chunkcache.eval.report import build_report, read_report, readme_tables, replace_between, write_report
from chunkcache.eval.report.data import SUMMARIES
from chunkcache.eval.report.markdown import as_markdown
from chunkcache.eval.report.page import as_html
from chunkcache.eval.report.parts import Plot, Series, cell, number
from chunkcache.eval.report.plots import draw
from chunkcache.eval.report.sections import TITLES, views
from chunkcache.eval.report.styles import policy_styles
from chunkcache.eval.results import Results

MARKS = "# Title\n<!-- results:begin -->\nold\n<!-- results:end -->\nend\n"


@pytest.fixture(scope="module")
def report():
    results = {
        "requests-hills-lengths": requests(chunks=None, lengths=[1000, 2000, 4000]),
        "requests-hills-10": requests(chunks=10),
        "requests-hills-5": requests(),
        "heatmap": heatmap(),
        "load-hills": Results("load", {}, RAN_ON),  # nothing measured yet
    }
    made = build_report(results, command="chunkcache bench all")
    made["sections"].insert(3, load_section())
    return made


@pytest.fixture(scope="module")
def html(report):
    return as_html(report)


def saved(folder, name, results):
    with Results.open(folder / f"{name}.jsonl", results.bench, results.settings, results.ran_on) as file:
        for row in results.rows:
            file.add(row)


class Page(HTMLParser):
    """Tags with their attributes, the text, and the tables as lists of rows."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


# --- what is in it


def test_sections_come_in_order_with_the_rows_that_plots_need(report):
    assert [section["name"] for section in report["sections"]] == [
        "requests-hills-5",
        "requests-hills-10",
        "requests-hills-lengths",
        "load-hills",
        "heatmap",
    ]
    rows = report["sections"][0]["rows"]
    assert len(rows) == 20
    assert "answer" not in rows[0]
    assert "rows" not in report["sections"][-1]


def test_results_that_cannot_be_reported_are_refused():
    with pytest.raises(ResultsError, match="results of magic cannot be reported"):
        build_report({"a": Results("magic", {}, RAN_ON, [{}])})
    with pytest.raises(ResultsError, match="none of the results has a row"):
        build_report({"a": Results("load", {}, RAN_ON)})


def test_every_measurement_has_a_summary_and_a_title():
    modules = [import_module(f"chunkcache.eval.{module.name}") for module in iter_modules(chunkcache.eval.__path__)]
    benches = {module.BENCH for module in modules if hasattr(module, "BENCH")}
    assert benches == SUMMARIES.keys()
    assert benches - {"requests"} == TITLES.keys()
    for module in SUMMARIES.values():
        assert callable(import_module(module).summary)


def test_the_page_and_the_markdown_say_the_same(report, html):
    text, markdown = Page(html).text, as_markdown(report, "report.html")
    for expected in ("hills, 5 chunks", "hills, context lengths", "4 prompts of 2,800 to 3,100 tokens", "1,234",
                     "chunkcache bench all", "2.13.0", "12.5", "other 0.9", "Worst prompts"):  # fmt: skip
        assert expected in text
        assert expected in markdown.replace("\\", "")
    assert "[report.html](report.html): Speed against fidelity, Where the time goes, Every prompt." in markdown


def test_what_is_missing_is_absent():
    results = requests()
    for row in results.rows:
        for name in ("kl_first", "kl_mean", "agreement", "f1", "em", "rouge_l", "holds_gold", "stages", "answer"):
            row[name] = None
    markdown = as_markdown(build_report({"ttft": results}), "report.html")
    assert "### Time to first token" in markdown
    assert "Every prompt" in markdown
    assert not any(absent in markdown for absent in ("Fidelity", "Answers", "Worst", "Speed against", "time goes"))


def test_several_data_sets_have_an_overview_with_the_worst_of_each_policy():
    made = build_report(
        {"hills": requests(), "seas": requests("seas", worse=2), "ttft": requests(lengths=[1000, 2000])}
    )
    assert made["worst"]["apart"] == {}
    worst = made["worst"]["data_sets"]
    assert worst.keys() == {"prefix", "query", "link:k=8", "peer:other"}
    assert (worst["query"]["kl_first"]["section"], worst["query"]["kl_first"]["value"][0]) == ("seas", 0.1)
    over_all = views(made)[0]
    assert over_all.title == "All data sets"
    tables = {table.title: table for table in over_all.tables}
    assert [[cell.text for cell in row] for row in tables["Prompts of each data set"].rows] == [
        [name, "4", "4", "25.0%", "75.0%", "0.0%"] for name in ("hills", "seas")
    ]
    by_name = {row[0].text: row for row in tables["KL mean by data set"].rows}
    assert [cell.text for cell in by_name["query"][1:]] == ["0.0250", "0.0500"]
    assert [cell.known for cell in by_name["other (peer)"][1:]] == [False, False]
    rows = {row[0].text: row for row in tables["Worst data set of each policy"].rows}
    at = tables["Worst data set of each policy"].columns.index("KL first")
    assert (rows["query"][at].text, rows["query"][at].note) == ("0.1000", "seas")


def test_data_sets_with_repeated_chunks_stand_apart():
    made = build_report(
        {"hills": requests(), "twice": requests("twice", repeated=0.5, worse=9), "seas": requests("seas")}
    )
    assert made["worst"]["data_sets"]["query"]["kl_first"]["section"] == "hills"
    assert made["worst"]["apart"]["query"]["kl_first"]["section"] == "twice"
    markdown = as_markdown(made, "report.html")
    assert "### KL mean by data set, prompts with repeated chunks" in markdown
    assert "| twice | 4 | 4 | 25.0% | 75.0% | 50.0% |" in markdown


def test_one_data_set_has_no_overview(report):
    one = build_report({"hills": requests(), "heatmap": heatmap()})
    assert "worst" not in one
    assert views(one)[0].title == "hills, 5 chunks"
    assert views(report)[0].name == "data-sets"


def test_policies_are_compared_with_another_where_asked():
    results = {"hills": requests(), "heatmap": heatmap()}
    markdown = as_markdown(build_report(results, against="link:k=8"), "report.html")
    assert "### Against link:k=8" in markdown
    assert "| `query` | 4 | 1.600 | 0.500 | 0.500 |" in markdown
    assert "Against" not in as_markdown(build_report(results), "report.html")
    with pytest.raises(ResultsError, match="no results of 'link:k=9'"):
        build_report(results, against="link:k=9")


def test_scores_and_same_answers_are_shown():
    markdown = as_markdown(build_report({"hills": requests()}), "report.html")
    for column in ("same answer", "F1 − full", "ROUGE-L − full", "holds gold", "holds gold − full"):
        assert f"| {column} |" in markdown


def test_the_question_of_a_conversation_is_shown_by_its_end():
    results = requests()
    results.rows = [{**row, "question": "user: long ago\n" * 100 + "And now?"} for row in results.rows]
    [table] = [table for table in views(build_report({"hills": results}))[0].tables if table.title == "Worst prompts"]
    question = table.rows[0][table.columns.index("question")].text
    assert question.startswith("… ")
    assert question.endswith("And now?")
    assert len(question) < 400


def test_a_peer_that_failed_is_named():
    results = requests()
    results.rows = [
        {**row, "ttft_s": None, "error": "out of memory"} if row["policy"] == "peer:other" else row
        for row in results.rows
    ]
    assert "out of memory" in as_markdown(build_report({"ttft": results}), "report.html")


def test_a_report_can_be_made_again_from_its_json(report, html, tmp_path):
    written = write_report(report, tmp_path / "out" / "report.html")
    assert [path.name for path in written] == ["report.html", "report.md", "report.json"]
    assert as_html(read_report(written[2])) == html == written[0].read_text(encoding="utf-8")


def test_a_report_without_what_draws_it_says_what_to_install(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "chunkcache.eval.report.page")
    with pytest.raises(InputError, match=r'pip install "chunkcache\[eval\]"'):
        write_report(report, tmp_path / "report.html")


@pytest.mark.parametrize("text", ["no json", "[]", '{"chunkcache_report": 99}'])
def test_a_file_that_is_no_report_is_refused(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ResultsError, match=r"report\.json"):
        read_report(tmp_path / "report.json")


def test_texts_can_be_left_out_while_numbers_stay():
    results = {"requests": requests(), "heatmap": heatmap("hills"), "examples": heatmap()}
    whole, bare = build_report(results), build_report(results, texts=False)
    for made, there in ((whole, True), (bare, False)):
        for text in (json.dumps(made), Page(as_html(made)).text, as_markdown(made, "r.html").replace("\\", "")):
            assert ("Whose" in text) == there
    assert json.dumps(bare).count(" hill") == 2  # the example documents' are no data set's
    assert [row["kl_first"] for row in bare["sections"][0]["summary"]["worst"]] == [
        row["kl_first"] for row in whole["sections"][0]["summary"]["worst"]
    ]


# --- the page


def test_the_page_needs_nothing_from_outside(html):
    page = Page(html)
    links = [
        value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "xlink:href")
    ]
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.findall(r"@import|url\((?!#)", html)
    assert "default-src 'none'" in next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)


def test_text_of_the_data_is_escaped(html):
    assert SECRET in Page(html).text
    assert len(Page(html).all("script")) == 1
    assert "<i>high" not in html


def test_ids_are_unique_and_links_lead_somewhere(html):
    page = Page(html)
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    assert set(ids.values()) == {1}
    targets = {attrs["href"].removeprefix("#") for attrs in page.all("a")}
    targets |= set(re.findall(r"url\(#([^)]*)\)", html))
    assert targets <= ids.keys()


def test_every_plot_is_named_and_follows_the_theme(html):
    plots = Page(html).all("svg")
    assert len(plots) == 3 + 3 + 3 + 2  # those without series are left out
    assert all(
        plot["role"] == "img" and plot["aria-label"].count(". ") + plot["aria-label"].endswith(".") >= 2
        for plot in plots
    )
    assert not any("width" in plot for plot in plots)
    assert "#0a0b" not in html
    assert "#000000" not in html
    variables = set(re.findall(r"var\((--\w+)\)", html))
    assert variables - {"--dot", "--share"} <= set(re.findall(r"(--\w+): ", html))


def test_the_heat_map_marks_tokens_by_their_share(html):
    page = Page(html)
    assert [mark["class"] for mark in page.all("mark")] == ["h10", "h5", "h10", "h10", "h10", "h10"]
    assert "chunk 2: 2 tokens, 25.0% recomputed" in page.text


# --- plots


def points(svg, colour):
    """Return the markers of one colour, as (x, y)."""
    uses = re.findall(rf'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\({colour}\)', svg)
    return [(float(x), float(y)) for x, y in uses]


def test_a_policy_looks_the_same_everywhere():
    styles = policy_styles(["query", "full", "link:k=8", "peer:query"])
    assert len({(style.colour, style.marker) for style in styles.values()}) == 4
    assert [name for name, style in styles.items() if style.hollow] == ["peer:query"]
    plot = Plot("points", "t", "y", "c", [Series("query", "query", [[1, 2]])], "x")
    other = replace(plot, series=[Series("full", "full", [[1, 2]]), *plot.series])
    colour = styles["query"].colour
    assert len(points(draw(plot, styles, "a"), colour)) == len(points(draw(other, styles, "b"), colour)) == 2


def test_a_kl_of_zero_stands_at_the_edge():
    kl = [[0.0, 1], [1e-7, 1], [0.01, 1], [0.1, 1]]
    series = [Series(f"{x}", "full", [[x, y]], [[x / 2, x * 2, y, y]]) for x, y in kl]
    plot = Plot("points", "t", "y", "c", series, "x", logx=True, logy=True, floor=1e-4)
    svg = draw(plot, policy_styles([]), "p")
    marks = [x for x, _ in points(svg, "--c0")[:4]]
    assert marks[0] == marks[1] < marks[2] < marks[3]
    assert "≤ 0.0001" in svg


def test_a_plot_is_the_same_every_time_and_says_what_is_simulated():
    plot = Plot.of(load_section()["summary"]["plots"][0])
    styles = policy_styles(["full", "query"])
    svg = draw(plot, styles, "p")
    assert svg == draw(plot, styles, "p")
    assert "query (simulated)" in svg
    assert "stroke-dasharray" in svg


def test_cells_read_well_and_sort_by_number():
    assert [cell(value).text for value in (None, "a", 3, 0.12346, 12345.6)] == ["n/a", "a", "3", "0.1235", "12,346"]
    assert cell("1,234 / 5").number == 1234
    assert (number([-0.5, -1, 0.25], 2).text, number([-0.5, -1, 0.25], 2).note) == ("−0.50", "(−1.00 to 0.25)")
    assert (number(-0.0001, 2).text, number([1, 1, 1]).note) == ("0.00", "")


# --- the README's tables


def test_readme_tables_have_a_row_for_each_policy(report):
    tables = readme_tables(report)
    assert tables.count("tiny, float32, 1 threads on cpu") == 1
    assert "`hills`, 10 chunks, 4 prompts of 2,800 to 3,100 tokens:" in tables
    assert re.search(
        r"^\| `query` \| 0\.2\d\d \| 0\.080 \| .* \| 3\.0% \| 0\.0500 \| 0\.0250 \| 95\.0% \|", tables, re.M
    )
    assert re.search(
        r"^\| `other` \(peer\) \| .* \| n/a \| 0\.3000 \| n/a \| n/a \| 0\.150 \| 0\.250 \|$", tables, re.M
    )
    assert "| policy | exponent | 1,000 | 2,000 | 4,000 |" in tables
    with pytest.raises(ResultsError, match="no results of"):
        readme_tables({"sections": [load_section()]})


def test_tables_go_between_the_marks():
    assert replace_between(MARKS, "new") == MARKS.replace("old", "\nnew\n")
    assert replace_between(replace_between(MARKS, "new"), "new") == replace_between(MARKS, "new")
    for broken in ("", MARKS.replace("begin", "start"), MARKS + MARKS):
        with pytest.raises(ResultsError, match="needs one line"):
            replace_between(broken, "new")


def test_the_commands_write_report_and_tables(command_line, tmp_path):
    saved(tmp_path, "requests-hills-5", requests())
    saved(tmp_path, "load-hills", Results("load", {}, RAN_ON))
    code, out, err = command_line("bench", "report", str(tmp_path), "--without-texts")
    assert code == 0, err
    assert out.split() == [str(tmp_path / f"report.{end}") for end in ("html", "md", "json")]
    assert "load-hills has no rows" in err
    assert "Whose" not in (tmp_path / "report.html").read_text(encoding="utf-8")

    pages = [(tmp_path / f"report.{end}").read_bytes() for end in ("html", "md", "json")]
    (tmp_path / "report.html").unlink()
    code, _, err = command_line("bench", "report", str(tmp_path / "report.json"))
    assert code == 0, err
    assert [(tmp_path / f"report.{end}").read_bytes() for end in ("html", "md", "json")] == pages

    (tmp_path / "README.md").write_text(MARKS)
    into = ("bench", "table", str(tmp_path / "report.json"), "--into", str(tmp_path / "README.md"))
    code, _, err = command_line(*into, "--check")
    assert code == 1
    assert "disagrees" in err
    assert command_line(*into)[0] == command_line(*into, "--check")[0] == 0
    assert "| `query` |" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["report", "{}"], "has no results"),
        (["report", "{}", "--out", "x.pdf"], "no HTML file"),
        (["table", "{}/none.json", "--into", "{}/README.md"], "cannot be read"),
    ],
)
def test_bad_input_exits_with_2(command_line, tmp_path, args, says):
    code, _, err = command_line("bench", *(arg.format(tmp_path) for arg in args))
    assert code == 2
    assert says in " ".join(err.split())
