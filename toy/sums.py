"""World (b): worked additions; the rejected answer differs from the chosen one in one early token. No noise.

prompt    "478 + 356 ="                           two numbers of equal width, 3 or 4 digits
response  " 8+6+0=14, 7+5+1=13, 4+3+1=08: 834"    columns from the right, each digit + digit + carry: result

A digit is one token. The rejected answer is the chosen one with `edits` digits of its first third made wrong;
all that follows is equal, the right result included. This is the low edit distance at which DPO loses chosen
probability and for which DPOP was made.
"""

import random
import re

WIDTHS = (3, 4)  # digits of a number
PROMPT = re.compile(r"([0-9]{1,9}) \+ ([0-9]{1,9}) =")
WORDS = [" +", " ="]  # with the space before them; all else is single bytes

def worked(a, b):
    """The right answer to a + b, worked out."""
    columns, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        columns.append(f" {x}+{y}+{carry}={x + y + carry:02d}")
        carry = (x + y + carry) // 10
    return ",".join(columns) + f": {a + b}"

# ---- the true reward: a function of the text alone ----

def reward(text):
    """Share of right columns, plus 1 for the right result: 0 to 2. What is no sum has 0; no string raises."""
    prompt = PROMPT.match(text)
    if not prompt:
        return 0.0
    columns, _, result = text[prompt.end():].rstrip().partition(":")
    right_columns, _, right_result = worked(int(prompt[1]), int(prompt[2])).partition(":")
    columns, right_columns = columns.split(","), right_columns.split(",")
    right = sum(column == wanted for column, wanted in zip(columns, right_columns, strict=False))
    return right / len(right_columns) + (result == right_result)

def correct(text):
    """Whether prompt + response is a sum worked out to the letter."""
    prompt = PROMPT.match(text)
    return bool(prompt) and text[prompt.end():].rstrip() == worked(int(prompt[1]), int(prompt[2]))

# ---- pairs ----

def below(rng, n):
    """An integer 0 … n-1. Uses only rng.random(), whose sequence is the same in every Python version."""
    return int(rng.random() * n)

def draw_sum(rng):
    low = 10 ** (WIDTHS[below(rng, len(WIDTHS))] - 1)
    return low + below(rng, 9 * low), low + below(rng, 9 * low)

def change_digits(answer, edits, rng):
    """`edits` digits of the answer's first third (of its first `edits`, if these are more) made wrong."""
    digits = [i for i, character in enumerate(answer) if character.isdigit()]
    if not 1 <= edits <= len(digits):
        raise ValueError(f"edits {edits}: this answer has {len(digits)} digits")
    early = digits[:max(edits, len(digits) // 3)]
    characters = list(answer)
    for _ in range(edits):
        i = early.pop(below(rng, len(early)))
        characters[i] = str((int(characters[i]) + 1 + below(rng, 9)) % 10)  # any digit but itself
    return "".join(characters)

def sample_pairs(n, seed, edits=1):
    """n pairs {"prompt", "chosen", "rejected"} of strings; no sum comes twice, in either order.

    edits  digit tokens changed in the rejected answer, 1 to 18; or "all": the rejected answer is the worked
           answer to another sum, with as many tokens and another result
    """
    rng = random.Random(seed)
    pairs, seen = [], set()
    while len(pairs) < n:
        a, b = draw_sum(rng)
        key = (min(a, b), max(a, b))
        if key in seen:
            continue
        seen.add(key)
        chosen = rejected = worked(a, b)
        if edits == "all":
            while len(rejected) != len(chosen) or rejected.split(":")[1] == chosen.split(":")[1]:
                rejected = worked(*draw_sum(rng))
        else:
            rejected = change_digits(chosen, edits, rng)
        pairs.append({"prompt": f"{a} + {b} =", "chosen": chosen, "rejected": rejected})
    return pairs

def ceiling(pairs):
    """The true reward's accuracy on these labels, ties counted one half."""
    total = 0.0
    for pair in pairs:
        chosen, rejected = (reward(pair["prompt"] + pair[side]) for side in ("chosen", "rejected"))
        total += (chosen > rejected) + 0.5 * (chosen == rejected)
    return total / len(pairs)
