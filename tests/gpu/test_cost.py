"""What a call costs besides time: launches and memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.cases import NAMED, Case, Sizes
from tests.gpu.support import device_case, make_cotangent, needs_gpu
from tests.memory import allocations

pytestmark = [pytest.mark.gpu, pytest.mark.default_algorithms, needs_gpu]

WORKSPACE = 16 << 20


def _launches(function: Callable[[], Any], folder: Path) -> list[str]:
    """Names of what ran on the device for a call: kernels, copies, fills."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    names = [
        event["name"]
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    if not names:
        pytest.skip("the profiler records no kernels on this machine")
    return names


CASES = {
    "t5-base": (NAMED["t5-base"], "none"),
    "t5-base, holes": (NAMED["t5-base"], "holes"),
    "bank": (NAMED["bank"], "left"),
    "more tasks than rows": (
        Sizes(m=20, n=64, r=16, k=2, h=8, d=256, batch=5, length=64, tasks=9),
        "holes",
    ),
}


@pytest.mark.parametrize("types", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_launches(backend: str, name: str, types: str, tmp_path: Path) -> None:
    sizes, padding = CASES[name]
    case = device_case(sizes, types, padding=padding)
    leaves = list(case.parameters.values())
    prompt = case.reconstruct(backend)
    y = torch.randn_like(prompt)
    leaf = prompt.detach().requires_grad_()
    out = case.splice(leaf, backend)
    cotangent = make_cotangent(case)
    inputs = [leaf, case.parameters["offset_a"], case.parameters["offset_b"]]

    def backward(result: Tensor, tensors: list[Tensor], grad: Tensor) -> Any:
        return torch.autograd.grad(result, tensors, grad, retain_graph=True)

    counted = {
        "reconstruct forward": _launches(lambda: case.reconstruct(backend), tmp_path),
        "reconstruct backward": _launches(lambda: backward(prompt, leaves, y), tmp_path),
        "splice forward": _launches(lambda: case.splice(leaf, backend), tmp_path),
        "splice backward": _launches(lambda: backward(out, inputs, cotangent), tmp_path),
    }
    # Masks and task ids are looked at in a launch of its own; Triton's backward has it from there.
    plan = int(padding != "none" or sizes.tasks is not None)
    most = {
        "reconstruct forward": 1 + (backend == "cuda"),
        "reconstruct backward": 1 + (backend == "cuda"),
        "splice forward": 1 + plan,
        "splice backward": 2 + plan * (backend == "cuda"),
    }
    assert {key: names for key, names in counted.items() if len(names) > most[key]} == {}


def _path(case: Case, backend: str, cotangent: Tensor) -> tuple[int, int]:
    """Bytes of workspace in the forward and in the backward of the whole path."""
    forward = allocations(lambda: case.both(backend), "cuda")
    leaves, out = list(case.parameters.values()), forward.result
    backward = allocations(lambda: torch.autograd.grad(out, leaves, cotangent), "cuda")
    return forward.peak - out.nbytes, backward.peak - sum(grad.nbytes for grad in backward.result)


@pytest.mark.parametrize("padding", ["none", "holes"])
@pytest.mark.parametrize("types", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", NAMED)
def test_workspace(backend: str, shape: str, types: str, padding: str) -> None:
    """Beyond output and gradients: what is saved, P' and its gradient, and partial sums."""
    case = device_case(NAMED[shape], types, padding=padding)
    cotangent = make_cotangent(case)
    _path(case, backend, cotangent)  # compiles the kernels
    forward, backward = _path(case, backend, cotangent)
    s = case.sizes
    # P' and its gradient pass from one operation to the other, and autograd adds the offset's two
    # gradients: these are gradients as well, though no caller sees them.
    prompts = 4 * (s.tasks or 1) * s.m * s.d
    offsets = 4 * (s.tasks or 1) * s.r * (s.n + s.d)
    assert forward <= WORKSPACE + prompts, f"{forward / 1e6:.1f} MB"
    # One very long row needs more parts of its sums than that to keep a GPU busy.
    workspace = max(WORKSPACE, cotangent.numel() // 4) if shape == "long" else WORKSPACE
    assert backward <= workspace + prompts + 2 * offsets, f"{backward / 1e6:.1f} MB"
