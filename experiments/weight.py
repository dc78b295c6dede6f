"""Claim 2: the weight sigma(r_l - r_w) in DPO's gradient, over training, and DPO without it.

    python experiments/weight.py [--quick]
"""

import sys

import numpy as np
from common import COLOURS, band, cell, checkpoint, figure, main, save, series, table

NAME, TITLE = "weight", "Claim 2. The weight in DPO's gradient (DPO, §4)"
GROUPS = {"all": ("all pairs", "black"), "wrong": ("ranked wrongly by the policy", "#d62728"),
          "right": ("ranked rightly", "#1f77b4"), "label_false": ("label against the true reward", "#ff7f0e"),
          "label_true": ("label with the true reward", "#2ca02c")}
WINDOW = 10  # steps in a point of the curve


def variants(setting):
    """name -> (loss, beta, label, colour)."""
    return {"dpo-0.1": ("dpo", 0.1, "DPO, β 0.1", COLOURS["dpo"]),
            "dpo-1": ("dpo", 1.0, "DPO, β 1", "#17becf"),
            "unweighted": ("unweighted", 0.1, "unweighted", COLOURS["unweighted"])}


def run_of(setting, seed, name):
    loss, beta, _, _ = variants(setting)[name]
    return setting.review_run(seed, loss, beta, steps=setting.long[-1], checkpoints=setting.long)


def runs(setting):
    return [run_of(setting, seed, name) for seed in setting.seeds for name in variants(setting)]


def windows(weights, group):
    """Mean weight of a group of pairs in windows of steps; None where it had no pair."""
    means = []
    for at in range(0, len(weights), WINDOW):
        total, count = np.sum([step[group] for step in weights[at:at + WINDOW]], axis=0)
        means.append(float(total / count) if count else None)
    return means


PICKS = {"reward": lambda c: c["samples"]["reward"][0], "kl": lambda c: c["samples"]["kl"][0],
         "valid": lambda c: c["samples"]["valid"], "accuracy": lambda c: c["held_out"]["rewards/accuracies"],
         "chosen": lambda c: c["held_out"]["logratio/chosen"]}


def summarise(setting, results):
    weights, trace, weight_rows, state_rows = {}, {}, [], []
    last = WINDOW * ((setting.long[-1] - 1) // WINDOW)
    middle = WINDOW * (last // WINDOW // 2)
    for name, (_, _, label, _) in variants(setting).items():
        seeds = [results[run_of(setting, seed, name)] for seed in setting.seeds]
        trace[name] = {"steps": setting.long} | {key: series(seeds, pick)[1].tolist()
                                                 for key, pick in PICKS.items()}
        for step in setting.long[1:]:
            records = [checkpoint(r, step) for r in seeds]
            state_rows.append([label, step, *(cell([pick(r) for r in records], 1 if key == "chosen" else 2)
                                              for key, pick in PICKS.items())])
        if name == "unweighted":
            continue
        weights[name] = {group: [windows(r["weights"], group) for r in seeds] for group in GROUPS}
        for group, (pairs, _) in GROUPS.items():
            weight_rows.append([label, pairs, *(cell([w[at // WINDOW] for w in weights[name][group]], 3)
                                                for at in (0, middle, last))])
    columns = [f"steps {at + 1}–{at + WINDOW}" for at in (0, middle, last)]
    return {"weights": weights, "trace": trace, "tables": [
        table("Mean gradient weight σ(r̂_l − r̂_w) of the training pairs of ten steps; mean [least, most] over "
              "seeds", ["", "pairs", *columns], weight_rows),
        table("DPO, and the same gradient with its weight held at ½: true reward and KL of samples, share of "
              "sentences in the grammar, held-out accuracy, log-ratio of held-out chosen",
              ["", "step", "true reward", "KL, nats", "sentences in the grammar", "accuracy",
               "chosen log-ratio, nats"], state_rows)]}


def draw(s, path):
    fig, axes = figure(2, 3, width=4, height=3)
    for axis, name in zip(axes[:, 0], ("dpo-0.1", "dpo-1"), strict=True):
        for group, (label, colour) in GROUPS.items():
            values = np.array(s["weights"][name][group], dtype=float)
            band(axis, WINDOW * (np.arange(values.shape[1]) + 0.5), values, label, colour)
        axis.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
        axis.set(title=f"DPO, β {name[4:]}", xlabel="step", ylabel="weight σ(r̂_l − r̂_w)", ylim=(0, 1))
    axes[0, 0].legend(fontsize=6.5)
    shown = variants(None)
    panels = {"reward": "true reward of samples", "valid": "share of sentences in the grammar",
              "kl": "KL(policy ‖ reference), nats", "chosen": "log-ratio of held-out chosen, nats"}
    for axis, (key, label) in zip(axes[:, 1:].flat, panels.items(), strict=True):
        for name, trace in s["trace"].items():
            band(axis, trace["steps"], trace[key], shown[name][2], shown[name][3], marker=".")
        axis.set(xlabel="step", ylabel=label)
    axes[0, 1].legend(fontsize=7)
    save(fig, path)


if __name__ == "__main__":
    main([sys.modules[__name__]])
