"""Train a policy on preference pairs: python train.py [--loss dpo] [--data FILE ...] [--init FOLDER] ...

Without arguments: toy reviews, a small GPT, its own SFT reference, then DPO; offline, within a minute.
Read Config, then `step` (one micro-batch), `evaluate`, `train` (the loop) and `main`.

B pairs, T columns, N response tokens, C channels, V vocabulary.
"""

from plumbing import machine  # isort: skip  (before torch, which reads these settings when it is imported)

import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from data import TILE, collate, micro_batches, pair_terms, step_indices
from losses import LOSSES, knobs_of, terms_of, token_kl, token_logps
from model import GPT, GPTConfig
from plumbing import flags, ranks, report
from plumbing.folder import Run, find_sft, identity_of, weights_hash
from plumbing.reference import Memory, Reference, no_reference


@dataclass(frozen=True)
class Config:
    # what to train
    loss: str = "dpo"  # a name in losses.LOSSES: sft, dpo, dpop, tdpo1, tdpo2, 2d-dpo, 2d-dpo-vanilla
    init: str | None = None  # the start: a model folder or a name (gpt2, ...); default: SFT made first
    ref: str | None = None  # the reference: a model folder or a name; default: the start
    out_dir: str | None = None  # folder of the run; default: out/LOSS, or out/LOSS-2, ... where that is taken
    resume: bool = False  # go on with the run in --out_dir; flags not given again stay as they were
    overwrite: bool = False  # replace the run in --out_dir
    seed: int = 0  # of initial weights, order of pairs and samples
    # the data
    data: tuple = ()  # files or folders of pairs; default: the toy reviews
    val_data: tuple = ()  # held-out pairs; default: 10 % of --data (at most 256 pairs), split by prompt
    tokenizer: str | None = None  # gpt2, bytes, FILE.tiktoken or FOLDER; default: --init's, or gpt2
    # optimization
    steps: int | None = None  # optimizer steps; default 40, sft 150
    batch_size: int = 64  # pairs in an optimizer step
    micro_batch_size: int | None = None  # most pairs in a forward pass; default: as the tokens allow
    micro_batch_tokens: int | None = None  # most tokens there, padding included; default 2048, 32768 on cuda
    lr: float | None = None  # AdamW's learning rate; default 5e-5, sft 2e-3: for small models from scratch
    warmup_steps: int = 10  # of linear warm-up; constant after it, so that --steps may grow
    weight_decay: float = 0.0  # of matrices; biases and LayerNorm have none
    grad_clip: float = 1.0  # largest gradient norm; 0 = never clip
    sft_steps: int | None = None  # steps of the SFT that makes the start; default 150
    sft_lr: float | None = None  # its learning rate; default 2e-3
    # the loss
    beta: float | None = None  # 1/nats, larger stays closer to the reference; default 0.1, dpop 0.3
    lam: float | None = None  # dpop: weight of the penalty; default 50
    alpha: float | None = None  # tdpo2: weight of the KL difference; default 0.5
    aspect_weights: tuple = ()  # 2d-dpo: weight of each aspect, sum 1; default uniform
    rejected_weight: str | None = None  # 2d-dpo-vanilla: score (as printed, default) or badness = 1 - score
    # the model, where there is no --init
    n_layer: int | None = None  # default 2
    n_head: int | None = None  # default 4
    n_embd: int | None = None  # channels; default 128
    block_size: int | None = None  # positions: prompt + longer response; default 256, or that of --init
    # logging
    eval_every: int = 20  # steps between evaluations on the held-out pairs; 0 = first and last only
    save_every: int = 500  # steps between checkpoints; 0 = last only
    log_every: int = 5  # steps between log lines
    # the machine
    device: str | None = None  # cpu, cuda, cuda:N, mps, ...; default: cuda where there is one, else cpu
    dtype: str | None = None  # float32, bfloat16 (autocast), float64; default bfloat16 on cuda, else float32
    compile: bool | None = None  # torch.compile the trunk; default: on cuda, over 10 000 ids, with a compiler
    compile_head: bool | None = None  # and the head; default: as --compile, or on the cpu over 10 000 ids
    pack: bool | None = None  # pairs back to back in one row; default: on cuda, where the trunk is compiled
    head_tokens: int | None = None  # response tokens with logits at once; default: 2^24 logits, 2^28 on cuda


