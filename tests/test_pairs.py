"""plumbing/pairs.py: the one format is read strictly; what is dropped, refused and said. Other forms are
test_convert.py's. Tests on ../shared/data skip where it is absent."""

import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import sample
from data import DataError, Tokenizer, load
from tools import records

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
BYTES = Tokenizer("bytes")
HI = [{"role": "user", "content": "Hi"}]
P = "\n\nHuman: Hi\n\nAssistant:"

def write(path, *records):
    """Records, or lines of text as they stand, as a .jsonl file."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path

def pair(prompt="Q", chosen="good", rejected="bad", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}

def scored(*segments):
    return [{"text": text, "scores": scores} for text, *scores in segments]

def texts(pairs):
    """(prompt, chosen, rejected) of each pair, decoded; responses must end in end-of-text."""
    assert all(p.chosen[-1] == BYTES.eot for p in pairs)
    return [tuple(BYTES.decode(x) for x in (p.prompt, p.chosen[:-1], p.rejected[:-1])) for p in pairs]

def load_one(tmp_path, record, alone=False):
    loaded, _ = load([write(tmp_path / "one.jsonl", record)], BYTES, 1000, alone)
    return texts(loaded)[0][:2 if alone else 3]

def error_of(*records, tmp_path, alone=False):
    with pytest.raises(DataError) as e:
        load([write(tmp_path / "bad.jsonl", *records)], BYTES, 100, alone)
    return str(e.value).replace(str(tmp_path), "")

ODD = "\ufeffBOM \x00 NUL\r\nCRLF \r CR \u2028 \x85 \U0001f600 <|endoftext|>"

@pytest.mark.parametrize("record, expected", [
    (pair(" Q\n", "  A", "B "), (" Q\n", "  A", "B ")),  # texts stand as they are
    (pair(""), ("<|endoftext|>", "good", "bad")),
    (pair(HI, "Yes", " No"), (P, " Yes", "  No")),  # messages are rendered, their responses get the lead
    (pair([{"role": "system", "content": "S"}, *HI, {"role": "assistant", "content": "A"}, *HI], "Yes", "No"),
     (f"\n\nSystem: S\n\nHuman: Hi\n\nAssistant: A{P}", " Yes", " No")),
    (pair([{"role": "user", "content": P}]), ("\n\nHuman: " + P + "\n\nAssistant:", " good", " bad")),
    (pair(chosen=scored(("One.", 1), (" Two.", 3)), rejected=scored(("No", 0))), ("Q", "One. Two.", "No")),
    (pair(chosen=[{"text": "a"}, {"text": "b", "scores": []}]), ("Q", "ab", "bad")),
    (pair(ODD, ODD + "1", ODD + "2"), (ODD, ODD + "1", ODD + "2")),
])
def test_a_record_is_trained_on_as_it_says(tmp_path, record, expected):
    for alone in (False, True):
        assert load_one(tmp_path, record, alone) == expected[:2 if alone else 3]
    assert load_one(tmp_path, {k: record[k] for k in ("prompt", "chosen")}, alone=True) == expected[:2]

@pytest.mark.parametrize("rejected", ["", "good", "x" * 2000])
def test_sft_reads_the_chosen_response_alone(tmp_path, rejected):
    """Nothing about the rejected one drops a record, and no token of it is kept."""
    loaded, _ = load([write(tmp_path / "d.jsonl", pair(rejected=rejected))], BYTES, 100, alone=True)
    assert texts(loaded) == [("Q", "good", "")] and loaded.lengths.tolist() == [6]
    batch = data.collate([loaded[0]])
    assert batch.mask() is None and batch.tokens.shape == (1, 6)

KEYS = '"{}"; convert it: python tools/convert.py /bad.jsonl --out /bad-pairs.jsonl'

@pytest.mark.parametrize("record, message", [
    # keys: each depth, each of them named, with the command
    (pair(system="Be kind"), "a key that is not read: " + KEYS.format("system")),
    (pair(score_chosen=1, margin=2), 'a key that is not read: "score_chosen", ' + KEYS.format("margin")),
    (pair([HI[0] | {"weight": 0}]), "a key that is not read: " + KEYS.format("prompt[0].weight")),
    (pair(chosen=[{"text": "a", "reasoning": ""}]), KEYS.format("chosen[0].reasoning")),
    ({"question": "Q", "chosen": "a", "rejected": "b"}, KEYS.format("question")),
    ({"chosen": P + " a", "rejected": P + " b"}, 'no "prompt"; convert it: python tools/convert.py'),
    (pair([{"role": "user", "value": "Hi"}]), KEYS.format("prompt[0].value")),
    (json.dumps([pair()]), "a record must be an object, found list; convert it: python tools/convert.py"),
    ("[", "; convert it: python tools/convert.py"),
    # values
    ("{", "not JSON (Expecting property name"), ("[" * 100_000, "not JSON"), ("17", "found int"),
    ('{"prompt": "a", "prompt": "b"}', 'not JSON (the key "prompt" twice)'),
    ('{"prompt": [{"role": "user", "role": "user"}]}', 'not JSON (the key "role" twice)'),
    (pair(7), '"prompt" must be text, found int'), (pair(None), '"prompt" must be text, found NoneType'),
    (pair(chosen=None), '"chosen" must be text, found NoneType'),
    (pair("\ud800"), '"prompt" must be text, found a lone surrogate'),
    (pair(chosen=["a"]), 'chosen[0] must be an object, found str'),
    (pair(chosen=[{"scores": [1]}]), 'chosen[0]: no "text"'),
    (pair(chosen=[{"text": 1}]), '"chosen[0].text" must be text, found int'),
    (pair(id=1.5), '"id" must be a string or a whole number'), (pair(id=True), '"id" must be'),
    (pair([]), '"prompt" must end in a message of the user'),
    (pair([*HI, {"role": "assistant", "content": "A"}]), '"prompt" must end in a message of the user'),
    (pair([{"role": "tool", "content": "Hi"}]), "must be system, user or assistant, found 'tool'"),
    (pair([{"role": ["user"], "content": ""}]), "must be system, user or assistant, found ['user']"),
    (pair([{"role": "user", "content": None}]), '"prompt[0].content" must be text'),
    (pair(chosen=scored(("a", -1))), '"chosen[0].scores" must hold finite numbers >= 0, found [-1]'),
    ('{"prompt": "", "chosen": [{"text": "a", "scores": [NaN]}], "rejected": "b"}', "found [nan]"),
    ('{"prompt": "", "chosen": [{"text": "a", "scores": [1e999]}], "rejected": "b"}', "found [inf]"),
    (pair(chosen=scored(("a", 1e300))), "found [1e+300]"),  # infinite in float32
    (pair(chosen=scored(("a", 10**400))), "found [1000"), (pair(chosen=scored(("a", True))), "found [True]"),
    (pair(chosen=[{"text": "a", "scores": 3}]), "found 3"),
    (pair(chosen=scored(("a", 1)), rejected=scored(("b", 1, 2))), "segments with 1 and 2 scores in one pair"),
    (pair(chosen=scored(("a", 1)), rejected="b"), "segments with 0 and 1 scores in one pair"),
    ({"prompt": "Q", "chosen": "a"}, 'no "rejected": one response is for --loss sft alone'),
])
def test_a_malformed_record_is_one_line_file_line_what(tmp_path, record, message):
    text = error_of(record, tmp_path=tmp_path)
    assert text.startswith("/bad.jsonl:1") and message in text and len(text.splitlines()) == 1

def test_ten_kinds_of_malformed_lines_are_listed_over_all_files_and_equal_ones_once(tmp_path):
    good = write(tmp_path / "0.jsonl", pair(), "oops", pair(7, id="a:1"))
    bad = write(tmp_path / "1.jsonl", *["{}"] * 12, *(pair(id=i, **{f"key{i}": 1}) for i in range(10)), "{}")
    with pytest.raises(DataError) as e:
        load([good, bad], BYTES, 100)
    lines = str(e.value).splitlines()
    assert lines[0].startswith(f"{good}:2: not JSON") and lines[1].startswith(f"{good}:3 (id 'a:1'): ")
    assert lines[2].startswith(f'{bad}:1: no "prompt"') and lines[2].endswith(" (and 12 more like it)")
    assert [line.split(": ")[0] for line in lines[3:10]] == [f"{bad}:{i + 13} (id {i})" for i in range(7)]
    assert lines[10:] == ["... and 3 more"]

def test_all_scored_pairs_have_the_same_number_of_scores_and_a_data_set_scored_in_part_is_unscored(tmp_path):
    one, two = (pair(chosen=scored(("a", *n)), rejected=scored(("b", *n))) for n in ([1], [1, 2]))
    text = error_of(one, pair(), two, one, tmp_path=tmp_path)
    assert text == "/bad.jsonl:3: 2 scores a segment, and another number in other pairs"
    loaded, notes = load([write(tmp_path / "d.jsonl", one, pair())], BYTES, 100)
    assert loaded.n_aspects == 0 and notes[-1] == f"scores are ignored: {tmp_path / 'd.jsonl'}:2 has none"
    loaded, notes = load([write(tmp_path / "d.jsonl", two)], BYTES, 100)
    assert loaded[0].chosen_scores.tolist() == [[1, 2]] and len(notes) == 1

def test_the_line_about_a_file_says_what_was_kept_dropped_and_cut(tmp_path):
    path = write(tmp_path / "d.jsonl", pair(), pair(chosen=" \n"), pair(rejected=" "), "", pair(chosen="bad"),
                 pair(chosen="x" * 99), pair(chosen="\u00a0"), pair(chosen="\t", id=7), pair("Q" * 60),
                 pair(rejected="no<|endoftext|>\n"))
    loaded, notes = load([path], BYTES, 50)
    assert [where.rpartition(":")[2] for where in loaded.where] == ["1", "9", "10"]
    assert notes == [f"{path}: 3 pairs, 6 dropped: 4 with an empty response (2, 3, 7, ...); "
                     "1 with identical responses (5); 1 with a response that does not fit block_size 50 (6), "
                     "1 prompts cut at the front to fit block_size 50, "
                     "1 with a response that ends in <|endoftext|>: remove it, it is added"]
    assert error_of(pair(chosen=""), tmp_path=tmp_path).splitlines() == [
        "/bad.jsonl: 0 pairs, 1 dropped: 1 with an empty response (1)", "no pair is left"]

LINES = "".join(json.dumps(pair(f"Q{i}")) + "\n" for i in range(3)).encode()

@pytest.mark.parametrize("name, content", [
    ("a.jsonl", LINES), ("A.JSONL", LINES), ("a.jsonl.gz", gzip.compress(LINES)), ("a.jsonl", b"\n" + LINES),
    ("windows.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"))])
def test_lines_are_read_whatever_ends_them_and_hidden_files_of_a_folder_are_no_data(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert texts(load([tmp_path / name], BYTES, 100)[0]) == [(f"Q{i}", "good", "bad") for i in range(3)]
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for hidden in ("._a.jsonl", ".ipynb_checkpoints/a.jsonl", "README.md"):  # no data of the folder
        (tmp_path / hidden).write_bytes(content)
    assert records.only_file(tmp_path) == tmp_path / name

@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", None, "No such file"), ("a.jsonl.gz", b"not gzip", "Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(LINES)[:-20], "ended before the end-of-stream marker"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ("a.jsonl", LINES + b"\xff\xfe{}\n", ":4: not UTF-8"),
    ("a.jsonl", LINES.decode().encode("utf-16"), ":1: not UTF-8"), ("a.jsonl", b"", "0 pairs"),
    *((f"a{ending}", LINES, "convert it: python tools/convert.py {0} --out {1}/a-pairs.jsonl")
      for ending in (".json", ".csv", ".parquet", ".jsonl.xz", ".JSON.gz")),
    ("a.txt", LINES, "convert it: python tools/convert.py {0} --out {1}/a-pairs.jsonl"),
])
def test_a_file_that_is_not_read_is_one_line_with_the_command_to_use(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as e:
        load([tmp_path / name], BYTES, 100)
    text = str(e.value)
    assert text.startswith(f"{tmp_path / name}:") and message.format(tmp_path / name, tmp_path) in text

@pytest.mark.parametrize("names", [
    ("train.jsonl", "evaluation.jsonl"), ("train.jsonl", "notes.csv"), ("a/0.jsonl", "b/0.jsonl"), ()])
def test_of_a_folder_one_data_file_is_converted_and_none_is_trained_on(tmp_path, names):
    """No list of words says which of several is meant: each must be named, and then all are read in order."""
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    with pytest.raises(DataError, match="a folder; name the files that are meant"):
        load([tmp_path], BYTES, 100)
    with pytest.raises(DataError) as e:
        records.only_file(tmp_path)
    assert f"a folder of {len(names)} data files" in str(e.value)
    assert all(str(tmp_path / name) in str(e.value) for name in names)
    if all(name.endswith(".jsonl") for name in names) and names:
        assert load([tmp_path / name for name in names], BYTES, 100)[0].where[::3] == [
            f"{tmp_path / name}:1" for name in names]

@pytest.mark.parametrize("name, text, prompts", [
    ("p.jsonl", json.dumps({"prompt": "first"}) + "\r\n" + json.dumps(pair(HI, id=3)), ["first", HI]),
    ("p.txt", "first:\r\n\n[a]:\u2028\n" + json.dumps({"prompt": HI}), ["first:", "[a]:\u2028", HI]),
    ("-", "\ufefffirst:\n" + json.dumps({"prompt": HI}), ["first:", HI])])
def test_prompts_are_those_of_data_of_lines_of_text_and_of_stdin(tmp_path, monkeypatch, name, text, prompts):
    (tmp_path / name).write_bytes(text.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    assert sample.read_prompts(name) == prompts

@pytest.mark.parametrize("name, text, message", [
    ("p.csv", "prompt\nx", "p.csv: not the format that is read, .jsonl"), ("p.txt", "\n", "holds no prompt"),
    ("p.jsonl", '{"prompt": "x", "system": "y"}', 'p.jsonl:1: a key that is not read: "system"'),
    ("p.txt", 'x\n{"prompt": ["y"]}', "p.txt:2: prompt[0] must be an object"),
    ("p.txt", 'x\n{"p', "p.txt:2: not JSON"),
])
def test_what_is_no_prompt_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as e:
        sample.read_prompts(str(tmp_path / name))
    assert message in str(e.value)
