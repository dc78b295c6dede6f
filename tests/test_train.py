"""train.py: the gradient of a step, the stored reference, the logged numbers, the flags, a whole run.

Data are made here, in the segment form, with bytes as tokens: tests know every token without asking data.py.
`plain_losses` is the other implementation: a pair is two separate sequences, ordinary causal forward, full
logits, one softmax; it shares with train.py only losses.py's equations (test_losses.py proves those) and GPT.
"""

import copy
import dataclasses
import inspect
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._inductor.exc import CppCompileError
from torch.utils._python_dispatch import TorchDispatchMode

import data
import health
import losses
import runs
import train
from model import GPT, GPTConfig
from train import LOSSES, Config, ConfigError, RunError

pytestmark = pytest.mark.slow  # processes and training: seconds each

HERE = Path(__file__).resolve().parent
BYTES = data.Tokenizer("bytes")
PREFERENCE = [loss for loss in LOSSES if loss != "sft"]
READS = {  # which of a loss's knobs each loss reads
    "sft": [], "dpo": ["beta"], "dpop": ["beta", "lam"], "tdpo1": ["beta"], "tdpo2": ["beta", "alpha"],
    "2d-dpo": ["beta", "aspect_weights", "rejected_weight"],
    "2d-dpo-vanilla": ["beta", "aspect_weights", "rejected_weight"]}
KNOBS = {"beta": 0.2, "lam": 7.0, "alpha": 0.25, "aspect_weights": (0.25, 0.75), "rejected_weight": "score"}


# ---------------------------------------------------------------------------------------------------------
# Helpers: data


def make_records(n=8, seed=0, segments=None):
    """Pairs whose prompts, responses and numbers of segments differ in length; scores 1 to 4 and 0 to 2, the
    maxima reached; the first one has a segment without a token. segments: of every response."""
    r = random.Random(seed)

    def text(longest):
        return "".join(r.choices("abcdefgh", k=r.randint(1, longest)))

    def response():
        return [{"text": f"{text(5)}{i}", "scores": [r.randint(1, 4), r.randint(0, 2)]}
                for i in range(segments or r.randint(1, 3))]

    made = [{"prompt": text(6) + "?", "chosen": response(), "rejected": response()} for _ in range(n)]
    if segments:
        return made
    made[0]["chosen"] = [{"text": "ab.", "scores": [4, 1]}, {"text": "", "scores": [4, 2]},
                         {"text": " c.", "scores": [1, 0]}]
    return made


RECORDS = make_records()


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def load_records(records, tmp_path):
    return data.load([write_lines(tmp_path / "pairs.jsonl", records)], BYTES, 64)[0]


@pytest.fixture
def pairs(tmp_path):
    return load_records(RECORDS, tmp_path)


# ---------------------------------------------------------------------------------------------------------
# Helpers: models and runs


def small(seed, vocab_size=257, std=0.15, n_embd=16, block_size=64):
    """A small GPT in which every weight matters, biases included; another seed is 1 / 10 away from it."""
    model = GPT(GPTConfig(vocab_size, block_size, 2, 2, n_embd))
    common, own = (torch.Generator().manual_seed(s) for s in (99, seed))
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=common) + 0.1 * torch.randn(p.shape, generator=own)
            p.copy_(std * noise + ("ln_" in name and "weight" in name))
    return model


@pytest.fixture(autouse=True)
def known_matmul_rate(monkeypatch):
    """Measuring it takes longer than most runs here."""
    monkeypatch.setattr(train, "matmul_rate", lambda *_: 1e9)


def save_model(folder, seed):
    small(seed).save_pretrained(folder)
    BYTES.save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model_a(tmp_path_factory):
    """A model folder with the bytes tokenizer."""
    return save_model(tmp_path_factory.mktemp("a"), 0)


@pytest.fixture(scope="session")
def model_b(tmp_path_factory):
    """Another one, not far from it."""
    return save_model(tmp_path_factory.mktemp("b"), 1)


def config(loss, **changes):
    """A Config without gaps, in float64 on the CPU; 2D-DPO's weights are uneven."""
    uneven = {"aspect_weights": (0.25, 0.75)} if loss.startswith("2d") else {}
    plain = {"device": "cpu", "compile": False, "dtype": "float64", "out_dir": "unused"}
    return train.fill_defaults(Config(loss=loss, **plain | uneven | changes))


def make_engine(loss, pairs, policy=0, reference=1, models=None, **changes):
    """An Engine in float64 (or changes' dtype) whose policy is not its reference; the reference is live."""
    cfg = config(loss, **changes)
    dtype = torch.float64 if cfg.dtype == "float64" else torch.float32
    policy, reference = (m.to(dtype) for m in models or (small(policy), small(reference)))
    maximum = pairs.score_maximum() if pairs.n_aspects else None
    reference = None if loss == "sft" else reference.requires_grad_(False)
    return train.Engine(cfg, policy, reference, maximum)


def store(engine, pairs, index, split, folder, ref_hash="hash"):
    """Store the reference's numbers of pairs[index], in the engine's micro-batches."""
    micros = data.micro_batches(pairs, index, engine.cfg.micro_batch_size)
    train.store_reference(engine, pairs, micros, split, folder, ref_hash)


def run_step(engine, pairs, micro=100, index=None, scale=0.125):
    """A step's rows joined in the order of the pairs, {name: (B,)}, and its gradient, {name: tensor}."""
    engine.policy.zero_grad()
    pairs = pairs.chosen_only() if engine.cfg.loss == "sft" else pairs
    index = np.arange(len(pairs)) if index is None else index
    micros = data.micro_batches(pairs, index, micro)
    rows = [engine.run_pairs(pairs, m, "train", scale) for m in micros]
    order = np.argsort(np.concatenate(micros))
    return ({name: torch.cat([row[name] for row in rows])[order] for name in rows[0]},
            {name: p.grad.clone() for name, p in engine.policy.named_parameters()})


def assert_same(actual, expected, tolerance=1e-10):
    """The same names, and tensors equal to a tolerance relative to the largest entry of each. None is all 0
    in what is expected, so that nothing is compared in vain (SFT's empty rejected responses excepted)."""
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        size, error = e.abs().max(), (actual[name].double() - e.double()).abs().max()
        assert size > 0 or name == "rejected_logps", name
        assert error <= tolerance * size, f"{name}: {error:.2e} of {size:.2e}"


def run(tmp_path, loss="dpo", **changes):
    """A short run on RECORDS: (what train returns, folder, first record, training lines, evaluations)."""
    file = write_lines(tmp_path / "run.jsonl", RECORDS)
    plain = {"data": (file,), "val_data": (file,), "device": "cpu", "out_dir": str(tmp_path / "run"),
             "steps": 1, "batch_size": 8, "overwrite": True, "log_every": 1, "eval_every": 0, "save_every": 0}
    cfg = Config(loss=loss, **plain | changes)
    return train.train(cfg), Path(cfg.out_dir), *read_log(cfg.out_dir)


def read_log(folder):
    head, *lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return head, [x for x in lines if "loss" in x], [x for x in lines if "eval/loss" in x]


def step_gradient(folder, step=1):
    """The gradient that AdamW was given in the first step: its first moment is (1 - 0.9) times that."""
    tensors = load_file(folder / "checkpoints" / f"step-{step:07}.safetensors")
    gradient = {name[8:]: m / (1 - 0.9) for name, m in tensors.items() if name.startswith("exp_avg.")}
    rows = gradient["wte.weight"]
    assert rows.shape[0] % train.ALIGN == 0 and not rows[BYTES.vocab_size:].any()  # nothing moves the padding
    return gradient | {"wte.weight": rows[:BYTES.vocab_size]}


def weights(folder):
    return dict(GPT.from_pretrained(folder).named_parameters())


# ---------------------------------------------------------------------------------------------------------
# Helpers: the other implementation


def plain_side(model, prompt, ids):
    """log-softmax over the vocabulary at every response position (C, V), from one ordinary sequence."""
    tokens = torch.tensor([prompt + ids])
    return model.logits(model(tokens))[0, len(prompt) - 1:-1].log_softmax(-1)


