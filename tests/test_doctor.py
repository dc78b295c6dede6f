"""tools/doctor.py: every finding on pairs made to have it, segments, bad input."""

import json
import random
import shlex
import sys
from types import SimpleNamespace

import pytest
from test_pairs import BYTES, pair, scored, write
from test_train import model_a  # noqa: F401

import data
import train
from tools import doctor

@pytest.fixture
def diagnose(tmp_path, capsys):
    """Records -> (exit status, report, error line)."""
    def run(*records, options=()):
        path = write(tmp_path / "d.jsonl", *records)
        status = doctor.main([str(path), "--tokenizer", "bytes", *options])
        out = capsys.readouterr()
        return status, out.out.replace(str(path), "d.jsonl"), out.err.replace(str(path), "d.jsonl")
    return run

def line_of(report, text):
    """The one line of the report that holds a text."""
    [line] = [line for line in report.splitlines() if text in line]
    return line.strip()

def test_edit_distance_is_levenshteins():
    def table(a, b):
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            last, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
        return row[-1]

    rng = random.Random(0)
    assert doctor.edit_distance("kitten", "sitting") == 3 and doctor.edit_distance("", "ab") == 2
    for _ in range(200):
        a, b = ([rng.randrange(4) for _ in range(rng.randrange(70))] for _ in range(2))
        assert doctor.edit_distance(a, b) == table(a, b)

def test_one_pair_is_shown_with_its_scored_tokens_in_brackets_and_long_texts_are_shortened(diagnose):
    report = diagnose(pair("Hi\nthere", scored(("a\n\u001b", 1, 2.5), ("", 3, 4)), scored(("bé", 0, 0))))[1]
    shown = report[report.index("One pair"):report.index("\nPairs:")].splitlines()
    assert [line.strip() for line in shown[1:]] == [
        "prompt: 8 tokens, read but not scored", "Hi", "there",
        "chosen: 4 tokens, all scored", "1 2.5  [a][\\n][\\x1b]", "3 4  [<|endoftext|>]",
        "rejected: 4 tokens, all scored", "0 0  [b][\ufffd][\ufffd][<|endoftext|>]"]
    report = diagnose(pair("front" + "p" * 500 + "end", "c" * 100, "r"), options=["--block_size", "999"])[1]
    shown = report[report.index("One pair"):report.index("\nPairs:")]
    assert "pppend\n" in shown and "front" not in shown and "its end:" in shown
    assert shown.count("[c]") == 60 + 4 and "[c] ... 36 more ... " in shown and "[<|endoftext|>]" in shown

def test_counts_of_everything_that_is_wrong_with_lines(diagnose):
    status, report, _ = diagnose(
        pair(), pair(), pair("Q", "bad", "good"), pair(chosen=" \n"), pair(rejected=""), pair(chosen="bad"),
        pair(chosen="x" * 50), pair("0123456789" * 4, id="seven"), pair("Q", "y", "long"),
        pair("Say: ", "Say: yes", "Say: no"), pair("Say", "Say: a", "no"), pair("Q", "a", "no<|endoftext|>"),
        options=["--block_size", "30"])
    assert status == 0
    assert "Pairs: 8 of 12 can be used; they have 4 different prompts; block_size 30" in report
    for line in ("2  dropped: an empty response (4, 5)", "1  dropped: identical responses (6)",
                 "1  dropped: a response that does not fit block_size 30 (7)",
                 "1  the same as an earlier pair (2)", "1  prompt loses its beginning (8 (id 'seven'))",
                 "1  an earlier pair, chosen and rejected exchanged (3)",
                 "2  response of one token (before end-of-text) (9, 12)",
                 "1  both responses repeat the prompt: is it meant to be scored? (10)",
                 "1  response that ends in the text <|endoftext|>: it is added here, remove it (12)"):
        assert line_of(report, line[3:]) == line
    assert "an empty response (1, 2, 3, ...)" in diagnose(*[pair(chosen="")] * 4, pair())[1]

