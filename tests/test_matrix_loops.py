"""The wrapped model in loops of others: transformers' Trainer and accelerate."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator

from ept_fast import EPTModel
from ept_fast.transformers.adapter import DESCRIPTION
from tests import architectures
from tests.distributed import trainers
from tests.distributed.checks import assert_close, assert_equal, cells, runs_of_layers
from tests.distributed.tasks import (
    WITH_LOSS,
    batch_of,
    frozen_of,
    loss_of,
    make_backbone,
    make_model,
    trained,
    values_of,
)
from tests.distributed.trainers import Rows, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_accelerate")


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    with trainers.fresh_accelerate():
        yield


@pytest.mark.parametrize("task", cells("Trainer", WITH_LOSS))
def test_trainer(task: str, tmp_path: Path) -> None:
    """It trains, saves adapters alone, evaluates, and a resumed run ends with the same bits."""
    model = make_model(task)
    start, frozen = values_of(model), frozen_of(model)
    trainer = make_trainer(task, model, tmp_path)
    trainer.train()
    end = values_of(model)
    for name, value in end.items():
        assert not torch.equal(value, start[name]), name
    assert_equal(frozen_of(model), frozen)

    saved = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert set(saved) == {*end, DESCRIPTION}
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = make_model(task)
    make_trainer(task, resumed, tmp_path).train(resume_from_checkpoint=True)
    assert_equal(values_of(resumed), end)

    batch = batch_of(task, 8, seed=2)
    found = trainer.predict(Rows(batch))
    with torch.no_grad():
        expected = model.eval()(**batch)
    assert found.metrics["test_loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    assert np.array_equal(found.label_ids, batch["labels"])
    logits = found.predictions[0] if task == "SEQ_2_SEQ_LM" else found.predictions
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits)


class Logits(transformers.TrainerCallback):
    """Those of a batch, at every checkpoint; of all evaluations, the first is the best."""

    def __init__(self, task: str) -> None:
        self.batch = batch_of(task, 4, seed=3)
        self.found: dict[int, torch.Tensor] = {}

    def of(self, model: Any) -> torch.Tensor:
        mode = model.training
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(**self.batch).logits
        model.train(mode)
        return logits

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["metrics"]["eval_loss"] = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found[state.global_step] = self.of(kwargs["model"])


LINEAR = {"labels": ("a", "b", "c"), "pooling": "last", "head_dropout": 0.25}
SAVED = [
    pytest.param(*p.values, choices, marks=p.marks)
    for choices, tasks in (({}, WITH_LOSS), (LINEAR, ("SEQ_CLS",)))
    for p in cells("Trainer", tasks)
]


@pytest.mark.parametrize(("task", "choices"), SAVED)
def test_what_the_trainer_saves_loads(task: str, choices: dict[str, Any], tmp_path: Path) -> None:
    """Every checkpoint and ``save_model``, also of the best weights, to the logits' last bit."""
    backbone = architectures.build("BERT", task, bare=True) if choices else make_backbone(task)
    model = make_model(task, backbone, **choices)
    logits = Logits(task)
    trainer = make_trainer(
        task,
        model,
        tmp_path,
        callbacks=[logits],
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    trainer.save_model(tmp_path / "end")
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    assert sorted(logits.found) == [2, 4]
    assert not torch.equal(logits.found[2], logits.found[4])
    backbone, described = model.unload(), model.description
    for name, step in (("checkpoint-2", 2), ("checkpoint-4", 4), ("end", 2)):
        loaded = EPTModel.from_pretrained(tmp_path / name, backbone)
        assert type(loaded) is type(model)
        assert loaded.description == described
        assert torch.equal(logits.of(loaded), logits.found[step]), name
        backbone = loaded.unload()


@pytest.mark.parametrize("task", cells("Trainer", ("CAUSAL_LM",)))
def test_a_checkpoint_without_a_description_resumes(task: str, tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    model = make_model(task)
    make_trainer(task, model, tmp_path).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    del state[DESCRIPTION]
    safetensors.torch.save_file(state, path, {"format": "pt"})
    resumed = make_model(task)
    make_trainer(task, resumed, tmp_path).train(resume_from_checkpoint=True)
    assert_equal(values_of(resumed), values_of(model))


# Its name until the next version of transformers, and that of its options.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("task", cells("Trainer", ("CAUSAL_LM", "SEQ_CLS")))
def test_trainer_recomputes(task: str, reentrant: bool, tmp_path: Path) -> None:
    """``gradient_checkpointing`` among its arguments is heard, and changes no bit."""
    ends, runs = [], []
    for recompute in (False, True):
        model = make_model(task)
        runs.append(runs_of_layers(model))
        choices = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trainer = make_trainer(
            task, model, tmp_path, gradient_checkpointing=recompute, save_strategy="no", **choices
        )
        trainer.train()
        ends.append(values_of(model))
    assert_equal(*ends)
    assert len(runs[1]) == 2 * len(runs[0]) > 0


@pytest.mark.parametrize("task", cells("Trainer", WITH_LOSS))
def test_trainer_accumulates(task: str, tmp_path: Path) -> None:
    """Two batches of four and one of eight end alike, also where their labels are not as many."""
    ends = []
    for size, batches in ((8, 1), (4, 2)):
        model = make_model(task)
        trainer = make_trainer(
            task,
            model,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=batches,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0,
            save_strategy="no",
        )
        trainer.train()
        ends.append(values_of(model))
    assert_close(*ends)


@pytest.mark.parametrize("task", cells("Trainer", ("SEQ_2_SEQ_LM", "CAUSAL_LM")))
def test_seq2seq_trainer_generates(task: str, tmp_path: Path) -> None:
    """``predict_with_generate`` gives what the model itself generates."""
    model = make_model(task)
    trainer = make_trainer(
        task,
        model,
        tmp_path,
        transformers.Seq2SeqTrainer,
        predict_with_generate=True,
    )
    batch = batch_of(task, 8, seed=2)
    found = trainer.predict(Rows(batch), max_new_tokens=3)
    labels = batch.pop("labels")
    with torch.no_grad():
        loss = model.eval()(**batch, labels=labels).loss
    expected = model.generate(**batch, max_new_tokens=3)
    width = expected.shape[1]  # it fills up to a length of its own
    assert np.array_equal(found.predictions[:, :width], expected)
    assert not found.predictions[:, width:].any()
    assert found.metrics["test_loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("task", cells("accelerate"))
def test_accelerate(task: str, tmp_path: Path) -> None:
    """``prepare``, ``accumulate``, and a state that a second run goes on from to the same bits."""
    rows = Rows(batch_of(task, 16, seed=1))

    def run(steps: int, resume: bool) -> Any:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = make_model(task)
        optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        loader = torch.utils.data.DataLoader(rows, batch_size=4)
        prepared = accelerator.prepare(model, optimizer, loader, schedule)
        wrapped, optimizer, loader, schedule = prepared
        if resume:
            accelerator.load_state(tmp_path)
        for _ in range(steps):
            for batch in loader:
                with accelerator.accumulate(wrapped):
                    accelerator.backward(loss_of(task, wrapped, batch))
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
        if not resume:
            accelerator.save_state(tmp_path)
        assert accelerator.unwrap_model(wrapped) is model
        return model

    half = run(1, resume=False)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del saved[DESCRIPTION]
    assert_equal(saved, values_of(half))
    assert_equal(values_of(EPTModel.from_pretrained(tmp_path, make_backbone(task))), saved)
    resumed = run(1, resume=True)
    assert_equal(values_of(resumed), values_of(run(2, resume=False)))
