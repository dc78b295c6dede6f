"""What a GPU must show, in three commands: python experiments/gpu.py --part correctness|speed|size

Each check runs in a process of its own with a limit of time, and its line of JSON is written at once into
--out (default gpu-PART.jsonl); a table in Markdown ends the run. --only runs some of a part's checks.
Exit status 1 where a goal is not met or a check fails. --dry-run: the same checks on tiny sizes, on the CPU,
where speed and size have no goals.

    correctness   attention kernels, the losses against float64, a run of train.py, its stop and resume
    speed         packed rows against rows, and our step against others' (experiments/throughput.py)
    size          GPT-2 XL, logits at once, 200 steps of changing batches

The file is not called cuda.py: torch imports a package of that name, and would find it here.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import numpy as np  # noqa: E402
import throughput  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from losses import LOSSES, knobs_of  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from plumbing import flags, machine, ranks  # noqa: E402
from plumbing.reference import Reference, no_reference  # noqa: E402

HH = ROOT.parent / "shared" / "data" / "hh" / "harmless-base-test.jsonl.gz"  # used where it is there
GPT2 = ROOT.parent / "shared" / "data" / "gpt2-bpe"


def fact(what, value):
    return {"what": what, "value": value}


def at_most(what, value, limit):
    return {"what": what, "value": value, "goal": f"<= {limit:g}", "holds": bool(value <= limit)}


def at_least(what, value, limit):
    return {"what": what, "value": value, "goal": f">= {limit:g}", "holds": bool(value >= limit)}


def true(what, holds):
    return {"what": what, "value": bool(holds), "goal": "true", "holds": bool(holds)}


def options(o, **changes):
    """Options of throughput.py: of the check's device, on tiny sizes in a dry run."""
    chosen = {"device": o.device, "dtype": "float32" if o.dry_run else "bfloat16"} | changes
    if o.dry_run:
        chosen |= {"size": "tiny", "lengths": "tiny", "vocab": 97, "pairs": 4, "batches": 2}
    argv = []
    for name, value in chosen.items():
        if isinstance(value, bool):
            argv += [f"--{name}"] * value
        else:
            argv += [f"--{name}", str(value)]
    return throughput.parse(argv)


# ---------------------------------------------------------------------------------------------------------
# correctness


def versions(o):
    """What ran, and what this device copies and multiplies."""
    n = 2**20 if o.dry_run else 2**30
    source = torch.empty(n, dtype=torch.uint8, device=o.device)
    target, best = torch.empty_like(source), math.inf
    for _ in range(5):
        machine.synchronize(o.device)
        start = time.perf_counter()
        target.copy_(source)
        machine.synchronize(o.device)
        best = min(best, time.perf_counter() - start)
    facts = throughput.where(argparse.Namespace(device=o.device)) | {
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "compiler": machine.cannot_compile() or "g++"}
    kind = torch.float32 if o.dry_run else torch.bfloat16
    return [fact(name, value) for name, value in facts.items()] + [
        fact("copies, GB/s read and written", 2 * n / best / 1e9),
        fact(f"matrix product, {kind}, TFLOP/s", throughput.matmul_rate(o.device, kind) / 1e12)]


