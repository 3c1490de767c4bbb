"""A chat over documents as a completion over token ids, and the completion's answer as the chat's.

vLLM tokenises a chat as one text, in which a document's ids depend on what stands beside it. So the prompt is built
here, and asked for as token ids, which `/v1/completions` takes and `/v1/chat/completions` does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from chunkcache.errors import PromptError
from chunkcache.integrations.vllm.spec import NAME, request_params
from chunkcache.prompt import Prompt, PromptBuilder, PromptChunk
from chunkcache.prompt.known_texts import FoundText
from chunkcache.prompt.messages import MessageBuilder
from chunkcache.prompt.prompt import common

_CHAT_ONLY = (  # fields of a chat that a completion has otherwise, or that are served by what is done here
    "messages", "documents", "chat_template_kwargs", "max_tokens", "max_completion_tokens", "logprobs",
    "top_logprobs", "add_generation_prompt", "tool_choice", "parallel_tool_calls", "include_reasoning",
)  # fmt: skip
_REFUSED = (  # fields that change the prompt, or the answer in a way that a completion does not know
    "tools", "chat_template", "continue_final_message", "add_special_tokens", "echo", "truncate_prompt_tokens",
    "reasoning_effort", "media_io_kwargs", "mm_processor_kwargs", "prompt_logprobs", "return_prompt_text",
)  # fmt: skip


class _NoTexts:
    def find_text(self, content: str) -> Sequence[FoundText]:
        return ()


class ChatPrompts:
    """Builds completions of chats; safe to use from several threads.

    Args:
        prompts: builds the prompts.
        max_tokens: the model's context.
        answer_tokens: how many tokens an answer has where a chat says nothing; None for all that are left.
    """

    def __init__(self, prompts: PromptBuilder, max_tokens: int, answer_tokens: int | None = None) -> None:
        self._messages = MessageBuilder(prompts, _NoTexts())
        self._max_tokens, self._answer_tokens = max_tokens, answer_tokens

    def completion(self, chat: Mapping[str, Any]) -> dict[str, Any]:
        """Return the body of the completion that a chat with documents stands for.

        Raises:
            InputError: a field is not served with documents, or the prompt cannot be built.
        """
        chat = {name: value for name, value in chat.items() if value is not None}
        for name in _REFUSED:
            if chat.get(name):
                raise PromptError(f"{name} is not served with documents; leave it out")
        if chat.get("add_generation_prompt") is False:
            raise PromptError("add_generation_prompt=false is not served with documents; leave it out")
        template_options = chat.get("chat_template_kwargs") or {}
        if not isinstance(template_options, Mapping) or "chat_template" in template_options:
            raise PromptError("chat_template_kwargs holds keywords of the server's own chat template")
        prompt = self._messages.build(messages_of(chat.get("messages"), chat["documents"]), template_options)
        body = {name: value for name, value in chat.items() if name not in _CHAT_ONLY}
        body["prompt"] = list(prompt.token_ids)
        body["max_tokens"] = self._length(chat, len(prompt.token_ids))
        if chat.get("logprobs"):
            body["logprobs"] = chat.get("top_logprobs", 0)
        body["kv_transfer_params"] = _transfer(prompt, chat.get("kv_transfer_params"))
        return body

    def _length(self, chat: Mapping[str, Any], prompt_tokens: int) -> int:
        """Return how many tokens the answer may have: a completion without a number has 16."""
        given = chat.get("max_completion_tokens", chat.get("max_tokens"))
        if given is not None:
            return given  # type: ignore[no-any-return]  # whatever it is, vLLM says so
        left = max(1, self._max_tokens - prompt_tokens)
        return left if self._answer_tokens is None else min(left, self._answer_tokens)


def messages_of(messages: Any, documents: Any) -> list[dict[str, Any]]:
    """Return OpenAI's messages as `MessageBuilder` takes them, the documents with the last that the user said.

    Raises:
        PromptError: there is no message of the user, a document has no text, or a message has more than text.
    """
    if not isinstance(messages, list) or not all(isinstance(each, Mapping) for each in messages):
        raise PromptError("messages is no list of messages; pass objects with role and content")
    if not isinstance(documents, list):
        raise PromptError('documents is no list; pass texts, or objects such as {"title": ..., "text": ...}')
    turns = [{"role": _role(each), "content": _texts(each, index)} for index, each in enumerate(messages)]
    asked = next((turn for turn in reversed(turns) if turn["role"] == "user"), None)
    if asked is None:
        raise PromptError("documents stand with what the user asks; pass a message of the user")
    passages = [PromptChunk(passage(each, index)) for index, each in enumerate(documents)]
    asked["content"] = [*passages, *asked["content"]]
    return turns


def passage(document: Any, index: int = 0) -> str:
    """Return the text of a document as it stands in the prompt.

    Args:
        document: a string, an object with `text` and perhaps `title` as in vLLM, or with `data` as in Cohere's API.
        index: its place, for the error.

    Raises:
        PromptError: there is no text in it.
    """
    fields = document
    if isinstance(document, Mapping) and "data" in document:
        fields = document["data"]
    if isinstance(fields, str):
        title, text = "", fields
    elif isinstance(fields, Mapping):
        title, text = fields.get("title") or "", fields.get("text") or fields.get("snippet") or ""
    else:
        title = text = ""
    if not isinstance(text, str) or not isinstance(title, str) or not text.strip():
        raise PromptError(f"document {index} has no text; pass a string, or an object with text and perhaps title")
    return f"{title}\n{text}" if title else text


def _role(message: Mapping[str, Any]) -> Any:
    return "system" if message.get("role") == "developer" else message.get("role")


def _texts(message: Mapping[str, Any], index: int) -> list[str]:
    content = message.get("content")
    parts = [content] if isinstance(content, str) else content
    if message.get("tool_calls"):
        raise PromptError(f"message {index} has tool calls, which are not served with documents")
    texts = []
    for part in parts if isinstance(parts, list) else [None]:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise PromptError(f"message {index} has a part that is no text; with documents only text is served")
        texts.append(text)
    return texts


def _transfer(prompt: Prompt, given: Any) -> dict[str, Any]:
    """Return `kv_transfer_params`: what other connectors are told, and where the chunks stand."""
    others = dict(given) if isinstance(given, Mapping) else {}
    wanted = others.get(NAME)
    if wanted is False:
        return {**others, NAME: False}
    wanted = wanted if isinstance(wanted, Mapping) else {}
    shared = common(prompt.context_ids, prompt.token_ids)  # chunks of a later turn stand behind other turns
    prompt = replace(prompt, context_ids=prompt.token_ids[:shared])
    policy, warm = wanted.get("policy"), wanted.get("warm")
    if policy is not None and not isinstance(policy, str):
        raise PromptError("kv_transfer_params.chunkcache.policy is no text; pass one such as 'query'")
    others.pop(NAME, None)
    return {**request_params(prompt, policy, warm=bool(warm))["kv_transfer_params"], **others}


def chat_answer(completion: Mapping[str, Any], likeliest: int = 0) -> dict[str, Any]:
    """Return the answer of `/v1/completions` as that of `/v1/chat/completions`.

    Args:
        completion: as vLLM answers.
        likeliest: how many of the likeliest tokens are told with each, where log probabilities are.
    """
    answer = _renamed(completion, "chat.completion")
    choices = []
    for choice in completion.get("choices", ()):
        kept = _choice(choice, likeliest)
        if kept.pop("prompt_token_ids", None) is not None:
            answer["prompt_token_ids"] = choice["prompt_token_ids"]
        choices.append({**kept, "message": {"role": "assistant", "content": choice["text"]}})
    return {**answer, "choices": choices}


class ChatStream:
    """The pieces of a completion's stream, as those of a chat's.

    Args:
        likeliest: as in `chat_answer`.
    """

    def __init__(self, likeliest: int = 0) -> None:
        self._likeliest = likeliest
        self._begun: set[int] = set()

    def pieces(self, completion: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what one piece becomes: the first of each choice says before it who speaks."""
        if "choices" not in completion:
            return [dict(completion)]  # an error
        piece = _renamed(completion, "chat.completion.chunk")
        pieces, choices = [], []
        for choice in completion["choices"]:
            kept, index = _choice(choice, self._likeliest), choice["index"]
            prompt_ids = kept.pop("prompt_token_ids", None)
            if index not in self._begun:
                self._begun.add(index)
                role = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                first = {name: value for name, value in piece.items() if name != "usage"}
                if prompt_ids is not None:
                    first["prompt_token_ids"] = prompt_ids
                pieces.append({**first, "choices": [role]})
            choices.append({**kept, "delta": {"content": choice["text"]}})
        return [*pieces, {**piece, "choices": choices}]


def _renamed(completion: Mapping[str, Any], kind: str) -> dict[str, Any]:
    answer = {name: value for name, value in completion.items() if name != "choices"}
    return {**answer, "id": str(completion.get("id", "")).replace("cmpl-", "chatcmpl-", 1), "object": kind}


def _choice(choice: Mapping[str, Any], likeliest: int) -> dict[str, Any]:
    """Return a choice without its text, its log probabilities as a chat has them."""
    kept = {name: value for name, value in choice.items() if name not in ("text", "logprobs", "prompt_logprobs")}
    found = choice.get("logprobs")
    kept["logprobs"] = None if found is None else {"content": _likely(found, likeliest)}
    return kept


def _likely(logprobs: Mapping[str, Any], likeliest: int) -> list[dict[str, Any]]:
    """Return the tokens with their log probabilities; a completion tells of the chosen one beside the likeliest."""
    rows = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    told = []
    for token, value, others in rows:
        best = sorted((others or {}).items(), key=lambda each: -each[1])[:likeliest]
        told.append({**_told(token, value), "top_logprobs": [_told(*each) for each in best]})
    return told


def _told(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
