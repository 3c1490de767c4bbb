"""From texts to their nearest chunks, for `precompute(lead=...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from chunkcache.blend import Policy
from chunkcache.errors import InputError
from chunkcache.kv import TokenIds
from chunkcache.library.neighbours import ASKED, Neighbours
from chunkcache.prompt import PromptBuilder
from chunkcache.prompt.prompt import text_of

Lead = Literal["packaged", "neighbours"] | Neighbours
LEADS = ("packaged", "neighbours")


def neighbours_of(lead: Lead, policy: Policy) -> Neighbours | None:
    """Return how chunks are computed behind their nearest; None for behind the packaged lead-in, if any.

    A policy that does not want nearest chunks gets none.

    Raises:
        InputError: there is no such lead-in.
    """
    if lead not in LEADS and not isinstance(lead, Neighbours):
        raise InputError(f"there is no lead={lead!r}: give one of {', '.join(LEADS)}, or Neighbours(...)")
    if lead == "packaged" or not policy.neighbours() or policy.versioned:
        return None
    return lead if isinstance(lead, Neighbours) else Neighbours()


class NearTexts:
    """Texts, and which of them are nearest to which.

    Args:
        texts: as in `precompute`.
        prompts: makes chunks of them.
        how: says which are nearest.

    Raises:
        InputError: there are more or fewer lists of nearest texts than texts.
    """

    def __init__(self, texts: Sequence[Any], prompts: PromptBuilder, how: Neighbours) -> None:
        self._prompts = prompts
        self._texts = {prompts.chunk(text): text for text in texts}
        if how.nearest is None:
            self._find: Callable[[Sequence[Any]], Sequence[Sequence[Any]]] = self._among_themselves
        elif callable(how.nearest):
            self._find = how.nearest
        else:
            if len(how.nearest) != len(texts):
                raise InputError(f"nearest has {len(how.nearest)} lists for {len(texts)} texts: give one for each")
            given = {prompts.chunk(text): near for text, near in zip(texts, how.nearest, strict=True)}
            self._find = lambda asked: [given[prompts.chunk(text)] for text in asked]

    def nearest(self, chunks: Sequence[TokenIds]) -> Mapping[TokenIds, list[TokenIds]]:
        """Return for some of the chunks their nearest, best first."""
        found = self._find([self._texts[ids] for ids in chunks]) if chunks else []
        named: dict[str, TokenIds] = {}  # each text is cut into tokens once, and its ids are there once

        def ids_of(text: Any) -> TokenIds:
            return named.setdefault(text_of(text), self._prompts.chunk(text))

        near = [[ids_of(text) for text in texts[:ASKED]] for texts in found]
        return dict(zip(chunks, near, strict=True))

    def _among_themselves(self, asked: Sequence[Any]) -> list[list[Any]]:
        from chunkcache.retriever.nearest import nearest_texts

        texts = [text_of(text) for text in self._texts.values()]
        return [[texts[place] for place in near] for near in nearest_texts(texts, [text_of(t) for t in asked], ASKED)]
