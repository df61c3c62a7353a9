"""DeepSpeed ZeRO-3 is not supported: where it holds values elsewhere an error says so.

It leaves an empty tensor there. A stand-in does the same.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ept_fast import EPTConfig, get_ept_model
from tests.distributed.tasks import TASKS, batch_of, loss_of, make_backbone, make_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Status(enum.Enum):
    """DeepSpeed's, by its names."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2


def partition(parameter: Any) -> Tensor:
    """Do as DeepSpeed does; returns the values."""
    values: Tensor = parameter.data
    parameter.ds_status, parameter.data = Status.NOT_AVAILABLE, values.new_empty(0)
    return values


PARTITIONED = "{}: expected a whole tensor, got one partitioned by DeepSpeed ZeRO-3, which is not"


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_on_a_partitioned_table(task: str) -> None:
    backbone = make_backbone(task)
    width = backbone.get_input_embeddings().embedding_dim
    partition(backbone.get_input_embeddings().weight)
    labels = ["a", "b"] if task == "TOKEN_CLS" else None
    with pytest.raises(ValueError, match=PARTITIONED.format("embedding.weight")):
        get_ept_model(backbone, EPTConfig(width, 4, 16, 4), task, labels=labels)
    assert all(p.requires_grad for p in backbone.parameters())


def test_partitions_give_no_wrong_values(tmp_path: Path) -> None:
    model, batch = make_model("CAUSAL_LM"), batch_of("CAUSAL_LM")
    expected = loss_of("CAUSAL_LM", model, batch)
    table = model.get_input_embeddings()
    values = partition(table.weight)
    with pytest.raises(ValueError, match=PARTITIONED.format("embedding.weight")):
        loss_of("CAUSAL_LM", model, batch)

    def gathered(*_: Any) -> None:
        table.weight.ds_status, table.weight.data = Status.AVAILABLE, values

    def released(*_: Any) -> None:
        partition(table.weight)

    # As its engine does, around the layer that owns the values.
    table.register_forward_pre_hook(gathered)
    table.register_forward_hook(released)
    assert torch.equal(loss_of("CAUSAL_LM", model, batch), expected)
    assert table.weight.numel() == 0

    values_of_b = partition(model.prompt.offset_b)
    for call in (
        lambda: loss_of("CAUSAL_LM", model, batch),
        model.prompt.fold,
        lambda: model.save_pretrained(tmp_path / "new"),
    ):
        with pytest.raises(ValueError, match=PARTITIONED.format("offset_b")):
            call()
    assert not (tmp_path / "new").exists()
    model.prompt.offset_b.ds_status = Status.AVAILABLE
    model.prompt.offset_b.data = values_of_b
    model.save_pretrained(tmp_path / "new")
    partition(model.prompt.offset_b)
    with torch.no_grad():
        model.prompt.short_prompt.zero_()
    with pytest.raises(ValueError, match=PARTITIONED.format("offset_b")):
        model.load_pretrained(tmp_path / "new")
    assert not model.prompt.short_prompt.any(), "half of it was loaded"
