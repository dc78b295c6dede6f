"""Known mistakes in ports of these losses, each as code that puts it in the place of the right line.

One list serves twice: tests/test_mistakes.py applies each of them and requires the test suite to notice;
golden/check.py runs the golden inputs through each of them to say which one a port's wrong number equals.

A mistake is a set of replacements, "module.attribute" -> function. Those in losses.* are seen by every test
that calls losses.py; those in golden.pipeline.* happen around the losses, in the handling of a batch.
A replacement calls the right function through `right` (losses.py) or `stage` (the pipeline), frozen here.
Letters of the short functions: w and l chosen and rejected, c their log-ratios, k their KLs, r their rewards.
"""

import importlib
import math
from contextlib import contextmanager
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
class Mistake:
    """One wrong variant and the words for it.

    name: in kebab case. says: what follows "your ... equals". patches: "module.attribute" -> replacement.
    seen: where it was published; "ports": no place on record.
    """
    name: str
    says: str
    patches: dict = field(repr=False)
    seen: str = "ports"

    @contextmanager
    def applied(self):
        """While this lasts the mistake stands in the place of the right code."""
        places = []
        for target, replacement in self.patches.items():
            module, attribute = target.rsplit(".", 1)
            module = importlib.import_module(module)
            places.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, replacement)
        try:
            yield
        finally:
            for module, attribute, original in places:
                setattr(module, attribute, original)


def around(**replacements):
    """Patches of golden.pipeline."""
    return {f"golden.pipeline.{name}": function for name, function in replacements.items()}


def inside(**replacements):
    """Patches of losses.py."""
    return {f"losses.{name}": function for name, function in replacements.items()}


def sg(x):
    return x.detach()


def nls(h):
    return -F.logsigmoid(h)


def mean_of_rows(values, row, rows):
    count = right.segment_sum(torch.ones_like(values), row, rows)
    return right.segment_sum(values, row, rows) / count.clamp(min=1)


# ---------------------------------------------------------------------------------------------------------
# The batch: which logits, which tokens, which segments


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
    return mask & (ids != 0)                                     # 0 is end-of-text, and pads


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


def min_max(scores, aspect_max, present):
    low, high = (torch.where(present[..., None], scores, x * torch.inf) for x in (1, -1))  # (B, S, A)
    low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    return (scores - low) / (high - low)


def dpop_per_token(name, q):
    if name != "dpop":
        return stage.loss_value(name, q)
    beta, lam = pipeline.HYPER["dpop"].values()
    penalty = F.relu(q["ref_chosen_token_logps"] - q["chosen_token_logps"]).sum(-1)  # hinge before the sum
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
    return value - knobs["beta"] * knobs["lam"] * F.relu(q["ref_chosen_logps"] - q["chosen_logps"])


