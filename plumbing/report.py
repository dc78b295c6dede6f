"""What is printed: lines, the table, what numbers usually mean, and errors in one line."""

import math
import platform
import shlex
import signal
import sys
from contextlib import contextmanager

import torch
from tqdm import tqdm

from plumbing import machine, ranks
from plumbing.errors import ConfigError, DataError, ModelError, RunError

PROGRAM = "train.py"  # what goes on with a run; ports/huggingface.py puts its own name here

@ranks.only_main
def say(text):
    tqdm.write(text)

def bar(items, name, *sizes, **options):
    """A progress bar, on rank 0's terminal only."""
    return tqdm(items, name, *sizes, **options, disable=True if ranks.rank() or not sys.stderr else None)

# ---- A run's lines ----
def header(cfg, policy, pairs, val):
    """What is needed to repeat the run, besides its Config: for the first record of log.jsonl."""
    padding = (policy.wte.num_embeddings - policy.config.vocab_size) * policy.config.n_embd
    several = f"{ranks.world()} ranks, " * (ranks.world() > 1)
    return {"parameters": sum(p.numel() for p in policy.parameters()) - padding,
            "pairs": len(pairs), "held_out": len(val), "python": platform.python_version(),
            "torch": torch.__version__, "device": several + machine.device_name(cfg.device)}

def headline(cfg, about, first):
    return (f"{cfg.loss} in {cfg.out_dir}: {about['parameters']:,} parameters, {about['pairs']} pairs, "
            f"{cfg.steps} steps of {cfg.batch_size}, {about['device']}, {cfg.dtype}"
            + f", going on after step {first}" * bool(first))

def sft_first(cfg, folder, finished):
    if cfg.data:
        say(f"no --init: a random model of {cfg.n_layer} layers is trained, as a demonstration. For GPT-2: "
            "python train.py --init gpt2; for any other model: python ports/huggingface.py --init NAME")
    say(f"the start is the SFT model in {folder}, made by an earlier run" if finished else
        f"first a start, by SFT on the chosen responses, into {folder}")

def check_start(m, cfg):
    """Policy and reference are one model: raise RunError unless the first evaluation shows it."""
    nats = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2}[cfg.dtype]
    off = max((abs(m[name]) for name in m if name.startswith(("logratio/", "kl/"))), default=0)
    if not off <= nats:  # NaN too
        raise RunError(f"policy and reference are equal, yet their log-probabilities differ by {off:.2g} "
                       "nats: does the model draw random numbers, or write to its own buffers?")
    name = " = log 2" if abs(m["loss"] - math.log(2)) < 1e-6 else ""
    say(f"before the first step: loss {m['loss']:.4f}{name}, as it must be where the policy is the reference")

def line_of(step, m):
    """One log line: the numbers of this step."""
    shown = {"loss": "loss {:.4f}", "rewards/accuracies": "acc {:.2f}", "rewards/margins": "margin {:+.3f}",
             "logratio/chosen": "log-ratio chosen {:+.2f}", "logratio/rejected": "rejected {:+.2f}",
             "grad_norm": "|grad| {:.2f}", "pairs_per_s": "{:.0f} pairs/s"}
    return f"step {step:5d}  " + "  ".join(text.format(m[name]) for name, text in shown.items() if name in m)

def held_out_line(m, length):
    """length: tokens of the mean chosen response."""
    line = f"  held-out: loss {m['loss']:.4f}, accuracy {m['rewards/accuracies']:.3f}"
    if "rewards/margins" not in m:
        return line
    chosen, rejected = m["logratio/chosen"], m["logratio/rejected"]
    line += f"; log-ratio chosen {chosen:+.2f}, rejected {rejected:+.2f}"
    if -chosen / length > 0.5:
        return line + (f": chosen responses have lost {-chosen / length:.1f} nats a token; a smaller --lr or "
                       "a larger --beta slows it, dpop is made against it")
    return line + ": both fall, which is common" * (rejected < chosen < 0)

