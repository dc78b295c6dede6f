"""losses.py alone: numbers worked out by hand, gradients in closed form, reductions, masks, extreme values.

Literal numbers come from the equations of the papers by hand (each derivation stands beside its number).
Below h is the argument of log sigma and g = beta sigma(-h), so that d(-log sigma(h)) = -g d(h / beta).
"""

import itertools
import math

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
TERMS = {name: losses.terms_of(losses.LOSSES[name]) for name in HYPER}
SEQUENCE = ("dpo", "dpop", "tdpo1", "tdpo2")
TWO_D = ("2d-dpo-vanilla", "2d-dpo")


# ---------------------------------------------------------------------------------------------------------
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
    return function(*(args[n] for n in TERMS[name]), **(HYPER[name] | hyper))


def gradients(loss, args):
    """d loss.sum() / d argument for every argument that requires it; one without influence has 0."""
    names = [n for n in args if args[n].requires_grad]
    found = torch.autograd.grad(loss.sum(), [args[n] for n in names], materialize_grads=True)
    return dict(zip(names, found, strict=True))


def random_args(name, seed, pairs=6, s_w=4, s_l=3, dtype=torch.float64):
    """Random arguments of a loss; rewards without ties; every pair keeps its first segment."""
    generator, args = rng(seed), {}
    for n in TERMS[name]:
        shape = (pairs, s_w if "rejected" not in n else s_l) if name in TWO_D else (pairs,)
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        if n in MASKS:
            args[n] = (x < 0.7).index_fill(1, torch.tensor(0), True)
        else:
            args[n] = (-6.0 * x if n in LOGPS else 4.0 * x if n in KLS else x).to(dtype).requires_grad_()
    return args


def healthy(args, is_healthy=True):
    """The same arguments with every chosen log-ratio between +0.1 and +2 nats (or -0.1 and -2)."""
    gap = torch.linspace(0.1, 2.0, len(args["chosen_logps"]), dtype=torch.float64)
    chosen = args["ref_chosen_logps"].detach() + (gap if is_healthy else -gap)
    return args | {"chosen_logps": chosen.requires_grad_()}


def close(actual, expected, tolerance=1e-9):
    """Equal shapes, and equal numbers to an absolute and relative tolerance; NaN equals nothing."""
    actual = torch.as_tensor(actual)
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance), (actual, expected)


def raises(error, function, *args):
    try:
        function(*args)
    except error:
        return
    raise AssertionError(f"{function.__name__} raised no {error.__name__}")


def sigma(x):
    return 1.0 / (1.0 + math.exp(-x))


# ---------------------------------------------------------------------------------------------------------
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
    z, z_ref = randn(2, 3, 4, seed=7), randn(2, 3, 4, seed=8)
    y = torch.randint(4, (2, 3), generator=rng(6))
    logps = losses.token_logps(z.flatten(0, 1), y.flatten())
    kl = losses.token_kl(z_ref.flatten(0, 1), z.flatten(0, 1))
    assert logps.shape == kl.shape == (6,)
    for shape in ((2, 3), (1, 2, 3), (3, 1, 2, 1)):
        close(losses.token_logps(z.reshape(*shape, 4), y.reshape(shape)), logps.reshape(shape))
        close(losses.token_kl(z_ref.reshape(*shape, 4), z.reshape(*shape, 4)), kl.reshape(shape))
    close(losses.token_logps(z[1, 2], y[1, 2]), logps[5])
    close(losses.token_kl(z_ref[1, 2], z[1, 2]), kl[5])


def test_an_id_outside_the_vocabulary_is_an_index_error():
    """No id means "ignore me": -100 would silently score 0."""
    for bad in (-1, -100, 4):
        raises(IndexError, losses.token_logps, torch.zeros(2, 4), torch.tensor([0, bad]))
        raises(IndexError, losses.token_logps, torch.zeros(4), torch.tensor(bad))