# ---------------------------------------------------------------------------------------------------------
# One micro-batch


def precision(cfg):
    """bfloat16 is autocast over float32 weights; float32 and float64 are the weights' own."""
    bfloat16 = cfg.dtype == "bfloat16"
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16) if bfloat16 else nullcontext()


def hidden_states(model, batch, cfg):
    """The trunk: the hidden state that predicts each response token of a batch, (N, C)."""
    if cfg.compile:
        machine.compile_blocks(model, dynamic=not cfg.pack)  # packed rows have one length
    with precision(cfg):
        hidden = model(batch.tokens, batch.positions, batch.mask())  # (G, T, C)
    row, column = batch.source
    return hidden[row, column]


def head(policy, hidden, target, reference=None, ref_hidden=None):
    """Hidden states (N, C) of response tokens -> log pi, log pi_ref, KL(pi_ref || pi), each (N,).

    The last two are None without the reference's hidden states.
    """
    centered = torch.is_autocast_enabled(hidden.device.type)  # in bfloat16, where large logits lose digits
    logits = policy.logits(hidden, centered)  # (N, V); nothing of this size outlives a chunk
    logps = token_logps(logits, target)
    if ref_hidden is None:
        return logps, None, None
    with torch.no_grad():
        ref_logits = reference.logits(ref_hidden, centered)  # (N, V)
        ref_logps = token_logps(ref_logits, target)
    return logps, ref_logps, token_kl(ref_logits, logits)


def part(x, n):
    """x[n], where there is an x."""
    return None if x is None else x[n]


def run_head(cfg, *args):
    """`head`, compiled or not, in the run's precision."""
    with precision(cfg):
        return (machine.compiled(head) if cfg.compile_head else head)(*args)


@torch.no_grad()
def response_logps(model, batch, cfg):
    """log pi(y_t | x, y_<t) of every response token of a batch, (N,), without a gradient."""
    hidden = hidden_states(model, batch, cfg)  # (N, C)
    return torch.cat([run_head(cfg, model, hidden[n], batch.target[n])[0]
                      for _, n in batch.chunks(cfg.head_tokens)])


def call(loss, terms, cfg):
    """The loss of some pairs, (B,). Its signature says which terms and which hyper-parameters it takes."""
    knobs = {name: getattr(cfg, name) for name in knobs_of(loss)}
    return loss(**{name: terms[name] for name in terms_of(loss)}, **knobs)


def step(policy, reference, batch, loss, scale, cfg):
    """One micro-batch: add the gradient of scale * (sum of its losses) to the policy's.

    The trunk runs once. The head and the loss run on a few whole pairs at a time, each chunk with its own
    backward into the hidden states: a pair's loss needs only its own tokens, so this is exact, and the
    logits of the whole batch never exist. One backward through the trunk ends it.

    Args: policy, the GPT that learns; reference, a plumbing.reference.Reference; batch, a data.Batch; loss,
    a function of losses.py; scale, or None: numbers only, no gradient; cfg, a Config.
    Returns {name: (B,)}: loss, the terms of losses.py by name (segments summed), the pairs' numbers.
    """
    hidden = hidden_states(policy, batch, cfg)                          # (N, C)
    with_kl = scale is None or "chosen_seq_kl" in terms_of(loss)        # numbers always include the KL
    ref_logps, ref_hidden = reference(batch, with_kl)                   # (N,) remembered, or (N, C) for a KL
    grad, rows = torch.zeros_like(hidden), []
    for pairs, n in batch.chunks(cfg.head_tokens):                      # whole pairs; the logits of one chunk
        leaf = hidden[n].detach().requires_grad_(scale is not None)
        logps, live_ref_logps, kl = run_head(cfg, policy, leaf, batch.target[n], reference.model,
                                             part(ref_hidden, n))
        known = part(ref_logps, n) if live_ref_logps is None else live_ref_logps
        terms = pair_terms(batch, pairs, logps, known, kl, cfg.aspect_weights or None)
        value = call(loss, terms, cfg)                                  # (pairs,)
        if scale is not None:
            (scale * value.sum()).backward()
            grad[n] = leaf.grad
        terms = {"loss": value} | terms
        rows.append({name: x.detach().reshape(len(value), -1).sum(-1) for name, x in terms.items()})
    if scale is not None:
        hidden.backward(grad)                                           # once through the trunk
    rows = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return rows | {"pair": batch.pair}


