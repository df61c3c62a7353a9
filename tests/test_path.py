"""Reconstruct and splice by one function, against the two functions in a row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.utils.parametrize
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ept_fast import (
    EPTConfig,
    FusedEPTPrompt,
    reconstruct_and_splice,
    reconstruct_prompt,
    splice_prompt,
)
from ept_fast.backends import eager
from ept_fast.ops import dispatch, functional
from ept_fast.ops.types import Flags, Text
from tests.cases import GATES, PADDINGS, PARTS, SHAPES, TYPES, Case, Sizes, make_case, run
from tests.parity import EAGER, TRITON, cotangent_of, each_backend, over

# torch.compile itself does what these warn of.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
]
BANK = Sizes(m=2, n=3, r=2, k=2, h=2, d=5, batch=2, length=3, tasks=2)
FLAGS = Flags(0.4, "gelu", "token", 0.7)
OFFSET = ("offset_a", "offset_b")
OPS = torch.ops.ept_fast


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Values


@each_backend
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", ["prime", "bank"])
def test_the_same_bits_as_two_functions(shape: str, part: str, backend: str) -> None:
    """Of the output; of the gradients those that are not a sum of two halves. In the backends that
    do not round the gradient of P′ to its type they differ if that is not float32, and Triton's do
    in their last bits.
    """
    sizes = SHAPES[shape] if backend != "triton" else Sizes(tasks=SHAPES[shape].tasks)
    for types in ("fp32", "bf16 table", "bf16"):
        case = make_case(sizes, dtype=torch.float32, **PARTS[part]).typed(types)
        cotangent = cotangent_of(case)
        expected = run(case, backend, cotangent)
        found = run(case, backend, cotangent, Case.path)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            if name == "output" or backend != "triton":
                rounded = name in OFFSET or (name != "output" and backend == "cuda")
                if not rounded or types != "bf16":
                    assert torch.equal(tensor, expected[name]), (types, name)
            elif types != "bf16":
                torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("types", [t for t in TYPES if TYPES[t][1] != torch.float32])
@pytest.mark.parametrize("tasks", [None, 3])
def test_the_offsets_gradient_is_rounded_once(tasks: int | None, types: str) -> None:
    """It is the sum of both halves in float32, rounded; each half by itself differs."""
    case = make_case(replace(SHAPES["prime"], tasks=tasks), dtype=torch.float32).typed(types)
    cotangent = cotangent_of(case)
    found = run(case, "eager", cotangent, Case.path)
    parameters = case.tensors()
    flags = Flags(**{**FLAGS._asdict(), **case.flags})
    prompt, saved = eager.reconstruct_forward(parameters, flags)
    of_text = eager.splice_backward(
        cotangent, case.inputs(prompt), [], flags.scaling, True, True, wide_offset=True
    )
    of_prompt = eager.reconstruct_backward(
        of_text.prompt, parameters, saved, flags, wide_offset=True
    )
    twice = run(case, "eager", cotangent)
    for name in OFFSET:
        halves = getattr(of_text, name), getattr(of_prompt, name)
        assert {half.dtype for half in halves} == {torch.float32}
        once = (halves[0] + halves[1]).to(case.parameters[name].dtype)
        assert torch.equal(found[name], once.view_as(found[name])), name
        assert not torch.equal(found[name], twice[name]), name


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("lookup", [True, False], ids=["ids", "embeds"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate: str, part: str, lookup: bool, tasks: int | None) -> None:
    sizes = Sizes(m=2, n=4, r=2, k=2, h=2, d=3, batch=3, length=4, tasks=tasks)
    case = make_case(sizes, gate=gate, padding="holes", **PARTS[part])
    embeds = [] if lookup else [case.weight[case.input_ids].requires_grad_()]

    def function(*tensors: Tensor) -> Tensor:
        number = len(case.parameters)
        parameters = dict(zip(case.parameters, tensors[:number], strict=True))
        text = dict(zip(("inputs_embeds",), tensors[number:], strict=False))
        return replace(case, parameters=parameters).path("eager", **text)

    leaves = (*case.parameters.values(), *embeds)
    torch.testing.assert_close(function(*leaves), case.both("reference"), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(function, leaves)


@each_backend
@pytest.mark.parametrize("padding", PADDINGS)
def test_inputs_embeds(padding: str, backend: str) -> None:
    case = make_case(Sizes(tasks=2), padding=padding, dtype=torch.float32)
    embeds = case.weight[case.input_ids].requires_grad_()
    out = case.path(backend, inputs_embeds=embeds)
    assert torch.equal(out, case.path(backend))
    cotangent = cotangent_of(case)
    (grad,) = torch.autograd.grad(out, embeds, cotangent)
    assert torch.equal(grad, cotangent[:, case.sizes.m :])


def test_the_definition_on_request() -> None:
    case = make_case(Sizes(tasks=2))
    assert torch.equal(case.path("reference"), case.both("reference"))


# What is computed and kept


@each_backend
def test_only_what_is_asked_for_gets_a_gradient(backend: str) -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    cotangent = cotangent_of(case)
    everything = run(case, backend, cotangent, Case.path)
    frozen = {name: t.detach() for name, t in case.parameters.items()}
    for name in case.parameters:
        leaf = frozen[name].clone().requires_grad_()
        alone = replace(case, parameters={**frozen, name: leaf})
        found = run(alone, backend, cotangent, Case.path)
        assert found.keys() == {"output", name}
        assert torch.equal(found[name], everything[name])
    case.weight.requires_grad_()
    assert not replace(case, parameters=frozen).path("eager").requires_grad


@pytest.mark.parametrize(
    ("trained", "fusion", "expected"),
    [
        ("inputs_embeds", True, []),
        ("short_prompt", True, [("splice", True, False), ("reconstruct",)]),
        ("offset_a", True, [("splice", True, True), ("reconstruct",)]),
        ("offset_a", False, [("splice", False, True)]),
        ("offset_b", False, [("splice", False, True)]),
    ],
)
def test_backward_computes_what_is_needed(
    trained: str, fusion: bool, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the splice: whether for the prompt, and whether for the offset."""
    case = make_case(Sizes(), dtype=torch.float32, fusion=fusion)
    embeds = case.weight[case.input_ids]
    leaf = embeds if trained == "inputs_embeds" else case.parameters[trained]
    frozen = {n: t if n == trained else t.detach() for n, t in case.parameters.items()}
    leaf.requires_grad_()
    called = []

    def recorded(name: str) -> Any:
        function = getattr(eager, f"{name}_backward")

        def record(*args: Any, **options: Any) -> Any:
            called.append((name, *args[4:6]) if name == "splice" else (name,))
            return function(*args, **options)

        return record

    for name in ("splice", "reconstruct"):
        monkeypatch.setattr(eager, f"{name}_backward", recorded(name))
    replace(case, parameters=frozen).path("eager", inputs_embeds=embeds).sum().backward()
    assert leaf.grad is not None
    assert called == expected


