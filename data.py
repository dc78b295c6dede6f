"""From texts to the tensors of a step: tokens, pairs, their order, the shared-prompt row.

B pairs, T columns, N response tokens, S segments per response, A aspects; P, C, R tokens of a pair's prompt,
chosen and rejected response (end-of-text counted).

A pair is one row, [prompt | chosen | rejected]: the prompt is computed once, the positions of both responses
continue from it, and a token sees the prompt and its own branch. `collate` also lists the response tokens
flat and says which hidden state predicts each: the shift by one is `predicting_columns`, used once.
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import islice

import numpy as np
import torch

from losses import segment_rewards, segment_sum
from plumbing.errors import DataError, UnusablePair

# ---- Tokenizer ----
class Tokenizer:
    """Byte-pair encoding by tiktoken, from one of
        gpt2               the 50257 ids of GPT-2 (from tiktoken's cache, or downloaded by it)
        bytes              256 bytes and end-of-text
        FILE.tiktoken      lines "base64(token) rank"; GPT-2's split pattern; end-of-text = number of ranks
        FOLDER             with encoder.json + vocab.bpe, vocab.json + merges.txt or tokenizer.json (GPT-2's)
    Raises DataError for anything else.
    """
    TURN = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    lead, other_template = " ", None  # before the response to messages; the folder's own chat template

    def __init__(self, name_or_path):
        import tiktoken

        from plumbing import vocab

        self.name = str(name_or_path)
        self.ranks, self.eot = vocab.read(name_or_path)  # {token bytes: id}, the id of end-of-text
        self.vocab_size = max(self.eot, *self.ranks.values()) + 1
        self.token_bytes = {i: token for token, i in self.ranks.items()} | {self.eot: vocab.EOT.encode()}
        self.other_template = vocab.other_template(name_or_path)
        same = (sorted(self.ranks.items()), self.eot, *filter(None, [self.other_template]))
        self.hash = hashlib.sha256(repr(same).encode()).hexdigest()  # of all that makes ids
        self.bpe = tiktoken.Encoding(self.name, pat_str=vocab.SPLIT, mergeable_ranks=self.ranks,
                                     special_tokens={})

    def encode(self, text):
        """Text -> list of ids. Never a special token, whatever the text says."""
        return self.bpe.encode_ordinary(text)

    def encode_batch(self, texts):
        """Texts -> lists of ids, by tiktoken's own threads."""
        return self.bpe.encode_ordinary_batch(texts)

    def render(self, messages):
        """A list of {"role", "content"} -> text, in the form of HH-RLHF."""
        if self.other_template:
            raise DataError(f"{self.name}: has its own chat template; ports/huggingface.py trains with it")
        return "".join(self.TURN[m["role"]] + m["content"] for m in messages) + "\n\nAssistant:"

    def encode_prompts(self, prompts):
        """Texts, as they stand, or lists of messages -> lists of ids; one end-of-text for an empty prompt."""
        texts = [prompt if isinstance(prompt, str) else self.render(prompt) for prompt in prompts]
        return [ids or [self.eot] for ids in self.encode_batch(texts)]

    def decode(self, ids):
        """Ids -> text; ids that the vocabulary lacks and bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes.get(int(i), b"\xff") for i in ids).decode("utf-8", errors="replace")

    def save(self, folder):
        """Write the vocabulary into a folder, in files that transformers reads where it can."""
        from plumbing import vocab
        vocab.write(folder, self.ranks, self.eot)

# ---- One pair ----
@dataclass
class Pair:
    """One preference pair in token ids."""
    prompt: np.ndarray  # (P,)
    chosen: np.ndarray  # (C,), closed by end-of-text
    rejected: np.ndarray  # (R,)
    chosen_segment: np.ndarray  # (C,) segment of each token, from 0; all 0 where the text is not segmented
    rejected_segment: np.ndarray  # (R,)
    chosen_scores: np.ndarray  # (S_w, A), A = 0 where there are no scores
    rejected_scores: np.ndarray  # (S_l, A)
    where: str = ""  # file:line
    cut: int = 0  # tokens that the prompt lost at its front
    number: int = 0  # of the pair in its data set

    def __len__(self):
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

def encode_pair(tokenizer, prompt, chosen, rejected, block_size, where=""):
    """As encode_pairs, for one pair. Raises UnusablePair."""
    [pair] = encode_pairs(tokenizer, [(where, prompt, chosen, rejected)], block_size)
    if isinstance(pair, UnusablePair):
        raise pair
    return pair

def encode_pairs(tokenizer, texts, block_size):
    """[(where, prompt, chosen, rejected)] -> a Pair for each, or UnusablePair for an empty, identical or too
    long response. A prompt is text or messages, a response a list of segments, (text, scores or None);
    rejected is None for SFT. Prompt and responses are tokenised apart, each response whole and never cut; a
    prompt keeps its last block_size - max(C, R) tokens; an empty one becomes an end-of-text, not scored."""
    prompts = tokenizer.encode_prompts([prompt for _, prompt, *_ in texts])
    strings = [["" if isinstance(prompt, str) else tokenizer.lead, *("".join(text for text, _ in side)
                for side in sides if side is not None)] for _, prompt, *sides in texts]
    ids = iter(tokenizer.encode_batch([lead + text for lead, *both in strings for text in both]))
    return [make_pair(tokenizer, prompt, both, [next(ids) for _ in both], sides, block_size, where)
            for prompt, (_, *both), (where, _, *sides) in zip(prompts, strings, texts, strict=True)]

def make_pair(tokenizer, prompt, texts, ids, segments, block_size, where):
    """The ids of a prompt; texts, ids and segments of the two responses (of one, for SFT) -> Pair."""
    if not all(text.strip() for text in texts):
        return UnusablePair("an empty response")
    if len(texts) > len(set(texts)):
        return UnusablePair("identical responses")
    room = block_size - max(map(len, ids)) - 1
    if room <= 0:
        return UnusablePair(f"a response that does not fit block_size {block_size}")
    ids = [np.array([*side, tokenizer.eot], dtype=np.int32) for side in ids]
    sides = [(side, *segments_of(tokenizer, side, parts)) for side, parts in zip(ids, segments, strict=False)]
    sides += [[x[:0] for x in sides[0]]] * (len(sides) == 1)  # SFT's rejected response holds no token
    (chosen, chosen_segment, chosen_scores), (rejected, rejected_segment, rejected_scores) = sides
    return Pair(np.array(prompt[-room:], dtype=np.int32), chosen, rejected, chosen_segment, rejected_segment,
                chosen_scores, rejected_scores, where, cut=max(0, len(prompt) - room))

def segments_of(tokenizer, ids, segments):
    """The segment of each response token (N,), and the scores (S, A) of segments [(text, scores or None)].
    A token belongs to the segment that holds its last byte; end-of-text joins the last, a lead the first."""
    scores = np.array([scores or [] for _, scores in segments], dtype=np.float64)
    of_token = np.zeros(len(ids), dtype=np.int32)
    if len(segments) > 1:
        ends = np.cumsum([len(text.encode()) for text, _ in segments])  # the byte after each segment
        after = np.cumsum([len(tokenizer.token_bytes[i]) for i in ids[:-1].tolist()])  # and after each token
        of_token[:-1] = np.searchsorted(ends + after[-1] - ends[-1], after, side="left")
        of_token[-1] = len(segments) - 1
    return of_token, scores

# ---- A data set ----
@dataclass
class Pairs:
    """A data set: pairs in their order. One in which some pair has no scores has none: n_aspects is 0."""
    pairs: list  # of Pair

    def __post_init__(self):
        lengths = [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in self.pairs]
        self.rows = np.array(lengths, dtype=[("P", np.int64), ("C", np.int64), ("R", np.int64)])  # (n,)
        self.lengths = self.rows["P"] + self.rows["C"] + self.rows["R"]  # (n,)
        self.n_aspects = min((p.chosen_scores.shape[-1] for p in self.pairs), default=0)
        self.where = [p.where for p in self.pairs]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        """The i-th Pair, which knows its number."""
        return replace(self.pairs[i], number=int(i))

    def hashes(self, *names):
        """A hash of these fields of each pair."""
        return [hashlib.sha256(b"|".join(getattr(p, name).tobytes() for name in names)).digest()
                for p in self.pairs]

    def select(self, index):
        """The pairs of an index array."""
        return Pairs([self.pairs[i] for i in index])

    def without_scores(self, chosen_only=False):
        """The pairs for a loss that sums over whole responses; chosen_only: over the chosen one, as SFT."""
        R = 0 if chosen_only else None
        return Pairs([replace(p, rejected=p.rejected[:R], rejected_segment=p.rejected_segment[:R],
                              chosen_scores=p.chosen_scores[:, :0], rejected_scores=p.rejected_scores[:R, :0])
                      for p in self.pairs])

    def score_maximum(self):
        """The largest score of each aspect on either side, (A,); 1 where an aspect is 0 throughout."""
        top = np.max([x.max(0) for p in self.pairs for x in (p.chosen_scores, p.rejected_scores)], axis=0)
        return np.where(top > 0, top, 1)

    def normalised(self, maximum, badness=False):
        """The pairs with their scores divided by `maximum` (A,). badness: 1 - score on the rejected side."""
        sides = [(p, p.chosen_scores / maximum, p.rejected_scores / maximum) for p in self.pairs]
        return Pairs([replace(p, chosen_scores=r_w, rejected_scores=1 - r_l if badness else r_l)
                      for p, r_w, r_l in sides])

def pack(pairs):
    """An iterable of Pair -> Pairs."""
    pairs = Pairs(list(pairs))
    mixed = len({p.chosen_scores.shape[-1] for p in pairs.pairs}) > 1
    return pairs.without_scores() if mixed else pairs

def load(paths, tokenizer, block_size, alone=False):
    """Read and tokenise files of pairs -> (Pairs, lines to print). DataError lists what is malformed.
    alone: for SFT, which reads the chosen responses only, and records without a rejected one too."""
    from plumbing import pairs as files
    notes, malformed, aspects = [], [], {}

    def usable_pairs(path):
        counts, dropped, records = Counter(), {}, files.read(path, malformed, alone)
        while texts := list(islice(records, 1000)):  # tokenised together
            for text, pair in zip(texts, encode_pairs(tokenizer, texts, block_size), strict=True):
                if isinstance(pair, UnusablePair):
                    dropped.setdefault(str(pair), []).append(text[0])
                else:
                    ended = any(side[-1][0].rstrip().endswith(files.EOT) for side in text[2:] if side)
                    counts.update(kept=1, cut=pair.cut > 0, ended=ended)
                    aspects.setdefault(pair.chosen_scores.shape[-1], pair.where)
                    yield pair
        notes.append(files.describe(path, counts, dropped, block_size))

    pairs = pack(pair for path in files.files_of(paths) for pair in usable_pairs(path))
    for A in sorted(aspects.keys() - {0})[1:]:
        malformed.append(("", aspects[A], f"{A} scores a segment, and another number in other pairs"))
    if malformed or not len(pairs):
        raise DataError("\n".join(files.listed(malformed) or [*notes, "no pair is left"]))
    if len(aspects) > 1:
        notes.append(f"scores are ignored: {aspects[0]} has none")
    return pairs, notes

def hold_out(pairs, fraction=0.1, at_most=256):
    """Split into (training, held-out) pairs by a hash of the prompt: no prompt stands on both sides.
    The same data give the same split, whatever their order. At most `fraction` of the pairs (but one pair at
    least) is held out: a prompt with more pairs than are left to take is passed over. Where every prompt is
    that frequent, the split is by pair. Raises DataError where there is no second pair."""
    room = max(1, min(int(fraction * len(pairs)), at_most))
    for names in (["prompt"], ["chosen", "rejected"]):
        key_of = pairs.hashes(*names)
        counts, held, left = Counter(key_of), set(), room
        for key in sorted(counts):
            if counts[key] <= left:
                held.add(key)
                left -= counts[key]
        if 0 < len(held) < len(counts):
            is_held = np.array([key in held for key in key_of])
            return pairs.select(np.flatnonzero(~is_held)), pairs.select(np.flatnonzero(is_held))
    raise DataError(f"{pairs.where[0]}: no group of pairs is small enough to hold out; pass --val_data")

# ---- Which pairs, in which order ----
@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)

def step_indices(n, batch_size, seed, step):
    """The pairs of optimizer step 0, 1, ...: a pure function of (seed, step); an epoch is a permutation."""
    epoch, at = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), n)
    return np.concatenate([permutation(n, seed, e)[at[epoch == e]] for e in np.unique(epoch).tolist()])

def micro_batches(pairs, index, size=None, tokens=10**9, multiple=1):
    """Cut the pairs of a step into micro-batches, longest first: less padding, the same gradient. Each holds
    at most `size` pairs, and at most `tokens` tokens with the padding of `collate`, or one pair."""
    index, micros = index[np.argsort(-pairs.lengths[index], kind="stable")], []
    while len(index):
        row = math.ceil(pairs.lengths[index[0]] / multiple) * multiple  # of the longest pair
        n = max(1, min(size or len(index), tokens // row))
        micros.append(index[:n])
        index = index[n:]
    return micros

# ---- Pairs -> Batch ----

PROMPT, CHOSEN, REJECTED, PADDING = range(4)  # branches of a pair

@dataclass
class Batch:
    """B pairs in B rows; their response tokens are listed flat, pair by pair, chosen then rejected."""
    tokens: torch.Tensor  # (B, T)
    positions: torch.Tensor  # (B, T), both responses continue from the prompt
    branch: torch.Tensor  # (B, T), PROMPT, CHOSEN, REJECTED or PADDING
    source: torch.Tensor  # (2, N), row and column of the hidden state that predicts each response token
    target: torch.Tensor  # (N,), that token
    response: torch.Tensor  # (N,), 2 b for the chosen response of pair b, 2 b + 1 for the rejected one
    segment: torch.Tensor  # (N,), response * S + k for a token of segment k
    scores: torch.Tensor  # (B, 2, S, A), float64, chosen and rejected; 0 where there is no segment
    segment_mask: torch.Tensor  # (B, 2, S), True where a segment has a token
    length: torch.Tensor  # (B, 2), C and R
    pair: torch.Tensor  # (B,), the numbers of the pairs in their data set
    numbers: list  # the same, where no device need be asked
    starts: list  # B + 1 offsets: pair b owns response tokens starts[b] ... starts[b + 1] - 1
    branched: bool = True  # some row holds a rejected response
    weight: float = 1.0  # 0 for a batch that only keeps another rank company

    def __len__(self):
        return len(self.pair)

    def to(self, device):
        """The batch on a device."""
        return replace(self, **{f.name: move(getattr(self, f.name), device)
                                for f in fields(self) if f.type is torch.Tensor})

    def mask(self):
        """(B, 1, T, T), True where a token (row) may attend to another (column): never ahead, to the prompt
        or its own branch. None where each row is one response: plainly causal."""
        if not self.branched:
            return None
        q, k = self.branch.unsqueeze(-1), self.branch.unsqueeze(-2)  # (B, T, 1), (B, 1, T)
        return ((q == k) | (k == PROMPT)).tril().unsqueeze(1)

    def chunks(self, max_tokens):
        """(pairs, n): slices of whole pairs and of their response tokens, at most max_tokens, or one pair."""
        first = 0
        for end in range(1, len(self) + 1):
            if end == len(self) or self.starts[end + 1] - self.starts[first] > max_tokens:
                yield slice(first, end), slice(self.starts[first], self.starts[end])
                first = end

def move(x, device):
    """A tensor of the CPU on a device; from pinned memory, so that a copy to a GPU waits for no kernel."""
    if torch.device(device).type == "mps" and x.dtype == torch.float64:  # which mps lacks
        x = x.float()
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)

def predicting_columns(P, C, R):
    """The shift by one: the column whose hidden state predicts each token of both responses, (C + R,).

    A token is predicted by the column before it. The first rejected token is the exception: it stands after
    the chosen response in the row, but it follows the prompt in the text.
    """
    columns = np.arange(P, P + C + R) - 1
    columns[C:C + 1] = P - 1
    return columns

def collate(pairs, multiple=1):
    """Pairs -> Batch. Each pair has a row; T is rounded up to a multiple.

        row        [ prompt 0 ... P-1 | chosen P ... P+C-1 | rejected P ... P+R-1 | padding 0 ]   (positions)
    """
    B, T = len(pairs), math.ceil(max(map(len, pairs)) / multiple) * multiple
    S = max(max(len(p.chosen_scores), len(p.rejected_scores)) for p in pairs)
    A = pairs[0].chosen_scores.shape[-1]
    tokens, positions = np.zeros((2, B, T), dtype=np.int64)
    branch = np.full((B, T), PADDING)
    scores, segment_mask = np.zeros((B, 2, S, A)), np.zeros((B, 2, S), dtype=bool)
    row, column, target, response, segment = [], [], [], [], []
    for b, p in enumerate(pairs):
        P, C, R = len(p.prompt), len(p.chosen), len(p.rejected)
        tokens[b, :len(p)] = np.concatenate([p.prompt, p.chosen, p.rejected])
        positions[b, :len(p)] = np.concatenate([np.arange(P), P + np.arange(C), P + np.arange(R)])
        branch[b, :len(p)] = np.repeat([PROMPT, CHOSEN, REJECTED], [P, C, R])
        row.append(np.full(C + R, b))
        column.append(predicting_columns(P, C, R))
        target += [p.chosen, p.rejected]
        response.append(np.repeat([2 * b, 2 * b + 1], [C, R]))
        segment += [2 * b * S + p.chosen_segment, (2 * b + 1) * S + p.rejected_segment]
        scores[b, 0, :len(p.chosen_scores)] = p.chosen_scores
        scores[b, 1, :len(p.rejected_scores)] = p.rejected_scores
        segment_mask[b, 0, p.chosen_segment] = True  # of a segment that owns a token
        segment_mask[b, 1, p.rejected_segment] = True
    flat = [torch.from_numpy(np.concatenate(x).astype(np.int64)) for x in (target, response, segment)]
    source = torch.from_numpy(np.stack([np.concatenate(row), np.concatenate(column)]).astype(np.int64))
    grids = [torch.from_numpy(x) for x in (tokens, positions, branch)]
    length = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs])
    numbers = [p.number for p in pairs]
    return Batch(*grids, source, *flat, torch.from_numpy(scores), torch.from_numpy(segment_mask), length,
                 torch.tensor(numbers), numbers, starts=[0, *length.sum(-1).cumsum(0).tolist()],
                 branched=bool(length[:, 1].any()))

# ---- Batch -> the arguments of a loss ----
def pair_terms(batch, pairs, aspect_weights=(), **tokens):
    """All that a loss may ask for by name (losses.TERMS), for a slice of the pairs of a batch, B of them.

    Args: batch; pairs, a slice, as from Batch.chunks; aspect_weights W (A,), by default uniform; tokens,
    those of logps, ref_logps and kl that are known, (N,), of each response token of these pairs.
    Returns {name: tensor}: log-probabilities and KLs are sums over the response, (B,). Where the pairs have
    scores they are sums over each segment, (B, S), and there are rewards and masks, (B, S), too.
    """
    B, S, A = pairs.stop - pairs.start, *batch.scores.shape[2:]
    n = slice(batch.starts[pairs.start], batch.starts[pairs.stop])
    if A:
        place, shape = batch.segment[n] - 2 * pairs.start * S, (B, 2, S)
    else:
        place, shape = batch.response[n] - 2 * pairs.start, (B, 2)

    terms = {}
    for name, values in tokens.items():
        name = {"logps": "{}_logps", "ref_logps": "ref_{}_logps", "kl": "{}_seq_kl"}[name]
        sums = segment_sum(values, place, math.prod(shape)).view(shape)
        terms[name.format("chosen")], terms[name.format("rejected")] = sums.unbind(1)
    if A:
        scores = batch.scores[pairs]  # (B, 2, S, A)
        weights = aspect_weights if len(aspect_weights) else [1 / A] * A
        weights = torch.stack([scores.new_full((), float(w)) for w in weights])  # filled there, not copied
        rewards = segment_rewards(scores, weights)  # (B, 2, S)
        terms["chosen_rewards"], terms["rejected_rewards"] = rewards.unbind(1)
        terms["chosen_mask"], terms["rejected_mask"] = batch.segment_mask[pairs].unbind(1)
    terms["chosen_length"], terms["rejected_length"] = batch.length[pairs].unbind(1)
    return terms
