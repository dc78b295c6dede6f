"""What the claims share: sizes, command line, tables, colours, and where things are written.

A claim is a module with NAME, TITLE, runs(setting), summarise(setting, results) -> JSON, draw(JSON, path).
"""

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import time
import warnings
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
           "sft": "#7f7f7f", "ceiling": "#000000", "unweighted": "#8c564b"}
LABELS = {"dpo": "DPO", "dpop": "DPOP", "tdpo1": "TDPO1", "tdpo2": "TDPO2", "2d-dpo": "2D-DPO",
          "sft": "SFT on chosen"}


# ---------------------------------------------------------------------------------------------------------
# Sizes


@dataclass(frozen=True)
class Setting:
    name: str
    seeds: tuple
    reviews: World
    sums: World
    run: Run  # lr, batch, steps, checkpoints, samples of every run in the reviews world
    long: tuple  # checkpoints of the long runs (weight.py)
    sums_run: Run
    betas: tuple = (0.05, 0.1, 0.3, 1.0, 2.0, 5.0)
    lams: tuple = (5.0, 50.0, 500.0)
    alphas: tuple = (0.1, 0.3, 0.5, 0.7)
    edits: tuple = (1, 3, 6, 12, "all")
    reference_samples: int = 8192
    least_ess: int = 100  # effective samples below which the re-weighted curve is cut

    def review_run(self, seed, loss="dpo", beta=0.1, **more):
        return replace(self.run, world=replace(self.reviews, seed=seed), loss=loss, beta=beta, **more)

    def sums_runs(self, seed, edits, loss="dpo", **more):
        return replace(self.sums_run, world=replace(self.sums, seed=seed, edits=edits), loss=loss, **more)


REVIEWS = World("reviews", pairs=3000, preferred=2000, held_out=200, sft_steps=500, sft_lr=2e-3)
SUMS = World("sums", pairs=3000, preferred=1000, held_out=200, sft_steps=600, sft_lr=3e-3)
FULL = Setting("full", (0, 1, 2), REVIEWS, SUMS,
               Run(REVIEWS, lr=1e-4, batch_size=32, steps=80, checkpoints=(0, 40, 80)),
               (0, 40, 80, 160),
               Run(SUMS, lr=3e-4, beta=0.3, batch_size=32, steps=40, checkpoints=(0, 40)))
QUICK = replace(FULL, name="quick", seeds=(0,), reference_samples=4096,
                run=replace(FULL.run, steps=20, checkpoints=(0, 10, 20)), long=(0, 20, 40),
                reviews=replace(REVIEWS, sft_steps=300), betas=(0.1, 1.0, 5.0), lams=(50.0,),
                alphas=(0.1, 0.5), sums=replace(SUMS, sft_steps=400), edits=(1, "all"),
                sums_run=replace(FULL.sums_run, steps=30, checkpoints=(0, 30)))
_small = {"pairs": 24, "preferred": 16, "held_out": 8, "n_layer": 1, "n_embd": 8, "sft_steps": 2}
TINY = replace(QUICK, name="tiny", seeds=(0, 1), reference_samples=32, least_ess=1,
               reviews=replace(REVIEWS, **_small), sums=replace(SUMS, **_small), betas=(0.1, 1.0),
               run=replace(FULL.run, batch_size=4, steps=2, checkpoints=(0, 2), samples=8), long=(0, 2, 3),
               sums_run=replace(FULL.sums_run, batch_size=4, steps=2, checkpoints=(0, 2)))


# ---------------------------------------------------------------------------------------------------------
# Many runs


def start_worker():
    torch.set_num_threads(1)


def kept(job):
    """One job, from `store` where it was done before. job: (Run or World or (World, samples), store)."""
    thing, store = job
    world, n = thing if isinstance(thing, tuple) else (None, None)
    path = Path(store, f"{key_of(thing)}.json" if n is None else f"{key_of(world)}-{n}.json")
    if path.exists():
        return json.loads(path.read_text()) | {"from_store": True}
    cpu, wall = time.process_time(), time.perf_counter()
    if n is not None:
        result = {"rewards": reference_rewards(world, n, store)}
    elif isinstance(thing, World):
        result = {"folder": reference_folder(thing, store).name}
    else:
        result = replay(thing, store)
    result |= {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(result))
    part.replace(path)
    return result


def world_of(thing):
    """The world whose reference a job needs: edits are of the pairs only."""
    return replace(thing.world if isinstance(thing, Run) else thing[0], edits=1)


def perform(things, store, workers, say):
    """{thing: its result}, seed after seed, references first; `workers` processes of one thread each."""
    Path(store).mkdir(parents=True, exist_ok=True)
    results, start, nowhere = {}, time.perf_counter(), contextlib.nullcontext()
    pool = multiprocessing.get_context("spawn").Pool(workers, start_worker) if workers > 1 else None
    with pool or nowhere:
        for seed in sorted({world_of(thing).seed for thing in things}):
            of_seed = [thing for thing in things if world_of(thing).seed == seed]
            for batch in (list(dict.fromkeys(map(world_of, of_seed))), of_seed):
                work = (pool.imap if pool else map)(kept, [(thing, store) for thing in batch])
                results |= dict(zip(batch, work, strict=True))
            say(f"seed {seed}: {len(of_seed)} runs, {time.perf_counter() - start:.0f} s")
    return results


# ---------------------------------------------------------------------------------------------------------
# Numbers


def cell(values, digits=2):
    """One value a seed -> "mean [least, most]"."""
    values = [v for v in values if v is not None]
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


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


# ---------------------------------------------------------------------------------------------------------
# Figures


