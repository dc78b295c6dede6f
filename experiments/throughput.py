"""Time and memory of a training step beside others' step: python experiments/throughput.py [--peer tdpo]

Each side trains in a process of its own, from the same weights, on the same pairs, with the same AdamW. They
take turns, step by step, so that a noisy machine is noisy for both, and the losses of each step must agree.
    ours      train.py as it stands; ports/huggingface.py where the model is no GPT-2
    classic   two models, a row for each response, the logits of every position, log_softmax over all of
              them: the shape of eric-mitchell/direct-preference-optimization
    tdpo      the same with both full softmaxes for the KL: the shape of the official TDPO code
    trl       trl.DPOTrainer as pip installs it; needs trl, which brings datasets

    python experiments/throughput.py --against COMMIT               this checkout beside another commit
    python experiments/throughput.py --sampling [its flags]         experiments/sampling.py
throughput.md has the other commands. Flags not listed below go to train.py. Needs Linux.

Seconds are those of a turn of the loop, logging and the next batch included. CPU s is what all threads used:
less than cores x time where other processes had the cores. Memory is the peak from the second step on, less
what the process held with its libraries alone: weights, gradients and moments are in it. MFU counts useful
work only (useful_flops), against this machine's own matrix product.
"""

import argparse
import ctypes
import importlib
import itertools
import json
import math
import os
import platform
import shutil
import string
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from plumbing import machine  # noqa: E402  (before torch, which reads these settings when it is imported)

import numpy as np  # noqa: E402  isort: skip
import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import losses  # noqa: E402
from data import Tokenizer, step_indices  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from plumbing import vocab  # noqa: E402

SIZES = {"4x256": (4, 4, 256), "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
         "gpt2-xl": (48, 25, 1600), "qwen2": (4, 4, 256), "tiny": (2, 2, 64)}  # layers, heads, channels
LENGTHS = {  # tokens of a prompt, of a response: {quantile: value}, linear in between
    "long": ({0: 128, 1: 128}, {0: 64, 1: 256}),
    "hh": ({0: 11, 0.1: 18, 0.25: 31, 0.5: 96, 0.75: 169, 0.9: 275, 0.99: 547, 1: 845},  # harmless-base, test
           {0: 2, 0.1: 10, 0.25: 17, 0.5: 32, 0.75: 61, 0.9: 103, 0.99: 230, 1: 572}),
    "short": ({0: 50, 1: 150}, {0: 20, 1: 60}),
    "tiny": ({0: 8, 1: 16}, {0: 6, 1: 12})}
LETTERS = string.ascii_lowercase  # text: each letter is one token of the vocabulary that `make` writes
COMPARED = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected")
BETA, ALPHA, LR, CLIP = 0.1, 0.5, 1e-5, 1.0

# ---- What all sides start from: a folder with model, tokenizer and records ----

def draw_lengths(o):
    """Tokens of prompt, chosen and rejected response, (pairs, 3), end-of-text counted."""
    rng, n, (P, y) = np.random.default_rng(0), o.batches * o.pairs, LENGTHS[o.lengths]
    columns = [np.interp(rng.random(n), list(q), list(q.values())) for q in (P, y, y)]
    return np.stack(columns, -1).round().astype(int).clip(min=5)

