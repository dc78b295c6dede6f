"""The runs behind the claims: a reference by SFT, then preference steps with true reward and KL on the way.

The loop is explicit and small; a step is train.step. B pairs, N response tokens, T columns, V vocabulary.
A run's numbers are kept in out/claims, keyed by the run and by the code that made them.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that the claims run as scripts, from any folder

import data  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from model import GPT  # noqa: E402
from plumbing.reference import Memory, Reference, no_reference  # noqa: E402
from toy import reviews, sums  # noqa: E402

TOKENIZER = ROOT / "toy" / "toy.tiktoken"
SOURCES = ("losses.py", "model.py", "data.py", "train.py", "plumbing/reference.py", "toy/reviews.py",
           "toy/sums.py", "experiments/replay.py")
MAX_NEW = {"reviews": 48, "sums": 52}  # tokens; the longest answer of the data has 33 and 47
AT_ONCE = 64  # pairs in a forward pass
CREDITED = ("dpo", "2d-dpo", "2d-dpo-vanilla", "unselected")  # losses whose credit to sentences is measured
CFG = train.Config(device="cpu", dtype="float32", micro_batch_size=AT_ONCE, micro_batch_tokens=10**9,
                   head_tokens=4096)

@dataclass(frozen=True)
class World:
    """Data and reference of one seed: what runs share."""
    name: str = "reviews"
    seed: int = 0  # of data, initial weights, order of pairs and samples: a seed shares nothing with another
    pairs: int = 3000  # seen by SFT
    preferred: int = 2000  # the first of them, seen by the preference runs
    held_out: int = 200
    edits: int | str = 1  # sums: digits changed in the rejected answer, or "all"
    n_layer: int = 2
    n_embd: int = 64
    sft_steps: int = 300
    sft_lr: float = 2e-3

@dataclass(frozen=True)
class Run:
    world: World
    loss: str = "dpo"  # a name in losses.LOSSES or in OTHERS
    beta: float | None = 0.1
    lam: float | None = None
    alpha: float | None = None
    aspect_weights: tuple = ()
    rejected_weight: str = "score"
    one_segment: bool = False  # the whole response is one segment, with its sentences' mean scores
    optimizer: str = "AdamW"  # train.py's, or plain "SGD"
    lr: float = 1e-4
    batch_size: int = 32
    steps: int = 80
    checkpoints: tuple = (0, 40, 80)
    samples: int = 512

# Data and reference

def raw_pairs(world):
    """(training, held-out) pairs of a world as records. No held-out sum is in the training data."""
    n, seed = world.pairs + world.held_out, 1000 + world.seed  # not the seed of the committed toy data
    if world.name == "reviews":
        pairs = reviews.sample_pairs(n, seed)
    else:
        rng = random.Random(seed)
        pairs = [pair | {"rejected": reject(pair["chosen"], world.edits, rng)}
                 for pair in sums.sample_pairs(n, seed)]  # the same sums whatever the edits
    return pairs[:world.pairs], pairs[world.pairs:]

def reject(answer, edits, rng):
    """The answer with `edits` digits changed, or the answer to another sum of the same length."""
    if edits != "all":
        return sums.change_digits(answer, edits, rng)
    while True:
        other = sums.worked(*sums.draw_sum(rng))
        if len(other) == len(answer) and other.split(":")[1] != answer.split(":")[1]:
            return other

def merged(response):
    """A response of sentences as one segment, scored by their mean."""
    scores = np.mean([segment["scores"] for segment in response], axis=0).tolist()
    return [{"text": "".join(segment["text"] for segment in response), "scores": scores}]

@functools.lru_cache(maxsize=8)
def encoded(world, one_segment=False):
    """(tokenizer, training pairs, held-out pairs, true margin of each training pair)."""
    tokenizer = data.Tokenizer(str(TOKENIZER))
    seen, held_out = raw_pairs(world)
    parts = seen[:world.preferred], held_out
    margins = np.array([reviews.margin(pair) for pair in parts[0]]) if world.name == "reviews" else None
    loaded = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            if one_segment:
                part = [pair | {side: merged(pair[side]) for side in ("chosen", "rejected")} for pair in part]
            path = Path(folder, "pairs.jsonl")
            path.write_text("".join(json.dumps(pair) + "\n" for pair in part))
            with quiet():
                loaded.append(data.load((str(path),), tokenizer, 64)[0])
    return tokenizer, *loaded, margins

@functools.cache  # of what is running, whatever happens to the files meanwhile
def source_hash():
    trees = [ast.dump(ast.parse((ROOT / name).read_text())) for name in SOURCES]  # layout and comments aside
    return hashlib.sha256("".join(trees).encode()).hexdigest()

def key_of(thing):
    text = json.dumps([dataclasses.asdict(thing), str(type(thing)), source_hash(), torch.__version__])
    return hashlib.sha256(text.encode()).hexdigest()[:24]

def reference_folder(world, store):
    """The SFT model of a world and seed; trained where `store` has none yet.

    Reviews: SFT on both responses, so that the pairs are samples of the reference, as DPO assumes.
    Sums: SFT on the right answers.
    """
    world = replace(world, edits=1)
    folder = Path(store, f"sft-{world.name}-{key_of(world)}")
    if folder.exists():
        return folder
    train_pairs, held_out = raw_pairs(world)
    if world.name == "reviews":
        train_pairs, held_out = ([pair | {"chosen": pair[a], "rejected": pair[b]} for pair in part
                                  for a, b in (("chosen", "rejected"), ("rejected", "chosen"))]
                                 for part in (train_pairs, held_out))
    Path(store).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store) as aside, quiet():
        paths = Path(aside, "train.jsonl"), Path(aside, "held-out.jsonl")
        for path, pairs in zip(paths, (train_pairs, held_out), strict=True):
            path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        flags = {"loss": "sft", "data": paths[0], "val_data": paths[1], "tokenizer": TOKENIZER,
                 "device": "cpu", "out_dir": Path(aside, "model"), "steps": world.sft_steps,
                 "lr": world.sft_lr, "seed": world.seed, "n_layer": world.n_layer, "n_embd": world.n_embd,
                 "block_size": 64, "micro_batch_tokens": 10**6, "micro_batch_size": AT_ONCE, "eval_every": 0,
                 "save_every": 0, "log_every": 100}
        train.main([word for name, value in flags.items() for word in (f"--{name}", str(value))])
        with contextlib.suppress(OSError):  # another process was faster
            Path(aside, "model").rename(folder)
    return folder

@contextlib.contextmanager
def quiet():
    """train.py reports every step: not here."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield

