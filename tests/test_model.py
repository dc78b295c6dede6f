"""model.py: the trunk and its masks, sampling, Hugging Face's folders, the download.

tests/fixtures/gpt2 is a random GPT-2 with logits and a greedy continuation that transformers computed once
(tests/fixtures/make_gpt2.py). The download is tried against a server on localhost.
"""

import http.server
import itertools
import json
import math
import pickle
import shutil
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data import PADDING, Pair, collate
from model import GPT, Cache, GPTConfig, ModelError, sample_token
from plumbing import machine, pretrained

torch.set_num_threads(1)
FIXTURE = Path(__file__).parent / "fixtures" / "gpt2"
SMALL = {"vocab_size": 23, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 8}


# ---------------------------------------------------------------------------------------------------------
# Helpers


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
    if isinstance(caught.value.__context__, HTTPError):
        caught.value.__context__.close()  # else a ResourceWarning, some tests later
    assert "\n" not in message and all(word in message for word in says), message


def make_pair(seed, P, C, R):
    """Random token ids; block_size must hold P + max(C, R)."""
    ids = random_tokens(P + C + R, seed=seed).numpy().astype(np.int32)
    one_segment = np.zeros(C, np.int32), np.zeros(R, np.int32)
    return Pair(*np.split(ids, [P, P + C]), *one_segment, *np.zeros((2, 1, 0), np.float32))


def response_logps(model, batch):
    """The log-probability of each response token, (N,), as train.py takes it."""
    hidden = model(batch.tokens, batch.positions, batch.mask())  # (B, T, C)
    logps = model.logits(hidden[batch.source[0], batch.source[1]]).log_softmax(-1)  # (N, V)
    return logps.gather(-1, batch.target[:, None]).squeeze(-1)


PAIRS = [make_pair(0, 3, 4, 5), make_pair(1, 1, 7, 1), make_pair(2, 6, 1, 2)]


# ---------------------------------------------------------------------------------------------------------
# The trunk and the head


@pytest.mark.parametrize("T", [1, 5, 8])
def test_forward_returns_hidden_states_and_logits_maps_them_to_the_vocabulary(T):
    """(B, T) -> one tensor (B, T, C), with and without mask, positions and cache; logits -> (..., V)."""
    model, tokens = small(), random_tokens(3, T)
    mask = torch.ones(T, T, dtype=torch.bool).tril().expand(3, 1, T, T)
    plain = model(tokens)
    assert isinstance(plain, torch.Tensor) and plain.shape == (3, T, 8)
    for other in (model(tokens, mask=mask), model(tokens, cache=Cache(2)),
                  model(tokens, positions=torch.arange(T).expand(3, T))):
        assert isinstance(other, torch.Tensor)
        close(other, plain)
    assert model.logits(plain).shape == (3, T, 23)
    assert model.logits(plain[0, 0]).shape == (23,)


def test_centered_logits_are_the_logits_less_one_number_a_position():
    """So their softmax is the same, and so is the gradient of what depends on it alone; padding rows too."""
    for multiple in (1, 64):
        model = small(vocab_multiple=multiple)
        hidden = model(random_tokens(2, 5)).detach().requires_grad_()
        plain, centered = model.logits(hidden), model.logits(hidden, centered=True)
        close((plain - centered).std(-1), torch.zeros(2, 5, dtype=torch.float64))
        close(centered.mean(-1), torch.zeros(2, 5, dtype=torch.float64))
        logps = [logits.log_softmax(-1)[..., 3] for logits in (plain, centered)]
        gradients = [torch.autograd.grad((x**2).sum(), [hidden, model.wte.weight]) for x in logps]
        for a, b in zip(*gradients, strict=True):
            close(a, b)


def test_hidden_states_come_after_the_final_layer_norm():
    """With weight 1 and bias 0 in ln_f, every hidden state has mean 0 and variance 1."""
    model = small()
    torch.nn.init.ones_(model.ln_f.weight)
    torch.nn.init.zeros_(model.ln_f.bias)
    hidden = model(random_tokens(2, 6))
    close(hidden.mean(-1), torch.zeros(2, 6, dtype=torch.float64))
    close(hidden.var(-1, correction=0), torch.ones(2, 6, dtype=torch.float64), 1e-3)


def test_the_head_is_the_embedding():
    """logits_v = <hidden, wte_v>; there is no other output matrix."""
    model, tokens = small(), random_tokens(2, 5)
    hidden = model(tokens)
    close(model.logits(hidden), torch.einsum("btc,vc->btv", hidden, model.wte.weight))
    assert not [name for name, _ in model.named_parameters() if "head" in name]


