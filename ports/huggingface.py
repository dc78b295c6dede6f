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
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
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
    """A causal language model as train.py asks for it. setup.check_numbers sets `trunks` and `shared`."""
    probe = None  # a row of ids that is compared at the end
    wte = property(lambda self: self.model.get_input_embeddings())

    def __init__(self, model, saved_as=None, source=None):
        """saved_as: {name: dtype} of the result's tensors. source: opens a result's folder as a model."""
        super().__init__()
        self.model, self.saved_as, self.source = model, saved_as, source
        self.trunks, self.peft, self.shared = [model.get_decoder()], [], True  # lists: parts of self.model
        size = self.wte.weight.shape
        self.config = GPTConfig(size[0], setup.positions_of(model.config), 1, 1, size[1])

    @property
    def h(self):
        """The layers, compiled and sharded one by one: the list of modules with the most weights."""
        lists = [m for m in self.trunks[0].modules() if isinstance(m, torch.nn.ModuleList)]
        return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[])

    def named_parameters(self, *args, **kwargs):
        """What is trained, and so in the optimizer and the checkpoints: with adapters, only they."""
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs)
                if p.requires_grad or not self.peft)

    def follow(self, other):
        """Use the trunk and the rows of a checked model of the same architecture."""
        names = {module: name for name, module in other.model.named_modules()}
        self.shared, self.trunks = other.shared, [self.model.get_submodule(names[other.trunks[0]])]

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
        ids = torch.zeros_like(hidden[..., 0], dtype=torch.long)
        try:
            with torch.autocast(hidden.device.type, enabled=False):
                return self.model(input_ids=ids).logits[0]
        finally:
            del trunk.forward  # the method shows again

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, *, temperature, eos, generator):
        """Continue a row of ids (1, T) up to `eos`, its last one."""
        for _ in range(max_new_tokens):
            logits = self.logits(self(tokens)[:, -1])[:, :self.config.vocab_size].float()
            token = sample_token(logits, temperature, None, None, generator)
            tokens = torch.cat([tokens, token.unsqueeze(-1)], -1)
            if token.item() == eos:
                break
        return tokens

    def save_pretrained(self, folder, eos):
        """Write the model, each tensor in its dtype in the start: first aside, into the folder where it
        says, opened again, what memory says. RunError where it does not."""
        for model in self.peft:
            model.merge_and_unload()
        tensors = setup.tensors_of(self.model)
        for name, dtype in self.saved_as.items():
            tensors[name].data = tensors[name].data.to(dtype)
        aside, rows = Path(folder, "result.part"), [(self.probe.to(self.wte.weight.device), 1)]
        shutil.rmtree(aside, ignore_errors=True)
        try:
            self.model.save_pretrained(aside, state_dict=tensors)
            again = self.source(aside).to(self.wte.weight.device)
            off = (setup.plain_logps(again, rows) - setup.plain_logps(self.model, rows)).abs().max()
            assert off <= 1e-3, f"log-probabilities differ by {off.item():.1e} nats"
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

def load(flag, name, cfg, eot):
    """A Policy, in the run's precision and on its device."""
    kwargs = {"experts_implementation": "eager"} if cfg.dtype == "float64" else {}  # the fast ones lack it

    def source(folder, dtype="auto"):
        return setup.loaded(AutoModelForCausalLM, folder, dtype=dtype, **kwargs).eval()  # without dropout

    saved_as = {key: x.dtype for key, x in setup.tensors_of(source(name)).items()}
    policy = Policy(source(name, torch.float32), saved_as, source)
    generation = policy.model.generation_config
    stops = [generation.eos_token_id] if isinstance(generation.eos_token_id, int) else generation.eos_token_id
    generation.eos_token_id = sorted({eot, *(stops or [])})  # what has been trained to end an answer
    try:
        generation.validate(strict=True)
    except ValueError as e:
        raise ConfigError(f"--{flag} {name}: transformers would not save its generation_config.json; correct "
                          f"it ({setup.one_line(e)})") from None
    policy = train.prepared(policy, replace(cfg, compile=False))
    flags.check_model(flag, name, policy, cfg)
    return policy

