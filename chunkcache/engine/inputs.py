"""What a plain `model.generate()` is given, to go on from a prompt that was prefilled here."""

from __future__ import annotations

from typing import Any

from chunkcache.blend.static import static_copy
from chunkcache.engine.engine import Engine, PreparedRequest, model_inputs
from chunkcache.engine.generation import corrected, new_tokens
from chunkcache.errors import InputError

CACHES = ("dynamic", "static")


def inputs_for_generate(engine: Engine, request: PreparedRequest, cache: str) -> dict[str, Any]:
    """Prefill all of a prompt but its last token; return the keywords for `generate()`.

    Args:
        engine: what prefills.
        request: the prompt.
        cache: `dynamic`, or `static` for a `StaticCache` with room for the answer, whose length then is among the
            keywords.

    Raises:
        InputError: there is no such cache, or `max_length` leaves no answer.
    """
    if cache not in CACHES:
        raise InputError(f"cache={cache!r} is not known; pass one of {', '.join(CACHES)}")
    room = new_tokens(request.options, len(request.prompt.token_ids)) if cache == "static" else 0
    inputs = model_inputs(engine.prefill(request, drop_last=True))
    if cache == "static":
        length = inputs["input_ids"].shape[1] + room
        copied = static_copy(engine.decoder.config, inputs["past_key_values"], length)
        inputs = {**inputs, "past_key_values": copied, "max_new_tokens": room}
    return {**inputs, **corrected(engine.model.generation_config)}
