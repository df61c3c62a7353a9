"""What `import ept_fast` and the commands cost and leave alone, seen from a fresh process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.processes import python
from tests.tiny import (
    answer_rows,
    options,
    save_llama,
    save_model,
    save_t5,
    save_task,
    small_run,
)

# Facts about the import, told on the last line. An audit hook sees every process that is started
# and every library that is opened from Python.
PROBE = """
import json, sys, time
import torch

before = set(sys.modules)
events = []
watched = {"subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.system", "ctypes.dlopen"}
sys.addaudithook(lambda event, args: events.append(event) if event in watched else None)
started = time.process_time()
import ept_fast
seconds = time.process_time() - started
print(json.dumps({
    "seconds": seconds,
    "modules": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "events": events,
    "cuda": torch.cuda.is_initialized(),
    "dynamo": "torch._dynamo" in sys.modules and "torch._dynamo" not in before,
}))
"""


def told(*arguments: str, **environment: str | None) -> dict[str, Any]:
    """What a fresh Python process tells on its last line."""
    done = python(*arguments, timeout=300, **environment)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def probe() -> dict[str, Any]:
    # As a user's process runs: bytecode is written once and then read.
    return told("-c", PROBE, PYTHONDONTWRITEBYTECODE=None)


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    return probe()


@pytest.mark.parametrize(
    "name",
    [
        "accelerate",
        "click",
        "datasets",
        "matplotlib",
        "peft",
        "tokenizers",
        "transformers",
        "triton",
    ],
)
def test_import_leaves_alone(name: str, imported: dict[str, Any]) -> None:
    assert "ept_fast" in imported["modules"]
    assert name not in imported["modules"]


@pytest.mark.parametrize("name", ["EPTBank", "EPTModel", "get_ept_model"])
def test_without_transformers_there_is_a_hint(name: str) -> None:
    done = python(
        "-c", f"import sys; sys.modules['transformers'] = None\nfrom ept_fast import {name}"
    )
    assert done.stderr.splitlines()[-1] == (
        "ept_fast.libraries.MissingLibraryError: transformers not installed: "
        'pip install "ept-fast[train]"'
    )


def test_import_starts_no_process_no_cuda_and_no_compiler(imported: dict[str, Any]) -> None:
    assert imported["events"] == []
    assert not imported["cuda"]
    assert not imported["dynamo"]


def test_import_takes_under_50_ms_beyond_torch(imported: dict[str, Any]) -> None:
    # CPU time, so that another process's turn does not count; no import waits for anything, as the
    # test above shows. The fixture wrote the bytecode. The least of five processes is the cost
    # of the import itself; what exceeds it is cold caches.
    assert min(probe()["seconds"] for _ in range(5)) < 0.050


# Python lines, what they print aside, told with the libraries that they imported and the
# addresses that they asked for or connected to.
WATCH = """
import contextlib, json, sys

asked = []
watched = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname"}
sys.addaudithook(lambda event, args: asked.append(repr(args)) if event in watched else None)
with contextlib.redirect_stdout(sys.stderr):
    exec(sys.argv[1])
print(json.dumps({
    "imported": sorted({"peft", "bitsandbytes"} & set(sys.modules)),
    "asked": asked,
}))
"""
TASKS = {
    "classification": (save_model, {}),
    "seq2seq": (save_t5, {"eval_generate": 2, "max_target_length": 4}),
    "causal": (save_llama, {"eval_generate": 2, "max_target_length": 4}),
}


def watch(script: str) -> dict[str, Any]:
    offline = {name: None for name in os.environ if name.endswith("_OFFLINE")}
    return told("-W", "ignore", "-c", WATCH, script, **offline)


def commands(*calls: list[str]) -> str:
    """The command line, called with these words one after the other."""
    lines = [f"main({words!r}, standalone_mode=False)" for words in calls]
    return "\n".join(["from ept_fast.cli import main", *lines])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Path]]:
    """What training by the command line did, and the folder of each task."""
    calls, folders = [], {}
    for task, (save, choices) in TASKS.items():
        folder = folders[task] = tmp_path_factory.mktemp(task)
        save(folder / "model", **({} if task == "classification" else {"steps": 1}))
        rows = {} if task == "classification" else {"rows": answer_rows}
        save_task(folder / "data", **rows)
        settings = small_run(
            folder / "model", folder / "data", folder / "run", task=task, max_steps=2, **choices
        )
        calls.append(["train", *options(settings), "--quiet"])
    return watch(commands(*calls)), folders


NOTHING: dict[str, Any] = {"imported": [], "asked": []}


@pytest.mark.slow
def test_watching_sees_what_is_imported_and_asked() -> None:
    script = """
