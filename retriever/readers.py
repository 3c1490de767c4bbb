"""Formats: the bytes of a file to its text and title. A new format is a function and a line in `READERS`.

Files are not trusted: nothing in them is run or fetched, and what a reader cannot make sense of is a DocumentError
with the file's name.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from chunkcache.errors import DocumentError, missing_extra
from chunkcache.retriever.html import html_parts

logger = logging.getLogger(__name__)

_FRONT_MATTER = re.compile(r"---[ \t]*\n(?=[\w-]+[ \t]*:)(.*?\n)(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title[ \t]*:[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
# A title is looked for in the beginning only: parsing takes a second for a few megabytes.
_TITLE_WITHIN = 100_000
_CHARSET = re.compile(rb"""<(?:meta|\?xml)\b[^>]*?\b(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)
# What programs write into the title of a PDF when nobody gave it one.
_NO_TITLE = re.compile(
    r"untitled\b|microsoft \w+ - |.*\.(?:docx?|pptx?|odt|tex|dvi|ps|pdf|indd|md|html?)$", re.IGNORECASE
)
_MOST_HTML = 32 << 20


class Part(NamedTuple):
    """One document of a file; `title` and `id` where the file gives them."""

    text: str
    title: str | None = None
    id: str | None = None


Reader = Callable[[bytes, Path], list[Part]]


def plain(content: bytes, file: Path) -> list[Part]:
    """Read UTF-8 text; it has no title of its own."""
    return [Part(_decoded(content, file))]


def markdown(content: bytes, file: Path) -> list[Part]:
    """Read Markdown as it is written, without front matter; the title is there, or is the first `h1`."""
    text = _decoded(content, file)
    title = None
    if front := _FRONT_MATTER.match(text):
        text = text[front.end() :]
        named = _FRONT_TITLE.search(front.group(1))
        title = named and named.group(1).strip("\"'")
    return [Part(text, title or _first_heading(text[:_TITLE_WITHIN]))]


def html(content: bytes, file: Path) -> list[Part]:
    """Read the main text of a page; the title is its first `h1`, else `<title>`."""
    if len(content) > _MOST_HTML:
        raise DocumentError(f"{str(file)!r} has {len(content)} bytes, too many for a page: cut it, or leave it out")
    declared = _CHARSET.search(content[:2048])
    charset = declared.group(1).decode("ascii").lower() if declared else "utf-8"
    # Said in ASCII it cannot be true, and so means UTF-8.
    text, title = html_parts(_decoded(content, file, "utf-8" if charset.startswith("utf-") else charset), str(file))
    return [Part(text, title)]


def pdf(content: bytes, file: Path) -> list[Part]:
    """Read the text of the pages, one below the other; the title is that of the metadata if it looks like one."""
    try:
        from pypdf import PdfReader
    except ImportError as error:
        raise missing_extra("retriever", f"reading the PDF {str(file)!r}", error) from error
    try:
        reader = PdfReader(BytesIO(content))
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else [_scalar(page.extract_text()).strip() for page in reader.pages]
        title = None if locked else reader.metadata and reader.metadata.title
    except Exception as error:  # of a damaged file pypdf raises whatever it stumbles over
        raise DocumentError(
            f"{str(file)!r} cannot be read as a PDF ({type(error).__name__}: {error}): "
            "save it anew with another program, or leave it out"
        ) from error
    if locked:
        raise DocumentError(f"{str(file)!r} is encrypted: save a copy without a password, or leave it out")
    if not any(pages):
        logger.warning("skipped %s: no text on its %d pages; if it is scanned, run OCR on it first", file, len(pages))
        return []
    if empty := pages.count(""):
        logger.warning("%d of %d pages of %s have no text", empty, len(pages), file)
    title = _scalar(" ".join(title.split())) if isinstance(title, str) else ""
    # One line break, because a sentence may go on over the page.
    return [Part("\n".join(filter(None, pages)), title if title and not _NO_TITLE.match(title) else None)]


def rows(content: bytes, file: Path) -> list[Part]:
    """Read the rows of a JSON list, or of JSON Lines, a document each."""
    parts: list[Part] = []
    seen: dict[str, int] = {}
    empty = 0
    for number, row in _rows(_decoded(content, file), file):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            found = f"has {', '.join(map(str, row))}" if isinstance(row, dict) else f"is a {type(row).__name__}"
            raise DocumentError(f'row {number} of {str(file)!r} is not an object with a "text", but {found}')
        if not row["text"].strip():
            empty += 1
            continue
        title = row.get("title")
        title = _scalar(title) if isinstance(title, str) and title.strip() else None
        given = row.get("id", row.get("_id"))
        name = (
            _scalar(str(given)) if isinstance(given, str | int) and given != "" else title or f"{file.name}:{number}"
        )
        if name in seen:
            raise DocumentError(
                f"rows {seen[name]} and {number} of {str(file)!r} have the same id {name!r}: "
                'give each row an "id" of its own'
            )
        seen[name] = number
        parts.append(Part(_scalar(row["text"]), title or name, name))
    if empty:
        logger.warning("skipped %d rows of %s: they have no text", empty, file)
    return parts


READERS: dict[str, Reader] = {
    ".txt": plain,
    ".md": markdown,
    ".markdown": markdown,
    ".html": html,
    ".htm": html,
    ".pdf": pdf,
    ".json": rows,
    ".jsonl": rows,
}
# Read only where they are named themselves, because most such files in a folder are no documents.
CORPUS_SUFFIXES = frozenset({".json", ".jsonl"})


def _decoded(content: bytes, file: Path, charset: str = "utf-8") -> str:
    try:
        # utf-8-sig also reads plain UTF-8, and drops the mark that some editors put first.
        text = content.decode("utf-8-sig" if charset == "utf-8" else charset)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{str(file)!r} is not {charset.upper()} text (byte {error.start}): save it as UTF-8, or leave it out"
        ) from error
    except LookupError as error:
        raise DocumentError(f"{str(file)!r} says it is in {charset!r}, which is unknown: save it as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _first_heading(text: str) -> str | None:
    try:
        from markdown_it import MarkdownIt
    except ImportError as error:
        raise missing_extra("retriever", "reading Markdown", error) from error
    blocks = MarkdownIt("commonmark")
    blocks.core.ruler.enableOnly(["normalize", "block"])
    tokens = blocks.parse(text)
    for opening, content in pairwise(tokens):
        if opening.type == "heading_open" and opening.tag == "h1":
            inline = MarkdownIt("commonmark").parseInline(content.content)[0].children or []
            # What has no content, as a line break, stands between words; what has no width, between none.
            words = "".join(" " if token.type == "softbreak" else token.content for token in inline)
            return " ".join(words.split()) or None
    return None


def _rows(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    lines = file.suffix.lower() == ".jsonl"
    number = 1
    try:
        if lines:
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    yield number, json.loads(line)
            return
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        where = f"row {number} of " if lines else ""
        raise DocumentError(f"{where}{str(file)!r} is not JSON ({error}): mend it, or leave it out") from error
    if not isinstance(found, list):
        raise DocumentError(f'{str(file)!r} is not a list of rows: give [{{"text": ...}}, ...]')
    yield from enumerate(found, start=1)


def _scalar(text: str) -> str:
    """Replace halves of surrogate pairs, which no tokenizer takes, by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
