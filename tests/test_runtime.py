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
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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
from ept_fast.cli import main as command
from ept_fast.kernels import calls, runtime
from tests.cases import Case, Sizes, laid_out, make_case
from tests.cases import run as run_functions
from tests.parity import TRITON, cotangent_of, needs_interpreter, over
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
    "alignment of the table": (lambda case: replace(case, weight=_later(case.weight)), 1, 1),
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
@STEPS
@pytest.mark.parametrize(
    ("name", "sizes", "new"),
    [
        ("forward_config", {"block_s": 64}, 1),
        ("backward_config", {"block_d": 64}, 1),
        ("reconstruct_config", {"elements": 128}, 2),
    ],
)
def test_other_launch_sizes_are_another_plan(
    name: str,
    sizes: dict[str, int],
    new: int,
    step: Step,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = getattr(calls, name)

    def change(case: Case) -> Case:
        monkeypatch.setattr(calls, name, lambda *known: replace(usual(*known), **sizes))
        return case

    _assert_new_plans(step, _case(), change, new)


def _plan(case: Case, **how: Any) -> runtime.Plan:
    """Of the splice's forward."""
    choices = (0.5, calls.forward_config)
    return runtime.plan_of(calls.describe_splice_forward, case.inputs(), *choices, **how)


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
    one_at_a_time, launch = threading.Lock(), runtime.run

    def alone(*arguments: Any, **options: Any) -> Any:
        with one_at_a_time:  # the interpreter knows one launch only
            return launch(*arguments, **options)

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


# Without a GPU and without the interpreter


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
    done = python("-m", __name__, "forked", timeout=300, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"plans": 2, "free": 0, "held": 0, "afterwards": 2}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
