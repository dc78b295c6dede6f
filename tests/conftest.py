"""What all tests share: one thread, for the models are tiny and the machine is shared. And their many small
runs end quickly, with answers of a few tokens and without waiting for the disk."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch

from plumbing import report

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it; tests send it


@pytest.fixture(autouse=True, scope="session")
def quick_ends():
    """test_folder.py puts its own fsync here and watches it; test_flags.py's run without arguments, in a
    process of its own, has the real ends."""
    whole = report.answer

    def answer(model, *args):
        def generate(tokens, n, **more):
            return model.generate(tokens, 4, **more)
        return whole(SimpleNamespace(wte=model.wte, generate=generate), *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "answer", answer)
        patch.setattr(os, "fsync", lambda file: None)
        yield
