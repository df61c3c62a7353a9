"""The measure of parity: a backend's error against float64 beside the definition's own.

One draw of a few numbers says little: where a gradient is a sum of a handful of roundings that
nearly cancel, the ratio of two correct computations' errors reaches six on one processor and one
on the next. So the ratio is a geometric mean over a number of cases, and no single case may stand
out by more than a wrong result would, which is off by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from tests.cases import Case, run

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled for the GPU here: tests/gpu"
)
FACTOR = 2.0
OUTLIER = 20.0


def cotangent_of(case: Case, seed: int = 1) -> Tensor:
    """A gradient of the splice's output in its type."""
    s = case.sizes
    g = torch.Generator().manual_seed(seed)
    return torch.randn(s.batch, s.m + s.length, s.d, generator=g).to(case.weight.dtype)


def _mean_square(tensor: Tensor) -> float:
    return tensor.double().square().mean().item() if tensor.numel() else 0.0


def _errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Root mean square error of each tensor relative to its own; of a zero one, to the largest."""
    largest = max(_mean_square(t) for t in exact.values())
    return {
        name: (_mean_square(t.double() - exact[name]) / (_mean_square(exact[name]) or largest))
        ** 0.5
        for name, t in results.items()
        if t.numel()
    }


def assert_as_exact_as_the_definition(cases: Iterable[Case], backend: str) -> None:
    """At most twice the definition's error in the same types, in the output and every gradient.

    Both errors count from one rounding of the result in its own type, which every computation is
    allowed. The message lists the ratio of each case.
    """
    ratios: dict[str, list[float]] = {}
    for seed, case in enumerate(cases):
        cotangent = cotangent_of(case, seed + 1)
        exact = run(case.to(torch.float64), "reference", cotangent)
        got = run(case, backend, cotangent)
        assert got.keys() == exact.keys()
        ours = _errors(got, exact)
        definition = _errors(run(case, "reference", cotangent), exact)
        for name, error in ours.items():
            assert got[name].isfinite().all(), name
            rounding = torch.finfo(got[name].dtype).eps / 2
            ratio = (error + rounding) / (definition[name] + rounding)
            ratios.setdefault(name, []).append(ratio)
    for name, each in ratios.items():
        mean = math.exp(sum(math.log(ratio) for ratio in each) / len(each))
        listed = f"{name}: {mean:.2f}; {', '.join(f'{ratio:.1f}' for ratio in each)}"
        assert mean <= FACTOR, listed
        assert max(each) <= OUTLIER, listed
