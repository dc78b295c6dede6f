"""Compare a port's numbers with the golden vectors; if some are wrong, say which known mistake gives them.

    python golden/check.py THEIRS.safetensors

THEIRS holds any of the result tensors under their golden names (golden/README.md). One line for each tensor,
then the verdict: the mistakes that give the wrong numbers, of all losses together, or loss by loss, or regime
by regime, two at a time if one is not enough; constants that are off; float32 inside; a gradient that does
not arrive. Exit status: 0 all equal, 1 something is off, 2 the file cannot be compared.
"""

import argparse
import difflib
import functools
import itertools
import math
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder

from golden import make, mistakes, pipeline
from golden.mistakes import Mistake

HALF = ("bfloat16", "float16")
AT_A_KINK = ("start", "second-step")                             # regimes where DPOP's hinge is at 0 exactly
EARLY = {f"golden.pipeline.{name}" for name in (                 # what is called before the losses
    "predicting_logits", "scored_tokens", "kl_tokens", "position_kl", "sequence_sum", "sequence_kl",
    "token_segments", "segment_logps", "normalised")} | {
    f"losses.{name}" for name in ("token_logps", "token_kl", "segment_sum", "segment_rewards")}

class BadInput(Exception):
    """What makes a comparison impossible, in one line for the user."""

@functools.cache
def golden():
    """All golden tensors by name. Raises BadInput where the file is missing."""
    path = make.HERE / "vectors.safetensors"
    if not path.exists():
        raise BadInput(f"{path}: no such file; golden/make.py writes it")
    there = load_file(path)
    return make.in_float32(there) | there

@functools.cache
def inputs(regime):
    """The input tensors of a regime by name."""
    start = f"input/{regime}/"
    there = {name.removeprefix(start): tensor for name, tensor in golden().items() if name.startswith(start)}
    return pipeline.unrolled(there)

# ---- What mistakes lead to ----

@functools.cache
def logits(dtype, regime):
    """No mistake is in the logits: computed once. Returns them and the parameters behind them, by name."""
    return pipeline.all_logits(inputs(regime), getattr(torch, dtype))

def is_early(mistake):
    return not EARLY.isdisjoint(mistake.patches)

@functools.cache
def below(early, dtype, regime):
    """The quantities below the losses, by name, with some mistakes made."""
    with mistakes.applied(early):
        return pipeline.quantities(inputs(regime), logits(dtype, regime)[0], getattr(torch, dtype))

@functools.cache
def variant(made, slope, dtype, regime, loss, what):
    """Results of one loss or ("") below the losses, with mistakes made, a tuple, and a slope of hinges at 0.

    what: "value", the loss alone; "near", gradients in its arguments, too; "all", also those in logits.
    """
    x = inputs(regime)
    with mistakes.applied(made, slope):
        if "rate" in x:
            return pipeline.results_after_a_step(loss, x, getattr(torch, dtype))
        q = below(tuple(m for m in made if is_early(m)), dtype, regime)
        if not loss:
            return pipeline.results_below(q)
        if what == "value":
            return {f"{loss}/loss": pipeline.loss_value(loss, q).detach()}
        return pipeline.results_of(loss, q, *logits(dtype, regime), what == "all")

def result(made, slope, name):
    """One result, a golden name, with some mistakes made."""
    dtype, regime, rest = name.split("/", 2)
    what = "value" if rest.endswith("/loss") and regime != "second-step" else \
        "all" if rest.endswith("_logits") or "/grad/" in rest else "near"
    return variant(made, slope, dtype, regime, by_loss(name), what)[rest]

@functools.cache
def touches(mistake, loss):
    """Whether a mistake can change results of this loss, or ("") those below the losses."""
    for target in mistake.patches:
        name = target.removeprefix("losses.")
        if name == "select_segments":
            yes = loss in ("", "2d-dpo")
        elif name.endswith("_loss"):
            yes = loss and name == pipeline.losses.LOSSES[loss].__name__
        else:
            yes = loss or target in EARLY
        if yes:
            return True
    return False

# ---- Comparison ----

def dtype_name(tensor):
    return str(tensor.dtype).removeprefix("torch.")

def tolerance(name, theirs, loose=False):
    """The largest allowed |theirs - golden| / max(1, |golden|): that of the coarser of the two dtypes."""
    dtypes = [name.split("/")[0]] + [dtype_name(theirs)] * theirs.is_floating_point() + ["float32"] * loose
    return max(make.TOLERANCE[dtype] for dtype in dtypes)

