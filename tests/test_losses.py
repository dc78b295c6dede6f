"""losses.py alone: numbers worked out by hand, gradients in closed form, reductions, masks, extreme values.

Literal numbers come from the equations of the papers by hand (each derivation stands beside its number).
Below h is the argument of log sigma and g = beta sigma(-h), so that d(-log sigma(h)) = -g d(h / beta).
"""

import inspect
import itertools
import math

import torch

import losses

LOG2 = math.log(2.0)
LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
KLS = ("chosen_seq_kl", "rejected_seq_kl")
REWARDS = ("chosen_rewards", "rejected_rewards")
MASKS = ("chosen_mask", "rejected_mask")

# CLI name: (function, its arguments, hyper-parameters used below where nothing depends on their value)
LOSSES = {
    "sft": ("sft_loss", LOGPS[:1], {}),
    "dpo": ("dpo_loss", LOGPS, {"beta": 0.3}),
    "dpop": ("dpop_loss", LOGPS, {"beta": 0.3, "lam": 5.0}),
    "tdpo1": ("tdpo1_loss", LOGPS + KLS, {"beta": 0.3}),
    "tdpo2": ("tdpo2_loss", LOGPS + KLS, {"beta": 0.3, "alpha": 0.4}),
    "2d-vanilla": ("dpo2d_vanilla_loss", LOGPS + REWARDS + MASKS, {"beta": 0.3}),
    "2d": ("dpo2d_loss", LOGPS + REWARDS + MASKS, {"beta": 0.3}),
}


# ---------------------------------------------------------------------------------------------------------
# Helpers


def f64(*values):
    """A float64 tensor with a gradient."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def yes(*values):
    """A mask: 1 where a segment exists."""
    return torch.tensor(values, dtype=torch.bool)


def arguments(names, *values):
    """The arguments by name, in the order of the signature."""
    return dict(zip(names, values, strict=True))


def rng(seed):
    return torch.Generator().manual_seed(seed)


def call(name, args, **hyper):
    """The loss `name` on a dict of arguments."""
    function, names, defaults = LOSSES[name]
    return getattr(losses, function)(*(args[n] for n in names), **(defaults | hyper))


def gradients(loss, args):
    """d loss.sum() / d argument for every argument that requires it; one without influence has 0."""
    names = [n for n in args if args[n].requires_grad]
    found = torch.autograd.grad(loss.sum(), [args[n] for n in names], allow_unused=True)
    return {n: torch.zeros_like(args[n]) if g is None else g for n, g in zip(names, found, strict=True)}


def random_args(name, seed, pairs=6, s_w=4, s_l=3, dtype=torch.float64):
    """Random arguments of a loss; rewards without ties; every pair keeps its first segment."""
    generator = rng(seed)
    two_d = name.startswith("2d")
    args = {}
    for n in LOSSES[name][1]:
        width = s_w if "chosen" in n else s_l
        shape = (pairs, width) if two_d else (pairs,)
        if n in MASKS:
            args[n] = torch.rand(shape, generator=generator) < 0.7
            args[n][:, 0] = True
            continue
        x = torch.rand(shape, generator=generator, dtype=torch.float64)
        if n in LOGPS:
            x = -6.0 * x
        elif n in KLS:
            x = 4.0 * x
        args[n] = x.to(dtype).requires_grad_()
    return args


def healthy(args, is_healthy=True):
    """The same arguments with every chosen log-ratio between +0.1 and +2 nats (or -0.1 and -2)."""
    moved = dict(args)
    gap = torch.linspace(0.1, 2.0, len(args["chosen_logps"]), dtype=torch.float64)
    chosen = args["ref_chosen_logps"].detach() + (gap if is_healthy else -gap)
    moved["chosen_logps"] = chosen.requires_grad_()
    return moved


def close(actual, expected, tolerance=1e-9):
    """Equal shapes, and equal numbers to an absolute and relative tolerance; NaN equals nothing."""
    if not isinstance(actual, torch.Tensor):
        actual = torch.as_tensor(actual)
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance), (actual, expected)


def raises(error, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except error:
        return
    raise AssertionError(f"{function.__name__} raised no {error.__name__}")


def sigma(x):
    return 1.0 / (1.0 + math.exp(-x))


def h_of(loss):
    """h from L = log(1 + e^-h)."""
    return -torch.log(torch.expm1(loss.detach()))


def column(args, b):
    """Plain Python floats of pair b: name -> float, or a list of floats in the order of the segments."""
    return {n: v[b].tolist() for n, v in args.items()}


# ---------------------------------------------------------------------------------------------------------
# From logits to log-probabilities


def test_token_logps_by_hand():
    """log pi(y_t) of a softmax with known probabilities; its gradient in the logits is e_y - s."""
    # logits (log 1, log 2, log 5) + 7: s = (1, 2, 5) / 8.  Target 1: log(2/8) = -2 log 2 = -1.386294361119891
    # logits (0, 0, 0):                 s = (1, 1, 1) / 3.  Target 2: -log 3            = -1.098612288668110
    z = f64([7.0, 7.0 + LOG2, 7.0 + math.log(5.0)], [0.0, 0.0, 0.0])
    logps = losses.token_logps(z, torch.tensor([1, 2]))
    close(logps, [-1.386294361119891, -1.098612288668110], 1e-12)
    close(torch.autograd.grad(logps.sum(), z)[0],
          [[-1 / 8, 1 - 2 / 8, -5 / 8], [-1 / 3, -1 / 3, 1 - 1 / 3]], 1e-12)


def test_token_logps_are_normalised_over_the_vocabulary():
    """For every position, the probabilities of all possible targets sum to 1."""
    z = torch.randn(5, 7, generator=rng(1), dtype=torch.float64) * 3
    total = sum(losses.token_logps(z, torch.full((5,), v)).exp() for v in range(7))
    close(total, torch.ones(5), 1e-12)


def test_token_kl_by_hand_and_its_direction():
    """token_kl is the forward KL(pi_ref || pi); the reverse direction is another number."""
    # q = (1/2, 1/2), s = (1/4, 3/4).  Forward: 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3) = 0.143841036225890
    # Reverse: 1/4 log(1/2) + 3/4 log(3/2) = 0.130812035941137
    # q = (1/2, 1/4, 1/4), s = (1/4, 1/4, 1/2): 1/2 log 2 + 0 - 1/4 log 2 = 1/4 log 2 = 0.173286795139986
    q = f64([0.0, 0.0]), f64([math.log(2.0), 0.0, 0.0])
    s = f64([0.0, math.log(3.0)]), f64([0.0, 0.0, math.log(2.0)])
    close(losses.token_kl(q[0], s[0]), [0.143841036225890], 1e-12)
    close(losses.token_kl(s[0], q[0]), [0.130812035941137], 1e-12)
    close(losses.token_kl(q[1], s[1]), [0.173286795139986], 1e-12)
    # the gradient in the policy's logits is s - q
    close(torch.autograd.grad(losses.token_kl(q[0], s[0]).sum(), s[0])[0], [[-0.25, 0.25]], 1e-12)
    close(torch.autograd.grad(losses.token_kl(q[1], s[1]).sum(), s[1])[0], [[-0.25, 0.0, 0.25]], 1e-12)


def test_token_kl_is_an_enumerated_sum_over_the_vocabulary():
    """KL = sum_v q_v log(q_v / s_v) with probabilities from exp and a division, several positions at once."""
    generator = rng(2)
    z_ref = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    z = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    for n in range(6):
        q, s = ([math.exp(x) for x in row[n].tolist()] for row in (z_ref, z))
        expected = sum(a / sum(q) * math.log(a / sum(q) / (b / sum(s))) for a, b in zip(q, s, strict=True))
        close(losses.token_kl(z_ref, z)[n], expected, 1e-12)


def test_token_kl_is_never_negative_and_zero_only_for_equal_distributions():
    """KL >= 0; it is 0 if the logits are equal up to a constant per position, and positive otherwise."""
    generator = rng(3)
    z_ref = torch.randn(200, 9, generator=generator, dtype=torch.float64)
    z = torch.randn(200, 9, generator=generator, dtype=torch.float64)
    assert (losses.token_kl(z_ref, z) > 1e-4).all()
    nudge = torch.zeros(9, dtype=torch.float64)
    nudge[3] = 1e-3
    assert (losses.token_kl(z_ref, z_ref + nudge) > 0).all()
    assert (losses.token_kl(z_ref, z_ref) == 0).all()
    constants = torch.randn(200, 1, generator=generator, dtype=torch.float64)
    assert losses.token_kl(z_ref, z_ref + constants).abs().max() < 1e-12


def test_a_constant_added_to_all_logits_of_a_position_changes_nothing():
    """softmax(z + c) = softmax(z): token_logps and token_kl do not see c, on either side."""
    generator = rng(4)
    z, z_ref = (torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    c = 50.0 * torch.randn(5, 1, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 5, 2, 2, 1])
    close(losses.token_logps(z + c, y), losses.token_logps(z, y), 1e-11)
    close(losses.token_kl(z_ref, z + c), losses.token_kl(z_ref, z), 1e-11)
    close(losses.token_kl(z_ref + c, z), losses.token_kl(z_ref, z), 1e-11)


def test_token_functions_pass_gradcheck():
    """Autograd agrees with finite differences, in the reference's logits too."""
    generator = rng(5)
    z, z_ref = (torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
                for _ in range(2))
    y = torch.tensor([3, 0, 1])
    assert torch.autograd.gradcheck(lambda x: losses.token_logps(x, y), (z,))
    assert torch.autograd.gradcheck(lambda a, b: losses.token_kl(a, b), (z_ref, z))


