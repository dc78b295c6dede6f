"""What makes the step fast changes none of its numbers, and experiments/throughput.py runs.

Every sentence is about the step of train.Engine in float64: loss and gradient of one optimizer step.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from model import GPT, GPTConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import throughput  # noqa: E402

pytestmark = pytest.mark.slow  # processes and training: seconds each

OPTIONS = argparse.Namespace(lengths="tiny", vocab=97, length_times=1, batches=1, pairs=5, device="cpu",
                             dtype="float64", loss="dpo")
needs_compiler = pytest.mark.skipif(not train.can_compile(), reason="torch.compile needs a C++ compiler")


def models(dtype=torch.float64):
    """A reference, and a policy some way from it."""
    torch.manual_seed(1)
    reference = GPT(GPTConfig(97, 64, 2, 2, 16)).to(dtype).requires_grad_(False)
    policy = GPT(GPTConfig(97, 64, 2, 2, 16)).to(dtype)
    return policy, reference


def step(tmp_path, loss, dtype="float64", compiled=False, **knobs):
    """Losses of the pairs, and the gradient of their mean, from the product's own step."""
    pairs = throughput.make_pairs(OPTIONS)
    policy, reference = models(torch.float64 if dtype == "float64" else torch.float32)
    cfg = train.fill_defaults(train.Config(loss=loss, device="cpu", dtype=dtype, out_dir=str(tmp_path),
                                           **{"micro_batch_size": len(pairs), "ref_cache": False} | knobs))
    engine = train.Engine(cfg, policy, reference)
    if compiled:
        engine.head = torch.compile(train.head, dynamic=True)
    if cfg.ref_cache:
        train.store_reference(engine, pairs, [np.arange(len(pairs))], "train", tmp_path, "test")
        assert engine.stores
        reference.h = engine.ref_trunk = None
    micros = train.micro_batches(cfg, pairs)
    assert len(micros) > 1 or not {"micro_batch_tokens", "micro_batch_size"} & knobs.keys()
    rows = [engine.run_pairs(pairs, micro, "train", 1 / len(pairs)) for micro in micros]
    order = np.concatenate(micros).argsort()
    loss = torch.cat([row["loss"] for row in rows])[order]
    return loss, torch.cat([p.grad.flatten() for p in policy.parameters()])


def assert_equal(one, other, **tolerance):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **tolerance or {"rtol": 0, "atol": 1e-10})


@pytest.mark.parametrize("loss", ["dpo", "dpop", "tdpo1", "tdpo2"])
def test_chunks_micro_batches_and_the_stored_reference_change_nothing(tmp_path, loss):
    """One chunk, a chunk a pair, a micro-batch a pair, a stored reference: one loss, one gradient."""
    whole = step(tmp_path, loss, head_tokens=10**6)
    assert whole[1].norm() > 1e-3
    for knobs in ({"head_tokens": 1}, {"head_tokens": 40, "micro_batch_size": 2}, {"micro_batch_size": 1},
                  {"micro_batch_tokens": 60},
                  {"ref_cache": True, "head_tokens": 40}):
        assert_equal(step(tmp_path, loss, **knobs), whole)


@pytest.mark.parametrize("side, loss", [("classic", "dpo"), ("tdpo", "tdpo1"), ("tdpo", "tdpo2")])
def test_the_step_equals_the_plain_one_with_two_models_and_all_logits(tmp_path, monkeypatch, side, loss):
    """Against the peers' shape: rows of their own, every logit, no chunk, no store; 1e-10 in float64."""
    o = argparse.Namespace(**vars(OPTIONS) | {"loss": loss})
    policy, reference = models()
    given = iter([policy, reference])
    monkeypatch.setattr(throughput, "load", lambda o: next(given))
    seen = {}

    def keep_gradient(policy, optimizer):
        seen["gradient"] = torch.cat([p.grad.flatten() for p in policy.parameters()])

    monkeypatch.setattr(throughput, "finish_step", keep_gradient)
    pairs = throughput.make_pairs(o)
    plain = throughput.SIDES[side](o, pairs, lambda released: None)(np.arange(len(pairs)))
    losses, gradient = step(tmp_path, loss, ref_cache=True, head_tokens=40)
    assert abs(losses.mean().item() - plain) < 1e-10
    torch.testing.assert_close(gradient, seen["gradient"], rtol=0, atol=1e-10)


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, about torch.jit
@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_a_compiled_head_changes_nothing(tmp_path, loss):
    """torch.compile of the head, one graph for all chunk sizes."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        fused = step(tmp_path, loss, compiled=True, head_tokens=40)
    assert_equal(fused, step(tmp_path, loss, head_tokens=40))


def test_bfloat16_stays_near_float32(tmp_path):
    """Autocast rounds each factor to 8 bits: the loss within 2e-2, the gradient within 3 % of its length."""
    loss, gradient = step(tmp_path, "tdpo2", "bfloat16")
    exact_loss, exact = step(tmp_path, "tdpo2", "float32")
    assert (loss - exact_loss).abs().max() < 2e-2
    assert (gradient - exact).norm() < 3e-2 * exact.norm()


def test_useful_flops_by_hand():
    """One pair, P = 2, C = 3, R = 1: six tokens, 18 attended positions, logits at four positions; x 3."""
    config, rows = GPTConfig(11, 16, 2, 1, 4), np.array([[0, 2, 3, 1, 0, 1, 1]])
    by_hand = 3 * (2 * (24 * 4 * 4 * 6 + 4 * 4 * (3 + 6 + 1 + 2 * 4)) + 2 * 4 * 11 * 4)
    assert train.useful_flops(config, rows) == by_hand


def test_the_script_runs(capsys):
    """Two processes in turn, equal losses at every step, finite numbers."""
    throughput.main("--size tiny --lengths tiny --vocab 97 --pairs 2 --batches 1 --warmup 1 --repeats 2 "
                    "--device cpu --json".split())
    result = json.loads(capsys.readouterr().out)
    assert result["faster"] > 0 and result["smaller"] > 0 and result["ours"]["mfu"] > 0
    assert result["ours"]["loss"] == pytest.approx(result["classic"]["loss"], abs=1e-5)
