r"""The pre-tokenizer of a GGUF file: how a text is cut before the merges of its vocabulary are looked up.

A GGUF file has the vocabulary and the merges in full, and the pre-tokenizer only as a name, `tokenizer.ggml.pre`.
transformers knows some of the names and takes GPT-2's pre-tokenizer for all others, which gives other token ids
than the model was trained with: SmolLM2, for one, cuts numbers into single digits.

The table here has every name of llama.cpp, with its regular expressions. They are taken as data from llama.cpp
(MIT licence), `src/llama-vocab.cpp` and `src/unicode.cpp` at commit 00ad355e009e. Where llama.cpp notes the original
expression of a model's own tokenizer beside a rewritten one for its own engine, the original stands here. Each
expression cuts the pieces that the one before it left; what it matches and what lies between are pieces of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from chunkcache.errors import ModelNotFoundError

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BREAKS_AND_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _BREAKS_AND_SPACES
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _BREAKS_AND_SPACES
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER_NOT_HAN = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER_NOT_HAN = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"


def _by_case(upper: str, lower: str, ending: str = "") -> str:
    """A word that starts anew where a capital follows a small letter."""
    return f"{_BEFORE}{upper}*{lower}+{ending}|{_BEFORE}{upper}+{lower}*{ending}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + _WORD + r"|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTION + _WORD + r"|\p{N}" + _REST
_QWEN35 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _BREAKS_AND_SPACES
_JAIS2 = (
    _CONTRACTION + _WORD + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|"
    r"\s{1,2}(?!\S)|\s{1}"
)
_TEKKEN = _by_case(_UPPER, _LOWER) + r"|\p{N}" + _REST_WITH_SLASH
_GPT4O = _by_case(_UPPER, _LOWER, _CONTRACTION + "?") + r"|\p{N}{1,3}" + _REST_WITH_SLASH
_KIMI = (
    r"\p{Han}+|" + _by_case(_UPPER_NOT_HAN, _LOWER_NOT_HAN, _CONTRACTION + "?") + r"|\p{N}{1,3}" + _REST
)
_YOUTU = _by_case(_UPPER, _LOWER, _CONTRACTION + "?") + r"|\p{N}" + _REST_WITH_SLASH
_SEED_CODER = _CONTRACTION + _WORD + r"|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _BREAKS_AND_SPACES
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
_EXAONE_MOE = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_NEWLINES = r"[^\n]+|[\n]+"

_DEEPSEEK_WORD = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
)
_DEEPSEEK3 = _DEEPSEEK_WORD + r"[\r\n]*" + _BREAKS_AND_SPACES
_DEEPSEEK3_HAN = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
_DEEPSEEK_HAN = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_DEEPSEEK_LETTERS = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼι"
    r"ῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ"
    r"𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_DEEPSEEK_PUNCTUATION = r"\s?[!-/:-~！-／：-～‘-‟\x{3000}-。]+"
_AFMOE_ASIAN = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{F900}-\x{FAFF}\x{3040}-\x{309F}\x{30A0}-\x{30FF}\x{FF65}-\x{FF9F}"
    r"\x{2F00}-\x{2FDF}\x{0E40}-\x{0E7F}\x{0E80}-\x{0EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}"
    r"\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}]+"
)
_NUMBER = r"\p{N}+"
_THREES_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*\z)"  # of a number that is a piece already

Splits = tuple[str, ...]

_BY_DIGIT: Splits = (r"\p{N}", _GPT2)
_DEEPSEEK3_SPLITS: Splits = (r"\p{N}{1,3}", _DEEPSEEK3_HAN, _DEEPSEEK3)

# Names that mean one pre-tokenizer stand in one row. None: the vocabulary is of characters and not of bytes, which
# transformers cannot read under `tokenizer.ggml.model` "gpt2".
_ROWS: tuple[tuple[str, Splits | None], ...] = (
    ("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, _NUMBER, r"[0-9][0-9][0-9]")),
    ("gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe", (_GPT2,)),
    ("gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4", (_GPT2,)),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", _BY_DIGIT),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", (_LLAMA3,)),
    ("dbrx smaug-bpe glm4 chatglm-bpe", (_LLAMA3,)),
    ("minicpm5", (r"\p{N}{1,3}", _CONTRACTION + _WORD + r"|\p{N}+" + _REST)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", (_QWEN2,)),
    ("qwen35", (_QWEN35,)),
    ("ufakzeka", (_BEFORE + r"\p{L}+|\p{N}" + _REST,)),
    ("laguna", (_NEWLINES, _QWEN2)),
    ("jais-2", (_JAIS2,)),
    ("tekken", (_TEKKEN,)),
    ("gpt-4o llama4 kanana2 talkie minimax-m2 granite-embed-multi-97m", (_GPT4O,)),
    ("tiny_aya cohere2moe", (r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O)),
    ("youtu", (r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _DEEPSEEK3_HAN, _YOUTU)),
    ("kimi-k2", (_KIMI,)),
    ("superbpe", (_NUMBER, _THREES_FROM_THE_RIGHT)),
    ("bailingmoe bailingmoe2 llada-moe", (_BAILING,)),
    ("seed-coder", (_SEED_CODER,)),
    ("exaone-moe", (_EXAONE_MOE,)),
    ("bloom gpt3-finnish poro-chat", (_BLOOM,)),
    ("viking", (_BLOOM, r"\p{N}")),
    ("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    (
        "chameleon",
        (
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
    ),
    ("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_HAN, r"\p{N}")),
    ("deepseek-llm", (r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _DEEPSEEK_HAN, _NUMBER)),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK3_SPLITS),
    ("spark2_5", (r"\p{N}{1,3}", _DEEPSEEK3_HAN, _DEEPSEEK_WORD + r"|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")),
    ("afmoe", (_NUMBER, _THREES_FROM_THE_RIGHT, _AFMOE_ASIAN, _DEEPSEEK3)),
    ("gemma4 granite-embed-multi-311m sarvam-moe whitespace", None),
)
PRE_TOKENIZERS: dict[str, Splits | None] = {name: splits for names, splits in _ROWS for name in names.split()}

# A piece that is a token as it stands is that token, whatever the merges would make of it.
_WHOLE_PIECES_FIRST = frozenset(
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano minicpm5 youtu tekken "
    "granite-embed-multi-97m".split()
)


def pre_tokenizer_name(gguf: Path) -> str | None:
    """Return the name of a file's pre-tokenizer, from its metadata alone.

    Returns:
        the name; "default", as in llama.cpp, where the file has none; None for a vocabulary of another kind than
        byte-level BPE, which has no pre-tokenizer.

    Raises:
        Exception: of any kind, for a damaged file.
    """
    from gguf import GGUFReader  # an extra

    fields = GGUFReader(gguf).fields

    def text(key: str) -> str:
        field = fields.get(key)
        return "" if field is None else bytes(field.parts[field.data[0]]).decode()

    if text("tokenizer.ggml.model") != "gpt2":
        return None
    return text("tokenizer.ggml.pre") or "default"


def check_pre_tokenizer(name: str, gguf: Path) -> None:
    """Refuse a pre-tokenizer that cannot be restored.

    Raises:
        ModelNotFoundError: the table has no such name, or no expressions for it.
    """
    if PRE_TOKENIZERS.get(name) is None:
        reason = "is not known here" if name not in PRE_TOKENIZERS else "cannot be restored here"
        raise ModelNotFoundError(
            f"No tokenizer can be made from {str(gguf)!r}: its pre-tokenizer {name!r} (tokenizer.ggml.pre) {reason}, "
            "and without it the token ids would not be the model's. Load the original model by its folder or its "
            "Hugging Face id, or load the original tokenizer with transformers' AutoTokenizer and pass it, with the "
            "model of this file, to chunkcache.wrap."
        )


def restore_pre_tokenizer(backend: Tokenizer, name: str) -> None:
    """Give a byte-level BPE tokenizer the pre-tokenizer of this name, in place; the table must have it."""
    splits = PRE_TOKENIZERS[name] or ()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model: Any = backend.model
    model.ignore_merges = name in _WHOLE_PIECES_FIRST
