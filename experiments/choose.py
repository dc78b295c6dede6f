"""The learning rate that DPO's held-out loss would choose, on a seed of its own, and the one that is used."""

from dataclasses import replace

from common import dense, figure, save, table

NAME, TITLE = "choose", "The learning rate"
SEED = 100  # no claim uses it
BETAS = {"reviews": 1.0, "sums": 0.3}  # the labels' own, at which Eq. 4 is near the reference; DPOP's

def candidates(setting):
    """{(world, rate): run}, none of them sampled."""
    runs = {}
    for lr in setting.rates:
        reviews = setting.review_run(SEED, "dpo", BETAS["reviews"], lr=lr, samples=0)
        sums = setting.sums_runs(SEED, 1, beta=BETAS["sums"], lr=lr)
        runs["reviews", lr], runs["sums", lr] = reviews, replace(sums, checkpoints=dense(sums.steps)[::4])
    return runs

def runs(setting):
    return list(candidates(setting).values())

def measure(setting, results):
    curves = {f"{world} {lr:g}": [[c["step"] for c in results[run]["checkpoints"]],
                                  [c["held_out"]["loss"] for c in results[run]["checkpoints"]]]
              for (world, lr), run in candidates(setting).items()}
    return {"curves": curves}

def report(setting, s):
    losses = {name: y for name, (_, y) in s["curves"].items()}  # "WORLD RATE": losses at the checkpoints
    rows = [[*name.split(), f"{min(y):.4f}", f"{y[-1]:.4f}"] for name, y in losses.items()]
    best = {world: min((min(y), name.split()[1]) for name, y in losses.items() if name.startswith(world))[1]
            for world in BETAS}
    used = {"reviews": setting.run.lr, "sums": setting.sums_run.lr}
    return {"tables": [table(
        f"DPO, seed {SEED} alone, β {BETAS['reviews']:g} (reviews), {BETAS['sums']:g} (sums, one edited "
        f"digit): held-out loss ({setting.reviews.held_out} pairs). " + "; ".join(
            f"{world}: the least loss is at {float(lr):g}, the runs use {used[world]:g}"
            for world, lr in best.items()), ["world", "learning rate", "least loss", "last loss"], rows)]}

def draw(s, path):
    fig, axes = figure(1, 2)
    for axis, world in zip(axes[0], BETAS, strict=True):
        for name, (steps, losses) in s["curves"].items():
            if name.startswith(world):
                axis.plot(steps, losses, marker=".", label=name.split()[1])
        axis.set(title=world, xlabel="step", ylabel="held-out DPO loss")
    axes[0, 0].legend(fontsize=8, title="learning rate")
    save(fig, path)
