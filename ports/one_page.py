"""Four preference losses on one page: python ports/one_page.py [dpo | dpop | tdpo2 | 2d-dpo]

Read it from top to bottom with the papers open: a small GPT learns the toy reviews, in a minute on a CPU. It
imports nothing of ours; a test holds its losses to train.py's. x is the prompt, y_w the chosen response, y_l
the rejected one; pi is the policy, pi_ref its frozen copy; B pairs, T columns, V tokens, S segments.
"""

import argparse
import base64
import copy
import json
from pathlib import Path
from types import SimpleNamespace

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 cuts text into words

TOY = Path(__file__).resolve().parent.parent / "toy"
LINES = [line.split() for line in (TOY / "toy.tiktoken").read_bytes().splitlines()]
BPE = tiktoken.Encoding("toy", pat_str=r50k_pat_str, special_tokens={},
                        mergeable_ranks={base64.b64decode(token): int(rank) for token, rank in LINES})
EOT = len(LINES)  # end-of-text closes each response, and is scored like any other token

# ---- The data: pairs, and the row in which two responses share a prompt ----
def encode(response):
    """Segments with scores -> the response's token ids, the segment of each, the reward of each segment."""
    ids = BPE.encode_ordinary("".join(part["text"] for part in response))
    ends = torch.tensor([len(part["text"].encode()) for part in response]).cumsum(0)
    last = torch.tensor([len(BPE.decode_single_token_bytes(i)) for i in ids]).cumsum(0) - 1
    segments = torch.searchsorted(ends, last, right=True).tolist()  # a token belongs where its last byte is
    rewards = [sum(part["scores"]) / 8 for part in response]        # r_k = W r~_k: two scores, each 0 to 4
    return ids + [EOT], segments + [len(response) - 1], rewards

def row(record):
    """A pair -> ([tokens, their positions, what column predicts each, branch, segment], r_w, r_l)."""
    x, (y_w, of_w, r_w), (y_l, of_l, r_l) = (
        BPE.encode_ordinary(record["prompt"]), encode(record["chosen"]), encode(record["rejected"]))
    P, C, R = len(x), len(y_w), len(y_l)
    return ([x + y_w + y_l,                                         # the prompt stands there once,
             [*range(P + C), *range(P, P + R)],                     # both responses go on from it,
             [0, *range(P + C - 1), P - 1, *range(P + C, P + C + R - 1)],  # and its end predicts both
             [1] * P + [2] * C + [3] * R, [0] * P + of_w + of_l], r_w, r_l)

def collate(rows):
    """Rows -> a batch. A token sees, up to itself, the prompt and its own response."""
    pad = nn.utils.rnn.pad_sequence
    grid = pad([torch.tensor(columns).T for columns, *_ in rows], batch_first=True)       # (B, T, 5)
    tokens, positions, before, branch, segment = grid.unbind(-1)                          # each (B, T)
    r = pad([torch.tensor(r) for _, *both in rows for r in both], True, torch.nan)        # (2B, S), NaN: none
    mask = ((branch[:, :, None] == branch[:, None]) | (branch[:, None] == 1)).tril()      # (B, T, T)
    of_segment = segment[:, None] == torch.arange(r.shape[1])[:, None]                    # (B, S, T)
    return SimpleNamespace(tokens=tokens, positions=positions, before=before, mask=mask[:, None],
                           w=branch == 2, l=branch == 3, of_segment=of_segment, r_w=r[0::2], r_l=r[1::2])

# ---- The model: GPT-2, its parameters named as there ----
class Block(nn.Module):
    def __init__(self, D, H):
        super().__init__()
        self.H, self.ln_1, self.ln_2 = H, nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(D, 3 * D), "c_proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(D, 4 * D), "c_proj": nn.Linear(4 * D, D)})

    def forward(self, x, mask):
        B, T, D = x.shape
        q, k, v = self.attn.c_attn(self.ln_1(x)).view(B, T, 3, self.H, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, mask)                                 # (B, H, T, D / H)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, D))                      # (B, T, D)
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))

class GPT(nn.Module):
    def __init__(self, V=EOT + 1, T=256, layers=2, H=4, D=128):
        super().__init__()
        self.wte, self.wpe, self.ln_f = nn.Embedding(V, D), nn.Embedding(T, D), nn.LayerNorm(D)
        self.h = nn.ModuleList(Block(D, H) for _ in range(layers))
        for p in [p for p in self.parameters() if p.dim() == 2]:
            nn.init.normal_(p, std=0.02)

    def forward(self, b):
        """log pi(v | all that the token of a column sees before it), of every v, (B, T, V)."""
        x = self.wte(b.tokens) + self.wpe(b.positions)                                    # (B, T, D)
        for block in self.h:
            x = block(x, b.mask)
        x = self.ln_f(x)[torch.arange(len(x))[:, None], b.before]                         # the shift by one
        return F.log_softmax(x @ self.wte.weight.T, -1)                                   # (B, T, V)

