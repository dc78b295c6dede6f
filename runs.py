"""The folder of a run: lock, log, checkpoints. safetensors and JSON only; imports only ranks of ours.

    run.json            what the run is: config, identity (hashes of what determines its numbers), finished
    log.jsonl           one record a line, the first says how to repeat the run
    checkpoints/        step-N.safetensors (weights, AdamW's moments) and step-N.json, the last two
    reference-*.npy     what the reference says of each response token; data/: large data, tokenised
    model.safetensors   the result, with config.json and the tokenizer: a Hugging Face folder

Every file is written aside, flushed to disk and renamed: a kill at any moment leaves the last good one.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import ranks


class ConfigError(ValueError):
    """A flag or folder that cannot be served: the message names it and says what to do."""


class RunError(RuntimeError):
    """The run cannot go on; what was saved before is intact."""


def check_device(name):
    """Refuse a --device that is none, or not here."""
    if not (match := re.fullmatch(r"cpu|cuda(?::(\d{1,9}))?", name)):
        raise ConfigError(f"--device {name}: choose cpu, cuda or cuda:N")
    if name != "cpu" and int(match[1] or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: no GPU that torch can use here; choose cpu")


@contextmanager
def writing(path):
    """A full disk or a read-only folder is a RunError, whoever finds it."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        why = getattr(e, "strerror", None) or e
        raise RunError(f"{path}: cannot be written ({why}); what was saved before is intact, "
                       "--resume goes on from there") from None


def part_of(path):
    return path.with_name(path.name + ".part")


@ranks.only_main
def write_atomically(path, write):
    """Call write(temporary path), flush what it wrote to disk, and rename."""
    part = part_of(path)
    with writing(path):
        try:
            write(part)
            with open(part, "rb") as f:
                os.fsync(f.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)  # on a full disk it would take the room that others need
            raise
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@ranks.only_main
def write_folder(folder, write):
    """Call write(an empty folder aside), then move the files that it wrote into place, one by one."""
    aside = folder / "result.part"
    with writing(aside):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            write(aside)
            for path in sorted(aside.iterdir()):
                write_atomically(folder / path.name, path.rename)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def write_json(path, value):
    write_atomically(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


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


def read_json(path, keys):
    """An object that has these keys. ValueError for anything else, OSError where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict) or not value.keys() >= set(keys):
        raise ValueError(f"needs an object with {', '.join(keys)}")
    return value


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
        return run
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; is {folder} the folder of a run?") from None
    except ValueError as e:
        raise ConfigError(f"{path}: damaged ({e}); start anew, with --overwrite or elsewhere") from None


def files_of(folder):
    """Names of the files in a folder, without what a run that was killed at its very start leaves."""
    return sorted(p.name for p in folder.glob("[!.]*") if p.is_file() and p.suffix != ".part")


def is_free(folder):
    """May a run begin there without a word?"""
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


@ranks.only_main
def claim(folder, identity, resume, overwrite):
    """Make the folder, lock it against a second writer (as long as the returned file is open), and compare
    what the run is with what it was."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as e:
        raise ConfigError(f"--out_dir {folder}: {e.strerror}; choose a folder that can be written") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    except BlockingIOError:
        lock.close()
        raise ConfigError(f"--out_dir {folder}: another process is writing there; choose another") from None
    except BaseException:
        lock.close()
        raise


RESULT = ("model.safetensors", "config.json", "vocab.json", "merges.txt", "tokenizer_config.json",
          "tokenizer.tiktoken")


def remove_run(folder):
    """What a run wrote there, and nothing else. run.json goes last: until then it is a run's folder."""
    with writing(folder):
        for path in folder.glob("checkpoints/*"):
            path.unlink()
        for pattern in ("reference-*.npy", "reference-*.json", "log.jsonl", *RESULT, "run.json"):
            for path in folder.glob(pattern):
                path.unlink()


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


MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of each parameter


def key_of(state):
    """The hash of a checkpoint's JSON without that hash: one byte edited there is noticed too."""
    return hashlib.sha256(json.dumps({**state, "key": None}, sort_keys=True).encode()).hexdigest()


def save_checkpoint(folder, step, model, optimizer, identity, state):
    """Weights and moments, then the JSON with their hash, which makes the checkpoint valid; keeps two."""
    folder, tensors = folder / "checkpoints", {}
    for name, p in model.named_parameters():
        values = {"model": p.detach()} | optimizer.state[p]
        for key, value in values.items():
            value = ranks.whole(value)  # all ranks take part, rank 0 keeps it
            if not ranks.rank():
                tensors[f"{key}.{name}"] = value.cpu().contiguous()
    if ranks.rank():
        return
    weights = folder / f"step-{step:07}.safetensors"
    with writing(folder):
        folder.mkdir(exist_ok=True)
        write_atomically(weights, lambda part: save_file(tensors, part))
        state = {"step": step, "sha256": file_hash(weights), "identity": identity, **state}
        write_json(weights.with_suffix(".json"), state | {"key": key_of(state)})
        keep = sorted(path.stem for path in folder.glob("step-*.json") if path.stem <= weights.stem)[-2:]
        for old in sorted([*folder.glob("step-*"), *folder.glob(".tmp*")]):  # what a kill left included
            if old.name.split(".")[0] not in keep:
                old.unlink()


def load_checkpoint(folder, model, optimizer, identity, say):
    """Restore the newest intact checkpoint and return its JSON; None where none was written yet."""
    paths = sorted(folder.glob("checkpoints/step-*.json"), reverse=True)
    for path in paths:
        try:
            state, tensors = read_checkpoint(path, model, identity)
        except ConfigError as e:
            say(f"{e}; looking for an older checkpoint")
            continue
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(ranks.like(p, tensors[f"model.{name}"]))
                optimizer.state[p] = {key: ranks.like(p, tensors[f"{key}.{name}"]) for key in MOMENTS}
        optimizer.load_state_dict(optimizer.state_dict())  # moves the moments to where their weights are
        return state
    if paths:
        raise ConfigError(f"--resume: no checkpoint in {folder} is intact; --overwrite starts anew")
    return None


def read_checkpoint(path, model, identity):
    """step-N.json and its step-N.safetensors -> (JSON, tensors). ConfigError for anything but what this run
    wrote."""
    weights = path.with_suffix(".safetensors")
    try:
        state = read_json(path, ("step", "sha256", "identity", "key"))
        if state["key"] != key_of(state):
            raise ValueError("edited since it was written")
        if state["identity"] != identity:
            raise ValueError("of another run")
        if state["sha256"] != file_hash(weights):
            raise ValueError(f"{weights.name} is cut short or edited")
        with safe_open(weights, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
        for name, p in model.named_parameters():
            for key in ("model", *MOMENTS[1:]):
                if tensors[f"{key}.{name}"].shape != p.shape:
                    raise ValueError(f"{key}.{name} has another shape")
            tensors[f"step.{name}"]
        return state, tensors
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        raise ConfigError(f"{path}: skipped ({e})") from None
