"""Calls in an answer, however it is cut into pieces."""

from __future__ import annotations

import json

import pytest

from chunkcache.serve.tool_parser import CallParser, delta, message
from chunkcache.serve.tools import FAMILIES

HERMES, MISTRAL, LLAMA = (family.form for family in FAMILIES)
ARGUMENTS = {"city": 'Nür"n}berg', "days": [1, {"a": "]\\"}], "none": None}
CALL = json.dumps({"name": "weather", "arguments": ARGUMENTS})
OTHER = '{"name": "stop", "arguments": {}}'
PARAMETERS = CALL.replace('"arguments"', '"parameters"')
CASES = {
    "text": (HERMES, "No call < at all <tool.", "No call < at all <tool.", []),
    "one": (HERMES, f"<tool_call>\n{CALL}\n</tool_call>", "", [ARGUMENTS]),
    "text and two": (
        HERMES,
        f"Let me see.\n\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{OTHER}</tool_call>\n",
        "Let me see.",
        [ARGUMENTS, {}],
    ),
    "a list, as SmolLM writes": (HERMES, f"<tool_call>[{CALL}, {OTHER}]</tool_call>", "", [ARGUMENTS, {}]),
    "arguments first": (
        HERMES,
        f'<tool_call>{{"arguments": {json.dumps(ARGUMENTS)}, "name": "weather"}}</tool_call>',
        "",
        [ARGUMENTS],
    ),
    "arguments as text": (
        HERMES,
        f'<tool_call>{{"name": "weather", "arguments": {json.dumps(json.dumps(ARGUMENTS))}}}</tool_call>',
        "",
        [ARGUMENTS],
    ),
    "no closing": (HERMES, f"<tool_call>{CALL}", "", [ARGUMENTS]),
    "more fields": (HERMES, f'<tool_call>{CALL[:-1]}, "id": "x"}}</tool_call>', "", [ARGUMENTS]),
    "unknown": (HERMES, 'So: <tool_call>{"name": "rm", "arguments": {}}</tool_call>', None, []),
    "a name that is a list": (HERMES, '<tool_call>{"name": ["rm"], "arguments": {}}</tool_call>', None, []),
    "no JSON": (HERMES, "<tool_call>{weather}</tool_call> or so", None, []),
    "no object": (HERMES, "<tool_call> [ </tool_call>", None, []),
    "cut in the head": (HERMES, '<tool_call>{"name": "wea', None, []),
    "mistral": (MISTRAL, f"[TOOL_CALLS] [{CALL}, {OTHER}]", "", [ARGUMENTS, {}]),
    "mistral, text": (MISTRAL, f"Hm [TOOL [TOOL_CALLS][{CALL}]", "Hm [TOOL", [ARGUMENTS]),
    "llama": (LLAMA, f" {PARAMETERS}", "", [ARGUMENTS]),
    "llama, two": (LLAMA, f"{PARAMETERS}; {PARAMETERS}", "", [ARGUMENTS] * 2),
    "llama, text": (LLAMA, f"It is {PARAMETERS}", None, []),
    "llama, other JSON": (LLAMA, ' {"name": "Ada", "parameters": {}} is JSON', None, []),
}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("case", CASES)
def test_calls_are_found_however_an_answer_is_cut(case, size):
    form, answer, text, calls = CASES[case]
    parser = CallParser(form, {"weather", "stop"})
    read = [each for at in range(0, len(answer), size) for each in parser.push(answer[at : at + size])]
    read += parser.finish()
    told = message(read)
    assert (told["content"] or "") == (answer if text is None else text)
    found = [json.loads(call["function"]["arguments"]) for call in told.get("tool_calls", [])]
    assert found == calls
    assert parser.calls == len(calls)
    first = [delta(each)["tool_calls"][0] for each in read if not isinstance(each, str) and each.name]
    assert len({each["id"] for each in first}) == len(calls)


def test_arguments_come_as_they_are_written():
    parser = CallParser(HERMES, {"weather"})
    assert parser.push("<tool_call>\n") == []
    [begun] = parser.push('{"name": "weather", "arguments": {')[:1]
    assert (begun.name, begun.arguments) == ("weather", "")
    assert [piece.arguments for piece in parser.push('"city": "Rom')] == ['"city": "Rom']
    assert parser.finish() == []  # cut short: what came is told


def test_no_more_calls_are_told_than_may_be():
    parser = CallParser(HERMES, {"weather", "stop"}, most=1, id_length=9)
    read = parser.push(f"<tool_call>{CALL}</tool_call><tool_call>{OTHER}</tool_call> and more")
    told = message([*read, *parser.finish()])
    assert [call["function"]["name"] for call in told["tool_calls"]] == ["weather"]
    assert len(told["tool_calls"][0]["id"]) == 9
    assert told["content"] is None
