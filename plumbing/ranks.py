"""The processes of `torchrun train.py`: one rank a device.

Every rank holds a shard of policy, optimizer and live reference (fully_shard: FSDP2) and takes a share of
each step's pairs. Sums are over all ranks, so the numbers are those of one process; rank 0 alone prints and
writes. Without torchrun there is one rank, no process group and no wrapper: nothing here does anything.

Gradients are reduced once a step, in the trunk's last backward. The tied head runs outside forward, and each
chunk has its own backward: the root's weights (embeddings, last LayerNorm) stay whole from a forward to the
end of its backward, so that chunks need no communication and add to the gradient that the trunk reduces.
"""

import functools
import math
import os
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from plumbing.errors import ConfigError, RunError

def rank():
    return int(os.environ["RANK"]) if world() > 1 else 0

def world():
    return int(os.environ.get("WORLD_SIZE", 1))

def only_main(function):
    """On rank 0 the function itself; on the others it does nothing and returns None."""
    @functools.wraps(function)
    def guarded(*args, **kwargs):
        return None if rank() else function(*args, **kwargs)
    return guarded

def start(device):
    """Join the other ranks. A dead one ends the run at once (torchrun), one that hangs after half an hour."""
    if world() > 1 and not dist.is_initialized():
        gpu = None if device == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if gpu:
            torch.cuda.set_device(gpu)  # what "cuda" means from here on
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(minutes=30), device_id=gpu)
    wait()

def wait():
    if world() > 1:
        dist.barrier()

def stop():
    if dist.is_initialized():
        dist.destroy_process_group()

def yield_to_main(seconds=5):
    """Wait, so that rank 0 reports the shared error first."""
    if rank():
        time.sleep(seconds)

def shard(model):
    """Shard the weights over the ranks, in place."""
    if world() > 1:
        shard_over(model, world())

def shard_over(model, n):
    """fully_shard; a frozen model's head stays whole: no backward will gather it again."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(model.wte.weight.device.type, (n,))
    trained = any(p.requires_grad for p in model.parameters())
    for module in (*model.h, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not model)
        module.set_gradient_divide_factor(1.0)  # a sum over ranks, not a mean
        module.set_force_sum_reduction_for_comms(True)  # without a division: gloo and NCCL know this one
    if not trained:
        model.unshard()

def reshard(model):
    """After an evaluation, so that parameters() are the shards again."""
    if world() > 1:
        model.reshard()

def unshard(model):
    """Make all weights whole, on every rank, for good."""
    if world() > 1:
        model.set_reshard_after_forward(False)
        for module in (model, *model.h):
            module.unshard()

def share(index, cut):
    """The pairs of a step -> [(micro-batch, weight)] of this rank, which takes every world-th pair, longest
    first, in micro-batches by cut(index). Stand-ins of weight 0 make their number that of every rank."""
    order = np.concatenate(cut(index))
    shares = [cut(order[r::world()]) for r in range(world())]
    own = [(micro, 1) for micro in shares[rank()]]
    return own + [(order[-1:], 0)] * (max(map(len, shares)) - len(own))

def reduce_gradients(model, now):
    """Gradients are summed over the ranks in the last backward of a step."""
    if world() > 1:
        model.set_requires_gradient_sync(now)

def gather(terms, n):
    """{name: (pairs,)} of this rank's micro-batches -> of all n pairs, in the order of the step."""
    if world() == 1:
        return terms
    own, width = torch.stack([x.double() for x in terms.values()]), math.ceil(n / world())  # (names, pairs)
    own = F.pad(own, (0, width))[:, :width]  # stand-ins are beyond this rank's share
    dist.all_gather(parts := [torch.empty_like(own) for _ in range(world())], own)
    return dict(zip(terms, torch.stack(parts, -1).flatten(1)[:, :n], strict=True))  # from every world-th

def any_of(number):
    """The largest of the ranks' whole numbers or truth values, on every rank."""
    if world() == 1:
        return number
    number = torch.tensor(int(number), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()

def on_main(function, *args):
    """Call on rank 0 alone, and return there what it returns; where that fails, every rank stops."""
    result = error = None
    try:
        result = only_main(function)(*args)
    except (ConfigError, RunError) as e:
        error = e
    if any_of(error is not None):
        raise error or RunError("rank 0 has stopped the run and says why")
    return result

def whole(tensor):
    """A sharded tensor in one piece, on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

def like(p, tensor):
    """A tensor of p's shape, sharded as p is."""
    if hasattr(p, "full_tensor") and tensor.shape == p.shape:
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return tensor
