"""Bad files, flags and folders: each ends with status 2 and one line that says what, where and what to do.

The tables below are the corpus: what is given, and words of the message. Each row runs train.main,
doctor.main or sample.main in this process; nothing may be written, not even the folder of --out_dir.
"""

import gzip
import inspect
import json
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import sample
import train
from model import GPT, GPTConfig
from plumbing.vocab import EOT
from tools import doctor

ROOT = Path(__file__).resolve().parent.parent

BYTES = data.Tokenizer("bytes")
SOURCE = inspect.getsource(train.Config)  # the flags' help: to read it anew takes longer than a row


def pair(**changes):
    record = {"prompt": "Q", "chosen": "good", "rejected": "bad"} | changes
    return {key: value for key, value in record.items() if value is not ...}


def line(**changes):
    return json.dumps(pair(**changes)).encode() + b"\n"


def seg(*scores, text="x"):
    return [{"text": f"{text}{i}", "scores": list(s)} for i, s in enumerate(scores)]


def chat(*turns):
    return [{"role": role, "content": text} for role, text in turns]


USER, SAYS = ("user", "hi"), ("assistant", "yes")
GOOD = (line(chosen=seg([1, 2], [3, 4]), rejected=seg([0, 1]))
        + line(prompt="R", chosen=seg([1, 2]), rejected=seg([2, 2], text="y")))

# ---------------------------------------------------------------------------------------------------------
# 1  Data files: name, content, words of the message

