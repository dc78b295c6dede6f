"""The folder of a run: lock, log, checkpoints. safetensors and JSON only; imports nothing of ours.

    run.json            what the run is: config, identity (hashes of what determines its numbers), finished
    log.jsonl           one record a line, the first says how to repeat the run
    checkpoints/        step-N.safetensors (weights, AdamW's moments) and step-N.json, the last two
    reference-*.npy     what the reference says of each response token; data/: large data, tokenised
    model.safetensors   the result, with config.json and the tokenizer: a Hugging Face folder

Every file is written aside, flushed to disk and renamed: a kill at any moment leaves the last good one.
"""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class ConfigError(ValueError):
    """A flag or folder that cannot be served: the message names it and says what to do."""


def write_atomically(path, write):
    """Call write(temporary path), flush what it wrote to disk, and rename."""
    part = path.with_name(path.name + ".part")
    write(part)
    with open(part, "rb") as f:
        os.fsync(f.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself must reach the disk too
    os.fsync(folder)
    os.close(folder)


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
    """One hash of a model's weights, whatever file they came from."""
    h = hashlib.sha256()
    for name, p in model.named_parameters():
        h.update(name.encode() + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def read_run(folder):
    """run.json of a folder."""
    path = Path(folder) / "run.json"
    try:
        run = json.loads(path.read_text())
        return {key: run[key] for key in ("config", "identity", "finished", "score_maximum")}
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}; is {folder} the folder of a run?") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path}: damaged ({type(e).__name__}: {e})") from None


def check_free(folder, models, resume, overwrite):
    """Refuse a folder that holds something else, before any work. models: {flag: folder} that are read."""
    for flag, name in models.items():
        if name and Path(name).resolve() == folder.resolve():
            raise ConfigError(f"--out_dir {folder}: is --{flag} too and would be overwritten; choose another")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out_dir {folder}: is a file; choose a folder")
    if resume:
        return read_run(folder)
    kept = sorted(p.name for p in folder.glob("*") if p.is_file() and p.name != ".lock")
    if kept and not overwrite:
        loss = f"a {read_run(folder)['config']['loss']} run" if "run.json" in kept else f"{len(kept)} files"
        raise ConfigError(f"--out_dir {folder}: holds {loss} ({kept[0]}, ...); choose --resume, --overwrite "
                          "or another folder")


def claim(folder, identity, resume, overwrite):
    """Make the folder, lock it against a second writer (as long as the returned file is open), and compare
    what the run is with what it was."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"--out_dir {folder}: another process is writing there; choose another") from None
    except OSError as e:
        raise ConfigError(f"--out_dir {folder}: {e.strerror}; choose a folder that can be written") from None
    if resume:
        then = read_run(folder)["identity"]
        differs = [f"{key} was {then.get(key)!r:.40}, is {value!r:.40}"
                   for key, value in identity.items() if then.get(key) != value]
        if differs:
            raise ConfigError(f"--resume: not the run in {folder}: " + "; ".join(differs))
    elif overwrite:
        for name in ("run.json", "log.jsonl", "model.safetensors", "config.json"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return lock


class Log:
    """log.jsonl: what was logged after the step from which a run goes on is dropped."""

    def __init__(self, path, step, header):
        kept = []
        for line in path.read_text().splitlines() if path.exists() and step else []:
            try:
                kept += [line] if json.loads(line).get("step", 0) <= step else []
            except ValueError:
                break  # a line that a kill cut short
        path.write_text("".join(line + "\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8")
        self.write(header)

    def write(self, record):
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self):
        self.file.close()


def save_checkpoint(folder, step, model, optimizer, state):
    """Weights and moments, then the JSON with their hash, which makes the checkpoint valid; keeps two."""
    folder = folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, p in model.named_parameters():
        values = {"model": p.detach()} | optimizer.state[p]
        tensors |= {f"{key}.{name}": value.contiguous() for key, value in values.items()}
    weights = folder / f"step-{step:07}.safetensors"
    write_atomically(weights, lambda part: save_file(tensors, part))
    write_json(weights.with_suffix(".json"), {"step": step, "sha256": file_hash(weights), **state})
    for old in sorted(folder.glob("step-*.json"))[:-2]:
        old.unlink()
        old.with_suffix(".safetensors").unlink()


def load_checkpoint(folder, model, optimizer, say):
    """Restore the newest intact checkpoint and return its JSON; None where there is none."""
    for path in sorted(folder.glob("checkpoints/step-*.json"), reverse=True):
        weights = path.with_suffix(".safetensors")
        try:
            state = json.loads(path.read_text())
            if file_hash(weights) != state["sha256"]:
                raise ValueError("its content is not what was written")
            with safe_open(weights, "pt") as f, torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(f.get_tensor(f"model.{name}"))
                    keys = ("step", "exp_avg", "exp_avg_sq")
                    optimizer.state[p] = {key: f.get_tensor(f"{key}.{name}") for key in keys}
            optimizer.load_state_dict(optimizer.state_dict())  # moves the moments to where their weights are
            return state
        except (OSError, ValueError, KeyError, SafetensorError) as e:
            say(f"{path}: skipped, {e}; looking for an older checkpoint")
    return None
