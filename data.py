"""From a line of JSONL to the tensors of a step. Imports nothing of ours.

B pairs, T columns, N response tokens, S segments per response, A aspects; P, C, R tokens of a pair's prompt,
chosen and rejected response (end-of-text counted).

A pair is one row, [prompt | chosen | rejected]: the prompt is computed once, the positions of both
responses continue from it, and a token sees the prompt and its own branch. `collate` also lists the response
tokens flat and says which hidden state predicts each: the shift by one happens there and nowhere else.
"""

import base64
import binascii
import gzip
import hashlib
import json
import math
import os
import re
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import safetensors
import tiktoken
import torch
from safetensors.numpy import save_file
from tqdm import tqdm


class DataError(ValueError):
    """Malformed input: the message says what, where (file:line) and what to do."""


class UnusablePair(DataError):
    """A well-formed pair that cannot be trained on: it is dropped and counted, by this reason."""


# ---------------------------------------------------------------------------------------------------------
# Tokenizer

EOT = "<|endoftext|>"
# GPT-2's split pattern, possessive so that a million spaces do not overflow the regex engine's stack
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """Byte-pair encoding by tiktoken, from one of
        gpt2               the 50257 ids of GPT-2 (from tiktoken's cache, or downloaded by it)
        bytes              256 bytes and end-of-text
        FILE.tiktoken      lines "base64(token) rank"; GPT-2's split pattern; end-of-text = number of ranks
        FOLDER             with encoder.json + vocab.bpe, vocab.json + merges.txt, tokenizer.json (of GPT-2's
                           kind) or tokenizer.tiktoken
    """

    def __init__(self, name_or_path):
        self.name = str(name_or_path)
        path = Path(name_or_path)
        if self.name == "bytes":
            self.ranks, self.eot = {bytes([b]): b for b in range(256)}, 256
        elif self.name == "gpt2":
            self.ranks, self.eot = read_gpt2()
        elif path.suffix == ".tiktoken":
            self.ranks, self.eot = read_tiktoken(path)
        else:
            self.ranks, self.eot = read_folder(path)
        self.vocab_size = max(self.eot, *self.ranks.values()) + 1
        self.token_bytes = {rank: token for token, rank in self.ranks.items()} | {self.eot: EOT.encode()}
        self.hash = hashlib.sha256(repr((sorted(self.ranks.items()), self.eot)).encode()).hexdigest()
        self.bpe = tiktoken.Encoding(self.name, pat_str=SPLIT, mergeable_ranks=self.ranks, special_tokens={})

    def encode(self, text):
        """Text -> list of ids. Never a special token, whatever the text says."""
        return self.bpe.encode_ordinary(text)

    def decode(self, ids):
        """Ids -> text; ids that the vocabulary lacks and bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes.get(int(i), b"\xff") for i in ids).decode("utf-8", errors="replace")

    def save(self, folder):
        """Write vocab.json + merges.txt (transformers reads them) where the ranks are merges, and
        tokenizer.tiktoken where they are not (a vocabulary of whole words)."""
        folder, merges = Path(folder), merges_of(self.ranks)
        if merges is None:
            lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in self.ranks.items()]
            (folder / "tokenizer.tiktoken").write_bytes(b"".join(lines))
            return
        show = {b: c for c, b in byte_characters().items()}
        vocab = {"".join(show[b] for b in token): rank for token, rank in self.ranks.items()}
        pairs = [" ".join("".join(show[b] for b in part) for part in merge) for merge in merges]
        vocab = dict(sorted((vocab | {EOT: self.eot}).items(), key=lambda item: item[1]))  # by id
        text = json.dumps(vocab, ensure_ascii=False)
        (folder / "vocab.json").write_text(text, encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
        config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": EOT, "eos_token": EOT, "unk_token": EOT}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_gpt2():
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
    """The vocabulary of a folder: {token: id} and end-of-text's id."""
    for vocab_file, merges_file in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocab_file).exists() and (folder / merges_file).exists():
            lines = read_bytes(folder / merges_file).decode("utf-8", errors="replace").split("\n")
            merges = [line.split() for line in lines if line and not line.startswith("#version")]
            return check_merges(folder / vocab_file, read_json(folder / vocab_file), merges)
    if (path := folder / "tokenizer.json").exists():
        try:
            bpe = read_json(path)
            kind = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
            split_alike = (kind | bpe["pre_tokenizer"]).items() >= kind.items()
            if bpe["model"]["type"] != "BPE" or bpe["normalizer"] or not split_alike:
                raise DataError(f"{path}: not a byte-level BPE of GPT-2's kind")
            vocab = bpe["model"]["vocab"] | {t["content"]: t["id"] for t in bpe["added_tokens"]}
            merges = [m.split() if isinstance(m, str) else m for m in bpe["model"]["merges"]]
        except (KeyError, TypeError) as e:
            raise DataError(f"{path}: not a tokenizer.json of GPT-2's kind ({e})") from None
        return check_merges(path, vocab, merges)
    if (folder / "tokenizer.tiktoken").exists():
        return read_tiktoken(folder / "tokenizer.tiktoken")
    raise DataError(f"tokenizer {str(folder)!r}: is neither gpt2, bytes, a .tiktoken file nor a folder with "
                    "encoder.json + vocab.bpe, vocab.json + merges.txt, tokenizer.json or tokenizer.tiktoken")


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


