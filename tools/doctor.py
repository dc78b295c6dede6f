"""What is in a preference data set, and what would go wrong with it: python tools/doctor.py FILE.jsonl ...

Prints one pair as the loss sees it, then counts, lengths, duplicates, length bias, edit distances.
--segment writes the pairs with each response split into segments, whose scores are to be filled in.
"""

import argparse
import json
import os
import re
import shlex
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script

import data  # noqa: E402
from plumbing import pairs  # noqa: E402
from plumbing.files import read_bytes  # noqa: E402

CLOSE = 0.1  # normalised edit distance below which the two responses are nearly the same text

class Findings:
    """What one pass over the files collects."""

    def __init__(self, paths, tokenizer, block_size):
        self.records, self.malformed, self.pairs = 0, [], []
        self.lines = defaultdict(list)  # {what was found: [file:line]}
        self.seen, self.prompts, self.distances = Counter(), Counter(), []  # {hash: how often}; [0, 1]
        for path in paths:
            for where, prompt, *sides in pairs.read(path, self.malformed):
                self.records += 1
                try:
                    pair = data.encode_pair(tokenizer, prompt, *sides, block_size, where)
                except data.UnusablePair as e:
                    self.lines[f"dropped: {e}"].append(where)
                    continue
                self.look_at(pair, str(prompt), *("".join(text for text, _ in side) for side in sides))
        self.records += len(self.malformed)

    def look_at(self, pair, prompt, chosen, rejected):
        C, R = pair.chosen[:-1].tolist(), pair.rejected[:-1].tolist()  # without end-of-text
        for finding, true in {
                "prompt loses its beginning": pair.cut,
                "the same as an earlier pair": self.seen[hash((prompt, chosen, rejected))],
                "an earlier pair, chosen and rejected exchanged": self.seen[hash((prompt, rejected, chosen))],
                "response of one token (before end-of-text)": min(len(C), len(R)) == 1,
                "both responses repeat the prompt: is it meant to be scored?":
                    prompt and chosen.startswith(prompt) and rejected.startswith(prompt),
                f"response that ends in the text {pairs.EOT}: it is added here, remove it":
                    any(text.rstrip().endswith(pairs.EOT) for text in (chosen, rejected))}.items():
            if true:
                self.lines[finding].append(pair.where)
        self.seen[hash((prompt, chosen, rejected))] += 1
        self.prompts[hash(prompt)] += 1
        self.distances.append(edit_distance(C, R) / max(len(C), len(R)))
        self.pairs.append(pair)

def edit_distance(a, b):
    """Levenshtein distance of two lists; a column of the table is the bits of two ints (Hyyro 2003)."""
    if not a:
        return len(b)
    where, mask, last = defaultdict(int), (1 << len(a)) - 1, 1 << (len(a) - 1)
    for i, x in enumerate(a):
        where[x] |= 1 << i
    up, down, distance = mask, 0, len(a)  # rows of the column at which the table grows by 1, falls by 1
    for x in b:
        equal = where[x] if x in where else 0
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right, left = down | ~(diagonal | up) & mask, up & diagonal
        distance += bool(right & last) - bool(left & last)
        right, left = right << 1 | 1, left << 1
        up, down = (left | ~(equal | down | right)) & mask, right & (equal | down) & mask
    return distance

def printable(text):
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

def render(pair, tokenizer):
    """A pair as the model reads it: the end of its prompt, and each scored token in brackets."""
    prompt = tokenizer.decode(pair.prompt)
    yield f"prompt: {len(pair.prompt)} tokens, read but not scored{'; its end:' if len(prompt) > 400 else ''}"
    for line in prompt[-400:].split("\n"):
        yield "    " + printable(line)
    for side in ("chosen", "rejected"):
        ids, segment = getattr(pair, side), getattr(pair, f"{side}_segment")
        scores = getattr(pair, f"{side}_scores")
        yield f"{side}: {len(ids)} tokens, all scored"
        for k, score in enumerate(scores):
            tokens = [f"[{printable(tokenizer.decode([i]))}]" for i in ids[segment == k]]
            if len(tokens) > 80:
                tokens[60:-5] = [f" ... {len(tokens) - 65} more ... "]
            yield "    " + " ".join(f"{x:g}" for x in score) + "  " * bool(score.size) + "".join(tokens)

def percentiles(name, values, form="{:8.0f}"):
    return f"  {name:<26}" + "".join(form.format(x) for x in np.percentile(values, (0, 10, 50, 90, 100)))

def share(true):
    return f"{100 * np.mean(true):.1f} %"

