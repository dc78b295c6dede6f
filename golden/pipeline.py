"""From the token ids and logits of one regime to every golden result, each equation by losses.py.

A regime is a handful of pairs in the layout that ports use: one row for prompt + chosen, one for prompt +
rejected, padded. B pairs, T columns, V vocabulary, S segments, A aspects, N scored tokens. Every stage is a
function that is called by its name in this module, so that golden/mistakes.py can put a wrong one in its
place, here or in losses.py, and run the same regime again.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # losses.py, whatever the folder

import losses
from model import GPT, GPTConfig

SIDES = ("chosen", "rejected")
N_HEAD = 2                                                       # of the GPT in the regime that has one
HYPER = {                                                        # the hyper-parameters of the golden results
    "sft": {}, "dpo": {"beta": 0.1}, "dpop": {"beta": 0.3, "lam": 5.0}, "tdpo1": {"beta": 0.1},
    "tdpo2": {"beta": 0.1, "alpha": 0.5}, "2d-dpo": {"beta": 0.5}, "2d-dpo-vanilla": {"beta": 0.5},
}
TERMS = {name: losses.terms_of(losses.LOSSES[name]) for name in HYPER}  # the names of its tensors, in order

# ---- Stages. The right choice of each is one line; the comment says what a wrong one would do ----

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

def position_kl(ref_logits, logits, ids, where):
    """KL(pi_ref || pi) over the full vocabulary, whatever the token. (B, T, V) twice, (B, T) -> (N,)."""
    return losses.token_kl(ref_logits[where], logits[where])

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

def normalised(scores, aspect_max, present):
    """Each aspect divided by its maximum, to [0, 1]. Dicts by side of (B, S, A) and of (B, S), bool; (A,)."""
    return {side: x / aspect_max for side, x in scores.items()}

def implicit_reward(name, q, side):
    """beta log pi(y|x)/pi_ref(y|x), what a log calls the reward of a loss. Returns (B,)."""
    return HYPER[name]["beta"] * (q[f"{side}_logps"] - q[f"ref_{side}_logps"])

def loss_value(name, q):
    """The loss (B,) from the quantities q of the regime: one call into losses.py."""
    function = getattr(losses, losses.LOSSES[name].__name__)     # by name: a mistake may stand there
    return function(*[q[source(name, term)] for term in TERMS[name]], **HYPER[name])

def objective(loss):
    """What is differentiated: the sum over the pairs, so that each pair's gradient is its own. (B,) -> ()."""
    return loss.sum()

def reference_after_the_step(policy, reference):
    """The reference's parameters after the policy's step: as they were. Both are dicts by name."""
    return reference

# ---- The whole way ----

def source(name, term):
    """The quantity that a loss receives under this name: one with segments takes sums per segment."""
    if "chosen_rewards" in TERMS[name]:
        return term.replace("_logps", "_segment_logps").replace("_mask", "_segment_mask")
    return term

def unrolled(inputs):
    """The inputs with every row as often one after the other as `repeat` says, where a regime has it."""
    if "repeat" not in inputs:
        return inputs
    times = inputs["repeat"].item()
    rows = {name.removeprefix("period/"): x.repeat(1, times, *[1] * (x.dim() - 2))
            for name, x in inputs.items() if name.startswith("period/")}
    return inputs | rows                                         # (B, T, ...) -> (B, times T, ...)

def model_of(weights):
    """The GPT with these parameters, by name."""
    layers = {name.split(".")[1] for name in weights if name.startswith("h.")}
    (vocab_size, n_embd), block_size = weights["wte.weight"].shape, len(weights["wpe.weight"])
    with torch.random.fork_rng(devices=[]):                      # its random start is not used
        gpt = GPT(GPTConfig(vocab_size, block_size, len(layers), N_HEAD, n_embd))
    gpt.load_state_dict(weights, assign=True)
    return gpt

def parameters_of(inputs, which, dtype):
    """The parameters of "policy" or "reference" among the inputs, by name; "model/" is both."""
    starts = (f"{which}/", "model/")
    return {name.split("/", 1)[1]: x.to(dtype) for name, x in inputs.items() if name.startswith(starts)}

def logits_of_models(inputs, policy, reference):
    """The logits that two GPTs give, by name, and the policy's parameters, by name."""
    logits, parameters = {}, {}
    for ref, weights in (("", policy), ("ref_", reference)):
        gpt = model_of(weights).requires_grad_(not ref)
        for side in SIDES:
            logits[f"{ref}{side}_logits"] = gpt.logits(gpt(inputs[f"{side}_ids"]))
        if not ref:
            parameters = dict(gpt.named_parameters())
    return logits, parameters

def all_logits(inputs, dtype):
    """The logits of a regime, by name, and the parameters behind them: given, or computed by two GPTs."""
    if "chosen_logits" not in inputs:
        return logits_of_models(inputs, *(parameters_of(inputs, which, dtype)
                                          for which in ("policy", "reference")))
    given = {f"{ref}{side}_logits": inputs[f"{ref}{side}_logits"].to(dtype)
             for side in SIDES for ref in ("", "ref_")}
    return given | {f"{side}_logits": given[f"{side}_logits"].requires_grad_() for side in SIDES}, {}

