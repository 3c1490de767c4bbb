"""The registry: chunks are found by tokens and by text, go with the last of their documents, and are bounded."""

from __future__ import annotations

import logging

import pytest
from support.llm import TEXTS

from chunkcache.kv import ChunkKey, ChunkRef, chunk_name
from chunkcache.library.registry import KEYS, ChunkRegistry

IDS = {text: tuple(range(number * 1000, number * 1000 + 40)) for number, text in enumerate(TEXTS)}


def ref(text: str, *context: int) -> ChunkRef:
    return ChunkRef(ChunkKey.of("model", context, IDS[text]), IDS[text], context)


def name(text: str) -> str:
    return chunk_name(IDS[text])


def knowing(registry: ChunkRegistry | None = None, **documents: int) -> ChunkRegistry:
    """Return a registry of the texts with these numbers, by document."""
    registry = ChunkRegistry() if registry is None else registry
    for document, numbers in documents.items():
        for number in str(numbers):
            registry.add(ref(TEXTS[int(number)]), TEXTS[int(number)], document=document)
    return registry


def found(registry: ChunkRegistry) -> tuple[list[str], list[str]]:
    """Return the texts that are found by their tokens, and those that are found by text."""
    spans = registry.find_tokens([token for ids in IDS.values() for token in ids])
    by_tokens = [text for span, _ in spans for text in TEXTS if span.chunk_ids == IDS[text]]
    return by_tokens, [known.text for known in registry.find_text("\n\n".join(TEXTS))]


def both(*numbers: int) -> tuple[list[str], list[str]]:
    return [TEXTS[n] for n in numbers], [TEXTS[n] for n in numbers]


def test_a_chunk_is_found_by_its_tokens_and_by_its_text_without_the_space_round_it():
    registry = ChunkRegistry()
    registry.add(ref(TEXTS[0]), f"\n{TEXTS[0]} ")
    assert found(registry) == both(0)


def test_a_chunk_without_a_text_is_found_by_its_tokens_alone():
    registry = ChunkRegistry()
    registry.add(ref(TEXTS[0]))
    assert found(registry) == ([TEXTS[0]], [])


def test_another_text_with_the_same_tokens_takes_the_place_of_the_first():
    registry = knowing(a=0)
    registry.add(ref(TEXTS[0]), TEXTS[1])
    assert found(registry) == ([TEXTS[0]], [TEXTS[1]])


def test_a_chunk_goes_with_the_last_of_its_documents():
    registry = knowing(a="012", b=0)
    assert registry.delete_document("a", but={name(TEXTS[2])}) == {name(TEXTS[1])}
    assert found(registry) == both(0, 2)
    assert registry.documents_of([name(TEXTS[0])]) == {"b"}
    assert registry.documents_of([name(TEXTS[0]), name(TEXTS[2])]) == {"a", "b"}
    assert registry.delete_document("b") == {name(TEXTS[0])}
    assert registry.delete_document("b") == set()
    assert found(registry) == both(2)


def test_a_deleted_chunk_is_not_found_and_has_no_documents():
    registry = knowing(a="01")
    registry.delete({name(TEXTS[0]), "never known"})
    assert found(registry) == both(1)
    assert registry.documents_of([name(TEXTS[0])]) == set()
    registry.clear()
    assert (len(registry), found(registry)) == (0, both())
    assert registry.documents_of([name(TEXTS[1])]) == set()


def test_the_keys_of_a_chunk_are_bounded_and_the_latest_comes_last():
    registry = ChunkRegistry()
    for number in range(3 * KEYS):
        registry.add(ref(TEXTS[0], number))
    [(_, keys)] = registry.find_tokens(IDS[TEXTS[0]])
    assert keys == tuple(ref(TEXTS[0], number).key for number in range(2 * KEYS, 3 * KEYS))


def test_a_chunk_whose_last_key_has_gone_is_found_by_its_text_alone():
    registry = knowing(a=0)
    registry.forget_key(IDS[TEXTS[0]], ref(TEXTS[0], 9).key)
    assert found(registry) == both(0)
    registry.forget_key(IDS[TEXTS[0]], ref(TEXTS[0]).key)
    assert found(registry) == ([], [TEXTS[0]])
    knowing(registry, a=0)
    assert found(registry) == both(0)


@pytest.mark.parametrize("use", ["text", "tokens"])
def test_beyond_the_bound_the_one_used_longest_ago_goes_first(use):
    registry = knowing(ChunkRegistry(limit=2), a="01")
    if use == "text":
        registry.find_text(TEXTS[0])
    else:
        registry.find_tokens(IDS[TEXTS[0]])
    knowing(registry, a=2)
    assert found(registry) == both(0, 2)
    assert len(registry) == 2
    assert registry.documents_of([name(TEXTS[1])]) == {"a"}  # KV computed of it later are still deleted with it


def test_documents_are_bounded_too_and_that_is_said_once(caplog):
    registry = ChunkRegistry(owned=1)
    with caplog.at_level(logging.WARNING):
        knowing(registry, a="012")
    assert registry.documents_of([name(text) for text in TEXTS]) == {"a"}
    assert registry.documents_of([name(TEXTS[1])]) == set()
    assert len([record for record in caplog.records if "have documents" in record.message]) == 1
