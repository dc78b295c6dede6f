"""Flags, their checks and defaults; a whole run, its folders and what it prints."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import BYTES, RECORDS, make_records, model_a, read_log, run, small, write_lines  # noqa: F401

import data
import train
from losses import LOSSES, knobs_of, terms_of
from model import GPT
from plumbing import flags, machine, report
from plumbing.errors import ConfigError
from plumbing.folder import read_run
from train import Config

ROOT = Path(__file__).resolve().parent.parent
TINY = "--tokenizer bytes --n_layer 1 --n_head 2 --n_embd 8 --block_size 64 --sft_steps 2".split()


def refused(capsys, *argv):
    """train.py with these flags ends with status 2 and one line on stderr, which is returned."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(flag) for flag in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("train.py: error: ") and err.count("\n") == 1, err
    return err


def resolved(*argv):
    return flags.resolve(Config, [*map(str, argv)])[0]


# ---------------------------------------------------------------------------------------------------------
# Flags


def test_every_field_of_config_is_a_flag_with_help_its_default_and_a_group(capsys):
    with pytest.raises(SystemExit) as stop:
        flags.parse(Config, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: python train.py [--FLAG VALUE ...]\n")
    for group in ("what to train", "the data", "optimization", "the loss", "logging", "the machine"):
        assert f"\n{group}:\n" in text
    words = " ".join(text.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in words
        if field.default not in (None, (), False) and field.name != "loss":
            assert re.search(rf"--{field.name} [A-Z]+ .*?default {field.default}", words), field.name


def test_every_flag_sets_its_field_and_no_flag_leaves_the_default():
    assert flags.parse(Config, []) == Config()
    argv, expected, switches = [], {}, []
    for i, field in enumerate(dataclasses.fields(Config), 1):
        words, kind = [f"{field.name}-{i}"], str(field.type)
        if "bool" in kind:
            switches.append(field.name)
            continue
        elif field.name in ("data", "val_data"):
            words += ["more"]
            expected[field.name] = tuple(words)
        elif field.name == "aspect_weights":
            words, expected[field.name] = ["0.25", "0.75"], (0.25, 0.75)
        else:
            convert = int if "int" in kind else float if "float" in kind else str
            words = words if convert is str else [str(i)]
            expected[field.name] = convert(words[0])
        argv += [f"--{field.name}", *words]
    cfg = flags.parse(Config, argv)
    assert cfg == dataclasses.replace(Config(), **expected)
    assert all(type(getattr(cfg, name)) is type(value) for name, value in expected.items())
    assert sorted(switches) == ["compile", "compile_head", "overwrite", "pack", "resume"]
    for prefix, value in (("--", True), ("--no-", False)):
        cfg = flags.parse(Config, [prefix + name for name in switches])
        assert {getattr(cfg, name) for name in switches} == {value}


@pytest.mark.parametrize("argv, words", [
    ("--bata 1", "unrecognized arguments: --bata"), ("--step 3", "unrecognized arguments: --step"),
    ("--beta x", "argument --beta: invalid float value"), ("--loss ipo", "--loss ipo: choose from sft, dpo,"),
    ("--steps 0", "--steps 0: must be at least 1"), ("--lr 0", "--lr 0.0: must be greater than 0"),
    ("--lr nan", "--lr nan"), ("--beta -1", "--beta -1.0"), ("--beta inf", "--beta inf"),
    ("--loss dpop --lam -1", "--lam -1.0: must be at least 0"), ("--loss tdpo2 --alpha nan", "--alpha nan"),
    ("--micro_batch_size 0", "--micro_batch_size 0"), ("--grad_clip -1", "--grad_clip -1.0"),
    ("--seed -1", "--seed -1"), ("--dtype float16", "choose bfloat16"), ("--dtype int8", "--dtype int8: ch"),
    ("--device nonsense", "--device nonsense: choose cpu"),
    ("--device cuda:99", "cannot use it here; choose cpu"),
    ("--loss 2d-dpo --rejected_weight x", "choose from score"),
    ("--resume", "--resume: goes with --out_dir"), ("--loss 2d-dpo --aspect_weights a b", "must be numbers"),
    ("--loss 2d-dpo --aspect_weights 0.5,0.6", "must be >= 0 and sum to 1"),
    ("--loss 2d-dpo --aspect_weights nan,1", "must be >= 0 and sum to 1"),
    ("--init nowhere", "--init nowhere: no such folder"), ("--ref nowhere", "--ref nowhere: no such folder"),
    ("--data nowhere.jsonl", "train.py: error: --data nowhere.jsonl: No such file or directory\n"),
    ("--val_data nowhere.jsonl", "--val_data nowhere.jsonl: No such file or directory"),
    ("--tokenizer nowhere.tiktoken", "--tokenizer: nowhere.tiktoken"), ("--n_embd 30", "not divisible"),
    ("--loss sft --ref x", "--ref: would not be read, the loss sft has no reference"),
    ("--loss sft --sft_steps 5", "--sft_steps: would not be read"),
    ("--init x --sft_lr 1", "--sft_lr: would not be read"),
    ("--loss 2d-dpo --rejected_weight badness", "--rejected_weight badness: not with 2d-dpo"),
])
def test_a_bad_flag_is_one_line_and_exit_status_2(argv, words, capsys, tmp_path, monkeypatch):
    """A missing file or folder is named before a tokenizer is looked for, which may want the network."""
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, *argv.split())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_that_is_no_model_is_named_before_its_tokenizer_is_looked_for(tmp_path, capsys):
    """With --init, and without a vocabulary in it, gpt2 would be downloaded."""
    file = write_lines(tmp_path / "x.jsonl", RECORDS)
    (tmp_path / "empty").mkdir()
    err = refused(capsys, "--init", tmp_path / "empty", "--data", file)
    assert "config.json: No such file or directory; a model folder holds config.json" in err
    (tmp_path / "empty/config.json").write_text('{"model_type": "gpt2"}')
    err = refused(capsys, "--init", tmp_path / "empty", "--data", file)
    assert "not the configuration of a GPT-2 (vocab_size = None" in err


@pytest.mark.parametrize("loss", LOSSES)
def test_a_knob_that_the_loss_does_not_read_is_an_error_and_one_that_it_reads_is_not(loss):
    segmented = {"aspect_weights": (0.5, 0.5), "rejected_weight": "score"}
    reads = [*knobs_of(LOSSES[loss]), *(segmented if "chosen_rewards" in terms_of(LOSSES[loss]) else ())]
    for name, value in ({"beta": 0.1, "lam": 50.0, "alpha": 0.5} | segmented).items():
        if name in reads:
            flags.check(Config(loss=loss, **{name: value}))
        else:
            with pytest.raises(ConfigError, match=f"^--{name}: would not be read, the loss {loss} has no"):
                flags.check(Config(loss=loss, **{name: value}))


def test_aspect_weights_come_with_commas_or_spaces_and_are_one_an_aspect(tmp_path, capsys):
    for words in (["0.3", "0.7"], ["0.3,0.7"], ["0.3,", "0.7"], ["0.3, 0.7"]):
        assert flags.parse(Config, ["--aspect_weights", *words]).aspect_weights == (0.3, 0.7)
    file = write_lines(tmp_path / "x.jsonl", RECORDS)
    argv = ["--loss", "2d-dpo", "--data", file, "--tokenizer", "bytes", "--out_dir", tmp_path / "x"]
    assert "3 weights for 2 aspects" in refused(capsys, *argv, "--aspect_weights", 0.2, 0.3, 0.5)
    plain = [{"prompt": "p", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(4)]
    argv[3] = write_lines(tmp_path / "plain.jsonl", plain)
    assert "--loss 2d-dpo: needs scores in every segment of every pair" in refused(capsys, *argv)


@pytest.mark.parametrize("loss, beta, lam, alpha", [
    ("sft", None, None, None), ("dpo", 0.1, None, None), ("dpop", 0.3, 50, None), ("tdpo1", 0.1, None, None),
    ("tdpo2", 0.1, None, 0.5), ("2d-dpo", 0.1, None, None), ("2d-dpo-vanilla", 0.1, None, None)])
def test_defaults_are_the_papers_by_loss(loss, beta, lam, alpha, tmp_path):
    cfg = resolved("--loss", loss, "--out_dir", tmp_path / "x")
    assert (cfg.beta, cfg.lam, cfg.alpha) == (beta, lam, alpha)
    assert (cfg.dtype, cfg.micro_batch_tokens, cfg.n_embd, cfg.block_size) == ("float32", 2048, 128, 256)
    assert cfg.steps == (150 if loss == "sft" else 40) and cfg.lr == (2e-3 if loss == "sft" else 5e-5)
    assert resolved("--loss", loss, "--out_dir", tmp_path / "x", "--steps", 9).steps == 9


@pytest.mark.parametrize("vocab_size, argv, trunk, head", [
    (10_001, "", False, True), (10_000, "", False, False), (10_001, "--no-compile", False, False),
    (257, "--compile", True, True), (257, "--compile --no-compile_head", True, False),
    (10_001, "--no-compile --compile_head", False, True)])
def test_over_10_000_ids_the_head_is_compiled_by_default_and_flags_decide_otherwise(
        vocab_size, argv, trunk, head, tmp_path, monkeypatch):
    """Neither without a compiler nor under torchrun. The head has as many tokens as 2^24 logits have room
    for."""
    class Vocabulary:
        def __init__(self, name):
            self.vocab_size = vocab_size

    monkeypatch.setattr(flags, "Tokenizer", Vocabulary)
    for why, expected in ((None, head), ("no g++", head and "--compile" in argv)):
        monkeypatch.setattr(machine, "cannot_compile", lambda why=why: why)
        cfg = resolved("--out_dir", tmp_path / "x", *argv.split())
        assert (cfg.compile, cfg.compile_head, cfg.head_tokens) == (trunk, expected, 2**24 // vocab_size)
    monkeypatch.setattr(machine, "cannot_compile", lambda: None)
    monkeypatch.setattr(flags.ranks, "world", lambda: 2)
    monkeypatch.setattr(flags.ranks, "start", lambda device: None)
    assert resolved("--out_dir", tmp_path / "x", *argv.split()).compile_head == (head and "--compile" in argv)


@pytest.mark.parametrize("given, packs", [
    ({}, True), ({"pack": False}, False), ({"compile": False}, False), ({"dtype": "float64"}, False),
    ({"n_head": 32}, False), ({"device": "cpu"}, False), ({"device": "cpu", "pack": True}, True)])
def test_pairs_are_packed_where_flexattention_runs(given, packs):
    cfg = {"device": "cuda:0", "compile": True, "dtype": "bfloat16", "n_embd": 256, "n_head": 4}
    assert flags.packs(Config(**cfg | given)) is packs


def test_pack_on_cuda_says_what_flexattention_needs():
    cfg = Config(device="cuda", dtype="float64", compile=False, n_embd=64, n_head=4, pack=True)
    with pytest.raises(ConfigError, match="--pack: FlexAttention on cuda needs --compile and float32 or bf"):
        flags.packs(cfg)


def test_with_init_equal_sizes_may_be_repeated_a_smaller_block_size_too_others_are_refused(
        model_a, tmp_path, capsys):  # noqa: F811
    file = write_lines(tmp_path / "x.jsonl", RECORDS)
    argv = ["--init", model_a, "--data", file, "--val_data", file, "--steps", 1, "--device", "cpu",
            "--out_dir", tmp_path / "x"]
    for name, value, words in (("n_layer", 3, "has 2"), ("n_head", 4, "has 2"), ("n_embd", 32, "has 16"),
                               ("block_size", 65, "has 64 positions"),
                               ("tokenizer", flags.TOY[2], "has another")):
        err = refused(capsys, *argv, f"--{name}", value)
        assert f"--{name} {value}: " in err and words in err
    assert not (tmp_path / "x").exists()
    train.main([str(x) for x in [*argv, "--n_layer", 2, "--n_head", 2, "--n_embd", 16, "--block_size", 40,
                                 "--tokenizer", "bytes"]])
    assert read_log(tmp_path / "x")[0]["config"]["block_size"] == 40


def test_a_reference_or_start_for_another_vocabulary_or_with_nan_is_refused(
        model_a, tmp_path, capsys):  # noqa: F811
    small(0, vocab_size=300).save_pretrained(tmp_path / "other")  # a folder without a tokenizer
    file = write_lines(tmp_path / "x.jsonl", RECORDS)
    argv = ["--data", file, "--val_data", file, "--out_dir", tmp_path / "x", "--device", "cpu"]
    err = refused(capsys, *argv, "--init", tmp_path / "other", "--tokenizer", "bytes")
    assert "has 300 token ids, the tokenizer 257" in err
    err = refused(capsys, *argv, "--init", model_a, "--ref", tmp_path / "other")
    assert f"--ref {tmp_path / 'other'}: has 300 token ids" in err
    model = small(0)
    with torch.no_grad():
        model.h[0].mlp.c_fc.bias[3] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    for flag in ("--init", "--ref"):
        extra = [] if flag == "--init" else ["--init", model_a]
        err = refused(capsys, *argv, *extra, flag, tmp_path / "nan", "--tokenizer", "bytes")
        assert "h.0.mlp.c_fc.bias holds NaN or infinity" in err


# ---------------------------------------------------------------------------------------------------------
# A run and its folders


def test_the_first_record_holds_what_repeats_the_run(model_a, tmp_path):  # noqa: F811
    """Config without gaps, versions, device, the hashes of data, tokenizer, start and reference."""
    _, folder, head, *_ = run(tmp_path, init=model_a, seed=3)
    cfg = Config(**head["config"])
    assert (cfg.seed, cfg.beta, cfg.steps, cfg.block_size) == (3, 0.1, 1, 64)
    assert (cfg.device, cfg.dtype, cfg.init, cfg.ref) == ("cpu", "float32", model_a, model_a)
    assert head["torch"] == torch.__version__ and head["python"] == ".".join(map(str, sys.version_info[:3]))
    assert head["device"].startswith("CPU, ")
    expected = train.weights_hash(GPT.from_pretrained(model_a))
    assert expected == train.weights_hash(GPT.from_pretrained(model_a, machine.ALIGN))
    parameters = sum(w.numel() for w in GPT.from_pretrained(model_a).parameters())
    assert head["parameters"] == parameters  # without the rows that pad the table
    assert head["identity"]["ref"] == head["identity"]["init"] == expected
    assert head["identity"]["tokenizer"] == BYTES.hash and len(head["identity"]["data"]) == 64
    assert (head["pairs"], head["held_out"]) == (8, 8)
    written = read_run(folder)
    assert written["finished"] == 1 and written["identity"] == head["identity"]


@pytest.mark.slow
def test_a_run_gets_a_folder_of_its_own_and_the_sft_start_is_reused_only_when_everything_matches(
        tmp_path, monkeypatch, capsys):
    """out/dpo, out/dpo-2, ...; out/sft serves dpo and dpop; another seed, width, number of steps or file
    makes out/sft-2, ...."""
    monkeypatch.chdir(tmp_path)
    file = write_lines(tmp_path / "x.jsonl", RECORDS)
    other = write_lines(tmp_path / "y.jsonl", make_records(seed=4))
    common = ["--data", file, "--val_data", file, *"--device cpu --steps 1 --batch_size 8".split(), *TINY]
    seen = []
    for changes in ("", "--micro_batch_size 3", "--loss dpop --beta 0.5", "--seed 1", "--n_embd 16",
                    "--sft_steps 3", f"--data {other}", "--seed 1"):
        train.main([*common, *changes.split()])
        out = capsys.readouterr().out
        made = re.search(r"first a start, by SFT on the chosen responses, into (\S+)\n", out)
        used = re.search(r"the start is the SFT model in (\S+), made by an earlier run\n", out)
        saved = re.findall(r"^saved in (\S+):", out, re.MULTILINE)[-1]
        seen.append((saved, *(x and x[1] for x in (made, used))))
    assert seen == [
        ("out/dpo", "out/sft", None), ("out/dpo-2", None, "out/sft"), ("out/dpop", None, "out/sft"),
        ("out/dpo-3", "out/sft-2", None), ("out/dpo-4", "out/sft-3", None), ("out/dpo-5", "out/sft-4", None),
        ("out/dpo-6", "out/sft-5", None), ("out/dpo-7", None, "out/sft-2")]
    folder = str(Path("out/sft").resolve())  # in full: run.json is read from other folders too
    assert [read_log("out/dpo")[0]["config"][name] for name in ("init", "ref")] == [folder, folder]
    sft = read_log("out/sft")[0]["config"]
    assert (sft["loss"], sft["steps"], sft["lr"]) == ("sft", 2, 2e-3)


def test_a_file_or_a_run_in_the_place_of_the_sft_folder_is_passed_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_lines(tmp_path / "x.jsonl", RECORDS)
    common = ["--data", file, "--val_data", file, *"--device cpu --steps 1 --batch_size 8".split(), *TINY]
    Path("out").mkdir()
    Path("out/sft").write_text("mine")
    train.main(common)
    assert Path("out/sft").read_text() == "mine" and Path("out/sft-2/run.json").exists()
    train.main([*common, "--out_dir", "other/sft"])
    assert [read_run(f"other/{name}")["config"]["loss"] for name in ("sft", "sft-2")] == ["dpo", "sft"]


@pytest.mark.parametrize("file, eos, said", [
    ("config.json", 5, "5"), ("generation_config.json", [256, 7], "256, 7"),
    ("generation_config.json", 256, None), ("config.json", None, None)])
def test_another_end_of_text_than_the_tokenizers_is_not_replaced_in_silence(
        file, eos, said, model_a, tmp_path, capsys):  # noqa: F811
    shutil.copytree(model_a, tmp_path / "start")
    path = tmp_path / "start" / file
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | {"eos_token_id": eos}))
    _, folder, *_ = run(tmp_path, init=tmp_path / "start", steps=1)
    line = (f"--init {tmp_path / 'start'} ends its texts at id {said} (eos_token_id); responses end in "
            "<|endoftext|> here, id 256, and so will the saved model's\n")
    assert (line in capsys.readouterr().out) == bool(said)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 256


@pytest.mark.parametrize("loss, dtype, said", [("dpop", "bfloat16", True), ("dpop", "float32", False),
                                               ("dpo", "bfloat16", False)])
def test_where_rounding_alone_moves_the_loss_this_is_said_before_the_first_step(
        loss, dtype, said, model_a, tmp_path, capsys):  # noqa: F811
    """DPOP's hinge in bfloat16: 0.87 instead of log 2 after one step at a learning rate of 1e-9."""
    run(tmp_path, loss, init=model_a, steps=1, dtype=dtype)
    assert ("rounding alone can move this loss by 0." in capsys.readouterr().out) == said


def test_the_final_files_are_a_model_and_a_tokenizer_and_the_table_holds_the_first_and_last_numbers(
        model_a, tmp_path, capsys):  # noqa: F811
    metrics, folder, *_, evals = run(tmp_path, "tdpo1", init=model_a, steps=3, lr=1e-2, dtype="float64")
    out = capsys.readouterr().out
    assert data.Tokenizer(folder).hash == BYTES.hash
    assert GPT.from_pretrained(folder).config == GPT.from_pretrained(model_a).config
    again, *_ = run(tmp_path, "tdpo1", init=folder, ref=model_a, dtype="float64", lr=1e-30,
                    out_dir=tmp_path / "again")
    assert again == pytest.approx(metrics, rel=1e-5)  # the saved policy, evaluated anew
    assert "8 held-out pairs                        before     after" in out
    assert len(report.TABLE) == 7
    for metric, name in report.TABLE.items():
        assert f"{name:36}{evals[0]['eval/' + metric]:10.4f}{metrics[metric]:10.4f}\n" in out
    assert out.count("\nprompt     ") == out.count("\nreference ") == out.count("\npolicy    ") == 2
    assert re.search(rf"^next: python sample.py {folder} --heat --prompt ", out, re.MULTILINE)


def test_sft_says_what_to_type_next_and_that_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write_lines(tmp_path / "my pairs.jsonl", RECORDS)
    train.main(["--loss", "sft", "--data", file, "--val_data", file, "--steps", "1", "--device", "cpu",
                "--out_dir", "out/mine", *TINY[:-2]])
    words = shlex.split(re.search(r"^next: python train.py (.*)$", capsys.readouterr().out, re.MULTILINE)[1])
    assert words == ["--loss", "dpo", "--init", "out/mine", "--data", file, "--val_data", file]
    train.main([*words, "--steps", "1", "--device", "cpu"])
    assert read_log("out/dpo")[0]["config"]["init"] == str(Path("out/mine").resolve())


def test_the_ceiling_is_read_from_the_meta_file_of_the_held_out_data_where_there_is_one(tmp_path):
    cfg, file = Config(data=("x.jsonl",), val_data=(str(tmp_path / "x.jsonl.gz"),)), tmp_path / "x.meta.json"
    assert report.ceiling(cfg) == "" and report.ceiling(Config(data=("x.jsonl",))) == ""
    for content in ("{}", "[1]", "{"):
        file.write_text(content)
        assert report.ceiling(cfg) == ""
    file.write_text(json.dumps({"accuracy_ceiling": 0.75}))
    assert report.ceiling(cfg) == "   ceiling 0.7500, the labels are noisy"
    assert "ceiling 0.8525" in report.ceiling(Config())


# ---------------------------------------------------------------------------------------------------------
# What numbers usually mean


@pytest.mark.parametrize("step, chosen, rejected, margin, words", [
    (9, -2.1, -5, 1, "rejected falls faster; chosen is 2.1 nats below"),
    (9, -11, -12, 1, "good answers are unlearned too"),
    (9, 1, -2, 1, "chosen rises by 1.0 nats, rejected falls by 2.0"),
    (9, 3, 2, 1, "both rise, chosen faster"),
    (50, 0, 0, 0, "nothing is learned"),
    (9, -5, -2, -1, "the rejected response gains"), (9, -1, 1, -1, "the rejected response gains"),
    (9, 1, 2, -1, "the rejected response gains")])
def test_the_held_out_line_says_what_the_numbers_usually_mean(step, chosen, rejected, margin, words):
    m = {"logratio/chosen": chosen, "logratio/rejected": rejected, "rewards/margins": margin}
    assert words in report.verdict(step, m, Config()) and report.verdict(9, {}, Config()) == "no remark"
    assert "tools/doctor.py" in report.verdict(5, m | {"rewards/accuracies": 1}, Config())


def test_a_falling_chosen_response_is_explained_by_the_hyper_parameters_of_the_loss():
    falling = {"logratio/chosen": -2.0, "logratio/rejected": -5.0}
    assert "DPOP is made against it" in report.verdict(9, falling, Config())
    assert "the penalty lam is active" in report.verdict(9, falling, Config(loss="dpop", lam=50.0))


@pytest.mark.slow
def test_an_alarm_is_said_and_logged_once(model_a, tmp_path, capsys):  # noqa: F811
    """Equal log-ratios until step 51: the learning rate is 0 but for rounding."""
    run(tmp_path, init=model_a, steps=53, lr=1e-30, dtype="float64")
    said = capsys.readouterr().out
    assert said.count("the margin is still exactly 0: nothing is learned") == 2  # and at the last evaluation
    notes = [x for x in map(json.loads, (tmp_path / "run/log.jsonl").read_text().splitlines()) if "note" in x]
    assert len(notes) == 1 and notes[0]["step"] == 50


def test_what_goes_wrong_in_the_compiler_or_in_memory_is_one_line(monkeypatch):
    from torch._inductor.exc import CppCompileError
    TritonError = type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})
    allocator = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    for error, words in (
            (TritonError("out of resource: shared memory"), "shared memory.*--no-pack may do"),
            (CppCompileError(["g++", "x.cpp"], "Python.h: missing"), "torch.compile failed"),
            (MemoryError(), "out of memory"), (RuntimeError(allocator), "out of memory"),
            (OSError(5, "I/O error"), "intact")):
        def fails(*_, error=error):
            raise error
        monkeypatch.setattr(flags, "resolve", fails)
        with pytest.raises(SystemExit, match=f"^train.py: .*{words}"):
            train.main([])


