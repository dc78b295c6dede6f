"""Write the golden vectors: golden/vectors.safetensors and golden/vectors.json. `--check` compares instead.

    python golden/make.py             write both files
    python golden/make.py --check     compare them with what would be written; exit status 1 if it differs

The inputs come from SHAKE-256 of a name, not from a random generator, so that they are the same in every
version of every library. Logits are multiples of 1/1024, exact in float32 and float64. Results are computed
in float64 by losses.py; the float32 ones are these, rounded once: the right answer, not one machine's.
Two regimes have the parameters of a tiny GPT in the place of logits: the results of one end in the gradients
of each parameter, where a loss that is right and trains nothing shows; those of the other come after a step.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder

from golden import pipeline
from model import GPT, GPTConfig

HERE = Path(__file__).resolve().parent
FORMAT = 1
END_OF_TEXT = 0                                                  # also what pads a row, as GPT-2's users do
BEGIN_OF_TEXT = 5                                                # in regime ids only
VOCAB = 7
ASPECT_MAX = (4, 4, 2)                                           # raw scores are integers, 0 ... maximum
ASPECT_WEIGHTS = (0.5, 0.25, 0.25)                               # W: sums to 1, exact in binary
UNIT = 1024                                                      # logits, parameters: multiples of 1 / UNIT
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-2}

# pairs: (prompt tokens, chosen segment lengths, rejected segment lengths); end-of-text is in the last one.
# chosen, rejected, noise: the policy's logits minus the reference's, in 1/1024: added to the labels of that
# response, and at most this much on any logit. ties: scores are 0 or the maximum. pad: unused columns.
# scores: raw scores in the place of drawn ones, a word for each segment, a digit for each aspect.
# gpt: no logits, but the parameters of two GPTs; the policy's are at most this far from the reference's.
# rate: one GPT, from which policy and reference start; a step of gradient descent at this rate.
# end_of_text, begin_of_text: ids; the prompt of the first pair then ends in begin-of-text.
# holes: some tokens of a response are not scored, some are in no segment. left: rows padded on the left.
# vocab, masked: V, and how many of its last tokens have the logit -inf. repeat: rows as often, on end.
# lean: results in float64 only, without gradients in the logits, but for the losses that it names.
REGIMES = {
    "healthy": dict(
        about="chosen above the reference, rejected below; some tokens of the chosen one below it",
        pairs=[(3, (2, 3), (3, 2)), (2, (4, 2, 1), (2, 2, 2)), (4, (3,), (4,))], chosen=900, rejected=-500),
    "start": dict(
        about="the policy is the reference: every loss at its starting value, DPOP's hinge at 0 exactly",
        pairs=[(2, (2, 2), (3, 2)), (3, (1, 2, 2), (2, 3))], noise=0),
    "unhealthy": dict(
        about="both responses below the reference, chosen less so: DPOP's hinge is active",
        pairs=[(3, (2, 2), (2, 3)), (1, (3, 2), (3, 3)), (2, (2, 1, 2), (1, 2, 2))],
        chosen=-700, rejected=-1400),
    "ties": dict(
        about="several segments with the same reward: the order of the text decides",
        pairs=[(2, (1, 2, 1, 2, 1, 2), (2, 1, 1, 2, 1)), (2, (2, 1, 1, 1), (1, 2, 1, 1, 2, 1))], ties=True),
    "segments": dict(
        about="more segments on one side than on the other: N = min(S_w, S_l), pair by pair",
        pairs=[(3, (2, 1, 3, 2), (3, 2)), (2, (2, 2), (1, 3, 2, 2, 1)), (2, (3,), (2, 2, 3))],
        chosen=-300, rejected=-600),
    "padding": dict(
        about="rows of very different length and columns that only padding uses; absent segments",
        pairs=[(5, (6, 5), (1,)), (1, (1,), (4, 2, 3, 2)), (2, (2, 1), (1, 1))], pad=4),
    "long": dict(
        about="40 response tokens in 20 segments, more ties than an unstable sort keeps in order",
        pairs=[(6, (2,) * 20, (2,) * 18), (4, (3, 1) * 9, (1, 3) * 10)], ties=True, noise=300),
    "extreme": dict(
        about="logits of 800, gaps of 800 to 1000, log-ratios of thousands: all stays finite",
        pairs=[(2, (2, 3), (3, 1)), (2, (6, 5), (2, 3))], extreme=True),
    "empty-prompt": dict(
        about="an empty prompt, which is one end-of-text: the first response token is predicted from it",
        pairs=[(0, (2, 2), (2, 1)), (0, (1, 2), (2, 3))], chosen=-400, rejected=200),
    "fifths": dict(
        about="five aspects of 0 to 4, W uniform: equal rewards whose sums differ by rounding are ties",
        pairs=[(2, (1, 2, 1, 2, 1), (2, 1, 1, 2)), (1, (1, 2, 2), (2, 2))], chosen=-300, rejected=-500,
        aspect_max=(4,) * 5, aspect_weights=(0.2,) * 5,          # floats have 03222 < 00333 and 03022 < 00034
        scores=[("03222 00333 00034 03022 10000", "00333 03222 03022 00034"),
                ("44444 03222 00333", "00034 03022")]),
    "gpt": dict(
        about="a GPT of two layers: d loss / d parameter, where a gradient that never arrives shows",
        pairs=[(3, (2, 2), (3, 2)), (2, (3, 2), (2, 2, 2))], gpt=200),
    "ids": dict(
        about="3 is end-of-text, token 0 an ordinary one; a begin-of-text (5) before a response is not",
        pairs=[(3, (3, 3), (4, 2)), (2, (2, 4), (3, 3))], chosen=-300, rejected=200, end_of_text=3,
        begin_of_text=BEGIN_OF_TEXT, lean=()),
    "close-rewards": dict(
        about="rewards 0.004 and 2e-5 apart, which differ, and sums that are equal in exact arithmetic",
        pairs=[(2, (1, 1, 1, 2), (2, 1, 1, 1)), (1, (1, 1, 1, 1, 2), (1, 2, 1, 1))], chosen=-300,
        aspect_max=(4, 4, 4, 4, 10000), aspect_weights=(0.2125, 0.1875, 0.2, 0.2, 0.2), lean=(), rejected=400,
        scores=[("2,3,1,2,5000 0,1,1,4,10000 1,1,1,1,5000 1,1,1,1,5001",  # 159/320 twice
                 "0,1,0,0,5200 0,1,0,0,5000 0,1,0,0,5001 4,4,4,4,9999"),
                ("3,0,0,0,200 3,0,0,0,0 2,3,1,2,5000 0,1,2,3,10000 3,0,0,0,1",
                 "1,0,0,0,7500 1,0,0,1,5000 2,2,2,2,2 2,2,2,2,1")]),  # 13/64 twice
    "holes": dict(
        about="tokens amid a response that are not scored, tokens in no segment, a segment without a token",
        pairs=[(2, (3, 0, 4, 2), (4, 3, 2)), (1, (3, 3), (2, 0, 3, 3))], chosen=-400, rejected=-700,
        holes=True, lean=()),
    "left": dict(
        about="rows padded on the left",
        pairs=[(3, (2, 2), (3,)), (1, (2, 1, 1), (4, 3))], chosen=-300, rejected=300, left=True, lean=()),
    "vocabulary": dict(
        about="64 tokens, the last four with the logit -inf in both models, as in a masked vocabulary",
        pairs=[(2, (2, 2), (3,)), (1, (3,), (2, 2))], chosen=-500, rejected=300, vocab=64, masked=4,
        lean=("tdpo2",)),
    "thousands": dict(
        about="each row 128 times on end, 2200 scored tokens: sums in float32 lose digits",
        pairs=[(1, (5, 8, 4), (6, 6, 5)), (2, (9, 8), (10, 7))], noise=20, chosen=-12, rejected=-25,
        repeat=128, lean=()),
    "second-step": dict(
        about="policy and reference start as one GPT; each loss after a step of gradient descent on it",
        pairs=[(2, (2, 2), (3, 1)), (3, (3,), (2, 2))], gpt=0, rate=1.0, lean=()),
}
GPT_SIZE = dict(vocab_size=VOCAB, block_size=12, n_layer=2, n_head=pipeline.N_HEAD, n_embd=8)

RESULTS = {                                                      # name: (shape, meaning)
    "{side}_token_logps": ("B,T", "log pi(token t | the tokens before it), 0 where response_mask is False"),
    "ref_{side}_token_logps": ("B,T", "the same under the reference"),
    "{side}_token_kl": ("B,T", "KL(pi_ref || pi) where token t is predicted, 0 where response_mask is False"),
    "{side}_logps": ("B", "log pi(y|x), the sum over the response"),
    "ref_{side}_logps": ("B", "the same under the reference"),
    "{side}_seq_kl": ("B", "D_SeqKL(x, y; pi_ref || pi), the sum over the response"),
    "{side}_segment_logps": ("B,S", "log-probabilities summed over each segment, 0 for an absent segment"),
    "ref_{side}_segment_logps": ("B,S", "the same under the reference"),
    "{side}_rewards": ("B,S", "r_k = W (scores / aspect_max); absent segments hold what the formula gives"),
    "{side}_selected": ("B,K", "int64: the segments that Eq. 6 of 2D-DPO selects, in order; -1 from k = N"),
    "LOSS/loss": ("B", "the loss of each pair; in second-step after w - rate dL/dw, L their sum"),
    "LOSS/{side}_reward": ("B", "beta log pi(y|x)/pi_ref(y|x); dpo, dpop, tdpo1, tdpo2"),
    "LOSS/grad_{side}_logps": ("B; 2d: B,S", "d loss / d logps, the KLs held fixed; 2d: / d segment_logps"),
    "LOSS/grad_{side}_seq_kl": ("B", "d loss / d D_SeqKL; tdpo1, tdpo2"),
    "LOSS/grad_{side}_logits": ("B,T,V", "d loss / d logits, through everything; not in every regime"),
    "LOSS/grad/PARAMETER": ("its own", "d loss.sum() / d parameter of the policy; regime gpt"),
}
INPUTS = {
    "{side}_ids": ("B,T", "int64: prompt, response, padding; end-of-text closes a response and is scored"),
    "{side}_response_mask": ("B,T", "bool: True on the response tokens, end-of-text included"),
    "{side}_segments": ("B,T", "int64: the segment of each response token, -1 elsewhere"),
    "{side}_scores": ("B,S,A", "float32, raw; absent segments hold the maximum and must have no effect"),
    "{side}_logits": ("B,T,V", "float32, multiples of 1/1024: column t predicts token t + 1; not in gpt"),
    "ref_{side}_logits": ("B,T,V", "the same of the reference"),
    "aspect_max": ("A", "float32: divide the scores by it"),
    "aspect_weights": ("A", "float64: W"),
    "policy/PARAMETER": ("its own", "float32, multiples of 1/1024, matrices (out, in); regime gpt"),
    "reference/PARAMETER": ("its own", "the same of the reference"),
    "model/PARAMETER": ("its own", "the same of both at the start; regime second-step"),
    "rate": ("", "float32: of the step of gradient descent; regime second-step"),
    "repeat": ("", "int64: how often each row stands on end along T; regime thousands"),
    "period/NAME": ("as NAME", "one of the inputs above, (B,T) or (B,T,V), before that; regime thousands"),
}

def integers(name, count, low, high):
    """`count` integers, low ... high inclusive, a pure function of the name. Returns int64 (count,)."""
    raw = np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * count), dtype="<u4").astype(np.int64)
    return low + raw % (high - low + 1)

def reference_logits(key, regime):
    """The reference's logits after one prefix, in 1/UNIT. Returns int64 (V,)."""
    V = regime.get("vocab", VOCAB)
    if not regime.get("extreme"):
        return integers(f"{key}/ref", V, -2 * UNIT, 2 * UNIT)
    logits = UNIT // 4 * integers(f"{key}/ref", V, -4 * 200, 0)
    logits[integers(f"{key}/top", 1, 0, V - 1)[0]] = 800 * UNIT  # one token far above the others
    return logits

