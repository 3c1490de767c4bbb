"""Without an optional package everything imports, and what needs it names the extra that brings it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_tokenizer import tiny_tokenizer

from chunkcache.errors import InputError
from chunkcache.retriever import CrossEncoderReranker, Document, Embedder, keywords, load_documents, split

OPTIONAL = (
    "sentence_transformers",
    "semchunk",
    "sentencex",
    "selectolax",
    "pypdf",
    "markdown_it",
    "bm25s",
    "gguf",
    "accelerate",
    "hiredis",
    "lmcache",
    "matplotlib",
    "ray",
    "rouge_score",
    "scipy",
    "simpy",
    "langchain_core",
    "llama_index",
)


def load(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    load_documents(folder / name)


def embed(folder: Path) -> None:
    (folder / "modules.json").write_text("[]")
    Embedder(folder)


def cut(text: str) -> None:
    split(Document("d", "", text), tiny_tokenizer(), size=4)


FEATURES = {
    "an embedder": ("sentence_transformers", "sentence-transformers", embed),
    "a reranker": ("sentence_transformers", "sentence-transformers", CrossEncoderReranker),
    "a word to cut": ("semchunk", "semchunk", lambda _: cut("m" * 100)),
    "sentences to cut between": ("sentencex", "sentencex", lambda _: cut("The mill stands. The tide turns it. " * 5)),
    "a page": ("selectolax.lexbor", "selectolax", lambda folder: load(folder, "a.html", "<p>Tide</p>")),
    "a PDF": ("pypdf", "pypdf", lambda folder: load(folder, "a.pdf", "%PDF-1.7")),
    "Markdown": ("markdown_it", "markdown-it-py", lambda folder: load(folder, "a.md", "# Tide")),
    "keywords": ("bm25s", "bm25s", lambda _: keywords.Keywords([["tide", "mill"]])),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_without_its_package_names_the_extra(feature, tmp_path, monkeypatch):
    module, package, use = FEATURES[feature]
    monkeypatch.setattr(keywords, "_bm25s", keywords._bm25s.__wrapped__)  # not the one that was imported before
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf'needs {package} \(.*pip install "chunkcache\[retriever\]"') as caught:
        use(tmp_path)
    assert isinstance(caught.value.__cause__, ImportError)


def test_text_is_read_and_cut_without_the_packages_that_it_does_not_need(tmp_path, monkeypatch):
    for name in ("pypdf", "markdown_it", "selectolax.lexbor", "semchunk", "bm25s", "sentence_transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.txt").write_text("The mill stands. The tide turns it.")
    (document,) = load_documents(tmp_path)
    assert [chunk.document_id for chunk in split(document, tiny_tokenizer(), size=64)] == ["a.txt"]


def test_everything_imports_without_the_optional_packages():
    program = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # None in there is an ImportError
import chunkcache.retriever, chunkcache.corpus, chunkcache.models, chunkcache.cli.main, chunkcache.warm.ray
from chunkcache.errors import InputError
for plugin in ("langchain", "llamaindex"):
    try:
        __import__("chunkcache.integrations." + plugin)
    except InputError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.findall(r'needs (\S+) .*"chunkcache\[(\w+)\]"', done.stdout) == [
        ("langchain-core", "langchain"),
        ("llama-index-core", "llamaindex"),
    ]
