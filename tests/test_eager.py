"""The eager backend against the definition: derivatives, precision, layouts, memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ept_fast import reconstruct_prompt, splice_prompt
from ept_fast.backends.eager.splice import tile_config
from tests.cases import ACTIVATIONS, GATES, PADDINGS, Case, Sizes, make_case, make_mask, run
from tests.parity import (
    LARGE_SCORES,
    assert_as_exact_as_the_definition,
    assert_no_slope_at_zero,
    large_scores,
)

TASKS = (None, 2)
SMALL = {"m": 2, "n": 3, "r": 2, "k": 2, "h": 2, "d": 3}  # gradcheck evaluates every element twice
PARTS = {
    "all": {},
    "no fusion": {"fusion": False},
    "no spaces": {"spaces": False},
    "no offset": {"offset": False},
    "prompt only": {"offset": False, "spaces": False},
}


def _reconstruct_leaves(case: Case) -> tuple[Any, tuple[Tensor, ...]]:
    names, leaves = list(case.parameters), tuple(case.parameters.values())

    def function(*tensors: Tensor) -> Tensor:
        return reconstruct_prompt(
            **dict(zip(names, tensors, strict=True)), **case.flags, backend="eager"
        )

    return function, leaves


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reconstruct_gradcheck(activation: str, gate: str, part: str, tasks: int | None) -> None:
    case = make_case(Sizes(**SMALL, tasks=tasks), activation=activation, gate=gate, **PARTS[part])
    function, leaves = _reconstruct_leaves(case)
    torch.testing.assert_close(function(*leaves), case.reconstruct("reference"), rtol=0, atol=1e-12)
    # without fusion the offset has no part in the first operation, and no gradient from it
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])
@pytest.mark.parametrize("lookup", [True, False], ids=["ids", "embeds"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_splice_gradcheck(padding: str, lookup: bool, offset: bool, tasks: int | None) -> None:
    case = make_case(Sizes(d=3, tasks=tasks), offset=offset, padding=padding)
    names = ["prompt"] + ["offset_a", "offset_b"] * offset + ["inputs_embeds"] * (not lookup)
    embeds = case.weight[case.input_ids].requires_grad_()
    have = {**case.parameters, "prompt": case.parameters["short_prompt"], "inputs_embeds": embeds}
    text = {"input_ids": case.input_ids, "weight": case.weight} if lookup else {}

    def function(*tensors: Tensor, backend: str = "eager") -> Tensor:
        return splice_prompt(
            **dict(zip(names, tensors, strict=True)),
            **text,
            scaling=0.3,
            attention_mask=case.attention_mask,
            task_ids=case.task_ids,
            backend=backend,
        )

    leaves = tuple(have[name] for name in names)
    torch.testing.assert_close(
        function(*leaves), function(*leaves, backend="reference"), rtol=0, atol=1e-13
    )
    assert torch.autograd.gradcheck(function, leaves)


SHAPES = {
    "one": Sizes(m=1, n=1, r=1, k=1, h=1, d=1, batch=1, length=1),
    "odd": Sizes(m=7, n=29, r=5, k=3, h=5, d=37, batch=5, length=23),
    "bank": Sizes(m=5, n=17, r=3, k=2, h=4, d=24, batch=7, length=13, tasks=4),
    "text tiles": Sizes(m=4, n=700, r=6, k=2, h=4, d=512, batch=3, length=601),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("table", "parameters"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_error_is_about_the_definitions_own(
    table: torch.dtype, parameters: torch.dtype, shape: str, padding: str
) -> None:
    """The factored algebra associates the same products in another way, and rounds more often."""

    cases = (
        make_case(SHAPES[shape], padding=padding, dtype=parameters, seed=seed) for seed in range(8)
    )
    assert_as_exact_as_the_definition(
        (replace(case, weight=case.weight.to(table)) for case in cases), "eager"
    )


@pytest.mark.parametrize(("scores", "size", "cancels"), LARGE_SCORES)
def test_large_scores(scores: str, size: float, cancels: bool) -> None:
    assert_as_exact_as_the_definition(large_scores(scores, size), "eager", cancels=cancels)


def test_relu_has_no_slope_at_zero() -> None:
    assert_no_slope_at_zero("eager")


def _layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "transposed", tensor.mT.contiguous().mT
    wide = torch.full(
        (*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"), dtype=tensor.dtype
    )
    wide[..., 1::2] = tensor
    yield "sliced", wide[..., 1::2]


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
@pytest.mark.parametrize("tasks", TASKS)
def test_layouts(layout: str, tasks: int | None) -> None:
    """Strides do not change a bit of the results."""
    case = make_case(Sizes(tasks=tasks), padding="right", dtype=torch.float32)
    cotangent = torch.randn(4, 9, 5, generator=torch.Generator().manual_seed(1))
    plain = run(case, "eager", cotangent)
    strided = {
        name: dict(_layouts(t.detach()))[layout].requires_grad_() if t.dim() > 1 else t
        for name, t in case.parameters.items()
    }
    weight = dict(_layouts(case.weight))[layout]
    other = Case(**{**vars(case), "parameters": strided, "weight": weight})
    for name, tensor in run(other, "eager", dict(_layouts(cotangent))[layout]).items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-6, atol=1e-6)


def test_expanded_inputs_and_gradients() -> None:
    """Stride-0 embeddings, mask and gradient (that of a plain sum)."""
    case = make_case(Sizes(), dtype=torch.float32, padding="none")
    embeds = torch.randn(1, 1, 5).expand(4, 6, 5)
    mask = torch.ones(1, 1, dtype=torch.int64).expand(4, 6)
    grads = {}
    for backend in ("eager", "reference"):
        prompt = case.parameters["short_prompt"]
        a, b = case.parameters["offset_a"], case.parameters["offset_b"]
        out = splice_prompt(
            prompt,
            inputs_embeds=embeds,
            offset_a=a,
            offset_b=b,
            attention_mask=mask,
            backend=backend,
        )
        grads[backend] = torch.autograd.grad(out.sum(), [prompt, a, b])
    for got, expected in zip(grads["eager"], grads["reference"], strict=True):
        torch.testing.assert_close(got, expected)


@given(data=st.data())
@settings(max_examples=150)
def test_random_cases(data: st.DataObject) -> None:
    """Shapes and flags at random, float64: output and every gradient."""
    small = st.integers(1, 6)
    n = data.draw(st.integers(1, 9))
    sizes = Sizes(
        m=data.draw(small),
        n=n,
        r=data.draw(small),
        k=data.draw(small),
        h=data.draw(small),
        d=data.draw(st.integers(1, 40)),
        batch=data.draw(st.integers(0, 6)),
        length=data.draw(st.integers(0, n)),
        tasks=data.draw(st.sampled_from([None, 1, 3])),
    )
    case = make_case(
        sizes,
        offset=data.draw(st.booleans()),
        spaces=data.draw(st.booleans()),
        padding=data.draw(st.sampled_from(PADDINGS)),
        fusion=data.draw(st.booleans()),
        activation=data.draw(st.sampled_from(ACTIVATIONS)),
        gate=data.draw(st.sampled_from(GATES)),
        seed=data.draw(st.integers(0, 99)),
    )
    shape = (sizes.batch, sizes.m + sizes.length, sizes.d)
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, expected = (run(case, backend, cotangent) for backend in ("eager", "reference"))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-9)


def test_padding_keeps_its_embedding_when_the_offset_is_not_finite() -> None:
    case = make_case(Sizes(), padding="right")
    mask = make_mask("right", 4, 6, torch.Generator().manual_seed(3))
    assert mask is not None
    out = splice_prompt(
        torch.zeros(3, 5, dtype=torch.float64),
        input_ids=case.input_ids,
        weight=case.weight,
        offset_a=torch.full((7, 2), float("inf"), dtype=torch.float64),
        offset_b=case.parameters["offset_b"].detach(),
        attention_mask=mask,
    )
    padding = mask == 0
    assert padding.any()
    assert torch.equal(out[:, 3:][padding], case.weight[case.input_ids][padding])


@pytest.mark.default_algorithms
@pytest.mark.parametrize("padding", PADDINGS)
def test_repeated_runs_agree_to_the_bit(padding: str) -> None:
    sizes = SHAPES["text tiles"]
    case = make_case(sizes, padding=padding, dtype=torch.float32)
    cotangent = torch.randn(sizes.batch, sizes.m + sizes.length, sizes.d)
    first = run(case, "eager", cotangent)
    for _ in range(3):
        for name, tensor in run(case, "eager", cotangent).items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("amount", [1, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_bit_of_a_token(side: str, amount: int) -> None:
    """The defect of offsets indexed by column, which METHOD's rule removes."""
    case = make_case(Sizes(n=16), padding="none", dtype=torch.float32)
    plain = case.splice(case.parameters["short_prompt"], "eager")
    pad = (amount, 0) if side == "left" else (0, amount)
    padded = Case(
        **{
            **vars(case),
            "input_ids": torch.nn.functional.pad(case.input_ids, pad),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(case.input_ids), pad),
        }
    )
    out = padded.splice(case.parameters["short_prompt"], "eager")
    text = out[:, 3 + amount :] if side == "left" else out[:, 3 : 3 + 6]
    assert torch.equal(text, plain[:, 3:])


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Largest(TorchDispatchMode):
    """The most elements that any operation's new tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize("padding", PADDINGS)
def test_nothing_of_size_n_by_d(padding: str) -> None:
    """Beyond the output and the gradients nothing larger than a tile of constant size is made."""
    sizes = Sizes(m=4, n=4096, r=3, k=2, h=2, d=256, batch=2, length=4096)
    case = make_case(sizes, padding=padding, dtype=torch.float32)
    config = tile_config(sizes.length, sizes.d, 4)
    tile = config.positions * config.rows * sizes.d
    assert tile <= 512 * 1024 // 4
    cotangent = torch.randn(sizes.batch, sizes.m + sizes.length, sizes.d)
    with _Largest() as seen:
        case.both("eager").backward(cotangent)
    limit = max(tile, sizes.n * sizes.batch)
    beyond = sorted(size for size in seen.sizes if size > limit)
    assert beyond == [cotangent.numel()]  # the output


def test_tiles_cover_every_size() -> None:
    for length, width, itemsize in itertools.product(
        (0, 1, 17, 512, 32768), (1, 768, 16384), (4, 8)
    ):
        config = tile_config(length, width, itemsize)
        assert config.positions >= 1
        assert config.rows >= 1
        assert config.positions <= max(length, 1)
