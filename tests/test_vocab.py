"""plumbing/vocab.py and data.Tokenizer: every kind of vocabulary file, read, written, refused."""

import base64
import json
import random
from pathlib import Path

import pytest
import tiktoken
import torch

from data import DataError, Tokenizer
from plumbing import vocab

GPT2 = Path(__file__).resolve().parents[2] / "shared" / "data" / "gpt2-bpe"
BYTES = Tokenizer("bytes")
MERGES = [("a", "b"), ("Ġ", "ab"), ("c", "d"), ("Ã", "©")]  # ids 256 ... 259; é is the bytes C3 A9
SAMPLE = "ab cd ab\ncdé\x00 it's   12ab"


def tiktoken_file(path, *words):
    """A .tiktoken file: the 256 bytes, then words."""
    tokens = [bytes([b]) for b in range(256)] + [word.encode() for word in words]
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


def vocabulary():
    """A vocabulary of GPT-2's kind: bytes in GPT-2's order ("!" is 0, " " is 220), merges, end-of-text."""
    tokens = [*vocab.byte_characters(), *(a + b for a, b in MERGES), vocab.EOT]
    return {token: i for i, token in enumerate(tokens)}


def tokenizer_json(merges=MERGES):
    ids = vocabulary()
    return {"added_tokens": [{"id": ids.pop(vocab.EOT), "content": vocab.EOT, "special": True}],
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
            "model": {"type": "BPE", "vocab": ids, "merges": merges}}


@pytest.fixture
def folders(tmp_path):
    """One vocabulary in each kind of folder that is read."""
    lines = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES)
    names = ("hf", "gpt2", "json", "json-lists", "saved", "tiktoken")
    hf, gpt2, as_json, as_lists, saved, ranked = folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
    for vocab_file, merges_file in ((hf / "vocab.json", hf / "merges.txt"),
                                    (gpt2 / "encoder.json", gpt2 / "vocab.bpe")):
        vocab_file.write_text(json.dumps(vocabulary()))
        merges_file.write_text(lines, encoding="utf-8")
    (as_json / "tokenizer.json").write_text(json.dumps(tokenizer_json([" ".join(m) for m in MERGES])))
    (as_lists / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    Tokenizer(hf).save(saved)
    (ranked / "tokenizer.tiktoken").write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % rank for t, rank in Tokenizer(hf).ranks.items()))
    return folders


def refused(folder):
    with pytest.raises(DataError) as e:
        Tokenizer(folder)
    assert str(folder) in str(e.value) and len(str(e.value).splitlines()) == 1
    return str(e.value)


# ---------------------------------------------------------------------------------------------------------
# One vocabulary, many files


def test_every_kind_of_folder_gives_equal_ids(folders):
    tokenizers = [Tokenizer(folder) for folder in [*folders, folders[-1] / "tokenizer.tiktoken"]]
    first = tokenizers[0]
    assert first.encode("ab ab") == [256, 257]
    assert first.encode("cdé") == [258, 259]
    assert first.encode("a b") == [ord("a") - 33, 220, ord("b") - 33]
    for t in tokenizers:
        assert t.encode(SAMPLE) == first.encode(SAMPLE) == t.encode_batch(["", SAMPLE])[1], t.name
        assert (t.eot, t.vocab_size, t.hash) == (260, 261, first.hash), t.name
        assert t.decode(t.encode(SAMPLE)) == SAMPLE
    assert all(map(vocab.is_in, folders)) and not vocab.is_in(folders[0].parent)


def test_a_saved_vocabulary_of_bytes_or_of_words_reads_back_the_same(tmp_path):
    words = Tokenizer(tiktoken_file(tmp_path / "w.tiktoken", "hello", " world"))  # "hello" is no merge
    for name, tokenizer, files in (("b", BYTES, ["merges.txt", "tokenizer_config.json", "vocab.json"]),
                                   ("w", words, ["tokenizer.tiktoken"])):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        assert sorted(f.name for f in (tmp_path / name).iterdir()) == files
        assert Tokenizer(tmp_path / name).hash == tokenizer.hash
    assert words.encode("hello world") == [256, 257]


