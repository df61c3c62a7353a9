"""The benchmarks of training steps, inference and cold start: what is wrong is not timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench import (
    cold_child,
    models,
    parity,
    test_cold_start,
    test_inference,
    test_serving,
    test_training_step,
)
from bench.models import BACKBONE, DEPT, PEFT, Backbone, Batch, Method
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

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.model = models.make_model(backbone, torch.float32, CPU)
        self.exact = models.exact_copy(self.model)
        self.batch = models.make_batch(backbone, models.shape_of(backbone, "20-40"), CPU)

    def checked(self, name: str) -> tuple[Method, Callable[[], float]]:
        """A method, and a function for its error by what is allowed."""
        method = models.make(name, self.model, self.backbone, self.batch)
        expected = models.expected_of(method, self.model, self.exact, self.batch)
        assert all(bool(tensor.any()) for tensor in expected.exact.values())

        def error() -> float:
            found = models.results(method, self.model, self.batch)
            return parity.compare(found, expected)[0]

        return method, error


# Methods share a model in the suite too.
setup = functools.cache(Setup)


@pytest.mark.parametrize("backbone", models.QUICK, ids=lambda b: b.name)
@pytest.mark.parametrize("name", ["eager", PEFT, DEPT, BACKBONE])
def test_every_method_is_checked(backbone: Backbone, name: str) -> None:
    """It passes, and fails with another position's offset."""
    method, error = setup(backbone).checked(name)
    assert error() <= 1
    if "offset_a" in method.trained:
        offset = method.trained["offset_a"]
        offset.data.copy_(offset.roll(1, 0))
        assert error() > 100


def test_an_offset_by_column_fails_behind_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_left = Setup(T5)
    ids, mask, labels = on_the_left.batch
    on_the_left.batch = Batch(ids.flip(1), mask.flip(1), labels)
    assert not mask.all()
    _, error = on_the_left.checked("eager")
    assert error() <= 1
    forward = FusedEPTPrompt.forward

    def by_column(self: FusedEPTPrompt, input_ids: Tensor, attention_mask: Tensor) -> EPTOutput:
        right = forward(self, input_ids, attention_mask=attention_mask)
        return right._replace(inputs_embeds=forward(self, input_ids).inputs_embeds)

    monkeypatch.setattr(FusedEPTPrompt, "forward", by_column)
    assert error() > 100


