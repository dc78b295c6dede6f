"""Kill a run at any moment, or fill its disk: python tests/kill.py [--short]

Each trial starts `train.py --loss dpo` (with the SFT run that makes its start), hurts it at a moment at which
Python opens a file for writing, renames, removes, or makes a folder, starts it again until it ends, and
compares: weights, the reference's remembered numbers and the log must be an uninterrupted run's, to the byte,
and no temporary file may be left. "torn" halves temporary files first. On a full disk a run must say so in
one line, with status 1 or 2. Trials are forked from this process, which has imported torch but never trained.
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (the first optimizer imports it: once here, not in each child)

import train  # noqa: E402
from plumbing import report  # noqa: E402

report.answer = lambda *_: ""  # said when all is written

FLAGS = ("--loss dpo --data d.jsonl --out_dir dpo --tokenizer bytes --n_layer 1 --n_head 2 --n_embd 16 "
         "--block_size 64 --batch_size 6 --micro_batch_size 3 --log_every 1 --eval_every 2 --save_every 1 "
         "--lr 1e-3 --sft_steps 2 --steps 3").split()
TIMING = {"pairs_per_s", "tokens_per_s", "peak_memory"}


# Faults, installed in the forked child


class Fault:
    """Counts what touches the disk; at the `at`-th of these it kills, or the disk is full from there on."""

    def __init__(self, at, action):
        self.at, self.action, self.count, self.hurting = at, action, 0, False

    def install(self):
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        takes_room = event == "os.mkdir" or event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR))
        touches = takes_room or event in ("os.rename", "os.remove", "os.rmdir")
        if self.hurting or not touches or not os.path.abspath(str(args[0])).startswith(os.getcwd()):
            return
        self.count += 1
        if not self.at or self.count < self.at:
            return
        if self.action == "full":
            if takes_room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return
        self.hurting = True  # what follows is not counted
        if self.action == "kill torn":
            for path in Path.cwd().rglob("*.part"):
                if path.is_file():
                    os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


# Trials


class Wrong(Exception):
    """What a trial found."""


def run(place, fault=None):
    """A forked training run in a folder -> its exit status. A run that exists goes on."""
    resume = ["--resume"] if (place / "dpo" / "run.json").exists() else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside the threads of a BLAS
        pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 70
    try:
        out = os.open(place / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(place)
        if fault:
            fault.install()
        train.main(FLAGS + resume)
        status = 0
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        if fault and not fault.at:
            Path("events").write_text(str(fault.count))  # read before this file is opened
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def new_folder(base):
    place = Path(tempfile.mkdtemp(dir=base))
    shutil.copy(base / "d.jsonl", place)
    return place


def numbers(place):
    """The logged numbers of each step and evaluation, without times; the last record of a step counts."""
    found = {}
    for name in ("sft", "dpo"):
        for line in (place / name / "log.jsonl").read_text().splitlines():
            record = json.loads(line)
            if "step" in record and "note" not in record:
                kind = "eval" if "eval/loss" in record else "train"
                found[name, record["step"], kind] = {k: v for k, v in record.items() if k not in TIMING}
    return found


def compare(place, good, what):
    result = ("model.safetensors", "config.json", "tokenizer.json")
    for name in [f"{one}/{file}" for one in ("sft", "dpo") for file in result] + ["dpo/reference-train.npy"]:
        if not (place / name).exists() or (place / name).read_bytes() != (good / name).read_bytes():
            raise Wrong(f"{what}: {name} is not the uninterrupted run's ({place})")
    if numbers(place) != numbers(good):
        raise Wrong(f"{what}: the log is not the uninterrupted run's ({place})")
    if left := [p for p in place.rglob("*") if p.suffix == ".part" or p.name.startswith(".tmp")]:
        raise Wrong(f"{what}: left behind: {left}")
    shutil.rmtree(place)


def check_message(place, status, what):
    """A run that could not write: one clear line and status 1 or 2."""
    text = (place / "output").read_text()
    last = [line for line in text.splitlines() if line.strip()][-1]
    said = last.startswith("train.py:") and "No space left" in last
    if status not in (1, 2) or "Traceback" in text or not said:
        raise Wrong(f"{what}: status {status}\n{text}")


def fault_at(base, good, at, action):
    """One fault at the at-th event -> False where the run did nothing there that this fault could hurt."""
    place, what = new_folder(base), f"{action} at event {at}"
    status = run(place, Fault(at, action))
    if status not in (0, -signal.SIGKILL):
        check_message(place, status, what)
    if status == 0 and action.startswith("kill"):
        raise Wrong(f"{what}: not killed")
    if again := run(place):
        raise Wrong(f"{what}: started again, it ended with status {again}:\n{(place / 'output').read_text()}")
    compare(place, good, what)
    return status != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a sample of each kind, in seconds")
    few = parser.parse_args().short
    torch.set_num_threads(1)
    chance, base = random.Random(0), Path(tempfile.mkdtemp(prefix="kill-"))
    words = ["red", "a", "green tree", "blue.", "sky"]
    lines = [{"prompt": f"Q{i}?", "chosen": " ".join(chance.choices(words, k=3)) + "!",
              "rejected": " ".join(chance.choices(words, k=2))} for i in range(16)]  # 3 steps: 1.2 epochs
    (base / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    good = new_folder(base)
    if run(good, Fault(None, "count")):
        sys.exit(f"the uninterrupted run failed:\n{(good / 'output').read_text()}")
    events = int((good / "events").read_text())
    print(f"an uninterrupted run touches the disk {events} times")
    try:
        for i, (action, sample) in enumerate((("kill", 3), ("kill torn", 3), ("full", 3))):
            points = range(1 + 7 * i, events + 1, events // sample) if few else range(1, events + 1)
            hurt = sum(fault_at(base, good, at, action) for at in points)
            print(f"{action}: {hurt} of {len(points)} hurt, then the same bytes", flush=True)
    except Wrong as e:
        sys.exit(f"kill.py: {e}")
    shutil.rmtree(base)
    print("all survived")


if __name__ == "__main__":
    main()
