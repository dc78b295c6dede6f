"""The identities of the papers: on logits, through a real GPT, and on a world small enough to enumerate.

s = softmax(z) is the policy, q = softmax(z_ref) the reference, e the one-hot of the token that came; h is the
argument of log sigma and g = beta sigma(-h). What is expected is computed here from softmax, log and plain
sums, never by losses.py.
"""

import itertools
import math

import torch
import torch.nn.functional as F

import losses
from model import GPT, GPTConfig

HYPER = {
    "dpo": {"beta": 0.4}, "dpop": {"beta": 0.4, "lam": 3.0}, "tdpo1": {"beta": 0.4},
    "tdpo2": {"beta": 0.4, "alpha": 0.3}, "2d-vanilla": {"beta": 0.4}, "2d": {"beta": 0.4},
}
BETA, LAM, ALPHA = 0.4, 3.0, 0.3
V = 5                                                               # tokens in the vocabulary

# ---------------------------------------------------------------------------------------------------------
# Helpers: one pair, 4 chosen tokens in segments 0 0 1 1, 3 rejected tokens in segments 0 1 1


Y_W, Y_L = torch.tensor([3, 0, 2, 4]), torch.tensor([1, 1, 0])
SEGMENT_W, SEGMENT_L = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1])
R_W, R_L = torch.tensor([0.9, 0.4], dtype=torch.float64), torch.tensor([0.7, 0.2], dtype=torch.float64)


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot(y):
    return F.one_hot(y, V).double()


def softmax(z):
    """e^z / sum e^z, written out."""
    return z.detach().exp() / z.detach().exp().sum(-1, keepdim=True)


def log_pi(z, y):
    """log pi of each token, by a softmax written out; keeps the gradient."""
    return (z.exp() / z.exp().sum(-1, keepdim=True))[torch.arange(len(y)), y].log()


def logratio(z, q, y):
    """rho_t of each token, a number without gradient."""
    return (log_pi(z, y) - log_pi(q, y)).detach()


def kl(p, q):
    """KL(p || q) of probabilities, summed over everything."""
    return (p * (p / q).log()).sum()


def sigma(x):
    return 1.0 / (1.0 + math.exp(-float(x)))


def close(actual, expected, tolerance=1e-11):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance), (actual, expected)


def logit_pair(seed, healthy=None):
    """Logits of policy and reference for both responses; healthy: is the chosen one above the reference?"""
    z_w, z_l, q_w, q_l = randn(4, V, seed=seed), randn(3, V, seed=seed + 1), *randn(2, 4, V, seed=seed + 2)
    if healthy is not None:
        z_w = q_w + 0.3 * z_w + (1.5 if healthy else -1.5) * one_hot(Y_W)
    return z_w.requires_grad_(), z_l.requires_grad_(), q_w, q_l[:3]


def loss_of(name, z_w, z_l, q_w, q_l, y_w=Y_W, y_l=Y_L, segment_w=SEGMENT_W, segment_l=SEGMENT_L,
            r_w=R_W, r_l=R_L, **hyper):
    """From logits to the loss of one pair, by losses.py; a segment id beyond the rewards is no segment."""
    sides = ((z_w, q_w, y_w, segment_w, r_w), (z_l, q_l, y_l, segment_l, r_l))
    two_d = name.startswith("2d")
    logps, ref_logps, kls = [], [], []
    for z, q, y, segment, r in sides:
        ids, num = (segment, len(r) + 1) if two_d else (torch.zeros_like(y), 1)
        keep = len(r) if two_d else 1
        logps.append(losses.segment_sum(losses.token_logps(z, y), ids, num)[:keep])
        ref_logps.append(losses.segment_sum(losses.token_logps(q, y), ids, num)[:keep])
        kls.append(losses.segment_sum(losses.token_kl(q, z), torch.zeros_like(y), 1))
    hyper = HYPER[name] | hyper
    if not two_d:
        extra = kls if name.startswith("tdpo") else []
        return getattr(losses, name + "_loss")(*logps, *ref_logps, *extra, **hyper)[0]
    function = losses.dpo2d_loss if name == "2d" else losses.dpo2d_vanilla_loss
    masks = [torch.ones(1, len(r), dtype=torch.bool) for r in (r_w, r_l)]
    return function(*(x[None] for x in (*logps, *ref_logps, r_w, r_l)), *masks, **hyper)[0]


def paper_h(name, z_w, z_l, q_w, q_l):
    """h by hand: sums of logs of softmaxes, the forward KL as a sum over the vocabulary."""
    rho_w, rho_l = logratio(z_w, q_w, Y_W).sum(), logratio(z_l, q_l, Y_L).sum()
    k_w, k_l = kl(softmax(q_w), softmax(z_w)), kl(softmax(q_l), softmax(z_l))
    h = BETA * (rho_w - rho_l)
    if name == "dpop":
        h = h - BETA * LAM * max(0.0, -float(rho_w))
    if name.startswith("tdpo"):
        h = h - BETA * (ALPHA if name == "tdpo2" else 1.0) * (k_l - k_w)
    return float(h)


def logit_gradients(name, pair, **kwargs):
    return torch.autograd.grad(loss_of(name, *pair, **kwargs), pair[:2])


def e_minus_s(z, y):
    """d log pi(y) / d z."""
    return one_hot(y) - softmax(z)


# ---------------------------------------------------------------------------------------------------------
# On logits


