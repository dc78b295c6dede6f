"""What people's files look like -> (prompt, chosen, rejected); texts -> sentences.

A response is a list of segments, (text, scores or None), that join to its text.
"""

import json
import os
import re
from collections import Counter
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data import DataError, UnusablePair, encode_pairs, pack
from plumbing.files import read_bytes, read_json_data

AT_ONCE = 1000  # records that are tokenised together


# ---------------------------------------------------------------------------------------------------------
# Files -> records


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
        items = read_json_data(path)
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
# Files -> Pairs


def load(paths, tokenizer, block_size):
    """Read, check and tokenise data files -> (Pairs, lines to print).

    Raises DataError that lists the first ten malformed records as `file:line: what`.
    """
    malformed, notes, ignored, widths = [], [], Counter(), Counter()

    def usable_pairs(path):
        kept, cut, forms, dropped = 0, 0, set(), {}
        for parsed in in_groups(parse_records(path, malformed, forms, ignored)):
            for (where, *_), pair in zip(parsed, encode_pairs(tokenizer, parsed, block_size), strict=True):
                if isinstance(pair, UnusablePair):
                    dropped.setdefault(str(pair), []).append(where.removeprefix(f"{path}:").strip())
                    continue
                A = pair.chosen_scores.shape[-1]
                if A and (others := widths.keys() - {0, A}):
                    malformed.append(f"{where}: {A} scores a segment here, {others.pop()} before")
                    continue
                widths[A] += 1
                kept, cut = kept + 1, cut + (pair.cut > 0)
                yield pair
        rules = ", ".join(f"{form} ({FORMS[form]})" for form in sorted(forms)) or "no usable pair"
        note = f"{path}: {rules}: {kept} pairs"
        if dropped:
            note += f", {sum(map(len, dropped.values()))} dropped: " + "; ".join(
                f"{len(lines)} with {reason} ({', '.join(lines[:3])}{', ...' if len(lines) > 3 else ''})"
                for reason, lines in dropped.items())
        if cut:
            note += f", {cut} prompts cut at the front to fit block_size {block_size}"
        notes.append(note)

    pairs = pack(pair for path in list_files(paths) for pair in usable_pairs(path))
    if malformed:
        more = [f"... and {len(malformed) - 10} more"] if len(malformed) > 10 else []
        raise DataError("\n".join(malformed[:10] + more))
    if not len(pairs):
        raise DataError("\n".join(notes) + "\nno pair is left to train on")
    if len(widths) > 1:
        notes.append(f"scores are ignored: {widths[0]} of {len(pairs)} pairs have none")
    if ignored:
        keys = ", ".join(f"{key!r} ({n} times)" for key, n in sorted(ignored.items()))
        notes.append(f"ignored keys: {keys}")
    return pairs, notes


def parse_records(path, malformed, forms, ignored):
    """(where, prompt, chosen, rejected) of each record of a file; the rest goes into the three lists."""
    for where, record in read_records(path):
        try:
            form, *texts = parse_record(record)
        except DataError as e:
            malformed.append(f"{where}: {e}")
        else:
            ignored.update(record.keys() - KEYS)
            forms.add(form)
            yield where, *texts


def in_groups(items):
    """An iterable in lists of AT_ONCE items."""
    items = iter(items)
    while group := list(islice(items, AT_ONCE)):
        yield group
