"""What a GPU must show: python -m pytest -m gpu [-k correctness | speed], about ten minutes.

**None of it has run on a GPU yet**: none was at hand. Without CUDA it is skipped; the test without the mark
runs the same functions on the CPU. Correctness compares runs of train.py with the CPU's in float64. Rows of
speed and size, with GPU and commit, are appended as JSON lines to $TERMWISE_GPU_ROWS (by default
experiments/results/gpu.jsonl) before goals are checked: goals are guesses until one has been met.
"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from losses import LOSSES
from model import GPT
from plumbing import ranks

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import throughput  # noqa: E402

CUDA, OURS = torch.cuda.is_available(), {"ours": ("ours", ROOT)}

def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.slow(pytest.mark.skipif(not CUDA, reason="no CUDA here")(test)))

def make_start(folder, size, vocab, lengths):
    """A reference, a policy some way from it, and eight pairs of three scored segments."""
    o = throughput.parse(f"--size {size} --vocab {vocab} --pairs 8 --batches 1 --lengths {lengths}".split())
    o.folder = folder
    throughput.make(o)
    shutil.copytree(folder / "start", folder / "policy")
    model = GPT.from_pretrained(o.model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.003 * torch.randn_like(p))
    model.save_pretrained(folder / "policy", eos=vocab - 1)
    rng, records = np.random.default_rng(2), throughput.read_records(o)
    for record, side in itertools.product(records, ("chosen", "rejected")):
        text, n = record[side], len(record[side])
        parts = text[:n // 3], text[n // 3:n // 2], text[n // 2:]
        record[side] = [{"text": part, "scores": rng.integers(0, 5, 2).tolist()} for part in parts if part]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder

@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_start(tmp_path_factory.mktemp("gpu"), "4x256", 50257, "hh")

def first_step(folder, loss, device, dtype, flags="--no-compile"):
    """(gradient, {name: number logged}) of the first step of train.py with these flags."""
    out, gradients = folder / f"run-{len(list(folder.iterdir()))}", []

    def keep(optimizer, *_):
        if gradients:
            raise SystemExit("the second step: enough")
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.append(torch.cat([ranks.whole(p.grad).flatten() for p in weights]).double().cpu())

    hook = throughput.register_optimizer_step_post_hook(keep)
    try:
        with pytest.raises(SystemExit, match="enough"):
            ref = f"--ref {folder}/start" if loss != "sft" else ""
            train.main(f"--loss {loss} --init {folder}/policy {ref} --data {folder}/pairs.jsonl --steps 9 "
                       f"--val_data {folder}/pairs.jsonl --out_dir {out} --grad_clip 0 --log_every 1 "
                       f"--batch_size 8 --eval_every 0 --device {device} --dtype {dtype} {flags}".split())
    finally:
        hook.remove()
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return gradients[0], next(line for line in lines if "loss" in line)

FLOAT32, BFLOAT16 = (1e-9, 1e-4, 1e-3), (2e-4, 2e-2, 0.1)  # largest errors that `agree` allows
exact = {}  # {loss: its first step on the CPU in float64}

def agree(found, exact, limits):
    (g, logged), (e, expected), (cosine, relative, nats) = found, exact, limits
    assert 1 - F.cosine_similarity(g, e, dim=0) < cosine and (g - e).norm() < relative * e.norm()
    for name in ("logps/chosen", "logratio/chosen", "logratio/rejected"):
        assert abs(logged.get(name, 0) - expected.get(name, 0)) < nats, name

@on_gpu
@pytest.mark.parametrize("dtype, flags, limits", [
    ("float32", "--no-compile", FLOAT32), ("float32", "--compile", FLOAT32),
    ("bfloat16", "--compile", BFLOAT16)])
@pytest.mark.parametrize("loss", LOSSES)
def test_correctness_of_a_step(loss, dtype, flags, limits, large):
    """Gradient and log-ratios are those of the CPU in float64."""
    if (loss, dtype) == ("dpop", "bfloat16"):
        pytest.skip("rounding decides in bfloat16 whether DPOP's penalty is active")
    if loss not in exact:
        exact[loss] = first_step(large, loss, "cpu", "float64")
    agree(first_step(large, loss, "cuda", dtype, flags), exact[loss], limits)

def check_cuts(folder, device):
    """Four micro-batches for one, a chunk a pair: the same step."""
    whole = first_step(folder, "tdpo2", device, "float32")
    for cut in ("--micro_batch_size 2", "--head_tokens 1"):
        agree(first_step(folder, "tdpo2", device, "float32", f"--no-compile {cut}"), whole, FLOAT32)

def check_one_rank(folder, device, monkeypatch):
    """fully_shard over one rank, with the device's own communication, changes nothing."""
    plain = first_step(folder, "tdpo2", device, "float32")
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", rank=0, world_size=1,
                                         init_method=f"file://{folder}/rendezvous")
    monkeypatch.setattr(ranks, "shard", partial(ranks.shard_over, n=1))
    monkeypatch.setattr(ranks, "reduce_gradients", lambda model, now: model.set_requires_gradient_sync(now))
    try:
        agree(first_step(folder, "tdpo2", device, "float32"), plain, FLOAT32)
    finally:
        torch.distributed.destroy_process_group()

@on_gpu
def test_correctness_of_micro_batches_chunks_and_one_rank_of_nccl(large, monkeypatch):
    check_cuts(large, "cuda")
    check_one_rank(large, "cuda", monkeypatch)

