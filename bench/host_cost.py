"""Host time of our path on a CPU, without a GPU: ``python -m bench.host_cost``.

What is timed is what the host does until a launch has been handed over. The Triton kernels are
compiled for a GPU and launched through a libcuda that does nothing (``stub_libcuda.c``). Of the
CUDA library the binding is compiled as it is, beside launches that do nothing
(``stub_launches.cpp``): that leaves out what the CUDA runtime does in a launch but for its copy of
the arguments, and the look at the current device and stream. Beside them, in the same rounds, stand
the ``eager`` backend and the definition in plain PyTorch, with and without torch.compile. Sizes are
tiny, so that what those compute takes next to no time.

Counted outside of the timing are launches, by the stubs, and allocations, by the profiler.

``paths.csv`` has a row for each way to do the whole path (``reconstruct_and_splice``, or a call of
the module), direction, mask and peer: the median time of
a call in microseconds; its ratio to the definition's and to the compiled definition's, each the
median over the rounds with the ends of its 95% interval; launches of our kernels and allocations of
one call. ``launches.csv`` has a row for each launch of a step: the number of the kernel's
arguments, its time by ``launch.run``, which goes through Triton's JIT (``front_us``), and
that of the compiled kernel's own launcher with the arguments that the JIT gives it
(``launcher_us``).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import click
import torch
from torch import Tensor, nn

from bench import peers
from bench.compare import Failure
from bench.compiled import cuda_tools
from bench.environment import origin_of
from bench.inputs import Inputs, cotangent, make_inputs, make_prompt
from bench.peers import REFERENCE
from bench.rows import RESULTS, aligned, write_csv
from bench.shapes import Shape
from bench.timing import median_interval, no_collection
from ept_fast.backends.cuda import build

FOLDER = RESULTS / "host_cost"
PATHS, LAUNCHES = "paths.csv", "launches.csv"
TRITON, CUDA, EAGER, COMPILED = "triton", "cuda", "eager", "reference-compiled"
KERNELS = (TRITON, CUDA)
PEERS = (*KERNELS, EAGER, REFERENCE, COMPILED)
FUNCTIONS, MODULE = "function", "module"
DIRECTIONS = ("both", "forward")
SHAPE = Shape("host", 16, 4, 16, 3, 4, 2, 2, 2, 10, shortest=2)

_STUB = Path(__file__).with_name("stub_libcuda.c")
_LAUNCHES = Path(__file__).with_name("stub_launches.cpp")
_CAPABILITY = (9, 0)
_CPU = torch.device("cpu")
_ORIGIN = ("threads", "device", "torch", "triton", "python", "commit", "date")

Call = Callable[[], Any]
Forward = tuple[Call, list[Tensor]]
Row = dict[str, Any]


# The stubs


def _compile(what: str, variable: str, compilers: tuple[str, ...], *options: str | Path) -> None:
    """Make a shared library with the compiler that a variable names, or else the first found.

    Raises:
        Failure: there is no such compiler, or it fails.
    """
    named = (os.environ[variable],) if os.environ.get(variable) else compilers
    found = [path for name in named if (path := shutil.which(name))]
    if not found:
        raise Failure(f"{what}: expected a compiler, got no {' or '.join(named)}")
    command = [found[0], "-shared", "-fPIC", "-O2", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"{what}: {found[0]} failed: {done.stderr.strip()}")


def compile_stub(folder: Path) -> Path:
    """Make ``libcuda.so.1`` in a folder."""
    library = folder / "libcuda.so.1"
    # By its name in the file the linker takes it for the libcuda that Triton's driver asks for.
    options = (f"-Wl,-soname,{library.name}", "-o", library, _STUB)
    _compile("the stub of libcuda", "CC", ("gcc", "clang"), *options)
    return library


def compile_binding(folder: Path) -> Path:
    """Make the CUDA library in a folder: tensors are the CPU's, and launches do nothing."""
    library, torch_folder = folder / build.LIBRARY, Path(torch.__file__).parent
    options = ("-std=c++20", "-fvisibility=hidden", "-DEPT_FAST_HOST", build.STABLE_ABI)
    folders = ("-I", build.SOURCES, "-isystem", torch_folder / "include")
    libraries = (f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu")
    sources = (build.SOURCES / "binding.cpp", _LAUNCHES)
    compilers = ("g++", "clang++")
    what = "the stub of the CUDA library"
    _compile(what, "CXX", compilers, *options, *folders, "-o", library, *sources, *libraries)
    return library


@contextmanager
def stubbed() -> Iterator[Callable[[], int]]:
    """Our backends of kernels take tensors of the CPU as a GPU's, and launches end in the stubs.

    Gives a function that tells the number of launches so far. Meant for a process of its own.

    Raises:
        Failure: no compiler of C or C++, or no build of Triton that serves.
    """
    if missing := cuda_tools():
        raise Failure(f"triton: expected a build for NVIDIA GPUs, got one without: {missing}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise Failure(
            "TRITON_INTERPRET: expected it not to be set, got 1: nothing is compiled then"
        )
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        library = ctypes.CDLL(str(compile_stub(Path(name))), mode=ctypes.RTLD_GLOBAL)
        counts = [ctypes.c_long.in_dll(library, "stub_launches")]
        binding = compile_binding(Path(name))
        torch.ops.load_library(binding)  # type: ignore[no-untyped-call]
        counts.append(ctypes.c_long.in_dll(ctypes.CDLL(str(binding)), "stub_cuda_launches"))

        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver

        from ept_fast.backends import cuda, fused
        from ept_fast.backends import triton as backend
        from ept_fast.backends.cuda import library as cuda_library
        from ept_fast.backends.triton import launch, runtime
        from ept_fast.ops import functional, path, splice

        class Driver(CudaDriver):  # type: ignore[misc]
            """Triton's own, save what it asks PyTorch, which has no GPU here."""

            def __init__(self) -> None:
                super().__init__()
                self.get_current_device = lambda: 0
                self.get_current_stream = lambda device: 0
                self.get_device_capability = lambda device: _CAPABILITY

        # Where Triton's linker looks for libcuda.
        stack.enter_context(mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=name))
        before = driver._active
        stack.callback(lambda: setattr(driver, "_active", before))
        driver.set_active(Driver())

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        # The launch sizes are a GPU's, not the interpreter's.
        patch(fused, "_forced_target", f"sm_{_CAPABILITY[0]}{_CAPABILITY[1]}")
        # The backend serves a CPU if it is interpreted; the variable is still asked for.
        patch(backend, "_interpreted", lambda: os.environ.get("TRITON_INTERPRET") != "1")
        patch(cuda, "supports", lambda tensors, by_name=False: (True, "the stub"))
        patch(cuda_library, "load", lambda: None)
        # Values are looked at on a CPU; here, as on a GPU, only if the variable asks for it.
        for module in (functional, path, splice):
            patch(
                module,
                "values_are_checked",
                lambda device: os.environ.get("EPT_FAST_CHECK") == "1",
            )
        # A launch makes the tensor's device the current one, on a GPU; so it does here, and what
        # PyTorch asks the driver for is answered.
        gpu = torch.device("cuda", 0)
        patch(launch, "as_current", lambda device: torch.cuda.device(gpu))
        patch(torch.cuda, "_exchange_device", lambda index: 0)
        patch(torch.cuda, "_maybe_exchange_device", lambda index: 0)
        patch(functional, "_checked", {})  # what serves a call here does not serve it afterwards
        runtime.forget()
        stack.callback(runtime.forget)
        yield lambda: sum(count.value for count in counts)


