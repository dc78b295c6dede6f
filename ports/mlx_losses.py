"""The losses in MLX, from the papers' equations and golden/README.md. Needs mlx and nothing of ours.

    loss = loss_of("tdpo2", sums(chosen, z_w, ref_z_w), sums(rejected, z_l, ref_z_l), beta=0.1, alpha=0.5)

tests/test_ports.py writes every golden result with it, gradients included; golden/check.py accepts them all.
All functions are pure: mx.grad and mx.vjp work. B pairs, T columns, V vocabulary, S segments, A aspects; _w
is chosen, _l rejected. A pair is two padded rows, prompt + response; column t of the logits predicts token
t + 1. rho = log pi(y|x) - log pi_ref(y|x), in nats, a sum over the response (B,) or over a segment (B, S).

Where MLX differs, and what is written instead: maximum(0, x) has the slope 1 at 0, where(x > 0, x, 0) has 0;
exp of float64, and so logsumexp and logaddexp, are right to 1e-7 only, a power of e to the last digits.
"""

import inspect
import math

import mlx.core as mx

# From logits (B, T, V) to sums

def exp(x):
    return mx.power(mx.array(math.e, x.dtype), x)

def log_softmax(z):
    z = z - mx.stop_gradient(z.max(-1, keepdims=True))
    return z - mx.log(exp(z).sum(-1, keepdims=True))

def response_only(values, response):
    return mx.pad(mx.where(response[:, 1:], values, 0.0), ((0, 0), (1, 0)))  # (B, T), 0 outside the response

def token_logps(logits, ids, response):
    """log pi(y_t | x, y_<t), (B, T), 0 outside the response (B, T), bool. ids (B, T)."""
    logps = log_softmax(logits[:, :-1])
    return response_only(mx.take_along_axis(logps, ids[:, 1:, None], axis=-1)[..., 0], response)

def token_kl(ref_logits, logits, response):
    """KL(pi_ref || pi) over the vocabulary where each response token is predicted, (B, T), 0 elsewhere."""
    log_q, log_s = log_softmax(ref_logits[:, :-1]), log_softmax(logits[:, :-1])
    log_q, log_s = (mx.where(log_q > -mx.inf, x, 0.0) for x in (log_q, log_s))  # a logit of -inf adds 0
    kl = mx.where(ref_logits[:, :-1] > -mx.inf, exp(log_q), 0.0) * (log_q - log_s)
    return response_only(kl.sum(-1), response)

def segment_sums(values, segments, S):
    """(B, T) summed over each segment, (B, S). segments (B, T), -1 in none."""
    return mx.where(segments[..., None] == mx.arange(S), values[..., None], 0.0).sum(1)

# The losses, (B,)

def minus_log_sigmoid(h):
    return mx.where(h < 0, -h, 0.0) + mx.log1p(exp(mx.where(h < 0, h, -h)))

def dpo(rho_w, rho_l, *, beta):
    return minus_log_sigmoid(beta * (rho_w - rho_l))

def dpop(rho_w, rho_l, *, beta, lam):
    return minus_log_sigmoid(beta * (rho_w - rho_l - lam * mx.where(rho_w < 0, -rho_w, 0.0)))

def tdpo1(rho_w, rho_l, kl_w, kl_l, *, beta):
    return minus_log_sigmoid(beta * (rho_w - rho_l) - beta * (kl_l - kl_w))

def tdpo2(rho_w, rho_l, kl_w, kl_l, *, beta, alpha):
    return minus_log_sigmoid(beta * (rho_w - rho_l) - alpha * beta * (kl_l - mx.stop_gradient(kl_w)))

def vanilla(rho_w, rho_l, r_w, r_l, has_w, has_l, *, beta):
    """2D-DPO without groups. r_w, r_l (B, S), rewards; has_w, has_l (B, S), bool, where segments exist."""
    w, l_ = mx.where(has_w, r_w * rho_w, 0.0), mx.where(has_l, r_l * rho_l, 0.0)
    return minus_log_sigmoid(beta * (w.sum(-1) - l_.sum(-1)))

def groups(r):
    """Rewards (B, S) as numbers of groups of equal ones: sorted, a gap above 1e-5 begins a new group."""
    index = mx.argsort(r, axis=-1)
    value = mx.take_along_axis(r, index, axis=-1)
    number = mx.pad(mx.cumsum(value[:, 1:] - value[:, :-1] > 1e-5, axis=-1), ((0, 0), (1, 0)))
    return mx.take_along_axis(number, mx.argsort(index, axis=-1), axis=-1)

def selected(r_w, r_l, has_w, has_l):
    """Eq. 6's segments, (B, K) each: k-th best chosen, k-th worst rejected, and True for k < N.

    Ties keep the order of the text: the keys differ, so that any sort will do.
    """
    best, worst = (mx.argsort(mx.where(has, key * key.shape[1] + mx.arange(key.shape[1]), 10**6), axis=-1)
                   for key, has in ((-groups(r_w), has_w), (groups(r_l), has_l)))
    K = min(best.shape[-1], worst.shape[-1])
    paired = mx.arange(K) < mx.minimum(has_w.sum(-1), has_l.sum(-1))[..., None]
    return best[..., :K], worst[..., :K], paired

def group(rho_w, rho_l, r_w, r_l, has_w, has_l, *, beta):
    """2D-DPO, Eq. 6: a log-sigmoid for each pair of segments."""
    best, worst, paired = selected(r_w, r_l, has_w, has_l)
    h = mx.take_along_axis(r_w * rho_w, best, axis=-1) - mx.take_along_axis(r_l * rho_l, worst, axis=-1)
    return mx.where(paired, minus_log_sigmoid(beta * mx.where(paired, h, 0.0)), 0.0).sum(-1)

LOSSES = {"sft": lambda logps_w: -logps_w, "dpo": dpo, "dpop": dpop, "tdpo1": tdpo1, "tdpo2": tdpo2,
          "2d-dpo-vanilla": vanilla, "2d-dpo": group}

def sums(x, z, z_ref):
    """What losses are made of, for one side. x: its inputs by golden's names; z, z_ref: the logits."""
    response, segments, S = x["response_mask"], x["segments"], x["scores"].shape[1]
    logps, ref_logps = (token_logps(logits, x["ids"], response) for logits in (z, z_ref))
    kl = token_kl(z_ref, z, response)
    return {"token_logps": logps, "ref_token_logps": ref_logps, "token_kl": kl,
            "logps": logps.sum(-1), "ref_logps": ref_logps.sum(-1), "seq_kl": kl.sum(-1),
            "segment_logps": segment_sums(logps, segments, S),
            "ref_segment_logps": segment_sums(ref_logps, segments, S),
            "rewards": (x["scores"] / x["aspect_max"] * x["aspect_weights"]).sum(-1),
            "has": (segments[..., None] == mx.arange(S)).any(1)}

def loss_of(name, w, l_, **knobs):
    """A loss by name, (B,), from the sums of the chosen and of the rejected side."""
    per, terms = "segment_" if name.startswith("2d") else "", {}
    for side, q in (("w", w), ("l", l_)):
        terms |= {f"logps_{side}": q["logps"], f"rho_{side}": q[f"{per}logps"] - q[f"ref_{per}logps"],
                  f"kl_{side}": q["seq_kl"], f"r_{side}": q["rewards"], f"has_{side}": q["has"]}
    loss = LOSSES[name]
    return loss(**{t: terms[t] for t in inspect.signature(loss).parameters if t in terms}, **knobs)
