"""golden/: the vectors are what losses.py gives; a NumPy port equals them; a broken one is told its mistake.

The port below shares no line with losses.py, model.py or the golden pipeline: NumPy, loops over segments in
Python. It gives no gradients: those of the ports in JAX and MLX are compared in test_ports.py.
"""

import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from golden import check, make, mistakes, pipeline

pytestmark = pytest.mark.slow

GOLDEN = load_file(make.HERE / "vectors.safetensors")
LOGITS = [r for r in make.REGIMES if r not in ("gpt", "second-step")]

# ---- The port: one choice a function. RIGHT is the right one of each; a broken port replaces one or two ----

def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))

def softmax(x):
    return np.exp(log_softmax(x))

def pick(values, ids):
    return np.take_along_axis(values, ids[..., None], -1)[..., 0]

def kl_of(log_softmax):
    def kl(z_ref, z, ids):
        log_q, log_s = log_softmax(z_ref), log_softmax(z)
        return (np.exp(log_q) * np.where(log_q > -np.inf, log_q - log_s, 0)).sum(-1)
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
    return np.logaddexp(0, -h)                                   # -log sigma(h)

def relu(x):
    return np.where(x > 0, x, 0)

def rising(r):
    return sorted(range(len(r)), key=lambda k: r[k])

def falling(r):
    return sorted(range(len(r)), key=lambda k: -r[k])

def grouped(r):
    """Rewards as numbers of groups of equal ones: a gap above 1e-5 begins a new one."""
    order, number, out = rising(r), 0, [0] * len(r)
    for before, k in zip(order, order[1:], strict=False):
        number += r[k] - r[before] > 1e-5
        out[k] = number
    return out

def picks(chosen, rejected, equal=grouped):
    """Pairs of segments: n of r_w in one order against n of r_l in another, ties as they come."""
    return lambda r_w, r_l, n: list(zip(chosen(equal(r_w))[:n], rejected(equal(r_l))[:n], strict=True))

select = picks(falling, rising)

def logits_of(inputs, ref, side):
    return inputs[f"{ref}{side}_logits"].astype(np.float64)

