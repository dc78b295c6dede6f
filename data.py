"""From a line of JSONL to the tensors of a step. Needs torch, tiktoken and numpy; imports nothing of ours.

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
import zlib
from array import array
from collections import Counter
from copy import copy
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm


class DataError(ValueError):
    """Malformed input: the message says what, where (file:line) and what to do."""


class UnusablePair(DataError):
    """A well-formed pair that cannot be trained on: it is dropped and counted, by this reason."""


# ---------------------------------------------------------------------------------------------------------
# Tokenizer

EOT = "<|endoftext|>"
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's pattern


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
            ranks, eot = {bytes([b]): b for b in range(256)}, 256
        elif self.name == "gpt2":
            ranks, eot = read_gpt2()
        elif path.suffix == ".tiktoken":
            ranks, eot = read_tiktoken(path)
        else:
            ranks, eot = read_folder(path)
        self.ranks, self.eot = ranks, eot
        self.vocab_size = max(eot, *ranks.values()) + 1
        special = {EOT: eot}
        self.bpe = tiktoken.Encoding(self.name, pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
        self.token_bytes = {rank: token for token, rank in ranks.items()} | {eot: EOT.encode()}
        listing = repr((sorted(ranks.items()), eot))
        self.hash = hashlib.sha256(listing.encode()).hexdigest()

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
        text = json.dumps(vocab | {EOT: self.eot}, ensure_ascii=False)
        (folder / "vocab.json").write_text(text, encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
        config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": EOT, "eos_token": EOT, "unk_token": EOT}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_gpt2():
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except Exception as e:  # requests' own errors, and requests is not ours to import
        raise DataError(f"tokenizer gpt2: not in tiktoken's cache, no download ({type(e).__name__}); pass "
                        "a folder with encoder.json and vocab.bpe, or set TIKTOKEN_CACHE_DIR") from None
    return dict(bpe._mergeable_ranks), bpe.eot_token


def read_tiktoken(path):
    """tiktoken caches local files by path and would not notice a rewrite, so they are read here."""
    ranks = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{path}:{number}: not a line of a .tiktoken file (base64 token, rank)") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{path}: ranks must be 0 to {len(ranks) - 1}, each once")
    return check_bytes(path, ranks), len(ranks)


def read_folder(folder):
    """The vocabulary of a folder: {token: id}, and end-of-text's id. Ids order the merges, as in GPT-2."""
    for vocab_file, merges_file in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocab_file).exists() and (folder / merges_file).exists():
            vocab = read_json(folder / vocab_file)
            lines = read_bytes(folder / merges_file).decode("utf-8", errors="replace").split("\n")
            merges = [line.split() for line in lines if line and not line.startswith("#version")]
            return check_merges(folder / vocab_file, vocab, merges)
    if (folder / "tokenizer.json").exists():
        path = folder / "tokenizer.json"
        try:
            bpe = read_json(path)
            kind = bpe["model"]["type"], bpe["normalizer"], bpe["pre_tokenizer"]["type"]
            if kind != ("BPE", None, "ByteLevel"):
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
    """tiktoken merges in the order of ids; refuse a vocabulary whose merges come in another order."""
    byte_of = byte_characters()
    try:
        eot = vocab[EOT]
        ranks = {bytes(byte_of[c] for c in token): int(i) for token, i in vocab.items() if token != EOT}
        merged = [ranks[bytes(byte_of[c] for c in left + right)] for left, right in merges]
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"{path}: not a vocabulary of GPT-2's kind ({type(e).__name__}: {e})") from None
    if merged != sorted(rank for token, rank in ranks.items() if len(token) > 1):
        raise DataError(f"{path}: its ids do not follow its merges, as GPT-2's do")
    return check_bytes(path, ranks), eot


def check_bytes(path, ranks):
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise DataError(f"{path}: {len(missing)} single bytes are missing; not every text could be encoded")
    return ranks


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
    """Data files; a folder stands for the .jsonl, .jsonl.gz and .json files in it."""
    files = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith((".jsonl", ".jsonl.gz", ".json")))
            if not found:
                raise DataError(f"{path}: a folder without .jsonl, .jsonl.gz or .json files")
        files += found
    return files


