"""experiments/real_model.py: runs on a tiny random model, kept ones, the page of the committed numbers."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import common  # noqa: E402
import real_model  # noqa: E402

from data import Tokenizer  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

TINY = real_model.Setting(longest=64, held_out=2, seeds=(0,), batch_size=4, lr=1e-2,
                          steps={"math": 2, "fine-grained": 2})

@pytest.mark.slow
def test_runs_are_measured_kept_and_reported(tmp_path, capsys):
    """Each run starts at the reference and moves; the second call runs nothing and gives the same."""
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = Tokenizer("bytes")
    GPT(GPTConfig(tokenizer.vocab_size, 128, 1, 2, 16)).save_pretrained(tmp_path / "model", tokenizer.eot)
    tokenizer.save(tmp_path / "model")
    sides = {"chosen": [{"text": "Yes,", "scores": [4, 3]}, {"text": " so.", "scores": [1, 0]}],
             "rejected": [{"text": "No.", "scores": [1, 0]}]}
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Question {i}?"} | sides) + "\n" for i in range(24)))
    files = dict.fromkeys(("math", "fine-grained"), str(tmp_path / "pairs.jsonl"))

    def run():
        return real_model.run(str(tmp_path / "model"), files, TINY, tmp_path / "store")
    found = run()
    assert [(r["data"], r["loss"]) for r in found["runs"]] == [
        (name, loss) for name in files for loss in real_model.LOSSES_OF[name]]
    for r in found["runs"]:
        assert [x["step"] for x in r["records"]] == [0, 1, 2] and r["pairs"] == [24, 22, 2]
        assert r["records"][0]["logratio/chosen"] == 0 and r["records"][-1]["logratio/chosen"] != 0
        assert r["records"][0]["rewards/accuracies"] == 0.5 and 0 <= r["records"][0]["answer"] <= 48
    files_then = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    assert run()["runs"] == found["runs"]
    assert files_then == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").iterdir()}
    tables = real_model.tables(found)
    assert [len(table["rows"]) for table in tables] == [4, 2, 6]
    assert tables[0]["rows"][0][1] == f"{found['runs'][0]['records'][-1]['logratio/chosen']:.2f}"
    real_model.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000

def test_the_page_has_the_numbers_of_the_committed_runs():
    results = ROOT / "experiments" / "results"
    summary = json.loads((results / "real_model.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(real_model.tables(summary))) == summary["tables"]
    assert all(summary["made"][name] == value for name, value in json.loads(
        json.dumps(asdict(real_model.Setting()))).items())
    page = (ROOT / "experiments" / "real_model.md").read_text(encoding="utf-8")
    assert common.with_tables(page, results) == page

def test_files_that_are_missing_are_one_line(capsys):
    for words in (["math"], ["maths=pairs.jsonl"], ["math=pairs.jsonl"]):
        with pytest.raises(SystemExit) as status:
            real_model.main(words)
        assert status.value.code == 2 and "error: needed is NAME=FILE for each" in capsys.readouterr().err
