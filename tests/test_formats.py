"""plumbing/formats.py: from files as people have them to pairs; what is dropped, refused and said; sentences.

Real data (../shared/data) are used where they are present; the tests on them skip elsewhere.
"""

import bz2
import gzip
import json
import lzma
import re
import sys
from pathlib import Path

import pytest
import torch
from test_train import model_a  # noqa: F401

import data
import train
from data import DataError, Tokenizer
from plumbing import formats
from plumbing.formats import load, split_segments
from tools import doctor

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
BYTES = Tokenizer("bytes")
P = "\n\nHuman: Hi\n\nAssistant:"  # a prompt as HH-RLHF writes it
AB = P + " A\n\nHuman: B\n\nAssistant:"


def write(path, *records):
    """Records, or lines of text as they stand, as a .jsonl file."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def pair(prompt="Q", chosen="good", rejected="bad", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def texts(pairs):
    """(prompt, chosen, rejected) of each pair, decoded; both responses must end in end-of-text."""
    assert all(p.chosen[-1] == p.rejected[-1] == BYTES.eot for p in pairs)
    return [tuple(BYTES.decode(x) for x in (p.prompt, p.chosen[:-1], p.rejected[:-1])) for p in pairs]


def load_one(tmp_path, record, alone=False):
    """The texts of the one pair that a record becomes, and the notes; alone: without the rejected one."""
    pairs, notes = load([write(tmp_path / "one.jsonl", record)], BYTES, 1000, alone)
    assert len(pairs) == 1
    return texts(pairs)[0][:2 if alone else 3], notes


def error_of(*records, tmp_path, alone=False):
    with pytest.raises(DataError) as e:
        load([write(tmp_path / "bad.jsonl", *records)], BYTES, 100, alone)
    return str(e.value).replace(str(tmp_path), "")


def scored(*segments):
    return [{"text": text, "scores": scores} for text, *scores in segments]


def turns(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def says(*texts):
    return turns(*texts, first="assistant")


def sharegpt(*turns):
    return [{"from": role, "value": text} for role, text in turns]


# ---------------------------------------------------------------------------------------------------------
# Forms

SYSTEM = [{"role": "system", "content": "Be kind"}]
SYSTEM_P = "\n\nSystem: Be kind" + P
EXAMPLES = {  # a record of each form and its pair
    "pairs": (pair(" Q\n", "  A", "B "), (" Q\n", "  A", "B ")),
    "scored segments": (pair(chosen=scored(("One.", 1, 2), (" Two.", 3, 4)), rejected=scored(("No", 0, 0))),
                        ("Q", "One. Two.", "No")),
    "HH transcripts": ({"chosen": P + " Yes", "rejected": P + " No"}, (P, " Yes", " No")),
    "chat messages": (pair(turns("Hi"), says("Yes"), says("No")), (P, " Yes", " No")),
    "messages and two answers": (
        {"messages": turns("Hi"), "chosen": says("Yes")[0], "rejected": says("No")[0]}, (P, " Yes", " No")),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "Be kind"}, {"from": "human", "value": "Hi"}],
         "chosen": {"from": "gpt", "value": "Yes"}, "rejected": {"from": "gpt", "value": "No"}},
        (SYSTEM_P, " Yes", " No")),
    "instructions": ({"instruction": "Do it.", "input": "2 + 2", "chosen": "Four.", "rejected": "4!"},
                     ("\n\nHuman: Do it.\n2 + 2\n\nAssistant:", " Four.", " 4!")),
    "two outputs": ({"instruction": "Hi", "input": "", "output": ["Yes", "No"]}, (P, " Yes", " No")),
    "questions": ({"system": "Be kind", "question": "Hi", "chosen": "Yes", "rejected": "No"},
                  (SYSTEM_P, " Yes", " No")),
    "OpenAI preferences": ({"input": {"messages": turns("Hi")}, "preferred_output": says("Yes"),
                            "non_preferred_output": says("No")}, (P, " Yes", " No")),
    "SHP": ({"history": "Hi", "human_ref_A": "No", "human_ref_B": "Yes", "labels": 0}, (P, " Yes", " No")),
    "SafeRLHF": ({"prompt": "Hi", "response_0": "No", "response_1": "Yes", "better_response_id": 1},
                 (P, " Yes", " No")),
    "AlpacaEval": ({"instruction": "Hi", "output_1": "No", "output_2": "Yes", "preference": 2},
                   (P, " Yes", " No")),
    "HelpSteer2": ({"prompt": "Hi", "response_1": "No", "response_2": "Yes", "preference_strength": 1},
                   (P, " Yes", " No")),
    "HelpSteer3": ({"context": turns("Hi"), "response1": "Yes", "response2": "No", "overall_preference": -2},
                   (P, " Yes", " No")),
    "rankings": ({"prompt": "Hi", "responses": ["So-so", "No", "Yes"], "scores": [3, 1, 4.5]},
                 (P, " Yes", " No")),
    "completions": ({"prompt": "Q ", "completion": "A"}, ("Q ", "A")),
    "responses": ({"prompt": "Q ", "response": "A"}, ("Q ", "A")),
    "outputs": ({"prompt": "Q ", "output": "A"}, ("Q ", "A")),
    "instructions and outputs": ({"instruction": "Do it.", "input": "2 + 2", "output": "Four."},
                                 ("\n\nHuman: Do it.\n2 + 2\n\nAssistant:", " Four.")),
    "conversations": ({"messages": turns("Hi", "A", "B", "Yes")}, (AB, " Yes")),
    "ShareGPT conversations": ({"conversations": [{"from": "human", "value": "Hi"},
                                                  {"from": "gpt", "value": "Yes"}]}, (P, " Yes")),
}
PAGE = (Path(__file__).parents[1] / "plumbing" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", formats.FORMS)
def test_each_form_is_recognised_by_its_keys_and_named_with_its_rule(tmp_path, form):
    (record, expected), (keys, also, rule, *_, alone) = EXAMPLES[form], vars(formats.FORMS[form]).values()
    for sft in {True, alone}:
        one, notes = load_one(tmp_path, record, sft)
        assert one == expected[:2 if sft else 3]
        assert notes == [f"{tmp_path / 'one.jsonl'}: {form} ({rule}): 1 pairs"]
    read = ", ".join(keys) + (f" ({', '.join(also)})" if also else "")
    assert f"| {form} | {read} | {rule} | `{json.dumps(record)}` |\n" in PAGE


@pytest.mark.parametrize("form", formats.FORMS)
def test_doctor_and_two_steps_of_training_take_every_form(tmp_path, form, model_a, capsys):  # noqa: F811
    line, sft = json.dumps(EXAMPLES[form][0]), formats.FORMS[form].alone
    path = write(tmp_path / "d.jsonl", *(re.sub("Hi|Q|Do", rf"\g<0>{i}", line) for i in range(6)))
    assert doctor.main([str(path), "--tokenizer", "bytes"]) == (2 if sft else 0)
    assert ("only --loss sft" if sft else "6 of 6 can be used") in "".join(capsys.readouterr())
    loss = "sft" if sft else "2d-dpo" if form == "scored segments" else "dpo"
    train.main(f"--loss {loss} --data {path} --init {model_a} --out_dir {tmp_path / 'out'} --steps 2 "
               "--batch_size 3 --device cpu".split())
    assert "5 are left to train on" in capsys.readouterr().out


def test_for_sft_a_rejected_response_may_be_missing(tmp_path):
    for record in ({"prompt": "Q", "chosen": "A"}, {"prompt": "Q", "chosen": "A", "rejected": None}):
        assert load_one(tmp_path, record, alone=True)[0] == load_one(
            tmp_path, record | {"rejected": "B"}, alone=True)[0]


@pytest.mark.parametrize("form", [name for name, form in formats.FORMS.items() if form.alone])
def test_one_response_is_refused_for_a_preference_loss_with_the_reason(tmp_path, form):
    record = EXAMPLES[form][0] | {"helpfulness": 3}  # a row of ratings is no pair either
    assert error_of(*[record] * 2, tmp_path=tmp_path).endswith(
        f"{form}: one response and no other, which only --loss sft trains on; for a preference, join the "
        "records of a prompt into prompt, responses, scores (and 1 more like it)")


@pytest.mark.parametrize("record, expected", [
    ({"prompt": turns("Hi"), "completion": says("Yes")}, (P, " Yes")),
    ({"prompt": "Hi", "response": says("Yes")}, (P, " Yes")),
    ({"messages": turns("Hi", "Yes"), "prompt": "Hi"}, (P, " Yes")),
    # pairs whose rejected response is empty, the same, or too long for the block
    (pair(rejected=" "), ("Q", "good")), (pair(rejected="good"), ("Q", "good")),
    (pair(rejected="x" * 2000), ("Q", "good")),
    (EXAMPLES["scored segments"][0] | {"rejected": []}, ("Q", "One. Two.")),
    ({"chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "Yes")}, (P, " Yes")),
    ({"chosen": P + " Yes", "rejected": P + " Yes"}, (P, " Yes")),
])
def test_sft_reads_the_chosen_response_alone(tmp_path, record, expected):
    assert load_one(tmp_path, record, alone=True)[0] == expected


def test_sft_drops_what_has_no_response_and_refuses_what_is_labelled(tmp_path):
    path = write(tmp_path / "d.jsonl", {"messages": turns("Hi")}, {"messages": turns("Hi", "Yes", "B")},
                 {"prompt": "Q", "response": "A"})
    _, notes = load([path], BYTES, 100, alone=True)
    assert "1 pairs, 2 dropped: 2 with an empty response (1, 2)" in notes[0]
    text = error_of({"prompt": "Q", "completion": "a", "label": False}, tmp_path=tmp_path, alone=True)
    assert "one completion with a label (KTO)" in text


@pytest.mark.parametrize("record, swapped", [
    (EXAMPLES["SHP"][0], {"labels": 1}), (EXAMPLES["SafeRLHF"][0], {"better_response_id": 0}),
    (EXAMPLES["AlpacaEval"][0], {"preference": 1.2}),
    (EXAMPLES["HelpSteer2"][0], {"preference_strength": -1}),
    (EXAMPLES["HelpSteer3"][0], {"overall_preference": 1}),
    (EXAMPLES["rankings"][0], {"scores": [3, 4.5, 1]}),
])
def test_the_other_preference_exchanges_the_responses_also_as_the_text_of_a_table(tmp_path, record, swapped):
    assert load_one(tmp_path, record | swapped)[0] == (P, " No", " Yes")
    [(key, value)] = swapped.items()
    value = list(map(str, value)) if isinstance(value, list) else str(value)
    assert load_one(tmp_path, record | {key: value})[0] == (P, " No", " Yes")


@pytest.mark.parametrize("form, tie", [
    ("SHP", {"labels": 0.5}), ("SafeRLHF", {"better_response_id": 0.5}), ("AlpacaEval", {"preference": 0}),
    ("AlpacaEval", {"preference": 1.5}), ("HelpSteer2", {"preference_strength": 0}),
    ("HelpSteer3", {"overall_preference": 0}), ("rankings", {"scores": [2, 2, 2]}),
])
def test_a_tie_is_dropped_and_counted(tmp_path, form, tie):
    _, notes = load([write(tmp_path / "d.jsonl", EXAMPLES[form][0] | tie, EXAMPLES[form][0])], BYTES, 100)
    assert notes[0].endswith("1 pairs, 1 dropped: 1 with no preference between the responses (1)")


@pytest.mark.parametrize("prompt, chosen, rejected", [
    (AB, " Yes", " No"),  # several turns: all but the last are the prompt
    (P, " Yes\n\nHuman: B\n\nAssistant: C", " No"),  # the chosen transcript goes on for another turn
    (P, " No", " Yes\n\nHuman: B\n\nAssistant: C"),  # the rejected one does
    (P, " Same start, yes", " Same start, no"),  # a shared beginning of the responses is not the prompt
    (P, " Yes", " Yes and more"),  # one response is the beginning of the other
    (P, " Yes\n\nHuman: B\n\nAssistant: C", " Yes\n\nHuman: D\n\nAssistant: E"),
])
def test_the_prompt_of_a_transcript_is_the_common_prefix_up_to_its_last_assistant_turn(
        tmp_path, prompt, chosen, rejected):
    record = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    assert load_one(tmp_path, record)[0] == (prompt, chosen, rejected)
    assert load_one(tmp_path, record | {"prompt": None})[0] == (prompt, chosen, rejected)


@pytest.mark.parametrize("record, expected", [
    # implicit prompt: the messages that both sides share
    ({"chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "No")}, (P, " Yes", " No")),
    # the prompt stands in both sides again, as messages or as a string, white space aside
    (pair(turns("Hi"), turns("Hi", "Yes"), turns("Hi", "No")), (P, " Yes", " No")),
    (pair("Hi", turns("Hi", "Yes"), turns("Hi", "No")), (P, " Yes", " No")),
    (pair("Hi \n", turns("Hi", "Yes"), turns("Hi", "No")), (P, " Yes", " No")),
    # the prompt as a string, before a system turn that only the sides hold
    (pair("Hi", SYSTEM + turns("Hi", "Yes"), SYSTEM + turns("Hi", "No")), (SYSTEM_P, " Yes", " No")),
    # a system turn that both sides continue, or repeat
    (pair(SYSTEM, turns("Hi", "Yes"), turns("Hi", "No")), (SYSTEM_P, " Yes", " No")),
    (pair(SYSTEM, SYSTEM + turns("Hi", "Yes"), SYSTEM + turns("Hi", "No")), (SYSTEM_P, " Yes", " No")),
    # the prompt as messages, the responses as strings or as one message
    (pair(turns("Hi"), "Yes", "No"), (P, " Yes", " No")),
    (pair(turns("Hi")[0], says("Yes")[0], "No"), (P, " Yes", " No")),
    # several turns in the prompt, explicit or not: what both sides share is never scored
    ({"chosen": turns("Hi", "A", "B", "Yes"), "rejected": turns("Hi", "A", "B", "No")}, (AB, " Yes", " No")),
    (pair(turns("Hi"), says("A", "B", "Yes"), says("A", "B", "No")), (AB, " Yes", " No")),
    (pair("Hi", turns("Hi", "A", "B", "Yes"), turns("Hi", "A", "B", "No")), (AB, " Yes", " No")),
    (pair("B", turns("Hi", "A", "B", "Yes"), turns("Hi", "A", "B", "No")), (AB, " Yes", " No")),
    # conversations that part at the first answer
    ({"chosen": turns("Hi", "Yes", "B", "C"), "rejected": turns("Hi", "No")},
     (P, " Yes\n\nHuman: B\n\nAssistant: C", " No")),
    # one conversation is the beginning of the other
    ({"chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "Yes", "B", "C")},
     (P, " Yes", " Yes\n\nHuman: B\n\nAssistant: C")),
    # whole conversations beside "messages", which hold the chosen answer as well
    ({"messages": turns("Hi", "Yes"), "chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "No")},
     (P, " Yes", " No")),
    # "messages" beside a prompt are not read
    (pair("Hi", says("Yes"), says("No"), messages=turns("Hi", "Yes")), (P, " Yes", " No")),
    # the text in parts
    (pair([{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}],
          says([{"type": "text", "text": "Yes"}]), "No"), (P, " Yes", " No")),
    # others' names for the roles
    (pair(sharegpt(("human", "Hi"), ("function_call", "A"), ("observation", "B")), sharegpt(("gpt", "Yes")),
          "No"), (AB, " Yes", " No")),
])
def test_chat_messages_are_rendered_in_the_form_of_hh(tmp_path, record, expected):
    assert load_one(tmp_path, record)[0] == expected


def test_a_prompt_stands_as_it_is_and_what_another_form_would_read_is_named_as_ignored(tmp_path):
    record = {"instruction": "Do it.", "input": "A long story", "prompt": "Q", "chosen": "a", "rejected": "b"}
    one, notes = load_one(tmp_path, record)
    assert one == ("Q", "a", "b")
    assert notes[1:] == ["ignored keys: 'input' (1 times), 'instruction' (1 times)"]


def test_two_forms_in_one_file_are_counted_and_unread_keys_that_hold_something_named_once(tmp_path):
    path = write(tmp_path / "d.jsonl", pair(source=1), pair(source=2, id=3, note="", input=None),
                 EXAMPLES["SHP"][0])
    assert load([path], BYTES, 100)[1] == [
        f"{path}: SHP in 1 ({formats.FORMS['SHP'].rule}), pairs in 2 (prompt as it stands): 3 pairs",
        "ignored keys: 'id' (1 times), 'source' (2 times)"]


# ---------------------------------------------------------------------------------------------------------
# Containers

RECORDS = [pair(f"Q{i}", f"good\n{i}, é", f'bad "{i}"') for i in range(5)]
EXPECTED = [tuple(record.values()) for record in RECORDS]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=1).encode()
BOM = b"\xef\xbb\xbf"


def csv_of(records, delimiter):
    def cell(x):
        return '"' + x.replace('"', '""') + '"'
    rows = records[0], *map(dict.values, records)
    return "\r\n".join(delimiter.join(map(cell, row)) for row in rows).encode()


@pytest.mark.parametrize("name, content", [
    ("a.jsonl", LINES), ("A.JSONL", LINES), ("a.json", ARRAY), ("A.JSON", ARRAY), ("no_ending", LINES),
    ("a.jsonl.gz", gzip.compress(LINES)), ("A.Jsonl.GZ", gzip.compress(LINES)),
    ("a.json.gz", gzip.compress(ARRAY)), ("a.jsonl.xz", lzma.compress(LINES)),
    ("a.json.bz2", bz2.compress(ARRAY)), ("lines.json", LINES), ("array.jsonl", b" \n" + ARRAY),
    ("windows.jsonl", BOM + LINES.replace(b"\n", b"\r\n")), ("windows.json", BOM + ARRAY),
    ("lines2.json", BOM + LINES), ("array2.jsonl", BOM + ARRAY),
    ("a.csv", csv_of(RECORDS, ",")), ("a.tsv", BOM + csv_of(RECORDS, "\t")),
    ("a.csv.gz", gzip.compress(csv_of(RECORDS, ","))),
])
def test_the_same_pairs_read_alike_from_every_container(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert texts(load([tmp_path / name], BYTES, 100)[0]) == EXPECTED
    if name != "no_ending":
        assert texts(load([tmp_path], BYTES, 100)[0]) == EXPECTED  # its folder


def test_arrow_and_parquet_files_are_read_with_pyarrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([*RECORDS, pair(turns("Hi"), says("Yes"), says("No"))][:5])
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "saved").mkdir()
    with pyarrow.ipc.new_stream(str(tmp_path / "saved" / "data-00000.arrow"), table.schema) as stream:
        stream.write_table(table)
    (tmp_path / "saved" / "state.json").write_text("{}")
    chat = pyarrow.Table.from_pylist([pair(turns("Hi"), says("Yes"), says("No"))])
    parquet.write_table(chat, tmp_path / "chat.parquet")
    for path in tmp_path / "a.parquet", tmp_path / "saved":
        assert texts(load([path], BYTES, 100)[0]) == EXPECTED
    assert texts(load([tmp_path / "chat.parquet"], BYTES, 100)[0]) == [(P, " Yes", " No")]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="bad.parquet: not a .parquet file"):
        load([tmp_path / "bad.parquet"], BYTES, 100)


@pytest.mark.parametrize("show", [json.dumps, repr])
@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_a_column_of_lists_or_objects_as_text_is_read_as_these(tmp_path, name, show):
    """Where every cell is one: else it stays text."""
    chat = [pair(turns("Hi"), says("Yes"), says("No")), pair(turns("Hi"), says("Yes, it's"), says("No"))]
    rows = [{key: show(value) for key, value in record.items()} for record in chat]
    if name == "a.csv":
        (tmp_path / name).write_bytes(csv_of([*rows, rows[0] | {"prompt": ""}], ","))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
    chosen = [chosen for _, chosen, _ in texts(load([tmp_path / name], BYTES, 100)[0])]
    assert chosen[:2] == [" Yes", " Yes, it's"]
    (tmp_path / "b.csv").write_bytes(csv_of([rows[0], rows[0] | {"chosen": "[see below"}], ","))
    pairs = texts(load([tmp_path / "b.csv"], BYTES, 200)[0])
    assert [chosen for _, chosen, _ in pairs] == [" " + show(says("Yes")), " [see below"]


def test_without_pyarrow_a_parquet_file_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="a.parquet: reading .parquet needs pyarrow: pip install pyarrow"):
        load([tmp_path / "a.parquet"], BYTES, 100)


def test_a_folder_is_the_data_files_in_it_and_what_it_leaves_out_is_said(tmp_path):
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("hello")
    with pytest.raises(DataError, match="a folder without .jsonl"):
        load([folder], BYTES, 100)
    (folder / "dataset_infos.json").write_text("{}")
    with pytest.raises(DataError, match="must hold an array"):  # alone, it is taken for the data
        load([folder], BYTES, 100)
    (folder / "data" / "b.jsonl").write_bytes(LINES)
    (folder / "data" / "a.csv").write_bytes(csv_of(RECORDS[:1], ","))
    pairs, notes = load([folder], BYTES, 100)
    assert texts(pairs) == EXPECTED[:1] + EXPECTED
    assert notes[0] == f"{folder}: not read, .json beside .csv files: dataset_infos.json" and len(notes) == 3


def test_several_files_mix_in_their_order(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", pair(f"Q{i}")) for i in (2, 1)]
    pairs, notes = load(files, BYTES, 100)
    assert [p for p, _, _ in texts(pairs)] == ["Q2", "Q1"] and len(notes) == 2
    assert pairs.where == [f"{f}:1" for f in files]


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", None, "No such file"),
    ("a.json", None, "No such file"),
    ("a.jsonl.gz", b"not gzip", "Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(LINES)[:-20], "ended before the end-of-stream marker"),
    ("a.jsonl.xz", b"not xz", "Input format not supported"),
    ("a.jsonl.bz2", b"not bz2", "Invalid data stream"),
    ("a.zip", b"PK", "unpack it first (.zip is not read"),
    ("a.jsonl.zst", b"", "unpack it first (.zst is not read"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    ("a.jsonl", b"\xff\xfe{}\n", ":1: not UTF-8"),
    ("a.json", b"{}", "must hold an array of pairs"),
    ("a.json", b"[1,", "not JSON"),
    ("a.json", b"[" * 100_000, "not JSON"),
    ("a.json", b"[1]", ": item 1: expected an object, found int"),
    ("a.jsonl", b"", "0 pairs"),
    ("a.csv", b"prompt,chosen,rejected\na,b,c,d\n", ": row 1: more cells than the header"),
    ("a.csv", b"prompt,chosen,rejected\na,b\n", ": row 1: no form has the keys chosen, prompt"),
    ("a.csv", b"prompt,chosen,rejected\n\xff,b,c\n", ": not UTF-8"),
])
def test_a_file_that_cannot_be_read_is_a_data_error_with_its_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as e:
        load([tmp_path / name], BYTES, 100)
    assert str(e.value).startswith(f"{tmp_path / name}:") and message in str(e.value)


def test_odd_characters_inside_the_text_survive(tmp_path):
    odd = "\ufeffBOM \x00 NUL\r\nCRLF \r CR \u2028 \x85 \U0001f600 <|endoftext|>"
    assert load_one(tmp_path, pair(odd, odd + "1", odd + "2"))[0] == (odd, odd + "1", odd + "2")


# ---------------------------------------------------------------------------------------------------------
# What is dropped, what is refused, what is said


def test_unusable_pairs_are_dropped_and_counted_by_reason_with_their_lines(tmp_path):
    path = write(tmp_path / "d.jsonl", pair(), pair(chosen=" \n"), pair(rejected=" "), "", pair(chosen="bad"),
                 pair(chosen="x" * 99), pair(chosen="\u00a0"), pair(chosen="\t"))
    pairs, notes = load([path], BYTES, 50)
    assert pairs.where == [f"{path}:1"]
    assert notes == [f"{path}: pairs (prompt as it stands): 1 pairs, 6 dropped: "
                     "4 with an empty response (2, 3, 7, ...); 1 with identical responses (5); "
                     "1 with a response that does not fit block_size 50 (6)"]


def test_cut_prompts_and_responses_with_end_of_text_written_out_are_counted(tmp_path):
    path = write(tmp_path / "d.jsonl", pair("Q" * 60), pair(rejected="no<|endoftext|>\n"))
    _, notes = load([path], BYTES, 50)
    assert notes[0].endswith("2 pairs, 1 prompts cut at the front to fit block_size 50, 1 with a response "
                             "that ends in the text <|endoftext|>: end-of-text is added here, remove it")


def test_when_no_pair_is_left_it_says_why(tmp_path):
    assert error_of(pair(chosen=""), tmp_path=tmp_path).splitlines() == [
        "/bad.jsonl: pairs (prompt as it stands): 0 pairs, 1 dropped: 1 with an empty response (1)",
        "no pair is left to train on"]


@pytest.mark.parametrize("record, message", [
    ("{", "not JSON (Expecting property name"),
    ("[1", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("17", "expected an object, found int"),
    ({}, "no form has the keys (none); the nearest: "),
    ({"chosen": "a"}, "no form has the keys chosen; the nearest: "),
    ({"question": "Q", "answer_a": "a", "answer_b": "b"},
     "no form has the keys answer_a, answer_b, question; the nearest: questions lacks chosen, rejected; "),
    ({"prompt": "Q", "completion": "a", "label": True}, "one completion with a label (KTO) is no pair"),
    ({"chosen": "a", "rejected": "b"}, 'no "prompt", and no "\\n\\nAssistant:" shared by both sides'),
    (pair(7), '"prompt" must be a string, found int'),
    (pair(chosen=None), '"chosen" must be a string, found NoneType'),
    (pair(chosen=["a"]), '"chosen"[0] must be an object with "text" and "scores"'),
    (pair(chosen=[{"scores": [1]}]), '"chosen"[0] must be an object with "text" and "scores"'),
    (pair(chosen=[{"text": 1}]), '"chosen[0].text" must be a string, found int'),
    (pair(chosen=scored(("a", -1))), '"chosen"[0].scores: needs a list of finite numbers >= 0, found [-1]'),
    ('{"prompt": "", "chosen": [{"text": "a", "scores": [NaN]}], "rejected": "b"}', "found [nan]"),
    ('{"prompt": "", "chosen": [{"text": "a", "scores": [1e999]}], "rejected": "b"}', "found [inf]"),
    (pair(chosen=scored(("a", 1e300))), "found [1e+300]"),  # infinite in float32
    (pair(chosen=scored(("a", 10**400))), "found [1000"),
    (pair(chosen=scored(("a", True))), "found [True]"),
    (pair(chosen=[{"text": "a", "scores": 3}]), "found 3"),
    (pair(chosen=scored(("a", 1)), rejected=scored(("b", 1, 2))),
     "a segment with 1 scores and one with 2 in one pair"),
    (pair(chosen=scored(("a", 1)), rejected="b"), "a segment with 0 scores and one with 1 in one pair"),
    (pair("\ud800"), '"prompt" holds a lone surrogate, which is no character'),
    (pair(turns("Hi"), turns("Yes"), turns("No")), 'whole conversations, and "prompt" is no turn'),
    (pair("Hello", turns("Hi", "Yes"), turns("Hi", "No")), 'and "prompt" is no turn that they share'),
    ({"chosen": turns("Yes"), "rejected": turns("No")}, '"chosen": the response must start with'),
    (pair(turns("Hi", "A"), says("Yes"), says("No")), "the prompt ends in an assistant turn; the responses"),
    (pair(P, says("Yes"), says("No")), '"prompt" is rendered already (it ends in "Assistant:")'),
    (pair([{"role": "robot", "content": ""}], "a", "b"), '"prompt"[0]: role must be system, user or'),
    (pair([{"role": ["user"], "content": ""}], "a", "b"), '"prompt"[0]: role must be system, user or'),
    (pair(turns("Hi"), 7, "b"), '"chosen" must be a list of messages, found int'),
    (pair([{"role": "user"}], "a", "b"), '"prompt[0].content" must be a string, found NoneType'),
    (pair(turns([{"type": "image_url"}]), "a", "b"), "\"prompt\"[0]: a part of type 'image_url'; only text"),
    (pair(turns("Hi"), [says("")[0] | {"tool_calls": [{}]}], "b"), '"chosen"[0]: a tool call; only text'),
    (pair(turns("Hi"), [says("So:")[0] | {"function_call": {"name": "f"}}], "b"), '"chosen"[0]: a tool call'),
    ({"instruction": [], "chosen": "a", "rejected": "b"}, '"instruction" must be a string, found list'),
    ({"instruction": "Q", "input": 0, "chosen": "a", "rejected": "b"}, '"input" must be a string, found'),
    ({"instruction": "Q", "output": ["a"]}, '"output" must be a list of two responses, chosen first'),
    (EXAMPLES["SHP"][0] | {"labels": "A"}, "\"labels\" must be a number from 0 to 1, found 'A'"),
    (EXAMPLES["SHP"][0] | {"history": 7}, '"history" must be a list of messages, found int'),
    (EXAMPLES["rankings"][0] | {"scores": [1]}, '"responses" and "scores" must be lists of one length'),
    (EXAMPLES["rankings"][0] | {"scores": [1, 2, None]}, '"scores[2]" must be a number from'),
])
def test_a_malformed_record_is_one_line_file_line_what(tmp_path, record, message):
    text = error_of(record, tmp_path=tmp_path)
    assert text.startswith("/bad.jsonl:1: ") and message in text and len(text.splitlines()) == 1


def test_ten_kinds_of_malformed_lines_are_listed_over_all_files_and_equal_ones_once(tmp_path):
    good = write(tmp_path / "0.jsonl", pair(), "oops", pair())
    bad = write(tmp_path / "1.jsonl", *["{}"] * 12, *({f"key{i}": 1} for i in range(10)), "{}")
    with pytest.raises(DataError) as e:
        load([good, bad], BYTES, 100)
    lines = str(e.value).splitlines()
    assert lines[0].startswith(f"{good}:2: not JSON")
    assert lines[1].startswith(f"{bad}:1: no form has the keys (none)")
    assert lines[1].endswith(" (and 12 more like it)")
    assert [line.split(": ")[0] for line in lines[2:10]] == [f"{bad}:{i}" for i in range(13, 21)]
    assert lines[10:] == ["... and 2 more"]


def test_all_scored_pairs_have_the_same_number_of_scores(tmp_path):
    def with_scores(*scores):
        return pair(chosen=scored(("a", *scores)), rejected=scored(("b", *scores)))

    text = error_of(with_scores(1, 2), with_scores(1, 2, 3), with_scores(2, 3), tmp_path=tmp_path)
    assert text == "/bad.jsonl:2: 3 scores a segment here, 2 before"
    pairs, _ = load([write(tmp_path / "d.jsonl", with_scores(1, 2))], BYTES, 100)
    assert pairs[0].chosen_scores.tolist() == [[1, 2]]


def test_a_data_set_with_some_unscored_pairs_counts_as_unscored_and_says_so(tmp_path):
    path = write(tmp_path / "d.jsonl", pair(chosen=scored(("a", 1)), rejected=scored(("b", 1))), pair(),
                 pair(chosen=scored(("a",)), rejected=scored(("b",))))  # "scores": [], still to be filled in
    pairs, notes = load([path], BYTES, 100)
    assert pairs.n_aspects == 0 and notes[-1] == "scores are ignored: 2 of 3 pairs have none"
    assert texts(pairs) == [("Q", "a", "b"), ("Q", "good", "bad"), ("Q", "a", "b")]


# ---------------------------------------------------------------------------------------------------------
# split_segments

@pytest.mark.parametrize("parts", [
    ["One.", " Two!", " Three?", " Four"],
    ["Really?!", " No way!!!", " Fine"],
    ["It costs 3.5 dollars, v1.2.3, at example.com.", " Yes."],
    ["Well... maybe.", " So…", " Then… go on."],
    ["Wait...", " What?"],
    ['"Yes!" he said.', ' "No."', " (She left.)", " Gone."],
    ["**Bold.**", " _Slanted!_", " Plain"],
    ["Dr. Smith met J. R. Doe, Mr. X and Prof. Y cf. Mrs. Z in vain.", " Then"],
    ["In the U.S. it is 5 p.m. now, i.e. late, etc. and so on.", " So do I.", " Good"],
    ["a line", "\nanother", "\n\nand a third\n"],
    ["Steps:", "\n1. First.", " Still first.", "\n2. Second", "\n  - a bullet", "\n* another"],
    ["1. First", "\r\n2. Second"],
    ["all lower case.", " one more?", " yes!", " plan (B).", " ok"],
    ["你好。", "好吗？", "好！", " 好…", " Good"],
    ["「好。」", "他说"],
    ["Code:", "\n```py\nx = 1. \n\ny = 2.\n```", "\nDone.", " Yes"],
    ["~~~\na. b. c\n~~~", "\nb. C", "\nd"],
    ["Use `a. b` and ```c. D``` here.", " Ok"],
    ["```\nnever. Closed.\n\n"],
    ["  Leading.", "  Trailing.  "],
    [" \n "],
    ["No end"],
])
def test_segments_are_sentences_lines_list_items_and_whole_fences(parts):
    assert split_segments("".join(parts)) == parts


def test_no_text_has_no_segments():
    assert split_segments("") == []


@pytest.mark.parametrize("unit", ["a", " ", ".", ". ", "`", "\n", "1. ", ".)", ".\u3000", "~~~\n", '."'])
def test_splitting_is_linear_in_the_text(unit):
    """A quadratic scan would need minutes here."""
    assert "".join(split_segments(unit * 100_000 + "x")) == unit * 100_000 + "x"


def test_the_parts_join_to_the_text_exactly_whatever_it_is():
    hypothesis = pytest.importorskip("hypothesis")
    strategies = hypothesis.strategies
    pieces = ". ! ? … 。 ！ ？ ... ``` ~~~ \" ' ” ） ) ] * _ 1. 2) - etc Mr I a B é 3.5".split()
    pieces = strategies.sampled_from([*pieces, " ", "\n", "\r\n", "\t", "\u2028", "\u00a0"])
    text = strategies.lists(pieces | strategies.text(max_size=3), max_size=30).map("".join)

    @hypothesis.settings(derandomize=True, database=None, max_examples=100, deadline=None)
    @hypothesis.given(text)
    def check(text):
        parts = split_segments(text)
        assert "".join(parts) == text and all(parts)
        assert all(part.strip() for part in parts) or len(parts) == 1
        assert all(not part[-1].isspace() for part in parts[:-1])  # white space goes with the next segment

    check()


# ---------------------------------------------------------------------------------------------------------
# Real data


@real_data
@pytest.mark.slow
def test_hh_rlhf_2308_of_2312_pairs_are_usable_with_prompts_that_end_in_assistant():
    tokenizer = Tokenizer(SHARED / "gpt2-bpe")
    pairs, notes = load([SHARED / "hh" / "harmless-base-test.jsonl.gz"], tokenizer, 1024)
    assert len(pairs) == 2308 and "4 dropped: 4 with an empty response" in notes[0]
    assert "HH transcripts (prompt = common prefix up to its last Assistant turn)" in notes[0]
    prompts = [tokenizer.decode(p.prompt) for p in pairs]
    assert all(p.startswith("\n\nHuman:") and p.endswith("\n\nAssistant:") for p in prompts)
    lines = {int(w.rpartition(":")[2]): i for i, w in enumerate(pairs.where)}
    for line in (1255, 1689, 1953, 2037):  # chosen's last Assistant turn is not the prompt's
        p = pairs[lines[line]]
        assert "\n\nAssistant:" in tokenizer.decode(p.chosen) + tokenizer.decode(p.rejected)
    assert pairs.rows[:, 1:4].max(0).tolist() == [845, 281 + 1, 571 + 1]


@real_data
@pytest.mark.slow
@pytest.mark.parametrize("name, kept, note", [
    ("instructions/instruction-data-with-preference.json", 1094, "6 dropped: 6 with identical responses"),
    ("math/pairs.jsonl", 1500, "pairs (prompt as it stands): 1500 pairs"),
    ("fine-grained/pairs_2d.jsonl", 481, "scored segments (prompt as it stands): 481 pairs"),
])
def test_the_other_real_files_load(name, kept, note):
    pairs, notes = load([SHARED / name], Tokenizer(SHARED / "gpt2-bpe"), 1024)
    assert len(pairs) == kept and note in notes[0]
    assert pairs.n_aspects == (2 if "2d" in name else 0)
    held = data.hold_out(pairs)[1]
    assert kept // 10 - 20 <= len(held) <= kept // 10
    batch = data.collate([held[i] for i in range(8)])
    row, column = batch.source
    before, after = batch.positions[row, column], batch.branch[row, column]
    first = batch.response.diff(prepend=torch.tensor([-1])) != 0
    assert (after[first] == data.PROMPT).all() and (after[~first] == 1 + batch.response[~first] % 2).all()
    assert (before[1:] - before[:-1] == 1)[~first[1:]].all()
