"""Settings of a method, warm starts, stages of training, and several data sets for one backbone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

import tests.toy_method  # registers a method  # noqa: F401
from ept_fast.cli import main
from ept_fast.training.config import TrainConfig
from ept_fast.training.job import train as train_config
from tests.tiny import (
    options,
    save_model,
    save_task,
    small_run,
    task_rows,
    tensors_of,
    weights_of,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread", "empty_pictures")


def train(settings: dict[str, Any], **how: Any) -> dict[str, Any]:
    return train_config(TrainConfig(**settings), progress=False, **how)


def call(*words: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], input=stdin)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("places")
    return save_model(folder / "bert"), save_task(folder / "labels")


def settings_of(places: tuple[Path, Path], output: Path, **changes: Any) -> dict[str, Any]:
    run = small_run(*places, output, max_steps=6, eval_steps=2, batch_size=4, eval_before=False)
    return {**run, "method": "toy", **changes}


def cut_off(output: Path, steps: int) -> None:
    """Make a finished run one that was killed after so many steps."""
    for path in (output / "checkpoints").iterdir():
        if int(path.name.removeprefix("checkpoint-")) > steps:
            shutil.rmtree(path)
    shutil.rmtree(output / "adapter")
    (output / "metrics.json").unlink()


# Settings of the method -----------------------------------------------------------------------


def test_settings_are_fields_of_the_methods_config(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = settings_of(places, tmp_path / "out", max_steps=1)
    words = ["train", *options(settings), "--no-eval-before", "--quiet", "--set", "slope=2.5"]
    words = [word for word in words if not word.startswith("--eval-before")]
    result = call(*words)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["prompt"]["slope"] == 2.5
    assert metrics["config"]["settings"] == {"slope": 2.5}
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["config"]["settings"] == {"slope": 2.5}
    assert call(*words, "--resume").stdout == result.stdout
    other = call(*[word.replace("2.5", "2") for word in words], "--resume")
    assert other.exit_code == 2
    assert "settings: expected {'slope': 2.5} as in the run to resume" in other.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["slop=1"], "settings: expected fields of the method toy (slope), got 'slop'"),
        (["max_length=9"], "settings: expected fields of the method toy (slope), got 'max_length'"),
        (["slope"], "set: expected NAME=VALUE, got 'slope'"),
        (["=1"], "set: expected NAME=VALUE, got '=1'"),
        (["slope=1", "slope=2"], "set: expected each name once, got 'slope' twice"),
        (["slope=steep"], "slope: expected a real number, got str 'steep'"),
        (["slope=NaN"], "slope: expected a finite number > 0, got nan"),
        (["slope=-1"], "slope: expected a finite number > 0, got -1"),
    ],
)
def test_settings_that_a_method_cannot_have(
    words: list[str], message: str, places: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = {**settings_of(places, tmp_path / "out")}
    del settings["eval_before"]
    result = call("train", *options(settings), *(f"--set={word}" for word in words))
    assert result.exit_code == 2, result.output
    assert result.stderr == f"Error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_settings_override_the_options_and_not_what_a_method_stands_for() -> None:
    run = {"model": "m", "data": "d", "output": "o"}
    config: Any = TrainConfig(**run, num_spaces=2, settings={"num_spaces": 3}).prompt_config(64)
    assert config.num_spaces == 3
    for method, values, message in (
        ("dept", {"num_spaces": 2}, "num_spaces: expected 0, which the method dept stands for"),
        ("ept", {"rank": 2}, "rank: from_budget solves for it"),
        ("ept", {"fusion": "no"}, "fusion: expected a bool, got str 'no'"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig(**run, method=method, settings=values).prompt_config(768)
    with pytest.raises(TypeError, match="settings: expected a dict, got list"):
        TrainConfig(**run, settings=["slope"])  # type: ignore[arg-type]


# Warm starts ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(places: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to start from."""
    output = tmp_path_factory.mktemp("source") / "out"
    train(settings_of(places, output))
    return output


