"""Claim 7: what a reader would not expect and the runs of the other claims show.

    python experiments/surprises.py [--quick]
"""

import math
import sys

import edit_distance
import numpy as np
import weight
from common import band, cell, checkpoint, figure, main, save, series, table

NAME, TITLE = "surprises", "Claim 7. What one would not expect"


def dpo_runs(setting, seed):
    """{beta: run}; those that are not on the frontier are sampled at the end only."""
    ends = {"checkpoints": (0, setting.run.steps)}
    return {beta: setting.review_run(seed, "dpo", beta, **({} if beta in setting.betas else ends))
            for beta in setting.many_betas}


def one_edit(setting, seed):
    return edit_distance.run_of(setting, seed, "dpo", setting.edits[0])


def long_dpo(setting, seed):
    return weight.run_of(setting, seed, "dpo-0.1")


def grouped(setting, seed):
    return setting.review_run(seed, "2d-dpo", setting.betas[0])


def runs(setting):
    return [run for seed in setting.seeds
            for run in (one_edit(setting, seed), grouped(setting, seed), long_dpo(setting, seed),
                        *dpo_runs(setting, seed).values())]


def summarise(setting, results):
    ones = [results[one_edit(setting, seed)] for seed in setting.seeds]
    steps, chosen = series(ones, lambda c: c["held_out"]["logratio/chosen"])
    accuracy = series(ones, lambda c: c["held_out"]["rewards/accuracies"])[1]
    right = series(ones, lambda c: c["accuracy"][0])[1]
    kl = {beta: [checkpoint(results[dpo_runs(setting, seed)[beta]])["samples"]["kl"][0]
                 for seed in setting.seeds] for beta in setting.many_betas}
    low, high = setting.many_betas[0], setting.many_betas[-1]
    dpo = [results[long_dpo(setting, seed)] for seed in setting.seeds]
    review_steps, loss = series(dpo, lambda c: c["held_out"]["loss"])
    reward = series(dpo, lambda c: c["samples"]["reward"][0])[1]
    best = reward.argmax(1)
    loss_there = loss[np.arange(len(loss)), best]
    start = [checkpoint(results[grouped(setting, seed)], 0)["held_out"] for seed in setting.seeds]
    paired = [m["segments/paired"] for m in start]
    rows = [
        ["The chosen answer gets less likely while nearly every pair is ranked rightly: sums, DPO, one "
         f"edited digit, step {steps[-1]}", "held-out pair accuracy", cell(accuracy[:, -1], 3)],
        ["", "log-ratio of the chosen answer, nats", cell(chosen[:, -1])],
        ["", "sums worked out right, before → after", f"{cell(right[:, 0])} → {cell(right[:, -1])}"],
        [f"β against KL: reviews, DPO, KL(π‖π_ref) of samples at step {setting.run.steps}, nats",
         f"β {low:g}", cell(kl[low])],
        ["", f"β {high:g}", cell(kl[high])],
        ["", f"ratio of the two KLs, where the ratio of β is {high / low:g}",
         cell([a / b for a, b in zip(kl[low], kl[high], strict=True)], 1)],
        ["The loss of Eq. 6 starts at N log 2, not log 2: reviews, 2D-DPO, step 0", "held-out loss",
         cell([m["loss"] for m in start], 4)],
        ["", "mean N, pairs of segments", cell(paired, 4)],
        ["", "mean N times log 2", cell([n * math.log(2) for n in paired], 4)],
        ["The held-out loss says nothing of a collapse: reviews, DPO, β 0.1",
         "true reward, best checkpoint → last", f"{cell(reward.max(1))} → {cell(reward[:, -1])}"],
        ["", "held-out loss at the same two", f"{cell(loss_there, 3)} → {cell(loss[:, -1], 3)}"],
        ["", "step of the best checkpoint, a seed each", ", ".join(str(review_steps[i]) for i in best)]]
    return {"steps": steps, "chosen": chosen.tolist(), "accuracy": accuracy.tolist(), "kl": list(kl.items()),
            "review_steps": review_steps, "reward": reward.tolist(), "loss": loss.tolist(), "paired": paired,
            "tables": [table("Three lines each; mean ± 95 % interval over seeds",
                             ["surprise", "number", "value"], rows)]}


def draw(s, path):
    fig, axes = figure(1, 3, width=4.2, height=3.2)
    first, second, third = axes[0]
    band(first, s["steps"], s["chosen"], "log-ratio of chosen", "#1f77b4", marker=".")
    first.axhline(0, color="grey", linewidth=0.8, linestyle="--")
    first.set(xlabel="step", ylabel="log-ratio of held-out chosen, nats", title="sums, one edited digit, DPO")
    other = first.twinx()
    other.spines["top"].set_visible(False)
    band(other, s["steps"], s["accuracy"], "pair accuracy", "#ff7f0e", marker=".")
    other.set(ylabel="pair accuracy", ylim=(0.4, 1.02))
    lines = [*first.lines[:1], *other.lines]
    first.legend(lines, [line.get_label() for line in lines], fontsize=7, loc="center left")
    betas, kl = zip(*s["kl"], strict=True)
    band(second, betas, np.array(kl).T, "DPO", "#1f77b4", marker=".")
    second.set(xscale="log", yscale="log", xlabel="β", ylabel="KL(policy ‖ reference), nats",
               title="reviews, DPO: KL at the last step")
    band(third, s["review_steps"], s["reward"], "true reward of samples", "#2ca02c", marker=".")
    third.set(xlabel="step", ylabel="true reward", title="reviews, DPO, β 0.1")
    right = third.twinx()
    right.spines["top"].set_visible(False)
    band(right, s["review_steps"], s["loss"], "held-out loss", "#d62728", marker=".")
    right.set(ylabel="held-out DPO loss")
    lines = [*third.lines, *right.lines]
    third.legend(lines, [line.get_label() for line in lines], fontsize=7, loc="lower left")
    save(fig, path)


if __name__ == "__main__":
    main([sys.modules[__name__]])
