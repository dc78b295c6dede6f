"""argparse from Config, every check of a flag, and the defaults, filled in once."""

import argparse
import dataclasses
import inspect
import math
import os
import re
from pathlib import Path

import torch

from data import DataError, Tokenizer, hold_out
from losses import LOSSES, SELECTING, knobs_of, terms_of
from model import GPTConfig, ModelError
from plumbing import formats, machine, pretrained, ranks, report, vocab
from plumbing.errors import ConfigError
from plumbing.folder import check_free, is_free, read_run

ROOT = Path(__file__).resolve().parent.parent
TOY = tuple(ROOT / "toy" / name for name in ("reviews-train.jsonl", "reviews-heldout.jsonl", "toy.tiktoken"))

DEFAULTS = {"beta": 0.1, "lam": 50.0, "alpha": 0.5, "steps": 40, "lr": 5e-5, "sft_steps": 150, "sft_lr": 2e-3,
            "n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 256}
DEFAULTS_OF = {"dpop": {"beta": 0.3}, "sft": {"steps": 150, "lr": 2e-3}}  # the papers'; SFT is ours
LISTS = ("data", "val_data", "aspect_weights")
DTYPES = ("float32", "bfloat16", "float64")
AT_LEAST = {"steps": 1, "batch_size": 1, "micro_batch_size": 1, "micro_batch_tokens": 1, "sft_steps": 1,
            "n_layer": 1, "n_head": 1, "n_embd": 1, "block_size": 2, "log_every": 1, "head_tokens": 1,
            "seed": 0, "warmup_steps": 0, "weight_decay": 0, "grad_clip": 0, "lam": 0, "alpha": 0,
            "eval_every": 0, "save_every": 0}


def has_reference(loss):
    return any(name.startswith("ref_") for name in terms_of(loss))


# ---------------------------------------------------------------------------------------------------------
# argv -> what was typed


def with_knobs(Config):
    """Config with a field for each hyper-parameter of a loss that it lacks, so that a new loss edits nothing.

    Returns (the class, {field: its help}).
    """
    known = {field.name for field in dataclasses.fields(Config)}
    new = {name: loss.__name__ for loss in LOSSES.values() for name in knobs_of(loss) if name not in known}
    if not new:
        return Config, {}
    fields = [(name, float | None, dataclasses.field(default=None)) for name in new]
    return (dataclasses.make_dataclass("Config", fields, bases=(Config,), frozen=True),
            {name: f"hyper-parameter of {function}" for name, function in new.items()})


def parse(Config, argv):
    """argv -> Config as typed. Names, types, groups and help of the flags are those of Config's lines."""
    source = inspect.getsource(Config)
    Config, comments = with_knobs(Config)
    groups = {}
    for line in source.splitlines():
        if title := re.fullmatch(r"    # (.*)", line):
            group = title[1]
        elif field := re.match(r"    (\w+): .*?  # (.*)$", line):
            comments[field[1]], groups[field[1]] = field[2], group
    parser = argparse.ArgumentParser(
        "train.py", usage="python train.py [--FLAG VALUE ...]", allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Train a policy on preference pairs. Without flags: the toy reviews, SFT, then DPO.")
    parser.error = lambda message: report.fail("train.py", message)
    sections = {}
    for field in dataclasses.fields(Config):
        group = groups.get(field.name, "the loss")
        section = sections.setdefault(group, None) or parser.add_argument_group(group)
        sections[group] = section
        name, text = "--" + field.name, comments[field.name].replace("%", "%%")
        if "default" not in text and field.default not in (None, ()):
            text += f"; default {field.default}"
        if "bool" in str(field.type):
            section.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        elif field.name in LISTS:
            section.add_argument(name, nargs="+", help=text)
        else:
            kind = field.type if isinstance(field.type, type) else field.type.__args__[0]
            section.add_argument(name, type=kind, help=text, metavar=kind.__name__.upper())
    given = vars(parser.parse_args(argv))
    if "aspect_weights" in given:
        words = " ".join(given["aspect_weights"]).replace(",", " ").split()
        try:
            given["aspect_weights"] = [float(word) for word in words]
        except ValueError:
            raise ConfigError(f"--aspect_weights {' '.join(words)}: must be numbers") from None
    if given.get("resume") and "out_dir" in given:  # what is not said again stays as it was
        then = read_run(given["out_dir"])["config"]
        given = {name: then[name] for name in comments.keys() & then.keys() - {"overwrite"}} | given
    for name in LISTS:
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    return Config(**given)


# ---------------------------------------------------------------------------------------------------------
# Checks


def check(cfg):
    """Refuse values of a wrong type or out of range, and knobs that this run would not read."""
    for field in dataclasses.fields(cfg):  # flags have their types; an edited run.json may not
        value, kinds = getattr(cfg, field.name), getattr(field.type, "__args__", (field.type,))
        also = {float: (int,), str: (Path,)}.get(kinds[0], ())
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
    n_embd, n_layer = cfg.n_embd or DEFAULTS["n_embd"], cfg.n_layer or DEFAULTS["n_layer"]
    if (size := n_embd * (12 * n_layer * n_embd + (cfg.block_size or 1))) > 1e11:
        raise ConfigError(f"--n_layer, --n_embd, --block_size: a model of {size:.0e} parameters or more; "
                          "choose smaller ones")
    weights = cfg.aspect_weights
    if weights and not (all(w >= 0 for w in weights) and math.isclose(sum(weights), 1, abs_tol=1e-6)):
        raise ConfigError(f"--aspect_weights {' '.join(map(str, weights))}: must be >= 0 and sum to 1")
    if cfg.resume and (cfg.overwrite or not cfg.out_dir):
        raise ConfigError("--resume: goes with --out_dir FOLDER and without --overwrite")
    check_knobs(cfg)
    check_device(cfg)


def check_knobs(cfg):
    """Refuse what the chosen loss, by its signature, would not read."""
    loss = LOSSES[cfg.loss]
    of_any_loss = {name for function in LOSSES.values() for name in knobs_of(function)}
    for name in sorted(of_any_loss - knobs_of(loss).keys()):
        refuse_unread(cfg, name, f"the loss {cfg.loss} has none")
    if "chosen_rewards" not in terms_of(loss):
        for name in ("aspect_weights", "rejected_weight"):
            refuse_unread(cfg, name, f"the loss {cfg.loss} has no segments")
    if not has_reference(loss):
        refuse_unread(cfg, "ref", f"the loss {cfg.loss} has no reference")
    pairwise = "rejected_logps" in terms_of(loss)
    if not pairwise or cfg.init and not cfg.resume:  # --resume may repeat the first command's flags
        for name in ("sft_steps", "sft_lr"):
            refuse_unread(cfg, name, "no SFT is run before this one")
    if cfg.rejected_weight == "badness" and loss in SELECTING:
        raise ConfigError(f"--rejected_weight badness: not with {cfg.loss}, whose Eq. 6 selects by the same "
                          "score: 1 - score would select the best rejected segments")


def refuse_unread(cfg, name, why):
    if getattr(cfg, name) != type(cfg).__dataclass_fields__[name].default:
        raise ConfigError(f"--{name}: would not be read, {why}; leave it out")


def check_device(cfg):
    if cfg.device is None:
        return
    try:
        kind = torch.device(cfg.device).type
    except RuntimeError:
        raise ConfigError(f"--device {cfg.device}: choose cpu, cuda, cuda:N or mps") from None
    if not machine.usable(cfg.device):
        raise ConfigError(f"--device {cfg.device}: torch cannot use it here; choose cpu")
    if kind == "mps" and cfg.dtype == "float64":
        raise ConfigError("--dtype float64: mps has none; choose float32")
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world()))
    if ranks.world() > 1 and kind != "cpu" and (cfg.device != "cuda" or local > gpus):
        raise ConfigError(f"--device {cfg.device}: each of {local} ranks takes one of {gpus} GPUs; choose "
                          f"cuda and torchrun --nproc_per_node {gpus} at most, or cpu")


