"""Several ranks: the same numbers as one process, one writer, an end to every failure.

torchrun starts this file as a script in two ranks, once: they train RUNS in turn; the last one ends badly.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from test_train import arguments, make_records, save_model, write_lines

import train
from plumbing import folder as run_folder
from plumbing import ranks

ROOT = Path(__file__).resolve().parent.parent
SPEED = {"pairs_per_s", "tokens_per_s", "peak_memory"}  # what may differ between runs
TOLERANCE = 1e-10
COMMON = {"data": "data.jsonl", "val_data": "val.jsonl", "device": "cpu", "dtype": "float64", "steps": 3,
          "lr": 1e-3, "warmup_steps": 2, "save_every": 1, "eval_every": 1, "log_every": 1, "head_tokens": 30,
          "batch_size": 7, "micro_batch_size": 1}
FOLDERS = {"init": "init", "ref": "ref"}
# 7 pairs for 2 ranks: uneven shares, a stand-in micro-batch; the epoch of 11 pairs ends in step 2, after
# which the reference knows some pairs of a micro-batch on one rank only.
RUNS = {  # name: (flags, the signal that rank 1 gets in step 2)
    "dpo": (FOLDERS | {"grad_clip": 0.1, "weight_decay": 0.1}, None),
    "tdpo2": ({"loss": "tdpo2", "tokenizer": "bytes", "n_head": 2, "n_embd": 10, "block_size": 64,
               "sft_steps": 2, "micro_batch_size": 4}, None),  # its start is made by SFT
    "stopped": (FOLDERS | {"grad_clip": 0.1, "weight_decay": 0.1}, signal.SIGTERM),
    "locked": (FOLDERS, None),  # another process writes there
    "lost": (FOLDERS, signal.SIGKILL)}

def flags(name, **changes):
    return arguments(**COMMON | RUNS[name][0] | {"out_dir": f"{name}/run"} | changes)

def as_rank():
    """Train RUNS, and write down the status of each on this rank, and how often gradients were reduced."""
    reduced, check = [], run_folder.Run.check

    def counting(function):
        return lambda *args, **kwargs: reduced.append(1) or function(*args, **kwargs)

    for name in {"reduce_scatter_tensor", "reduce_scatter_single"} & vars(torch.distributed).keys():
        setattr(torch.distributed, name, counting(getattr(torch.distributed, name)))
    stop, ranks.stop = ranks.stop, lambda: None  # one group for all runs
    for name, (_, number) in RUNS.items():
        def checked(run, step, *args, number=number):
            if number and (ranks.rank(), step) == (1, 2):
                os.kill(os.getpid(), number)
            return check(run, step, *args)
        run_folder.Run.check = checked
        reduced.clear()
        try:
            train.main(flags(name))
            status = 0
        except SystemExit as e:
            status = e.code
        Path(f"{name}-{ranks.rank()}.json").write_text(json.dumps([status, len(reduced)]))
    stop()

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder in which two ranks trained RUNS: NAME/run, output.txt; and one process: one/NAME/run."""
    place = tmp_path_factory.mktemp("ranks")
    for name, n in (("data", 11), ("val", 2)):
        write_lines(place / f"{name}.jsonl", make_records(n, seed=n))
    for seed, name in enumerate(FOLDERS):
        save_model(place / name, seed)
    (place / "locked/run").mkdir(parents=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
                        "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    with FileLock(place / "locked/run/.lock"):
        done = subprocess.run(command, cwd=place, env=env, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=900)
    (place / "output.txt").write_text(done.stdout)
    assert done.returncode and "SIGKILL" in done.stdout, done.stdout[-3000:]  # says torchrun of rank 1
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name in ("dpo", "tdpo2"):
            train.main(flags(name, out_dir=f"one/{name}/run"))
    return place

def difference(path, other):
    """The largest difference between the tensors of two files, which must have the same names and shapes."""
    a, b = load_file(path), load_file(other)
    assert {name: t.shape for name, t in a.items()} == {name: t.shape for name, t in b.items()}
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)

def numbers(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in SPEED} for x in lines if {"loss", "eval/loss"} & x.keys()]

def same_run(one, some):
    """Every logged number, the weights, the moments and the remembered numbers; the same names of files."""
    for expected, found in zip(numbers(one), numbers(some), strict=True):
        assert found == pytest.approx(expected, abs=TOLERANCE)
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (one, some)]
    assert files[0] == files[1] and not any(name.endswith(".part") for name in files[0])
    for file in ("model.safetensors", *(f"checkpoints/step-000000{n}.safetensors" for n in (2, 3))):
        assert not (one / file).exists() or difference(one / file, some / file) < TOLERANCE
    if (memory := one / "reference-train.bin").exists():  # and NaN where NaN is
        found = np.fromfile(some / memory.name)
        np.testing.assert_allclose(found, np.fromfile(memory), rtol=0, atol=TOLERANCE)

@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo", "tdpo2"])
def test_a_run_in_two_ranks_has_the_numbers_of_one_process_and_reduces_gradients_once_a_step(place, name):
    """SFT on the way too. One reduce-scatter a step for each of the 3 groups of weights (two blocks, the
    rest), however many micro-batches and chunks of the head there are."""
    same_run(place / "one" / name / "run", place / name / "run")
    steps = 3 + (2 if name == "tdpo2" else 0)
    for rank in range(2):
        assert json.loads((place / f"{name}-{rank}.json").read_text()) == [0, 3 * steps]
    if name == "tdpo2":
        same_run(place / "one/tdpo2/sft", place / "tdpo2/sft")
    output = (place / "output.txt").read_text()
    assert output.count("first a start, by SFT") == output.count("8 of 8 held-out") + 1 == 1

@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all_after_the_same_step_and_one_process_goes_on(place, monkeypatch):
    """To the run of one process: numbers, weights and moments."""
    monkeypatch.chdir(place)
    assert [json.loads(Path(f"stopped-{rank}.json").read_text())[0] for rank in range(2)] == [143, 143]
    assert Path("output.txt").read_text().count("SIGTERM: stopped after step 2 and saved") == 1
    assert run_folder.read_run("stopped/run")["saved"] == 2
    train.main("--resume --out_dir stopped/run".split())
    same_run(place / "one/dpo/run", place / "stopped/run")

@pytest.mark.slow
def test_bad_input_is_one_line_once_and_a_rank_that_dies_ends_the_run_with_its_last_checkpoint(
        place, monkeypatch):
    """What rank 0 alone finds; and kill -9 of rank 1, from which one process goes on."""
    monkeypatch.chdir(place)
    output = Path("output.txt").read_text()
    assert output.count("train.py: error:") == 1
    assert output.count("--out_dir locked/run: another process is writing there; choose another") == 1
    assert json.loads(Path("locked-0.json").read_text())[0] == 2
    assert json.loads(Path("locked-1.json").read_text())[0] and not list(Path("locked/run").glob("[!.]*"))
    assert not list(Path().glob("lost-*.json")) and run_folder.read_run("lost/run")["finished"] is None
    assert run_folder.read_run("lost/run")["saved"] == 1
    train.main("--resume --out_dir lost/run".split())
    assert run_folder.read_run("lost/run")["finished"] == 3

if __name__ == "__main__":
    as_rank()
