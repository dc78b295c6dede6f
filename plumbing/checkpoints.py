"""Checkpoints: weights, AdamW's moments and what the run knows, in one safetensors file."""

import json

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing import ranks, report
from plumbing.errors import ConfigError, RunError
from plumbing.files import write_atomically, writing

def paths_of(folder):
    """The checkpoints in a run's folder, the newest first."""
    return sorted(folder.glob("checkpoints/step-*.safetensors"), reverse=True)

def save(folder, step, model, optimizer, state):
    """Write a step's checkpoint, keep the last two. A parameter that never had a gradient has no moments."""
    tensors = {}
    for name, p in model.named_parameters():
        for key, value in ({"model": p.detach()} | optimizer.state.get(p, {})).items():
            value = ranks.whole(value)  # all ranks take part, rank 0 keeps it
            if key == "model" and not value.isfinite().all():
                raise RunError(f"step {step}: {name} holds NaN or infinity after the update; not saved. "
                               "Is --lr far too large?")
            if not ranks.rank():
                tensors[f"{key}.{name}"] = value.cpu().contiguous()
    if ranks.rank():
        return
    path = folder / "checkpoints" / f"step-{step:07}.safetensors"
    with writing(folder):
        path.parent.mkdir(exist_ok=True)
        metadata = {"step": str(step), "state": json.dumps(state)}
        write_atomically(path, lambda part: save_file(tensors, part, metadata))
        kept = [other for other in paths_of(folder) if other <= path][:2]
        for other in set(path.parent.iterdir()) - set(kept):  # what a kill left aside included
            other.unlink()

def newest(folder):
    """(step, state, tensors by name) of the newest checkpoint that is whole. ConfigError for none."""
    for path in paths_of(folder):
        try:
            with safe_open(path, "pt") as f:
                metadata = f.metadata()
                tensors = {name: f.get_tensor(name) for name in f.keys()}
                return int(metadata["step"]), json.loads(metadata["state"]), tensors
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
            report.say(f"{path}: cannot be read ({e}); looking for an older checkpoint")
    raise ConfigError(f"{folder}: has no checkpoint that can be read; --overwrite starts anew")

def load(folder, model, optimizer):
    """Restore the newest checkpoint -> (step, state)."""
    step, state, tensors = newest(folder)
    own = dict(model.named_parameters())
    found = {name.removeprefix("model."): x.shape for name, x in tensors.items() if name.startswith("model.")}
    names = {name.partition(".")[2] for name in tensors}
    if found != {name: p.shape for name, p in own.items()} or names != own.keys():
        raise ConfigError(f"{folder}: its checkpoint is of another model; --overwrite starts anew")
    with torch.no_grad():
        for name, x in tensors.items():
            key, _, name = name.partition(".")
            x = ranks.like(own[name], x)
            if key == "model":
                own[name].copy_(x)
            else:
                optimizer.state[own[name]][key] = x
    optimizer.load_state_dict(optimizer.state_dict())  # moves the moments to where their weights are
    return step, state
