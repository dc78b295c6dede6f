"""The losses in JAX, from the papers' equations and golden/README.md. Needs jax and nothing of ours.

    loss = loss_of("tdpo2", sums(chosen, z_w, ref_z_w), sums(rejected, z_l, ref_z_l), beta=0.1, alpha=0.5)

tests/test_ports.py writes every golden result with it, gradients included; golden/check.py accepts them all.
All functions are pure: jit, grad and vmap work. B pairs, T columns, V vocabulary, S segments, A aspects; _w
is chosen, _l rejected. A pair is two right-padded rows, prompt + response; column t of the logits predicts
token t + 1. rho = log pi(y|x) - log pi_ref(y|x), in nats, a sum over the response (B,) or a segment (B, S).
"""

import inspect

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

# From logits (B, T, V) to sums

def token_logps(logits, ids, response):
    """log pi(y_t | x, y_<t), (B, T), 0 outside the response (B, T), bool. ids (B, T)."""
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)[..., 0]
    return jnp.pad(jnp.where(response[:, 1:], logps, 0), ((0, 0), (1, 0)))

def token_kl(ref_logits, logits, response):
    """KL(pi_ref || pi) over the vocabulary where each response token is predicted, (B, T), 0 elsewhere."""
    log_q, log_s = (jax.nn.log_softmax(z[:, :-1]) for z in (ref_logits, logits))
    kl = (jnp.exp(log_q) * jnp.where(log_q > -jnp.inf, log_q - log_s, 0)).sum(-1)  # a logit of -inf adds 0
    return jnp.pad(jnp.where(response[:, 1:], kl, 0), ((0, 0), (1, 0)))

def segment_sums(values, segments, S):
    """(B, T) summed over each segment, (B, S). segments (B, T), -1 in none."""
    return jnp.einsum("bt,bts->bs", values, jax.nn.one_hot(segments, S, dtype=values.dtype))

# The losses, (B,)

def minus_log_sigmoid(h):
    return jax.nn.softplus(-h)

def sft(logps_w):
    return -logps_w

def dpo(rho_w, rho_l, *, beta=0.1):
    return minus_log_sigmoid(beta * (rho_w - rho_l))

def dpop(rho_w, rho_l, *, beta=0.3, lam=50.0):
    return minus_log_sigmoid(beta * (rho_w - rho_l - lam * jax.nn.relu(-rho_w)))  # relu's slope at 0 is 0

def tdpo1(rho_w, rho_l, kl_w, kl_l, *, beta=0.1):
    return minus_log_sigmoid(beta * (rho_w - rho_l) - beta * (kl_l - kl_w))

def tdpo2(rho_w, rho_l, kl_w, kl_l, *, beta=0.1, alpha=0.5):
    return minus_log_sigmoid(beta * (rho_w - rho_l) - alpha * beta * (kl_l - stop_gradient(kl_w)))

def vanilla(rho_w, rho_l, r_w, r_l, has_w, has_l, *, beta=0.1):
    """2D-DPO without groups. r_w, r_l (B, S), rewards; has_w, has_l (B, S), bool, where segments exist."""
    w, l_ = jnp.where(has_w, r_w * rho_w, 0), jnp.where(has_l, r_l * rho_l, 0)
    return minus_log_sigmoid(beta * (w.sum(-1) - l_.sum(-1)))

def ascending(values, has):
    """Segments from the lowest value to the highest, absent ones last. Sorted values with a gap of at most
    1e-5 are equal and keep the order of the text."""
    values = jnp.where(has, values, jnp.inf)
    by_value = jnp.argsort(values, -1)
    in_order = jnp.take_along_axis(values, by_value, -1)
    rank = (jnp.diff(in_order, prepend=in_order[..., :1]) > 1e-5).cumsum(-1)
    return jnp.argsort(jnp.take_along_axis(rank, jnp.argsort(by_value, -1), -1), -1, stable=True)

def selected(r_w, r_l, has_w, has_l):
    """Eq. 6's segments, (B, K) each: k-th best chosen, k-th worst rejected, and True for k < N."""
    best, worst = ascending(-r_w, has_w), ascending(r_l, has_l)
    K = min(best.shape[-1], worst.shape[-1])
    paired = jnp.arange(K) < jnp.minimum(has_w.sum(-1), has_l.sum(-1))[..., None]
    return best[..., :K], worst[..., :K], paired

def group(rho_w, rho_l, r_w, r_l, has_w, has_l, *, beta=0.1):
    """2D-DPO, Eq. 6: a log-sigmoid for each pair of segments."""
    best, worst, paired = selected(r_w, r_l, has_w, has_l)
    h = jnp.take_along_axis(r_w * rho_w, best, -1) - jnp.take_along_axis(r_l * rho_l, worst, -1)
    return jnp.where(paired, minus_log_sigmoid(beta * jnp.where(paired, h, 0)), 0).sum(-1)

# From a batch to a loss

LOSSES = {"sft": sft, "dpo": dpo, "dpop": dpop, "tdpo1": tdpo1, "tdpo2": tdpo2, "2d-dpo-vanilla": vanilla,
          "2d-dpo": group}

def sums(x, z, z_ref):
    """Everything that the losses are made of, for one side of the pairs, by name.

    x: ids, response_mask, segments (B, T), scores (B, S, A), aspect_max, aspect_weights (A,).
    z, z_ref: the logits.
    """
    ids, response, segments, S = x["ids"], x["response_mask"], x["segments"], x["scores"].shape[1]
    logps, ref_logps = (token_logps(logits, ids, response) for logits in (z, z_ref))
    kl = token_kl(z_ref, z, response)
    return {"token_logps": logps, "ref_token_logps": ref_logps, "token_kl": kl,
            "logps": logps.sum(-1), "ref_logps": ref_logps.sum(-1), "seq_kl": kl.sum(-1),
            "segment_logps": segment_sums(logps, segments, S),
            "ref_segment_logps": segment_sums(ref_logps, segments, S),
            "rewards": (x["scores"] / x["aspect_max"]) @ x["aspect_weights"],
            "has": (segments[..., None] == jnp.arange(S)).any(1)}

def loss_of(name, w, l_, **knobs):
    """A loss by name, (B,), from the sums of the chosen and of the rejected side."""
    terms = {}
    for side, q in (("w", w), ("l", l_)):
        per = "segment_" if name.startswith("2d") else ""
        terms |= {f"logps_{side}": q["logps"], f"rho_{side}": q[f"{per}logps"] - q[f"ref_{per}logps"],
                  f"kl_{side}": q["seq_kl"], f"r_{side}": q["rewards"], f"has_{side}": q["has"]}
    loss = LOSSES[name]
    return loss(**{t: terms[t] for t in inspect.signature(loss).parameters if t in terms}, **knobs)
