"""What makes train.step fast changes none of its numbers, and throughput.py measures what it says."""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from losses import LOSSES, knobs_of
from model import GPT, GPTConfig
from plumbing.reference import Memory, Reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import throughput  # noqa: E402

pytestmark = pytest.mark.slow

V, N = 97, 5  # ids, pairs

def make_pairs():
    g = np.random.default_rng(0)
    ids = [[g.integers(0, V, n, dtype=np.int32) for n in g.integers(4, 16, 3)] for _ in range(N)]
    return data.pack(data.Pair(x, y_w, y_l, 0 * y_w, 0 * y_l, *np.zeros((2, 1, 0))) for x, y_w, y_l in ids)

def models(dtype=torch.float64):
    torch.manual_seed(1)  # a policy some way from its reference
    reference, policy = (GPT(GPTConfig(V, 64, 2, 2, 16)).to(dtype) for _ in range(2))
    return policy, reference.requires_grad_(False)

def step(name, dtype="float64", folder=None, **knobs):
    """Losses of the pairs, and the gradient of their mean. folder: the reference is remembered there."""
    pairs, loss = make_pairs(), LOSSES[name]
    policy, model = models(torch.float64 if dtype == "float64" else torch.float32)
    cfg = train.Config(loss=name, settings=knobs_of(loss), device="cpu", dtype=dtype,
                       **{"micro_batch_tokens": 10**9, "head_tokens": 10**6} | knobs)
    reference = Reference(model, partial(train.hidden_states, model, cfg=cfg),
                          partial(train.response_logps, model, cfg=cfg),
                          folder and Memory(folder, pairs, dtype))
    batches = list(train.batches(pairs, np.arange(N), cfg))
    if folder and "chosen_seq_kl" not in train.terms_of(loss):  # the step reads what is filled in here
        for batch in batches:
            reference(batch, with_kl=False)
        reference.response_logps = None
    terms = train.joined([train.step(policy, reference, batch, loss, 1 / N, cfg) for batch in batches], N)
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    return terms["loss"][terms["pair"].argsort()], gradient

def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)

@pytest.mark.parametrize("loss", ["dpo", "dpop", "tdpo1", "tdpo2"])
def test_chunks_micro_batches_and_the_remembered_reference_change_nothing(tmp_path, loss):
    """One chunk, a chunk a pair, a micro-batch a pair, a remembered reference: one loss, one gradient."""
    whole = step(loss)
    assert whole[1].norm() > 1e-3
    for knobs in ({"head_tokens": 1}, {"head_tokens": 40, "micro_batch_size": 2}, {"micro_batch_size": 1},
                  {"micro_batch_tokens": 60}, {"folder": tmp_path, "head_tokens": 40}):
        assert_equal(step(loss, **knobs), whole)

@pytest.mark.parametrize("peer, loss", [(throughput.classic_loss, "dpo"), (throughput.tdpo_loss, "tdpo1"),
                                        (throughput.tdpo_loss, "tdpo2")])
def test_the_step_equals_the_plain_one_with_two_models_and_all_logits(tmp_path, peer, loss):
    """Against the peers' shape: rows of their own, every logit, no chunk, no memory; 1e-10 in float64."""
    policy, reference = models()
    ids = [[side.tolist() for side in (p.prompt, p.chosen, p.rejected)] for p in make_pairs()]
    tokens, scored = throughput.padded_rows(ids, "cpu")
    plain = peer(policy.logits(policy(tokens)), reference.logits(reference(tokens)), tokens, scored, loss)
    plain.backward()
    losses, gradient = step(loss, folder=tmp_path, head_tokens=40)
    assert_equal((losses.mean(), gradient),
                 (plain.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()])))

def test_bfloat16_stays_near_float32():
    """Autocast rounds factors to 8 bits: the loss within 2e-2, the gradient within 3 % of its length."""
    (loss, gradient), (exact_loss, exact) = step("tdpo2", "bfloat16"), step("tdpo2", "float32")
    assert (loss - exact_loss).abs().max() < 2e-2 and (gradient - exact).norm() < 3e-2 * exact.norm()

def test_useful_flops_by_hand():
    """One pair, P = 2, C = 3, R = 1: six tokens, 18 attended positions, logits at four positions; x 3."""
    by_hand = 3 * (2 * (24 * 4 * 4 * 6 + 4 * 4 * (3 + 6 + 1 + 2 * 4)) + 2 * 4 * 11 * 4)
    assert throughput.useful_flops(2, 4, 11, np.array([[2, 3, 1]])) == by_hand

def test_losses_that_differ_end_the_comparison():
    o, a, b = argparse.Namespace(warmup=1, repeats=1, limit=1e-5), {1: {"loss": 0.5}}, {1: {"loss": 0.5001}}
    assert throughput.differences(o, [a, a]) == {"loss": 0}
    with pytest.raises(SystemExit, match="differ by 1.0e-04"):
        throughput.differences(o, [a, b])

@pytest.mark.slow  # three processes import torch
def test_two_sides_take_turns_and_their_losses_agree():
    """train.py and the classic step, a process each, on pairs of each length that was drawn."""
    tiny = "--size tiny --lengths tiny --vocab 300 --pairs 2 --batches 1 --repeats 1 --device cpu"
    o = throughput.parse(tiny.split())
    r, tokens = throughput.compare(o), throughput.draw_lengths(o)[:, 1:].sum()
    assert 0 < r["faster"] and 0 < r["smaller"] and r["differences"]["loss"] < 1e-6
    assert r["ours"]["tokens_per_s"] * r["ours"]["seconds"] == pytest.approx(tokens)
