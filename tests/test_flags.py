"""Flags and their defaults; a whole run, its folders and what it prints."""

import dataclasses
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from test_train import BYTES, RECORDS, make_records, model_a, read_log, run, write_lines  # noqa: F401

import data
import train
from losses import LOSSES, knobs_of, terms_of
from model import GPT
from plumbing import flags, report
from plumbing.errors import ConfigError
from plumbing.folder import read_run, weights_hash
from train import Config

TINY = "--tokenizer bytes --n_layer 1 --n_head 2 --n_embd 8 --block_size 64 --sft_steps 2".split()
PAPERS = {"sft": {}, "dpo": {"beta": 0.1}, "dpop": {"beta": 0.3, "lam": 50.0}, "tdpo1": {"beta": 0.1},
          "tdpo2": {"beta": 0.1, "alpha": 0.5}, "2d-dpo": {"beta": 0.1}, "2d-dpo-vanilla": {"beta": 0.1}}

def resolved(*argv):
    return flags.resolve(Config, [*map(str, argv)])[0]

def test_every_field_of_config_and_every_knob_is_a_flag_with_help_and_its_default(capsys, monkeypatch):
    """A default of None is explained in words. Knobs say which loss has which default."""
    monkeypatch.setenv("COLUMNS", "1000")  # a flag, a line
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: python train.py [--FLAG VALUE ...]\n")
    texts = dict(re.findall(r"^  --(\w+)(.*)$", re.sub(r"\n {9,}", " ", text), re.MULTILINE))
    for field in dataclasses.fields(Config):
        if field.name == "settings":
            continue
        assert len(texts[field.name].split()) >= 3, field.name
        if field.default not in (None, ()) and type(field.default) is not bool:
            assert texts[field.name].endswith(f"; default {field.default}"), field.name
        elif field.name not in ("data", "resume", "overwrite"):
            assert "default" in texts[field.name], field.name
    for name, knobs in PAPERS.items():
        for knob, value in knobs.items():
            assert f"{name} {value}" in texts[knob]

@pytest.mark.parametrize("loss", LOSSES)
def test_defaults_are_the_papers_and_sft_has_its_own_and_what_a_loss_does_not_read_is_refused(loss, tmp_path):
    """Defaults of losses stand in their signatures alone."""
    cfg = resolved("--loss", loss, "--out_dir", tmp_path / "x", "--device", "cpu")
    assert cfg.settings == knobs_of(LOSSES[loss]) == PAPERS[loss]
    assert (cfg.dtype, cfg.micro_batch_tokens, cfg.n_embd, cfg.block_size) == ("float32", 2048, 128, 256)
    assert (cfg.steps, cfg.lr) == ((150, 2e-3) if loss == "sft" else (40, 5e-5))
    segmented = {"aspect_weights": (0.5, 0.5), "rejected_weight": "score"}
    reads = PAPERS[loss] | (segmented if "chosen_rewards" in terms_of(LOSSES[loss]) else {})
    for name, value in ({"beta": 0.1, "lam": 50.0, "alpha": 0.5} | segmented).items():
        typed = {"loss": loss, name: value}
        if name in reads:
            flags.check(flags.configure(Config, typed), typed)
        else:
            with pytest.raises(ConfigError, match=f"^--{name}: would not be read, the loss {loss} has no"):
                flags.check(flags.configure(Config, typed), typed)

def test_with_init_equal_sizes_may_be_repeated_and_resume_keeps_what_is_not_typed(
        model_a, tmp_path, monkeypatch):  # noqa: F811
    """A smaller block_size is allowed. What is typed on --resume wins."""
    run(tmp_path, init=model_a, n_layer=2, n_head=2, n_embd=16, block_size=40, tokenizer="bytes", beta=0.3,
        seed=3)
    cfg = resolved("--resume", "--out_dir", tmp_path / "run", "--steps", 7, "--log_every", 2)
    assert (cfg.n_layer, cfg.block_size, cfg.settings, cfg.seed) == (2, 40, {"beta": 0.3}, 3)
    assert (cfg.steps, cfg.log_every, cfg.batch_size, cfg.lr, cfg.init) == (7, 2, 8, 5e-5, model_a)
    assert not cfg.overwrite and cfg.resume

def test_the_first_record_and_run_json_hold_what_repeats_the_run_and_the_last_files_are_a_model(
        model_a, tmp_path, capsys):  # noqa: F811
    """Config without gaps, versions, device, hashes; the table holds the first and the last evaluation."""
    metrics, folder, head, _, evals = run(tmp_path, "tdpo1", init=model_a, seed=3, steps=3, lr=1e-2,
                                          dtype="float64")
    cfg = Config(**{k: v for k, v in head["config"].items() if k != "beta"})
    assert (cfg.seed, head["config"]["beta"], cfg.steps, cfg.block_size) == (3, 0.1, 3, 64)
    assert (cfg.device, cfg.dtype, cfg.init, cfg.ref) == ("cpu", "float64", model_a, model_a)
    assert head["torch"] == torch.__version__ and head["device"].startswith("CPU, ")
    start, identity, out = GPT.from_pretrained(model_a), head["identity"], capsys.readouterr().out
    assert head["parameters"] == sum(w.numel() for w in start.parameters())  # without rows that pad the table
    assert identity["ref"] == identity["init"] == weights_hash(start.double())
    assert identity["tokenizer"] == BYTES.hash and len(identity["data"]) == 64
    assert read_run(folder)["finished"] == 3 and read_run(folder)["identity"] == identity
    assert data.Tokenizer(folder).hash == BYTES.hash and GPT.from_pretrained(folder).config == start.config
    again, *_ = run(tmp_path, "tdpo1", init=folder, ref=model_a, dtype="float64", lr=1e-30,
                    out_dir=tmp_path / "again")
    assert again == pytest.approx(metrics, rel=1e-5)  # the saved policy, evaluated anew
    for metric, name in report.TABLE.items():
        assert f"{name:36}{evals[0]['eval/' + metric]:10.4f}{metrics[metric]:10.4f}" in out
    assert out.count("\nprompt     ") == out.count("\nreference ") == out.count("\npolicy    ") == 2

