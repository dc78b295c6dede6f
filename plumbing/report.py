"""What is printed: lines, the table, what numbers usually mean, and errors in one line."""

import dataclasses
import math
import os
import platform
import shlex
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from data import DataError
from model import GPT, ModelError
from plumbing import machine, ranks
from plumbing.errors import ConfigError, RunError


@ranks.only_main
def say(text):
    tqdm.write(text)


def bar(items, name, *sizes, **options):
    return tqdm(items, name, *sizes, **options, disable=ranks.rank() > 0)


# ---------------------------------------------------------------------------------------------------------
# A run's lines


def header(cfg, policy, pairs, val):
    """What is needed to repeat the run, besides its Config: for the first record of log.jsonl."""
    padding = (policy.wte.num_embeddings - policy.config.vocab_size) * policy.config.n_embd
    device = machine.device_name(cfg.device)
    return {"parameters": sum(p.numel() for p in policy.parameters()) - padding,
            "pairs": len(pairs), "held_out": len(val), "python": platform.python_version(),
            "torch": torch.__version__,
            "device": f"{ranks.world()} ranks, {device}" if ranks.world() > 1 else device}


def headline(cfg, about, first):
    line = (f"{cfg.loss}: {about['parameters']:,} parameters, {about['pairs']} pairs, {cfg.steps} steps of "
            f"{cfg.batch_size}, {about['device']}, {cfg.dtype}")
    return line + (f", going on after step {first}" if first else "")


def sft_first(folder, finished):
    if finished:
        say(f"no --init: the start is the SFT model in {folder}, made by an earlier run")
    else:
        say(f"no --init: first a start, by SFT on the chosen responses, into {folder}")


def check_start(found, expected, tolerance):
    """Raise RunError unless the loss before the first step is the loss at policy = reference."""
    if not abs(found - expected) <= tolerance:  # NaN too
        raise RunError(f"policy and reference are equal, yet the loss is {found:.6f}, not {expected:.6f}: "
                       "please report this")
    name = " = log 2" if abs(expected - math.log(2)) < 1e-6 else ""
    say(f"before the first step: loss {found:.4f}{name}, as it must be where the policy is the reference")
    if tolerance > 0.05:
        say(f"  in this precision rounding alone can move this loss by {tolerance:.2f}, from the first step "
            "on; --dtype float32 is steadier")


def line_of(step, m):
    """One log line: the numbers of this step."""
    line = f"step {step:5d}  loss {m['loss']:.4f}"
    if "rewards/accuracies" in m:
        line += f"  acc {m['rewards/accuracies']:.2f}"
    if "rewards/margins" in m:
        line += (f"  margin {m['rewards/margins']:+.3f}  "
                 f"log-ratio chosen {m['logratio/chosen']:+.2f} rejected {m['logratio/rejected']:+.2f}")
    return line + f"  |grad| {m['grad_norm']:.2f}  {m['pairs_per_s']:.0f} pairs/s"


def held_out_line(step, m, cfg):
    numbers = f"loss {m['loss']:.4f}, accuracy {m['rewards/accuracies']:.3f}"
    return f"  held-out: {numbers}; {verdict(step, m, cfg)}"


def alarms(step, m):
    """{name: one line} on numbers that usually mean a mistake."""
    chosen, found = m.get("logratio/chosen", 0.0), {}
    if "rewards/margins" in m and step >= 50 and m["rewards/margins"] == 0:
        found["stuck"] = "the margin is still exactly 0: nothing is learned; is --lr far too small?"
    if step <= 5 and m.get("rewards/accuracies", 0) == 1:
        found["early"] = ("accuracy 1.0 this early: does something cheap give the answer away? "
                          "See tools/doctor.py")
    if chosen < -10:
        found["unlearned"] = (f"chosen is {-chosen:.1f} nats below the reference, good answers are unlearned "
                              "too: a smaller --lr or a larger --beta slows it, dpop is made against it")
    return found


def verdict(step, m, cfg):
    """One line on what the numbers usually mean."""
    chosen, rejected = m.get("logratio/chosen", 0.0), m.get("logratio/rejected", 0.0)
    for text in alarms(step, m).values():
        return text
    if rejected < chosen < 0:
        why = "the penalty lam is active" if getattr(cfg, "lam", None) else "common, DPOP is made against it"
        return f"rejected falls faster; chosen is {-chosen:.1f} nats below the reference: {why}"
    if rejected < 0 < chosen:
        return f"chosen rises by {chosen:.1f} nats, rejected falls by {-rejected:.1f}"
    if 0 < rejected < chosen:
        return f"both rise, chosen faster: {chosen:.1f} and {rejected:.1f} nats above the reference"
    if chosen < rejected:
        return f"chosen {chosen:+.1f}, rejected {rejected:+.1f} nats: on average the rejected response gains"
    return "no remark"


def unhealthy_step(step, terms, norm, places):
    """Why a run stopped before an update that would have destroyed it; names the pairs."""
    more = f" and {len(places) - 8} more" if len(places) > 8 else ""
    return (f"step {step}: mean loss {terms['loss'].mean().item():g}, gradient norm {norm.item():g}; stopped "
            f"before the update, the checkpoints are intact. Pairs: {', '.join(places[:8])}{more}")


def stopped(number, step, cfg):
    say(f"{number.name}: stopped after step {step} and saved; go on with\n"
        f"  python train.py --resume --out_dir {shlex.quote(cfg.out_dir)}\n"
        "or, where this is the SFT before another run, with that run's command again")


