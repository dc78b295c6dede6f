"""Time and memory of a step, beside other implementations: python experiments/throughput.py [--peer tdpo] ...

Our step is train.step and AdamW, as train.py calls them; nothing of it is written again here.
    classic   two models, a row for each response, the logits of every position, log_softmax over all of
              them: the shape of eric-mitchell/direct-preference-optimization
    tdpo      the same with both full softmaxes for the KL: the shape of the official TDPO code
    trl       trl.DPOTrainer as pip installs it, its reference precomputed (--trl_live: not)
    rows      our own step without packing (--no-pack)
Both sides have the same weights, the same pairs, the same AdamW and the same precision. Each runs in a
process of its own; they take turns, step by step, on the same pairs, so that a noisy machine is noisy for
both. Their losses must agree at every step.

    python experiments/throughput.py --peer classic                 the rows of throughput.md
    python experiments/throughput.py --peer tdpo
    python experiments/throughput.py --peer classic --size gpt2 --lengths hh
    python experiments/throughput.py --scaling                      -> experiments/figures/throughput.png
    python experiments/throughput.py --profile                      trunk, head, optimizer, data

tokens/s counts response tokens; TFLOP and MFU count useful work only (useful_flops), MFU against the matrix
product of the same process. CPU s is what all threads used: less than cores x time where
other processes had the cores.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from plumbing import flags, machine  # noqa: E402
from plumbing.reference import Memory, Reference  # noqa: E402

SIZES = {"4x256": (4, 4, 256), "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
         "gpt2-xl": (48, 25, 1600), "tiny": (2, 2, 64)}
LENGTHS = {  # tokens of a prompt, of a response: {quantile: value}, linear in between
    "long": ({0: 128, 1: 128}, {0: 64, 1: 256}),
    "hh": ({0: 11, 0.1: 18, 0.25: 31, 0.5: 96, 0.75: 169, 0.9: 275, 0.99: 547, 1: 845},  # harmless-base, test
           {0: 2, 0.1: 10, 0.25: 17, 0.5: 32, 0.75: 61, 0.9: 103, 0.99: 230, 1: 572}),
    "short": ({0: 32, 1: 64}, {0: 32, 1: 128}),
    "tiny": ({0: 8, 1: 16}, {0: 4, 1: 12})}
SAME_LOSS = {"float64": 1e-9, "float32": 2e-4, "bfloat16": 2e-2}  # between the two sides, at every step
BETA, ALPHA = 0.1, 0.5


# ---------------------------------------------------------------------------------------------------------
# The same pairs and weights for everyone


def make_pairs(o):
    """o.batches x o.pairs pairs of random ids, of the lengths asked for."""
    g = np.random.default_rng(0)

    def draw(quantiles, n):
        return np.interp(g.random(n), list(quantiles), list(quantiles.values())).round().astype(int)

    def one():
        [P], (C, R) = draw(LENGTHS[o.lengths][0], 1), o.length_times * draw(LENGTHS[o.lengths][1], 2)
        prompt, chosen, rejected = np.split(g.integers(0, o.vocab, P + C + R, dtype=np.int32), [P, P + C])
        one_segment = [np.zeros(n, dtype=np.int32) for n in (C, R)]
        no_scores = np.zeros((2, 1, 0), dtype=np.float32)
        return data.Pair(prompt, chosen, rejected, *one_segment, *no_scores)

    return data.pack(one() for _ in range(o.batches * o.pairs))


def batch_index(o, number):
    first = number % o.batches * o.pairs
    return np.arange(first, first + o.pairs)


def make_weights(o, folder):
    torch.manual_seed(0)
    layers, heads, channels = SIZES[o.size]
    GPT(GPTConfig(o.vocab, 2048, o.layers or layers, heads, channels)).save_pretrained(folder)


def load(o):
    aligned = o.side == "ours" or o.device != "cpu"  # a peer's table has the vocabulary's rows on the CPU
    model = GPT.from_pretrained(o.folder, vocab_multiple=machine.ALIGN if aligned else 1)
    return model.to(o.device, torch.float64 if o.dtype == "float64" else torch.float32)


def finish_step(policy, optimizer):
    """What all sides share: clip, update, forget the gradients."""
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def adamw(policy):
    return torch.optim.AdamW(policy.parameters(), lr=1e-5, weight_decay=0.0, fused=True)


# ---------------------------------------------------------------------------------------------------------
# The sides: each returns step(index) -> loss, and calls `loaded` when its weights are in memory


class Profile:
    """A clock and a memory gauge between the parts of train.step; stands in for the step's reference."""

    def __init__(self, o, reference):
        self.device, self.reference, self.model = o.device, reference, reference.model
        self.trunk, train.hidden_states = train.hidden_states, self.hidden_states
        self.highest = self.head_memory = 0  # bytes
        self.restart()

    def restart(self):
        parts = ("data", "trunk forward", "reference", "head and loss", "trunk backward")
        self.seconds, self.clock = dict.fromkeys(parts, 0.0), time.perf_counter()

    def tick(self, name):
        machine.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - self.clock
        self.clock = time.perf_counter()

    def hidden_states(self, model, batch, cfg):
        self.tick("data")
        hidden = self.trunk(model, batch, cfg)
        self.tick("trunk forward")
        hidden.register_hook(self.head_done)  # called as the first thing of the trunk's backward pass
        return hidden

    def __call__(self, batch, with_kl):
        result = self.reference(batch, with_kl)
        self.tick("reference")
        self.before, self.highest = memory(self.device), max(self.highest, peak(self.device))
        reset_peak(self.device)
        return result

    def head_done(self, grad):
        self.head_memory = max(self.head_memory, peak(self.device) - self.before)
        self.tick("head and loss")


