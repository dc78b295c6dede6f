"""Write the toy data, byte for byte the same everywhere: python toy/make.py (--check only compares)."""

import argparse
import base64
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # so that this file runs as a script, from any folder

from toy import reviews, sums  # noqa: E402

SEED = 0
PAIRS = {"reviews": (1280, 400), "sums": (800, 300)}  # training, held out; all files together < 900 kB

def vocabulary():
    """tiktoken's format, lines of `base64(bytes) rank`: the 256 bytes, then the worlds' words."""
    tokens = [bytes([byte]) for byte in range(256)] + [word.encode() for word in reviews.WORDS + sums.WORDS]
    return b"".join(base64.b64encode(token) + f" {rank}\n".encode() for rank, token in enumerate(tokens))

def jsonl(pairs):
    return "".join(json.dumps(pair, separators=(",", ":")) + "\n" for pair in pairs).encode()

def files():
    """{name: bytes}. A world's pairs are drawn at once, none twice, then cut: the two files share no pair."""
    contents = {"toy.tiktoken": vocabulary()}
    for world in (reviews, sums):
        name = world.__name__.split(".")[-1]
        train, held_out = PAIRS[name]
        pairs = world.sample_pairs(train + held_out, SEED)
        contents[f"{name}-train.jsonl"] = jsonl(pairs[:train])
        contents[f"{name}-heldout.jsonl"] = jsonl(pairs[train:])
        contents[f"{name}-heldout.meta.json"] = jsonl([{"accuracy_ceiling": world.ceiling(pairs[train:])}])
    return contents

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file differs")
    check = parser.parse_args().check
    stale = []
    for name, content in files().items():
        path = HERE / name
        if not check:
            path.write_bytes(content)
            print(f"{len(content):8d} bytes  {path.relative_to(HERE.parent)}")
        elif not path.is_file() or path.read_bytes() != content:
            stale.append(name)
    if stale:
        sys.exit(f"not what toy/make.py writes: {', '.join(stale)}")

if __name__ == "__main__":
    main()
