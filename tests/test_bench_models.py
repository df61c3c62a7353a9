"""The benchmarks of training steps, inference and cold start: what is wrong is not timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import (
    cold_child,
    models,
    parity,
    peers,
    test_cold_start,
    test_inference,
    test_serving,
    test_training_step,
)
from bench.inputs import make_inputs
from bench.models import BACKBONE, DEPT, PEFT, Backbone, Batch, Method
from bench.parity import Expected
from bench.rows import read
from bench.run import Run
from ept_fast import EPTOutput, FoldedEPTPrompt, FusedEPTPrompt
from ept_fast.transformers.bank import BankPrompt
from ept_fast.transformers.prefix_cache import PrefixCache
from tests.test_bench import Benchmark, run

__all__ = ["run"]

CPU = torch.device("cpu")
T5, GPT2, LLAMA = models.QUICK

pytestmark = [
    # PEFT asks a model of transformers for an attribute by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.usefixtures("one_thread"),
]


class Setup:
    """A tiny backbone with a batch of sentences."""

    def __init__(self, backbone: models.Backbone) -> None:
        self.backbone = backbone
        self.model = models.make_model(backbone, torch.float32, CPU)
        self.batch = models.make_batch(backbone, models.shape_of(backbone, "20-40"), CPU)

    def method(self, name: str) -> Method:
        return models.make(name, self.model, self.backbone, self.batch)

    def expected(self, method: Method) -> Expected:
        return models.expected_of(method, self.model, models.exact_copy(self.model), self.batch)

    def error(self, method: Method, expected: Expected) -> float:
        """By what is allowed."""
        found = models.results(method, method.loss, self.model, self.batch)
        return parity.compare(found, expected)[0]


each_backbone = pytest.mark.parametrize("backbone", models.QUICK, ids=lambda b: b.name)


@each_backbone
@pytest.mark.parametrize("name", ["eager", PEFT, DEPT, BACKBONE])
def test_every_method_passes_its_check(backbone: Backbone, name: str) -> None:
    setup = Setup(backbone)
    method = setup.method(name)
    expected = setup.expected(method)
    assert setup.error(method, expected) <= 1
    assert all(bool(tensor.any()) for tensor in expected.exact.values())


@each_backbone
@pytest.mark.parametrize("name", ["eager", DEPT])
def test_an_offset_of_another_position_fails(backbone: Backbone, name: str) -> None:
    setup = Setup(backbone)
    method = setup.method(name)
    expected = setup.expected(method)
    offset = method.trained["offset_a"]
    offset.data.copy_(offset.roll(1, 0))
    assert setup.error(method, expected) > 100


def test_an_offset_by_column_fails_behind_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(T5)
    ids, mask, labels = setup.batch
    setup.batch = Batch(ids.flip(1), mask.flip(1), labels)
    assert not setup.batch.attention_mask.all()
    method = setup.method("eager")
    expected = setup.expected(method)
    assert setup.error(method, expected) <= 1
    forward = FusedEPTPrompt.forward

    def by_column(self: FusedEPTPrompt, input_ids: Tensor, attention_mask: Tensor) -> EPTOutput:
        right = forward(self, input_ids, attention_mask=attention_mask)
        return right._replace(inputs_embeds=forward(self, input_ids).inputs_embeds)

    monkeypatch.setattr(FusedEPTPrompt, "forward", by_column)
    assert setup.error(method, expected) > 100


@pytest.mark.parametrize("backbone", [GPT2, LLAMA], ids=lambda b: b.name)
@pytest.mark.parametrize("name", ["eager", DEPT])
def test_a_label_for_the_prompt_fails(
    backbone: Backbone, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(backbone)
    method = setup.method(name)
    expected = setup.expected(method)

    def unmasked(backbone: Backbone, batch: Batch, before: int, after: int = 0) -> Tensor:
        return F.pad(F.pad(batch.labels, (before, 0), value=1), (0, after), value=-100)

    monkeypatch.setattr(models, "_labels", unmasked)
    assert setup.error(method, expected) > 100


@pytest.mark.parametrize("backbone", [T5, LLAMA], ids=lambda b: b.name)
def test_what_is_exact_is_float64_all_the_way(backbone: Backbone) -> None:
    setup = Setup(backbone)
    method = setup.method(PEFT)
    exact = models.exact_copy(setup.model)
    expected = models.expected_of(method, setup.model, exact, setup.batch)
    prompt = method.trained["short_prompt"].detach().double()
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(prompt.shape, generator=g, dtype=torch.float64) * prompt.std()

    def loss(step: float) -> float:
        trained = {"short_prompt": (prompt + step * direction).requires_grad_()}
        with models.Doubles():
            found, _ = models._by_definition(method, trained, exact, setup.batch, 4)
            return found["loss"].item()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert slope == pytest.approx((expected.exact["short_prompt"] * direction).sum().item(), 1e-7)
    assert expected.exact["loss"].item() == loss(0)
    with models.Doubles():
        assert prompt.float().dtype == prompt.to(torch.float32).dtype == torch.float64
        assert prompt.float().float().softmax(-1, dtype=torch.float32).dtype == torch.float64


def test_the_backbone_sees_what_each_method_says() -> None:
    setup = Setup(GPT2)
    calls: list[dict[str, Tensor]] = []
    hook = setup.model.register_forward_pre_hook(
        lambda model, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    real = int(setup.batch.attention_mask.sum())
    rows = len(setup.batch.input_ids)
    for name, before, length in [
        ("eager", 20, 40),
        (DEPT, 20, models.MAX_LENGTH),
        (PEFT, models.PEFT_TOKENS, 40),
        (BACKBONE, 20, 40),
    ]:
        setup.method(name).loss(setup.batch)
        seen = calls.pop()
        assert seen["inputs_embeds"].shape[:2] == (rows, before + length), name
        assert seen["attention_mask"].sum() == rows * before + real, name
        assert (seen["labels"] != -100).sum() == real, name
    hook.remove()


@pytest.mark.parametrize("backbone", [*models.ON_CPU, *models.QUICK], ids=lambda b: b.name)
def test_everyone_has_the_budget_of_the_plain_prompt(backbone: Backbone) -> None:
    d = backbone.hidden_size
    budget = models.PEFT_TOKENS * d
    ours, dept = models.our_config(backbone), models.dept_config(backbone)
    one_rank = models.MAX_LENGTH + d
    assert budget - one_rank < ours.num_parameters <= budget
    assert budget - one_rank < dept.num_parameters <= budget
    if backbone in models.QUICK:
        setup = Setup(backbone)
        counts = {
            name: sum(tensor.numel() for tensor in setup.method(name).trained.values())
            for name in ("eager", DEPT, PEFT)
        }
        assert counts == {"eager": ours.num_parameters, DEPT: dept.num_parameters, PEFT: budget}


@pytest.mark.parametrize("name", ["eager", PEFT, DEPT, BACKBONE])
def test_a_step_trains_and_leaves_the_values_as_they_are(name: str) -> None:
    setup = Setup(T5)
    method = setup.method(name)
    before = {n: tensor.detach().clone() for n, tensor in method.trained.items()}
    frozen = [tensor.clone() for tensor in setup.model.parameters()]
    work = models.step(method, method.loss, setup.batch)
    optimizer: Any = None
    if method.groups:
        (optimizer,) = (
            cell.cell_contents
            for cell in work.call.__closure__ or ()
            if isinstance(cell.cell_contents, torch.optim.AdamW)
        )
    first, second = (work.call(work.prepare(i)).item() for i in range(2))
    assert first == second
    for n, tensor in method.trained.items():
        assert tensor.grad is None, n
        assert torch.equal(tensor, before[n]), n
        if optimizer is not None:
            assert optimizer.state[tensor]["exp_avg"].any(), n
    assert all(map(torch.equal, frozen, setup.model.parameters()))


def test_training_steps_leave_rows(run: Run) -> None:
    wanted = test_training_step.cases(run)[:4]
    for case in wanted:
        test_training_step.test_training_step(case, run, Benchmark())
    rows = [row for row in read(run.settings.folder) if row.suite == "training_step"]
    assert [row.peer for row in rows] == ["eager", PEFT, DEPT, BACKBONE]
    tokens = Setup(T5).batch.attention_mask.sum().item()
    for row in rows:
        assert row.ours == "eager"
        assert row.ours_to_peer_low <= row.ours_to_peer <= row.ours_to_peer_high
        assert row.peak_mb > 0
        assert row.tokens_per_s * row.p50_ms / 1e3 == pytest.approx(tokens, 1e-3)
        assert 0 <= row.error <= 1


def test_a_wrong_step_is_not_timed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = models.make

    def wrong(name: str, *args: Any) -> Method:
        method = right(name, *args)
        if name == DEPT:
            return replace(method, loss=lambda batch: method.loss(batch) * 1.001)
        return method

    monkeypatch.setattr(models, "make", wrong)
    (case,) = (c for c in test_training_step.cases(run) if c.id == "t5-tiny-20-40-eager-dept")
    with pytest.raises(pytest.fail.Exception, match=r"parity: dept is not timed: \w+ is off by"):
        test_training_step.test_training_step(case, run, Benchmark())
    assert not run.book.rows


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["inference", "serving"])
def test_inference_leaves_rows(suite: str, run: Run) -> None:
    module: Any = {"inference": test_inference, "serving": test_serving}[suite]
    wanted = module.cases(run)
    for case in wanted:
        getattr(module, f"test_{suite}")(case, run, Benchmark())
    rows = [row for row in read(run.settings.folder) if row.suite == suite]
    assert [(r.operation, r.peer) for r in rows] == [(c.operation, c.peer) for c in wanted]
    for row in rows:
        assert 0 <= row.error <= 1
        assert row.ours_to_peer is not None


@pytest.mark.parametrize("at", [0, 1], ids=["folded", "mixed"])
def test_a_wrong_server_is_not_timed(run: Run, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = [case for case in test_inference.cases(run) if case.peer == peers.REFERENCE][at]
    forward = FoldedEPTPrompt.forward

    def wrong(self: FoldedEPTPrompt, *args: Any, **options: Any) -> EPTOutput:
        task_ids = options.pop("task_ids")
        if task_ids is not None:
            return forward(self, *args, **options, task_ids=1 - task_ids)
        return forward(self, *args)  # padding gets the offset

    monkeypatch.setattr(FoldedEPTPrompt, "forward", wrong)
    with pytest.raises(pytest.fail.Exception, match="parity: eager is not timed: inputs_embeds"):
        test_inference.test_inference(case, run, Benchmark())
    assert not run.book.rows


@pytest.mark.parametrize("operation", [test_serving.BANK, test_serving.PREFIX])
def test_wrong_serving_is_not_timed(
    run: Run, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row with another row's adapter; a prefix with its positions' values mixed up."""
    case = next(case for case in test_serving.cases(run) if case.operation == operation)
    forward = BankPrompt.forward

    def another(self: BankPrompt, *args: Any) -> EPTOutput:
        return forward(self, *args[:-1], 1 - args[-1])

    def stale(self: PrefixCache, cache: Any, rows: Tensor) -> None:
        for index, (keys, values) in enumerate(self.layers):
            own, other = (t.expand(len(rows), -1, -1, -1) for t in (keys, values.flip(2)))
            cache.update(own, other, index)

    monkeypatch.setattr(BankPrompt, "forward", another)
    monkeypatch.setattr(PrefixCache, "write", stale)
    with pytest.raises(pytest.fail.Exception, match="parity: eager is not timed: output is off"):
        test_serving.test_serving(case, run, Benchmark())
    assert not run.book.rows


