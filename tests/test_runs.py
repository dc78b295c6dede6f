"""runs.py and the loop around it: exact resume, signals, locks, damaged or foreign state, numerical guards.

Runs take milliseconds: 16 channels, 45 pairs, bytes as tokens. Kills at every write are in kill.py, of which
a short version runs here.
"""

import errno
import fcntl
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import health
import runs
import train
from model import GPT, GPTConfig
from runs import ConfigError, RunError

pytestmark = pytest.mark.slow  # processes and training: seconds each

BYTES = data.Tokenizer("bytes")
HERE = Path(__file__).resolve().parent
TIMING = {"pairs_per_s", "tokens_per_s", "mfu", "peak_memory"}


# ---------------------------------------------------------------------------------------------------------
# Helpers


def write_pairs(path, n=45, seed=0):
    """Pairs of different lengths, with two scores a segment."""
    r = random.Random(seed)

    def response():
        return [{"text": f"{r.choice(['red', 'a', 'green tree'])}{i}. ", "scores": [r.randint(0, 4), 1]}
                for i in range(r.randint(1, 4))]

    pairs = [{"prompt": f"Q{'?' * (i % 5)}{i}", "chosen": response(), "rejected": response()}
             for i in range(n)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def write_model(folder, seed, tokenizer=BYTES):
    torch.manual_seed(seed)
    GPT(GPTConfig(tokenizer.vocab_size, 64, 1, 2, 16)).save_pretrained(folder)
    tokenizer.save(folder)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with the data d.jsonl and the models a and b."""
    folder = tmp_path_factory.mktemp("inputs")
    write_pairs(folder / "d.jsonl")
    for seed, name in enumerate("ab"):
        write_model(folder / name, seed)
    return folder


@pytest.fixture
def here(inputs, tmp_path, monkeypatch):
    """A working directory of its own with copies of the inputs, so that relative names work."""
    for path in inputs.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(out_dir="run", **changes):
    plain = {"loss": "dpo", "data": ("d.jsonl",), "init": "a", "out_dir": out_dir, "device": "cpu",
             "steps": 6, "batch_size": 6, "micro_batch_size": 4, "lr": 1e-3,
             "log_every": 1, "eval_every": 2, "save_every": 1}
    if changes.get("loss") == "sft":
        plain |= {"init": None, "tokenizer": "bytes", "n_layer": 1, "n_head": 2, "n_embd": 16,
                  "block_size": 64}
    return train.Config(**plain | changes)


def go(out_dir="run", **changes):
    train.train(config(out_dir, **changes))
    return Path(out_dir)


def main(flags):
    """The exit status and message of train.py as a command; a sys.exit(text) is status 1."""
    try:
        train.main(flags.split() if isinstance(flags, str) else flags)
    except SystemExit as e:
        return (1, e.code) if isinstance(e.code, str) else (e.code, None)
    return 0, None


def contents(folder):
    """{name: bytes} of all files in a folder but the lock."""
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def numbers(folder):
    """{step: the logged numbers of its training step, without times}."""
    steps = [r for r in records(folder) if "loss" in r]
    return {r["step"]: {k: v for k, v in r.items() if k not in TIMING} for r in steps}


def same_result(one, other, step=6):
    """Weights, moments and logged numbers are equal to the byte."""
    for name in ("model.safetensors", f"checkpoints/step-{step:07}.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert numbers(one) == numbers(other) and list(numbers(one)) == list(range(1, step + 1))


class Killed(BaseException):
    """What stops a run like a kill does: nothing in train.py or runs.py may catch it."""


def at_log_line(monkeypatch, step, action):
    """Do something when the training record of a step is logged; undone when the returned context is left."""
    real = runs.Log.write

    def write(log, record):
        real(log, record)
        if record.get("step") == step and "loss" in record:
            action()
    monkeypatch.setattr(runs.Log, "write", write)


def killed_at(step, **changes):
    """A run that was killed when it logged this step."""
    def kill():
        raise Killed
    with pytest.MonkeyPatch.context() as patch:
        at_log_line(patch, step, kill)
        with pytest.raises(Killed):
            go(**changes)
    return Path(changes.get("out_dir", "run"))


# ---------------------------------------------------------------------------------------------------------
# Exact resume


@pytest.mark.parametrize("loss", ["dpo", "tdpo2", "2d-dpo", "sft"])
def test_six_steps_are_three_and_resume_and_three_to_the_byte(loss, here):
    """Although three steps read fewer pairs, so that the reference is stored for fewer of them first."""
    full = go("full", loss=loss)
    go("run", loss=loss, steps=3)
    same_result(go("run", loss=loss, resume=True), full)


def test_a_run_killed_between_two_checkpoints_ends_like_one_that_was_not(here):
    full = go("full", save_every=2)
    killed_at(5, save_every=2)
    same_result(go("run", save_every=2, resume=True), full)


def test_without_a_store_too_resume_is_exact(here):
    full = go("full", ref_cache=False)
    killed_at(4, ref_cache=False)
    same_result(go("run", ref_cache=False, resume=True), full)


def test_another_micro_batch_size_resumes_up_to_rounding(here):
    full = go("full")
    killed_at(4)
    go("run", micro_batch_size=2, resume=True)
    one, other = (load_file(folder / "model.safetensors") for folder in (full, Path("run")))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=2e-5)
    moved = load_file("a/model.safetensors")
    assert max((one[name] - moved[name]).abs().max() for name in one) > 1e-3  # of what training does


def test_the_flags_of_a_run_need_not_be_said_again_and_may_be(here, capsys):
    flags = ("--loss dpo --data d.jsonl --tokenizer bytes --n_layer 1 --n_head 2 --n_embd 16 --block_size 64 "
             "--sft_steps 2 --out_dir dpo --batch_size 6 --micro_batch_size 4 --save_every 1 --steps ")
    assert main(flags + "4")[0] == 0
    shutil.copytree("dpo", "again")
    assert main("--resume --out_dir dpo --steps 6")[0] == 0
    assert main(flags.replace("--out_dir dpo", "--out_dir again --resume") + "6")[0] == 0
    assert Path("dpo/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    assert runs.read_run("dpo")["config"]["steps"] == 6


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_result(here, monkeypatch):
    """Not "finished": the model and its tokenizer were not written yet."""
    full = go("full")

    def kill(*_):
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_folder", kill)
        with pytest.raises(Killed):
            go("run")
    assert not Path("run/model.safetensors").exists()
    same_result(go("run", resume=True), full)
    assert runs.read_run("run")["finished"] == 6


def test_fewer_steps_than_were_made_are_refused_finished_or_not(here):
    killed_at(5)
    with pytest.raises(ConfigError, match="--steps 3: the run is at step 4 already"):
        go("run", steps=3, resume=True)
    go("run", resume=True)
    with pytest.raises(ConfigError, match="--steps 3: the run is at step 6 already"):
        go("run", steps=3, resume=True)


def test_the_log_of_a_resumed_run_has_each_step_once_and_lines_cut_short_are_dropped(here):
    full = go("full")
    killed_at(4)
    log = Path("run/log.jsonl")
    log.write_bytes(log.read_bytes() + b'{"step": 2, "loss": 1}\n{"step": 3, "lo\xff')
    go("run", resume=True)
    steps = [r["step"] for r in records(Path("run")) if "loss" in r]
    assert steps == [1, 2, 3, 2, 4, 5, 6]  # the 2 that was made up here is a whole line
    assert [r["step"] for r in records(full) if "eval/loss" in r] == [0, 2, 4, 6] \
        == [r["step"] for r in records(Path("run")) if "eval/loss" in r]
    assert [r["resumed_at"] for r in records(Path("run")) if "resumed_at" in r] == [0, 3]


# ---------------------------------------------------------------------------------------------------------
# What --resume finds


def test_an_absent_folder_is_an_error_and_is_not_made(here, capsys):
    assert main("--resume --out_dir nowhere")[0] == 2
    assert "nowhere/run.json: No such file" in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_a_folder_of_this_run_without_a_checkpoint_starts_at_0(here):
    full = go("full")
    killed_at(2, save_every=0)
    assert not Path("run/checkpoints").exists()
    same_result(go("run", resume=True), full)


def test_a_finished_run_says_so_ends_with_0_and_touches_nothing(here, capsys):
    go()
    before = contents(Path("run"))
    assert main("--resume --out_dir run") == (0, None)
    assert "run: finished at step 6" in capsys.readouterr().out
    assert contents(Path("run")) == before


def change_data(folder):
    text = Path("d.jsonl").read_text()
    Path("d.jsonl").write_text(text.replace("red", "rad", 1))


def change_reference(folder):
    tensors = load_file("b/model.safetensors")
    tensors["transformer.wpe.weight"][3, 3] += 1
    save_file(tensors, "b/model.safetensors", {"format": "pt"})


def change_tokenizer(folder):
    """The same number of ids, two of them exchanged, in the policy's folder and the reference's."""
    vocabulary = json.loads(Path("a/vocab.json").read_text())
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    for model in "ab":
        Path(model, "vocab.json").write_text(json.dumps(vocabulary))


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
def test_resume_with_something_else_than_the_runs_is_refused_and_names_it(what, changes, prepare, here):
    folder = go("run", ref="b", steps=2)
    before = contents(folder)
    if prepare:
        prepare(folder)
    with pytest.raises(ConfigError, match="--resume: not the run in run: .*" + re.escape(what)):
        go("run", **{"ref": "b", "resume": True} | changes)
    assert contents(folder) == before


def test_resume_keeps_the_original_reference(here):
    """Said or not; and not the start, nor the policy as it is now."""
    go("run", ref="b", steps=2)
    identity = runs.read_run("run")["identity"]
    assert main("--resume --out_dir run --steps 3")[0] == 0
    run = runs.read_run("run")
    assert run["identity"] == identity and run["config"]["ref"] == str(Path("b").resolve())
    assert identity["ref"] == runs.weights_hash(GPT.from_pretrained("b")) != identity["init"]


def test_the_result_of_dpo_as_a_start_without_ref_says_that_it_is_now_the_reference(here, capsys):
    go("first", steps=1)
    go("second", steps=1, init="first")
    assert "--init first is itself the result of dpo; without --ref it is now the reference" \
        in capsys.readouterr().out
    go("third", steps=1, init="first", ref="a")
    assert "now the reference" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
# Checkpoints


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a byte of the weights": lambda c: flip(c / "step-0000005.safetensors", -1),
    "a byte of the weights' header": lambda c: flip(c / "step-0000005.safetensors", 2),
    "weights cut short": lambda c: os.truncate(c / "step-0000005.safetensors", 1000),
    "no weights": lambda c: (c / "step-0000005.safetensors").unlink(),
    "a number in the JSON": lambda c: edit_json(c / "step-0000005.json", step=4),
    "an evaluation in the JSON": lambda c: edit_json(c / "step-0000005.json", before={}),
    "JSON cut short": lambda c: os.truncate(c / "step-0000005.json", 100),
    "JSON empty": lambda c: os.truncate(c / "step-0000005.json", 0),
    "JSON nested too deeply": lambda c: (c / "step-0000005.json").write_text("[" * 10**5),
    "another run's": lambda c: [shutil.copy(p, c) for p in Path("other/checkpoints").glob("step-0000005.*")],
}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="session")
def damaged(inputs, tmp_path_factory):
    """An uninterrupted run, one killed at its sixth step, and another run's folder, as templates."""
    folder = tmp_path_factory.mktemp("templates")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        go(str(folder / "full"))
        killed_at(6, out_dir=str(folder / "run"))
        go(str(folder / "other"), seed=1)
    return folder


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_newest_checkpoint_is_recognised_and_the_older_one_used(what, damaged, here, capsys):
    for name in ("full", "run", "other"):
        shutil.copytree(damaged / name, name)
    DAMAGE[what](Path("run/checkpoints"))
    go("run", resume=True)
    out = capsys.readouterr().out
    assert re.search(r"step-0000005.json: skipped \(.+\); looking for an older checkpoint", out), out
    assert "going on after step 4" in out
    same_result(Path("run"), Path("full"))


def test_when_no_checkpoint_is_intact_the_run_stops_and_starts_over_only_when_told(damaged, here):
    shutil.copytree(damaged / "run", "run")
    for path in Path("run/checkpoints").glob("*.safetensors"):
        flip(path, -1)
    before = contents(Path("run"))
    with pytest.raises(ConfigError, match="--resume: no checkpoint in run is intact; --overwrite"):
        go("run", resume=True)
    assert contents(Path("run")) == before
    go("run", overwrite=True)
    same_result(Path("run"), Path(shutil.copytree(damaged / "full", "full")))


def test_the_last_two_checkpoints_are_kept_and_nothing_that_a_kill_left(here):
    killed_at(4)
    folder = Path("run/checkpoints")
    for name in ("step-0000001.safetensors", "step-0000004.safetensors.part", ".tmpAbC", "step-0000009.json"):
        (folder / name).write_text("left by a kill, or damaged")
    go("run", resume=True)
    assert sorted(p.name for p in folder.iterdir()) == [
        f"step-000000{n}.{kind}" for n in (5, 6) for kind in ("json", "safetensors")]


def test_a_checkpoint_holds_weights_moments_and_step_of_every_parameter(here):
    go(steps=2)
    tensors = load_file("run/checkpoints/step-0000002.safetensors")
    names = dict(GPT.from_pretrained("run").named_parameters())
    assert tensors.keys() == {f"{key}.{name}" for key in ("model", *runs.MOMENTS) for name in names}
    assert all(tensors[f"step.{name}"] == 2 for name in names)


def test_the_result_holds_no_path_and_no_time(here):
    """Two runs, in folders of different names, one second and more apart: the same bytes."""
    one = go("one", steps=2)
    os.makedirs("deeper/elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.time", lambda: 4e9)
        other = go("deeper/elsewhere/other", steps=2)
    for name in ("model.safetensors", "config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    with safe_open(one / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_a_file_appears_under_its_name_only_when_it_is_whole(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def write(part):
        part.write_text("half")
        raise Killed
    with pytest.raises(Killed):
        runs.write_atomically(path, write)
    assert contents(tmp_path) == {"x": b"old"}


def test_a_file_is_on_the_disk_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.fstat(fd).st_ino) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    runs.write_json(tmp_path / "x", {})
    assert calls == [(tmp_path / "x").stat().st_ino, "rename", tmp_path.stat().st_ino]


# ---------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(number, status, here, monkeypatch, capsys):
    full, handlers = go("full"), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        at_log_line(patch, 3, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as stopped:
            go("run", save_every=0)
    assert stopped.value.code == status
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    out = capsys.readouterr().out
    assert f"{number.name}: stopped after step 3 and saved" in out
    command = re.search(r"python train.py (.*)", out[out.index("stopped after"):])[1]
    assert main(command) == (0, None)
    same_result(Path("run"), full)


def test_a_signal_during_an_evaluation_ends_the_next_step_and_is_saved_too(here, monkeypatch, capsys):
    real, calls = train.evaluate, []

    def evaluate(*args):
        calls.append(None)
        if len(calls) == 2:  # that of step 2, when what follows step 2 is decided already
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(train, "evaluate", evaluate)
    with pytest.raises(SystemExit):
        go("run", save_every=0)
    assert "stopped after step 3 and saved" in capsys.readouterr().out
    assert [p.name for p in Path("run/checkpoints").glob("*.json")] == ["step-0000003.json"]


def test_a_signal_in_the_last_step_changes_nothing(here, monkeypatch):
    at_log_line(monkeypatch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert runs.read_run(go())["finished"] == 6


def test_a_second_signal_ends_at_once_without_a_traceback(here, monkeypatch, capsys):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    go(steps=2)
    at_log_line(monkeypatch, 4, twice)
    assert main("--resume --out_dir run --steps 6") == (130, None)
    assert "train.py: interrupted; --resume goes on from the last checkpoint" in capsys.readouterr().err


def test_a_signal_while_the_reference_is_made_says_that_the_same_command_goes_on(here, monkeypatch, capsys):
    flags = ("--loss dpo --data d.jsonl --tokenizer bytes --n_layer 1 --n_head 2 --n_embd 16 --block_size 64 "
             "--sft_steps 3 --steps 2 --batch_size 6 --log_every 1 --out_dir dpo")
    with monkeypatch.context() as patch:
        at_log_line(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main(flags) == (143, None)
    assert "stopped after step 1 and saved; go on by the same command again" in capsys.readouterr().out
    assert main(flags) == (0, None)
    assert "going on after step 1" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
# The folder


def test_a_second_writer_is_refused(here):
    go(steps=2)
    with open("run/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for how in ({"resume": True}, {"overwrite": True}):
            before = contents(Path("run"))
            with pytest.raises(ConfigError, match="--out_dir run: another process is writing there"):
                go("run", **how)
            assert contents(Path("run")) == before
    go("run", resume=True)  # a lock ends with its process, no file has to be removed


def test_the_lock_is_held_while_a_run_trains_and_free_after_it(here, monkeypatch):
    found = []

    def look():
        with open("run/.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append("free")
            except BlockingIOError:
                found.append("held")
    at_log_line(monkeypatch, 2, look)
    go()
    look()
    assert found == ["held", "free"]


def test_a_folder_with_another_run_is_left_alone_until_told(here, capsys):
    go("run", steps=2)
    before = contents(Path("run"))
    with pytest.raises(ConfigError, match="--out_dir run: holds a dpo run; choose --resume, --overwrite"):
        go("run", loss="dpop")
    assert contents(Path("run")) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_files_is_never_written_to_even_with_overwrite(overwrite, here):
    """A model folder that is no run's, say: --overwrite replaces runs only."""
    before = contents(Path("b"))
    with pytest.raises(ConfigError, match=r"--out_dir b: holds 5 files \(config.json, ...\) and is no run's"):
        go("b", overwrite=overwrite)
    assert contents(Path("b")) == before


def test_a_folder_in_which_a_run_was_killed_before_it_wrote_its_first_file_is_free(here):
    Path("run").mkdir()
    for name in (".lock", "run.json.part", ".tmpAbCdEf"):
        (Path("run") / name).touch()
    go()


def test_overwrite_replaces_all_that_the_old_run_wrote_and_nothing_else(here):
    """A tokenizer of the old run's kind beside the new one's would be read in its place."""
    words = data.Tokenizer(HERE.parent / "toy" / "toy.tiktoken")
    write_model(Path("w"), 2, words)
    go("run", steps=6)
    Path("run/my notes.txt").write_text("mine")
    (Path("run/checkpoints") / "step-0000008.json").write_text("{}")
    go("run", init="w", steps=3, overwrite=True, save_every=0)
    fresh = go("fresh", init="w", steps=3, save_every=0)
    assert Path("run/my notes.txt").read_text() == "mine"
    assert set(contents(Path("run"))) - {"my notes.txt"} == set(contents(fresh))
    assert data.Tokenizer("run").hash == words.hash
    same_result(Path("run"), fresh, step=3)


def test_overwrite_that_is_killed_leaves_a_folder_that_overwrite_accepts(here, monkeypatch):
    """run.json goes last."""
    go("run", steps=2)
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
            go("run", overwrite=True)
    assert Path("run/run.json").exists() and not list(Path("run/checkpoints").iterdir())
    go("run", overwrite=True)


def test_another_process_that_came_between_the_check_and_the_lock_is_noticed(here):
    go("run", steps=1)
    with pytest.raises(ConfigError, match="--out_dir run: holds a dpo run"):
        runs.claim(Path("run"), {}, resume=False, overwrite=False)


# ---------------------------------------------------------------------------------------------------------
# A disk that is full, a folder that cannot be written


@pytest.mark.parametrize("name, number", [
    ("run.json", errno.ENOSPC), ("log.jsonl", errno.EROFS), ("reference-train.npy", errno.ENOSPC),
    ("reference-val.json", errno.EIO), ("step-0000003.safetensors", errno.ENOSPC),
    ("step-0000003.json", errno.EROFS), ("model.safetensors", errno.ENOSPC)])
def test_a_write_that_fails_is_one_line_with_status_1_and_what_was_saved_is_intact(
        name, number, damaged, here, monkeypatch, capsys):
    real = os.replace

    def replace(part, path):
        if Path(path).name == name:
            raise OSError(number, os.strerror(number))
        real(part, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        status, line = main("--data d.jsonl --init a --out_dir run --steps 6 --batch_size 6 --lr 1e-3 "
                            "--micro_batch_size 4 --log_every 1 --eval_every 2 --save_every 1")
    assert status == 1 and re.fullmatch(
        rf"train.py: run/\S*: cannot be written \({os.strerror(number)}\); what was saved before is intact, "
        "--resume goes on from there", line), line
    assert not list(Path("run").rglob("*.part"))
    go("run", resume=Path("run/run.json").exists())
    same_result(Path("run"), damaged / "full")


def test_a_log_line_that_does_not_fit_is_a_run_error_and_is_dropped_later(damaged, here, monkeypatch):
    class Full:
        def __init__(self, path, *args, **kwargs):
            self.f = open(path, *args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.f.close()

        def write(self, line):
            return self.f.write(line[:20] if b'"step": 4' in line else line)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "open", lambda path, mode="r", **more: (Full if "a" in mode else open)(
            path, mode, **more), raising=False)
        with pytest.raises(RunError, match="run/log.jsonl: cannot be written .No space left on device."):
            go()
    same_result(go(resume=True), damaged / "full")


def test_a_folder_that_cannot_be_made_is_bad_input(here, monkeypatch, capsys):
    def mkdir(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert main("--data d.jsonl --init a --out_dir run --steps 1")[0] == 2
    assert "--out_dir run: Permission denied; choose a folder that can be written" in capsys.readouterr().err


def test_a_kill_at_any_write_or_moment_and_a_full_disk_leave_what_resume_needs(tmp_path):
    """The short version of kill.py, in a process of its own because it forks."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, HERE / "kill.py", "--short"], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0 and "all survived" in done.stdout, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------
# Numerical guards


def poison(monkeypatch, step, harm):
    """Let harm(chosen_logps, loss) change the loss of the first chunk of a training step."""
    real, calls = train.LOSSES["dpo"], []

    @functools.wraps(real)
    def loss(chosen_logps, *args, **kwargs):
        value = real(chosen_logps, *args, **kwargs)
        if chosen_logps.requires_grad:
            calls.append(None)
            if len(calls) == 2 * step - 1:  # two micro-batches, a chunk each
                return harm(chosen_logps, value)
        return value
    monkeypatch.setitem(train.LOSSES, "dpo", loss)


def spoil_first(bad):
    return lambda logps, loss: torch.cat([loss[:1] * bad, loss[1:]])


def add_to_first(bad):
    return lambda logps, loss: torch.cat([loss[:1] + bad, loss[1:]])


def spoil_gradient(factor):
    def harm(logps, loss):
        logps.register_hook(lambda g: g * factor)
        return loss
    return harm


@pytest.mark.parametrize("harm, one_pair", [
    (spoil_first(math.nan), True), (add_to_first(math.inf), True),
    (spoil_gradient(math.inf), False), (spoil_gradient(math.nan), False),
], ids=["NaN loss", "infinite loss, finite gradient", "infinite gradient", "NaN gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_the_update(
        harm, one_pair, damaged, here, monkeypatch, capsys):
    """The message names the step, the pair's line (all lines, where only the gradient is bad) and the largest
    log-ratio; the checkpoint of the step before is intact and leads to the right end."""
    with monkeypatch.context() as patch:
        poison(patch, 4, harm)
        with pytest.raises(RunError) as stopped:
            go()
    text = str(stopped.value)
    assert text.startswith("step 4: mean loss ") and "stopped before the update" in text
    assert re.search(r"Largest log-ratio: \d+\.\d nats", text)
    pairs, _ = data.hold_out(data.load(["d.jsonl"], BYTES, 64)[0])
    micros = data.micro_batches(pairs, data.step_indices(len(pairs), 6, 0, 3), 4)
    lines = [pairs.where[i] for micro in micros for i in micro]
    assert re.findall(r"d\.jsonl:\d+", text) == (lines[:1] if one_pair else lines)
    assert sorted(p.stem for p in Path("run/checkpoints").glob("*.json")) == ["step-0000002", "step-0000003"]
    same_result(go(resume=True), damaged / "full")


def test_main_ends_with_status_1_and_one_line_where_a_run_cannot_go_on(here, monkeypatch):
    poison(monkeypatch, 1, spoil_first(math.nan))
    status, line = main("--data d.jsonl --init a --out_dir run --steps 2 --batch_size 6 --micro_batch_size 4")
    assert status == 1 and line.startswith("train.py: step 1: mean loss nan") and "\n" not in line


def test_weights_that_are_not_finite_after_the_last_update_are_not_saved(here):
    with pytest.raises(RunError, match="step 1: the held-out loss is nan after the update; not saved"):
        go(lr=1e30, steps=1, warmup_steps=0)
    assert not Path("run/checkpoints").exists() and not Path("run/model.safetensors").exists()


@pytest.mark.parametrize("flag", ["init", "ref"])
def test_a_model_with_a_weight_that_is_not_finite_is_refused(flag, here):
    tensors = load_file("b/model.safetensors")
    tensors["transformer.wpe.weight"][3, 3] = math.nan
    save_file(tensors, "b/model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=f"--{flag} b: wpe.weight holds NaN or infinity"):
        go(**{flag: "b"})
    assert not Path("run").exists()


def test_a_start_whose_loss_is_nan_does_not_pass_for_log_2():
    cfg = train.Config(dtype="float32", beta=0.1)
    with pytest.raises(RunError, match="policy and reference are equal, yet"):
        health.check_start(cfg, {"loss": math.nan, "rewards/margins": 0.0})


def test_a_spike_is_five_times_the_median_of_at_least_ten_steps_before_it():
    usual = deque(maxlen=20)
    assert not any(health.is_spike(usual, x) for x in [100.0] + 9 * [1.0])  # nothing to compare with yet
    assert not health.is_spike(usual, 4.9) and health.is_spike(usual, 5.1)
    assert not health.is_spike(usual, 9.9, least=10) and health.is_spike(usual, 10.1, least=10)


def test_the_largest_log_ratio_is_that_of_either_response_and_nan_is_the_largest():
    rows = [{"chosen_logps": torch.tensor([-1.0, -2.0]), "ref_chosen_logps": torch.tensor([-1.0, -3.0]),
             "rejected_logps": torch.tensor([-9.0, -2.0]), "ref_rejected_logps": torch.tensor([-2.0, -2.5]),
             "loss": torch.tensor([0.5, 0.25])}]
    assert health.largest_logratio(rows) == (7.0, 0, 0.75)
    rows[0]["chosen_logps"][1] = math.nan
    ratio, which, _ = health.largest_logratio(rows)
    assert math.isnan(ratio) and which == 1
    assert health.largest_logratio([{k: v for k, v in rows[0].items() if "ref" not in k}])[0] is not None


def test_a_jump_of_the_gradient_norm_or_of_a_log_ratio_is_logged_with_its_step(here, monkeypatch, capsys):
    real, calls = health.largest_logratio, []

    def largest(rows):
        calls.append(None)
        ratio, which, total = real(rows)
        return (torch.tensor(55.0) if len(calls) == 14 else ratio), which, total
    monkeypatch.setattr(health, "largest_logratio", largest)
    poison(monkeypatch, 12, spoil_gradient(1e6))
    go(steps=15, lr=1e-5, save_every=0)
    notes = [(r["step"], r["note"]) for r in records(Path("run")) if "jumps" in r.get("note", "")]
    assert [step for step, _ in notes] == [12, 14]
    assert re.fullmatch(r"step 12: the gradient norm jumps to \d+\.\d\d", notes[0][1])
    assert re.fullmatch(r"step 14: the largest log-ratio jumps to 55.0 nats, d.jsonl:\d+", notes[1][1])
    out = capsys.readouterr().out
    assert all(f"  {text}\n" in out for _, text in notes)


@pytest.mark.parametrize("step, numbers, name", [
    (50, {"rewards/margins": 0.0}, "stuck"),
    (5, {"rewards/margins": 0.1, "rewards/accuracies": 1.0}, "early"),
    (30, {"rewards/margins": 0.1, "logratio/chosen": -10.1}, "unlearned"),
])
def test_numbers_that_usually_mean_a_mistake_raise_one_alarm_each(step, numbers, name):
    assert health.alarms(step, numbers).keys() == {name}
    assert health.verdict(step, numbers) == health.alarms(step, numbers)[name]


@pytest.mark.parametrize("step, numbers", [
    (49, {"rewards/margins": 0.0}), (50, {"rewards/margins": 1e-9}), (50, {"loss": 0.69}),
    (6, {"rewards/margins": 0.1, "rewards/accuracies": 1.0}),
    (5, {"rewards/margins": 0.1, "rewards/accuracies": 0.999}),
    (30, {"rewards/margins": 0.1, "logratio/chosen": -9.9}),
])
def test_numbers_beside_those_raise_none(step, numbers):
    assert not health.alarms(step, numbers)


def test_an_alarm_of_the_training_steps_is_said_and_logged_once(here, monkeypatch, capsys):
    monkeypatch.setattr(health, "alarms", lambda step, m: {"x": f"look at {step}"} if step > 2 else {})
    go(eval_every=0)
    assert [r["note"] for r in records(Path("run")) if "note" in r] == ["look at 3"]
    assert capsys.readouterr().out.count("  look at 3\n") == 1


def test_fp16_is_refused_with_the_reason(here):
    with pytest.raises(ConfigError, match="--dtype float16: small gradients vanish in its range; choose bfl"):
        go(dtype="float16")
    assert not Path("run").exists()