BATCH = [
    Mistake("no-shift",
            "logits that were not shifted: column t scored on token t, where it predicts token t + 1",
            around(predicting_logits=lambda logits: logits),
            "lucidrains/self-rewarding-lm-pytorch, self_rewarding_lm_pytorch/dpo.py, "
            "log_prob_from_model_and_seq"),
    Mistake("mask-wrong-side",
            "a mask sliced on the wrong side of the shift (mask[:, :-1] for mask[:, 1:]): the first "
            "response token is lost, the one after the response scored",
            around(scored_tokens=lambda ids, mask: one_later(mask, False)),
            f"{X_TRANSFORMERS}:30-31 (corrected since)"),
    Mistake("prompt-scored",
            "the prompt's tokens counted with the response's",
            around(scored_tokens=prompt_too)),
    Mistake("last-prompt-token-scored", "the last token of the prompt counted with the response's",
            around(scored_tokens=last_prompt_token_too)),
    Mistake("padding-scored", "the padding counted with the response", around(scored_tokens=padding_too)),
    Mistake("one-pad-scored", "one token after the end-of-text counted with the response",
            around(scored_tokens=lambda ids, mask: mask | one_later(mask, False))),
    Mistake("end-of-text-not-scored",
            "a response without its end-of-text, masked because it is also the padding id",
            around(scored_tokens=without_end_of_text)),
    Mistake("first-token-not-scored", "a response without its first token",
            around(scored_tokens=lambda ids, mask: mask & (mask.cumsum(1) > 1))),
    Mistake("kl-over-prompt", "a sequential KL that also runs over the prompt", around(kl_tokens=prompt_too)),
    Mistake("kl-over-padding",
            "a sequential KL that also runs over the padding",
            around(kl_tokens=padding_too)),
    Mistake("kl-without-end-of-text", "a sequential KL without the position that predicts end-of-text",
            around(kl_tokens=without_end_of_text)),
    Mistake("kl-one-column-late",
            "the KL of the logits in a token's own column: the column before predicts it",
            around(position_kl=kl_one_column_late)),
    Mistake("kl-on-the-label",
            "the KL's term of the label token alone, q_y (log q_y - log s_y), instead of the sum over the "
            "vocabulary",
            label_kl(lambda q, s: q.exp() * (q - s))),
    Mistake("kl-as-label-log-ratio",
            "log q_y - log s_y of the label token, a one-sample estimate, instead of the KL",
            label_kl(lambda q, s: q - s)),
    Mistake("kl-k3",
            "the k3 estimate on the label token, q_y/s_y - 1 - log(q_y/s_y), GRPO's, instead of the KL",
            label_kl(lambda q, s: (q - s).exp() - 1 - (q - s))),
    Mistake("kl-k3-forward",
            "the k3 estimate on the label token, s_y/q_y - 1 - log(s_y/q_y), instead of the KL",
            label_kl(lambda q, s: (s - q).exp() - 1 - (s - q))),
    Mistake("kl-mean-over-tokens", "a mean of the KL over the response: D_SeqKL is a sum",
            around(sequence_kl=mean_of_rows)),
    Mistake("mean-per-sequence", "a mean over the response's tokens under a sum's equation",
            around(sequence_sum=mean_of_rows), f"{NOTEBOOK}; {X_TRANSFORMERS}"),
    Mistake("divided-by-pairs",
            "gradients of the mean over the pairs; the golden ones are pair by pair: backward from "
            "loss.sum()",
            around(objective=lambda loss: loss.mean())),
    Mistake("dpop-hinge-per-token",
            "the hinge taken at every token and then summed (Eq. 3 takes it once, of the sequence)",
            around(loss_value=dpop_per_token)),
    Mistake("reward-includes-kl",
            "a reward with the sequential KL in it: the implicit reward stays beta log pi/pi_ref",
            reward(lambda value, q, side, knobs, name: value + knobs["beta"] * q[f"{side}_seq_kl"]),
            f"{TDPO_AUTHORS}, trainers.py, tdpo_loss"),
    Mistake("reward-includes-penalty",
            "a reward with DPOP's penalty in it: the implicit reward stays beta log pi/pi_ref",
            reward(with_penalty), "turbo-llm/turbo-alignment, turbo_alignment/trainers/dpo.py"),
    Mistake("reward-without-beta", "the log-ratio itself: the implicit reward is beta times it",
            reward(lambda value, q, side, knobs, name: value / knobs["beta"])),
    Mistake("reward-without-reference", "beta log pi: the implicit reward is relative to the reference",
            reward(lambda value, q, side, knobs, name: knobs["beta"] * q[f"{side}_logps"])),
    Mistake("2d-segments-over-prompt", "segment boundaries of the response looked up in prompt + response",
            around(token_segments=segments_from_row_start), "a third-party 2D-DPO"),
    Mistake("2d-boundary-twice", "segments read as closed intervals: the token on a boundary counts in both",
            around(segment_logps=boundary_counted_twice), "the upper limit as printed in arXiv:2410.19720"),
    Mistake("2d-boundary-off-by-one",
            "segments that start one token late: the first token of a segment in the one before",
            around(token_segments=boundary_in_the_segment_before)),
    Mistake("2d-end-of-text-outside", "an end-of-text in no segment: it belongs to the last",
            around(token_segments=lambda ids, segments, mask: torch.where(ids == 0, -1, segments))),
    Mistake("2d-raw-scores", "scores not divided by their aspect's maximum",
            around(normalised=lambda scores, aspect_max, present: scores)),
    Mistake("2d-one-maximum", "all scores divided by one maximum: each aspect has its own",
            around(normalised=lambda scores, aspect_max, present: scores / aspect_max.max())),
    Mistake("2d-min-max-per-response",
            "scores stretched to [0, 1] within each response: the maximum is that of the data",
            around(normalised=min_max)),
]


