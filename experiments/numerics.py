"""Rounding, before and after: sums in float64, the gradient of a whole step, and ties of 2D-DPO's rewards.

    python experiments/numerics.py [--draws N]      a table, and results/numerics.json

"float32" and "grid" are what losses.py did until af6f8a2; the rest is what it does.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from common import HERE, commit, markdown, table
from replay import CFG, data, losses, train

from model import GPT, GPTConfig
from plumbing.reference import Reference

def float32_sum(values, segment, num):
    return values.new_zeros(num).index_add(0, segment, values)

def grid_ascending(values, mask):
    return torch.where(mask, (values * 1e5).round(), torch.inf).argsort(dim=-1, stable=True)

def sum_error(segment_sum, tokens, draws):
    """Error of rho, nats: (mean size, largest) over draws of token log-probabilities in float32."""
    generator, errors = torch.Generator().manual_seed(tokens), []
    for _ in range(draws):
        logps = -3 * torch.rand(2, tokens, generator=generator).log().abs()  # policy and reference
        where = torch.zeros(tokens, dtype=torch.long)
        rho = float(segment_sum(logps[0], where, 1) - segment_sum(logps[1], where, 1))
        errors.append(abs(rho - math.fsum([*logps[0].tolist(), *(-logps[1]).tolist()])))
    return float(np.mean(errors)), max(errors)

def gradient_error(name, segment_sum, tokens, pairs=4, **knobs):
    """A whole float32 step against the same step in float64: |g - g64| / |g64| over all parameters."""
    rng, grads = np.random.default_rng(0), {}
    drawn = [data.Pair(rng.integers(0, 64, 8, dtype=np.int32),
                       *(rng.integers(0, 64, n, dtype=np.int32) for n in (tokens, tokens)),
                       *(np.zeros(n, dtype=np.int32) for n in (tokens, tokens)), *[np.zeros((1, 0))] * 2)
             for _ in range(pairs)]
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        policy, model = (GPT(GPTConfig(64, tokens + 8, 2, 2, 32)) for _ in range(2))
        model.load_state_dict({k: p + 2e-4 * torch.randn_like(p) for k, p in policy.state_dict().items()})
        policy, model = policy.to(dtype), model.to(dtype)
        cfg = replace(CFG, loss=name, settings=knobs)
        reference = Reference(model, lambda b, m=model: train.hidden_states(m, b, CFG),
                              lambda b, m=model: train.response_logps(m, b, CFG))
        with mock.patch.object(data, "segment_sum", segment_sum):
            train.step(policy, reference, data.collate(drawn), losses.LOSSES[name], 1 / pairs, cfg)
        grads[dtype] = torch.cat([p.grad.flatten().double() for p in policy.parameters()])
    right = grads[torch.float64]
    return float((grads[torch.float32] - right).norm() / right.norm())

def ties(ascending, dtype, draws, segments=6, pairs=40):
    """(segments out of exact order, segments tried): W of up to 4 decimals, maxima up to 100. Only pairs of
    responses count whose different exact rewards are at least 2e-5 apart."""
    rng, wrong, tried = np.random.default_rng(1), 0, 0
    for _ in range(draws):
        A, step = int(rng.integers(2, 6)), int(rng.choice([1, 25, 125, 500, 2000]))  # coarse W have more ties
        cuts = np.sort(rng.integers(0, 10**4 // step + 1, A - 1)) * step
        w = np.diff(cuts, prepend=0, append=10**4)  # W in units of 10^-4
        top = np.full(A, rng.choice([1, 4, 5, 16, 100])) if rng.random() < 0.5 else rng.integers(1, 101, A)
        scores = np.floor(rng.random((pairs, 2, segments, A)) * (top + 1)).astype(np.int64)
        unit = math.lcm(*top.tolist())
        exact = (scores * (w * (unit // top))).sum(-1)  # integers, (pairs, 2, S)
        gaps = np.diff(np.sort(exact, axis=-1), axis=-1)
        clear = ((gaps == 0) | (gaps >= 2e-5 * unit * 10**4)).all((1, 2))
        W = torch.tensor(w / 10**4, dtype=dtype)
        rewards = losses.segment_rewards(torch.tensor(scores / top, dtype=dtype), W).unbind(1)
        with mock.patch.object(losses, "ascending", ascending):
            found = losses.select_segments(*rewards, *[torch.ones_like(rewards[0], dtype=torch.bool)] * 2)
        best, worst = (np.argsort(x, axis=-1, kind="stable") for x in (-exact[:, 0], exact[:, 1]))
        wrong += int(sum((i.numpy() != x)[clear].sum() for i, x in zip(found, (best, worst), strict=False)))
        tried += int(clear.sum()) * 2 * segments
    return wrong, tried

def measure(draws, tokens=(256, 1024, 4096)):
    rows, sums = [], {"float32": float32_sum, "float64": losses.segment_sum}
    for n in tokens:
        found = [sum_error(f, n, draws) for f in sums.values()]
        rows.append([f"ρ of {n} tokens, nats: mean (largest) error",
                     *(f"{mean:.1e} ({most:.1e})" for mean, most in found)])
    for name, knobs in (("dpo", {"beta": 0.1}), ("dpop", {"beta": 0.3, "lam": 5.0})):
        found = [gradient_error(name, f, tokens[1], **knobs) for f in sums.values()]
        rows.append([f"gradient of a float32 step, {name.upper()}, responses of {tokens[1]} tokens: relative "
                     "error", *(f"{x:.1e}" for x in found)])
    for dtype in (torch.float32, torch.float64):
        found = [ties(f, dtype, draws) for f in (grid_ascending, losses.ascending)]
        rows.append([f"segments out of exact order, {str(dtype)[6:]}",
                     *(f"{wrong} of {tried}" for wrong, tried in found)])
    return {"made": {"commit": commit(), "torch": torch.__version__, "draws": draws}, "tables": [table(
        f"{draws} draws each; ties: W of up to 4 decimals, maxima up to 100, exact rewards equal or at least "
        "2e-5 apart", ["", "float32 sums, ties on a grid (af6f8a2)", "float64 sums, ties by gaps"], rows)]}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=200)
    torch.set_num_threads(1)
    found = measure(parser.parse_args().draws)
    (HERE / "results" / "numerics.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    sys.stdout.write(markdown(found))
