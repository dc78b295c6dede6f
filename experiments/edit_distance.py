"""Claim 3: DPOP's Fig. 4 and Fig. 2. The chosen answer's likelihood at low and high edit distance.

    python experiments/edit_distance.py [--quick]
"""

import sys

import numpy as np
from common import COLOURS, LABELS, band, cell, checkpoint, figure, main, save, table, verdict, versus

NAME, TITLE = "edit_distance", "Claim 3. Edit distance and the chosen likelihood (DPOP, Fig. 4 and Fig. 2)"
PARTS = {"before": "before the first edited token", "at": "edited tokens", "after": "after it, unedited",
         "total": "whole answer"}


def variants(setting):
    """name -> (loss, its knobs, label, colour). One beta, DPOP's 0.3, for all: only the penalty differs."""
    return {"dpo": ("dpo", {}, "DPO", COLOURS["dpo"]),
            "dpop": ("dpop", {"lam": 50.0}, "DPOP, λ 50", COLOURS["dpop"])}


def run_of(setting, seed, name, edits):
    loss, knobs, _, _ = variants(setting)[name]
    return setting.sums_runs(seed, edits, loss, **knobs)


def runs(setting):
    return [run_of(setting, seed, name, edits) for seed in setting.seeds for edits in setting.edits
            for name in variants(setting)]


def summarise(setting, results):
    curves, rows, start = {}, [], {}

    def of_parts(values):
        return [cell(values[part], 1 if part == "total" else 3) for part in PARTS]

    for edits in setting.edits:
        first = [results[run_of(setting, seed, "dpo", edits)] for seed in setting.seeds]
        reference = [checkpoint(r, 0) for r in first]
        values = {part: [r["chosen"]["reference"][part] for r in reference] for part in PARTS}
        values |= {"accuracy": [r["accuracy"][0] for r in reference],
                   "differing": [r["chosen"]["differing"] for r in reference]}
        start[str(edits)], where = values, f"{edits} ({np.mean(values['differing']):.0%})"
        rows.append([where, "reference", *of_parts(values), cell(values["accuracy"]), "–", "–"])
        for name, (_, _, label, _) in variants(setting).items():
            last = [checkpoint(results[run_of(setting, seed, name, edits)]) for seed in setting.seeds]
            values = {part: [r["chosen"]["policy"][part] for r in last] for part in PARTS}
            values |= {"accuracy": [r["accuracy"][0] for r in last],
                       "pair_accuracy": [r["held_out"]["rewards/accuracies"] for r in last],
                       "chosen_ratio": [r["held_out"]["logratio/chosen"] for r in last],
                       "rejected_ratio": [r["held_out"]["logratio/rejected"] for r in last]}
            curves.setdefault(name, {})[str(edits)] = values
            rows.append([where, label, *of_parts(values), cell(values["accuracy"]),
                         cell(values["pair_accuracy"]),
                         versus(values["after"], start[str(edits)]["after"], 3)])
    se = max(checkpoint(r)["accuracy"][1] for r in results.values())
    note = (f"Held-out chosen log-probability, nats per token (whole answer: nats), after "
            f"{setting.sums_run.steps} steps at β {setting.sums_run.beta:g}; sums worked out to the letter, "
            f"greedily ({setting.sums.held_out} sums, standard error at most {se:.2f}); mean ± 95 % "
            "interval over seeds. In brackets: share of tokens that differ")
    columns = ["edited digits", "", *PARTS.values(), "sums right", "pair accuracy",
               "after it − reference, paired"]
    def moved(name, edits):
        """−log p of the unedited chosen tokens on a log scale: a mean of nats is skewed, one seed is most."""
        logs = [np.log(-np.array(x[str(edits)]["after"])).tolist() for x in (curves[name], start)]
        ratios = np.exp(np.subtract(*logs))
        label = (f"{LABELS[name]}, −log p per token over the reference's, median {np.median(ratios):.2f} "
                 f"(seeds {', '.join(f'{x:.2f}' for x in sorted(ratios))}); difference of logarithms")
        return {label: logs}

    low, high = setting.edits[0], setting.edits[-1]
    verdicts = [verdict(f"DPO lowers the unedited chosen tokens at low edit distance ({low} digit), DPOP not",
                        moved("dpo", low) | moved("dpop", low), 2),
                verdict(f"At high distance ({high}) DPO does not", moved("dpo", high), 2)]
    return {"verdicts": verdicts, "curves": curves, "reference": start,
            "tables": [table(note, columns, rows)],
            "variants": {name: v[2:] for name, v in variants(setting).items()}}


def draw(s, path):
    fig, axes = figure(1, 3, width=4, height=3.4)
    edits = list(s["reference"])
    x = np.arange(len(edits))
    ticks = [f"{e}\n{np.mean(s['reference'][e]['differing']):.0%}" for e in edits]
    panels = {"after": ("unedited tokens of the chosen answer", "log-prob., nats per token"),
              "accuracy": ("sums worked out right", "share of held-out sums"),
              "pair_accuracy": ("pairs ranked rightly", "share of held-out pairs")}
    for axis, (key, (title, unit)) in zip(axes[0], panels.items(), strict=True):
        if key in s["reference"][edits[0]]:
            band(axis, x, np.array([s["reference"][e][key] for e in edits]).T, "reference", "black",
                 linestyle="--")
        for name, (label, colour) in s["variants"].items():
            band(axis, x, np.array([s["curves"][name][e][key] for e in edits]).T, label, colour, marker="o")
        axis.set(title=title, ylabel=unit, xticks=x, xticklabels=ticks,
                 xlabel="edited digits in the rejected answer\n(share of its tokens)")
        if key != "after":
            axis.set(ylim=(0, 1.03))
    axes[0, 1].legend(fontsize=8, loc="lower right")
    save(fig, path)


if __name__ == "__main__":
    main([sys.modules[__name__]])