def test_the_vocabulary_is_the_last_dimension_whatever_stands_before_it():
    """One position (V,), positions (N, V) and batches (B, T, V) give the same numbers."""
    generator = rng(6)
    z, z_ref = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.randint(4, (2, 3), generator=generator)
    logps = losses.token_logps(z.flatten(0, 1), y.flatten())
    kl = losses.token_kl(z_ref.flatten(0, 1), z.flatten(0, 1))
    assert logps.shape == kl.shape == (6,)
    close(losses.token_logps(z, y), logps.reshape(2, 3))
    close(losses.token_kl(z_ref, z), kl.reshape(2, 3))
    close(losses.token_logps(z[1, 2], y[1, 2]), logps[5])
    close(losses.token_kl(z_ref[1, 2], z[1, 2]), kl[5])


def test_half_precision_logits_are_upcast_before_the_softmax():
    """bfloat16 and float16 logits give float32 numbers exact to float32, on either side of the KL."""
    generator = rng(7)
    for half in (torch.bfloat16, torch.float16):
        z, z_ref = ((3 * torch.randn(8, 50, generator=generator)).to(half) for _ in range(2))
        y = torch.randint(50, (8,), generator=generator)
        logps = losses.token_logps(z, y)
        assert logps.dtype == torch.float32
        close(logps, losses.token_logps(z.double(), y), 1e-5)
        exact = losses.token_kl(z_ref.double(), z.double())
        for a, b in ((z_ref, z), (z_ref, z.float()), (z_ref.float(), z)):
            kl = losses.token_kl(a, b)
            assert kl.dtype == torch.float32
            close(kl, exact, 1e-5)
        # the gradient returns in the dtype of the logits
        leaf = z.clone().requires_grad_()
        assert torch.autograd.grad(losses.token_kl(z_ref, leaf).sum(), leaf)[0].dtype == half


def test_at_least_float32_raises_half_precision_and_nothing_else():
    for given, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32),
                            (torch.float32, torch.float32), (torch.float64, torch.float64)):
        x = torch.tensor([1.0, -2.5], dtype=given)
        assert losses.at_least_float32(x).dtype == expected
        assert losses.at_least_float32(x).tolist() == [1.0, -2.5]


def test_float64_stays_float64_and_float32_stays_float32():
    """No function changes the precision of its arguments."""
    for dtype in (torch.float32, torch.float64):
        z = torch.randn(3, 4, generator=rng(8)).to(dtype)
        assert losses.token_logps(z, torch.tensor([0, 1, 2])).dtype == dtype
        assert losses.token_kl(z, z + z).dtype == dtype
        assert losses.segment_sum(z[0], torch.tensor([0, 1, 0, 1]), 2).dtype == dtype
        assert losses.segment_rewards(z.unsqueeze(0), z[0]).dtype == dtype
        for name in LOSSES:
            args = random_args(name, 9, dtype=dtype)
            loss = call(name, args)
            assert loss.dtype == dtype, name
            assert all(g.dtype == dtype for g in gradients(loss, args).values()), name


def test_extreme_logits_give_finite_values_and_gradients():
    """At gaps of 1000 nats log pi is -1000 and the KL 1000, not infinite; gradients stay finite."""
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor([[1000.0, 0.0, 0.0], [0.0, 0.0, -1000.0]], dtype=dtype, requires_grad=True)
        logps = losses.token_logps(z, torch.tensor([1, 2]))
        # s = (1, 0, 0): log s_1 = -1000.  s = (1/2, 1/2, 0): log s_2 = -1000 - log 2
        close(logps, [-1000.0, -1000.0 - LOG2], 1e-6)
        close(torch.autograd.grad(logps.sum(), z)[0], [[-1.0, 1.0, 0.0], [-0.5, -0.5, 1.0]], 1e-6)
        # q = (0, 1, 0) against s = (1, 0, 0): log 1 - (-1000) = 1000; gradient s - q
        # q = (0, 0, 1) against s = (1/2, 1/2, 0): 1000 + log 2
        z_ref = torch.tensor([[0.0, 1000.0, 0.0], [-1000.0, -1000.0, 0.0]], dtype=dtype)
        kl = losses.token_kl(z_ref, z)
        close(kl, [1000.0, 1000.0 + LOG2], 1e-6)
        close(torch.autograd.grad(kl.sum(), z)[0], [[1.0, -1.0, 0.0], [0.5, 0.5, -1.0]], 1e-6)


# ---------------------------------------------------------------------------------------------------------
# Sums over a response or a segment


def test_segment_sum_by_hand():
    """Each segment sums the values that carry its id; an id that no token carries has 0."""
    values = f64(1.0, 2.0, 4.0, 8.0, 16.0)
    total = losses.segment_sum(values, torch.tensor([1, 0, 1, 3, 1]), 5)
    assert total.tolist() == [2.0, 1.0 + 4.0 + 16.0, 0.0, 8.0, 0.0]
    # d total_k / d value_t = 1 if token t belongs to segment k, else 0
    weights = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0], dtype=torch.float64)
    grad = torch.autograd.grad((weights * total).sum(), values)[0]
    assert grad.tolist() == [20.0, 10.0, 20.0, 40.0, 20.0]


