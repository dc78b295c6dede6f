"""tools/convert.py: what people have becomes the one format, or is refused in a line; nothing in between.

Each input is a row: a record, and the texts that are trained on or the message that refuses it."""

import bz2
import gzip
import json
import lzma
import re
import shlex
import sys
from pathlib import Path

import pytest
from test_pairs import BYTES, LINES, SHARED, P, pair, real_data, scored, write
from test_pairs import texts as texts_of
from test_train import model_a  # noqa: F401

import data
import train
from plumbing import pairs
from plumbing.errors import DataError
from tools import convert, records

AB = P + " A\n\nHuman: B\n\nAssistant:"
SYSTEM = [{"role": "system", "content": "Be kind"}]
SYSTEM_P = "\n\nSystem: Be kind" + P
PAIR = {"chosen": "Yes", "rejected": "No"}
YES_NO = (P, " Yes", " No")

def turns(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]

def says(*texts):
    return turns(*texts, first="assistant")

def sharegpt(*turns):
    return [{"from": role, "value": text} for role, text in turns]

def trained_on(record, **flags):
    """The texts that the converted record gives, as pairs.py and data.py read it."""
    made = json.loads(json.dumps(convert.Converter(**flags).convert(record)))
    text = pairs.check(made, "rejected" not in made)
    [one] = texts_of([data.encode_pair(BYTES, *text, 1000)])
    return one[:2 if "rejected" not in made else 3]

def run(tmp_path, capsys, *arguments, out="out.jsonl"):
    """-> (exit status, standard output, standard error) without the folder's name."""
    status = convert.main([*map(str, arguments), "--out", str(tmp_path / out)])
    printed = capsys.readouterr()
    return status, printed.out.replace(f"{tmp_path}/", ""), printed.err.replace(f"{tmp_path}/", "")

def texts(*paths, alone=False):
    return texts_of(data.load(paths, BYTES, 1000, alone)[0])

# ---------------------------------------------------------------------------------------------------------
# What is read

README = (Path(__file__).parents[1] / "tools" / "README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([\w ]+) \| `(\{.*\})` \|$", re.M)
RECORDS = {form: json.loads(record) for form, record in ROW.findall(README)}
INSTRUCTION = "\n\nHuman: Do it.\n2 + 2\n\nAssistant:"
EXPECTED = dict.fromkeys(RECORDS, YES_NO) | {  # the forms that tools/README.md shows, and what is trained on
    "pairs": (" Q\n", "  A", "B "), "scored segments": ("Q", "One. Two.", "No"),
    "ShareGPT": (SYSTEM_P, " Yes", " No"), "questions": (SYSTEM_P, " Yes", " No"),
    "instructions": (INSTRUCTION, " Four.", " 4!"), "instructions and outputs": (INSTRUCTION, " Four."),
    **dict.fromkeys(["completions", "responses", "outputs"], ("Q ", "A")),
    "conversations": (AB, " Yes"), "ShareGPT conversations": (P, " Yes")}

@pytest.mark.parametrize("form", RECORDS)
def test_each_form_that_the_readme_shows_gives_the_texts_that_it_means(form):
    assert len(RECORDS) == 23
    assert trained_on(RECORDS[form]) == trained_on(RECORDS[form] | {"id": 7}) == EXPECTED[form]

ROLES = [{"from": role, "value": "Hi"} for role in ("user", "human", "Human", "USER", "prompter")]

