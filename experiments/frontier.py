"""Claim 1: the reward-KL frontier (DPO, Fig. 2 left): all losses, two baselines, and Eq. 4 itself."""

import numpy as np
from common import COLOURS, LABELS, band, bars, cell, figure, save, table, verdict, versus

NAME, TITLE = "frontier", "Claim 1. Reward against KL (DPO, Fig. 2 left)"
BUDGETS = (0.1, 0.25, 0.5, 1.0, 2.0)  # nats

def frontier_runs(setting, seed):
    """{loss: its runs} of one seed; as many for each loss, so that none has more chances."""
    n, betas = len(setting.betas), setting.betas
    knobs = {"dpo": {}, "dpop": {"lam": 50.0}, "tdpo1": {}, "tdpo2": {"alpha": 0.5}, "2d-dpo": {}}
    runs = {loss: [setting.review_run(seed, loss, beta, **more) for beta in betas]
            for loss, more in knobs.items()}
    runs["sft"] = [setting.review_run(seed, "sft", None, lr=lr) for lr in (1e-4, 1e-3)[-n:]]
    runs["weighted-sft"] = [setting.review_run(seed, "weighted-sft", t) for t in (0.5, 2.0)[-n:]]
    return runs

def reference_of(setting, seed):
    return setting.review_run(seed).world, setting.reference_samples

def runs(setting):
    return [thing for seed in setting.seeds
            for thing in (reference_of(setting, seed), *sum(frontier_runs(setting, seed).values(), []))]

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

def best_within(points, kl):
    """The reward of the best candidate within a budget of KL, without the bias of a maximum: chosen on one
    half of each candidate's samples, its reward read off the other half; the mean of both ways round.
    """
    rewards = []
    for a in (0, 1):
        within = [p for p in points if p["halves"][a][1] <= kl]
        rewards.append(max(within, key=lambda p: p["halves"][a][0])["halves"][1 - a][0])
    return float(np.mean(rewards))

def on_curve(curve, kl, beyond=None):
    """Reward of a ceiling at a KL, `beyond` its end."""
    if kl > curve[-1]["kl"]:
        return beyond
    return float(np.interp(kl, [p["kl"] for p in curve], [p["reward"] for p in curve]))

def above(point, samples, curve):
    """Does a point lie above its seed's own re-weighted curve by three standard errors, both errors counted?
    None where the curve does not reach."""
    ceiling = on_curve(curve, point["kl"][0])
    if ceiling is None:
        return None
    ess = np.interp(point["kl"][0], [p["kl"] for p in curve], [p["ess"] for p in curve])
    noise = np.hypot(point["reward"][1], point["reward"][1] * np.sqrt(samples / ess))
    return bool(point["reward"][0] > ceiling + 3 * noise)

def measure(setting, results):
    points, curves = {}, []
    for seed in setting.seeds:
        curves.append(reweighted(results[reference_of(setting, seed)]["rewards"], setting.least_ess))
        for loss, loss_runs in frontier_runs(setting, seed).items():
            points.setdefault(loss, []).append([
                {"knob": run.lr if loss == "sft" else run.beta, "step": c["step"]}
                | {k: c["samples"][k] for k in ("reward", "kl", "halves", "valid")}
                for run in loss_runs for c in results[run]["checkpoints"]])
    return {"points": points, "reweighted": curves}

def within(s):
    """{loss: {budget: best reward, a seed each}}."""
    return {loss: {f"{kl:g}": [best_within(p, kl) for p in seeds] for kl in BUDGETS}
            for loss, seeds in s["points"].items()}

def report(setting, s):
    points, curves, best = s["points"], s["reweighted"], within(s)
    rows = [[LABELS[loss], *(cell(values) for values in of.values())] for loss, of in best.items()]
    rows.append([f"Eq. 4, re-weighted samples (ESS ≥ {setting.least_ess})",
                 *(cell([on_curve(c, kl) for c in curves]) for kl in BUDGETS)])
    checks = [above(p, setting.run.samples, curve) for seeds in points.values()
              for ps, curve in zip(seeds, curves, strict=True) for p in ps]
    checks = [x for x in checks if x is not None]
    se = np.mean([p["reward"][1] for seeds in points.values() for ps in seeds for p in ps if p["kl"][0] <= 8])

    def less(one, other):
        """At all budgets: which one is read afterwards is then no choice."""
        return {f"{LABELS[one]} − {LABELS[other]}, KL ≤ {b}": (best[one][b], best[other][b])
                for b in best[one]}

    columns = ["", *(f"KL ≤ {kl:g}" for kl in BUDGETS)]
    return {"verdicts": [
        verdict("Preference losses lie above SFT on chosen", less("dpo", "sft"), 2),
        verdict("(ours) DPOP, λ 50, lies below SFT", less("dpop", "sft"), 2),
        verdict("TDPO lies above DPO", less("tdpo1", "dpo") | less("tdpo2", "dpo"), 2),
        verdict("(ours) 2D-DPO and reward-weighted SFT, which read the true scores, lie above DPO",
                less("2d-dpo", "dpo") | less("weighted-sft", "dpo"), 2)], "tables": [
        table("True reward (0 to 16) within a budget of KL(π‖π_ref), nats a response, mean ± 95 % interval "
              f"over seeds; {len(points['dpo'][0])} candidates a loss (knobs and checkpoints), chosen on one "
              "half of the samples and read off the other. Reference: "
              f"{cell([ps[0]['reward'][0] for ps in points['dpo']])}. Standard error of a point, "
              f"{setting.run.samples} samples: {se:.2f}. The furthest that DPOP goes: KL "
              f"{cell([max(p['kl'][0] for p in ps) for ps in points['dpop']], 3)}. A check of the "
              "measurement, no finding: points above their own reference's re-weighted curve by three "
              f"standard errors: {sum(checks)} of {len(checks)}", columns, rows),
        table("The same less DPO's, paired by seed, ± 95 % interval", columns,
              [[LABELS[loss], *(versus(of[b], best["dpo"][b]) for b in of)] for loss, of in best.items()
               if loss != "dpo"])]}

def draw(s, path):
    fig, axes = figure(1, 2, width=5.4, height=4.2)
    (left, right), best = axes[0], within(s)
    grid = np.geomspace(0.01, BUDGETS[-1], 60)
    for loss, seeds in s["points"].items():
        band(left, grid, [[best_within(ps, kl) for kl in grid] for ps in seeds], LABELS[loss], COLOURS[loss])
    ceiling = [[on_curve(curve, kl, np.nan) for kl in grid] for curve in s["reweighted"]]
    band(left, grid, ceiling, "Eq. 4 of each reference", "black", linestyle=":")
    left.set(xlim=(0, BUDGETS[-1]), ylim=(8, 13.5), ylabel="true reward (of 16)",
             xlabel="budget of KL(policy ‖ reference), nats", title="reward within a KL budget (95 % bands)")
    fig.legend(*left.get_legend_handles_labels(), fontsize=8, ncols=5, loc="outside lower center")
    b = "0.5"
    base = best["dpo"][b]
    bars(right, {LABELS[loss]: ([x - y for x, y in zip(of[b], base, strict=True)], COLOURS[loss])
                 for loss, of in best.items() if loss != "dpo"})
    right.set(xlabel="true reward less DPO's", title=f"within {b} nats, paired by seed")
    save(fig, path)