def test_a_response_is_a_segment_too():
    """segment_sum over one id is the plain sum, never a mean; over distinct ids it is the identity."""
    values = torch.randn(9, generator=rng(10), dtype=torch.float64)
    whole = losses.segment_sum(values, torch.zeros(9, dtype=torch.long), 1)
    close(whole, [math.fsum(values.tolist())], 1e-12)
    assert torch.equal(losses.segment_sum(values, torch.arange(9), 9), values)
    assert losses.segment_sum(values[:0], torch.arange(0), 2).tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------------------------------------------
# The losses by hand, values and gradients


def test_sft_by_hand():
    """L = -log pi(y_w|x); gradient -1."""
    logps = f64(-3.5, 0.0, -1e4)
    loss = losses.sft_loss(logps)
    assert loss.tolist() == [3.5, 0.0, 1e4]
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == [-1.0, -1.0, -1.0]


def test_dpo_by_hand():
    """Eq. 7 and its gradient on two pairs."""
    # pair 0: rho_w = -10 + 12 = 2, rho_l = -15 + 11 = -4, h = 0.1 (2 + 4) = 0.6
    #         L = log(1 + e^-0.6) = 0.437487950485886, g = 0.1 / (1 + e^0.6) = 0.0354343693774204
    # pair 1: rho_w = -8 + 7 = -1, rho_l = -6 + 9 = 3, h = -0.4
    #         L = 0.4 + log(1 + e^-0.4) = 0.913015252399953, g = 0.1 / (1 + e^-0.4) = 0.0598687660112452
    args = arguments(LOGPS, f64(-10.0, -8.0), f64(-15.0, -6.0), f64(-12.0, -7.0), f64(-11.0, -9.0))
    loss = call("dpo", args, beta=0.1)
    close(loss, [0.437487950485886, 0.913015252399953])
    grad = gradients(loss, args)
    g = torch.tensor([0.0354343693774204, 0.0598687660112452], dtype=torch.float64)
    close(grad["chosen_logps"], -g)
    close(grad["rejected_logps"], g)
    close(grad["ref_chosen_logps"], g)
    close(grad["ref_rejected_logps"], -g)


def test_dpop_by_hand():
    """Eq. 3: the hinge stands inside beta's bracket and acts only below the reference."""
    # pair 0: rho_w = -1, rho_l = -3, lam 5: h = 0.3 (-1 + 3 - 5) = -0.9
    #         L = 0.9 + log(1 + e^-0.9) = 1.241153874732088, g = 0.3 / (1 + e^-0.9) = 0.213284850787501
    #         dL/dlog pi(y_w) = -g (1 + 5) = -1.279709104725007
    # pair 1: rho_w = +2, rho_l = -4: the hinge is 0, h = 0.3 * 6 = 1.8
    #         L = log(1 + e^-1.8) = 0.152977610526074, g = 0.3 / (1 + e^1.8) = 0.0425553195701464
    args = arguments(LOGPS, f64(-9.0, -4.0), f64(-9.0, -10.0), f64(-8.0, -6.0), f64(-6.0, -6.0))
    loss = call("dpop", args, beta=0.3, lam=5.0)
    close(loss, [1.241153874732088, 0.152977610526074])
    grad = gradients(loss, args)
    close(grad["chosen_logps"], [-1.279709104725007, -0.0425553195701464])
    close(grad["rejected_logps"], [0.213284850787501, 0.0425553195701464])
    close(grad["ref_chosen_logps"], [1.279709104725007, 0.0425553195701464])
    close(grad["ref_rejected_logps"], [-0.213284850787501, -0.0425553195701464])


def test_dpop_one_nat_below_the_reference_with_the_papers_settings():
    """beta 0.3, lam 50, rho_w = -1, rho_l = 0: the chosen response is pushed up by 15.3 per nat."""
    # h = 0.3 (-1 - 0 - 50) = -15.3; dL/dlog pi(y_w) = -0.3 * 51 / (1 + e^-15.3) = -15.3 (1 - 2.266e-7)
    args = arguments(LOGPS, f64(-21.0), f64(-30.0), f64(-20.0), f64(-30.0))
    loss = call("dpop", args, beta=0.3, lam=50.0)
    close(loss, [15.3000002266], 1e-10)
    close(gradients(loss, args)["chosen_logps"], [-15.2999965327], 1e-9)


def test_tdpo1_by_hand():
    """L = -log sigma(u - delta), delta = beta K_l - beta K_w; both KLs carry gradient."""
    # beta 0.1, rho_w = 2, rho_l = -4, u = 0.6; K_w = 3, K_l = 5, delta = 0.2; h = 0.4
    # L = log(1 + e^-0.4) = 0.513015252399953, g = 0.1 / (1 + e^0.4) = 0.0401312339887548
    args = arguments(LOGPS + KLS, f64(-10.0), f64(-15.0), f64(-12.0), f64(-11.0), f64(3.0), f64(5.0))
    loss = call("tdpo1", args, beta=0.1)
    close(loss, [0.513015252399953])
    g = 0.0401312339887548
    expected = (-g, g, g, -g, -g, g)
    for name, value in zip(LOGPS + KLS, expected, strict=True):
        close(gradients(call("tdpo1", args, beta=0.1), args)[name], [value])


def test_tdpo2_by_hand():
    """L = -log sigma(u - alpha (beta K_l - sg(beta K_w))): the chosen KL counts, but carries no gradient."""
    # as above with alpha = 0.5: h = 0.6 - 0.5 * 0.2 = 0.5
    # L = log(1 + e^-0.5) = 0.474076984180107, g = 0.1 / (1 + e^0.5) = 0.0377540668798145
    args = arguments(LOGPS + KLS, f64(-10.0), f64(-15.0), f64(-12.0), f64(-11.0), f64(3.0), f64(5.0))
    loss = call("tdpo2", args, beta=0.1, alpha=0.5)
    close(loss, [0.474076984180107])
    g = 0.0377540668798145
    expected = (-g, g, g, -g, 0.0, 0.5 * g)
    for name, value in zip(LOGPS + KLS, expected, strict=True):
        close(gradients(call("tdpo2", args, beta=0.1, alpha=0.5), args)[name], [value])


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
    loss = call("2d-vanilla", args, beta=0.5)
    close(loss, [0.575939419878844])
    grad = gradients(loss, args)
    g = 0.218911749557101
    close(grad["chosen_logps"], [[-g, -0.5 * g]])
    close(grad["rejected_logps"], [[0.2 * g, 0.6 * g, 0.0]])
    close(grad["ref_chosen_logps"], [[g, 0.5 * g]])
    close(grad["ref_rejected_logps"], [[-0.2 * g, -0.6 * g, 0.0]])
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
    loss = call("2d", args, beta=1.0)
    close(loss, [0.644396660073571 + 0.913015252399953])
    grad = gradients(loss, args)
    g_0, g_1 = 0.475020812521060, 0.598687660112452
    close(grad["chosen_logps"], [[0.0, -1.0 * g_0, -0.6 * g_1]])
    close(grad["rejected_logps"], [[0.8 * g_1, 0.4 * g_0]])
    close(grad["ref_chosen_logps"], [[0.0, 1.0 * g_0, 0.6 * g_1]])
    close(grad["ref_rejected_logps"], [[-0.8 * g_1, -0.4 * g_0]])
    close(grad["chosen_rewards"], [[0.0, -0.5 * g_0, 1.0 * g_1]])   # -g_k rho_w
    close(grad["rejected_rewards"], [[-0.25 * g_1, 1.0 * g_0]])     # +g_k rho_l
    assert grad["chosen_logps"][0, 0] == 0.0


