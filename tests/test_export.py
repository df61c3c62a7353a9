"""Folded models as programs of torch.export and of ONNX, for other sizes than the example's."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ept_fast import EPTConfig, EPTModel, get_ept_model
from tests.distributed.checks import cells
from tests.distributed.tasks import make_model
from tests.tiny import save_model

pytestmark = pytest.mark.usefixtures("one_thread")

MAX_LENGTH = 16
EXAMPLE, OTHERS = (2, 6), ((5, 9), (1, 1), (3, MAX_LENGTH), (1, 4))
# Of transformers, which notes the outputs that it captures in a global variable.
CAPTURES = "ignore:While compiling, we found certain side effects:UserWarning"
ONNX = ("onnx", "onnxscript", "onnxruntime")


def folded(task: str, offset: str = "low_rank", backend: str | None = None) -> EPTModel:
    model = make_model(task, backend=backend)
    model.fold(offset=offset)
    return model


def inputs(rows: int, length: int) -> dict[str, Tensor]:
    """Rows padded on the right, on the left and not at all."""
    draw = torch.Generator().manual_seed(rows)
    ids = torch.randint(3, 60, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, length // 2 + 1 :] = 0
    mask[1:2, : length // 2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def sizes() -> dict[str, Any]:
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return {"input_ids": free, "attention_mask": free}


def export(model: EPTModel) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (), inputs(*EXAMPLE), dynamic_shapes=sizes())


@pytest.mark.filterwarnings(CAPTURES)
@pytest.mark.parametrize(
    ("offset", "backend"), [("low_rank", None), ("table", None), ("low_rank", "reference")]
)
@pytest.mark.parametrize("task", cells("torch.export", ("SEQ_CLS", "CAUSAL_LM")))
def test_a_folded_model(task: str, offset: str, backend: str | None) -> None:
    model = folded(task, offset, backend)
    program = export(model).module()
    for size in (EXAMPLE, *OTHERS):
        call = inputs(*size)
        with torch.no_grad():
            torch.testing.assert_close(program(**call).logits, model(**call).logits)
    with pytest.raises((AssertionError, RuntimeError), match="<= 16"):
        program(**inputs(2, MAX_LENGTH + 1))


ALONE = """
import sys
import torch
import transformers.modeling_outputs  # the class of the output
program = torch.export.load(sys.argv[1]).module()
call, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program(**call).logits, expected)
assert not any(name.startswith("ept_fast") for name in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.minutes
@pytest.mark.filterwarnings(CAPTURES)
@pytest.mark.parametrize("task", ["SEQ_CLS", "CAUSAL_LM"])
def test_a_program_of_the_reference_runs_without_the_package(task: str, tmp_path: Path) -> None:
    model = folded(task, backend="reference")
    torch.export.save(export(model), tmp_path / "program.pt2")
    call = inputs(*OTHERS[0])
    with torch.no_grad():
        torch.save((call, model(**call).logits), tmp_path / "call.pt")
    files = [str(tmp_path / name) for name in ("program.pt2", "call.pt")]
    subprocess.run([sys.executable, "-c", ALONE, *files], check=True, timeout=120)


def require_onnx() -> None:
    missing = [name for name in ONNX if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def export_onnx(model: EPTModel) -> Any:
    require_onnx()
    return torch.onnx.export(
        model,
        (),
        kwargs=inputs(*EXAMPLE),
        dynamo=True,
        dynamic_shapes=sizes(),
        output_names=["logits"],
        verbose=False,
    )


# Of torch, in its own exporter.
OWN = "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"


@pytest.mark.support(row="ONNX", column="SEQ_CLS")
@pytest.mark.filterwarnings(CAPTURES)
@pytest.mark.filterwarnings(OWN)
@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"labels": ("a", "b"), "pooling": "mean"},
        pytest.param({"labels": ("a", "b"), "pooling": "last"}, marks=pytest.mark.slow),
    ],
    ids=lambda choices: choices.get("pooling", "own head"),
)
def test_onnx(choices: dict[str, Any], tmp_path: Path) -> None:
    """A classifier for any number of rows and any length, with the model's own head too."""
    model = make_model("SEQ_CLS", backend="reference", **choices)
    model.fold()
    program = export_onnx(model)
    program.save(tmp_path / "model.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [value.name for value in session.get_outputs()] == ["logits"]
    for size in (EXAMPLE, *OTHERS):
        call = inputs(*size)
        (got,) = session.run(None, {name: value.numpy() for name, value in call.items()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(got), model(**call).logits)
    long = {name: torch.ones(2, MAX_LENGTH + 1).long().numpy() for name in inputs(*EXAMPLE)}
    with pytest.raises(Exception, match="INVALID_ARGUMENT"):
        session.run(None, long)


@pytest.mark.filterwarnings(CAPTURES)
@pytest.mark.filterwarnings(OWN)
@pytest.mark.parametrize(
    ("offset", "backend"),
    [("low_rank", None), pytest.param("table", "reference", marks=pytest.mark.slow)],
)
def test_onnx_has_no_operators_of_the_package(offset: str, backend: str | None) -> None:
    model = folded("SEQ_CLS", offset, backend)
    with pytest.raises(torch.onnx.OnnxExporterError, match="step 3/3") as caught:
        export_onnx(model)
    assert "target=torch.ops.ept_fast.splice_forward" in str(caught.value.__cause__)


@pytest.mark.slow
@pytest.mark.filterwarnings(CAPTURES)
@pytest.mark.filterwarnings(OWN)
def test_the_page_s_examples(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_onnx()
    import transformers

    folder = save_model(tmp_path / "model")
    backbone = transformers.AutoModel.from_pretrained(folder)
    config = EPTConfig(32, num_virtual_tokens=4, max_length=MAX_LENGTH, rank=2)
    get_ept_model(backbone, config, "SEQ_CLS", labels=("a", "b")).save_pretrained(
        tmp_path / "adapter"
    )
    known = {
        "torch": torch,
        "EPTModel": EPTModel,
        "backbone": transformers.AutoModel.from_pretrained(folder),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder),
    }
    page = (root / "docs" / "export.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, known)
    assert (tmp_path / "model.pt2").exists()
    assert (tmp_path / "model.onnx").exists()