def test_extreme_logits_give_finite_values_and_gradients():
    """At gaps of 1000 nats log pi is -1000 and the KL 1000, not infinite; gradients stay finite."""
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor([[1000.0, 0.0, 0.0], [0.0, 0.0, -1000.0]], dtype=dtype, requires_grad=True)
        logps = losses.token_logps(z, torch.tensor([1, 2]))
        assert logps.dtype == losses.token_kl(z, z).dtype == dtype
        # s = (1, 0, 0): log s_1 = -1000.  s = (1/2, 1/2, 0): log s_2 = -1000 - log 2
        close(logps, [-1000.0, -1000.0 - LOG2], 1e-6)
        close(torch.autograd.grad(logps.sum(), z)[0], [[-1.0, 1.0, 0.0], [-0.5, -0.5, 1.0]], 1e-6)
        # q = (0, 1, 0) against s = (1, 0, 0): log 1 - (-1000) = 1000; gradient s - q
        # q = (0, 0, 1) against s = (1/2, 1/2, 0): 1000 + log 2
        z_ref = torch.tensor([[0.0, 1000.0, 0.0], [-1000.0, -1000.0, 0.0]], dtype=dtype)
        kl = losses.token_kl(z_ref, z)
        close(kl, [1000.0, 1000.0 + LOG2], 1e-6)
        close(torch.autograd.grad(kl.sum(), z)[0], [[1.0, -1.0, 0.0], [0.5, 0.5, -1.0]], 1e-6)


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
    grad = torch.autograd.grad((weights * total).sum(), values)[0]
    assert grad.tolist() == [20.0, 10.0, 20.0, 40.0, 20.0]
    assert losses.segment_sum(values, torch.zeros(5, dtype=torch.long), 1).tolist() == [31.0]  # a response
    assert losses.segment_sum(values[:0], torch.arange(0), 2).tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------------
# Half precision


def test_half_precision_is_computed_in_float32_everywhere():
    """What comes in as float16 or bfloat16 gives the float32 result of the same numbers, to the last bit."""
    def float32(x):
        return x.float() if x.is_floating_point() else x

    z, y = (3 * randn(2, 8, 50, seed=7)), torch.randint(50, (8,), generator=rng(9))
    for half in (torch.bfloat16, torch.float16):
        r, mask = randn(2, 6, seed=10).to(half), yes([1] * 6, [1] * 6)
        h, f = z.to(half), z.float()
        cases = [(losses.token_logps, h[0], y), (losses.token_kl, *h), (losses.token_kl, h[0], f[1]),
                 (losses.token_kl, f[0], h[1]), (losses.segment_rewards, h, h[0, 0]),
                 (losses.select_segments, r, -r, mask, mask)]
        for name in HYPER:
            args = {n: x.detach().to(half) if n not in MASKS else x for n, x in random_args(name, 3).items()}
            function = getattr(losses, losses.LOSSES[name].__name__)
            cases.append((lambda *x, f=function, knobs=HYPER[name]: f(*x, **knobs), *args.values()))
        for function, *args in cases:
            given, expected = function(*args), function(*map(float32, args))
            pairs = zip(given, expected, strict=True) if isinstance(given, tuple) else [(given, expected)]
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs), (function, half)
        h.requires_grad_()                                          # the gradient has the dtype of the logits
        assert torch.autograd.grad(losses.token_kl(f[0], h[1]).sum(), h)[0].dtype == half


def test_sums_and_losses_are_exact_where_half_precision_is_not():
    """3000 ones are 3000 (not 2048 or 256), and DPOP at lam 50 is right to float32 (not to 0.2)."""
    for half in (torch.float16, torch.bfloat16):
        total = losses.segment_sum(torch.ones(3000, dtype=half), torch.zeros(3000, dtype=torch.long), 1)
        assert total.dtype == torch.float32 and total.tolist() == [3000.0]
        args = [torch.tensor([x], dtype=half) for x in (-21.0, -30.25, -20.5, -30.0)]
        # rho_w = -0.5, rho_l = -0.25: h = 0.3 (-0.25 - 50 * 0.5) = -7.575, L = 7.575 + log(1 + e^-7.575)
        close(losses.dpop_loss(*args, beta=0.3, lam=50.0), [7.575513025], 1e-6)


# ---------------------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------------------
# Random pairs


