"""The usage of an answer says, chunk by chunk, what was reused."""

from __future__ import annotations

import httpx
from support.llm import QUESTION, TEXTS
from support.server import MODEL

ASK = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, "temperature": 0}


def asked(server, **more):
    body = httpx.post(f"{server[0]}/v1/chat/completions", json={**ASK, **more}).raise_for_status().json()
    return body["usage"]


def told(usage):
    [answer] = usage["prompt_tokens_details"]["chunkcache"]
    return answer["by_chunk"]


def test_each_chunk_says_where_its_kv_came_from_and_what_was_done(server):
    named = [{"id": "bridge", "data": {"text": TEXTS[0]}}, {"title": "Ferry", "text": TEXTS[1]}, TEXTS[2]]
    first = told(asked(server, documents=named))
    assert [chunk["source"] for chunk in first] == ["computed"] * 3
    usage = asked(server, documents=named)
    chunks = told(usage)
    assert [chunk["source"] for chunk in chunks] == ["memory"] * 3
    assert [chunk["index"] for chunk in chunks] == [0, 1, 2]
    assert [chunk.get("document") for chunk in chunks] == ["bridge", "Ferry", None]
    assert [chunk["lead"] for chunk in chunks] == ["context", "prefix", "prefix"]  # no lead-in fits the tiny model
    assert [chunk["exact"] for chunk in chunks] == [True, False, False]
    assert all(chunk["reused_tokens"] + chunk["recomputed_tokens"] == chunk["tokens"] for chunk in chunks)
    assert "guard" not in chunks[0]
    assert sum(chunk["tokens"] for chunk in chunks) < usage["prompt_tokens"]


def test_full_prefill_reuses_no_chunk(server):
    chunks = told(asked(server, documents=list(TEXTS), reuse="off"))
    assert all(chunk["exact"] and chunk["source"] == "computed" and chunk["lead"] is None for chunk in chunks)
    assert not any(chunk["reused_tokens"] for chunk in chunks)


def test_each_answer_says_it_and_how_long_it_waited(server):
    usage = asked(server, documents=list(TEXTS), n=2)
    answers = usage["prompt_tokens_details"]["chunkcache"]
    assert [len(answer["by_chunk"]) for answer in answers] == [3, 3]
    for answer in answers:
        assert 0 <= answer["stages_s"]["queue"] <= answer["ttft_s"]
