"""Claim 3: DPOP's Fig. 4 and Fig. 2. The chosen answer's likelihood at low and high edit distance."""

import numpy as np
from common import COLOURS, FULL, band, cell, checkpoint, figure, save, table, verdict, versus

NAME, TITLE = "edit_distance", "Claim 3. Edit distance and the chosen likelihood (DPOP, Fig. 4 and Fig. 2)"
PARTS = {"before": "before the first edited token", "at": "edited tokens", "after": "after it, unedited",
         "total": "whole answer"}

def variants(setting):
    """name -> (loss, its knobs, label, colour). One beta, DPOP's 0.3, for all: only the penalty differs."""
    shades = ("#f5a3a3", COLOURS["dpop"])[-len(setting.lams):]
    return {"dpo": ("dpo", {}, "DPO", COLOURS["dpo"])} | {
        f"dpop-{lam:g}": ("dpop", {"lam": lam}, f"DPOP, λ {lam:g}", colour)
        for lam, colour in zip(setting.lams, shades, strict=True)}

def run_of(setting, seed, name, edits):
    loss, knobs, _, _ = variants(setting)[name]
    return setting.sums_runs(seed, edits, loss, **knobs)

def runs(setting):
    return [run_of(setting, seed, name, edits) for seed in setting.seeds for edits in setting.edits
            for name in variants(setting)]

def measure(setting, results):
    curves, start = {}, {}
    for edits in setting.edits:
        first = [checkpoint(results[run_of(setting, seed, "dpo", edits)], 0) for seed in setting.seeds]
        start[str(edits)] = {part: [r["chosen"]["reference"][part] for r in first] for part in PARTS} | {
            "accuracy": [r["accuracy"][0] for r in first],
            "differing": [r["chosen"]["differing"] for r in first]}
        for name in variants(setting):
            last = [checkpoint(results[run_of(setting, seed, name, edits)]) for seed in setting.seeds]
            values = {part: [r["chosen"]["policy"][part] for r in last] for part in PARTS}
            curves.setdefault(name, {})[str(edits)] = values | {
                "accuracy": [r["accuracy"][0] for r in last],
                "pair_accuracy": [r["held_out"]["rewards/accuracies"] for r in last],
                "chosen_ratio": [r["held_out"]["logratio/chosen"] for r in last],
                "rejected_ratio": [r["held_out"]["logratio/rejected"] for r in last]}
    return {"curves": curves, "reference": start}

def report(setting, s):
    rows, start = [], s["reference"]

    def of_parts(values):
        parts = (cell(values[part], 1 if part == "total" else 3) for part in PARTS)
        return [*parts, cell(values["accuracy"])]

    def moved(name, edits):
        """−log p of the unedited chosen tokens, on a log scale: in nats one seed is most of the mean."""
        after = s["curves"][name][str(edits)]["after"], start[str(edits)]["after"]
        logs = [np.log(-np.array(x)).tolist() for x in after]
        ratios = np.exp(np.subtract(*logs))
        return {f"{variants(setting)[name][2]}, −log p per token over the reference's, median "
                f"{np.median(ratios):.2f} (seeds {', '.join(f'{x:.2f}' for x in sorted(ratios))}); "
                "difference of logarithms": logs}

    for edits, reference in start.items():
        where = f"{edits} ({np.mean(reference['differing']):.0%})"
        rows.append([where, "reference", *of_parts(reference), "–", "–", "–"])
        for name, of in s["curves"].items():
            values, ratio = of[edits], of[edits]["chosen_ratio"]
            rows.append([where, variants(setting)[name][2], *of_parts(values), cell(values["pair_accuracy"]),
                         versus(values["after"], reference["after"], 3),
                         f"{np.median(ratio):+.2f}; {sum(x < 0 for x in ratio)} of {len(ratio)}"])
    low, high, dpop = setting.edits[0], setting.edits[-1], f"dpop-{setting.lams[-1]:g}"
    return {"verdicts": [
        verdict(f"DPO lowers the unedited chosen tokens at low edit distance ({low} digit), DPOP not",
                moved("dpo", low) | moved(dpop, low), 2),
        verdict(f"At high distance ({high}) DPO does not", moved("dpo", high), 2)], "tables": [
        table("Held-out chosen log-probability, nats per token (whole answer: nats), after "
              f"{setting.sums_run.steps} steps at β {setting.sums_run.beta:g}; sums worked out to the "
              f"letter, greedily ({setting.sums.held_out} sums); mean ± 95 % interval over seeds. In "
              "brackets: share of tokens that differ",
              ["edited digits", "", *PARTS.values(), "sums right", "pair accuracy",
               "after it − reference, paired", "log-ratio of chosen: median, nats; seeds below 0"], rows)]}

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
        for name, of in s["curves"].items():
            band(axis, x, np.array([of[e][key] for e in edits]).T, *variants(FULL)[name][2:], marker="o")
        axis.set(title=title, ylabel=unit, xticks=x, xticklabels=ticks,
                 xlabel="edited digits in the rejected answer\n(share of its tokens)")
        if key != "after":
            axis.set(ylim=(0, 1.03))
    axes[0, 1].legend(fontsize=8, loc="lower right")
    save(fig, path)
