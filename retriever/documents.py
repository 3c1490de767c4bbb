"""Documents in: text and markdown files become `Document` objects. Knows nothing of chunks or models."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from chunkcache.errors import DocumentError

logger = logging.getLogger(__name__)

SUFFIXES = (".md", ".markdown", ".txt")

_FENCED_CODE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^# +(\S.*?)(?: +#+)? *$", re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """One text; `id` names it uniquely among those it was loaded with."""

    id: str
    title: str
    text: str


def load_documents(path: str | Path) -> list[Document]:
    """Read one file of UTF-8 text, or every visible `.md`, `.markdown` and `.txt` file under a folder.

    Documents are sorted by id, the POSIX path below the folder (a single file's name). The title is the first
    markdown `# ` heading, else the file's stem. An empty file is skipped with a logged warning. Raises
    DocumentError when the path is missing, a file is not UTF-8, or no text is found.
    """
    path = Path(path)
    if not path.exists():
        raise DocumentError(f"no document at {str(path)!r}: give an existing folder or text file")
    files = {path.name: path} if path.is_file() else _visible_files(path)
    documents = [
        Document(id=name, title=_title(text, files[name].stem), text=text)
        for name in sorted(files)
        if (text := _read(files[name])).strip()
    ]
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


def _read(file: Path) -> str:
    try:
        # utf-8-sig also reads plain UTF-8, and drops the mark that some editors put first.
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{str(file)!r} is not UTF-8 text (byte {error.start}): save it as UTF-8, or leave it out"
        ) from error
    except OSError as error:
        raise DocumentError(f"cannot read {str(file)!r} ({error.strerror}): check its permissions") from error
    if not text.strip():
        logger.warning("skipped %s: the file is empty", file)
    return text


def _title(text: str, stem: str) -> str:
    # A `# ` inside a fenced code block is a comment, not a heading.
    heading = _HEADING.search(_FENCED_CODE.sub("", text))
    return heading.group(1) if heading else stem
