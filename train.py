"""Train a policy on preference pairs: python train.py [--loss dpo] [--data FILE ...] [--init FOLDER] ...

Without arguments: toy reviews, a small GPT, its own SFT reference, then DPO; offline, about a minute on a CPU.
The loop is `train`; what one micro-batch does is `run_pairs`. B pairs, T columns, N response tokens, C channels.
"""

import argparse
import dataclasses
import fcntl
import hashlib
import inspect
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
import losses
from model import GPT, GPTConfig, ModelError

HERE = Path(__file__).resolve().parent

# A function's parameters say what a loss needs, its keyword-only parameters are its knobs: no second list.
LOSSES = {
    "sft": losses.sft_loss,
    "dpo": losses.dpo_loss,
    "dpop": losses.dpop_loss,
    "tdpo1": losses.tdpo1_loss,
    "tdpo2": losses.tdpo2_loss,
    "2d-dpo": losses.dpo2d_loss,
    "2d-dpo-vanilla": losses.dpo2d_vanilla_loss,
}


class ConfigError(ValueError):
    """A flag that cannot be served: the message names it and says what to do."""


class RunError(RuntimeError):
    """The run cannot go on; what was saved before is intact."""


@dataclass(frozen=True)
class Config:
    loss: str = "dpo"  # sft, dpo, dpop, tdpo1, tdpo2, 2d-dpo or 2d-dpo-vanilla
    data: tuple = ()  # files or folders of pairs; default: the toy reviews
    val_data: tuple = ()  # held-out pairs; default: 10 % of the data (at most 256 pairs), by prompt
    tokenizer: str | None = None  # gpt2, bytes, FILE.tiktoken or FOLDER; default: that of --init, else gpt2
    init: str | None = None  # start: a model folder or name (gpt2, ...); default: an SFT model made first
    ref: str | None = None  # reference: a model folder or name; default: the start
    out_dir: str | None = None  # default: out/LOSS, or out/LOSS-2, ... when that is taken
    resume: bool = False  # go on with the run in --out_dir
    overwrite: bool = False  # replace the run in --out_dir
    seed: int = 0  # of initial weights, order of pairs and samples
    # optimization
    steps: int = 100  # optimizer steps
    batch_size: int = 32  # pairs in an optimizer step
    micro_batch_size: int = 32  # pairs in a forward pass; changes memory, never the gradient
    lr: float = 5e-4  # AdamW's learning rate after warm-up (a pretrained model wants about 1e-6)
    warmup_steps: int = 10  # of linear warm-up, then constant
    weight_decay: float = 0.0  # of matrices; biases and LayerNorm have none
    grad_clip: float = 1.0  # largest gradient norm; 0 = never clip
    sft_steps: int | None = None  # of the SFT that makes the reference; default 250
    sft_lr: float | None = None  # its learning rate; default 2e-3
    # the loss
    beta: float | None = None  # 1/nats, strength of the KL constraint; default 0.1, dpop 0.3
    lam: float | None = None  # dpop: weight of the penalty; default 50
    alpha: float | None = None  # tdpo2: weight of the KL difference; default 0.5
    aspect_weights: tuple = ()  # 2d-dpo: weight of each aspect, sum 1; default uniform
    rejected_weight: str | None = None  # 2d-dpo-vanilla: score (Eq., default) or badness = 1 - score
    # the model, when there is no --init
    n_layer: int | None = None  # default 2
    n_head: int | None = None  # default 4
    n_embd: int | None = None  # channels; default 128
    block_size: int | None = None  # positions: tokens of prompt + longer response; default 256, or that of --init
    # what is seen and kept
    eval_every: int = 50  # steps between evaluations on the held-out pairs; 0 = first and last only
    save_every: int = 500  # steps between checkpoints; 0 = last only
    log_every: int = 10  # steps between log lines
    # the machine
    device: str | None = None  # default: cuda where there is one, else cpu
    dtype: str | None = None  # float32, bfloat16 (autocast) or float64; default bfloat16 on cuda, else float32
    compile: bool | None = None  # torch.compile; default on cuda only
    head_tokens: int = 2048  # response tokens whose logits exist at once (whole pairs, at least one)
    ref_cache: bool = True  # evaluate the reference once and store its numbers
    ref_cache_gb: float = 8.0  # a larger store is not made: the reference then runs in every step