# ---------------------------------------------------------------------------------------------------------
# Many micro-batches


def row_length(pairs, cfg):
    """The one length of all packed rows, in which a step leaves little room: 1.15 of its mean, since steps
    differ, over the fewest rows of --micro_batch_tokens."""
    most = min(cfg.batch_size, len(pairs)) / ranks.world()
    need = 1.15 * pairs.lengths.mean() * min(most, cfg.micro_batch_size or most)
    row = need / math.ceil(need / cfg.micro_batch_tokens)
    return math.ceil(max(row, pairs.lengths.max()) / TILE) * TILE


def batches(pairs, index, cfg):
    """The micro-batches of some pairs, on the device. Under torchrun: this rank's share of them."""
    tokens, multiple = cfg.micro_batch_tokens, 1
    if cfg.pack:  # rows of one length: one graph
        tokens = multiple = row_length(pairs, cfg)
    elif cfg.compile or cfg.device.startswith("cuda"):
        multiple = TILE
    cut = partial(micro_batches, pairs, size=cfg.micro_batch_size, tokens=tokens, multiple=multiple,
                  packed=cfg.pack)
    for micro, weight in ranks.share(index, cut):
        batch = collate([pairs[i] for i in micro], multiple, cfg.pack)
        batch.weight = weight
        yield batch.to(cfg.device)


def joined(rows, n):
    """What `step` returned for each micro-batch -> {name: (n,)} over all of them, and over all ranks."""
    return ranks.gather({name: torch.cat([row[name] for row in rows]) for name in rows[0]}, n)


def metrics(t, cfg):
    """{name: number}, means over the pairs of a step or an evaluation; plumbing/README.md explains each."""
    t = {name: x.cpu().double() for name, x in t.items()}  # each (pairs,)
    if "rejected_logps" not in terms_of(LOSSES[cfg.loss]):
        return {"loss": (t["loss"].sum() / t["chosen_length"].sum()).item(),  # a response token's
                "logps/chosen": t["chosen_logps"].mean().item()}
    m = {"loss": t["loss"], "logps/chosen": t["chosen_logps"], "logps/rejected": t["rejected_logps"]}
    margins = t["chosen_logps"] - t["rejected_logps"]
    if "ref_chosen_logps" in t:
        m["logratio/chosen"] = t["chosen_logps"] - t["ref_chosen_logps"]
        m["logratio/rejected"] = t["rejected_logps"] - t["ref_rejected_logps"]
        beta = getattr(cfg, "beta", None) or 1.0
        m["rewards/chosen"] = beta * m["logratio/chosen"]
        m["rewards/rejected"] = beta * m["logratio/rejected"]
        margins = m["rewards/margins"] = m["rewards/chosen"] - m["rewards/rejected"]
    m["rewards/accuracies"] = (margins > 0).double() + 0.5 * (margins == 0)
    if "chosen_seq_kl" in t:
        m |= {"kl/ref_policy_chosen": t["chosen_seq_kl"], "kl/ref_policy_rejected": t["rejected_seq_kl"]}
    if "chosen_mask" in t:
        m["segments/paired"] = torch.minimum(t["chosen_mask"], t["rejected_mask"])  # N of 2D-DPO's Eq. 6
    return dict(zip(m, torch.stack([x.mean() for x in m.values()]).tolist(), strict=True))


