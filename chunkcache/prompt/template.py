"""What a chat template makes of messages, and where in it each message's text stands.

A template may compute something (a date), look at options (`enable_thinking`), drop thoughts, or move the system
prompt: so it is rendered at each request, with marks in the place of the texts and once more with the texts. Where it
decides by what a text says (`/no_think`), marks stand round the texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser

from chunkcache.errors import PromptError
from chunkcache.tokens import Tokens

Options = Mapping[str, Any]
Head = Mapping[str, Any]  # a message without its text
Rendered = list[tuple[str, int | None]]  # the template's own text, and the message behind it; none behind the last

_MARK = "[[message {} stands here]]"
_MARKS = re.compile(r"\[\[message (\d+) stands here]]")
_END = "[[text {} ends]]"
_ROUND = "[[text {0} begins]]{1}[[text {0} ends]]"
_BORDERS = re.compile(r"\[\[text (\d+) (begins|ends)]]")
_OURS = ("messages", "add_generation_prompt", "tokenize", "return_tensors", "return_dict", "continue_final_message")
_APART = ("chat_template", "tools")
_GIVEN = {"tools", "raise_exception", "strftime_now"}  # names in a template that no option is meant for


class MessagesRefusedError(PromptError):
    """The template takes no such messages, or leaves one out; it may take them in another form."""


class ChatTemplate:
    """The chat template of a tokenizer, as it is when it is rendered.

    Args:
        given: the user's tokenizer, whose template may be replaced at any time.
        tokens: holds the copy that renders.
        options: keywords for the template, such as `enable_thinking`.

    Raises:
        PromptError: an option is not served, or no template can be chosen.
    """

    def __init__(self, given: Any, tokens: Tokens, options: Options | None = None) -> None:
        self._given, self._tokens = given, tokens
        self.options = merged({}, options)
        self._check()

    def __bool__(self) -> bool:
        return bool(self.source)

    def with_options(self, options: Options) -> ChatTemplate:
        """Return the template with more options, which come before those that it has."""
        return ChatTemplate(self._given, self._tokens, merged(self.options, options))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return what the template makes of messages; `Tokens.hide` went over the texts in its options.

        Raises:
            PromptError: it refuses them, or an option is none of the template's, which may be another by now.
        """
        tokenizer: Any = self._tokens.tokenizer
        self._check()
        options = {name: self._hidden(value) for name, value in self.options.items() if name not in _APART}
        if self.options.get("tools"):
            options["tools"] = self.hidden(self.options["tools"])
        try:
            rendered = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, chat_template=self.source, **options
            )
        except TemplateError as error:
            raise MessagesRefusedError(
                f"the tokenizer's chat template refuses these messages ({error}); "
                "leave out system=, or put its text into instruction="
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # may quote a text
            raise MessagesRefusedError(
                f"the tokenizer's chat template fails on these messages or options ({type(error).__name__}); pass "
                "others, or set tokenizer.chat_template to one that takes them"
            ) from error
        return str(rendered)

    def hidden(self, value: Any) -> Any:
        """Return what a client sent, lists and mappings and their keys, so that no text is read as special tokens."""
        if isinstance(value, str):
            return self._tokens.hide(value)
        if isinstance(value, Mapping):
            return {self.hidden(name): self.hidden(each) for name, each in value.items()}
        return [self.hidden(each) for each in value] if isinstance(value, list | tuple) else value

    def _hidden(self, value: Any) -> Any:
        """Return an option in which no text is read as special tokens, but one that is nothing else."""
        return value if isinstance(value, str) and value in self._tokens.names else self.hidden(value)

    def place(
        self, messages: Sequence[tuple[str, str]], heads: Sequence[Head] | None = None
    ) -> tuple[Rendered, list[str]]:
        """Return the template's own text round the texts of messages, and these texts as the template writes them.

        Args:
            messages: role and text of each.
            heads: all messages without their texts, if some have more fields than a role; one with a `content` is
                none of `messages`, and is part of the template's own text.

        Raises:
            PromptError: it refuses them, or does not keep each in one piece.
        """
        marks = [_MARK.format(index) for index in range(len(messages))]
        roles = [{"role": role} for role, _ in messages] if heads is None else [self.hidden(head) for head in heads]
        marked = self._with_texts(roles, marks)
        parts = _MARKS.split(marked)
        places = [int(index) for index in parts[1::2]]
        if sorted(places) != list(range(len(messages))):
            raise MessagesRefusedError(
                "the tokenizer's chat template does not keep these messages apart and whole "
                f"({', '.join(role for role, _ in messages)}); "
                "leave out those it does not know, or set tokenizer.chat_template to one that does, or to None for "
                "plain text"
            )
        texts = [text for _, text in messages]
        whole = self._with_texts(roles, texts)
        rendered: Rendered = list(zip(parts[::2], [*places, None], strict=True))
        for rewritten in (_as_given, self._behind_each, self._one_by_one):
            written = _fitted(rendered, rewritten(roles, rendered, texts), whole)
            if written is not None:
                return rendered, written
        return self._place_whole(roles, self._one_by_one(roles, rendered, texts), whole)

    def _place_whole(self, roles: Sequence[Head], texts: Sequence[str], whole: str) -> tuple[Rendered, list[str]]:
        """Return what `place` does, where what stands round a text depends on what it says.

        Args:
            roles: of the messages, with their other fields.
            texts: as the template writes them, as far as that is known.
            whole: what the template makes of the messages.
        """
        hide, shown = self._tokens.hide, self._tokens.shown
        parts = _BORDERS.split(self._with_texts(roles, [_ROUND.format(n, hide(t)) for n, t in enumerate(texts)]))
        order = [int(index) for index in parts[1::6]]
        borders = list(zip(parts[1::3], parts[2::3], strict=True))
        if borders == [(str(index), border) for index in order for border in ("begins", "ends")]:
            own, between = parts[::6], dict(zip(order, map(shown, parts[3::6]), strict=True))
            if sorted(between) == list(range(len(texts))):
                visible: Rendered = list(zip(map(shown, own), [*order, None], strict=True))
                written = _fitted(visible, [between[index] for index in range(len(texts))], shown(whole))
                if written is not None:
                    return list(zip(own, [*order, None], strict=True)), written
        raise PromptError(
            "the tokenizer's chat template writes something else where other messages stand, so that theirs "
            "cannot be told from its own text; set tokenizer.chat_template to one that does not"
        )

    def _with_texts(self, roles: Sequence[Head], texts: Sequence[str]) -> str:
        rest = iter(texts)
        return self.render([head if "content" in head else {**head, "content": next(rest)} for head in roles])

    def _behind_each(self, roles: Sequence[Head], rendered: Rendered, texts: Sequence[str]) -> list[str]:
        """Return texts as the template writes them, by rendering all with a mark behind each."""
        ends = [_END.format(index) for index in range(len(texts))]
        whole = self._with_texts(roles, [text + end for text, end in zip(texts, ends, strict=True)])
        written = list(texts)
        start = 0
        for own, index in rendered[:-1]:
            start += len(own)
            stop = whole.find(ends[index or 0], start)
            if index is None or stop < 0:
                break
            written[index] = whole[start:stop]
            start = stop + len(ends[index])
        return written

    def _one_by_one(self, roles: Sequence[Head], rendered: Rendered, texts: Sequence[str]) -> list[str]:
        """Return texts as the template writes them, by rendering each with marks in the place of the others."""
        marks = [_MARK.format(index) for index in range(len(texts))]
        marked = _filled(rendered, marks)
        written = list(texts)
        for index, text in enumerate(texts):
            before, _, after = marked.partition(marks[index])
            alone = self._with_texts(roles, [*marks[:index], text, *marks[index + 1 :]])
            if alone.startswith(before) and alone.endswith(after) and len(alone) >= len(before) + len(after):
                written[index] = alone[len(before) : len(alone) - len(after)]
        return written

    @property
    def source(self) -> str:
        """The template that is used now; empty for none."""
        return self.source_for(bool(self.options.get("tools")))

    def source_for(self, tools: bool) -> str:
        """Return the template that is used where there are tools, or where there are none.

        Raises:
            PromptError: none can be chosen.
        """
        template, name = self._given.chat_template, self.options.get("chat_template")
        named = template if isinstance(template, dict) else {}
        if name is None and tools and "tool_use" in named:
            name = "tool_use"  # as transformers chooses
        if name is None and not named:
            return str(template or "")
        if name is None and "default" not in named:
            raise PromptError(
                f"the tokenizer has the chat templates {', '.join(map(repr, named))}, and none called 'default': "
                "choose one by template_options={'chat_template': NAME}, or set tokenizer.chat_template"
            )
        chosen = str(name or "default")
        if chosen not in named and "{" not in chosen:
            raise PromptError(
                f"template_options: the tokenizer has no chat template called {chosen!r}; pass a template, or one of "
                f"its names: {', '.join(map(repr, named)) or 'it has none'}"
            )
        return str(named.get(chosen, chosen))

    def _check(self) -> None:
        source = self.source
        ours = [name for name in self.options if name in _OURS]
        if ours:
            raise PromptError(f"template_options: {ours[0]!r} is chunkcache's own to set; leave it out")
        wanted = self.options.keys() - {"chat_template"}
        read = _variables(source) if wanted else None
        unknown = sorted(wanted - read) if read is not None else []
        if unknown:
            tokens = self._tokens.tokenizer.special_tokens_map
            raise PromptError(
                f"template_options: the chat template does not read {unknown[0]!r}; it reads "
                f"{', '.join(sorted((read or frozenset()) - {*_OURS, *_GIVEN, *tokens})) or 'nothing'}"
            )


def merged(options: Options, others: Options | None) -> dict[str, Any]:
    """Return options with others, which come before them.

    Raises:
        PromptError: the others are no mapping.
    """
    if others is not None and not isinstance(others, Mapping):
        raise PromptError(f"template_options is a {type(others).__name__}; pass a mapping of keywords to values")
    return {**options, **(others or {})}


class _Generation(Extension):
    """The tag of transformers' own that stands round answers."""

    tags = {"generation"}  # noqa: RUF012 - as in jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what stands inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _as_given(roles: Sequence[Head], rendered: Rendered, texts: Sequence[str]) -> list[str]:
    return list(texts)


def _filled(rendered: Rendered, texts: Sequence[str]) -> str:
    return "".join(own + ("" if index is None else texts[index]) for own, index in rendered)


def _fitted(rendered: Rendered, texts: Sequence[str], whole: str) -> list[str] | None:
    """Return texts, without space round them where the template trims it, if with them it is `whole`; else None."""
    written = list(texts)
    end = len(rendered[0][0])
    for (_, index), (behind, _) in pairwise(rendered):
        text = texts[index or 0]
        forms = (text, text.rstrip(), text.lstrip(), text.strip())
        fitting = next((form for form in forms if whole.startswith(form + behind, end)), None)
        if index is None or fitting is None:
            return None
        written[index] = fitting
        end += len(fitting + behind)
    return written if _filled(rendered, written) == whole else None


def reads(source: str, name: str) -> bool:
    """Return whether a template reads an option, as far as that can be said."""
    read = _variables(source)
    return read is None or name in read


@lru_cache(maxsize=64)
def _variables(source: str) -> frozenset[str] | None:
    """Return the names that a template reads, or None where that cannot be said."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation], autoescape=False)
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(source)))
    except TemplateError:
        return None
