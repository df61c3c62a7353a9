"""Call plans and direct launches.

Plans are tested in Triton's interpreter. What a launch hands to a compiled kernel is tested in a
process of its own, with the stub of libcuda in place of a GPU: ``python -m tests.test_runtime``
runs one of the programs below and prints what it found.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")

from bench import host_cost
from bench.compiled import cuda_tools
from ept_fast import reconstruct_and_splice
from ept_fast.backends import fused
from ept_fast.backends.triton import calls, launch, runtime
from ept_fast.cli import main as command
from ept_fast.kernels.reconstruct import config as reconstruct_config
from tests.cases import Case, Sizes, make_case
from tests.cases import run as run_functions
from tests.parity import TRITON, cotangent_of, over
from tests.processes import python

pytestmark = pytest.mark.usefixtures("one_thread")

_MISSING = cuda_tools() or (
    None
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    else "no C compiler"
)
needs_tools = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))

Results = dict[str, Tensor]
Step = Callable[[Case], Results]


# A step: forward and backward


def _functions(case: Case) -> Results:
    """By the two functions in a row, whose plans are four."""
    return run_functions(case, "triton", cotangent_of(case))


def _path(case: Case, embeds: Tensor | None = None) -> Results:
    """By both operations in one, whose plans are two."""
    text = {"input_ids": case.input_ids, "weight": case.weight}
    out = reconstruct_and_splice(
        **case.parameters,
        **(text if embeds is None else {"inputs_embeds": embeds}),
        attention_mask=case.attention_mask,
        task_ids=case.task_ids,
        **case.flags,
        backend="triton",
    )
    grads = torch.autograd.grad(out, list(case.parameters.values()), cotangent_of(case))
    return {"output": out.detach(), **dict(zip(case.parameters, grads, strict=True))}


def _assert_same(found: Results, expected: Results) -> None:
    """Equal to the bit."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def _case(tasks: int | None = None, **how: Any) -> Case:
    sizes = Sizes(m=2, n=5, r=2, k=2, h=1, d=4, batch=3, length=4, tasks=tasks)
    return make_case(sizes, dtype=torch.float32, **how)


# Plans


def _later(tensor: Tensor) -> Tensor:
    """The same values and strides, one element later than what is aligned."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


def _of(**flags: Any) -> Callable[[Case], Case]:
    return lambda case: replace(case, flags={**case.flags, **flags})


# What is changed, and the plans that depend on it: of the two functions, and of the path.
CHANGES: dict[str, tuple[Callable[[Case], Case], int, int]] = {
    "strides": (lambda case: case.laid_out("sliced"), 4, 2),
    "order of strides": (lambda case: case.laid_out("transposed"), 4, 2),
    "types": (lambda case: case.typed("bf16"), 4, 2),
    "type of the table": (lambda case: case.typed("bf16 table"), 2, 2),
    "alignment": (lambda case: case.each_tensor(_later), 4, 2),
    "alignment of the table": (lambda case: replace(case, weight=_later(case.weight)), 1, 2),
    "batch": (lambda case: case.rows([0, 2]), 2, 2),
    "no mask": (lambda case: replace(case, attention_mask=None), 2, 2),
    "scaling": (_of(scaling=0.3), 4, 2),
    "temperature": (_of(temperature=0.6), 2, 2),
    "activation": (_of(activation="relu"), 2, 2),
    "gate": (_of(gate="prompt"), 2, 2),
}
STEPS = pytest.mark.parametrize("step", [_functions, _path])


def _assert_new_plans(step: Step, case: Case, change: Callable[[Case], Case], new: int) -> None:
    """So many plans are new after a change; results are those of a process without any other."""
    runtime.forget()
    step(case)
    before = runtime.plans()
    other = change(case)
    changed = step(other)
    assert runtime.plans() == before + new
    runtime.forget()
    _assert_same(step(other), changed)


@over(TRITON)
@STEPS
def test_later_runs_find_the_plans_of_the_first(step: Step, backend: str) -> None:
    """With the same results to the bit; other values in other memory change nothing."""
    runtime.forget()
    case, other = _case(tasks=2), _case(tasks=2, seed=1)
    first = step(case)
    before = runtime.plans()
    assert before == (4 if step is _functions else 2)
    found = step(other)
    _assert_same(step(case), first)
    assert runtime.plans() == before
    runtime.forget()
    _assert_same(step(other), found)


@over(TRITON)
@STEPS
@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_plan(name: str, step: Step, backend: str) -> None:
    change, of_functions, of_path = CHANGES[name]
    _assert_new_plans(step, _case(), change, of_functions if step is _functions else of_path)


@over(TRITON)
@pytest.mark.parametrize("layout", ["sliced", "transposed", "shifted"])
def test_saved_tensors_may_come_back_laid_out_otherwise(layout: str, backend: str) -> None:
    """Hooks of autograd may move them to other memory, with other strides."""
    runtime.forget()
    case = _case()
    expected = _path(case)
    other = case.laid_out(layout)
    _path(other)
    before = runtime.plans()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous().clone()):
        _assert_same(_path(other), expected)
    assert runtime.plans() == before + 1


@over(TRITON)
@STEPS
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("forward_config", {"block_s": 64}),
        ("backward_config", {"block_d": 64}),
        ("reconstruct_forward_config", {"d_tiles": 2, "chunks": 1}),
        ("reconstruct_backward_config", {"d_tiles": 2, "chunks": 1, "n_tiles": 9}),
    ],
)
def test_other_launch_sizes_are_another_plan(
    name: str,
    sizes: dict[str, int],
    step: Step,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = getattr(calls, name)

    def change(case: Case) -> Case:
        monkeypatch.setattr(calls, name, lambda *known: replace(usual(*known), **sizes))
        return case

    # Operation 2 alone is described as both are, with the launch sizes of both.
    alone = step is _functions and name.startswith("reconstruct")
    _assert_new_plans(step, _case(), change, 2 if alone else 1)


def _call(case: Case) -> tuple[Any, ...]:
    """The splice's forward: what describes the call, its tensors, and its choices."""
    parameters, text = case.inputs().parts()
    flags = fused.splice_flags(0.5)
    sizes = calls.reconstruct_forward_config, calls.forward_config
    return calls.describe_path_forward, (*parameters, *text), flags, False, *sizes


