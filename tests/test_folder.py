"""A run's folder: exact resume, signals, what others read of it, the lock, damaged or foreign state, full
disks; and the reference's remembered numbers, which lie there.

Runs take a fraction of a second: 16 channels, bytes as tokens, 17 pairs and one held out, 6 steps of 6 pairs.
Writes that fail are tried one by one.
"""

import errno
import functools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from test_train import BYTES, arguments, config, make_records, save_model, small, write_lines

import data
import model as architecture
import train
from losses import LOSSES
from plumbing import files, folder
from plumbing.reference import Memory, Reference

pytestmark = pytest.mark.slow

TIMING = {"pairs_per_s", "tokens_per_s", "peak_memory"}
PLAIN = {"loss": "dpo", "data": "d.jsonl", "init": "a", "device": "cpu", "steps": 6, "batch_size": 6,
         "micro_batch_size": 4, "lr": 1e-3, "log_every": 1, "eval_every": 2, "save_every": 1}
SIZES = {"init": None, "tokenizer": "bytes", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 64}
SLOW = pytest.mark.slow

@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """A folder with the data d.jsonl, the models a and b, the run `full`, `ref` (2 steps, --ref b), and
    `killed`, which died when it logged its sixth step."""
    place = tmp_path_factory.mktemp("templates")
    write_lines(place / "d.jsonl", make_records(18))
    for seed, name in enumerate("ab"):
        save_model(place / name, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        go("full")
        go("ref", steps=2, ref="b")
        killed_at(6, out_dir="killed")
    return place

@pytest.fixture
def here(templates, tmp_path, monkeypatch):
    """A working directory of its own with copies of the inputs, so that relative names work."""
    for name in "ab":
        shutil.copytree(templates / name, tmp_path / name)
    shutil.copy(templates / "d.jsonl", tmp_path)
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
    """A run is bad input: status 2, one line with these words, no hash; the folder stays as it is."""
    def check(words, out_dir="run", **changes):
        before = contents(out_dir)
        capsys.readouterr()
        assert end(out_dir=out_dir, **changes) == (2, None)
        error = capsys.readouterr().err
        assert error.startswith("train.py: error: ") and error.count("\n") == 1 and words in error, error
        assert contents(out_dir) == before and not re.search("[0-9a-f]{20}", error)
    return check

def contents(place):
    """{name: bytes} of all files in a folder but the lock."""
    return {str(p.relative_to(place)): p.read_bytes()
            for p in sorted(Path(place).rglob("*")) if p.is_file() and p.name != ".lock"}

def records(place):
    return [json.loads(line) for line in Path(place, "log.jsonl").read_text().splitlines()]

def numbers(place):
    """{step: the logged numbers of its training step, without times}; each step stands there once."""
    lines = [r for r in records(place) if "loss" in r]
    assert [r["step"] for r in lines] == list(range(1, len(lines) + 1))
    return {r["step"]: {k: v for k, v in r.items() if k not in TIMING} for r in lines}

def same_result(one, other, step=6):
    """Weights, moments, remembered and logged numbers are equal to the byte."""
    for name in ("model.safetensors", f"checkpoints/step-{step:07}.safetensors", "reference-train.bin"):
        a, b = Path(one, name), Path(other, name)
        assert a.exists() == b.exists() == (name[0] != "r" or a.exists()), name
        if name[0] == "c":  # the metadata in its header has no order
            a, b = ({key: x.numpy().tobytes() for key, x in load_file(path).items()} for path in (a, b))
            assert a == b
        else:
            assert not a.exists() or a.read_bytes() == b.read_bytes(), name
    assert numbers(one) == numbers(other) and len(numbers(one)) == step
    assert folder.read_run(one)["finished"] == folder.read_run(one)["saved"] == step

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

def signal_to_me(number=signal.SIGTERM):
    os.kill(os.getpid(), number)

@pytest.mark.parametrize("loss, killed, changes", [
    ("dpo", 2, {"save_every": 0}), ("dpo", 5, {"save_every": 2}),  # nothing saved; in the second epoch
    pytest.param("tdpo2", 4, {}, marks=SLOW), pytest.param("2d-dpo", 5, {"save_every": 2}, marks=SLOW),
    pytest.param("sft", 4, {}, marks=SLOW)])
def test_a_run_that_was_killed_ends_like_one_that_was_not_to_the_byte(
        loss, killed, changes, templates, here, capsys):
    """--resume needs no other flag; the third step ends the first epoch and begins the second."""
    full = go("full", loss=loss) if loss != "dpo" else templates / "full"
    killed_at(killed, loss=loss, **changes)
    capsys.readouterr()
    train.main("--resume --out_dir run".split())
    same_result("run", full)
    said = capsys.readouterr().out
    begins_again = "run: nothing was saved before the interruption; the run begins again"
    assert (begins_again in said) == (changes == {"save_every": 0}) == ("going on after step" not in said)

def test_a_parameter_that_never_gets_a_gradient_is_resumed_without_moments(here, monkeypatch):
    class WithUnused(architecture.MLP):
        def __init__(self, config):
            super().__init__(config)
            self.unused = torch.nn.Parameter(torch.ones(3))

    monkeypatch.setattr(architecture, "MLP", WithUnused)
    full = go("full", loss="sft", steps=4)
    killed_at(3, loss="sft", steps=4)
    same_result(go(loss="sft", steps=4, resume=True), full, step=4)
    saved = load_file("run/checkpoints/step-0000004.safetensors")
    assert [name for name in saved if "unused" in name] == ["model.h.0.mlp.unused"]
    assert saved["step.h.0.mlp.c_fc.bias"] == 4

def test_more_steps_go_on_from_the_end_and_how_the_work_is_cut_may_change(templates, here, refused, capsys):
    """Up to rounding, in float64. A finished run says so and touches nothing; fewer steps are refused."""
    go("full", dtype="float64")
    go(dtype="float64", steps=3)
    before = contents("run")
    train.main("--resume --out_dir run".split())
    assert "run: finished at step 3" in capsys.readouterr().out and contents("run") == before
    train.main("--resume --out_dir run --steps 6 --micro_batch_size 2 --head_tokens 9".split())
    one, other = (load_file(f"{place}/model.safetensors") for place in ("full", "run"))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    refused("--steps 3: the run is at step 6 already", resume=True, steps=3, dtype="float64")

def test_a_resumed_run_logs_each_step_once_keeps_two_checkpoints_and_drops_what_a_kill_left(templates, here):
    shutil.copytree(templates / "killed", "run")
    log = Path("run/log.jsonl")
    log.write_bytes(log.read_bytes() + b'{"step": 4, "lo\xff\n{"step": 5, "loss": 1')
    for name in ("step-0000001.safetensors", "step-0000006.safetensors.part", ".tmpAbC"):
        Path("run/checkpoints", name).write_text("left by a kill")
    go(resume=True)
    assert sorted(os.listdir("run/checkpoints")) == [f"step-000000{n}.safetensors" for n in (5, 6)]
    for place, resumed in ((templates / "full", [0]), ("run", [0, 5])):
        assert list(numbers(place)) == [1, 2, 3, 4, 5, 6]
        assert [r["step"] for r in records(place) if "eval/loss" in r] == [0, 2, 4, 6]
        assert [r["resumed_at"] for r in records(place) if "resumed_at" in r] == resumed

# ---- Which run is it? ----

def change_data():
    Path("d.jsonl").write_text(Path("d.jsonl").read_text().replace("a", "z", 1))

def change_tokenizer():
    """The same number of ids, two of them exchanged, in the policy's folder and the reference's."""
    for path in (Path("a/tokenizer.json"), Path("b/tokenizer.json")):
        content = json.loads(path.read_text())
        content["model"]["vocab"] |= {"a": 98, "b": 97}
        path.write_text(json.dumps(content))

@pytest.mark.parametrize("says, changes, prepare", [
    ("--loss dpop: the run has dpo", {"loss": "dpop"}, None),
    ("--seed 1: the run has 0; --batch_size 7: the run has 6", {"seed": 1, "batch_size": 7}, None),
    ("--lr 0.002: the run has 0.001", {"lr": 2e-3}, None), ("--beta 0.2: the run has", {"beta": 0.2}, None),
    ("--dtype float64: the run has float32", {"dtype": "float64"}, None),
    ("--init: other model than the run's", {"init": "b"}, None),
    ("--ref: other model than the run's", {"ref": "a"}, None),
    ("--data: other pairs than the run's", {}, change_data),
    ("--tokenizer: other tokenizer than the run's", {}, change_tokenizer)])
def test_resume_with_something_else_than_the_runs_is_refused_and_names_the_flag_without_hashes(
        says, changes, prepare, templates, here, refused):
    shutil.copytree(templates / "ref", "run")
    if prepare:
        prepare()
    refused(f"--resume: not the run in run. {says}", **{"ref": "b", "resume": True, "steps": 4} | changes)

@pytest.mark.parametrize("harm", [
    lambda path: os.truncate(path, 1000), lambda path: os.truncate(path, 0), lambda path: path.unlink(),
    lambda path: path.write_bytes(b"\x02" + bytes(7) + b"{}")], ids=["cut", "empty", "gone", "no metadata"])
def test_where_the_newest_checkpoint_cannot_be_read_it_is_said_and_the_one_before_is_used(
        harm, templates, here, capsys):
    shutil.copytree(templates / "killed", "run")
    newest = Path("run/checkpoints/step-0000005.safetensors")
    harm(newest)
    said = newest.exists()
    go(resume=True)
    out = capsys.readouterr().out
    assert (f"{newest}: cannot be read (" in out) == said and "going on after step 4" in out
    same_result("run", templates / "full")

@pytest.mark.parametrize("name", ["killed", "full"])
def test_without_a_checkpoint_that_can_be_read_a_run_does_not_begin_again_in_silence(
        name, templates, here, refused):
    shutil.copytree(templates / name, "run")
    for path in Path("run/checkpoints").iterdir():
        path.write_bytes(b"damaged")
    resume = {"resume": True, "steps": 7}
    refused("run: has no checkpoint that can be read; --overwrite starts anew", **resume)
    shutil.rmtree("run/checkpoints")
    refused("run: has no checkpoint that can be read; --overwrite starts anew", **resume)
    if name == "killed":
        same_result(go(overwrite=True), templates / "full")

def test_a_run_that_is_not_finished_is_no_model_until_it_is_ended(templates, here, capsys):
    """It was finished, resumed and interrupted: what lies there is the earlier end's, and nobody reads it."""
    shutil.copytree(templates / "ref", "run")
    with pytest.MonkeyPatch.context() as patch:
        at_log_line(patch, 4, kill)
        with pytest.raises(Killed):
            train.main("--resume --out_dir run --steps 6".split())
    assert Path("run/model.safetensors").exists()
    for flag in ("init", "ref"):
        assert end(**{"out_dir": "next", "init": "b", flag: "run"}) == (2, None) and not Path("next").exists()
        assert "this run is not finished; go on with it, or end it after step 3" in capsys.readouterr().err
    train.main("--resume --steps 3 --out_dir run".split())
    assert folder.read_run("run")["finished"] == 3
    newest, model = load_file("run/checkpoints/step-0000003.safetensors"), folder.open_model("run")
    assert all(torch.equal(p, newest[f"model.{name}"][:len(p)]) for name, p in model.named_parameters())

def test_a_file_is_whole_and_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")
    with pytest.raises(Killed):
        files.write_atomically(tmp_path / "x", lambda part: part.write_text("half") and kill())
    assert contents(tmp_path) == {"x": b"old"}
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.fstat(fd).st_ino))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    files.write_json(tmp_path / "x", {})
    assert calls[:2] == [(tmp_path / "x").stat().st_ino, "rename"]

