#!/usr/bin/env bash
# mlx 0.32.4 (CPU), measured 2026-11-30 with Python 3.11.
#
# argsort, argmax and argpartition give uint32, where NumPy 2.4, torch 2.13 and jax 0.10.2 give signed integers. Negated, or less a
# Python number, they wrap around without a word; less an int32 array they become int64 and are right; where(..., -1) raises.
#
# Seen: -argsort([3, 1, 2])              [4294967295, 4294967294, 0]
#       argmax([5, 1]) - 1               4294967295
#       argsort([3, 1, 2]) - [1, 1, 1]   [0, 1, -1]
#       where([T, F, T], argsort, -1)    ValueError: Converting -1 to uint32 would result in overflow
#
# Why it matters here: 2D-DPO selects segments by rank. Ranks made by argsort(argsort(r)) and negated for the descending side
# sort rank 0 first, so the worst chosen segment comes out on top; a wrapped index goes into a gather that MLX does not check.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "mlx[cpu]==0.32.4" "safetensors==0.8.0" numpy 2>/dev/null
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import mlx.core as mx
mx.set_default_device(mx.cpu)
order = mx.argsort(mx.array([3, 1, 2]))
print("-argsort:", (-order).tolist(), (-order).dtype)
assert (-order).tolist() == [4294967295, 4294967294, 0]
assert (mx.argmax(mx.array([5, 1])) - 1).item() == 4294967295
assert (order - mx.array([1, 1, 1])).tolist() == [0, 1, -1]
try:
    mx.where(mx.array([True, False, True]), order, -1)
except ValueError as error:
    print("where(..., -1):", error)
else:
    raise AssertionError("where took -1 beside uint32")
rewards = mx.array([0.2, 0.9, 0.5])
rank = mx.argsort(mx.argsort(rewards))  # 0 the lowest
print("descending by -rank:", mx.argsort(-rank).tolist(), "right: [1, 2, 0]")
assert mx.argsort(-rank).tolist() == [0, 1, 2]
PYTHON
