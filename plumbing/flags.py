"""From argv to a Config in which every knob has its value, and to the data: every check of a flag."""

import argparse
import math
import os
import typing
from dataclasses import replace
from pathlib import Path

import torch

import data
from losses import LOSSES, SELECTING, TERMS, knobs_of, terms_of
from model import GPTConfig
from plumbing import machine, pairs, pretrained, ranks, report, vocab
from plumbing.errors import ConfigError, DataError
from plumbing.folder import check_free, files_of, read_run

ROOT = Path(__file__).resolve().parent.parent
TOY = tuple(str(ROOT / "toy" / f) for f in ("reviews-train.jsonl", "reviews-heldout.jsonl", "toy.tiktoken"))

def has_reference(loss):
    return any(name.startswith("ref_") or name.endswith("_seq_kl") for name in terms_of(loss))

def is_pairwise(loss):
    return "rejected_logps" in terms_of(loss)

# ---- argv -> what was typed -> Config ----
def parse(Config, argv):
    """argv -> {name: value} of the flags that were typed: Config's fields, the losses' hyper-parameters."""
    parser = argparse.ArgumentParser(
        "train.py", usage="python train.py [--FLAG VALUE ...]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train a policy on preference pairs. Without flags: the toy reviews, SFT, then DPO.")
    parser.error = lambda message: report.fail(Path(report.PROGRAM).name, message)
    fields = {name: field for name, field in Config.__dataclass_fields__.items() if name != "settings"}
    for name, field in fields.items():
        text = field.metadata["help"].replace("%", "%%")
        if field.default not in (None, ()) and field.type is not bool:
            text += f"; default {field.default}"
        kind = next(kind for kind in typing.get_args(field.type) or (field.type,) if kind is not type(None))
        how = {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"nargs": "+"}}.get(kind) or {
            "type": kind, "metavar": kind.__name__.upper(), "choices": field.metadata["choices"]}
        parser.add_argument("--" + name, help=text, **how)
    for knob in dict.fromkeys(knob for loss in LOSSES.values() for knob in knobs_of(loss)):
        readers = [f"{name} {knobs_of(x)[knob]}" for name, x in LOSSES.items() if knob in knobs_of(x)]
        parser.add_argument("--" + knob, type=float, metavar="FLOAT",
                            help="hyper-parameter of the loss; default: " + ", ".join(readers))
    typed = {k: tuple(x) if isinstance(x, list) else x for k, x in vars(parser.parse_args(argv)).items()}
    if empty := [name for name, x in typed.items() if x == "" or isinstance(x, tuple) and "" in x]:
        raise ConfigError(f"--{empty[0]}: is empty (an unset variable?); leave it out for the default")
    if "aspect_weights" in typed:
        try:
            typed["aspect_weights"] = tuple(float(w) for x in typed["aspect_weights"] for w in x.split(","))
        except ValueError as e:
            raise ConfigError(f"--aspect_weights: {e}") from None
    return typed

def configure(Config, typed):
    """{name: value} -> Config. What was not typed is as in the run to resume, or as Config and the loss have
    it; SFT has defaults of its own."""
    given = dict(typed)
    if given.get("resume"):
        if not given.get("out_dir") or given.get("overwrite"):
            raise ConfigError("--resume: goes with --out_dir FOLDER and without --overwrite")
        then = read_run(given["out_dir"])["config"] | {"overwrite": False}
        given = {name: tuple(x) if isinstance(x, list) else x for name, x in then.items()} | given
    if (name := given.get("loss", Config.loss)) not in LOSSES:
        raise ConfigError(f"--loss {name}: choose from {', '.join(LOSSES)}")
    settings = {knob: given.get(knob, default) for knob, default in knobs_of(LOSSES[name]).items()}
    if missing := [knob for knob, value in settings.items() if value is None]:
        raise ConfigError(f"--{missing[0]}: the loss {name} needs it; it has no default")
    if not is_pairwise(LOSSES[name]):
        given = {"steps": Config.sft_steps, "lr": Config.sft_lr} | given
    fields = Config.__dataclass_fields__.keys() & given.keys()
    return Config(**{name: given[name] for name in fields}, settings=settings)