def merges_of(ranks):
    """The two parts from which BPE makes each token, in rank order; None when some token is no such merge."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            if ranks.get(parts[best] + parts[best + 1], rank) >= rank:
                return None
            parts[best:best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(parts)
    return merges


def own_tokenizer(folder):
    """The Tokenizer that a model's folder holds, or None."""
    files = ("vocab.json", "encoder.json", "tokenizer.json", "tokenizer.tiktoken")
    return Tokenizer(folder) if folder and any((Path(folder) / f).exists() for f in files) else None


# ---------------------------------------------------------------------------------------------------------
# Files -> records


def read_bytes(path):
    """A whole file, decompressed when its name ends in .gz."""
    try:
        return gzip.open(path).read() if str(path).endswith(".gz") else Path(path).read_bytes()
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: {getattr(e, 'strerror', None) or e}") from None


def read_json(path):
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not JSON ({e})") from None


def list_files(paths):
    """Data files. A folder stands for its .jsonl and .jsonl.gz files, or its .json files when it has none."""
    files = []
    for path in map(Path, paths):
        inside = sorted(path.rglob("*")) if path.is_dir() else []
        found = [p for p in inside if p.name.endswith((".jsonl", ".jsonl.gz"))]
        found = found or [p for p in inside if p.name.endswith(".json")]
        if path.is_dir() and not found:
            raise DataError(f"{path}: a folder without .jsonl, .jsonl.gz or .json files")
        files += found or [path]
    return files


def read_records(path):
    """(where, record) of each line of a .jsonl(.gz) file or item of a .json array; where is "file:line".

    A line that is not JSON is yielded with a DataError in place of the record, so that all can be listed.
    """
    bar = {"desc": f"reading {path}", "unit": " pairs", "delay": 2, "leave": False}
    if Path(path).suffix == ".json":
        items = read_json(path)
        if not isinstance(items, list):
            raise DataError(f"{path}: a .json file must hold an array of pairs (one pair a line is .jsonl)")
        yield from ((f"{path}: item {i}", item) for i, item in enumerate(tqdm(items, **bar), 1))
        return
    for number, line in enumerate(tqdm(read_bytes(path).split(b"\n"), **bar), 1):
        if line.strip():
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                record = DataError("not UTF-8")
            except (ValueError, RecursionError) as e:
                record = DataError(f"not JSON ({e})")
            yield f"{path}:{number}", record


# ---------------------------------------------------------------------------------------------------------
# Record -> (form, prompt, chosen, rejected); a response is a list of segments (text, scores or None)

