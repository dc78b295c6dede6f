"""The preference losses, one function per equation, term by term. Needs torch and nothing else.

B pairs, N tokens, V vocabulary, S segments per response, A aspects. Logarithms are natural, units nats.

    log pi(y|x) = sum_t log pi(y_t | x, y_<t)     a SUM over the response, end-of-text included; never a mean
    logratio    = log pi(y|x) - log pi_ref(y|x)   pi is the policy, pi_ref the reference; w chosen, l rejected

Where this file departs from a paper, or a paper is silent and something had to be chosen:
 1. DPOP's hinge max(0, .) has no derivative at 0, where every run starts. relu takes 0 there, so the first
    step is DPO's in exact arithmetic (clamp(min=0) takes 1 + lam); rounding may still switch the hinge on.
 2. DPOP is Eq. 3 as printed: beta multiplies the lam term; the hinge is on the sequence, not on each token.
 3. TDPO's sequential KL is forward, KL(pi_ref || pi), over the full vocabulary, at response positions only.
    TDPO2 stops the gradient of the chosen KL and of nothing else. TDPO's equation numbers come from one
    careful summary and agree with a follow-up paper; we have not seen the numbered text itself.
 4. 2D-DPO prints segment k as tokens n_k ... n_k + l_k. We read it half-open: no boundary token counts twice.
 5. 2D-DPO's selection: the k-th best chosen segment meets the k-th worst rejected one, equal rewards keep the
    order of the text, and the sum over the N pairs is not divided by N. Rewards are equal when they agree to
    1e-5: sums of the same scores in another order differ by rounding. A masked segment (padding, or a segment
    without a token of its own) is neither selected nor counted.
 6. 2D-DPO leaves the scale of the scores open: data.py divides each aspect by its maximum over the training
    data. We follow the paper literally: a rejected segment of reward 0 is then not pushed down at all.
"""

import functools
import inspect

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------
# From logits to log-probabilities


def at_least_float32(function):
    """Decorator: half precision becomes float32 on the way in; float32 and float64 stay as they are.

    A sum of 3000 ones is 2048 in float16 and 256 in bfloat16.
    """
    def widen(x):
        half = isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16)
        return x.float() if half else x

    @functools.wraps(function)
    def widened(*args, **kwargs):
        return function(*map(widen, args), **{name: widen(x) for name, x in kwargs.items()})
    return widened


@at_least_float32
def token_logps(logits, targets):
    """log pi(y_t | x, y_<t) of every target token.

    Args: logits (..., V), those that *predict* the targets (the shift by one is data.py's); targets (...).
    Returns (...), nats, float32 or float64. No id is ignored: one outside 0 ... V - 1 is an IndexError.
    """
    # Minus the cross-entropy, which gathers from log_softmax without a second (N, V) matrix in the backward.
    flat = logits.flatten(0, -2) if logits.dim() > 1 else logits
    return -F.cross_entropy(flat, targets.flatten() if targets.dim() else targets, reduction="none",
                            ignore_index=torch.iinfo(torch.int64).min).view_as(targets)


@at_least_float32
def token_kl(ref_logits, logits):
    """KL(pi_ref || pi) at every position, over the full vocabulary: the summand of TDPO's D_SeqKL.

        sum_v q_v (log q_v - log s_v),   q = softmax(ref_logits),   s = softmax(logits)

    A token with q_v = 0 (a logit of -inf, as in a masked vocabulary) adds 0; one with q_v > 0 and s_v = 0
    makes the KL +inf.
    Args: ref_logits (N, V), logits (N, V). Returns (N,), nats, >= 0 in exact arithmetic (in float32 a KL near
    0 may come out as -1e-6). Its gradient in logits is s - q.
    """
    log_q = F.log_softmax(ref_logits, dim=-1)                       # (N, V)
    log_s = F.log_softmax(logits, dim=-1)                           # (N, V); log(softmax) would underflow
    q = log_q.exp()                                                 # (N, V)
    return (q * torch.where(q > 0, log_q - log_s, 0.0)).sum(-1)     # (N,); 0 (-inf) is 0 here, not NaN


@at_least_float32
def segment_sum(values, segment, num):
    """The sum of the values in each segment. A response is a segment too: one helper for both sums.

    Args: values (N,); segment (N,), ids 0 ... num - 1. Returns (num,); a segment without a token is 0.
    """
    return values.new_zeros(num, dtype=torch.float64).index_add(0, segment, values.double())  # (num,)


# ---------------------------------------------------------------------------------------------------------
# One response


@at_least_float32
def sft_loss(chosen_logps):
    """Supervised fine-tuning: the negative log-likelihood -log pi(y_w|x) of the chosen response.

    Args: chosen_logps (B,). Returns (B,), nats (train.py divides the sum by the number of response tokens).
    """
    return -chosen_logps


# ---------------------------------------------------------------------------------------------------------
# Two responses


