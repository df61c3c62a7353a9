"""What the tests of the training matrix compare, and the cells that they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.distributed.tasks import TASKS, trained

__all__ = [
    "ROUNDINGS",
    "Gradients",
    "assert_close",
    "assert_equal",
    "assert_float32",
    "assert_within",
    "cells",
    "relative_error",
    "runs_of_layers",
]

Gradients = dict[str, Tensor]
# Roundings on the way from the prompt to the loss and back, one after another: two layers, each of
# about fifteen operations, forward and backward.
ROUNDINGS = 60


def cells(row: str, tasks: tuple[str, ...] = TASKS, slow: tuple[str, ...] = ()) -> list[Any]:
    """A parameter for each task, a cell of the support matrix; ``slow`` names those to mark so."""
    return [
        pytest.param(
            task,
            marks=[pytest.mark.support(row=row, column=task), *[pytest.mark.slow] * (task in slow)],
        )
        for task in tasks
    ]


def relative_error(got: Gradients, exact: Gradients) -> float:
    """Of all gradients together, by their Euclidean norms."""
    assert got.keys() == exact.keys()
    errors = torch.cat([(got[name].double() - exact[name]).flatten() for name in exact])
    return float(errors.norm() / torch.cat([g.flatten() for g in exact.values()]).norm())


def assert_within(got: Gradients, exact: Gradients, dtype: torch.dtype) -> None:
    """No gradient is off by more than all roundings on its way together, if none cancels."""
    for name in exact:
        error = relative_error({name: got[name]}, {name: exact[name]})
        assert error <= ROUNDINGS * torch.finfo(dtype).eps / 2, (name, error)


def assert_equal(got: Gradients, expected: Gradients) -> None:
    """The same bits."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def assert_close(got: Gradients, expected: Gradients) -> None:
    """The same sums in another order."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def assert_float32(model: Any) -> None:
    """Whatever the backbone is in, what is trained stays in float32, and so do its gradients."""
    for name, parameter in trained(model).items():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name


def runs_of_layers(model: Any) -> list[str]:
    """Gets the name of a layer of the backbone each time that its first product is computed."""
    runs: list[str] = []
    for name, layer in model.backbone.named_modules():
        if isinstance(layer, GradientCheckpointingLayer):
            first = next(m for m in layer.modules() if isinstance(m, torch.nn.Linear))
            first.register_forward_hook(lambda *_, _name=name: runs.append(_name))
    return runs