RIGHT = dict(
    shift=shift,
    scored=lambda ids, mask: mask,
    kl_scored=lambda ids, mask: None,                            # None: where the tokens are scored
    logp=lambda z, ids: pick(log_softmax(z), ids),
    kl=kl_of(log_softmax),
    total=total, kl_total=total, per_segment=per_segment(total),
    segments=lambda segments, mask: segments,
    scale=lambda scores, top, present, every: scores / top,
    weigh=lambda scores, W: (scores * W).sum(-1),
    implicit=lambda rho, logp, K, penalty, beta: beta * rho,
    nls=nls, order=lambda args: args, beta=lambda beta: beta, term=lambda value, args: value,
    sft=lambda c: -c,
    dpop=lambda c, r, b, k, p: nls(b * (c - r - k * relu(-c))),  # b beta, k lam
    tdpo1=lambda u, K_w, K_l, beta: u - beta * (K_l - K_w),
    tdpo2=lambda u, K_w, K_l, beta, alpha: u - alpha * beta * (K_l - K_w),
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
        here, there = (np.argsort(~m[b], kind="stable") for m in (m_w, m_l))  # segments that exist first
        pairs = p.select(r_w[b, here[:S_w]].tolist(), r_l[b, there[:S_l]].tolist(), n)
        pairs = [(here[i], there[j]) for i, j in pairs]
        up, down = r_w[b] * (c[b] - ref_w[b]), p.weight(r_l[b]) * (r[b] - ref_l[b])
        alone = [beta * up[i] for i in here[:S_w] if i not in {i for i, _ in pairs}]
        alone += [-beta * down[j] for j in there[:S_l] if j not in {j for _, j in pairs}]
        losses.append(p.combine(p, np.array([p.margin(up[i], down[j], beta) for i, j in pairs]), alone))
    return np.array(losses)

def port(inputs, wrong=None):
    """The golden results of a regime but the gradients, in float64; `wrong` replaces entries of RIGHT."""
    p = SimpleNamespace(**RIGHT | (wrong or {}))
    q = {}
    slots = {side: np.arange(inputs[f"{side}_scores"].shape[1]) for side in pipeline.SIDES}
    inside = {side: (inputs[f"{side}_segments"][..., None] == slots[side]).any(1) for side in slots}  # (B, S)
    every = np.concatenate([inputs[f"{side}_scores"][inside[side]] for side in inside])
    for side in ("chosen", "rejected"):
        ids, mask, segments = (inputs[f"{side}_{x}"] for x in ("ids", "response_mask", "segments"))
        S = inputs[f"{side}_scores"].shape[1]
        z, z_ref = (p.shift(logits_of(inputs, ref, side)) for ref in ("", "ref_"))
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
        scores = p.scale(inputs[f"{side}_scores"].astype(float), inputs["aspect_max"], inside[side], every)
        q[f"{side}_rewards"] = p.weigh(scores, inputs["aspect_weights"])
    out = dict(q)
    p.by_token = q["chosen_token_logps"] - q["ref_chosen_token_logps"]
    sequence = [q[f"{ref}{side}_logps"] for ref in ("", "ref_") for side in inside]
    kls = [q[f"{side}_seq_kl"] for side in inside]
    two_d = [q[f"{ref}{side}_segment_logps"] for ref in ("", "ref_") for side in inside]
    two_d += [q[f"{side}_rewards"] for side in inside] + list(inside.values())
    for name, loss, args in (("sft", None, sequence[:1]), ("dpo", dpo, sequence), ("dpop", dpop, sequence),
                             ("tdpo1", tdpo1, sequence + kls), ("tdpo2", tdpo2, sequence + kls),
                             ("2d-dpo-vanilla", vanilla, two_d), ("2d-dpo", group, two_d)):
        knobs = dict(pipeline.HYPER[name])

        used = p.order(args) if loss else args
        knobs["beta"] = p.beta(knobs.get("beta", 1))
        value = loss(p, *used, **knobs) if loss else p.sft(args[0])
        out[f"{name}/loss"] = p.term(value, used) if loss and len(args) < 8 else value
        for side in inside:
            if loss and "2d" not in name:
                rho = q[f"{side}_logps"] - q[f"ref_{side}_logps"]
                penalty = knobs["lam"] * relu(-rho) if (name, side) == ("dpop", "chosen") else 0
                out[f"{name}/{side}_reward"] = p.implicit(
                    rho, q[f"{side}_logps"], q[f"{side}_seq_kl"], penalty, pipeline.HYPER[name]["beta"])
    return out

def selected(inputs, rewards):
    """The selection as the golden file has it: indices, -1 where there is no pair."""
    here = [[sorted(set(row[row >= 0])) for row in inputs[f"{side}_segments"]] for side in pipeline.SIDES]
    K = min(r.shape[1] for r in rewards)
    out = {f"{side}_selected": np.full((len(here[0]), K), -1) for side in pipeline.SIDES}
    for b, (w, l_) in enumerate(zip(*here, strict=True)):
        pairs = select(rewards[0][b, w].tolist(), rewards[1][b, l_].tolist(), min(len(w), len(l_)))
        for k, (i, j) in enumerate(pairs):
            out["chosen_selected"][b, k], out["rejected_selected"][b, k] = w[i], l_[j]
    return out

# ---- The broken ports, one for every known mistake ----

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

def sequence_losses(order):
    return dict(order=lambda a: a if len(a) > 6 else [*(a[i] for i in order), *a[4:]])

LN2 = np.log(2)
BROKEN = {
    "no-shift": dict(shift=lambda z: z),
    "mask-wrong-side": dict(scored=with_last(lambda first, last, t: (first < t) & (t <= last + 1))),
    "prompt-scored": dict(scored=PROMPT_TOO),
    "last-prompt-token-scored": dict(scored=with_last(lambda first, last, t: (0 < t) & (first - 1 <= t) & (t
        <= last))), "padding-scored": dict(scored=PADDING_TOO),
    "one-pad-scored": dict(scored=with_last(lambda first, last, t: (first <= t) & (t <= last + 1))),
    "end-of-text-not-scored": dict(scored=NO_END),
    "id-0-not-scored": dict(scored=lambda ids, mask: mask & (ids != 0)),
    "begin-of-text-scored": dict(scored=lambda ids, mask: mask | np.roll(mask, -1, 1) & (ids == 5)),
    "holes-scored": dict(scored=with_last(lambda first, last, t: (first <= t) & (t <= last))),
    "sft-term": dict(term=lambda value, args: value - args[0]),
    "first-token-not-scored": dict(scored=with_last(lambda first, last, t: (first < t) & (t <= last))),
    "kl-over-prompt": dict(kl_scored=PROMPT_TOO), "kl-over-padding": dict(kl_scored=PADDING_TOO),
    "kl-without-end-of-text": dict(kl_scored=NO_END),
    "kl-one-column-late": dict(kl=lambda z_ref, z, y: np.roll(kl_of(log_softmax)(z_ref, z, y), -1, 1)),
    "kl-on-the-label": label_kl(lambda q, s: np.exp(q) * (q - s)),
    "kl-as-label-log-ratio": label_kl(lambda q, s: q - s),
    "kl-k3": label_kl(lambda q, s: np.exp(q - s) - 1 - (q - s)),
    "kl-k3-forward": label_kl(lambda q, s: np.exp(s - q) - 1 - (s - q)),
    "kl-mean-over-tokens": dict(kl_total=mean), "mean-per-sequence": dict(total=mean),
    "dpop-hinge-per-token": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r - k * relu(-p.by_token).sum(1)))),
    "reward-includes-kl": dict(implicit=lambda rho, logp, K, penalty, beta: beta * (rho + K)),
    "reward-includes-penalty": dict(implicit=lambda rho, logp, K, penalty, beta: beta * (rho - penalty)),
    "reward-without-beta": dict(implicit=lambda rho, logp, K, penalty, beta: rho),
    "reward-without-reference": dict(implicit=lambda rho, logp, K, penalty, beta: beta * logp),
    "2d-raw-scores": dict(scale=lambda scores, top, present, every: scores),
    "2d-one-maximum": dict(scale=lambda scores, top, present, every: scores / top.max()),
    "2d-maximum-of-the-batch": dict(scale=lambda scores, top, present, every: scores / every.max(0)),
    "log-of-softmax": with_log_softmax(lambda x: np.log(softmax(x))),
    "softmax-overflow": with_log_softmax(lambda x: np.log(np.exp(x) / np.exp(x).sum(-1, keepdims=True))),
    "log-softmax-floor": with_log_softmax(lambda x: log_softmax(np.maximum(x, x.max(-1, keepdims=True) -
        64))),
    "kl-zero-times-infinity": dict(kl=lambda z_ref, z, y: (softmax(z_ref) * (log_softmax(z_ref) -
        log_softmax(z))).sum(-1)),
    "base-2-log": dict(logp=lambda z, ids: pick(log_softmax(z), ids) / LN2, kl=lambda z_ref, z,
        ids: kl_of(log_softmax)(z_ref, z, ids) / LN2), "logits-not-normalised": dict(logp=pick),
    "probability-for-logp": dict(logp=lambda z, ids: pick(softmax(z), ids)),
    "kl-reversed": dict(kl=lambda z_ref, z, ids: kl_of(log_softmax)(z, z_ref, ids)),
    "kl-mean-over-vocabulary": dict(kl=lambda z_ref, z, ids: kl_of(log_softmax)(z_ref, z, ids) / z.shape[-1]),
    "mean-for-sum": dict(total=mean, kl_total=mean, per_segment=per_segment(mean)),
    "sft-sign": dict(sft=lambda c: c),
    "responses-swapped": dict(order=lambda a: [a[1], a[0], a[3], a[2], *a[5:3:-1], *a[7:5:-1]]),
    "policy-responses-swapped": sequence_losses((1, 0, 2, 3)),
    "reference-responses-swapped": sequence_losses((0, 1, 3, 2)),
    "models-swapped": dict(order=lambda a: [*a[2:4], *a[:2], *a[4:]]),
    "reference-missing": dict(order=lambda a: [*a[:2], 0 * a[2], 0 * a[3], *a[4:]]),
    "beta-missing": dict(beta=lambda beta: 1), "beta-twice": dict(beta=lambda beta: beta * beta),
    "beta-divides": dict(beta=lambda beta: 1 / beta),
    "sigmoid-for-log-sigmoid": dict(nls=lambda h: -1 / (1 + np.exp(-h))),
    "minus-missing": dict(nls=lambda h: -nls(h)), "margin-sign": dict(nls=lambda h: nls(-h)),
    "label-smoothing": dict(nls=lambda h: 0.9 * nls(h) + 0.1 * nls(-h)),
    "log-of-sigmoid": dict(nls=lambda h: -np.log(1 / (1 + np.exp(-h)))),
    "hinge-for-log-sigmoid": dict(nls=lambda h: relu(-h)), "hinge-loss": dict(nls=lambda h: relu(1 - h)),
    "robust": dict(nls=lambda h: (0.9 * nls(h) - 0.1 * nls(-h)) / 0.8),
    "dpop-hinge-sign": dict(dpop=lambda c, r, b, k, p: nls(b * (c - r + k * relu(-c)))),
    "tdpo-kl-added": dict(tdpo1=lambda u, K_w, K_l, beta: u - beta * (K_l + K_w),
        tdpo2=lambda u, K_w, K_l, beta, alpha: u - alpha * beta * (K_l + K_w)),
    "2d-weights-one-hot": dict(weigh=lambda scores, W: scores[..., 0]),
    "2d-weights-uniform": dict(weigh=lambda scores, W: scores.mean(-1)),
    "2d-weights-sum": dict(weigh=lambda scores, W: scores.sum(-1)),
    "2d-weights-reversed": dict(weigh=lambda scores, W: scores @ W[::-1]),
    "2d-rewards-missing": dict(read_rewards=lambda r_w, r_l, m_w, m_l: (1 + 0 * r_w, 1 + 0 * r_l)),
    "2d-one-minus-r": dict(weight=lambda r_l: 1 - r_l),
    "2d-vanilla-reward-sign": dict(vanilla=lambda r_w, c, r_l, r, beta, m_w, m_l: beta * ((r_w * c).sum(1) +
        (r_l * r).sum(1))), "2d-reward-sign": dict(margin=lambda a, b, beta: beta * (a + b)),
    "2d-vanilla-mean": dict(vanilla=lambda r_w, c, r_l, r, beta, m_w, m_l: beta * ((r_w * c).sum(1) /
        m_w.sum(1) - (r_l * r).sum(1) / m_l.sum(1))),
    "2d-one-log-sigmoid": dict(combine=lambda p, h, alone: nls(h.sum())),
    "2d-one-over-n": dict(combine=lambda p, h, alone: nls(h).mean()),
    "2d-all-pairs": dict(select=lambda r_w, r_l, n: [(i, j) for i in range(len(r_w)) for j
        in range(len(r_l))]), "2d-top-n-rejected": dict(select=picks(falling, falling)),
    "2d-bottom-n-chosen": dict(select=picks(rising, rising)),
    "2d-text-order": dict(select=lambda r_w, r_l, n: [(k, k) for k in range(n)]),
    "2d-ties-reversed": dict(select=picks(lambda r: rising(r)[::-1], lambda r: falling(r)[::-1])),
    "2d-unrounded-ties": dict(select=picks(falling, rising, list)),
    "2d-ties-on-a-grid": dict(select=picks(falling, rising, lambda r: [round(x * 1e5) for x in r])),
    "2d-rewards-rounded": dict(weigh=lambda scores, W: (scores @ W).round(3)),
    "2d-selected-in-text-order": dict(select=lambda r_w, r_l, n: list(zip(*(sorted(k) for k
        in zip(*select(r_w, r_l, n), strict=True)), strict=True))),
    "2d-worst-last": dict(select=lambda r_w, r_l, n: list(zip(falling(grouped(r_w))[:n],
        rising(grouped(r_l))[:n][::-1], strict=True))),
    "2d-n-of-batch": dict(number=lambda n, smallest, K: smallest),
    "2d-unselected-leak": dict(combine=lambda p, h, alone: nls(h).sum() + sum(nls(x) for x in alone)),
}
LOSS = {                                                         # mistake: the loss, what stands in its place
    "2d-vanilla-is-group": ("vanilla", group), "2d-group-is-vanilla": ("group", vanilla),
    "2d-one-minus-r-selected": ("group", lambda p, *args, beta, group=group: group(
        p, *args[:5], 1 - args[5], *args[6:], beta=beta)),
}
WHERE = {                                                        # where it shows, if not in "segments"
    "log-of-softmax": ["extreme"], "softmax-overflow": ["extreme"], "log-of-sigmoid": ["extreme"],
    "dpop-slope-1-at-zero": ["start", "unhealthy", "healthy"],
    "dpop-slope-half-at-zero": ["start", "unhealthy"],
    "id-0-not-scored": ["ids"], "begin-of-text-scored": ["ids"], "holes-scored": ["holes"],
    "left-padding-ignored": ["left"], "kl-top-10": ["vocabulary"], "kl-zero-times-infinity": ["vocabulary"],
    "2d-ties-on-a-grid": ["close-rewards", "ties", "fifths"], "2d-rewards-rounded": ["close-rewards"],
    "kl-clipped": ["extreme"], "log-softmax-floor": ["extreme"], "end-of-text-not-scored": ["ids"],
    "ld-dpo-policy-only": ["padding"], "2d-maximum-of-the-batch": ["start", "ids"],
    "dpop-no-hinge": ["padding"], "dpop-hinge-on-gain": ["padding"], "dpop-hinge-missing": ["padding"],
    "2d-ties-reversed": ["ties"], "2d-unrounded-ties": ["fifths"],
    "2d-min-max-per-response": ["ties", "start"],
}

