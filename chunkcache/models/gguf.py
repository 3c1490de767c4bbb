r"""The pre-tokenizer of a GGUF file: how a text is cut before the merges of its vocabulary are looked up.

A GGUF file has the vocabulary and the merges in full, and the pre-tokenizer only as a name, `tokenizer.ggml.pre`.
transformers knows some of the names and takes GPT-2's pre-tokenizer for all others, which gives other token ids
than the model was trained with: SmolLM2, for one, cuts numbers into single digits.

The table here has every name of llama.cpp, with its regular expressions. They are taken as data from llama.cpp
(MIT licence), `src/llama-vocab.cpp` and `src/unicode.cpp` at commit 00ad355e009e. Each expression cuts the pieces
that the one before it left; what it matches and what lies between are pieces of their own.

Where llama.cpp notes the expression of the model's own tokenizer beside one rewritten for its own engine, the
model's own stands here. So ids differ from llama.cpp's for `kimi-k2`, `youtu`, `tiny_aya` and `cohere2moe` where a
capital follows a small letter inside a word, and for `tekken` and `gpt-4o` where that capital is not ASCII; and for
`afmoe`, `tiny_aya` and `cohere2moe` where several spaces stand before a number.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from chunkcache.errors import ModelNotFoundError

log = logging.getLogger(__name__)

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


def _class(ranges: str) -> str:
    """A class of characters, from their code points in hexadecimal: as letters some look like others."""
    return "[" + "".join(re.sub("[0-9A-F]+", r"\\x{\g<0>}", ranges).split()) + "]"


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
_KIMI = r"\p{Han}+|" + _by_case(_UPPER_NOT_HAN, _LOWER_NOT_HAN, _CONTRACTION + "?") + r"|\p{N}{1,3}" + _REST
_YOUTU = _by_case(_UPPER, _LOWER, _CONTRACTION + "?") + r"|\p{N}" + _REST_WITH_SLASH
_SEED_CODER = _CONTRACTION + _WORD + r"|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _BREAKS_AND_SPACES
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
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
_DEEPSEEK3_HAN = _class("4E00-9FA5 3040-309F 30A0-30FF") + "+"
_DEEPSEEK_HAN = _class("4E00-9FA5 0800-4E00 AC00-D7FF") + "+"
_CASED_LETTERS = """
    0041-005A 0061-007A 00B5 00C0-00D6 00D8-00F6 00F8-01BA 01BC-01BF 01C4-0293 0295-02AF 0370-0373 0376 0377
    037B-037D 037F 0386 0388-038A 038C 038E-03A1 03A3-03F5 03F7-0481 048A-052F 0531-0556 10A0-10C5 13A0-13F5
    13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D
    1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB
    1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139
    213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F
    A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB
    10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""  # ranges of code points
_DEEPSEEK_LETTERS = rf"\s?{_class(_CASED_LETTERS)}+"
_DEEPSEEK_PUNCTUATION = r"\s?[!-/:-~！-／：-～‘-‟\x{3000}-。]+"
_ASIAN_LETTERS = """
    4E00-9FFF 3400-4DBF F900-FAFF 3040-309F 30A0-30FF FF65-FF9F 2F00-2FDF 0E40-0E7F 0E80-0EFF 1780-17FF 1000-109F
    AA60-AA7F A9E0-A9FF AC00-D7AF 1100-11FF
"""
_NUMBER = r"\p{N}+"
_THREES_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*\z)"  # of a number that is a piece already

Splits = tuple[str, ...]

_BY_DIGIT: Splits = (r"\p{N}", _GPT2)
_DEEPSEEK3_SPLITS: Splits = (r"\p{N}{1,3}", _DEEPSEEK3_HAN, _DEEPSEEK3)

_LLAMA3_NAMES = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
# A piece that is a token as it stands is that token, whatever the merges would make of it.
_WHOLE_PIECES_FIRST = {*_LLAMA3_NAMES.split(), "minicpm5", "youtu", "tekken", "granite-embed-multi-97m"}

# Names that mean one pre-tokenizer stand in one row. None: the vocabulary is of characters and not of bytes, which
# transformers cannot read under `tokenizer.ggml.model` "gpt2".
_ROWS: tuple[tuple[str, Splits | None], ...] = (
    ("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, _NUMBER, r"[0-9][0-9][0-9]")),
    ("gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe", (_GPT2,)),
    ("gigachat a.x-4.0 mellum modern-bert mpt olmo jais trillion granite-docling exaone4", (_GPT2,)),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", _BY_DIGIT),
    (_LLAMA3_NAMES, (_LLAMA3,)),
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
    ("afmoe", (_NUMBER, _THREES_FROM_THE_RIGHT, _class(_ASIAN_LETTERS) + "+", _DEEPSEEK3)),
    ("gemma4 granite-embed-multi-311m sarvam-moe whitespace", None),
)
PRE_TOKENIZERS: dict[str, Splits | None] = {name: splits for names, splits in _ROWS for name in names.split()}


@contextmanager
def read_once() -> Iterator[None]:
    """Parse a file, and make the map of its tensors' names, once in all, however often they are asked for.

    transformers parses a file for its config and again for its weights, which takes seconds where the vocabulary is
    large; and makes the map anew for each module of the model, which takes longer the more layers there are.
    """
    import gguf  # an extra

    makers = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, make in makers.items():
            setattr(gguf, name, cache(make))
        yield
    finally:
        for name, make in makers.items():
            setattr(gguf, name, make)


def pre_tokenizer_name(gguf: Path) -> str | None:
    """Return the name of a file's pre-tokenizer, from its metadata alone.

    Args:
        gguf: the file; it is mapped to memory, and its weights are not read.

    Returns:
        the name; "default", as in llama.cpp, where the file has none; None for a vocabulary of another kind than
        byte-level BPE, which has no pre-tokenizer.

    Raises:
        Exception: of any kind, for a damaged file.
    """
    from gguf import GGUFReader  # an extra

    fields = GGUFReader(str(gguf)).fields

    def text(key: str) -> str:
        field = fields.get(key)
        return "" if field is None else bytes(field.parts[field.data[0]]).decode()

    if text("tokenizer.ggml.model") != "gpt2":
        return None
    name = text("tokenizer.ggml.pre")
    if not name:
        log.warning("%s names no pre-tokenizer: its texts are cut as by llama.cpp's default", gguf.name)
    return name or "default"


def check_pre_tokenizer(name: str, gguf: Path) -> None:
    """Refuse a pre-tokenizer that cannot be restored, by the name that `pre_tokenizer_name` gave of the file.

    Raises:
        ModelNotFoundError: the table has no such name, or no expressions for it.
    """
    if PRE_TOKENIZERS.get(name) is None:
        reason = "is not known here" if name not in PRE_TOKENIZERS else "cannot be restored here"
        raise ModelNotFoundError(
            f"No tokenizer can be made from {str(gguf)!r}: its pre-tokenizer {name!r} (tokenizer.ggml.pre) {reason}, "
            "and without it the token ids would not be the model's. Load the original model by its folder or Hugging "
            "Face id; or load the original tokenizer with transformers' AutoTokenizer, the model of this file with "
            "its AutoModelForCausalLM (gguf_file=...), and pass both to chunkcache.wrap."
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
