"""What ports/huggingface.py needs before it trains: tokenizer, flags, and a check of the model by numbers."""

import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import data
import train
from losses import LOSSES, terms_of, token_logps
from plumbing import flags, machine, ranks, vocab
from plumbing import pairs as files
from plumbing.errors import ConfigError, DataError
from plumbing.folder import read_run

class RefusedText(DataError):
    """A text that the tokenizer does not take. load_data says where it stands."""

class Tokenizer(data.Tokenizer):
    """A tokenizer of transformers. Messages are rendered by its chat template, or as by the core where it has
    none; a string is taken as it stands, after begin-of-text if the model has one."""

    def __init__(self, own, segmented=False):
        """own: of AutoTokenizer. segmented: for a loss that finds the segments of responses by bytes."""
        self.own, self.segmented, self.vocab_size, self.rendered = own, segmented, len(own), 0
        if not own.encode("a", add_special_tokens=False):  # transformers makes an empty one without a word
            raise ConfigError(f"--init {own.name_or_path}: holds no tokenizer that transformers can read")
        self.save, self.decode = own.save_pretrained, lambda ids: own.decode([int(i) for i in ids])
        self.encode_batch = lambda texts: [self.encode(text) for text in texts]
        self.hash = sha256(repr((sorted(own.get_vocab().items()), own.chat_template)).encode()).hexdigest()
        self.lead, self.eot = self.around_answer() if own.chat_template else (super().lead, own.eos_token_id)
        if self.eot is None:
            raise ConfigError("the tokenizer has no eos_token to close a response with; set one")
        self.begin = [i for i in own.encode("")[:1] if i == own.bos_token_id]
        special = [re.escape(token.content) for token in own.added_tokens_decoder.values() if token.special]
        self.special = re.compile("|".join(special) or "(?!)")
        tokens, byte_of = own.convert_ids_to_tokens(list(range(len(own)))), vocab.byte_characters()
        if any("Ġ" in token for token in tokens):  # GPT-2's kind
            found = (bytes(byte_of.get(c, 0) for c in token) for token in tokens)
        else:  # sentencepiece's
            found = (bytes([int(token[1:-1], 16)]) if re.fullmatch("<0x..>", token) else
                     token.replace("▁", " ").encode() for token in tokens)
        self.token_bytes = dict(enumerate(found))

    def around_answer(self):
        """(the space before an answer in a chat, the id that closes it: not always end-of-text)."""
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "termwise"}]
        prompt = self.own.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        before, _, after = self.own.apply_chat_template(turns, tokenize=False).rpartition("termwise")
        lead = before.removeprefix(prompt)
        first = self.own.encode(after.lstrip(), add_special_tokens=False)[:1]
        closes = first and first[0] in self.own.added_tokens_decoder
        return "" if lead.strip() else lead, first[0] if closes else self.own.eos_token_id

    def checked(self, text):
        """A text without special tokens. One that holds some was rendered already, or would end its turn."""
        if found := self.special.search(text):
            raise RefusedText(f"a text holds {found[0]!r}, a special token, which is added where it belongs; "
                              "give the messages before they were rendered, or the text without it")
        return text

    def encode(self, text):
        """Text -> ids, never a special token."""
        ids = self.own.encode(self.checked(text), add_special_tokens=False, split_special_tokens=True)
        if self.segmented and b"".join(map(self.token_bytes.get, ids)) != text.encode():
            raise RefusedText("the tokenizer changes a text, and segments are found by its bytes; choose a "
                              "loss without segments")
        return ids

    def encode_prompts(self, prompts):
        """Prompts, strings or lists of messages -> lists of ids."""
        return [self.begin + self.encode(prompt) or [self.eot] if isinstance(prompt, str) else
                self.own.encode(self.render(prompt), add_special_tokens=False) for prompt in prompts]

    def render(self, messages):
        """Messages -> text, up to where the answer begins."""
        self.rendered += 1
        for message in messages:
            self.checked(message["content"])
        if not self.own.chat_template:
            return (self.own.bos_token if self.begin else "") + super().render(messages)
        try:
            return self.own.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as e:  # a template raises what it likes
            raise RefusedText(f"the model's chat template refuses this conversation ({e})") from None