def test_value_of_every_loss_is_its_equation():
    """From raw logits to the number: -log sigma(h), with h summed up by hand."""
    for name, seed in itertools.product(("dpo", "dpop", "tdpo1", "tdpo2"), (1, 11, 21)):
        for healthy in (True, False, None):
            pair = logit_pair(seed, healthy)
            close(loss_of(name, *pair), -math.log(sigma(paper_h(name, *pair))))


def test_dpo_logit_gradient_is_g_times_s_minus_e():
    """Chosen tokens -g(e - s), rejected tokens +g(e - s)."""
    pair = z_w, z_l, _, _ = logit_pair(1)
    g = BETA * sigma(-paper_h("dpo", *pair))
    grad_w, grad_l = logit_gradients("dpo", pair)
    close(grad_w, -g * e_minus_s(z_w, Y_W))
    close(grad_l, g * e_minus_s(z_l, Y_L))


def test_dpop_logit_gradient_has_1_plus_lam_below_the_reference():
    """Chosen -g(1 + lam)(e - s) on an unhealthy pair, -g(e - s) on a healthy one; rejected +g(e - s)."""
    for healthy, factor in ((True, 1.0), (False, 1.0 + LAM)):
        pair = z_w, z_l, _, _ = logit_pair(2, healthy)
        g = BETA * sigma(-paper_h("dpop", *pair))
        grad_w, grad_l = logit_gradients("dpop", pair)
        close(grad_w, -g * factor * e_minus_s(z_w, Y_W))
        close(grad_l, g * e_minus_s(z_l, Y_L))


def test_dpop_hinge_is_on_the_sequence_not_on_each_token():
    """A chosen response above the reference as a whole, one token below it: DPO's gradient everywhere."""
    z_w, z_l, q_w, q_l = logit_pair(3, True)
    z_w = (z_w.detach() - 3.0 * one_hot(Y_W) * torch.tensor([[0.0], [1.0], [0.0], [0.0]])).requires_grad_()
    rho = logratio(z_w, q_w, Y_W)
    assert rho[1] < -0.5 and rho.sum() > 0.5
    pair = z_w, z_l, q_w, q_l
    for a, b in zip(logit_gradients("dpop", pair), logit_gradients("dpo", pair), strict=True):
        close(a, b)


def test_tdpo1_logit_gradient_holds_the_reference_not_the_policy():
    """Chosen -g(e - q), rejected +g(e - q): the policy's softmax cancels between log pi and forward KL."""
    pair = z_w, z_l, q_w, q_l = logit_pair(4)
    g = BETA * sigma(-paper_h("tdpo1", *pair))
    grad_w, grad_l = logit_gradients("tdpo1", pair)
    close(grad_w, -g * (one_hot(Y_W) - softmax(q_w)))
    close(grad_l, g * (one_hot(Y_L) - softmax(q_l)))


def test_tdpo1_reward_is_linear_in_the_logits():
    """rho_t + K_t = (z_y - sum_v q_v z_v) - (log q_y + H(q)), the reason for the cancellation."""
    z_w, _, q_w, _ = logit_pair(5)
    q = softmax(q_w)
    left = losses.token_logps(z_w, Y_W) - losses.token_logps(q_w, Y_W) + losses.token_kl(q_w, z_w)
    entropy = -(q * q.log()).sum(-1)
    taken = torch.arange(4), Y_W
    close(left, (z_w[taken] - (q * z_w).sum(-1)) - (q[taken].log() + entropy))


def test_tdpo2_logit_gradient_mixes_policy_and_reference_on_the_rejected_side():
    """Chosen -g(e - s), as DPO's: sg. Rejected +g(e - (1 - alpha) s - alpha q)."""
    pair = z_w, z_l, q_w, q_l = logit_pair(6)
    g = BETA * sigma(-paper_h("tdpo2", *pair))
    grad_w, grad_l = logit_gradients("tdpo2", pair)
    close(grad_w, -g * e_minus_s(z_w, Y_W))
    close(grad_l, g * (one_hot(Y_L) - (1 - ALPHA) * softmax(z_l) - ALPHA * softmax(q_l)))


def test_tdpo2_at_alpha_1_differs_from_tdpo1_on_chosen_logits_by_g_times_s_minus_q():
    """The value and the rejected gradients are TDPO1's; on chosen logits TDPO2 lacks K_w's -g(s - q)."""
    pair = z_w, _, q_w, _ = logit_pair(7)
    close(loss_of("tdpo2", *pair, alpha=1.0), loss_of("tdpo1", *pair))
    one, two = logit_gradients("tdpo1", pair), logit_gradients("tdpo2", pair, alpha=1.0)
    close(two[1], one[1])
    g = BETA * sigma(-paper_h("tdpo1", *pair))
    close(two[0] - one[0], g * (softmax(z_w) - softmax(q_w)))


def test_2d_vanilla_logit_gradient_is_dpos_times_the_segments_reward():
    """Chosen -g r_k (e - s), rejected +g r_k (e - s); a token in no segment gets exactly 0."""
    pair = z_w, z_l, q_w, q_l = logit_pair(8)
    none = torch.tensor([0, 2, 1, 1])                               # the second chosen token is in no segment
    for segment_w, weight_w in ((SEGMENT_W, [0.9, 0.9, 0.4, 0.4]), (none, [0.9, 0.0, 0.4, 0.4])):
        weight_w, weight_l = (torch.tensor(x, dtype=torch.float64) for x in (weight_w, [0.7, 0.2, 0.2]))
        rho_w, rho_l = logratio(z_w, q_w, Y_W), logratio(z_l, q_l, Y_L)
        h = BETA * float((weight_w * rho_w).sum() - (weight_l * rho_l).sum())
        close(loss_of("2d-vanilla", *pair, segment_w=segment_w), -math.log(sigma(h)))
        g = BETA * sigma(-h)
        grad_w, grad_l = logit_gradients("2d-vanilla", pair, segment_w=segment_w)
        close(grad_w, -g * weight_w[:, None] * e_minus_s(z_w, Y_W))
        close(grad_l, g * weight_l[:, None] * e_minus_s(z_l, Y_L))
        assert (grad_w[weight_w == 0] == 0).all()


