"""Finds out how `query` best looks at a question with a model: in which layers, how much it selects, from when on.

On packaged documents, with the lead-in that suits the model: the layers whose attention selects best; the least
share that is as near to full prefill as CacheBlend with 15 %; from the time of a look, how many tokens it wants; and
whether to go by the question's words where there are fewer.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from chunkcache.blend import Decoder
from chunkcache.blend.cacheblend import CacheBlend
from chunkcache.blend.query import Look, Query
from chunkcache.blend.reuse import Reuse
from chunkcache.engine.packaged import Asked, Moved, mean_kl

BANDS = ((1 / 6, 1 / 3), (1 / 3, 1 / 2), (1 / 2, 2 / 3))  # of the depth
USUAL = BANDS.index((Look.first, Look.last))
BAND_RATIO = 0.05  # that bands are compared with: more than is selected later, so that differences show
SHARES = (0.0125, 0.03, 0.06)
TARGET = 0.15  # CacheBlend's own ratio (arXiv 2405.16444)
SURE = 2.0  # standard errors by which another band has to be better than the usual one
COST = 0.005  # of full prefill's time, that a look may take: as little as makes no difference
STEP, LEAST, MOST = 256, 256, 16384  # tokens: what `least` is a multiple of, and its bounds


@dataclass(frozen=True)
class LookCheck:
    """What was found; KL are KL(full || policy) per token of the answers, in nats.

    Attributes:
        look: for `Query`.
        bands: KL of each of `BANDS`, with 5 % recomputed.
        shares: KL by the share that is recomputed, chosen in the best band; of 0 for none.
        words: KL with what is next to the question's words recomputed.
        target: KL of CacheBlend with 15 %, of chunks computed behind the prefix alone.
        look_s: seconds of a look at the question, the median.
        token_s: seconds of full prefill per token.
        seconds: how long it took.
    """

    look: Look
    bands: list[float]
    shares: dict[str, float]
    words: float
    target: float
    look_s: float
    token_s: float
    seconds: float


def check_look(
    decoder: Decoder, asked: Sequence[Asked], lead: bool, on_step: Callable[[int, int], None] | None = None
) -> LookCheck:
    """Measure what suits the model.

    Args:
        decoder: a decoder over the model.
        asked: as `packaged` returns them; two at least.
        lead: whether its chunks are computed behind the lead-in.
        on_step: called with (policies done, all).
    """
    started = time.perf_counter()
    done = 0

    def measure(policy: Query | CacheBlend | Reuse, lead: bool = lead) -> list[Moved]:
        nonlocal done
        moved = [each.moved(decoder, policy, lead=lead) for each in asked]
        done += 1
        if on_step is not None:
            on_step(done, len(BANDS) + len(SHARES) + 3)
        return moved

    by_band = [measure(Query(ratio=BAND_RATIO, layers=band)) for band in BANDS]
    first, last = BANDS[best_band(by_band)]
    target = mean_kl(measure(CacheBlend(ratio=TARGET), lead=False))
    shares = {0.0: mean_kl(measure(Reuse()))}
    window = decoder.narrowest_window or None
    words = mean_kl(measure(Query(least=MOST, window=window)))  # more than the packaged documents have
    looks: list[float] = []
    for share in SHARES:
        moved = measure(Query(ratio=share, layers=(first, last)))
        shares[share] = mean_kl(moved)
        looks += [each.look_s for each in moved]
    look_s = statistics.median(looks)
    token_s = statistics.median(each.full_s / len(each.prompt.token_ids) for each in asked)
    helped = Look.words if words < shares[0.0] else 0
    found = Look(first, last, most_of(shares, target), worth_it(look_s, token_s), helped)
    told = {f"{share:g}": kl for share, kl in shares.items()}
    bands = [*map(mean_kl, by_band)]
    return LookCheck(found, bands, told, words, target, look_s, token_s, time.perf_counter() - started)


def best_band(by_band: Sequence[Sequence[Moved]]) -> int:
    """Return which band is the best: the usual one, unless another is surely better over the same questions."""

    def gain(band: int) -> float:
        pairs = zip(by_band[USUAL], by_band[band], strict=True)
        gains = [(usual.kl - other.kl) / other.tokens for usual, other in pairs]
        error = statistics.stdev(gains) / math.sqrt(len(gains))
        mean = statistics.mean(gains)
        return mean if mean > SURE * error else 0.0

    gains = [0.0 if band == USUAL else gain(band) for band in range(len(by_band))]
    return gains.index(max(gains)) if max(gains) > 0 else USUAL


def most_of(shares: dict[float, float], target: float) -> float:
    """Return the least of the shares above 0 whose KL reaches the target, else the one with the lowest KL."""
    some = {share: kl for share, kl in shares.items() if share}
    reached = [share for share, kl in some.items() if kl <= target]
    return min(reached) if reached else min(some, key=some.__getitem__)


def worth_it(look_s: float, token_s: float) -> int:
    """Return from how many chunk tokens on a look takes no more than `COST` of the time of full prefill.

    Args:
        look_s: seconds of a look.
        token_s: seconds of full prefill per token.
    """
    tokens = look_s / (COST * token_s)
    return min(max(STEP * math.ceil(tokens / STEP), LEAST), MOST)
