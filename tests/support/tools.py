"""Chat templates that call tools in the forms of three families, and a tokenizer for each."""

from __future__ import annotations

import copy
from typing import Any

from helpers_tokenizer import tiny_tokenizer
from support.llm import VOCAB

_CALLED = '{"name": "{{ call.function.name }}", "KEY": {{ call.function.arguments | tojson }}}'
_TOOLS = (
    "{% if tools %}<s>system\nCall HOW: "
    "{% for tool in tools %}{{ tool.function | tojson }}{% endfor %}</s>\n{% endif %}"
)
_TURNS = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}CALL{% endfor %}</s>\n{% endfor %}<s>assistant\n"
)


def _template(how: str, key: str, call: str) -> str:
    called = call.replace("{}", _CALLED.replace("KEY", key))
    return _TOOLS.replace("HOW", how) + _TURNS.replace("CALL", called)


TEMPLATES = {
    "hermes": _template("<tool_call>", "arguments", "\n<tool_call>\n{}\n</tool_call>"),
    "mistral": _template("", "arguments", "[TOOL_CALLS] [{}]"),
    "llama": _template('as ipython, with "parameters"', "parameters", "{}"),
    "another form": _template("<tool_call>", "arguments", "<tool_call><function=x>"),
    "no tools": _TURNS.replace("CALL", "").replace("m.tool_calls or ", ""),
}


def tool_tokenizer(family: str) -> Any:
    """Return the tiny tokenizer with a template of the family, and its marks as tokens as that has them."""
    tokenizer = copy.deepcopy(tiny_tokenizer(VOCAB - 8))
    tokenizer.chat_template = TEMPLATES[family]
    if family == "hermes":
        tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    if family == "mistral":
        tokenizer.add_tokens(["[TOOL_CALLS]"], special_tokens=True)
    return tokenizer
