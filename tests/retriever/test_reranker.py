"""Reranking: the order follows the scores; a cross-encoder loads from a folder, and what is none is refused."""

from __future__ import annotations

import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from chunkcache.errors import InputError, ModelNotFoundError
from chunkcache.retriever.reranker import CrossEncoderReranker, rerank


class Fixed:
    def __init__(self, *scores):
        self._scores = scores

    def scores(self, query, texts):
        return self._scores


def folder(path, labels=1):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ferry", "bread", "sails", "baked", "when", "is"]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        num_labels=labels,
        initializer_range=1.0,
    )
    BertForSequenceClassification(config).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(path / "vocab.txt")).save_pretrained(path)
    return path


def test_items_are_ordered_by_score_and_equal_ones_stay():
    assert rerank(Fixed(1, 3, 1, 3), "q", "abcd", ["t"] * 4) == [("b", 3.0), ("d", 3.0), ("a", 1.0), ("c", 1.0)]
    assert rerank(Fixed(), "q", [], []) == []


@pytest.mark.parametrize("scores", [(1.0,), (1.0, 2.0, 3.0), (1.0, float("nan")), (1.0, float("inf"))])
def test_scores_that_are_not_one_number_each_are_refused(scores):
    with pytest.raises(InputError, match="the reranker Fixed gave"):
        rerank(Fixed(*scores), "q", "ab", ["t", "u"])


def test_a_cross_encoder_scores_pairs_alike_in_any_batch(tmp_path, capfd):
    model = folder(tmp_path)
    texts = ["ferry sails", "bread is baked", "sails", "baked bread bread bread"]
    one, many = (CrossEncoderReranker(model, device="cpu", batch_size=size) for size in (1, 32))
    capfd.readouterr()
    scores = many.scores("when is ferry", texts)
    assert all(type(score) is float for score in scores)
    assert len(set(scores)) == 4
    assert one.scores("when is ferry", texts) == pytest.approx(scores, abs=1e-5)
    assert many.scores("when is bread", texts) != pytest.approx(scores, abs=1e-5)
    assert many.scores("when", []) == []
    assert capfd.readouterr() == ("", "")


def test_a_model_of_several_scores_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match="gives 3 scores for a pair"):
        CrossEncoderReranker(folder(tmp_path, labels=3))


def test_a_folder_without_a_model_and_an_unknown_name_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ModelNotFoundError, match="no cross-encoder could be loaded from"):
        CrossEncoderReranker(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="nobody/no-such-model"):
        CrossEncoderReranker("nobody/no-such-model")


def test_an_encoder_that_was_never_trained_to_score_is_refused(tmp_path):
    model = folder(tmp_path)
    BertForSequenceClassification.from_pretrained(model).bert.save_pretrained(model)
    with pytest.raises(ModelNotFoundError, match="was not trained to score pairs"):
        CrossEncoderReranker(model)