def check_model(flag, name, model, cfg):
    """Refuse a model that does not go with the flags, or holds NaN."""
    c = model.config
    for key in ("n_layer", "n_head", "n_embd") if flag == "init" else ():
        if getattr(cfg, key) != getattr(c, key):
            raise ConfigError(f"--{key} {getattr(cfg, key)}: {name} has {getattr(c, key)}; leave it out")
    if cfg.block_size > c.block_size:
        raise ConfigError(f"--block_size {cfg.block_size}: --{flag} {name} has {c.block_size} positions")
    for key, p in model.named_parameters():
        if not p.isfinite().all():
            raise ConfigError(f"--{flag} {name}: {key} holds NaN or infinity; choose an intact model")


def check_vocabulary(flag, name, size, tokenizer):
    """A model may have more rows than its own tokenizer's text has ids: added tokens, and rows that pad the
    table. They are in the softmax, as where it was trained, but no text becomes them and none is sampled."""
    if size < tokenizer.vocab_size or size > tokenizer.vocab_size and not vocab.is_in(name):
        raise ConfigError(f"--{flag} {name}: has {size} token ids, the tokenizer {tokenizer.vocab_size}; "
                          "choose the tokenizer it was trained with, or put its files into the folder")


# ---------------------------------------------------------------------------------------------------------
# The whole way