def gradients(attend, q, k, v):
    """Output and gradients of an attention of some queries, keys and values."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    out.backward(torch.ones_like(out))
    return out.detach(), q.grad, k.grad, v.grad


def worst(found, exact):
    """The largest error of a tensor against its largest entry; infinity where one is not finite."""
    errors = [((a.double().cpu() - e).abs().max() / e.abs().max()).item()
              for a, e in zip(found, exact, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def masked(o):
    """Masked rows in bfloat16 with scores of about -128, at widths where cuDNN's backward gives NaN (pytorch
    issue 196678): which kernel runs them, and what comes out."""
    results = []
    for T in (64, 128) if o.dry_run else (640, 704):
        torch.manual_seed(0)
        q, v = 4 + 0.1 * torch.randn(2, 4, T, 64), torch.randn(2, 4, T, 64)
        q, v = q.to(o.device, torch.bfloat16), v.to(o.device, torch.bfloat16)
        attend = functools.partial(F.scaled_dot_product_attention,
                                   attn_mask=torch.ones(T, T, dtype=torch.bool, device=o.device).tril())
        ours = gradients(attend, q, -q, v)
        results.append(true(f"T {T}: gradients are finite", all(x.isfinite().all() for x in ours)))
        if torch.device(o.device).type == "cuda":
            kernels = {b.value: b.name for b in map(torch.nn.attention.SDPBackend, range(5))}
            chosen = kernels[torch._fused_sdp_choice(q, -q, v, **attend.keywords)]
            results += [fact(f"T {T}: kernel", chosen), true("not cuDNN's", "CUDNN" not in chosen)]
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
                try:
                    nan = sum(int(x.isnan().sum()) for x in gradients(attend, q, -q, v))
                    results.append(fact(f"T {T}: NaN in cuDNN's gradients", nan))
                except RuntimeError as e:
                    results.append(fact(f"T {T}: cuDNN's", str(e).split(".")[0]))
    return results


def flex(o):
    """FlexAttention over a packed row, compiled as in the trunk, against the dense mask in float64."""
    from torch.nn.attention.flex_attention import flex_attention
    cuda = torch.device(o.device).type == "cuda"
    pairs = throughput.make_pairs(options(o, lengths="hh", pairs=12, batches=1, vocab=97))
    batch = data.collate([pairs[i] for i in range(len(pairs))], 1024 if o.dry_run else 4096, packed=True)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, batch.tokens.shape[1], 64)
    real = batch.branch[0] != data.PADDING
    exact = gradients(functools.partial(F.scaled_dot_product_attention, attn_mask=batch.mask()),
                      q.double(), k.double(), v.double())
    tiles = batch.to(o.device).block_mask()
    dtypes = (torch.bfloat16, torch.float32) if cuda else (torch.float32,)
    results = []
    for dtype in dtypes:
        q, k, v = (x.to(o.device, dtype) for x in (q, k, v))
        if cuda:
            compiled = torch.compile(flex_attention, dynamic=False)
            found = gradients(functools.partial(compiled, block_mask=tiles), q, k, v)
        else:  # it has no backward on a CPU
            found = (flex_attention(q, k, v, block_mask=tiles),)
        names = ("out", "dQ", "dK", "dV")[:len(found)]
        for name, a, e in zip(names, found, exact, strict=False):
            error = worst([a.cpu()[..., real, :]], [e[..., real, :]])
            results.append(at_most(f"{dtype}: {name}, largest error", error, 1e-2))
    return results


def segmented(pairs):
    """The pairs with their responses cut in three segments with two scores each."""
    g = np.random.default_rng(1)

    def with_segments(p):
        of_token = [np.arange(len(side)) * 3 // len(side) for side in (p.chosen, p.rejected)]
        scores = g.random((2, 3, 2), dtype=np.float32)
        return dataclasses.replace(p, chosen_segment=of_token[0], rejected_segment=of_token[1],
                                   chosen_scores=scores[0], rejected_scores=scores[1])

    return data.pack(with_segments(p) for p in map(pairs.__getitem__, range(len(pairs))))


def one_step(o, loss, pairs, device, dtype, compile=False, pack=None, **cut):
    """The gradient of the mean loss and the log-ratios of the chosen responses, of a policy some way from its
    reference."""
    s = throughput.SIZES["tiny" if o.dry_run else "4x256"]
    config = GPTConfig(97 if o.dry_run else 50257, 2048, *s)
    knobs = {"beta": 0.1, "lam": 50.0, "alpha": 0.5}
    cfg = train.Config(loss=loss, device=device, dtype=dtype, compile=compile, compile_head=compile,
                       n_head=s[1], n_embd=s[2], batch_size=len(pairs), pack=pack, micro_batch_tokens=4096,
                       head_tokens=cut.pop("head_tokens", 5000), **cut,
                       **{name: knobs[name] for name in knobs_of(LOSSES[loss])})
    cfg = dataclasses.replace(cfg, pack=flags.packs(cfg))
    torch.manual_seed(0)
    model = GPT(config, machine.ALIGN)
    policy = GPT(config, machine.ALIGN)
    policy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.003 * torch.randn_like(p))
    kind = torch.float64 if dtype == "float64" else torch.float32
    model, policy = model.to(device, kind).requires_grad_(False), policy.to(device, kind)
    ask = no_reference
    if flags.has_reference(LOSSES[loss]):
        ask = Reference(model, functools.partial(train.hidden_states, model, cfg=cfg),
                        functools.partial(train.response_logps, model, cfg=cfg))
    pairs = train.as_read(pairs, cfg, pairs.score_maximum())
    rows = train.joined([train.step(policy, ask, batch, LOSSES[loss], 1 / len(pairs), cfg)
                         for batch in train.batches(pairs, np.arange(len(pairs)), cfg)], len(pairs))
    order = rows["pair"].argsort()
    ratio = rows["chosen_logps"] - rows.get("ref_chosen_logps", 0)
    gradient = torch.cat([ranks.whole(p.grad).flatten() for p in policy.parameters()]).double().cpu()
    return gradient, ratio[order].double().cpu()


def compare(name, found, exact, limits):
    """1 - cosine and relative error of a gradient, and the largest error of a log-ratio, in nats."""
    a, e = found[0], exact[0]
    numbers = (1 - F.cosine_similarity(a, e, dim=0).item(), ((a - e).norm() / e.norm()).item(),
               (found[1] - exact[1]).abs().max().item())
    words = ("1 - cosine of the gradient", "its relative error", "log-ratio, nats")
    return [at_most(f"{name}: {word}", x, limit)
            for word, x, limit in zip(words, numbers, limits, strict=True)]


FLOAT32, BFLOAT16 = (1e-9, 1e-4, 1e-3), (2e-4, 2e-2, 0.1)


def pairs_for(o):
    return segmented(throughput.make_pairs(options(o, lengths="hh", pairs=8, batches=1, vocab=50257)))


def loss_check(o, loss):
    """One loss: eager and compiled, packed and in rows, in both precisions, against float64 on the CPU."""
    pairs, results = pairs_for(o), []
    exact = one_step(o, loss, pairs, "cpu", "float64")
    for dtype, limits in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
        for compile, pack in ((False, None), (True, False), (True, True)):
            if o.dry_run and (compile or dtype == "bfloat16"):
                continue
            name = f"{dtype}, {'compiled' if compile else 'eager'}{', packed' * bool(pack)}"
            found = one_step(o, loss, pairs, o.device, dtype, compile, pack)
            results += compare(name, found, exact, limits)
    return results


def cuts(o):
    """One micro-batch against several, large chunks against small, in float32 on the device."""
    pairs, results = pairs_for(o), []
    whole = one_step(o, "tdpo2", pairs, o.device, "float32", head_tokens=10**6, micro_batch_size=8)
    for name, cut in (("4 micro-batches", {"micro_batch_size": 2}), ("a pair a chunk", {"head_tokens": 1})):
        found = one_step(o, "tdpo2", pairs, o.device, "float32", **cut)
        results += compare(name, found, whole, FLOAT32)
    return results


def waits(o):
    """A step asks the device for nothing: an error in torch's debug mode once all is compiled."""
    results = []
    for loss in ("dpo", "tdpo2"):
        setting = options(o, loss=loss, size="4x256", lengths="hh", pairs=16, batches=2, peer="rows")
        with tempfile.TemporaryDirectory() as setting.folder:
            setting.side, setting.profile = "ours", False
            throughput.make_weights(setting, setting.folder)
            step = throughput.ours(setting, throughput.make_pairs(setting), lambda: None)
            for i in range(2):  # the second meets both batches' graphs
                step(throughput.batch_index(setting, i))
            if torch.device(o.device).type == "cuda":
                real, train.step = train.step, without_waiting(train.step)
                step(throughput.batch_index(setting, 2))
                train.step = real
                results.append(true(f"{loss}: a step asks the GPU for nothing", True))  # or it has raised
            else:
                results.append(fact(f"{loss}: not checked", "only a GPU can be waited for"))
    return results


