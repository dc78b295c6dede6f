"""Preference data in other forms -> the one format that training reads (plumbing/pairs.py):

    python tools/convert.py FILE ... --out pairs.jsonl [--keys prompt=question chosen=good rejected=bad]

What changes the meaning of a record is used or refused, keys without meaning are left out and counted, every
other key is refused until --drop names it. Nothing is written if anything is refused. See tools/README.md.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script

from plumbing import pairs  # noqa: E402
from plumbing.errors import DataError  # noqa: E402
from tools import records  # noqa: E402

# A key has no meaning if all its words are in these two sets, and one at least in the first.
NO_MEANING = set("""id ids uid uuid idx index source sources dataset datasets subset split origin category
    domain language lang license url link timestamp date datetime created updated annotator model models
    generator worker hash sha md length lengths len token tokens metadata meta version""".split())
SIDES = set("""chosen rejected prompt response responses completion answer question conversation conv message
    post human ref a b c root n num number total count name user labelling original data at utc by""".split())
LONGEST = 200  # characters; a longer text under a key without meaning is refused all the same
SWITCHES = ("weight", "loss", "train", "trainable", "loss_weight")  # of a record or answer: to be trained on?
SCORE, OF_SCORE = {"score", "scores", "rating", "reward"}, {"avg", "average", "mean", "overall", "model"}
MARGINS = ("margin", "score_margin", "reward_margin", "score_diff", "score_difference")
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
         **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot"), "assistant")}  # in lower case
CHATS = ("messages", "conversations", "conversation")
PROMPTS = (*CHATS, "prompt", "question", "query", "instruction", "input", "history", "context")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # a transcript's prompt ends in the second
TEXT, TURNS = "the prompt as it stands", "the prompt as messages"

class Unclear(DataError):
    """A record that prefers no answer, or contradicts itself."""

class BadLabel(DataError):
    """A completion that its label calls bad."""

class Turn(NamedTuple):
    role: str
    text: str
    message: dict  # as it was

@dataclass(frozen=True)
class Answers:
    """A way to give one answer, or two of which one is better."""
    name: str
    keys: str  # that a record must have
    pick: Callable | None = None  # record -> [(place, value)], chosen first; None: the values of the keys
    fits: Callable = lambda record: True
    text: bool = False  # a text under "prompt" stands as it is
    last: bool = False  # the chosen answer is the last turn of the conversation

def comparison(name, first, second, by, low, high, sign):
    """sign(the value of `by`) > 0 chooses the first answer, < 0 the second."""
    def pick(r):
        if (x := sign(number(r[by], by, low, high))) == 0:
            raise Unclear(f'a "{by}" that prefers neither answer')
        return [(key, r[key]) for key in ((first, second) if x > 0 else (second, first))]
    return Answers(name, f"{first} {second} {by}", pick)

def best_and_worst(r):
    responses, scores = r["responses"], r["scores"]
    if not (isinstance(responses, list) and isinstance(scores, list) and len(responses) == len(scores) > 1):
        raise DataError('"responses" and "scores" must be lists of one length, 2 at least')
    scores = [number(score, f"scores[{i}]") for i, score in enumerate(scores)]
    if min(scores) == max(scores):
        raise Unclear('"scores" that are all equal')
    return [(f"responses[{i}]", responses[i]) for i in map(scores.index, (max(scores), min(scores)))]

KINDS = (
    Answers("pairs", "chosen rejected", text=True),
    Answers("conversations and a rejected answer", "rejected_response", last=True),
    Answers("OpenAI preferences", "preferred_output non_preferred_output"),
    comparison("SHP", "human_ref_A", "human_ref_B", "labels", 0, 1, lambda x: x - 0.5),
    comparison("SafeRLHF", "response_0", "response_1", "better_response_id", 0, 1, lambda x: 0.5 - x),
    comparison("AlpacaEval", "output_1", "output_2", "preference", 0, 2, lambda x: x and 1.5 - x),
    comparison("HelpSteer2", "response_1", "response_2", "preference_strength", -3, 3, lambda x: -x),
    comparison("HelpSteer3", "response1", "response2", "overall_preference", -3, 3, lambda x: -x),
    Answers("rankings", "responses scores", best_and_worst),
    Answers("two outputs", "output", lambda r: [(f"output[{i}]", r["output"][i]) for i in (0, 1)],
            fits=lambda r: isinstance(r["output"], list) and len(r["output"]) == 2),
    # one answer, for --loss sft
    Answers("chosen alone", "chosen", text=True),
    Answers("completions", "completion", text=True),
    Answers("responses", "response", text=True),
    Answers("outputs", "output", text=True),
    Answers("conversations", "", fits=lambda r: any(full(r.get(key)) for key in CHATS), last=True),
)

def number(value, key, low=-1e38, high=1e38):
    """A number, also as the text of a cell."""
    try:
        x = float(value)
    except (TypeError, ValueError, OverflowError):
        x = float("nan")
    if not low <= x <= high:
        raise DataError(f'"{key}" must be a number from {low:g} to {high:g}, found {value!r:.40}')
    return x

def full(value):
    """True if a value holds something."""
    return value is not None and value != "" and value != [] and value != {}

def truth(value):
    """True or False of a label or switch, None for anything else."""
    word = str(value).lower()
    return True if word in ("true", "1", "1.0") else False if word in ("false", "0", "0.0") else None

def words_of(key):
    return {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", str(key))}

def has_no_meaning(key, value):
    """True for an id, a source, a count, ...; what stands in an object under such a key is looked at too."""
    words = words_of(key)
    if not (words & NO_MEANING and words <= NO_MEANING | SIDES):
        return False
    if isinstance(value, dict):
        return all(has_no_meaning(k, v) for k, v in value.items() if full(v))
    if isinstance(value, list):
        return all(has_no_meaning(key, item) for item in value)
    return not (isinstance(value, str) and len(value) > LONGEST)

class Converter:
    """Converts records, one after the other, and counts what it left out."""

    def __init__(self, keys=(), drop=(), label=None, turns=False):
        self.keys, self.drop, self.label, self.turns = dict(keys), set(drop), label, turns
        self.met, self.unread = set(), []  # names of --keys and --drop that were met; keys of this record
        self.forms, self.left_out, self.copies = Counter(), Counter(), Counter()

    def convert(self, record):
        """A record of any form -> one of the one format. Unclear, BadLabel or another DataError."""
        if not isinstance(record, dict):
            raise record if isinstance(record, DataError) else DataError(
                f"a record must be an object, found {type(record).__name__}")
        given = {"id": record["id"]} if type(record.get("id")) in (str, int) and "id" not in self.drop else {}
        r, self.unread = self.cleaned(self.renamed({k: x for k, x in record.items() if k not in given})), []
        kind = self.kind_of(r)
        known = set(kind.keys.split())
        out, rule = self.pair_of(r, kind, known)
        alone = "rejected" not in out
        if self.label and not (alone and truth(r.get(self.label))):
            wrong = not alone or truth(r.get(self.label)) is None
            raise DataError(f'--label {self.label}: needs one response and a "{self.label}", true or false') \
                if wrong else BadLabel(f'a false "{self.label}"')
        self.check_off(r, "the record")
        self.check_scores(r, known)
        self.check_copies(r, known, out)
        self.rest(r, {*known, *SWITCHES, self.label}, "")
        self.check_unread(alone)
        if self.turns and isinstance(out["prompt"], str):
            out, rule = as_turns(out), TURNS
        pairs.check(given | out, alone)
        self.forms[kind.name, rule] += 1
        return given | out

    def renamed(self, record):
        """The record with its keys dropped and named as --drop and --keys say."""
        self.met |= record.keys() & {*self.drop, *self.keys.values()}
        r = {key: value for key, value in record.items() if key not in self.drop}
        moved = {new: r.pop(old) for new, old in self.keys.items() if old in r}
        for new in moved:
            if full(r.get(new)):
                raise DataError(f'--keys {new}={self.keys[new]}: there is a "{new}" already; --drop {new}')
        return r | moved

    def cleaned(self, x):
        """x without keys that have no meaning or are dropped, at any depth."""
        if isinstance(x, list):
            return [self.cleaned(item) for item in x]
        if not isinstance(x, dict):
            return x
        kept = {}
        for key, value in x.items():
            if key in self.drop or (full(value) and has_no_meaning(key, value)):
                self.met.add(key)
                self.left_out[key] += 1
            else:
                kept[key] = self.cleaned(value)
        return kept

    def kind_of(self, r):
        there = {key for key, value in r.items() if value is not None}
        for kind in KINDS:
            if there.issuperset(kind.keys.split()) and kind.fits(r):
                return kind
        lacks = [(kind, [key for key in kind.keys.split() if key not in there]) for kind in KINDS[:-1]]
        near, missing = min(lacks, key=lambda pair: len(pair[1]) / len(pair[0].keys.split()))
        raise no_form(there, near.name, missing)

    def rest(self, x, known, place):
        """Note the keys of an object that hold something and are not known."""
        self.unread += [(f"{place}{key}", key, value) for key, value in x.items()
                        if key not in known and full(value)]

    def check_unread(self, alone=False):
        if not self.unread:
            return
        for path, key, value in self.unread if alone else ():
            named = type(value) is not int or re.search("label|kto", key, re.I)
            if path == key and truth(value) is not None and named:
                raise DataError(f'one completion with a label, "{key}" (KTO), is no pair of a chosen and a '
                                f"rejected response; --label {key} keeps the true ones, for --loss sft")
        names = ", ".join(json.dumps(path) for path, *_ in self.unread)
        drop = shlex.join(dict.fromkeys(str(key) for _, key, _ in self.unread))
        raise DataError(f"perhaps part of what is meant, and not read: {names}; without it: --drop {drop}")

    def check_off(self, x, place):
        for key in SWITCHES:
            if full(x.get(key)) and not truth(x[key]):
                says = "says not to train on it" if truth(x[key]) is False else "is neither on nor off"
                raise DataError(f'{place}: its "{key}" {says}; to do so all the same: --drop {key}')

    def check_scores(self, r, known):
        """The record's own scores must not contradict "chosen"."""
        scores = {}
        for key, value in r.items():
            words = words_of(key)
            side = words & {"chosen", "rejected"}
            if len(side) == 1 and words & SCORE and words <= side | SCORE | OF_SCORE and full(value):
                scores.setdefault(frozenset(words - side), {}).update(dict.fromkeys(side, key))
            elif key in MARGINS and full(value):
                known.add(key)
                if number(value, key) <= 0:
                    raise Unclear(f'a "{key}" of 0 or less')
        for key, other in ((keys["chosen"], keys["rejected"]) for keys in scores.values() if len(keys) == 2):
            known |= {key, other}
            if not number(r[key], key) > number(r[other], other):
                raise Unclear(f'a "{key}" that is not above "{other}"')

    def check_copies(self, r, known, out):
        """Leave out a second copy of the prompt, or of the conversation; anything else stays unknown."""
        prompt, chosen, unread = out["prompt"], out["chosen"], self.unread
        whole = [("user", prompt)] if isinstance(prompt, str) else [(m["role"], m["content"]) for m in prompt]
        whole += [("assistant", chosen)] if isinstance(chosen, str) else []
        for key in PROMPTS:
            if key not in known and full(r.get(key)):
                self.unread = []
                try:
                    again = is_within(self.chat(r[key], key, "user"), whole) and not self.unread
                except DataError:
                    again = False
                known |= {key} if again else set()
                self.copies[key] += again
        self.unread = unread

    def pair_of(self, r, kind, known):
        """-> ({"prompt", "chosen", "rejected"}, how the prompt is read). What is read is added to known."""
        sides = kind.pick(r) if kind.pick else [(key, r[key]) for key in kind.keys.split()]
        main = next((key for key in PROMPTS if key not in known and full(r.get(key))), None)
        if main is None and kind.text and r.get("prompt") == "":
            main = "prompt"
        if main is None and kind.name == "pairs" and all(isinstance(value, str) for _, value in sides):
            return self.transcripts(r)
        if any(isinstance(value, str) and value.startswith(HUMAN) for _, value in sides) and main:
            raise DataError(f'the answers are transcripts, which hold the prompt, and there is a "{main}"; '
                            f"if both are the same: --drop {main}")
        answers = [(place, self.answer(value, place)) for place, value in sides]
        head = self.head(r, main, known)
        if kind.last:
            if not head or head[-1].role != "assistant":
                raise DataError(f'"{main}" must end in an assistant turn, the answer')
            answers.insert(0, (main, [head.pop()]))
        elif head and head[-1].role == "assistant" and is_within(head[-1:], answers[0][1][-1:]):
            self.check_off(head.pop().message, main)  # the chosen answer, again
        turns, texts = self.joined(head, answers, main)
        chat = any(turn.message for _, answer in answers for turn in answer if isinstance(turn, Turn))
        if main == "prompt" and kind.text and not chat and isinstance(r["prompt"], str) and len(turns) == 1:
            prompt, rule = r["prompt"], TEXT
        elif isinstance(r.get(main), str) and r[main].rstrip().endswith(ASSISTANT):
            raise DataError(f'"{main}" is a transcript that ends in "Assistant:", the answers are not')
        else:
            prompt, rule = [{"role": turn.role, "content": turn.text} for turn in turns], TURNS
            rule += ", earlier answers in it" * any(turn.role == "assistant" for turn in turns)
        return {"prompt": prompt} | dict(zip(("chosen", "rejected"), texts, strict=False)), rule

    def transcripts(self, r):
        """HH's form: two whole transcripts; the prompt is what they share, up to its last Assistant turn."""
        sides = [r["chosen"], r["rejected"]]
        head, turn, _ = os.path.commonprefix(sides).rpartition(ASSISTANT)
        if not turn:
            raise no_form(r, "pairs", ["prompt"])
        chosen, rejected = (side.removeprefix(head + turn) for side in sides)
        if HUMAN in chosen + rejected:
            raise Unclear("a turn of Human after what the transcripts share, which would be scored")
        rule = "transcripts: the prompt is what both share up to its last Assistant turn, the rest is scored"
        return {"prompt": head + turn, "chosen": chosen, "rejected": rejected}, rule

    def head(self, r, main, known):
        """The turns before the answers: "system", the key `main`, and "input" after "instruction"."""
        turns = []
        if full(r.get("system")):
            turns += self.chat(r["system"], "system", "system")
            known.add("system")
        if main is None:
            return turns
        known.add(main)
        value = r[main]
        if main == "instruction" and isinstance(value, str) and isinstance(r.get("input"), str):
            value = "\n".join(text for text in (value, r["input"]) if text.strip())
            known.add("input")
        found = self.chat(value, main, "user")
        if turns and turns[0].role == "system" and found and found[0].role == "system":
            if turns[0].text.strip() != found[0].text.strip():
                raise DataError(f'"system" and the system turn of "{main}" differ')
            found = found[1:]
        return turns + found

    def answer(self, value, place):
        """A text, messages or segments -> turns, or segments."""
        if not isinstance(value, list) or any(map(is_message, value)):
            return self.chat(value, place, "assistant")
        if len(value) > 1 and all(isinstance(x, str) for x in value):
            raise DataError(f'"{place}" is a list of {len(value)} texts; one answer is needed')
        if not value or not all(isinstance(x, dict) and "text" in x and "type" not in x for x in value):
            return [Turn("assistant", self.parts(value, place), {})]
        for i, x in enumerate(value):
            self.rest(x, ("text", "scores"), f"{place}[{i}].")
        return [{key: x[key] for key in ("text", "scores") if x.get(key) is not None} for x in value]

    def chat(self, value, place, role):
        """A text (of this role), a message, a list of them or an object with "messages" -> turns."""
        if isinstance(value, dict) and "messages" in value and not is_message(value):
            self.rest(value, ("messages",), f"{place}.")
            return self.chat(value["messages"], f"{place}.messages", role)
        if isinstance(value, str):
            return [Turn(role, value, {})]
        if not isinstance(value, (list, dict)):
            raise DataError(f'"{place}" must be text or messages, found {type(value).__name__}')
        if isinstance(value, dict):
            return [self.turn(value, place)]
        return [self.turn(m, f"{place}[{i}]") for i, m in enumerate(value)]

    def turn(self, m, place):
        if not is_message(m):
            raise DataError(f'"{place}" must be a message, an object with a role and a content')
        role_key = "role" if "role" in m else "from"
        text_key = next((key for key in ("content", "value", "text") if key in m), "content")
        role = ROLES.get(m[role_key].lower() if isinstance(m[role_key], str) else None)
        if role is None:
            raise DataError(f'"{place}" is a turn of {m[role_key]!r:.40}, not of system, user, assistant')
        self.rest(m, (role_key, text_key, *SWITCHES), f"{place}.")
        text = m.get(text_key)
        if isinstance(text, list):
            text = self.parts(text, f"{place}.{text_key}")
        if not isinstance(text, str):
            self.check_unread()  # where there is no text there may be a tool call
            raise DataError(f'"{place}.{text_key}" must be text, found {type(text).__name__}')
        return Turn(role, text, m)

    def parts(self, parts, place):
        """The text of content in parts."""
        texts = []
        for i, part in enumerate(parts):
            if isinstance(part, str):
                part = {"text": part}
            kind = part.get("type", "text") if isinstance(part, dict) else part
            key = next((key for key in ("text", "value", "content") if kind == "text" and key in part), None)
            if key is None or not isinstance(part[key], str):
                raise DataError(f'"{place}[{i}]" is a part of type {kind!r:.40}; only text is read')
            self.rest(part, ("type", key), f"{place}[{i}].")
            texts.append(part[key])
        return "".join(texts)

    def joined(self, head, answers, main):
        """The turns before the answers, and the text or the segments of each answer."""
        sides = [answer if answer and isinstance(answer[0], Turn) else [] for _, answer in answers]
        keys = [[turn[:2] for turn in side] for side in sides]
        n = len(shared := os.path.commonprefix(keys))
        if n and n == min(map(len, keys)) and shared[-1][0] == "assistant":
            n -= 1  # equal conversations, or one that ends early: its last turn is the answer
        shared = sides[0][:n]
        if all(not side or side[0].role == "assistant" for side in sides):
            prompt = head + shared
        else:  # whole conversations, in which the head stands again
            system, others = ([turn for turn in head if (turn.role == "system") is s] for s in (True, False))
            if not is_within(others, shared):
                raise DataError(f'the answers are conversations, and "{main}" is no turn that they share')
            prompt = shared if is_within(system, shared) else system + shared
            if [turn.role for turn in prompt].count("system") > max(1, len(system)):
                raise DataError("two system texts that differ")
        texts = []
        for (place, answer), side in zip(answers, sides, strict=True):
            if not side and answer:  # segments
                texts.append(answer)
                continue
            if len(side) == n or side[n].role != "assistant":
                found = "nothing" if len(side) == n else f"a turn of {side[n].role}"
                raise DataError(f'"{place}": {found} stands where the answers part, and no assistant turn')
            if len(side) > n + 1:
                raise DataError(f'"{place}": {len(side) - n} turns after the prompt; an answer is one turn, '
                                "so that no other speaker's text is scored")
            self.check_off(side[n].message, place)
            texts.append(side[n].text)
        if not prompt:
            raise no_form(["the answers"], "pairs", ["prompt"])
        if prompt[-1].role != "user":
            raise DataError(f"the prompt ends in a turn of {prompt[-1].role}; it must end in one of the user")
        if on := [key for turn in prompt for key in SWITCHES if truth(turn.message.get(key))]:
            raise DataError(f'a "{on[0]}" that says to train on a turn of the prompt; only the answer is '
                            f"trained on: --drop {on[0]}")
        return prompt, texts

