"""golden/: the vectors are what losses.py gives; a NumPy port equals them; a broken one is told its mistake.

The port below shares no line with losses.py, model.py or the golden pipeline: NumPy, loops over segments in
Python, gradients by the complex step: f(x + i eps) = f(x) + i eps f'(x), exact to rounding; stop-gradient is
the real part.
"""

import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from golden import check, make, mistakes, pipeline

GOLDEN = load_file(make.HERE / "vectors.safetensors")
EPS = 1e-30


# ---------------------------------------------------------------------------------------------------------
# The port: one choice a function. RIGHT is the right choice of each; a broken port replaces one or two.


def log_softmax(x):
    x = x - x.real.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def softmax(x):
    return np.exp(log_softmax(x))


def pick(values, ids):
    return np.take_along_axis(values, ids[..., None], -1)[..., 0]


def kl_of(log_softmax):
    def kl(z_ref, z, ids):
        log_q, log_s = log_softmax(z_ref), log_softmax(z)
        return (np.exp(log_q) * (log_q - log_s)).sum(-1)
    return kl


def shift(z):
    return np.concatenate([0 * z[:, :1], z[:, :-1]], 1)


def total(values, mask):
    return np.where(mask, values, 0).sum(1)


def mean(values, mask):
    return total(values, mask) / np.maximum(mask.sum(1), 1)


def per_segment(reduce):
    return lambda values, segments, S: np.stack([reduce(values, segments == k) for k in range(S)], 1)


def nls(h):
    """-log sigma(h), for complex h too."""
    return np.where(h.real < 0, -h, 0) + np.log1p(np.exp(np.where(h.real < 0, h, -h)))


def relu(x):
    return np.where(x.real > 0, x, 0)


def sg(x):
    return np.real(x)


def rising(r):
    return sorted(range(len(r)), key=lambda k: r[k])


def falling(r):
    return sorted(range(len(r)), key=lambda k: -r[k])


def picks(chosen, rejected, digits=5):
    """Pairs of segments: n of r_w in one order against n of r_l in another, ties as they come."""
    def select(r_w, r_l, n):
        r_w, r_l = ([round(x, digits) for x in r] for r in (r_w, r_l))
        return list(zip(chosen(r_w)[:n], rejected(r_l)[:n], strict=True))
    return select


select = picks(falling, rising)


def gpt_logits(weights, ids, xp=np):
    """GPT-2 from its matrices, by name, stored (out, in): (B, T) -> (B, T, V). xp: numpy, or a library like it."""
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


def weights_of(inputs, ref):
    start = "reference/" if ref else "policy/"
    return {name.removeprefix(start): x.astype(np.float64) for name, x in inputs.items()
            if name.startswith(start)}


def logits_of(inputs, ref, side):
    if "chosen_logits" in inputs:
        return inputs[f"{ref}{side}_logits"].astype(np.float64)
    return gpt_logits(weights_of(inputs, ref), inputs[f"{side}_ids"])


RIGHT = dict(
    shift=shift,
    scored=lambda ids, mask: mask,
    kl_scored=lambda ids, mask: None,                            # None: where the tokens are scored
    logp=lambda z, ids: pick(log_softmax(z), ids),
    kl=kl_of(log_softmax),
    total=total, kl_total=total, per_segment=per_segment(total),
    segments=lambda segments, mask: segments,
    scale=lambda scores, top, present: scores / top,
    weigh=lambda scores, W: scores @ W,
    implicit=lambda rho, logp, K, penalty, beta: beta * rho,
    policy=lambda x: x, kl_gradient=1, per_pair=lambda gradient: gradient,
    nls=nls, order=lambda args: args, beta=lambda beta: beta, outside=lambda loss, beta: loss,
    sft=lambda c: -c,
    dpop=lambda c, r, b, k, p: nls(b * (c - r - k * relu(-c))),  # b beta, k lam
    tdpo1=lambda u, K_w, K_l, beta: u - beta * (K_l - K_w),
    tdpo2=lambda u, K_w, K_l, beta, alpha: u - alpha * (beta * K_l - sg(beta * K_w)),
    read_rewards=lambda r_w, r_l, m_w, m_l: (r_w, r_l), weight=lambda r_l: r_l,
    vanilla=lambda r_w, c, r_l, r, beta, m_w, m_l: beta * (r_w * c).sum(1) - beta * (r_l * r).sum(1),
    select=select, number=lambda n, smallest, K: n,
    margin=lambda a, b, beta: beta * (a - b),
    combine=lambda p, h, alone: p.nls(h).sum(),
)


def dpo(p, c, r, ref_w, ref_l, *, beta):
    return p.nls(beta * (c - ref_w) - beta * (r - ref_l))


def dpop(p, c, r, ref_w, ref_l, *, beta, lam):
    if p.dpop is RIGHT["dpop"]:                                  # so that a wrong p.nls is seen here too
        return p.nls(beta * (c - ref_w - (r - ref_l) - lam * relu(ref_w - c)))
    p.win = c - r
    return p.dpop(c - ref_w, r - ref_l, beta, lam, p)


