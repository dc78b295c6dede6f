"""Claim 5: 2D-DPO. Which sentences each loss moves, reward by aspect, and the push on the worst sentences.

    python experiments/segments.py [--quick]
"""

import math
import sys
import warnings

import numpy as np
import torch
from common import band, cell, checkpoint, figure, main, save, table
from replay import data, encoded, losses

NAME, TITLE = "segments", "Claim 5. Segments and aspects (2D-DPO)"
RELEVANCE = (0, 1, 3, 4)  # 2 does not occur
VARIANTS = {  # name -> (loss, knobs, label)
    "dpo": ("dpo", {}, "DPO, no scores"),
    "aspects": ("2d-dpo-vanilla", {"one_segment": True}, "aspects only (1 segment)"),
    "vanilla": ("2d-dpo-vanilla", {}, "vanilla = segments only"),
    "badness": ("2d-dpo-vanilla", {"rejected_weight": "badness"}, "vanilla, badness"),
    "grouped": ("2d-dpo", {}, "grouped (Eq. 6)"),
    "helpfulness": ("2d-dpo", {"aspect_weights": (1.0, 0.0)}, "grouped, helpfulness"),
    "relevance": ("2d-dpo", {"aspect_weights": (0.0, 1.0)}, "grouped, relevance")}
BAD, GOOD = (0, 2), (6, 8)  # helpfulness + relevance of a sentence
SHOWN = {"dpo": "#1f77b4", "vanilla": "#2ca02c", "badness": "#d62728", "grouped": "#ff7f0e"}


def run_of(setting, seed, name):
    loss, knobs, _ = VARIANTS[name]
    return setting.review_run(seed, loss, 0.1, **knobs)


def runs(setting):
    return [run_of(setting, seed, name) for seed in setting.seeds for name in VARIANTS]


def asked(world):
    """The push that each loss asks of a rejected sentence by its score, h + r of 8, at policy = reference.

    dL/d(log-ratio of the sentence), in units of beta / 2: autograd through the losses, held-out pairs.
    """
    pairs = encoded(world)[2]
    batch = data.collate([pairs[i] for i in range(len(pairs))])
    masks = batch.segment_mask.unbind(1)
    rewards = losses.segment_rewards(batch.scores / 4, torch.tensor([0.5, 0.5])).unbind(1)  # (B, S)
    level = (batch.scores[:, 1].sum(-1))[masks[1]].long().numpy()
    pushes = {}
    for name in SHOWN:
        ratios = [torch.zeros_like(r).requires_grad_() for r in rewards]
        zeros = [torch.zeros_like(r) for r in rewards]
        if name == "dpo":
            total = losses.dpo_loss(*(x.sum(-1) for x in ratios + zeros), beta=1.0)
        else:
            rejected = 1 - rewards[1] if name == "badness" else rewards[1]
            loss = losses.dpo2d_loss if name == "grouped" else losses.dpo2d_vanilla_loss
            total = loss(*ratios, *zeros, rewards[0], rejected, *masks, beta=1.0)
        total.sum().backward()
        push = 2 * ratios[1].grad[masks[1]].numpy()
        pushes[name] = [float(push[level == k].mean()) if (level == k).any() else None for k in range(9)]
    return pushes


def by_level(credit, side):
    """Mean log-ratio of the held-out sentences of a side by h + r, 0 to 8; None for none."""
    totals = {k: [0.0, 0] for k in range(9)}
    for h in range(5):
        for r in range(5):
            totals[h + r][0] += credit["sum"][side][h][r]
            totals[h + r][1] += credit["count"][side][h][r]
    return [total / count if count else None for total, count in totals.values()]


def cells_of(credit):
    """Mean log-ratio of the held-out sentences of each helpfulness and relevance, (5, 5), NaN for none."""
    total, count = (np.sum(credit[key], axis=0) for key in ("sum", "count"))
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def pooled(credit, low, high):
    """Mean log-ratio of the held-out sentences with low <= h + r <= high, on either side."""
    score = np.add.outer(np.arange(5), np.arange(5))
    among = (score >= low) & (score <= high)
    total, count = (np.sum(credit[key], axis=0)[among].sum() for key in ("sum", "count"))
    return float(total / count) if count else 0.0


def state_of(samples):
    """A table's cells from one record of samples a seed."""
    means = [cell([s[key][0] for s in samples]) for key in ("helpfulness", "relevance", "reward", "kl")]
    return [*means, cell([s["valid"] for s in samples])]


