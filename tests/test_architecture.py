"""Another architecture is tried by editing model.py alone: RMSNorm, rotary positions, gated MLP, dropout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model import GPT, ModelError

ROOT = Path(__file__).resolve().parents[1]

ROTATE = """def rotate(x, angles):
    a, b = x.chunk(2, -1)  # each (B, H, T, D/2)
    cos, sin = angles.unsqueeze(-3).cos(), angles.unsqueeze(-3).sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention("""
ANGLES = """speed = 1000 ** -torch.linspace(0, 1, config.n_embd // config.n_head // 2)
        self.register_buffer("angles", torch.arange(config.block_size).outer(speed), persistent=False)"""
GATED = """self.gate = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_fc = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)"""
EDITS = {  # what stands in model.py -> what the user writes there
    "nn.LayerNorm(": "nn.RMSNorm(",
    "class Attention(": ROTATE,
    "forward(self, x, mask, cache)": "forward(self, x, angles, mask, cache)",
    "        is_causal = ": "        q, k = rotate(q, angles), rotate(k, angles)\n        is_causal = ",
    "self.attn(self.ln_1(x), mask, cache)": "self.attn(self.ln_1(x), angles, mask, cache)",
    "self.wpe = nn.Embedding(config.block_size, config.n_embd)": ANGLES,
    "x = self.wte(tokens) + self.wpe(positions)": "x, angles = self.wte(tokens), self.angles[positions]",
    "block(x, mask, cache)": "block(x, angles, mask, cache)",
    "self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)": GATED,
    "nn.Linear(4 * config.n_embd, config.n_embd)": "nn.Linear(3 * config.n_embd, config.n_embd, bias=False)",
    'F.gelu(self.c_fc(x), approximate="tanh")': 
        "F.dropout(F.silu(self.gate(x)) * self.c_fc(x), 0.5, self.training)",
}

# Every command line in one process, which imports torch once.
RUN = """
import importlib, sys
for line in sys.stdin:
    program, *flags = line.split()
    importlib.import_module(program).main(flags)

# The folder holds the model that was trained, and a cache changes nothing.
import torch
from safetensors.torch import load_file
from model import GPT
saved = GPT.from_pretrained("out/dpo")
trained, weights = GPT(saved.config), load_file("out/dpo/checkpoints/step-0000004.safetensors")
with torch.no_grad():
    for name, p in trained.named_parameters():
        p.copy_(weights["model." + name][:len(p)])
tokens = torch.arange(40).view(2, 20)
assert torch.equal(trained.logits(trained(tokens)), saved.logits(saved(tokens)))
text = saved.generate(tokens, 20, temperature=0)
assert torch.equal(saved.logits(saved(text[:, :-1]))[:, 19:].argmax(-1), text[:, 20:])
assert not torch.equal(saved(tokens), saved(tokens, positions=torch.arange(20) * 2))
"""
COMMANDS = """\
train --loss sft --data pairs.jsonl --batch_size 8 --steps 3 --tokenizer toy/toy.tiktoken --out_dir out/sft \
    --n_layer 2 --n_head 2 --n_embd 16
train --init out/sft --data pairs.jsonl --batch_size 8 --lr 1e-3 --steps 4 --out_dir out/straight
train --init out/sft --data pairs.jsonl --batch_size 8 --lr 1e-3 --steps 2 --out_dir out/dpo
train --resume --out_dir out/dpo --steps 4
sample out/dpo --prompt Review: --heat --max_new_tokens 8
"""

@pytest.mark.slow
def test_another_architecture_trains_resumes_samples_and_is_saved_by_editing_model_py_alone(tmp_path):
    """SFT, DPO, --resume to the same weights as without a pause, sample.py, and the folder read again."""
    for name in ("losses.py", "data.py", "train.py", "sample.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("plumbing", "toy"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    source = (ROOT / "model.py").read_text()
    for old, new in EDITS.items():
        assert old in source, old
        source = source.replace(old, new)
    (tmp_path / "model.py").write_text(source)
    pairs = (ROOT / "toy" / "reviews-train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join(pairs[:40]))
    done = subprocess.run([sys.executable, "-c", RUN], input=COMMANDS, cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for words in ("loss 0.6931 = log 2", "going on after step 2", "| policy", "beta log pi/pi_ref, token by"):
        assert words in done.stdout
    straight, dpo, sft = ((tmp_path / "out" / name / "model.safetensors").read_bytes()
                          for name in ("straight", "dpo", "sft"))
    assert straight == dpo != sft
    assert json.loads((tmp_path / "out" / "dpo" / "config.json").read_text())["model_type"] == "termwise"
    with pytest.raises(ModelError, match="model.py computes something else"):
        GPT.from_pretrained(tmp_path / "out" / "dpo")  # the GPT-2 here
