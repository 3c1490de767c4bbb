"""What is installed from a wheel or an sdist: every file of the tree, none of its links, and a whole command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("store", "blend", "retriever", "eval", "examples")
ROOMS = (
    "kv",
    "prompt",
    "library",
    "engine",
    "integrations",
    "integrations.langchain",
    "integrations.llamaindex",
    "integrations.transformers",
    "warm",
    "warm.ray",
    "cli",
    "store",
    "blend",
    "retriever",
    "eval",
    "eval.commands",
    "eval.report.page",
    "llm",
    "corpus",
    "models",
)


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """Run Python with `path` alone on PYTHONPATH; return what it prints."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYTHONDONTWRITEBYTECODE": "1"} | ({} if path is None else {"PYTHONPATH": str(path)})
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind: str, source: Path, into: Path) -> Path:
    """Build a `wheel` or an `sdist` as pip does, but with the setuptools that is installed here."""
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(into)!r})"
    run("-c", program, cwd=source)
    (made,) = into.iterdir()
    return made


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, with its links, because setuptools writes beside it."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("chunkcache", *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def files(tree: Path) -> set[str]:
    """Every file of the package, behind links too, by its path from the root."""
    found = (
        Path(folder, name) for folder, _, names in os.walk(tree / "chunkcache", followlinks=True) for name in names
    )
    return {file.relative_to(tree).as_posix() for file in found}


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def installed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of the tree holds."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(build("wheel", tree, tmp_path_factory.mktemp("wheel"))) as wheel:
        wheel.extractall(folder)
    return folder


def packaged(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in (folder / "chunkcache").rglob("*") if file.is_file()}


def test_the_wheel_holds_every_file_of_the_tree(installed, files):
    assert packaged(installed) == files
    assert {
        "chunkcache/py.typed",
        "chunkcache/prompt/lead_in.txt",
        "chunkcache/examples/questions.jsonl",
        "chunkcache/examples/corpus/hanniver.md",
        "chunkcache/examples/langchain_rag.py",
        *(f"chunkcache/eval/report/page.{ending}" for ending in ("css", "html", "js")),
    } <= files


def test_the_sdist_holds_the_linked_folders_as_files_and_makes_the_same_wheel(sdist, files, tmp_path):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
        assert all(member.isreg() or member.isdir() for member in members)
        assert files <= {member.name.partition("/")[2] for member in members if member.isreg()}
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    (tmp_path / "wheel").mkdir()
    with zipfile.ZipFile(build("wheel", source, tmp_path / "wheel")) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == files


def test_every_room_is_imported_from_the_wheel(installed, tmp_path):
    program = f"""
import json, sys
from importlib import import_module
files = [import_module("chunkcache." + room).__file__ for room in {ROOMS}]
from importlib.metadata import entry_points
commands = {{each.name: each.load().name for each in entry_points(group="chunkcache.commands")}}
print(json.dumps([files, commands]))
"""
    imported, commands = json.loads(run("-c", program, cwd=tmp_path, path=installed))
    assert len(imported) == len(ROOMS)
    assert all(Path(file).is_relative_to(installed) for file in imported)
    assert commands == {name: name for name in ("bench", "calibrate", "demo")}


def test_the_command_line_of_the_wheel_lists_all_commands(installed, tmp_path):
    listed = run("-m", "chunkcache", "--help", cwd=tmp_path, path=installed).partition("Commands:")[2]
    assert {"ask", "bench", "calibrate", "check-model", "demo", "store"} <= {
        line.split()[0] for line in listed.splitlines() if line.strip()
    }


def test_the_wheel_asks_for_no_more_than_the_core_without_extras(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    required = [line.partition(": ")[2] for line in metadata.read_text().splitlines() if "Requires-Dist" in line]
    core = {line.partition(">")[0] for line in required if "extra ==" not in line}
    assert {"torch", "transformers", "numpy", "click", "faiss-cpu", "redis"} <= core
    assert not core & {
        "sentence-transformers",
        "gguf",
        "accelerate",
        "bm25s",
        "pypdf",
        "ray",
        "lmcache",
        "matplotlib",
    }
