"""Tools: which models call them in a form that is known, what they are offered, and what holds them to a call.

A model's chat template says how it calls functions. Three forms are known: that of Hermes and Qwen (`<tool_call>`
round a JSON object), of Llama 3.1 and later (the object alone), of Mistral (`[TOOL_CALLS]` before a list of them).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chunkcache.prompt.template import reads
from chunkcache.serve.errors import HTTPError
from chunkcache.serve.tool_parser import CallForm, CallParser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from chunkcache.serve.protocol import ChatRequest
    from chunkcache.serve.tool_fields import Tool

MOST_CALLS = 16  # of one answer that has to call
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Family:
    """Models that call functions in one form.

    Attributes:
        name: as errors and docs call it.
        form: how a call is written.
        marks: what its chat templates have.
        others: what those of models with another form have.
        before: what stands between the opening and the first call, where the answer is held to calls.
        between: what stands between two calls there; None where there is only one.
        after: what stands behind the last.
        id_length: characters of a call's id, where the template counts them.
    """

    name: str
    form: CallForm
    marks: tuple[str, ...]
    others: tuple[str, ...] = ()
    before: str = ""
    between: str | None = None
    after: str = ""
    id_length: int | None = None

    def wrote(self, template: str) -> bool:
        """Return whether a chat template is one of this family."""
        return all(mark in template for mark in self.marks) and not any(mark in template for mark in self.others)

    def grammar(self, tools: Sequence[Tool], several: bool, mark: Callable[[str], str]) -> str:
        """Return the grammar, in llguidance's Lark, of an answer that is one call of these tools, or several.

        Args:
            tools: what may be called.
            several: whether there may be more than one call.
            mark: says how the opening or closing is written in a grammar.
        """
        form = self.form
        opening, closing = ([mark(text)] if text else [] for text in (form.opening, form.closing))
        literals = [[json.dumps(text)] if text else [] for text in (self.before, self.after)]
        each = " | ".join(f"call_{index}" for index in range(len(tools)))
        rules = [f"call: {each}"]
        for index, tool in enumerate(tools):
            head = f'{{"name": {json.dumps(tool.function.name)}, "{form.arguments}": '
            rules.append(f"call_{index}: {json.dumps(head)} arguments_{index} {json.dumps('}')}")
            rules.append(f"arguments_{index}: %json {json.dumps({**tool.arguments(), 'x-guidance': _COMPACT})}")
        if self.between is None:
            start = [*opening, "call", *closing]
        elif form.listed:
            more = [f"({json.dumps(self.between)} call){{0,{MOST_CALLS - 1}}}"] if several else []
            start = [*opening, *literals[0], "call", *more, *closing]
        else:
            rules.append(" ".join(["whole:", *opening, *literals[0], "call", *literals[1], *closing]))
            more = [f"({json.dumps(self.between)} whole){{0,{MOST_CALLS - 1}}}"] if several else []
            start = ["whole", *more]
        return "\n".join([" ".join(["start:", *start]), *rules])


FAMILIES = (
    Family(
        "Hermes and Qwen (<tool_call>)",
        CallForm("<tool_call>", "</tool_call>"),
        marks=("<tool_call>",),
        others=("<function=", "<arg_key>"),
        before="\n",
        between="\n",
        after="\n",
    ),
    Family(
        "Mistral ([TOOL_CALLS])",
        CallForm("[TOOL_CALLS]", "]", listed=True),
        marks=("[TOOL_CALLS]",),
        others=("[ARGS]",),
        before=" [",
        between=", ",
        id_length=9,
    ),
    Family("Llama 3.1 and later", CallForm("", "", "parameters"), marks=("ipython", '"parameters"')),
)


@dataclass(frozen=True)
class Calling:
    """What one request may call.

    Attributes:
        family: how the model calls.
        tools: what the template gets.
        names: of the functions.
        grammar: what the answer is held to; None for whatever the model likes.
        shown: ids of special tokens that open a call, which are part of the text that is parsed.
        most: calls of one answer that are told; None for all.
    """

    family: Family
    tools: tuple[dict[str, Any], ...]
    names: frozenset[str]
    grammar: str | None
    shown: frozenset[int]
    most: int | None

    def parser(self) -> CallParser:
        """Return what reads one answer."""
        return CallParser(self.family.form, self.names, self.most, self.family.id_length)


def calling(asked: ChatRequest, template: str, tokenizer: PreTrainedTokenizerBase) -> Calling | None:
    """Return what a request may call; None where it may call nothing.

    Args:
        asked: the request.
        template: the chat template that it is written by.
        tokenizer: the model's.

    Raises:
        HTTPError: the model's template knows no tools, or calls them in a form that is not known here, or the request
            contradicts itself.
    """
    tools, choice = asked.tools or [], asked.tool_choice
    if not tools and choice not in (None, "none", "auto"):
        raise HTTPError(400, "tool_choice asks for a call, and there are no tools; pass some", param="tool_choice")
    if any(message.tool_calls for message in asked.messages) and "tool_calls" not in template:
        raise HTTPError(
            400,
            "the model's chat template does not write tool_calls; tell as text what was called",
            "unsupported_parameter",
            "messages",
        )
    if not tools or choice == "none":
        return None
    family = _family(template)
    named = None if choice is None or isinstance(choice, str) else choice.function.name
    callable_ = [tool for tool in tools if named in (None, tool.function.name)]
    if not callable_:
        raise HTTPError(400, f"tool_choice names {named!r}, which is none of the tools", param="tool_choice")
    if asked.response_format is not None and asked.response_format.to_follow() is not None:
        raise HTTPError(
            400,
            "an answer by response_format calls no tools; leave one of them out, or pass tool_choice 'none'",
            param="response_format",
        )
    several = asked.parallel_tool_calls is not False and named is None
    held = named is not None or choice == "required"
    return Calling(
        family,
        tuple(tool.told() for tool in tools),
        frozenset(tool.function.name for tool in callable_),
        family.grammar(callable_, several, lambda text: _mark(tokenizer, text)) if held else None,
        _special(tokenizer, (family.form.opening, family.form.closing)),
        None if several else 1,
    )


def _family(template: str) -> Family:
    if not reads(template, "tools"):
        raise HTTPError(
            400,
            "the model's chat template reads no tools; leave them out, or serve a model whose template does",
            "unsupported_parameter",
            "tools",
        )
    found = next((family for family in FAMILIES if family.wrote(template)), None)
    if found is None:
        raise HTTPError(
            400,
            "the model's chat template calls tools in a form that is not known here; known are those of "
            f"{', '.join(family.name for family in FAMILIES)}: leave tools out, or pass tool_choice 'none'",
            "unsupported_parameter",
            "tools",
        )
    return found


def _mark(tokenizer: Any, text: str) -> str:
    """Return how a grammar writes a text that may be one token."""
    token_id = _added(tokenizer).get(text)
    return json.dumps(text) if token_id is None else f"<[{token_id}]>"


def _special(tokenizer: Any, texts: Sequence[str]) -> frozenset[int]:
    added, special = _added(tokenizer), tokenizer.all_special_tokens
    decoder = tokenizer.added_tokens_decoder
    return frozenset(
        added[text] for text in texts if text in added and (text in special or decoder[added[text]].special)
    )


def _added(tokenizer: Any) -> Mapping[str, int]:
    found: Mapping[str, int] = tokenizer.get_added_vocab()
    return found
