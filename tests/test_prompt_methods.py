"""Every registered prompt method, and one that only a test knows, does all that EPT does."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tests.toy_method as toy_method  # registers the toy
from ept_fast import CheckpointError, EPTBank, EPTConfig, EPTModel, FusedEPTPrompt, get_ept_model
from ept_fast.config import PromptConfig
from ept_fast.interchange import export_peft, export_plain, import_peft, import_plain
from ept_fast.prompts.base import Prompt, expected_shapes, prompt_class, prompt_methods, register
from ept_fast.training.config import TrainConfig
from ept_fast.transformers import adapter
from tests.architectures import BY_NAME
from tests.processes import python
from tests.tiny import options, save_model, save_task, small_run

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = {m.config_class.prompt_type: m for m in prompt_methods().values()}
KINDS = sorted(METHODS)
D = BY_NAME["Llama"].width


def config_of(kind: str, **choices: Any) -> PromptConfig:
    """A small config; a method that can have an offset to the text has none."""
    config = METHODS[kind].config_class
    known = {field.name for field in dataclasses.fields(config)}
    sizes = {"hidden_size": D, "num_virtual_tokens": 3, "rank": 0, "offset_size": 0, **choices}
    return config(**{name: value for name, value in sizes.items() if name in known})


def make(kind: str, num_tasks: int | None = None, **choices: Any) -> Prompt:
    """A prompt with every tensor filled."""
    config = config_of(kind, **choices)
    layer = nn.Embedding(20, config.hidden_size)
    return filled(prompt_class(config)(config, layer, num_tasks=num_tasks))


def filled(prompt: Any) -> Any:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return prompt


def model_of(kind: str) -> EPTModel:
    llama = BY_NAME["Llama"].build("CAUSAL_LM")
    model = get_ept_model(llama, config_of(kind), "CAUSAL_LM")
    filled(model.prompt)
    return model.eval()


def ids(rows: int = 2) -> Tensor:
    return torch.randint(3, 20, (rows, 5), generator=torch.Generator().manual_seed(1))


def test_the_registry_has_ept_and_the_toy() -> None:
    assert {"ept", "toy"} <= set(KINDS)
    assert prompt_class(config_of("ept")) is FusedEPTPrompt
    assert prompt_class(config_of("toy")) is toy_method.ToyPrompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [None, 2])
def test_tensors_have_the_shapes_and_groups_that_the_method_says(
    kind: str, num_tasks: int | None
) -> None:
    prompt = make(kind, num_tasks)
    shapes = {name: tuple(p.shape) for name, p in prompt.named_parameters()}
    assert shapes == expected_shapes(prompt.config, num_tasks)
    groups = prompt.parameter_groups(1.0, 2.0, 3.0)
    rates = {"prompt": 1.0, "offset": 2.0, "spaces": 3.0}
    assert {g["name"]: g["lr"] for g in groups} == {g["name"]: rates[g["name"]] for g in groups}
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in prompt.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [None, 2])
def test_trains_folds_saves_and_loads(kind: str, num_tasks: int | None, tmp_path: Path) -> None:
    prompt = make(kind, num_tasks)
    tasks = None if num_tasks is None else torch.tensor([1, 0])
    prompt(ids(), task_ids=tasks).inputs_embeds.square().sum().backward()
    for name, parameter in prompt.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    prompt.eval()  # without the noise of a method that draws in training
    out = prompt(ids(), task_ids=tasks).inputs_embeds
    assert torch.equal(prompt.fold()(ids(), task_ids=tasks).inputs_embeds, out)
    prompt.save_pretrained(tmp_path)
    for cls in (Prompt, type(prompt)):
        loaded = cls.from_pretrained(tmp_path, prompt.embedding)
        assert type(loaded.eval()) is type(prompt)
        assert (loaded.config, loaded.num_tasks) == (prompt.config, num_tasks)
        assert torch.equal(loaded(ids(), task_ids=tasks).inputs_embeds, out)
    other = type(prompt)(prompt.config, prompt.embedding, num_tasks=num_tasks)
    other.load_pretrained(tmp_path)
    assert torch.equal(other.eval()(ids(), task_ids=tasks).inputs_embeds, out)


@pytest.mark.parametrize("kind", KINDS)
def test_config_goes_through_json_and_names_its_method(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    assert type(config).from_json(config.to_json()) == config
    make(kind).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "ept_config.json").read_text())
    assert written.get("prompt_type") == (None if kind == "ept" else kind)


@pytest.mark.parametrize("kind", KINDS)
def test_model_bank_and_exporters(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    model.save_pretrained(tmp_path / "adapter")
    wanted = model(input_ids=ids()).logits
    loaded = EPTModel.from_pretrained(tmp_path / "adapter", BY_NAME["Llama"].build("CAUSAL_LM"))
    assert torch.equal(loaded(input_ids=ids()).logits, wanted)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(state) == 1 + len(list(model.prompt.parameters()))
    model.fold()
    assert torch.equal(model(input_ids=ids()).logits, wanted)
    model.unfold()
    llama = BY_NAME["Llama"].build("CAUSAL_LM")
    bank = EPTBank.from_adapters(llama, {"a": tmp_path / "adapter"}, capacity=2)
    bank.add("b", loaded.prompt)
    got = bank(input_ids=ids(), tasks=["a", "b"]).logits
    torch.testing.assert_close(got, wanted)
    export_plain(model.prompt, tmp_path / "plain")
    constant = model.prompt.reconstruct().detach()
    assert torch.equal(import_plain(tmp_path / "plain").prompt_embeds, constant)
    export_peft(model.prompt, tmp_path / "peft", base_model=None, task_type="CAUSAL_LM")
    assert torch.equal(import_peft(tmp_path / "peft").reconstruct(), constant)


def test_another_methods_file_is_refused(tmp_path: Path) -> None:
    make("toy").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="prompt_type: expected that of a FusedEPTPrompt"):
        FusedEPTPrompt.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="prompt_type: expected ept, got 'toy'"):
        EPTConfig.from_dict(config_of("toy").to_dict())
    text = (tmp_path / "ept_config.json").read_text()
    for name in ("ept_config.json", "ept_model.safetensors"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data.replace(b"toy", b"top"))
    assert "toy" in text
    with pytest.raises(CheckpointError, match=r"prompt_type: expected one of .*got 'top'"):
        Prompt.from_pretrained(tmp_path)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="prompt_type: expected a new name, got 'toy'"):
        register(toy_method.ToyPrompt)


def test_a_config_of_no_method_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Unknown(PromptConfig):
        prompt_type = "unknown"

    llama = BY_NAME["Llama"].build("CAUSAL_LM")
    for config in (Unknown(D), {"hidden_size": D}):
        with pytest.raises(TypeError, match="config: expected an EPTConfig"):
            get_ept_model(llama, config, "CAUSAL_LM")  # type: ignore[arg-type]


def test_a_run_has_the_methods_own_config() -> None:
    run = TrainConfig(model="m", data="d", output="o", method="toy", num_virtual_tokens=7)
    assert run.prompt_config(D) == toy_method.ToyConfig(D, num_virtual_tokens=7)
    with pytest.raises(ValueError, match=r"method: expected one of .*, ept, .*toy, got 'other'"):
        TrainConfig(model="m", data="d", output="o", method="other")


def test_the_command_line_trains_with_it(tmp_path: Path) -> None:
    run = small_run(save_model(tmp_path / "m"), save_task(tmp_path / "d"), tmp_path / "o")
    words = options({**run, "max_steps": 4, "method": "toy", "device": "cpu"})
    code = "import tests.toy_method, ept_fast.cli; ept_fast.cli.main()"
    done = python("-c", code, "train", *words, timeout=300)
    assert done.returncode == 0, done.stderr
    prompt = Prompt.from_pretrained(tmp_path / "o" / "adapter")
    assert type(prompt) is toy_method.ToyPrompt
    assert bool(prompt.size.any())


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_read_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_of(kind).save_pretrained(tmp_path)
    opened: list[str] = []
    real = os.open

    def counted(path: Any, *arguments: Any, **more: Any) -> int:
        opened.append(Path(path).name)
        return real(path, *arguments, **more)

    llama = BY_NAME["Llama"].build("CAUSAL_LM")
    monkeypatch.setattr(os, "open", counted)
    EPTBank.from_adapters(llama, {"a": tmp_path})
    assert sorted(opened) == ["adapter.json", "ept_config.json", "ept_model.safetensors"]


def test_two_models_of_one_read_adapter_share_nothing(tmp_path: Path) -> None:
    model_of("ept").save_pretrained(tmp_path)
    saved = adapter.read_adapter(tmp_path)
    one, two = (
        EPTModel.from_pretrained(saved, BY_NAME["Llama"].build("CAUSAL_LM")) for _ in range(2)
    )
    before = two.prompt.reconstruct().detach().clone()
    with torch.no_grad():
        for parameter in one.prompt.parameters():
            parameter.zero_()
    assert torch.equal(two.prompt.reconstruct(), before)
