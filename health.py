"""Do the numbers of a run look right? What stops it, what is remarked on, and what a result usually means.

Watch sees every step of train.train. Needs torch, and RunError from runs.
"""

import math
from collections import defaultdict, deque

import torch

from runs import RunError


def check_start(cfg, m):
    """Where the policy is the reference, the loss is log 2 (2D-DPO's Eq. 6: N log 2) and every margin 0."""
    expected = math.log(2) * m.get("segments/paired", 1)
    nats = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2e-2}[cfg.dtype]  # a log-ratio may be off by
    slope = cfg.beta * (1 + (cfg.lam or 0)) / 2  # of the loss in a log-ratio at 0; DPOP's is 7.65 by default
    if not (abs(m["loss"] - expected) <= nats * max(1, slope)
            and abs(m["rewards/margins"]) <= nats * max(1, cfg.beta)):  # NaN too
        raise RunError(f"policy and reference are equal, yet the loss is {m['loss']:.6f}, not "
                       f"{expected:.6f}, or the margin {m['rewards/margins']:.6f}, not 0: please report this")
    name = "mean N log 2" if "segments/paired" in m else "log 2"
    return f"loss {m['loss']:.4f} = {name}, margin {m['rewards/margins']:.4f}: the policy is the reference"


class Watch:
    """Stops a run before an update that would destroy it; notes what usually means a mistake."""

    def __init__(self, note):
        self.note = note  # note(step, text) prints and logs a line
        self.noted, self.usual = set(), defaultdict(lambda: deque(maxlen=20))

    def before_update(self, step, rows, norm, where):
        """Gradient norm (a scalar tensor) -> float. rows are a step's, where names the line of each pair.
        Raises RunError where the loss or the gradient is not finite."""
        numbers = [x.double() for x in (norm, *largest_logratio(rows))]
        norm, ratio, which, total = torch.stack(numbers).tolist()  # the step's one wait for the device
        if not math.isfinite(norm + total):
            raise RunError(unhealthy_step(step, rows, where, norm, ratio))
        if is_spike(self.usual["norm"], norm):
            self.note(step, f"step {step}: the gradient norm jumps to {norm:.2f}")
        if is_spike(self.usual["ratio"], ratio, least=10):
            pair = where[int(which)]
            self.note(step, f"step {step}: the largest log-ratio jumps to {ratio:.1f} nats, {pair}")
        return norm

    def after_log(self, step, m):
        """Note each alarm once a run: they do not pass by themselves."""
        for name, text in alarms(step, m).items():
            if name not in self.noted:
                self.note(step, text)
                self.noted.add(name)


def largest_logratio(rows):
    """Of a step: the largest |log pi/pi_ref| in nats (0 for SFT), the number of its pair, and the sum of the
    losses; each a scalar tensor."""
    t = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}  # (B,)
    ratios = [(t[f"{side}_logps"] - t.get(f"ref_{side}_logps", t[f"{side}_logps"])).abs()
              for side in ("chosen", "rejected")]
    ratio, which = torch.maximum(*ratios).max(0)  # NaN counts as the largest
    return ratio, which, t["loss"].sum()


def is_spike(usual, value, least=0):
    """Is a value above `least` and five times the median of the (up to 20) before it? It joins them."""
    spike = len(usual) >= 10 and value > max(least, 5 * sorted(usual)[len(usual) // 2])
    usual.append(value)
    return spike


def unhealthy_step(step, rows, where, norm, ratio):
    """Why a run stopped before an update that would have destroyed it; names the pairs with a bad loss."""
    loss = torch.cat([row["loss"] for row in rows])  # (B,)
    bad = [place for place, ok in zip(where, loss.isfinite().tolist(), strict=True) if not ok] or where
    return (f"step {step}: mean loss {loss.mean().item():g}, gradient norm {norm:g}; stopped before the "
            f"update, the checkpoints are intact. Largest log-ratio: {ratio:.1f} nats. "
            f"Pairs: {', '.join(bad[:8])}" + f" and {len(bad) - 8} more" * (len(bad) > 8))


def alarms(step, m):
    """{name: one line} on numbers that usually mean a mistake."""
    chosen, found = m.get("logratio/chosen", 0.0), {}
    if "rewards/margins" in m and step >= 50 and m["rewards/margins"] == 0:
        found["stuck"] = "the margin is still exactly 0: nothing is learned; is --lr far too small?"
    if step <= 5 and m.get("rewards/accuracies", 0) == 1:
        found["early"] = ("accuracy 1.0 this early: does something cheap give the answer away? "
                          "See tools/doctor.py")
    if chosen < -10:
        found["unlearned"] = (f"chosen is {-chosen:.1f} nats below the reference, good answers are unlearned "
                              "too: a smaller --lr or a larger --beta slows it, dpop is made against it")
    return found


def verdict(step, m, loss="dpo"):
    """One line on what the numbers usually mean."""
    chosen, rejected = m.get("logratio/chosen", 0.0), m.get("logratio/rejected", 0.0)
    for text in alarms(step, m).values():
        return text
    if rejected < chosen < 0:
        why = {"dpo": ": expected in DPO, see DPOP", "dpop": ": the penalty lam is active"}.get(loss, "")
        return f"rejected falls faster; chosen is {-chosen:.1f} nats below the reference{why}"
    if rejected < 0 < chosen:
        return f"chosen rises by {chosen:.1f} nats, rejected falls by {-rejected:.1f}"
    if 0 < rejected < chosen:
        return f"both rise, chosen faster: {chosen:.1f} and {rejected:.1f} nats above the reference"
    if chosen < rejected:
        return f"chosen {chosen:+.1f}, rejected {rejected:+.1f} nats: on average the rejected response gains"
    return "no remark"
