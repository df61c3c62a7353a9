"""The CUDA backend's place among the others, told from stand-ins: no GPU, nothing is compiled."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from ept_fast import cli, reconstruct_prompt, splice_prompt
from ept_fast.backends import cuda, eager, fused, triton
from ept_fast.backends.cuda import build, library
from ept_fast.backends.cuda.build import ExtensionError
from ept_fast.ops import dispatch
from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.ops.types import Flags, Needs, Parameters, Saved, SpliceInputs, Text
from tests.processes import python

GPU = torch.device("cuda", 0)


@dataclass(frozen=True)
class OnGpu:
    """What a backend is told about a tensor before it is chosen."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: torch.device = GPU


def prompt_on_gpu(**change: Any) -> Parameters:
    given: dict[str, Any] = {"short_prompt": OnGpu((4, 8)), "offset_a": OnGpu((16, 2)), **change}
    return Parameters(**given)


class Machine:
    """A machine with one GPU whose library loads, or does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loads = 0
        self.error: str | None = None
        self.monkeypatch = monkeypatch
        self.set_gpu("sm_90")
        monkeypatch.setattr(library, "load", self.load)
        self.set_state("built", usable=True)

    def set_gpu(self, name: str) -> None:
        for module in (cuda, triton):
            self.monkeypatch.setattr(module, "target", lambda device: name)

    def set_state(self, text: str, usable: bool, architectures: tuple[str, ...] = ("90",)) -> None:
        path = Path("ept_fast_cuda.so") if usable else None
        found = library.State(path, architectures, text, usable)
        self.monkeypatch.setattr(library, "_find", lambda: found)

    def load(self) -> None:
        self.loads += 1
        if self.error is not None:
            raise ExtensionError(self.error)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return Machine(monkeypatch)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EPT_FAST_BACKEND", "EPT_FAST_DISABLE", build.ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_failure", "")
    monkeypatch.setattr(dispatch, "_logged", set())


# Order


def test_order_and_logged_reasons(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ept_fast")
    given = prompt_on_gpu()
    assert dispatch.select(None, given) == "triton"
    monkeypatch.setenv("EPT_FAST_DISABLE", "triton")
    assert dispatch.select(None, given) == "cuda"
    assert dispatch.select(None, given) == "cuda"
    monkeypatch.setenv("EPT_FAST_DISABLE", "triton, cuda")
    assert dispatch.select(None, given) == "eager"
    off = "switched off by EPT_FAST_DISABLE"
    assert caplog.messages == [
        "backend triton",
        f"backend cuda (triton: {off})",
        f"backend eager (triton: {off}; cuda: {off})",
    ]
    monkeypatch.setenv("EPT_FAST_DISABLE", "triton,cuda,eager")
    with pytest.raises(RuntimeError, match=r"^backend: none supports this call \(triton: switched"):
        dispatch.select(None, given)


def test_what_triton_does_not_serve_goes_to_cuda(machine: Machine) -> None:
    machine.set_gpu("sm_75")
    machine.set_state("built", usable=True, architectures=("75",))
    assert dispatch.select(None, prompt_on_gpu()) == "cuda"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("nvcc was not found", "nvcc was not found"),
        ("does not compile with nvcc:\nline 1\nline 2", "does not compile with nvcc"),
    ],
)
def test_a_library_that_cannot_be_built_leaves_the_call_to_the_next(
    error: str,
    reason: str,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine.error = error
    monkeypatch.setenv("EPT_FAST_DISABLE", "triton")
    caplog.set_level(logging.INFO, "ept_fast")
    for _ in range(2):
        assert dispatch.select(None, prompt_on_gpu()) == "eager"
    assert machine.loads == 1  # tried once a process
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == [f"without the CUDA backend: {error}"]
    assert caplog.messages[-1].endswith(f"cuda: {reason})")


def test_forced_it_is_not_built_before_the_call(machine: Machine) -> None:
    assert dispatch.select("cuda", prompt_on_gpu()) == "cuda"
    assert machine.loads == 0


# Refusals


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"offset_a": OnGpu((16, 2), torch.float64)}, "offset_a is float64, the kernels compute"),
        ({"offset_a": OnGpu((16, 257))}, "rank 257 is more than 256"),
        ({"space_down": OnGpu((8, 16, 65))}, "8 subspaces of width 65 are more than 512 together"),
        ({"short_prompt": OnGpu((4, 2**30 + 1))}, f"short_prompt has an axis of more than {2**30}"),
        (
            {
                "space_down": OnGpu((8, 16, 64)),
                **dict.fromkeys(("gate_weight", "space_down_bias"), OnGpu((8, 64))),
            },
            "8 subspaces of width 64 and biases are more than 512 together",
        ),
        ({"short_prompt": OnGpu((513, 8))}, "513 virtual tokens are more than 512"),
        ({"short_prompt": OnGpu((4, 8), device=torch.device("cpu"))}, "not on an NVIDIA GPU"),
    ],
)
def test_forced_backend_says_why_not(
    change: dict[str, Any], reason: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        RuntimeError, match=f"^backend: 'cuda' does not support this call: {reason}"
    ):
        dispatch.select("cuda", prompt_on_gpu(**change))
    monkeypatch.setenv("EPT_FAST_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=f"^EPT_FAST_BACKEND: 'cuda' does .* call: {reason}"):
        dispatch.select(None, prompt_on_gpu(**change))
    assert machine.loads == 0


def test_the_largest_that_is_served(machine: Machine) -> None:
    largest = prompt_on_gpu(
        short_prompt=OnGpu((512, 8)), offset_a=OnGpu((16, 256)), space_down=OnGpu((8, 16, 64))
    )
    assert cuda.supports(largest) == (True, "fused kernels")
    assert cuda.supports(SpliceInputs(OnGpu((513, 8)))) == (True, "fused kernels")  # type: ignore[arg-type]


def test_rows_are_gathered_by_other_backends(machine: Machine) -> None:
    given: Any = SpliceInputs(OnGpu((4, 8)), prompt_rows=OnGpu((2, 3), torch.int64))  # type: ignore[arg-type]
    assert cuda.supports(given) == (False, "prompt_rows, which these kernels do not gather")
    assert triton.supports(given) == (True, "fused kernels")


@pytest.mark.parametrize(
    "change", [{}, {"short_prompt": OnGpu((513, 8))}, {"offset_a": OnGpu((16, 257))}]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_both_backends_of_kernels_serve_the_same(
    dtype: torch.dtype, change: dict[str, Any], machine: Machine
) -> None:
    given = prompt_on_gpu(offset_b=OnGpu((2, 8), dtype), **change)
    assert cuda.supports(given) == triton.supports(given)


def test_limits_and_activations_are_those_of_the_kernels(root: Path) -> None:
    header = (root / "csrc" / "kernels.h").read_text()
    limits = re.findall(r"constexpr int64_t max_(\w+) = (\d+)(?: << (\d+))?;", header)
    assert {name: int(value) << int(shift or 0) for name, value, shift in limits} == {
        name.removeprefix("MAX_").lower(): value
        for name, value in vars(fused).items()
        if name.startswith("MAX_")
    }
    rows = re.findall(r"^  ROW\((\w+),", (root / "csrc" / "activations.h").read_text(), re.M)
    assert rows == list(ACTIVATIONS)


@pytest.mark.parametrize(
    ("gpu", "state", "reason"),
    [
        ("sm_70", ("built", True), "sm_70 is older than sm_75"),
        (
            "sm_90",
            ("built", True, ("80", "86")),
            "the CUDA library is for sm_80, sm_86, the GPU is sm_90",
        ),
        ("sm_90", ("the CUDA library cannot be built", False), "the CUDA library cannot be built"),
    ],
)
def test_a_gpu_that_the_library_is_not_for(
    gpu: str, state: tuple[Any, ...], reason: str, machine: Machine
) -> None:
    machine.set_gpu(gpu)
    machine.set_state(*state)
    assert cuda.supports(prompt_on_gpu(), by_name=True) == (False, reason)
    with pytest.raises(RuntimeError, match=f"'cuda' does not support this call: {reason}"):
        dispatch.select("cuda", prompt_on_gpu())


def test_rocm_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert cuda.supports(prompt_on_gpu()) == (False, "not on an NVIDIA GPU")
    assert cuda.available() == (False, "a ROCm build of torch")


def test_cpu_tensors_never_go_to_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "reconstruct_forward", None)
    reconstruct_prompt(torch.ones(4, 8), torch.zeros(16, 2), torch.ones(2, 8))
    with pytest.raises(RuntimeError, match=r"'cuda' does not support this call: not on an NVIDIA"):
        splice_prompt(torch.ones(2, 8), inputs_embeds=torch.zeros(1, 3, 8), backend="cuda")


# EPT_FAST_DISABLE


def test_disabled_backend_cannot_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_FAST_DISABLE", "eager")
    with pytest.raises(
        RuntimeError,
        match=r"^backend: 'eager' does not support this call: switched off by EPT_FAST_DISABLE$",
    ):
        reconstruct_prompt(torch.ones(4, 8), backend="eager")
    assert reconstruct_prompt(torch.ones(4, 8), backend="reference").shape == (4, 8)


@pytest.mark.parametrize("value", ["tritn", "reference", "triton;cuda"])
def test_unknown_name_in_disable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_FAST_DISABLE", value)
    expected = f"EPT_FAST_DISABLE: expected names of triton, cuda, eager, got '{value}'"
    with pytest.raises(ValueError, match=f"^{expected}$"):
        reconstruct_prompt(torch.ones(4, 8))


@pytest.mark.parametrize("value", ["", " ,"])
def test_nothing_is_disabled_by_an_empty_variable(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPT_FAST_DISABLE", value)
    assert dispatch.select(None, Parameters(torch.ones(4, 8))) == "eager"


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_disabled_under_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_FAST_DISABLE", "triton,cuda")
    compiled = torch.compile(reconstruct_prompt, fullgraph=True, backend="aot_eager")
    tensors = torch.randn(4, 8), torch.randn(16, 2), torch.randn(2, 8)
    torch.testing.assert_close(compiled(*tensors), reconstruct_prompt(*tensors))


def test_the_choice_is_traced_in_one_graph(machine: Machine) -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def chosen(x: Tensor) -> Tensor:
        too_large = fused.too_large(SpliceInputs(x, offset_a=x))
        return x + 1 if not too_large and not cuda._refusal(GPU, prepare=True) else x

    assert torch.equal(chosen(torch.zeros(3, 4)), torch.ones(3, 4))
    assert machine.loads >= 1


# The call


class _Operators:
    """Stands for the library's operators and notes their arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def __call__(self, name: str) -> Any:
        def call(*given: Any) -> list[Tensor]:
            self.calls.append((name, len(given)))
            return [torch.empty(0)] * 7

        return call


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> _Operators:
    made = _Operators()
    monkeypatch.setattr(cuda, "_operator", made)
    return made


