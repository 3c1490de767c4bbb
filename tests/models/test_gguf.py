"""The pre-tokenizer of a GGUF file: restored by its name, kept by the conversion, refused where it is not known."""

from __future__ import annotations

import logging
from pathlib import Path

import gguf
import pytest
import torch
from helpers_tokenizer import tiny_tokenizer
from support.gguf import write_gguf
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerBase

from chunkcache.errors import ModelNotFoundError
from chunkcache.models import ALIASES, DEFAULT_MODEL, cache_dir, load_model
from chunkcache.models.gguf import PRE_TOKENIZERS, check_pre_tokenizer, pre_tokenizer_name, restore_pre_tokenizer

TEXT = (
    "In 1987 it cost  12 345.50, or $1,234,567 -- don't, I'M, you'LL <b>x</b> a_b `c` (d|e) {f} [g] ~h ^i\n\n\n"
    " \t foo\r\n\r\n  bar\x0b getUserName HTTPServer ÀÉa éA Straße ǅ ſ's½ ٣٤٥ １２３４ x1234567y\u00a0z\u3000-\u200b-"
    "日本語テスト漢字abc、。한국어ㄱㆎ ㄅㄆ ไทย ລາວ မြန်မာ नमस्ते Ελλάδα Москва 😀👍🏽 — “q” …！，e\u0301 𐐀𐐨 𞤀 "
    + " " * 600
    + "end \n "
)
KNOWN = [name for name, splits in PRE_TOKENIZERS.items() if splits is not None]
UNKNOWN = [name for name, splits in PRE_TOKENIZERS.items() if splits is None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test out of the cache folder of the machine it runs on."""
    monkeypatch.setenv("CHUNKCACHE_CACHE_DIR", str(tmp_path / "cache"))


def bytes_only() -> Tokenizer:
    """A byte-level tokenizer without merges."""
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel()
    return tokenizer


def cut(text: str, name: str) -> list[str]:
    """The pieces that the pre-tokenizer `name` cuts a text into."""
    expressions = PRE_TOKENIZERS[name]
    assert expressions is not None
    steps = Sequence([Split(Regex(expression), behavior="isolated") for expression in expressions])
    return [piece for piece, _ in steps.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", KNOWN)
def test_every_pre_tokenizer_compiles_and_loses_nothing(name: str) -> None:
    tokenizer = bytes_only()
    restore_pre_tokenizer(tokenizer, name)
    assert tokenizer.pre_tokenizer is not None
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    spans = [span for _, span in pieces]
    assert (spans[0][0], spans[-1][1]) == (0, len(TEXT))
    letters = {letter: byte for byte, letter in _alphabet().items()}
    assert bytes(letters[letter] for piece, _ in pieces for letter in piece) == TEXT.encode()
    assert "".join(cut(TEXT, name)) == TEXT
    assert len(pieces) > 10


def _alphabet() -> dict[int, str]:
    """GPT-2's letter of each byte: itself where it is printable, else one of those from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "in 1987  a", ["in", " 1987", " ", " a"]),
        ("smollm", "in 1987  a", ["in", " ", "1", "9", "8", "7", " ", " a"]),
        ("smollm", "12 345", ["1", "2", " ", "3", "4", "5"]),
        ("llama-bpe", "in 1987, don'T", ["in", " ", "198", "7", ",", " don", "'T"]),
        ("qwen2", "in 19 a\n\nb", ["in", " ", "1", "9", " a", "\n\n", "b"]),
        ("ufakzeka", "Ankara'da", ["Ankara", "'da"]),
        ("tekken", "getName É1", ["get", "Name", " É", "1"]),
        ("gpt-4o", "I'll getName's", ["I'll", " get", "Name's"]),
        ("kimi-k2", "getName漢字a", ["get", "Name", "漢字", "a"]),
        ("falcon", "a 12345!", ["a", " ", "123", "45", "!"]),
        ("superbpe", "by the 1234567 of", ["by the ", "1", "234", "567", " of"]),
        ("afmoe", "at 12345 it", ["at", " ", "12", "345", " it"]),
        ("tiny_aya", "at 12345 it", ["at", " ", "12", "345", " it"]),
        ("deepseek-v3", "x 12345漢字!abc", ["x", " ", "123", "45", "漢字", "!abc"]),
        ("deepseek-llm", "Ab d.\n12", ["Ab", " d", ".", "\n", "12"]),
        ("viking", "so, 12", ["so", ",", " ", "1", "2"]),
        ("default", "a+b 1234", ["a", "+", "b", " ", "123", "4"]),
    ],
)
def test_a_text_is_cut_as_the_name_says(name: str, text: str, pieces: list[str]) -> None:
    assert cut(text, name) == pieces


@pytest.mark.parametrize(("name", "first"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_a_piece_that_is_a_token_needs_no_merges_where_the_model_says_so(name: str, first: bool) -> None:
    vocab = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))} | {"tide": 256}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    restore_pre_tokenizer(tokenizer, name)
    assert (tokenizer.encode("tide").tokens == ["tide"]) is first


