"""The whole CUDA backend on a CPU: its Python, its binding, and its kernels built for the host.

``csrc/binding.cpp`` is compiled with ``EPT_FAST_HOST`` beside ``csrc/host.cpp``, which runs the
same kernels block by block. What is left for a GPU are device guard, stream and launches.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ept_fast import splice_prompt
from ept_fast.backends import cuda
from ept_fast.backends.cuda import library
from ept_fast.ops.types import Flags
from tests.cases import PADDINGS, Case, Sizes, make_case, run
from tests.parity import assert_as_exact_as_the_definition, cotangent_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread", "on_the_host"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the real library is for the GPU here"),
]

# The contract's functions, by way of those that host.cpp offers to tests.
ADAPTER = """
#include "kernels.h"
#define ADAPT(Name, name)                                                        \\
  extern "C" int64_t ept_##name##_workspace(const ept::Name*);                   \\
  extern "C" int ept_##name(const ept::Name*, int);                              \\
  int64_t ept::name##_workspace(const ept::Name& call) {                         \\
    return ept_##name##_workspace(&call);                                        \\
  }                                                                              \\
  ept::Status ept::name(const ept::Name& call, CUstream_st*) {                   \\
    return {call.scaling == 13 ? 98 : ept_##name(&call, 0), "made_up_kernel"};   \\
  }
ADAPT(ReconstructForward, reconstruct_forward)
ADAPT(ReconstructBackward, reconstruct_backward)
ADAPT(SpliceForward, splice_forward)
ADAPT(SpliceBackward, splice_backward)
const char* ept::error_string(int) { return "invalid device function"; }
"""


@pytest.fixture(scope="module")
def host_library(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host")
    (folder / "adapter.cpp").write_text(ADAPTER)
    torch_folder = Path(torch.__file__).parent
    sources = [root / "csrc" / "binding.cpp", root / "csrc" / "host.cpp", folder / "adapter.cpp"]
    flags = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
    defines = ("-DEPT_FAST_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000")
    includes = ("-isystem", torch_folder / "include", "-I", root / "csrc")
    libraries = (f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu")
    built = folder / "ept_fast_host.so"
    command = ["g++", "-shared", *flags, *defines, *includes, *sources, "-o", built, *libraries]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(built)
    return built


@pytest.fixture
def on_the_host(host_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go to the backend when it is asked for by name."""
    monkeypatch.setattr(cuda, "supports", lambda tensors, by_name=False: (by_name, "on the host"))
    monkeypatch.setattr(library, "load", lambda: None)


SHAPES = {
    "one": Sizes(m=1, n=1, r=1, k=1, h=1, d=1, batch=1, length=1),
    "prime": Sizes(m=7, n=29, r=5, k=3, h=5, d=37, batch=5, length=23),
    "bank": Sizes(m=5, n=17, r=3, k=2, h=4, d=24, batch=7, length=13, tasks=4),
    "more tasks than rows": Sizes(m=3, n=11, r=2, k=2, h=3, d=19, batch=4, length=9, tasks=9),
    "vectors": Sizes(m=4, n=40, r=8, k=2, h=8, d=128, batch=3, length=33),
}
TYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16 table": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "fp16 table, bf16 parameters": (torch.float16, torch.bfloat16),
}
PARTS: dict[str, dict[str, Any]] = {
    "all": {},
    "no fusion": {"fusion": False},
    "no spaces": {"spaces": False},
    "no offset": {"offset": False},
    "prompt only": {"offset": False, "spaces": False},
}


def typed(case: Case, types: str) -> Case:
    table, parameters = TYPES[types]
    case = case.to(parameters)
    return replace(case, weight=case.weight.to(table))


@pytest.mark.parametrize("types", TYPES)
def test_parity_of_types(types: str) -> None:
    cases = (
        make_case(sizes, padding=padding, dtype=torch.float32, seed=seed)
        for seed, (sizes, padding) in enumerate(
            (sizes, padding) for sizes in SHAPES.values() for padding in PADDINGS
        )
    )
    assert_as_exact_as_the_definition((typed(case, types) for case in cases), "cuda")


