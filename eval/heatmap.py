"""Which tokens of a prompt each policy recomputed: a row per token, for the heat map of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import chunkcache
from chunkcache.eval.data import Case
from chunkcache.eval.machine import ran_on
from chunkcache.eval.results import Results
from chunkcache.prompt import Prompt

BENCH = "heatmap"


def heatmap(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    case: Case,
    policies: Sequence[str],
    about: Mapping[str, Any] | None = None,
    path: Path | None = None,
) -> Results:
    """Prefill one prompt under each policy, chunks precomputed, and note in how many layers each token was computed.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        case: the prompt.
        policies: policy strings.
        about: what tells this prompt from others; goes into the settings.
        path: file that the rows go to; None for none.

    Returns:
        rows of policy, index, text and role (prefix, chunk 1, ..., question) of the token, and share of the layers.
    """
    settings = {**(about or {}), "policies": list(policies)}
    with Results.open(path, BENCH, settings, ran_on(model)) as results:
        for policy in policies:
            llm = chunkcache.wrap(model, tokenizer, store="memory://")  # each finds what it computed itself
            prompt = llm.prompts.build(case.question, case.chunks)
            roles = _roles(prompt)
            if results.done(policy=policy, index=len(roles) - 1):
                continue
            if llm.resolve_policy(policy).reuses and not llm.resolve_policy(policy).stores_in_context:
                llm.precompute(case.chunks, policy=policy)
            cache: Any = llm.prefill(case.question, case.chunks, policy=policy).past_key_values
            counts = torch.bincount(torch.cat([rows.cpu() for rows in cache.computed_rows]), minlength=len(roles))
            shares = (counts / len(cache.layers)).tolist()
            for index, (token, role, share) in enumerate(zip(prompt.token_ids, roles, shares, strict=True)):
                text = str(llm.tokenizer.decode([token]))
                results.add({"policy": policy, "index": index, "text": text, "role": role, "share": round(share, 4)})
    return results


def _roles(prompt: Prompt) -> list[str]:
    """Return for each token what it is part of."""
    roles = ["prefix"] * len(prompt.prefix)
    for number, span in enumerate(prompt.spans, start=1):
        roles += ["prefix"] * (span.start - len(roles)) + [f"chunk {number}"] * len(span)
    return roles + ["question"] * (len(prompt.token_ids) - len(roles))
