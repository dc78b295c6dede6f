"""The identities of the papers: on logits, and on a world small enough to enumerate (golden/ has a real GPT).

s = softmax(z) is the policy, q = softmax(z_ref) the reference, e the one-hot of the token that came; h is the
argument of log sigma and g = beta sigma(-h). What is expected is computed here from softmax, log and plain
sums, never by losses.py.
"""

import itertools
import math

import torch
import torch.nn.functional as F

import losses

BETA, LAM, ALPHA = 0.4, 3.0, 0.3
HYPER = {
    "dpo": {"beta": BETA}, "dpop": {"beta": BETA, "lam": LAM}, "tdpo1": {"beta": BETA},
    "tdpo2": {"beta": BETA, "alpha": ALPHA}, "2d-dpo-vanilla": {"beta": BETA}, "2d-dpo": {"beta": BETA},
}
TERMS = {name: losses.terms_of(losses.LOSSES[name]) for name in HYPER}
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


def g_of(h):
    return BETA * sigma(-h)


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
    terms = {}
    for side, z, q, y, segment, r in (("chosen", z_w, q_w, y_w, segment_w, r_w),
                                      ("rejected", z_l, q_l, y_l, segment_l, r_l)):
        whole = torch.zeros_like(y)
        ids, num = (segment, len(r)) if "chosen_rewards" in TERMS[name] else (whole, 1)
        for ref, x in (("", z), ("ref_", q)):
            terms[f"{ref}{side}_logps"] = losses.segment_sum(losses.token_logps(x, y), ids, num + 1)[:num]
        terms[f"{side}_seq_kl"] = losses.segment_sum(losses.token_kl(q, z), whole, 1)
        terms |= {f"{side}_rewards": r, f"{side}_mask": torch.ones(len(r), dtype=torch.bool)}
    function = getattr(losses, losses.LOSSES[name].__name__)
    return function(*(terms[n] for n in TERMS[name]), **HYPER[name] | hyper).squeeze()


def logit_gradients(name, pair, **kwargs):
    return torch.autograd.grad(loss_of(name, *pair, **kwargs), pair[:2])


def e_minus_s(z, y):
    """d log pi(y) / d z."""
    return one_hot(y) - softmax(z)


# ---------------------------------------------------------------------------------------------------------
# On logits


def test_values_and_logit_gradients_of_the_sequence_losses():
    """-log sigma(h) from raw logits. DPO: chosen -g(e - s), rejected +g(e - s). DPOP: 1 + lam on an unhealthy
    chosen side. TDPO1: q in the place of s: the policy's softmax cancels between log pi and the forward KL.
    TDPO2: chosen as DPO's (sg), rejected +g(e - (1 - alpha) s - alpha q).
    """
    for seed, healthy in itertools.product((1, 11), (True, False, None)):
        pair = z_w, z_l, q_w, q_l = logit_pair(seed, healthy)
        rho_w, rho_l = float(logratio(z_w, q_w, Y_W).sum()), float(logratio(z_l, q_l, Y_L).sum())
        k_w, k_l = float(kl(softmax(q_w), softmax(z_w))), float(kl(softmax(q_l), softmax(z_l)))
        u, active = BETA * (rho_w - rho_l), float(rho_w < 0)
        chosen, rejected = e_minus_s(z_w, Y_W), e_minus_s(z_l, Y_L)
        to_q_w, to_q_l = one_hot(Y_W) - softmax(q_w), one_hot(Y_L) - softmax(q_l)
        expected = {"dpo": (u, chosen, rejected),
                    "dpop": (u + BETA * LAM * active * rho_w, (1 + LAM * active) * chosen, rejected),
                    "tdpo1": (u - BETA * (k_l - k_w), to_q_w, to_q_l),
                    "tdpo2": (u - ALPHA * BETA * (k_l - k_w), chosen,
                              (1 - ALPHA) * rejected + ALPHA * to_q_l)}
        for name, (h, up, down) in expected.items():
            close(loss_of(name, *pair), -math.log(sigma(h)))
            grad_w, grad_l = logit_gradients(name, pair)
            close(grad_w, -g_of(h) * up)
            close(grad_l, g_of(h) * down)


