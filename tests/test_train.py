"""train.py: the gradient of a step, the remembered reference, the logged numbers, the optimizer.

Data are made here, in the segment form, with bytes as tokens: tests know every token without asking data.py.
`plain_losses` is the other implementation: a pair is two separate sequences, ordinary causal forward, full
logits, one softmax; it shares with train.py only losses.py's equations (test_losses.py proves those) and GPT.
"""

import copy
import gc
import json
import math
import os
import random
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import data
import losses
import train
from losses import LOSSES, knobs_of, terms_of
from model import GPT, GPTConfig
from plumbing import flags, machine, report
from plumbing.errors import RunError
from plumbing.reference import Reference, no_reference
from train import Config

ROOT = Path(__file__).resolve().parent.parent
BYTES = data.Tokenizer("bytes")
PREFERENCE = [loss for loss in LOSSES if loss != "sft"]
SEGMENTED = [loss for loss in LOSSES if "chosen_rewards" in terms_of(LOSSES[loss])]
KNOBS = {"beta": 0.2, "lam": 7.0, "alpha": 0.25}
UNEVEN = {"aspect_weights": (0.25, 0.75), "rejected_weight": "score"}


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
    if not segments:
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
# Helpers: models, steps and runs


def small(seed, vocab_size=257, std=0.15, n_embd=16, block_size=64):
    """A small GPT in which every weight matters, biases included; another seed is 1 / 10 away from it."""
    model = GPT(GPTConfig(vocab_size, block_size, 2, 2, n_embd))
    common, own = (torch.Generator().manual_seed(s) for s in (99, seed))
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=common) + 0.1 * torch.randn(p.shape, generator=own)
            p.copy_(std * noise + ("ln_" in name and "weight" in name))
    return model


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
    knobs = {name: flags.DEFAULTS_OF.get(loss, {}).get(name, flags.DEFAULTS.get(name)) if default is None
             else default for name, default in knobs_of(LOSSES[loss]).items()}
    uneven = {"aspect_weights": UNEVEN["aspect_weights"]} if loss in SEGMENTED else {}
    plain = {"device": "cpu", "compile": False, "compile_head": False, "dtype": "float64",
             "head_tokens": 10**6, "micro_batch_tokens": 2048, "micro_batch_size": 100}
    return Config(**{"loss": loss} | knobs | uneven | plain | changes)


def make(loss, pairs, policy=0, reference=1, models=None, **changes):
    """What a step needs, in float64 (or changes' dtype); the policy is not its reference, which is live."""
    cfg = config(loss, **changes)
    dtype = torch.float64 if cfg.dtype == "float64" else torch.float32
    policy, model = (m.to(dtype) for m in models or (small(policy), small(reference)))
    asks = Reference(model.requires_grad_(False), partial(train.hidden_states, model, cfg=cfg),
                     partial(train.response_logps, model, cfg=cfg))
    maximum = pairs.score_maximum() if pairs.n_aspects else None
    return SimpleNamespace(cfg=cfg, policy=policy, model=model, loss=LOSSES[loss],
                           reference=asks if flags.has_reference(LOSSES[loss]) else no_reference,
                           pairs=train.as_read(pairs, cfg, maximum))


def run_step(x, micro=100, index=None, scale=0.125):
    """A step's terms in the order of the pairs, {name: (B,)}, and its gradient, {name: tensor}."""
    x.policy.zero_grad()
    index = np.arange(len(x.pairs)) if index is None else index
    micros = data.micro_batches(x.pairs, index, micro)
    rows = [train.step(x.policy, x.reference, data.collate([x.pairs[i] for i in m]), x.loss, scale, x.cfg)
            for m in micros]
    order = np.argsort(np.concatenate(micros))
    return ({name: torch.cat([row[name] for row in rows])[order] for name in rows[0] if name != "pair"},
            {name: p.grad.clone() for name, p in x.policy.named_parameters()})


