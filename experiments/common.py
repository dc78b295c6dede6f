"""What the claims share: sizes, command line, tables, colours, and where things are written.

A claim is a module with NAME, TITLE, runs(setting), measure(setting, results) -> numbers, report(setting,
numbers) -> tables and verdicts, draw(numbers, path). A JSON file holds all three: --tables reports again.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from replay import ROOT, Run, World, key_of, reference_folder, reference_rewards, replay, source_hash

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
COLOURS = {"dpo": "#1f77b4", "dpop": "#d62728", "tdpo1": "#9467bd", "tdpo2": "#2ca02c", "2d-dpo": "#ff7f0e",
           "2d-dpo-vanilla": "#bcbd22", "unselected": "#8c564b", "badness": "#17becf", "sft": "#7f7f7f",
           "weighted-sft": "#e377c2", "unweighted": "#8c564b"}
LABELS = {"dpo": "DPO", "dpop": "DPOP", "tdpo1": "TDPO1", "tdpo2": "TDPO2", "2d-dpo": "2D-DPO",
          "2d-dpo-vanilla": "vanilla 2D-DPO", "sft": "SFT on chosen", "weighted-sft": "reward-weighted SFT"}
BLOCKS = ("verdicts", "made")  # of the README, beside one for each claim
# 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# Sizes

def dense(steps):
    """The start and twelve checkpoints."""
    return tuple(steps * k // 12 for k in range(13))

@dataclass(frozen=True)
class Setting:
    name: str
    seeds: tuple
    reviews: World
    sums: World
    run: Run  # lr, batch, steps, checkpoints, samples of every run in the reviews world
    sums_run: Run
    betas: tuple = (0.1, 1.0)  # each loss has two knobs on the frontier: as many candidates as the others
    many_betas: tuple = (1e-6, 0.01, 0.1, 1.0, 5.0, 20.0)
    lams: tuple = (5.0, 50.0)
    alphas: tuple = (0.5, 1.0)
    edits: tuple = (1, "all")
    rates: tuple = (3e-5, 1e-4, 3e-4, 1e-3)  # learning rates to choose from
    reference_samples: int = 4096
    least_ess: int = 100  # effective samples below which the re-weighted curve is cut
    levels: tuple = (0.1, 0.25, 0.5, 1.0)  # nats of KL at which losses are compared

    def review_run(self, seed, loss="dpo", beta=0.1, times=1, **more):
        """A run in the reviews world; times: that many times as long, with as many checkpoints."""
        return replace(self.run, world=replace(self.reviews, seed=seed), loss=loss, beta=beta, **{
            "steps": times * self.run.steps, "checkpoints": tuple(times * c for c in self.run.checkpoints)
        } | more)

    def sums_runs(self, seed, edits, loss="dpo", **more):
        return replace(self.sums_run, world=replace(self.sums, seed=seed, edits=edits), loss=loss, **more)

REVIEWS = World("reviews", pairs=3000, preferred=2000, held_out=100, sft_steps=500, sft_lr=2e-3)
SUMS = World("sums", pairs=3000, preferred=1000, held_out=100, sft_steps=600, sft_lr=3e-3)
FULL = Setting("full", (0, 1, 2, 3, 4), REVIEWS, SUMS,
               Run(REVIEWS, lr=1e-4, batch_size=32, steps=60, checkpoints=dense(60), samples=128),
               Run(SUMS, lr=3e-4, beta=0.3, batch_size=32, steps=40, checkpoints=(0, 40)))
_small = {"pairs": 40, "preferred": 16, "held_out": 8, "n_layer": 1, "n_embd": 8, "sft_steps": 2}
TINY = replace(FULL, name="tiny", seeds=(0,), reference_samples=32, least_ess=1, levels=(1e-6,), betas=(1.0,),
               many_betas=(0.1, 5.0), lams=(50.0,), alphas=(0.5,), rates=(1e-4, 1e-3),
               reviews=replace(REVIEWS, **_small), sums=replace(SUMS, **_small),
               run=replace(FULL.run, batch_size=4, steps=2, checkpoints=(0, 1, 2), samples=8),
               sums_run=replace(FULL.sums_run, batch_size=4, steps=2, checkpoints=(0, 2)))

# Many runs

def kept(thing, store):
    """The result of a Run, a World (its reference) or (World, samples), from `store` where it is known."""
    world, n = thing if isinstance(thing, tuple) else (None, None)
    path = Path(store, f"{key_of(thing)}.json" if n is None else f"{key_of(world)}-{n}.json")
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8")) | {"from_store": True}
    cpu = time.process_time()
    if n is not None:
        result = {"rewards": reference_rewards(world, n, store)}
    else:
        result = {"folder": reference_folder(thing, store).name} if isinstance(thing, World) else \
            replay(thing, store)
    result["cpu_s"] = time.process_time() - cpu
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.replace(path)
    return result

def world_of(thing):
    """The world whose reference a job needs: the pairs of preferences are not its business."""
    return replace(thing.world if isinstance(thing, Run) else thing[0], edits=1)

def perform(things, store, say):
    """{thing: its result}, seed after seed, references first."""
    Path(store).mkdir(parents=True, exist_ok=True)
    results, start = {}, time.perf_counter()
    for seed in sorted({world_of(thing).seed for thing in things}):
        of_seed = [thing for thing in things if world_of(thing).seed == seed]
        for thing in dict.fromkeys([*map(world_of, of_seed), *of_seed]):
            results[thing] = kept(thing, store)
        say(f"seed {seed}: {len(of_seed)} runs, {time.perf_counter() - start:.0f} s")
    return results

# Numbers

def mean_and_half(values):
    """(mean, half of its 95 % interval over seeds, by Student's t; None for one seed)."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), float(T[len(values) - 2] * values.std(ddof=1) / math.sqrt(len(values)))

def cell(values, digits=2, sign=""):
    """One value a seed -> "mean ± half of the 95 % interval"; says how many seeds have a value."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    mean, half = mean_and_half(known)
    text = f"{mean:{sign}.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")
    return text + (f" ({len(known)} of {len(values)} seeds)" if len(known) < len(values) else "")

def p_value(differences):
    """Two-sided p of Student's t for a mean of 0. With t = sqrt(n - 1) tan x the density is cos^(n - 2) x."""
    d, n = np.asarray(differences, dtype=float), len(differences)
    if n < 2 or not d.std():
        return None
    t = abs(d.mean()) / (d.std(ddof=1) / math.sqrt(n))
    x = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(x) ** (n - 2)
    return float(density[x > math.atan(t / math.sqrt(n - 1))].sum() / density.sum())

def differences_of(values, base):
    """Paired by seed, where both seeds have a value."""
    return [a - b for a, b in zip(values, base, strict=True) if a is not None and b is not None]

def versus(values, base, digits=2):
    """The paired difference, seed by seed, its 95 % interval and its p."""
    differences = differences_of(values, base)
    if not differences:
        return "–"
    p = p_value(differences)
    return cell(differences, digits, "+") + ("" if p is None else f", p {p:.2g}")

def verdict(claim, compared, digits=3):
    """A row of the table of verdicts: what the papers say, and {label: (values, base)} compared by seed."""
    seen = {label: {"text": versus(*pair, digits), "p": p_value(differences_of(*pair))}
            for label, pair in compared.items()}
    return {"claim": claim, "seen": seen}

def reaches(xs, ys, x):
    """y where a run first reaches x, linearly between neighbouring checkpoints; None if it never does."""
    for i in range(1, len(xs)):
        if xs[i - 1] < x <= xs[i]:
            share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
            return float(ys[i - 1] + share * (ys[i] - ys[i - 1]))
    return None

def table(title, columns, rows):
    return {"title": title, "columns": list(columns), "rows": [[str(x) for x in row] for row in rows]}

def markdown(summary):
    """The tables of a claim's JSON."""
    text = []
    for t in summary["tables"]:
        text += [f"*{t['title']}*", "", "| " + " | ".join(t["columns"]) + " |",
                 "|" + "---|" * len(t["columns"])]
        text += ["| " + " | ".join(row) + " |" for row in t["rows"]] + [""]
    return "\n".join(text)

def checkpoint(result, step=None):
    """The record of a step, by default the last."""
    records = result["checkpoints"]
    return records[-1] if step is None else next(r for r in records if r["step"] == step)

def series(results, pick):
    """(steps, (seeds, checkpoints) of pick(record)) of the runs of several seeds."""
    steps = [record["step"] for record in results[0]["checkpoints"]]
    return steps, np.array([[pick(record) for record in result["checkpoints"]] for result in results])

# Figures

def band(axis, x, values, label, colour, **more):
    """Mean over seeds (rows of values) as a line, its 95 % interval as a band."""
    columns = np.asarray(values, dtype=float).T
    known = [column[~np.isnan(column)] for column in columns]
    stats = [mean_and_half(column) if len(column) else (np.nan, None) for column in known]
    mean, half = np.array([m for m, _ in stats]), np.array([h or 0.0 for _, h in stats])
    axis.plot(x, mean, label=label, color=colour, **({"linewidth": 1.8} | more))
    axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)

