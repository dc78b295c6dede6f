"""Answers of a policy beside its reference's: python sample.py OUT_DIR --prompt "..." [--heat]

--heat shows the implicit reward beta log pi(y_t|..)/pi_ref(y_t|..) of every token of the answer: where
training made it likelier than under the reference (green, +) or less likely (red, -).
"""

from train import Config, response_logps  # isort: skip  (first: it sets what torch reads on import)

import argparse
import os
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch

from data import DataError, Pair, Tokenizer, collate
from model import GPT
from plumbing import machine, pairs, vocab
from plumbing.errors import ConfigError
from plumbing.flags import check_vocabulary, model_sizes
from plumbing.folder import read_run, weights_hash
from plumbing.report import fail, one_line_errors, sampling


def read_prompts(path):
    """Prompts, texts or messages, of a file or of stdin for "-"; see plumbing/pairs.py."""
    try:
        return pairs.read_prompts(path)
    except DataError as e:
        raise ConfigError(f"--prompts {e}") from None


def token_rewards(policy, reference, prompt, response, beta):
    """beta log pi(y_t|x,y_<t) / pi_ref(y_t|x,y_<t) of each response token: ids (P,), (N,) -> N numbers.

    They sum to the response's implicit reward, beta log pi(y|x)/pi_ref(y|x).
    """
    none, scores = response[:0], np.zeros((1, 0), dtype=np.float32)
    batch = collate([Pair(prompt, response, none, 0 * response, none, scores, scores[:0])])
    device = policy.wte.weight.device
    cfg = Config(device=str(device), dtype="float32", head_tokens=len(response))
    logps, ref_logps = (response_logps(model, batch.to(device), cfg) for model in (policy, reference))  # (N,)
    return (beta * (logps - ref_logps)).tolist()


def heat(tokenizer, ids, rewards, color):
    """The tokens of a response, each with its reward as background colour or as a number."""
    largest = max(map(abs, rewards)) or 1
    parts = []
    for i, reward in zip(ids, rewards, strict=True):
        text = "<|endoftext|>" if i == tokenizer.eot else tokenizer.decode([i])
        if color:
            step = round(abs(reward) / largest * 5)  # 0 ... 5 on the 6 x 6 x 6 colour cube
            background = 16 + (36 * step if reward < 0 else 6 * step)
            parts.append(f"\033[48;5;{background};97m{text}\033[0m" if step else text)
        else:
            parts.append(f"{text}[{reward:+.3f}]")
    return "".join(parts).strip("\n")


def side_by_side(columns, width):
    """[(title, text), (title, text)] in two columns, or one above the other where the terminal is narrow."""
    if width < 60:
        return "\n".join(f"{title}: {text}" for title, text in columns)
    half = (width - 3) // 2
    cells = []
    for title, text in columns:
        lines = [part for line in text.splitlines() for part in textwrap.wrap(line, half) or [""]]
        cells.append([title, "-" * len(title), *lines])
    rows = max(map(len, cells))
    left, right = (cell + [""] * (rows - len(cell)) for cell in cells)
    return "\n".join(f"{a:{half}} | {b}".rstrip() for a, b in zip(left, right, strict=True))