def quantities(inputs, logits, dtype):
    """Everything below the losses: log-probabilities per token, segment and sequence, KL, rewards.

    Args: inputs, the input tensors of a regime by name (golden/README.md lists them); logits, of all_logits;
    dtype to compute in. Returns a dict by name.
    """
    q = {}
    slots = {side: torch.arange(inputs[f"{side}_scores"].shape[1]) for side in SIDES}  # (S,)
    present = {side: (inputs[f"{side}_segments"].unsqueeze(-1) == slots[side]).any(1)
               for side in SIDES}                                # (B, S)
    for side in SIDES:
        ids, mask = inputs[f"{side}_ids"], inputs[f"{side}_response_mask"]  # (B, T)
        B, T = ids.shape
        S = present[side].shape[1]
        z, z_ref = (predicting_logits(logits[f"{ref}{side}_logits"]) for ref in ("", "ref_"))  # (B, T, V)

        def grid(values, where, B=B, T=T):                       # (N,) -> (B, T), 0 elsewhere
            return values.new_zeros(B, T).index_put(where, values)

        q[f"{side}_mask"] = mask
        where = scored_tokens(ids, mask).nonzero(as_tuple=True)  # rows and columns, (N,) each
        segments = token_segments(ids, inputs[f"{side}_segments"], mask)
        for ref, x in (("", z), ("ref_", z_ref)):
            logps = losses.token_logps(x[where], ids[where])                # (N,)
            q[f"{ref}{side}_token_logps"] = grid(logps, where)              # (B, T)
            q[f"{ref}{side}_logps"] = sequence_sum(logps, where[0], B)      # (B,)
            q[f"{ref}{side}_segment_logps"] = segment_logps(q[f"{ref}{side}_token_logps"], segments, S)
        at = kl_tokens(ids, mask).nonzero(as_tuple=True)
        kl = position_kl(z_ref, z, ids, at)                      # (N,)
        q[f"{side}_token_kl"] = grid(kl, at)                     # (B, T)
        q[f"{side}_seq_kl"] = sequence_kl(kl, at[0], B)          # (B,)
        q[f"{side}_segment_mask"] = present[side]
    scores = normalised({side: inputs[f"{side}_scores"].to(dtype) for side in SIDES},
                        inputs["aspect_max"].to(dtype), present)
    for side in SIDES:
        q[f"{side}_rewards"] = losses.segment_rewards(scores[side], inputs["aspect_weights"].to(dtype))
    return q

def results_below(q):
    """The results that belong to no loss: sums, KLs, rewards, the selection."""
    out = {f"{ref}{side}_{what}": q[f"{ref}{side}_{what}"] for side in SIDES for ref in ("", "ref_")
           for what in ("token_logps", "logps", "segment_logps")}
    out |= {f"{side}_{what}": q[f"{side}_{what}"] for side in SIDES
            for what in ("token_kl", "seq_kl", "rewards")}
    i_w, i_l, paired = losses.select_segments(q["chosen_rewards"], q["rejected_rewards"],
                                              q["chosen_segment_mask"], q["rejected_segment_mask"])
    out["chosen_selected"] = torch.where(paired, i_w, -1)        # (B, K)
    out["rejected_selected"] = torch.where(paired, i_l, -1)      # (B, K)
    return {name: value.detach() for name, value in out.items()}

def results_of(name, q, logits, parameters, gradients=True):
    """The results of one loss: its value, its rewards, its gradients.

    gradients=False leaves out those in the logits and in a model's parameters (the slow half).
    """
    terms, loss = TERMS[name], loss_value(name, q)
    out = {f"{name}/loss": loss}
    leaves = {f"{name}/grad_{term}": q[source(name, term)] for term in terms
              if term.endswith(("logps", "kl")) and not term.startswith("ref_")}
    if gradients and parameters:
        leaves |= {f"{name}/grad/{parameter}": p for parameter, p in parameters.items()}
    elif gradients:
        leaves |= {f"{name}/grad_{side}_logits": logits[f"{side}_logits"] for side in SIDES
                   if f"{side}_logps" in terms}
    out |= dict(zip(leaves, torch.autograd.grad(objective(loss), list(leaves.values()), retain_graph=True,
                                                materialize_grads=True), strict=True))
    return {name: value.detach() for name, value in (out | rewards_of(name, q)).items()}

def rewards_of(name, q):
    """What a log calls the rewards of a loss, by name: of the four losses without segments."""
    if "ref_chosen_logps" not in TERMS[name] or "chosen_rewards" in TERMS[name]:
        return {}
    return {f"{name}/{side}_reward": implicit_reward(name, q, side) for side in SIDES}

def results_after_a_step(name, inputs, dtype):
    """One loss and its rewards after a step of gradient descent on it, w - rate dL/dw, from the reference."""
    policy, reference = (parameters_of(inputs, which, dtype) for which in ("policy", "reference"))
    logits, parameters = logits_of_models(inputs, policy, reference)
    loss = objective(loss_value(name, quantities(inputs, logits, dtype)))
    steps = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    policy = {parameter: (p - inputs["rate"].to(dtype) * step).detach()
              for (parameter, p), step in zip(parameters.items(), steps, strict=True)}
    logits, _ = logits_of_models(inputs, policy, reference_after_the_step(policy, reference))
    q = quantities(inputs, logits, dtype)
    return {name: value.detach() for name, value in
            ({f"{name}/loss": loss_value(name, q)} | rewards_of(name, q)).items()}

def results(inputs, dtype, gradients=True):
    """Every golden result of one regime.

    Args: inputs, as in `quantities`; dtype, torch.float64 or torch.float32; gradients as in `results_of`.
    Returns a dict, name -> tensor: "chosen_logps", ..., "dpo/loss" (B,), "dpo/grad_chosen_logps", ...
    """
    inputs = unrolled(inputs)
    if "rate" in inputs:
        return {k: x for name in TERMS for k, x in results_after_a_step(name, inputs, dtype).items()}
    logits, parameters = all_logits(inputs, dtype)
    q = quantities(inputs, logits, dtype)
    out = results_below(q)
    for name in TERMS:
        out |= results_of(name, q, logits, parameters, gradients)
    return out