FILES = [
    # not a file of lines
    ("empty.jsonl", b"", "no pair is left to train on"),
    ("cut.jsonl.gz", gzip.compress(1000 * GOOD)[:-20],
     "Compressed file ended before the end-of-stream marker"),
    ("plain.jsonl.gz", GOOD, "Not a gzipped file"),
    ("crc.jsonl.gz", gzip.compress(GOOD)[:-8] + bytes(8), "CRC check failed"),
    ("body.jsonl.gz", gzip.compress(GOOD)[:10] + b"\xff" * 40, "Error -3 while decompressing data"),
    ("tail.jsonl.gz", gzip.compress(GOOD) + b"more", "Not a gzipped file"),
    ("zipped.jsonl", gzip.compress(GOOD), "not UTF-8"),
    # not text
    ("latin1.jsonl", '{"prompt": "Q", "chosen": "café", "rejected": "b"}\n'.encode("latin-1"),
     "latin1.jsonl:1: not UTF-8"),
    ("utf16.jsonl", GOOD.decode().encode("utf-16"), "utf16.jsonl:1: not UTF-8"),
    ("binary.jsonl", bytes(range(256)) * 4, "binary.jsonl:1: not JSON"),
    ("late.jsonl", GOOD + b"\xff\xfe\n", "late.jsonl:3: not UTF-8"),
    # not JSON
    ("text.jsonl", b"hello\n", "text.jsonl:1: not JSON (Expecting value"),
    ("second.jsonl", GOOD + b'{"prompt": \n', "second.jsonl:3: not JSON"),
    ("two.jsonl", GOOD.replace(b"\n", b" "), "two.jsonl:1: not JSON (Extra data"),
    ("escape.jsonl", b'{"prompt": "\\q", "chosen": "a", "rejected": "b"}\n', "not JSON (Invalid \\escape"),
    ("control.jsonl", b'{"prompt": "a\tb", "chosen": "a", "rejected": "b"}\n', "Invalid control character"),
    ("deep.jsonl", b"[" * 100_000 + b"\n", "not JSON (maximum recursion depth"),
    ("digits.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", "not JSON (Exceeds the limit"),
    ("fits.jsonl", line(chosen="x" * 300_000), "1 with a response that does not fit block_size 64"),
    # JSON arrays
    ("array.json", b"[1, 2]", 'array.json: item 1: expected an object, found int'),
    ("object.json", line(), "a .json file must hold an array of pairs"),
    ("broken.json", b'[{"prompt": "Q",]', "broken.json: not JSON"),
    ("latin1.json", '["é"]'.encode("latin-1"), "latin1.json: not JSON"),
    # not a pair
    ("number.jsonl", b"3\n", "expected an object, found int"),
    ("nothing.jsonl", b"{}\n", "no form has the keys (none)"),
    ("chosen.jsonl", line(chosen=...), "chosen.jsonl:1: no form has the keys prompt, rejected"),
    ("rejected.jsonl", line(rejected=...), "no form has the keys chosen, prompt"),
    ("prompt.jsonl", line(prompt=...), 'no "prompt", and no "\\n\\nAssistant:" shared by both sides'),
    ("prompt5.jsonl", line(prompt=5), '"prompt" must be a string, found int'),
    ("chosen0.jsonl", line(chosen=None), '"chosen" must be a string, found NoneType'),
    ("rejectd.jsonl", line(rejected=True), '"rejected" must be a string, found bool'),
    ("instruct.jsonl", line(prompt=..., instruction=["x"]), '"instruction" must be a string, found list'),
    ("input.jsonl", line(prompt=..., instruction="x", input=7), '"input" must be a string, found int'),
    # text that is none
    ("sur1.jsonl", b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n',
     '"prompt" holds a lone surrogate'),
    ("sur3.jsonl", line(chosen=[{"text": "\ud83d", "scores": [1]}]),
     '"chosen[0].text" holds a lone surrogate'),
    ("sur4.jsonl", line(prompt=chat(("user", "\udfff")), chosen=chat(SAYS)),
     '"prompt[0].content" holds a lone'),
    # nothing to learn from
    ("same.jsonl", line(chosen="bad"), "1 with identical responses (1)"),
    ("space.jsonl", line(rejected=" \n "), "1 with an empty response (1)"),
    ("nosegment.jsonl", line(chosen=[]), "1 with an empty response (1)"),
    ("one.jsonl", line(), "one.jsonl:1: no group of pairs is small enough to hold out; pass --val_data"),
    # segments and scores
    ("segtext.jsonl", line(chosen=[{"scores": [1]}]),
     '"chosen"[0] must be an object with "text" and "scores"'),
    ("segint.jsonl", line(rejected=[{"text": 3}]), '"rejected[0].text" must be a string, found int'),
    ("nan.jsonl", line(chosen=seg([math.nan])),
     '"chosen"[0].scores: needs a list of finite numbers >= 0, found [nan]'),
    ("big.jsonl", line(chosen=seg([10**40])), "needs a list of finite numbers >= 0, found [1000"),
    ("bool.jsonl", line(chosen=seg([True])), "needs a list of finite numbers >= 0, found [True]"),
    ("flat.jsonl", line(chosen=[{"text": "a", "scores": 4}]), "needs a list of finite numbers >= 0, found 4"),
    ("ragged.jsonl", line(chosen=seg([1, 2], [3]), rejected=seg([1, 2])),
     "a segment with 1 scores and one with 2 in one pair"),
    ("half.jsonl", line(chosen=seg([1, 2])), "a segment with 0 scores and one with 2 in one pair"),
    ("ragged2.jsonl", GOOD + line(chosen=seg([1]), rejected=seg([2], text="y")),
     "ragged2.jsonl:3: 1 scores a segment here, 2 before"),
    # messages
    ("role.jsonl", line(prompt=chat(("narrator", "hi")), chosen=chat(SAYS)),
     "role must be system, user or assistant, found 'narrator'"),
    ("roles.jsonl", line(chosen=chat(USER, ("tool", "x"))),
     '"chosen"[1]: role must be system, user or assistant'),
    ("turnstr.jsonl", line(prompt=["hi"], chosen=chat(SAYS)),
     "role must be system, user or assistant, found 'hi'"),
    ("nocontent.jsonl", line(prompt=[{"role": "user"}], chosen=chat(SAYS)),
     '"prompt[0].content" must be a string, found NoneType'),
    ("image.jsonl", line(prompt=[{"role": "user", "content": [{"type": "image"}]}], chosen=chat(SAYS)),
     "a part of type 'image'; only text can be read"),
    ("side.jsonl", line(prompt=chat(USER), chosen=chat(SAYS), rejected=5),
     '"rejected" must be a list of messages, found int'),
    ("usersays.jsonl", line(prompt=chat(USER), chosen=chat(SAYS), rejected=chat(USER)),
     'both sides are whole conversations, and "prompt" is no turn that they share'),
]

