"""Mutation: every mistake of golden/mistakes.py, put into the code in-process, is caught by the tests.

A mistake in functions of losses.py must make a test of losses.py fail, in each of these functions alone; each
must show in the golden vectors, and no two of them there alike. `python tests/test_mistakes.py` prints who
caught what.
"""

import dataclasses
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the run as a script

import losses
from golden import check, make, mistakes

pytestmark = pytest.mark.slow

FAILURES = (Exception, pytest.fail.Exception)                    # the latter is no Exception

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

def test_each_mistake_says_what_it_must():
    """A name of its own, a sentence of its own, a place; and no framework's kink is borrowed for it."""
    assert len({m.name for m in mistakes.MISTAKES}) == len({m.says for m in mistakes.MISTAKES}) \
        == len(mistakes.MISTAKES) >= 140
    for mistake in mistakes.MISTAKES:
        assert mistake.says and mistake.seen and mistake.patches
        assert all(target.rsplit(".", 1)[0] in ("losses", "golden.pipeline") for target in mistake.patches)

def test_a_mistake_is_gone_after_it_was_applied():
    before = dict(vars(losses))
    with pytest.raises(ZeroDivisionError), mistakes.applied([mistakes.BY_NAME["beta-missing"]], slope=1.0):
        assert losses.dpo_loss is not before["dpo_loss"] and mistakes.SLOPE == 1
        raise ZeroDivisionError
    assert vars(losses) == before and mistakes.SLOPE == 0

@pytest.mark.slow
def test_every_known_mistake_is_caught_by_a_test_of_losses_py():
    missed = [name for name, by in caught_by_tests().items() if by is None]
    assert not missed, f"nothing catches {missed}"

def test_every_known_mistake_shows_in_the_golden_vectors_and_no_two_alike(monkeypatch):
    """Regime by regime, those that are still alike go on to the next; none may borrow the slope of a kink."""
    def kink(*args, **kwargs):
        raise AssertionError("its slope at a kink differs by framework and version")

    for name in ("clamp", "clip", "relu", "abs", "maximum", "minimum"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, *args, f=original, **kwargs:
                            kink() if x.requires_grad else f(x, *args, **kwargs))
    alike = [[None, *mistakes.MISTAKES]]                         # None: no mistake
    for regime in sorted(make.REGIMES, key=lambda r: (r in ("second-step", "gpt", "long", "thousands"), r)):
        parts = []
        for group in alike:
            found = {}                                           # a result of each part, and who is in it
            for mistake in group:
                x = torch.cat([check.result((mistake,) if mistake else (), 0.0, name).double().flatten()
                               for name in check.golden() if name.startswith(f"float64/{regime}/")
                               and (check.cost(name) != 3 or "/tdpo2/" in name)])  # few of the slow gradients
                x = x.nan_to_num(nan=1e99, posinf=1e99, neginf=1e99)
                same = next((y for y in found if y.allclose(x, rtol=1e-9, atol=1e-9)), x)
                found.setdefault(same, []).append(mistake)
            parts += [part for part in found.values() if len(part) > 1]
        alike = parts
    assert [[m.name if m else "right" for m in part] for part in alike] == []

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, by in caught_by_tests().items():
        print(f"{name:60s} {by or 'NOTHING'}")
