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
    """Write the checkpoint of a step and keep the last two. state is any JSON.

    A parameter that never had a gradient has no moments, and none are saved for it.
    """
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
    with writing(folder):
        (folder / "checkpoints").mkdir(exist_ok=True)
        metadata = {"step": str(step), "state": json.dumps(state)}
        write_atomically(folder / "checkpoints" / f"step-{step:07}.safetensors",
                         lambda part: save_file(tensors, part, metadata))
        kept = [path for path in paths_of(folder) if path.stem <= f"step-{step:07}"][:2]
        for path in (folder / "checkpoints").iterdir():  # what a kill left aside included
            if path not in kept:
                path.unlink()


def read(path):
    """A checkpoint's file -> (step, state, tensors by name). ConfigError where it is not whole."""
    try:
        with safe_open(path, "pt") as f:
            metadata = f.metadata()
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            return int(metadata["step"]), json.loads(metadata["state"]), tensors
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise ConfigError(f"{path}: cannot be read ({e})") from None


def newest(folder):
    """`read` of the newest checkpoint that is whole. ConfigError where there is none."""
    for path in paths_of(folder):
        try:
            return read(path)
        except ConfigError as e:
            report.say(f"{e}; looking for an older checkpoint")
    raise ConfigError(f"{folder}: has no checkpoint that can be read; --overwrite starts anew")


def load(folder, model, optimizer):
    """Restore the newest checkpoint -> (step, state)."""
    step, state, tensors = newest(folder)
    own = dict(model.named_parameters())
    found = {name.removeprefix("model."): x.shape for name, x in tensors.items() if name.startswith("model.")}
    if found != {name: p.shape for name, p in own.items()}:
        raise ConfigError(f"{folder}: its checkpoint holds another model than this run's; --overwrite starts "
                          "anew")
    moments = {}
    with torch.no_grad():
        for name, x in tensors.items():
            key, name = name.split(".", 1)
            x = ranks.like(own[name], x)
            if key == "model":
                own[name].copy_(x)
            else:
                moments.setdefault(own[name], {})[key] = x
    optimizer.state.update(moments)
    optimizer.load_state_dict(optimizer.state_dict())  # moves the moments to where their weights are
    return step, state