def summarise(setting, results):
    pushes = [asked(setting.review_run(seed).world) for seed in setting.seeds]
    maps, levels, rows, moved = {}, {}, [], []
    drawn, last = setting.run.checkpoints[len(setting.run.checkpoints) // 2], setting.run.steps
    for name, (_, _, label) in VARIANTS.items():
        seeds = [results[run_of(setting, seed, name)] for seed in setting.seeds]
        records = [checkpoint(r, drawn) for r in seeds]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a cell without a sentence stays empty
            cells = np.nanmean([cells_of(r["credit"]) for r in records], axis=0)[:, RELEVANCE]
        maps[name] = [[None if np.isnan(x) else float(x) for x in row] for row in cells]
        levels[name] = [by_level(r["credit"], 1) for r in records]  # of rejected sentences
        bad, good = ([pooled(r["credit"], *bounds) for r in records] for bounds in (BAD, GOOD))
        moved.append([label, cell(bad), cell(good), cell([g - b for b, g in zip(bad, good, strict=True)])])
        for step in (drawn, last):
            rows.append([label, step, *state_of([checkpoint(r, step)["samples"] for r in seeds])])
    start = [checkpoint(results[run_of(setting, seed, "dpo")], 0)["samples"] for seed in setting.seeds]
    rows.insert(0, ["reference", 0, *state_of(start)])
    asked_rows = [[VARIANTS[name][2], *(cell([p[name][k] for p in pushes]) for k in (0, 2, 4, 6, 8))]
                  for name in SHOWN]
    tables = [
        table("Samples, β 0.1: true score of each aspect (0 to 4, mean over sentences; standard error "
              f"{max(r['helpfulness'][1] for r in start):.2f}), reward, KL; mean [least, most] over seeds. W "
              "is uniform but in the last two",
              ["", "step", "helpfulness", "relevance", "true reward", "KL, nats", "in the grammar"], rows),
        table(f"Credit: mean log-ratio of held-out sentences at step {drawn}, nats: bad (scores sum to 0–2 "
              "of 8) and good (6–8)", ["", "bad sentences", "good sentences", "good − bad"], moved),
        table("The push down that the loss asks of a rejected sentence at π = π_ref, by its score, in units "
              "of β/2 (DPO: 1)", ["", *(f"score {k}/8" for k in (0, 2, 4, 6, 8))], asked_rows)]
    return {"maps": maps, "levels": levels, "asked": pushes, "step": drawn, "tables": tables}


def draw(s, path):
    fig, axes = figure(2, 5, width=3, height=3.1)
    panels = [*axes[0, :4], *axes[1, :3]]
    most = max(abs(x) for m in s["maps"].values() for row in m for x in row if x is not None)
    for axis, (name, cells) in zip(panels, s["maps"].items(), strict=True):
        values = np.array(cells, dtype=float)
        image = axis.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower")
        for h in range(5):
            for r in range(len(RELEVANCE)):
                if not math.isnan(values[h, r]):
                    axis.text(r, h, f"{values[h, r]:+.1f}", ha="center", va="center", fontsize=6.5,
                              color="white" if abs(values[h, r]) > 0.6 * most else "black")
        axis.grid(False)
        axis.set(title=VARIANTS[name][2], xticks=range(4), xticklabels=RELEVANCE, yticks=range(5),
                 xlabel="relevance")
        axis.title.set_fontsize(9)
    for axis in axes[:, 0]:
        axis.set(ylabel="helpfulness")
    axes[1, 3].axis("off")
    bar = fig.colorbar(image, cax=axes[1, 3].inset_axes([0.35, 0.02, 0.12, 0.96]))
    bar.set_label(f"log-ratio of a held-out\nsentence, nats (step {s['step']})")
    for name, colour in SHOWN.items():
        for axis, values in ((axes[0, 4], [p[name] for p in s["asked"]]), (axes[1, 4], s["levels"][name])):
            band(axis, range(9), values, VARIANTS[name][2], colour, marker=".")
    axes[0, 4].set(title="push down on a rejected sentence:\nasked by the loss, at π = π_ref",
                   ylabel="units of β/2")
    axes[1, 4].set(title=f"done by step {s['step']}", ylabel="its log-ratio, nats")
    axes[1, 4].legend(fontsize=6.5)
    for axis in axes[:, 4]:
        axis.set(xlabel="its score, helpfulness + relevance", xticks=(0, 2, 4, 6, 8))
        axis.title.set_fontsize(9)
    save(fig, path)


if __name__ == "__main__":
    main([sys.modules[__name__]])
