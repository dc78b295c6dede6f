"""Known mistakes in ports of these losses, each as code that puts it in the place of the right line.

One list serves twice: tests/test_mistakes.py applies each of them and requires the test suite to notice;
golden/check.py runs the golden inputs through each of them to say which one a port's wrong number equals.

A mistake is a set of replacements, "module.attribute" -> function. Those in losses.* are seen by every test
that calls losses.py; those in golden.pipeline.* happen around the losses, in the handling of a batch.
A replacement calls the right function through `right` (losses.py) or `stage` (the pipeline), frozen here; a
`Wrap` calls what stands there at that moment, so that two mistakes can be made at once.
Letters of the short functions: w and l chosen and rejected, c their log-ratios, k their KLs, r their rewards.
"""

import math
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import losses
from golden import pipeline

right = SimpleNamespace(**vars(losses))
stage = SimpleNamespace(**vars(pipeline))

NOTEBOOK = "rasbt/LLMs-from-scratch, ch07 DPO notebook"
X_TRANSFORMERS = "lucidrains/x-transformers, x_transformers/dpo.py"
TDPO_AUTHORS = "Vance0124/Token-level-Direct-Preference-Optimization"
MLX = "Goekdeniz-Guelmez/mlx-lm-lora, dpo_trainer.py, and its copies"

@dataclass(frozen=True)
class Wrap:
    """A replacement made from the function in its place: make(function) -> function."""
    make: object

@dataclass(frozen=True, eq=False)
class Mistake:
    """One wrong variant and the words for it.

    name: in kebab case. says: what follows "your ... equals". patches: "module.attribute" -> replacement.
    seen: where it was published; "ports": no place on record. definition: True for what is no mistake but
    another definition, of a number that only a log shows.
    """
    name: str
    says: str
    patches: dict = field(repr=False)
    seen: str = "ports"
    definition: bool = False

    @contextmanager
    def applied(self):
        """While this lasts the mistake stands in the place of the right code."""
        places = []
        for target, replacement in self.patches.items():
            module, attribute = target.rsplit(".", 1)
            module = sys.modules[module]
            there = getattr(module, attribute)
            places.append((module, attribute, there))
            new = replacement.make(there) if isinstance(replacement, Wrap) else replacement
            setattr(module, attribute, new)
        try:
            yield
        finally:
            for place in places:
                setattr(*place)

SLOPE = 0.0                                                      # of every hinge below, at 0 exactly

@contextmanager
def applied(mistakes, slope=0.0):
    """Several mistakes at once, with hinges of this slope at 0. Wraps go around what replaces a function."""
    global SLOPE
    with ExitStack() as stack:
        for mistake in sorted(mistakes, key=lambda m: any(isinstance(p, Wrap) for p in m.patches.values())):
            stack.enter_context(mistake.applied())
        SLOPE = slope
        try:
            yield
        finally:
            SLOPE = 0.0

def combine(a, b):
    """Whether both mistakes can be made at once: neither would undo the other."""
    both = a.patches.keys() & b.patches.keys()
    return all(isinstance(a.patches[t], Wrap) or isinstance(b.patches[t], Wrap) for t in both)

def hinge(x):
    """max(0, x), written without any framework's own, whose slope at 0 differs from one to the next."""
    return torch.where(x > 0, x, torch.where(x == 0, SLOPE * x, 0.0))

def around(**replacements):
    """Patches of golden.pipeline."""
    return {f"golden.pipeline.{name}": function for name, function in replacements.items()}

def inside(**replacements):
    """Patches of losses.py."""
    return {f"losses.{name}": function for name, function in replacements.items()}

def sg(x):
    return x.detach()

def softplus(h):
    """-log sigma(-h)"""
    return -F.logsigmoid(-h)

def nls(h):
    """-log sigma(h), with the log-sigmoid that losses.py uses at that moment."""
    return -losses.F.logsigmoid(h)

def mean_of_rows(values, row, rows):
    count = right.segment_sum(torch.ones_like(values), row, rows)
    return right.segment_sum(values, row, rows) / count.clamp(min=1)

# ---- The batch: which logits, which tokens, which segments ----

def one_later(x, first):
    """Each row moved one column to the right; `first` is what enters on the left."""
    return torch.cat([torch.full_like(x[:, :1], first), x[:, :-1]], dim=1)

def prompt_too(ids, mask):
    return (mask.flip(1).cumsum(1).flip(1) > 0) & (torch.arange(ids.shape[1]) > 0)  # nothing predicts token 0

def last_prompt_token_too(ids, mask):
    return mask | one_later(mask.flip(1), False).flip(1) & prompt_too(ids, mask)

def padding_too(ids, mask):
    return mask.cumsum(1) > 0                                    # from the first response token on

def without_end_of_text(ids, mask):
    return mask & (mask.flip(1).cumsum(1).flip(1) > 1)           # all but the last token of the response

def begin_of_text_too(ids, mask):
    return mask | (ids == 5) & one_later(mask.flip(1), False).flip(1)

def between_too(ids, mask):
    return padding_too(ids, mask) & (mask.flip(1).cumsum(1).flip(1) > 0)

def counted_from_the_left(ids, mask):
    """The response's columns less those of the padding before the prompt: as if rows began at column 0."""
    pads = ((ids == ids[:, -1:]).cumprod(1).sum(1) * mask[:, -1]).unsqueeze(1)  # no right padding: left
    column = torch.arange(ids.shape[1])
    return mask.gather(1, (column + pads) % len(column)) & (column > 0)

def label_kl(estimate):
    """A KL from the log-probabilities of the label alone; estimate(log q, log s)."""
    def position_kl(ref_logits, logits, ids, where):
        return estimate(*(right.token_logps(z[where], ids[where]) for z in (ref_logits, logits)))
    return around(position_kl=position_kl)

def kl_one_column_late(ref_logits, logits, ids, where):
    after = where[0], (where[1] + 1).clamp(max=ids.shape[1] - 1)
    return losses.token_kl(ref_logits[after], logits[after])

def segments_from_row_start(ids, segments, mask):
    """Boundaries counted in response tokens, looked up at the column of prompt + response."""
    start = mask.int().argmax(1, keepdim=True)                   # (B, 1)
    last = start + mask.sum(1, keepdim=True) - 1
    column = torch.minimum(torch.arange(ids.shape[1]) + start, last)  # column t: response token t
    return torch.where(mask, segments.gather(1, column), -1)

