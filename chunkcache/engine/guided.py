"""Answers that follow a JSON schema or a grammar: at each step llguidance says which tokens may come next."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from chunkcache.errors import InputError, missing_extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Guides:
    """Makes guides for one model.

    Args:
        tokenizer: the model's.
        vocab: number of its logits.
        ends: the tokens that end an answer.

    Raises:
        InputError: llguidance is not installed, or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab: int, ends: Sequence[int]) -> None:
        try:
            import llguidance.hf
        except ImportError as error:
            raise missing_extra("server", "an answer by a schema", error) from error
        try:
            fast: Any = tokenizer
            self._tokenizer = llguidance.hf.from_tokenizer(fast, n_vocab=vocab, eos_token=list(ends))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"a schema cannot be followed with this tokenizer ({type(tokenizer).__name__}: {error}); leave "
                "response_format out"
            ) from error

    def json(self, schema: Mapping[str, Any]) -> Guide:
        """Return the guide of one answer that is JSON by a schema.

        Raises:
            InputError: it is no schema, or has what cannot be followed.
        """
        from llguidance import LLMatcher

        compact: Any = {"whitespace_flexible": False}  # else a model that likes white space writes nothing but that
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=compact)
        wrong = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if wrong:
            raise InputError(f"the JSON schema cannot be followed ({wrong.splitlines()[0]}); simplify it")
        return Guide(LLMatcher(self._tokenizer, grammar))

    def lark(self, text: str) -> Guide:
        """Return the guide of one answer by a grammar in llguidance's Lark.

        Raises:
            InputError: a schema in it has what cannot be followed.
        """
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_lark(text)
        wrong = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if wrong:
            raise InputError(f"the parameters of a tool cannot be followed ({wrong.splitlines()[0]}); simplify them")
        return Guide(LLMatcher(self._tokenizer, grammar))


class Guide:
    """Which tokens may come next in one answer.

    Args:
        matcher: an `LLMatcher`.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def masked(self, logits: Tensor) -> Tensor:
        """Return `logits` `[1, vocab]` with minus infinity for tokens that may not come."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        allowed = torch.zeros(logits.shape[-1], dtype=torch.bool)
        count = min(len(bits), len(allowed))
        allowed[:count] = torch.from_numpy(bits[:count].astype(bool))
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def push(self, token_id: int) -> None:
        """Take note of the token that came."""
        self._matcher.consume_token(token_id)