LISTS = ("data", "val_data", "aspect_weights")
DEFAULTS = {"beta": 0.1, "lam": 50.0, "alpha": 0.5, "sft_steps": 250, "sft_lr": 2e-3,
            "n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 256}
PAPER_DEFAULTS = {"dpop": {"beta": 0.3}}


# ---------------------------------------------------------------------------------------------------------
# Flags


def parameters(loss):
    return inspect.signature(LOSSES[loss]).parameters


def knobs(loss):
    return [name for name, p in parameters(loss).items() if p.kind is p.KEYWORD_ONLY]


def check_flags(cfg):
    """Refuse values out of range and knobs that this run would not read."""
    if cfg.loss not in LOSSES:
        raise ConfigError(f"--loss {cfg.loss}: choose from {', '.join(LOSSES)}")
    least = {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "head_tokens": 1, "n_layer": 1, "n_head": 1,
             "n_embd": 1, "block_size": 2, "sft_steps": 1, "warmup_steps": 0, "weight_decay": 0, "grad_clip": 0,
             "eval_every": 0, "save_every": 0, "log_every": 1, "seed": 0, "lam": 0, "alpha": 0, "ref_cache_gb": 0}
    for name, low in least.items():
        value = getattr(cfg, name)
        if value is not None and not low <= value < math.inf:
            raise ConfigError(f"--{name} {value}: must be at least {low}")
    for name in ("lr", "sft_lr", "beta"):
        value = getattr(cfg, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name} {value}: must be greater than 0")
    segmented, makes_reference = "chosen_rewards" in parameters(cfg.loss), cfg.loss != "sft" and not cfg.init
    read = {name: name in knobs(cfg.loss) for name in ("beta", "lam", "alpha")}
    read |= {"aspect_weights": segmented, "rejected_weight": segmented, "ref": cfg.loss != "sft",
             "sft_steps": makes_reference, "sft_lr": makes_reference}
    for name, is_read in read.items():
        if not is_read and getattr(cfg, name) not in (None, ()):
            why = "with --init no SFT is run" if name.startswith("sft") and cfg.init else f"loss {cfg.loss} has none"
            raise ConfigError(f"--{name} would not be read: {why}; leave it out")
    if cfg.rejected_weight not in (None, "score", "badness"):
        raise ConfigError(f"--rejected_weight {cfg.rejected_weight}: choose score or badness")
    if cfg.rejected_weight == "badness" and cfg.loss != "2d-dpo-vanilla":
        raise ConfigError("--rejected_weight badness: only for 2d-dpo-vanilla; Eq. 6 selects by the same score, "
                          "so 1 - score would select the best rejected segments")
    weights = cfg.aspect_weights
    if weights and not (all(w >= 0 for w in weights) and math.isclose(sum(weights), 1, abs_tol=1e-6)):
        raise ConfigError(f"--aspect_weights {' '.join(map(str, weights))}: must be >= 0 and sum to 1")
    if cfg.dtype == "float16":
        raise ConfigError("--dtype float16: its range loses small gradients without loss scaling; use bfloat16")
    if cfg.dtype not in (None, "float32", "bfloat16", "float64"):
        raise ConfigError(f"--dtype {cfg.dtype}: choose float32, bfloat16 or float64")
    try:
        device = torch.device(cfg.device or "cpu")
    except RuntimeError:
        raise ConfigError(f"--device {cfg.device}: choose cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {cfg.device}: not available here; --device cpu always is")
    if cfg.resume and not cfg.out_dir:
        raise ConfigError("--resume: say which run with --out_dir")
    if cfg.resume and cfg.overwrite:
        raise ConfigError("--resume and --overwrite contradict each other")


def fill_defaults(cfg):
    """Every knob that this run reads gets a value; the rest stays None."""
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cuda = device.startswith("cuda")
    values = DEFAULTS | PAPER_DEFAULTS.get(cfg.loss, {})
    read = knobs(cfg.loss)
    if not cfg.init:
        read = read + ["n_layer", "n_head", "n_embd", "block_size"]
        if cfg.loss != "sft":
            read = read + ["sft_steps", "sft_lr"]
    filled = {name: values[name] for name in read if getattr(cfg, name) is None}
    if cfg.out_dir is None:
        names = [f"out/{cfg.loss}"] + [f"out/{cfg.loss}-{n}" for n in range(2, 10000)]
        filled["out_dir"] = next(name for name in names if not Path(name).exists())
    return dataclasses.replace(
        cfg, **filled, device=device, dtype=cfg.dtype or ("bfloat16" if on_cuda else "float32"),
        compile=on_cuda if cfg.compile is None else cfg.compile)


def parse_flags(argv):
    """argv -> Config. Flags, types and help come from Config's fields and their comments."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    parser = argparse.ArgumentParser("train.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = lambda message: sys.exit(fail(message))
    for field in dataclasses.fields(Config):
        name, text = "--" + field.name, comments[field.name].replace("%", "%%")
        if "bool" in str(field.type):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        elif field.type is tuple:
            parser.add_argument(name, nargs="+", help=text)
        else:
            kind = field.type if isinstance(field.type, type) else field.type.__args__[0]
            parser.add_argument(name, type=kind, help=text, metavar=kind.__name__.upper())
    given = vars(parser.parse_args(argv))
    if "aspect_weights" in given:
        try:
            given["aspect_weights"] = tuple(float(w) for w in " ".join(given["aspect_weights"]).replace(",", " ").split())
        except ValueError:
            raise ConfigError(f"--aspect_weights {' '.join(given['aspect_weights'])}: must be numbers") from None
    if given.get("resume") and "out_dir" in given:  # what is not said again stays as it was
        given = read_run(Path(given["out_dir"]))["config"] | {"overwrite": False} | given
    return Config(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def fail(message):
    """One clear line (or a list of lines of a file) and status 2."""
    print(f"train.py: error: {message}", file=sys.stderr)
    return 2


# ---------------------------------------------------------------------------------------------------------
# Files of a run


def write_atomically(path, write):
    """Call write(temporary path), flush it to disk and rename: a kill at any moment leaves the old file or the new."""
    part = path.with_name(path.name + ".part")
    write(part)
    with open(part, "rb") as f:
        os.fsync(f.fileno())
    os.replace(part, path)


def write_json(path, value):
    write_atomically(path, lambda part: part.write_text(json.dumps(value, indent=1) + "\n"))


def file_hash(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def weights_hash(model):
    """One hash of all weights, whatever file they came from."""
    h = hashlib.sha256()
    for name, p in model.named_parameters():
        h.update(name.encode() + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def read_run(folder):
    """run.json: what a run is, {"config", "identity", ...}."""
    try:
        return json.loads((folder / "run.json").read_text())
    except OSError:
        raise ConfigError(f"--out_dir {folder}: no run.json there, so no run to go on with") from None
    except ValueError:
        raise ConfigError(f"{folder / 'run.json'}: not JSON; is the file damaged?") from None


def check_folder(folder, cfg):
    """Refuse a folder that holds something else, before any work is done."""
    for name in ("init", "ref"):
        if getattr(cfg, name) and Path(getattr(cfg, name)).resolve() == folder.resolve():
            raise ConfigError(f"--out_dir {folder}: is --{name} too, and would be overwritten; choose another")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out_dir {folder}: is a file")
    kept = sorted(p.name for p in folder.glob("*") if p.is_file() and p.name != ".lock")
    if kept and not cfg.resume and not cfg.overwrite:
        what = f"a {read_run(folder)['config']['loss']} run" if "run.json" in kept else f"{len(kept)} files"
        raise ConfigError(f"--out_dir {folder}: holds {what} ({kept[0]}, ...); choose --resume, --overwrite or another")


def open_run(folder, cfg, identity):
    """Claim the folder for this run alone; returns the lock, held as long as the file is open."""
    if cfg.resume:
        then = read_run(folder)["identity"]
        differs = [f"{k} was {then.get(k)!r:.60}, is {v!r:.60}" for k, v in identity.items() if then.get(k) != v]
        if differs:
            raise ConfigError(f"--resume {folder}: " + "; ".join(differs))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"--out_dir {folder}: another process is writing there") from None
    except OSError as e:
        raise ConfigError(f"--out_dir {folder}: {e.strerror}") from None
    if cfg.overwrite:
        for name in ("run.json", "log.jsonl", "model.safetensors", "config.json"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return lock


def save_checkpoint(folder, step, policy, optimizer, state):
    """checkpoints/step-N.safetensors (weights, moments), then its .json (hash, state); the last two are kept."""
    folder = folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    tensors = {f"model.{name}": p.detach() for name, p in policy.named_parameters()}
    for name, p in policy.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[p].items()}
    weights = folder / f"step-{step:07}.safetensors"
    write_atomically(weights, lambda part: save_file({k: v.contiguous() for k, v in tensors.items()}, part))
    write_json(weights.with_suffix(".json"), {"step": step, "sha256": file_hash(weights), **state})
    for old in sorted(folder.glob("step-*.json"))[:-2]:
        old.unlink()
        old.with_suffix(".safetensors").unlink()


def load_checkpoint(folder, policy, optimizer, say):
    """Restore the newest intact checkpoint: its JSON, or None when there is none."""
    for path in sorted(folder.glob("checkpoints/step-*.json"), reverse=True):
        weights = path.with_suffix(".safetensors")
        try:
            state = json.loads(path.read_text())
            if file_hash(weights) != state["sha256"]:
                raise ValueError("its content is not what was written")
            with safe_open(weights, "pt", device="cpu") as f, torch.no_grad():
                for name, p in policy.named_parameters():
                    p.copy_(f.get_tensor(f"model.{name}"))
                    optimizer.state[p] = {key: f.get_tensor(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.load_state_dict(optimizer.state_dict())  # moves the moments to where their weights are
            return state
        except (OSError, ValueError, KeyError, SafetensorError) as e:
            say(f"{path}: skipped ({e}); an older checkpoint is used")
    return None



# ---------------------------------------------------------------------------------------------------------
# One micro-batch


def head(policy, hidden, target, reference=None, ref_hidden=None, with_kl=False):
    """Hidden states (N, C) of response tokens -> log pi, log pi_ref and KL(pi_ref || pi), each (N,) or None."""
    logits = policy.logits(hidden)  # (N, V), and nothing of this size outlives the chunk
    logps = losses.token_logps(logits, target)
    if ref_hidden is None:
        return logps, None, None
    with torch.no_grad():
        ref_logits = reference.logits(ref_hidden)  # (N, V)
        ref_logps = losses.token_logps(ref_logits, target)
    return logps, ref_logps, losses.token_kl(ref_logits, logits) if with_kl else None


class Engine:
    """The two models of a run and how they are called: precision, compilation, what is stored of the reference."""

    def __init__(self, cfg, policy, reference, score_maximum):
        self.cfg, self.policy, self.reference = cfg, policy, reference
        self.compiled = torch.compile if cfg.compile else lambda f, **_: f
        self.trunk, self.head = self.compiled(policy), self.compiled(head, dynamic=True)
        self.ref_trunk = self.compiled(reference) if reference else None
        self.stores = {}  # split -> Store; a split without one has a live reference
        self.loss = LOSSES[cfg.loss]
        self.needs = parameters(cfg.loss)
        self.needs_kl = "chosen_seq_kl" in self.needs
        self.knobs = {name: getattr(cfg, name) for name in knobs(cfg.loss)}
        if "chosen_rewards" in self.needs:
            A = len(score_maximum)
            self.aspect_weights = torch.tensor(cfg.aspect_weights or [1 / A] * A, device=cfg.device)
            self.score_maximum = torch.tensor(score_maximum, device=cfg.device)

    def precision(self):
        """bf16 is autocast over float32 weights; float32 and float64 are the weights' own."""
        if self.cfg.dtype != "bfloat16":
            return nullcontext()
        return torch.autocast(torch.device(self.cfg.device).type, torch.bfloat16)

    def collate(self, pairs, index):
        rows = [pairs[i].chosen_only() if self.cfg.loss == "sft" else pairs[i] for i in index]
        return data.collate(rows, multiple=64 if self.cfg.compile else 1).to(self.cfg.device)

    def hidden(self, trunk, batch):
        """The hidden state that predicts each response token: (N, C)."""
        with self.precision():
            hidden = trunk(batch.tokens, batch.positions, batch.mask())  # (B, T, C)
        row, column = batch.source
        return hidden[row, column]

    def rewards(self, batch):
        """Segment rewards r_k of both responses, (B, 2, S)."""
        r = losses.segment_rewards(batch.scores / self.score_maximum, self.aspect_weights)
        if self.cfg.rejected_weight == "badness":
            r = torch.stack([r[:, 0], 1 - r[:, 1]], dim=1)
        return r

    def terms(self, batch, first, end, logps, ref_logps, kl):
        """Whatever a loss may ask for by name, for the pairs first ... end - 1 of a batch."""
        part, n = end - first, slice(batch.starts[first], batch.starts[end])
        S = batch.scores.shape[2]
        response, segment = batch.response[n] - 2 * first, batch.segment[n] - 2 * first * S

        def sums(values, by_segment=False):  # (n,) -> (pairs, 2) or (pairs, 2, S), chosen and rejected
            if by_segment:
                return losses.segment_sum(values, segment, 2 * part * S).view(part, 2, S).unbind(1)
            return losses.segment_sum(values, response, 2 * part).view(part, 2).unbind(1)

        segmented = "chosen_rewards" in self.needs
        terms = dict(zip(("chosen_logps", "rejected_logps"), sums(logps, segmented), strict=True))
        if ref_logps is not None:
            ref = sums(ref_logps, segmented)
            terms |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ref, strict=True))
        if kl is not None:
            terms |= dict(zip(("chosen_seq_kl", "rejected_seq_kl"), sums(kl), strict=True))
        if segmented:
            rewards, mask = self.rewards(batch)[first:end], batch.segment_mask[first:end]
            terms |= {"chosen_rewards": rewards[:, 0], "rejected_rewards": rewards[:, 1],
                      "chosen_mask": mask[:, 0], "rejected_mask": mask[:, 1]}
        return terms

    def run_pairs(self, pairs, index, split, scale=None):
        """Loss and log-probabilities of some pairs, {name: (B,)}; with a scale, adds the gradient of
        scale * sum of losses.

        The trunk runs once over the batch. The head and the loss run on a few whole pairs at a time, each chunk
        with its own backward into the hidden states: a pair's loss needs only its own tokens, so this is exact,
        and logits of the whole batch never exist. One backward through the trunk ends it.
        """
        batch = self.collate(pairs, index)
        ref_logps, ref_hidden = self.reference_of(split, index, batch)
        hidden = self.hidden(self.trunk, batch)  # (N, C)
        grad, rows = torch.zeros_like(hidden), []
        for first, end in batch.chunks(self.cfg.head_tokens):
            n = slice(batch.starts[first], batch.starts[end])
            leaf = hidden[n].detach().requires_grad_(scale is not None)
            with self.precision():
                logps, live_logps, kl = self.head(
                    self.policy, leaf, batch.target[n], self.reference,
                    None if ref_hidden is None else ref_hidden[n], with_kl=scale is None or self.needs_kl)
            terms = self.terms(batch, first, end, logps, live_logps if ref_logps is None else ref_logps[n], kl)
            loss = self.loss(**{k: terms[k] for k in self.needs if k in terms}, **self.knobs)  # (pairs,)
            if scale is not None:
                (scale * loss.sum()).backward()
                grad[n] = leaf.grad
            rows.append({"loss": loss} | terms)
        if scale is not None:
            hidden.backward(grad)
        # a (B, S) of log-probabilities or of a mask becomes the pair's sum, (B,)
        return {k: torch.cat([row[k].detach().reshape(len(row["loss"]), -1).sum(-1) for row in rows])
                for k in rows[0]}

    def reference_of(self, split, index, batch):
        """What the reference says of a batch: stored log-probabilities (N,) or hidden states (N, C), or None."""
        if self.reference is None:
            return None, None
        if split not in self.stores:
            with torch.no_grad():
                return None, self.hidden(self.ref_trunk, batch)
        values = self.stores[split].look_up(index).to(self.cfg.device, non_blocking=True)
        return (values, None) if values.dim() == 1 else (None, values)


