"""Which chunk tokens matter, by what they are and where they stand: found without the model.

*The question's own words*, the rare ones most: the weight of a word is its inverse document frequency (Spärck Jones
1972), each chunk token being a document, to the fourth power, so that rare words decide. It fades with the distance
from where the word stands.

*Marks in a sliding window*: line ends, stops, spaces. Attention that has nowhere to go rests on the first token of a
prompt (attention sinks, Xiao et al., 2309.17453); a layer whose window ends before that rests it on marks, and which
of them serve so changes with what stands before them. They are told by being the commonest tokens, with no tokenizer.
The last token of all chunks, a separator, counts as one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from chunkcache.blend.plan import Plan

POWER = 4
REACH = 16  # tokens to each side
FADING = 0.95  # of the weight that is left one token further


def near_words(plan: Plan, count: int, first: Tensor | None = None) -> Tensor:
    """Return the positions `[at most count]` of inexact tokens next to the words of what stands behind the chunks.

    A token scores the sum of all weights around it. None are returned that no word is near, but for those of `first`
    `[n]`, which may say one twice: they come before all others, and all of them even if they are more than `count`.
    """
    candidates, ids = plan.inexact, plan.ids
    weights = torch.zeros(len(plan))
    found = candidates[torch.isin(ids[candidates], ids[plan.end :])]
    weights[found] = (len(candidates) / plan.counts[ids[found]]).log() ** POWER
    kernel = FADING ** torch.arange(-REACH, REACH + 1).abs()
    scores = functional.conv1d(weights[None, None], kernel[None, None], padding=REACH)[0, 0]
    if first is not None:
        scores[first] = torch.inf
        count = max(count, int(scores.isinf().sum()))
    best = scores[candidates].topk(min(count, len(candidates)))
    return candidates[best.indices[best.values > 0]]


def marks(plan: Plan, window: int, count: int) -> Tensor:
    """Return the positions `[at most count]` of the commonest inexact tokens among the last `window` of the chunks.

    The very last one is taken in any case, and of tokens that are as common those nearer to the question.
    """
    near = plan.inexact[plan.inexact >= plan.end - window].flip(0)
    common = plan.counts[plan.ids[near]]
    common[:1] = len(plan)
    return near[common.sort(descending=True, stable=True).indices[:count]]
