"""Bug reports of other projects, tried on this one: rows and docstrings name them by their repository's short
name and number. tests/README.md lists them, those too that another file guards."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from test_pairs import pair, texts, write
from test_train import BYTES, RECORDS, load_records, make, make_records, model_a  # noqa: F401

import data
import train
from plumbing import flags

WORDS = data.Tokenizer(flags.TOY[2])

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

def test_padding_is_known_by_its_place_and_not_by_an_id(tmp_path):
    """trl-6357 (a token of the padding's id, end-of-text for one, was taken for padding), trl-6819 (padded
    rows were scored at other positions): a pair has its numbers alone and beside a longer one."""
    x = make("dpo", load_records([pair(chosen="\0\0", rejected="\0"), *make_records(2)], tmp_path))
    one, three = (train.step(x.policy, x.reference, data.collate([x.pairs[i] for i in index]), x.loss, None,
                             x.cfg) for index in ([0], [0, 1, 2]))
    assert data.collate([x.pairs[0]]).target.tolist() == [0, 0, BYTES.eot, 0, BYTES.eot]
    assert all(three[name][:1] == pytest.approx(alone, rel=1e-12) for name, alone in one.items())

def test_an_evaluation_is_a_mean_over_pairs_and_a_step_returns_no_graph(tmp_path):
    """transformers-41898 (the mean of the batches' means, though the last is smaller), prime-rl-909 (a loss
    that is added up for the log keeps all graphs in memory)."""
    found = []
    for n in (1, 3, 7, 100):  # of 7 pairs
        x = make("tdpo2", load_records(make_records(7), tmp_path), micro_batch_size=n)
        found.append(train.evaluate(x.policy, x.reference, x.pairs, x.cfg))
    assert all(values == pytest.approx(found[0], rel=1e-10) for values in found)
    rows = train.step(x.policy, x.reference, data.collate([x.pairs[0]]), x.loss, 1.0, x.cfg)
    assert not any(row.requires_grad for row in rows.values())

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