# ---------------------------------------------------------------------------------------------------------
# The reference, evaluated once


class Store:
    """Numbers of the reference for each response token of some pairs, in a memory-mapped file."""

    def __init__(self, path, pairs, index, dtype):
        self.values, self.dtype = np.load(path, mmap_mode="r"), dtype
        self.first, self.end = np.zeros((2, len(pairs)), dtype=np.int64)
        counts = pairs.rows[index, 2:4].sum(-1)  # C + R
        self.end[index] = np.cumsum(counts)
        self.first[index] = self.end[index] - counts

    def look_up(self, index):
        """(N,) or (N, C), in the order of collate."""
        values = np.concatenate([self.values[self.first[i]:self.end[i]] for i in index])
        return torch.from_numpy(values).view(self.dtype)


def store_reference(engine, pairs, index, split, folder, ref_hash, say):
    """Run the reference once over pairs[index] and keep its log-probabilities, or for a KL its final hidden states,
    from which its head is evaluated again chunk by chunk. Without a store the reference stays live.
    """
    cfg, C = engine.cfg, engine.reference.config.n_embd
    of_hidden = engine.needs_kl or split == "val"  # evaluation reports the KL whatever the loss
    n_tokens = int(pairs.rows[index, 2:4].sum())
    dtype = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}[cfg.dtype]
    if not of_hidden and dtype == torch.bfloat16:
        dtype = torch.float32  # log-probabilities are float32 always
    numpy_dtype = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.int16}[dtype]
    shape = (n_tokens, C) if of_hidden else (n_tokens,)
    size = math.prod(shape) * dtype.itemsize / 1e9
    if not cfg.ref_cache or size > cfg.ref_cache_gb:
        why = "--no-ref_cache" if not cfg.ref_cache else f"{size:.1f} GB is over --ref_cache_gb {cfg.ref_cache_gb:g}"
        say(f"reference: live in every step ({split}: {why})")
        return
    key = hashlib.sha256(json.dumps([1, ref_hash, str(dtype), shape, engine.reference.config.vocab_size]).encode())
    for array in (pairs.ids, pairs.rows[index]):
        key.update(np.ascontiguousarray(array).tobytes())
    key, path, note = key.hexdigest(), folder / f"reference-{split}.npy", folder / f"reference-{split}.json"
    try:
        stored = json.loads(note.read_text())
        if (stored["key"], stored["sha256"]) == (key, file_hash(path)):
            engine.stores[split] = Store(path, pairs, index, dtype)
            return
        say(f"{path}: of another model or other data, or damaged; made again")
    except (OSError, ValueError, KeyError, TypeError):
        pass

    def write(part):
        values = np.lib.format.open_memmap(part, "w+", numpy_dtype, shape)
        store = Store(part, pairs, index, dtype)
        micros = data.micro_batches(pairs, index, cfg.micro_batch_size)
        for micro in tqdm(micros, f"reference ({split})", unit=" batches", delay=2, leave=False):
            batch = engine.collate(pairs, micro)
            hidden = engine.hidden(engine.ref_trunk, batch)
            for first, end in batch.chunks(cfg.head_tokens):
                n = slice(batch.starts[first], batch.starts[end])
                rows = hidden[n]
                if not of_hidden:
                    with engine.precision():
                        rows, _, _ = engine.head(engine.reference, rows, batch.target[n])
                rows = rows.to(dtype).cpu().view(torch.int16 if dtype == torch.bfloat16 else dtype).numpy()
                for b in range(first, end):
                    i, at = micro[b], batch.starts[b] - batch.starts[first]
                    values[store.first[i]:store.end[i]] = rows[at:at + store.end[i] - store.first[i]]
        values.flush()

    with torch.no_grad():
        write_atomically(path, write)
    write_json(note, {"key": key, "sha256": file_hash(path)})
    engine.stores[split] = Store(path, pairs, index, dtype)
    what = "hidden states" if of_hidden else "log-probabilities"
    say(f"reference: {what} of {len(index)} {split} pairs stored, {n_tokens} tokens, {size * 1e3:.1f} MB")