def test_2d_group_logit_gradient_has_a_g_for_each_pair_of_segments():
    """Best chosen (0.9) with worst rejected (0.2), then 0.4 with 0.7: -g_k r_k (e - s), +g_k r_k (e - s)."""
    pair = z_w, z_l, q_w, q_l = logit_pair(9)
    rho_w, rho_l = logratio(z_w, q_w, Y_W), logratio(z_l, q_l, Y_L)
    h = [BETA * float(0.9 * rho_w[:2].sum() - 0.2 * rho_l[1:].sum()),
         BETA * float(0.4 * rho_w[2:].sum() - 0.7 * rho_l[:1].sum())]
    close(loss_of("2d", *pair), -math.log(sigma(h[0])) - math.log(sigma(h[1])))
    g = [BETA * sigma(-x) for x in h]
    grad_w, grad_l = logit_gradients("2d", pair)
    factor_w = torch.tensor([g[0] * 0.9] * 2 + [g[1] * 0.4] * 2, dtype=torch.float64)
    factor_l = torch.tensor([g[1] * 0.7, g[0] * 0.2, g[0] * 0.2], dtype=torch.float64)
    close(grad_w, -factor_w[:, None] * e_minus_s(z_w, Y_W))
    close(grad_l, factor_l[:, None] * e_minus_s(z_l, Y_L))


def test_2d_group_tokens_of_an_unselected_segment_have_exactly_no_gradient():
    """Two chosen segments against one rejected: the lower-scored chosen one (0.4) is left out."""
    pair = logit_pair(10)
    grad_w, grad_l = logit_gradients("2d", pair, segment_l=torch.zeros_like(Y_L), r_l=R_L[:1])
    assert (grad_w[2:] == 0).all() and (grad_w[:2] != 0).all() and (grad_l != 0).all()


def test_a_constant_added_to_the_logits_of_a_position_changes_no_loss():
    """Softmax does not see it, on either model, at any position."""
    for name in HYPER:
        pair = logit_pair(11, False)
        moved = [x + 20.0 * randn(len(x), 1, seed=12 + i) for i, x in enumerate(pair)]
        close(loss_of(name, *moved), loss_of(name, *pair))


def test_the_logit_gradient_of_each_position_sums_to_zero():
    """sum_v dL/dz_v = 0: the differential form of the invariance above."""
    for name, healthy in itertools.product(HYPER, (True, False)):
        for grad in logit_gradients(name, logit_pair(13, healthy)):
            assert grad.abs().max() > 1e-3
            assert grad.sum(-1).abs().max() < 1e-14, name


def at_the_reference(seed):
    _, _, q_w, q_l = logit_pair(seed)
    return q_w.clone().requires_grad_(), q_l.clone().requires_grad_(), q_w, q_l


def test_at_the_reference_every_loss_is_log_2_and_2d_group_is_n_log_2():
    """theta = ref: every log-ratio and every KL is 0."""
    for name in HYPER:
        close(loss_of(name, *at_the_reference(14)), math.log(2) * (2 if name == "2d" else 1), 1e-15)