def relative_error(theirs, ours):
    """|theirs - ours| / max(1, |ours|), elementwise, float64; infinite where just one of them is finite."""
    theirs, ours = theirs.double(), ours.double()
    error = (theirs - ours).abs() / ours.abs().clamp(min=1)
    if not error.isfinite().all():
        both_lost = ~theirs.isfinite() & ~ours.isfinite()        # NaN here and inf there is the same accident
        error = torch.where(both_lost, 0.0, error.nan_to_num(nan=torch.inf))
    return error

def worst(theirs, ours):
    return relative_error(theirs, ours).max().item() if theirs.numel() else 0.0

def equal(name, theirs, ours, loose=False):
    return worst(theirs, ours) <= tolerance(name, theirs, loose)

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
        dtype, floats = dtype_name(tensor), golden()[name].is_floating_point()
        if floats and dtype not in make.TOLERANCE:
            hint = " (the bits of bfloat16 numbers? view them as bfloat16)" if dtype == "uint16" else ""
            raise BadInput(f"{path}: {name} is {dtype}{hint}; use one of {', '.join(make.TOLERANCE)}")
        if not floats and tensor.is_floating_point():
            raise BadInput(f"{path}: {name} is {dtype}; it holds indices, use int64")
    return theirs

def side_of(name):
    return "rejected" if "rejected" in name else "chosen"

def outside(name):
    """Where a result's numbers belong to no response token or no segment: bool, or None if all belong."""
    x, what = inputs(name.split("/")[1]), name.split("/")[-1]
    mask = x[f"{side_of(name)}_response_mask"]
    if what.endswith(("token_logps", "token_kl")):
        return ~mask
    if what.endswith("_logits"):                                 # column t predicts token t + 1
        return ~torch.cat([mask[:, 1:], 0 * mask[:, :1]], 1).bool().unsqueeze(-1).expand(golden()[name].shape)
    if what.endswith("segment_logps") or "/2d-dpo" in name and what.endswith("_logps"):
        slots = torch.arange(golden()[name].shape[1])
        return ~(x[f"{side_of(name)}_segments"].unsqueeze(-1) == slots).any(1)
    return None

def report(name, theirs):
    """One line about one tensor."""
    ours, error = golden()[name], relative_error(theirs, golden()[name])
    lost = ~theirs.double().isfinite()
    if lost.any():
        line = (f"off  {name}  NaN or infinite at {lost.sum()} of {lost.numel()} places, "
                f"first at {lost.nonzero()[0].tolist()}")
        free = outside(name)
        if free is not None and not (lost & ~free).any():
            line += ", all outside the response: where(mask, x, 0) came too late, mask before log and exp"
        return line
    if worst(theirs, ours) <= tolerance(name, theirs):
        return f"ok   {name}  within {worst(theirs, ours):.0e}"
    at = tuple((error == error.max()).nonzero()[0].tolist())
    return (f"off  {name}  by {error.max().item():.3g} (tolerance {tolerance(name, theirs):.0e}), "
            f"worst at {list(at)}: yours {theirs[at].item():.10g}, golden {ours[at].item():.10g}")

def loss_and_what(name):
    """float64/gpt/dpo/grad/ln_f.bias -> ("dpo", "grad/ln_f.bias"), float64/gpt/chosen_logps -> ("", ...)."""
    _, _, *loss, what = name.replace("/grad/", "/grad ").split("/")
    return loss[0] if loss else "", what

def split(tensors, key):
    """A dict of tensors in parts with one key(name) each: {key: part}."""
    parts = {}
    for name, tensor in tensors.items():
        parts.setdefault(key(name), {})[name] = tensor
    return parts

def by_loss(name):
    return loss_and_what(name)[0]

def by_regime(name):
    return name.split("/")[1]

def cost(name):
    """0 for a loss, 1 for a gradient in its arguments, ... : what computing a result with mistakes costs."""
    if by_regime(name) == "second-step":
        return 4
    if name.endswith("_logits") or "/grad/" in name:
        return 3
    return 0 if name.endswith("/loss") else 1 if by_loss(name) else 2

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

# ---- Explanations. Each is a tuple of mistakes and the slope of their hinges at 0 ----