# ---------------------------------------------------------------------------------------------------------
# 2  Flags, after --data good.jsonl --init a --out_dir out --steps 1; words of the message

LONG = "x" * 300
FLAGS = [
    ("--loss", "argument --loss: expected one argument"),
    ("--compile maybe", "unrecognized arguments: maybe"),
    ("--steps 1e3", "argument --steps: invalid int value: '1e3'"),
    ("--steps 99999999999999999999", "--steps 99999999999999999999: must be at least 1 and below 2^63"),
    ("--warmup_steps -1", "--warmup_steps -1: must be at least 0"),
    ("--weight_decay nan", "--weight_decay nan: must be at least 0"),
    ("--grad_clip inf", "--grad_clip inf: must be at least 0"),
    ("--seed 18446744073709551616", "--seed 18446744073709551616: must be at least 0 and below 2^63"),
    ("--block_size 1", "--block_size 1: must be at least 2"),
    # knobs that this run would not read
    ("--sft_steps 5", "--sft_steps: would not be read, no SFT is run before this one"),
    # 2D-DPO
    ("--loss 2d-dpo --aspect_weights 1.5 -0.5", "--aspect_weights 1.5 -0.5: must be >= 0 and sum to 1"),
    ("--loss 2d-dpo --aspect_weights 1", "--aspect_weights: 1 weights for 2 aspects"),
    ("--loss 2d-dpo --val_data aspect.jsonl", "weights for 2 aspects (1 in the held-out pairs)"),
    # the machine
    # files and folders
    ("--data", "argument --data: expected at least one argument"),
    ("--data missing.jsonl.gz", "missing.jsonl.gz: No such file or directory"),
    ("--data good.jsonl missing.jsonl", "missing.jsonl: No such file or directory"),
    ("--data nothing", "nothing: a folder without .jsonl"),
    ("--data a", "a .json file must hold an array of pairs"),
    ("--data folder.jsonl", "folder.jsonl: a folder without"),
    ("--data good.jsonl/x.jsonl", "good.jsonl/x.jsonl: Not a directory"),
    (f"--data {LONG}", "File name too long"),
    (f"--init {LONG}", "no such folder"),
    ("--init gpt3", "--init gpt3: no such folder; choose one, or a name: gpt2, gpt2-medium"),
    ("--init good.jsonl", "--init good.jsonl: no such folder"),
    ("--init nothing --tokenizer bytes",
     "nothing/config.json: No such file or directory; a model folder holds config.json"),
    ("--ref nothing", "nothing/config.json: No such file or directory"),
    ("--ref words", "--ref words: has another tokenizer than the policy"),
    ("--ref bare2", "--ref bare2: has 337 token ids, the tokenizer 257; choose the tokenizer it was trained"),
    ("--ref other", "--ref other: has another tokenizer than the policy"),
    ("--ref short", "--block_size 64: --ref short has 32 positions"),
    ("--tokenizer missing.tiktoken", "missing.tiktoken: No such file or directory"),
    ("--tokenizer gpt4", "tokenizer 'gpt4': is neither gpt2, bytes, a .tiktoken file nor a folder"),
    ("--tokenizer good.jsonl", "tokenizer 'good.jsonl': is neither gpt2, bytes"),
    ("--init bare --tokenizer words", "--init bare: has 257 token ids, the tokenizer 337"),
    ("--out_dir good.jsonl", "--out_dir good.jsonl: is a file; choose a folder"),
    ("--out_dir good.jsonl/out", "--out_dir good.jsonl/out: Not a directory"),
    (f"--out_dir {LONG}", "File name too long"),
    ("--out_dir a", "--out_dir a: is --init too and would be overwritten"),
    ("--ref short --out_dir short --block_size 32", "--out_dir short: is --ref too and would be overwritten"),
    ("--out_dir nothing --resume",
     "nothing/run.json: No such file or directory; is nothing the folder of a run?"),
    ("--out_dir run --resume --overwrite", "--resume: goes with --out_dir FOLDER and without --overwrite"),
]
FROM_SCRATCH = [  # after --data good.jsonl --tokenizer bytes --out_dir out
    ("--n_head 0", "--n_head 0: must be at least 1"),
    ("--n_layer 1000000000", "--n_layer, --n_embd, --block_size: a model of"),
    ("--block_size 10000000000000", "--n_layer, --n_embd, --block_size: a model of"),
    ("--block_size 3", "with a response that does not fit block_size 3"),
    ("--sft_steps 0", "--sft_steps 0: must be at least 1"),
    ("--tokenizer empty.tiktoken", "empty.tiktoken: 256 single bytes are missing"),
    ("--tokenizer text.tiktoken", "text.tiktoken:1: not a line of a .tiktoken file (base64 token, rank)"),
    ("--tokenizer gaps.tiktoken", "gaps.tiktoken: ranks must be 0 to 1, each once"),
    ("--tokenizer few.tiktoken",
     "few.tiktoken: 254 single bytes are missing; not every text could be encoded"),
]

