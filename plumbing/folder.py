"""The folder of a run: lock, log, checkpoints. safetensors and JSON only.

    run.json            what the run is: config, identity (hashes of what determines its numbers), finished,
                        folder (where it was written: what lay beside it is found again after a move)
    log.jsonl           one record a line, the first says how to repeat the run
    checkpoints/        step-N.safetensors (weights, AdamW's moments) and step-N.json, the last two
    reference-train.npy what the reference says of each response token of the training pairs
    model.safetensors   the result, with config.json and the tokenizer: a Hugging Face folder

Every file is written aside, flushed to disk and renamed: a kill at any moment leaves the last good one.
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from losses import LOSSES, terms_of
from plumbing import checkpoints, machine, ranks, report, vocab
from plumbing.errors import ConfigError, RunError
from plumbing.files import read_json, write_atomically, write_folder, write_json, writing
from plumbing.pretrained import NAMES


def read_run(folder):
    """run.json of a folder."""
    path, kinds = Path(folder) / "run.json", {"config": dict, "identity": dict}
    try:
        run = read_json(path, [*kinds, "finished", "score_maximum"])
        for key, kind in kinds.items():
            if not isinstance(run[key], kind):
                raise ValueError(f"{key} is no object")
        if missing := {"loss", "steps", "beta", "ref"} - run["config"].keys():
            raise ValueError(f"config has no {', '.join(sorted(missing))}")
        for name in PATHS & run["config"].keys():
            run["config"][name] = found(run["config"][name], run.get("folder"), folder)
        return run
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; is {folder} the folder of a run?") from None
    except ValueError as e:
        raise ConfigError(f"{path}: damaged ({e}); start anew, with --overwrite or elsewhere") from None


PATHS = {"init", "ref", "data", "val_data", "tokenizer"}  # of Config, in full in run.json


def full(path):
    """A path, or some, in full; names of models and tokenizers as they are."""
    if isinstance(path, tuple):
        return [full(p) for p in path]
    return path if path in (None, *NAMES, "bytes") else str(Path(path).resolve())


def found(path, then, now):
    """A path of run.json; where nothing is there any more and the run's folder was moved from `then` to
    `now`, what lies as far from it as before."""
    if isinstance(path, list):
        return [found(p, then, now) for p in path]
    if isinstance(path, str) and isinstance(then, str) and os.path.isabs(path) and not os.path.exists(path):
        try:
            beside = os.path.normpath(os.path.join(now, os.path.relpath(path, then)))
        except ValueError:  # on another drive of Windows
            return path
        return beside if os.path.exists(beside) else path
    return path


# ---------------------------------------------------------------------------------------------------------
# Which run is it?

# What a run's numbers do not depend on: its length, its place, what is printed, how the work is cut.
FREE = {"init", "ref", "out_dir", "resume", "overwrite", "data", "val_data", "tokenizer", "steps",
        "micro_batch_size", "micro_batch_tokens", "sft_steps", "sft_lr", "eval_every", "save_every",
        "log_every", "device", "compile", "compile_head", "pack", "head_tokens"}


def identity_of(cfg, pairs, val, tokenizer, init_hash, ref_hash):
    """All that determines the numbers of a run but its length: what --resume and a reused SFT compare."""
    identity = {"format": 3} | {name: value for name, value in vars(cfg).items() if name not in FREE}
    identity["aspect_weights"] = list(cfg.aspect_weights)
    for name, part in (("data", pairs), ("val_data", val)):
        identity[name] = array_hash(*arrays_read(part, LOSSES[cfg.loss]))
    return identity | {"tokenizer": tokenizer.hash, "init": init_hash, "ref": ref_hash}


def arrays_read(pairs, loss):
    """The arrays of some Pairs, for SFT those of prompts and chosen responses."""
    if "rejected_logps" in terms_of(loss):
        return pairs.ids, pairs.segments, pairs.scores, pairs.rows
    ids = [pairs.ids[at:at + P + C] for at, P, C in pairs.rows[:, :3]]
    return np.concatenate(ids), pairs.rows[:, 1:3]


def array_hash(*arrays):
    """One hash of some NumPy arrays: their bytes, types and shapes."""
    h = hashlib.sha256()
    for a in arrays:
        h.update(f"{a.dtype} {a.shape} ".encode() + a.tobytes())
    return h.hexdigest()


def weights_hash(model):
    """One hash of a model's weights, whatever file they came from, without the rows that pad the table."""
    h = hashlib.sha256()
    for name, p in model.named_parameters():
        p = p[:model.config.vocab_size] if name == "wte.weight" else p
        h.update(name.encode() + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def find_sft(cfg, pairs, val, tokenizer):
    """The SFT run that a preference run starts from, in out/sft beside it, or sft-2, ...: the finished or
    interrupted one that was made with this Config, else the first free folder. Returns (cfg with its folder,
    True if it is finished)."""
    identity, beside = identity_of(cfg, pairs, val, tokenizer, None, None), Path(cfg.out_dir)
    for number in range(1, 10000):
        folder = beside.parent / ("sft" if number == 1 else f"sft-{number}")
        begun = (folder / "run.json").exists()
        if folder.resolve() == beside.resolve() or not begun and not is_free(folder):
            continue
        run = read_run(folder) if begun else None
        if not begun or run["identity"] == identity and run["config"]["steps"] == cfg.steps:
            finished = begun and run["finished"] is not None
            ranks.wait()  # all ranks have chosen before one writes
            return dataclasses.replace(cfg, out_dir=str(folder), resume=begun), finished


# ---------------------------------------------------------------------------------------------------------
# May this folder be written to?


def files_of(folder):
    """Names of the files in a folder, without what a run that was killed at its very start leaves."""
    return sorted(p.name for p in folder.glob("[!.]*") if p.is_file() and p.suffix != ".part")


def is_free(folder):
    """True if the folder is absent or empty."""
    return not folder.exists() or folder.is_dir() and not files_of(folder)


def check_free(folder, models, resume, overwrite):
    """Refuse a folder that holds something else, before any work. models: {flag: folder} that are read."""
    for flag, name in models.items():
        if name and Path(name).resolve() == folder.resolve():
            raise ConfigError(f"--out_dir {folder}: is --{flag} too and would be overwritten; choose another")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out_dir {folder}: is a file; choose a folder")
    if resume:
        return read_run(folder)
    kept = files_of(folder)
    if "run.json" in kept and not overwrite:
        raise ConfigError(f"--out_dir {folder}: holds a {read_run(folder)['config']['loss']} run; choose "
                          "--resume, --overwrite or another folder")
    if kept and "run.json" not in kept:
        raise ConfigError(f"--out_dir {folder}: holds {len(kept)} files ({kept[0]}, ...) and is no run's; "
                          "choose another folder")


RESULT = ("model.safetensors", "config.json", "tokenizer.tiktoken", *vocab.OF_TRANSFORMERS)


def remove_run(folder):
    """What a run wrote there, and nothing else. run.json goes last: until then it is a run's folder."""
    with writing(folder):
        for path in folder.glob("checkpoints/*"):
            path.unlink()
        for pattern in ("reference-*.npy", "reference-*.json", "log.jsonl", *RESULT, "run.json"):
            for path in folder.glob(pattern):
                path.unlink()


# ---------------------------------------------------------------------------------------------------------
# A run


class Run:
    """One run in its folder. It holds the folder's lock, catches SIGINT and SIGTERM, and decides by itself
    when to log, evaluate and save. Rank 0 alone writes."""

    def __init__(self, cfg, identity, start, ref, score_maximum, policy, pairs, val):
        self.cfg, self.identity, self.folder = cfg, identity, Path(cfg.out_dir)
        self.pairs, self.where = pairs, pairs.where
        config = dataclasses.asdict(cfg) | {"init": start, "ref": ref}
        config |= {name: full(config[name]) for name in PATHS}
        self.record = {"config": config, "identity": identity, "finished": None, "folder": full(cfg.out_dir),
                       "score_maximum": None if score_maximum is None else score_maximum.tolist()}
        self.about = report.header(cfg, policy, pairs, val)
        self.first, self.before, self.after = 0, None, None  # first: the step from which the run goes on
        self.stopped, self.noted = None, set()

    def __enter__(self):
        cfg, self.old_handlers, self.signals = self.cfg, {}, []
        self.lock = ranks.on_main(claim, self.folder, self.identity, cfg.resume, cfg.overwrite)
        try:
            check_shared(self.folder)
            self.finished = cfg.resume and read_run(self.folder)["finished"] == cfg.steps
            if self.finished:
                report.say(f"{self.folder}: finished at step {cfg.steps}; more --steps go on from there")
            elif not cfg.resume:
                write_json(self.folder / "run.json", self.record)
        except BaseException:
            self.__exit__()
            raise

        def note(number, frame):
            """The step ends first; a second signal kills."""
            self.signals.append(signal.Signals(number))
            signal.signal(number, self.old_handlers[number])

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.old_handlers[number] = signal.signal(number, note)
        return self

    def __exit__(self, *_):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        if self.lock:
            self.lock.release()

    def has_checkpoint(self):
        return self.cfg.resume and any(self.folder.glob("checkpoints/step-*.json"))

    def restore(self, policy, optimizer):
        """Load the newest intact checkpoint of a resumed run, and open the log."""
        state = checkpoints.load(self.folder, policy, optimizer, self.identity) if self.cfg.resume else None
        if state:
            self.first, self.before, self.after = state["step"], state["before"], state["after"]
        if self.first > self.cfg.steps:
            raise ConfigError(f"--steps {self.cfg.steps}: the run is at step {self.first} already; choose "
                              "more")
        if self.cfg.resume:  # now that nothing refuses it
            write_json(self.folder / "run.json", self.record)
        self.log_file = Log(self.folder / "log.jsonl", self.first,
                            self.record | {"resumed_at": self.first} | self.about)
        report.say(report.headline(self.cfg, self.about, self.first))
        self.clock, self.tokens = time.perf_counter(), []

    def steps(self):
        """The numbers of the steps to take; ends early after a signal."""
        for i in report.bar(range(self.first + 1, self.cfg.steps + 1), self.cfg.loss, self.cfg.steps,
                            initial=self.first, unit=" steps"):
            yield i
            if self.stopped and i < self.cfg.steps:
                report.stopped(self.stopped, i, self.cfg)
                raise SystemExit(128 + self.stopped)

    def is_last(self, step):
        return step == self.cfg.steps or self.stopped is not None

    def check(self, step, index, terms, norm):
        """Raise RunError, naming the pairs, where the loss or the gradient is not finite."""
        norm, total = ranks.whole(norm), terms["loss"].sum()
        if not math.isfinite((norm + total).item()):  # the step's one wait for the device
            bad = terms["pair"][~terms["loss"].isfinite()] if not total.isfinite() else terms["pair"]
            raise RunError(report.unhealthy_step(step, terms, norm, [self.where[int(i)] for i in bad]))
        self.tokens.append(self.pairs.lengths[index].sum())

    def log(self, step, numbers, metrics, *args):
        """Write and print a log line with metrics(*args), where one is due."""
        if step % self.cfg.log_every and step not in (1, self.cfg.steps):
            return
        seconds, tokens = time.perf_counter() - self.clock, int(sum(self.tokens))
        m = metrics(*args) | {name: float(ranks.whole(x)) if torch.is_tensor(x) else x
                              for name, x in numbers.items()}
        m["pairs_per_s"] = len(self.tokens) * self.cfg.batch_size / seconds
        m["tokens_per_s"] = tokens / seconds
        m["peak_memory"] = machine.peak_memory(self.cfg.device)
        self.log_file.write({"step": step} | {name: x for name, x in m.items() if not math.isnan(x)})
        report.say(report.line_of(step, m))
        for name, text in report.alarms(step, m).items():
            if name not in self.noted:  # once a run: an alarm does not pass by itself
                report.say(f"  {text}")
                self.log_file.write({"step": step, "note": text})
                self.noted.add(name)
        self.clock, self.tokens = time.perf_counter(), []

    def evaluate(self, step, evaluation, *args):
        """Call evaluation(*args) where one is due, log it, and print what its numbers mean."""
        if step == self.first:
            if self.before is None:
                self.before = evaluation(*args)
                self.log_file.write({"step": step} | {f"eval/{name}": x for name, x in self.before.items()})
            self.clock = time.perf_counter()
            return
        self.stopped = ranks.agree(self.signals)
        if not self.is_last(step) and (not self.cfg.eval_every or step % self.cfg.eval_every):
            return
        began = time.perf_counter()
        self.after = evaluation(*args)
        self.log_file.write({"step": step} | {f"eval/{name}": x for name, x in self.after.items()})
        if not math.isfinite(self.after["loss"]):
            raise RunError(f"step {step}: the held-out loss is {self.after['loss']} after the update; not "
                           "saved, the checkpoints are intact; is --lr far too large?")
        if "rewards/accuracies" in self.after:
            report.say(report.held_out_line(step, self.after, self.cfg))
        self.clock += time.perf_counter() - began

    def save(self, step, policy, optimizer):
        """Write a checkpoint where one is due."""
        if self.is_last(step) or self.cfg.save_every and step % self.cfg.save_every == 0:
            began = time.perf_counter()
            checkpoints.save(self.folder, step, policy, optimizer, self.identity,
                            {"before": self.before, "after": self.after})
            self.clock += time.perf_counter() - began

    def finish(self, policy, tokenizer):
        """Write the trained model and its tokenizer; the run is then finished."""
        def write_result(aside):
            policy.save_pretrained(aside, eos=tokenizer.eot)
            of_start = self.cfg.init and getattr(tokenizer, "name", None) == str(self.cfg.init)
            if not (of_start and vocab.copy(self.cfg.init, aside)):
                tokenizer.save(aside)

        ranks.unshard(policy)
        write_folder(self.folder, write_result)
        write_json(self.folder / "run.json", self.record | {"finished": self.cfg.steps})
        ranks.wait()  # the files are there before another rank reads them


def claim(folder, identity, resume, overwrite):
    """Make the folder, lock it against a second writer until the returned lock is released, and compare what
    the run is with what it was."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(f"--out_dir {folder}: another process is writing there; choose another") from None
    except OSError as e:
        raise ConfigError(f"--out_dir {folder}: {e.strerror}; choose a folder that can be written") from None
    try:
        check_free(folder, {}, resume, overwrite)  # again: another process may have been there meanwhile
        if resume:
            then = read_run(folder)["identity"]
            differs = [f"{key} was {then.get(key)!r:.40}, is {value!r:.40}"
                       for key, value in identity.items() if then.get(key) != value]
            if differs:
                raise ConfigError(f"--resume: not the run in {folder}: " + "; ".join(differs))
        elif overwrite:
            remove_run(folder)
        return lock
    except BaseException:
        lock.release()
        raise


PATIENCE = 60  # seconds after which what rank 0 wrote must have come through a network's file system


def check_shared(folder):
    """Raise ConfigError where rank 0's folder is not that of the other ranks, on another machine: they read
    checkpoints and the reference's numbers there."""
    if ranks.world() == 1:
        return
    path, number = folder / ".ranks", ranks.largest(0 if ranks.rank() else time.time_ns())
    ranks.on_main(write_json, path, number)

    def is_seen():
        try:
            return path.read_text(encoding="utf-8") == f"{number}\n"
        except OSError:
            return False

    end = time.monotonic() + PATIENCE
    while not is_seen() and time.monotonic() < end:
        time.sleep(0.1)
    missed = ranks.any_of(not is_seen())
    ranks.only_main(path.unlink)()
    if missed:
        raise ConfigError(f"--out_dir {folder}: another machine does not see what rank 0 writes there; "
                          "choose a folder that all machines share")


class Log:
    """log.jsonl: what was logged after the step from which a run goes on is dropped."""

    @ranks.only_main
    def __init__(self, path, step, header):
        kept = []
        for line in path.read_bytes().splitlines(True) if path.exists() and step else []:
            try:
                if not line.endswith(b"\n") or json.loads(line).get("step", 0) > step:
                    continue
            except (ValueError, TypeError, AttributeError, RecursionError):
                continue  # a line that a kill cut short
            kept.append(line)
        write_atomically(path, lambda part: part.write_bytes(b"".join(kept)))
        self.path = path
        self.write(header)

    @ranks.only_main
    def write(self, record):
        line = json.dumps(record).encode() + b"\n"
        with writing(self.path), open(self.path, "ab", buffering=0) as f:
            if f.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