@pytest.mark.parametrize("record, expected", [
    # the prompt is what both sides share
    ({"chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "No")}, YES_NO),
    (pair(turns("Hi"), turns("Hi", "Yes"), turns("Hi", "No")), YES_NO),
    (pair("Hi \n", turns("Hi", "Yes"), turns("Hi", "No")), YES_NO),  # the prompt again, white space aside
    (pair("Hi", SYSTEM + turns("Hi", "Yes"), SYSTEM + turns("Hi", "No")), (SYSTEM_P, " Yes", " No")),
    (pair(SYSTEM, turns("Hi", "Yes"), turns("Hi", "No")), (SYSTEM_P, " Yes", " No")),
    (pair(SYSTEM, SYSTEM + turns("Hi", "Yes"), SYSTEM + turns("Hi", "No")), (SYSTEM_P, " Yes", " No")),
    ({"chosen": turns("Hi", "A", "B", "Yes"), "rejected": turns("Hi", "A", "B", "No")}, (AB, " Yes", " No")),
    (pair(turns("Hi"), says("A", "B", "Yes"), says("A", "B", "No")), (AB, " Yes", " No")),
    (pair("B", turns("Hi", "A", "B", "Yes"), turns("Hi", "A", "B", "No")), (AB, " Yes", " No")),
    # text, a message, messages, {"messages"}, parts of content
    (pair(turns("Hi"), "Yes", "No"), YES_NO), (pair(turns("Hi")[0], says("Yes")[0], "No"), YES_NO),
    (pair("Hi", {"messages": says("Yes")}, {"messages": says("No")}), YES_NO),
    (pair([{"role": "user", "content": [{"type": "text", "value": "H"}, {"type": "text", "text": "i"}]}],
          says([{"type": "text", "text": "Yes"}]), [{"type": "text", "text": "No"}]), YES_NO),
    *((pair([message], {"role": role, "content": "Yes"}, "No"), YES_NO) for message, role in zip(
        ROLES, ("assistant", "Assistant", "model", "gpt", "bot"), strict=True)),
    # a system text, beside any form
    ({"system": "Be kind", "instruction": "Hi", **PAIR}, (SYSTEM_P, " Yes", " No")),
    ({"system": "Be kind", "prompt": "Hi", **PAIR}, (SYSTEM_P, " Yes", " No")),
    ({"system": "Be kind", "prompt": "Hi", "completion": "Yes"}, (SYSTEM_P, " Yes")),
    ({"system": "Be kind", "messages": SYSTEM + turns("Hi", "Yes")}, (SYSTEM_P, " Yes")),
    ({"system": "Be kind", **RECORDS["SHP"]}, (SYSTEM_P, " Yes", " No")),
    # a copy of the prompt or of the conversation is left out
    ({"prompt": "Hi", "chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "No"),
      "messages": turns("Hi", "Yes"), "score_chosen": 8.5, "score_rejected": "8", "prompt_id": "x"}, YES_NO),
    ({"messages": turns("Hi", "Yes"), **PAIR}, YES_NO),
    ({"messages": turns("Hi", "Yes"), "prompt": "Hi"}, YES_NO[:2]),
    (pair(question="Q "), ("Q", "good", "bad")),
    # nothing, and switches that are on or stand on what is not trained on
    (pair(tools=[], images=None, system="", history=[], weight=1, train=True), ("Q", "good", "bad")),
    ({"messages": [turns("Hi")[0] | {"weight": 0}, says("Yes")[0] | {"weight": 1}]}, YES_NO[:2]),
    (pair(turns("Hi"), [says("Yes")[0] | {"tool_calls": None, "reasoning_content": ""}], says("No")), YES_NO),
    # text stays text
    (pair("", "a", "b"), ("<|endoftext|>", "a", "b")),
    (pair('[{"role": "user", "content": "Hi"}]', '{"a": 1}', "[1]"),
     ('[{"role": "user", "content": "Hi"}]', '{"a": 1}', "[1]")),
    (pair(turns("a\n\nHuman: b"), "Yes", "No"), ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", " Yes", " No")),
    # transcripts of HH
    *(({"chosen": p + c, "rejected": p + r}, (p, c, r)) for p, c, r in [
        (AB, " Yes", " No"), (P, " Same, yes", " Same, no"), (P, " Yes", " Yes and more"),
        (P, " Yes\n\nAssistant: C", " No")]),
    # SFT
    ({"prompt": turns("Hi"), "completion": says("Yes")}, YES_NO[:2]),
    ({"prompt": "Q", "chosen": "A"}, ("Q", "A")),
])
def test_what_is_read_is_what_is_meant(record, expected):
    assert trained_on(record) == expected

def test_keys_without_meaning_are_left_out_and_counted_and_an_id_is_kept():
    keys = """source prompt_id url timestamp created_at dataset split category language chosen_model
        sha256 rejected-model model_name prompt_tokens num_tokens chosen_length conversationId _id uuid"""
    converter = convert.Converter()
    made = converter.convert(pair(**dict.fromkeys(keys.split(), "x"), metadata={"url": "x"}, id="a"))
    assert made == pair(id="a") and converter.left_out == dict.fromkeys([*keys.split(), "metadata"], 1)
    assert convert.Converter(drop=["id"]).convert(pair(id=7)) == converter.convert(pair(id=[7])) == pair()

# ---------------------------------------------------------------------------------------------------------
# What is refused

CHAT = pair(turns("Hi"), says("Yes")[0], says("No")[0])
TEACHER = {"role": "assistant", "content": "Yes"}
MEANT = 'perhaps part of what is meant, and not read: "{0}"; without it: --drop {1}'
SWITCHED = '"{}" says not to train on it'
NEITHER = '"weight" is neither on nor off; to do so all the same: --drop weight'

def with_answer(**more):
    return CHAT | {"chosen": TEACHER | more}

@pytest.mark.parametrize("record, message", [
    # part of an answer or of the record that would be lost
    *((with_answer(**{key: "two and two"}), MEANT.format(f"chosen.{key}", key))
      for key in ("reasoning_content", "thinking", "reasoning", "name", "refusal", "anything")),
    *((with_answer(**{key: [{}]}), MEANT.format(f"chosen.{key}", key)) for key in ("tool_calls", "images")),
    ({"messages": [*turns("Hi"), {"role": "assistant", "content": None, "tool_calls": [{}]}]},
     MEANT.format("messages[1].tool_calls", "tool_calls")),
    (pair(chosen=[{"text": "a", "reasoning": "b"}]), MEANT.format("chosen[0].reasoning", "reasoning")),
    (pair(turns("Hi"), [{"type": "text", "text": "a", "x": 1}], "b"), MEANT.format("chosen[0].x", "x")),
    (pair(turns("Hi"), {"messages": says("Yes"), "x": 1}, "b"), MEANT.format("chosen.x", "x")),
    *((pair(**{key: value}), MEANT.format(key, key)) for key, value in [
        ("tools", [{}]), ("functions", [{}]), ("images", ["x"]), ("context", "A"), ("instruction", "Do"),
        ("input", "A story"), ("history", [["a", "b"]]), ("question", "other"), ("conversation_summary", "x"),
        ("output", "x"), ("system_prompt", "x"), ("chosen_score", 1), ("label", 0), ("status", "tie"),
        ("source", "a story " * 30), ("metadata", {"system": "x"}), ("tokens", [{"a": 1}]), ("name", "x")]),
    (RECORDS["OpenAI preferences"] | {"input": {"messages": turns("Hi"), "tools": [{}]}},
     MEANT.format("input.tools", "tools")),
    (pair(a=1, b={"c": 2}), 'not read: "a", "b"; without it: --drop a b'),
    ({"prompt": "Q", "completion": "A", "rating": 3}, MEANT.format("rating", "rating")),
    # switches
    *((with_answer(**{key: off}), "chosen: its " + SWITCHED.format(key)) for key, off in [
        ("weight", 0), ("loss", False), ("train", False), ("trainable", "false")]),
    (with_answer(weight=0.5), "chosen: its " + NEITHER),
    *((pair(**{key: off}), "the record: its " + SWITCHED.format(key)) for key, off in [
        ("weight", 0), ("loss", False), ("train", "False")]),
    ({"messages": [*turns("Hi"), TEACHER | {"weight": 1}, *turns("B", "C")]}, 'a "weight" that says to'),
    (CHAT | {"prompt": [turns("Hi")[0] | {"loss": True}]}, 'a "loss" that says to'),
    ({"messages": [*turns("Hi"), TEACHER | {"weight": 0}], **PAIR}, SWITCHED.format("weight")),
    # labels
    *((record | {key: value}, f'"{key}" (KTO), is no pair of a chosen and a rejected response; --label {key}')
      for record in (RECORDS["conversations"], RECORDS["completions"])
      for key, value in [("label", False), ("labels", 1), ("kto_tag", "true"), ("good", False)]),
    ({"messages": [*turns("Hi"), TEACHER | {"prefix": True}]}, MEANT.format("messages[1].prefix", "prefix")),
    # several answers
    *((record | {key: ["a", "b", "c"]}, f'"{key}" is a list of 3 texts; one answer is needed')
      for record, key in ((RECORDS["outputs"], "output"), (pair(), "chosen"), (pair(), "rejected"))),
    # transcripts beside a prompt
    *((pair(prompt, P + " Yes", P + " No"), 'there is a "prompt"; if both are the same: --drop prompt')
      for prompt in (P, "Hi", turns("Hi"))),
    # turns of other speakers
    (CHAT | {"chosen": sharegpt(("function_call", "f"), ("observation", "4"), ("gpt", "4"))},
     "\"chosen[0]\" is a turn of 'function_call', not of system, user, assistant"),
    *((CHAT | {side: says("4", "RESULT", "4")}, f'"{side}": 3 turns after the prompt; an answer is one turn')
      for side in PAIR),
    ({"chosen": turns("Hi", "Yes", "B", "C"), "rejected": turns("Hi", "No")}, '"chosen": 3 turns after'),
    ({"chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "Yes", "B", "C")}, '"rejected": 3 turns after'),
    *((pair([{"role": role, "content": "4"}], "a", "b"), f"is a turn of {role!r}, not of")
      for role in ("tool", "function", "robot", None, ["user"])),
    # a prompt that is not clear
    (pair(turns("Hi", "A"), says("Yes"), says("No")), "the prompt ends in a turn of assistant"),
    (pair(P, says("Yes"), says("No")), '"prompt" is a transcript that ends in "Assistant:"'),
    (pair("Hello", turns("Hi", "Yes"), turns("Hi", "No")), 'and "prompt" is no turn that they share'),
    ({"system": "Be rude", "messages": SYSTEM + turns("Hi", "Yes")}, 'the system turn of "messages" differ'),
    (pair([SYSTEM[0] | {"content": "Be rude"}], SYSTEM + turns("Hi", "Yes"), SYSTEM + turns("Hi", "No")),
     "two system texts that differ"),
    ({"chosen": turns("Yes"), "rejected": turns("No")}, '"chosen": a turn of user stands where'),
    ({"chosen": SYSTEM + turns("Hi", "A"), "rejected": turns("Hi", "A")}, '"chosen": a turn of system'),
    ({"chosen": says("Yes"), "rejected": says("No")}, "lacks prompt"),
    ({"messages": turns("Hi")}, '"messages" must end in an assistant turn, the answer'),
    ({"messages": turns("Hi", "Yes"), "prompt": turns("Hi")[0] | {"x": 1}}, MEANT.format("prompt", "prompt")),
    # what is no form names the nearest alone
    ({"question": "Q", "good_answer": "a"}, "no form has the keys good_answer, question; the nearest, pairs, "
     "lacks chosen, rejected; if they have other names: --keys chosen=NAME rejected=NAME"),
    (PAIR, "no form has the keys chosen, rejected; the nearest, pairs, lacks prompt; if they have"),
    ({"prompt": "Q", "response_0": "a", "response_1": "b"}, "nearest, SafeRLHF, lacks better_response_id"),
    ({}, "no form has the keys (none)"), (7, "a record must be an object, found int"),
    # values
    (pair(chosen=7), '"chosen" must be text or messages, found int'), (pair(chosen=None), "lacks chosen"),
    (pair(messages=turns("other")), MEANT.format("prompt", "prompt")),
    (pair("\ud800"), '"prompt" must be text, found a lone surrogate'),
    (pair([{"role": "user", "content": [{"type": "image_url"}]}]), "is a part of type 'image_url'; only"),
    (pair(chosen=scored(("a", -1))), '"chosen[0].scores" must hold finite numbers >= 0, found [-1]'),
    (pair(chosen=scored(("a", 1))), "segments with 0 and 1 scores in one pair"),
    (RECORDS["SHP"] | {"labels": "A"}, "\"labels\" must be a number from 0 to 1, found 'A'"),
    (RECORDS["rankings"] | {"scores": [1]}, '"responses" and "scores" must be lists of one length'),
    *((RECORDS["rankings"] | {"scores": [1, 2, x]}, '"scores[2]" must be a number') for x in (None, 1e999)),
])
def test_what_would_be_lost_or_misread_is_refused_in_one_line(record, message):
    with pytest.raises(DataError) as e:
        convert.Converter().convert(record)
    assert message in str(e.value) and "\n" not in str(e.value)

@pytest.mark.parametrize("record, reason", [
    (pair(score_chosen=1, score_rejected=2), 'a "score_chosen" that is not above "score_rejected"'),
    (pair(score_chosen=2, score_rejected=2), 'a "score_chosen" that is not above'),
    (pair(**{"chosen-rating": "2", "rejected-rating": "10"}), 'a "chosen-rating" that is not above'),
    (pair(chosen_avg_rating=0, rejected_avg_rating=0.5), 'a "chosen_avg_rating" that is not above'),
    (pair(margin=-0.1), 'a "margin" of 0 or less'), (pair(score_diff=0), 'a "score_diff" of 0 or less'),
    *((RECORDS[form] | tie, "prefers neither answer") for form, tie in [
        ("SHP", {"labels": 0.5}), ("SafeRLHF", {"better_response_id": 0.5}),
        ("AlpacaEval", {"preference": 0}), ("AlpacaEval", {"preference": 1.5}),
        ("HelpSteer2", {"preference_strength": "0"}), ("HelpSteer3", {"overall_preference": 0})]),
    (RECORDS["rankings"] | {"scores": [2, 2, 2]}, '"scores" that are all equal'),
    ({"chosen": P + " A\n\nHuman: B\n\nAssistant: C", "rejected": P + " No"}, "a turn of Human after what"),
])
def test_ties_and_contradictions_are_refused_or_dropped_by_a_flag(tmp_path, capsys, record, reason):
    path = write(tmp_path / "d.jsonl", record, pair(score_chosen=2, score_rejected=1.5, margin=1), record)
    status, _, error = run(tmp_path, capsys, path)
    assert status == 2 and error.startswith("convert: d.jsonl:1: ") and reason in error
    assert "; --drop_unclear drops such records (and 1 more like it)\nnothing is written" in error
    assert not (tmp_path / "out.jsonl").exists()
    status, out, _ = run(tmp_path, capsys, path, "--drop_unclear")
    assert status == 0 and "d.jsonl: dropped 2 with " in out and reason in out and "(1, 3)" in out
    assert texts(tmp_path / "out.jsonl") == [("Q", "good", "bad")]

@pytest.mark.parametrize("form, swapped", [
    ("SHP", {"labels": "1"}), ("SafeRLHF", {"better_response_id": 0}), ("AlpacaEval", {"preference": 1.2}),
    ("HelpSteer2", {"preference_strength": -1}), ("HelpSteer3", {"overall_preference": "1"}),
    ("rankings", {"scores": ["3", 4.5, 1]})])
def test_the_other_preference_exchanges_the_responses(form, swapped):
    assert trained_on(RECORDS[form] | swapped) == (P, " No", " Yes")

def test_keys_are_renamed_and_dropped_as_the_flags_say(tmp_path, capsys):
    rows = [{"question": "Q", "good_answer": "a", "bad_answer": "b", "source": "x", "system": {"y": 1}}] * 2
    flags = ["--keys", "prompt=question", "chosen=good_answer", "rejected=bad_answer", "--drop", "system"]
    status, out, _ = run(tmp_path, capsys, write(tmp_path / "d.jsonl", *rows), *flags)
    assert status == 0 and out.splitlines() == [
        "d.jsonl: 2 pairs, the prompt as it stands", "keys left out: source (2)",
        "wrote out.jsonl: 2 records; to train on it:", "python train.py --loss dpo --data out.jsonl"]
    assert (tmp_path / "out.jsonl").read_text() == 2 * '{"prompt": "Q", "chosen": "a", "rejected": "b"}\n'
    assert trained_on(with_answer(x=1), drop=["x"]) == YES_NO  # at any depth
    for more, message in ((["nope"], "--drop, --keys: no record has the key nope"),
                          (["--keys", "nope=x"], "--keys nope=x: must be NAME=KEY, with a NAME of"),
                          (["--keys", "chosen=bad_answer"], "--keys: a name has two keys")):
        status, _, error = run(tmp_path, capsys, tmp_path / "d.jsonl", "--overwrite", *flags, *more)
        assert status == 2 and message in error

def test_keys_may_exchange_the_answers_but_replace_nothing():
    swap = convert.Converter([("chosen", "rejected"), ("rejected", "chosen")])
    assert swap.convert(pair()) == {"prompt": "Q", "chosen": "bad", "rejected": "good"}
    with pytest.raises(DataError, match='--keys chosen=better: there is a "chosen" already; --drop chosen'):
        convert.Converter([("chosen", "better")]).convert(pair(better="x"))

def test_earlier_answers_of_a_conversation_are_said_to_be_in_the_prompt():
    converter = convert.Converter()
    for form in ("conversations", "ShareGPT conversations"):
        converter.convert(RECORDS[form])
    assert [rule for _, rule in converter.forms] == [f"{convert.TURNS}, earlier answers in it", convert.TURNS]

def test_of_labelled_completions_the_true_ones_are_kept_where_the_flag_says_so(tmp_path, capsys):
    rows = [{"prompt": f"Q{i}", "completion": "a", "label": x} for i, x in enumerate([True, "false", 1, 0])]
    path = write(tmp_path / "d.jsonl", *rows)
    assert "(KTO)" in run(tmp_path, capsys, path)[2] and not (tmp_path / "out.jsonl").exists()
    _, out, _ = run(tmp_path, capsys, path, "--label", "label")
    assert 'dropped 2 with a false "label" (2, 4)' in out and out.endswith("--loss sft --data out.jsonl\n")
    assert [prompt for prompt, *_ in texts(tmp_path / "out.jsonl", alone=True)] == ["Q0", "Q2"]
    for record in (pair(x=True), RECORDS["completions"], RECORDS["completions"] | {"x": "maybe"}):
        with pytest.raises(DataError, match='--label x: needs one response and a "x", true or false'):
            convert.Converter(label="x").convert(record)

# ---------------------------------------------------------------------------------------------------------
# Files

ROWS = [pair(f"Q{i}", f"good\n{i}, é\u2028\x85“", f'bad "{i}"') for i in range(3)]
TEXTS = [tuple(record.values()) for record in ROWS]
JSONL = "".join(json.dumps(record) + "\n" for record in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()
BOM = b"\xef\xbb\xbf"

def csv_of(records, delimiter=","):
    rows = records[0], *map(dict.values, records)
    return "\r\n".join(delimiter.join('"' + x.replace('"', '""') + '"' for x in row) for row in rows).encode()

@pytest.mark.parametrize("name, content, flags", [
    ("a.jsonl", JSONL, []), ("a.json", ARRAY, []), ("A.JSON", BOM + ARRAY, []), ("no_ending", JSONL, []),
    ("a.jsonl.gz", gzip.compress(JSONL), []), ("a.json.bz2", bz2.compress(ARRAY), []),
    ("a.jsonl.xz", lzma.compress(JSONL), []), ("l.json", BOM + JSONL, []), ("a.jsonl", b" \n" + ARRAY, []),
    ("a.jsonl", BOM + JSONL.replace(b"\n", b"\r\n"), []), ("one.json", JSONL.splitlines()[0], []),
    ("a.csv", csv_of(ROWS), []), ("a.tsv", BOM + csv_of(ROWS, "\t"), []),
    ("a.csv.gz", gzip.compress(csv_of(ROWS)), []), ("a.csv", csv_of(ROWS, ";"), ["--delimiter", ";"])])
def test_the_same_pairs_come_from_every_container(tmp_path, capsys, name, content, flags):
    (tmp_path / name).write_bytes(content)
    assert run(tmp_path, capsys, tmp_path / name, *flags)[0] == 0
    assert texts(tmp_path / "out.jsonl") == TEXTS[:1 if name == "one.json" else 3]

def test_parquet_and_arrow_need_pyarrow_and_without_it_a_line_says_so(tmp_path, capsys, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([CHAT | {"source": "x"}])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        assert run(tmp_path, capsys, tmp_path / name, "--overwrite")[0] == 0
        assert texts(tmp_path / "out.jsonl") == [YES_NO]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    error = run(tmp_path, capsys, tmp_path / "bad.parquet", "--overwrite")[2]
    assert "bad.parquet: not a .parquet file" in error
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    error = run(tmp_path, capsys, tmp_path / "a.arrow", "--overwrite")[2]
    assert "needs pyarrow: pip install pyarrow" in error

@pytest.mark.parametrize("show", [json.dumps, repr])
@pytest.mark.parametrize("record, expected", [
    (pair(turns("Hi"), says("Yes, it's"), says("No")), (P, " Yes, it's", " No")),
    (RECORDS["rankings"], YES_NO), (RECORDS["two outputs"], YES_NO),
    (RECORDS["scored segments"], EXPECTED["scored segments"]), (RECORDS["conversations"], (AB, " Yes")),
    (pair(chosen='{"a": 1}', rejected="[1, 2]"), ("Q", '{"a": 1}', "[1, 2]")),  # an answer that is JSON
    (pair(chosen='["a", "b"]', rejected='[{"x": 1}]'), ("Q", '["a", "b"]', '[{"x": 1}]')),
])
def test_a_cell_is_parsed_only_where_a_form_wants_a_list(tmp_path, capsys, show, record, expected):
    row = {key: value if isinstance(value, str) else show(value) for key, value in record.items()}
    (tmp_path / "a.csv").write_bytes(csv_of([row, row]))
    assert run(tmp_path, capsys, tmp_path / "a.csv")[0] == 0
    assert texts(tmp_path / "out.jsonl", alone=len(expected) == 2) == [(*expected, "")[:3]] * 2
    if show is json.dumps and isinstance(record.get("prompt"), list):  # else the column stays text
        (tmp_path / "a.csv").write_bytes(csv_of([row, row | {"chosen": "[see below"}]))
        assert [r["chosen"] for _, r in records.read(tmp_path / "a.csv")][1] == "[see below"

@pytest.mark.parametrize("name, content, message", [
    ("a.csv", b"prompt;chosen\na;b\n", "one column, \"prompt;chosen\"; if that is several: --delimiter ';'"),
    ("a.csv", b"prompt,chosen,rejected,chosen\na,b,c,d\n", 'a.csv: the column "chosen" twice'),
    ("a.csv", b"prompt,chosen,rejected\na,b,c,d\n", "a.csv: row 1: more cells than the header"),
    ("a.csv", b"prompt,chosen,rejected\na,b\n", "a.csv: row 1: fewer cells than the header"),
    ("a.csv", b"prompt,chosen,rejected\n\xff,b,c\n", "a.csv: not a table in UTF-8"),
    ("a.json", b"{\n}", "a.json: one JSON value over several lines"), ("a.json", b"[1,", "a.json: not JSON"),
    ("a.json", b"[" * 100_000, "a.json: not JSON"), ("a.json", b"[1]", "a.json: item 1: a record must be"),
    ("a.jsonl", JSONL + b"\xff\n", "a.jsonl:4: not UTF-8"), ("a.jsonl", JSONL + b"{\n", ":4: not JSON"),
    ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', 'a.jsonl:1: not JSON (the key "prompt" twice)'),
    ("a.jsonl", b'{"prompt": "", "chosen": [{"text": "a", "scores": [NaN]}], "rejected": "b"}', "[nan]"),
    ("a.zip", b"PK", "a.zip: unpack it first"), ("a.jsonl", b"", "a.jsonl: no record is left"),
    ("a.jsonl", b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}", "a.jsonl:1: nested too deeply"),
    ("a.jsonl", JSONL + b'{"prompt": "a", "response": "b"}', "records with one answer and with two"),
])
def test_a_file_that_cannot_be_read_or_any_bad_record_is_named_and_nothing_is_written(
        tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    status, out, error = run(tmp_path, capsys, tmp_path / name)
    assert status == 2 and message in error and out == "" and len(error.splitlines()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == [name]

def test_of_a_folder_each_file_that_is_meant_is_named_and_errors_name_the_original_place(tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train.jsonl", "evaluation.jsonl"):
        (folder / name).write_bytes(LINES)
    status, _, error = run(tmp_path, capsys, folder)
    assert status == 2 and "name those that are meant: data/evaluation.jsonl data/train.jsonl" in error
    status, out, _ = run(tmp_path, capsys, folder / "train.jsonl", folder / "evaluation.jsonl")
    assert status == 0 and "wrote out.jsonl: 6 records" in out
    bad = write(folder / "bad.jsonl", pair(), *[pair(x=1)] * 3, *({f"key{i}": 1} for i in range(12)))
    lines = run(tmp_path, capsys, folder / "train.jsonl", bad, "--overwrite")[2].splitlines()
    assert lines[0].startswith("convert: data/bad.jsonl:2: per") and lines[0].endswith("(and 2 more like it)")
    assert lines[10:] == ["... and 3 more", "nothing is written, for 15 of 19 records are refused"]
    assert len(texts(tmp_path / "out.jsonl")) == 6  # as it was

@pytest.mark.parametrize("arguments, message", [
    (["a.jsonl", "--out", "a.jsonl"], "--out a.jsonl: is one of the files to convert"),
    (["a.jsonl", "--out", "b.csv"], "--out b.csv: must end in .jsonl"),
    (["a.jsonl", "--out", "old.jsonl"], "--out old.jsonl: exists; see --overwrite"),
    (["a.jsonl", "--out", "gone/b.jsonl"], "--out gone/b.jsonl: No such file"),
    (["gone.jsonl", "--out", "b.jsonl"], "gone.jsonl: No such file"),
    (["a.jsonl", "--out", "b.jsonl", "--delimiter", ";;"], "--delimiter: must be one character"),
    (["a.jsonl", "--out", "b.jsonl", "--nope"], "unrecognized arguments: --nope")])
def test_a_bad_flag_is_one_line_and_no_file_is_touched(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "old.jsonl"):
        Path(name).write_bytes(LINES)
    with pytest.raises(SystemExit) as e:
        sys.exit(convert.main(arguments))
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith(f"convert: {message}") and len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "old.jsonl"]
    assert Path("old.jsonl").read_bytes() == LINES

@pytest.mark.parametrize("form, key, loss", [
    ("questions", "question", "dpo"), ("scored segments", "prompt", "2d-dpo"), ("outputs", "prompt", "sft")])
def test_the_last_line_trains(tmp_path, capsys, monkeypatch, model_a, form, key, loss):  # noqa: F811
    path = write(tmp_path / "d.jsonl", *(RECORDS[form] | {key: f"Q{i}"} for i in range(6)))
    monkeypatch.chdir(tmp_path)
    assert convert.main([str(path), "--out", "o ut.jsonl"]) == 0
    python, script, *flags = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert [python, script, *flags[:2]] == ["python", "train.py", "--loss", loss]
    train.main([*flags, "--init", str(model_a), "--steps", "1", "--device", "cpu"])
    assert "5 are left to train on" in capsys.readouterr().out

# ---------------------------------------------------------------------------------------------------------
# HH's transcripts

def test_turns_are_messages_that_render_to_the_same_text_or_are_refused():
    for prompt, yes in ((P, " Yes"), (AB, "  Yes"), (SYSTEM_P, " Yes\n")):
        record = {"chosen": prompt + yes, "rejected": prompt + " No"}
        assert isinstance(convert.Converter(turns=True).convert(record)["prompt"], list)
        assert trained_on(record, turns=True) == trained_on(record)
    colons = P.replace(": ", ":")
    for prompt, yes in ((P, "Yes"), ("x" + P, " Yes"), (P, " Yes\n\nAssistant: B"), (colons, " Yes")):
        with pytest.raises(convert.Unclear, match="do not render to the same text"):
            convert.Converter(turns=True).convert({"chosen": prompt + yes, "rejected": prompt + " No"})

@real_data
@pytest.mark.slow
def test_the_official_transcripts_give_exactly_the_ids_of_their_text(tmp_path, capsys):
    """Prompt up to the last "\n\nAssistant:" that both share, then the response with its space."""
    official = gzip.open(SHARED / "hh" / "harmless-base-test.jsonl.gz", "rt", encoding="utf-8").readlines()
    lines = official[::10] + [official[i - 1] for i in (1255, 1689, 1953, 2037)]  # answers of several turns
    hh, tokenizer = write(tmp_path / "hh.jsonl", *map(str.rstrip, lines)), data.Tokenizer(SHARED / "gpt2-bpe")
    assert run(tmp_path, capsys, hh)[0] == 0
    assert run(tmp_path, capsys, hh, "--turns", "--drop_unclear", out="t.jsonl")[0] == 0
    plain, as_turns = (data.load([tmp_path / name], tokenizer, 1024)[0] for name in ("out.jsonl", "t.jsonl"))
    ids = set()
    for p in plain:
        record = json.loads(lines[int(p.where.rpartition(":")[2]) - 1])
        for side, other in (("chosen", "rejected"), ("rejected", "chosen")):
            prompt = tokenizer.decode(p.prompt)
            assert prompt + tokenizer.decode(getattr(p, side)[:-1]) == record[side]
            assert prompt.endswith("\n\nAssistant:") and record[other].startswith(prompt)
        ids.add(p.prompt.tobytes() + p.chosen.tobytes() + p.rejected.tobytes())
    assert len(plain) > 200 and len(plain) - len(as_turns) == 5
    assert all(p.prompt.tobytes() + p.chosen.tobytes() + p.rejected.tobytes() in ids for p in as_turns)