@pytest.mark.parametrize(("backbone", "name"), [(GPT2, "eager"), (LLAMA, DEPT)])
def test_a_label_for_the_prompt_fails(
    backbone: Backbone, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, error = setup(backbone).checked(name)

    def unmasked(backbone: Backbone, batch: Batch, before: int, after: int = 0) -> Tensor:
        return F.pad(F.pad(batch.labels, (before, 0), value=1), (0, after), value=-100)

    monkeypatch.setattr(models, "_labels", unmasked)
    assert error() > 100


@pytest.mark.parametrize("backbone", [T5, LLAMA], ids=lambda b: b.name)
def test_what_is_exact_is_float64_all_the_way(backbone: Backbone) -> None:
    """The gradient is the slope of the loss to seven digits."""
    model, exact, batch = (getattr(setup(backbone), n) for n in ("model", "exact", "batch"))
    method = models.make(PEFT, model, backbone, batch)
    expected = models.expected_of(method, model, exact, batch)
    prompt = method.trained["short_prompt"].detach().double()
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(prompt.shape, generator=g, dtype=torch.float64) * prompt.std()

    def loss(step: float) -> float:
        trained = {"short_prompt": (prompt + step * direction).requires_grad_()}
        with models.Doubles():
            found, _ = models._by_definition(method, trained, exact, batch, 4)
            return found["loss"].item()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert slope == pytest.approx((expected.exact["short_prompt"] * direction).sum().item(), 1e-7)
    assert expected.exact["loss"].item() == loss(0)


def test_the_backbone_sees_what_each_method_says() -> None:
    model, batch = setup(GPT2).model, setup(GPT2).batch
    calls: list[dict[str, Tensor]] = []
    hook = model.register_forward_pre_hook(
        lambda model, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    real = int(batch.attention_mask.sum())
    rows = len(batch.input_ids)
    for name, before, length in [
        ("eager", 20, 40),
        (DEPT, 20, models.MAX_LENGTH),
        (PEFT, models.PEFT_TOKENS, 40),
        (BACKBONE, 20, 40),
    ]:
        models.make(name, model, GPT2, batch).loss(batch)
        seen = calls.pop()
        assert seen["inputs_embeds"].shape[:2] == (rows, before + length), name
        assert seen["attention_mask"].sum() == rows * before + real, name
        assert (seen["labels"] != -100).sum() == real, name
    hook.remove()


@pytest.mark.parametrize("backbone", [*models.ON_CPU, *models.QUICK], ids=lambda b: b.name)
def test_everyone_has_the_budget_of_the_plain_prompt(backbone: Backbone) -> None:
    budget = models.PEFT_TOKENS * backbone.hidden_size
    one_rank = models.MAX_LENGTH + backbone.hidden_size
    expected = {"eager": models.our_config(backbone), DEPT: models.dept_config(backbone)}
    counts = {name: config.num_parameters for name, config in expected.items()}
    assert all(budget - one_rank < count <= budget for count in counts.values())
    if backbone in models.QUICK:
        counts[PEFT] = budget
        for name, count in counts.items():
            method, _ = setup(backbone).checked(name)
            assert sum(tensor.numel() for tensor in method.trained.values()) == count


@pytest.mark.parametrize("name", ["eager", PEFT, DEPT, BACKBONE])
def test_a_step_trains_and_leaves_the_values_as_they_are(name: str) -> None:
    model, batch = setup(T5).model, setup(T5).batch
    method = models.make(name, model, T5, batch)
    before = {n: tensor.detach().clone() for n, tensor in method.trained.items()}
    frozen = [tensor.clone() for tensor in model.parameters()]
    work = models.step(method, batch)
    moments: list[bool] = []
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: moments.extend(s["exp_avg"].any() for s in optimizer.state.values())
    )
    first, second = (work.call(work.prepare(i)).item() for i in range(2))
    hook.remove()
    assert first == second
    assert len(moments) == (2 * len(method.trained) if method.groups else 0)
    assert all(moments)
    for n, tensor in method.trained.items():
        assert tensor.grad is None, n
        assert torch.equal(tensor, before[n]), n
    assert all(map(torch.equal, frozen, model.parameters()))


def test_training_steps_leave_rows(run: Run) -> None:
    for case in test_training_step.cases(run)[:4]:
        test_training_step.test_training_step(case, run, Benchmark())
    rows = [row for row in read(run.settings.folder) if row.suite == "training_step"]
    assert [row.peer for row in rows] == ["eager", PEFT, DEPT, BACKBONE]
    tokens = setup(T5).batch.attention_mask.sum().item()
    for row in rows:
        assert row.ours == "eager"
        assert row.ours_to_peer_low <= row.ours_to_peer <= row.ours_to_peer_high
        assert row.peak_mb > 0
        assert row.tokens_per_s * row.p50_ms / 1e3 == pytest.approx(tokens, 1e-3)
        assert 0 <= row.error <= 1


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


# Mistakes of our code, as patches of what a suite calls


def _loss(name: str, *args: Any, right: Any = models.make) -> Method:
    method = right(name, *args)
    return replace(method, loss=lambda batch: method.loss(batch) * 1.001)


def _of_another_task(
    self: FoldedEPTPrompt, *args: Any, right: Any = FoldedEPTPrompt.forward, **options: Any
) -> EPTOutput:
    """Of a single prompt: padding gets the offset."""
    task_ids = options.pop("task_ids")
    if task_ids is None:
        return right(self, *args)
    return right(self, *args, **options, task_ids=1 - task_ids)


def _of_another_row(self: BankPrompt, *args: Any, right: Any = BankPrompt.forward) -> EPTOutput:
    return right(self, *args[:-1], 1 - args[-1])


def _mixed_up(self: PrefixCache, cache: Any, rows: Tensor) -> None:
    for index, (keys, values) in enumerate(self.layers):
        own, other = (t.expand(len(rows), -1, -1, -1) for t in (keys, values.flip(2)))
        cache.update(own, other, index)


@pytest.mark.parametrize(
    ("suite", "operation", "owner", "name", "wrong"),
    [
        (test_training_step, "t5-tiny", models, "make", _loss),
        (test_inference, test_inference.FOLDED, FoldedEPTPrompt, "forward", _of_another_task),
        (test_inference, test_inference.MIXED, FoldedEPTPrompt, "forward", _of_another_task),
        (test_serving, test_serving.BANK, BankPrompt, "forward", _of_another_row),
        (test_serving, test_serving.PREFIX, PrefixCache, "write", _mixed_up),
        (
            test_cold_start,
            test_cold_start.FIRST_CALL,
            test_cold_start,
            "child",
            lambda *arguments: {"seconds": 1.0, "error": 7.0},
        ),
    ],
    ids=["step", "folded", "mixed", "bank", "prefix", "cold start"],
)
def test_what_is_wrong_is_not_timed(
    run: Run,
    suite: Any,
    operation: str,
    owner: Any,
    name: str,
    wrong: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    case = next(c for c in suite.cases(run) if c.id.startswith(operation.replace(" ", "-")))
    with pytest.raises(pytest.fail.Exception, match=r"parity: eager is not timed: .* is off by"):
        getattr(suite, suite.__name__.rpartition(".")[2])(case, run, Benchmark())
    assert not run.book.rows


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