def stopped(number, step, cfg):
    say(f"{number.name}: stopped after step {step} and saved; go on with\n"
        f"  python {PROGRAM} --resume --out_dir {shlex.quote(cfg.out_dir)}\n"
        "or, where this is the SFT before another run, with that run's command again")

# ---- The end of a run ----
TABLE = {  # metric -> its name in the final table
    "loss": "loss",
    "rewards/accuracies": "reward accuracy (a tie counts 1/2)",
    "rewards/margins": "reward margin",
    "logratio/chosen": "log-ratio of chosen, nats",
    "logratio/rejected": "log-ratio of rejected, nats",
    "kl/ref_policy_chosen": "KL(ref || policy) per chosen, nats",
    "kl/ref_policy_rejected": "KL(ref || policy) per rejected, nats",
}

def table(n, before, after):
    """The metrics over n held-out pairs, before and after."""
    say(f"\n{f'{n} held-out pairs':36}{'before':>10}{'after':>10}")
    for metric in [metric for metric in TABLE if metric in after]:
        name = TABLE[metric] if "rewards/accuracies" in after else "loss per token, nats"
        say(f"{name:36}{before[metric]:10.4f}{after[metric]:10.4f}")
    say("")

@ranks.only_main
def answers(cfg, tokenizer, val, policy, reference):
    """Two sampled answers side by side."""
    prompts = {tuple(val[i].prompt.tolist()) for i in range(len(val))}
    for prompt in sorted(prompts, key=len)[:2] if reference else []:
        say(f"prompt     {tokenizer.decode(prompt).strip()}")
        for name, model in (("reference", reference), ("policy", policy)):
            say(f"{name:10} {answer(model, tokenizer, prompt, cfg.seed)}")
        say("")

@ranks.only_main
def answers_and_next(cfg, tokenizer, val, policy, reference):
    """The answers, and what to type next."""
    answers(cfg, tokenizer, val, policy, reference)
    folder, files = shlex.quote(cfg.out_dir), {"--data": cfg.data, "--val_data": cfg.val_data}
    say(f"saved in {folder}: model.safetensors, config.json, tokenizer, run.json, log.jsonl, checkpoints")
    if reference:
        say(f"next: python sample.py {folder} --heat --prompt {shlex.quote(tokenizer.decode(val[0].prompt))}")
        return say(f"      python tools/plot.py {folder}")
    words = [f" {flag} {shlex.join(map(str, paths))}" for flag, paths in files.items() if paths]
    say(f"next: python train.py --loss dpo --init {folder}" + "".join(words))

def answer(model, tokenizer, prompt, seed):
    """A sampled answer, temperature 0.7: the same for the same seed."""
    device = model.wte.weight.device
    with machine.eager():
        tokens = model.generate(torch.tensor([prompt], device=device), 64, temperature=0.7, eos=tokenizer.eot,
                                n_ids=tokenizer.vocab_size,
                                generator=torch.Generator(device).manual_seed(seed))
    return tokenizer.decode(t for t in tokens[0, len(prompt):].tolist() if t != tokenizer.eot).strip()

# ---- Errors ----
def fail(program, message):
    """Bad input: one clear line (or the lines of a file that are wrong) and exit status 2."""
    ranks.yield_to_main()
    print(f"{program}: error: {message}", file=sys.stderr)
    raise SystemExit(2)

@contextmanager
def one_line_errors(program):
    """Our four kinds of error become one line: exit status 2 for bad input, 1 for a run that cannot go on.
    Any other exception shows its traceback."""
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
    except KeyboardInterrupt:  # before the first step, or a second one
        sys.exit(128 + signal.SIGINT)
    except Exception as e:
        if "out of memory" in str(e) or "can't allocate memory" in str(e):
            e.add_note("a smaller --head_tokens or --micro_batch_tokens needs less memory, changes no result")
        raise
