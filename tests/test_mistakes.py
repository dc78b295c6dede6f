"""Mutation: every mistake of golden/mistakes.py, put into the code in-process, is caught by the tests.

A mistake in functions of losses.py must make a test of losses.py fail, in each of these functions alone; each
must show in the golden vectors, and no two of them there alike. `python tests/test_mistakes.py` prints who
caught what.
"""

import dataclasses
import importlib.util
import inspect
import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the run as a script

import losses
from golden import check, make, mistakes, pipeline

FAILURES = (Exception, pytest.fail.Exception)                    # the latter is no Exception


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(*files):
    """The tests without arguments in these files, name -> function."""
    tests = {}
    for file in files:
        path = Path(__file__).parent / file
        spec = importlib.util.spec_from_file_location(f"mutated_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tests |= {f"{file}::{name}": test for name, test in vars(module).items()
                  if name.startswith("test_") and not inspect.signature(test).parameters}
    return tests


def first_failure(mistake, tests):
    """The first test that fails under the mistake, None if none does. It goes first the next time."""
    with mistake.applied():
        for name, test in tests.items():
            try:
                test()
            except FAILURES:
                others = {other: tests.pop(other) for other in list(tests) if other != name}
                tests.update(others)
                return name
    return None


def pieces(mistake):
    """The mistake in one function of losses.py at a time: beta missing in dpo_loss, in dpop_loss, ..."""
    for target, replacement in mistake.patches.items():
        if target.startswith("losses."):
            name = mistake.name if len(mistake.patches) == 1 else f"{mistake.name} in {target}"
            yield dataclasses.replace(mistake, name=name, patches={target: replacement})


def caught_by_tests():
    """Every mistake in losses.py, function by function -> the test that catches it, None if none does."""
    tests = load("test_losses.py", "test_identities.py")
    return {piece.name: first_failure(piece, tests)
            for mistake in mistakes.MISTAKES for piece in pieces(mistake)}


def golden_results(mistake):
    """All float64 results under a mistake, name -> tensor."""
    return {f"float64/{regime}/{name}": x for regime in make.REGIMES
            for name, x in check.variant(mistake, "float64", regime, True).items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) or check.equal(name, a[name], b[name]) for name in a)


def test_each_mistake_says_what_it_must():
    """A name of its own, a sentence of its own, a place."""
    assert len({m.name for m in mistakes.MISTAKES}) == len({m.says for m in mistakes.MISTAKES}) \
        == len(mistakes.MISTAKES) >= 117
    for mistake in mistakes.MISTAKES:
        assert mistake.says and mistake.seen and mistake.patches
        assert all(target.rsplit(".", 1)[0] in ("losses", "golden.pipeline") for target in mistake.patches)


def test_a_mistake_is_gone_after_it_was_applied():
    before = dict(vars(losses))
    with pytest.raises(ZeroDivisionError), mistakes.BY_NAME["beta-missing"].applied():
        assert losses.dpo_loss is not before["dpo_loss"]
        raise ZeroDivisionError
    assert vars(losses) == before


@pytest.mark.slow
def test_every_known_mistake_is_caught_by_a_test_of_losses_py():
    missed = [name for name, by in caught_by_tests().items() if by is None]
    assert not missed, f"nothing catches {missed}"


@pytest.mark.slow
def test_every_known_mistake_shows_in_the_golden_vectors_and_no_two_alike(monkeypatch):
    """The two models are built once: no mistake is in them."""
    models, build = {}, pipeline.model_of

    def model_of(inputs, *args):
        key = id(inputs), *args
        return models[key] if key in models else models.setdefault(key, build(inputs, *args))

    monkeypatch.setattr(pipeline, "model_of", model_of)
    found = {m.name: golden_results(m.name) for m in mistakes.MISTAKES}
    right = {name: x for name, x in check.golden().items() if name in found["no-shift"]}
    assert [name for name, results in found.items() if same(right, results)] == []
    assert [(a, b) for a, b in itertools.combinations(found, 2) if same(found[a], found[b])] == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, by in caught_by_tests().items():
        print(f"{name:60s} {by or 'NOTHING'}")