# ---------------------------------------------------------------------------------------------------------
# python train.py, nothing else


@pytest.mark.slow
def test_the_run_without_arguments_works_offline_from_any_folder(tmp_path):
    """Shortened. In another process and folder, where opening a connection is an error: 0.6931 before the
    first step, the table with the ceiling, two prompts with two answers each, the folder, what to type next.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "def no_network(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        "        raise RuntimeError(f'network: {event} {args}')\n"
        "sys.addaudithook(no_network)\n")
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    command = [sys.executable, str(ROOT / "train.py"), *"--steps 2 --sft_steps 3 --device cpu".split()]
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "no --init: first a start, by SFT on the chosen responses, into out/sft\n" in done.stdout
    start = done.stdout.index("before the first step: loss 0.6931 = log 2, as it must be")
    step_1 = done.stdout.index("step     1  loss 0.6931")
    table = done.stdout.rindex("400 held-out pairs                      before     after")
    assert start < step_1 < table and re.search(r"accuracy .* ceiling 0\.8525", done.stdout[table:])
    for name in ("prompt    ", "reference ", "policy    "):
        assert len(re.findall(f"^{name}", done.stdout[table:], re.MULTILINE)) == 2
    assert "\nsaved in out/dpo: " in done.stdout and (cwd / "out" / "dpo" / "model.safetensors").exists()
    assert "\nnext: python sample.py out/dpo --heat --prompt 'Review the " in done.stdout[table:]
    assert "dpo: 100%" in done.stderr  # the progress bar
