"""How good an answer is: SQuAD's token F1 and exact match, ROUGE-L, and whether it holds an accepted one."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from chunkcache.errors import missing_extra


def f1(answer: str, accepted: Sequence[str]) -> float:
    """Return the best token F1 (0 to 1) of `answer` against the accepted ones (SQuAD, arXiv 1606.05250)."""
    return max(_f1(words_of(answer), words_of(gold)) for gold in accepted)


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return 1 if `answer` is one of the accepted ones but for case, punctuation and articles, else 0 (SQuAD)."""
    return float(any(words_of(answer) == words_of(gold) for gold in accepted))


def rouge_l(answer: str, accepted: Sequence[str]) -> float:
    """Return the best ROUGE-L F-measure (0 to 1) of `answer` against the accepted ones.

    Raises:
        InputError: the package that computes it is not installed.
    """
    return max(float(_scorer().score(gold, answer)["rougeL"].fmeasure) for gold in accepted)


def holds_gold(answer: str, accepted: Sequence[str]) -> float:
    """Return 1 if the words of one of the accepted answers stand in `answer`, one behind the other, else 0.

    Unlike F1 it does not punish a model for answering in sentences. Words are compared as by `exact_match`; an
    accepted answer of which no word is left stands in none.
    """
    words = words_of(answer)
    return float(any(_stands_in(words_of(gold), words) for gold in accepted))


def words_of(text: str) -> list[str]:
    """Return the words that count: lower case, without punctuation and articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _stands_in(gold: Sequence[str], words: Sequence[str]) -> bool:
    starts = range(len(words) - len(gold) + 1) if gold else ()
    return any(words[start : start + len(gold)] == gold for start in starts)


def _f1(words: Sequence[str], gold: Sequence[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = sum((Counter(words) & Counter(gold)).values())
    return 2 * common / (len(words) + len(gold))


@lru_cache(maxsize=1)
def _scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise missing_extra("eval", "ROUGE-L", error) from None
    return RougeScorer(["rougeL"], use_stemmer=True)
