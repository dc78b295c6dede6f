"""Bad files, flags and folders: each ends with status 2 and one line that says what, where and what to do.

The tables below are the corpus: what is given, and words of the message. Each row runs train.main in
this process; nothing may be written, not even the folder of --out_dir. (Malformed records: test_pairs.py.)
"""

import gzip
import json
import math
import os
import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file
from test_train import BYTES, ROOT, write_lines

import data
import train
from model import GPT, GPTConfig
from plumbing import flags as core_flags
from plumbing.errors import ConfigError, DataError, ModelError, RunError

SEGMENTS = {"chosen": [{"text": "good", "scores": [1, 2]}, {"text": "!", "scores": [2, 0]}],
            "rejected": [{"text": "bad", "scores": [0, 1]}]}
GOOD = b"".join(json.dumps({"prompt": f"Q{i}"} | SEGMENTS).encode() + b"\n" for i in range(4))
LONG = "x" * 300

# ---- Flags, after --data good.jsonl --init a --out_dir out (init=none: without --init) and the message ----

FLAGS = [
    ("--bata 1", "unrecognized arguments: --bata"), ("--beta x", "argument --beta: invalid float value"),
    ("--loss ipo", "--loss ipo: choose from sft, dpo,"), ("--steps 0", "--steps 0: must be at least 1"),
    ("--steps 99999999999999999999", "--steps 99999999999999999999: must be at lea"),
    ("--warmup_steps -1", "--warmup_steps -1: must be at least 0"),
    ("--weight_decay nan", "--weight_decay nan: must be at least 0"),
    ("--lr 0", "--lr 0.0: must be positive and finite"),
    ("--beta inf", "--beta inf: must be positive and finite"), ("--dtype float16", "choose from"),
    ("--loss dpop --lam -1", "--lam -1.0: must be positive"),
    ("--device nonsense", "--device nonsense: torch cannot use it here;"),
    ("--device cuda:99", "--device cuda:99: torch cannot use it here;"),
    ("--lam 1", "--lam: would not be read, the loss dpo has n"),
    ("--rejected_weight score", "--rejected_weight: would not be read, the lo"),
    ("--sft_steps 5", "--sft_steps: would not be read, no SFT is ru"),
    ("--loss sft --ref a", "--ref: would not be read, the loss sft has n"),
    ("--loss 2d-dpo --rejected_weight badness", "--rejected_weight badness: not with 2d-dpo"),
    ("--loss 2d-dpo --aspect_weights a b", "--aspect_weights: could not convert"),
    ("--loss 2d-dpo --aspect_weights 1.5 -0.5", "--aspect_weights 1.5 -0.5: must be >= 0 and"),
    ("--loss 2d-dpo --aspect_weights 1", "--aspect_weights: 1 weights for 2 aspects"),
    ("--loss 2d-dpo --val_data aspect.jsonl", "weights for 2 aspects (1 held out)"),
    ("--loss 2d-dpo --data plain.jsonl", "--loss 2d-dpo: needs scores in every segment"),
    ("--data missing.jsonl", "missing.jsonl: No such file"),
    ("--val_data missing.jsonl", "missing.jsonl: No such file"),
    ("--data nothing --tokenizer gone", "nothing: a folder; name the files that are meant"),
    ("--data empty.jsonl", "no pair is left"),
    ("--data cut.jsonl.gz", "cut.jsonl.gz: Compressed file ended before t"),
    ("--data late.jsonl", "late.jsonl:5: not UTF-8"), ("--data second.jsonl", "second.jsonl:5: not JSON"),
    ("--data one.jsonl", "one.jsonl:1: no group of pairs is small enou"), (f"--data {LONG}", "xxxx"),
    ("--init chatty --data chat.jsonl", "chatty: has its own chat template; ports/huggingface.py trains w"),
    ("--ref chatty", "--ref chatty: has another tokenizer, other ids or another chat t"),
    ("--init gpt3", "gpt3/config.json: No such file or directory; a model is a folder with"),
    (f"--init {LONG}", "name too long"),
    ("--init nothing", "nothing/config.json: "),
    ("--ref nothing", "nothing/config.json: "),
    ("--ref words", "--ref words: has another tokenizer"),
    ("--ref other", "--ref other: has another tokenizer"), ("--ref bare", "--ref bare: has 337 token ids"),
    ("--ref short", "--block_size 64: --ref short has 32"),
    ("--tokenizer missing.tiktoken", "missing.tiktoken: No such file or directory"),
    ("--tokenizer words", "has 257 token ids, the tokenizer 337"),
    ("--init other --tokenizer bytes", "--init other: has another tokenizer"),
    ("--init bare --tokenizer bytes", "--init bare: has 337 token ids, the tokenize"),
    ("--n_layer 3", "--n_layer 3: --init has 1"), ("--block_size 65", "--block_size 65: --init a has 64"),
    ("--out_dir good.jsonl", "--out_dir good.jsonl: is a file; choose a fo"),
    (f"--out_dir {LONG}", "File name too long"), ("--out_dir a", "--out_dir a:"),
    ("--out_dir run", "--out_dir run: holds a dpo run; choose --res"),
    ("--resume", "--resume: goes with --out_dir FOLDER"),
    ("--out_dir nothing --resume", "nothing/run.json: No such file or directory;"),
    ("--out_dir gone --resume", "gone/run.json: No such file or directory"),
    ("--out_dir run --resume --overwrite", "--resume: goes with --out_dir FOLDER and wit"),
    ("init=none --n_embd 30", "not divisible"),
    ("init=none --n_layer 1000000000", "--n_layer, --n_embd, --block_size:"),
    ("init=none --block_size 3", "does not fit block_size 3"),
    ("init=none --tokenizer text.tiktoken", "text.tiktoken:1: not a line of a .tiktoken f"),
    ("init=none --tokenizer few.tiktoken", "few.tiktoken: 254 single bytes are missing")]

