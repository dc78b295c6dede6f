"""Machines unlike this one: Windows and macOS, devices that are absent, other encodings, odd paths."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import sample
import train

ROOT = Path(__file__).resolve().parents[1]


SMALL = "--steps 2 --sft_steps 2 --batch_size 4 --n_layer 1 --n_head 2 --n_embd 16"

# Python has fcntl and resource on Unix alone, msvcrt on Windows alone. A file opened without an encoding,
# which would be another one on Windows, is an error.
ELSEWHERE = """
import importlib, pathlib, sys, warnings
sys.modules.update(dict.fromkeys(["fcntl", "resource", "msvcrt"]))
warnings.simplefilter("error", EncodingWarning)
warnings.filterwarnings("ignore", module="torch|matplotlib|PIL", category=EncodingWarning)
root, run, data, prompts, flags = sys.argv[1:]
for pattern in ("*.py", "plumbing/*.py", "tools/*.py", "toy/*.py", "golden/*.py", "experiments/*.py"):
    for path in pathlib.Path(root).glob(pattern):
        sys.path.append(str(path.parent))
        importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
import sample, train
from tools import doctor, plot
train.main(["--data", data, "--out_dir", run, "--tokenizer", "bytes", *flags.split()])
train.main(["--resume", "--out_dir", run, "--steps", "3"])
sample.main([run, "--prompts", prompts, "--heat", "--max_new_tokens", "4"])
doctor.main([data, "--tokenizer", "bytes"])
sys.stdout.reconfigure(errors="strict")  # as in a process of its own
plot.main([run])
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """(standard output, folder of the run) of every script, in one process: no HOME, no g++, standard output
    in ASCII, folders with spaces and letters of any script, data with CRLF line ends."""
    folder = tmp_path_factory.mktemp("Größe 東京")
    pairs = [{"prompt": f"Wie schön ist 東京, {i}?", "chosen": f" Sehr schön {i} ☃", "rejected": f" Übel {i}"}
             for i in range(12)]
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\r\n" for pair in pairs)
    (folder / "Paare é.jsonl").write_bytes(lines.encode())
    (folder / "Fragen é.json").write_text('["Wie schön?"]', encoding="utf-8")
    command = [sys.executable, "-X", "warn_default_encoding", "-c", ELSEWHERE, str(ROOT), "mein Lauf ü",
               "Paare é.jsonl", "Fragen é.json", SMALL]
    environment = {name: x for name, x in os.environ.items() if name not in ("HOME", "PATH")} | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout, folder / "mein Lauf ü"


@pytest.mark.slow
def test_without_the_modules_of_one_system_every_script_imports_and_trains(elsewhere):
    """fcntl, resource and msvcrt are all hidden: locks and memory figures do without."""
    out, run = elsewhere
    assert out.count(b"saved in ") == 2 and b"| policy" in out
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert not any("peak_memory" in record for record in records)


@pytest.mark.slow
def test_paths_with_spaces_and_letters_of_any_script_work_and_so_does_an_ascii_terminal(elsewhere):
    """What standard output cannot show is escaped; train.py, sample.py, doctor.py and plot.py end well."""
    out, run = elsewhere
    assert out.isascii() and rb"prompt: Wie sch\xf6n?" in out
    assert rb"prompt     Wie sch\xf6n ist \u6771\u4eac" in out and rb"saved in 'mein Lauf \xfc'" in out
    assert (run / "runs.png").exists()


@pytest.mark.parametrize("device", ["mps", "cuda:99", "meta", "nonsense", "hpu", ""])
@pytest.mark.parametrize("main, flags", [(train.main, []), (sample.main, ["out", "--prompt", "x"])])
def test_a_device_that_is_absent_or_none_is_one_clear_line(
        device, main, flags, tmp_path, monkeypatch, capsys):
    """Exit status 2 and nothing written; torch alone knows which devices there are."""
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--device", device])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and f"--device {device}: " in error
    assert "cpu" in error and not list(tmp_path.iterdir())


def test_pyproject_and_requirements_list_the_same_dependencies():
    """`uv sync` reads the one, `pip install -r` the other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == (ROOT / "requirements.txt").read_text().split()