def tdpo1(p, c, r, ref_w, ref_l, K_w, K_l, *, beta):
    return p.nls(p.tdpo1(beta * (c - ref_w - r + ref_l), K_w, K_l, beta))


def tdpo2(p, c, r, ref_w, ref_l, K_w, K_l, *, beta, alpha):
    return p.nls(p.tdpo2(beta * (c - ref_w - r + ref_l), K_w, K_l, beta, alpha))


def vanilla(p, c, r, ref_w, ref_l, r_w, r_l, m_w, m_l, *, beta):
    r_w, r_l = p.read_rewards(r_w, r_l, m_w, m_l)
    r_w, r_l = np.where(m_w, r_w, 0), np.where(m_l, p.weight(r_l), 0)
    return p.nls(p.vanilla(r_w, c - ref_w, r_l, r - ref_l, beta, m_w, m_l))


def group(p, c, r, ref_w, ref_l, r_w, r_l, m_w, m_l, *, beta):
    r_w, r_l = p.read_rewards(r_w, r_l, m_w, m_l)
    sizes = np.stack([m_w.sum(1), m_l.sum(1)], 1)                # (B, 2)
    losses, K = [], min(c.shape[1], r.shape[1])
    for b, (S_w, S_l) in enumerate(sizes):
        n = p.number(min(S_w, S_l), sizes.min(), K)
        pairs = p.select(r_w[b, :S_w].tolist(), r_l[b, :S_l].tolist(), n)
        up, down = r_w[b] * (c[b] - ref_w[b]), p.weight(r_l[b]) * (r[b] - ref_l[b])
        alone = [beta * up[i] for i in range(S_w) if i not in {i for i, _ in pairs}]
        alone += [-beta * down[j] for j in range(S_l) if j not in {j for _, j in pairs}]
        losses.append(p.combine(p, np.array([p.margin(up[i], down[j], beta) for i, j in pairs]), alone))
    return np.array(losses)


def port(inputs, wrong=None, logit_gradients=True, logits=None):
    """All golden results of one regime, name -> array, in float64; `wrong` replaces entries of RIGHT.

    logits(ref, side) replaces the regime's own logits, by complex ones: then gradients are left out.
    """
    at_logits = logits or (lambda ref, side: logits_of(inputs, ref, side))
    p = SimpleNamespace(**RIGHT | (wrong or {}))
    q, out, inside = {}, {}, {}
    for side in ("chosen", "rejected"):
        ids, mask, segments = (inputs[f"{side}_{x}"] for x in ("ids", "response_mask", "segments"))
        S = inputs[f"{side}_scores"].shape[1]
        z, z_ref = (p.shift(at_logits(ref, side)) for ref in ("", "ref_"))
        scored = p.scored(ids, mask)
        at = p.kl_scored(ids, mask)
        at = scored if at is None else at
        where = p.segments(segments, mask)
        for ref, x in (("", z), ("ref_", z_ref)):
            tokens = np.where(scored, p.logp(x, ids), 0)
            q[f"{ref}{side}_token_logps"] = tokens
            q[f"{ref}{side}_logps"] = p.total(tokens, scored)
            q[f"{ref}{side}_segment_logps"] = p.per_segment(tokens, where, S)
        q[f"{side}_token_kl"] = np.where(at, p.kl(z_ref, z, ids), 0)
        q[f"{side}_seq_kl"] = p.kl_total(q[f"{side}_token_kl"], at)
        inside[side] = (segments[..., None] == np.arange(S)).any(1)  # (B, S)
        scores = p.scale(inputs[f"{side}_scores"].astype(np.float64), inputs["aspect_max"], inside[side])
        q[f"{side}_rewards"] = p.weigh(scores, inputs["aspect_weights"])
    out |= q
    p.tokens = q["chosen_token_logps"] - q["ref_chosen_token_logps"]
    sequence = [q[f"{ref}{side}_logps"] for ref in ("", "ref_") for side in inside]
    kls = [q[f"{side}_seq_kl"] for side in inside]
    two_d = [q[f"{ref}{side}_segment_logps"] for ref in ("", "ref_") for side in inside]
    two_d += [q[f"{side}_rewards"] for side in inside] + list(inside.values())
    for name, loss, args in (("sft", None, sequence[:1]), ("dpo", dpo, sequence), ("dpop", dpop, sequence),
                             ("tdpo1", tdpo1, sequence + kls), ("tdpo2", tdpo2, sequence + kls),
                             ("2d-dpo-vanilla", vanilla, two_d), ("2d-dpo", group, two_d)):
        knobs = dict(pipeline.HYPER[name])

        def value(args, name=name, loss=loss, knobs=knobs):
            if name == "sft":
                return p.sft(args[0])
            used = p.order([p.policy(args[0]), p.policy(args[1]), *args[2:]])
            return p.outside(loss(p, *used, **knobs | {"beta": p.beta(knobs["beta"])}), knobs["beta"])

        out[f"{name}/loss"] = value(args)
        if logits:
            continue
        sides = ["chosen"] if name == "sft" else ["chosen", "rejected"]
        gradients = {f"{side}_logps": p.per_pair(complex_step(value, args, i))
                     for i, side in enumerate(sides)}
        if name.startswith("tdpo"):
            gradients |= {f"{side}_seq_kl": p.per_pair(complex_step(value, args, 4 + i))
                          for i, side in enumerate(sides)}
        out |= {f"{name}/grad_{key}": gradient for key, gradient in gradients.items()}
        for side in sides:
            if logit_gradients:
                out[f"{name}/grad_{side}_logits"] = through_logits(inputs, side, gradients, p.kl_gradient)
            if name in ("dpo", "dpop", "tdpo1", "tdpo2"):
                rho = q[f"{side}_logps"] - q[f"ref_{side}_logps"]
                penalty = knobs["lam"] * relu(-rho) if (name, side) == ("dpop", "chosen") else 0
                out[f"{name}/{side}_reward"] = p.implicit(
                    rho, q[f"{side}_logps"], q[f"{side}_seq_kl"], penalty, knobs["beta"])
    return out


