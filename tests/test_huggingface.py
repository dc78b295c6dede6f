"""ports/huggingface.py gives the loss and the gradients of plain rows of any architecture, or refuses it.

"Plain" is written out in experiments/architectures.py: one forward of the model's own for each response, a
sum, the equation. The tiny random models are made there too.
"""

import json
import os
import socket
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")

import train  # noqa: E402
from data import Tokenizer  # noqa: E402
from experiments import architectures  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from plumbing import machine, ranks, report  # noqa: E402
from plumbing.errors import ConfigError, DataError  # noqa: E402
from ports import huggingface, huggingface_setup  # noqa: E402
from ports.huggingface import Policy  # noqa: E402

pytestmark = pytest.mark.slow
ANSWER = report.answer

ONE = """llama qwen2 qwen3 gpt2 gpt_neox gemma2 gemma3 cohere phi3 mixtral glm4_moe deepseek_v3 gpt_oss
         llama4 opt modernbert-decoder""".split()
TWO = "gpt_neo bloom blt mamba bart gemma2@narrow mistral@narrow qwen3_next bamba".split()
REFUSED = {"bert": "is not a causal model", "rwkv@deep": "changes its weights when it runs",
           "llama@dynamic": "a smaller --block_size", "phi3@longrope": "a smaller --block_size",
           "prophetnet": "no part of it gives, as last_hidden_state,", "reformer": "cannot be trained"}

@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("name", ONE + TWO)
def test_loss_and_all_gradients_are_those_of_plain_rows(name):
    """To 1e-9, parameter by parameter; numbers decide which trunk and which rows can be used."""
    with architectures.float64_throughout():
        rows, *off = architectures.compare(architectures.tiny(name), architectures.tiny(name, 1), ["dpo"])
    assert rows == ("one" if name in ONE else "two") and max(off) < 1e-9, (rows, off)

def checked(policy, lengths=architectures.LENGTHS, cfg=None):
    pairs = architectures.random_pairs(lengths)
    return huggingface_setup.check_numbers(policy, [pairs], cfg or architectures.config("dpo"), "it")

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, says", REFUSED.items())
def test_what_is_not_exact_is_refused(name, says):
    with architectures.float64_throughout(), pytest.raises(ConfigError, match=says):
        checked(Policy(architectures.tiny(name)))

def test_a_start_whose_long_rows_differ_is_exact_where_no_row_is_long():
    with architectures.float64_throughout():
        assert "one row" in checked(Policy(architectures.tiny("phi3@longrope")), [(9, 8, 3), (2, 4, 9)])

def test_the_pairs_that_are_checked_are_the_ends_of_every_length_and_one_at_each_limit():
    lengths = [(9, 9, 9), (1, 9, 9), (20, 3, 4), (9, 30, 1), (8, 8, 10), (9, 10, 13), (9, 10, 16), (9, 9, 8)]
    found = huggingface_setup.telling(architectures.random_pairs(lengths), {21, 99})
    assert found == {1, 2, 3, 6} | {4, 5, 2}  # the ends; alone beyond 21: the row, one response's path, both

# ---- From the command line ----

TEMPLATE = ("{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}")

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random GPT-2 whose tokens are bytes, as train.py saves it."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = Tokenizer("bytes")
    torch.manual_seed(0)
    GPT(GPTConfig(tokenizer.vocab_size, 128, 2, 4, 32)).save_pretrained(folder, tokenizer.eot)
    tokenizer.save(folder)
    (folder / "chat_template.jinja").unlink()
    return folder

