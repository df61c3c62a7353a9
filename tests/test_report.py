"""The pictures of a run, and the report of the accuracy benchmark."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from bench import accuracy
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


# The benchmark --------------------------------------------------------------------------------


def study(out: Path, **changes: Any) -> accuracy.Study:
    settings: dict[str, Any] = {
        "data": Path("data"),
        "model": "model",
        "out": out,
        "tasks": ("sst2", "trec"),
        "methods": tuple(accuracy.METHODS),
        "seeds": (0, 1, 2),
        "steps": 200,
        "grid_steps": 100,
        "batch_size": 16,
        "workers": 1,
        "threads": 1,
    }
    return accuracy.Study(**{**settings, **changes})


def record(run: accuracy.Run, value: float) -> dict[str, Any]:
    return {
        **json.loads(run.key),
        "metric": accuracy.TASKS[run.task][1],
        "value": value,
        "parameters": {"prompt": 38_000},
        "seconds_per_step": 0.25,
        "threads": 1,
        "machine": "test",
    }


def test_grid_comes_first_and_decides_the_final_runs(tmp_path: Path) -> None:
    work = study(tmp_path, methods=("pt", "ept", "ept_no_fusion"))
    done: dict[str, dict[str, Any]] = {}
    first = accuracy.next_runs(work, done, "trec")
    assert [(r.kind, r.method, r.setting) for r in first] == [
        ("grid", method, setting) for method in ("pt", "ept") for setting in accuracy.GRID
    ]
    values = {"pt": (0.5, 0.4, 0.3), "ept": (0.1, 0.7, 0.7)}
    for run in first:
        value = values[run.method][list(accuracy.GRID).index(run.setting)]
        done[run.key] = record(run, value)
    finals = accuracy.next_runs(work, done, "trec")
    assert [(r.kind, r.method, r.setting, r.seed) for r in finals] == [
        ("final", method, setting, seed)
        for method, setting in (("pt", "low"), ("ept", "middle"), ("ept_no_fusion", "middle"))
        for seed in (0, 1, 2)
    ]
    for run in finals:
        done[run.key] = record(run, 0.9)
    assert accuracy.next_runs(work, done, "trec") == []


def test_records_survive_a_kill(tmp_path: Path) -> None:
    run = accuracy.grid_run(study(tmp_path), "sst2", "pt", "low")
    accuracy.append_record(tmp_path, record(run, 0.5))
    path = tmp_path / "runs.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert [r["value"] for r in accuracy.read_records(tmp_path)] == [0.5]
    accuracy.append_record(tmp_path, record(run, 0.75))
    assert [r["value"] for r in accuracy.read_records(tmp_path)] == [0.5, 0.75]
    assert len(accuracy.done_runs(accuracy.read_records(tmp_path))) == 1
    path.write_text("{oops\n" + whole.decode())
    with pytest.raises(SystemExit, match="line 1: expected a JSON record"):
        accuracy.read_records(tmp_path)


def test_report_computes_from_the_records_alone(tmp_path: Path) -> None:
    sizes = json.dumps(accuracy.SIZES, sort_keys=True)
    values = {
        ("sst2", "pt"): (0.80, 0.82, 0.84),
        ("sst2", "ept"): (0.81, 0.81, 0.81),
        ("cola", "pt"): (0.30,),
    }
    for (task, method), seeds in values.items():
        old = accuracy.Run("final", task, method, "low", 0, 50, 16, sizes)
        accuracy.append_record(tmp_path, record(old, 0.1))  # fewer steps: another study
        for seed, value in enumerate(seeds):
            run = accuracy.Run("final", task, method, "middle", seed, 200, 16, sizes)
            accuracy.append_record(tmp_path, record(run, value))
    timing = {"kind": "timing", "method": "ept", "seconds_p50": 0.2, "ratio_to_pt": 0.31}
    accuracy.append_record(tmp_path, {**timing, "peak_bytes": 5e8, "peak_bytes_over_loaded": 1e8})
    accuracy.report(tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = {(r["task"], r["method"]): r for r in csv.DictReader(file)}
    assert set(rows) == set(values)
    assert float(rows["sst2", "pt"]["mean"]) == pytest.approx(0.82)
    assert float(rows["sst2", "pt"]["std"]) == pytest.approx(0.02)
    assert rows["sst2", "pt"]["runs"] == "3"
    assert math.isnan(float(rows["cola", "pt"]["std"]))
    table = (tmp_path / "results.md").read_text()
    assert "| prompt tuning | 38,000 | 82.0 ± 2.0 | 30.0 (1) |" in table
    assert "| EPT | 38,000 | 81.0 ± 0.0 |  |" in table
    assert "| EPT | 0.200 | 0.31 | 500 | 100 | middle |  |" in table
    assert "| prompt tuning | not measured |" in table
    assert (read_png(tmp_path / "results.png")[..., :3] < 200).mean() > 0.01


def test_report_without_runs_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"runs\.jsonl: expected finished final runs, got none"):
        accuracy.report(tmp_path)


def test_every_method_spends_the_same_budget() -> None:
    from ept_fast.training.config import TrainConfig

    for choices in accuracy.METHODS.values():
        settings = {**accuracy.SIZES, **choices}
        config = TrainConfig(model="m", data="d", output="o", **settings).prompt_config(384)
        # One more rank would not fit.
        rest = 38_400 - config.num_parameters
        assert 0 <= rest < (config.max_length + 384 if config.rank else 1)