def boundary_in_the_segment_before(ids, segments, mask):
    before = one_later(segments, -1)
    return torch.where(before >= 0, before, segments)

def boundary_counted_twice(token_logps, segments, num):
    before = one_later(segments, -1)
    again = torch.where((before != segments) & (segments >= 0), before, -1)  # n_k + l_k opens k + 1
    return stage.segment_logps(token_logps, segments, num) + stage.segment_logps(token_logps, again, num)

def each_side(change):
    """The scores of each side changed by change(scores, aspect_max, present)."""
    return around(normalised=lambda scores, top, present: {side: change(x, top, present[side])
                                                           for side, x in scores.items()})

def min_max(scores, aspect_max, present):
    low, high = (torch.where(present[..., None], scores, x * torch.inf) for x in (1, -1))  # (B, S, A)
    low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    return (scores - low) / (high - low)

def maximum_of_the_batch(scores, aspect_max, present):
    top = torch.cat([x[present[side]] for side, x in scores.items()]).amax(0)  # (A,)
    return {side: x / top for side, x in scores.items()}

def sequence_loss(change):
    """A loss without segments changed around its call: change(call, q) -> loss, where call(q) is the loss."""
    def make(call):
        def loss_value(name, q):
            if name not in ("dpo", "dpop", "tdpo1", "tdpo2"):
                return call(name, q)
            return change(lambda q: call(name, q), q)
        return loss_value
    return around(loss_value=Wrap(make))

def policy_tail_halved(call, q):
    """LD-DPO's discount of the tokens beyond the shorter response, on the policy's log-probabilities."""
    shorter = torch.minimum(*(q[f"{side}_mask"].sum(1) for side in pipeline.SIDES)).unsqueeze(1)
    tail = {f"{side}_logps": q[f"{side}_logps"] - 0.5 * torch.where(
        q[f"{side}_mask"].cumsum(1) > shorter, q[f"{side}_token_logps"], 0).sum(1) for side in pipeline.SIDES}
    return call(q | tail)

def dpop_per_token(name, q):
    if name != "dpop":
        return stage.loss_value(name, q)
    beta, lam = pipeline.HYPER["dpop"].values()
    penalty = hinge(q["ref_chosen_token_logps"] - q["chosen_token_logps"]).sum(-1)  # hinge before the sum
    ratios = q["chosen_logps"] - q["ref_chosen_logps"] - (q["rejected_logps"] - q["ref_rejected_logps"])
    return nls(beta * (ratios - lam * penalty))

def reward(value):
    """Another implicit reward: value(the right one, quantities, side, hyper-parameters, name of the loss)."""
    def implicit_reward(name, q, side):
        return value(stage.implicit_reward(name, q, side), q, side, pipeline.HYPER[name], name)
    return around(implicit_reward=implicit_reward)

def with_penalty(value, q, side, knobs, name):
    if (name, side) != ("dpop", "chosen"):
        return value
    return value - knobs["beta"] * knobs["lam"] * hinge(q["ref_chosen_logps"] - q["chosen_logps"])

