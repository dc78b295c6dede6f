"""experiments/: every claim runs on a hidden tiny setting and leaves tables, JSON and a figure; README's
numbers are the JSON's; what the claims compute by themselves (Eq. 4, intervals, KL of samples) is right."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import claims  # noqa: E402
import common  # noqa: E402
import frontier  # noqa: E402
import replay  # noqa: E402
import weight  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402
from toy import reviews  # noqa: E402

pytestmark = pytest.mark.slow  # processes and training: seconds each

RESULTS = ROOT / "experiments" / "results"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder that `python experiments/claims.py` leaves, on models of 8 channels and 2 or 3 steps."""
    out = tmp_path_factory.mktemp("claims")
    flags = ["--tiny", "--workers", "1", "--out", str(out), "--store", str(out / "runs")]
    common.main(claims.CLAIMS, flags)
    return out, flags


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.NAME)
def test_a_claim_leaves_tables_json_and_a_figure(tiny, claim):
    summary = json.loads((tiny[0] / "results" / f"{claim.NAME}.json").read_text())
    assert summary["tables"] and all(t["rows"] and t["title"] for t in summary["tables"])
    for t in summary["tables"]:
        assert {len(row) for row in t["rows"]} == {len(t["columns"])}
    assert {"commit", "hardware", "cpu_s", "seeds", "command"} <= summary["made"].keys()
    png = (tiny[0] / "figures" / f"{claim.NAME}.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 4_000


def test_finished_runs_are_taken_from_the_store(tiny, capsys):
    """A second call of one claim trains nothing and gives the same numbers."""
    out, flags = tiny
    before = json.loads((out / "results" / "weight.json").read_text())
    common.main([weight], flags)
    assert "8 of them from the store" in capsys.readouterr().out  # 2 seeds: 3 runs and a reference each
    after = json.loads((out / "results" / "weight.json").read_text())
    assert after["tables"] == before["tables"] and after["weights"] == before["weights"]


def test_tables_of_the_readme_come_from_the_json(tiny):
    """with_tables replaces what stands in a block by the JSON's tables, and a second time nothing."""
    text = "a\n<!-- tables weight -->\nold | 1 |\n<!-- end -->\nb\n<!-- tables made -->\n<!-- end -->\n"
    new = common.with_tables(text, tiny[0] / "results")
    assert new.startswith("a\n<!-- tables weight -->\n*Mean gradient") and "old" not in new and "\nb\n" in new
    assert "CPU minutes" in new
    assert common.with_tables(new, tiny[0] / "results") == new


@pytest.mark.skipif(not RESULTS.exists(), reason="no results in this checkout")
def test_the_numbers_of_the_readme_are_those_of_the_json_files():
    """Every number of a result stands in a block of tables, and all results are of one state of the code."""
    text = (ROOT / "experiments" / "README.md").read_text()
    assert common.with_tables(text, RESULTS) == text
    for claim in claims.CLAIMS:
        assert f"<!-- tables {claim.NAME} -->\n*" in text
        figure = ROOT / "experiments" / "figures" / f"{claim.NAME}.png"
        assert f"figures/{claim.NAME}.png" in text and 10_000 < figure.stat().st_size < 250_000
    made = [json.loads((RESULTS / f"{claim.NAME}.json").read_text())["made"] for claim in claims.CLAIMS]
    assert len({(m["sources"], m["setting"], m["seeds"], m["torch"]) for m in made}) == 1


def test_the_paired_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), Student's t of 2 degrees of freedom 4.303."""
    mean, half = common.mean_and_half([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert common.versus([11, 22, 33], [10, 20, 30]) == "+2.00 ± 2.48, no difference seen"
    assert common.versus([11, 22.1, 33.2], [10, 21, 32]) == "+1.10 ± 0.25, above"
    assert common.versus([1, None, 3], [2, 0, 4]) == "-1.00 ± 0.00, below"
    assert common.versus([1.5], [1.0]) == "+0.50, one seed"
    assert common.cell([1.0, None]) == "1.00 (1 of 2 seeds)"


def test_a_level_is_reached_between_neighbouring_checkpoints():
    assert common.reaches([0, 0.1, 0.3], [8, 9, 10], 0.2) == pytest.approx(9.5)
    assert common.reaches([0, 0.1, 0.05], [8, 9, 10], 0.2) is None


def test_the_best_within_a_budget_has_no_bias_of_a_maximum():
    """Candidates that differ by noise alone: the maximum is far too high, the cross-fitted best is not."""
    rng, found, naive = np.random.default_rng(0), [], []
    for _ in range(400):
        points = [{"halves": [[rng.normal(), 0.1], [rng.normal(), 0.1]]} for _ in range(24)]
        points.append({"halves": [[99.0, 5.0], [99.0, 5.0]]})  # beyond the budget
        found.append(frontier.best_within(points, 1.0))
        naive.append(max(p["halves"][0][0] for p in points[:-1]))
    assert abs(np.mean(found)) < 0.15 and np.mean(naive) > 1.5


def test_best_of_n_by_enumeration():
    """At the KL bound of n = 2 the mean of the larger of two draws with replacement, over all pairs."""
    rewards = [0.0, 1.0, 5.0, 7.0]
    by_hand = np.mean([max(a, b) for a in rewards for b in rewards])
    assert frontier.best_of_n(rewards, math.log(2) - 0.5) == pytest.approx(by_hand)


def test_the_reweighted_curve_is_equation_4():
    """On rewards 0 and 1, equally often, Eq. 4 has reward sigma(1/beta), and KL is that of two Bernoullis."""
    points = frontier.reweighted([0.0, 1.0] * 500, least_ess=100)
    for p in points:
        q = 1 / (1 + math.exp(-1 / p["beta"]))
        assert p["reward"] == pytest.approx(q, abs=1e-9)
        kl = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q) + 1e-300)
        assert p["kl"] == pytest.approx(kl, abs=1e-6)


