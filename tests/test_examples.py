"""The examples run as they stand, in a process of their own, over a few files, and are short."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def lines_of_code(path: Path) -> int:
    """Return how many lines have code on them, the docstring counted as one."""
    with path.open("rb") as file:
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type not in LAYOUT]
    return len({token.start[0] for token in tokens[1:]})  # the first is the encoding


def test_there_is_one_for_each_framework():
    assert [path.name for path in EXAMPLES] == ["langchain_rag.py", "llamaindex_rag.py", "transformers_rag.py"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_is_under_thirty_lines(path):
    assert lines_of_code(path) < 30


@pytest.mark.model
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_runs_and_answers(path, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for document in (FOLDER / "corpus").glob("[hk]e*.md"):
        shutil.copy(document, corpus)
    done = subprocess.run(
        [sys.executable, str(path), str(corpus)],  # those that take no folder have one text of their own
        cwd=tmp_path,  # not where it lies
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 5  # an answer; its words differ from one CPU to another
    assert "Traceback" not in done.stderr