BATCH = [
    Mistake("no-shift", "logits that were not shifted: column t scored on token t, where it predicts token t "
            "+ 1", around(predicting_logits=lambda logits: logits),
            "lucidrains/self-rewarding-lm-pytorch, self_rewarding_lm_pytorch/dpo.py, "
            "log_prob_from_model_and_seq"),
    Mistake("mask-wrong-side", "a mask sliced on the wrong side of the shift (mask[:, :-1] for mask[:, 1:]): "
            "the first response token is lost, the one after the response scored",
            around(scored_tokens=lambda ids, mask: one_later(mask, False)),
            f"{X_TRANSFORMERS}:30-31 (corrected since)"),
    Mistake("prompt-scored", "the prompt's tokens counted with the response's",
            around(scored_tokens=prompt_too)),
    Mistake("last-prompt-token-scored", "the last token of the prompt counted with the response's",
            around(scored_tokens=last_prompt_token_too)),
    Mistake("padding-scored", "the padding counted with the response", around(scored_tokens=padding_too)),
    Mistake("one-pad-scored", "one token after the end-of-text counted with the response",
            around(scored_tokens=lambda ids, mask: mask | one_later(mask, False))),
    Mistake("end-of-text-not-scored", "a response without its end-of-text, masked because it is also the "
            "padding id", around(scored_tokens=without_end_of_text)),
    Mistake("id-0-not-scored", "a response without its tokens of id 0, an id like any other",
            around(scored_tokens=lambda ids, mask: mask & (ids != 0)), "xtuner 0.2.0"),
    Mistake("begin-of-text-scored", "a begin-of-text before the response counted with it",
            around(scored_tokens=begin_of_text_too), "google-tunix 0.1.7"),
    Mistake("holes-scored", "all tokens from the response's first to its last, those between that are not "
            "scored too", around(scored_tokens=between_too)),
    Mistake("left-padding-ignored", "a response looked up as if its row were not padded on the left",
            around(scored_tokens=counted_from_the_left)),
    Mistake("first-token-not-scored", "a response without its first token",
            around(scored_tokens=lambda ids, mask: mask & (mask.cumsum(1) > 1))),
    Mistake("kl-over-prompt", "a sequential KL that also runs over the prompt", around(kl_tokens=prompt_too)),
    Mistake("kl-over-padding", "a sequential KL that also runs over the padding",
            around(kl_tokens=padding_too)),
    Mistake("kl-without-end-of-text", "a sequential KL without the position that predicts end-of-text",
            around(kl_tokens=without_end_of_text)),
    Mistake("kl-one-column-late", "the KL of the logits in a token's own column: the column before predicts "
            "it", around(position_kl=kl_one_column_late)),
    Mistake("kl-on-the-label", "the KL's term of the label token alone, q_y (log q_y - log s_y), instead of "
            "the sum over the vocabulary", label_kl(lambda q, s: q.exp() * (q - s))),
    Mistake("kl-as-label-log-ratio", "log q_y - log s_y of the label token, a one-sample estimate, instead "
            "of the KL", label_kl(lambda q, s: q - s)),
    Mistake("kl-k3", "the k3 estimate on the label token, q_y/s_y - 1 - log(q_y/s_y), GRPO's, instead of the "
            "KL", label_kl(lambda q, s: (q - s).exp() - 1 - (q - s))),
    Mistake("kl-k3-forward", "the k3 estimate on the label token, s_y/q_y - 1 - log(s_y/q_y), instead of the "
            "KL", label_kl(lambda q, s: (s - q).exp() - 1 - (s - q))),
    Mistake("sft-term", "a loss plus -log pi(y_w|x), an SFT term with weight 1: the papers have none",
            sequence_loss(lambda call, q: call(q) - q["chosen_logps"])),
    Mistake("sft-term-per-token", "a loss plus the mean of -log pi over the chosen response's tokens",
            sequence_loss(lambda call, q: call(q) - q["chosen_logps"] / q["chosen_mask"].sum(1))),
    Mistake("ld-dpo-policy-only", "LD-DPO's weight on tokens beyond the shorter response (0.5) for the "
            "policy and not for the reference", sequence_loss(policy_tail_halved),
            "LLaMA-Factory 0.9.5, ms-swift 4.6.0"),
    Mistake("reference-trained", "a reference that the step changed with the policy: it must stay as it was",
            around(reference_after_the_step=lambda policy, reference: policy)),
    Mistake("kl-mean-over-tokens", "a mean of the KL over the response: D_SeqKL is a sum",
            around(sequence_kl=mean_of_rows)),
    Mistake("mean-per-sequence", "a mean over the response's tokens under a sum's equation",
            around(sequence_sum=mean_of_rows), f"{NOTEBOOK}; {X_TRANSFORMERS}"),
    Mistake("divided-by-pairs", "gradients of the mean over the pairs; the golden ones are pair by pair: "
            "backward from loss.sum()", around(objective=lambda loss: loss.mean())),
    Mistake("dpop-hinge-per-token", "the hinge taken at every token and then summed (Eq. 3 takes it once, of "
            "the sequence)", around(loss_value=dpop_per_token)),
    Mistake("reward-includes-kl", "a reward with beta D_SeqKL in it, as in TDPO's Theorem 4.5; golden's is "
            "beta log pi/pi_ref for all losses",
            reward(lambda value, q, side, knobs, name: value + knobs["beta"] * q[f"{side}_seq_kl"]),
            f"{TDPO_AUTHORS}, trainers.py, tdpo_loss", definition=True),
    Mistake("reward-includes-penalty", "a reward with DPOP's penalty in it, DPOP's own implicit reward; "
            "golden's is beta log pi/pi_ref for all losses", reward(with_penalty),
            "turbo-llm/turbo-alignment, turbo_alignment/trainers/dpo.py", definition=True),
    Mistake("reward-without-beta", "the log-ratio itself: the implicit reward is beta times it",
            reward(lambda value, q, side, knobs, name: value / knobs["beta"])),
    Mistake("reward-without-reference", "beta log pi: the implicit reward is relative to the reference",
            reward(lambda value, q, side, knobs, name: knobs["beta"] * q[f"{side}_logps"])),
    Mistake("2d-segments-over-prompt", "segment boundaries of the response looked up in prompt + response",
            around(token_segments=segments_from_row_start), "a third-party 2D-DPO"),
    Mistake("2d-boundary-twice", "segments read as closed intervals: the token on a boundary counts in both",
            around(segment_logps=boundary_counted_twice), "the upper limit as printed in arXiv:2410.19720"),
    Mistake("2d-boundary-off-by-one", "segments that start one token late: the first token of a segment in "
            "the one before", around(token_segments=boundary_in_the_segment_before)),
    Mistake("2d-end-of-text-outside", "an end-of-text in no segment: it belongs to the last",
            around(token_segments=lambda ids, segments, mask: torch.where(
                without_end_of_text(ids, mask), segments, -1))),
    Mistake("2d-raw-scores", "scores not divided by their aspect's maximum",
            each_side(lambda scores, aspect_max, present: scores)),
    Mistake("2d-one-maximum", "all scores divided by one maximum: each aspect has its own",
            each_side(lambda scores, aspect_max, present: scores / aspect_max.max())),
    Mistake("2d-min-max-per-response", "scores stretched to [0, 1] within each response: the maximum is that "
            "of the data", each_side(min_max)),
    Mistake("2d-maximum-of-the-batch", "scores divided by the largest of the batch: the maximum is that of "
            "the data", around(normalised=maximum_of_the_batch)),
]

# ---- From logits to log-probabilities ----

def with_log_softmax(log_softmax):
    """Both functions of losses.py that take a log-softmax, with another one."""
    def token_logps(logits, targets):
        return log_softmax(logits).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def token_kl(ref_logits, logits):
        log_q, log_s = log_softmax(ref_logits), log_softmax(logits)
        return (log_q.exp() * torch.where(log_q > -torch.inf, log_q - log_s, 0.0)).sum(-1)
    return inside(token_logps=token_logps, token_kl=token_kl)

def with_floor(x):
    """No logit more than 64 below the largest; the gradient does not see it."""
    finite = torch.where(x > -torch.inf, x, 0.0)
    floored = torch.maximum(x, x.amax(-1, keepdim=True) - 64)
    return (sg(floored) + finite - sg(finite)).log_softmax(-1)

def kl_of_the_top(z_ref, z):
    """KL over the 10 tokens that the reference finds likeliest."""
    log_q, log_s = z_ref.log_softmax(-1), z.log_softmax(-1)
    log_q, top = log_q.topk(min(10, z.shape[-1]), -1)
    return (log_q.exp() * torch.where(log_q > -torch.inf, log_q - log_s.gather(-1, top), 0.0)).sum(-1)

def zero_times_infinity(z_ref, z):
    log_q = z_ref.log_softmax(-1)
    return (log_q.exp() * (log_q - z.log_softmax(-1))).sum(-1)

def clipped_kl(z_ref, z):
    q, p = (torch.where(x.softmax(-1) < 1e-7, 1e-7, x.softmax(-1)) for x in (z_ref, z))
    return (q * (q / p).log()).sum(-1)

