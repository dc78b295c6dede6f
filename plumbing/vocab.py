"""Vocabulary files -> {token bytes: id}: tiktoken's format, GPT-2's two files, tokenizer.json; and back."""

import base64
import binascii
import json
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
CHAT = (r'{% for m in messages %}{{ {"system": "\n\nSystem: ", "user": "\n\nHuman: ", '
        r'"assistant": "\n\nAssistant: "}[m["role"]] + m["content"] }}{% endfor %}'
        r'{% if add_generation_prompt %}{{ "\n\nAssistant:" }}{% endif %}')  # as data.Tokenizer.render

def read(name_or_path):
    """"gpt2", "bytes", FILE.tiktoken or a folder -> ({token bytes: id}, the id of end-of-text)."""
    path = Path(name_or_path)
    if str(name_or_path) == "bytes":
        return {bytes([b]): b for b in range(256)}, 256
    if str(name_or_path) != "gpt2":
        return read_tiktoken(path) if path.suffix == ".tiktoken" else read_folder(path)
    import tiktoken
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except Exception as e:  # requests' own errors, and requests is not ours to import
        raise DataError(f"tokenizer gpt2: not in tiktoken's cache, no download ({type(e).__name__}); set "
                        "TIKTOKEN_CACHE_DIR, or pass a folder with encoder.json and vocab.bpe") from None
    return {bpe.decode_single_token_bytes(i): i for i in range(bpe.eot_token)}, bpe.eot_token

def write(folder, ranks, eot):
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja: transformers has these ids too."""
    folder, show = Path(folder), {b: c for c, b in byte_characters().items()}
    ids = {"".join(show[b] for b in token): rank for rank, token in sorted((i, t) for t, i in ranks.items())}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": eot, "content": EOT, "special": True, "normalized": False,
               **dict.fromkeys(("single_word", "lstrip", "rstrip"), False)}
    bpe = {"version": "1.0", "added_tokens": [special], "normalizer": None, "pre_tokenizer": split,
           "post_processor": split, "decoder": split,
           "model": {"type": "BPE", "ignore_merges": True, "vocab": ids, "merges": splits_of(ids)}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left",
              "clean_up_tokenization_spaces": False,
              **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), EOT)}
    if (folder / "config.json").exists():
        sizes = json.loads((folder / "config.json").read_bytes())
        config["model_max_length"] = sizes.get("n_positions") or sizes.get("block_size")
    for name, text in (("tokenizer.json", json.dumps(bpe, ensure_ascii=False)), ("chat_template.jinja", CHAT),
                       ("tokenizer_config.json", json.dumps(config, indent=2) + "\n")):
        (folder / name).write_text(text, encoding="utf-8")

def splits_of(ids):
    """All ways to make a token of two: tiktoken joins the neighbours whose union has the lowest id."""
    return [[token[:i], token[i:]] for token in sorted(ids, key=ids.get) for i in range(1, len(token))
            if token[:i] in ids and token[i:] in ids]

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
    """The vocabulary of a folder, from every file that transformers would read; other ids are refused."""
    found = {}
    for vocab_file, merges_file in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocab_file).exists() and (folder / merges_file).exists():
            lines = read_bytes(folder / merges_file).decode("utf-8", errors="replace").split("\n")
            merges = [line.split() for line in lines if line and not line.startswith("#version")]
            vocab = read_json_data(folder / vocab_file)
            found[vocab_file] = check_merges(folder / vocab_file, vocab, merges)
    if (folder / "tokenizer.json").exists():
        found["tokenizer.json"] = read_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "added_tokens.json").exists():
        raise DataError(f"{folder}: added_tokens.json does not say which tokens text may become; save the "
                        "tokenizer again with transformers, which adds tokenizer.json")
    if not found:
        raise DataError(f"tokenizer {str(folder)!r}: is neither gpt2, bytes, a .tiktoken file nor a folder "
                        "with encoder.json + vocab.bpe, vocab.json + merges.txt or tokenizer.json")
    if (folder / "tokenizer_config.json").exists():
        check_config(folder / "tokenizer_config.json", "tokenizer.json" in found)
    if any(vocabulary != next(iter(found.values())) for vocabulary in found.values()):
        raise DataError(f"{folder}: {' and '.join(found)} hold different vocabularies; remove the wrong one")
    return next(iter(found.values()))

def read_tokenizer_json(path):
    bpe = read_json_data(path)
    try:
        model, split, after = bpe["model"], bpe["pre_tokenizer"], bpe.get("post_processor") or {}
        ids, merges = model["vocab"], [m.split() if isinstance(m, str) else m for m in model["merges"]]
        split_of_gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
        whole = model.get("ignore_merges")  # as `write` has it: each token is one, whatever merges make it
        of_gpt2 = {
            "model": model["type"] == "BPE" and not model.get("dropout")
                     and (not whole or merges == splits_of(ids)),
            "normalizer": not bpe["normalizer"],
            "pre_tokenizer": (split_of_gpt2 | split).items() >= split_of_gpt2.items(),
            "post_processor": after.get("type", "ByteLevel") in ("ByteLevel", "TemplateProcessing")
                              and '"SpecialToken"' not in json.dumps(after),
            "added_tokens": all(map(is_special, bpe["added_tokens"])),
        }
        merges = [(token, "") for token in sorted(ids, key=ids.get)] if whole else merges
        vocab = ids | {t["content"]: t["id"] for t in bpe["added_tokens"]}
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
    """It may ask for other ids. Its class decides how text is split where there is no tokenizer.json."""
    config = read_json_data(path)
    try:
        wrong = [key for key in ("add_prefix_space", "add_bos_token", "add_eos_token") if config.get(key)]
        if not has_tokenizer_json and "GPT2" not in (name := config.get("tokenizer_class") or "GPT2"):
            wrong.append(f"tokenizer_class {name}")
        if not all(map(is_special, config.get("added_tokens_decoder", {}).values())):
            wrong.append("added_tokens_decoder (with a token that is not special)")
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a tokenizer_config.json") from None
    if wrong:
        raise DataError(f"{path}: {', '.join(wrong)}: not GPT-2's; transformers would give other ids")

def check_merges(path, vocab, merges):
    """tiktoken merges in the order of ids: other orders are refused. A token that no merge makes is special,
    no text becomes it; only end-of-text is kept of those."""
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

def other_template(folder):
    """The chat template of a tokenizer's folder, where it is not that of Tokenizer.render; else None."""
    file, config = Path(folder, "chat_template.jinja"), Path(folder, "tokenizer_config.json")
    if file.exists():
        text = read_bytes(file).decode(errors="replace")
    else:
        text = read_json_data(config).get("chat_template") if config.exists() else None
    return text if text != CHAT else None

def is_in(folder):
    """True if a model's folder holds a tokenizer too."""
    return any(Path(folder, name).exists() for name in ("vocab.json", "encoder.json", "tokenizer.json"))