def test_lengths_their_bias_and_edit_distances(diagnose):
    _, report, _ = diagnose(*(pair(f"Q{i}", "x" * (i + 2), "y") for i in range(10)), pair("Q", "a", "bb"))
    assert line_of(report, "  chosen  ").split() == ["chosen", "2", "3", "7", "11", "12"]
    assert line_of(report, "The longer response").endswith(
        "is the chosen one in 90.9 % of the pairs, the rejected one in 9.1 %, equal in 0.0 %.")
    assert "to prefer the longer one is right in 90.9 %" in line_of(report, "Length bias")
    _, report, _ = diagnose(pair("Q", "aa", "bb"), pair("R", "a", "bb"))
    assert line_of(report, "The longer response").endswith("one in 50.0 %, equal in 50.0 %.")
    assert "to prefer the shorter one is right in 100.0 %" in line_of(report, "Length bias")
    near = pair("R", "a" * 19 + "b", "a" * 19 + "c")  # 1 of 20 tokens
    _, report, _ = diagnose(pair(chosen="aaaa", rejected="bbbb"), near, near, near)
    assert "Length bias" not in report
    assert line_of(report, "chosen to rejected").split()[-5:] == ["0.05", "0.05", "0.05", "0.72", "1.00"]
    assert "75.0 % below 0.1: DPO's likelihood failure lives here, see DPOP" in report
    assert line_of(diagnose(pair("Q", "a", "ab"))[1], "chosen to rejected").split()[-1] == "0.50"

def test_malformed_lines_are_listed_and_the_rest_is_still_examined(diagnose):
    status, report, _ = diagnose(pair(), *["{}"] * 12)
    assert status == 2 and "12 malformed records: training refuses to start until they are right" in report
    assert '  d.jsonl:2: no "prompt"' in report and "(and 11 more like it)\n" in report
    assert "Pairs: 1 of 13 can be used" in report and "To train" not in report
    status, report, _ = diagnose(pair(chosen=""), pair(chosen="x" * 300))
    assert status == 0 and "Pairs: 0 of 2 can be used" in report and "To train" not in report

@pytest.mark.parametrize("loss, sides", [("dpo", {}), ("2d-dpo", {
    "chosen": scored(("a", 1), (" b", 2)), "rejected": scored(("c", 0))})])
def test_the_last_line_trains(diagnose, monkeypatch, tmp_path, model_a, loss, sides):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    report = diagnose(*(pair(f"Q{i}") | sides for i in range(8)), options=["--block_size", "32"])[1]
    assert f"Segments: 1 to {1 + bool(sides)} a response; {8 * bool(sides)} of 8 pairs have scores" in report
    python, script, *flags = shlex.split(report.splitlines()[-1])
    assert [python, script, *flags[:2]] == ["python", "train.py", "--loss", loss]
    train.main([*flags, "--init", str(model_a), "--steps", "1", "--device", "cpu"])