def load_data(cfg, tokenizer):
    """As flags.load_data; what the tokenizer refuses is looked for again, and named by file and line."""
    try:
        return flags.load_data(cfg, tokenizer)
    except RefusedText as error:
        refused, alone = [], not flags.is_pairwise(LOSSES[cfg.loss])
        for record in (x for path in cfg.data + cfg.val_data for x in files.read(path, refused, alone)):
            try:
                data.encode_pairs(tokenizer, [record], cfg.block_size)
            except RefusedText as e:
                refused.append(("", record[0], str(e)))
        raise DataError("\n".join(files.listed(refused)) or str(error)) from None

def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split()):.160}"

@contextmanager
def refusing(what):
    """What transformers raises inside, which is what it likes, becomes a line that begins with this."""
    try:
        yield
    except Exception as e:
        raise ConfigError(f"{what} ({one_line(e)})") from None

def loaded(kind, name, **kwargs):
    """From a folder, or from huggingface.co by name."""
    if Path(name, "run.json").exists() and read_run(name)["finished"] is None:
        raise ConfigError(f"{name}: this run is not finished; go on with it: --resume --out_dir {name}")
    no_folder = "no such folder here, and huggingface.co does not give it"
    with refusing(f"{name}: {'transformers cannot open it' if Path(name).exists() else no_folder}"):
        return kind.from_pretrained(name, **kwargs)

def model_of(name, dtype="auto"):
    """The model of a folder or a name, without dropout. "auto": each tensor in its own dtype."""
    model, found = loaded(AutoModelForCausalLM, name, dtype=dtype, output_loading_info=True)
    if missing := sorted(found["missing_keys"]):  # transformers would make them up
        raise ConfigError(f"{name}: lacks {len(missing)} tensors of its model, {missing[0]} for one")
    return model.eval()

def check_saving(model, name):
    """Refuse a start whose result transformers would not save, or not open: now, not after the last step."""
    what = "transformers would not save or open the result's config.json and generation_config.json"
    with refusing(f"{name}: {what}"), TemporaryDirectory() as aside, torch.device("meta"):
        model.config.save_pretrained(aside)
        model.generation_config.validate(strict=True)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(aside))

def positions_of(config):
    """The most tokens that a model takes, where its config says."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else 2**31

@dataclass(frozen=True)
class Config(train.Config):
    """The flags of train.py, where --lr is 1e-6 by default, with --lora 1e-5, and two more."""
    lora: int = train.knob(0, "rank of adapters on all linear layers, by peft; 0 = train all weights", 0)
    ask: str | None = train.knob(None, "print an answer of --init to this text, and end")

def resolve(argv):
    """argv -> (Config, Tokenizer)."""
    typed = flags.parse(Config, argv)
    if "init" in typed and not typed.get("resume"):
        most = positions_of(loaded(AutoConfig, typed["init"]))
        typed = {"lr": 1e-5 if typed.get("lora") else 1e-6, "block_size": min(2048, most)} | typed
    cfg = flags.configure(Config, typed)
    flags.check(cfg, typed)
    if cfg.init is None:
        raise ConfigError("--init: must name a model, by its folder or as on huggingface.co")
    own = dict.fromkeys(("tokenizer", "n_layer", "n_head", "n_embd", "compile_head"), "the model has its own")
    flags.refuse_unread({name for name, x in typed.items() if x}, own)  # --no-compile_head may be typed
    cfg = replace(cfg, device=cfg.device or machine.best_device(), compile_head=False,
                  out_dir=cfg.out_dir if cfg.ask is not None else flags.place_of_run(cfg))
    ranks.start(cfg.device)
    tokenizer = Tokenizer(loaded(AutoTokenizer, cfg.init), "chosen_rewards" in terms_of(LOSSES[cfg.loss]))
    return flags.for_machine(cfg, tokenizer.vocab_size), tokenizer

# ---- Numbers decide: which trunk, which rows ----

# The numbers in a config.json beyond which a model may compute something else.
LIMIT = re.compile(r'(?:window|chunk|top_?k|position|local|length|span|block|ctx|budget|extent)\w*": (\d+)')

def telling(pairs, limits):
    """The numbers of some pairs: the longest and the shortest by every length, and for each limit the
    shortest with only the shared row beyond it, with one plain row beyond it, with both."""
    P, C, R = (pairs.rows[name] for name in "PCR")
    row, longer, shorter = P + C + R, P + np.maximum(C, R), P + np.minimum(C, R)
    found = {int(end(x)) for x in (row, longer, P, C, R) for end in (np.argmax, np.argmin)}
    for limit in limits:
        for over in (row > limit) & (longer <= limit), (longer > limit) & (shorter <= limit), shorter > limit:
            found |= {int(np.where(over, row, row.max() + 1).argmin())} if over.any() else set()
    return found

def tensors_of(model):
    """{name: tensor} of all that is saved, without the gathering that state_dict() does under torchrun."""
    unsaved = {f"{at}.{name}" for at, m in model.named_modules() for name in m._non_persistent_buffers_set}
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: x for name, x in every if name not in unsaved}

@torch.no_grad()
def choose_trunk(policy, row, tolerance, name):
    """Set policy.at: the trunk's output, given to the model's own head, is what the model says of a row."""
    other, why = torch.cat([row[:-1], (row[-1:] + 1) % policy.config.vocab_size]), "it has none"
    with refusing(f"{name}: does not run on a row of tokens"):
        own, changed = (policy.model(input_ids=x[None], use_cache=False).logits[0, :-1] for x in (row, other))
    if (own - changed).abs().max() > tolerance:
        raise ConfigError(f"{name}: is not a causal model: a later token changes what it says of an earlier "
                          "one (is_decoder in its config.json?)")
    parts = [name for name, x in policy.model.named_modules() if name and isinstance(x, PreTrainedModel)]
    for policy.at in reversed(parts):  # the innermost first
        try:
            off = (policy.logits(policy(row[None])[0, :-1]) - own).abs().max().item()
            if off <= tolerance:
                return
            why = f"off by {off:.1e}"
        except Exception as e:
            why = one_line(e)
    raise ConfigError(f"{name}: no part of it gives, as last_hidden_state, what its head takes ({why})")

@torch.no_grad()
def plain_logps(model, rows):
    """[(ids, where the response begins)] -> the model's own log-probabilities, (N,), from one row each."""
    return torch.cat([token_logps(model(input_ids=row[None], use_cache=False).logits[0, at - 1:-1], row[at:])
                      for row, at in rows])