@at_least_float32
def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta):
    """Direct Preference Optimization, Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290).

        -log sigma( beta log pi(y_w|x)/pi_ref(y_w|x) - beta log pi(y_l|x)/pi_ref(y_l|x) )

    Args: the four log-probabilities, (B,), nats, summed over the response; beta, 1/nats. Returns (B,).
    """
    chosen_logratio = chosen_logps - ref_chosen_logps               # Eq. 7: log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratio = rejected_logps - ref_rejected_logps         # Eq. 7: log pi(y_l|x) / pi_ref(y_l|x)
    return -F.logsigmoid(beta * chosen_logratio - beta * rejected_logratio)  # Eq. 7


@at_least_float32
def dpop_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta, lam):
    """DPO-Positive, Eq. 3 of Pal et al. 2024 (arXiv:2402.13228v2).

        -log sigma( beta [ log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)
                           - lam * max(0, log pi_ref(y_w|x)/pi(y_w|x)) ] )

    Args: the four log-probabilities, (B,), nats, summed over the response; beta, 1/nats; lam. Returns (B,).
    """
    chosen_logratio = chosen_logps - ref_chosen_logps               # Eq. 3: log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratio = rejected_logps - ref_rejected_logps         # Eq. 3: log pi(y_l|x) / pi_ref(y_l|x)
    penalty = F.relu(ref_chosen_logps - chosen_logps)               # Eq. 3: max(0, log pi_ref/pi of y_w)
    penalty = lam * penalty if lam else 0.0                         # lam 0 is DPO, infinite penalty or not
    return -F.logsigmoid(beta * (chosen_logratio - rejected_logratio - penalty))  # Eq. 3


@at_least_float32
def tdpo1_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
               chosen_seq_kl, rejected_seq_kl, *, beta):
    """Token-level DPO, first form, Eq. 15 of Zeng et al. 2024 (arXiv:2404.11999), from Theorem 4.5.

        -log sigma( u - delta ),  u     = beta log pi(y_w|x)/pi_ref(y_w|x) - beta log pi(y_l|x)/pi_ref(y_l|x)
                                  delta = beta D_SeqKL(x,y_l; pi_ref||pi) - beta D_SeqKL(x,y_w; pi_ref||pi)

    Args: the four log-probabilities, (B,), nats, summed over the response; the two sequential KLs (Eq. 10),
    (B,), nats, token_kl summed over the response; beta, 1/nats. Returns (B,).
    """
    chosen_logratio = chosen_logps - ref_chosen_logps               # Eq. 13: log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratio = rejected_logps - ref_rejected_logps         # Eq. 13: log pi(y_l|x) / pi_ref(y_l|x)
    u = beta * chosen_logratio - beta * rejected_logratio           # Eq. 13: u
    delta = beta * rejected_seq_kl - beta * chosen_seq_kl           # Eq. 14: delta
    return -F.logsigmoid(u - delta)                                 # Eq. 15: P(y_w > y_l) = sigma(u - delta)


@at_least_float32
def tdpo2_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
               chosen_seq_kl, rejected_seq_kl, *, beta, alpha):
    """Token-level DPO, second form, Eq. 17 of Zeng et al. 2024 (arXiv:2404.11999).

        -log sigma( u - alpha * delta_2 ),  u       = as in tdpo1_loss
                                            delta_2 = beta D_SeqKL(x,y_l; pi_ref||pi)
                                                      - sg( beta D_SeqKL(x,y_w; pi_ref||pi) )

    sg is the stop-gradient: the chosen KL enters as a number, only the rejected KL is pulled down.
    Args: the four log-probabilities, (B,), nats, summed over the response; the two sequential KLs (Eq. 10),
    (B,), nats, token_kl summed over the response; beta, 1/nats; alpha. Returns (B,).
    """
    chosen_logratio = chosen_logps - ref_chosen_logps               # Eq. 13: log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratio = rejected_logps - ref_rejected_logps         # Eq. 13: log pi(y_l|x) / pi_ref(y_l|x)
    u = beta * chosen_logratio - beta * rejected_logratio           # Eq. 13: u
    delta_2 = beta * rejected_seq_kl - (beta * chosen_seq_kl).detach()  # Eq. 18: delta_2, detach is sg
    return -F.logsigmoid(u - alpha * delta_2)                       # Eq. 17


# ---------------------------------------------------------------------------------------------------------
# Two responses in segments, each segment scored on several aspects


@at_least_float32
def segment_rewards(scores, aspect_weights):
    """r_k = W r~_k, the weighted aspect scores of each segment, 2D-DPO, Li et al. 2024 (arXiv:2410.19720).

    Args: scores r~ (B, S, A), each aspect in [0, 1]; aspect_weights W (A,), summing to 1. Returns (B, S).
    """
    return (scores * aspect_weights).sum(-1)                        # (B, S)  r_k = W r~_k


