"""LASP's text-to-text loss: its axes, its gradient, and that its logits are never all there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ept_fast.losses import text_to_text as module
from ept_fast.losses.text_to_text import noisy_templates, text_to_text
from tests.memory import allocations

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT = torch.float64
# Templates, classes, width, contexts; None: no axis of contexts.
SIZES = [(1, 1, 1, None), (3, 5, 7, None), (1, 4, 3, 1), (5, 3, 4, 2), (7, 2, 5, 3), (3, 3, 3, 3)]


def features(
    size: tuple[int, int, int, int | None], dtype: torch.dtype = FLOAT
) -> tuple[Tensor, Tensor]:
    length, classes, width, groups = size
    draw = torch.Generator().manual_seed(length)
    lead = () if groups is None else (groups,)
    t = torch.randn(*lead, classes, width, generator=draw, dtype=FLOAT).to(dtype)
    h = torch.randn(length, classes, width, generator=draw, dtype=FLOAT).to(dtype)
    return t, h


def by_loops(t: Tensor, h: Tensor, scale: float) -> float:
    """For each text (l, j), the part of its own learned prompt among all learned prompts."""
    groups = t if t.dim() == 3 else t.unsqueeze(0)
    length, classes, width = h.shape
    parts, rest = divmod(length, len(groups))
    owner = [g for g in range(len(groups)) for _ in range(parts + (g < rest))]
    losses = []
    for l in range(length):  # noqa: E741
        for j in range(classes):
            logits = [
                scale * sum(float(groups[owner[l], i, k] * h[l, j, k]) for k in range(width))
                for i in range(classes)
            ]
            losses.append(math.log(sum(map(math.exp, logits))) - logits[j])
    return sum(losses) / len(losses)


@pytest.mark.support(row="LASP", column="definition")
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_loss_is_that_of_explicit_loops(
    size: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOGITS", chunk)
    t, h = features(size)
    assert float(text_to_text(t, h, 1.5)) == pytest.approx(by_loops(t, h, 1.5), rel=1e-12)


def test_the_classes_compete_among_learned_prompts() -> None:
    """The other axis, over the templates' classes, gives another loss on these features."""
    t, h = features((3, 5, 7, None))
    h[:, 0] *= 3
    logits = 2.0 * torch.einsum("id,ljd->lij", t, h)
    target = torch.arange(5).expand(3, 5)
    learned = torch.nn.functional.cross_entropy(logits, target)
    other = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target)
    assert abs(float(learned - other)) > 0.1
    assert float(text_to_text(t, h, 2.0)) == pytest.approx(float(learned), rel=1e-12)


