"""What is in a preference data set, and what would go wrong with it: python tools/doctor.py FILE ...

Prints one pair as the model reads it, then counts, lengths, duplicates, biases and, for scored segments, the
scores. --plot draws lengths and edit distances; --segment splits plain responses into segments to be scored.
"""

import argparse
import hashlib
import json
import os
import shlex
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a script

import data  # noqa: E402
from plumbing import flags, formats  # noqa: E402

CLOSE = 0.1  # normalised edit distance below which the two responses are nearly the same text


# ---------------------------------------------------------------------------------------------------------
# Reading


class Findings:
    """What one pass over the files collects."""

    def __init__(self):
        self.records, self.malformed, self.example = 0, [], None  # malformed: (file:line, what)
        self.notes, self.ignored = [], Counter()  # what was not read: files, {key: records}
        self.forms = defaultdict(Counter)  # {file: {form: records}}
        self.lines = defaultdict(list)  # {finding: [file:line]}
        self.prompts, self.pairs = Counter(), Counter()  # {digest: how often}
        self.lengths, self.lost, self.distances = [], [], []  # (P, C, R); tokens lost by prompts; [0, 1]
        self.segments, self.scores = [], ([], [])  # (S_w, S_l, segments without a token); chosen, rejected


def examine(paths, tokenizer, block_size):
    """Read every record of the files -> Findings."""
    found, seen_cut = Findings(), set()
    for path in formats.list_files(paths, found.notes):
        for where, record in formats.read_records(path):
            found.records += 1
            try:
                form, prompt, *sides = formats.parse_record(record)
                found.forms[path][form] += 1
                found.ignored.update(formats.unread_keys(form, record))
                pair = data.encode_pair(tokenizer, prompt, *sides, block_size, where)
            except data.UnusablePair as e:
                found.lines[str(e)].append(where)
                continue
            except data.DataError as e:
                found.malformed.append((where, str(e)))
                continue
            chosen, rejected = ("".join(text for text, _ in side) for side in sides)
            key, swapped = digest(prompt, chosen, rejected), digest(prompt, rejected, chosen)
            cut_key = digest(*(ids.tobytes() for ids in (pair.prompt, pair.chosen, pair.rejected)))
            checks = {
                "cut": pair.cut,
                "duplicate": key in found.pairs,
                "contradiction": swapped in found.pairs,
                "equal once cut": cut_key in seen_cut and key not in found.pairs,
                "one token": min(len(pair.chosen), len(pair.rejected)) == 2,
                "repeats prompt": prompt and chosen.startswith(prompt) and rejected.startswith(prompt),
                "eot": any(map(formats.ends_in_eot, sides)),
                "merge": any(merges_over(tokenizer, prompt, response) for response in (chosen, rejected)),
            }
            for finding in (name for name, true in checks.items() if true):
                found.lines[finding].append(where)
            found.prompts[digest(prompt)] += 1
            found.pairs[key] += 1
            seen_cut.add(cut_key)
            found.example = found.example or pair
            found.lengths.append((len(pair.prompt), len(pair.chosen), len(pair.rejected)))
            found.lost += [pair.cut] if pair.cut else []
            C, R = pair.chosen[:-1].tolist(), pair.rejected[:-1].tolist()  # without end-of-text
            found.distances.append(edit_distance(C, R) / max(len(C), len(R)))
            S_w, S_l = len(pair.chosen_scores), len(pair.rejected_scores)
            owners = len(set(pair.chosen_segment.tolist())) + len(set(pair.rejected_segment.tolist()))
            found.segments.append((S_w, S_l, S_w + S_l - owners))
            if pair.chosen_scores.size:
                found.scores[0].append(pair.chosen_scores)
                found.scores[1].append(pair.rejected_scores)
    if found.malformed and not found.forms:
        where, what = found.malformed[0]
        raise data.DataError(f"{where}: {what} (and none of the {found.records} records is a pair)")
    if not found.records:
        raise data.DataError(f"{' '.join(map(str, paths))}: no records")
    return found


def digest(*parts):
    return hashlib.sha256(b"\0".join(x if isinstance(x, bytes) else x.encode() for x in parts)).digest()


def merges_over(tokenizer, prompt, response):
    """Would prompt and response, tokenised together, get a token that holds a part of both?"""
    prompt, response = prompt[-100:], response[:100]
    return tokenizer.encode(prompt + response) != tokenizer.encode(prompt) + tokenizer.encode(response)


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


# ---------------------------------------------------------------------------------------------------------
# The report


def printable(text):
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def render(pair, tokenizer, width=100):
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
            line = f"{' '.join(f'{x:g}' for x in score)}  " if score.size else ""
            indent = " " * len(line)
            for token in tokens:
                if len(line) + len(token) > width:
                    yield "    " + line
                    line = indent
                line += token
            yield "    " + line


