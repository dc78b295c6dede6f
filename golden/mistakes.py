"""Known mistakes in ports of these losses, each as code that puts it in the place of the right line.

One list serves twice: tests/test_mistakes.py applies each of them and requires the test suite to notice;
golden/check.py runs the golden inputs through each of them to say which one a port's wrong number equals.

A mistake is a set of replacements, "module.attribute" -> function. Those in losses.* are seen by every test
that calls losses.py; those in golden.pipeline.* happen around the losses, in the handling of a batch.
A replacement calls the right function through `right` (losses.py) or `stage` (the pipeline), frozen here.
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


@dataclass(frozen=True)
class Mistake:
    """One wrong variant and the words for it.

    name: in kebab case. affects: the losses or quantities it changes. says: what follows "your ... equals".
    patches: "module.attribute" -> replacement. seen: where it was published; "ports": no place on record.
    """
    name: str
    affects: str
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


PAIR_LOSSES = ("dpo_loss", "dpop_loss", "tdpo1_loss", "tdpo2_loss", "dpo2d_vanilla_loss", "dpo2d_loss")


def every_pair_loss(change):
    """Patches for all losses of two responses; change(loss, args, knobs) makes the wrong one of the right."""
    def patch(name):
        loss = getattr(right, name)
        return lambda *args, **knobs: change(loss, args, knobs)
    return {f"losses.{name}": patch(name) for name in PAIR_LOSSES}


def logsigmoid(replacement):
    """Patches losses.py's own view of torch.nn.functional, and nobody else's."""
    return {"losses.F": SimpleNamespace(**(vars(F) | {"logsigmoid": replacement}))}


def nls(h):
    return -F.logsigmoid(h)


# ---------------------------------------------------------------------------------------------------------
# The batch: which logits, which tokens, which segments


def no_shift(logits):
    return logits


def mask_before_shift(ids, response_mask):
    return torch.cat([torch.zeros_like(response_mask[:, :1]), response_mask[:, :-1]], dim=1)


def prompt_too(ids, response_mask):
    first = torch.arange(ids.shape[1]) == 0                      # nothing predicts token 0
    return (response_mask.flip(1).cumsum(1).flip(1) > 0) & ~first  # up to the last of the response


def padding_too(ids, response_mask):
    return response_mask.cumsum(1) > 0                           # from the first response token on


def without_end_of_text(ids, response_mask):
    return response_mask & (ids != 0)                            # 0 is end-of-text, and pads


def without_first_token(ids, response_mask):
    return response_mask & (response_mask.cumsum(1) > 1)


def kl_prompt_too(ids, response_mask):
    return prompt_too(ids, response_mask)


def label_log_ratio(ref_logits, logits, targets):
    return right.token_logps(ref_logits, targets) - right.token_logps(logits, targets)


def label_term(ref_logits, logits, targets):
    return right.token_logps(ref_logits, targets).exp() * label_log_ratio(ref_logits, logits, targets)


def mean_of_rows(values, row, rows):
    count = right.segment_sum(torch.ones_like(values), row, rows)
    return right.segment_sum(values, row, rows) / count.clamp(min=1)


def segments_from_row_start(ids, segments, response_mask):
    """Boundaries counted in response tokens, looked up at the column of prompt + response."""
    start = response_mask.int().argmax(1, keepdim=True)          # (B, 1)
    last = start + response_mask.sum(1, keepdim=True) - 1
    column = torch.minimum(torch.arange(ids.shape[1]) + start, last)  # column t: response token t
    return torch.where(response_mask, segments.gather(1, column), -1)


def boundary_in_the_segment_before(ids, segments, response_mask):
    before = torch.cat([segments[:, :1], segments[:, :-1]], dim=1)
    return torch.where(before >= 0, before, segments)


def end_of_text_in_no_segment(ids, segments, response_mask):
    return torch.where(ids == 0, -1, segments)


def boundary_counted_twice(token_logps, segments, num):
    again = torch.cat([torch.full_like(segments[:, :1], -1), segments[:, :-1]], dim=1)
    opens = (again != segments) & (segments >= 0)                # token n_k + l_k opens segment k + 1
    again = torch.where(opens, again, -1)
    return stage.segment_logps(token_logps, segments, num) + stage.segment_logps(token_logps, again, num)


def dpop_per_token(name, q):
    if name != "dpop":
        return stage.loss_value(name, q)
    _, knobs = pipeline.LOSSES["dpop"]
    penalty = F.relu(q["ref_chosen_token_logps"] - q["chosen_token_logps"]).sum(-1)  # hinge before the sum
    ratios = q["chosen_logps"] - q["ref_chosen_logps"] - (q["rejected_logps"] - q["ref_rejected_logps"])
    return nls(knobs["beta"] * (ratios - knobs["lam"] * penalty))


BATCH = [
    Mistake("no-shift", "everything",
            "logits that were not shifted: column t scored on token t, where it predicts token t + 1",
            {"golden.pipeline.predicting_logits": no_shift},
            "lucidrains/self-rewarding-lm-pytorch, self_rewarding_lm_pytorch/dpo.py, "
            "log_prob_from_model_and_seq"),
    Mistake("mask-wrong-side", "everything",
            "a mask sliced on the wrong side of the shift (mask[:, :-1] for mask[:, 1:]): the first "
            "response token is lost, the one after the response scored",
            {"golden.pipeline.scored_tokens": mask_before_shift},
            "lucidrains/x-transformers, x_transformers/dpo.py:30-31 (corrected since)"),
    Mistake("prompt-scored", "sequence sums and what uses them",
            "the prompt's tokens counted with the response's",
            {"golden.pipeline.scored_tokens": prompt_too}),
    Mistake("padding-scored", "sequence sums and what uses them",
            "the padding counted with the response",
            {"golden.pipeline.scored_tokens": padding_too}),
    Mistake("end-of-text-not-scored", "everything",
            "a response without its end-of-text, masked because it is also the padding id",
            {"golden.pipeline.scored_tokens": without_end_of_text}),
    Mistake("first-token-not-scored", "everything",
            "a response without its first token",
            {"golden.pipeline.scored_tokens": without_first_token}),
    Mistake("kl-over-prompt", "tdpo1, tdpo2",
            "a sequential KL that also runs over the prompt",
            {"golden.pipeline.kl_tokens": kl_prompt_too}),
    Mistake("kl-on-the-label", "tdpo1, tdpo2",
            "the KL's term of the label token alone, q_y (log q_y - log s_y), instead of the sum over the "
            "vocabulary",
            {"golden.pipeline.position_kl": label_term}),
    Mistake("kl-as-label-log-ratio", "tdpo1, tdpo2",
            "log q_y - log s_y of the label token, a one-sample estimate, instead of the KL",
            {"golden.pipeline.position_kl": label_log_ratio}),
    Mistake("kl-mean-over-tokens", "tdpo1, tdpo2",
            "a mean of the KL over the response: D_SeqKL is a sum",
            {"golden.pipeline.sequence_kl": mean_of_rows}),
    Mistake("mean-per-sequence", "everything but 2d-dpo",
            "a mean over the response's tokens under a sum's equation",
            {"golden.pipeline.sequence_sum": mean_of_rows},
            "rasbt/LLMs-from-scratch, ch07 DPO notebook; lucidrains/x-transformers, x_transformers/dpo.py"),
    Mistake("divided-by-pairs", "gradients",
            "gradients of the mean over the pairs; the golden ones are pair by pair: backward from "
            "loss.sum()",
            {"golden.pipeline.objective": lambda loss: loss.mean()}),
    Mistake("dpop-hinge-per-token", "dpop",
            "the hinge taken at every token and then summed (Eq. 3 takes it once, of the sequence)",
            {"golden.pipeline.loss_value": dpop_per_token}),
    Mistake("reward-includes-kl", "rewards of tdpo1, tdpo2",
            "a reward with the sequential KL in it: the implicit reward stays beta log pi/pi_ref",
            {"golden.pipeline.implicit_reward": lambda logps, ref, kl, *, beta: beta * (logps - ref + kl)},
            "Vance0124/Token-level-Direct-Preference-Optimization, trainers.py, tdpo_loss"),
    Mistake("reward-without-beta", "rewards",
            "the log-ratio itself: the implicit reward is beta times it",
            {"golden.pipeline.implicit_reward": lambda logps, ref, kl, *, beta: logps - ref}),
    Mistake("reward-without-reference", "rewards",
            "beta log pi: the implicit reward is relative to the reference",
            {"golden.pipeline.implicit_reward": lambda logps, ref, kl, *, beta: beta * logps}),
    Mistake("2d-segments-over-prompt", "2d-dpo, 2d-dpo-vanilla",
            "segment boundaries of the response looked up in prompt + response",
            {"golden.pipeline.token_segments": segments_from_row_start},
            "a third-party 2D-DPO"),
    Mistake("2d-boundary-twice", "2d-dpo, 2d-dpo-vanilla",
            "segments read as closed intervals: the token on a boundary counts in both",
            {"golden.pipeline.segment_logps": boundary_counted_twice},
            "the upper limit as printed in arXiv:2410.19720"),
    Mistake("2d-boundary-off-by-one", "2d-dpo, 2d-dpo-vanilla",
            "segments that start one token late: the first token of a segment in the one before",
            {"golden.pipeline.token_segments": boundary_in_the_segment_before}),
    Mistake("2d-end-of-text-outside", "2d-dpo, 2d-dpo-vanilla",
            "an end-of-text in no segment: it belongs to the last",
            {"golden.pipeline.token_segments": end_of_text_in_no_segment}),
    Mistake("2d-raw-scores", "2d-dpo, 2d-dpo-vanilla",
            "scores not divided by their aspect's maximum",
            {"golden.pipeline.normalised": lambda scores, aspect_max: scores}),
]


# ---------------------------------------------------------------------------------------------------------
# From logits to log-probabilities


def log_of_softmax(x):
    return x.softmax(-1).log()


def log_of_plain_softmax(x):
    e = x.exp()                                                  # without subtracting the maximum
    return (e / e.sum(-1, keepdim=True)).log()


def with_log_softmax(log_softmax):
    """Both functions of losses.py that take a log-softmax, with another one."""
    def token_logps(logits, targets):
        log_s = log_softmax(right.at_least_float32(logits))
        return log_s.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    def token_kl(ref_logits, logits):
        log_q, log_s = (log_softmax(right.at_least_float32(z)) for z in (ref_logits, logits))
        return (log_q.exp() * (log_q - log_s)).sum(-1)
    return {"losses.token_logps": token_logps, "losses.token_kl": token_kl}


def raw_logit(logits, targets):
    return right.at_least_float32(logits).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def vocabulary_mean_kl(ref_logits, logits):
    return right.token_kl(ref_logits, logits) / logits.shape[-1]


def stopped_kl(ref_logits, logits):
    return right.token_kl(ref_logits, logits).detach() + 0 * logits.sum(-1)


LOGPS = [
    Mistake("log-of-softmax", "everything, at large gaps",
            "log(softmax(x)), which underflows where log_softmax does not",
            with_log_softmax(log_of_softmax),
            "Vance0124/Token-level-Direct-Preference-Optimization, trainers.py, _tdpo_get_batch_logps"),
    Mistake("softmax-overflow", "everything, at large logits",
            "exp(x) / sum exp(x) without subtracting the maximum",
            with_log_softmax(log_of_plain_softmax)),
    Mistake("base-2-log", "everything",
            "logarithms to the base 2: the unit is the nat",
            {"losses.token_logps": lambda z, y: right.token_logps(z, y) / math.log(2),
             "losses.token_kl": lambda q, s: right.token_kl(q, s) / math.log(2)}),
    Mistake("logits-not-normalised", "everything but the KL",
            "the label's logit itself, without log_softmax",
            {"losses.token_logps": raw_logit}),
    Mistake("probability-for-logp", "everything but the KL",
            "probabilities where log-probabilities belong",
            {"losses.token_logps": lambda z, y: right.token_logps(z, y).exp()}),
    Mistake("kl-reversed", "tdpo1, tdpo2",
            "the reverse KL(pi || pi_ref): D_SeqKL is forward, KL(pi_ref || pi)",
            {"losses.token_kl": lambda ref_logits, logits: right.token_kl(logits, ref_logits)}),
    Mistake("kl-mean-over-vocabulary", "tdpo1, tdpo2",
            "a mean over the vocabulary (F.kl_div's default): the KL is a sum",
            {"losses.token_kl": vocabulary_mean_kl}),
    Mistake("kl-gradient-stopped", "tdpo1, tdpo2, gradients",
            "a KL computed without gradient, as if the reference's no_grad covered it",
            {"losses.token_kl": stopped_kl}),
    Mistake("mean-for-sum", "everything",
            "means over tokens, per sequence and per segment, under a sum's equation",
            {"losses.segment_sum": mean_of_rows},
            "rasbt/LLMs-from-scratch, ch07 DPO notebook; TRL's description of logps/chosen"),
]


# ---------------------------------------------------------------------------------------------------------
# Every loss of two responses


def swap_responses(loss, args, knobs):
    """The arguments alternate, chosen then rejected."""
    return loss(*[args[i ^ 1] for i in range(len(args))], **knobs)


def swap_models(loss, args, knobs):
    return loss(*args[2:4], *args[:2], *args[4:], **knobs)


def no_reference(loss, args, knobs):
    return loss(*args[:2], torch.zeros_like(args[2]), torch.zeros_like(args[3]), *args[4:], **knobs)


def beta_is_one(loss, args, knobs):
    return loss(*args, **knobs | {"beta": 1.0})


def beta_in_front(loss, args, knobs):
    return knobs["beta"] * beta_is_one(loss, args, knobs)


def beta_divides(loss, args, knobs):
    return loss(*args, **knobs | {"beta": 1 / knobs["beta"]})


def no_policy_gradient(loss, args, knobs):
    """A policy evaluated under no_grad: right value, no gradient."""
    return loss(args[0].detach(), args[1].detach(), *args[2:], **knobs) + 0 * (args[0].sum() + args[1].sum())


PAIRS = [
    Mistake("sft-sign", "sft",
            "log pi(y_w|x) without its minus sign",
            {"losses.sft_loss": lambda logps: logps}),
    Mistake("responses-swapped", "every loss of two responses",
            "chosen and rejected swapped",
            every_pair_loss(swap_responses)),
    Mistake("models-swapped", "every loss of two responses",
            "policy and reference swapped",
            every_pair_loss(swap_models)),
    Mistake("reference-missing", "every loss of two responses",
            "log pi where log pi/pi_ref belongs: the reference is missing",
            every_pair_loss(no_reference)),
    Mistake("beta-missing", "every loss of two responses",
            "the loss without beta (beta = 1)",
            every_pair_loss(beta_is_one)),
    Mistake("beta-in-front", "every loss of two responses",
            "beta in front of the log-sigmoid: it belongs inside",
            every_pair_loss(beta_in_front)),
    Mistake("beta-divides", "every loss of two responses",
            "a division by beta",
            every_pair_loss(beta_divides)),
    Mistake("policy-gradient-stopped", "every loss of two responses, gradients",
            "log-probabilities of the policy that carry no gradient",
            every_pair_loss(no_policy_gradient)),
    Mistake("sigmoid-for-log-sigmoid", "every loss of two responses",
            "-sigma(h): the loss is -log sigma(h)",
            logsigmoid(torch.sigmoid)),
    Mistake("minus-missing", "every loss of two responses",
            "log sigma(h) without its minus sign",
            logsigmoid(lambda h: -F.logsigmoid(h))),
    Mistake("margin-sign", "every loss of two responses",
            "-log sigma(-h): the whole margin with the other sign",
            logsigmoid(lambda h: F.logsigmoid(-h))),
    Mistake("log-of-sigmoid", "every loss of two responses, at large margins",
            "log(sigmoid(h)), which underflows where logsigmoid does not",
            logsigmoid(lambda h: torch.sigmoid(h).log())),
    Mistake("hinge-for-log-sigmoid", "every loss of two responses",
            "max(0, -h), the log-sigmoid's asymptote",
            logsigmoid(lambda h: -F.relu(-h))),
]


# ---------------------------------------------------------------------------------------------------------
# DPOP. Each variant is a function of the two log-ratios: h for the log-sigmoid, and what is added outside.


def dpop(h, outside=lambda rho_w, rho_l, beta, lam: 0):
    def loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta, lam):
        ratios = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
        return nls(h(*ratios, beta, lam)) + outside(*ratios, beta, lam)
    return {"losses.dpop_loss": loss}


def dpo_margin(rho_w, rho_l, beta, lam):
    return beta * (rho_w - rho_l)


DPOP = [
    Mistake("dpop-hinge-outside-beta", "dpop",
            "the hinge outside beta's bracket (Eq. 3 has it inside)",
            dpop(lambda rho_w, rho_l, beta, lam: beta * (rho_w - rho_l) - lam * F.relu(-rho_w))),
    Mistake("dpop-hinge-outside-log-sigmoid", "dpop",
            "the hinge added outside the log-sigmoid (Eq. 3 has it inside)",
            dpop(dpo_margin, lambda rho_w, rho_l, beta, lam: lam * F.relu(-rho_w)),
            "a Paddle dpo_criterion.py, early version"),
    Mistake("dpop-hinge-outside-with-beta", "dpop",
            "beta times the hinge added outside the log-sigmoid (Eq. 3 has it inside)",
            dpop(dpo_margin, lambda rho_w, rho_l, beta, lam: beta * lam * F.relu(-rho_w))),
    Mistake("dpop-hinge-subtracted-outside", "dpop",
            "the hinge subtracted from the loss, outside the log-sigmoid: it rewards losing chosen "
            "probability",
            dpop(dpo_margin, lambda rho_w, rho_l, beta, lam: -lam * F.relu(-rho_w)),
            "a LLaMA2-Accessory fork, class DPOModel"),
    Mistake("dpop-hinge-sign", "dpop",
            "the hinge with the wrong sign: it rewards losing chosen probability",
            dpop(lambda rho_w, rho_l, beta, lam: beta * (rho_w - rho_l + lam * F.relu(-rho_w)))),
    Mistake("dpop-hinge-on-gain", "dpop",
            "the hinge max(0, log pi/pi_ref), turned round: it punishes gaining chosen probability",
            dpop(lambda rho_w, rho_l, beta, lam: beta * (rho_w - rho_l - lam * F.relu(rho_w)))),
    Mistake("dpop-hinge-on-rejected", "dpop",
            "the hinge on the rejected response (Eq. 3 has it on the chosen one)",
            dpop(lambda rho_w, rho_l, beta, lam: beta * (rho_w - rho_l - lam * F.relu(-rho_l)))),
    Mistake("dpop-hinge-missing", "dpop",
            "DPO: lam is not read",
            dpop(dpo_margin)),
    Mistake("dpop-no-hinge", "dpop",
            "lam log pi_ref/pi without max(0, .): it acts above the reference too",
            dpop(lambda rho_w, rho_l, beta, lam: beta * (rho_w - rho_l + lam * rho_w))),
    Mistake("dpop-clamp-at-zero", "dpop, gradient at the reference",
            "clamp(min=0), whose derivative at 0 is 1: the first step is then not DPO's (relu takes 0)",
            dpop(lambda rho_w, rho_l, beta, lam: beta * (rho_w - rho_l - lam * (-rho_w).clamp(min=0)))),
    Mistake("dpop-hinge-detached", "dpop, gradient",
            "a hinge that carries no gradient",
            dpop(lambda rho_w, rho_l, beta, lam: beta * (rho_w - rho_l - lam * F.relu(-rho_w).detach()))),
]


# ---------------------------------------------------------------------------------------------------------
# TDPO. Each variant is a function of u and of beta times the two sequential KLs.


def tdpo1(h):
    def loss(c, r, ref_c, ref_r, seq_kl_w, seq_kl_l, *, beta):
        return nls(h(beta * (c - ref_c) - beta * (r - ref_r), beta * seq_kl_w, beta * seq_kl_l, beta))
    return {"losses.tdpo1_loss": loss}


def tdpo2(h):
    def loss(c, r, ref_c, ref_r, seq_kl_w, seq_kl_l, *, beta, alpha):
        return nls(h(beta * (c - ref_c) - beta * (r - ref_r), beta * seq_kl_w, beta * seq_kl_l, beta, alpha))
    return {"losses.tdpo2_loss": loss}


def sg(x):
    return x.detach()


def tdpo2_is_tdpo1(*args, beta, alpha):
    return right.tdpo1_loss(*args, beta=beta)


def tdpo1_is_tdpo2(*args, beta):
    return right.tdpo2_loss(*args, beta=beta, alpha=pipeline.LOSSES["tdpo2"][1]["alpha"])


TDPO = [
    Mistake("tdpo-delta-sign", "tdpo1, tdpo2",
            "u + delta: the sign of delta, or K_w and K_l, the wrong way round",
            tdpo1(lambda u, k_w, k_l, beta: u - (k_w - k_l))
            | tdpo2(lambda u, k_w, k_l, beta, alpha: u - alpha * (sg(k_w) - k_l))),
    Mistake("tdpo-kl-added", "tdpo1, tdpo2",
            "the sum of the two KLs: delta is their difference, K_l - K_w",
            tdpo1(lambda u, k_w, k_l, beta: u - (k_l + k_w))
            | tdpo2(lambda u, k_w, k_l, beta, alpha: u - alpha * (k_l + sg(k_w)))),
    Mistake("tdpo-kl-without-beta", "tdpo1, tdpo2",
            "a delta without beta: beta multiplies the KLs too",
            tdpo1(lambda u, k_w, k_l, beta: u - (k_l - k_w) / beta)
            | tdpo2(lambda u, k_w, k_l, beta, alpha: u - alpha * (k_l - sg(k_w)) / beta)),
    Mistake("tdpo-kl-missing", "tdpo1, tdpo2",
            "DPO: the KLs are not read",
            tdpo1(lambda u, k_w, k_l, beta: u + 0 * (k_l + k_w))
            | tdpo2(lambda u, k_w, k_l, beta, alpha: u + 0 * (k_l + k_w))),
    Mistake("tdpo2-is-tdpo1", "tdpo2",
            "TDPO1: the switch to TDPO2 had no effect",
            {"losses.tdpo2_loss": tdpo2_is_tdpo1},
            "Vance0124/Token-level-Direct-Preference-Optimization, tdpo.yaml:3 against README:57"),
    Mistake("tdpo1-is-tdpo2", "tdpo1",
            "TDPO2 at alpha 0.5: the switch to TDPO1 had no effect",
            {"losses.tdpo1_loss": tdpo1_is_tdpo2}),
    Mistake("tdpo2-stop-gradient-missing", "tdpo2, gradients",
            "TDPO2 without its stop-gradient on the chosen KL",
            tdpo2(lambda u, k_w, k_l, beta, alpha: u - alpha * (k_l - k_w))),
    Mistake("tdpo2-stop-gradient-wrong-side", "tdpo2, gradients",
            "the stop-gradient on the rejected KL: it belongs to the chosen one",
            tdpo2(lambda u, k_w, k_l, beta, alpha: u - alpha * (sg(k_l) - k_w))),
    Mistake("tdpo2-stop-gradient-on-both", "tdpo2, gradients",
            "the stop-gradient on both KLs: it belongs to the chosen one only",
            tdpo2(lambda u, k_w, k_l, beta, alpha: u - alpha * sg(k_l - k_w) + 0 * k_l)),
    Mistake("tdpo2-alpha-on-rejected-only", "tdpo2",
            "alpha on the rejected KL only: it multiplies both",
            tdpo2(lambda u, k_w, k_l, beta, alpha: u - (alpha * k_l - sg(k_w)))),
    Mistake("tdpo2-alpha-on-chosen-only", "tdpo2",
            "alpha on the chosen KL only: it multiplies both",
            tdpo2(lambda u, k_w, k_l, beta, alpha: u - (k_l - alpha * sg(k_w)))),
    Mistake("tdpo2-alpha-missing", "tdpo2",
            "TDPO2 without alpha (alpha = 1)",
            tdpo2(lambda u, k_w, k_l, beta, alpha: u - (k_l - sg(k_w)))),
    Mistake("tdpo2-alpha-on-everything", "tdpo2",
            "alpha times the whole margin: it multiplies delta only",
            tdpo2(lambda u, k_w, k_l, beta, alpha: alpha * (u - (k_l - sg(k_w))))),
]


# ---------------------------------------------------------------------------------------------------------
# 2D-DPO: the rewards, the sums, the selection


def rewards_inside_out(c, r, ref_c, ref_r, r_w, r_l, m_w, m_l):
    """The rejected rewards negated, which turns the minus inside into a plus."""
    return c, r, ref_c, ref_r, r_w, -r_l, m_w, m_l


def only_vanilla(change):
    """The right vanilla loss, called with other arguments, change(*args)."""
    return {
        "losses.dpo2d_vanilla_loss": lambda *args, beta: right.dpo2d_vanilla_loss(*change(*args), beta=beta)}


def both_2d(change):
    """Both 2D losses, called with other arguments."""
    return only_vanilla(change) | {
        "losses.dpo2d_loss": lambda *args, beta: right.dpo2d_loss(*change(*args), beta=beta)}


def no_rewards(c, r, ref_c, ref_r, r_w, r_l, m_w, m_l):
    return c, r, ref_c, ref_r, torch.ones_like(r_w), torch.ones_like(r_l), m_w, m_l


def swap_rewards(c, r, ref_c, ref_r, r_w, r_l, m_w, m_l):
    """Each side weighted with the other side's rewards, where the other side has that segment."""
    S = min(r_w.shape[1], r_l.shape[1])
    a, b = r_w.clone(), r_l.clone()
    a[:, :S], b[:, :S] = r_l[:, :S], r_w[:, :S]
    return c, r, ref_c, ref_r, a, b, m_w, m_l


