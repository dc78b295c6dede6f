"""Compare a port's numbers with the golden vectors; if some are wrong, say which known mistake gives them.

    python golden/check.py THEIRS.safetensors

THEIRS holds any of the result tensors under their golden names (golden/README.md). One line for each tensor,
then the verdict; where a loss is right and its gradient does not reach all parameters of the golden model, it
names those. Exit status: 0 all equal, 1 something is off, 2 the file cannot be compared.
"""

import argparse
import difflib
import functools
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder

from golden import make, mistakes, pipeline


class BadInput(Exception):
    """What makes a comparison impossible, in one line for the user."""


@functools.cache
def golden():
    """All golden tensors by name. Raises BadInput where the file is missing."""
    path = make.HERE / "vectors.safetensors"
    if not path.exists():
        raise BadInput(f"{path}: no such file; golden/make.py writes it")
    return load_file(path)


@functools.cache
def inputs(regime):
    """The input tensors of a regime by name."""
    start = f"input/{regime}/"
    return {name.removeprefix(start): tensor for name, tensor in golden().items() if name.startswith(start)}


@functools.cache
def variant(mistake, dtype, regime, gradients):
    """Every result of one regime with one known mistake in it, by name. The first three are names."""
    with mistakes.BY_NAME[mistake].applied():
        return pipeline.results(inputs(regime), getattr(torch, dtype), gradients)


def dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def tolerance(name, theirs):
    """The largest allowed |theirs - golden| / max(1, |golden|): that of the coarser of the two dtypes."""
    dtypes = [name.split("/")[0]] + [dtype_name(theirs)] * theirs.is_floating_point()
    return max(make.TOLERANCE[dtype] for dtype in dtypes)


def relative_error(theirs, ours):
    """|theirs - ours| / max(1, |ours|), elementwise, float64; infinite where just one of them is finite."""
    theirs, ours = theirs.double(), ours.double()
    error = (theirs - ours).abs() / ours.abs().clamp(min=1)
    if not error.isfinite().all():
        both_lost = ~theirs.isfinite() & ~ours.isfinite()        # NaN here and inf there is the same accident
        error = torch.where(both_lost, 0.0, error.nan_to_num(nan=torch.inf))
    return error


def equal(name, theirs, ours):
    error = relative_error(theirs, ours)
    return error.numel() == 0 or error.max().item() <= tolerance(name, theirs)