def test_the_exact_ceiling_is_that_of_the_base_distribution():
    """Without tilt it has the base distribution's mean, and re-weighting samples of that gives the curve."""
    rng, exact = replay.random.Random(0), frontier.exact_ceiling()
    rewards = [reviews.reward(f"Review the red mug:{reviews.sample_response('red', 'mug', rng)}")
               for _ in range(4000)]
    assert frontier.on_curve(exact, 0.0) == pytest.approx(np.mean(rewards), abs=0.15)
    for p in frontier.reweighted(rewards, least_ess=400)[::10]:
        assert frontier.on_curve(exact, p["kl"]) == pytest.approx(p["reward"], abs=0.25)


@pytest.fixture(scope="module")
def two_models():
    """A small policy and a small reference over the toy vocabulary, and the tokenizer."""
    tokenizer = replay.data.Tokenizer(str(replay.TOKENIZER))
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(GPT(GPTConfig(tokenizer.vocab_size, 64, 1, 2, 8)))
        torch.nn.init.normal_(models[-1].wte.weight, std=0.3)
    return *models, tokenizer


def test_the_kl_of_samples_is_unbiased(two_models):
    """The Rao-Blackwellised KL agrees with the samples' mean log pi - log pi_ref, and is 0 of itself."""
    policy, reference, tokenizer = two_models
    samples = replay.sample_reviews(policy, reference, tokenizer, 256, 3)
    _, prompts = replay.review_prompts(256, 3, tokenizer)
    tokens = policy.generate(prompts, 48, eos=tokenizer.eot, generator=torch.Generator().manual_seed(3))
    ratios = []
    with torch.no_grad():
        log_p, log_q = (m.logits(m(tokens[:, :-1])).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
                        for m in (policy, reference))
    for row, difference in zip(tokens, log_p - log_q, strict=True):
        ended = (row[5:] == tokenizer.eot).nonzero()
        last = int(ended[0]) + 1 if len(ended) else len(row) - 5
        ratios.append(difference[4:4 + last].sum().item())
    mean, se = replay.mean_se(ratios)
    assert samples["kl"][1] < se  # what the Rao-Blackwellisation is for
    assert abs(samples["kl"][0] - mean) < 4 * math.hypot(se, samples["kl"][1])
    assert replay.sample_reviews(policy, policy, tokenizer, 8, 3)["kl"] == [0.0, 0.0]


def test_credit_and_parts_sum_to_the_responses_log_ratio(two_models):
    """Sentences' log-ratios, and the three parts of a chosen answer, add up to those of whole responses."""
    policy, reference, tokenizer = two_models
    world = replay.World(pairs=4, preferred=4, held_out=6)
    pairs = replay.encoded(world)[2]
    got = replay.credit(policy, reference, pairs, tokenizer.eot)
    batch, logps, ref_logps = replay.token_logratios(policy, reference, [pairs[i] for i in range(6)])
    wanted = (logps - ref_logps)[batch.target != tokenizer.eot].sum().item()
    assert np.sum(got["sum"]) == pytest.approx(wanted, abs=1e-3)
    assert np.sum(got["count"]) == int(batch.segment_mask.sum())
    pairs = replay.encoded(replace(world, name="sums", edits=3))[2]
    parts = replay.parts_of_chosen(policy, reference, pairs)
    batch, logps, _ = replay.token_logratios(policy, reference, [pairs[i] for i in range(6)])
    chosen = logps[batch.response % 2 == 0].sum().item() / 6
    assert parts["policy"]["total"] == pytest.approx(chosen, abs=1e-4)
    assert parts["differing"] == pytest.approx(3 * 6 / sum(len(pairs[i].chosen) for i in range(6)))