def scalar_2d(name, p, beta):
    """Value and gradients of a 2D-DPO loss on one pair, in plain floats and lists."""
    rho = {s: [a - b for a, b in zip(p[s + "_logps"], p[f"ref_{s}_logps"], strict=True)]
           for s in ("chosen", "rejected")}
    kept = {s: [k for k, here in enumerate(p[s + "_mask"]) if here] for s in rho}
    r = {s: p[s + "_rewards"] for s in rho}
    grad = {n: [0.0] * len(p[n]) for n in LOGPS + REWARDS}
    groups = [(kept["chosen"], kept["rejected"])]
    if name == "2d-dpo":
        best = sorted(kept["chosen"], key=lambda k: -r["chosen"][k])
        worst = sorted(kept["rejected"], key=lambda k: r["rejected"][k])
        groups = [([i], [j]) for i, j in zip(best, worst, strict=False)]  # stops at the shorter list
    value = 0.0
    for chosen, rejected in groups:
        h = beta * (sum(r["chosen"][k] * rho["chosen"][k] for k in chosen)
                    - sum(r["rejected"][k] * rho["rejected"][k] for k in rejected))
        value += math.log1p(math.exp(-h))
        for side, members, sign in (("chosen", chosen, -1.0), ("rejected", rejected, 1.0)):
            g = sign * beta * sigma(-h)
            for k in members:
                grad[side + "_logps"][k], grad[f"ref_{side}_logps"][k] = g * r[side][k], -g * r[side][k]
                grad[side + "_rewards"][k] = g * rho[side][k]
    return value, grad


def test_value_and_gradient_of_both_2d_losses_in_every_argument():
    """-g r_w and +g r_l per segment; in Eq. 6 each pair of segments has its own g, the others exactly 0."""
    for name, seed, (s_w, s_l) in itertools.product(TWO_D, (14, 15), ((4, 3), (2, 5), (3, 3))):
        args = random_args(name, seed, s_w=s_w, s_l=s_l)
        loss = call(name, args)
        grad = gradients(loss, args)
        for b in range(len(loss)):
            value, expected = scalar_2d(name, {n: x[b].tolist() for n, x in args.items()}, 0.3)
            close(loss[b], value, 1e-10)
            for n, numbers in expected.items():
                close(grad[n][b], numbers, 1e-10)
                assert (grad[n][b][torch.tensor(numbers) == 0.0] == 0.0).all(), (name, n)


def test_a_pair_never_touches_another_pair():
    """The loss of a batch is the losses of its pairs one by one, (B,), neither summed nor averaged."""
    for name in HYPER:
        args = random_args(name, 18)
        loss = call(name, args)
        assert loss.shape == (6,) and loss.dtype == torch.float64, name
        alone = [call(name, {n: x[b:b + 1] for n, x in args.items()}) for b in range(6)]
        close(loss, torch.cat(alone), 1e-13)
        grad = torch.autograd.grad(loss[2], args["chosen_logps"])[0]
        assert (grad[torch.arange(6) != 2] == 0).all() and (grad[2] != 0).any(), name


# ---------------------------------------------------------------------------------------------------------
# Reductions


def same_as_dpo(name, args, **hyper):
    """Value and gradients in the four log-probabilities equal those of DPO's with the same beta."""
    loss, dpo = call(name, args, **hyper), call("dpo", args)
    close(loss, dpo, 1e-13)
    grad, dpo_grad = gradients(loss, args), gradients(dpo, args)
    for n in LOGPS:
        close(grad[n], dpo_grad[n], 1e-13)
    return grad


def test_dpop_is_dpo_with_lam_0_and_above_the_reference():
    """Value and gradient; with lam = 0 at log pi(y_w|x) = -inf too, where lam max(0, .) would be NaN."""
    args = random_args("dpop", 19)
    same_as_dpo("dpop", healthy(args), lam=50.0)
    same_as_dpo("dpop", healthy(args, False), lam=0.0)
    infinite = [f64(-math.inf), f64(-1.0), f64(-2.0), f64(-1.0)]
    assert losses.dpop_loss(*infinite, beta=0.1, lam=0.0) == losses.dpo_loss(*infinite, beta=0.1) == math.inf


def test_tdpo1_with_equal_kls_and_tdpo2_with_alpha_0_is_dpo():
    args = random_args("tdpo1", 22)
    grad = same_as_dpo("tdpo2", args, alpha=0.0)
    assert (grad["chosen_seq_kl"] == 0).all() and (grad["rejected_seq_kl"] == 0).all()
    args["rejected_seq_kl"] = args["chosen_seq_kl"].detach().clone().requires_grad_()
    same_as_dpo("tdpo1", args)
    for alpha in (0.3, 1.0):
        same_as_dpo("tdpo2", args, alpha=alpha)


