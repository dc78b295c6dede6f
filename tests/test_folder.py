"""A run's folder: exact resume, signals, the lock, damaged or foreign state, full disks; and the reference's
remembered numbers, which lie there.

Runs take a fraction of a second: 16 channels, bytes as tokens, 17 pairs and one held out, 6 steps of 6 pairs.
Kills at every write are in kill.py, of which a short version runs here.
"""

import errno
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from test_train import BYTES, ROOT, arguments, config, make_records, save_model, small, write_lines

import data
import sample
import train
from losses import LOSSES
from model import GPT
from plumbing import checkpoints, files, folder, formats
from plumbing.errors import ConfigError
from plumbing.reference import Memory, Reference

TIMING = {"pairs_per_s", "tokens_per_s", "peak_memory"}
PLAIN = {"loss": "dpo", "data": "d.jsonl", "init": "a", "device": "cpu", "steps": 6, "batch_size": 6,
         "micro_batch_size": 4, "lr": 1e-3, "log_every": 1, "eval_every": 2, "save_every": 1}
SIZES = {"init": None, "tokenizer": "bytes", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 64}


# ---------------------------------------------------------------------------------------------------------
# Helpers


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with the data d.jsonl and the models a and b."""
    place = tmp_path_factory.mktemp("inputs")
    write_lines(place / "d.jsonl", make_records(18))
    for seed, name in enumerate("ab"):
        save_model(place / name, seed)
    return place


@pytest.fixture
def here(inputs, tmp_path, monkeypatch):
    """A working directory of its own with copies of the inputs, so that relative names work."""
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def go(out_dir="run", **changes):
    """A run by train.py's main; --resume repeats its flags."""
    sizes = SIZES if changes.get("loss") == "sft" else {}
    train.main(arguments(**PLAIN | sizes | {"out_dir": out_dir} | changes))
    return Path(out_dir)


def end(*args, **changes):
    """(exit status, message) of a run that ends early; a sys.exit(text) is status 1."""
    with pytest.raises(SystemExit) as stop:
        train.main(list(args)) if args else go(**changes)
    return (1, stop.value.code) if isinstance(stop.value.code, str) else (stop.value.code, None)


@pytest.fixture
def refused(capsys):
    """A run is bad input: status 2, one line with these words; the folder stays as it is."""
    def check(words, out_dir="run", **changes):
        before = contents(out_dir)
        capsys.readouterr()
        assert end(out_dir=out_dir, **changes) == (2, None)
        error = capsys.readouterr().err
        assert error.startswith("train.py: error: ") and error.count("\n") == 1 and words in error, error
        assert contents(out_dir) == before
    return check


def contents(place):
    """{name: bytes} of all files in a folder but the lock."""
    return {str(p.relative_to(place)): p.read_bytes()
            for p in sorted(Path(place).rglob("*")) if p.is_file() and p.name != ".lock"}


def records(place):
    return [json.loads(line) for line in Path(place, "log.jsonl").read_text().splitlines()]


def numbers(place):
    """{step: the logged numbers of its training step, without times}."""
    return {r["step"]: {k: v for k, v in r.items() if k not in TIMING} for r in records(place) if "loss" in r}


def same_result(one, other, step=6):
    """Weights, moments, remembered and logged numbers are equal to the byte."""
    for name in ("model.safetensors", f"checkpoints/step-{step:07}.safetensors", "reference-train.npy"):
        paths = [Path(place, name) for place in (one, other)]
        assert paths[0].exists() == paths[1].exists() == (name[0] != "r" or paths[0].exists()), name
        assert not paths[0].exists() or paths[0].read_bytes() == paths[1].read_bytes(), name
    assert numbers(one) == numbers(other) and list(numbers(one)) == list(range(1, step + 1))


class Killed(BaseException):
    """What stops a run like a kill does: nothing may catch it."""


def kill(*_, **__):
    raise Killed


