"""Checkpoints: weights and AdamW's moments in safetensors, the rest in JSON; valid when both are whole."""

import hashlib
import json

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing import ranks, report
from plumbing.errors import ConfigError
from plumbing.files import file_hash, read_json, write_atomically, write_json, writing

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of each parameter


def key_of(state):
    """The hash of a checkpoint's JSON without that hash: one byte edited there is noticed too."""
    return hashlib.sha256(json.dumps({**state, "key": None}, sort_keys=True).encode()).hexdigest()


def save(folder, step, model, optimizer, identity, state):
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


def load(folder, model, optimizer, identity):
    """Restore the newest intact checkpoint and return its JSON; None where none was written yet."""
    paths = sorted(folder.glob("checkpoints/step-*.json"), reverse=True)
    for path in paths:
        try:
            state, tensors = read(path, model, identity)
        except ConfigError as e:
            report.say(f"{e}; looking for an older checkpoint")
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


def read(path, model, identity):
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