def test_dpop_hinge_is_on_the_sequence_not_on_each_token():
    """A chosen response above the reference as a whole, one token below it: DPO's gradient everywhere."""
    z_w, z_l, q_w, q_l = logit_pair(3, True)
    z_w = (z_w.detach() - 3.0 * one_hot(Y_W) * torch.tensor([[0.0], [1.0], [0.0], [0.0]])).requires_grad_()
    rho = logratio(z_w, q_w, Y_W)
    assert rho[1] < -0.5 and rho.sum() > 0.5
    pair = z_w, z_l, q_w, q_l
    for a, b in zip(logit_gradients("dpop", pair), logit_gradients("dpo", pair), strict=True):
        close(a, b)


def test_tdpo1_reward_is_linear_in_the_logits():
    """rho_t + K_t = (z_y - sum_v q_v z_v) - (log q_y + H(q)), the reason for the cancellation."""
    z_w, _, q_w, _ = logit_pair(5)
    q = softmax(q_w)
    left = losses.token_logps(z_w, Y_W) - losses.token_logps(q_w, Y_W) + losses.token_kl(q_w, z_w)
    entropy, taken = -(q * q.log()).sum(-1), (torch.arange(4), Y_W)
    close(left, (z_w[taken] - (q * z_w).sum(-1)) - (q[taken].log() + entropy))


def test_tdpo2_at_alpha_1_differs_from_tdpo1_on_chosen_logits_by_g_times_s_minus_q():
    """The value and the rejected gradients are TDPO1's; on chosen logits TDPO2 lacks K_w's -g(s - q)."""
    pair = z_w, _, q_w, _ = logit_pair(7)
    loss = loss_of("tdpo1", *pair)
    close(loss_of("tdpo2", *pair, alpha=1.0), loss)
    one, two = logit_gradients("tdpo1", pair), logit_gradients("tdpo2", pair, alpha=1.0)
    close(two[1], one[1])
    g = BETA * (1.0 - math.exp(-float(loss.detach())))              # sigma(-h) = 1 - e^-L
    close(two[0] - one[0], g * (softmax(z_w) - softmax(q_w)))


def test_2d_logit_gradients_are_dpos_times_the_segments_reward():
    """Vanilla: -g r_k (e - s), +g r_k (e - s); a token in no segment gets exactly 0. Group: a g for each pair
    of segments, best chosen (0.9) with worst rejected (0.2), then 0.4 with 0.7; unselected tokens get 0.
    """
    pair = z_w, z_l, q_w, q_l = logit_pair(8)
    rho_w, rho_l = logratio(z_w, q_w, Y_W), logratio(z_l, q_l, Y_L)
    none = torch.tensor([0, 2, 1, 1])                               # the second chosen token is in no segment
    for segment_w, weight_w in ((SEGMENT_W, [0.9, 0.9, 0.4, 0.4]), (none, [0.9, 0.0, 0.4, 0.4])):
        weight_w, weight_l = (torch.tensor(x, dtype=torch.float64) for x in (weight_w, [0.7, 0.2, 0.2]))
        h = BETA * float((weight_w * rho_w).sum() - (weight_l * rho_l).sum())
        close(loss_of("2d-dpo-vanilla", *pair, segment_w=segment_w), -math.log(sigma(h)))
        grad_w, grad_l = logit_gradients("2d-dpo-vanilla", pair, segment_w=segment_w)
        close(grad_w, -g_of(h) * weight_w[:, None] * e_minus_s(z_w, Y_W))
        close(grad_l, g_of(h) * weight_l[:, None] * e_minus_s(z_l, Y_L))
        assert (grad_w[weight_w == 0] == 0).all()
    h = [BETA * float(0.9 * rho_w[:2].sum() - 0.2 * rho_l[1:].sum()),
         BETA * float(0.4 * rho_w[2:].sum() - 0.7 * rho_l[:1].sum())]
    close(loss_of("2d-dpo", *pair), -math.log(sigma(h[0])) - math.log(sigma(h[1])))
    g = [g_of(x) for x in h]
    grad_w, grad_l = logit_gradients("2d-dpo", pair)
    close(grad_w[:2], -g[0] * 0.9 * e_minus_s(z_w, Y_W)[:2])
    close(grad_w[2:], -g[1] * 0.4 * e_minus_s(z_w, Y_W)[2:])
    close(grad_l[:1], g[1] * 0.7 * e_minus_s(z_l, Y_L)[:1])
    close(grad_l[1:], g[0] * 0.2 * e_minus_s(z_l, Y_L)[1:])
    grad_w, grad_l = logit_gradients("2d-dpo", pair, segment_l=torch.zeros_like(Y_L), r_l=R_L[:1])
    assert (grad_w[2:] == 0).all() and (grad_w[:2] != 0).all() and (grad_l != 0).all()