LOGPS = [
    Mistake("log-of-softmax", "log(softmax(x)), which underflows where log_softmax does not",
            with_log_softmax(lambda x: x.softmax(-1).log()),
            f"{TDPO_AUTHORS}, trainers.py, _tdpo_get_batch_logps"),
    Mistake("softmax-overflow", "exp(x) / sum exp(x) without subtracting the maximum",
            with_log_softmax(lambda x: (x.exp() / x.exp().sum(-1, keepdim=True)).log())),
    Mistake("log-softmax-floor", "a log-softmax with a floor 64 below the largest logit",
            with_log_softmax(with_floor), "paddle 3.3.1, F.log_softmax on a CPU"),
    Mistake("kl-zero-times-infinity", "q (log q - log s) where q is 0, which is NaN: such a token adds 0 to "
            "the KL", inside(token_kl=zero_times_infinity)),
    Mistake("kl-clipped", "a KL of probabilities clipped to [1e-7, 1]", inside(token_kl=clipped_kl),
            "keras 3.15.1, losses.KLDivergence"),
    Mistake("kl-top-10", "a KL over the reference's ten likeliest tokens alone",
            inside(token_kl=kl_of_the_top)),
    Mistake("base-2-log", "logarithms to the base 2: the unit is the nat",
            inside(token_logps=lambda z, y: right.token_logps(z, y) / math.log(2),
                   token_kl=lambda z_ref, z: right.token_kl(z_ref, z) / math.log(2))),
    Mistake("logits-not-normalised", "the label's logit itself, without log_softmax",
            inside(token_logps=lambda z, y: right.token_logps(z, y) + z.logsumexp(-1))),
    Mistake("probability-for-logp", "probabilities where log-probabilities belong",
            inside(token_logps=lambda z, y: right.token_logps(z, y).exp())),
    Mistake("kl-reversed", "the reverse KL(pi || pi_ref): D_SeqKL is forward, KL(pi_ref || pi)",
            inside(token_kl=lambda z_ref, z: right.token_kl(z, z_ref)),
            "the KL of TIS-DPO (trainers.py, _get_batch_logps_tisdpo) put into TDPO"),
    Mistake("kl-mean-over-vocabulary", "a mean over the vocabulary (F.kl_div's default): the KL is a sum",
            inside(token_kl=lambda z_ref, z: right.token_kl(z_ref, z) / z.shape[-1])),
    Mistake("kl-gradient-stopped", "a KL computed without gradient, as if the reference's no_grad covered it",
            inside(token_kl=lambda z_ref, z: sg(right.token_kl(z_ref, z)) + 0 * z[..., 0])),
    Mistake("mean-for-sum", "means over tokens, per sequence and per segment, under a sum's equation",
            inside(segment_sum=mean_of_rows), f"{NOTEBOOK}; TRL's description of logps/chosen"),
]

# ---- Every loss of two responses ----

SEQUENCE = ("dpo_loss", "dpop_loss", "tdpo1_loss", "tdpo2_loss")
SEGMENTS = ("dpo2d_vanilla_loss", "dpo2d_loss")

def calls(names, change):
    """The losses that stand there, called with other arguments: change(arguments, hyper-parameters)."""
    def patch(name):
        def make(loss):
            def wrong(*args, **knobs):
                args, knobs = change(list(args), right.knobs_of(getattr(right, name)) | knobs)
                return loss(*args, **knobs)
            return wrong
        return Wrap(make)
    return inside(**{name: patch(name) for name in names})

def beta(change):
    return calls(SEQUENCE + SEGMENTS, lambda args, knobs: (args, knobs | {"beta": change(knobs["beta"])}))

def order(names, *first):
    """The losses with their first arguments in another order; None stands for zeros."""
    def change(args, knobs):
        return [0 * args[i] if k is None else args[k] for i, k in enumerate(first)] + args[len(first):], knobs
    return calls(names, change)

def beta_in_front(loss):
    return Wrap(lambda there: lambda *args, **knobs: (right.knobs_of(loss) | knobs)["beta"] * there(
        *args, **knobs | {"beta": 1.0}))

def detached(*which):
    """The policy's log-probabilities, chosen (0) or rejected (1) or both, without gradient."""
    return calls(SEQUENCE + SEGMENTS, lambda args, knobs: (
        [sg(x) + 0 * x if i in which else x for i, x in enumerate(args)], knobs))

def logsigmoid(replacement):
    """Patches losses.py's own view of torch.nn.functional, and nobody else's."""
    return inside(F=SimpleNamespace(**(vars(F) | {"logsigmoid": replacement})))

def minus(loss):
    """The same, from what stands in the place of -log sigma(h)."""
    return logsigmoid(lambda h: -loss(h))

def smoothing(epsilon):
    return minus(lambda h: (1 - epsilon) * softplus(-h) + epsilon * softplus(h))

def margin_ranking(w, l_, ref_w, ref_l, *, beta=0.1):
    return hinge(1 - (w - l_))

def label_logits(z, y):
    return right.token_logps(z, y) + z.logsumexp(-1)