def assert_same(actual, expected, tolerance=1e-10):
    """The same names, and tensors equal to a tolerance relative to the largest entry of each. None is all 0
    in what is expected, so that nothing is compared in vain (SFT's empty rejected responses excepted)."""
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        size, error = e.abs().max(), (actual[name].double() - e.double()).abs().max()
        assert size > 0 or name.startswith("rejected"), name
        assert error <= tolerance * size, f"{name}: {error:.2e} of {size:.2e}"


def arguments(**flags):
    """{flag: value} -> argv."""
    argv = []
    for name, value in flags.items():
        if isinstance(value, bool):
            argv.append(f"--{'' if value else 'no-'}{name}")
        elif value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return argv


def run(tmp_path, loss="dpo", **changes):
    """A short run on RECORDS: (its final metrics, folder, first record, training lines, evaluations)."""
    file = write_lines(tmp_path / "run.jsonl", RECORDS)
    plain = {"data": file, "val_data": file, "device": "cpu", "out_dir": tmp_path / "run", "loss": loss,
             "steps": 1, "batch_size": 8, "overwrite": True, "log_every": 1, "eval_every": 0, "save_every": 0}
    options = plain | changes
    train.main(arguments(**options))
    head, lines, evals = read_log(options["out_dir"])
    after = {name.removeprefix("eval/"): x for name, x in evals[-1].items() if name != "step"}
    return after, Path(options["out_dir"]), head, lines, evals


def read_log(folder):
    head, *lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return head, [x for x in lines if "loss" in x], [x for x in lines if "eval/loss" in x]


def moments(folder, step=1):
    return load_file(folder / "checkpoints" / f"step-{step:07}.safetensors")


def step_gradient(folder):
    """The gradient that AdamW was given in the first step: its first moment is (1 - 0.9) times that."""
    gradient = {name[8:]: m / (1 - 0.9) for name, m in moments(folder).items() if name.startswith("exp_avg.")}
    rows = gradient["wte.weight"]
    assert rows.shape[0] % machine.ALIGN == 0 and not rows[BYTES.vocab_size:].any()  # padding stays 0
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
    result, wanted = [], terms_of(LOSSES[cfg.loss])
    for record in records:
        prompt, t = list(record["prompt"].encode()), {}
        for side in ("chosen", "rejected"):
            lengths = [len(segment["text"]) for segment in record[side]]
            ids = [*"".join(segment["text"] for segment in record[side]).encode(), BYTES.eot]
            lengths[-1] += 1  # end-of-text joins the last segment
            log_s = plain_side(policy, prompt, ids)
            with torch.no_grad():
                log_q = plain_side(reference, prompt, ids)

            def split(x, n=lengths):
                if cfg.loss in SEGMENTED:
                    return torch.stack([part.sum() for part in x.split(n)])[None]
                return x.sum()[None]

            t[f"{side}_logps"] = split(log_s[range(len(ids)), ids])
            t[f"ref_{side}_logps"] = split(log_q[range(len(ids)), ids])
            t[f"{side}_seq_kl"] = (log_q.exp() * (log_q - log_s)).sum()[None]
            if cfg.loss in SEGMENTED:
                aspects = list(zip(cfg.aspect_weights, maximum, strict=True))
                r = [sum(w * s / m for s, (w, m) in zip(segment["scores"], aspects, strict=True))
                     for segment in record[side]]
                r = [1 - x for x in r] if (side, cfg.rejected_weight) == ("rejected", "badness") else r
                t[f"{side}_rewards"] = torch.tensor([r], dtype=torch.float64)
                t[f"{side}_mask"] = torch.tensor([lengths]) > 0
        knobs = {name: getattr(cfg, name) for name in knobs_of(LOSSES[cfg.loss])}
        result.append(LOSSES[cfg.loss](**{name: t[name] for name in wanted}, **knobs)[0])
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
def test_chunks_and_micro_batches_of_any_size_give_the_same_losses_and_gradients(loss, pairs):
    expected, counts = run_step(make(loss, pairs)), set()
    for head_tokens, micro in ((1, 100), (30, 100), (60, 3), (100, 100), (40, 1), (40, 2), (40, 5)):
        x = make(loss, pairs, head_tokens=head_tokens)
        batch = data.collate([x.pairs[i] for i in range(8)])
        counts.add(max(p.stop - p.start for p, _ in batch.chunks(head_tokens)))
        for actual, e in zip(run_step(x, micro), expected, strict=True):
            assert_same(actual, e)
    assert len(counts) >= 3 and 1 in counts, counts  # pairs in the largest chunk