# ---- Model folders: what is done to a copy of a; words of the message, with --init model ----

def edit(name, **changes):
    """Change keys of a JSON file; ... removes one."""
    def change(folder):
        value = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in value.items() if v is not ...}))
    return change

def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)

def remove(name):
    return lambda folder: (folder / name).unlink()

def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)

def make_nan(folder):
    nan = {name: x * math.nan for name, x in load_file(folder / "model.safetensors").items()}
    save_file(nan, folder / "model.safetensors", {"format": "pt"})

MODELS = [  # the rest: test_pretrained.py, test_vocab.py
    (cut("model.safetensors", 20_000), "model/model.safetensors: "),
    (lambda f: [cut("model.safetensors", 99)(f), remove("tokenizer.json")(f)], "model/model.safetensors: "),
    (remove("model.safetensors"), "model.safetensors"),
    (make_nan, "--init model: wte.weight holds NaN or infinity"),
    (remove("config.json"), "model/config.json: "), (cut("config.json", 0), "config.json: "),
    (edit("config.json", model_type="llama"),
     "model/config.json: a llama; python ports/huggingface.py --init model may train it"),
    (cut("tokenizer.json", 0), "tokenizer.json: not JSON"),
    (edit("tokenizer.json", model={"type": "Unigram"}), "tokenizer.json: ")]

# ---- Folders of runs: what is done to a copy of run; words of the message, with --resume --steps 3 ----

def config_of(**changes):
    def change(folder):
        config = json.loads((folder / "run.json").read_text())["config"]
        edit("run.json", config={k: v for k, v in (config | changes).items() if v is not ...})(folder)
    return change

RUNS = [
    (remove("run.json"), "run.json: No such file or directory; is model the folder of a run?"),
    (cut("run.json", 100), "run.json: damaged ("), (put("run.json", b"\xff\xfe\x00"), "run.json: damaged ("),
    (put("run.json", b'{"a":' * 10**5), "run.json: damaged ("), (put("run.json", b"[]"), "damaged ("),
    (edit("run.json", config=...), "run.json: damaged (no config); start anew, with --overwrite or elsew"),
    (config_of(loss="kto"), "--loss kto: choose from sft"),
    (config_of(init="gone"), "gone/config.json: No such file or directory; a model is a folder"),
    (config_of(data=["gone.jsonl"]), "gone.jsonl: No such file"),
    (lambda f: [p.write_bytes(b"{}") for p in f.glob("checkpoints/*")], "model: has no checkpoint that ")]