# ---------------------------------------------------------------------------------------------------------
# 3  Model folders: what is done to a copy of a, words of the message (with --init model, as --ref the same)


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


def make_folder(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()
    return change


def tensors(change):
    def apply(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})
    return apply


def header(size, text=b"{}"):
    return put("model.safetensors", struct.pack("<Q", size) + text)


def shards(*names):
    def change(folder):
        index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").unlink()
    return change


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


WPE = "transformer.wpe.weight"
CUT = "cut short, or not a safetensors file"
MODELS = [
    ("weights cut", cut("model.safetensors", 20_000), CUT),
    ("header of 2^60 bytes", header(2**60), CUT),
    ("header is a list", header(2, b"[]"), CUT),
    ("header nested too deeply", header(50_000, b'{"a":' * 10_000), CUT),
    ("header with a negative offset",
     header(57, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}  '),
     CUT),
    ("a Git LFS pointer",
     put("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
     CUT),
    ("no weights", remove("model.safetensors"), "no such file (.bin files are pickles, not read)"),
    ("weights are a folder", make_folder("model.safetensors"), "model.safetensors: "),
    ("a tensor is missing", tensors(lambda t: t.pop(WPE)),
     "tensor wpe.weight is missing, config.json says (64, 16)"),
    ("NaN", tensors(lambda t: t[WPE].fill_(math.nan)), "--init model: wpe.weight holds NaN or infinity"),
    ("a head of its own", tensors(lambda t: t.update({"lm_head.weight": torch.ones(257, 16)})),
     "output head is not tied"),
    ("no config", remove("config.json"), "config.json: No such file or directory; a model folder holds"),
    ("config empty", cut("config.json", 0), "not the configuration of a GPT-2 (Expecting value"),
    ("config nested too deeply", put("config.json", b"[" * 10**5),
     "not the configuration of a GPT-2 (maximum"),
    ("config is a folder", make_folder("config.json"), "config.json: Is a directory"),
    ("no vocab_size", edit("config.json", vocab_size=...),
     "vocab_size = None: needs a whole number of at least 1"),
    ("vocab_size of another model", edit("config.json", vocab_size=50257),
     "tensor wte.weight is (257, 16), config.json says (50257, 16)"),
    ("1.5 heads", edit("config.json", n_head=1.5), "n_head = 1.5: needs a whole number of at least 1"),
    ("more channels than there are", edit("config.json", n_embd=10**6), "config.json says"),
    ("a Llama", edit("config.json", model_type="llama"),
     "model_type = 'llama' is not supported (only 'gpt2')"),
    ("a shard elsewhere", shards("../a/model.safetensors"),
     "shard '../a/model.safetensors' is not in the folder"),
    ("a shard is missing", shards("model-00001.safetensors"), "model-00001.safetensors: no such file"),
    ("an index that is none", both(remove("model.safetensors"), put("model.safetensors.index.json", b"{}")),
     "not an index of shards (KeyError"),
    # its tokenizer
    ("vocab.json empty", cut("vocab.json", 0), "vocab.json: not JSON"),
    ("a byte is missing", edit("vocab.json", a=...),
     "vocab.json: not a vocabulary of GPT-2's kind (KeyError: 'a')"),
    ("no end-of-text", edit("vocab.json", **{EOT: ...}), "(KeyError: '<|endoftext|>')"),
    ("an id twice", edit("vocab.json", a=98), "its ids do not follow its merges, each once"),
    ("merges of three", put("merges.txt", b"#version: 0.2\na b c\n"),
     "not a vocabulary of GPT-2's kind (ValueError"),
    ("a larger vocabulary", both(edit("vocab.json", ab=257), put("merges.txt", b"a b\n")),
     "--init model: has 257 token ids, the tokenizer 258"),
    ("a tokenizer.json of another kind",
     both(remove("vocab.json"), put("tokenizer.json", b'{"model": {"type": "Unigram"}}')),
     "tokenizer.json: not a"),
]

# ---------------------------------------------------------------------------------------------------------
# 4  Folders of runs: what is done to a copy of run, words of the message (with --resume --out_dir model)


def config_of(**changes):
    def change(folder):
        run = json.loads((folder / "run.json").read_text())
        run["config"] = {k: v for k, v in (run["config"] | changes).items() if v is not ...}
        (folder / "run.json").write_text(json.dumps(run))
    return change


def checkpoints(change):
    return lambda folder: [change(path) for path in sorted((folder / "checkpoints").iterdir())]


RUNS = [
    ("no run.json", remove("run.json"), "run.json: No such file or directory; is model the folder of a run?"),
    ("run.json is a folder", make_folder("run.json"), "run.json: Is a directory"),
    ("run.json cut", cut("run.json", 100), "run.json: damaged (Unterminated"),
    ("run.json binary", put("run.json", b"\xff\xfe\x00"), "run.json: damaged ("),
    ("run.json nested too deeply", put("run.json", b'{"a":' * 10**5),
     "run.json: damaged (nested too deeply)"),
    ("no config", edit("run.json", config=...), "run.json: damaged (needs an object with config, identity"),
    ("config is a list", edit("run.json", config=[]), "run.json: damaged (config is no object)"),
    ("identity is text", edit("run.json", identity="x"), "run.json: damaged (identity is no object)"),
    ("no loss", config_of(loss=...), "run.json: damaged (config has no loss)"),
    ("another loss", config_of(loss="kto"), "--loss kto: choose from sft"),
    ("a loss that is none", config_of(loss=["dpo"]), "--loss ['dpo']: must be of type str"),
    ("a batch size of text", config_of(batch_size="9"), "--batch_size '9': must be of type int"),
    ("data are a number", config_of(data=5), "--data 5: must be of type tuple"),
    ("data are numbers", config_of(data=[5]), "--data (5,): must be of type Path"),
    ("the start is a list", config_of(init=[]), "--init []: must be of type str"),
    ("the start is gone", config_of(init="gone"), "--init gone: no such folder"),
    ("the data are gone", config_of(data=["gone.jsonl"]), "gone.jsonl: No such file or directory"),
    ("another format", lambda f: edit("run.json", identity={})(f),
     "--resume: not the run in model: format was None, is"),
    ("checkpoints without keys", checkpoints(lambda p: p.write_text("{}")),
     "no checkpoint in model is intact"),
]

# ---------------------------------------------------------------------------------------------------------
# 5  tools/doctor.py and sample.py

DOCTOR = [
    ("missing.jsonl", "missing.jsonl: No such file or directory"),
    ("nothing", "nothing: a folder without .jsonl"),
    ("cut.jsonl.gz", "Compressed file ended before"),
    ("empty.jsonl", "empty.jsonl: no records"),
    ("good.jsonl --block_size 1", "--block_size: at least 2"),
    ("good.jsonl --block_size x", "argument --block_size: invalid int value: 'x'"),
    ("good.jsonl --tokenizer gpt4", "tokenizer 'gpt4': is neither"),
    ("good.jsonl --plot gone/x.png", "--plot gone/x.png: "),
    ("good.jsonl --plot x.doc", "--plot x.doc: "),
    ("role.jsonl --segment", "role.jsonl:1: \"prompt\"[0]: role must be"),
]
SAMPLE = [  # words after "run"
    ("", "--prompt: say what to answer"),
    ("--prompt Q --max_new_tokens 8 --temperature nan", "--temperature nan: must be at least 0"),
    ("--prompt Q --max_new_tokens 8 --top_k 0", "--top_k 0: must be at least 1"),
    ("--prompt Q --max_new_tokens 8 --top_p 1.5", "--top_p 1.5: must be greater than 0 and at most 1"),
    ("--prompt Q --device cuda:99", "--device cuda:99: torch cannot use it here"),
    (f"--prompt Q --seed {2**70}", f"--seed {2**70}: must be at least 0 and below 2^63"),
    ("--prompt Q --ref words", "--ref words: has another tokenizer than the run"),
    ("--prompt Q --ref bare2", "--ref bare2: has 337 token ids"),
    ("--prompts latin1.jsonl", "--prompts latin1.jsonl: not UTF-8"),
    ("--prompts empty.jsonl", "--prompts empty.jsonl: holds no prompt"),
    ("--prompts chosen2.jsonl", 'JSON object with a "prompt"'),
]


# ---------------------------------------------------------------------------------------------------------
# The corpus run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The folder with every file and folder that the tables name."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, content, _ in FILES:
        (folder / name).write_bytes(content)
    more = {"good.jsonl": GOOD + GOOD.replace(b'"Q"', b'"S"').replace(b'"R"', b'"T"'),
            "aspect.jsonl": line(chosen=seg([1]), rejected=seg([2], text="y")),
            "chosen2.jsonl": b'{"chosen": "x"}\n',
            "empty.tiktoken": b"", "text.tiktoken": b"hello world again\n",
            "gaps.tiktoken": b"YQ== 0\nYg== 2\n", "few.tiktoken": b"YQ== 0\nYg== 1\n"}
    for name, content in more.items():
        (folder / name).write_bytes(content)
    (folder / "nothing").mkdir()
    (folder / "folder.jsonl").mkdir()
    words = data.Tokenizer(ROOT / "toy" / "toy.tiktoken")
    for name, tokenizer in (("a", BYTES), ("b", BYTES), ("short", BYTES), ("other", BYTES),
                            ("words", words)):
        sizes = GPTConfig(tokenizer.vocab_size, 32 if name == "short" else 64, 1, 2, 16)
        GPT(sizes).save_pretrained(folder / name)
        tokenizer.save(folder / name)
    vocab = json.loads((folder / "other" / "vocab.json").read_text())
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "other" / "vocab.json").write_text(json.dumps(vocab))
    bare = shutil.ignore_patterns("vocab.json", "merges.txt", "tokenizer.tiktoken")
    shutil.copytree(folder / "a", folder / "bare", ignore=bare)
    shutil.copytree(folder / "words", folder / "bare2", ignore=bare)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main("--data good.jsonl --init a --out_dir run --steps 2 --batch_size 2 --save_every 1".split())
    return folder