PAIRS = [
    Mistake("sft-sign", "log pi(y_w|x) without its minus sign", inside(sft_loss=lambda logps: logps)),
    Mistake("responses-swapped", "chosen and rejected swapped",
            calls(SEQUENCE + SEGMENTS, lambda args, knobs: ([args[i ^ 1] for i in range(len(args))], knobs))),
    Mistake("policy-responses-swapped", "chosen and rejected swapped in the policy's term alone",
            order(SEQUENCE, 1, 0)),
    Mistake("reference-responses-swapped", "chosen and rejected swapped in the reference's term alone",
            order(SEQUENCE, 0, 1, 3, 2)),
    Mistake("models-swapped", "policy and reference swapped", order(SEQUENCE + SEGMENTS, 2, 3, 0, 1)),
    Mistake("reference-missing", "log pi where log pi/pi_ref belongs: the reference is missing",
            order(SEQUENCE + SEGMENTS, 0, 1, None, None)),
    Mistake("beta-missing", "the loss without beta (beta = 1)", beta(lambda b: 1.0)),
    Mistake("beta-twice", "a margin multiplied by beta twice", beta(lambda b: b * b),
            "AI-Hypercomputer/maxtext, dpo_utils.py, issue 1530 (DPO)"),
    Mistake("beta-in-front", "beta in front of the log-sigmoid: it belongs inside",
            inside(**{name: beta_in_front(getattr(right, name)) for name in SEQUENCE + SEGMENTS})),
    Mistake("beta-divides", "a division by beta", beta(lambda b: 1 / b)),
    Mistake("policy-gradient-stopped", "log-probabilities of the policy that carry no gradient",
            detached(0, 1), "Goekdeniz-Guelmez/mlx-lm-lora until its pull request 25; mlxsmith 0.1.9, tdpo"),
    Mistake("chosen-gradient-stopped", "a log-probability of the chosen response that carries no gradient",
            detached(0)),
    Mistake("rejected-gradient-stopped", "a log-probability of the rejected response that carries no "
            "gradient", detached(1)),
    Mistake("sigmoid-for-log-sigmoid", "-sigma(h): the loss is -log sigma(h)", logsigmoid(torch.sigmoid)),
    Mistake("minus-missing", "log sigma(h) without its minus sign", logsigmoid(lambda h: softplus(-h))),
    Mistake("margin-sign", "-log sigma(-h): the whole margin with the other sign", minus(softplus)),
    Mistake("label-smoothing", "a loss with label smoothing 0.1, 0.9 L(h) + 0.1 L(-h): the papers have none",
            smoothing(0.1)),
    Mistake("robust", "robust DPO's loss at 0.1, (0.9 L(h) - 0.1 L(-h)) / 0.8: the papers have L(h)",
            minus(lambda h: (0.9 * softplus(-h) - 0.1 * softplus(h)) / 0.8)),
    Mistake("log-of-sigmoid", "log(sigmoid(h)) or log(1 + exp(-h)), which lose what logsigmoid and softplus "
            "do not", logsigmoid(lambda h: torch.sigmoid(h).log()), "mlxsmith 0.1.9"),
    Mistake("hinge-for-log-sigmoid", "max(0, -h), the log-sigmoid's asymptote", minus(lambda h: hinge(-h))),
    Mistake("hinge-loss", "the hinge loss max(0, 1 - h): the loss is -log sigma(h)",
            minus(lambda h: hinge(1 - h)), "loss type hinge of TRL, xtuner, Liger-Kernel"),
    Mistake("margin-ranking", "a margin ranking loss, max(0, 1 - (z_w - z_l)), on the labels' logits",
            inside(token_logps=label_logits, dpo_loss=margin_ranking), "nanodpo 0.1.post1"),
]

# DPOP. Each variant is a function of p: log-ratios c_w and c_l, h = beta (c_w - c_l), hinge = max(0, -c_w),
# beta, lam, bl = beta lam, and win = log pi(y_w|x) - log pi(y_l|x).

def dpop(loss):
    def wrong(w, l_, ref_w, ref_l, *, beta=0.3, lam=50.0):
        c_w, c_l = w - ref_w, l_ - ref_l
        return loss(SimpleNamespace(c_w=c_w, c_l=c_l, h=beta * (c_w - c_l), hinge=hinge(-c_w), lam=lam,
                                    beta=beta, bl=beta * lam, win=w - l_))
    return inside(dpop_loss=wrong)

DPOP = [
    Mistake("dpop-hinge-outside-beta", "the hinge outside beta's bracket (Eq. 3 has it inside)",
            dpop(lambda p: nls(p.h - p.lam * p.hinge)), "a Rust crate, type DpopConfig"),
    Mistake("dpop-hinge-outside-log-sigmoid", "the hinge added outside the log-sigmoid (Eq. 3 has it inside)",
            dpop(lambda p: nls(p.h) + p.lam * p.hinge),
            f"a Paddle dpo_criterion.py, early version; {MLX}; abacusai/smaug, issue 2"),
    Mistake("dpop-hinge-outside-times-50", "50 times the hinge added outside the log-sigmoid, whatever lam "
            "is (Eq. 3 has lam inside)", dpop(lambda p: nls(p.h) + 50 * p.hinge),
            "MLX trainers that have delta = 50 as a constant"),
    Mistake("dpop-hinge-outside-with-beta", "beta times the hinge added outside the log-sigmoid (Eq. 3 has "
            "it inside)", dpop(lambda p: nls(p.h) + p.bl * p.hinge)),
    Mistake("dpop-hinge-subtracted-outside", "the hinge subtracted from the loss, outside the log-sigmoid: "
            "it rewards losing chosen probability", dpop(lambda p: nls(p.h) - p.lam * p.hinge),
            "hiyouga/LLaMA-Factory, issue 2587; a LLaMA2-Accessory fork, class DPOModel"),
    Mistake("dpop-ratio-hinge-outside", "lam max(0, 1 - pi/pi_ref) added outside the log-sigmoid: the hinge "
            "is on the log-ratio, inside", dpop(lambda p: nls(p.h) + p.lam * hinge(1 - p.c_w.exp()))),
    Mistake("dpop-hinge-sign", "the hinge with the wrong sign: it rewards losing chosen probability",
            dpop(lambda p: nls(p.h + p.bl * p.hinge))),
    Mistake("dpop-hinge-on-gain", "the hinge max(0, log pi/pi_ref), turned round: it punishes gaining chosen "
            "probability", dpop(lambda p: nls(p.h - p.bl * hinge(p.c_w)))),
    Mistake("dpop-hinge-on-rejected", "the hinge on the rejected response (Eq. 3 has it on the chosen one)",
            dpop(lambda p: nls(p.h - p.bl * hinge(-p.c_l)))),
    Mistake("dpop-hinge-on-the-pair", "the hinge max(0, log pi(y_l) - log pi(y_w)): Eq. 3 compares the "
            "policy with the reference", dpop(lambda p: nls(p.h - p.bl * hinge(-p.win))),
            "a LLaMA-Factory fork with a loss for puns, dpop_loss"),
    Mistake("dpop-hinge-on-the-pair-outside", "lam max(0, log pi(y_l) - log pi(y_w)) added outside the "
            "log-sigmoid", dpop(lambda p: nls(p.h) + p.lam * hinge(-p.win))),
    Mistake("dpop-hinge-missing", "DPO: lam is not read", dpop(lambda p: nls(p.h))),
    Mistake("dpop-no-hinge", "lam log pi_ref/pi without max(0, .): it acts above the reference too",
            dpop(lambda p: nls(p.h + p.bl * p.c_w))),
    Mistake("dpop-slope-1-at-zero", "a hinge whose slope at 0 is 1: the first step is then not DPO's (with 0 "
            "it is)", dpop(lambda p: nls(p.h - p.bl * torch.where(p.c_w <= 0, -p.c_w, 0.0))),
            "Cerebras/modelzoo, losses/DPOLoss.py; paddleformers 1.2.0"),
    Mistake("dpop-slope-half-at-zero", "a hinge whose slope at 0 is 1/2: the first step is then not DPO's "
            "(with slope 0 it is)",
            dpop(lambda p: nls(p.h - p.bl * torch.where(p.c_w == 0, -p.c_w / 2, p.hinge)))),
    Mistake("dpop-softplus-for-hinge", "log(1 + exp(x)) in the place of max(0, x): it acts above the "
            "reference too", dpop(lambda p: nls(p.h - p.bl * softplus(-p.c_w)))),
    Mistake("dpop-lam-50", "lam 50, the paper's, whatever lam is given",
            dpop(lambda p: nls(p.h - 50 * p.beta * p.hinge))),
    Mistake("dpop-hinge-on-both", "a hinge on each response (Eq. 3 has one, on the chosen response)",
            dpop(lambda p: nls(p.h - p.bl * (p.hinge + hinge(-p.c_l))))),
    Mistake("dpop-hinge-detached", "a hinge that carries no gradient",
            dpop(lambda p: nls(p.h - p.bl * sg(p.hinge)))),
]

