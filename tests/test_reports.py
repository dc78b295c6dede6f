"""Bug reports of other projects, tried on this one.

tests/README.md lists them, those too that another file guards. A report is named by its repository's short
name and its number there.
"""

import dataclasses
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import BYTES, RECORDS, load_records, make, make_records, model_a, run, small, write_lines  # noqa: F401

import data
import train
from losses import LOSSES, knobs_of
from model import GPT
from plumbing import checkpoints, flags, formats
from plumbing.vocab import EOT

ROOT = Path(__file__).resolve().parents[1]
WORDS = data.Tokenizer(flags.TOY[2])


def text_of(pair):
    return [BYTES.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)]


# ---------------------------------------------------------------------------------------------------------
# Files

FINE = '{"prompt": "Q", "chosen": "good", "rejected": "bad"}\n'
SHARED = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
ODD = "a\u2028b\u2029c\x85d\x7fe"  # where str.splitlines cuts, and JSON has no line's end


def ranking(scores):
    return f'{{"prompt": "Q", "responses": ["a", "b"], "scores": [{scores}]}}\n'


@pytest.mark.parametrize("report, name, content, expected", [
    ("jsonlines-53", "u2028.jsonl", json.dumps(json.loads(FINE) | {"chosen": ODD}, ensure_ascii=False),
     ["Q", ODD + EOT, "bad" + EOT]),
    ("jsonlines-53 in a table", "u2028.csv", f"prompt,chosen,rejected\nQ,{ODD},bad\n",
     ["Q", ODD + EOT, "bad" + EOT]),
    ("openai-cookbook-648", "latin.jsonl", FINE.replace("good", "“güt”"), ["Q", "“güt”" + EOT, "bad" + EOT]),
    ("trl-1858", "hh.jsonl", json.dumps({"chosen": SHARED + " d", "rejected": SHARED + " e"}),
     [SHARED, " d" + EOT, " e" + EOT]),
    ("DeepSeek-R1-151", "eot.jsonl", FINE.replace("Q", EOT + "Q"), [EOT + "Q", "good" + EOT, "bad" + EOT]),
    ("trl-6357", "nul.jsonl", FINE.replace("good", r"\u0000").replace("bad", r"b\u0000"),
     ["Q", "\0" + EOT, "b\0" + EOT]),
    ("asi-1938", "twice.jsonl", FINE.replace('"rejected"', '"chosen": "other", "rejected"'),
     'twice.jsonl:1: not JSON (the key "chosen" twice)'),
    ("asi-1938 in a table", "twice.csv", "prompt,chosen,rejected,chosen\nQ,a,b,c\n",
     'the column "chosen" twice'),
    ("a question beside messages", "lost.jsonl", json.dumps({"question": "Q"} | {
        side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}),
     "no turn stands before the responses"),
    ("Soup-547", "nan.jsonl", ranking("NaN, 1"), '"scores[0]" must be a number'),
    ("Soup-547 infinity", "inf.jsonl", ranking("1, 1e999"), '"scores[1]" must be a number'),
    ("Soup-547 digits", "digits.jsonl", ranking("1" + 5000 * "0" + ", 1"), "not JSON"),
    ("Soup-547 segments", "segments.jsonl", FINE.replace('"good"', '[{"text": "a", "scores": [NaN]}]'),
     "needs a list of finite numbers"),
    ("UTF-16, as PowerShell writes", "utf16.jsonl", FINE.encode("utf-16"), "utf16.jsonl:1: not UTF-8"),
    ("old Mac line ends", "cr.jsonl", 2 * FINE.replace("\n", "\r"), "cr.jsonl:1: not JSON (Extra data"),
    ("trailing commas", "comma.json", f"[{FINE},]", "comma.json: not JSON"),
], ids=lambda x: x.split()[0] if isinstance(x, str) and x[:1] not in "{[" else "")
def test_files(report, name, content, expected, tmp_path):
    """Read as what is meant, or refused in a line that names the place."""
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(expected, list):
        read, _ = data.load([file], BYTES, 256)
        assert [text_of(read[i]) for i in range(len(read))] == [expected]
        return
    with pytest.raises(data.DataError) as error:
        data.load([file], BYTES, 256)
    assert str(file) in str(error.value) and expected in str(error.value)


