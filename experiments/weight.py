"""Claim 2: the weight sigma(r_l - r_w) in DPO's gradient: on noisy labels, and DPO without it.

That wrongly ordered pairs weigh more is no finding: the weight is a function of the order. Whether the pairs
with a false label get more of it, and what happens without it, are.
"""

import numpy as np
from common import COLOURS, band, cell, figure, reaches, save, series, table, verdict, versus

NAME, TITLE = "weight", "Claim 2. The weight in DPO's gradient (DPO, §4)"
GROUPS = {"label_false": ("false label", "#d62728"), "label_true": ("true label", "#1f77b4")}
LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)  # nats of KL at which the two are compared
VARIANTS = {"dpo-0.1": ("dpo", 0.1, "DPO, β 0.1", COLOURS["dpo"]),
            "dpo-1": ("dpo", 1.0, "DPO, β 1", "#7fb8e0"),
            "unweighted": ("unweighted", 0.1, "weight held at ½", COLOURS["unweighted"])}

def run_of(setting, seed, name):
    loss, beta, _, _ = VARIANTS[name]
    return setting.review_run(seed, loss, beta, times=2)

def runs(setting):
    return [run_of(setting, seed, name) for seed in setting.seeds for name in VARIANTS]

def windows(weights, group):
    """Mean weight of a group of pairs in twelve windows of steps; None where it had no pair."""
    means = []
    for part in np.array_split(np.array([step[group] for step in weights]), min(12, len(weights))):
        total, count = part.sum(axis=0)
        means.append(float(total / count) if count else None)
    return means

PICKS = {"reward": lambda c: c["samples"]["reward"][0], "kl": lambda c: c["samples"]["kl"][0],
         "valid": lambda c: c["samples"]["valid"], "accuracy": lambda c: c["held_out"]["rewards/accuracies"],
         "chosen": lambda c: c["held_out"]["logratio/chosen"]}

def measure(setting, results):
    weights, trace = {}, {}
    for name in VARIANTS:
        seeds = [results[run_of(setting, seed, name)] for seed in setting.seeds]
        trace[name] = {"steps": series(seeds, PICKS["kl"])[0]}
        trace[name] |= {key: series(seeds, pick)[1].tolist() for key, pick in PICKS.items()}
        if name != "unweighted":
            weights[name] = {group: [windows(r["weights"], group) for r in seeds] for group in GROUPS}
    return {"weights": weights, "trace": trace}

def report(setting, s):
    weights, trace, weight_rows, state_rows = s["weights"], s["trace"], [], []
    for name, t in trace.items():
        for at in len(t["steps"]) // 2, -1:
            values = {key: [row[at] for row in t[key]] for key in PICKS}
            state_rows.append([VARIANTS[name][2], t["steps"][at],
                               *(cell(x, 1 if key == "chosen" else 2) for key, x in values.items())])
    for name, of in weights.items():
        for where, at in (("first", 0), ("middle", len(of["label_true"][0]) // 2), ("last", -1)):
            false, true = ([w[at] for w in of[group]] for group in GROUPS)
            weight_rows.append([VARIANTS[name][2], where, cell(false, 3), cell(true, 3),
                                versus(false, true, 3)])
    pairs = [list(zip(trace[name]["kl"], trace[name]["reward"], strict=True))
             for name in ("dpo-0.1", "unweighted")]
    equal = {f"reward with − without, KL {level:g}": [[reaches(*xy, level) for xy in of] for of in pairs]
             for level in LEVELS}
    last = {f"weight of false − true labels, {VARIANTS[name][2]}, last twelfth":
            [[w[-1] for w in of[group]] for group in GROUPS] for name, of in weights.items()}
    return {"verdicts": [verdict("(ours) The weight singles out falsely labelled pairs", last),
                         verdict("Without the weight the policy degenerates (β 0.1, at equal KL)", equal, 2)],
            "tables": [
        table("Mean gradient weight σ(r̂_l − r̂_w) of the training pairs in the first, middle and last "
              f"twelfth of {2 * setting.run.steps} steps, by whether the noisy label agrees with the true "
              "reward; mean ± 95 % interval over seeds",
              ["", "twelfth", *(label for label, _ in GROUPS.values()), "false − true, paired"], weight_rows),
        table("DPO, and the same gradient with its weight held at ½: true reward and KL of samples, share of "
              "sentences in the grammar, held-out accuracy, log-ratio of held-out chosen; mean ± 95 % "
              "interval", ["", "step", "true reward", "KL, nats", "in the grammar", "accuracy",
                           "chosen log-ratio, nats"], state_rows)]}

def draw(s, path):
    fig, axes = figure(1, 4, width=3.7, height=3.2)
    for axis, name in zip(axes[0], s["weights"], strict=False):
        for group, (label, colour) in GROUPS.items():
            values = np.array(s["weights"][name][group], dtype=float)
            x = s["trace"][name]["steps"][-1] * (np.arange(values.shape[1]) + 0.5) / values.shape[1]
            band(axis, x, values, label, colour)
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
        axis.set(title=VARIANTS[name][2], xlabel="step", ylabel="weight σ(r̂_l − r̂_w)", ylim=(0, 0.85))
    axes[0, 0].legend(fontsize=7, loc="upper left")
    panels = {"reward": "true reward of samples", "chosen": "log-ratio of held-out chosen, nats"}
    for axis, (key, label) in zip(axes[0, 2:], panels.items(), strict=True):
        for name, trace in s["trace"].items():
            band(axis, trace["steps"], trace[key], VARIANTS[name][2], VARIANTS[name][3])
        axis.set(xlabel="step", ylabel=label, title="with and without the weight")
    axes[0, 2].legend(fontsize=7, loc="lower left")
    save(fig, path)
