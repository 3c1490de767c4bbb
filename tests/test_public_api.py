"""The public names: exactly these, and every one of them there."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version

import pytest

import chunkcache
from chunkcache import errors

PUBLIC = {
    "Batch",
    "CachedLLM",
    "ChunkCacheError",
    "CalibrationError",
    "ContextLengthError",
    "Conversation",
    "Corpus",
    "DocumentError",
    "EntryLostError",
    "Generation",
    "InputError",
    "ModelNotFoundError",
    "Neighbours",
    "PromptChunk",
    "PeerError",
    "Policy",
    "PolicyError",
    "PrecomputeResult",
    "PrefillOutput",
    "PromptError",
    "QueueFullError",
    "Request",
    "RequestStats",
    "ResultsError",
    "Retriever",
    "SelfCheckError",
    "ServingError",
    "Store",
    "StoreURLError",
    "TextStream",
    "TokenizerMismatchError",
    "UnsupportedModelError",
    "__version__",
    "load_documents",
    "load_model",
    "open_store",
    "wrap",
}
DRAWN = re.findall(r"\b\w+Error\b", errors.__doc__ or "")


def test_all_is_what_is_promised():
    assert set(chunkcache.__all__) == PUBLIC
    assert len(chunkcache.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_exists(name):
    assert getattr(getattr(chunkcache, name), "__name__", name) in (name, "CachedLLM")  # wrap is CachedLLM


def test_star_import_gives_the_public_names():
    namespace: dict[str, object] = {}
    exec("from chunkcache import *", namespace)
    assert set(namespace) - {"__builtins__"} == PUBLIC


@pytest.mark.parametrize("name", DRAWN)
def test_every_drawn_error_is_exported(name):
    assert name in chunkcache.__all__
    assert getattr(chunkcache, name) is getattr(errors, name)


def test_version_is_the_installed_one():
    assert chunkcache.__version__ == version("chunkcache")


def test_dir_lists_the_public_names():
    assert set(dir(chunkcache)) == PUBLIC


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'chunkcache' has no attribute 'wrapp'"):
        chunkcache.wrapp  # noqa: B018


def test_importing_it_does_not_import_torch():
    code = "import sys, chunkcache; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("old", "new"), [("Passage", "PromptChunk"), ("Precomputed", "PrecomputeResult"), ("Prefilled", "PrefillOutput")]
)
def test_old_names_work_for_one_release(old, new):
    with pytest.warns(DeprecationWarning, match=f"chunkcache.{old} is now chunkcache.{new}"):
        assert getattr(chunkcache, old) is getattr(chunkcache, new)