FORMS = {
    "pairs": "prompt as it stands",
    "scored segments": "prompt as it stands",
    "HH transcripts": "prompt = common prefix up to its last Assistant turn",
    "chat messages": "rendered as Human/Assistant turns",
    "instructions": "rendered as one Human turn",
}
TURN = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
ASSISTANT = "\n\nAssistant:"  # a prompt ends here, a response starts with the space
KEYS = {"prompt", "chosen", "rejected", "instruction", "input"}


def parse_record(record):
    """Recognise the form of a record by its keys."""
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError(f"expected an object, found {type(record).__name__}")
    for key in ("chosen", "rejected"):
        if key not in record:
            raise DataError(f'key "{key}" is missing')
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if isinstance(prompt, list) or is_messages(chosen) or is_messages(rejected):
        return "chat messages", *parse_chat(prompt, chosen, rejected)
    if prompt is None and "instruction" in record:
        texts = [check_text(record[k], k) for k in ("instruction", "input") if record.get(k) is not None]
        sides = [[(" " + check_text(record[key], key), None)] for key in ("chosen", "rejected")]
        return "instructions", TURN["user"] + "\n".join(filter(None, texts)) + ASSISTANT, *sides
    if prompt is None:
        sides = [check_text(record[key], key) for key in ("chosen", "rejected")]
        head, turn, _ = os.path.commonprefix(sides).rpartition(ASSISTANT)
        if not turn:
            raise DataError('no "prompt", and no "\\n\\nAssistant:" shared by both sides (HH transcripts)')
        prompt = head + turn
        return "HH transcripts", prompt, *([(side.removeprefix(prompt), None)] for side in sides)
    sides = parse_response(chosen, "chosen"), parse_response(rejected, "rejected")
    if len(counts := {len(scores or []) for side in sides for _, scores in side} or {0}) > 1:
        raise DataError(f"a segment with {min(counts)} scores and one with {max(counts)} in one pair")
    return "scored segments" if max(counts) else "pairs", check_text(prompt, "prompt"), *sides


def is_messages(x):
    return isinstance(x, list) and any(isinstance(m, dict) and "role" in m for m in x)