def make_rows(name, pair, regime):
    """Both rows of one pair, chosen and rejected: lists of ids, segment ids, reference and policy logits.

    Logits are a function of the prefix before them, as in a language model: equal prefixes, equal logits.
    """
    prompt_len, *lengths = regime["pairs"][pair]
    extreme, noise = regime.get("extreme"), regime.get("noise", 900)
    end, V = regime.get("end_of_text", END_OF_TEXT), regime.get("vocab", VOCAB)

    def words(part, count):                                      # any token but end-of-text and masked ones
        drawn = integers(f"{name}/{pair}/{part}", count, 0, V - 2 - regime.get("masked", 0))
        return (drawn + (drawn >= end)).tolist()

    prompt = words("prompt", prompt_len) or [end]
    if "begin_of_text" in regime and pair == 0:
        prompt[-1] = regime["begin_of_text"]

    def key(prefix):
        return f"{name}/{pair}/{prefix}"

    rows, added = [], {}                                         # added: prefix -> what the policy adds, (V,)
    for side, lens in zip(pipeline.SIDES, lengths, strict=True):
        ids = prompt + words(side, sum(lens) - 1) + [end]
        if extreme and pair == 1 and side == "chosen":           # tokens that the reference is sure of
            for t in range(len(prompt), len(ids) - 1):
                ids[t] = int(reference_logits(key(ids[:t]), regime).argmax()) or 1
        for t in range(len(prompt), len(ids)):
            added.setdefault(key(ids[:t]), np.zeros(V, np.int64))[ids[t]] += regime.get(side, 0)
        segments = [-1] * len(prompt) + [k for k, n in enumerate(lens) for _ in range(n)]
        rows.append((ids, segments))

    def policy_logits(prefix):
        k, ref = key(prefix), reference_logits(key(prefix), regime)
        if not extreme:
            return ref + added.get(k, 0) + integers(f"{k}/policy", V, -noise, noise)
        if pair == 1:                                            # sure of another token
            ref = np.roll(ref, 1)
        return ref + UNIT // 4 * integers(f"{k}/policy", V, -12, 12)

    return [(ids, segments, [reference_logits(key(ids[:t + 1]), regime) for t in range(len(ids))],
             [policy_logits(ids[:t + 1]) for t in range(len(ids))]) for ids, segments in rows]