import socket
import bitsandbytes
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
"""
    facts = watch(script)
    assert facts["imported"] == ["bitsandbytes"]
    assert any("'127.0.0.1', 9" in address for address in facts["asked"])


@pytest.mark.slow
def test_training_imports_no_peft_and_asks_no_hub(trained: tuple[dict[str, Any], Any]) -> None:
    assert trained[0] == NOTHING


@pytest.mark.slow
def test_evaluation_and_prediction_import_no_peft_and_ask_no_hub(
    trained: tuple[Any, dict[str, Path]],
) -> None:
    calls = []
    for folder in trained[1].values():
        data, adapter = str(folder / "data"), str(folder / "run")
        texts = folder / "texts.txt"
        texts.write_text("the play was fine\n")
        calls.append(["evaluate", f"--adapter={adapter}", f"--data={data}"])
        calls.append(["predict", f"--adapter={adapter}", f"--input={texts}"])
    assert watch(commands(*calls)) == NOTHING


@pytest.mark.slow
def test_demo_imports_no_peft_and_asks_no_hub(minilm: Path, tmp_path: Path) -> None:
    words = ["demo", f"--output={tmp_path / 'demo'}", "--steps=1"]
    assert watch(commands(words)) == NOTHING


LIBRARY = """
import transformers
from ept_fast import EPTConfig, EPTModel, export_peft, get_ept_model, import_peft

backbone = transformers.AutoModel.from_pretrained({model!r})
plain = EPTConfig(32, num_virtual_tokens=4, max_length=16, rank=0, num_spaces=0)
model = get_ept_model(backbone, plain, "SEQ_CLS", labels=["a", "b"])
model.save_pretrained({folder!r})
EPTModel.from_pretrained({folder!r})
export_peft(model.prompt, {folder!r} + "-peft", base_model=None, task_type="FEATURE_EXTRACTION")
import_peft({folder!r} + "-peft", model.get_input_embeddings())
"""


@pytest.mark.slow
def test_library_imports_no_peft_and_asks_no_hub(
    trained: tuple[Any, dict[str, Path]], tmp_path: Path
) -> None:
    model = trained[1]["classification"] / "model"
    script = LIBRARY.format(model=str(model), folder=str(tmp_path / "adapter"))
    assert watch(script) == NOTHING


LORA = """
import sys, torch, transformers
from pathlib import Path

folder = Path({folder!r})
with_peft = {first!r} == "transformers.trainer"
__import__({first!r})
assert ("peft" in sys.modules) == with_peft
from ept_fast.training.trainer import PromptTrainer
assert ("peft" in sys.modules) == with_peft
from transformers import Trainer, TrainingArguments
assert issubclass(PromptTrainer, Trainer)
import peft

backbone = transformers.AutoModelForCausalLM.from_pretrained({model!r})
model = peft.get_peft_model(backbone, peft.LoraConfig(target_modules=["q_proj"]))
rows = [dict(input_ids=torch.arange(5), labels=torch.arange(5))] * 4
for steps, resume in ((1, False), (2, True)):
    choices = dict(max_steps=steps, save_steps=1, use_cpu=True, report_to="none")
    trainer = Trainer(model, TrainingArguments(folder, **choices), train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    names = sorted(path.name for path in (folder / f"checkpoint-{{steps}}").glob("*.safetensors"))
    assert names == ["adapter_model.safetensors"], names
assert transformers.trainer_utils._is_peft_model(model)
assert not transformers.trainer_utils._is_peft_model(backbone)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ept_fast.training.trainer", "transformers.trainer"])
def test_trainer_of_transformers_trains_models_of_peft(
    first: str, trained: tuple[Any, dict[str, Path]], tmp_path: Path
) -> None:
    """Whichever of the two trainers is imported first."""
    model = trained[1]["causal"] / "model"
    watch(LORA.format(first=first, folder=str(tmp_path), model=str(model)))


@pytest.mark.slow
def test_all_else_of_peft_is_its_own_without_peft() -> None:
    script = """
import sys
from ept_fast.libraries import without_peft
with without_peft():
    from peft import PeftModel
    assert "peft.peft_model" not in sys.modules
    from peft import LoraConfig
import peft
assert LoraConfig is peft.LoraConfig
assert PeftModel is not peft.PeftModel
assert not isinstance(LoraConfig(), PeftModel)
assert isinstance(peft.PeftModel.__new__(peft.PeftModel), PeftModel)
"""
    watch(script)