def inputs_of(regime):
    start = f"input/{regime}/"
    x = {name.removeprefix(start): x for name, x in GOLDEN.items() if name.startswith(start)}
    return x | {name.removeprefix("period/"): np.concatenate([t] * int(x["repeat"]), 1)
                for name, t in x.items() if name.startswith("period/")}

def results(regimes, wrong=None, only="", dtype=np.float64):
    """What a port computes in these regimes, under the golden names."""
    tensors = {}
    for regime in regimes:
        inputs = inputs_of(regime)
        with np.errstate(all="ignore"):
            found = port(inputs, wrong)
        if wrong is None:
            found |= selected(inputs, [found["chosen_rewards"], found["rejected_rewards"]])
        for name, x in found.items():
            name = f"{np.dtype(dtype).name}/{regime}/{name}"
            if only in name and name in check.golden():
                tensors[name] = np.ascontiguousarray(x if x.dtype.kind == "i" else np.real(x).astype(dtype))
    return tensors

@pytest.fixture
def checked(tmp_path, capsys):
    """checked(tensors) -> exit status, output, errors of the checker on a file of them."""
    def run(tensors):
        save_file(tensors, tmp_path / "port.safetensors")
        capsys.readouterr()
        status = check.main([str(tmp_path / "port.safetensors")])
        return status, *capsys.readouterr()
    return run