def write_vocabulary(folder, size):
    """vocab.json and merges.txt, which old commits and transformers read, of that size. Letters never merge:
    tokens are bytes, then pairs and triples of bytes that are no letters."""
    single = sorted(shown := vocab.byte_characters(), key=shown.get)
    others = [c for c in single if c not in LETTERS]
    pairs = list(itertools.product(others, others))
    triples = itertools.product(map("".join, pairs), others)
    merges = list(itertools.islice(itertools.chain(pairs, triples), size - 257))
    ids = {token: i for i, token in enumerate([*single, *map("".join, merges), vocab.EOT])}
    config = {"tokenizer_class": "GPT2Tokenizer", **dict.fromkeys(("bos_token", "eos_token"), vocab.EOT)}
    for name, text in (("vocab.json", json.dumps(ids)), ("tokenizer_config.json", json.dumps(config)),
                       ("merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))):
        Path(folder, name).write_text(text, encoding="utf-8")

def make(o):
    """The start of all sides, unless --model gives it, and the records."""
    (layers, heads, channels), eot = SIZES[o.size], o.vocab - 1
    torch.manual_seed(0)
    space = " " if o.model else ""  # " a" is one token of most vocabularies
    if not o.model:
        o.model = str(Path(o.folder, "start"))
        if o.size == "qwen2":
            from transformers import Qwen2Config, Qwen2ForCausalLM
            Qwen2ForCausalLM(Qwen2Config(
                vocab_size=o.vocab, hidden_size=channels, intermediate_size=4 * channels,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2,
                tie_word_embeddings=True, bos_token_id=eot, eos_token_id=eot)).save_pretrained(o.model)
        else:
            GPT(GPTConfig(o.vocab, 2048, layers, heads, channels)).save_pretrained(o.model, eot)
        write_vocabulary(o.model, o.vocab)
    o.port = json.loads(Path(o.model, "config.json").read_text())["model_type"] != "gpt2"
    rng = np.random.default_rng(1)

    def text(n):
        return "".join(space + letter for letter in rng.choice(list(LETTERS), n))
    for name, lengths in (("records", draw_lengths(o)), ("held_out", [(8, 8, 8)])):
        records = [{"prompt": text(P), "chosen": text(C - 1), "rejected": text(R - 1)} for P, C, R in lengths]
        Path(o.folder, f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

def read_records(o):
    return [json.loads(line) for line in Path(o.folder, "records.jsonl").read_text().splitlines()]

# ---- The sides: each imports what it needs and returns what trains, until stopped, and logs its steps ----

def ours(o):
    script = importlib.import_module("ports.huggingface" if o.port else "train")
    given = {"init": o.model, "data": f"{o.folder}/records.jsonl", "val_data": f"{o.folder}/held_out.jsonl",
             "out_dir": o.out, "loss": o.loss, "beta": BETA, "batch_size": o.pairs, "lr": LR,
             "warmup_steps": 0, "grad_clip": CLIP, "steps": 10**6, "eval_every": 0, "save_every": 0,
             "log_every": 1, "device": o.device, "dtype": o.dtype}
    given |= {"alpha": ALPHA} if o.loss == "tdpo2" else {}
    argv = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return lambda: script.main([*argv, *o.flags])

def padded_rows(pairs, device):
    """2B rows, all chosen, then all rejected; each prompt + response, padded to the longest. And the mask of
    the response tokens. pairs: lists of the ids of (prompt, chosen, rejected)."""
    sides = [(p[0], p[side]) for side in (1, 2) for p in pairs]
    T = max(len(x) + len(y) for x, y in sides)
    tokens, scored = torch.zeros(len(sides), T, dtype=torch.long), torch.zeros(len(sides), T)
    for row, (x, y) in enumerate(sides):
        tokens[row, :len(x) + len(y)] = torch.tensor(x + y)
        scored[row, len(x):len(x) + len(y)] = 1
    return tokens.to(device), scored.to(device)  # (2B, T)

def classic_loss(logits, ref_logits, tokens, scored, loss="dpo"):
    def logps(logits):
        log_s = logits[:, :-1].log_softmax(-1)  # (2B, T - 1, V)
        return (log_s.gather(2, tokens[:, 1:, None]).squeeze(2) * scored[:, 1:]).sum(-1).chunk(2)

    return losses.dpo_loss(*logps(logits), *logps(ref_logits), beta=BETA).mean()

def tdpo_loss(logits, ref_logits, tokens, scored, loss="tdpo2"):
    log_s = logits[:, :-1].log_softmax(-1)  # (2B, T - 1, V)
    q = ref_logits[:, :-1].softmax(-1)
    log_q = q.log()
    kl = (q * (log_q - log_s)).sum(-1)  # (2B, T - 1)
    at, mask = tokens[:, 1:, None], scored[:, 1:]
    terms = [side for x in (log_s.gather(2, at).squeeze(2), log_q.gather(2, at).squeeze(2), kl)
             for side in (x * mask).sum(-1).chunk(2)]  # log-probabilities, the reference's, KLs
    if loss == "tdpo1":
        return losses.tdpo1_loss(*terms, beta=BETA).mean()
    return losses.tdpo2_loss(*terms, beta=BETA, alpha=ALPHA).mean()

def two_models(o, loss_of):
    """The loop that `classic` and `tdpo` share: the logits of both models at every position."""
    kind = torch.float64 if o.dtype == "float64" else torch.float32

    def forward(policy, reference, tokens, scored):
        logits = policy.logits(policy(tokens))  # (2B, T, V); padding is on the right: causal is enough
        with torch.no_grad():
            ref_logits = reference.logits(reference(tokens))
        keep = torch.promote_types(logits.dtype, torch.float32)
        return loss_of(logits.to(keep), ref_logits.to(keep), tokens, scored, o.loss)

    if o.peer_compile:
        forward = torch.compile(forward, dynamic=True)

    def run():
        multiple = 1 if o.device == "cpu" else machine.ALIGN
        policy, reference = (GPT.from_pretrained(o.model, multiple).to(o.device, kind) for _ in range(2))
        tokenizer, log = Tokenizer(o.model), log_of(o)
        pairs = [[tokenizer.encode(r[side]) + [tokenizer.eot] * (side != "prompt")
                  for side in ("prompt", "chosen", "rejected")] for r in read_records(o)]
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
        for i in itertools.count():
            index = step_indices(len(pairs), o.pairs, 0, i)
            tokens, scored = padded_rows([pairs[k] for k in index], o.device)
            with torch.autocast(torch.device(o.device).type, torch.bfloat16, o.dtype == "bfloat16"):
                loss = forward(policy, reference.requires_grad_(False), tokens, scored)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
            log(i + 1, {"loss": loss.item(), "grad_norm": norm.item()})
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run

def log_of(o):
    """A function (step, numbers) that writes a peer's log.jsonl."""
    Path(o.out).mkdir()
    file = open(Path(o.out, "log.jsonl"), "w", buffering=1)
    return lambda step, numbers: file.write(json.dumps({"step": step} | numbers) + "\n")

def trl(o):
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(Path(o.folder, "datasets"))}
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer
    datasets.disable_progress_bars()

    class ToLog(transformers.TrainerCallback):
        log = staticmethod(log_of(o))

        def on_log(self, args, state, control, logs, **kwargs):
            self.log(state.global_step, {name: logs[name] for name in COMPARED if name in logs})

    def run():
        records = read_records(o)
        order = np.concatenate([step_indices(len(records), o.pairs, 0, i)
                                for i in range(o.warmup + o.repeats + 1)])  # its loader reads one step ahead
        settings = DPOConfig(
            output_dir=o.out, beta=BETA, learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=CLIP,
            optim="adamw_torch_fused", max_length=None, per_device_train_batch_size=o.pairs,
            max_steps=len(order) // o.pairs, train_sampling_strategy="sequential",
            bf16=o.dtype == "bfloat16", activation_checkpointing=False,
            precompute_ref_log_probs=not o.live, use_cpu=o.device == "cpu", torch_compile=o.peer_compile,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = DPOTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32), args=settings,
            processing_class=transformers.AutoTokenizer.from_pretrained(o.model), callbacks=[ToLog()],
            train_dataset=datasets.Dataset.from_list([records[i] for i in order]))
        trainer.train()

    return run

SIDES = {"ours": ours, "classic": partial(two_models, loss_of=classic_loss),
         "tdpo": partial(two_models, loss_of=tdpo_loss), "trl": trl}

# ---- Memory and work ----

def memory(device, peak=False):
    """Bytes that this process holds, or the GPU's allocator; peak: the most since reset_peak."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0])

def reset_peak(device):
    if device != "cpu":
        return torch.cuda.reset_peak_memory_stats(device)
    ctypes.CDLL(None).malloc_trim(0)  # what loading has freed is not memory of the steps
    Path("/proc/self/clear_refs").write_text("5")

def synchronize(device):
    if device != "cpu":
        torch.cuda.synchronize(device)

def matmul_rate(device, dtype):
    """FLOP/s of this device's own matrix product, of 20 back to back: what MFU compares with."""
    n, products = (512 if device == "cpu" else 8192), 20
    a, best = torch.randn(n, n, device=device).to(dtype), math.inf
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(products):
            a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return products * 2 * n**3 / best

def useful_flops(layers, channels, vocabulary, lengths):
    """Forward and backward of a GPT-2 over pairs of these lengths (n, 3): no padding, nothing twice."""
    P, C, R = lengths.T
    seen = (P * (P + 1) + C * (C + 1) + R * (R + 1)) / 2 + P * (C + R)  # pairs of a query and a key
    trunk = layers * (24 * channels * channels * (P + C + R) + 4 * channels * seen)
    return 3.0 * (trunk + 2 * channels * vocabulary * (C + R)).sum()

# ---- A process a side: a line in says "go", a line of JSON out says what the step took ----

class Turns:
    """Stands after every optimizer step of this process: reports it and waits for the next turn."""

    def __init__(self, o, out):
        self.device, self.out, self.base, self.steps = o.device, out, memory(o.device), 0
        register_optimizer_step_post_hook(self)
        self.wait()

    def wait(self):
        if not sys.stdin.readline():
            os._exit(0)  # all has been measured, and nothing of this run is to be kept
        self.clock, self.cpu = time.perf_counter(), time.process_time()

    def __call__(self, *_):
        synchronize(self.device)
        compiled = torch._dynamo.utils.counters["stats"] if "torch._dynamo" in sys.modules else {}
        answer = {"seconds": time.perf_counter() - self.clock, "cpu": time.process_time() - self.cpu,
                  "memory": memory(self.device, peak=True) - self.base,
                  "graphs": compiled.get("unique_graphs", 0)}  # of torch.compile: must stop growing
        if self.steps == 0:
            reset_peak(self.device)
        self.steps += 1
        print(json.dumps(answer), file=self.out, flush=True)
        self.wait()

def work(o):
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a side prints must not mix with the answers
    machine.tune_allocator()  # for all: fresh pages for every chunk of logits would cost the peers most
    run = SIDES[o.side](o)
    Turns(o, out)
    run()

class Side:
    """The other end of `work`. root: the checkout whose train.py runs."""

    def __init__(self, o, name, side, root):
        self.name, self.out = name, Path(o.folder, name)
        self.said = open(Path(o.folder, f"{name}.txt"), "w+")
        as_torch_has_it = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
        options = json.dumps(vars(o) | {"side": side, "out": str(self.out)})
        self.process = subprocess.Popen(
            [sys.executable, str(Path(root, "experiments", "throughput.py")), "--work", options],
            env=os.environ | (as_torch_has_it if side in ("classic", "tdpo", "trl") else {}),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True)

    def step(self):
        try:
            print("go", file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended, and the next line says why
        line = self.process.stdout.readline()
        if not line:
            self.said.seek(0)
            raise SystemExit(f"throughput.py: {self.name} ended with status {self.process.wait()}:\n"
                             + self.said.read()[-2000:])
        return json.loads(line)

    def close(self):
        self.process.communicate()
        self.said.close()

    def logged(self):
        """{step: its numbers}, as far as the side has logged them."""
        lines = map(json.loads, Path(self.out, "log.jsonl").read_text().splitlines())
        return {line["step"]: line for line in lines if "loss" in line}

def measure(o, sides):
    """({name: its answers}, differences) of o.warmup + o.repeats rounds, in which each of one or two sides,
    {name: (side, root)}, makes the same step."""
    answers = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        o = argparse.Namespace(**vars(o) | {"folder": folder})
        make(o)
        running = [Side(o, name, *side) for name, side in sides.items()]
        try:
            for number in range(o.warmup + o.repeats):
                for side in running if number % 2 else running[::-1]:
                    answers[side.name].append(side.step())
        finally:
            for side in running:
                side.close()
        return answers, differences(o, [side.logged() for side in running])

def differences(o, logs):
    """{number: its largest difference between two sides, over all steps}."""
    if len(logs) < 2:
        return {}
    (a, b), steps = logs, logs[0].keys() & logs[1].keys()
    assert len(steps) >= o.warmup + o.repeats - 1, f"the sides logged {len(a)} and {len(b)} steps"
    worst = {name: max(abs(a[i][name] - b[i][name]) for i in steps)
             for name in COMPARED if all(name in x[i] for x in (a, b) for i in steps)}
    if not worst["loss"] <= o.limit:
        raise SystemExit(f"throughput.py: the losses of a step differ by {worst['loss']:.1e}, more than "
                         f"{o.limit:.1e} (--limit)")
    return worst

# ---- Numbers ----

def numbers_of(o, answers, rate):
    """Medians over the measured rounds of one side."""
    (layers, _, channels), measured, lengths = SIZES[o.size], answers[o.warmup:], draw_lengths(o)
    of_step = [lengths[step_indices(len(lengths), o.pairs, 0, o.warmup + n)] for n in range(o.repeats)]
    seconds = [a["seconds"] for a in measured]
    flops = [float(useful_flops(layers, channels, o.vocab, x)) for x in of_step]
    return {"seconds": median(seconds), "fastest": min(seconds), "slowest": max(seconds),
            "cpu_seconds": median([a["cpu"] for a in measured]),
            "tokens_per_s": median([int(x[:, 1:].sum()) / s for x, s in zip(of_step, seconds, strict=True)]),
            "mfu": median([f / s for f, s in zip(flops, seconds, strict=True)]) / rate,
            "memory": measured[-1]["memory"], "graphs": measured[-1]["graphs"],
            "graphs_while_measured": measured[-1]["graphs"] - answers[o.warmup - 1]["graphs"]}

def compare(o, sides=None):
    """Measure, print a table, return its numbers."""
    sides = sides or {name: (name, HERE.parent) for name in ("ours", o.peer)}
    rate = matmul_rate(o.device, torch.bfloat16 if o.dtype == "bfloat16" else getattr(torch, o.dtype))
    answers, worst = measure(o, sides)
    result = {name: numbers_of(o, rows, rate) for name, rows in answers.items()}
    print(f"{'':8}{'s/step':>8}{'fastest, slowest':>19}{'CPU s':>8}{'tokens/s':>10}{'MFU':>7}"
          f"{'GB':>7}{'graphs, late':>14}")
    for name, r in result.items():
        mfu = "" if o.model or o.size == "qwen2" else f"{r['mfu']:.0%}"
        print(f"{name:8}{r['seconds']:8.3f}{r['fastest']:11.3f}{r['slowest']:8.3f}{r['cpu_seconds']:8.2f}"
              f"{r['tokens_per_s']:10.0f}{mfu:>7}{r['memory'] / 1e9:7.2f}"
              f"{r['graphs']:9d},{r['graphs_while_measured']:4d}")
    if len(sides) > 1:
        (a, first), (b, second) = ((name, answers[name][o.warmup:]) for name in sides)
        ratio = {key: [y[key] / x[key] for x, y in zip(first, second, strict=True)]
                 for key in ("seconds", "cpu", "memory")}
        result |= {"faster": median(ratio["seconds"]), "less_cpu": median(ratio["cpu"]),
                   "fastest": result[b]["fastest"] / result[a]["fastest"],
                   "smaller": ratio["memory"][-1], "differences": worst}
        print(f"{b} / {a}: {result['faster']:.3f} x the time ({min(ratio['seconds']):.2f} to "
              f"{max(ratio['seconds']):.2f} in {o.repeats} rounds), fastest steps {result['fastest']:.3f} x, "
              f"CPU time {result['less_cpu']:.3f} x, memory {result['smaller']:.2f} x")
        print("largest differences:", ", ".join(f"{name} {x:.1e}" for name, x in worst.items()), flush=True)
    return result

def against(o):
    """This checkout, with what is not committed, beside a commit, for DPO and for TDPO2. On a busy machine
    the fastest steps and CPU time say more than the median; equal code was found 0.95 to 1.05 apart there."""
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "old")
        if subprocess.run(["git", "worktree", "add", "-q", "--detach", old, o.against], cwd=HERE).returncode:
            sys.exit(2)  # git has said why
        try:
            shutil.copy(__file__, old / "experiments" / "throughput.py")  # it asks train.py for flags only
            for loss in [o.loss] if o.loss else ["dpo", "tdpo2"]:
                print(f"{loss}:")
                options = argparse.Namespace(**vars(o) | {"loss": loss})
                compare(options, {"old": ("ours", old), "new": ("ours", HERE.parent)})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=HERE)