@torch.no_grad()
def evaluate(policy, reference, pairs, cfg):
    """The metrics over held-out pairs; the reference runs live, for the KL."""
    rows = [step(policy, reference, batch, LOSSES[cfg.loss], None, cfg)
            for batch in batches(pairs, np.arange(len(pairs)), cfg)]
    ranks.reshard(policy)
    return metrics(joined(rows, len(pairs)), cfg)


@torch.no_grad()
def check_start(policy, reference, pairs, cfg):
    """Where the policy is the reference, the loss must be its value at pi = pi_ref, KL = 0: log 2 for DPO."""
    loss = LOSSES[cfg.loss]

    def moved(nats):
        """The loss at pi = pi_ref, or with chosen that much lower and rejected that much higher."""
        @functools.wraps(loss)
        def at_reference(**given):
            terms = {name: 0 * x if name.endswith("seq_kl") else x for name, x in given.items()}
            terms["chosen_logps"] = given["ref_chosen_logps"] - nats
            terms["rejected_logps"] = given["ref_rejected_logps"] + nats
            return loss(**terms)
        return at_reference

    some = np.arange(min(len(pairs), 16 * ranks.world()))  # a few pairs a rank tell
    nats = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2}[cfg.dtype]  # a log-ratio may be off by
    means = []
    for variant in (loss, moved(0), moved(nats)):
        rows = [step(policy, reference, batch, variant, None, cfg)
                for batch in batches(pairs, some, cfg)]
        means.append(joined(rows, len(some))["loss"].mean().item())
    found, expected, limit = means
    ranks.reshard(policy)
    report.check_start(found, expected, max(nats, abs(limit - expected)))


# ---------------------------------------------------------------------------------------------------------
# The loop


def count(pairs, index, loss):
    """What the sum of the losses of a step is divided by: its pairs, or the response tokens of SFT."""
    return len(index) if "rejected_logps" in terms_of(loss) else int(pairs.rows[index, 2].sum())


def make_optimizer(policy, cfg):
    matrices = [p for p in policy.parameters() if p.dim() == 2]
    others = [p for p in policy.parameters() if p.dim() != 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": cfg.weight_decay},
                              {"params": others, "weight_decay": 0.0}], lr=cfg.lr, fused=True)


