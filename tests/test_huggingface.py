"""ports/huggingface.py gives every loss and gradient that plain rows give, whatever the architecture.

"Plain" is written out in this file: one forward of the model's own for each response, a sum, the equation.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")

import train  # noqa: E402
from data import DataError, Pair, Tokenizer, collate, pack  # noqa: E402
from losses import LOSSES, knobs_of, terms_of, token_kl  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from plumbing import machine  # noqa: E402
from plumbing.errors import ConfigError  # noqa: E402
from plumbing.flags import DEFAULTS  # noqa: E402
from plumbing.reference import Reference, no_reference  # noqa: E402
from ports import huggingface, huggingface_setup  # noqa: E402
from ports.huggingface import Policy  # noqa: E402
from ports.huggingface_setup import choose_rows  # noqa: E402

V = 40
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
         "pad_token_id": None}
GQA = SIZES | {"num_key_value_heads": 2}
STATE = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
# name -> (config, one row a pair)
ARCHITECTURES = {
    "llama": (lambda: transformers.LlamaConfig(**GQA, tie_word_embeddings=False), True),
    "llama tied": (lambda: transformers.LlamaConfig(**GQA, tie_word_embeddings=True), True),
    "qwen2": (lambda: transformers.Qwen2Config(**GQA, tie_word_embeddings=True), True),
    "qwen2 untied": (lambda: transformers.Qwen2Config(**GQA, tie_word_embeddings=False), True),
    "qwen3": (lambda: transformers.Qwen3Config(**GQA, head_dim=8, tie_word_embeddings=True), True),
    "gpt-neox": (lambda: transformers.GPTNeoXConfig(**SIZES, tie_word_embeddings=False), True),
    "gpt2": (lambda: transformers.GPT2Config(vocab_size=V, n_positions=64, n_embd=16, n_layer=2, n_head=4,
                                             bos_token_id=0, eos_token_id=0), True),
    "gemma2": (lambda: transformers.Gemma2Config(**GQA, head_dim=4, final_logit_softcapping=0.5,
                                                 attn_logit_softcapping=1.0, query_pre_attn_scalar=4,
                                                 attn_implementation="eager"), True),
    "gemma2 window 5": (lambda: transformers.Gemma2Config(**GQA, head_dim=4, sliding_window=5), False),
    "cohere": (lambda: transformers.CohereConfig(**GQA, logit_scale=0.3), True),
    "mistral": (lambda: transformers.MistralConfig(**GQA, sliding_window=None), True),
    "mistral window 5": (lambda: transformers.MistralConfig(**GQA, sliding_window=5), False),
    "bloom": (lambda: transformers.BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=4), False),
    "mamba": (lambda: transformers.MambaConfig(**STATE, expand=2, conv_kernel=4), False),
}


def tiny(name, seed=0):
    """A random model, in float64. Weights are large enough for every parameter to matter."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name][0]()).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def config(loss="dpo", **changes):
    """A Config with a value for each knob of the loss."""
    knobs = {name: DEFAULTS[name] for name in knobs_of(LOSSES[loss])}
    return train.Config(**{"loss": loss, "dtype": "float64", "device": "cpu", "compile": False,
                           "compile_head": False, "head_tokens": 12, "micro_batch_tokens": 2048, "lr": 1e-3}
                        | knobs | changes)


def random_pairs(n, seed=0, scored=True):
    """The first chosen response is end-of-text alone: position P - 1 is then followed by P and by P again."""
    rng, pairs = np.random.default_rng(seed), []
    for i in range(n):
        P, C, R = rng.integers([1, 2, 2], [9, 9, 9])
        C = C if i else 1
        sides = []
        for length in (C, R):
            S = int(rng.integers(1, min(length, 4) + 1))
            segment = np.sort(np.concatenate([np.arange(S), rng.integers(0, S, length - S)]))
            sides.append((segment, rng.integers(0, 5, (S, 2 * scored)).astype(np.float32) / 4))
        ids = [rng.integers(1, V, length).astype(np.int32) for length in (P, C, R)]
        pairs.append(Pair(*ids, *(segment for segment, _ in sides), *(scores for _, scores in sides), "here"))
    return pack(pairs)


