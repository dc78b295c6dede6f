"""train.py: a step's numbers and gradient, what a run computes and logs, new losses, start, optimizer.

Data are made here, in the segment form, with bytes as tokens: tests know every token without asking data.py.
`plain` is the other implementation: a pair is two separate sequences, ordinary causal forward, full logits,
one softmax; it shares with train.py only losses.py's equations (test_losses.py proves those) and GPT.
"""

import json
import math
import random
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
import model as architecture
import train
from losses import LOSSES, knobs_of, terms_of
from model import GPT, GPTConfig
from plumbing import flags, machine, report
from plumbing.reference import Reference, no_reference
from train import Config

ROOT = Path(__file__).resolve().parent.parent
BYTES = data.Tokenizer("bytes")
PREFERENCE = [loss for loss in LOSSES if loss != "sft"]
SEGMENTED = [loss for loss in LOSSES if "chosen_rewards" in terms_of(LOSSES[loss])]
KNOBS = {"beta": 0.2, "lam": 7.0, "alpha": 0.25}
UNEVEN = {"aspect_weights": (0.25, 0.75), "rejected_weight": "score"}
SLOW = pytest.mark.slow

def make_records(n=8, seed=0):
    """Pairs whose prompts, responses and numbers of segments differ in length; scores 1 to 4 and 0 to 2, the
    maxima reached; the first one has a segment without a token."""
    r = random.Random(seed)

    def text(longest):
        return "".join(r.choices("abcdefgh", k=r.randint(1, longest)))

    def response():
        return [{"text": f"{text(5)}{i}", "scores": [r.randint(1, 4), r.randint(0, 2)]}
                for i in range(r.randint(1, 3))]

    made = [{"prompt": text(6) + "?", "chosen": response(), "rejected": response()} for _ in range(n)]
    made[0]["chosen"] = [{"text": "ab.", "scores": [4, 1]}, {"text": "", "scores": [4, 2]},
                         {"text": " c.", "scores": [1, 0]}]
    return made

RECORDS = make_records()

def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)

def load_records(records, tmp_path):
    return data.load([write_lines(tmp_path / "pairs.jsonl", records)], BYTES, 64)[0]

@pytest.fixture
def pairs(tmp_path):
    return load_records(RECORDS, tmp_path)

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
    """A Config in which every knob has its value, in float64 on the CPU; 2D-DPO's weights are uneven."""
    settings = {name: changes.pop(name, value) for name, value in knobs_of(LOSSES[loss]).items()}
    uneven = {"aspect_weights": UNEVEN["aspect_weights"]} if loss in SEGMENTED else {}
    plain = {"device": "cpu", "compile": False, "compile_head": False, "dtype": "float64",
             "head_tokens": 10**6, "micro_batch_tokens": 2048, "micro_batch_size": 100}
    return Config(**plain | uneven | {"loss": loss, "settings": settings} | changes)

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