# ---------------------------------------------------------------------------------------------------------
# Numbers


def metrics_of(engine, rows, n_tokens):
    """{name: number} over the pairs of a step or of an evaluation; README.md explains each name."""
    t = {k: torch.cat([row[k] for row in rows]).double() for k in rows[0]}  # (B,)
    if engine.cfg.loss == "sft":
        return {"loss": t["loss"].sum().item() / n_tokens, "logps/chosen": t["chosen_logps"].mean().item()}
    chosen_logratio = t["chosen_logps"] - t["ref_chosen_logps"]
    rejected_logratio = t["rejected_logps"] - t["ref_rejected_logps"]
    margins = engine.cfg.beta * (chosen_logratio - rejected_logratio)
    m = {"loss": t["loss"],
         "rewards/chosen": engine.cfg.beta * chosen_logratio,
         "rewards/rejected": engine.cfg.beta * rejected_logratio,
         "rewards/margins": margins,
         "rewards/accuracies": (margins > 0).double() + 0.5 * (margins == 0),
         "logps/chosen": t["chosen_logps"],
         "logps/rejected": t["rejected_logps"],
         "logratio/chosen": chosen_logratio,
         "logratio/rejected": rejected_logratio}
    if "chosen_seq_kl" in t:
        m |= {"kl/ref_policy_chosen": t["chosen_seq_kl"], "kl/ref_policy_rejected": t["rejected_seq_kl"]}
    if engine.cfg.loss == "2d-dpo":
        m["segments/paired"] = torch.minimum(t["chosen_mask"], t["rejected_mask"])  # N of Eq. 6
    return dict(zip(m, torch.stack([x.mean() for x in m.values()]).tolist(), strict=True))