def verdict(out):
    """The lines of the verdict, and the names of the mistakes in it."""
    lines = [line for line in out.splitlines() if not line.startswith(("ok ", "off "))][1:]
    return lines, [line.split("[")[1].split(";")[0] for line in lines if line.startswith("    [")]

@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

# ---- The files ----

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
        masked = kind == "input" and regime == "vocabulary" and rest.endswith("logits")
        assert kind in ("input", "float64", "float32") and (masked or torch.isfinite(x.double()).all()), name
        rest = rest.removeprefix("period/")
        place, parameter = rest.rsplit("/", 1) if "/" in rest else ("", rest)
        if place in ("policy", "reference", "model") or place.endswith("/grad"):
            assert ("LOSS/grad" if place.endswith("/grad") else place) + "/PARAMETER" in known, name
            continue
        side = "rejected" if "rejected" in parameter else "chosen"
        size = description["regimes"][regime]
        shape = known[("LOSS/" if place else "") + parameter.replace(side, "{side}")]["shape"]
        if ";" in shape:                                         # "B; 2d: B,S"
            shape = shape.split("2d: ")[1] if place.startswith("2d") else shape.split(";")[0]
        dims = shape.split(",") if shape else []
        assert list(x.shape) == [size[d] if d != "S" else size[f"S_{side}"] for d in dims], name