def without_waiting(function):
    def strict(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return strict


def command(*words):
    """Run a script of ours: (status, seconds, what it printed)."""
    start = time.perf_counter()
    run = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    return run.returncode, time.perf_counter() - start, run.stdout + run.stderr


def default_run(o):
    """The README's first command, stopped and gone on with, and an answer with its heat map."""
    with tempfile.TemporaryDirectory() as folder:
        out, short = Path(folder, "dpo"), ["--steps", 4, "--sft_steps", 4] * o.dry_run
        status, seconds, text = command("train.py", "--device", o.device, "--out_dir", out, *short)
        found = re.search(r"before the first step: loss ([0-9.]+)", text)
        first = float(found[1]) if found else math.inf
        results = [true("train.py ends well", status == 0), at_most("seconds", seconds, 60),
                   at_most("distance of the first loss from log 2", abs(first - math.log(2)), 1e-2)]
        words = ["train.py", "--device", o.device, "--out_dir", f"{folder}/stop", "--init", str(out),
                 "--steps", "100000"]
        run = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for line in run.stdout:
            if line.startswith("step "):
                run.send_signal(signal.SIGINT)
                break
        run.communicate(timeout=60)
        results.append(true("SIGINT ends a run after its step", run.returncode == 128 + signal.SIGINT))
        done = sorted(Path(folder, "stop", "checkpoints").glob("step-*.json"))[-1:]
        step = int(re.search(r"\d+", done[0].name)[0]) if done else 0
        status, *_ = command("train.py", "--resume", "--out_dir", Path(folder, "stop"), "--steps", step + 3)
        results.append(true("--resume goes on", status == 0))
        status, _, text = command("sample.py", out, "--heat", "--prompt", "Review the blue kettle:",
                                  "--device", o.device)
        results.append(true("sample.py --heat answers", status == 0 and len(text) > 40))
    return results


def real_steps(o):
    """Five steps of DPO in float32, on the device and on the CPU: the same losses."""
    words = ["--loss", "dpo", "--steps", 5, "--sft_steps", 5, "--log_every", 1, "--eval_every", 0,
             "--dtype", "float32", "--batch_size", 16]
    if HH.exists() and not o.dry_run:
        words += ["--data", HH, "--tokenizer", GPT2, "--block_size", 1024]
    logged = []
    for device in (o.device, "cpu"):
        with tempfile.TemporaryDirectory() as folder:
            status, _, text = command("train.py", *words, "--device", device, "--out_dir", f"{folder}/run")
            if status:
                raise RuntimeError(text[-300:])
            lines = map(json.loads, Path(folder, "run", "log.jsonl").read_text().splitlines())
            logged.append([line["loss"] for line in lines if "loss" in line])
    difference = max(abs(a - b) for a, b in zip(*logged, strict=True))
    return [fact("data", HH.name if "--data" in words else "toy"),
            at_most("largest difference of a loss", difference, 1e-2)]


def one_rank(o):
    """fully_shard over one rank, with the device's own communication, changes nothing."""
    import torch.distributed as dist
    pairs = pairs_for(o)
    plain = one_step(o, "tdpo2", pairs, o.device, "float32", micro_batch_size=4)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "RANK": "0", "WORLD_SIZE": "1"}
    cuda = torch.device(o.device).type == "cuda"
    dist.init_process_group("nccl" if cuda else "gloo")
    to, real = GPT.to, train.step

    def sharded(model, *args):
        model = to(model, *args)
        ranks.shard_over(model, 1)
        return model

    def step(policy, reference, batch, loss, scale, cfg):
        policy.set_requires_gradient_sync(True)
        return real(policy, reference, batch, loss, scale, cfg)

    GPT.to, train.step = sharded, step
    try:
        found = one_step(o, "tdpo2", pairs, o.device, "float32", micro_batch_size=4)
    finally:
        GPT.to, train.step = to, real
        dist.destroy_process_group()
    return compare("one rank", found, plain, FLOAT32)


