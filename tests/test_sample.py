"""sample.py: what it prints, and that the heat is the implicit reward. Bad input is test_bad_input.py's."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch

import data
import sample
import train
from model import GPT, GPTConfig
from plumbing.folder import weights_hash

pytestmark = pytest.mark.slow

@pytest.fixture
def run(tmp_path):
    """The folder of a preference run, made by hand: random models, the bytes tokenizer, a run.json."""
    for name, seed, block_size in (("ref", 1, 48), ("policy", 2, 48), ("short", 1, 20)):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(257, block_size, 2, 2, 16))
        with torch.no_grad():
            model.wte.weight.mul_(8)  # far from uniform, so that the two differ visibly
        model.save_pretrained(tmp_path / name)
        data.Tokenizer("bytes").save(tmp_path / name)
    config = {"loss": "dpo", "steps": 1, "beta": 0.5, "ref": str(tmp_path / "ref")}
    text = json.dumps({"config": config, "identity": {}, "saved": 1, "finished": 1})
    (tmp_path / "policy" / "run.json").write_text(text)
    return tmp_path / "policy"

def log_ratio(run, prompt, response):
    """log pi/pi_ref of each response token by two plain forward passes, one token at a time."""
    ids = [*prompt, *response]
    values = []
    for folder in (run, run.parent / "ref"):
        model = GPT.from_pretrained(str(folder)).double()
        logits = model.logits(model(torch.tensor([ids])))[0]  # (T, V)
        p = torch.softmax(logits, -1)
        values.append(torch.stack([p[len(prompt) + t - 1, y] for t, y in enumerate(response)]).log())
    return (values[0] - values[1]).detach()

def test_token_rewards_are_beta_times_the_log_ratio_of_each_token(run):
    """They sum to the implicit reward beta log pi(y|x)/pi_ref(y|x), end-of-text included."""
    prompt, response = np.array([72, 105, 58]), np.array([32, 111, 107, 256])
    policy, reference = (GPT.from_pretrained(str(folder)) for folder in (run, run.parent / "ref"))
    rewards = sample.token_rewards(policy, reference, prompt, response, 0.5)
    expected = 0.5 * log_ratio(run, prompt.tolist(), response.tolist())
    assert np.allclose(rewards, expected.numpy(), atol=1e-4) and expected.abs().max() > 0.1

def test_heat_prints_each_token_with_its_number_and_the_sum(run, capsys):
    """--response scores a given text: one number a token, and their sum in the line above."""
    sample.main([str(run), "--prompt", "Hi:", "--heat", "--response", " ok", "--no-color"])
    out = capsys.readouterr().out
    numbers = [float(x) for x in re.findall(r"\[([+-]\d+\.\d+)\]", out)]
    assert len(numbers) == 4 and "<|endoftext|>[" in out  # three bytes and end-of-text
    assert float(re.search(r"sum ([+-]\d+\.\d+)", out)[1]) == pytest.approx(sum(numbers), abs=3e-3)
    assert numbers[0] == pytest.approx(0.5 * log_ratio(run, b"Hi:", [*b" ok", 256])[0].item(), abs=1e-3)

def test_colours_are_green_above_and_red_below_the_reference():
    """A token that training made likelier gets a green background, one that it made less likely a red one."""
    tokenizer = data.Tokenizer("bytes")
    text = sample.heat(tokenizer, [97, 98, 99], [1.0, -1.0, 0.0], color=True)
    assert text == "\033[48;5;46;97ma\033[0m\033[48;5;196;97mb\033[0mc"

def test_policy_and_reference_answer_one_after_the_other_and_a_seed_repeats_them(run, capsys):
    """The same seed gives the same answers, another seed others."""
    outs = []
    for seed in ("0", "0", "1"):
        sample.main([str(run), "--prompt", "Hi:", "--seed", seed, "--max_new_tokens", "8", "--temperature=1"])
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    assert re.search(r"^reference: .*^policy: ", outs[0], re.M | re.S)

def refused(capsys, *argv):
    """The one line on standard error of flags that are refused."""
    with pytest.raises(SystemExit) as e:
        sample.main([str(x) for x in argv])
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1, err
    return err

def test_another_model_in_the_place_of_the_reference_is_refused(run, capsys):
    words = [str(run), "--prompt", "Hi:", "--max_new_tokens", "4"]
    record = json.loads((run / "run.json").read_text())
    reference = GPT.from_pretrained(str(run.parent / "ref"))
    for dtype, model in (("float32", reference), ("float64", copy.deepcopy(reference).double())):
        record["config"]["dtype"], record["identity"]["ref"] = dtype, weights_hash(model)
        (run / "run.json").write_text(json.dumps(record))
        sample.main(words)
    shutil.copy(run / "model.safetensors", run.parent / "ref")
    assert "is no longer the reference of this run; name the right one with --ref" in refused(capsys, *words)

def test_prompts_are_one_batch_and_chat_makes_a_users_message(run, tmp_path, capsys, monkeypatch):
    """Answers are as of each alone, at temperature 0."""
    calls, generate = [], GPT.generate
    monkeypatch.setattr(GPT, "generate", lambda model, x, *rest, **more:
                        calls.append(len(x)) or generate(model, x, *rest, **more))
    chat = [{"role": "system", "content": "Be"}, {"role": "user", "content": "hi"}]
    prompts = [json.dumps({"prompt": prompt}) for prompt in ("a longer one", chat)]
    (tmp_path / "p.jsonl").write_text("\n".join(prompts))
    flags = [str(run), "--max_new_tokens", "5", "--temperature", "0"]
    sample.main([*flags, "--prompt", "Hi", "--prompts", str(tmp_path / "p.jsonl")])
    together = capsys.readouterr().out
    assert calls == [3, 3] and "prompt: System: Be\n\nHuman: hi\n\nAssistant:" in together
    for prompt in ("Hi", "a longer one"):
        sample.main([*flags, "--prompt", prompt])
        assert capsys.readouterr().out in together
    sample.main([*flags, "--prompt", "Hi", "--chat", "--heat", "--response", "ok", "--no-color"])
    out = capsys.readouterr().out
    assert "prompt: Human: Hi\n\nAssistant:" in out and "\n [" in out  # the lead of a response to messages
    (tmp_path / "p.jsonl").write_text("{}")
    assert "p.jsonl:1: " in refused(capsys, run, "--prompts", tmp_path / "p.jsonl")

def test_a_model_without_a_run_is_sampled_alone_or_beside_a_reference(run, capsys):
    """A folder, with --ref two answers; --heat says what it needs; a reference that was moved is said."""
    model, flags = str(run.parent / "ref"), ["--prompt", "Hi:", "--max_new_tokens", "4"]
    sample.main([model, *flags])
    assert "answer: " in capsys.readouterr().out
    assert "--heat: needs a reference" in refused(capsys, model, *flags, "--heat")
    sample.main([model, *flags, "--ref", str(run.parent / "short"), "--heat"])
    out = capsys.readouterr().out
    assert "reference: " in out and "beta 1;" in out
    shutil.move(model, run.parent / "moved")
    sample.main([str(run), *flags])
    out = capsys.readouterr().out
    assert "is not there any more" in out and "reference: " not in out
    sample.main([str(run), *flags, "--ref", str(run.parent / "moved")])
    assert "reference: " in capsys.readouterr().out

def test_what_cannot_be_sampled_is_one_line(run, capsys):
    flags, other = ["--prompt", "x"], run.parent / "ref"
    assert "no such file" in refused(capsys, run.parent / "none", *flags).lower()
    assert "say what to answer" in refused(capsys, run)
    assert "goes with --heat" in refused(capsys, run, *flags, "--response", "a")
    assert "temperature -1.0" in refused(capsys, run, *flags, "--temperature=-1", "--max_new_tokens=9")
    assert "the answer may take all 48 positions" in refused(capsys, run, *flags, "--max_new_tokens", "48")
    (other / "tokenizer.json").rename(other / "away")
    assert "holds no tokenizer" in refused(capsys, other, *flags)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "transformers.pipeline('text-generation'" in refused(capsys, other, *flags)

def test_a_reference_of_fewer_positions_shortens_the_prompt_for_both(run, capsys):
    """Of 21 tokens, 16 go with 4 new ones into block_size 20: the prompt loses its first 5, which is said."""
    flags = [str(run), "--prompt", "abcdefghijklmnopqrstu", "--ref", str(run.parent / "short"), "--heat"]
    sample.main([*flags, "--max_new_tokens", "4"])
    assert "loses its first 5 tokens: block_size 20" in capsys.readouterr().out

def test_a_run_that_is_not_finished_is_refused(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(record | {"finished": None}))
    assert "this run is not finished; go on with it, or end it" in refused(capsys, other, "--prompt", "0?")

@pytest.fixture
def padded(tmp_path):
    """The folder of a model of 260 rows; its tokenizer has 257 ids of text and "[PAD]", id 257. Left alone it
    says row 257 only."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(260, 32, 1, 2, 16))
    with torch.no_grad():
        model.ln_f.bias.fill_(1)
        model.wte.weight[257] = 2
    model.save_pretrained(tmp_path / "padded", eos=256)
    data.Tokenizer("bytes").save(tmp_path / "padded")
    config = json.loads((tmp_path / "padded" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"257": {"content": "[PAD]", "special": True}}
    (tmp_path / "padded" / "tokenizer_config.json").write_text(json.dumps(config))
    lines = [{"prompt": f"[PAD]{i}", "chosen": "[PAD] yes", "rejected": "no"} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "padded"

def test_rows_beyond_the_tokenizer_train_resume_and_are_kept_but_never_sampled(padded, tmp_path, capsys):
    out, flags = tmp_path / "out", f"--data {tmp_path / 'd.jsonl'} --batch_size 4 --device cpu"
    train.main(f"{flags} --init {padded} --out_dir {out} --steps 1".split())
    train.main(f"--resume --out_dir {out} --steps 2".split())
    kept = [name for name in ("chat_template.jinja", *(p.name for p in padded.glob("*token*")))]
    assert all((out / name).read_bytes() == (padded / name).read_bytes() for name in kept)
    policy, tokenizer = GPT.from_pretrained(out), data.Tokenizer(out)
    assert policy.config == GPT.from_pretrained(padded).config
    assert (policy.generate(torch.tensor([[72]]), 4)[0, 1:] == 257).all()
    assert policy.generate(torch.tensor([[72]]), 20, n_ids=tokenizer.vocab_size).max() <= 256
    assert "\ufffd" * 4 not in capsys.readouterr().out  # of the answers at the ends of both runs
    sample.main([str(out), "--prompt", "Hi", "--max_new_tokens", "8", "--heat"])
    assert "\ufffd" * 8 not in capsys.readouterr().out

def test_a_model_with_fewer_rows_than_its_tokenizer_or_others_than_the_policys_is_refused(padded, capsys):
    flags = f"--data {padded.parent / 'd.jsonl'} --out_dir {padded.parent / 'out'} --device cpu"
    for rows, argv, says in ((256, "--init", "has 256 token ids, the tokenizer 257"),
                             (400, f"--init {padded} --ref", "has 400 rows, the policy")):
        GPT(GPTConfig(rows, 32, 1, 2, 16)).save_pretrained(padded.parent / "other")
        data.Tokenizer("bytes").save(padded.parent / "other")
        with pytest.raises(SystemExit):
            train.main(f"{flags} {argv} {padded.parent / 'other'}".split())
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err
