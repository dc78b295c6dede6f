"""GPT-2 from scratch. Needs torch and safetensors; imports nothing of ours.

Shapes: B rows, T tokens, P cached tokens, C = n_embd channels, H heads, D = C / H, V vocabulary.
The trunk (`forward`) and the head (`logits`) are apart, so that the head can run on response tokens only.
Modules and files have Hugging Face's names: a saved folder is a GPT2LMHeadModel folder, and vice versa.
"""

import json
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

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
            if type(value) is not int or value < 1:
                raise ModelError(f"{name} = {value!r}: needs a whole number of at least 1")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask, cache):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        is_causal = mask is None and not cache  # one token after a cache sees all of it
        if cache:
            k, v = (torch.cat(pair, dim=-2) for pair in zip(cache, (k, v), strict=True))  # (B, H, P+T, D)
        if cache is not None:
            cache[:] = k, v
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
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The decoder. vocab_multiple rounds the embedding table up (a multiple of 64 is faster): the extra
    rows are 0, and never looked up, scored, sampled or saved.
    """

    def __init__(self, config, vocab_multiple=1):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:  # 0.02 as GPT-2; the 2 n_layer projections into the residual start smaller
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)
        padding = -config.vocab_size % vocab_multiple  # last: the same seed draws the same weights without it
        self.wte.weight = nn.Parameter(F.pad(self.wte.weight.detach(), (0, 0, 0, padding)))
        self.wte.num_embeddings += padding

    def forward(self, tokens, positions=None, mask=None, cache=None):
        """Hidden states after the final LayerNorm: tokens (B, T) -> (B, T, C).

        positions (B, T), by default counted on from the cache. mask (B, 1, T, P+T), bool, True where a token
        (row) may attend to another (column), by default causal. cache: each layer's [keys, values] of the
        P tokens before, a list that is `[]` at first and extended in place.
        """
        T = tokens.shape[-1]
        P = cache[0][0].shape[-2] if cache else 0
        if positions is None:
            if P + T > self.config.block_size:
                raise ModelError(f"{P + T} tokens do not fit block_size {self.config.block_size}")
            positions = torch.arange(P, P + T, device=tokens.device)
        if mask is None and P and T > 1:
            mask = torch.ones(T, P + T, dtype=torch.bool, device=tokens.device).tril(P)
        if cache == []:
            cache += [[] for _ in self.h]
        x = self.wte(tokens) + self.wpe(positions)  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, mask, None if cache is None else cache[i])
        return self.ln_f(x)

    def logits(self, hidden, centered=False):
        """The tied head: hidden (..., C) -> (..., V). Rows that only pad the table are cropped here.

        centered: less their mean, which no softmax sees. GPT-2's logits are about -110, where bfloat16 has
        steps of 0.5; centred they are small and have small steps.
        """
        table = self.wte.weight
        if centered:
            table = table - table[:self.config.vocab_size].detach().mean(0)
        return F.linear(hidden, table)[..., :self.config.vocab_size]

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
                done = token == eos
            tokens = torch.cat([tokens, token.unsqueeze(-1)], dim=-1)
            if eos is not None and done.all():
                break
        return tokens

    @classmethod
    def from_pretrained(cls, name_or_folder, vocab_multiple=1):
        """Read a Hugging Face GPT-2 folder (config.json, model.safetensors or its shards) or one of NAMES.

        Weights become float32. Raises ModelError, in one line, for anything that is not a GPT-2 of this kind.
        """
        folder = download(name_or_folder) if name_or_folder in NAMES else Path(name_or_folder)
        config, weights = read_config(folder), read_weights(folder)
        head = weights.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, weights.setdefault("wte.weight", head)):
            raise ModelError(f"{folder}: its output head is not tied to the embedding; this model's is")
        if config.n_layer > len(weights) > 0:  # an absurd number would take minutes to build
            raise ModelError(f"{folder}: config.json says {config.n_layer} layers, of {len(weights)} tensors")
        with torch.device("meta"):  # shapes only: no time on random weights, no memory for absurd sizes
            model = cls(config, vocab_multiple)
        have, want = ({name: tuple(w.shape) for name, w in x.items()} for x in (weights, file_views(model)))
        for name in sorted(have.keys() | want.keys()):
            if have.get(name) != want.get(name):
                raise ModelError(f"{folder}: tensor {name} is {have.get(name, 'missing')}, "
                                 f"config.json says {want.get(name, 'no such tensor')}")
        model.to_empty(device="cpu").wte.weight.data.zero_()  # the padding rows
        for name, view in file_views(model).items():
            view.copy_(weights[name])
        return model

    def save_pretrained(self, folder, eos=None):
        """Write config.json and model.safetensors, for from_pretrained here and in transformers.

        eos is the end-of-text id at which other programs stop, by default the last id, as in GPT-2.
        """
        c, folder = self.config, Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        eos = c.vocab_size - 1 if eos is None else eos
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
                  "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
                  "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
                  "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
                  "bos_token_id": eos, "eos_token_id": eos}
        weights = {"transformer." + name: p.cpu().contiguous() for name, p in file_views(self).items()}
        part = folder / "model.safetensors.part"
        save_file(weights, part, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        part.chmod((folder / "config.json").stat().st_mode)  # safetensors makes it private
        part.replace(folder / "model.safetensors")


def sample_token(logits, temperature, top_k, top_p, generator):
    """One token a row: logits (B, V) -> (B,). top_p looks at the distribution that top_k leaves."""
    if temperature < 1e-6:  # 0, or so small that logits / temperature would overflow
        return logits.argmax(-1)
    logits, order = logits.sort(descending=True, stable=True)  # (B, V), most likely first
    probs = (logits[:, :top_k] / temperature).softmax(-1)  # (B, K)
    if top_p is not None:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)  # what comes before reaches p already
    return order.gather(-1, torch.multinomial(probs, 1, generator=generator)).squeeze(-1)


# ---------------------------------------------------------------------------------------------------------
# Hugging Face's folder layout

NAMES = {"gpt2": "openai-community/gpt2", "gpt2-medium": "openai-community/gpt2-medium",
         "gpt2-large": "openai-community/gpt2-large", "gpt2-xl": "openai-community/gpt2-xl",
         "distilgpt2": "distilbert/distilgpt2"}


def file_views(model):
    """The parameters as views in the layout of Hugging Face's files, named without `transformer.`.

    Four matrices a block are transposed there (Conv1D is (in, out)); rows that pad the vocabulary left out.
    """
    views = {name: p.detach() for name, p in model.named_parameters()}
    views["wte.weight"] = views["wte.weight"][:model.config.vocab_size]
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: w.T if name.endswith(conv1d) else w for name, w in views.items()}


def read_config(folder):
    """config.json of a Hugging Face GPT-2 -> GPTConfig. What would change the computation is refused."""
    path = folder / "config.json"
    try:
        c = json.loads(path.read_bytes())
        positions = c.get("n_positions", c.get("n_ctx"))
        config = GPTConfig(c.get("vocab_size"), positions, c.get("n_layer"), c.get("n_head"), c.get("n_embd"))
    except OSError as e:
        raise ModelError(f"{path}: {e.strerror}; a model folder holds config.json and model.safetensors, "
                         f"a model name is one of {', '.join(NAMES)}") from None
    except (ValueError, AttributeError, RecursionError) as e:
        raise ModelError(f"{path}: not the configuration of a GPT-2 ({e})") from None
    expected = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
                "n_inner": [None, 4 * config.n_embd], "layer_norm_epsilon": [1e-5],
                "tie_word_embeddings": [True], "scale_attn_weights": [True],
                "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False],
                "quantization_config": [None]}
    for key, allowed in expected.items():
        if key in c and c[key] not in allowed:
            raise ModelError(f"{path}: {key} = {c[key]!r} is not supported (only {allowed[0]!r})")
    return config


def read_weights(folder):
    """The tensors of model.safetensors, or of the shards that its index lists, named without `transformer.`.

    The attention masks that old files carry along are left out.
    """
    names, index, weights = ["model.safetensors"], folder / "model.safetensors.index.json", {}
    if index.exists() and not (folder / names[0]).exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ModelError(f"{index}: not an index of shards ({type(e).__name__}: {e})") from None
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index}: shard {name!r} is not in the folder")
        try:
            weights |= load_file(folder / name)
        except FileNotFoundError:
            raise ModelError(f"{folder / name}: no such file (.bin files are pickles, not read)") from None
        except (OSError, ValueError, SafetensorError) as e:
            raise ModelError(f"{folder / name}: cut short, or not a safetensors file ({e})") from None
    weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
    return {name: w for name, w in weights.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}


def download(name):
    """Fetch a named model once, from $HF_ENDPOINT into $HF_HOME/termwise or ~/.cache/termwise: the folder.

    A file gets its name only when its length is the announced one and it reads as what it should be.
    """
    folder = Path(os.environ.get("HF_HOME") or "~/.cache", "termwise", name).expanduser()
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    for file, check in (("config.json", read_config), ("model.safetensors", read_weights)):
        if (folder / file).exists():
            continue
        url = f"{endpoint}/{NAMES[name]}/resolve/main/{file}"
        print(f"downloading {url} to {folder}", file=sys.stderr)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as aside:  # one a process: ranks may race
                part = Path(aside, file)
                with urlopen(url) as reply:  # for its length; not every mirror answers HEAD
                    length = reply.headers["Content-Length"]
                torch.hub.download_url_to_file(url, str(part))  # a cut connection passes for the end
                if length is not None and part.stat().st_size != int(length):
                    raise OSError(f"got {part.stat().st_size} of {length} bytes")
                check(Path(aside))
                part.replace(folder / file)
        except (OSError, ValueError, HTTPException) as e:
            raise ModelError(f"{url}: {str(e).strip()}; try again, or pass a folder with the files") from None
    return folder