# ---------------------------------------------------------------------------------------------------------
# Gradients of random pairs


def scalar_h(name, p, *, beta, lam=0.0, alpha=0.0):
    """h of one pair in plain floats, and the closed-form gradients of MATH.md divided by g."""
    rho_w = p["chosen_logps"] - p["ref_chosen_logps"]
    rho_l = p["rejected_logps"] - p["ref_rejected_logps"]
    h = beta * (rho_w - rho_l)
    up, down = 1.0, 1.0                                             # dL/dlog pi(y_w) = -up g, y_l: +down g
    over_g = {}
    if name == "dpop" and rho_w < 0:
        h += beta * lam * rho_w                                     # -lam max(0, -rho_w)
        up = 1.0 + lam
    if name == "tdpo1":
        h += beta * p["chosen_seq_kl"] - beta * p["rejected_seq_kl"]
        over_g = {"chosen_seq_kl": -1.0, "rejected_seq_kl": 1.0}
    if name == "tdpo2":
        h += alpha * beta * (p["chosen_seq_kl"] - p["rejected_seq_kl"])
        over_g = {"chosen_seq_kl": 0.0, "rejected_seq_kl": alpha}
    over_g |= arguments(LOGPS, -up, down, up, -down)
    return h, over_g


def test_value_and_gradient_of_every_sequence_loss_in_every_argument():
    """The tables of MATH.md 2 to 4: -g, +g, DPOP's -g(1 + lam), the KLs' -g, +g and 0, alpha g."""
    for name, seed in itertools.product(("dpo", "dpop", "tdpo1", "tdpo2"), (11, 12, 13)):
        hyper = LOSSES[name][2]
        args = random_args(name, seed)
        loss = call(name, args)
        grad = gradients(loss, args)
        for b in range(len(loss)):
            h, over_g = scalar_h(name, column(args, b), **hyper)
            g = hyper["beta"] * sigma(-h)
            close(loss[b], math.log1p(math.exp(-h)), 1e-10)
            for argument, factor in over_g.items():
                close(grad[argument][b], factor * g, 1e-10)


def scalar_2d(name, p, beta):
    """Value and gradients of a 2D-DPO loss on one pair, in plain floats and lists."""
    rho = {s: [a - b for a, b in zip(p[s + "_logps"], p[f"ref_{s}_logps"], strict=True)]
           for s in ("chosen", "rejected")}
    kept = {s: [k for k, here in enumerate(p[s + "_mask"]) if here] for s in rho}
    r = {s: p[s + "_rewards"] for s in rho}
    grad = {n: [0.0] * len(p[n]) for n in LOGPS + REWARDS}
    if name == "2d":
        best = sorted(kept["chosen"], key=lambda k: -r["chosen"][k])
        worst = sorted(kept["rejected"], key=lambda k: r["rejected"][k])
        groups = [([i], [j]) for i, j in zip(best, worst, strict=False)]  # stops at the shorter list
    else:
        groups = [(kept["chosen"], kept["rejected"])]
    value = 0.0
    for chosen, rejected in groups:
        h = beta * (sum(r["chosen"][k] * rho["chosen"][k] for k in chosen)
                    - sum(r["rejected"][k] * rho["rejected"][k] for k in rejected))
        value += math.log1p(math.exp(-h))
        g = beta * sigma(-h)
        for side, members, sign in (("chosen", chosen, -1.0), ("rejected", rejected, 1.0)):
            for k in members:
                grad[side + "_logps"][k] = sign * g * r[side][k]
                grad[f"ref_{side}_logps"][k] = -sign * g * r[side][k]
                grad[side + "_rewards"][k] = sign * g * rho[side][k]
    return value, grad


def test_value_and_gradient_of_both_2d_losses_in_every_argument():
    """-g r_w and +g r_l per segment; in Eq. 6 each pair of segments has its own g, the others exactly 0."""
    for name, seed, (s_w, s_l) in itertools.product(("2d-vanilla", "2d"), (14, 15), ((4, 3), (2, 5), (3, 3))):
        args = random_args(name, seed, s_w=s_w, s_l=s_l)
        loss = call(name, args)
        grad = gradients(loss, args)
        for b in range(len(loss)):
            value, expected = scalar_2d(name, column(args, b), 0.3)
            close(loss[b], value, 1e-10)
            for argument, numbers in expected.items():
                close(grad[argument][b], numbers, 1e-10)
                zeros = [k for k, x in enumerate(numbers) if x == 0.0]
                assert (grad[argument][b][zeros] == 0.0).all(), (name, argument)


def test_every_loss_passes_gradcheck():
    """Autograd agrees with finite differences in every argument that a loss differentiates.

    TDPO2's chosen KL is held fixed, as its stop-gradient says; DPOP on both sides of its kink.
    """
    for name in LOSSES:
        args = random_args(name, 16, pairs=3)
        cases = [args]
        if name == "dpop":
            cases = [healthy(args, True), healthy(args, False)]
        for case in cases:
            frozen = {n for n in case if n in MASKS or (name, n) == ("tdpo2", "chosen_seq_kl")}
            free = [n for n in case if n not in frozen]

            def value(*x, name=name, case=case, free=free):
                return call(name, case | arguments(free, *x))

            if "chosen_seq_kl" in frozen:
                case["chosen_seq_kl"] = case["chosen_seq_kl"].detach()
            assert torch.autograd.gradcheck(value, [case[n] for n in free])


