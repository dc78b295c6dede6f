"""What makes the step fast changes none of its numbers, and experiments/throughput.py runs.

Every sentence is about train.step in float64: loss and gradient of one optimizer step.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from losses import LOSSES, knobs_of
from model import GPT, GPTConfig
from plumbing import machine
from plumbing.reference import Memory, Reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import throughput  # noqa: E402

pytestmark = pytest.mark.slow  # processes and training: seconds each

OPTIONS = argparse.Namespace(lengths="tiny", vocab=97, length_times=1, batches=1, pairs=5, device="cpu",
                             dtype="float64", loss="dpo", peer_compile=False)
needs_compiler = pytest.mark.skipif(machine.cannot_compile() is not None, reason="no C++ compiler")


def models(dtype=torch.float64):
    """A reference, and a policy some way from it."""
    torch.manual_seed(1)
    reference = GPT(GPTConfig(97, 64, 2, 2, 16)).to(dtype).requires_grad_(False)
    policy = GPT(GPTConfig(97, 64, 2, 2, 16)).to(dtype)
    return policy, reference


def step(name, dtype="float64", folder=None, **knobs):
    """Losses of the pairs, and the gradient of their mean. folder: the reference is remembered there."""
    pairs, loss = throughput.make_pairs(OPTIONS), LOSSES[name]
    policy, model = models(torch.float64 if dtype == "float64" else torch.float32)
    knobs = {"micro_batch_size": len(pairs), "micro_batch_tokens": 10**9, "head_tokens": 10**6} | knobs
    of_loss = {k: v for k, v in {"beta": 0.1, "lam": 50.0, "alpha": 0.5}.items() if k in knobs_of(loss)}
    cfg = train.Config(loss=name, device="cpu", dtype=dtype, **of_loss, **knobs)
    plain = replace(cfg, compile_head=False)
    reference = Reference(model, partial(train.hidden_states, model, cfg=plain),
                          partial(train.response_logps, model, cfg=plain),
                          folder and Memory(folder, pairs, dtype))
    index = np.arange(len(pairs))
    batches = list(train.batches(pairs, index, cfg))
    if folder and "chosen_seq_kl" not in train.terms_of(loss):  # the step reads what is filled in here
        for batch in batches:
            reference(batch, with_kl=False)
        reference.response_logps = None
    terms = train.joined([train.step(policy, reference, batch, loss, 1 / len(pairs), cfg)
                          for batch in batches], len(pairs))
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    return terms["loss"][terms["pair"].argsort()], gradient


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss", ["dpo", "dpop", "tdpo1", "tdpo2"])
def test_chunks_micro_batches_and_the_remembered_reference_change_nothing(tmp_path, loss):
    """One chunk, a chunk a pair, a micro-batch a pair, a remembered reference, pairs packed in rows: one
    loss, one gradient."""
    whole = step(loss)
    assert whole[1].norm() > 1e-3
    for knobs in ({"head_tokens": 1}, {"head_tokens": 40, "micro_batch_size": 2}, {"micro_batch_size": 1},
                  {"micro_batch_tokens": 60}, {"folder": tmp_path, "head_tokens": 40}, {"pack": True},
                  {"pack": True, "micro_batch_tokens": 128, "head_tokens": 40}):
        assert_equal(step(loss, **knobs), whole)


@pytest.mark.parametrize("side, loss", [("classic", "dpo"), ("tdpo", "tdpo1"), ("tdpo", "tdpo2")])
def test_the_step_equals_the_plain_one_with_two_models_and_all_logits(tmp_path, monkeypatch, side, loss):
    """Against the peers' shape: rows of their own, every logit, no chunk, no memory; 1e-10 in float64."""
    o = argparse.Namespace(**vars(OPTIONS) | {"loss": loss})
    policy, reference = models()
    given = iter([policy, reference])
    monkeypatch.setattr(throughput, "load", lambda o: next(given))
    seen = {}

    def keep_gradient(policy, optimizer):
        seen["gradient"] = torch.cat([p.grad.flatten() for p in policy.parameters()])

    monkeypatch.setattr(throughput, "finish_step", keep_gradient)
    pairs = throughput.make_pairs(o)
    plain = throughput.SIDES[side](o, pairs, lambda: None)(np.arange(len(pairs)))
    losses, gradient = step(loss, folder=tmp_path, head_tokens=40)
    assert abs(losses.mean().item() - plain) < 1e-10
    torch.testing.assert_close(gradient, seen["gradient"], rtol=0, atol=1e-10)


@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, about torch.jit
@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_a_compiled_head_changes_nothing(tmp_path, loss):
    """torch.compile of the head, one graph for all chunk sizes."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        fused = step(loss, compile_head=True, head_tokens=40)
    assert_equal(fused, step(loss, head_tokens=40))


def test_bfloat16_stays_near_float32():
    """Autocast rounds each factor to 8 bits: the loss within 2e-2, the gradient within 3 % of its length."""
    loss, gradient = step("tdpo2", "bfloat16")
    exact_loss, exact = step("tdpo2", "float32")
    assert (loss - exact_loss).abs().max() < 2e-2
    assert (gradient - exact).norm() < 3e-2 * exact.norm()


def test_useful_flops_by_hand():
    """One pair, P = 2, C = 3, R = 1: six tokens, 18 attended positions, logits at four positions; x 3."""
    config, rows = GPTConfig(11, 16, 2, 1, 4), np.array([[0, 2, 3, 1, 0, 1, 1]])
    by_hand = 3 * (2 * (24 * 4 * 4 * 6 + 4 * 4 * (3 + 6 + 1 + 2 * 4)) + 2 * 4 * 11 * 4)
    assert throughput.useful_flops(config, rows) == by_hand


TINY = ("--size tiny --lengths tiny --vocab 97 --pairs 2 --batches 1 --warmup 1 --repeats 2 --device cpu "
        "--json")


def test_the_script_runs(capsys):
    """Two processes in turn, equal losses at every step, finite numbers."""
    throughput.main(TINY.split())
    result = json.loads(capsys.readouterr().out)
    assert result["faster"] > 0 and result["smaller"] > 0 and 0 < result["ours"]["mfu"] < 1
    assert result["ours"]["loss"] == pytest.approx(result["classic"]["loss"], abs=1e-5)


def test_the_profile_accounts_for_the_step(capsys):
    """The parts of a step add up to its time, and none is missing."""
    throughput.main([*TINY.split(), "--profile"])
    result = json.loads(capsys.readouterr().out)
    assert all(seconds > 0 for seconds in result["parts"].values())
    assert sum(result["parts"].values()) == pytest.approx(result["seconds"], rel=0.3)