def test_hidden_files_of_a_folder_are_no_data(tmp_path):
    """datasets-4115: what an editor or macOS keeps beside the data was read too, and doubled it."""
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("a.jsonl", "._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl"):
        (tmp_path / name).write_text(FINE)
    assert formats.list_files([tmp_path]) == [tmp_path / "a.jsonl"]
    assert formats.list_files([tmp_path / "._a.jsonl"])  # asked for by its name


def test_a_run_and_what_datasets_keeps_in_a_folder_of_data_are_no_data(tmp_path):
    """A run's log.jsonl, the cache of datasets' map; a name with the words of both splits is none."""
    for name in ("train-test-split.jsonl", "run/log.jsonl", "run/run.json", "cache-1a2b.arrow"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(FINE)
    assert formats.list_files([tmp_path]) == [tmp_path / "train-test-split.jsonl"]


@pytest.mark.parametrize("names", [
    ("train.jsonl", "test.jsonl"), ("train_prefs.jsonl.gz", "test_prefs.jsonl.gz"),
    ("b/train-0000.jsonl", "b/validation-0000.jsonl"), ("b/train/0.jsonl", "b/test/0.jsonl"),
    ("train.json", "test.json"), ("training.jsonl", "held_out.jsonl")])
def test_a_folder_of_training_and_test_data_is_not_trained_on_as_one(names, tmp_path):
    """OpenRLHF-367, marin-2381: both became training data."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(FINE)
    with pytest.raises(data.DataError, match=f"{Path(names[0]).name}.*{Path(names[1]).name}.*--val_data"):
        formats.list_files([tmp_path])


def test_held_out_pairs_that_are_trained_on_are_counted(tmp_path, capsys):
    """OpenRLHF-1089: the evaluation was on the training data, and nothing said so."""
    files = [write_lines(tmp_path / f"{len(part)}.jsonl", part) for part in (RECORDS, RECORDS[2:5])]
    flags.load_data(train.Config(data=(files[0],), val_data=(files[1],), block_size=64), BYTES)
    assert "3 of 3 held-out pairs are training pairs too" in capsys.readouterr().out


def test_a_response_has_its_tokens_whatever_the_prompt_ends_in():
    """trl-2054: tokenised as one text with its prompt, an answer changes with the space before it."""
    answers = {tuple(map(tuple, (p.chosen, p.rejected))) for p in (
        data.encode_pair(WORDS, prompt, [("The lamp works.", None)], [("It broke.", None)], 64)
        for prompt in ("Review:", "Review: ", "Review:\n", "Review: The l"))}
    assert answers == {(*[(*WORDS.encode(text), WORDS.eot) for text in ("The lamp works.", "It broke.")],)}


@pytest.mark.parametrize("prompt, chosen, rejected", [(90, 5, 5), (90, 5, 40), (90, 40, 5), (10, 59, 3)])
def test_of_a_text_too_long_the_prompts_beginning_goes_and_no_more(prompt, chosen, rejected):
    """trl-2209 (prompts cut more than needed), trl-3398 (a response left without a token), LlamaFactory-4402
    (the limit held for the chosen response only), LlamaFactory-5231 (end-of-text cut off)."""
    text = bytes(range(32, 32 + prompt)).decode()
    p = data.encode_pair(BYTES, text, [("c" * chosen, None)], [("r" * rejected, None)], 64)
    assert text_of(p) == [text[-(63 - max(chosen, rejected)):], "c" * chosen + EOT, "r" * rejected + EOT]


def test_a_pair_that_cannot_be_used_is_in_no_mean(tmp_path):
    """NeMo-RL-180: samples too long were masked and entered the mean as log 2."""
    long, empty = ({"prompt": "Q", "chosen": text, "rejected": "b"} for text in ("x" * 100, ""))
    with_them, without = (load_records(records, tmp_path) for records in ([long, *RECORDS, empty], RECORDS))
    assert np.array_equal(with_them.ids, without.ids) and len(with_them) == len(RECORDS)


def test_lengths_are_those_of_the_selected_pairs(tmp_path):
    """axolotl-2332: after a filter, rows were packed by the lengths of the table before it."""
    index = [6, 1, 3]
    some = load_records(RECORDS, tmp_path).select(index)
    assert some.lengths.tolist() == [len(some[i]) for i in range(3)]
    held = data.hold_out(some)[1]
    assert held.lengths.tolist() == [len(held[i]) for i in range(len(held))]


# ---------------------------------------------------------------------------------------------------------
# Batches and steps


def test_padding_is_known_by_its_place_and_not_by_an_id(tmp_path):
    """trl-6357 (a token of the padding's id, end-of-text for one, was taken for padding), trl-6819 (padded
    rows were scored at other positions): a pair has its numbers alone and beside a longer one."""
    records = [{"prompt": "Q", "chosen": "\0\0", "rejected": "\0"}, *make_records(2)]
    x = make("dpo", load_records(records, tmp_path))
    both = [train.step(x.policy, x.reference, data.collate([x.pairs[i] for i in index]), x.loss, None, x.cfg)
            for index in ([0], [0, 1, 2])]
    batch = data.collate([x.pairs[0], x.pairs[1]])
    assert batch.target[:5].tolist() == [0, 0, BYTES.eot, 0, BYTES.eot]
    for name, alone in both[0].items():
        assert both[1][name][:1] == pytest.approx(alone, rel=1e-12), name


@pytest.mark.parametrize("size", [1, 3, 7])
def test_an_evaluation_is_a_mean_over_pairs(size, tmp_path):
    """transformers-41898: the mean of the batches' means, though the last one is smaller. 7 pairs here."""
    found = []
    for n in (size, 100):
        x = make("tdpo2", load_records(make_records(7), tmp_path), micro_batch_size=n)
        found.append(train.evaluate(x.policy, x.reference, x.pairs, x.cfg))
    assert found[0] == pytest.approx(found[1], rel=1e-10)


def test_what_a_step_returns_holds_no_graph(tmp_path):
    """prime-rl-909: a loss that is added up for the log keeps the graphs of all micro-batches in memory."""
    x = make("tdpo1", load_records(RECORDS, tmp_path))
    rows = train.step(x.policy, x.reference, data.collate([x.pairs[0]]), x.loss, 1.0, x.cfg)
    assert not any(row.requires_grad for row in rows.values())
    assert all(p.grad is None for p in x.model.parameters())


def test_a_model_in_training_mode_computes_what_it_computes_in_evaluation(tmp_path):
    """trl-744, LlamaFactory-10779: dropout made policy and reference differ at the start. There is none,
    though a configuration of transformers has rates."""
    small(0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rates = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config | rates))
    model, tokens = GPT.from_pretrained(tmp_path), torch.arange(20)[None]
    assert torch.equal(model.train()(tokens), model.eval()(tokens))