def test_a_constant_added_to_the_logits_of_a_position_changes_no_loss():
    """Softmax does not see it, on either model; so the logit gradient of each position sums to 0."""
    for name, healthy in itertools.product(HYPER, (True, False)):
        pair = logit_pair(11, healthy)
        moved = [x + 20.0 * randn(len(x), 1, seed=12 + i) for i, x in enumerate(pair)]
        close(loss_of(name, *moved), loss_of(name, *pair))
        for grad in logit_gradients(name, pair):
            assert grad.abs().max() > 1e-3 and grad.sum(-1).abs().max() < 1e-14, name


def test_at_the_reference_every_loss_is_log_2_with_dpos_gradient():
    """theta = ref: log 2, the group N log 2. DPOP as relu'(0) = 0, TDPO as KL's gradient is 0 at its minimum,
    2D if r = 1 and all segments are paired, and only then.
    """
    _, _, q_w, q_l = logit_pair(14)
    pair = q_w.clone().requires_grad_(), q_l.clone().requires_grad_(), q_w, q_l
    ones = torch.ones(2, dtype=torch.float64)
    dpo = -BETA / 2 * e_minus_s(q_w, Y_W), BETA / 2 * e_minus_s(q_l, Y_L)  # g = beta sigma(0)
    for name in HYPER:
        close(loss_of(name, *pair), math.log(2) * (2 if name == "2d-dpo" else 1), 1e-15)
        for a, b in zip(logit_gradients(name, pair, r_w=ones, r_l=ones), dpo, strict=True):
            close(a, b)
        if "chosen_rewards" in TERMS[name]:
            assert (logit_gradients(name, pair)[0] - dpo[0]).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------
# On sequence log-probabilities: shifts and swaps


def numbers(*values):
    return [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in values]


def test_dpo_and_tdpo_see_only_the_difference_of_the_log_ratios_dpop_sees_more():
    """rho_w, rho_l += c: DPO, TDPO1, TDPO2 unchanged; DPOP changes as soon as rho_w < 0."""
    kls = numbers(0.6, 1.1)
    for c, (name, more) in itertools.product((-3.0, 0.7, 3.0), (("dpo", []), ("tdpo1", kls), ("tdpo2", kls),
                                                                ("dpop", []))):
        function = getattr(losses, f"{name}_loss")
        before, after = numbers(-9.0, -8.0, -10.0, -8.5), numbers(-9.0 + c, -8.0 + c, -10.0, -8.5)
        moved = (function(*after, *more, **HYPER[name]) - function(*before, *more, **HYPER[name])).abs()
        assert moved > 0.1 if name == "dpop" and c < -1 else moved < 1e-12  # rho_w = 1 + c


