"""The eager backend's derivatives in float64, and its tiles."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ept_fast import splice_prompt
from ept_fast.backends.eager.splice import tile_config
from tests.cases import ACTIVATIONS, BIASED, GATES, PADDINGS, PARTS, Sizes, make_case

TASKS = (None, 2)
SMALL = {"m": 2, "n": 3, "r": 2, "k": 2, "h": 2, "d": 3}  # gradcheck evaluates every element twice


ALL = PARTS | BIASED


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("part", ALL)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reconstruct_gradcheck(activation: str, gate: str, part: str, tasks: int | None) -> None:
    case = make_case(Sizes(**SMALL, tasks=tasks), activation=activation, gate=gate, **ALL[part])
    leaves = tuple(case.parameters.values())

    def function(*tensors: Tensor) -> Tensor:
        parameters = dict(zip(case.parameters, tensors, strict=True))
        return replace(case, parameters=parameters).reconstruct("eager")

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


def test_tiles_cover_every_size() -> None:
    for length, width, itemsize in itertools.product(
        (0, 1, 17, 512, 32768), (1, 768, 16384), (4, 8)
    ):
        config = tile_config(length, width, itemsize)
        assert config.positions >= 1
        assert config.rows >= 1
        assert config.positions <= max(length, 1)
