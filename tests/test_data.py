"""data.py from token ids to the arguments of a loss: grids and sums written out by hand, order, hold-out.

Files are tested in test_pairs.py, vocabularies in test_vocab.py.
"""

import base64
from collections import Counter

import numpy as np
import pytest
import torch

import data
from data import Pair, collate, predicting_columns

BYTES = data.Tokenizer("bytes")
EOT = 256

# ---- Helpers ----

def make_pair(prompt, chosen, rejected, chosen_segment=None, rejected_segment=None, chosen_scores=None,
              rejected_scores=None):
    """A Pair from lists; one unscored segment a side unless given."""
    def ints(x, default=None):
        return np.array(default if x is None else x, dtype=np.int32)

    def scores(x):
        return np.zeros((1, 0)) if x is None else np.array(x, dtype=np.float64)

    return Pair(ints(prompt), ints(chosen), ints(rejected), ints(chosen_segment, [0] * len(chosen)),
                ints(rejected_segment, [0] * len(rejected)), scores(chosen_scores), scores(rejected_scores))

def encode(chosen, rejected="x", prompt="Q", block_size=1000, tokenizer=BYTES):
    """Sides are texts, or lists of segments (text, score, ...)."""
    sides = [[(side, None)] if isinstance(side, str) else [(text, scores) for text, *scores in side]
             for side in (chosen, rejected)]
    return data.encode_pair(tokenizer, prompt, *sides, block_size)

