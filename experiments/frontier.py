"""Claim 1: the reward-KL frontier (DPO, Fig. 2 left), for all losses, SFT on chosen, and Eq. 4 itself.

    python experiments/frontier.py [--quick]
"""

import sys

import numpy as np
from common import COLOURS, LABELS, band, cell, figure, main, save, table
from replay import reviews

NAME, TITLE = "frontier", "Claim 1. Reward against KL (DPO, Fig. 2 left)"
LOSSES = {"dpo": {}, "dpop": {"lam": 50.0}, "tdpo1": {}, "tdpo2": {"alpha": 0.5}, "2d-dpo": {}}
BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0)  # nats


def frontier_runs(setting, seed):
    """{(loss, beta): run} of one seed; SFT on chosen has beta None."""
    runs = {(loss, beta): setting.review_run(seed, loss, beta, **more)
            for loss, more in LOSSES.items() for beta in setting.betas}
    return runs | {("sft", None): setting.review_run(seed, "sft", None)}


def reference_of(setting, seed):
    return setting.review_run(seed).world, setting.reference_samples


def runs(setting):
    return [thing for seed in setting.seeds
            for thing in (reference_of(setting, seed), *frontier_runs(setting, seed).values())]


def reweighted(rewards, least_ess):
    """Eq. 4 on samples of the reference: weights proportional to exp(reward / beta), the normaliser Z by
    their sum. {beta, kl, reward, ess} as beta falls, until fewer than least_ess effective samples are left.
    """
    r, points = np.asarray(rewards), []
    for beta in np.geomspace(100, 0.05, 120):
        log_w = r / beta - (r / beta).max()
        w = np.exp(log_w) / np.exp(log_w).sum()
        ess = 1 / (w**2).sum()
        if ess < least_ess:
            break
        points.append({"beta": float(beta), "kl": float((w * np.log(np.maximum(w, 1e-300) * len(r))).sum()),
                       "reward": float((w * r).sum()), "ess": float(ess)})
    return points


def exact_ceiling():
    """Eq. 4 for the true base distribution, by summation: sentences are independent given their number."""
    def points_of(levels):  # of a verdict or an evidence phrase: each level is equally likely
        return np.full(len(levels), 1 / len(levels))
    helpfulness = np.convolve(points_of(reviews.VERDICTS), points_of(reviews.EVIDENCE))
    own = reviews.OWN
    relevance = np.zeros(5)
    for adjective in (0, 1):
        for noun in (0, 1):
            relevance[adjective + 3 * noun] += (own if adjective else 1 - own) * (own if noun else 1 - own)
    pmf = np.convolve(helpfulness, relevance)  # of a sentence's helpfulness + relevance, 0 to 8
    score, points = np.arange(9) * reviews.GAIN * reviews.WEIGHTS[0], []
    for beta in np.geomspace(100, 0.05, 200):
        log_z, mean = [], []
        for n in (2, 3, 4):
            x = np.log(pmf) + score / (n * beta)
            log_sum = np.logaddexp.reduce(x)
            log_z.append(n * log_sum)
            mean.append((np.exp(x - log_sum) * score).sum())
        total = np.logaddexp.reduce(np.array(log_z) - np.log(3))
        share = np.exp(np.array(log_z) - np.log(3) - total)
        reward = float((share * mean).sum())
        points.append({"beta": float(beta), "kl": reward / beta - float(total), "reward": reward})
    return points


def best_within(points, kl):
    """The best mean reward among checkpoints whose KL is at most kl."""
    return max((p["reward"][0] for p in points if p["kl"][0] <= kl), default=None)


def on_curve(curve, kl, beyond=None):
    """Reward of a ceiling at a KL, `beyond` its end."""
    if kl > curve[-1]["kl"]:
        return beyond
    return float(np.interp(kl, [p["kl"] for p in curve], [p["reward"] for p in curve]))


