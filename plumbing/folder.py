"""The folder of a run (README.md says what each file holds): claimed, resumed, logged, saved, finished."""

import dataclasses
import hashlib
import json
import math
import signal
import threading
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from losses import LOSSES, terms_of
from model import GPT
from plumbing import checkpoints, machine, pretrained, ranks, report, vocab
from plumbing.errors import ConfigError, ModelError, RunError
from plumbing.files import write_atomically, write_json, writing
from plumbing.pairs import some

PATHS = ("init", "ref", "data", "val_data", "tokenizer")  # of Config, in full in run.json
# What a run's numbers do not depend on: its length, its place, what is printed, how the work is cut.
FREE = {*PATHS, "out_dir", "resume", "overwrite", "settings", "steps", "micro_batch_size",
        "micro_batch_tokens", "sft_steps", "sft_lr", "eval_every", "save_every", "log_every", "device",
        "compile", "compile_head", "head_tokens"}
WRITTEN = ("checkpoints/*", "reference-train.*", "log.jsonl", "model*.safetensors*", "config.json",
           "generation_config.json", *vocab.OF_TRANSFORMERS, "run.json")  # until the last it is a run

def read_run(folder):
    """run.json of a folder."""
    path = Path(folder) / "run.json"
    try:
        run = json.loads(path.read_bytes())
        if missing := {"config", "identity", "saved", "finished"} - run.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
        return run
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; is {folder} the folder of a run?") from None
    except (ValueError, AttributeError, RecursionError) as e:
        raise ConfigError(f"{path}: damaged ({e}); start anew, with --overwrite or elsewhere") from None

def full(path):
    """A path, or some, in full; names of models and tokenizers as they are."""
    if isinstance(path, tuple):
        return [full(p) for p in path]
    is_name = path in (None, *pretrained.NAMES, "bytes") or not Path(path).exists()  # of a model hub, say
    return path if is_name else str(Path(path).resolve())

def open_model(name, vocab_multiple=1):
    """The GPT of a folder or a name. ModelError for a run that is not finished: what lies there may be the
    model of an earlier end."""
    run = read_run(name) if Path(name, "run.json").exists() else None
    if run and run["finished"] is None:
        step = run["saved"]
        end = f", or end it after step {step}: --resume --steps {step} --out_dir {name}" if step else ""
        raise ModelError(f"{name}: this run is not finished; go on with it{end}")
    return GPT.from_pretrained(name, vocab_multiple)

# ---- Which run is it? ----
def identity_of(cfg, pairs, val, tokenizer, policy, reference):
    """All that determines the numbers of a run but its length: what --resume and a reused SFT compare. Policy
    and reference are those of the start, or None where they follow from the rest."""
    fields = ["prompt", "chosen"]
    if "rejected_logps" in terms_of(LOSSES[cfg.loss]):
        fields += ["rejected", "chosen_segment", "rejected_segment", "chosen_scores", "rejected_scores"]
    identity = {name: value for name, value in vars(cfg).items() if name not in FREE} | cfg.settings
    return identity | {"aspect_weights": list(cfg.aspect_weights), "tokenizer": tokenizer.hash,
                       "data": hashlib.sha256(b"".join(pairs.hashes(*fields))).hexdigest(),
                       "val_data": hashlib.sha256(b"".join(val.hashes(*fields))).hexdigest(),
                       "init": policy and weights_hash(policy), "ref": reference and weights_hash(reference)}

