"""What DPO and TDPO1 converge to: reward against KL of both population optima over beta, exact, no training.

    python experiments/optima.py      results/optima.json, figures/optima.png

All responses of at most 3 of 4 tokens, token 0 ends one; a random reference and a random reward r(y).
DPO's optimum is Eq. 4, pi_ref e^(r / beta) / Z over responses. TDPO1's is pi_ref e^(Q_ref / beta) / Z token
by token, Q_ref the mean reward when pi_ref goes on: tests/test_identities.py descends to it.
"""

import json

import numpy as np
from common import COLOURS, HERE, figure, markdown, save, table

TOKENS, LONGEST = 4, 3
BETAS = (0.25, 0.5, 1.0, 2.0)  # of the table

def contexts(prefix=()):
    """All prefixes that a response may go on from."""
    longer = range(1, TOKENS) if len(prefix) + 1 < LONGEST else ()
    return [prefix, *(c for token in longer for c in contexts((*prefix, token)))]

def responses(context=()):
    """All responses that continue a context."""
    if context and (context[-1] == 0 or len(context) == LONGEST):
        return [context]
    return [y for token in range(TOKENS) for y in responses((*context, token))]

def of_responses(policy):
    """pi(y) of all responses, of a policy {context: token probabilities}."""
    return np.array([np.prod([policy[y[:t]][y[t]] for t in range(len(y))]) for y in responses()])

def q_ref(p, r):
    """{context: Q_ref of each next token}: the mean of r(y) when the reference goes on from there."""
    of = dict(zip(responses(), zip(p, r, strict=True), strict=True))

    def mean(context):
        weights, values = np.array([of[y] for y in responses(context)]).T
        return weights @ values / weights.sum()
    return {c: np.array([mean((*c, token)) for token in range(TOKENS)]) for c in contexts()}

def optima(reference, p, r, q, beta):
    """(DPO's, TDPO1's) optimum as probabilities of all responses."""
    tilted = p * np.exp((r - r.max()) / beta)
    policy = {c: reference[c] * np.exp((q[c] - q[c].max()) / beta) for c in reference}
    return tilted / tilted.sum(), of_responses({c: x / x.sum() for c, x in policy.items()})

def random_world(seed):
    """({context: token probabilities}, p(y), r(y), Q_ref): standard normal logits and rewards."""
    rng = np.random.default_rng(seed)
    weights = {c: np.exp(rng.normal(size=TOKENS)) for c in contexts()}
    reference = {c: x / x.sum() for c, x in weights.items()}
    p, r = of_responses(reference), rng.normal(size=len(responses()))
    return reference, p, r, q_ref(p, r)

def measure(worlds=20):
    """Curves of the first world; what TDPO1 lacks at its own KL in all of them."""
    curves, found = None, {beta: [] for beta in BETAS}
    for seed in range(worlds):
        world = _, p, r, _ = random_world(seed)

        def point(pi, p=p, r=r):
            return float(pi @ r), float(pi @ np.log(pi / p))  # mean reward, KL to the reference

        grid = np.geomspace(50, 0.05, 80)
        dpo, tdpo1 = (np.array([point(optima(*world, b)[i]) for b in grid]).T for i in (0, 1))
        curves = curves or {"dpo": dpo.tolist(), "tdpo1": tdpo1.tolist()}  # (rewards, KLs)
        for beta in BETAS:
            (r_4, kl_4), (r_1, kl_1) = (point(pi) for pi in optima(*world, beta))
            found[beta].append((r_4 - beta * kl_4, r_1 - beta * kl_1, np.interp(kl_1, *dpo[::-1]) - r_1))
    rows = [[f"{beta:g}", *(f"{x:.3f}" for x in of[0]), f"{np.mean(of, 0)[2]:.3f} "
             f"({np.min(of, 0)[2]:.3f} to {np.max(of, 0)[2]:.3f})"] for beta, of in found.items()]
    return curves | {"tables": [table(
        f"Exact, over all {len(responses())} responses of a small world. The last column is of {worlds} "
        "random worlds, the others of the first",
        ["β", "E r − β KL: Eq. 4 (DPO)", "π_ref e^{Q_ref/β} (TDPO1)", "reward that TDPO1 lacks at its own KL",
         "the same, mean (least to most)"], rows)]}

def draw(s, path):
    fig, axes = figure(1, 1, width=6, height=3.6)
    for name, label in (("dpo", "DPO: Eq. 4, $\\pi_{ref}\\,e^{r/\\beta}$"),
                        ("tdpo1", "TDPO1: $\\pi_{ref}\\,e^{Q_{ref}/\\beta}$, token by token")):
        axes[0, 0].plot(*s[name][::-1], color=COLOURS[name], label=label)
    axes[0, 0].set(xlabel="KL(policy ‖ reference), nats", ylabel="mean reward",
                   title="population optima over β, exact")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    save(fig, path)

if __name__ == "__main__":
    found = measure()
    (HERE / "results" / "optima.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    draw(found, HERE / "figures" / "optima.png")
    print(markdown(found))
