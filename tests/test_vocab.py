"""plumbing/vocab.py and data.Tokenizer: every kind of vocabulary file, read, written, refused."""

import base64
import json
import random
from pathlib import Path

import pytest
import tiktoken

from data import DataError, Tokenizer
from model import GPT, GPTConfig
from plumbing import vocab

ROOT = Path(__file__).resolve().parents[1]
GPT2 = ROOT.parent / "shared" / "data" / "gpt2-bpe"
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
    return [*folders[:-1], ranked / "tokenizer.tiktoken"]

def refused(folder):
    with pytest.raises(DataError) as e:
        Tokenizer(folder)
    assert str(folder) in str(e.value) and len(str(e.value).splitlines()) == 1
    return str(e.value)

# ---- One vocabulary, many files ----

def test_every_kind_of_folder_gives_equal_ids(folders):
    tokenizers = [Tokenizer(folder) for folder in folders]
    first = tokenizers[0]
    assert first.encode("ab ab") == [256, 257]
    assert first.encode("cdé") == [258, 259]
    assert first.encode("a b") == [ord("a") - 33, 220, ord("b") - 33]
    for t in tokenizers:
        assert t.encode(SAMPLE) == first.encode(SAMPLE) == t.encode_batch(["", SAMPLE])[1], t.name
        assert (t.eot, t.vocab_size, t.hash) == (260, 261, first.hash), t.name
        assert t.decode(t.encode(SAMPLE)) == SAMPLE
    assert all(map(vocab.is_in, folders[:-1])) and not vocab.is_in(folders[0].parent)

# Every kind of character, white space by the hundred, HH's turns
TEXTS = ["a fine film", "\n\nHuman: Hi\n\nAssistant: it's 12 \u00a0\t ab", " " * 300 + "x", "\u0301\u200d",
         *(f"{chr(c)}{chr(c)} a{chr(c)}1 {chr(c)}" for c in range(33, 0xd000, 37))]

@pytest.mark.slow
@pytest.mark.parametrize("kind", ["toy", "words", "gpt2"])
def test_transformers_gives_the_ids_that_we_give(kind, tmp_path):
    """The files of a saved model, in its ordinary calls: ids, truncation, padding, end-of-text, the template.
    Read back, it is the same vocabulary, and the bytes do not depend on the order of the ranks."""
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2" and not GPT2.exists():
        pytest.skip("needs ../shared/data")
    words = tiktoken_file(tmp_path / "w.tiktoken", "hello", " world", "aa", "aaa")
    ours = Tokenizer({"toy": ROOT / "toy" / "toy.tiktoken", "words": words, "gpt2": GPT2}[kind])
    GPT(GPTConfig(ours.vocab_size, 40, 1, 1, 4)).save_pretrained(tmp_path, ours.eot)
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng, texts = random.Random(0), TEXTS.copy()
    texts += ["".join(rng.choices(["a", "b", " ", "é", "\n", "hello", " world"], k=20)) for _ in range(300)]
    texts += [bytes(rng.choices(range(256), k=30)).decode(errors="replace") for _ in range(300)]
    assert theirs(texts).input_ids == ours.encode_batch(texts)
    assert theirs.decode(ours.encode(TEXTS[1]) + [ours.eot], skip_special_tokens=True) == TEXTS[1]
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eot
    assert len(theirs("a b" * 100, truncation=True).input_ids) == 40
    assert theirs(["a", "a b c"], padding=True).input_ids[0][0] == ours.eot
    roles = [("system", "Be kind."), ("user", " Hi\n"), ("assistant", "Yes"), ("user", "{{no}}")]
    messages = [{"role": role, "content": text} for role, text in roles]
    chat = "\n\nSystem: Be kind.\n\nHuman:  Hi\n\n\nAssistant: Yes\n\nHuman: {{no}}\n\nAssistant:"
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == chat
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == ours.encode(chat)
    assert ours.render(messages) == chat
    assert Tokenizer(tmp_path).hash == ours.hash and Tokenizer(tmp_path).render(messages) == chat
    if kind != "gpt2":
        written = (tmp_path / "tokenizer.json").read_bytes()
        vocab.write(tmp_path, dict(reversed(ours.ranks.items())), ours.eot)
        assert (tmp_path / "tokenizer.json").read_bytes() == written