def test_rows_served_task_by_task_are_those_of_the_mixed_batch(run: Run) -> None:
    mixed = [case for case in test_inference.cases(run) if case.operation == test_inference.MIXED]
    (inputs,) = make_inputs(mixed[0].shape, torch.float32, CPU, 1)
    inputs = replace(test_inference._with_mask(inputs), task_ids=torch.tensor([1, 0, 1, 1, 0]))
    prompt = test_inference.make_prompt(mixed[0].shape, inputs, backend=None)
    found = {}
    for case in mixed:
        served = test_inference.make(case, prompt, [inputs])
        found[case.peer] = served.embeds_of(served.call(inputs))
    assert torch.equal(found["eager"], found[test_inference.TASK_BY_TASK])
    assert not torch.equal(found["eager"], found[test_inference.ONE_TASK])


def test_a_cold_start_leaves_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def fake(what: str, *arguments: Any) -> dict[str, float]:
        asked.append((what, *arguments))
        if what != test_cold_start.FIRST_CALL:
            return {"seconds": 1.0 if arguments[0] == "ept_fast" else 4.0}
        return {
            "seconds": 1.0 if arguments[0] == "eager" else 4.0,
            **({"error": 0.25 if arguments[0] == "eager" else 0.5} if arguments[-1] else {}),
        }

    monkeypatch.setattr(test_cold_start, "child", fake)
    monkeypatch.setattr(run, "settings", replace(run.settings, quick=False, compiled=True))
    for case in test_cold_start.cases(run):
        test_cold_start.test_cold_start(case, run, Benchmark())
    rows = {(row.operation, row.peer): row for row in read(run.settings.folder)}
    assert {key: row.ours_to_peer for key, row in rows.items()} == {
        ("import", "ept_fast"): 1,
        ("import", "peft"): 0.25,
        ("first call", "eager"): 1,
        ("first call", "reference"): 0.25,
        ("compile", "eager"): 1,
        ("compile", "reference-compiled"): 0.25,
        ("compile", "empty function"): 0.25,
    }
    assert [row.rounds for row in rows.values()] == [5, 5, 5, 5, 3, 3, 3]
    assert rows["first call", "reference"].p50_ms == 4000
    assert [row.error for row in rows.values()] == [None, None, 0.25, 0.5, 0.25, 0.5, None]
    of_reference = [a for a in asked if a[1] == "reference"]
    compiled = [a[5] for a in of_reference]
    assert compiled == [False] * 5 + [True] * 3
    checked = [a[6] for a in of_reference]
    assert checked == [True, *[False] * 4, True, *[False] * 2]