def test_neither_the_reconstructed_prompt_nor_the_text_is_saved() -> None:
    """Saved tensors go through hooks, and may come back in other memory."""
    case = make_case(Sizes(), dtype=torch.float32)
    cotangent = cotangent_of(case)
    expected = run(case, "eager", cotangent, Case.path)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, Tensor.clone):
        found = run(case, "eager", cotangent, Case.path)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    pointers = {t.data_ptr() for t in packed}
    assert not pointers & {case.input_ids.data_ptr(), case.weight.data_ptr()}
    prompt = case.reconstruct("eager")
    assert not any(
        t.numel() == prompt.numel() and t.view(-1).equal(prompt.view(-1)) for t in packed
    )


# Modes


@over(EAGER, TRITON)
@pytest.mark.parametrize("part", PARTS)
def test_opcheck(part: str, backend: str) -> None:
    options = dict(PARTS[part])
    fusion = options.pop("fusion", True)
    case = make_case(BANK, dtype=torch.float32, **options)
    parameters = list(case.tensors())
    text = Text(case.input_ids, case.weight, None, case.attention_mask, case.task_ids)
    choices = (*FLAGS, fusion, backend)
    torch.library.opcheck(OPS.path_forward, (parameters, list(text), *choices))
    out, *kept = OPS.path_forward(parameters, list(text), *choices)
    around = list(Text(attention_mask=case.attention_mask, task_ids=case.task_ids))
    for needs in ((True, case.tensors().has_offset), (False, case.tensors().has_offset)):
        arguments = (
            torch.randn_like(out),
            parameters,
            around,
            kept,
            *choices[:-1],
            *needs,
            backend,
        )
        torch.library.opcheck(OPS.path_backward, arguments)


