"""The CUDA kernels as backends on a CPU: `csrc/host.cpp`, built with the system's C++ compiler.

"host" calls the library through ctypes with the tensors' own memory. What it writes lies between
guard zones, which are looked at after every call, and is full of NaN before. "cuda" is the whole
backend: its Python, and `csrc/binding.cpp` compiled with ``EPT_FAST_HOST`` beside `csrc/host.cpp`.
What is left for a GPU are device guard, stream and launches.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ept_fast.backends import cuda
from ept_fast.backends.cuda import library as cuda_library
from ept_fast.config import GATES
from ept_fast.ops import dispatch
from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.ops.types import Flags, Parameters, Saved, SpliceGrads, SpliceInputs

CSRC = Path(__file__).resolve().parent.parent / "csrc"
_FLAGS = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
_GUARD = 256  # bytes on either side
_TYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.bool: 3,
    torch.uint8: 3,
    torch.int8: 3,
    torch.int16: 4,
    torch.int32: 5,
    torch.int64: 6,
}


class _View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("stride", ctypes.c_int64 * 4),
    ]


def _struct(text: str) -> Any:
    """A struct of ``kind: name name ...`` line by line, in the order of kernels.h."""
    kinds = {
        "size": ctypes.c_int64,
        "view": _View,
        "number": ctypes.c_double,
        "choice": ctypes.c_int32,
        "memory": ctypes.c_void_p,
    }
    lines = (line.split(":") for line in text.strip().splitlines())
    fields = [(name, kinds[kind.strip()]) for kind, names in lines for name in names.split()]
    return type("Call", (ctypes.Structure,), {"_fields_": fields})


_RECONSTRUCT_FIELDS = """
    size: tasks tokens positions rank spaces dim width
    view: short_prompt offset_a offset_b space_down space_up gate_weight gate_bias
    view: space_down_bias space_up_bias
    number: scaling temperature
    choice: activation gate
    memory: workspace
"""
_SPLICE_FIELDS = """
    size: batch length tasks tokens width rank
    view: prompt offset_a offset_b attention_mask task_ids
    number: scaling
    memory: workspace
"""
_CALLS = {
    "reconstruct_forward": _struct(
        f"""{_RECONSTRUCT_FIELDS.rstrip()}
        memory: prompt query stats attended hidden gates cross
        """
    ),
    "reconstruct_backward": _struct(
        f"""{_RECONSTRUCT_FIELDS.rstrip()}
        view: grad
        memory: query stats attended hidden gates cross
        memory: d_short_prompt d_offset_a d_offset_b d_space_down d_space_up
        memory: d_gate_weight d_gate_bias d_space_down_bias d_space_up_bias
        """
    ),
    "splice_forward": _struct(
        f"""{_SPLICE_FIELDS.rstrip()}
        size: vocabulary
        view: input_ids source
        memory: out
        """
    ),
    "splice_backward": _struct(
        f"""{_SPLICE_FIELDS.rstrip()}
        size: positions
        view: grad
        memory: d_prompt d_offset_a d_offset_b
        """
    ),
}


def compiler() -> str | None:
    """The C++ compiler of this machine, if it has one."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")


def build(folder: Path, *rest: str | Path) -> Path:
    """The library, compiled into a folder; ``rest``: more flags, sources and libraries."""
    path = folder / "libept_host.so"
    command = [compiler(), *_FLAGS, CSRC / "host.cpp", "-o", path, *rest]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return path


# The contract's functions, by way of those that host.cpp offers to tests.
_ADAPTER = """
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
EPT_CALLS(ADAPT)
extern "C" int ept_add(const ept::Addition*, int);
ept::Status ept::add(const Addition& call, CUstream_st*) { return {ept_add(&call, 0), "add"}; }
const char* ept::error_string(int) { return "invalid device function"; }
"""


