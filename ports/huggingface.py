"""The losses on any causal language model of transformers, with its own tokenizer and chat template:

    python ports/huggingface.py --init FOLDER_OR_NAME --data FILE ... [--lora RANK] [flags of train.py]

`Policy` gives the model the shape of model.GPT; the rest is train.py: step, evaluation, remembered reference,
log, --resume. --lora RANK trains adapters (needs peft); the reference is then the same model without them.
The result is a folder for transformers, vLLM and the like.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder
import train  # isort: skip  (before torch, which reads its settings when it is imported)

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from losses import LOSSES
from plumbing import flags, machine, report
from plumbing.folder import identity_of, weights_hash
from ports.huggingface_setup import choose_rows, loaded, resolve


class Given(SimpleNamespace):
    """Output of a trunk: last_hidden_state; whatever else an architecture asks for is None."""

    def __getattr__(self, name):
        return None

    def __getitem__(self, index):
        return self.last_hidden_state


class Policy(torch.nn.Module):
    """A causal language model as train.py asks for it. adapters=False: without its LoRA, as reference."""

    def __init__(self, model, shared=True, adapters=True, saved_as=torch.float32):
        super().__init__()
        self.model, self.shared, self.saved_as = model, shared, saved_as
        self.h = [self]  # what machine.compile_blocks compiles: all of it
        self.wte = model.get_input_embeddings()
        self.context = nullcontext if adapters else model.disable_adapter
        self.config = SimpleNamespace(vocab_size=self.wte.num_embeddings, n_embd=self.wte.embedding_dim)

    def named_parameters(self, *args, **kwargs):
        """What is trained, and so in the optimizer and the checkpoints."""
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs) if p.requires_grad)

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
        chosen, rejected = (self.trunk(rows[:, :width]) for rows in (tokens, tokens.gather(1, skip)))
        at = positions.unsqueeze(-1).expand(-1, -1, chosen.shape[-1])
        return torch.where((column < start).unsqueeze(-1), chosen.gather(1, at), rejected.gather(1, at))

    def trunk(self, tokens, **given):
        with self.context():
            return self.model.get_decoder()(input_ids=tokens, use_cache=False, **given).last_hidden_state

    def logits(self, hidden, centered=False):
        """(n, C) -> (n, V), by the model's own forward, its trunk's output given: head, soft caps and all. In
        float32, for in bfloat16 a logit of 20 has steps of 0.125."""
        trunk, hidden = self.model.get_decoder(), hidden.to(self.wte.weight.dtype).unsqueeze(0)
        trunk.forward = lambda *_, **__: Given(last_hidden_state=hidden)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        try:
            with self.context(), torch.autocast(hidden.device.type, enabled=False):
                return self.model(input_ids=ids).logits[0]
        finally:
            del trunk.forward  # the method shows again

    def save_pretrained(self, folder, eos):
        model = self.model.merge_and_unload() if hasattr(self.model, "merge_and_unload") else self.model
        stops = model.generation_config.eos_token_id
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        model.generation_config.eos_token_id = sorted({*stops, eos})  # what has been trained to end an answer
        model.to(self.saved_as).save_pretrained(folder)


def models(cfg, rank, *data):
    """(policy, the reference's model or None, the hashes of both at the start, None for none)."""
    def load(name):
        dtype = torch.float64 if cfg.dtype == "float64" else torch.float32
        model = loaded(AutoModelForCausalLM, name, dtype=dtype).eval()  # eval: without dropout, as train.py
        return Policy(model.to(cfg.device), saved_as=loaded(AutoConfig, name).dtype or dtype)

    policy, ref, with_ref = load(cfg.init), None, flags.has_reference(LOSSES[cfg.loss])
    longest = [pairs[int((pairs.rows[:, 1] + pairs.rows[:, 2:4].max(-1)).argmax())] for pairs in data]
    report.say(f"{cfg.init}: {choose_rows(policy, longest, cfg)}")
    if with_ref and (cfg.ref or not rank):
        ref = load(cfg.ref or cfg.init)
    hashes = weights_hash(policy), with_ref and weights_hash(ref or policy) or None
    if rank:
        import peft
        torch.manual_seed(cfg.seed)
        adapters = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model, shared = peft.get_peft_model(policy.model, adapters), policy.shared
        policy = Policy(model, shared, saved_as=policy.saved_as)
        ref = ref or (Policy(model, shared, adapters=False) if with_ref else None)
    if ref:
        ref.shared = policy.shared
    return policy, ref, hashes


def main(argv=None):
    machine.tune_allocator()
    with report.one_line_errors("huggingface.py"):
        cfg, rank, tokenizer = resolve(argv)
        pairs, val = flags.load_data(cfg, tokenizer)
        if tokenizer.own.chat_template:
            report.say("turns are rendered by the model's own chat template")
        policy, ref, hashes = models(cfg, rank, pairs, val)
        identity = identity_of(cfg, pairs, val, tokenizer, *hashes) | {"lora": rank}
        if train.run_models(cfg, identity, cfg.init, cfg.ref, tokenizer, pairs, val, policy, ref)[0]:
            report.say(f"saved in {cfg.out_dir}: a folder of transformers, run.json, log.jsonl, checkpoints")


if __name__ == "__main__":
    main()