def check_text(text, key):
    if not isinstance(text, str):
        raise DataError(f'"{key}" must be a string, found {type(text).__name__}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f'"{key}" holds a lone surrogate, which is no character') from None
    return text


def parse_response(response, key):
    """A string, or a list of {"text", "scores"} that join to the response; scores may be absent or []."""
    if not isinstance(response, list):
        return [(check_text(response, key), None)]
    segments = []
    for i, segment in enumerate(response):
        if not isinstance(segment, dict) or "text" not in segment:
            raise DataError(f'"{key}"[{i}] must be an object with "text" and "scores"')
        scores = segment.get("scores")
        if scores is not None and not (isinstance(scores, list)
                                       and all(type(x) in (int, float) and 0 <= x < 1e38 for x in scores)):
            raise DataError(f'"{key}"[{i}].scores: needs a list of finite numbers >= 0, found {scores!r:.60}')
        segments.append((check_text(segment["text"], f"{key}[{i}].text"), scores))
    return segments


def parse_messages(messages, key, role):
    """A list of {"role", "content"} -> [(role, text)]; a string is one message of the given role."""
    if isinstance(messages, str):
        messages = [{"role": role, "content": messages}]
    if not isinstance(messages, list):
        raise DataError(f'"{key}" must be a list of messages, found {type(messages).__name__}')
    for i, m in enumerate(messages):
        found = m.get("role") if isinstance(m, dict) else m
        if found not in list(TURN):
            raise DataError(f'"{key}"[{i}]: role must be system, user or assistant, found {found!r:.40}')
        check_text(m.get("content"), f"{key}[{i}].content")
    return [(m["role"], m["content"]) for m in messages]


def parse_chat(prompt, chosen, rejected):
    """Messages. The prompt is explicit, or the messages that both sides share, or both."""
    head = parse_messages([] if prompt is None else prompt, "prompt", "user")
    sides = [parse_messages(chosen, "chosen", "assistant"), parse_messages(rejected, "rejected", "assistant")]
    if head and all(side[:len(head)] == head for side in sides):  # the prompt stands in both sides again
        sides = [side[len(head):] for side in sides]
    elif not head or all(side and side[0][0] != "assistant" for side in sides):
        shared = os.path.commonprefix(sides)
        if len(shared) == min(map(len, sides)):  # equal conversations, or one that ends early
            shared = shared[:-1]
        sides = [side[len(shared):] for side in sides]
        head = shared if shared[len(shared) - len(head):] == head else head + shared
    for key, side in zip(("chosen", "rejected"), sides, strict=True):
        if side and side[0][0] != "assistant":
            raise DataError(f'"{key}": the response must start with an assistant turn, found {side[0][0]}')
    prompt, *sides = ("".join(TURN[role] + text for role, text in turns) for turns in (head, *sides))
    return prompt + ASSISTANT, *([(side.removeprefix(ASSISTANT), None)] for side in sides)


# ---------------------------------------------------------------------------------------------------------
# Text -> segments

UNIT = re.compile(r"""
    (?:```.*?(?:```|\Z) | ^~~~.*?(?:^~~~|\Z))             # a code fence, whole
  | (?P<line>(?:\A|\s*\n)\s*(?:\d{1,3}\.(?=\s))?)         # a new line, with a list item's number
  | \s+ | (?P<word>\w+)
  | (?P<stop>[.!?…。！？]+)(?P<close>[]"'”’»)}」』）】*_]*)(?=\s*(?P<next>\S?))
  | .""", re.VERBOSE | re.DOTALL | re.MULTILINE)
ABBREVIATIONS = {"Mr", "Mrs", "Ms", "Dr", "Prof", "St", "Jr", "Sr", "vs", "cf"}


def split_segments(text):
    """Sentences, lines and list items of a text, which join to it exactly; a code fence is kept whole.

    A sentence ends at . ! ? or ... before white space, at the CJK marks anywhere, quotes and brackets that
    close included; white space goes with the next segment. No end: an initial or one of ABBREVIATIONS,
    and an ellipsis, a closing quote or "etc." before a lower-case letter.
    """
    cuts, word = [0], ""
    for m in UNIT.finditer(text):
        if m["line"] is not None:
            cuts.append(m.start())
        elif m["stop"]:
            initial = len(word) == 1 and word.isascii() and word.isalpha() and word != "I"
            short = m["stop"] == "." and (initial or word in ABBREVIATIONS)
            weak = m["close"] or (m["stop"] != "." and not m["stop"].strip(".…")) or word == "etc"
            spaced = m.end() == len(text) or text[m.end()].isspace()
            cjk = set(m["stop"]) & set("。！？")
            if cjk or (spaced and not short and not (weak and m["next"].islower())):
                cuts.append(m.end())
        word = m["word"] or ""
    parts = [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True) if a < b]
    if len(parts) > 1 and not parts[-1].strip():  # white space at the very end has no next segment
        parts[-2:] = [parts[-2] + parts[-1]]
    return parts


# ---------------------------------------------------------------------------------------------------------
# Records -> token ids