def plain_response(model, reference, prompt, response):
    """(log pi, log pi_ref, KL), each (N,), from one row of the models' own logits."""
    row = torch.from_numpy(np.concatenate([prompt, response])).long()
    z, z_ref = (m(input_ids=row[None]).logits[0, len(prompt) - 1:-1] for m in (model, reference))
    y = row[len(prompt):, None]
    return F.log_softmax(z, -1).gather(-1, y)[:, 0], F.log_softmax(z_ref, -1).gather(-1, y)[:, 0].detach(), \
        token_kl(z_ref.detach(), z)


def plain_loss(model, reference, pair, cfg):
    """The loss of one pair, written out."""
    loss, terms = LOSSES[cfg.loss], {}
    segmented = "chosen_rewards" in terms_of(loss)
    for side in ("chosen", "rejected"):
        response, segment, scores = (getattr(pair, side + end) for end in ("", "_segment", "_scores"))
        if not len(response):
            continue
        found = plain_response(model, reference, pair.prompt, response)
        if segmented:
            found = [torch.stack([x[torch.from_numpy(segment == k)].sum() for k in range(len(scores))])
                     for x in found]
            terms[f"{side}_rewards"] = torch.from_numpy(scores).double().mean(-1)[None]
            terms[f"{side}_mask"] = torch.ones(1, len(scores), dtype=torch.bool)
        names = f"{side}_logps", f"ref_{side}_logps", f"{side}_seq_kl"
        terms |= {name: (x if segmented else x.sum())[None] for name, x in zip(names, found, strict=True)}
    return train.call(loss, terms, cfg).sum()


def grads(model):
    """{name: gradient}; 0 where a parameter has none, as a bias of keys may."""
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()}


def difference(found, expected):
    """The largest, relative to the largest expected number."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


def as_read(pairs, loss):
    return train.as_read(pairs, SimpleNamespace(loss=loss, dtype="float64", rejected_weight="score"),
                         np.ones(2, np.float32))


def live(model, cfg):
    """The reference, live, as train.py makes it."""
    return Reference(model, lambda batch: train.hidden_states(model, batch, cfg),
                     lambda batch: train.response_logps(model, batch, cfg))


@pytest.fixture
def float64_throughout(monkeypatch):
    """transformers computes norms and rotations in float32 whatever the weights are."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_losses_and_all_gradients_are_those_of_plain_rows(name, float64_throughout):
    """Loss by loss and parameter by parameter, to 1e-9; the check finds out which rows can be used.
    With -s this prints the table of ports/README.md."""
    model, other, pairs = tiny(name), tiny(name, seed=1).requires_grad_(False), random_pairs(4)
    policy, reference = Policy(model), Policy(other)
    said = choose_rows(policy, [pairs[i] for i in range(len(pairs))], config())
    assert policy.shared == ARCHITECTURES[name][1], said
    reference.shared, of_losses, of_gradients = policy.shared, [], []
    for loss in LOSSES:
        cfg, data = config(loss), as_read(pairs, loss)
        model.zero_grad()
        expected = [plain_loss(model, other, data[i], cfg) for i in range(len(data))]
        sum(expected).backward()
        by_plain_rows = grads(model)
        model.zero_grad()
        ref = live(reference, cfg) if "ref_chosen_logps" in terms_of(LOSSES[loss]) else no_reference
        rows = train.step(policy, ref, collate([data[i] for i in range(len(data))]), LOSSES[loss], 1.0, cfg)
        of_losses.append(difference(rows["loss"], torch.stack(expected).detach()))
        assert of_losses[-1] < 1e-9, loss
        for parameter, found in grads(model).items():
            of_gradients.append(difference(found, by_plain_rows[parameter]))
            assert of_gradients[-1] < 1e-9, f"{loss}, {parameter}"
    head = "tied" if model.get_output_embeddings().weight is model.get_input_embeddings().weight else "untied"
    print(f"\n| {name} | {head} | {'one' if policy.shared else 'two'} | {max(of_losses):.0e} | "
          f"{max(of_gradients):.0e} |")