def out_of_memory(o):
    """One line that says what to lower, no traceback."""
    if torch.device(o.device).type != "cuda":
        return [fact("skipped", "only a GPU has a limit to set")]
    with tempfile.TemporaryDirectory() as folder:
        words = ["--device", "cuda", "--n_embd", "1024", "--n_layer", "8", "--out_dir", f"{folder}/run"]
        status, _, text = command("-c", "import torch; torch.cuda.set_per_process_memory_fraction(0.001); "
                                        f"import train; train.main({words})")
    return [true("status 1 and one line with --micro_batch_tokens",
                 status == 1 and "Traceback" not in text and "--micro_batch_tokens" in text)]


# ---------------------------------------------------------------------------------------------------------
# speed and size


def own_steps(o, warmup, steps, **changes):
    """Our step alone: what it took, what memory it reserved, what it compiled, its MFU."""
    setting = options(o, peer="rows", **changes)
    setting.side, setting.profile = "ours", False
    cuda = torch.device(o.device).type == "cuda"
    rate = throughput.matmul_rate(o.device, torch.bfloat16 if cuda else torch.float32)
    pairs = throughput.make_pairs(setting)
    with tempfile.TemporaryDirectory() as setting.folder:
        throughput.make_weights(setting, setting.folder)
        step = throughput.ours(setting, pairs, lambda: None)
        seconds, reserved, graphs, busy = [], [], [], math.nan
        for i in range(warmup + steps):
            machine.synchronize(o.device)
            start = time.perf_counter()
            step(throughput.batch_index(setting, i))
            machine.synchronize(o.device)
            seconds.append(time.perf_counter() - start)
            reserved.append(torch.cuda.memory_reserved() if cuda else machine.peak_memory("cpu"))
            graphs.append(throughput.compiled_graphs())
        if cuda:
            busy = share_of_kernels(lambda: [step(throughput.batch_index(setting, i)) for i in range(5)])
    layers, heads, channels = throughput.SIZES[setting.size]
    config = GPTConfig(setting.vocab, 2048, layers, heads, channels)
    flops = [throughput.useful_flops(config, pairs.rows[throughput.batch_index(setting, i)])
             for i in range(warmup, warmup + steps)]
    mfu = sum(flops) / sum(seconds[warmup:]) / rate
    return {"seconds": seconds[warmup:], "reserved": reserved, "graphs": graphs, "mfu": mfu, "busy": busy}