@pytest.fixture(scope="module")
def start(folder, tmp_path_factory):
    """start(type): the folder of a tiny random model of a type, with bytes as tokens, made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("start")
            model = architectures.tiny(name).float()
            for layer in model.model.layers if name == "longcat_flash" else ():  # never to be chosen
                layer.mlp.router.e_score_correction_bias[:4] = -9
            model.save_pretrained(made[name])
            transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(made[name])
        return made[name]
    return make

@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(report, "answer", lambda model, tokenizer, prompt, seed: "An answer.")
    monkeypatch.setattr(report, "PROGRAM", report.PROGRAM)  # which main sets

@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "eight.jsonl"
    path.write_text("".join(
        json.dumps({"prompt": f"Question {i}?", "chosen": [{"text": f"Yes {i}.", "scores": [4, 3]}],
                    "rejected": [{"text": f"No {i},", "scores": [1, 0]}, {"text": " no.", "scores": [2, 1]}]})
        + "\n" for i in range(8)))
    return path

def log_of(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]

def run(main, init, data, out, *more, steps=2):
    main([str(x) for x in (
        "--init", init, "--data", data, "--val_data", data, "--out_dir", out, "--steps", steps,
        "--batch_size", 6, "--block_size", 64, "--log_every", 1, "--eval_every", 0, *more)])

def refused(capsys, *argv):
    """Runs it; the one line that it ends with, at status 2."""
    with pytest.raises(SystemExit) as status:
        huggingface.main([str(x) for x in argv])
    said = capsys.readouterr().err.strip()
    assert status.value.code == 2 and "\n" not in said
    return said

@pytest.mark.parametrize("loss", ["sft", "dpop", "tdpo2", "2d-dpo"])
def test_gpt2_gives_the_numbers_of_train_py(folder, eight, tmp_path, loss):
    """The same model by model.py and by transformers: the same log, loss by loss."""
    for main, out in ((train.main, "ours"), (huggingface.main, "port")):
        run(main, folder, eight, tmp_path / out, "--loss", loss, "--lr", 1e-3, "--dtype", "float64")
    for ours, port in zip(log_of(tmp_path / "ours"), log_of(tmp_path / "port"), strict=True):
        for name, x in ours.items():
            if "loss" in name or "log" in name or name == "grad_norm" or "kl/" in name:
                assert port[name] == pytest.approx(x, rel=1e-8, abs=1e-9), name

@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of the compiler
def test_a_compiled_run_has_the_numbers_of_an_eager_one(start, eight, tmp_path, monkeypatch):
    """And its result, which is in bfloat16 as the start is, opens as what it is in memory, though a compiler
    rounds bfloat16 otherwise. Not translated to C++, which takes a minute and is torch's."""
    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *args: tuple(1.01 * x if x.dtype == torch.bfloat16 else x for x in graph(*args))

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    machine.compiled.cache_clear()
    half, logs, graphs = tmp_path / "half", [], []
    transformers.AutoModelForCausalLM.from_pretrained(start("llama"), dtype="bfloat16").save_pretrained(half)
    Tokenizer("bytes").save(half)
    for switch in ("--no-compile", "--compile"):
        run(huggingface.main, half, eight, tmp_path / switch, "--lr", 1e-3,
            "--dtype", "float64", switch)
        assert bool(graphs) == (switch == "--compile")
        logs.append([r["loss"] for r in log_of(tmp_path / switch) if "loss" in r])
    assert len(logs[0]) == 2 and logs[0] == pytest.approx(logs[1], rel=1e-8)
    machine.compiled.cache_clear()

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, idle", [
    ("bart", "encoder_attn"), ("git", "image_encoder"), ("ernie4_5_moe", "e_score_correction_bias"),
    ("deepseek_v4", "compressor"), ("longcat_flash", "experts")])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(start, eight, tmp_path, name, idle):
    """Byte by byte, though some weights get no gradient: attention to an encoder, the part that sees images,
    what balances a router, what only long texts reach, the experts of a layer that nothing is sent to."""
    for out, steps, extra in (("whole", 3, []), ("parts", 1, []), ("parts", 3, ["--resume"])):
        run(huggingface.main, start(name), eight, tmp_path / out, "--lr", 1e-2, *extra, steps=steps)
    first, second = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    before = load_file(start(name) / "model.safetensors")
    assert first.keys() == second.keys() == before.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], before[key]) for key in first)
    tensors = load_file(tmp_path / "whole" / "checkpoints" / "step-0000003.safetensors")
    names = [key.removeprefix("model.") for key in tensors if key.startswith("model.")]
    assert any(idle in key and f"exp_avg.{key}" not in tensors for key in names)