def listing(folder):
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.name != ".lock"}


@pytest.fixture
def refuse(corpus, monkeypatch, capsys):
    """Call a main function: status 2, one line with these words, no traceback, nothing written."""
    monkeypatch.chdir(corpus)
    monkeypatch.setattr(inspect, "getsource", lambda _: SOURCE)

    def check(main, arguments, words, lines=1):
        before = listing(corpus)
        capsys.readouterr()
        try:
            status = main(arguments if isinstance(arguments, list) else arguments.split())
        except SystemExit as e:
            status = e.code
        out, error = capsys.readouterr()
        assert status == 2, (status, out[-500:], error[-500:])
        assert words in error, error
        assert "Traceback" not in error + out
        assert len(error.strip().splitlines()) <= lines, error
        assert listing(corpus) == before and not Path("out").exists()
        return error
    yield check
    for name in ("out", "sft", "out-2"):  # of a row that was accepted: the next one must not find it
        shutil.rmtree(corpus / name, ignore_errors=True)


PLAIN = "--init a --out_dir out --steps 1 --data "


@pytest.mark.parametrize("name, content, words", FILES, ids=[row[0] for row in FILES])
def test_bad_data_are_named_by_file_and_line(name, content, words, refuse):
    error = refuse(train.main, PLAIN + name, words, lines=11)
    assert name in error