FLAGS = Flags(1.0, "gelu", "token", 1.0)


def tensors(rank: int) -> tuple[Parameters, SpliceInputs]:
    p, a, b = torch.randn(1, 4, 8), torch.ones(1, 16, rank), torch.ones(1, rank, 8)
    inputs = SpliceInputs(p, inputs_embeds=torch.ones(3, 5, 8), offset_a=a, offset_b=b)
    return Parameters(p, a, b), inputs


def test_calls_go_to_the_operators(operators: _Operators) -> None:
    parameters, inputs = tensors(2)
    p = parameters.short_prompt
    cuda.reconstruct_forward(parameters, FLAGS)
    cuda.reconstruct_backward(p, parameters, Saved(*(p,) * 6), FLAGS)
    cuda.splice_forward(inputs, 1.0)
    cuda.splice_backward(torch.ones(3, 9, 8), inputs, [], 1.0, True, True)
    text = Text(inputs_embeds=inputs.inputs_embeds)
    kept = cuda.path_forward(parameters, text, FLAGS, True)
    cuda.path_backward(p, parameters, text, kept, FLAGS, True, Needs(True, True))
    assert operators.calls == [("cuda_forward", 19), ("cuda_backward", 20)] * 3


def test_a_call_with_an_empty_tensor_is_eagers(operators: _Operators) -> None:
    parameters, inputs = tensors(0)
    p, a, b = parameters[:3]
    assert a is not None
    assert b is not None
    prompt, saved = cuda.reconstruct_forward(parameters, FLAGS)
    expected = eager.reconstruct_forward(parameters, FLAGS)
    torch.testing.assert_close((prompt, *saved), (expected[0], *expected[1]))
    grads: Any = cuda.reconstruct_backward(p, parameters, saved, FLAGS)
    assert [g.shape for g in grads[:3]] == [p.shape, a.shape, b.shape]
    assert cuda.splice_forward(inputs, 1.0)[0].shape == (3, 9, 8)
    grads = cuda.splice_backward(torch.ones(3, 9, 8), inputs, [], 1.0, True, True)
    assert [g.shape for g in grads] == [p.shape, a.shape, b.shape]
    assert operators.calls == []