def test_the_result_opens_with_its_tokenizer_and_stops_where_its_answers_were_closed(start, eight, tmp_path):
    run(huggingface.main, start("gpt2"), eight, tmp_path)
    text = "Is it resumed? It is."
    own = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert own.encode(text) == Tokenizer("bytes").encode(text)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 256]
    assert not (tmp_path / "result.part").exists()

@pytest.mark.filterwarnings("ignore")
def test_each_tensor_is_saved_in_the_dtype_of_the_start(start, eight, tmp_path):
    """Those that a bfloat16 start keeps in float32 too: without training (by an --lr that moves nothing)
    all is as it was. Checkpoints are in the run's precision."""
    name = start("glm4_moe")
    own = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    own.save_pretrained(tmp_path / "start")
    transformers.AutoTokenizer.from_pretrained(name).save_pretrained(tmp_path / "start")
    run(huggingface.main, tmp_path / "start", eight, tmp_path / "out", "--lr", 1e-30, "--dtype", "float64",
        steps=1)
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in ("start", "out"))
    assert {x.dtype for x in before.values()} == {torch.float32, torch.bfloat16}
    assert before.keys() == after.keys()
    for key, x in before.items():
        assert x.dtype == after[key].dtype and torch.equal(x, after[key]), key
    [checkpoint] = (tmp_path / "out").glob("checkpoints/*.safetensors")
    assert {x.dtype for x in load_file(checkpoint).values() if x.dim()} == {torch.float64}

def test_a_result_that_does_not_say_what_memory_says_is_not_put_there(folder, eight, tmp_path, monkeypatch):
    """Whatever goes wrong while it is written: the run ends in one line, its checkpoint has the weights."""
    save = transformers.GPT2LMHeadModel.save_pretrained

    def spoiled(self, aside, **more):
        save(self, aside, **more)
        path = aside / "model.safetensors"
        save_file({key: x + 0.1 for key, x in load_file(path).items()}, path, {"format": "pt"})

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as status:
        patch.setattr(transformers.GPT2LMHeadModel, "save_pretrained", spoiled)
        run(huggingface.main, folder, eight, tmp_path)
    assert "log-probabilities differ" in str(status.value) and "last checkpoint" in str(status.value)
    assert not (tmp_path / "model.safetensors").exists() and [*tmp_path.glob("checkpoints/*-0000002.*")]
    run(huggingface.main, folder, eight, tmp_path, "--resume")
    assert (tmp_path / "model.safetensors").exists()

