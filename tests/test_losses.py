"""losses.py alone: numbers worked out by hand, gradients in closed form, reductions, masks, extreme values.

Literal numbers come from the equations of the papers by hand (each derivation stands beside its number).
Below h is the argument of log sigma and g = beta sigma(-h), so that d(-log sigma(h)) = -g d(h / beta).
"""

import functools
import itertools
import math

import pytest
import torch

import losses

LOG2 = math.log(2.0)
LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
KLS = ("chosen_seq_kl", "rejected_seq_kl")
REWARDS = ("chosen_rewards", "rejected_rewards")
MASKS = ("chosen_mask", "rejected_mask")
HYPER = {                                                           # where nothing depends on their value
    "sft": {}, "dpo": {"beta": 0.3}, "dpop": {"beta": 0.3, "lam": 5.0}, "tdpo1": {"beta": 0.3},
    "tdpo2": {"beta": 0.3, "alpha": 0.4}, "2d-dpo": {"beta": 0.3}, "2d-dpo-vanilla": {"beta": 0.3},
}
TAKES = {name: losses.terms_of(losses.LOSSES[name]) for name in HYPER}
SEQUENCE = ("dpo", "dpop", "tdpo1", "tdpo2")
TWO_D = ("2d-dpo-vanilla", "2d-dpo")

# Helpers