def _flat(
    backend: str,
    parameters: dict[str, Tensor],
    weight: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
) -> Tensor:
    return reconstruct_and_splice(
        **parameters,
        input_ids=input_ids,
        weight=weight,
        attention_mask=attention_mask,
        task_ids=task_ids,
        scaling=0.4,
        temperature=0.7,
        backend=backend,
    )


def _compiled(ours: str, **options: Any) -> Any:
    function = torch.compile(_flat, fullgraph=True, **options)

    def call(case: Case, _: str) -> Tensor:
        mask, tasks = case.attention_mask, case.task_ids
        return function(ours, case.parameters, case.weight, case.input_ids, mask, tasks)

    return call


def _served(backend: str) -> torch.dtype:
    """The kernels do not serve float64."""
    return torch.float32 if backend == "triton" else torch.float64


@over(EAGER, TRITON)
@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(dynamic: bool, tasks: int | None, backend: str) -> None:
    case = make_case(Sizes(tasks=tasks), dtype=_served(backend))
    cotangent = cotangent_of(case)
    compiled = run(case, backend, cotangent, _compiled(backend, dynamic=dynamic))
    for name, expected in run(case, backend, cotangent, Case.path).items():
        torch.testing.assert_close(compiled[name], expected)


@over(EAGER, TRITON)
def test_compiled_code_serves_new_batch_sizes_and_lengths(backend: str) -> None:
    """One graph for the first sizes and one for all others."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = _compiled(backend, backend=counter)
    for batch, length in ((4, 6), (3, 5), (2, 7), (5, 4)):
        sizes = Sizes(batch=batch, length=length)
        case = make_case(sizes, padding="right", dtype=_served(backend))
        cotangent = cotangent_of(case)
        found = run(case, backend, cotangent, compiled)
        for name, expected in run(case, backend, cotangent, Case.path).items():
            torch.testing.assert_close(found[name], expected)
    assert counter.frame_count <= 2


@each_backend
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_without_gradients(mode: Any, backend: str) -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    with mode():
        out = case.path(backend)
    assert not out.requires_grad
    assert torch.equal(out, case.path(backend).detach())


@each_backend
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, backend: str) -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    names = list(case.parameters)

    def forward(case: Case, backend: str) -> Tensor:
        def function(*tensors: Tensor) -> Tensor:
            inner = replace(case, parameters=dict(zip(names, tensors, strict=True)))
            return inner.path(backend)

        return checkpoint(function, *case.parameters.values(), use_reentrant=reentrant)

    cotangent = cotangent_of(case)
    plain = run(case, backend, cotangent, Case.path)
    forward(case, backend).backward(cotangent)
    for name, tensor in case.parameters.items():
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, plain[name]), name


@each_backend
def test_autocast_changes_no_bit(backend: str) -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    cotangent = cotangent_of(case)
    expected = run(case, backend, cotangent, Case.path)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(case, backend, cotangent, Case.path)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@each_backend
def test_second_derivatives_are_refused(backend: str) -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    leaf = case.parameters["short_prompt"]
    (grad,) = torch.autograd.grad(case.path(backend).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Choice and errors


def test_two_backends_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation gets the backend that it would get by itself."""
    case = make_case(Sizes(), dtype=torch.float32)
    select = dispatch.select
    asked = []

    def splice_is_the_definitions(name: str | None, tensors: Any) -> str:
        asked.append(type(tensors).__name__)
        return "reference" if asked[-1] == "SpliceInputs" else select(name, tensors)

    monkeypatch.setattr(functional, "_checked", {})
    monkeypatch.setattr(dispatch, "select", splice_is_the_definitions)
    assert torch.equal(case.path("eager"), case.both("eager"))
    assert {"Parameters", "SpliceInputs"} == set(asked)


