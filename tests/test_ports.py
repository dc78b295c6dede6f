"""ports/jax_losses.py and ports/mlx_losses.py give every golden result, gradients included, in float64."""

import importlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from golden import check, make, pipeline

GOLDEN = load_file(make.HERE / "vectors.safetensors")
KNOBS = json.loads((make.HERE / "vectors.json").read_text())["losses"]
REGIMES = list(make.REGIMES)
SIDES = ("chosen", "rejected")

def gpt_logits(weights, ids, xp):
    """GPT-2 from its matrices, by name, stored (out, in): (B, T) -> (B, T, V). xp: a library like NumPy."""
    T, C = ids.shape[1], weights["wte.weight"].shape[1]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / xp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def heads(x):                                                # (B, T, C) -> (B, H, T, D)
        return x.reshape(*x.shape[:2], pipeline.N_HEAD, -1).swapaxes(1, 2)

    x = weights["wte.weight"][ids] + weights["wpe.weight"][:T]
    for block in sorted({name[:3] for name in weights if name.startswith("h.")}):
        y = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        q, k, v = (heads(y[..., i * C:(i + 1) * C]) for i in range(3))
        scores = q @ k.swapaxes(2, 3) / (C / pipeline.N_HEAD) ** 0.5
        scores = xp.where(xp.tril(xp.ones((T, T))) > 0, scores, -1e9)  # causal
        scores = xp.e ** (scores - scores.real.max(-1, keepdims=True))
        y = (scores / scores.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(x.shape)
        x = x + linear(y, f"{block}.attn.c_proj")
        y = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        y = 0.5 * y * (1 + xp.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y * y * y)))
        x = x + linear(y, f"{block}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["wte.weight"].T

def results(port, xp, grad, x):
    """Every golden result of a regime by name, from its inputs by name, arrays of the library xp."""
    if "repeat" in x:
        x = x | {name.removeprefix("period/"): xp.concatenate([t] * int(x["repeat"]), 1)
                 for name, t in x.items() if name.startswith("period/")}
    sides = [{name.removeprefix(f"{side}_"): t for name, t in x.items() if name.startswith(f"{side}_")}
             | {name: x[name] for name in ("aspect_max", "aspect_weights")} for side in SIDES]

    def parameters(which):                                       # logits, or those of a model
        if "chosen_logits" in x:
            return {f"_{side}_logits": x[f"{'ref_' * (which == 'reference')}{side}_logits"] for side in SIDES}
        starts = (f"{which}/", "model/")
        return {"/" + name.split("/")[1]: t for name, t in x.items() if name.startswith(starts)}

    def both(policy, reference):
        """What the losses are made of, for chosen and for rejected."""
        found = []
        for side, inputs in zip(SIDES, sides, strict=True):
            z, z_ref = (p[f"_{side}_logits"] if "chosen_logits" in x else gpt_logits(
                {name[1:]: t for name, t in p.items()}, inputs["ids"], xp) for p in (policy, reference))
            found.append(port.sums(inputs, z, z_ref))
        return found

    def rewards(name, found):
        if name not in ("dpo", "dpop", "tdpo1", "tdpo2"):
            return {}
        return {f"{name}/{side}_reward": KNOBS[name]["beta"] * (q["logps"] - q["ref_logps"])
                for side, q in zip(SIDES, found, strict=True)}

    policy, reference, out = parameters("policy"), parameters("reference"), {}
    slopes = {name: grad(lambda p, name=name, knobs=knobs: port.loss_of(
        name, *both(p, reference), **knobs).sum())(policy) for name, knobs in KNOBS.items()}
    if "rate" in x:                                              # each loss after a step of gradient descent
        for name in KNOBS:
            found = both({k: t - x["rate"] * slopes[name][k] for k, t in policy.items()}, reference)
            out |= {f"{name}/loss": port.loss_of(name, *found, **KNOBS[name])} | rewards(name, found)
        return out
    found = both(policy, reference)
    for side, q in zip(SIDES, found, strict=True):
        out |= {f"ref_{side}_{name[4:]}" if name.startswith("ref_") else f"{side}_{name}": t
                for name, t in q.items() if name != "has"}
    *index, paired = port.selected(*(q[k] for k in ("rewards", "has") for q in found))
    out |= {f"{side}_selected": xp.where(paired, i.astype(xp.int64), -1)
            for side, i in zip(SIDES, index, strict=True)}
    for name, knobs in KNOBS.items():
        out |= {f"{name}/loss": port.loss_of(name, *found, **knobs)} | rewards(name, found)
        arguments = [{k: t for k, t in q.items() if k in ("logps", "segment_logps", "seq_kl")} for q in found]
        pulled = grad(lambda both, name=name, knobs=knobs: port.loss_of(
            name, *(q | a for q, a in zip(found, both, strict=True)), **knobs).sum())(arguments)
        for side, g in zip(SIDES, pulled, strict=True):
            out |= {f"{name}/grad_{side}_logps": g["segment_logps" if name.startswith("2d") else "logps"],
                    f"{name}/grad_{side}_seq_kl": g["seq_kl"]}
        out |= {f"{name}/grad{parameter}": g for parameter, g in slopes[name].items()}
    return out

def compare(results, tmp_path, capsys, dtype, regimes):
    """results: a function of a regime's inputs, NumPy arrays; it may give more padding than golden."""
    theirs = {}
    for regime in regimes:
        x = {name.split("/", 2)[2]: t for name, t in GOLDEN.items() if name.startswith(f"input/{regime}/")}
        x = {name: t.astype(dtype) if t.dtype.kind == "f" else t for name, t in x.items()}
        for name, t in results(x).items():
            name = f"{dtype}/{regime}/{name}"
            if name in check.golden():
                theirs[name] = np.array(t)[tuple(map(slice, check.golden()[name].shape))].copy()
    save_file(theirs, tmp_path / "theirs.safetensors")
    assert set(theirs) == {name for name in check.golden()
                           if name.startswith(dtype) and name.split("/")[1] in regimes}
    status = check.main([str(tmp_path / "theirs.safetensors")])
    assert status == 0, "\n".join(line for line in capsys.readouterr().out.splitlines() if line[:2] != "ok")

@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_mlx_gives_every_golden_result(dtype, tmp_path, capsys):
    """In float32 all but the sums over thousands of tokens."""
    mx = pytest.importorskip("mlx.core", reason="needs mlx: pip install 'mlx[cpu]'")
    mx.set_default_device(mx.cpu)
    port = importlib.import_module("ports.mlx_losses")

    def of(x):
        dtypes = {name: getattr(mx, "bool_" if t.dtype == bool else str(t.dtype)) for name, t in x.items()}
        return results(port, mx, mx.grad, {name: mx.array(t, dtypes[name]) for name, t in x.items()})

    compare(of, tmp_path, capsys, dtype, [r for r in REGIMES if dtype == "float64" or r != "thousands"])

@pytest.mark.slow
def test_jax_gives_every_golden_result_of_given_logits(tmp_path, capsys):
    """Rows, segments and aspects are padded to one shape: compiling is nearly all of this test's time."""
    jax = pytest.importorskip("jax", reason="needs jax: pip install 'jax[cpu]'")
    jax.config.update("jax_disable_most_optimizations", True)
    port = importlib.import_module("ports.jax_losses")
    regimes = [r for r in REGIMES if f"input/{r}/chosen_logits" in GOLDEN and r != "vocabulary"]
    names = {name.split("/", 2)[2] for name in GOLDEN if name.startswith("input/ids/")}
    shapes = {name: np.max([GOLDEN[f"input/{r}/{name}"].shape for r in regimes], 0) for name in names}
    jitted = jax.jit(lambda x: results(port, jax.numpy, jax.grad, x))

    def of(x):
        fill = {"aspect_max": 1, "chosen_segments": -1, "rejected_segments": -1}
        return jitted({name: np.pad(t, [(0, to - n) for n, to in zip(t.shape, shapes[name], strict=True)],
                                    constant_values=fill.get(name, 0)) for name, t in x.items()})

    with jax.enable_x64(True):
        compare(of, tmp_path, capsys, "float64", regimes)