def share_of_kernels(work):
    """The share of the time of some steps in which the GPU runs a kernel or copies."""
    from torch.profiler import ProfilerActivity, profile
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    return sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6 / elapsed


def padding(o):
    """What share of the trunk's tokens is padding, and how many micro-batches a step has: packed and in rows,
    on pairs of HH where they are there."""
    if HH.exists():
        pairs, _ = data.load([HH], data.Tokenizer(GPT2), 1024)
    else:
        pairs = throughput.make_pairs(options(o, lengths="hh", pairs=256, batches=10, vocab=97))
    results = []
    for size in (64, 256):
        cfg = train.Config(batch_size=size, micro_batch_tokens=32768)
        row = train.row_length(pairs, cfg)
        for name, cut in (("packed", {"tokens": row, "multiple": row, "packed": True}),
                          ("rows", {"tokens": cfg.micro_batch_tokens, "multiple": data.TILE})):
            real = computed = count = 0
            for step in range(20 if o.dry_run else 300):
                index = data.step_indices(len(pairs), size, 0, step)
                micros = data.micro_batches(pairs, index, **cut)
                real, count = real + pairs.lengths[index].sum(), count + len(micros)
                computed += sum(data.collate([pairs[i] for i in micro], cut["multiple"], name == "packed")
                                .tokens.numel() for micro in micros)
            results += [fact(f"{size} pairs, {name}: padding", float(1 - real / computed)),
                        fact(f"{size} pairs, {name}: micro-batches a step", count / (step + 1))]
    return results


