"""What a chat template makes of messages, and where in it each message's text stands.

A template may compute something (a date), look at options (`enable_thinking`), drop thoughts, or move the system
prompt: so it is rendered at each request, with marks in the place of the texts and once more with the texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.exceptions import TemplateError

from chunkcache.errors import PromptError
from chunkcache.prompt.tokens import Tokens

Options = Mapping[str, Any]
Rendered = list[tuple[str, int | None]]  # the template's own text, and the message behind it; none behind the last

_MARK = "[[message {} stands here]]"
_MARKS = re.compile(r"\[\[message (\d+) stands here]]")
_OURS = ("messages", "add_generation_prompt", "tokenize", "return_tensors", "return_dict", "continue_final_message")


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
        self.options = dict(options or {})
        self._check()

    def __bool__(self) -> bool:
        return bool(self._given.chat_template)

    def with_options(self, options: Options) -> ChatTemplate:
        """Return the template with more options, which come before those that it has."""
        return ChatTemplate(self._given, self._tokens, {**self.options, **options})

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return what the template makes of messages.

        Raises:
            PromptError: it refuses them.
        """
        tokenizer: Any = self._tokens.tokenizer
        try:
            rendered = tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=True,
                **{"chat_template": self._source, **{k: v for k, v in self.options.items() if k != "chat_template"}},
            )
        except TemplateError as error:
            raise PromptError(
                f"the tokenizer's chat template refuses these messages ({error}); "
                "leave out system=, or put its text into instruction="
            ) from error
        return str(rendered)

    def place(self, messages: Sequence[tuple[str, str]]) -> tuple[Rendered, list[str]]:
        """Return the template's own text round the texts of messages, and these texts as the template writes them.

        Args:
            messages: role and text of each.

        Raises:
            PromptError: it refuses them, or does not keep each in one piece.
        """
        marks = [_MARK.format(index) for index in range(len(messages))]
        roles = [role for role, _ in messages]
        marked = self._with_texts(roles, marks)
        parts = _MARKS.split(marked)
        places = [int(index) for index in parts[1::2]]
        if sorted(places) != list(range(len(messages))):
            raise PromptError(
                f"the tokenizer's chat template does not keep these messages apart and whole ({', '.join(roles)}); "
                "leave out those it does not know, or set tokenizer.chat_template to one that does, or to None for "
                "plain text"
            )
        texts = [text for _, text in messages]
        whole = self._with_texts(roles, texts)
        rendered: Rendered = list(zip(parts[::2], [*places, None], strict=True))
        for written in (texts, [text.strip() for text in texts]):
            if _filled(rendered, written) == whole:
                return rendered, written
        written = [self._written(roles, marks, marked, index, text) for index, text in enumerate(texts)]
        if _filled(rendered, written) != whole:
            raise PromptError(
                "the tokenizer's chat template writes something else where other messages stand, so that theirs "
                "cannot be told from its own text; set tokenizer.chat_template to one that does not"
            )
        return rendered, written

    def _with_texts(self, roles: Sequence[str], texts: Sequence[str]) -> str:
        return self.render([{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)])

    def _written(self, roles: Sequence[str], marks: list[str], marked: str, index: int, text: str) -> str:
        """Return a text as the template writes it: trimmed, or without thoughts, or otherwise rewritten."""
        before, _, after = marked.partition(marks[index])
        alone = self._with_texts(roles, [*marks[:index], text, *marks[index + 1 :]])
        if alone.startswith(before) and alone.endswith(after) and len(alone) >= len(before) + len(after):
            return alone[len(before) : len(alone) - len(after)]
        return text

    @property
    def _source(self) -> str:
        template, name = self._given.chat_template, self.options.get("chat_template")
        if not isinstance(template, dict):
            return str(name or template)
        if name is None:
            name = "default"
        return str(template.get(name, name))

    def _check(self) -> None:
        template = self._given.chat_template
        if isinstance(template, dict) and "chat_template" not in self.options and "default" not in template:
            raise PromptError(
                f"the tokenizer has the chat templates {', '.join(map(repr, template))}, and none called 'default': "
                "choose one by template_options={'chat_template': NAME}, or set tokenizer.chat_template; wrap again"
            )
        if "tools" in self.options:
            raise PromptError("template_options: tools are not served; write them into the system prompt")
        ours = [name for name in self.options if name in _OURS]
        if ours:
            raise PromptError(f"template_options: {ours[0]!r} is chunkcache's own to set; leave it out")
        wanted = self.options.keys() - {"chat_template"}
        if not wanted:
            return
        read = _variables(self._source) if self else frozenset()
        unknown = sorted(wanted - read) if read is not None else []
        if unknown:
            raise PromptError(
                f"template_options: the chat template does not read {unknown[0]!r}; it reads "
                f"{', '.join(sorted((read or frozenset()) - set(_OURS))) or 'nothing'}"
            )


def _filled(rendered: Rendered, texts: Sequence[str]) -> str:
    return "".join(own + ("" if index is None else texts[index]) for own, index in rendered)


@lru_cache(maxsize=64)
def _variables(source: str) -> frozenset[str] | None:
    """Return the names that a template reads, or None where that cannot be said."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(source)))
    except TemplateError:  # it has tags of transformers' own
        return None
