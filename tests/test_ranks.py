"""Several ranks: the same numbers as one process, one writer, an end to every failure.

Run as a script, this file trains the runs of a JSON file in ranks that it forks: torch is imported once.
Two machines, a rank that dies and a signal are tried under torchrun itself.
"""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # noqa: F401  (the first optimizer imports it: once here, not in each rank)
import torch.distributed.fsdp  # noqa: F401
from filelock import FileLock
from safetensors.torch import load_file
from test_train import arguments

import train
from model import GPT, GPTConfig
from plumbing import folder as run_folder
from plumbing import ranks, report
from plumbing.errors import ConfigError, RunError
from plumbing.folder import read_run

ROOT = Path(__file__).resolve().parent.parent
SPEED = {"pairs_per_s", "tokens_per_s", "peak_memory"}  # what may differ between runs
TOLERANCE = 1e-10

# 2 and 3 ranks meet uneven shares (7, 5 pairs), a stand-in micro-batch, a rank without a pair (2 on 3), and
# micro-batches that the reference knows on one rank only (steps 2 and 3 of dpo begin an epoch of 11 pairs).
COMMON = {"tokenizer": "bytes", "device": "cpu", "dtype": "float64", "steps": 3, "lr": 1e-3,
          "warmup_steps": 2, "save_every": 1, "eval_every": 1, "log_every": 1, "head_tokens": 30}
CASES = {
    "sft": {"batch_size": 5, "micro_batch_size": 1, "n_layer": 2, "n_head": 2, "n_embd": 10,
            "block_size": 64},
    "dpo": {"batch_size": 8, "micro_batch_size": 1, "grad_clip": 0.1, "weight_decay": 0.1},
    "tdpo2": {"batch_size": 7, "micro_batch_size": 4, "micro_batch_tokens": 100},
    "2d-dpo": {"batch_size": 2, "micro_batch_size": 2},
}


# Runs in 2 ranks that end badly: folder, flags, words of the message. Another process writes to "locked".
BAD = [("flag", {"beta": -1}, "--beta -1.0: must be greater"),
       ("locked", {}, "another process is writing there"),
       ("apart", {}, "--out_dir apart: another machine does not see what")]


# ---------------------------------------------------------------------------------------------------------
# As a script: ranks


def as_rank(runs, apart):
    reduced = []

    def counting(function):
        return lambda *args, **kwargs: reduced.append(1) or function(*args, **kwargs)

    for name in {"reduce_scatter_tensor", "reduce_scatter_single"} & vars(torch.distributed).keys():
        setattr(torch.distributed, name, counting(getattr(torch.distributed, name)))
    stop, ranks.stop = ranks.stop, lambda: None  # one group for all runs
    report.answer, os.fsync = (lambda *_: ""), (lambda file: None)  # as in conftest.py
    if apart:  # machines that do not share a disk
        run_folder.PATIENCE = 0.2
        os.mkdir(f"machine-{ranks.rank()}")
        os.chdir(f"machine-{ranks.rank()}")
    for argv in runs:
        reduced.clear()
        train.main(argv)
        if not ranks.rank():
            Path(argv[argv.index("--out_dir") + 1], "reduced").write_text(str(len(reduced)))
    stop()


def fork_ranks(path):
    """Each (number of ranks, runs, apart) of a JSON file in turn; what torchrun sets is set here, and like
    torchrun this ends the others where one fails. Prints the status of each group after its output."""
    for n, runs, apart in json.loads(Path(path).read_text()):
        os.environ |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "localhost",
                       "MASTER_PORT": str(free_port())}
        children, status = set(), 0
        for rank in range(n):
            if not (child := os.fork()):
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                status = 1
                try:
                    as_rank(runs, apart)
                    status = 0
                except SystemExit as e:
                    status = e.code
                    print(*[e.code] if isinstance(status, str) else [], file=sys.stderr)
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status if isinstance(status, int) else 1)
            children.add(child)
        while children:
            child, how = os.wait()
            children.remove(child)
            if how and not status:
                status = os.waitstatus_to_exitcode(how)
                for other in children:  # they would wait for it
                    os.kill(other, signal.SIGKILL)
        print(f"\nstatus {status}", flush=True)


