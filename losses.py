"""The preference losses, one function per equation, term by term. Needs torch and nothing else.

B pairs, N tokens, V vocabulary, S segments per response, A aspects. Logarithms are natural, units nats.

    log pi(y|x) = sum_t log pi(y_t | x, y_<t)     a SUM over the response, end-of-text included; never a mean
    logratio    = log pi(y|x) - log pi_ref(y|x)   pi is the policy, pi_ref the reference; w chosen, l rejected

Where this file departs from a paper, or a paper is silent and something had to be chosen:
 1. DPOP's hinge max(0, .) has no derivative at 0, where every run starts. relu takes 0 there, so the first
    step is DPO's in exact arithmetic (clamp(min=0) takes 1 + lam before torch 2.14). Rounding may still
    switch the hinge on: in bfloat16 it does so wrongly for many pairs of the first steps.
 2. DPOP is Eq. 3 as printed: beta multiplies the lam term; the hinge is on the sequence, not on each token.
 3. TDPO's sequential KL is forward, KL(pi_ref || pi), over the full vocabulary, at response positions only.
    TDPO2 stops the gradient of the chosen KL and of nothing else. TDPO's equation numbers come from one
    careful summary and agree with a follow-up paper; we have not seen the numbered text itself.
 4. 2D-DPO prints segment k as tokens n_k ... n_k + l_k. We read it half-open: no boundary token counts twice.
 5. 2D-DPO's selection: the k-th best chosen segment meets the k-th worst rejected one, equal rewards keep the
    order of the text, and the sum over the N pairs is not divided by N. Rewards that differ by rounding are
    equal: sorted, a gap above 1e-5 parts them, so a chain of small gaps is one reward. A masked segment
    (padding, or a segment without a token of its own) is neither selected nor counted.
 6. 2D-DPO leaves the scale of the scores open: data.py divides each aspect by its maximum over the training
    data, so that held-out scores may exceed 1. We follow the paper literally: a rejected segment of reward 0
    is then not pushed down at all.
 7. TDPO1's population optimum is not the policy of DPO's Eq. 4; tdpo1_loss says which one it is.
 8. All losses: sums over a response are float64; in float32 a sum of 4096 tokens is off by 1e-2 nats.
 9. All losses: what train.py logs as reward is DPO's, beta log pi/pi_ref. DPOP's own implicit reward has the
    penalty in it, and TDPO's Theorem 4.5 adds beta D_SeqKL.
"""

import functools
import inspect

import torch
import torch.nn.functional as F

# ---- From logits to log-probabilities ----
def at_least_float32(function):
    """Decorator: half precision becomes float32 on the way in; float32 and float64 stay as they are."""
    def widen(x):
        return x.float() if getattr(x, "dtype", None) in (torch.float16, torch.bfloat16) else x

    @functools.wraps(function)
    def widened(*args, **kwargs):
        return function(*map(widen, args), **{name: widen(x) for name, x in kwargs.items()})
    return widened

def alike(*tensors):
    """A ValueError unless they have one shape: (B, 1) beside (B,) would become (B, B) in silence."""
    if any(x.shape != tensors[0].shape for x in tensors):
        raise ValueError(f"one shape is needed, not {', '.join(str(tuple(x.shape)) for x in tensors)}")

@at_least_float32
def token_logps(logits, targets):
    """log pi(y_t | x, y_<t) of every target token.

    Args: logits (..., V), those that *predict* the targets (the shift by one is data.py's); targets (...).
    Returns (...), nats, float32 or float64. No id is ignored: one outside 0 ... V - 1 is an IndexError.
    """
    alike(logits[..., 0], targets)
    # Minus the cross-entropy, which gathers from log_softmax without a second (N, V) matrix in the backward.
    return -F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none",
                            ignore_index=torch.iinfo(torch.int64).min).view_as(targets)

