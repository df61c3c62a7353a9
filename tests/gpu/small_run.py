"""Both operations, forward and backward, at sizes small enough for compute-sanitizer.

``python -m tests.gpu.small_run``. The sizes are those of the parity tests, so that their compiled
kernels are found.
"""

from __future__ import annotations

import sys

import torch

from ept_fast.ops import dispatch
from tests.gpu.support import DEVICE, device_case, make_cotangent, step
from tests.gpu.test_parity import SHAPES

CASES = (("odd", "holes"), ("odd", "right"), ("bank", "left"), ("more tasks than rows", "holes"))


def main() -> int:
    """1 if a result is not finite."""
    print("the device answers", torch.ones(1, device=DEVICE).item(), flush=True)
    fused = [n for n, works, _ in dispatch.describe() if works and n not in ("eager", "reference")]
    for backend in fused:
        for shape, padding in CASES:
            case = device_case(SHAPES[shape], "bfloat16", padding=padding)
            results = step(case, backend, make_cotangent(case))
            if not all(bool(tensor.isfinite().all()) for tensor in results):
                print(f"{backend}, {shape}, {padding}: not finite")
                return 1
            print(f"{backend}, {shape}, {padding}: done", flush=True)
    return 0 if fused else 1


if __name__ == "__main__":
    sys.exit(main())
