"""Draw runs: python tools/plot.py OUT_DIR [OUT_DIR ...] [--to FILE.png]

One panel each for loss, accuracy, margin, log-ratios of chosen and rejected, KL and gradient norm. Training
is a thin line, held-out pairs are dots; one colour a run. The default file is runs.png in the first folder.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PANELS = (  # title, unit, {metric: (label, line style)}
    ("loss", "nats", {"loss": ("", "-")}),
    ("reward accuracy", "share of pairs", {"rewards/accuracies": ("", "-")}),
    ("reward margin", "β × nats", {"rewards/margins": ("", "-")}),
    ("log-ratio, policy to reference", "nats per response",
     {"logratio/chosen": ("chosen", "-"), "logratio/rejected": ("rejected", "--")}),
    ("KL(reference ‖ policy)", "nats per response",
     {"kl/ref_policy_chosen": ("chosen", "-"), "kl/ref_policy_rejected": ("rejected", "--")}),
    ("gradient norm, before clipping", "", {"grad_norm": ("", "-")}))


def fail(message):
    """Bad input: one clear line and exit status 2."""
    print(f"plot.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_log(folder):
    """The records of folder/log.jsonl that have a step."""
    path, records = Path(folder) / "log.jsonl", []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        fail(f"{path}: {e.strerror}; name the folder of a run, an --out_dir of train.py")
    except UnicodeDecodeError:
        fail(f"{path}: not a text file")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            fail(f"{path}:{number}: not JSON (cut short by a kill?); delete the line, or go on with --resume")
        if not isinstance(record, dict):
            fail(f"{path}:{number}: not a record of train.py's log")
        if "step" in record and "note" not in record:
            if not all(isinstance(value, int | float) for value in record.values()):
                fail(f"{path}:{number}: a value is not a number")
            records.append(record)
    if not records:
        fail(f"{path}: no step in it yet; draw it when the run has logged one")
    return records


def draw(logs, path):
    """logs: {name: records} -> a PNG."""
    figure, axes = plt.subplots(2, 3, figsize=(14, 7), layout="constrained")
    colours = plt.get_cmap("tab10").colors
    for axis, (title, unit, metrics) in zip(axes.flat, PANELS, strict=True):
        drawn = False
        for i, (name, records) in enumerate(logs.items()):
            name = os.fsencode(name).decode(errors="replace")  # letters that the locale lacks
            for metric, (label, style) in metrics.items():
                colour, label = colours[i % len(colours)], f"{name}, {label}" if label else name
                training = [(r["step"], r[metric]) for r in records if metric in r]
                held_out = [(r["step"], r["eval/" + metric]) for r in records if "eval/" + metric in r]
                if training:
                    axis.plot(*zip(*training, strict=True), color=colour, linestyle=style, linewidth=1,
                              alpha=0.6, label=None if held_out else label)
                if held_out:
                    axis.plot(*zip(*held_out, strict=True), color=colour, linestyle=style, linewidth=1.6,
                              marker="o" if style == "-" else "s", markersize=3.5,
                              label=f"{label}, held out")
                drawn = drawn or bool(training or held_out)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
        if drawn:
            axis.legend(fontsize=7)
        else:
            axis.text(0.5, 0.5, "not in this log", ha="center", transform=axis.transAxes)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser("plot.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("folders", nargs="+", metavar="OUT_DIR", help="folder of a run, with log.jsonl")
    parser.add_argument("--to", metavar="FILE.png", help="default: runs.png in the first folder")
    args = parser.parse_args(argv)
    logs = {str(Path(folder)): read_log(folder) for folder in args.folders}
    short = [Path(name).name for name in logs]
    if len(set(short)) == len(short) and all(short):
        logs = dict(zip(short, logs.values(), strict=True))
    path = Path(args.to or Path(args.folders[0]) / "runs.png")
    if path.suffix.lower() != ".png":
        fail(f"--to {path}: name a .png file")
    try:
        draw(logs, path)
    except OSError as e:
        fail(f"{path}: {e.strerror}")
    sys.stdout.reconfigure(errors="backslashreplace")  # the path may have letters that a terminal lacks
    print(path)


if __name__ == "__main__":
    main()
