"""The training job in two processes: the run of one, and a killed run that goes on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ept_fast.training.checkpoints import newest_checkpoint
from ept_fast.training.config import TrainConfig
from ept_fast.training.job import train
from tests.distributed.launch import ROOT, torchrun
from tests.tiny import (
    answer_rows,
    options,
    save_llama,
    save_model,
    save_t5,
    save_task,
    small_run,
    weights_of,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

CASES: dict[str, dict[str, Any]] = {
    "classification": {},
    "seq2seq": {"task": "seq2seq", "gradient_accumulation_steps": 2},
    "packed": {"task": "causal", "packing": True, "pack_length": 40},
    "several": {"method": "mp2", "gate_steps": 3},
}


def launch(folder: Path, jobs: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    """Do the jobs: dicts of ``run``, maybe ``how``, and what goes wrong."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return torchrun(str(ROOT / "tests" / "distributed" / "run_job.py"), str(folder))


def outcomes(folder: Path) -> list[list[list[Any]]]:
    """What each process got of each job: metrics, or an error's type and message."""
    return [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The settings of a run of each case that two processes made, and of one that was killed."""
    folder = tmp_path_factory.mktemp("parallel")
    models = {
        "classification": save_model(folder / "bert"),
        "seq2seq": save_t5(folder / "t5", steps=20),
        "packed": save_llama(folder / "llama", steps=20),
    }
    models["several"] = models["classification"]
    labels, answers = save_task(folder / "labels"), save_task(folder / "answers", answer_rows)
    settings = {}
    for case, choices in CASES.items():
        data = labels if case in ("classification", "several") else answers
        sizes = {"batch_size": 4, "max_steps": 8, "eval_steps": 2, "eval_generate": 5}
        if data == answers:
            sizes |= {"prompt_length": 48, "max_target_length": 6}
        run = small_run(models[case], data, folder / case, **sizes, **choices, keep="best")
        if case == "several":
            run["data"] = [str(labels), str(save_task(folder / "others"))]
        settings[case] = run
    settings["killed"] = {**settings["packed"], "output": str(folder / "killed")}
    jobs = [{"run": dict(run), "dies": case == "killed"} for case, run in settings.items()]
    for job in jobs:
        if isinstance(job["run"]["data"], list):
            job["run"]["data"] = [
                job["run"]["data"]
            ] * 2  # in a job, a list has a value of each rank
    result = launch(folder, jobs)
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr, result.stderr
    return settings


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(
    case: str, runs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """The same rows in every step, so the same losses and weights but for rounding."""
    found = json.loads((Path(runs[case]["output"]) / "metrics.json").read_text())
    settings = {**runs[case], "output": str(tmp_path / "one"), "batch_size": 8}
    alone = train(TrainConfig(**settings), progress=False)
    assert found["curves"]["loss"] == pytest.approx(alone["curves"]["loss"], rel=1e-3)
    assert found["tokens"] == alone["tokens"]
    for mine, theirs in zip(
        alone["curves"]["evaluation"], found["curves"]["evaluation"], strict=True
    ):
        assert theirs["step"] == mine["step"]
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-3)
    before = [m["curves"]["evaluation"][0] for m in (alone, found)]
    tasks = [each.pop("tasks", {}) for each in before]
    for name, figures in tasks[0].items():
        assert tasks[1][name] == pytest.approx(figures, rel=1e-6)
    assert before[1] == pytest.approx(before[0], rel=1e-6)
    assert [s["text"] for s in found["samples"]] == [s["text"] for s in alone["samples"]]


def test_a_killed_run_goes_on_to_the_same_weights(
    runs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    output = Path(runs["killed"]["output"])
    assert not (output / "metrics.json").exists()
    newest = newest_checkpoint(output / "checkpoints")
    assert newest is not None
    assert newest.name == "checkpoint-4"
    assert {path.name for path in newest.glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    with pytest.raises(ValueError, match="WORLD_SIZE: expected 2 as in the run to resume, got 1"):
        train(TrainConfig(**runs["killed"]), resume=True, progress=False)
    result = launch(tmp_path, [{"run": runs["killed"], "how": {"resume": True}}])
    assert result.returncode == 0, result.stderr
    assert [[kind for kind, _ in found] for found in outcomes(tmp_path)] == [["metrics"]] * 2
    whole = Path(runs["packed"]["output"])
    assert weights_of(output) == weights_of(whole)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (output, whole)]
    for name in ("curves", "tokens", "positions", "samples", "before", "after"):
        assert metrics[0][name] == metrics[1][name], name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run of a second, without an output."""
    folder = tmp_path_factory.mktemp("tiny")
    model, data = save_model(folder / "model"), save_task(folder / "data")
    settings = small_run(model, data, folder, batch_size=4, max_steps=2, eval_steps=1)
    del settings["output"]
    return settings


# A job, and what both processes get of it.
DECISIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a process comes late": ({"late": True}, "metrics"),
    "a finished run is resumed": ({"late": True, "how": {"resume": True}}, "metrics"),
    "a finished run is in the way": (
        {"late": True}, "FileExistsError: output: expected an empty folder, got ",
    ),
    "a finished run is overwritten": ({"late": True, "how": {"overwrite": True}}, "metrics"),
    "another run has the folder": (
        {"held": True, "how": {"overwrite": True}},
        "FileExistsError: output: expected a folder that no other run is using, got ",
    ),
    "another run is resumed": (
        {"run": {"seed": 1}, "how": {"resume": True}},
        "ValueError: seed: expected 0 as in the run to resume, got 1",
    ),
    "one process cannot read the data": (
        {"run": {"data": ["{data}", "{data}/gone.jsonl"]}, "how": {"overwrite": True}},
        "DataError: {data}/gone.jsonl: expected a readable file, got No such file",
    ),
    "one process cannot read the model": (
        {"run": {"model": ["{model}", "{data}"]}, "how": {"overwrite": True}},
        "ValueError: model: expected a folder or hub id of a pretrained model, got '{data}'",
    ),
    "the loss is not finite": (
        {"run": {"prompt_lr": 2e37, "warmup_ratio": 0.0}, "how": {"overwrite": True}},
        "NonFiniteLossError: the evaluation loss is not finite at step 1; training stopped, ",
    ),
    **{
        f"there is no room for {name}": (
            {"run": {"keep": "best"}, "full": name, "how": {"overwrite": True}},
            f"{name}: expected a writable file, got No space left on device",
        )
        for name in ("run.json", "ept_model.safetensors", "progress.json", "metrics.json")
    },
}  # fmt: skip


