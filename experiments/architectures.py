"""Every causal model type of the installed transformers through ports/huggingface.py, beside plain rows:

    python experiments/architectures.py [TYPE ...] > experiments/architectures.md

Tiny random models in float64: loss and all gradients of DPO (one micro-batch) and TDPO2 (pair by pair) beside
two rows a pair, the model's own forward and the formula written out here. TYPE@narrow has windows of 5.
architectures.json says what a small model of a type is.
"""

import inspect
import json
import re
import sys
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # isort: skip

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from data import Pair, collate, pack
from losses import LOSSES, knobs_of, token_kl
from plumbing.errors import ConfigError
from plumbing.reference import Reference
from ports.huggingface import Policy
from ports.huggingface_setup import check_numbers

LENGTHS = [(20, 18, 2), (3, 25, 25), (12, 1, 7)]  # tokens of prompt, chosen, rejected
HOW = json.loads(Path(__file__).with_suffix(".json").read_text())
V = 300

def small(cls, narrow):
    """The arguments of a small config of this class."""
    default, fields, found = cls(), cls().to_dict(), {}
    names = {*fields, *inspect.signature(cls.__init__).parameters, *getattr(cls, "__annotations__", {})}
    for name in sorted(names):
        value = fields.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if (token := re.sub("_token_(id|index)$", "", name)) != name:
                found[name] = HOW["token_ids"].get(token, min(value, V - 1))
            for size, pattern in HOW["small"].items():
                if re.fullmatch(pattern, name):
                    found[name] = (8 if "chunk" in name else 5) if narrow and size == "40" else int(size)
                    break
        elif isinstance(value, dict) and isinstance(part := getattr(default, name), PreTrainedConfig):
            found[name] = small(type(part), narrow) | {"model_type": part.model_type}
    return found

def tiny(name, seed=0):
    """A random model of a type, in float64. Weights are large enough for every parameter to matter."""
    kind, _, variant = name.partition("@")
    arguments = small(CONFIG_MAPPING[kind], variant == "narrow")
    arguments |= {"is_decoder": True} if variant == "decoder" else {}
    for names, fields in HOW["fixes"].items():
        for path, value in fields.items() if {kind, name} & {*names.split()} else ():
            *parts, key = path.split(".")
            at = arguments
            for part in parts:
                at = at.setdefault(part, {})
            at[key] = value
    torch.manual_seed(seed)
    own = CONFIG_MAPPING[kind](**arguments)
    model = AutoModelForCausalLM.from_config(own, experts_implementation="eager").double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model

def random_pairs(lengths=LENGTHS):
    rng, pairs, none = np.random.default_rng(0), [], np.zeros((1, 0))
    for sides in lengths:
        ids = [rng.integers(4, V - 9, n).astype(np.int32) for n in sides]
        pairs.append(Pair(*ids, 0 * ids[1], 0 * ids[2], none, none, "here"))
    return pack(pairs)

@contextmanager
def float64_throughout():
    """transformers computes norms and rotations in float32 whatever the weights are."""
    default, double = torch.get_default_dtype(), torch.float64
    with mock.patch.multiple(torch, float32=double, float=double), \
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        torch.set_default_dtype(double)
        try:
            yield
        finally:
            torch.set_default_dtype(default)

def config(loss):
    return train.Config(loss=loss, settings=knobs_of(LOSSES[loss]), dtype="float64", device="cpu",
                        compile=False, compile_head=False, head_tokens=60)

def plain_loss(model, reference, pair, cfg):
    """The loss of one pair by one row of the models' own logits for each response."""
    terms = {}
    for side in ("chosen", "rejected"):
        row = torch.from_numpy(np.concatenate([pair.prompt, getattr(pair, side)])).long()
        z, z_ref = (m(input_ids=row[None], use_cache=False).logits[0, len(pair.prompt) - 1:-1]
                    for m in (model, reference))
        y = row[len(pair.prompt):, None]
        terms[f"{side}_logps"], terms[f"ref_{side}_logps"] = (
            F.log_softmax(x, -1).gather(-1, y).sum()[None] for x in (z, z_ref.detach()))
        terms[f"{side}_seq_kl"] = token_kl(z_ref.detach(), z).sum()[None]
    return train.call(LOSSES[cfg.loss], terms, cfg).sum()

def compare(model, other, losses=("dpo", "tdpo2")):
    """A model, its reference -> (rows a pair, largest relative difference of losses, of gradients)."""
    policy, reference, pairs, off = Policy(model), Policy(other.requires_grad_(False)), random_pairs(), [0, 0]
    check_numbers(policy, [pairs], config("dpo"), "")
    reference.at, reference.shared = policy.at, policy.shared
    for loss in losses:
        cfg, size = config(loss), 1 if loss == "tdpo2" else len(pairs)
        ref = Reference(reference, *(partial(function, reference, cfg=cfg) for function in
                                     (train.hidden_states, train.response_logps)))
        plain = [plain_loss(model, other, pair, cfg) for pair in pairs]
        sum(plain).backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        batches = [collate(pairs.pairs[i:i + size]) for i in range(0, len(pairs), size)]
        found = torch.cat([train.step(policy, ref, x, LOSSES[loss], 1.0, cfg)["loss"] for x in batches])
        off[0] = max(off[0], (found / torch.stack(plain).detach() - 1).abs().max().item())
        for name, p in model.named_parameters():
            g, e = (torch.zeros_like(p) if x is None else x for x in (p.grad, expected.get(name)))
            off[1] = max(off[1], ((g - e).abs().max() / e.abs().max().clamp(min=1e-6)).item())
        model.zero_grad(set_to_none=True)
    return "one" if policy.shared else "two", *off

def main(names):
    names = names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) + HOW["variants"]
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {date.today()}\n")
    print("| model type | rows a pair | loss | gradients | refused |\n|---|---|---|---|---|")
    for name in names:
        cells, why = ["", "", ""], "not built here"
        try:
            with float64_throughout():
                models, why = (tiny(name), tiny(name, 1)), "a traceback"
                cells, why = [f"{x:.0e}" if type(x) is float else x for x in compare(*models)], ""
        except Exception as e:
            why = f"{e}"[2:] if isinstance(e, ConfigError) else f"{why}: {type(e).__name__}: {e}"
        print(f"| {name} | {' | '.join(cells)} | {' '.join(why.split()):.240} |", flush=True)

if __name__ == "__main__":
    main(sys.argv[1:])
