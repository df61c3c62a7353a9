"""What every backend keeps to the bit: layouts, types of the masks, repeated runs, padding, ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ept_fast import splice_prompt
from ept_fast.backends import eager
from ept_fast.ops import dispatch
from tests.cases import (
    LAYOUTS,
    PADDINGS,
    SEVEN,
    SHAPES,
    TILES,
    Case,
    Sizes,
    laid_out,
    make_case,
    run,
)
from tests.parity import (
    EAGER,
    HOST,
    TRITON,
    cotangent_of,
    each_backend,
    each_kernel,
    over,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_bits(
    case: Case, other: Case, backend: str, change: Callable[[Tensor], Tensor] = lambda t: t
) -> None:
    """Output and gradients of two cases, the other's for a changed gradient of the output."""
    cotangent = cotangent_of(case)
    expected = run(case, backend, cotangent)
    for name, tensor in run(other, backend, change(cotangent)).items():
        assert torch.equal(tensor, expected[name]), name


# Layouts and types


@each_kernel
@pytest.mark.parametrize(("tasks", "types"), [(None, "fp32"), (2, "bf16")])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strides_change_no_bit(layout: str, tasks: int | None, types: str, backend: str) -> None:
    """d = 24 moves in vectors if it is plain, and element by element if not."""
    sizes = Sizes(m=5, n=12, r=3, k=2, h=4, d=24, batch=4, length=9, tasks=tasks)
    case = make_case(sizes, padding="left", dtype=torch.float32).typed(types)
    assert_same_bits(case, case.laid_out(layout), backend, lambda t: laid_out(t, layout))


@each_backend
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str
)
def test_masks_and_ids_of_every_type(dtype: torch.dtype, backend: str) -> None:
    case = make_case(Sizes(tasks=2), dtype=torch.float32)
    assert case.attention_mask is not None
    assert case.task_ids is not None
    mask, ids, tasks = case.attention_mask.to(dtype), case.input_ids.int(), case.task_ids.int()
    other = replace(case, attention_mask=mask, input_ids=ids, task_ids=tasks)
    assert_same_bits(case, other, backend)


@each_backend
@pytest.mark.parametrize("padding", PADDINGS)
def test_inputs_embeds_get_what_a_lookup_gets(padding: str, backend: str) -> None:
    case = make_case(Sizes(tasks=2), padding=padding, dtype=torch.float32)
    prompt = case.parameters["short_prompt"]
    embeds = case.weight[case.input_ids].requires_grad_()
    given = case.splice(prompt, backend, inputs_embeds=embeds)
    assert torch.equal(given, case.splice(prompt, backend))
    cotangent = cotangent_of(case)
    (grad,) = torch.autograd.grad(given, embeds, cotangent)
    assert torch.equal(grad, cotangent[:, case.sizes.m :])


# Beyond 32 bits


def _sparse(*shape: int) -> Tensor:
    """Memory that the system hands out page by page, when it is touched."""
    return torch.empty(shape, dtype=torch.bfloat16)


@pytest.mark.default_algorithms
@each_kernel
def test_tables_beyond_two_to_the_31_elements(backend: str) -> None:
    """Rows of a table that 32-bit offsets would not reach."""
    width, rows = 64, 2**25 + 3
    weight = _sparse(rows, width)
    assert weight.numel() > 2**31
    ids = torch.tensor([[rows - 1, 0, rows - 2]])
    weight[ids[0]] = torch.arange(3 * width, dtype=torch.float32).reshape(3, width).bfloat16()
    offset = {"offset_a": torch.ones(3, 1), "offset_b": torch.ones(1, width)}
    out = splice_prompt(
        torch.zeros(1, width), input_ids=ids, weight=weight, **offset, backend=backend
    )
    assert torch.equal(out[0, 1:], (weight[ids[0]].float() + 1).bfloat16())


@pytest.mark.default_algorithms
@each_kernel
def test_strides_beyond_two_to_the_31_elements(backend: str) -> None:
    """Every tensor's last row lies past 2**31 elements, in its own memory."""
    far = 2**31 + 7

    def spread(tensor: Tensor) -> Tensor:
        memory = _sparse((tensor.shape[0] - 1) * far + tensor[0].numel())
        return memory.as_strided(tensor.shape, (far, *tensor.stride()[1:])).copy_(tensor)

    sizes = Sizes(m=2, n=2, r=2, k=2, h=2, d=5, batch=2, length=2)
    case = make_case(sizes, padding="none", dtype=torch.bfloat16)
    cotangent = cotangent_of(case)
    plain = run(case, backend, cotangent)
    for name in SEVEN[:6]:
        leaf = spread(case.parameters[name].detach()).requires_grad_()
        other = replace(case, parameters={**case.parameters, name: leaf})
        for key, tensor in run(other, backend, cotangent).items():
            assert torch.equal(tensor, plain[key]), (name, key)
        del leaf, other
    assert_same_bits(case, case, backend, spread)