def report(found, tokenizer, block_size):
    """Findings -> lines of text."""
    if found.malformed:
        yield f"{len(found.malformed)} malformed records: training refuses to start until they are right"
        yield from ("  " + line for line in pairs.listed(found.malformed))
    n = len(found.pairs)
    if n:
        yield f"One pair as the loss sees it ({found.pairs[0].where}); a token in [ ] is scored"
        yield from ("  " + line for line in render(found.pairs[0], tokenizer))
    yield (f"\nPairs: {n} of {found.records} can be used; they have {len(found.prompts)} different prompts; "
           f"block_size {block_size}")
    for finding, where in sorted(found.lines.items()):
        yield f"  {len(where):7d}  {finding} ({pairs.some(where, where[0].rpartition(':')[0])})"
    if not n:
        return
    P, C, R = (np.array([len(getattr(pair, side)) for pair in found.pairs])
               for side in ("prompt", "chosen", "rejected"))
    yield "\nLength in tokens               min     10%     50%     90%     max   (end-of-text counted)"
    for name, values in (("prompt", P), ("chosen", C), ("rejected", R), ("row: all three", P + C + R)):
        yield percentiles(name, values)
    yield (f"  The longer response is the chosen one in {share(C > R)} of the pairs, the rejected one in "
           f"{share(C < R)}, equal in {share(C == R)}.")
    longer = (C > R).sum() / max(1, (C != R).sum())
    if (C != R).any() and abs(longer - 0.5) > 0.1:
        which, right = ("longer", longer) if longer > 0.5 else ("shorter", 1 - longer)
        yield f"  Length bias: to prefer the {which} one is right in {share(right)} where they differ."
    distances = np.array(found.distances)
    yield "\nEdit distance / longer length  min     10%     50%     90%     max   (0 = the same tokens)"
    yield percentiles("chosen to rejected", distances, "{:8.2f}")
    yield f"  {share(distances < CLOSE)} below {CLOSE}: DPO's likelihood failure lives here, see DPOP"
    S = [len(scores) for pair in found.pairs for scores in (pair.chosen_scores, pair.rejected_scores)]
    scored = sum(pair.chosen_scores.size > 0 for pair in found.pairs)
    yield f"\nSegments: {min(S)} to {max(S)} a response; {scored} of {n} pairs have scores, 2D-DPO needs all"

def train_command(found, options):
    """The command that trains on these files as they were examined."""
    loss = "2d-dpo" if all(pair.chosen_scores.size for pair in found.pairs) else "dpo"
    return shlex.join(["python", "train.py", "--loss", loss, "--data", *options.files, "--tokenizer",
                       options.tokenizer, "--block_size", str(options.block_size)])

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

def segment_lines(paths):
    """Every pair with segments, as JSON lines; a response that has some keeps them."""
    malformed = []
    for path in paths:
        lines = dict(pairs.lines_of(path, read_bytes(path)))
        for where, _, *sides in pairs.read(path, malformed):
            record = pairs.parse_json(lines[where.removeprefix(str(path)).partition(" ")[0]])
            out = {key: record[key] for key in ("id", "prompt") if key in record}
            for key, side in zip(("chosen", "rejected"), sides, strict=True):
                if len(side) == 1 and not side[0][1]:
                    side = [(text, []) for text in split_segments(side[0][0])]
                out[key] = [{"text": text, "scores": scores or []} for text, scores in side]
            yield json.dumps(out, ensure_ascii=False)
    if malformed:
        raise data.DataError("\n".join(pairs.listed(malformed)))

def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"doctor: {message}\n")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help=".jsonl or .jsonl.gz files of pairs")
    add("--tokenizer", default="gpt2", help="gpt2, bytes, FILE.tiktoken or FOLDER (default: gpt2)")
    add("--block_size", type=int, default=256, help="longest prompt + response in tokens (default: 256)")
    add("--segment", action="store_true", help="write the pairs to standard output, each response split into "
        "segments with empty scores, to be filled in")
    options = parser.parse_intermixed_args(arguments)
    if not 2 <= options.block_size < 2**63:
        parser.error(f"--block_size {options.block_size}: must be at least 2 and below 2^63")
    try:
        files = pairs.files_of(options.files)
        if options.segment:
            for line in segment_lines(files):
                print(line)
            print('fill in each "scores": [] with numbers >= 0, one for each aspect', file=sys.stderr)
            return 0
        tokenizer = data.Tokenizer(options.tokenizer)
        found = Findings(files, tokenizer, options.block_size)
        for line in report(found, tokenizer, options.block_size):
            print(line)
        if found.pairs and not found.malformed:
            print(f"\nTo train on this:\n{train_command(found, options)}")
        return 2 if found.malformed else 0
    except BrokenPipeError:  # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (data.DataError, OSError) as e:
        print(f"doctor: {e}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.exit(main())