@pytest.mark.parametrize("gate", ["token", "prompt"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "identity"])
def test_parity_of_flags(activation: str, gate: str) -> None:
    cases = (
        make_case(SHAPES[shape], dtype=torch.float32, seed=seed, activation=activation, gate=gate)
        for shape in ("prime", "bank")
        for seed in range(3)
    )
    assert_as_exact_as_the_definition(cases, "cuda")


@pytest.mark.parametrize("parts", PARTS)
def test_parity_of_parts(parts: str) -> None:
    cases = (
        make_case(SHAPES[shape], dtype=torch.float32, seed=seed, **PARTS[parts])
        for shape in ("prime", "bank")
        for seed in range(3)
    )
    assert_as_exact_as_the_definition(cases, "cuda")


def _stretched(tensor: Tensor) -> Tensor:
    """The same values with every other element of a wider tensor, and its axes the other way."""
    wide = tensor.new_zeros([2 * size for size in tensor.shape][::-1])
    view = wide[tuple(slice(0, None, 2) for _ in tensor.shape)]
    view.copy_(tensor.permute(*range(tensor.dim())[::-1]))
    return view.permute(*range(tensor.dim())[::-1])


@pytest.mark.parametrize("shape", ["prime", "bank"])
def test_strides_are_passed_on(shape: str) -> None:
    case = make_case(SHAPES[shape], dtype=torch.float32)
    plain = run(case, "cuda", cotangent_of(case))
    mask, ids = case.attention_mask, case.input_ids
    assert mask is not None
    stretched = replace(
        case,
        parameters={n: _stretched(t.detach()).requires_grad_() for n, t in case.parameters.items()},
        weight=_stretched(case.weight),
        input_ids=_stretched(ids.int()),
        attention_mask=_stretched(mask.bool()),
        task_ids=None if case.task_ids is None else _stretched(case.task_ids.int()),
    )
    again = run(stretched, "cuda", _stretched(cotangent_of(case)))
    for name, tensor in plain.items():
        assert torch.equal(tensor, again[name]), name


def test_embeddings_in_place_of_ids() -> None:
    case = make_case(SHAPES["bank"], dtype=torch.float32)
    prompt = case.reconstruct("reference").detach()
    found = case.weight[case.input_ids]
    by_ids = case.splice(prompt, "cuda")
    assert torch.equal(case.splice(prompt, "cuda", inputs_embeds=found), by_ids)
    expanded = found[:1].expand_as(found)
    theirs = case.splice(prompt, "reference", inputs_embeds=expanded)
    torch.testing.assert_close(case.splice(prompt, "cuda", inputs_embeds=expanded), theirs)


def test_an_expanded_gradient() -> None:
    case = make_case(SHAPES["prime"], dtype=torch.float32)
    grads = []
    for backend in ("cuda", "reference"):
        for parameter in case.parameters.values():
            parameter.grad = None
        case.both(backend).sum().backward()
        grads.append({name: t.grad for name, t in case.parameters.items()})
    for name, tensor in grads[0].items():
        torch.testing.assert_close(tensor, grads[1][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.int16, torch.int8])
def test_masks_of_every_type(dtype: torch.dtype) -> None:
    case = make_case(SHAPES["prime"], dtype=torch.float32)
    assert case.attention_mask is not None
    prompt = torch.ones(7, 37)
    expected = case.splice(prompt, "cuda")
    case = replace(case, attention_mask=case.attention_mask.to(dtype))
    assert torch.equal(case.splice(prompt, "cuda"), expected)


@pytest.mark.parametrize("what", ["neither", "prompt", "offset"])
def test_only_what_is_needed(what: str) -> None:
    """Gradients that nobody asks for are not computed, and the others do not change."""
    case = make_case(SHAPES["bank"], dtype=torch.float32)
    p = torch.ones(4, 5, 24)
    given = (cotangent_of(case), case.inputs(p), 0.4)
    whole = cuda.splice_backward(*given, True, True)
    need_prompt, need_offset = what == "prompt", what == "offset"
    part = cuda.splice_backward(*given, need_prompt, need_offset)
    for need, tensor, full in zip(
        (need_prompt, need_offset, need_offset), part, whole, strict=True
    ):
        assert torch.equal(tensor, full) if need else tensor.shape == (0,)