@torch.no_grad()
def evaluate(engine, pairs):
    index = np.arange(len(pairs))
    micros = data.micro_batches(pairs, index, engine.cfg.micro_batch_size)
    return metrics_of(engine, [engine.run_pairs(pairs, i, "val") for i in micros], int(pairs.rows[:, 2].sum()))


def check_start(cfg, m):
    """Where the policy is the reference the loss is log 2 (N log 2 in Eq. 6) and every margin 0."""
    expected = math.log(2) * m.get("segments/paired", 1)
    tolerance = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2}[cfg.dtype]
    if abs(m["loss"] - expected) > tolerance or abs(m["rewards/margins"]) > tolerance:
        raise RunError(f"the policy is the reference, but the loss is {m['loss']:.6f} (expected {expected:.6f}) "
                       f"and the margin {m['rewards/margins']:.6f}: tolerance {tolerance:g}")
    return f"loss {m['loss']:.4f} = {'mean N ' * ('segments/paired' in m)}log 2, margins 0: the policy is the reference"


def health(m):
    """One line on why the margin is what it is, or None."""
    chosen, rejected = m.get("logratio/chosen", 0.0), m.get("logratio/rejected", 0.0)
    if chosen < -10:
        return (f"chosen is {-chosen:.1f} nats below the reference: the policy unlearns the good answers too; "
                "a smaller --lr or more --beta slows it, dpop forbids it")
    if chosen < 0 and rejected < chosen:
        return (f"rejected falls faster; chosen is {-chosen:.1f} nats below the reference: expected in DPO, see DPOP")
    if chosen > 0 > rejected:
        return f"chosen rises by {chosen:.1f} nats, rejected falls by {-rejected:.1f}"
    return None


def matmul_rate(device, dtype):
    """FLOP/s of this device's own matrix product, for mfu."""
    n = 4096 if device.startswith("cuda") else 512
    a = torch.randn(n, n, device=device).to(dtype)
    best = math.inf
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def useful_flops(config, rows):
    """Forward and backward of the policy over pairs with rows (n, [.., P, C, R, ..]): no padding, nothing twice."""
    P, C, R = rows[:, 1], rows[:, 2], rows[:, 3]
    tokens, attended = P + C + R, (P * (P + 1) + C * (C + 1) + R * (R + 1)) / 2 + P * (C + R)
    n = config.n_embd
    trunk = config.n_layer * (24 * n * n * tokens + 4 * n * attended)
    return 3.0 * (trunk + 2 * n * config.vocab_size * (C + R)).sum()