def test_a_prompt_alone_is_eagers(operators: _Operators) -> None:
    alone = Parameters(torch.randn(1, 4, 8))
    prompt, saved = cuda.reconstruct_forward(alone, FLAGS)
    assert torch.equal(prompt, alone.short_prompt)
    grads = cuda.reconstruct_backward(prompt, alone, saved, FLAGS)
    assert torch.equal(grads.short_prompt, prompt)
    assert operators.calls == []


def test_the_first_call_loads_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Mock(side_effect=ExtensionError("nvcc was not found"))
    monkeypatch.setattr(library, "load", missing)
    monkeypatch.setattr(cuda, "_operator", cuda._operator.__wrapped__)
    with pytest.raises(ExtensionError, match=r"^nvcc was not found$"):
        cuda.splice_forward(tensors(2)[1], 1.0)


def test_without_a_gpu_there_is_nothing_to_build_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_capabilities", lambda: ())
    monkeypatch.setattr(library, "_packaged", lambda: (None, ""))
    with pytest.raises(ExtensionError, match=r"no GPU, and EPT_FAST_CUDA_ARCHS names no arch"):
        library.load()


# ept-fast info


def info(*options: str) -> str:
    result = CliRunner().invoke(cli.main, ["info", *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def cuda_row() -> str:
    (row,) = (line for line in info().splitlines() if line.startswith("backend cuda "))
    return row


@pytest.fixture
def nothing_in_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_PACKAGED", tmp_path / "none.so")
    monkeypatch.setenv("EPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_capabilities", lambda: ())


TOOLS = build.Tools("nvcc", "13.0.88", "g++", "ninja", "torch", "2.13.0")


@pytest.mark.usefixtures("nothing_in_the_package")
def test_info_says_it_would_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_tools", lambda: TOOLS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = "the CUDA library would be built on first use on a GPU, with nvcc 13.0.88"
    assert cuda_row() == f"backend cuda      does not work here (no GPU; {text})"
    assert json.loads(info("--json"))["cuda_library"] == {
        "built": False,
        "architectures": [],
        "path": None,
        "state": text,
    }


@pytest.mark.usefixtures("nothing_in_the_package")
def test_info_says_for_which_gpu_it_would_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_tools", lambda: TOOLS)
    monkeypatch.setattr(build, "_output_of", lambda *command: "compute_80\ncompute_90\n")
    monkeypatch.setattr(library, "_capabilities", lambda: (90, 103))
    text = "would be built for sm_90 and later on first use, with nvcc 13.0.88"
    assert library.state().text == f"the CUDA library {text}"
    assert library.state().architectures == ("90+PTX",)


@pytest.mark.usefixtures("nothing_in_the_package")
def test_info_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "ninja was not found on the PATH: pip install ninja"
    monkeypatch.setattr(build, "find_tools", Mock(side_effect=ExtensionError(why)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = f"the CUDA library cannot be built: {why}"
    assert cuda_row() == f"backend cuda      does not work here (no GPU; {text})"


def test_info_says_for_which_architectures_it_is_built(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packaged = library_file(tmp_path, ("80", "100+PTX"), build.sources_hash())
    monkeypatch.setattr(library, "_PACKAGED", packaged)
    monkeypatch.setattr(library, "_capabilities", lambda: ())
    found = json.loads(info("--json"))["cuda_library"]
    assert found == {
        "built": True,
        "architectures": ["80", "100+PTX"],
        "path": str(packaged),
        "state": "the CUDA library is built for sm_80, sm_100 and later, in the package",
    }


def library_file(folder: Path, architectures: tuple[str, ...], sources: str) -> Path:
    record = build.Record(architectures, "13.0.88", "2.13.0", sources)
    path = folder / build.LIBRARY
    path.write_text(f"machine code{build._record_text(record)}\0more of it")
    return path


@pytest.mark.parametrize(
    ("architectures", "same_sources", "why"),
    [
        (("80",), True, "; the one in the package is for sm_80, the GPU is sm_90"),
        (("90",), False, "; the one in the package was built from other sources"),
    ],
)
def test_a_library_in_the_package_that_does_not_fit_is_passed_over(
    architectures: tuple[str, ...],
    same_sources: bool,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    sources = build.sources_hash() if same_sources else "others"
    monkeypatch.setattr(library, "_PACKAGED", library_file(tmp_path, architectures, sources))
    monkeypatch.setattr(library, "_capabilities", lambda: (90,))
    missing = Mock(side_effect=ExtensionError("nvcc was not found"))
    monkeypatch.setattr(build, "find_tools", missing)
    assert library.state().text == f"the CUDA library cannot be built: nvcc was not found{why}"
    assert not library.state().usable


@pytest.mark.parametrize(
    ("off", "name", "why"),
    [
        ("", "triton", "less time on the GPU that ran both, nothing to build; cuda's functions"),
        ("triton", "cuda", "triton does not work here"),
        ("triton,cuda", "eager", "neither triton nor cuda works here"),
        ("triton,cuda,eager", "none", "all are switched off"),
    ],
)
def test_info_says_which_goes_first(
    off: str, name: str, why: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPT_FAST_DISABLE", off)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cli, "_devices", lambda torch: ["a GPU"])
    (line,) = (line for line in info().splitlines() if line.startswith("first "))
    assert line.startswith(f"first        {name} ({why}")
    assert json.loads(info("--json"))["first_backend"]["name"] == name
    if name == "none":
        return
    assert dispatch.select(None, prompt_on_gpu()) == name
    monkeypatch.setenv("EPT_FAST_BACKEND", "reference")
    assert "\nfirst        reference (EPT_FAST_BACKEND)\n" in info()


def test_the_order_is_the_same_for_all_sizes(machine: Machine) -> None:
    for batch, length, width in ((1, 1, 8), (32, 256, 768), (8, 2048, 4096)):
        text = OnGpu((batch, length, width))
        inputs: Any = SpliceInputs(OnGpu((4, width)), inputs_embeds=text)  # type: ignore[arg-type]
        assert dispatch.select(None, inputs) == "triton"


def test_info_says_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPT_FAST_DISABLE", "cuda")
    assert cuda_row() == ("backend cuda      does not work here (switched off by EPT_FAST_DISABLE)")


# Imports


def test_import_and_an_eager_call_leave_the_extension_alone() -> None:
    code = (
        "import sys, torch, ept_fast\n"
        "ept_fast.reconstruct_prompt(torch.ones(4, 8))\n"
        "left = [name for name in sys.modules if name.startswith('ept_fast.backends.cuda.')]\n"
        "assert not left, left\n"
    )
    done = python("-c", code, EPT_FAST_DISABLE=None)
    assert done.returncode == 0, done.stderr


def test_info_builds_and_loads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.ops, "load_library", None)
    monkeypatch.setattr(build, "build", None)
    info()
    assert list(tmp_path.iterdir()) == []
