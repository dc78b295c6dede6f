"""Bug reports of other projects, tried on this one: rows and docstrings name them by their repository's short
name and number. tests/README.md lists them, those too that another file guards."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from test_pairs import pair, texts, write
from test_train import BYTES, RECORDS, load_records, model_a  # noqa: F401

import data
import train
from plumbing import flags
from plumbing.vocab import EOT
from tools import convert

WORDS = data.Tokenizer(flags.TOY[2])
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
ODD = "a\u2028b\u2029c\x85d\x7fe"  # where str.splitlines cuts, and JSON has no line's end
FINE = json.dumps(pair()) + "\n"


def ranking(scores):
    return f'{{"prompt": "Q", "responses": ["a", "b"], "scores": [{scores}]}}\n'


@pytest.mark.parametrize("report, name, content, expected", [
    ("jsonlines-53", "u2028.jsonl", json.dumps(pair(chosen=ODD), ensure_ascii=False), ("Q", ODD, "bad")),
    ("jsonlines-53 in a table", "u2028.csv", f"prompt,chosen,rejected\nQ,{ODD},bad\n", ("Q", ODD, "bad")),
    ("openai-cookbook-648: encodings", "utf8.jsonl", FINE.replace("good", "“güt”"), ("Q", "“güt”", "bad")),
    ("trl-1858: cut at the first turn", "hh.jsonl", json.dumps({"chosen": HH + " d", "rejected": HH + " e"}),
     (HH, " d", " e")),
    ("DeepSeek-R1-151, LlamaFactory-370", "eot.jsonl", FINE.replace("Q", EOT), (EOT, "good", "bad")),
    ("trl-6357: a token of id 0", "nul.jsonl", FINE.replace("good", r"\u0000"), ("Q", "\0", "bad")),
    ("asi-1938", "twice.jsonl", '{"prompt": "", "prompt": ""}', ':1: not JSON (the key "prompt" tw'),
    ("asi-1938 in a table", "twice.csv", "prompt,chosen,chosen\nQ,a,b\n", 'the column "chosen" twice'),
    ("Soup-547: NaN wins", "nan.jsonl", ranking("NaN, 1"), '"scores[0]" must be a number'),
    ("Soup-547 digits", "digits.jsonl", ranking("1" + 5000 * "0" + ", 1"), "not JSON"),
    ("UTF-16, as PowerShell writes", "utf16.jsonl", FINE.encode("utf-16"), "utf16.jsonl:1: not UTF-8"),
    ("old Mac line ends", "cr.jsonl", 2 * FINE.replace("\n", "\r"), "cr.jsonl:1: not JSON (Extra data"),
    ("OpenRLHF-367, marin-2381: train and test", "train.jsonl", FINE, "a folder of 2 data files"),
], ids=lambda x: x.split()[0] if isinstance(x, str) and x[:1] not in "{[\n" else "")
def test_files_are_read_as_meant_or_refused_by_name(report, name, content, expected, tmp_path, capsys):
    file, out = tmp_path / name, tmp_path / "out.txt.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if "folder" in str(expected):
        (tmp_path / "test.jsonl").write_bytes(file.read_bytes())
        file = tmp_path
    status = convert.main([str(file), "--out", str(out)])
    if isinstance(expected, str):
        error = capsys.readouterr().err
        assert status == 2 and str(file) in error and expected in error and not out.exists()
    else:
        assert texts(data.load([out], BYTES, 256)[0]) == [expected]


def test_held_out_pairs_that_are_trained_on_are_counted(tmp_path, capsys):
    """OpenRLHF-1089: the evaluation was on the training data, and nothing said so."""
    names = [str(write(tmp_path / f"{len(part)}.jsonl", *part)) for part in (RECORDS, RECORDS[2:5])]
    flags.load_data(train.Config(data=(names[0],), val_data=(names[1],), block_size=64), BYTES)
    assert "3 of 3 held-out pairs are training pairs too" in capsys.readouterr().out


def test_a_response_has_its_tokens_whatever_the_prompt_ends_in():
    """trl-2054: tokenised as one text with its prompt, an answer changes with the space before it."""
    sides = [("The lamp works.", None)], [("It broke.", None)]
    answers = {tuple(map(tuple, (p.chosen, p.rejected))) for p in (
        data.encode_pair(WORDS, prompt, *sides, 64) for prompt in ("Review:", "Review: ", "Review:\n"))}
    assert answers == {tuple((*WORDS.encode(side[0][0]), WORDS.eot) for side in sides)}


@pytest.mark.parametrize("prompt, chosen, rejected", [(90, 5, 5), (90, 5, 40), (90, 40, 5), (10, 59, 3)])
def test_of_a_text_too_long_the_prompts_beginning_goes_and_no_more(prompt, chosen, rejected):
    """trl-2209 (prompts cut more than needed), trl-3398 (a response left without a token), LlamaFactory-4402
    (the limit held for the chosen response only), LlamaFactory-5231 (end-of-text cut off)."""
    text = bytes(range(32, 32 + prompt)).decode()
    p = data.encode_pair(BYTES, text, [("c" * chosen, None)], [("r" * rejected, None)], 64)
    assert texts([p]) == [(text[-(63 - max(chosen, rejected)):], "c" * chosen, "r" * rejected)]


def test_a_pair_that_cannot_be_used_is_in_no_mean_and_lengths_are_those_of_the_selected_pairs(tmp_path):
    """NeMo-RL-180 (samples too long entered the mean as log 2), axolotl-2332 (lengths of the table before a
    filter)."""
    long, empty = (pair(chosen=text) for text in ("x" * 100, ""))
    with_them, without = (load_records(records, tmp_path) for records in ([long, *RECORDS, empty], RECORDS))
    assert texts(with_them) == texts(without) and len(with_them) == len(RECORDS)
    some = with_them.select([6, 1, 3])
    assert some.lengths.tolist() == [len(with_them[i]) for i in (6, 1, 3)]


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


def test_a_run_may_have_one_pair_and_one_held_out(tmp_path, model_a):  # noqa: F811
    """direct-preference-optimization-17: fewer evaluation samples than a batch of them was an error."""
    file = str(write(tmp_path / "two.jsonl", *RECORDS[:2]))
    train.main(f"--init {model_a} --data {file} --out_dir {tmp_path / 'run'} --steps 1 --device cpu".split())
    head = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert (head["pairs"], head["held_out"]) == (1, 1)


def test_data_are_read_in_a_process_without_a_terminal(tmp_path, monkeypatch):
    """tqdm-1654: Python's pythonw, or 2>&-, has no sys.stderr, and the progress bar was an error."""
    monkeypatch.setattr(sys, "stderr", None)
    assert len(load_records(RECORDS, tmp_path)) == len(RECORDS)