@pytest.mark.parametrize("flags, words", FLAGS, ids=[row[0][:40] for row in FLAGS])
def test_a_bad_flag_or_name_is_named(flags, words, refuse):
    error = refuse(train.main, f"{PLAIN} good.jsonl {flags}", words)
    assert error.startswith("train.py: error: ")


@pytest.mark.parametrize("flags, words", FROM_SCRATCH, ids=[row[0][:40] for row in FROM_SCRATCH])
def test_without_init_too_and_before_the_reference_is_trained(flags, words, refuse):
    refuse(train.main, f"--tokenizer bytes --out_dir out --data good.jsonl {flags}", words, lines=3)
    assert not Path("sft").exists()


def damaged_copy(corpus, name, change):
    shutil.rmtree(corpus / "model", ignore_errors=True)
    shutil.copytree(corpus / name, corpus / "model")
    change(corpus / "model")


@pytest.mark.parametrize("what, change, words", MODELS, ids=[row[0] for row in MODELS])
def test_a_damaged_or_foreign_model_folder_is_refused(what, change, words, corpus, refuse):
    damaged_copy(corpus, "a", change)
    refuse(train.main, PLAIN + "good.jsonl --init model", words)


@pytest.mark.parametrize("what, change, words", RUNS, ids=[row[0] for row in RUNS])
def test_a_damaged_run_is_refused_and_left_as_it_is(what, change, words, corpus, refuse):
    damaged_copy(corpus, "run", change)
    refuse(train.main, "--resume --out_dir model --steps 3", words)