def test_a_policy_that_is_its_reference_starts_at_log_2():
    model, pairs = tiny("qwen3"), random_pairs(3)
    for loss in ("dpo", "dpop", "tdpo1", "tdpo2", "2d-dpo-vanilla"):
        cfg, data = config(loss), as_read(pairs, loss)
        rows = train.step(Policy(model), live(Policy(model), cfg), collate([data[i] for i in range(3)]),
                          LOSSES[loss], None, cfg)
        torch.testing.assert_close(rows["loss"], torch.full((3,), np.log(2)).double())


def test_what_the_check_finds_wrong_is_refused():
    """A trunk whose output is not what the head takes gives other numbers than the model, with any rows."""
    policy, pairs = Policy(tiny("llama")), random_pairs(2)
    policy.trunk = lambda tokens, **given: torch.zeros(*tokens.shape, SIZES["hidden_size"]).double()
    with pytest.raises(ConfigError, match="differ from the model's own"):
        choose_rows(policy, [pairs[0], pairs[1]], config())


# ---------------------------------------------------------------------------------------------------------
# From the command line


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
    return folder


def log_of(path):
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def eight(tmp_path):
    path = tmp_path / "eight.jsonl"
    path.write_text("".join(
        json.dumps({"prompt": f"Question {i}?", "chosen": [{"text": f"Yes {i}.", "scores": [4, 3]}],
                    "rejected": [{"text": f"No {i},", "scores": [1, 0]}, {"text": " no.", "scores": [2, 1]}]})
        + "\n" for i in range(8)))
    return path


def run(main, *argv):
    main([str(x) for x in argv])


@pytest.mark.parametrize("loss", ["dpo", "tdpo2"])
def test_gpt2_gives_the_numbers_of_train_py(folder, tmp_path, loss):
    """The same model by model.py and by transformers: the same log, loss by loss."""
    logs = []
    for main, out in ((train.main, tmp_path / "ours"), (huggingface.main, tmp_path / "port")):
        run(main, "--init", folder, "--loss", loss, "--data", eight(tmp_path), "--val_data", eight(tmp_path),
            "--out_dir", out, "--steps", 4, "--batch_size", 6, "--lr", 1e-3, "--log_every", 1,
            "--eval_every", 0, "--dtype", "float64")
        logs.append(log_of(out))
    for ours, port in zip(*logs, strict=True):
        for name, x in ours.items():
            if "loss" in name or "log" in name or name == "grad_norm" or "kl/" in name:
                assert port[name] == pytest.approx(x, rel=1e-8, abs=1e-9), name


@pytest.mark.slow
@pytest.mark.skipif(machine.cannot_compile() is not None, reason="torch.compile needs g++ and Python.h")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of the compiler
def test_a_compiled_run_has_the_numbers_of_an_eager_one(folder, tmp_path):
    logs = []
    for out, switch in (("eager", "--no-compile"), ("compiled", "--compile")):
        run(huggingface.main, "--init", folder, "--loss", "dpo", "--data", eight(tmp_path), "--val_data",
            eight(tmp_path), "--out_dir", tmp_path / out, "--steps", 2, "--batch_size", 6, "--lr", 1e-3,
            "--log_every", 1, "--eval_every", 0, "--dtype", "float64", switch)
        logs.append([r["loss"] for r in log_of(tmp_path / out) if "loss" in r])
    assert len(logs[0]) == 2 and logs[0] == pytest.approx(logs[1], rel=1e-8)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "sft"])
def test_eight_pairs_are_learned_by_each_loss(folder, tmp_path, loss):
    run(huggingface.main, "--init", folder, "--loss", loss, "--data", eight(tmp_path), "--val_data",
        eight(tmp_path), "--out_dir", tmp_path / "out", "--steps", 60, "--batch_size", 8, "--lr", 1e-2,
        "--block_size", 64)
    first, *_, last = [r for r in log_of(tmp_path / "out") if "eval/rewards/accuracies" in r]
    assert last["eval/rewards/accuracies"] == 1 and last["eval/loss"] < first["eval/loss"] / 2


