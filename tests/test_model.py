"""model.py: the trunk and its masks, the padded table, sampling. Its folders are test_pretrained.py's."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data import PADDING, Pair, collate
from model import GPT, Cache, GPTConfig, ModelError, draw, sample_token

SMALL = {"vocab_size": 23, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8}
CFG = train.Config(device="cpu", dtype="float64", head_tokens=100)

# ---- Helpers, test_pretrained.py's too ----

def rng(seed):
    return torch.Generator().manual_seed(seed)

def small(seed=0, dtype=torch.float64, vocab_multiple=1, **changes):
    """A small GPT with weights so large that every one of them matters, biases included."""
    model = GPT(GPTConfig(**SMALL | changes), vocab_multiple)
    generator = rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5 + ("ln_" in name and "weight" in name))
    return model.to(dtype)

def random_tokens(*shape, seed=0, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=rng(seed))

def close(actual, expected, tolerance=1e-12):
    """Equal shapes, and equal numbers to an absolute and relative tolerance; NaN equals nothing."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance), (actual - expected).abs().max()

def refused(function, *args, says, **kwargs):
    """The call raises ModelError, in one line that holds each of the words."""
    with pytest.raises(ModelError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    if hasattr(caught.value.__context__, "close"):
        caught.value.__context__.close()  # an HTTPError: else a ResourceWarning, some tests later
    assert "\n" not in message and all(word in message for word in says), message

def make_pair(seed, P, C, R):
    """Random token ids; block_size must hold P + max(C, R)."""
    ids = random_tokens(P + C + R, seed=seed).numpy().astype(np.int32)
    one_segment = np.zeros(C, np.int32), np.zeros(R, np.int32)
    return Pair(*np.split(ids, [P, P + C]), *one_segment, *np.zeros((2, 1, 0), np.float32))

def response_logps(model, batch):
    """The log-probability of each response token, (N,), as a training step takes it."""
    return train.head(model, train.hidden_states(model, batch, CFG), batch.target)["logps"]

PAIRS = [make_pair(0, 3, 4, 5), make_pair(1, 1, 7, 1), make_pair(2, 6, 1, 2)]

# ---- The trunk and the head ----

@pytest.mark.parametrize("T", [1, 5, 8])
def test_forward_gives_hidden_states_and_the_embedding_is_the_head(T):
    """(B, T) -> (B, T, C), with and without mask, positions and cache; logits_v = <hidden, wte_v>."""
    model, tokens = small(), random_tokens(3, T)
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(3, 1, T, T)
    hidden = model(tokens)
    for other in (model(tokens, mask=mask), model(tokens, cache=Cache(2, 9)),
                  model(tokens, positions=torch.arange(T).expand(3, T))):
        close(other, hidden)
    close(model.logits(hidden), torch.einsum("btc,vc->btv", hidden, model.wte.weight))
    assert hidden.shape == (3, T, 8) and model.logits(hidden[0, 0]).shape == (23,)

@pytest.mark.parametrize("multiple", [1, 64])
def test_centered_logits_are_the_logits_less_their_mean(multiple):
    """So their softmax is the same, and so is the gradient of what depends on it alone; padding rows too."""
    model = small(vocab_multiple=multiple)
    hidden = model(random_tokens(2, 5)).detach().requires_grad_()
    plain, centered = model.logits(hidden), model.logits(hidden, centered=True)
    close(centered, plain - plain.mean(-1, keepdim=True))
    logps = [logits.log_softmax(-1)[..., 3] for logits in (plain, centered)]
    gradients = [torch.autograd.grad((x**2).sum(), [hidden, model.wte.weight]) for x in logps]
    for a, b in zip(*gradients, strict=True):
        close(a, b)

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_later_token_leaves_earlier_hidden_states_bit_equal(dtype):
    """Causality: token t changes the hidden states from t on, and none before."""
    model, tokens = small(dtype=dtype), random_tokens(2, 8)
    before = model(tokens)
    for t in range(8):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 23
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(-1).all()

@pytest.mark.parametrize("cuts", [[1], [7], [3, 4], [2, 5], range(1, 8)])
def test_a_cache_gives_the_hidden_states_of_the_whole_text(cuts):
    """Any split of a text into cached pieces gives the hidden states of one pass. Its memory is that of its
    size, 2 x layers x channels x positions x rows x bytes, allocated once."""
    model, tokens, cache, pieces = small(), random_tokens(3, 8), Cache(2, 9), []
    places = set()
    with torch.no_grad():
        for start, end in itertools.pairwise([0, *cuts, 8]):
            assert cache.length == start
            pieces.append(model(tokens[:, start:end], cache=cache))
            places.add(tuple(x.data_ptr() for x in cache.keys + cache.values))
    assert sum(x.untyped_storage().nbytes() for x in cache.keys + cache.values) == 2 * 2 * 8 * 9 * 3 * 8
    assert len(places) == 1 and cache.length == 8
    close(torch.cat(pieces, 1), model(tokens))

def test_more_tokens_than_block_size_are_refused_in_one_line():
    """9 tokens, or 8 cached and 1 new, do not fit block_size 8; positions of one's own may repeat."""
    model, cache = small(), Cache(2, 8)
    refused(model, random_tokens(1, 9), says=["9 tokens", "block_size 8"])
    model(random_tokens(1, 8), cache=cache)
    refused(model, random_tokens(1, 1), cache=cache, says=["9 tokens", "block_size 8"])
    assert model(random_tokens(1, 9), positions=torch.arange(9) % 8).shape == (1, 9, 8)

@pytest.mark.parametrize("bad", [{"n_layer": 0}, {"vocab_size": -1}, {"n_embd": 2.0}, {"n_head": True},
                                 {"block_size": "8"}, {"n_head": 3}, {"n_layer": None}])
def test_sizes_that_make_no_model_are_refused_in_one_line(bad):
    """Every size is a whole number of at least 1, and n_head divides n_embd."""
    refused(GPTConfig, **SMALL | bad, says=[*bad])

def test_gpt2_small_has_124439808_parameters():
    """50257 x 768 + 1024 x 768 + 12 x 7087872 + 2 x 768, the head being the embedding."""
    with torch.device("meta"):
        one, two = (sum(p.numel() for p in GPT(GPTConfig(n_layer=n)).parameters()) for n in (1, 2))
    assert one + 11 * (two - one) == 124439808

def test_initial_weights_have_gpt2s_scale():
    """Standard deviation 0.02, in the 2 n_layer projections into the residual 0.02 / sqrt(2 n_layer);
    biases 0, LayerNorm 1: the first loss of a fresh model is log V to within a percent."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=64))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (1 if "ln_" in name and "weight" in name else 0)).all(), name
        else:
            wanted = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / wanted - 1) < 0.05 and abs(p.mean().item()) < 0.1 * wanted, name
    tokens = random_tokens(4, 64, vocab_size=500)
    loss = F.cross_entropy(model.logits(model(tokens))[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() / math.log(500) - 1) < 0.01

# ---- The shared-prompt row [prompt | chosen | rejected] ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("changed", ["chosen", "rejected"])
def test_no_leak_between_the_branches(dtype, changed):
    """Other tokens in one response, same length, leave the other's log-probabilities bit-equal."""
    model = small(dtype=dtype)
    other_pairs = [Pair(**vars(p) | {changed: (getattr(p, changed) + 1) % 23}) for p in PAIRS]
    before, after = collate(PAIRS), collate(other_pairs)
    is_changed = before.response % 2 == ["chosen", "rejected"].index(changed)
    logps_before, logps_after = response_logps(model, before), response_logps(model, after)
    assert torch.equal(logps_after[~is_changed], logps_before[~is_changed])
    assert (logps_after[is_changed] != logps_before[is_changed]).all()

def test_a_shared_prompt_row_equals_two_separate_sequences_whatever_its_padding():
    """log pi of a response token equals that in [prompt | response] alone, in rows beyond block_size too."""
    model, batch, alone = small(), collate(PAIRS), []
    assert batch.tokens.shape[1] > model.config.block_size
    for p in PAIRS:
        for response in (p.chosen, p.rejected):
            ids = torch.from_numpy(np.concatenate([p.prompt, response])).long()[None]
            logps = model.logits(model(ids)).log_softmax(-1)[0, len(p.prompt) - 1:-1]
            alone.append(logps.gather(-1, ids[0, len(p.prompt):, None]).squeeze(-1))
    before = response_logps(model, batch)
    close(before, torch.cat(alone))
    close(response_logps(model, collate(PAIRS, multiple=16)), before)
    batch.tokens[batch.branch == PADDING] = 7
    assert torch.equal(response_logps(model, batch), before)

# ---- A padded table ----

def test_padding_rows_never_change_logits_and_are_never_sampled():
    """A table padded from 23 to 64 rows with huge entries: same logits, no gradient, ids below 23."""
    plain, padded = small(), small(vocab_multiple=64)
    table = F.pad(plain.wte.weight, (0, 0, 0, 41), value=99.0)
    padded.load_state_dict(plain.state_dict() | {"wte.weight": table})
    tokens = random_tokens(5, 4)
    logits = padded.logits(padded(tokens))
    close(logits, plain.logits(plain(tokens)))
    logits.square().sum().backward()
    assert (padded.wte.weight.grad[23:] == 0).all() and (padded.wte.weight.grad[:23] != 0).any(-1).all()
    sampled = padded.generate(random_tokens(2000, 1), 2, temperature=1e6, generator=rng(0))
    assert sampled.max() == 22 and sampled.unique().numel() == 23

# ---- generate ----

def frequencies(probabilities, temperature=1.0, top_k=None, top_p=None, n=10**6):
    """How often each token is drawn in n draws of `sample_token`."""
    logits, generator = torch.tensor(probabilities).log().expand(min(n, 50000), -1), rng(0)
    drawn = [sample_token(logits, temperature, top_k, top_p, generator) for _ in range(n // len(logits))]
    return torch.bincount(torch.cat(drawn), minlength=logits.shape[-1])

def nucleus(p, top_p):
    """The definition, by a sort: a token is in while what comes before it has not reached top_p."""
    values, order = p.sort(descending=True, stable=True)
    kept = values * (values.cumsum(-1) - values < top_p)
    return torch.zeros_like(p).scatter(-1, order, kept / kept.sum())

P = torch.tensor([0.07, 0.21, 0.005, 0.13, 0.02, 0.3, 0.001, 0.05, 0.16, 0.054], dtype=torch.float64)
FIVE = torch.where(P >= 0.07, P, 0) / P[P >= 0.07].sum()

@pytest.mark.slow
@pytest.mark.parametrize("sampling, expected", [
    ({}, P),
    ({"temperature": 0.5}, P**2 / (P**2).sum()),
    ({"top_k": 99}, P),
    ({"top_k": 5}, FIVE),
    ({"top_p": 0.95}, nucleus(P, 0.95)),
    ({"temperature": 2, "top_p": 0.4}, nucleus(P.sqrt() / P.sqrt().sum(), 0.4)),
    ({"top_k": 5, "top_p": 0.5}, nucleus(FIVE, 0.5)),  # top_p of what top_k leaves
], ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_million_draws_follow_the_stated_distribution(sampling, expected):
    """Pearson's chi-square, within 4 standard deviations of its mean; excluded tokens never occur."""
    counts, possible = frequencies(P.tolist(), **sampling), expected > 0
    assert not counts[~possible].any() and 1 < possible.sum()
    wanted, free = 1e6 * expected[possible], int(possible.sum()) - 1
    statistic = ((counts[possible] - wanted).square() / wanted).sum().item()
    print("chi-square", sampling, round(statistic, 2), "of", free)
    assert statistic - free < 4 * math.sqrt(2 * free), (statistic, free)

def test_the_least_likely_tokens_keep_their_probability(monkeypatch):
    """A float32 sum near 1 has steps of 6e-8 and would swallow tokens of 1e-9: here each has its interval."""
    weights = torch.tensor([1.0, *[1e-9] * 50])
    ends = weights.double().cumsum(-1)
    middles = (ends - weights.double() / 2) / ends[-1]
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: middles.view(shape))
    assert draw(weights.expand(51, 51), None).flatten().tolist() == list(range(51))

@pytest.mark.parametrize("length", [1, 3, 8, 12])
def test_greedy_equals_the_uncached_argmax_loop(length):
    """Batched, from prompts shorter and longer than block_size and beyond it; the prompt comes back first."""
    model, tokens = small(), random_tokens(16, length)
    out = model.generate(tokens, 14, temperature=0)
    expected = tokens
    for _ in range(14):
        logits = model.logits(model(expected[:, -8:]))
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, expected)
    assert len(out[:, length:].unique()) > 3  # no constant text, which any cache would continue

def test_prompts_of_several_lengths_are_one_batch():
    """A row of -1s behind its prompt is continued as the prompt alone is, also beyond block_size."""
    model, prompts = small(), [random_tokens(1, n, seed=n) for n in (1, 3, 6, 10)]
    batch = torch.cat([F.pad(p, (0, 10 - p.shape[1]), value=-1) for p in prompts])
    for p, row in zip(prompts, model.generate(batch[:3, :6], 2, temperature=0), strict=False):
        assert torch.equal(row, model.generate(p, 8 - p.shape[1], temperature=0)[0])
    longest = model.generate(batch, 4, temperature=0)[3]
    assert torch.equal(longest, model.generate(prompts[3], 4, temperature=0)[0])

def test_within_block_size_each_token_is_computed_once():
    """The prompt goes through the model once, then one token at a time; beyond block_size, whole windows."""
    model, lengths = small(), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    model.generate(random_tokens(1, 3), 8, temperature=0)
    assert lengths == [3, 1, 1, 1, 1, 1, 8, 8]

def test_equally_likely_tokens_count_one_by_one():
    """top_k keeps as many of equally likely tokens as it says; bfloat16 logits tie often. top_p keeps the
    fewest that reach p: 0.5 alone reaches 0.5, and 0.5 + 0.25 reach 0.75. These sums are exact."""
    equal, three = [0.1, 0.2, 0.3, 0.2, 0.2], [0.25, 0.5, 0.25]
    assert [int((frequencies(equal, top_k=k, n=1000) > 0).sum()) for k in (1, 2, 3, 5)] == [1, 2, 3, 5]
    for top_p, kept in ((0.25, [1]), (0.5, [1]), (0.51, [0, 1]), (0.75, [0, 1]), (1.0, [0, 1, 2])):
        assert frequencies(three, top_p=top_p, n=1000).nonzero().flatten().tolist() == kept, top_p
    for cold in ({"temperature": 0, "top_p": 0.9}, {"temperature": 1e-6}, {"temperature": 1e-50}):
        assert frequencies(equal, n=1000, **cold).tolist() == [0, 0, 1000, 0, 0]

def test_a_seed_gives_one_text_on_one_thread_and_on_two():
    """The same seed, the same text; another seed, another; the global random state is not touched."""
    model, tokens = small(vocab_size=300), random_tokens(4, 3)
    state, texts = torch.get_rng_state(), []
    try:
        for threads, seed in ((1, 1), (2, 1), (1, 2)):
            torch.set_num_threads(threads)
            texts.append(model.generate(tokens, 20, top_p=0.9, generator=rng(seed)))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    assert torch.equal(torch.get_rng_state(), state)

def test_a_row_stops_at_eos_and_leaves_the_batch():
    """Against the run without eos, for each of the 23 ids: equal up to a row's first eos, then eos, as long
    as the slowest row needs, and a row that ended is not computed. An eos in the prompt stops nothing."""
    model, n, stops, tokens, sizes = small(), 12, set(), random_tokens(3, 2, seed=1), []
    free = model.generate(tokens, n, temperature=0)
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for eos in range(23):
        is_eos = free[:, 2:] == eos
        stop = torch.where(is_eos.any(-1), is_eos.int().argmax(-1) + 1, n)  # (B,) up to the first eos
        expected = free[:, :2 + stop.max()].clone()
        for row, end in zip(expected, 2 + stop, strict=True):
            row[end:] = eos
        sizes.clear()
        assert torch.equal(model.generate(tokens, n, temperature=0, eos=eos), expected)
        assert sizes == [int((stop > i).sum()) for i in range(stop.max())]
        stops.add(tuple(stop.tolist()))
    assert any(max(stop) < n for stop in stops) and any(len(set(stop)) > 1 for stop in stops)

@pytest.mark.parametrize("name, value", [
    ("temperature", -1), ("temperature", math.nan), ("top_k", 0), ("top_k", -3),
    ("top_p", 0), ("top_p", 1.5), ("top_p", math.nan)])
def test_bad_sampling_arguments_are_refused_in_one_line(name, value):
    """temperature >= 0, top_k >= 1, 0 < top_p <= 1; the message names the value."""
    refused(small().generate, random_tokens(1, 2), 3, **{name: value}, says=[f"{name} {value}"])

def test_an_empty_prompt_is_refused_and_no_new_tokens_are_no_error():
    model, tokens = small(), random_tokens(2, 3)
    refused(model.generate, random_tokens(1, 0), 3, says=["at least one token"])
    refused(model.generate, torch.tensor([[1, 2], [-1, -1]]), 3, says=["at least one token"])
    assert torch.equal(model.generate(tokens, 0), tokens)

def test_a_new_model_is_in_eval():
    """So that an edit with dropout starts at the reference."""
    assert not any(module.training for module in small().modules())