# What is timed


def module_by_definition(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """What a call of the module gives: the embeddings, their mask and their positions."""
    embeds = peers.operation_of("prompt path", REFERENCE)(inputs)
    if inputs.attention_mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        return embeds, mask, torch.arange(mask.shape[1]).expand(mask.shape)
    before = embeds.shape[1] - inputs.attention_mask.shape[1]
    mask = nn.functional.pad(inputs.attention_mask, (before, 0), value=1)
    return embeds, mask, mask.cumsum(1) - 1


def make_forwards(path: str, inputs: Inputs) -> dict[str, Forward]:
    """What each peer calls, and the tensors that it trains."""
    definition: Callable[[Inputs], Any] = module_by_definition
    if path == FUNCTIONS:
        definition = peers.operation_of("prompt path", REFERENCE)
    leaves = list(inputs.parameters.values())
    options = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    found: dict[str, Forward] = {}
    for name in PEERS:
        if path == MODULE and name in (*KERNELS, EAGER):
            prompt = make_prompt(SHAPE, inputs.parameters, inputs.weight, name)
            found[name] = partial(prompt, **options), list(prompt.parameters())
            continue
        forward = definition
        if name == COMPILED:
            forward = torch.compile(definition, dynamic=False)
        elif name != REFERENCE:
            forward = peers.operation_of("prompt path", name)
        found[name] = partial(forward, inputs), leaves
    return found


def _call(direction: str, forward: Call, leaves: list[Tensor], grad: Tensor) -> Call:
    if direction == "forward":
        return forward

    def both() -> Any:
        out = forward()
        return torch.autograd.grad(out if isinstance(out, Tensor) else out[0], leaves, grad)

    return both


def allocations(call: Call) -> int:
    """How often a call takes memory for a tensor."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


def in_turns(calls: dict[str, Call], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds of a call in each round; who begins changes from round to round."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for call in calls.values():
        for _ in range(repeats):
            call()
    with no_collection():
        for i in range(rounds):
            first = i % len(names)
            for name in names[first:] + names[:first]:
                call = calls[name]
                begin = time.perf_counter()
                for _ in range(repeats):
                    call()
                times[name].append((time.perf_counter() - begin) / repeats * 1e6)
    return times


def path_rows(launched: Callable[[], int], **how: Any) -> Iterator[Row]:
    """Measure every path, mask and direction; ``how``: what the rows say of the run."""
    size = (SHAPE.batch, SHAPE.num_virtual_tokens + SHAPE.length, SHAPE.hidden_size)
    grad = cotangent(torch.Size(size), torch.bfloat16, _CPU)
    for path, mask in product((FUNCTIONS, MODULE), ("yes", "no")):
        shape = SHAPE if mask == "yes" else replace(SHAPE, shortest=0)
        (inputs,) = make_inputs(shape, torch.bfloat16, _CPU, 1)
        torch.compiler.reset()
        forwards = make_forwards(path, inputs)
        for direction in DIRECTIONS:
            calls = {name: _call(direction, *forwards[name], grad) for name in PEERS}
            counts = {name: _counts(name, call, launched) for name, call in calls.items()}
            times = in_turns(calls, how["rounds"], how["calls"])
            for name in PEERS:
                yield {
                    "path": path,
                    "direction": direction,
                    "mask": mask,
                    "peer": name,
                    "p50_us": median(times[name]),
                    **_ratios("by_reference", times[name], times[REFERENCE]),
                    **_ratios("by_compiled", times[name], times[COMPILED]),
                    **counts[name],
                    **how,
                }


def _counts(name: str, call: Call, launched: Callable[[], int]) -> dict[str, Any]:
    """Launches and allocations of one call, once what is compiled on first use is there."""
    call()
    call()
    before = launched()
    call()
    launches = launched() - before if name in KERNELS else None
    if launches == 0:
        raise Failure(
            "launches: expected them in the stub, got none: this process has another libcuda"
        )
    return {"launches": launches, "allocations": allocations(call)}


def _ratios(column: str, times: list[float], by: list[float]) -> dict[str, float]:
    found = median_interval([a / b for a, b in zip(times, by, strict=True)])
    return {column + end: value for end, value in zip(("", "_low", "_high"), found, strict=True)}


# One launch


@contextmanager
def _launches() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any], Any, Any]]]:
    """Each launch within: the kernel, its arguments and options, the launcher and what it got."""
    from triton.runtime.jit import JITFunction

    made: list[Any] = []
    run = JITFunction.run

    def recorded(self: Any, *arguments: Any, **options: Any) -> Any:
        compiled = run(self, *arguments, **options)
        given: list[Any] = []
        launcher = compiled.run
        with mock.patch.object(compiled, "_run", lambda *below: given.append(below)):
            run(self, *arguments, **options)
        made.append((self, arguments, options, launcher, given[0]))
        return compiled

    with mock.patch.object(JITFunction, "run", recorded):
        yield made


def launch_rows(**how: Any) -> Iterator[Row]:
    """Each launch of a step with a mask, by the front and by the launcher below it."""
    from ept_fast.backends.triton import launch, runtime

    runtime.forget()  # a plan's first run goes through the front
    (inputs,) = make_inputs(SHAPE, torch.bfloat16, _CPU, 1)
    forward = peers.operation_of("prompt path", TRITON)
    with _launches() as made:
        out = forward(inputs)
        in_forward = len(made)
        torch.autograd.grad(out, list(inputs.parameters.values()), torch.ones_like(out))
    for number, (kernel, arguments, options, launcher, given) in enumerate(made):
        options = dict(options)
        programs = options.pop("grid")[0]
        del options["warmup"]
        calls: dict[str, Call] = {
            "front": partial(launch.run, kernel, programs, _CPU, *arguments, **options),
            "launcher": partial(launcher, *given),
        }
        times = in_turns(calls, how["rounds"], how["calls"])
        yield {
            "kernel": kernel.fn.__name__,
            "direction": "forward" if number < in_forward else "backward",
            "arguments": len(kernel.arg_names),
            "front_us": median(times["front"]),
            "launcher_us": median(times["launcher"]),
            **how,
        }


# The command


@click.command()
@click.option("--quick", is_flag=True, help="A smoke test: its times mean nothing.")
@click.option(
    "--out", type=click.Path(path_type=Path), help=f"Folder for the CSV files ({FOLDER.name})."
)
def main(quick: bool, out: Path | None) -> None:
    """Time what the host does in our path, beside the definition; nothing needs a GPU."""
    torch.set_num_threads(1)
    origin = {k: v for k, v in origin_of(_CPU).items() if k in _ORIGIN}
    how: dict[str, Any] = {"rounds": 3 if quick else 150, "calls": 2 if quick else 10}
    how |= {"load": os.getloadavg()[0], **origin}
    with stubbed() as launched:
        tables = {PATHS: list(path_rows(launched, **how))}
        tables[LAUNCHES] = list(launch_rows(**how))
    if out is None and not quick:
        out = FOLDER
    for file, found in tables.items():
        table = [
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in found
        ]
        if out is not None:
            write_csv(out / file, table[0], table)
        shown = [name for name in table[0] if name not in how]
        click.echo("\n".join(aligned(shown, ([row[name] for name in shown] for row in table))))


if __name__ == "__main__":
    main()