def test_at_the_reference_every_loss_has_dpos_gradient():
    """DPOP as relu'(0) = 0, TDPO as KL's gradient is 0 at its minimum, 2D if r = 1 and all are paired."""
    pair = at_the_reference(15)
    ones = torch.ones(2, dtype=torch.float64)
    dpo = logit_gradients("dpo", pair)
    close(dpo[0], -BETA / 2 * e_minus_s(pair[0], Y_W))              # g = beta sigma(0)
    for name in HYPER:
        for a, b in zip(logit_gradients(name, pair, r_w=ones, r_l=ones), dpo, strict=True):
            close(a, b)
    # with rewards other than 1 the 2D gradients differ
    for name in ("2d-vanilla", "2d"):
        assert (logit_gradients(name, pair)[0] - dpo[0]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------
# On sequence log-probabilities: shifts and swaps


def numbers(*values):
    return [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in values]


def test_dpo_and_tdpo_see_only_the_difference_of_the_log_ratios_dpop_sees_more():
    """rho_w, rho_l += c: DPO, TDPO1, TDPO2 unchanged; DPOP changes as soon as rho_w < 0."""
    for c in (-3.0, 0.7, 3.0):
        before, after = numbers(-9.0, -8.0, -10.0, -8.5), numbers(-9.0 + c, -8.0 + c, -10.0, -8.5)
        kls = numbers(0.6, 1.1)
        close(losses.dpo_loss(*after, beta=BETA), losses.dpo_loss(*before, beta=BETA))
        close(losses.tdpo1_loss(*after, *kls, beta=BETA), losses.tdpo1_loss(*before, *kls, beta=BETA))
        close(losses.tdpo2_loss(*after, *kls, beta=BETA, alpha=ALPHA),
              losses.tdpo2_loss(*before, *kls, beta=BETA, alpha=ALPHA))
        moved = losses.dpop_loss(*after, beta=BETA, lam=LAM) - losses.dpop_loss(*before, beta=BETA, lam=LAM)
        assert moved.abs() > 0.1 if c < -1 else moved.abs() < 1e-12  # rho_w = 1 + c


def swapped(x):
    """Chosen and rejected exchanged in (w, l, ref_w, ref_l[, K_w, K_l])."""
    return [x[i ^ 1] for i in range(len(x))]


def swap_difference(function, args, **hyper):
    """L(w, l) - L(l, w), and its gradient."""
    difference = function(*args, **hyper) - function(*swapped(args), **hyper)
    return difference, torch.autograd.grad(difference, args)


def test_swapping_chosen_and_rejected_costs_minus_h():
    """L(w, l) - L(l, w) = -h, since log sigma(h) - log sigma(-h) = h: DPO and TDPO1, value and gradient."""
    args, kls = numbers(-9.0, -8.0, -10.0, -8.5), numbers(0.6, 1.1)
    # rho_w = 1, rho_l = 0.5: h = 0.4 * 0.5 = 0.2; TDPO1: h = 0.2 - 0.4 * (1.1 - 0.6) = 0
    difference, grad = swap_difference(losses.dpo_loss, args, beta=BETA)
    close(difference, [-0.2])
    close(torch.cat(grad), [-BETA, BETA, BETA, -BETA])
    difference, grad = swap_difference(losses.tdpo1_loss, args + numbers(0.6, 0.9), beta=BETA)
    close(difference, [-(0.2 - 0.4 * 0.3)])
    close(torch.cat(grad), [-BETA, BETA, BETA, -BETA, -BETA, BETA])
    # TDPO2: the value follows, the gradient cannot: the stop-gradient stays with the chosen side
    difference, grad = swap_difference(losses.tdpo2_loss, args + kls, beta=BETA, alpha=ALPHA)
    h = 0.2 - 0.3 * 0.4 * 0.5
    close(difference, [-h])
    close(torch.cat(grad[:4]), [-BETA, BETA, BETA, -BETA])
    # each KL has one of the two halves of -+ alpha beta, the other half is stopped
    close(torch.cat(grad[4:]), [-ALPHA * BETA * sigma(h), ALPHA * BETA * sigma(-h)])


def test_swapping_is_no_identity_for_dpop_once_a_hinge_is_active():
    """Each order has its own hinge: L - L' = -h needs rho_w >= 0 and rho_l >= 0."""
    above, below = numbers(-9.0, -8.0, -10.0, -8.5), numbers(-9.0, -9.5, -10.0, -8.5)  # rho_l = 0.5 and -1
    close(swap_difference(losses.dpop_loss, above, beta=BETA, lam=LAM)[0], [-BETA * 0.5])
    # h = 0.4 (1 + 1) = 0.8; swapped: 0.4 (-1 - 1 - 3 * 1) = -2.0
    expected = -math.log(sigma(0.8)) + math.log(sigma(-2.0))
    difference = swap_difference(losses.dpop_loss, below, beta=BETA, lam=LAM)[0]
    close(difference, [expected])
    assert abs(expected + 0.8) > 0.1


def test_swapping_with_the_rewards_is_an_identity_for_2d_vanilla_but_not_for_every_group():
    """Vanilla: L - L' = -h with the rewards swapped too. Group: -sum h_k if S_w = S_l, otherwise not.

    With S_w = S_l and no ties the k-th best against the k-th worst pairs the same segments from either side.
    """
    logps = [x[None] for x in (-3.0 * randn(4, 2, seed=16).abs())]
    mask, one = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    r = [R_W[None], R_L[None]]                                      # (0.9, 0.4), (0.7, 0.2)
    rho_w, rho_l = logps[0] - logps[2], logps[1] - logps[3]
    h = BETA * float((R_W * rho_w).sum() - (R_L * rho_l).sum())     # vanilla's h, and the group's sum of h_k
    for function in (losses.dpo2d_vanilla_loss, losses.dpo2d_loss):
        both = [function(*logps, *r, mask, mask, beta=BETA),
                function(*swapped(logps), *swapped(r), mask, mask, beta=BETA)]
        close(both[0] - both[1], [-h])
    # not swapping the rewards breaks it
    unswapped = losses.dpo2d_vanilla_loss(*swapped(logps), *r, mask, mask, beta=BETA)
    assert (losses.dpo2d_vanilla_loss(*logps, *r, mask, mask, beta=BETA) - unswapped + h).abs() > 1e-3
    # two chosen segments against one rejected: the best of the two here (0.9), the worst of them there (0.4)
    short = [x[:, :1] if i % 2 else x for i, x in enumerate(logps + r)]
    forth = losses.dpo2d_loss(*short, mask, one, beta=BETA)
    back = losses.dpo2d_loss(*swapped(short), one, mask, beta=BETA)
    h = [BETA * float(weight * rho_w[0, k] - 0.7 * rho_l[0, 0]) for k, weight in ((0, 0.9), (1, 0.4))]
    close(forth - back, [-math.log(sigma(h[0])) + math.log(sigma(-h[1]))])
    assert abs(float(forth - back) + h[0]) > 1e-2


# ---------------------------------------------------------------------------------------------------------
# A prefix that both responses share: the same tokens in the same context, hence the same logits


def prefix_gradient(name, healthy, **kwargs):
    """dL / d (logits of the shared prefix), two tokens long, with what the formulas need: g, s, q, e."""
    z, q, y = randn(2, V, seed=17), randn(2, V, seed=18), torch.tensor([2, 0])
    z.requires_grad_()
    z_w, z_l, q_w, q_l = logit_pair(19, healthy)
    joined = [torch.cat(x) for x in ((z, z_w), (z, z_l), (q, q_w), (q, q_l))]
    both = {"y_w": torch.cat((y, Y_W)), "y_l": torch.cat((y, Y_L))}
    if name.startswith("2d"):
        both |= {"segment_w": torch.tensor([0, 0, 1, 1, 1, 1]), "segment_l": torch.tensor([0, 0, 1, 1, 1])}
    loss = loss_of(name, *joined, **(both | kwargs))
    grad = torch.autograd.grad(loss, z)[0]
    g = BETA * (1.0 - math.exp(-float(loss.detach())))                       # sigma(-h) = 1 - e^-L
    return grad, g, softmax(z), softmax(q), one_hot(y)


def test_dpo_leaves_a_shared_prefix_alone():
    """-g(e - s) from the chosen side and +g(e - s) from the rejected side cancel exactly."""
    for healthy in (True, False):
        grad, *_ = prefix_gradient("dpo", healthy)
        assert grad.abs().max() < 1e-15


def test_dpop_raises_a_shared_prefix_below_the_reference():
    """-g lam (e - s) when the hinge is active, 0 when it is not."""
    grad, *_ = prefix_gradient("dpop", True)
    assert grad.abs().max() < 1e-15
    grad, g, s, _, e = prefix_gradient("dpop", False)
    close(grad, -g * LAM * (e - s))
    assert (grad[e == 1] < 0).all()                                 # descent raises the prefix's own tokens


def test_tdpo1_leaves_a_shared_prefix_alone_and_tdpo2_pulls_it_to_the_reference():
    """TDPO1 0. TDPO2 +g alpha (s - q): the rejected KL's gradient, whose counterpart sg has stopped."""
    grad, *_ = prefix_gradient("tdpo1", None)
    assert grad.abs().max() < 1e-15
    grad, g, s, q, _ = prefix_gradient("tdpo2", None)
    close(grad, g * ALPHA * (s - q))
    assert grad.abs().max() > 1e-3


def test_2d_leaves_a_shared_prefix_alone_only_if_it_scores_the_same_on_both_sides():
    """Vanilla -g(r_w - r_l)(e - s), 0 if equal. Group: no identity, even with equal rewards."""
    grad, g, s, _, e = prefix_gradient("2d-vanilla", None)
    close(grad, -g * (0.9 - 0.7) * (e - s))
    # 0.6 for the prefix on both sides; Eq. 6 pairs the prefixes' segments with the other side's second ones
    equal = {"r_w": torch.tensor([0.6, 0.9], dtype=torch.float64),
             "r_l": torch.tensor([0.6, 0.8], dtype=torch.float64)}
    grad, *_ = prefix_gradient("2d-vanilla", None, **equal)
    assert grad.abs().max() < 1e-15
    grad, *_ = prefix_gradient("2d", None, **equal)
    assert grad.abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------
# DPOP's section 3: why DPO can lower the chosen response. One token differs; the tokens after it are the
# same, in two contexts that share a parameter: a bias b added to the logits of both


def edited_pair():
    """(y_w, y_l, logits), token 1 of 4 differs; the policy is surer of the rest after the right token."""
    y_w, y_l = torch.tensor([3, 0, 2, 4]), torch.tensor([3, 1, 2, 4])
    first = randn(2, V, seed=20)                                    # tokens 0 and 1: the same context
    after_w = randn(2, V, seed=21) + 2.0 * one_hot(y_w[2:])
    after_l = randn(2, V, seed=22)
    return y_w, y_l, torch.cat((first, after_w)), torch.cat((first, after_l))


def bias_gradient(name, reference_shift):
    """-(1/g) dL/db_j at the two later positions k, one bias per position: (2, V); and s_w, s_l there."""
    y_w, y_l, z_w, z_l = edited_pair()
    b = torch.zeros(2, V, dtype=torch.float64, requires_grad=True)
    pad = torch.zeros(2, V, dtype=torch.float64)
    q_w = z_w + reference_shift * one_hot(y_w)                      # the reference, above the policy or below
    shared = torch.cat((pad, b))
    loss = loss_of(name, z_w + shared, z_l + shared, q_w, z_l, y_w=y_w, y_l=y_l)
    g = BETA * (1.0 - math.exp(-float(loss.detach())))
    return -torch.autograd.grad(loss, b)[0] / g, softmax(z_w)[2:], softmax(z_l)[2:], one_hot(y_w[2:])


def test_dpop_paper_eq_2_dpo_moves_a_shared_bias_by_s_l_minus_s_w():
    """d/db_j [log pi(t_k|y_w) - log pi(t_k|y_l)] = s_j^l - s_j^w: the token that follows is lowered."""
    ascent, s_w, s_l, e = bias_gradient("dpo", 1.0)
    close(ascent, s_l - s_w)
    assert (s_w[e == 1] > s_l[e == 1]).all()                        # the policy is surer in y_w's context
    assert (ascent[e == 1] < 0).all()                               # the failure: the right token falls


def test_dpop_paper_per_token_formula_with_lam():
    """Hinge active: lam (1 - s_j^w) + s_j^l - s_j^w for j = t_k, -(lam + 1) s_j^w + s_j^l for the others."""
    ascent, s_w, s_l, e = bias_gradient("dpop", 1.0)
    formula = torch.where(e == 1, LAM * (1 - s_w) + s_l - s_w, -(LAM + 1) * s_w + s_l)
    close(ascent, formula)
    assert (ascent[e == 1] > 0).all()                               # the right token rises again
    close(bias_gradient("dpop", -1.0)[0], s_l - s_w)                # hinge inactive: DPO's


def test_with_separate_logits_per_context_dpo_always_raises_the_chosen_token():
    """The failure needs shared parameters: alone, the chosen token's logit gradient -g(1 - s) is negative."""
    for seed in range(10):
        pair = logit_pair(30 + 5 * seed)
        assert (logit_gradients("dpo", pair)[0][one_hot(Y_W) == 1] < 0).all()


# ---------------------------------------------------------------------------------------------------------
# Through a real GPT: d loss / d (all parameters) = the paper's expression, put together from one backward
# pass each of log pi(y_w|x), log pi(y_l|x), K_w and K_l

PROMPT = [7, 2, 9]
RESPONSES = [[4, 4, 1, 8, 0], [5, 1, 0]]                            # 0 is end-of-text
SEGMENTS = [[0, 0, 1, 1, 1], [0, 1, 1]]
PAD = 10
WIDTH = 8


def gpt(seed):
    """Two layers, float64, with weights large enough for probabilities far from uniform."""
    model = GPT(GPTConfig(vocab_size=11, block_size=WIDTH, n_layer=2, n_head=2, n_embd=8)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def rows():
    """Prompt + response + padding of both responses (2, T), and where each response token is predicted."""
    tokens = torch.full((2, WIDTH), PAD)
    predicted = []
    for i, response in enumerate(RESPONSES):
        row = PROMPT + response
        tokens[i, :len(row)] = torch.tensor(row)
        predicted.append(torch.arange(len(PROMPT) - 1, len(row) - 1))
    return tokens, predicted


def flat_gradient(value, model):
    grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([x.flatten() for x in grads])


def through_gpt(order):
    """One pair through policy and reference; order (0, 1) or (1, 0) says which row is the chosen one."""
    policy, reference = gpt(1), gpt(2)
    tokens, predicted = rows()
    z_all = policy.logits(policy(tokens))                           # (2, T, V)
    q_all = reference.logits(reference(tokens)).detach()
    z, q = ([x[i, predicted[i]] for i in order] for x in (z_all, q_all))
    y, segments = ([torch.tensor(x[i]) for i in order] for x in (RESPONSES, SEGMENTS))
    return policy, z_all, z, q, y, segments


def test_through_a_gpt_the_parameter_gradient_is_the_papers_expression():
    """-g grad log pi(y_w) + g grad log pi(y_l), with 1 + lam, -+ g grad K, r_k by segment: to 1e-10."""
    hinge_active = []
    for order in ((0, 1), (1, 0)):
        policy, _, z, q, y, segments = through_gpt(order)
        logps = [log_pi(a, b) for a, b in zip(z, y, strict=True)]
        rho = [logratio(*x) for x in zip(z, q, y, strict=True)]
        u = BETA * float(rho[0].sum() - rho[1].sum())
        kls = []
        for a, b in zip(z, q, strict=True):
            ref = softmax(b)
            kls.append((ref * (ref.log() - a + a.exp().sum(-1, keepdim=True).log())).sum())
        k_w, k_l = (float(x.detach()) for x in kls)
        up, down = (flat_gradient(x.sum(), policy) for x in logps)  # grad log pi(y_w|x), grad log pi(y_l|x)
        kl_w, kl_l = (flat_gradient(x, policy) for x in kls)
        active = float(rho[0].sum() < 0)
        hinge_active.append(active)
        # segments, both responses: 0 and 1
        r = [[0.9, 0.4], [0.7, 0.2]]
        part = [[flat_gradient(logps[i][segments[i] == k].sum(), policy) for k in (0, 1)] for i in (0, 1)]
        weighted = [[r[i][k] * float(rho[i][segments[i] == k].sum()) for k in (0, 1)] for i in (0, 1)]

        def g(h):
            return BETA * sigma(-h)

        g_vanilla = g(BETA * (sum(weighted[0]) - sum(weighted[1])))
        g_group = [g(BETA * (weighted[0][0] - weighted[1][1])), g(BETA * (weighted[0][1] - weighted[1][0]))]
        g_dpop = g(u + BETA * LAM * active * float(rho[0].sum()))
        g_tdpo1, g_tdpo2 = g(u - BETA * (k_l - k_w)), g(u - ALPHA * BETA * (k_l - k_w))
        expected = {
            "dpo": -g(u) * (up - down),
            "dpop": -g_dpop * ((1 + LAM * active) * up - down),
            "tdpo1": -g_tdpo1 * (up - down + kl_w - kl_l),
            "tdpo2": -g_tdpo2 * (up - down - ALPHA * kl_l),
            "2d-vanilla": -g_vanilla * (0.9 * part[0][0] + 0.4 * part[0][1]
                                        - 0.7 * part[1][0] - 0.2 * part[1][1]),
            "2d": -g_group[0] * (0.9 * part[0][0] - 0.2 * part[1][1])
                  - g_group[1] * (0.4 * part[0][1] - 0.7 * part[1][0]),
        }
        for name, paper in expected.items():
            loss = loss_of(name, *z, *q, *y, *segments)
            autograd = flat_gradient(loss, policy)
            assert (autograd - paper).norm() < 1e-10 * paper.norm(), (name, order)
            assert paper.norm() > 1e-3
    assert sorted(hinge_active) == [0.0, 1.0]                       # one pair of each kind was seen


def test_through_a_gpt_prompt_and_padding_positions_have_exactly_no_gradient():
    """Only logits that predict a response token move: last prompt token to the one before the end."""
    for name in HYPER:
        _, z_all, z, q, y, segments = through_gpt((0, 1))
        grad = torch.autograd.grad(loss_of(name, *z, *q, *y, *segments), z_all)[0]
        moved = (grad != 0).any(-1).tolist()                        # (2, T)
        # prompt 7 2 9: the 9 predicts the first token; end-of-text and padding predict nothing that is scored
        assert moved[0] == [False, False, True, True, True, True, True, False], name
        assert moved[1] == [False, False, True, True, True, False, False, False], name


def test_through_a_gpt_the_padding_token_is_irrelevant():
    """Another token in the padding: the same loss, by causal attention and as no such position is scored."""
    policy = gpt(1)
    tokens, predicted = rows()
    other = torch.where(tokens == PAD, 3, tokens)
    values = []
    for t in (tokens, other):
        z = policy.logits(policy(t))
        z = [z[i, predicted[i]] for i in (0, 1)]
        q = [torch.zeros_like(x) for x in z]
        y = [torch.tensor(x) for x in RESPONSES + SEGMENTS]
        values.append(torch.stack([loss_of(name, *z, *q, *y).detach() for name in HYPER]))
    close(values[0], values[1], 1e-14)


# ---------------------------------------------------------------------------------------------------------
# Statistics, on a world that can be enumerated: responses of at most 3 of 4 tokens, token 0 ends one. A
# policy is a table of logits, a row for each of 13 contexts: it can be any distribution over the 40 responses

TOKENS, LONGEST = 4, 3


def enumerate_world():
    """All contexts, and all responses as tuples: they end with token 0, or at length 3."""
    contexts, responses = [], []

    def grow(prefix):
        contexts.append(prefix)
        for token in range(TOKENS):
            y = prefix + (token,)
            if token == 0 or len(y) == LONGEST:
                responses.append(y)
            else:
                grow(y)

    grow(())
    return contexts, responses


CONTEXTS, WORLD = enumerate_world()
# all tokens of all responses: the row of the table that predicts it, the token, its response
ROW = torch.tensor([CONTEXTS.index(y[:t]) for y in WORLD for t in range(len(y))])
TOKEN = torch.tensor([token for y in WORLD for token in y])
OF = torch.tensor([i for i, y in enumerate(WORLD) for _ in y])


def world_logps(table):
    """log pi(y) of every response, by losses.py."""
    return losses.segment_sum(losses.token_logps(table[ROW], TOKEN), OF, len(WORLD))


def world_probabilities(table):
    """pi(y) of every response: a product of softmaxes, in plain Python."""
    s = softmax(table).tolist()
    return torch.tensor([math.prod(s[CONTEXTS.index(y[:t])][y[t]] for t in range(len(y))) for y in WORLD],
                        dtype=torch.float64)


def every_pair():
    """Indices of all ordered pairs of different responses."""
    i, j = torch.tensor(list(itertools.permutations(range(len(WORLD)), 2))).T
    return i, j


def minimise(loss, table):
    """L-BFGS to convergence."""
    optimizer = torch.optim.LBFGS([table], max_iter=400, tolerance_grad=1e-12, tolerance_change=0,
                                  history_size=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(table)
        value.backward()
        return value

    optimizer.step(closure)
    return table.detach()


def test_the_world_is_complete():
    """40 responses, 13 contexts; a policy's probabilities sum to 1, and losses.py finds the same ones."""
    assert (len(WORLD), len(CONTEXTS)) == (40, 13)
    table = randn(13, TOKENS, seed=40)
    close(world_probabilities(table).sum(), 1.0)
    close(world_logps(table).exp(), world_probabilities(table))


def test_minimising_dpos_population_loss_finds_the_optimal_policy_of_eq_4():
    """With Bradley-Terry preferences of a reward r, descent ends at pi_ref e^(r / beta) / Z, Z summed."""
    beta = 0.5
    reference, r = randn(13, TOKENS, seed=41), randn(40, seed=42)
    pi_ref = world_probabilities(reference)
    z = (pi_ref * (r / beta).exp()).sum()
    optimum = pi_ref * (r / beta).exp() / z                         # Eq. 4
    i, j = every_pair()
    p = torch.tensor([sigma(x) for x in r[i] - r[j]], dtype=torch.float64)  # P_BT(i beats j), Eq. 1
    ref_logps = pi_ref.log()

    def population(table):
        """Each ordered pair as often as its preference occurs; both orders of a pair are in the list."""
        logps = world_logps(table)
        return (p * losses.dpo_loss(logps[i], logps[j], ref_logps[i], ref_logps[j], beta=beta)).mean()

    start = reference.clone().requires_grad_()
    close(population(start).detach(), math.log(2) / 2)              # log 2, as p and 1 - p average to 1/2
    found = minimise(population, start)
    close(world_probabilities(found), optimum, 1e-6)
    # Eq. 5: the implicit reward recovers r up to one constant, -beta log Z
    implicit = beta * (world_logps(found) - ref_logps)
    close(implicit - r, torch.full((40,), -beta * float(z.log()), dtype=torch.float64), 1e-5)
    # Eq. 6: Z cancels, and sigma(h) is the Bradley-Terry probability of every pair
    logps = world_logps(found)
    h = -losses.dpo_loss(logps[i], logps[j], ref_logps[i], ref_logps[j], beta=beta)
    close(h.exp(), p, 1e-6)
    # no policy does better: what is left is the entropy of the preferences
    entropy = -(p * p.log()).mean()
    close(population(found), entropy, 1e-9)


def test_the_optimal_policy_maximises_reward_minus_beta_kl():
    """Eq. 3, the objective behind Eq. 4: no other policy has a higher E r - beta KL(pi || pi_ref)."""
    beta = 0.5
    r, pi_ref = randn(40, seed=42), world_probabilities(randn(13, TOKENS, seed=41))
    z = (pi_ref * (r / beta).exp()).sum()

    def objective(pi):
        return (pi * r).sum() - beta * kl(pi, pi_ref)

    best = objective(pi_ref * (r / beta).exp() / z)
    close(best, beta * z.log())
    assert all(objective(world_probabilities(randn(13, TOKENS, seed=s))) < best for s in range(50, 70))


def test_the_stationary_point_of_a_pair_seen_in_both_orders_is_the_logit_of_its_preference():
    """p L(w, l) + (1 - p) L(l, w) is least at h = log p / (1 - p), for DPO, TDPO1 and TDPO2 alike."""
    for p in (0.2, 0.5, 0.9):
        for name, kls, delta in (("dpo", [], 0.0), ("tdpo1", [0.5, 1.5], 1.0), ("tdpo2", [0.5, 1.5], ALPHA)):
            function = getattr(losses, name + "_loss")
            h = math.log(p / (1 - p))
            rho_w = h / BETA + delta                                # h = beta (rho_w - 0) - beta delta
            slopes = []
            for x in (rho_w - 0.1, rho_w, rho_w + 0.1):
                args = numbers(x, 0.0, 0.0, 0.0, *kls)
                forth, back = function(*args, **HYPER[name]), function(*swapped(args), **HYPER[name])
                slopes.append(float(torch.autograd.grad(p * forth + (1 - p) * back, args[0])[0]))
            assert slopes[0] < -1e-4 and abs(slopes[1]) < 1e-12 and slopes[2] > 1e-4, (name, p)


def test_tdpo_theorem_4_5_the_token_level_optimum_explains_every_preference():
    """pi* = pi_ref e^(Q / beta) / Z per context: sigma(u - delta) is Bradley-Terry on the summed advantages.

    A(c, y) = Q(c, y) - E_ref Q(c, .). Per context beta log Z = beta KL(pi_ref || pi*) + E_ref Q, hence
    sum_t A = beta rho + beta K. At pi* the population loss is the entropy of the preferences, gradient 0.
    """
    beta = 0.5
    reference, q_values = randn(13, TOKENS, seed=43), randn(13, TOKENS, seed=44)
    optimum = (reference + q_values / beta).requires_grad_()
    advantage = q_values - (softmax(reference) * q_values).sum(-1, keepdim=True)
    total = torch.stack([sum(advantage[CONTEXTS.index(y[:t]), y[t]] for t in range(len(y))) for y in WORLD])
    i, j = every_pair()
    logps, ref_logps = world_logps(optimum), world_logps(reference)
    k = losses.segment_sum(losses.token_kl(reference, optimum)[ROW], OF, 40)  # D_SeqKL of every response
    close(beta * (logps - ref_logps) + beta * k, total)
    loss = losses.tdpo1_loss(logps[i], logps[j], ref_logps[i], ref_logps[j], k[i], k[j], beta=beta)
    p = torch.tensor([sigma(x) for x in total[i] - total[j]], dtype=torch.float64)
    close((-loss).exp(), p)
    population = (p * loss).mean()
    close(population.detach(), -(p * p.log()).mean())
    assert torch.autograd.grad(population, optimum)[0].abs().max() < 1e-12


def test_sequential_kl_by_enumeration_forward_and_reverse():
    """Chain rule: E_ref D_SeqKL = KL(pi_ref || pi) over whole responses; reverse KL needs the policy's mean.

    KL(pi_ref || pi) is an expectation under pi_ref, so the sum over contexts is weighted by pi_ref. Under the
    policy, or with the arguments exchanged, the same sum is another number.
    """
    policy, reference = randn(13, TOKENS, seed=45), randn(13, TOKENS, seed=46)
    pi, pi_ref = world_probabilities(policy), world_probabilities(reference)
    forward = losses.segment_sum(losses.token_kl(reference, policy)[ROW], OF, 40)  # D_SeqKL(y; pi_ref || pi)
    reverse = losses.segment_sum(losses.token_kl(policy, reference)[ROW], OF, 40)
    # each response: a sum over its contexts, of the next-token KL
    q, s = softmax(reference), softmax(policy)
    rows_of = [[CONTEXTS.index(y[:t]) for t in range(len(y))] for y in WORLD]
    close(forward, torch.stack([kl(q[x], s[x]) for x in rows_of]))
    close(reverse, torch.stack([kl(s[x], q[x]) for x in rows_of]))
    close((pi_ref * forward).sum(), kl(pi_ref, pi))
    close((pi * reverse).sum(), kl(pi, pi_ref))
    numbers_seen = [float(x) for x in ((pi_ref * forward).sum(), (pi * forward).sum(),
                                       (pi_ref * reverse).sum(), (pi * reverse).sum())]
    assert min(abs(a - b) for a, b in itertools.combinations(numbers_seen, 2)) > 1e-3
