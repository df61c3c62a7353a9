"""torch.compile on the device: one graph, no recompiling for new sizes, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._dynamo.utils import counters

from ept_fast import reconstruct_prompt, splice_prompt
from tests.cases import Case, Sizes
from tests.gpu.support import assert_same_bits, device_case, make_cotangent, needs_gpu, step

pytestmark = [pytest.mark.gpu, pytest.mark.default_algorithms]

SIZES = {"one prompt": Sizes(), "bank": Sizes(tasks=2)}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def _flat(
    backend: str,
    parameters: dict[str, Tensor],
    weight: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
) -> Tensor:
    """Both operations as a user's model would call them, for the compiler to trace."""
    prompt = reconstruct_prompt(**parameters, scaling=0.4, temperature=0.7, backend=backend)
    return splice_prompt(
        prompt,
        input_ids=input_ids,
        weight=weight,
        offset_a=parameters["offset_a"],
        offset_b=parameters["offset_b"],
        scaling=0.4,
        attention_mask=attention_mask,
        task_ids=task_ids,
        backend=backend,
    )


def _step(function: Callable[..., Tensor], case: Case, backend: str, grad: Tensor) -> list[Tensor]:
    mask, tasks = case.attention_mask, case.task_ids
    out = function(backend, case.parameters, case.weight, case.input_ids, mask, tasks)
    grads = torch.autograd.grad(out, list(case.parameters.values()), grad)
    return [t.detach().clone() for t in (out, *grads)]  # a CUDA graph writes over its outputs


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(backend: str, dynamic: bool, shape: str) -> None:
    """The same kernels run, so the bits are the same."""
    compiled = torch.compile(_flat, fullgraph=True, dynamic=dynamic)
    case = device_case(SIZES[shape])
    grad = make_cotangent(case)
    assert_same_bits(_step(compiled, case, backend, grad), step(case, backend, grad))


def test_compiled_code_serves_new_batch_sizes_and_lengths(backend: str) -> None:
    """One graph for the first sizes and one for all others."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(_flat, fullgraph=True, backend=counter)
    for batch, length in ((4, 6), (3, 5), (2, 7), (5, 4), (6, 3)):
        case = device_case(Sizes(batch=batch, length=length), padding="right")
        grad = make_cotangent(case)
        assert_same_bits(_step(compiled, case, backend, grad), step(case, backend, grad))
    assert counter.frame_count <= 2


def test_the_callers_autocast_does_not_reach_into_compiled_code(backend: str) -> None:
    case = device_case(SIZES["one prompt"])
    grad = make_cotangent(case)
    expected = step(case, backend, grad)
    compiled: Any = torch.compile(_flat, fullgraph=True)
    with torch.autocast(grad.device.type, torch.bfloat16):
        got = _step(compiled, case, backend, grad)
    assert_same_bits(got, expected)


@needs_gpu
@pytest.mark.parametrize("shape", SIZES)
def test_compiled_with_cuda_graphs(backend: str, shape: str) -> None:
    compiled = torch.compile(_flat, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):  # the first runs warm up and record, the others replay
        torch.compiler.cudagraph_mark_step_begin()
        case = device_case(SIZES[shape], seed=seed)
        grad = make_cotangent(case)
        assert_same_bits(_step(compiled, case, backend, grad), step(case, backend, grad))
    assert counters["inductor"]["cudagraph_skips"] == 0