def config_of(o):
    """The Config that train.py would resolve for our side."""
    layers, heads, channels = SIZES[o.size]
    cfg = train.Config(
        loss=o.loss, beta=BETA, batch_size=o.pairs, device=o.device, dtype=o.dtype, compile=o.compile,
        pack=o.pack, head_tokens=o.head_tokens, n_head=heads, n_embd=channels,
        **({"micro_batch_size": o.micro, "micro_batch_tokens": 10**9} if o.micro else {}))
    filled = flags.defaults_of_loss(cfg)
    filled |= flags.defaults_of_machine(cfg, o.device, argparse.Namespace(vocab_size=o.vocab))
    cfg = dataclasses.replace(cfg, **{k: v for k, v in filled.items() if getattr(cfg, k) is None})
    return dataclasses.replace(cfg, pack=flags.packs(cfg))


def ours(o, pairs, loaded):
    machine.tune_allocator()
    cfg, loss = config_of(o), losses.LOSSES[o.loss]
    policy, model = load(o), load(o).requires_grad_(False)
    loaded()
    remembers = not (o.live or "chosen_seq_kl" in losses.terms_of(loss))
    reference = Reference(model, partial(train.hidden_states, model, cfg=cfg),
                          partial(train.response_logps, model, cfg=cfg),
                          Memory(Path(o.folder), pairs, cfg.dtype) if remembers else None)
    if remembers:  # as in every epoch but the first
        for batch in train.batches(pairs, np.arange(len(pairs)), cfg):
            reference(batch, with_kl=False)
    optimizer = adamw(policy)
    profile = Profile(o, reference) if o.profile else None

    def step(index):
        if profile:
            profile.restart()
        losses_of_pairs = []
        for batch in train.batches(pairs, index, cfg):
            terms = train.step(policy, profile or reference, batch, loss, 1 / len(index), cfg)
            losses_of_pairs.append(terms["loss"])
            if profile:
                profile.tick("trunk backward")
        start = time.perf_counter()
        finish_step(policy, optimizer)
        step.optimizer = time.perf_counter() - start
        return torch.cat(losses_of_pairs).mean().item()

    step.profile = profile
    return step


def rows(o, pairs, loaded):
    return ours(argparse.Namespace(**vars(o) | {"pack": False}), pairs, loaded)


