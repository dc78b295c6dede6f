"""Answers of a model, beside its reference's: python sample.py MODEL --prompt "..." [--heat]

MODEL is the folder of a finished run, the folder of a model, or a name (gpt2, ...). --heat shows
the implicit reward beta log pi(y_t|..)/pi_ref(y_t|..) of every token of the answer: where training made it
likelier than under the reference (green, +) or less likely (red, -).
"""

from train import Config, response_logps  # isort: skip  (first: it sets what torch reads on import)

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from data import Pair, Tokenizer, collate
from model import GPTConfig
from plumbing import machine, pairs, pretrained, vocab
from plumbing.errors import ConfigError, DataError
from plumbing.files import read_bytes
from plumbing.flags import check_tokens
from plumbing.folder import open_model, read_run, weights_hash
from plumbing.report import fail, one_line_errors

def token_rewards(policy, reference, prompt, response, beta):
    """beta log pi(y_t|x,y_<t) / pi_ref(y_t|x,y_<t) of each response token: ids (P,), (N,) -> N numbers, whose
    sum is the response's implicit reward, beta log pi(y|x)/pi_ref(y|x)."""
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

def parse_flags(argv):
    """The flags, checked."""
    parser = argparse.ArgumentParser("sample.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: fail("sample.py", message)
    add, best = parser.add_argument, machine.best_device()
    add("model", help="the folder of a run or of a model, or a name: gpt2, ...")
    add("--prompt", action="append", default=[], help="as in the data (may be repeated)")
    add("--prompts", help='a file: one prompt a line, or data with a "prompt"; - is stdin')
    add("--chat", action="store_true", help="take each prompt as a user's message, rendered as in training")
    add("--response", help="score this response, not a sampled one (with --heat)")
    add("--heat", action="store_true", help="beta log pi/pi_ref of every token of the answer")
    add("--color", action=argparse.BooleanOptionalAction, help="colours, not numbers; default: on a terminal")
    add("--ref", help="another reference than the run's: a model folder or name")
    add("--max_new_tokens", type=int, default=64, help="tokens of an answer (default 64)")
    add("--temperature", type=float, default=0.7, help="0 = the likeliest one (default 0.7)")
    add("--top_k", type=int, help="sample from the k likeliest tokens only")
    add("--top_p", type=float, help="sample from the fewest tokens that reach p")
    add("--seed", type=int, default=0, help="the same seed, the same answers (default 0)")
    add("--device", default=best, help=f"cpu, cuda, mps, ... (default {best})")
    args = parser.parse_args(argv)
    for flag, fine, needs in (
            ("response", args.response is None or args.heat, "goes with --heat"),
            ("max_new_tokens", args.max_new_tokens >= 1, "must be at least 1"),
            ("seed", 0 <= args.seed < 2**63, "must be at least 0 and below 2^63"),
            ("device", machine.usable(args.device), "torch cannot use it here; choose cpu")):
        if not fine:
            raise ConfigError(f"--{flag} {getattr(args, flag)}: {needs}")
    return args

def load(args):
    """(policy, reference or None, tokenizer, beta): a run has a reference, other models only one of --ref."""
    folder, named = Path(args.model), args.model in pretrained.NAMES
    run = read_run(folder) if (folder / "run.json").exists() else {"config": {}, "identity": {}}
    if not named:
        kind = pretrained.load_config(folder).get("model_type")
        if kind not in (None, "gpt2", pretrained.OWN):
            raise ConfigError(f"{folder}: a {kind}, as ports/huggingface.py trains; sample it by "
                              f"transformers.pipeline('text-generation', {args.model!r})")
        if not vocab.is_in(folder):
            raise ConfigError(f"{folder}: holds no tokenizer; put its files there")
    tokenizer = Tokenizer("gpt2" if named else args.model)
    policy = open_model(args.model).to(args.device)
    check_tokens("model", args.model, policy.config, tokenizer)
    ref, beta = args.ref or run["config"].get("ref"), run["config"].get("beta") or 1.0  # 1: plain log-ratios
    if not args.ref and ref and ref not in pretrained.NAMES and not Path(ref).exists():
        print(f"(the run's reference, {ref}, is not there any more; --ref names another place)")
        ref = None
    if not ref:
        return policy, None, tokenizer, beta
    check_tokens("ref", ref, pretrained.read_config(ref, GPTConfig), tokenizer)
    reference = open_model(ref)
    hashed = reference.double() if run["config"].get("dtype") == "float64" else reference
    if not args.ref and run["identity"].get("ref") not in (None, weights_hash(hashed)):
        raise ConfigError(f"{ref}: is no longer the reference of this run; name the right one with --ref")
    return policy, reference.float().to(args.device), tokenizer, beta

def read_prompts(path):
    """Prompts, strings or lists of messages, of a file of the one format, whose responses are not read; or of
    a .txt file or standard input ("-"), where a line that does not start with "{" is a prompt itself."""
    malformed, prompts, plain = [], [], path == "-" or path.lower().endswith(".txt")
    [path] = [path] if plain else pairs.files_of([path])
    content = sys.stdin.buffer.read() if path == "-" else read_bytes(path)
    for place, line in pairs.lines_of(path, content):
        try:
            json_line = not plain or line.lstrip().startswith("{")
            record = pairs.parse_json(line) if json_line else {"prompt": line.rstrip("\r")}
            pairs.check_keys(record, "", ["prompt"], ["id", "chosen", "rejected"])
            prompts.append(pairs.check_prompt(record["prompt"]))
        except DataError as e:
            malformed.append((path, place, str(e)))
    if malformed or not prompts:
        raise DataError("\n".join(pairs.listed(malformed)) or f"{path}: holds no prompt")
    return prompts

def sample(args):
    """Print what the flags ask for."""
    prompts = args.prompt + (read_prompts(args.prompts) if args.prompts else [])
    if not prompts:
        raise ConfigError('--prompt: say what to answer, --prompt "..." or --prompts FILE')
    if args.chat:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    policy, reference, tokenizer, beta = load(args)
    if args.heat and not reference:
        raise ConfigError("--heat: needs a reference to compare with; name one with --ref")
    models = {"reference": reference, "policy": policy} if reference else {"answer": policy}
    block_size = min(model.config.block_size for model in models.values())
    color = args.color if args.color is not None else sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for at in range(0, len(prompts), 64):  # a batch
        batch, answers = prompts[at:at + 64], {}
        given = [("" if isinstance(p, str) else tokenizer.lead) + args.response for p in batch
                 if args.response is not None]
        given = [np.array([*x, tokenizer.eot]) for x in tokenizer.encode_batch(given)]
        room = block_size - max(map(len, given), default=args.max_new_tokens)
        if room < 1:
            raise ConfigError(f"--max_new_tokens, --response: the answer may take all {block_size} positions")
        ids = [np.array(x) for x in tokenizer.encode_prompts(batch)]
        for name, model in () if given else models.items():
            answers[name] = generate(model, tokenizer, [x[-room:] for x in ids], args)
        for i, prompt in enumerate(batch):
            if len(ids[i]) > room:
                print(f"(the prompt loses its first {len(ids[i]) - room} tokens: block_size {block_size})")
            prompt = prompt if isinstance(prompt, str) else tokenizer.render(prompt)
            print(f"prompt: {prompt.strip()}\n")
            for name, rows in answers.items():
                print(f"{name}: {tokenizer.decode(t for t in rows[i] if t != tokenizer.eot).strip()}\n")
            if args.heat:
                response = (given or answers["policy"])[i]
                rewards = token_rewards(policy, reference, ids[i][-room:], response, beta)
                print(f"beta log pi/pi_ref, token by token, beta {beta:g}; sum {sum(rewards):+.3f}")
                print(heat(tokenizer, response.tolist(), rewards, color) + "\n")

def generate(model, tokenizer, prompts, args):
    """A sampled answer to each prompt, ids (N,), end-of-text included where the model wrote it."""
    tokens = pad_sequence([torch.from_numpy(p) for p in prompts], batch_first=True, padding_value=-1)
    tokens = model.generate(tokens.to(args.device), args.max_new_tokens, temperature=args.temperature,
                            top_k=args.top_k, top_p=args.top_p, eos=tokenizer.eot, n_ids=tokenizer.vocab_size,
                            generator=torch.Generator(args.device).manual_seed(args.seed)).cpu().numpy()
    rows = [row[len(p):len(p) + args.max_new_tokens] for row, p in zip(tokens, prompts, strict=True)]
    return [row[:np.append(row == tokenizer.eot, True).argmax() + 1] for row in rows]

def main(argv=None):
    with one_line_errors("sample.py"):
        sample(parse_flags(argv))

if __name__ == "__main__":
    main()