def summarise(setting, results):
    points = {loss: [] for loss in (*LOSSES, "sft")}  # per seed: every checkpoint of every beta
    curves = []
    for seed in setting.seeds:
        curves.append(reweighted(results[reference_of(setting, seed)]["rewards"], setting.least_ess))
        for loss in points:
            points[loss].append([
                {"beta": beta, "step": c["step"]} | {k: c["samples"][k] for k in ("reward", "kl", "valid")}
                for (name, beta), run in frontier_runs(setting, seed).items() if name == loss
                for c in results[run]["checkpoints"] if c["step"] <= setting.run.steps])
    exact = exact_ceiling()
    rows = []
    for loss, seeds in points.items():
        peaks = [max(p, key=lambda x: x["reward"][0]) for p in seeds]
        rows.append([LABELS[loss], *(cell([best_within(p, kl) for p in seeds]) for kl in BUDGETS),
                     cell([p["reward"][0] for p in peaks]), cell([p["kl"][0] for p in peaks]),
                     ", ".join(sorted({f"{p['beta']:g}" for p in peaks if p["beta"]}, key=float)) or "–"])
    rows.append([f"Eq. 4, re-weighted samples (ESS ≥ {setting.least_ess})",
                 *(cell([on_curve(c, kl) for c in curves]) if all(on_curve(c, kl) for c in curves) else "–"
                   for kl in BUDGETS),
                 cell([c[-1]["reward"] for c in curves]), cell([c[-1]["kl"] for c in curves]), "–"])
    rows.append(["Eq. 4, exact, for the base distribution",
                 *(f"{on_curve(exact, kl, 16.0):.2f}" for kl in BUDGETS), "16.00",
                 f"{exact[-1]['kl']:.2f}", "–"])
    everything = [p for seeds in points.values() for ps in seeds for p in ps]
    start = [ps[0]["reward"][0] for ps in points["dpo"]]  # of each seed's reference
    above = sum(p["reward"][0] > on_curve(exact, p["kl"][0], 16.0) + 3 * p["reward"][1] for p in everything)
    close = [p for p in everything if p["kl"][0] <= 8]
    columns = ["", *(f"KL ≤ {kl:g}" for kl in BUDGETS), "peak reward", "KL there", "β there"]
    note = ("Best mean true reward (0 to 16) among all β and checkpoints within a budget of KL(π‖π_ref), "
            f"nats per response; mean [least, most] over seeds. Reference: {cell(start)}. Standard error of "
            f"a point, {setting.run.samples} samples: reward {np.mean([p['reward'][1] for p in close]):.2f}, "
            f"KL at most {max(p['kl'][1] for p in close):.2f} where KL ≤ 8. Points above the exact ceiling "
            f"by three standard errors: {above} of {len(everything)}")
    table_ess = [["effective samples", *(
        cell([next((p["ess"] for p in c if p["kl"] >= kl), None) for c in curves], 0) for kl in BUDGETS)]]
    return {"points": points, "reweighted": curves, "exact": exact, "start": start, "above_exact": above,
            "tables": [table(note, columns, rows),
                       table(f"Effective sample size of the re-weighting, of {setting.reference_samples}",
                             ["", *(f"KL {kl:g}" for kl in BUDGETS)], table_ess)]}


def draw(s, path):
    fig, axes = figure(1, 2, width=5.4, height=4.2)
    near, far = axes[0]
    start = np.mean(s["start"])
    shown = 1.05 * max((p["kl"][0] for seeds in s["points"].values() for ps in seeds for p in ps
                        if p["reward"][0] > start), default=1.0)
    for loss, seeds in s["points"].items():
        every = sum(seeds, [])
        grid = np.geomspace(0.002, min(max(0.004, *(p["kl"][0] for p in every)), shown), 200)
        envelopes = np.array([[best_within(ps, kl) for kl in grid] for ps in seeds], dtype=float)
        band(near, grid, envelopes, LABELS[loss], COLOURS[loss])
        for axis in (near, far):
            axis.scatter([p["kl"][0] for p in every], [p["reward"][0] for p in every], s=9,
                         color=COLOURS[loss], alpha=0.6, linewidth=0)
    for axis in (near, far):
        axis.plot([p["kl"] for p in s["exact"]], [p["reward"] for p in s["exact"]], color="black",
                  linestyle=":", linewidth=1.2, label="Eq. 4, exact (base distribution)")
        for i, curve in enumerate(s["reweighted"]):
            axis.plot([p["kl"] for p in curve], [p["reward"] for p in curve], color="black", linewidth=1.2,
                      label="_" * bool(i) + "Eq. 4, re-weighted samples")
        axis.axhline(start, color="grey", linewidth=0.8, linestyle="--", label="reference")
        axis.set(xlabel="KL(policy ‖ reference), nats per response")
    near.set(xlim=(0, shown), ylim=(start - 0.4, 14), ylabel="true reward, mean of samples (of 16)",
             title="best within a KL budget (band: seeds)")
    far.set(xscale="log", xlim=(0.005, 100), ylim=(0, 16.3), title="every checkpoint of every β and seed")
    far.legend(*near.get_legend_handles_labels(), fontsize=7, loc="lower left")
    save(fig, path)


if __name__ == "__main__":
    main([sys.modules[__name__]])