def complex_step(value, args, i):
    """The gradient of each pair's loss in args[i], (B,) or (B, S)."""
    gradient = np.zeros_like(args[i])
    for k in np.ndindex(gradient.shape[1:]):
        step = np.zeros_like(args[i], dtype=complex)
        step[(slice(None), *k)] = EPS * 1j
        gradient[(slice(None), *k)] = np.imag(value([*args[:i], args[i] + step, *args[i + 1:]])) / EPS
    return gradient


def through_logits(inputs, side, gradients, kl_gradient):
    """d loss / d logits by hand: log-probabilities give e - s, the KL gives s - q, one column to the left."""
    ids, mask = inputs[f"{side}_ids"], inputs[f"{side}_response_mask"]
    s, q = (softmax(logits_of(inputs, ref, side)[:, :-1]) for ref in ("", "ref_"))
    g = gradients[f"{side}_logps"]
    segments = np.maximum(inputs[f"{side}_segments"], 0)
    g = g[:, None] if g.ndim == 1 else np.take_along_axis(g, segments[:, 1:], 1)
    gradient = g[..., None] * (np.eye(s.shape[-1])[ids[:, 1:]] - s)
    if f"{side}_seq_kl" in gradients:
        gradient += kl_gradient * gradients[f"{side}_seq_kl"][:, None, None] * (s - q)
    gradient = np.where(mask[:, 1:, None], gradient, 0)
    return np.concatenate([gradient, 0 * gradient[:, :1]], 1)


def selected(inputs, rewards):
    """The selection as the golden file has it: indices, -1 where there is no pair."""
    counts = [[row.max() + 1 for row in inputs[f"{side}_segments"]] for side in ("chosen", "rejected")]
    K = min(r.shape[1] for r in rewards)
    rows = [select(r_w[:S_w].tolist(), r_l[:S_l].tolist(), min(S_w, S_l))
            for r_w, r_l, S_w, S_l in zip(*rewards, *counts, strict=True)]
    return {f"{side}_selected": np.array([[pair[i] for pair in row] + [-1] * (K - len(row)) for row in rows])
            for i, side in enumerate(("chosen", "rejected"))}


# ---------------------------------------------------------------------------------------------------------
# The broken ports, one for every known mistake


def segments_from_row_start(segments, mask):
    out = np.full_like(segments, -1)
    for b, row in enumerate(segments):
        response = row[mask[b]]
        for t in np.flatnonzero(mask[b]):
            out[b, t] = response[min(t, len(response) - 1)]
    return out


def one_late(segments, mask):
    out = segments.copy()
    for b, t in zip(*np.nonzero(mask), strict=True):
        if segments[b, t - 1] >= 0:
            out[b, t] = segments[b, t - 1]
    return out


def closed_intervals(values, segments, S):
    out = per_segment(total)(values, segments, S)
    for b, row in enumerate(segments):
        for t in range(1, len(row)):
            if 0 <= row[t - 1] < row[t]:
                out[b, row[t - 1]] += values[b, t]
    return out


def no_end_of_text(segments, mask):
    out = segments.copy()
    for b, row in enumerate(mask):
        out[b, np.flatnonzero(row)[-1]] = -1
    return out


def with_last(f):
    """f(first, last, column), the columns of the response's first and last token, for a mask."""
    def scored(ids, mask):
        first = mask.argmax(1)[:, None]
        last = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)[:, None]
        return f(first, last, np.arange(mask.shape[1]))
    return scored


PROMPT_TOO = with_last(lambda first, last, t: (0 < t) & (t <= last))
PADDING_TOO = with_last(lambda first, last, t: first <= t)
NO_END = with_last(lambda first, last, t: (first <= t) & (t < last))


def with_log_softmax(f):
    return dict(logp=lambda z, ids: pick(f(z), ids), kl=kl_of(f))


def label_kl(f):
    """f(log q, log s) of the label."""
    return dict(kl=lambda z_ref, z, y: f(pick(log_softmax(z_ref), y), pick(log_softmax(z), y)))


def min_max(scores, top, present):
    low = np.where(present[..., None], scores, np.inf).min(1, keepdims=True)
    return (scores - low) / (np.where(present[..., None], scores, -np.inf).max(1, keepdims=True) - low)


