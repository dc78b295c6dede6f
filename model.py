"""GPT-2 from scratch. Needs torch and safetensors; imports nothing of ours.

Shapes: B rows, T tokens, P cached tokens, C = n_embd channels, H heads, D = C / H, V vocabulary.
The trunk (`forward`) and the head (`logits`) are apart, so that the head can run on response tokens only.
Modules and files have Hugging Face's names: a saved folder is a GPT2LMHeadModel folder, and vice versa.
"""

import json
import math
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class ModelError(ValueError):
    """A configuration, a weights file or a request that this model cannot serve: one line for the user."""


@dataclass
class GPTConfig:
    vocab_size: int = 50257  # token ids, end-of-text included
    block_size: int = 1024  # positions
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768  # channels

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name} = {value!r}: needs a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, past):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        if past is not None:
            k, v = (torch.cat(pair, dim=-2) for pair in zip(past, (k, v), strict=True))  # (B, H, P+T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C)), (k, v)  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask, past):
        y, present = self.attn(self.ln_1(x), mask, past)
        x = x + y
        return x + self.mlp(self.ln_2(x)), present


class GPT(nn.Module):
    """The decoder. vocab_multiple rounds the embedding table up (64 is faster on GPUs): the extra rows are
    never looked up, scored, sampled or saved.
    """

    def __init__(self, config, vocab_multiple=1):
        super().__init__()
        self.config = config
        rows = math.ceil(config.vocab_size / vocab_multiple) * vocab_multiple
        self.wte = nn.Embedding(rows, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # 0.02 as GPT-2; the 2 n_layer projections into the residual start smaller
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)

    def forward(self, tokens, positions=None, mask=None, cache=None):
        """Hidden states after the final LayerNorm: tokens (B, T) -> (B, T, C).

        positions (B, T), by default counted on from the cache. mask (B, 1, T, P+T), bool, True where a token
        (row) may attend to another (column), by default causal. cache: a list of each layer's keys and
        values, `[]` at first, extended in place.
        """
        B, T = tokens.shape
        P = cache[0][0].shape[-2] if cache else 0
        if positions is None:
            if P + T > self.config.block_size:
                raise ModelError(f"{P + T} tokens do not fit block_size {self.config.block_size}")
            positions = torch.arange(P, P + T, device=tokens.device)
        if mask is None and P and T > 1:
            mask = torch.ones(T, P + T, dtype=torch.bool, device=tokens.device).tril(P)
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        pasts = cache or [None] * len(self.h)
        presents = []
        for block, past in zip(self.h, pasts, strict=True):
            x, present = block(x, mask, past)
            presents.append(present)
        if cache is not None:
            cache[:] = presents
        return self.ln_f(x)

    def logits(self, hidden):
        """The tied head: hidden (..., C) -> (..., V). Rows that only pad the table are cropped here."""
        return F.linear(hidden, self.wte.weight)[..., :self.config.vocab_size]

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, *, temperature=1.0, top_k=None, top_p=None, eos=None,
                 generator=None):
        """Continue each row of tokens (B, T) by up to max_new_tokens: (B, T + n), prompt and continuation.

        temperature 0 takes the most likely token. top_k keeps the k most likely tokens, top_p the fewest that
        together reach probability p. A row that has produced `eos` repeats it until all rows have. Beyond
        block_size the model sees the last block_size tokens, recomputed each time.
        """
        if tokens.shape[1] == 0:
            raise ModelError("generate needs at least one token; end-of-text serves as an empty prompt")
        if not temperature >= 0 or not (top_k is None or top_k >= 1) or not (top_p is None or 0 < top_p <= 1):
            raise ModelError(f"sampling with temperature {temperature}, top_k {top_k}, top_p {top_p}: "
                             "needs temperature >= 0, top_k >= 1, 0 < top_p <= 1")
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)  # (B,)
        cache = []
        for _ in range(max_new_tokens):
            if cache and cache[0][0].shape[-2] < self.config.block_size:
                new = tokens[:, -1:]
            else:
                cache, new = [], tokens[:, -self.config.block_size:]
            hidden = self(new, cache=cache)[:, -1]  # (B, C)
            token = sample_token(self.logits(hidden).float(), temperature, top_k, top_p, generator)  # (B,)
            if eos is not None:
                token = torch.where(done, eos, token)
                done |= token == eos
            tokens = torch.cat([tokens, token.unsqueeze(-1)], dim=-1)
            if done.all():
                break
        return tokens

    @classmethod
    def from_pretrained(cls, name_or_folder, vocab_multiple=1):
        """Read a Hugging Face GPT-2 folder (config.json, model.safetensors or its shards) or one of NAMES.

        Weights become float32. Raises ModelError, in one line, for anything that is not a GPT-2 of this kind.
        """
        folder = download(name_or_folder) if name_or_folder in NAMES else Path(name_or_folder)
        model = cls(read_config(folder), vocab_multiple)
        weights = read_weights(folder)
        head = weights.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, weights.get("wte.weight", head)):
            raise ModelError(f"{folder}: its output head is not tied to the embedding; this model's is")
        for name, p in model.named_parameters():
            w = weights.pop(name, None)
            shape = (model.config.vocab_size, *p.shape[1:]) if name == "wte.weight" else tuple(p.shape)
            if w is None:
                raise ModelError(f"{folder}: tensor {name} is missing")
            if is_conv1d(name):
                w = w.T
            if tuple(w.shape) != shape:
                raise ModelError(f"{folder}: tensor {name} is {tuple(w.shape)}, config.json says {shape}")
            with torch.no_grad():
                p.zero_()
                p[:len(w)] = w
        if weights:
            raise ModelError(f"{folder}: tensor {sorted(weights)[0]} is not a GPT-2's ({len(weights)} such)")
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, for from_pretrained here and in transformers."""
        c, folder = self.config, Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
                  "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
                  "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
                  "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
                  "bos_token_id": c.vocab_size - 1, "eos_token_id": c.vocab_size - 1}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: p.detach().cpu() for name, p in self.named_parameters()}
        weights["wte.weight"] = weights["wte.weight"][:c.vocab_size]
        weights = {"transformer." + name: (w.T if is_conv1d(name) else w).contiguous()
                   for name, w in weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def sample_token(logits, temperature, top_k, top_p, generator):
    """One token a row: logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(descending=True, stable=True)  # (B, V)
        beyond = probs.cumsum(-1) - probs >= top_p  # what comes before already reaches p
        logits = logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------
