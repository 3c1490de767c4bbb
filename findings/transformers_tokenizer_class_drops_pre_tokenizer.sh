#!/usr/bin/env bash
# transformers 5.23.0: a tokenizer.json's pre-tokenizer is not used where tokenizer_config.json names GPT2Tokenizer.
#
# The file is valid and says "digits one by one, then byte level", as SmolLM's does. AutoTokenizer builds the class's own
# pre-tokenizer in its place, without a word: numbers get other ids than `tokenizers` gives for the very same file. With
# PreTrainedTokenizerFast in tokenizer_config.json the file is used as it is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

made = Tokenizer(models.BPE())
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
made.train_from_iterator(["In 1987 there were 12 and 1987 more, in 1931 none."] * 4, trainer)
made.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)

text = "It was 1987 then."
right = made.encode(text).tokens
print(f"transformers {transformers.__version__}")
print("tokenizers:             ", right)
found = {}
for name in ("GPT2Tokenizer", "PreTrainedTokenizerFast"):
    folder = Path(name)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    found[name] = AutoTokenizer.from_pretrained(folder).tokenize(text)
    print(f"{name + ':':24}", found[name])
assert transformers.__version__ == "5.23.0"
assert found["PreTrainedTokenizerFast"] == right
assert found["GPT2Tokenizer"] != right, "the file's pre-tokenizer is used now"
print("seen")
PYTHON
