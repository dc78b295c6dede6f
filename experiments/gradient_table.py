"""What each loss does to each token of one pair: autograd beside the closed form.

    python experiments/gradient_table.py

The pair differs in one token: "The answer is 4" is chosen, "The answer is 5" rejected. They share three
tokens and the context of the fourth, hence the logits there. A negative gradient is a push up: descent
subtracts it. All losses have the same beta, so that columns compare; g = beta sigma(-h) is each loss's own.
The script stops if a closed form is off by more than 1e-12.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import losses  # noqa: E402

BETA, LAM, ALPHA = 0.5, 5.0, 0.5
VOCABULARY = ["The", "answer", "is", "4", "5", "<end>"]
# contexts, one row of logits each:  ""  The  The answer  ... is   ... is 4   ... is 5
CHOSEN = [(0, "The"), (1, "answer"), (2, "is"), (3, "4"), (4, "<end>")]     # (context, token)
REJECTED = [(0, "The"), (1, "answer"), (2, "is"), (3, "5"), (5, "<end>")]
SEGMENT = [0, 0, 0, 1, 1]                                                   # "The answer is", "4<end>"
R_W, R_L = [0.5, 1.0], [0.4, 0.2]                                           # rewards of the segments

# probability of the token that comes, context by context; what is left is spread over the other tokens
REFERENCE = [{"The": 0.60}, {"answer": 0.50}, {"is": 0.70}, {"4": 0.30, "5": 0.40},
             {"<end>": 0.80}, {"<end>": 0.80}]
POLICY = {
    "HEALTHY PAIR": [{"The": 0.65}, {"answer": 0.50}, {"is": 0.75}, {"4": 0.50, "5": 0.20},
                     {"<end>": 0.85}, {"<end>": 0.70}],
    "UNHEALTHY PAIR": [{"The": 0.50}, {"answer": 0.40}, {"is": 0.60}, {"4": 0.32, "5": 0.20},
                       {"<end>": 0.60}, {"<end>": 0.70}],
}
NAMES = [name for name in losses.LOSSES if name != "sft"]


def logits_of(rows):
    """Logits (6 contexts, V) with the given probabilities."""
    table = []
    for row in rows:
        rest = (1.0 - sum(row.values())) / (len(VOCABULARY) - len(row))
        table.append([math.log(row.get(token, rest)) for token in VOCABULARY])
    return torch.tensor(table, dtype=torch.float64)


def all_losses(token_w, token_l, ref_w, ref_l, k_w, k_l):
    """The losses of one pair from its token log-probabilities (N,) and KLs (1,): name -> number."""
    knobs, values = {"beta": BETA, "lam": LAM, "alpha": ALPHA}, {}
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    terms = {"chosen_seq_kl": k_w, "rejected_seq_kl": k_l}
    for side, r in (("chosen", R_W), ("rejected", R_L)):
        terms |= {f"{side}_rewards": torch.tensor([r], dtype=torch.float64),
                  f"{side}_mask": torch.ones(1, 2, dtype=torch.bool)}
    for name in NAMES:
        loss = losses.LOSSES[name]
        segmented = "chosen_rewards" in losses.terms_of(loss)
        for key, x in zip(names, (token_w, token_l, ref_w, ref_l), strict=True):
            segment = torch.tensor(SEGMENT) * int(segmented)
            sums = losses.segment_sum(x, segment, 2)
            terms[key] = sums.unsqueeze(0) if segmented else sums[:1]
        values[name] = loss(**{key: terms[key] for key in losses.terms_of(loss)},
                            **{knob: knobs[knob] for knob in losses.knobs_of(loss)})
    return values


def pick(table, side):
    """The rows of a table (contexts, V) that predict a response, and the ids of its tokens."""
    contexts, tokens = zip(*side, strict=True)
    return table[list(contexts)], torch.tensor([VOCABULARY.index(y) for y in tokens])


def closed_forms(rho_w, rho_l, k_w, k_l):
    """What dL/d log pi(y_t) and dL/dK should be: name -> (chosen tokens, rejected tokens, K_w, K_l)."""
    def g(h):
        return BETA / (1.0 + math.exp(h))

    sum_w, sum_l = sum(rho_w), sum(rho_l)
    u, below = BETA * (sum_w - sum_l), sum_w < 0
    part_w = [sum(x for x, k in zip(rho_w, SEGMENT, strict=True) if k == s) for s in (0, 1)]
    part_l = [sum(x for x, k in zip(rho_l, SEGMENT, strict=True) if k == s) for s in (0, 1)]
    g_dpo = g(u)
    g_dpop = g(u - BETA * LAM * max(0.0, -sum_w))
    g_1 = g(u - BETA * (k_l - k_w))
    g_2 = g(u - ALPHA * BETA * (k_l - k_w))
    g_v = g(BETA * sum(R_W[s] * part_w[s] - R_L[s] * part_l[s] for s in (0, 1)))
    # Eq. 6: the best chosen segment (1.0) meets the worst rejected one (0.2), and 0.5 meets 0.4
    g_k = [g(BETA * (R_W[s] * part_w[s] - R_L[s] * part_l[s])) for s in (0, 1)]
    n = len(SEGMENT)
    return {
        "dpo": ([-g_dpo] * n, [g_dpo] * n, 0.0, 0.0),
        "dpop": ([-g_dpop * (1 + LAM * below)] * n, [g_dpop] * n, 0.0, 0.0),
        "tdpo1": ([-g_1] * n, [g_1] * n, -g_1, g_1),
        "tdpo2": ([-g_2] * n, [g_2] * n, 0.0, ALPHA * g_2),
        "2d-dpo-vanilla": ([-g_v * R_W[s] for s in SEGMENT], [g_v * R_L[s] for s in SEGMENT], 0.0, 0.0),
        "2d-dpo": ([-g_k[s] * R_W[s] for s in SEGMENT], [g_k[s] * R_L[s] for s in SEGMENT], 0.0, 0.0),
    }


def closed_logit_form(name, forms, context, token, s, q):
    """dL/dz of one logit: -g (e - s) (DPOP 1 + lam, 2D r_k times) for a chosen token in this context, plus
    +g (e - s) for a rejected one; TDPO1 has q for s, TDPO2 (1 - alpha) s + alpha q on the rejected side."""
    chosen, rejected, _, _ = forms[name]
    instead_w = q if name == "tdpo1" else s
    instead_l = {"tdpo1": q, "tdpo2": (1 - ALPHA) * s + ALPHA * q}.get(name, s)
    value = 0.0
    for t, (where, y) in enumerate(CHOSEN):
        if where == context:
            value += chosen[t] * ((y == token) - instead_w)
    for t, (where, y) in enumerate(REJECTED):
        if where == context:
            value += rejected[t] * ((y == token) - instead_l)
    return value


def line(label, cells):
    """One row: pairs of (autograd, closed form), or None where a loss does not have the quantity."""
    text = f"{label:16}"
    for cell in cells:
        if cell is None:
            text += " " * 15
            continue
        found, closed = cell
        assert abs(found - closed) < 1e-12, (label, found, closed)
        text += "".join(f" {round(x, 3) + 0.0:+.3f}" for x in cell).rjust(15)   # + 0.0: never -0.000
    print(text.rstrip())


def heading(label):
    """Two lines: the losses; what stands in the two halves of a column."""
    print((f"{label:16}" + "".join(f" {n:^14}" for n in NAMES)).rstrip())
    print(" " * 16 + "  autogr closed" * len(NAMES))


def show(title, policy, reference):
    """Both tables for one pair."""
    z, z_ref = logits_of(policy), logits_of(reference)
    sides = [pick(z, CHOSEN), pick(z, REJECTED), pick(z_ref, CHOSEN), pick(z_ref, REJECTED)]
    token_logps = [losses.token_logps(*side) for side in sides]
    kls = [losses.token_kl(sides[i + 2][0], sides[i][0]).sum().reshape(1) for i in (0, 1)]
    rho = [(token_logps[i] - token_logps[i + 2]).tolist() for i in (0, 1)]
    forms = closed_forms(*rho, *(float(k) for k in kls))
    where = "above" if sum(rho[0]) > 0 else "below"
    print(f"{title}: chosen {abs(sum(rho[0])):.2f} nats {where} the reference (rho_w {sum(rho[0]):+.2f}, "
          f"rho_l {sum(rho[1]):+.2f}, K_w {float(kls[0]):.3f}, K_l {float(kls[1]):.3f})\n")

    # 1. in the log-probabilities: leaves are the token log-probabilities and the two KLs
    leaves = [x.clone().requires_grad_() for x in (*token_logps[:2], *kls)]
    values = all_losses(*leaves[:2], *token_logps[2:], *leaves[2:])
    grads = {n: torch.autograd.grad(values[n], leaves, retain_graph=True, allow_unused=True) for n in NAMES}
    heading("dL/d log pi(y_t)")
    for i, (label, side) in enumerate((("chosen", CHOSEN), ("rejected", REJECTED))):
        for t, (_, y) in enumerate(side):
            line(f"{label:9}{y}", [(float(grads[n][i][t]), forms[n][i][t]) for n in NAMES])
    for i, label in ((2, "K_w"), (3, "K_l")):
        found = {n: 0.0 if grads[n][i] is None else float(grads[n][i]) for n in ("tdpo1", "tdpo2")}
        line(f"dL/d {label}", [(found[n], forms[n][i]) if n in found else None for n in NAMES])

    # 2. in the logits that the two responses share where their contexts are the same
    leaf = z.clone().requires_grad_()
    (z_w, y_w), (z_l, y_l) = pick(leaf, CHOSEN), pick(leaf, REJECTED)
    kl = [losses.token_kl(sides[i + 2][0], x).sum().reshape(1) for i, x in enumerate((z_w, z_l))]
    values = all_losses(losses.token_logps(z_w, y_w), losses.token_logps(z_l, y_l), *token_logps[2:], *kl)
    grads = {n: torch.autograd.grad(values[n], leaf, retain_graph=True)[0] for n in NAMES}
    s, q = z.softmax(-1), z_ref.softmax(-1)
    print()
    heading("dL/dz,   pi/ref")
    rows = [(c, y, "") for c, y in CHOSEN[:4]] + [REJECTED[3] + ("",)]
    rows += [(4, "<end>", "|4"), (5, "<end>", "|5")]
    for context, token, after in rows:
        v = VOCABULARY.index(token)
        p, p_ref = float(s[context, v]), float(q[context, v])
        closed = [closed_logit_form(n, forms, context, token, p, p_ref) for n in NAMES]
        found = [float(grads[n][context, v]) for n in NAMES]
        line(f"{token + after:8} {100 * p:2.0f}/{100 * p_ref:2.0f}%", zip(found, closed, strict=True))
    print()


def main():
    print(f"beta {BETA}, lam {LAM}, alpha {ALPHA}; segments: The answer is | 4 <end>; "
          f"rewards: chosen {R_W}, rejected {R_L}\n".replace("[", "").replace("]", ""))
    for title, policy in POLICY.items():
        show(title, policy, REFERENCE)
    print("""The first five rows of dL/dz are shared contexts: both responses' gradients meet in one logit.
DPO     a shared prefix gets 0, however far it fell: only the difference of the two responses counts.
DPOP    the same on the healthy pair. Below the reference the chosen side weighs 1 + lam, and the prefix is
        raised with it: -g lam (1 - s).
TDPO1   a shared prefix gets 0. <end>: -g(1 - q), where DPO has -g(1 - s): the reference sets its size.
TDPO2   dL/dK_w is 0, the stop-gradient, so the rejected KL's pull g alpha (s - q) stays: it moves a shared
        prefix back to the reference, down on the healthy pair, up on the unhealthy one.
2D      each segment has its reward's share of the push; 2D-DPO has a g for each pair of segments. A prefix
        that scores differently on the two sides (0.5 and 0.4) no longer cancels.""")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()  # it takes none
    main()