def plain_losses(cfg, policy, reference, records, maximum=(4.0, 2.0)):
    """The losses of the records, (B,), from two separate sequences per pair."""
    result = []
    for record in records:
        prompt, t = list(record["prompt"].encode()), {}
        for side in ("chosen", "rejected"):
            lengths = [len(segment["text"]) for segment in record[side]]
            ids = [*"".join(segment["text"] for segment in record[side]).encode(), BYTES.eot]
            lengths[-1] += 1  # end-of-text joins the last segment
            log_s = plain_side(policy, prompt, ids)
            logps = log_s[range(len(ids)), ids]
            if cfg.loss == "sft":
                result += [losses.sft_loss(logps.sum())] if side == "chosen" else []
                continue
            with torch.no_grad():
                log_q = plain_side(reference, prompt, ids)
            split = (lambda x, n=lengths: torch.stack([part.sum() for part in x.split(n)])[None]) \
                if cfg.loss.startswith("2d") else (lambda x: x.sum()[None])
            t[f"{side}_logps"], t[f"ref_{side}_logps"] = split(logps), split(log_q[range(len(ids)), ids])
            if cfg.loss.startswith("tdpo"):
                t[f"{side}_seq_kl"] = (log_q.exp() * (log_q - log_s)).sum()[None]
            if cfg.loss.startswith("2d"):
                aspects = list(zip(cfg.aspect_weights, maximum, strict=True))
                r = [sum(w * s / m for s, (w, m) in zip(segment["scores"], aspects, strict=True))
                     for segment in record[side]]
                r = [1 - x for x in r] if (side, cfg.rejected_weight) == ("rejected", "badness") else r
                t[f"{side}_rewards"] = torch.tensor([r], dtype=torch.float64)
                t[f"{side}_mask"] = torch.tensor([lengths]) > 0
        if t:
            knobs = {name: getattr(cfg, name) for name in ("beta", "lam", "alpha") if name in READS[cfg.loss]}
            result.append(LOSSES[cfg.loss](**t, **knobs)[0])
    return torch.stack(result)


def plain_gradient(cfg, policy, reference, records, denominator):
    """(losses, gradient) of the sum of the losses over the denominator."""
    policy.zero_grad()
    result = plain_losses(cfg, policy, reference, records)
    (result.sum() / denominator).backward()
    return result.detach(), {name: p.grad.clone() for name, p in policy.named_parameters()}


def response_tokens(records):
    """Tokens of the chosen responses, end-of-text included."""
    return sum(len("".join(s["text"] for s in record["chosen"])) + 1 for record in records)


# ---------------------------------------------------------------------------------------------------------
# 1  Chunks and micro-batches change nothing


@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_of_any_number_of_pairs_give_the_same_losses_and_gradients(loss, pairs):
    expected, counts = run_step(make_engine(loss, pairs, head_tokens=10**6), pairs), set()
    for head_tokens in (1, 30, 60, 100):
        engine = make_engine(loss, pairs, head_tokens=head_tokens)
        batch = engine.collate(pairs, np.arange(len(pairs)))
        counts.add(max(end - first for first, end in batch.chunks(head_tokens)))
        for actual, e in zip(run_step(engine, pairs), expected, strict=True):
            assert_same(actual, e)
    assert len(counts) >= 3 and 1 in counts, counts  # pairs in the largest chunk


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_of_any_size_give_the_same_losses_and_gradients(loss, pairs):
    engine = make_engine(loss, pairs, head_tokens=40)
    expected = run_step(engine, pairs, micro=len(pairs))
    for micro in (1, 2, 3, 5):
        for actual, e in zip(run_step(engine, pairs, micro), expected, strict=True):
            assert_same(actual, e)


@pytest.mark.parametrize("loss, changes", [(loss, {}) for loss in LOSSES]
                         + [("2d-dpo-vanilla", {"rejected_weight": "badness"})])
def test_losses_and_gradients_equal_those_of_two_separate_sequences_with_full_logits(loss, changes, pairs):
    """One padded batch, chunked, the reference live; for 2D-DPO the scores over their aspect's maximum, an
    empty segment masked, badness = 1 - score."""
    engine = make_engine(loss, pairs, head_tokens=40, **changes)
    assert (engine.collate(pairs, np.arange(len(pairs))).branch == data.PADDING).any()
    rows, gradient = run_step(engine, pairs)
    expected = plain_gradient(engine.cfg, engine.policy, engine.reference, RECORDS, denominator=8)
    assert_same({"loss": rows["loss"]} | gradient, {"loss": expected[0]} | expected[1])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_optimizer_gets_the_mean_over_the_steps_pairs_or_for_sft_over_its_response_tokens(
        loss, model_a, model_b, tmp_path):
    """Through train(): data, stored reference, knobs, aspect weights and the one division of the step; the
    gradient is read from AdamW's first moment. Micro-batches of 3, 3 and 2."""
    changes = {name: KNOBS[name] for name in READS[loss]}
    changes |= {"ref": model_b} if loss != "sft" else {}
    _, folder, head, lines, _ = run(tmp_path, loss, init=model_a, dtype="float64", grad_clip=0,
                                    micro_batch_size=3, head_tokens=40, **changes)
    models = [GPT.from_pretrained(name).double() for name in (model_a, model_b)]
    denominator = response_tokens(RECORDS) if loss == "sft" else len(RECORDS)
    cfg = config(loss, **{name: KNOBS[name] for name in READS[loss]})
    expected, gradient = plain_gradient(cfg, *models, RECORDS, denominator)
    assert_same(step_gradient(folder), gradient)
    assert lines[0]["loss"] == pytest.approx(expected.sum().item() / denominator, rel=1e-10)
    norm = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
    assert lines[0]["grad_norm"] == pytest.approx(norm, rel=1e-10)


def test_a_pair_read_twice_in_a_step_counts_twice(model_a, model_b, tmp_path):
    """12 pairs a step from a file of 8: the step ends one epoch and begins the next."""
    _, folder, *_ = run(tmp_path, init=model_a, ref=model_b, dtype="float64", grad_clip=0,
                        batch_size=12, micro_batch_size=5)
    models = [GPT.from_pretrained(name).double() for name in (model_a, model_b)]
    index = data.step_indices(8, 12, 0, 0)
    _, gradient = plain_gradient(config("dpo"), *models, [RECORDS[i] for i in index], 12)
    assert_same(step_gradient(folder), gradient)


def test_a_step_starts_without_the_gradient_of_the_step_before(model_a, tmp_path):
    """The same pairs in both steps and next to no update between them: the same norm."""
    *_, lines, _ = run(tmp_path, init=model_a, dtype="float64", steps=2, lr=1e-20)
    assert lines[1]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-10)


# ---------------------------------------------------------------------------------------------------------
# 2  No logits of the whole batch


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns, forward and backward."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_is_larger_than_the_logits_of_one_chunk(loss, cached, pairs, tmp_path):
    """Nor for TDPO's KL over the full vocabulary, nor while the reference is stored, nor at an evaluation."""
    V, index = 5000, np.arange(len(pairs))
    models = [small(seed, vocab_size=V, n_embd=8) for seed in (0, 1)]
    engine = make_engine(loss, pairs, models=models, dtype="float32", head_tokens=1)
    batch = engine.collate(pairs, index)
    n = max(batch.starts[end] - batch.starts[first] for first, end in batch.chunks(1))
    assert 3 * n <= len(batch.target)
    with Largest() as largest:
        if cached and engine.reference:
            for split in ("train", "val"):
                store(engine, pairs, index, split, tmp_path)
        run_step(engine, pairs)
        train.evaluate(engine, pairs)
    assert largest.numel == n * V, (largest.numel / V, n)