# ---------------------------------------------------------------------------------------------------------
# Helpers


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(n, *argv, torchrun=("--standalone",), cwd=None):
    """Start a script, under torchrun where n > 0."""
    command = ["-m", "torch.distributed.run", *torchrun, f"--nproc_per_node={n}"] if n else []
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *command, *map(str, argv)], env=env, text=True, cwd=cwd,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=not n)


def finish(process, timeout=150):
    """(status, output). A run that hangs fails the test, and its ranks end with it."""
    try:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        process.terminate()  # torchrun ends its ranks, after 30 s by force
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"hangs; its output: {output[-3000:]}")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with small data and two different models, policy and reference."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)

    def segments():
        return [{"text": " " + "".join(map(chr, rng.integers(97, 123, rng.integers(1, 9)))),
                 "scores": rng.random(2).tolist()} for _ in range(rng.integers(1, 4))]

    for name, n in (("data", 11), ("val", 2)):
        lines = [json.dumps({"prompt": f"{name} {i}" * int(rng.integers(1, 3)), "chosen": segments(),
                             "rejected": segments()}) for i in range(n)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for name, seed in (("init", 1), ("ref", 2)):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(257, 64, n_layer=2, n_head=2, n_embd=10))  # 257 rows: no even shards
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        model.save_pretrained(folder / name)
    return folder


def flags(inputs, case, out_dir, **changes):
    models = {} if case == "sft" else {"init": inputs / "init", "ref": inputs / "ref"}
    return arguments(**COMMON | models | {"loss": case} | CASES[case] | {
        "data": inputs / "data.jsonl", "val_data": inputs / "val.jsonl", "out_dir": out_dir} | changes)


def small_run(inputs, out_dir, **changes):
    """train.py and flags of a shorter run, in float32."""
    plain = {"data": inputs / "data.jsonl", "val_data": inputs / "val.jsonl", "tokenizer": "bytes",
             "out_dir": out_dir, "device": "cpu", "batch_size": 4}
    return [ROOT / "train.py", *arguments(**plain | changes)]


def difference(path, other):
    """The largest difference between the tensors of two files, which must have the same names and shapes."""
    a, b = load_file(path), load_file(other)
    assert {name: t.shape for name, t in a.items()} == {name: t.shape for name, t in b.items()}
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def numbers(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in SPEED}
            for record in records if "step" in record]


def same_run(one, some):
    """Every logged number, the gradient of each weight (tied table included), the moments, the result and the
    remembered numbers."""
    for expected, found in zip(numbers(one), numbers(some), strict=True):
        assert found == {name: value if isinstance(value, str) else pytest.approx(value, abs=TOLERANCE)
                         for name, value in expected.items()}
    # after step 1 AdamW's first moment is (1 - 0.9) times the (clipped) gradient
    paths = [run / "checkpoints" / "step-0000002.safetensors" for run in (one, some)]
    assert difference(*paths) < TOLERANCE / 10
    assert difference(*(run / "model.safetensors" for run in (one, some))) < TOLERANCE
    memories = [run / "reference-train.npy" for run in (one, some)]
    assert memories[0].exists() == memories[1].exists()
    if memories[0].exists():
        np.testing.assert_allclose(*map(np.load, memories), rtol=0, atol=TOLERANCE)  # and NaN where NaN is


# ---------------------------------------------------------------------------------------------------------
# The numbers of one process


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory):
    """CASES in 1, 2 and 3 ranks: folder / N / case; and one run that 3, 2 and 1 ranks continue in turn.
    In failures.json: the status and output of two ranks for each of BAD."""
    folder = tmp_path_factory.mktemp("ranks")
    groups = []
    for n, resumed in ((3, {"steps": 1}), (2, {"steps": 2, "resume": True})):
        runs = [flags(inputs, case, folder / str(n) / case) for case in CASES]
        groups.append((n, [*runs, flags(inputs, "dpo", folder / "resumed", **resumed)], False))
    groups += [(2, [flags(inputs, "dpo", name, **changes)], name == "apart") for name, changes, _ in BAD]
    (folder / "groups.json").write_text(json.dumps(groups))
    (folder / "locked").mkdir()
    with FileLock(folder / "locked" / ".lock"):
        status, output = finish(start(0, __file__, folder / "groups.json", cwd=folder), timeout=300)
    parts = re.split(r"\nstatus (-?\d+)\n", output)
    assert parts[1:4:2] == ["0", "0"] and status == 0 and len(parts) == 2 * len(groups) + 1, output
    (folder / "failures.json").write_text(json.dumps(list(zip(parts[5::2], parts[4::2], strict=False))))
    for case in CASES:
        train.main(flags(inputs, case, folder / "1" / case))
    train.main(flags(inputs, "dpo", folder / "resumed", resume=True))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", [2, 3])