def is_message(x):
    return isinstance(x, dict) and bool({"role", "from"} & x.keys())

def is_within(part, turns):
    """Do these turns stand among the others, white space around them aside?"""
    part, turns = ([(x[0], x[1].strip()) for x in y if isinstance(x, tuple)] for y in (part, turns))
    return any(turns[i:i + len(part)] == part for i in range(len(turns) - len(part) + 1))

def no_form(there, name, lacks):
    keys = " ".join(f"{key}=NAME" for key in lacks)
    return DataError(f"no form has the keys {', '.join(sorted(map(str, there))) or '(none)'}; the nearest, "
                     f"{name}, lacks {', '.join(lacks)}; if they have other names: --keys {keys}")

def as_turns(out):
    """A pair of HH's transcripts with its prompt as messages, where they render to exactly the same text."""
    from data import Tokenizer
    start, *pieces = re.split("\n\n(System|Human|Assistant): ", out["prompt"].removesuffix(ASSISTANT))
    messages = [{"role": ROLES[name.lower()], "content": text}
                for name, text in zip(pieces[::2], pieces[1::2], strict=True)]
    sides = {key: text for key, text in out.items() if key != "prompt"}
    if start or Tokenizer.render(Tokenizer, messages) != out["prompt"] or not all(
            isinstance(text, str) and re.fullmatch("(?! .*\n\n(Human|Assistant):) .*", text, re.DOTALL)
            for text in sides.values()):
        raise Unclear("turns that do not render to the same text (--turns)")
    return {"prompt": messages} | {key: text[1:] for key, text in sides.items()}

