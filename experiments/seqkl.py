"""Claim 4: TDPO's Fig. 3. Sequential KL of chosen and rejected, and reward at equal KL."""

import common
import matplotlib
import numpy as np
from common import COLOURS, FULL, band, bars, cell, figure, reaches, save, series, table, versus

NAME, TITLE = "seqkl", "Claim 4. Sequential KL (TDPO, Fig. 3)"
BETA = 1.0  # at which the runs stay near the reference

def variants(setting):
    """name -> (loss, knobs, label, colour)."""
    greens = [matplotlib.colors.to_hex(c)
              for c in matplotlib.colormaps["Greens"](np.linspace(0.4, 0.95, len(setting.alphas)))]
    return {"dpo": ("dpo", {}, "DPO", COLOURS["dpo"]), "tdpo1": ("tdpo1", {}, "TDPO1", COLOURS["tdpo1"])} | {
        f"tdpo2-{alpha:g}": ("tdpo2", {"alpha": alpha}, f"TDPO2, α {alpha:g}",
                             COLOURS["tdpo2"] if alpha == 0.5 else green)
        for alpha, green in zip(setting.alphas, greens, strict=True)}

def run_of(setting, seed, name):
    loss, knobs, _, _ = variants(setting)[name]
    return setting.review_run(seed, loss, BETA, **knobs)

def runs(setting):
    return [run_of(setting, seed, name) for seed in setting.seeds for name in variants(setting)]

PICKS = {"chosen_kl": lambda c: c["held_out"]["kl/ref_policy_chosen"],
         "rejected_kl": lambda c: c["held_out"]["kl/ref_policy_rejected"],
         "reward": lambda c: c["samples"]["reward"][0], "kl": lambda c: c["samples"]["kl"][0],
         "accuracy": lambda c: c["held_out"]["rewards/accuracies"]}

def measure(setting, results):
    traces = {}
    for name in variants(setting):
        seeds = [results[run_of(setting, seed, name)] for seed in setting.seeds]
        traces[name] = {"steps": series(seeds, PICKS["kl"])[0]}
        traces[name] |= {key: series(seeds, pick)[1].tolist() for key, pick in PICKS.items()}
    return {"traces": traces}

def at_equal_reward(traces):
    """(a reward that every variant reaches, seed by seed: half-way to the lowest of their peaks; {variant: KL
    where it first has it})."""
    seeds = range(len(traces["dpo"]["kl"]))
    targets = [(traces["dpo"]["reward"][i][0] + min(max(t["reward"][i]) for t in traces.values())) / 2
               for i in seeds]
    return targets, {name: [reaches(t["reward"][i], t["kl"][i], targets[i]) for i in seeds]
                     for name, t in traces.items()}

def report(setting, s):
    traces, last, same, pairs = s["traces"], [], [], []
    targets, equal = at_equal_reward(traces)
    ends = {name: {key: [row[-1] for row in t[key]] for key in PICKS} for name, t in traces.items()}
    for name, of in ends.items():
        label = variants(setting)[name][2]
        last.append([label, cell(of["chosen_kl"]),
                     "–" if name == "dpo" else versus(of["chosen_kl"], ends["dpo"]["chosen_kl"]),
                     versus(of["rejected_kl"], of["chosen_kl"], 3),
                     *(cell(of[key]) for key in ("kl", "reward", "accuracy"))])
        same.append([label, cell(equal[name], 3),
                     "–" if name == "dpo" else versus(equal[name], equal["dpo"], 3)])
    at = {name: [[reaches(kl, y, level) for kl, y in zip(t["kl"], t["reward"], strict=True)]
                 for level in setting.levels] for name, t in traces.items()}
    pairs = [[variants(setting)[name][2], *(versus(*x, 3) for x in zip(of, at["dpo"], strict=True))]
             for name, of in at.items() if name != "dpo"]
    two, one, dpo = ends["tdpo2-0.5"], ends["tdpo1"], ends["dpo"]
    return {"verdicts": [
        common.verdict("TDPO2 holds the sequential KL down",
                {"of chosen, α 0.5 − DPO": (two["chosen_kl"], dpo["chosen_kl"])}),
        common.verdict("TDPO1 lets SeqKL of rejected stay below that of chosen",
                {"rejected − chosen": (one["rejected_kl"], one["chosen_kl"])}),
        common.verdict("TDPO2 needs less KL for the same reward",
                {"KL at equal reward, α 0.5 − DPO": (equal["tdpo2-0.5"], equal["dpo"])})], "tables": [
        table(f"Step {setting.run.steps}, β {BETA:g}, held-out pairs: sequential KL(π_ref‖π), nats; samples: "
              "KL(π‖π_ref), true reward; mean ± 95 % interval over seeds",
              ["", "SeqKL chosen", "less DPO's, paired", "rejected − chosen, paired", "KL of samples",
               "true reward", "accuracy"], last),
        table(f"KL(π‖π_ref) where a run first reaches a true reward of {cell(targets)} (each seed's own: "
              "half-way to the lowest peak), linearly between neighbours of 12 checkpoints",
              ["", "KL, nats", "less DPO's, paired"], same),
        table("Reward at equal KL, less DPO's, paired by seed, ± 95 % interval",
              ["", *(f"KL {level:g}" for level in setting.levels)], pairs)]}

def draw(s, path):
    fig, axes = figure(1, 3, width=4.3, height=3.5)
    for name, trace in s["traces"].items():
        label, colour = variants(FULL)[name][2:]
        band(axes[0, 0], trace["steps"], trace["chosen_kl"], label, colour)
        gap = np.array(trace["rejected_kl"]) - np.array(trace["chosen_kl"])
        band(axes[0, 1], trace["steps"], gap, label, colour)
    axes[0, 0].set(title="α holds the sequential KL down", xlabel="step", ylabel="SeqKL of chosen, nats")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    axes[0, 1].axhline(0, color="grey", linewidth=0.8, linestyle="--")
    axes[0, 1].set(title="rejected − chosen", xlabel="step", ylabel="difference of SeqKL, nats")
    equal = at_equal_reward(s["traces"])[1]
    rows = {variants(FULL)[name][2]: (common.differences_of(values, equal["dpo"]), variants(FULL)[name][3])
            for name, values in equal.items() if name != "dpo"}
    bars(axes[0, 2], rows)
    axes[0, 2].set(title="KL at equal reward, less DPO's", xlabel="nats, paired by seed (95 %)")
    save(fig, path)