def test_2d_with_one_segment_each_is_vanilla_and_with_reward_1_dpo():
    """N = S_w = S_l = 1: both 2D losses agree at any reward; at r = 1 they are DPO."""
    args = random_args("2d-dpo", 29, s_w=1, s_l=1)
    group, vanilla = call("2d-dpo", args), call("2d-dpo-vanilla", args)
    close(group, vanilla, 1e-13)
    for a, b in zip(gradients(group, args).values(), gradients(vanilla, args).values(), strict=True):
        close(a, b, 1e-13)
    ones = args | {n: torch.ones(6, 1, dtype=torch.float64) for n in REWARDS}
    for name in TWO_D:
        close(call(name, ones), call("dpo", {n: args[n].squeeze(1) for n in LOGPS}), 1e-13)


def test_2d_vanilla_with_one_token_segments_is_token_weighted_dpo():
    """-log sigma(beta sum_t w_t rho_t^w - beta sum_t w_t rho_t^l): one token a segment, r its weight.

    w = 1 is DPO; w = gamma^t is D2PO's decay (arXiv:2502.14340); 1 up to the shorter length and a after it is
    LD-DPO (2409.06411); estimated weights are TIS-DPO without its KL (2410.04350).
    """
    lengths, T, beta = {"chosen": 7, "rejected": 5}, 7, 0.3         # the last two rejected columns are masked
    t = torch.arange(T, dtype=torch.float64)
    logps = dict(zip(LOGPS, -3.0 * randn(4, T, seed=27).abs(), strict=True))
    estimated = torch.rand(2, T, generator=rng(28), dtype=torch.float64)
    for name, w in (("dpo", 0 * estimated + 1), ("d2po", (0.9 ** t).expand(2, T)), ("tis", estimated),
                    ("ld", (0.4 + 0.6 * (t < 5).double()).expand(2, T))):
        args = {n: x[None].requires_grad_() for n, x in logps.items()}
        args |= {n: w[None, i] for i, n in enumerate(REWARDS)}
        args |= {f"{side}_mask": (t < n)[None] for side, n in lengths.items()}
        loss = call("2d-dpo-vanilla", args)
        terms = {side: w[i, :n] @ (logps[f"{side}_logps"] - logps[f"ref_{side}_logps"])[:n]
                 for i, (side, n) in enumerate(lengths.items())}
        h = float(beta * terms["chosen"] - beta * terms["rejected"])
        close(loss, [math.log1p(math.exp(-h))], 4e-16)
        close(gradients(loss, args)["chosen_logps"][0], -beta * sigma(-h) * w[0], 1e-15)
        if name == "dpo":
            sums = {n: x[:5 if "rejected" in n else 7].sum()[None] for n, x in logps.items()}
            close(loss, call("dpo", sums), 1e-15)


# ---------------------------------------------------------------------------------------------------------
# Segment rewards and the selection


def test_segment_rewards_by_hand():
    """r_k = W r~_k: aspects weighted and summed. One-hot W: one aspect alone; uniform W: their mean."""
    scores = f64([[1.0, 0.5], [0.0, 1.0], [0.2, 0.2]], [[0.4, 0.0], [0.0, 0.0], [1.0, 0.6]])  # (2, 3, 2)
    rewards = losses.segment_rewards(scores, f64(0.75, 0.25))
    # 0.75 * 1 + 0.25 * 0.5 = 0.875, 0.25, 0.75 * 0.2 + 0.25 * 0.2 = 0.2; 0.3, 0, 0.75 + 0.15 = 0.9
    close(rewards, [[0.875, 0.25, 0.2], [0.3, 0.0, 0.9]], 1e-12)
    close(torch.autograd.grad(rewards.sum(), scores)[0], [[[0.75, 0.25]] * 3] * 2, 1e-12)
    assert torch.equal(losses.segment_rewards(scores, f64(0.0, 1.0)), scores[:, :, 1])
    close(losses.segment_rewards(scores, f64(0.5, 0.5)), scores.mean(2), 1e-12)


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


def exact_selection(chosen, rejected):
    """The pairs of one batch in exact arithmetic: lists of integers -> lists of (i_w, i_l)."""
    best = sorted(range(len(chosen)), key=lambda k: -chosen[k])     # Python's sort is stable
    worst = sorted(range(len(rejected)), key=lambda k: rejected[k])
    return list(zip(best, worst, strict=False))                     # stops at the shorter list


