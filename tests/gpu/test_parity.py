"""The fused backends against the definition in float64, on the device."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ept_fast import splice_prompt
from tests import golden
from tests.cases import LAYOUTS, NAMED, PADDINGS, PARTS, Case, Sizes, laid_out, run
from tests.gpu.support import (
    DEVICE,
    LISTING,
    TYPES,
    assert_no_worse,
    check_function,
    check_parity,
    device_case,
    gathered_case,
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


@pytest.mark.parametrize(("types", "shape", "padding"), TABLE)
def test_both_operations(backend: str, types: str, shape: str, padding: str) -> None:
    check_parity(partial(device_case, SHAPES[shape], types, padding=padding), backend)


@needs_gpu
@pytest.mark.parametrize("types", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", NAMED)
def test_named_sizes(backend: str, shape: str, types: str) -> None:
    check_parity(partial(device_case, NAMED[shape], types, padding="none"), backend, draws=1)


@needs_gpu
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_a_batch_of_a_language_model_with_padding(backend: str, padding: str) -> None:
    draw = partial(device_case, NAMED["llama-8b"], "bfloat16", padding=padding)
    check_parity(draw, backend, draws=1)


@pytest.mark.parametrize("types", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", ["token", "prompt"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "identity"])
def test_activations_and_gates(backend: str, activation: str, gate: str, types: str) -> None:
    draw = partial(device_case, SHAPES["odd"], types, activation=activation, gate=gate)
    check_parity(draw, backend)


@pytest.mark.parametrize(("scores", "size", "cancels"), LARGE_SCORES)
def test_large_scores(backend: str, scores: str, size: float, cancels: bool) -> None:
    cases = (on_device(case) for case in large_scores(scores, size))
    if LISTING:
        for case in cases:
            run(case, backend, cotangent_of(case))
        return
    assert_as_exact_as_the_definition(cases, backend, cancels=cancels)


@pytest.mark.parametrize("shape", ["odd", "bank"])
@pytest.mark.parametrize("part", list(PARTS)[1:])
def test_parts(backend: str, part: str, shape: str) -> None:
    check_parity(partial(device_case, SHAPES[shape], padding="right", **PARTS[part]), backend)


@pytest.mark.parametrize("zero", ["m", "r", "k", "h", "batch", "length"])
def test_zero_sizes(backend: str, zero: str) -> None:
    check_parity(partial(device_case, Sizes(**{zero: 0}), padding="none"), backend)


@pytest.mark.parametrize("types", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["odd", "bank"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layouts(backend: str, layout: str, shape: str, types: str) -> None:
    """Of every tensor: parameters, table, ids, mask, task ids and the output's gradient."""

    def draw(seed: int) -> Case:
        return device_case(SHAPES[shape], types, seed=seed).laid_out(layout)

    check_parity(draw, backend, lambda case: laid_out(make_cotangent(case), layout))


def test_expanded_tensors(backend: str) -> None:
    """Stride 0: one prompt for all tasks, one text for all rows, the gradient of a plain sum."""
    s = SHAPES["bank"]
    one = torch.ones(1, dtype=torch.int64, device=DEVICE)

    def draw(seed: int) -> Case:
        case = device_case(s, seed=seed)
        return replace(
            case.each_parameter(lambda t: t[:1].expand_as(t)),
            input_ids=case.input_ids[:1].expand(s.batch, s.length),
            attention_mask=one.bool().expand(s.batch, s.length),
            task_ids=one.expand(s.batch),
        )

    ones = torch.ones(1, 1, 1, device=DEVICE).expand(s.batch, s.m + s.length, s.d)
    check_parity(draw, backend, lambda case: ones)


@pytest.mark.parametrize("types", ["float32", "bfloat16", "all bfloat16"])
@pytest.mark.parametrize("layout", ["plain", "sliced", "expanded"])
def test_given_embeddings(backend: str, layout: str, types: str) -> None:
    """``inputs_embeds`` in place of ids; it gets a gradient too."""
    case = device_case(SHAPES["odd"], types)
    s = case.sizes
    embeds = case.weight[case.input_ids]
    if layout == "sliced":
        embeds = laid_out(embeds, layout)
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


# Shapes and how many rows there are: all tokens have one, many have each, few have any.
GATHERED = {
    "one row": (SHAPES["odd"], 1),
    "few rows": (SHAPES["odd"], 6),
    "many rows": (SHAPES["odd"], 1000),
    "blocks": (replace(SHAPES["blocks"], length=5), 6),
}


@pytest.mark.parametrize("types", ["float32", "bfloat16", "all bfloat16"])
@pytest.mark.parametrize("shape", GATHERED)
def test_gathered_prompts(backend: str, shape: str, types: str) -> None:
    """``prompt_rows``."""
    check_parity(partial(gathered_case, backend, *GATHERED[shape], types), backend)


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
    types = (torch.float32, torch.bfloat16, torch.float16)

    def draw(seed: int) -> Case:
        case = device_case(SHAPES["odd"], "bfloat16", seed=seed)
        mixed = {
            name: t.detach().to(types[number % 3]).requires_grad_()
            for number, (name, t) in enumerate(case.parameters.items())
        }
        return replace(case, parameters=mixed)

    check_parity(draw, backend)


def test_only_what_is_asked_for_gets_a_gradient(backend: str) -> None:
    case = device_case(SHAPES["odd"])
    cotangent = make_cotangent(case)
    full = run(case, backend, cotangent)
    for name in case.parameters:
        leaves = {other: t.detach() for other, t in case.parameters.items()}
        leaves[name] = leaves[name].clone().requires_grad_()
        got = run(replace(case, parameters=leaves), backend, cotangent)
        assert got.keys() == {"output", name}
        assert torch.equal(got[name], full[name]), name


# The golden vectors, beside the checkout, or inside it if only the checkout was copied.

_CHECKOUT = Path(__file__).resolve().parents[2]
GOLDEN = next(
    (g for root in (_CHECKOUT.parent, _CHECKOUT) if (g := root / "shared" / "golden").is_dir()),
    None,
)


def _put(tensor: Tensor) -> Tensor:
    return tensor.to(DEVICE, torch.float32 if tensor.is_floating_point() else None)


@pytest.mark.skipif(GOLDEN is None, reason="../shared/golden is not beside the source tree")
@pytest.mark.parametrize("operation", ["reconstruct", "splice"])
@pytest.mark.parametrize("name", golden.CASES)
def test_golden(backend: str, name: str, operation: str) -> None:
    assert GOLDEN is not None
    case = golden.load(GOLDEN, name)
    run_on = getattr(golden, operation)
    (ours, grads), (plain, others) = (run_on(case, b, _put) for b in (backend, "reference"))
    exact = case[{"reconstruct": "prompt", "splice": "output"}[operation]].to(DEVICE)
    assert_no_worse(({"output": ours}, {"output": plain}, {"output": exact}))
    known = [d for d in golden.derivatives(case, operation) if d[1] != "embeds"]
    # Rounding goes by the size of the terms, also where they cancel: with one space the gate's
    # gradient is zero.
    scale = max(abs(value) for *_, value in known)
    for key, tensor, direction, value in known:
        along = (
            0.0 if grad is None else (grad.double() * direction.to(DEVICE)).sum().item()
            for grad in (grads[tensor], others[tensor])
        )
        error, definition = (abs(got - value) for got in along)
        # The derivative itself is a central difference, right to 1e-6 of its value.
        room = 4 * torch.finfo(torch.float32).eps * scale + 1e-6 * abs(value)
        assert error <= 2 * definition + room, key
