"""Compare runs: python tools/plot.py OUT_DIR [OUT_DIR ...] [--to FILE.png]

Prints a table of the last evaluations, the highest accuracy first, then the lowest loss. Draws each metric
over the steps, one colour a run. The default file is runs.png in the first folder.
"""

import argparse
import json
import math
import os
import sys
from operator import itemgetter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

PANELS = (  # title, unit, {metric: line style}
    ("loss", "nats", {"loss": "-"}),
    ("reward accuracy", "share of pairs", {"rewards/accuracies": "-"}),
    ("reward margin", "β × nats", {"rewards/margins": "-"}),
    ("log-ratio, policy to reference", "nats per response",
     {"logratio/chosen": "-", "logratio/rejected": "--"}),
    ("KL(reference ‖ policy)", "nats per response",
     {"kl/ref_policy_chosen": "-", "kl/ref_policy_rejected": "--"}),
    ("gradient norm, before clipping", "", {"grad_norm": "-"}))
TABLE = {"loss": "held-out loss", "rewards/accuracies": "accuracy",
         "logratio/chosen": "log-ratio chosen", "logratio/rejected": "rejected",
         "kl/ref_policy_chosen": "KL chosen", "kl/ref_policy_rejected": "rejected"}
HELD_OUT = {"marker": "o", "markersize": 3.5, "linewidth": 1.6}
LEGEND = {"training": {"alpha": 0.5}, "held out": HELD_OUT, "chosen": {}, "rejected": {"linestyle": "--"}}

def fail(message):
    print(f"plot.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)

def read_log(folder):
    """(config, records that have a step) of folder/log.jsonl."""
    path, config, records = Path(folder) / "log.jsonl", {}, []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        fail(f"{path}: {getattr(e, 'strerror', 'not a text file')}; name the --out_dir of a run of train.py")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            fail(f"{path}:{number}: not JSON (cut short by a kill?); delete the line, or go on with --resume")
        if not isinstance(record, dict):
            fail(f"{path}:{number}: not a record of train.py's log")
        if isinstance(record.get("config"), dict):
            config = record["config"]
        if "step" in record and "note" not in record:
            if not all(isinstance(value, int | float) for value in record.values()):
                fail(f"{path}:{number}: a value is not a number")
            records.append(record)
    if not records:
        fail(f"{path}: no step in it yet; draw it when the run has logged one")
    return config, records

def numbers(records):
    """What equal runs share: all but speed and memory."""
    return json.dumps([{k: x for k, x in r.items() if k[-6:] not in ("_per_s", "memory")} for r in records])

def table(runs):
    """Lines of text, best first. runs: {name: (config, records)}."""
    rows = [((-math.inf,), ["run", "loss", "β", "steps", *TABLE.values()])]
    for name, (config, records) in runs.items():
        last = [{}, *(r for r in records if "eval/loss" in r)][-1]
        first = next(other for other in runs if numbers(runs[other][1]) == numbers(records))
        cells = [config.get("loss", ""), config.get("beta", ""), records[-1]["step"],
                 *(format(last.get("eval/" + key, math.nan), ".4f") for key in TABLE)]
        rank = -last.get("eval/rewards/accuracies", -math.inf), last.get("eval/loss", math.inf)
        rows.append((rank, [name if name == first else f"{name} = {first}", *map(str, cells)]))
    lines = [cells for _, cells in sorted(rows, key=itemgetter(0))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).replace(" nan", "    ").rstrip() for line in lines]

def draw(runs, path):
    """runs: {name: (config, records)} -> a PNG; runs of equal numbers are one curve."""
    curves, handles = {}, []
    for name, (_, records) in runs.items():
        curves.setdefault(numbers(records), []).append(name)
    figure, axes = plt.subplots(2, 3, figsize=(16, 7), layout="constrained")
    for i, names in enumerate(curves.values()):
        colour, records = f"C{i % 10}", runs[names[0]][1]
        label = os.fsencode(" = ".join(names)).decode(errors="replace")  # letters that the locale lacks
        handles.append(Line2D([], [], color=colour, label=label))
        for axis, (_, _, metrics) in zip(axes.flat, PANELS, strict=True):
            for metric, style in metrics.items():
                for key, more in ((metric, {"alpha": 0.5, "linewidth": 1}), ("eval/" + metric, HELD_OUT)):
                    if points := [(r["step"], r[key]) for r in records if key in r]:
                        axis.plot(*zip(*points, strict=True), color=colour, linestyle=style, **more)
    for axis, (title, unit, _) in zip(axes.flat, PANELS, strict=True):
        axis.set(title=title if axis.lines else f"{title}: not logged", xlabel="step", ylabel=unit)
        axis.grid(alpha=0.2)
    handles += [Line2D([], [], color="grey", label=name, **style) for name, style in LEGEND.items()]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)

def main(argv=None):
    parser = argparse.ArgumentParser("plot.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("folders", nargs="+", metavar="OUT_DIR", help="folder of a run, with log.jsonl")
    parser.add_argument("--to", metavar="FILE.png", help="default: runs.png in the first folder")
    args = parser.parse_args(argv)
    runs = {str(Path(folder)): read_log(folder) for folder in args.folders}
    path = Path(args.to or Path(args.folders[0]) / "runs.png")
    if path.suffix.lower() != ".png":
        fail(f"--to {path}: name a .png file")
    try:
        draw(runs, path)
    except OSError as e:
        fail(f"{path}: {e.strerror}")
    sys.stdout.reconfigure(errors="backslashreplace")  # the path may have letters that a terminal lacks
    print("\n".join(table(runs)), path, sep="\n\n")

if __name__ == "__main__":
    main()