def padded_rows(o, pairs, index):
    """2B rows, all chosen, then all rejected; each prompt + response, padded to the longest. And the mask of
    the response tokens."""
    sides = [(p.prompt, r) for side in ("chosen", "rejected")
             for p in map(pairs.__getitem__, index) for r in [getattr(p, side)]]
    T = max(len(x) + len(y) for x, y in sides)
    tokens, scored = torch.zeros(len(sides), T, dtype=torch.long), torch.zeros(len(sides), T)
    for row, (x, y) in enumerate(sides):
        tokens[row, :len(x) + len(y)] = torch.from_numpy(np.concatenate([x, y]))
        scored[row, len(x):len(x) + len(y)] = 1
    return tokens.to(o.device), scored.to(o.device)  # (2B, T)


def two_models(o, pairs, loaded, loss_of):
    """The step that `classic` and `tdpo` share: the logits of both models at every position."""
    policy, reference = load(o), load(o).requires_grad_(False)
    loaded()
    optimizer = adamw(policy)

    def forward(tokens, scored):
        logits = policy.logits(policy(tokens))  # (2B, T, V); padding is on the right: causal is enough
        with torch.no_grad():
            ref_logits = reference.logits(reference(tokens))
        keep = torch.promote_types(logits.dtype, torch.float32)
        return loss_of(logits.to(keep), ref_logits.to(keep), tokens, scored).mean()

    if o.peer_compile:
        forward = torch.compile(forward, dynamic=True)

    def step(index):
        tokens, scored = padded_rows(o, pairs, index)
        with train.precision(o):
            loss = forward(tokens, scored)
        loss.backward()
        finish_step(policy, optimizer)
        return loss.item()

    return step


def classic(o, pairs, loaded):
    def logps(logits, tokens, scored):
        log_s = logits[:, :-1].log_softmax(-1)  # (2B, T - 1, V)
        return (log_s.gather(2, tokens[:, 1:, None]).squeeze(2) * scored[:, 1:]).sum(-1).chunk(2)

    def loss_of(logits, ref_logits, tokens, scored):
        with torch.no_grad():
            ref = logps(ref_logits, tokens, scored)
        return losses.dpo_loss(*logps(logits, tokens, scored), *ref, beta=BETA)

    return two_models(o, pairs, loaded, loss_of)


def tdpo(o, pairs, loaded):
    def loss_of(logits, ref_logits, tokens, scored):
        log_s = logits[:, :-1].log_softmax(-1)  # (2B, T - 1, V)
        q = ref_logits[:, :-1].softmax(-1)
        log_q = q.log()
        kl = (q * (log_q - log_s)).sum(-1)  # (2B, T - 1)
        at, mask = tokens[:, 1:, None], scored[:, 1:]
        sums = [(x * mask).sum(-1).chunk(2)
                for x in (log_s.gather(2, at).squeeze(2), log_q.gather(2, at).squeeze(2), kl)]
        terms = [side for pair in sums for side in pair]  # log-probabilities, the reference's, KLs
        if o.loss == "tdpo1":
            return losses.tdpo1_loss(*terms, beta=BETA)
        return losses.tdpo2_loss(*terms, beta=BETA, alpha=ALPHA)

    return two_models(o, pairs, loaded, loss_of)