@at_least_float32
def token_kl(ref_logits, logits):
    """KL(pi_ref || pi) at every position, over the full vocabulary: the summand of TDPO's D_SeqKL.

        sum_v q_v (log q_v - log s_v),   q = softmax(ref_logits),   s = softmax(logits)

    A token with q_v = 0 (a logit of -inf: a masked vocabulary) adds 0; q_v > 0 with s_v = 0 makes it +inf.
    Args: ref_logits (N, V), logits (N, V). Returns (N,), nats, >= 0 in exact arithmetic (in float32 a KL near
    0 may come out as -1e-6). Its gradient in logits is s - q.
    """
    alike(ref_logits, logits)
    log_q = F.log_softmax(ref_logits, dim=-1)                       # (N, V)
    log_s = F.log_softmax(logits, dim=-1)                           # (N, V); log(softmax) would underflow
    q = log_q.exp()                                                 # (N, V)
    return (q * torch.where(q > 0, log_q - log_s, 0.0)).sum(-1)     # (N,); 0 (-inf) is 0 here, not NaN

def segment_sum(values, segment, num):
    """The sum of the values in each segment. A response is a segment too: one helper for both sums.

    Args: values (N,); segment (N,), ids 0 ... num - 1. Returns (num,), float64 (float32 on mps, which has no
    float64); a segment without a token is 0.
    """
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    return values.new_zeros(num, dtype=dtype).index_add(0, segment, values.to(dtype))  # (num,)

# ---- The losses. TERMS, at the end, lists their arguments ----
@at_least_float32
def sft_loss(chosen_logps):
    """Supervised fine-tuning: the negative log-likelihood -log pi(y_w|x) of the chosen response.

    Args: chosen_logps (B,). Returns (B,), nats (train.py divides the sum by the number of response tokens).
    """
    return -chosen_logps

@at_least_float32
def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1):
    """Direct Preference Optimization, Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290).

        -log sigma( beta log pi(y_w|x)/pi_ref(y_w|x) - beta log pi(y_l|x)/pi_ref(y_l|x) )

    Args: the four log-probabilities, (B,), nats, summed over the response; beta, 1/nats. Returns (B,).
    """
    alike(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen_logratio = chosen_logps - ref_chosen_logps               # Eq. 7: log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratio = rejected_logps - ref_rejected_logps         # Eq. 7: log pi(y_l|x) / pi_ref(y_l|x)
    return -F.logsigmoid(beta * chosen_logratio - beta * rejected_logratio)  # Eq. 7

@at_least_float32
def dpop_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.3, lam=50.0):
    """DPO-Positive, Eq. 3 of Pal et al. 2024 (arXiv:2402.13228v2).

        -log sigma( beta [ log pi(y_w|x)/pi_ref(y_w|x) - log pi(y_l|x)/pi_ref(y_l|x)
                           - lam * max(0, log pi_ref(y_w|x)/pi(y_w|x)) ] )

    Args: the four log-probabilities, (B,), nats, summed over the response; beta, 1/nats; lam. Returns (B,).
    """
    alike(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen_logratio = chosen_logps - ref_chosen_logps               # Eq. 3: log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratio = rejected_logps - ref_rejected_logps         # Eq. 3: log pi(y_l|x) / pi_ref(y_l|x)
    penalty = F.relu(ref_chosen_logps - chosen_logps)               # Eq. 3: max(0, log pi_ref/pi of y_w)
    penalty = lam * penalty if lam else 0.0                         # lam 0 is DPO, infinite penalty or not
    return -F.logsigmoid(beta * (chosen_logratio - rejected_logratio - penalty))  # Eq. 3

@at_least_float32
def tdpo1_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
               chosen_seq_kl, rejected_seq_kl, *, beta=0.1):
    """Token-level DPO, first form, Eq. 15 of Zeng et al. 2024 (arXiv:2404.11999), from Theorem 4.5.

        -log sigma( u - delta ),  u     = beta log pi(y_w|x)/pi_ref(y_w|x) - beta log pi(y_l|x)/pi_ref(y_l|x)
                                  delta = beta D_SeqKL(x,y_l; pi_ref||pi) - beta D_SeqKL(x,y_w; pi_ref||pi)

    Trained to the end on Bradley-Terry preferences of a reward r it gives, token by token, the policy
    pi_ref e^(Q_ref / beta), Q_ref the mean of r when pi_ref goes on from there. That is not Eq. 4 of DPO, the
    maximum of E r - beta KL(pi || pi_ref): experiments/optima.py shows how far below it lies.
    Args: the log-probabilities and the sequential KLs (Eq. 10), (B,), nats; beta, 1/nats. Returns (B,).
    """
    alike(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_seq_kl, rejected_seq_kl)
    chosen_logratio = chosen_logps - ref_chosen_logps               # Eq. 13: log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratio = rejected_logps - ref_rejected_logps         # Eq. 13: log pi(y_l|x) / pi_ref(y_l|x)
    u = beta * chosen_logratio - beta * rejected_logratio           # Eq. 13: u
    delta = beta * rejected_seq_kl - beta * chosen_seq_kl           # Eq. 14: delta
    return -F.logsigmoid(u - delta)                                 # Eq. 15: P(y_w > y_l) = sigma(u - delta)

