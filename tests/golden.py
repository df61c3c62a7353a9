"""The golden vectors: values and derivatives from code that shares nothing with this project."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
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
Golden = dict[str, Any]
Results = tuple[Tensor, dict[str, Tensor | None]]  # the output, and gradients by name


def load(folder: Path, name: str) -> Golden:
    with np.load(folder / f"{name}.npz") as file:
        # Names of flags stay arrays of text.
        return {
            key: value if (value := file[key]).dtype.kind == "U" else torch.from_numpy(value)
            for key in file.files
        }


def derivatives(golden: Golden, operation: str) -> Iterator[tuple[str, str, Tensor, float]]:
    """Key, the tensor's name, the direction, and the derivative along it."""
    for key, value in golden.items():
        if key.startswith(f"{operation}.derivative."):
            _, _, name, number = key.split(".")
            yield key, name, golden[f"{operation}.direction.{name}.{number}"], value.item()


def _leaves(
    golden: Golden, names: tuple[str, ...], put: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Those of the parameters that the case has."""
    have = [name for name in names if f"param.{name}" in golden]
    return {name: put(golden[f"param.{name}"]).requires_grad_() for name in have}


def reconstruct(golden: Golden, backend: str, put: Callable[[Tensor], Tensor]) -> Results:
    """Operation 1 on a case; ``put`` gives each tensor its type and device."""
    leaves = _leaves(golden, SEVEN, put)
    flags = {key.removeprefix("flag."): golden[key].item() for key in golden if "flag." in key}
    out = reconstruct_prompt(**leaves, **flags, backend=backend)
    out.backward(put(golden["cotangent.prompt"]))
    return out.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def splice(
    golden: Golden, backend: str, put: Callable[[Tensor], Tensor], *, lookup: bool = True
) -> Results:
    """Operation 2 on ids, or on their embeddings."""
    offset = _leaves(golden, ("offset_a", "offset_b"), put)
    leaves = {"prompt": put(golden["prompt"]).requires_grad_(), **offset}
    given = {
        name: put(golden[name])
        for name in ("input_ids", "attention_mask", "task_ids", "weight")
        if name in golden
    }
    if not lookup:
        embeds = given.pop("weight")[given.pop("input_ids")].requires_grad_()
        leaves["inputs_embeds"] = embeds
    scaling = golden["flag.scaling"].item()
    out = splice_prompt(**leaves, **given, scaling=scaling, backend=backend)
    out.backward(put(golden["cotangent.output"]))
    return out.detach(), {name.removeprefix("inputs_"): leaf.grad for name, leaf in leaves.items()}