def f64(*values):
    """A float64 tensor with a gradient."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)

def yes(*values):
    """A mask: 1 where a segment exists."""
    return torch.tensor(values, dtype=torch.bool)

def logps_of(*values):
    """The four log-probabilities by name."""
    return dict(zip(LOGPS, values, strict=True))

def rng(seed):
    return torch.Generator().manual_seed(seed)

def randn(*shape, seed):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)

def call(name, args, **hyper):
    """The loss `name` on a dict of arguments."""
    function = getattr(losses, losses.LOSSES[name].__name__)
    return function(*(args[n] for n in TAKES[name]), **(HYPER[name] | hyper))

def gradients(loss, args):
    """d loss.sum() / d argument for every argument that requires it; one without influence has 0."""
    names = [n for n in args if args[n].requires_grad]
    found = torch.autograd.grad(loss.sum(), [args[n] for n in names], materialize_grads=True)
    return dict(zip(names, found, strict=True))

def random_args(name, seed, pairs=6, s_w=4, s_l=3, dtype=torch.float64):
    """Random arguments of a loss; rewards without ties; every pair keeps its first segment."""
    generator, args = rng(seed), {}
    for n in TAKES[name]:
        shape = (pairs, s_w if "rejected" not in n else s_l) if name in TWO_D else (pairs,)
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        if n in MASKS:
            args[n] = (x < 0.7).index_fill(1, torch.tensor(0), True)
        else:
            args[n] = (-6.0 * x if n in LOGPS else 4.0 * x if n in KLS else x).to(dtype).requires_grad_()
    return args

def close(actual, expected, tolerance=1e-9):
    """Equal shapes, and equal numbers to an absolute and relative tolerance; NaN equals nothing."""
    actual = torch.as_tensor(actual)
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance), (actual, expected)

def sigma(x):
    return 1.0 / (1.0 + math.exp(-x))

# From logits to log-probabilities, and their sums

def test_token_logps_by_hand():
    """log pi(y_t) of a softmax with known probabilities; its gradient in the logits is e_y - s."""
    # logits (log 1, log 2, log 5) + 7: s = (1, 2, 5) / 8.  Target 1: log(2/8) = -2 log 2 = -1.386294361119891
    # logits (0, 0, 0):                 s = (1, 1, 1) / 3.  Target 2: -log 3            = -1.098612288668110
    z = f64([7.0, 7.0 + LOG2, 7.0 + math.log(5.0)], [0.0, 0.0, 0.0])
    logps = losses.token_logps(z, torch.tensor([1, 2]))
    close(logps, [-1.386294361119891, -1.098612288668110], 1e-12)
    close(torch.autograd.grad(logps.sum(), z)[0],
          [[-1 / 8, 1 - 2 / 8, -5 / 8], [-1 / 3, -1 / 3, 1 - 1 / 3]], 1e-12)

def test_token_kl_by_hand_and_its_direction():
    """token_kl is the forward KL(pi_ref || pi), with gradient s - q; the reverse is another number."""
    # q = (1/2, 1/2), s = (1/4, 3/4).  Forward: 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3) = 0.143841036225890
    # Reverse: 1/4 log(1/2) + 3/4 log(3/2) = 0.130812035941137
    # q = (1/2, 1/4, 1/4), s = (1/4, 1/4, 1/2): 1/2 log 2 + 0 - 1/4 log 2 = 1/4 log 2 = 0.173286795139986
    q = f64([0.0, 0.0]), f64([math.log(2.0), 0.0, 0.0])
    s = f64([0.0, math.log(3.0)]), f64([0.0, 0.0, math.log(2.0)])
    close(losses.token_kl(q[0], s[0]), [0.143841036225890], 1e-12)
    close(losses.token_kl(s[0], q[0]), [0.130812035941137], 1e-12)
    close(losses.token_kl(q[1], s[1]), [0.173286795139986], 1e-12)
    close(torch.autograd.grad(losses.token_kl(q[0], s[0]).sum(), s[0])[0], [[-0.25, 0.25]], 1e-12)
    close(torch.autograd.grad(losses.token_kl(q[1], s[1]).sum(), s[1])[0], [[-0.25, 0.0, 0.25]], 1e-12)

def test_the_vocabulary_is_the_last_dimension_whatever_stands_before_it():
    """One position (V,), positions (N, V), batches (B, T, V) and more give the same numbers."""
    z, z_ref, y = randn(6, 4, seed=7), randn(6, 4, seed=8), torch.randint(4, (6,), generator=rng(6))
    logps, kl = losses.token_logps(z, y), losses.token_kl(z_ref, z)
    for shape in ((2, 3), (3, 1, 2, 1)):
        close(losses.token_logps(z.reshape(*shape, 4), y.reshape(shape)), logps.reshape(shape))
        close(losses.token_kl(z_ref.reshape(*shape, 4), z.reshape(*shape, 4)), kl.reshape(shape))
    close(losses.token_logps(z[5], y[5]), logps[5])
    close(losses.token_kl(z_ref[5], z[5]), kl[5])

def test_an_id_outside_the_vocabulary_is_an_index_error():
    """No id means "ignore me": -100 would silently score 0."""
    for bad in (-1, -100, 4):
        with pytest.raises(IndexError):
            losses.token_logps(torch.zeros(2, 4), torch.tensor([0, bad]))

def test_shapes_that_would_be_broadcast_in_silence_are_refused():
    """(B, 1) beside (B,) would give (B, B), logits (2, 3, V) beside targets (3, 2) some numbers."""
    b = torch.zeros(3)
    with pytest.raises(ValueError, match=r"one shape is needed, not \(2, 3\), \(3, 2\)"):
        losses.token_logps(torch.zeros(2, 3, 5), torch.zeros(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="one shape"):
        losses.token_kl(torch.zeros(1, 5), torch.zeros(3, 5))
    for name in SEQUENCE:
        for i in range(len(TAKES[name])):
            with pytest.raises(ValueError, match=r"\(3, 1\)"):
                losses.LOSSES[name](*(b[:, None] if j == i else b for j in range(len(TAKES[name]))))

def test_a_masked_vocabulary_has_a_kl():
    """Logits of -inf: 0 log 0 is 0 where q = 0; q > 0 with s = 0 is +inf; else the gradient is s - q."""
    never = -math.inf
    for dtype in (torch.float32, torch.float64):
        z_ref = torch.tensor([[0.0, 0.0, never], [0.0, 0.0, never], [0.0, 0.0, 0.0]], dtype=dtype)
        z = torch.tensor([[0.0, math.log(3.0), never], [0.0, LOG2, 0.0], [0.0, 0.0, never]], dtype=dtype,
                         requires_grad=True)
        kl = losses.token_kl(z_ref, z)
        # q = (1/2, 1/2, 0); s = (1/4, 3/4, 0): 1/2 log(4/3); s = (1/4, 1/2, 1/4): 1/2 log 2
        close(kl[:2], [0.143841036225890, 0.346573590279973], 1e-6)
        assert kl[2] == math.inf                                    # s = (1/2, 1/2, 0), q = (1/3, 1/3, 1/3)
        close(torch.autograd.grad(kl[:2].sum(), z)[0][:2], [[-0.25, 0.25, 0.0], [-0.25, 0.0, 0.25]], 1e-6)

def test_segment_sum_by_hand():
    """Each segment sums the values that carry its id, gradient 1; an id that no token carries has 0."""
    values = f64(1.0, 2.0, 4.0, 8.0, 16.0)
    total = losses.segment_sum(values, torch.tensor([1, 0, 1, 3, 1]), 5)
    assert total.tolist() == [2.0, 1.0 + 4.0 + 16.0, 0.0, 8.0, 0.0]
    weights = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0], dtype=torch.float64)
    assert torch.autograd.grad((weights * total).sum(), values)[0].tolist() == [20.0, 10.0, 20.0, 40.0, 20.0]
    assert losses.segment_sum(values[:0], torch.arange(0), 2).tolist() == [0.0, 0.0]

def test_sums_are_float64_whatever_comes_in():
    """4096 float32 tokens are summed to 1e-9 nats (float32: 1e-2), and the gradient is float32 again."""
    values = (-3 * torch.rand(4096, generator=rng(2))).requires_grad_()
    where = torch.zeros(4096, dtype=torch.long)
    total = losses.segment_sum(values, where, 1)
    assert total.dtype == torch.float64 and abs(total.item() - math.fsum(values.tolist())) < 1e-9
    assert torch.autograd.grad(total.sum(), values)[0].dtype == torch.float32
    for half in (torch.float16, torch.bfloat16):                    # 2048 and 256 in these
        assert losses.segment_sum(torch.ones(3000, dtype=half), where[:3000], 1).tolist() == [3000.0]

# Half precision

def test_half_precision_is_computed_in_float32_everywhere():
    """What comes in as float16 or bfloat16 gives the float32 result of the same numbers, to the last bit."""
    z, y = 3 * randn(2, 8, 50, seed=7), torch.randint(50, (8,), generator=rng(9))
    for half in (torch.bfloat16, torch.float16):
        h = z.to(half)
        cases = [(losses.token_logps, h[0], y), (losses.token_kl, *h), (losses.segment_rewards, h, h[0, 0])]
        for name in HYPER:
            args = (x.detach().to(half) if n not in MASKS else x for n, x in random_args(name, 3).items())
            cases.append((functools.partial(losses.LOSSES[name], **HYPER[name]), *args))
        for function, *args in cases:
            wide = function(*(x.float() if x.is_floating_point() else x for x in args))
            found = function(*args)
            assert found.dtype == torch.float32 and torch.equal(found, wide), (function, half)

# The losses by hand, values and gradients

def test_sft_and_dpo_by_hand():
    """-log pi(y_w|x) with gradient -1; Eq. 7 and its gradient on two pairs."""
    logps = f64(-3.5, 0.0, -1e4)
    loss = losses.sft_loss(logps)
    assert loss.tolist() == [3.5, 0.0, 1e4]
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == [-1.0, -1.0, -1.0]
    # pair 0: rho_w = -10 + 12 = 2, rho_l = -15 + 11 = -4, h = 0.1 (2 + 4) = 0.6
    #         L = log(1 + e^-0.6) = 0.437487950485886, g = 0.1 / (1 + e^0.6) = 0.0354343693774204
    # pair 1: rho_w = -8 + 7 = -1, rho_l = -6 + 9 = 3, h = -0.4
    #         L = 0.4 + log(1 + e^-0.4) = 0.913015252399953, g = 0.1 / (1 + e^-0.4) = 0.0598687660112452
    args = logps_of(f64(-10.0, -8.0), f64(-15.0, -6.0), f64(-12.0, -7.0), f64(-11.0, -9.0))
    loss = call("dpo", args, beta=0.1)
    close(loss, [0.437487950485886, 0.913015252399953])
    g = torch.tensor([0.0354343693774204, 0.0598687660112452], dtype=torch.float64)
    for n, sign in zip(LOGPS, (-1, 1, 1, -1), strict=True):
        close(gradients(call("dpo", args, beta=0.1), args)[n], sign * g)

def test_dpop_by_hand():
    """Eq. 3: the hinge stands inside beta's bracket and acts only below the reference."""
    # pair 0: rho_w = -1, rho_l = -3, lam 5: h = 0.3 (-1 + 3 - 5) = -0.9
    #         L = 0.9 + log(1 + e^-0.9) = 1.241153874732088, g = 0.3 / (1 + e^-0.9) = 0.213284850787501
    #         dL/dlog pi(y_w) = -g (1 + 5) = -1.279709104725007
    # pair 1: rho_w = +2, rho_l = -4: the hinge is 0, h = 0.3 * 6 = 1.8
    #         L = log(1 + e^-1.8) = 0.152977610526074, g = 0.3 / (1 + e^1.8) = 0.0425553195701464
    args = logps_of(f64(-9.0, -4.0), f64(-9.0, -10.0), f64(-8.0, -6.0), f64(-6.0, -6.0))
    loss = call("dpop", args, beta=0.3, lam=5.0)
    close(loss, [1.241153874732088, 0.152977610526074])
    grad = gradients(loss, args)
    close(grad["chosen_logps"], [-1.279709104725007, -0.0425553195701464])
    close(grad["rejected_logps"], [0.213284850787501, 0.0425553195701464])
    close(grad["ref_chosen_logps"], [1.279709104725007, 0.0425553195701464])
    close(grad["ref_rejected_logps"], [-0.213284850787501, -0.0425553195701464])