def swapped(x):
    """Chosen and rejected exchanged in (w, l, ref_w, ref_l[, K_w, K_l])."""
    return [x[i ^ 1] for i in range(len(x))]


def swap_difference(function, args, **hyper):
    """L(w, l) - L(l, w), and its gradient."""
    difference = function(*args, **hyper) - function(*swapped(args), **hyper)
    return difference, torch.cat(torch.autograd.grad(difference, args))


def test_swapping_chosen_and_rejected_costs_minus_h():
    """L(w, l) - L(l, w) = -h, since log sigma(h) - log sigma(-h) = h: DPO and TDPO1, value and gradient."""
    args, kls = numbers(-9.0, -8.0, -10.0, -8.5), numbers(0.6, 1.1)
    # rho_w = 1, rho_l = 0.5: h = 0.4 * 0.5 = 0.2; TDPO1: h = 0.2 - 0.4 * (0.9 - 0.6)
    difference, grad = swap_difference(losses.dpo_loss, args, beta=BETA)
    close(difference, [-0.2])
    close(grad, [-BETA, BETA, BETA, -BETA])
    difference, grad = swap_difference(losses.tdpo1_loss, args + numbers(0.6, 0.9), beta=BETA)
    close(difference, [-(0.2 - 0.4 * 0.3)])
    close(grad, [-BETA, BETA, BETA, -BETA, -BETA, BETA])
    # TDPO2: the value follows; of each KL's -+ alpha beta one half is stopped, it stays with the chosen side
    difference, grad = swap_difference(losses.tdpo2_loss, args + kls, beta=BETA, alpha=ALPHA)
    h = 0.2 - 0.3 * 0.4 * 0.5
    close(difference, [-h])
    close(grad, [-BETA, BETA, BETA, -BETA, -ALPHA * BETA * sigma(h), ALPHA * BETA * sigma(-h)])


def test_swapping_is_no_identity_for_dpop_once_a_hinge_is_active():
    """Each order has its own hinge: L - L' = -h needs rho_w >= 0 and rho_l >= 0."""
    above, below = numbers(-9.0, -8.0, -10.0, -8.5), numbers(-9.0, -9.5, -10.0, -8.5)  # rho_l = 0.5 and -1
    close(swap_difference(losses.dpop_loss, above, beta=BETA, lam=LAM)[0], [-BETA * 0.5])
    # h = 0.4 (1 + 1) = 0.8; swapped: 0.4 (-1 - 1 - 3 * 1) = -2.0, not -0.8
    close(swap_difference(losses.dpop_loss, below, beta=BETA, lam=LAM)[0],
          [-math.log(sigma(0.8)) + math.log(sigma(-2.0))])


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
        forth = function(*logps, *r, mask, mask, beta=BETA)
        close(forth - function(*swapped(logps), *swapped(r), mask, mask, beta=BETA), [-h])
        unswapped = function(*swapped(logps), *r, mask, mask, beta=BETA)
        assert (forth - unswapped + h).abs() > 1e-3
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
    loss = loss_of(name, *joined, y_w=torch.cat((y, Y_W)), y_l=torch.cat((y, Y_L)),
                   segment_w=torch.tensor([0, 0, 1, 1, 1, 1]), segment_l=torch.tensor([0, 0, 1, 1, 1]),
                   **kwargs)
    grad = torch.autograd.grad(loss, z)[0]
    g = BETA * (1.0 - math.exp(-float(loss.detach())))              # sigma(-h) = 1 - e^-L
    return grad, g, softmax(z), softmax(q), one_hot(y)


