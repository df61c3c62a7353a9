"""A training step of the wrapped model: precisions, accumulation, recomputation, one graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ept_fast.transformers import checkpointing
from tests.architectures import build, in_float64
from tests.distributed.checks import (
    Gradients,
    assert_close,
    assert_equal,
    assert_float32,
    assert_within,
    cells,
    relative_error,
    runs_of_layers,
)
from tests.distributed.tasks import (
    LENGTH,
    OVER_TOKENS,
    TASKS,
    batch_of,
    count_of,
    gradients,
    gradients_of,
    loss_of,
    make_backbone,
    make_model,
    part,
    trained,
    values_of,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Dynamo's own, where it traces an autograd Function.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def exact() -> Iterator[Any]:
    """The gradients of a task by the definition, all of it in float64."""
    found: dict[str, Gradients] = {}

    def of(task: str) -> Gradients:
        if task not in found:
            model = make_model(task).double()
            model.prompt.backend = "reference"
            with in_float64():
                found[task] = gradients_of(task, model, batch_of(task))
        return found[task]

    return of


# Precision


@pytest.mark.parametrize("task", cells("float32"))
def test_float32(task: str, exact: Any) -> None:
    model = make_model(task)
    got = gradients_of(task, model, batch_of(task))
    assert_float32(model)
    assert_within(got, exact(task), torch.float32)
    model.prompt.backend = "reference"
    definition = gradients_of(task, model, batch_of(task))
    assert relative_error(got, exact(task)) <= 2 * relative_error(definition, exact(task))


@pytest.mark.parametrize("task", cells("bfloat16"))
def test_bfloat16_backbone(task: str, exact: Any) -> None:
    backbone = make_backbone(task, torch.bfloat16)
    model = make_model(task, backbone)
    assert {p.dtype for p in backbone.parameters() if not p.requires_grad} == {torch.bfloat16}
    got = gradients_of(task, model, batch_of(task))
    assert_float32(model)
    assert_within(got, exact(task), torch.bfloat16)
    model.prompt.backend = "reference"
    definition = gradients_of(task, model, batch_of(task))
    assert relative_error(got, exact(task)) <= 2 * relative_error(definition, exact(task))


@pytest.mark.parametrize("task", cells("bfloat16"))
def test_bfloat16_autocast(task: str, exact: Any) -> None:
    model = make_model(task)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(task, model, batch_of(task))
    loss.backward()
    assert_float32(model)
    assert_within(gradients(model), exact(task), torch.bfloat16)
    in_float32 = gradients_of(task, model, batch_of(task))
    assert relative_error(in_float32, exact(task)) < torch.finfo(torch.bfloat16).eps / 100


@pytest.mark.parametrize("task", cells("float16 autocast"))
def test_float16_autocast(task: str, exact: Any) -> None:
    """The scaler's gradients are the true ones, and it leaves out a step that overflows."""
    model = make_model(task)
    before = values_of(model)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(task, model, batch_of(task))
        scaler.scale(loss * factor).backward()
        assert_float32(model)
        scaler.unscale_(optimizer)

    step(1.0)
    assert_within(gradients(model), exact(task), torch.float16)
    scaler.step(optimizer)
    scaler.update()
    moved = values_of(model)
    for name, parameter in moved.items():
        assert not torch.equal(parameter, before[name]), name
    step(float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert_equal(values_of(model), moved)


# Accumulation and recomputation


@pytest.mark.parametrize("task", cells("gradient accumulation"))
def test_gradient_accumulation(task: str) -> None:
    """Two batches of four give the gradients of one of eight; tokens count over both."""
    model, batch = make_model(task), batch_of(task)
    halves = [part(batch, slice(0, 4)), part(batch, slice(4, 8))]
    whole = gradients_of(task, model, batch)
    model.zero_grad()
    if task in OVER_TOKENS:
        assert count_of(task, halves[0]) != count_of(task, halves[1])
        items = torch.tensor(count_of(task, batch))
        for half in halves:
            model(**half, num_items_in_batch=items).loss.backward()
    else:
        for half in halves:
            (loss_of(task, model, half) / 2).backward()
    assert_close(gradients(model), whole)


@pytest.mark.parametrize(
    ("reentrant", "task"),
    [
        pytest.param(reentrant, *p.values, marks=p.marks)
        for reentrant, row in ((True, "reentrant"), (False, "not reentrant"))
        for p in cells(f"checkpointing, {row}")
    ],
)
def test_checkpointing(task: str, reentrant: bool) -> None:
    """The same bits, each layer run twice, the backbone's dropout off in both."""
    model, batch = make_model(task), batch_of(task)
    names = [n for n in vars(model.config) if "drop" in n and vars(model.config)[n]]
    assert names, "a config without dropout shows nothing"
    expected = gradients_of(task, model, batch)
    runs = runs_of_layers(model)
    loss_of(task, model, batch).backward()
    once = sorted(runs)
    assert len(set(once)) == len(once) >= 2
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for _ in range(2):
        runs.clear()
        got = gradients_of(task, model, batch)
        assert sorted(runs) == sorted(2 * once)
        if reentrant and task == "SEQ_2_SEQ_LM":
            # The encoder's gradients come from the decoder's layers in another order.
            assert_close(got, expected)
        else:
            assert_equal(got, expected)
    model.eval()
    runs.clear()
    loss_of(task, model, batch).backward()
    assert sorted(runs) == once
    model.gradient_checkpointing_disable()
    model.train()
    runs.clear()
    assert_equal(gradients_of(task, model, batch), expected)
    assert sorted(runs) == once


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("name", "task"), [("OPT", "CAUSAL_LM"), ("BART", "SEQ_2_SEQ_LM")])
def test_layers_that_drop_out_by_themselves(name: str, task: str, reentrant: bool) -> None:
    """Their own flag, which has to be on for the recomputation, decides about both."""
    model, batch = make_model(task, build(name, task)), batch_of(task)
    expected = gradients_of(task, model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(gradients_of(task, model, batch), expected)


def test_every_second_layer_is_recomputed() -> None:
    model, batch = make_model("CAUSAL_LM"), batch_of("CAUSAL_LM")
    expected = gradients_of("CAUSAL_LM", model, batch)
    model.activation_checkpointing_enable(every_n_layers=2)
    runs = runs_of_layers(model)
    assert_equal(gradients_of("CAUSAL_LM", model, batch), expected)
    assert sorted(runs) == ["model.layers.0", "model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_offloaded_activations(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer keeps goes through the CPU and comes back as it was."""
    kept: list[torch.Size] = []

    class Noted(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: kept.append(tensor.shape) or pack(tensor)

    monkeypatch.setattr(checkpointing, "save_on_cpu", Noted)
    model, batch = make_model("CAUSAL_LM"), batch_of("CAUSAL_LM")
    expected = gradients_of("CAUSAL_LM", model, batch)
    model.activation_checkpointing_enable({"use_reentrant": reentrant}, offload=True)
    assert_equal(gradients_of("CAUSAL_LM", model, batch), expected)
    hidden = (8, 4 + LENGTH, model.config.hidden_size)
    assert kept.count(torch.Size(hidden)) >= 2


# One graph


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_layer(task: str) -> Any:
    """The task's model with one layer, as tracing takes time by layers."""
    names = ("num_layers", "num_decoder_layers") if task == "SEQ_2_SEQ_LM" else None
    changes = dict.fromkeys(names or ("num_hidden_layers",), 1)
    return make_model(task, make_backbone(task, **changes))


def assert_one_graph(task: str, backend: str) -> None:
    """Prompt and model are one graph, which serves other values and other weights as well."""
    model = one_layer(task)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    for seed in range(3):
        batch = batch_of(task, seed=seed)
        expected = gradients_of(task, model, batch)
        model.zero_grad()
        with torch.compiler.set_stance("default" if seed == 0 else "fail_on_recompile"):
            loss_of(task, compiled, batch).backward()
        assert_close(gradients(model), expected)
        optimizer.step()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("task", cells("torch.compile", slow=tuple({*TASKS} - {"CAUSAL_LM"})))
def test_compile(task: str) -> None:
    assert_one_graph(task, "aot_eager")


# Of a library that the compiler imports.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("task", cells("torch.compile", ("CAUSAL_LM",)))
def test_compile_to_code(task: str) -> None:
    assert_one_graph(task, "inductor")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_two_adapters() -> None:
    """Of another alpha and temperature, by turns, each compiled once, with sizes as inputs."""
    task = "SEQ_CLS"
    model = one_layer(task)
    config = replace(model.prompt.config, alpha=3, temperature=0.5)
    model.add_adapter("other", config, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.prompts["other"].offset_a.fill_(0.3)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, name in enumerate(("other", "default") * 2):
        model.set_adapter(name)
        batch = batch_of(task, seed=number)
        expected = gradients_of(task, model, batch)
        model.zero_grad()
        with torch.compiler.set_stance("default" if number < 2 else "fail_on_recompile"):
            loss_of(task, compiled, batch).backward()
        assert_close(gradients(model), expected)


# Of transformers, which notes the outputs that it captures in a global variable.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", TASKS)
def test_export(task: str, strict: bool) -> None:
    """A whole model as a program for every number of rows and every length, 1 too."""
    model = one_layer(task).eval()

    def inputs(rows: int, length: int) -> dict[str, torch.Tensor]:
        batch = batch_of(task, rows)
        given = {name: batch[name][:, -length:] for name in ("input_ids", "attention_mask")}
        return {**given, "labels": batch["labels"]} if task == "SEQ_2_SEQ_LM" else given

    free = torch.export.Dim.DYNAMIC
    sizes = {"input_ids": {0: free, 1: free}, "attention_mask": {0: free, 1: free}}
    if task == "SEQ_2_SEQ_LM":
        sizes["labels"] = {0: free}
    example = inputs(8, LENGTH)
    program = torch.export.export(model, (), example, dynamic_shapes=sizes, strict=strict).module()
    name = "last_hidden_state" if task == "FEATURE_EXTRACTION" else "logits"
    for size in ((8, LENGTH), (3, 7), (1, 4), (3, 1), (1, 1)):
        call = inputs(*size)
        with torch.no_grad():
            torch.testing.assert_close(program(**call)[name], model(**call)[name])