@dataclass
class Pair:
    """One preference pair in token ids."""
    prompt: np.ndarray  # (P,)
    chosen: np.ndarray  # (C,), closed by end-of-text
    rejected: np.ndarray  # (R,)
    chosen_segment: np.ndarray  # (C,) segment of each token, from 0; all 0 where the text is not segmented
    rejected_segment: np.ndarray  # (R,)
    chosen_scores: np.ndarray  # (S_w, A), A = 0 where there are no scores
    rejected_scores: np.ndarray  # (S_l, A)
    where: str = ""  # file:line
    cut: int = 0  # tokens that the prompt lost at its front

    def __len__(self):
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def encode_response(tokenizer, segments):
    """Segments -> ids (N,), closed by end-of-text; the segment of each (N,); scores (S, A).

    The response is tokenised whole. A token belongs to the segment that holds its last byte; end-of-text
    joins the last segment.
    """
    ids = tokenizer.encode("".join(text for text, _ in segments))
    scores = np.array([scores or [] for _, scores in segments], dtype=np.float32)
    of_token = np.zeros(len(ids) + 1, dtype=np.int32)
    if len(segments) > 1:
        ends = np.cumsum([len(text.encode()) for text, _ in segments])  # the byte after each segment
        last_byte = np.cumsum([len(tokenizer.token_bytes[i]) for i in ids]) - 1
        of_token[:-1] = np.searchsorted(ends, last_byte, side="right")
        of_token[-1] = len(segments) - 1
    return np.array([*ids, tokenizer.eot], dtype=np.int32), of_token, scores


def encode_pair(tokenizer, prompt, chosen, rejected, block_size, where=""):
    """Texts -> Pair; UnusablePair for an empty, identical or too long response.

    Prompt and responses are tokenised apart. A response is never cut; a prompt keeps its last
    block_size - max(C, R) tokens; an empty prompt becomes one end-of-text, which is not scored.
    """
    texts = ["".join(text for text, _ in side) for side in (chosen, rejected)]
    if not texts[0].strip() or not texts[1].strip():
        raise UnusablePair("an empty response")
    if texts[0] == texts[1]:
        raise UnusablePair("identical responses")
    sides = (encode_response(tokenizer, side) for side in (chosen, rejected))
    ids, segments, scores = zip(*sides, strict=True)
    room = block_size - max(map(len, ids))
    if room <= 0:
        raise UnusablePair(f"a response that does not fit block_size {block_size}")
    prompt = np.array(tokenizer.encode(prompt) or [tokenizer.eot], dtype=np.int32)
    return Pair(prompt[-room:], *ids, *segments, *scores, where, cut=max(0, len(prompt) - room))


@dataclass
class Pairs:
    """Pairs in flat arrays: memory is linear in the ids, and no Python object per token is kept.

    A data set in which some pair has no scores counts as unscored: n_aspects is 0.
    """
    ids: np.ndarray  # (tokens,) of all pairs: prompt, chosen, rejected
    segments: np.ndarray  # (segments,) tokens of each segment of all pairs: chosen, rejected
    scores: np.ndarray  # (segments, A)
    rows: np.ndarray  # (n, 7), of a pair: its place in ids, P, C, R; its place in segments, S_w, S_l
    where: list  # (n,) file:line

    def __post_init__(self):
        self.lengths = self.rows[:, 1:4].sum(-1)  # (n,) P + C + R
        self.n_aspects = self.scores.shape[-1]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        """The i-th Pair."""
        at, P, C, R, k, S_w, S_l = self.rows[i].tolist()
        prompt, chosen, rejected = np.split(self.ids[at:at + P + C + R], [P, P + C])
        sizes, scores = self.segments[k:k + S_w + S_l], self.scores[k:k + S_w + S_l]
        return Pair(prompt, chosen, rejected, np.repeat(np.arange(S_w), sizes[:S_w]),
                    np.repeat(np.arange(S_l), sizes[S_w:]), scores[:S_w], scores[S_w:], self.where[i])

    def select(self, index):
        """The pairs of an index array; the ids are shared."""
        return replace(self, rows=self.rows[index], where=[self.where[i] for i in index])

    def chosen_only(self):
        """The pairs without their rejected responses: rows of SFT."""
        return replace(self, rows=self.rows * [1, 1, 1, 0, 1, 1, 0])

    def score_maximum(self):
        """The largest score of each aspect, (A,); 1 where an aspect is 0 throughout."""
        top = np.max([self.scores[k:k + S_w + S_l].max(0) for k, S_w, S_l in self.rows[:, 4:]], axis=0)
        return np.where(top > 0, top, 1).astype(np.float32)