def test_a_wrong_cold_start_leaves_no_row(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_cold_start, "child", lambda *a: {"seconds": 1.0, "error": 7.0})
    case = next(c for c in test_cold_start.cases(run) if c.operation == test_cold_start.FIRST_CALL)
    with pytest.raises(pytest.fail.Exception, match="parity: eager is off by 7 times"):
        test_cold_start.test_cold_start(case, run, Benchmark())
    assert not run.book.rows


@pytest.mark.parametrize("peer", ["eager", "reference"])
def test_a_first_call_is_measured_and_checked(peer: str) -> None:
    found = cold_child.seconds_of_first_call(peer, "tiny", "float32", "cpu", False, True)
    assert found["seconds"] > 0
    assert found["error"] <= 1


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"nonsense \(1,\): [\s\S]*KeyError"):
        test_cold_start.child("nonsense", 1)


@pytest.mark.parametrize(
    "suite",
    [test_training_step, test_inference, test_serving, test_cold_start],
    ids=lambda suite: suite.__name__,
)
def test_names_of_rows_differ(run: Run, suite: Any) -> None:
    run.settings = replace(run.settings, quick=False, compiled=True)
    names = [case.id for case in suite.cases(run)]
    assert len(set(names)) == len(names)
    run.settings = replace(run.settings, compiled=False)
    assert {name for name in names if "compile" not in name} == {c.id for c in suite.cases(run)}