def centred(r, m):
    return r - (r * m).sum(1, keepdims=True) / m.sum(1, keepdims=True)


def swap_first(r_w, r_l, m_w, m_l):
    S = min(r_w.shape[1], r_l.shape[1])
    return (np.concatenate([r_l[:, :S], r_w[:, S:]], 1), np.concatenate([r_w[:, :S], r_l[:, S:]], 1))


def vanilla_with_rewards_on_the_policy(p, c, r, ref_w, ref_l, r_w, r_l, m_w, m_l, *, beta):
    up = np.where(m_w, r_w * c - ref_w, 0).sum(1)
    return p.nls(beta * (up - np.where(m_l, r_l * r - ref_l, 0).sum(1)))


def in_both(delta):
    """delta(K_w, K_l, beta), already times beta where that is right, in both forms of TDPO."""
    return dict(tdpo1=lambda u, K_w, K_l, beta: u - delta(beta * K_w, beta * K_l, beta),
                tdpo2=lambda u, K_w, K_l, beta, alpha: u - alpha * delta(sg(beta * K_w), beta * K_l, beta))


def sequence_losses(order):
    return dict(order=lambda a: a if len(a) > 6 else [*(a[i] for i in order), *a[4:]])


LN2 = np.log(2)
BROKEN = {
    "no-shift": dict(shift=lambda z: z),
    "mask-wrong-side": dict(scored=with_last(lambda first, last, t: (first < t) & (t <= last + 1))),
    "prompt-scored": dict(scored=PROMPT_TOO),
    "last-prompt-token-scored": dict(
        scored=with_last(lambda first, last, t: (0 < t) & (first - 1 <= t) & (t <= last))),
    "padding-scored": dict(scored=PADDING_TOO),
    "one-pad-scored": dict(scored=with_last(lambda first, last, t: (first <= t) & (t <= last + 1))),
    "end-of-text-not-scored": dict(scored=NO_END),
    "first-token-not-scored": dict(scored=with_last(lambda first, last, t: (first < t) & (t <= last))),
    "kl-over-prompt": dict(kl_scored=PROMPT_TOO), "kl-over-padding": dict(kl_scored=PADDING_TOO),
    "kl-without-end-of-text": dict(kl_scored=NO_END),
    "kl-one-column-late": dict(kl=lambda z_ref, z, y: np.roll(kl_of(log_softmax)(z_ref, z, y), -1, 1)),
    "kl-on-the-label": label_kl(lambda q, s: np.exp(q) * (q - s)),
    "kl-as-label-log-ratio": label_kl(lambda q, s: q - s),
    "kl-k3": label_kl(lambda q, s: np.exp(q - s) - 1 - (q - s)),
    "kl-k3-forward": label_kl(lambda q, s: np.exp(s - q) - 1 - (s - q)),
    "kl-mean-over-tokens": dict(kl_total=mean),
    "mean-per-sequence": dict(total=mean),
    "divided-by-pairs": dict(per_pair=lambda gradient: gradient / len(gradient)),
    "dpop-hinge-per-token": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r - k * relu(-p.tokens).sum(1)))),
    "reward-includes-kl": dict(implicit=lambda rho, logp, K, penalty, beta: beta * (rho + K)),
    "reward-includes-penalty": dict(implicit=lambda rho, logp, K, penalty, beta: beta * (rho - penalty)),
    "reward-without-beta": dict(implicit=lambda rho, logp, K, penalty, beta: rho),
    "reward-without-reference": dict(implicit=lambda rho, logp, K, penalty, beta: beta * logp),
    "2d-segments-over-prompt": dict(segments=segments_from_row_start),
    "2d-boundary-twice": dict(per_segment=closed_intervals),
    "2d-boundary-off-by-one": dict(segments=one_late),
    "2d-end-of-text-outside": dict(segments=no_end_of_text),
    "2d-raw-scores": dict(scale=lambda scores, top, present: scores),
    "2d-one-maximum": dict(scale=lambda scores, top, present: scores / top.max()),
    "2d-min-max-per-response": dict(scale=min_max),
    "log-of-softmax": with_log_softmax(lambda x: np.log(softmax(x))),
    "softmax-overflow": with_log_softmax(
        lambda x: np.log(np.exp(x) / np.exp(x).sum(-1, keepdims=True))),
    "base-2-log": dict(logp=lambda z, ids: pick(log_softmax(z), ids) / LN2,
                       kl=lambda z_ref, z, ids: kl_of(log_softmax)(z_ref, z, ids) / LN2),
    "logits-not-normalised": dict(logp=pick),
    "probability-for-logp": dict(logp=lambda z, ids: pick(softmax(z), ids)),
    "kl-reversed": dict(kl=lambda z_ref, z, ids: kl_of(log_softmax)(z, z_ref, ids)),
    "kl-mean-over-vocabulary": dict(kl=lambda z_ref, z, ids: kl_of(log_softmax)(z_ref, z, ids) / z.shape[-1]),
    "kl-gradient-stopped": dict(kl_gradient=0),
    "mean-for-sum": dict(total=mean, kl_total=mean, per_segment=per_segment(mean)),
    "sft-sign": dict(sft=lambda c: c),
    "responses-swapped": dict(order=lambda a: [a[1], a[0], a[3], a[2], *a[5:3:-1], *a[7:5:-1]]),
    "policy-responses-swapped": sequence_losses((1, 0, 2, 3)),
    "reference-responses-swapped": sequence_losses((0, 1, 3, 2)),
    "models-swapped": dict(order=lambda a: [*a[2:4], *a[:2], *a[4:]]),
    "reference-missing": dict(order=lambda a: [*a[:2], 0 * a[2], 0 * a[3], *a[4:]]),
    "beta-missing": dict(beta=lambda beta: 1),
    "beta-twice": dict(beta=lambda beta: beta * beta),
    "beta-in-front": dict(beta=lambda beta: 1, outside=lambda loss, beta: beta * loss),
    "beta-divides": dict(beta=lambda beta: 1 / beta),
    "policy-gradient-stopped": dict(policy=sg),
    "sigmoid-for-log-sigmoid": dict(nls=lambda h: -1 / (1 + np.exp(-h))),
    "minus-missing": dict(nls=lambda h: -nls(h)),
    "margin-sign": dict(nls=lambda h: nls(-h)),
    "label-smoothing": dict(nls=lambda h: 0.9 * nls(h) + 0.1 * nls(-h)),
    "log-of-sigmoid": dict(nls=lambda h: -np.log(1 / (1 + np.exp(-h)))),
    "hinge-for-log-sigmoid": dict(nls=lambda h: relu(-h)),
    "dpop-hinge-outside-beta": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r) - k * relu(-c))),
    "dpop-hinge-outside-log-sigmoid": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r)) + k * relu(-c)),
    "dpop-hinge-outside-times-50": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r)) + 50 * relu(-c)),
    "dpop-hinge-outside-with-beta": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r)) + b * k * relu(-c)),
    "dpop-hinge-subtracted-outside": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r)) - k * relu(-c)),
    "dpop-ratio-hinge-outside": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r)) + k * relu(1 - np.exp(c))),
    "dpop-hinge-sign": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r + k * relu(-c)))),
    "dpop-hinge-on-gain": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r - k * relu(c)))),
    "dpop-hinge-on-rejected": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r - k * relu(-r)))),
    "dpop-hinge-on-the-pair": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r - k * relu(-p.win)))),
    "dpop-hinge-on-the-pair-outside": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r)) + k * relu(-p.win)),
    "dpop-hinge-missing": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r))),
    "dpop-no-hinge": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r + k * c))),
    "dpop-clamp-at-zero": dict(
        dpop=lambda c, r, b, k, p: nls(b * (c - r - k * np.where(c.real <= 0, -c, 0)))),
    "dpop-maximum-at-zero": dict(
        dpop=lambda c, r, b, k, p: nls(b * (c - r - k * np.where(c.real == 0, -c / 2, relu(-c))))),
    "dpop-hinge-detached": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r - k * relu(-sg(c))))),
    "tdpo-delta-sign": in_both(lambda K_w, K_l, beta: K_w - K_l),
    "tdpo-kl-added": in_both(lambda K_w, K_l, beta: K_w + K_l),
    "tdpo-kl-without-beta": in_both(lambda K_w, K_l, beta: (K_l - K_w) / beta),
    "tdpo-kl-missing": in_both(lambda K_w, K_l, beta: 0),
    "tdpo2-is-tdpo1": dict(tdpo2=lambda u, K_w, K_l, beta, alpha: u - beta * (K_l - K_w)),
    "tdpo1-is-tdpo2": dict(tdpo1=lambda u, K_w, K_l, beta: u - 0.5 * beta * (K_l - sg(K_w))),
    "tdpo1-with-alpha": dict(tdpo1=lambda u, K_w, K_l, beta: u - 0.5 * beta * (K_l - K_w)),
    "tdpo1-stop-gradient-on-chosen": dict(tdpo1=lambda u, K_w, K_l, beta: u - beta * (K_l - sg(K_w))),
    "tdpo1-stop-gradient-on-both": dict(tdpo1=lambda u, K_w, K_l, beta: u - beta * sg(K_l - K_w)),
    "tdpo2-stop-gradient-missing": dict(
        tdpo2=lambda u, K_w, K_l, beta, alpha: u - alpha * beta * (K_l - K_w)),
    "tdpo2-stop-gradient-wrong-side": dict(
        tdpo2=lambda u, K_w, K_l, beta, alpha: u - alpha * beta * (sg(K_l) - K_w)),
    "tdpo2-stop-gradient-on-both": dict(
        tdpo2=lambda u, K_w, K_l, beta, alpha: u - alpha * beta * sg(K_l - K_w)),
    "tdpo2-alpha-on-rejected-only": dict(
        tdpo2=lambda u, K_w, K_l, beta, alpha: u - beta * (alpha * K_l - sg(K_w))),
    "tdpo2-alpha-on-chosen-only": dict(
        tdpo2=lambda u, K_w, K_l, beta, alpha: u - beta * (K_l - alpha * sg(K_w))),
    "tdpo2-alpha-missing": dict(tdpo2=lambda u, K_w, K_l, beta, alpha: u - beta * (K_l - sg(K_w))),
    "tdpo2-alpha-on-everything": dict(
        tdpo2=lambda u, K_w, K_l, beta, alpha: alpha * (u - beta * (K_l - sg(K_w)))),
    "2d-weights-one-hot": dict(weigh=lambda scores, W: scores[..., 0]),
    "2d-weights-uniform": dict(weigh=lambda scores, W: scores.mean(-1)),
    "2d-weights-sum": dict(weigh=lambda scores, W: scores.sum(-1)),
    "2d-weights-reversed": dict(weigh=lambda scores, W: scores @ W[::-1]),
    "2d-rewards-missing": dict(read_rewards=lambda r_w, r_l, m_w, m_l: (1 + 0 * r_w, 1 + 0 * r_l)),
    "2d-rewards-swapped": dict(read_rewards=swap_first),
    "2d-rewards-centred": dict(
        read_rewards=lambda r_w, r_l, m_w, m_l: (centred(r_w, m_w), centred(r_l, m_l))),
    "2d-rewards-from-minus-1": dict(read_rewards=lambda r_w, r_l, m_w, m_l: (2 * r_w - 1, 2 * r_l - 1)),
    "2d-one-minus-r": dict(weight=lambda r_l: 1 - r_l),
    "2d-vanilla-reward-sign": dict(
        vanilla=lambda r_w, c, r_l, r, beta, m_w, m_l: beta * ((r_w * c).sum(1) + (r_l * r).sum(1))),
    "2d-reward-sign": dict(margin=lambda a, b, beta: beta * (a + b)),
    "2d-vanilla-mean": dict(vanilla=lambda r_w, c, r_l, r, beta, m_w, m_l: beta * (
        (r_w * c).sum(1) / m_w.sum(1) - (r_l * r).sum(1) / m_l.sum(1))),
    "2d-one-log-sigmoid": dict(combine=lambda p, h, alone: nls(h.sum())),
    "2d-one-over-n": dict(combine=lambda p, h, alone: nls(h).mean()),
    "2d-all-pairs": dict(
        select=lambda r_w, r_l, n: [(i, j) for i in range(len(r_w)) for j in range(len(r_l))]),
    "2d-top-n-rejected": dict(select=picks(falling, falling)),
    "2d-bottom-n-chosen": dict(select=picks(rising, rising)),
    "2d-text-order": dict(select=lambda r_w, r_l, n: [(k, k) for k in range(n)]),
    "2d-ties-reversed": dict(select=picks(lambda r: rising(r)[::-1], lambda r: falling(r)[::-1])),
    "2d-unrounded-ties": dict(select=picks(falling, rising, digits=99)),
    "2d-worst-last": dict(
        select=lambda r_w, r_l, n: list(zip(falling(r_w)[:n], rising(r_l)[:n][::-1], strict=True))),
    "2d-padding-segments": dict(number=lambda n, smallest, K: K, select=picks(
        lambda r: falling(r) + list(range(len(r), 9)), lambda r: rising(r) + list(range(len(r), 9)))),
    "2d-n-of-batch": dict(number=lambda n, smallest, K: smallest),
    "2d-unselected-leak": dict(combine=lambda p, h, alone: nls(h).sum() + sum(nls(x) for x in alone)),
}
LOSS = {                                                         # mistake: the loss, what stands in its place
    "2d-vanilla-is-group": ("vanilla", group), "2d-group-is-vanilla": ("group", vanilla),
    "2d-vanilla-reward-on-policy-only": ("vanilla", vanilla_with_rewards_on_the_policy),
    "2d-one-minus-r-selected": ("group", lambda p, *args, beta, group=group: group(
        p, *args[:5], 1 - args[5], *args[6:], beta=beta)),
}
WHERE = {                                                        # where it shows, if not in "segments"
    "log-of-softmax": ["extreme"], "softmax-overflow": ["extreme"], "log-of-sigmoid": ["extreme"],
    "dpop-clamp-at-zero": ["start", "healthy"], "dpop-maximum-at-zero": ["start", "healthy"],
    "dpop-no-hinge": ["padding"], "dpop-hinge-on-gain": ["padding"], "dpop-hinge-missing": ["padding"],
    "2d-ties-reversed": ["ties"], "2d-unrounded-ties": ["fifths"],
    "2d-min-max-per-response": ["ties", "start"],
}