# ---------------------------------------------------------------------------------------------------------
# From logits to log-probabilities


def with_log_softmax(log_softmax):
    """Both functions of losses.py that take a log-softmax, with another one."""
    @right.at_least_float32
    def token_logps(logits, targets):
        return log_softmax(logits).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    @right.at_least_float32
    def token_kl(ref_logits, logits):
        log_q, log_s = log_softmax(ref_logits), log_softmax(logits)
        return (log_q.exp() * (log_q - log_s)).sum(-1)
    return inside(token_logps=token_logps, token_kl=token_kl)


LOGPS = [
    Mistake("log-of-softmax", "log(softmax(x)), which underflows where log_softmax does not",
            with_log_softmax(lambda x: x.softmax(-1).log()),
            f"{TDPO_AUTHORS}, trainers.py, _tdpo_get_batch_logps"),
    Mistake("softmax-overflow", "exp(x) / sum exp(x) without subtracting the maximum",
            with_log_softmax(lambda x: (x.exp() / x.exp().sum(-1, keepdim=True)).log())),
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
            inside(token_kl=lambda z_ref, z: sg(right.token_kl(z_ref, z)) + 0 * z.sum(-1))),
    Mistake("mean-for-sum", "means over tokens, per sequence and per segment, under a sum's equation",
            inside(segment_sum=mean_of_rows), f"{NOTEBOOK}; TRL's description of logps/chosen"),
]


# ---------------------------------------------------------------------------------------------------------
# Every loss of two responses


SEQUENCE = ("dpo_loss", "dpop_loss", "tdpo1_loss", "tdpo2_loss")
SEGMENTS = ("dpo2d_vanilla_loss", "dpo2d_loss")


def calls(names, change):
    """The right losses, called with other arguments: change(list of arguments, hyper-parameters)."""
    def patch(loss):
        def wrong(*args, **knobs):
            args, knobs = change(list(args), knobs)
            return loss(*args, **knobs)
        return wrong
    return inside(**{name: patch(getattr(right, name)) for name in names})


def beta(change):
    return calls(SEQUENCE + SEGMENTS, lambda args, knobs: (args, knobs | {"beta": change(knobs["beta"])}))


def order(names, *first):
    """The losses with their first arguments in another order; None stands for zeros."""
    def change(args, knobs):
        return [0 * args[i] if k is None else args[k] for i, k in enumerate(first)] + args[len(first):], knobs
    return calls(names, change)


def beta_in_front(loss):
    return lambda *args, **knobs: knobs["beta"] * loss(*args, **knobs | {"beta": 1.0})


def policy_detached(args, knobs):
    return [sg(x) + 0 * x for x in args[:2]] + args[2:], knobs


def logsigmoid(replacement):
    """Patches losses.py's own view of torch.nn.functional, and nobody else's."""
    return inside(F=SimpleNamespace(**(vars(F) | {"logsigmoid": replacement})))


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
            calls(SEQUENCE + SEGMENTS, policy_detached),
            "Goekdeniz-Guelmez/mlx-lm-lora until its pull request 25"),
    Mistake("sigmoid-for-log-sigmoid", "-sigma(h): the loss is -log sigma(h)", logsigmoid(torch.sigmoid)),
    Mistake("minus-missing", "log sigma(h) without its minus sign", logsigmoid(nls)),
    Mistake("margin-sign",
            "-log sigma(-h): the whole margin with the other sign",
            logsigmoid(lambda h: -nls(-h))),
    Mistake("label-smoothing", "a loss with label smoothing 0.1, 0.9 L(h) + 0.1 L(-h): the papers have none",
            logsigmoid(lambda h: -0.9 * nls(h) - 0.1 * nls(-h))),
    Mistake("log-of-sigmoid", "log(sigmoid(h)), which underflows where logsigmoid does not",
            logsigmoid(lambda h: torch.sigmoid(h).log())),
    Mistake("hinge-for-log-sigmoid", "max(0, -h), the log-sigmoid's asymptote",
            logsigmoid(lambda h: -F.relu(-h))),
]


