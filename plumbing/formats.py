"""What people's files look like -> (prompt, chosen, rejected); texts -> sentences.

A response is a list of segments, (text, scores or None), that join to its text.
"""

import ast
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data import DataError, UnusablePair, encode_pairs, pack
from plumbing.files import COMPRESSED, read_bytes
from plumbing.vocab import EOT

AT_ONCE = 1000  # records that are tokenised together


# ---------------------------------------------------------------------------------------------------------
# Files -> records

ENDINGS = {".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".zip", ".zst"}  # and .json where none of these is


def ending(path):
    """.jsonl for a.jsonl, A.JSONL and a.jsonl.gz."""
    *_, last = ["", "", *Path(path).suffixes]
    return (Path(path).with_suffix("").suffix if last.lower() in COMPRESSED else last).lower()


def list_files(paths, notes=None):
    """Data files. A folder stands for the data files in it; a .json file beside others is taken for a
    description of them (dataset_infos.json) and named in the notes."""
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = [p for p in sorted(path.rglob("*")) if p.is_file() and not is_hidden(p.relative_to(path))]
        runs = {p.parent for p in inside if p.name == "run.json"}  # of train.py, with a log.jsonl
        inside = [p for p in inside if not runs & set(p.parents)]
        found = [p for p in inside if ending(p) in ENDINGS
                 and not p.match("cache-*.arrow")]  # which datasets' map leaves
        described = [p for p in inside if ending(p) == ".json"]
        check_splits(path, found or described)
        if not found and not described:
            raise DataError(f"{path}: a folder without .jsonl, .json, .csv, .tsv, .parquet or .arrow files")
        if found and described and notes is not None:
            names = ", ".join(str(p.relative_to(path)) for p in described)
            notes.append(f"{path}: not read, .json beside {ending(found[0])} files: {names}")
        files += found or described
    return files


def is_hidden(path):
    """What an editor or macOS keeps beside the data: .ipynb_checkpoints, ._a.jsonl."""
    return any(part.startswith(".") for part in path.parts)


def check_splits(folder, files):
    """Refuse a folder of training and other data, as the names have it: all would be read as one."""
    names = [str(p.relative_to(folder)) for p in files]
    words = {name: set(re.findall("[a-z]+", name.lower())) for name in names}
    train = [name for name in names if words[name] & {"train", "training"}]
    other = [name for name in names if name not in train and words[name] & {
        "test", "testing", "val", "valid", "validation", "dev", "eval", "heldout", "held", "holdout"}]
    if train and other:
        raise DataError(f"{folder}: holds training and other data, {train[0]} and {other[0]}; name the "
                        "files, the ones with --data, the others with --val_data")


def read_records(path):
    """(where, record) of each record of a file, whatever its ending says; where is "file:line", or
    "file: item 3" of an array, "file: row 3" of a table.

    A line that is not JSON is yielded with a DataError in place of the record, so that all can be listed.
    """
    kind = ending(path)
    if kind in (".zip", ".zst"):
        raise DataError(f"{path}: unpack it first ({kind} is not read, .gz, .xz and .bz2 are)")
    content = read_bytes(path)
    if kind in (".csv", ".tsv", ".parquet", ".arrow"):
        read = read_csv if kind in (".csv", ".tsv") else read_arrow
        named = ((f"{path}: row {i}", row) for i, row in enumerate(unfold(read(path, content, kind)), 1))
    elif (items := read_array(path, content, kind)) is not None:
        named = ((f"{path}: item {i}", item) for i, item in enumerate(items, 1))
    else:
        named = read_lines(path, content)
    yield from tqdm(named, desc=f"reading {path}", unit=" pairs", delay=2, leave=False)


def read_array(path, content, kind):
    """The items of a JSON array, or None for JSON lines: either may stand in a .json or a .jsonl file."""
    first = content.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    try:
        items = parse_json(content) if kind == ".json" or first == b"[" else None
    except (ValueError, RecursionError) as e:
        if kind == ".json" and first != b"{":
            raise DataError(f"{path}: not JSON ({e})") from None
        return None
    if kind == ".json" and not isinstance(items, list):
        raise DataError(f"{path}: a .json file must hold an array of pairs (one pair a line is .jsonl)")
    return items if kind == ".json" or (items and isinstance(items[0], dict)) else None


def read_lines(path, content):
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                record = parse_json(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                record = DataError("not UTF-8")
            except (ValueError, RecursionError) as e:
                record = DataError(f"not JSON ({e})")
            yield f"{path}:{number}", record


def parse_json(text):
    """JSON in which no object has a key twice: which of the two would count?"""
    def once(items):
        record = dict(items)
        if len(record) < len(items):
            [(twice, _)] = Counter(key for key, _ in items).most_common(1)
            raise ValueError(f'the key "{twice}" twice')
        return record
    return json.loads(text, object_pairs_hook=once)


def read_csv(path, content, kind):
    """The rows of a table with a header; cells that a row lacks are left out."""
    csv.field_size_limit(2**31 - 1)
    try:
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
        reader = csv.DictReader(text, delimiter="\t" if kind == ".tsv" else ",")
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise DataError(f'{path}: the column "{Counter(header).most_common(1)[0][0]}" twice')
        for row in reader:
            long = None in row
            yield DataError("more cells than the header") if long else \
                {key: cell for key, cell in row.items() if cell is not None}
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8") from None
    except csv.Error as e:
        raise DataError(f"{path}: not a {kind} file ({e})") from None


def read_arrow(path, content, kind):
    """The rows of a .parquet file, or of an .arrow file that datasets.save_to_disk wrote."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading {kind} needs pyarrow: pip install pyarrow") from None
    try:
        if kind == ".parquet":
            return pyarrow.parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
        return pyarrow.ipc.open_stream(content).read_all().to_pylist()
    except (OSError, OverflowError, pyarrow.ArrowException) as e:  # a date beyond Python's years overflows
        raise DataError(f"{path}: not a {kind} file ({str(e).splitlines()[0]})") from None


def unfold(rows):
    """The rows of a table. A column is read as lists and objects (messages, say) where all its cells that
    hold something are the text of one, in JSON or as Python prints it."""
    rows = list(rows)
    records = [row for row in rows if isinstance(row, dict)]
    for key in records[0] if records else ():
        full = [row for row in records if row.get(key) not in (None, "")]
        if not all(isinstance(row[key], str) and row[key].lstrip()[:1] in ("[", "{") for row in full):
            continue
        for parse in (json.loads, ast.literal_eval):
            try:
                values = [parse(row[key]) for row in full]
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue
            for row, value in zip(full, values, strict=True):
                row[key] = value
            break
    return rows


# ---------------------------------------------------------------------------------------------------------
# Record -> (form, prompt, chosen, rejected); a response is a list of segments (text, scores or None)

TURN = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
ASSISTANT = "\n\nAssistant:"  # a prompt ends here, a response starts with the space
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "observation": "user",
         "assistant": "assistant", "gpt": "assistant", "function_call": "assistant"}  # others' names for them


def parse_record(record, alone=False):
    """Record -> (form, prompt, chosen, rejected), the first form of FORMS that fits. alone: also those of one
    response, which then stands on both sides.

    Raises UnusablePair where neither response is preferred, DataError for anything that is no pair.
    """
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError(f"expected an object, found {type(record).__name__}")
    if alone and record.get("chosen") is not None and record.get("rejected") is None:
        record = record | {"rejected": record["chosen"]}  # what SFT does not read may be missing
    there = {key for key, x in record.items() if x is not None or key in ("chosen", "rejected")}
    for name, form in FORMS.items():
        if there.issuperset(form.keys) and form.fits(record):
            if form.alone and not alone:
                raise DataError(f"{name}: one response and no other, which only --loss sft trains on; for a "
                                "preference, join the records of a prompt into prompt, responses, scores")
            return name, *form.parse(record)
    if {"completion", "label"} <= there:
        raise DataError("one completion with a label (KTO) is no pair of a chosen and a rejected response")
    lacks = {name: [key for key in form.keys if key not in there] for name, form in FORMS.items()
             if alone or not form.alone}
    nearest = sorted(filter(lacks.get, lacks), key=lambda name: len(lacks[name]) - len(FORMS[name].keys) / 10)
    raise DataError(f"no form has the keys {', '.join(sorted(map(str, record))) or '(none)'}; the nearest: "
                    + "; ".join(f"{name} lacks {', '.join(lacks[name])}" for name in nearest[:3]))


def parse_pair(r):
    sides = parse_response(r["chosen"], "chosen"), parse_response(r["rejected"], "rejected")
    if len(counts := {len(scores or []) for side in sides for _, scores in side} or {0}) > 1:
        raise DataError(f"a segment with {min(counts)} scores and one with {max(counts)} in one pair")
    return check_text(r["prompt"], "prompt"), *sides


def parse_transcripts(r):
    sides = [check_text(r[key], key) for key in ("chosen", "rejected")]
    head, turn, _ = os.path.commonprefix(sides).rpartition(ASSISTANT)
    if not turn:
        raise DataError('no "prompt", and no "\\n\\nAssistant:" shared by both sides (HH transcripts)')
    return head + turn, *([(side.removeprefix(head + turn), None)] for side in sides)


def parse_instruction(r):
    texts = [check_text(r[key], key) for key in ("instruction", "input") if r.get(key) is not None]
    sides = {key: check_text(r[key], key) for key in ("chosen", "rejected")}
    return parse_chat({"prompt": "\n".join(filter(None, texts)), **sides})


def parse_two_outputs(r):
    if len(r["output"]) != 2:
        raise DataError(f'"output" must be a list of two responses, chosen first, found {len(r["output"])}')
    return parse_instruction(r | dict(zip(("chosen", "rejected"), r["output"], strict=True)))


def parse_question(r):
    system = [{"role": "system", "content": r["system"]}] if r.get("system") else []
    question = {"role": "user", "content": check_text(r["question"], "question")}
    return parse_chat(r | {"prompt": [*system, question]})


def parse_alone(r, prompt, response):
    """One response, on both sides."""
    if isinstance(r[prompt], str) and isinstance(r[response], str):
        return parse_pair({"prompt": r[prompt], "chosen": r[response], "rejected": r[response]})
    return parse_chat(r, prompt, response, response)


def parse_output(r, _, output):
    return parse_instruction(r | {"chosen": r[output], "rejected": r[output]})


def parse_conversation(r, messages):
    return parse_chat(r, "", messages, messages)


def parse_openai(r):
    messages = r["input"].get("messages") if isinstance(r["input"], dict) else r["input"]
    return parse_chat(r | {"input.messages": messages}, "input.messages", "preferred_output",
                      "non_preferred_output")


def parse_ranking(r):
    responses, scores = r["responses"], r["scores"]
    if not (isinstance(responses, list) and isinstance(scores, list) and len(responses) == len(scores) > 1):
        raise DataError('"responses" and "scores" must be lists of one length, 2 at least')
    scores = [number(score, f"scores[{i}]") for i, score in enumerate(scores)]
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    r = r | {f"responses[{i}]": response for i, response in enumerate(responses)}
    return by_preference(r, scores[best] - scores[worst], "prompt", f"responses[{best}]",
                         f"responses[{worst}]")


def by_preference(r, preference, prompt, first, second):
    """preference > 0 chooses the response under the key `first`, < 0 the one under `second`."""
    if preference == 0:
        raise UnusablePair("no preference between the responses")
    return parse_chat(r, prompt, *((first, second) if preference > 0 else (second, first)))


def number(value, key, low=-1e38, high=1e38):
    """A number, also as the text of a .csv cell."""
    try:
        x = float(value)
    except (TypeError, ValueError, OverflowError):
        x = float("nan")
    if not low <= x <= high:
        raise DataError(f'"{key}" must be a number from {low:g} to {high:g}, found {value!r:.40}')
    return x


def has_scores(r):
    return any(isinstance(r[key], list) and any(isinstance(s, dict) and s.get("scores") for s in r[key])
               for key in ("chosen", "rejected"))


def is_message(x):
    return isinstance(x, dict) and bool({"role", "from"} & x.keys())


def is_chat(r):
    return isinstance(r.get("prompt"), list) or any(
        is_message(x) or (isinstance(x, list) and any(map(is_message, x)))
        for x in (r.get("prompt"), r["chosen"], r["rejected"]))


def are_answers(r):
    """No prompt, and sides that do not repeat the conversation: it stands in a key of its own."""
    firsts = [x[0] if isinstance(x, list) and x else x for x in (r["chosen"], r["rejected"])]
    roles = [m.get("role", m.get("from")) if isinstance(m, dict) else "assistant" for m in firsts]
    return r.get("prompt") is None and all(isinstance(x, str) and ROLES.get(x) == "assistant" for x in roles)


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
    """A list of {"role", "content"} or {"from", "value"} -> [(role, text)]. A single one may stand without
    its list; a string is one message of the given role."""
    if isinstance(messages, str):
        messages = {"role": role, "content": messages}
    if is_message(messages):
        messages = [messages]
    if not isinstance(messages, list):
        raise DataError(f'"{key}" must be a list of messages, found {type(messages).__name__}')
    return [parse_message(m, f"{key}[{i}]", f'"{key}"[{i}]') for i, m in enumerate(messages)]


def parse_message(m, key, place):
    found = m.get("role", m.get("from")) if isinstance(m, dict) else m
    if not isinstance(found, str) or found not in ROLES:
        raise DataError(f"{place}: role must be system, user or assistant, found {found!r:.40}")
    content = m.get("content", m.get("value"))
    if m.get("tool_calls") or m.get("function_call"):
        raise DataError(f"{place}: a tool call; only text is trained on, write it as text")
    if isinstance(content, list):  # of parts
        for part in content:
            if not isinstance(part, dict) or part.get("type", "text") != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise DataError(f"{place}: a part of type {kind!r:.40}; only text can be read")
        content = "".join(check_text(part.get("text"), f"{key}.content") for part in content)
    return ROLES[found], check_text(content, f"{key}.content")


def parse_chat(r, prompt="prompt", chosen="chosen", rejected="rejected"):
    """Messages or texts, under these keys. The prompt is what is given as such and all turns that both sides
    share."""
    given = r.get(prompt)
    if isinstance(given, str) and given.rstrip().endswith(ASSISTANT):
        raise DataError(f'"{prompt}" is rendered already (it ends in "Assistant:"), the responses are not')
    head = parse_messages([] if given is None else given, prompt, "user")
    sides = [parse_messages(r[key], key, "assistant") for key in (chosen, rejected)]
    answers = all(not side or side[0][0] == "assistant" for side in sides)
    shared = os.path.commonprefix(sides)
    if len(shared) == min(map(len, sides)) and shared and shared[-1][0] == "assistant":
        shared = shared[:-1]  # equal conversations, or one that ends early: its last turn is the response
    sides = [side[len(shared):] for side in sides]
    if answers or not is_within(head, shared):  # else the prompt stands in both sides again
        if not answers and any(role != "system" for role, _ in head):
            raise DataError(f'both sides are whole conversations, and "{prompt}" is no turn that they share')
        shared = head + shared
    for key, side in zip((chosen, rejected), sides, strict=True):
        if side and side[0][0] != "assistant":
            raise DataError(f'"{key}": the response must start with an assistant turn, found {side[0][0]}')
    if not shared:
        raise DataError(f'no turn stands before the responses: "{prompt}" is missing or holds none')
    if shared[-1][0] == "assistant":
        raise DataError("the prompt ends in an assistant turn; the responses must be the next one")
    text, *sides = ("".join(TURN[role] + text for role, text in turns) for turns in (shared, *sides))
    return text + ASSISTANT, *([(side.removeprefix(ASSISTANT), None)] for side in sides)


def is_within(head, turns):
    """Do the turns of head stand among these, white space around them aside?"""
    head, turns = ([(role, text.strip()) for role, text in x] for x in (head, turns))
    return any(turns[i:i + len(head)] == head for i in range(len(turns) - len(head) + 1))


@dataclass(frozen=True)
class Form:
    """A form of record, recognised by its keys."""
    keys: list  # that a record must have
    also: list  # that are read where they are there
    rule: str  # printed with the form's name
    parse: Callable  # record -> (prompt, chosen, rejected)
    fits: Callable = lambda record: True  # decides where several forms have the same keys
    alone: bool = False  # has one response: rows of SFT


def form(keys, rule, parse, fits=Form.fits, also="", alone=False):
    return Form(keys.split(), also.split(), rule, parse, fits, alone)


def comparison(keys, rule, low, high, first):
    """A form of a prompt, two responses and a number; first(number) > 0 chooses the first response."""
    *texts, key = keys.split()
    return form(keys, rule, lambda r: by_preference(r, first(number(r[key], key, low, high)), *texts))


def single(keys, rule, parse=parse_alone, **options):
    """A form of one response."""
    return form(keys, rule, lambda r: parse(r, *keys.split()), alone=True, **options)


AS_IT_STANDS, AS_TURNS = "prompt as it stands", "rendered as Human/Assistant turns"
AS_ONE_TURN = "rendered as one Human turn"
LAST_TURN = f"the last Assistant turn is the response; {AS_TURNS}"
FORMS = {
    "ShareGPT": form("conversations chosen rejected", AS_TURNS, lambda r: parse_chat(r, "conversations"),
                     fits=are_answers),
    "messages and two answers": form("messages chosen rejected", AS_TURNS,
                                     lambda r: parse_chat(r, "messages"), fits=are_answers),
    "chat messages": form("chosen rejected", AS_TURNS, parse_chat, fits=is_chat, also="prompt"),
    "scored segments": form("prompt chosen rejected", AS_IT_STANDS, parse_pair, fits=has_scores),
    "pairs": form("prompt chosen rejected", AS_IT_STANDS, parse_pair),
    "instructions": form("instruction chosen rejected", AS_ONE_TURN, parse_instruction, also="input"),
    "questions": form("question chosen rejected", AS_TURNS, parse_question, also="system"),
    "HH transcripts": form("chosen rejected", "prompt = common prefix up to its last Assistant turn",
                           parse_transcripts),
    "two outputs": form("instruction output", f"the first output is chosen; {AS_ONE_TURN}",
                        parse_two_outputs, fits=lambda r: isinstance(r["output"], list), also="input"),
    "OpenAI preferences": form("input preferred_output non_preferred_output", AS_TURNS, parse_openai),
    "SHP": comparison("history human_ref_A human_ref_B labels", f"labels 1 chooses A; {AS_TURNS}",
                      0, 1, lambda x: x - 0.5),
    "SafeRLHF": comparison("prompt response_0 response_1 better_response_id", AS_TURNS,
                           0, 1, lambda x: 0.5 - x),
    "AlpacaEval": comparison("instruction output_1 output_2 preference", AS_TURNS,  # from 1 to 2; 0 is a draw
                             0, 2, lambda x: x and 1.5 - x),
    "HelpSteer2": comparison("prompt response_1 response_2 preference_strength",
                             f"below 0 chooses response_1; {AS_TURNS}", -3, 3, lambda x: -x),
    "HelpSteer3": comparison("context response1 response2 overall_preference",
                             f"below 0 chooses response1; {AS_TURNS}", -3, 3, lambda x: -x),
    "rankings": form("prompt responses scores", f"best against worst; {AS_TURNS}", parse_ranking),
    # one response, for --loss sft
    "completions": single("prompt completion", AS_IT_STANDS, fits=lambda r: r.get("label") is None),
    "responses": single("prompt response", AS_IT_STANDS),
    "outputs": single("prompt output", AS_IT_STANDS),
    "instructions and outputs": single("instruction output", AS_ONE_TURN, parse_output, also="input"),
    "conversations": single("messages", LAST_TURN, parse_conversation),
    "ShareGPT conversations": single("conversations", LAST_TURN, parse_conversation),
}


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


NOTHING = [("\0", None)]  # stands for a rejected response that is not read: one token, and no one's answer


def load(paths, tokenizer, block_size, alone=False):
    """Read, check and tokenise data files -> (Pairs, lines to print). alone: for SFT, which reads the chosen
    responses only; records of one response are read then, and no rejected one drops its pair.

    Raises DataError that lists the first ten kinds of malformed records as `file:line: what`.
    """
    malformed, notes, ignored, widths = [], [], Counter(), Counter()

    def usable_pairs(path):
        kept, cut, ended, forms, dropped = 0, 0, 0, Counter(), {}
        for parsed in in_groups(parse_records(path, malformed, forms, dropped, ignored, alone)):
            pairs = encode_pairs(tokenizer, parsed, block_size)
            for (where, _, *sides), pair in zip(parsed, pairs, strict=True):
                if isinstance(pair, UnusablePair):
                    dropped.setdefault(str(pair), []).append(where)
                    continue
                A = pair.chosen_scores.shape[-1]
                if A and (others := widths.keys() - {0, A}):
                    malformed.append((where, f"{A} scores a segment here, {others.pop()} before"))
                    continue
                widths[A] += 1
                kept, cut, ended = kept + 1, cut + (pair.cut > 0), ended + any(map(ends_in_eot, sides))
                yield pair
        notes.append(describe(path, forms, kept, dropped, cut, ended, block_size))

    pairs = pack(pair for path in list_files(paths, notes) for pair in usable_pairs(path))
    if malformed:
        raise DataError("\n".join(listed(malformed)))
    if not len(pairs):
        raise DataError("\n".join(notes) + "\nno pair is left to train on")
    if len(widths) > 1:
        notes.append(f"scores are ignored: {widths[0]} of {len(pairs)} pairs have none")
    if ignored:
        notes.append(f"ignored keys: {counted(ignored)}")
    return pairs, notes


def parse_records(path, malformed, forms, dropped, ignored, alone):
    """(where, prompt, chosen, rejected) of each record of a file; the rest goes into the collections."""
    for where, record in read_records(path):
        try:
            form, prompt, *sides = parse_record(record, alone)
        except UnusablePair as e:
            dropped.setdefault(str(e), []).append(where)
        except DataError as e:
            malformed.append((where, str(e)))
        else:
            ignored.update(unread_keys(form, record))
            forms[form] += 1
            if alone:
                sides = [[("".join(text for text, _ in sides[0]), None)], NOTHING]
            yield where, prompt, *sides


def unread_keys(form, record):
    """The keys that hold something which the form does not read, though another form may."""
    return {key for key, value in record.items() if value not in (None, "", [])} \
        - {*FORMS[form].keys, *FORMS[form].also}


def counted(ignored):
    return ", ".join(f"{key!r} ({n} times)" for key, n in sorted(ignored.items()))


def ends_in_eot(side):
    """Does a response end in the text of end-of-text? It stays text, and the true one follows it."""
    return bool(side) and side[-1][0].rstrip().endswith(EOT)


def describe(path, forms, kept, dropped, cut, ended, block_size):
    """One line for a file: its forms, and what became of its records."""
    counts = {form: f" in {n}" if len(forms) > 1 else "" for form, n in forms.items()}
    rules = ", ".join(f"{form}{n} ({FORMS[form].rule})" for form, n in sorted(counts.items()))
    note = f"{path}: {rules or 'no usable pair'}: {kept} pairs"
    if dropped:
        reasons = []
        for reason, places in dropped.items():
            lines = ", ".join(where.removeprefix(f"{path}:").strip() for where in places[:3])
            reasons.append(f"{len(places)} with {reason} ({lines}{', ...' if len(places) > 3 else ''})")
        note += f", {sum(map(len, dropped.values()))} dropped: {'; '.join(reasons)}"
    if cut:
        note += f", {cut} prompts cut at the front to fit block_size {block_size}"
    if ended:
        note += f", {ended} with a response that ends in the text {EOT}: end-of-text is added here, remove it"
    return note


def listed(malformed):
    """[(where, what)] -> lines for ten kinds of malformed records; equal ones of a file share a line."""
    places = {}
    for where, what in malformed:
        places.setdefault((where.rpartition(":")[0], what), []).append(where)
    lines = [f"{where[0]}: {what}" + (f" (and {len(where) - 1} more like it)" if where[1:] else "")
             for (_, what), where in places.items()]
    return lines[:10] + ([f"... and {len(lines) - 10} more"] if len(lines) > 10 else [])


def in_groups(items):
    """An iterable in lists of AT_ONCE items."""
    items = iter(items)
    while group := list(islice(items, AT_ONCE)):
        yield group
