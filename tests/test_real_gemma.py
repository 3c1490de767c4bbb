"""The real Gemma 3 270M, a base model with sliding windows and no chat template, where its packages are installed."""

from __future__ import annotations

import pytest
import torch
from support.llm import real_model

import chunkcache
from chunkcache.blend import Decoder, self_check
from chunkcache.blend.hydragen import can_share

pytestmark = pytest.mark.model

NAME = "gemma3-270m"
QUESTION = "Who designed the lighthouse called Hexel Light?"
CHUNKS = (
    "The town clock strikes thirteen on Lamp Night, and all shops stay open until the last candle has burned down.",
    "The lighthouse called Hexel Light was designed by Josiah Tarrow. It was built in 1871 and burned whale oil.",
)


@pytest.fixture(scope="module")
def llm() -> chunkcache.CachedLLM:
    return chunkcache.wrap(*real_model(NAME))  # its self-check is passed


@pytest.mark.parametrize("policy", ["full", "link:k=8", "query"])
def test_an_easy_question_is_answered(llm: chunkcache.CachedLLM, policy: str) -> None:
    out = llm.generate(QUESTION, CHUNKS, policy=policy, do_sample=False, max_new_tokens=8)
    assert "Josiah Tarrow" in out.text
    assert out.stats.chunks == 2


def test_a_prompt_without_a_template_is_plain_text_behind_the_first_token(llm: chunkcache.CachedLLM) -> None:
    assert llm.tokenizer.chat_template is None
    text = llm.tokenizer.decode(llm.prompts.build(QUESTION, CHUNKS).token_ids)
    assert text.startswith(llm.tokenizer.bos_token)
    assert text.endswith(f"Question: {QUESTION}\nAnswer:")


def test_it_passes_in_bfloat16_whose_rounding_depends_on_the_processor() -> None:
    model, _ = real_model(NAME, dtype="bfloat16")
    decoder = Decoder(model)
    rotation = self_check(decoder).rotation
    assert 0 < rotation.error <= rotation.limit
    assert can_share(decoder)
    assert model.dtype == torch.bfloat16