def inputs_of(regime):
    start = f"input/{regime}/"
    return {name.removeprefix(start): x for name, x in GOLDEN.items() if name.startswith(start)}


def write(path, regimes, wrong=None, only=None, logit_gradients=False, dtype=np.float64):
    """A port's file: what it computes in these regimes, under the golden names."""
    tensors = {}
    for regime in regimes:
        inputs = inputs_of(regime)
        with np.errstate(all="ignore"):
            results = port(inputs, wrong, logit_gradients and "chosen_logits" in inputs)
        if wrong is None:
            results |= selected(inputs, [results["chosen_rewards"], results["rejected_rewards"]])
        for name, x in results.items():
            if only is None or only in name:
                x = np.ascontiguousarray(x if x.dtype.kind == "i" else np.real(x).astype(dtype))
                tensors[f"{np.dtype(dtype).name}/{regime}/{name}"] = x
    save_file(tensors, path)
    return tensors


@pytest.fixture
def checked(tmp_path, capsys):
    """checked(tensors) -> exit status, output, errors of the checker on a file of them."""
    def run(tensors):
        save_file(tensors, tmp_path / "port.safetensors")
        status = check.main([str(tmp_path / "port.safetensors")])
        return status, *capsys.readouterr()
    return run


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------
# The files


def test_the_files_are_what_make_writes_now():
    """The same twice, to the byte; small enough to be carried along."""
    assert make.differences() == []
    data, text, _ = make.rendered()
    assert make.rendered()[:2] == (data, text)
    assert len(data) < 1e6