def test_every_parameter_has_its_gradient():
    """Autograd's derivative along a random direction equals the difference quotient, parameter by parameter;
    for the embedding that is the sum over its two uses, and a key's bias, which softmax cancels, has none."""
    model, batch = small(), collate(PAIRS)

    def loss():
        return response_logps(model, batch).mean()

    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
        direction = torch.randn(p.shape, generator=rng(0), dtype=p.dtype)
        with torch.no_grad():
            p += 1e-5 * direction
            above = loss()
            p -= 2e-5 * direction
            quotient = (above - loss()) / 2e-5
            p += 1e-5 * direction
        close((gradient * direction).sum(), quotient, 1e-7)
        assert (gradient[8:16].abs().max() < 1e-12) if name.endswith("c_attn.bias") else gradient.any(), name


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


def test_a_cache_gives_the_hidden_states_of_the_whole_text():
    """Any split of a text into cached pieces gives the hidden states of one pass, and extends the cache."""
    model, tokens = small(), random_tokens(2, 8)
    whole = model(tokens)
    for cuts in itertools.chain([(1,), (7,), (3, 4), (2, 5), range(1, 8)]):
        cache, pieces = Cache(2), []
        for start, end in itertools.pairwise([0, *cuts, 8]):
            pieces.append(model(tokens[:, start:end], cache=cache))
            assert len(cache) == end and all(x.shape == (2, 2, end, 4) for x in cache.keys + cache.values)
        close(torch.cat(pieces, 1), whole)


def test_more_tokens_than_block_size_are_refused_in_one_line():
    """9 tokens, or 8 cached and 1 new, do not fit block_size 8; positions of one's own may repeat."""
    model, cache = small(), Cache(2)
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
        assert sum(p.numel() for p in GPT(GPTConfig()).parameters()) == 124439808


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


def test_forward_in_bfloat16_autocast_is_finite_and_close_to_float32():
    """bfloat16 has 8 bits: hidden states and logits agree to 2 percent of their range."""
    model, tokens = small(dtype=torch.float32), random_tokens(3, 8)
    mask = torch.ones(3, 1, 8, 8, dtype=torch.bool).tril()
    with torch.autocast("cpu", torch.bfloat16):
        runs = [model(tokens), model(tokens, mask=mask), model(tokens, cache=Cache(2))]
        logits = model.logits(runs[0])
    assert logits.dtype == torch.bfloat16 and all(run.dtype == torch.float32 for run in runs)
    exact = model(tokens)
    for low, high in [*((run, exact) for run in runs), (logits, model.logits(exact))]:
        assert low.isfinite().all() and (low - high).abs().max() < 0.02 * high.abs().max()


# ---------------------------------------------------------------------------------------------------------
# The shared-prompt row [prompt | chosen | rejected]


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


def test_padding_has_no_influence():
    """Other tokens in the padding, or more padding, leave the response log-probabilities as they are."""
    model = small()
    batch, wide = collate(PAIRS), collate(PAIRS, multiple=16)
    before = response_logps(model, batch)
    close(response_logps(model, wide), before)
    batch.tokens[batch.branch == PADDING] = 7
    assert torch.equal(response_logps(model, batch), before)


def test_a_shared_prompt_row_equals_two_separate_sequences():
    """log pi of a response token equals that in [prompt | response] alone, in rows beyond block_size too."""
    model, batch = small(), collate(PAIRS)
    assert batch.tokens.shape[1] > model.config.block_size
    alone = []
    for p in PAIRS:
        for response in (p.chosen, p.rejected):
            ids = torch.from_numpy(np.concatenate([p.prompt, response])).long()[None]
            logps = model.logits(model(ids)).log_softmax(-1)[0, len(p.prompt) - 1:-1]
            alone.append(logps.gather(-1, ids[0, len(p.prompt):, None]).squeeze(-1))
    close(response_logps(model, batch), torch.cat(alone), 1e-12)