def test_losses_in_float32_stay_within_the_float32_tolerance():
    """The float32 vectors are rounded float64; losses.py computing in float32 passes as any port would."""
    for regime in make.REGIMES:
        for name, x in pipeline.results(make.make_inputs(regime), torch.float32).items():
            name = f"float32/{regime}/{name}"
            assert name not in check.golden() or check.equal(name, x, check.golden()[name]), name

# ---- A right port ----

def test_a_numpy_port_passes(checked):
    """Every result but gradients of every regime with given logits, by code that shares none with ours."""
    tensors = results(LOGITS)
    assert tensors.keys() == {name for name in GOLDEN if name.startswith("float64/")
                              and name.split("/")[1] in LOGITS and "grad_" not in name}
    status, out, _ = checked(tensors)
    assert status == 0, [line for line in out.splitlines() if line.startswith("off")]
    assert checked(results(["healthy", "long", "fifths"], dtype=np.float32))[0] == 0

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

# ---- Wrong ports ----

@pytest.mark.parametrize("name", [*BROKEN, *LOSS.keys() - BROKEN.keys()])
def test_a_broken_port_is_told_its_mistake(name, checked, monkeypatch):
    """Exit status 1, and the sentence of the mistake that was put in, alone."""
    if name in LOSS:
        monkeypatch.setitem(globals(), *LOSS[name])
    theirs = results(WHERE.get(name, ["segments"]), BROKEN.get(name, {}),
                     only="/loss" if name == "log-of-sigmoid" else "")
    status, out, _ = checked(theirs)
    assert status == 1 and verdict(out)[1] == [name] and mistakes.BY_NAME[name].says in out, verdict(out)

