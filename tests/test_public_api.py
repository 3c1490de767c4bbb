"""The public names: exactly these, and every one of them there."""

from __future__ import annotations

import re
from importlib.metadata import version

import pytest

import chunkcache
from chunkcache import errors

PUBLIC = {
    "CachedLLM",
    "ChunkCacheError",
    "ContextLengthError",
    "DocumentError",
    "Generation",
    "InputError",
    "ModelNotFoundError",
    "PolicyError",
    "Precomputed",
    "Prefilled",
    "PromptError",
    "RequestStats",
    "SelfCheckError",
    "Store",
    "StoreURLError",
    "TextStream",
    "TokenizerMismatchError",
    "UnsupportedModelError",
    "__version__",
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
    assert getattr(chunkcache, name) is not None


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