def test_a_run_in_n_ranks_has_the_numbers_of_one_process(folder, n, case):
    same_run(folder / "1" / case, folder / str(n) / case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_reduced_once_a_step(folder, case):
    """One reduce-scatter a step for each of the 3 groups of weights (two blocks, the rest), however many
    micro-batches and chunks of the head there are."""
    for n in (2, 3):
        assert (folder / str(n) / case / "reduced").read_text() == str(COMMON["steps"] * 3)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(folder):
    """1 step in 3 ranks, 1 in 2, 1 in one process: the run of 3 steps in one process, result and moments."""
    for file in ("model.safetensors", "checkpoints/step-0000003.safetensors"):
        assert difference(folder / "1" / "dpo" / file, folder / "resumed" / file) < TOLERANCE


@pytest.mark.slow
def test_the_folder_of_a_run_is_the_same_for_any_number_of_ranks(folder):
    """The same file names, and no file left aside."""
    for case in CASES:
        one, two, three = ({str(path.relative_to(run)) for path in run.rglob("*")}
                           for run in (folder / n / case for n in "123"))
        assert one == two - {"reduced"} == three - {"reduced"}
        assert not any(name.endswith(".part") for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3), ids=["flag", "locked", "apart"])
def test_bad_input_is_one_line_once_and_status_2(folder, number):
    """What every rank finds; what rank 0 alone finds; and what only shows between machines, before anything
    is trained."""
    name, _, words = BAD[number]
    status, output = json.loads((folder / "failures.json").read_text())[number]
    assert status == "2" and output.count("train.py: error:") == 1 and words in output, output
    assert "Traceback" not in output
    assert not list(folder.glob(f"**/{name}/[!.]*")) and not list(folder.rglob(".ranks"))


def test_one_process_has_neither_group_nor_wrapper(inputs, tmp_path, monkeypatch):
    kept, real = [], train.train
    monkeypatch.setattr(train, "train", lambda *args: kept.extend(args) or real(*args))
    train.main(flags(inputs, "tdpo2", tmp_path / "run", steps=1))
    assert not torch.distributed.is_initialized()
    assert type(kept[0]) is GPT and type(kept[1].model) is GPT
    micros, rows = [np.arange(3)], [{}]
    [(micro, weight)] = ranks.share(micros[0], lambda _: micros)
    assert micro is micros[0] and weight == 1
    ranks.reduce_gradients(None, now=True)  # asks nothing of the model
    assert ranks.gather(rows, 3) is rows