# ---- Checks ----
def check(cfg, typed):
    """Refuse values out of range, a loss that asks for an unknown term, and flags that it does not read."""
    for name, field in cfg.__dataclass_fields__.items():
        value, low = getattr(cfg, name), field.metadata.get("at_least")
        if low is not None and value is not None and not low <= value < 2**63:
            raise ConfigError(f"--{name} {value}: must be at least {low} and below 2^63")
    for name, value in ({"lr": cfg.lr, "sft_lr": cfg.sft_lr} | cfg.settings).items():
        if not 0 <= value < math.inf or value == 0 and name in ("lr", "sft_lr", "beta"):
            raise ConfigError(f"--{name} {value}: must be positive and finite")
    if (size := cfg.n_embd * (12 * cfg.n_layer * cfg.n_embd + cfg.block_size)) > 1e11:
        raise ConfigError(f"--n_layer, --n_embd, --block_size: {size:.0e} parameters; choose less")
    weights, loss = cfg.aspect_weights, LOSSES[cfg.loss]
    if weights and not (all(w >= 0 for w in weights) and math.isclose(sum(weights), 1, abs_tol=1e-6)):
        raise ConfigError(f"--aspect_weights {' '.join(map(str, weights))}: must be >= 0 and sum to 1")
    if unknown := [name for name in terms_of(loss) if name not in TERMS]:
        raise ConfigError(f"--loss {cfg.loss}: asks for {', '.join(unknown)}; a loss may ask for "
                          f"{', '.join(TERMS)}")
    unread = {knob: f"the loss {cfg.loss} has none" for other in LOSSES.values() for knob in knobs_of(other)
              if knob not in cfg.settings}
    if "chosen_rewards" not in terms_of(loss):
        unread |= dict.fromkeys(("aspect_weights", "rejected_weight"), f"the loss {cfg.loss} has no segments")
    if not has_reference(loss):
        unread["ref"] = f"the loss {cfg.loss} has no reference"
    if not is_pairwise(loss) or cfg.init and not cfg.resume:  # --resume may repeat the first command's flags
        unread |= dict.fromkeys(("sft_steps", "sft_lr"), "no SFT is run before this one")
    refuse_unread(typed, unread)
    if cfg.rejected_weight == "badness" and loss in SELECTING:
        raise ConfigError(f"--rejected_weight badness: not with {cfg.loss}, whose Eq. 6 selects by the same "
                          "score: 1 - score would select the best rejected segments")
    if cfg.device:
        check_device(cfg)

def refuse_unread(typed, unread):
    """unread: {flag: why nothing would read it}."""
    for name, why in unread.items():
        if name in typed:
            raise ConfigError(f"--{name}: would not be read, {why}; leave it out")

def check_device(cfg):
    if not machine.usable(cfg.device):
        raise ConfigError(f"--device {cfg.device}: torch cannot use it here; choose cpu, cuda, cuda:N or mps")
    if cfg.device == "mps" and cfg.dtype == "float64":
        raise ConfigError("--dtype float64: mps has none; choose float32")
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world()))
    if ranks.world() > 1 and cfg.device != "cpu" and (cfg.device != "cuda" or local > gpus):
        raise ConfigError(f"--device {cfg.device}: {local} ranks take a GPU each, of {gpus}; choose cuda and "
                          f"torchrun --nproc_per_node {gpus} at most, or cpu")

def check_model(flag, name, model, cfg):
    """Refuse a model with too few positions, or that holds NaN."""
    if cfg.block_size > model.config.block_size:
        raise ConfigError(f"--block_size {cfg.block_size}: --{flag} {name} has {model.config.block_size}")
    for key, p in model.named_parameters():
        if not p.isfinite().all():
            raise ConfigError(f"--{flag} {name}: {key} holds NaN or infinity; choose an intact model")

def check_tokens(flag, name, sizes, tokenizer):
    """Refuse a model for other ids than the tokenizer's. It may have more rows than its own tokenizer's text
    has ids, added tokens or padding: they are in the softmax, no text becomes them, none is sampled."""
    has_own = vocab.is_in(name)
    if sizes.vocab_size < tokenizer.vocab_size or sizes.vocab_size > tokenizer.vocab_size and not has_own:
        raise ConfigError(f"--{flag} {name}: has {sizes.vocab_size} token ids, the tokenizer "
                          f"{tokenizer.vocab_size}; choose the tokenizer that it was trained with")
    if has_own and data.Tokenizer(name).hash != tokenizer.hash:
        raise ConfigError(f"--{flag} {name}: has another tokenizer, other ids or another chat template")

# ---- The whole way ----
def resolve(Config, argv):
    """argv -> (Config in which every knob that the run reads has its value, Tokenizer). The start's and the
    reference's config.json are read here, the weights and the data later; nothing is written."""
    typed = parse(Config, argv)
    cfg = configure(Config, typed)
    check(cfg, typed)
    cfg = replace(cfg, out_dir=place_of_run(cfg), device=cfg.device or machine.best_device())
    pairs.files_of(cfg.data + cfg.val_data)  # refused before a tokenizer is looked for
    ranks.start(cfg.device)  # all have seen the folders before one writes
    sizes = {flag: pretrained.read_config(name, GPTConfig)
             for flag, name in (("init", cfg.init), ("ref", cfg.ref)) if name}
    name = cfg.init if cfg.init and vocab.is_in(cfg.init) else "gpt2" if cfg.data or cfg.init else TOY[2]
    tokenizer = data.Tokenizer(cfg.tokenizer or name)  # looked for when the models' sizes have been read
    for flag, found in sizes.items():
        check_tokens(flag, getattr(cfg, flag), found, tokenizer)
    own = sizes.get("init")
    rows = own.vocab_size if own else tokenizer.vocab_size
    if "ref" in sizes and sizes["ref"].vocab_size != rows:
        raise ConfigError(f"--ref {cfg.ref}: has {sizes['ref'].vocab_size} rows, the policy {rows}")
    if own:
        for name in ("n_layer", "n_head", "n_embd"):
            if typed.get(name) not in (None, getattr(own, name)):
                raise ConfigError(f"--{name} {typed[name]}: --init has {getattr(own, name)}; leave it out")
        block_size = cfg.block_size if cfg.resume or "block_size" in typed else own.block_size
        cfg = replace(cfg, n_layer=own.n_layer, n_head=own.n_head, n_embd=own.n_embd, block_size=block_size)
    return for_machine(cfg, rows), tokenizer