def test_dpop_at_the_kink_has_dpos_gradient():
    """relu'(0) = 0: at rho_w = 0 exactly the first step is DPO's; one hair below, 1 + lam is on."""
    ref, two = f64(-3.0, -3.0, -3.0), f64(-2.0, -2.0, -2.0)
    args = logps_of(f64(-3.0, -3.0 - 1e-9, -3.0 + 1e-9), two, ref, two)
    grad = gradients(call("dpop", args, beta=0.2, lam=7.0), args)
    # h = 0 to nine digits: g = 0.2 / 2 = 0.1
    close(grad["chosen_logps"], [-0.1, -0.1 * 8.0, -0.1], 1e-7)
    close(grad["ref_chosen_logps"], [0.1, 0.1 * 8.0, 0.1], 1e-7)

def test_tdpo1_and_tdpo2_by_hand():
    """TDPO1: both KLs carry gradient. TDPO2: the chosen KL counts, but carries none."""
    # beta 0.1, rho_w = 2, rho_l = -4, u = 0.6; K_w = 3, K_l = 5, delta = 0.2
    # TDPO1: h = 0.4, L = log(1 + e^-0.4) = 0.513015252399953, g = 0.1 / (1 + e^0.4) = 0.0401312339887548
    # TDPO2: h = 0.6 - 0.5 * 0.2 = 0.5, L = 0.474076984180107, g = 0.1 / (1 + e^0.5) = 0.0377540668798145
    values = f64(-10.0), f64(-15.0), f64(-12.0), f64(-11.0), f64(3.0), f64(5.0)
    args = dict(zip(LOGPS + KLS, values, strict=True))
    for name, knobs, value, g, signs in (
            ("tdpo1", {}, 0.513015252399953, 0.0401312339887548, (-1, 1, 1, -1, -1, 1)),
            ("tdpo2", {"alpha": 0.5}, 0.474076984180107, 0.0377540668798145, (-1, 1, 1, -1, 0, 0.5))):
        loss = call(name, args, beta=0.1, **knobs)
        close(loss, [value])
        grad = gradients(loss, args)
        for n, sign in zip(LOGPS + KLS, signs, strict=True):
            close(grad[n], [sign * g])

