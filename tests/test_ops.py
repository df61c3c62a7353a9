"""The operators under opcheck, torch.compile, autocast, checkpointing and other modes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ept_fast import reconstruct_prompt, splice_prompt
from ept_fast.ops.functional import gate_weights
from ept_fast.ops.types import Flags, Parameters
from tests.cases import BIASED, PARTS, Case, Sizes, flat, make_case, run
from tests.parity import EAGER, TRITON, over

# torch.compile itself does what these warn of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
]
BANK = Sizes(m=2, n=3, r=2, k=2, h=2, d=5, batch=2, length=3, tasks=2)
FLAGS = Flags(0.4, "gelu", "token", 0.7)
each_backend = over(EAGER, TRITON)
OPS = torch.ops.ept_fast


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@each_backend
@pytest.mark.parametrize(
    ("part", "dtype"),
    [
        ("all", torch.float32),
        ("all", torch.bfloat16),
        ("no spaces", torch.bfloat16),
        ("no offset", torch.float32),
        ("prompt only", torch.bfloat16),
        ("biases", torch.float32),
        ("biases, no gate", torch.bfloat16),
    ],
    ids=str,
)
def test_opcheck_reconstruct(part: str, dtype: torch.dtype, backend: str) -> None:
    tensors = list(make_case(BANK, dtype=dtype, **(PARTS | BIASED)[part]).tensors())
    flags = (*FLAGS, backend)
    torch.library.opcheck(OPS.reconstruct_forward, (tensors, *flags))
    prompt, *saved = OPS.reconstruct_forward(tensors, *flags)
    grad = torch.ones_like(prompt)
    torch.library.opcheck(OPS.reconstruct_backward, (grad, tensors, saved, *flags))


@each_backend
@pytest.mark.parametrize("lookup", [True, False], ids=["ids", "embeds"])
@pytest.mark.parametrize("offset", [True, False], ids=["offset", "no offset"])
def test_opcheck_splice(offset: bool, lookup: bool, backend: str) -> None:
    case = make_case(BANK, offset=offset, dtype=torch.float32)
    inputs = case.inputs()
    if not lookup:
        embeds = case.weight[case.input_ids]
        inputs = inputs._replace(input_ids=None, weight=None, inputs_embeds=embeds)
    torch.library.opcheck(OPS.splice_forward, (list(inputs), 0.4, backend))
    grad = torch.randn(2, 5, 5)
    _, *kept = OPS.splice_forward(list(inputs), 0.4, backend)
    given = list(inputs._replace(input_ids=None, weight=None, inputs_embeds=None))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(OPS.splice_backward, (grad, given, kept, 0.4, *needs, backend))


def _compiled(ours: str = "eager", **options: Any) -> Any:
    function = torch.compile(flat, fullgraph=True, **options)

    def call(case: Case) -> Tensor:
        mask, tasks = case.attention_mask, case.task_ids
        return function(ours, case.parameters, case.weight, case.input_ids, mask, tasks)

    return call


def _step(function: Any, case: Case) -> list[Tensor]:
    leaves = list(case.parameters.values())
    out = function(case)
    grads = torch.autograd.grad((out.float() ** 2).sum(), leaves)
    return [out.detach(), *grads]


def _served(backend: str) -> torch.dtype:
    """The kernels do not serve float64."""
    return torch.float32 if backend == "triton" else torch.float64


@each_backend
@pytest.mark.parametrize(
    ("tasks", "part"), [(None, "all"), (2, "all"), (None, "biases, no gate"), (2, "biases")]
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(dynamic: bool, tasks: int | None, part: str, backend: str) -> None:
    compiled = _compiled(backend, dynamic=dynamic)
    parts = (PARTS | BIASED)[part]
    case = make_case(Sizes(tasks=tasks), dtype=_served(backend), **parts)
    uncompiled = _step(lambda case: case.both(backend), case)
    for got, expected in zip(_step(compiled, case), uncompiled, strict=True):
        torch.testing.assert_close(got, expected)


@over("reference", EAGER, TRITON)
def test_compiled_code_serves_new_batch_sizes_and_lengths(backend: str) -> None:
    """One graph for the first sizes and one for all others."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = _compiled(backend, backend=counter)
    for batch, length in ((4, 6), (3, 5), (2, 7), (5, 4)):
        sizes = Sizes(batch=batch, length=length)
        case = make_case(sizes, padding="right", dtype=_served(backend))
        uncompiled = _step(lambda case: case.both(backend), case)
        for got, expected in zip(_step(compiled, case), uncompiled, strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_compiled_code_serves_every_scaling_and_temperature(dynamic: bool | None) -> None:
    case = make_case(Sizes())

    def both(flags: dict[str, Any]) -> Tensor:
        return replace(case, flags=flags).both("eager")

    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaves = list(case.parameters.values())
    for scaling, temperature in ((1.0, 1.0), (0.4, 0.7), (3, 2), (1.0, 1.0)):
        flags = {"scaling": scaling, "temperature": temperature}
        got, expected = compiled(flags), both(flags)
        torch.testing.assert_close(got, expected)
        for mine, theirs in zip(
            torch.autograd.grad(got.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiling_names_a_bad_temperature(dynamic: bool | None) -> None:
    prompt = torch.ones(3, 5)
    compiled = torch.compile(
        lambda temperature: reconstruct_prompt(prompt, temperature=temperature),
        fullgraph=True,
        dynamic=dynamic,
        backend="eager",
    )
    for good in (1.5, 2.5):  # from the second value on the number may be an input
        compiled(good)
    for bad in (float("nan"), float("inf"), 0.0, -1, True, "1"):
        with pytest.raises((TypeError, ValueError)) as uncompiled:
            reconstruct_prompt(prompt, temperature=bad)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=re.escape(str(uncompiled.value))):
            compiled(bad)


def test_compiled_code_checks_values() -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    compiled = _compiled()
    case.input_ids[2, 3] = 11
    with pytest.raises(IndexError, match="got 11 at row 2, column 3"):
        compiled(case)


@over("reference", EAGER, TRITON)
def test_autocast_changes_no_bit(backend: str) -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    leaves = list(case.parameters.values())
    expected = _step(lambda case: case.both(backend), case)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.both(backend)
        if backend != "reference":  # autograd of the definition is PyTorch's and follows autocast
            grads = torch.autograd.grad(out.square().sum(), leaves)
    if backend == "reference":
        grads = torch.autograd.grad(out.square().sum(), leaves)
    for got, without in zip([out.detach(), *grads], expected, strict=True):
        assert torch.equal(got, without)


def test_autocast_does_not_reach_into_compiled_code() -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = _step(_compiled(), case)
    for got, expected in zip(compiled, _step(lambda c: c.both("eager"), case), strict=True):
        torch.testing.assert_close(got, expected)


ZEROS = (
    *("m", "n", "r", "k", "h", "d", "batch", "length", "vocabulary", "tasks"),
    *("n length", "vocabulary length", "vocabulary batch", "tasks batch"),
)
REFUSED = {
    "d": "expected shape [m, d] or [T, m, d] with d >= 1, got ",
    "n": "input_ids: expected at most max_length 0 text positions (the rows of offset_a), got 6",
    "vocabulary": "input_ids: expected no ids, as there are 0 rows to choose from, got ",
    "tasks": "task_ids: expected no ids, as there are 0 rows to choose from, got ",
}


@each_backend
@pytest.mark.parametrize(("gate", "tasks"), [("token", 2), ("prompt", None)])
@pytest.mark.parametrize("zero", ZEROS)
def test_zero_sizes(zero: str, gate: str, tasks: int | None, backend: str) -> None:
    """Each is served, with the definition's values and gradients, or refused by its name."""
    none = zero.split()
    tasks = 2 if "tasks" in none else tasks
    drawn = {name: 0 for name in none if name not in ("vocabulary", "tasks")}
    case = make_case(Sizes(**drawn, tasks=tasks), padding="none", dtype=torch.float32, gate=gate)
    if "vocabulary" in none:
        case = replace(case, weight=case.weight[:0])
    if "tasks" in none:
        empty = {name: t.detach()[:0] for name, t in case.parameters.items()}
        case = replace(case, parameters={n: t.requires_grad_() for n, t in empty.items()})
    if zero in REFUSED:
        for name in (backend, "reference"):
            prompt = case.parameters["short_prompt"]
            with pytest.raises((ValueError, IndexError), match=re.escape(REFUSED[zero])):
                case.splice(prompt, name)
            if zero == "d":
                with pytest.raises(ValueError, match=re.escape(REFUSED[zero])):
                    case.reconstruct(name)
        return
    cotangent = torch.ones(case.both("reference").shape)
    got, expected = (run(case, name, cotangent) for name in (backend, "reference"))
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_without_gradients(mode: Any, backend: str) -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    with mode():
        out = case.both(backend)
    assert not out.requires_grad
    assert torch.equal(out, case.both(backend).detach())


@each_backend
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, backend: str) -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    names, leaves = list(case.parameters), list(case.parameters.values())

    def function(*tensors: Tensor) -> Tensor:
        return replace(case, parameters=dict(zip(names, tensors, strict=True))).both(backend)

    out = checkpoint(function, *leaves, use_reentrant=reentrant)
    out.square().sum().backward()
    grads = [leaf.grad for leaf in leaves]
    plain = _step(lambda case: case.both(backend), case)
    for got, expected in zip([out.detach(), *grads], plain, strict=True):
        assert got is not None
        assert torch.equal(got, expected)


@each_backend
@pytest.mark.parametrize("biases", [False, True])
def test_only_what_is_asked_for_gets_a_gradient(biases: bool, backend: str) -> None:
    case = make_case(Sizes(), biases=biases, dtype=torch.float32)
    frozen = {name: t.detach() for name, t in case.parameters.items()}
    for name in case.parameters:
        leaf = frozen[name].clone().requires_grad_()
        replace(case, parameters={**frozen, name: leaf}).both(backend).sum().backward()
        assert leaf.grad is not None
    case.weight.requires_grad_()
    out = replace(case, parameters=frozen).splice(frozen["short_prompt"], backend)
    assert not out.requires_grad  # the table is frozen whatever it asks for


@each_backend
@pytest.mark.parametrize("biases", [False, True])
def test_gradients_have_their_tensors_types_and_shapes(biases: bool, backend: str) -> None:
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float32)
    case = make_case(Sizes(tasks=2), biases=biases, dtype=torch.float32)
    mixed = {
        name: t.detach().to(types[i % 4]).requires_grad_()
        for i, (name, t) in enumerate(case.parameters.items())
    }
    out = replace(case, parameters=mixed, weight=case.weight.bfloat16()).both(backend)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    for name, tensor in mixed.items():
        assert tensor.grad is not None, name
        assert (tensor.grad.dtype, tensor.grad.shape) == (tensor.dtype, tensor.shape), name


