"""Model folders: Hugging Face's GPT-2 layout read and written, the named GPT-2s downloaded.

Where model.py does not compute GPT-2 (it was edited), a model is saved under its own names, with a
fingerprint of what it computes; such a folder opens here only, with the same edit.
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import asdict, fields, replace
from http.client import HTTPException
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plumbing import vocab
from plumbing.errors import ModelError
from plumbing.files import write_atomically, write_json

NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
NAMES["distilgpt2"] = "distilbert/distilgpt2"
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out), the transpose of nn.Linear
OWN = "termwise"  # model_type of an architecture that is not GPT-2
GPT2 = [1.452804062, 1.139750698, 0.448809253, -0.390936372, -1.101065760]  # its fingerprint

def fingerprint(cls, config):
    """What the code of a model computes: five logits of a small one with fixed weights, after 128 tokens."""
    small = replace(config, vocab_size=5, block_size=128, n_layer=2, n_head=4, n_embd=32)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = cls(small).double()
        for p in model.parameters():
            p.copy_(0.3 * torch.arange(p.numel(), dtype=torch.float64).sin().view_as(p))
        return model.logits(model(torch.arange(128)[None] % 5))[0, -1]

def is_equal(code, saved):  # 5e-6 lie between the two GELUs, 6e-8 between a LayerNorm's 1e-5 and 1e-6
    return torch.allclose(code, code.new_tensor(saved), rtol=0, atol=1e-8)

def check_code(cls, config, folder):
    """The fingerprint of a class; ModelError where it is not that of the code which saved the folder."""
    if is_equal(code := fingerprint(cls, config), load_config(folder).get("fingerprint", GPT2)):
        return code
    raise ModelError(f"{folder}: model.py computes something else than the code that saved this model; open "
                     "it with that model.py")

def file_views(model, code):
    """The parameters as views in the layout of the files, and True where that is GPT-2's, without
    `transformer.`. Rows that pad the vocabulary are left out. code: the model's fingerprint."""
    views = {name: p.detach() for name, p in model.named_parameters()}
    views["wte.weight"] = views["wte.weight"][:model.config.vocab_size]
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    both = ["ln_f", *(f"h.{i}.{part}" for i in range(model.config.n_layer) for part in parts)]
    names = {"wte.weight", "wpe.weight", *(f"{part}.{kind}" for part in both for kind in ("weight", "bias"))}
    if names != views.keys() or not is_equal(code, GPT2):
        return views, False
    return {name: w.T if name.endswith(CONV1D) else w for name, w in views.items()}, True

def write(model, folder, eos=None):
    """config.json, generation_config.json, model.safetensors. eos is by default the last id, as in GPT-2."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    views, is_gpt2 = file_views(model, fingerprint(type(model), model.config))
    prefix = "transformer." if is_gpt2 else ""
    weights = {prefix + name: p.cpu().contiguous() for name, p in views.items()}
    path = folder / "model.safetensors"
    write_atomically(path, lambda part: save_file(weights, part, metadata={"format": "pt"}))
    write_config(model, folder, eos)
    path.chmod((folder / "config.json").stat().st_mode)  # safetensors makes it private

def write_config(model, folder, eos=None):
    """config.json and generation_config.json alone."""
    c, code = model.config, fingerprint(type(model), model.config)
    stop = dict.fromkeys(("bos_token_id", "eos_token_id"), c.vocab_size - 1 if eos is None else eos)
    config = {"model_type": OWN, **asdict(c), "fingerprint": code.tolist()}
    if file_views(model, code)[1]:
        config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **asdict(c),
                  **dict.fromkeys(("n_positions", "n_ctx"), c.block_size), "activation_function": "gelu_new",
                  "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "dtype": "float32",
                  **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)}
    write_json(Path(folder, "config.json"), config | stop)
    write_json(Path(folder, "generation_config.json"), stop | {"pad_token_id": stop["eos_token_id"]})

def carry_over(start, folder):
    """Take over what training did not change: of the start's two configurations all but the weights' type and
    the id of end-of-text, and its tokenizer's files. False where transformers finds no tokenizer there."""
    start, folder = folder_of(start), Path(folder)
    changed = ("dtype", "torch_dtype", "n_ctx", "eos_token_id", "pad_token_id")
    for name in ("config.json", "generation_config.json"):
        kept = load_config(start, name) if (start / name).exists() else {}
        kept = {key: value for key, value in kept.items() if key not in changed}
        write_json(folder / name, load_config(folder, name) | kept)
    names = [name for name in vocab.OF_TRANSFORMERS if (start / name).exists()]
    if not {"merges.txt", "tokenizer.json"} & set(names):
        return False
    if not any("chat_template" in (start / name).read_text(encoding="utf-8") for name in names):
        (folder / "chat_template.jinja").write_text(vocab.CHAT, encoding="utf-8")
    for name in names:
        shutil.copyfile(start / name, folder / name)
    return True

