"""The reference's log-probabilities, remembered: each training pair runs through the reference once."""

import numpy as np
import torch

from data import move
from plumbing import ranks
from plumbing.files import write_atomically

class Reference:
    """What the frozen model says of a batch, as keyword arguments of train.head."""

    def __init__(self, model, hidden_states, response_logps, memory=None):
        """model, a GPT; hidden_states(batch) -> (N, C); response_logps(batch) -> (N,); memory, a Memory, or
        None to run the model for every batch."""
        self.model, self.hidden_states, self.response_logps = model, hidden_states, response_logps
        self.memory = memory

    @torch.no_grad()
    def __call__(self, batch, with_kl):
        """{"ref_logps": (N,)}, or for a KL, which needs the whole distribution, {"ref_hidden": (N, C),
        "reference": the model}."""
        if with_kl:
            return {"ref_hidden": self.hidden_states(batch), "reference": self.model}
        if self.memory is None:
            return {"ref_logps": self.response_logps(batch)}
        known = self.memory.read(batch.numbers)  # (N,), NaN where a pair is new
        if ranks.any_of(bool(known.isnan().any())):  # ranks run a sharded model together, or not at all
            known = torch.where(known.isnan(), self.response_logps(batch).to("cpu", known.dtype), known)
            if batch.weight:  # a rank without a pair of its own computes another's again, and keeps nothing
                self.memory.write(batch.numbers, known)
        return {"ref_logps": move(known, batch.tokens.device)}

def no_reference(batch, with_kl):
    """For a loss that has none."""
    return {}

class Memory:
    """One number for each response token of the training pairs, in a memory-mapped file; NaN = not yet. The
    micro-batch that first reads a pair fills its numbers in, so they do not depend on where a run was
    interrupted. float32, or float64 in a float64 run."""

    def __init__(self, folder, pairs, dtype):
        path, kind = folder / "reference-train.bin", np.float64 if dtype == "float64" else np.float32
        counts = pairs.rows["C"] + pairs.rows["R"]
        self.ends = np.cumsum(counts)
        self.starts = self.ends - counts
        ranks.on_main(self.make, path, np.full(self.ends[-1], np.nan, kind))
        self.values = np.memmap(path, kind, "r+")

    def make(self, path, empty):
        """Write the file, unless an earlier start of this run has."""
        if not path.exists() or path.stat().st_size != empty.nbytes:
            write_atomically(path, empty.tofile)  # not mapped: on a full disk a map crashes

    def places(self, numbers):
        return np.concatenate([np.arange(self.starts[i], self.ends[i]) for i in numbers])

    def read(self, numbers):
        """The numbers of some pairs, (N,), in the order of data.collate."""
        return torch.from_numpy(self.values[self.places(numbers)])

    def write(self, numbers, values):
        self.values[self.places(numbers)] = values.numpy()
