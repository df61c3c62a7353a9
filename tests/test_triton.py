"""The Triton kernels under Triton's interpreter: memory traffic, launches, memory, selection."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ept_fast import EPTConfig, EPTOutput, FusedEPTPrompt
from ept_fast.backends import triton
from ept_fast.backends.triton import launch, runtime
from ept_fast.kernels.reconstruct import config as reconstruct_config
from ept_fast.kernels.splice.config import backward_config, forward_config, gather_options
from ept_fast.ops import path
from ept_fast.ops.types import Flags, Parameters, SpliceInputs
from tests.cases import (
    BIASED,
    GATES,
    LARGEST,
    NAMED,
    PADDINGS,
    PARTS,
    Sizes,
    make_case,
    shapes_of,
)
from tests.parity import (
    TRITON,
    assert_as_exact_as_the_definition,
    cotangent_of,
    needs_interpreter,
    over,
)

pytestmark = [needs_interpreter, pytest.mark.usefixtures("one_thread")]


# Memory traffic


class _Traffic:
    """Addresses of the elements that kernels load and store, launch after launch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.loads: list[Any] = []
        self.stores: list[Any] = []
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def loaded(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self.loads.append(ptrs.data[mask.data.astype(bool)])
            return load(builder, ptrs, mask, *rest)

        def stored(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.stores.append(ptrs.data[mask.data.astype(bool)])
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loaded)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", stored)

    def of(self, tensor: Tensor, accesses: list[Any]) -> Any:
        """How often each element of the tensor's memory was accessed."""
        first = tensor.untyped_storage().data_ptr()
        size = tensor.untyped_storage().nbytes() // tensor.itemsize
        # Pages of a tensor lie together; addresses outside it are other tensors'.
        index = (np.concatenate(accesses).astype(np.int64) - first) // tensor.itemsize
        return np.bincount(index[(index >= 0) & (index < size)], minlength=size)

    def moved(self) -> int:
        """Bytes of all 32-byte sectors touched: what memory delivers or takes at least once."""
        return 32 * sum(
            len(np.unique(np.concatenate(each).astype(np.int64) // 32))
            for each in (self.loads, self.stores)
        )


@over(TRITON)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("tasks", [None, 2, 5])
def test_each_element_moves_once(
    tasks: int | None, padding: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings are read once, outputs written once, gradients of real tokens read once."""
    sizes = Sizes(m=5, n=34, r=3, d=66, batch=3, length=33, tasks=tasks)
    case = make_case(sizes, padding=padding, dtype=torch.float32)
    embeds = case.weight[case.input_ids]
    real = torch.ones(3, 33) if case.attention_mask is None else case.attention_mask
    traffic = _Traffic(monkeypatch)
    inputs = case.inputs(input_ids=None, weight=None, inputs_embeds=embeds)
    out, kept = triton.splice_forward(inputs, 0.5)
    assert (traffic.of(embeds, traffic.loads) == 1).all()
    assert (traffic.of(out, traffic.stores) == 1).all()
    traffic.loads.clear()
    grad = torch.randn_like(out)
    triton.splice_backward(grad, inputs, kept, 0.5, True, True)
    expected = torch.cat([torch.ones(3, 5), real.float()], 1).unsqueeze(-1).expand(3, 38, 66)
    read = torch.from_numpy(traffic.of(grad, traffic.loads)).reshape(3, 38, 66)
    assert torch.equal(read.float(), expected)


@over(TRITON)
@pytest.mark.parametrize("tasks", [None, 2, 5])
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_the_mask_is_read_at_most_twice(
    padding: str, tasks: int | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward together: once, and once more in rows with holes."""
    sizes = Sizes(m=5, n=34, r=3, d=66, batch=3, length=33, tasks=tasks)
    case = make_case(sizes, padding=padding, dtype=torch.float32)
    assert case.attention_mask is not None
    traffic = _Traffic(monkeypatch)
    case.both(backend).sum().backward()
    read = traffic.of(case.attention_mask, traffic.loads).reshape(3, 33)
    real = case.attention_mask.numpy()
    steps = np.abs(np.diff(real, axis=1, prepend=0, append=0)).sum(1)
    assert (read == np.where(steps > 2, 2, 1)[:, None]).all()


@over(TRITON)
@pytest.mark.parametrize("tasks", [None, 2])
def test_one_product_for_each_tile(
    tasks: int | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program multiplies A and B once for its rows of a task, by three products of bfloat16."""
    from triton.runtime.interpreter import InterpreterBuilder

    sizes = Sizes(m=5, n=34, r=3, d=66, batch=6, length=33, tasks=tasks)
    case = make_case(sizes, padding="holes", dtype=torch.float32).typed("bf16 table")
    if tasks:
        case = replace(case, task_ids=torch.tensor([1, 0, 1, 0, 0, 1]))
    dots = 0
    dot = InterpreterBuilder.create_dot

    def counted(*arguments: Any) -> Any:
        nonlocal dots
        dots += 1
        return dot(*arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    config = forward_config(6, 33, 5, 66, 3, bool(tasks), torch.bfloat16)
    case.splice(case.parameters["short_prompt"].detach(), backend)
    tiles = -(-33 // config.block_s) * -(-66 // config.block_d)
    starts = range(0, 6, config.rows)  # of programs, in the rows sorted by task
    runs = [{slot // 3 for slot in range(i, min(i + config.rows, 6))} for i in starts]
    assert dots == 3 * tiles * (sum(map(len, runs)) if tasks else len(starts))


@over(TRITON)
def test_gathered_rows_move_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of their size is made: they are read where they are written, and their gradients from
    the output's, each once, in one launch each way.
    """
    sizes = Sizes(m=4, d=300, batch=3, length=9)
    case = make_case(sizes, offset=False, padding="none", dtype=torch.float32)
    rows = torch.randint(-1, 4, (3, 20), generator=torch.Generator().manual_seed(1))
    inputs = case.inputs(prompt_rows=rows)
    assert gather_options(300)["BLOCK_D"] < 300  # more than one block of channels
    traffic = _Traffic(monkeypatch)
    out, kept = triton.splice_forward(inputs, 0.5)
    assert sum(tensor.numel() for tensor in kept) == 0
    assert (traffic.of(out, traffic.stores) == 1).all()
    traffic.loads.clear()
    grad = torch.randn_like(out)
    d_prompt = triton.splice_backward(grad, inputs, kept, 0.5, True, False).prompt
    assert (traffic.of(d_prompt, traffic.stores) == 1).all()
    read = torch.from_numpy(traffic.of(grad, traffic.loads)).reshape(grad.shape)
    named = torch.nn.functional.pad(rows >= 0, (0, 9)).unsqueeze(-1)
    assert torch.equal(read, named.expand(grad.shape).long())
    counted = _Counted(monkeypatch)
    triton.splice_forward(inputs, 0.5)
    triton.splice_backward(grad, inputs, kept, 0.5, True, False)
    assert counted.names == ["splice_forward_kernel", "splice_gather_backward_kernel"]


@pytest.mark.slow
def test_a_bank_moves_hardly_more_than_one_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch 64: one prompt, eight of them, and one for each row.

    The prompts themselves have to be read; the text is long enough here for them to be few.
    """
    moved: dict[int | None, int] = {}
    for tasks in (None, 8, 64):
        sizes = Sizes(m=2, n=96, r=2, d=64, batch=64, length=96, tasks=tasks)
        case = make_case(sizes, padding="none", dtype=torch.float32)
        if tasks:
            case = replace(case, task_ids=torch.arange(64) % tasks)
        embeds = case.weight[case.input_ids]
        traffic = _Traffic(monkeypatch)
        out = case.splice(case.parameters["short_prompt"], "triton", inputs_embeds=embeds)
        forward = traffic.moved()
        # Everything of the forward is still there: no address of it can come again below.
        traffic.loads.clear()
        traffic.stores.clear()
        out.backward(cotangent_of(case))
        moved[tasks] = forward + traffic.moved()
        monkeypatch.undo()
    assert moved[8] <= 1.1 * moved[None]
    assert moved[64] <= 1.1 * moved[None]


# Launches and memory


FLAGS = Flags(0.5, "gelu", "token", 1.0)


class _Counted:
    """Launches by kernel, in order; none of them runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []

        def counted(plan: runtime.Plan, *rest: Any) -> None:
            self.names += plan.kernels
            assert all(0 < launch.programs < 2**31 for launch in plan.launches)

        monkeypatch.setattr(runtime.Plan, "launch_all", counted)


@pytest.mark.parametrize("part", [*PARTS, "biases", "biases, no gate"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("sizes", [Sizes(), Sizes(tasks=9), *NAMED.values()])
def test_launches(sizes: Sizes, gate: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most three each way for the first operation; for the second one and two, and one more for
    where the rows' tokens lie, if there is a mask or a bank.
    """
    counted = _Counted(monkeypatch)
    length = min(sizes.length, 64) if part in BIASED else sizes.length
    sizes, parts = replace(sizes, batch=4, length=length), (PARTS | BIASED)[part]
    case = make_case(sizes, gate=gate, dtype=torch.float32, **parts)
    prompt = case.reconstruct("triton")
    assert len(counted.names) <= 3
    counted.names.clear()
    out = case.splice(prompt.detach().requires_grad_(), "triton")
    planned = case.task_ids is not None or (
        case.attention_mask is not None and "offset_a" in case.parameters
    )
    assert counted.names == ["splice_plan_kernel"] * planned + ["splice_forward_kernel"]
    counted.names.clear()
    out.backward(cotangent_of(case))
    assert len(counted.names) <= 2
    counted.names.clear()
    prompt.backward(torch.ones_like(prompt))
    assert len(counted.names) <= 3


class _Asked(TorchDispatchMode):
    """Names of PyTorch's operators in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize(("part", "m"), [("all", 3), ("no offset", 3), ("prompt only", 130)])
@pytest.mark.parametrize("kind", ["none", "bool", "uint8", "int32", "strided int64"])
def test_mask_and_positions(
    kind: str, part: str, m: int, tasks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module's call has them written by the launch for where the rows' tokens lie, without a
    mask by the splice itself, and no operator of PyTorch launches anything.
    """
    sizes = Sizes(m=m, n=140, r=2, k=2, h=1, d=4, batch=3, length=135, tasks=tasks)
    case = make_case(sizes, dtype=torch.float32, **PARTS[part])
    rank, spaces = ("offset_a" in case.parameters) * 2, ("space_down" in case.parameters) * 2
    config = EPTConfig(4, m, 140, rank, num_spaces=spaces, space_dim=1)
    masks = {} if kind == "none" else {"attention_mask": case.attention_mask}
    if kind == "strided int64":
        masks["attention_mask"] = case.attention_mask.repeat_interleave(2, 1)[:, ::2]
    elif masks:
        masks["attention_mask"] = case.attention_mask.to(getattr(torch, kind))
    given = {"inputs_embeds": case.weight[case.input_ids], "task_ids": case.task_ids, **masks}

    def called(backend: str) -> EPTOutput:
        prompt = FusedEPTPrompt.from_tensors(
            config, case.parameters, num_tasks=tasks, backend=backend
        )
        return prompt(**given)

    found, expected = called("triton"), called("eager")
    assert torch.equal(found.attention_mask, expected.attention_mask)
    assert torch.equal(found.position_ids, expected.position_ids)
    assert found.attention_mask.dtype == expected.attention_mask.dtype
    assert found.position_ids.dtype == expected.position_ids.dtype
    counted = _Counted(monkeypatch)
    monkeypatch.setattr(path, "values_are_checked", lambda device: False)  # as on a GPU
    with _Asked() as asked:
        called("triton")
    planned = bool(masks) or tasks is not None
    assert counted.names.count("splice_plan_kernel") == planned
    assert len(counted.names) <= 2 + planned
    assert set(asked.names) <= {"empty", "new_empty", "detach"}


REDUCE, ATTEND, FORWARD, BACKWARD = (
    f"reconstruct_{name}_kernel" for name in ("reduce", "attend", "forward", "backward")
)


@pytest.mark.default_algorithms
@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        (Sizes(), [FORWARD], [BACKWARD]),
        (NAMED["t5-base"], [FORWARD], [BACKWARD]),
        (replace(NAMED["t5-base"], d=800), [FORWARD], [BACKWARD]),
        (replace(NAMED["t5-base"], d=864), [FORWARD], [REDUCE, BACKWARD]),
        (replace(NAMED["t5-base"], d=1024), [REDUCE, FORWARD], [REDUCE, BACKWARD]),
        (NAMED["llama-8b"], [REDUCE, FORWARD], [REDUCE, BACKWARD, BACKWARD]),
        (NAMED["long"], [REDUCE, ATTEND, FORWARD], [REDUCE, BACKWARD, BACKWARD]),
        (NAMED["bank"], [FORWARD], [BACKWARD]),
    ],
    ids=["small", "t5-base", "d=800", "d=864", "t5-large", "llama-8b", "long", "bank"],
)
def test_the_rule_of_launches(
    sizes: Sizes, forward: list[str], backward: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One each way, unless the programs would repeat too much."""
    counted = _Counted(monkeypatch)
    parameters, _ = _tensors(sizes)
    prompt, saved = triton.reconstruct_forward(parameters, FLAGS)
    assert counted.names == forward
    counted.names.clear()
    triton.reconstruct_backward(prompt, parameters, saved, FLAGS)
    assert counted.names == backward


class _Allocated(TorchDispatchMode):
    """Sizes in bytes of all new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and "empty" in func.name():
            self.sizes.append(result.untyped_storage().nbytes())
        return result


def _tensors(s: Sizes) -> tuple[Parameters, SpliceInputs]:
    """Of both operations, in memory that is never touched."""
    ids = torch.zeros(s.batch, s.length, dtype=torch.int64)
    tasks = None if s.tasks is None else torch.zeros(s.batch, dtype=torch.int64)
    table = torch.empty(11, s.d, dtype=torch.bfloat16)
    parameters = Parameters(
        **{name: torch.empty(s.tasks or 1, *shape) for name, shape in shapes_of(s).items()}
    )
    prompt, a, b = parameters[:3]
    return parameters, SpliceInputs(prompt, ids, table, None, a, b, torch.ones_like(ids), tasks)


@pytest.mark.default_algorithms
@pytest.mark.parametrize("name", NAMED)
def test_workspace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond outputs, gradients and what is saved: under 16 MB, nothing of size n×d or m×K×d.

    One very long row is the exception: its parts of dA and dB take a tenth of the gradient's
    memory, since fewer programs would leave a GPU idle.
    """
    counted = _Counted(monkeypatch)
    s = NAMED[name]
    parameters, inputs = _tensors(s)
    most = 16 * 1024 * 1024
    most_of_splice = s.batch * s.length * s.d * 2 // 10 if name == "long" else most

    def beyond(allocated: _Allocated, *wanted: Tensor) -> int:
        return sum(allocated.sizes) - sum(w.untyped_storage().nbytes() for w in wanted)

    with _Allocated() as allocated:
        prompt, saved = triton.reconstruct_forward(parameters, FLAGS)
    assert beyond(allocated, prompt, *saved) < most
    with _Allocated() as allocated:
        grads = triton.reconstruct_backward(prompt, parameters, saved, FLAGS)
    assert beyond(allocated, *(grad for grad in grads if grad is not None)) < most
    with _Allocated() as allocated:
        out, kept = triton.splice_forward(inputs, 0.5)
    assert beyond(allocated, out, *kept) == 0
    assert kept[0].numel() < 5 * s.batch * (s.length + 16)
    with _Allocated() as allocated:
        three = triton.splice_backward(out, inputs, kept, 0.5, True, True)
    assert beyond(allocated, *three) < most_of_splice
    assert len(counted.names) <= 10


@pytest.mark.default_algorithms
@pytest.mark.parametrize("name", LARGEST)
def test_grids_of_the_largest_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All limits at once make grids that a GPU can have; no kernel runs, no memory is touched."""
    counted = _Counted(monkeypatch)
    parameters, inputs = _tensors(LARGEST[name])
    prompt, saved = triton.reconstruct_forward(parameters, FLAGS)
    triton.reconstruct_backward(prompt, parameters, saved, FLAGS)
    out, kept = triton.splice_forward(inputs, 0.5)
    triton.splice_backward(out, inputs, kept, 0.5, True, True)
    assert len(counted.names) <= 10


@over(TRITON)
@pytest.mark.parametrize("tasks", [None, 2])
def test_programs_that_take_several_tiles(
    tasks: int | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if memory for the parts is short: each adds to what it has written before."""
    from ept_fast.backends.triton import calls

    def few(config: Any) -> Any:
        return lambda *sizes: replace(config(*sizes), tiles_d=2, tiles=2, rows=9)

    monkeypatch.setattr(calls, "backward_config", few(backward_config))
    sizes = Sizes(m=17, n=70, r=5, k=2, h=6, d=66, batch=9, length=65, tasks=tasks)
    cases = (
        make_case(sizes, padding=padding, dtype=torch.float32, seed=seed)
        for seed, padding in enumerate(("right", "holes") * 2)
    )
    assert_as_exact_as_the_definition(cases, "triton")


@over(TRITON)
@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("programs", "most", "launches"),
    [(1, 2_000_000, 1), (128, 18_500, 2), (128, 0, 3)],
    ids=["nothing repeated", "products first", "core first"],
)
def test_every_way_to_launch_reconstruct(
    programs: int,
    most: int,
    launches: int,
    gate: str,
    tasks: int | None,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if the sizes asked for it."""
    monkeypatch.setattr(reconstruct_config, "_PROGRAMS", programs)
    monkeypatch.setattr(reconstruct_config, "MOST_REPEATED", most)
    sizes = Sizes(m=17, n=70, r=5, k=2, h=6, d=66, batch=2, length=5, tasks=tasks)
    names: list[str] = []
    carry_out = runtime.Plan.carry_out

    def counted(plan: runtime.Plan, tensors: Any) -> Any:
        names.extend(plan.kernels)
        return carry_out(plan, tensors)

    monkeypatch.setattr(runtime.Plan, "carry_out", counted)
    runtime.forget()
    flags = {"gate": gate, "dtype": torch.float32}
    cases = [make_case(sizes, **flags, seed=seed) for seed in range(4)]
    if tasks is None and gate == "prompt":
        cases += [make_case(sizes, **flags, biases=True, seed=seed) for seed in range(2)]
    assert_as_exact_as_the_definition(cases, "triton")
    runtime.forget()
    assert sum(name.startswith("reconstruct_") for name in names) == 2 * launches * len(cases)


@over(TRITON)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_programs_that_share_a_place_store_the_same_bits(
    gate: str, biases: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what a program reads would depend on which of them came last."""
    from triton.runtime.interpreter import InterpreterBuilder

    stored: dict[int, bytes] = {}
    shared = 0
    store = InterpreterBuilder.create_masked_store

    def compared(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        nonlocal shared
        there = mask.data.astype(bool)
        for place, number in zip(ptrs.data[there], value.data[there], strict=True):
            shared += int(place) in stored
            assert stored.setdefault(int(place), number.tobytes()) == number.tobytes()
        return store(builder, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", compared)
    sizes = Sizes(m=17, n=70, r=5, k=2, h=6, d=66)
    case = make_case(sizes, gate=gate, biases=biases, dtype=torch.float32)
    prompt = case.reconstruct(backend)
    stored.clear()
    prompt.sum().backward()
    assert shared > 0


def test_launches_cover_the_rank_and_the_rows() -> None:
    for s in NAMED.values():
        sizes = (s.batch, s.length, s.m, s.d, s.r, s.tasks or 1)
        config = backward_config(*sizes, torch.float32)
        assert config.block_r >= s.r
        assert config.rows * -(-s.batch // config.rows) >= s.batch
        assert (
            config.block_s * config.tiles * -(-s.length // (config.block_s * config.tiles))
            >= s.length
        )


# Selection


@pytest.mark.parametrize(
    ("sizes", "dtype", "says"),
    [
        (Sizes(r=257), torch.float32, "rank 257 is more than 256"),
        (Sizes(m=513), torch.float32, "513 virtual tokens are more than 512"),
        (Sizes(k=9, h=64), torch.float32, "9 subspaces of width 64 are more than 512 together"),
        (
            Sizes(k=8, h=64),
            torch.bfloat16,
            "8 subspaces of width 64 and biases are more than 512 together",
        ),
        (Sizes(), torch.float64, "short_prompt is float64, the kernels compute in float32"),
    ],
    ids=["rank", "tokens", "spaces", "biases", "float64"],
)
def test_what_the_kernels_do_not_serve_is_refused(
    sizes: Sizes, dtype: torch.dtype, says: str
) -> None:
    case = make_case(sizes, biases="biases" in says, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"backend: 'triton' does not support this call: {says}"):
        case.reconstruct("triton")
    assert case.reconstruct("eager").shape == (sizes.m, sizes.d)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_the_compiler_does_not_trace_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def untraceable(device: torch.device) -> tuple[int, int]:
        with open(os.devnull):
            return (9, 0)

    def function(tensor: Tensor) -> Tensor:
        return tensor + 1 if launch.target(tensor.device) == "sm_90" else tensor.sum()

    monkeypatch.setattr(torch.cuda, "get_device_capability", untraceable)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.empty(3, device="meta")).shape == (3,)
    torch.compiler.reset()


def test_the_interpreter_serves_by_name_only() -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    tensors = Parameters(**case.parameters)
    assert triton.supports(tensors, by_name=True) == (True, "fused kernels")
    ok, reason = triton.supports(tensors)
    assert (ok, reason) == (False, "the interpreter serves a CPU only if it is asked for by name")


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    case = make_case(Sizes(), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="CPU tensors, and TRITON_INTERPRET=1 is not set"):
        case.reconstruct("triton")
    assert triton.available() == (False, "no GPU")


@pytest.mark.parametrize(
    ("version", "architecture", "reason"),
    [
        (None, "sm_90", "triton is not installed"),
        ((3, 4, 0), "sm_90", "triton 3.4.0 is older than 3.5.0"),
        ((3, 7, 1), "sm_75", "sm_75 is older than sm_80"),
        ((3, 5, 0), "sm_103", "triton 3.5.0 on sm_103: its matrix products crash before 3.5.1"),
        ((3, 5, 1), "sm_103", ""),
        (
            (3, 5, 1),
            "sm_121",
            "triton 3.5.1 on sm_121: its assembler does not know the architecture before 3.6.0",
        ),
        ((3, 6, 0), "sm_121", ""),
        ((3, 5, 0), "sm_80", ""),
        ((3, 9, 0), "sm_90", ""),
        ((3, 7, 1), "gfx942", ""),
    ],
)
def test_known_bad_versions(
    version: tuple[int, ...] | None, architecture: str, reason: str
) -> None:
    assert triton._refusal(version, architecture) == reason
