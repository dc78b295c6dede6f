"""The one format of data, JSON lines (.jsonl, .jsonl.gz), read strictly. A record is one of

    {"prompt": "text as it stands", "chosen": "...", "rejected": "..."}
    {"prompt": [{"role": "user", "content": "..."}, ...], "chosen": "...", "rejected": "..."}
    {"prompt": ..., "chosen": [{"text": "First.", "scores": [4, 3]}, ...], "rejected": [...]}
    {"prompt": ..., "chosen": "..."}                                      for --loss sft alone

and may have an "id", text or a whole number, which messages name. Roles are system, user, assistant; the last
message is the user's. Any other key, at any depth, is an error: tools/convert.py converts other forms.
"""

import json
import os
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from plumbing.errors import DataError
from plumbing.files import read_bytes
from plumbing.vocab import EOT

class OtherForm(DataError):
    """A record that tools/convert.py may convert."""

def files_of(paths):
    """Files of the one format."""
    for path in (files := [Path(path) for path in paths]):
        if not os.path.isfile(path):
            raise DataError(f"{path}: " + ("a folder; name the files that are meant" if os.path.isdir(path)
                                           else "No such file or directory"))
        if not path.name.lower().endswith((".jsonl", ".jsonl.gz")):
            raise DataError(f"{path}: not the format that is read, .jsonl; {how_to_convert(path)}")
    return files

def how_to_convert(path):
    out = Path(path).with_name(Path(path).name.partition(".")[0] + "-pairs.jsonl")
    return "convert it: " + shlex.join(["python", "tools/convert.py", str(path), "--out", str(out)])

def lines_of(path, content):
    """(":line number", line) of each line that is not empty. U+2028 may stand in JSON and ends no line."""
    try:
        lines = enumerate(content.decode("utf-8-sig").split("\n"), 1)
    except UnicodeDecodeError as e:
        raise DataError(f"{path}:{content[:e.start].count(10) + 1}: not UTF-8") from None
    bar = tqdm(lines, f"reading {path}", delay=2, leave=False, disable=None if sys.stderr else True)
    return ((f":{i}", line) for i, line in bar if line.strip())

def parse_json(text):
    """The value of JSON in which no object has a key twice. DataError for anything else."""
    def once(items):
        if len(dict(items)) < len(items):
            twice = Counter(key for key, _ in items).most_common(1)[0][0]
            raise ValueError(f"the key {json.dumps(twice)} twice")
        return dict(items)
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        raise DataError(f"not JSON ({e})") from None

def read(path, malformed, alone=False):
    """Yield (where, prompt, chosen, rejected) of each record: "file:line" and its id, text or messages, lists
    of segments (text, scores or None). alone: for SFT; one segment without scores, and rejected is None.
    What is malformed goes into a list for `listed`: (file, place in it, what)."""
    for place, line in lines_of(path, read_bytes(path)):
        try:
            record = parse_json(line)
            if isinstance(record, dict) and type(record.get("id")) in (str, int):
                place += f" (id {record['id']!r:.60})"
            prompt, chosen, rejected = check(record, alone)
        except DataError as e:
            other = isinstance(e, OtherForm) or line.lstrip().startswith("[")  # an array
            malformed.append((path, place, f"{e}; {how_to_convert(path)}" if other else str(e)))
            continue
        sides = ([("".join(text for text, _ in chosen), None)], None) if alone else (chosen, rejected)
        yield f"{path}{place}", prompt, *sides

def check(record, alone=False):
    """A record -> (prompt, chosen, rejected). alone: rejected may be missing, and is None then."""
    check_keys(record, "", ["prompt", "chosen"], ["id", "rejected"])
    if type(record.get("id", "")) not in (str, int):
        raise OtherForm('"id" must be a string or a whole number')
    if not alone and "rejected" not in record:
        raise DataError('no "rejected": one response is for --loss sft alone')
    sides = [check_response(record[key], key) for key in ("chosen", "rejected") if key in record]
    if len(counts := {len(scores or []) for side in sides for _, scores in side}) > 1:
        raise DataError(f"segments with {' and '.join(map(str, sorted(counts)))} scores in one pair")
    return check_prompt(record["prompt"]), *sides, *[None] * (2 - len(sides))

def check_keys(x, place, needed, also=()):
    """x is an object that has the needed keys, and no others but these."""
    if not isinstance(x, dict):
        raise OtherForm(f"{place or 'a record'} must be an object, found {type(x).__name__}")
    unknown = [json.dumps(f"{place}{'.' * bool(place)}{key}") for key in x if key not in (*needed, *also)]
    if unknown:
        raise OtherForm(f"a key that is not read: {', '.join(unknown[:5])}" + ", ..." * (len(unknown) > 5))
    for key in needed:
        if key not in x:
            raise OtherForm(f'{place}{": " * bool(place)}no "{key}"')

def check_text(text, place):
    if not isinstance(text, str) or re.search("[\ud800-\udfff]", text):
        found = "a lone surrogate" if isinstance(text, str) else type(text).__name__
        raise OtherForm(f'"{place}" must be text, found {found}')
    return text

def check_prompt(prompt):
    for i, message in enumerate(prompt if isinstance(prompt, list) else ()):
        check_keys(message, f"prompt[{i}]", ["role", "content"])
        check_text(message["content"], f"prompt[{i}].content")
        if (role := message["role"]) not in ("system", "user", "assistant"):
            raise OtherForm(f'"prompt[{i}].role" must be system, user or assistant, found {role!r:.40}')
    if isinstance(prompt, list) and (not prompt or prompt[-1]["role"] != "user"):
        raise DataError('"prompt" must end in a message of the user')
    return prompt if isinstance(prompt, list) else check_text(prompt, "prompt")

def check_response(response, key):
    segments = response if isinstance(response, list) else [{"text": check_text(response, key)}]
    for i, segment in enumerate(segments):
        check_keys(segment, f"{key}[{i}]", ["text"], ["scores"])
        check_text(segment["text"], f"{key}[{i}].text")
        scores = segment.get("scores", [])
        if not isinstance(scores, list) or not all(type(x) in (int, float) and 0 <= x < 1e38 for x in scores):
            raise DataError(f'"{key}[{i}].scores" must hold finite numbers >= 0, found {scores!r:.60}')
    return [(segment["text"], segment.get("scores") or None) for segment in segments]

def describe(path, counts, dropped, block_size):
    """One line on a file: {"kept", "cut", "ended": how many pairs}, {reason: [where]} of those dropped."""
    cut, ended, n = counts["cut"], counts["ended"], sum(map(len, dropped.values()))
    why = "; ".join(f"{len(places)} with {why} ({some(places, path)})" for why, places in dropped.items())
    return (f"{path}: {counts['kept']} pairs" + f", {n} dropped: {why}" * bool(n)
            + f", {cut} prompts cut at the front to fit block_size {block_size}" * bool(cut)
            + f", {ended} with a response that ends in {EOT}: remove it, it is added" * bool(ended))

def some(places, path, n=3):
    """The first n places, without the file's name."""
    return ", ".join(place.removeprefix(f"{path}:") for place in places[:n]) + ", ..." * (len(places) > n)

def listed(malformed):
    """[(file, place, what)] -> lines for ten kinds of malformed records; equal ones share a line."""
    kinds = {}
    for path, place, what in malformed:
        kinds.setdefault((path, what), []).append(place)
    lines = [f"{path}{places[0]}: {what}" + f" (and {len(places) - 1} more like it)" * (len(places) > 1)
             for (path, what), places in kinds.items()]
    return lines[:10] + [f"... and {len(lines) - 10} more"] * (len(lines) > 10)
