"""GPT-2 from scratch; files and downloads are plumbing/pretrained.py.

Shapes: B rows, T tokens, P cached tokens, C = n_embd channels, H heads, D = C / H, V vocabulary.
The trunk (`forward`) and the head (`logits`) are apart, so that the head can run on response tokens only.

Another architecture is tried by editing this file alone: the scripts need GPT.forward, logits, generate,
config, the embedding `wte` and the list of blocks `h`. What computes GPT-2 is saved in Hugging Face's layout.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing import pretrained
from plumbing.errors import ModelError

@dataclass
class GPTConfig:
    vocab_size: int = 50257  # token ids, end-of-text included
    block_size: int = 1024  # positions
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # channels

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ModelError(f"{name} = {value!r}: needs a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")

class Cache:
    """The keys and values of up to `positions` tokens, layer by layer, each (B, H, positions, D)."""
    def __init__(self, n_layer, positions):
        self.keys, self.values, self.positions = [None] * n_layer, [None] * n_layer, positions
        self.length = 0  # P; GPT.forward counts

    def extend(self, layer, k, v):
        """Write those of new tokens, (B, H, T, D), in place: views of all the layer's, (B, H, P+T, D)."""
        end = self.length + k.shape[-2]
        for kept, new in ((self.keys, k), (self.values, v)):
            if kept[layer] is None:
                kept[layer] = new.new_empty(*new.shape[:2], self.positions, new.shape[-1])
            kept[layer][..., self.length:end, :] = new
        return self.keys[layer][..., :end, :], self.values[layer][..., :end, :]

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        is_causal = mask is None and (cache is None or cache.length == 0)  # a token sees all of a cache
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, H, P+T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))

class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    """The decoder. vocab_multiple rounds the embedding table up (a multiple of 64 is faster): the extra
    rows are 0, and never looked up, scored, sampled or saved."""

    def __init__(self, config, vocab_multiple=1):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # 0.02 as GPT-2; the 2 n_layer projections into the residual start smaller
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
        padding = -config.vocab_size % vocab_multiple  # last: the same seed draws the same weights without it
        self.wte.weight = nn.Parameter(F.pad(self.wte.weight.detach(), (0, 0, 0, padding)))
        self.wte.num_embeddings += padding
        self.eval()  # an edit's dropout stays off: policy and reference agree before the first step

    def forward(self, tokens, positions=None, mask=None, cache=None):
        """Hidden states after the final LayerNorm: tokens (B, T) -> (B, T, C).

        positions (B, T), by default counted on from the cache. mask (B, 1, T, P+T), bool, True where a token
        (row) may attend to another (column); by default causal. cache: of the P tokens
        before, or None; it is extended in place."""
        T, P = tokens.shape[-1], 0 if cache is None else cache.length
        if positions is None:
            if P + T > self.config.block_size:
                raise ModelError(f"{P + T} tokens do not fit block_size {self.config.block_size}")
            positions = torch.arange(P, P + T, device=tokens.device)
        if mask is None and P and T > 1:
            mask = torch.ones(T, P + T, dtype=torch.bool, device=tokens.device).tril(P)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        for block in self.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.length = P + T
        return self.ln_f(x)

    def logits(self, hidden, centered=False):
        """The tied head: hidden (..., C) -> (..., V). Rows that only pad the table are cropped here.

        centered: less their mean, which no softmax sees. GPT-2's are about -110, where bfloat16 has steps of
        0.5; centred they are small and have small steps."""
        table = self.wte.weight
        if centered:
            table = table - table[:self.config.vocab_size].detach().mean(0)
        return F.linear(hidden, table)[..., :self.config.vocab_size]

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, eos=None,
                 n_ids=None, generator=None):
        """Continue each row of tokens (B, T) up to T + max_new_tokens: prompt and continuation.

        A prompt shorter than T is filled up with -1: its continuation begins there. temperature 0 takes the
        most likely token. top_k keeps the k most likely tokens, top_p the fewest that together reach p. A row
        that has produced `eos` repeats it. Of ids from n_ids on, which no text has, none is drawn. Beyond
        block_size the last block_size tokens are recomputed."""
        T, shortest = tokens.shape[1], int((tokens >= 0).sum(-1).min())
        if shortest == 0:
            raise ModelError("generate needs at least one token; end-of-text serves as an empty prompt")
        if not (temperature >= 0 and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)):
            raise ModelError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: "
                             "needs temperature >= 0, top_k >= 1, 0 < top_p <= 1")
        text, end = F.pad(tokens, (0, max_new_tokens), value=-1), T
        rows = torch.arange(len(text), device=text.device)  # those that go on
        cache = Cache(self.config.n_layer, min(self.config.block_size, T + max_new_tokens))
        for end in range(shortest + 1, T + max_new_tokens + 1):
            cache.length %= self.config.block_size  # a full one is written anew
            begin = end - 2 if cache.length else max(0, end - 1 - self.config.block_size)
            hidden = self(text[rows, begin:end - 1], cache=cache)[:, -1]  # (rows, C)
            token = sample_token(self.logits(hidden)[:, :n_ids].float(), temperature, top_k, top_p, generator)
            given = text[rows, end - 1]  # of a longer prompt, or -1
            text[rows, end - 1] = torch.where(given < 0, token, given)
            if eos is not None and (ended := (given < 0) & (token == eos)).any():
                text[rows[ended], end:] = eos
                rows = rows[~ended]
                cache.keys, cache.values = ([x[~ended] for x in kept] for kept in (cache.keys, cache.values))
                if not len(rows):
                    break
        return text[:, :end]

    @classmethod
    def from_pretrained(cls, name_or_folder, vocab_multiple=1):
        """A folder of save_pretrained or transformers, or a name (gpt2, ...), in float32; or ModelError."""
        return pretrained.read(cls, GPTConfig, name_or_folder, vocab_multiple)

    def save_pretrained(self, folder, eos=None):
        """Write config.json and model.safetensors. eos is the end-of-text id at which other programs stop."""
        pretrained.write(self, folder, eos)

def sample_token(logits, temperature, top_k, top_p, generator):
    """One token a row: logits (B, V) -> (B,). top_p looks at the distribution that top_k leaves."""
    if temperature < 1e-6:  # 0, or so small that logits / temperature would overflow
        return logits.argmax(-1)
    ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    if top_k is not None:
        logits, ids = logits.topk(min(top_k, logits.shape[-1]))  # (B, K)
    probs = (logits / temperature).softmax(-1)
    at = draw(probs, generator)  # (B, 1)
    while top_p is not None and top_p < 1:  # no sort: a token beyond p is drawn again, from those before it
        p = probs.gather(-1, at)
        before = probs * ((probs > p) | (probs == p) & (ids < ids.gather(-1, at)))
        beyond = before.sum(-1, keepdim=True) >= top_p
        if not beyond.any():
            break
        at = torch.where(beyond, draw(before, generator), at)
    return ids.gather(-1, at).squeeze(-1)

def draw(weights, generator):
    """An index a row, (B, 1), in proportion to weights (B, V), by one uniform number on their running sum."""
    sums = weights.to(torch.float32 if weights.device.type == "mps" else torch.float64).cumsum(-1)
    u = torch.rand(len(sums), 1, dtype=sums.dtype, device=sums.device, generator=generator)
    return torch.searchsorted(sums, u * sums[:, -1:], right=True).clamp(max=sums.shape[-1] - 1)