@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder with every file and folder that the tables name."""
    folder = tmp_path_factory.mktemp("corpus")
    files = {"good.jsonl": GOOD, "empty.jsonl": b"", "cut.jsonl.gz": gzip.compress(1000 * GOOD)[:-20],
             "late.jsonl": GOOD + b"\xff\xfe\n", "second.jsonl": GOOD + b'{"prompt": \n',
             "one.jsonl": GOOD[:GOOD.index(b"\n")], "text.tiktoken": b"hello world again\n",
             "few.tiktoken": b"YQ== 0\nYg== 1\n"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    aspect = {side: [{"text": side, "scores": [1]}] for side in SEGMENTS}
    write_lines(folder / "aspect.jsonl", [{"prompt": "Q"} | aspect])
    write_lines(folder / "plain.jsonl", [{"prompt": x, "chosen": "a", "rejected": "b"} for x in "1234"])
    (folder / "nothing").mkdir()
    words = data.Tokenizer(ROOT / "toy" / "toy.tiktoken")
    for name, tokenizer in (("a", BYTES), ("short", BYTES), ("other", BYTES), ("words", words)):
        sizes = GPTConfig(tokenizer.vocab_size, 32 if name == "short" else 64, 1, 2, 16)
        GPT(sizes).save_pretrained(folder / name)
        tokenizer.save(folder / name)
    swapped = json.loads((folder / "other/tokenizer.json").read_text())
    swapped["model"]["vocab"] |= {"a": 98, "b": 97}
    (folder / "other/tokenizer.json").write_text(json.dumps(swapped))
    message = {"role": "user", "content": "Q"}
    write_lines(folder / "chat.jsonl", [{"prompt": [message], "chosen": "a", "rejected": "b"}])
    shutil.copytree(folder / "a", folder / "chatty")
    (folder / "chatty/chat_template.jinja").write_text("another")
    shutil.copytree(folder / "words", folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main("--data good.jsonl --init a --out_dir run --steps 2 --batch_size 2 --save_every 1".split())
    return folder

def listing(folder):
    return {p: p.is_file() and p.read_bytes() for p in folder.rglob("*") if p.name != ".lock"}

@pytest.fixture
def refuse(corpus, monkeypatch, capsys):
    """Call train.main: status 2, one line with these words, nothing written."""
    monkeypatch.chdir(corpus)

    def check(arguments, words):
        before = listing(corpus)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            train.main(arguments.split())
        error = capsys.readouterr().err
        assert error.startswith("train.py: error: ") and words in error, error
        lines = 1 + (words.startswith(("no pair", "does not fit")))  # counts, and this
        assert len(error.strip().splitlines()) == lines and "Traceback" not in error
        assert listing(corpus) == before
    yield check
    for name in ("out", "sft", "out-2"):  # of a row that was accepted: the next one must not find it
        shutil.rmtree(corpus / name, ignore_errors=True)

@pytest.mark.parametrize("flags, words", FLAGS, ids=[row[0][:40] for row in FLAGS])
def test_a_bad_flag_or_file_or_name_is_one_line(flags, words, refuse):
    start = "--tokenizer bytes" if flags.startswith("init=none") else "--init a"
    flags = f"--data good.jsonl {start} --steps 1 {flags.removeprefix('init=none')}"
    refuse(flags if flags.endswith("--resume") else f"--out_dir out {flags}", words)

@pytest.mark.parametrize("flag", ["--ref", "--init", "--out_dir", "--tokenizer", "--data"])
def test_an_empty_value_is_not_taken_for_one_that_was_not_given(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main([flag, ""])
    assert f"{flag}: is empty (an unset variable?)" in capsys.readouterr().err

def damaged_copy(corpus, name, change):
    shutil.rmtree(corpus / "model", ignore_errors=True)
    shutil.copytree(corpus / name, corpus / "model")
    change(corpus / "model")

@pytest.mark.parametrize("number", range(len(MODELS)))
def test_a_damaged_or_foreign_model_folder_is_refused(number, corpus, refuse):
    change, words = MODELS[number]
    damaged_copy(corpus, "a", change)
    refuse("--data good.jsonl --out_dir out --init model", words)

@pytest.mark.parametrize("number", range(len(RUNS)))
def test_a_damaged_run_is_refused_and_left_as_it_is(number, corpus, refuse):
    change, words = RUNS[number]
    damaged_copy(corpus, "run", change)
    refuse("--resume --out_dir model --steps 3", words)

@pytest.mark.parametrize("error, status, line", [
    (ConfigError("no"), 2, "train.py: error: no\n"), (DataError("no"), 2, "train.py: error: no\n"),
    (ModelError("no"), 2, "train.py: error: no\n"), (RunError("step 3: no"), "train.py: step 3: no", ""),
    (BrokenPipeError(), 0, ""), (KeyboardInterrupt(), 130, "")])
def test_our_four_kinds_of_error_are_one_line_and_a_closed_pipe_is_no_error(
        error, status, line, monkeypatch, capsys):
    def fails(*_):
        raise error
    monkeypatch.setattr(core_flags, "resolve", fails)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which main may take away
    with pytest.raises(SystemExit) as stop:
        train.main([])
    assert stop.value.code == status and capsys.readouterr().err == line