def pack(pairs):
    """An iterable of Pair -> Pairs."""
    ids, segments, scores, rows, where, aspects = array("i"), array("i"), array("f"), array("q"), [], set()
    for p in pairs:
        rows.extend([len(ids), len(p.prompt), len(p.chosen), len(p.rejected),
                     len(segments), len(p.chosen_scores), len(p.rejected_scores)])
        for part in (p.prompt, p.chosen, p.rejected):
            ids.frombytes(part.tobytes())
        for segment, score in ((p.chosen_segment, p.chosen_scores), (p.rejected_segment, p.rejected_scores)):
            segments.extend(np.bincount(segment, minlength=len(score)).tolist())
            scores.frombytes(score.tobytes())
        aspects.add(p.chosen_scores.shape[-1])
        where.append(p.where)
    if len(aspects) > 1:
        aspects, scores = {0}, array("f")
    return Pairs(np.array(ids), np.array(segments), np.array(scores).reshape(len(segments), *aspects),
                 np.array(rows).reshape(-1, 7), where)


def load(paths, tokenizer, block_size, store=None):
    """Read, check and tokenise data files -> (Pairs, lines to print).

    store: a folder that keeps the result, under a hash of all that determines it (this file, the data files
    and their names, tokenizer, block size), for the next start. A stored file whose own bytes have changed is
    written again. Raises DataError that lists the first ten malformed records as `file:line: what`.
    """
    files = list_files(paths)
    if store is None:
        return read_pairs(files, tokenizer, block_size)
    store = Path(store)
    key = [[str(f), file_hash(f)] for f in files], tokenizer.hash, block_size, file_hash(__file__)
    name = f"pairs-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
    arrays = ("ids", "segments", "scores", "rows")
    for path in store.glob(f"{name}-*.safetensors"):  # the second half of the name is the file's own hash
        if path.stem == f"{name}-{file_hash(path)[:16]}":
            with safetensors.safe_open(path, "pt") as f:  # torch maps the file into memory
                where, notes = json.loads(f.metadata()["about"])
                return Pairs(*(f.get_tensor(x).numpy() for x in arrays), where), notes
    pairs, notes = read_pairs(files, tokenizer, block_size)
    aside = store / f".{name}-{os.getpid()}"
    try:
        store.mkdir(parents=True, exist_ok=True)
        save_file({x: getattr(pairs, x) for x in arrays}, aside, {"about": json.dumps([pairs.where, notes])})
        os.replace(aside, store / f"{name}-{file_hash(aside)[:16]}.safetensors")
    except (OSError, safetensors.SafetensorError) as e:
        if store.is_dir():
            aside.unlink(missing_ok=True)
        raise DataError(f"{store}: cannot keep the tokenised data there ({e})") from None
    return pairs, notes


def file_hash(path):
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None


def read_pairs(files, tokenizer, block_size):
    """What `load` does when nothing is stored."""
    malformed, notes, ignored, widths = [], [], Counter(), Counter()

    def usable_pairs(path):
        kept, cut, forms, dropped = 0, 0, set(), {}
        for where, record in read_records(path):
            try:
                form, *texts = parse_record(record)
                pair = encode_pair(tokenizer, *texts, block_size, where)
                A = pair.chosen_scores.shape[-1]
                if A and (others := widths.keys() - {0, A}):
                    raise DataError(f"{A} scores a segment here, {others.pop()} before")
            except UnusablePair as e:
                dropped.setdefault(str(e), []).append(where.removeprefix(f"{path}:").strip())
            except DataError as e:
                malformed.append(f"{where}: {e}")
            else:
                ignored.update(record.keys() - KEYS)
                forms.add(form)
                widths[A] += 1
                kept, cut = kept + 1, cut + (pair.cut > 0)
                yield pair
        rules = ", ".join(f"{form} ({FORMS[form]})" for form in sorted(forms)) or "no usable pair"
        lost = "; ".join(f"{len(lines)} with {reason} ({', '.join(lines[:3])}{', ...' * (len(lines) > 3)})"
                         for reason, lines in dropped.items())
        notes.append(f"{path}: {rules}: {kept} pairs"
                     + f", {sum(map(len, dropped.values()))} dropped: {lost}" * bool(lost)
                     + f", {cut} prompts cut at the front to fit block_size {block_size}" * bool(cut))

    pairs = pack(pair for path in files for pair in usable_pairs(path))
    if malformed:
        more = f"\n... and {len(malformed) - 10} more" * (len(malformed) > 10)
        raise DataError("\n".join(malformed[:10]) + more)
    if not len(pairs):
        raise DataError("\n".join(notes) + "\nno pair is left to train on")
    if len(widths) > 1:
        notes.append(f"scores are ignored: {widths[0]} of {len(pairs)} pairs have none")
    if ignored:
        keys = ", ".join(f"{key!r} ({n} times)" for key, n in sorted(ignored.items()))
        notes.append(f"ignored keys: {keys}")
    return pairs, notes