def make_parameters(name, distance):
    """The parameters of both GPTs of a regime, or of one if they are equal: input names, float32."""
    inputs = {}
    with torch.random.fork_rng(devices=[]):                      # for names and shapes
        gpt = GPT(GPTConfig(**GPT_SIZE))
    for parameter, x in gpt.named_parameters():
        start = UNIT if "ln_" in parameter and parameter.endswith("weight") else 0
        ref = start + integers(f"{name}/{parameter}", x.numel(), -UNIT // 2, UNIT // 2)
        policy = ref + integers(f"{name}/{parameter}/policy", x.numel(), -distance, distance)
        for which, values in (("policy", policy), ("reference", ref)) if distance else (("model", ref),):
            inputs[f"{which}/{parameter}"] = torch.tensor(values / UNIT, dtype=torch.float32).view(x.shape)
    return inputs

def make_inputs(name):
    """The input tensors of a regime, by name (INPUTS above)."""
    regime = REGIMES[name]
    tops, V = regime.get("aspect_max", ASPECT_MAX), regime.get("vocab", VOCAB)
    pairs = [make_rows(name, pair, regime) for pair in range(len(regime["pairs"]))]
    B, T = len(pairs), max(len(row[0]) for pair in pairs for row in pair) + regime.get("pad", 1)
    weights = regime.get("aspect_weights", ASPECT_WEIGHTS)
    inputs = {"aspect_max": torch.tensor(tops, dtype=torch.float32),
              "aspect_weights": torch.tensor(weights, dtype=torch.float64)}
    rows = {}
    for side, which in zip(pipeline.SIDES, (0, 1), strict=True):
        S = max(len(p[1 + which]) for p in regime["pairs"])
        ids = np.full((B, T), regime.get("end_of_text", END_OF_TEXT))
        segments, mask = np.full((B, T), -1), np.full((B, T), False)
        scores = np.tile(np.array(tops), (B, S, 1))              # (B, S, A)
        logits = {ref: integers(f"{name}/{side}/{ref}padding", B * T * V, -UNIT, UNIT)
                  .reshape(B, T, V) / UNIT for ref in ("", "ref_")}
        for b, pair in enumerate(pairs):
            row_ids, row_segments, row_ref, row_policy = pair[which]
            n, at = len(row_ids), T - len(row_ids) if regime.get("left") else 0
            here = slice(at, at + n)
            ids[b, here], segments[b, here] = row_ids, row_segments
            mask[b, here] = segments[b, here] >= 0
            logits["ref_"][b, here], logits[""][b, here] = np.array([row_ref, row_policy]) / UNIT
            if regime.get("holes"):
                inside = np.flatnonzero(mask[b])[:-1]            # end-of-text stays
                mask[b, inside[2::5]] = False
                segments[b, [*inside[2::5], *inside[4::5]]] = -1
            count = len(regime["pairs"][b][1 + which])
            if "scores" in regime:
                scores[b, :count] = [[*map(int, word.split(",") if "," in word else word)]
                                     for word in regime["scores"][b][which].split()]
                continue
            for a, top in enumerate(tops):
                drawn = integers(f"{name}/{b}/{side}/scores/{a}", count, 0, 1 if regime.get("ties") else top)
                scores[b, :count, a] = drawn * (top if regime.get("ties") else 1)
        rows |= {f"{side}_ids": torch.tensor(ids), f"{side}_segments": torch.tensor(segments),
                 f"{side}_response_mask": torch.tensor(mask)}
        inputs[f"{side}_scores"] = torch.tensor(scores, dtype=torch.float32)
        for ref in ("", "ref_") if "gpt" not in regime else ():
            logits[ref][..., V - regime.get("masked", 0):] = -np.inf
            rows[f"{ref}{side}_logits"] = torch.tensor(logits[ref], dtype=torch.float32)
    if "repeat" in regime:
        inputs["repeat"] = torch.tensor(regime["repeat"])
        return inputs | {f"period/{k}": x for k, x in rows.items()}
    if "rate" in regime:
        inputs["rate"] = torch.tensor(regime["rate"])
    return inputs | rows | (make_parameters(name, regime["gpt"]) if "gpt" in regime else {})

def kept(regime, name):
    """Whether a result of a regime is in the file."""
    if "lean" not in REGIMES[regime]:
        return True
    if name.endswith("_logits"):
        return name.split("/")[0] in REGIMES[regime]["lean"]
    return regime != "thousands" or "_token_" not in name and name not in ("chosen_seq_kl", "rejected_seq_kl")

def make_vectors():
    """All tensors of the file: input/REGIME/..., float64/REGIME/..., float32/REGIME/..."""
    vectors = {}
    for regime in REGIMES:
        inputs = make_inputs(regime)
        vectors |= {f"input/{regime}/{name}": tensor for name, tensor in inputs.items()}
        found = pipeline.results(inputs, torch.float64)
        vectors |= {f"float64/{regime}/{name}": x for name, x in found.items() if kept(regime, name)}
    vectors |= {name: x for name, x in in_float32(vectors).items()
                if "lean" not in REGIMES[name.split("/")[1]]}
    return {name: tensor.contiguous() for name, tensor in sorted(vectors.items())}

def in_float32(vectors):
    """The float32 results: the float64 ones rounded once. Names of the former -> tensors."""
    return {name.replace("64", "32", 1): x.float() if x.is_floating_point() else x.clone()
            for name, x in vectors.items() if name.startswith("float64/")}

def make_description(vectors):
    """The JSON beside the tensors: what they mean, with which hyper-parameters, at which tolerance."""
    sizes = {}
    for regime in REGIMES:
        period = "period/" * ("repeat" in REGIMES[regime])
        B, T = vectors[f"input/{regime}/{period}chosen_ids"].shape
        (S_w, A), (S_l, _) = (vectors[f"input/{regime}/{side}_scores"].shape[1:] for side in pipeline.SIDES)
        sizes[regime] = {"about": REGIMES[regime]["about"], "B": B, "T": T,
                         "V": REGIMES[regime].get("vocab", VOCAB), "A": A,
                         "S_chosen": S_w, "S_rejected": S_l, "K": min(S_w, S_l)}
        sizes[regime] |= {k: x for k, x in REGIMES[regime].items() if k in ("end_of_text", "begin_of_text")}
    return {
        "format": FORMAT,
        "names": "input/REGIME/NAME, float64/REGIME/NAME, float32/REGIME/NAME; {side} is chosen or rejected, "
                 "LOSS one of the losses below",
        "conventions": [
            "two rows for a pair, prompt + chosen and prompt + rejected, padded with end-of-text on the "
            "right, in regime left on the left",
            "logits at column t predict token t + 1; everything else is aligned with the tokens",
            "log-probabilities are sums in nats, never means; end-of-text is scored and in the last segment",
            "segments are half-open; K = min(S_chosen, S_rejected), N the same of the segments the pair has",
            "the k-th best chosen segment meets the k-th worst rejected one, ties in the order of the text; "
            "rewards that differ by rounding are ties: sorted, a gap above 1e-5 begins a new group",
            "gradients are those of the sum over the pairs; reference and rewards are constants",
            f"float64 only: {', '.join(r for r in REGIMES if 'lean' in REGIMES[r])}; float32: these rounded",
        ],
        "end_of_text": END_OF_TEXT,
        "tolerance": {"rule": "|yours - golden| <= tolerance * max(1, |golden|)", **TOLERANCE},
        "losses": pipeline.HYPER,
        "gpt": GPT_SIZE,
        "regimes": sizes,
        "inputs": {name: {"shape": shape, "meaning": text} for name, (shape, text) in INPUTS.items()},
        "results": {name: {"shape": shape, "meaning": text} for name, (shape, text) in RESULTS.items()},
    }

def rendered():
    """What the two files hold now: (bytes of the safetensors file, text of the JSON, the tensors)."""
    vectors = make_vectors()
    text = json.dumps(make_description(vectors), indent=1, ensure_ascii=False) + "\n"
    return save(vectors, {"format": str(FORMAT)}), text, vectors  # one key: the order of several is not fixed

def differences(folder=HERE):
    """How the files in the folder differ from what would be written: a list of lines, empty if they do not.

    Elsewhere than on the machine that wrote them the last bits may: 1e-12 relative, float32 one rounding.
    """
    missing = [name for name in ("vectors.safetensors", "vectors.json") if not (folder / name).exists()]
    if missing:
        return [f"{folder / name}: no such file" for name in missing]
    _, text, vectors = rendered()
    there = load_file(folder / "vectors.safetensors")
    lines = [f"{name}: only in {'the file' if name in there else 'the new vectors'}"
             for name in sorted(there.keys() ^ vectors.keys())]
    if (folder / "vectors.json").read_text(encoding="utf-8") != text:
        lines.append("vectors.json: another text")
    for name in sorted(there.keys() & vectors.keys()):
        new, old = vectors[name], there[name]
        if new.dtype != old.dtype or new.shape != old.shape:
            lines.append(f"{name}: now {new.dtype} {tuple(new.shape)}, was {old.dtype} {tuple(old.shape)}")
        elif new.is_floating_point() and not torch.equal(new, old):
            limit = 1e-12 if new.dtype == torch.float64 else 1.2e-7
            error = ((new - old).abs() / old.abs().clamp(min=1)).max().item()
            if not error <= limit:
                lines.append(f"{name}: off by {error:.1e}")
        elif not torch.equal(new, old):
            lines.append(f"{name}: other integers")
    return lines

def main(argv=None):
    """Write the files, or compare with --check. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the golden vectors, or compare them.")
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    if parser.parse_args(argv).check:
        lines = differences()
        print("\n".join(lines) or "the golden vectors are what losses.py gives")
        return 1 if lines else 0
    data, text, vectors = rendered()
    (HERE / "vectors.safetensors").write_bytes(data)
    (HERE / "vectors.json").write_text(text, encoding="utf-8")
    print(f"{len(vectors)} tensors, {len(data) / 1e6:.2f} MB")
    return 0

if __name__ == "__main__":
    sys.exit(main())
