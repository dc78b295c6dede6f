"""experiments/gpu.py runs: every check on the CPU, at its smallest, and what a failing one looks like."""

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
import gpu  # noqa: E402

pytestmark = pytest.mark.slow  # models, processes

DRY = argparse.Namespace(dry_run=True, device="cpu", part="correctness")
ELSEWHERE = ["default run", "five steps", "one rank"]  # runs of train.py that other tests make; see below


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", [name for name in gpu.PARTS["correctness"] if name not in ELSEWHERE])
def test_the_checks_of_correctness_hold_on_a_cpu(name):
    function, arguments, _ = gpu.PARTS["correctness"][name]
    results = function(DRY, **arguments)
    assert results and all(r.get("holds", True) for r in results), results


@pytest.mark.parametrize("part, name", [
    ("speed", "small, 64 pairs"), ("speed", "padding"), ("size", "XL"), ("size", "200 steps"),
    ("size", "chunks of 2^27 logits")])
def test_the_measurements_run(part, name):
    function, arguments, _ = gpu.PARTS[part][name]
    results = {r["what"]: r["value"] for r in function(DRY, **arguments)}
    assert all(value >= 0 or value != value for value in results.values()) and len(results) > 1


def test_a_wrong_gradient_and_an_infinite_one_are_found():
    import torch
    exact = torch.arange(1.0, 9.0), torch.ones(2)
    assert all(r["holds"] for r in gpu.compare("", exact, exact, gpu.FLOAT32))
    found = exact[0].clone()
    found[0] += 0.1
    held = [r["holds"] for r in gpu.compare("", (found, exact[1]), exact, gpu.FLOAT32)]
    assert held == [False, False, True]
    assert gpu.worst([exact[0] / 0], [exact[0]]) == float("inf")


def test_each_check_is_a_process_whose_end_is_recorded(monkeypatch, tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    words = ["--part", "correctness", "--dry-run", "--out", str(out), "--only", "one rank", "cuts"]
    monkeypatch.setitem(gpu.PARTS["correctness"], "cuts", (gpu.cuts, {}, 0.01))
    assert gpu.main(words) == 1
    first, last = map(json.loads, out.read_text().splitlines())
    assert len(first["results"]) == 3 and last["error"] == "took longer than 0.01 s"
    assert "| cuts | took longer than 0.01 s | | | **fails** |" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "run", lambda o, name: last)
    assert gpu.main([*words, "--no-assert"]) == 0
