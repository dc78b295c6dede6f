"""Train a policy on preference pairs: python train.py [--loss dpo] [--data FILE ...] [--init FOLDER] ...

Without arguments: toy reviews, a small GPT, its own SFT reference, then DPO; offline, within a minute.
Read Config, then `step` (one micro-batch), `evaluate`, `train` (the loop) and `main`.

B pairs, T columns, N response tokens, C channels, V vocabulary.
"""

from plumbing import machine  # isort: skip  (before torch, which reads these settings when it is imported)

import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from data import collate, micro_batches, pair_terms, step_indices
from losses import LOSSES, terms_of, token_kl, token_logps
from model import GPT, GPTConfig
from plumbing import flags, folder, ranks, report
from plumbing.reference import Memory, Reference, no_reference

def knob(value, text, at_least=None, choices=None):
    """A field of Config: its default, its help, its least value, its choices."""
    return field(default=value, metadata={"help": text, "at_least": at_least, "choices": choices})

@dataclass(frozen=True)
class Config:
    """The flags. A default of None is decided by the start, the loss or the machine, as its text says."""
    # what to train
    loss: str = knob("dpo", "a name in losses.LOSSES: " + ", ".join(LOSSES))
    settings: dict = field(default_factory=dict)  # the loss's hyper-parameters, see its signature
    init: str | None = knob(None, "the start: a model folder or a name (gpt2, ...); default: SFT made first")
    ref: str | None = knob(None, "the reference: a model folder or a name; default: the start")
    out_dir: str | None = knob(None, "folder of the run; default: the first free of out/LOSS, out/LOSS-2 ...")
    resume: bool = knob(False, "go on with the run in --out_dir; flags not given again stay as they were")
    overwrite: bool = knob(False, "replace the run in --out_dir")
    seed: int = knob(0, "of initial weights, order of pairs and samples", 0)
    # the data
    data: tuple = knob((), "files of pairs (tools/convert.py makes them); default: the toy reviews")
    val_data: tuple = knob((), "held-out pairs; default: 10 % of --data (at most 256 pairs), split by prompt")
    tokenizer: str | None = knob(None, "gpt2, bytes, FILE.tiktoken or FOLDER; default: --init's, or gpt2")
    # optimization
    steps: int = knob(40, "optimizer steps; sft: --sft_steps", 1)
    batch_size: int = knob(64, "pairs in an optimizer step", 1)
    micro_batch_size: int = knob(0, "most pairs in a forward pass; 0 = as the tokens allow", 0)
    micro_batch_tokens: int | None = knob(None, "most tokens there, with padding; default 2048, cuda 2^15", 1)
    lr: float = knob(5e-5, "AdamW's learning rate, for small models from scratch; sft: --sft_lr")
    warmup_steps: int = knob(10, "of linear warm-up; constant after it, so that --steps may grow", 0)
    weight_decay: float = knob(0.0, "of matrices; biases and LayerNorm have none", 0)
    grad_clip: float = knob(1.0, "largest gradient norm; 0 = never clip", 0)
    sft_steps: int = knob(150, "steps of the SFT that makes the start", 1)
    sft_lr: float = knob(2e-3, "its learning rate")
    # losses on segments
    aspect_weights: tuple = knob((), "weight of each aspect, sum 1; default uniform")
    rejected_weight: str = knob("score", "2d-dpo-vanilla: score (as printed) or badness = 1 - score",
                                choices=("score", "badness"))
    # the model; with --init, the start's
    n_layer: int = knob(2, "transformer blocks", 1)
    n_head: int = knob(4, "attention heads", 1)
    n_embd: int = knob(128, "channels", 1)
    block_size: int = knob(256, "positions: prompt + longer response", 2)
    # logging
    eval_every: int = knob(20, "steps between evaluations on the held-out pairs; 0 = first and last only", 0)
    save_every: int = knob(500, "steps between checkpoints; 0 = last only", 0)
    log_every: int = knob(5, "steps between log lines", 1)
    # the machine
    device: str | None = knob(None, "cpu, cuda, cuda:N, mps, ...; default: cuda where there is one, else cpu")
    dtype: str | None = knob(None, "bfloat16 is autocast; default bfloat16 on cuda, else float32",
                             choices=("float32", "bfloat16", "float64"))
    compile: bool | None = knob(None, "torch.compile the trunk; default: on cuda, over 10 000 ids")
    compile_head: bool | None = knob(None, "and the head; default: as --compile, or over 10 000 ids")
    head_tokens: int | None = knob(None, "response tokens in a chunk; default 2^24 logits, cuda 2^28", 1)