def test_bfloat16_products_of_ever_new_shapes_do_not_fill_the_memory():
    """train.py bounds the cache of their workspaces. Skipped where nothing grows without a bound."""
    program = """
import train, torch
memory = lambda: int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024
torch.set_num_threads(1)
x, w = torch.ones(300, 1024, dtype=torch.bfloat16), torch.ones(1024, 1024, dtype=torch.bfloat16)
x[:100] @ w
before = memory()
for n in range(101, 300):
    x[:n] @ w
print(memory() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    plain = {name: x for name, x in os.environ.items() if "CACHE_CAPACITY" not in name}
    unbounded = plain | {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024", "LRU_CACHE_CAPACITY": "1024"}
    started = [subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=HERE.parent, text=True,
                                stdout=subprocess.PIPE) for environment in (plain, unbounded)]
    grown, without = (int(process.communicate()[0]) for process in started)  # here 20 and 125 MB
    if without < 60e6:
        pytest.skip(f"products of this CPU keep {without / 1e6:.0f} MB")
    assert grown < 0.5 * without


@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_bfloat16_keeps_the_digits_of_logits_of_which_all_are_large(loss, pairs):
    """Logits of about -100, as GPT-2's: bfloat16 would round them to 0.5, and their gradients with them."""
    models = [small(0), small(1)]
    with torch.no_grad():
        for model in models:
            model.wte.weight[:, 0] -= 10
            model.ln_f.bias[0] += 10
    batch = make_engine(loss, pairs, models=models, dtype="float32").collate(pairs, range(8))
    hidden = models[0](batch.tokens, batch.positions, batch.mask())
    assert models[0].logits(hidden).median() < -64  # where bfloat16 has steps of 0.5
    for model in models:  # with the zero rows that train.py's models have
        table = torch.cat([model.wte.weight.detach(), torch.zeros(63, 16)])
        model.wte.weight = torch.nn.Parameter(table)
    results = {}
    for dtype in ("bfloat16", "float64"):
        engine = make_engine(loss, pairs, models=[copy.deepcopy(m) for m in models], dtype=dtype)
        results[dtype] = run_step(engine, pairs)
    (rows, gradient), (right, right_gradient) = results.values()
    tokens = pairs.rows[:, 2] + pairs.rows[:, 3]
    for name in ("chosen_logps", "ref_chosen_logps"):
        assert ((rows[name] - right[name]).abs() < 0.004 * torch.from_numpy(tokens)).all()
    for name, g in right_gradient.items():
        assert (gradient[name] - g).norm() < 0.05 * g.norm(), name


# ---------------------------------------------------------------------------------------------------------
# 3  The stored reference


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-4), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("loss", ["dpo", "tdpo2", "2d-dpo"])
def test_a_stored_reference_gives_what_the_live_one_gives_to_rounding(
        loss, dtype, tolerance, pairs, tmp_path):
    """In other micro-batches than it was stored in, some pairs out of order; in the same ones bit for bit."""
    index, some = np.array([0, 2, 3, 5, 6, 7]), np.array([5, 0, 7, 2])
    engine = make_engine(loss, pairs, dtype=dtype, micro_batch_size=4, head_tokens=30)
    expected, live = run_step(engine, pairs, index=some), train.evaluate(engine, pairs)
    micro = data.micro_batches(pairs, index, 4)[0]
    exact = engine.run_pairs(pairs, micro, "train")
    store(engine, pairs, index, "train", tmp_path)
    store(engine, pairs, np.arange(8), "val", tmp_path)
    engine.reference.h = engine.ref_trunk = None  # as train() does: only the head is left
    for actual, e in zip(run_step(engine, pairs, index=some, micro=3), expected, strict=True):
        assert_same(actual, e, tolerance)
    again = engine.run_pairs(pairs, micro, "train")
    assert all(torch.equal(again[name], exact[name]) for name in exact if name in again)
    assert train.evaluate(engine, pairs) == live
    size = {"float64": 8, "float32": 4, "bfloat16": 2}[dtype]  # log-probabilities are never bfloat16
    assert np.load(tmp_path / "reference-val.npy").itemsize == size
    assert np.load(tmp_path / "reference-train.npy").itemsize == (size if loss == "tdpo2" else max(4, size))


def test_a_stale_store_is_noticed_and_made_again(tmp_path, capsys):
    """A store made with other reference weights, for other prompts (of the same lengths), for other pairs
    (with as many tokens), or with one byte changed is not read; an intact one is."""
    asked = [record | {"prompt": record["prompt"].replace("?", "!")} for record in RECORDS]
    pairs, other = (load_records(records, tmp_path) for records in (RECORDS + asked[:1], asked + RECORDS[:1]))
    path, first, last = tmp_path / "reference-train.npy", np.arange(8), np.arange(1, 9)

    def stored(reference, pairs, index):
        """What a new engine reads in the store and what its reference says itself; what was printed."""
        engine = make_engine("dpo", pairs, reference=reference)
        store(engine, pairs, index, "train", tmp_path, runs.weights_hash(engine.reference))
        batch = engine.collate(pairs, index)
        live, _, _ = train.head(engine.reference, engine.hidden(engine.ref_trunk, batch), batch.target)
        assert_same({"logps": engine.stores["train"].look_up(index)}, {"logps": live})
        return capsys.readouterr().out

    said = stored(1, pairs, first)
    assert re.fullmatch(r"reference: log-probabilities of 8 train pairs stored, \d+ tokens, 0.0 MB\n", said)
    assert stored(1, pairs, first) == f"reference: log-probabilities of 8 train pairs are in {path}\n"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    for args in ((1, pairs, first), (2, pairs, first), (2, other, first), (2, other, last)):
        assert "made again: others, or damaged ones, are in" in stored(*args), args
    path.with_suffix(".json").write_text("{")
    assert "stored" in stored(2, other, last)


def test_a_run_over_an_older_one_with_another_reference_does_not_read_its_store(model_a, model_b, tmp_path):
    changes = {"init": model_a, "dtype": "float64"}
    fresh = run(tmp_path, ref=model_b, out_dir=str(tmp_path / "fresh"), **changes)
    run(tmp_path, ref=model_a, **changes)
    again = run(tmp_path, ref=model_b, **changes)
    assert again[0] == fresh[0] and again[3][0]["loss"] == fresh[3][0]["loss"] != pytest.approx(math.log(2))


@pytest.mark.parametrize("changes, why", [({"ref_cache": False}, "--no-ref_cache"),
                                          ({"ref_cache_gb": 0.0}, "0.0 GB, --ref_cache_gb 0")])
def test_without_a_store_the_reference_stays_live_and_the_run_is_the_same(
        changes, why, model_a, tmp_path, capsys):
    changes |= {"out_dir": str(tmp_path / "live")}
    common = {"loss": "tdpo2", "init": model_a, "dtype": "float64", "steps": 3, "lr": 1e-3}
    stored = run(tmp_path, **common)
    assert len(list(stored[1].glob("reference-*.npy"))) == 2 and why not in capsys.readouterr().out
    live = run(tmp_path, **common, **changes)
    assert not list(live[1].glob("reference-*"))
    assert capsys.readouterr().out.count(f"({why})") == 2
    assert live[0] == pytest.approx(stored[0], rel=1e-8)
    assert_same(weights(live[1]), weights(stored[1]), 1e-6)


# ---------------------------------------------------------------------------------------------------------
# 4  Before the first step


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("loss", PREFERENCE)
def test_before_the_first_step_the_loss_is_log_2_and_the_margin_0(loss, dtype, model_a, tmp_path, capsys):
    """For 2D-DPO the mean of N log 2, N the smaller number of non-empty segments of the two sides."""
    *_, evals = run(tmp_path, loss, init=model_a, dtype=dtype)
    N = [min(sum(s["text"] != "" for s in record[side]) for side in ("chosen", "rejected"))
         for record in RECORDS]
    expected = math.log(2) * (sum(N) / len(N) if loss == "2d-dpo" else 1)
    assert expected != math.log(2) or loss != "2d-dpo"
    start = evals[0]
    assert start["step"] == 0 and start["eval/loss"] == pytest.approx(expected, rel=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logratio/chosen",
                 "logratio/rejected", "kl/ref_policy_chosen", "kl/ref_policy_rejected"):
        assert start[f"eval/{name}"] == pytest.approx(0, abs=1e-6), name
    assert start["eval/rewards/accuracies"] == 0.5
    assert f"before the first step: loss {expected:.4f} = " in capsys.readouterr().out


def test_check_start_raises_when_loss_or_margin_is_off():
    """To 1e-9, 1e-4 and 2e-2 in float64, float32 and bfloat16, on either side; N log 2 where N is given."""
    for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 2e-2)):
        cfg = config("2d-dpo", dtype=dtype)
        for n in (1, 2.5):
            right = {"loss": n * math.log(2), "rewards/margins": 0.0}
            right |= {"segments/paired": n} if n != 1 else {}
            assert f"loss {n * math.log(2):.4f} = " in health.check_start(cfg, right)
            for name in ("loss", "rewards/margins"):
                for sign in (-1, 1):
                    health.check_start(cfg, right | {name: right[name] + 0.9 * sign * tolerance})
                    with pytest.raises(RunError, match="policy and reference are equal, yet the loss is"):
                        health.check_start(cfg, right | {name: right[name] + 1.1 * sign * tolerance})


