"""data.py: grids written out by hand, the forms of preference data, what is dropped, refused and kept.

Real data (../shared/data) are used where they are present; the tests on them skip elsewhere.
"""

import base64
import gzip
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from data import DataError, Pair, Tokenizer, collate, load, split_segments

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
BYTES = Tokenizer("bytes")
EOT = 256


# ---------------------------------------------------------------------------------------------------------
# Helpers


def make_pair(prompt, chosen, rejected, chosen_segment=None, rejected_segment=None, chosen_scores=None,
              rejected_scores=None):
    """A Pair from lists; one unscored segment a side unless given."""
    def ints(x, default):
        return np.array(default if x is None else x, dtype=np.int32)

    def scores(x):
        return np.zeros((1, 0), dtype=np.float32) if x is None else np.array(x, dtype=np.float32)

    return Pair(ints(prompt, None), ints(chosen, None), ints(rejected, None),
                ints(chosen_segment, [0] * len(chosen)), ints(rejected_segment, [0] * len(rejected)),
                scores(chosen_scores), scores(rejected_scores))


def write(path, *records):
    """Records, or lines of text as they stand, as a .jsonl file."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def pair(prompt="Q", chosen="good", rejected="bad", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def texts(pairs, tokenizer=BYTES):
    """(prompt, chosen, rejected) of each pair, decoded; both responses must end in end-of-text."""
    out = []
    for p in pairs:
        assert p.chosen[-1] == p.rejected[-1] == tokenizer.eot
        out.append(tuple(tokenizer.decode(x) for x in (p.prompt, p.chosen[:-1], p.rejected[:-1])))
    return out


def load_one(tmp_path, record, block_size=1000):
    """The texts of the one pair that a record becomes."""
    pairs, _ = load([write(tmp_path / "one.jsonl", record)], BYTES, block_size)
    assert len(pairs) == 1
    return texts(pairs)[0]


def error_of(*records, tmp_path):
    with pytest.raises(DataError) as e:
        load([write(tmp_path / "bad.jsonl", *records)], BYTES, 100)
    return str(e.value).replace(str(tmp_path), "")


def tiktoken_file(path, *words):
    """A .tiktoken file: the 256 bytes, then words."""
    tokens = [bytes([b]) for b in range(256)] + [word.encode() for word in words]
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


def scored(*segments):
    return [{"text": text, "scores": scores} for text, *scores in segments]


# ---------------------------------------------------------------------------------------------------------
# collate

TWO_PAIRS = [
    make_pair([1, 2, 3], [4, 5, 0], [6, 0], [0, 0, 1], [0, 0], [[2, 8], [4, 6]], [[1, 3]]),
    make_pair([1], [7, 0], [8, 9, 0], [0, 0], [1, 1, 1], [[5, 5]], [[9, 9], [7, 7]]),  # rejected: 0 is empty
]


def test_a_pair_is_one_row_prompt_chosen_rejected_and_both_responses_continue_the_prompt():
    batch = collate(TWO_PAIRS)
    assert batch.tokens.tolist() == [
        [1, 2, 3, 4, 5, 0, 6, 0],  # prompt 1 2 3, chosen 4 5 eot, rejected 6 eot
        [1, 7, 0, 8, 9, 0, 0, 0],  # prompt 1, chosen 7 eot, rejected 8 9 eot, two columns of padding
    ]
    assert batch.positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 3, 4],  # the rejected response starts where the chosen one does: after the prompt
        [0, 1, 2, 1, 2, 3, 0, 0],
    ]
    assert batch.branch.tolist() == [
        [0, 0, 0, 1, 1, 1, 2, 2],
        [0, 1, 1, 2, 2, 2, 3, 3],
    ]
    assert len(batch) == 2


def test_a_token_sees_the_prompt_and_its_own_branch_up_to_itself():
    mask = collate(TWO_PAIRS).mask()
    assert mask.shape == (2, 1, 8, 8)
    grids = ["\n".join("".join(".x"[x] for x in row) for row in grid) for grid in mask[:, 0].tolist()]
    assert grids[0].split() == [
        # pppcccrr
        "x.......",  # prompt
        "xx......",
        "xxx.....",
        "xxxx....",  # chosen: prompt and chosen
        "xxxxx...",
        "xxxxxx..",
        "xxx...x.",  # rejected: prompt and rejected, nothing of chosen
        "xxx...xx",
    ]
    assert grids[1].split() == [
        # pccrrr__
        "x.......",  # prompt
        "xx......",  # chosen
        "xxx.....",
        "x..x....",  # rejected
        "x..xx...",
        "x..xxx..",
        "x.....x.",  # padding sees something (no NaN), and no response sees padding
        "x.....xx",
    ]


def test_the_column_before_predicts_a_token_and_the_last_prompt_token_predicts_both_first_tokens():
    batch = collate(TWO_PAIRS)
    assert batch.source.tolist() == [  # chosen 0, rejected 0, chosen 1, rejected 1
        [0, 0, 0] + [0, 0] + [1, 1] + [1, 1, 1],  # rows
        [2, 3, 4] + [2, 6] + [0, 1] + [0, 3, 4],  # columns
    ]
    assert batch.target.tolist() == [4, 5, 0, 6, 0, 7, 0, 8, 9, 0]
    assert batch.response.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert batch.segment.tolist() == [0, 0, 1, 2, 2, 4, 4, 7, 7, 7]  # response * 2 + segment
    assert batch.starts == [0, 5, 10]


def test_scores_stand_by_pair_side_and_segment_and_a_segment_without_a_token_is_masked():
    batch = collate(TWO_PAIRS)
    assert batch.scores.tolist() == [
        [[[2, 8], [4, 6]], [[1, 3], [0, 0]]],  # pair 0: two chosen segments, one rejected
        [[[5, 5], [0, 0]], [[9, 9], [7, 7]]],
    ]
    assert batch.segment_mask.tolist() == [
        [[True, True], [True, False]],
        [[True, False], [False, True]],  # the rejected response's first segment owns no token
    ]


def test_rows_are_padded_to_a_multiple_and_nothing_else_changes():
    plain, padded = collate(TWO_PAIRS), collate(TWO_PAIRS, multiple=5)
    assert plain.tokens.shape == (2, 8) and padded.tokens.shape == (2, 10)
    assert torch.equal(padded.tokens[:, :8], plain.tokens) and padded.branch[:, 8:].eq(data.PADDING).all()
    for name in ("source", "target", "response", "segment", "scores", "segment_mask"):
        assert torch.equal(getattr(padded, name), getattr(plain, name)), name


def test_chosen_only_is_a_row_of_prompt_and_chosen():
    pairs = data.pack(TWO_PAIRS).chosen_only()
    batch = collate([pairs[i] for i in range(2)])
    assert pairs.lengths.tolist() == [6, 3] and pairs[0].where == TWO_PAIRS[0].where
    assert pairs[0].rejected_scores.shape == (0, pairs.n_aspects)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 0], [1, 7, 0, 0, 0, 0]]
    assert batch.branch.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 3, 3, 3]]
    assert batch.source.tolist() == [[0, 0, 0, 1, 1], [2, 3, 4, 0, 1]]
    assert batch.target.tolist() == [4, 5, 0, 7, 0]
    assert batch.response.tolist() == [0, 0, 0, 2, 2]
    assert batch.starts == [0, 3, 5]


def test_chunks_are_whole_pairs_in_order_with_at_most_that_many_tokens_or_one_pair():
    pairs = [make_pair([1], [2] * c, [3] * r) for c, r in ((3, 2), (1, 2), (6, 6), (1, 1), (1, 1))]
    batch = collate(pairs)  # response tokens per pair: 5 3 12 2 2
    assert list(batch.chunks(1)) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert list(batch.chunks(7)) == [(0, 1), (1, 2), (2, 3), (3, 5)]
    assert list(batch.chunks(8)) == [(0, 2), (2, 3), (3, 5)]
    assert list(batch.chunks(10**9)) == [(0, 5)]


def test_moving_a_batch_keeps_every_tensor():
    batch = collate(TWO_PAIRS)
    moved = batch.to("cpu")
    assert all(torch.equal(getattr(moved, name), value) if name != "starts" else moved.starts == value
               for name, value in vars(batch).items())


# ---------------------------------------------------------------------------------------------------------
# Token -> segment, what is cut and what is not


def encode(chosen, rejected="x", prompt="Q", block_size=1000, tokenizer=BYTES):
    sides = (data.parse_response(side, "chosen") for side in (chosen, rejected))
    return data.encode_pair(tokenizer, prompt, *sides, block_size)


def test_a_token_belongs_to_the_segment_of_its_last_byte_and_end_of_text_to_the_last_segment(tmp_path):
    tokenizer = Tokenizer(tiktoken_file(tmp_path / "v.tiktoken", "bc"))  # "bc" is token 256, end-of-text 257
    p = encode([{"text": "ab"}, {"text": "cd"}], tokenizer=tokenizer)
    assert p.chosen.tolist() == [ord("a"), 256, ord("d"), 257]
    assert p.chosen_segment.tolist() == [0, 1, 1, 1]  # "bc" begins in segment 0 and ends in segment 1


def test_a_response_is_tokenised_whole_and_not_segment_by_segment(tmp_path):
    tokenizer = Tokenizer(tiktoken_file(tmp_path / "v.tiktoken", "bc"))
    assert encode([{"text": "ab"}, {"text": "cd"}], tokenizer=tokenizer).chosen.tolist() \
        == encode("abcd", tokenizer=tokenizer).chosen.tolist()


def test_segments_are_counted_in_bytes_not_in_characters():
    p = encode([{"text": "é"}, {"text": "ü!"}, {"text": "日"}])
    #                                  é     ü     !  日          eot
    assert p.chosen_segment.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_an_empty_segment_owns_no_token_and_is_masked_but_the_last_one_owns_end_of_text():
    p = encode(scored(("a", 1), ("", 2), ("b", 3), ("", 4)), scored(("x", 1)))
    assert p.chosen_segment.tolist() == [0, 2, 3]
    assert collate([p]).segment_mask[0, 0].tolist() == [True, False, True, True]


def test_flat_storage_returns_every_pair_as_it_was():
    """What goes into Pairs comes out again: ids, segments (empty ones too) and scores."""
    some = [encode(scored(("a", 1, 2), ("", 3, 4), ("bc", 5, 6)), scored(("x", 7, 8))),
            make_pair([1], [2, 0], [3, 0], chosen_scores=[[1, 2], [3, 4]], rejected_scores=[[5, 6]]),
            encode(scored(("é", 1, 1)), scored(("x", 0, 0), ("yz", 9, 9)), prompt="longer")]
    some = [replace(p, where=f"d.jsonl:{i}") for i, p in enumerate(some)]
    packed = data.pack(some)
    assert packed.lengths.tolist() == [len(p) for p in some] and packed.n_aspects == 2
    assert packed.select(np.array([2, 0])).where == ["d.jsonl:2", "d.jsonl:0"]
    for selected in (packed, packed.select(np.array([1, 2, 0])).select(np.array([2, 0, 1]))):
        for before, after in zip(some, selected, strict=True):
            for name, value in vars(before).items():
                assert np.array_equal(value, getattr(after, name)), name


def test_a_prompt_loses_its_front_and_a_response_never_anything():
    p = encode("12345", "123", prompt="abcdefgh", block_size=10)
    assert BYTES.decode(p.prompt) == "efgh" and p.cut == 4  # 10 - max(5 + 1, 3 + 1) = 4 tokens are left
    assert BYTES.decode(p.chosen) == "12345<|endoftext|>" and BYTES.decode(p.rejected) == "123<|endoftext|>"
    assert collate([p]).positions.max() == 9  # the last of a block of 10, though the row has 14 columns


def test_a_response_that_leaves_no_room_for_a_prompt_token_is_dropped():
    assert len(encode("x" * 8, block_size=10).prompt) == 1
    for chosen, rejected in (("x" * 9, "y"), ("y", "x" * 9)):
        with pytest.raises(data.UnusablePair, match="does not fit block_size 10"):
            encode(chosen, rejected, block_size=10)


def test_an_empty_prompt_becomes_one_unscored_end_of_text():
    p = encode("a", prompt="")
    assert p.prompt.tolist() == [EOT] and collate([p]).target.tolist() == [ord("a"), EOT, ord("x"), EOT]


# ---------------------------------------------------------------------------------------------------------
# Forms

P = "\n\nHuman: Hi\n\nAssistant:"  # a prompt as HH-RLHF writes it


def test_explicit_pairs_are_taken_as_they_stand(tmp_path):
    assert load_one(tmp_path, pair(" Q\n", "  A", "B ")) == (" Q\n", "  A", "B ")


def test_segments_join_to_the_response(tmp_path):
    record = pair(chosen=scored(("One.", 1, 2), (" Two.", 3, 4)), rejected=scored(("No", 0, 0)))
    assert load_one(tmp_path, record) == ("Q", "One. Two.", "No")
    pairs, notes = load([tmp_path / "one.jsonl"], BYTES, 100)
    assert pairs[0].chosen_scores.tolist() == [[1, 2], [3, 4]] and "scored segments" in notes[0]


@pytest.mark.parametrize("prompt, chosen, rejected", [
    (P, " Yes", " No"),
    (P + " A\n\nHuman: B\n\nAssistant:", " Yes", " No"),  # several turns: all but the last are the prompt
    (P, " Yes\n\nHuman: B\n\nAssistant: C", " No"),  # the chosen transcript goes on for another turn
    (P, " No", " Yes\n\nHuman: B\n\nAssistant: C"),  # the rejected one does
    (P, " Same start, yes", " Same start, no"),  # a shared beginning of the responses is not the prompt
    (P, " Yes", " Yes and more"),  # one response is the beginning of the other
    (P, " Yes\n\nHuman: B\n\nAssistant: C", " Yes\n\nHuman: D\n\nAssistant: E"),
])
def test_the_prompt_of_a_transcript_is_the_common_prefix_up_to_its_last_assistant_turn(
        tmp_path, prompt, chosen, rejected):
    record = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    assert load_one(tmp_path, record) == (prompt, chosen, rejected)


def test_a_null_prompt_is_no_prompt(tmp_path):
    assert load_one(tmp_path, pair(None, P + " Yes", P + " No")) == (P, " Yes", " No")


def turns(*texts, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


SYSTEM = [{"role": "system", "content": "Be kind"}]
SYSTEM_P = "\n\nSystem: Be kind" + P


@pytest.mark.parametrize("record, expected", [
    # explicit prompt
    (pair(turns("Hi"), turns("Yes", first="assistant"), turns("No", first="assistant")), (P, " Yes", " No")),
    # implicit prompt: the messages that both sides share
    ({"chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "No")}, (P, " Yes", " No")),
    # the prompt stands in both sides again, as messages or as a string
    (pair(turns("Hi"), turns("Hi", "Yes"), turns("Hi", "No")), (P, " Yes", " No")),
    (pair("Hi", turns("Hi", "Yes"), turns("Hi", "No")), (P, " Yes", " No")),
    # the prompt as a string, before a system turn that only the sides hold
    (pair("Hi", SYSTEM + turns("Hi", "Yes"), SYSTEM + turns("Hi", "No")), (SYSTEM_P, " Yes", " No")),
    # a prompt that both sides continue
    (pair(SYSTEM, turns("Hi", "Yes"), turns("Hi", "No")), (SYSTEM_P, " Yes", " No")),
    # the prompt as messages, the responses as strings
    (pair(turns("Hi"), "Yes", "No"), (P, " Yes", " No")),
    # system turn
    ({"chosen": SYSTEM + turns("Hi", "Yes"), "rejected": SYSTEM + turns("Hi", "No")},
     (SYSTEM_P, " Yes", " No")),
    # several turns in the prompt
    ({"chosen": turns("Hi", "A", "B", "Yes"), "rejected": turns("Hi", "A", "B", "No")},
     (P + " A\n\nHuman: B\n\nAssistant:", " Yes", " No")),
    # responses of several turns; an explicit prompt is where the response starts, even if more is shared
    (pair(turns("Hi"), turns("A", "B", "Yes", first="assistant"), turns("A", "B", "No", first="assistant")),
     (P, " A\n\nHuman: B\n\nAssistant: Yes", " A\n\nHuman: B\n\nAssistant: No")),
    (pair("Hi", turns("Hi", "A", "B", "Yes"), turns("Hi", "A", "B", "No")),
     (P, " A\n\nHuman: B\n\nAssistant: Yes", " A\n\nHuman: B\n\nAssistant: No")),
    # conversations that part at the first answer
    ({"chosen": turns("Hi", "Yes", "B", "C"), "rejected": turns("Hi", "No")},
     (P, " Yes\n\nHuman: B\n\nAssistant: C", " No")),
    # one conversation is the beginning of the other
    ({"chosen": turns("Hi", "Yes"), "rejected": turns("Hi", "Yes", "B", "C")},
     (P, " Yes", " Yes\n\nHuman: B\n\nAssistant: C")),
])
def test_chat_messages_are_rendered_in_the_form_of_hh(tmp_path, record, expected):
    assert load_one(tmp_path, record) == expected


def test_instructions_are_rendered_in_the_form_of_hh(tmp_path):
    record = {"instruction": "Do it.", "input": "2 + 2", "output": "4", "chosen": "Four.", "rejected": "4!"}
    assert load_one(tmp_path, record) == ("\n\nHuman: Do it.\n2 + 2\n\nAssistant:", " Four.", " 4!")
    assert load_one(tmp_path, record | {"input": ""})[0] == "\n\nHuman: Do it.\n\nAssistant:"
    assert load_one(tmp_path, record | {"prompt": "Q"}) == ("Q", "Four.", "4!")  # a prompt stands as it is


def test_the_same_pairs_read_alike_from_jsonl_gzip_json_and_a_folder(tmp_path):
    records = [pair(f"Q{i}", f"good {i}", f"bad {i}") for i in range(5)]
    plain = write(tmp_path / "a.jsonl", *records)
    packed, array, folder = tmp_path / "a.jsonl.gz", tmp_path / "a.json", tmp_path / "folder"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    array.write_text(json.dumps(records, indent=1))
    (folder / "data").mkdir(parents=True)
    shutil.copy(packed, folder / "data")
    (folder / "dataset_infos.json").write_text("{}")  # beside .jsonl files, a .json file is no data
    expected = [(f"Q{i}", f"good {i}", f"bad {i}") for i in range(5)]
    for path in (plain, packed, array, folder):
        assert texts(load([path], BYTES, 100)[0]) == expected
    (folder / "data" / "a.jsonl.gz").rename(tmp_path / "moved.jsonl.gz")
    with pytest.raises(DataError, match="must hold an array"):
        load([folder], BYTES, 100)
    (folder / "dataset_infos.json").unlink()
    with pytest.raises(DataError, match="a folder without"):
        load([folder], BYTES, 100)


def test_several_files_mix_in_their_order(tmp_path):
    files = [write(tmp_path / f"{i}.jsonl", pair(f"Q{i}")) for i in (2, 1)]
    pairs, notes = load(files, BYTES, 100)
    assert [p for p, _, _ in texts(pairs)] == ["Q2", "Q1"] and len(notes) == 2
    assert pairs.where == [f"{f}:1" for f in files]


# ---------------------------------------------------------------------------------------------------------
# What is dropped, what is refused


def test_unusable_pairs_are_dropped_and_counted_by_reason_with_their_lines(tmp_path):
    path = write(tmp_path / "d.jsonl", pair(), pair(chosen=" \n"), pair(rejected=" "), "", pair(chosen="bad"),
                 pair(chosen="x" * 99), pair(chosen="\u00a0"), pair(chosen="\t"))
    pairs, notes = load([path], BYTES, 50)
    assert pairs.where == [f"{path}:1"]
    assert notes == [f"{path}: pairs (prompt as it stands): 1 pairs, 6 dropped: "
                     "4 with an empty response (2, 3, 7, ...); 1 with identical responses (5); "
                     "1 with a response that does not fit block_size 50 (6)"]


def test_cut_prompts_are_counted(tmp_path):
    _, notes = load([write(tmp_path / "d.jsonl", pair("Q" * 60), pair())], BYTES, 50)
    assert notes[0].endswith("2 pairs, 1 prompts cut at the front to fit block_size 50")


def test_when_no_pair_is_left_it_says_why(tmp_path):
    assert error_of(pair(chosen=""), tmp_path=tmp_path).splitlines() == [
        "/bad.jsonl: no usable pair: 0 pairs, 1 dropped: 1 with an empty response (1)",
        "no pair is left to train on"]


def test_unknown_keys_are_named_once(tmp_path):
    _, notes = load([write(tmp_path / "d.jsonl", pair(source=1), pair(source=2, id=3))], BYTES, 50)
    assert notes[1] == "ignored keys: 'id' (1 times), 'source' (2 times)"


@pytest.mark.parametrize("record, message", [
    ("{", ":1: not JSON (Expecting property name"),
    ("[1", ":1: not JSON"),
    ("[" * 100_000, ":1: not JSON"),
    ("17", ":1: expected an object, found int"),
    ({"chosen": "a"}, ':1: key "rejected" is missing'),
    ({"chosen": "a", "rejected": "b"}, ':1: no "prompt", and no "\\n\\nAssistant:" shared by both sides'),
    (pair(7), ':1: "prompt" must be a string, found int'),
    (pair(chosen=7), ':1: "chosen" must be a string, found int'),
    (pair(chosen=["a"]), ':1: "chosen"[0] must be an object with "text" and "scores"'),
    (pair(chosen=[{"scores": [1]}]), ':1: "chosen"[0] must be an object with "text" and "scores"'),
    (pair(chosen=[{"text": 1}]), ':1: "chosen[0].text" must be a string, found int'),
    (pair(chosen=scored(("a", -1))), '"chosen"[0].scores: needs a list of finite numbers >= 0, found [-1]'),
    ('{"prompt": "", "chosen": [{"text": "a", "scores": [NaN]}], "rejected": "b"}', "found [nan]"),
    ('{"prompt": "", "chosen": [{"text": "a", "scores": [1e999]}], "rejected": "b"}', "found [inf]"),
    (pair(chosen=scored(("a", 1e300))), "found [1e+300]"),  # infinite in float32
    (pair(chosen=scored(("a", 10**400))), "found [1000"),
    (pair(chosen=scored(("a", True))), "found [True]"),
    (pair(chosen=[{"text": "a", "scores": 3}]), "found 3"),
    (pair(chosen=scored(("a", 1)), rejected=scored(("b", 1, 2))),
     ":1: a segment with 1 scores and one with 2 in one pair"),
    (pair(chosen=scored(("a", 1)), rejected="b"), ":1: a segment with 0 scores and one with 1 in one pair"),
    (pair("\ud800"), ':1: "prompt" holds a lone surrogate, which is no character'),
    (pair(turns("Hi"), turns("Yes"), turns("No")), '"chosen": the response must start with an assistant'),
    (pair([{"role": "robot", "content": ""}], "a", "b"), '"prompt"[0]: role must be system, user or assis'),
    (pair([{"role": ["user"], "content": ""}], "a", "b"), '"prompt"[0]: role must be system, user or assis'),
    (pair(turns("Hi"), 7, "b"), ':1: "chosen" must be a list of messages, found int'),
    (pair([{"role": "user"}], "a", "b"), ':1: "prompt[0].content" must be a string, found NoneType'),
    ({"instruction": 7, "chosen": "a", "rejected": "b"}, ':1: "instruction" must be a string, found int'),
])
def test_a_malformed_record_is_one_line_file_line_what(tmp_path, record, message):
    text = error_of(record, tmp_path=tmp_path)
    assert text.startswith("/bad.jsonl:1: ") and message in text and len(text.splitlines()) == 1


def test_the_first_ten_malformed_lines_are_listed_over_all_files(tmp_path):
    good, bad = write(tmp_path / "0.jsonl", pair(), "oops", pair()), write(tmp_path / "1.jsonl", *["{}"] * 12)
    with pytest.raises(DataError) as e:
        load([good, bad], BYTES, 100)
    lines = str(e.value).splitlines()
    assert lines[0].startswith(f"{good}:2: not JSON")
    assert lines[1:10] == [f'{bad}:{i}: key "chosen" is missing' for i in range(1, 10)]
    assert lines[10:] == ["... and 3 more"]


def test_all_scored_pairs_have_the_same_number_of_scores(tmp_path):
    def with_scores(*scores):
        return pair(chosen=scored(("a", *scores)), rejected=scored(("b", *scores)))

    text = error_of(with_scores(1, 2), with_scores(1, 2, 3), with_scores(2, 3), tmp_path=tmp_path)
    assert text == "/bad.jsonl:2: 3 scores a segment here, 2 before"


def test_a_data_set_with_some_unscored_pairs_counts_as_unscored_and_says_so(tmp_path):
    path = write(tmp_path / "d.jsonl", pair(chosen=scored(("a", 1)), rejected=scored(("b", 1))), pair(),
                 pair(chosen=scored(("a",)), rejected=scored(("b",))))  # "scores": [], still to be filled in
    pairs, notes = load([path], BYTES, 100)
    assert pairs.n_aspects == 0 and notes[-1] == "scores are ignored: 2 of 3 pairs have none"
    assert [p.chosen_scores.shape for p in pairs] == [(1, 0)] * 3
    assert texts(pairs) == [("Q", "a", "b"), ("Q", "good", "bad"), ("Q", "a", "b")]


def test_scores_are_divided_by_the_maximum_of_their_aspect_over_these_pairs():
    def with_scores(*scores):
        return encode(scored(("a", *scores), ("b", 0, 0, 0)), scored(("c", 1, 0, 0)))

    pairs = data.pack([with_scores(5, 2, 0), with_scores(3, 4, 0)])
    assert pairs.score_maximum().tolist() == [5, 4, 1]  # an aspect that is 0 throughout divides by 1
    assert pairs.select(np.array([1])).score_maximum().tolist() == [3, 4, 1]


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", None, "No such file"),
    ("a.jsonl.gz", b"not gzip", "Not a gzipped file"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-20], "ended before the end-of-stream marker"),
    ("a.jsonl", b"\xff\xfe{}\n", ":1: not UTF-8"),
    ("a.json", b"{}", "must hold an array of pairs"),
    ("a.json", b"[1,", "not JSON"),
    ("a.json", b"[" * 100_000, "not JSON"),
    ("a.json", b"[1]", ": item 1: expected an object, found int"),
    ("a.jsonl", b"", "0 pairs"),
])
def test_a_file_that_cannot_be_read_is_a_data_error_with_its_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for store in (None, tmp_path / "store"):
        with pytest.raises(DataError) as e:
            load([tmp_path / name], BYTES, 100, store)
        assert str(e.value).startswith(f"{tmp_path / name}:") and message in str(e.value)


def test_byte_order_marks_and_carriage_returns_around_the_lines_are_no_data(tmp_path):
    path = tmp_path / "windows.jsonl"
    lines = [json.dumps(pair(f"Q{i}")).encode() for i in range(2)]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n")
    assert [p for p, _, _ in texts(load([path], BYTES, 100)[0])] == ["Q0", "Q1"]


def test_odd_characters_inside_the_text_survive(tmp_path):
    odd = "\ufeffBOM \x00 NUL\r\nCRLF \r CR \u2028 \x85 \U0001f600 <|endoftext|>"
    assert load_one(tmp_path, pair(odd, odd + "1", odd + "2")) == (odd, odd + "1", odd + "2")


# ---------------------------------------------------------------------------------------------------------
# Stored token ids


def same(a, b):
    return a.where == b.where and all(np.array_equal(getattr(a, x), getattr(b, x))
                                      for x in ("ids", "segments", "scores", "rows", "lengths"))


@pytest.fixture
def dataset(tmp_path):
    two_segments = pair(chosen=scored(("a", 1), ("b", 2)), rejected=scored(("c", 3)), extra=1)
    return write(tmp_path / "d.jsonl", two_segments, pair("é", scored(("d", 4)), scored(("e", 5))),
                 pair(chosen=""))


def test_a_second_start_reads_the_store_and_nothing_else(tmp_path, dataset, monkeypatch):
    plain = load([dataset], BYTES, 100)
    first = load([dataset], BYTES, 100, tmp_path / "out" / "store")
    monkeypatch.setattr(data, "read_records", None)
    again = load([dataset], BYTES, 100, tmp_path / "out" / "store")
    assert same(plain[0], first[0]) and same(plain[0], again[0])
    assert plain[1] == first[1] == again[1] and len(again[1]) == 2  # dropped, ignored keys
    assert texts(again[0]) == [("Q", "ab", "c"), ("é", "d", "e")]


def test_the_store_is_keyed_by_everything_that_determines_it(tmp_path, dataset, monkeypatch):
    store = tmp_path / "store"

    def stored():
        return len(list(store.iterdir()))

    load([dataset], BYTES, 100, store)
    assert stored() == 1
    load([dataset], BYTES, 99, store)  # block size
    assert stored() == 2
    load([dataset], Tokenizer(tiktoken_file(tmp_path / "v.tiktoken", "ab")), 100, store)  # tokenizer
    assert stored() == 3
    load([shutil.copy(dataset, tmp_path / "e.jsonl")], BYTES, 100, store)  # name
    assert stored() == 4
    load([dataset, tmp_path / "e.jsonl"], BYTES, 100, store)  # files
    load([tmp_path / "e.jsonl", dataset], BYTES, 100, store)  # their order
    assert stored() == 6
    dataset.write_bytes(dataset.read_bytes().replace(b'"d"', b'"D"'))  # one byte of the data
    assert texts(load([dataset], BYTES, 100, store)[0])[1] == ("é", "D", "e")
    assert stored() == 7
    monkeypatch.setattr(data, "__file__", __file__)  # the code that reads them
    load([dataset], BYTES, 100, store)
    assert stored() == 8
    load([dataset], BYTES, 100, store)
    assert stored() == 8


def test_a_changed_byte_anywhere_in_the_stored_file_is_noticed_and_the_file_written_again(tmp_path, dataset):
    pairs, notes = load([dataset], BYTES, 100, tmp_path / "store")
    stored = next((tmp_path / "store").iterdir())
    content = stored.read_bytes()
    for at in (0, 12, len(content) // 2, len(content) - 1):
        stored.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
        again, notes_again = load([dataset], BYTES, 100, tmp_path / "store")
        assert same(pairs, again) and notes == notes_again
        assert stored.read_bytes() == content
    stored.write_bytes(content[:100])  # cut off
    assert same(pairs, load([dataset], BYTES, 100, tmp_path / "store")[0])
    assert [f.read_bytes() for f in (tmp_path / "store").iterdir()] == [content]


def test_an_interrupted_write_leaves_nothing_that_looks_stored(tmp_path, dataset, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(data.os, "replace", fail)
        with pytest.raises(DataError, match="cannot keep the tokenised data there .disk full."):
            load([dataset], BYTES, 100, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot keep the tokenised data there"):
        load([dataset], BYTES, 100, tmp_path / "file")


def test_malformed_data_are_refused_with_a_store_too_and_nothing_is_stored(tmp_path):
    path = write(tmp_path / "d.jsonl", pair(), "{}")
    for _ in range(2):
        with pytest.raises(DataError, match='d.jsonl:2: key "chosen" is missing'):
            load([path], BYTES, 100, tmp_path / "store")
    assert not (tmp_path / "store").exists()


# ---------------------------------------------------------------------------------------------------------
# Order


def many_pairs(n=97, prompts=40, seed=0):
    """n pairs of different lengths over some prompts."""
    rng = np.random.default_rng(seed)
    chosen = [rng.integers(9, size=rng.integers(1, 30)) for _ in range(n)]
    return data.pack(make_pair([i % prompts, 5], chosen[i], [i, 7]) for i in range(n))


def test_an_epoch_is_a_permutation_and_the_next_one_another():
    for n, batch_size in ((10, 5), (10, 3), (3, 10), (1, 4), (7, 7)):
        order = np.concatenate([data.step_indices(n, batch_size, 0, step) for step in range(3 * n)])
        epochs = [tuple(order[i:i + n]) for i in range(0, len(order) // n * n, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert n < 4 or len(set(epochs)) > 1


def test_the_order_is_a_pure_function_of_seed_and_step():
    steps = [data.step_indices(50, 8, 3, step).tolist() for step in range(20)]
    for step in reversed(range(20)):  # asked in another order, with other questions between
        data.step_indices(49, 8, step, step)
        assert data.step_indices(50, 8, 3, step).tolist() == steps[step]
    assert steps != [data.step_indices(50, 8, 4, step).tolist() for step in range(20)]
    assert steps[0] != sorted(steps[0])
    assert steps[0] == [2, 11, 17, 28, 32, 23, 30, 41]  # and stays what it is: a resumed run depends on it


def test_micro_batches_hold_the_same_pairs_longest_first():
    pairs = many_pairs()
    index = data.step_indices(len(pairs), 31, 0, 2)
    for size in (1, 4, 31, 100):
        micro = data.micro_batches(pairs, index, size)
        flat = np.concatenate(micro)
        assert Counter(flat.tolist()) == Counter(index.tolist())
        assert (np.diff(pairs.lengths[flat]) <= 0).all()
        assert [len(m) for m in micro[:-1]] == [size] * (len(micro) - 1) and 0 < len(micro[-1]) <= size
    assert pairs.lengths[index].max() < 100
    for tokens in (1, 100, 250):  # rows x longest stays within the tokens, or the micro-batch is one pair
        micro = data.micro_batches(pairs, index, 6, tokens)
        assert np.concatenate(micro).tolist() == flat.tolist()
        padded = [len(m) * pairs.lengths[m].max() for m in micro]
        assert all(n <= tokens or len(m) == 1 for n, m in zip(padded, micro, strict=True))
        for m, n, following in zip(micro, padded, micro[1:], strict=False):  # and takes all that fit
            assert len(m) == 6 or n + pairs.lengths[m].max() > tokens, (m, following)


def test_no_prompt_is_both_held_out_and_trained_on_and_every_pair_is_somewhere():
    pairs = many_pairs()
    train, held = data.hold_out(pairs)
    prompts = [{p.prompt.tobytes() for p in part} for part in (train, held)]
    assert not prompts[0] & prompts[1]
    assert 0.1 * len(pairs) <= len(held) <= 0.1 * len(pairs) + 3  # whole prompts of 2 or 3 pairs
    ids = [p.rejected[0] for part in (train, held) for p in part]
    assert sorted(ids) == list(range(97))
    assert len(data.hold_out(pairs, at_most=5)[1]) in (5, 6, 7)


def test_the_held_out_pairs_do_not_depend_on_the_order_of_the_data():
    pairs = many_pairs()
    shuffled = pairs.select(np.random.default_rng(1).permutation(len(pairs)))
    first, again = ({p.rejected[0] for p in data.hold_out(x)[1]} for x in (pairs, shuffled))
    assert first == again


def test_data_with_one_prompt_are_split_by_pair_and_one_pair_is_refused():
    train, held = data.hold_out(many_pairs(prompts=1))
    assert len(train) + len(held) == 97 and len(held) == 10
    with pytest.raises(DataError, match="too few pairs"):
        data.hold_out(many_pairs(1))


# ---------------------------------------------------------------------------------------------------------
# Tokenizers

MERGES = [("a", "b"), ("Ġ", "ab"), ("c", "d"), ("Ã", "©")]  # ids 256 ... 259; é is the bytes C3 A9
SAMPLE = "ab cd ab\ncdé\x00 it's   12ab"


def vocabulary():
    """A vocabulary of GPT-2's kind: bytes in GPT-2's order ("!" is 0, " " is 220), merges, end-of-text."""
    tokens = [*data.byte_characters(), *(a + b for a, b in MERGES), data.EOT]
    return {token: i for i, token in enumerate(tokens)}


@pytest.fixture
def folders(tmp_path):
    """One vocabulary in each kind of folder that is read."""
    lines = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES)
    names = ("hf", "gpt2", "json", "json-lists", "saved", "tiktoken")
    hf, gpt2, as_json, as_lists, saved, ranked = folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
    files = (hf / "vocab.json", hf / "merges.txt"), (gpt2 / "encoder.json", gpt2 / "vocab.bpe")
    for vocab_file, merges_file in files:
        vocab_file.write_text(json.dumps(vocabulary()))
        merges_file.write_text(lines, encoding="utf-8")
    for folder, merges in ((as_json, [" ".join(m) for m in MERGES]), (as_lists, MERGES)):
        vocab = vocabulary()
        (folder / "tokenizer.json").write_text(json.dumps({
            "added_tokens": [{"id": vocab.pop(data.EOT), "content": data.EOT, "special": True}],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            "model": {"type": "BPE", "vocab": vocab, "merges": merges}}))
    Tokenizer(hf).save(saved)
    (ranked / "tokenizer.tiktoken").write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % rank for t, rank in Tokenizer(hf).ranks.items()))
    return folders


def test_every_kind_of_folder_gives_equal_ids(folders):
    tokenizers = [Tokenizer(folder) for folder in [*folders, folders[-1] / "tokenizer.tiktoken"]]
    first = tokenizers[0]
    assert first.encode("ab ab") == [256, 257]
    assert first.encode("cdé") == [258, 259]
    assert first.encode("a b") == [ord("a") - 33, 220, ord("b") - 33]
    assert (first.eot, first.vocab_size) == (260, 261)
    for t in tokenizers:
        assert t.encode(SAMPLE) == first.encode(SAMPLE), t.name
        assert (t.eot, t.vocab_size, t.hash) == (260, 261, first.hash), t.name
        assert t.decode(t.encode(SAMPLE)) == SAMPLE


def test_a_saved_vocabulary_of_bytes_or_of_words_reads_back_the_same(tmp_path):
    words = Tokenizer(tiktoken_file(tmp_path / "w.tiktoken", "hello", " world"))  # "hello" is no merge
    for name, tokenizer, files in (("b", BYTES, ["merges.txt", "tokenizer_config.json", "vocab.json"]),
                                   ("w", words, ["tokenizer.tiktoken"])):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        assert sorted(f.name for f in (tmp_path / name).iterdir()) == files
        assert Tokenizer(tmp_path / name).hash == tokenizer.hash
    assert words.encode("hello world") == [256, 257]


def test_the_merges_are_recovered_from_the_ranks(folders):
    show = {b: c for c, b in data.byte_characters().items()}
    merges = data.merges_of(Tokenizer(folders[0]).ranks)
    assert [tuple("".join(show[b] for b in part) for part in merge) for merge in merges] == MERGES


def test_a_rewritten_tiktoken_file_is_noticed(tmp_path):
    path = tiktoken_file(tmp_path / "v.tiktoken", "ab")
    before = Tokenizer(path)
    after = Tokenizer(tiktoken_file(path, "bc"))
    assert before.encode("abc") == [256, ord("c")] and after.encode("abc") == [ord("a"), 256]
    assert before.hash != after.hash


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>"])
def test_user_text_never_becomes_a_special_token(folders, text):
    for tokenizer in (BYTES, *map(Tokenizer, folders)):
        ids = tokenizer.encode(text)
        assert tokenizer.eot not in ids and tokenizer.decode(ids) == text


def test_another_special_token_of_the_vocabulary_is_never_produced(folders):
    path = folders[0] / "vocab.json"
    path.write_text(json.dumps(vocabulary() | {"[PAD]": 261, "ba": 262}))
    tokenizer = Tokenizer(folders[0])
    assert tokenizer.encode("ba [PAD]") == Tokenizer(folders[1]).encode("ba [PAD]")
    assert tokenizer.hash == Tokenizer(folders[1]).hash


def test_every_id_decodes_and_unknown_ones_to_the_replacement_character(folders):
    for tokenizer in (BYTES, *map(Tokenizer, folders)):
        for i in range(-2, tokenizer.vocab_size + 9):
            assert isinstance(tokenizer.decode([i]), str)
        assert tokenizer.decode([tokenizer.vocab_size, -1, 10**9]) == "\ufffd" * 3
        assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
        assert tokenizer.decode(torch.tensor(tokenizer.encode("é"))) == "é"


@pytest.mark.parametrize("text", ["\x00", "\ufeffa", "a\r\nb", "\U0001f600", "\u0301", " \n", "\x7f\x80\xad"])
def test_any_text_survives_a_round_trip(folders, text):
    for tokenizer in (BYTES, *map(Tokenizer, folders)):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_lone_surrogate_in_a_prompt_does_not_crash():
    assert BYTES.decode(BYTES.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("unit", [" ", "\n", " \n", "a", "^", "1", "\u3000"])
def test_a_very_long_run_of_one_character_is_encoded(unit):
    """GPT-2's own form of the split pattern overflows the regex engine's stack at some 500 000 spaces."""
    assert len(BYTES.encode(unit * 600_000)) == 600_000 * len(unit.encode())


@pytest.mark.parametrize("content, message", [
    (b"YQ== 0\nnonsense\n", ":2: not a line of a .tiktoken file"),
    (b"YQ== 0\n!!! 1\n", ":2: not a line of a .tiktoken file"),
    (b"YQ== x\n", ":1: not a line of a .tiktoken file"),
    (b"YQ== 1\n", ": ranks must be 0 to 0, each once"),
    (b"YQ== 0\nYQ== 1\n", ": ranks must be 0 to 0, each once"),
    (b"YQ== 0\n\n", ": 255 single bytes are missing"),
])
def test_a_broken_tiktoken_file_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "v.tiktoken"
    path.write_bytes(content)
    with pytest.raises(DataError) as e:
        Tokenizer(path)
    assert str(e.value).startswith(f"{path}{message}")


def edited(change):
    """A change of the vocabulary, as a change of vocab.json."""
    def edit(folder):
        vocab = vocabulary()
        change(vocab)
        (folder / "vocab.json").write_text(json.dumps(vocab))
    return edit


@pytest.mark.parametrize("kind, edit, message", [
    ("hf", edited(lambda v: v.pop("a")), "not a vocabulary of GPT-2's kind (KeyError: 'a')"),
    ("hf", edited(lambda v: v.pop(data.EOT)), "not a vocabulary of GPT-2's kind (KeyError: '<|endoftext|>')"),
    ("hf", edited(lambda v: v.update(ab=258, cd=256)), "its ids do not follow its merges"),
    ("hf", edited(lambda v: v.update(a=v["b"])), "its ids do not follow its merges"),
    ("hf", edited(lambda v: v.update({data.EOT: 3})), "its ids do not follow its merges"),
    ("hf", edited(lambda v: v.update(a=-1)), "its ids do not follow its merges"),
    ("hf", edited(lambda v: v.update(a="x")), "not a vocabulary of GPT-2's kind"),
    ("hf", lambda folder: (folder / "vocab.json").write_text("[]"), "not a vocabulary of GPT-2's kind"),
    ("hf", lambda folder: (folder / "vocab.json").write_text("{"), "not JSON"),
    ("hf", lambda folder: (folder / "merges.txt").write_text("a b c\n"), "not a vocabulary of GPT-2's kind"),
    ("hf", lambda folder: (folder / "merges.txt").unlink(), "is neither gpt2, bytes, a .tiktoken file nor"),
    ("json", lambda folder: (folder / "tokenizer.json").write_text("[]"), "not a tokenizer.json of GPT-2's"),
    ("json", lambda folder: (folder / "tokenizer.json").write_text('{"model": {}}'), "not a tokenizer.json"),
])
def test_a_broken_vocabulary_folder_is_one_clear_line(folders, kind, edit, message):
    folder = next(f for f in folders if f.name == kind)
    edit(folder)
    with pytest.raises(DataError) as e:
        Tokenizer(folder)
    assert str(folder) in str(e.value) and message in str(e.value) and len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("change", [
    {"normalizer": {"type": "NFC"}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
    {"pre_tokenizer": {"type": "Sequence"}},
    {"pre_tokenizer": None},
])
def test_a_tokenizer_json_that_splits_text_otherwise_than_gpt2_is_refused(folders, change):
    path = next(f for f in folders if f.name == "json") / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="of GPT-2's kind"):
        Tokenizer(path.parent)


def test_without_a_network_gpt2_names_both_ways_out(monkeypatch):
    def fail(_):
        raise ConnectionError("no route")

    monkeypatch.setattr(data.tiktoken, "get_encoding", fail)
    with pytest.raises(DataError) as e:
        Tokenizer("gpt2")
    assert "encoder.json and vocab.bpe" in str(e.value) and "TIKTOKEN_CACHE_DIR" in str(e.value)


@real_data
def test_gpt2_has_the_ids_that_everyone_has(tmp_path):
    tokenizer = Tokenizer(SHARED / "gpt2-bpe")
    assert tokenizer.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert (tokenizer.eot, tokenizer.vocab_size) == (50256, 50257)
    ids = [220, 220, 220, 628, 220, 257, 27, 91, 437, 1659, 5239, 91, 29]
    assert tokenizer.encode("   \n\n  a<|endoftext|>") == ids
    tokenizer.save(tmp_path)
    assert Tokenizer(tmp_path).hash == tokenizer.hash
    ours, theirs = ([line for line in path.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
                    for path in (tmp_path / "merges.txt", SHARED / "gpt2-bpe" / "vocab.bpe"))
    assert ours == theirs
    assert json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")) \
        == json.loads((SHARED / "gpt2-bpe" / "encoder.json").read_text(encoding="utf-8"))


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

    @hypothesis.settings(derandomize=True, database=None, max_examples=300, deadline=None)
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
    assert kept // 10 <= len(held) <= kept // 10 + 20
    batch = collate([held[i] for i in range(8)])
    row, column = batch.source
    before, after = batch.positions[row, column], batch.branch[row, column]
    first = batch.response.diff(prepend=torch.tensor([-1])) != 0
    assert (after[first] == data.PROMPT).all() and (after[~first] == 1 + batch.response[~first] % 2).all()
    assert (before[1:] - before[:-1] == 1)[~first[1:]].all()


def test_an_instruction_that_is_no_text_is_malformed_and_null_is_no_input(tmp_path):
    """Only a missing or null "input" is empty; [] and 0 are errors with their line."""
    good = {"instruction": "Add.", "input": None, "chosen": "2", "rejected": "3"}
    assert data.parse_record(good)[1] == "\n\nHuman: Add.\n\nAssistant:"
    for key, value in (("instruction", []), ("input", 0)):
        with pytest.raises(data.DataError, match=f'"{key}" must be a string'):
            data.parse_record(good | {key: value})


def test_saving_a_tokenizer_twice_gives_the_same_bytes(tmp_path):
    """vocab.json is in the order of ids, wherever the vocabulary came from."""
    ranks = data.Tokenizer("bytes")
    again = data.Tokenizer("bytes")
    again.ranks = dict(reversed(again.ranks.items()))
    texts = []
    for name, tokenizer in (("a", ranks), ("b", again)):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        texts.append((tmp_path / name / "vocab.json").read_bytes())
    assert texts[0] == texts[1]