def test_equal_rewards_are_equal_although_floats_round():
    """Random scores, 1 to 10 segments, against integers: no segment is mispaired, in float32 or float64.

    Five aspects of 0 to 4 with uniform W, thirds and tenths: sums that no float holds, a quarter of the equal
    ones an ulp apart. float32 and float64 therefore select the same.
    """
    generator = rng(34)
    for top, weights, pairs in ((4, [1, 1, 1, 1, 1], 3000), (3, [1, 1, 1, 1], 500), (3, [5, 3, 2], 500)):
        S = torch.randint(1, 11, (2, pairs), generator=generator)   # segments of each side
        scores = torch.randint(top + 1, (2, pairs, 10, len(weights)), generator=generator)
        masks = torch.arange(10) < S[:, :, None]                    # (2, pairs, 10)
        exact = [[rows[:n] for rows, n in zip(side.tolist(), count.tolist(), strict=True)]
                 for side, count in zip((scores * torch.tensor(weights)).sum(-1), S, strict=True)]
        for dtype in (torch.float32, torch.float64):
            W = torch.tensor([w / sum(weights) for w in weights], dtype=dtype)
            rewards = [losses.segment_rewards(side.to(dtype) / top, W) for side in scores]
            i_w, i_l, paired = losses.select_segments(*rewards, *masks)
            for b, n in enumerate(paired.sum(1).tolist()):
                found = list(zip(i_w[b, :n].tolist(), i_l[b, :n].tolist(), strict=True))
                assert found == exact_selection(exact[0][b], exact[1][b]), (dtype, b)


def test_equal_rewards_keep_the_order_of_the_text():
    """More than 16 ties (below that an unstable sort looks stable), on both sides, with masks in between."""
    everything = torch.ones(2, 40, dtype=torch.bool)
    two = (torch.arange(40) % 2).double().expand(2, 40)             # 0, 1, 0, 1, ...
    i_w, i_l, paired = losses.select_segments(two, two, everything, everything)
    odd, even = list(range(1, 40, 2)), list(range(0, 40, 2))
    assert i_w.tolist() == [odd + even] * 2 and i_l.tolist() == [even + odd] * 2 and paired.all()
    mask = (torch.arange(40) % 3 != 0).expand(2, 40)                # every third segment masked
    i_w, i_l, paired = losses.select_segments(0 * two, 0 * two, mask, mask)
    kept = [k for k in range(40) if k % 3]
    assert paired.sum(1).tolist() == [len(kept)] * 2
    assert i_w[:, :len(kept)].tolist() == i_l[:, :len(kept)].tolist() == [kept] * 2


def test_a_masked_segment_is_never_selected_however_good_or_bad_the_others_are():
    """Masked rewards of any value lose against unmasked ones of any finite value."""
    chosen = torch.tensor([[1.0, -1e30, math.inf, math.nan]])
    rejected = torch.tensor([[0.0, 1e30, -math.inf, math.nan]])
    mask = yes([0, 1, 0, 0])
    i_w, i_l, paired = losses.select_segments(chosen, rejected, mask, mask)
    assert i_w[0, 0] == i_l[0, 0] == 1
    assert paired.tolist() == [[True, False, False, False]]


# ---------------------------------------------------------------------------------------------------------
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


def test_a_2d_pair_needs_no_batch_dimension_and_may_have_no_segment():
    """Arguments (S,) give a loss without dimensions. N = 0: an empty sum, and log 2 in the vanilla form."""
    for name, empty in (("2d-dpo", 0.0), ("2d-dpo-vanilla", LOG2)):
        args = random_args(name, 47, pairs=1)
        alone = call(name, {n: x[0] for n, x in args.items()})
        assert alone.shape == ()
        close(alone, call(name, args)[0], 1e-13)
        args |= {n: torch.zeros_like(args[n]) for n in MASKS}
        loss = call(name, args)
        close(loss, [empty], 1e-13)
        assert all((g == 0).all() for g in gradients(loss, args).values())


# ---------------------------------------------------------------------------------------------------------
# Extreme values