# ---- TDPO. Each variant gives the margin from u, beta times the two KLs, alpha and beta ----

def tdpo1(margin):
    def wrong(w, l_, ref_w, ref_l, seq_kl_w, seq_kl_l, *, beta=0.1):
        u, a = beta * (w - ref_w) - beta * (l_ - ref_l), pipeline.HYPER["tdpo2"]["alpha"]
        return nls(margin(u, beta * seq_kl_w, beta * seq_kl_l, a, beta))
    return inside(tdpo1_loss=wrong)

def tdpo2(margin):
    def wrong(w, l_, ref_w, ref_l, seq_kl_w, seq_kl_l, *, beta=0.1, alpha=0.5):
        u = beta * (w - ref_w) - beta * (l_ - ref_l)
        return nls(margin(u, beta * seq_kl_w, beta * seq_kl_l, alpha, beta))
    return inside(tdpo2_loss=wrong)

def delta(wrong):
    """Another delta(K_w, K_l, beta) in both forms; K_w is detached and alpha in front in TDPO2."""
    return (tdpo1(lambda u, k_w, k_l, a, b: u - wrong(k_w, k_l, b))
            | tdpo2(lambda u, k_w, k_l, a, b: u - a * wrong(sg(k_w), k_l, b)))

TDPO = [
    Mistake("tdpo-delta-sign", "u + delta: the sign of delta, or K_w and K_l, the wrong way round",
            delta(lambda k_w, k_l, b: k_w - k_l)),
    Mistake("tdpo-kl-added", "the sum of the two KLs: delta is their difference, K_l - K_w",
            delta(lambda k_w, k_l, b: k_w + k_l)),
    Mistake("tdpo-delta-absolute", "|delta| in the place of delta",
            delta(lambda k_w, k_l, b: (k_l - k_w) * sg(k_l - k_w).sign())),
    Mistake("tdpo-delta-clipped", "max(0, delta) in the place of delta",
            delta(lambda k_w, k_l, b: hinge(k_l - k_w))),
    Mistake("tdpo-kl-without-beta", "a delta without beta: beta multiplies the KLs too",
            delta(lambda k_w, k_l, b: (k_l - k_w) / b)),
    Mistake("tdpo-kl-missing", "DPO: the KLs are not read", delta(lambda k_w, k_l, b: 0 * (k_l + k_w))),
    Mistake("tdpo2-is-tdpo1", "TDPO1: the switch to TDPO2 had no effect",
            tdpo2(lambda u, k_w, k_l, a, b: u - (k_l - k_w)),
            f"{TDPO_AUTHORS}, tdpo.yaml:3 against README:57"),
    Mistake("tdpo1-is-tdpo2", "TDPO2 at alpha 0.5: the switch to TDPO1 had no effect",
            tdpo1(lambda u, k_w, k_l, a, b: u - a * (k_l - sg(k_w)))),
    Mistake("tdpo1-with-alpha", "alpha (0.5) times delta: TDPO1 has no alpha",
            tdpo1(lambda u, k_w, k_l, a, b: u - a * (k_l - k_w))),
    Mistake("tdpo1-stop-gradient-on-chosen", "a stop-gradient on the chosen KL: that is TDPO2's, TDPO1 has "
            "none", tdpo1(lambda u, k_w, k_l, a, b: u - (k_l - sg(k_w)))),
    Mistake("tdpo1-stop-gradient-on-both", "a stop-gradient on both KLs: TDPO1 has none",
            tdpo1(lambda u, k_w, k_l, a, b: u - sg(k_l - k_w) + 0 * (k_l + k_w))),
    Mistake("tdpo2-stop-gradient-missing", "TDPO2 without its stop-gradient on the chosen KL",
            tdpo2(lambda u, k_w, k_l, a, b: u - a * (k_l - k_w))),
    Mistake("tdpo2-stop-gradient-wrong-side", "the stop-gradient on the rejected KL: it belongs to the "
            "chosen one", tdpo2(lambda u, k_w, k_l, a, b: u - a * (sg(k_l) - k_w))),
    Mistake("tdpo2-stop-gradient-on-both", "the stop-gradient on both KLs: it belongs to the chosen one only",
            tdpo2(lambda u, k_w, k_l, a, b: u - a * sg(k_l - k_w) + 0 * k_l)),
    Mistake("tdpo2-alpha-on-rejected-only", "alpha on the rejected KL only: it multiplies both",
            tdpo2(lambda u, k_w, k_l, a, b: u - (a * k_l - sg(k_w)))),
    Mistake("tdpo2-alpha-on-chosen-only", "alpha on the chosen KL only: it multiplies both",
            tdpo2(lambda u, k_w, k_l, a, b: u - (k_l - a * sg(k_w)))),
    Mistake("tdpo2-alpha-missing", "TDPO2 without alpha (alpha = 1)",
            tdpo2(lambda u, k_w, k_l, a, b: u - (k_l - sg(k_w)))),
    Mistake("tdpo2-alpha-on-everything", "alpha times the whole margin: it multiplies delta only",
            tdpo2(lambda u, k_w, k_l, a, b: a * (u - (k_l - sg(k_w))))),
]

