"""Bad files, flags and folders: each ends with status 2 and one line that says what, where and what to do.

The tables below are the corpus: what is given, and words of the message. Each row runs train.main,
doctor.main or sample.main in this process; nothing may be written, not even the folder of --out_dir.
"""

import gzip
import inspect
import json
import math
import os
import re
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
from tools import doctor

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
    ("blank.jsonl", b"\n \n\t\n\r\n", "no pair is left to train on"),
    ("empty.jsonl.gz", gzip.compress(b""), "no pair is left to train on"),
    ("cut.jsonl.gz", gzip.compress(1000 * GOOD)[:-20],
     "Compressed file ended before the end-of-stream marker"),
    ("head.jsonl.gz", gzip.compress(1000 * GOOD)[:5],
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
    ("nul.jsonl", b"\0" * 1000, "nul.jsonl:1: not JSON"),
    ("late.jsonl", GOOD + b"\xff\xfe\n", "late.jsonl:3: not UTF-8"),
    # not JSON
    ("text.jsonl", b"hello\n", "text.jsonl:1: not JSON (Expecting value"),
    ("second.jsonl", GOOD + b'{"prompt": \n', "second.jsonl:3: not JSON"),
    ("quotes.jsonl", b"{'prompt': 'Q', 'chosen': 'a', 'rejected': 'b'}\n",
     "Expecting property name enclosed in double"),
    ("comma.jsonl", GOOD.strip() + b",\n", "not JSON (Extra data"),
    ("two.jsonl", GOOD.replace(b"\n", b" "), "two.jsonl:1: not JSON (Extra data"),
    ("string.jsonl", b'{"prompt": "Q\n', "not JSON (Unterminated string"),
    ("escape.jsonl", b'{"prompt": "\\q", "chosen": "a", "rejected": "b"}\n', "not JSON (Invalid \\escape"),
    ("control.jsonl", b'{"prompt": "a\tb", "chosen": "a", "rejected": "b"}\n', "Invalid control character"),
    ("deep.jsonl", b"[" * 100_000 + b"\n", "not JSON (maximum recursion depth"),
    ("deep2.jsonl", b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n", "maximum recursion depth"),
    ("digits.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}\n", "not JSON (Exceeds the limit"),
    ("huge.jsonl", b'{"prompt": "' + b"x" * 3_000_000 + b"\n", "huge.jsonl:1: not JSON"),
    ("fits.jsonl", line(chosen="x" * 300_000), "1 with a response that does not fit block_size 64"),
    # JSON arrays
    ("array.json", b"[1, 2]", 'array.json: item 1: expected an object, found int'),
    ("object.json", line(), "a .json file must hold an array of pairs"),
    ("broken.json", b'[{"prompt": "Q",]', "broken.json: not JSON"),
    ("latin1.json", '["é"]'.encode("latin-1"), "latin1.json: not JSON"),
    ("none.json", b"[]", "no pair is left to train on"),
    # not a pair
    ("list.jsonl", b"[]\n", "list.jsonl:1: expected an object, found list"),
    ("number.jsonl", b"3\n", "expected an object, found int"),
    ("null.jsonl", b"null\n", "expected an object, found NoneType"),
    ("nothing.jsonl", b"{}\n", 'key "chosen" is missing'),
    ("chosen.jsonl", line(chosen=...), 'chosen.jsonl:1: key "chosen" is missing'),
    ("rejected.jsonl", line(rejected=...), 'key "rejected" is missing'),
    ("prompt.jsonl", line(prompt=...), 'no "prompt", and no "\\n\\nAssistant:" shared by both sides'),
    ("other.jsonl", b'{"question": "Q", "response_j": "a", "response_k": "b"}\n', 'key "chosen" is missing'),
    ("prompt5.jsonl", line(prompt=5), '"prompt" must be a string, found int'),
    ("promptd.jsonl", line(prompt={}), '"prompt" must be a string, found dict'),
    ("chosen0.jsonl", line(chosen=None), '"chosen" must be a string, found NoneType'),
    ("chosen1.jsonl", line(chosen=1.5), '"chosen" must be a string, found float'),
    ("rejectd.jsonl", line(rejected=True), '"rejected" must be a string, found bool'),
    ("instruct.jsonl", line(prompt=..., instruction=["x"]), '"instruction" must be a string, found list'),
    ("input.jsonl", line(prompt=..., instruction="x", input=7), '"input" must be a string, found int'),
    # text that is none
    ("sur1.jsonl", b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n',
     '"prompt" holds a lone surrogate'),
    ("sur2.jsonl", b'{"prompt": "Q", "chosen": "\\udc00 a", "rejected": "b"}\n',
     '"chosen" holds a lone surrogate'),
    ("sur3.jsonl", line(chosen=[{"text": "\ud83d", "scores": [1]}]),
     '"chosen[0].text" holds a lone surrogate'),
    ("sur4.jsonl", line(prompt=chat(("user", "\udfff")), chosen=chat(SAYS)),
     '"prompt[0].content" holds a lone'),
    # nothing to learn from
    ("same.jsonl", line(chosen="bad"), "1 with identical responses (1)"),
    ("void.jsonl", line(chosen=""), "1 with an empty response (1)"),
    ("space.jsonl", line(rejected=" \n "), "1 with an empty response (1)"),
    ("nosegment.jsonl", line(chosen=[]), "1 with an empty response (1)"),
    ("one.jsonl", line(), "one.jsonl:1: too few pairs to hold some out; pass --val_data"),
    # segments and scores
    ("segtext.jsonl", line(chosen=[{"scores": [1]}]),
     '"chosen"[0] must be an object with "text" and "scores"'),
    ("segstr.jsonl", line(chosen=["a", "b"]), '"chosen"[0] must be an object with "text" and "scores"'),
    ("segint.jsonl", line(rejected=[{"text": 3}]), '"rejected[0].text" must be a string, found int'),
    ("nan.jsonl", line(chosen=seg([math.nan])),
     '"chosen"[0].scores: needs a list of finite numbers >= 0, found [nan]'),
    ("inf.jsonl", line(chosen=seg([1], [math.inf])),
     '"chosen"[1].scores: needs a list of finite numbers >= 0'),
    ("minus.jsonl", line(rejected=seg([-1])),
     '"rejected"[0].scores: needs a list of finite numbers >= 0, found [-1]'),
    ("big.jsonl", line(chosen=seg([10**40])), "needs a list of finite numbers >= 0, found [1000"),
    ("word.jsonl", line(chosen=seg(["4"])), "needs a list of finite numbers >= 0, found ['4']"),
    ("bool.jsonl", line(chosen=seg([True])), "needs a list of finite numbers >= 0, found [True]"),
    ("flat.jsonl", line(chosen=[{"text": "a", "scores": 4}]), "needs a list of finite numbers >= 0, found 4"),
    ("ragged.jsonl", line(chosen=seg([1, 2], [3]), rejected=seg([1, 2])),
     "a segment with 1 scores and one with 2 in one pair"),
    ("half.jsonl", line(chosen=seg([1, 2])), "a segment with 0 scores and one with 2 in one pair"),
    ("ragged2.jsonl", GOOD + line(chosen=seg([1]), rejected=seg([2], text="y")),
     "ragged2.jsonl:3: 1 scores a segment here, 2 before"),
    # messages
    ("role.jsonl", line(prompt=chat(("human", "hi")), chosen=chat(SAYS)),
     "role must be system, user or assistant, found 'human'"),
    ("norole.jsonl", line(prompt=[{"content": "hi"}], chosen=chat(SAYS)),
     "role must be system, user or assistant, found None"),
    ("roles.jsonl", line(chosen=chat(USER, ("tool", "x"))),
     '"chosen"[1]: role must be system, user or assistant'),
    ("turnstr.jsonl", line(prompt=["hi"], chosen=chat(SAYS)),
     "role must be system, user or assistant, found 'hi'"),
    ("nocontent.jsonl", line(prompt=[{"role": "user"}], chosen=chat(SAYS)),
     '"prompt[0].content" must be a string, found NoneType'),
    ("image.jsonl", line(prompt=[{"role": "user", "content": [{"type": "image"}]}], chosen=chat(SAYS)),
     '"prompt[0].content" must be a string, found list'),
    ("side.jsonl", line(prompt=chat(USER), chosen=chat(SAYS), rejected=5),
     '"rejected" must be a list of messages, found int'),
    ("usersays.jsonl", line(prompt=chat(USER), chosen=chat(SAYS), rejected=chat(USER)),
     '"rejected": the response must start with an assistant turn, found user'),
    ("unhash.jsonl", line(prompt=[{"role": {}, "content": "x"}], chosen=chat(SAYS)), "found {}"),
]

# ---------------------------------------------------------------------------------------------------------
# 2  Flags, after --data good.jsonl --init a --out_dir out --steps 1; words of the message

LONG = "x" * 300
FLAGS = [
    ("--loss ppo", "--loss ppo: choose from sft, dpo, dpop"),
    ("--loss", "argument --loss: expected one argument"),
    ("--learning_rate 1", "unrecognized arguments: --learning_rate 1"),
    ("--bet 1", "unrecognized arguments: --bet 1"),
    ("--compile maybe", "unrecognized arguments: maybe"),
    ("--steps 0", "--steps 0: must be at least 1"),
    ("--steps -5", "--steps -5: must be at least 1"),
    ("--steps ten", "argument --steps: invalid int value: 'ten'"),
    ("--steps 1e3", "argument --steps: invalid int value: '1e3'"),
    ("--steps 99999999999999999999", "--steps 99999999999999999999: must be at least 1 and below 2^63"),
    ("--lr 0", "--lr 0.0: must be greater than 0"),
    ("--lr=-1e-5", "--lr -1e-05: must be greater than 0"),
    ("--lr nan", "--lr nan: must be greater than 0"),
    ("--lr inf", "--lr inf: must be greater than 0"),
    ("--lr fast", "argument --lr: invalid float value: 'fast'"),
    ("--beta 0", "--beta 0.0: must be greater than 0"),
    ("--beta nan", "--beta nan: must be greater than 0"),
    ("--batch_size 0", "--batch_size 0: must be at least 1"),
    ("--micro_batch_size 0", "--micro_batch_size 0: must be at least 1"),
    ("--micro_batch_tokens 0", "--micro_batch_tokens 0: must be at least 1"),
    ("--warmup_steps -1", "--warmup_steps -1: must be at least 0"),
    ("--weight_decay -0.1", "--weight_decay -0.1: must be at least 0"),
    ("--weight_decay nan", "--weight_decay nan: must be at least 0"),
    ("--grad_clip inf", "--grad_clip inf: must be at least 0"),
    ("--seed -1", "--seed -1: must be at least 0"),
    ("--seed 18446744073709551616", "--seed 18446744073709551616: must be at least 0 and below 2^63"),
    ("--loss dpop --lam -1", "--lam -1.0: must be at least 0"),
    ("--loss dpop --lam nan", "--lam nan: must be at least 0"),
    ("--loss tdpo2 --alpha -1", "--alpha -1.0: must be at least 0"),
    ("--head_tokens 0", "--head_tokens 0: must be at least 1"),
    ("--log_every 0", "--log_every 0: must be at least 1"),
    ("--eval_every -1", "--eval_every -1: must be at least 0"),
    ("--save_every -1", "--save_every -1: must be at least 0"),
    ("--ref_cache_gb nan", "--ref_cache_gb nan: must be at least 0"),
    ("--block_size 1", "--block_size 1: must be at least 2"),
    # knobs that this run would not read
    ("--lam 5", "--lam: would not be read, the loss dpo has none; leave it out"),
    ("--loss tdpo1 --alpha 0.5", "--alpha: would not be read, the loss tdpo1 has none"),
    ("--loss sft --beta 0.1", "--beta: would not be read, the loss sft has none"),
    ("--loss sft --ref a", "--ref: would not be read, sft has no reference"),
    ("--loss sft --no-ref_cache", "--ref_cache: would not be read, sft has no reference"),
    ("--loss sft --ref_cache_gb 1", "--ref_cache_gb: would not be read, sft has no reference"),
    ("--sft_steps 5", "--sft_steps: would not be read, no SFT is run before this one"),
    ("--sft_lr 0.1", "--sft_lr: would not be read, no SFT is run before this one"),
    ("--aspect_weights 1", "--aspect_weights: would not be read, the loss dpo has no segments"),
    ("--rejected_weight score", "--rejected_weight: would not be read, the loss dpo has no segments"),
    # 2D-DPO
    ("--loss 2d-dpo --aspect_weights 0.5 0.4", "--aspect_weights 0.5 0.4: must be >= 0 and sum to 1"),
    ("--loss 2d-dpo --aspect_weights 1.5 -0.5", "--aspect_weights 1.5 -0.5: must be >= 0 and sum to 1"),
    ("--loss 2d-dpo --aspect_weights nan 1", "--aspect_weights nan 1.0: must be >= 0 and sum to 1"),
    ("--loss 2d-dpo --aspect_weights a b", "--aspect_weights a b: must be numbers"),
    ("--loss 2d-dpo --aspect_weights 1", "--aspect_weights: 1 weights for 2 aspects"),
    ("--loss 2d-dpo --val_data aspect.jsonl", "weights for 2 aspects (1 in the held-out pairs)"),
    ("--loss 2d-dpo --data plain.jsonl", "--loss 2d-dpo: needs scores in every segment of every pair"),
    ("--loss 2d-dpo --rejected_weight badness", "--rejected_weight badness: for 2d-dpo-vanilla only"),
    ("--loss 2d-dpo --rejected_weight good", "--rejected_weight good: choose from score, badness"),
    # the machine
    ("--dtype float16", "--dtype float16: small gradients vanish in its range; choose bfloat16"),
    ("--dtype int8", "--dtype int8: choose from float32, bfloat16, float64"),
    ("--device tpu", "--device tpu: choose cpu, cuda or cuda:N"),
    ("--device cpu:1", "--device cpu:1: choose cpu, cuda or cuda:N"),
    ("--device cuda:99", "--device cuda:99: no GPU that torch can use here"),
    # files and folders
    ("--data", "argument --data: expected at least one argument"),
    ("--data missing.jsonl", "missing.jsonl: No such file or directory"),
    ("--data missing.jsonl.gz", "missing.jsonl.gz: No such file or directory"),
    ("--data good.jsonl missing.jsonl", "missing.jsonl: No such file or directory"),
    ("--val_data missing.jsonl", "missing.jsonl: No such file or directory"),
    ("--data nothing", "nothing: a folder without .jsonl, .jsonl.gz or .json files"),
    ("--data a", "a .json file must hold an array of pairs"),
    ("--data folder.jsonl", "folder.jsonl: a folder without"),
    ("--data good.jsonl/x.jsonl", "good.jsonl/x.jsonl: Not a directory"),
    (f"--data {LONG}", "File name too long"),
    ("--init missing", "--init missing: no such folder; choose one, or a name"),
    ("--init gpt3", "--init gpt3: no such folder; choose one, or a name: gpt2, gpt2-medium"),
    ("--init good.jsonl", "--init good.jsonl: no such folder"),
    ("--init nothing --tokenizer bytes",
     "nothing/config.json: No such file or directory; a model folder holds config.json"),
    (f"--init {LONG}", "File name too long"),
    ("--ref missing", "missing/config.json: No such file or directory"),
    ("--ref nothing", "nothing/config.json: No such file or directory"),
    ("--ref words", "--ref words: has 337 token ids, the tokenizer 257; choose the tokenizer it was trained"),
    ("--ref other", "--ref other: has another tokenizer than the policy"),
    ("--ref short", "--block_size 64: --ref short has 32 positions"),
    ("--block_size 65", "--block_size 65: --init a has 64 positions"),
    ("--n_layer 2", "--n_layer 2: a has 1; leave it out"),
    ("--n_head 4", "--n_head 4: a has 2; leave it out"),
    ("--n_embd 8", "--n_embd 8: a has 16; leave it out"),
    ("--tokenizer words", "--tokenizer words: --init a has another one; leave it out"),
    ("--tokenizer missing.tiktoken", "missing.tiktoken: No such file or directory"),
    ("--tokenizer gpt4", "tokenizer 'gpt4': is neither gpt2, bytes, a .tiktoken file nor a folder"),
    ("--tokenizer good.jsonl", "tokenizer 'good.jsonl': is neither gpt2, bytes"),
    ("--init bare --tokenizer words", "--init bare: has 257 token ids, the tokenizer 337"),
    ("--out_dir good.jsonl", "--out_dir good.jsonl: is a file; choose a folder"),
    ("--out_dir good.jsonl/out", "--out_dir good.jsonl/out: Not a directory"),
    (f"--out_dir {LONG}", "File name too long"),
    ("--out_dir a", "--out_dir a: is --init too and would be overwritten"),
    ("--ref short --out_dir short --block_size 32", "--out_dir short: is --ref too and would be overwritten"),
    ("--out_dir words --overwrite", "--out_dir words: holds 3 files (config.json, ...) and is no run's"),
    ("--out_dir run", "--out_dir run: holds a dpo run; choose --resume, --overwrite or another folder"),
    ("--out_dir nothing --resume",
     "nothing/run.json: No such file or directory; is nothing the folder of a run?"),
    ("--out_dir run --resume --overwrite", "--resume: goes with --out_dir FOLDER and without --overwrite"),
    ("--out_dir run --resume --seed 1", "--resume: not the run in run: seed was 0, is 1"),
]
FROM_SCRATCH = [  # after --data good.jsonl --tokenizer bytes --out_dir out
    ("--n_embd 10 --n_head 4", "n_embd 10 is not divisible by n_head 4"),
    ("--n_head 0", "--n_head 0: must be at least 1"),
    ("--n_layer 1000000000", "--n_layer, --n_embd, --block_size: a model of"),
    ("--n_embd 100000000", "--n_layer, --n_embd, --block_size: a model of"),
    ("--block_size 10000000000000", "--n_layer, --n_embd, --block_size: a model of"),
    ("--block_size 3", "with a response that does not fit block_size 3"),
    ("--sft_steps 0", "--sft_steps 0: must be at least 1"),
    ("--sft_lr nan", "--sft_lr nan: must be greater than 0"),
    ("--ref missing", "missing/config.json: No such file or directory"),
    ("--loss 2d-dpo --aspect_weights 0.2 0.3 0.5", "--aspect_weights: 3 weights for 2 aspects"),
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
VOCAB = json.loads(json.dumps({c: b for c, b in data.byte_characters().items()} | {data.EOT: 256}))
MODELS = [
    ("weights cut", cut("model.safetensors", 20_000), CUT),
    ("weights cut in the header", cut("model.safetensors", 100), CUT),
    ("weights empty", cut("model.safetensors", 0), CUT),
    ("weights longer", lambda f: put("model.safetensors", (f / "model.safetensors").read_bytes() + b"x")(f),
     CUT),
    ("header of 2^60 bytes", header(2**60), CUT),
    ("header of 2^64 - 1 bytes", header(2**64 - 1), CUT),
    ("header longer than the file", header(10_000), CUT),
    ("header of length 0", header(0), CUT),
    ("header is no JSON", header(8, b"not JSON"), CUT),
    ("header is a list", header(2, b"[]"), CUT),
    ("header nested too deeply", header(50_000, b'{"a":' * 10_000), CUT),
    ("header with a negative offset",
     header(57, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}  '),
     CUT),
    ("header with an absurd shape",
     header(74, b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'), CUT),
    ("header with an unknown dtype", header(57, b'{"a":{"dtype":"X99","shape":[0],"data_offsets":[0,0]}}   '),
     CUT),
    ("a Git LFS pointer",
     put("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
     CUT),
    ("a pickle", put("model.safetensors", b"\x80\x04\x95" + bytes(100)), CUT),
    ("no weights", remove("model.safetensors"), "no such file (.bin files are pickles, not read)"),
    ("weights are a folder", make_folder("model.safetensors"), "model.safetensors: "),
    ("a tensor is missing", tensors(lambda t: t.pop(WPE)),
     "tensor wpe.weight is missing, config.json says (64, 16)"),
    ("a tensor too many", tensors(lambda t: t.update(x=torch.zeros(2))),
     "tensor x is (2,), config.json says no such"),
    ("another shape", tensors(lambda t: t.update({WPE: torch.zeros(65, 16)})),
     "tensor wpe.weight is (65, 16), config"),
    ("NaN", tensors(lambda t: t[WPE].fill_(math.nan)), "--init model: wpe.weight holds NaN or infinity"),
    ("infinity", tensors(lambda t: t[WPE].fill_(-math.inf)),
     "--init model: wpe.weight holds NaN or infinity"),
    ("a head of its own", tensors(lambda t: t.update({"lm_head.weight": torch.ones(257, 16)})),
     "output head is not tied"),
    ("no config", remove("config.json"), "config.json: No such file or directory; a model folder holds"),
    ("config empty", cut("config.json", 0), "not the configuration of a GPT-2 (Expecting value"),
    ("config is a list", put("config.json", b"[]"), "not the configuration of a GPT-2"),
    ("config in latin-1", put("config.json", b'{"n_layer": "\xe9"}'), "not the configuration of a GPT-2"),
    ("config nested too deeply", put("config.json", b"[" * 10**5),
     "not the configuration of a GPT-2 (maximum"),
    ("config is a folder", make_folder("config.json"), "config.json: Is a directory"),
    ("no vocab_size", edit("config.json", vocab_size=...),
     "vocab_size = None: needs a whole number of at least 1"),
    ("vocab_size is text", edit("config.json", vocab_size="257"), "vocab_size = '257': needs a whole number"),
    ("vocab_size of another model", edit("config.json", vocab_size=50257),
     "tensor wte.weight is (257, 16), config"),
    ("heads that do not divide", edit("config.json", n_head=3), "n_embd 16 is not divisible by n_head 3"),
    ("no layer", edit("config.json", n_layer=0), "n_layer = 0: needs a whole number of at least 1"),
    ("layers below 0", edit("config.json", n_layer=-1), "n_layer = -1: needs a whole number of at least 1"),
    ("1.5 heads", edit("config.json", n_head=1.5), "n_head = 1.5: needs a whole number of at least 1"),
    ("true heads", edit("config.json", n_head=True), "n_head = True: needs a whole number of at least 1"),
    ("no positions", edit("config.json", n_positions=...), "block_size = None: needs a whole number"),
    ("more channels than there are", edit("config.json", n_embd=10**6), "config.json says"),
    ("a Llama", edit("config.json", model_type="llama"),
     "model_type = 'llama' is not supported (only 'gpt2')"),
    ("ReLU", edit("config.json", activation_function="relu"),
     "activation_function = 'relu' is not supported"),
    ("another epsilon", edit("config.json", layer_norm_epsilon=1e-6),
     "layer_norm_epsilon = 1e-06 is not supported"),
    ("untied", edit("config.json", tie_word_embeddings=False),
     "tie_word_embeddings = False is not supported"),
    ("a shard elsewhere", shards("../a/model.safetensors"),
     "shard '../a/model.safetensors' is not in the folder"),
    ("a shard is missing", shards("model-00001.safetensors"), "model-00001.safetensors: no such file"),
    ("an index that is none", both(remove("model.safetensors"), put("model.safetensors.index.json", b"{}")),
     "not an index of shards (KeyError"),
    # its tokenizer
    ("vocab.json empty", cut("vocab.json", 0), "vocab.json: not JSON"),
    ("vocab.json is a list", put("vocab.json", b"[]"), "vocab.json: not a vocabulary of GPT-2's kind"),
    ("a byte is missing", edit("vocab.json", a=...),
     "vocab.json: not a vocabulary of GPT-2's kind (KeyError: 'a')"),
    ("no end-of-text", edit("vocab.json", **{data.EOT: ...}), "(KeyError: '<|endoftext|>')"),
    ("an id twice", edit("vocab.json", a=98), "its ids do not follow its merges, each once"),
    ("an id below 0", edit("vocab.json", a=-1), "its ids do not follow its merges, each once"),
    ("an id that is none", edit("vocab.json", a="x"), "not a vocabulary of GPT-2's kind (ValueError"),
    ("merges of three", put("merges.txt", b"#version: 0.2\na b c\n"),
     "not a vocabulary of GPT-2's kind (ValueError"),
    ("merges unknown", put("merges.txt", b"#version: 0.2\na b\n"),
     "not a vocabulary of GPT-2's kind (KeyError: 'ab')"),
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
    ("run.json empty", cut("run.json", 0), "run.json: damaged (Expecting value"),
    ("run.json cut", cut("run.json", 100), "run.json: damaged (Expecting"),
    ("run.json binary", put("run.json", b"\xff\xfe\x00"), "run.json: damaged ("),
    ("run.json nested too deeply", put("run.json", b'{"a":' * 10**5),
     "run.json: damaged (nested too deeply)"),
    ("run.json is a list", put("run.json", b"[]"),
     "run.json: damaged (needs an object with config, identity"),
    ("no config", edit("run.json", config=...), "run.json: damaged (needs an object with config, identity"),
    ("config is a list", edit("run.json", config=[]), "run.json: damaged (config is no object)"),
    ("identity is text", edit("run.json", identity="x"), "run.json: damaged (identity is no object)"),
    ("no loss", config_of(loss=...), "run.json: damaged (config has no loss)"),
    ("another loss", config_of(loss="kto"), "--loss kto: choose from sft"),
    ("a loss that is none", config_of(loss=["dpo"]), "--loss ['dpo']: must be of type str"),
    ("a batch size of text", config_of(batch_size="9"), "--batch_size '9': must be of type int"),
    ("a seed that is true", config_of(seed=True), "--seed True: must be of type int"),
    ("lr is text", config_of(lr="1"), "--lr '1': must be of type float"),
    ("data are a number", config_of(data=5), "--data 5: must be of type tuple"),
    ("data are numbers", config_of(data=[5]), "--data (5,): must be of type Path"),
    ("the start is a list", config_of(init=[]), "--init []: must be of type str"),
    ("the start is gone", config_of(init="gone"), "--init gone: no such folder"),
    ("the data are gone", config_of(data=["gone.jsonl"]), "gone.jsonl: No such file or directory"),
    ("the reference is another", config_of(ref="b"), "--resume: not the run in model: ref was"),
    ("another format", lambda f: edit("run.json", identity={})(f),
     "--resume: not the run in model: format was None, is"),
    ("checkpoints cut", checkpoints(lambda p: os.truncate(p, 10)),
     "--resume: no checkpoint in model is intact"),
    ("checkpoints edited", checkpoints(lambda p: p.write_bytes(p.read_bytes() + b" ")),
     "no checkpoint in model is intact"),
    ("checkpoints without weights", checkpoints(lambda p: p.unlink() if p.suffix != ".json" else None),
     "no checkpoint in model is intact"),
    ("checkpoints without keys", checkpoints(lambda p: p.write_text("{}")),
     "no checkpoint in model is intact"),
]

# ---------------------------------------------------------------------------------------------------------
# 5  tools/doctor.py and sample.py

DOCTOR = [
    ("missing.jsonl", "missing.jsonl: No such file or directory"),
    ("nothing", "nothing: a folder without .jsonl"),
    ("cut.jsonl.gz", "Compressed file ended before"),
    ("latin1.jsonl", "latin1.jsonl:1: not UTF-8"),
    ("deep.jsonl", "deep.jsonl:1: not JSON"),
    ("object.json", "must hold an array of pairs"),
    ("empty.jsonl", "empty.jsonl: no records"),
    ("good.jsonl --block_size 1", "--block_size: at least 2"),
    ("good.jsonl --block_size x", "argument --block_size: invalid int value: 'x'"),
    ("good.jsonl --tokenizer gpt4", "tokenizer 'gpt4': is neither"),
    ("good.jsonl --plot gone/x.png", "--plot gone/x.png: "),
    ("good.jsonl --plot x.doc", "--plot x.doc: "),
    ("role.jsonl --segment", "role.jsonl:1: \"prompt\"[0]: role must be"),
    ("", "the following arguments are required: FILE"),
]
SAMPLE = [  # words after "run"
    ("", "--prompt: say what to answer"),
    ("--prompt Q --response R", "--response: goes with --heat"),
    ("--prompt Q --max_new_tokens 0", "--max_new_tokens 0: must be at least 1"),
    ("--prompt Q --max_new_tokens 64", "the answer may take all of block_size 64"),
    ("--prompt Q --max_new_tokens 8 --temperature -1", "--temperature -1.0: must be at least 0"),
    ("--prompt Q --max_new_tokens 8 --temperature nan", "--temperature nan: must be at least 0"),
    ("--prompt Q --max_new_tokens 8 --top_k 0", "--top_k 0: must be at least 1"),
    ("--prompt Q --max_new_tokens 8 --top_p 1.5", "--top_p 1.5: must be greater than 0 and at most 1"),
    ("--prompt Q --device cuda:99", "--device cuda:99: no GPU"),
    ("--prompt Q --device banana", "--device banana: choose cpu, cuda or cuda:N"),
    ("--prompt Q --seed -1", "--seed -1: must be at least 0 and below 2^63"),
    (f"--prompt Q --seed {2**70}", f"--seed {2**70}: must be at least 0 and below 2^63"),
    ("--prompt Q --ref words", "--ref words: has another tokenizer than the run"),
    ("--prompt Q --ref other", "--ref other: has another tokenizer than the run"),
    ("--prompt Q --ref bare2", "--ref bare2: has 337 token ids"),
    ("--prompt Q --ref missing", "missing/config.json: No such file"),
    ("--prompts missing.txt", "--prompts missing.txt: No such file or directory"),
    ("--prompts latin1.jsonl", "--prompts latin1.jsonl: not UTF-8"),
    ("--prompts text.tiktoken --nonsense", "unrecognized arguments: --nonsense"),
    ("--prompts empty.jsonl", "--prompts empty.jsonl: holds no prompt"),
    ("--prompts chosen2.jsonl", '--prompts chosen2.jsonl:1: no JSON object with a "prompt"'),
]


# ---------------------------------------------------------------------------------------------------------
# The corpus run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The folder with every file and folder that the tables name."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, content, _ in FILES:
        (folder / name).write_bytes(content)
    more = {"good.jsonl": 3 * GOOD, "plain.jsonl": line() + line(prompt="R"),
            "aspect.jsonl": line(chosen=seg([1]), rejected=seg([2], text="y")),
            "chosen2.jsonl": b'{"chosen": "x"}\n',
            "empty.tiktoken": b"", "text.tiktoken": b"hello world again\n",
            "gaps.tiktoken": b"YQ== 0\nYg== 2\n", "few.tiktoken": b"YQ== 0\nYg== 1\n"}
    for name, content in more.items():
        (folder / name).write_bytes(content)
    (folder / "nothing").mkdir()
    (folder / "folder.jsonl").mkdir()
    words = data.Tokenizer(Path(train.HERE) / "toy" / "toy.tiktoken")
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
    (corpus / "many.jsonl").write_bytes(GOOD + 25 * b"{}\n")
    error = refuse(train.main, PLAIN + "many.jsonl", 'many.jsonl:3: key "chosen" is missing', lines=11)
    assert error.count("many.jsonl:") == 10 and error.endswith("... and 15 more\n")


def test_a_caller_of_train_gets_the_errors_that_a_command_prints(corpus, monkeypatch):
    monkeypatch.chdir(corpus)
    for error, changes in ((train.ConfigError, {"lr": "1"}), (train.ConfigError, {"data": 5}),
                           (train.ConfigError, {"steps": 1.0}), (data.DataError, {"data": "gone.jsonl"}),
                           (train.ModelError, {"init": "nothing", "tokenizer": "bytes"})):
        with pytest.raises(error):
            train.train(train.Config(**{"data": "good.jsonl", "init": "a", "out_dir": "out"} | changes))


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


def test_the_corpus_is_large_and_its_messages_are_many():
    """At least 120 rows and 40 messages; those that differ in flags, files, numbers or quotes count once."""
    rows = [row for table in (FILES, FLAGS, FROM_SCRATCH, MODELS, RUNS, DOCTOR, SAMPLE) for row in table]
    varying = r"""['"(].*|--\w+|[\w./-]*\.(jsonl|json|gz|tiktoken|txt)\b(:\d+)?|-?[\d.]+|\bnan\b|\binf\b"""
    messages = {re.sub(varying, "", row[-1]).strip() for row in rows}
    assert len(rows) >= 120 and len(messages) >= 40, (len(rows), len(messages))