def dpo_h(x, beta=0.1):
    """DPO's h of a regime's golden numbers."""
    return beta * (x["chosen_logps"] - x["ref_chosen_logps"] - x["rejected_logps"] + x["ref_rejected_logps"])

def numbers(regime):
    start = f"float64/{regime}/"
    return {name.removeprefix(start): x for name, x in GOLDEN.items() if name.startswith(start)}

REAL = {                                                         # released code: what it sends, is told
    "TRL's label smoothing": (lambda x: {"dpo/loss": 0.8 * nls(dpo_h(x)) + 0.2 * nls(-dpo_h(x))},
                              ["smoothing 0.2"]),
    "an SFT term": (lambda x: {"dpo/loss": nls(dpo_h(x)) - 0.3 * x["chosen_logps"]}, ["0.3 times -log pi"]),
    "another beta": (lambda x: {"dpo/loss": nls(dpo_h(x, 0.5))}, ["beta 0.5, where the golden value is 0.1"]),
    "paddleformers' ERNIE-VL, mlx-lm-lora: outside, slope 1": (lambda x: {
        "dpop/loss": nls(dpo_h(x, 0.3)) + 5 * relu(x["ref_chosen_logps"] - x["chosen_logps"]),
        "dpop/grad_chosen_logps": -0.3 / (1 + np.exp(dpo_h(x, 0.3))) - 5 * np.heaviside(
            x["ref_chosen_logps"] - x["chosen_logps"], 1)},
        ["[dpop-hinge-outside-log-sigmoid;", "slope at 0 is 1"]),
    "maximum(x, 0) outside, slope 1/2": (lambda x: {
        "dpop/loss": nls(dpo_h(x, 0.3)) + 5 * relu(x["ref_chosen_logps"] - x["chosen_logps"]),
        "dpop/grad_chosen_logps": -0.3 / (1 + np.exp(dpo_h(x, 0.3))) - 5 * np.heaviside(
            x["ref_chosen_logps"] - x["chosen_logps"], 0.5)},
        ["[dpop-hinge-outside-log-sigmoid;", "slope at 0 is 0.5"]),
    "mlx-lm-lora's cpo, dpop: on the pair, outside, no reference": (lambda x: {"dpop/loss": nls(
        0.3 * (x["chosen_logps"] - x["rejected_logps"])) + 5 * relu(x["rejected_logps"] - x["chosen_logps"])},
        ["[dpop-hinge-on-the-pair-outside;", "[reference-missing;"]),
    "mlxsmith's tdpo: a mean, no KL, no gradient": (lambda x: {
        "tdpo1/loss": nls(sum(s * 0.1 * ((x[f"{side}_token_logps"] - x[f"ref_{side}_token_logps"]).sum(1) /
                                         (x[f"{side}_token_kl"] != 0).sum(1))
                              for side, s in (("chosen", 1), ("rejected", -1)))),
        "tdpo1/grad_chosen_logps": 0 * x["chosen_logps"]},
        ["[policy-gradient-stopped;", "[mean-per-sequence;", "[tdpo-kl-missing;"]),
    "TDPO2-like: both KLs stopped, beta 0.5": (lambda x: {
        "tdpo2/loss": nls(dpo_h(x, 0.5) - 0.25 * (x["rejected_seq_kl"] - x["chosen_seq_kl"])),
        "tdpo2/grad_rejected_seq_kl": 0 * x["chosen_logps"]}, ["beta 0.5, where the golden value is 0.1"]),
    "tunix without a reference, in float32": (lambda x: {
        "dpo/loss": nls((0.1 * (x["chosen_logps"] - x["rejected_logps"])).astype("f4")).astype("f8")},
        ["[reference-missing;", "computed in float32 somewhere"]),
}

