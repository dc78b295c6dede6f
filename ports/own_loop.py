"""From logits to any of the losses, inside a training loop of your own. Needs losses.py and torch."""

import torch

from losses import LOSSES, segment_sum, terms_of, token_kl, token_logps

def preference_loss(name, logits, ref_logits, ids, segments, rewards=None, **knobs):
    """A loss of losses.py for B pairs, (B,): preference_loss("tdpo2", ..., beta=0.1, alpha=0.5).mean().

    Rows 0 ... B-1 are prompt + chosen, rows B ... 2B-1 prompt + rejected, padded on either side.
    Args: logits, ref_logits (2B, T, V), as the models return them; ids (2B, T); segments (2B, T), 0 on the
    tokens of the response, its end-of-text included, -1 on all others. 2D-DPO: there the segment of each
    response token, 0 ... S-1, and rewards (2B, S).
    """
    scored, S = segments[:, 1:] >= 0, 1 if rewards is None else rewards.shape[1]
    z, z_ref, targets = (x[scored] for x in (logits[:, :-1], ref_logits[:, :-1], ids[:, 1:]))  # the shift
    place = scored.nonzero()[:, 0] * S + segments[:, 1:][scored]

    def both(key, values):
        """(N,) -> sums over chosen and over rejected responses, (B,), or over their segments, (B, S)."""
        sums = segment_sum(values, place, len(ids) * S).view(len(ids), -1)
        return named(key, sums if rewards is not None else sums.squeeze(-1))

    def named(key, x):
        return dict(zip((key.format("chosen"), key.format("rejected")), x.chunk(2), strict=True))

    terms = both("{}_logps", token_logps(z, targets))
    terms |= both("ref_{}_logps", token_logps(z_ref, targets).detach())
    if "chosen_seq_kl" in terms_of(LOSSES[name]):
        terms |= both("{}_seq_kl", token_kl(z_ref.detach(), z))
    if rewards is not None:
        there = segments.unsqueeze(-1) == torch.arange(S, device=segments.device)  # (2B, T, S)
        terms |= named("{}_rewards", rewards) | named("{}_mask", there.any(1))
    return LOSSES[name](**{term: terms[term] for term in terms_of(LOSSES[name])}, **knobs)