def _plan(case: Case, **how: Any) -> runtime.Plan:
    return runtime.plan_of(*_call(case), **how)


def test_a_plan_is_found_again() -> None:
    runtime.forget()
    case = _case()
    found = _plan(case)
    assert _plan(_case(seed=1)) is found
    assert _plan(case.each_tensor(lambda t: t.to("meta"))) is not found
    assert _plan(case.each_tensor(lambda t: t.to("meta"))).device.type == "meta"
    assert _plan(case) is found
    assert runtime.plans() == 2
    runtime.forget()
    assert runtime.plans() == 0
    assert _plan(case) is not found


def test_what_is_known_stands_for_the_tensors() -> None:
    runtime.forget()
    found = _plan(_case(), known="these")
    assert _plan(_case(), known="these") is found
    assert _plan(_case(), known="those") is not found
    assert _plan(_case()) is not found


def _texts(lengths: range) -> list[Case]:
    sizes = Sizes(m=2, n=9, r=2, d=5, batch=2)
    return [
        make_case(replace(sizes, length=n), padding="none", dtype=torch.float32) for n in lengths
    ]


def test_the_plan_unused_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.forget()
    monkeypatch.setattr(runtime, "PLANS", 4)
    cases = _texts(range(1, 7))
    found = [_plan(case) for case in cases[:4]]
    assert _plan(cases[0]) is found[0]  # the second is now the one unused for longest
    found += [_plan(cases[4])]
    assert runtime.plans() == 4
    for i in (0, 2, 3, 4):
        assert _plan(cases[i]) is found[i]
    found += [_plan(cases[5])]
    assert runtime.plans() == 4
    for i in (5, 4, 3, 2):
        assert _plan(cases[i]) is found[i]
    assert _plan(cases[1]) is not found[1]
    assert _plan(cases[0]) is not found[0]


def _splice(case: Case) -> Results:
    out, _ = calls.splice_forward(case.inputs(), 0.5)
    return {"output": out}


