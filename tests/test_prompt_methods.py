"""Every registered prompt method, and one that only a test knows, does all that EPT does."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tests.toy_method as toy_method
from ept_fast import (
    CheckpointError,
    EPTBank,
    EPTConfig,
    EPTModel,
    FusedEPTPrompt,
    get_ept_model,
    reference,
)
from ept_fast.config import PromptConfig
from ept_fast.interchange import export_peft, export_plain, import_peft, import_plain
from ept_fast.prompts.base import Prompt, expected_shapes, prompt_class, prompt_methods, register
from ept_fast.prompts.residual import ResidualConfig
from ept_fast.training.config import TrainConfig
from ept_fast.training.job import evaluate, load_adapter, train
from ept_fast.transformers import adapter
from tests import support
from tests.architectures import BY_NAME
from tests.cases import PADDINGS, make_mask
from tests.methods import ROWS, Given, Row, arrays_of, filled, make, with_offset
from tests.processes import python
from tests.tiny import options, save_model, save_task, small_run

pytestmark = pytest.mark.usefixtures("one_thread")

D = BY_NAME["Llama"].width
EVERY = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
# Rows of ROWS, and the published systems that they are.
SYSTEMS = {
    "ept": "EPT",
    "lamp": "LAMP",
    "pre": "PRE",
    "mp2": "MP2",
    "instance": "IPT",
    "infoprompt": "InfoPrompt",
    "stable": "StablePT",
}
CONSTANT_ROWS = {name: row for name, row in ROWS.items() if not row.reads_text}
READING_ROWS = {name: row for name, row in ROWS.items() if row.reads_text}
# The same prompt before every text, or a prompt of each row, from its text.
CONSTANT = pytest.mark.parametrize("row", CONSTANT_ROWS.values(), ids=CONSTANT_ROWS)
READING = pytest.mark.parametrize("row", READING_ROWS.values(), ids=READING_ROWS)


def every_as(column: str) -> pytest.MarkDecorator:
    """Every row; those of published systems are part of this column of docs/support.md."""
    params = []
    for name, row in ROWS.items():
        of = support.marks(SYSTEMS[name], column) if name in SYSTEMS else ()
        params.append(pytest.param(row, id=name, marks=of))
    return pytest.mark.parametrize("row", params)


TASKS = pytest.mark.parametrize("num_tasks", [None, 2])
NAMES = [name for name in prompt_methods() if name != "toy"]
DOCS = Path(__file__).parents[1] / "docs" / "methods.md"


def model_of(row: Row, **choices: Any) -> EPTModel:
    llama = BY_NAME["Llama"].build("CAUSAL_LM")
    model = get_ept_model(llama, row.config(D, **choices), "CAUSAL_LM")
    filled(model.prompt)
    return model.eval()


def ids(rows: int = 2) -> Tensor:
    return torch.randint(3, 20, (rows, 5), generator=torch.Generator().manual_seed(1))


def tasks_of(num_tasks: int | None) -> Tensor | None:
    return None if num_tasks is None else torch.tensor([1, 0])


def test_every_method_has_a_row_and_a_section() -> None:
    kinds = {m.config_class.prompt_type for m in prompt_methods().values()}
    assert kinds == {row.kind for row in ROWS.values()}
    assert prompt_class(ROWS["ept"].config(D)) is FusedEPTPrompt
    assert prompt_class(ROWS["toy"].config(D)) is toy_method.ToyPrompt
    headings = " ".join(re.findall(r"^## .*$", DOCS.read_text(), re.MULTILINE))
    for name in NAMES:
        assert f"`{name}`" in headings, name


# Values


@every_as("definition")
@TASKS
def test_it_is_what_its_definition_says(row: Row, num_tasks: int | None) -> None:
    prompt = make(row.config(8), num_tasks, dtype=torch.float64).eval()
    out = prompt(ids(), task_ids=tasks_of(num_tasks)).inputs_embeds
    m = prompt.config.num_virtual_tokens
    for i, text in enumerate(ids()):
        task = None if num_tasks is None else 1 - i
        embeds = prompt.embedding.weight.detach()[text].numpy()
        given = Given(text.numpy(), embeds)
        wanted = row.definition(arrays_of(prompt, task), prompt.config, given)
        np.testing.assert_allclose(out[i, :m].detach().numpy(), wanted, rtol=1e-12, atol=1e-13)
        np.testing.assert_array_equal(out[i, m:].detach().numpy(), embeds)


@every_as("gradients")
@TASKS
def test_gradients(row: Row, num_tasks: int | None) -> None:
    prompt = make(row.config(4), num_tasks, dtype=torch.float64).eval()
    names = [name for name, _ in prompt.named_parameters()]

    def embeds(*tensors: Tensor) -> Tensor:
        given = (ids(), None, None, tasks_of(num_tasks))
        values = dict(zip(names, tensors, strict=True))
        out: Tensor = torch.func.functional_call(prompt, values, given).inputs_embeds
        return out

    assert torch.autograd.gradcheck(embeds, tuple(prompt.parameters()), fast_mode=True)


# the compiler itself makes an autograd.Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@EVERY
def test_compiled_in_one_graph(row: Row) -> None:
    torch.compiler.reset()
    prompt = make(row.config(8)).eval()
    compiled = torch.compile(prompt, fullgraph=True, backend="aot_eager")
    results = []
    for call in (prompt, compiled):
        prompt.zero_grad()
        out = call(ids()).inputs_embeds
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in prompt.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(row: Row, dtype: torch.dtype) -> None:
    prompt = make(row.config(8), dtype=dtype).eval()
    wide = make(row.config(8), dtype=torch.float32).eval()
    wide.set_input_embeddings(prompt.embedding.float())
    with torch.no_grad():
        for mine, theirs in zip(wide.parameters(), prompt.parameters(), strict=True):
            mine.copy_(theirs)
    wanted = wide(ids()).inputs_embeds
    prompt.embedding.to(dtype)
    out = prompt(ids()).inputs_embeds
    with torch.autocast("cpu", torch.bfloat16):
        again = prompt(ids()).inputs_embeds
    assert torch.equal(again, out)
    assert torch.equal(out, wanted.to(dtype))


@EVERY
@pytest.mark.parametrize("padding", [name for name in PADDINGS if name != "none"])
def test_padding_changes_nothing(row: Row, padding: str) -> None:
    prompt = make(row.config(8)).eval()
    draw = torch.Generator().manual_seed(2)
    mask = make_mask(padding, 4, 6, draw)
    assert mask is not None
    texts = torch.randint(20, (4, 6), generator=draw)
    out = prompt(texts, attention_mask=mask).inputs_embeds
    others = torch.where(mask != 0, texts, (texts + 7) % 20)
    again = prompt(others, attention_mask=mask).inputs_embeds
    m = prompt.config.num_virtual_tokens
    for i in range(4):
        real = mask[i] != 0
        alone = prompt(texts[i : i + 1, real]).inputs_embeds[0]
        for padded in (out, again):
            torch.testing.assert_close(padded[i, :m], alone[:m])
            torch.testing.assert_close(padded[i, m:][real], alone[m:])


@pytest.mark.parametrize(
    "row",
    [with_offset(row) for row in ROWS.values() if row.offset],
    ids=[name for name, row in ROWS.items() if row.offset],
)
@TASKS
def test_an_offset_is_added_to_the_texts_real_tokens(row: Row, num_tasks: int | None) -> None:
    prompt = make(row.config(8), num_tasks, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 1, 0]])
    out = prompt(ids(), attention_mask=mask, task_ids=tasks_of(num_tasks)).inputs_embeds
    wanted = reference.splice_prompt(
        prompt.reconstruct(),
        input_ids=ids(),
        weight=prompt.embedding.weight,
        offset_a=prompt.offset_a,
        offset_b=prompt.offset_b,
        scaling=prompt.config.scaling,
        attention_mask=mask,
        task_ids=tasks_of(num_tasks),
    )
    torch.testing.assert_close(out, wanted)
    assert not torch.equal(out[:, 3:], prompt.embedding(ids()))
    out.square().sum().backward()
    assert all(bool(p.grad.any()) for p in prompt.parameters())
    folded = prompt.eval().fold(offset="table")
    again = folded(ids(), attention_mask=mask, task_ids=tasks_of(num_tasks)).inputs_embeds
    torch.testing.assert_close(again, out)


# Configs


@EVERY
def test_config_goes_through_json_and_names_its_method(row: Row, tmp_path: Path) -> None:
    config = row.config(D)
    assert type(config).from_json(config.to_json()) == config
    make(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "ept_config.json").read_text())
    assert written.get("prompt_type") == (None if row.kind == "ept" else row.kind)


@EVERY
def test_parameters_are_counted(row: Row) -> None:
    for chosen in (row, with_offset(row)):
        config = chosen.config(8)
        counted = sum(int(np.prod(shape)) for shape in expected_shapes(config, None).values())
        assert config.num_parameters in (counted, *([None] if row.kind == "toy" else []))


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_used_up(name: str) -> None:
    cls = prompt_methods()[name].config_class
    config = cls.for_method(name, 384, 100, max_length=64)
    budget, count = 100 * 384, config.num_parameters
    assert count is not None
    if name == "pre":  # an LSTM of that width is of one size
        assert count > budget
        return
    assert count <= budget
    if cls.solved is not None:
        size = getattr(config, cls.solved)
        given = {cls.solved: size - 1, "max_length": 64}
        less = cls.for_method(name, 384, 100, **given)
        assert less.num_parameters is not None
        assert less.num_parameters < count
        try:
            more = dataclasses.replace(config, **{cls.solved: size + 1})
        except ValueError:
            return
        assert more.num_parameters is not None
        assert more.num_parameters > budget


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("ept", "dept", "pt", "pre")])
def test_a_budget_that_is_too_small_and_foreign_settings_are_refused(name: str) -> None:
    cls = prompt_methods()[name].config_class
    with pytest.raises(ValueError, match=r"prompt_length: expected a budget of at least \d+ param"):
        cls.for_method(name, 384, 1, max_length=64)
    with pytest.raises(
        ValueError, match=rf"settings: expected fields of the method {name} \(.*bogu"
    ):
        cls.for_method(name, 384, 100, bogus=1)


BAD = {
    "lamp": [
        ({"prompt_rank": 0}, "prompt_rank: expected an integer >= 1, got 0"),
        ({"prompt_rank": 9}, "prompt_rank: expected at most .* = 8, got 9"),
        ({"window": 0}, "window: expected an integer >= 1, got 0"),
        ({"product": "outer"}, "product: expected one of gram, sketch, got 'outer'"),
        ({"sketch_size": 0}, "sketch_size: expected an integer >= 1, got 0"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
    ],
    "residual": [
        ({"encoder": "gru"}, "encoder: expected one of mlp, lstm, got 'gru'"),
        ({"bottleneck": 0}, "bottleneck: expected an integer >= 1, got 0"),
        ({"activation": "tanh"}, "activation: expected one of .*, got 'tanh'"),
        ({"layer_norm": 1}, "layer_norm: expected a bool, got int 1"),
        ({"shared": None}, "shared: expected a bool, got NoneType None"),
        ({"hidden_size": 7, "encoder": "lstm"}, "hidden_size: expected an even number .*, got 7"),
    ],
    "mixture": [
        ({"num_modules": 0}, "num_modules: expected an integer >= 1, got 0"),
        ({"num_factors": -1}, "num_factors: expected an integer >= 0, got -1"),
        ({"gates": "softmax"}, "gates: expected one of bernoulli, attention, got 'softmax'"),
        ({"temperature": 0.0}, "temperature: expected a finite number > 0, got 0.0"),
        ({"query_dim": 0}, "query_dim: expected an integer >= 1, got 0"),
        ({"attend_to_target": 2}, "attend_to_target: expected a bool, got int 2"),
    ],
    "infoprompt": [
        ({"bottleneck": 0}, "bottleneck: expected an integer >= 1, got 0"),
        ({"pooling": "last"}, "pooling: expected one of mean, first, got 'last'"),
        ({"first_pass": 1}, "first_pass: expected a bool, got int 1"),
        ({"first_pass": False}, "representation_weight: expected 0 without a first pass.*got 0.2"),
        ({"latent_size": 0}, "latent_size: expected an integer >= 1, got 0"),
        ({"head_weight": "a"}, "head_weight: expected a real number, got str 'a'"),
        ({"schedule": "cosine"}, "schedule: expected one of constant, linear, got 'cosine'"),
    ],
    "stable": [
        ({"num_heads": 0}, "num_heads: expected an integer >= 1, got 0"),
        ({"head_dim": 0}, "head_dim: expected an integer >= 1, got 0"),
        ({"mlp_dim": 0}, "mlp_dim: expected an integer >= 1, got 0"),
        ({"first_pass": None}, "first_pass: expected a bool, got NoneType None"),
        ({"contrastive_weight": 1e999}, "contrastive_weight: expected a finite number, got inf"),
        ({"contrastive_temperature": 0}, "contrastive_temperature: expected a finite number > 0"),
        ({"schedule": 1}, "schedule: expected one of constant, linear, got 1"),
    ],
    "ulpt": [
        ({"prompt_rank": 0}, "prompt_rank: expected an integer >= 1, got 0"),
        ({"prompt_rank": 9}, "prompt_rank: expected at most hidden_size 8, got 9"),
        ({"seed": 0.5}, "seed: expected an integer, got float 0.5"),
    ],
    "accept": [
        ({"num_blocks": 3}, "num_blocks: expected a divisor of hidden_size 8, got 3"),
        ({"num_blocks": 0}, "num_blocks: expected an integer >= 1, got 0"),
        ({"codebook_size": 0}, "codebook_size: expected an integer >= 1, got 0"),
        ({"offset_size": 2}, "offset_size: expected at most .* = 1, got 2"),
        ({"max_length": 0}, "max_length: expected an integer >= 1, got 0"),
    ],
    "instance": [
        ({"table_size": 0}, "table_size: expected an integer >= 1, got 0"),
        ({"table_rank": -1}, "table_rank: expected an integer >= 0, got -1"),
        ({"table_rank": 9}, "table_rank: expected at most hidden_size 8, got 9"),
        ({"generator": "rnn"}, "generator: expected one of none, cnn, mlp, got 'rnn'"),
        ({"bottleneck": 0}, "bottleneck: expected an integer >= 1, got 0"),
    ],
}


@pytest.mark.parametrize(
    ("kind", "values", "message"), [(k, v, m) for k, cases in BAD.items() for v, m in cases]
)
def test_bad_configs(kind: str, values: dict[str, Any], message: str) -> None:
    cls = next(
        m.config_class for m in prompt_methods().values() if m.config_class.prompt_type == kind
    )
    with pytest.raises((TypeError, ValueError), match=message):
        cls(**{"hidden_size": 8, "num_virtual_tokens": 3, **values})


# Modules


@EVERY
@TASKS
def test_tensors_have_the_shapes_and_groups_that_the_method_says(
    row: Row, num_tasks: int | None
) -> None:
    prompt = make(row.config(D), num_tasks)
    shapes = {name: tuple(p.shape) for name, p in prompt.named_parameters()}
    assert shapes == expected_shapes(prompt.config, num_tasks)
    groups = prompt.parameter_groups(1.0, 2.0, 3.0)
    rates = {"prompt": 1.0, "offset": 2.0, "spaces": 3.0}
    assert {g["name"]: g["lr"] for g in groups} == {g["name"]: rates[g["name"]] for g in groups}
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in prompt.parameters())


@EVERY
@TASKS
def test_trains_folds_saves_and_loads(row: Row, num_tasks: int | None, tmp_path: Path) -> None:
    prompt = make(row.config(D), num_tasks)
    tasks = tasks_of(num_tasks)
    prompt(ids(), task_ids=tasks).inputs_embeds.square().sum().backward()
    for name, parameter in prompt.named_parameters():
        assert (parameter.grad is None) == (name in row.of_losses), name
        assert parameter.grad is None or bool(parameter.grad.any()), name
    prompt.eval()  # without the noise of a method that draws in training
    out = prompt(ids(), task_ids=tasks).inputs_embeds
    folded = prompt.fold()
    row.check(folded(ids(), task_ids=tasks).inputs_embeds, out)
    assert not any(p.requires_grad for p in folded.parameters())
    prompt.save_pretrained(tmp_path)
    for cls in (Prompt, type(prompt)):
        loaded = cls.from_pretrained(tmp_path, prompt.embedding).eval()
        assert type(loaded) is type(prompt)
        assert (loaded.config, loaded.num_tasks) == (prompt.config, num_tasks)
        assert torch.equal(loaded(ids(), task_ids=tasks).inputs_embeds, out)
    other = type(prompt)(prompt.config, prompt.embedding, num_tasks=num_tasks).eval()
    other.load_pretrained(tmp_path)
    assert torch.equal(other(ids(), task_ids=tasks).inputs_embeds, out)


@EVERY
def test_the_same_generator_gives_the_same_start(row: Row) -> None:
    layer = nn.Embedding(20, 8)

    def start(seed: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        config = row.config(8)
        return list(prompt_class(config)(config, layer, generator=draw).parameters())

    assert all(torch.equal(a, b) for a, b in zip(start(1), start(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(start(1), start(2), strict=True))


@EVERY
def test_it_starts_from_given_rows(row: Row) -> None:
    config = row.config(8)
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    prompt = prompt_class(config)(config, nn.Embedding(20, 8), init=rows).eval()
    text = torch.zeros(1, 0, dtype=torch.int64)
    out = prompt(text).inputs_embeds
    assert bool(torch.isfinite(out).all())
    if row.kind in ("ept", "toy"):
        assert torch.equal(out[0], rows)


# Models


@CONSTANT
def test_model_bank_and_exporters(row: Row, tmp_path: Path) -> None:
    model = model_of(row)
    model.save_pretrained(tmp_path / "adapter")
    wanted = model(input_ids=ids()).logits
    loaded = EPTModel.from_pretrained(tmp_path / "adapter", BY_NAME["Llama"].build("CAUSAL_LM"))
    assert torch.equal(loaded(input_ids=ids()).logits, wanted)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert len(state) == 1 + len(list(model.prompt.parameters()))
    model.fold()
    row.check(model(input_ids=ids()).logits, wanted)
    model.unfold()
    llama = BY_NAME["Llama"].build("CAUSAL_LM")
    bank = EPTBank.from_adapters(llama, {"a": tmp_path / "adapter"}, capacity=2)
    bank.add("b", loaded.prompt)
    got = bank(input_ids=ids(), tasks=["a", "b"]).logits
    torch.testing.assert_close(got, wanted)
    export_plain(model.prompt, tmp_path / "plain")
    constant = model.prompt.fold().reconstruct()
    assert torch.equal(import_plain(tmp_path / "plain").prompt_embeds, constant)
    export_peft(model.prompt, tmp_path / "peft", base_model=None, task_type="CAUSAL_LM")
    assert torch.equal(import_peft(tmp_path / "peft").reconstruct(), constant)


def test_a_bank_of_all_methods_with_members_of_unequal_sizes() -> None:
    rows = [with_offset(row) for row in CONSTANT_ROWS.values()]
    models = [model_of(row, num_virtual_tokens=2 + i % 3) for i, row in enumerate(rows)]
    sizes = {"num_virtual_tokens": 4, "max_length": 9, "rank": 4}
    llama = BY_NAME["Llama"].build("CAUSAL_LM")
    bank = EPTBank(llama, "CAUSAL_LM", capacity=len(models), **sizes)
    names = [f"m{i}" for i in range(len(models))]
    for name, model in zip(names, models, strict=True):
        bank.add(name, model.prompt)
    got = bank(input_ids=ids(1).expand(len(models), -1), tasks=names).logits
    for logits, model in zip(got, models, strict=True):
        torch.testing.assert_close(logits, model(input_ids=ids(1)).logits[0])


@READING
def test_a_prompt_of_each_text(row: Row, tmp_path: Path) -> None:
    model = model_of(row)
    wanted = model(input_ids=ids()).logits
    model.save_pretrained(tmp_path)
    loaded = EPTModel.from_pretrained(tmp_path, BY_NAME["Llama"].build("CAUSAL_LM"))
    assert torch.equal(loaded(input_ids=ids()).logits, wanted)
    written = model.generate(input_ids=ids(), max_new_tokens=3, do_sample=False)
    model.fold()
    assert model.active_prompt is not model.prompt
    assert torch.equal(model(input_ids=ids()).logits, wanted)
    again = model.generate(input_ids=ids(), max_new_tokens=3, do_sample=False)
    assert torch.equal(again, written)
    model.unfold()
    one = torch.cat([model(input_ids=ids()[i : i + 1]).logits for i in range(2)])
    torch.testing.assert_close(one, wanted)
    name = type(model.prompt).__name__
    message = f"expected a prompt that is the same before every text, got a {name}"
    sizes = {"num_virtual_tokens": 4, "max_length": 9, "rank": 4}
    bank = EPTBank(BY_NAME["Llama"].build("CAUSAL_LM"), "CAUSAL_LM", capacity=1, **sizes)
    with pytest.raises(ValueError, match=f"adapter: {message}"):
        bank.add("a", model.prompt)
    assert bank.names == ()
    with pytest.raises(ValueError, match=f"prefix: {message}"):
        model.prefix_cache()  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"pack_index: {message}"):
        model(input_ids=ids(), pack_index=torch.arange(10).view(1, 10))
    for export in (export_plain, export_peft):
        more = {} if export is export_plain else {"base_model": None, "task_type": "CAUSAL_LM"}
        with pytest.raises(ValueError, match=f"prompt: {message}"):
            export(model.prompt, tmp_path / "other", **more)  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"prompt: {message}"):
        model.prompt.reconstruct()
    with pytest.raises(ValueError, match="offset: expected one of"):
        model.prompt.fold(offset="other")


@READING
@pytest.mark.parametrize("task", [-1, 2])
def test_a_task_that_the_bank_does_not_have(row: Row, task: int) -> None:
    prompt = make(row.config(8), 2)
    with pytest.raises(IndexError, match=rf"task_ids: expected ids from 0 to 1, got {task} at row"):
        prompt(ids(), task_ids=torch.tensor([0, task]))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@EVERY
def test_as_a_method_of_peft(row: Row) -> None:
    peft = pytest.importorskip("peft")
    from ept_fast.peft import EPTPeftConfig

    model = model_of(row)
    wanted = model(input_ids=ids()).logits
    config = EPTPeftConfig.of(model.prompt.config, task_type="CAUSAL_LM")
    assert config.prompt_config(D) == model.prompt.config
    other = peft.get_peft_model(BY_NAME["Llama"].build("CAUSAL_LM"), config).eval()
    other.ept_model.prompt.load_state_dict(model.prompt.state_dict())
    assert torch.equal(other(input_ids=ids()).logits, wanted)


def test_methods_keep_their_own_defaults_where_ept_has_others() -> None:
    """ReLU is the residual MLP's activation, GELU that of EPT's subspaces."""
    pytest.importorskip("peft")
    from ept_fast.peft import EPTPeftConfig

    plain = ResidualConfig(D)
    assert plain.activation == "relu"
    run = TrainConfig(model="m", data="d", output="o", method="residual")
    assert run.prompt_config(384).activation == "relu"  # type: ignore[attr-defined]
    config = EPTPeftConfig(task_type="CAUSAL_LM", prompt_type="residual")
    assert config.prompt_config(D) == plain
    gelu = dataclasses.replace(plain, activation="gelu")
    assert EPTPeftConfig.of(gelu, task_type="CAUSAL_LM").prompt_config(D) == gelu


@pytest.mark.parametrize("name", NAMES)
def test_a_run_trains_and_is_evaluated_with_it(name: str, tmp_path: Path) -> None:
    data = save_task(tmp_path / "d")
    run = small_run(save_model(tmp_path / "m"), data, tmp_path / "o")
    config = TrainConfig(**{**run, "max_steps": 4, "method": name, "prompt_length": 48})
    metrics = train(config, progress=False)
    assert metrics["parameters"]["prompt"] == config.prompt_config(32).num_parameters
    loaded = load_adapter(tmp_path / "o" / "adapter")
    got = evaluate(loaded, data, split="validation")
    assert got["accuracy"] == metrics["after"]["accuracy"]


def test_another_methods_file_is_refused(tmp_path: Path) -> None:
    make(ROWS["toy"].config(D)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="prompt_type: expected that of a FusedEPTPrompt"):
        FusedEPTPrompt.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="prompt_type: expected ept, got 'toy'"):
        EPTConfig.from_dict(ROWS["toy"].config(D).to_dict())
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
    with pytest.raises(ValueError, match=r"method: expected one of .*ept, .*toy, got 'other'"):
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


@pytest.mark.parametrize("name", ["ept", "toy", "lamp", "mp2", "accept"])
def test_an_adapter_is_read_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_of(ROWS[name]).save_pretrained(tmp_path)
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
    model_of(ROWS["ept"]).save_pretrained(tmp_path)
    saved = adapter.read_adapter(tmp_path)
    one, two = (
        EPTModel.from_pretrained(saved, BY_NAME["Llama"].build("CAUSAL_LM")) for _ in range(2)
    )
    before = two.prompt.reconstruct().detach().clone()
    with torch.no_grad():
        for parameter in one.prompt.parameters():
            parameter.zero_()
    assert torch.equal(two.prompt.reconstruct(), before)