def read_records(path):
    """(where, record) of each line of a .jsonl(.gz) file or item of a .json array; where is "file:line".

    A line that is not JSON is yielded with a DataError in place of the record, so that all can be listed.
    """
    if Path(path).suffix == ".json":
        items = read_json(path)
        if not isinstance(items, list):
            raise DataError(f"{path}: a .json file must hold an array of pairs (one pair a line is .jsonl)")
        yield from ((f"{path}: item {i}", item) for i, item in enumerate(items, 1))
        return
    for number, line in enumerate(read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                record = DataError("not UTF-8")
            except (ValueError, RecursionError) as e:
                record = DataError(f"not JSON ({e})")
            yield f"{path}:{number}", record


# ---------------------------------------------------------------------------------------------------------
# Record -> (form, prompt, chosen, rejected); a response is a list of (text, scores or None)

FORMS = {
    "pairs": "prompt as it stands",
    "HH transcripts": "prompt = common prefix up to its last Assistant turn",
    "chat messages": "rendered as Human/Assistant turns",
    "instructions": "rendered as one Human turn",
}
TURN = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
ASSISTANT = "\n\nAssistant:"  # a prompt ends here, a response starts with the space


def parse_record(record):
    """Recognise the form of a record by its keys."""
    if not isinstance(record, dict):
        raise DataError(f"expected an object, found {type(record).__name__}")
    for key in ("chosen", "rejected"):
        if key not in record:
            raise DataError(f'key "{key}" is missing')
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if is_messages(chosen) or is_messages(rejected) or isinstance(prompt, list):
        return "chat messages", *parse_chat(prompt, chosen, rejected)
    if "instruction" in record:
        text = "\n".join(filter(None, (check_text(record.get(k) or "", k) for k in ("instruction", "input"))))
        prompt = TURN["user"] + text + ASSISTANT
        chosen, rejected = (" " + check_text(record[k], k) for k in ("chosen", "rejected"))
        return "instructions", prompt, [(chosen, None)], [(rejected, None)]
    if prompt is None:
        chosen, rejected = check_text(chosen, "chosen"), check_text(rejected, "rejected")
        end = os.path.commonprefix([chosen, rejected]).rfind(ASSISTANT) + len(ASSISTANT)
        if end < len(ASSISTANT):
            raise DataError('no "prompt", and no "\\n\\nAssistant:" shared by both sides (HH transcripts)')
        return "HH transcripts", chosen[:end], [(chosen[end:], None)], [(rejected[end:], None)]
    sides = parse_response(chosen, "chosen"), parse_response(rejected, "rejected")
    if len(counts := {len(scores or []) for side in sides for _, scores in side}) > 1:
        raise DataError(f"a segment with {min(counts)} scores and one with {max(counts)} in one pair")
    return "pairs", check_text(prompt, "prompt"), *sides


def check_text(text, key):
    if not isinstance(text, str):
        raise DataError(f'"{key}" must be a string, found {type(text).__name__}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f'"{key}" holds a lone surrogate, which is no character') from None
    return text


def parse_response(response, key):
    """A string, or a list of {"text", "scores"} that join to the response."""
    if isinstance(response, str):
        return [(check_text(response, key), None)]
    if not isinstance(response, list):
        raise DataError(f'"{key}" must be a string or a list of segments, found {type(response).__name__}')
    segments = []
    for i, segment in enumerate(response):
        if not isinstance(segment, dict) or "text" not in segment:
            raise DataError(f'"{key}"[{i}] must be an object with "text" and "scores"')
        segments.append((check_text(segment["text"], f"{key}[{i}].text"), segment.get("scores")))
        scores = segments[-1][1]
        if scores is None:
            continue
        numbers = isinstance(scores, list) and all(type(x) in (int, float) for x in scores)
        if not numbers or not scores or not all(math.isfinite(x) and x >= 0 for x in scores):
            raise DataError(f'"{key}"[{i}].scores: needs a list of finite numbers >= 0, found {scores!r:.60}')
    return segments


def is_messages(x):
    return isinstance(x, list) and any(isinstance(m, dict) and "role" in m for m in x)


def parse_chat(prompt, chosen, rejected):
    """Messages: prompt explicit (a list, or a string for one user turn), or the messages both sides share."""
    for key, messages in (("prompt", prompt or []), ("chosen", chosen), ("rejected", rejected)):
        if key == "prompt" and isinstance(messages, str):
            continue
        if not isinstance(messages, list):
            raise DataError(f'"{key}" must be a list of messages, found {type(messages).__name__}')
        for i, m in enumerate(messages):
            if not isinstance(m, dict) or m.get("role") not in TURN:
                role = m.get("role") if isinstance(m, dict) else m
                raise DataError(f'"{key}"[{i}]: role must be system, user or assistant, found {role!r:.40}')
            check_text(m.get("content"), f"{key}[{i}].content")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": check_text(prompt, "prompt")}]
    turns = [[(m["role"], m["content"]) for m in messages] for messages in (prompt or [], chosen, rejected)]
    head, *sides = turns
    if head and all(side[:len(head)] == head for side in sides):  # the prompt stands in both sides again
        sides = [side[len(head):] for side in sides]
    if not head:
        head = os.path.commonprefix(sides)
        if len(head) == min(map(len, sides)):  # equal conversations, or one that ends early
            head = head[:-1]
        sides = [side[len(head):] for side in sides]
    for key, side in zip(("chosen", "rejected"), sides, strict=True):
        if side and side[0][0] != "assistant":
            raise DataError(f'"{key}": the response must start with an assistant turn, found {side[0][0]}')
    head, *sides = ("".join(TURN[role] + content for role, content in turns) for turns in (head, *sides))
    chosen, rejected = (side.removeprefix(ASSISTANT) for side in sides)
    return head + ASSISTANT, [(chosen, None)], [(rejected, None)]


# ---------------------------------------------------------------------------------------------------------
# Records -> token ids, in flat arrays


@dataclass
class Pair:
    """One preference pair in token ids; views into the arrays of `Pairs`."""
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

    def chosen_only(self):
        """The pair without its rejected response: a row of SFT."""
        return replace(self, rejected=self.rejected[:0], rejected_segment=self.rejected_segment[:0],
                       rejected_scores=self.rejected_scores[:0])


def segment_of_tokens(texts, token_lengths):
    """The segment that holds each token's last byte, (N,); end-of-text, the N-th, joins the last segment.

    Args: texts, which join to the response; token_lengths (N - 1,), bytes.
    """
    ends = np.cumsum([len(text.encode()) for text in texts])  # byte after each segment
    last_byte = np.cumsum(token_lengths) - 1
    return np.append(np.searchsorted(ends, last_byte, side="right"), len(texts) - 1)


def encode_pair(tokenizer, prompt, chosen, rejected, block_size, where=""):
    """Texts -> Pair; UnusablePair for an empty, identical or too long response.

    Prompt and responses are tokenised apart. A response is never cut; a prompt keeps its last
    block_size - max(C, R) tokens; an empty prompt becomes one end-of-text, which is not scored.
    """
    texts = ["".join(text for text, _ in side) for side in (chosen, rejected)]
    if not texts[0].strip() or not texts[1].strip():
        raise UnusablePair("empty response")
    if texts[0] == texts[1]:
        raise UnusablePair("identical responses")
    ids, segments, scores = [], [], []
    for text, side in zip(texts, (chosen, rejected), strict=True):
        tokens = tokenizer.encode(text)
        lengths = [len(tokenizer.token_bytes[t]) for t in tokens]
        ids.append(np.array([*tokens, tokenizer.eot], dtype=np.int32))
        segments.append(segment_of_tokens([t for t, _ in side], lengths).astype(np.int32))
        scores.append(np.array([s or [] for _, s in side], dtype=np.float32).reshape(len(side), -1))
    room = block_size - max(len(ids[0]), len(ids[1]))
    if room <= 0:
        raise UnusablePair(f"response does not fit block_size {block_size}")
    prompt_ids = np.array(tokenizer.encode(prompt) or [tokenizer.eot], dtype=np.int32)
    return Pair(prompt_ids[-room:], *ids, *segments, *scores, where, cut=max(0, len(prompt_ids) - room))


class Pairs:
    """Pairs in flat arrays: memory is linear in the ids, and no Python object per token or pair is kept.

    A dataset in which some pair has no scores counts as unscored: n_aspects is 0.
    """

    def __init__(self, pairs):
        ids, segments, scores, rows, self.where = array("i"), array("i"), array("f"), array("q"), []
        aspects = set()
        for p in pairs:
            rows.extend([len(ids), len(p.prompt), len(p.chosen), len(p.rejected), len(scores),
                         len(p.chosen_scores), len(p.rejected_scores)])
            ids.frombytes(np.concatenate([p.prompt, p.chosen, p.rejected], dtype=np.int32).tobytes())
            segments.frombytes(np.concatenate([0 * p.prompt, p.chosen_segment, p.rejected_segment],
                                              dtype=np.int32).tobytes())
            scores.frombytes(np.concatenate([p.chosen_scores, p.rejected_scores], dtype=np.float32).tobytes())
            aspects.add(p.chosen_scores.shape[-1])
            self.where.append(p.where)
        self.n_aspects = aspects.pop() if len(aspects) == 1 else 0
        self.ids, self.segments = (np.frombuffer(x, np.int32) for x in (ids, segments))
        self.scores = np.array(scores, dtype=np.float32)
        self.rows = np.array(rows, dtype=np.int64).reshape(-1, 7)
        self.lengths = self.rows[:, 1:4].sum(-1)  # (n,) P + C + R

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        """The i-th Pair."""
        at, P, C, R, score_at, S_w, S_l = self.rows[i].tolist()
        prompt, chosen, rejected = np.split(self.ids[at:at + P + C + R], [P, P + C])
        _, chosen_segment, rejected_segment = np.split(self.segments[at:at + P + C + R], [P, P + C])
        A = self.n_aspects
        scores = self.scores[score_at:score_at + (S_w + S_l) * A].reshape(S_w + S_l, A)
        return Pair(prompt, chosen, rejected, chosen_segment, rejected_segment, scores[:S_w], scores[S_w:],
                    self.where[i])

    def select(self, index):
        """The pairs of an index array; the ids are shared."""
        part = copy(self)
        part.rows, part.lengths = self.rows[index], self.lengths[index]
        part.where = [self.where[i] for i in index]
        return part

    def score_maximum(self):
        """The largest score of each aspect, (A,); 1 where an aspect is 0 throughout."""
        tops = [np.concatenate([p.chosen_scores, p.rejected_scores]).max(0) for p in self]
        top = np.max(tops, axis=0)
        return np.where(top > 0, top, 1).astype(np.float32)


def load(paths, tokenizer, block_size):
    """Read, check and tokenise data files -> (Pairs, lines to print).

    Raises DataError that lists the first ten malformed records as `file:line: what`.
    """
    malformed, notes, ignored, aspects = [], [], Counter(), set()

    def read(path):
        kept, cut, forms, dropped = 0, 0, set(), {}
        for where, record in tqdm(read_records(path), f"reading {path}", unit=" pairs", delay=2, leave=False):
            try:
                if isinstance(record, DataError):
                    raise record
                form, *texts = parse_record(record)
                pair = encode_pair(tokenizer, *texts, block_size, where)
                aspects.update({pair.chosen_scores.shape[-1]} - {0})
                if len(aspects) > 1:
                    raise DataError(f"{aspects.pop()} scores a segment here, {aspects.pop()} elsewhere")
            except UnusablePair as e:
                dropped.setdefault(str(e), []).append(where.rpartition(":")[2].strip())
            except DataError as e:
                malformed.append(f"{where}: {e}")
            else:
                ignored.update(record.keys() - {"prompt", "chosen", "rejected", "instruction", "input"})
                forms.add(form)
                kept, cut = kept + 1, cut + (pair.cut > 0)
                yield pair
        rules = ", ".join(f"{form} ({FORMS[form]})" for form in sorted(forms)) or "no usable pair"
        lost = "; ".join(f"{len(lines)} {reason} ({', '.join(lines[:3])}{', ...' * (len(lines) > 3)})"
                         for reason, lines in dropped.items())
        notes.append(f"{path}: {rules}: {kept} pairs"
                     + f", {sum(map(len, dropped.values()))} dropped: {lost}" * bool(lost)
                     + f", {cut} prompts cut at the front to fit block_size {block_size}" * bool(cut))

    pairs = Pairs(pair for path in list_files(paths) for pair in read(path))
    if malformed:
        more = f"\n... and {len(malformed) - 10} more" * (len(malformed) > 10)
        raise DataError("\n".join(malformed[:10]) + more)
    if not len(pairs):
        raise DataError("\n".join(notes) + "\nno pair is left to train on")
    if ignored:
        notes.append("ignored keys: " + ", ".join(f"{key} ({n} times)" for key, n in sorted(ignored.items())))
    return pairs, notes


# ---------------------------------------------------------------------------------------------------------
# Which pairs, in which order


def hold_out(pairs, fraction=0.1, at_most=256):
    """Split into (training, held-out) pairs by a hash of the prompt: no prompt stands on both sides.

    The same data give the same split, whatever their order. A data set with one prompt is split by pair.
    """
    keys = [hashlib.sha256(p.prompt.tobytes()).digest() for p in pairs]
    if len(set(keys)) == 1:
        keys = [hashlib.sha256(p.chosen.tobytes() + p.rejected.tobytes()).digest() for p in pairs]
    if len(set(keys)) == 1:
        raise DataError(f"{pairs.where[0]}: too few pairs to hold some out; pass --val_data")
    counts, wanted, held = Counter(keys), min(fraction * len(pairs), at_most), set()
    for key in sorted(counts)[:-1]:
        if held and sum(counts[k] for k in held) >= wanted:
            break
        held.add(key)
    is_held = np.array([key in held for key in keys])
    return pairs.select(np.flatnonzero(~is_held)), pairs.select(np.flatnonzero(is_held))


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def step_indices(n, batch_size, seed, step):
    """The pairs of optimizer step 0, 1, ...: a pure function of (seed, step); an epoch is a permutation."""
    epoch, at = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    return np.concatenate([permutation(n, seed, e)[at[epoch == e]] for e in np.unique(epoch)])


def micro_batches(pairs, index, size):
    """Cut the pairs of a step into micro-batches, longest first: less padding, the same gradient."""
    index = index[np.argsort(-pairs.lengths[index], kind="stable")]
    return [index[i:i + size] for i in range(0, len(index), size)]


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
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)[:-1]}
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
