"""From the token ids and logits of one regime to every golden result, each equation by losses.py.

A regime is a handful of pairs in the layout that ports use: one row for prompt + chosen, one for prompt +
rejected, padded on the right. B pairs, T columns, V vocabulary, S segments, A aspects, N scored tokens.
Every stage is a function that is called by its name in this module, so that golden/mistakes.py can put a
wrong one in its place, here or in losses.py, and run the same regime again.
"""

import inspect
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # losses.py, whatever the folder

import losses

SIDES = ("chosen", "rejected")
LOSSES = {                                                       # loss: its function in losses.py, its knobs
    "sft": ("sft_loss", {}),
    "dpo": ("dpo_loss", {"beta": 0.1}),
    "dpop": ("dpop_loss", {"beta": 0.3, "lam": 5.0}),
    "tdpo1": ("tdpo1_loss", {"beta": 0.1}),
    "tdpo2": ("tdpo2_loss", {"beta": 0.1, "alpha": 0.5}),
    "2d-dpo-vanilla": ("dpo2d_vanilla_loss", {"beta": 0.5}),
    "2d-dpo": ("dpo2d_loss", {"beta": 0.5}),
}
ARGUMENTS = {                                                    # loss: the names of its tensors, in order
    name: [p.name for p in inspect.signature(getattr(losses, function)).parameters.values()
           if p.kind is p.POSITIONAL_OR_KEYWORD]
    for name, (function, _) in LOSSES.items()
}


# ---------------------------------------------------------------------------------------------------------
# Stages. The right choice of each is one line; the comment says what a wrong one would do.


def predicting_logits(logits):
    """The logits that predict token t, at column t: the shift by one. (B, T, V) -> (B, T, V).

    Nothing predicts token 0; it stands in no response.
    """
    return torch.cat([torch.zeros_like(logits[:, :1]), logits[:, :-1]], dim=1)  # (B, T, V)


def scored_tokens(ids, response_mask):
    """Which tokens count: all of the response, its end-of-text included, and nothing else. (B, T), bool."""
    return response_mask


def kl_tokens(ids, response_mask):
    """At which tokens the sequential KL is summed: the same ones. (B, T), bool."""
    return scored_tokens(ids, response_mask)


def position_kl(ref_logits, logits, targets):
    """KL(pi_ref || pi) over the full vocabulary, whatever the target. (N, V), (N, V), (N,) -> (N,)."""
    return losses.token_kl(ref_logits, logits)


def sequence_sum(values, row, rows):
    """log pi(y|x) from its tokens. (N,), (N,) -> (rows,)."""
    return losses.segment_sum(values, row, rows)


def sequence_kl(values, row, rows):
    """D_SeqKL from its positions. (N,), (N,) -> (rows,)."""
    return losses.segment_sum(values, row, rows)


def token_segments(ids, segments, response_mask):
    """The segment of every token, -1 for none. (B, T) -> (B, T)."""
    return segments


def segment_logps(token_logps, segments, num):
    """Log-probabilities summed over each half-open segment. (B, T), (B, T) -> (B, num)."""
    rows = len(segments)
    slot = torch.where(segments < 0, num, segments)              # tokens in no segment: a last slot, dropped
    slot = slot + (num + 1) * torch.arange(rows).unsqueeze(-1)   # (B, T)
    sums = losses.segment_sum(token_logps.flatten(), slot.flatten(), rows * (num + 1))
    return sums.view(rows, num + 1)[:, :num]                     # (B, num)


def normalised(scores, aspect_max):
    """Each aspect divided by its maximum, to [0, 1]. (B, S, A), (A,) -> (B, S, A)."""
    return scores / aspect_max


def implicit_reward(logps, ref_logps, seq_kl, *, beta):
    """beta log pi(y|x)/pi_ref(y|x), what a log calls rewards. (B,), three times -> (B,)."""
    return beta * (logps - ref_logps)


def loss_value(name, q):
    """The loss (B,) from the quantities q of the regime: one call into losses.py."""
    function, knobs = LOSSES[name]
    return getattr(losses, function)(*[q[argument_source(name, a)] for a in ARGUMENTS[name]], **knobs)


def objective(loss):
    """What is differentiated: the sum over the pairs, so that each pair's gradient is its own. (B,) -> ()."""
    return loss.sum()


# ---------------------------------------------------------------------------------------------------------
# The whole way


def argument_source(name, argument):
    """The quantity that a loss receives as this argument: 2D-DPO's log-probabilities are sums per segment."""
    if name.startswith("2d"):
        return argument.replace("_logps", "_segment_logps").replace("_mask", "_segment_mask")
    return argument