# Ids


@each_kernel
def test_ids_outside_are_nan_and_never_read(backend: str) -> None:
    """Where values are not looked at first, as on a GPU."""
    case = make_case(Sizes(tasks=3), dtype=torch.float32, padding="none")
    ids = case.input_ids.clone()
    ids[0, 1], ids[2, 5], ids[2, 0] = 11, -1, 2**62
    inputs = case.inputs(input_ids=ids, task_ids=torch.tensor([0, 3, 2, -1]))
    out, _ = dispatch.load(backend).splice_forward(inputs, 0.5)
    bad = torch.zeros(4, 9, dtype=torch.bool)
    bad[0, 3 + 1] = bad[2, 3 + 5] = bad[2, 3 + 0] = True
    bad[[1, 3]] = True
    assert out[bad].isnan().all()
    assert out[~bad].isfinite().all()


@each_kernel
@pytest.mark.parametrize("tasks", [1, 3, 9])
def test_rows_without_a_task_get_no_gradient(tasks: int, backend: str) -> None:
    case = make_case(Sizes(tasks=tasks), dtype=torch.float32, padding="none")
    last = tasks - 1
    grad = torch.ones(4, 9, 5)
    alone = torch.zeros_like(grad)
    alone[[0, 2]] = 1
    given = case.inputs(task_ids=torch.tensor([0, tasks, last, -1]))
    kernels = dispatch.load(backend)
    _, kept = kernels.splice_forward(given, 0.5)
    got = kernels.splice_backward(grad, given, kept, 0.5, True, True)
    given = case.inputs(task_ids=torch.tensor([0, 0, last, last]))
    expected = eager.splice_backward(alone, given, [], 0.5, True, True)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# The same bits again, whatever is around

REPEATED = {
    "eager": TILES["eager"]["tiles"],
    "triton": SHAPES["prime"],
    "host": TILES["host"]["a bank of tiles"],
}


@pytest.mark.default_algorithms
@over(EAGER, TRITON, HOST)
@pytest.mark.parametrize("padding", ["none", "holes"])
def test_repeated_runs_agree_to_the_bit(padding: str, backend: str) -> None:
    case = make_case(REPEATED[backend], padding=padding, dtype=torch.float32)
    assert_same_bits(case, case, backend)


@each_backend
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("amount", [1, 37])
def test_padding_changes_no_bit_of_a_token(side: str, amount: int, backend: str) -> None:
    """The defect of offsets indexed by column, which METHOD's rule removes."""
    case = make_case(Sizes(n=64, d=21), padding="none", dtype=torch.float32)
    prompt = case.parameters["short_prompt"]
    left, right = (amount, 0) if side == "left" else (0, amount)
    out = case.padded(left, right).splice(prompt, backend)
    assert torch.equal(out[:, 3 + left : 3 + left + 6], case.splice(prompt, backend)[:, 3:])


@each_backend
def test_neighbours_change_no_bit_of_a_row(backend: str) -> None:
    """A row alone, in a batch, in another place of it: the same text out."""
    case = make_case(Sizes(batch=11, n=40, length=35), padding="holes", dtype=torch.float32)
    prompt = case.parameters["short_prompt"]
    whole = case.splice(prompt, backend)
    for rows in ([3], [10, 3], [0, 1, 2, 3]):
        assert torch.equal(case.rows(rows).splice(prompt, backend), whole[rows])


@pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning")
@each_backend
def test_padding_keeps_its_embedding_when_the_offset_is_not_finite(backend: str) -> None:
    case = make_case(Sizes(), padding="right", dtype=torch.float32)
    assert case.attention_mask is not None
    infinite = torch.full((7, 2), float("inf"))
    case = replace(case, parameters={**case.parameters, "offset_a": infinite})
    out = case.splice(torch.zeros(3, 5), backend)
    padding = case.attention_mask == 0
    assert padding.any()
    assert torch.equal(out[:, 3:][padding], case.weight[case.input_ids][padding])