@pytest.mark.parametrize("loss, changes", [(loss, {}) for loss in LOSSES]
                         + [("2d-dpo-vanilla", {"rejected_weight": "badness"})])
def test_losses_and_gradients_equal_those_of_two_separate_sequences_with_full_logits(loss, changes, pairs):
    """One padded batch, chunked, the reference live; for 2D-DPO the scores over their aspect's maximum, an
    empty segment masked, badness = 1 - score."""
    x = make(loss, pairs, head_tokens=40, **changes)
    rows, gradient = run_step(x)
    expected = plain_gradient(x.cfg, x.policy, x.model, RECORDS, denominator=8)
    assert_same({"loss": rows["loss"]} | gradient, {"loss": expected[0]} | expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_the_optimizer_gets_the_mean_over_the_steps_pairs_or_for_sft_over_its_response_tokens(
        loss, model_a, model_b, tmp_path):
    """Through a whole run: data, remembered reference, knobs, aspect weights and the one division of the
    step; the gradient is read from AdamW's first moment. Micro-batches of 3, 3 and 2."""
    changes = {name: KNOBS[name] for name in knobs_of(LOSSES[loss])}
    changes |= UNEVEN if loss in SEGMENTED else {}
    ref = {"ref": model_b} if flags.has_reference(LOSSES[loss]) else {}
    _, folder, head, lines, _ = run(tmp_path, loss, init=model_a, dtype="float64", grad_clip=0,
                                    micro_batch_size=3, head_tokens=40, **changes, **ref)
    models = [GPT.from_pretrained(name).double() for name in (model_a, model_b)]
    denominator = response_tokens(RECORDS) if loss == "sft" else len(RECORDS)
    expected, gradient = plain_gradient(config(loss, **changes), *models, RECORDS, denominator)
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
# 2  No logits of the whole batch; nothing read back


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns, forward and backward."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("loss", LOSSES)
def test_no_tensor_is_larger_than_the_logits_of_one_chunk(loss, pairs):
    """Nor for TDPO's KL over the full vocabulary, nor for the reference, nor at an evaluation."""
    V = 5000
    x = make(loss, pairs, models=[small(seed, vocab_size=V, n_embd=8) for seed in (0, 1)],
             dtype="float32", head_tokens=1)
    batch = data.collate([x.pairs[i] for i in range(8)])
    n = max(tokens.stop - tokens.start for _, tokens in batch.chunks(1))
    assert 3 * n <= len(batch.target)
    with Largest() as largest:
        run_step(x)
        train.evaluate(x.policy, x.reference, x.pairs, x.cfg)
    assert largest.numel == n * V, (largest.numel / V, n)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_micro_batch_runs_on_its_device_alone_and_reads_nothing_back(loss, pairs, monkeypatch):
    """On torch's device without numbers, where a tensor of the CPU, or a number asked for, is an error."""
    x = make(loss, pairs, dtype="float32", device="meta", head_tokens=40)
    for model in (x.policy, x.model):
        model.to("meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    batch = data.collate([x.pairs[i] for i in range(8)]).to("meta")
    rows = train.step(x.policy, x.reference, batch, x.loss, 0.125, x.cfg)
    assert all(row.shape == (8,) and row.is_meta for row in rows.values())
    assert all(p.grad.is_meta for p in x.policy.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_a_step_waits_for_the_device_once(loss, model_a, tmp_path, monkeypatch):
    """Steps that are neither logged nor evaluated: a step reads one result, besides the remembered reference,
    whose numbers live on the CPU."""
    calls, counts = [], []

    def counted(real):
        return lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)

    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    monkeypatch.setattr(train, "Memory", lambda *_: None)
    monkeypatch.setattr(report, "answers_and_next", lambda *_: None)  # its answers have lengths of their own
    for steps in (3, 5):
        calls.clear()
        run(tmp_path, loss, init=model_a, steps=steps, log_every=100, micro_batch_size=3)
        counts.append(len(calls))
    batches = 3  # in each, collate reads two numbers of the CPU's: lengths, and is there a rejected response
    assert counts[1] - counts[0] == 2 * (1 + 2 * batches)


@pytest.mark.slow
def test_bfloat16_products_of_ever_new_shapes_do_not_fill_the_memory():
    """machine.py bounds the cache of their workspaces. Skipped where nothing grows without a bound."""
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
    started = [subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=ROOT, text=True,
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
    x = make(loss, pairs, models=models, dtype="float32")
    batch = data.collate([x.pairs[i] for i in range(8)])
    hidden = models[0](batch.tokens, batch.positions, batch.mask())
    assert models[0].logits(hidden).median() < -64  # where bfloat16 has steps of 0.5
    for model in models:  # with the zero rows that train.py's models have
        table = torch.cat([model.wte.weight.detach(), torch.zeros(63, 16)])
        model.wte.weight = torch.nn.Parameter(table)
    results = {}
    for dtype in ("bfloat16", "float64"):
        results[dtype] = run_step(make(loss, pairs, models=[copy.deepcopy(m) for m in models], dtype=dtype))
    (rows, gradient), (right, right_gradient) = results.values()
    tokens = pairs.rows[:, 2] + pairs.rows[:, 3]
    for name in ("chosen_logps", "ref_chosen_logps"):
        assert ((rows[name] - right[name]).abs() < 0.004 * torch.from_numpy(tokens)).all()
    for name, g in right_gradient.items():
        assert (gradient[name] - g).norm() < 0.05 * g.norm(), name


# ---------------------------------------------------------------------------------------------------------
# 3  Before the first step


@pytest.mark.slow
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
    name = "" if loss == "2d-dpo" else " = log 2"
    assert f"before the first step: loss {expected:.4f}{name}, as it must be" in capsys.readouterr().out


@pytest.mark.parametrize("loss", PREFERENCE)
def test_the_start_is_compared_with_the_loss_at_the_reference_to_the_precision_of_the_run(loss, pairs):
    """Equal models pass in every precision; a policy that is 1/10 away, or a NaN, is a RunError."""
    for dtype in ("float64", "float32", "bfloat16"):
        x = make(loss, pairs, policy=1, dtype=dtype)
        train.check_start(x.policy, x.reference, x.pairs, x.cfg)
    x = make(loss, pairs)
    with pytest.raises(RunError, match="policy and reference are equal, yet the loss is"):
        train.check_start(x.policy, x.reference, x.pairs, x.cfg)
    for found in (math.nan, 0.6931 + 2e-4):
        with pytest.raises(RunError, match="please report this"):
            report.check_start(found, 0.6931, 1e-4)


def test_the_tolerance_of_the_start_grows_with_the_slope_of_the_loss(pairs, monkeypatch):
    """1e-4 nats in each log-ratio are beta (2 + lam) / 2 x 1e-4 in DPOP's loss, 7.8e-4 by default."""
    seen = []
    monkeypatch.setattr(report, "check_start", lambda *numbers: seen.append(numbers))
    x = make("dpop", pairs, policy=1, dtype="float32", beta=0.3, lam=50.0)
    train.check_start(x.policy, x.reference, x.pairs, x.cfg)
    assert seen[0][1] == pytest.approx(math.log(2), rel=1e-6)
    assert seen[0][2] == pytest.approx(0.3 * 52 / 2 * 1e-4, rel=2e-2)


def test_with_another_reference_there_is_nothing_to_check(model_a, model_b, tmp_path, capsys):
    *_, evals = run(tmp_path, init=model_a, ref=model_b)
    assert "before the first step" not in capsys.readouterr().out
    assert abs(evals[0]["eval/loss"] - math.log(2)) > 1e-4


# ---------------------------------------------------------------------------------------------------------
# 4  It learns


@pytest.mark.slow
@pytest.mark.parametrize("loss", PREFERENCE)
def test_every_preference_loss_overfits_eight_pairs_to_accuracy_1(loss, model_a, tmp_path):
    """As many segments on both sides: Eq. 6 then selects all of them, and accuracy is of whole responses."""
    file = write_lines(tmp_path / "overfit.jsonl", make_records(segments=2))
    metrics, *_, evals = run(tmp_path, loss, init=model_a, data=file, val_data=file, steps=25,
                             lr=1e-2, warmup_steps=0)
    assert metrics["rewards/accuracies"] == 1 and metrics["rewards/margins"] > 0.5
    assert metrics["loss"] < 0.5 * evals[0]["eval/loss"]


def test_sft_learns_the_chosen_responses(tmp_path):
    """From scratch: the loss starts near log V, and falls."""
    metrics, *_, evals = run(tmp_path, "sft", tokenizer="bytes", steps=25, lr=2e-2, warmup_steps=0, n_layer=1,
                             n_head=2, n_embd=16, block_size=64)
    assert evals[0]["eval/loss"] == pytest.approx(math.log(257), abs=0.1)
    assert metrics["loss"] < 0.5 * evals[0]["eval/loss"]


@pytest.mark.slow
@pytest.mark.skipif(machine.cannot_compile() is not None, reason="torch.compile needs g++ and Python.h")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of the compiler
@pytest.mark.parametrize("pack", [False, True])
def test_a_compiled_run_gives_the_numbers_of_an_eager_one_to_rounding(model_a, model_b, tmp_path, pack):
    """Trunk and head, with the full-vocabulary KL, in several micro-batches and chunks. Whatever their
    number, the blocks have three graphs, of the reference and of the policy with and without gradient, and
    the head two."""
    torch._dynamo.reset()
    common = {"loss": "tdpo2", "init": model_a, "ref": model_b, "steps": 3, "lr": 1e-3,
              "micro_batch_size": 4, "head_tokens": 40}
    eager = run(tmp_path, **common, compile=False)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = run(tmp_path, **common, compile=True, pack=pack, out_dir=tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 5
    assert compiled[0] == pytest.approx(eager[0], rel=1e-4, abs=1e-4)
    for e, c in zip(eager[3], compiled[3], strict=True):
        assert (c["loss"], c["grad_norm"]) == pytest.approx((e["loss"], e["grad_norm"]), rel=1e-4)
    assert list(weights(compiled[1])) == list(weights(eager[1]))


@pytest.mark.parametrize("world, changes, longest, length", [
    (1, {}, 100, 1920), (2, {}, 100, 1920),  # 1.15 x 64 x 100 tokens in four rows of at most 2048, or in two
    (1, {"micro_batch_tokens": 10**6}, 100, 7424),  # in one
    (1, {"micro_batch_size": 2}, 100, 256), (2, {"batch_size": 3}, 100, 256),
    (1, {"batch_size": 10**6}, 100, 2048),
    (1, {"micro_batch_size": 2}, 3000, 3072)])  # the longest pair has room
def test_a_packed_row_is_as_long_as_a_step_needs(monkeypatch, world, changes, longest, length):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    one = np.zeros(1, np.int32)
    pairs = data.pack(data.Pair(np.zeros(n - 2, np.int32), one, one, one, one, *np.zeros((2, 1, 0)))
                      for n in [100] * 999 + [longest])
    cfg = Config(**{"micro_batch_tokens": 2048, "batch_size": 64} | changes)
    assert train.row_length(pairs, cfg) == length


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_a_model_with_compiled_blocks_is_let_go():
    model = GPT(GPTConfig(9, 8, 1, 1, 4))
    machine.compile_blocks(model, dynamic=True)
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("loss", ["sft", "tdpo2"])
def test_a_packed_run_gives_the_numbers_of_rows(model_a, tmp_path, loss):
    common = {"loss": loss, "init": model_a, "steps": 3, "lr": 1e-3, "micro_batch_size": 3,
              "dtype": "float64"}
    rows = run(tmp_path, **common)
    packed = run(tmp_path, **common, pack=True, out_dir=tmp_path / "packed")
    assert packed[0] == pytest.approx(rows[0], rel=1e-10, abs=1e-10)
    for r, p in zip(rows[3], packed[3], strict=True):
        assert (p["loss"], p["grad_norm"]) == pytest.approx((r["loss"], r["grad_norm"]), rel=1e-10)


# ---------------------------------------------------------------------------------------------------------
# 5  A new loss is its function and its line


def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta):
    """IPO, Azar et al. 2023: (h - 1 / (2 beta))^2."""
    h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return (h - 1 / (2 * beta)) ** 2


def cdpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *,
              beta, label_smoothing=0.1):
    """Conservative DPO: a share of the labels is taken to be wrong."""
    right = losses.dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta)
    wrong = losses.dpo_loss(rejected_logps, chosen_logps, ref_rejected_logps, ref_chosen_logps, beta=beta)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def simpo_loss(chosen_logps, rejected_logps, chosen_length, rejected_length, *, beta, gamma=0.5):
    """SimPO, Meng et al. 2024: no reference, log-probabilities a token, a margin."""
    h = beta * (chosen_logps / chosen_length - rejected_logps / rejected_length)
    return -torch.nn.functional.logsigmoid(h - gamma)


@pytest.mark.slow
@pytest.mark.parametrize("loss, start", [(ipo_loss, 25.0), (cdpo_loss, math.log(2)), (simpo_loss, None)])
def test_a_new_loss_trains_evaluates_logs_resumes_samples_and_refuses_foreign_knobs(
        loss, start, model_a, tmp_path, monkeypatch, capsys):
    """Added at run time to losses.LOSSES and nowhere else."""
    import sample
    monkeypatch.setitem(LOSSES, "new", loss)
    common = {"init": model_a, "lr": 1e-3, "micro_batch_size": 3, "beta": 2.0 if loss is simpo_loss else None}
    _, folder, head, lines, evals = run(tmp_path, "new", steps=4, **common)
    assert lines[-1]["loss"] < lines[0]["loss"] and head["config"]["loss"] == "new"
    assert evals[-1]["eval/loss"] < evals[0]["eval/loss"]
    said = capsys.readouterr().out
    if start is None:
        assert head["config"]["ref"] is None and not list(folder.glob("reference-*"))
        assert "logratio/chosen" not in lines[0] and "before the first step" not in said
    else:
        assert evals[0]["eval/loss"] == pytest.approx(start, rel=1e-5)
        assert f"before the first step: loss {start:.4f}" in said
    run(tmp_path, "new", steps=2, out_dir=tmp_path / "two", **common)
    train.main(arguments(resume=True, out_dir=tmp_path / "two", steps=4))
    assert (tmp_path / "two/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    ref = ["--ref", model_a] if start is None else []
    sample.main([str(folder), "--prompt", "ab?", "--max_new_tokens", "3", *ref])
    assert "policy" in capsys.readouterr().out
    for flag in ("--alpha", "--lam") + (() if loss is cdpo_loss else ("--aspect_weights",)):
        with pytest.raises(SystemExit) as stop:
            train.main(["--loss", "new", "--init", model_a, flag, "1"])
        assert stop.value.code == 2 and f"{flag}: would not be read" in capsys.readouterr().err
    own = {cdpo_loss: "label_smoothing", simpo_loss: "gamma"}.get(loss)
    if own:
        _, _, head, other, _ = run(tmp_path, "new", **common, **{own: 0.3})
        assert head["config"][own] == head["identity"][own] == 0.3
        assert other[0]["loss"] != lines[0]["loss"] or loss is cdpo_loss  # at pi = pi_ref both are log 2
        with pytest.raises(SystemExit):
            train.main(["--help"])
        assert f"--{own} FLOAT" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            train.main(["--loss", "dpo", f"--{own}", "0.3"])
        assert f"--{own}: would not be read, the loss dpo has none" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# 6  The numbers that are logged

COUNTS = {"grad_norm", "lr", "pairs_per_s", "tokens_per_s", "peak_memory"}
REWARDS = {f"{group}/{name}" for group, names in {
    "rewards": ("chosen", "rejected", "margins", "accuracies"), "logps": ("chosen", "rejected"),
    "logratio": ("chosen", "rejected")}.items() for name in names}
KL = {"kl/ref_policy_chosen", "kl/ref_policy_rejected"}


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_log_lines_carry_the_steps_numbers_whatever_the_micro_batches(loss, model_a, model_b, tmp_path):
    """Under their names: the KL in training for TDPO only, at evaluation always. Micro-batches of 1 and 8."""
    common = {"init": model_a, "steps": 2, "lr": 1e-3, "dtype": "float64"}
    common |= {"ref": model_b} if flags.has_reference(LOSSES[loss]) else {}
    one, eight = (run(tmp_path, loss, micro_batch_size=n, **common) for n in (1, 8))
    measured = REWARDS if loss != "sft" else {"logps/chosen"}
    more = {"segments/paired"} if loss in SEGMENTED else set()
    in_training = {"loss"} | measured | more | (KL if loss.startswith("tdpo") else set())
    in_evaluation = {"loss"} | measured | more | (KL if loss != "sft" else set())
    assert [x["step"] for x in one[3]] == [1, 2] and [x["step"] for x in one[4]] == [0, 2]
    for a, b in zip(one[3], eight[3], strict=True):
        assert a.keys() == in_training | COUNTS | {"step"}
        agree = in_training | {"grad_norm", "lr"}
        assert {x: a[x] for x in agree} == pytest.approx({x: b[x] for x in agree}, rel=1e-8, abs=1e-10)
    for a, b in zip(one[4], eight[4], strict=True):
        assert a.keys() == {f"eval/{name}" for name in in_evaluation} | {"step"}
        assert a == pytest.approx(b, rel=1e-8, abs=1e-10)


def test_metrics_are_means_over_pairs_rewards_are_beta_logratio_without_the_kl_and_a_tie_counts_one_half():
    """By hand: log-ratios (1, -2, 3) and (0, 1, 3), so margins (0.2, -0.6, 0) at beta 0.2; the KL does not
    enter."""
    t = {"loss": [0.5, 0.7, 0.9], "chosen_logps": [-9, -12, -7], "ref_chosen_logps": [-10, -10, -10],
         "rejected_logps": [-5, -4, -2], "ref_rejected_logps": [-5, -5, -5],
         "chosen_seq_kl": [1, 2, 6], "rejected_seq_kl": [4, 8, 3]}
    terms = {name: torch.tensor(values, dtype=torch.float64) for name, values in t.items()}
    assert train.metrics(terms, config("tdpo2", beta=0.2)) == pytest.approx({
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


def test_log_and_evaluation_come_at_the_steps_asked_for(model_a, tmp_path):
    *_, lines, evals = run(tmp_path, init=model_a, steps=7, log_every=3, eval_every=2)
    assert [x["step"] for x in lines] == [1, 3, 6, 7] and [x["step"] for x in evals] == [0, 2, 4, 6, 7]


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_throughput_counts_the_tokens_that_the_loss_reads(loss, model_a, tmp_path):
    """SFT reads no rejected response. A line is about the steps since the line before."""
    *_, lines, _ = run(tmp_path, loss, init=model_a, steps=4, log_every=3)
    rows = data.load([tmp_path / "run.jsonl"], BYTES, 64)[0].rows.copy()
    if loss == "sft":
        rows[:, 3] = 0
    for line in lines:
        seconds = line["tokens_per_s"] / line["pairs_per_s"]
        assert seconds == pytest.approx(rows[:, 1:4].sum() / 8)
        assert 0 < line["pairs_per_s"] < 1e6 and 1e7 < line["peak_memory"] < 1e11


# ---------------------------------------------------------------------------------------------------------
# 7  Aspects


def test_one_hot_aspect_weights_equal_data_that_have_this_aspect_only(pairs, tmp_path):
    for loss in SEGMENTED:
        results = []
        for aspect, one_hot in enumerate([(1.0, 0.0), (0.0, 1.0)]):
            only = [{"prompt": record["prompt"]} | {side: [
                {"text": s["text"], "scores": s["scores"][aspect:aspect + 1]} for s in record[side]]
                for side in ("chosen", "rejected")} for record in RECORDS]
            actual = run_step(make(loss, pairs, aspect_weights=one_hot))
            expected = run_step(make(loss, load_records(only, tmp_path), aspect_weights=()))
            for a, e in zip(actual, expected, strict=True):
                assert_same(a, e)
            results.append(actual[0]["loss"])
        assert not torch.allclose(*results, rtol=1e-3)


def test_aspects_weigh_the_same_by_default_and_the_run_stores_their_maxima(model_a, model_b, tmp_path):
    """Through a run: no --aspect_weights equals 0.5 0.5, and differs from 0.25 0.75."""
    start = [run(tmp_path, "2d-dpo", init=model_a, ref=model_b, dtype="float64",
                 aspect_weights=weights) for weights in (None, (0.5, 0.5), (0.25, 0.75))]
    uniform, same, uneven = (x[3][0]["loss"] for x in start)
    assert uniform == same != pytest.approx(uneven, rel=1e-6)
    assert start[0][2]["score_maximum"] == [4.0, 2.0]


# ---------------------------------------------------------------------------------------------------------
# 8  The optimizer


def test_the_learning_rate_rises_linearly_over_warmup_steps_and_stays(model_a, tmp_path):
    *_, lines, _ = run(tmp_path, init=model_a, steps=6, lr=0.8, warmup_steps=4)
    assert [x["lr"] for x in lines] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    *_, lines, _ = run(tmp_path, init=model_a, steps=2, lr=0.8, warmup_steps=0)
    assert [x["lr"] for x in lines] == [0.8, 0.8]


def test_adamw_has_betas_of_09_and_0999_and_moves_by_the_learning_rate_of_the_step(model_a, tmp_path):
    """The first update is lr * sign(gradient), 1 / 4 of --lr within a warm-up of 4 steps; the moments after
    it are 0.1 g and 0.001 g^2."""
    _, folder, *_ = run(tmp_path, init=model_a, lr=4e-3, warmup_steps=4, dtype="float64")
    for name, p in weights(folder).items():
        assert (p - weights(model_a)[name]).abs().max().item() == pytest.approx(1e-3, rel=2e-2), name
    saved = moments(folder)
    for name, m in saved.items():
        if name.startswith("exp_avg."):
            second = saved[name.replace("exp_avg.", "exp_avg_sq.")]
            assert torch.allclose(second, 0.001 * (m / 0.1).square(), rtol=1e-9, atol=0), name


def test_weight_decay_pulls_matrices_only(model_a, tmp_path):
    """After one step the decayed run is lr * weight_decay * (the start) away from the other one: in matrices,
    embeddings included; not in biases and LayerNorm."""
    common = {"init": model_a, "lr": 1e-2, "warmup_steps": 0}
    with_decay, without = (run(tmp_path, weight_decay=x, out_dir=tmp_path / f"{x}", **common)[1]
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
