"""A server over a tiny model, and OpenAI's client of it."""

from __future__ import annotations

import openai
import pytest
from support.llm import tiny_model, wrapped
from support.server import served


@pytest.fixture(scope="module")
def server():
    with served(wrapped(tiny_model())) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client