@pytest.mark.support(row="LASP", column="gradients")
@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradcheck(size: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOGITS", chunk)
    t, h = features(size)
    assert torch.autograd.gradcheck(lambda t: 3 * text_to_text(t, h, 1.5), t.requires_grad_())


def test_a_second_derivative_is_refused() -> None:
    t, h = features((3, 5, 7, None))
    loss = text_to_text(t.requires_grad_(), h)
    (gradient,) = torch.autograd.grad(loss * loss, t, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_it_is_zero_where_prompts_and_templates_agree() -> None:
    t = torch.nn.functional.normalize(features((1, 4, 9, None))[0], dim=-1)
    assert float(text_to_text(t, t.expand(8, 4, 9), 1e3)) < 1e-12


@pytest.mark.parametrize("types", [("bfloat16", "bfloat16"), ("float32", "float16")], ids=str)
def test_half_types_accumulate_in_float32(types: tuple[str, str]) -> None:
    """Over so many rows that a half type's own sum would be wrong in the second digit."""
    t, h = features((40, 60, 16, None))
    t, h = (x.to(getattr(torch, name)) for x, name in zip((t, h), types, strict=True))
    exact = t.double().requires_grad_()
    expected = text_to_text(exact, h.double(), 1.0)
    expected.backward()
    loss = text_to_text(t.requires_grad_(), h, 1.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert t.grad is not None
    assert exact.grad is not None
    assert t.grad.dtype == t.dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    # One rounding at the end.
    eps = max(torch.finfo(t.dtype).eps, 1e-6)
    error = (t.grad.double() - exact.grad).abs()
    assert bool((error <= eps * exact.grad.abs() + 1e-6 * exact.grad.abs().max()).all())


def test_a_scaled_loss_keeps_small_gradients() -> None:
    """In float16 the gradient of this loss alone would be nothing."""
    t, h = (1e-3 * x for x in features((3, 5, 7, None), torch.float16))
    (gradient,) = torch.autograd.grad(text_to_text(t.requires_grad_(), h, 1e-3) * 1e6, t)
    exact = t.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(text_to_text(exact, h.double(), 1e-3) * 1e6, exact)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-4)
    assert bool(gradient.all())


def test_autocast_changes_nothing() -> None:
    t, h = features((3, 5, 7, None), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(text_to_text(t, h), text_to_text(t.clone(), h))
        inside = text_to_text(t, h)
    assert torch.equal(inside, text_to_text(t, h))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.default_algorithms
def test_peak_memory_and_equal_bits(groups: int) -> None:
    """A few chunks at most are there at once, of 16 times as many logits; twice the same bits."""
    t, h = features((16, 1024, 8, groups), torch.float32)
    t.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = text_to_text(t, h, 2.0)
        return loss.detach(), *torch.autograd.grad(loss, t)

    step()
    first = allocations(step)
    chunk, every = 4 * module._LOGITS, 4 * 16 * 1024 * 1024
    assert chunk < first.peak < 4 * chunk < every / 3
    assert all(map(torch.equal, first.result, step()))


def test_without_a_gradient_none_is_made() -> None:
    t, h = features((3, 5, 7, None))
    assert not text_to_text(t, h).requires_grad
    with torch.no_grad():
        value = text_to_text(t.requires_grad_(), h)
    assert torch.equal(value, text_to_text(t, h).detach())


def test_noise_is_there_half_of_the_time() -> None:
    h = torch.zeros(20, 5, 10)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(200)]
    draws = [noisy_templates(h, 0.3, generator=seed) for seed in seeds]
    noisy = [draw for draw in draws if bool(draw.any())]
    assert 70 < len(noisy) < 130
    assert float(torch.stack(noisy).std()) == pytest.approx(0.3, rel=0.02)
    again = noisy_templates(h, 0.3, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again, draws[3])
    assert noisy_templates(h.half()).dtype == torch.float16


T, H = features((4, 3, 2, 2))
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"prompt_features": [1]},
        TypeError,
        "prompt_features: expected a floating tensor, got list",
    ),
    (
        {"template_features": H.long()},
        TypeError,
        "template_features: expected a floating tensor, got torch.int64",
    ),
    (
        {"prompt_features": T[0, 0]},
        ValueError,
        "prompt_features: expected shape [C, d] or [G, C, d] without empty axes, got [2]",
    ),
    (
        {"prompt_features": T[:, :0]},
        ValueError,
        "prompt_features: expected shape [C, d] or [G, C, d] without empty axes, got [2, 0, 2]",
    ),
    (
        {"template_features": H[:, :2]},
        ValueError,
        "template_features: expected shape [at least 2, 3, 2] on cpu to match prompt_features "
        "[2, 3, 2], got [4, 2, 2] on cpu",
    ),
    (
        {"template_features": H[:1]},
        ValueError,
        "template_features: expected shape [at least 2, 3, 2] on cpu to match prompt_features "
        "[2, 3, 2], got [1, 3, 2] on cpu",
    ),
    (
        {"template_features": H.clone().requires_grad_()},
        ValueError,
        "template_features: expected a tensor without a gradient, as templates are frozen "
        "(detach() gives one), got requires_grad True",
    ),
    ({"scale": math.nan}, ValueError, "scale: expected a finite number, got nan"),
    ({"scale": "1"}, TypeError, "scale: expected a real number, got str '1'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        text_to_text(**{"prompt_features": T, "template_features": H, **change})
    assert str(caught.value) == message