def add_adapters(policy, rank, seed):
    """Put LoRA adapters of this rank on all linear layers; only they are trained from here on."""
    import peft
    torch.manual_seed(seed)
    try:
        adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        policy.peft = [peft.get_peft_model(policy.model, adapters)]
    except ValueError as e:
        raise ConfigError(f"--lora {rank}: not for this model, says peft ({setup.one_line(e)})") from None
    policy.to(policy.wte.weight.dtype)
    layers = [type(m).__name__ for m in policy.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    fused, (trained, every) = layers.count("ParamWrapper"), (
        sum(p.numel() for p in x.parameters()) for x in (policy, policy.model))
    report.say(f"adapters of rank {rank} on {len(layers) - fused} linear layers and {fused} tensors of fused "
               f"experts: {trained:,} of {every:,} parameters are trained")

def models(cfg, rank, tokenizer, *data):
    """(policy, the reference's model or None, what train.run cannot know of the run's identity)."""
    policy, ref, identity = load("init", cfg.init, cfg, tokenizer.eot), None, {"lora": rank}
    with_ref, other = flags.has_reference(LOSSES[cfg.loss]), cfg.ref not in (None, cfg.init)
    if rank:  # known by the model that they are put on
        identity["init"] = folder.weights_hash(policy)
        add_adapters(policy, rank, cfg.seed)
    if tokenizer.vocab_size > (size := policy.config.vocab_size):
        raise ConfigError(f"--init {cfg.init}: has {size} ids, its tokenizer {tokenizer.vocab_size}")
    report.say(f"{cfg.init}: {setup.check_numbers(policy, data, cfg, f'--init {cfg.init}')}")
    policy.probe = torch.tensor([*data[0][0].prompt.tolist(), *data[0][0].chosen.tolist()])
    if with_ref and rank and not other:
        ref, identity["ref"] = WithoutAdapters(policy), identity["init"]
    elif with_ref:
        ref = load("ref", cfg.ref or cfg.init, cfg, tokenizer.eot)
        if other:
            own = setup.loaded(AutoTokenizer, cfg.ref).get_vocab()
            if (own, ref.config.vocab_size) != (tokenizer.own.get_vocab(), size):
                raise ConfigError(f"--ref {cfg.ref}: has another vocabulary than the policy")
            report.say(f"{cfg.ref}: {setup.check_numbers(ref, data, cfg, f'--ref {cfg.ref}')}")
        else:
            ref.follow(policy)
        ref.requires_grad_(False)
    for model in filter(None, (policy, ref) if cfg.compile else ()):
        machine.compile_blocks(model)
    return policy, ref, identity

def ask(cfg, tokenizer, text):
    """Print an answer of --init to a text, which is a user's message where the model has a chat template."""
    prompt = [{"role": "user", "content": text}] if tokenizer.own.chat_template else text
    [ids], policy = tokenizer.encode_prompts([prompt]), load("init", cfg.init, cfg, tokenizer.eot)
    setup.choose_trunk(policy, torch.tensor([*ids, tokenizer.eot], device=cfg.device), 1e-3, "--init")
    report.say(report.answer(policy, tokenizer, ids, cfg.seed))

def main(argv=None):
    machine.tune_allocator()
    disable_progress_bar()  # of files that are opened and written
    report.PROGRAM = "ports/huggingface.py"
    with report.one_line_errors("huggingface.py"):
        cfg, rank, tokenizer, text = setup.resolve(argv)
        if text is not None:
            return ask(cfg, tokenizer, text)
        pairs, val = flags.load_data(cfg, tokenizer)
        if tokenizer.rendered:
            how = "the model's own" if tokenizer.own.chat_template else "Human/Assistant turns, having no"
            report.say(f"{tokenizer.rendered} prompts of messages are rendered by {how} chat template")
        policy, ref, identity = models(cfg, rank, tokenizer, pairs, val)
        if train.run(cfg, tokenizer, pairs, val, lambda *_: (policy, ref), **identity):
            if isinstance(ref, WithoutAdapters) and not ranks.rank():  # the adapters have been merged
                ref = load("init", cfg.init, cfg, tokenizer.eot)
            report.answers(cfg, tokenizer, val, policy, ref)
            report.say(f"saved in {cfg.out_dir}: a folder of transformers, run.json, log.jsonl, checkpoints\n"
                       f"next: python ports/huggingface.py --init {shlex.quote(cfg.out_dir)} --ask 'Why?'")
        ranks.stop()

if __name__ == "__main__":
    main()
