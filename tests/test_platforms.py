"""Machines unlike this one: Windows and macOS, other encodings, odd paths, no compiler."""

import builtins
import io
import json
import sys
import tomllib
from pathlib import Path

import pytest
from test_train import ROOT

import train
from tools import plot

@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")  # matplotlib's font lacks letters of some scripts
def test_every_program_runs_without_the_modules_of_one_system_in_any_folder_and_on_an_ascii_terminal(
        tmp_path, monkeypatch):
    """Unix's resource and fcntl hidden; no g++, no HOME; a file opened without an encoding, which would be
    another one on Windows, is an error; spaces and letters of any script in paths; data with CRLF line ends;
    what standard output cannot show is escaped."""
    place = tmp_path / "Größe 東京"
    place.mkdir()
    monkeypatch.chdir(place)
    lines = [json.dumps({"prompt": f"Wie schön ist 東京, {i}?", "chosen": f" Sehr schön {i} ☃",
                         "rejected": f" Übel {i}"}, ensure_ascii=False) + "\r\n" for i in range(12)]
    (place / "Paare é.jsonl").write_bytes("".join(lines).encode())
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("HOME", "PATH"):
        monkeypatch.delenv(name, raising=False)
    real, ours = open, (str(ROOT), str(place))

    def strict_open(file, mode="r", *args, **kwargs):
        caller = sys._getframe(1).f_code.co_filename
        assert "b" in mode or kwargs.get("encoding") or not caller.startswith(ours), f"{caller}: no encoding"
        return real(file, mode, *args, **kwargs)
    monkeypatch.setattr(builtins, "open", strict_open)
    for name, method in {"read_text": Path.read_text, "write_text": Path.write_text}.items():
        monkeypatch.setattr(Path, name, lambda *x, encoding, method=method: method(*x, encoding=encoding))
    terminal = io.TextIOWrapper(buffer := io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    flags = ["--out_dir", "mein Lauf ü", "--device", "cpu"]
    train.main(["--data", "Paare é.jsonl", "--tokenizer", "bytes", *flags,
                *"--steps 2 --sft_steps 2 --batch_size 4 --n_layer 1 --n_head 2 --n_embd 16".split()])
    train.main(["--resume", *flags, "--steps", "3"])
    plot.main(["mein Lauf ü"])
    terminal.flush()
    out = buffer.getvalue()
    assert out.isascii() and rb"'mein Lauf \xfc'" in out
    assert rb"prompt     Wie sch\xf6n ist \u6771\u4eac" in out
    log = (place / "mein Lauf ü/log.jsonl").read_text(encoding="utf-8")
    assert "loss" in log and "peak_memory" not in log

def test_pyproject_and_requirements_list_the_same_dependencies():
    """`uv sync` reads the one, `pip install -r` the other."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == (ROOT / "requirements.txt").read_text().split()