def test_the_saved_bytes_do_not_depend_on_the_order_of_the_ranks(tmp_path):
    for name, ranks in (("a", BYTES.ranks), ("b", dict(reversed(BYTES.ranks.items())))):
        (tmp_path / name).mkdir()
        vocab.write(tmp_path / name, ranks, BYTES.eot)
    assert (tmp_path / "a" / "vocab.json").read_bytes() == (tmp_path / "b" / "vocab.json").read_bytes()


def test_the_merges_are_recovered_from_the_ranks(folders):
    show = {b: c for c, b in vocab.byte_characters().items()}
    merges = vocab.merges_of(Tokenizer(folders[0]).ranks)
    assert [tuple("".join(show[b] for b in part) for part in merge) for merge in merges] == MERGES


def test_a_rewritten_tiktoken_file_is_noticed(tmp_path):
    path = tiktoken_file(tmp_path / "v.tiktoken", "ab")
    before = Tokenizer(path)
    after = Tokenizer(tiktoken_file(path, "bc"))
    assert before.encode("abc") == [256, ord("c")] and after.encode("abc") == [ord("a"), 256]
    assert before.hash != after.hash


@pytest.mark.slow
@pytest.mark.skipif(not GPT2.exists(), reason="needs ../shared/data")
def test_gpt2_has_the_ids_that_everyone_has(tmp_path):
    tokenizer = Tokenizer(GPT2)
    assert tokenizer.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert (tokenizer.eot, tokenizer.vocab_size) == (50256, 50257)
    ids = [220, 220, 220, 628, 220, 257, 27, 91, 437, 1659, 5239, 91, 29]
    assert tokenizer.encode("   \n\n  a<|endoftext|>") == ids
    tokenizer.save(tmp_path)
    assert Tokenizer(tmp_path).hash == tokenizer.hash
    ours, theirs = ([line for line in path.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
                    for path in (tmp_path / "merges.txt", GPT2 / "vocab.bpe"))
    assert ours == theirs
    assert json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")) \
        == json.loads((GPT2 / "encoder.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------
# Text -> ids -> text


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>", "\x00",
                                  "\ufeffa", "a\r\nb", "\U0001f600", "\u0301", " \n", "\x7f\x80\xad"])
def test_any_text_survives_a_round_trip_and_never_becomes_a_special_token(folders, text):
    for tokenizer in (BYTES, *map(Tokenizer, folders)):
        ids = tokenizer.encode(text)
        assert tokenizer.eot not in ids and tokenizer.decode(ids) == text
    assert BYTES.decode(BYTES.encode("a\ud800b")) == "a\ufffdb"  # a lone surrogate is no crash


def test_another_special_token_of_the_vocabulary_is_never_produced(folders):
    (folders[0] / "vocab.json").write_text(json.dumps(vocabulary() | {"[PAD]": 261, "ba": 262}))
    tokenizer = Tokenizer(folders[0])
    assert tokenizer.encode("ba [PAD]") == Tokenizer(folders[1]).encode("ba [PAD]")
    assert tokenizer.hash == Tokenizer(folders[1]).hash


PAD = {"id": 261, "content": "[PAD]", "special": True}
ADDED = {  # as transformers writes one added special token: {file: content}
    "tokenizer.json": {"tokenizer.json": tokenizer_json() | {
        "added_tokens": [*tokenizer_json()["added_tokens"], PAD]}},
    "tokenizer_config.json": {"tokenizer_config.json": {"added_tokens_decoder": {"261": PAD}}},
    "added_tokens.json": {"added_tokens.json": {"[PAD]": 261},
                          "special_tokens_map.json": {"pad_token": "[PAD]"}},
}