def place_of_run(cfg):
    """--out_dir, or the first free one of out/LOSS, out/LOSS-2, ..., and why it is not the first."""
    name = f"out/{cfg.loss}"
    names = (name if n == 1 else f"{name}-{n}" for n in range(1, 10000))
    out_dir = cfg.out_dir or next(name for name in names if not files_of(Path(name)))
    try:
        check_free(Path(out_dir), cfg.resume, cfg.overwrite)
    except OSError as e:  # a name that is too long, a folder that may not be searched
        raise ConfigError(f"--out_dir {e.filename}: {e.strerror}") from None
    for flag, model in (("init", cfg.init), ("ref", cfg.ref)):
        if model and Path(model).resolve() == Path(out_dir).resolve():
            raise ConfigError(f"--out_dir {out_dir}: is --{flag} too; choose another")
    if out_dir not in (cfg.out_dir, name):
        report.say(f"{name} is taken: this run goes into {out_dir}; --overwrite --out_dir {name} replaces it")
    return out_dir

def for_machine(cfg, vocab_size):
    """The Config with what the machine decides: precision, compilation, and how much is computed at once."""
    kind, large = torch.device(cfg.device).type, vocab_size > 10_000
    cuda, can = kind == "cuda", machine.can_compile()
    if cuda and large and not can and cfg.compile is None:
        report.say("torch.compile is off: it needs g++ and Python.h (python3-dev)")
    pays = large and can and kind in ("cpu", "cuda") and ranks.world() == 1
    values = {"dtype": "bfloat16" if cuda else "float32", "compile": pays and cuda,
              "compile_head": pays if cfg.compile is None else cfg.compile,
              "micro_batch_tokens": 32768 if cuda else 2048,
              "head_tokens": max(1, (2**28 if cuda else 2**24) // vocab_size)}
    cfg = replace(cfg, **{name: value for name, value in values.items() if getattr(cfg, name) is None})
    if cfg.dtype == "bfloat16" and "lam" in cfg.settings:  # experiments/bfloat16.py, measured on a CPU
        report.say("bfloat16 decides DPOP's hinge wrongly for 38-47 % of pairs at step 3; no harm "
                   "to accuracy was seen; --dtype float32 is exact")
    return cfg

def sft_before(cfg):
    """The Config of the SFT run that makes the start of a preference run without --init."""
    unread = {name: cfg.__dataclass_fields__[name].default for name in (
        "ref", "overwrite", "sft_steps", "sft_lr", "aspect_weights", "rejected_weight")}
    return replace(cfg, **unread, loss="sft", settings={}, steps=cfg.sft_steps, lr=cfg.sft_lr, eval_every=0,
                   save_every=0, log_every=max(cfg.log_every, 50))

def load_data(cfg, tokenizer):
    """(training pairs, held-out pairs), and what was read is printed."""
    alone = not is_pairwise(LOSSES[cfg.loss])
    pairs, notes = data.load(cfg.data or TOY[:1], tokenizer, cfg.block_size, alone)
    if cfg.val_data or not cfg.data:
        val, more = data.load(cfg.val_data or TOY[1:2], tokenizer, cfg.block_size, alone)
        held, trained = (set(x.hashes("prompt", "chosen", "rejected")) for x in (val, pairs))
        notes += more
        if both := held & trained:
            notes.append(f"{len(both)} of {len(held)} held-out pairs are training pairs too")
    else:
        pairs, val = data.hold_out(pairs)
        notes.append(f"held out, by prompt: {len(val)} pairs; {len(pairs)} are left to train on")
    if "chosen_rewards" in terms_of(LOSSES[cfg.loss]):
        A, W = pairs.n_aspects, len(cfg.aspect_weights)
        if not A or not val.n_aspects:
            raise DataError(f"--loss {cfg.loss}: needs scores in every segment of every pair; "
                            "tools/doctor.py --segment writes the form to fill in")
        if {val.n_aspects, W or A} != {A}:
            raise ConfigError(f"--aspect_weights: {W} weights for {A} aspects ({val.n_aspects} held out)")
    report.say("\n".join(notes))
    return pairs, val
