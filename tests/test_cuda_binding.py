"""The CUDA backend's binding on a CPU: what it passes on, refuses and returns.

Its results are compared in `tests/test_parity.py` and `tests/test_kernels.py`, where it is "cuda".
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ept_fast import splice_prompt
from ept_fast.backends import cuda
from ept_fast.config import GATES
from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.ops.types import OF_EPT, Flags, Parameters, Text
from tests.cases import BIASED, PARTS, Case, Sizes, make_case, run
from tests.host_kernels import CSRC
from tests.parity import CUDA, cotangent_of, over

pytestmark = [pytest.mark.usefixtures("one_thread", "backend"), over(CUDA)]

BANK = Sizes(m=5, n=17, r=3, k=2, h=4, d=24, batch=7, length=13, tasks=4)


@pytest.mark.parametrize("what", ["neither", "prompt", "offset"])
def test_only_what_is_needed(what: str) -> None:
    """Gradients that nobody asks for are not computed, and the others do not change."""
    case = make_case(BANK, dtype=torch.float32)
    p = torch.ones(4, 5, 24)
    given = (cotangent_of(case), case.inputs(p), [], 0.4)
    whole = cuda.splice_backward(*given, True, True)
    need_prompt, need_offset = what == "prompt", what == "offset"
    part = cuda.splice_backward(*given, need_prompt, need_offset)
    for need, tensor, full in zip(
        (need_prompt, need_offset, need_offset), part, whole, strict=True
    ):
        assert torch.equal(tensor, full) if need else tensor.shape == (0,)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"length": 0}], ids=["no rows", "no tokens"])
@pytest.mark.parametrize("part", ["all", "no fusion", "prompt only"])
def test_a_path_without_text(part: str, empty: dict[str, int]) -> None:
    case = make_case(replace(BANK, **empty), dtype=torch.float32, **PARTS[part])
    expected = run(case, "eager", cotangent_of(case), Case.path)
    found = run(case, "cuda", cotangent_of(case), Case.path)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


# What the binding refuses by itself


def call_forward(prompt: Tensor, *others: Tensor | None, **text: Tensor) -> list[Tensor]:
    """The library's operator with nothing but these tensors."""
    parameters = Parameters(prompt, *others)
    numbers = (1.0, 0, 0, 1.0, True)
    found: list[Tensor] = torch.ops.ept_fast.cuda_forward(*parameters, *Text(**text), *numbers)
    return found


def test_errors_name_the_argument() -> None:
    p, e = torch.ones(1, 2, 8), torch.ones(3, 5, 8)
    a, b = torch.ones(1, 7, 2), torch.ones(1, 2, 8)
    ids, mask = torch.zeros(3, 5, dtype=torch.int64), torch.ones(3, 5)
    tasks = torch.zeros(3, dtype=torch.int16)
    for parameters, text, message in (
        (
            (p.double(),),
            {"inputs_embeds": e},
            "short_prompt: expected dtype float32, float16 or bfloat16, got Double",
        ),
        ((p[0, 0],), {"inputs_embeds": e}, "short_prompt: expected 3 axes, got 1"),
        ((p,), {"inputs_embeds": e[0]}, "inputs_embeds: expected 3 axes, got 2"),
        ((p,), {"input_ids": ids}, "weight: expected a tensor beside input_ids, got None"),
        (
            (p,),
            {"input_ids": ids, "weight": e[0], "inputs_embeds": e},
            "inputs_embeds: expected either input_ids or inputs_embeds, got both",
        ),
        (
            (p,),
            {"input_ids": mask, "weight": e[0]},
            "input_ids: expected dtype int64 or int32, got Float",
        ),
        ((p, a), {"inputs_embeds": e}, "offset_b: expected a tensor beside offset_a, got None"),
        (
            (p, None, None, torch.ones(1, 2, 8, 4)),
            {},
            "space_up: expected a tensor beside space_down, got None",
        ),
        (
            (p, None, None, torch.ones(1, 2, 8, 4), torch.ones(1, 2, 4, 8)),
            {},
            "gate_weight: expected a tensor beside space_down, got None",
        ),
        (
            (p, *(None,) * 6, torch.ones(1, 2, 4), torch.ones(1, 2, 8)),
            {},
            "space_down: expected a tensor beside space_down_bias, got None",
        ),
        (
            (p, a, b),
            {"inputs_embeds": e, "attention_mask": mask},
            "attention_mask: expected dtype bool or an integer one, got Float",
        ),
        (
            (p, a, b),
            {"inputs_embeds": e, "task_ids": tasks},
            "task_ids: expected dtype int64 or int32, got Short",
        ),
    ):
        with pytest.raises(RuntimeError) as caught:
            call_forward(*parameters, **text)
        assert str(caught.value).startswith(message)