@pytest.mark.parametrize("arguments, words", DOCTOR)
def test_doctor_names_bad_input_too(arguments, words, refuse):
    bytes_too = "" if "--tokenizer" in arguments else " --tokenizer bytes"
    refuse(doctor.main, arguments + bytes_too, words, lines=30)


@pytest.mark.parametrize("arguments, words", SAMPLE)
def test_sample_names_bad_input_too(arguments, words, refuse):
    refuse(sample.main, f"run {arguments}", words)


@pytest.mark.parametrize("name", ["good.jsonl", "a/config.json", "a/vocab.json", "run/run.json"])
def test_a_file_without_permission_is_named(name, refuse, monkeypatch):
    """Injected, because root may read everything."""
    real = Path.read_bytes

    def read_bytes(path):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    flags = "--resume --out_dir run" if "run" in name else PLAIN + "good.jsonl"
    refuse(train.main, flags, f"{name}: Permission denied")


def test_ten_bad_lines_are_listed_and_the_rest_counted(corpus, refuse):
    (corpus / "many.jsonl").write_bytes(GOOD + b"".join(b'{"x%d": 1}\n' % i for i in range(25)))
    error = refuse(train.main, PLAIN + "many.jsonl", "many.jsonl:3: no form has the keys x0", lines=11)
    assert error.count("many.jsonl:") == 10 and error.endswith("... and 15 more\n")


SPECIAL = ["<|endoftext|>", "<|im_start|>system", "<s>", "</s>", "[INST]", "<|begin_of_text|>", "\0",
           "\ufeff", "\u2028", "a\r\nb", "\U0001f468\u200d\U0001f469", "\u202e", "NaN", "é", "e\u0301"]


def test_strings_that_look_special_are_text_and_train(corpus, tmp_path, monkeypatch):
    """End-of-text comes once, at the end of each response, whatever the text says."""
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_bytes(b"\xef\xbb\xbf" + b"".join(
        line(prompt=f"{text} {i}", chosen=f"{text} good", rejected=f"bad {text}", unknown=[i])
        for i, text in enumerate(SPECIAL)).replace(b"\n", b"\r\n"))
    pairs, _ = data.load(["d.jsonl"], BYTES, 64)
    assert len(pairs) == len(SPECIAL)
    for i, text in enumerate(SPECIAL):
        for side, ids in (("good", pairs[i].chosen), ("bad", pairs[i].rejected)):
            assert ids.tolist().count(BYTES.eot) == 1 and ids[-1] == BYTES.eot
            assert side in BYTES.decode(ids[:-1]) and text in BYTES.decode(ids[:-1])
        assert BYTES.decode(pairs[i].prompt) == f"{text} {i}"
    train.main(f"--data d.jsonl --init {corpus}/a --out_dir out --steps 1 --batch_size 4".split())
    assert Path("out/model.safetensors").exists()