# ---- One micro-batch ----
def precision(cfg):
    """bfloat16 is autocast over float32 weights; float32 and float64 are the weights' own."""
    bfloat16 = cfg.dtype == "bfloat16"
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16) if bfloat16 else nullcontext()

def hidden_states(model, batch, cfg):
    """The trunk: the hidden state that predicts each response token of a batch, (N, C)."""
    with precision(cfg):
        hidden = model(batch.tokens, batch.positions, batch.mask())  # (B, T, C)
    return hidden[*batch.source]

def head(policy, hidden, target, ref_logps=None, ref_hidden=None, reference=None):
    """Hidden states (N, C) of response tokens -> {"logps": log pi, and of the reference what is known}, (N,).

    ref_logps (N,) are handed on. With ref_hidden (N, C) the reference's head runs here too, and adds
    "ref_logps" and "kl", KL(pi_ref || pi). (In **ref torch.compile would take sizes as fixed.)
    """
    centered = torch.is_autocast_enabled(hidden.device.type)  # in bfloat16, where large logits lose digits
    logits = policy.logits(hidden, centered)  # (N, V); nothing of this size outlives a chunk
    logps = token_logps(logits, target)
    if ref_hidden is None:
        return {"logps": logps} if ref_logps is None else {"logps": logps, "ref_logps": ref_logps}
    with torch.no_grad():
        ref_logits = reference.logits(ref_hidden, centered)  # (N, V)
        ref_logps = token_logps(ref_logits, target)
    return {"logps": logps, "ref_logps": ref_logps, "kl": token_kl(ref_logits, logits)}

def run_head(cfg, *args, **ref):
    """`head`, compiled or not, in the run's precision."""
    with precision(cfg):
        return (machine.compiled(head) if cfg.compile_head else head)(*args, **ref)

@torch.no_grad()
def response_logps(model, batch, cfg):
    """log pi(y_t | x, y_<t) of every response token of a batch, (N,), without a gradient."""
    hidden = hidden_states(model, batch, cfg)  # (N, C)
    return torch.cat([run_head(cfg, model, hidden[n], batch.target[n])["logps"]
                      for _, n in batch.chunks(cfg.head_tokens)])

def call(loss, terms, cfg):
    """The loss of some pairs, (B,). Its signature says which terms and which hyper-parameters it takes."""
    value = loss(**{name: terms[name] for name in terms_of(loss)}, **cfg.settings)
    if value.shape != (len(terms["chosen_logps"]),):
        raise ValueError(f"the loss {cfg.loss} must return a number for each pair, not {tuple(value.shape)}")
    return value

def step(policy, reference, batch, loss, scale, cfg):
    """One micro-batch: add the gradient of scale * (sum of its losses) to the policy's.

    The trunk runs once. The head and the loss run on a few whole pairs at a time, each chunk with its own
    backward into the hidden states: a pair's loss needs only its own tokens, so this is exact, and the
    logits of the whole batch never exist. One backward through the trunk ends it.

    Args: policy, the GPT that learns; reference, a plumbing.reference.Reference or no_reference; batch, a
    data.Batch; loss, a function of losses.py; scale, or None: numbers only, no gradient; cfg, a Config.
    Returns {name: (B,)}: loss, the terms of losses.py by name (segments summed), the pairs' numbers.
    """
    hidden = hidden_states(policy, batch, cfg)                          # (N, C)
    with_kl = scale is None or any("seq_kl" in name for name in terms_of(loss))  # numbers have the KL
    ref = reference(batch, with_kl)                                     # (N,) remembered, or (N, C) for a KL
    grad, rows = torch.zeros_like(hidden), []
    for pairs, n in batch.chunks(cfg.head_tokens):                      # whole pairs; the logits of one chunk
        leaf = hidden[n].detach().requires_grad_(scale is not None)
        ref_n = {name: x[n] if torch.is_tensor(x) else x for name, x in ref.items()}
        tokens = run_head(cfg, policy, leaf, batch.target[n], **ref_n)  # {name: (n,)}
        terms = pair_terms(batch, pairs, cfg.aspect_weights, **tokens)
        terms["loss"] = value = call(loss, terms, cfg)                  # (pairs,)
        if scale is not None:
            (scale * value.sum()).backward()
            grad[n] = leaf.grad
        rows.append({name: x.detach().reshape(len(value), -1).sum(-1) for name, x in terms.items()})
    if scale is not None:
        hidden.backward(grad)                                           # once through the trunk
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]} | {"pair": batch.pair}