def test_gradient_in_the_logits_agrees_with_finite_differences():
    """Logits -> token_logps, token_kl -> sums -> loss: autograd is the difference quotient of every logit."""
    generator = rng(17)
    z, z_ref = (torch.randn(7, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.randint(4, (7,), generator=generator)
    response = torch.tensor([0, 0, 0, 0, 1, 1, 1])                  # 4 chosen tokens, 3 rejected ones
    segment = torch.tensor([0, 0, 1, 1, 2, 3, 3])                   # two segments each
    rewards = torch.tensor([[0.9, 0.3, 0.4, 0.7]], dtype=torch.float64)
    everything = yes([1, 1])
    frozen_k_w = losses.segment_sum(losses.token_kl(z_ref, z), response, 2)[:1]

    def value(name, z, k_w=None):
        ids, num = (segment, 4) if name.startswith("2d") else (response, 2)
        logps, ref_logps = (losses.segment_sum(losses.token_logps(x, y), ids, num) for x in (z, z_ref))
        kl = losses.segment_sum(losses.token_kl(z_ref, z), response, 2)
        if name.startswith("2d"):
            return call(name, {
                "chosen_logps": logps[None, :2], "rejected_logps": logps[None, 2:],
                "ref_chosen_logps": ref_logps[None, :2], "ref_rejected_logps": ref_logps[None, 2:],
                "chosen_rewards": rewards[:, :2], "rejected_rewards": rewards[:, 2:],
                "chosen_mask": everything, "rejected_mask": everything}).sum()
        return call(name, {
            "chosen_logps": logps[:1], "rejected_logps": logps[1:], "ref_chosen_logps": ref_logps[:1],
            "ref_rejected_logps": ref_logps[1:], "chosen_seq_kl": kl[:1] if k_w is None else k_w,
            "rejected_seq_kl": kl[1:]}).sum()

    step = 1e-5
    for name in LOSSES:
        k_w = frozen_k_w if name == "tdpo2" else None               # sg: the chosen KL does not move with z
        leaf = z.clone().requires_grad_()
        grad = torch.autograd.grad(value(name, leaf), leaf)[0]
        for t, v in itertools.product(range(7), range(4)):
            nudge = torch.zeros_like(z)
            nudge[t, v] = step
            quotient = (value(name, z + nudge, k_w) - value(name, z - nudge, k_w)) / (2 * step)
            close(grad[t, v], quotient, 1e-8)


def test_a_pair_never_touches_another_pair():
    """The loss of a batch is the losses of its pairs one by one, (B,), neither summed nor averaged."""
    for name in LOSSES:
        args = random_args(name, 18)
        loss = call(name, args)
        assert loss.shape == (6,), name
        alone = torch.cat([call(name, {n: x[b:b + 1] for n, x in args.items()}) for b in range(6)])
        close(loss, alone, 1e-13)
        grad = torch.autograd.grad(loss[2], args["chosen_logps"])[0]
        others = torch.arange(6) != 2
        assert (grad[others] == 0).all() and (grad[2] != 0).any(), name


# ---------------------------------------------------------------------------------------------------------
# Reductions, invariances


def same_as_dpo(name, args, **hyper):
    """Value and gradients in the four log-probabilities equal those of DPO's with the same beta."""
    args = {n: args[n] for n in LOSSES[name][1]}
    dpo_args = {n: args[n] for n in LOGPS}
    beta = {"beta": (LOSSES[name][2] | hyper)["beta"]}
    loss, dpo = call(name, args, **hyper), call("dpo", dpo_args, **beta)
    close(loss, dpo, 1e-13)
    grad, dpo_grad = gradients(loss, args), gradients(dpo, dpo_args)
    for n in LOGPS:
        close(grad[n], dpo_grad[n], 1e-13)
    return grad


def test_dpop_with_lam_0_is_dpo():
    for is_healthy in (True, False):
        same_as_dpo("dpop", healthy(random_args("dpop", 19), is_healthy), lam=0.0)


def test_dpop_with_every_chosen_response_above_the_reference_is_dpo():
    same_as_dpo("dpop", healthy(random_args("dpop", 20)), lam=50.0)


def test_dpop_is_never_below_dpo_and_grows_by_beta_lam_per_nat():
    """L_DPOP >= L_DPO, strictly below the reference; h falls by exactly beta lam (-rho_w)."""
    args = healthy(random_args("dpop", 21), False)
    rho_w = (args["chosen_logps"] - args["ref_chosen_logps"]).detach()
    dpo, dpop = call("dpo", args), call("dpop", args, lam=5.0)
    assert (dpop > dpo).all()
    close(h_of(dpop) - h_of(dpo), 0.3 * 5.0 * rho_w, 1e-9)


def test_dpop_at_the_kink_has_dpos_gradient():
    """relu'(0) = 0: at rho_w = 0 exactly the first step is DPO's; one hair below, 1 + lam is on."""
    ref = f64(-3.0, -3.0, -3.0)
    chosen = f64(-3.0, -3.0 - 1e-9, -3.0 + 1e-9)                    # at, below, above the reference
    args = arguments(LOGPS, chosen, f64(-2.0, -2.0, -2.0), ref, f64(-2.0, -2.0, -2.0))
    grad = gradients(call("dpop", args, beta=0.2, lam=7.0), args)
    # h = 0 to nine digits: g = 0.2 / 2 = 0.1
    close(grad["chosen_logps"], [-0.1, -0.1 * 8.0, -0.1], 1e-7)
    close(grad["ref_chosen_logps"], [0.1, 0.1 * 8.0, 0.1], 1e-7)
    close(grad["rejected_logps"], [0.1, 0.1, 0.1], 1e-7)


def test_dpop_hinge_looks_at_the_chosen_sequence_only():
    """What the rejected response does relative to the reference never switches the hinge."""
    for rho_l in (-5.0, 0.0, 5.0):
        for rho_w, up in ((0.5, 1.0), (-0.5, 1.0 + 5.0)):
            args = arguments(LOGPS, f64(-7.0 + rho_w), f64(-9.0 + rho_l), f64(-7.0), f64(-9.0))
            grad = gradients(call("dpop", args), args)
            close(-grad["chosen_logps"] / grad["rejected_logps"], [up], 1e-9)


def test_tdpo_with_equal_kls_has_dpos_value():
    """K_w = K_l: delta = 0 for TDPO1, and for TDPO2 whatever alpha."""
    args = random_args("tdpo1", 22)
    args["rejected_seq_kl"] = args["chosen_seq_kl"].detach().clone().requires_grad_()
    same_as_dpo("tdpo1", args)
    for alpha in (0.0, 0.3, 1.0):
        same_as_dpo("tdpo2", args, alpha=alpha)


def test_tdpo2_with_alpha_0_is_dpo_and_no_kl_has_gradient():
    grad = same_as_dpo("tdpo2", random_args("tdpo2", 23), alpha=0.0)
    assert (grad["chosen_seq_kl"] == 0).all() and (grad["rejected_seq_kl"] == 0).all()


def test_tdpo2_with_alpha_1_has_tdpo1s_value_and_all_its_gradients_but_one():
    """The stop-gradient changes no value; only the chosen KL's gradient is missing."""
    args = random_args("tdpo2", 24)
    one, two = call("tdpo1", args), call("tdpo2", args, alpha=1.0)
    close(two, one, 1e-13)
    grad_one, grad_two = gradients(one, args), gradients(two, args)
    for n in LOGPS + ("rejected_seq_kl",):
        close(grad_two[n], grad_one[n], 1e-13)
    assert (grad_one["chosen_seq_kl"] < 0).all()
    assert (grad_two["chosen_seq_kl"] == 0).all()


def test_tdpo2s_stop_gradient_really_stops():
    """The loss moves with the chosen KL, yet nothing upstream of that KL receives a gradient through it."""
    source = f64(0.5)                                               # a parameter that only K_w depends on
    args = random_args("tdpo2", 25, pairs=1)
    args["chosen_seq_kl"] = 2.0 * source
    loss = call("tdpo2", args)
    assert torch.autograd.grad(loss.sum(), source, allow_unused=True, retain_graph=True)[0] in (None, 0.0)
    more = call("tdpo2", args | {"chosen_seq_kl": 2.0 * source + 1.0})
    assert (loss - more > 1e-3).all()                               # h rises by alpha beta
    # the rejected KL is not stopped, nor is TDPO1's chosen KL
    upstream = f64(0.5)
    for name, n in (("tdpo2", "rejected_seq_kl"), ("tdpo1", "chosen_seq_kl"), ("tdpo1", "rejected_seq_kl")):
        moved = call(name, random_args(name, 25, pairs=1) | {n: 2.0 * upstream})
        assert torch.autograd.grad(moved.sum(), upstream)[0].abs() > 1e-3


def test_alpha_scales_both_kls_alike():
    """delta_2 enters as alpha (K_l - K_w): h is linear in alpha with slope beta (K_w - K_l)."""
    args = random_args("tdpo2", 26)
    h = [h_of(call("tdpo2", args, alpha=a)) for a in (0.0, 0.25, 0.5, 1.0)]
    slope = 0.3 * (args["chosen_seq_kl"] - args["rejected_seq_kl"]).detach()
    for a, moved in zip((0.25, 0.5, 1.0), h[1:], strict=True):
        close(moved - h[0], a * slope, 1e-9)


def one_row_of_segments(seed, cuts):
    """One pair, 6 tokens a response, cut into segments at `cuts`: the four sums by segment, and in total."""
    tokens = arguments(LOGPS, *-torch.rand(4, 6, generator=rng(seed), dtype=torch.float64))
    sums = {n: torch.stack([part.sum() for part in x.split(cuts)]).unsqueeze(0) for n, x in tokens.items()}
    total = {n: x.sum().reshape(1) for n, x in tokens.items()}
    return sums, total


def test_2d_vanilla_with_all_rewards_1_is_dpo_whatever_the_segmentation():
    """r = 1 on segments that cover the response: the sum over segments is the sum over the response."""
    for cuts in ([6], [1, 5], [2, 2, 2], [1, 1, 1, 1, 1, 1]):
        sums, total = one_row_of_segments(27, cuts)
        ones = torch.ones(1, len(cuts), dtype=torch.float64)
        args = sums | {n: ones for n in REWARDS} | {n: ones.bool() for n in MASKS}
        args = {n: x.requires_grad_() if n in LOGPS else x for n, x in args.items()}
        loss = call("2d-vanilla", args)
        close(loss, call("dpo", total), 1e-12)
        # every segment then gets DPO's -g or +g
        rho = {s: total[s + "_logps"] - total[f"ref_{s}_logps"] for s in ("chosen", "rejected")}
        g = 0.3 * sigma(-0.3 * float(rho["chosen"] - rho["rejected"]))
        grad = gradients(loss, {n: args[n] for n in LOGPS})
        close(grad["chosen_logps"], -g * ones, 1e-12)
        close(grad["rejected_logps"], g * ones, 1e-12)


def test_2d_with_one_segment_each_and_reward_1_is_dpo():
    """Both 2D losses, one segment a response: DPO."""
    for name in ("2d", "2d-vanilla"):
        sums, total = one_row_of_segments(28, [6])
        one = torch.ones(1, 1, dtype=torch.float64)
        args = sums | {n: one for n in REWARDS} | {n: one.bool() for n in MASKS}
        close(call(name, args), call("dpo", total), 1e-13)


def test_2d_group_with_one_segment_each_is_vanilla():
    """N = S_w = S_l = 1, any rewards: Eq. 6 is the vanilla loss, in value and gradient."""
    args = random_args("2d", 29, s_w=1, s_l=1)
    group, vanilla = call("2d", args), call("2d-vanilla", args)
    close(group, vanilla, 1e-13)
    grad_group, grad_vanilla = gradients(group, args), gradients(vanilla, args)
    for n in LOGPS + REWARDS:
        close(grad_group[n], grad_vanilla[n], 1e-13)


def test_2d_scaling_rewards_by_c_and_beta_by_1_over_c_changes_nothing():
    """Only the product beta r enters."""
    for name in ("2d-vanilla", "2d"):
        args = random_args(name, 30)
        scaled = args | {n: 4.0 * args[n] for n in REWARDS}
        close(call(name, scaled, beta=0.3 / 4.0), call(name, args, beta=0.3), 1e-12)


def test_value_at_the_reference_is_log_2_and_n_log_2_for_2d_group():
    """pi = pi_ref: every h is 0; with equal KLs (both 0) TDPO too; any rewards."""
    for name in ("dpo", "dpop", "tdpo1", "tdpo2", "2d-vanilla", "2d"):
        args = random_args(name, 31)
        args["chosen_logps"] = args["ref_chosen_logps"].detach().clone()
        args["rejected_logps"] = args["ref_rejected_logps"].detach().clone()
        for n in KLS:
            if n in args:
                args[n] = torch.zeros(6, dtype=torch.float64)
        n_pairs = torch.ones(6, dtype=torch.float64)
        if name == "2d":
            both = zip(args["chosen_mask"].tolist(), args["rejected_mask"].tolist(), strict=True)
            n_pairs = torch.tensor([min(sum(w), sum(r)) for w, r in both])
            assert n_pairs.unique().numel() > 1                     # pairs with different N in one batch
        close(call(name, args), LOG2 * n_pairs.double(), 1e-13)


# ---------------------------------------------------------------------------------------------------------
# Segment rewards and the selection


def test_segment_rewards_by_hand():
    """r_k = W r~_k: each segment's aspect scores, weighted and summed."""
    scores = f64([[1.0, 0.5], [0.0, 1.0], [0.2, 0.2]], [[0.4, 0.0], [0.0, 0.0], [1.0, 0.6]])  # (2, 3, 2)
    weights = f64(0.75, 0.25)
    rewards = losses.segment_rewards(scores, weights)
    # 0.75 * 1 + 0.25 * 0.5 = 0.875, 0.25, 0.75 * 0.2 + 0.25 * 0.2 = 0.2; 0.3, 0, 0.75 + 0.15 = 0.9
    close(rewards, [[0.875, 0.25, 0.2], [0.3, 0.0, 0.9]], 1e-12)
    close(torch.autograd.grad(rewards.sum(), scores)[0], [[[0.75, 0.25]] * 3] * 2, 1e-12)
    assert torch.autograd.gradcheck(lambda a, b: losses.segment_rewards(a, b), (scores, weights))
    close(losses.segment_rewards(scores[0, 0], weights), 0.875, 1e-12)  # one segment alone


def test_one_hot_weights_leave_one_aspect_alone():
    scores = torch.rand(2, 3, 5, generator=rng(32), dtype=torch.float64)
    for a, one_hot in enumerate(torch.eye(5, dtype=torch.float64)):
        assert torch.equal(losses.segment_rewards(scores, one_hot), scores[:, :, a])


def test_equal_weights_are_the_mean_over_aspects():
    """W uniform: segments only, one dimension of the two. One segment: aspects only, the other one."""
    scores = torch.rand(2, 3, 5, generator=rng(33), dtype=torch.float64)
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    close(losses.segment_rewards(scores, weights), scores.mean(2), 1e-12)
    close(losses.segment_rewards(scores[:, :1], weights), scores[:, :1].mean(2), 1e-12)


def test_the_kth_best_chosen_segment_meets_the_kth_worst_rejected_one():
    """By hand, S_w = 4 against S_l = 3, masks on both sides, a different N in each pair of the batch."""
    chosen = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.1, 0.9, 0.5, 0.7], [0.1, 0.9, 0.5, 0.7]])
    rejected = torch.tensor([[0.6, 0.2, 0.8], [0.6, 0.2, 0.8], [0.6, 0.2, 0.8]])
    i_w, i_l, paired = losses.select_segments(
        chosen, rejected, yes([1, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1]), yes([1, 1, 1], [1, 1, 1], [1, 0, 0]))
    assert i_w.shape == i_l.shape == paired.shape == (3, 3)         # K, the smaller S
    pairs = [[(w, r) for w, r, p in zip(*rows, strict=True) if p]
             for rows in zip(i_w.tolist(), i_l.tolist(), paired.tolist(), strict=True)]
    assert pairs[0] == [(1, 1), (3, 0), (2, 2)]                     # 0.9-0.2, 0.7-0.6, 0.5-0.8
    assert pairs[1] == [(2, 1), (0, 0)]                             # 0.9 and 0.7 are masked; N = 2
    assert pairs[2] == [(1, 0)]                                     # the worst two rejected are masked; N = 1
    assert paired.tolist() == [[True, True, True], [True, True, False], [True, False, False]]  # k < N
    assert paired.dtype == torch.bool