def test_2d_vanilla_by_hand():
    """One log-sigmoid for the pair, every segment's log-ratio scaled by its reward."""
    # rho_w = (0.4, -0.8), r_w = (1, 0.5): 0.4 - 0.4 = 0
    # rho_l = (-1, -0.5, 2), r_l = (0.2, 0.6, 0): -0.2 - 0.3 + 0 = -0.5;  h = 0.5 (0 + 0.5) = 0.25
    # L = log(1 + e^-0.25) = 0.575939419878844, g = 0.5 / (1 + e^0.25) = 0.218911749557101
    args = {
        "chosen_logps": f64([-2.6, -4.8]), "rejected_logps": f64([-4.0, -1.5, -1.0]),
        "ref_chosen_logps": f64([-3.0, -4.0]), "ref_rejected_logps": f64([-3.0, -1.0, -3.0]),
        "chosen_rewards": f64([1.0, 0.5]), "rejected_rewards": f64([0.2, 0.6, 0.0]),
        "chosen_mask": yes([1, 1]), "rejected_mask": yes([1, 1, 1]),
    }
    loss = call("2d-dpo-vanilla", args, beta=0.5)
    close(loss, [0.575939419878844])
    grad, g = gradients(loss, args), 0.218911749557101
    close(grad["chosen_logps"], [[-g, -0.5 * g]])
    close(grad["rejected_logps"], [[0.2 * g, 0.6 * g, 0.0]])
    close(grad["chosen_rewards"], [[-0.4 * g, 0.8 * g]])            # -g rho_w
    close(grad["rejected_rewards"], [[-1.0 * g, -0.5 * g, 2.0 * g]])  # +g rho_l