def test_what_each_loss_does_to_a_shared_prefix():
    """DPO 0. DPOP -g lam (e - s) with an active hinge, which raises the prefix, else 0. TDPO1 0. TDPO2
    +g alpha (s - q), a pull to the reference. 2D vanilla -g(r_w - r_l)(e - s). Group: no identity.
    """
    for name, healthy in (("dpo", True), ("dpo", False), ("dpop", True), ("tdpo1", None)):
        assert prefix_gradient(name, healthy)[0].abs().max() < 1e-15
    grad, g, s, _, e = prefix_gradient("dpop", False)
    close(grad, -g * LAM * (e - s))
    grad, g, s, q, _ = prefix_gradient("tdpo2", None)
    close(grad, g * ALPHA * (s - q))
    grad, g, s, _, e = prefix_gradient("2d-dpo-vanilla", None)
    close(grad, -g * (0.9 - 0.7) * (e - s))
    # 0.6 for the prefix on both sides; Eq. 6 pairs the prefixes' segments with the other side's second ones
    equal = {"r_w": torch.tensor([0.6, 0.9], dtype=torch.float64),
             "r_l": torch.tensor([0.6, 0.8], dtype=torch.float64)}
    assert prefix_gradient("2d-dpo-vanilla", None, **equal)[0].abs().max() < 1e-15
    assert prefix_gradient("2d-dpo", None, **equal)[0].abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------------------
# DPOP's section 3: why DPO can lower the chosen response. One token differs; the tokens after it are the
# same, in two contexts that share a parameter: a bias b added to the logits of both


def bias_gradient(name, reference_shift):
    """-(1/g) dL/db_j at the two later positions k, one bias per position: (2, V); s_w, s_l, e there.

    Token 1 of 4 differs; the policy is surer of the rest after the right token.
    """
    y_w, y_l = torch.tensor([3, 0, 2, 4]), torch.tensor([3, 1, 2, 4])
    first = randn(2, V, seed=20)                                    # tokens 0 and 1: the same context
    z_w = torch.cat((first, randn(2, V, seed=21) + 2.0 * one_hot(y_w[2:])))
    z_l = torch.cat((first, randn(2, V, seed=22)))
    b = torch.zeros(2, V, dtype=torch.float64, requires_grad=True)
    q_w = z_w + reference_shift * one_hot(y_w)                      # the reference, above the policy or below
    shared = torch.cat((torch.zeros_like(b), b))
    loss = loss_of(name, z_w + shared, z_l + shared, q_w, z_l, y_w=y_w, y_l=y_l)
    g = BETA * (1.0 - math.exp(-float(loss.detach())))
    return -torch.autograd.grad(loss, b)[0] / g, softmax(z_w)[2:], softmax(z_l)[2:], one_hot(y_w[2:])


def test_dpop_paper_section_3_dpo_lowers_a_shared_token_and_dpop_raises_it():
    """Eq. 2: DPO moves b_j by s_j^l - s_j^w, which lowers the token that follows. DPOP with an active hinge:
    lam (1 - s_j^w) + s_j^l - s_j^w for j = t_k and -(lam + 1) s_j^w + s_j^l for the others raises it.
    """
    ascent, s_w, s_l, e = bias_gradient("dpo", 1.0)
    close(ascent, s_l - s_w)
    assert (ascent[e == 1] < 0).all()                               # the failure: the right token falls
    ascent, s_w, s_l, e = bias_gradient("dpop", 1.0)
    close(ascent, torch.where(e == 1, LAM * (1 - s_w) + s_l - s_w, -(LAM + 1) * s_w + s_l))
    assert (ascent[e == 1] > 0).all()
    close(bias_gradient("dpop", -1.0)[0], s_l - s_w)                # hinge inactive: DPO's
    # the failure needs shared parameters: alone, the chosen token's logit gradient -g(1 - s) is negative
    assert all((logit_gradients("dpo", logit_pair(seed))[0][one_hot(Y_W) == 1] < 0).all() for seed in (1, 30))


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
FIRST, SECOND = torch.tensor(list(itertools.permutations(range(len(WORLD)), 2))).T


def both(x):
    """Of something that every response has: that of the first and of the second, for all ordered pairs."""
    return x[FIRST], x[SECOND]


def world_logps(table):
    """log pi(y) of every response, by losses.py."""
    return losses.segment_sum(losses.token_logps(table[ROW], TOKEN), OF, len(WORLD))