def test_extreme_log_probabilities_give_finite_values_and_gradients():
    """A pair wrong by 10^4 nats costs -h, with gradient beta; one right by 10^4 nats costs nothing."""
    dtypes = torch.float32, torch.float64
    for dtype, name, wrong in itertools.product(dtypes, SEQUENCE + TWO_D, (True, False)):
        shape = (1, 1) if name in TWO_D else (1,)
        low, high, kl, one = (torch.full(shape, x, dtype=dtype) for x in (-2e4, -1e4, 40.0, 1.0))
        args = logps_of(*(low, high) if wrong else (high, low), high, high)
        args |= dict.fromkeys(KLS, kl) | dict.fromkeys(REWARDS, one) | dict.fromkeys(MASKS, one.bool())
        args = {n: args[n].clone().requires_grad_(n in LOGPS[:2]) for n in TERMS[name]}
        loss = call(name, args)
        grad = gradients(loss, args)
        times = 6.0 if name == "dpop" and wrong else 1.0            # 1 + lam
        close(loss, [0.3 * 1e4 * times if wrong else 0.0], 1e-5)
        close(grad["chosen_logps"].flatten(), [-0.3 * times if wrong else 0.0], 1e-5)
        close(grad["rejected_logps"].flatten(), [0.3 if wrong else 0.0], 1e-5)


def test_a_nan_that_counts_is_not_hidden():
    """A NaN in an unmasked argument comes out as NaN, in its own pair only."""
    for name in HYPER:
        for n in TERMS[name]:
            if n in MASKS or (name == "2d-dpo" and n in REWARDS):   # a NaN has no place in an order
                continue
            args = {n: x.detach().clone() for n, x in random_args(name, 46).items()}
            args[n][1, ...] = math.nan
            assert call(name, args).isnan().tolist() == [False, True, False, False, False, False], (name, n)
    z = torch.tensor([[0.0, math.nan], [0.0, 1.0]])
    assert losses.token_logps(z, torch.tensor([0, 1])).isnan().tolist() == [True, False]
    assert losses.token_kl(z, z[[1, 1]]).isnan().tolist() == [True, False]
    assert losses.token_kl(z[[1, 1]], z).isnan().tolist() == [True, False]
    assert losses.segment_sum(z[0], torch.tensor([0, 1]), 2).isnan().tolist() == [False, True]


# ---------------------------------------------------------------------------------------------------------
# The interface


def test_a_loss_says_what_it_takes_and_guesses_nothing():
    """Terms by position, hyper-parameters keyword-only and without a default, as their signature says."""
    assert {name: losses.knobs_of(losses.LOSSES[name]) for name in HYPER} == {
        name: dict.fromkeys(knobs) for name, knobs in HYPER.items()}
    assert TERMS["sft"] == [*LOGPS[:1]] and TERMS["dpo"] == TERMS["dpop"] == [*LOGPS]
    assert TERMS["tdpo1"] == TERMS["tdpo2"] == [*LOGPS, *KLS]
    assert TERMS["2d-dpo"] == TERMS["2d-dpo-vanilla"] == [*LOGPS, *REWARDS, *MASKS]
    assert losses.knobs_of(lambda x, *, tau=0.5: x) == {"tau": 0.5}
    for name in SEQUENCE + TWO_D:
        args = random_args(name, 39).values()
        raises(TypeError, losses.LOSSES[name], *args)
        raises(TypeError, losses.LOSSES[name], *args, *HYPER[name].values())


def test_arguments_are_left_as_they_were():
    """Pure functions: no argument changes, and a second call gives the same bits."""
    z, r = randn(2, 3, 4, seed=42), torch.rand(3, 4, generator=rng(44))
    mask, ids = r < 0.6, torch.tensor([1, 0, 1])
    cases = [(losses.token_logps, z[0], ids), (losses.token_kl, *z), (losses.segment_sum, z[0, :, 0], ids, 2),
             (losses.segment_rewards, z, z[0, 0]), (losses.select_segments, r, r, mask, mask)]
    cases += [(lambda *x, name=name: call(name, dict(zip(TERMS[name], x, strict=True))),
               *(x.detach() for x in random_args(name, 41).values())) for name in HYPER]
    for function, *args in cases:
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        first = function(*args)
        (first[0] if isinstance(first, tuple) else first).add_(1)   # shares no memory with the arguments
        function(*args)
        assert all(a is b or torch.equal(a, b) for a, b in zip(args, before, strict=True))


def test_results_live_on_the_device_of_the_arguments():
    """Nothing is created on a default device: shown on torch's meta device, which every machine has."""
    with torch.device("meta"):
        z, y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
        r, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert losses.token_logps(z, y).device.type == losses.token_kl(z, z).device.type == "meta"
    assert losses.segment_sum(z[:, 0], y, 2).device.type == "meta"
    for function in (losses.dpo2d_vanilla_loss, losses.dpo2d_loss):
        assert function(r, r, r, r, r, r, mask, mask, beta=0.1).device.type == "meta"