def reward_on_policy_only(c, r, ref_c, ref_r, r_w, r_l, m_w, m_l):
    return r_w * c, r_l * r, ref_c, ref_r, torch.ones_like(r_w), torch.ones_like(r_l), m_w, m_l


def pair_sum(h, paired):
    return torch.where(paired, nls(h), 0.0).sum(-1)


def group(margin=lambda a, b, beta: beta * (a - b), combine=pair_sum):
    """Eq. 6 rebuilt with another margin of a pair of segments, or another way to combine the pairs."""
    def loss(c, r, ref_c, ref_r, r_w, r_l, m_w, m_l, *, beta):
        i_w, i_l, paired = losses.select_segments(r_w, r_l, m_w, m_l)
        a = torch.where(paired, ((c - ref_c) * r_w).gather(-1, i_w), 0.0)  # (B, K)
        b = torch.where(paired, ((r - ref_r) * r_l).gather(-1, i_l), 0.0)
        return combine(margin(a, b, beta), paired)
    return {"losses.dpo2d_loss": loss}


def selection(best=True, worst=True, stable=True, sort=True):
    """select_segments with the sides' order turned round, ties in the reverse order, or no sorting at all."""
    def ranked(rewards, mask, descending):
        if not sort:
            return torch.where(mask, 0.0, 1.0).argsort(dim=-1, stable=True)  # as they stand in the text
        key = torch.where(mask, rewards, -torch.inf if descending else torch.inf)
        if stable:
            return key.argsort(dim=-1, descending=descending, stable=True)
        return rewards.shape[1] - 1 - key.flip(1).argsort(dim=-1, descending=descending, stable=True)

    def select(r_w, r_l, m_w, m_l):
        _, _, paired = right.select_segments(r_w, r_l, m_w, m_l)
        K = paired.shape[1]
        return ranked(r_w, m_w, best)[:, :K], ranked(r_l, m_l, not worst)[:, :K], paired
    return {"losses.select_segments": select}


