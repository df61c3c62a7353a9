"""torch.compile on the device: one graph, no recompiling for new sizes, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._dynamo.utils import counters

from tests.cases import Case, Sizes, flat
from tests.gpu.support import assert_same_bits, device_case, make_cotangent, needs_gpu, step

pytestmark = [pytest.mark.gpu, pytest.mark.default_algorithms]

SIZES = {"one prompt": Sizes(), "bank": Sizes(tasks=2)}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def _step(function: Callable[..., Tensor], case: Case, backend: str, grad: Tensor) -> list[Tensor]:
    mask, tasks = case.attention_mask, case.task_ids
    out = function(backend, case.parameters, case.weight, case.input_ids, mask, tasks)
    grads = torch.autograd.grad(out, list(case.parameters.values()), grad)
    return [t.detach().clone() for t in (out, *grads)]  # a CUDA graph writes over its outputs


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(backend: str, dynamic: bool, shape: str) -> None:
    """The same kernels run, so the bits are the same."""
    compiled = torch.compile(flat, fullgraph=True, dynamic=dynamic)
    case = device_case(SIZES[shape])
    grad = make_cotangent(case)
    assert_same_bits(_step(compiled, case, backend, grad), step(case, backend, grad))


def test_compiled_code_serves_new_batch_sizes_and_lengths(backend: str) -> None:
    """One graph for the first sizes and one for all others."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(flat, fullgraph=True, backend=counter)
    for batch, length in ((4, 6), (3, 5), (2, 7), (5, 4), (6, 3)):
        case = device_case(Sizes(batch=batch, length=length), padding="right")
        grad = make_cotangent(case)
        assert_same_bits(_step(compiled, case, backend, grad), step(case, backend, grad))
    assert counter.frame_count <= 2


def test_the_callers_autocast_does_not_reach_into_compiled_code(backend: str) -> None:
    case = device_case(SIZES["one prompt"])
    grad = make_cotangent(case)
    expected = step(case, backend, grad)
    compiled: Any = torch.compile(flat, fullgraph=True)
    with torch.autocast(grad.device.type, torch.bfloat16):
        got = _step(compiled, case, backend, grad)
    assert_same_bits(got, expected)


@needs_gpu
@pytest.mark.parametrize("shape", SIZES)
def test_compiled_with_cuda_graphs(backend: str, shape: str) -> None:
    compiled = torch.compile(flat, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):  # the first runs warm up and record, the others replay
        torch.compiler.cudagraph_mark_step_begin()
        case = device_case(SIZES[shape], seed=seed)
        grad = make_cotangent(case)
        assert_same_bits(_step(compiled, case, backend, grad), step(case, backend, grad))
    assert counters["inductor"]["cudagraph_skips"] == 0