class Port:
    """The right results of a port, next to which wrong ones are explained."""
    def __init__(self, fine):
        self.fine, self.searches = fine, 3                       # searches for pairs, which are slow

    def give(self, explanation, tensors, loose=True):
        """Whether the mistakes lead to all of these tensors, or (loose) to them in float32's precision."""
        return all(equal(name, tensors[name], result(*explanation, name), loose)
                   for name in sorted(tensors, key=cost))

    def fine_beside(self, off):
        """The right results of the same losses and of what is below them."""
        losses = {"", *map(by_loss, off)}
        return {name: t for name, t in self.fine.items() if by_loss(name) in losses}

    def best(self, found, off):
        """Of several explanations the closest, of these those that fit the right results, too, if any do."""
        fine = self.fine_beside(off)
        found = [e for e in found if self.give(e, off, loose=False)] or found
        return [e for e in found if self.give(e, fine)] or found if len(found) > 1 else found

    def singles(self, off):
        losses = {by_loss(name) for name in off}
        kink = "dpop" in losses and any(by_regime(name) in AT_A_KINK for name in off)
        found = []
        for mistake in mistakes.MISTAKES:
            if all(touches(mistake, loss) for loss in losses):
                slopes = (0.0, 0.5, 1.0) if kink and mistake.name.startswith("dpop") else (0.0,)
                fits = (((mistake,), slope) for slope in slopes if self.give(((mistake,), slope), off))
                found += itertools.islice(fits, 1)
        return self.best(found, off)

    def probe(self, off):
        """The wrong results of one regime that are quick to compute: of the loss, or else gradients."""
        quick = {name: t for name, t in off.items() if cost(name) < 3 and by_loss(name)}
        parts = split(quick, lambda name: (cost(name), by_regime(name) in AT_A_KINK, by_regime(name)))
        return parts[min(parts)] if parts else {}

    def candidates(self, probe):
        """Mistakes that may be one of two: they touch the loss and contradict nothing sent from below it."""
        (loss, regime), = {(by_loss(name), by_regime(name)) for name in probe}
        sent = {name: t for name, t in self.fine.items() if not by_loss(name) and by_regime(name) == regime
                and not name.endswith(("_selected", "_rewards"))}
        return [m for m in mistakes.MISTAKES if touches(m, loss) and not m.definition
                and (not is_early(m) or self.give(((m,), 0.0), sent))]

    def pairs(self, off):
        """Two mistakes at once in one loss."""
        probe = self.probe(off) if self.searches else {}
        self.searches -= bool(probe)
        both = itertools.combinations(self.candidates(probe), 2) if probe else ()
        found = [((a, b), 0.0) for a, b in both if mistakes.combine(a, b)
                 and not (is_early(a) and is_early(b) and "mean" not in a.name + b.name)  # slow, and rare
                 and self.give(((a, b), 0.0), probe)]
        return self.best([e for e in found if self.give(e, off)], off)

    def constants(self, off, bases=((),)):
        """A hyper-parameter with another value, or a term with some weight; bases: mistakes besides."""
        probe = self.probe(off)
        if not probe:
            return []
        name = next(iter(probe))
        loss, (dtype, regime, what) = by_loss(name), name.split("/", 2)
        error = relative_error(probe[name], golden()[name])
        at = tuple((error == error.max()).nonzero()[0].tolist())
        for base in bases:
            q = below(tuple(m for m in base if is_early(m)), dtype, regime)
            for words, value, patches in mistakes.constants(loss)[:1 if base else None]:
                def with_number(x, base=base, patches=patches, q=q):
                    with mistakes.applied((*base, Mistake("", "", patches(x)))):
                        if cost(name) == 0:
                            return pipeline.loss_value(loss, q)[at].item()
                        return pipeline.results_of(loss, q, {}, {}, False)[what][at].item()
                x = root(with_number, value, probe[name][at].item())
                if x is not None:
                    found = Mistake("constant", words.format(f"{x:.4g}"), patches(float(f"{x:.4g}")))
                    whole = ((*base, found), 0.0)
                    fine = {n: t for n, t in self.fine_beside(off).items() if by_loss(n)}
                    if self.give(whole, off) and self.give(whole, fine):
                        return [whole]
        return []

    def parts(self, off):
        """The wrong results of one loss in parts: a list of (explanations, tensors); [] explains nothing."""
        found = self.singles(off) or self.constants(off)
        if found:
            return [(found, off)]
        dead = {name: t for name, t in off.items() if "/grad" in name and not t.any()}
        if dead and len(dead) < len(off):
            stopped = ((mistakes.BY_NAME["policy-gradient-stopped"],), 0.0)
            return [([stopped], dead), *self.parts({name: t for name, t in off.items() if name not in dead})]
        regimes, apart = split(off, by_regime), []
        for regime in sorted(regimes, key=lambda regime: regime == "second-step"):
            slow = regime == "second-step" and not all(found for found, _ in apart)
            apart.append(([] if slow else self.singles(regimes[regime]), regimes[regime]))
        if len(apart) > 1 and all(found for found, _ in apart):
            return apart
        probe = self.probe(off) if self.searches else {}
        found = self.pairs(off)
        if probe and not found:
            found = self.constants(off, [(m,) for m in self.candidates(probe)])
        return [(found, off)] if found or len(apart) == 1 else apart

    def unstable(self, off):
        """Selections whose rewards are right, in another order of equal ones, and what follows in 2d-dpo."""
        explained = {}
        chosen = {name: t for name, t in off.items() if name.endswith("_selected")}
        for name, index in chosen.items():
            rank = mistakes.rank(golden()[f"float64/{by_regime(name)}/{side_of(name)}_rewards"])
            theirs, ours = (rank.gather(1, i.clamp(0, rank.shape[1] - 1)) for i in (index, golden()[name]))
            if torch.equal(theirs, ours):
                explained |= {n: t for n, t in off.items() if by_regime(n) == by_regime(name)
                              and (n == name or by_loss(n) == "2d-dpo")}
        return explained