# ---------------------------------------------------------------------------------------------------------
# DPOP. Each variant is a function of p: log-ratios c_w and c_l, h = beta (c_w - c_l), hinge = max(0, -c_w),
# beta, lam, bl = beta lam, and win = log pi(y_w|x) - log pi(y_l|x).


def dpop(loss):
    def wrong(w, l_, ref_w, ref_l, *, beta, lam):
        c_w, c_l = w - ref_w, l_ - ref_l
        return loss(SimpleNamespace(c_w=c_w, c_l=c_l, h=beta * (c_w - c_l), hinge=F.relu(-c_w), lam=lam,
                                    beta=beta, bl=beta * lam, win=w - l_))
    return inside(dpop_loss=wrong)


DPOP = [
    Mistake("dpop-hinge-outside-beta", "the hinge outside beta's bracket (Eq. 3 has it inside)",
            dpop(lambda p: nls(p.h - p.lam * p.hinge)), "a Rust crate, type DpopConfig"),
    Mistake("dpop-hinge-outside-log-sigmoid", "the hinge added outside the log-sigmoid (Eq. 3 has it inside)",
            dpop(lambda p: nls(p.h) + p.lam * p.hinge),
            f"a Paddle dpo_criterion.py, early version; {MLX}; abacusai/smaug, issue 2"),
    Mistake("dpop-hinge-outside-times-50",
            "50 times the hinge added outside the log-sigmoid, whatever lam is (Eq. 3 has lam inside)",
            dpop(lambda p: nls(p.h) + 50 * p.hinge), "MLX trainers that have delta = 50 as a constant"),
    Mistake("dpop-hinge-outside-with-beta",
            "beta times the hinge added outside the log-sigmoid (Eq. 3 has it inside)",
            dpop(lambda p: nls(p.h) + p.bl * p.hinge)),
    Mistake("dpop-hinge-subtracted-outside",
            "the hinge subtracted from the loss, outside the log-sigmoid: it rewards losing chosen "
            "probability",
            dpop(lambda p: nls(p.h) - p.lam * p.hinge),
            "hiyouga/LLaMA-Factory, issue 2587; a LLaMA2-Accessory fork, class DPOModel"),
    Mistake("dpop-ratio-hinge-outside",
            "lam max(0, 1 - pi/pi_ref) added outside the log-sigmoid: the hinge is on the log-ratio, inside",
            dpop(lambda p: nls(p.h) + p.lam * F.relu(1 - p.c_w.exp()))),
    Mistake("dpop-hinge-sign", "the hinge with the wrong sign: it rewards losing chosen probability",
            dpop(lambda p: nls(p.h + p.bl * p.hinge))),
    Mistake("dpop-hinge-on-gain",
            "the hinge max(0, log pi/pi_ref), turned round: it punishes gaining chosen probability",
            dpop(lambda p: nls(p.h - p.bl * F.relu(p.c_w)))),
    Mistake("dpop-hinge-on-rejected", "the hinge on the rejected response (Eq. 3 has it on the chosen one)",
            dpop(lambda p: nls(p.h - p.bl * F.relu(-p.c_l)))),
    Mistake("dpop-hinge-on-the-pair",
            "the hinge max(0, log pi(y_l) - log pi(y_w)): Eq. 3 compares the policy with the reference",
            dpop(lambda p: nls(p.h - p.bl * F.relu(-p.win))),
            "a LLaMA-Factory fork with a loss for puns, dpop_loss"),
    Mistake("dpop-hinge-on-the-pair-outside",
            "lam max(0, log pi(y_l) - log pi(y_w)) added outside the log-sigmoid",
            dpop(lambda p: nls(p.h) + p.lam * F.relu(-p.win))),
    Mistake("dpop-hinge-missing", "DPO: lam is not read", dpop(lambda p: nls(p.h))),
    Mistake("dpop-no-hinge", "lam log pi_ref/pi without max(0, .): it acts above the reference too",
            dpop(lambda p: nls(p.h + p.bl * p.c_w))),
    Mistake("dpop-clamp-at-zero",
            "clamp(min=0), whose derivative at 0 is 1: the first step is then not DPO's (relu takes 0)",
            dpop(lambda p: nls(p.h - p.bl * (-p.c_w).clamp(min=0))), "Cerebras/modelzoo, losses/DPOLoss.py"),
    Mistake("dpop-maximum-at-zero",
            "maximum(0, x), whose derivative at 0 is 1/2: the first step is then not DPO's (relu takes 0)",
            dpop(lambda p: nls(p.h - p.bl * torch.maximum(-p.c_w, torch.zeros_like(p.c_w))))),
    Mistake("dpop-hinge-detached", "a hinge that carries no gradient",
            dpop(lambda p: nls(p.h - p.bl * sg(p.hinge)))),
]


