"""Claim 6: which way beta works, under AdamW and under plain SGD: the KL after equally many steps.

    python experiments/beta.py [--quick]
"""

import sys

import numpy as np
from common import COLOURS, band, cell, checkpoint, figure, main, save, table, verdict

NAME, TITLE = "beta", "Claim 6. β and the optimizer"
RATES = {"AdamW": None, "SGD": 0.05}  # None: the setting's; both clip the gradient's norm at 1


def run_of(setting, seed, optimizer, beta):
    """0.1 under AdamW is a run of other claims; the others are sampled at their ends only."""
    rate = {"lr": RATES[optimizer]} if RATES[optimizer] else {}
    ends = {} if (optimizer, beta) == ("AdamW", 0.1) else {"checkpoints": (0, setting.run.steps)}
    return setting.review_run(seed, "dpo", beta, optimizer=optimizer, **rate, **ends)


def runs(setting):
    return [run_of(setting, seed, optimizer, beta) for seed in setting.seeds for optimizer in RATES
            for beta in setting.betas]


def summarise(setting, results):
    kl, rows, betas = {}, [], setting.betas
    for optimizer in RATES:
        kl[optimizer] = [[checkpoint(results[run_of(setting, seed, optimizer, beta)])["samples"]["kl"][0]
                          for beta in betas] for seed in setting.seeds]
        rows.append([optimizer, *(cell(column, 3) for column in zip(*kl[optimizer], strict=True))])
    logs = np.log(kl["AdamW"])
    low = betas.index(0.1)
    verdicts = [verdict(f"A larger β holds the policy closer (AdamW, β {betas[-1]:g} against 0.1)",
                        {"logarithm of KL, difference": (logs[:, -1].tolist(), logs[:, low].tolist())}, 2)]
    most = [betas[int(np.argmax(row))] for row in kl["SGD"]]
    return {"verdicts": verdicts, "betas": betas, "kl": kl, "most": most, "tables": [
        table(f"DPO on reviews, KL(π‖π_ref) of samples after {setting.run.steps} steps, nats; mean ± 95 % "
              f"interval over seeds. AdamW: learning rate {setting.run.lr:g}; SGD: {RATES['SGD']:g}, no "
              "momentum; both clip at 1. β that moves furthest under SGD, a seed each: "
              + ", ".join(f"{beta:g}" for beta in most),
              ["optimizer", *(f"β {beta:g}" for beta in betas)], rows)]}


def draw(s, path):
    fig, axes = figure(1, 1, width=6.4, height=3.4)
    for optimizer, colour in (("AdamW", COLOURS["dpo"]), ("SGD", COLOURS["dpop"])):
        band(axes[0, 0], s["betas"], s["kl"][optimizer], optimizer, colour, marker="o")
    axes[0, 0].set(xscale="log", yscale="symlog", xlabel="β", ylabel="KL(policy ‖ reference), nats",
                   title="after equally many steps of DPO (95 % bands)")
    axes[0, 0].set_yscale("symlog", linthresh=0.01)
    axes[0, 0].legend(fontsize=8)
    save(fig, path)


if __name__ == "__main__":
    main([sys.modules[__name__]])