def resolve(Config, argv):
    """argv -> (Config in which every knob that the run reads has its value, Tokenizer).

    The start's and the reference's config.json are read here, the weights and the data later.
    Raises ConfigError, DataError or ModelError, in one line, before anything is written.
    """
    cfg = parse(Config, argv)
    check(cfg)
    out_dir, flag = cfg.out_dir or free_folder(cfg.loss), "out_dir"
    try:
        check_free(Path(out_dir), {"init": cfg.init, "ref": cfg.ref}, cfg.resume, cfg.overwrite)
        for flag in ("data", "val_data"):
            for file in formats.list_files(getattr(cfg, flag)):
                file.stat()
    except OSError as e:  # no such file, a name that is too long, a folder that may not be searched
        raise ConfigError(f"--{flag} {e.filename}: {e.strerror}") from None
    device = cfg.device or machine.best_device()
    ranks.start(device)  # all have seen the folders before one writes
    sizes, ref = model_sizes("init", cfg.init), model_sizes("ref", cfg.ref)  # first: no model, no tokenizer
    tokenizer = load_tokenizer(cfg)
    for flag, model in (("init", sizes), ("ref", ref)):
        if model:
            check_vocabulary(flag, getattr(cfg, flag), model.vocab_size, tokenizer)
    if cfg.ref and vocab.is_in(cfg.ref) and Tokenizer(cfg.ref).hash != tokenizer.hash:
        raise ConfigError(f"--ref {cfg.ref}: has another tokenizer than the policy; choose a reference "
                          "that reads the same token ids")
    if ref and ref.vocab_size != (rows := sizes.vocab_size if sizes else tokenizer.vocab_size):
        raise ConfigError(f"--ref {cfg.ref}: has {ref.vocab_size} token ids, the policy {rows}; choose a "
                          "reference with the same rows")
    if sizes and (stops := pretrained.stops_of(pretrained.folder_of(cfg.init))) not in ([], [tokenizer.eot]):
        report.say(f"--init {cfg.init} ends its texts at id {', '.join(map(str, stops))} (eos_token_id); "
                   f"responses end in {vocab.EOT} here, id {tokenizer.eot}, and so will the saved model's")
    filled = defaults_of_loss(cfg) | defaults_of_model(cfg, sizes)
    filled |= defaults_of_machine(cfg, device, tokenizer)
    cfg = dataclasses.replace(cfg, out_dir=out_dir, device=device,
                              **{name: value for name, value in filled.items() if getattr(cfg, name) is None})
    if not sizes:
        GPTConfig(tokenizer.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)  # may refuse
    return dataclasses.replace(cfg, pack=packs(cfg)), tokenizer


def free_folder(loss):
    names = [f"out/{loss}"] + [f"out/{loss}-{n}" for n in range(2, 10000)]
    return next(name for name in names if is_free(Path(name)))


def defaults_of_loss(cfg):
    """Steps, learning rate and the hyper-parameters that the loss reads."""
    values, loss = DEFAULTS | DEFAULTS_OF.get(cfg.loss, {}), LOSSES[cfg.loss]
    filled = {"steps": values["steps"], "lr": values["lr"]}
    for name, default in knobs_of(loss).items():
        filled[name] = values.get(name) if default is None else default
        if getattr(cfg, name) is None and filled[name] is None:
            raise ConfigError(f"--{name}: the loss {cfg.loss} needs it; it has no default")
    return filled