# ---- The losses, (B,), of a batch t with its sums over responses and over their segments; never means ----
def compare(policy, reference, t):
    log_s, log_q = policy(t), reference(t)                                                # (B, T, V)
    rho = (log_s - log_q).gather(2, t.tokens[:, :, None]).squeeze(2)                      # log pi/pi_ref
    kl = (log_q.exp() * (log_q - log_s)).sum(-1)                                          # KL(pi_ref || pi)
    t.rho_w, t.rho_l, t.kl_w, t.kl_l = ((x * y).sum(-1) for x in (rho, kl) for y in (t.w, t.l))    # (B,)
    t.segments_w, t.segments_l = ((t.of_segment * (rho * y)[:, None]).sum(-1) for y in (t.w, t.l))  # (B, S)
    return t

def dpo(t, beta=0.1):
    """-log sigma( beta log pi(y_w|x)/pi_ref(y_w|x) - beta log pi(y_l|x)/pi_ref(y_l|x) ), Eq. 7, 2305.18290"""
    return -F.logsigmoid(beta * t.rho_w - beta * t.rho_l)

def dpop(t, beta=0.3, lam=50.0):
    """-log sigma( beta [ rho_w - rho_l - lam max(0, log pi_ref(y_w|x)/pi(y_w|x)) ] ), Eq. 3, 2402.13228v2"""
    return -F.logsigmoid(beta * (t.rho_w - t.rho_l - lam * F.relu(-t.rho_w)))

def tdpo2(t, beta=0.1, alpha=0.5):
    """-log sigma( beta rho_w - beta rho_l - alpha [ beta KL_l - sg(beta KL_w) ] ), Eq. 17, 2404.11999"""
    return -F.logsigmoid(beta * t.rho_w - beta * t.rho_l - alpha * beta * (t.kl_l - t.kl_w.detach()))

def dpo2d(t, beta=0.1):
    """-sum_k log sigma( beta r_{w,k} rho_{w,k} - beta r_{l,k} rho_{l,k} ), Eq. 6, 2410.19720: the k-th best
    segment of y_w meets the k-th worst of y_l, as long as both have one."""
    best, worst = (-t.r_w).argsort(stable=True), t.r_l.argsort(stable=True)               # (B, S), NaN last
    r_w, r_l = t.r_w.gather(1, best), t.r_l.gather(1, worst)
    h = (beta * r_w.nan_to_num() * t.segments_w.gather(1, best)
         - beta * r_l.nan_to_num() * t.segments_l.gather(1, worst))                       # (B, S)
    return -(F.logsigmoid(h) * (r_w + r_l).isfinite()).sum(-1)

LOSSES = {"dpo": dpo, "dpop": dpop, "tdpo2": tdpo2, "2d-dpo": dpo2d}

# ---- Training ----
def train(policy, loss_of, rows, steps, lr):
    optimizer = torch.optim.AdamW(policy.parameters(), lr, weight_decay=0.0)
    for i in range(1, steps + 1):
        loss = loss_of(collate([rows[k] for k in torch.randperm(len(rows))[:32]]))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        yield i, loss.item()

def main(name):
    torch.manual_seed(0)
    rows, held_out = ([row(json.loads(line)) for line in open(TOY / f"reviews-{part}.jsonl")]
                      for part in ("train", "heldout"))
    policy, held_out = GPT(), collate(held_out[:200])
    def sft(b):
        return -policy(b).gather(2, b.tokens[:, :, None])[b.w].mean()
    *_, (i, loss) = train(policy, sft, rows, 120, 2e-3)
    print(f"SFT step {i}: loss {loss:.3f} a token")
    reference = copy.deepcopy(policy).requires_grad_(False)
    def preference(b):
        return LOSSES[name](compare(policy, reference, b)).mean()
    for i, loss in train(policy, preference, rows, 40, 5e-5):
        if i % 10 == 0:
            t = torch.no_grad()(compare)(policy, reference, held_out)
            print(f"{name} step {i}: loss {loss:.3f}; held-out: {(t.rho_w > t.rho_l).float().mean():.0%}"
                  f" right, log-ratio chosen {t.rho_w.mean():+.2f}, rejected {t.rho_l.mean():+.2f} nats")
    for who, model in ("reference", reference), ("policy", policy):
        ids = BPE.encode_ordinary("Review the brass flute:")
        while ids[-1] != EOT and len(ids) < 60:  # the likeliest token, again and again
            n = torch.arange(len(ids))
            b = SimpleNamespace(tokens=torch.tensor([ids]), positions=n, before=n, mask=n[:, None] >= n)
            ids.append(model(b)[0, -1].argmax().item())
        print(f"{who}: {BPE.decode(ids[:-1])}")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loss", nargs="?", choices=LOSSES, default="dpo")
    main(parser.parse_args().loss)
