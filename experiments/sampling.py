"""Speed of GPT.generate beside transformers' generate: python experiments/sampling.py [--before CHECKOUT]

GPT-2 small's shape with random weights, the same in each. The programs take turns, and the fastest of some
turns counts; on one thread, its CPU seconds, which other work on the machine disturbs less. --before times
the model.py of another checkout too. Needs transformers.
"""

import argparse
import importlib.util
import json
import logging
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402

ROWS = (  # name, prompts, new tokens, flags, least ratio to transformers
    ("whole distribution, 16 rows", 16, 16, {}, 1.4),
    ("whole distribution, 1 row", 1, 32, {}, 1.15),
    ("top-p 0.95, 16 rows", 16, 16, {"top_p": 0.95}, 1.3),
    ("top-p 0.95, 1 row", 1, 32, {"top_p": 0.95}, 1.15),
    ("greedy, 16 rows", 16, 16, {"temperature": 0}, 1.15),
    ("greedy, 1 row", 1, 32, {"temperature": 0}, 1.15),
    ("whole distribution, 900 tokens", 1, 900, {}, 1.25))

def programs(config, device, before=None):
    """{name: generate(tokens, n, flags) -> tokens} of one random model."""
    from transformers import GPT2LMHeadModel
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = GPT(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        other = GPT2LMHeadModel.from_pretrained(folder).to(device).eval()
    model.to(device)

    def by_transformers(tokens, n, flags):
        greedy = flags.get("temperature") == 0
        how = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0} | flags
        return other.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n,
                              eos_token_id=None, pad_token_id=0, **how)

    found = {"ours": lambda tokens, n, flags: model.generate(tokens, n, **flags),
             "transformers": by_transformers}
    if before:
        spec = importlib.util.spec_from_file_location("before", Path(before, "model.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules["before"] = module  # dataclasses look there
        spec.loader.exec_module(module)
        old = module.GPT(module.GPTConfig(**vars(config)))
        old.load_state_dict(model.state_dict())
        old.to(device)
        found["before"] = lambda tokens, n, flags: old.generate(tokens, n, **flags)
    return found

def seconds(generate, tokens, n, flags):
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    out = generate(tokens, n, flags)
    if out.is_cuda:
        torch.cuda.synchronize()
    assert out.shape == (len(tokens), tokens.shape[1] + n)
    return clock() - began

def measure(found, row, turns, device, vocab_size):
    """{program: the fastest seconds} of one of ROWS."""
    _, rows, n, flags, _ = row
    length = 32 if n > 500 else 8  # short, so that the prompts weigh little
    tokens = torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
    times = {name: [] for name in found}
    for _ in range(turns):
        for name, generate in found.items():
            times[name].append(seconds(generate, tokens, n, flags))
    return {name: min(values) for name, values in times.items()}

def main(argv=None):
    parser = argparse.ArgumentParser("sampling.py", description=__doc__.split("\n")[0])
    parser.add_argument("--before", metavar="CHECKOUT", help="an older checkout to time too")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", type=int, default=range(len(ROWS)), help="numbers of the rows")
    parser.add_argument("--tokens", type=int, help="new tokens, in place of those of the rows")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--json", help="append the figures to this file, one row a line")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    config = GPTConfig(n_layer=args.n_layer, n_embd=args.n_embd)
    found = programs(config, args.device, args.before)
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads, the fastest of {args.turns}")
    print(f"{'':32}" + "".join(f"{name + ' s':>16}" for name in found) + "   ratio  target")
    for name, prompts, n, flags, target in [ROWS[i] for i in args.rows]:
        row = name, prompts, args.tokens or n, flags, target
        times = measure(found, row, 1 if row[2] > 500 else args.turns, args.device, config.vocab_size)
        ratios = {name: times["transformers"] / t for name, t in times.items() if name != "transformers"}
        cells = "".join(f"{t:16.2f}" for t in times.values()) + f"{ratios['ours']:8.2f}{row[4]:8}"
        before = f"   before {ratios['before']:.2f}" if "before" in ratios else ""
        print(f"{row[0]:32}{cells}{before}", flush=True)
        if args.json:
            with open(args.json, "a") as file:
                file.write(json.dumps({"row": row[0], "seconds": times, "ratios": ratios}) + "\n")

if __name__ == "__main__":
    main()
