"""Saves an index in a folder, and loads it.

    manifest.json           what it was built with, and size and SHA-256 of the others
    vectors-<digest>.faiss  the vectors of all passages
    chunks-<digest>.jsonl   a document a line: its id, the hash of its text, its chunks

The other two are named after their content and written first. The manifest is then renamed into place, which is what
makes them the index: whatever ends the writer, a reader finds the old index or the new one. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from chunkcache.errors import DocumentError, InputError
from chunkcache.retriever.chunking import Chunk
from chunkcache.retriever.embedder import Embedder
from chunkcache.retriever.index import VectorIndex, Vectors, digest
from chunkcache.retriever.table import Entry, Filed, Table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1

_MANIFEST = "manifest.json"
_PARTIAL = ".partial-"
_OURS = re.compile(r"(vectors|chunks)-[0-9a-f]{16}\.(faiss|jsonl)")
_SAME = 0.999  # cosine similarity of one text's two vectors that only rounding sets apart
_PROBE = (
    "The ferry sails twice a day, doesn't it?\n\tL'île d'Yeu; Größe: 3.5 km². Остров; 島へ渡る船 — العَبّارة 🚢 "
    "def sail(knots=12): return {'ok': knots >= 1e-3}"
)
_CHUNK = {"index": int, "text": str, "tokens": int, "start": int, "id": str}


@dataclass(frozen=True)
class Saved:
    """What `read` finds."""

    settings: dict[str, Any]
    table: Table
    index: VectorIndex


def write(
    folder: Path,
    settings: dict[str, Any],
    table: Table,
    index: VectorIndex,
    embedder: Embedder,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write an index to a folder, which is made if it is missing.

    Raises:
        InputError: it cannot be written.
    """
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "settings": settings,
        "tokenizer": _identity(tokenizer),
        "embedder": {"name": _name(embedder), "probe": _probe(embedder).tolist()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            for left in folder.glob(f"{_PARTIAL}*"):
                shutil.rmtree(left)  # by a writer that was killed
            with tempfile.TemporaryDirectory(dir=folder, prefix=_PARTIAL) as new:
                _write(folder, Path(new), manifest, table, index)
    except (OSError, RuntimeError) as error:  # faiss raises the latter when a disk is full
        raise InputError(f"the index cannot be saved in {str(folder)!r} ({error}): give another folder") from error


def _write(folder: Path, new: Path, manifest: dict[str, Any], table: Table, index: VectorIndex) -> None:
    manifest["vectors"] = index.save(new / "faiss")
    with (new / "jsonl").open("w", encoding="ascii", newline="\n") as out:
        out.writelines(_lines(table))
    manifest["chunks"] = digest(new / "jsonl")
    for name, suffix in (("vectors", "faiss"), ("chunks", "jsonl")):
        manifest[name]["file"] = f"{name}-{manifest[name]['sha256'][:16]}.{suffix}"
        _place(new / suffix, folder / manifest[name]["file"])
    (new / "json").write_text(json.dumps(manifest, indent=1), encoding="ascii")
    _place(new / "json", folder / _MANIFEST)
    for file in folder.iterdir():
        if _OURS.fullmatch(file.name) and file.name not in (manifest["vectors"]["file"], manifest["chunks"]["file"]):
            file.unlink()


def read(folder: Path, embedder: Embedder, tokenizer: PreTrainedTokenizerBase, mmap: bool) -> Saved:
    """Read and check what `write` wrote.

    Raises:
        DocumentError: there is no index, or it is damaged, or of another format.
        InputError: it was built with another embedder or tokenizer.
    """
    while True:
        manifest = _manifest(folder)
        failure: InputError
        try:
            return _read(folder, json.loads(manifest), embedder, tokenizer, mmap)
        except InputError as error:
            failure = error
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            failure = DocumentError(f"the index in {str(folder)!r} is damaged ({error!r}): build it again")
        if manifest == _manifest(folder):  # else another process has saved a new one meanwhile
            raise failure


def there(folder: Path) -> bool:
    """Return whether an index was written to `folder`."""
    return (folder / _MANIFEST).is_file()


def _manifest(folder: Path) -> bytes:
    try:
        return (folder / _MANIFEST).read_bytes()
    except OSError as error:
        raise DocumentError(
            f"there is no index in {str(folder)!r} ({error.strerror}): give a folder that `save` wrote, or build it"
        ) from error


def _read(
    folder: Path, manifest: dict[str, Any], embedder: Embedder, tokenizer: PreTrainedTokenizerBase, mmap: bool
) -> Saved:
    if manifest["format"] != FORMAT:
        raise DocumentError(
            f"the index in {str(folder)!r} has format {manifest['format']!r}, and {FORMAT} is read: build it again"
        )
    settings = manifest["settings"]
    for name, kind in {"size": int, "overlap": int, "mode": str, "candidates": int, "next": int}.items():
        _typed(settings, name, kind)
    vectors, chunks = (_file(folder, manifest[name]) for name in ("vectors", "chunks"))
    _check_embedder(folder, manifest, embedder)
    if manifest["tokenizer"] != _identity(tokenizer):
        raise InputError(
            f"the index in {str(folder)!r} was built with another tokenizer than {tokenizer.name_or_path!r}: "
            "give the one that it was built with, or build it again"
        )
    if digest(chunks) != {name: manifest["chunks"][name] for name in ("bytes", "sha256")}:
        raise ValueError(f"{chunks.name} is not the file that was saved")
    index = VectorIndex.load(vectors, manifest["vectors"], mmap)
    with chunks.open(encoding="utf-8") as lines:
        rows = [_document(json.loads(line), place, len(index)) for place, line in enumerate(lines)]
    table = Table({}, {}).with_changes(dict(rows))
    ids = index.ids()
    if sum(len(entry.passages) for entry in table.entries) != len(ids) or table.owners.keys() != ids:
        raise ValueError("its chunks and its vectors do not belong together")
    if len(table.documents) != len(rows) or settings["next"] < max(len(rows), max(ids, default=-1) + 1):
        raise ValueError("a document is in it twice, or the next id is taken")
    return Saved(settings, table, index)


def _document(row: dict[str, Any], place: int, most: int) -> tuple[str, Filed]:
    name, entries = _typed(row, "id", str), []
    for number, fields in enumerate(_typed(row, "chunks", list)):
        values = {field: _typed(fields, field, kind) for field, kind in _CHUNK.items()}
        first, count = _typed(fields, "first", int), _typed(fields, "passages", int)
        if values["index"] != number or first < 0 or not 0 <= count <= most:
            raise ValueError(f"chunk {number} of {name!r} is not one")
        entries.append(Entry(Chunk(document_id=name, **values), range(first, first + count)))
    return name, Filed(_typed(row, "sha256", str), tuple(entries), place)


def _lines(table: Table) -> Iterator[str]:
    for name, filed in table.documents.items():
        chunks = [
            {field: getattr(entry.chunk, field) for field in _CHUNK}
            | {"first": entry.passages.start, "passages": len(entry.passages)}
            for entry in filed.entries
        ]
        yield json.dumps({"id": name, "sha256": filed.sha256, "chunks": chunks}) + "\n"


def _check_embedder(folder: Path, manifest: dict[str, Any], embedder: Embedder) -> None:
    theirs, dim = manifest["embedder"], manifest["vectors"]["dim"]
    built = f"the index in {str(folder)!r} was built with the embedder {theirs['name']!r}"
    out = "give the one that it was built with, or build it again"
    if dim != embedder.dim:
        raise InputError(f"{built}, whose vectors have {dim} numbers; {_name(embedder)!r} has {embedder.dim}: {out}")
    then, now = np.asarray(theirs["probe"], dtype=np.float64), _probe(embedder).astype(np.float64)
    same = float(then @ now / (np.linalg.norm(then) * np.linalg.norm(now)))
    if not same >= _SAME:
        raise InputError(f"{built}; {_name(embedder)!r} gives other vectors (similarity {same:.3f}): {out}")


def _probe(embedder: Embedder) -> Vectors:
    vector: Vectors = embedder.embed([_PROBE])[0]
    return vector


def _name(embedder: Embedder) -> str:
    return str(getattr(embedder, "name", type(embedder).__name__))


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What tokenizers that cut texts alike have in common: SHA-256 of their ids for one text in many scripts."""
    ids = tokenizer(_PROBE, add_special_tokens=False).input_ids
    return hashlib.sha256(json.dumps([list(ids), len(tokenizer)]).encode()).hexdigest()


def _file(folder: Path, facts: dict[str, Any]) -> Path:
    name: str = _typed(facts, "file", str)
    if not _OURS.fullmatch(name):
        raise ValueError(f"{name!r} is no name of its files")
    return folder / name


def _typed(row: dict[str, Any], name: str, kind: type) -> Any:
    value = row[name]
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}")
    return value


def _place(file: Path, target: Path) -> None:
    """Give a file its name, once its content is on the disk, and have the name there too."""
    _sync(file)
    os.replace(file, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
