"""Every program of ``examples/``, run as its first lines say, on a small random backbone."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ept_fast import EPTModel
from tests.tiny import save_llama, save_model, save_t5

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
POSITIONS = {"max_position_embeddings": 160}
BERT = partial(save_model, **POSITIONS)
LLAMA = partial(save_llama, steps=0, **POSITIONS)
PROGRAMS = {
    "classification": (BERT, ["--epochs", "3"]),
    "t5_seq2seq": (partial(save_t5, steps=0), ["--epochs", "3"]),
    "causal_instructions": (LLAMA, ["--epochs", "3"]),
    "nf4_backbone": (LLAMA, ["--steps", "11"]),
    "torchrun_two_processes": (BERT, ["--epochs", "3"]),
}


def load(name: str) -> ModuleType:
    """The example as a module, without running it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words_of(value: Any) -> set[str]:
    """The words of all texts in an example's data."""
    if isinstance(value, str):
        return set(value.split())
    items = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list, tuple)):
        return set()
    return set().union(*map(words_of, items))


def run(name: str, folder: Path) -> str:
    """What the example prints, started in ``folder`` on a model that is made there."""
    module = load(name)
    words = words_of(getattr(module, "ROWS", None) or module.TEXTS)
    save, arguments = PROGRAMS[name]
    model = save(folder / "model", words=words)
    command = [sys.executable]
    if name.startswith("torchrun"):
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / f"{name}.py"), "--model", str(model), "--output", "adapter"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(printed: str) -> list[float]:
    """The losses that an example's own loop, or the Trainer, prints."""
    return [float(number) for number in re.findall(r"loss'?:? '?(\d+\.\d+)", printed)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_example(name: str, tmp_path: Path) -> None:
    """It trains, and leaves an adapter that is not the one it started from."""
    if name == "nf4_backbone":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    printed = run(name, tmp_path)
    found = losses(printed)
    assert len(found) >= 2, printed
    assert found[-1] < found[0], printed
    model = EPTModel.from_pretrained(tmp_path / "adapter")
    offset: Any = model.prompt.offset_a
    assert offset.abs().max() > 0
    with torch.no_grad():
        assert torch.isfinite(model.prompt.reconstruct()).all()


def test_every_example_is_run() -> None:
    """Here or in the tests of what it shows, and each names a real model in a line of its own."""
    others = {"plain_embeddings", "server"}  # test_interchange.py, test_server.py
    found = {path.stem for path in EXAMPLES.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__pycache__"} == others | set(PROGRAMS)
    for name in PROGRAMS:
        assert re.search(
            r'^MODEL = "[\w.-]+/[\w.-]+"  # or ', (EXAMPLES / f"{name}.py").read_text(), re.M
        )
