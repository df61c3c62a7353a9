"""Tensors with more than 2^31 elements: offsets that 32 bits do not hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ept_fast import reconstruct_prompt, splice_prompt
from tests.cases import Sizes, make_case
from tests.gpu.support import (
    DEVICE,
    assert_same_bits,
    check_function,
    device_case,
    make_cotangent,
    needs_gpu,
    step,
)

pytestmark = [pytest.mark.gpu, pytest.mark.default_algorithms, needs_gpu]

BEYOND = 2**31


def _need(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of the GPU's memory, {free:.0f} GB are free")


def _garbage(*shape: int) -> Tensor:
    """Bfloat16 NaN everywhere, so that an element read by mistake shows."""
    return torch.full(shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)


def test_a_large_table(backend: str) -> None:
    """Ids on both sides of the element 2^31 give what they give in a small table."""
    _need(12)
    width = 4096
    rows = BEYOND // width + 1000
    small = device_case(Sizes(4, 40, 3, 2, 4, width, batch=3, length=33), "bfloat16")
    edge = BEYOND // width
    places = torch.tensor([0, 1, edge // 2, edge - 1, edge, edge + 1, edge + 7, rows - 1])
    places = places.to(DEVICE)
    table = _garbage(rows, width)
    table[places] = small.weight[:8]
    ids = small.input_ids % 8
    large = replace(small, weight=table, input_ids=places[ids])
    small = replace(small, input_ids=ids)
    cotangent = make_cotangent(small)
    assert_same_bits(step(large, backend, cotangent), step(small, backend, cotangent))


def test_a_large_output_and_its_gradient(backend: str) -> None:
    """Against the definition row by row; the gradients sum over all rows.

    Only an address is in question, and a wrong one is no matter of rounding: each sum over half a
    million tokens is compared by the relative norm of its error.
    """
    _need(24)
    sizes = Sizes(m=8, n=8192, r=5, k=1, h=2, d=4096, batch=64, length=8192, vocabulary=100)
    assert sizes.batch * (sizes.m + sizes.length) * sizes.d > BEYOND
    case = device_case(sizes, "bfloat16", padding="right")
    assert case.attention_mask is not None
    g = torch.Generator(DEVICE).manual_seed(1)
    shape = (sizes.batch, sizes.m + sizes.length, sizes.d)
    cotangent = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    cotangent.normal_(generator=g)
    names = ("short_prompt", "offset_a", "offset_b")
    leaves = [case.parameters[name] for name in names]
    out = case.splice(leaves[0], backend)
    grads = torch.autograd.grad(out, leaves, cotangent)
    assert bool(out.isfinite().all())
    sums = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    exact = case.to(torch.float64)
    exact_leaves = [exact.parameters[name] for name in names]
    for row in range(sizes.batch):
        one = replace(
            exact,
            input_ids=case.input_ids[row : row + 1],
            attention_mask=case.attention_mask[row : row + 1],
        )
        expected = one.splice(exact_leaves[0], "reference")
        parts = torch.autograd.grad(expected, exact_leaves, cotangent[row : row + 1].double())
        for total, part in zip(sums, parts, strict=True):
            total += part
        if row in (0, 1, 31, 32, 62, 63):
            error = (out[row] - expected[0]).abs().max().item()
            assert error <= torch.finfo(torch.bfloat16).eps * expected.abs().max().item(), row
    for name, got, total in zip(names, grads, sums, strict=True):
        assert ((got - total).norm() / total.norm()).item() < 1e-5, name


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "text", "width"])
def test_embeddings_and_gradients_with_large_strides(backend: str, axis: int) -> None:
    """Views whose last element lies beyond 2^31 elements from the first."""
    _need(16)
    batch, length, width = ((3, 9, 40), (1, 9, 40), (2, 9, 5))[axis]
    m = 4
    case = make_case(Sizes(m, length, 3, 2, 4, width, batch=batch, length=length))
    g = torch.Generator(DEVICE).manual_seed(1)

    def far(positions: int) -> Tensor:
        shape = (batch, positions, width)
        strides = [[0, width, 1], [0, 0, 1], [4096, 64, 0]][axis]
        strides[axis] = -(-BEYOND // (shape[axis] - 1)) + 64
        view = _garbage(BEYOND + 2**20).as_strided(shape, strides)
        return view.normal_(generator=g)

    leaves = {
        name: case.parameters[source].detach().to(DEVICE, torch.float32)
        for name, source in (("prompt", "short_prompt"), ("offset_a",) * 2, ("offset_b",) * 2)
    }
    embeds, cotangent = far(length), far(m + length)

    def splice(backend: str, **tensors: Tensor) -> Tensor:
        exact = tensors["prompt"].dtype == torch.float64
        text = embeds.double() if exact else embeds
        return splice_prompt(**tensors, inputs_embeds=text, scaling=0.3, backend=backend)

    check_function(splice, leaves, cotangent, backend)


def test_parameters_with_large_strides(backend: str) -> None:
    """Every parameter of both operations as a view that reaches beyond 2^31 elements."""
    _need(40)
    sizes = Sizes(m=17, n=17, r=17, k=17, h=17, d=17, batch=2, length=17, vocabulary=17)
    case = device_case(sizes, "all bfloat16")
    gap = 2**27 + 64  # 16 gaps lie between the first and the last of 17

    def far(tensor: Tensor) -> Tensor:
        strides = [17 * 17, 17, 1][-tensor.dim() :]
        strides[0] = gap
        view = _garbage(16 * gap + 17 * 17).as_strided(tensor.shape, strides)
        return view.copy_(tensor.detach())

    strided = {name: far(t) for name, t in case.parameters.items()}
    flags = case.flags

    def both(backend: str, **tensors: Tensor) -> Tensor:
        prompt = reconstruct_prompt(**tensors, **flags, backend=backend)
        return splice_prompt(
            prompt,
            input_ids=case.input_ids,
            weight=case.weight.to(prompt.dtype),
            offset_a=tensors["offset_a"],
            offset_b=tensors["offset_b"],
            scaling=0.4,
            attention_mask=case.attention_mask,
            backend=backend,
        )

    check_function(both, strided, make_cotangent(case), backend)