BAD = {
    "a short prompt of integers": {"short_prompt": torch.ones(3, 5, dtype=torch.int64)},
    "A without B": {"offset_b": None},
    "D without the others": {"space_up": None},
    "scaling": {"scaling": "1"},
    "temperature": {"temperature": 0.0},
    "gate": {"gate": "row"},
    "a float mask": {"attention_mask": torch.ones(4, 6)},
    "a mask of another length": {"attention_mask": torch.ones(4, 5, dtype=torch.int64)},
    "a mask of twos": {"attention_mask": torch.full((4, 6), 2)},
    "ids and embeddings": {"inputs_embeds": torch.ones(4, 6, 5)},
    "neither": {"input_ids": None, "weight": None},
    "ids without a table": {"weight": None},
    "a table of another width": {"weight": torch.ones(11, 4)},
    "a text that is too long": {"input_ids": torch.zeros(4, 8, dtype=torch.int64)},
    "an id outside": {"input_ids": torch.full((4, 6), 11)},
    "a task of a single prompt": {"task_ids": torch.zeros(4, dtype=torch.int64)},
    "an unknown backend": {"backend": "tpu"},
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_inputs_are_named_as_by_the_two_functions(bad: str) -> None:
    """Only P′ is called by the name of its argument, short_prompt."""
    case = make_case(Sizes(), padding="none", dtype=torch.float32)
    everything: dict[str, Any] = {
        **{name: t.detach() for name, t in case.parameters.items()},
        **dict.fromkeys((*Text._fields, "backend")),
        **dict.fromkeys(("scaling", "temperature"), 1.0),
        "gate": "token",
        "input_ids": case.input_ids,
        "weight": case.weight,
        **BAD[bad],
    }
    text = {n: everything[n] for n in (*Text._fields, *OFFSET, "scaling", "backend")}
    first = {n: everything[n] for n in everything if n not in Text._fields}
    with pytest.raises((TypeError, ValueError, IndexError)) as expected:
        splice_prompt(reconstruct_prompt(**first), **text)
    message = re.sub(r"\bprompt \[", "short_prompt [", str(expected.value))
    with pytest.raises(type(expected.value), match=f"^{re.escape(message)}$"):
        reconstruct_and_splice(**everything)


def test_values_are_checked_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(Sizes(), dtype=torch.float32)
    case.input_ids[2, 3] = 11
    monkeypatch.setattr(eager, "reconstruct_forward", None)
    with pytest.raises(IndexError, match="got 11 at row 2, column 3"):
        case.path("eager")


def test_the_module_uses_it() -> None:
    config = EPTConfig(5, num_virtual_tokens=3, max_length=7, rank=2, num_spaces=2)
    prompt = FusedEPTPrompt(config, init=torch.randn(9, 5), backend="eager")
    out = prompt(inputs_embeds=torch.randn(4, 6, 5)).inputs_embeds
    assert type(out.grad_fn).__name__ == "_PathBackward"


def test_a_tensor_that_is_computed_from_others() -> None:
    config = EPTConfig(5, num_virtual_tokens=3, max_length=7, rank=2, num_spaces=2)
    prompt = FusedEPTPrompt(config, init=torch.randn(9, 5), backend="eager")
    embeds = torch.randn(4, 6, 5)
    expected = prompt(inputs_embeds=embeds).inputs_embeds
    torch.nn.utils.parametrize.register_parametrization(prompt, "short_prompt", torch.nn.Identity())
    assert torch.equal(prompt(inputs_embeds=embeds).inputs_embeds, expected)


def test_a_subclass_may_reconstruct_otherwise() -> None:
    class Doubled(FusedEPTPrompt):
        def reconstruct(self) -> Tensor:
            return 2 * super().reconstruct()

    config = EPTConfig(5, num_virtual_tokens=3, max_length=7, rank=2, num_spaces=2)
    prompt = Doubled(config, init=torch.randn(9, 5), backend="eager")
    out = prompt(inputs_embeds=torch.randn(4, 6, 5)).inputs_embeds
    assert torch.equal(out[0, :3], prompt.reconstruct())