# ---- Signals ----

@pytest.mark.parametrize("number, status", [
    pytest.param(signal.SIGINT, 130, marks=SLOW), (signal.SIGTERM, 143)])
def test_a_signal_saves_before_it_evaluates_and_says_how_to_go_on(
        number, status, templates, here, monkeypatch, capsys):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    real, fails = train.evaluate, []
    monkeypatch.setattr(train, "evaluate", lambda *args: kill() if fails else real(*args))
    with monkeypatch.context() as patch:
        at_log_line(patch, 3, lambda: [signal_to_me(number), fails.append(1)])
        with pytest.raises(Killed):
            go(save_every=0)
    assert [p.name for p in Path("run/checkpoints").iterdir()] == ["step-0000003.safetensors"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    fails.clear()
    with monkeypatch.context() as patch:
        at_log_line(patch, 5, lambda: signal_to_me(number))
        assert end("--resume", "--out_dir", "run") == (status, None)
    out = capsys.readouterr().out
    assert f"{number.name}: stopped after step 5 and saved" in out and "going on after step 3" in out
    train.main(re.search(r"python train.py (.*)", out[out.index("stopped after"):])[1].split())
    same_result("run", templates / "full")

def test_a_signal_in_the_last_step_changes_nothing_and_a_second_one_ends_at_once(here, monkeypatch):
    with monkeypatch.context() as patch:
        at_log_line(patch, 2, signal_to_me)
        assert folder.read_run(go(steps=2))["finished"] == 2
    at_log_line(monkeypatch, 4, lambda: [signal_to_me(signal.SIGINT) for _ in range(2)])
    assert end("--resume", "--out_dir", "run", "--steps", "6") == (130, None)
    assert folder.read_run("run")["saved"] == 3

def test_after_a_signal_while_the_start_is_made_the_same_command_goes_on(here, monkeypatch, capsys):
    flags = PLAIN | SIZES | {"sft_steps": 3, "steps": 2, "out_dir": "dpo"}
    with monkeypatch.context() as patch:
        at_log_line(patch, 1, signal_to_me)
        assert end(*arguments(**flags)) == (143, None)
    assert "stopped after step 1 and saved" in capsys.readouterr().out and not Path("dpo").exists()
    train.main(arguments(**flags))
    assert "going on after step 1" in capsys.readouterr().out
    assert [folder.read_run(name)["finished"] for name in ("sft", "dpo")] == [3, 2]

def test_a_folder_is_one_writers_and_one_runs(templates, here, monkeypatch, refused):
    """The lock is held to the end. A folder that is no run's is left alone even by --overwrite."""
    shutil.copytree(templates / "killed", "run")
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
    refused("--out_dir run: holds a dpo run; choose --resume, --overwrite", loss="dpop")
    for overwrite in (False, True):
        refused("files (chat_template.jinja, ...) and is no run's", out_dir="b",
                overwrite=overwrite)
    with pytest.raises(folder.ConfigError, match="--out_dir run: holds a dpo run"):
        folder.claim(Path("run"), {}, resume=False, overwrite=False)  # made since the first check

def test_overwrite_replaces_all_that_the_old_run_wrote_and_nothing_else(templates, here):
    shutil.copytree(templates / "full", "run")
    Path("run/my notes.txt").write_text("mine")
    sizes = {"loss": "sft", "init": "b", "tokenizer": None, "n_layer": 2, "steps": 3}
    go(overwrite=True, **sizes)
    assert Path("run/my notes.txt").read_text() == "mine"
    assert set(contents("run")) - {"my notes.txt"} == set(contents(go("fresh", **sizes)))
    same_result("run", "fresh", step=3)

@pytest.mark.parametrize("name, number", [
    ("run.json", errno.ENOSPC), ("log.jsonl", errno.EROFS), ("step-0000003.safetensors", errno.ENOSPC),
    pytest.param("reference-train.bin", errno.ENOSPC, marks=SLOW)])
def test_a_write_that_fails_is_one_line_with_status_1_and_what_was_saved_leads_to_the_right_end(
        name, number, templates, here, monkeypatch):
    real = os.replace

    def replace(part, path):
        if Path(path).name == name:
            raise OSError(number, os.strerror(number))
        real(part, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        status, line = end()
    assert status == 1 and "intact" not in line
    assert re.fullmatch(rf"train.py: run/?\S*: cannot be written \({os.strerror(number)}\).*", line), line
    assert not list(Path("run").rglob("*.part"))
    same_result(go(resume=Path("run/run.json").exists()), templates / "full")

@pytest.mark.parametrize("harm, one_pair", [
    (lambda logps, loss: torch.cat([loss[:1] * math.nan, loss[1:]]), True),
    (lambda logps, loss: logps.register_hook(lambda g: g * math.inf) and loss, False)])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_the_update(
        harm, one_pair, templates, here, monkeypatch):
    real, calls = LOSSES["dpo"], []

    @functools.wraps(real)
    def loss(chosen_logps, **kwargs):
        value = real(chosen_logps, **kwargs)
        calls.extend([1] * chosen_logps.requires_grad)  # two micro-batches a step, a chunk each
        return harm(chosen_logps, value) if chosen_logps.requires_grad and len(calls) == 7 else value
    with monkeypatch.context() as patch:
        patch.setitem(LOSSES, "dpo", loss)
        status, line = end()
    assert status == 1 and line.startswith("train.py: step 4: mean loss ") and "\n" not in line
    pairs, _ = data.hold_out(data.load(["d.jsonl"], BYTES, 64)[0])
    micros = data.micro_batches(pairs, data.step_indices(len(pairs), 6, 0, 3), 4)
    lines = [pairs.where[i] for micro in micros for i in micro]
    assert re.findall(r"d\.jsonl:\d+", line) == (lines[:1] if one_pair else lines)
    assert folder.read_run("run")["saved"] == 3
    same_result(go(resume=True), templates / "full")

def test_weights_that_are_not_finite_after_the_last_update_are_not_saved(here):
    status, line = end(lr=1e38, steps=1, warmup_steps=0)
    assert status == 1 and line.startswith("train.py: step 1: ") and "is --lr far too large?" in line.lower()
    assert not list(Path("run").glob("checkpoints/*")) and not Path("run/model.safetensors").exists()

@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=SLOW)])
def test_the_reference_runs_once_for_each_pair_and_never_again(dtype, here):
    """Bit for bit, also among other pairs later, and for another process. What was written in part is made
    again, and nothing else. A stand-in of weight 0, another rank's pair, is not written down."""
    pairs, cfg, ran = data.load(["d.jsonl"], BYTES, 64)[0].without_scores(), config("dpo", dtype=dtype), []
    model = small(0).to(getattr(torch, dtype))

    def ask(*numbers, weight=1):
        batch = data.collate([pairs[i] for i in numbers])
        batch.weight = weight
        return Reference(model, None, lambda batch: ran.append(batch.pair.tolist()) or train.response_logps(
            model, batch, cfg), Memory(here, pairs, dtype))(batch, False)["ref_logps"].split(
                [int(pairs.rows["C"][i] + pairs.rows["R"][i]) for i in numbers])
    ask(7, weight=0)
    file = Memory(here, pairs, dtype)
    assert file.values.dtype == dtype and np.isnan(file.values).all()
    first = ask(5, 2, 9)
    assert all(torch.equal(a, b) for a, b in zip(first, [*ask(5), *ask(2, 9)], strict=True))
    assert ran == [[7], [5, 2, 9]] and np.isfinite(file.values).sum() == sum(map(len, first))
    file.values[file.places([5])] = -1.5
    file.values[file.places([2])[1:]] = np.nan
    found = ask(5, 2)
    assert (found[0] == -1.5).all() and torch.equal(found[1], first[1]) and ran[2:] == [[5, 2]]
    os.truncate("reference-train.bin", 200)  # damaged, it is made anew
    assert np.isnan(Memory(here, pairs, dtype).values).all()
