"""What all tests share: one thread, for the models are tiny and the machine is shared. And their many small
runs end quickly, with answers of a few tokens and without waiting for the disk."""

import os
import signal

import pytest
import torch

from plumbing import report

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it; tests send it

@pytest.fixture(autouse=True, scope="session")
def quick_ends():
    """test_folder.py puts its own fsync here and watches it."""
    whole = report.answer

    def answer(model, *args):
        with pytest.MonkeyPatch.context() as patch:
            generate = model.generate
            patch.setattr(model, "generate", lambda tokens, n, **more: generate(tokens, 4, **more))
            return whole(model, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "answer", answer)
        patch.setattr(os, "fsync", lambda file: None)
        yield
