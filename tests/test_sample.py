"""sample.py: what it prints, and that the heat is the implicit reward. Bad input is test_bad_input.py's."""

import copy
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import sample
import train
from model import GPT, GPTConfig
from plumbing import report
from plumbing.folder import weights_hash


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
    text = json.dumps({"config": config, "identity": {}, "finished": 1, "score_maximum": None})
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


def test_policy_and_reference_stand_side_by_side_and_a_seed_repeats_them(run, capsys):
    """Two columns; the same seed gives the same answers, another seed others."""
    outs = []
    for seed in ("0", "0", "1"):
        sample.main([str(run), "--prompt", "Hi:", "--seed", seed, "--max_new_tokens", "8", "--temperature=1"])
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    assert re.search(r"^reference +\| policy$", outs[0], re.M)
    assert sample.side_by_side([("reference", "a"), ("policy", "b")], 40) == "reference: a\npolicy: b"


BOM = "\ufeff"


@pytest.mark.parametrize("name, text, prompts", [
    ("p.txt", 'first:\n\n{"prompt": "second\u2028:"}\n', ["first:", "second\u2028:"]),  # JSON may hold U+2028
    ("p.txt", BOM + "first:\r\n[second]:\r\n", ["first:", "[second]:"]),  # Notepad's
    ("p.jsonl", BOM + '{"prompt": "first:", "chosen": "x"}\n', ["first:"]),
    ("p.json", BOM + '["first:", {"prompt": "second:"},\n "{third}:"]', ["first:", "second:", "{third}:"]),
    ("p.csv", "prompt,chosen\nfirst:,x\n", ["first:"]),
    ("-", BOM + "first:\n", ["first:"])])