def root(f, x, target):
    """Where f(x) is the target, by secants from x, or None."""
    a, b = x, 2 * x or 0.1
    fa, fb = f(a) - target, f(b) - target
    for _ in range(15):
        if not (math.isfinite(fb) and math.isfinite(b)) or fb == fa:
            return None
        if abs(fb) < 1e-12 * max(1, abs(target)):
            return b
        a, fa, b = b, fb, b - fb * (b - a) / (fb - fa)
        fb = f(b) - target
    return b if abs(fb) < 1e-7 * max(1, abs(target)) else None

# ---- Words ----

def subject(names, verb="equal"):
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
    return ", ".join(words[:4]) + more + (f" {verb}" if len(words) > 1 else f" {verb}s")

def sentences(port, explanations, off):
    """Lines about wrong results with the same explanations, or with none."""
    if not explanations:
        return [f"your {subject(off)} no known mistake's, nor (in three losses at most) two at once"]
    lines = []
    for i, (made, slope) in enumerate(explanations):
        says = ", and ".join(m.says for m in made)
        says += f", with a hinge whose slope at 0 is {slope:g}" * (slope > 0)
        if made[0].definition:
            says = f"another definition, not a mistake in the loss: {says}"
        lines.append(f"{'or equals' if i else 'your ' + subject(off)} {says}")
        lines += [f"    [{m.name}; seen in {m.seen}]" for m in made if m.name != "constant"]
    if len(explanations) > 1:
        lines.append("    (more regimes or tensors in your file would tell these apart)")
    if not port.give(explanations[0], off, loose=False):
        lines.append("    (to float32's precision only: computed in float32 somewhere, besides)")
    return lines

def float32_inside(off):
    """The wrong results that are right to float32 or to float32 sums of many tokens, and words for it."""
    near = {name for name, t in off.items() if worst(t, golden()[name]) <= make.TOLERANCE["float32"]}
    sums = {name for name, t in off.items()
            if by_regime(name) == "thousands" and worst(t, golden()[name]) < 0.02}
    if near | sums == off.keys() and sums - near:
        return off, "sums of thousands of tokens: add in float64, or log pi - log pi_ref token by token"
    return {name: off[name] for name in off if name in near}, "computed in float32 somewhere"

def without(tensors, names):
    return {name: t for name, t in tensors.items() if name not in names}

def verdict(off, fine):
    """Lines that name the mistakes behind the wrong tensors: one for all of them, else loss by loss."""
    lines, port = [], Port(fine)
    if any(dtype_name(t) in HALF for t in off.values()):
        lines.append("half precision throughout is not expected to pass: compute in float32, or round exact "
                     "results; below are only numbers that rounding does not explain")
        off = {name: t for name, t in off.items() if dtype_name(t) not in HALF
               or worst(t, golden()[name]) > 10 * tolerance(name, t)}
    found = port.singles(off) if off else []
    if found:
        return lines + sentences(port, found, off)
    near, where = float32_inside(off)
    if near:
        lines.append(f"your {subject(near, 'agree')} with golden to float32's precision only: {where}")
        off = without(off, near)
    ties = port.unstable(off)
    if ties:
        found = port.singles(ties)
        lines += sentences(port, found, ties) if found else [
            f"your {subject(ties)} those of an unstable sort: equal rewards in another order than the text's"]
        off = without(off, ties)
    named = {}                                                   # explanations -> the tensors they give
    for part in split(off, by_loss).values():
        for found, tensors in port.parts(part):
            named.setdefault(tuple(found), {}).update(tensors)
    for found, tensors in named.items():
        lines += sentences(port, found, tensors)
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