@over(TRITON)
def test_results_stay_right_while_plans_go(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.forget()
    cases = _texts(range(1, 8))
    expected = [_splice(case) for case in cases]
    assert runtime.plans() == len(cases)
    runtime.forget()
    monkeypatch.setattr(runtime, "PLANS", 4)
    order = random.Random(0).choices(range(len(cases)), k=30)
    for i in order:
        _assert_same(_splice(cases[i]), expected[i])
        assert runtime.plans() <= 4


@over(TRITON)
def test_threads(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share few plans, which change all the time."""
    runtime.forget()
    cases = _texts(range(1, 7))
    expected = [_splice(case) for case in cases]
    runtime.forget()
    monkeypatch.setattr(runtime, "PLANS", 3)
    one_at_a_time, run = threading.Lock(), runtime.run

    def alone(*arguments: Any, **options: Any) -> Any:
        with one_at_a_time:  # the interpreter knows one launch only
            return run(*arguments, **options)

    monkeypatch.setattr(runtime, "run", alone)
    begin = threading.Barrier(8)

    def many(seed: int) -> None:
        begin.wait(60)
        for i in random.Random(seed).choices(range(len(cases)), k=16):
            _assert_same(_splice(cases[i]), expected[i])
            assert runtime.plans() <= 3

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(many, range(8)))


def test_two_threads_with_the_same_new_plan_take_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.forget()
    monkeypatch.setattr(runtime, "PLANS", 2)
    old = _plan(_case())
    both = threading.Barrier(2)

    def describe(plan: runtime.Plan) -> None:
        both.wait(60)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: runtime.plan_of(describe, [torch.ones(1)]), range(2)))
    assert runtime.plans() == 2
    assert _plan(_case()) is old


def test_a_new_plan_is_the_one_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a thread that makes another one before the first has its plan in hand."""
    runtime.forget()
    monkeypatch.setattr(runtime, "PLANS", 2)
    _plan(_case())
    seen: list[bool] = []

    class Lock:
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            kept = sorted(runtime._plans.values(), key=lambda plan: plan.last_used)
            seen.append(kept[-1].inputs[0].shape == (7,))

    monkeypatch.setattr(runtime, "_lock", Lock())
    runtime.plan_of(lambda plan: None, [torch.ones(7)])
    assert seen == [True]


# Processes of their own


def _program(name: str, **variables: str | None) -> Any:
    """What one of this file's programs prints."""
    done = python("-m", __name__, name, timeout=900, OMP_NUM_THREADS="1", **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def forked() -> dict[str, int]:
    """Exit status of a child that computes as its parent, by whether a thread held the lock."""
    torch.set_num_threads(1)
    case = _case()
    expected = _path(case)
    plans = runtime.plans()
    found = {"plans": plans}
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with runtime._lock:
            held.set()
            done.wait()

    for name in ("free", "held"):
        if name == "held":
            threading.Thread(target=hold, daemon=True).start()
            assert held.wait(60)
        child = os.fork()
        if child == 0:
            signal.alarm(100)  # ends a child that waits for ever
            code = 1
            try:
                assert runtime.plans() == 0
                _assert_same(_path(case), expected)
                assert runtime.plans() == plans
                code = 0
            finally:
                os._exit(code)
        found[name] = os.waitpid(child, 0)[1]
    done.set()
    found["afterwards"] = runtime.plans()
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_makes_its_own_plans() -> None:
    found = _program("forked", TRITON_INTERPRET="1")
    assert found == {"plans": 2, "free": 0, "held": 0, "afterwards": 2}


# Direct launches, with the stub of libcuda


class _Memory(TorchDispatchMode):
    """Gives the second run of a plan the memory that the first has taken."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Tensor] = []
        self.again: Iterator[Tensor] | None = None

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        out = function(*arguments, **(named or {}))
        takes = function.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like)
        if not takes or out.numel() == 0:
            return out
        if self.again is None:
            self.taken.append(out)
            return out
        found = next(self.again)
        assert (found.shape, found.stride(), found.dtype) == (out.shape, out.stride(), out.dtype)
        return found

    def start_again(self) -> None:
        self.again = iter(self.taken)


def _plain(argument: Any) -> Any:
    """What a launch is given, as JSON has it: a tensor by its address, no hooks as nothing."""
    from triton.compiler.compiler import LazyDict
    from triton.knobs import HookChain

    if isinstance(argument, Tensor):
        argument = argument.data_ptr()
    if isinstance(argument, LazyDict) or (isinstance(argument, HookChain) and not argument.calls):
        argument = None
    if isinstance(argument, (tuple, list)):
        return [_plain(each) for each in argument]
    return repr(argument)  # which tells 1, 1.0 and True apart


@contextmanager
def _launched() -> Iterator[list[dict[str, Any]]]:
    """All that reaches the function in C below the launchers of compiled kernels."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.knobs import HookChain

    made: list[dict[str, Any]] = []
    prepare = CudaLauncher.__init__

    def prepared(self: Any, source: Any, metadata: Any) -> None:
        prepare(self, source, metadata)
        below = self.launch

        def noted(*given: Any) -> None:
            way = "front" if any(isinstance(each, HookChain) for each in given) else "direct"
            names = {"kernel": metadata.name, "compiled": metadata.hash}
            said, arguments = given[:13], given[13:]
            if hasattr(self, "kernel_signature"):  # before the arguments, in one tuple
                arguments = arguments[2]
            types = launch.leaves(tuple(source.signature.values()))
            taken = [
                value
                for value, kind in zip(launch.leaves(arguments), types, strict=True)
                if kind != "constexpr"
            ]
            shown = _plain((said, taken))
            made.append({"way": way, **names, "given": shown, "stream": given[3]})
            below(*given)

        self.launch = noted

    with mock.patch.object(CudaLauncher, "__init__", prepared):
        yield made


def _ways(made: list[dict[str, Any]]) -> list[str]:
    """The ways that the launches since the last time have gone."""
    found = [each["way"] for each in made]
    made.clear()
    return found


def _calls() -> dict[str, Callable[[], object]]:
    """Forward and backward: each operation, and both in one."""
    found: dict[str, Callable[[], object]] = {}
    for tasks, padding in product((None, 2, 7), ("none", "holes")):
        case = make_case(
            Sizes(m=5, n=33, r=3, d=16, batch=3, length=17, tasks=tasks),
            padding=padding,
            dtype=torch.float32,
        ).typed("bf16 table")
        name = f"{tasks}, {padding}"
        embeds = case.weight[case.input_ids]
        prompt = case.parameters["short_prompt"]
        found[f"{name}, functions"] = partial(_functions, case)
        found[f"{name}, path"] = partial(_path, case)
        found[f"{name}, path, embeds"] = partial(_path, case, embeds)

        def spliced(case: Case = case, prompt: Tensor = prompt, embeds: Tensor = embeds) -> None:
            case.splice(prompt, "triton", inputs_embeds=embeds).backward(cotangent_of(case))

        found[f"{name}, splice, embeds"] = spliced
    case = make_case(Sizes(m=5, n=33, r=3, d=16, length=17), dtype=torch.float32)
    for layout in ("transposed", "shifted"):
        found[layout] = partial(_path, case.laid_out(layout))
    found["a later element"] = partial(_path, case.each_tensor(_later))
    found["no fusion"] = partial(_path, _of(fusion=False)(case))
    wide = make_case(Sizes(m=5, n=33, r=3, d=80, length=17), dtype=torch.float32)

    def in_three() -> None:
        with mock.patch.object(reconstruct_config, "MOST_REPEATED", 0):
            _path(wide)

    found["nothing repeated"] = in_three
    return found


def compared() -> list[dict[str, Any]]:
    """Of each call and plan, the launches of its first run and of its second."""
    found: list[dict[str, Any]] = []
    with host_cost.stubbed(), _launched() as made:

        def twice(describe: Any, tensors: Any, *choices: Any, **how: Any) -> Any:
            plan = runtime.plan_of(describe, tensors, *choices, **how)
            memory, runs = _Memory(), []
            for _ in range(2):
                with memory:
                    results = plan.carry_out(tensors)
                memory.start_again()
                runs.append(made.copy())
                made.clear()
            front, direct = runs
            found.append(
                {"call": name, "plan": describe.__name__, "front": front, "direct": direct}
            )
            return results

        with mock.patch.object(runtime, "call", twice):
            for name, run in _calls().items():  # noqa: B007 (`twice` uses the name)
                runtime.forget()
                run()
    return found


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    """What :func:`compared` finds in a process of its own."""
    found: list[dict[str, Any]] = _program("compared")
    return found


@needs_tools
@pytest.mark.slow
def test_direct_launches_are_those_of_the_front(runs: list[dict[str, Any]]) -> None:
    """The same compiled kernels in the same order, with the same grid, stream and arguments."""
    for run in runs:
        front, direct = run["front"], run["direct"]
        assert front, run["call"]
        for launches, way in ((front, "front"), (direct, "direct")):
            assert [each.pop("way") for each in launches] == [way] * len(launches)
        assert direct == front, (run["call"], run["plan"])


@needs_tools
@pytest.mark.slow
def test_every_kernel_is_compared(runs: list[dict[str, Any]]) -> None:
    files = (
        *(f"reconstruct.{name}" for name in ("core", "forward", "backward")),
        *(f"splice.{name}" for name in ("plan", "forward", "backward")),
    )
    kernels = {
        name
        for file in files
        for name in vars(import_module(f"ept_fast.kernels.{file}"))
        if name.endswith("_kernel")
    }
    assert {each["kernel"] for run in runs for each in run["direct"]} == kernels
    assert {run["plan"] for run in runs} == {
        name for name in calls.__all__ if name.startswith("describe_")
    }


def ways() -> dict[str, Any]:
    """How launches of the splice's forward go: two of them with a mask, one after the other."""
    from triton import knobs
    from triton.runtime import driver

    found: dict[str, Any] = {}
    torch.set_num_threads(1)
    with host_cost.stubbed() as launches, _launched() as made:
        case = _case()
        call = partial(calls.splice_forward, case.inputs(), 0.5)

        def way() -> list[str]:
            call()
            return _ways(made)

        before = launches()
        found["first, later, later"] = [way(), way(), way()]
        found["launches"] = launches() - before

        hooked: list[str] = []
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        for name, hook in (("enter", enter), ("exit", leave)):

            def note(metadata: Any) -> None:
                hooked.append(metadata.get()["name"])

            hook.add(note)
            found[name] = [way(), hooked.copy()]
            hooked.clear()
            hook.remove(note)
            found[f"after {name}"] = [way(), hooked.copy()]

        for name, owner, attribute, value in (
            ("untried", launch, "TRIED", ()),
            ("another GPU", fused, "_forced_target", "gfx942"),
        ):
            runtime.forget()
            with mock.patch.object(owner, attribute, value):
                found[name] = [way(), way(), launch.launcher()]
        runtime.forget()
        way()

        memory = _Memory()
        with memory:
            out, (kept,) = call()
        taken = [each.nbytes for each in memory.taken]
        found["allocations"] = [host_cost.allocations(call), taken, out.nbytes, kept.nbytes]
        found["allocating"] = _ways(made)

        for stream in (5, 6):
            with mock.patch.object(driver.active, "get_current_stream", {0: stream}.get):
                call()
        call()
        found["streams"] = [each["stream"] for each in made]

        # A plan of tensors on device 1; its memory is a CPU's.
        runtime.forget()
        plan, inputs = _plan(case), _call(case)[1]
        plan.device = torch.device("cuda", 1)
        plan.carry_out(inputs)
        made.clear()
        switched: list[list[int]] = []

        def switch(index: int) -> int:
            switched.append([index, len(made)])
            return 0

        for current in (0, 1):
            with ExitStack() as stack:
                for name in ("_exchange_device", "_maybe_exchange_device"):
                    stack.enter_context(mock.patch.object(torch.cuda, name, switch))
                for name, answer in (
                    ("get_current_device", partial(int, current)),
                    ("get_current_stream", {0: 100, 1: 101}.get),
                ):
                    stack.enter_context(mock.patch.object(driver.active, name, answer))
                plan.carry_out(inputs)
            streams = [each["stream"] for each in made]
            found[f"device 1, current {current}"] = [switched.copy(), streams, _ways(made)]
            switched.clear()
    return found


@pytest.fixture(scope="module")
def found_ways() -> dict[str, Any]:
    """What :func:`ways` finds in a process of its own."""
    found: dict[str, Any] = _program("ways")
    return found


_FRONT, _DIRECT = ["front"] * 2, ["direct"] * 2
_KERNELS = ["splice_plan_kernel", "splice_forward_kernel"]


@needs_tools
def test_a_plan_launches_directly_from_its_second_run_on(found_ways: dict[str, Any]) -> None:
    assert found_ways["first, later, later"] == [_FRONT, _DIRECT, _DIRECT]
    assert found_ways["launches"] == 6


@needs_tools
@pytest.mark.parametrize("hook", ["enter", "exit"])
def test_a_hook_is_told_of_every_launch(hook: str, found_ways: dict[str, Any]) -> None:
    assert found_ways[hook] == [_FRONT, _KERNELS]
    assert found_ways[f"after {hook}"] == [_DIRECT, []]


@needs_tools
def test_another_triton_launches_through_the_front(found_ways: dict[str, Any]) -> None:
    first, later, (direct, reason) = found_ways["untried"]
    assert (first, later, direct) == (_FRONT, _FRONT, False)
    version = ".".join(map(str, launch.triton_version() or ()))
    assert reason == f"through Triton's front: triton {version} is none of those tried ()"


@needs_tools
def test_another_gpu_launches_through_the_front(found_ways: dict[str, Any]) -> None:
    first, later, _ = found_ways["another GPU"]
    assert (first, later) == (_FRONT, _FRONT)


@needs_tools
def test_a_direct_run_allocates_the_result_and_what_is_kept(found_ways: dict[str, Any]) -> None:
    number, taken, result, kept = found_ways["allocations"]
    assert (number, taken) == (2, [result, kept])
    assert kept > 0
    assert found_ways["allocating"] == _DIRECT * 2


@needs_tools
def test_launches_go_to_the_current_stream(found_ways: dict[str, Any]) -> None:
    assert found_ways["streams"] == [5, 5, 6, 6, 0, 0]


@needs_tools
def test_launches_go_to_the_tensors_device(found_ways: dict[str, Any]) -> None:
    """It is made the current one before the launches, and the other one again after them."""
    assert found_ways["device 1, current 0"] == [[[1, 0], [0, 2]], [101, 101], _DIRECT]
    assert found_ways["device 1, current 1"] == [[], [101, 101], _DIRECT]


class _Launcher:
    """Of a compiled kernel, as far as it needs no driver."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = source.signature
        self.launch = mock.Mock()
        self.global_scratch_size, self.profile_scratch_size = metadata
        self.launch_cooperative_grid, self.launch_pdl = "cooperative", "pdl"
        self.__dict__.update({name: name for name in _OWN})


_OWN: tuple[str, ...] = ()  # what Triton 3.7's launcher has and 3.6's has not


def _made(scratch: tuple[int, int] = (0, 0)) -> Any:
    signature = {"x": ["*fp32", "constexpr"], "size": "i32", "BLOCK": "constexpr"}
    run = _Launcher(mock.Mock(signature=signature), scratch)
    named = {"function": "function", "packed_metadata": "packed", "metadata": scratch}
    return mock.Mock(run=run, src=mock.Mock(signature=signature), **named)


@pytest.mark.parametrize("scratch", [(8, 0), (0, 8)])
def test_a_kernel_that_needs_memory_is_launched_by_the_front(scratch: tuple[int, int]) -> None:
    assert launch.launch_of(_made(scratch), 3) is None


def test_what_has_compiled_nothing_is_launched_by_the_front() -> None:
    assert launch.launch_of(None, 3) is None


def test_the_function_below_is_called_as_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each argument in its place, which two that are alike in every kernel would not show."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    names = driver.CudaLauncher.__init__.__code__.co_names
    own = [name for name in ("arg_annotations", "kernel_signature") if name in names]
    monkeypatch.setitem(globals(), "_OWN", tuple(own))
    made = _made()
    launched = []
    prepare = _Launcher.__init__

    def prepared(self: Any, *given: Any) -> None:
        prepare(self, *given)
        launched.append(self)

    monkeypatch.setattr(_Launcher, "__init__", prepared)
    found = launch.launch_of(made, 3)
    assert found is not None
    direct, taken = found
    assert taken == [0, 2]
    direct(7, (1, 2))
    (flat,) = launched
    assert flat.signature == {0: "*fp32", 1: "i32"}
    by_launcher = driver.CudaLauncher.__new__(driver.CudaLauncher)
    by_launcher.__dict__.update(vars(flat), launch=mock.Mock())
    by_launcher.global_scratch_align = by_launcher.profile_scratch_align = 1
    by_launcher(3, 1, 1, 7, "function", "packed", None, None, None, 1, 2)
    assert flat.launch.call_args == by_launcher.launch.call_args


# What is said of it


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ((3, 7, 1), "direct launches, triton 3.7.1"),
        ((3, 6, 0), "direct launches, triton 3.6.0"),
        (
            (3, 9, 0),
            "through Triton's front: triton 3.9.0 is none of those tried (3.6, 3.7)",
        ),
    ],
)
def test_info_says_how_launches_go(
    version: tuple[int, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(fused, "_forced_target", "sm_90")
    monkeypatch.setattr(launch, "triton_version", lambda: version)
    for name, answer in (
        ("is_available", True),
        ("current_device", 0),
        ("device_count", 1),
        ("get_device_name", "a GPU"),
        ("get_device_capability", (9, 0)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *index, answer=answer: answer)
    done = CliRunner().invoke(command, ["info"])
    assert done.exit_code == 0, done.output
    line = next(x for x in done.stdout.splitlines() if x.startswith("backend triton "))
    assert line.endswith(f"works (fused kernels for sm_90, {said})")


def test_without_triton_there_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "triton_version", lambda: None)
    assert launch.launcher() == (False, "triton is not installed")


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
