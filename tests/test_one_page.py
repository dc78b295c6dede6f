"""ports/one_page.py is the same mathematics as train.py, on a page."""

import json
from pathlib import Path

import pytest
import torch

import train
from model import GPT, GPTConfig
from ports import one_page

pytestmark = pytest.mark.slow

RECORDS = (one_page.TOY / "reviews-train.jsonl").read_text().splitlines()[:8]

@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights that both read, the records, and one pair to evaluate on."""
    folder = tmp_path_factory.mktemp("one_page")
    torch.manual_seed(0)
    model = GPT(GPTConfig(one_page.EOT + 1, 256, 2, 2, 16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder / "start")
    (folder / "pairs.jsonl").write_text("\n".join(RECORDS) + "\n")
    (folder / "one.jsonl").write_text(RECORDS[0] + "\n")
    return folder, model.double().state_dict()

@pytest.mark.parametrize("name", one_page.LOSSES)
def test_ten_steps_have_the_losses_of_train(name, start, monkeypatch):
    """The same weights, pairs and AdamW: train.step's loss at each of ten steps, to 1e-6, in float64."""
    folder, weights = start
    monkeypatch.setattr(train.report, "answers_and_next", lambda *_: None)
    train.main(["--loss", name, "--init", f"{folder}/start", "--out_dir", f"{folder}/{name}", "--steps", "10",
                "--data", f"{folder}/pairs.jsonl", "--val_data", f"{folder}/one.jsonl", "--tokenizer",
                str(one_page.TOY / "toy.tiktoken"), "--batch_size", "8", "--lr", "1e-2", "--warmup_steps",
                "0", "--log_every", "1", "--eval_every", "0", "--device", "cpu", "--dtype", "float64"])
    logged = map(json.loads, (folder / name / "log.jsonl").read_text().splitlines())
    expected = [line["loss"] for line in logged if "loss" in line]

    policy, reference = (one_page.GPT(layers=2, H=2, D=16).double() for _ in range(2))
    policy.load_state_dict(weights)
    reference.requires_grad_(False).load_state_dict(weights)
    found = [loss for _, loss in one_page.train(
        policy, lambda b: one_page.LOSSES[name](one_page.compare(policy, reference, b)).mean(),
        [one_page.row(json.loads(line)) for line in RECORDS], steps=10, lr=1e-2)]
    assert found == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.05  # something was learned, so the steps are compared too

def test_a_token_belongs_to_the_segment_of_its_last_byte():
    parts = [{"text": "ab", "scores": [0, 4]}, {"text": "b", "scores": [4, 4]}]
    assert one_page.encode(parts) == ([*b"abb", one_page.EOT], [0, 0, 1, 1], [0.5, 1.0])

def test_it_fits_on_its_page_and_imports_nothing_of_ours():
    lines = Path(one_page.__file__).read_text().splitlines()
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert len(lines) <= 160 and imported <= {"argparse", "base64", "copy", "json", "pathlib", "types",
                                              "tiktoken", "tiktoken_ext", "torch"}