def test_prompts_come_from_files_of_texts_or_data_and_from_stdin(name, text, prompts, tmp_path, monkeypatch):
    """One prompt a line, plain or JSON, or the "prompt" of each record of a data file; - is stdin."""
    (tmp_path / name).write_bytes(text.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    assert sample.read_prompts(name) == prompts


@pytest.mark.parametrize("name, text, says", [
    ("p.json", '{"prompt": "x"}', "p.json: a .json file must hold an array"),
    ("p.json", '["x", 7]', 'p.json: item 2: no text and no JSON object'),
    ("p.json", '["x", {"text": "y"}]', 'p.json: item 2: no text and no JSON object'),
    ("p.txt", 'x\n{"prompt": ["y"]}', 'p.txt:2: no text and no JSON object'),
    ("p.txt", 'x\n{"prompt"', 'p.txt:2: no text and no JSON object')])
def test_what_is_no_prompt_is_named(run, name, text, says, tmp_path, capsys, monkeypatch):
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        sample.main([str(run), "--prompts", name])
    err = capsys.readouterr().err
    assert e.value.code == 2 and f"--prompts {says}" in err and err.count("\n") == 1, err


def test_another_model_in_the_place_of_the_reference_is_refused(run, capsys):
    words = [str(run), "--prompt", "Hi:", "--max_new_tokens", "4"]
    record = json.loads((run / "run.json").read_text())
    reference = GPT.from_pretrained(str(run.parent / "ref"))
    for dtype, model in (("float32", reference), ("float64", copy.deepcopy(reference).double())):
        record["config"]["dtype"], record["identity"]["ref"] = dtype, weights_hash(model)
        (run / "run.json").write_text(json.dumps(record))
        sample.main(words)
    (run / "model.safetensors").replace(run.parent / "ref" / "model.safetensors")
    with pytest.raises(SystemExit):
        sample.main(words)
    assert "this run has not finished; train.py --resume" in capsys.readouterr().err
    shutil.copy(run.parent / "ref" / "model.safetensors", run)
    with pytest.raises(SystemExit):
        sample.main(words)
    assert "is no longer the reference of this run; name the right one with --ref" in capsys.readouterr().err


def test_every_prompt_is_answered_and_chat_renders_a_human_turn(run, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("first\nsecond\n")
    flags = [str(run), "--max_new_tokens", "2", "--prompt", "Hi", "--prompts", str(tmp_path / "p.txt")]
    sample.main([*flags, "--chat"])
    prompts = re.findall(r"prompt: (.*)\n\n(.*)", capsys.readouterr().out)
    assert prompts == [(f"Human: {text}", "Assistant:") for text in ("Hi", "first", "second")]


def test_a_reference_of_fewer_positions_shortens_the_prompt_for_both(run, capsys):
    """20 positions less 4 for the answer: the prompt of 21 tokens loses its first 5, and this is said."""
    flags = [str(run), "--prompt", "abcdefghijklmnopqrstu", "--ref", str(run.parent / "short"), "--heat"]
    sample.main([*flags, "--max_new_tokens", "4"])
    assert "loses its first 5 tokens: block_size 20" in capsys.readouterr().out


def test_an_sft_run_needs_a_reference_to_compare_with(run, capsys):
    """Without --ref there is nothing to stand beside; the message says so."""
    config = json.loads((run / "run.json").read_text())
    config["config"] |= {"loss": "sft", "ref": None, "beta": None}
    (run / "run.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        sample.main([str(run), "--prompt", "x"])
    assert "has no reference; name one with --ref" in capsys.readouterr().err
    sample.main([str(run), "--prompt", "x", "--ref", str(run.parent / "ref"), "--max_new_tokens=2", "--heat"])
    assert "beta 1;" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
# Models with more rows than their tokenizer has ids

TOKENIZER = [  # 257 ids of text and "[PAD]", id 257, as old and new versions of transformers save them
    {"added_tokens.json": {"[PAD]": 257}, "special_tokens_map.json": {"pad_token": "[PAD]"}},
    {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {
        "257": {"content": "[PAD]", "special": True}}}},
]


@pytest.fixture(params=[(258, TOKENIZER[0]), (260, TOKENIZER[1]), (320, {})], ids=["258", "260", "320"])
def padded(request, tmp_path):
    """The folder of a model of some more rows, its own tokenizer in it. Left alone it says row 257 only."""
    rows, files = request.param
    torch.manual_seed(0)
    model = GPT(GPTConfig(rows, 32, 1, 2, 16))
    with torch.no_grad():
        model.ln_f.bias.fill_(1)
        model.wte.weight[257] = 2
    model.save_pretrained(tmp_path / "padded", eos=256)
    data.Tokenizer("bytes").save(tmp_path / "padded")
    for name, content in files.items():
        (tmp_path / "padded" / name).write_text(json.dumps(content))
    lines = [{"prompt": f"[PAD]{i}", "chosen": "[PAD] yes", "rejected": "no"} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "padded"


def test_rows_beyond_the_tokenizer_train_resume_and_are_kept_but_never_sampled(padded, tmp_path, capsys):
    out, flags = tmp_path / "out", f"--data {tmp_path / 'd.jsonl'} --batch_size 4 --device cpu"
    train.main(f"{flags} --init {padded} --out_dir {out} --steps 1".split())
    train.main(f"--resume --out_dir {out} --steps 2".split())
    kept = [name for name in ("vocab.json", "merges.txt", *(p.name for p in padded.glob("*token*")))]
    assert all((out / name).read_bytes() == (padded / name).read_bytes() for name in kept)
    policy, tokenizer = GPT.from_pretrained(out), data.Tokenizer(out)
    assert policy.config == GPT.from_pretrained(padded).config
    assert (policy.generate(torch.tensor([[72]]), 4)[0, 1:] == 257).all()
    with report.sampling(policy, tokenizer):
        assert policy.generate(torch.tensor([[72]]), 20).max() <= 256
    assert policy.config.vocab_size > 257
    assert "\ufffd" * 4 not in capsys.readouterr().out  # of the answers at the ends of both runs
    sample.main([str(out), "--prompt", "Hi", "--max_new_tokens", "8", "--heat"])
    assert "\ufffd" * 8 not in capsys.readouterr().out


def test_a_probability_is_that_of_a_softmax_over_all_rows_of_the_model(padded):
    """As the model's authors computed it: the added row has nearly all of the probability here."""
    model = GPT.from_pretrained(padded)
    prompt, response, scores = np.array([72]), np.array([105, 256]), np.zeros((1, 0), dtype=np.float32)
    batch = data.collate([data.Pair(prompt, response, response[:0], 0 * response, response[:0], scores,
                                    scores[:0])])
    cfg = train.Config(device="cpu", dtype="float32", head_tokens=10, compile=False, compile_head=False)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([[72, 105]])))[0]  # (2, rows)
    expected = logits.log_softmax(-1)[[0, 1], [105, 256]]
    assert torch.allclose(train.response_logps(model, batch, cfg), expected) and expected.max() < -10


def test_a_model_with_fewer_rows_than_its_tokenizer_or_others_than_the_policys_is_refused(padded, capsys):
    flags = f"--data {padded.parent / 'd.jsonl'} --out_dir {padded.parent / 'out'} --device cpu"
    for rows, argv, says in ((256, "--init", "has 256 token ids, the tokenizer 257"),
                             (400, f"--init {padded} --ref", "has 400 token ids, the policy")):
        GPT(GPTConfig(rows, 32, 1, 2, 16)).save_pretrained(padded.parent / "other")
        data.Tokenizer("bytes").save(padded.parent / "other")
        with pytest.raises(SystemExit):
            train.main(f"{flags} {argv} {padded.parent / 'other'}".split())
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err