def test_2d_group_by_hand():
    """Eq. 6: the best chosen segments against the worst rejected ones, a log-sigmoid each, summed."""
    # S_w = 3, S_l = 2, N = 2.  Chosen by reward: segment 1 (1.0), then 2 (0.6); segment 0 is left out.
    # Rejected, lowest first: segment 1 (0.4), then 0 (0.8).  beta = 1.
    # h_0 = 1.0 * 0.5 - 0.4 * 1 = 0.1, h_1 = 0.6 * (-1) - 0.8 * (-0.25) = -0.4
    # L = log(1 + e^-0.1) + log(1 + e^0.4) = 0.644396660073571 + 0.913015252399953
    # g_0 = 1 / (1 + e^0.1) = 0.475020812521060, g_1 = 1 / (1 + e^-0.4) = 0.598687660112452
    args = {
        "chosen_logps": f64([-1.0, -2.5, -4.0]), "rejected_logps": f64([-5.25, -2.0]),
        "ref_chosen_logps": f64([-10.0, -3.0, -3.0]), "ref_rejected_logps": f64([-5.0, -3.0]),
        "chosen_rewards": f64([0.2, 1.0, 0.6]), "rejected_rewards": f64([0.8, 0.4]),
        "chosen_mask": yes([1, 1, 1]), "rejected_mask": yes([1, 1]),
    }
    loss = call("2d-dpo", args, beta=1.0)
    close(loss, [0.644396660073571 + 0.913015252399953])
    grad, g_0, g_1 = gradients(loss, args), 0.475020812521060, 0.598687660112452
    close(grad["chosen_logps"], [[0.0, -1.0 * g_0, -0.6 * g_1]])
    close(grad["rejected_logps"], [[0.8 * g_1, 0.4 * g_0]])
    close(grad["chosen_rewards"], [[0.0, -0.5 * g_0, 1.0 * g_1]])   # -g_k rho_w
    close(grad["rejected_rewards"], [[-0.25 * g_1, 1.0 * g_0]])     # +g_k rho_l
    assert grad["chosen_logps"][0, 0] == 0.0

