"""Every backend against the definition: types, shapes, paddings, layouts, flags, limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from ept_fast import reconstruct_prompt, splice_prompt
from ept_fast.kernels.reconstruct import config as reconstruct_config
from tests.cases import (
    ACTIVATIONS,
    BIASED,
    GATES,
    LAYOUTS,
    PADDINGS,
    PARTS,
    SHAPES,
    TILES,
    TYPES,
    Case,
    Sizes,
    make_case,
    run,
)
from tests.parity import (
    CUDA,
    EAGER,
    HOST,
    LARGE_SCORES,
    TRITON,
    assert_as_exact_as_the_definition,
    cotangent_of,
    each_backend,
    each_kernel,
    large_scores,
    over,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def table(backend: str) -> list[tuple[Sizes, str, str]]:
    """Every shape with every padding, each in a layout: (sizes, padding, layout)."""
    shapes = [*SHAPES.values(), *TILES["host" if backend == "cuda" else backend].values()]
    pairs = [(sizes, padding) for sizes in shapes for padding in PADDINGS]
    return [(*pair, LAYOUTS[i % len(LAYOUTS)]) for i, pair in enumerate(pairs)]


def drawn(rows: list[tuple[Sizes, str, str]], types: str) -> Iterator[Case]:
    for seed, (sizes, padding, layout) in enumerate(rows):
        case = make_case(sizes, padding=padding, dtype=torch.float32, seed=seed)
        yield case.typed(types).laid_out(layout)


def in_pairs(types: str, backend: str) -> list[int]:
    """Rows of the table: each type with each shape and padding, not all three."""
    first = list(TYPES).index(types) % len(PADDINGS)
    return [s + (first + s // 5) % 5 for s in range(0, len(table(backend)), 5)]


@pytest.mark.parametrize("types", TYPES)
@over(EAGER, HOST, CUDA)
def test_parity_of_types(backend: str, types: str) -> None:
    assert_as_exact_as_the_definition(drawn(table(backend), types), backend)


@pytest.mark.parametrize("types", TYPES)
@over(TRITON)
def test_parity_of_types_in_pairs(backend: str, types: str) -> None:
    """In the interpreter, which is slow; the rest of the table is the next test's."""
    rows = table(backend)
    chosen = [rows[i] for i in in_pairs(types, backend)]
    assert_as_exact_as_the_definition(drawn(chosen, types), backend)


@pytest.mark.slow
@pytest.mark.minutes
@pytest.mark.parametrize("types", TYPES)
@over(TRITON)
def test_parity_of_types_out_of_pairs(backend: str, types: str) -> None:
    pairs = in_pairs(types, backend)
    chosen = [row for i, row in enumerate(table(backend)) if i not in pairs]
    assert_as_exact_as_the_definition(drawn(chosen, types), backend)


@pytest.mark.parametrize("types", TYPES)
@each_backend
def test_parity_of_the_path(backend: str, types: str) -> None:
    """Both operations by one function; with each type half of the shapes and paddings or fewer."""
    first = list(TYPES).index(types)
    rows = table(backend)[first % 2 :: 8 if backend == "triton" else 2]
    assert_as_exact_as_the_definition(drawn(rows, types), backend, forward=Case.path)


@each_backend
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parity_of_flags(activation: str, gate: str, backend: str) -> None:
    """Every part of the method left out, and all of it in a bank."""
    sizes = Sizes(m=17, n=9, r=3, k=3, h=6, d=21, batch=1, length=5)
    each = [(sizes, part) for part in PARTS.values()] + [(replace(sizes, tasks=2), PARTS["all"])]
    each *= 1 if backend == "triton" else 4
    flags = {"activation": activation, "gate": gate, "dtype": torch.float32}
    cases = (make_case(s, seed=seed, **flags, **part) for seed, (s, part) in enumerate(each))
    assert_as_exact_as_the_definition(cases, backend)


@each_backend
@pytest.mark.parametrize(
    ("types", "gate", "forward"),
    [("fp32", "token", Case.both), ("bf16", "prompt", Case.path), ("fp16", "token", Case.path)],
    ids=["fp32", "bf16", "fp16"],
)
def test_parity_of_biases(types: str, gate: str, forward: Any, backend: str) -> None:
    """Biases, and a single subspace without a gate: each alone and in a bank, in each layout."""
    sizes = Sizes(m=17, n=9, r=3, k=3, h=7, d=37, batch=1, length=5)
    if backend == "triton":
        sizes = replace(sizes, m=5, n=5, h=5, d=21, length=3)
    each = [(replace(sizes, tasks=t), part) for part in BIASED.values() for t in (None, 2)]
    each = each * 4 if backend != "triton" else each[types != "fp32" :: 1 + (types != "fp32")]
    cases = (
        make_case(s, seed=seed, gate=gate, dtype=torch.float32, **part)
        .typed(types)
        .laid_out(LAYOUTS[seed % len(LAYOUTS)])
        for seed, (s, part) in enumerate(each)
    )
    assert_as_exact_as_the_definition(cases, backend, forward=forward)