def read(path):
    """The tensors of a port's file, each with a golden name and that tensor's shape. Raises BadInput."""
    try:
        theirs = load_file(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({error})") from None
    if not theirs:
        raise BadInput(f"{path}: no tensor in it")
    results = [name for name in golden() if not name.startswith("input/")]
    for name, tensor in theirs.items():
        if name.startswith("input/") and name in golden():
            raise BadInput(f"{path}: {name} is an input, not a result: leave it out")
        if name not in golden():
            near = difflib.get_close_matches(name, results, n=1, cutoff=0)[0]
            raise BadInput(f"{path}: {name} is no golden result; the nearest name is {near}")
        if tensor.shape != golden()[name].shape:
            raise BadInput(f"{path}: {name} has shape {list(tensor.shape)}, "
                           f"the golden one {list(golden()[name].shape)}")
        dtype = dtype_name(tensor)
        if tensor.is_complex() or tensor.is_floating_point() and dtype not in make.TOLERANCE:
            raise BadInput(f"{path}: {name} is {dtype}; use one of {', '.join(make.TOLERANCE)}")
    return theirs


def report(name, theirs):
    """One line about one tensor."""
    ours, error = golden()[name], relative_error(theirs, golden()[name])
    lost = ~theirs.double().isfinite()
    if lost.any():
        first = lost.nonzero()[0].tolist()
        return f"off  {name}  NaN or infinite at {lost.sum()} of {lost.numel()} places, first at {first}"
    worst = error.max().item()
    if worst <= tolerance(name, theirs):
        return f"ok   {name}  within {worst:.0e}"
    at = tuple((error == worst).nonzero()[0].tolist())
    return (f"off  {name}  by {worst:.3g} (tolerance {tolerance(name, theirs):.0e}), worst at {list(at)}: "
            f"yours {theirs[at].item():.10g}, golden {ours[at].item():.10g}")


def gives(mistake, name, theirs, gradients):
    """Whether the known mistake leads to this tensor."""
    dtype, regime, result = name.split("/", 2)
    return equal(name, theirs, variant(mistake, dtype, regime, gradients)[result])


def loss_and_what(name):
    """float64/gpt/dpo/grad/ln_f.bias -> ("dpo", "grad/ln_f.bias"), float64/gpt/chosen_logps -> ("", ...)."""
    _, _, *loss, what = name.replace("/grad/", "/grad ").split("/")
    return loss[0] if loss else "", what


def unreached(theirs, fine):
    """Parameters that the gradient of a right loss does not reach: 0, or absent where others are sent.

    Returns a dict, "float64/gpt/dpo" -> names of parameters.
    """
    found = {}
    for start in {name.split("/grad/")[0] for name in theirs if "/grad/" in name}:
        if f"{start}/loss" in fine:
            dead = [name.split("/grad/")[1] for name in golden() if name.startswith(f"{start}/grad/")
                    and not (name in theirs and theirs[name].any())]
            found |= {start: dead} if dead else {}
    return found


def explanations(off, fine):
    """The known mistakes that give every tensor in off; if some of these give all in fine as well, only they.

    Args: off and fine, name -> tensor, the port's wrong and right results. Returns a list of mistakes.
    """
    grads = any(name.endswith("_logits") or "/grad/" in name for name in [*off, *fine])
    found = [m for m in mistakes.MISTAKES if all(gives(m.name, name, t, grads) for name, t in off.items())]
    return [m for m in found if all(gives(m.name, name, t, grads) for name, t in fine.items())] or found


def subject(names):
    """What is wrong, in words with a verb: "dpop value equals", "tdpo2 gradient, chosen_seq_kl equal"."""
    words = {}                                                   # a dict keeps the order
    for name in names:
        loss, what = loss_and_what(name)
        values = any(n.endswith(f"/{loss}/loss") for n in names)
        if loss and what == "loss":
            words[f"{loss} value"] = True
        elif loss and not (values and what.startswith("grad")):
            words[f"{loss} {'gradient' if what.startswith('grad') else 'reward'}"] = True
        elif not loss:
            words[what] = True
    words = list(words)
    more = f" and {len(words) - 4} more" if len(words) > 4 else ""
    return ", ".join(words[:4]) + more + (" equal" if len(words) > 1 else " equals")


def verdict(off, fine):
    """Lines that name the mistakes behind the wrong tensors: one for all of them, else loss by loss."""
    found = explanations(off, fine)
    groups = {}
    for name, tensor in off.items():
        groups.setdefault(loss_and_what(name)[0], {})[name] = tensor
    if found or len(groups) == 1:
        groups = {"": off}
    named = {}                                                   # names of mistakes -> the tensors they give
    for group in groups.values():
        found = explanations(group, fine)
        named.setdefault(tuple(m.name for m in found), []).extend(group)
    lines = []
    for found, names in named.items():
        if not found:
            lines.append(f"your {subject(names)} no known mistake's")
        for i, mistake in enumerate(mistakes.BY_NAME[name] for name in found):
            lines.append(f"{'or equals' if i else 'your ' + subject(names)} {mistake.says}")
            lines.append(f"    [{mistake.name}; seen in {mistake.seen}]")
        if len(found) > 1:
            lines.append("    (more regimes or tensors in your file would tell these apart)")
    return lines


def main(argv=None):
    """Check one file, print the result. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare a port's results with the golden vectors.")
    parser.add_argument("theirs", help="a .safetensors file with result tensors under their golden names")
    path = parser.parse_args(argv).theirs
    try:
        theirs = read(path)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    fine, off = {}, {}
    for name in sorted(theirs):
        print(report(name, theirs[name]))
        (fine if equal(name, theirs[name], golden()[name]) else off)[name] = theirs[name]
    dtypes = {name.split("/")[0] for name in theirs}
    missing = sum(name.split("/")[0] in dtypes and name not in theirs for name in golden())
    print(f"{len(theirs)} compared: {len(fine)} ok, {len(off)} off; "
          f"{missing} other {'/'.join(sorted(dtypes))} results are not in the file")
    dead = unreached(theirs, fine)
    for start, parameters in sorted(dead.items()):
        print(f"your {start.split('/')[2]} loss is right and its gradient does not reach these parameters: "
              f"{', '.join(parameters)}")
    off = {name: tensor for name, tensor in off.items() if name.split("/grad/")[0] not in dead}
    if off:
        print("\n".join(verdict(off, fine)))
    return 1 if off or dead else 0


if __name__ == "__main__":
    torch.set_num_threads(1)                                     # tiny tensors: threads would only wait
    sys.exit(main())
