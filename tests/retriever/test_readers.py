"""Formats: what of a file becomes text and title, and what of damaged or hostile files becomes an error."""

from __future__ import annotations

import json
import logging
from io import BytesIO

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from chunkcache.errors import DocumentError
from chunkcache.retriever.documents import Document, load_documents


@pytest.fixture
def load(tmp_path):
    """Write one file and load it."""

    def write_and_load(name, content):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_documents(file)

    return write_and_load


PAGE = """<!doctype html><html><head><title>The Ferry | Isles</title><style>p { color: red }</style></head><body>
<header><h1>ISLES</h1></header><nav><a href="/">Home</a></nav>
<main><script>document.write("no")</script><h1>The <em>Ferry</em></h1>
<p>It sails twice
   a day &amp; carries <b>forty</b> cars.</p>
<ul><li>Spring</li><li>Summer</li></ul>
<table><tr><th>Day</th><th>Time</th></tr><tr><td>Monday</td><td>9</td></tr></table>
<pre>if wind &gt; 9:
    stay()</pre>
<p hidden>hidden</p><p style="display: none">hidden</p><noscript>hidden</noscript></main>
<footer>All rights reserved</footer></body></html>"""


def test_a_page_is_its_main_text_with_its_structure(load):
    [page] = load("ferry.html", PAGE)
    assert page.title == "The Ferry"
    assert page.text.split("\n\n") == [
        "# The Ferry",
        "It sails twice a day & carries forty cars.",
        "- Spring\n- Summer",
        "Day | Time\nMonday | 9",
        "if wind > 9:\n    stay()",
    ]


@pytest.mark.parametrize(
    ("head", "body", "title"),
    [
        ("<title> Of the\n page </title>", "text", "Of the page"),
        ("<title>Site</title>", "<h1>Heading</h1>", "Heading"),
        ("<title>Site</title>", "<h1>One</h1><h1>Two</h1>", "Site"),
        ("", "<h1></h1><h2>Second level</h2>", "doc"),
        ("", "<h1>Usage <a href='#usage'>¶</a></h1>", "Usage"),
    ],
)
def test_the_title_of_a_page(load, head, body, title):
    assert load("doc.htm", f"<html><head>{head}</head><body>{body} text</body></html>")[0].title == title


def test_a_page_without_a_main_part_is_its_body_without_furniture(load, caplog):
    [page] = load("a.html", "<header>Logo</header><nav>Menu</nav><div>One.<div>Two.</div></div><footer>(c)</footer>")
    assert page.text == "One.\n\nTwo."
    assert caplog.text == ""


def test_a_small_part_marked_as_main_does_not_hide_the_rest(load):
    body = "<p>" + "The ferry sails in the morning. " * 20 + "</p>"
    [page] = load("a.html", f"<div>{body}</div><article>Read more.</article>")
    assert "The ferry sails" in page.text
    assert "Read more." in page.text


def test_a_page_of_nothing_but_navigation_is_read_whole_and_logged(load, caplog):
    [page] = load("index.html", "<nav><a>North</a> <a>South</a></nav><script>run()</script>")
    assert page.text == "North South"
    assert "no main text in" in caplog.text
    assert "index.html" in caplog.text


def test_a_page_with_no_text_at_all_is_skipped(load, caplog):
    with pytest.raises(DocumentError, match="no text"):
        load("a.html", "<html><body><script>1</script><img src=x></body></html>")
    assert "skipped" in caplog.text


def test_a_page_names_its_encoding(load):
    source = '<meta charset="{}"><p>Größe</p>'
    assert load("a.html", source.format("iso-8859-1").encode("latin-1"))[0].text == "Größe"
    assert load("a.html", source.format("utf-8"))[0].text == "Größe"
    assert load("a.html", "<p>Größe</p>")[0].text == "Größe"
    with pytest.raises(DocumentError, match=r"a\.html.*not UTF-8"):
        load("a.html", "<p>Größe</p>".encode("latin-1"))
    with pytest.raises(DocumentError, match=r"a\.html.*'klingon'.*save it as UTF-8"):
        load("a.html", source.format("klingon"))
    with pytest.raises(DocumentError, match="'hex'"):
        load("a.html", source.format("hex"))


def test_external_entities_are_not_fetched(load, tmp_path):
    (tmp_path / "secret").write_text("the secret")
    source = f'<!DOCTYPE html [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]><p>before &x; after</p>'
    assert "the secret" not in load("a.html", source)[0].text


def test_a_page_nested_without_end_is_refused(load):
    with pytest.raises(DocumentError, match=r"a\.html.*3000 deep"):
        load("a.html", "<div>" * 3000 + "text")
    assert load("a.html", "<div>" * 1500 + "text")[0].text == "text"
    assert load("a.html", "<p>text<br>" * 3000)[0].text.count("text") == 3000


@pytest.mark.parametrize(
    ("text", "title", "rest"),
    [
        ("---\ntitle: 'The Ferry'\ntags: [sea]\n---\n# Other\ntext", "The Ferry", "# Other\ntext"),
        ("---\ntags: [sea]\n---\n# Heading\n", "Heading", "# Heading\n"),
        ("---\nno front matter\n---\ntext", "doc", "---\nno front matter\n---\ntext"),
        ("Setext *heading*\n===\ntext", "Setext heading", "Setext *heading*\n===\ntext"),
        ("# The [ferry](x.md) and `code`\n", "The ferry and code", "# The [ferry](x.md) and `code`\n"),
        ("<!--\n# no heading\n-->\n\n# One", "One", "<!--\n# no heading\n-->\n\n# One"),
    ],
)
def test_markdown_titles_and_front_matter(load, text, title, rest):
    assert load("doc.md", text) == [Document("doc.md", title, rest)]