@pytest.mark.parametrize("what", REAL)
def test_what_released_code_gives_is_named(what, checked):
    """Its formulas, on the golden log-probabilities of three regimes, and all that the verdict must say."""
    send, says = REAL[what]
    regimes = ["unhealthy", "healthy", "padding"] + ["start"] * ("slope" in what)
    theirs = {f"float64/{r}/{name}": x for r in regimes for name, x in send(numbers(r)).items()}
    status, out, _ = checked(theirs)
    assert status == 1 and all(words in out for words in says), verdict(out)

def test_two_mistakes_in_two_losses_are_both_named(checked):
    _, out, _ = checked(results(["unhealthy"], BROKEN["dpop-hinge-sign"] | BROKEN["tdpo-kl-added"]))
    assert set(verdict(out)[1]) == {"dpop-hinge-sign", "tdpo-kl-added"}

def test_a_second_fault_in_another_regime_hides_nothing(checked):
    """TensorFlow's clip: slope 1 at the start, and something unknown in another regime of the same loss."""
    theirs = {name: x for name, x in GOLDEN.items() if name.startswith("float64/") and "/dpop/" in name}
    theirs["float64/start/dpop/grad_chosen_logps"] = theirs["float64/start/dpop/grad_chosen_logps"] * 6
    theirs["float64/extreme/dpop/loss"] = theirs["float64/extreme/dpop/loss"] * 0.1
    _, out, _ = checked(theirs)
    assert "dpop-slope-1-at-zero" in verdict(out)[1] and "no known mistake's" in out