def test_what_was_kept_is_of_the_call() -> None:
    p, a, b = torch.ones(1, 2, 8), torch.ones(1, 7, 2), torch.ones(1, 2, 8)
    out, kept = call_forward(p, a, b, inputs_embeds=torch.ones(3, 5, 8))
    op, flags = torch.ops.ept_fast.cuda_backward, (1.0, 0, 0, 1.0, True)
    given = (out, *Parameters(p, a, b), None, None)
    assert len(op(*given, [kept], True, True, *flags)) == OF_EPT  # no biases
    for wrong in ([], [kept[:-1]], [kept, kept]):
        with pytest.raises(RuntimeError, match=r"^kept: expected what the forward gave"):
            op(*given, wrong, True, True, *flags)


def test_choices_have_the_numbers_of_the_library() -> None:
    """Activations by the order of `csrc/activations.h`, which `test_cuda_backend.py` looks at."""
    assert list(cuda._ACTIVATIONS.items()) == [(n, i) for i, n in enumerate(ACTIVATIONS)]
    contract = (CSRC / "kernels.h").read_text(encoding="utf-8")
    (gates,) = re.findall(r"enum class Gate : int32_t \{ (.+) \};", contract)
    assert gates == ", ".join(f"{name} = {number}" for number, name in enumerate(GATES))


def test_an_error_of_a_launch_names_the_kernel() -> None:
    e = torch.ones(3, 5, 8)
    with pytest.raises(RuntimeError) as caught:
        splice_prompt(torch.ones(2, 8), inputs_embeds=e, scaling=13.0, backend="cuda")
    expected = "ept_fast: kernel made_up_kernel: CUDA error 98: invalid device function"
    assert str(caught.value).startswith(expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("padding", ["none", "holes"])
def test_compiled_it_is_one_operator(padding: str) -> None:
    case = make_case(Sizes(d=37), padding=padding, dtype=torch.float32)
    compiled = torch.compile(case.both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled("cuda"), case.both("cuda"))


@pytest.mark.parametrize("part", ["all", "biases", "biases, no gate"])
def test_shapes_of_the_outputs(part: str) -> None:
    """As the fakes of the operators in Python have them: shape, type and order."""
    case = make_case(BANK, dtype=torch.bfloat16, **BIASED.get(part, {}))
    parameters, flags = case.tensors(), Flags(0.4, "gelu", "token", 0.7)
    prompt, saved = cuda.reconstruct_forward(parameters, flags)
    grads = cuda.reconstruct_backward(prompt, parameters, saved, flags)
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in parameters]
        wanted = torch.ops.ept_fast.reconstruct_forward(fakes, *flags, "cuda")
        wanted_grads = torch.ops.ept_fast.reconstruct_backward(
            wanted[0], fakes, wanted[1:], *flags, "cuda"
        )
    for got, fake in zip((prompt, *saved, *grads), (*wanted, *wanted_grads), strict=True):
        if got is None or fake.numel() == 0:  # of what is not there
            assert got is None or got.numel() == 0
            continue
        assert (got.shape, got.dtype, got.stride()) == (fake.shape, fake.dtype, fake.stride())