def weights_hash(model):
    """One hash of a model's weights, whatever file they came from, without the rows that pad the table."""
    h = hashlib.sha256()
    for name, p in model.named_parameters():
        p = p[:model.config.vocab_size] if name == "wte.weight" else p
        h.update(name.encode() + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()

def check_identity(folder, then, now):
    """Refuse to go on with a run as another one, naming the flags that differ."""
    others = {"data": "pairs", "val_data": "pairs", "init": "model", "ref": "model", "tokenizer": "tokenizer"}
    differs = [f"--{key}: other {others[key]} than the run's" if key in others else
               f"--{key} {value}: the run has {then.get(key)}"
               for key, value in now.items() if then.get(key) != value]
    if differs:
        raise ConfigError(f"--resume: not the run in {folder}. " + "; ".join(differs))

def place_of_sft(cfg, pairs, val, tokenizer):
    """The SFT run that makes the start of a preference run, in out/sft beside it, or in out/sft-HASH where
    that holds another, found again by later runs: (cfg with its folder, True if it is finished)."""
    identity, beside = identity_of(cfg, pairs, val, tokenizer, None, None), Path(cfg.out_dir)
    name = hashlib.sha256(json.dumps([identity, cfg.steps], sort_keys=True).encode()).hexdigest()[:8]
    for folder in (beside.with_name("sft"), beside.with_name(f"sft-{name}")):
        run = read_run(folder) if (folder / "run.json").exists() else None
        same = run and (run["identity"], run["config"]["steps"]) == (identity, cfg.steps)
        if folder.resolve() != beside.resolve() and (same or not files_of(folder)):
            break
    ranks.wait()  # all ranks have chosen before one writes
    finished = run and run["finished"] is not None
    return dataclasses.replace(cfg, out_dir=str(folder), resume=bool(run)), finished

# ---- May this folder be written to? ----
def files_of(folder):
    """Names of the files in a folder, without what a run that was killed at its very start leaves."""
    inside = folder.iterdir() if folder.is_dir() else [folder] * folder.exists()
    return sorted(p.name for p in inside if p.is_file() and p.name[0] != "." and p.suffix != ".part")

def check_free(folder, resume, overwrite):
    """Refuse a folder that holds something else, before any work."""
    kept, why = files_of(folder), None
    if folder.is_file():
        why = "is a file; choose a folder"
    elif resume:
        read_run(folder)
    elif kept and "run.json" not in kept:
        why = f"holds {len(kept)} files ({kept[0]}, ...) and is no run's; choose another folder"
    elif kept and not overwrite:
        loss = read_run(folder)["config"]["loss"]
        why = f"holds a {loss} run; choose --resume, --overwrite or another folder"
    if why:
        raise ConfigError(f"--out_dir {folder}: {why}")

def claim(folder, record, resume, overwrite):
    """Make the folder of a run and lock it against a second writer; write its run.json, or compare what the
    run is with what it was. Returns the lock."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ConfigError(f"--out_dir {folder}: another process is writing there; choose another") from None
    except OSError as e:
        raise ConfigError(f"--out_dir {folder}: {e.strerror}; choose a folder that can be written") from None
    try:
        check_free(folder, resume, overwrite)  # again: another process may have been there meanwhile
        if resume:
            check_identity(folder, read_run(folder)["identity"], record["identity"])
            return lock
        with writing(folder):  # --overwrite removes what a run wrote there, and nothing else
            for path in (path for pattern in WRITTEN * overwrite for path in folder.glob(pattern)):
                path.unlink()
        write_json(folder / "run.json", record)
        return lock
    except BaseException:
        lock.release()
        raise

# ---- A run ----
class Run:
    """One run in its folder. It holds the folder's lock, catches SIGINT and SIGTERM, and decides by itself
    when to log, evaluate and save. Rank 0 alone writes."""

    def __init__(self, cfg, identity, policy, tokenizer, pairs, val, score_maximum):
        self.cfg, self.identity, self.folder = cfg, identity, Path(cfg.out_dir)
        self.tokenizer, self.pairs, self.val = tokenizer, pairs, val
        config = dataclasses.asdict(cfg)
        config |= config.pop("settings") | {"ref": identity["ref"] and (cfg.ref or cfg.init)}
        self.record = {"config": config | {name: full(config[name]) for name in PATHS}, "identity": identity,
                       "saved": 0, "finished": None,
                       "score_maximum": None if score_maximum is None else score_maximum.tolist()}
        self.about = report.header(cfg, policy, pairs, val)
        self.first, self.before, self.after = 0, None, None  # first: the step from which the run goes on
        self.stopped, self.signals, self.handlers = None, [], {}

    def __enter__(self):
        self.lock = ranks.on_main(claim, self.folder, self.record, self.cfg.resume, self.cfg.overwrite)
        self.finished = read_run(self.folder)["finished"] == self.cfg.steps

        def note(number, frame):
            """The step ends first; a second signal kills."""
            self.signals.append(signal.Signals(number))
            signal.signal(number, self.handlers[number])

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, note)
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.lock:
            self.lock.release()

    def restore(self, policy, optimizer):
        """Load the newest checkpoint of a resumed run, and open the log."""
        cfg, folder = self.cfg, self.folder
        if cfg.resume and (read_run(folder)["saved"] or checkpoints.paths_of(folder)):
            self.first, state = checkpoints.load(folder, policy, optimizer)
            self.before = state["before"]
            if self.first > cfg.steps:
                raise ConfigError(f"--steps {cfg.steps}: the run is at step {self.first} already")
        elif cfg.resume:
            report.say(f"{folder}: nothing was saved before the interruption; the run begins again")
        self.record["saved"] = self.first
        write_json(folder / "run.json", self.record)  # now that nothing refuses it
        self.log_file = Log(folder / "log.jsonl", self.first,
                            self.record | {"resumed_at": self.first} | self.about)
        report.say(report.headline(cfg, self.about, self.first))
        self.clock, self.tokens = time.perf_counter(), []

    @ranks.only_main
    def describe(self, policy):
        """Write config.json and the tokenizer; before the run too, for what cannot be written shows then."""
        with writing(self.folder):
            if isinstance(policy, GPT):
                pretrained.write_config(policy, self.folder, self.tokenizer.eot)
                if self.cfg.init and pretrained.carry_over(self.cfg.init, self.folder):
                    return
            self.tokenizer.save(self.folder)

    def steps(self):
        """The numbers of the steps to take; ends early after a signal."""
        steps = range(self.first + 1, self.cfg.steps + 1)
        for i in report.bar(steps, self.cfg.loss, self.cfg.steps, initial=self.first, unit=" steps"):
            yield i
            if self.stopped and i < self.cfg.steps:
                report.stopped(self.stopped, i, self.cfg)
                raise SystemExit(128 + self.stopped)

    def check(self, step, index, terms, norm):
        """Raise RunError, naming the pairs, where the loss or the gradient is not finite."""
        norm, total = ranks.whole(norm), terms["loss"].sum()
        if not math.isfinite((norm + total).item()):  # the step's one wait for the device
            bad = terms["pair"][~terms["loss"].isfinite()] if not total.isfinite() else terms["pair"]
            where = some([self.pairs.where[int(i)] for i in bad], "", 8)
            raise RunError(f"step {step}: mean loss {terms['loss'].mean().item():g}, gradient norm "
                           f"{norm.item():g}; stopped before the update. Pairs: {where}")
        self.tokens.append(self.pairs.lengths[index].sum())

    def log(self, step, numbers, metrics, *args):
        """Write and print a log line with metrics(*args), where one is due."""
        if step % self.cfg.log_every and step not in (1, self.cfg.steps):
            return
        seconds = time.perf_counter() - self.clock
        m = metrics(*args) | {name: float(ranks.whole(x)) for name, x in numbers.items()}
        m["pairs_per_s"] = len(self.tokens) * self.cfg.batch_size / seconds
        m["tokens_per_s"] = int(sum(self.tokens)) / seconds
        m["peak_memory"] = machine.peak_memory(self.cfg.device)
        self.log_file.write({"step": step} | {name: x for name, x in m.items() if not math.isnan(x)})
        report.say(report.line_of(step, m))
        self.clock, self.tokens = time.perf_counter(), []

    def save(self, step, policy, optimizer):
        """Write a checkpoint where one is due; after a signal, at once."""
        number = ranks.any_of(int(self.signals[0]) if self.signals else 0)  # all ranks stop in one step
        self.stopped = signal.Signals(number) if number else None
        if step == self.cfg.steps or self.stopped or self.cfg.save_every and step % self.cfg.save_every == 0:
            began = time.perf_counter()
            checkpoints.save(self.folder, step, policy, optimizer, {"before": self.before})
            self.record["saved"] = step
            write_json(self.folder / "run.json", self.record)
            self.clock += time.perf_counter() - began

    def evaluate(self, step, evaluation, *args):
        """Call evaluation(*args) where one is due, log it, and print what its numbers mean."""
        due = step in (0, self.cfg.steps) or self.cfg.eval_every and step % self.cfg.eval_every == 0
        if not (due or self.stopped):
            return
        began = time.perf_counter()
        found = evaluation(*args)
        self.log_file.write({"step": step} | {f"eval/{name}": x for name, x in found.items()})
        if not math.isfinite(found["loss"]):
            raise RunError(f"step {step}: the held-out loss is {found['loss']}"
                           + "; is --lr far too large?" * bool(step))
        if step:
            self.after = found
            if "rewards/accuracies" in found:
                report.say(report.held_out_line(found, self.val.rows["C"].mean()))
        else:
            self.before = found
            if self.identity["ref"] and self.identity["ref"] == self.identity["init"]:
                report.check_start(found, self.cfg)
        self.clock += time.perf_counter() - began

    def finish(self, policy, reference):
        """Write the trained model and its tokenizer; the run is then finished. Both models become whole."""
        for model in filter(None, (policy, reference)):
            ranks.unshard(model)
        with writing(self.folder):
            ranks.only_main(policy.save_pretrained)(self.folder, self.tokenizer.eot)
        self.describe(policy)
        write_json(self.folder / "run.json", self.record | {"finished": self.cfg.steps})
        ranks.wait()  # the files are there before another rank reads them

class Log:
    """log.jsonl, without what was logged after the step from which a run goes on; evaluations of that step
    are made again where they are due."""

    @ranks.only_main
    def __init__(self, path, step, header):
        kept = []
        for line in path.read_bytes().splitlines(True) if path.exists() and step else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # a line that a kill cut short
            if record.get("step", 0) < step or record.get("step") == step and "eval/loss" not in record:
                kept.append(line.rstrip(b"\n") + b"\n")
        self.path = path
        write_atomically(path, lambda part: part.write_bytes(b"".join(kept)))
        self.write(header)

    @ranks.only_main
    def write(self, record):
        with writing(self.path), open(self.path, "ab") as f:
            f.write(json.dumps(record).encode() + b"\n")