def test_every_epoch_reads_every_pair_once_in_another_order_whatever_else_draws_random_numbers():
    """trl-998 (the last, incomplete batch was never read), trl-2337 (one order for all epochs),
    ms-swift-10050 (a resumed run read the first one's again), trl-7083 (a pass over the data changed it)."""
    def steps(numbers):
        for draw in (random.seed, np.random.seed, torch.manual_seed):
            draw(int(numbers[0]))
        data.permutation.cache_clear()
        return np.concatenate([data.step_indices(10, 4, 1, i) for i in numbers])

    order = steps(range(10))
    epochs = order.reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all() and len({tuple(epoch) for epoch in epochs}) == 4
    assert (steps(range(7, 10)) == order[28:]).all()


# ---------------------------------------------------------------------------------------------------------
# Runs


def test_the_reference_is_as_it_was_after_training(model_a, tmp_path):  # noqa: F811
    """POVID-11 (the reference was the policy), trl-6443 (after training, the trained policy was asked)."""
    before = (Path(model_a) / "model.safetensors").read_bytes()
    *_, lines, evals = run(tmp_path, init=model_a, steps=4, lr=1e-2, warmup_steps=0, dtype="float64")
    first, last = ({side: line[f"eval/logps/{side}"] - line[f"eval/logratio/{side}"]
                    for side in ("chosen", "rejected")} for line in (evals[0], evals[-1]))
    assert first == pytest.approx(last, rel=1e-12) and abs(evals[-1]["eval/logratio/rejected"]) > 0.1
    assert lines[-1]["rewards/margins"] != 0 and (Path(model_a) / "model.safetensors").read_bytes() == before