@at_least_float32
def tdpo2_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
               chosen_seq_kl, rejected_seq_kl, *, beta=0.1, alpha=0.5):
    """Token-level DPO, second form, Eq. 17 of Zeng et al. 2024 (arXiv:2404.11999).

        -log sigma( u - alpha * delta_2 ),  u as in tdpo1_loss,
        delta_2 = beta D_SeqKL(x,y_l; pi_ref||pi) - sg( beta D_SeqKL(x,y_w; pi_ref||pi) )

    sg is the stop-gradient: the chosen KL enters as a number, only the rejected KL is pulled down.
    Args: the log-probabilities and sequential KLs (Eq. 10), (B,), nats; beta, 1/nats; alpha. Returns (B,).
    """
    alike(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_seq_kl, rejected_seq_kl)
    chosen_logratio = chosen_logps - ref_chosen_logps               # Eq. 13: log pi(y_w|x) / pi_ref(y_w|x)
    rejected_logratio = rejected_logps - ref_rejected_logps         # Eq. 13: log pi(y_l|x) / pi_ref(y_l|x)
    u = beta * chosen_logratio - beta * rejected_logratio           # Eq. 13: u
    delta_2 = beta * rejected_seq_kl - (beta * chosen_seq_kl).detach()  # Eq. 18: delta_2, detach is sg
    return -F.logsigmoid(u - alpha * delta_2)                       # Eq. 17

@at_least_float32
def segment_rewards(scores, aspect_weights):
    """r_k = W r~_k, the weighted aspect scores of each segment, 2D-DPO, Li et al. 2024 (arXiv:2410.19720).

    Args: scores r~ (B, S, A), each aspect in [0, 1]; aspect_weights W (A,), summing to 1. Returns (B, S).
    """
    return (scores * aspect_weights).sum(-1)                        # (B, S)  r_k = W r~_k

@at_least_float32
def dpo2d_vanilla_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
                       chosen_rewards, rejected_rewards, chosen_mask, rejected_mask, *, beta=0.1):
    """2D-DPO without its grouping, Li et al. 2024 (arXiv:2410.19720): one log-sigmoid for the whole pair.

        -log sigma( beta sum_k r_{w,k} log pi(y_{w,k})/pi_ref(y_{w,k})
                  - beta sum_k r_{l,k} log pi(y_{l,k})/pi_ref(y_{l,k}) )

    Args: the log-probabilities of each segment given all before it, nats; rewards; masks, bool (what stands
    where they are False, NaN included, has no effect), all (B, S); beta, 1/nats. Returns (B,).
    """
    chosen_logratio = torch.where(chosen_mask, chosen_logps - ref_chosen_logps, 0.0)  # (B, S)
    rejected_logratio = torch.where(rejected_mask, rejected_logps - ref_rejected_logps, 0.0)  # (B, S)
    r_w = torch.where(chosen_mask, chosen_rewards, 0.0)             # (B, S)
    r_l = torch.where(rejected_mask, rejected_rewards, 0.0)         # (B, S)
    return -F.logsigmoid(beta * (r_w * chosen_logratio).sum(-1)     # vanilla: sum_k r_{w,k} logratio_{w,k}
                         - beta * (r_l * rejected_logratio).sum(-1))  # vanilla: sum_k r_{l,k} logratio_{l,k}

def ascending(values, mask):
    """Segments from the lowest value to the highest, masked ones last: their indices, (B, S), for (B, S).

    Values in one chain of gaps up to 1e-5 are equal (departure 5) and keep the order of the text.
    """
    in_order, place = torch.where(mask, values, torch.inf).sort(dim=-1)  # (B, S)
    rank = (in_order.diff(dim=-1, prepend=in_order[..., :1]) > 1e-5).cumsum(-1)  # (B, S) + 1 at large gaps
    return torch.zeros_like(rank).scatter(-1, place, rank).argsort(dim=-1, stable=True)