# ---- Many micro-batches ----
def batches(pairs, index, cfg):
    """The micro-batches of some pairs, on the device. Under torchrun: this rank's share of them."""
    multiple = 64 if cfg.compile or cfg.device.startswith("cuda") else 1  # few shapes, and aligned ones
    cut = partial(micro_batches, pairs, size=cfg.micro_batch_size, tokens=cfg.micro_batch_tokens,
                  multiple=multiple)
    for micro, weight in ranks.share(index, cut):
        batch = collate([pairs[i] for i in micro], multiple)
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
        beta = cfg.settings.get("beta", 1.0)
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

# ---- The loop ----
def count(pairs, index, loss):
    """What the sum of the losses of a step is divided by: its pairs, or the response tokens of SFT."""
    return len(index) if "rejected_logps" in terms_of(loss) else int(pairs.rows["C"][index].sum())

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
        run.save(i, policy, optimizer)  # before the evaluation: after a signal every second counts
        run.evaluate(i, evaluate, policy, reference, val, cfg)

# ---- From flags to a trained policy ----
def prepared(model, cfg):
    """A model in the run's precision, on its device, compiled where the run is."""
    model = model.to(cfg.device, torch.float64 if cfg.dtype == "float64" else torch.float32).eval()
    if cfg.compile:
        machine.compile_blocks(model)
    return model

def make_models(cfg, tokenizer):
    """(policy, the reference's model or None): from folders, or a new policy from the seed."""
    def load(flag, name):
        model = folder.open_model(name, vocab_multiple=machine.ALIGN)
        flags.check_model(flag, name, model, cfg)
        return prepared(model, cfg)

    if cfg.init:
        policy = load("init", cfg.init)
    else:
        torch.manual_seed(cfg.seed)
        config = GPTConfig(tokenizer.vocab_size, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd)
        policy = prepared(GPT(config, vocab_multiple=machine.ALIGN), cfg)
    has_reference = flags.has_reference(LOSSES[cfg.loss])
    return policy, load("ref", cfg.ref or cfg.init).requires_grad_(False) if has_reference else None

def as_read(pairs, cfg, maximum):
    """The pairs as the loss reads them: SFT without rejected responses; scores for losses on segments only,
    each aspect divided by its `maximum` over the training data."""
    terms = terms_of(LOSSES[cfg.loss])
    if "chosen_rewards" in terms:
        return pairs.normalised(maximum, cfg.rejected_weight == "badness")
    return pairs.without_scores(chosen_only="rejected_logps" not in terms)

def run(cfg, tokenizer, pairs, val, make=make_models, **identity):
    """One run, SFT or preferences, from its models to its table. make(cfg, tokenizer) -> (policy, the
    reference's model or None); identity, what else tells this run from others.

    Returns (policy, the reference's model or None), or None where the run was finished before.
    """
    loss = LOSSES[cfg.loss]
    policy, model = make(cfg, tokenizer)
    identity = folder.identity_of(cfg, pairs, val, tokenizer, policy if cfg.init else None, model) | identity
    maximum = pairs.score_maximum() if "chosen_rewards" in terms_of(loss) else None
    pairs, val = (as_read(part, cfg, maximum) for part in (pairs, val))
    with folder.Run(cfg, identity, policy, tokenizer, pairs, val, maximum) as this:
        if this.finished:
            return report.say(f"{cfg.out_dir}: finished at step {cfg.steps}; more --steps go on from there")
        this.describe(policy)
        ranks.shard(policy)
        reference = no_reference
        if model:
            ranks.shard(model)
            remembers = not any("seq_kl" in name for name in terms_of(loss))  # a KL needs logits
            reference = Reference(
                model, partial(hidden_states, model, cfg=cfg), partial(response_logps, model, cfg=cfg),
                Memory(this.folder, pairs, cfg.dtype) if remembers else None)
        train(policy, reference, pairs, val, cfg, this)
        this.finish(policy, model)
    report.table(len(val), this.before, this.after)
    return policy, model

def main(argv=None):
    machine.tune_allocator()
    with report.one_line_errors("train.py"):
        cfg, tokenizer = flags.resolve(Config, argv)
        pairs, val = flags.load_data(cfg, tokenizer)
        if cfg.init is None and flags.is_pairwise(LOSSES[cfg.loss]):
            sft, finished = folder.place_of_sft(flags.sft_before(cfg), pairs, val, tokenizer)
            report.sft_first(cfg, sft.out_dir, finished)
            if not finished:
                run(sft, tokenizer, pairs, val)
            cfg = replace(cfg, init=sft.out_dir)
        if models := run(cfg, tokenizer, pairs, val):
            report.answers_and_next(cfg, tokenizer, val, *models)
        ranks.stop()

if __name__ == "__main__":
    main()