def test_float32_inside_is_said(checked):
    """Alone, and for sums of thousands of tokens, and beside a mistake."""
    right = {name: x for name, x in GOLDEN.items() if name.startswith(("float64/segments", "float64/thous"))}
    rounded = {name: x.astype("f4").astype("f8") if x.dtype.kind == "f" else x for name, x in right.items()}
    status, out, _ = checked(rounded)
    assert status == 1 and "to float32's precision only: computed in float32 somewhere" in out
    long = {name: x + 1e-3 for name, x in right.items() if name.startswith("float64/thousands/dpo/loss")}
    assert "sums of thousands of tokens: add in float64" in checked(long)[1]
    theirs = results(["segments"], BROKEN["mean-per-sequence"])
    _, out, _ = checked({name: x.astype(np.float32).astype(np.float64) for name, x in theirs.items()})
    assert "[mean-per-sequence;" in out and "computed in float32 somewhere" in out

def test_an_unstable_sort_is_said(checked):
    """Two equal rewards of regime long change places, in the selection and in what follows from it."""
    theirs = {name: x.copy() for name, x in GOLDEN.items() if name.startswith("float64/long/")
              and ("2d-dpo/" in name or "_selected" in name) and not name.endswith("_logits")}
    order, rewards = theirs["float64/long/chosen_selected"][0], GOLDEN["float64/long/chosen_rewards"][0]
    k = next(k for k in range(9) if rewards[order[k]] == rewards[order[k + 1]])
    order[[k, k + 1]] = order[[k + 1, k]]
    status, out, _ = checked(theirs)
    assert status == 1 and "an unstable sort: equal rewards in another order than the text's" in out

def test_nan_outside_the_response_and_half_precision_are_said(checked):
    mask = GOLDEN["input/padding/chosen_response_mask"]
    x = np.where(mask, GOLDEN["float64/padding/chosen_token_logps"], np.nan)
    out = checked({"float64/padding/chosen_token_logps": x})[1]
    assert "all outside the response: where(mask, x, 0) came too late" in out
    loss = GOLDEN["float32/extreme/2d-dpo-vanilla/loss"]
    status, out, _ = checked({"float32/extreme/2d-dpo-vanilla/loss": (loss * 1.05).astype(np.float16)})
    assert status == 1 and "half precision throughout is not expected to pass" in out and not verdict(out)[1]

def test_another_definition_of_the_reward_is_no_mistake(checked):
    x = numbers("unhealthy")
    penalty = 0.3 * 5 * relu(x["ref_chosen_logps"] - x["chosen_logps"])
    out = checked({"float64/unhealthy/dpop/chosen_reward": x["dpop/chosen_reward"] - penalty})[1]
    assert "your dpop reward equals another definition, not a mistake in the loss: " in out

def test_a_reference_that_moves_with_the_policy_is_named(checked):
    """After the step every log-ratio is 0 again."""
    _, out, _ = checked({f"float64/second-step/{name}/loss": np.full(2, LN2) for name in ("dpo", "tdpo2")})
    assert "reference-trained" in verdict(out)[1]

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
    ({"float64/healthy/dpo/loss": np.zeros(3, np.uint16)}, "is uint16 (the bits of bfloat16 numbers?"),
    ({"float64/start/chosen_selected": np.zeros((2, 2))}, "is float64; it holds indices, use int64"),
])
def test_a_file_that_cannot_be_compared_is_exit_status_2(tensors, says, checked):
    status, out, err = checked(tensors)
    assert (status, out) == (2, "") and says in err and err.count("\n") == 1

def test_a_file_that_is_not_there_or_no_tensors_is_one_line(tmp_path, capsys):
    (tmp_path / "text.safetensors").write_text("not tensors")
    for name, says in (("text", "not a readable safetensors file"), ("absent", "no such file")):
        assert check.main([str(tmp_path / f"{name}.safetensors")]) == 2
        out, err = capsys.readouterr()
        assert out == "" and says in err and err.count("\n") == 1
