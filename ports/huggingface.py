"""The losses on any causal language model of transformers, with its own tokenizer and chat template:

    python ports/huggingface.py --init FOLDER_OR_NAME --data FILE ... [--lora RANK] [flags of train.py]

`Policy` gives the model the shape of model.GPT; the rest is train.py, its --resume and torchrun too. The
result is a folder for transformers, vLLM and the like, and --init FOLDER --ask TEXT samples it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder
import train  # isort: skip  (before torch, which reads its settings when it is imported)

import shlex
import shutil
import warnings
from dataclasses import replace

import torch
from transformers import AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.logging import disable_progress_bar

from losses import LOSSES
from model import GPTConfig, sample_token
from plumbing import flags, folder, machine, ranks, report
from plumbing.errors import ConfigError, RunError
from ports import huggingface_setup as setup

class Given(BaseModelOutput):
    """Output of a trunk: last_hidden_state; whatever else an architecture asks for is None."""

    def __getattr__(self, name):
        return None

class Policy(torch.nn.Module):
    """A causal language model as train.py asks for it. setup.check_numbers sets `at` and `shared`."""
    at, shared = None, True  # the name of the part that gives the hidden states; a pair is one row, not two
    saved_as = probe = None  # {name: dtype} of the result's tensors; a row of ids that is compared at the end
    trunk = property(lambda self: self.model.get_submodule(self.at))
    wte = property(lambda self: self.model.get_input_embeddings())

    def __init__(self, model):
        super().__init__()
        self.model, self.peft = model, []  # the model with adapters: in a list, for its parts are the model's
        self.config = GPTConfig(len(self.wte.weight), setup.positions_of(model.config), 1, 1, 1)

    @property
    def h(self):
        """The layers, compiled and sharded one by one: the list of modules with the most weights."""
        lists = [m for m in self.trunk.modules() if isinstance(m, torch.nn.ModuleList)]
        return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[])

    def named_parameters(self, *args, **kwargs):
        """What is trained, and so in the optimizer and the checkpoints: with adapters, only they."""
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs)
                if p.requires_grad or not self.peft)

    def forward(self, tokens, positions=None, mask=None):
        """The hidden states of rows that data.collate made, (B, T) -> (B, T, C)."""
        if mask is None:
            return self.hidden(tokens)
        if self.shared:  # the mask in numbers, which every kind of attention can add
            bias = torch.zeros_like(mask, dtype=self.wte.weight.dtype)
            bias = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
            return self.hidden(tokens, position_ids=positions, attention_mask=bias)
        # Two plain rows, [prompt | chosen] and [prompt | rejected]; a token's column there is its position.
        column = torch.arange(tokens.shape[1], device=tokens.device)
        start = 1 + (positions[:, 1:] <= positions[:, :-1]).int().argmax(-1, keepdim=True)  # of rejected
        P, width = positions.gather(1, start), positions.max() + 1
        skip = torch.where(column < P, column, column + start - P).clamp(max=len(column) - 1)
        chosen, rejected = self.hidden(torch.cat([tokens, tokens.gather(1, skip)])[:, :width]).chunk(2)
        at = positions.unsqueeze(-1).expand(-1, -1, chosen.shape[-1])
        return torch.where((column < start).unsqueeze(-1), chosen.gather(1, at), rejected.gather(1, at))

    def hidden(self, tokens, **given):
        return self.trunk(input_ids=tokens, use_cache=False, **given).last_hidden_state

    def logits(self, hidden, centered=False):
        """(n, C) -> (n, V), by the model's own forward, its trunk's output given: head, soft caps and all. In
        float32, for in bfloat16 a logit of 20 has steps of 0.125."""
        trunk, hidden = self.trunk, hidden.to(self.wte.weight.dtype).unsqueeze(0)
        trunk.forward = lambda *_, **__: Given(last_hidden_state=hidden)
        try:
            with torch.autocast(hidden.device.type, enabled=False):
                return self.model(input_ids=torch.zeros_like(hidden[..., 0], dtype=torch.long)).logits[0]
        finally:
            del trunk.forward  # the method shows again

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, *, temperature, eos, generator, n_ids):
        """Continue a row of ids (1, T) up to `eos`, its last one, with ids below n_ids."""
        for _ in range(max_new_tokens):
            logits = self.logits(self(tokens[:, -self.config.block_size:])[:, -1]).float()
            token = sample_token(logits[:, :n_ids], temperature, None, None, generator)
            tokens = torch.cat([tokens, token.unsqueeze(-1)], -1)
            if token.item() == eos:
                break
        return tokens

    def save_pretrained(self, folder, eos):
        """Write the model, each tensor in its dtype in the start: first aside; into the folder if what was
        written, opened again, says what memory says. RunError if not."""
        for model in self.peft:
            model.merge_and_unload()
        own = self.model.generation_config.eos_token_id  # an id, a list or None
        stops = {eos, *(own if isinstance(own, list) else [own])} - {None}
        self.model.generation_config.eos_token_id = sorted(stops)
        tensors = setup.tensors_of(self.model)
        for name, dtype in self.saved_as.items():
            tensors[name].data = tensors[name].data.to(dtype)
        aside, rows = Path(folder, "result.part"), [(self.probe.to(self.wte.weight.device), 1)]
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self.model.save_pretrained(aside, state_dict=tensors)
            again = setup.model_of(aside).to(self.wte.weight.device)
            again.set_experts_implementation(self.model.get_experts_implementation())
            with machine.eager():  # bfloat16 rounds otherwise where blocks are compiled
                off = (setup.plain_logps(again, rows) - setup.plain_logps(self.model, rows)).abs().max()
            if not off <= 1e-3:  # NaN too
                raise ValueError(f"log-probabilities differ by {off.item():.1e} nats")
        except Exception as e:  # transformers raises what it likes
            raise RunError("the result, opened again, is not the trained model, whose weights are in the "
                           f"last checkpoint ({setup.one_line(e)})") from None
        for file in aside.iterdir():
            file.replace(Path(folder, file.name))
        aside.rmdir()

class WithoutAdapters(torch.nn.Module):
    """The reference of a LoRA run: the policy with its adapters off. It has no weights of its own."""
    h, wte = (), property(lambda self: self.policy[0].wte)

    def __init__(self, policy):
        super().__init__()
        self.policy = [policy]

    def forward(self, *batch):
        with self.policy[0].peft[0].disable_adapter():
            return self.policy[0](*batch)

    def logits(self, hidden, centered=False):
        with self.policy[0].peft[0].disable_adapter():
            return self.policy[0].logits(hidden, centered)

def load(flag, name, cfg):
    """A Policy, in the run's precision and on its device."""
    policy = train.prepared(Policy(setup.model_of(name, torch.float32)), replace(cfg, compile=False))
    if cfg.dtype == "float64":
        policy.model.set_experts_implementation("eager")  # the fast ones lack it
    flags.check_model(flag, name, policy, cfg)
    return policy

