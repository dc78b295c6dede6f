"""experiments/: runs are trained, kept and measured; every claim makes tables and verdicts of its numbers;
README's numbers are the JSON's; what the claims compute by themselves (Eq. 4, intervals, p, KL) is right."""

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
import numerics  # noqa: E402
import optima  # noqa: E402
import replay  # noqa: E402
import weight  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402

pytestmark = pytest.mark.slow  # training: seconds

RESULTS = ROOT / "experiments" / "results"

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder that `python experiments/weight.py` leaves, on a model of 8 channels and 4 steps."""
    out = tmp_path_factory.mktemp("claims")
    flags = ["--tiny", "--out", str(out), "--store", str(out / "runs")]
    common.main([weight], flags)
    return out, flags

def test_finished_runs_are_taken_from_the_store(tiny, capsys):
    """A second call of one claim trains nothing and gives the same numbers, tables and figure."""
    out, flags = tiny
    before = (out / "results" / "weight.json").read_text()
    common.main([weight], flags)
    assert "4 of them from the store" in capsys.readouterr().out  # 3 runs and their reference
    before, after = json.loads(before), json.loads((out / "results" / "weight.json").read_text())
    assert {"commit", "hardware", "cpu_s", "seeds", "command"} <= after.pop("made").keys()
    assert after == {name: x for name, x in before.items() if name != "made"}
    assert (out / "figures" / "weight.png").read_bytes().startswith(b"\x89PNG")

@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.NAME)
def test_a_claim_makes_tables_and_verdicts_of_its_runs(tiny, claim):
    """From a real record of each world, handed out for all runs of two seeds: whole tables, known names."""
    setting, store = replace(common.TINY, seeds=(0, 1)), str(tiny[0] / "runs")
    records = {world.name: replay.replay(replace(run, world=world, steps=0, checkpoints=(0,)), store)
               for world, run in ((setting.reviews, setting.run), (setting.sums, setting.sums_run))}

    def result(run):
        if not isinstance(run, common.Run):
            return {"rewards": [8.0, 9.0, 10.0] * 9}
        record = records[run.world.name]["checkpoints"][0]
        if "samples" in record:
            record["samples"]["kl"] = [0.1, 0.01]
        return {"checkpoints": [record | {"step": step} for step in run.checkpoints],
                "weights": [{"all": [1.0, 2], "label_false": [0.5, 1], "label_true": [0.5, 1]}] * run.steps}

    results = {run: result(run) for run in claim.runs(setting)}
    numbers = json.loads(json.dumps(claim.measure(setting, results)))
    said = claim.report(setting, numbers)
    assert said["tables"] and all(t["rows"] and t["title"] for t in said["tables"])
    for t in said["tables"]:
        assert {len(row) for row in t["rows"]} == {len(t["columns"])}
    assert all(row["claim"] and row["seen"] for row in said.get("verdicts", ()))

def test_the_numbers_of_the_readme_are_those_of_the_json_files():
    """Every number stands in a block that --tables writes, and it would write nothing else: tables and
    verdicts are those of the numbers. The learning rate that is used is named beside the best one."""
    text = (ROOT / "experiments" / "README.md").read_text()
    assert common.with_tables(text, RESULTS) == text
    for claim in claims.CLAIMS:
        assert f"<!-- tables {claim.NAME} -->\n*" in text and f"figures/{claim.NAME}.png" in text
        found = json.loads((RESULTS / f"{claim.NAME}.json").read_text())
        said = json.loads(json.dumps(claim.report(common.FULL, found), default=float))
        assert {name: found[name] for name in said} == said and found["made"]["seeds"] == 5
    choose = json.loads((RESULTS / "choose.json").read_text())["tables"][0]["title"]
    assert f"the least loss is at 0.0003, the runs use {common.FULL.run.lr:g}; sums:" in choose
    for name in ("numerics", "optima", "bfloat16"):
        assert f"<!-- tables {name} -->\n*" in text

def test_the_paired_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), Student's t of 2 degrees of freedom 4.303."""
    mean, half = common.mean_and_half([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert common.versus([11, 22, 33], [10, 20, 30]) == "+2.00 ± 2.48, p 0.074"
    assert common.versus([1, None, 3], [2, 0, 4]) == "-1.00 ± 0.00"
    assert common.versus([1.5], [1.0]) == "+0.50"
    assert common.cell([1.0, None]) == "1.00 (1 of 2 seeds)"
    # t is the 97.5 % quantile: p is 0.05, for every number of seeds
    for n, t in enumerate(common.T, 2):
        d = np.array([1.0] + [-1.0 / (n - 1)] * (n - 1))
        assert common.p_value(d + t * d.std(ddof=1) / math.sqrt(n)) == pytest.approx(0.05, abs=1e-4)

def test_bonferroni_says_how_many_comparisons_there_are_and_which_survive():
    """Two comparisons below 0.05 of three, one of them below 0.05 / 3."""
    rows = [{"claim": name, "seen": {"x": {"text": "…", "p": p}}} for name, p in zip("ABC", (0.01, 0.04, 0.5),
                                                                                     strict=True)]
    assert "Of 3 comparisons 2 have p < 0.05; Bonferroni asks for p < 0.017, and 1 survive:** A (x)." \
        in common.verdicts(rows)

def test_rounding_is_within_its_bounds():
    """Sums in float64 and ties by gaps against what was before, on small sizes."""
    sums = replay.losses.segment_sum, numerics.float32_sum
    exact, before = (numerics.sum_error(f, 512, 5)[1] for f in sums)
    assert exact < 1e-9 < 1e-5 < before
    for name, knobs in (("dpo", {"beta": 0.1}), ("dpop", {"beta": 0.3, "lam": 5.0})):
        assert numerics.gradient_error(name, replay.losses.segment_sum, 64, 2, **knobs) < 2e-5
    for dtype in (torch.float32, torch.float64):
        assert numerics.ties(replay.losses.ascending, dtype, 60) == (0, numerics.ties(
            numerics.grid_ascending, dtype, 60)[1])

def test_optima_draws_the_policies_of_the_sixth_identity():
    """TDPO1's is pi_ref e^(Q_ref / beta): beta log pi(y)/pi_ref(y) = r(y) - V_ref - beta sum_t KL_t."""
    world = reference, p, r, q = optima.random_world(3)
    ratio = 0.7 * np.log(optima.optima(*world, 0.7)[1] / p)
    kl = {c: np.log(reference[c] @ np.exp(q[c] / 0.7)) - reference[c] @ q[c] / 0.7 for c in reference}
    seq_kl = np.array([sum(kl[y[:t]] for t in range(len(y))) for y in optima.responses()])
    np.testing.assert_allclose(ratio, r - p @ r - 0.7 * seq_kl, atol=1e-12)

def test_the_best_within_a_budget_has_no_bias_of_a_maximum():
    """Candidates that differ by noise alone: the maximum is far too high, the cross-fitted best is not."""
    rng, found, naive = np.random.default_rng(0), [], []
    for _ in range(400):
        points = [{"halves": [[rng.normal(), 0.1], [rng.normal(), 0.1]]} for _ in range(24)]
        points.append({"halves": [[99.0, 5.0], [99.0, 5.0]]})  # beyond the budget
        found.append(frontier.best_within(points, 1.0))
        naive.append(max(p["halves"][0][0] for p in points[:-1]))
    assert abs(np.mean(found)) < 0.15 and np.mean(naive) > 1.5

def test_the_reweighted_curve_is_equation_4():
    """On rewards 0 and 1, equally often, Eq. 4 has reward sigma(1/beta), and KL is that of two Bernoullis."""
    points = frontier.reweighted([0.0, 1.0] * 500, least_ess=100)
    for p in points:
        q = 1 / (1 + math.exp(-1 / p["beta"]))
        assert p["reward"] == pytest.approx(q, abs=1e-9)
        kl = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q) + 1e-300)
        assert p["kl"] == pytest.approx(kl, abs=1e-6)

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
