"""Mutation: every mistake of golden/mistakes.py, put into the code in-process, is caught by the tests.

A mistake in functions of losses.py must make a test of losses.py fail, in each of these functions alone; it
must show in the golden vectors too, and a mistake around the losses (golden.pipeline) there.
`python tests/test_mistakes.py` prints who caught what.
"""

import dataclasses
import functools
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for the run as a script

import losses
from golden import check, make, mistakes

HERE = Path(__file__).resolve().parent
CATCHERS = {                                                     # broken module: the files that must notice
    "losses": ("test_losses.py", "test_identities.py"),
    # "data": ("test_data.py",) once golden/mistakes.py has replacements for functions of data.py (no shift,
    # mask, segments). Tests that need a fixture or a parameter are not run here.
}
FAILURES = (Exception, pytest.fail.Exception)                    # the latter is no Exception


def is_slow(test):
    return any(mark.name == "slow" for mark in getattr(test, "pytestmark", []))


def load(files):
    """The quick tests without arguments in these files, name -> function.

    The files are executed anew, so that a function that one of them keeps in a table is the replaced one.
    """
    tests = {}
    for file in files:
        spec = importlib.util.spec_from_file_location(f"mutated_{Path(file).stem}", HERE / file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tests |= {f"{file}::{name}": test for name, test in vars(module).items()
                  if name.startswith("test_") and inspect.isfunction(test) and not is_slow(test)
                  and not inspect.signature(test).parameters}
    return tests


def reached_functions(module):
    """Runs the tests on the right code. Returns test -> the functions of the module that it calls."""
    seen, reached = set(), {}

    def recorded(name, function):
        @functools.wraps(function)
        def call(*args, **knobs):
            seen.add(name)
            return function(*args, **knobs)
        return call

    functions = {name: f for name, f in vars(importlib.import_module(module)).items()
                 if inspect.isfunction(f) and f.__module__ == module}
    patches = {f"{module}.{name}": recorded(name, f) for name, f in functions.items()}
    with mistakes.Mistake("none", "nothing", "", patches).applied():
        for test, function in load(CATCHERS[module]).items():
            seen.clear()
            function()
            reached[test] = set(seen)
    return reached


def first_failure(module, mistake, reached):
    """The first test that fails under the mistake, None if none does. Tests that failed before go first."""
    broken = {target.removeprefix(f"{module}.") for target in mistake.patches}
    everywhere = not broken <= set().union(*reached.values())    # no function: losses.py's F
    with mistake.applied():
        tests = load(CATCHERS[module])
        for test in list(reached):
            if everywhere or reached[test] & broken:
                try:
                    tests[test]()
                except FAILURES:
                    others = {name: reached.pop(name) for name in list(reached) if name != test}
                    reached |= others
                    return test
    return None


def pieces(mistake):
    """The mistake in one function at a time: beta missing in dpo_loss, in dpop_loss, ..."""
    for target, replacement in mistake.patches.items():
        if target.rsplit(".", 1)[0] in CATCHERS:
            name = mistake.name if len(mistake.patches) == 1 else f"{mistake.name} in {target}"
            yield dataclasses.replace(mistake, name=name, patches={target: replacement})


def shows_in_golden(mistake):
    """The first golden result that the mistake changes, None if it changes none."""
    for regime in make.REGIMES:
        for name, value in check.variant(mistake.name, "float64", regime, True).items():
            name = f"float64/{regime}/{name}"
            if not check.equal(name, value, check.golden()[name]):
                return name
    return None


def catches():
    """Every mistake, function by function -> the test or golden result that catches it, None if none does."""
    reached = {module: reached_functions(module) for module in CATCHERS}
    caught = {}
    for mistake in mistakes.MISTAKES:
        for piece in pieces(mistake):
            module = next(iter(piece.patches)).rsplit(".", 1)[0]
            caught[piece.name] = first_failure(module, piece, reached[module])
        if any(target.startswith(("losses.", "golden.")) for target in mistake.patches):
            caught[f"{mistake.name}, golden"] = shows_in_golden(mistake)
    return caught


def test_the_list_is_long_enough_and_says_what_it_must():
    """At least 30 mistakes, each with a name of its own, a sentence of its own and a place."""
    assert len(mistakes.MISTAKES) >= 30
    assert len({m.name for m in mistakes.MISTAKES}) == len(mistakes.MISTAKES)
    assert len({m.says for m in mistakes.MISTAKES}) == len(mistakes.MISTAKES)
    for mistake in mistakes.MISTAKES:
        assert mistake.affects and mistake.says and mistake.seen and mistake.patches
        for target in mistake.patches:
            assert target.rsplit(".", 1)[0] in [*CATCHERS, "golden.pipeline"]


def test_a_mistake_is_gone_after_it_was_applied():
    before = dict(vars(losses))
    with pytest.raises(ZeroDivisionError), mistakes.BY_NAME["beta-missing"].applied():
        assert losses.dpo_loss is not before["dpo_loss"]
        raise ZeroDivisionError
    assert vars(losses) == before


@pytest.mark.slow
def test_every_known_mistake_is_caught():
    """By a test of losses.py if it is a mistake in a function of losses.py, and by the golden vectors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                     # tiny tensors: threads would only wait
    try:
        missed = [name for name, by in catches().items() if by is None]
    finally:
        torch.set_num_threads(threads)
    assert not missed, f"nothing catches {missed}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, by in catches().items():
        print(f"{name:60s} {by or 'NOTHING'}")
