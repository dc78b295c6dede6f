"""tools/doctor.py: every finding on pairs made to have it, the two other outputs, bad input.

Real data (../shared/data) are used where they are present; the test on them skips elsewhere.
"""

import base64
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import data
import train
from tools import doctor

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def pair(prompt="Q", chosen="good", rejected="bad", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def scored(*segments):
    return [{"text": text, "scores": scores} for text, *scores in segments]


@pytest.fixture
def diagnose(tmp_path, capsys):
    """Records -> (exit status, report, error line)."""
    def run(*records, options=()):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
        status = doctor.main([str(path), "--tokenizer", "bytes", *options])
        out = capsys.readouterr()
        return status, out.out.replace(str(path), "d.jsonl"), out.err.replace(str(path), "d.jsonl")
    return run


def line_of(report, text):
    """The one line of the report that holds a text."""
    lines = [line for line in report.splitlines() if text in line]
    assert len(lines) == 1, (text, lines)
    return lines[0]


def plain_distance(a, b):
    """Levenshtein's table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def test_edit_distance_is_levenshteins():
    rng = random.Random(0)
    assert doctor.edit_distance("kitten", "sitting") == 3 and doctor.edit_distance("", "ab") == 2
    for _ in range(500):
        a, b = ([rng.randrange(4) for _ in range(rng.randrange(90))] for _ in range(2))
        assert doctor.edit_distance(a, b) == plain_distance(a, b)


def test_one_pair_is_shown_with_its_scored_tokens_in_brackets_and_end_of_text(diagnose):
    _, report, _ = diagnose(pair("Hi\nthere", "a\n\u001b", "bé"))
    shown = report[report.index("One pair"):report.index("\nPairs:")].splitlines()
    assert [line.strip() for line in shown[1:]] == [
        "prompt: 8 tokens, read but not scored", "Hi", "there",
        "chosen: 4 tokens, all scored", "[a][\\n][\\x1b][<|endoftext|>]",
        "rejected: 4 tokens, all scored", "[b][\ufffd][\ufffd][<|endoftext|>]"]


def test_segments_are_shown_with_their_scores(diagnose):
    _, report, _ = diagnose(pair(chosen=scored(("ab", 1, 2.5), ("c", 3, 4)), rejected=scored(("d", 0, 0))))
    assert "      1 2.5  [a][b]\n" in report and "      3 4  [c][<|endoftext|>]\n" in report


def test_counts_of_everything_that_is_wrong_with_lines(diagnose):
    status, report, _ = diagnose(
        pair(),  # 1
        pair(),  # 2: again
        pair("Q", "bad", "good"),  # 3: contradicts 1
        pair(chosen=" \n"),  # 4: white space
        pair(rejected=""),  # 5: empty
        pair(chosen="bad"),  # 6: identical
        pair(chosen="x" * 50),  # 7: does not fit
        pair("0123456789" * 4),  # 8: loses its beginning
        pair("abcdefghij" + "0123456789" * 3),  # 9: loses another beginning, equals 8 after it
        pair("Q", "y", "long"),  # 10: one token
        pair("Say: ", "Say: yes", "Say: no"),  # 11: the prompt again
        pair("Q", "yes", "no<|endoftext|>"),  # 12: end-of-text, written out
        options=["--block_size", "30"])
    assert status == 0
    assert "Pairs: 8 of 12 can be used; they have 4 different prompts" in report
    for text, expected in {
        "dropped: an empty response": "2  dropped: an empty response: line 4, line 5",
        "dropped: identical": "1  dropped: identical responses: line 6",
        "does not fit": "1  dropped: a response that does not fit block_size 30: line 7",
        "loses its": "2  prompt loses its beginning (block_size 30), 15 tokens of it in the median: line 8, "
                     "line 9",
        "the same as an earlier pair:": "1  the same as an earlier pair: line 2",
        "once prompts are cut": "1  the same as an earlier pair once prompts are cut: line 9",
        "exchanged": "1  an earlier pair with chosen and rejected exchanged: line 3",
        "one token": "1  response of one token (before end-of-text): line 10",
        "repeat the prompt": "1  both responses repeat the prompt: is it meant to be scored?: line 11",
        "ends in the text": "1  response that ends in the text <|endoftext|>: it is added here, remove it: "
                            "line 12",
    }.items():
        assert line_of(report, text).strip() == expected


def test_long_texts_are_shortened_in_the_middle_and_at_the_front(diagnose):
    long = pair("front" + "p" * 500 + "end", "c" * 100, "r")
    _, report, _ = diagnose(long, options=["--block_size", "999"])
    shown = report[report.index("One pair"):report.index("\nPairs:")]
    assert "pppend\n" in shown and "front" not in shown and "its end:" in shown
    assert shown.count("[c]") == 60 + 4 and "[c] ... 36 more ... " in shown and "[<|endoftext|>]" in shown


def test_a_prompt_that_one_side_repeats_is_no_finding_and_three_places_of_one_are_named(diagnose):
    _, report, _ = diagnose(*[pair(chosen="")] * 3, pair("", "a", "b"), pair("Say", "Say: yes", "no"),
                            pair("Say", "yes", "Say: no"))
    assert line_of(report, "repeat the prompt").split()[0] == "0"
    assert line_of(report, "empty").endswith("an empty response: line 1, line 2, line 3")
    assert "line 1, line 2, line 3, ..." in line_of(diagnose(*[pair(chosen="")] * 4, pair())[1], "empty")


def test_length_bias_and_percentiles(diagnose):
    _, report, _ = diagnose(*(pair(f"Q{i}", "x" * (i + 2), "y") for i in range(10)), pair("Q", "a", "bb"))
    assert line_of(report, "  chosen  ").split() == ["chosen", "2", "3", "7", "11", "12"]
    assert line_of(report, "The longer response").endswith(
        "is the chosen one in 90.9 % of the pairs, the rejected one in 9.1 %, equal in 0.0 %.")
    assert "to prefer the longer one is right in 90.9 %" in line_of(report, "Length bias")
    _, report, _ = diagnose(pair("Q", "aa", "bb"), pair("R", "a", "bb"))
    assert line_of(report, "The longer response").endswith(
        "is the chosen one in 0.0 % of the pairs, the rejected one in 50.0 %, equal in 50.0 %.")
    assert "to prefer the shorter one is right in 100.0 %" in line_of(report, "Length bias")
    assert "Length bias" not in diagnose(pair(chosen="aa", rejected="b"), pair("R", "a", "bb"))[1]


def test_edit_distances_and_where_dpo_fails(diagnose):
    near = pair("R", "a" * 19 + "b", "a" * 19 + "c")  # 1 of 20 tokens
    _, report, _ = diagnose(pair(chosen="aaaa", rejected="bbbb"), near, near, near)
    assert line_of(report, "chosen to rejected").split()[-5:] == ["0.05", "0.05", "0.05", "0.72", "1.00"]
    assert "75.0 % below 0.1: DPO's likelihood failure lives here, see DPOP" in report
    assert line_of(diagnose(pair("Q", "a", "ab"))[1], "chosen to rejected").split()[-1] == "0.50"


def test_tokens_that_would_span_prompt_and_response(diagnose, tmp_path):
    tokens = [bytes([b]) for b in range(256)] + [b"ab"]
    lines = (base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens))
    (tmp_path / "v.tiktoken").write_bytes(b"".join(lines))
    records = pair("xa", "b", "c"), pair("xa", " b", " c")
    report = diagnose(*records, options=["--tokenizer", str(tmp_path / "v.tiktoken")])[1]
    assert line_of(report, "tokenised together:").startswith("        1  ") and "line 1" in report


def test_segments_coverage_and_scores(diagnose):
    _, report, _ = diagnose(pair("Q", scored(("a", 1, 5), ("b", 3, 5)), scored(("c", 0, 5))),
                            pair("R", scored(("a", 2, 5)), scored(("", 0, 5), ("d", 0, 5))),
                            pair("S", scored(("a", 2, 5)), scored(("d", 4, 5))))
    assert "S_w != S_l in 66.7 %" in report and "1 segments hold no token and are masked" in report
    assert line_of(report, "Coverage") == "  Coverage: 3 of 3 pairs are scored."
    assert line_of(report, "aspect 1, chosen").split()[3:] == ["1", "2.000", "3", "3"]
    assert line_of(report, "aspect 1, rejected").split()[3:] == ["0", "1.000", "4", "2"]
    assert "constant" in line_of(report, "aspect 2, chosen")
    partly = diagnose(pair("Q", scored(("a", 1)), scored(("c", 0))), pair())[1]
    assert "1 of 2 pairs are scored. A data set that is scored in part counts as unscored." in partly
    one, two = ((scored(("a", *scores)), scored(("b", *scores))) for scores in ((1,), (1, 2)))
    assert "training refuses: {1: 1, 2: 1}" in diagnose(pair("Q", *one), pair("R", *two))[1]
    assert "Segments: none" in diagnose(pair())[1]


def test_malformed_lines_are_listed_and_the_rest_is_still_examined(diagnose):
    status, report, _ = diagnose(pair(), *["{}\n"] * 12)
    assert status == 2 and "12 malformed records: training refuses to start until they are mended" in report
    assert "  d.jsonl:2: no form has the keys (none)" in report and "(and 11 more like it)\n" in report
    assert "d.jsonl:3:" not in report and "Pairs: 1 of 13 can be used" in report
    assert "To train" not in report


def test_a_file_without_one_usable_pair_is_no_crash(diagnose):
    status, report, _ = diagnose(pair(chosen=""), pair(chosen="x" * 300), options=["--plot", "never.png"])
    assert status == 0 and "Pairs: 0 of 2 can be used" in report and not Path("never.png").exists()
    assert "a response that does not fit block_size 256" in report and "To train" not in report


def test_keys_and_files_that_are_not_read_are_named(diagnose, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "e.jsonl").write_text(json.dumps(pair(input="unread")) + "\n")
    (tmp_path / "folder" / "info.json").write_text("{}")
    _, report, _ = diagnose(pair(source="unread", input="", note=None), options=[str(tmp_path / "folder")])
    assert "ignored keys: 'input' (1 times), 'source' (1 times)\n" in report
    assert "folder: not read, .json beside .jsonl files: info.json\n" in report


@pytest.mark.parametrize("loss, sides", [("dpo", {}), ("2d-dpo", {
    "chosen": scored(("a", 1), (" b", 2)), "rejected": scored(("c", 0))})])
def test_the_command_at_the_end_trains(diagnose, tmp_path, monkeypatch, loss, sides):
    monkeypatch.chdir(tmp_path)
    options = ["--block_size", "32"]
    *_, title, command = diagnose(*(pair(f"Q{i}") | sides for i in range(8)), options=options)[1].splitlines()
    python, script, *flags = shlex.split(command)
    assert title == "To train on this:" and [python, script] == ["python", "train.py"]
    assert flags[:2] == ["--loss", loss]
    train.main([*flags, "--steps", "1", "--sft_steps", "1"])
    assert (tmp_path / "out" / loss / "model.safetensors").exists()


def test_where_training_would_refuse_the_command_is_not_given_or_asks_for_what_is_missing(diagnose):
    assert diagnose(pair(), pair())[1].endswith("--block_size 256 --val_data HELD_OUT_PAIRS\n")
    assert diagnose(pair(), pair("R"))[1].endswith("--block_size 256\n")
    assert diagnose(pair(), pair(chosen="better"))[1].endswith("--block_size 256\n")  # one prompt
    widths = [pair(f"Q{n}", scored(("a", *[1] * n)), scored(("b", *[1] * n))) for n in (1, 2)]
    assert "To train" not in diagnose(*widths)[1]


@pytest.mark.parametrize("records, options, message", [
    (["hello\n", "world\n"], [], "d.jsonl:1: not JSON (Expecting value: line 1"),
    ([""], [], "d.jsonl: no records"),
    ([pair()], ["nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
    ([pair()], ["--tokenizer", "nowhere"], "tokenizer 'nowhere': is neither"),
    ([pair()], ["--plot", "nowhere/x.png"], "--plot nowhere/x.png: "),
    ([pair()], ["--plot", "x.unknown"], "--plot x.unknown: "),
    ([pair(), "{}"], ["--segment"], "d.jsonl:2: no form has the keys (none)"),
])
def test_bad_input_is_one_clear_line_and_exit_status_2(diagnose, records, options, message):
    status, _, error = diagnose(*records, options=options)
    assert status == 2 and error.startswith(f"doctor: {message}") and len(error.splitlines()) == 1


def test_a_bad_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        doctor.main(["file.jsonl", "--nope"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "doctor: unrecognized arguments: --nope\n"


def test_plot_draws_a_png(diagnose, tmp_path):
    _, report, _ = diagnose(pair(), pair("R", "longer", "x"), options=["--plot", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG") and "histograms:" in report


@pytest.mark.slow
def test_matplotlib_is_imported_for_the_plot_only(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(pair()))
    code = ("import sys; from tools import doctor; doctor.main(sys.argv[1:]); "
            "assert 'matplotlib' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "d.jsonl"), "--tokenizer", "bytes"], cwd=ROOT,
                   check=True, capture_output=True)


def test_segment_writes_the_segment_form_of_the_same_pairs_with_scores_left_to_fill_in(diagnose, tmp_path):
    transcript = "\n\nHuman: Hi\n\nAssistant:"
    records = [pair("Q", "One. Two!\nThree", "No"), pair("R", scored(("kept. as is.", 1)), scored(("x", 0))),
               pair("S", [{"text": "a. b."}, {"text": " c"}], "d"),
               {"chosen": transcript + " Yes. Sure.", "rejected": transcript + " No"}]
    status, out, error = diagnose(*records, options=["--segment"])
    assert status == 0 and "fill in" in error
    lines = [json.loads(line) for line in out.splitlines()]
    assert lines[0] == {"prompt": "Q", "chosen": scored(("One.",), (" Two!",), ("\nThree",)),
                        "rejected": scored(("No",))}  # "scores": []
    assert lines[1] == records[1]
    assert lines[2]["chosen"] == scored(("a. b.",), (" c",))
    assert lines[3]["prompt"] == transcript and lines[3]["chosen"] == scored((" Yes.",), (" Sure.",))

    (tmp_path / "s.jsonl").write_text(out)
    tokenizer = data.Tokenizer("bytes")
    before, after = (data.load([tmp_path / name], tokenizer, 100)[0] for name in ("d.jsonl", "s.jsonl"))
    assert before.ids.tolist() == after.ids.tolist()  # the segment form trains on the same tokens


@pytest.mark.slow
def test_it_runs_as_a_script_from_any_folder_and_survives_a_closed_pipe(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(pair(f"Q{i}")) + "\n" for i in range(5000)))
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), "d.jsonl", "--segment"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline().startswith(b'{"prompt": "Q0"')
    run.stdout.close()
    assert b"Traceback" not in run.stderr.read()
    run.stderr.close()
    run.wait()


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("name, used, merged, close, median", [
    ("hh/harmless-base-test.jsonl.gz", "2308 of 2312", "0  ", "0.0 %", ["96", "29", "38"]),
    ("instructions/instruction-data-with-preference.json", "1094 of 1100", "0 ", "9.7 %", "19 14 14".split()),
    ("math/pairs.jsonl", "1500 of 1500", "0  ", "0.0 %", ["62", "108", "98"]),
    ("fine-grained/pairs_2d.jsonl", "481 of 481", "31  ", "0.4 %", ["16", "68", "87"]),
])
def test_the_real_files(capsys, name, used, merged, close, median):
    options = ["--tokenizer", str(SHARED / "gpt2-bpe"), "--block_size", "1024"]
    assert doctor.main([str(SHARED / name), *options]) == 0
    report = capsys.readouterr().out
    assert f"Pairs: {used} can be used" in report and f"{close} below 0.1" in report
    assert line_of(report, "if tokenised together").strip().startswith(merged)
    table = report[report.index("Length in tokens"):].splitlines()[1:4]
    assert [line.split()[3] for line in table] == median