def run_step(x, scale=0.125):
    """A step's terms in the order of the pairs, {name: (B,)}, and its gradient, {name: tensor}."""
    x.policy.zero_grad()
    rows = [train.step(x.policy, x.reference, batch, x.loss, scale, x.cfg)
            for batch in train.batches(x.pairs, np.arange(len(x.pairs)), x.cfg)]
    rows = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    order = rows.pop("pair").argsort()
    return ({name: x[order] for name, x in rows.items()},
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

def first_step(folder):
    """AdamW's two moments after the first step, without the rows that pad the table, which stay 0."""
    saved = load_file(folder / "checkpoints" / "step-0000001.safetensors")
    assert not saved["exp_avg.wte.weight"][BYTES.vocab_size:].any()
    return [{name.removeprefix(key): x[:257] if "wte" in name else x for name, x in saved.items()
             if name.startswith(key)} for key in ("exp_avg.", "exp_avg_sq.")]

def norm_of(gradient):
    return math.sqrt(sum(g.square().sum().item() for g in gradient.values()))

def weights(folder):
    return dict(GPT.from_pretrained(folder).named_parameters())

# ---- Helpers: the other implementation ----

def plain(cfg, policy, reference, records, maximum=(4.0, 2.0)):
    """Two separate sequences a pair -> the losses (B,), and {name: (B,)}, the log-probabilities and KLs."""
    values, numbers, loss = [], [], LOSSES[cfg.loss]
    for record in records:
        prompt, t, sums = list(record["prompt"].encode()), {}, {}
        for side in ("chosen", "rejected"):
            lengths = [len(segment["text"]) for segment in record[side]]
            ids = [*"".join(segment["text"] for segment in record[side]).encode(), BYTES.eot]
            lengths[-1] += 1  # end-of-text joins the last segment
            log_s, log_q = (m.logits(m(torch.tensor([prompt + ids])))[0, len(prompt) - 1:-1].log_softmax(-1)
                            for m in (policy, reference))  # (C, V) at the positions that predict the response
            log_q = log_q.detach()
            tokens = {f"{side}_logps": log_s[range(len(ids)), ids],
                      f"ref_{side}_logps": log_q[range(len(ids)), ids],
                      f"{side}_seq_kl": (log_q.exp() * (log_q - log_s)).sum(-1)}
            for name, x in tokens.items():
                sums[name] = x.sum().detach()
                t[name] = torch.stack([part.sum() for part in x.split(lengths)])[None] \
                    if cfg.loss in SEGMENTED else x.sum()[None]
            if cfg.loss in SEGMENTED:
                aspects = list(zip(cfg.aspect_weights, maximum, strict=True))
                r = [sum(w * s / m for s, (w, m) in zip(segment["scores"], aspects, strict=True))
                     for segment in record[side]]
                r = [1 - x for x in r] if (side, cfg.rejected_weight) == ("rejected", "badness") else r
                t[f"{side}_rewards"] = torch.tensor([r], dtype=torch.float64)
                t[f"{side}_mask"] = torch.tensor([lengths]) > 0
        values.append(loss(**{name: t[name] for name in terms_of(loss)}, **cfg.settings)[0])
        numbers.append(sums)
    return torch.stack(values), {name: torch.stack([n[name] for n in numbers]) for name in numbers[0]}

def plain_gradient(cfg, policy, reference, records):
    """(the losses, the gradient of their mean), for SFT over response tokens, end-of-text included."""
    policy.zero_grad()
    result, _ = plain(cfg, policy, reference, records)
    tokens = sum(1 + sum(len(s["text"]) for s in record["chosen"]) for record in records)
    (result.sum() / (tokens if cfg.loss == "sft" else len(records))).backward()
    return result.detach(), {name: p.grad.clone() for name, p in policy.named_parameters()}

@pytest.mark.parametrize("loss, changes", [(loss, {}) for loss in LOSSES]
                         + [("2d-dpo-vanilla", {"rejected_weight": "badness"})])
def test_losses_and_gradients_equal_those_of_two_separate_sequences_however_the_work_is_cut(
        loss, changes, pairs):
    """Micro-batches of any size, chunks of one pair and of many. For 2D-DPO the scores
    over their aspect's maximum, an empty segment masked, badness = 1 - score."""
    x = make(loss, pairs, **changes)
    expected = plain_gradient(x.cfg, x.policy, x.model, RECORDS)
    scale = 1 / sum(p["C"] for p in x.pairs.rows) if loss == "sft" else 1 / 8
    for head_tokens, micro in ((10**6, 100), (1, 100), (60, 3)):
        x = make(loss, pairs, head_tokens=head_tokens, micro_batch_size=micro, **changes)
        rows, gradient = run_step(x, scale)
        assert_same({"loss": rows["loss"]} | gradient, {"loss": expected[0]} | expected[1])

class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns, forward and backward."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        some = result if isinstance(result, tuple | list) else [result]
        self.numel = max([self.numel, *(x.numel() for x in some if isinstance(x, torch.Tensor))])
        return result

@pytest.mark.parametrize("loss", ["dpo", "tdpo2", "2d-dpo"])
def test_no_tensor_is_larger_than_the_logits_of_one_chunk(loss, pairs):
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

# ---- 2  A run ----

COUNTS = {"grad_norm", "lr", "pairs_per_s", "tokens_per_s", "peak_memory"}
REWARDS = {f"{group}/{name}" for group, names in {
    "rewards": ("chosen", "rejected", "margins", "accuracies"), "logps": ("chosen", "rejected"),
    "logratio": ("chosen", "rejected")}.items() for name in names}
KL = {"kl/ref_policy_chosen", "kl/ref_policy_rejected"}

@pytest.mark.parametrize("loss", [
    loss if loss in ("sft", "tdpo2") else pytest.param(loss, marks=SLOW) for loss in LOSSES])
def test_a_run_has_the_gradient_and_logs_the_numbers_of_the_plain_implementation(
        loss, model_a, model_b, tmp_path):
    """Data, remembered reference, knobs, aspect weights and the one division of a step: the mean over its
    pairs, for SFT over their response tokens; 12 pairs from a file of 8, so a pair that is read twice counts
    twice. The KL is logged in training for TDPO only, at evaluation always.
    In one micro-batch it is the same."""
    changes = {name: KNOBS[name] for name in knobs_of(LOSSES[loss])} | (UNEVEN if loss in SEGMENTED else {})
    ref = {"ref": model_b} if flags.has_reference(LOSSES[loss]) else {}
    common = {"init": model_a, "dtype": "float64", "grad_clip": 0, "batch_size": 12, "steps": 2, "lr": 1e-3,
              "save_every": 1} | changes | ref
    _, folder, head, lines, evals = run(tmp_path, loss, micro_batch_size=3, head_tokens=40, **common)
    cfg, models = config(loss, **changes), [GPT.from_pretrained(x).double() for x in (model_a, model_b)]
    records = [RECORDS[i] for i in data.step_indices(8, 12, 0, 0)]
    values, gradient = plain_gradient(cfg, *models, records)
    assert_same({name: x / (1 - 0.9) for name, x in first_step(folder)[0].items()}, gradient)
    if loss != "sft":
        assert lines[0]["loss"] == pytest.approx(values.mean().item(), rel=1e-10)
    assert lines[0]["grad_norm"] == pytest.approx(norm_of(gradient), rel=1e-10)

    measured = (REWARDS if loss != "sft" else {"logps/chosen"}) | {"loss"}
    measured |= {"segments/paired"} if loss in SEGMENTED else set()
    in_evaluation = measured | (KL if loss != "sft" else set())
    in_training = measured | (KL if loss.startswith("tdpo") else set())
    assert lines[0].keys() == in_training | COUNTS | {"step"} and [x["step"] for x in lines] == [1, 2]
    assert evals[0].keys() == {f"eval/{x}" for x in in_evaluation} | {"step"} and evals[-1]["step"] == 2
    with torch.no_grad():
        values, numbers = plain(cfg, *models, RECORDS)
    names = {"logps": "{}_logps", "kl/ref_policy": "{}_seq_kl"} if loss != "sft" else {}
    for name, term in names.items():
        for side in ("chosen", "rejected"):
            found = evals[0][f"eval/{name}{'/' if name == 'logps' else '_'}{side}"]
            assert found == pytest.approx(numbers[term.format(side)].mean().item(), rel=1e-10)
    if loss in SEGMENTED:
        assert head["score_maximum"] == [4.0, 2.0]

    _, _, _, whole, whole_evals = run(tmp_path, loss, out_dir=tmp_path / "whole", **common)
    for a, b in zip(lines + evals, whole + whole_evals, strict=True):
        agree = a.keys() - {"pairs_per_s", "tokens_per_s", "peak_memory"}
        assert {x: a[x] for x in agree} == pytest.approx({x: b[x] for x in agree}, rel=1e-8, abs=1e-10)

@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_lines_come_at_the_steps_asked_for_the_rate_warms_up_and_throughput_counts_what_the_loss_reads(
        loss, model_a, tmp_path):
    *_, lines, evals = run(tmp_path, loss, init=model_a, steps=7, log_every=3, eval_every=2, lr=0.08,
                           warmup_steps=4)
    assert [x["step"] for x in lines] == [1, 3, 6, 7] and [x["step"] for x in evals] == [0, 2, 4, 6, 7]
    assert [x["lr"] for x in lines] == pytest.approx([0.02, 0.06, 0.08, 0.08])
    rows = data.load([tmp_path / "run.jsonl"], BYTES, 64)[0].rows
    tokens = sum(rows[name].sum() for name in ("PC" if loss == "sft" else "PCR"))
    for line in lines:
        assert line["tokens_per_s"] / line["pairs_per_s"] == pytest.approx(tokens / 8)
        assert line["pairs_per_s"] > 0 and 1e7 < line["peak_memory"] < 1e11

@pytest.mark.slow
def test_adamw_moves_by_the_rate_of_the_step_decays_matrices_only_and_clips(model_a, model_b, tmp_path):
    """The first update is lr * sign(gradient), in a warm-up of 4 steps 1 / 4 of --lr; the moments are 0.1 g
    and 0.001 g^2. The logged norm is that before clipping; 0 never clips."""
    start, after, moments, norms = weights(model_a), {}, {}, set()
    for name, changes in {"plain": {}, "decay": {"weight_decay": 0.5}, "clip": {"grad_clip": 1e-3},
                          "high clip": {"grad_clip": 1e6}}.items():
        _, folder, _, lines, _ = run(tmp_path, init=model_a, ref=model_b, dtype="float64", lr=4e-3,
                                     warmup_steps=4, **{"grad_clip": 0} | changes)
        after[name], moments[name] = weights(folder), first_step(folder)
        norms.add(round(lines[0]["grad_norm"], 9))
    for name, p in start.items():
        assert (after["plain"][name] - p).abs().max().item() == pytest.approx(1e-3, rel=2e-2), name
        first, second = (m[name] for m in moments["plain"])
        assert torch.allclose(second, 0.001 * (first / 0.1).square(), rtol=1e-9, atol=0), name
        decay = 1e-3 * 0.5 * p if p.dim() == 2 else torch.zeros_like(p)
        assert torch.allclose(after["plain"][name] - after["decay"][name], decay, atol=1e-7), name
    [norm], given = norms, {name: norm_of(m) / 0.1 for name, (m, _) in moments.items()}
    assert given["plain"] == pytest.approx(norm) == pytest.approx(given["high clip"]) and norm > 0.1
    assert given["clip"] == pytest.approx(1e-3, rel=1e-4)

@SLOW
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of the compiler
def test_a_compiled_run_has_five_graphs_and_the_numbers_of_an_eager_one(
        model_a, model_b, tmp_path, monkeypatch):
    """However many micro-batches and chunks: the blocks have three, of the reference and of the policy with
    and without gradient, the head two. Not translated to C++, which takes a minute and is torch's."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    machine.compiled.cache_clear()
    common = {"loss": "tdpo2", "init": model_a, "ref": model_b, "steps": 3, "lr": 1e-3,
              "micro_batch_size": 4, "head_tokens": 40}
    eager = run(tmp_path, **common, compile=False)
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    compiled = run(tmp_path, **common, compile=True, out_dir=tmp_path / "compiled")
    assert stats["unique_graphs"] - before == 5
    assert compiled[0] == pytest.approx(eager[0], rel=1e-4, abs=1e-4)
    for e, c in zip(eager[3], compiled[3], strict=True):
        assert (c["loss"], c["grad_norm"]) == pytest.approx((e["loss"], e["grad_norm"]), rel=1e-4)
    assert list(weights(compiled[1])) == list(weights(eager[1]))

# ---- 3  The start ----

@pytest.mark.parametrize("loss", PREFERENCE)
def test_a_policy_that_is_its_reference_passes_in_every_precision_and_nothing_else(loss, pairs):
    for dtype in ("float64", "float32", "bfloat16"):
        x = make(loss, pairs, policy=1, dtype=dtype)
        found = train.evaluate(x.policy, x.reference, x.pairs, x.cfg)
        report.check_start(found, x.cfg)
        assert found["rewards/accuracies"] == 0.5 and found["rewards/margins"] == pytest.approx(0, abs=1e-6)
    x = make(loss, pairs)  # 1/10 away
    for bad in (train.evaluate(x.policy, x.reference, x.pairs, x.cfg), found | {"logratio/chosen": math.nan}):
        with pytest.raises(report.RunError, match="policy and reference are equal, yet"):
            report.check_start(bad, x.cfg)

class Dropout(architecture.MLP):
    """An edit of model.py. always: random numbers in eval() too."""
    always = False

    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x), 0.5, self.training or self.always)

def test_an_architecture_with_dropout_starts_at_log_2_and_one_random_in_eval_is_refused(
        model_a, model_b, tmp_path, monkeypatch, capsys):
    sizes = {"tokenizer": "bytes", "n_layer": 1, "n_embd": 16, "block_size": 64, "sft_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr(architecture, "MLP", Dropout)
        *_, lines, evals = run(tmp_path, **sizes)
        assert evals[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-6) == lines[0]["loss"]
        assert capsys.readouterr().out.count("before the first step: loss 0.6931 = log 2, as it must") == 1
        patch.setattr(Dropout, "always", True)
        with pytest.raises(SystemExit, match="policy and reference are equal, .* draw random numbers"):
            run(tmp_path, **sizes, n_head=2)
        assert "loss 0.6931" not in capsys.readouterr().out
    run(tmp_path, init=model_a, ref=model_b)
    assert "before the first step" not in capsys.readouterr().out

# ---- 4  A new loss is its function and its line ----

def simpo_loss(chosen_logps, rejected_logps, chosen_length, rejected_length, *, beta, gamma=0.5):
    """SimPO, Meng et al. 2024: no reference, log-probabilities a token, a margin."""
    h = beta * (chosen_logps / chosen_length - rejected_logps / rejected_length)
    return -torch.nn.functional.logsigmoid(h - gamma)

def ipo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, gamma=0.5):
    return (chosen_logps - ref_chosen_logps - rejected_logps + ref_rejected_logps - gamma) ** 2

def kl_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_seq_kl, chosen_rewards,
            *, gamma=0.5):
    return (gamma * chosen_seq_kl - chosen_rewards * (chosen_logps - ref_chosen_logps)).sum(-1)

@pytest.mark.parametrize("loss, beta", [(simpo_loss, {"beta": 2.0}), *(pytest.param(x, {}, marks=SLOW)
                                                                    for x in (ipo_loss, kl_loss))])
def test_a_new_loss_trains_logs_and_has_its_flags_by_its_function_and_its_line_alone(
        loss, beta, model_a, tmp_path, monkeypatch, capsys):
    """Its signature decides reference, remembered numbers, KL and segments; a knob without default must be
    given; foreign knobs are refused, also those that are new."""
    monkeypatch.setitem(LOSSES, "new", loss)
    common = {"init": model_a, "lr": 1e-3, "steps": 3, **beta}
    _, folder, head, lines, evals = run(tmp_path, "new", **common, gamma=0.25)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert head["config"]["gamma"] == head["identity"]["gamma"] == 0.25
    assert (head["identity"]["ref"] is not None) == ("logratio/chosen" in lines[0]) == (loss != simpo_loss)
    assert (folder / "reference-train.bin").exists() == (loss == ipo_loss)
    assert (KL <= lines[0].keys()) == ("segments/paired" in lines[0]) == (loss == kl_loss)
    _, _, _, other, _ = run(tmp_path, "new", **common, gamma=0.75)
    assert other[-1]["loss"] != lines[-1]["loss"]
    capsys.readouterr()
    for name, change, why in (("new", {"lam": 1}, "--lam: would not be read, the loss new has none"),
                              ("dpo", {"gamma": 1}, "--gamma: would not be read, the loss dpo has none"),
                              ("new", {"beta": None}, "--beta: the loss new needs it; it has no default")):
        if loss == simpo_loss or "beta" not in change:
            with pytest.raises(SystemExit, match="2"):
                run(tmp_path, name, **common | change)
            assert why in capsys.readouterr().err

def test_a_loss_that_asks_for_an_unknown_term_is_refused_and_an_error_in_one_shows_its_line(
        model_a, tmp_path, monkeypatch, capsys):
    def unknown_loss(chosen_logps, rejected_logps, margin):
        return margin

    def broken_loss(chosen_logps, rejected_logps):
        return chosen_logps / rejected_logps.nonsense

    monkeypatch.setitem(LOSSES, "new", unknown_loss)
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, "new", tokenizer="bytes", block_size=64)  # nor is a start made by SFT
    error = capsys.readouterr().err
    assert f"--loss new: asks for margin; a loss may ask for {', '.join(losses.TERMS)}\n" in error
    assert not list(tmp_path.rglob("run.json"))
    monkeypatch.setitem(LOSSES, "new", broken_loss)
    with pytest.raises(AttributeError, match="nonsense") as error:
        run(tmp_path, "new", init=model_a)
    assert error.traceback[-1].name == "broken_loss"

@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_loss_may_ask_for_a_kl_and_for_no_other_term_of_the_reference(side, model_a, tmp_path, monkeypatch):
    names = {"chosen": lambda chosen_logps, rejected_logps, chosen_seq_kl:
             rejected_logps - chosen_logps + chosen_seq_kl,
             "rejected": lambda chosen_logps, rejected_logps, rejected_seq_kl:
             rejected_logps - chosen_logps + rejected_seq_kl}
    monkeypatch.setitem(LOSSES, "new", names[side])
    _, folder, head, lines, _ = run(tmp_path, "new", init=model_a, lr=1e-3, steps=3)
    assert head["identity"]["ref"] and not (folder / "reference-train.bin").exists()
    assert lines[-1]["loss"] < lines[0]["loss"] and KL <= lines[-1].keys()

@pytest.mark.parametrize("of_pairs", [torch.mean, lambda x: x.mean(0, keepdim=True), lambda x: x[:, None]])
def test_a_loss_that_returns_something_else_than_a_number_for_each_pair_is_an_error(
        of_pairs, model_a, tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "new", lambda chosen_logps, rejected_logps: of_pairs(chosen_logps))
    with pytest.raises(ValueError, match="the loss new must return a number for each pair, not "):
        run(tmp_path, "new", init=model_a)

def test_a_loss_of_chosen_responses_alone_may_have_a_reference_and_one_that_is_nan_ends_the_run(
        model_a, tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "new", lambda chosen_logps, ref_chosen_logps: ref_chosen_logps - chosen_logps)
    _, _, _, lines, _ = run(tmp_path, "new", init=model_a, lr=1e-3, steps=3)
    assert lines[0]["loss"] == 0 > lines[-1]["loss"]
    monkeypatch.setitem(LOSSES, "new", lambda chosen_logps, rejected_logps: (chosen_logps - 1).log())
    with pytest.raises(SystemExit, match="step 0: the held-out loss is nan$"):  # not --lr
        run(tmp_path, "new", init=model_a)
