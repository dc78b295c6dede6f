"""ports/jax_losses.py gives every golden result, gradients included, in float64 and float32, under jit."""

import itertools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from golden import check, make

jax = pytest.importorskip("jax", reason="needs jax: pip install 'jax[cpu]'")
jax.config.update("jax_disable_most_optimizations", True)  # compiling is nearly all of this test's time

import jax.numpy as jnp  # noqa: E402

from ports.jax_losses import loss_of, selected, sums  # noqa: E402

GOLDEN = load_file(make.HERE / "vectors.safetensors")
KNOBS = json.loads((make.HERE / "vectors.json").read_text())["losses"]
REGIMES = sorted({name.split("/")[1] for name in GOLDEN})
SIDES = ("chosen", "rejected")


def gpt(p, ids, n_head=2):
    """The logits (B, T, V) of the GPT-2 with these parameters by name, as regime gpt has them."""
    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    B, T = ids.shape
    x = p["/wte.weight"][ids] + p["/wpe.weight"][:T]
    for h in sorted({".".join(name.split(".")[:2]) for name in p if name.startswith("/h.")}):
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn").reshape(B, T, 3, n_head, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # (B, T, H, D)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
        scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)
        seen = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(B, T, -1)
        x = x + linear(seen, f"{h}.attn.c_proj")
        x = x + linear(jax.nn.gelu(linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")), f"{h}.mlp.c_proj")
    return norm(x, "/ln_f") @ p["/wte.weight"].T


@jax.jit
def results(x):
    """Every golden result of a regime, by its name there, from the inputs by theirs."""
    sides = {side: {name.removeprefix(f"{side}_"): t for name, t in x.items() if name.startswith(f"{side}_")}
             | {name: x[name] for name in ("aspect_max", "aspect_weights")} for side in SIDES}
    if "chosen_logits" in x:
        policy, reference = ({f"_{side}_logits": x[f"{ref}{side}_logits"] for side in SIDES}
                             for ref in ("", "ref_"))
    else:  # two models
        policy, reference = ({name.removeprefix(which): t for name, t in x.items() if name.startswith(which)}
                             for which in ("policy", "reference"))

    def logits(p):
        """Of chosen and of rejected."""
        if "_chosen_logits" in p:
            return [p[f"_{side}_logits"] for side in SIDES]
        return jnp.split(gpt(p, jnp.concatenate([x[f"{side}_ids"] for side in SIDES])), 2)

    def totals(p):
        """The sum of each loss, (losses,), and what they are made of."""
        w, l_ = (sums(sides[side], *z) for side, *z in zip(SIDES, logits(p), logits(reference), strict=True))
        return jnp.stack([loss_of(name, w, l_, **knobs).sum() for name, knobs in KNOBS.items()]), (w, l_)

    by_parameter, (w, l_) = jax.jacrev(totals, has_aux=True)(policy)
    out = {}
    for side, q in zip(SIDES, (w, l_), strict=True):
        out |= {f"ref_{side}_{name[4:]}" if name.startswith("ref_") else f"{side}_{name}": t
                for name, t in q.items() if name != "has"}
    *index, paired = selected(w["rewards"], l_["rewards"], w["has"], l_["has"])
    out |= {f"{side}_selected": jnp.where(paired, i, -1) for side, i in zip(SIDES, index, strict=True)}

    for name, knobs in KNOBS.items():
        out[f"{name}/loss"], pull = jax.vjp(lambda w, l_, n=name, k=knobs: loss_of(n, w, l_, **k), w, l_)
        grads = pull(jnp.ones_like(out[f"{name}/loss"]))  # of the sum over the pairs
        for side, g, q in zip(SIDES, grads, (w, l_), strict=True):
            if name != "sft" or side == "chosen":
                out[f"{name}/grad_{side}_logps"] = g["segment_logps" if name.startswith("2d") else "logps"]
            if name.startswith("tdpo"):
                out[f"{name}/grad_{side}_seq_kl"] = g["seq_kl"]
            if name.startswith(("dpo", "tdpo")):
                out[f"{name}/{side}_reward"] = knobs["beta"] * (q["logps"] - q["ref_logps"])

    for parameter, grads in by_parameter.items():  # (losses, ...)
        out |= {f"{name}/grad{parameter}": g for name, g in zip(KNOBS, grads, strict=True)
                if (name, parameter) != ("sft", "_rejected_logits")}
    return out


def padded(t, name, shape):
    """A tensor with more padding, so that one compilation serves all regimes."""
    fill = -1 if name.endswith("segments") else 1 if name == "aspect_max" else 0
    return np.pad(t, [(0, to - n) for n, to in zip(t.shape, shape, strict=True)], constant_values=fill)


@pytest.fixture(scope="module")
def theirs():
    inputs = {regime: {} for regime in REGIMES}
    for name, t in GOLDEN.items():
        if name.startswith("input/"):
            _, regime, short = name.split("/", 2)
            inputs[regime][short] = t
    given = [x for x in inputs.values() if "chosen_logits" in x]
    shapes = {name: np.max([x[name].shape for x in given], axis=0) for name in given[0]}
    found = {}
    with jax.enable_x64(True):
        for dtype, (regime, x) in itertools.product(("float64", "float32"), inputs.items()):
            x = {name: t.astype(dtype) if t.dtype.kind == "f" else t for name, t in x.items()}
            if "chosen_logits" in x:
                x = {name: padded(t, name, shapes[name]) for name, t in x.items()}
            for name, t in results(x).items():
                name = f"{dtype}/{regime}/{name}"
                found[name] = np.ascontiguousarray(t)[tuple(map(slice, GOLDEN[name].shape))].copy()
    return found


@pytest.mark.slow
def test_every_golden_result_is_there_and_right(theirs, tmp_path, capsys):
    save_file(theirs, tmp_path / "theirs.safetensors")
    assert set(theirs) == {name for name in GOLDEN if not name.startswith("input/")}
    status = check.main([str(tmp_path / "theirs.safetensors")])
    assert status == 0, "\n".join(line for line in capsys.readouterr().out.splitlines() if line[:2] != "ok")
