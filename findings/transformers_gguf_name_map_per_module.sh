#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0: while a GGUF file is loaded, the map from GGUF's tensor names is made anew for
# every module of the model, norms and activations too, and each time for all layers.
#
# Seen: with twice the layers there are twice the calls, each twice as long, so the time grows with the square of the
# depth: 1.6, 7.1 and 32 s on one core for Llama models of 15, 30 and 60 layers on the meta device, whatever their size.
# Whoever loads GGUF files more than once keeps the converted model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 gguf==0.19.0 numpy==2.2.6
"$folder/venv/bin/python" - <<'PYTHON'
import gguf
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

made = gguf.get_tensor_name_map
depths = []


def counted(arch, layers):
    depths.append(layers)
    return made(arch, layers)


gguf.get_tensor_name_map = counted
print(f"transformers {transformers.__version__}")
found = {}
for layers in (4, 8):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=layers
    )
    model = LlamaForCausalLM(config)
    depths.clear()
    names = get_gguf_hf_weights_map(model, TensorProcessor())
    modules = sum(1 for _ in model.modules())
    print(f"{layers} layers: {len(names)} tensors, {modules} modules, {len(depths)} maps of {set(depths)} layers")
    found[layers] = len(depths)
    assert len(depths) >= modules - layers, "no longer once for every module"
    assert set(depths) == {layers}, "no longer for all layers"
assert transformers.__version__ == "5.23.0"
assert found[8] > 1.8 * found[4], "no longer grows with the depth"
print("seen")
PYTHON
