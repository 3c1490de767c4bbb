"""How near a policy's output is to full prefill's, over the tokens that full prefill would answer with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chunkcache.engine.engine import PrefillOutput
from chunkcache.llm import CachedLLM

ANSWER_TOKENS = 16  # length of the greedy answer that fidelity is measured over


@dataclass(frozen=True)
class Fidelity:
    """Distance between two next-token distributions.

    Attributes:
        kl_first: KL(full || policy) of the first token, in nats.
        kl_mean: its mean over the tokens of full prefill's greedy answer, teacher forced, in nats.
        agreement: share of these tokens whose argmax is the same.
    """

    kl_first: float
    kl_mean: float
    agreement: float


@torch.no_grad()
def greedy_answer(llm: CachedLLM, start: PrefillOutput, max_tokens: int) -> tuple[list[int], Tensor]:
    """Decode greedily from a prefilled prompt, which is used up.

    Returns:
        the token ids of the answer, up to `max_tokens` or an end-of-sequence token, and the log-probabilities
        `[tokens, vocab]` that each was chosen from.
    """
    ends = llm.model.generation_config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends])
    logits = start.logits
    ids: list[int] = []
    rows: list[Tensor] = []
    while len(ids) < max_tokens:
        rows.append(logits.float().log_softmax(-1))
        ids.append(int(logits.argmax()))
        if ids[-1] in stop or len(ids) == max_tokens:
            break
        token = torch.tensor([[ids[-1]]], device=llm.model.device)
        logits = llm.model(input_ids=token, past_key_values=start.past_key_values, use_cache=True).logits[0, -1]
    return ids, torch.stack(rows)


@torch.no_grad()
def forced_answer(llm: CachedLLM, start: PrefillOutput, answer: list[int]) -> Tensor:
    """Return the log-probabilities `[tokens, vocab]` of a prefilled prompt, used up, along a given answer."""
    rows = start.logits[None].float()
    if len(answer) > 1:
        tokens = torch.tensor([answer[:-1]], device=llm.model.device)
        more = llm.model(input_ids=tokens, past_key_values=start.past_key_values, use_cache=True).logits[0]
        rows = torch.cat((rows, more.float()))
    return rows.log_softmax(-1)


def first_kl(full: Tensor, logits: Tensor) -> float:
    """Return KL(full || other) in nats, of log-probabilities `[vocab]` and another's logits `[vocab]`."""
    return measure_fidelity(full[None], logits.float().log_softmax(-1)[None].to(full.device)).kl_first


def measure_fidelity(full: Tensor, policy: Tensor) -> Fidelity:
    """Compare log-probabilities `[tokens, vocab]` of full prefill and of a policy along the same answer."""
    kl = torch.nn.functional.kl_div(policy, full, reduction="none", log_target=True).sum(-1)
    same = (full.argmax(-1) == policy.argmax(-1)).float()
    return Fidelity(float(kl[0]), float(kl.mean()), float(same.mean()))
