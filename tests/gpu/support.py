"""Cases on the device under test, and the rule that a kernel's error has to keep."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.cases import Case, Sizes, make_case, make_gathered, run

_WHERE = os.environ.get("EPT_FAST_TEST_DEVICE", "cuda")
# Only what would be launched on a GPU is wanted: tests.gpu.launches.
LISTING = _WHERE == "listing"
DEVICE = torch.device("cpu" if LISTING else _WHERE)
ON_GPU = DEVICE.type == "cuda" or LISTING
DRAWS = 4  # of a case, over which errors are means
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU: this is a rehearsal on a CPU")

TYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "all bfloat16": (torch.bfloat16, torch.bfloat16),
    "all float16": (torch.float16, torch.float16),
    "bfloat16 parameters": (torch.float32, torch.bfloat16),
}

Results = dict[str, Tensor]


def device_case(sizes: Sizes, types: str = "float32", **options: object) -> Case:
    """``make_case`` on the device, with the embeddings and the parameters in these types."""
    table, parameters = TYPES[types]
    skip_rounding(parameters)
    case = make_case(sizes, dtype=parameters, **options)  # type: ignore[arg-type]
    return on_device(replace(case, weight=case.weight.to(table)))


def gathered_case(
    backend: str, sizes: Sizes, count: int, types: str = "float32", *, seed: int = 0
) -> Case:
    """A case whose prompts are gathered from ``count`` rows."""
    if backend == "cuda":
        pytest.skip("cuda: these kernels do not gather a prompt")
    table, parameters = TYPES[types]
    case = make_gathered(sizes, count, seed, dtype=parameters)
    return on_device(replace(case, weight=case.weight.to(table)))


def on_device(case: Case) -> Case:
    """The case on the device."""
    return case.each_tensor(lambda t: t.to(DEVICE))


def skip_rounding(parameters: torch.dtype) -> None:
    """A prompt in bfloat16 is rounded before the second operation: not as on a GPU, on a CPU."""
    if parameters == torch.bfloat16 and not ON_GPU:
        pytest.skip("Triton's interpreter does not round bfloat16 to nearest")


def make_cotangent(case: Case, seed: int = 1) -> Tensor:
    """A gradient of the output, in its type."""
    s = case.sizes
    g = torch.Generator(DEVICE).manual_seed(seed)
    shape = (s.batch, s.m + s.length, s.d)
    return torch.randn(shape, generator=g, device=DEVICE).to(case.weight.dtype)


def step(case: Case, backend: str, cotangent: Tensor) -> list[Tensor]:
    """Output and all gradients of both operations; nothing is accumulated in ``.grad``."""
    out = case.both(backend)
    return [out.detach(), *torch.autograd.grad(out, list(case.parameters.values()), cotangent)]


def _mean(values: list[float]) -> float:
    """Root mean square."""
    return (sum(value * value for value in values) / len(values)) ** 0.5


def assert_no_worse(*draws: tuple[Results, Results, Results]) -> None:
    """At most twice the definition's own error, plus a room for summing in another order.

    The room is four ULP of the tensor's scale in float32, in which all sums are made; in a shorter
    type it is one ULP of that type. Errors and scales are means over the draws: of a tensor of few
    elements one error says little, and another library of matrix products has another.

    Args:
        *draws: of each, by name: what the kernels gave; the definition in the same types; and the
            definition in float64, on the same values.
    """
    measured: dict[str, list[tuple[float, float, float]]] = {}
    for ours, plain, exact in draws:
        assert ours.keys() == plain.keys() == exact.keys()
        for name, expected in exact.items():
            got = ours[name]
            assert got.shape == expected.shape, name
            assert got.dtype == plain[name].dtype, name
            if expected.numel() == 0:
                continue
            errors = [(t.double() - expected).abs().max().item() for t in (got, plain[name])]
            eps = max(torch.finfo(got.dtype).eps, 4 * torch.finfo(torch.float32).eps)
            room = eps * expected.abs().max().item()
            measured.setdefault(name, []).append((errors[0], errors[1], room))
    worse = []
    for name, each in measured.items():
        error, definition, room = map(_mean, map(list, zip(*each, strict=True)))
        if not error <= 2 * definition + room:  # NaN is worse as well
            worse.append(f"{name}: error {error:.3g}, definition {definition:.3g}, room {room:.3g}")
    assert not worse, "; ".join(worse)


def check_parity(
    draw: Callable[..., Case],
    backend: str,
    cotangent_of: Callable[[Case], Tensor] = make_cotangent,
    draws: int = DRAWS,
) -> None:
    """Both operations in a row: output and gradients against the definition in float64.

    ``draw(seed=seed)`` makes the cases, of the same shape and types; ``cotangent_of`` makes the
    gradient of each one's output.
    """
    found = []
    for seed in range(1 if LISTING else draws):
        case = draw(seed=seed)
        cotangent = cotangent_of(case)
        ours = run(case, backend, cotangent)
        if not LISTING:
            exact = run(case.to(torch.float64), "reference", cotangent)
            found.append((ours, run(case, "reference", cotangent), exact))
    assert_no_worse(*found)


def check_function(
    function: Callable[..., Tensor],
    leaves: dict[str, Tensor],
    cotangent: Tensor,
    backend: str,
) -> None:
    """The same for ``function(backend, **leaves)``; every leaf may get a gradient."""

    def results(backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        tensors = {
            name: (t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_()
            for name, t in leaves.items()
        }
        out = function(backend, **tensors)
        names = list(tensors)
        grads = torch.autograd.grad(
            out, list(tensors.values()), cotangent.to(out.dtype), allow_unused=True
        )
        given = {name: g for name, g in zip(names, grads, strict=True) if g is not None}
        return {"output": out.detach(), **given}

    if LISTING:
        results(backend)
        return
    exact = results("reference", torch.float64)
    assert_no_worse((results(backend), results("reference"), exact))


def assert_same_bits(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal to the bit; NaN equals NaN."""
    assert len(got) == len(expected)
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        same = (a == b) | (a.isnan() & b.isnan())
        assert bool(same.all()), f"tensor {number}: {int((~same).sum())} of {a.numel()} differ"
