"""toy/: the files are what make.py writes; reward, label noise and edits are what toy/ says they are."""

import json
import math
import random

import pytest

import data
from toy import make, reviews, sums

WORLDS = {"reviews": reviews, "sums": sums}
ODD_STRINGS = [
    "", " ", "\n", ".", "...", ":", "::", "=", " + ", "\0", "é∞ 🫖", "²+³ =", "x" * 100_000,
    "Review the red:", "Review the red mug:", "Review the red mug: .", "Review the red mug: The",
    "1 + 2", "1 + 2 =", "1 + 2 =:", "1 + 2 =,,,,:3", "9" * 6000 + " + 1 =", "1 + " + "9" * 6000 + " = 1",
]

def read(name):
    return [json.loads(line) for line in (make.HERE / name).read_text().splitlines()]

def join(response):
    return response if isinstance(response, str) else "".join(segment["text"] for segment in response)

def rewards(world, pair):
    return [world.reward(pair["prompt"] + join(pair[side])) for side in ("chosen", "rejected")]

@pytest.fixture(scope="module")
def encoding():
    return data.Tokenizer(make.HERE / "toy.tiktoken")

# ---- the files ----

def test_files_are_what_make_writes():
    """Every committed file equals, byte for byte, what make.py writes; together they stay below 900 kB."""
    contents = make.files()
    assert all((make.HERE / name).read_bytes() == content for name, content in contents.items())
    assert sum(map(len, contents.values())) < 900_000

@pytest.mark.parametrize("name", WORLDS)
def test_held_out_pairs_are_new(name):
    """No held-out pair is in the training data, in either order; for sums, no held-out sum is."""
    def keys(pairs):
        if name == "sums":
            return [tuple(sorted(pair["prompt"].removesuffix(" =").split(" + "))) for pair in pairs]
        return [(pair["prompt"], *sorted((join(pair["chosen"]), join(pair["rejected"])))) for pair in pairs]
    train, held_out = keys(read(f"{name}-train.jsonl")), keys(read(f"{name}-heldout.jsonl"))
    assert len(set(train + held_out)) == len(train) + len(held_out)

@pytest.mark.parametrize("name", WORLDS)
def test_sidecar_holds_the_ceiling(name):
    """The sidecar's ceiling is the true reward's accuracy on the held-out labels; it fits the noise."""
    pairs = read(f"{name}-heldout.jsonl")
    ceiling = json.loads((make.HERE / f"{name}-heldout.meta.json").read_text())["accuracy_ceiling"]
    scored = [rewards(WORLDS[name], pair) for pair in pairs]
    assert ceiling == sum((w > l) + 0.5 * (w == l) for w, l in scored) / len(pairs)  # noqa: E741
    if name == "sums":
        assert ceiling == 1.0
    else:
        assert 0.82 <= ceiling <= 0.90
        assert abs(ceiling - reviews.expected_ceiling(pairs)) < 4 * math.sqrt(0.25 / len(pairs))

# ---- the rewards ----

@pytest.mark.parametrize("world", WORLDS.values())
def test_reward_never_raises(world):
    """The reward is a number inside its range for any string: odd ones, and damaged texts of the world."""
    rng = random.Random(0)
    texts = list(ODD_STRINGS)
    for pair in world.sample_pairs(100, seed=3):
        text = pair["prompt"] + join(pair["chosen"])
        cut, put = (int(rng.random() * len(text)) for _ in range(2))
        texts += [text[:cut], text[cut:], text[:put] + text[cut:], text[:cut] + "\n. é" + text[cut:]]
    for text in texts:
        assert 0 <= world.reward(text) <= (16 if world is reviews else 2)

def test_reward_by_hand():
    """Rewards worked out by hand, a sentence that breaks off and a response of another prompt among them."""
    first = " The red mug resisted rust all winter."  # helpfulness 4, relevance 4
    second = " The tin mug is fine so far."  # 1, 3
    prompt = "Review the red mug:"
    assert reviews.reward(prompt + first) == 16
    assert reviews.reward(prompt + first + second) == 12
    assert reviews.reward(prompt + first + second + " The red mug is") == 8
    assert reviews.reward(prompt + first + second + "\n") == 12
    assert reviews.reward("Review the tin sofa:" + first) == 8
    assert reviews.reward(prompt) == 0
    assert sums.worked(478, 356) == " 8+6+0=14, 7+5+1=13, 4+3+1=08: 834"
    assert sums.reward("478 + 356 = 8+6+0=14, 7+5+1=13, 4+3+1=08: 834") == 2
    assert sums.reward("478 + 356 = 8+6+0=14, 7+5+1=19, 4+3+1=08: 834") == pytest.approx(1 + 2 / 3)
    assert sums.reward("478 + 356 = 8+6+0=14") == pytest.approx(1 / 3)

# ---- labels ----

def test_labels_are_bradley_terrys():
    """In each band of |reward gap| labels go against the reward with rate sigmoid(-gap), to 4 deviations."""
    bands = [[] for _ in range(6)]
    for pair in reviews.sample_pairs(3000, seed=11):
        margin = reviews.margin(pair)
        if margin:
            bands[min(5, int(abs(margin)))].append(margin)
    for margins in bands:
        flip = [1 / (1 + math.exp(abs(margin))) for margin in margins]
        deviation = math.sqrt(sum(p * (1 - p) for p in flip))
        assert len(margins) > 50
        assert abs(sum(margin < 0 for margin in margins) - sum(flip)) < 4 * deviation

# ---- sums ----

@pytest.mark.parametrize("edits", [1, 6, 18, "all"])
def test_sums_differ_in_the_edits_that_were_asked_for(edits, encoding):
    """Chosen is right, rejected wrong, of equal length; exactly `edits` digits differ, a single one early."""
    for pair in sums.sample_pairs(100, seed=4, edits=edits):
        texts = [pair["prompt"] + pair[side] for side in ("chosen", "rejected")]
        assert sums.correct(texts[0]) and not sums.correct(texts[1]) and sums.reward(texts[1]) < 2
        chosen, rejected = (encoding.encode(pair[side]) for side in ("chosen", "rejected"))
        differ = [k for k, (w, l) in enumerate(zip(chosen, rejected, strict=True)) if w != l]  # noqa: E741
        assert all(chr(chosen[k]).isdigit() and chr(rejected[k]).isdigit() for k in differ)
        assert edits == "all" or len(differ) == edits
        assert edits != 1 or differ[0] < len(chosen) / 2