def bars(axis, rows, base=0.0):
    """Rows {label: (values a seed, colour)} as points with their 95 % intervals, top to bottom."""
    for y, (values, colour) in enumerate(rows.values()):
        known = [v for v in values if v is not None]
        if known:
            mean, half = mean_and_half(known)
            axis.errorbar(mean, y, xerr=half, fmt="o", color=colour, capsize=3)
    axis.axvline(base, color="grey", linewidth=0.8, linestyle="--")
    axis.locator_params(axis="x", nbins=5)
    axis.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.5, -0.5))

def figure(rows, columns, width=4.4, height=3.4):
    figure_, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False,
                                 layout="constrained")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    return figure_, axes

def save(figure_, path):
    """A PNG of 256 colours: small enough to be committed."""
    drawn = io.BytesIO()
    figure_.savefig(drawn, dpi=90)
    plt.close(figure_)
    image = Image.open(drawn).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)

# Command line

@dataclass
class Places:
    results: Path
    figures: Path
    readme: Path = field(default=HERE / "README.md")

def commit():
    """The commit, with a plus where the scripts differ from it."""
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True).stdout.strip()
    scripts = ("losses.py", "model.py", "data.py", "train.py", "plumbing", "toy", "experiments/*.py")
    changed = git("status", "--porcelain", "--", *scripts)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)

