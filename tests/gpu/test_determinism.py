"""The same bits on every run, also beside other work, in a CUDA graph, and without a host sync."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests import cases
from tests.cases import PADDINGS, Case, Sizes
from tests.gpu.support import (
    DEVICE,
    ON_GPU,
    assert_same_bits,
    device_case,
    gathered_case,
    make_cotangent,
    needs_gpu,
    step,
)

pytestmark = [pytest.mark.gpu, pytest.mark.default_algorithms]

SIZES = Sizes(m=40, n=256, r=30, k=4, h=8, d=768, batch=16, length=256, vocabulary=1000)
SHAPES = {
    "one prompt": SIZES,
    "bank": Sizes(m=20, n=64, r=16, k=2, h=8, d=256, batch=24, length=64, tasks=5),
    "more tasks than rows": Sizes(m=20, n=64, r=16, k=2, h=8, d=256, batch=5, length=64, tasks=9),
}
if not ON_GPU:
    SHAPES = {name: replace(cases.SHAPES["prime"], tasks=s.tasks) for name, s in SHAPES.items()}
RUNS = 20 if ON_GPU else 3


@contextmanager
def _other_work() -> Iterator[None]:
    """Matrix products and memory traffic on a second stream meanwhile."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        a = torch.randn(4096, 4096, device=DEVICE)
        for _ in range(20):
            a = (a @ a).div_(64).clone()
    yield
    stream.synchronize()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_repeated_runs_agree_to_the_bit(backend: str, shape: str, padding: str) -> None:
    case = device_case(SHAPES[shape], "bfloat16", padding=padding)
    cotangent = make_cotangent(case)
    first = step(case, backend, cotangent)
    for _ in range(RUNS - 1):
        assert_same_bits(step(case, backend, cotangent), first)


def test_repeated_gathers_agree_to_the_bit(backend: str) -> None:
    """Each row's gradient is summed over about a hundred tokens, in one order."""
    case = gathered_case(backend, SHAPES["one prompt"], 6, "bfloat16")
    cotangent = make_cotangent(case)
    first = step(case, backend, cotangent)
    for _ in range(RUNS - 1):
        assert_same_bits(step(case, backend, cotangent), first)


@needs_gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_runs_beside_other_work_agree_to_the_bit(backend: str, shape: str) -> None:
    case = device_case(SHAPES[shape], padding="holes")
    cotangent = make_cotangent(case)
    first = step(case, backend, cotangent)
    with _other_work():
        for _ in range(RUNS):
            assert_same_bits(step(case, backend, cotangent), first)


@needs_gpu
def test_another_current_stream(backend: str) -> None:
    """Kernels go to the stream that is current."""
    case = device_case(SHAPES["one prompt"])
    cotangent = make_cotangent(case)
    expected = step(case, backend, cotangent)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            case.weight.mul_(1)  # a later kernel on this stream reads what this one writes
        got = step(case, backend, cotangent)
    stream.synchronize()
    assert_same_bits(got, expected)


def _tensors(case: Case) -> list[Tensor]:
    """What a replayed graph reads."""
    given = (case.weight, case.input_ids, case.attention_mask, case.task_ids)
    return [*(t.detach() for t in case.parameters.values()), *(t for t in given if t is not None)]


@needs_gpu
@pytest.mark.parametrize("padding", ["none", "holes"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_step_replays_to_the_bit(backend: str, shape: str, padding: str) -> None:
    """Forward and backward of the whole path in one CUDA graph, replayed on other values."""
    case = device_case(SHAPES[shape], "bfloat16", padding=padding)
    cotangent = make_cotangent(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(case, backend, cotangent)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = step(case, backend, cotangent)
    for seed in (1, 2):
        other = device_case(SHAPES[shape], "bfloat16", padding=padding, seed=seed)
        for ours, theirs in zip(_tensors(case), _tensors(other), strict=True):
            ours.copy_(theirs)
        cotangent.copy_(make_cotangent(other, seed=seed + 10))
        for tensor in static:
            tensor.fill_(float("nan"))
        graph.replay()
        assert_same_bits(static, step(case, backend, cotangent))


@needs_gpu
@pytest.mark.parametrize("padding", ["none", "holes"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_host_sync(backend: str, shape: str, padding: str) -> None:
    case = device_case(SHAPES[shape], padding=padding)
    cotangent = make_cotangent(case)
    step(case, backend, cotangent)  # compiles and loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, backend, cotangent)
    finally:
        torch.cuda.set_sync_debug_mode("default")
