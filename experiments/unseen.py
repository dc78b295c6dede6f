"""Claim 6: prompts that the preferences did not cover (the seed of DPO's Table 1).

    python experiments/unseen.py [--quick]

SFT sees reviews of all things, the preference runs every second thing only; samples are about either half.
"""

import sys

from common import COLOURS, LABELS, band, cell, figure, main, reaches, save, series, table, versus

NAME, TITLE = "unseen", "Claim 6. Prompts outside the preference data (DPO, Table 1)"
LOSSES = {"dpo": 0.1, "2d-dpo": 0.1, "sft": None}  # loss -> beta
KINDS = {"samples": "things of the preferences", "unseen": "other things"}


def run_of(setting, seed, loss):
    return setting.review_run(seed, loss, LOSSES[loss], half_of_nouns=True)


def runs(setting):
    return [run_of(setting, seed, loss) for seed in setting.seeds for loss in LOSSES]


def summarise(setting, results):
    traces, rows, n = {}, [], range(len(setting.seeds))
    for loss in LOSSES:
        seeds, trace = [results[run_of(setting, seed, loss)] for seed in setting.seeds], {}
        for kind in KINDS:
            gains = series(seeds, lambda c, kind=kind: c[kind]["reward"][0])[1]
            kl = series(seeds, lambda c, kind=kind: c[kind]["kl"][0])[1]
            trace[kind] = {"gain": (gains - gains[:, :1]).tolist(), "kl": kl.tolist()}
        traces[loss] = trace | {"steps": series(seeds, lambda c: c["step"])[0]}
        last = {kind: {key: [row[-1] for row in trace[kind][key]] for key in ("gain", "kl")}
                for kind in KINDS}
        rows.append([LABELS[loss], f"step {setting.run.steps}",
                     *(cell(last[kind]["gain"], 2, "+") for kind in KINDS),
                     versus(last["unseen"]["gain"], last["samples"]["gain"]),
                     *(cell(last[kind]["kl"]) for kind in KINDS)])
        for level in setting.levels:
            at = [[reaches(trace[kind]["kl"][i], trace[kind]["gain"][i], level) for i in n] for kind in KINDS]
            gains = [cell(x, 2, "+") for x in at]
            rows.append(["", f"KL {level:g}", *gains, versus(at[1], at[0]), "", ""])
    dpo = {kind: [row[-1] for row in traces["dpo"][kind]["gain"]] for kind in KINDS}
    verdicts = [["What DPO learns carries over to prompts it has not seen",
                 f"gain in reward: covered {cell(dpo['samples'], 2, '+')}, other "
                 f"{cell(dpo['unseen'], 2, '+')}; "
                 f"other − covered {versus(dpo['unseen'], dpo['samples'])}"]]
    return {"verdicts": verdicts, "traces": traces, "tables": [table(
        "Gain in true reward over the reference on the same prompts, by whether the preference pairs were "
        "about such things; mean ± 95 % interval over seeds; at equal KL between neighbours of 12 "
        "checkpoints",
        ["", "at", *KINDS.values(), "other − covered, paired", "KL, covered", "KL, other"], rows)]}


def draw(s, path):
    fig, axes = figure(1, len(LOSSES), width=3.9, height=3.3)
    top = max(x for t in s["traces"].values() for kind in KINDS for row in t[kind]["gain"] for x in row)
    for axis, (loss, trace) in zip(axes[0], s["traces"].items(), strict=True):
        for kind, style in (("samples", "-"), ("unseen", "--")):
            band(axis, trace["steps"], trace[kind]["gain"], KINDS[kind], COLOURS[loss], linestyle=style)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(title=LABELS[loss], xlabel="step", ylabel="gain in true reward", ylim=(-0.6, top + 0.3))
        axis.legend(fontsize=8, loc="upper left")
    save(fig, path)


if __name__ == "__main__":
    main([sys.modules[__name__]])