def trl(o, pairs, loaded):
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(Path(o.folder, "datasets"))}
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer
    datasets.disable_progress_bars()

    class Tokenised(DPOTrainer):  # the ids are given, there is no text
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    Path(o.folder, "vocab.json").write_text(json.dumps({"<|endoftext|>": 0}))
    Path(o.folder, "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(o.folder)
    model = transformers.GPT2LMHeadModel.from_pretrained(o.folder).to(o.device)
    reference = None
    if o.trl_live:
        reference = transformers.GPT2LMHeadModel.from_pretrained(o.folder).to(o.device)
    loaded()
    rows = [{f"{side}_ids": getattr(pairs[i], side).tolist() for side in ("prompt", "chosen", "rejected")}
            for i in range(len(pairs))]
    trainer = Tokenised(model, reference, DPOConfig(
        output_dir=o.folder, beta=BETA, max_length=None, per_device_train_batch_size=o.pairs,
        report_to="none", use_cpu=o.device == "cpu", bf16=o.dtype == "bfloat16", gradient_checkpointing=False,
        precompute_ref_log_probs=not o.trl_live), train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer)
    rows = trainer.train_dataset.to_list()
    trainer.model.train()
    if o.peer_compile:
        trainer.model.compile(dynamic=True)
    optimizer = adamw(trainer.model)

    def step(index):
        inputs = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in index]))
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        finish_step(trainer.model, optimizer)
        return loss.item()

    return step


SIDES = {"ours": ours, "classic": classic, "tdpo": tdpo, "trl": trl, "rows": rows}


# ---------------------------------------------------------------------------------------------------------
# Memory: what the process (or the GPU's allocator) held at most since reset_peak


def memory(device):
    if device != "cpu":
        return torch.cuda.memory_allocated(device)
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def peak(device):
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def reset_peak(device):
    if device != "cpu":
        return torch.cuda.reset_peak_memory_stats(device)
    Path("/proc/self/clear_refs").write_text("5")


def matmul_rate(device, dtype):
    """FLOP/s of this device's own matrix product, of 50 back to back: what MFU compares with."""
    n, products = (512, 50) if device == "cpu" else (8192, 50)
    a, best = torch.randn(n, n, device=device).to(dtype), math.inf
    for _ in range(5):
        machine.synchronize(device)
        start = time.perf_counter()
        for _ in range(products):
            a @ a
        machine.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return products * 2 * n**3 / best


def useful_flops(config, rows):
    """Forward and backward of the policy over pairs with these rows: no padding, nothing computed twice."""
    P, C, R = rows[:, 1], rows[:, 2], rows[:, 3]
    tokens, n = P + C + R, config.n_embd
    seen = (P * (P + 1) + C * (C + 1) + R * (R + 1)) / 2 + P * (C + R)  # pairs of a query and a key
    trunk = config.n_layer * (24 * n * n * tokens + 4 * n * seen)
    return 3.0 * (trunk + 2 * n * config.vocab_size * (C + R)).sum()


# ---------------------------------------------------------------------------------------------------------
# A process a side: a batch's number in, one line of JSON out


def work(o):
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not mix with the answers
    pairs, base, rate = make_pairs(o), 0, 0
    if o.side == "ours":
        rate = matmul_rate(o.device, torch.bfloat16 if o.dtype == "bfloat16" else getattr(torch, o.dtype))

    def loaded():
        nonlocal base
        base = memory(o.device)
        reset_peak(o.device)

    step = SIDES[o.side](o, pairs, loaded)
    for line in sys.stdin:
        machine.synchronize(o.device)
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = step(batch_index(o, int(line)))
        machine.synchronize(o.device)
        answer = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - start_cpu,
                  "loss": loss, "memory": peak(o.device) - base, "peak": peak(o.device), "rate": rate,
                  "compiled": compiled_graphs()}
        if o.profile:
            highest = max(step.profile.highest, answer["peak"])
            answer |= {"memory": highest - base, "peak": highest, "head_memory": step.profile.head_memory,
                       "parts": step.profile.seconds | {"optimizer": step.optimizer}}
        print(json.dumps(answer), file=out, flush=True)


