#!/usr/bin/env bash
# mlx 0.32.4 (CPU), measured 2026-11-30 with Python 3.11.
#
# The difference of two bool arrays is a bool array, True where they differ, without an error. NumPy refuses it (TypeError, use
# logical_xor), and so does torch 2.13 (RuntimeError). Only the unary minus is refused in MLX.
#
# Seen: [True, False] - [True, True]   [False, True]        -[True, False]   ValueError
#
# Why it matters here: "the mask less the mask one column later" marks both ends of a response in NumPy's integers as 1 and -1;
# in MLX both ends are True, so the token after the response is counted like the first of it, and a sum of the difference is
# 2 and not 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" "safetensors==0.8.0" numpy 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import mlx.core as mx
import numpy as np
mx.set_default_device(mx.cpu)
difference = mx.array([True, False]) - mx.array([True, True])
print(difference.tolist(), difference.dtype)
assert difference.dtype == mx.bool_ and difference.tolist() == [False, True]
try:
    np.array([True, False]) - np.array([True, True])
except TypeError as error:
    print("NumPy:", str(error)[:60])
else:
    raise AssertionError("NumPy subtracts bools")
PYTHON
