"""Vocabulary files -> {token bytes: id}: tiktoken's format, GPT-2's two files, tokenizer.json. Written is
tokenizer.json alone, which has the same ids for every tiktoken vocabulary, and what transformers reads with it.
"""

import base64
import binascii
import json
import shutil
from pathlib import Path

from plumbing.errors import DataError
from plumbing.files import read_bytes, read_json_data

EOT = "<|endoftext|>"
# GPT-2's split pattern, possessive and with white space taken by the hundred: the published one backtracks
# once a character and overflows the regex engine's stack at a million spaces.
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$" \
        r"|(?:\s{100}(?=\s\s))*+\s+(?!\S)|\s"


OF_TRANSFORMERS = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
CHAT = """{% for m in messages %}{{ {"system": "\n\nSystem: ", "user": "\n\nHuman: ", \
"assistant": "\n\nAssistant: "}[m["role"]] + m["content"] }}{% endfor %}\
{% if add_generation_prompt %}{{ "\n\nAssistant:" }}{% endif %}"""  # as data.Tokenizer.render


def read(name_or_path):
    """"gpt2", "bytes", FILE.tiktoken or a folder -> ({token bytes: id}, the id of end-of-text)."""
    path = Path(name_or_path)
    if str(name_or_path) == "bytes":
        return {bytes([b]): b for b in range(256)}, 256
    if str(name_or_path) == "gpt2":
        return read_gpt2()
    if path.suffix == ".tiktoken":
        return read_tiktoken(path)
    return read_folder(path)


def write(folder, ranks, eot):
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja. Texts are truncated to the positions
    that the folder's config.json names."""
    folder = Path(folder)
    show = {b: c for c, b in byte_characters().items()}
    ids = dict(sorted((("".join(show[b] for b in token), rank) for token, rank in ranks.items()),
                      key=lambda item: item[1]))  # the same bytes whatever the order of the ranks
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": eot, "content": EOT, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False, "special": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
             "vocab": ids, "merges": splits_of(ids)}
    bpe = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [special],
           "normalizer": None, "pre_tokenizer": split, "post_processor": split, "decoder": split,
           "model": model}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "padding_side": "left", **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), EOT)}
    if (folder / "config.json").exists():
        sizes = json.loads((folder / "config.json").read_bytes())
        config["model_max_length"] = sizes.get("n_positions") or sizes.get("block_size")
    (folder / "tokenizer.json").write_text(json.dumps(bpe, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT, encoding="utf-8")


def splits_of(ids):
    """All ways to make a token of two others, by the token's id: tiktoken joins the two neighbours whose union
    has the lowest id, however that union came about."""
    return [[token[:i], token[i:]] for token in sorted(ids, key=ids.get) for i in range(1, len(token))
            if token[:i] in ids and token[i:] in ids]


def copy(start, folder):
    """Copy the tokenizer of a model's folder as it is, its added tokens and chat template too. False where
    transformers would find none there."""
    names = [name for name in OF_TRANSFORMERS if Path(start, name).exists()]
    if not {"merges.txt", "tokenizer.json"} & set(names):
        return False
    for name in names:
        shutil.copyfile(Path(start, name), Path(folder, name))
    return True


def read_gpt2():
    import tiktoken
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except Exception as e:  # requests' own errors, and requests is not ours to import
        raise DataError(f"tokenizer gpt2: not in tiktoken's cache, no download ({type(e).__name__}); pass "
                        "--tokenizer bytes, a .tiktoken file or a folder with encoder.json and vocab.bpe, "
                        "or set TIKTOKEN_CACHE_DIR") from None
    return {bpe.decode_single_token_bytes(i): i for i in range(bpe.eot_token)}, bpe.eot_token


def read_tiktoken(path):
    """tiktoken caches local files by path and would not notice a rewrite, so they are read here."""
    ranks = {}
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{path}:{number}: not a line of a .tiktoken file (base64 token, rank)") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{path}: ranks must be 0 to {len(ranks) - 1}, each once")
    if missing := sum(bytes([b]) not in ranks for b in range(256)):
        raise DataError(f"{path}: {missing} single bytes are missing; not every text could be encoded")
    return ranks, len(ranks)


def read_folder(folder):
    """The vocabulary of a folder: {token: id} and end-of-text's id. Every file that transformers would read
    is read: what makes other ids than GPT-2's is refused."""
    found = []
    for vocab_file, merges_file in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocab_file).exists() and (folder / merges_file).exists():
            lines = read_bytes(folder / merges_file).decode("utf-8", errors="replace").split("\n")
            merges = [line.split() for line in lines if line and not line.startswith("#version")]
            vocab = read_json_data(folder / vocab_file)
            found.append((vocab_file, check_merges(folder / vocab_file, vocab, merges)))
    if (folder / "tokenizer.json").exists():
        found.append(("tokenizer.json", read_tokenizer_json(folder / "tokenizer.json")))
    if not found and (folder / "tokenizer.tiktoken").exists():
        return read_tiktoken(folder / "tokenizer.tiktoken")
    if not found:
        raise DataError(f"tokenizer {str(folder)!r}: is neither gpt2, bytes, a .tiktoken file nor a folder "
                        "with encoder.json + vocab.bpe, vocab.json + merges.txt, tokenizer.json or "
                        "tokenizer.tiktoken")
    if (folder / "tokenizer_config.json").exists():
        check_config(folder / "tokenizer_config.json", any(name == "tokenizer.json" for name, _ in found))
    if (folder / "added_tokens.json").exists():
        check_added(folder)
    (first, vocabulary), *others = found
    for name, other in others:
        if other != vocabulary:
            raise DataError(f"{folder}: {first} and {name} hold different vocabularies; remove the wrong one")
    return vocabulary