@pytest.mark.parametrize("files", ADDED.values(), ids=ADDED)
def test_an_added_special_token_is_no_text_and_is_kept_when_the_files_are_copied(folders, files, tmp_path):
    hf, saved = folders[0], tmp_path / "copied"
    for name, content in files.items():
        (hf / name).write_text(json.dumps(content))
    tokenizer = Tokenizer(hf)
    assert (tokenizer.vocab_size, tokenizer.hash) == (261, Tokenizer(folders[1]).hash)
    ids = tokenizer.encode("[PAD] x[PAD]")
    assert max(ids) < 260 and tokenizer.decode(ids) == "[PAD] x[PAD]"
    saved.mkdir()
    assert vocab.copy(hf, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == {p.name: p.read_bytes() for p in hf.iterdir()}
    assert not vocab.copy(folders[1], saved)  # encoder.json, which transformers does not read


def test_every_id_decodes_and_unknown_ones_to_the_replacement_character(folders):
    for tokenizer in (BYTES, *map(Tokenizer, folders)):
        for i in range(-2, tokenizer.vocab_size + 9):
            assert isinstance(tokenizer.decode([i]), str)
        assert tokenizer.decode([tokenizer.vocab_size, -1, 10**9]) == "\ufffd" * 3
        assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
        assert tokenizer.decode(torch.tensor(tokenizer.encode("é"))) == "é"


def test_text_is_split_as_gpt2_splits_it():
    """Each piece of up to four characters is a token here, so that the ids show the pieces."""
    published = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    words = [b""]
    for _ in range(4):
        words += [word + bytes([c]) for word in words for c in b"as' \n1." if len(word) < 4]
    ranks = {bytes([b]): b for b in range(256)}
    for word in dict.fromkeys(words[1:]):
        ranks.setdefault(word, len(ranks))
    ours, theirs = (tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
                    for pattern in (vocab.SPLIT, published))
    rng = random.Random(0)
    texts = ["a" + space * n + "x" for space in " \n" for n in (99, 100, 101, 102, 199, 200, 201, 202)]
    for _ in range(20_000):
        letters = rng.choices("as'1. \n\u00a0\té", [3, 2, 1, 1, 1, 6, 3, 1, 1, 1], k=rng.randrange(14))
        texts.append("".join(letters))
    for text in texts:
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text), repr(text)


@pytest.mark.parametrize("unit", [" ", "\n", " \n", "a", "^", "1", "\u00a0"])
def test_a_very_long_run_of_one_character_is_encoded_whatever_follows(unit):
    """The published pattern overflows the regex engine's stack: an error at 500,000 spaces, a panic at
    999,999."""
    n = 1_200_000 // len(unit.encode())
    for end in ("", "x", "."):
        assert len(BYTES.encode(unit * n + end)) == n * len(unit.encode()) + len(end)


# ---------------------------------------------------------------------------------------------------------
# What is refused


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
    assert refused(path).startswith(f"{path}{message}")


def edited(change):
    """A change of the vocabulary, as a change of vocab.json."""
    def edit(folder):
        ids = vocabulary()
        change(ids)
        (folder / "vocab.json").write_text(json.dumps(ids))
    return edit


def written(name, content):
    return lambda folder: (folder / name).write_text(content)


