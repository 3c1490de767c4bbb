#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU with AVX512-BF16: the first forward of a Linear4bit in eval mode rewrites its weight.
#
# Seen: codes of another order and shape, and absmax rounded to bfloat16, so that a hash of the same model's tensors is
# another one before and after its first use; and `state_dict()`, which is to read, then rewrites the live weight back.
# Whoever tells models apart by their bytes takes them after a forward, and never through state_dict().
# On a CPU without AVX512-BF16 nothing is rewritten, and this says so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps bitsandbytes==0.50.2 packaging==25.0
"$folder/venv/bin/python" - <<'PYTHON'
import hashlib

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import has_avx512bf16

if not has_avx512bf16():
    print("no AVX512-BF16 on this CPU: not seen here")
    raise SystemExit
torch.manual_seed(0)
layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
layer.weight = bnb.nn.Params4bit(torch.randn(64, 128), requires_grad=False, quant_type="nf4")
layer = layer.to("cpu").eval()


def state():
    digest = hashlib.sha256(layer.weight.data.contiguous().numpy().tobytes()).hexdigest()[:12]
    return digest, tuple(layer.weight.shape), layer.weight.quant_state.absmax.dtype


fresh = state()
layer(torch.randn(1, 128))
used = state()
layer.state_dict()
read = state()
print(f"bitsandbytes {bnb.__version__}")
print("fresh:              ", *fresh)
print("after one forward:  ", *used)
print("after state_dict(): ", *read)
assert bnb.__version__ == "0.50.2"
assert used[0] != fresh[0], "the forward no longer rewrites the codes"
assert used[2] == torch.bfloat16, "absmax is no longer rounded"
assert read[0] != used[0], "state_dict() no longer rewrites the live weight"
print("seen")
PYTHON