@pytest.fixture
def merging(tmp_path):
    """A tokenizer in which "bc" is token 256 and end-of-text 257."""
    tokens = [bytes([b]) for b in range(256)] + [b"bc"]
    lines = (base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    (tmp_path / "v.tiktoken").write_bytes(b"".join(lines))
    return data.Tokenizer(tmp_path / "v.tiktoken")

TWO_PAIRS = [
    make_pair([1, 2, 3], [4, 5, 0], [6, 0], [0, 0, 1], [0, 0], [[2, 8], [4, 6]], [[1, 3]]),
    make_pair([1], [7, 0], [8, 9, 0], [0, 0], [1, 1, 1], [[5, 5]], [[9, 9], [7, 7]]),  # rejected: 0 is empty
]

# ---- collate ----

def test_a_pair_is_one_row_prompt_chosen_rejected_and_both_responses_continue_the_prompt():
    batch = collate(TWO_PAIRS)
    assert batch.tokens.tolist() == [
        [1, 2, 3, 4, 5, 0, 6, 0],  # prompt 1 2 3, chosen 4 5 eot, rejected 6 eot
        [1, 7, 0, 8, 9, 0, 0, 0],  # prompt 1, chosen 7 eot, rejected 8 9 eot, two columns of padding
    ]
    assert batch.positions.tolist() == [
        [0, 1, 2, 3, 4, 5, 3, 4],  # the rejected response starts where the chosen one does: after the prompt
        [0, 1, 2, 1, 2, 3, 0, 0],
    ]
    assert batch.branch.tolist() == [
        [0, 0, 0, 1, 1, 1, 2, 2],
        [0, 1, 1, 2, 2, 2, 3, 3],
    ]
    assert len(batch) == 2 and batch.length.tolist() == [[3, 2], [2, 3]] and batch.weight == 1

def test_a_token_sees_the_prompt_and_its_own_branch_up_to_itself():
    mask = collate(TWO_PAIRS).mask()
    assert mask.shape == (2, 1, 8, 8)
    grids = ["\n".join("".join(".x"[x] for x in row) for row in grid) for grid in mask[:, 0].tolist()]
    assert grids[0].split() == [
        # pppcccrr
        "x.......",  # prompt
        "xx......",
        "xxx.....",
        "xxxx....",  # chosen: prompt and chosen
        "xxxxx...",
        "xxxxxx..",
        "xxx...x.",  # rejected: prompt and rejected, nothing of chosen
        "xxx...xx",
    ]
    assert grids[1].split() == [
        # pccrrr__
        "x.......",  # prompt
        "xx......",  # chosen
        "xxx.....",
        "x..x....",  # rejected
        "x..xx...",
        "x..xxx..",
        "x.....x.",  # padding sees something (no NaN), and no response sees padding
        "x.....xx",
    ]

@pytest.mark.parametrize("P, C, R, columns", [
    (3, 2, 2, [2, 3] + [2, 5]),  # row p p p c c r r: the last prompt token predicts both first tokens
    (2, 3, 1, [1, 2, 3] + [1]),
    (1, 1, 3, [0] + [0, 2, 3]),
    (3, 2, 0, [2, 3]),  # a row of SFT has no rejected response
    (1, 1, 0, [0]),
])
def test_the_column_before_predicts_a_token_and_the_last_prompt_token_both_first_tokens(P, C, R, columns):
    assert predicting_columns(P, C, R).tolist() == columns

def test_the_response_tokens_are_listed_flat_with_the_place_that_predicts_each():
    batch = collate(TWO_PAIRS)
    assert batch.source.tolist() == [  # chosen 0, rejected 0, chosen 1, rejected 1
        [0, 0, 0] + [0, 0] + [1, 1] + [1, 1, 1],  # rows
        [2, 3, 4] + [2, 6] + [0, 1] + [0, 3, 4],  # columns
    ]
    assert batch.target.tolist() == [4, 5, 0, 6, 0, 7, 0, 8, 9, 0]
    assert batch.response.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert batch.segment.tolist() == [0, 0, 1, 2, 2, 4, 4, 7, 7, 7]  # response * 2 + segment
    assert batch.starts == [0, 5, 10]

def test_scores_stand_by_pair_side_and_segment_and_a_segment_without_a_token_is_masked():
    batch = collate(TWO_PAIRS)
    assert batch.scores.tolist() == [
        [[[2, 8], [4, 6]], [[1, 3], [0, 0]]],  # pair 0: two chosen segments, one rejected
        [[[5, 5], [0, 0]], [[9, 9], [7, 7]]],
    ]
    assert batch.segment_mask.tolist() == [
        [[True, True], [True, False]],
        [[True, False], [False, True]],  # the rejected response's first segment owns no token
    ]

def test_rows_are_padded_to_a_multiple_and_nothing_else_changes():
    plain, padded = collate(TWO_PAIRS), collate(TWO_PAIRS, multiple=5)
    assert plain.tokens.shape == (2, 8) and padded.tokens.shape == (2, 10)
    assert torch.equal(padded.tokens[:, :8], plain.tokens) and padded.branch[:, 8:].eq(data.PADDING).all()
    for name in ("source", "target", "response", "segment", "scores", "segment_mask", "length", "pair"):
        assert torch.equal(getattr(padded, name), getattr(plain, name)), name

def test_a_row_of_sft_is_a_causal_row_of_prompt_and_chosen():
    pairs = data.pack(TWO_PAIRS).without_scores(chosen_only=True)
    batch = collate([pairs[i] for i in range(2)])
    assert pairs.lengths.tolist() == [6, 3] and pairs[0].where == TWO_PAIRS[0].where
    assert pairs.n_aspects == 0 and pairs[0].rejected_scores.shape == (0, 0)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 0], [1, 7, 0, 0, 0, 0]]
    assert batch.branch.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 3, 3, 3]]
    assert batch.source.tolist() == [[0, 0, 0, 1, 1], [2, 3, 4, 0, 1]]
    assert batch.target.tolist() == [4, 5, 0, 7, 0]
    assert batch.response.tolist() == [0, 0, 0, 2, 2]
    assert batch.starts == [0, 3, 5] and batch.length.tolist() == [[3, 0], [2, 0]]
    assert batch.mask() is None

def test_chunks_are_whole_pairs_in_order_with_at_most_that_many_tokens_or_one_pair():
    pairs = [make_pair([1], [2] * c, [3] * r) for c, r in ((3, 2), (1, 2), (6, 6), (1, 1), (1, 1))]
    batch = collate(pairs)  # response tokens per pair: 5 3 12 2 2; they start at 0 5 8 20 22 24

    def chunks(max_tokens):
        return [((p.start, p.stop), (n.start, n.stop)) for p, n in batch.chunks(max_tokens)]

    assert chunks(1) == [((0, 1), (0, 5)), ((1, 2), (5, 8)), ((2, 3), (8, 20)), ((3, 4), (20, 22)),
                         ((4, 5), (22, 24))]
    assert chunks(7) == [((0, 1), (0, 5)), ((1, 2), (5, 8)), ((2, 3), (8, 20)), ((3, 5), (20, 24))]
    assert chunks(8) == [((0, 2), (0, 8)), ((2, 3), (8, 20)), ((3, 5), (20, 24))]
    assert chunks(10**9) == [((0, 5), (0, 24))]