@functools.cache
def _load_binding() -> None:
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as name:
        adapter = Path(name) / "adapter.cpp"
        adapter.write_text(_ADAPTER)
        built = build(
            Path(name),
            *(CSRC / "binding.cpp", adapter, "-fvisibility=hidden", "-I", CSRC),
            *("-DEPT_FAST_HOST", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
            *("-isystem", torch_folder / "include", f"-L{torch_folder / 'lib'}"),
            *("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"),
        )
        torch.ops.load_library(built)


@functools.cache
def library() -> ctypes.CDLL:
    """The library: the one that ``EPT_HOST_LIBRARY`` names, or built once for the process."""
    given = os.environ.get("EPT_HOST_LIBRARY")
    if given:
        loaded = ctypes.CDLL(given)
    elif compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    else:
        with tempfile.TemporaryDirectory() as folder:
            loaded = ctypes.CDLL(str(build(Path(folder))))
    loaded.ept_failure.restype = ctypes.c_char_p
    loaded.ept_from_half.restype = ctypes.c_float
    for name in ("bfloat16", "half"):
        getattr(loaded, f"ept_{name}").argtypes = [ctypes.c_float]
        getattr(loaded, f"ept_{name}").restype = ctypes.c_uint16
    workspaces = (f"{name}_workspace" for name in _CALLS)
    loaded.ept_blocks.argtypes = [ctypes.c_char_p]
    for name in ("blocks", "largest_grid", "most_shared_bytes", "struct_size", *workspaces):
        getattr(loaded, f"ept_{name}").restype = ctypes.c_int64
    for index, struct in enumerate((_View, *_CALLS.values())):
        assert loaded.ept_struct_size(index) == ctypes.sizeof(struct), "not as in kernels.h"
    return loaded


_order = [0]


@contextmanager
def downwards() -> Iterator[None]:
    """Threads of a phase, and blocks of a launch, run in the opposite order."""
    _order.append(1)
    yield
    _order.pop()


def serve(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have "host" or "cuda" serve the calls that ask for it by name."""
    if name == "cuda":
        _load_binding()
        monkeypatch.setattr(cuda, "supports", supports)
        monkeypatch.setattr(cuda_library, "load", lambda: None)
        return
    order = {**dispatch._IN_ORDER, name: sys.modules[__name__]}
    monkeypatch.setattr(dispatch, "_IN_ORDER", order)
    monkeypatch.setattr(dispatch, "_NAMES", (*order, dispatch.REFERENCE))


def supports(tensors: Parameters | SpliceInputs, by_name: bool = False) -> tuple[bool, str]:
    """Whatever the kernels serve, if they are asked for by name."""
    return by_name, "the kernels on a host"


class Memory:
    """Outputs and workspace of one call, each between guard zones."""

    def __init__(self) -> None:
        self._bounds: list[tuple[Tensor, int, int]] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32, shift: int = 0) -> Tensor:
        """Full of NaN; ``shift``: elements that it starts past a multiple of 16 bytes."""
        number = math.prod(shape) * dtype.itemsize
        before = _GUARD + shift * dtype.itemsize
        memory = torch.full((before + number + _GUARD,), 0xAB, dtype=torch.uint8)
        inside = memory[before : before + number]
        inside.fill_(0xFF)
        self._bounds.append((memory, before, number))
        return inside.view(dtype).view(shape)

    def check(self) -> None:
        """Nothing was written outside."""
        for memory, before, number in self._bounds:
            assert (memory[:before] == 0xAB).all()
            assert (memory[before + number :] == 0xAB).all()


def _view(tensor: Tensor | None) -> _View:
    if tensor is None:
        return _View()
    strides = (*tensor.stride(), 0, 0, 0, 0)[:4]
    return _View(tensor.data_ptr(), _TYPES[tensor.dtype], strides)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_SPLICE = ("splice_plan", "splice_forward", "splice_backward", "splice_finish")
_NOWHERE = 4096  # an address that is given and never read


def _run(name: str, memory: Memory, **fields: Any) -> None:
    """Allocate the workspace, call, look at the guard zones."""
    loaded, call = library(), _CALLS[name](**fields)
    size = getattr(loaded, f"ept_{name}_workspace")(ctypes.byref(call))
    call.workspace = memory.empty(size, dtype=torch.uint8).data_ptr()
    error = getattr(loaded, f"ept_{name}")(ctypes.byref(call), _order[-1])
    assert error == 0, loaded.ept_failure().decode()
    memory.check()


@dataclass(frozen=True)
class Counted:
    """What a call would take."""

    workspace: int  # bytes
    launches: int
    grid: int  # blocks of the largest launch
    shared: int  # bytes of shared memory, the most of any block
    blocks: dict[str, int]  # of each kernel of the splice that is launched


def count(name: str, sizes: dict[str, int], views: dict[str, torch.dtype], *given: str) -> Counted:
    """Plan a call without memory: its sizes, types of its tensors, outputs it asks for."""
    loaded = library()
    call = _CALLS[name](
        **sizes,
        **{key: _View(_NOWHERE, _TYPES[dtype]) for key, dtype in views.items()},
        **dict.fromkeys(given, _NOWHERE),
    )
    loaded.ept_only_count(1)
    error = getattr(loaded, f"ept_{name}")(ctypes.byref(call), _order[-1])
    loaded.ept_only_count(0)
    assert error == 0
    return Counted(
        getattr(loaded, f"ept_{name}_workspace")(ctypes.byref(call)),
        loaded.ept_launches(),
        loaded.ept_largest_grid(),
        loaded.ept_most_shared_bytes(),
        {name: loaded.ept_blocks(name.encode()) for name in _SPLICE},
    )


def _common(parameters: Parameters, flags: Flags) -> dict[str, Any]:
    """The fields that both directions of operation 1 have."""
    tasks, m, n, r, spaces, dim, d = parameters.sizes()
    return {
        "tasks": tasks,
        "tokens": m,
        "width": d,
        **({"positions": n, "rank": r} if parameters.has_offset else {}),
        **({"spaces": spaces, "dim": dim} if parameters.has_spaces else {}),
        **{name: _view(tensor) for name, tensor in parameters._asdict().items()},
        "scaling": flags.scaling,
        "temperature": flags.temperature,
        "activation": list(ACTIVATIONS).index(flags.activation),
        "gate": GATES.index(flags.gate),
    }


def reconstruct_forward(parameters: Parameters, flags: Flags) -> tuple[Tensor, Saved]:
    memory = Memory()
    tasks, m, _, rank, spaces, dim, width = parameters.sizes()
    out = memory.empty(tasks, m, width, dtype=parameters.short_prompt.dtype)
    saved: dict[str, Tensor] = {}
    if parameters.has_offset:
        saved["query"] = memory.empty(tasks, m, rank)
        saved["stats"] = memory.empty(tasks, 2, m)
        saved["attended"] = memory.empty(tasks, m, rank)
    if parameters.has_spaces:
        saved["hidden"] = memory.empty(tasks, m, spaces * dim)
        if parameters.has_gate:
            saved["gates"] = memory.empty(tasks, m, spaces)
        if parameters.has_offset:
            columns = spaces * dim + spaces * parameters.has_gate
            saved["cross"] = memory.empty(tasks, rank, columns)
    _run(
        "reconstruct_forward",
        memory,
        **_common(parameters, flags),
        prompt=out.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in saved.items()},
    )
    return out, Saved(*(saved.get(name, torch.empty(0)) for name in Saved._fields))


def reconstruct_backward(
    grad: Tensor, parameters: Parameters, saved: Saved, flags: Flags
) -> Parameters:
    memory = Memory()
    grads = [None if t is None else memory.empty(*t.shape, dtype=t.dtype) for t in parameters]
    kept = {name: t.contiguous() for name, t in saved._asdict().items() if t.numel()}
    _run(
        "reconstruct_backward",
        memory,
        **_common(parameters, flags),
        grad=_view(grad),
        **{name: tensor.data_ptr() for name, tensor in kept.items()},
        **{f"d_{n}": _address(t) for n, t in zip(Parameters._fields, grads, strict=True)},
    )
    return Parameters(*grads)  # type: ignore[arg-type]


def splice_forward(
    inputs: SpliceInputs, scaling: float, shift: int = 0
) -> tuple[Tensor, list[Tensor]]:
    """``shift``: elements that the output starts past a multiple of 16 bytes."""
    prompt, input_ids, _, inputs_embeds, offset_a, offset_b, attention_mask, task_ids, _ = inputs
    text, source = inputs.text, inputs.source
    batch, length = text.shape[:2]
    tasks, m, width = prompt.shape
    memory = Memory()
    out = memory.empty(batch, m + length, width, dtype=source.dtype, shift=shift)
    _run(
        "splice_forward",
        memory,
        batch=batch,
        length=length,
        tasks=tasks,
        tokens=m,
        width=width,
        rank=0 if offset_a is None else offset_a.shape[2],
        vocabulary=source.shape[0] if inputs_embeds is None else 0,
        prompt=_view(prompt),
        input_ids=_view(input_ids if inputs_embeds is None else None),
        source=_view(source),
        offset_a=_view(offset_a),
        offset_b=_view(offset_b),
        attention_mask=_view(attention_mask),
        task_ids=_view(task_ids),
        scaling=scaling,
        out=out.data_ptr(),
    )
    return out, []


def splice_backward(
    grad: Tensor,
    inputs: SpliceInputs,
    kept: list[Tensor],
    scaling: float,
    need_prompt: bool,
    need_offset: bool,
) -> SpliceGrads:
    prompt, _, _, _, offset_a, offset_b, attention_mask, task_ids, _ = inputs
    batch, total, width = grad.shape
    tasks, m, _ = prompt.shape
    memory = Memory()
    d_prompt = memory.empty(*prompt.shape, dtype=prompt.dtype) if need_prompt else None
    d_a = d_b = None
    if need_offset and offset_a is not None and offset_b is not None:
        d_a = memory.empty(*offset_a.shape, dtype=offset_a.dtype)
        d_b = memory.empty(*offset_b.shape, dtype=offset_b.dtype)
    _run(
        "splice_backward",
        memory,
        batch=batch,
        length=total - m,
        tasks=tasks,
        tokens=m,
        width=width,
        positions=0 if offset_a is None else offset_a.shape[1],
        rank=0 if offset_a is None else offset_a.shape[2],
        grad=_view(grad),
        prompt=_view(prompt),
        offset_a=_view(offset_a),
        offset_b=_view(offset_b),
        attention_mask=_view(attention_mask),
        task_ids=_view(task_ids),
        scaling=scaling,
        d_prompt=_address(d_prompt),
        d_offset_a=_address(d_a),
        d_offset_b=_address(d_b),
    )
    empty = torch.empty(0)
    return SpliceGrads(*(empty if t is None else t for t in (d_prompt, d_a, d_b)))
