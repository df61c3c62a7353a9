"""The splice with ``prompt_rows``: each row of the batch has a prompt of rows that it names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast import splice_prompt
from ept_fast.backends import triton
from tests.cases import (
    LAYOUTS,
    PADDINGS,
    TYPES,
    Case,
    Sizes,
    laid_out,
    make_case,
    make_gathered,
    run,
)
from tests.parity import (
    EAGER,
    TRITON,
    assert_as_exact_as_the_definition,
    cotangent_of,
    needs_interpreter,
    over,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # torch.compile itself does what this warns of.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
each_backend = over(EAGER, TRITON)
OPS = torch.ops.ept_fast


# One row for all, more of them than a program takes at a time, several blocks of channels; more
# rows than places; positions, tokens and rows of the batch beyond a tile.
SHAPES = [
    (Sizes(m=1, n=1, r=1, d=1, batch=1, length=1), 1),
    (Sizes(m=7, n=29, r=5, d=37, batch=5, length=23), 3),
    (Sizes(m=5, n=7, r=2, d=300, batch=9, length=5), 2),
    (Sizes(m=3, n=7, r=2, d=19, batch=2, length=5), 31),
    (Sizes(m=19, n=40, r=3, d=66, batch=2, length=34), 11),
]


@each_backend
@pytest.mark.parametrize("types", TYPES)
def test_parity(types: str, backend: str) -> None:
    first = list(TYPES).index(types)
    # The interpreter is slow.
    chosen = [i for i in range(5) if backend == "eager" or (i + first) % 2]

    def cases() -> Iterator[Case]:
        for i in chosen:
            padding = PADDINGS[(first + i) % len(PADDINGS)]
            yield make_gathered(*SHAPES[i], i, padding=padding).typed(types)

    assert_as_exact_as_the_definition(cases(), backend)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("padding", PADDINGS)
def test_gradcheck(padding: str, offset: bool, backend: str) -> None:
    sizes = Sizes(m=4, d=3, batch=3)
    case = make_gathered(sizes, 2, dtype=torch.float64, padding=padding, offset=offset)
    embeds = case.weight[case.input_ids].requires_grad_()

    def function(prompt: Tensor, embeds: Tensor, *pair: Tensor, backend: str = backend) -> Tensor:
        return splice_prompt(
            prompt,
            inputs_embeds=embeds,
            **dict(zip(("offset_a", "offset_b"), pair, strict=False)),  # type: ignore[arg-type]
            scaling=0.3,
            attention_mask=case.attention_mask,
            prompt_rows=case.prompt_rows,
            backend=backend,
        )

    prompt, *pair = case.parameters.values()
    leaves = (prompt, embeds, *pair)
    assert torch.autograd.gradcheck(function, leaves)


@over("reference", EAGER, TRITON)
def test_it_is_torchs_embedding_before_the_text(backend: str) -> None:
    case = make_gathered(Sizes(m=5, d=37, batch=4), 3, offset=False)
    table = case.parameters["short_prompt"]
    found = F.embedding(case.prompt_rows + 1, F.pad(table, (0, 0, 1, 0)), padding_idx=0)
    wanted = torch.cat([found, case.weight[case.input_ids]], 1)
    cotangent = cotangent_of(case)
    got = case.both(backend)
    assert torch.equal(got, wanted)
    for mine, theirs in zip(
        torch.autograd.grad(got, table, cotangent),
        torch.autograd.grad(wanted, table, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@each_backend
def test_the_same_row_for_all_is_a_prompt(backend: str) -> None:
    case = make_gathered(Sizes(m=3, batch=4), 3)
    plain = make_case(case.sizes, spaces=False, dtype=torch.float32)
    rows = torch.arange(3).expand(4, 3)
    same = replace(case, parameters=plain.parameters, prompt_rows=rows)
    prompt = plain.parameters["short_prompt"]
    cotangent = cotangent_of(case)
    leaves = tuple(plain.parameters.values())
    found, wanted = (each.splice(prompt, backend) for each in (same, plain))
    assert torch.equal(found, wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, cotangent),
        torch.autograd.grad(wanted, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@each_backend
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_strides_and_the_type_of_ids_change_no_bit(layout: str, backend: str) -> None:
    case = make_gathered(Sizes(m=5, d=24, batch=4, length=9), 6, offset=False)
    other = replace(case, prompt_rows=case.prompt_rows.int()).laid_out(layout)
    cotangent = cotangent_of(case)
    wanted = run(case, backend, cotangent)
    for name, tensor in run(other, backend, laid_out(cotangent, layout)).items():
        assert torch.equal(tensor, wanted[name]), name


@pytest.mark.default_algorithms
@each_backend
def test_every_run_gives_the_same_bits(backend: str) -> None:
    case = make_gathered(Sizes(m=9, d=33, batch=20, length=2), 2)
    cotangent = cotangent_of(case)
    first = run(case, backend, cotangent)
    for name, tensor in run(case, backend, cotangent).items():
        assert torch.equal(tensor, first[name]), name


EMPTY = [
    ({"batch": 0}, 3),
    ({"length": 0}, 3),
    ({"m": 0}, 3),
    ({"n": 0, "length": 0}, 3),
    ({"r": 0}, 3),
    ({}, 0),
]


@each_backend
@pytest.mark.parametrize(("zero", "count"), EMPTY)
def test_empty_sizes(zero: dict[str, int], count: int, backend: str) -> None:
    case = make_gathered(Sizes(**zero), max(count, 1), padding="none")
    if not count:
        case.prompt_rows.fill_(-1)
        none = case.parameters["short_prompt"].detach()[:0].requires_grad_()
        case = replace(case, parameters={**case.parameters, "short_prompt": none})
    cotangent = cotangent_of(case)
    wanted = run(case, "reference", cotangent)
    for name, tensor in run(case, backend, cotangent).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("offset", [True, False])
def test_opcheck(offset: bool, backend: str) -> None:
    case = make_gathered(Sizes(m=2, n=3, d=5, batch=2, length=3), 4, offset=offset, padding="none")
    inputs = case.inputs()
    torch.library.opcheck(OPS.splice_forward, (list(inputs), 0.4, backend))
    _, *kept = OPS.splice_forward(list(inputs), 0.4, backend)
    given = list(inputs._replace(input_ids=None, weight=None))
    grad = torch.randn(2, 5, 5)
    for needs in ((True, True), (False, True))[: 1 + offset]:
        torch.library.opcheck(OPS.splice_backward, (grad, given, kept, 0.4, *needs, backend))


@each_backend
def test_compiles_into_one_graph(backend: str) -> None:
    torch.compiler.reset()
    case = make_gathered(Sizes(m=5), 4)
    cotangent = cotangent_of(case)

    def function(prompt: Tensor, a: Tensor, b: Tensor, rows: Tensor) -> Tensor:
        parameters = {"short_prompt": prompt, "offset_a": a, "offset_b": b}
        return replace(case, parameters=parameters, prompt_rows=rows).both(backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    leaves = tuple(case.parameters.values())
    out = compiled(*leaves, case.prompt_rows)
    wanted = run(case, backend, cotangent)
    found = dict(zip(case.parameters, torch.autograd.grad(out, leaves, cotangent), strict=True))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name])
    torch.testing.assert_close(out, case.both(backend))


@needs_interpreter
def test_the_kernel_reads_no_row_that_is_not_there() -> None:
    """What a GPU does with ids that nobody looked at: NaN, and no part in the gradient."""
    case = make_gathered(Sizes(m=3, batch=1), 4, offset=False, padding="none")
    inputs = case.inputs()._replace(prompt_rows=torch.tensor([[-2, 4, 1]]))
    out, kept = triton.splice_forward(inputs, 0.4)
    assert bool(out[0, :2].isnan().all())
    assert torch.equal(out[0, 2], inputs.prompt[0, 1])
    grad = torch.randn_like(out)
    d_prompt = triton.splice_backward(grad, inputs, kept, 0.4, True, False).prompt
    wanted = torch.zeros(4, grad.shape[2])
    wanted[1] = grad[0, 2]
    assert torch.equal(d_prompt[0], wanted)
