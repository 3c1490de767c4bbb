"""Nothing is collected here where vLLM is not installed: `make test-vllm` makes an environment of its own for it."""

from __future__ import annotations

import importlib.util

import pytest

_spec = importlib.util.find_spec("vllm")
if _spec is None or _spec.origin is None:  # this folder, which lies on the path of tests
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return a function that gives the folder of a family's model, written once."""
    made = {}

    def folder(family, seed=0):
        if (family, seed) not in made:
            from support.vllm_engine import save_model

            made[family, seed] = save_model(tmp_path_factory.mktemp("models") / f"{family}-{seed}", family, seed)
        return made[family, seed]

    return folder


@pytest.fixture(scope="module")
def reference(folders):
    """What chunkcache answers by transformers with the tiny Llama, over what the tests of one file have stored."""
    from support.vllm_engine import Reference

    return Reference(folders("llama"))