def world_probabilities(table):
    """pi(y) of every response: a product of softmaxes, in plain Python."""
    s = softmax(table).tolist()
    return torch.tensor([math.prod(s[CONTEXTS.index(y[:t])][y[t]] for t in range(len(y))) for y in WORLD],
                        dtype=torch.float64)


def bradley_terry(r):
    """P(i beats j) of every ordered pair, Eq. 1 of DPO."""
    return torch.tensor([sigma(x) for x in torch.sub(*both(r))], dtype=torch.float64)


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
    """With Bradley-Terry preferences of a reward r, descent ends at pi_ref e^(r / beta) / Z, Z summed: the
    policy that maximises E r - beta KL(pi || pi_ref) (Eq. 3).
    """
    beta = 0.5
    reference, r = randn(13, TOKENS, seed=41), randn(40, seed=42)
    pi_ref = world_probabilities(reference)
    ref_logps = pi_ref.log()
    z = (pi_ref * (r / beta).exp()).sum()
    optimum = pi_ref * (r / beta).exp() / z                         # Eq. 4
    p = bradley_terry(r)

    def population(table):
        """Each ordered pair as often as its preference occurs; both orders of a pair are in the list."""
        logps = world_logps(table)
        return (p * losses.dpo_loss(*both(logps), *both(ref_logps), beta=beta)).mean()

    start = reference.clone().requires_grad_()
    close(population(start).detach(), math.log(2) / 2)              # log 2, as p and 1 - p average to 1/2
    found = minimise(population, start)
    close(world_probabilities(found), optimum, 1e-6)
    # Eq. 5: the implicit reward recovers r up to one constant, -beta log Z
    logps = world_logps(found)
    close(beta * (logps - ref_logps) - r, torch.full((40,), -beta * float(z.log())), 1e-5)
    # Eq. 6: Z cancels, and sigma(h) is the Bradley-Terry probability of every pair
    h = -losses.dpo_loss(*both(logps), *both(ref_logps), beta=beta)
    close(h.exp(), p, 1e-6)
    close(population(found), -(p * p.log()).mean(), 1e-9)           # what is left is the preferences' entropy

    def objective(pi):
        return (pi * r).sum() - beta * kl(pi, pi_ref)

    close(objective(optimum), beta * z.log())
    assert all(objective(world_probabilities(randn(13, TOKENS, seed=s))) < objective(optimum)
               for s in range(50, 70))


def test_the_stationary_point_of_a_pair_seen_in_both_orders_is_the_logit_of_its_preference():
    """p L(w, l) + (1 - p) L(l, w) is least at h = log p / (1 - p), for DPO, TDPO1 and TDPO2 alike."""
    for p in (0.2, 0.5, 0.9):
        for name, kls, delta in (("dpo", [], 0.0), ("tdpo1", [0.5, 1.5], 1.0), ("tdpo2", [0.5, 1.5], ALPHA)):
            function = getattr(losses, name + "_loss")
            rho_w = math.log(p / (1 - p)) / BETA + delta            # h = beta (rho_w - 0) - beta delta
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
    logps, ref_logps = world_logps(optimum), world_logps(reference)
    k = losses.segment_sum(losses.token_kl(reference, optimum)[ROW], OF, 40)  # D_SeqKL of every response
    close(beta * (logps - ref_logps) + beta * k, total)
    loss = losses.tdpo1_loss(*both(logps), *both(ref_logps), *both(k), beta=beta)
    p = bradley_terry(total)
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
    close((pi_ref * forward).sum(), kl(pi_ref, pi))
    close((pi * reverse).sum(), kl(pi, pi_ref))
    seen = [float(x) for x in ((pi_ref * forward).sum(), (pi * forward).sum(), (pi_ref * reverse).sum(),
                               (pi * reverse).sum())]
    assert min(abs(a - b) for a, b in itertools.combinations(seen, 2)) > 1e-3