# ---------------------------------------------------------------------------------------------------------
# TDPO. Each variant gives the margin from u, beta times the two KLs, alpha and beta.


def tdpo1(margin):
    def wrong(w, l_, ref_w, ref_l, seq_kl_w, seq_kl_l, *, beta):
        u, a = beta * (w - ref_w) - beta * (l_ - ref_l), pipeline.HYPER["tdpo2"]["alpha"]
        return nls(margin(u, beta * seq_kl_w, beta * seq_kl_l, a, beta))
    return inside(tdpo1_loss=wrong)


def tdpo2(margin):
    def wrong(w, l_, ref_w, ref_l, seq_kl_w, seq_kl_l, *, beta, alpha):
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
    Mistake("tdpo1-stop-gradient-on-chosen",
            "a stop-gradient on the chosen KL: that is TDPO2's, TDPO1 has none",
            tdpo1(lambda u, k_w, k_l, a, b: u - (k_l - sg(k_w)))),
    Mistake("tdpo1-stop-gradient-on-both", "a stop-gradient on both KLs: TDPO1 has none",
            tdpo1(lambda u, k_w, k_l, a, b: u - sg(k_l - k_w) + 0 * (k_l + k_w))),
    Mistake("tdpo2-stop-gradient-missing", "TDPO2 without its stop-gradient on the chosen KL",
            tdpo2(lambda u, k_w, k_l, a, b: u - a * (k_l - k_w))),
    Mistake("tdpo2-stop-gradient-wrong-side",
            "the stop-gradient on the rejected KL: it belongs to the chosen one",
            tdpo2(lambda u, k_w, k_l, a, b: u - a * (sg(k_l) - k_w))),
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


# ---------------------------------------------------------------------------------------------------------
# 2D-DPO: the rewards, the sums, the selection


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
    def loss(w, l_, ref_w, ref_l, r_w, r_l, m_w, m_l, *, beta):
        i_w, i_l, paired = losses.select_segments(r_w, r_l, m_w, m_l)
        r_w, r_l = weights(r_w, r_l)
        a = torch.where(paired, ((w - ref_w) * r_w).gather(-1, i_w), 0.0)  # (B, K)
        b = torch.where(paired, ((l_ - ref_l) * r_l).gather(-1, i_l), 0.0)
        return combine(beta * margin(a, b), paired)
    return inside(dpo2d_loss=loss)


def selection(key_w=lambda r: -r, key_l=lambda r: r, reverse_ties=False, digits=5):
    """select_segments by other sort keys, with ties in the reverse order, or rounded to other digits."""
    def ranked(key, mask):
        key = torch.where(mask, key if digits is None else key.round(decimals=digits), torch.inf)
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


def leftovers_alone(w, l_, ref_w, ref_l, r_w, r_l, m_w, m_l, *, beta):
    """The segments that were not selected enter after all, each against nothing."""
    loss = right.dpo2d_loss(w, l_, ref_w, ref_l, r_w, r_l, m_w, m_l, beta=beta)
    i_w, i_l, paired = right.select_segments(r_w, r_l, m_w, m_l)
    for h, mask, index in ((beta * r_w * (w - ref_w), m_w, i_w), (-beta * r_l * (l_ - ref_l), m_l, i_l)):
        used = torch.zeros_like(mask).scatter(-1, index, paired)
        loss = loss + pair_sum(h, mask & ~used)
    return loss