def test_the_result_is_a_folder_of_transformers_and_a_run_goes_on(folder, tmp_path):
    """Interrupted after 2 of 4 steps and resumed it is the run of 4 steps, and the folder opens."""
    common = ["--init", folder, "--data", eight(tmp_path), "--val_data", eight(tmp_path), "--batch_size", 4,
              "--block_size", 64, "--log_every", 1]
    run(huggingface.main, *common, "--out_dir", tmp_path / "whole", "--steps", 4)
    run(huggingface.main, *common, "--out_dir", tmp_path / "parts", "--steps", 2)
    run(huggingface.main, *common, "--out_dir", tmp_path / "parts", "--steps", 4, "--resume")
    whole, parts = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
                    for name in ("whole", "parts"))
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(p, q), name
    text = "Is it resumed? It is."
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "whole").encode(text) == \
        Tokenizer("bytes").encode(text)


def test_the_result_has_the_dtype_of_the_start(folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "start")
    model.save_pretrained(tmp_path / "start")
    run(huggingface.main, "--init", tmp_path / "start", "--data", eight(tmp_path), "--val_data",
        eight(tmp_path), "--out_dir", tmp_path / "out", "--steps", 1, "--batch_size", 2)
    assert {x.dtype for x in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    [checkpoint] = (tmp_path / "out").glob("checkpoints/*.safetensors")
    assert {x.dtype for x in load_file(checkpoint).values()} == {torch.float32}


def test_a_sliding_window_is_trained_from_the_command_line(folder, tmp_path, capsys):
    """With two rows a pair for the policy and for its reference, from the same start: log 2."""
    torch.manual_seed(0)
    sizes = GQA | {"vocab_size": 257, "eos_token_id": 256, "bos_token_id": 256, "initializer_range": 0.5}
    config = transformers.MistralConfig(**sizes, sliding_window=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "start")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "start")
    run(huggingface.main, "--init", tmp_path / "start", "--data", eight(tmp_path), "--val_data",
        eight(tmp_path), "--out_dir", tmp_path / "out", "--steps", 1, "--batch_size", 2, "--loss", "dpop")
    assert "two rows a pair" in capsys.readouterr().out
    assert log_of(tmp_path / "out")[1]["eval/loss"] == pytest.approx(np.log(2), abs=1e-4)


def test_lora_trains_adapters_only_and_its_reference_is_without_them(folder, tmp_path, recwarn):
    pytest.importorskip("peft", reason="needs peft: pip install peft")
    for loss in ("dpo", "tdpo1"):
        run(huggingface.main, "--init", folder, "--loss", loss, "--data", eight(tmp_path), "--val_data",
            eight(tmp_path), "--out_dir", tmp_path / loss, "--steps", 30, "--batch_size", 8, "--lr", 1e-2,
            "--lora", 4, "--block_size", 64, "--dtype", "float64")
        first, *_, last = [r for r in log_of(tmp_path / loss) if "eval/loss" in r]
        assert first["eval/loss"] == pytest.approx(np.log(2), abs=1e-12)
        assert last["eval/loss"] < 0.6 and last["eval/logratio/chosen"] != 0
        [weights] = (tmp_path / loss / "checkpoints").glob("*.safetensors")
        assert all("lora_" in name for name in load_file(weights))
        start, end = (transformers.AutoModelForCausalLM.from_pretrained(path).state_dict()
                      for path in (folder, tmp_path / loss))
        changed = {name for name in start if not torch.equal(start[name], end[name])}
        assert changed and all(".c_" in name and name.endswith("weight") for name in changed)
    run(huggingface.main, "--out_dir", tmp_path / "dpo", "--resume", "--lora", 4, "--steps", 31)
    assert log_of(tmp_path / "dpo")[-1]["eval/loss"] < 0.6


