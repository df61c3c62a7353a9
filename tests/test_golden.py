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
BACKENDS = ("reference", "eager")


def _load(folder: Path, name: str) -> dict[str, Any]:
    with np.load(folder / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def _check_derivatives(
    golden: dict[str, Any], operation: str, grads: dict[str, Tensor | None]
) -> None:
    checked = 0
    for key, expected in golden.items():
        if not key.startswith(f"{operation}.derivative."):
            continue
        _, _, name, number = key.split(".")
        direction = torch.from_numpy(golden[f"{operation}.direction.{name}.{number}"])
        grad = grads[name]
        got = 0.0 if grad is None else (grad * direction).sum().item()
        assert got == pytest.approx(expected.item(), rel=1e-6, abs=1e-12), key
        checked += 1
    assert checked


def test_every_case_is_listed(shared_golden: Path) -> None:
    assert {path.stem for path in shared_golden.glob("*.npz")} == set(CASES)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_reconstruct(shared_golden: Path, name: str, backend: str) -> None:
    golden = _load(shared_golden, name)
    tensors = {
        key: torch.from_numpy(golden[f"param.{key}"]).requires_grad_()
        for key in SEVEN
        if f"param.{key}" in golden
    }
    flags = {key.removeprefix("flag."): golden[key].item() for key in golden if "flag." in key}
    prompt = reconstruct_prompt(**tensors, **flags, backend=backend)
    torch.testing.assert_close(prompt, torch.from_numpy(golden["prompt"]), rtol=0, atol=1e-10)
    prompt.backward(torch.from_numpy(golden["cotangent.prompt"]))
    _check_derivatives(golden, "reconstruct", {key: t.grad for key, t in tensors.items()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lookup", [True, False], ids=["ids", "embeds"])
@pytest.mark.parametrize("name", CASES)
def test_splice(shared_golden: Path, name: str, lookup: bool, backend: str) -> None:
    golden = _load(shared_golden, name)
    prompt = torch.from_numpy(golden["prompt"]).requires_grad_()
    offsets = {
        key: torch.from_numpy(golden[f"param.{key}"]).requires_grad_()
        for key in ("offset_a", "offset_b")
        if f"param.{key}" in golden
    }
    weight, ids = torch.from_numpy(golden["weight"]), torch.from_numpy(golden["input_ids"])
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
    torch.testing.assert_close(out, torch.from_numpy(golden["output"]), rtol=0, atol=1e-10)
    out.backward(torch.from_numpy(golden["cotangent.output"]))
    grads = {"prompt": prompt.grad, **{key: t.grad for key, t in offsets.items()}}
    if lookup:  # the table is frozen: no gradient to look at
        golden = {key: v for key, v in golden.items() if ".embeds." not in key}
    else:
        grads["embeds"] = embeds.grad
    _check_derivatives(golden, "splice", grads)