@pytest.mark.filterwarnings("ignore")
def test_a_start_that_could_not_be_saved_or_read_is_refused_before_training(folder, start, eight, tmp_path,
                                                                           capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    common = "--init", tmp_path, "--data", eight, "--out_dir", tmp_path / "out"
    assert "tokenizer" in refused(capsys, *common)  # transformers makes an empty one of GPT-2's kind
    Tokenizer("bytes").save(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.5}')
    assert "generation_config.json" in refused(capsys, *common)
    (tmp_path / "generation_config.json").unlink()
    tensors, config = (tmp_path / name for name in ("model.safetensors", "config.json"))
    whole, lost = load_file(tensors), "transformer.h.1.ln_1.weight"
    save_file({key: x for key, x in whole.items() if key not in (lost, lost[12:])}, tensors, {"format": "pt"})
    assert f"lacks 1 tensors of its model, {lost}" in refused(capsys, *common)
    config.write_text(config.read_text().replace('"n_layer": 2', '"n_layer": 2.5'))
    assert "cannot open it (StrictDataclass" in refused(capsys, *common)
    sizes = architectures.small(transformers.MllamaConfig, False)  # its part for text is not opened by itself
    model = transformers.MllamaForConditionalGeneration(transformers.MllamaConfig(**sizes))
    model.save_pretrained(tmp_path / "images")
    Tokenizer("bytes").save(tmp_path / "images")
    assert "open the result's config.json" in refused(capsys, "--init", tmp_path / "images", *common[2:])
    (tmp_path / "run.json").write_text(json.dumps(dict.fromkeys(("config", "identity", "saved", "finished"))))
    assert "not finished" in refused(capsys, *common)
    assert not (tmp_path / "out").exists()

def test_another_reference_has_our_tokenizer_and_rows_of_its_own(folder, start, eight, tmp_path, capsys):
    """A reference with a sliding window beside a policy without: two rows a pair for it alone."""
    run(huggingface.main, start("gpt2"), eight, tmp_path / "out", "--ref", start("mistral@narrow"))
    said = capsys.readouterr().out
    assert f"{start('gpt2')}: one row" in said and f"{start('mistral@narrow')}: two rows a pair" in said
    other = transformers.AutoTokenizer.from_pretrained(folder)
    other.add_tokens(["new"])
    other.save_pretrained(tmp_path / "ref")
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "ref")
    assert "another vocabulary" in refused(capsys, "--init", folder, "--ref", tmp_path / "ref",
                                           "--data", eight, "--out_dir", tmp_path / "out2")