# What is measured

def unweighted_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta):
    """-h/2: DPO's gradient with the weight sigma(r_l - r_w) held at its first value, 1/2."""
    return -0.5 * beta * ((chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps))

def unselected_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
                    chosen_rewards, rejected_rewards, chosen_mask, rejected_mask, *, beta):
    """Eq. 6 of 2D-DPO with its pairing, but without its selection: the k-th segment meets the k-th."""
    h = beta * (chosen_rewards * (chosen_logps - ref_chosen_logps)
                - rejected_rewards * (rejected_logps - ref_rejected_logps))
    return torch.where(chosen_mask & rejected_mask, -F.logsigmoid(h), 0.0).sum(-1)

def weighted_sft_loss(chosen_logps, rejected_logps, chosen_rewards, rejected_rewards,
                      chosen_mask, rejected_mask, *, beta):
    """Reward-weighted SFT: -exp(r / beta) log pi(y|x) of both responses, r the true reward, 0 to 16.

    The responses are samples of the reference, so this fits Eq. 4's policy by maximum likelihood. The weight
    is divided by exp(16 / beta), a constant that AdamW does not see.
    """
    def of(logps, rewards, mask):
        r = 16 * torch.where(mask, rewards, 0.0).sum(-1) / mask.sum(-1)
        return -((r - 16) / beta).exp() * torch.where(mask, logps, 0.0).sum(-1)
    return of(chosen_logps, chosen_rewards, chosen_mask) + of(rejected_logps, rejected_rewards, rejected_mask)

# losses of these experiments only: name -> (the loss of losses.LOSSES whose data it reads, the function)
OTHERS = {"unweighted": ("dpo", unweighted_loss), "unselected": ("2d-dpo", unselected_loss),
          "weighted-sft": ("2d-dpo", weighted_sft_loss)}

def mean_se(values):
    values = np.asarray(values, dtype=np.float64)
    return [float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))]

def review_prompts(n, seed, tokenizer):
    rng = random.Random(seed)
    texts = [f"Review the {reviews.pick(rng, reviews.ADJECTIVES)} {reviews.pick(rng, reviews.NOUNS)}:"
             for _ in range(n)]
    return texts, torch.tensor([tokenizer.encode(text) for text in texts])  # (n, 5)