# Hugging Face's folder layout

NAMES = {"gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
         "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
         "distilgpt2": "distilbert/distilgpt2"}


def is_conv1d(name):
    """Hugging Face's GPT-2 keeps these four matrices as Conv1D, (in, out): the transpose of nn.Linear."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def read_config(folder):
    """config.json of a Hugging Face GPT-2 -> GPTConfig. What would change the computation is refused."""
    path = folder / "config.json"
    try:
        c = json.loads(path.read_text())
        positions = c["n_positions"] if "n_positions" in c else c["n_ctx"]
        sizes = [c["vocab_size"], positions, c["n_layer"], c["n_head"], c["n_embd"]]
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror}; a model folder holds config.json and model.safetensors, "
                         f"a model name is one of {', '.join(NAMES)}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ModelError(f"{path}: not the configuration of a GPT-2 ({type(e).__name__}: {e})") from None
    expected = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "tie_word_embeddings": (True,),
                "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
                "n_inner": (None, 4 * c["n_embd"])}
    for key, allowed in expected.items():
        if key in c and c[key] not in allowed:
            raise ModelError(f"{path}: {key} = {c[key]!r} is not supported (only {allowed[0]!r})")
    return GPTConfig(*sizes)


def read_weights(folder):
    """All tensors of a folder in float32, named without `transformer.`, attention-mask buffers left out."""
    index, weights = folder / "model.safetensors.index.json", {}
    try:
        files = ["model.safetensors"]
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        for file in files:
            if Path(file).name != file:
                raise ModelError(f"{index}: shard {file!r} points outside the folder")
            weights.update(load_file(folder / file))
    except OSError as e:
        raise ModelError(f"{folder / file}: {e.strerror or 'cannot be read'}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise ModelError(f"{folder}: its weights cannot be read, perhaps truncated ({e})") from None
    weights = {name.removeprefix("transformer."): w.float() for name, w in weights.items()}
    return {name: w for name, w in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}


def download(name):
    """Fetch a named model once, from $HF_ENDPOINT into $HF_HOME/termwise or ~/.cache/termwise: the folder."""
    home = os.environ.get("HF_HOME")
    folder = (Path(home) if home else Path.home() / ".cache") / "termwise" / name
    folder.mkdir(parents=True, exist_ok=True)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    for file in ("config.json", "model.safetensors"):
        if (folder / file).exists():
            continue
        url, part = f"{endpoint}/{NAMES[name]}/resolve/main/{file}", folder / (file + ".part")
        print(f"downloading {url} to {folder}")
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as reply:
                length = int(reply.headers["Content-Length"])
            torch.hub.download_url_to_file(url, str(part))
        except (OSError, ValueError, TypeError) as e:
            raise ModelError(f"{url}: {e}; try again, or pass a folder with the files") from None
        if part.stat().st_size != length:  # a cut connection looks like the end of the file
            got = part.stat().st_size
            part.unlink()
            raise ModelError(f"{url}: got {got} of {length} bytes; try again, or pass a folder instead")
        part.replace(folder / file)
    return folder