# Reductions

def test_dpop_with_lam_0_and_tdpo2_with_alpha_0_are_dpo():
    """Value and gradients; with lam = 0 at log pi(y_w|x) = -inf too, where lam max(0, .) would be NaN."""
    args = random_args("tdpo2", 19)
    dpo = call("dpo", args)
    expected = gradients(dpo, args)
    for name, knobs in (("dpop", {"lam": 0.0}), ("tdpo2", {"alpha": 0.0})):
        loss = call(name, args, **knobs)
        close(loss, dpo, 1e-13)
        for n, grad in gradients(loss, args).items():
            close(grad, expected[n], 1e-13)
    infinite = [f64(-math.inf), f64(-1.0), f64(-2.0), f64(-1.0)]
    assert losses.dpop_loss(*infinite, lam=0.0) == losses.dpo_loss(*infinite) == math.inf

def test_2d_vanilla_with_one_token_segments_is_token_weighted_dpo():
    """-log sigma(beta sum_t w_t rho_t^w - beta sum_t w_t rho_t^l): one token a segment, r its weight.

    w = 1 is DPO; gamma^t D2PO (arXiv:2502.14340); less beyond a length LD-DPO (2409.06411); estimates TIS-DPO
    without its KL (2410.04350).
    """
    T, t = 7, torch.arange(7)
    logps = dict(zip(LOGPS, -3.0 * randn(4, T, seed=27).abs(), strict=True))
    for w in (torch.ones(2, T).double(), (0.9 ** t.double()).expand(2, T), randn(2, T, seed=28).sigmoid()):
        args = {n: x[None].requires_grad_() for n, x in logps.items()}
        args |= {n: w[None, i] for i, n in enumerate(REWARDS)}
        args |= {"chosen_mask": (t < 7)[None], "rejected_mask": (t < 5)[None]}
        loss = call("2d-dpo-vanilla", args)
        rho_w, rho_l = logps["chosen_logps"] - logps["ref_chosen_logps"], \
            (logps["rejected_logps"] - logps["ref_rejected_logps"])[:5]
        h = 0.3 * float(w[0] @ rho_w - w[1, :5] @ rho_l)
        close(loss, [math.log1p(math.exp(-h))], 4e-16)
        close(gradients(loss, args)["chosen_logps"][0], -0.3 * sigma(-h) * w[0], 1e-15)

# Segment rewards and the selection

def test_segment_rewards_by_hand():
    """r_k = W r~_k: aspects weighted and summed."""
    scores = f64([[1.0, 0.5], [0.0, 1.0], [0.2, 0.2]])              # (1, 3, 2), W = (3/4, 1/4)
    close(losses.segment_rewards(scores, f64(0.75, 0.25)), [[0.875, 0.25, 0.2]], 1e-12)

def test_the_kth_best_chosen_segment_meets_the_kth_worst_rejected_one():
    """By hand, S_w = 4 against S_l = 3, masks on both sides, a different N in each pair of the batch."""
    chosen = torch.tensor([[0.1, 0.9, 0.5, 0.7]] * 3)
    rejected = torch.tensor([[0.6, 0.2, 0.8]] * 3)
    i_w, i_l, paired = losses.select_segments(
        chosen, rejected, yes([1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]), yes([1, 1, 1], [1, 1, 1], [1, 0, 0]))
    assert i_w.shape == i_l.shape == paired.shape == (3, 3)         # K, the smaller S
    pairs = [[(w, r) for w, r, p in zip(*rows, strict=True) if p]
             for rows in zip(i_w.tolist(), i_l.tolist(), paired.tolist(), strict=True)]
    assert pairs[0] == [(1, 1), (3, 0), (2, 2)]                     # 0.9-0.2, 0.7-0.6, 0.5-0.8
    assert pairs[1] == [(2, 1), (0, 0)]                             # 0.9 and 0.7 are masked; N = 2
    assert pairs[2] == [(1, 0)]                                     # the worst two rejected are masked; N = 1
    assert paired.tolist() == [[True, True, True], [True, True, False], [True, False, False]]  # k < N

