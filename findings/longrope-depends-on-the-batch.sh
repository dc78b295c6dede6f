#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 on a CPU, measured 2026-12-01 with Python 3.11.
#
# Rotary positions of the kinds "longrope" and "dynamic" are chosen once for a whole batch, by its largest position. One row longer than
# the original length turns all rows to the factors of long texts: the log-probabilities of a short row change with its company.
#
# Seen (tiny Phi-3 and Llama, random weights, original length 30; summed log-probability of a row of 20 tokens, nats):
#       longrope  alone -103.01, beside 20 tokens -103.01, beside 40  -95.88, alone again -103.01
#       dynamic   alone  -94.02, beside 20 tokens  -94.02, beside 40  -93.25, alone again  -94.02
#       default   alone  -94.02, beside 20 tokens  -94.02, beside 40  -94.02
#
# Why it matters here: policy and reference are often run on different batches (a reference precomputed, a last micro-batch, another
# rank). Then log pi - log pi_ref of equal models is not 0, and the loss does not begin at log 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 2>/dev/null
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

def rope(kind, **more):
    return {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0} | more

sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3)
configs = {
    "longrope": Phi3Config(**sizes, max_position_embeddings=128, original_max_position_embeddings=30, rope_parameters=rope(
        "longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, original_max_position_embeddings=30)),
    "dynamic": LlamaConfig(**sizes, max_position_embeddings=30, rope_parameters=rope("dynamic")),
    "default": LlamaConfig(**sizes, max_position_embeddings=128)}
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    short, beside, long = (torch.randint(3, 97, (n,)) for n in (20, 20, 40))

    def logp(*others):
        """Of the short row's tokens, in a batch with others, padded on the right and masked."""
        rows = torch.nn.utils.rnn.pad_sequence([short, *others], batch_first=True)
        mask = torch.arange(rows.shape[1]) < torch.tensor([len(x) for x in (short, *others)])[:, None]
        with torch.no_grad():
            log_s = model(rows, attention_mask=mask.long()).logits[0, :19].log_softmax(-1)
        return log_s.gather(1, short[1:, None]).sum().item()

    alone, with_short, with_long, again = logp(), logp(beside), logp(long), logp()
    print(f"{name:9} alone {alone:.4f}, beside 20 tokens {with_short:.4f}, beside 40 {with_long:.4f}, alone again {again:.4f}")
    assert abs(alone - with_short) < 1e-9 and abs(alone - again) < 1e-9
    assert (abs(alone - with_long) > 0.05) == (name != "default")
PYTHON