def peak_memory(device):
    """Bytes: of the GPU's allocator, or the process's largest resident size."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------------------------------------------------
# The run


class Log:
    """Lines on the screen, records in log.jsonl."""

    def __init__(self, path, step, header):
        old = path.read_text().splitlines() if step is not None and path.exists() else []
        kept = [line for line in old if json.loads(line).get("step", 0) <= (step or 0)]
        path.write_text("".join(line + "\n" for line in kept))
        self.file = open(path, "a")
        self.write(header)

    def write(self, record):
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def say(text):
    tqdm.write(text)


def load_tokenizer(cfg):
    """The tokenizer of the flags, which a model folder's own must equal."""
    folder = Path(cfg.init or "")
    own = cfg.init and any((folder / f).exists() for f in ("vocab.json", "tokenizer.json", "tokenizer.tiktoken"))
    if own:
        tokenizer = data.Tokenizer(folder)
        if cfg.tokenizer and data.Tokenizer(cfg.tokenizer).hash != tokenizer.hash:
            raise ConfigError(f"--tokenizer {cfg.tokenizer}: --init {cfg.init} has another vocabulary; leave it out")
        return tokenizer
    return data.Tokenizer(cfg.tokenizer or (HERE / "toy" / "toy.tiktoken" if not cfg.data else "gpt2"))


def vocab_multiple(cfg):
    return 64 if cfg.device.startswith("cuda") else 1  # GPUs multiply aligned matrices faster


def preference_loss_of(folder):
    """The loss that made a model folder, if a preference run did."""
    run = Path(folder) / "run.json"
    loss = read_run(Path(folder))["config"]["loss"] if run.exists() else "sft"
    return loss if loss != "sft" else None


def load_model(flag, name, cfg, tokenizer):
    """The policy or reference of --init or --ref, checked against the tokenizer and the data's positions."""
    model = GPT.from_pretrained(name, vocab_multiple=vocab_multiple(cfg))
    c = model.config
    if c.vocab_size != tokenizer.vocab_size:
        raise ConfigError(f"--{flag} {name}: vocab_size {c.vocab_size}, but the tokenizer has {tokenizer.vocab_size}")
    for key in ("n_layer", "n_head", "n_embd"):
        if flag == "init" and getattr(cfg, key) not in (None, getattr(c, key)):
            raise ConfigError(f"--{key} {getattr(cfg, key)}: --init {name} has {getattr(c, key)}; leave it out")
    if (cfg.block_size or 0) > c.block_size:
        raise ConfigError(f"--block_size {cfg.block_size}: --{flag} {name} has {c.block_size} positions")
    return model


def load_data(cfg, tokenizer):
    """(training pairs, held-out pairs, lines to print)."""
    files = cfg.data or (HERE / "toy" / "reviews-train.jsonl",)
    val_files = cfg.val_data or (() if cfg.data else (HERE / "toy" / "reviews-heldout.jsonl",))
    pairs, notes = data.load(files, tokenizer, cfg.block_size)
    if val_files:
        val, more = data.load(val_files, tokenizer, cfg.block_size)
        notes += more
    else:
        pairs, val = data.hold_out(pairs)
        notes.append(f"held out by prompt: {len(val)} pairs; {len(pairs)} are left to train on")
    if "chosen_rewards" in parameters(cfg.loss):
        for part in (pairs, val):
            if not part.n_aspects:
                raise ConfigError(f"--loss {cfg.loss}: needs scores for every segment, and {part.where[0]} and others "
                                  "have none; tools/doctor.py --segment writes that form")
        if val.n_aspects != pairs.n_aspects or len(cfg.aspect_weights or range(pairs.n_aspects)) != pairs.n_aspects:
            raise ConfigError(f"--aspect_weights: {len(cfg.aspect_weights)} weights, {pairs.n_aspects} aspects in the "
                              f"training data, {val.n_aspects} in the held-out data")
    return pairs, val, notes


def identity_of(cfg, pairs, val, tokenizer, init_hash, ref_hash):
    """Everything that determines the numbers of a run but its length: what --resume and a reused SFT compare."""
    keys = ("loss", "seed", "batch_size", "lr", "warmup_steps", "weight_decay", "grad_clip", "beta", "lam", "alpha",
            "aspect_weights", "rejected_weight", "n_layer", "n_head", "n_embd", "block_size", "dtype")
    identity = {key: getattr(cfg, key) for key in keys} | {"aspect_weights": list(cfg.aspect_weights)}
    for name, part in (("data", pairs), ("val_data", val)):
        arrays = (part.ids, part.segments, part.scores, part.rows)
        identity[name] = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()
    return identity | {"tokenizer": tokenizer.hash, "init": init_hash, "ref": ref_hash}


def make_reference(cfg, pairs, val, tokenizer):
    """The folder of an SFT model for this run's data and sizes: reused when there is one, trained otherwise."""
    sft = dataclasses.replace(
        cfg, loss="sft", steps=cfg.sft_steps, lr=cfg.sft_lr, sft_steps=None, sft_lr=None, beta=None, lam=None, alpha=None,
        aspect_weights=(), rejected_weight=None, ref=None, eval_every=0, log_every=max(cfg.log_every, 50), ref_cache=True,
        overwrite=False)
    identity = identity_of(sft, pairs, val, tokenizer, None, None)
    for number in range(1, 1000):
        folder = Path(cfg.out_dir).parent / ("sft" if number == 1 else f"sft-{number}")
        sft = dataclasses.replace(sft, out_dir=str(folder), resume=(folder / "run.json").exists())
        if sft.resume:
            run = read_run(folder)
            if run["identity"] != identity or (run["finished"] or 0) > sft.steps:
                continue
            if run["finished"] == sft.steps:
                say(f"no --init: the reference is the SFT model in {folder}, made by an earlier run")
                return str(folder)
        elif folder.exists() and any(folder.iterdir()):
            continue
        say(f"no --init: first a reference by SFT on the chosen responses, {sft.steps} steps, into {folder}")
        train(sft, nested=True)
        say(f"now {cfg.loss}, from {folder}")
        return str(folder)