def test_what_one_process_decides_or_fails_at_reaches_both(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(part) for part in value]
        return value.format(**tiny) if isinstance(value, str) else value

    jobs = []
    for job, _ in DECISIONS.values():
        changes = {name: filled(value) for name, value in job.get("run", {}).items()}
        jobs.append({**job, "run": {**tiny, "output": str(tmp_path / "out"), **changes}})
    result = launch(tmp_path, jobs)
    assert result.returncode == 0, result.stderr
    main, other = outcomes(tmp_path)
    for case, got in zip(DECISIONS, main, strict=True):
        assert DECISIONS[case][1].format(**tiny) in ": ".join(map(str, got)), case
    assert main == other


def test_twenty_runs_of_two_processes_all_succeed(tiny: dict[str, Any], tmp_path: Path) -> None:
    jobs = [
        {"uneven": True, "run": {**tiny, "output": str(tmp_path / f"out-{number}")}}
        for number in range(20)
    ]
    result = launch(tmp_path, jobs)
    assert result.returncode == 0, result.stderr
    for found in outcomes(tmp_path):
        assert [kind for kind, _ in found] == ["metrics"] * 20


def test_a_mistake_is_said_once_on_the_command_line(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    words = options({**tiny, "output": tmp_path})
    result = torchrun("-m", "ept_fast", "train", *words)
    assert result.returncode != 0
    assert result.stdout == ""
    said = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(said) == 1, result.stderr
    assert f"output: expected an empty folder, got {tmp_path} " in said[0]
