"""Finds out whether chunks of a model are better computed behind the packaged lead-in, or behind the prefix alone.

A lead-in helps most models and harms some. What tells is how far the next token's distribution moves from full
prefill's, along the answers to questions over a few packaged documents, with nothing recomputed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from chunkcache.blend import Decoder
from chunkcache.blend.query import LEAD
from chunkcache.blend.reuse import Reuse
from chunkcache.engine.packaged import Asked, mean_kl


@dataclass(frozen=True)
class LeadCheck:
    """What was found.

    Attributes:
        lead: tokens of lead-in that the model's chunks are best computed behind: 0 where it hurts.
        kl_alone: mean KL(full || reuse) along the answers, in nats, of chunks computed behind the prefix alone.
        kl_lead: of chunks computed behind the lead-in.
        answers: questions that were answered.
        tokens: of all answers.
        seconds: how long it took.
    """

    lead: int
    kl_alone: float
    kl_lead: float
    answers: int
    tokens: int
    seconds: float


def check_lead_in(decoder: Decoder, asked: Sequence[Asked]) -> LeadCheck:
    """Measure with and without the lead-in.

    Args:
        decoder: a decoder over the model.
        asked: as `packaged` returns them; one at least.
    """
    started = time.perf_counter()
    alone = mean_kl([each.moved(decoder, Reuse(), lead=False) for each in asked])
    behind = mean_kl([each.moved(decoder, Reuse()) for each in asked])
    tokens = sum(len(each.answer) for each in asked)
    seconds = time.perf_counter() - started
    return LeadCheck(LEAD if behind <= alone else 0, alone, behind, len(asked), tokens, seconds)
