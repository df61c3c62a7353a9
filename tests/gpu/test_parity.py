"""The fused backends against the definition in float64, on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ept_fast import reconstruct_prompt, splice_prompt
from tests.cases import PADDINGS, SEVEN, Sizes, run
from tests.gpu.support import (
    DEVICE,
    LISTING,
    NAMED,
    TYPES,
    assert_no_worse,
    check_function,
    check_parity,
    device_case,
    make_cotangent,
    needs_gpu,
    on_device,
)
from tests.parity import (
    LARGE_SCORES,
    assert_as_exact_as_the_definition,
    cotangent_of,
    large_scores,
)

pytestmark = pytest.mark.gpu

SHAPES = {
    "one": Sizes(m=1, n=1, r=1, k=1, h=1, d=1, batch=1, length=1),
    "odd": Sizes(m=7, n=29, r=5, k=3, h=5, d=37, batch=5, length=23),
    "prime": Sizes(m=13, n=101, r=17, k=3, h=7, d=131, batch=11, length=97),
    "blocks": Sizes(m=40, n=210, r=33, k=4, h=16, d=384, batch=9, length=197),
    "bank": Sizes(m=5, n=37, r=3, k=2, h=4, d=48, batch=7, length=35, tasks=4),
    "more tasks than rows": Sizes(m=5, n=37, r=6, k=2, h=4, d=48, batch=5, length=35, tasks=9),
}
# All types and all paddings at one shape, all shapes at one padding and at one type.
TABLE = dict.fromkeys(
    [(types, shape, "holes") for types in TYPES for shape in SHAPES]
    + [("bfloat16", shape, padding) for shape in SHAPES for padding in PADDINGS]
    + [(types, "odd", padding) for types in TYPES for padding in PADDINGS]
)
PARTS: dict[str, dict[str, bool]] = {
    "no fusion": {"fusion": False},
    "no spaces": {"spaces": False},
    "no offset": {"offset": False},
    "prompt only": {"offset": False, "spaces": False},
}


@pytest.mark.parametrize(("types", "shape", "padding"), TABLE)
def test_both_operations(backend: str, types: str, shape: str, padding: str) -> None:
    check_parity(device_case(SHAPES[shape], types, padding=padding), backend)


@needs_gpu
@pytest.mark.parametrize("types", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", NAMED)
def test_named_sizes(backend: str, shape: str, types: str) -> None:
    check_parity(device_case(NAMED[shape], types, padding="none"), backend)


@needs_gpu
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_a_batch_of_a_language_model_with_padding(backend: str, padding: str) -> None:
    check_parity(device_case(NAMED["llama-8b"], "bfloat16", padding=padding), backend)


@pytest.mark.parametrize("types", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", ["token", "prompt"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "identity"])
def test_activations_and_gates(backend: str, activation: str, gate: str, types: str) -> None:
    check_parity(device_case(SHAPES["odd"], types, activation=activation, gate=gate), backend)


@pytest.mark.parametrize(("scores", "size", "cancels"), LARGE_SCORES)
def test_large_scores(backend: str, scores: str, size: float, cancels: bool) -> None:
    cases = (on_device(case) for case in large_scores(scores, size))
    if LISTING:
        for case in cases:
            run(case, backend, cotangent_of(case))
        return
    assert_as_exact_as_the_definition(cases, backend, cancels=cancels)


@pytest.mark.parametrize("shape", ["odd", "bank"])
@pytest.mark.parametrize("part", PARTS)
def test_parts(backend: str, part: str, shape: str) -> None:
    check_parity(device_case(SHAPES[shape], padding="right", **PARTS[part]), backend)


@pytest.mark.parametrize("zero", ["m", "r", "k", "h", "batch", "length"])
def test_zero_sizes(backend: str, zero: str) -> None:
    check_parity(device_case(Sizes(**{zero: 0}), padding="none"), backend)


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides; NaN in the gaps."""
    tensor = tensor.detach()
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