@pytest.mark.parametrize("loss, beta, off_by, margin", [("dpop", 0.3, 7.65e-4, 1e-4),
                                                        ("dpo", 20.0, 1e-3, 2e-3)])
def test_the_start_may_be_off_by_the_slope_of_the_loss_and_the_margin_by_beta(loss, beta, off_by, margin):
    """beta (1 + lambda) / 2 = 0.3 x 51 / 2: a rounding of 1e-5 nats in a log-ratio is 7.65e-5 in the loss."""
    right, cfg = {"loss": math.log(2), "rewards/margins": 0.0}, config(loss, dtype="float32", beta=beta)
    for name, tolerance in (("loss", off_by), ("rewards/margins", margin)):
        health.check_start(cfg, right | {name: right[name] + 0.9 * tolerance})
        with pytest.raises(RunError, match="policy and reference are equal, yet the loss is"):
            health.check_start(cfg, right | {name: right[name] + 1.1 * tolerance})


def test_a_run_stops_where_the_start_is_off(model_a, model_b, tmp_path, monkeypatch, capsys):
    """When the reference is another model there is nothing to check."""
    *_, evals = run(tmp_path, init=model_a, ref=model_b)
    assert "before the first step" not in capsys.readouterr().out
    assert abs(evals[0]["eval/loss"] - math.log(2)) > 1e-4  # off by more than check_start allows
    metrics_of = train.metrics_of
    monkeypatch.setattr(train, "metrics_of", lambda *args: (m := metrics_of(*args)) | {"loss": m["loss"] + 1})
    with pytest.raises(RunError, match=r"the loss is 1\.693147, not 0\.693147"):
        run(tmp_path, init=model_a)


# ---------------------------------------------------------------------------------------------------------
# 5  It learns


@pytest.mark.parametrize("loss", PREFERENCE)
def test_every_preference_loss_overfits_eight_pairs_to_accuracy_1(loss, model_a, tmp_path):
    """As many segments on both sides: Eq. 6 then selects all of them, and accuracy is of whole responses."""
    file = write_lines(tmp_path / "overfit.jsonl", make_records(segments=2))
    metrics, *_, evals = run(tmp_path, loss, init=model_a, data=(file,), val_data=(file,), steps=25,
                             lr=1e-2, warmup_steps=0)
    assert metrics["rewards/accuracies"] == 1 and metrics["rewards/margins"] > 0.5
    assert metrics["loss"] < 0.5 * evals[0]["eval/loss"]


def test_sft_learns_the_chosen_responses(tmp_path):
    """From scratch: the loss starts near log V, and falls."""
    metrics, *_, evals = run(tmp_path, "sft", tokenizer="bytes", steps=25, lr=2e-2, warmup_steps=0, n_layer=1,
                             n_head=2, n_embd=16, block_size=64)
    assert evals[0]["eval/loss"] == pytest.approx(math.log(257), abs=0.1)
    assert metrics["loss"] < 0.5 * evals[0]["eval/loss"]


