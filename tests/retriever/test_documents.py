"""Loading of documents: what is read, in which order, under which title, and what is refused."""

from __future__ import annotations

import logging

import pytest

from chunkcache.errors import DocumentError
from chunkcache.retriever.documents import Document, load_documents


def write(folder, **files):
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def test_a_folder_is_read_recursively_in_the_order_of_ids(tmp_path):
    write(
        tmp_path,
        b_md="# B\n\nbee",
        a__z_txt="zed",
        a__c_markdown="# Sea #\ncee",
        a_MD="upper",
        d_HTM="<p>dee",
        x_rst="no",
    )
    assert load_documents(tmp_path) == [
        Document("a.MD", "a", "upper"),
        Document("a/c.markdown", "Sea", "# Sea #\ncee"),
        Document("a/z.txt", "z", "zed"),
        Document("b.md", "B", "# B\n\nbee"),
        Document("d.HTM", "d", "dee"),
    ]


def test_hidden_files_and_folders_are_skipped_below_the_folder_only(tmp_path):
    root = tmp_path / ".notes"
    write(root, a_md="seen")
    (root / ".git").mkdir()
    (root / ".git" / "b.md").write_text("hidden")
    (root / ".c.md").write_text("hidden")
    assert [document.id for document in load_documents(root)] == ["a.md"]


def test_one_file_of_any_suffix(tmp_path):
    file = tmp_path / "notes.rst"
    file.write_text("text")
    assert load_documents(str(file)) == [Document("notes.rst", "notes", "text")]


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("intro\n\n# First\n\n# Second", "First"),
        ("## Only a second-level heading", "doc"),
        ("#hashtag", "doc"),
        ("# About C#\n", "About C#"),
        ("```sh\n# install\n```\n\n# Real\n", "Real"),
        ("\ufeff# With a byte order mark", "With a byte order mark"),
        ("# Größe и 尺寸\r\ntext", "Größe и 尺寸"),
    ],
)
def test_the_title_is_the_first_heading_else_the_stem(tmp_path, text, title):
    file = tmp_path / "doc.md"
    file.write_text(text, encoding="utf-8")
    assert load_documents(file)[0].title == title


def test_an_empty_file_is_skipped_with_a_warning(tmp_path, caplog):
    write(tmp_path, a_md="text", b_md=" \n", c_pdf="", d_html="")
    with caplog.at_level(logging.WARNING):
        assert [document.id for document in load_documents(tmp_path)] == ["a.md"]
    assert all(name in caplog.text for name in ("b.md", "c.pdf", "d.html"))


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(DocumentError, match=r"nowhere.*give an existing folder"):
        load_documents(tmp_path / "nowhere")


def test_a_folder_without_text_is_refused(tmp_path):
    write(tmp_path, a_rst="no", b_md="")
    with pytest.raises(DocumentError, match=r"no text in .*\.markdown.*\.pdf"):
        load_documents(tmp_path)


def test_bytes_that_are_not_utf8_are_refused_by_name(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(DocumentError, match=r"latin\.txt.*byte 3.*UTF-8"):
        load_documents(tmp_path)


def test_an_unreadable_file_is_refused_by_name(tmp_path, monkeypatch):
    write(tmp_path, a_md="text")

    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", deny)
    with pytest.raises(DocumentError, match=r"a\.md.*Permission denied.*check its permissions"):
        load_documents(tmp_path)


def test_a_file_too_large_to_read_is_refused_by_name(tmp_path, monkeypatch):
    write(tmp_path, a_md="long text")
    monkeypatch.setattr("chunkcache.retriever.documents.MAX_BYTES", 4)
    with pytest.raises(DocumentError, match=r"a\.md.*has 9 bytes, more than 4.*several files"):
        load_documents(tmp_path)
