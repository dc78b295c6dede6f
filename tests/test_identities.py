"""The identities of the papers: on logits, and on a world small enough to enumerate (golden/ has a real GPT).

s = softmax(z) is the policy, q = softmax(z_ref) the reference, e the one-hot of the token that came; h is the
argument of log sigma and g = beta sigma(-h). What is expected is computed here from softmax, log and plain
sums, never by losses.py.
"""

import itertools
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import data
import losses
import train
from model import GPT, GPTConfig
from plumbing.reference import Reference

BETA, LAM, ALPHA = 0.4, 3.0, 0.3
HYPER = {
    "dpo": {"beta": BETA}, "dpop": {"beta": BETA, "lam": LAM}, "tdpo1": {"beta": BETA},
    "tdpo2": {"beta": BETA, "alpha": ALPHA}, "2d-dpo-vanilla": {"beta": BETA}, "2d-dpo": {"beta": BETA},
}
TERMS = {name: losses.terms_of(losses.LOSSES[name]) for name in HYPER}
V = 5                                                               # tokens in the vocabulary

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

def test_2d_vanilla_logit_gradients_are_dpos_times_the_segments_reward():
    """-g r_k (e - s), +g r_k (e - s); a token in no segment gets exactly 0."""
    pair = z_w, z_l, q_w, q_l = logit_pair(8)
    weight_w, weight_l = (torch.tensor(x, dtype=torch.float64) for x in ([0.9, 0, 0.4, 0.4], [0.7, 0.2, 0.2]))
    h = BETA * float((weight_w * logratio(z_w, q_w, Y_W)).sum() - (weight_l * logratio(z_l, q_l, Y_L)).sum())
    segment_w = torch.tensor([0, 2, 1, 1])                          # the second chosen token is in no segment
    close(loss_of("2d-dpo-vanilla", *pair, segment_w=segment_w), -math.log(sigma(h)))
    grad_w, grad_l = logit_gradients("2d-dpo-vanilla", pair, segment_w=segment_w)
    close(grad_w, -g_of(h) * weight_w[:, None] * e_minus_s(z_w, Y_W))
    close(grad_l, g_of(h) * weight_l[:, None] * e_minus_s(z_l, Y_L))
    assert (grad_w[1] == 0).all()

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

# On sequence log-probabilities: shifts and swaps

def numbers(*values):
    return [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in values]

def test_swapping_chosen_and_rejected_costs_minus_h():
    """L(w, l) - L(l, w) = -h, since log sigma(h) - log sigma(-h) = h: DPO, TDPO1 and the value of TDPO2. They
    see rho_w - rho_l only, DPOP sees more: rho_w, rho_l -= 3."""
    args = numbers(-9.0, -8.0, -10.0, -8.5, 0.6, 1.1)               # rho_w = 1, rho_l = 0.5, delta = 0.2
    for name, h in (("dpo", 0.2), ("tdpo1", 0.2 - 0.2), ("tdpo2", 0.2 - ALPHA * 0.2)):
        n = len(TERMS[name])
        forth, back = (losses.LOSSES[name](*(args[k ^ swap] for k in range(n)), **HYPER[name])
                       for swap in (0, 1))
        close(forth - back, [-h])
        down = [x - 3.0 * (k < 2) for k, x in enumerate(args[:n])]
        close(losses.LOSSES[name](*down, **HYPER[name]), forth)
    dpop = [losses.dpop_loss(*x, beta=BETA, lam=LAM) for x in (args[:4], down[:4])]
    assert dpop[1] > dpop[0] + 0.1

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

# Statistics, on a world that can be enumerated: responses of at most 3 of 4 tokens, token 0 ends one. A
# policy is a table of logits, a row for each of 13 contexts: it can be any distribution over the 40 responses

TOKENS, LONGEST = 4, 3

def contexts(prefix=()):
    """All prefixes that a response may go on from."""
    longer = range(1, TOKENS) if len(prefix) + 1 < LONGEST else ()
    return [prefix, *(c for token in longer for c in contexts((*prefix, token)))]

CONTEXTS = contexts()
WORLD = [(*c, a) for c in CONTEXTS for a in range(TOKENS) if a == 0 or len(c) == LONGEST - 1]
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
    return torch.sub(*both(r)).sigmoid()

def q_values(r, value):
    """Q(c, a), (13, TOKENS): r(y) where a ends a response, else value(row of the next context, its Q)."""
    q = {}
    for c in sorted(CONTEXTS, key=len, reverse=True):
        q[c] = torch.stack([r[WORLD.index((*c, a))] if (*c, a) in WORLD else
                            value(CONTEXTS.index((*c, a)), q[*c, a]) for a in range(TOKENS)])
    return torch.stack([q[c] for c in CONTEXTS])