def test_selection_against_a_sort_in_plain_python():
    """Random rewards and masks: the same pairs as Python's sorted (stable), S_w below, at and above S_l."""
    generator = rng(34)
    for s_w, s_l in ((1, 1), (5, 5), (3, 7), (7, 3), (1, 6)):
        r_w = torch.randint(3, (8, s_w), generator=generator) / 2   # many ties
        r_l = torch.randint(3, (8, s_l), generator=generator) / 2
        m_w = torch.rand(8, s_w, generator=generator) < 0.7
        m_l = torch.rand(8, s_l, generator=generator) < 0.7
        i_w, i_l, paired = losses.select_segments(r_w, r_l, m_w, m_l)
        assert i_w.shape == i_l.shape == paired.shape == (8, min(s_w, s_l))
        for b in range(8):
            best = sorted((k for k in range(s_w) if m_w[b, k]), key=lambda k, b=b: -r_w[b, k].item())
            worst = sorted((k for k in range(s_l) if m_l[b, k]), key=lambda k, b=b: r_l[b, k].item())
            n = min(len(best), len(worst))
            assert paired[b].tolist() == [k < n for k in range(min(s_w, s_l))]
            assert i_w[b, :n].tolist() == best[:n]
            assert i_l[b, :n].tolist() == worst[:n]


