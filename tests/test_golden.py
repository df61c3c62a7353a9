"""The golden vectors: values and derivatives from code that shares nothing with this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ept_fast import reconstruct_prompt, splice_prompt
from tests.cases import SEVEN
from tests.parity import CUDA, EAGER, HOST, TRITON, over

CASES = (
    "dept_no_fusion_no_spaces",
    "ept_prompt_gate",
    "ept_relu_left_pad",
    "ept_silu_odd_shapes",
    "ept_token_gate",
    "mask_with_holes",
    "prompt_tuning_only",
    "residual_identity",
    "short_text",
    "task_bank",
)
IN_FLOAT64 = ("reference", "eager")
each_backend = over("reference", EAGER, TRITON, HOST, CUDA)


def _tensor(golden: dict[str, Any], key: str, backend: str) -> Tensor:
    """In the type the backend computes in: the kernels do not serve float64."""
    tensor = torch.from_numpy(golden[key])
    return tensor if backend in IN_FLOAT64 or not tensor.is_floating_point() else tensor.float()


def _check_values(got: Tensor, expected: Tensor, backend: str) -> None:
    """To 1e-10, or to eight roundings of the largest element in float32."""
    atol = 1e-10 if backend in IN_FLOAT64 else 8 * 2**-24 * expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=atol)


def _load(folder: Path, name: str) -> dict[str, Any]:
    with np.load(folder / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def _check_derivatives(
    golden: dict[str, Any], operation: str, grads: dict[str, Tensor | None], backend: str
) -> None:
    """To 1e-6; in float32 relative to the sum of the magnitudes that cancel in a derivative."""
    checked = 0
    for key, expected in golden.items():
        if not key.startswith(f"{operation}.derivative."):
            continue
        _, _, name, number = key.split(".")
        direction = torch.from_numpy(golden[f"{operation}.direction.{name}.{number}"])
        grad = grads[name]
        terms = torch.zeros(1) if grad is None else grad.double() * direction
        close = {"rel": 1e-6, "abs": 1e-12}
        if backend not in IN_FLOAT64:
            close = {"rel": 0, "abs": 1e-6 * terms.abs().sum().item()}
        assert terms.sum().item() == pytest.approx(expected.item(), **close), key
        checked += 1
    assert checked


def test_every_case_is_listed(shared_golden: Path) -> None:
    assert {path.stem for path in shared_golden.glob("*.npz")} == set(CASES)


@each_backend
@pytest.mark.parametrize("name", CASES)
def test_reconstruct(shared_golden: Path, name: str, backend: str) -> None:
    golden = _load(shared_golden, name)
    tensors = {
        key: _tensor(golden, f"param.{key}", backend).requires_grad_()
        for key in SEVEN
        if f"param.{key}" in golden
    }
    flags = {key.removeprefix("flag."): golden[key].item() for key in golden if "flag." in key}
    prompt = reconstruct_prompt(**tensors, **flags, backend=backend)
    _check_values(prompt, torch.from_numpy(golden["prompt"]), backend)
    prompt.backward(_tensor(golden, "cotangent.prompt", backend))
    _check_derivatives(golden, "reconstruct", {key: t.grad for key, t in tensors.items()}, backend)


@each_backend
@pytest.mark.parametrize("lookup", [True, False], ids=["ids", "embeds"])
@pytest.mark.parametrize("name", CASES)
def test_splice(shared_golden: Path, name: str, lookup: bool, backend: str) -> None:
    golden = _load(shared_golden, name)
    prompt = _tensor(golden, "prompt", backend).requires_grad_()
    offsets = {
        key: _tensor(golden, f"param.{key}", backend).requires_grad_()
        for key in ("offset_a", "offset_b")
        if f"param.{key}" in golden
    }
    weight, ids = _tensor(golden, "weight", backend), torch.from_numpy(golden["input_ids"])
    embeds = weight[ids].requires_grad_()
    out = splice_prompt(
        prompt,
        **({"input_ids": ids, "weight": weight} if lookup else {"inputs_embeds": embeds}),
        **offsets,
        scaling=golden["flag.scaling"].item(),
        attention_mask=torch.from_numpy(golden["attention_mask"]),
        task_ids=torch.from_numpy(golden["task_ids"]) if "task_ids" in golden else None,
        backend=backend,
    )
    _check_values(out, torch.from_numpy(golden["output"]), backend)
    out.backward(_tensor(golden, "cotangent.output", backend))
    grads = {"prompt": prompt.grad, **{key: t.grad for key, t in offsets.items()}}
    if lookup:  # the table is frozen: no gradient to look at
        golden = {key: v for key, v in golden.items() if ".embeds." not in key}
    else:
        grads["embeds"] = embeds.grad
    _check_derivatives(golden, "splice", grads, backend)