def all_pairs(w, l_, ref_w, ref_l, r_w, r_l, m_w, m_l, *, beta):
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
    Mistake("2d-one-minus-r-selected",
            "1 - r as the reward of rejected segments, so that the best are selected",
            rewards(lambda r_w, r_l, m_w, m_l: (r_w, 1 - r_l), ("dpo2d_loss",))),
    Mistake("2d-vanilla-reward-sign",
            "r_l log pi/pi_ref added inside the log-sigmoid: the equation subtracts it",
            rewards(lambda r_w, r_l, m_w, m_l: (r_w, -r_l), ("dpo2d_vanilla_loss",))),
    Mistake("2d-reward-sign", "r_l log pi/pi_ref added inside the log-sigmoid: Eq. 6 subtracts it",
            group(margin=lambda a, b: a + b)),
    Mistake("2d-vanilla-reward-on-policy-only", "rewards on log pi alone: they weigh log pi/pi_ref",
            calls(("dpo2d_vanilla_loss",), reward_on_policy_only)),
    Mistake("2d-vanilla-mean", "a mean over the segments: the equation sums them",
            each(lambda r, m: r / m.sum(-1, keepdim=True), ("dpo2d_vanilla_loss",))),
    Mistake("2d-vanilla-is-group",
            "Eq. 6, one log-sigmoid for each pair of segments, where the vanilla form has one for all",
            inside(dpo2d_vanilla_loss=right.dpo2d_loss)),
    Mistake("2d-group-is-vanilla", "the vanilla form, one log-sigmoid for all segments",
            inside(dpo2d_loss=right.dpo2d_vanilla_loss)),
    Mistake("2d-one-log-sigmoid",
            "the selected segments summed inside one log-sigmoid: Eq. 6 has one for each pair",
            group(combine=lambda h, paired: nls(h.sum(-1)))),
    Mistake("2d-one-over-n", "a mean over the N pairs of segments: Eq. 6 sums, without 1/N",
            group(combine=lambda h, paired: pair_sum(h, paired) / paired.sum(-1))),
    Mistake("2d-all-pairs", "every chosen segment against every rejected one: Eq. 6 has N pairs",
            inside(dpo2d_loss=all_pairs)),
    Mistake("2d-top-n-rejected", "the highest-scored rejected segments: Eq. 6 takes the lowest",
            selection(key_l=lambda r: -r)),
    Mistake("2d-bottom-n-chosen", "the lowest-scored chosen segments: Eq. 6 takes the highest",
            selection(key_w=lambda r: r)),
    Mistake("2d-text-order", "segments paired in the order of the text, without selection",
            selection(torch.zeros_like, torch.zeros_like)),
    Mistake("2d-ties-reversed",
            "equal rewards in the reverse order of the text",
            selection(reverse_ties=True)),
    Mistake("2d-unrounded-ties",
            "a sort of rewards that were not rounded: equal ones differ in the last bit and leave the order "
            "of the text",
            selection(digits=None), "nachiketapatil/Robust-2D-DPO, 2ddpo.py, preference_loss"),
    Mistake("2d-worst-last",
            "the best chosen segment against the least bad of the N selected: it meets the worst",
            selected(worst_last)),
    Mistake("2d-padding-segments", "absent segments counted as pairs: N is the padded number",
            selected(lambda i_w, i_l, paired: (i_w, i_l, torch.ones_like(paired)))),
    Mistake("2d-n-of-batch",
            "one N for the batch: it is min(S_w, S_l) of each pair",
            selected(n_of_the_batch)),
    Mistake("2d-unselected-leak",
            "segments that were not selected entering the loss alone: they have no part in it",
            inside(dpo2d_loss=leftovers_alone)),
]

MISTAKES = [*BATCH, *LOGPS, *PAIRS, *DPOP, *TDPO, *TWO_D]
BY_NAME = {mistake.name: mistake for mistake in MISTAKES}