def quantities(inputs, dtype):
    """Everything below the losses: log-probabilities per token, segment and sequence, KL, rewards.

    Args: inputs, the input tensors of a regime by name (golden/README.md lists them); dtype to compute in.
    Returns a dict by name; `chosen_logits` and `rejected_logits` in it are the leaves of the gradients.
    """
    q = {}
    for side in SIDES:
        ids, mask = inputs[f"{side}_ids"], inputs[f"{side}_response_mask"]  # (B, T)
        scores = inputs[f"{side}_scores"].to(dtype)              # (B, S, A)
        B, T = ids.shape
        S = scores.shape[1]
        logits = inputs[f"{side}_logits"].to(dtype).requires_grad_()  # (B, T, V)
        z = predicting_logits(logits)
        z_ref = predicting_logits(inputs[f"ref_{side}_logits"].to(dtype))

        def grid(values, where, B=B, T=T):                       # (N,) -> (B, T), 0 elsewhere
            return values.new_zeros(B, T).index_put(where, values)

        where = scored_tokens(ids, mask).nonzero(as_tuple=True)  # rows and columns, (N,) each
        segments = token_segments(ids, inputs[f"{side}_segments"], mask)
        for ref, source in (("", z), ("ref_", z_ref)):
            logps = losses.token_logps(source[where], ids[where])           # (N,)
            q[f"{ref}{side}_token_logps"] = grid(logps, where)              # (B, T)
            q[f"{ref}{side}_logps"] = sequence_sum(logps, where[0], B)      # (B,)
            q[f"{ref}{side}_segment_logps"] = segment_logps(q[f"{ref}{side}_token_logps"], segments, S)
        at = kl_tokens(ids, mask).nonzero(as_tuple=True)
        kl = position_kl(z_ref[at], z[at], ids[at])              # (N,)
        q[f"{side}_token_kl"] = grid(kl, at)                     # (B, T)
        q[f"{side}_seq_kl"] = sequence_kl(kl, at[0], B)          # (B,)
        present = inputs[f"{side}_segments"].unsqueeze(-1) == torch.arange(S)  # (B, T, S)
        q[f"{side}_segment_mask"] = present.any(1)               # (B, S)
        q[f"{side}_rewards"] = losses.segment_rewards(normalised(scores, inputs["aspect_max"].to(dtype)),
                                                      inputs["aspect_weights"].to(dtype))  # (B, S)
        q[f"{side}_logits"] = logits
    return q


def results(inputs, dtype, logit_gradients=True):
    """Every golden result of one regime.

    Args: inputs, as in `quantities`; dtype, torch.float64 or torch.float32; logit_gradients=False leaves out
    the gradients in the logits (the slow half).
    Returns a dict, name -> tensor: "chosen_logps", ..., "dpo/loss" (B,), "dpo/grad_chosen_logps", ...
    """
    q = quantities(inputs, dtype)
    out = {f"{ref}{side}_{what}": q[f"{ref}{side}_{what}"] for side in SIDES for ref in ("", "ref_")
           for what in ("token_logps", "logps", "segment_logps")}
    out |= {f"{side}_{what}": q[f"{side}_{what}"] for side in SIDES
            for what in ("token_kl", "seq_kl", "rewards")}
    i_w, i_l, paired = losses.select_segments(q["chosen_rewards"], q["rejected_rewards"],
                                              q["chosen_segment_mask"], q["rejected_segment_mask"])
    out["chosen_selected"] = torch.where(paired, i_w, -1)        # (B, K)
    out["rejected_selected"] = torch.where(paired, i_l, -1)      # (B, K)
    for name in LOSSES:
        loss = loss_value(name, q)
        out[f"{name}/loss"] = loss
        with_respect_to = {f"{name}/grad_{a}": q[argument_source(name, a)] for a in ARGUMENTS[name]
                           if a.endswith(("logps", "kl")) and not a.startswith("ref_")}
        if logit_gradients:
            with_respect_to |= {f"{name}/grad_{side}_logits": q[f"{side}_logits"] for side in SIDES
                                if f"{side}_logps" in ARGUMENTS[name]}
        gradients = torch.autograd.grad(objective(loss), list(with_respect_to.values()), retain_graph=True,
                                        materialize_grads=True)
        out |= dict(zip(with_respect_to, gradients, strict=True))
        if name in ("dpo", "dpop", "tdpo1", "tdpo2"):
            beta = LOSSES[name][1]["beta"]
            for side in SIDES:
                out[f"{name}/{side}_reward"] = implicit_reward(q[f"{side}_logps"], q[f"ref_{side}_logps"],
                                                               q[f"{side}_seq_kl"], beta=beta)
    return {name: value.detach() for name, value in out.items()}