@at_least_float32
def select_segments(chosen_rewards, rejected_rewards, chosen_mask, rejected_mask):
    """The selection in 2D-DPO's Eq. 6: the N highest chosen segments against the N lowest rejected ones.

    N = min(S_w, S_l) pair by pair, of the segments that the masks leave. The k-th best meets the k-th worst.
    Args: rewards (B, S) and masks (B, S), bool; S may differ between the two sides.
    Returns (i_w, i_l, paired), each (B, K), K the smaller S: segment indices, and True for k < N.
    """
    best, worst = ascending(-chosen_rewards, chosen_mask), ascending(rejected_rewards, rejected_mask)
    n = torch.minimum(chosen_mask.sum(-1), rejected_mask.sum(-1))   # (B,)
    k = torch.arange(min(best.shape[-1], worst.shape[-1]), device=n.device)  # (K,)
    return best[..., :len(k)], worst[..., :len(k)], k < n.unsqueeze(-1)

@at_least_float32
def dpo2d_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
               chosen_rewards, rejected_rewards, chosen_mask, rejected_mask, *, beta=0.1):
    """2D-DPO, Eq. 6 of Li et al. 2024 (arXiv:2410.19720): one log-sigmoid for each selected pair of segments.

        -sum_{k<N} log sigma( beta r_{w,k} log pi(y_{w,k})/pi_ref(y_{w,k})
                            - beta r_{l,k} log pi(y_{l,k})/pi_ref(y_{l,k}) )

    Args: those of dpo2d_vanilla_loss. Returns (B,); N log 2 at pi = pi_ref. select_segments orders the k.
    """
    i_w, i_l, paired = select_segments(chosen_rewards, rejected_rewards, chosen_mask, rejected_mask)
    chosen_logratio = torch.where(paired, (chosen_logps - ref_chosen_logps).gather(-1, i_w), 0.0)  # (B, K)
    rejected_logratio = torch.where(paired, (rejected_logps - ref_rejected_logps).gather(-1, i_l), 0.0)
    r_w = torch.where(paired, chosen_rewards.gather(-1, i_w), 0.0)  # (B, K)
    r_l = torch.where(paired, rejected_rewards.gather(-1, i_l), 0.0)  # (B, K)
    loss = -F.logsigmoid(beta * r_w * chosen_logratio - beta * r_l * rejected_logratio)  # (B, K)  Eq. 6
    return torch.where(paired, loss, 0.0).sum(-1)                   # Eq. 6: sum over k < N, no 1/N

# ---- The lists. A loss of your own is a function and a line of LOSSES; its signature says what it needs ----

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
TERMS = {  # all that data.pair_terms can give; log-probabilities and KLs are sums, (B,); with scores (B, S)
    "chosen_logps": "log pi(y_w|x)", "rejected_logps": "log pi(y_l|x)",
    "ref_chosen_logps": "log pi_ref(y_w|x)", "ref_rejected_logps": "log pi_ref(y_l|x)",
    "chosen_seq_kl": "D_SeqKL(x, y_w; pi_ref || pi)", "rejected_seq_kl": "D_SeqKL(x, y_l; pi_ref || pi)",
    "chosen_rewards": "r_{w,k}, (B, S)", "rejected_rewards": "r_{l,k}, or with badness 1 - r_{l,k}",
    "chosen_mask": "bool, True where y_w has a segment k, (B, S)", "rejected_mask": "the same of y_l",
    "chosen_length": "tokens of y_w, end-of-text included, (B,)", "rejected_length": "tokens of y_l",
}

def terms_of(loss):
    """The names of the tensors that a loss takes, from TERMS. No ref_* among them: it has no reference."""
    return [name for name, p in inspect.signature(loss).parameters.items() if p.kind is not p.KEYWORD_ONLY]

def knobs_of(loss):
    """The names of a loss's hyper-parameters, its keyword-only arguments, with their defaults or None."""
    return {name: None if p.default is p.empty else p.default
            for name, p in inspect.signature(loss).parameters.items() if p.kind is p.KEYWORD_ONLY}