# ---------------------------------------------------------------------------------------------------------
# The end of a run

TABLE = {  # metric -> its name in the final table
    "loss": "loss",
    "rewards/accuracies": "reward accuracy (a tie counts 1/2)",
    "rewards/margins": "reward margin",
    "logratio/chosen": "log-ratio of chosen, nats",
    "logratio/rejected": "log-ratio of rejected, nats",
    "kl/ref_policy_chosen": "KL(ref || policy) per chosen, nats",
    "kl/ref_policy_rejected": "KL(ref || policy) per rejected, nats",
}


def table(cfg, n, before, after):
    """The metrics over n held-out pairs, before and after."""
    say(f"\n{f'{n} held-out pairs':36}{'before':>10}{'after':>10}")
    for metric in [name for name in TABLE if name in after]:
        name = TABLE[metric] if "rewards/accuracies" in after else "loss per token, nats"
        note = ceiling(cfg) if metric == "rewards/accuracies" else ""
        say(f"{name:36}{before[metric]:10.4f}{after[metric]:10.4f}{note}")
    say("")


def ceiling(cfg):
    """What label noise allows, where NAME.meta.json beside the one held-out file NAME.jsonl tells."""
    from plumbing.files import read_json
    from plumbing.flags import TOY
    files = cfg.val_data or (() if cfg.data else TOY[1:2])
    if len(files) != 1:
        return ""
    try:
        meta = Path(str(files[0]).removesuffix(".gz")).with_suffix(".meta.json")
        best = read_json(meta, ["accuracy_ceiling"])["accuracy_ceiling"]
        return f"   ceiling {best:.4f}, the labels are noisy"
    except (OSError, ValueError, TypeError):
        return ""


@ranks.only_main
def answers_and_next(cfg, tokenizer, val, policy, ref):
    """Two answers side by side, and what to type next. policy: None where the run was finished before."""
    if policy is None:
        return
    if ref:
        reference = GPT.from_pretrained(ref).to(policy.wte.weight)
        prompts = {tuple(val[i].prompt.tolist()) for i in range(len(val))}
        for prompt in sorted(prompts, key=len)[:2]:
            say(f"prompt     {tokenizer.decode(prompt).strip()}")
            for name, model in (("reference", reference), ("policy", policy)):
                with sampling(model, tokenizer), machine.eager():
                    say(f"{name:10} {answer(model, tokenizer, prompt, cfg.seed)}")
            say("")
    folder = shlex.quote(cfg.out_dir)
    say(f"saved in {folder}: model.safetensors, config.json, tokenizer, run.json, log.jsonl, checkpoints")
    if ref:
        say(f"next: python sample.py {folder} --heat --prompt {shlex.quote(tokenizer.decode(val[0].prompt))}")
    else:
        files = [f"--{name} {shlex.join(map(str, getattr(cfg, name)))}" for name in ("data", "val_data")
                 if getattr(cfg, name)]
        say(" ".join([f"next: python train.py --loss dpo --init {folder}", *files]))


def answer(model, tokenizer, prompt, seed):
    """A sampled answer, temperature 0.7: the same for the same seed."""
    device = model.wte.weight.device
    tokens = model.generate(torch.tensor([prompt], device=device), 64, temperature=0.7, eos=tokenizer.eot,
                            generator=torch.Generator(device).manual_seed(seed))
    return tokenizer.decode(t for t in tokens[0, len(prompt):].tolist() if t != tokenizer.eot).strip()


@contextmanager
def sampling(model, tokenizer):
    """Inside, the model's head ends at the tokenizer's last id: rows beyond it, added tokens and padding, are
    never sampled."""
    config = model.config
    model.config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    try:
        yield
    finally:
        model.config = config


# ---------------------------------------------------------------------------------------------------------
# Errors


def fail(program, message):
    """Bad input: one clear line (or the lines of a file that are wrong) and exit status 2."""
    ranks.yield_to_main()
    print(f"{program}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def one_line_errors(program):
    """What goes wrong becomes one line and an exit status: 2 for bad input, 1 for a run that cannot go on."""
    if sys.stderr is None:  # under pythonw, or after 2>&-, where a progress bar would be an error
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (ConfigError, DataError, ModelError) as e:
        fail(program, e)
    except RunError as e:
        ranks.yield_to_main()
        sys.exit(f"{program}: {e}")
    except BrokenPipeError:  # the reader, head or less, has seen enough
        sys.stdout = None
        sys.exit(0)
    except OSError as e:  # of standard output, or of a disk that fails while it is read
        sys.exit(f"{program}: {e}; what was saved before is intact")
    except Exception as e:
        if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e):
            sys.exit(f"{program}: out of memory ({str(e).splitlines()[0] if str(e) else 'no room':.160}); a "
                     "smaller --head_tokens or --micro_batch_tokens needs less, and changes no result")
        if type(e).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
            sys.exit(f"{program}: torch.compile failed ({str(e).splitlines()[0]:.160}); --no-pack may do, "
                     "--no-pack --no-compile does without it")
        if not ranks.is_lost(e):
            raise
        ranks.yield_to_main()
        sys.exit(f"{program}: rank {ranks.rank()}: another rank has ended, or hangs; the checkpoints are "
                 f"intact, --resume goes on with any number of ranks ({str(e).splitlines()[0]:.160})")
    except KeyboardInterrupt:  # before the first step, or a second one
        if not ranks.rank():
            print(f"{program}: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
