"""Autocast, modes of autograd, ids that name nothing, and the module, on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ept_fast import EPTConfig, FusedEPTPrompt, reconstruct_prompt
from ept_fast.ops import dispatch
from ept_fast.ops.types import Parameters
from tests.cases import Sizes
from tests.gpu.support import (
    DEVICE,
    ON_GPU,
    assert_no_worse,
    assert_same_bits,
    device_case,
    make_cotangent,
    needs_gpu,
    skip_rounding,
    step,
)

pytestmark = [pytest.mark.gpu, pytest.mark.default_algorithms]

SIZES = Sizes(m=7, n=29, r=5, k=3, h=5, d=37, batch=5, length=23, vocabulary=50)
BANK = Sizes(m=5, n=37, r=3, k=2, h=4, d=48, batch=7, length=35, vocabulary=50, tasks=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_no_bit(backend: str, dtype: torch.dtype) -> None:
    case = device_case(SIZES)
    cotangent = make_cotangent(case)
    expected = step(case, backend, cotangent)
    with torch.autocast(DEVICE.type, dtype):
        got = step(case, backend, cotangent)
    assert_same_bits(got, expected)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_without_gradients(backend: str, mode: Any) -> None:
    case = device_case(SIZES)
    with mode():
        out = case.both(backend)
    assert not out.requires_grad
    assert_same_bits([out], [case.both(backend).detach()])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(backend: str, reentrant: bool) -> None:
    case = device_case(SIZES)
    cotangent = make_cotangent(case)
    names, leaves = list(case.parameters), list(case.parameters.values())

    def function(*tensors: Tensor) -> Tensor:
        return replace(case, parameters=dict(zip(names, tensors, strict=True))).both(backend)

    out = checkpoint(function, *leaves, use_reentrant=reentrant)
    out.backward(cotangent)
    grads = [leaf.grad for leaf in leaves]
    assert all(grad is not None for grad in grads)
    assert_same_bits([out.detach(), *grads], step(case, backend, cotangent))  # type: ignore[list-item]


# Ids that name nothing. A CPU refuses them, a GPU answers with NaN.


@needs_gpu
@pytest.mark.parametrize("bad", [-1, 50, 2**31 - 1, 2**31 + 5, -(2**40)])
@pytest.mark.parametrize("shape", [SIZES, BANK], ids=["one prompt", "bank"])
def test_an_id_outside_the_vocabulary_is_nan(backend: str, shape: Sizes, bad: int) -> None:
    case = device_case(shape, padding="right")
    prompt = case.parameters["short_prompt"].detach()
    clean = case.splice(prompt, backend).detach()
    for row, column in ((1, 0), (3, 22)):
        case.input_ids[row, column] = bad
        clean[row, shape.m + column] = float("nan")
    assert_same_bits([case.splice(prompt, backend).detach()], [clean])


@needs_gpu
@pytest.mark.parametrize("bad", [-1, 4, 2**31 + 1])
def test_a_task_outside_the_bank_is_nan(backend: str, bad: int) -> None:
    """Its row is; the other rows, and the gradients, are as if it were not there."""
    case = device_case(BANK, padding="holes")
    assert case.task_ids is not None
    case.task_ids[2] = bad
    keep = [0, 1, 3, 4, 5, 6]
    others = case.rows(keep)
    cotangent = make_cotangent(case)
    out, *grads = step(case, backend, cotangent)
    assert bool(out[2].isnan().all())
    plain = step(others, "reference", cotangent[keep])
    exact = step(others.to(torch.float64), "reference", cotangent[keep].double())
    names = ["output", *case.parameters]
    ours = [out[keep], *grads]
    named = (dict(zip(names, tensors, strict=True)) for tensors in (ours, plain, exact))
    assert_no_worse(tuple(named))


@pytest.mark.parametrize("what", ["id", "task", "mask"])
def test_values_are_checked_on_request(
    backend: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPT_FAST_CHECK", "1")
    case = device_case(BANK, padding="right")
    assert case.attention_mask is not None
    assert case.task_ids is not None
    expected = {
        "id": (IndexError, "input_ids: .* got 50 at row 2, column 3"),
        "task": (IndexError, "task_ids: .* got 4 at row 2"),
        "mask": (ValueError, "attention_mask: .* got 7 at row 2, column 3"),
    }
    if what == "id":
        case.input_ids[2, 3] = 50
    elif what == "task":
        case.task_ids[2] = 4
    else:
        case.attention_mask[2, 3] = 7
    error, message = expected[what]
    with pytest.raises(error, match=message):
        case.splice(case.parameters["short_prompt"], backend)


# Choice of the backend, and the module


@needs_gpu
def test_triton_is_chosen_by_default() -> None:
    case = device_case(SIZES)
    assert dispatch.select(None, Parameters(**case.parameters)) == "triton"
    bfloat16 = {name: t.detach().bfloat16() for name, t in case.parameters.items()}
    assert dispatch.select(None, Parameters(**bfloat16)) == "triton"
    out = reconstruct_prompt(**case.parameters, **case.flags)
    assert_same_bits([out.detach()], [case.reconstruct("triton").detach()])


@needs_gpu
def test_float64_goes_to_eager() -> None:
    case = device_case(SIZES).to(torch.float64)
    assert dispatch.select(None, Parameters(**case.parameters)) == "eager"
    got = reconstruct_prompt(**case.parameters, **case.flags)
    torch.testing.assert_close(got, case.reconstruct("reference"), rtol=0, atol=1e-12)


def _module(dtype: torch.dtype, num_tasks: int | None = None) -> tuple[FusedEPTPrompt, nn.Module]:
    torch.manual_seed(0)
    table = nn.Embedding(50, 48).to(dtype)
    config = EPTConfig(48, num_virtual_tokens=5, max_length=37, rank=3, num_spaces=2, space_dim=4)
    prompt = FusedEPTPrompt(config, table, num_tasks=num_tasks)
    with torch.no_grad():  # offset_a and space_up start from zero
        for parameter in prompt.parameters():
            parameter.copy_(torch.randn(parameter.shape).div(parameter.shape[-2:].numel() ** 0.25))
    return prompt.to(DEVICE), table.to(DEVICE)


def _outputs(prompt: FusedEPTPrompt, num_tasks: int | None) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(50, (6, 21), generator=g).to(DEVICE)
    mask = torch.randint(0, 2, (6, 21), generator=g).to(DEVICE)
    tasks = torch.randint(num_tasks, (6,), generator=g).to(DEVICE) if num_tasks else None
    out = prompt(ids, attention_mask=mask, task_ids=tasks).inputs_embeds
    cotangent = torch.randn(out.shape, generator=g).to(out)
    return [out.detach(), *torch.autograd.grad(out, list(prompt.parameters()), cotangent)]


@pytest.mark.parametrize("num_tasks", [None, 3])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16], ids=str)
def test_module(
    backend: str, table: torch.dtype, state: torch.dtype, num_tasks: int | None
) -> None:
    skip_rounding(state)
    prompt, embedding = _module(table, num_tasks)
    prompt.to(state)
    assert {p.dtype for p in prompt.parameters()} == {state}
    assert embedding.weight.dtype == table
    results = {}
    for name in (backend, "reference"):
        prompt.backend = name
        results[name] = _outputs(prompt, num_tasks)
    if ON_GPU and backend == "triton":
        prompt.backend = None
        assert_same_bits(_outputs(prompt, num_tasks), results[backend])
    prompt.backend = backend
    ids = torch.arange(20, device=DEVICE).view(2, 10)
    tasks = torch.tensor([2, 0], device=DEVICE) if num_tasks else None
    folded, own = (p(ids, task_ids=tasks).inputs_embeds for p in (prompt.fold(), prompt))
    assert_same_bits([folded], [own.detach()])
    prompt.double()
    embedding.double()
    prompt.backend = "reference"
    names = ["output", *(name for name, _ in prompt.named_parameters())]
    tensors = (results[backend], results["reference"], _outputs(prompt, num_tasks))
    assert_no_worse(tuple(dict(zip(names, each, strict=True)) for each in tensors))