def summed(per_token):
    """The sum over each response of something (13, TOKENS) that its tokens have."""
    return torch.zeros(len(WORLD), dtype=torch.float64).index_add(0, OF, per_token[ROW, TOKEN])

def seq_kl(reference, policy):
    """D_SeqKL(y; pi_ref || pi) of every response, by losses.py."""
    return losses.segment_sum(losses.token_kl(reference, policy)[ROW], OF, len(WORLD))

def minimise(loss, table):
    """L-BFGS to convergence."""
    optimizer = torch.optim.LBFGS([table], max_iter=150, tolerance_grad=1e-12, tolerance_change=0,
                                  history_size=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(table)
        value.backward()
        return value

    optimizer.step(closure)
    return table.detach()

WORLD_BETA = 0.5
REFERENCE, REWARD = randn(13, TOKENS, seed=41), randn(40, seed=42)
PI_REF = world_probabilities(REFERENCE)
OPTIMUM = PI_REF * (REWARD / WORLD_BETA).exp()
Z, OPTIMUM = OPTIMUM.sum(), OPTIMUM / OPTIMUM.sum()                 # Eq. 4 of DPO
S_REF = softmax(REFERENCE)                                          # token by token
Q_REF = q_values(REWARD, lambda row, q: (S_REF[row] * q).sum())
Q_STAR = q_values(REWARD, lambda row, q: WORLD_BETA * (S_REF[row] * (q / WORLD_BETA).exp()).sum().log())

def objective(pi):
    """E r - beta KL(pi || pi_ref), Eq. 3 of DPO."""
    return (pi * REWARD).sum() - WORLD_BETA * kl(pi, PI_REF)

def test_the_world_is_complete():
    """40 responses, 13 contexts; a policy's probabilities sum to 1, and losses.py finds the same ones."""
    assert (len(WORLD), len(CONTEXTS)) == (40, 13)
    close(PI_REF.sum(), 1.0)
    close(world_logps(REFERENCE).exp(), PI_REF)

def test_1_dpo_eq_3_and_4_the_objective_of_any_policy_is_its_distance_to_the_optimum():
    """E_pi r - beta KL(pi || pi_ref) = beta log Z - beta KL(pi || pi_r) for every pi, so pi_r is the best."""
    for seed in range(50, 60):
        pi = world_probabilities(2 * randn(13, TOKENS, seed=seed))
        close(objective(pi), WORLD_BETA * Z.log() - WORLD_BETA * kl(pi, OPTIMUM), 1e-14)
    close(objective(OPTIMUM), WORLD_BETA * Z.log(), 1e-14)

def test_2_2d_dpo_appendix_a_the_optimum_is_a_token_level_policy():
    """A.2-A.3: beta log pi*(a|s)/pi_ref(a|s) = Q*(s,a) - V*(s), V* = beta log E_ref e^(Q* / beta), is Eq. 4's
    policy token by token, and V* of the prompt is beta log Z."""
    v = WORLD_BETA * (S_REF * (Q_STAR / WORLD_BETA).exp()).sum(-1).log()
    policy = REFERENCE + Q_STAR / WORLD_BETA
    close(WORLD_BETA * (softmax(policy) / S_REF).log(), Q_STAR - v[:, None])
    close(world_probabilities(policy), OPTIMUM, 1e-14)
    close(v[CONTEXTS.index(())], WORLD_BETA * Z.log(), 1e-14)

def test_3_2d_dpo_eq_6_is_a_sum_of_vanilla_losses():
    """A.4: sum over k < N of the vanilla loss whose rewards are 0 outside the k-th pair of segments."""
    pairs, s_w, s_l = 6, 4, 3
    logps = [-3 * randn(pairs, n, seed=60 + i).abs() for i, n in enumerate((s_w, s_l, s_w, s_l))]
    r_w, r_l = randn(pairs, s_w, seed=65).sigmoid(), randn(pairs, s_l, seed=66).sigmoid()
    masks = [torch.arange(n) < torch.randint(1, n + 1, (pairs, 1), generator=torch.Generator().manual_seed(n))
             for n in (s_w, s_l)]
    i_w, i_l, paired = losses.select_segments(r_w, r_l, *masks)
    total = torch.zeros(pairs, dtype=torch.float64)
    for k in range(paired.shape[1]):
        only = [torch.zeros_like(r).scatter(1, i[:, k:k + 1], r.gather(1, i[:, k:k + 1]))
                for r, i in ((r_w, i_w), (r_l, i_l))]
        total += paired[:, k] * losses.dpo2d_vanilla_loss(*logps, *only, *masks, beta=BETA)
    assert len(set(paired.sum(1).tolist())) > 1
    close(losses.dpo2d_loss(*logps, r_w, r_l, *masks, beta=BETA), total, 1e-15)

def test_4_tdpo_lemma_the_advantages_of_the_reference_sum_to_the_reward():
    """sum_t A_ref(s_t, a_t) = r(y) - V_ref(x): Bradley-Terry on advantages is Bradley-Terry on rewards."""
    v = (S_REF * Q_REF).sum(-1)
    advantages = summed(Q_REF - v[:, None])
    close(advantages, REWARD - v[CONTEXTS.index(())], 1e-14)
    close(v[CONTEXTS.index(())], (PI_REF * REWARD).sum(), 1e-14)
    close(bradley_terry(advantages), bradley_terry(REWARD), 1e-14)

def test_5_tdpo_bellman_step_per_state():
    """Eq. 4.2's per-token problem: E_pi A - beta KL(pi || pi_ref) is least far from its maximum at
    pi_ref e^(Q / beta) / Z, by beta KL to it, in every state and for every pi."""
    s, best = S_REF, softmax(REFERENCE + Q_REF / WORLD_BETA)
    a = Q_REF - (s * Q_REF).sum(-1, keepdim=True)

    def value(pi):
        return (pi * a).sum(-1) - WORLD_BETA * (pi * (pi / s).log()).sum(-1)

    for seed in range(70, 80):
        pi = softmax(2 * randn(13, TOKENS, seed=seed))
        close(value(best) - value(pi), WORLD_BETA * (pi * (pi / best).log()).sum(-1), 1e-14)

def population(loss, table, with_kl):
    """A loss over all ordered pairs of responses, each as often as Bradley-Terry prefers it."""
    kls = both(seq_kl(REFERENCE, table)) if with_kl else ()
    terms = [*both(world_logps(table)), *both(PI_REF.log()), *kls]
    return (bradley_terry(REWARD) * loss(*terms, beta=WORLD_BETA)).mean()

def test_minimising_dpos_population_loss_finds_the_optimal_policy_of_eq_4():
    """With Bradley-Terry preferences descent ends at pi_ref e^(r / beta) / Z. Eq. 5: the implicit reward is r
    up to -beta log Z. Eq. 6: Z cancels, sigma(h) is each pair's preference, whose entropy is what is left.
    """
    start = REFERENCE.clone().requires_grad_()
    close(population(losses.dpo_loss, start, False).detach(), math.log(2) / 2)  # p and 1 - p average to 1/2
    found = minimise(lambda table: population(losses.dpo_loss, table, False), start)
    close(world_probabilities(found), OPTIMUM, 1e-6)
    rewards = WORLD_BETA * (world_logps(found) - PI_REF.log())
    close(rewards - REWARD, torch.full((40,), -WORLD_BETA * float(Z.log())), 1e-5)
    p = bradley_terry(REWARD)
    close(bradley_terry(rewards), p, 1e-6)
    close(population(losses.dpo_loss, found, False), -(p * p.log()).mean(), 1e-9)

def test_6_tdpo1s_population_optimum_is_not_eq_4s_policy():
    """Descent on TDPO1's population loss ends at pi_ref e^(Q_ref / beta), where Theorem 4.5 explains every
    preference: sum_t A_ref = beta rho + beta K. Its value of Eq. 3 is below Eq. 4's, and so is its reward at
    its own KL. "TDPO above DPO" can only be an effect of finite training.
    """
    optimum = REFERENCE + Q_REF / WORLD_BETA
    start = REFERENCE.clone().requires_grad_()
    found = minimise(lambda table: population(losses.tdpo1_loss, table, True), start)
    close(world_probabilities(found), world_probabilities(optimum), 1e-6)
    p = bradley_terry(REWARD)
    close(population(losses.tdpo1_loss, optimum, True), -(p * p.log()).mean())
    rho = world_logps(optimum) - PI_REF.log()
    close(WORLD_BETA * (rho + seq_kl(REFERENCE, optimum)), REWARD - (PI_REF * REWARD).sum())
    pi = world_probabilities(optimum)
    assert objective(pi) < objective(OPTIMUM) - 0.05
    low, high = 0.05, 50.0                                          # the beta at which Eq. 4 has this KL
    for _ in range(60):
        beta = (low * high) ** 0.5
        of_eq_4 = PI_REF * (REWARD / beta).exp() / (PI_REF * (REWARD / beta).exp()).sum()
        low, high = (low, beta) if kl(of_eq_4, PI_REF) < kl(pi, PI_REF) else (beta, high)
    assert (of_eq_4 * REWARD).sum() - (pi * REWARD).sum() > 0.05

def test_7_dpop_is_dpo_with_a_reward_of_its_own_and_never_below_it():
    """Eq. 3 = -log sigma(r_w - r_l) with the paper's implicit reward r_w = beta (rho_w - lam max(0, -rho_w)),
    r_l = beta rho_l; >= DPO, equal where rho_w >= 0. Contrastive form: the penalty is max(0, D - m), D the
    chosen response's -log pi and m its -log pi_ref.
    """
    args = w, l_, ref_w, ref_l = [-5 * randn(200, seed=90 + i).abs() for i in range(4)]
    dpop, dpo = losses.dpop_loss(*args, beta=BETA, lam=LAM), losses.dpo_loss(*args, beta=BETA)
    r_w = BETA * (w - ref_w - LAM * (ref_w - w).clamp(min=0))
    close(dpop, -F.logsigmoid(r_w - BETA * (l_ - ref_l)), 1e-14)
    assert (dpop[w < ref_w] > dpo[w < ref_w]).all() and 0 < (w < ref_w).sum() < 200
    close(dpop[w >= ref_w], dpo[w >= ref_w], 1e-14)
    penalty = ((-w) - (-ref_w)).clamp(min=0)                        # max(0, D - m)
    close(dpop, -F.logsigmoid(BETA * (w - ref_w - l_ + ref_l - LAM * penalty)), 1e-14)

def test_8_the_gradient_of_a_whole_step_by_the_chain_rule():
    """grad_theta L = sum dL/dlog pi grad log pi + dL/dK grad K: train.step against separate backward passes,
    each response on its own. DPO section 4: -beta sigma(r_l - r_w) [grad log pi(y_w) - grad log pi(y_l)].
    """
    torch.manual_seed(3)
    policy, model = (GPT(GPTConfig(11, 16, 2, 2, 8)).double() for _ in range(2))
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.3)
    rng, none = np.random.default_rng(0), np.zeros((1, 0))
    pairs = [data.Pair(*(rng.integers(0, 11, n, dtype=np.int32) for n in sizes),
                       *(np.zeros(n, dtype=np.int32) for n in sizes[1:]), none, none, number=i)
             for i, sizes in enumerate([(3, 5, 4), (2, 3, 6), (4, 4, 4)])]

    def gradient(x):
        grads = torch.autograd.grad(x, policy.parameters(), retain_graph=True)
        return torch.cat([g.flatten() for g in grads])

    expected = dict.fromkeys(("dpo", "dpop", "tdpo1", "tdpo2"), 0.0)
    for pair in pairs:
        rho, k = [], []
        for y in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, y])).long()[None]
            log_s, log_q = (m.logits(m(ids[:, :-1]))[0, len(pair.prompt) - 1:].log_softmax(-1)
                            for m in (policy, model))
            taken = torch.arange(len(y)), ids[0, len(pair.prompt):]
            rho.append((log_s - log_q.detach())[taken].sum())
            k.append((log_q.detach().exp() * (log_q.detach() - log_s)).sum())
        u, delta, below = BETA * (rho[0] - rho[1]), BETA * (k[1] - k[0]), float(rho[0] < 0)
        up, down, up_k, down_k = (gradient(x) for x in (*rho, *k))
        for name, h, more in (
                ("dpo", u, 0), ("dpop", u + BETA * LAM * below * rho[0], -LAM * below * up),
                ("tdpo1", u - delta, down_k - up_k), ("tdpo2", u - ALPHA * delta, ALPHA * down_k)):
            expected[name] = expected[name] + g_of(h.detach()) * (down - up + more)
    for name, wanted in expected.items():
        cfg = train.Config(device="cpu", dtype="float64", loss=name, settings=HYPER[name], head_tokens=8)
        reference = Reference(model, partial(train.hidden_states, model, cfg=cfg),
                              partial(train.response_logps, model, cfg=cfg))
        policy.zero_grad()
        train.step(policy, reference, data.collate(pairs), losses.LOSSES[name], 1.0, cfg)
        close(torch.cat([p.grad.flatten() for p in policy.parameters()]), wanted, 1e-12)

def test_sequential_kl_by_enumeration_forward_and_reverse():
    """Chain rule: E_ref D_SeqKL = KL(pi_ref || pi) over responses; the other ways round it is another."""
    policy = randn(13, TOKENS, seed=45)
    pi, forward, reverse = world_probabilities(policy), seq_kl(REFERENCE, policy), seq_kl(policy, REFERENCE)
    close((PI_REF * forward).sum(), kl(PI_REF, pi))
    close((pi * reverse).sum(), kl(pi, PI_REF))
    seen = [float((a * b).sum()) for a in (PI_REF, pi) for b in (forward, reverse)]
    assert min(abs(a - b) for a, b in itertools.combinations(seen, 2)) > 1e-3
