"""Every backend on the golden vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import golden
from tests.parity import CUDA, EAGER, HOST, TRITON, over

each_backend = over("reference", EAGER, TRITON, HOST, CUDA)
each_case = pytest.mark.parametrize("name", golden.CASES)


def put_for(backend: str) -> Callable[[Tensor], Tensor]:
    """In the type the backend computes in: the kernels do not serve float64."""
    exactly = backend in ("reference", "eager")
    return lambda tensor: tensor if exactly or not tensor.is_floating_point() else tensor.float()


def check(
    case: golden.Golden, operation: str, results: golden.Results, expected: Tensor, backend: str
) -> None:
    """Values to 1e-10, derivatives to 1e-6.

    In float32, values to eight roundings of the largest element, and derivatives relative to the
    sum of the magnitudes that cancel in one.
    """
    exactly = backend in ("reference", "eager")
    out, grads = results
    atol = 1e-10 if exactly else 8 * 2**-24 * expected.abs().max().item()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)
    checked = 0
    for key, name, direction, value in golden.derivatives(case, operation):
        if name == "embeds" and name not in grads:  # looked up: the table is frozen
            continue
        grad = grads[name]
        terms = torch.zeros(1) if grad is None else grad.double() * direction
        close = {"rel": 1e-6, "abs": 1e-12}
        if not exactly:
            close = {"rel": 0, "abs": 1e-6 * terms.abs().sum().item()}
        assert terms.sum().item() == pytest.approx(value, **close), key
        checked += 1
    assert checked


def test_every_case_is_listed(shared_golden: Path) -> None:
    assert {path.stem for path in shared_golden.glob("*.npz")} == set(golden.CASES)


@each_backend
@each_case
def test_reconstruct(shared_golden: Path, name: str, backend: str) -> None:
    case = golden.load(shared_golden, name)
    results = golden.reconstruct(case, backend, put_for(backend))
    check(case, "reconstruct", results, case["prompt"], backend)


@each_backend
@pytest.mark.parametrize("lookup", [True, False], ids=["ids", "embeds"])
@each_case
def test_splice(shared_golden: Path, name: str, lookup: bool, backend: str) -> None:
    case = golden.load(shared_golden, name)
    results = golden.splice(case, backend, put_for(backend), lookup=lookup)
    check(case, "splice", results, case["output"], backend)