def test_equal_rewards_keep_the_order_of_the_text():
    """More than 16 ties (below that an unstable sort looks stable), on both sides, float32 and float64."""
    everything = torch.ones(2, 40, dtype=torch.bool)
    for dtype in (torch.float32, torch.float64):
        same = torch.full((2, 40), 0.5, dtype=dtype)
        i_w, i_l, paired = losses.select_segments(same, same, everything, everything)
        assert i_w.tolist() == i_l.tolist() == [list(range(40))] * 2
        assert paired.all()
        two = (torch.arange(40) % 2).to(dtype).expand(2, 40)        # 0, 1, 0, 1, ...
        i_w, i_l, _ = losses.select_segments(two, two, everything, everything)
        odd, even = list(range(1, 40, 2)), list(range(0, 40, 2))
        assert i_w.tolist() == [odd + even] * 2
        assert i_l.tolist() == [even + odd] * 2
        # with every third segment masked, the others keep their order
        mask = (torch.arange(40) % 3 != 0).expand(2, 40)
        i_w, i_l, paired = losses.select_segments(same, same, mask, mask)
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


def test_unmasked_but_unselected_segments_get_exactly_no_gradient():
    """S_w = 3 against S_l = 1: one log-sigmoid; the other chosen segments neither count nor move."""
    args = random_args("2d", 35, pairs=1, s_w=3, s_l=1)
    args["chosen_mask"], args["rejected_mask"] = yes([1, 1, 1]), yes([1])
    args["chosen_rewards"] = f64([0.3, 0.2, 0.9])
    loss = call("2d", args)
    grad = gradients(loss, args)
    for n in ("chosen_logps", "ref_chosen_logps", "chosen_rewards"):
        assert (grad[n][0, :2] == 0).all() and grad[n][0, 2] != 0
    args["chosen_logps"] = args["chosen_logps"].detach() + torch.tensor([[100.0, -100.0, 0.0]])
    close(call("2d", args), loss, 1e-13)


# ---------------------------------------------------------------------------------------------------------
# Masks


def test_masked_segments_change_neither_value_nor_gradient_whatever_stands_in_them():
    """Padding with NaN, infinities or plain numbers equals deletion; its gradient is exactly 0, never NaN."""
    for name in ("2d-vanilla", "2d"):
        small = random_args(name, 36, pairs=4, s_w=2, s_l=3)
        for n in MASKS:
            small[n] = torch.ones_like(small[n])
        loss = call(name, small)
        grad = gradients(loss, small)
        for filling, front in itertools.product((math.nan, math.inf, -math.inf, 7.5), (True, False)):
            padded = {}
            for n, x in small.items():
                shape = (4, 2 if "chosen" in n else 3)          # padding differs between the sides
                pad = torch.zeros(shape, dtype=torch.bool) if n in MASKS else torch.full(shape, filling)
                parts = (pad.to(x.dtype), x.detach()) if front else (x.detach(), pad.to(x.dtype))
                padded[n] = torch.cat(parts, 1)
                if n not in MASKS:
                    padded[n].requires_grad_()
            long_loss = call(name, padded)
            close(long_loss, loss, 1e-13)
            long_grad = gradients(long_loss, padded)
            for n, expected in grad.items():
                real = padded["chosen_mask" if "chosen" in n else "rejected_mask"]
                close(long_grad[n][real].reshape(expected.shape), expected, 1e-13)
                assert (long_grad[n][~real] == 0).all(), (name, n, filling)


def test_the_mask_of_each_side_hides_that_side_only():
    """Hiding chosen segment k is the same as giving it reward 0 (vanilla); likewise for rejected."""
    args = random_args("2d-vanilla", 37)
    for n in MASKS:
        args[n] = torch.ones_like(args[n])
    for side, k in (("chosen", 1), ("rejected", 2)):
        mask = torch.ones_like(args[side + "_mask"])
        mask[:, k] = False
        zeroed = args[side + "_rewards"].detach().clone()
        zeroed[:, k] = 0.0
        hidden = call("2d-vanilla", args | {side + "_mask": mask})
        close(hidden, call("2d-vanilla", args | {side + "_rewards": zeroed}), 1e-13)
        assert ((hidden - call("2d-vanilla", args)).abs() > 1e-4).all()


def test_the_2d_losses_sum_over_the_last_dimension():
    """A single pair needs no batch dimension: arguments (S,), a loss without dimensions."""
    for name in ("2d", "2d-vanilla"):
        args = random_args(name, 47, pairs=1)
        alone = call(name, {n: x[0] for n, x in args.items()})
        assert alone.shape == ()
        close(alone, call(name, args)[0], 1e-13)


def test_a_pair_without_segments_costs_nothing_in_eq_6():
    """N = 0: an empty sum; the vanilla loss is log 2; both without gradient."""
    for name, expected in (("2d", 0.0), ("2d-vanilla", LOG2)):
        args = random_args(name, 38, pairs=1)
        for n in MASKS:
            args[n] = torch.zeros_like(args[n])
        loss = call(name, args)
        close(loss, [expected], 1e-13)
        assert all((g == 0).all() for g in gradients(loss, args).values())


# ---------------------------------------------------------------------------------------------------------
# Extreme values