# ---- pair_terms: sums by hand. Token n has log-probability 2^n: every sum says which tokens are in it ----

LOGPS = 2.0 ** torch.arange(10, dtype=torch.float64)  # 1 2 4 | 8 16 || 32 64 | 128 256 512

def terms_of(batch, pairs, logps, ref_logps=None, kl=None, **more):
    tokens = {"logps": logps, "ref_logps": ref_logps, "kl": kl}
    return data.pair_terms(batch, pairs, **{k: x for k, x in tokens.items() if x is not None}, **more)

def lists(terms):
    return {name: value.tolist() for name, value in terms.items()}

def test_without_scores_the_terms_are_sums_over_the_responses_and_their_lengths():
    batch = collate(list(data.pack(TWO_PAIRS).without_scores()))
    assert lists(terms_of(batch, slice(0, 2), LOGPS, 10 * LOGPS, 100 * LOGPS)) == {
        "chosen_logps": [1 + 2 + 4, 32 + 64], "rejected_logps": [8 + 16, 128 + 256 + 512],
        "ref_chosen_logps": [70, 960], "ref_rejected_logps": [240, 8960],
        "chosen_seq_kl": [700, 9600], "rejected_seq_kl": [2400, 89600],
        "chosen_length": [3, 2], "rejected_length": [2, 3],
    }

def test_with_scores_the_terms_are_sums_over_the_segments_with_rewards_and_masks():
    terms = terms_of(collate(TWO_PAIRS), slice(0, 2), LOGPS, 10 * LOGPS, 100 * LOGPS)
    assert lists(terms) == {
        "chosen_logps": [[1 + 2, 4], [32 + 64, 0]], "rejected_logps": [[8 + 16, 0], [0, 128 + 256 + 512]],
        "ref_chosen_logps": [[30, 40], [960, 0]], "ref_rejected_logps": [[240, 0], [0, 8960]],
        "chosen_seq_kl": [[300, 400], [9600, 0]], "rejected_seq_kl": [[2400, 0], [0, 89600]],
        "chosen_rewards": [[(2 + 8) / 2, (4 + 6) / 2], [5, 0]], "rejected_rewards": [[2, 0], [9, 7]],
        "chosen_mask": [[True, True], [True, False]], "rejected_mask": [[True, False], [False, True]],
        "chosen_length": [3, 2], "rejected_length": [2, 3],
    }
    assert terms["chosen_rewards"].dtype == torch.float64  # a run in float64 has its rewards in float64

@pytest.mark.parametrize("weights", [(0.25, 0.75), torch.tensor([0.25, 0.75]), np.array([0.25, 0.75])])
def test_aspect_weights_weigh_the_scores(weights):
    terms = terms_of(collate(TWO_PAIRS), slice(0, 2), LOGPS, None, None, aspect_weights=weights)
    assert terms["chosen_rewards"].tolist() == [[0.25 * 2 + 0.75 * 8, 0.25 * 4 + 0.75 * 6], [5, 0]]
    assert terms["rejected_rewards"].tolist() == [[0.25 * 1 + 0.75 * 3, 0], [9, 7]]

@pytest.mark.parametrize("ref_logps, kl, absent", [
    (None, None, ["ref_chosen_logps", "ref_rejected_logps", "chosen_seq_kl", "rejected_seq_kl"]),
    (LOGPS, None, ["chosen_seq_kl", "rejected_seq_kl"]),
])
def test_what_is_not_known_is_not_among_the_terms_and_the_rest_is_the_same(ref_logps, kl, absent):
    for pairs in (TWO_PAIRS, list(data.pack(TWO_PAIRS).without_scores())):
        every, some = (lists(terms_of(collate(pairs), slice(0, 2), LOGPS, *rest))
                       for rest in ((LOGPS, LOGPS), (ref_logps, kl)))
        assert some == {name: value for name, value in every.items() if name not in absent}
        assert len(every) - len(some) == len(absent)

