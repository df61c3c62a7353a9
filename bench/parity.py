"""The parity check that stands before every timing: on the very tensors that are timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.inputs import Inputs, cotangent
from bench.peers import Forward, Leaves, Peer


@dataclass(frozen=True)
class Expected:
    """Outputs and gradients of a definition: exact, and as plain PyTorch computes them."""

    exact: dict[str, Tensor]
    plain: dict[str, Tensor]


def expected_of(peer: Peer, inputs: Inputs) -> Expected:
    """What the peer's results are compared with."""
    plain = results(peer.definition, peer.leaves, inputs)
    grad_type = plain["output"].dtype
    exact = results(peer.definition, peer.leaves, inputs.to(torch.float64), grad_type)
    return Expected(exact, plain)


def results(
    forward: Forward, leaves: Leaves, inputs: Inputs, grad_type: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Output and gradients; the output's gradient holds values of ``grad_type``."""
    out = forward(inputs)
    grad = cotangent(out.shape, grad_type or out.dtype, out.device).to(out.dtype)
    chosen = leaves(inputs)
    # Copies: the memory of a CUDA graph's results is used again by its next run.
    output = out.detach().clone()
    grads = torch.autograd.grad(out, list(chosen.values()), grad)
    return {"output": output, **{n: g.clone() for n, g in zip(chosen, grads, strict=True)}}


def check(peer: Peer, inputs: Inputs, expected: Expected) -> tuple[float, str]:
    """Largest error by what is allowed, and the tensor it is in; above 1 the peer is wrong.

    Allowed are four times plain PyTorch's own error and, for summing in another order, four ULP of
    the tensor's scale in float32 or one of a shorter type.
    """
    found = results(peer.forward, peer.leaves, inputs)
    return compare(found, expected)


def compare(found: dict[str, Tensor], expected: Expected) -> tuple[float, str]:
    """As :func:`check`, of results that are there already."""
    worst, where = 0.0, ""
    for name, exact in expected.exact.items():
        value = found[name]
        if value.shape != exact.shape:
            return float("inf"), name
        error, own = (_largest(t, exact) for t in (value, expected.plain[name]))
        eps = max(torch.finfo(value.dtype).eps, 4 * torch.finfo(torch.float32).eps)
        allowed = 4 * own + eps * exact.abs().max().item()
        ratio = error / allowed if allowed else (0.0 if error == 0 else float("inf"))
        if math.isnan(ratio):
            return float("inf"), name
        if ratio > worst:
            worst, where = ratio, name
    return worst, where


def refuse_red(case: str, name: str, error: float, where: str) -> None:
    """Fail a row whose check is red: the peer, or ours beside it, is not timed."""
    if not error <= 1:
        pytest.fail(
            f"{case}: parity: {name} is not timed: {where} is off by {error:.3g} times what is "
            f"allowed",
            pytrace=False,
        )


def _largest(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).abs().max().item() if exact.numel() else 0.0