def percentiles(name, values, form="{:8.0f}"):
    return f"  {name:<26}" + "".join(form.format(x) for x in np.percentile(values, (0, 10, 50, 90, 100)))


def report(found, tokenizer, block_size):
    """Findings -> lines of text."""
    for path, forms in found.forms.items():
        for form, n in forms.items():
            yield f"{path}: {n} records, {form} ({formats.FORMS[form].rule})"
    yield from found.notes
    if found.ignored:
        yield f"ignored keys: {formats.counted(found.ignored)}"
    if found.malformed:
        yield f"\n{len(found.malformed)} malformed records: training refuses to start until they are mended"
        yield from ("  " + line for line in formats.listed(found.malformed))
    n = len(found.lengths)
    if n:
        yield f"\nOne pair as the model reads it ({found.example.where}); a token in [ ] is scored"
        yield from ("  " + line for line in render(found.example, tokenizer))

    yield f"\nPairs: {n} of {found.records} can be used; they have {len(found.prompts)} different prompts"
    known = ("cut", "duplicate", "contradiction", "equal once cut", "one token", "repeats prompt", "eot",
             "merge")
    for reason in sorted(found.lines.keys() - set(known)):
        yield finding(found, reason, f"dropped: {reason}")
    if not n:
        return
    lost = f", {np.median(found.lost):.0f} tokens of it in the median" if found.lost else ""
    yield finding(found, "cut", f"prompt loses its beginning (block_size {block_size}){lost}")
    yield finding(found, "duplicate", "the same as an earlier pair")
    yield finding(found, "equal once cut", "the same as an earlier pair once prompts are cut")
    yield finding(found, "contradiction", "an earlier pair with chosen and rejected exchanged")
    yield finding(found, "one token", "response of one token (before end-of-text)")
    yield finding(found, "repeats prompt", "both responses repeat the prompt: is it meant to be scored?")
    yield finding(found, "eot", "response that ends in the text <|endoftext|>: it is added here, remove it")

    P, C, R = np.array(found.lengths).T
    yield "\nLength in tokens               min     10%     50%     90%     max   (end-of-text counted)"
    for name, values in (("prompt", P), ("chosen", C), ("rejected", R), ("row: all three", P + C + R)):
        yield percentiles(name, values)
    yield (f"  The longer response is the chosen one in {share(C > R)} of the pairs, the rejected one in "
           f"{share(C < R)}, equal in {share(C == R)}.")
    longer = (C > R).sum() / max(1, (C != R).sum())
    if abs(longer - 0.5) > 0.1:
        which, right = ("longer", longer) if longer > 0.5 else ("shorter", 1 - longer)
        yield f"  Length bias: to prefer the {which} one is right in {share(right)} where they differ."

    distances = np.array(found.distances)
    yield "\nEdit distance / longer length  min     10%     50%     90%     max   (0 = the same tokens)"
    yield percentiles("chosen to rejected", distances, "{:8.2f}")
    yield f"  {share(distances < CLOSE)} below {CLOSE}: DPO's likelihood failure lives here, see DPOP"

    yield "\nToken boundaries"
    yield finding(found, "merge", "prompt and response would share a token if tokenised together")
    if found.lines["merge"]:
        yield "  They are tokenised apart, here and in sample.py; elsewhere, do not tokenise them together."
    yield from report_segments(found)


def finding(found, name, text):
    """One line: how many, what, and the first three places."""
    where = found.lines.get(name, [])
    places = where[:3]
    if len(found.forms) == 1:  # one file, named above
        places = [place.removeprefix(f"{file}:").strip() for place in places for file in found.forms]
        places = [f"line {place}" if place.isdigit() else place for place in places]
    return f"  {len(where):7d}  {text}" + f": {', '.join(places)}{', ...' * (len(where) > 3)}" * bool(where)


def share(true):
    return f"{100 * np.mean(true):.1f} %"


def report_segments(found):
    S_w, S_l, empty = np.array(found.segments).T
    if not found.scores[0] and max(S_w.max(), S_l.max()) == 1:
        yield "\nSegments: none (2D-DPO needs them: --segment writes the form to fill in)"
        return
    yield "\nSegments                       min     10%     50%     90%     max"
    yield percentiles("in a chosen response", S_w)
    yield percentiles("in a rejected response", S_l)
    yield f"  S_w = S_l in {share(S_w == S_l)} of the pairs, S_w != S_l in {share(S_w != S_l)}: 2D-DPO pairs"
    yield "  the min(S_w, S_l) best segments of the chosen response with the worst of the rejected one."
    yield f"  {empty.sum()} segments hold no token and are masked."
    scored = len(found.scores[0])
    yield (f"  Coverage: {scored} of {len(S_w)} pairs are scored."
           + " A data set that is scored in part counts as unscored." * (0 < scored < len(S_w)))
    if not found.scores[0]:
        return
    widths = Counter(x.shape[1] for x in found.scores[0])
    if len(widths) > 1:
        yield f"  Pairs differ in their number of aspects, which training refuses: {dict(widths)}"
        return
    yield "\nScores                         min    mean     max   different values"
    for a in range(*widths):
        for name, parts in zip(("chosen", "rejected"), found.scores, strict=True):
            values = np.concatenate(parts)[:, a]
            note = "   (constant: it tells nothing apart)" if np.ptp(values) == 0 else ""
            yield (f"  {f'aspect {a + 1}, {name}':<26}{values.min():8g}{values.mean():8.3f}{values.max():8g}"
                   f"{len(np.unique(values)):8d}{note}")