def test_letters_that_look_like_others_are_cased_letters_too() -> None:
    expressions = PRE_TOKENIZERS["deepseek-llm"]
    assert expressions is not None
    split = Split(Regex(expressions[1]), behavior="removed")
    assert split.pre_tokenize_str("Aß\u1fbe\u212a\u2126\ufb01\U00010400") == []
    assert split.pre_tokenize_str("1!\u3042") == [("1!\u3042", (0, 3))]


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    return load_model(str(path), device="cpu")[1]


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    try:
        ALIASES[DEFAULT_MODEL].path()
    except ModelNotFoundError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHUNKCACHE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return load_model(DEFAULT_MODEL, device="cpu")[1]


@pytest.mark.model
@pytest.mark.parametrize(
    ("text", "ids"),  # llama.cpp's, for the same file
    [
        ("in 1987 ", [254, 216, 33, 41, 40, 39, 216]),
        ("12 345", [33, 34, 216, 35, 36, 37]),
        ("a   2", [81, 333, 34]),
        (
            "It cost\n\n 1,250.50  in 2024",
            [1589, 1708, 8866, 33, 28, 34, 37, 32, 30, 37, 32, 216, 281, 216, 34, 32, 34, 36],
        ),
        ("x=  7\t8", [104, 45, 256, 39, 197, 40]),
        ("don't 3rd", [12420, 982, 216, 35, 7212]),
    ],
)
def test_the_packaged_model_has_its_own_ids(packaged: PreTrainedTokenizerBase, text: str, ids: list[int]) -> None:
    assert packaged(text).input_ids == ids
    assert packaged.decode(ids) == text


def test_a_file_is_parsed_once_and_its_tensors_are_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", "x", pre="smollm")
    made = []
    for name in ("GGUFReader", "get_tensor_name_map"):
        make = getattr(gguf, name)
        monkeypatch.setattr(gguf, name, lambda *given, make=make, name=name: made.append(name) or make(*given))
    counting = gguf.GGUFReader, gguf.get_tensor_name_map
    load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert sorted(made) == ["GGUFReader", "get_tensor_name_map"]
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == counting  # nothing is left behind


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "deepseek-v3"])
def test_a_conversion_keeps_the_pre_tokenizer_of_the_file(tmp_path: Path, architecture: str, pre: str) -> None:
    held = write_gguf(tmp_path / "tiny.gguf", "x", pre=pre, architecture=architecture)
    expected = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    restore_pre_tokenizer(expected, pre)
    for _ in range(2):  # converted, and from the conversion
        model, tokenizer = load_model(str(tmp_path / "tiny.gguf"), device="cpu")
        for text in (TEXT, "The answer is  1931.", "it was opened in 1931"):
            assert tokenizer(text).input_ids == expected.encode(text).ids
    ids = torch.tensor([expected.encode("Who built the bridge?").ids])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, held(ids).logits)


def test_a_file_without_a_name_is_cut_by_the_default_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_gguf(tmp_path / "tiny.gguf", "x", pre=None)
    assert pre_tokenizer_name(tmp_path / "tiny.gguf") == "default"
    assert "tiny.gguf names no pre-tokenizer" in caplog.text
    expected = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    restore_pre_tokenizer(expected, "default")
    assert load_tokenizer(tmp_path / "tiny.gguf")(TEXT).input_ids == expected.encode(TEXT).ids
    assert [record.levelno for record in caplog.records if "pre-tokenizer" in record.message] == [logging.WARNING] * 2


@pytest.mark.parametrize("pre", ["no-such-model", *UNKNOWN])
def test_a_pre_tokenizer_that_cannot_be_restored_is_refused_by_name(tmp_path: Path, pre: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", "x", pre=pre)
    with pytest.raises(ModelNotFoundError, match=rf"tiny\.gguf.*'{pre}' \(tokenizer\.ggml\.pre\).*AutoTokenizer"):
        load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert not [path for path in (cache_dir() / "models").iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", KNOWN)
def test_a_pre_tokenizer_of_the_table_is_not_refused(name: str) -> None:
    check_pre_tokenizer(name, Path("any.gguf"))


def test_a_conversion_of_an_older_form_is_not_used(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "x", pre="smollm")
    load_tokenizer(tmp_path / "tiny.gguf")
    (folder,) = (path for path in (cache_dir() / "models").iterdir() if path.is_dir())
    stem, _, form = folder.name.rpartition("-")
    assert form == "v2"
    older = folder.with_name(stem)
    folder.rename(older)
    (older / "tokenizer.json").write_text("{}")
    assert load_tokenizer(tmp_path / "tiny.gguf")("in 1931").input_ids
    assert folder.is_dir()
    assert (older / "tokenizer.json").read_text() == "{}"
