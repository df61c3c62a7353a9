"""The CUDA backend's binding on a CPU: what it passes on, refuses and returns.

Its results are compared in `tests/test_parity.py` and `tests/test_kernels.py`, where it is "cuda".
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ept_fast import splice_prompt
from ept_fast.backends import cuda
from ept_fast.ops.types import Flags
from tests.cases import Sizes, make_case
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
    case = make_case(Sizes(d=37), padding=padding, dtype=torch.float32)
    compiled = torch.compile(case.both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled("cuda"), case.both("cuda"))


def test_shapes_of_the_outputs() -> None:
    """As the fakes of the operators in Python have them: shape, type and order."""
    case = make_case(BANK, dtype=torch.bfloat16)
    parameters, flags = case.tensors(), Flags(0.4, "gelu", "token", 0.7)
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