def at_log_line(patch, step, action):
    """Do something when the training record of a step is logged."""
    real = folder.Log.write

    def write(log, record):
        real(log, record)
        if record.get("step") == step and "loss" in record:
            action()
    patch.setattr(folder.Log, "write", write)


def killed_at(step, **changes):
    """A run that was killed when it logged this step."""
    with pytest.MonkeyPatch.context() as patch:
        at_log_line(patch, step, kill)
        with pytest.raises(Killed):
            go(**changes)


# ---------------------------------------------------------------------------------------------------------
# Exact resume


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "tdpo2", "2d-dpo", "sft"])
def test_six_steps_are_three_and_resume_and_three_to_the_byte(loss, here):
    """The third step ends the first epoch, and begins the second."""
    full = go("full", loss=loss)
    go(loss=loss, steps=3)
    same_result(go(loss=loss, resume=True), full)


@pytest.mark.slow
@pytest.mark.parametrize("step, changes", [(2, {"save_every": 0}), (3, {}), (5, {"save_every": 2}),
                                           (4, {"loss": "tdpo2"}), (5, {"loss": "2d-dpo", "save_every": 2})])
def test_a_run_that_was_killed_ends_like_one_that_was_not(step, changes, here):
    """Before its first checkpoint, between two epochs, between two checkpoints."""
    full = go("full", **changes)
    killed_at(step, **changes)
    same_result(go(resume=True, **changes), full)


