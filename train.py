"""Train a policy on preference pairs: python train.py [--loss dpo] [--data FILE ...] [--init FOLDER] ...

Without arguments: toy reviews, a small GPT, its own SFT reference, then DPO; offline, within a minute.
The loop is `train`, what a micro-batch does is `Engine.run_pairs`; flags come first, printing last.

B pairs, T columns, N response tokens, S segments per response, C channels, V vocabulary.
"""

import argparse
import ctypes
import dataclasses
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
import sysconfig
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

# Before torch reads them. Threads that wait are to sleep, not spin: with another process on a core, spinning
# makes a step of a small model ten times slower. And a bfloat16 product on the CPU leaves its workspace in a
# cache of 1024 shapes; batches have ever new ones, and memory grows for hundreds of steps.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")

import numpy as np
import torch
from tqdm import tqdm

import data
import health
import losses
import ranks
import runs
from model import GPT, NAMES, GPTConfig, ModelError
from runs import ConfigError, RunError

HERE = Path(__file__).resolve().parent
TOY = tuple(HERE / "toy" / name for name in ("reviews-train.jsonl", "reviews-heldout.jsonl", "toy.tiktoken"))

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


@dataclass(frozen=True)
class Config:
    loss: str = "dpo"  # sft, dpo, dpop, tdpo1, tdpo2, 2d-dpo or 2d-dpo-vanilla
    data: tuple = ()  # files or folders of pairs; default: the toy reviews
    val_data: tuple = ()  # held-out pairs; default: 10 % of --data (at most 256 pairs), split by prompt
    tokenizer: str | None = None  # gpt2, bytes, FILE.tiktoken or FOLDER; default: --init's, or gpt2
    init: str | None = None  # start: a model folder or a name (gpt2, ...); default: SFT made first
    ref: str | None = None  # reference: a model folder or name; default: the start
    out_dir: str | None = None  # default: out/LOSS, or out/LOSS-2, ... where that is taken
    resume: bool = False  # go on with the run in --out_dir; flags not given again stay as they were
    overwrite: bool = False  # replace the run in --out_dir
    seed: int = 0  # of initial weights, order of pairs and samples
    # optimization
    steps: int | None = None  # optimizer steps; default 40, sft 150
    batch_size: int = 64  # pairs in an optimizer step
    micro_batch_size: int = 16  # most pairs in a forward pass: changes the memory, not the gradient
    micro_batch_tokens: int | None = None  # most tokens of their padded rows; default 2048, 32768 on cuda
    lr: float | None = None  # AdamW's learning rate; default 5e-5, sft 2e-3: for small models from scratch
    warmup_steps: int = 10  # of linear warm-up; constant after it, so that --steps may grow
    weight_decay: float = 0.0  # of matrices; biases and LayerNorm have none
    grad_clip: float = 1.0  # largest gradient norm; 0 = never clip
    sft_steps: int | None = None  # steps of the SFT that makes the reference; default 150
    sft_lr: float | None = None  # its learning rate; default 2e-3
    # the loss
    beta: float | None = None  # 1/nats, strength of the KL constraint; default 0.1, dpop 0.3
    lam: float | None = None  # dpop: weight of the penalty; default 50
    alpha: float | None = None  # tdpo2: weight of the KL difference; default 0.5
    aspect_weights: tuple = ()  # 2d-dpo: weight of each aspect, sum 1; default uniform
    rejected_weight: str | None = None  # 2d-dpo-vanilla: score (as printed, default) or badness = 1 - score
    # the model, where there is no --init
    n_layer: int | None = None  # default 2
    n_head: int | None = None  # default 4
    n_embd: int | None = None  # channels; default 128
    block_size: int | None = None  # positions: prompt + longer response; default 256, or that of --init
    # what is seen and kept
    eval_every: int = 20  # steps between evaluations on the held-out pairs; 0 = first and last only
    save_every: int = 500  # steps between checkpoints; 0 = last only
    log_every: int = 5  # steps between log lines
    # the machine
    device: str | None = None  # default: cuda where there is one, else cpu
    dtype: str | None = None  # float32, bfloat16 (autocast), float64; default bfloat16 on cuda, else float32
    compile: bool | None = None  # torch.compile; default: V > 10 000 and a compiler; on the CPU the head only
    head_tokens: int | None = None  # response tokens with logits at once; default: 2^24 logits, 2^28 on cuda
    ref_cache: bool = True  # evaluate the reference once and store its numbers
    ref_cache_gb: float = 8.0  # a larger store is not made: the reference then runs in every step