def test_a_run_may_have_fewer_pairs_than_a_batch_and_hold_out_one(model_a, tmp_path):  # noqa: F811
    """direct-preference-optimization-17: fewer evaluation samples than a batch of them was an error."""
    file = write_lines(tmp_path / "two.jsonl", RECORDS[:2])
    *_, head, lines, evals = run(tmp_path, init=model_a, data=file, val_data=None, batch_size=5)
    assert (head["pairs"], head["held_out"]) == (1, 1) and len(lines) == 1 and len(evals) == 2


def test_a_process_without_a_terminal_trains(model_a, tmp_path, monkeypatch):  # noqa: F811
    """tqdm-1654: Python's pythonw, or 2>&-, has no sys.stderr, and the progress bar was an error."""
    monkeypatch.setattr(sys, "stderr", None)
    assert run(tmp_path, init=model_a)[0]["loss"]
    sys.stderr.close()


@pytest.mark.parametrize("flag", ["--compile False", "--resume True", "--pack 0"])
def test_a_value_after_a_switch_is_refused(flag, capsys):
    """mace-429: --pin_memory=False was read as the text "False", which is true."""
    with pytest.raises(SystemExit) as stop:
        train.main(flag.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and flag.split()[1] in error


def test_every_flag_is_read():
    """open-instruct-1868: a flag was in the configuration and in its hash, and nothing applied it."""
    files = [ROOT / "train.py", *ROOT.glob("plumbing/*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    knobs = {name for loss in LOSSES.values() for name in knobs_of(loss)}
    unread = [field.name for field in dataclasses.fields(train.Config)
              if field.name not in knobs and not re.search(rf"cfg\.{field.name}\b", source)]
    assert not unread


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    """transformers-27138: names in the order of text; step 10000 was deleted and step 9900 kept."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1)).backward()
    optimizer.step()
    for step in (9, 10, 99, 100, 9999, 10000):
        checkpoints.save(tmp_path, step, model, optimizer, {}, {})
    assert sorted(int(path.stem[5:]) for path in tmp_path.glob("checkpoints/*.json")) == [9999, 10000]
    assert checkpoints.load(tmp_path, model, optimizer, {})["step"] == 10000


def test_the_tests_that_the_page_names_exist():
    """tests/README.md: each once, in the file that its row names."""
    rows = (ROOT / "tests" / "README.md").read_text(encoding="utf-8").splitlines()
    for row in rows:
        for tests, file in re.findall(r"((?:`test_\w+`(?:, )?)+)(?: in (test_\w+\.py))?", row):
            source = (ROOT / "tests" / (file or "test_reports.py")).read_text(encoding="utf-8")
            for name in re.findall(r"`(\w+)`", tests):
                assert source.count(f"def {name}(") == 1, name
