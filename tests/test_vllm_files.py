"""Adapters written for vLLM, and what of ``ept_fast.vllm`` needs no vLLM."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

import ept_fast.vllm
from ept_fast import CheckpointError, EPTConfig, FusedEPTPrompt, export_vllm, get_ept_model
from ept_fast.interchange.vllm import read_vllm_adapter, read_vllm_sizes
from ept_fast.libraries import MissingLibraryError
from ept_fast.vllm import Sizes, adapter_folders, check_fits
from ept_fast.vllm.__main__ import main
from tests.architectures import BY_NAME, WIDTH

D, M, N, R = 10, 4, 7, 2
NAMES = [f"base_model.model.ept.lora_{factor}.weight" for factor in "AB"]

without_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is not None, reason="vLLM is installed"
)


def make_prompt(rank: int = R, tokens: str = "all", **choices: Any) -> FusedEPTPrompt:
    sizes = {"num_virtual_tokens": M, "max_length": N, "rank": rank, "num_spaces": 2}
    config = EPTConfig(D, **sizes, alpha=3.0, offset_tokens=tokens)
    prompt = FusedEPTPrompt(config, torch.nn.Embedding(12, D), **choices)
    for parameter in prompt.parameters():
        torch.nn.init.normal_(parameter)
    return prompt


@pytest.mark.parametrize("rank", [0, R])
def test_factors_times_places_are_prompt_and_offset(rank: int, tmp_path: Path) -> None:
    prompt = make_prompt(rank)
    export_vllm(prompt, tmp_path / "new" / "folder", base_model="llama")
    sizes, tensors = read_vllm_adapter(tmp_path / "new" / "folder")
    a, b = (tensors[name] for name in NAMES)
    n = N if rank else 0
    assert (a.shape, b.shape) == ((rank, n), (D, rank + M))
    assert {a.dtype, b.dtype} == {torch.float32}
    assert sizes == (D, M, n, rank, sizes.sha256, "llama")
    assert sizes == read_vllm_sizes(tmp_path / "new" / "folder")
    assert torch.equal(b[:, rank:].T, prompt.reconstruct())
    if rank:
        scaled = prompt.config.scaling * prompt.offset_a @ prompt.offset_b
        torch.testing.assert_close((b[:, :rank] @ a).T, scaled)
    else:
        assert prompt.offset_a is None
    again = tmp_path / "again"
    export_vllm(prompt.fold(), again, base_model="llama")
    assert read_vllm_sizes(again) == sizes  # the checksum of the tensors, too


def test_the_files(tmp_path: Path) -> None:
    export_vllm(make_prompt(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "target_modules": ["ept"],
        "r": 1,
        "lora_alpha": 1,
        "ept_fast": {
            "format": "vllm",
            "format_version": 1,
            "hidden_size": D,
            "num_virtual_tokens": M,
            "max_length": N,
            "rank": R,
            "sha256": hashlib.sha256(data).hexdigest(),
        },
    }
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert sorted(file.keys()) == NAMES


def test_a_prompt_of_a_bank(tmp_path: Path) -> None:
    bank = make_prompt(num_tasks=2)
    export_vllm(bank, tmp_path, task=1)
    _, tensors = read_vllm_adapter(tmp_path)
    assert torch.equal(tensors[NAMES[1]][:, R:].T, bank.reconstruct()[1])
    with pytest.raises(ValueError, match="task: expected one from 0 to 1 of the bank, got None"):
        export_vllm(bank, tmp_path / "other")


def test_mistakes_of_an_export(tmp_path: Path) -> None:
    export_vllm(make_prompt(), tmp_path)
    before = load_file(tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileExistsError, match="folder: expected a new one"):
        export_vllm(make_prompt(), tmp_path)
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in NAMES)
    other = tmp_path / "other"
    with pytest.raises(TypeError, match="base_model: expected a text, got int"):
        export_vllm(make_prompt(), other, base_model=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="prompt: expected a FusedEPTPrompt"):
        export_vllm(torch.nn.Linear(2, 2), other)  # type: ignore[arg-type]
    nan = make_prompt()
    with torch.no_grad():
        nan.get_parameter("offset_b")[0, 0] = float("nan")
    with pytest.raises(ValueError, match="expected finite values to save"):
        export_vllm(nan, other)
    with pytest.raises(ValueError, match="offset_tokens: expected 'all', as generated tokens"):
        export_vllm(make_prompt(tokens="given"), other)
    assert not other.exists()
    export_vllm(make_prompt(rank=0, tokens="given"), other)  # there is none to leave out


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"rank": 3}, r"lora_A.weight: expected shape \(3, 7\), got \(2, 7\)"),
        ({"hidden_size": 9}, r"lora_B.weight: expected shape \(9, 6\), got \(10, 6\)"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: expected an integer >= 1, got 0"),
        ({"rank": 0}, "rank, max_length: expected both or neither to be 0, got 0 and 7"),
        ({"max_length": "7"}, "max_length: expected an integer, got str"),
        ({"format_version": 2}, "format_version: expected 1, got 2"),
        ({"sha256": "0"}, "sha256: expected the files it was saved with, got others for"),
        ({"sha256": 5}, "sha256: expected the files it was saved with, got others for"),
        ({"another": 1}, "ept_fast: expected what export_vllm writes, got"),
    ],
)
def test_files_that_do_not_fit(changes: dict[str, Any], wrong: str, tmp_path: Path) -> None:
    export_vllm(make_prompt(), tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["ept_fast"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=wrong):
        read_vllm_adapter(tmp_path)


def test_a_lora_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(CheckpointError, match="ept_fast: expected what export_vllm"):
        read_vllm_sizes(tmp_path)


def test_the_longest_text(tmp_path: Path) -> None:
    for rank, expected in ((0, [9, 95]), (R, [7, 7])):
        export_vllm(make_prompt(rank), tmp_path / str(rank))
        sizes = read_vllm_sizes(tmp_path / str(rank))
        # All positions but the prompt's and one for a new token.
        assert [sizes.longest_text(positions) for positions in (M + 10, 100)] == expected


def test_which_adapters_fit(tmp_path: Path) -> None:
    export_vllm(make_prompt(), tmp_path / "b")
    (tmp_path / "a").mkdir()
    (tmp_path / "file").touch()
    folders = adapter_folders(tmp_path)
    assert folders == {name: str(tmp_path / name) for name in "ab"}
    assert adapter_folders({"b": tmp_path / "a" / ".." / "b"}) == {"b": str(tmp_path / "b")}
    adapter = read_vllm_sizes(tmp_path / "b")
    check_fits(adapter, D, Sizes(M, N, R))
    with pytest.raises(ValueError, match="hidden_size: expected 11 as the model has, got 10"):
        check_fits(adapter, 11, Sizes(M, N, R))
    for name, sizes in zip(
        Sizes._fields, [(M - 1, N, R), (M, N - 1, R), (M, N, R - 1)], strict=True
    ):
        with pytest.raises(ValueError, match=f"{name}: expected at most"):
            check_fits(adapter, D, Sizes(*sizes))


def test_the_command_exports_what_was_saved(tmp_path: Path) -> None:
    config = EPTConfig(WIDTH, num_virtual_tokens=M, max_length=N, rank=R, num_spaces=2)
    model = get_ept_model(BY_NAME["Llama"].build("CAUSAL_LM"), config, "CAUSAL_LM")
    model.save_pretrained(tmp_path / "saved")
    run = CliRunner().invoke(main, ["export", str(tmp_path / "saved"), str(tmp_path / "out")])
    assert (run.exit_code, run.output) == (0, f"{tmp_path / 'out'}\n")
    _, tensors = read_vllm_adapter(tmp_path / "out")
    assert torch.equal(tensors[NAMES[1]][:, R:].T, model.prompt.reconstruct())
    for arguments, wrong in (
        (["saved", "out"], "folder: expected a new one"),
        (["none", "new"], "expected a readable file"),
    ):
        run = CliRunner().invoke(main, ["export", *(str(tmp_path / each) for each in arguments)])
        assert run.exit_code == 1
        assert wrong in run.output
        assert "Traceback" not in run.output
    model = get_ept_model(BY_NAME["BERT"].build("SEQ_CLS"), config, "SEQ_CLS")
    model.save_pretrained(tmp_path / "classifier")
    run = CliRunner().invoke(main, ["export", str(tmp_path / "classifier"), str(tmp_path / "new")])
    assert "task: expected one of CAUSAL_LM, got 'SEQ_CLS'" in run.output


def test_vllm_is_imported_by_nothing_else(root: Path) -> None:
    code = (
        "import sys, ept_fast.vllm, ept_fast.vllm.__main__, ept_fast.interchange.vllm\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('vllm', 'transformers')])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


@without_vllm
def test_without_vllm(tmp_path: Path) -> None:
    export_vllm(make_prompt(), tmp_path / "a")
    with pytest.raises(MissingLibraryError, match=r"vllm not installed: pip install vllm==0\.32"):
        ept_fast.vllm.engine_arguments("model", tmp_path)
    run = CliRunner().invoke(main, ["serve", "--model", "model", "--adapters", str(tmp_path)])
    assert run.exit_code == 1
    assert "vllm not installed" in run.output
