"""The benchmarks' own checks: a wrong variant is not timed, the page shows what was measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import page, prompt_path

TINY = prompt_path.Shape("tiny", 3, 5, 2, 7, 2, 2, 3, 16, 0.5)


def test_a_right_variant_passes_the_parity_check() -> None:
    assert prompt_path.check(prompt_path._eager, prompt_path.make_case(TINY)) <= 4


def test_a_wrong_variant_fails_the_parity_check() -> None:
    def wrong(p: dict[str, Tensor], weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return prompt_path._eager(p, weight, ids, torch.ones_like(mask))  # pads get the offset

    assert prompt_path.check(wrong, prompt_path.make_case(TINY)) > 1000


def test_a_step_times_both_directions_and_leaves_gradients() -> None:
    case = prompt_path.make_case(TINY)
    forward, backward = prompt_path.step(prompt_path._eager, case)
    assert forward > 0
    assert backward > 0
    assert all(parameter.grad is not None for parameter in case.parameters.values())


def test_the_page_shows_the_result_files() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.fill(text) == text


def test_a_page_without_its_place_is_an_error() -> None:
    with pytest.raises(SystemExit, match="expected one pair of comments for"):
        page.fill("nothing here")