def pairs_of_padding(r_w, r_l, m_w, m_l):
    """Absent segments kept: N is the padded number of segments; their logratio is 0, log 2 each."""
    i_w, i_l, paired = right.select_segments(r_w, r_l, m_w, m_l)
    return i_w, i_l, torch.ones_like(paired)


def n_of_the_batch(r_w, r_l, m_w, m_l):
    i_w, i_l, paired = right.select_segments(r_w, r_l, m_w, m_l)
    return i_w, i_l, paired & (torch.arange(paired.shape[1]) < paired.sum(-1).min())


def worst_last(r_w, r_l, m_w, m_l):
    """The right segments, but the best chosen one against the least bad of the selected rejected ones."""
    i_w, i_l, paired = right.select_segments(r_w, r_l, m_w, m_l)
    n = paired.sum(-1, keepdim=True)
    k = torch.arange(paired.shape[1])
    return i_w, i_l.gather(-1, torch.where(paired, n - 1 - k, k)), paired


def leftovers_alone(c, r, ref_c, ref_r, r_w, r_l, m_w, m_l, *, beta):
    """The segments that were not selected enter after all, each against nothing."""
    loss = right.dpo2d_loss(c, r, ref_c, ref_r, r_w, r_l, m_w, m_l, beta=beta)
    i_w, i_l, paired = right.select_segments(r_w, r_l, m_w, m_l)
    for h, mask, index in ((beta * r_w * (c - ref_c), m_w, i_w), (-beta * r_l * (r - ref_r), m_l, i_l)):
        used = torch.zeros_like(mask).scatter(-1, index, paired)
        loss = loss + pair_sum(h, mask & ~used)
    return loss


