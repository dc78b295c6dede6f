"""ports/huggingface.py beside trl.DPOTrainer, step by step: python experiments/parity_trl.py [--live]

A random Qwen2 with the real one's vocabulary of 151,936. Both sides read the same records and have the same
weights, order of pairs, AdamW and clipping, in float32, in a process each. They take turns, so that a noisy
machine is noisy for both. The exit status is 1 where the losses of a step differ by more than 1e-5.
Both know the reference's log-probabilities before the first step; with --live both run the reference in every
step, as TRL does by default. Needs Linux, trl and transformers. Results: parity_trl.md.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import throughput  # first of ours: it makes train importable
import torch

import train
from data import Tokenizer, step_indices
from losses import dpo_loss
from plumbing import flags, machine
from plumbing.reference import Memory, Reference

BETA, LR, BATCH, VOCABULARY = 0.1, 5e-5, 4, 151_936
WORDS = "the a quick brown fox sees dog lazy over jumps and why how because it is not good yes no".split()
COMPARED = {"loss": 1, "grad_norm": 1, "chosen": 1 / BETA, "rejected": 1 / BETA}  # TRL logs beta * log-ratio


def make(folder, o):
    """The start, with a tokenizer whose tokens are bytes, and records for all steps."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    tokenizer, rng = Tokenizer("bytes"), np.random.default_rng(0)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=o.hidden, intermediate_size=4 * o.hidden,
        num_hidden_layers=o.layers, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)).save_pretrained(folder)
    tokenizer.save(folder)

    def text(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    records = [{"prompt": text(10, 30) + "?", "chosen": " " + text(5, 12), "rejected": " " + text(5, 12)}
               for _ in range(o.steps * BATCH)]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def trl_side(folder, o, turn):
    import datasets
    import transformers
    import trl
    datasets.disable_progress_bars()
    turn("imported")

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            turn()

        def on_log(self, args, state, control, logs, **kwargs):
            if "grad_norm" in logs:  # the last log of a run has none
                turn([logs[name] for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected")])

    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    order = np.concatenate([step_indices(len(records), BATCH, 0, i) for i in range(o.steps)])
    trainer = trl.DPOTrainer(
        str(folder), processing_class=transformers.AutoTokenizer.from_pretrained(folder), callbacks=[Turns()],
        train_dataset=datasets.Dataset.from_list([records[i] for i in order]),
        args=trl.DPOConfig(
            output_dir=str(folder / "trl"), beta=BETA, learning_rate=LR, per_device_train_batch_size=BATCH,
            max_steps=o.steps, lr_scheduler_type="constant", train_sampling_strategy="sequential",
            bf16=False, activation_checkpointing=False, precompute_ref_log_probs=not o.live, use_cpu=True,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True))
    trainer.remove_callback(transformers.PrinterCallback)
    turn("ready")
    trainer.train()


def our_side(folder, o, turn):
    """ports/huggingface.py up to its loop, and the loop with turns."""
    from ports import huggingface
    turn("imported")
    records = folder / "records.jsonl"
    cfg, _, tokenizer = huggingface.resolve([str(word) for word in (
        "--init", folder, "--data", records, "--val_data", records, "--out_dir", folder / "ours",
        "--beta", BETA, "--lr", LR, "--batch_size", BATCH, "--device", "cpu", "--dtype", "float32")])
    pairs = train.as_read(flags.load_data(cfg, tokenizer)[0], cfg, None)
    policy, model, _ = huggingface.models(cfg, 0, pairs)
    reference = Reference(model, None, lambda batch: train.response_logps(model, batch, cfg),
                          None if o.live else Memory(folder, pairs, cfg.dtype))
    for batch in [] if o.live else train.batches(pairs, np.arange(len(pairs)), cfg):
        reference(batch, with_kl=False)
    optimizer = train.make_optimizer(policy, cfg)
    turn("ready")
    for i in range(o.steps):
        turn()
        index = step_indices(len(pairs), BATCH, 0, i)
        rows = [train.step(policy, reference, batch, dpo_loss, 1 / BATCH, cfg)
                for batch in train.batches(pairs, index, cfg)]
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        m = train.metrics(train.joined(rows, BATCH), cfg)
        turn([m["loss"], norm.item(), m["rewards/chosen"], m["rewards/rejected"]])


def quiet(folder):
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    import transformers
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def work(function, folder, o, pipe):
    """One side, in this process. It sends "imported", "ready" and the numbers of each step, each with the
    seconds of the turn, the memory held and its peak since "ready", bytes."""
    quiet(folder)
    machine.tune_allocator()  # for both: fresh pages for every chunk of logits would cost TRL the most
    torch.set_num_threads(o.threads)
    began = 0.0

    def turn(numbers=None):
        """turn() waits until a step may begin, turn(numbers) ends it."""
        nonlocal began
        if numbers is None:
            pipe.recv()
            began = time.perf_counter()
            return
        took = time.perf_counter() - began
        if numbers == "ready":
            ctypes.CDLL(None).malloc_trim(0)  # what earlier work has freed is not memory of the steps
            throughput.reset_peak("cpu")
        pipe.send((numbers, took, throughput.memory("cpu"), throughput.peak("cpu")))

    function(folder, o, turn)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("steps", 10), ("hidden", 256), ("layers", 4), ("threads", os.cpu_count())):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--live", action="store_true", help="both run the reference in every step")
    o = parser.parse_args()
    import transformers
    import trl
    about = throughput.where(argparse.Namespace(device="cpu")) | {"threads": o.threads}
    about |= {"trl": trl.__version__, "transformers": transformers.__version__}
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    processes, seconds, memory = multiprocessing.get_context("spawn"), {"trl": [], "ours": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        folder, pipes, base, running = Path(folder), {}, {}, []
        quiet(folder)
        make(folder, o)
        for name, function in (("trl", trl_side), ("ours", our_side)):
            pipes[name], end = processes.Pipe()
            running.append(processes.Process(target=work, args=(function, folder, o, end), daemon=True))
            running[-1].start()
            end.close()  # so that reading from a side that has failed ends
            _, _, base[name], _ = pipes[name].recv()  # with the libraries alone
            pipes[name].recv()
        worst = dict.fromkeys(COMPARED, 0.0)
        for step in range(1, o.steps + 1):
            found = {}
            for name, pipe in pipes.items():
                pipe.send("go")
                found[name], took, _, peak = pipe.recv()
                seconds[name].append(took)
                memory[name] = peak - base[name]
            for (name, scale), a, b in zip(COMPARED.items(), *found.values(), strict=True):
                worst[name] = max(worst[name], scale * abs(a - b))
            print(f"step {step:2d}  loss TRL {found['trl'][0]:.7f}  ours {found['ours'][0]:.7f}  seconds "
                  f"{seconds['trl'][-1]:.2f}  {seconds['ours'][-1]:.2f}", flush=True)
        for process in running:
            process.join()
    print(f"largest differences: loss {worst['loss']:.1e}, gradient norm {worst['grad_norm']:.1e} of "
          f"{found['ours'][1]:.1f}, log-ratio chosen {worst['chosen']:.1e}, rejected {worst['rejected']:.1e}")
    ratios = [a / b for a, b in zip(seconds["trl"], seconds["ours"], strict=True)][1:]  # the first warms up
    a, b = (statistics.median(values[1:]) for values in seconds.values())
    print(f"TRL / ours: {statistics.median(ratios):.1f} x the time ({min(ratios):.1f} to {max(ratios):.1f}; "
          f"{a:.2f} and {b:.2f} s), {memory['trl'] / memory['ours']:.1f} x the memory "
          f"({memory['trl'] / 1e9:.2f} and {memory['ours'] / 1e9:.2f} GB)")
    sys.exit(worst["loss"] > 1e-5)


if __name__ == "__main__":
    main()