def test_every_tensor_is_described_and_finite():
    """Each name in the file matches a line of the JSON, with the shape given there; nothing is infinite."""
    vectors = {name: torch.from_numpy(x) for name, x in GOLDEN.items()}
    description = make.make_description(vectors)
    known = description["inputs"] | description["results"]
    for name, x in vectors.items():
        kind, regime, rest = name.split("/", 2)
        assert kind in ("input", "float64", "float32") and torch.isfinite(x.double()).all(), name
        place, parameter = rest.rsplit("/", 1) if "/" in rest else ("", rest)
        if f"input/{regime}/policy/{parameter}" in vectors:      # "dpo/grad/ln_f.bias", "policy/ln_f.bias"
            assert ("LOSS/grad" if place.endswith("/grad") else place) + "/PARAMETER" in known, name
            assert x.shape == vectors[f"input/{regime}/policy/{parameter}"].shape, name
            continue
        side = "rejected" if "rejected" in parameter else "chosen"
        size = description["regimes"][regime]
        shape = known[("LOSS/" if place else "") + parameter.replace(side, "{side}")]["shape"]
        if ";" in shape:                                         # "B; 2d: B,S"
            shape = shape.split("2d: ")[1] if place.startswith("2d") else shape.split(";")[0]
        assert list(x.shape) == [size[d] if d != "S" else size[f"S_{side}"] for d in shape.split(",")], name