@pytest.mark.parametrize("kind, edit, message", [
    ("hf", edited(lambda v: v.pop("a")), "not a vocabulary of GPT-2's kind (KeyError: 'a')"),
    ("hf", edited(lambda v: v.pop(vocab.EOT)), "of GPT-2's kind (KeyError: '<|endoftext|>')"),
    ("hf", edited(lambda v: v.update(ab=258, cd=256)), "its ids do not follow its merges"),
    ("hf", edited(lambda v: v.update(a=v["b"])), "its ids do not follow its merges"),
    ("hf", edited(lambda v: v.update({vocab.EOT: 3})), "its ids do not follow its merges"),
    ("hf", edited(lambda v: v.update(a=-1)), "its ids do not follow its merges"),
    ("hf", edited(lambda v: v.update(a="x")), "not a vocabulary of GPT-2's kind"),
    ("hf", written("vocab.json", "[]"), "not a vocabulary of GPT-2's kind"),
    ("hf", written("vocab.json", "{"), "not JSON"),
    ("hf", written("vocab.json", "version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer"),
    ("hf", written("merges.txt", "a b c\n"), "not a vocabulary of GPT-2's kind"),
    ("hf", lambda folder: (folder / "merges.txt").unlink(), "is neither gpt2, bytes, a .tiktoken file nor"),
    ("hf", written("tokenizer_config.json", "[]"), "not a tokenizer_config.json"),
    ("json", written("tokenizer.json", "[]"), "not a tokenizer.json of GPT-2's"),
    ("json", written("tokenizer.json", '{"model": {}}'), "not a tokenizer.json"),
])
def test_a_broken_vocabulary_folder_is_one_clear_line(folders, kind, edit, message):
    folder = next(f for f in folders if f.name == kind)
    edit(folder)
    assert message in refused(folder)


BOS = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
WORD = {"id": 261, "content": "  ", "special": False}


@pytest.mark.parametrize("part, value", [
    ("normalizer", {"type": "NFC"}),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}),
    ("post_processor", BOS),
    ("post_processor", {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}),
    ("model", tokenizer_json()["model"] | {"dropout": 0.1}),
    ("model", tokenizer_json()["model"] | {"ignore_merges": True}),
    ("added_tokens", [*tokenizer_json()["added_tokens"], WORD]),
])
def test_a_tokenizer_json_that_gives_other_ids_is_refused_alone_and_beside_other_files(folders, part, value):
    for folder in folders[0], folders[2]:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
        assert Tokenizer(folder).vocab_size == 261
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json() | {part: value}))
        assert f"of GPT-2's kind: its {part} would give other ids" in refused(folder)


@pytest.mark.parametrize("config, message", [
    ({"add_prefix_space": True}, "add_prefix_space: not GPT-2's"),
    ({"add_bos_token": True}, "add_bos_token: not GPT-2's"),
    ({"tokenizer_class": "Qwen2Tokenizer"}, "tokenizer_class Qwen2Tokenizer: not GPT-2's"),
    ({"added_tokens_decoder": {"261": WORD}}, "added_tokens_decoder"),
    ({"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": False, "model_max_length": 1024}, None),
])
def test_a_tokenizer_config_that_asks_for_other_ids_is_refused(folders, config, message):
    (folders[0] / "tokenizer_config.json").write_text(json.dumps(config))
    if message:
        assert message in refused(folders[0])
    else:
        assert Tokenizer(folders[0]).vocab_size == 261


def test_an_added_token_that_no_file_calls_special_is_refused(folders):
    """Text becomes it, in transformers."""
    (folders[0] / "added_tokens.json").write_text('{"<word>": 261}')
    assert "added_tokens.json: no other file says that '<word>' is special" in refused(folders[0])
    (folders[0] / "added_tokens.json").write_text("7")
    assert "not an object" in refused(folders[0])


def test_two_vocabularies_in_one_folder_are_refused(folders):
    other = tokenizer_json()
    other["model"]["merges"] = MERGES[:-1]
    (folders[0] / "tokenizer.json").write_text(json.dumps(other))
    assert "vocab.json and tokenizer.json hold different vocabularies" in refused(folders[0])


def test_without_a_network_gpt2_names_both_ways_out(monkeypatch):
    def fail(_):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(DataError) as e:
        Tokenizer("gpt2")
    assert "encoder.json and vocab.bpe" in str(e.value) and "TIKTOKEN_CACHE_DIR" in str(e.value)