def check_numbers(policy, parts, cfg, name):
    """Set policy.at and policy.shared by numbers: telling pairs of parts (Pairs), long and short ones in one
    micro-batch, have the log-probabilities of plain rows. Returns what to print; ConfigError if not."""
    before = [x.detach().double().sum() for x in tensors_of(policy).values()]
    cfg, tolerance = (cfg, 1e-5) if cfg.dtype == "float64" else (replace(cfg, dtype="float32"), 1e-3)  # nats
    bounds = {int(x) for x in LIMIT.findall(policy.model.config.to_json_string(use_diff=False))}
    pairs = sorted((part[i] for part in parts for i in telling(part, bounds)), key=len)
    pairs = [p for two in zip(pairs, pairs[::-1], strict=True) for p in two][:len(pairs)]  # short, long, ...
    rows = [(torch.from_numpy(np.concatenate([p.prompt, y])).long().to(cfg.device), len(p.prompt))
            for p in pairs for y in (p.chosen, p.rejected) if len(y)]
    choose_trunk(policy, sorted(rows, key=lambda row: len(row[0]))[len(rows) // 2][0], tolerance, name)
    plain, why = plain_logps(policy.model, rows), "a shared prompt changes its numbers"
    micros = [data.collate(pairs[i:i + 2]).to(cfg.device) for i in range(0, len(pairs), 2)]
    for policy.shared in (True, False):
        try:
            found = torch.cat([train.response_logps(policy, micro, cfg) for micro in micros])
            off = (found - plain).abs().max().item()
        except Exception as e:  # a model that takes no positions or no such mask raises what it likes
            off, why = np.inf, f"it takes no shared prompt ({one_line(e)})"
        if off <= tolerance:
            break
    else:
        raise ConfigError(f"{name}: log-probabilities are off by {off:.1e} nats, with two rows a pair too; "
                          "where long texts are the reason, a smaller --block_size avoids it")
    with refusing(f"{name}: cannot be trained"):
        train.hidden_states(policy, micros[0], cfg).sum().backward()
    policy.zero_grad(set_to_none=True)
    if any(x.detach().double().sum() != y for x, y in zip(tensors_of(policy).values(), before, strict=True)):
        raise ConfigError(f"{name}: changes its weights when it runs, so they would be saved wrong")
    return "one row a pair, the prompt shared" if policy.shared else f"two rows a pair: {why}"