def test_losses_in_float32_stay_within_the_float32_tolerance():
    """The float32 vectors are rounded float64; losses.py computing in float32 passes as any port would."""
    for regime in make.REGIMES:
        for name, x in pipeline.results(make.make_inputs(regime), torch.float32).items():
            name = f"float32/{regime}/{name}"
            assert check.equal(name, x, check.golden()[name]), name


# ---------------------------------------------------------------------------------------------------------
# A right port


def test_a_numpy_port_passes(tmp_path, capsys):
    """Every result of every regime, gradients in the logits included, by code that shares none with ours."""
    tensors = write(tmp_path / "port.safetensors", make.REGIMES, logit_gradients=True)
    assert tensors.keys() == {name for name in GOLDEN if name.startswith("float64/") and "/grad/" not in name}
    status = check.main([str(tmp_path / "port.safetensors")])
    out = capsys.readouterr().out
    assert status == 0, [line for line in out.splitlines() if line.startswith("off")]
    assert f"{len(tensors)} compared: {len(tensors)} ok, 0 off; 196 other float64 results" in out


def test_a_float32_port_passes_at_its_own_tolerance(tmp_path):
    write(tmp_path / "port.safetensors", ["healthy", "long", "fifths"], dtype=np.float32)
    assert check.main([str(tmp_path / "port.safetensors")]) == 0


def test_the_parameter_gradients_are_those_of_a_gpt_in_numpy():
    """Three entries of each parameter, each loss: the complex step through the port's own GPT."""
    inputs = inputs_of("gpt")
    reference = {side: logits_of(inputs, "ref_", side) for side in pipeline.SIDES}
    for parameter, x in weights_of(inputs, "").items():
        for i in make.integers(parameter, 3, 0, x.size - 1):
            weights = weights_of(inputs, "")
            weights[parameter] = x + 1j * EPS * (np.arange(x.size) == i).reshape(x.shape)
            policy = {side: gpt_logits(weights, inputs[f"{side}_ids"]) for side in pipeline.SIDES}
            values = port(inputs, logits=lambda ref, side, z=policy: reference[side] if ref else z[side])
            for name in pipeline.HYPER:
                golden = GOLDEN[f"float64/gpt/{name}/grad/{parameter}"].flat[i]
                assert abs(values[f"{name}/loss"].sum().imag / EPS - golden) < 1e-12, (name, parameter, i)