@pytest.mark.slow
def test_what_the_gpu_tests_do_runs_on_a_cpu(tmp_path, monkeypatch):
    """Tiny: 2D-DPO twice, chunks, micro-batches, one rank of gloo; and a wrong gradient is found."""
    folder = make_start(tmp_path, "tiny", 300, "tiny")
    gradient, logged = first_step(folder, "2d-dpo", "cpu", "float64")
    agree(first_step(folder, "2d-dpo", "cpu", "float32"), (gradient, logged), FLOAT32)
    with pytest.raises(AssertionError):
        agree((gradient * 1.001, logged), (gradient, logged), FLOAT32)
    check_cuts(folder, "cpu")
    check_one_rank(folder, "cpu", monkeypatch)

@on_gpu
@pytest.mark.parametrize("T", [640, 704])
def test_correctness_of_masked_attention(T):
    """Rows at whose width cuDNN's backward gives NaN (pytorch issue 196678): another kernel runs them."""
    q, v = 4 + 0.1 * torch.randn(2, 4, T, 64), torch.randn(2, 4, T, 64)
    q, k, v = (x.to("cuda", torch.bfloat16).requires_grad_() for x in (q, -q, v))
    mask = torch.ones(T, T, dtype=torch.bool, device="cuda").tril()
    chosen = torch._fused_sdp_choice(q, k, v, attn_mask=mask)
    assert chosen != torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value
    F.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))

@on_gpu
@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_correctness_no_step_waits_for_the_gpu(loss, large, monkeypatch):
    """From the second step on, when all is compiled, train.step asks the GPU for nothing."""
    real, calls = train.step, []

    def strict(policy, reference, batch, loss, scale, cfg):
        torch.cuda.set_sync_debug_mode("error" if calls and scale is not None else "default")
        try:
            return real(policy, reference, batch, loss, scale, cfg)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            calls.append(scale)

    monkeypatch.setattr(train, "step", strict)
    first_step(large, loss, "cuda", "bfloat16", "--compile --micro_batch_size 8")
    assert sum(scale is not None for scale in calls) == 2  # one of each step

def script(*words):
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)

@on_gpu
def test_correctness_of_a_run_stopped_and_resumed(tmp_path):
    """train.py begins at log 2; SIGINT saves, and --resume goes on."""
    out, stop = tmp_path / "dpo", tmp_path / "stop"
    run = script("train.py", "--out_dir", out)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    first = next(line["eval/loss"] for line in lines if "eval/loss" in line)
    assert first == pytest.approx(np.log(2), abs=1e-2)
    words = ["train.py", "--init", str(out), "--out_dir", str(stop), "--steps", "100000"]
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    next(line for line in process.stdout if line.startswith("step "))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    step = max(int(re.search(r"\d+", f.name)[0]) for f in (stop / "checkpoints").iterdir())
    assert script("train.py", "--resume", "--out_dir", stop, "--steps", step + 3).returncode == 0

@on_gpu
def test_correctness_out_of_memory_says_what_to_lower(tmp_path):
    run = script("-c", "import torch; torch.cuda.set_per_process_memory_fraction(0.001); import train; "
                 f"train.main(['--n_embd', '1024', '--n_layer', '8', '--out_dir', '{tmp_path}/run'])")
    assert run.returncode == 1 and "--micro_batch_tokens" in run.stderr

# ---- Speed and size: rows ----

def measured(flags, sides=None):
    """The numbers of throughput.py with these flags, written as a row."""
    o = throughput.parse(["--lengths", "hh", "--batches", "10", "--repeats", "20", *flags.split()])
    r = throughput.compare(o, sides)
    path = Path(os.environ.get("TERMWISE_GPU_ROWS", ROOT / "experiments" / "results" / "gpu.jsonl"))
    with open(path, "a") as rows:
        rows.write(json.dumps({"flags": flags} | throughput.where(o) | r) + "\n")
    return r

@on_gpu
@pytest.mark.parametrize("size, pairs, mfu", [
    ("gpt2", 64, 0.3), ("gpt2", 256, 0.38), ("gpt2-medium", 64, 0.45), ("gpt2-xl", 64, 0.5)])
def test_speed_and_size_of_our_step(size, pairs, mfu):
    """A share of the GPU's own matrix product in bfloat16, at most 70 GB, and no graph compiled late."""
    r = measured(f"--size {size} --pairs {pairs}", OURS)["ours"]
    assert r["mfu"] >= mfu and r["memory"] <= 70e9 and r["graphs_while_measured"] == 0

@on_gpu
@pytest.mark.parametrize("flags, faster", [
    ("--peer classic --pairs 32", 4), ("--peer classic --pairs 32 --peer_compile", 4),
    ("--peer tdpo --pairs 16", 4), ("--peer trl --pairs 32", 3)])
def test_speed_beside_others(flags, faster):
    if "trl" in flags:
        pytest.importorskip("trl")
    r = measured(f"--size gpt2 {flags}")
    assert r["faster"] >= faster and r["smaller"] >= 4 and r["ours"]["graphs_while_measured"] == 0

@on_gpu
def test_speed_stays_over_200_steps_of_new_pairs():
    """No graph after 20 steps, and no step 1.5 times as long as the median."""
    r = measured("--size gpt2 --pairs 64 --live --warmup 20 --repeats 180", OURS)["ours"]
    assert r["graphs_while_measured"] == 0 and r["slowest"] <= 1.5 * r["seconds"]