def convert_files(paths, out, converter, drop_unclear=False, delimiter=None):
    """Convert files into `out` -> lines to print. DataError, and nothing written, if anything is refused."""
    malformed, notes, seen, kinds = [], [], 0, Counter()
    part = out.with_name(out.name + ".part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            for path in paths:
                dropped, converter.forms = {}, Counter()
                for place, record in records.read(path, delimiter):
                    seen += 1
                    try:
                        made = converter.convert(record)
                        scored = isinstance(made["chosen"], list) and "scores" in made["chosen"][0]
                        kinds["sft" if "rejected" not in made else "2d-dpo" if scored else "dpo"] += 1
                        file.write(json.dumps(made, ensure_ascii=False) + "\n")
                    except RecursionError:
                        malformed.append((path, place, "nested too deeply"))
                    except DataError as e:
                        if isinstance(e, BadLabel) or (drop_unclear and isinstance(e, Unclear)):
                            dropped.setdefault(str(e), []).append(place.lstrip(": "))
                        else:
                            hint = "; --drop_unclear drops such records" * isinstance(e, Unclear)
                            malformed.append((path, place, f"{e}{hint}"))
                notes += [f"{path}: {n} {name}, {rule}" for (name, rule), n in converter.forms.items()]
                notes += [f"{path}: dropped {len(places)} with {why} ({pairs.some(places, '')})"
                          for why, places in dropped.items()]
        if malformed:
            refused = f"nothing is written, for {len(malformed)} of {seen} records are refused"
            raise DataError("\n".join([*pairs.listed(malformed), refused]))
        if unmet := {*converter.drop, *converter.keys.values()} - converter.met:
            raise DataError(f"--drop, --keys: no record has the key {', '.join(sorted(unmet))}")
        if not kinds or ("sft" in kinds and len(kinds) > 1):
            raise DataError(f"{shlex.join(map(str, paths))}: " + (
                "records with one answer and with two; convert them apart" if kinds else "no record is left"))
        os.replace(part, out)
    except OSError as e:
        raise DataError(f"--out {out}: {e.strerror or e}") from None
    finally:
        part.unlink(missing_ok=True)
    for name, counts in (("keys left out", converter.left_out), ("copies left out", +converter.copies)):
        notes += [f"{name}: " + ", ".join(f"{key} ({counts[key]})" for key in sorted(counts))] * bool(counts)
    loss = next(iter(kinds)) if len(kinds) == 1 else "dpo"
    return [*notes, f"wrote {out}: {kinds.total()} records; to train on it:",
            shlex.join(["python", "train.py", "--loss", loss, "--data", str(out)])]

def main(argv=None):
    parser = argparse.ArgumentParser("convert.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"convert: {message}\n")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help=".jsonl .json .csv .tsv .parquet .arrow; also compressed")
    add("--out", required=True, metavar="OUT.jsonl", type=Path, help="the file to write")
    several = {"nargs": "+", "action": "extend", "default": []}
    add("--keys", **several, metavar="NAME=KEY", help="what is called prompt, chosen, ... here")
    add("--drop", **several, metavar="KEY", help="leave these keys out, at any depth")
    add("--drop_unclear", action="store_true", help="drop records that prefer nothing, or contradict it")
    add("--label", metavar="KEY", help="KTO data for --loss sft: keep the completions whose KEY is true")
    add("--turns", action="store_true", help="write HH's transcripts as messages, for other chat templates")
    add("--delimiter", help="what separates the columns of a .csv file")
    add("--overwrite", action="store_true", help="replace OUT.jsonl")
    options = parser.parse_intermixed_args(argv)
    out, keys = options.out, [word.partition("=")[::2] for word in options.keys]
    names = {*PROMPTS, "system", *(key for kind in KINDS for key in kind.keys.split())}
    try:
        if wrong := [f"{new}={old}" for new, old in keys if new not in names or not old]:
            raise DataError(f"--keys {wrong[0]}: must be NAME=KEY, with a NAME of {', '.join(sorted(names))}")
        if len(dict(keys)) < len(keys):
            raise DataError("--keys: a name has two keys; choose one")
        paths = [records.only_file(path) for path in options.files]
        same = any(out.resolve() == path.resolve() for path in paths)
        for wrong, what in ((out.suffix.lower() != ".jsonl", f"--out {out}: must end in .jsonl"),
                            (same, f"--out {out}: is one of the files to convert"),
                            (out.exists() and not options.overwrite, f"--out {out}: exists; see --overwrite"),
                            (len(options.delimiter or ",") != 1, "--delimiter: must be one character")):
            if wrong:
                raise DataError(what)
        converter = Converter(keys, options.drop, options.label, options.turns)
        print("\n".join(convert_files(paths, out, converter, options.drop_unclear, options.delimiter)))
    except (DataError, OSError) as e:
        print(f"convert: {e}", file=sys.stderr)
        return 2
    return 0

if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.exit(main())
