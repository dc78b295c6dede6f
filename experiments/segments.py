"""Claim 5: 2D-DPO. Credit and reward at equal KL, and Eq. 6's selection."""

import common
import numpy as np
from common import COLOURS, band, bars, cell, figure, reaches, save, series, table, verdict, versus

NAME, TITLE = "segments", "Claim 5. Segments and aspects (2D-DPO)"
BETA = 0.1
VARIANTS = {  # name -> (loss, knobs, label, colour)
    "dpo": ("dpo", {}, "DPO, no scores", COLOURS["dpo"]),
    "aspects": ("2d-dpo-vanilla", {"one_segment": True}, "aspects only (1 segment)", "#e377c2"),
    "vanilla": ("2d-dpo-vanilla", {}, "vanilla = segments only", COLOURS["2d-dpo-vanilla"]),
    "badness": ("2d-dpo-vanilla", {"rejected_weight": "badness"}, "vanilla, badness", COLOURS["badness"]),
    "grouped": ("2d-dpo", {}, "Eq. 6", COLOURS["2d-dpo"]),
    "unselected": ("unselected", {}, "Eq. 6 without selection", COLOURS["unselected"]),
    "helpfulness": ("2d-dpo", {"aspect_weights": (1.0, 0.0)}, "Eq. 6, helpfulness", "#c7a000"),
    "relevance": ("2d-dpo", {"aspect_weights": (0.0, 1.0)}, "Eq. 6, relevance", "#a05a00")}
BAD, GOOD = (0, 2), (6, 8)  # helpfulness + relevance of a sentence
SHOWN = ("dpo", "vanilla", "badness", "grouped")

def run_of(setting, seed, name):
    loss, knobs, _, _ = VARIANTS[name]
    return setting.review_run(seed, loss, BETA, **knobs)

def runs(setting):
    return [run_of(setting, seed, name) for seed in setting.seeds for name in VARIANTS]

def pooled(credit, low, high):
    """Mean log-ratio of the held-out sentences with low <= h + r <= high, on either side."""
    score = np.add.outer(np.arange(5), np.arange(5))
    among = (score >= low) & (score <= high)
    total, count = (np.sum(credit[key], axis=0)[among].sum() for key in ("sum", "count"))
    return float(total / count) if count else 0.0

PICKS = {"kl": lambda c: c["samples"]["kl"][0], "reward": lambda c: c["samples"]["reward"][0],
         "credit": lambda c: pooled(c["credit"], *GOOD) - pooled(c["credit"], *BAD),
         "helpfulness": lambda c: c["samples"]["helpfulness"][0],
         "relevance": lambda c: c["samples"]["relevance"][0]}

def measure(setting, results):
    traces = {}
    for name in VARIANTS:
        seeds = [results[run_of(setting, seed, name)] for seed in setting.seeds]
        traces[name] = {"steps": series(seeds, PICKS["kl"])[0]}
        traces[name] |= {key: series(seeds, pick)[1].tolist() for key, pick in PICKS.items()}
    return {"traces": traces}

def at_kl(s, name, key, level):
    """A quantity where each seed's run first reaches a KL."""
    t = s["traces"][name]
    return [reaches(kl, y, level) for kl, y in zip(t["kl"], t[key], strict=True)]

def report(setting, s):
    rows, levels = [], setting.levels
    middle = levels[(len(levels) - 1) // 2]
    what = {"reward": "true reward", "credit": "good − bad, nats"}

    def less(key, one, other):
        label = f"{what[key]}, {VARIANTS[one][2]} − {VARIANTS[other][2]}, KL {middle:g}"
        return {label: (at_kl(s, one, key, middle), at_kl(s, other, key, middle))}

    compared = [(one, other, key, what[key]) for one, other in (
        ("grouped", "dpo"), ("vanilla", "dpo"), ("badness", "dpo"), ("vanilla", "aspects"),
        ("grouped", "vanilla"), ("grouped", "unselected")) for key in what]
    compared += [("helpfulness", "relevance", key, f"{key} of samples") for key in VARIANTS if key in PICKS]
    for one, other, key, name in compared:
        rows.append([f"{VARIANTS[one][2]} − {VARIANTS[other][2]}", name, *(
            versus(at_kl(s, one, key, level), at_kl(s, other, key, level)) for level in levels)])
    last = [[VARIANTS[name][2], *(cell([row[-1] for row in t[key]]) for key in PICKS)]
            for name, t in s["traces"].items()]
    return {"verdicts": [
        verdict("Segment scores sharpen the credit", less("credit", "grouped", "dpo"), 2),
        verdict("Segments beat aspects alone", less("reward", "vanilla", "aspects"), 2),
        verdict("Grouping beats vanilla", less("reward", "grouped", "vanilla"), 2),
        verdict("Eq. 6's selection matters", less("reward", "grouped", "unselected")
                | less("credit", "grouped", "unselected"), 2)], "tables": [
        table(f"At equal KL(π‖π_ref) of samples, β {BETA:g}: paired differences by seed, ± 95 % interval; "
              "between neighbours of 12 checkpoints. good − bad: the mean log-ratio of good held-out "
              "sentences (scores sum to 6–8 of 8) less that of bad ones (0–2)",
              ["", "quantity", *(f"KL {level:g}" for level in levels)], rows),
        table(f"Step {setting.run.steps}: samples and credit, mean ± 95 % interval over seeds. W is uniform "
              "but in the last two",
              ["", "KL, nats", "true reward", "good − bad, nats", "helpfulness", "relevance"], last)]}

def draw(s, path):
    fig, axes = figure(1, 2, width=4.8, height=3.6)
    grid = np.linspace(0.02, 1.0, 40)
    for name in (*SHOWN, "unselected"):
        t, (_, _, label, colour) = s["traces"][name], VARIANTS[name]
        curves = [[reaches(kl, credit, x) for x in grid]
                  for kl, credit in zip(t["kl"], t["credit"], strict=True)]
        band(axes[0, 0], grid, curves, label, colour)
    axes[0, 0].set(title="credit at equal KL", xlabel="KL(policy ‖ reference), nats",
                   ylabel="log-ratio, good − bad sentences, nats")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    base = at_kl(s, "dpo", "reward", 0.5)
    rows = {label: (common.differences_of(at_kl(s, name, "reward", 0.5), base), colour)
            for name, (_, _, label, colour) in VARIANTS.items() if name != "dpo"}
    bars(axes[0, 1], rows)
    axes[0, 1].set(title="reward at KL 0.5, less DPO's", xlabel="paired by seed (95 %)")
    save(fig, path)