def segment_mean(c, r, ref_c, ref_r, r_w, r_l, m_w, m_l):
    return c, r, ref_c, ref_r, r_w / m_w.sum(-1, keepdim=True), r_l / m_l.sum(-1, keepdim=True), m_w, m_l


TWO_D = [
    Mistake("2d-weights-one-hot", "2d-dpo, 2d-dpo-vanilla",
            "the first aspect alone as reward: W weighs all of them",
            {"losses.segment_rewards": lambda scores, W: scores[..., 0] * W.sum()}),
    Mistake("2d-weights-uniform", "2d-dpo, 2d-dpo-vanilla",
            "a plain mean over the aspects as reward: W is not read",
            {"losses.segment_rewards": lambda scores, W: scores.mean(-1)}),
    Mistake("2d-weights-sum", "2d-dpo, 2d-dpo-vanilla",
            "a plain sum over the aspects as reward: W is not read",
            {"losses.segment_rewards": lambda scores, W: scores.sum(-1)}),
    Mistake("2d-weights-reversed", "2d-dpo, 2d-dpo-vanilla",
            "W in the reverse order of the aspects",
            {"losses.segment_rewards": lambda scores, W: (scores * W.flip(0)).sum(-1)}),
    Mistake("2d-rewards-missing", "2d-dpo, 2d-dpo-vanilla",
            "rewards that are not read (r = 1), selection included",
            both_2d(no_rewards)),
    Mistake("2d-rewards-swapped", "2d-dpo, 2d-dpo-vanilla",
            "each response weighted with the other one's rewards",
            both_2d(swap_rewards)),
    Mistake("2d-vanilla-reward-sign", "2d-dpo-vanilla",
            "r_l log pi/pi_ref added inside the log-sigmoid: the equation subtracts it",
            only_vanilla(rewards_inside_out)),
    Mistake("2d-reward-sign", "2d-dpo",
            "r_l log pi/pi_ref added inside the log-sigmoid: Eq. 6 subtracts it",
            group(margin=lambda a, b, beta: beta * (a + b))),
    Mistake("2d-vanilla-reward-on-policy-only", "2d-dpo-vanilla",
            "rewards on log pi alone: they weigh log pi/pi_ref",
            only_vanilla(reward_on_policy_only)),
    Mistake("2d-vanilla-mean", "2d-dpo-vanilla",
            "a mean over the segments: the equation sums them",
            only_vanilla(segment_mean)),
    Mistake("2d-vanilla-is-group", "2d-dpo-vanilla",
            "Eq. 6, one log-sigmoid for each pair of segments, where the vanilla form has one for all",
            {"losses.dpo2d_vanilla_loss": right.dpo2d_loss}),
    Mistake("2d-group-is-vanilla", "2d-dpo",
            "the vanilla form, one log-sigmoid for all segments",
            {"losses.dpo2d_loss": right.dpo2d_vanilla_loss}),
    Mistake("2d-one-log-sigmoid", "2d-dpo",
            "the selected segments summed inside one log-sigmoid: Eq. 6 has one for each pair",
            group(combine=lambda h, paired: nls(h.sum(-1)))),
    Mistake("2d-one-over-n", "2d-dpo",
            "a mean over the N pairs of segments: Eq. 6 sums, without 1/N",
            group(combine=lambda h, paired: pair_sum(h, paired) / paired.sum(-1))),
    Mistake("2d-top-n-rejected", "2d-dpo",
            "the highest-scored rejected segments: Eq. 6 takes the lowest",
            selection(worst=False)),
    Mistake("2d-bottom-n-chosen", "2d-dpo",
            "the lowest-scored chosen segments: Eq. 6 takes the highest",
            selection(best=False)),
    Mistake("2d-text-order", "2d-dpo",
            "segments paired in the order of the text, without selection",
            selection(sort=False)),
    Mistake("2d-ties-reversed", "2d-dpo",
            "equal rewards in the reverse order of the text",
            selection(stable=False)),
    Mistake("2d-worst-last", "2d-dpo",
            "the best chosen segment against the least bad of the N selected: it meets the worst",
            {"losses.select_segments": worst_last}),
    Mistake("2d-padding-segments", "2d-dpo",
            "absent segments counted as pairs: N is the padded number",
            {"losses.select_segments": pairs_of_padding}),
    Mistake("2d-n-of-batch", "2d-dpo",
            "one N for the batch: it is min(S_w, S_l) of each pair",
            {"losses.select_segments": n_of_the_batch}),
    Mistake("2d-unselected-leak", "2d-dpo",
            "segments that were not selected entering the loss alone: they have no part in it",
            {"losses.dpo2d_loss": leftovers_alone}),
]

MISTAKES = [*BATCH, *LOGPS, *PAIRS, *DPOP, *TDPO, *TWO_D]
BY_NAME = {mistake.name: mistake for mistake in MISTAKES}