# ---- 2D-DPO: the rewards, the sums, the selection ----

def weigh(rewards):
    return inside(segment_rewards=rewards)

def rewards(change, names=SEGMENTS):
    """The right 2D losses with other rewards; change(r_w, r_l, mask_w, mask_l) gives both."""
    return calls(names, lambda args, knobs: ([*args[:4], *change(*args[4:]), *args[6:]], knobs))

def each(change, names=SEGMENTS):
    """The same change of both sides' rewards, change(r, mask)."""
    return rewards(lambda r_w, r_l, m_w, m_l: (change(r_w, m_w), change(r_l, m_l)), names)

def swapped(r_w, r_l, m_w, m_l):
    """Each side weighted with the other side's rewards, where the other side has that segment."""
    S = min(r_w.shape[1], r_l.shape[1])
    return torch.cat([r_l[:, :S], r_w[:, S:]], 1), torch.cat([r_w[:, :S], r_l[:, S:]], 1)

def reward_on_policy_only(args, knobs):
    w, l_, ref_w, ref_l, r_w, r_l, *masks = args
    return [r_w * w, r_l * l_, ref_w, ref_l, torch.ones_like(r_w), torch.ones_like(r_l), *masks], knobs

def pair_sum(h, paired):
    return torch.where(paired, nls(h), 0.0).sum(-1)

def group(margin=lambda a, b: a - b, combine=pair_sum, weights=lambda r_w, r_l: (r_w, r_l)):
    """Eq. 6 with another margin of a pair, another way to combine pairs, or other weights once selected."""
    def loss(w, l_, ref_w, ref_l, r_w, r_l, m_w, m_l, *, beta=0.1):
        i_w, i_l, paired = losses.select_segments(r_w, r_l, m_w, m_l)
        r_w, r_l = weights(r_w, r_l)
        a = torch.where(paired, ((w - ref_w) * r_w).gather(-1, i_w), 0.0)  # (B, K)
        b = torch.where(paired, ((l_ - ref_l) * r_l).gather(-1, i_l), 0.0)
        return combine(beta * margin(a, b), paired)
    return inside(dpo2d_loss=loss)

def rank(r):
    """The rewards (B, S) as numbers 0, 1, ... of their groups: sorted, a gap above 1e-5 begins a new one."""
    value, index = r.sort(dim=-1)
    return torch.zeros_like(index).scatter(-1, index, F.pad((value.diff(dim=-1) > 1e-5).cumsum(-1), (1, 0)))

def selection(key_w=lambda r: -rank(r), key_l=rank, reverse_ties=False):
    """select_segments by other sort keys, or with ties in the reverse order."""
    def ranked(key, mask):
        key = torch.where(mask, key.double(), torch.inf)
        if reverse_ties:
            return key.shape[1] - 1 - key.flip(1).argsort(dim=-1, stable=True)
        return key.argsort(dim=-1, stable=True)

    def select(r_w, r_l, m_w, m_l):
        _, _, paired = right.select_segments(r_w, r_l, m_w, m_l)
        K = paired.shape[1]
        return ranked(key_w(r_w), m_w)[:, :K], ranked(key_l(r_l), m_l)[:, :K], paired
    return inside(select_segments=select)

def selected(change):
    """select_segments with its result changed: change(i_w, i_l, paired)."""
    return inside(select_segments=lambda *args: change(*right.select_segments(*args)))

def n_of_the_batch(i_w, i_l, paired):
    return i_w, i_l, paired & (torch.arange(paired.shape[1]) < paired.sum(-1).min())

def worst_last(i_w, i_l, paired):
    k = torch.arange(paired.shape[1])
    return i_w, i_l.gather(-1, torch.where(paired, paired.sum(-1, keepdim=True) - 1 - k, k)), paired

def in_text_order(i_w, i_l, paired):
    i_w, i_l = (torch.where(paired, i, i.shape[1] + 99).sort(-1).values for i in (i_w, i_l))
    return torch.where(paired, i_w, 0), torch.where(paired, i_l, 0), paired

def leftovers_alone(w, l_, ref_w, ref_l, r_w, r_l, m_w, m_l, *, beta=0.1):
    """The segments that were not selected enter after all, each against nothing."""
    loss = right.dpo2d_loss(w, l_, ref_w, ref_l, r_w, r_l, m_w, m_l, beta=beta)
    i_w, i_l, paired = right.select_segments(r_w, r_l, m_w, m_l)
    for h, mask, index in ((beta * r_w * (w - ref_w), m_w, i_w), (-beta * r_l * (l_ - ref_l), m_l, i_l)):
        used = torch.zeros_like(mask).scatter(-1, index, paired)
        loss = loss + pair_sum(h, mask & ~used)
    return loss

def all_pairs(w, l_, ref_w, ref_l, r_w, r_l, m_w, m_l, *, beta=0.1):
    a, b = r_w * (w - ref_w), r_l * (l_ - ref_l)
    both = m_w[:, :, None] & m_l[:, None, :]                     # (B, S_w, S_l)
    h = beta * torch.where(both, a[:, :, None] - b[:, None, :], 0.0)
    return pair_sum(h.flatten(1), both.flatten(1))