# ---------------------------------------------------------------------------------------------------------
# Which pairs, in which order


def hold_out(pairs, fraction=0.1, at_most=256):
    """Split into (training, held-out) pairs by a hash of the prompt: no prompt stands on both sides.

    The same data give the same split, whatever their order. A data set with one prompt is split by pair.
    """
    edges = pairs.rows[:, :4].cumsum(-1)  # in ids, of prompt, chosen, rejected, end
    by = [hashlib.sha256(pairs.ids[a:b]).digest() for a, b in edges[:, [0, 1]]]
    if len(set(by)) == 1:
        by = [hashlib.sha256(pairs.ids[a:b]).digest() for a, b in edges[:, [1, 3]]]
    if len(set(by)) == 1:
        raise DataError(f"{pairs.where[0]}: too few pairs to hold some out; pass --val_data")
    counts, held, n = Counter(by), set(), 0
    for key in sorted(counts)[:-1]:
        if held and n >= min(fraction * len(pairs), at_most):
            break
        held.add(key)
        n += counts[key]
    is_held = np.array([key in held for key in by])
    return pairs.select(np.flatnonzero(~is_held)), pairs.select(np.flatnonzero(is_held))


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def step_indices(n, batch_size, seed, step):
    """The pairs of optimizer step 0, 1, ...: a pure function of (seed, step); an epoch is a permutation."""
    epoch, at = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    return np.concatenate([permutation(n, seed, e)[at[epoch == e]] for e in np.unique(epoch).tolist()])