@pytest.mark.parametrize("scored", [True, False])
def test_a_slice_in_the_middle_of_a_batch_gives_the_terms_of_its_pairs_alone(scored):
    three = [TWO_PAIRS[1], TWO_PAIRS[0], TWO_PAIRS[1]]
    three = three if scored else list(data.pack(three).without_scores())
    logps = 2.0 ** torch.arange(15, dtype=torch.float64)
    whole = terms_of(collate(three), slice(0, 3), logps, logps, logps)
    for pairs in (slice(1, 2), slice(1, 3), slice(2, 3)):
        n = slice(5 * pairs.start, 5 * pairs.stop)
        part = terms_of(collate(three), pairs, logps[n], logps[n], logps[n])
        assert lists(part) == {name: value[pairs].tolist() for name, value in whole.items()}
    middle = terms_of(collate(three), slice(1, 2), logps[5:10], None, None)
    assert middle["chosen_logps"].tolist() == ([[32 + 64, 128]] if scored else [32 + 64 + 128])
    assert middle["rejected_logps"].tolist() == ([[256 + 512, 0]] if scored else [256 + 512])

def test_the_sums_pass_gradients_to_their_tokens():
    logps = LOGPS.clone().requires_grad_()
    terms = terms_of(collate(TWO_PAIRS), slice(0, 2), logps, None, None)
    (terms["chosen_logps"][0, 1] + 3 * terms["rejected_logps"][1, 1]).backward()
    assert logps.grad.tolist() == [0, 0, 1, 0, 0, 0, 0, 3, 3, 3]

# ---- Texts -> a pair: what is cut and what is not, which segment owns a token ----

def test_a_token_belongs_to_the_segment_of_its_last_byte_and_end_of_text_to_the_last_segment(merging):
    p = encode([("ab",), ("cd",)], tokenizer=merging)
    assert p.chosen.tolist() == [ord("a"), 256, ord("d"), 257]  # tokenised whole, not segment by segment
    assert p.chosen_segment.tolist() == [0, 1, 1, 1]  # "bc" begins in segment 0 and ends in segment 1

def test_segments_are_counted_in_bytes_not_in_characters():
    p = encode([("é",), ("ü!",), ("日",)])
    #                                  é     ü     !  日          eot
    assert p.chosen_segment.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]

def test_messages_are_rendered_and_their_responses_get_a_lead_that_the_first_segment_owns():
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    text = "\n\nSystem: s\n\nHuman: u\n\nAssistant: a\n\nHuman: u\n\nAssistant:"
    assert BYTES.render(messages) == text
    assert BYTES.encode_prompts([messages, text, ""]) == [BYTES.encode(text)] * 2 + [[EOT]]
    for first, owners in (("ab", [0, 0, 0, 1, 1]), ("", [0, 1, 1])):
        p, plain = (encode([(first,), ("c",)], "x", prompt) for prompt in (messages, text))
        assert BYTES.decode(p.chosen) == " " + BYTES.decode(plain.chosen) and (p.prompt == plain.prompt).all()
        assert p.chosen_segment.tolist() == owners and BYTES.decode(p.rejected) == " x<|endoftext|>"

def test_for_sft_no_rejected_response_is_kept():
    [p] = data.encode_pairs(BYTES, [("f:1", "Q", [("a", None)], None)], 10)
    assert p.chosen.tolist() == [ord("a"), EOT] and collate([p]).length.tolist() == [[2, 0]]
    assert len(p.rejected) == len(p.rejected_segment) == len(p.rejected_scores) == 0

def test_an_empty_segment_owns_no_token_and_is_masked_but_the_last_one_owns_end_of_text():
    p = encode([("a", 1), ("", 2), ("b", 3), ("", 4)], [("x", 1)])
    assert p.chosen_segment.tolist() == [0, 2, 3]
    assert collate([p]).segment_mask[0, 0].tolist() == [True, False, True, True]

def test_a_prompt_loses_its_front_and_a_response_never_anything():
    p = encode("12345", "123", prompt="abcdefgh", block_size=10)
    assert BYTES.decode(p.prompt) == "efgh" and p.cut == 4  # 10 - max(5 + 1, 3 + 1) = 4 tokens are left
    assert BYTES.decode(p.chosen) == "12345<|endoftext|>" and BYTES.decode(p.rejected) == "123<|endoftext|>"
    assert collate([p]).positions.max() == 9  # the last of a block of 10, though the row has 14 columns

