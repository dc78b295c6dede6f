"""Kill a run at any moment, fill its disk, make its folder read-only: python tests/kill.py [--short]

Each trial starts `train.py --loss dpo` (with the SFT run that makes its start), hurts it, starts it again
until it ends, and compares: weights, the reference's remembered numbers and the log must be an uninterrupted
run's, to the byte, and no temporary file may be left. A run that ends by itself must say why in one line,
with status 1 or 2. Trials are forked from this process, which has imported torch but never trained.

    random moments   kill -9 after a random time, up to 20 times a run
    every step       kill -9 before each write, rename, fsync, mkdir or unlink, and amid each write
    full disk        from any of these on, all that takes room fails with ENOSPC; and a real, small tmpfs
    read-only        from any of these on, all fails with EROFS
"""

import argparse
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401  (the first optimizer imports it: once here, not in each child)
from safetensors import SafetensorError  # noqa: E402

import train  # noqa: E402
from plumbing import checkpoints, folder, pretrained, reference, report  # noqa: E402

report.answer = lambda *_: ""  # said when all is written

FLAGS = ("--loss dpo --data d.jsonl --out_dir dpo --tokenizer bytes --n_layer 1 --n_head 2 --n_embd 16 "
         "--block_size 64 --batch_size 6 --micro_batch_size 3 --log_every 1 --eval_every 2 --save_every 1 "
         "--lr 1e-3")
SHORT_RUN = f"{FLAGS} --sft_steps 2 --steps 3".split()
LONG_RUN = f"{FLAGS} --sft_steps 30 --steps 150".split()
TIMING = {"pairs_per_s", "tokens_per_s", "peak_memory"}


# ---------------------------------------------------------------------------------------------------------
# Faults, installed in the forked child


