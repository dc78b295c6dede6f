#!/usr/bin/env bash
# mlx 0.32.4 (CPU), measured 2026-11-30 with Python 3.11.
#
# cumsum keeps the type of small integers and wraps around; sum of the same array is widened to uint32. NumPy and torch 2.13 count on in
# int64. A cumsum of bool is int32 and right.
#
# Seen: cumsum(ones(300, uint8))[-1]   44     sum(ones(300, uint8))   300
#
# Why it matters here: masks of tokens are kept as uint8, and cumsum of a mask is how positions, "from the first response token
# on" and "the tokens beyond the shorter response" are found: right in every short test, wrong from 256 tokens on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" "safetensors==0.8.0" numpy 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import mlx.core as mx
import numpy as np
mx.set_default_device(mx.cpu)
mask = mx.ones(300, dtype=mx.uint8)
print("cumsum:", mx.cumsum(mask)[-1].item(), mx.cumsum(mask).dtype, "sum:", mask.sum().item(), mask.sum().dtype)
assert mx.cumsum(mask)[-1].item() == 44 and mask.sum().item() == 300
assert mx.cumsum(mask.astype(mx.bool_))[-1].item() == 300
assert np.cumsum(np.ones(300, np.uint8))[-1] == 300
PYTHON