def test_extreme_log_probabilities_give_finite_values_and_gradients():
    """A pair wrong by 10^4 nats costs -h, with gradient beta; one right by 10^4 nats costs nothing."""
    for dtype, (name, beta) in itertools.product(
            (torch.float32, torch.float64),
            (("dpo", 0.1), ("dpop", 0.3), ("tdpo1", 0.1), ("tdpo2", 0.1), ("2d-vanilla", 0.1), ("2d", 0.1))):
        for wrong in (True, False):
            shape = (1, 1) if name.startswith("2d") else (1,)
            low, high = (torch.full(shape, x, dtype=dtype) for x in (-2e4, -1e4))
            reference = torch.full(shape, -1e4, dtype=dtype)
            chosen, rejected = (low, high) if wrong else (high, low)
            args = arguments(LOGPS, chosen, rejected, reference, reference)
            args |= {n: torch.full(shape, 40.0, dtype=dtype) for n in KLS}
            args |= {n: torch.ones(shape, dtype=dtype) for n in REWARDS} | {n: yes([1]) for n in MASKS}
            args = {n: args[n].requires_grad_(n in LOGPS[:2]) for n in LOSSES[name][1]}
            loss = call(name, args, beta=beta)
            grad = gradients(loss, args)
            times = 6.0 if name == "dpop" and wrong else 1.0        # 1 + lam
            close(loss, [beta * 1e4 * times if wrong else 0.0], 1e-5)
            close(grad["chosen_logps"].flatten(), [-beta * times if wrong else 0.0], 1e-5)
            close(grad["rejected_logps"].flatten(), [beta if wrong else 0.0], 1e-5)


def test_extreme_sequential_kls_are_finite():
    """KLs of 10^4 nats: TDPO's loss is linear in them, in float32 too."""
    for dtype in (torch.float32, torch.float64):
        zero = torch.zeros(1, dtype=dtype)
        far = torch.full((1,), 1e4, dtype=dtype, requires_grad=True)
        args = dict.fromkeys(LOGPS, zero) | {"chosen_seq_kl": zero, "rejected_seq_kl": far}
        for name, hyper, expected in (("tdpo1", {}, 1e3), ("tdpo2", {"alpha": 0.5}, 500.0)):
            loss = call(name, args, beta=0.1, **hyper)              # h = -0.1 * 1e4 (times alpha)
            close(loss, [expected], 1e-6)
            close(torch.autograd.grad(loss.sum(), far)[0], [expected / 1e4], 1e-6)


def test_a_nan_that_counts_is_not_hidden():
    """A NaN in an unmasked argument comes out as NaN, in its own pair only."""
    for name in LOSSES:
        for n in LOSSES[name][1]:
            if n in MASKS or (name == "2d" and n in REWARDS):       # a NaN has no place in an order
                continue
            args = {n: x.detach() for n, x in random_args(name, 46).items()}
            args[n] = args[n].clone()
            args[n][1, ...] = math.nan
            assert call(name, args).isnan().tolist() == [False, True, False, False, False, False], (name, n)
    z = torch.tensor([[0.0, math.nan], [0.0, 1.0]])
    assert losses.token_logps(z, torch.tensor([0, 1])).isnan().tolist() == [True, False]
    assert losses.token_kl(z, z[[1, 1]]).isnan().tolist() == [True, False]
    assert losses.token_kl(z[[1, 1]], z).isnan().tolist() == [True, False]
    assert losses.segment_sum(z[0], torch.tensor([0, 1]), 2).isnan().tolist() == [False, True]
    assert losses.segment_rewards(z, torch.tensor([0.5, 0.5])).isnan().tolist() == [True, False]
    assert losses.at_least_float32(z).isnan().tolist() == [[False, True], [False, False]]


# ---------------------------------------------------------------------------------------------------------
# The interface


def test_signatures_are_exactly_those_of_the_design():
    """Names and order of the arguments; hyper-parameters keyword-only, and nothing has a default."""
    expected = {
        "at_least_float32": ("x",),
        "token_logps": ("logits", "targets"),
        "token_kl": ("ref_logits", "logits"),
        "segment_sum": ("values", "segment", "num"),
        "segment_rewards": ("scores", "aspect_weights"),
        "select_segments": REWARDS + MASKS,
    } | {function: names for function, names, _ in LOSSES.values()}
    keyword_only = {"dpo_loss": ("beta",), "dpop_loss": ("beta", "lam"), "tdpo1_loss": ("beta",),
                    "tdpo2_loss": ("beta", "alpha"), "dpo2d_vanilla_loss": ("beta",), "dpo2d_loss": ("beta",)}
    for name, positional in expected.items():
        parameters = inspect.signature(getattr(losses, name)).parameters.values()
        assert all(p.default is p.empty for p in parameters), name
        kinds = [(p.name, p.kind) for p in parameters]
        expected_kinds = [(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in positional]
        expected_kinds += [(n, inspect.Parameter.KEYWORD_ONLY) for n in keyword_only.get(name, ())]
        assert kinds == expected_kinds, name


def test_hyper_parameters_must_be_named():
    """A loss neither guesses a hyper-parameter nor takes it by position."""
    for name, (function, names, hyper) in LOSSES.items():
        args = random_args(name, 39)
        positional = [args[n] for n in names]
        if hyper:
            raises(TypeError, getattr(losses, function), *positional)
            raises(TypeError, getattr(losses, function), *positional, *hyper.values())


def test_every_loss_returns_one_number_per_pair():
    """(B,), for one pair and for several; never a mean, never a tuple."""
    for name, pairs in itertools.product(LOSSES, (1, 2, 5)):
        loss = call(name, random_args(name, 40, pairs=pairs))
        assert isinstance(loss, torch.Tensor) and loss.shape == (pairs,), name


def test_arguments_are_left_as_they_were():
    """Pure functions: no argument changes, and a second call gives the same bits."""
    for name in LOSSES:
        args = {n: x.detach() for n, x in random_args(name, 41).items()}
        before = {n: x.clone() for n, x in args.items()}
        first = call(name, args)
        assert torch.equal(first, call(name, args)), name
        first.add_(1.0)                                             # shares no memory with them
        assert all(torch.equal(args[n], before[n]) for n in args), name
    z, z_ref = (torch.randn(3, 4, generator=rng(s), dtype=torch.float64) for s in (42, 43))
    y, segment = torch.tensor([1, 0, 3]), torch.tensor([1, 0, 1])
    r, mask = torch.rand(3, 4, generator=rng(44)), torch.rand(3, 4, generator=rng(45)) < 0.6
    for function, given in ((losses.token_logps, (z, y)), (losses.token_kl, (z_ref, z)),
                            (losses.segment_sum, (z[:, 0].contiguous(), segment, 2)),
                            (losses.segment_rewards, (z.unsqueeze(0), z[0].contiguous())),
                            (losses.select_segments, (r, r, mask, mask))):
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in tensors]
        function(*given)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True)), function.__name__


def test_results_live_on_the_device_of_the_arguments():
    """Nothing is created on a default device: shown on torch's meta device, which every machine has."""
    with torch.device("meta"):
        z, y = torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
        r, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert losses.token_logps(z, y).device.type == losses.token_kl(z, z).device.type == "meta"
    assert losses.segment_sum(z[:, 0], y, 2).device.type == "meta"
    assert all(x.device.type == "meta" for x in losses.select_segments(r, r, mask, mask))
    for function in (losses.dpo2d_vanilla_loss, losses.dpo2d_loss):
        assert function(r, r, r, r, r, r, mask, mask, beta=0.1).device.type == "meta"