LISTS = ("data", "val_data", "aspect_weights")
DEFAULTS = {"beta": 0.1, "lam": 50.0, "alpha": 0.5, "steps": 40, "lr": 5e-5, "sft_steps": 150, "sft_lr": 2e-3,
            "n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 256}
DEFAULTS_OF = {"dpop": {"beta": 0.3}, "sft": {"steps": 150, "lr": 2e-3}}
STORE_FROM = 4_000_000  # bytes of data files from which tokenising them again would take seconds
ALIGN = 64  # rows of the embedding table are a multiple of it: aligned logits multiply faster, on CPUs too
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


# ---------------------------------------------------------------------------------------------------------
# Flags

AT_LEAST = {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "micro_batch_tokens": 1, "sft_steps": 1,
            "n_layer": 1, "n_head": 1, "n_embd": 1, "block_size": 2, "log_every": 1, "head_tokens": 1,
            "seed": 0, "warmup_steps": 0, "weight_decay": 0, "grad_clip": 0, "lam": 0, "alpha": 0,
            "eval_every": 0, "save_every": 0, "ref_cache_gb": 0}


def parameters(loss):
    return inspect.signature(LOSSES[loss]).parameters


def knobs(loss):
    return [name for name, p in parameters(loss).items() if p.kind is p.KEYWORD_ONLY]


def check_flags(cfg):
    """Refuse values of a wrong type or out of range, and knobs that this run would not read."""
    for field in dataclasses.fields(cfg):  # flags have their types; a caller or an edited run.json may not
        value, kinds = getattr(cfg, field.name), getattr(field.type, "__args__", (field.type,))
        also = {float: (int,), str: (Path,), tuple: ()}.get(kinds[0], ())
        if not isinstance(value, kinds + also) or isinstance(value, bool) and bool not in kinds:
            raise ConfigError(f"--{field.name} {value!r:.60}: must be of type {kinds[0].__name__}")
    for name, kinds in (("data", (str, Path)), ("val_data", (str, Path)), ("aspect_weights", (int, float))):
        if not all(isinstance(value, kinds) for value in getattr(cfg, name)):
            raise ConfigError(f"--{name} {getattr(cfg, name)!r:.60}: must be of type {kinds[-1].__name__}")
    for name, choices in (("loss", LOSSES), ("rejected_weight", ("score", "badness")), ("dtype", DTYPES)):
        value = getattr(cfg, name)
        if value == "float16":
            raise ConfigError("--dtype float16: small gradients vanish in its range; choose bfloat16")
        if value not in choices and (value is not None or name == "loss"):
            raise ConfigError(f"--{name} {value}: choose from {', '.join(choices)}")
    for name, low in AT_LEAST.items():
        value = getattr(cfg, name)
        if value is not None and not low <= value < 2**63:
            raise ConfigError(f"--{name} {value}: must be at least {low} and below 2^63")
    for name in ("lr", "sft_lr", "beta"):
        value = getattr(cfg, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name} {value}: must be greater than 0 and finite")
    for name in {"beta", "lam", "alpha"} - set(knobs(cfg.loss)):
        refuse_unread(cfg, name, f"the loss {cfg.loss} has none")
    if "chosen_rewards" not in parameters(cfg.loss):
        refuse_unread(cfg, "aspect_weights", f"the loss {cfg.loss} has no segments")
        refuse_unread(cfg, "rejected_weight", f"the loss {cfg.loss} has no segments")
    if cfg.loss == "sft":
        for name in ("ref", "ref_cache", "ref_cache_gb"):
            refuse_unread(cfg, name, "sft has no reference")
    if cfg.loss == "sft" or cfg.init and not cfg.resume:  # --resume may repeat the first command's flags
        refuse_unread(cfg, "sft_steps", "no SFT is run before this one")
        refuse_unread(cfg, "sft_lr", "no SFT is run before this one")
    n_embd, n_layer = cfg.n_embd or 1, cfg.n_layer or 1
    if (size := n_embd * (12 * n_layer * n_embd + (cfg.block_size or 1))) > 1e11:
        raise ConfigError(f"--n_layer, --n_embd, --block_size: a model of {size:.0e} parameters or more; "
                          "choose smaller ones")
    if cfg.rejected_weight == "badness" and cfg.loss != "2d-dpo-vanilla":
        raise ConfigError("--rejected_weight badness: for 2d-dpo-vanilla only; Eq. 6 selects by the same "
                          "score, so 1 - score would select the best rejected segments")
    weights = cfg.aspect_weights
    if weights and not (all(w >= 0 for w in weights) and math.isclose(sum(weights), 1, abs_tol=1e-6)):
        raise ConfigError(f"--aspect_weights {' '.join(map(str, weights))}: must be >= 0 and sum to 1")
    if cfg.device is not None:
        runs.check_device(cfg.device)
    n, gpus = ranks.world(), torch.cuda.device_count()
    if n > int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise ConfigError("torchrun --nnodes: the ranks of a run must be on one machine; leave it out")
    if n > 1 and gpus and cfg.device != "cpu" and (n > gpus or cfg.device not in (None, "cuda")):
        raise ConfigError(f"--device {cfg.device or 'cuda'}: each of {n} ranks takes one of {gpus} GPUs; "
                          f"choose cuda and torchrun --nproc_per_node {gpus} at most, or cpu")
    if cfg.resume and (cfg.overwrite or not cfg.out_dir):
        raise ConfigError("--resume: goes with --out_dir FOLDER and without --overwrite")


def refuse_unread(cfg, name, why):
    if getattr(cfg, name) != getattr(Config, name):
        raise ConfigError(f"--{name}: would not be read, {why}; leave it out")


def fill_defaults(cfg):
    """Every knob that this run reads gets a value; the others stay None."""
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    values = DEFAULTS | DEFAULTS_OF.get(cfg.loss, {})
    read = ["steps", "lr", *knobs(cfg.loss)]
    if not cfg.init:
        read += ["n_layer", "n_head", "n_embd", "block_size"]
        read += ["sft_steps", "sft_lr"] if cfg.loss != "sft" else []
    filled = {name: values[name] for name in read if getattr(cfg, name) is None}
    if cfg.out_dir is None:
        names = [f"out/{cfg.loss}"] + [f"out/{cfg.loss}-{n}" for n in range(2, 10000)]
        filled["out_dir"] = next(name for name in names if runs.is_free(Path(name)))
    return dataclasses.replace(
        cfg, **filled, device=device, dtype=cfg.dtype or ("float32" if device == "cpu" else "bfloat16"),
        micro_batch_tokens=cfg.micro_batch_tokens or (2048 if device == "cpu" else 32768))


def parse_flags(argv):
    """argv -> Config. Names, types and help of the flags are those of Config's fields."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))
    parser = argparse.ArgumentParser("train.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS)
    parser.error = fail
    for field in dataclasses.fields(Config):
        name, text = "--" + field.name, comments[field.name].replace("%", "%%")
        if "bool" in str(field.type):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        elif field.name in LISTS:
            parser.add_argument(name, nargs="+", help=text)
        else:
            kind = field.type if isinstance(field.type, type) else field.type.__args__[0]
            parser.add_argument(name, type=kind, help=text, metavar=kind.__name__.upper())
    given = vars(parser.parse_args(argv))
    if "aspect_weights" in given:
        words = " ".join(given["aspect_weights"]).replace(",", " ").split()
        try:
            given["aspect_weights"] = [float(word) for word in words]
        except ValueError:
            raise ConfigError(f"--aspect_weights {' '.join(words)}: must be numbers") from None
    if given.get("resume") and "out_dir" in given:  # what is not said again stays as it was
        then = runs.read_run(given["out_dir"])["config"]
        given = {name: then[name] for name in comments.keys() & then.keys() - {"overwrite"}} | given
    return Config(**given)


def fail(message):
    """Bad input: one clear line (or the lines of a file that are wrong) and exit status 2."""
    ranks.yield_to_main()
    print(f"train.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------
# One micro-batch


def micro_batches(cfg, pairs, index=None):
    """The micro-batches of some pairs, or of all."""
    index = np.arange(len(pairs)) if index is None else index
    return data.micro_batches(pairs, index, cfg.micro_batch_size, cfg.micro_batch_tokens)


def head(policy, hidden, target, reference=None, ref_hidden=None, with_kl=False):
    """Hidden states (N, C) of response tokens -> log pi, log pi_ref, KL(pi_ref || pi): each (N,) or None."""
    centered = torch.is_autocast_enabled(hidden.device.type)  # in bfloat16, where large logits lose digits
    logits = policy.logits(hidden, centered)  # (N, V); nothing of this size outlives a chunk
    logps = losses.token_logps(logits, target)
    if ref_hidden is None:
        return logps, None, None
    with torch.no_grad():
        ref_logits = reference.logits(ref_hidden, centered)  # (N, V)
        ref_logps = losses.token_logps(ref_logits, target)
    return logps, ref_logps, losses.token_kl(ref_logits, logits) if with_kl else None


class Engine:
    """The two models of a run and how they are called: precision, compilation, stored reference."""

    def __init__(self, cfg, policy, reference, score_maximum=None):
        self.cfg, self.policy, self.reference = cfg, policy, reference
        self.loss, self.needs = LOSSES[cfg.loss], parameters(cfg.loss)
        self.knobs = {name: getattr(cfg, name) for name in knobs(cfg.loss)}
        self.needs_kl, self.segmented = "chosen_seq_kl" in self.needs, "chosen_rewards" in self.needs
        large = policy.config.vocab_size > 10_000 and ranks.world() == 1 and can_compile()
        self.compiles = cfg.device != "cpu" and large if cfg.compile is None else cfg.compile
        self.trunk, self.head, self.ref_trunk = policy, head, reference
        if self.compiles:
            torch._dynamo.config.recompile_limit = 32  # two models, with gradient and without, B = 1 and more
            self.trunk = torch.compile(policy, dynamic=True)  # policy and reference themselves stay eager
            self.ref_trunk = torch.compile(reference, dynamic=True) if reference else None
        if self.compiles or cfg.compile is None and large:
            self.head = torch.compile(head, dynamic=True)  # fewer passes over the logits, and copies
        logits = 2**24 if cfg.device == "cpu" else 2**28  # 64 MB and 1 GB in float32
        self.head_tokens = cfg.head_tokens or max(1, logits // policy.config.vocab_size)
        self.stores = {}  # split -> Store; without one the reference is live
        if self.segmented:
            A, like = len(score_maximum), {"device": cfg.device, "dtype": policy.wte.weight.dtype}
            self.aspect_weights = torch.tensor(cfg.aspect_weights or [1 / A] * A, **like)  # (A,)
            self.score_maximum = torch.tensor(score_maximum, **like)  # (A,)

    def precision(self):
        """bfloat16 is autocast over float32 weights; float32 and float64 are the weights' own."""
        if self.cfg.dtype == "bfloat16":
            return torch.autocast(torch.device(self.cfg.device).type, torch.bfloat16)
        return nullcontext()

    def collate(self, pairs, index):
        batch = data.collate([pairs[i] for i in index], multiple=64 if self.compiles else 1)
        return batch.to(self.cfg.device)

    def hidden(self, trunk, batch):
        """The hidden state that predicts each response token, (N, C)."""
        mask = None if self.cfg.loss == "sft" else batch.mask()  # a row of one response is causal
        with self.precision():
            hidden = trunk(batch.tokens, batch.positions, mask)  # (B, T, C)
        row, column = batch.source
        return hidden[row, column]

    def run_pairs(self, pairs, index, split, scale=None):
        """Losses and log-probabilities of some pairs, {name: (B,)}; given a scale, adds the gradient of
        scale * sum of the losses to the policy's.

        The trunk runs once. The head and the loss run on a few whole pairs at a time, each chunk with its own
        backward into the hidden states: a pair's loss needs only its own tokens, so this is exact, and the
        logits of the whole batch never exist. One backward through the trunk ends it.
        """
        batch = self.collate(pairs, index)
        ref_logps, ref_hidden = self.reference_of(split, index, batch)
        hidden = self.hidden(self.trunk, batch)  # (N, C)
        grad, chunks = torch.zeros_like(hidden), []
        for first, end in batch.chunks(self.head_tokens):
            n = slice(batch.starts[first], batch.starts[end])
            leaf = hidden[n].detach().requires_grad_(scale is not None)
            with self.precision():
                logps, live_logps, kl = self.head(
                    self.policy, leaf, batch.target[n], self.reference,
                    None if ref_hidden is None else ref_hidden[n], with_kl=self.needs_kl or scale is None)
            part_ref_logps = live_logps if ref_logps is None else ref_logps[n]
            terms = self.terms(batch, first, end, logps, part_ref_logps, kl)
            loss = self.loss(**{name: terms[name] for name in self.needs if name in terms}, **self.knobs)
            if scale is not None:
                (scale * loss.sum()).backward()
                grad[n] = leaf.grad
            chunks.append({"loss": loss} | terms)
        if scale is not None:
            hidden.backward(grad)
        # what is (B, S), by segment, becomes the pair's sum
        return {name: torch.cat([c[name].detach().reshape(len(c["loss"]), -1).sum(-1) for c in chunks])
                for name in chunks[0]}

    def terms(self, batch, first, end, logps, ref_logps, kl):
        """All that a loss may ask for by name, for the pairs first ... end - 1 of a batch."""
        n, pairs, S = slice(batch.starts[first], batch.starts[end]), end - first, batch.scores.shape[2]
        response, segment = batch.response[n] - 2 * first, batch.segment[n] - 2 * first * S

        def sums(values):  # (n,) -> chosen, rejected, each (pairs,), or (pairs, S) for a loss on segments
            if self.segmented:
                return losses.segment_sum(values, segment, 2 * pairs * S).view(pairs, 2, S).unbind(1)
            return losses.segment_sum(values, response, 2 * pairs).view(pairs, 2).unbind(1)

        terms = {}
        terms["chosen_logps"], terms["rejected_logps"] = sums(logps)
        if ref_logps is not None:
            terms["ref_chosen_logps"], terms["ref_rejected_logps"] = sums(ref_logps)
        if kl is not None:
            terms["chosen_seq_kl"], terms["rejected_seq_kl"] = sums(kl)
        if self.segmented:
            scores = batch.scores[first:end] / self.score_maximum  # (pairs, 2, S, A)
            terms["chosen_rewards"], rejected = losses.segment_rewards(scores, self.aspect_weights).unbind(1)
            terms["rejected_rewards"] = 1 - rejected if self.cfg.rejected_weight == "badness" else rejected
            terms["chosen_mask"], terms["rejected_mask"] = batch.segment_mask[first:end].unbind(1)
        return terms

    def reference_of(self, split, index, batch):
        """What the reference says of a batch: stored log-probabilities (N,), or hidden states (N, C)."""
        if self.reference is None:
            return None, None
        if split not in self.stores:
            with torch.no_grad():
                return None, self.hidden(self.ref_trunk, batch)
        values = data.move(self.stores[split].look_up(index), self.cfg.device)
        return (values, None) if values.dim() == 1 else (None, values)


# ---------------------------------------------------------------------------------------------------------
# The reference, evaluated once


class Store:
    """Numbers of the reference for each response token of some pairs, in a memory-mapped file."""

    def __init__(self, path, pairs, index, dtype):
        self.values, self.dtype = np.load(path, mmap_mode="r+"), dtype
        self.first, self.end = np.zeros((2, len(pairs)), dtype=np.int64)
        counts = pairs.rows[index, 2:4].sum(-1)  # C + R
        self.end[index] = np.cumsum(counts)
        self.first[index] = self.end[index] - counts

    def look_up(self, index):
        """(N,) or (N, C), in the order of collate."""
        values = np.concatenate([self.values[self.first[i]:self.end[i]] for i in index])
        return torch.from_numpy(values).view(self.dtype)

    def put(self, index, values):
        """Keep what look_up of the same pairs is to return."""
        values, n = values.to("cpu", self.dtype), 0
        values = (values.view(torch.int16) if self.dtype == torch.bfloat16 else values).numpy()
        for i in index:
            count = self.end[i] - self.first[i]
            self.values[self.first[i]:self.end[i]] = values[n:n + count]
            n += count


def first_reads(pairs, cfg):
    """The micro-batches in which training first reads each pair. The reference is evaluated in these, so that
    its numbers do not depend, not by a rounding, on --steps or on where the run was resumed."""
    seen, micros = np.zeros(len(pairs), dtype=bool), []
    for step in range(cfg.steps):
        index = data.step_indices(len(pairs), cfg.batch_size, cfg.seed, step)
        index = np.unique(index[~seen[index]])
        seen[index] = True
        micros += micro_batches(cfg, pairs, index)
        if seen.all():
            break
    return micros


def store_reference(engine, pairs, micros, split, folder, ref_hash):
    """Run the reference once over these pairs. What is kept are log-probabilities, or where a KL is wanted
    the final hidden states, from which the reference's head is evaluated chunk by chunk.
    """
    cfg, index = engine.cfg, np.concatenate(micros)
    of_hidden = engine.needs_kl or split == "val"  # an evaluation reports the KL whatever the loss
    dtype = DTYPES[cfg.dtype] if of_hidden or cfg.dtype == "float64" else torch.float32
    n_tokens = int(pairs.rows[index, 2:4].sum())
    shape = (n_tokens, engine.reference.config.n_embd) if of_hidden else (n_tokens,)
    size = math.prod(shape) * dtype.itemsize / 1e9
    if not cfg.ref_cache or size > cfg.ref_cache_gb:
        why = f"{size:.1f} GB, --ref_cache_gb {cfg.ref_cache_gb:g}" if cfg.ref_cache else "--no-ref_cache"
        return say(f"reference: live in every step of {split} ({why})")
    path, note = folder / f"reference-{split}.npy", folder / f"reference-{split}.json"
    identity = [1, ref_hash, str(dtype), shape, runs.array_hash(pairs.ids, pairs.rows[index])]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    what = f"{'hidden states' if of_hidden else 'log-probabilities'} of {len(index)} {split} pairs"
    try:
        stored = runs.read_json(note, ("key", "sha256"))
        fresh = (stored["key"], stored["sha256"]) == (key, runs.file_hash(path))
        say(f"reference: {what} {'are' if fresh else 'made again: others, or damaged ones, are'} in {path}")
    except (OSError, ValueError):
        fresh = False

    def write(part):
        if not ranks.rank():
            kind = np.int16 if dtype == torch.bfloat16 else str(dtype)[6:]
            np.lib.format.open_memmap(part, "w+", kind, shape)
            if hasattr(os, "posix_fallocate"):  # claims the room: a full disk under a map is a bus error
                with open(part, "r+b") as f:
                    os.posix_fallocate(f.fileno(), 0, part.stat().st_size)
        ranks.wait()  # the file is there
        store, share = Store(part, pairs, index, dtype), micros[ranks.rank()::ranks.world()]
        for micro in bar(share, f"reference ({split})", unit=" batches", delay=2, leave=False):
            batch = engine.collate(pairs, micro)
            hidden = engine.hidden(engine.ref_trunk, batch)
            for first, end in batch.chunks(engine.head_tokens):
                n = slice(batch.starts[first], batch.starts[end])
                values = hidden[n]
                if not of_hidden:
                    with engine.precision():
                        values, _, _ = engine.head(engine.reference, values, batch.target[n])
                store.put(micro[first:end], values)
        store.values.flush()
        ranks.wait()  # it is full

    if not fresh:
        with torch.no_grad():
            if ranks.rank():
                write(runs.part_of(path))  # all ranks into one file, which rank 0 makes and renames
            else:
                runs.write_atomically(path, write)
        ranks.wait()
        runs.write_json(note, {"key": key, "sha256": runs.file_hash(path)})
        say(f"reference: {what} stored, {n_tokens} tokens, {size * 1e3:.1f} MB")
    engine.stores[split] = Store(path, pairs, index, dtype)


# ---------------------------------------------------------------------------------------------------------
# Numbers


def metrics_of(engine, rows, n_tokens):
    """{name: number} over the pairs of a step or of an evaluation; README.md explains each name."""
    t = {name: torch.cat([row[name] for row in rows]).double() for name in rows[0]}  # (B,)
    if engine.cfg.loss == "sft":
        return {"loss": t["loss"].sum().item() / n_tokens, "logps/chosen": t["chosen_logps"].mean().item()}
    beta = engine.cfg.beta
    chosen_logratio = t["chosen_logps"] - t["ref_chosen_logps"]
    rejected_logratio = t["rejected_logps"] - t["ref_rejected_logps"]
    margins = beta * (chosen_logratio - rejected_logratio)
    m = {"loss": t["loss"],
         "rewards/chosen": beta * chosen_logratio,
         "rewards/rejected": beta * rejected_logratio,
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
def evaluate(engine, pairs, log=None, step=None):
    """The metrics over held-out pairs, for the log too."""
    micros = micro_batches(engine.cfg, pairs)
    rows = ranks.gather([engine.run_pairs(pairs, micro, "val")
                         for micro, _ in ranks.share(micros, engine.policy)], len(pairs))
    ranks.reshard(engine.policy)
    m = metrics_of(engine, rows, int(pairs.rows[:, 2].sum()))
    if log:
        log.write({"step": step} | {f"eval/{name}": value for name, value in m.items()})
    return m


def speed(engine, rows, seconds, rate):
    """What the pairs with these rows, done in so many seconds, say of the machine; rate is its FLOP/s."""
    return {"pairs_per_s": len(rows) / seconds, "tokens_per_s": float(rows[:, 1:4].sum() / seconds),
            "mfu": float(useful_flops(engine.policy.config, rows) / seconds / rate)}


# ---------------------------------------------------------------------------------------------------------
# The machine


def tune_allocator():
    """For Linux CPUs, before the first tensor. glibc takes large buffers fresh from the kernel and gives them
    back when they are freed; the pages of a chunk's logits would be cleared anew for every chunk, a tenth of
    a step. So all memory is to come from the heap, of which up to 1 GB at the end may stay unused."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, bytes


def can_compile():
    """torch.compile on the CPU and on cuda needs a C++ compiler and Python's headers."""
    return bool(shutil.which("g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()


def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize(device)


def matmul_rate(device, dtype):
    """FLOP/s of this device's own matrix product: what mfu compares with."""
    n = 512 if device == "cpu" else 8192
    a, best = torch.randn(n, n, device=device).to(dtype), math.inf
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def useful_flops(config, rows):
    """Forward and backward of the policy over pairs with these rows: no padding, nothing computed twice."""
    P, C, R = rows[:, 1], rows[:, 2], rows[:, 3]
    tokens, n = P + C + R, config.n_embd
    seen = (P * (P + 1) + C * (C + 1) + R * (R + 1)) / 2 + P * (C + R)  # pairs of a query and a key
    trunk = config.n_layer * (24 * n * n * tokens + 4 * n * seen)
    return 3.0 * (trunk + 2 * n * config.vocab_size * (C + R)).sum()


def peak_memory(device):
    """Bytes: the most that the GPU's allocator held, or the process's largest resident size."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated(device)


# ---------------------------------------------------------------------------------------------------------
# What a run is made of


@ranks.only_main
def say(text):
    tqdm.write(text)


def bar(items, name, *sizes, **options):
    return tqdm(items, name, *sizes, **options, disable=ranks.rank() > 0)


def load_tokenizer(cfg):
    """The tokenizer of the flags, or that of --init, which the flags may only repeat."""
    if cfg.init and cfg.init not in NAMES and not Path(cfg.init).is_dir():
        raise ConfigError(f"--init {cfg.init}: no such folder; choose one, or a name: {', '.join(NAMES)}")
    if not (tokenizer := data.own_tokenizer(cfg.init)):
        return data.Tokenizer(cfg.tokenizer or ("gpt2" if cfg.data or cfg.init else TOY[2]))
    if cfg.tokenizer and data.Tokenizer(cfg.tokenizer).hash != tokenizer.hash:
        raise ConfigError(f"--tokenizer {cfg.tokenizer}: --init {cfg.init} has another one; leave it out")
    return tokenizer


def load_model(flag, cfg, tokenizer):
    """The model of --init or --ref, checked against the tokenizer, the flags and the data's positions."""
    name = getattr(cfg, flag)
    model = GPT.from_pretrained(name, vocab_multiple=ALIGN)
    c = model.config
    if c.vocab_size != tokenizer.vocab_size:
        raise ConfigError(f"--{flag} {name}: has {c.vocab_size} token ids, the tokenizer "
                          f"{tokenizer.vocab_size}; choose the tokenizer it was trained with")
    if flag == "ref" and (own := data.own_tokenizer(name)) and own.hash != tokenizer.hash:
        raise ConfigError(f"--ref {name}: has another tokenizer than the policy; choose a reference that "
                          "reads the same token ids")
    for key in ("n_layer", "n_head", "n_embd") if flag == "init" else ():
        if getattr(cfg, key) not in (None, getattr(c, key)):
            raise ConfigError(f"--{key} {getattr(cfg, key)}: {name} has {getattr(c, key)}; leave it out")
    if (cfg.block_size or 0) > c.block_size:
        raise ConfigError(f"--block_size {cfg.block_size}: --{flag} {name} has {c.block_size} positions")
    for key, p in model.named_parameters():
        if not p.isfinite().all():
            raise ConfigError(f"--{flag} {name}: {key} holds NaN or infinity; choose an intact model")
    return model.to(cfg.device, torch.float64 if cfg.dtype == "float64" else torch.float32)


def load_data(cfg, tokenizer):
    """(training pairs, held-out pairs, lines to print). Large files are tokenised once, into OUT_DIR/data."""
    def load(files):
        large = sum(file.stat().st_size for file in data.list_files(files) if file.exists()) > STORE_FROM
        store = Path(cfg.out_dir) / "data" if large else None
        return data.load(files, tokenizer, cfg.block_size, store)

    pairs, notes = load(cfg.data or TOY[:1])
    if cfg.val_data or not cfg.data:
        val, more = load(cfg.val_data or TOY[1:2])
        notes += more
    else:
        pairs, val = data.hold_out(pairs)
        notes.append(f"held out, by prompt: {len(val)} pairs; {len(pairs)} are left to train on")
    if "chosen_rewards" in parameters(cfg.loss):
        A = pairs.n_aspects
        if not A or not val.n_aspects:
            raise ConfigError(f"--loss {cfg.loss}: needs scores in every segment of every pair, and "
                              '"scores": [] is none; tools/doctor.py --segment writes the form to fill in')
        if {val.n_aspects, len(cfg.aspect_weights) or A} != {A}:
            raise ConfigError(f"--aspect_weights: {len(cfg.aspect_weights)} weights for {A} aspects "
                              f"({val.n_aspects} in the held-out pairs)")
    return pairs, val, notes


def identity_of(cfg, pairs, val, tokenizer, init_hash, ref_hash):
    """All that determines the numbers of a run but its length: what --resume and a reused SFT compare."""
    names = ("loss", "beta", "lam", "alpha", "rejected_weight", "seed", "batch_size", "lr", "warmup_steps",
             "weight_decay", "grad_clip", "n_layer", "n_head", "n_embd", "block_size", "dtype")
    identity = {"format": 2} | {name: getattr(cfg, name) for name in names}
    identity["aspect_weights"] = list(cfg.aspect_weights)
    for name, part in (("data", pairs), ("val_data", val)):
        identity[name] = runs.array_hash(part.ids, part.segments, part.scores, part.rows)
    return identity | {"tokenizer": tokenizer.hash, "init": init_hash, "ref": ref_hash}


def make_reference(cfg, pairs, val, tokenizer):
    """The folder of an SFT model for this run's data and sizes: an earlier run's, or trained now."""
    sft = dataclasses.replace(
        cfg, loss="sft", steps=cfg.sft_steps, lr=cfg.sft_lr, sft_steps=None, sft_lr=None, beta=None, lam=None,
        alpha=None, aspect_weights=(), rejected_weight=None, ref=None, ref_cache=True,
        ref_cache_gb=Config.ref_cache_gb, overwrite=False, eval_every=0, save_every=0,
        log_every=max(cfg.log_every, 50))
    identity = identity_of(sft, pairs, val, tokenizer, None, None)
    for number in range(1, 10000):
        folder = Path(cfg.out_dir).parent / ("sft" if number == 1 else f"sft-{number}")
        begun = (folder / "run.json").exists()
        if folder.resolve() == Path(cfg.out_dir).resolve():
            continue
        if begun:
            run = runs.read_run(folder)
            if run["identity"] != identity or run["config"]["steps"] != sft.steps:
                continue
            if run["finished"]:
                say(f"no --init: the reference is the SFT model in {folder}, made by an earlier run")
                return str(folder)
        elif not runs.is_free(folder):
            continue
        say(f"no --init: first a reference, by SFT on the chosen responses, into {folder}")
        train(dataclasses.replace(sft, out_dir=str(folder), resume=begun), nested=True)
        say(f"now {cfg.loss}, starting from {folder}" + ", which is also its reference" * (not cfg.ref))
        return str(folder)


def set_up(cfg, nested):
    """Check everything before the run writes anything (tokens of large data are kept from here on); returns
    cfg without gaps, the Engine, the tokenizer, training and held-out pairs, and the run's identity."""
    lists = {name: (x,) if isinstance(x, str | Path) else tuple(x) if isinstance(x, list) else x
             for name in LISTS for x in [getattr(cfg, name)]}
    cfg = dataclasses.replace(cfg, **lists)
    check_flags(cfg)
    cfg = fill_defaults(cfg)
    runs.check_free(Path(cfg.out_dir), {"init": cfg.init, "ref": cfg.ref}, cfg.resume, cfg.overwrite)
    ranks.start(cfg.device)  # all have seen the folders before one writes
    for file in data.list_files([*cfg.data, *cfg.val_data]):
        try:
            file.stat()  # before the tokenizer, which may have an error of its own
        except OSError as e:
            raise data.DataError(f"{file}: {e.strerror}") from None
    tokenizer = load_tokenizer(cfg)
    if not cfg.init:
        sizes = GPTConfig(tokenizer.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)
    policy = load_model("init", cfg, tokenizer) if cfg.init else None
    cfg = dataclasses.replace(cfg, block_size=cfg.block_size or policy.config.block_size)
    reference = load_model("ref", cfg, tokenizer) if cfg.ref else None
    pairs, val, notes = load_data(cfg, tokenizer)
    if not nested:
        say("\n".join(notes))
    if policy is None and cfg.loss != "sft":
        folder = make_reference(cfg, pairs, val, tokenizer)
        cfg = dataclasses.replace(cfg, init=folder, sft_steps=None, sft_lr=None)
        policy = load_model("init", cfg, tokenizer)
    elif policy is None:
        torch.manual_seed(cfg.seed)
        policy = GPT(sizes, vocab_multiple=ALIGN)
        policy.to(cfg.device, torch.float64 if cfg.dtype == "float64" else torch.float32)
    c = policy.config
    cfg = dataclasses.replace(cfg, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd)
    if cfg.loss != "sft":
        start = Path(cfg.init) / "run.json"
        if not cfg.ref and start.exists() and (loss := runs.read_run(cfg.init)["config"]["loss"]) != "sft":
            say(f"--init {cfg.init} is itself the result of {loss}; without --ref it is now the reference")
        cfg = dataclasses.replace(cfg, ref=cfg.ref or cfg.init)
        reference = (reference or load_model("ref", cfg, tokenizer)).requires_grad_(False)
    folders = {name: str(Path(value).resolve()) for name in ("init", "ref")
               if (value := getattr(cfg, name)) and value not in NAMES}
    cfg = dataclasses.replace(cfg, **folders)  # run.json is read from other places too
    init_hash = runs.weights_hash(policy) if cfg.init else None
    ref_hash = runs.weights_hash(reference) if reference else None
    ranks.shard(policy)
    engine = Engine(cfg, policy, reference, pairs.score_maximum() if pairs.n_aspects else None)
    identity = identity_of(cfg, pairs, val, tokenizer, init_hash, ref_hash)
    if cfg.loss == "sft":
        pairs, val = pairs.chosen_only(), val.chosen_only()
    return cfg, engine, tokenizer, pairs, val, identity


# ---------------------------------------------------------------------------------------------------------
# The loop


def accumulate(engine, pairs, index):
    """Add the gradient of the mean loss of these pairs (SFT: per token) to the policy's. Returns the rows of
    run_pairs and, in their order, the line of the file that each pair comes from."""
    micros, n_tokens = micro_batches(engine.cfg, pairs, index), int(pairs.rows[index, 2].sum())
    scale = 1 / (n_tokens if engine.cfg.loss == "sft" else len(index))  # the one division of the whole step
    rows = [engine.run_pairs(pairs, micro, "train", scale * weight)
            for micro, weight in ranks.share(micros, engine.policy)]
    return ranks.gather(rows, len(index)), [pairs.where[i] for i in np.concatenate(micros)]


def train(cfg, nested=False):
    """Run cfg to its end; returns the final metrics on the held-out pairs. nested: SFT of a preference run.

    Raises ConfigError, data.DataError or ModelError for bad input, RunError where a run cannot go on.
    """
    try:
        cfg, engine, tokenizer, pairs, val, identity = set_up(cfg, nested)
    except OSError as e:  # a name that is too long, a folder that may not be searched
        raise ConfigError(f"{e.filename}: {e.strerror}") from None
    policy, folder = engine.policy, Path(cfg.out_dir)
    matrices = [p for p in policy.parameters() if p.dim() == 2]
    others = [p for p in policy.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": cfg.weight_decay},
                                   {"params": others, "weight_decay": 0.0}], lr=cfg.lr, fused=True)
    lock = runs.claim(folder, identity, cfg.resume, cfg.overwrite) or nullcontext()  # rank 0 has it
    with lock, finish_on_signal() as signals:
        state = runs.load_checkpoint(folder, policy, optimizer, identity, say) if cfg.resume else None
        start, before, after = (state["step"], state["before"], state["after"]) if state else (0, None, None)
        if start > cfg.steps:
            raise ConfigError(f"--steps {cfg.steps}: the run is at step {start} already; choose more")
        if start == cfg.steps and runs.read_run(folder)["finished"] == start:
            say(f"{folder}: finished at step {start}; more --steps would go on from there")
            return after
        scored = pairs.n_aspects and cfg.loss != "sft"
        run = {"config": dataclasses.asdict(cfg), "identity": identity, "finished": None,
               "score_maximum": pairs.score_maximum().tolist() if scored else None}
        runs.write_json(folder / "run.json", run)
        log = runs.Log(folder / "log.jsonl", start, run | header(cfg, engine, pairs, val, start))
        if engine.reference:
            of_val = micro_batches(cfg, val)
            store_reference(engine, pairs, first_reads(pairs, cfg), "train", folder, identity["ref"])
            store_reference(engine, val, of_val, "val", folder, identity["ref"])
            if len(engine.stores) == 2:
                engine.reference.h = engine.ref_trunk = None  # only its head is needed from here on
            else:
                ranks.shard(engine.reference)
        rate = matmul_rate(cfg.device, torch.bfloat16 if cfg.dtype == "bfloat16" else policy.wte.weight.dtype)
        rate *= ranks.world()
        if not state:
            before = evaluate(engine, val, log, 0)
            if identity["ref"] and identity["ref"] == identity["init"]:
                say(f"before the first step: {health.check_start(cfg, before)}")

        if start == cfg.steps:  # a kill came between the last checkpoint and the result
            after = evaluate(engine, val)

        def note(step, text):
            say(f"  {text}")
            log.write({"step": step, "note": text})

        watch, clock, seen = health.Watch(note), time.perf_counter(), []
        for step in bar(range(start + 1, cfg.steps + 1), cfg.loss, cfg.steps, initial=start, unit=" steps"):
            index = data.step_indices(len(pairs), cfg.batch_size, cfg.seed, step - 1)
            rows, where = accumulate(engine, pairs, index)
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip or math.inf)
            norm = watch.before_update(step, rows, ranks.whole(norm), where)
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1, step / max(1, cfg.warmup_steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seen.append(index)

            if step % cfg.log_every == 0 or step in (1, cfg.steps):
                m = metrics_of(engine, rows, int(pairs.rows[index, 2].sum()))
                m |= {"grad_norm": norm, "lr": group["lr"], "peak_memory": peak_memory(cfg.device)}
                m |= speed(engine, pairs.rows[np.concatenate(seen)], time.perf_counter() - clock, rate)
                log.write({"step": step} | m)
                say(line_of(step, m))
                watch.after_log(step, m)
                clock, seen = time.perf_counter(), []
            paused, stopped = time.perf_counter(), ranks.agree(signals)
            last = step == cfg.steps or bool(stopped)
            if last or cfg.eval_every and step % cfg.eval_every == 0:
                after = evaluate(engine, val, log, step)
                if not math.isfinite(after["loss"]):
                    raise RunError(f"step {step}: the held-out loss is {after['loss']} after the update; not "
                                   "saved, the checkpoints are intact; is --lr far too large?")
                if cfg.loss != "sft":
                    say(f"  held-out: loss {after['loss']:.4f}, accuracy {after['rewards/accuracies']:.3f}; "
                        f"{health.verdict(step, after, cfg.loss)}")
            if last or cfg.save_every and step % cfg.save_every == 0:
                runs.save_checkpoint(folder, step, policy, optimizer, identity,
                                     {"before": before, "after": after})
            clock += time.perf_counter() - paused
            if stopped and step < cfg.steps:
                how = f"with\n  python train.py --resume --out_dir {shlex.quote(str(folder))}"
                say(f"{stopped[0].name}: stopped after step {step} and saved; go on "
                    + ("by the same command again" if nested else how))
                raise SystemExit(128 + stopped[0])

        def write_result(aside):
            policy.save_pretrained(aside, eos=tokenizer.eot)
            tokenizer.save(aside)

        ranks.unshard(policy)
        runs.write_folder(folder, write_result)
        runs.write_json(folder / "run.json", run | {"finished": cfg.steps})
    report(cfg, engine, tokenizer, val, before, after, nested)
    ranks.wait()
    return after


@contextmanager
def finish_on_signal():
    """SIGINT and SIGTERM let the step end first; yields the list of what arrived. A second one kills."""
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


# ---------------------------------------------------------------------------------------------------------
# What is printed


def device_name(device):
    if device == "cpu":
        return f"CPU, {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)
    return torch.cuda.get_device_name(device)


def header(cfg, engine, pairs, val, start):
    """The rest of what is needed to repeat the run: the first record of log.jsonl."""
    policy = engine.policy
    padding = (policy.wte.num_embeddings - policy.config.vocab_size) * policy.config.n_embd
    parameters = sum(p.numel() for p in policy.parameters()) - padding
    device = f"{ranks.world()} ranks, " * (ranks.world() > 1) + device_name(cfg.device)
    say(f"{cfg.loss}: {parameters:,} parameters, {len(pairs)} pairs, {cfg.steps} steps of {cfg.batch_size}, "
        f"{device}, {cfg.dtype}" + f", going on after step {start}" * bool(start))
    return {"resumed_at": start, "parameters": parameters, "pairs": len(pairs), "held_out": len(val),
            "python": platform.python_version(), "torch": torch.__version__, "device": device}


def line_of(step, m):
    """One log line: the numbers of this step."""
    line = f"step {step:5d}  loss {m['loss']:.4f}"
    if "rewards/margins" in m:
        line += (f"  acc {m['rewards/accuracies']:.2f}  margin {m['rewards/margins']:+.3f}  "
                 f"log-ratio chosen {m['logratio/chosen']:+.2f} rejected {m['logratio/rejected']:+.2f}")
    return line + f"  |grad| {m['grad_norm']:.2f}  {m['pairs_per_s']:.0f} pairs/s"


TABLE = {  # metric -> its name in the final table
    "loss": "loss",
    "rewards/accuracies": "reward accuracy (a tie counts 1/2)",
    "rewards/margins": "reward margin",
    "logratio/chosen": "log-ratio of chosen, nats",
    "logratio/rejected": "log-ratio of rejected, nats",
    "kl/ref_policy_chosen": "KL(ref || policy) per chosen, nats",
    "kl/ref_policy_rejected": "KL(ref || policy) per rejected, nats",
}


@ranks.only_main
def report(cfg, engine, tokenizer, val, before, after, nested):
    """The table over held-out pairs, two answers side by side, and what to type next."""
    say(f"\n{f'{len(val)} held-out pairs':36}{'before':>10}{'after':>10}")
    for metric in [name for name in TABLE if name in after]:
        name = "loss per token, nats" if cfg.loss == "sft" else TABLE[metric]
        note = accuracy_note(cfg) if metric == "rewards/accuracies" else ""
        say(f"{name:36}{before[metric]:10.4f}{after[metric]:10.4f}{note}")
    say("")
    if nested:
        return
    if cfg.loss != "sft":
        reference = GPT.from_pretrained(cfg.ref).to(engine.policy.wte.weight)  # the run kept only its head
        prompts = {tuple(val[i].prompt.tolist()) for i in range(len(val))}
        for prompt in sorted(prompts, key=len)[:2]:
            say(f"prompt     {tokenizer.decode(prompt).strip()}")
            for name, model in (("reference", reference), ("policy", engine.policy)):
                say(f"{name:10} {answer(model, tokenizer, prompt, cfg.seed)}")
            say("")
    folder = shlex.quote(cfg.out_dir)
    say(f"saved in {folder}: model.safetensors, config.json, tokenizer, run.json, log.jsonl, checkpoints")
    if cfg.loss == "sft":
        flags = "".join(f" --{name} {shlex.join(map(str, getattr(cfg, name)))}"
                        for name in ("data", "val_data") if getattr(cfg, name))
        say(f"next: python train.py --loss dpo --init {folder}{flags}")
    else:
        say(f"next: python sample.py {folder} --heat --prompt {shlex.quote(tokenizer.decode(val[0].prompt))}")


def answer(model, tokenizer, prompt, seed):
    """A sampled answer, temperature 0.7: the same for the same seed."""
    device = model.wte.weight.device
    tokens = model.generate(torch.tensor([prompt], device=device), 64, temperature=0.7, eos=tokenizer.eot,
                            generator=torch.Generator(device).manual_seed(seed))
    return tokenizer.decode(t for t in tokens[0, len(prompt):].tolist() if t != tokenizer.eot).strip()


def accuracy_note(cfg):
    """What label noise allows, where NAME.meta.json beside the one held-out file NAME.jsonl tells."""
    files = cfg.val_data or (() if cfg.data else TOY[1:2])
    if len(files) != 1:
        return ""
    try:
        meta = Path(str(files[0]).removesuffix(".gz")).with_suffix(".meta.json")
        ceiling = runs.read_json(meta, ["accuracy_ceiling"])["accuracy_ceiling"]
        return f"   ceiling {ceiling:.4f}, the labels are noisy"
    except (OSError, ValueError, TypeError):
        return ""


def main(argv=None):
    tune_allocator()
    try:
        train(parse_flags(argv))
        ranks.stop()
    except (ConfigError, data.DataError, ModelError) as e:
        fail(e)
    except RunError as e:
        ranks.yield_to_main()
        sys.exit(f"train.py: {e}")
    except OSError as e:  # of standard output, or of a disk that fails while it is read
        sys.exit(f"train.py: {e}; what was saved before is intact")
    except (MemoryError, torch.OutOfMemoryError) as e:
        sys.exit(f"train.py: out of memory ({str(e).split('.')[0]}); a smaller --head_tokens or "
                 "--micro_batch_tokens needs less, and changes no result")
    except RuntimeError as e:
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            sys.exit(f"train.py: torch.compile failed ({str(e).splitlines()[0]:.160}); --no-compile does "
                     "without it")
        if not ranks.is_lost(e):
            raise
        ranks.yield_to_main()
        sys.exit(f"train.py: rank {ranks.rank()}: another rank has ended, or hangs; the checkpoints are "
                 f"intact, --resume goes on with any number of ranks ({str(e).splitlines()[0]:.160})")
    except KeyboardInterrupt:  # before the first step, or a second one
        if not ranks.rank():
            print("train.py: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    main()