def test_an_empty_prompt_becomes_one_unscored_end_of_text():
    p = encode("a", prompt="")
    assert p.prompt.tolist() == [EOT] and collate([p]).target.tolist() == [ord("a"), EOT, ord("x"), EOT]

def test_pairs_that_cannot_be_used_are_returned_by_reason_in_their_place():
    sides = [("good", "bad"), (" \n", "bad"), ("a", "\u00a0"), ("same", "same"), ("x" * 9, "y"),
             ("y", "x" * 9), ("x" * 8, "y")]
    texts = [(f"f:{i}", "Q", *([(text, None)] for text in two)) for i, two in enumerate(sides)]
    first, *rest, last = data.encode_pairs(BYTES, texts, block_size=10)
    assert (first.where, BYTES.decode(first.chosen[:-1]), BYTES.decode(first.prompt)) == ("f:0", "good", "Q")
    assert all(type(pair) is data.UnusablePair for pair in rest)
    assert [str(pair) for pair in rest] == ["an empty response"] * 2 + ["identical responses"] \
        + ["a response that does not fit block_size 10"] * 2
    assert last.where == "f:6" and len(last.prompt) == 1  # 8 bytes, end-of-text and one token of the prompt
    with pytest.raises(data.UnusablePair, match="identical responses"):
        encode("x", "x")

# ---------------------------------------------------------------------------------------------------------
# Pairs

def test_a_data_set_with_one_unscored_pair_counts_as_unscored():
    packed = data.pack([*TWO_PAIRS, make_pair([1], [2, 0], [3, 0])])
    assert packed.n_aspects == 0
    assert [p.chosen_scores.shape for p in packed] == [(2, 0), (1, 0), (1, 0)]

def test_the_maximum_of_an_aspect_is_taken_over_both_sides_of_these_pairs():
    pairs = data.pack([encode([("a", 5, 0, 0), ("b", 0, 2, 0)], [("c", 1, 4, 0)]),
                       encode([("a", 3, 1, 0)], [("c", 2, 3, 0), ("d", 7, 0, 0)])])
    assert pairs.score_maximum().tolist() == [7, 4, 1]  # rejected, rejected, 0 throughout: divides by 1
    assert pairs.select(np.array([0])).score_maximum().tolist() == [5, 4, 1]  # chosen, rejected
    assert pairs.select(np.array([1])).score_maximum().tolist() == [7, 3, 1]

def test_normalised_scores_are_divided_by_the_maximum_and_badness_turns_the_rejected_side():
    pairs = data.pack([encode([("a", 4), ("b", 1)], [("c", 3)]), encode([("a", 2)], [("c", 0), ("d", 4)])])
    for badness, rejected in ((False, [[[0.75]], [[0], [1]]]), (True, [[[0.25]], [[1], [0]]])):
        after = pairs.normalised(pairs.score_maximum(), badness)
        assert [p.chosen_scores.tolist() for p in after] == [[[1], [0.25]], [[0.5]]]
        assert [p.rejected_scores.tolist() for p in after] == rejected
    assert pairs[0].rejected_scores.tolist() == [[3]]  # the pairs themselves are left as they are

# ---------------------------------------------------------------------------------------------------------
# Order

def many_pairs(n=97, prompts=40, seed=0):
    """n pairs of different lengths over some prompts."""
    rng = np.random.default_rng(seed)
    chosen = [rng.integers(9, size=rng.integers(1, 30)) for _ in range(n)]
    return data.pack(make_pair([i % prompts, 5], chosen[i], [i, 7]) for i in range(n))

