"""World (a): short reviews of a named thing; sentences scored on two aspects, labels noisy in a known way.

prompt    "Review the copper kettle:"
response  2 to 4 sentences, " The ADJECTIVE NOUN VERDICT EVIDENCE." each with its leading space

A sentence has two integer scores, 0 to 4, read off its words; a review has one reward, 0 to 16:
    helpfulness = points of VERDICT (vague, opinion, fact: 0, 1, 2) + points of EVIDENCE (none, loose, a test)
    relevance   = 1 if ADJECTIVE is the prompt's + 3 if NOUN is the prompt's
    reward      = GAIN * mean over sentences of (WEIGHTS . scores)

The mean and not the sum: a longer review is not a better one. Every phrase has two words and every
sentence 8 tokens, so that the length of a review says nothing about its reward.
"""

import math
import random
import re

ASPECTS = ("helpfulness", "relevance")
WEIGHTS = (0.5, 0.5)  # of the two aspects
GAIN = 4.0  # reward per point; sets the label noise: a perfect judge agrees with 85 % of the labels
OWN = 0.6  # probability that a sentence names the prompt's adjective; the same, independently, for its noun

ADJECTIVES = "big blue brass copper green new oak old red round small steel tin wool".split()
NOUNS = "bike bowl chair clock coat desk drum fan flute kettle lamp mug radio shelf sofa stool vase".split()
# VERDICTS[p], EVIDENCE[p]: the phrases that are worth p points
VERDICTS = (("is fine", "seems okay", "looks nice", "feels normal"),
            ("works well", "looks solid", "cleans easily", "feels sturdy"),
            ("survived rain", "resisted rust", "lasted years", "passed inspection"))
EVIDENCE = (("I guess", "or so", "they say", "I suppose"),
            ("so far", "at home", "most days", "for now"),
            ("under load", "every night", "in tests", "all winter"))

VERDICT_POINTS = {phrase: points for points, phrases in enumerate(VERDICTS) for phrase in phrases}
EVIDENCE_POINTS = {phrase: points for points, phrases in enumerate(EVIDENCE) for phrase in phrases}
PHRASES = ["the The", *ADJECTIVES, *NOUNS, *VERDICT_POINTS, *EVIDENCE_POINTS]
# every word as it stands in a text, with the space before it
WORDS = ["Review"] + sorted({" " + word for phrase in PHRASES for word in phrase.split()})

PROMPT = re.compile(r"Review the (\w+) (\w+):")
SENTENCE = re.compile(rf" The ({'|'.join(ADJECTIVES)}) ({'|'.join(NOUNS)})"
                      rf" ({'|'.join(VERDICT_POINTS)}) ({'|'.join(EVIDENCE_POINTS)})\.")

# ---- the true reward: a function of the text alone ----

def score_sentences(prompt, response):
    """[(sentence, [helpfulness, relevance]), …]; joined, the response without its trailing white space.

    A sentence out of the grammar, a broken-off last one included, scores [0, 0]. No string raises.
    """
    item = PROMPT.fullmatch(prompt)
    scored = []
    for text in re.findall(r"[^.]*\.|[^.]+", response.rstrip()):
        sentence = SENTENCE.fullmatch(text)
        helpfulness = relevance = 0
        if sentence:
            helpfulness = VERDICT_POINTS[sentence[3]] + EVIDENCE_POINTS[sentence[4]]
        if sentence and item:
            relevance = (sentence[1] == item[1]) + 3 * (sentence[2] == item[2])
        scored.append((text, [helpfulness, relevance]))
    return scored

def reward(text):
    """The true reward of prompt + response, 0 to 16; no response has 0. The first ':' closes the prompt."""
    prompt, colon, response = text.partition(":")
    scored = score_sentences(prompt + colon, response)
    points = [weight * score for _, scores in scored for weight, score in zip(WEIGHTS, scores, strict=True)]
    return GAIN * sum(points) / max(1, len(scored))

# ---- the base distribution and its labelled pairs ----

def pick(rng, items):
    """One item, uniformly. Uses only rng.random(), whose sequence is the same in every Python version."""
    return items[int(rng.random() * len(items))]

def own_or_other(rng, own, words):
    return own if rng.random() < OWN else pick(rng, [word for word in words if word != own])

def sample_response(adjective, noun, rng):
    """A review of that thing from the base distribution: 2, 3 or 4 sentences, every slot drawn on its own."""
    return "".join(f" The {own_or_other(rng, adjective, ADJECTIVES)} {own_or_other(rng, noun, NOUNS)}"
                   f" {pick(rng, pick(rng, VERDICTS))} {pick(rng, pick(rng, EVIDENCE))}."
                   for _ in range(pick(rng, (2, 3, 4))))

def sample_pairs(n, seed):
    """n distinct pairs {"prompt", "chosen", "rejected"}; a response is a list of {"text", "scores"}.

    Both responses come from the base distribution. The label is Bradley-Terry's: response a is
    the chosen one with probability sigmoid(reward(a) - reward(b)).
    """
    rng = random.Random(seed)
    pairs, seen = [], set()
    while len(pairs) < n:
        adjective, noun = pick(rng, ADJECTIVES), pick(rng, NOUNS)
        prompt = f"Review the {adjective} {noun}:"
        a, b = sample_response(adjective, noun, rng), sample_response(adjective, noun, rng)
        a_wins = rng.random() < sigmoid(reward(prompt + a) - reward(prompt + b))
        key = (prompt, min(a, b), max(a, b))
        if a == b or key in seen:
            continue
        seen.add(key)
        a, b = ([{"text": text, "scores": scores} for text, scores in score_sentences(prompt, response)]
                for response in (a, b))
        pairs.append({"prompt": prompt, "chosen": a if a_wins else b, "rejected": b if a_wins else a})
    return pairs

# ---- what a perfect reward model can reach ----

def margin(pair):
    """reward(chosen) - reward(rejected): the log-odds of the pair's label."""
    chosen, rejected = ("".join(segment["text"] for segment in pair[side]) for side in ("chosen", "rejected"))
    return reward(pair["prompt"] + chosen) - reward(pair["prompt"] + rejected)

def ceiling(pairs):
    """The true reward's accuracy on these labels, ties counted one half."""
    margins = [margin(pair) for pair in pairs]
    return sum((m > 0) + 0.5 * (m == 0) for m in margins) / len(pairs)

def expected_ceiling(pairs):
    """The same, averaged over the label noise: the mean of max(p, 1 - p)."""
    return sum(sigmoid(abs(margin(pair))) for pair in pairs) / len(pairs)

def sigmoid(x):
    return 1 / (1 + math.exp(-x))  # |x| <= 16 here: no overflow