def set_up(cfg, nested):
    """Everything a run needs, checked before anything is written: (cfg without gaps, Engine, tokenizer, training
    pairs, held-out pairs, identity)."""
    cfg = dataclasses.replace(cfg, **{key: (value,) if isinstance(value, str | Path) else tuple(value)
                                      for key, value in vars(cfg).items() if key in LISTS})
    check_flags(cfg)
    cfg = fill_defaults(cfg)
    check_folder(Path(cfg.out_dir), cfg)
    torch.manual_seed(cfg.seed)
    tokenizer = load_tokenizer(cfg)
    policy = load_model("init", cfg.init, cfg, tokenizer) if cfg.init else None
    cfg = dataclasses.replace(cfg, block_size=cfg.block_size or policy.config.block_size)
    pairs, val, notes = load_data(cfg, tokenizer)
    if not nested:
        say("\n".join(notes))
    if policy is None and cfg.loss != "sft":
        cfg = dataclasses.replace(cfg, init=make_reference(cfg, pairs, val, tokenizer), sft_steps=None, sft_lr=None)
        policy = load_model("init", cfg.init, cfg, tokenizer)
    elif policy is None:
        sizes = GPTConfig(tokenizer.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)
        policy = GPT(sizes, vocab_multiple=vocab_multiple(cfg))
    c, weights_type = policy.config, torch.float64 if cfg.dtype == "float64" else torch.float32
    cfg = dataclasses.replace(cfg, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    policy.to(cfg.device, weights_type)
    reference = None
    if cfg.loss != "sft":
        if cfg.init and not cfg.ref and preference_loss_of(cfg.init):
            say(f"--init {cfg.init} is itself a {preference_loss_of(cfg.init)} result, and without --ref it is now the "
                "reference: log-ratios and KL count from there")
        cfg = dataclasses.replace(cfg, ref=cfg.ref or cfg.init)
        reference = load_model("ref", cfg.ref, cfg, tokenizer).to(cfg.device, weights_type).requires_grad_(False)
    hashes = weights_hash(policy) if cfg.init else None, weights_hash(reference) if reference else None
    engine = Engine(cfg, policy, reference, pairs.score_maximum() if pairs.n_aspects else ())
    return cfg, engine, tokenizer, pairs, val, identity_of(cfg, pairs, val, tokenizer, *hashes)


def train(cfg, nested=False):
    """Run cfg to its end; returns the final metrics on the held-out pairs. nested: the SFT inside a preference run.

    Raises ConfigError, data.DataError or ModelError for bad input and RunError where a run cannot go on.
    """
    cfg, engine, tokenizer, pairs, val, identity = set_up(cfg, nested)
    policy, folder = engine.policy, Path(cfg.out_dir)
    matrices = [p for p in policy.parameters() if p.dim() == 2]
    others = [p for p in policy.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": cfg.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=cfg.lr, fused=True)
    with open_run(folder, cfg, identity), finish_on_signal() as signals:
        state = load_checkpoint(folder, policy, optimizer, say) if cfg.resume else None
        start, before = (state["step"], state["before"]) if state else (0, None)
        if state and start >= cfg.steps:
            say(f"{folder}: finished at step {start}; --steps {cfg.steps} asks for no more")
            return state["after"]
        run = {"config": dataclasses.asdict(cfg), "identity": identity, "finished": None,
               "score_maximum": [float(x) for x in pairs.score_maximum()] if pairs.n_aspects else None}
        write_json(folder / "run.json", run)
        log = Log(folder / "log.jsonl", start if state else None, {
            "config": dataclasses.asdict(cfg), "identity": identity, "resumed_at": start,
            "python": platform.python_version(), "torch": torch.__version__, "device": device_name(cfg.device),
            "parameters": sum(p.numel() for p in policy.parameters()), "pairs": len(pairs), "held_out": len(val)})
        if engine.reference:
            read = np.unique(np.concatenate([data.step_indices(len(pairs), cfg.batch_size, cfg.seed, step)
                                             for step in range(start, cfg.steps)]))
            store_reference(engine, pairs, read, "train", folder, identity["ref"], say)
            store_reference(engine, val, np.arange(len(val)), "val", folder, identity["ref"], say)
            if len(engine.stores) == 2:
                engine.reference.h = engine.ref_trunk = None  # only its head is needed from here on
        if not nested or cfg.loss == "sft":
            say(f"{cfg.loss}: {sum(p.numel() for p in policy.parameters()):,} parameters, {len(pairs)} pairs, "
                f"{cfg.steps} steps of {cfg.batch_size} pairs, {device_name(cfg.device)}, {cfg.dtype}")
        rate, evaluation = matmul_rate(cfg.device, next(policy.parameters()).dtype), None
        if before is None:
            before = evaluate(engine, val)
            if identity["init"] and identity["init"] == identity["ref"]:
                say("step 0: " + check_start(cfg, before))
            log.write({"step": 0} | {f"eval/{k}": v for k, v in before.items()})

        clock, seen = time.perf_counter(), []
        for step in tqdm(range(start, cfg.steps), cfg.loss, initial=start, total=cfg.steps, unit=" steps"):
            index = data.step_indices(len(pairs), cfg.batch_size, cfg.seed, step)
            n_tokens = int(pairs.rows[index, 2].sum())  # of the chosen responses
            scale = 1 / (n_tokens if cfg.loss == "sft" else len(index))  # one division for the whole step
            rows = [engine.run_pairs(pairs, micro, "train", scale)
                    for micro in data.micro_batches(pairs, index, cfg.micro_batch_size)]
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip or math.inf).item()
            if not math.isfinite(norm):
                raise RunError(f"step {step + 1}: the gradient norm is {norm}; stopped before the update. Pairs: "
                               + ", ".join(pairs.where[i] for i in index))
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup_steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, seen = step + 1, seen + [index]

            if step % cfg.log_every == 0 or step in (1, cfg.steps):
                m = {f"train/{k}": v for k, v in metrics_of(engine, rows, n_tokens).items()}
                done, seconds = pairs.rows[np.concatenate(seen)], time.perf_counter() - clock
                m |= {"grad_norm": norm, "lr": group["lr"], "pairs_per_s": len(done) / seconds,
                      "tokens_per_s": done[:, 1:4].sum() / seconds,
                      "mfu": useful_flops(policy.config, done) / seconds / rate, "peak_memory": peak_memory(cfg.device)}
                log.write({"step": step} | {k: float(v) for k, v in m.items()})
                say(line_of(step, m))
                clock, seen = time.perf_counter(), []
            stopping = signals or step == cfg.steps
            if stopping or cfg.eval_every and step % cfg.eval_every == 0:
                evaluation = evaluate(engine, val)
                log.write({"step": step} | {f"eval/{k}": v for k, v in evaluation.items()})
                if not nested and health(evaluation):
                    say(f"step {step}, held-out: {health(evaluation)}")
                clock, seen = time.perf_counter(), []
            if stopping or cfg.save_every and step % cfg.save_every == 0:
                save_checkpoint(folder, step, policy, optimizer, {"before": before, "after": evaluation})
                clock, seen = time.perf_counter(), []
            if signals and step < cfg.steps:
                say(f"stopped after step {step} by {signals[0].name}; go on with: python train.py --resume --out_dir {folder}")
                raise SystemExit(128 + signals[0])

        policy.save_pretrained(folder)
        tokenizer.save(folder)
        write_json(folder / "run.json", run | {"finished": cfg.steps})
    report(cfg, engine, tokenizer, val, before, evaluation, nested)
    return evaluation


def line_of(step, m):
    """One log line: the numbers of this step."""
    line = f"step {step:5d}  loss {m['train/loss']:.4f}"
    if "train/rewards/margins" in m:
        line += (f"  acc {m['train/rewards/accuracies']:.2f}  margin {m['train/rewards/margins']:+.3f}"
                 f"  log-ratio chosen {m['train/logratio/chosen']:+.2f} rejected {m['train/logratio/rejected']:+.2f}")
    return line + f"  |g| {m['grad_norm']:.2f}  {m['pairs_per_s']:.0f} pairs/s"


TABLE = {  # metric -> how the final table calls it
    "loss": "loss",
    "rewards/accuracies": "reward accuracy (ties 1/2)",
    "rewards/margins": "reward margin",
    "logratio/chosen": "log-ratio of chosen, nats",
    "logratio/rejected": "log-ratio of rejected, nats",
    "kl/ref_policy_chosen": "KL(ref||policy) per chosen, nats",
    "kl/ref_policy_rejected": "KL(ref||policy) per rejected, nats",
}


def report(cfg, engine, tokenizer, val, before, after, nested):
    """The table over held-out pairs; then two answers side by side, and what to type next."""
    say(f"\n{f'held-out, {len(val)} pairs':36}{'before':>10}{'after':>10}")
    for key in [k for k in TABLE if k in after]:
        name = TABLE[key] + (" per token, nats" if cfg.loss == "sft" else "")
        note, ceiling = "", accuracy_ceiling(cfg)
        if key == "rewards/accuracies" and ceiling:
            note = f"   ceiling {ceiling:.4f}: the labels are noisy"
        say(f"{name:36}{before[key]:10.4f}{after[key]:10.4f}{note}")
    say("")
    if nested:
        return
    if engine.reference:
        reference = GPT.from_pretrained(cfg.ref).to(engine.policy.wte.weight)  # the run kept no more than its head
        prompts = list({tuple(val[i].prompt): val[i].prompt for i in range(len(val))}.values())[:2]
        for ids in prompts:
            say(f"prompt     {tokenizer.decode(ids).strip()}")
            for name, model in (("reference", reference), ("policy", engine.policy)):
                tokens = torch.tensor(ids[None].astype(np.int64), device=cfg.device)
                generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
                room = min(64, model.config.block_size - len(ids))
                answer = model.generate(tokens, room, temperature=0.7, eos=tokenizer.eot, generator=generator)
                text = tokenizer.decode(i for i in answer[0, len(ids):].tolist() if i != tokenizer.eot)
                say(f"{name:10} {text.strip()}")
            say("")
    say(f"saved in {cfg.out_dir}: model.safetensors, config.json, tokenizer, run.json, log.jsonl, checkpoints/")
    if cfg.loss == "sft":
        say(f"next: python train.py --init {cfg.out_dir} --loss dpo" + "".join(f" --data {d}" for d in cfg.data))
    else:
        prompt = tokenizer.decode(val[0].prompt)
        say(f"next: python sample.py {cfg.out_dir} --heat --prompt {shlex.quote(prompt)}")


def accuracy_ceiling(cfg):
    """What label noise allows: NAME.meta.json beside a single held-out file NAME.jsonl may say it."""
    files = cfg.val_data or (() if cfg.data else (HERE / "toy" / "reviews-heldout.jsonl",))
    meta = Path(str(files[0]).removesuffix(".gz")).with_suffix(".meta.json") if len(files) == 1 else None
    return json.loads(meta.read_text()).get("accuracy_ceiling") if meta and meta.exists() else None


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


@contextmanager
def finish_on_signal():
    """SIGINT and SIGTERM end the step first: the list that is yielded holds what arrived. A second one kills."""
    arrived, old = [], {}

    def note(number, frame):
        arrived.append(signal.Signals(number))
        signal.signal(number, old[number])

    if threading.current_thread() is threading.main_thread():
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def main(argv):
    try:
        train(parse_flags(argv))
    except (ConfigError, data.DataError, ModelError) as e:
        return fail(e)
    except RunError as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