def train_command(found, options):
    """The command that trains on these files as they were examined."""
    loss = "2d-dpo" if len(found.scores[0]) == len(found.lengths) else "dpo"
    room = max(1, len(found.lengths) // 10)  # as data.hold_out
    rare = any(len(n) > 1 and min(n.values()) <= room for n in (found.prompts, found.pairs))
    return shlex.join(["python", "train.py", "--loss", loss, "--data", *options.files, "--tokenizer",
                       options.tokenizer, "--block_size", str(options.block_size),
                       *([] if rare else ["--val_data", "HELD_OUT_PAIRS"])])


# ---------------------------------------------------------------------------------------------------------
# The other two outputs


def plot(found, path):
    """Histograms of lengths and of edit distances -> an image file."""
    from matplotlib.figure import Figure  # here alone: the report needs no plotting

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    lengths, distances = figure.subplots(1, 2)
    columns = np.array(found.lengths).T
    step = np.ceil(np.percentile(columns, 99.5) / 50)
    bins = np.arange(51) * step
    colors = {"prompt": "0.6", "chosen": "C0", "rejected": "C3"}
    for values, (name, color) in zip(columns, colors.items(), strict=True):
        lengths.hist(np.minimum(values, bins[-2]), bins, histtype="step", label=name, color=color, lw=1.5)
    lengths.set(xlabel="tokens (the last bin holds all that is longer)", ylabel="pairs", title="Length")
    lengths.legend()
    close = np.mean(np.array(found.distances) < CLOSE)
    distances.hist(found.distances, np.linspace(0, 1, 51), color="C0")
    distances.axvspan(0, CLOSE, color="C3", alpha=0.15, label=f"below {CLOSE}: {close:.1%}, see DPOP")
    distances.set(xlabel="token edit distance / longer length", ylabel="pairs", title="Chosen to rejected")
    distances.set_xlim(0, 1)
    distances.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise data.DataError(f"--plot {path}: {e}") from None


def segment_lines(paths):
    """Every pair in the segment form, as JSON lines; a response that has segments keeps them."""
    for path in formats.list_files(paths):
        for where, record in formats.read_records(path):
            try:
                _, prompt, *sides = formats.parse_record(record)
            except data.UnusablePair:
                continue
            except data.DataError as e:
                raise data.DataError(f"{where}: {e}") from None
            out = {"prompt": prompt}
            for key, side in zip(("chosen", "rejected"), sides, strict=True):
                if len(side) == 1 and not side[0][1]:
                    side = [(text, []) for text in formats.split_segments(side[0][0])]
                out[key] = [{"text": text, "scores": scores or []} for text, scores in side]
            yield json.dumps(out, ensure_ascii=False)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"doctor: {message}\n")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help=".jsonl, .json, .csv, .tsv or .parquet files, or folders")
    add("--tokenizer", default="gpt2", help="gpt2, bytes, FILE.tiktoken or FOLDER (default: gpt2)")
    add("--block_size", type=int, default=flags.DEFAULTS["block_size"],
        help="longest prompt + response in tokens (default: %(default)s, as in train.py)")
    add("--plot", metavar="FILE.png", help="also draw histograms of lengths and edit distances")
    add("--segment", action="store_true", help="no report: write the pairs to standard output, each response "
        "split into segments with empty scores, to be filled in")
    options = parser.parse_intermixed_args(arguments)
    if options.block_size < 2:
        parser.error("--block_size: at least 2")
    try:
        if options.segment:
            for line in segment_lines(options.files):
                print(line)
            print('fill in each "scores": [] with numbers >= 0, one for each aspect', file=sys.stderr)
            return 0
        tokenizer = data.Tokenizer(options.tokenizer)
        found = examine(options.files, tokenizer, options.block_size)
        for line in report(found, tokenizer, options.block_size):
            print(line)
        if options.plot and found.lengths:
            plot(found, options.plot)
            print(f"\nhistograms: {options.plot}")
        if found.lengths and not found.malformed and len({x.shape[1] for x in found.scores[0]}) < 2:
            print(f"\nTo train on this:\n  {train_command(found, options)}")
        return 2 if found.malformed else 0
    except data.DataError as e:
        print(f"doctor: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:  # of standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"doctor: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    sys.exit(main())