@each_backend
@pytest.mark.parametrize(("scores", "size", "cancels"), LARGE_SCORES)
def test_large_scores(scores: str, size: float, cancels: bool, backend: str) -> None:
    assert_as_exact_as_the_definition(large_scores(scores, size), backend, cancels=cancels)


@each_backend
def test_relu_has_no_slope_at_zero(backend: str) -> None:
    """The derivative of ReLU at 0 is 0, as in PyTorch."""
    case = make_case(Sizes(), activation="relu", dtype=torch.float32)
    with torch.no_grad():
        case.parameters["space_down"].zero_()  # so that every hidden value is 0
    for name in (backend, "reference"):
        grads = run(case, name, cotangent_of(case))
        assert not grads["space_down"].any()
        assert grads["gate_weight"].isfinite().all()


@each_backend
def test_expanded_inputs_and_gradients(backend: str) -> None:
    """Stride-0 parameters, embeddings, mask and gradient (that of a plain sum)."""
    g = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 24, generator=g).expand(3, 24).requires_grad_()
    a = torch.randn(1, 2, generator=g).expand(9, 2).requires_grad_()
    b = torch.randn(2, 1, generator=g).expand(2, 24).requires_grad_()
    embeds = torch.randn(1, 1, 24, generator=g).expand(4, 6, 24)
    mask = torch.ones(1, 1, dtype=torch.int64).expand(4, 6)
    text = {"inputs_embeds": embeds, "attention_mask": mask, "offset_a": a, "offset_b": b}

    def results(backend: str) -> list[Tensor]:
        fused = reconstruct_prompt(prompt, a, b, backend=backend)
        out = splice_prompt(fused, **text, backend=backend)
        return [out.detach(), *torch.autograd.grad(out.sum(), [prompt, a, b])]

    for got, expected in zip(results(backend), results("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@over(HOST, CUDA)
@pytest.mark.parametrize("types", ["bf16 table", "fp16 table", "fp32"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_text_is_rounded_once(types: str, padding: str, backend: str) -> None:
    """With an offset that float32 holds exactly the result is the rounded sum, bit for bit."""
    case = make_case(Sizes(d=24), padding=padding, dtype=torch.float32, scaling=0.25)
    case = case.each_parameter(lambda t: (4 * t).round()).typed(types)
    prompt = case.parameters["short_prompt"]
    assert torch.equal(case.splice(prompt, backend), case.splice(prompt, "reference"))


def assert_close(case: Case, backend: str, relative: float, least: float = 0.0) -> None:
    """Every result of a case is right to ``relative`` of its scale, which is ``least`` or more.

    The CUDA kernels may instead be off by twice as much as plain PyTorch is in float32.
    """
    cotangent = cotangent_of(case)
    exact = run(case.to(torch.float64), "reference", cotangent)
    plain = ("reference", "eager") if backend in ("host", "cuda") else ()
    others = [run(case, name, cotangent) for name in plain]
    got = run(case, backend, cotangent)
    assert got.keys() == exact.keys()
    for name, expected in exact.items():
        error, *theirs = (
            (results[name].double() - expected).abs().max().item() for results in (got, *others)
        )
        scale = max(least, expected.abs().max().item())
        assert error <= max([relative * scale, *(2 * each for each in theirs)]), name


# At random

SPACES: list[dict[str, bool]] = [{}, {"spaces": False}, *BIASED.values()]


def assert_close_at_random(data: st.DataObject, backend: str) -> None:
    """Output and every gradient of a case whose shape and flags are drawn, against float64."""
    most = {"m": 20, "n": 50, "r": 35, "k": 5, "h": 12, "d": 70, "batch": 6}
    drawn = {name: data.draw(st.integers(1, largest), name) for name, largest in most.items()}
    sizes = Sizes(
        **drawn,
        length=data.draw(st.integers(1, min(drawn["n"], 40)), "length"),
        tasks=data.draw(st.sampled_from([None, 1, 3, 7]), "tasks"),
    )
    exactly = backend == "eager"
    case = make_case(
        sizes,
        **{
            "offset": data.draw(st.booleans(), "offset"),
            **data.draw(st.sampled_from(SPACES), "spaces"),
        },
        padding=data.draw(st.sampled_from(PADDINGS), "padding"),
        fusion=data.draw(st.booleans(), "fusion"),
        activation=data.draw(st.sampled_from(ACTIVATIONS), "activation"),
        gate=data.draw(st.sampled_from(GATES), "gate"),
        seed=data.draw(st.integers(0, 99), "seed"),
        dtype=torch.float64 if exactly else torch.float32,
    ).laid_out(data.draw(st.sampled_from(LAYOUTS), "layout"))
    assert_close(case, backend, 1e-11 if exactly else 5e-6, 1.0)


# The backend is the same for all examples.
SETTINGS = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}


@over(EAGER)
@given(data=st.data())
@settings(max_examples=150, **SETTINGS)
def test_random_cases(data: st.DataObject, backend: str) -> None:
    assert_close_at_random(data, backend)


@pytest.mark.slow
@over(TRITON)
@given(data=st.data())
@settings(max_examples=60, **SETTINGS)
def test_random_cases_in_the_interpreter(data: st.DataObject, backend: str) -> None:
    assert_close_at_random(data, backend)


# Limits

LIMITS: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "d": (Sizes(m=1, n=2, r=2, k=1, h=2, d=16384, batch=1, length=1), {}),
    "n": (Sizes(m=2, n=32768, r=2, k=1, h=2, d=8, batch=1, length=40), {}),
    "r": (Sizes(m=2, n=5, r=256, k=2, h=3, d=33, batch=1, length=4), {}),
    "r in a bank": (Sizes(m=9, n=70, r=100, k=2, h=3, d=260, batch=5, length=70, tasks=2), {}),
    "K·h": (Sizes(m=2, n=5, r=3, k=8, h=64, d=33, batch=1, length=4), {}),
    "K": (Sizes(m=2, n=5, r=256, k=512, h=1, d=17, batch=1, length=4), {}),
    "K, one gate": (Sizes(m=2, n=5, r=3, k=512, h=1, d=17, batch=1, length=4), {"gate": "prompt"}),
    "m": (Sizes(m=512, n=5, r=3, k=2, h=2, d=17, batch=1, length=4), {}),
    "m, one gate": (Sizes(m=512, n=3, r=2, k=1, h=2, d=5, batch=1, length=1), {"gate": "prompt"}),
    "batch": (Sizes(m=1, n=2, r=1, k=1, h=1, d=8, batch=600, length=2), {}),
    "batch of a bank": (Sizes(m=1, n=2, r=1, k=1, h=1, d=8, batch=300, length=2, tasks=5), {}),
}


@pytest.mark.usefixtures("overflow_checked")
@over(
    pytest.param("triton", marks=[*TRITON.marks, pytest.mark.slow, pytest.mark.minutes]),
    HOST,
    CUDA,
)
@pytest.mark.parametrize("limit", LIMITS)
def test_largest_sizes(limit: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the error of plain PyTorch, or what a float32 sum of such a length may lose."""
    if limit == "d":  # repeated by 128 programs, the products over d take the interpreter an hour
        monkeypatch.setattr(reconstruct_config, "MOST_REPEATED", 0)
    sizes, flags = LIMITS[limit]
    case = make_case(sizes, dtype=torch.float32, **{"padding": "none", **flags})
    assert_close(case, backend, 5e-6)


LIMITS_OF_BIASES: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "K·h and biases": (Sizes(m=2, n=5, r=3, k=8, h=63, d=33, batch=1, length=4), {"biases": True}),
    "K and biases": (Sizes(m=2, n=5, r=256, k=256, h=1, d=17, batch=1, length=4), {"biases": True}),
    "h without a gate": (
        Sizes(m=2, n=5, r=3, k=1, h=512, d=33, batch=1, length=4),
        {"biases": True, "gated": False},
    ),
}


@pytest.mark.usefixtures("overflow_checked")
@over(
    pytest.param("triton", marks=[*TRITON.marks, pytest.mark.slow, pytest.mark.minutes]),
    HOST,
    CUDA,
)
@pytest.mark.parametrize("limit", LIMITS_OF_BIASES)
def test_largest_sizes_with_biases(limit: str, backend: str) -> None:
    sizes, flags = LIMITS_OF_BIASES[limit]
    case = make_case(sizes, dtype=torch.float32, **{"padding": "none", **flags})
    assert_close(case, backend, 5e-6)


@over(HOST, CUDA)
def test_a_long_text(backend: str) -> None:
    sizes = Sizes(m=1, n=5000, r=2, k=1, h=2, d=8, batch=2, length=5000)
    assert_close(make_case(sizes, dtype=torch.float32), backend, 5e-6)


@pytest.mark.usefixtures("overflow_checked")
@each_kernel
def test_the_largest_bank(backend: str) -> None:
    """4096 tasks, of which three have rows; the prompts of all would take the interpreter hours."""
    sizes = Sizes(m=1, n=4, r=1, k=1, h=1, d=3, batch=4, length=4, tasks=4096)
    case = make_case(sizes, dtype=torch.float32, padding="left")
    case = replace(case, task_ids=torch.tensor([4095, 0, 2048, 4095]))
    prompt = case.parameters["short_prompt"]
    got, expected = (case.splice(prompt, name) for name in (backend, "eager"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    tasks = 5 if backend == "triton" else 4096
    bank = make_case(replace(sizes, tasks=tasks), dtype=torch.float32)
    got, expected = (bank.reconstruct(name) for name in (backend, "eager"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
