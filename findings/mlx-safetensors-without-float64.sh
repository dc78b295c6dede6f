#!/usr/bin/env bash
# mlx 0.32.4 (CPU), safetensors 0.8.0, measured 2026-11-30 with Python 3.11.
#
# float64 arrays, which MLX computes with on the CPU, cannot be written by mx.save_safetensors, though the format has F64; and
# mx.load refuses a file with an F64 tensor in it.
#
# Seen: save_safetensors(float64)   RuntimeError: [save_safetensors] received invalid dtype.
#       load(file with F64)         RuntimeError: [safetensor] unsupported dtype F64
#
# Why it matters here: golden/vectors.safetensors holds float64 results and weights W, and a port is compared in float64 best. An
# MLX port reads and writes the file with the safetensors package and NumPy, as tests/test_ports.py does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" "safetensors==0.8.0" numpy 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import mlx.core as mx
import numpy as np
from safetensors.numpy import load_file, save_file
mx.set_default_device(mx.cpu)
path = sys.argv[1] + "/x.safetensors"
x = mx.array(np.array([0.1, 0.2]), dtype=mx.float64)
try:
    mx.save_safetensors(path, {"x": x})
except RuntimeError as error:
    print("save:", error)
else:
    raise AssertionError("mx.save_safetensors wrote float64")
save_file({"x": np.array(x)}, path)
assert load_file(path)["x"].dtype == np.float64
try:
    y = mx.load(path)["x"]
    print("load:", y.dtype, y.tolist())
    LOAD = str(y.dtype)
except RuntimeError as error:
    print("load:", error)
    LOAD = "RuntimeError"
assert LOAD == "RuntimeError", LOAD
PYTHON