def test_the_largest_sizes() -> None:
    sizes = Sizes(m=2, n=3, r=256, k=8, h=64, d=32, batch=1, length=3)
    cases = (make_case(sizes, dtype=torch.float32, seed=seed, scaling=0.02) for seed in range(6))
    assert_as_exact_as_the_definition(cases, "cuda")


# What the binding refuses by itself


def test_errors_name_the_argument() -> None:
    op = torch.ops.ept_fast.cuda_splice_forward
    p, e = torch.ones(1, 2, 8), torch.ones(3, 5, 8)
    a, b = torch.ones(1, 7, 2), torch.ones(1, 2, 8)
    mask, tasks = torch.ones(3, 5), torch.zeros(3, dtype=torch.int16)
    for given, message in (
        (
            (p.double(), None, None, e),
            "prompt: expected dtype float32, float16 or bfloat16, got Double",
        ),
        ((p[0], None, None, e), "prompt: expected 3 axes, got 2"),
        (
            (p, None, None, None),
            "inputs_embeds: expected either input_ids or inputs_embeds, got neither",
        ),
        ((p, e[:, :, 0].long(), None, e), "weight: expected a tensor beside input_ids, got None"),
        ((p, e[:, :, 0], e[0], None), "input_ids: expected dtype int64 or int32, got Float"),
        ((p, None, None, e, a), "offset_b: expected a tensor beside offset_a, got None"),
        (
            (p, None, None, e, a, b, mask),
            "attention_mask: expected dtype bool or an integer one, got Float",
        ),
        (
            (p, None, None, e, a, b, None, tasks),
            "task_ids: expected dtype int64 or int32, got Short",
        ),
    ):
        with pytest.raises(RuntimeError) as caught:
            op([*given, *(None,) * (8 - len(given))], 1.0)
        assert str(caught.value).startswith(message)


def test_names_of_flags_are_checked() -> None:
    op = torch.ops.ept_fast.cuda_reconstruct_forward
    p = torch.ones(1, 2, 8)
    with pytest.raises(
        RuntimeError, match=r"^activation: expected one of gelu, relu, silu, identity, got tanh"
    ):
        op([p, *(None,) * 6], 1.0, "tanh", "token", 1.0)
    with pytest.raises(RuntimeError, match=r"^gate: expected token or prompt, got row"):
        op([p, *(None,) * 6], 1.0, "gelu", "row", 1.0)


def test_an_error_of_a_launch_names_the_kernel() -> None:
    e = torch.ones(3, 5, 8)
    with pytest.raises(RuntimeError) as caught:
        splice_prompt(torch.ones(2, 8), inputs_embeds=e, scaling=13.0, backend="cuda")
    expected = "ept_fast: kernel made_up_kernel: CUDA error 98: invalid device function"
    assert str(caught.value).startswith(expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("padding", ["none", "holes"])
def test_compiled_it_is_one_operator(padding: str) -> None:
    case = make_case(SHAPES["prime"], padding=padding, dtype=torch.float32)
    compiled = torch.compile(case.both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled("cuda"), case.both("cuda"))


def test_shapes_of_the_outputs() -> None:
    """As the fakes of the operators in Python have them: shape, type and order."""
    case = make_case(SHAPES["bank"], dtype=torch.bfloat16)
    parameters, flags = case.tensors(), Flags(0.4, "gelu", "token", 0.7)
    from torch._subclasses.fake_tensor import FakeTensorMode

    prompt, saved = cuda.reconstruct_forward(parameters, flags)
    grads = cuda.reconstruct_backward(prompt, parameters, saved, flags)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in parameters]
        wanted = torch.ops.ept_fast.reconstruct_forward(fakes, *flags, "cuda")
        wanted_grads = torch.ops.ept_fast.reconstruct_backward(
            wanted[0], fakes, wanted[1:], *flags, "cuda"
        )
    for got, fake in zip((prompt, *saved, *grads), (*wanted, *wanted_grads), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (fake.shape, fake.dtype, fake.stride())