def test_where_rank_0_fails_the_others_stop_too(monkeypatch):
    def refuse():
        raise ConfigError("no")
    assert ranks.on_main(lambda x: x + 1, 2) == 3
    with pytest.raises(ConfigError, match="no"):
        ranks.on_main(refuse)
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert ranks.on_main(refuse) is None  # not called here
    monkeypatch.setattr(ranks, "any_of", lambda value: True)
    with pytest.raises(RunError, match="rank 0 has stopped the run"):
        ranks.on_main(refuse)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_shares_cover_each_step_once_in_equally_many_micro_batches(monkeypatch, world):
    """Each pair has weight 1 on one rank; all ranks communicate equally often."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for n in range(1, 12):
        for size in (1, 2, 3):
            order = np.random.default_rng(n).permutation(n)
            counts, seen = set(), []

            def cut(order, size=size):
                return [order[i:i + size] for i in range(0, len(order), size)]

            for rank in range(world):
                monkeypatch.setenv("RANK", str(rank))
                own = ranks.share(order, cut)
                counts.add(len(own))
                seen += [i for micro, weight in own for i in micro if weight]
                assert all(0 < len(micro) <= size for micro, _ in own)
            assert counts == {math.ceil(math.ceil(n / world) / size)}
            assert sorted(seen) == list(range(n))


# ---------------------------------------------------------------------------------------------------------
# What ends a run, under torchrun


@pytest.mark.slow
def test_a_preference_run_on_two_machines_makes_its_start_prints_once_and_has_the_numbers_of_one_process(
        inputs, tmp_path):
    """Two agents of torchrun, a rank each, that meet on the loopback device and share a folder. In float32,
    whose sum gloo reduces by itself."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 64, "sft_steps": 2, "steps": 2}
    port, agents = free_port(), []
    for node in range(2):
        torchrun = ("--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}")
        agents.append(start(1, *small_run(inputs, tmp_path / "dpo", **sizes), torchrun=torchrun))
    ends = [finish(agent) for agent in agents]
    assert [status for status, _ in ends] == [0, 0], ends
    output = "".join(output for _, output in ends)
    for once in ("first a start, by SFT", "before the first step: loss 0.6931 = log 2", "next:"):
        assert output.count(once) == 1, output
    assert read_run(tmp_path / "sft")["finished"] == 2
    train.main(small_run(inputs, tmp_path / "one" / "dpo", **sizes)[1:])
    for run in ("sft", "dpo"):
        files = [folder / run / "model.safetensors" for folder in (tmp_path, tmp_path / "one")]
        assert difference(*files) < 1e-6


def rank_process(out_dir, rank):
    """The id of a rank's process, found by its run's folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if str(out_dir).encode() in words and f"RANK={rank}".encode() in (
                    process / "environ").read_bytes().split(b"\0"):
                return int(process.name)
        except OSError:
            pass
    raise AssertionError(f"no rank {rank} of {out_dir}")


def wait_for(process, found, timeout=90):
    end = time.monotonic() + timeout
    while not found():
        if time.monotonic() > end or process.poll() is not None:
            process.terminate()
            pytest.fail(f"it does not come: {process.communicate(timeout=60)[0][-3000:]}")
        time.sleep(0.05)


def last_step(out_dir):
    return max([int(path.stem[5:]) for path in out_dir.glob("checkpoints/step-*.json")], default=0)


def go_on(inputs, out_dir, **changes):
    """Resume in one process for one more step; returns the step from which it went on."""
    last = last_step(out_dir)
    train.main([*small_run(inputs, out_dir, **changes, steps=last + 1)[1:], "--resume"])
    lines = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    assert any(line.get("resumed_at") == last for line in lines)
    return last


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_the_last_checkpoint_is_good(inputs, tmp_path):
    """kill -9 of a rank: torchrun names it, the run ends, one process goes on from the last checkpoint."""
    run, changes = tmp_path / "run", {"init": inputs / "init", "save_every": 1, "eval_every": 0}
    process = start(2, *small_run(inputs, run, **changes, steps=100000))
    wait_for(process, lambda: last_step(run) >= 2)
    os.kill(rank_process(run, 1), signal.SIGKILL)
    status, output = finish(process, timeout=60)
    assert status and "rank      : 1" in output and "SIGKILL" in output
    assert output.count("rank 0: another rank has ended") == 1, output
    assert "Traceback" not in output.split("Traceback (most recent call last):\n  File \"<frozen runpy>")[0]
    assert go_on(inputs, run, **changes) >= 2


@pytest.mark.slow
def test_a_signal_ends_all_ranks_after_the_same_step(inputs, tmp_path):
    """SIGTERM to torchrun: the step is finished and saved, and every rank exits with 128 + 15."""
    run, changes = tmp_path / "run", {"init": inputs / "init", "save_every": 0, "eval_every": 0}
    process = start(2, *small_run(inputs, run, **changes, steps=100000))
    wait_for(process, lambda: (run / "log.jsonl").exists() and '"loss"' in (run / "log.jsonl").read_text())
    process.send_signal(signal.SIGTERM)
    status, output = finish(process, timeout=60)
    assert status and output.count("SIGTERM: stopped after step") == 1, output
    assert go_on(inputs, run, **changes) >= 1


if __name__ == "__main__":
    fork_ranks(sys.argv[1])
