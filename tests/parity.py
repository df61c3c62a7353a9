"""The measure of parity: a backend's error against float64 beside the definition's own.

One draw of a few numbers says little: if a gradient is a sum of a handful of roundings that
nearly cancel, the ratio of two correct computations' errors reaches six on one processor and one
on the next. So the ratio is a geometric mean over a number of cases, and no single case may stand
out by more than a wrong result would, which is off by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests import host_kernels
from tests.cases import Case, Sizes, make_case, run, sharp_case

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels are compiled for the GPU here: tests/gpu"
)
# What a test of a property of every backend runs over; the fixture ``backend`` sets each one up.
# "host" is the CUDA kernels built for a CPU, "cuda" the same behind the backend's own binding.
EAGER = pytest.param("eager")
TRITON = pytest.param("triton", marks=needs_interpreter)
HOST = pytest.param("host", marks=host_kernels.needs_compiler)
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.slow, host_kernels.needs_compiler, needs_interpreter]
)


def over(*backends: Any) -> Any:
    """Parametrise a test over backends."""
    return pytest.mark.parametrize("backend", backends, indirect=True)


each_kernel = over(TRITON, HOST, CUDA)
each_backend = over(EAGER, TRITON, HOST, CUDA)
FACTOR = 2.0
OUTLIER = 20.0
# Scores of fusion as ``sharp_case`` makes them, and whether the gradient's terms cancel but for
# their roundings; the others leave a weight of 1, or two of 1/2, and exact zeros.
LARGE_SCORES = [
    ("tied", 1e3, True),
    ("tied", 1e6, True),
    ("pairs", 1e3, True),
    ("pairs", 1e6, False),
    ("apart", 1e3, True),
    ("apart", 1e6, False),
]


def cotangent_of(case: Case, seed: int = 1) -> Tensor:
    """A gradient of the splice's output in its type."""
    s = case.sizes
    g = torch.Generator().manual_seed(seed)
    return torch.randn(s.batch, s.m + s.length, s.d, generator=g).to(case.weight)


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


class _Uncentred(torch.autograd.Function):
    """A softmax whose gradient is W·dW, without the mean that is taken off."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, dim: int) -> Tensor:
        weights = torch.softmax(scores, dim)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return weights * grad, None


def _terms_that_cancel(case: Case, cotangent: Tensor, exact: dict[str, Tensor]) -> dict[str, float]:
    """How large the terms are that cancel in the gradient of a softmax, relative as errors are."""
    with patch.object(Tensor, "softmax", lambda scores, dim: _Uncentred.apply(scores, dim)):
        uncentred = run(case.to(torch.float64), "reference", cotangent)
    return _errors(uncentred, exact)


def assert_as_exact_as_the_definition(
    cases: Iterable[Case],
    backend: str,
    *,
    cancels: bool = False,
    forward: Callable[[Case, str], Tensor] = Case.both,
) -> None:
    """At most twice the definition's error in the same types, in the output and every gradient.

    Both errors count from one rounding of the result in its own type, which every computation is
    allowed. The message lists the ratio of each case.

    Args:
        cases: the ratio is a mean over these.
        backend: the one to judge.
        cancels: count from one rounding of the terms that cancel in the gradient of a softmax as
            well: of tied scores nothing is left but their roundings, in which the definition is
            lucky now and then.
        forward: what is judged; the definition is that of both operations in a row.
    """
    ratios: dict[str, list[float]] = {}
    for seed, case in enumerate(cases):
        cotangent = cotangent_of(case, seed + 1)
        exact = run(case.to(torch.float64), "reference", cotangent)
        got = run(case, backend, cotangent, forward)
        assert got.keys() == exact.keys()
        ours = _errors(got, exact)
        definition = _errors(run(case, "reference", cotangent), exact)
        terms = _terms_that_cancel(case, cotangent, exact) if cancels else {}
        for name, error in ours.items():
            assert got[name].isfinite().all(), name
            rounding = torch.finfo(got[name].dtype).eps / 2 * max(1, terms.get(name, 0))
            ratio = (error + rounding) / (definition[name] + rounding)
            ratios.setdefault(name, []).append(ratio)
    for name, each in ratios.items():
        mean = math.exp(sum(math.log(ratio) for ratio in each) / len(each))
        listed = f"{name}: {mean:.2f}; {', '.join(f'{ratio:.1f}' for ratio in each)}"
        assert mean <= FACTOR, listed
        assert max(each) <= OUTLIER, listed


def large_scores(scores: str, size: float) -> Iterator[Case]:
    """Cases in float32 with scores up to ``size``, by each of the tensors that can make them so."""
    everyone = ("short_prompt", "offset_a", "offset_b")
    for seed, (n, tasks, larges) in enumerate(((66, None, everyone), (13, 2, everyone[1:2]))):
        sizes = Sizes(m=7, n=n, r=5, k=3, h=5, d=37, batch=1, length=5, tasks=tasks)
        case = make_case(sizes, padding="right", seed=seed)
        for large in larges:
            yield sharp_case(case, scores, size, large)