def own_speed(o, size, pairs, mfu):
    r = own_steps(o, *((1, 2) if o.dry_run else (10, 30)), size=size, lengths="hh", pairs=pairs, batches=10)
    return [fact("s/step, median", statistics.median(r["seconds"])), at_least("MFU", r["mfu"], mfu),
            at_most("share of the time without a kernel", 1 - r["busy"], 0.1),
            at_most("graphs compiled while timed", r["graphs"][-1] - r["graphs"][-len(r["seconds"]) - 1], 0),
            fact("reserved, GB", max(r["reserved"]) / 1e9)]


def against(o, peer, faster, smaller, **changes):
    """Our step against another's, in turns (throughput.compare)."""
    if peer == "trl" and importlib.util.find_spec("trl") is None:
        return [fact("skipped", "trl is not installed")]
    rounds = {"warmup": 1, "repeats": 2} if o.dry_run else {"warmup": 10, "repeats": 30}
    setting = options(o, **{"peer": peer, "size": "gpt2", "pairs": 32} | changes, lengths="hh", batches=10,
                      json=True, **rounds)
    r = throughput.compare(setting)
    return [fact("s/step, ours", r["ours"]["seconds"]), fact("s/step, theirs", r[peer]["seconds"]),
            at_least("x the time", r["faster"], faster), at_least("x the memory", r["smaller"], smaller),
            at_most("graphs compiled while timed", r["ours"]["compiled_while_measured"], 0)]