def band(axis, x, values, label, colour, **more):
    """Mean over seeds (rows of values) as a line, least to most as a band."""
    values = np.asarray(values, dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column without a number stays empty
        mean, low, high = (f(values, axis=0) for f in (np.nanmean, np.nanmin, np.nanmax))
    axis.plot(x, mean, label=label, color=colour, **({"linewidth": 1.6} | more))
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


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


# ---------------------------------------------------------------------------------------------------------
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
    scripts = ("losses.py", "model.py", "data.py", "train.py", "runs.py", "ranks.py", "health.py", "toy")
    changed = git("status", "--porcelain", "--", *scripts)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)


def hardware():
    name = platform.processor() or platform.machine()
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        pass
    return f"{name}, {os.cpu_count()} cores"


def run_claims(claims, setting, places, store, workers, say=print, command=""):
    """Run what the claims need, once each, and write each claim's JSON and PNG."""
    start, load = time.perf_counter(), os.getloadavg()[0]
    wanted = {claim: claim.runs(setting) for claim in claims}
    things = list(dict.fromkeys(thing for runs in wanted.values() for thing in runs))
    say(f"{setting.name}: {len(things)} runs for {len(claims)} claims, {workers} processes")
    results = perform(things, store, workers, say)
    places.results.mkdir(parents=True, exist_ok=True)
    places.figures.mkdir(parents=True, exist_ok=True)
    made = {"command": command, "setting": setting.name, "seeds": len(setting.seeds), "hardware": hardware(),
            "commit": commit(), "sources": source_hash()[:12], "torch": torch.__version__,
            "python": platform.python_version(), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "load_at_start": load, "workers": workers}
    for claim, runs in wanted.items():
        summary = {"claim": claim.NAME, "title": claim.TITLE}
        summary |= claim.summarise(setting, {run: results[run] for run in runs})
        cpu_s = round(sum(results[run]["cpu_s"] for run in runs))
        summary["made"] = made | {"runs": len(runs), "cpu_s": cpu_s}
        write(claim, summary, places, say)
    total = {"wall_s": round(time.perf_counter() - start), "runs": len(results),
             "cpu_s": round(sum(r["cpu_s"] for r in results.values())),
             "taken_from_store": sum("from_store" in r for r in results.values()),
             "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)}
    if len(claims) > 1:
        (places.results / "made.json").write_text(json.dumps(made | total, indent=1) + "\n")
    say(f"{total['wall_s']} s, {total['cpu_s']} CPU seconds in {total['runs']} runs and references, "
        f"{total['taken_from_store']} of them from the store")


def write(claim, summary, places, say):
    text = json.dumps(summary, indent=None, separators=(",", ":"), default=float)
    (places.results / f"{claim.NAME}.json").write_text(text + "\n")
    claim.draw(json.loads(text), places.figures / f"{claim.NAME}.png")
    say(f"\n{claim.TITLE}\n\n{markdown(summary)}")


def draw_again(claims, places):
    for claim in claims:
        summary = json.loads((places.results / f"{claim.NAME}.json").read_text())
        claim.draw(summary, places.figures / f"{claim.NAME}.png")


def with_tables(text, results):
    """README's text with every block <!-- tables NAME --> ... <!-- end --> made from results/NAME.json."""
    def block(match):
        summary = json.loads((Path(results) / f"{match[1]}.json").read_text())
        text = made_line(summary) if match[1] == "made" else markdown(summary)
        return f"<!-- tables {match[1]} -->\n{text}<!-- end -->"
    return re.sub(r"<!-- tables ([\w-]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def made_line(made):
    whole = made["taken_from_store"] == 0
    time_ = f"{made['wall_s'] / 60:.1f} minutes of wall time" if whole else "put together from finished runs"
    return (f"Made by `{made['command']}` at commit {made['commit']} on {made['hardware']}, "
            f"{made['workers']} processes of one thread, Python {made['python']}, torch {made['torch']}, "
            f"{made['date']}: {made['seeds']} seeds, {made['runs']} runs and references, "
            f"{made['cpu_s'] / 60:.1f} CPU minutes, {time_} (load average at the start "
            f"{made['load_at_start']:.1f}).\n")


def main(claims, argv=None):
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, short runs; into out/claims/quick")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # of the tests: seconds
    parser.add_argument("--seeds", type=int, help="number of seeds; default 3, quick 1")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread; default 2")
    parser.add_argument("--out", type=Path, help="folder for results/ and figures/; default: this script's")
    parser.add_argument("--store", type=Path, default=ROOT / "out" / "claims" / "runs",
                        help="finished runs, reused by the next call; default out/claims/runs")
    parser.add_argument("--draw", action="store_true", help="run nothing: figures from the JSON files")
    parser.add_argument("--tables", action="store_true", help="run nothing: README's tables from the JSON")
    args = parser.parse_args(argv)
    setting = TINY if args.tiny else QUICK if args.quick else FULL
    if args.seeds:
        setting = dataclasses.replace(setting, seeds=tuple(range(args.seeds)))
    out = args.out or (HERE if setting.name == "full" else ROOT / "out" / "claims" / setting.name)
    places = Places(out / "results", out / "figures")
    torch.set_num_threads(1)
    if args.tables or args.draw:
        if args.draw:
            draw_again(claims, places)
        if args.tables:
            places.readme.write_text(with_tables(places.readme.read_text(), places.results))
        return
    flags = sys.argv[1:] if argv is None else argv
    run_claims(claims, setting, places, args.store, args.workers, say=lambda text: print(text, flush=True),
               command=" ".join(["python", f"experiments/{Path(sys.argv[0]).name}", *flags]))
