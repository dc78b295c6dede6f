"""What ports/huggingface.py needs before it trains: the tokenizer, the flags, the kind of rows."""

import argparse
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

import train
from data import DataError, collate
from losses import LOSSES, terms_of, token_logps
from plumbing import flags, machine, ranks, vocab
from plumbing.errors import ConfigError
from plumbing.folder import check_free

TURN = re.compile(r"\n\n(System|Human|Assistant): ?")  # how data.py renders all forms of chat
ROLES = {"System": "system", "Human": "user", "Assistant": "assistant"}


class Tokenizer:
    """Prompts that are turns become messages of the model's chat template, if it has one. Other prompts are
    taken as they stand, after the model's begin-of-text, if it has one."""

    def __init__(self, own, segmented=False):
        """own: of AutoTokenizer. segmented: for a loss that finds the segments of responses by bytes."""
        self.own, self.segmented, self.vocab_size = own, segmented, len(own)
        if not own.encode("a", add_special_tokens=False):  # transformers makes an empty one without a word
            raise ConfigError("--init: holds no tokenizer that transformers can read")
        identity = sorted(own.get_vocab().items()), own.chat_template
        self.hash = sha256(repr(identity).encode()).hexdigest()
        self.eot = self.end_of_turn() if own.chat_template else own.eos_token_id
        if self.eot is None:
            raise ConfigError("the tokenizer has no eos_token to close a response with; set one")
        tokens, byte_of = own.convert_ids_to_tokens(list(range(len(own)))), vocab.byte_characters()
        if any("Ġ" in token for token in tokens):  # GPT-2's kind
            found = (bytes(byte_of.get(c, 0) for c in token) for token in tokens)
        else:  # sentencepiece's
            found = (bytes([int(token[1:-1], 16)]) if re.fullmatch("<0x..>", token) else
                     token.replace("▁", " ").encode() for token in tokens)
        self.token_bytes = dict(enumerate(found))

    def end_of_turn(self):
        """The id that closes an answer in the chat template; it need not be end-of-text."""
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "termwise"}]
        rest = self.own.apply_chat_template(turns, tokenize=False).rpartition("termwise")[2]
        first = self.own.encode(rest.lstrip(), add_special_tokens=False)[:1]
        return first[0] if first and first[0] in self.own.added_tokens_decoder else self.own.eos_token_id

    def encode(self, text):
        """Text -> ids, never a special token, whatever the text says."""
        ids = self.own.encode(text, add_special_tokens=False, split_special_tokens=True)
        if self.segmented and b"".join(map(self.token_bytes.get, ids)) != text.encode():
            raise DataError(f"{text[:40]!r}: the tokenizer changes this text, and segments are found by "
                            "their bytes; choose a loss without segments")
        return ids

    def encode_batch(self, texts):
        """The prompt, chosen and rejected response of each pair in turn, as data.encode_pairs sends them."""
        ids, begin = [], [i for i in self.own.encode("")[:1] if i == self.own.bos_token_id]
        for prompt, *responses in zip(*[iter(texts)] * 3, strict=True):
            before, *turns = TURN.split(prompt)
            chat = bool(self.own.chat_template) and not before and turns[-2:] == ["Assistant", ""]
            ids.append(self.rendered(turns[:-2]) if chat else begin + self.encode(prompt))
            for text in responses:  # the space after "Assistant:" is no part of a message
                ids.append(self.encode(text.removeprefix(" ") if chat and not self.segmented else text))
        return ids

    def rendered(self, turns):
        """[name, text, name, text, ...] -> ids of the chat template, up to where the answer begins."""
        messages = [{"role": ROLES[name], "content": text}
                    for name, text in zip(turns[::2], turns[1::2], strict=True)]
        try:
            return self.own.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except Exception as e:  # a template raises what it likes
            raise DataError(f"{turns[1][:40]!r}: the model's chat template refuses this conversation ({e}); "
                            "change the record") from None

    def save(self, folder):
        self.own.save_pretrained(folder)


def loaded(kind, name, **kwargs):
    """From a folder, or from huggingface.co by name."""
    try:
        return kind.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"{name}: {' '.join(str(e).split()):.200}") from None


def resolve(argv):
    """argv -> (Config, rank of the adapters or 0, Tokenizer)."""
    parser = argparse.ArgumentParser(
        "huggingface.py", usage="python ports/huggingface.py --init FOLDER_OR_NAME [--FLAG VALUE ...]",
        add_help=False, allow_abbrev=False, epilog="The other flags are train.py's, below; refused are "
        "--tokenizer, --n_layer, --n_head, --n_embd, --compile_head, --pack. --lr is 1e-6, with --lora 1e-5.")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK",
                        help="train adapters of this rank, with peft; default 0: the model's own weights")
    own, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & {*rest}:
        parser.print_help()
        print()
    cfg = flags.parse(train.Config, rest)
    flags.check(cfg)
    if cfg.init is None or own.lora < 0 or cfg.compile_head or cfg.pack or ranks.world() > 1:
        raise ConfigError("--init must name a model, --lora be at least 0; no --compile_head, no --pack, no "
                          "torchrun")
    for name in ("tokenizer", "n_layer", "n_head", "n_embd"):
        flags.refuse_unread(cfg, name, "the model has its own")
    text = loaded(AutoConfig, cfg.init).get_text_config()
    tokenizer = Tokenizer(loaded(AutoTokenizer, cfg.init), "chosen_rewards" in terms_of(LOSSES[cfg.loss]))
    out_dir, device = cfg.out_dir or flags.free_folder(cfg.loss), cfg.device or machine.best_device()
    check_free(Path(out_dir), {"init": cfg.init, "ref": cfg.ref}, cfg.resume, cfg.overwrite)
    filled = flags.defaults_of_loss(cfg) | flags.defaults_of_machine(cfg, device, tokenizer)
    filled |= {"out_dir": out_dir, "device": device, "lr": 1e-5 if own.lora else 1e-6, "compile_head": False,
               "pack": False, "block_size": min(2048, getattr(text, "max_position_embeddings", 2048))}
    cfg = replace(cfg, **{name: x for name, x in filled.items() if getattr(cfg, name) is None})
    return cfg, own.lora, tokenizer


@torch.no_grad()
def choose_rows(policy, pairs, cfg):
    """Find out by numbers whether rows with a shared prompt give the model's own log-probabilities. With a
    sliding window or recurrent layers they do not: then two rows a pair. Returns what to print."""
    exact, plain = cfg.dtype == "float64", []
    cfg = replace(cfg, compile=False, dtype="float64" if exact else "float32")
    for p in pairs:
        for response in (p.chosen, p.rejected):
            row = torch.from_numpy(np.concatenate([p.prompt, response])).long().to(cfg.device)
            logits = policy.model(input_ids=row.unsqueeze(0)).logits[0, len(p.prompt) - 1:-1]
            plain.append(token_logps(logits, row[len(p.prompt):]))
    batch, why = collate(pairs).to(cfg.device), "a shared prompt changes its numbers"
    for policy.shared in (True, False):
        try:
            off = (train.response_logps(policy, batch, cfg) - torch.cat(plain)).abs().max().item()
        except Exception as e:  # a model that takes no positions or no such mask raises what it likes
            off, why = np.inf, f"it takes no shared prompt ({' '.join(str(e).split()):.80})"
        if off <= (1e-5 if exact else 1e-3):  # nats; norms are float32 in any model
            return "one row a pair, the prompt shared" if policy.shared else f"two rows a pair: {why}"
    raise ConfigError(f"--init: log-probabilities differ from the model's own by {off:.1e} nats; {why}")
