"""The losses on any causal language model of transformers, with its own tokenizer and chat template:

    python ports/huggingface.py --init FOLDER_OR_NAME --data FILE ... [--lora RANK] [flags of train.py]
    python ports/huggingface.py --init FOLDER_OF_A_RUN --ask TEXT
    torchrun --nproc_per_node 8 ports/huggingface.py --init FOLDER_OR_NAME --data FILE ...

`Policy` gives the model the shape of model.GPT; the rest is train.py: step, evaluation, remembered reference,
log, --resume, ranks. --lora RANK trains adapters (needs peft); the reference is then the same model without them.
The result is a folder for transformers, vLLM and the like.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder
import train  # isort: skip  (before torch, which reads its settings when it is imported)

import shlex
import shutil
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from losses import LOSSES
from model import GPTConfig, sample_token
from plumbing import flags, folder, machine, ranks, report
from plumbing.errors import ConfigError, RunError
from ports.huggingface_setup import check_numbers, choose_trunk, loaded, one_line, plain_logps, positions_of, resolve


class Given(dict):
    """Output of a trunk: last_hidden_state; whatever else an architecture asks for is None."""

    def __getattr__(self, name):
        return self.get(name)

    def __getitem__(self, key):
        return self.get(key) if isinstance(key, str) else tuple(self.values())[key]


class Policy(torch.nn.Module):
    """A causal language model as train.py asks for it. check_numbers sets `trunks` and `shared`."""

    def __init__(self, model, saved_as=None, source=None):
        """saved_as: {name: dtype} of the tensors in the result. source: opens a saved folder as it was opened."""
        super().__init__()
        self.model, self.saved_as, self.source = model, saved_as or {}, source
        self.trunks, self.shared = [model.get_decoder()], True  # in a list: it is a part of the model already
        self.peft, self.probe = [], None  # with adapters: the model of peft; ids of a row that is compared at the end
        self.config = GPTConfig(self.wte.num_embeddings, positions_of(model.config), 1, 1, self.wte.embedding_dim)

    @property
    def wte(self):
        return self.model.get_input_embeddings()

    @property
    def h(self):
        """The layers, which are compiled and sharded one by one: the list of modules with the most weights."""
        lists = [m for m in self.trunks[0].modules() if isinstance(m, torch.nn.ModuleList)]
        return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[])

    def named_parameters(self, *args, **kwargs):
        """What is trained, and so in the optimizer and the checkpoints."""
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs)
                if p.requires_grad or not self.peft)

    def fingerprint(self):
        """The sum of the bytes of each weight."""
        return [x.reshape(-1).view(torch.uint8).sum(dtype=torch.int64).item() for x in self.state_dict().values()]

    def forward(self, tokens, positions=None, mask=None):
        """The hidden states of rows that data.collate made, (B, T) -> (B, T, C)."""
        if mask is None:
            return self.trunk(tokens)
        if self.shared:  # the mask in numbers, which every kind of attention can add
            bias = torch.zeros_like(mask, dtype=self.wte.weight.dtype)
            bias = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
            return self.trunk(tokens, position_ids=positions, attention_mask=bias)
        # Two plain rows, [prompt | chosen] and [prompt | rejected]; a token's column there is its position.
        column = torch.arange(tokens.shape[1], device=tokens.device)
        start = 1 + (positions[:, 1:] <= positions[:, :-1]).int().argmax(-1, keepdim=True)  # of rejected
        P, width = positions.gather(1, start), positions.max() + 1
        skip = torch.where(column < P, column, column + start - P).clamp(max=len(column) - 1)
        chosen, rejected = self.trunk(torch.cat([tokens, tokens.gather(1, skip)])[:, :width]).chunk(2)
        at = positions.unsqueeze(-1).expand(-1, -1, chosen.shape[-1])
        return torch.where((column < start).unsqueeze(-1), chosen.gather(1, at), rejected.gather(1, at))

    def trunk(self, tokens, **given):
        return self.trunks[0](input_ids=tokens, use_cache=False, **given).last_hidden_state

    def logits(self, hidden, centered=False):
        """(n, C) -> (n, V), by the model's own forward, its trunk's output given: head, soft caps and all. In
        float32, for in bfloat16 a logit of 20 has steps of 0.125."""
        [trunk], hidden = self.trunks, hidden.to(self.wte.weight.dtype).unsqueeze(0)
        trunk.forward = lambda *_, **__: Given(last_hidden_state=hidden)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        try:
            with torch.autocast(hidden.device.type, enabled=False):
                return self.model(input_ids=ids).logits[0]
        finally:
            del trunk.forward  # the method shows again

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, *, temperature, eos, generator):
        """Continue a row of ids (1, T) up to `eos`, which is then its last."""
        for _ in range(max_new_tokens):
            logits = self.logits(self(tokens)[:, -1])[:, :self.config.vocab_size].float()
            token = sample_token(logits, temperature, None, None, generator)
            tokens = torch.cat([tokens, token.unsqueeze(-1)], -1)
            if token.item() == eos:
                break
        return tokens

    def save_pretrained(self, folder, eos):
        """Write the model, each tensor in the dtype that the start has it in, aside first: it takes its place where
        it says, opened again, what memory says. RunError where it does not."""
        aside = Path(folder, "result.part")
        shutil.rmtree(aside, ignore_errors=True)
        for model in self.peft:
            model.merge_and_unload()
        for name, x in [*self.model.named_parameters(), *self.model.named_buffers()]:
            x.data = x.data.to(self.saved_as.get(name, x.dtype))
        state = dict(self.model.named_parameters(remove_duplicate=False))  # state_dict() would shard again
        for name, m in self.model.named_modules():
            state |= {f"{name}.{key}".lstrip("."): x for key, x in m.named_buffers(recurse=False)
                      if key not in m._non_persistent_buffers_set}
        self.model.save_pretrained(aside, state_dict=state)
        rows = [(self.probe.to(self.wte.weight.device), 1)]
        with torch.no_grad():
            try:
                again = self.source(aside).to(rows[0][0].device)
                off = (plain_logps(again, rows) - plain_logps(self.model, rows)).abs().max().item()
            except Exception as e:  # transformers raises what it likes
                raise RunError(f"the trained model, saved, cannot be opened again ({one_line(e)}); its weights are in "
                               "the last checkpoint") from None
        if not off <= 1e-3:
            raise RunError(f"the trained model, saved and opened again, gives other log-probabilities (by {off:.1e} "
                           "nats); its weights are in the last checkpoint")
        for path in aside.iterdir():
            path.replace(Path(folder, path.name))
        aside.rmdir()


class WithoutAdapters(torch.nn.Module):
    """The reference of a LoRA run: the policy with its adapters off. It has no weights of its own."""
    h = ()

    def __init__(self, policy):
        super().__init__()
        self.policy = [policy]
        self.config = policy.config

    @property
    def wte(self):
        return self.policy[0].wte

    def forward(self, *args):
        with self.policy[0].peft[0].disable_adapter():
            return self.policy[0](*args)

    def logits(self, hidden, centered=False):
        with self.policy[0].peft[0].disable_adapter():
            return self.policy[0].logits(hidden, centered)


def load(flag, name, cfg, eot):
    """A Policy, in the run's precision and on its device."""
    kwargs = {"experts_implementation": "eager"} if cfg.dtype == "float64" else {}  # others have no float64

    def source(folder, dtype="auto"):
        return loaded(AutoModelForCausalLM, folder, dtype=dtype, **kwargs).eval()  # eval: without dropout

    start = source(name)  # as the result is to be
    saved_as = {key: x.dtype for key, x in [*start.named_parameters(), *start.named_buffers()]}
    del start
    policy = Policy(source(name, torch.float32), saved_as, source)
    generation = policy.model.generation_config
    stops = generation.eos_token_id
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    generation.eos_token_id = sorted({*stops, eot})  # what has been trained to end an answer
    try:
        generation.validate(strict=True)
    except ValueError as e:
        raise ConfigError(f"--{flag} {name}: transformers would not save its generation_config.json, change it: "
                          f"{' '.join(str(e).split()):.200}") from None
    policy = train.prepared(policy, replace(cfg, compile=False))
    flags.check_model(flag, name, policy, cfg)
    return policy


