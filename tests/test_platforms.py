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


def python(folder, code, *arguments, **environment):
    """Run some Python in a folder; what it wrote to standard output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env=environment,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout


SMALL = "--steps 2 --sft_steps 2 --batch_size 4 --n_layer 1 --n_head 2 --n_embd 16"

# Python has fcntl and resource on Unix alone, msvcrt on Windows alone.
ELSEWHERE = """
import importlib, pathlib, sys
sys.modules.update(dict.fromkeys(["fcntl", "resource", "msvcrt"]))
root = pathlib.Path(sys.argv[1])
for pattern in ("*.py", "plumbing/*.py", "tools/*.py", "toy/*.py", "golden/*.py"):
    for path in root.glob(pattern):
        importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
import sample, train
train.main([*sys.argv[2].split(), "--out_dir", "out/dpo"])
train.main("--resume --out_dir out/dpo --steps 3".split())
sample.main("out/dpo --prompt Review: --max_new_tokens 4".split())
"""


@pytest.mark.slow
def test_without_the_modules_of_one_system_every_script_imports_and_trains(tmp_path):
    """fcntl, resource and msvcrt are all hidden: locks and memory figures do without."""
    out = python(tmp_path, ELSEWHERE, str(ROOT), SMALL)
    assert out.count(b"saved in out") == 2 and b"| policy" in out
    records = [json.loads(line) for line in (tmp_path / "out" / "dpo" / "log.jsonl").read_text().splitlines()]
    assert not any("peak_memory" in record for record in records)


COMMANDS = """
import sys, train, sample
from tools import plot
run, data, prompts, flags = sys.argv[1:]
train.main(["--data", data, "--out_dir", run, "--tokenizer", "bytes", *flags.split()])
sample.main([run, "--prompts", prompts, "--heat"])
sys.stdout.reconfigure(errors="strict")  # as in a process of its own
plot.main([run])
"""


@pytest.mark.slow
def test_paths_with_spaces_and_letters_of_any_script_work_and_so_does_an_ascii_terminal(tmp_path):
    """What standard output cannot show is escaped; train.py, sample.py and plot.py end well."""
    folder = tmp_path / "Größe 東京"
    folder.mkdir()
    pairs = [{"prompt": f"Wie schön ist 東京, {i}?", "chosen": f" Sehr schön {i} ☃", "rejected": f" Übel {i}"}
             for i in range(12)]
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    (folder / "Paare é.jsonl").write_text(lines, encoding="utf-8")
    (folder / "Fragen é.json").write_text('["Wie schön?"]', encoding="utf-8")
    out = python(folder, COMMANDS, "mein Lauf ü", "Paare é.jsonl", "Fragen é.json", SMALL,
                 PYTHONIOENCODING="ascii")
    assert out.isascii() and rb"prompt: Wie sch\xf6n?" in out
    assert rb"prompt     Wie sch\xf6n ist \u6771\u4eac" in out and rb"saved in 'mein Lauf \xfc'" in out
    assert (folder / "mein Lauf ü" / "runs.png").exists()


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
