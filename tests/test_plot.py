"""tools/plot.py: a PNG from runs' logs; bad input is one line and exit status 2."""

import json

import pytest

import train
from tools import plot

pytestmark = pytest.mark.slow

def write_log(folder, steps=(1, 5, 10), loss="dpo"):
    """A log of the form that train.py writes: a header, records of steps, notes, records of evaluations."""
    folder.mkdir(parents=True)
    names = ["loss"] if loss == "sft" else [name for *_, metrics in plot.PANELS for name in metrics]
    records = [{"config": {"loss": loss}, "held_out": 8}]
    for step in (0, *steps):
        records.append({"step": step} | {f"eval/{name}": 0.1 * step for name in names})
        if step:
            records.append({"step": step, "note": "the margin is still exactly 0: nothing is learned"})
            records.append({"step": step, "grad_norm": 1.0} | {name: 0.2 * step for name in names[:5]})
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)

def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000

def test_runs_of_any_loss_length_and_name_go_into_one_table_and_figure(tmp_path, capsys, monkeypatch):
    """SFT beside DPO, equal folder names, a single step. The best stands first, equal runs are marked and
    share a curve; one legend is beside the panels; without --to, runs.png in the first folder."""
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    folders = [write_log(tmp_path / "one", steps=(1,)), write_log(tmp_path / "sft", loss="sft"),
               write_log(tmp_path / "dpo"), write_log(tmp_path / "b" / "dpo")]
    plot.main(folders)
    head, *rows, _, name = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "loss", "β", "steps"] and name == str(tmp_path / "one" / "runs.png")
    assert [row.split()[0] for row in rows if row] == [folders[i] for i in (2, 3, 0, 1)]
    assert rows[1].split()[1:3] == ["=", folders[2]]
    assert rows[0].split()[1:5] == ["dpo", "10", "1.0000", "1.0000"]
    assert rows[3].split()[1:] == ["sft", "10", "1.0000"]
    assert is_png(tmp_path / "one" / "runs.png")
    [figure] = figures
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[2:4] == [f"{folders[2]} = {folders[3]}", "training"]
    assert not any(axis.legend_ for axis in figure.axes)
    assert len(figure.axes[0].lines) == 6  # three curves, training and held out

@pytest.mark.parametrize("content, said", [
    (None, "No such file"),
    ('{"config": {}}\n', "no step in it yet"),
    ('{"config": {}}\n{"step": 1, "loss": 0.6}\n{"step": 2, "lo', "log.jsonl:3: not JSON"),
    ("[1, 2]\n", "log.jsonl:1: not a record"),
    ('{"step": 1, "loss": "high"}\n', "log.jsonl:1: a value is not a number"),
    (b"\xff\xfe\x00", "not a text file")])
def test_bad_logs_are_one_line_and_status_2(tmp_path, capsys, content, said):
    if content is not None:
        (tmp_path / "log.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in error and error.startswith("plot.py: error: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))

@pytest.mark.parametrize("flags, said", [
    ([], "required"), (["--lodd"], "unrecognized"), (["--to", "x.pdf"], "name a .png file")])
def test_bad_flags_are_one_line_and_status_2(tmp_path, capsys, flags, said):
    folders = [write_log(tmp_path / "dpo")] if flags else []
    with pytest.raises(SystemExit) as stop:
        plot.main(folders + flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in error and error.count("\n") == 1

@pytest.mark.slow
def test_a_run_of_train_py_is_drawn(tmp_path):
    """The log that train.py really writes has all that the panels read."""
    lines = [json.dumps({"prompt": f"{i}?", "chosen": "good", "rejected": "bad"}) + "\n" for i in range(4)]
    (tmp_path / "d.jsonl").write_text("".join(lines))
    train.main(["--steps", "2", "--sft_steps", "2", "--n_embd", "16", "--data", str(tmp_path / "d.jsonl"),
                "--n_head", "1", "--tokenizer", "bytes", "--out_dir", str(tmp_path / "dpo")])
    logged = set().union(*plot.read_log(tmp_path / "dpo")[1])
    assert all(metric in logged or "eval/" + metric in logged
               for *_, metrics in plot.PANELS for metric in metrics)
    text = "\n".join(plot.table({"dpo": plot.read_log(tmp_path / "dpo")}))
    assert text.split("\n")[1].split()[:4] == ["dpo", "dpo", "0.1", "2"]
