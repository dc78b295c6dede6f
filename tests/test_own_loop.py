"""ports/own_loop.py gives the golden losses and their gradients in the logits."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from golden import make
from ports.own_loop import preference_loss

GOLDEN = load_file(make.HERE / "vectors.safetensors")
KNOBS = json.loads((make.HERE / "vectors.json").read_text())["losses"]
REGIMES = sorted(name.split("/")[1] for name in GOLDEN
                 if name.startswith("float64") and name.endswith("/dpo/grad_chosen_logits"))
SIDES = ("chosen", "rejected")

def stacked(x, y, fill):
    """Chosen rows, then rejected rows, with columns up to the longer ones."""
    width = max(x.shape[1], y.shape[1])
    pad = [0, 0] * (x.dim() - 2)
    return torch.cat([F.pad(t, [*pad, 0, width - t.shape[1]], value=fill) for t in (x, y)])

@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", KNOBS)
def test_golden_losses_and_gradients(name, regime):
    given = {side: {end: GOLDEN[f"input/{regime}/{start}{side}_{end.removeprefix('ref_')}"]
                    for start, end in (("", "logits"), ("ref_", "ref_logits"), ("", "ids"), ("", "segments"),
                                       ("", "response_mask"), ("", "scores"))} for side in SIDES}
    weights, top = (GOLDEN[f"input/{regime}/aspect_{end}"].double() for end in ("weights", "max"))
    w, l_ = given.values()
    logits, ref_logits = (stacked(w[end].double(), l_[end].double(), 0.0) for end in ("logits", "ref_logits"))
    if name.startswith("2d"):
        segments = stacked(w["segments"], l_["segments"], -1)
        rewards = stacked(*((x["scores"].double() / top @ weights) for x in (w, l_)), 1.0)
    else:
        segments, rewards = stacked(*(x["response_mask"].long() - 1 for x in (w, l_)), -1), None
    logits.requires_grad_()
    loss = preference_loss(name, logits, ref_logits, stacked(w["ids"], l_["ids"], 0), segments, rewards,
                           **KNOBS[name])
    torch.testing.assert_close(loss, GOLDEN[f"float64/{regime}/{name}/loss"], rtol=1e-9, atol=1e-9)
    found = torch.autograd.grad(loss.sum(), logits)[0].chunk(2)
    for side, gradient in zip(SIDES[:1] if name == "sft" else SIDES, found, strict=name != "sft"):
        golden = GOLDEN[f"float64/{regime}/{name}/grad_{side}_logits"]
        padding = (0, 0, 0, gradient.shape[1] - golden.shape[1])
        torch.testing.assert_close(gradient, F.pad(golden, padding), rtol=1e-9, atol=1e-9)
