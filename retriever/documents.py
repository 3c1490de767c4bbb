"""Documents in: files become `Document` objects. Knows nothing of chunks or models; formats are in `readers`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chunkcache.errors import DocumentError
from chunkcache.retriever.readers import CORPUS_SUFFIXES, READERS, Part, plain

logger = logging.getLogger(__name__)

MAX_BYTES = 256 << 20
SUFFIXES = tuple(sorted(set(READERS) - CORPUS_SUFFIXES))


@dataclass(frozen=True)
class Document:
    """One text; `id` names it uniquely among those it was loaded with."""

    id: str
    title: str
    text: str


def load_documents(path: str | Path) -> list[Document]:
    """Read one file, every visible file of a known format under a folder, or the rows of a JSON corpus.

    Formats are text, Markdown, HTML and PDF, told by the suffix; a file of any other suffix that is named itself is
    read as text. Documents are sorted by id, the POSIX path below the folder (a single file's name). The title is
    the document's own where its format has one, else the file's stem. What has no text is skipped with a logged
    warning.

    A `.json` file (a list) or `.jsonl` file (a line each) that is named itself has rows `{"text": ...}`, with
    "title" and "id" (or "_id") if they have them: a document each, in the order of the file. A row without an id has
    its title for one, else the file's name and its number. Under a folder such files are not read.

    Raises DocumentError when the path is missing, a file is not UTF-8, damaged, encrypted or over 256 MiB, two
    rows have the same id, or no text is found.
    """
    path = Path(path)
    if not path.exists():
        raise DocumentError(f"no document at {str(path)!r}: give an existing folder or file")
    files = {path.name: path} if path.is_file() else _visible_files(path)
    documents = [document for name in sorted(files) for document in _documents(name, files[name])]
    if not documents:
        raise DocumentError(f"no text in {str(path)!r}: give a file with text ({', '.join(SUFFIXES)})")
    return documents


def _visible_files(folder: Path) -> dict[str, Path]:
    files = {}
    for file in folder.rglob("*"):
        relative = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if file.suffix.lower() in SUFFIXES and not hidden and file.is_file():
            files[relative.as_posix()] = file
    return files


def _documents(name: str, file: Path) -> Iterator[Document]:
    content = _content(file)
    parts = READERS.get(file.suffix.lower(), plain)(content, file) if content.strip() else [Part("")]
    for part in parts:
        if part.text.strip():
            yield Document(id=part.id or name, title=part.title or file.stem, text=part.text)
        else:
            logger.warning("skipped %s: the file is empty", file)


def _content(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > MAX_BYTES:
            raise DocumentError(f"{str(file)!r} has {size} bytes, more than {MAX_BYTES}: cut it into several files")
        return file.read_bytes()
    except OSError as error:
        raise DocumentError(f"cannot read {str(file)!r} ({error.strerror}): check its permissions") from error
