"""The learning rate of all runs, chosen once by DPO's held-out loss on a seed of its own.

    python experiments/choose.py
"""

import sys

from common import cell, figure, main, save, table

NAME, TITLE = "choose", "The learning rate, chosen by held-out loss"
SEED = 100  # no claim uses it
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
BETAS = {"reviews": 1.0, "sums": 0.3}  # the labels' own, at which Eq. 4 is near the reference; DPOP's


def candidates(setting):
    """{(world, rate): run}."""
    reviews = {("reviews", lr): setting.review_run(SEED, "dpo", BETAS["reviews"], lr=lr) for lr in RATES}
    return reviews | {("sums", lr): setting.sums_runs(SEED, 1, beta=BETAS["sums"], lr=lr)
                      for lr in RATES}


def runs(setting):
    return list(candidates(setting).values())


def summarise(setting, results):
    rows, curves = [], {}
    for (world, lr), run in candidates(setting).items():
        records = results[run]["checkpoints"]
        losses = [c["held_out"]["loss"] for c in records]
        curves[f"{world} {lr:g}"] = [[c["step"] for c in records], losses]
        rows.append([world, f"{lr:g}", *(cell([x], 4) for x in (min(losses), losses[-1])),
                     cell([records[-1]["held_out"]["rewards/accuracies"]], 3)])
    chosen = {world: min((rate for w, rate in candidates(setting) if w == world),
                         key=lambda lr, world=world: min(curves[f"{world} {lr:g}"][1])) for world in BETAS}
    return {"curves": curves, "chosen": chosen, "tables": [table(
        f"DPO, seed {SEED}, β {BETAS['reviews']:g} (reviews), {BETAS['sums']:g} (sums, one edited digit): "
        "held-out loss and accuracy",
        ["world", "learning rate", "least loss", "last loss", "last accuracy"], rows)]}


def draw(s, path):
    fig, axes = figure(1, 2)
    for axis, world in zip(axes[0], BETAS, strict=True):
        for name, (steps, losses) in s["curves"].items():
            if name.startswith(world):
                axis.plot(steps, losses, marker=".", label=f"learning rate {name.split()[1]}")
        axis.set(title=world, xlabel="step", ylabel="held-out DPO loss")
    axes[0, 0].legend(fontsize=7)
    save(fig, path)


if __name__ == "__main__":
    main([sys.modules[__name__]])