def test_the_head_has_as_many_tokens_as_its_logits_have_room_for(pairs):
    """However large the vocabulary: 2^24 logits, 64 MB in float32, unless --head_tokens says otherwise."""
    for vocab_size, tokens in ((257, 2**24 // 257), (50257, 333)):
        models = [small(seed, vocab_size=vocab_size, n_embd=8) for seed in (0, 1)]
        assert make_engine("dpo", pairs, models=models, head_tokens=None).head_tokens == tokens
        assert make_engine("dpo", pairs, models=models, head_tokens=7).head_tokens == 7


@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_a_step_waits_for_the_device_once(loss, model_a, tmp_path, monkeypatch):
    """Steps that are neither logged nor evaluated: two more of them read two results more."""
    calls, counts = [], []

    def counted(real):
        return lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    monkeypatch.setattr(train, "report", lambda *_: None)  # its answers have lengths of their own
    for steps in (3, 5):
        calls.clear()
        run(tmp_path, loss, init=model_a, steps=steps, log_every=100, micro_batch_size=3, ref_cache=False)
        counts.append(len(calls))
    assert counts[1] - counts[0] == 2


# ---------------------------------------------------------------------------------------------------------
# 6  torch.compile


@pytest.mark.slow
@pytest.mark.skipif(not train.can_compile(), reason="torch.compile needs a C++ compiler and Python's headers")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from its compiler
def test_a_compiled_run_gives_the_numbers_of_an_eager_one_to_rounding(model_a, model_b, tmp_path):
    """Trunk and head, with the full-vocabulary KL, in several micro-batches and chunks."""
    common = {"loss": "tdpo2", "init": model_a, "ref": model_b, "steps": 3, "lr": 1e-3,
              "micro_batch_size": 4, "head_tokens": 40}
    eager = run(tmp_path, **common, compile=False)
    compiled = run(tmp_path, **common, compile=True, out_dir=str(tmp_path / "compiled"))
    assert compiled[0] == pytest.approx(eager[0], rel=1e-4, abs=1e-4)
    for e, c in zip(eager[3], compiled[3], strict=True):
        assert (c["loss"], c["grad_norm"]) == pytest.approx((e["loss"], e["grad_norm"]), rel=1e-4)
    assert list(weights(compiled[1])) == list(weights(eager[1]))


def test_a_compiler_that_fails_is_one_line_that_says_what_to_do(monkeypatch):
    def fails(cfg):
        raise CppCompileError(["g++", "x.cpp"], "Python.h: No such file or directory")

    monkeypatch.setattr(train, "train", fails)
    with pytest.raises(SystemExit, match=r"^train.py: torch.compile failed \(.*\); --no-compile does"):
        train.main([])


ALL = ["GPT", "GPT", "head"]


@pytest.mark.parametrize("vocab_size, device, compile, compiled", [
    (10_001, "cpu", None, ["head"]), (10_000, "cpu", None, []), (10_001, "cpu", False, []),
    (10_001, "cuda", None, ALL), (10_000, "cuda", None, []), (10_001, "cuda", False, []),
    (257, "cpu", True, ALL), (257, "cuda", True, ALL)])
def test_a_large_vocabulary_is_compiled_by_itself_on_the_cpu_only_its_head(
        vocab_size, device, compile, compiled, pairs, tmp_path, monkeypatch):
    """And neither without a compiler, nor without Python's headers, nor under torchrun."""
    models = [small(seed, vocab_size=vocab_size, n_embd=8) for seed in (0, 1)]

    def seen():
        names = []
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", lambda f, **_: names.append(getattr(f, "__name__", "GPT")) or f)
            engine = make_engine("dpo", pairs, models=models, device=device, compile=compile)
        engine.cfg = dataclasses.replace(engine.cfg, device="cpu")
        assert engine.collate(pairs, [0]).tokens.shape[1] % 64 == 0 or engine.compiles is False
        return names

    headers = tmp_path / "headers"
    headers.mkdir()
    monkeypatch.setattr(train.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(train.sysconfig, "get_path", lambda name: str(headers))
    assert seen() == (compiled if compile else [])
    (headers / "Python.h").touch()
    assert seen() == compiled
    with monkeypatch.context() as patch:
        patch.setattr(train.shutil, "which", lambda name: None)
        assert seen() == (compiled if compile else [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert seen() == (compiled if compile else [])


class Kept:
    """A stored reference: zeros."""

    def __init__(self, pairs, *width):
        self.counts, self.width = pairs.rows[:, 2:4].sum(-1), width

    def look_up(self, index):
        return torch.zeros(int(self.counts[index].sum()), *self.width)


@pytest.mark.parametrize("loss, stored", [
    (loss, stored) for loss in LOSSES for stored in (None, "log-probabilities", "hidden states")
    if not (stored and loss == "sft" or stored == "log-probabilities" and loss.startswith("tdpo"))])
def test_a_micro_batch_runs_on_its_device_alone_and_reads_nothing_back(loss, stored, pairs, monkeypatch):
    """On torch's device without numbers, where a tensor of the CPU, or a number asked for, is an error."""
    engine = make_engine(loss, pairs, dtype="float32")
    for model in filter(None, (engine.policy, engine.reference)):
        model.to("meta")
    engine.cfg = dataclasses.replace(engine.cfg, device="meta")
    monkeypatch.setattr(data, "move", lambda tensor, device: tensor.to(device))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    if engine.segmented:
        engine.aspect_weights = engine.aspect_weights.to("meta")
        engine.score_maximum = engine.score_maximum.to("meta")
    if stored:
        engine.stores["train"] = Kept(pairs, *[engine.policy.config.n_embd] * (stored == "hidden states"))
    rows = engine.run_pairs(pairs, np.arange(8), "train", 0.125)
    assert all(row.shape == (8,) and row.is_meta for row in rows.values())
    assert all(p.grad.is_meta for p in engine.policy.parameters())


# ---------------------------------------------------------------------------------------------------------
# 7  The numbers that are logged

COUNTS = {"grad_norm", "lr", "pairs_per_s", "tokens_per_s", "mfu", "peak_memory"}
REWARDS = {f"{group}/{name}" for group, names in {
    "rewards": ("chosen", "rejected", "margins", "accuracies"), "logps": ("chosen", "rejected"),
    "logratio": ("chosen", "rejected")}.items() for name in names}
KL = {"kl/ref_policy_chosen", "kl/ref_policy_rejected"}


@pytest.mark.parametrize("loss", LOSSES)
def test_log_lines_carry_the_steps_numbers_whatever_the_micro_batches(loss, model_a, model_b, tmp_path):
    """Under their names: the KL in training for TDPO only, at evaluation always. Micro-batches of 1 (the
    reference live) and 8 (stored)."""
    common = {"init": model_a, "steps": 2, "lr": 1e-3, "dtype": "float64"}
    common |= {"ref": model_b} if loss != "sft" else {}
    cache = {8: {}, 1: {"ref_cache": False} if loss != "sft" else {}}
    one, eight = (run(tmp_path, loss, micro_batch_size=n, **common | cache[n]) for n in (1, 8))
    measured = REWARDS if loss != "sft" else {"logps/chosen"}
    in_training = {"loss"} | measured | (KL if loss.startswith("tdpo") else set())
    in_evaluation = {"loss"} | measured | (KL if loss != "sft" else set())
    if loss == "2d-dpo":
        in_training, in_evaluation = in_training | {"segments/paired"}, in_evaluation | {"segments/paired"}
    assert [x["step"] for x in one[3]] == [1, 2] and [x["step"] for x in one[4]] == [0, 2]
    for a, b in zip(one[3], eight[3], strict=True):
        assert a.keys() == in_training | COUNTS | {"step"}
        agree = in_training | {"grad_norm", "lr"}
        assert {x: a[x] for x in agree} == pytest.approx({x: b[x] for x in agree}, rel=1e-8, abs=1e-10)
    for a, b in zip(one[4], eight[4], strict=True):
        assert a.keys() == {f"eval/{name}" for name in in_evaluation} | {"step"}
        assert a == pytest.approx(b, rel=1e-8, abs=1e-10)
    assert one[0] == {name: one[4][-1][f"eval/{name}"] for name in in_evaluation}  # what train() returns


def test_metrics_are_means_over_pairs_rewards_are_beta_logratio_without_the_kl_and_a_tie_counts_one_half():
    """By hand: log-ratios (1, -2, 3) and (0, 1, 3), so margins (0.2, -0.6, 0) at beta 0.2; rows of two
    micro-batches; the KL does not enter."""
    engine = make_engine("tdpo2", pairs=data.pack([]), beta=0.2)
    t = {"loss": [0.5, 0.7, 0.9], "chosen_logps": [-9, -12, -7], "ref_chosen_logps": [-10, -10, -10],
         "rejected_logps": [-5, -4, -2], "ref_rejected_logps": [-5, -5, -5],
         "chosen_seq_kl": [1, 2, 6], "rejected_seq_kl": [4, 8, 3]}
    rows = [{name: torch.tensor(values[part], dtype=torch.float64) for name, values in t.items()}
            for part in (slice(2), slice(2, 3))]
    assert train.metrics_of(engine, rows, 99) == pytest.approx({
        "loss": 0.7, "rewards/chosen": 0.2 * 2 / 3, "rewards/rejected": 0.2 * 4 / 3,
        "rewards/margins": -0.4 / 3, "rewards/accuracies": 0.5, "logps/chosen": -28 / 3,
        "logps/rejected": -11 / 3, "logratio/chosen": 2 / 3, "logratio/rejected": 4 / 3,
        "kl/ref_policy_chosen": 3.0, "kl/ref_policy_rejected": 5.0}, rel=1e-12)


def test_the_logged_kl_is_forward_of_the_reference_and_summed_over_the_response(model_a, model_b, tmp_path):
    """Evaluation of DPO against the plain implementation: KL(pi_ref || pi), nats, mean over the pairs."""
    *_, evals = run(tmp_path, init=model_a, ref=model_b, dtype="float64")
    policy, reference = (GPT.from_pretrained(name).double() for name in (model_a, model_b))
    for side in ("chosen", "rejected"):
        kl, logps = 0, 0
        for record in RECORDS:
            ids = [*"".join(s["text"] for s in record[side]).encode(), BYTES.eot]
            log_s, log_q = (plain_side(m, list(record["prompt"].encode()), ids) for m in (policy, reference))
            kl += (log_q.exp() * (log_q - log_s)).sum().item() / len(RECORDS)
            logps += log_s[range(len(ids)), ids].sum().item() / len(RECORDS)
        assert evals[0][f"eval/kl/ref_policy_{side}"] == pytest.approx(kl, rel=1e-10)
        assert evals[0][f"eval/logps/{side}"] == pytest.approx(logps, rel=1e-10)


def test_the_first_record_holds_what_repeats_the_run(model_a, tmp_path):
    """Config without gaps, versions, device, the hashes of data, tokenizer, start and reference."""
    _, folder, head, *_ = run(tmp_path, init=model_a, seed=3)
    cfg = Config(**head["config"])
    assert (cfg.seed, cfg.beta, cfg.steps, cfg.block_size) == (3, 0.1, 1, 64)
    assert (cfg.device, cfg.dtype, cfg.init, cfg.ref) == ("cpu", "float32", model_a, model_a)
    assert head["torch"] == torch.__version__ and head["python"] == ".".join(map(str, sys.version_info[:3]))
    assert head["device"].startswith("CPU, ")
    expected = runs.weights_hash(GPT.from_pretrained(model_a))
    assert expected == runs.weights_hash(GPT.from_pretrained(model_a, train.ALIGN))
    assert head["parameters"] == sum(w.numel() for w in weights(model_a).values())  # without the padding
    assert head["identity"]["ref"] == head["identity"]["init"] == expected
    assert head["identity"]["tokenizer"] == BYTES.hash and len(head["identity"]["data"]) == 64
    assert (head["pairs"], head["held_out"], head["score_maximum"]) == (8, 8, [4.0, 2.0])
    written = runs.read_run(folder)
    assert written["finished"] == 1 and written["identity"] == head["identity"]


def test_log_and_evaluation_come_at_the_steps_asked_for(model_a, tmp_path):
    *_, lines, evals = run(tmp_path, init=model_a, steps=7, log_every=3, eval_every=2)
    assert [x["step"] for x in lines] == [1, 3, 6, 7] and [x["step"] for x in evals] == [0, 2, 4, 6, 7]


@pytest.mark.parametrize("step, chosen, rejected, margin, words", [
    (9, -2.1, -5, 1, "rejected falls faster; chosen is 2.1 nats below"),
    (9, -11, -12, 1, "good answers are unlearned too"),
    (9, 1, -2, 1, "chosen rises by 1.0 nats, rejected falls by 2.0"),
    (9, 3, 2, 1, "both rise, chosen faster"),
    (50, 0, 0, 0, "nothing is learned"),
])
def test_the_health_line_says_why_the_margin_is_what_it_is(step, chosen, rejected, margin, words):
    m = {"logratio/chosen": chosen, "logratio/rejected": rejected, "rewards/margins": margin}
    assert words in health.verdict(step, m) and health.verdict(9, {}) == "no remark"
    assert "tools/doctor.py" in health.verdict(5, m | {"rewards/accuracies": 1})


# ---------------------------------------------------------------------------------------------------------
# 8  Flags


def refused(capsys, *flags):
    """train.py with these flags ends with status 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(flag) for flag in flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("train.py: error: ") and err.count("\n") == 1, err
    return err


def test_every_field_of_config_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse_flags(["--help"])
    text, source = " ".join(capsys.readouterr().out.split()), inspect.getsource(Config)
    assert stop.value.code == 0
    for field in dataclasses.fields(Config):
        comment = re.search(rf"^    {field.name}: .*?  # (.+)$", source, re.MULTILINE).group(1)
        assert f"--{field.name}" in text and " ".join(comment.split()) in text, field.name


def test_every_flag_sets_its_field_and_no_flag_leaves_the_default():
    assert train.parse_flags([]) == Config()
    flags, expected, switches = [], {}, []
    for i, field in enumerate(dataclasses.fields(Config), 1):
        words, kind = [f"{field.name}-{i}"], str(field.type)
        if "bool" in kind:
            switches.append(field.name)
            continue
        elif field.name in ("data", "val_data"):
            words += ["more"]
            expected[field.name] = words
        elif field.name == "aspect_weights":
            words, expected[field.name] = ["0.25", "0.75"], [0.25, 0.75]
        else:
            convert = int if "int" in kind else float if "float" in kind else str
            words = words if convert is str else [str(i)]
            expected[field.name] = convert(words[0])
        flags += [f"--{field.name}", *words]
    cfg = train.parse_flags(flags)
    assert cfg == dataclasses.replace(Config(), **expected)
    assert all(type(getattr(cfg, name)) is type(value) for name, value in expected.items())
    assert sorted(switches) == ["compile", "overwrite", "ref_cache", "resume"]
    for prefix, value in (("--", True), ("--no-", False)):
        cfg = train.parse_flags([prefix + name for name in switches])
        assert [getattr(cfg, name) for name in switches] == [value] * 4


@pytest.mark.parametrize("flags, words", [
    ("--bata 1", "unrecognized arguments: --bata"), ("--step 3", "unrecognized arguments: --step"),
    ("--beta x", "argument --beta: invalid float value"), ("--loss ipo", "--loss ipo: choose from sft, dpo,"),
    ("--steps 0", "--steps 0: must be at least 1"), ("--lr 0", "--lr 0.0: must be greater than 0"),
    ("--lr nan", "--lr nan"), ("--beta -1", "--beta -1.0"), ("--beta inf", "--beta inf"),
    ("--loss dpop --lam -1", "--lam -1.0: must be at least 0"), ("--loss tdpo2 --alpha nan", "--alpha nan"),
    ("--micro_batch_size 0", "--micro_batch_size 0"), ("--grad_clip -1", "--grad_clip -1.0"),
    ("--seed -1", "--seed -1"), ("--dtype float16", "choose bfloat16"), ("--dtype int8", "--dtype int8: ch"),
    ("--device tpu", "--device tpu: choose cpu"), ("--loss 2d-dpo --rejected_weight x", "choose from score"),
    ("--resume", "--resume: goes with --out_dir"), ("--loss 2d-dpo --aspect_weights a b", "must be numbers"),
    ("--init nowhere", "--init nowhere: no such folder"),
    ("--data nowhere.jsonl --tokenizer bytes", "nowhere.jsonl"),
    ("--tokenizer nowhere.tiktoken", "nowhere.tiktoken"), ("--n_embd 30", "not divisible"),
])
def test_a_bad_flag_is_one_line_and_exit_status_2(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *flags.split())
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_knob_that_the_loss_does_not_read_is_an_error_and_one_that_it_reads_is_not(loss, capsys):
    values = {"beta": 0.1, "lam": 50, "alpha": 0.5, "aspect_weights": (0.5, 0.5), "rejected_weight": "score"}
    assert set(values) == set().union(*READS.values())
    for name, value in values.items():
        if name in READS[loss]:
            train.check_flags(Config(loss=loss, **{name: value}))
        else:
            with pytest.raises(ConfigError, match=f"^--{name}: would not be read, the loss {loss} has no"):
                train.check_flags(Config(loss=loss, **{name: value}))
    reads_sft = {"sft_steps": 5, "sft_lr": 1e-3, "ref": "x"}
    for name, value in reads_sft.items():
        if loss == "sft":
            assert f"--{name}: would not be read" in refused(capsys, "--loss", "sft", f"--{name}", value)
        else:
            train.check_flags(Config(loss=loss, **{name: value}))
            if name != "ref":
                assert f"--{name}: would not be read" in refused(
                    capsys, "--loss", loss, "--init", "x", f"--{name}", value)


def test_badness_is_an_error_with_the_selection_of_eq_6():
    train.check_flags(Config(loss="2d-dpo-vanilla", rejected_weight="badness"))
    with pytest.raises(ConfigError, match="--rejected_weight badness: for 2d-dpo-vanilla only"):
        train.check_flags(Config(loss="2d-dpo", rejected_weight="badness"))


def test_aspect_weights_come_with_commas_or_spaces_sum_to_1_and_are_one_an_aspect(tmp_path, capsys):
    for words in (["0.3", "0.7"], ["0.3,0.7"], ["0.3,", "0.7"], ["0.3, 0.7"]):
        assert train.parse_flags(["--aspect_weights", *words]).aspect_weights == [0.3, 0.7]
    for wrong in ("0.5 0.6", "1.5 -0.5", "nan 1"):
        assert "must be >= 0 and sum to 1" in refused(
            capsys, "--loss", "2d-dpo", "--aspect_weights", ",".join(wrong.split()))
    file = write_lines(tmp_path / "x.jsonl", RECORDS)
    flags = ["--loss", "2d-dpo", "--data", file, "--tokenizer", "bytes", "--out_dir", tmp_path / "x"]
    assert "3 weights for 2 aspects" in refused(capsys, *flags, "--aspect_weights", 0.2, 0.3, 0.5)
    plain = [{"prompt": "p", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(4)]
    flags[3] = write_lines(tmp_path / "plain.jsonl", plain)
    assert "--loss 2d-dpo: needs scores in every segment of every pair" in refused(capsys, *flags)


def test_defaults_are_the_papers_by_loss():
    expected = {"dpo": (0.1, None, None), "dpop": (0.3, 50, None), "tdpo1": (0.1, None, None),
                "tdpo2": (0.1, None, 0.5), "2d-dpo": (0.1, None, None), "2d-dpo-vanilla": (0.1, None, None),
                "sft": (None, None, None)}
    for loss, values in expected.items():
        cfg = train.fill_defaults(Config(loss=loss, out_dir="x"))
        assert (cfg.beta, cfg.lam, cfg.alpha) == values, loss
        given = train.fill_defaults(Config(loss=loss, out_dir="x", beta=2.0, steps=9))
        assert (given.beta, given.steps) == (2.0, 9)
    for device, machine in (("cpu", ("float32", 2048)), ("cuda", ("bfloat16", 32768))):
        cfg = train.fill_defaults(Config(out_dir="x", device=device))
        assert (cfg.dtype, cfg.micro_batch_tokens) == machine


def test_with_init_equal_sizes_may_be_repeated_a_smaller_block_size_too_others_are_refused(
        model_a, tmp_path, capsys):
    file = write_lines(tmp_path / "x.jsonl", RECORDS)
    flags = ["--init", model_a, "--data", file, "--val_data", file, "--steps", 1, "--device", "cpu",
             "--out_dir", tmp_path / "x"]
    for name, value, words in (("n_layer", 3, "has 2"), ("n_head", 4, "has 2"), ("n_embd", 32, "has 16"),
                               ("block_size", 65, "has 64 positions"),
                               ("tokenizer", train.TOY[2], "has another")):
        err = refused(capsys, *flags, f"--{name}", value)
        assert f"--{name} {value}: " in err and words in err
    assert not (tmp_path / "x").exists()
    train.main([str(x) for x in [*flags, "--n_layer", 2, "--n_head", 2, "--n_embd", 16, "--block_size", 40,
                                 "--tokenizer", "bytes"]])
    assert read_log(tmp_path / "x")[0]["config"]["block_size"] == 40


def test_a_reference_or_start_for_another_vocabulary_is_refused(model_a, tmp_path, capsys):
    small(0, vocab_size=300).save_pretrained(tmp_path / "other")  # a folder without a tokenizer
    file = write_lines(tmp_path / "x.jsonl", RECORDS)
    flags = ["--data", file, "--val_data", file, "--out_dir", tmp_path / "x", "--device", "cpu"]
    err = refused(capsys, *flags, "--init", tmp_path / "other", "--tokenizer", "bytes")
    assert "has 300 token ids, the tokenizer 257" in err
    err = refused(capsys, *flags, "--init", model_a, "--ref", tmp_path / "other")
    assert f"--ref {tmp_path / 'other'}: has 300 token ids" in err


# ---------------------------------------------------------------------------------------------------------
# 9  The run and its folders

TINY = {"tokenizer": "bytes", "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 64, "sft_steps": 2}


def test_a_start_that_is_refused_leaves_its_folder_to_the_next(tmp_path, monkeypatch):
    """Tokens of large data are kept before the next file is read, which may be bad: still no run is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "STORE_FROM", 0)
    good, bad = write_lines(tmp_path / "x.jsonl", RECORDS), tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    common = {"data": (good,), "device": "cpu", "steps": 1, "batch_size": 8}
    with pytest.raises(data.DataError, match="bad.jsonl:1"):
        train.train(Config(**common | TINY | {"val_data": (bad,)}))
    assert list(Path("out/dpo/data").iterdir())
    train.train(Config(**common | TINY | {"val_data": (good,)}))
    assert Path("out/dpo/run.json").exists() and not Path("out/dpo-2").exists()


def test_a_file_in_the_place_of_the_sft_folder_is_passed_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_lines(tmp_path / "x.jsonl", RECORDS)
    Path("out").mkdir()
    Path("out/sft").write_text("mine")
    train.train(Config(data=(file,), val_data=(file,), device="cpu", steps=1, batch_size=8, **TINY))
    assert Path("out/sft").read_text() == "mine" and Path("out/sft-2/run.json").exists()


def test_a_run_gets_a_folder_of_its_own_and_the_sft_reference_is_reused_only_when_everything_matches(
        tmp_path, monkeypatch, capsys):
    """out/dpo, out/dpo-2, ...; out/sft serves dpo and dpop; another seed, width, number of steps or file
    makes out/sft-2, .... The next command that a run by hand names works."""
    monkeypatch.chdir(tmp_path)
    file = write_lines(tmp_path / "x.jsonl", RECORDS)
    other = write_lines(tmp_path / "y.jsonl", make_records(seed=4))
    common = {"data": (file,), "val_data": (file,), "device": "cpu", "steps": 1, "batch_size": 8}
    seen = []
    for changes in ({}, {"micro_batch_size": 3}, {"loss": "dpop", "beta": 0.5}, {"seed": 1}, {"n_embd": 16},
                    {"sft_steps": 3}, {"data": (other,)}, {"seed": 1}):
        train.train(Config(**common | TINY | changes))
        out = capsys.readouterr().out
        made = re.search(r"first a reference, by SFT on the chosen responses, into (\S+)\n", out)
        used = re.search(r"the reference is the SFT model in (\S+), made by an earlier run\n", out)
        saved = re.search(r"^saved in (\S+):", out, re.MULTILINE)
        seen.append(tuple(x and x[1] for x in (saved, made, used)))
    assert seen == [
        ("out/dpo", "out/sft", None), ("out/dpo-2", None, "out/sft"), ("out/dpop", None, "out/sft"),
        ("out/dpo-3", "out/sft-2", None), ("out/dpo-4", "out/sft-3", None), ("out/dpo-5", "out/sft-4", None),
        ("out/dpo-6", "out/sft-5", None), ("out/dpo-7", None, "out/sft-2")]
    head, _, _ = read_log("out/dpo")
    folder = str(Path("out/sft").resolve())  # in full: run.json is read from other folders too
    assert [head["config"][name] for name in ("init", "ref", "sft_steps")] == [folder, folder, None]
    sft, _, _ = read_log("out/sft")
    assert (sft["config"]["loss"], sft["config"]["steps"], sft["config"]["lr"]) == ("sft", 2, 2e-3)
    # a line on stdout says what to type next, and the next command of SFT runs
    train.train(Config(**common | TINY | {"loss": "sft", "sft_steps": None, "out_dir": "out/mine"}))
    words = shlex.split(re.search(r"^next: python train.py (.*)$", capsys.readouterr().out, re.MULTILINE)[1])
    assert words == ["--loss", "dpo", "--init", "out/mine", "--data", file, "--val_data", file]
    train.main([*words, "--steps", "1", "--device", "cpu"])
    assert read_log("out/dpo-8")[0]["config"]["init"] == str(Path("out/mine").resolve())


def test_the_health_line_speaks_of_the_loss_that_is_trained():
    """DPO's user is told of DPOP; DPOP's of its penalty; and where rejected gains, that is said."""
    falling = {"logratio/chosen": -2.0, "logratio/rejected": -5.0}
    assert "see DPOP" in health.verdict(9, falling) and "penalty" in health.verdict(9, falling, "dpop")
    assert health.verdict(9, falling, "tdpo2").endswith("2.0 nats below the reference")
    for chosen, rejected in ((-5.0, -2.0), (-1.0, 1.0), (1.0, 2.0)):
        worse = {"logratio/chosen": chosen, "logratio/rejected": rejected}
        assert "the rejected response gains" in health.verdict(9, worse)


def test_missing_data_are_named_before_the_tokenizer_is_looked_for(capsys):
    """Without --tokenizer gpt2 would be downloaded: a missing file must not look like a missing network."""
    with pytest.raises(SystemExit):
        train.main(["--data", "gone.jsonl"])
    assert capsys.readouterr().err == "train.py: error: gone.jsonl: No such file or directory\n"


def test_a_run_whose_folder_is_called_sft_keeps_its_reference_elsewhere(tmp_path, capsys):
    run(tmp_path, out_dir=str(tmp_path / "sft"), **TINY)
    assert runs.read_run(tmp_path / "sft-2")["config"]["loss"] == "sft"
    assert read_log(tmp_path / "sft")[0]["config"]["ref"] == str(tmp_path / "sft-2")


def test_the_final_files_are_a_model_and_a_tokenizer_and_the_table_is_what_train_returns(
        model_a, tmp_path, capsys):
    """The saved policy, evaluated anew, gives the final numbers; the printed table holds them and those from
    before the first step."""
    file, toy = tmp_path / "run.jsonl", data.Tokenizer(train.TOY[2])
    metrics, folder, *_, evals = run(tmp_path, "tdpo1", init=model_a, steps=3, lr=1e-2, dtype="float64")
    out = capsys.readouterr().out
    policy, tokenizer = GPT.from_pretrained(folder), data.Tokenizer(folder)
    assert tokenizer.hash == BYTES.hash and policy.config == GPT.from_pretrained(model_a).config
    engine = make_engine("tdpo1", *(data.load([file], tokenizer, 64)[:1]),
                         models=(policy, GPT.from_pretrained(model_a)))
    assert train.evaluate(engine, data.load([file], tokenizer, 64)[0]) == pytest.approx(metrics, rel=1e-5)
    assert "8 held-out pairs                        before     after" in out
    assert len(train.TABLE) == 7
    for metric, name in train.TABLE.items():
        assert f"{name:36}{evals[0]['eval/' + metric]:10.4f}{metrics[metric]:10.4f}\n" in out
    assert out.count("\nprompt     ") == out.count("\nreference ") == out.count("\npolicy    ") == 2
    assert re.search(rf"^next: python sample.py {folder} --heat --prompt ", out, re.MULTILINE)
    run(tmp_path, "sft", n_layer=1, n_embd=8, n_head=2, block_size=64, tokenizer=str(train.TOY[2]))
    assert data.Tokenizer(folder).hash == toy.hash  # ranks that are no merges


def test_the_ceiling_is_read_from_the_meta_file_of_the_held_out_data_where_there_is_one(tmp_path):
    cfg, file = Config(data=("x.jsonl",), val_data=(str(tmp_path / "x.jsonl.gz"),)), tmp_path / "x.meta.json"
    assert train.accuracy_note(cfg) == "" and train.accuracy_note(Config(data=("x.jsonl",))) == ""
    for content in ("{}", "[1]", "{", '{"accuracy_ceiling": 0.75}'):
        file.write_text(content)
        assert train.accuracy_note(cfg) == "   ceiling 0.7500, the labels are noisy" * ("0.75" in content)
    assert "ceiling 0.8525" in train.accuracy_note(Config())


def test_one_hot_aspect_weights_equal_data_that_have_this_aspect_only(pairs, tmp_path):
    for loss in ("2d-dpo", "2d-dpo-vanilla"):
        results = []
        for aspect, one_hot in enumerate([(1.0, 0.0), (0.0, 1.0)]):
            only = [{"prompt": record["prompt"]} | {side: [
                {"text": s["text"], "scores": s["scores"][aspect:aspect + 1]} for s in record[side]]
                for side in ("chosen", "rejected")} for record in RECORDS]
            single = load_records(only, tmp_path)
            actual = run_step(make_engine(loss, pairs, aspect_weights=one_hot), pairs)
            expected = run_step(make_engine(loss, single, aspect_weights=()), single)
            for a, e in zip(actual, expected, strict=True):
                assert_same(a, e)
            results.append(actual[0]["loss"])
        assert not torch.allclose(*results, rtol=1e-3)


def test_aspects_weigh_the_same_by_default_and_the_run_stores_their_maxima(model_a, model_b, tmp_path):
    """Through train(): no --aspect_weights equals 0.5 0.5, and differs from 0.25 0.75."""
    start = [run(tmp_path, "2d-dpo", init=model_a, ref=model_b, dtype="float64",
                 aspect_weights=weights) for weights in ((), (0.5, 0.5), (0.25, 0.75))]
    uniform, same, uneven = (x[3][0]["loss"] for x in start)
    assert uniform == same != pytest.approx(uneven, rel=1e-6)
    assert runs.read_run(start[0][1])["score_maximum"] == [4.0, 2.0]


# ---------------------------------------------------------------------------------------------------------
# 10  Learning rate, weight decay, clipping, FLOPs


def test_useful_flops_equal_a_count_by_hand():
    """One pair, P = 2, C = 3, R = 1; one layer, n = 4 channels, V = 10. A multiply-add is 2 FLOPs.

        tokens          6: per token, q k v 3 n^2, projection n^2, MLP 8 n^2 = 12 n^2 = 192 multiply-adds
        (query, key)    prompt 1 + 2; chosen (2+1) + (2+2) + (2+3); rejected 2+1 = 18: n for q k, n for a v
        head            4 response tokens: n V = 40
        forward         2 (6 * 192 + 18 * 8 + 4 * 40) = 2912, with the backward three times that
    """
    rows = np.array([[0, 2, 3, 1, 0, 0, 0]])
    assert train.useful_flops(GPTConfig(10, 8, 1, 2, 4), rows) == 3 * 2912
    assert train.useful_flops(GPTConfig(10, 8, 1, 2, 4), np.concatenate([rows, rows])) == 6 * 2912
    trunk = 2 * (6 * 192 + 18 * 8)
    assert train.useful_flops(GPTConfig(10, 8, 3, 2, 4), rows) == 3 * (2912 + 2 * trunk)


def test_the_machines_own_matrix_product_is_measured_in_flops_per_second(measured=train.matmul_rate):
    assert 1e8 < measured("cpu", torch.float32) < 1e14


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_throughput_counts_the_tokens_that_the_loss_reads(loss, model_a, tmp_path, monkeypatch):
    """SFT reads no rejected response: neither tokens_per_s nor mfu counts one. A line is about the steps
    since the line before."""
    counted, flops_of = [], train.useful_flops
    monkeypatch.setattr(train, "useful_flops", lambda c, rows: counted.append(len(rows)) or flops_of(c, rows))
    *_, lines, _ = run(tmp_path, loss, init=model_a, steps=4, log_every=3)
    assert counted == [8, 16, 8]  # after steps 1, 3 and 4
    rows = data.load([tmp_path / "run.jsonl"], BYTES, 64)[0].rows.copy()
    if loss == "sft":
        rows[:, 3] = 0
    for line in lines:
        seconds = line["tokens_per_s"] / line["pairs_per_s"]
        assert seconds == pytest.approx(rows[:, 1:4].sum() / 8)
        flops = flops_of(small(0).config, rows)
        assert line["mfu"] * 1e9 / line["pairs_per_s"] == pytest.approx(flops / 8)
        assert 0 < line["pairs_per_s"] < 1e6 and 1e7 < line["peak_memory"] < 1e11


def test_the_learning_rate_rises_linearly_over_warmup_steps_and_stays(model_a, tmp_path):
    _, folder, _, lines, _ = run(tmp_path, init=model_a, steps=6, lr=0.8, warmup_steps=4)
    assert [x["lr"] for x in lines] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    *_, lines, _ = run(tmp_path, init=model_a, steps=2, lr=0.8, warmup_steps=0)
    assert [x["lr"] for x in lines] == [0.8, 0.8]


def test_the_first_update_is_as_large_as_the_learning_rate_of_step_1(model_a, tmp_path):
    """AdamW's first update is lr * sign(gradient): 1 / 4 of --lr within a warm-up of 4 steps."""
    _, folder, *_ = run(tmp_path, init=model_a, lr=4e-3, warmup_steps=4)
    for name, p in weights(folder).items():
        assert (p - weights(model_a)[name]).abs().max().item() == pytest.approx(1e-3, rel=2e-2), name


def test_weight_decay_pulls_matrices_only(model_a, tmp_path):
    """After one step the decayed run is lr * weight_decay * (the start) away from the other one: in matrices,
    embeddings included; not in biases and LayerNorm."""
    common = {"init": model_a, "lr": 1e-2, "warmup_steps": 0}
    with_decay, without = (run(tmp_path, weight_decay=x, out_dir=str(tmp_path / f"{x}"), **common)[1]
                           for x in (0.5, 0.0))
    start, decayed, plain = weights(model_a), weights(with_decay), weights(without)
    for name, p in start.items():
        expected = 1e-2 * 0.5 * p if p.dim() == 2 else torch.zeros_like(p)
        assert torch.allclose(plain[name] - decayed[name], expected, atol=1e-6), name
    assert sum(p.dim() == 2 for p in start.values()) == 2 + 4 * 2


def test_the_gradient_is_clipped_to_grad_clip_and_0_never_clips(model_a, model_b, tmp_path):
    """The logged norm is that before clipping."""
    common = {"init": model_a, "ref": model_b, "dtype": "float64"}
    norms = {}
    for clip in (0.0, 1e-3, 1e6):
        _, folder, _, lines, _ = run(tmp_path, grad_clip=clip, **common)
        given = math.sqrt(sum(g.square().sum().item() for g in step_gradient(folder).values()))
        norms[clip] = lines[0]["grad_norm"], given
    whole = norms[0.0][0]
    assert whole > 0.1
    assert norms[0.0] == norms[1e6] == pytest.approx((whole, whole), rel=1e-10)
    assert norms[1e-3] == pytest.approx((whole, 1e-3), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------
# 11  python train.py, nothing else


def test_the_run_without_arguments_works_offline_from_any_folder(tmp_path):
    """Shortened. In another process and folder, where opening a connection is an error: 0.6931 before the
    first step, the table with the ceiling, two prompts with two answers each, the folder, what to type next.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "def no_network(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        "        raise RuntimeError(f'network: {event} {args}')\n"
        "sys.addaudithook(no_network)\n")
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    command = [sys.executable, str(HERE.parent / "train.py"), *"--steps 2 --sft_steps 3 --device cpu".split()]
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "no --init: first a reference, by SFT on the chosen responses, into out/sft\n" in done.stdout
    start = done.stdout.index("before the first step: loss 0.6931 = log 2, margin 0.0000")
    step_1 = done.stdout.index("step     1  loss 0.6931")
    table = done.stdout.rindex("400 held-out pairs                      before     after")
    assert start < step_1 < table and re.search(r"accuracy .* ceiling 0\.8525", done.stdout[table:])
    for name in ("prompt    ", "reference ", "policy    "):
        assert len(re.findall(f"^{name}", done.stdout[table:], re.MULTILINE)) == 2
    assert "\nsaved in out/dpo: " in done.stdout and (cwd / "out" / "dpo" / "model.safetensors").exists()
    assert "\nnext: python sample.py out/dpo --heat --prompt 'Review the " in done.stdout[table:]
    assert "dpo: 100%" in done.stderr  # the progress bar