@pytest.mark.slow
def test_another_micro_batch_size_resumes_up_to_rounding(here):
    go("full", dtype="float64")
    killed_at(4, dtype="float64")
    go(micro_batch_size=2, resume=True, dtype="float64")
    one, other, start = (load_file(f"{place}/model.safetensors") for place in ("full", "run", "a"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-9)
    assert max((one[name] - start[name]).abs().max() for name in one) > 1e-3  # what training does


@pytest.mark.slow
def test_the_flags_of_a_run_need_not_be_said_again_and_may_be(here):
    flags = PLAIN | SIZES | {"sft_steps": 2, "steps": 4, "out_dir": "dpo"}
    train.main(arguments(**flags))
    shutil.copytree("dpo", "again")
    train.main("--resume --out_dir dpo --steps 6".split())
    train.main(arguments(**flags | {"out_dir": "again", "resume": True, "steps": 6}))
    assert Path("dpo/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    assert folder.read_run("dpo")["config"]["steps"] == 6


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_still_gets_its_result(here):
    """It is not finished: the model and its tokenizer were not written yet."""
    full = go("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "write_folder", kill)
        with pytest.raises(Killed):
            go()
    assert not Path("run/model.safetensors").exists()
    same_result(go(resume=True), full)
    assert folder.read_run("run")["finished"] == 6


@pytest.mark.slow
def test_fewer_steps_than_were_made_are_refused_finished_or_not(here, refused):
    """And run.json does not say them."""
    killed_at(5)
    refused("--steps 3: the run is at step 4 already", steps=3, resume=True)
    go(resume=True)
    refused("--steps 3: the run is at step 6 already", steps=3, resume=True)


@pytest.mark.slow
def test_the_log_of_a_resumed_run_has_each_step_once_and_lines_cut_short_are_dropped(here):
    go("full")
    killed_at(4)
    log = Path("run/log.jsonl")
    log.write_bytes(log.read_bytes() + b'{"step": 2, "loss": 1}\n{"step": 3, "lo\xff')
    go(resume=True)
    assert [r["step"] for r in records("run") if "loss" in r] == [1, 2, 3, 2, 4, 5, 6]  # 2 is a whole line
    for place, resumed in (("full", [0]), ("run", [0, 3])):
        assert [r["step"] for r in records(place) if "eval/loss" in r] == [0, 2, 4, 6]
        assert [r["resumed_at"] for r in records(place) if "resumed_at" in r] == resumed


# ---------------------------------------------------------------------------------------------------------
# What --resume finds


def test_an_absent_folder_is_not_made(here, capsys):
    assert end("--resume", "--out_dir", "nowhere") == (2, None)
    assert "nowhere/run.json: No such file" in capsys.readouterr().err and not Path("nowhere").exists()


def test_a_finished_run_says_so_and_touches_nothing(here, capsys):
    before = contents(go(steps=2))
    train.main("--resume --out_dir run".split())
    assert "run: finished at step 2" in capsys.readouterr().out and contents("run") == before


@pytest.fixture(scope="session")
def tree(inputs, tmp_path_factory):
    """A folder with the inputs and a run of one step made from them, by relative names."""
    place = tmp_path_factory.mktemp("tree")
    shutil.copytree(inputs, place, dirs_exist_ok=True)
    shutil.copy(ROOT / "toy/toy.tiktoken", place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        go("out/run", steps=1, ref="b", val_data="d.jsonl")
        go("out/sft", loss="sft", steps=1, tokenizer="toy.tiktoken")
    return place


def moved(tree, tmp_path):
    """A copy of the tree as if it had been moved: run.json says that it was written in a folder now gone."""
    new = tmp_path / "another place"
    shutil.copytree(tree, new)
    for path in new.glob("out/*/run.json"):
        path.write_text(path.read_text().replace(str(tree), str(tmp_path / "old")))
    return new


def test_a_run_moved_together_with_what_it_was_made_from_is_sampled_and_goes_on(
        tree, tmp_path, monkeypatch, capsys):
    new = moved(tree, tmp_path)
    assert folder.read_run(tree / "out/run")["config"]["ref"] == str(tree / "b")
    monkeypatch.chdir(tmp_path)
    sample.main("another place/out/run|--prompt|ab|--max_new_tokens|2".split("|"))
    for name in ("run", "sft"):
        train.main(f"--resume|--out_dir|another place/out/{name}|--steps|2".split("|"))
        assert folder.read_run(new / "out" / name)["finished"] == 2
    config = folder.read_run(new / "out/run")["config"]
    assert (config["init"], config["ref"]) == (str(new / "a"), str(new / "b"))
    assert config["data"] == config["val_data"] == [str(new / "d.jsonl")]
    assert folder.read_run(new / "out/sft")["config"]["tokenizer"] == str(new / "toy.tiktoken")


@pytest.mark.parametrize("gone, run, says", [
    ("a", "run", "--init {}/a: no such folder"), ("b", "run", "--ref {}/b: no such folder"),
    ("d.jsonl", "run", "--data {}/d.jsonl: No such file"),
    ("toy.tiktoken", "sft", "--tokenizer: {}/toy.tiktoken: No such file")])
def test_what_a_moved_run_misses_is_named_with_its_flag(gone, run, says, tree, tmp_path, monkeypatch, capsys):
    new, says = moved(tree, tmp_path), says.format(tmp_path / "old")
    (new / gone).rename(new / "gone")
    assert end("--resume", "--out_dir", str(new / "out" / run), "--steps", "2") == (2, None)
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: error: {says}") and error.count("\n") == 1, error
    if gone == "b":
        with pytest.raises(SystemExit):
            sample.main([str(new / "out/run"), "--prompt", "x"])
        assert capsys.readouterr().err.startswith(f"sample.py: error: {says}")


def test_the_identity_of_sft_is_that_of_prompts_and_chosen_responses(here):
    """Read for SFT, or for a preference loss that makes its start by SFT: the same run."""
    cfg, load = config("sft"), functools.partial(formats.load, ["d.jsonl"], BYTES, 64)
    of_pairs, of_chosen = (folder.identity_of(cfg, pairs, pairs, BYTES, None, None)
                           for pairs in (load()[0], load(alone=True)[0]))
    assert of_pairs == of_chosen
    change_data()
    assert of_pairs != folder.identity_of(cfg, load()[0], load()[0], BYTES, None, None)


def change_data():
    Path("d.jsonl").write_text(Path("d.jsonl").read_text().replace("a", "z", 1))


def change_reference():
    tensors = load_file("b/model.safetensors")
    tensors["transformer.wpe.weight"][3, 3] += 1
    save_file(tensors, "b/model.safetensors", {"format": "pt"})


def change_tokenizer():
    """The same number of ids, two of them exchanged, in the policy's folder and the reference's."""
    vocabulary = json.loads(Path("a/vocab.json").read_text())
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    for model in "ab":
        Path(model, "vocab.json").write_text(json.dumps(vocabulary))


@pytest.mark.slow
@pytest.mark.parametrize("what, changes, prepare", [
    ("loss was 'dpo', is 'dpop'", {"loss": "dpop"}, None),
    ("seed was 0, is 1", {"seed": 1}, None),
    ("lr was 0.001, is 0.002", {"lr": 2e-3}, None),
    ("beta was 0.1, is 0.2", {"beta": 0.2}, None),
    ("batch_size was 6, is 7", {"batch_size": 7}, None),
    ("dtype was 'float32', is 'float64'", {"dtype": "float64"}, None),
    ("block_size was 64, is 60", {"block_size": 60}, None),
    ("init was", {"init": "b"}, None),
    ("ref was", {"ref": "a"}, None),
    ("ref was", {}, change_reference),
    ("data was", {}, change_data),
    ("tokenizer was", {}, change_tokenizer),
])
def test_resume_with_something_else_than_the_runs_is_refused_and_names_it(
        what, changes, prepare, damaged, here, refused):
    shutil.copytree(damaged / "ref", "run")
    if prepare:
        prepare()
    refused(what, **{"ref": "b", "resume": True} | changes)


def test_resume_keeps_the_original_reference(damaged, here):
    """Said or not; and not the start, nor the policy as it is now."""
    shutil.copytree(damaged / "ref", "run")
    identity = folder.read_run("run")["identity"]
    train.main("--resume --out_dir run --steps 3".split())
    run = folder.read_run("run")
    assert run["identity"] == identity and run["config"]["ref"] == str((damaged / "b").resolve())
    assert identity["ref"] == folder.weights_hash(GPT.from_pretrained("b")) != identity["init"]


# ---------------------------------------------------------------------------------------------------------
# Checkpoints


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {  # of the files of step 5 in a folder c
    "a byte of the weights": lambda c: flip(c / "step-0000005.safetensors", -1),
    "a byte of the weights' header": lambda c: flip(c / "step-0000005.safetensors", 2),
    "weights cut short": lambda c: os.truncate(c / "step-0000005.safetensors", 1000),
    "no weights": lambda c: (c / "step-0000005.safetensors").unlink(),
    "a number in the JSON": lambda c: edit_json(c / "step-0000005.json", step=4),
    "an evaluation in the JSON": lambda c: edit_json(c / "step-0000005.json", before={}),
    "JSON cut short": lambda c: os.truncate(c / "step-0000005.json", 100),
    "JSON nested too deeply": lambda c: (c / "step-0000005.json").write_text("[" * 10**5),
    "another run's": lambda c: [shutil.copy(p, c) for p in Path("other/checkpoints").glob("step-0000005.*")],
}


@pytest.fixture(scope="session")
def damaged(inputs, tmp_path_factory):
    """Templates: an uninterrupted run, one killed at its sixth step, another run, one with its own --ref."""
    place = tmp_path_factory.mktemp("damaged")
    shutil.copytree(inputs, place, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        go("full")
        go("other", steps=5, seed=1)
        go("ref", steps=2, ref="b")
        killed_at(6)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(what, damaged, here, capsys):
    for name in ("run", "other"):
        shutil.copytree(damaged / name, name)
    DAMAGE[what](Path("run/checkpoints"))
    go(resume=True)
    out = capsys.readouterr().out
    assert re.search(r"step-0000005.json: skipped \(.+\); looking for an older checkpoint", out), out
    assert "going on after step 4" in out
    same_result("run", damaged / "full")


def test_when_no_checkpoint_is_intact_the_run_stops_and_starts_over_only_when_told(damaged, here, refused):
    shutil.copytree(damaged / "run", "run")
    for path in Path("run/checkpoints").glob("*.safetensors"):
        flip(path, -1)
    refused("--resume: no checkpoint in run is intact; --overwrite", resume=True)
    same_result(go(overwrite=True), damaged / "full")


def test_the_last_two_checkpoints_are_kept_and_nothing_that_a_kill_left(damaged, here):
    shutil.copytree(damaged / "run", "run")
    place = Path("run/checkpoints")
    for name in ("step-0000001.safetensors", "step-0000006.safetensors.part", ".tmpAbC", "step-0000009.json"):
        (place / name).write_text("left by a kill, or damaged")
    go(resume=True)
    assert sorted(p.name for p in place.iterdir()) == [
        f"step-000000{n}.{kind}" for n in (5, 6) for kind in ("json", "safetensors")]
    tensors, names = load_file(place / "step-0000006.safetensors"), dict(small(0).named_parameters())
    assert tensors.keys() == {f"{key}.{name}" for key in ("model", *checkpoints.MOMENTS) for name in names}
    assert all(tensors[f"step.{name}"] == 6 for name in names)


def test_a_file_appears_under_its_name_only_when_it_is_whole(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(Killed):
        files.write_atomically(tmp_path / "x", lambda part: part.write_text("half") and kill())
    assert contents(tmp_path) == {"x": b"old"}


def test_a_file_is_on_the_disk_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.fstat(fd).st_ino) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    files.write_json(tmp_path / "x", {})
    assert calls == [(tmp_path / "x").stat().st_ino, "rename", tmp_path.stat().st_ino]


# ---------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(
        number, status, damaged, here, monkeypatch, capsys):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at_log_line(patch, 3, lambda: os.kill(os.getpid(), number))
        assert end(save_every=0) == (status, None)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    out = capsys.readouterr().out
    assert f"{number.name}: stopped after step 3 and saved" in out
    train.main(re.search(r"python train.py (.*)", out[out.index("stopped after"):])[1].split())
    same_result("run", damaged / "full")


def test_a_signal_during_an_evaluation_ends_the_next_step_and_is_saved_too(here, monkeypatch, capsys):
    real, calls = train.evaluate, []

    def evaluate(*args):
        calls.append(None)
        if len(calls) == 2:  # that of step 2, when what follows step 2 is decided already
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(train, "evaluate", evaluate)
    assert end(save_every=0) == (143, None)
    assert "stopped after step 3 and saved" in capsys.readouterr().out
    assert [p.name for p in Path("run/checkpoints").glob("*.json")] == ["step-0000003.json"]


def test_a_signal_in_the_last_step_changes_nothing(here, monkeypatch):
    at_log_line(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert folder.read_run(go(steps=2))["finished"] == 2


def test_a_second_signal_ends_at_once_without_a_traceback(damaged, here, monkeypatch, capsys):
    shutil.copytree(damaged / "ref", "run")
    at_log_line(monkeypatch, 4, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert end("--resume", "--out_dir", "run", "--steps", "6") == (130, None)
    assert "train.py: interrupted; --resume goes on from the last checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_after_a_signal_while_the_start_is_made_the_same_command_goes_on(here, monkeypatch, capsys):
    flags = PLAIN | SIZES | {"sft_steps": 3, "steps": 2, "out_dir": "dpo"}
    with monkeypatch.context() as patch:
        at_log_line(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert end(*arguments(**flags)) == (143, None)
    assert "stopped after step 1 and saved" in capsys.readouterr().out and not Path("dpo").exists()
    train.main(arguments(**flags))
    assert "going on after step 1" in capsys.readouterr().out and folder.read_run("dpo")["finished"] == 2


# ---------------------------------------------------------------------------------------------------------
# The folder


def test_a_second_writer_is_refused_until_the_first_has_ended(damaged, here, monkeypatch, refused):
    shutil.copytree(damaged / "run", "run")
    with FileLock("run/.lock"):
        for how in ({"resume": True}, {"overwrite": True}):
            refused("--out_dir run: another process is writing there", **how)
    found = []

    def look():
        try:
            FileLock("run/.lock", timeout=0).acquire().lock.release()
            found.append("free")
        except TimeoutError:
            found.append("held")
    at_log_line(monkeypatch, 6, look)
    go(resume=True)
    look()
    assert found == ["held", "free"]


def test_a_folder_that_is_another_runs_or_no_runs_is_left_alone(damaged, here, refused):
    """A model folder that is no run's is not written to even with --overwrite, which replaces runs only."""
    shutil.copytree(damaged / "ref", "run")
    refused("--out_dir run: holds a dpo run; choose --resume, --overwrite", loss="dpop")
    for overwrite in (False, True):
        refused("--out_dir b: holds 5 files (config.json, ...) and is no run's", "b", overwrite=overwrite)
    with pytest.raises(ConfigError, match="--out_dir run: holds a dpo run"):
        folder.claim(Path("run"), {}, resume=False, overwrite=False)  # made since the first check


def test_a_folder_in_which_a_run_was_killed_before_it_wrote_its_first_file_is_free(here):
    Path("run").mkdir()
    for name in (".lock", ".ranks", "run.json.part", ".tmpAbCdEf"):
        (Path("run") / name).touch()
    go(steps=1)


@pytest.mark.slow
def test_overwrite_replaces_all_that_the_old_run_wrote_and_nothing_else(damaged, here):
    """A tokenizer of the old run's kind beside the new one's would be read in its place; the reference's
    numbers would be those of another one."""
    words = data.Tokenizer(ROOT / "toy/toy.tiktoken")
    small(2, vocab_size=words.vocab_size).save_pretrained("w")
    words.save("w")
    shutil.copytree(damaged / "full", "run")
    Path("run/my notes.txt").write_text("mine")
    Path("run/checkpoints/step-0000008.json").write_text("{}")
    go(init="w", steps=3, overwrite=True, save_every=0)
    fresh = go("fresh", init="w", steps=3, save_every=0)
    assert Path("run/my notes.txt").read_text() == "mine"
    assert set(contents("run")) - {"my notes.txt"} == set(contents(fresh))
    assert data.Tokenizer("run").hash == words.hash
    same_result("run", fresh, step=3)


def test_overwrite_that_is_killed_leaves_a_folder_that_overwrite_accepts(damaged, here, monkeypatch):
    """run.json goes last."""
    shutil.copytree(damaged / "ref", "run")
    real, left = Path.unlink, 4

    def unlink(path, **kwargs):
        nonlocal left
        left -= 1
        if left < 0 and path.suffix != ".part":
            raise Killed
        return real(path, **kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            go(overwrite=True)
    assert Path("run/run.json").exists() and not list(Path("run/checkpoints").iterdir())
    go(overwrite=True, steps=1)


# ---------------------------------------------------------------------------------------------------------
# A disk that is full, a folder that cannot be written


@pytest.mark.slow
@pytest.mark.parametrize("name, number", [
    ("run.json", errno.ENOSPC), ("log.jsonl", errno.EROFS), ("reference-train.npy", errno.ENOSPC),
    ("step-0000003.safetensors", errno.ENOSPC), ("step-0000003.json", errno.EROFS),
    ("model.safetensors", errno.EIO)])
def test_a_write_that_fails_is_one_line_with_status_1_and_what_was_saved_is_intact(
        name, number, damaged, here, monkeypatch):
    real = os.replace

    def replace(part, path):
        if Path(path).name == name:
            raise OSError(number, os.strerror(number))
        real(part, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        status, line = end()
    assert status == 1 and re.fullmatch(
        rf"train.py: run/\S*: cannot be written \({os.strerror(number)}\); what was saved before is intact, "
        "--resume goes on from there", line), line
    assert not list(Path("run").rglob("*.part"))
    same_result(go(resume=Path("run/run.json").exists()), damaged / "full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_line_that_does_not_fit_is_an_error_and_is_dropped_later(damaged, here, monkeypatch):
    shutil.copytree(damaged / "run", "run")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "open", lambda path, *args, **kwargs: open("/dev/full", *args, **kwargs),
                      raising=False)
        status, line = end(resume=True)
    assert status == 1 and "run/log.jsonl: cannot be written (No space left on device)" in line
    same_result(go(resume=True), damaged / "full")


def test_a_folder_that_cannot_be_made_is_bad_input(here, monkeypatch, capsys):
    def mkdir(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert end() == (2, None)
    assert "--out_dir run: Permission denied; choose a folder that can be written" in capsys.readouterr().err


@pytest.mark.slow
def test_a_kill_at_any_write_or_moment_and_a_full_disk_leave_what_resume_needs(tmp_path):
    """The short version of kill.py, in a process of its own because it forks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, ROOT / "tests/kill.py", "--short"], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "all survived" in done.stdout, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------
# Numbers that are not finite


def poison(patch, step, harm):
    """Let harm(chosen_logps, loss) change the loss of the first micro-batch of a training step."""
    real, calls = LOSSES["dpo"], []

    @functools.wraps(real)
    def loss(chosen_logps, **kwargs):
        value = real(chosen_logps, **kwargs)
        calls.extend([1] * chosen_logps.requires_grad)  # two micro-batches a step, a chunk each
        spoiled = chosen_logps.requires_grad and len(calls) == 2 * step - 1
        return harm(chosen_logps, value) if spoiled else value
    patch.setitem(LOSSES, "dpo", loss)


def spoil_first(logps, loss):
    return torch.cat([loss[:1] * math.nan, loss[1:]])


def first_is_infinite(logps, loss):
    return torch.cat([loss[:1] + math.inf, loss[1:]])


def spoil_gradient(logps, loss):
    logps.register_hook(lambda g: g * math.inf)
    return loss


@pytest.mark.parametrize("harm, one_pair", [(spoil_first, True), (first_is_infinite, True),
                                            (spoil_gradient, False)])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_the_update(
        harm, one_pair, damaged, here, monkeypatch):
    """One line names the step and the pair's line (all lines, where only the gradient is bad); the checkpoint
    of the step before is intact and leads to the right end."""
    with monkeypatch.context() as patch:
        poison(patch, 4, harm)
        status, line = end()
    assert status == 1 and line.startswith("train.py: step 4: mean loss ") and "\n" not in line
    assert "stopped before the update, the checkpoints are intact" in line
    pairs, _ = data.hold_out(data.load(["d.jsonl"], BYTES, 64)[0])
    micros = data.micro_batches(pairs, data.step_indices(len(pairs), 6, 0, 3), 4)
    lines = [pairs.where[i] for micro in micros for i in micro]
    assert re.findall(r"d\.jsonl:\d+", line) == (lines[:1] if one_pair else lines)
    assert sorted(p.stem for p in Path("run/checkpoints").glob("*.json")) == ["step-0000002", "step-0000003"]
    same_result(go(resume=True), damaged / "full")


def test_weights_that_are_not_finite_after_the_last_update_are_not_saved(here):
    status, line = end(lr=1e30, steps=1, warmup_steps=0)
    assert status == 1 and "step 1: the held-out loss is nan after the update; not saved" in line
    assert not Path("run/checkpoints").exists() and not Path("run/model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------
# The reference, remembered


def remembering(place, dtype="float32"):
    """(a Reference with a Memory in the folder, its pairs, the list of batches on which it ran its model)."""
    pairs, cfg, ran = data.load(["d.jsonl"], BYTES, 64)[0].without_scores(), config("dpo", dtype=dtype), []
    model = small(0).to(getattr(torch, dtype))

    def response_logps(batch):
        ran.append(batch.pair.tolist())
        return train.response_logps(model, batch, cfg)
    memory = Memory(place, pairs, dtype)
    return Reference(model, partial(train.hidden_states, model, cfg=cfg), response_logps, memory), pairs, ran


def batch_of(pairs, *numbers):
    return data.collate([pairs[i] for i in numbers])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_pair_is_filled_in_by_the_micro_batch_that_first_reads_it_and_the_model_never_runs_on_it_again(
        dtype, here):
    """Bit for bit, also among other pairs later, and for another process; the rest of the file is NaN."""
    reference, pairs, ran = remembering(here, dtype)
    values = np.load("reference-train.npy")
    assert values.dtype == dtype and np.isnan(values).all()
    assert len(values) == pairs.rows[:, 2:4].sum()  # the response tokens
    batch = batch_of(pairs, 5, 2, 9)
    expected = reference.response_logps(batch)
    assert torch.equal(reference(batch, False)[0], expected) and ran == [[5, 2, 9]] * 2
    assert np.isfinite(np.load("reference-train.npy")).sum() == len(expected)
    for again, _, more in ((reference, 0, ran), remembering(here, dtype)):
        more.clear()
        for k, number in enumerate((5, 2, 9)):
            part = expected[batch.starts[k]:batch.starts[k + 1]]
            assert torch.equal(again(batch_of(pairs, number), False)[0], part)
        assert torch.equal(again(batch, False)[0], expected) and not more
    reference(batch_of(pairs, 2, 0), False)
    assert ran == [[2, 0]]


def test_a_pair_that_was_written_in_part_is_made_again_and_others_keep_their_numbers(here):
    reference, pairs, ran = remembering(here)
    batch = batch_of(pairs, 4, 7)
    expected, places = reference(batch, False)[0], reference.memory.places([7])
    reference.memory.values[places[1:]] = np.nan
    reference.memory.values[reference.memory.places([4])] = -1.5
    again = reference(batch, False)[0]
    cut = batch.starts[1]
    assert ran == [[4, 7]] * 2 and (again[:cut] == -1.5).all() and torch.equal(again[cut:], expected[cut:])


def test_a_file_that_is_damaged_is_made_anew_and_an_evaluation_asks_the_model(here):
    """And a stand-in of weight 0, another rank's pair, is not written down."""
    reference, pairs, ran = remembering(here)
    reference(batch_of(pairs, 1), False)
    os.truncate("reference-train.npy", 200)
    reference, pairs, ran = remembering(here)
    assert np.isnan(reference.memory.values).all()
    batch = batch_of(pairs, 1)
    logps, hidden = reference(batch, True)
    assert logps is None and hidden.shape == (len(batch.target), 16) and not ran
    batch.weight = 0
    assert reference(batch, False)[0].isfinite().all() and np.isnan(reference.memory.values).all()


@pytest.mark.slow
def test_a_run_and_the_runs_that_resume_it_ask_the_model_once_for_each_pair(here, monkeypatch):
    """A micro-batch runs the reference where one of its pairs is new, and not in a later epoch."""
    ran, real = [], train.response_logps

    def counting(model, batch, cfg):
        ran.append(batch.pair.tolist())
        return real(model, batch, cfg)
    monkeypatch.setattr(train, "response_logps", counting)
    pairs, _ = data.hold_out(data.load(["d.jsonl"], BYTES, 64)[0])
    seen, expected = set(), []
    for i in range(6):
        for micro in data.micro_batches(pairs, data.step_indices(len(pairs), 6, 0, i), 4, 2048):
            if not seen.issuperset(micro.tolist()):
                expected.append(micro.tolist())
            seen |= set(micro.tolist())
    assert len(pairs) == 17 and 5 <= len(expected) < 12
    go("one", dtype="float64")
    assert ran == expected and np.load("one/reference-train.npy").dtype == np.float64
    ran.clear()
    go(steps=2)
    go(steps=4, resume=True)
    go(steps=6, resume=True)
    assert ran == expected and np.isfinite(np.load("run/reference-train.npy")).all()
    ran.clear()
    go("tdpo", loss="tdpo1", steps=1)  # needs whole distributions
    assert not ran and not list(Path("tdpo").glob("*.npy"))