def test_an_epoch_is_a_permutation_and_the_next_one_another():
    for n, batch_size in ((10, 5), (10, 3), (3, 10), (1, 4), (7, 7)):
        order = np.concatenate([data.step_indices(n, batch_size, 0, step) for step in range(3 * n)])
        epochs = [tuple(order[i:i + n]) for i in range(0, len(order) // n * n, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert n < 4 or len(set(epochs)) > 1

def test_the_order_is_a_pure_function_of_seed_and_step():
    steps = [data.step_indices(50, 8, 3, step).tolist() for step in range(20)]
    for step in reversed(range(20)):  # asked in another order, with other questions between
        data.step_indices(49, 8, step, step)
        assert data.step_indices(50, 8, 3, step).tolist() == steps[step]
    assert steps != [data.step_indices(50, 8, 4, step).tolist() for step in range(20)]
    assert steps[0] == [2, 11, 17, 28, 32, 23, 30, 41]  # and stays what it is: a resumed run depends on it

def test_micro_batches_hold_the_same_pairs_longest_first():
    pairs = many_pairs()
    index = data.step_indices(len(pairs), 31, 0, 2)
    for size in (1, 4, 31, 100):
        micro = data.micro_batches(pairs, index, size)
        flat = np.concatenate(micro)
        assert Counter(flat.tolist()) == Counter(index.tolist())
        assert (np.diff(pairs.lengths[flat]) <= 0).all()
        assert [len(m) for m in micro[:-1]] == [size] * (len(micro) - 1) and 0 < len(micro[-1]) <= size
    assert pairs.lengths[index].max() < 100
    for tokens in (1, 100, 250):  # rows x longest stays within the tokens, or the micro-batch is one pair
        micro = data.micro_batches(pairs, index, 6, tokens)
        assert np.concatenate(micro).tolist() == flat.tolist()
        padded = [len(m) * pairs.lengths[m].max() for m in micro]
        assert all(n <= tokens or len(m) == 1 for n, m in zip(padded, micro, strict=True))
        for m, n, following in zip(micro, padded, micro[1:], strict=False):  # and takes all that fit
            assert len(m) == 6 or n + pairs.lengths[m].max() > tokens, (m, following)
    tiles = data.micro_batches(pairs, index, tokens=256, multiple=128)  # as collate will pad them
    assert [len(m) for m in tiles] == 15 * [2] + [1]

# ---------------------------------------------------------------------------------------------------------
# hold_out

def prompts_of(pairs):
    return {p.prompt.tobytes() for p in pairs}

def test_no_prompt_is_both_held_out_and_trained_on_and_every_pair_is_somewhere():
    pairs = many_pairs()  # 40 prompts of 2 or 3 pairs
    for options, n in (({}, 9), ({"fraction": 0.5}, 48), ({"at_most": 5}, 5)):
        train, held = data.hold_out(pairs, **options)
        assert not prompts_of(train) & prompts_of(held)
        assert n - 2 < len(held) <= n
        assert sorted(p.rejected[0] for part in (train, held) for p in part) == list(range(97))

def test_the_held_out_pairs_do_not_depend_on_the_order_of_the_data():
    pairs = many_pairs()
    shuffled = pairs.select(np.random.default_rng(1).permutation(len(pairs)))
    first, again = ({p.rejected[0] for p in data.hold_out(x)[1]} for x in (pairs, shuffled))
    assert first == again

@pytest.mark.parametrize("n, frequent, share", [(10, 9, 1), (40, 36, 4), (3200, 3152, 256)])
def test_a_frequent_prompt_is_never_held_out_beyond_the_share(n, frequent, share):
    """Whatever the hash of the frequent prompt: it may come first, last or between."""
    for prompt in range(5):
        pairs = data.pack(make_pair([prompt] if i < frequent else [9, i], [i, i, 0], [i, 0])
                          for i in range(n))
        train, held = data.hold_out(pairs)
        assert 1 <= len(held) <= share and len(train) + len(held) == n
        if n > 10:  # enough rare prompts to take: none stands on both sides
            assert not prompts_of(train) & prompts_of(held)

@pytest.mark.parametrize("prompts", [1, 2])
def test_where_every_prompt_is_frequent_the_split_is_by_pair_and_equal_pairs_stay_together(prompts):
    pairs = many_pairs(prompts=prompts)
    train, held = data.hold_out(pairs)
    assert len(train) + len(held) == 97 and len(held) == 9
    twice = pairs.select(np.arange(97).repeat(2))
    train, held = data.hold_out(twice)
    assert not {p.rejected[0] for p in train} & {p.rejected[0] for p in held} and len(held) == 18

def test_one_pair_or_the_same_pair_again_and_again_cannot_be_split():
    for pairs in (many_pairs(1), many_pairs(1).select(np.zeros(50, dtype=int))):
        with pytest.raises(data.DataError, match="no group of pairs is small enough to hold out"):
            data.hold_out(pairs)
