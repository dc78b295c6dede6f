"""Claim 4: TDPO's Fig. 3. Sequential KL of chosen and rejected, and reward and diversity at equal KL.

    python experiments/seqkl.py [--quick]
"""

import sys

import numpy as np
from common import (
    COLOURS,
    band,
    bars,
    cell,
    checkpoint,
    figure,
    main,
    reaches,
    save,
    series,
    table,
    verdict,
    versus,
)

NAME, TITLE = "seqkl", "Claim 4. Sequential KL and diversity (TDPO, Fig. 3)"
BETA = 0.1


def variants(setting):
    """name -> (loss, knobs, label, colour)."""
    return {"dpo": ("dpo", {}, "DPO", COLOURS["dpo"]), "tdpo1": ("tdpo1", {}, "TDPO1", COLOURS["tdpo1"]),
            "tdpo2-0.5": ("tdpo2", {"alpha": 0.5}, "TDPO2, α 0.5", COLOURS["tdpo2"]),
            "tdpo2-1": ("tdpo2", {"alpha": 1.0}, "TDPO2, α 1", "#0b5d1e")}


def run_of(setting, seed, name):
    loss, knobs, _, _ = variants(setting)[name]
    return setting.review_run(seed, loss, BETA, **knobs)


def runs(setting):
    return [run_of(setting, seed, name) for seed in setting.seeds for name in variants(setting)]


PICKS = {"chosen_kl": lambda c: c["held_out"]["kl/ref_policy_chosen"],
         "rejected_kl": lambda c: c["held_out"]["kl/ref_policy_rejected"],
         "reward": lambda c: c["samples"]["reward"][0], "kl": lambda c: c["samples"]["kl"][0],
         "entropy": lambda c: c["samples"]["entropy"][0], "distinct_3": lambda c: c["samples"]["distinct_3"],
         "accuracy": lambda c: c["held_out"]["rewards/accuracies"]}


def summarise(setting, results):
    traces, n = {}, len(setting.seeds)
    for name in variants(setting):
        seeds = [results[run_of(setting, seed, name)] for seed in setting.seeds]
        steps = series(seeds, PICKS["kl"])[0]
        traces[name] = {"steps": steps} | {k: series(seeds, pick)[1].tolist() for k, pick in PICKS.items()}
    # a reward that every variant reaches, seed by seed: half-way to the lowest of their peaks
    targets = [(traces["dpo"]["reward"][i][0] + min(max(t["reward"][i]) for t in traces.values())) / 2
               for i in range(n)]
    equal_reward = {name: [reaches(t["reward"][i], t["kl"][i], targets[i]) for i in range(n)]
                    for name, t in traces.items()}
    equal_kl = {key: {name: {f"{level:g}": [reaches(t["kl"][i], t[key][i], level) for i in range(n)]
                             for level in setting.levels} for name, t in traces.items()}
                for key in ("reward", "entropy", "distinct_3")}
    last, same = [], []
    for name, (_, _, label, _) in variants(setting).items():
        ends = {key: [row[-1] for row in traces[name][key]] for key in PICKS}
        gap = versus(ends["rejected_kl"], ends["chosen_kl"], 3)
        against = versus(ends["chosen_kl"], [row[-1] for row in traces["dpo"]["chosen_kl"]])
        last.append([label, cell(ends["chosen_kl"]), "–" if name == "dpo" else against, gap,
                     *(cell(ends[key]) for key in ("kl", "reward", "accuracy"))])
        same.append([label, cell(equal_reward[name], 3), "–" if name == "dpo" else
                     versus(equal_reward[name], equal_reward["dpo"], 3)])
    pairs = [[variants(setting)[name][2], key.replace("distinct_3", "distinct 3-grams"),
              *(versus(of[name][level], of["dpo"][level], 3) for level in of["dpo"])]
             for key, of in equal_kl.items() for name in of if name != "dpo"]
    first = [checkpoint(results[run_of(setting, seed, "dpo")], 0)["samples"] for seed in setting.seeds]
    ends = {name: {key: [row[-1] for row in t[key]] for key in PICKS} for name, t in traces.items()}
    two = ends["tdpo2-0.5"]
    verdicts = [verdict("TDPO2 holds the sequential KL down",
                        {"of chosen, α 0.5 − DPO": (two["chosen_kl"], ends["dpo"]["chosen_kl"])}),
                verdict("TDPO1 lets SeqKL of rejected stay below that of chosen",
                        {"rejected − chosen": (ends["tdpo1"]["rejected_kl"], ends["tdpo1"]["chosen_kl"])}),
                verdict("TDPO2 needs less KL for the same reward",
                        {"KL at equal reward, α 0.5 − DPO": (equal_reward["tdpo2-0.5"],
                                                             equal_reward["dpo"])})]
    return {"verdicts": verdicts, "traces": traces, "targets": targets,
            "equal_reward": equal_reward, "equal_kl": equal_kl,
            "variants": {name: v[2:] for name, v in variants(setting).items()}, "tables": [
        table(f"Step {setting.run.steps}, β {BETA:g}, held-out pairs: sequential KL(π_ref‖π), nats; samples: "
              "KL(π‖π_ref), true reward; mean ± 95 % interval over seeds",
              ["", "SeqKL chosen", "less DPO's, paired", "rejected − chosen, paired", "KL of samples",
               "true reward", "accuracy"], last),
        table(f"KL(π‖π_ref) where a run first reaches a true reward of {cell(targets)} (each seed's own: "
              "half-way to the lowest peak), linearly between neighbours of 8 checkpoints",
              ["", "KL, nats", "less DPO's, paired"], same),
        table("At equal KL, less DPO's, paired by seed, ± 95 % interval (reference: entropy "
              f"{cell([x['entropy'][0] for x in first], 3)} nats per token, distinct 3-grams "
              f"{cell([x['distinct_3'] for x in first], 3)})",
              ["", "quantity", *(f"KL {level:g}" for level in setting.levels)], pairs)]}


def draw(s, path):
    fig, axes = figure(1, 3, width=4.3, height=3.5)
    for name, trace in s["traces"].items():
        label, colour = s["variants"][name]
        band(axes[0, 0], trace["steps"], trace["chosen_kl"], label, colour)
        gap = np.array(trace["rejected_kl"]) - np.array(trace["chosen_kl"])
        band(axes[0, 1], trace["steps"], gap, label, colour)
    axes[0, 0].set(title="α holds the sequential KL down", xlabel="step", ylabel="SeqKL of chosen, nats")
    axes[0, 0].legend(fontsize=8, loc="upper left")
    axes[0, 1].axhline(0, color="grey", linewidth=0.8, linestyle="--")
    axes[0, 1].set(title="rejected − chosen", xlabel="step", ylabel="difference of SeqKL, nats")
    rows = {}
    for name, values in s["equal_reward"].items():
        if name != "dpo":
            label, colour = s["variants"][name]
            pairs = zip(values, s["equal_reward"]["dpo"], strict=True)
            rows[label] = [a - b for a, b in pairs if a is not None and b is not None], colour
    bars(axes[0, 2], rows)
    axes[0, 2].set(title="KL at equal reward, less DPO's", xlabel="nats, paired by seed (95 %)")
    save(fig, path)


if __name__ == "__main__":
    main([sys.modules[__name__]])