def train(policy, reference, pairs, val, cfg, run):
    """Train the policy from where `run` stands to cfg.steps, or to a signal.

    run, a plumbing.folder.Run, decides when to log, evaluate and save. Raises RunError where it cannot go on.
    """
    loss, optimizer = LOSSES[cfg.loss], make_optimizer(policy, cfg)
    run.restore(policy, optimizer)
    run.evaluate(run.first, evaluate, policy, reference, val, cfg)

    def prepare(i):
        """The pairs of step i, and their micro-batches."""
        index = step_indices(len(pairs), cfg.batch_size, cfg.seed, i - 1)
        return index, list(batches(pairs, index, cfg))

    upcoming = prepare(run.first + 1)
    for i in run.steps():
        index, micros = upcoming
        scale = 1 / count(pairs, index, loss)  # the one division of a step
        rows = []
        for batch in micros:
            ranks.reduce_gradients(policy, batch is micros[-1])
            rows.append(step(policy, reference, batch, loss, scale * batch.weight, cfg))
        upcoming = prepare(i + 1)  # a GPU is still computing meanwhile
        terms = joined(rows, len(index))  # {name: (pairs of the whole step,)}
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip or math.inf)
        run.check(i, index, terms, norm)  # stops before an update that would destroy the policy
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, i / max(1, cfg.warmup_steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(i, {"grad_norm": norm, "lr": group["lr"]}, metrics, terms, cfg)
        run.evaluate(i, evaluate, policy, reference, val, cfg)
        run.save(i, policy, optimizer)


# ---------------------------------------------------------------------------------------------------------
# From flags to a trained policy


def load_model(flag, name, cfg):
    """The model of --init or --ref, in the run's precision, on its device."""
    model = GPT.from_pretrained(name, vocab_multiple=machine.ALIGN)
    flags.check_model(flag, name, model, cfg)
    return model.to(cfg.device, torch.float64 if cfg.dtype == "float64" else torch.float32)


def as_read(pairs, cfg, maximum):
    """The pairs as the loss reads them: SFT without rejected responses; scores for losses on segments only,
    each aspect divided by its `maximum` over the training data."""
    terms = terms_of(LOSSES[cfg.loss])
    if "rejected_logps" not in terms:
        return pairs.chosen_only()
    if "chosen_rewards" not in terms:
        return pairs.without_scores()
    dtype = np.float64 if cfg.dtype == "float64" else np.float32
    return pairs.normalised(maximum, cfg.rejected_weight == "badness", dtype)


def run_once(cfg, start, tokenizer, pairs, val):
    """One run, SFT or preferences, from its models to its report. start: a model folder or name, or None."""
    loss = LOSSES[cfg.loss]
    ref = (cfg.ref or start) if flags.has_reference(loss) else None
    if start:
        policy = load_model("init", start, cfg)
    else:
        torch.manual_seed(cfg.seed)
        policy = GPT(GPTConfig(tokenizer.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd),
                     vocab_multiple=machine.ALIGN)
        policy.to(cfg.device, torch.float64 if cfg.dtype == "float64" else torch.float32)
    model = load_model("ref", ref, cfg).requires_grad_(False) if ref else None
    identity = identity_of(cfg, pairs, val, tokenizer, start and weights_hash(policy),
                           ref and weights_hash(model))
    return run_models(cfg, identity, start, ref, tokenizer, pairs, val, policy, model)


def run_models(cfg, identity, start, ref, tokenizer, pairs, val, policy, model):
    """The run that `identity` identifies, with its models in memory. ref and model, the reference's, may be
    None. Returns (policy, ref), or (None, None) where the run was finished before."""
    loss = LOSSES[cfg.loss]
    segmented = "chosen_rewards" in terms_of(loss)
    maximum = pairs.score_maximum() if segmented else None
    pairs, val = (as_read(part, cfg, maximum) for part in (pairs, val))
    with Run(cfg, identity, start, ref, maximum, policy, pairs, val) as run:
        if run.finished:
            return None, None
        ranks.shard(policy)
        reference = no_reference
        if model:
            ranks.shard(model)
            remembers = "chosen_seq_kl" not in terms_of(loss)  # a KL needs the whole distribution
            reference = Reference(
                model, partial(hidden_states, model, cfg=cfg), partial(response_logps, model, cfg=cfg),
                Memory(run.folder, pairs, cfg.dtype) if remembers else None)
            if identity["ref"] == identity["init"] and not run.has_checkpoint():
                check_start(policy, reference, val, cfg)
        train(policy, reference, pairs, val, cfg, run)
        run.finish(policy, tokenizer)
    report.table(cfg, len(val), run.before, run.after)
    return policy, ref


def main(argv=None):
    machine.tune_allocator()
    with report.one_line_errors("train.py"):
        cfg, tokenizer = flags.resolve(Config, argv)
        pairs, val = flags.load_data(cfg, tokenizer)
        start = cfg.init
        if start is None and "rejected_logps" in terms_of(LOSSES[cfg.loss]):
            sft, finished = find_sft(flags.sft_before(cfg), pairs, val, tokenizer)
            start = sft.out_dir
            report.sft_first(start, finished)
            if not finished:
                run_once(sft, None, tokenizer, pairs, val)
        report.answers_and_next(cfg, tokenizer, val, *run_once(cfg, start, tokenizer, pairs, val))
        ranks.stop()


if __name__ == "__main__":
    main()
