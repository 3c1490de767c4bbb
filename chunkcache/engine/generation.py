"""What surrounds transformers' `generate()`: the answer, the clock of the first token, and the keywords it takes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.utils.generic import TransformersKwargs

from chunkcache.blend import Policy
from chunkcache.engine.stats import RequestStats
from chunkcache.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_NEW_TOKENS = 64

# What no generation config may say of an answer: one sequence, decoded on from the KV that chunkcache made.
FIXED = {"use_cache": True, "cache_implementation": None, "prefill_chunk_size": None, "num_return_sequences": 1}

_LENGTHS = ("max_new_tokens", "max_length")
_UNASKED_LENGTH = 20  # the `max_length` of a generation config in which nobody chose one
_OURS = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "past_key_values", "cache_implementation")
_OWN_KEYWORDS = {"adapter", "reuse"}
_TAKEN_BY_GENERATE = {"tokenizer", "assistant_tokenizer", "trust_remote_code"}  # not among its parameters


@dataclass(frozen=True)
class Generation:
    """The answer to one question.

    Attributes:
        text: the answer, without special tokens.
        token_ids: its token ids.
        ttft_s: seconds from the call to the first token id.
        stats: what the request did.
        output: what `generate()` itself returned.
    """

    text: str
    token_ids: list[int]
    ttft_s: float
    stats: RequestStats
    output: Any


class FirstTokenClock(StoppingCriteria):
    """Never stops; notes when the first token id was known on the host.

    Args:
        then: called once it is.
    """

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self.first_token_at: float | None = None
        self._then = then

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Note the time once."""
        self.note(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def note(self, token_ids: Tensor) -> None:
        """Note the time once; reading the last of the token ids waits for the device."""
        if self.first_token_at is None:
            token_ids.flatten()[-1].item()
            self.first_token_at = time.perf_counter()
            if self._then is not None:
                self._then()


def check_options(options: dict[str, Any]) -> None:
    """Refuse keywords of `generate()` that make no sense here.

    Raises:
        InputError: the keyword is chunkcache's own to set, or asks for several sequences.
    """
    for name in _OURS:
        if name in options:
            raise InputError(
                f"{name}= is set by chunkcache; leave it out, or call model.generate(**llm.prepare_inputs(...)) "
                "yourself"
            )
    config = options.get("generation_config")
    given = {**(config.to_dict() if config is not None else {}), **options}
    if given.get("use_cache") is False:
        raise InputError("use_cache=False leaves nothing to reuse; leave it out")
    if given.get("cache_implementation") is not None:
        raise InputError("cache_implementation is chunkcache's own to set; leave it out of the generation config")
    if given.get("prefill_chunk_size") is not None:
        raise InputError("prefill_chunk_size= splits the prefill that chunkcache shortens; leave it out")
    if (given.get("num_return_sequences") or 1) > 1:
        raise InputError(
            f"num_return_sequences={given['num_return_sequences']}: chunkcache serves one sequence; "
            "call generate() once for each answer"
        )


def check_keywords(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Refuse keywords that neither `generate()`, nor a generation config, nor the model's forward knows.

    Raises:
        InputError: there is such a keyword.
    """
    if options.get("custom_generate") is not None:  # it may take any
        return
    kind: Any = type(model)
    known = _keywords(kind)
    if known.issuperset(options):
        return
    for config in (model.generation_config, options.get("generation_config")):
        known |= set(config.to_dict()) if config is not None else set()
    for name, value in options.items():
        if value is not None and name not in known:
            raise InputError(
                f"{name}= is no keyword of generate(): check its name, or leave it out; what is meant for the chat "
                "template goes into template_options={...}"
            )


@lru_cache(maxsize=16)
def _keywords(kind: Any) -> frozenset[str]:
    """Return the keywords that are known for a class of models."""
    known = {
        *_OWN_KEYWORDS,
        *_TAKEN_BY_GENERATE,
        *TransformersKwargs.__optional_keys__,
        *GenerationConfig().to_dict(),
    }
    for takes in (kind.generate, kind.prepare_inputs_for_generation, kind.forward):
        known |= set(inspect.signature(takes).parameters)
    return frozenset(known)


def take_policy(options: dict[str, Any], policy: str | Policy | None) -> str | Policy | None:
    """Return the policy of a call, and remove `reuse=` from its options, which stands for one.

    Raises:
        InputError: `reuse=` is not known, or a policy is named beside it.
    """
    reuse = options.pop("reuse", None)
    if reuse is None:
        return policy
    if reuse != "exact" or policy is not None:
        raise InputError(f"reuse={reuse!r} with policy={policy!r}: pass reuse='exact' alone, or a policy")
    return "exact"


def with_length(model: PreTrainedModel, options: dict[str, Any], max_new_tokens: int | None) -> dict[str, Any]:
    """Return `options` with one length of the answer, `max_new_tokens` or `max_length`; the other is None.

    It is what a keyword says, else what the given generation config says, else the model's, else 64 new tokens. Of
    two lengths in one place `max_new_tokens` counts, as in transformers.

    Raises:
        InputError: it is less than one token.
    """
    named = {name: options.get(name) for name in _LENGTHS}
    if max_new_tokens is not None:
        named["max_new_tokens"] = max_new_tokens
    places = [named, *(_lengths(config) for config in (options.get("generation_config"), model.generation_config))]
    for place in places:
        for name, length in place.items():
            if length is None:
                continue
            if length < 1:
                raise InputError(f"{name}={length} leaves no answer; pass 1 or more")
            return {**options, **dict.fromkeys(_LENGTHS), name: length}
    return {**options, **dict.fromkeys(_LENGTHS), "max_new_tokens": DEFAULT_NEW_TOKENS}


def _lengths(config: GenerationConfig | None) -> dict[str, int | None]:
    lengths = {name: getattr(config, name, None) for name in _LENGTHS}
    if lengths["max_length"] == _UNASKED_LENGTH:
        lengths["max_length"] = None
    return lengths


def new_tokens(options: dict[str, Any], tokens: int) -> int:
    """Return how many tokens the answer to a prompt of `tokens` may have, by the options of `with_length`.

    Raises:
        InputError: `max_length`, which counts the prompt, too, leaves none.
    """
    if options.get("max_new_tokens") is not None:
        return int(options["max_new_tokens"])
    room = int(options["max_length"]) - tokens
    if room < 1:
        raise InputError(
            f"max_length={options['max_length']} leaves no answer behind a prompt of {tokens} tokens; raise it, or "
            "pass max_new_tokens"
        )
    return room


def setting(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """Return what `generate()` would use for `name`: its keyword, the given generation config, or the model's."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return given if given is not None else getattr(model.generation_config, name, None)


def end_ids(model: PreTrainedModel, options: dict[str, Any]) -> list[int]:
    """Return the ids of the tokens that end an answer."""
    ids = setting(model, options, "eos_token_id")
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [int(ids)]


def corrected(config: GenerationConfig) -> dict[str, Any]:
    """Return the keywords by which `generate()` goes on from a prefilled cache, where `config` says otherwise."""
    said = {name: getattr(config, name, None) for name in FIXED}
    return {name: value for name, value in FIXED.items() if said[name] not in (None, value)}


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id that pads: the tokenizer's, which may be 0, or else its EOS token's."""
    pad: int | None = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pad


def needs_finished_cache(model: PreTrainedModel, options: dict[str, Any]) -> bool:
    """Return whether `generate()` prefills several copies of the prompt side by side."""
    return (setting(model, options, "num_beams") or 1) > 1


def is_assisted(model: PreTrainedModel, options: dict[str, Any]) -> bool:
    """Return whether candidates for the first tokens are verified in the same forward as the prompt."""
    return options.get("assistant_model") is not None or any(
        setting(model, options, name) is not None for name in ("prompt_lookup_num_tokens", "assistant_early_exit")
    )