def defaults_of_model(cfg, sizes):
    """Sizes of the start, or of a new model and the SFT that trains it."""
    if sizes:
        return {name: getattr(sizes, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    read = ["n_layer", "n_head", "n_embd", "block_size"]
    read += ["sft_steps", "sft_lr"] if "rejected_logps" in terms_of(LOSSES[cfg.loss]) else []
    return {name: DEFAULTS[name] for name in read}


def defaults_of_machine(cfg, device, tokenizer):
    """Precision, compilation, and how much is computed at once."""
    kind, large = torch.device(device).type, tokenizer.vocab_size > 10_000
    cuda, why_not = kind == "cuda", machine.cannot_compile() if large else None
    if cuda and why_not and cfg.compile is None:
        report.say(f"torch.compile is off: {why_not} on this machine")
    pays = large and not why_not and kind in ("cpu", "cuda") and ranks.world() == 1
    return {"dtype": "bfloat16" if cuda else "float32",
            "compile": pays and cuda,
            "compile_head": pays if cfg.compile is None else cfg.compile,
            "micro_batch_tokens": 32768 if cuda else 2048,
            "head_tokens": max(1, (2**28 if cuda else 2**24) // tokenizer.vocab_size)}


def packs(cfg):
    """--pack, by default where FlexAttention has a kernel for the run. Without one, the mask of a packed row
    on a GPU would be as large as the row squared."""
    if torch.device(cfg.device).type != "cuda":
        return bool(cfg.pack)
    wanting = {"--compile": not cfg.compile, "float32 or bfloat16": cfg.dtype == "float64",
               "16 channels a head": cfg.n_embd < 16 * cfg.n_head}
    missing = [need for need, is_missing in wanting.items() if is_missing]
    if cfg.pack and missing:
        raise ConfigError(f"--pack: FlexAttention on cuda needs {' and '.join(missing)}; --no-pack does "
                          "without it")
    return not missing if cfg.pack is None else cfg.pack


def sft_before(cfg):
    """The Config of the SFT run that makes the start of a preference run without --init."""
    reset = {name: None for name in knobs_of(LOSSES[cfg.loss])} | {"rejected_weight": None, "ref": None}
    return dataclasses.replace(
        cfg, loss="sft", steps=cfg.sft_steps, lr=cfg.sft_lr, sft_steps=None, sft_lr=None, aspect_weights=(),
        overwrite=False, eval_every=0, save_every=0, log_every=max(cfg.log_every, 50), **reset)


def model_sizes(flag, name):
    """The GPTConfig of --init or --ref, or None."""
    if name is None:
        return None
    if name not in pretrained.NAMES and not os.path.isdir(name):  # False for a name that is too long, too
        raise ConfigError(f"--{flag} {name}: no such folder; choose one, or a name: "
                          f"{', '.join(pretrained.NAMES)}")
    try:
        return pretrained.read_config(pretrained.folder_of(name))
    except ModelError as e:
        raise ConfigError(f"--{flag}: {e}") from None


def load_tokenizer(cfg):
    """The tokenizer of the flags, or that of --init, which the flags may only repeat."""
    own = Tokenizer(cfg.init) if cfg.init and vocab.is_in(cfg.init) else None
    try:
        given = Tokenizer(cfg.tokenizer) if cfg.tokenizer else None
    except DataError as e:
        raise ConfigError(f"--tokenizer: {e}") from None
    if own and given and given.hash != own.hash:
        raise ConfigError(f"--tokenizer {cfg.tokenizer}: --init {cfg.init} has another one; leave it out")
    return own or given or Tokenizer("gpt2" if cfg.data or cfg.init else TOY[2])


def load_data(cfg, tokenizer):
    """(training pairs, held-out pairs), and what was read is printed."""
    alone = "rejected_logps" not in terms_of(LOSSES[cfg.loss])
    pairs, notes = formats.load(cfg.data or TOY[:1], tokenizer, cfg.block_size, alone)
    if cfg.val_data or not cfg.data:
        val, more = formats.load(cfg.val_data or TOY[1:2], tokenizer, cfg.block_size, alone)
        notes += more
        held, trained = set(val.keys(0, 3)), set(pairs.keys(0, 3))
        if held & trained:
            notes.append(f"{len(held & trained)} of {len(held)} held-out pairs are training pairs too")
    else:
        pairs, val = hold_out(pairs)
        notes.append(f"held out, by prompt: {len(val)} pairs; {len(pairs)} are left to train on")
    if "chosen_rewards" in terms_of(LOSSES[cfg.loss]):
        A = pairs.n_aspects
        if not A or not val.n_aspects:
            raise DataError(f"--loss {cfg.loss}: needs scores in every segment of every pair, and "
                            '"scores": [] is none; tools/doctor.py --segment writes the form to fill in')
        if {val.n_aspects, len(cfg.aspect_weights) or A} != {A}:
            raise ConfigError(f"--aspect_weights: {len(cfg.aspect_weights)} weights for {A} aspects "
                              f"({val.n_aspects} in the held-out pairs)")
    report.say("\n".join(notes))
    return pairs, val