@at_least_float32
def dpo2d_vanilla_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
                       chosen_rewards, rejected_rewards, chosen_mask, rejected_mask, *, beta):
    """2D-DPO without its grouping, Li et al. 2024 (arXiv:2410.19720): one log-sigmoid for the whole pair.

        -log sigma( beta sum_k r_{w,k} log pi(y_{w,k})/pi_ref(y_{w,k})
                  - beta sum_k r_{l,k} log pi(y_{l,k})/pi_ref(y_{l,k}) )

    Args: the four log-probabilities, (B, S), nats, summed over each segment (given all before it); rewards
    r, (B, S); masks, (B, S), bool, True where a segment exists (what stands elsewhere, NaN included, has
    no effect); beta, 1/nats. Returns (B,).
    """
    chosen_logratio = torch.where(chosen_mask, chosen_logps - ref_chosen_logps, 0.0)  # (B, S)
    rejected_logratio = torch.where(rejected_mask, rejected_logps - ref_rejected_logps, 0.0)  # (B, S)
    r_w = torch.where(chosen_mask, chosen_rewards, 0.0)             # (B, S)
    r_l = torch.where(rejected_mask, rejected_rewards, 0.0)         # (B, S)
    return -F.logsigmoid(beta * (r_w * chosen_logratio).sum(-1)     # vanilla: sum_k r_{w,k} logratio_{w,k}
                         - beta * (r_l * rejected_logratio).sum(-1))  # vanilla: sum_k r_{l,k} logratio_{l,k}


@at_least_float32
def select_segments(chosen_rewards, rejected_rewards, chosen_mask, rejected_mask):
    """The selection in 2D-DPO's Eq. 6: the N highest chosen segments against the N lowest rejected ones.

    N = min(S_w, S_l) pair by pair, of the segments that the masks leave. The k-th best meets the k-th worst,
    equal rewards in the order of the text; rewards that differ by rounding only are equal (departure 5).
    Args: rewards (B, S) and masks (B, S), bool; S may differ between the two sides.
    Returns (i_w, i_l, paired), each (B, K), K the smaller S: segment indices, and True for k < N.
    """
    def cluster(r):                                                 # glue, replaced by branch proof
        value, index = r.sort(dim=-1)
        step = (value.diff(dim=-1) > 1e-5).cumsum(-1)
        return torch.zeros_like(r).scatter(-1, index, F.pad(step, (1, 0)).to(r.dtype))

    r_w, r_l = cluster(chosen_rewards), cluster(rejected_rewards)   # (B, S)
    best = torch.where(chosen_mask, r_w, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    worst = torch.where(rejected_mask, r_l, torch.inf).argsort(dim=-1, stable=True)
    n = torch.minimum(chosen_mask.sum(-1), rejected_mask.sum(-1))   # (B,)
    k = torch.arange(min(best.shape[-1], worst.shape[-1]), device=n.device)  # (K,)
    return best[..., :len(k)], worst[..., :len(k)], k < n.unsqueeze(-1)


@at_least_float32
def dpo2d_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
               chosen_rewards, rejected_rewards, chosen_mask, rejected_mask, *, beta):
    """2D-DPO, Eq. 6 of Li et al. 2024 (arXiv:2410.19720): one log-sigmoid for each selected pair of segments.

        -sum_{k<N} log sigma( beta r_{w,k} log pi(y_{w,k})/pi_ref(y_{w,k})
                            - beta r_{l,k} log pi(y_{l,k})/pi_ref(y_{l,k}) )

    with k in the order of select_segments.
    Args: the four log-probabilities, (B, S), nats, summed over each segment (given all before it); rewards
    r, (B, S); masks, (B, S), bool, True where a segment exists; beta, 1/nats.
    Returns (B,); N log 2 at pi = pi_ref.
    """
    i_w, i_l, paired = select_segments(chosen_rewards, rejected_rewards, chosen_mask, rejected_mask)
    chosen_logratio = torch.where(paired, (chosen_logps - ref_chosen_logps).gather(-1, i_w), 0.0)  # (B, K)
    rejected_logratio = torch.where(paired, (rejected_logps - ref_rejected_logps).gather(-1, i_l), 0.0)
    r_w = torch.where(paired, chosen_rewards.gather(-1, i_w), 0.0)  # (B, K)
    r_l = torch.where(paired, rejected_rewards.gather(-1, i_l), 0.0)  # (B, K)
    loss = -F.logsigmoid(beta * r_w * chosen_logratio - beta * r_l * rejected_logratio)  # (B, K)  Eq. 6
    return torch.where(paired, loss, 0.0).sum(-1)                   # Eq. 6: sum over k < N, no 1/N


# ---------------------------------------------------------------------------------------------------------
# The list of losses. A loss of your own is a function and a line here; its signature says what it needs.

LOSSES = {
    "sft": sft_loss,
    "dpo": dpo_loss,
    "dpop": dpop_loss,
    "tdpo1": tdpo1_loss,
    "tdpo2": tdpo2_loss,
    "2d-dpo": dpo2d_loss,
    "2d-dpo-vanilla": dpo2d_vanilla_loss,
}
SELECTING = {dpo2d_loss}  # these pick segments by reward: with 1 - reward they would pick the wrong ones


def terms_of(loss):
    """The names of the tensors that a loss takes, from data.pair_terms. No ref_*: it has no reference."""
    return [name for name, p in inspect.signature(loss).parameters.items() if p.kind is not p.KEYWORD_ONLY]


def knobs_of(loss):
    """The names of a loss's hyper-parameters, its keyword-only arguments, with their defaults or None."""
    return {name: None if p.default is p.empty else p.default
            for name, p in inspect.signature(loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
