"""What the chat models of the plug-ins have in common: settings as keywords of `llm.chat`, and what was said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from chunkcache.errors import InputError
from chunkcache.integrations.stops import cut, listed

if TYPE_CHECKING:
    from chunkcache.engine.generation import Generation
    from chunkcache.llm import CachedLLM

NO_TOOLS = "tools are not served: chunkcache answers with text, and calls none; leave them out"
_TOOLS = ("tools", "tool_choice", "functions", "function_call")  # what the frameworks call them
SETTINGS = ("policy", "stop", "temperature", "top_p", "max_tokens")


def chat_options(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of `llm.chat`; any keyword that is not one of `SETTINGS` is one of `generate()`.

    Args:
        fields: the settings of the chat model. A temperature of 0 is greedy; None is what the model's generation
            config says.
        given: the keywords of a call, which go before them.

    Raises:
        InputError: a stop string is empty or not a string, or the call brings tools.
    """
    for name in _TOOLS:
        if given.get(name) is not None:
            raise InputError(f"{name}=: {NO_TOOLS}")
    chosen = {name: fields.get(name) if given.get(name) is None else given[name] for name in SETTINGS}
    options: dict[str, Any] = {"policy": chosen["policy"]}
    if stops := listed(chosen["stop"]):
        options["stop_strings"] = stops
    if chosen["max_tokens"] is not None:
        options["max_new_tokens"] = chosen["max_tokens"]
    sampling = {name: chosen[name] for name in ("temperature", "top_p") if chosen[name] is not None}
    if chosen["temperature"] == 0:
        options["do_sample"] = False
    elif sampling:
        options |= {"do_sample": True, **sampling}
    return {**options, **{name: value for name, value in given.items() if name not in (*SETTINGS, *_TOOLS)}}


def load_llm(name: str, own: Iterable[str], options: Mapping[str, Any]) -> tuple[CachedLLM, dict[str, Any]]:
    """Load a model by its name and wrap it; return it with the options that are the chat model's own fields.

    Args:
        name: alias, folder, GGUF file or Hugging Face id.
        own: names of the chat model's fields. A policy is the wrapper's.
        options: fields, and keywords of `CachedLLM.from_pretrained`.
    """
    from chunkcache.llm import CachedLLM

    fields = {key: value for key, value in options.items() if key in {*own} - {"policy"}}
    others = {key: value for key, value in options.items() if key not in fields}
    return CachedLLM.from_pretrained(name, **others), fields


def model_name(llm: CachedLLM) -> str:
    """Return what a wrapped model is called."""
    config = llm.model.config
    return str(config._name_or_path or config.model_type)


def strip_stop(llm: CachedLLM, generation: Generation, options: Mapping[str, Any]) -> tuple[str, bool]:
    """Return an answer without the stop string that ended it, and whether one did."""
    stops = options.get("stop_strings")
    if not stops:
        return generation.text, False
    # By the tokens: a stop string of white space is not in the text any more.
    whole = str(llm.tokenizer.decode(generation.token_ids, skip_special_tokens=True))
    text = cut(whole, stops)
    return (text.strip(), True) if len(text) < len(whole) else (generation.text, False)