@pytest.mark.slow
@pytest.mark.skipif(machine.cannot_compile() is not None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, about torch.jit
def test_a_compiled_forward_gives_the_same_hidden_states_and_gradients():
    """torch.compile, without a graph break, with the branch mask and without any."""
    model = small(dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    batch, tokens = collate(PAIRS), random_tokens(2, 8)
    for args in ((batch.tokens, batch.positions, batch.mask()), (tokens,)):
        results = []
        for forward in (model, compiled):
            hidden = forward(*args)
            results.append((hidden, *torch.autograd.grad(hidden.square().sum(), list(model.parameters()))))
        for ours, theirs in zip(*results, strict=True):
            close(theirs / ours.abs().max(), ours / ours.abs().max(), 1e-5)


# ---------------------------------------------------------------------------------------------------------
# A padded table


def test_the_same_seed_draws_the_same_weights_with_and_without_padding():
    torch.manual_seed(3)
    plain = dict(GPT(GPTConfig(**SMALL)).named_parameters())
    torch.manual_seed(3)
    padded = dict(GPT(GPTConfig(**SMALL), vocab_multiple=64).named_parameters())
    assert padded.keys() == plain.keys() and not padded["wte.weight"][23:].any()
    for name, p in plain.items():
        assert torch.equal(padded[name][:len(p)], p), name


def test_padding_rows_never_change_logits_and_are_never_sampled_or_saved(tmp_path):
    """A table padded from 23 to 64 rows with huge entries: same logits, ids below 23, 23 rows in the file."""
    plain, padded = small(), small(vocab_multiple=64)
    table = F.pad(plain.wte.weight, (0, 0, 0, 41), value=99.0)
    padded.load_state_dict(plain.state_dict() | {"wte.weight": table})
    tokens = random_tokens(5, 4)
    assert padded.wte.weight.shape == (64, 8)
    logits = padded.logits(padded(tokens))
    close(logits, plain.logits(plain(tokens)))
    logits.square().sum().backward()
    assert (padded.wte.weight.grad[23:] == 0).all() and (padded.wte.weight.grad[:23] != 0).any(-1).all()
    sampled = padded.generate(random_tokens(2000, 1), 2, temperature=1e6, generator=rng(0))
    assert sampled.max() == 22 and sampled.unique().numel() == 23
    padded.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["transformer.wte.weight"].shape == (23, 8)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 23


def test_rows_that_pad_a_table_read_from_a_file_are_zero():
    """Uninitialised memory could hold NaN, and 0 x NaN would reach the trunk's gradient."""
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        model = GPT.from_pretrained(FIXTURE, vocab_multiple=64)
    finally:
        torch.use_deterministic_algorithms(False)
    assert model.wte.weight.shape == (64, 12) and (model.wte.weight[31:] == 0).all()
    assert torch.equal(model.wte.weight[:31], GPT.from_pretrained(FIXTURE).wte.weight)
    assert all(p.isfinite().all() and p.requires_grad for p in model.parameters())


def test_a_table_is_padded_to_the_next_multiple():
    """23 rows become 23, 24, 23, 46, 64 for multiples of 1, 8, 23, 46, 64."""
    rows = [GPT(GPTConfig(**SMALL), multiple).wte.num_embeddings for multiple in (1, 8, 23, 46, 64)]
    assert rows == [23, 24, 23, 46, 64]


# ---------------------------------------------------------------------------------------------------------
# generate


def uncached_greedy(model, tokens, n):
    """The argmax loop without a cache, on the last block_size tokens."""
    for _ in range(n):
        logits = model.logits(model(tokens[:, -model.config.block_size:]))
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens


class Scripted(GPT):
    """A model whose next-token distribution is given."""

    def __init__(self, probabilities):
        super().__init__(GPTConfig(**SMALL | {"vocab_size": len(probabilities)}))
        self.fixed = torch.tensor(probabilities).log()

    def logits(self, hidden):
        return self.fixed.expand(*hidden.shape[:-1], -1)


def frequencies(model, n=20000, **sampling):
    """How often each token is drawn as the next one."""
    drawn = model.generate(torch.zeros(n, 1, dtype=torch.long), 1, generator=rng(0), **sampling)[:, 1]
    return (torch.bincount(drawn, minlength=model.config.vocab_size) / n).tolist()


@pytest.mark.parametrize("length", [1, 3, 8, 12])
def test_greedy_equals_the_uncached_argmax_loop(length):
    """Batched, from prompts shorter and longer than block_size and beyond it; the prompt comes back first."""
    model, tokens = small(), random_tokens(16, length)
    out = model.generate(tokens, 14, temperature=0)
    assert torch.equal(out, uncached_greedy(model, tokens, 14))
    assert torch.equal(out[:, :length], tokens) and out.shape == (16, length + 14)
    assert len(out[:, length:].unique()) > 3  # no constant text, which any cache would continue


def test_within_block_size_each_token_is_computed_once():
    """The prompt goes through the model once, then one token at a time; beyond block_size, whole windows."""
    model, lengths = small(), []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    model.generate(random_tokens(1, 3), 8, temperature=0)
    assert lengths == [3, 1, 1, 1, 1, 1, 8, 8]


def test_top_k_1_and_a_tiny_top_p_are_greedy():
    """The most likely token alone is left, whatever the temperature."""
    model, tokens = small(), random_tokens(16, 3)
    greedy = model.generate(tokens, 10, temperature=0)
    for sampling in ({"top_k": 1}, {"top_p": 1e-9}, {"top_k": 1, "temperature": 50.0}, {"temperature": 1e-6},
                     {"temperature": 1e-50}):
        assert torch.equal(model.generate(tokens, 10, **sampling), greedy)


def test_top_k_counts_tokens_also_among_equals():
    """Of four equally likely tokens top_k 1 keeps the first, as argmax does; bfloat16 logits tie often."""
    equal = Scripted([0.1, 0.2, 0.2, 0.2, 0.2, 0.1])
    assert frequencies(equal, top_k=1)[1] == 1.0 == frequencies(equal, temperature=0)[1]
    assert [f > 0 for f in frequencies(equal, top_k=3)] == [False, True, True, True, False, False]


@pytest.mark.parametrize("sampling, expected", [
    ({}, [0.1, 0.4, 0.2, 0.3]),
    ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # p^2 / sum of p^2
    ({"top_k": 4}, [0.1, 0.4, 0.2, 0.3]),
    ({"top_k": 99}, [0.1, 0.4, 0.2, 0.3]),
    ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_p": 0.39}, [0, 1, 0, 0]),  # 0.4 reaches 0.39
    ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),  # 0.4 does not reach 0.41, 0.4 + 0.3 does
    ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
    ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
    ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
    ({"top_k": 2, "top_p": 0.55}, [0, 1, 0, 0]),  # of what top_k leaves, 4/7 reaches 0.55
    ({"temperature": 0.5, "top_p": 0.8}, [0, 16 / 25, 0, 9 / 25]),  # top_p of the sharpened distribution
    ({"temperature": 0, "top_p": 0.9}, [0, 1, 0, 0]),
])
def test_sampling_follows_the_stated_distribution(sampling, expected):
    """Frequencies of 20000 draws lie within 5 standard deviations of it; excluded tokens never occur."""
    for f, p in zip(frequencies(Scripted([0.1, 0.4, 0.2, 0.3]), **sampling), expected, strict=True):
        assert abs(f - p) <= 5 * math.sqrt(p * (1 - p) / 20000), (f, p)


def test_rows_are_filtered_one_by_one():
    """Which tokens top_k and top_p keep is a matter of each row."""
    model, tokens = small(), random_tokens(40, 5)
    kept = model.logits(model(tokens))[:, -1].topk(2).indices  # (40, 2)
    assert len(kept.unique()) > 5
    for seed in range(5):
        drawn = model.generate(tokens, 1, top_k=2, generator=rng(seed))[:, -1:]
        assert (drawn == kept).any(-1).all()


def test_a_seeded_generator_makes_sampling_repeatable():
    """The same seed, the same text; another seed, another; the global random state is not touched."""
    model, tokens = small(), random_tokens(4, 3)
    state = torch.get_rng_state()
    first, second, third = (model.generate(tokens, 20, generator=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_stops_at_eos_and_repeats_it_until_all_rows_have():
    """Against the sampled run without eos, for each of the 23 ids: equal up to a row's first eos, then eos
    throughout; as long as the slowest row needs. An eos in the prompt stops nothing."""
    model, n, stops, tokens = small(), 12, set(), random_tokens(3, 2)
    free = model.generate(tokens, n, generator=rng(0))
    for eos in range(23):
        is_eos = free[:, 2:] == eos
        stop = torch.where(is_eos.any(-1), is_eos.int().argmax(-1) + 1, n)  # (B,) up to the first eos
        expected = free[:, :2 + stop.max()].clone()
        for row, end in zip(expected, 2 + stop, strict=True):
            row[end:] = eos
        assert torch.equal(model.generate(tokens, n, generator=rng(0), eos=eos), expected)
        stops.add(tuple(stop.tolist()))
    assert any(max(stop) < n for stop in stops) and any(len(set(stop)) == 3 for stop in stops)


@pytest.mark.parametrize("name, value", [
    ("temperature", -1), ("temperature", math.nan), ("top_k", 0), ("top_k", -3),
    ("top_p", 0), ("top_p", 1.5), ("top_p", math.nan)])
def test_bad_sampling_arguments_are_refused_in_one_line(name, value):
    """temperature >= 0, top_k >= 1, 0 < top_p <= 1; the message names the value."""
    refused(small().generate, random_tokens(1, 2), 3, **{name: value}, says=[f"{name} {value}"])


def test_an_empty_prompt_is_refused_and_no_new_tokens_are_no_error():
    model = small()
    refused(model.generate, random_tokens(1, 0), 3, says=["at least one token"])
    tokens = random_tokens(2, 3)
    assert torch.equal(model.generate(tokens, 0), tokens)


# ---------------------------------------------------------------------------------------------------------
# Hugging Face's folders


def edit_config(folder, **changes):
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder, edit):
    """Rewrite model.safetensors by a function on its dict of tensors."""
    weights = load_file(folder / "model.safetensors")
    save_file(edit({name: w.clone() for name, w in weights.items()}), folder / "model.safetensors")


def shard(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    """Replace model.safetensors by two shards and their index."""
    weights = load_file(folder / "model.safetensors")
    weight_map = {name: names[i % 2] for i, name in enumerate(sorted(weights))}
    for file in names:
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def files(folder):
    """Every file below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def folder(tmp_path):
    """A copy of the fixture."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / file, tmp_path)
    return tmp_path


def same(a, b):
    """Two models are equal, bit for bit."""
    pairs = list(zip(a.named_parameters(), b.named_parameters(), strict=True))
    return a.config == b.config and all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)


def test_logits_and_greedy_text_equal_those_of_transformers():
    """The fixture's logits to 1e-12 in float64 and to rounding in float32; the same greedy continuation."""
    expected = load_file(FIXTURE / "expected.safetensors")
    model = GPT.from_pretrained(str(FIXTURE))
    assert all(p.dtype == torch.float32 for p in model.parameters())
    close(model.logits(model(expected["tokens"])), expected["logits"].float(), 1e-4)
    greedy = expected["greedy"]
    assert torch.equal(model.generate(greedy[:, :2], 10, temperature=0), greedy)
    model.double()
    close(model.logits(model(expected["tokens"])), expected["logits"], 1e-12)


@pytest.mark.parametrize("sizes", [SMALL, {**SMALL, "n_layer": 1, "n_head": 1, "n_embd": 1, "vocab_size": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_through_a_folder_is_bit_equal(tmp_path, sizes, dtype):
    """save_pretrained then from_pretrained gives the same weights and sizes, also over an older save."""
    folder = tmp_path / "new" / "folder"
    for seed in (1, 2):
        model = small(seed, dtype, **sizes)
        model.save_pretrained(folder)
        assert same(GPT.from_pretrained(folder), model.float())
    assert files(folder) == ["config.json", "model.safetensors"]


def test_a_save_that_breaks_off_leaves_the_model_that_was_there(folder, monkeypatch):
    """A full disk or a kill while the weights are written."""
    def breaks_off(weights, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pretrained, "save_file", breaks_off)
    with pytest.raises(OSError):
        small().save_pretrained(folder)
    assert same(GPT.from_pretrained(folder), GPT.from_pretrained(FIXTURE))


def test_reading_does_not_draw_random_numbers():
    """A run does not depend on whether its start was read or made."""
    state = torch.get_rng_state()
    GPT.from_pretrained(FIXTURE)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_is_its_own_copy_of_the_file(folder):
    """Saving over the file that was read, or training, never changes the other."""
    model = GPT.from_pretrained(folder)
    small(1).save_pretrained(folder)
    assert same(model, GPT.from_pretrained(FIXTURE))
    model = GPT.from_pretrained(FIXTURE)
    torch.nn.init.zeros_(model.wte.weight)
    assert (GPT.from_pretrained(FIXTURE).wte.weight != 0).all()


def test_a_saved_folder_has_the_names_and_shapes_of_transformers(folder, tmp_path):
    """Tensor names, shapes, dtypes and values as transformers saved them; config.json has its keys."""
    GPT.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(f / "model.safetensors") for f in (FIXTURE, tmp_path / "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    config, reference = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "ours", FIXTURE))
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # this model has none
    assert config == {key: reference[key] for key in config} | dropout
    assert {"model_type", "architectures", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head",
            "activation_function", "layer_norm_epsilon", "bos_token_id", "eos_token_id"} <= config.keys()


def test_a_saved_file_is_as_readable_as_its_config(tmp_path):
    """safetensors creates files that only their owner may read."""
    small().save_pretrained(tmp_path)
    modes = {(tmp_path / file).stat().st_mode for file in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_eos_is_the_last_id_unless_told(tmp_path):
    """Other programs stop at eos_token_id."""
    for eos, expected in ((None, 22), (0, 0), (5, 5)):
        small().save_pretrained(tmp_path, eos)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["eos_token_id"] == config["bos_token_id"] == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32(folder, dtype):
    """Files in half or double precision read as float32."""
    edit_weights(folder, lambda w: {name: x.to(dtype) for name, x in w.items()})
    model, original = GPT.from_pretrained(folder), GPT.from_pretrained(FIXTURE)
    for p, q in zip(model.parameters(), original.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, q.to(dtype).float())


def without_prefix(w):
    return {name.removeprefix("transformer."): x for name, x in w.items()}


def with_head(w):
    return w | {"lm_head.weight": w["transformer.wte.weight"].clone()}


def head_alone(w):
    return {"lm_head.weight": w.pop("transformer.wte.weight"), **w}


def with_buffers(w):
    for i in range(3):
        w[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 12, 12, dtype=torch.uint8).tril()
        w[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return w


@pytest.mark.parametrize("edits", [[without_prefix], [with_head], [head_alone], [with_buffers],
                                   [with_buffers, with_head, without_prefix]])
@pytest.mark.parametrize("in_shards", [False, True])
def test_the_variants_of_the_layout_read_alike(folder, edits, in_shards):
    """With and without `transformer.`, the tied head there or not or in place of the embedding, with the
    masks that old files carry, in one file or in shards: the same model."""
    for edit in edits:
        edit_weights(folder, edit)
    if in_shards:
        shard(folder)
    assert same(GPT.from_pretrained(folder), GPT.from_pretrained(FIXTURE))


def test_one_file_goes_before_shards(folder):
    """As in transformers; a save into a folder that holds older shards must be what is read."""
    shard(folder)
    model = small(1, torch.float32)
    model.save_pretrained(folder)
    assert same(GPT.from_pretrained(folder), model)


def test_four_matrices_a_block_are_transposed_and_no_others(folder):
    """Conv1D is (in, out): the square c_proj too, whose shape would not tell."""
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    stored, model = load_file(folder / "model.safetensors"), GPT.from_pretrained(folder)
    for name, p in model.named_parameters():
        w = stored["transformer." + name]
        assert torch.equal(p, w.T if name.split(".", 2)[-1] in conv1d else w)


@pytest.mark.parametrize("config", [
    {"n_positions": None, "n_ctx": 12},  # the key of old files
    {"activation_function": "gelu_pytorch_tanh"},  # another name of the same function
    {"activation_function": None}, {"model_type": None}, {"tie_word_embeddings": None},  # the defaults
    {"n_inner": 48}, {"dtype": "float16"}, {"unknown": [1]},
])
def test_configurations_of_the_same_model_read_alike(folder, config):
    edit_config(folder, **config)
    assert same(GPT.from_pretrained(folder), GPT.from_pretrained(FIXTURE))


@pytest.mark.parametrize("config, says", [
    ({"model_type": "llama"}, ["model_type", "'llama'", "'gpt2'"]),
    ({"activation_function": "relu"}, ["activation_function", "'relu'", "'gelu_new'"]),
    ({"activation_function": "gelu"}, ["activation_function", "'gelu'"]),  # exact, not tanh
    ({"scale_attn_weights": False}, ["scale_attn_weights", "False"]),
    ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx", "True"]),
    ({"layer_norm_epsilon": 1e-6}, ["layer_norm_epsilon", "1e-06"]),
    ({"tie_word_embeddings": False}, ["tie_word_embeddings", "False"]),
    ({"add_cross_attention": True}, ["add_cross_attention", "True"]),
    ({"n_inner": 24}, ["n_inner", "24"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ({"n_head": 5}, ["n_embd 12", "n_head 5"]),
    ({"n_embd": "12"}, ["n_embd = '12'"]),
    ({"n_layer": None}, ["n_layer = None"]),
    ({"n_layer": 0}, ["n_layer = 0"]),
    ({"n_layer": 2}, ["tensor h.2.", "config.json says no such tensor"]),
    ({"n_layer": 4}, ["tensor h.3.", "is missing"]),
    ({"n_embd": 15}, ["tensor", "(36,)", "(45,)"]),
    ({"vocab_size": 30}, ["tensor wte.weight is (31, 12), config.json says (30, 12)"]),
    ({"vocab_size": 10**15}, ["tensor wte.weight is (31, 12)"]),  # refused before memory is asked for
    ({"n_positions": 11}, ["tensor wpe.weight is (12, 12), config.json says (11, 12)"]),
])
def test_another_models_configuration_is_refused_in_one_line(folder, config, says):
    """Another architecture, activation, attention scaling or size: what, in which file, and what would do."""
    edit_config(folder, **config)
    refused(GPT.from_pretrained, folder, says=[str(folder), *says])


def cut(file, keep):
    def damage(folder):
        (folder / file).write_bytes((folder / file).read_bytes()[:keep])
    return damage


def write(file, content):
    def damage(folder):
        (folder / file).unlink(missing_ok=True)
        (folder / file).write_bytes(content)
    return damage


def drop(name):
    return lambda folder: edit_weights(folder, lambda w: {n: x for n, x in w.items() if n != name})


def put(name, *shape):
    return lambda folder: edit_weights(folder, lambda w: w | {name: torch.ones(shape)})


def untie(folder):
    edit_weights(folder, with_head)
    edit_weights(folder, lambda w: w | {"lm_head.weight": w["lm_head.weight"] + torch.eye(31, 12) * 1e-3})


def index_is(content):
    def damage(folder):
        shard(folder)
        write("model.safetensors.index.json", content)(folder)
    return damage


def index_of(weight_map):
    return index_is(json.dumps({"weight_map": weight_map}).encode())


def index_is_a_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").mkdir()


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def weights_are_a_folder(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


BIG_HEADER = (2**62).to_bytes(8, "little") + b'{"a":'
LYING_HEADER = (60).to_bytes(8, "little") + b'{"wte":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}'
DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json", "gpt2-medium"]),
    "config cut": (cut("config.json", 100), ["config.json"]),
    "config empty": (cut("config.json", 0), ["config.json"]),
    "config no object": (write("config.json", b"[1, 2]"), ["config.json"]),
    "config not UTF-8": (write("config.json", b"\xff\xfe\xff"), ["config.json"]),
    "config nested": (write("config.json", b"[" * 100000), ["config.json"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"]),
    "a pickle only": (only_a_pickle, ["model.safetensors", "pickle"]),
    "weights a folder": (weights_are_a_folder, ["model.safetensors"]),
    "weights cut": (cut("model.safetensors", 20000), ["model.safetensors", "cut short"]),
    "weights cut by a byte": (cut("model.safetensors", 28423), ["model.safetensors", "cut short"]),
    "weights cut in the header": (cut("model.safetensors", 300), ["model.safetensors", "cut short"]),
    "weights empty": (cut("model.safetensors", 0), ["model.safetensors", "cut short"]),
    "a page of HTML": (write("model.safetensors", b"<html>log in</html>"), ["not a safetensors file"]),
    "absurd header": (write("model.safetensors", BIG_HEADER), ["not a safetensors file"]),
    "header without data": (write("model.safetensors", LYING_HEADER), ["not a safetensors file"]),
    "missing tensor": (drop("transformer.ln_f.bias"), ["ln_f.bias is missing, config.json says (12,)"]),
    "missing embedding": (drop("transformer.wte.weight"), ["wte.weight is missing"]),
    "extra tensor": (put("score.weight", 2), ["score.weight is (2,), config.json says no such tensor"]),
    "wrong shape": (put("transformer.wpe.weight", 12, 11),
                    ["wpe.weight is (12, 11), config.json says (12, 12)"]),
    "not transposed": (put("transformer.h.1.attn.c_attn.weight", 36, 12),
                       ["tensor h.1.attn.c_attn.weight is (36, 12), config.json says (12, 36)"]),
    "three dimensions": (put("transformer.h.0.mlp.c_fc.weight", 1, 12, 48),
                         ["tensor h.0.mlp.c_fc.weight is (1, 12, 48)"]),
    "untied head": (untie, ["head", "not tied"]),
    "head of another size": (put("lm_head.weight", 32, 12), ["not tied"]),
    "index upwards": (index_of({"a": "../model.safetensors"}), ["index.json", "'../model.safetensors'"]),
    "index absolute": (index_of({"a": "/etc/passwd"}), ["index.json", "'/etc/passwd'"]),
    "index of the parent": (index_of({"a": ".."}), [".."]),
    "index of nothing": (index_of({"a": ""}), [""]),
    "index of NUL": (index_of({"a": "\0"}), [""]),
    "index of a number": (index_of({"a": 7}), ["7", "no such file"]),
    "index of lists": (index_of({"a": ["b"]}), ["['b']"]),
    "index without files": (index_of({"a": "gone.safetensors"}), ["gone.safetensors", "no such file"]),
    "index of one shard": (index_of({"a": "model-00001-of-00002.safetensors"}), ["missing"]),
    "index a list": (index_of([]), ["index.json", "not an index"]),
    "index an array": (index_is(b"[]"), ["index.json", "not an index"]),
    "index no JSON": (index_is(b'{"weight_map": {'), ["index.json", "not an index"]),
    "index nested": (index_is(b"[" * 100000), ["index.json", "not an index"]),
    "index without map": (index_is(b'{"metadata": {}}'), ["index.json", "weight_map"]),
    "index a folder": (index_is_a_folder, ["index.json", "not an index"]),
    "index empty": (index_of({}), ["missing"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_in_one_line(folder, damage):
    """The line names the file or tensor and what is wrong with it."""
    do, says = DAMAGE[damage]
    do(folder)
    refused(GPT.from_pretrained, folder, says=[str(folder), *says])


def test_neither_a_name_nor_a_folder_is_refused_in_one_line(tmp_path):
    """The message lists the names there are."""
    for name in ("gpt5", tmp_path / "nowhere", FIXTURE / "config.json", "a\0b"):
        refused(GPT.from_pretrained, name, says=["config.json"])
    refused(GPT.from_pretrained, "gpt5", says=["gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2"])


# ---------------------------------------------------------------------------------------------------------
# The download


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves tests/fixtures/gpt2 as openai-community/gpt2, in one of several ways. Answers GET alone."""

    def do_GET(self):
        self.server.log.append(self.path)
        file = self.path.removesuffix("?signed").rpartition("/")[2]
        way = "normal" if self.path.endswith("?signed") else self.server.ways.get(file, "normal")
        content = b"<html>please log in</html>" if way == "login page" else (FIXTURE / file).read_bytes()
        if way in (404, 500):
            return self.send_error(way)
        if way == "garbled":
            return self.wfile.write(b"garbled\r\n\r\n")
        self.send_response(302 if way == "redirect" else 200)
        if way == "redirect":
            self.send_header("Location", f"/elsewhere/{file}?signed")
            self.send_header("X-Linked-Size", str(len(content)))
            content = b""
        if way == "chunked, cut":
            self.send_header("Transfer-Encoding", "chunked")
            content = b"%x\r\n" % len(content) + content
        elif way not in ("no length", "no length, cut"):
            self.send_header("Content-Length", str(len(content) + 10 * (way == "wrong length")))
        self.end_headers()
        self.wfile.write(content[:len(content) // 2] if "cut" in way else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on localhost: `ways` says how it serves each file, `log` lists the requests."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.ways, server.log = {}, []
        server.cache = tmp_path / "home" / "termwise" / "gpt2"
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("no_proxy", "*")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def forbid(*args, **kwargs):
    raise AssertionError("a pickle was read")


@pytest.mark.parametrize("way", ["normal", "redirect", "no length"])
def test_a_name_is_downloaded_once(hub, monkeypatch, capsys, way):
    """Two files, from HF_ENDPOINT into HF_HOME/termwise; said on stderr; then the network is left alone.
    Redirects to another place are followed, and a server need not announce a length. Nothing is unpickled."""
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, forbid)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # the cache may be on another disk
    hub.ways = {"config.json": way, "model.safetensors": way}
    assert same(GPT.from_pretrained("gpt2"), GPT.from_pretrained(FIXTURE))
    assert files(hub.cache) == ["config.json", "model.safetensors"]
    for file in files(hub.cache):
        assert (hub.cache / file).read_bytes() == (FIXTURE / file).read_bytes()
    asked = {path for path in hub.log if not path.startswith("/elsewhere/")}
    assert asked == {f"/openai-community/gpt2/resolve/main/{f}" for f in ("config.json", "model.safetensors")}
    out, err = capsys.readouterr()
    assert out == "" and str(hub.cache) in err and "//openai" not in err
    hub.log.clear()
    assert same(GPT.from_pretrained("gpt2", vocab_multiple=31), GPT.from_pretrained(FIXTURE))
    assert hub.log == [] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("way, says", [
    ("cut", ["bytes"]), ("no length, cut", []), ("chunked, cut", ["IncompleteRead"]),
    ("wrong length", ["bytes"]), (404, ["404"]), (500, ["500"]), ("login page", []), ("garbled", ["garbled"]),
])
def test_a_download_that_fails_is_one_line_and_the_next_one_starts_afresh(hub, file, way, says):
    """A cut connection, in each of three ways, a wrong length, an error, a page of HTML, no HTTP: the
    message names the address, nothing stays under the file's name or beside it, a second call succeeds."""
    hub.ways = {file: way}
    refused(GPT.from_pretrained, "gpt2", says=[f"gpt2/resolve/main/{file}", "try again", *says])
    assert files(hub.cache) == ["config.json"] * (file == "model.safetensors")
    hub.ways = {}
    assert same(GPT.from_pretrained("gpt2"), GPT.from_pretrained(FIXTURE))
    assert files(hub.cache) == ["config.json", "model.safetensors"]


def test_an_interrupted_download_leaves_nothing_behind_and_starts_afresh(hub, monkeypatch):
    """Ctrl-C in the middle of the weights; a part that a killed process left is never taken for the model."""
    download = torch.hub.download_url_to_file

    def interrupted(url, dst):
        download(url, dst)
        if dst.endswith("model.safetensors"):
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.hub, "download_url_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        GPT.from_pretrained("gpt2")
    assert files(hub.cache) == ["config.json"]
    monkeypatch.undo()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setenv("HF_HOME", str(hub.cache.parent.parent))
    for left in ("killed/model.safetensors", "killed/model.safetensors.01.partial", "model.safetensors.part"):
        (hub.cache / left).parent.mkdir(exist_ok=True)
        (hub.cache / left).write_bytes(b"half")
    assert same(GPT.from_pretrained("gpt2"), GPT.from_pretrained(FIXTURE))


def test_processes_that_download_at_once_do_not_disturb_each_other(hub):
    """As the ranks of one machine would: all get the whole model, and nothing else stays."""
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(GPT.from_pretrained, ["gpt2"] * 8))
    assert all(same(model, GPT.from_pretrained(FIXTURE)) for model in models)
    assert files(hub.cache) == ["config.json", "model.safetensors"]


def test_no_network_is_one_line(hub, monkeypatch):
    """A refused connection, and an endpoint that is no address."""
    for endpoint in ("http://127.0.0.1:1", "no-address"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        refused(GPT.from_pretrained, "gpt2", says=[endpoint, "try again, or pass a folder"])


def test_the_cache_is_in_the_home_folder_by_default(hub, monkeypatch, tmp_path):
    """~/.cache/termwise, when HF_HOME is not set or empty."""
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for unset in (lambda: monkeypatch.delenv("HF_HOME"), lambda: monkeypatch.setenv("HF_HOME", "")):
        unset()
        assert pretrained.download("gpt2") == tmp_path / "me" / ".cache" / "termwise" / "gpt2"


def test_every_name_has_a_repository():
    """The names of issue and README, each an owner/name."""
    assert list(pretrained.NAMES) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"]
    assert all(repository.count("/") == 1 and repository.endswith("/" + name)
               for name, repository in pretrained.NAMES.items())


def test_a_wrong_number_of_layers_is_refused_before_any_is_built(folder):
    """An absurd n_layer in config.json costs one line, not minutes: the weights say how many there are."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 10**9}))
    with pytest.raises(ModelError, match="1000000000 layers, of"):
        GPT.from_pretrained(str(folder))
