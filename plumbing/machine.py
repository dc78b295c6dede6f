"""The machine: settings that torch reads (import this module before it), compiler, allocator, memory."""

import ctypes
import os

# Idle OpenMP threads should sleep: spinning makes steps of a small model 10 times slower on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A bfloat16 product on the CPU caches its workspace for 1024 shapes; with ever new shapes memory would grow.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
# Batches of changing sizes fragment CUDA's memory without it.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import functools
import platform
import shutil
import sys
import sysconfig
from contextlib import nullcontext
from pathlib import Path

import torch

# cuDNN's attention gives NaN gradients for masked rows of some lengths on Hopper (pytorch issue 196678).
torch.backends.cuda.enable_cudnn_sdp(False)

ALIGN = 64  # rows of the embedding table are a multiple of it: aligned logits multiply faster, on CPUs too

def tune_allocator():
    """For Linux CPUs, before the first tensor: glibc takes large buffers fresh from the kernel, which clears
    them, for each chunk's logits anew, a tenth of a step. From the heap (up to 1 GB stays unused) not."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, bytes

def best_device():
    return "cuda" if torch.cuda.is_available() else "cpu"

def usable(device):
    """True if torch can compute on this device here."""
    try:
        torch.zeros(1, device=device).item()
        return True
    except (RuntimeError, AssertionError, ImportError, ValueError):
        return False

def device_name(device):
    kind, threads = torch.device(device).type, torch.get_num_threads()
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    return kind.upper() + (f", {threads} thread{'s' if threads > 1 else ''}" if kind == "cpu" else "")

def can_compile():
    """torch.compile needs a C++ compiler and Python's headers."""
    return bool(shutil.which("g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()

@functools.cache
def compiled(function):
    """torch.compile of a function, once; sizes may change from call to call."""
    torch._dynamo.config.recompile_limit = 32  # two models, with gradient and without, one row and more
    return torch.compile(function, dynamic=True)

def compile_blocks(model):
    """torch.compile of a new model's blocks, in place: they share a graph, so depth costs no time."""
    torch._dynamo.config.recompile_limit = 32
    for block in model.h:
        block.compile(dynamic=True)

def eager():
    """A context in which compiled blocks run as they are written: answers are of ever new lengths."""
    compiling = "torch._dynamo" in sys.modules  # importing it takes a second
    return torch.compiler.set_stance("force_eager") if compiling else nullcontext()

def peak_memory(device):
    """Bytes: the most that the GPU's allocator held, or the process's largest resident size, or NaN."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # absent on Windows
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