@pytest.mark.parametrize("records, options, message", [
    ([pair()], ["nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
    ([pair()], [__file__], f"{__file__}: not the format that is read, .jsonl; convert it: python"),
    ([pair()], ["nowhere.jsonl", "--tokenizer", "gone"], "nowhere.jsonl: No such file or directory"),
    ([pair()], ["--tokenizer", "nowhere"], "tokenizer 'nowhere': is neither"),
    ([pair(), "{}"], ["--segment"], 'd.jsonl:2: no "prompt"'),
    ([pair()], ["--block_size", "1"], "--block_size 1: must be at least 2 and below 2^63"),
    ([pair()], ["--segmen"], "unrecognized arguments: --segmen"),
    ([pair()], ["--nope"], "unrecognized arguments: --nope")])
def test_bad_input_is_one_clear_line_and_exit_status_2(tmp_path, capsys, records, options, message):
    path = write(tmp_path / "d.jsonl", *records)
    with pytest.raises(SystemExit) as stop:
        sys.exit(doctor.main([str(path), "--tokenizer", "bytes", *options]))
    error = capsys.readouterr().err.replace(str(path), "d.jsonl")
    assert stop.value.code == 2 and error.startswith(f"doctor: {message}") and len(error.splitlines()) == 1

def test_segment_writes_the_same_pairs_in_segments_with_scores_left_to_fill_in(diagnose, tmp_path):
    records = [pair("Q", "One. Two!\nThree", "No"),
               {"id": "a 7"} | pair("R", scored(("kept. as is.", 1)), scored(("x", 0))),
               pair([{"role": "user", "content": "Hi"}], [{"text": "a. b."}, {"text": " c"}], "d")]
    status, out, error = diagnose(*records, options=["--segment"])
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and "fill in" in error and lines[1] == records[1]
    assert lines[0] == pair("Q", scored(("One.",), (" Two!",), ("\nThree",)), scored(("No",)))  # "scores": []
    assert lines[2] == pair(records[2]["prompt"], scored(("a. b.",), (" c",)), scored(("d",)))
    write(tmp_path / "s.jsonl", out)
    before, after = (data.load([tmp_path / name], BYTES, 100)[0] for name in ("d.jsonl", "s.jsonl"))
    for old, new in zip(before, after, strict=True):  # it trains on the same tokens
        assert [x.tolist() for x in (old.prompt, old.chosen, old.rejected)] \
            == [x.tolist() for x in (new.prompt, new.chosen, new.rejected)]

def test_a_closed_pipe_ends_it_quietly(tmp_path, monkeypatch):
    def closed(*text):
        raise BrokenPipeError

    path = write(tmp_path / "d.jsonl", pair())
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=closed, fileno=lambda: 1))
    monkeypatch.setattr("os.dup2", lambda *files: None)
    assert doctor.main([str(path), "--segment"]) == 0

@pytest.mark.parametrize("parts", [
    ["One.", " Two!", " Three?", " Four"], ["Really?!", " No way!!!", " Fine"], [], ["No end"], [" \n "],
    ["It costs 3.5 dollars, v1.2.3, at example.com.", " Yes."],
    ["Well... maybe.", " So…", " Then… go on."], ["Wait...", " What?"],
    ['"Yes!" he said.', ' "No."', " (She left.)", " Gone."], ["**Bold.**", " _Slanted!_", " Plain"],
    ["Dr. Smith met J. R. Doe, Mr. X and Prof. Y cf. Mrs. Z in vain.", " Then"],
    ["In the U.S. it is 5 p.m. now, i.e. late, etc. and so on.", " So do I.", " Good"],
    ["a line", "\nanother", "\n\nand a third\n"], ["  Leading.", "  Trailing.  "],
    ["Steps:", "\n1. First.", " Still first.", "\n2. Second", "\n  - a bullet", "\n* another"],
    ["1. First", "\r\n2. Second"], ["all lower case.", " one more?", " yes!", " plan (B).", " ok"],
    ["你好。", "好吗？", "好！", " 好…", " Good"], ["「好。」", "他说"],
    ["Code:", "\n```py\nx = 1. \n\ny = 2.\n```", "\nDone.", " Yes"], ["~~~\na. b. c\n~~~", "\nb. C", "\nd"],
    ["Use `a. b` and ```c. D``` here.", " Ok"], ["```\nnever. Closed.\n\n"]])
def test_segments_are_sentences_lines_list_items_and_whole_fences(parts):
    assert doctor.split_segments("".join(parts)) == parts

@pytest.mark.parametrize("unit", ["a", ".", ". ", "`", "1. ", ".)", "~~~\n", '."'])
def test_splitting_is_linear_in_the_text_and_the_parts_join_to_it(unit):
    """A quadratic scan would need minutes here."""
    assert "".join(doctor.split_segments(unit * 50_000 + "x")) == unit * 50_000 + "x"