TWO_D = [
    Mistake("2d-weights-one-hot", "the first aspect alone as reward: W weighs all of them",
            weigh(lambda scores, W: scores[..., 0] * W.sum())),
    Mistake("2d-weights-uniform", "a plain mean over the aspects as reward: W is not read",
            weigh(lambda scores, W: scores.mean(-1))),
    Mistake("2d-weights-sum", "a plain sum over the aspects as reward: W is not read",
            weigh(lambda scores, W: scores.sum(-1))),
    Mistake("2d-weights-reversed", "W in the reverse order of the aspects",
            weigh(lambda scores, W: (scores * W.flip(0)).sum(-1))),
    Mistake("2d-rewards-rounded", "rewards rounded to three decimals",
            weigh(lambda scores, W: right.segment_rewards(scores, W).round(decimals=3))),
    Mistake("2d-rewards-missing", "rewards that are not read (r = 1), selection included",
            each(lambda r, m: torch.ones_like(r))),
    Mistake("2d-rewards-swapped", "each response weighted with the other one's rewards", rewards(swapped)),
    Mistake("2d-rewards-centred", "rewards less their mean over the response: they stay in [0, 1]",
            each(lambda r, m: r - torch.where(m, r, 0.0).sum(-1, keepdim=True) / m.sum(-1, keepdim=True))),
    Mistake("2d-rewards-from-minus-1", "rewards stretched to [-1, 1] (2r - 1): they stay in [0, 1]",
            each(lambda r, m: 2 * r - 1)),
    Mistake("2d-one-minus-r", "1 - r as the weight of rejected segments: both sides have r",
            rewards(lambda r_w, r_l, m_w, m_l: (r_w, 1 - r_l), ("dpo2d_vanilla_loss",))
            | group(weights=lambda r_w, r_l: (r_w, 1 - r_l))),
    Mistake("2d-one-minus-r-selected", "1 - r as the reward of rejected segments, so that the best are "
            "selected", rewards(lambda r_w, r_l, m_w, m_l: (r_w, 1 - r_l), ("dpo2d_loss",))),
    Mistake("2d-vanilla-reward-sign", "r_l log pi/pi_ref added inside the log-sigmoid: the equation "
            "subtracts it", rewards(lambda r_w, r_l, m_w, m_l: (r_w, -r_l), ("dpo2d_vanilla_loss",))),
    Mistake("2d-reward-sign", "r_l log pi/pi_ref added inside the log-sigmoid: Eq. 6 subtracts it",
            group(margin=lambda a, b: a + b)),
    Mistake("2d-vanilla-reward-on-policy-only", "rewards on log pi alone: they weigh log pi/pi_ref",
            calls(("dpo2d_vanilla_loss",), reward_on_policy_only)),
    Mistake("2d-vanilla-mean", "a mean over the segments: the equation sums them",
            each(lambda r, m: r / m.sum(-1, keepdim=True), ("dpo2d_vanilla_loss",))),
    Mistake("2d-vanilla-is-group", "Eq. 6, one log-sigmoid for each pair of segments, where the vanilla form "
            "has one for all", inside(dpo2d_vanilla_loss=right.dpo2d_loss)),
    Mistake("2d-group-is-vanilla", "the vanilla form, one log-sigmoid for all segments",
            inside(dpo2d_loss=right.dpo2d_vanilla_loss)),
    Mistake("2d-one-log-sigmoid", "the selected segments summed inside one log-sigmoid: Eq. 6 has one for "
            "each pair", group(combine=lambda h, paired: nls(h.sum(-1)))),
    Mistake("2d-one-over-n", "a mean over the N pairs of segments: Eq. 6 sums, without 1/N",
            group(combine=lambda h, paired: pair_sum(h, paired) / paired.sum(-1))),
    Mistake("2d-all-pairs", "every chosen segment against every rejected one: Eq. 6 has N pairs",
            inside(dpo2d_loss=all_pairs)),
    Mistake("2d-top-n-rejected", "the highest-scored rejected segments: Eq. 6 takes the lowest",
            selection(key_l=lambda r: -rank(r))),
    Mistake("2d-bottom-n-chosen", "the lowest-scored chosen segments: Eq. 6 takes the highest",
            selection(key_w=rank)),
    Mistake("2d-text-order", "segments paired in the order of the text, without selection",
            selection(torch.zeros_like, torch.zeros_like)),
    Mistake("2d-ties-reversed", "equal rewards in the reverse order of the text",
            selection(reverse_ties=True)),
    Mistake("2d-unrounded-ties", "a sort of rewards that were not rounded: equal ones differ in the last bit "
            "and leave the order of the text", selection(lambda r: -r, lambda r: r),
            "nachiketapatil/Robust-2D-DPO, 2ddpo.py, preference_loss"),
    Mistake("2d-ties-on-a-grid", "a sort of rewards rounded to 1e-5: equal ones on both sides of a rounding "
            "boundary leave the order", selection(lambda r: -(r * 1e5).round(), lambda r: (r * 1e5).round()),
            "termwise until November 2026"),
    Mistake("2d-selected-in-text-order", "the selected segments paired in the order of the text: the best "
            "meets the worst, and so on", selected(in_text_order)),
    Mistake("2d-worst-last", "the best chosen segment against the least bad of the N selected: it meets the "
            "worst", selected(worst_last)),
    Mistake("2d-padding-segments", "absent segments counted as pairs: N is the padded number",
            selected(lambda i_w, i_l, paired: (i_w, i_l, torch.ones_like(paired)))),
    Mistake("2d-n-of-batch", "one N for the batch: it is min(S_w, S_l) of each pair",
            selected(n_of_the_batch)),
    Mistake("2d-unselected-leak", "segments that were not selected entering the loss alone: they have no "
            "part in it", inside(dpo2d_loss=leftovers_alone)),
]

MISTAKES = [*BATCH, *LOGPS, *PAIRS, *DPOP, *TDPO, *TWO_D]
BY_NAME = {mistake.name: mistake for mistake in MISTAKES}

# ---- Constants: a right loss with another number in it. check.py reads the number off a port's results ----

def knob(name, loss):
    """One hyper-parameter of one loss with another value."""
    function = losses.LOSSES[loss].__name__
    return lambda x: calls((function,), lambda args, knobs: (args, knobs | {name: x}))

def constants(loss):
    """What may be off in one loss: (words with room for the number, golden's number, number -> patches)."""
    found = [(f"{name} {{}}, where the golden value is {value:g}", value, knob(name, loss))
             for name, value in pipeline.HYPER[loss].items()]
    if loss != "sft":
        found.append(("label smoothing {}: the papers have none", 0.0, smoothing))
    if loss in ("dpo", "dpop", "tdpo1", "tdpo2"):
        found.append(("{} times -log pi(y_w|x), an SFT term: the papers have none", 0.0,
                      lambda x: sequence_loss(lambda call, q: call(q) - x * q["chosen_logps"])))
    return found
