"""Claim 4: TDPO's Fig. 3. Sequential KL of chosen and rejected over training, and diversity at equal reward.

    python experiments/seqkl.py [--quick]
"""

import sys

import matplotlib
import numpy as np
from common import COLOURS, band, cell, checkpoint, figure, main, save, series, table

NAME, TITLE = "seqkl", "Claim 4. Sequential KL and diversity (TDPO, Fig. 3)"
BETAS = (0.1, 1.0)  # the papers', and the one at which the runs stay near the reference


def variants(setting):
    """name -> (loss, knobs, label, colour)."""
    greens = matplotlib.colormaps["Greens"](np.linspace(0.4, 0.95, len(setting.alphas)))
    names = {"dpo": ("dpo", {}, "DPO", COLOURS["dpo"]), "tdpo1": ("tdpo1", {}, "TDPO1", COLOURS["tdpo1"])}
    return names | {f"tdpo2-{alpha:g}": ("tdpo2", {"alpha": alpha}, f"TDPO2, α {alpha:g}",
                                         matplotlib.colors.to_hex(colour))
                    for alpha, colour in zip(setting.alphas, greens, strict=True)}


def run_of(setting, seed, name, beta):
    loss, knobs, _, _ = variants(setting)[name]
    return setting.review_run(seed, loss, beta, **knobs)


def runs(setting):
    return [run_of(setting, seed, name, beta) for seed in setting.seeds for beta in BETAS
            for name in variants(setting)]


PICKS = {"chosen_kl": lambda c: c["held_out"]["kl/ref_policy_chosen"],
         "rejected_kl": lambda c: c["held_out"]["kl/ref_policy_rejected"],
         "reward": lambda c: c["samples"]["reward"][0], "kl": lambda c: c["samples"]["kl"][0],
         "entropy": lambda c: c["samples"]["entropy"][0], "distinct_3": lambda c: c["samples"]["distinct_3"],
         "accuracy": lambda c: c["held_out"]["rewards/accuracies"]}


AT_EQUAL_REWARD = ("entropy", "distinct_3", "kl", "chosen_kl", "rejected_kl")


def at_reward(trace, seed, key, target):
    """A quantity where a run first reaches a reward, between two checkpoints; None where it never does."""
    reward, values = trace["reward"][seed], trace[key][seed]
    for i in range(1, len(reward)):
        if reward[i - 1] < target <= reward[i]:
            share = (target - reward[i - 1]) / (reward[i] - reward[i - 1])
            return float(values[i - 1] + share * (values[i] - values[i - 1]))
    return None


def summarise(setting, results):
    traces, rows, equal = {}, [], []
    for beta in BETAS:
        for name, (_, _, label, _) in variants(setting).items():
            seeds = [results[run_of(setting, seed, name, beta)] for seed in setting.seeds]
            trace = {}
            for key, pick in PICKS.items():
                trace["steps"], values = series(seeds, pick)
                trace[key] = values.tolist()
            traces.setdefault(f"{beta:g}", {})[name] = trace
            last = [checkpoint(r) for r in seeds]
            c, r = ([PICKS[k](x) for x in last] for k in ("chosen_kl", "rejected_kl"))
            gap = [b - a for a, b in zip(c, r, strict=True)]
            rows.append([f"{beta:g}", label, cell(c), cell(r), cell(gap),
                         *(cell([PICKS[key](x) for x in last]) for key in ("kl", "reward", "accuracy"))])
    # a reward that every variant reaches, seed by seed: half-way to the lowest of their peaks
    here, targets = traces[f"{BETAS[-1]:g}"], []
    for i in range(len(setting.seeds)):
        start = here["dpo"]["reward"][i][0]
        targets.append((start + min(max(t["reward"][i]) for t in here.values())) / 2)
    for name, (_, _, label, _) in variants(setting).items():
        equal.append([label, *(cell([at_reward(here[name], i, key, target)
                                     for i, target in enumerate(targets)], 3) for key in AT_EQUAL_REWARD)])
    start = [checkpoint(results[run_of(setting, seed, "dpo", BETAS[-1])], 0) for seed in setting.seeds]
    equal.append(["reference, at its own reward", *(cell([PICKS[key](x) for x in start], 3)
                                                    for key in AT_EQUAL_REWARD)])
    tables = [
        table(f"Step {setting.run.steps}, held-out pairs: sequential KL(π_ref‖π) of chosen and rejected, "
              "nats; samples: KL(π‖π_ref), true reward; mean [least, most] over seeds",
              ["β", "", "SeqKL chosen", "SeqKL rejected", "difference", "KL of samples", "true reward",
               "accuracy"], rows),
        table(f"At equal true reward ({cell(targets)}: half-way from the reference to the lowest peak), "
              f"β {BETAS[-1]:g}, between checkpoints by linear interpolation",
              ["", "entropy, nats per token", "distinct 3-grams, share", "KL(π‖π_ref)", "SeqKL chosen",
               "SeqKL rejected"], equal)]
    return {"traces": traces, "targets": targets, "tables": tables,
            "variants": {name: v[2:] for name, v in variants(setting).items()}}


def draw(s, path):
    fig, axes = figure(3, 3, width=4, height=2.9)
    for row, beta in zip(axes[:2], s["traces"], strict=True):
        for name, trace in s["traces"][beta].items():
            label, colour = s["variants"][name]
            chosen, rejected = np.array(trace["chosen_kl"]), np.array(trace["rejected_kl"])
            for axis, values in zip(row, (chosen, rejected, rejected - chosen), strict=True):
                band(axis, trace["steps"], values, label, colour, marker=".")
        for axis, title in zip(row, ("chosen", "rejected", "rejected − chosen"), strict=True):
            axis.set(title=f"{title}, β {beta}", xlabel="step", ylabel="SeqKL(ref ‖ policy), nats")
    axes[0, 0].legend(fontsize=7)
    beta = list(s["traces"])[-1]
    panels = (("kl", "reward", "KL(policy ‖ reference), nats", "true reward"),
              ("reward", "entropy", "true reward", "entropy, nats per token"),
              ("reward", "distinct_3", "true reward", "distinct 3-grams, share"))
    for axis, (x, y, x_label, y_label) in zip(axes[2], panels, strict=True):
        for name, trace in s["traces"][beta].items():
            for xs, ys in zip(trace[x], trace[y], strict=True):
                axis.plot(xs, ys, color=s["variants"][name][1], marker=".", linewidth=0.8)
        axis.set(xlabel=x_label, ylabel=y_label, title=f"along training, β {beta}, a line a seed")
    save(fig, path)


if __name__ == "__main__":
    main([sys.modules[__name__]])