def where(o):
    """Machine, versions, commit, load: what a number means nothing without."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1:] or ["CPU\n"]
    device = machine.device_name(o.device) if o.device != "cpu" else (
        f"{cpu[0].splitlines()[0]}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    return {"device": device, "torch": torch.__version__, "python": platform.python_version(),
            "commit": git.stdout.strip() or None, "load": round(os.getloadavg()[0], 1),
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}

def parse(argv=None):
    flag = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
    flag.add_argument("--peer", choices=("classic", "tdpo", "trl"), default="classic")
    flag.add_argument("--against", metavar="COMMIT", help="compare with this commit's train.py")
    flag.add_argument("--loss", choices=("dpo", "tdpo1", "tdpo2"), help="default dpo; tdpo2 beside tdpo")
    flag.add_argument("--size", choices=SIZES, help="default 4x256; qwen2 for trl")
    flag.add_argument("--model", metavar="FOLDER", help="instead: a folder of transformers with tokenizer")
    flag.add_argument("--lengths", choices=LENGTHS, help="default long; short for trl and --against")
    flag.add_argument("--vocab", type=int, help="default 50257; 151936 for qwen2")
    flag.add_argument("--pairs", type=int, help="in a step; default 8; 4 for trl and --against")
    flag.add_argument("--batches", type=int, help="so many steps make an epoch; default 5; 1 for --against")
    flag.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag.add_argument("--dtype", choices=("float64", "float32", "bfloat16"),
                      help="default: bfloat16 on cuda, float32 on the CPU")
    flag.add_argument("--live", action="store_true", help="no pair comes twice: the reference runs too")
    flag.add_argument("--peer_compile", action="store_true", help="torch.compile for classic, tdpo or trl")
    flag.add_argument("--limit", type=float, help="on the losses' difference; default by precision")
    flag.add_argument("--repeats", type=int, help="measured rounds; default 5; 15 for --against")
    flag.add_argument("--warmup", type=int, help="rounds before; default: an epoch, but at least 2")
    o, o.flags = flag.parse_known_args(argv)
    trl = o.peer == "trl" and not o.against
    defaults = {"size": "qwen2" if trl else "4x256", "lengths": "short" if trl or o.against else "long",
                "pairs": 4 if trl or o.against else 8, "dtype": ("bfloat16", "float32")[o.device == "cpu"],
                "repeats": 15 if o.against else 5, "batches": 1 if o.against else 5}
    vars(o).update({name: getattr(o, name) or value for name, value in defaults.items()})
    o.warmup = o.warmup or max(2, 0 if o.live else o.batches)
    o.vocab = o.vocab or (151_936 if o.size == "qwen2" else 50257)
    o.limit = o.limit or {"float64": 1e-9, "float32": 1e-5 if trl else 2e-4, "bfloat16": 2e-2}[o.dtype]
    o.batches = o.warmup + o.repeats if o.live else o.batches
    if not o.against:
        o.loss = o.loss or ("tdpo2" if o.peer == "tdpo" else "dpo")
        if (o.peer == "tdpo") != (o.loss != "dpo"):
            flag.error(f"--peer {o.peer} has no --loss {o.loss}")
    return o

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--sampling" in argv:
        import sampling
        return sampling.main([word for word in argv if word != "--sampling"])
    if argv[:1] == ["--work"]:
        return work(argparse.Namespace(**json.loads(argv[1])))
    o = parse(argv)
    about = ", ".join(f"{name} {value}" for name, value in where(o).items())
    print(f"{o.model or o.size}, {o.pairs} pairs, lengths {o.lengths}, {o.dtype}, {about}", flush=True)
    (against if o.against else compare)(o)

if __name__ == "__main__":
    main()
