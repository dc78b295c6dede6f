"""Claim 6: which way beta works, under AdamW and under plain SGD: the KL after equally many steps."""

import numpy as np
from common import COLOURS, checkpoint, figure, save, table, verdict

NAME, TITLE = "beta", "Claim 6. β and the optimizer"
RATES = {"AdamW": None, "SGD": 0.05}  # None: the setting's; both clip the gradient's norm at 1

def run_of(setting, seed, optimizer, beta):
    rate = {"lr": RATES[optimizer]} if RATES[optimizer] else {}
    return setting.review_run(seed, "dpo", beta, optimizer=optimizer, checkpoints=(0, setting.run.steps),
                              **rate)

def runs(setting):
    return [run_of(setting, seed, optimizer, beta) for seed in setting.seeds for optimizer in RATES
            for beta in setting.many_betas]

def measure(setting, results):
    return {"betas": setting.many_betas, "kl": {optimizer: [
        [checkpoint(results[run_of(setting, seed, optimizer, beta)])["samples"]["kl"][0]
         for beta in setting.many_betas] for seed in setting.seeds] for optimizer in RATES}}

def report(setting, s):
    betas, kl = list(s["betas"]), s["kl"]
    logs, low = np.log(np.maximum(kl["AdamW"], 1e-6)), betas.index(0.1)
    most = [betas[int(np.argmax(row))] for row in kl["SGD"]]
    rows = [[name, *(f"{np.median(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in np.abs(of).T)]
            for name, of in kl.items()]
    compared = {"logarithm of KL, difference": (logs[:, -1].tolist(), logs[:, low].tolist())}
    return {"verdicts": [
        verdict(f"A larger β holds the policy closer (AdamW, β {betas[-1]:g} against 0.1)", compared, 2)],
            "tables": [
        table(f"DPO on reviews, KL(π‖π_ref) of samples after {setting.run.steps} steps, nats: median over "
              "seeds (least to most), for one sample out of the grammar is most of a mean. AdamW: learning "
              f"rate {setting.run.lr:g}; SGD: {RATES['SGD']:g}, no "
              "momentum; both clip at 1. β that moves furthest under SGD, a seed each: "
              + ", ".join(f"{beta:g}" for beta in most),
              ["optimizer", *(f"β {beta:g}" for beta in betas)], rows)]}

def draw(s, path):
    fig, axes = figure(1, 1, width=6.4, height=3.4)
    for optimizer, colour in (("AdamW", COLOURS["dpo"]), ("SGD", COLOURS["dpop"])):
        kl = np.maximum(s["kl"][optimizer], 1e-3)
        axes[0, 0].plot(s["betas"], np.median(kl, axis=0), marker="o", color=colour, label=optimizer)
        axes[0, 0].fill_between(s["betas"], kl.min(0), kl.max(0), color=colour, alpha=0.15, linewidth=0)
    axes[0, 0].set(xscale="log", yscale="log", xlabel="β", ylabel="KL(policy ‖ reference), nats",
                   title="after equally many steps of DPO (median, least to most)")
    axes[0, 0].legend(fontsize=8)
    save(fig, path)