@torch.no_grad()
def sample_reviews(policy, reference, tokenizer, n, seed):
    """n samples of the policy: true reward, KL(policy || reference), share of sentences in the grammar.

    The KL of a response is sum_t KL(pi(. | x, y_<t) || pi_ref(. | x, y_<t)), the full vocabulary at each
    position of a sampled response: Rao-Blackwellised, unbiased. [mean, standard error] over the samples.
    """
    texts, prompts = review_prompts(n, seed, tokenizer)
    P = prompts.shape[1]
    rewards, points, kls, valid = [], [], [], []
    generator = torch.Generator().manual_seed(seed)
    for at in range(0, n, 512):
        tokens = policy.generate(prompts[at:at + 512], MAX_NEW["reviews"], eos=tokenizer.eot,
                                 generator=generator)
        response = tokens[:, P:]  # (B, T)
        ended = (response == tokenizer.eot).int().cumsum(-1)
        scored = (ended == 0) | ((ended == 1) & (response == tokenizer.eot))  # through the first end-of-text
        log_p = policy.logits(policy(tokens[:, :-1])[:, P - 1:]).log_softmax(-1)  # (B, T, V)
        log_q = reference.logits(reference(tokens[:, :-1])[:, P - 1:]).log_softmax(-1)
        p = log_p.exp()
        kls += ((p * (log_p - log_q)).sum(-1) * scored).sum(-1).tolist()
        for text, ids in zip(texts[at:at + 512], response.tolist(), strict=True):
            ids = ids[:ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids
            reply = tokenizer.decode(ids)
            scored_sentences = reviews.score_sentences(text, reply)
            rewards.append(reviews.reward(text + reply))
            points.append(np.mean([s for _, s in scored_sentences] or [[0, 0]], axis=0))
            valid += [bool(reviews.SENTENCE.fullmatch(sentence)) for sentence, _ in scored_sentences]
    points = np.array(points)
    halves = [[float(np.mean(x[half::2])) for x in (rewards, kls)] for half in (0, 1)]
    return {"reward": mean_se(rewards), "kl": mean_se(kls), "halves": halves,
            "helpfulness": mean_se(points[:, 0]), "relevance": mean_se(points[:, 1]),
            "valid": sum(valid) / max(1, len(valid))}

def reference_rewards(world, n, store):
    """True rewards of n samples of the reference: what Eq. 4 re-weights."""
    tokenizer = data.Tokenizer(str(TOKENIZER))
    reference = GPT.from_pretrained(str(reference_folder(world, store)))
    texts, prompts = review_prompts(n, 5000 + world.seed, tokenizer)
    generator, rewards = torch.Generator().manual_seed(5000 + world.seed), []
    for at in range(0, n, 1024):
        tokens = reference.generate(prompts[at:at + 1024], MAX_NEW["reviews"], eos=tokenizer.eot,
                                    generator=generator)
        for text, ids in zip(texts[at:at + 1024], tokens[:, prompts.shape[1]:].tolist(), strict=True):
            ids = ids[:ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids
            rewards.append(reviews.reward(text + tokenizer.decode(ids)))
    return rewards

@torch.no_grad()
def token_logratios(policy, reference, rows):
    """(batch, log pi, log pi_ref) of the response tokens of some pairs: a Batch and two of (N,)."""
    batch = data.collate(rows)
    return batch, *(train.response_logps(model, batch, CFG) for model in (policy, reference))

def credit(policy, reference, pairs, eot):
    """How far the policy moved each held-out sentence: sums and counts by side, helpfulness and relevance.

    The log-ratio of a sentence is that of its tokens given all before; end-of-text is left out.
    """
    total, count = np.zeros((2, 2, 5, 5))
    for at in range(0, len(pairs), AT_ONCE):
        rows = [pairs[i] for i in range(at, min(at + AT_ONCE, len(pairs)))]
        batch, logps, ref_logps = token_logratios(policy, reference, rows)
        S = batch.scores.shape[2]
        ratio = torch.where(batch.target == eot, 0.0, logps - ref_logps)
        ratio = losses.segment_sum(ratio, batch.segment, 2 * len(rows) * S).view(len(rows), 2, S)
        here = batch.segment_mask.numpy()  # (B, 2, S)
        place = (here.nonzero()[1], *batch.scores[batch.segment_mask].long().numpy().T)
        np.add.at(total, place, ratio.numpy()[here])
        np.add.at(count, place, 1)
    return {"sum": total.tolist(), "count": count.tolist()}

@torch.no_grad()
def parts_of_chosen(policy, reference, pairs):
    """Held-out chosen log-probabilities before the first edited token, at edited ones, and after, unedited.

    Nats per token, policy and reference; the total is in nats per answer. Both answers have equal length.
    """
    sums_, counts = np.zeros((2, 3)), np.zeros(3)
    for at in range(0, len(pairs), AT_ONCE):
        rows = [pairs[i] for i in range(at, min(at + AT_ONCE, len(pairs)))]
        batch, *both = token_logratios(policy, reference, rows)
        for b, pair in enumerate(rows):
            C = len(pair.chosen)
            differs = np.asarray(pair.chosen) != np.asarray(pair.rejected)
            seen = differs.cumsum() > 0
            part = np.where(~seen, 0, np.where(differs, 1, 2))  # (C,)
            for m, logps in enumerate(both):
                values = logps[batch.starts[b]:batch.starts[b] + C].double().numpy()
                sums_[m] += np.bincount(part, values, minlength=3)
            counts += np.bincount(part, minlength=3)
    names = ("before", "at", "after")
    result = {}
    for m, who in enumerate(("policy", "reference")):
        result[who] = {name: float(sums_[m, i] / max(1, counts[i])) for i, name in enumerate(names)}
        result[who]["total"] = float(sums_[m].sum() / len(pairs))
    return result | {"differing": float(counts[1] / counts.sum())}

def sums_accuracy(policy, tokenizer, held_out):
    """Share of held-out sums that the policy works out to the letter, greedily; [mean, standard error]."""
    prompts = [held_out[i].prompt.tolist() for i in range(len(held_out))]
    right = []
    for length in sorted({len(prompt) for prompt in prompts}):
        tokens = torch.tensor([prompt for prompt in prompts if len(prompt) == length])
        for ids in policy.generate(tokens, MAX_NEW["sums"], temperature=0, eos=tokenizer.eot).tolist():
            right.append(sums.correct(tokenizer.decode(i for i in ids if i != tokenizer.eot)))
    return mean_se(right)

# A run

MEMORIES = tempfile.TemporaryDirectory()  # what references said of the pairs, for this process's next runs

def reference_of(model, run, pairs, cfg):
    """The reference of a run; runs on the same pairs share its memory."""
    folder = Path(MEMORIES.name, f"{key_of(run.world)}-{run.one_segment}")
    folder.mkdir(exist_ok=True)
    return Reference(model, partial(train.hidden_states, model, cfg=cfg),
                     partial(train.response_logps, model, cfg=cfg), Memory(folder, pairs, cfg.dtype))

def gradient_weights(run, terms, margins):
    """sigma(r_l - r_w) of a step's pairs: [sum, count] of all, and by whether the label is true."""
    h = run.beta * ((terms["chosen_logps"] - terms["ref_chosen_logps"])
                    - (terms["rejected_logps"] - terms["ref_rejected_logps"])).double().numpy()
    weight = 1 / (1 + np.exp(h))
    groups = {"all": np.ones(len(h), bool)}
    if margins is not None:
        margin = margins[terms["pair"].numpy()]
        groups |= {"label_false": margin < 0, "label_true": margin > 0}
    return {name: [float(weight[g].sum()), int(g.sum())] for name, g in groups.items()}

def replay(run, store):
    """Train a run and measure it at its checkpoints; returns plain JSON."""
    world, seed = run.world, run.world.seed
    tokenizer, pairs, val, margins = encoded(world, run.one_segment)
    sentences = encoded(world)[2]  # of held-out pairs, whatever segments the run itself sees
    name, loss = OTHERS.get(run.loss) or (run.loss, losses.LOSSES[run.loss])
    cfg = replace(CFG, loss=name, settings={knob: getattr(run, knob) for knob in losses.knobs_of(loss)},
                  lr=run.lr, aspect_weights=run.aspect_weights, rejected_weight=run.rejected_weight)
    maximum = pairs.score_maximum() if pairs.n_aspects else None
    pairs, val = (train.as_read(part, cfg, maximum) for part in (pairs, val))
    policy, model = (GPT.from_pretrained(str(reference_folder(world, store))) for _ in range(2))
    reference = no_reference if name == "sft" else reference_of(model.requires_grad_(False), run, pairs, cfg)
    optimizer = (torch.optim.SGD(policy.parameters(), lr=run.lr) if run.optimizer == "SGD"
                 else train.make_optimizer(policy, cfg))
    checkpoints, weights = [], []
    for step in range(run.steps + 1):
        if step in run.checkpoints:
            record = {"step": step, "held_out": train.evaluate(policy, reference, val, cfg)}
            if world.name == "sums":
                record |= {"accuracy": sums_accuracy(policy, tokenizer, val),
                           "chosen": parts_of_chosen(policy, model, val)}
            elif run.samples:
                record["samples"] = sample_reviews(policy, model, tokenizer, run.samples, 9000 + seed)
                if run.loss in CREDITED:
                    record["credit"] = credit(policy, model, sentences, tokenizer.eot)
            checkpoints.append(record)
        if step == run.steps:
            break
        index = data.step_indices(len(pairs), run.batch_size, seed, step)
        scale = 1 / train.count(pairs, index, loss)
        terms = train.joined([train.step(policy, reference, batch, loss, scale, cfg)
                              for batch in train.batches(pairs, index, cfg)], len(index))
        if "ref_chosen_logps" in terms:
            weights.append(gradient_weights(run, terms, margins))
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = run.lr * min(1, (step + 1) / 10)  # train.py's warm-up
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"checkpoints": checkpoints, "weights": weights}
