"""DPOP in bfloat16 against float32: wrong gates, the gradient's error, and what becomes of the policy.

    python experiments/bfloat16.py [--store FOLDER] [--math FILE]     results/bfloat16.json

Autocast on the CPU, float32 weights, as train.py's --dtype bfloat16. The toy reviews, and with --math a file
of worked solutions over the toy's vocabulary, on a small model of its own. Outcomes are measured in float32.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import FULL, HERE, ROOT, cell, commit, markdown, table, versus
from replay import CFG, TOKENIZER, data, encoded, losses, quiet, reference_folder, train

from model import GPT
from plumbing.reference import Reference

PROBES = (0, 2, 9, 19)  # steps at which the gradient in both dtypes is compared, at the same weights
OUTCOMES = {"logratio/chosen": 2, "rewards/accuracies": 3, "kl/ref_policy_chosen": 2}  # metric: digits

def reference_of(folder, cfg):
    model = GPT.from_pretrained(str(folder)).requires_grad_(False)
    return Reference(model, lambda b: train.hidden_states(model, b, cfg),
                     lambda b: train.response_logps(model, b, cfg))

def step(policy, reference, batches, n, cfg):
    """(gradient of a step, rho_w by pair), as cfg computes them."""
    policy.zero_grad(set_to_none=True)
    rows = [train.step(policy, reference, b, losses.LOSSES[cfg.loss], 1 / n, cfg) for b in batches]
    terms = train.joined(rows, n)
    rho = terms["chosen_logps"] - terms["ref_chosen_logps"]
    return torch.cat([p.grad.flatten() for p in policy.parameters()]).double(), rho[terms["pair"].argsort()]

def run(folder, pairs, val, steps, batch_size, seed, **changes):
    """Train with the losses of `changes` -> {"wrong": share of wrong gates and "error": of the gradient, at
    PROBES; metrics of the held-out pairs at the end}."""
    cfg = replace(CFG, lr=FULL.run.lr, **changes)
    exact, policy = replace(cfg, dtype="float32"), GPT.from_pretrained(str(folder))
    reference, exact_reference = (reference_of(folder, c) for c in (cfg, exact))
    optimizer, found = train.make_optimizer(policy, cfg), {"wrong": [], "error": []}
    for i in range(steps):
        index = data.step_indices(len(pairs), batch_size, seed, i)
        batches = list(train.batches(pairs, index, cfg))
        if i in PROBES and cfg.dtype != "float32":
            right, rho = step(policy, exact_reference, batches, len(index), exact)
            gradient, noisy = step(policy, reference, batches, len(index), cfg)
            found["wrong"].append(float(((rho < 0) != (noisy < 0)).double().mean()))
            found["error"].append(float((gradient - right).norm() / right.norm()))
        else:
            step(policy, reference, batches, len(index), cfg)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (i + 1) / 10)
        optimizer.step()
    return found | train.evaluate(policy, exact_reference, val, exact)

def of_math(path, seed, aside):
    """(folder of an SFT model, training pairs, held-out pairs) of a file of pairs."""
    pairs, val = data.hold_out(data.load((str(path),), data.Tokenizer(str(TOKENIZER)), 512)[0], at_most=64)
    with quiet():
        train.main(f"--loss sft --data {path} --tokenizer {TOKENIZER} --device cpu --out_dir {aside}/{seed} "
                   f"--steps 60 --lr 2e-3 --batch_size 16 --seed {seed} --n_layer 2 --n_embd 64 "
                   "--block_size 512 --eval_every 0 --save_every 0".split())
    return Path(aside, str(seed)), pairs.without_scores(), val.without_scores()

def measure(store, math_file, seeds=FULL.seeds, steps=40, math_seeds=(0, 1), math_steps=20):
    worlds = {"reviews": [(reference_folder(replace(FULL.reviews, seed=seed), store),
                           *(x.without_scores() for x in encoded(replace(FULL.reviews, seed=seed))[1:3]))
                          for seed in seeds]}
    sizes = {"reviews": (steps, 32), "math": (math_steps, 8)}
    numbers = {}
    with tempfile.TemporaryDirectory() as aside:
        if math_file:
            worlds["math"] = [of_math(math_file, seed, aside) for seed in math_seeds]
        for world, places in worlds.items():
            for loss, settings in (("dpo", {"beta": 0.3}), ("dpop", {"beta": 0.3, "lam": 5.0}),
                                   ("dpop", {"beta": 0.3, "lam": 50.0})):
                name = loss.upper() + (f", λ {settings['lam']:g}" if "lam" in settings else "")
                for dtype in ("float32", "bfloat16"):
                    numbers[f"{world}, {name}, {dtype}"] = [
                        run(*place, *sizes[world], seed, loss=loss, settings=settings, dtype=dtype)
                        for seed, place in enumerate(places)]
                    print(world, name, dtype, flush=True)
    return {"numbers": numbers, "sizes": sizes, "made": {"commit": commit(), "torch": torch.__version__}}

def report(s):
    probes, rows = [], []
    for name, runs in s["numbers"].items():
        if name.endswith("bfloat16"):
            label, base = name.rpartition(",")[0], s["numbers"][name.replace("bfloat16", "float32")]
            probes.append([label, *("; ".join(f"{100 * np.mean([r[key][i] for r in runs]):.0f} %" for key in
                                              ("wrong", "error")) for i in range(len(runs[0]["wrong"])))])
            pairs = {key: ([r[key] for r in runs], [r[key] for r in base]) for key in OUTCOMES}
            rows.append([label, *(f"{cell(b, n)} → {cell(a, n)}; {versus(a, b, n)}"
                                  for n, (a, b) in zip(OUTCOMES.values(), pairs.values(), strict=True))])
    return {"tables": [
        table("bfloat16 at the same weights as float32, mean over seeds: pairs whose gate 1[ρ_w < 0] is "
              "wrong; relative error of the gradient", ["", *(f"step {i + 1}" for i in PROBES)], probes),
        table("Held-out pairs at the end, float32 → bfloat16; the difference paired by seed. "
              + "; ".join(f"{world}: {n} steps of {size} pairs" for world, (n, size) in s["sizes"].items()),
              ["", "log-ratio of chosen, nats", "accuracy", "KL of chosen, nats"], rows)]}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=ROOT / "out" / "claims" / "runs")
    parser.add_argument("--math", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.store.mkdir(parents=True, exist_ok=True)
    found = measure(args.store, args.math)
    found |= report(found)
    (HERE / "results" / "bfloat16.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(markdown(found))