def test_equal_rewards_are_equal_although_floats_round():
    """Random scores, 1 to 10 segments, against integers: no segment is mispaired, in float32 or float64.

    Sums that no float holds: uniform W, thirds, tenths, and W of four decimals with a maximum of 4 or 16,
    whose rewards k / (2^6 5^j) a grid of 1e-5 rounds both ways. Different ones are at least 2e-5 apart.
    """
    generator = rng(34)
    for top, weights, pairs in ((4, [1] * 5, 1500), (3, [1] * 4, 300), (3, [5, 3, 2], 300),
                                (4, [17, 15, 16, 16, 16], 1500), (16, [3, 13], 300)):
        S = torch.randint(1, 11, (2, pairs), generator=generator)   # segments of each side
        scores = torch.randint(top + 1, (2, pairs, 10, len(weights)), generator=generator)
        masks = torch.arange(10) < S[:, :, None]                    # (2, pairs, 10)
        exact = (scores * torch.tensor(weights)).sum(-1)            # integers
        best, worst = (torch.where(mask, x, 10**6).argsort(stable=True)
                       for x, mask in ((-exact[0], masks[0]), (exact[1], masks[1])))
        for dtype in (torch.float32, torch.float64):
            W = torch.tensor([w / sum(weights) for w in weights], dtype=dtype)
            rewards = [losses.segment_rewards(side.to(dtype) / top, W) for side in scores]
            i_w, i_l, paired = losses.select_segments(*rewards, *masks)
            assert torch.equal(i_w[paired], best[paired]) and torch.equal(i_l[paired], worst[paired]), W

def test_a_chain_of_small_gaps_is_one_reward_and_what_is_masked_is_no_link():
    """Sorted, only a gap above 1e-5 parts rewards: 0, 0.8e-5 and 1.6e-5 are equal, 0 and 1.6e-5 alone not."""
    r = torch.tensor([[1.6e-5, 0.8e-5, 0.0]] * 2, dtype=torch.float64)
    mask = yes([1, 1, 1], [1, 0, 1])
    i_w, i_l, paired = losses.select_segments(r, r, mask, mask)
    assert i_l.tolist() == [[0, 1, 2], [2, 0, 1]] and i_w.tolist() == [[0, 1, 2], [0, 2, 1]]
    assert paired.tolist() == [[True, True, True], [True, True, False]]

def test_equal_rewards_keep_the_order_of_the_text():
    """More than 16 ties (below that an unstable sort looks stable), on both sides, with masks in between."""
    everything = torch.ones(1, 40, dtype=torch.bool)
    two = (torch.arange(40) % 2).double()[None]                     # 0, 1, 0, 1, ...
    i_w, i_l, _ = losses.select_segments(two, two, everything, everything)
    odd, even = list(range(1, 40, 2)), list(range(0, 40, 2))
    assert i_w.tolist() == [odd + even] and i_l.tolist() == [even + odd]
    mask = torch.arange(40)[None] % 3 != 0                          # every third segment masked
    i_w, i_l, paired = losses.select_segments(0 * two, 0 * two, mask, mask)
    assert i_w[paired].tolist() == i_l[paired].tolist() == [k for k in range(40) if k % 3]

# Masks

def test_masked_segments_change_neither_value_nor_gradient_whatever_stands_in_them():
    """Padding with NaN, infinities or plain numbers equals deletion; its gradient is exactly 0, never NaN."""
    for name in TWO_D:
        small = random_args(name, 36, pairs=4, s_w=2, s_l=3)
        small |= {n: torch.ones_like(small[n]) for n in MASKS}
        loss = call(name, small)
        grad = gradients(loss, small)
        for filling, front in itertools.product((math.nan, math.inf, -math.inf, 7.5), (True, False)):
            padded = {}
            for n, x in small.items():
                pad = x.new_full((4, 2 if "chosen" in n else 3), False if n in MASKS else filling)
                padded[n] = torch.cat((pad, x.detach()) if front else (x.detach(), pad), 1)
                padded[n].requires_grad_(n not in MASKS)
            long_loss = call(name, padded)
            close(long_loss, loss, 1e-13)
            long_grad = gradients(long_loss, padded)
            for n, expected in grad.items():
                real = padded["chosen_mask" if "chosen" in n else "rejected_mask"]
                close(long_grad[n][real].reshape(expected.shape), expected, 1e-13)
                assert (long_grad[n][~real] == 0).all(), (name, n, filling)