def test_turns_become_the_model_s_own_chat_template(folder):
    """Prompt by the template, the answer without the space of "Assistant: ", closed by what ends a turn."""
    own = transformers.AutoTokenizer.from_pretrained(folder)
    own.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    own.chat_template = TEMPLATE
    tokenizer = huggingface_setup.Tokenizer(own)
    prompt = "\n\nSystem: Be brief.\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Really?\n\nAssistant:"
    ids = tokenizer.encode_batch([prompt, " Yes <|stop|>", " No", "plain text", "a", " b"])
    assert own.decode(ids[0]) == ("<|start|>system\nBe brief.<|stop|>\n<|start|>user\nWhy?<|stop|>\n"
                                  "<|start|>assistant\nSo.<|stop|>\n<|start|>user\nReally?<|stop|>\n<|start|>assistant\n")
    assert [own.decode(x) for x in ids[1:]] == ["Yes <|stop|>", "No", "plain text", "a", " b"]
    stop = own.convert_tokens_to_ids("<|stop|>")
    assert tokenizer.eot == stop and stop in ids[0] and stop not in ids[1]  # text is never a special token


def test_a_folder_without_a_tokenizer_is_refused(folder, tmp_path, capsys):
    """transformers makes an empty tokenizer of GPT-2's kind from nothing: no response would have a token."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(SystemExit):
        run(huggingface.main, "--init", tmp_path, "--out_dir", tmp_path / "out")
    assert "tokenizer" in capsys.readouterr().err


def test_help_shows_the_flags_of_the_port_and_of_train_py(capsys):
    with pytest.raises(SystemExit) as status:
        run(huggingface.main, "--help")
    said = capsys.readouterr().out
    assert status.value.code == 0 and "--lora RANK" in said and "--beta" in said


def test_a_saved_model_stops_where_its_answers_were_closed(tmp_path):
    """At the end of a turn of the chat template too, which need not be the model's own end-of-text."""
    Policy(tiny("llama")).save_pretrained(tmp_path, eos=7)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [0, 7]


def test_logits_are_float32_in_a_bfloat16_run():
    """As train.head asks for them, under autocast; the trunk is in bfloat16 there."""
    model = tiny("llama").float()
    policy, hidden = Policy(model), torch.randn(3, SIZES["hidden_size"])
    with torch.autocast("cpu", torch.bfloat16):
        logits = policy.logits(hidden, centered=True)
    torch.testing.assert_close(logits, hidden @ model.lm_head.weight.T)
    assert "forward" not in vars(model.get_decoder())  # the trunk is itself again


def test_a_tokenizer_of_sentencepiece_s_kind(tmp_path):
    """Prompts begin with begin-of-text, responses do not; spaces are "\u2581", rare bytes "<0xE6>"."""
    from tokenizers import Tokenizer, models, normalizers, processors
    letters = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "b"]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[], byte_fallback=True))
    bpe.normalizer = normalizers.Replace(" ", "\u2581")
    bpe.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 0)])
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer = huggingface_setup.Tokenizer(own, segmented=True)
    prompt, chosen, rejected = tokenizer.encode_batch(["a b", " a日", "b"])
    assert prompt == [0, *tokenizer.encode("a b")] and 0 not in chosen + rejected and tokenizer.eot == 1
    assert b"".join(tokenizer.token_bytes[i] for i in chosen) == " a日".encode()


def test_segments_are_found_by_the_bytes_of_the_model_s_tokens(folder):
    own = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = huggingface_setup.Tokenizer(own, segmented=True)
    text = "naïve – 日本語, it's 🙂\n"
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode()
    tokenizer.token_bytes[ids[0]] += b"x"
    with pytest.raises(DataError, match="changes this text"):
        tokenizer.encode(text)


@pytest.mark.parametrize("argv, says", [
    ([], "must name a model"),
    (["--init", "no/such/folder/here"], "no/such/folder/here"),
    (["--init", "FOLDER", "--n_layer", "3"], "--n_layer: would not be read"),
    (["--init", "FOLDER", "--lora", "-1"], "--lora be at least 0"),
    (["--init", "FOLDER", "--compile_head"], "no --compile_head"),
    (["--init", "FOLDER", "--pack"], "no --pack"),
])
def test_bad_flags_are_refused_in_one_line(folder, capsys, argv, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as status:
        run(huggingface.main, *[folder if x == "FOLDER" else x for x in argv])
    said = capsys.readouterr().err.strip()
    assert status.value.code == 2 and says in said and "\n" not in said