def add_adapters(policy, rank, seed):
    """Put LoRA adapters of this rank on all linear layers; only they are trained from here on."""
    import peft
    torch.manual_seed(seed)
    adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    try:
        policy.peft = [peft.get_peft_model(policy.model, adapters)]
    except ValueError as e:
        raise ConfigError(f"--lora {rank}: peft has no adapters for this model ({one_line(e)}); leave it out") from None
    policy.to(policy.wte.weight.dtype)
    layers = [type(m).__name__ for m in policy.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    fused = layers.count("ParamWrapper")
    report.say(f"adapters of rank {rank} on {len(layers) - fused} linear layers"
               + f" and {fused} tensors of fused experts" * bool(fused)
               + f": {sum(p.numel() for p in policy.parameters()):,} of "
               f"{sum(p.numel() for p in policy.model.parameters()):,} parameters are trained")


def models(cfg, rank, tokenizer, *data):
    """(policy, the reference's model or None, what identity_of cannot see, the Config for these models)."""
    policy, ref = load("init", cfg.init, cfg, tokenizer.eot), None
    with_ref, identity = flags.has_reference(LOSSES[cfg.loss]), {"lora": rank}
    if rank:  # known by the model that they are put on
        identity["init"] = folder.weights_hash(policy)
        add_adapters(policy, rank, cfg.seed)
    if max(int(pairs.ids.max()) for pairs in data) >= policy.config.vocab_size:
        raise ConfigError(f"--init {cfg.init}: its tokenizer has ids that the model, with {policy.config.vocab_size}, "
                          "has not")
    report.say(f"{cfg.init}: {check_numbers(policy, data, cfg, f'--init {cfg.init}')}")
    policy.probe = torch.from_numpy(data[0].ids[:64]).long()
    other = cfg.ref not in (None, cfg.init)
    if with_ref and (other or not rank):
        ref = load("ref", cfg.ref or cfg.init, cfg, tokenizer.eot)
        if other:
            if loaded(AutoTokenizer, cfg.ref).get_vocab() != tokenizer.own.get_vocab():
                raise ConfigError(f"--ref {cfg.ref}: has another tokenizer than the policy")
            report.say(f"{cfg.ref}: {check_numbers(ref, data, cfg, f'--ref {cfg.ref}')}")
        else:
            names = {id(m): name for name, m in policy.model.named_modules()}
            ref.shared, ref.trunks = policy.shared, [ref.model.get_submodule(names[id(policy.trunks[0])])]
        ref.requires_grad_(False)
    elif with_ref:
        ref, identity["ref"] = WithoutAdapters(policy), identity["init"]
    if cfg.compile:
        for model in filter(None, (policy, ref)):
            machine.compile_blocks(model, dynamic=True)
    return policy, ref, identity, cfg


def ask(cfg, tokenizer, text):
    """Print an answer of --init to a text, which is a user's message where the model has a chat template."""
    [prompt] = tokenizer.encode_prompts([[{"role": "user", "content": text}] if tokenizer.own.chat_template else text])
    policy = load("init", cfg.init, cfg, tokenizer.eot)
    choose_trunk(policy, torch.tensor([*prompt, tokenizer.eot], device=cfg.device), 1e-3, f"--init {cfg.init}")
    report.say(report.answer(policy, tokenizer, prompt, cfg.seed))


def main(argv=None):
    machine.tune_allocator()
    disable_progress_bar()  # of files that are opened and written
    report.PROGRAM = "ports/huggingface.py"
    with report.one_line_errors("huggingface.py"):
        cfg, rank, tokenizer, text = resolve(argv)
        if text:
            return ask(cfg, tokenizer, text)
        pairs, val = flags.load_data(cfg, tokenizer)
        if tokenizer.rendered:
            own = "the model's own chat template" if tokenizer.own.chat_template else \
                "\"Human: ... Assistant:\", for the model has no chat template"
            report.say(f"{tokenizer.rendered} prompts are messages, rendered by {own}")
        policy, ref, identity, cfg = models(cfg, rank, tokenizer, pairs, val)
        if train.run(cfg, tokenizer, pairs, val, lambda *_: (policy, ref), **identity):
            if isinstance(ref, WithoutAdapters) and not ranks.rank():  # the adapters have been merged
                ref = load("init", cfg.init, cfg, tokenizer.eot)
            report.answers(cfg, tokenizer, val, policy, ref)
            report.say(f"saved in {cfg.out_dir}: a folder of transformers, run.json, log.jsonl, checkpoints")
            report.say(f"next: python ports/huggingface.py --init {shlex.quote(cfg.out_dir)} --ask 'Who are you?'\n"
                       f"      python tools/plot.py {shlex.quote(cfg.out_dir)}")
        ranks.stop()


if __name__ == "__main__":
    main()