# Extreme values

def test_extreme_log_probabilities_give_finite_values_and_gradients():
    """A pair wrong by 10^4 nats costs -h, with gradient beta; one right by 10^4 nats costs nothing."""
    dtypes = torch.float32, torch.float64
    for dtype, name, wrong in itertools.product(dtypes, SEQUENCE + TWO_D, (True, False)):
        shape = (1, 1) if name in TWO_D else (1,)
        low, high, kl, one = (torch.full(shape, x, dtype=dtype) for x in (-2e4, -1e4, 40.0, 1.0))
        args = logps_of(*(low, high) if wrong else (high, low), high, high)
        args |= dict.fromkeys(KLS, kl) | dict.fromkeys(REWARDS, one) | dict.fromkeys(MASKS, one.bool())
        args = {n: args[n].clone().requires_grad_(n in LOGPS[:2]) for n in TAKES[name]}
        loss = call(name, args)
        grad = gradients(loss, args)
        times = 6.0 if name == "dpop" and wrong else 1.0            # 1 + lam
        close(loss, [0.3 * 1e4 * times if wrong else 0.0], 1e-5)
        close(grad["chosen_logps"].flatten(), [-0.3 * times if wrong else 0.0], 1e-5)
        close(grad["rejected_logps"].flatten(), [0.3 if wrong else 0.0], 1e-5)

# The interface

def test_a_loss_says_what_it_takes_and_has_its_papers_settings():
    """Terms by position, all of them in TERMS; hyper-parameters keyword-only, with the paper's values."""
    assert {name: losses.knobs_of(loss) for name, loss in losses.LOSSES.items()} == {
        "sft": {}, "dpo": {"beta": 0.1}, "dpop": {"beta": 0.3, "lam": 50.0}, "tdpo1": {"beta": 0.1},
        "tdpo2": {"beta": 0.1, "alpha": 0.5}, "2d-dpo": {"beta": 0.1}, "2d-dpo-vanilla": {"beta": 0.1}}
    assert TAKES["sft"] == [*LOGPS[:1]] and TAKES["dpo"] == TAKES["dpop"] == [*LOGPS]
    assert TAKES["tdpo1"] == TAKES["tdpo2"] == [*LOGPS, *KLS]
    assert TAKES["2d-dpo"] == TAKES["2d-dpo-vanilla"] == [*LOGPS, *REWARDS, *MASKS]
    assert list(losses.TERMS) == [*LOGPS, *KLS, *REWARDS, *MASKS, "chosen_length", "rejected_length"]
    assert losses.knobs_of(lambda x, *, tau, eps=0.5: x) == {"tau": None, "eps": 0.5}
    for name in SEQUENCE + TWO_D:
        with pytest.raises(TypeError):
            losses.LOSSES[name](*random_args(name, 39).values(), 0.1)

def test_nothing_is_made_on_a_default_device():
    """With another default device the results of tensors on the CPU are the same, and there."""
    r, mask, y = randn(2, 3, seed=1), torch.ones(2, 3, dtype=torch.bool), torch.tensor([2, 0])
    with torch.device("meta"):
        found = [losses.token_logps(r, y), losses.token_kl(r, -r), losses.segment_sum(r[:, 0], y, 3),
                 losses.dpo2d_vanilla_loss(r, r, -r, r, r, r, mask, mask),
                 losses.dpo2d_loss(r, r, -r, r, r, r, mask, mask)]
    assert all(x.device.type == "cpu" for x in found)