def run_claims(claims, setting, places, store, say=print, command=""):
    """Run what the claims need, once each, and write each claim's JSON and PNG."""
    start = time.perf_counter()
    wanted = {claim: claim.runs(setting) for claim in claims}
    things = list(dict.fromkeys(thing for runs in wanted.values() for thing in runs))
    say(f"{setting.name}: {len(things)} runs for {len(claims)} claims")
    results = perform(things, store, say)
    places.results.mkdir(parents=True, exist_ok=True)
    places.figures.mkdir(parents=True, exist_ok=True)
    made = {"command": command, "setting": setting.name, "seeds": len(setting.seeds), "commit": commit(),
            "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "sources": source_hash()[:12], "torch": torch.__version__, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    for claim, runs in wanted.items():
        numbers = claim.measure(setting, {run: results[run] for run in runs})
        cpu_s = round(sum(results[run]["cpu_s"] for run in runs))
        numbers["made"] = made | {"runs": len(runs), "cpu_s": cpu_s}
        say(write(claim, setting, numbers, places))
    total = {"wall_s": round(time.perf_counter() - start), "runs": len(results),
             "cpu_s": round(sum(r["cpu_s"] for r in results.values())),
             "taken_from_store": sum("from_store" in r for r in results.values())}
    if len(claims) > 1:
        (places.results / "made.json").write_text(json.dumps(made | total, indent=1) + "\n", encoding="utf-8")
    say(f"{total['wall_s']} s, {total['cpu_s']} CPU seconds in {total['runs']} runs and references, "
        f"{total['taken_from_store']} of them from the store")

def write(claim, setting, numbers, places):
    """The JSON, with tables and verdicts made of its numbers, and the figure. Returns the tables' text."""
    summary = json.loads(json.dumps(numbers | {"title": claim.TITLE}, default=float))
    summary |= claim.report(setting, summary)
    text = json.dumps(summary, separators=(",", ":"), default=float)
    (places.results / f"{claim.NAME}.json").write_text(text + "\n", encoding="utf-8")
    claim.draw(summary, places.figures / f"{claim.NAME}.png")
    return f"\n{claim.TITLE}\n\n{markdown(summary)}"

def report_again(claims, setting, places):
    """Run nothing: tables, verdicts, figures and the README from the numbers in the JSON files."""
    for claim in claims:
        numbers = json.loads((places.results / f"{claim.NAME}.json").read_text(encoding="utf-8"))
        write(claim, setting, numbers, places)
    if places.results == HERE / "results":
        text = with_tables(places.readme.read_text(encoding="utf-8"), places.results)
        places.readme.write_text(text, encoding="utf-8")

def with_tables(text, results):
    """README's text with every block <!-- tables NAME --> ... <!-- end --> made from results/NAME.json.

    The block named verdicts has the verdicts of all claims, in the order of their blocks.
    """
    def read(name):
        return json.loads((Path(results) / f"{name}.json").read_text(encoding="utf-8"))

    def block(match):
        if match[1] == "verdicts":
            names = [name for name in re.findall(r"<!-- tables (\w+) -->", text) if name not in BLOCKS]
            new = verdicts([row for name in names for row in read(name).get("verdicts", ())])
        else:
            new = made_line(read("made")) if match[1] == "made" else markdown(read(match[1]))
        return f"<!-- tables {match[1]} -->\n{new}<!-- end -->"
    return re.sub(r"<!-- tables (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)

def verdicts(rows):
    """The table of verdicts, and which of its comparisons survive Bonferroni's correction."""
    shown = [[row["claim"], "; ".join(f"{label}: {x['text']}" for label, x in row["seen"].items())]
             for row in rows]
    ps = [(f"{row['claim']} ({label})", x["p"]) for row in rows for label, x in row["seen"].items()
          if x["p"] is not None]
    level = 0.05 / max(1, len(ps))
    few = "; ".join(name for name, p in ps if p < level) or "none"
    return markdown({"tables": [table("Differences are paired by seed, ± 95 % interval, p of Student's t",
                                      ["the papers say", "seen here"], shown)]}) + (
        f"\n**Of {len(ps)} comparisons {sum(p < 0.05 for _, p in ps)} have p < 0.05; Bonferroni asks for p < "
        f"{level:.2g}, and {sum(p < level for _, p in ps)} survive:** {few}.\n")

def made_line(made):
    return (f"The claims ran by `{made['command']}` at commit {made['commit']} on {made['hardware']}, "
            f"Python {made['python']}, torch {made['torch']}, {made['date']}: setting {made['setting']}, "
            f"seeds: {made['seeds']}, {made['runs']} runs, {made['cpu_s'] / 60:.1f} CPU minutes.\n")

def main(claims, argv=None):
    parser = argparse.ArgumentParser(description="The papers' claims in miniature.")
    parser.add_argument("names", nargs="*", help=", ".join(claim.NAME for claim in claims) + "; default: all")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # of the tests: seconds
    parser.add_argument("--seeds", type=int, help="number of seeds; default 5, at most 10")
    parser.add_argument("--out", type=Path, help="folder for results/ and figures/; default: this script's")
    parser.add_argument("--store", type=Path, default=ROOT / "out" / "claims" / "runs",
                        help="finished runs, reused by the next call; default out/claims/runs")
    parser.add_argument("--tables", action="store_true",
                        help="run nothing: tables, verdicts, figures and README from the numbers in the JSON")
    args = parser.parse_args(argv)
    claims = [claim for claim in claims if claim.NAME in args.names or not args.names]
    setting = TINY if args.tiny else FULL
    if args.seeds:
        setting = dataclasses.replace(setting, seeds=tuple(range(args.seeds)))
    out = args.out or (HERE if setting.name == "full" else ROOT / "out" / "claims" / setting.name)
    places = Places(out / "results", out / "figures")
    torch.set_num_threads(1)
    if args.tables:
        return report_again(claims, setting, places)
    flags = sys.argv[1:] if argv is None else argv
    run_claims(claims, setting, places, args.store, say=lambda text: print(text, flush=True),
               command=" ".join(["python", f"experiments/{Path(sys.argv[0]).name}", *flags]))