def micro_batches(pairs, index, size, tokens=10**9):
    """Cut the pairs of a step into micro-batches, longest first: less padding, the same gradient. Each holds
    at most so many pairs, and so many tokens with their padding, or one pair."""
    index, micros = index[np.argsort(-pairs.lengths[index], kind="stable")], []
    while len(index):
        n = max(1, min(size, tokens // pairs.lengths[index[0]]))  # the longest row comes first
        micros.append(index[:n])
        index = index[n:]
    return micros


# ---------------------------------------------------------------------------------------------------------
# Pairs -> Batch

PROMPT, CHOSEN, REJECTED, PADDING = range(4)  # branches of a row


@dataclass
class Batch:
    """B pairs, one row each, and their response tokens listed flat: pair by pair, chosen then rejected."""
    tokens: torch.Tensor  # (B, T)
    positions: torch.Tensor  # (B, T), both responses continue from the prompt
    branch: torch.Tensor  # (B, T), PROMPT, CHOSEN, REJECTED or PADDING
    source: torch.Tensor  # (2, N), row and column of the hidden state that predicts each response token
    target: torch.Tensor  # (N,), that token
    response: torch.Tensor  # (N,), 2 b for the chosen response of pair b, 2 b + 1 for the rejected one
    segment: torch.Tensor  # (N,), response * S + k for a token of segment k
    scores: torch.Tensor  # (B, 2, S, A), chosen and rejected; 0 where there is no segment
    segment_mask: torch.Tensor  # (B, 2, S), True where a segment has a token
    starts: list  # B + 1 offsets: pair b owns response tokens starts[b] ... starts[b + 1] - 1

    def __len__(self):
        return len(self.tokens)

    def to(self, device):
        moved = {f.name: move(getattr(self, f.name), device) for f in fields(self)[:-1]}
        return Batch(**moved, starts=self.starts)

    def mask(self):
        """(B, 1, T, T), True where token q may attend to k: the prompt and the own branch, never ahead."""
        T = self.tokens.shape[-1]
        branch_q, branch_k = self.branch[:, None, :, None], self.branch[:, None, None, :]
        causal = torch.ones(T, T, dtype=torch.bool, device=self.tokens.device).tril()
        return causal & ((branch_k == PROMPT) | (branch_k == branch_q))

    def chunks(self, max_tokens):
        """(first, end) of runs of whole pairs that have at most max_tokens response tokens, or one pair."""
        first = 0
        while first < len(self):
            end = first + 1
            while end < len(self) and self.starts[end + 1] - self.starts[first] <= max_tokens:
                end += 1
            yield first, end
            first = end


def move(tensor, device):
    """To a device; from pinned memory, so that a copy to a GPU runs beside its kernels."""
    return tensor if str(device) == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def collate(pairs, multiple=1):
    """Pairs -> Batch. T is the longest row, rounded up to a multiple.

        row        [ prompt 0 ... P-1 | chosen P ... P+C-1 | rejected P ... P+R-1 | padding 0 ]   (positions)
        predicted by    column P-1, then the columns of the response itself but its last
    """
    T = math.ceil(max(map(len, pairs)) / multiple) * multiple
    S = max(max(len(p.chosen_scores), len(p.rejected_scores)) for p in pairs)
    A = pairs[0].chosen_scores.shape[-1]
    tokens, positions = np.zeros((2, len(pairs), T), dtype=np.int64)
    branch = np.full((len(pairs), T), PADDING)
    scores = np.zeros((len(pairs), 2, S, A), dtype=np.float32)
    segment_mask = np.zeros((len(pairs), 2, S), dtype=bool)
    row, column, target, response, segment, starts = [], [], [], [], [], [0]
    for b, p in enumerate(pairs):
        P, C, R = len(p.prompt), len(p.chosen), len(p.rejected)
        tokens[b, :P + C + R] = np.concatenate([p.prompt, p.chosen, p.rejected])
        positions[b, :P + C + R] = np.r_[:P, P:P + C, P:P + R]
        branch[b, :P + C + R] = np.repeat([PROMPT, CHOSEN, REJECTED], [P, C, R])
        row.append(np.full(C + R, b))
        column += [np.r_[P - 1, P:P + C - 1][:C], np.r_[P - 1, P + C:P + C + R - 1][:R]]  # the shift by one
        target += [p.chosen, p.rejected]
        response.append(np.repeat([2 * b, 2 * b + 1], [C, R]))
        segment += [2 * b * S + p.chosen_segment, (2 * b + 1) * S + p.rejected_segment]
        scores[b, 0, :len(p.chosen_scores)] = p.chosen_scores
        scores[b, 1, :len(p.rejected_scores)] = p.rejected_scores
        segment_mask[b, 0, p.chosen_segment] = True  # of a segment that owns a token
        segment_mask[b, 1, p.rejected_segment] = True
        starts.append(starts[-1] + C + R)
    flat = [torch.from_numpy(np.concatenate(x).astype(np.int64)) for x in (target, response, segment)]
    source = torch.from_numpy(np.stack([np.concatenate(row), np.concatenate(column)]).astype(np.int64))
    grids = [torch.from_numpy(x) for x in (tokens, positions, branch)]
    return Batch(*grids, source, *flat, torch.from_numpy(scores), torch.from_numpy(segment_mask), starts)
