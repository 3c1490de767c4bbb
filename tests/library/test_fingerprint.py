"""The fingerprint follows what the KV depend on, and nothing else; foreign tokenizers are refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import zoo
from helpers_tokenizer import tiny_tokenizer
from support.llm import VOCAB, own_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from chunkcache.errors import TokenizerMismatchError
from chunkcache.library.fingerprint import check_tokenizer, fingerprint

TOKENIZER = tiny_tokenizer(VOCAB)


def with_specials(**ids: int | None):
    """Return the tiny tokenizer with other special tokens, given by the ids of ordinary ones."""
    tokenizer = copy.deepcopy(TOKENIZER)
    for name, token in ids.items():
        setattr(tokenizer, name, None if token is None else tokenizer.convert_ids_to_tokens(token))
    return tokenizer


def test_a_fingerprint_is_a_sha256():
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(own_model(), TOKENIZER))


def test_it_is_the_same_each_time():
    assert fingerprint(own_model(), TOKENIZER) == fingerprint(own_model(), TOKENIZER)


def test_two_copies_of_a_checkpoint_agree(tmp_path):
    original = own_model()
    prints = {fingerprint(original, TOKENIZER)}
    for folder in (tmp_path / "here", tmp_path / "there" / "other-name"):
        original.save_pretrained(folder)
        TOKENIZER.save_pretrained(folder)
        prints.add(fingerprint(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)))
    assert len(prints) == 1


def test_names_do_not_count():
    model, tokenizer = own_model(), copy.deepcopy(TOKENIZER)
    before = fingerprint(model, tokenizer)
    model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = "somewhere/else"
    assert fingerprint(model, tokenizer) == before


@pytest.mark.parametrize("weight", [name for name, _ in zoo.build("llama", vocab_size=VOCAB).named_parameters()])
def test_every_weight_tensor_counts(weight):
    model = own_model()
    before = fingerprint(model, TOKENIZER)
    with torch.no_grad():
        model.get_parameter(weight).mul_(1.001)
    assert fingerprint(model, TOKENIZER) != before


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rms_norm_eps": 1e-3},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32},
    ],
    ids=["dtype", "rope base", "rope scaling", "norm", "heads"],
)
def test_dtype_and_config_count(options):
    assert fingerprint(own_model(**options), TOKENIZER) != fingerprint(own_model(), TOKENIZER)


def test_the_tokenizer_counts():
    assert fingerprint(own_model(), tiny_tokenizer(300)) != fingerprint(own_model(), TOKENIZER)


def test_it_leaves_the_model_alone():
    model = own_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fingerprint(model, TOKENIZER)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_own_tokenizer_is_accepted():
    check_tokenizer(own_model(), TOKENIZER)


def test_ids_without_an_embedding_are_refused():
    highest = max(TOKENIZER.get_vocab().values())
    with pytest.raises(TokenizerMismatchError, match=f"ids up to {highest}, the model embeds only 300"):
        check_tokenizer(zoo.build("llama", vocab_size=300), TOKENIZER)


def test_other_bos_and_eos_are_refused():
    with pytest.raises(TokenizerMismatchError, match="BOS token 50 nor the EOS token 51"):
        check_tokenizer(own_model(), with_specials(bos_token=50, eos_token=51))


@pytest.mark.parametrize(
    "specials",
    [
        {"eos_token": 51},
        {"bos_token": 50},
        {"bos_token": None, "eos_token": 51},
        {"bos_token": 50, "eos_token": None},
    ],
    ids=str,
)
def test_one_difference_is_let_pass(specials):
    check_tokenizer(own_model(), with_specials(**specials))  # chat models end turns with tokens of their own


def test_an_eos_of_the_generation_config_is_the_models():
    model = own_model()
    model.generation_config.eos_token_id = [2, 51]
    check_tokenizer(model, with_specials(bos_token=50, eos_token=51))


def test_a_model_without_special_tokens_takes_any():
    model = own_model(bos_token_id=None, eos_token_id=None)
    model.generation_config.bos_token_id = model.generation_config.eos_token_id = None
    check_tokenizer(model, with_specials(bos_token=50, eos_token=51))