def chunks(o, logits):
    """GPT-2 small with chunks of that many logits."""
    vocab = 97 if o.dry_run else 50257
    r = own_steps(o, *((1, 2) if o.dry_run else (10, 20)), size="gpt2", lengths="hh", pairs=256, batches=5,
                  head_tokens=max(1, 2**logits // vocab))
    return [fact("s/step, median", statistics.median(r["seconds"])),
            fact("reserved, GB", max(r["reserved"]) / 1e9)]


def xl(o):
    r = own_steps(o, *((1, 2) if o.dry_run else (5, 10)), size="gpt2-xl", lengths="hh", pairs=64, batches=5)
    return [at_most("reserved, GB", max(r["reserved"]) / 1e9, 70), at_least("MFU", r["mfu"], 0.5),
            fact("s/step, median", statistics.median(r["seconds"]))]


def steady(o):
    """200 steps, each on other pairs: memory, graphs and time stay what they are after 20."""
    steps = 6 if o.dry_run else 200
    warm = steps // 10
    r = own_steps(o, warm, steps - warm, size="gpt2", lengths="hh", pairs=64, batches=steps)
    seconds = r["seconds"]
    slowest = float(np.quantile(seconds, 0.99)) / statistics.median(seconds)
    growth = max(r["reserved"][warm:]) - r["reserved"][warm]
    return [at_most("growth of the reserved memory, GB", growth / 1e9, 0),
            at_most("graphs compiled after the warm-up", r["graphs"][-1] - r["graphs"][warm - 1], 0),
            at_most("99th percentile of a step / median", slowest, 1.3)]


# ---------------------------------------------------------------------------------------------------------
# The parts: {check: (function, its arguments, seconds at most)}

SMALL, COMPILED = {"size": "gpt2"}, {"peer_compile": True}
CLASSIC = {"peer": "classic", "faster": 4, "smaller": 4}
TRL = {"peer": "trl", "faster": 3, "smaller": 4}
PARTS = {
    "correctness": {
        "versions": (versions, {}, 60), "masked attention": (masked, {}, 60), "flex": (flex, {}, 90),
        **{loss: (loss_check, {"loss": loss}, 120) for loss in LOSSES},
        "cuts": (cuts, {}, 60), "waits": (waits, {}, 90), "default run": (default_run, {}, 150),
        "five steps": (real_steps, {}, 150), "one rank": (one_rank, {}, 60),
        "out of memory": (out_of_memory, {}, 60)},
    "speed": {
        "small, 64 pairs": (own_speed, SMALL | {"pairs": 64, "mfu": 0.30}, 90),
        "small, 256 pairs": (own_speed, SMALL | {"pairs": 256, "mfu": 0.38}, 90),
        "medium, 64 pairs": (own_speed, {"size": "gpt2-medium", "pairs": 64, "mfu": 0.45}, 120),
        "padding": (padding, {}, 90),
        "rows": (against, {"peer": "rows", "faster": 1.5, "smaller": 0.8, "pairs": 64}, 150),
        "classic": (against, CLASSIC, 90), "classic, compiled": (against, CLASSIC | COMPILED, 150),
        "TRL": (against, TRL, 120), "TRL, compiled": (against, TRL | COMPILED, 150),
        "official TDPO": (against, {"peer": "tdpo", "faster": 4, "smaller": 4, "pairs": 16}, 120)},
    "size": {
        "XL": (xl, {}, 240), "200 steps": (steady, {}, 150),
        **{f"chunks of 2^{n} logits": (chunks, {"logits": n}, 60) for n in (27, 28, 29, 30)}},
}


def check(o):
    """Run one check in this process: its line of JSON, and nothing else, on standard output."""
    out, sys.stdout = sys.stdout, sys.stderr
    function, arguments, _ = PARTS[o.part][o.check]
    start, line = time.perf_counter(), {"part": o.part, "check": o.check}
    try:
        line["results"] = function(o, **arguments)
    except (Exception, SystemExit) as e:
        line["error"] = f"{type(e).__name__}: {e}"[:500]
    print(json.dumps(line | {"seconds": round(time.perf_counter() - start, 1)}), file=out, flush=True)


def run(o, name):
    """One check in a process of its own: its line, or why there is none."""
    limit = PARTS[o.part][name][2]
    words = [sys.executable, __file__, "--part", o.part, "--check", name, "--device", o.device]
    words += ["--dry-run"] * o.dry_run
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        text, _ = process.communicate(timeout=limit)
        line = json.loads(text.splitlines()[-1])
        for result in line.get("results", []) if o.dry_run and o.part != "correctness" else []:
            result.pop("goal", None)
            result.pop("holds", None)
        return line
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"part": o.part, "check": name, "error": f"took longer than {limit} s", "seconds": limit}
    except (IndexError, ValueError):
        return {"part": o.part, "check": name, "error": f"stopped with status {process.returncode}",
                "seconds": None}


def shown(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(lines):
    rows = ["| check | what | value | goal | |", "|---|---|---|---|---|"]
    for line in lines:
        for r in line.get("results", []):
            verdict = {True: "holds", False: "**fails**"}.get(r.get("holds"), "")
            cells = line["check"], r["what"], shown(r["value"]), r.get("goal", ""), verdict
            rows.append(f"| {' | '.join(cells)} |")
        if "error" in line:
            rows.append(f"| {line['check']} | {line['error']} | | | **fails** |")
    return "\n".join(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--device", help="default: cuda, cpu in a dry run")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU: do all run?")
    parser.add_argument("--no-assert", action="store_true", help="exit status 0 whatever the checks find")
    parser.add_argument("--only", nargs="+", help="these checks of the part")
    parser.add_argument("--out", help="where the lines of JSON go, appended; default gpu-PART.jsonl")
    parser.add_argument("--check", help=argparse.SUPPRESS)
    o = parser.parse_args(argv)
    o.device = o.device or ("cpu" if o.dry_run else "cuda")
    if o.check:
        return check(o)
    lines, out = [], Path(o.out or f"gpu-{o.part}.jsonl")
    for name in o.only or PARTS[o.part]:
        lines.append(run(o, name))
        with open(out, "a") as f:
            f.write(json.dumps(lines[-1]) + "\n")
        print(f"{name}: {lines[-1]['seconds']} s {lines[-1].get('error', '')}", flush=True)
    print("\n" + markdown(lines))
    ends = [r["holds"] for line in lines for r in line.get("results", []) if "holds" in r]
    failed = ends.count(False) + sum("error" in line for line in lines)
    print(f"\n{len(lines)} checks, {len(ends)} goals, {failed} not met")
    return 1 if failed and not o.no_assert else 0


if __name__ == "__main__":
    sys.exit(main())
