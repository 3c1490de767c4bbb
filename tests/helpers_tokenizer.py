"""A small real tokenizer, trained in the process: byte-level, so that any text round-trips."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

_TEXT = (
    "The lighthouse keeper wrote down the weather every morning and every evening for forty years.",
    "Who built the bridge over the river, and in which year was it opened to the public?",
    "The answer is in the second paragraph of the document: it was opened in 1931.",
    "You are a helpful assistant. Answer the question from the documents given, in a few words.",
    "Bread is made with flour, water, salt and yeast; the dough rests for twelve hours in a cold room.",
    "In spring the ferry sails twice a day, in summer four times, and in winter only when the sea is calm.",
)


@cache
def tiny_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most `vocab_size` entries (at least 260), with no network used.

    It adds no special tokens by itself; unk, bos, eos and pad exist and have ids 0 to 3.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=_SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_SPECIAL)
