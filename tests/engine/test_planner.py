"""Plans: what is exact is so by its key, and never by a coincidence of lengths."""

from __future__ import annotations

from support.llm import wrapped

from chunkcache.blend.cachecraft import CacheCraft
from chunkcache.engine.stats import RequestStats
from chunkcache.prompt.prompt import Prompt, PromptIds

FIRST, SECOND = tuple(range(100, 120)), tuple(range(200, 230))


def prompt(prefix: range, *chunks: tuple[int, ...]) -> Prompt:
    ids = PromptIds(prefix)
    for chunk in chunks:
        ids.add_chunk(chunk)
    ids.add([5, 6, 7])
    return ids.build(len(prefix))


def plan(llm, asked, policy):
    return llm.engine.planner.plan(asked, llm.resolve_policy(policy), RequestStats(str(policy)))


def test_a_version_computed_after_as_many_other_tokens_is_not_exact():
    llm = wrapped(policy=CacheCraft(alpha=2.0, focus=1.0))
    llm.engine.prefill(llm.engine.prepare(lambda: prompt(range(10, 22), FIRST, SECOND)))
    other = prompt(range(40, 72), SECOND)  # the chunk stands at position 32 again, after other tokens
    [span] = plan(llm, other, CacheCraft(alpha=0.1, focus=1.0)).chunks
    assert span.kv.position == span.start == 32
    assert not span.exact


def test_a_chunk_computed_after_the_very_prefix_is_exact():
    llm = wrapped(policy="reuse")
    asked = prompt(range(10, 22), FIRST, SECOND)
    for _ in range(2):
        assert [span.exact for span in plan(llm, asked, "reuse").chunks] == [True, False]
    again = plan(llm, prompt(range(30, 42), FIRST, SECOND), "reuse")
    assert [span.exact for span in again.chunks] == [True, False]  # computed again after the other prefix
    assert plan(llm, prompt(range(10, 22), SECOND, FIRST), "reuse").chunks[0].exact


def test_what_stands_behind_a_lead_in_is_not_exact():
    llm = wrapped(policy="query:ratio=0", lead_in="Some passage that is in no prompt.")
    assert [span.exact for span in plan(llm, prompt(range(10, 22), FIRST), "query:ratio=0").chunks] == [False]