@pytest.mark.parametrize("types", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["odd", "bank"])
@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_layouts(backend: str, layout: str, shape: str, types: str) -> None:
    """Of every tensor: parameters, table, ids, mask, task ids and the output's gradient."""
    case = device_case(SHAPES[shape], types)
    assert case.attention_mask is not None
    ids, mask = case.input_ids, case.attention_mask
    ids, mask = (
        (ids.mT.contiguous().mT, mask.mT.contiguous().mT)
        if layout == "transposed"
        else (ids.repeat_interleave(2, 1)[:, ::2], mask.repeat_interleave(3, 1)[:, ::3])
    )
    strided = replace(
        case,
        parameters={
            name: _laid_out(t, layout).requires_grad_() for name, t in case.parameters.items()
        },
        weight=_laid_out(case.weight, layout),
        input_ids=ids,
        attention_mask=mask,
        task_ids=None if case.task_ids is None else case.task_ids.repeat_interleave(2)[::2],
    )
    check_parity(strided, backend, _laid_out(make_cotangent(case), layout))


def test_expanded_tensors(backend: str) -> None:
    """Stride 0: one prompt for all tasks, one text for all rows, the gradient of a plain sum."""
    case = device_case(SHAPES["bank"])
    s = case.sizes
    expanded = {
        name: t.detach()[:1].expand_as(t).requires_grad_() for name, t in case.parameters.items()
    }
    same = replace(
        case,
        parameters=expanded,
        input_ids=case.input_ids[:1].expand(s.batch, s.length),
        attention_mask=torch.ones(1, 1, dtype=torch.bool, device=DEVICE).expand(s.batch, s.length),
        task_ids=torch.ones(1, dtype=torch.int64, device=DEVICE).expand(s.batch),
    )
    check_parity(same, backend, torch.ones(1, 1, 1, device=DEVICE).expand(s.batch, 40, s.d))


@pytest.mark.parametrize("types", ["float32", "bfloat16", "all bfloat16"])
@pytest.mark.parametrize("layout", ["plain", "sliced", "expanded"])
def test_given_embeddings(backend: str, layout: str, types: str) -> None:
    """``inputs_embeds`` in place of ids; it gets a gradient too."""
    case = device_case(SHAPES["odd"], types)
    s = case.sizes
    embeds = case.weight[case.input_ids]
    if layout == "sliced":
        embeds = _laid_out(embeds, layout)
    if layout == "expanded":
        embeds = embeds[:1].expand(s.batch, s.length, s.d)
    leaves = {
        "prompt": case.parameters["short_prompt"],
        "offset_a": case.parameters["offset_a"],
        "offset_b": case.parameters["offset_b"],
        "inputs_embeds": embeds,
    }

    def splice(backend: str, **tensors: Tensor) -> Tensor:
        return splice_prompt(
            **tensors, scaling=0.3, attention_mask=case.attention_mask, backend=backend
        )

    check_function(splice, leaves, make_cotangent(case), backend)


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        (torch.int64, torch.bool),
        (torch.int32, torch.int64),
        (torch.int64, torch.int32),
        (torch.int32, torch.int16),
        (torch.int64, torch.int8),
        (torch.int32, torch.uint8),
    ],
    ids=str,
)
def test_integer_types(backend: str, ids: torch.dtype, mask: torch.dtype) -> None:
    case = device_case(SHAPES["bank"])
    assert case.attention_mask is not None
    assert case.task_ids is not None
    typed = replace(
        case,
        input_ids=case.input_ids.to(ids),
        attention_mask=case.attention_mask.to(mask),
        task_ids=case.task_ids.to(ids),
    )
    cotangent = make_cotangent(case)
    expected = run(case, backend, cotangent)
    for name, tensor in run(typed, backend, cotangent).items():
        assert torch.equal(tensor, expected[name]), name


def test_mixed_parameter_types(backend: str) -> None:
    case = device_case(SHAPES["odd"], "bfloat16")
    types = (torch.float32, torch.bfloat16, torch.float16)
    mixed = {
        name: t.detach().to(types[number % 3]).requires_grad_()
        for number, (name, t) in enumerate(case.parameters.items())
    }
    check_parity(replace(case, parameters=mixed), backend)


def test_only_what_is_asked_for_gets_a_gradient(backend: str) -> None:
    case = device_case(SHAPES["odd"])
    cotangent = make_cotangent(case)
    full = run(case, backend, cotangent)
    for name in case.parameters:
        leaves = {
            other: t.detach().clone().requires_grad_(other == name)
            for other, t in case.parameters.items()
        }
        got = run(replace(case, parameters=leaves), backend, cotangent)
        assert got.keys() == {"output", name}
        assert torch.equal(got[name], full[name]), name