def held(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("place", ["", "adapter"])
def test_a_run_starts_from_a_saved_prompt(
    place: str, source: Path, places: tuple[Path, Path], tmp_path: Path
) -> None:
    """Of another number of labels: the head is new. What does not decide shapes may differ."""
    rows = [{**row, "label": i % 3} for i, row in enumerate(task_rows(24, 5))]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    still = dict.fromkeys(("prompt_lr", "space_lr", "head_lr"), 1e-30)
    changes = {"data": str(data), "start_from": str(source / place), "max_steps": 1, **still}
    train(settings_of(places, tmp_path / "out", **changes, settings={"slope": 2}))
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert after["weight"].shape == (3, 32)
    for name in ("rows", "size"):
        assert torch.equal(after[name], before[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_virtual_tokens": 5},
            r"^start_from: expected a prompt of the method and the sizes of this run "
            r"\(num_virtual_tokens 5\), got .*adapter with num_virtual_tokens 4$",
        ),
        ({"method": "ept"}, r"^start_from: .*got .* with .*prompt_type toy"),
        ({"start_from": "/gone"}, "^start_from: expected a folder, got /gone"),
    ],
)
def test_another_prompt_is_no_start(
    changes: dict[str, Any],
    message: str,
    source: Path,
    places: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        train(settings_of(places, tmp_path / "out", **{"start_from": str(source), **changes}))
    assert not (tmp_path / "out").exists()


@pytest.mark.default_algorithms
def test_a_warm_run_resumes_from_the_same_start_only(
    source: Path, places: tuple[Path, Path], tmp_path: Path
) -> None:
    start = shutil.copytree(source, tmp_path / "start")
    settings = settings_of(places, tmp_path / "out", start_from=str(start))
    metrics = train(settings)
    whole = weights_of(tmp_path / "out")
    cold = settings_of(places, tmp_path / "cold")
    train(cold)
    assert weights_of(tmp_path / "cold") != whole
    cut_off(tmp_path / "out", 4)
    again = train(settings, resume=True)
    assert weights_of(tmp_path / "out") == whole
    assert again["curves"] == metrics["curves"]
    with pytest.raises(ValueError, match=r"start_from: expected .* as in the run to resume"):
        train({**settings, "start_from": None}, resume=True)
    train(settings_of(places, start, seed=9), overwrite=True)
    with pytest.raises(ValueError, match="start_from: expected the prompt of the run to resume"):
        train(settings, resume=True)


# Stages ---------------------------------------------------------------------------------------


GATES = {
    "toy": {"size", "weight", "bias"},
    "ept": {"space_down", "space_up", "gate_weight", "gate_bias", "weight", "bias"},
}


@pytest.fixture
def staged(places: tuple[Path, Path], tmp_path: Path) -> Any:
    """Trains 8 steps with weight decay, so many of them with gates alone; settings and weights."""

    def run(method: str, gate_steps: int, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        settings = settings_of(
            places, tmp_path / f"{method}-{gate_steps}", method=method, gate_steps=gate_steps,
            weight_decay=0.1, gradient_accumulation_steps=2, **{"max_steps": 8, **changes},
        )  # fmt: skip
        train(settings)
        return settings, weights_of(Path(settings["output"]))

    return run


@pytest.mark.default_algorithms
@pytest.mark.parametrize("method", GATES)
def test_gates_are_trained_first_and_everything_after(method: str, staged: Any) -> None:
    """What waits keeps its bits, whatever the weight decay."""
    _, initial = staged(method, 0, max_steps=1, warmup_ratio=0.5)  # a step at a rate of 0
    _, few = staged(method, 9)
    _, whole = staged(method, 4)
    assert {name for name in initial if few[name] != initial[name]} == GATES[method]
    assert {name for name in initial if whole[name] != initial[name]} == set(initial)


@pytest.mark.default_algorithms
@pytest.mark.parametrize("gate_steps", [4, 7])
def test_a_run_resumes_in_either_stage(gate_steps: int, staged: Any) -> None:
    settings, whole = staged("toy", gate_steps)
    output = Path(settings["output"])
    curves = json.loads((output / "metrics.json").read_text())["curves"]
    cut_off(output, 6)
    assert train(settings, resume=True)["curves"] == curves
    assert weights_of(output) == whole


def test_a_prompt_without_gates_has_no_stage(places: tuple[Path, Path], tmp_path: Path) -> None:
    settings = settings_of(places, tmp_path / "out", method="pt", gate_steps=3, prompt_length=8)
    with pytest.raises(ValueError, match="gate_steps: expected 0 for the method pt of these sizes"):
        train(settings)
    assert not (tmp_path / "out").exists()