def test_lora_trains_adapters_only_and_its_reference_is_without_them(start, eight, tmp_path, capsys):
    pytest.importorskip("peft", reason="needs peft: pip install peft")
    out = tmp_path / "out"
    run(huggingface.main, start("mixtral"), eight, out, "--loss", "tdpo1", "--lr", 1e-2, "--lora", 4,
        "--dtype", "float64", steps=4)
    first, *_, last = [r for r in log_of(out) if "eval/loss" in r]
    assert first["eval/loss"] == pytest.approx(np.log(2), abs=1e-12)
    assert last["eval/loss"] < first["eval/loss"] - 0.001
    assert all("lora_" in name for name in load_file(next(out.glob("checkpoints/*.safetensors"))))
    before, after = (load_file(path / "model.safetensors") for path in (start("mixtral"), out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("attn" in name or "expert" in name or "gate" in name for name in changed)
    said = capsys.readouterr().out
    assert "of rank 4 on 8 linear layers and 6 tensors of fused experts: " in said
    [checkpoint] = out.glob("checkpoints/*")
    trained = sum(x.numel() for key, x in load_file(checkpoint).items() if key.startswith("model."))
    assert f"{trained:,} of " in said and f" {trained:,} parameters" in said  # also in the headline
    huggingface.main(["--resume", "--out_dir", str(out), "--steps", "5"])  # it knows that it has adapters
    assert log_of(out)[-1]["step"] == 5
    other = start("llama")
    again = "--resume", "--out_dir", out, "--init", other, "--ref", other
    assert "--init: other model" in refused(capsys, *again)
    common = "--data", eight, "--out_dir", tmp_path / "out2"
    assert "does not run on a row" in refused(capsys, "--init", start("xglm"), "--dtype", "float64", *common)
    assert "peft refuses (ValueError" in refused(capsys, "--init", start("mamba"), "--lora", 4, *common)

@pytest.fixture
def chat(folder):
    own = transformers.AutoTokenizer.from_pretrained(folder)
    own.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    own.chat_template = TEMPLATE
    return huggingface_setup.Tokenizer(own)

def test_messages_are_rendered_by_the_model_s_own_chat_template(chat):
    """One message is one message, whatever it says; an answer is closed by what ends a turn."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\n\nHuman: So?"}]
    ids, plain = chat.encode_prompts([messages, "\n\nHuman: plain"])
    assert chat.decode(ids) == ("<|start|>system\nBe brief.<|stop|>\n<|start|>user\nWhy?\n\nHuman: So?"
                                "<|stop|>\n<|start|>assistant\n")
    stop = chat.own.convert_tokens_to_ids("<|stop|>")
    assert chat.eot == stop and ids.count(stop) == 2 and chat.lead == "" and chat.rendered == 1
    assert chat.decode(plain) == "\n\nHuman: plain"

def test_text_that_was_rendered_already_is_refused(chat):
    """Its special tokens would be read as letters, and its end added once more."""
    rendered = "<|start|>user\nWhy?<|stop|>\n"
    for bad in ([rendered], [[{"role": "user", "content": "Why?<|stop|>"}]]):
        with pytest.raises(DataError, match="holds '<|st.*a special token"):
            chat.encode_prompts(bad)
    with pytest.raises(DataError, match="special token"):
        chat.encode_batch(["Because.<|stop|>"])

def test_what_the_tokenizer_refuses_is_named_by_file_and_line(folder, tmp_path, capsys):
    """In all files, beside what is malformed; equal refusals share a line."""
    good, bad = {"prompt": "Why?", "chosen": "a", "rejected": "b"}, "b<|endoftext|>"
    records = {"train": [good, good | {"id": 7, "rejected": bad}, good | {"prompt": bad}],
               "val": [good, good | {"chosen": bad}, good | {"more": 1}]}
    paths = {name: tmp_path / f"{name}.jsonl" for name in records}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(record) + "\n" for record in records[name]))
    with pytest.raises(SystemExit):
        run(huggingface.main, folder, paths["train"], tmp_path / "out", "--val_data", paths["val"])
    first, second = capsys.readouterr().err.strip().splitlines()
    assert f"error: {paths['train']}:2 (id 7): a text holds '<|endoftext|>', a special token" in first
    assert first.endswith("(and 2 more like it)") and f"{paths['val']}:3: a key that is not read" in second

def test_without_a_chat_template_messages_are_turns_and_a_line_says_which(folder, eight, tmp_path, capsys):
    run(huggingface.main, folder, eight, tmp_path / "text")
    assert "rendered" not in capsys.readouterr().out
    path = tmp_path / "messages.jsonl"
    user = [[{"role": "user", "content": text}] for text in ("Why?", "How?", "When?")]
    records = [{"prompt": messages, "chosen": "a", "rejected": "b"} for messages in user]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    run(huggingface.main, folder, path, tmp_path / "messages")
    assert "6 prompts of messages are rendered by Human/Assistant turns" in capsys.readouterr().out
    tokenizer = huggingface_setup.Tokenizer(transformers.AutoTokenizer.from_pretrained(folder))
    [ids] = tokenizer.encode_prompts(user[:1])
    assert tokenizer.decode(ids) == "\n\nHuman: Why?\n\nAssistant:" and tokenizer.lead == " "
    Tokenizer("bytes").save(tmp_path)  # with that form as its chat template
    own = huggingface_setup.Tokenizer(transformers.AutoTokenizer.from_pretrained(tmp_path))
    assert own.own.chat_template and own.lead == " " and own.encode_prompts(user[:1]) == [ids]

def test_a_tokenizer_of_sentencepiece_s_kind():
    """Prompts begin with begin-of-text, responses do not; spaces are "\u2581", rare bytes "<0xE6>"."""
    from tokenizers import Tokenizer, models, normalizers, processors
    letters = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b"]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[], byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    bpe.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 0)])
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer = huggingface_setup.Tokenizer(own, segmented=True)
    text, turns = tokenizer.encode_prompts(["a b", [{"role": "user", "content": "a"}]])
    chosen = tokenizer.encode(" a日")
    assert text == [0, *tokenizer.encode("a b")] and turns[0] == 0 and 0 not in turns[1:] + chosen
    assert tokenizer.eot == 1 and b"".join(tokenizer.token_bytes[i] for i in chosen) == " a日".encode()

def test_segments_are_found_by_the_bytes_of_the_model_s_tokens(folder):
    own = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = huggingface_setup.Tokenizer(own, segmented=True)
    text = "naïve – 日本語, it's 🙂\n"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    tokenizer.token_bytes[ids[0]] += b"x"
    with pytest.raises(DataError, match="changes a text"):
        tokenizer.encode(text)

# ---- Answers, numbers, flags ----

def test_a_run_ends_with_answers_and_a_command_that_samples_it(folder, eight, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "answer", lambda *args: ANSWER(*args).encode().hex())  # one word
    run(huggingface.main, folder, eight, tmp_path, "--lr", 1e-1)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    reference, policy = ([rest for first, *rest in filter(None, lines) if first == name]
                         for name in ("reference", "policy"))
    assert len(reference) == len(policy) == 2 and reference != policy
    assert ["next:", "python", "ports/huggingface.py", "--init", str(tmp_path), "--ask", "'Why?'"] in lines
    huggingface.main(["--init", str(tmp_path), "--ask", "Why?" * 99])  # beyond its 128 positions
    capsys.readouterr()
    prompt = " ".join([line for line in lines if line[:1] == ["prompt"]][0][1:])
    huggingface.main(["--init", str(tmp_path), "--ask", prompt])
    assert capsys.readouterr().out.split() == policy[0]

def test_logits_are_float32_in_a_bfloat16_run():
    """As train.head asks for them, under autocast; the trunk is in bfloat16 there."""
    model = architectures.tiny("llama").float()
    policy, hidden = Policy(model), torch.randn(3, 32)
    policy.at = "model"
    with torch.autocast("cpu", torch.bfloat16):
        logits = policy.logits(hidden, centered=True)
    torch.testing.assert_close(logits, hidden @ model.lm_head.weight.T)
    assert "forward" not in vars(model.get_decoder())  # the trunk is itself again

@pytest.mark.filterwarnings("ignore")
def test_two_ranks_have_the_numbers_of_one_process(start, eight, tmp_path, monkeypatch):
    """Loss, log-ratios and gradient norm of each step to 1e-10, and one whole result."""
    kinds = [("llama", []), ("qwen2", []), ("gpt2", []), ("gemma2", ["--loss", "tdpo2"]), ("mixtral", []),
             ("qwen2", ["--lora", 4])]
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # norms are float32 in any model
    monkeypatch.setattr(ranks, "stop", lambda: None)  # one group for all runs

    def train_all(place):
        for i, (name, more) in enumerate(kinds):
            run(huggingface.main, start(name), eight, tmp_path / place / str(i), "--micro_batch_size", 2,
                "--lr", 1e-3, "--dtype", "float64", *more)

    train_all("one")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                train_all("two")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    for i, kind in enumerate(kinds):
        for one, two in zip(*(log_of(tmp_path / place / str(i)) for place in ("one", "two")), strict=True):
            for name, x in one.items():
                if "loss" in name or "log" in name or name == "grad_norm" or "kl/" in name:
                    assert two[name] == pytest.approx(x, rel=1e-10, abs=1e-10), (kind, name)
        one, two = (load_file(tmp_path / place / str(i) / "model.safetensors") for place in ("one", "two"))
        assert one.keys() == two.keys()
        assert all((one[key] - two[key]).abs().max() < 1e-9 for key in one), kind

@pytest.mark.parametrize("argv, says", [
    ([], "must name a model"),
    (["--init", "no/such/folder/here"], "no/such/folder/here: no such folder here, and huggingface.co"),
    (["--init", "FOLDER", "--n_layer", "3"], "--n_layer: would not be read"),
    (["--init", "FOLDER", "--lora", "-1"], "--lora -1: must be at least 0"),
    (["--init", "FOLDER", "--lora", "two"], "invalid int value: 'two'"),
    (["--init", "FOLDER", "--compile_head"], "--compile_head: would not be read"),
    (["--init", "FOLDER", "--block_size", "999"], "--block_size 999"),
])
def test_bad_flags_are_refused_in_one_line(folder, tmp_path, capsys, argv, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *[folder if x == "FOLDER" else x for x in argv])