def test_plain_text_has_no_headings(load):
    assert load("conf.txt", "# a comment\r\nvalue")[0] == Document("conf.txt", "conf", "# a comment\nvalue")


def pdf(*pages, title=None, password=None):
    writer = PdfWriter()
    for text in pages:
        page = writer.add_blank_page(300, 300)
        stream = DecodedStreamObject()
        lines = " ".join(f"({line}) Tj 0 -14 Td" for line in text.split("\n")) if text else ""
        stream.set_data(f"BT /F1 12 Tf 20 250 Td {lines} ET".encode("latin-1"))
        page[NameObject("/Contents")] = writer._add_object(stream)
        font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
        fonts = DictionaryObject({NameObject("/F1"): names(font)})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    if title is not None:
        writer.add_metadata({"/Title": title})
    if password is not None:
        writer.encrypt(password, algorithm="RC4-128")
    out = BytesIO()
    writer.write(out)
    return out.getvalue()


def names(values):
    return DictionaryObject({NameObject(key): NameObject(value) for key, value in values.items()})


def test_a_pdf_is_the_text_of_its_pages(load):
    assert load("guide.pdf", pdf("The ferry sails\nin the", "morning.", title="A  Guide")) == [
        Document("guide.pdf", "A Guide", "The ferry sails\nin the\nmorning.")
    ]


@pytest.mark.parametrize("title", [None, "", "Microsoft Word - Document1", "guide_final.docx", "Untitled"])
def test_a_pdf_without_a_sensible_title_has_its_stem(load, title):
    assert load("guide.pdf", pdf("text", title=title))[0].title == "guide"


def test_a_pdf_of_images_is_skipped_with_a_hint(tmp_path, caplog):
    (tmp_path / "scan.pdf").write_bytes(pdf("", ""))
    (tmp_path / "half.pdf").write_bytes(pdf("text", ""))
    with caplog.at_level(logging.WARNING):
        assert [document.id for document in load_documents(tmp_path)] == ["half.pdf"]
    assert "scan.pdf: no text on its 2 pages; if it is scanned, run OCR" in caplog.text
    assert "1 of 2 pages of" in caplog.text


def test_an_encrypted_pdf_is_refused_unless_it_opens_without_a_password(load):
    with pytest.raises(DocumentError, match=r"secret\.pdf.*is encrypted: save a copy without a password"):
        load("secret.pdf", pdf("text", password="key"))
    assert load("open.pdf", pdf("text", password=""))[0].text == "text"


@pytest.mark.parametrize("content", [b"no pdf", b"%PDF-1.7\n\x00\xff garbage", pdf("text")[:300]])
def test_a_damaged_pdf_is_refused_by_name(tmp_path, content):
    (tmp_path / "good.md").write_text("text")
    (tmp_path / "bad.pdf").write_bytes(content)
    with pytest.raises(DocumentError, match=r"bad\.pdf.*cannot be read as a PDF.*leave it out"):
        load_documents(tmp_path)


def test_rows_of_json_are_documents_in_their_order(load, caplog):
    rows = [
        {"_id": 7, "title": "Z", "text": "zed", "other": []},
        {"id": "a", "text": "bee"},
        {"title": "T", "text": "tea"},
        {"text": "sea \ud800"},
        {"text": " "},
    ]
    expected = [Document("7", "Z", "zed"), Document("a", "a", "bee"), Document("T", "T", "tea")]
    assert load("rows.json", json.dumps(rows)) == [*expected, Document("rows.json:4", "rows.json:4", "sea ?")]
    assert "skipped 1 rows of" in caplog.text
    lines = "\r\n".join(map(json.dumps, [*rows[:3], rows[4]])) + "\n\n"
    assert load("rows.jsonl", lines) == expected


def test_json_in_a_folder_is_not_read(tmp_path):
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "b.json").write_text('[{"text": "row"}]')
    (tmp_path / "c.jsonl").write_text('{"text": "row"}')
    assert [document.id for document in load_documents(tmp_path)] == ["a.md"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"id": "x", "text": "1"}, {"id": "x", "text": "2"}]', r"rows 1 and 2 of .*same id 'x'"),
        ("a.json", '[{"title": "T", "text": "1"}, {"title": "T", "text": "2"}]', r"same id 'T'.*\"id\" of its own"),
        ("a.json", '[{"title": "no text"}]', r"row 1 of .*a\.json.*\"text\""),
        ("a.json", '["text"]', r"row 1 of .*not an object"),
        ("a.json", '{"text": "one"}', r"a\.json.*not a list of rows"),
        ("a.json", "[{", r"a\.json.*not JSON"),
        ("a.json", "[" * 200_000, r"a\.json.*not JSON"),
        ("a.jsonl", '{"text": "1"}\n\n{"text": ', r"row 3 of .*a\.jsonl.*not JSON"),
        ("a.json", "[]", "no text in"),
    ],
)
def test_json_that_cannot_be_used_is_refused(load, name, content, message):
    with pytest.raises(DocumentError, match=message):
        load(name, content)
