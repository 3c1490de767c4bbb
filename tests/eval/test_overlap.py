"""Which chunks of a prompt stand in another of them."""

from __future__ import annotations

import pytest

from chunkcache.eval.overlap import repeated_share

WORDS = [f"w{number}" for number in range(40)]
TEXT = " ".join(WORDS)
OTHER = " ".join(f"o{number}" for number in range(40))


@pytest.mark.parametrize(
    ("chunks", "share"),
    [
        ((TEXT, OTHER), 0),
        ((TEXT, OTHER, TEXT), 2 / 3),
        ((TEXT, f"{OTHER} {TEXT}"), 1 / 2),  # the longer one does not stand in the shorter
        ((TEXT, TEXT.upper().replace(" ", ", ") + "."), 1),
        ((TEXT, f"{' '.join(WORDS[:36])} {OTHER}"), 1 / 2),  # 36 of 40 words
        ((TEXT, f"{' '.join(WORDS[:35])} {OTHER}"), 0),
        ((TEXT, f"{' '.join(WORDS[20:])} {OTHER} {' '.join(WORDS[:20])}"), 1 / 2),  # in two pieces
        ((TEXT, " ".join(sorted(WORDS))), 0),  # the same words in another order
        ((TEXT, " ".join(WORDS[:20]), " ".join(WORDS[20:])), 2 / 3),  # the first stands in no other one alone
        (("w3 w4", TEXT), 1 / 2),  # fewer words than a run
        (("w4 w3", TEXT), 0),
        (("...", TEXT), 0),
        ((TEXT,), 0),
        ((), 0),
    ],
)
def test_a_chunk_is_repeated_if_nearly_all_of_it_stands_in_another(chunks, share):
    assert repeated_share(chunks) == pytest.approx(share)