def read(cls, config_class, name_or_folder, vocab_multiple=1):
    """The model of a folder, or one of NAMES. Weights become float32."""
    folder = folder_of(name_or_folder)
    config, weights = read_config(folder, config_class), read_weights(folder)
    with torch.device("meta"):  # shapes only
        model = cls(config, vocab_multiple)
    code = check_code(cls, config, folder)
    views, is_gpt2 = file_views(model, code)
    if is_gpt2:  # without `transformer.`, a repeated head, and the attention masks of old files
        weights = {name.removeprefix("transformer."): w for name, w in weights.items()}
        weights = {x: w for x, w in weights.items() if not x.endswith((".attn.bias", ".attn.masked_bias"))}
        head = weights.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, weights.setdefault("wte.weight", head)):
            raise ModelError(f"{folder}: its output head is not tied to the embedding; this model's is")
    have, want = ({name: tuple(w.shape) for name, w in x.items()} for x in (weights, views))
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise ModelError(f"{folder}: tensor {name} is {have.get(name, 'missing')}, "
                             f"config.json says {want.get(name, 'no such tensor')}")
    if is_gpt2 and not list(model.buffers()):
        model.to_empty(device="cpu").wte.weight.data.zero_()  # the padding rows
    else:  # an edited model may compute tables when it is built, such as the angles of rotary positions
        with torch.random.fork_rng(devices=[]):
            model = cls(config, vocab_multiple)
    for name, view in file_views(model, code)[0].items():
        view.copy_(weights[name])
    return model

def folder_of(name):
    """A folder, or that of one of NAMES, which is downloaded first."""
    return download(name) if name in NAMES else Path(name)

def load_config(folder, name="config.json"):
    """The object in a folder's config.json or generation_config.json."""
    path = Path(folder, name)
    try:
        return dict(json.loads(path.read_bytes()).items())
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        why = getattr(e, "strerror", None) or f"not the configuration of a GPT-2 ({e})"
        raise ModelError(f"{path}: {why}; a model is a folder with config.json, or a name: "
                         f"{', '.join(NAMES)}") from None

def read_config(name_or_folder, config_class):
    """config.json -> GPTConfig. Weights cut short and what would change GPT-2's computation are refused."""
    folder = folder_of(name_or_folder)
    path, c = folder / "config.json", load_config(folder)
    if (kind := c.get("model_type", "gpt2")) not in ("gpt2", OWN):
        raise ModelError(f"{path}: a {kind}; python ports/huggingface.py --init {folder} may train it")
    if (folder / "model.safetensors").exists():
        read_weights(folder, names=[])
    try:
        if kind == OWN:
            return config_class(**{field.name: c[field.name] for field in fields(config_class)})
        config = config_class(c.get("vocab_size"), c.get("n_positions", c.get("n_ctx")),
                              c.get("n_layer"), c.get("n_head"), c.get("n_embd"))
    except (ValueError, KeyError) as e:
        raise ModelError(f"{path}: not the configuration of a GPT-2 ({e})") from None
    expected = {"activation_function": ["gelu_new", "gelu_pytorch_tanh"],
                "n_inner": [None, 4 * config.n_embd], "layer_norm_epsilon": [1e-5],
                "tie_word_embeddings": [True], "scale_attn_weights": [True],
                "scale_attn_by_inverse_layer_idx": [False], "add_cross_attention": [False],
                "quantization_config": [None]}
    for key, allowed in expected.items():
        if key in c and c[key] not in allowed:
            raise ModelError(f"{path}: {key} = {c[key]!r} is not GPT-2's, {allowed[0]!r}; "
                             f"python ports/huggingface.py --init {folder} may train it")
    return config

def read_weights(folder, names=None):
    """The tensors of model.safetensors, all or some."""
    try:
        with safe_open(path := folder / "model.safetensors", "pt") as f:
            return {name: f.get_tensor(name) for name in (f.keys() if names is None else names)}
    except (OSError, ValueError, SafetensorError) as e:
        raise ModelError(f"{path}: missing, cut short, or not a safetensors file ({e}); pickles (.bin) and "
                         "shards are not read") from None

def download(name):
    """Fetch a named model once, from $HF_ENDPOINT into $HF_HOME/termwise or ~/.cache/termwise: the folder."""
    folder = Path(os.environ.get("HF_HOME") or "~/.cache", "termwise", name).expanduser()
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    for file, check in (("config.json", load_config), ("model.safetensors", read_weights)):
        if (folder / file).exists():
            continue
        url = f"{endpoint}/{NAMES[name]}/resolve/main/{file}"
        print(f"downloading {url} to {folder}", file=sys.stderr)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as aside:  # one a process: ranks may race
                part = Path(aside, file)
                torch.hub.download_url_to_file(url, str(part))
                check(Path(aside))  # for a cut connection passes for the end
                part.replace(folder / file)
        except (OSError, ValueError, HTTPException) as e:
            raise ModelError(f"{url}: {str(e).strip()}; try again, or pass a folder with the files") from None
    return folder