class Fault:
    """Counts what touches the disk; at the `at`-th of these it kills, or it fails from there on."""

    def __init__(self, at, action):
        self.at, self.action, self.count = at, action, 0

    def hit(self, takes_room, torn=None, error=OSError):
        """takes_room: None for memory that is mapped, where nothing fails. torn: writes one half."""
        self.count += 1
        hurts = {"full": takes_room, "read-only": takes_room is not None}.get(self.action, True)
        if not self.at or self.count < self.at or not hurts:
            return
        if torn and self.action in ("full", "kill torn"):
            torn()
        if self.action.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.ENOSPC if self.action == "full" else errno.EROFS
        text = os.strerror(number)
        if error is SafetensorError:
            raise SafetensorError(f"Error while serializing: I/O error: {text} (os error {number})")
        raise OSError(number, text)

    def wrap(self, owner, name, takes_room, tear=None, error=OSError):
        """Count the calls of owner.name; tear(real, *args) does one half of it."""
        real = getattr(owner, name)

        def call(*args, **kwargs):
            self.hit(takes_room, tear and (lambda: tear(real, *args, **kwargs)), error)
            return real(*args, **kwargs)
        setattr(owner, name, call)

    def install(self):
        def half_content(real, path, content, *args, **kwargs):
            real(path, content[:len(content) // 2], *args, **kwargs)

        def half_file(path, write):
            write()
            os.truncate(path, os.path.getsize(path) // 2)

        for name in ("fsync", "mkdir"):
            self.wrap(os, name, True)
        for name in ("replace", "rename", "unlink", "rmdir"):
            self.wrap(os, name, False)
        for name in ("write_text", "write_bytes"):
            self.wrap(Path, name, True, half_content)
        for module in (checkpoints, pretrained):
            self.wrap(module, "save_file", True, lambda real, tensors, path, *args, **kwargs: half_file(
                path, lambda: real(tensors, path, *args, **kwargs)), SafetensorError)
        self.wrap(reference, "save", True, lambda real, path, array: half_file(
            path, lambda: real(path, array)))
        self.wrap(reference.Memory, "write", None, lambda real, memory, numbers, values: real(
            memory, numbers[:1], values[:memory.ends[numbers[0]] - memory.starts[numbers[0]]]))
        folder.open = self.open

    def open(self, path, mode="r", **kwargs):
        """The log is appended to through this; half a line is what a kill or a full disk may leave."""
        f = open(path, mode, **kwargs)
        fault = self

        class File:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                f.close()

            def write(self, line):
                fault.hit(True, lambda: f.write(line[:len(line) // 2]))
                return f.write(line)
        return File()


# ---------------------------------------------------------------------------------------------------------
# Trials


class Wrong(Exception):
    """What a trial found."""


def start(place, flags, fault=None):
    """Fork a training run in a folder -> its pid. A run that exists goes on."""
    resume = ["--resume"] if (place / "dpo" / "run.json").exists() else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside the threads of a BLAS
        pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        out = os.open(place / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(place)
        if fault:
            fault.install()
        train.main(flags + resume)
        status = 0
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        if fault and not fault.at:
            with open("events", "w") as f:
                f.write(str(fault.count))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def new_folder(base):
    place = Path(tempfile.mkdtemp(dir=base))
    shutil.copy(base / "d.jsonl", place)
    return place


def output_of(place):
    return (place / "output").read_text(errors="replace")


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


def finish(place, flags, what):
    """Start again, unhurt: it must end with status 0."""
    status = wait(start(place, flags))
    if status:
        raise Wrong(f"{what}: started again, it ended with status {status}:\n{output_of(place)}")


def compare(place, good, what):
    result = ("model.safetensors", "config.json", "merges.txt")
    for name in [f"{run}/{file}" for run in ("sft", "dpo") for file in result] + ["dpo/reference-train.npy"]:
        if not (place / name).exists() or (place / name).read_bytes() != (good / name).read_bytes():
            raise Wrong(f"{what}: {name} is not the uninterrupted run's ({place})")
    if numbers(place) != numbers(good):
        raise Wrong(f"{what}: the log is not the uninterrupted run's ({place})")
    if left := [p for p in place.rglob("*") if p.suffix == ".part" or p.name.startswith(".tmp")]:
        raise Wrong(f"{what}: left behind: {left}")
    shutil.rmtree(place)


def check_message(place, status, what):
    """A run that could not write: one clear line and status 1 or 2."""
    text = output_of(place)
    last = [line for line in text.splitlines() if line.strip()][-1]
    if status not in (1, 2) or "Traceback" in text or not last.startswith("train.py:"):
        raise Wrong(f"{what}: status {status}\n{text}")
    if not ("No space left" in last or "Read-only" in last):
        raise Wrong(f"{what}: the last line does not say why: {last}")


def random_kills(base, good, flags, longest, at_most, chance):
    """kill -9 after random times, until the run ends or was killed so often -> how often."""
    place, kills = new_folder(base), 0
    while kills < at_most:
        pid = start(place, flags)
        time.sleep(chance.uniform(0.02, longest))
        os.kill(pid, signal.SIGKILL)
        status = wait(pid)
        if status == 0:
            break
        if status != -signal.SIGKILL:
            raise Wrong(f"after {kills} kills it ended with status {status}:\n{output_of(place)}")
        kills += 1
    finish(place, flags, f"after {kills} kills")
    compare(place, good, f"after {kills} kills")
    return kills


def fault_at(base, good, flags, at, action):
    """One fault at the at-th event -> False where the run did nothing there that this fault could hurt."""
    place, what = new_folder(base), f"{action} at event {at}"
    status = wait(start(place, flags, Fault(at, action)))
    if status not in (0, -signal.SIGKILL):
        check_message(place, status, what)
    if status == 0 and action.startswith("kill"):
        raise Wrong(f"{what}: not killed")
    finish(place, flags, what)
    compare(place, good, what)
    return status != 0


def small_disk(base, good, flags, kilobytes):
    """A real full disk: a tmpfs of that size, which then grows -> False where mounting is not allowed."""
    place, what = new_folder(base), f"a disk of {kilobytes} kB"
    disk = place / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return False
    try:
        flags = ["disk/dpo" if before == "--out_dir" else flag
                 for before, flag in zip(["", *flags], flags, strict=False)]
        status = wait(start(place, flags))
        if status:
            check_message(place, status, what)
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        if (disk / "dpo" / "run.json").exists():
            flags = [*flags, "--resume"]
        finish(place, flags, what)
        for name in ("sft", "dpo"):
            shutil.copytree(disk / name, place / name)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    disk.rmdir()
    compare(place, good, what)
    return True


def spread(events, count, offset=0):
    """`count` of the numbers 1 ... events, evenly spread."""
    return sorted({1 + (offset + i * events // count) % events for i in range(count)})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a sample of each kind, in seconds")
    parser.add_argument("--rounds", type=int, default=5, help="runs killed at random moments (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance, began = random.Random(options.seed), time.perf_counter()
    base = Path(tempfile.mkdtemp(prefix="kill-"))
    words = ["red", "a", "green tree", "blue.", "sky"]
    lines = [{"prompt": f"Q{i}?", "chosen": " ".join(chance.choices(words, k=3)) + "!",
              "rejected": " ".join(chance.choices(words, k=2))} for i in range(16)]  # 3 steps: 1.2 epochs
    (base / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    good = new_folder(base)
    if wait(start(good, SHORT_RUN, Fault(None, "count"))):
        sys.exit(f"the uninterrupted run failed:\n{output_of(good)}")
    events = int((good / "events").read_text())
    print(f"an uninterrupted run touches the disk {events} times")
    few = options.short
    try:
        points = spread(events, 6, options.seed) if few else range(1, events + 1)
        trials = [(at, action) for i, at in enumerate(points)
                  for action in (["kill", "kill torn"][i % 2:][:1] if few else ["kill", "kill torn"])]
        for at, action in trials:
            fault_at(base, good, SHORT_RUN, at, action)
        print(f"{len(trials)} kills at a write, rename, fsync, mkdir or unlink: the same bytes", flush=True)
        for action in ("full", "read-only"):
            points = spread(events, 2, 5 + options.seed) if few else range(1, events + 1)
            hurt = sum(fault_at(base, good, SHORT_RUN, at, action) for at in points)
            print(f"{hurt} faults ({action}): one clear line, then the same bytes", flush=True)
        sizes = (400,) if few else range(16, 1200, 24)
        mounted = sum(small_disk(base, good, SHORT_RUN, size) for size in sizes)
        print(f"{mounted} small disks" + (" (no permission to mount)" if not mounted else ""), flush=True)

        slow, clock = new_folder(base), time.perf_counter()
        flags = SHORT_RUN if few else LONG_RUN
        if wait(start(slow, flags)):
            sys.exit(f"the uninterrupted run failed:\n{output_of(slow)}")
        longest = (time.perf_counter() - clock) * (0.5 if few else 0.15)
        rounds, at_most = (1, 4) if few else (options.rounds, 20)
        kills = [random_kills(base, slow, flags, longest, at_most, chance) for _ in range(rounds)]
        print(f"{sum(kills)} kills at random moments ({' + '.join(map(str, kills))}): the same bytes")
    except Wrong as e:
        sys.exit(f"kill.py: {e}")
    shutil.rmtree(base)
    print(f"all survived, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
