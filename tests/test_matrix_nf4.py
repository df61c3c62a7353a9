"""A backbone in four bits, by bitsandbytes on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from ept_fast.transformers.adapter import DESCRIPTION
from tests.distributed import trainers
from tests.distributed.checks import (
    assert_close,
    assert_equal,
    assert_float32,
    assert_within,
    cells,
)
from tests.distributed.tasks import (
    TASKS,
    batch_of,
    frozen_of,
    gradients_of,
    loss_of,
    make_backbone,
    make_model,
    trained,
    values_of,
)
from tests.distributed.trainers import make_trainer

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a task's tiny model."""

    def of(task: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"nf4-{task}"
        if not folder.exists():
            make_backbone(task).save_pretrained(folder)
        return folder

    return of


def load_nf4(task: str, folder: Path, dtype: torch.dtype) -> Any:
    """The saved model with its linear layers in NF4, its head apart."""
    kinds = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    }
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["classifier", "lm_head"],
    )
    kind = kinds.get(task, transformers.AutoModel)
    return kind.from_pretrained(folder, quantization_config=quantised, dtype=dtype)


NF4 = [
    pytest.param(*p.values, dtype, marks=p.marks)
    for dtype, tasks in ((torch.float32, TASKS), (torch.bfloat16, ("CAUSAL_LM", "SEQ_CLS")))
    for p in cells("NF4", tasks)
]


@pytest.mark.parametrize(("task", "dtype"), NF4)
def test_nf4(task: str, dtype: torch.dtype, saved: Any, tmp_path: Path) -> None:
    """The gradients are those of the dequantised model, and training lowers the loss."""
    backbone = load_nf4(task, saved(task), dtype)
    layers = [m for m in backbone.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) >= 12
    assert {m.weight.dtype for m in layers} == {torch.uint8}
    model, batch = make_model(task, backbone), batch_of(task)
    plain = make_model(task, load_nf4(task, saved(task), dtype).dequantize())
    with torch.no_grad():
        model.eval()(**batch)  # on a CPU, bitsandbytes would pack the weights for inference now
    model.train()
    got, expected = (gradients_of(task, each, batch) for each in (model, plain))
    assert_float32(model)
    if dtype == torch.float32:
        assert_close(got, expected)
    else:
        assert_within(got, {name: g.double() for name, g in expected.items()}, dtype)
    counts = [each.parameter_counts() for each in (model, plain)]
    assert counts[0] == counts[1]

    frozen = frozen_of(model)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    first = float(loss_of(task, model, batch).detach())
    for _ in range(20):
        gradients_of(task, model, batch)
        optimizer.step()
    last = float(loss_of(task, model, batch).detach())
    assert last < 0.95 * first
    assert_equal(frozen_of(model), frozen)

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, make_backbone(task))
    values = dict(loaded.named_parameters())
    assert_equal({name: values[name].detach() for name in trained(model)}, values_of(model))
    assert float(loss_of(task, loaded, batch).detach()) < first


@pytest.mark.parametrize("task", cells("NF4", ("CAUSAL_LM",)))
def test_nf4_in_the_trainer(task: str, saved: Any, tmp_path: Path) -> None:
    """Which trains no quantised model but one with an adapter of PEFT, as it would otherwise be."""
    model = make_model(task, load_nf4(task, saved(task), torch.float32))
    start = values_of(model)
    with trainers.fresh_accelerate():
        make_trainer(task, model, tmp_path).train()
    for name, value in values_of(model).items():
        assert not torch.equal(value, start[name]), name
    files = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert set(files) == {*start, DESCRIPTION}


def test_weights_packed_for_inference(saved: Any) -> None:
    """They would give no gradients, so they are refused; others are kept from it until unload."""
    backbone = load_nf4("CAUSAL_LM", saved("CAUSAL_LM"), torch.float32)
    layer = backbone.model.layers[1].mlp.down_proj
    layer.support_avx512bf16_for_cpu = True
    model = make_model("CAUSAL_LM", backbone)
    assert not layer.support_avx512bf16_for_cpu
    model.unload()
    assert layer.support_avx512bf16_for_cpu
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"4-bit weights .* got model.layers.1.mlp.down_proj"):
        make_model("CAUSAL_LM", backbone)