def add_adapters(policy, cfg):
    """Put LoRA adapters on all linear layers; only they are trained from here on."""
    torch.manual_seed(cfg.seed)
    with setup.refusing(f"--lora {cfg.lora}: peft refuses"), warnings.catch_warnings(action="ignore"):
        import peft
        adapters = peft.LoraConfig(r=cfg.lora, lora_alpha=2 * cfg.lora, target_modules="all-linear")
        policy.peft = [peft.get_peft_model(policy.model, adapters)]
    policy.to(policy.wte.weight.dtype)
    layers = [type(m).__name__ for m in policy.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    fused, (trained, every) = layers.count("ParamWrapper"), policy.peft[0].get_nb_trainable_parameters()
    report.say(f"adapters of rank {cfg.lora} on {len(layers) - fused} linear layers and {fused} tensors of "
               f"fused experts: {trained:,} of {every:,} parameters are trained")

def models(cfg, tokenizer, *data):
    """(policy, the reference's model or None, what train.run cannot know of the run's identity)."""
    policy, ref, identity = load("init", cfg.init, cfg), None, {}
    setup.check_saving(policy.model, cfg.init)
    policy.saved_as = {name: x.dtype for name, x in setup.tensors_of(setup.model_of(cfg.init)).items()}
    with_ref, other = flags.has_reference(LOSSES[cfg.loss]), cfg.ref not in (None, cfg.init)
    if cfg.lora:  # known by the model that they are put on
        identity["init"] = folder.weights_hash(policy)
        add_adapters(policy, cfg)
    if tokenizer.vocab_size > (size := policy.config.vocab_size):
        raise ConfigError(f"--init {cfg.init}: has {size} ids, its tokenizer {tokenizer.vocab_size}")
    report.say(f"{cfg.init}: {setup.check_numbers(policy, data, cfg, f'--init {cfg.init}')}")
    policy.probe = torch.tensor([*data[0][0].prompt.tolist(), *data[0][0].chosen.tolist()])
    if with_ref and cfg.lora and not other:
        ref, identity["ref"] = WithoutAdapters(policy), identity["init"]
    elif with_ref:
        ref = load("ref", cfg.ref or cfg.init, cfg)
        ref.at, ref.shared = policy.at, policy.shared
        if other:
            own = setup.loaded(AutoTokenizer, cfg.ref).get_vocab()
            if (own, ref.config.vocab_size) != (tokenizer.own.get_vocab(), size):
                raise ConfigError(f"--ref {cfg.ref}: has another vocabulary than the policy")
            report.say(f"{cfg.ref}: {setup.check_numbers(ref, data, cfg, f'--ref {cfg.ref}')}")
        ref.requires_grad_(False)
    for model in filter(None, (policy, ref) if cfg.compile else ()):
        machine.compile_blocks(model)
    return policy, ref, identity

def ask(cfg, tokenizer):
    """Print an answer of --init to a text, which is a user's message where the model has a chat template."""
    prompt = [{"role": "user", "content": cfg.ask}] if tokenizer.own.chat_template else cfg.ask
    [ids], policy = tokenizer.encode_prompts([prompt]), load("init", cfg.init, cfg)
    row = torch.tensor([*ids, tokenizer.eot][-cfg.block_size:], device=cfg.device)
    setup.choose_trunk(policy, row, 1e-3, f"--init {cfg.init}")
    report.say(report.answer(policy, tokenizer, ids, cfg.seed))

def main(argv=None):
    machine.tune_allocator()
    disable_progress_bar()  # of files that are opened and written
    report.PROGRAM = "ports/huggingface.py"
    if {"-h", "--help"} & {*(sys.argv if argv is None else argv)}:
        print(__doc__)
    with report.one_line_errors("huggingface.py"):
        cfg, tokenizer = setup.resolve(argv)
        if cfg.ask is not None:
            return ask(cfg, tokenizer)
        pairs, val = setup.load_data(cfg, tokenizer)
        if tokenizer.rendered:
            how = "the model's own" if tokenizer.own.chat_template else "Human/Assistant turns, having no"
            report.say(f"{tokenizer.rendered} prompts of messages are rendered by {how} chat template")
        policy, ref, identity = models(cfg, tokenizer, pairs, val)
        if train.run(cfg, tokenizer, pairs, val, lambda *_: (policy, ref), **identity):
            if isinstance(ref, WithoutAdapters) and not ranks.rank():  # the adapters have been merged
                ref = load("init", cfg.init, cfg)
                ref.at = policy.at
            report.answers(cfg, tokenizer, val, policy, ref)
            report.say(f"saved in {cfg.out_dir}: a folder of transformers, run.json, log.jsonl, checkpoints\n"
                       f"next: python ports/huggingface.py --init {shlex.quote(cfg.out_dir)} --ask 'Why?'")
        ranks.stop()

if __name__ == "__main__":
    main()