@pytest.mark.parametrize("edits", [1, 6, "all"])
def test_rejected_sums_have_the_edits_that_were_asked_for(edits):
    """Equal sums at every edit distance, held-out sums unseen in training, and answers of equal length."""
    world = replay.World("sums", pairs=20, preferred=10, held_out=10, edits=edits)
    train, held_out = replay.raw_pairs(world)
    base = replay.raw_pairs(replace(world, edits=1))
    assert [p["chosen"] for p in train + held_out] == [p["chosen"] for p in base[0] + base[1]]
    assert not {p["prompt"] for p in train} & {p["prompt"] for p in held_out}
    for pair in train:
        differ = sum(a != b for a, b in zip(pair["chosen"], pair["rejected"], strict=True))
        assert differ == edits if edits != "all" else differ > 1


def test_the_unweighted_loss_starts_with_dpos_gradient():
    """-h/2 has DPO's value up to a constant and DPO's gradient where the policy is the reference."""
    logps = [torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    refs = [torch.zeros(3, dtype=torch.float64)] * 2
    for loss in (replay.unweighted_loss, replay.losses.dpo_loss):
        loss(*logps, *refs, beta=0.3).sum().backward()
        assert logps[0].grad.tolist() == [-0.15] * 3 and logps[1].grad.tolist() == [0.15] * 3
        logps[0].grad = logps[1].grad = None


def test_pairing_without_selection_is_eq_6_where_the_segments_are_sorted():
    """Chosen best first and rejected worst first: nothing to select. The other way round they differ."""
    ratios = [torch.tensor([r], dtype=torch.float64) for r in ([0.3, -0.2], [0.1, -0.4])]
    zeros, masks = [torch.zeros(1, 2, dtype=torch.float64)] * 2, [torch.ones(1, 2, dtype=torch.bool)] * 2
    rewards = [torch.tensor([r], dtype=torch.float64) for r in ([0.9, 0.4], [0.2, 0.6])]
    both = [loss(*ratios, *zeros, *rewards, *masks, beta=0.5)
            for loss in (replay.unselected_loss, replay.losses.dpo2d_loss)]
    torch.testing.assert_close(*both)
    rewards[0] = rewards[0].flip(-1)
    both = [loss(*ratios, *zeros, *rewards, *masks, beta=0.5)
            for loss in (replay.unselected_loss, replay.losses.dpo2d_loss)]
    assert (both[0] - both[1]).abs() > 1e-3


def test_reward_weighted_sft_weighs_by_the_exponential_of_the_true_reward():
    """Two segments of reward 1/2 and 1 are a true reward of 12: weight exp((12 - 16) / 2)."""
    logps, rewards = torch.tensor([[-1.0, -2.0]]).double(), torch.tensor([[0.5, 1.0]]).double()
    masks, nothing = [torch.ones(1, 2, dtype=torch.bool)] * 2, torch.zeros(1, 2).double()
    loss = replay.weighted_sft_loss(logps, nothing, rewards, nothing, *masks, beta=2.0)
    assert loss.item() == pytest.approx(3 * math.exp(-2))
    pair = replay.raw_pairs(replay.World(pairs=1, held_out=0))[0][0]
    scores = [np.mean(segment["scores"]) / 4 for segment in pair["chosen"]]
    text = pair["prompt"] + "".join(segment["text"] for segment in pair["chosen"])
    assert reviews.reward(text) == pytest.approx(16 * np.mean(scores))


def test_half_of_the_nouns_are_in_no_preference_pair():
    world = replay.World(pairs=60, preferred=60, held_out=10, half_of_nouns=True)
    tokenizer, pairs, _, margins = replay.encoded(world)
    nouns = {tokenizer.decode(pairs[i].prompt).split()[-1].rstrip(":") for i in range(len(pairs))}
    assert nouns and nouns <= set(replay.SEEN) and not set(replay.SEEN) & set(replay.UNSEEN)
    assert len(margins) == len(pairs)


def test_settings_hold_what_the_claims_need():
    """Five seeds, twelve checkpoints a run, and as many candidates for every loss on the frontier."""
    full = common.FULL
    assert len(full.seeds) >= 5 and len(full.run.checkpoints) == 13
    assert len({len(runs) for runs in frontier.frontier_runs(full, 0).values()}) == 1
    assert full.edits[0] == 1 and full.edits[-1] == "all"
