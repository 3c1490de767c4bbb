"""What a check is run with: a tokenizer, models of random weights and texts, all made in the process."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import chunkcache

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

TEXT = (
    "bridge river ferry winter bread keeper weather lighthouse flour water salt yeast dough summer spring answer "
    "year public opened paragraph document cold room hours sea calm morning evening question helpful stone engine map"
)
WORDS = TEXT.split()
TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
VOCAB = 512
SIZES = {"toy": (4, 64, 4, 2), "small": (12, 512, 8, 4), "8b": (32, 4096, 32, 8)}  # layers, hidden, heads, KV heads
ZOO = Path(chunkcache.__file__).parents[1] / "tests" / "zoo.py"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of at most `VOCAB` entries, each of `WORDS` one of them, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL.values()),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([f" {TEXT}"] * 20, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)
    made.chat_template = TEMPLATE
    return made


def make_config(size: str) -> PretrainedConfig:
    """Return the config of a Llama of a size of `SIZES`; `8b` is the shape of Llama-3-8B."""
    from transformers import LlamaConfig

    layers, hidden, heads, kv_heads = SIZES[size]
    large = size == "8b"
    return LlamaConfig(
        vocab_size=128256 if large else VOCAB,
        hidden_size=hidden,
        intermediate_size=14336 if large else 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=131072 if large else 16384,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5 if large else 1e4},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )


@torch.no_grad()
def make_model(
    size: str, dtype: torch.dtype, device: torch.device | str = "cpu", std: float = 0.02
) -> PreTrainedModel:
    """Return a Llama of random weights of this standard deviation; a small one has the same on any device."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    large = size == "8b"
    where = torch.device(device) if large else torch.device("cpu")  # 16 GB are made on the device at once
    with where, no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(make_config(size), dtype=dtype, attn_implementation="sdpa")
    generator = torch.Generator(device=where).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        elif large:
            parameter.normal_(0, std, generator=generator)
        else:
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    made: PreTrainedModel = model.eval().to(device)
    return made


def load_zoo(path: Path = ZOO) -> Any:
    """Return the module of tiny models, one per family, that the tests use; None outside a checkout."""
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("chunkcache_zoo", path)
    assert spec is not None
    assert spec.loader is not None
    import sys

    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    return module


def make_texts(count: int, seed: int, tokens: int) -> list[str]:
    """Return `count` texts of about `tokens` tokens each."""
    draw = random.Random(seed)
    words = int(tokens * 0.98)  # about one token a word
    return [" ".join(draw.choices(WORDS, k=words + draw.randrange(9))) + "." for _ in range(count)]


def make_question(number: int) -> str:
    """Return a question; its length depends on the number."""
    words = random.Random(900 + number).choices(WORDS, k=8 + number % 7)
    return "In which year was the " + " ".join(words) + " opened?"