@each_backend
def test_second_derivatives_are_refused(backend: str) -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    leaves = list(case.parameters.values())
    for out in (case.reconstruct(backend), case.splice(leaves[0], backend)):
        (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_inputs_embeds_gradient_is_a_view_of_the_outputs() -> None:
    """One read of each gradient element and no copy of it."""
    embeds = torch.randn(2, 3, 5, requires_grad=True)
    out = splice_prompt(torch.randn(4, 5), inputs_embeds=embeds)
    seen: list[Tensor] = []
    embeds.register_hook(lambda grad: seen.append(grad))
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    assert seen[0].untyped_storage().data_ptr() == cotangent.untyped_storage().data_ptr()


def test_an_unchanged_prompt_is_a_new_tensor() -> None:
    """Without offset and spaces the result equals the input, and does not share its memory."""
    prompt = torch.randn(3, 5)
    out = reconstruct_prompt(prompt)
    assert torch.equal(out, prompt)
    assert out.data_ptr() != prompt.data_ptr()


@pytest.mark.parametrize("tasks", [None, 2])
def test_the_weight_of_a_space_without_a_gate_is_one(tasks: int | None) -> None:
    case = make_case(Sizes(tasks=tasks), gated=False)
    found = gate_weights(Parameters(**case.parameters), FLAGS)
    assert torch.equal(found, torch.ones(*case.parameters["short_prompt"].shape[:-1], 1).double())