def compiled_graphs():
    """How many graphs torch.compile has made in this process so far: it must stop growing."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0


class Side:
    """The other end of `work`: a side in a process of its own."""

    def __init__(self, o, side):
        options = json.dumps(vars(o) | {"side": side})
        as_torch_has_it = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
        self.process = subprocess.Popen([sys.executable, __file__, "--work", options],
                                        env=os.environ | (as_torch_has_it if side != "ours" else {}),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self, number):
        print(number, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"throughput.py: that side stopped with status {self.process.wait()}")
        return json.loads(line)

    def close(self):
        self.process.communicate()


def measure(o, *names):
    """{side: its answers}: warm-up steps, then o.repeats rounds in which each side makes the same step."""
    with tempfile.TemporaryDirectory() as o.folder:
        make_weights(o, o.folder)
        sides = {name: Side(o, name) for name in names}
        answers = {name: [] for name in names}
        try:
            for number in range(o.warmup + o.repeats):
                for name in names if number % 2 else names[::-1]:
                    answers[name].append(sides[name].step(number))
                values = [answers[name][-1]["loss"] for name in names]
                if not max(values) - min(values) <= SAME_LOSS[o.dtype]:
                    raise SystemExit(f"throughput.py: step {number}: the losses {values} of {names} differ")
        finally:
            for side in sides.values():
                side.close()
    return answers


# ---------------------------------------------------------------------------------------------------------
# Numbers


def median(values):
    return statistics.median(values)


def numbers_of(o, answers):
    """Medians over the measured rounds of one side."""
    pairs = make_pairs(o)
    layers, heads, channels = SIZES[o.size]
    config, measured = GPTConfig(o.vocab, 2048, o.layers or layers, heads, channels), answers[o.warmup:]
    rows = [pairs.rows[batch_index(o, o.warmup + n)] for n in range(o.repeats)]
    seconds = [a["seconds"] for a in measured]
    flops = [float(useful_flops(config, r)) for r in rows]
    return {"seconds": median(seconds), "cpu_seconds": median([a["cpu"] for a in measured]),
            "fastest": min(seconds), "slowest": max(seconds),
            "pairs_per_s": median([o.pairs / s for s in seconds]),
            "tokens_per_s": median([int(r[:, 2:4].sum()) / s for r, s in zip(rows, seconds, strict=True)]),
            "tflop": median(flops) / 1e12,
            "flops_per_s": median([f / s for f, s in zip(flops, seconds, strict=True)]),
            "memory": measured[-1]["memory"], "peak": measured[-1]["peak"], "loss": measured[-1]["loss"],
            "compiled": measured[-1]["compiled"],
            "compiled_while_measured": measured[-1]["compiled"] - answers[o.warmup - 1]["compiled"]}


def compare(o):
    answers = measure(o, "ours", o.peer)
    result = {name: numbers_of(o, rows) for name, rows in answers.items()}
    rate = answers["ours"][0]["rate"]
    ratios = [b["seconds"] / a["seconds"] for a, b in
              zip(answers["ours"][o.warmup:], answers[o.peer][o.warmup:], strict=True)]
    result |= {"matmul_flops_per_s": rate,
               "faster": median(ratios), "faster_range": [min(ratios), max(ratios)],
               "less_cpu": result[o.peer]["cpu_seconds"] / result["ours"]["cpu_seconds"],
               "smaller": result[o.peer]["memory"] / result["ours"]["memory"]}
    say(o, f"{'':8}{'s/step':>8}{'fastest, slowest':>19}{'CPU s':>8}{'pairs/s':>9}{'tokens/s':>10}"
        f"{'TFLOP':>8}{'MFU':>7}{'GB over weights':>17}{'peak GB':>9}")
    for name in ("ours", o.peer):
        r = result[name]
        r["mfu"] = r["flops_per_s"] / rate
        say(o, f"{name:8}{r['seconds']:8.3f}{r['fastest']:11.3f}{r['slowest']:8.3f}{r['cpu_seconds']:8.2f}"
            f"{r['pairs_per_s']:9.2f}{r['tokens_per_s']:10.0f}{r['tflop']:8.3f}{r['mfu']:7.1%}"
            f"{r['memory'] / 1e9:17.2f}{r['peak'] / 1e9:9.2f}")
    say(o, f"{o.peer} / ours: {result['faster']:.2f} x the time ({min(ratios):.2f} to {max(ratios):.2f} in "
        f"{o.repeats} rounds; CPU time {result['less_cpu']:.2f} x), {result['smaller']:.2f} x the memory")
    say(o, f"matmul {rate / 1e12:.3f} TFLOP/s; graphs compiled {result['ours']['compiled']}, "
        f"of them while measured {result['ours']['compiled_while_measured']}")
    return result


def profile(o):
    """Where the time of our step goes, and how far the preparation of batches is from holding it up."""
    o.profile = True
    answers = measure(o, "ours")["ours"][o.warmup:]
    parts = {name: median([a["parts"][name] for a in answers]) for name in answers[0]["parts"]}
    total = sum(parts.values())
    for name, seconds in parts.items():
        say(o, f"{name:16}{seconds * 1e3:10.2f} ms{seconds / total:8.1%}")
    head_memory = max(a["head_memory"] for a in answers)
    seconds, last = median([a["seconds"] for a in answers]), answers[-1]
    say(o, f"step {seconds:.3f} s; at most {last['memory'] / 1e9:.2f} GB over the weights, in all "
        f"{last['peak'] / 1e9:.2f} GB; head and loss {head_memory / 1e9:.2f} GB over what they find")

    pairs, clock = make_pairs(o), time.perf_counter()
    for number in range(20):
        for _ in train.batches(pairs, batch_index(o, number), config_of(o)):
            pass
    prepared = 20 * o.pairs / (time.perf_counter() - clock)
    trunk = o.pairs / (parts["trunk forward"] + parts["trunk backward"])
    say(o, f"data: one core prepares {prepared:.0f} pairs/s, {prepared / trunk:.0f} x what the trunk takes "
        f"({trunk:.1f} pairs/s)")
    return {"parts": parts, "seconds": seconds, "memory": last["memory"], "head_memory": head_memory,
            "prepared_pairs_per_s": prepared, "trunk_pairs_per_s": trunk}


def scaling(o):
    """Time and head memory of our step when one thing doubles, and doubles again. On a CPU the time is that
    of all threads: other processes lengthen it less."""
    start = {"vocab": 16384, "length_times": 1, "pairs": 16, "layers": 4}
    o.profile, o.lengths = True, "short" if o.lengths == "long" else o.lengths
    result = {}
    for name, base in start.items():
        for times in (1, 2, 4):
            point = argparse.Namespace(**vars(o) | start | {name: times * base})
            answers = measure(point, "ours")["ours"][o.warmup:]
            clock = "cpu" if o.device == "cpu" else "seconds"
            r = {"seconds": median([a[clock] for a in answers]), "memory": answers[-1]["memory"],
                 "head_memory": max(a["head_memory"] for a in answers),
                 "parts": {part: median([a["parts"][part] for a in answers]) for part in answers[0]["parts"]}}
            result.setdefault(name, {})[times * base] = r
            say(o, f"{name:13}{times * base:8d}{r['seconds']:10.3f} s{r['head_memory'] / 1e9:8.3f} GB in the "
                f"head{r['memory'] / 1e9:8.3f} GB over the weights")
    draw(o, result)
    return result


def draw(o, result):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    labels = {"vocab": "vocabulary", "length_times": "response length (x 32 ... 128 tokens)",
              "pairs": "pairs in a step", "layers": "layers"}
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    for ax, (name, points) in zip(axes, result.items(), strict=True):
        x = list(points)
        seconds, gigabytes = ([points[v][key] * scale for v in x]
                              for key, scale in (("seconds", 1), ("head_memory", 1e-9)))
        ax.plot(x, seconds, "o-", color="C0", label="CPU " * (o.device == "cpu") + "time of a step, s")
        ax.plot(x, [seconds[0] * v / x[0] for v in x], ":", color="C0", label="proportional")
        ax.plot(x, gigabytes, "s-", color="C1", label="memory of the head, GB")
        ax.set(xlabel=labels[name], xticks=x, ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Our DPO step, {o.size}, {o.dtype}, {machine.device_name(o.device)}: "
                    "one thing doubled, and doubled again", fontsize=10)
    path = HERE / "figures" / "throughput.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    say(o, f"drawn: {path}")


def cpu_name():
    lines = Path("/proc/cpuinfo").read_text().split("\n")
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def where(o):
    """Machine, versions, commit, load: what a number means nothing without."""
    git = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"],
                         capture_output=True, text=True)
    device = f"{cpu_name()}, {os.cpu_count()} cores" if o.device == "cpu" else machine.device_name(o.device)
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "commit": git.stdout.strip() or None,
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}


def say(o, text):
    print(text, file=sys.stderr if o.json else sys.stdout, flush=True)


def parse(argv):
    flag = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag.add_argument("--peer", choices=("classic", "tdpo", "trl", "rows"), default="classic")
    flag.add_argument("--peer_compile", action="store_true", help="torch.compile for classic, tdpo or trl")
    flag.add_argument("--loss", choices=("dpo", "tdpo1", "tdpo2"), help="default dpo; tdpo2 against tdpo")
    flag.add_argument("--size", choices=SIZES, default="4x256", help="layers x channels, or a GPT-2")
    flag.add_argument("--lengths", choices=LENGTHS, default="long")
    flag.add_argument("--vocab", type=int, default=50257)
    flag.add_argument("--pairs", type=int, default=8, help="in a step")
    flag.add_argument("--micro", type=int, help="our micro-batch, pairs; default: train.py's, by tokens")
    flag.add_argument("--batches", type=int, default=5, help="different batches, taken in turn")
    flag.add_argument("--layers", type=int, help="instead of the size's")
    flag.add_argument("--length_times", type=int, default=1, help="responses this many times as long")
    flag.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flag.add_argument("--dtype", choices=SAME_LOSS, help="default: bfloat16 on cuda, float32 on the CPU")
    flag.add_argument("--compile", action=argparse.BooleanOptionalAction, help="ours; default: train.py's")
    flag.add_argument("--pack", action=argparse.BooleanOptionalAction, help="ours; default: train.py's")
    flag.add_argument("--head_tokens", type=int, help="ours; default: train.py's")
    flag.add_argument("--live", action="store_true", help="ours: the reference runs in every step")
    flag.add_argument("--trl_live", action="store_true", help="TRL's default: the reference in every step")
    flag.add_argument("--repeats", type=int, default=5)
    flag.add_argument("--warmup", type=int, default=2)
    flag.add_argument("--scaling", action="store_true")
    flag.add_argument("--profile", action="store_true")
    flag.add_argument("--json", action="store_true", help="the numbers on stdout, the table on stderr")
    flag.add_argument("--work", help=argparse.SUPPRESS)
    o = flag.parse_args(argv)
    o.loss = o.loss or ("tdpo2" if o.peer == "tdpo" else "dpo")
    if o.peer != "rows" and (o.peer == "tdpo") != (o.loss != "dpo") and not (o.scaling or o.profile):
        flag.error(f"--peer {o.peer} has no --loss {o.loss}")
    for name in ("vocab", "pairs", "layers", "length_times"):
        if o.scaling and getattr(o, name) != flag.get_default(name):
            flag.error(f"--{name}: --scaling chooses it; leave it out")
    o.dtype = o.dtype or ("float32" if o.device == "cpu" else "bfloat16")
    return o


def main(argv=None):
    o = parse(argv)
    if o.work:
        return work(argparse.Namespace(**json.loads(o.work)))
    here = where(o)
    tokens = " + ".join(f"{min(q.values())}...{max(q.values())}" for q in LENGTHS[o.lengths])
    step = f"vocabulary {o.vocab}, {o.pairs} pairs of {tokens} tokens, " * (not o.scaling)
    about = ", ".join(f"{key} {value}" for key, value in here.items())
    say(o, f"{o.loss}, {o.size}, {step}{o.dtype}\n{about}")
    result = (scaling if o.scaling else profile if o.profile else compare)(o)
    if o.json:
        print(json.dumps({"options": vars(o), "where": here} | result, indent=1))


if __name__ == "__main__":
    main()