@pytest.mark.slow
def test_any_vocabulary_gives_the_same_ids_however_its_tokens_overlap(tmp_path):
    """Random tokens of two letters: tiktoken joins the neighbours whose union is lowest, leftmost first."""
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(0)
    for _ in range(40):
        words = ["".join(rng.choices("ab", k=rng.randrange(2, 7))) for _ in range(20)]
        ours = Tokenizer(tiktoken_file(tmp_path / "r.tiktoken", *dict.fromkeys(words)))
        ours.save(tmp_path)
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        texts = ["".join(rng.choices("ab", k=20)) for _ in range(100)]
        assert [x.ids for x in theirs.encode_batch(texts)] == ours.encode_batch(texts), words

@pytest.mark.slow
@pytest.mark.skipif(not GPT2.exists(), reason="needs ../shared/data")
def test_gpt2_has_the_ids_that_everyone_has():
    tokenizer = Tokenizer(GPT2)
    assert tokenizer.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert (tokenizer.eot, tokenizer.vocab_size) == (50256, 50257)
    ids = [220, 220, 220, 628, 220, 257, 27, 91, 437, 1659, 5239, 91, 29]
    assert tokenizer.encode("   \n\n  a<|endoftext|>") == ids

# ---- Text -> ids -> text ----

@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>", "\x00",
                                  "\ufeffa", "a\r\nb", "\U0001f600", "\u0301", " \n", "\x7f\x80\xad"])
def test_any_text_survives_a_round_trip_and_never_becomes_a_special_token(folders, text):
    for tokenizer in (BYTES, *map(Tokenizer, folders)):
        ids = tokenizer.encode(text)
        assert tokenizer.eot not in ids and tokenizer.decode(ids) == text
    assert BYTES.decode(BYTES.encode("a\ud800b")) == "a\ufffdb"  # a lone surrogate is no crash

PAD = {"id": 261, "content": "[PAD]", "special": True}
ADDED = {  # as transformers writes one added special token
    "tokenizer.json": tokenizer_json() | {"added_tokens": [*tokenizer_json()["added_tokens"], PAD]},
    "tokenizer_config.json": {"added_tokens_decoder": {"261": PAD}}}

@pytest.mark.parametrize("name", ADDED)
def test_an_added_special_token_is_no_text(folders, name):
    (folders[0] / name).write_text(json.dumps(ADDED[name]))
    tokenizer = Tokenizer(folders[0])
    assert (tokenizer.vocab_size, tokenizer.hash) == (261, Tokenizer(folders[1]).hash)
    ids = tokenizer.encode("[PAD] x[PAD]")
    assert max(ids) < 260 and tokenizer.decode(ids) == "[PAD] x[PAD]"

@pytest.mark.parametrize("unit", [" ", " \n", "a"])
def test_a_very_long_run_of_one_character_is_encoded_whatever_follows(unit):
    """The published pattern overflows the regex engine's stack: an error at 500,000 spaces, a panic at
    999,999."""
    n = 1_200_000 // len(unit.encode())
    for end in ("", "x"):
        assert len(BYTES.encode(unit * n + end)) == n * len(unit.encode()) + len(end)

# ---- What is refused ----

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
    ("model", tokenizer_json()["model"] | {"ignore_merges": True, "merges": MERGES[:-1]}),
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

def test_added_tokens_alone_are_refused(folders):
    """Text may become them, in transformers; tokenizer.json says which are special."""
    (folders[0] / "added_tokens.json").write_text('{"<word>": 261}')
    assert "added_tokens.json does not say which" in refused(folders[0])
    (folders[0] / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    assert Tokenizer(folders[0]).vocab_size == 261

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
