"""Settings of a method, warm starts, stages of training, and several data sets for one backbone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor

import tests.toy_method  # registers a method  # noqa: F401
from ept_fast import EPTBank, EPTModel, get_ept_model
from ept_fast.cli import main
from ept_fast.training.batches import GroupedBatches
from ept_fast.training.config import TrainConfig
from ept_fast.training.data import read_rows
from ept_fast.training.job import evaluate, predict
from ept_fast.training.multitask import MultitaskModel, TaskBatches, task_names
from ept_fast.training.report import describe_run
from ept_fast.transformers.backbone import load_backbone
from tests.tiny import (
    answer_rows,
    options,
    save_llama,
    save_model,
    save_t5,
    save_task,
    small_run,
    task_rows,
    tensors_of,
    train,
    weights_of,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("one_thread", "empty_pictures")


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


def test_a_mixture_gives_its_modules_and_not_its_gates(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    still = dict.fromkeys(("prompt_lr", "space_lr"), 1e-30)
    settings = settings_of(places, tmp_path / "first", method="mp2", max_steps=4)
    train(settings)
    warm = {**settings, **still, "output": str(tmp_path / "warm"), "max_steps": 1}
    cold = {**warm, "output": str(tmp_path / "cold")}
    train({**warm, "start_from": str(tmp_path / "first")})
    train(cold)
    first, got, new = (tensors_of(tmp_path / name) for name in ("first", "warm", "cold"))
    assert torch.equal(got["module_prompts"], first["module_prompts"])
    assert not torch.equal(got["module_prompts"], new["module_prompts"])
    assert torch.equal(got["gate_logits"], new["gate_logits"])
    assert not torch.equal(got["gate_logits"], first["gate_logits"])


def test_values_behind_another_frozen_matrix_are_no_start(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = settings_of(places, tmp_path / "first", method="ulpt", max_steps=1)
    train(settings)
    other = {**settings, "output": str(tmp_path / "out"), "start_from": str(tmp_path / "first")}
    with pytest.raises(ValueError, match=r"start_from: .*\(seed 1\), got .* with seed 0$"):
        train({**other, "settings": {"seed": 1}})
    train(other)


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
    with pytest.raises(ValueError, match="gate_steps: expected 0 for a prompt with neither"):
        train(settings)
    assert not (tmp_path / "out").exists()


# Several data sets ----------------------------------------------------------------------------


def two_tasks(folder: Path) -> tuple[Path, Path]:
    """One of two integer classes, and one of three named ones with fewer rows."""
    names = ("bad", "good", "none")
    rows = [{**row, "label": names[row["label"]]} for row in task_rows(50, 7)]
    plain = [{"text": "the play was a song", "label": "none"} for _ in range(10)]
    save_task(folder / "mood")
    return folder / "mood", write_rows(folder / "tone.jsonl", [*rows, *plain])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return two_tasks(tmp_path_factory.mktemp("pair"))


def several(
    places: tuple[Path, Path], pair: tuple[Path, ...], output: Path, **changes: Any
) -> dict[str, Any]:
    """Settings of a run on several data sets, with shared modules and gates of each."""
    choices = {"data": tuple(map(str, pair)), "method": "mp2", "settings": {"num_modules": 3}}
    return settings_of(places, output, **{**choices, "eval_before": True, **changes})


def prompt_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "ept_model.safetensors")


@pytest.fixture(scope="module")
def pretrained(
    places: tuple[Path, Path], pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("pretrained") / "out"
    run = several(places, pair, output, max_steps=24, eval_steps=8, batch_size=8)
    return output, train(run)


def test_each_data_set_has_an_adapter_and_figures_of_its_own(
    pretrained: tuple[Path, dict[str, Any]], pair: tuple[Path, Path]
) -> None:
    output, metrics = pretrained
    found = {path.name for path in output.iterdir()}
    pictures = {"learning_curves.png", "gate_weights.png"}
    assert found == {"adapter", "checkpoints", "metrics.json", "run.json", *pictures}
    assert {path.name for path in (output / "adapter").iterdir()} == {"mood", "tone"}
    assert metrics == json.loads((output / "metrics.json").read_text())
    assert metrics["config"]["data"] == list(map(str, pair))
    assert metrics["labels"] == {"mood": ["0", "1"], "tone": ["bad", "good", "none"]}
    assert {name: rows["train"] for name, rows in metrics["rows"].items()} == {
        "mood": 96, "tone": 54,
    }  # fmt: skip
    for each in metrics["curves"]["evaluation"]:
        for name in ("loss", "accuracy"):
            mean = sum(task[name] for task in each["tasks"].values()) / 2
            assert each[name] == pytest.approx(mean)
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    for task, source, split in (("mood", pair[0], "validation"), ("tone", pair[1], "train")):
        alone = evaluate(output / "adapter" / task, source, split=split)
        assert alone["rows"] == (40 if task == "mood" else 60)
        if task == "mood":
            assert alone["accuracy"] == metrics["after"]["tasks"]["mood"]["accuracy"]
    counts = metrics["parameters"]
    assert counts["prompt"] == 3 * 4 * 32 + 2 * 3
    assert counts["head"] == (2 + 3) * 33


def test_shared_tensors_are_one_and_others_differ(
    pretrained: tuple[Path, dict[str, Any]], places: tuple[Path, Path]
) -> None:
    output, metrics = pretrained
    mood, tone = (prompt_of(output / "adapter" / name) for name in ("mood", "tone"))
    assert torch.equal(mood["module_prompts"], tone["module_prompts"])
    assert not torch.equal(mood["gate_logits"], tone["gate_logits"])
    assert set(metrics["gate_weights"]) == {"mood", "tone"}
    backbone = load_backbone(str(places[0]))
    bank = EPTBank.from_adapters(
        backbone, {name: output / "adapter" / name for name in ("mood", "tone")}
    )
    assert set(bank.names) == {"mood", "tone"}
    model = EPTModel.from_pretrained(output / "adapter" / "tone")
    assert model.labels == ("bad", "good", "none")


@pytest.mark.parametrize(("method", "shared"), [("toy", True), ("mp2", False), ("attempt", False)])
def test_what_tasks_share_is_one_parameter(
    method: str, shared: bool, places: tuple[Path, Path]
) -> None:
    """All tensors of a method that names none."""
    backbone = load_backbone(str(places[0]))
    config = TrainConfig("m", "d", "o", method=method, settings={}, num_virtual_tokens=4)
    models = {
        name: get_ept_model(backbone, config.prompt_config(32), "SEQ_CLS", labels=labels)
        for name, labels in (("a", "xy"), ("b", "xyz"))
    }
    model = MultitaskModel(models)
    first, second = (dict(models[name].prompt.named_parameters()) for name in "ab")
    names = set(models["a"].prompt.shared or first) & set(first)
    assert {name for name in first if first[name] is second[name]} == names
    assert shared == (names == set(first))
    groups = model.parameter_groups(1.0, 2.0, 3.0, 4.0)
    grouped = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trained)
    assert {g["name"]: g["lr"] for g in groups}["head"] == 4.0
    ids = torch.tensor([[5, 6, 7]])
    for name, count in (("a", 2), ("b", 3)):
        assert model(task=name, input_ids=ids).logits.shape == (1, count)


def test_models_that_cannot_be_trained_together(places: tuple[Path, Path]) -> None:
    backbone = load_backbone(str(places[0]))
    headed = load_backbone(str(places[0]), labels=("x", "y"))
    config = TrainConfig("m", "d", "o", method="mp2").prompt_config(32)

    def model(name: Any = backbone, more: int = 0, **how: Any) -> EPTModel:
        sizes = dataclasses.replace(config, num_virtual_tokens=4 + more)
        return get_ept_model(name, sizes, "SEQ_CLS", labels=("x", "y"), **how)

    for models, message in (
        ({"a": model(), "b.c": model()}, r"adapter_name: expected letters.*got 'b\.c'"),
        ({"a": model(), "b": model(load_backbone(str(places[0])))}, "expected one backbone"),
        ({"a": model(), "b": model(more=1)}, r"models: expected prompts of .* for b"),
        ({"a": model(headed)}, "models: expected linear heads"),
    ):
        with pytest.raises(ValueError, match=message):
            MultitaskModel(models)


def test_steps_go_in_turn_and_each_is_of_one_task() -> None:
    lengths = {"a": [3] * 10, "b": [4] * 7, "c": [5] * 4}
    parts = {
        rank: TaskBatches(
            {
                name: GroupedBatches(each, 2, 3, seed=1, parts=2, rank=rank, world_size=2)
                for name, each in lengths.items()
            },
            8,
        )
        for rank in (0, 1)
    }
    for batches in parts.values():
        given = list(batches)
        assert given == list(batches)
        assert len(given) == len(batches) == 16
        tasks = [{name for name, _ in batch} for batch in given]
        assert tasks[0::2] == tasks[1::2] == [{name} for name in "abcabcab"]
    alone = list(GroupedBatches(lengths["b"], 2, 3, seed=1, parts=2, world_size=2))
    of_b = [[row for _, row in batch] for batch in parts[0] if batch[0][0] == "b"]
    assert of_b == alone[: len(of_b)]
    assert parts[0].steps_of(2) == 6  # one of each for an epoch


@pytest.mark.default_algorithms
def test_a_step_moves_its_own_task_alone(
    places: tuple[Path, Path], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """And what is shared; no weight decay reaches the gates and the head of another task."""
    found = []
    for steps, rate in ((1, 1e-30), (1, 0.1), (2, 0.1)):
        output = tmp_path / str(len(found))
        rates = dict.fromkeys(("prompt_lr", "space_lr", "head_lr"), rate)
        changes = {"max_steps": steps, "warmup_ratio": 0.0, "weight_decay": 0.1, **rates}
        train(several(places, pair, output, **changes, eval_before=False))
        found.append(
            {
                f"{task} {name}": data
                for task in ("mood", "tone")
                for name, data in held(every_tensor(output / "adapter" / task)).items()
            }
        )
    still, one, two = found
    own = ("gate_logits", "weight", "bias")
    modules = {"mood module_prompts", "tone module_prompts"}
    assert {name for name in one if one[name] != still[name]} == {
        *modules, *(f"mood {name}" for name in own),
    }  # fmt: skip
    # The rate of the only step of one is that of the first of two.
    assert {name for name in one if two[name] != one[name]} >= {
        *modules, *(f"tone {name}" for name in own),
    }  # fmt: skip


def every_tensor(adapter: Path) -> dict[str, Tensor]:
    return {**prompt_of(adapter), **load_file(adapter / "head.safetensors")}


@pytest.mark.default_algorithms
@pytest.mark.parametrize("gate_steps", [0, 5])
def test_a_killed_run_of_several_goes_on_to_the_same_bits(
    gate_steps: int, places: tuple[Path, Path], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """From between the turns, where the second stage begins, with the best weights so far."""
    settings = several(
        places, pair, tmp_path / "out", gate_steps=gate_steps, max_steps=7, eval_steps=1,
        keep="best", head_dropout=0.2, gradient_accumulation_steps=2,
    )  # fmt: skip
    metrics = train(settings)
    output = tmp_path / "out"
    whole = files_of(output / "adapter")
    cut_off(output, 6)
    shutil.rmtree(output / "best")
    again = train(settings, resume=True)
    assert files_of(output / "adapter") == whole
    for name in ("before", "after", "best", "curves", "tokens", "positions"):
        assert again[name] == metrics[name], name
    assert train(settings, resume=True) == again
    swapped = {**settings, "data": settings["data"][::-1]}
    with pytest.raises(ValueError, match=r"^data: expected \['.*mood', .* as in the run to resume"):
        train(swapped, resume=True)
    write_rows(tmp_path / "tone.jsonl", task_rows(30, 3))
    train({**settings, "data": (settings["data"][0], str(tmp_path / "tone.jsonl"))}, overwrite=True)
    assert files_of(output / "adapter") != whole


def files_of(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
    return {str(path): data for path, data in files.items()}


@pytest.mark.parametrize("task", ["seq2seq", "causal"])
def test_text_tasks_share_a_prompt_too(task: str, tmp_path: Path) -> None:
    model = (save_t5 if task == "seq2seq" else save_llama)(tmp_path / "model", steps=5)
    data = [save_task(tmp_path / name, answer_rows) for name in ("one", "two")]
    packed = {"packing": True, "pack_length": 40} if task == "causal" else {}
    settings = several(
        (model, data[0]), (data[0], data[1]), tmp_path / "out", task=task, init="data",
        prompt_length=48, max_target_length=6, eval_generate=3, max_steps=2, eval_steps=2, **packed,
    )  # fmt: skip
    metrics = train(settings)
    assert [sample["task"] for sample in metrics["samples"]] == ["one"] * 3 + ["two"] * 3
    assert (tmp_path / "out" / "samples.md").read_text().count("\ntask:\n\n    two\n") == 3
    assert set(metrics["after"]["tasks"]["one"]) >= {"exact_match", "token_accuracy", "perplexity"}
    assert "mean of 2 data sets" in describe_run(metrics, tmp_path)[0]
    texts = read_rows(data[1] / "test.jsonl", answer="none").take(range(2))
    assert len(predict(tmp_path / "out" / "adapter" / "two", texts)) == 2


def test_the_command_line_pretrains_and_adapts(
    places: tuple[Path, Path], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """Modules from two data sets, and for a third its gates alone."""
    few = write_rows(tmp_path / "few.jsonl", task_rows(16, 11))
    run = several(places, pair, tmp_path / "many", max_steps=8)
    words = {name: run.pop(name) for name in ("data", "settings", "eval_before")}
    chosen = ["--set", "num_modules=3", "--quiet"]
    sets = [f"--data={source}" for source in words["data"]]
    result = call("train", *options(run), *sets, *chosen)
    assert result.exit_code == 0, result.output
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert "(mean of 2 data sets)" in lines["accuracy"]
    assert lines["accuracy (mood)"].endswith("after (40 rows)")
    assert lines["evaluated on (tone)"].endswith("(held out)")
    assert Path(lines["adapter (tone)"]).is_dir()
    adapters = tmp_path / "many" / "adapter"
    named = f"expected the folder of one adapter, got {adapters}, in which there are mood, tone"
    for command in (
        ["evaluate", "--adapter", tmp_path / "many", "--data", pair[0]],
        ["predict", "--adapter", adapters],
        ["train", *options({**run, "output": tmp_path / "x", "data": few}), *chosen,
         "--start-from", tmp_path / "many"],
    ):  # fmt: skip
        refused = call(*command, stdin="a song\n")
        assert refused.exit_code == 2
        assert named in refused.stderr
    answered = call("predict", "--adapter", adapters / "tone", stdin="a song\n")
    assert json.loads(answered.stdout)["label"] in ("bad", "good", "none")
    run |= {"data": str(few), "output": str(tmp_path / "one"), "max_steps": 3, "gate_steps": 3}
    adapted = call("train", *options(run), *chosen, "--start-from", adapters / "mood")
    assert adapted.exit_code == 0, adapted.output
    assert "gates and head alone: in the first 3 of 3 steps" in adapted.stdout
    before, after = prompt_of(adapters / "mood"), prompt_of(tmp_path / "one" / "adapter")
    assert torch.equal(after["module_prompts"], before["module_prompts"])
    assert not torch.equal(after["gate_logits"], before["gate_logits"])


def test_names_of_data_sets_are_those_of_adapters() -> None:
    sources = (
        "a/mood",
        "b/mood",
        "train.jsonl",
        "c/train.csv",
        "x.y",
        "Mood",
        "user/set",
        "ü",
        "b-2",
    )
    assert task_names(sources) == [
        "mood", "mood-2", "data-train", "data-train-2", "x_y", "Mood-3", "set", "data", "b-2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": ()}, ValueError, "data: expected at least one data set, got none"),
        ({"data": ("d", "")}, ValueError, "data: expected a non-empty string, got ''"),
        ({"data": ("d", 3)}, TypeError, "data: expected a string, got int"),
        ({"data": ["d", "e"], "eval_data": "v"}, ValueError, "eval_data: expected None beside sev"),
        ({"data": ["d", "e"], "num_labels": 3}, ValueError, "num_labels: expected None beside sev"),
        ({"gate_steps": -1}, ValueError, "gate_steps: expected an integer >= 0, got -1"),
        ({"start_from": ""}, ValueError, "start_from: expected a non-empty string, got ''"),
    ],
)
def test_config_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message):
        TrainConfig(**{"model": "m", "data": "d", "output": "o", **changes})


def test_one_data_set_is_one_however_it_is_given() -> None:
    for data in ("d", ["d"], ("d",)):
        config = TrainConfig(model="m", data=data, output="o")  # type: ignore[arg-type]
        assert (config.data, config.sources, config.to_dict()["data"]) == ("d", ("d",), "d")
