"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from ept_fast.training import report
from ept_fast.training.report import draw_gate_weights, draw_learning_curves, smoothed


def read_png(path: Path) -> np.ndarray:
    """The pixels of an 8-bit RGBA image, ``[height, width, 4]``."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = (matplotlib.image.imread(path) * 255).round().astype(np.uint8)
    assert pixels.shape[-1] == 4
    return pixels


def evaluations(values: list[float]) -> list[dict[str, Any]]:
    return [{"step": 10 * i, "loss": 1 - v / 2, "accuracy": v} for i, v in enumerate(values)]


def test_learning_curves_are_drawn(tmp_path: Path) -> None:
    losses = [1 / (1 + step / 10) for step in range(60)]
    draw_learning_curves(losses, evaluations([0.5, 0.7, 0.9]), tmp_path / "a.png")
    draw_learning_curves(losses, evaluations([0.5, 0.9, 0.7]), tmp_path / "b.png")
    draw_learning_curves(losses, evaluations([0.5, 0.7, 0.9]), tmp_path / "c.png")
    pictures = {name: read_png(tmp_path / f"{name}.png") for name in "abc"}
    assert pictures["a"].shape == (480, 1200, 4)
    assert not np.array_equal(pictures["a"], pictures["b"])
    assert np.array_equal(pictures["a"], pictures["c"])
    # The left half (the losses) and the right half (the metric) both hold ink.
    for half in (pictures["a"][:, :600], pictures["a"][:, 600:]):
        assert 0.01 < (half[..., :3].min(-1) < 200).mean() < 0.5


@pytest.mark.parametrize(("kept", "value"), [(None, 0.7), (10, 0.9)])
def test_the_axis_fits_the_losses_and_the_kept_step_is_marked(
    kept: int | None, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: drawn.append(figure))
    losses = [8 + step / 60 for step in range(60)]
    points = [{**e, "loss": 8.5} for e in evaluations([0.5, 0.9, 0.7])]
    how = {"loss": "squared error", "kept": kept}
    draw_learning_curves(losses, points, tmp_path / "a.png", **how)
    left, right = drawn[0].axes
    assert left.get_ylabel() == "squared error"
    low, high = left.get_ylim()
    assert 7.9 < low < 8 < 9 < high < 9.1
    step = 20 if kept is None else kept
    label = f"kept weights, step {step}"
    for axes in (left, right):
        (line,) = [line for line in axes.lines if line.get_label() == label]
        assert list(line.get_xdata()) == [step, step]
    assert label in [text.get_text() for text in left.get_legend().get_texts()]
    (marked,) = right.texts
    assert (marked.xy, marked.get_text()) == ((step, value), f"{value:.3f}")


@pytest.mark.parametrize("count", [0, 1])
def test_short_runs_are_drawn(count: int, tmp_path: Path) -> None:
    draw_learning_curves([0.5] * count, evaluations([0.5] * count), tmp_path / "a.png")
    assert read_png(tmp_path / "a.png").shape == (480, 1200, 4)


def test_gate_weights_show_every_token_and_space(tmp_path: Path) -> None:
    # One bright cell in the whole map; it has to come out where it belongs.
    weights = [[0.5, 0.5], [0.5, 0.5], [0.1, 0.9], [0.5, 0.5]]
    draw_gate_weights(weights, tmp_path / "gate.png")
    picture = read_png(tmp_path / "gate.png")[..., :3].astype(int)
    yellow = np.abs(picture - (253, 231, 37)).max(-1) < 3  # the brightest colour of viridis
    dark = np.abs(picture - (68, 1, 84)).max(-1) < 3  # the darkest
    columns = np.nonzero(yellow.sum(0) > 20)[0]
    map_columns = columns[columns < picture.shape[1] * 0.8]  # left of the colour bar
    assert len(map_columns) > 20
    dark_columns = np.nonzero(dark.sum(0) > 20)[0]
    assert abs(map_columns.mean() - dark_columns[dark_columns < picture.shape[1] * 0.8].mean()) < 3
    assert np.nonzero(yellow[:, map_columns])[0].mean() > np.nonzero(dark)[0].mean()  # space 1
    left = np.nonzero(np.abs(picture - (33, 145, 140)).max(-1).min(0) < 3)[0].min()
    assert map_columns.mean() > left + 0.4 * picture.shape[1] * 0.8  # token 2 of 4


@pytest.mark.parametrize("weights", [[], [[]]])
def test_no_spaces_no_picture(weights: list[list[float]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights: expected at least one token and one space"):
        draw_gate_weights(weights, tmp_path / "gate.png")
    assert not (tmp_path / "gate.png").exists()


def test_smoothing_is_a_trailing_mean() -> None:
    assert smoothed([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert smoothed([], 3) == []