@pytest.mark.slow
def test_a_run_gets_a_folder_of_its_own_which_is_said_and_each_start_one_folder_beside_it(
        tmp_path, monkeypatch, capsys):
    """out/dpo, out/dpo-2, ...; out/sft serves dpo and dpop; another seed, number of steps or file makes
    out/sft-HASH, found again by a later run. A file or a run in its place is passed by."""
    monkeypatch.chdir(tmp_path)
    file = write_lines(tmp_path / "x.jsonl", RECORDS)
    other = write_lines(tmp_path / "y.jsonl", make_records(seed=4))
    common = ["--data", file, "--val_data", file, *"--device cpu --steps 1 --batch_size 8".split(), *TINY]
    seen = []
    for changes in ("", "--loss dpop --beta 0.5", "--seed 1", "--sft_steps 3", f"--data {other}", "--seed 1"):
        train.main([*common, *changes.split()])
        out = capsys.readouterr().out
        made = re.search(r"first a start, by SFT on the chosen responses, into (\S+)\n", out)
        used = re.search(r"the start is the SFT model in (\S+), made by an earlier run\n", out)
        assert out.count("a random model of 1 layers is trained, as a demonstration. For GPT-2: python "
                         "train.py --init gpt2; for any other model: python ports/huggingface.py --ini") == 1
        place = re.search(r"^dpop? in (\S+): [\d,]+ parameters, 8 pairs, 1 steps of 8,", out, re.MULTILINE)[1]
        if place not in ("out/dpo", "out/dpop"):  # said at the start
            assert out.index(f"out/dpo is taken: this run goes into {place}; --over") < out.index("SFT")
        seen.append((place, (made or used)[1], bool(made)))
    places, starts, made = zip(*seen, strict=True)
    assert places == ("out/dpo", "out/dpop", "out/dpo-2", "out/dpo-3", "out/dpo-4", "out/dpo-5")
    assert starts[0] == starts[1] == "out/sft" and starts[2] == starts[5] and len(set(starts)) == 4
    assert all(re.fullmatch(r"out/sft-[0-9a-f]{8}", start) for start in starts[2:])
    assert made == (True, False, True, True, True, False)
    start = str(Path("out/sft").resolve())  # in full: run.json is read from other folders too
    assert [read_log("out/dpo")[0]["config"][name] for name in ("init", "ref")] == [start, start]
    sft = read_log("out/sft")[0]["config"]
    assert (sft["loss"], sft["steps"], sft["lr"]) == ("sft", 2, 2e-3)
    Path("new").mkdir()
    Path("new/sft").write_text("mine")
    for place in ("new/dpo", "other/sft"):
        train.main([*common, "--out_dir", place])
        assert len(list(Path(place).parent.glob("sft-*/run.json"))) == 1
    assert Path("new/sft").read_text() == "mine"

def test_sft_says_what_to_type_next_and_that_works_and_progress_is_shown_on_a_terminal_only(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write_lines(tmp_path / "my pairs.jsonl", RECORDS)
    train.main(["--loss", "sft", "--data", file, "--val_data", file, "--steps", "1", "--device", "cpu",
                "--out_dir", "out/mine", *TINY[:-2]])
    out, err = capsys.readouterr()
    words = shlex.split(re.search(r"^next: python train.py (.*)$", out, re.MULTILINE)[1])
    assert words == ["--loss", "dpo", "--init", "out/mine", "--data", file, "--val_data", file] and not err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train.main([*words, "--steps", "1", "--device", "cpu"])
    assert read_log("out/dpo")[0]["config"]["init"] == str(Path("out/mine").resolve())
    assert "dpo: 100%" in capsys.readouterr().err

@pytest.mark.parametrize("chosen, rejected, words", [
    (-2.1, -3, "both fall, which is common"), (-4.9, -3, ""), (3, -1, ""),
    (-5.1, -9, "chosen responses have lost 0.5 nats a token")])
def test_an_evaluation_says_what_its_numbers_mean(chosen, rejected, words):
    """Of responses of 10 tokens: what the chosen one lost is per token."""
    m = {"loss": .6, "rewards/accuracies": .8, "rewards/margins": 1, "logratio/chosen": chosen,
         "logratio/rejected": rejected}
    said = report.held_out_line(m, 10).partition(f"rejected {rejected:+.2f}")[2]
    assert said.startswith(f": {words}") if words else not said