# The golden vectors: values and derivatives from code that shares nothing with this project.

# Beside the checkout, or in a folder inside it where the checkout alone has travelled.
_CHECKOUT = Path(__file__).resolve().parents[2]
GOLDEN = next(
    (g for root in (_CHECKOUT.parent, _CHECKOUT) if (g := root / "shared" / "golden").is_dir()),
    _CHECKOUT.parent / "shared" / "golden",
)
GOLDEN_CASES = sorted(path.stem for path in GOLDEN.glob("*.npz")) or ["none"]


def _golden(name: str) -> dict[str, Any]:
    if name == "none":
        pytest.skip("../shared/golden is not beside the source tree")
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def _float32(array: Any) -> Tensor:
    return torch.from_numpy(array).to(DEVICE, torch.float32)


def _derivatives(golden: dict[str, Any], operation: str) -> dict[str, tuple[str, Tensor, float]]:
    """By key: the tensor's name, the direction, the derivative along it."""
    found = {}
    for key, value in golden.items():
        if key.startswith(f"{operation}.derivative.") and ".embeds." not in key:
            _, _, name, number = key.split(".")
            direction = torch.from_numpy(golden[f"{operation}.direction.{name}.{number}"])
            found[key] = (name, direction.to(DEVICE), value.item())
    assert found
    return found


def _check_golden(
    outputs: dict[str, tuple[Tensor, dict[str, Tensor | None]]],
    backend: str,
    expected: Tensor,
    derivatives: dict[str, tuple[str, Tensor, float]],
) -> None:
    ours, plain = outputs[backend], outputs["reference"]
    exact = {"output": expected.to(DEVICE)}
    assert_no_worse({"output": ours[0].detach()}, {"output": plain[0].detach()}, exact)
    # Rounding goes by the size of the terms, also where they cancel: with one space the gate's
    # gradient is zero.
    scale = max(abs(value) for _, _, value in derivatives.values())
    for key, (name, direction, value) in derivatives.items():
        errors = []
        for _, grads in (ours, plain):
            grad = grads[name]
            got = 0.0 if grad is None else (grad.double() * direction).sum().item()
            errors.append(abs(got - value))
        # The derivative itself is a central difference, right to 1e-6 of its value.
        room = 4 * torch.finfo(torch.float32).eps * scale + 1e-6 * abs(value)
        assert errors[0] <= 2 * errors[1] + room, key


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_reconstruct(backend: str, name: str) -> None:
    golden = _golden(name)
    flags = {key.removeprefix("flag."): golden[key].item() for key in golden if "flag." in key}
    outputs = {}
    for which in (backend, "reference"):
        tensors = {
            key: _float32(golden[f"param.{key}"]).requires_grad_()
            for key in SEVEN
            if f"param.{key}" in golden
        }
        out = reconstruct_prompt(**tensors, **flags, backend=which)
        out.backward(_float32(golden["cotangent.prompt"]))
        outputs[which] = (out, {key: t.grad for key, t in tensors.items()})
    derivatives = _derivatives(golden, "reconstruct")
    _check_golden(outputs, backend, torch.from_numpy(golden["prompt"]), derivatives)


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_golden_splice(backend: str, name: str) -> None:
    golden = _golden(name)
    integers = {
        key: torch.from_numpy(golden[key]).to(DEVICE)
        for key in ("input_ids", "attention_mask", "task_ids")
        if key in golden
    }
    outputs = {}
    for which in (backend, "reference"):
        tensors = {"prompt": _float32(golden["prompt"]).requires_grad_()}
        for key in ("offset_a", "offset_b"):
            if f"param.{key}" in golden:
                tensors[key] = _float32(golden[f"param.{key}"]).requires_grad_()
        out = splice_prompt(
            **tensors,
            **integers,
            weight=_float32(golden["weight"]),
            scaling=golden["flag.scaling"].item(),
            backend=which,
        )
        out.backward(_float32(golden["cotangent.output"]))
        outputs[which] = (out, {key: t.grad for key, t in tensors.items()})
    derivatives = _derivatives(golden, "splice")
    _check_golden(outputs, backend, torch.from_numpy(golden["output"]), derivatives)