def test_the_port_in_the_readme_passes_and_its_broken_form_prints_what_the_readme_shows(
        tmp_path, capsys, monkeypatch):
    readme = (make.HERE / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    (tmp_path / "golden").symlink_to(make.HERE)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert check.main(["theirs.safetensors"]) == 0
    right, wrong = "-0.3 * (w - l - 5.0 * np.maximum(0, -w))", "-0.3 * (w - l) + 5.0 * np.maximum(0, -w)"
    assert code.count(right) == 1
    exec(code.replace(right, wrong), {})
    capsys.readouterr()
    assert check.main(["theirs.safetensors"]) == 1
    shown = readme.split("which one yours equals:\n\n")[1].split("\n\n")[0]
    assert capsys.readouterr().out == textwrap.dedent(shown) + "\n"


# ---------------------------------------------------------------------------------------------------------
# Wrong ports


def test_every_known_mistake_is_tried_below():
    assert BROKEN.keys() | LOSS.keys() == mistakes.BY_NAME.keys()


@pytest.mark.parametrize("name", mistakes.BY_NAME)
def test_a_broken_port_is_told_its_mistake(name, tmp_path, capsys, monkeypatch):
    """Exit status 1, and the sentence of the mistake that was put in, alone."""
    if name in LOSS:
        monkeypatch.setitem(globals(), *LOSS[name])
    write(tmp_path / "port.safetensors", WHERE.get(name, ["segments"]), BROKEN.get(name, {}),
          only="/loss" if name == "log-of-sigmoid" else None,    # what its gradients lose differs by library
          logit_gradients=name == "kl-gradient-stopped")
    assert check.main([str(tmp_path / "port.safetensors")]) == 1
    out = capsys.readouterr().out
    named = [line.split("[")[1].split(";")[0] for line in out.splitlines() if line.startswith("    [")]
    assert named == [name], out.splitlines()[-12:]
    assert mistakes.BY_NAME[name].says in out


def test_two_mistakes_in_two_losses_are_both_named(tmp_path, capsys):
    write(tmp_path / "port.safetensors", ["unhealthy"], BROKEN["dpop-hinge-sign"] | BROKEN["tdpo2-is-tdpo1"])
    assert check.main([str(tmp_path / "port.safetensors")]) == 1
    out = capsys.readouterr().out
    assert "[dpop-hinge-sign;" in out and "[tdpo2-is-tdpo1;" in out


def test_a_gradient_that_never_arrives_is_said(checked):
    """A right loss with parameters whose gradient is 0, or absent where others are sent: they are named."""
    right = {name: x for name, x in GOLDEN.items() if name.startswith("float64/gpt/dpo/")}
    assert checked(right)[0] == 0
    grads = [name for name in right if "/grad/" in name]
    says = "your dpo loss is right and its gradient does not reach these parameters: "
    partly = right | {"float64/gpt/dpo/grad/ln_f.bias": np.zeros(8), grads[0]: right[grads[0]] * 2}
    del partly["float64/gpt/dpo/grad/wpe.weight"]
    status, out, _ = checked(partly)
    assert status == 1 and out.splitlines()[-1] == says + "ln_f.bias, wpe.weight"
    absent = {name: x for name, x in right.items() if name != "float64/gpt/dpo/grad/wpe.weight"}
    assert checked(absent)[0] == 1
    detached = {name: 0 * x if "grad" in name else x for name, x in right.items()}
    status, out, _ = checked(detached)                           # the whole policy under no_grad
    assert status == 1 and says + ", ".join(name.split("/grad/")[1] for name in grads) + "\n" in out
    assert "[policy-gradient-stopped;" in out
    theirs = {name: torch.from_numpy(x) for name, x in detached.items()}
    assert check.unreached(theirs, theirs) and not check.unreached(theirs, {})  # only where the loss is right


def test_what_is_unknown_or_nan_is_said_to_be(checked):
    x = GOLDEN["float64/healthy/dpo/loss"]
    status, out, _ = checked({"float64/healthy/dpo/loss": x + np.array([0, 0, 1e-3])})
    assert status == 1 and "by 0.001 (tolerance 1e-09), worst at [2]" in out
    assert "your dpo value equals no known mistake's" in out
    status, out, _ = checked({"float64/healthy/dpo/loss": np.where([0, 1, 0], np.nan, x)})
    assert status == 1 and "float64/healthy/dpo/loss  NaN or infinite at 1 of 3 places, first at [1]" in out


@pytest.mark.parametrize("tensors, says", [
    ({}, "no tensor in it"),
    ({"float64/healthy/dpo/los": np.zeros(3)}, "the nearest name is float64/healthy/dpo/loss"),
    ({"input/healthy/chosen_ids": np.zeros(3)}, "is an input, not a result"),
    ({"float64/healthy/dpo/loss": np.zeros(4)}, "has shape [4], the golden one [3]"),
])
def test_a_file_that_cannot_be_compared_is_exit_status_2(tensors, says, checked):
    status, out, err = checked(tensors)
    assert (status, out) == (2, "") and says in err and err.count("\n") == 1


def test_the_script_runs_from_another_folder_without_a_traceback(tmp_path):
    """No such file and not a safetensors file: one line, exit status 2."""
    (tmp_path / "text.safetensors").write_text("not tensors")
    assert check.main([str(tmp_path / "text.safetensors")]) == 2
    script = Path(check.__file__).resolve()
    run = subprocess.run([sys.executable, str(script), "absent.safetensors"], cwd=tmp_path,
                         capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (2, "", "absent.safetensors: no such file\n")