def parse_flags(argv):
    parser = argparse.ArgumentParser("sample.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail("sample.py", message)
    parser.add_argument("out_dir", help="the folder of a preference run, or of SFT with --ref")
    parser.add_argument("--prompt", action="append", default=[], help="as in the data (may be repeated)")
    parser.add_argument("--prompts", help='a file: one prompt a line, or data with a "prompt"; - is stdin')
    parser.add_argument("--chat", action="store_true",
                        help="render each prompt as a Human turn, like chat and instruction data")
    parser.add_argument("--response", help="score this response, not a sampled one (with --heat)")
    parser.add_argument("--heat", action="store_true", help="beta log pi/pi_ref of every token of the answer")
    parser.add_argument("--color", action=argparse.BooleanOptionalAction, default=None,
                        help="colours, or numbers; default: colours on a terminal")
    parser.add_argument("--ref", help="another reference than the run's: a model folder or name")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of an answer (default 64)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 = the likeliest one (default 0.7)")
    parser.add_argument("--top_k", type=int, help="sample from the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="sample from the fewest tokens that reach p")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same answers (default 0)")
    best = machine.best_device()
    parser.add_argument("--device", default=best, help=f"cpu, cuda, mps, ... (default {best})")
    return parser.parse_args(argv)


def check(args):
    """Refuse a flag that cannot be served."""
    for flag, fine, needs in (
            ("response", args.response is None or args.heat, "goes with --heat"),
            ("max_new_tokens", args.max_new_tokens >= 1, "must be at least 1"),
            ("temperature", args.temperature >= 0, "must be at least 0"),
            ("top_k", args.top_k is None or args.top_k >= 1, "must be at least 1"),
            ("top_p", args.top_p is None or 0 < args.top_p <= 1, "must be greater than 0 and at most 1"),
            ("seed", 0 <= args.seed < 2**63, "must be at least 0 and below 2^63"),
            ("device", machine.usable(args.device), "torch cannot use it here; choose cpu")):
        if not fine:
            raise ConfigError(f"--{flag} {getattr(args, flag)}: {needs}")


def load(args):
    """(policy, reference, tokenizer, beta) of a run's folder."""
    run = read_run(args.out_dir)
    config = run["config"]
    ref = args.ref or config["ref"]
    if not Path(args.out_dir, "model.safetensors").exists():
        raise ConfigError(f"{args.out_dir}: this run has not finished; train.py --resume --out_dir "
                          f"{args.out_dir} goes on")
    if ref is None:
        raise ConfigError(f"{args.out_dir}: this run has no reference; name one with --ref")
    tokenizer = Tokenizer(args.out_dir)
    model_sizes("ref", ref)  # refuses a folder that is not there, or not there any more
    policy, reference = (GPT.from_pretrained(name).to(args.device) for name in (args.out_dir, ref))
    hashed = reference.double() if config.get("dtype") == "float64" else reference
    if args.ref is None and run["identity"].get("ref") not in (None, weights_hash(hashed)):
        raise ConfigError(f"{ref}: is no longer the reference of this run; name the right one with --ref")
    reference.float()
    if vocab.is_in(ref) and Tokenizer(ref).hash != tokenizer.hash:
        raise ConfigError(f"--ref {ref}: has another tokenizer than the run")
    check_vocabulary("ref", ref, reference.config.vocab_size, tokenizer)
    return policy, reference, tokenizer, config["beta"] or 1.0  # without a beta: plain log-ratios


def sample(args):
    """Print what the flags ask for."""
    check(args)
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts:
        raise ConfigError('--prompt: say what to answer, --prompt "..." or --prompts FILE')
    policy, reference, tokenizer, beta = load(args)
    color = args.color if args.color is not None else sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size((100, 24)).columns
    block_size = min(model.config.block_size for model in (policy, reference))
    for prompt in prompts:
        if args.chat:
            prompt = [{"role": "user", "content": prompt}]
        ids = np.array(tokenizer.encode_prompts([prompt])[0])
        prompt = prompt if isinstance(prompt, str) else tokenizer.render(prompt)
        response = None
        if args.response is not None:
            response = np.array([*tokenizer.encode(args.response), tokenizer.eot])
        room = block_size - (args.max_new_tokens if response is None else len(response))
        if room < 1:
            raise ConfigError(f"the answer may take all of block_size {block_size}: no room for a prompt")
        if len(ids) > room:
            print(f"(the prompt loses its first {len(ids) - room} tokens: block_size {block_size})")
        ids = ids[-room:]
        print(f"prompt: {prompt.strip()}\n")
        if response is None:
            answers = [generate(model, tokenizer, ids, args) for model in (reference, policy)]
            texts = [tokenizer.decode(a[a != tokenizer.eot]).strip() for a in answers]
            print(side_by_side([("reference", texts[0]), ("policy", texts[1])], width) + "\n")
            response = answers[1]
        if args.heat:
            rewards = token_rewards(policy, reference, ids, response, beta)
            print(f"beta log pi/pi_ref, token by token, beta {beta:g}; sum {sum(rewards):+.3f}")
            print(heat(tokenizer, response.tolist(), rewards, color) + "\n")


def generate(model, tokenizer, prompt, args):
    """One sampled answer, ids (N,), end-of-text included where the model wrote it."""
    with sampling(model, tokenizer):
        tokens = model.generate(torch.from_numpy(prompt[None]).to(args.device), args.max_new_tokens,
                                temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                                eos=tokenizer.eot,
                                generator=torch.Generator(args.device).manual_seed(args.seed))
    return tokens[0, len(prompt):].cpu().numpy()


def main(argv=None):
    with one_line_errors("sample.py"):
        sample(parse_flags(argv))


if __name__ == "__main__":
    main()