def read_tokenizer_json(path):
    bpe = read_json_data(path)
    try:
        model, split, after = bpe["model"], bpe["pre_tokenizer"], bpe.get("post_processor") or {}
        merges = [m.split() if isinstance(m, str) else m for m in model["merges"]]
        split_of_gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        of_gpt2 = {
            "model": model["type"] == "BPE" and not model.get("dropout")
                     and (not model.get("ignore_merges") or merges == splits_of(model["vocab"])),
            "normalizer": not bpe["normalizer"],
            "pre_tokenizer": (split_of_gpt2 | split).items() >= split_of_gpt2.items(),
            "post_processor": after.get("type", "ByteLevel") in ("ByteLevel", "TemplateProcessing")
                              and '"SpecialToken"' not in json.dumps(after),
            "added_tokens": all(map(is_special, bpe["added_tokens"])),
        }
        vocab = model["vocab"] | {t["content"]: t["id"] for t in bpe["added_tokens"]}
        if model.get("ignore_merges"):  # of `write`: each token is one, whether merges make it or not
            merges = [(token, "") for token in sorted(model["vocab"], key=model["vocab"].get)]
    except (KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{path}: not a tokenizer.json of GPT-2's kind ({e})") from None
    if other := [name for name, true in of_gpt2.items() if not true]:
        raise DataError(f"{path}: not a byte-level BPE of GPT-2's kind: its {', '.join(other)} would give "
                        "other ids")
    return check_merges(path, vocab, merges)


def is_special(token):
    """Text becomes an added token that is not special: "a  b" with an added "  " has other ids."""
    return token.get("special") or token["content"] == EOT


def check_config(path, has_tokenizer_json):
    """tokenizer_config.json may ask for other ids than the vocabulary's; its class decides where there is no
    tokenizer.json (Qwen2Tokenizer, say, reads vocab.json and merges.txt and splits text otherwise)."""
    config = read_json_data(path)
    try:
        wrong = [key for key in ("add_prefix_space", "add_bos_token", "add_eos_token") if config.get(key)]
        if config.get("tokenizer_class") not in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
            wrong += [] if has_tokenizer_json else [f"tokenizer_class {config['tokenizer_class']}"]
        if not all(map(is_special, config.get("added_tokens_decoder", {}).values())):
            wrong.append("added_tokens_decoder (with a token that is not special)")
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a tokenizer_config.json") from None
    if wrong:
        raise DataError(f"{path}: {', '.join(wrong)}: not GPT-2's; transformers would give other ids")


def check_added(folder):
    """added_tokens.json does not say which of its tokens are special; the other files name those."""
    others = [folder / name for name in OF_TRANSFORMERS[2:5]]
    named = json.dumps([read_json_data(path) for path in others if path.exists()])
    added = read_json_data(folder / "added_tokens.json")
    if not isinstance(added, dict):
        raise DataError(f"{folder / 'added_tokens.json'}: not an object of tokens and ids")
    for token in added:
        if json.dumps(token) not in named:
            raise DataError(f"{folder / 'added_tokens.json'}: no other file says that {token!r:.40} is "
                            "special; transformers would give other ids")


def check_merges(path, vocab, merges):
    """tiktoken merges in the order of ids: refuse a vocabulary whose merges come in another order. A token
    that no merge makes is a special token, which no text becomes; only end-of-text is kept of those."""
    byte_of = byte_characters()
    try:
        made = [left + right for left, right in merges]
        ranks = {bytes(byte_of[c] for c in token): int(vocab[token]) for token in [*byte_of, *made]}
        ids, eot = [vocab[token] for token in made], int(vocab[EOT])
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"{path}: not a vocabulary of GPT-2's kind ({type(e).__name__}: {e})") from None
    taken = {*ranks.values(), eot}
    if ids != sorted(ids) or len(taken) <= len(ranks) or min(taken) < 0:
        raise DataError(f"{path}: its ids do not follow its merges, each once, as GPT-2's do")
    return ranks, eot


def byte_characters():
    """GPT-2's printable stand-ins in vocabulary files: character -> byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def is_in(folder):
    """True if a model's folder holds a tokenizer too."""
    files = ("vocab.json", "encoder.json", "tokenizer.json", "tokenizer.tiktoken")
    return any((Path(folder) / f).exists() for f in files)
