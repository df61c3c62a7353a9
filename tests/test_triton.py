"""The Triton kernels under Triton's interpreter: parity, layouts, limits, launches, memory."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ept_fast import reconstruct_prompt, splice_prompt
from ept_fast.backends import eager
from ept_fast.backends import triton as backend
from ept_fast.kernels import launch
from ept_fast.ops.types import Flags, Parameters, SpliceInputs
from tests.cases import (
    ACTIVATIONS,
    GATES,
    PADDINGS,
    PARTS,
    TYPES,
    Sizes,
    make_case,
    run,
    shapes_of,
    typed,
)
from tests.parity import (
    LARGE_SCORES,
    assert_as_exact_as_the_definition,
    assert_no_slope_at_zero,
    cotangent_of,
    large_scores,
    needs_interpreter,
)

pytestmark = [needs_interpreter, pytest.mark.usefixtures("one_thread")]
SHAPES = {
    "one": Sizes(m=1, n=1, r=1, k=1, h=1, d=1, batch=1, length=1),
    "prime": Sizes(m=7, n=29, r=5, k=3, h=5, d=37, batch=5, length=23),
    "bank": Sizes(m=5, n=17, r=3, k=2, h=4, d=24, batch=7, length=13, tasks=4),
    "more tasks than rows": Sizes(m=3, n=11, r=2, k=2, h=3, d=19, batch=4, length=9, tasks=9),
    # More than one block of everything: tokens, positions, channels, rank, columns of the spaces.
    "blocks": Sizes(m=19, n=70, r=33, k=3, h=12, d=130, batch=9, length=67),
}
EVERY_ROW = ("prime", "blocks")


# Parity

TABLE = [
    (shape, padding)
    for shape in SHAPES
    for padding in {"one": ("none", "rows"), "blocks": ("left", "holes")}.get(shape, PADDINGS)
]


@pytest.mark.slow
@pytest.mark.parametrize("types", TYPES)
def test_parity_of_types(types: str) -> None:
    """Every shape with every padding."""
    cases = (
        make_case(SHAPES[shape], padding=padding, dtype=torch.float32, seed=seed)
        for seed, (shape, padding) in enumerate(TABLE)
    )
    assert_as_exact_as_the_definition((typed(case, types) for case in cases), "triton")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parity_of_flags(activation: str, gate: str) -> None:
    """Every part of the method left out, alone and in a bank."""
    sizes = Sizes(m=17, n=9, r=3, k=3, h=6, d=21, batch=3, length=5)
    flags = {"activation": activation, "gate": gate, "dtype": torch.float32}
    cases = (
        make_case(replace(sizes, tasks=tasks), seed=seed, **flags, **part)
        for seed in range(2)
        for tasks in (None, 3)
        for part in PARTS.values()
    )
    assert_as_exact_as_the_definition(cases, "triton")


@pytest.mark.parametrize(("scores", "size", "cancels"), LARGE_SCORES)
def test_large_scores(scores: str, size: float, cancels: bool) -> None:
    assert_as_exact_as_the_definition(large_scores(scores, size), "triton", cancels=cancels)


def test_relu_has_no_slope_at_zero() -> None:
    assert_no_slope_at_zero("triton")


# Layouts


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values at other strides; what lies between them is NaN."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if layout == "reversed axes":
        axes = tuple(range(tensor.dim()))[::-1]
        return tensor.permute(axes).contiguous().permute(axes)
    fill = float("nan") if tensor.is_floating_point() else 10**6
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), fill, dtype=tensor.dtype)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


@pytest.mark.parametrize("layout", ["transposed", "reversed axes", "sliced"])
@pytest.mark.parametrize("tasks", [None, 2])
def test_strides_change_no_bit(layout: str, tasks: int | None) -> None:
    sizes = Sizes(m=5, n=12, r=3, k=2, h=4, d=21, batch=4, length=9, tasks=tasks)
    case = make_case(sizes, padding="left", dtype=torch.float32)
    cotangent = cotangent_of(case)
    plain = run(case, "triton", cotangent)
    strided = {
        name: _laid_out(t.detach(), layout).requires_grad_() for name, t in case.parameters.items()
    }
    assert case.attention_mask is not None
    other = replace(
        case,
        parameters=strided,
        weight=_laid_out(case.weight, layout),
        input_ids=_laid_out(case.input_ids, layout),
        attention_mask=_laid_out(case.attention_mask, layout),
    )
    for name, tensor in run(other, "triton", _laid_out(cotangent, layout)).items():
        assert torch.equal(tensor, plain[name]), name


def test_expanded_inputs_and_gradients() -> None:
    """Stride-0 parameters, embeddings, mask and gradient (that of a plain sum)."""
    grads = {}
    g = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 21, generator=g).expand(3, 21).requires_grad_()
    a = torch.randn(1, 2, generator=g).expand(9, 2).requires_grad_()
    b = torch.randn(2, 1, generator=g).expand(2, 21).requires_grad_()
    embeds = torch.randn(1, 1, 21, generator=g).expand(4, 6, 21)
    mask = torch.ones(1, 1, dtype=torch.int64).expand(4, 6)
    for name in ("triton", "reference"):
        fused = reconstruct_prompt(prompt, a, b, backend=name)
        out = splice_prompt(
            fused, inputs_embeds=embeds, offset_a=a, offset_b=b, attention_mask=mask, backend=name
        )
        grads[name] = [out.detach(), *torch.autograd.grad(out.sum(), [prompt, a, b])]
    for got, expected in zip(grads["triton"], grads["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str
)
def test_masks_of_every_type(dtype: torch.dtype) -> None:
    case = make_case(Sizes(), padding="holes", dtype=torch.float32)
    assert case.attention_mask is not None
    cotangent = cotangent_of(case)
    expected = run(case, "triton", cotangent)
    other = replace(
        case, attention_mask=case.attention_mask.to(dtype), input_ids=case.input_ids.int()
    )
    for name, tensor in run(other, "triton", cotangent).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("padding", PADDINGS)
def test_inputs_embeds_get_what_a_lookup_gets(padding: str) -> None:
    case = make_case(Sizes(tasks=2), padding=padding, dtype=torch.float32)
    embeds = case.weight[case.input_ids].requires_grad_()
    looked_up = case.splice(case.parameters["short_prompt"], "triton")
    given_ = case.splice(case.parameters["short_prompt"], "triton", inputs_embeds=embeds)
    assert torch.equal(looked_up, given_)
    cotangent = cotangent_of(case)
    (grad,) = torch.autograd.grad(given_, embeds, cotangent)
    assert torch.equal(grad, cotangent[:, case.sizes.m :])


# Limits


LIMITS = {
    "d": (Sizes(m=1, n=2, r=2, k=1, h=2, d=16384, batch=1, length=1), {}),
    "n": (Sizes(m=2, n=32768, r=2, k=1, h=2, d=8, batch=1, length=40), {}),
    "r": (Sizes(m=2, n=5, r=256, k=2, h=3, d=33, batch=1, length=4), {}),
    "K·h": (Sizes(m=2, n=5, r=3, k=8, h=64, d=33, batch=1, length=4), {}),
    "K": (Sizes(m=2, n=5, r=3, k=512, h=1, d=17, batch=1, length=4), {}),
    "K, one gate": (Sizes(m=2, n=5, r=3, k=512, h=1, d=17, batch=1, length=4), {"gate": "prompt"}),
    "m": (Sizes(m=512, n=5, r=3, k=2, h=2, d=17, batch=1, length=4), {}),
    "m, one gate": (Sizes(m=512, n=3, r=2, k=1, h=2, d=5, batch=1, length=1), {"gate": "prompt"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_largest_sizes(limit: str) -> None:
    sizes, flags = LIMITS[limit]
    case = make_case(sizes, dtype=torch.float32, padding="none", **flags)
    cotangent = cotangent_of(case)
    exact = run(case.to(torch.float64), "reference", cotangent)
    for name, tensor in run(case, "triton", cotangent).items():
        scale = exact[name].abs().max().item()
        torch.testing.assert_close(
            tensor.double(),
            exact[name],
            rtol=0,
            atol=5e-6 * scale,
            msg=lambda m, n=name: f"{n} {m}",
        )


def test_the_largest_bank() -> None:
    """4096 tasks, of which three have rows; the prompts of every task would take hours here."""
    sizes = Sizes(m=1, n=4, r=1, k=1, h=1, d=3, batch=4, length=4, tasks=4096)
    case = make_case(sizes, dtype=torch.float32, padding="left")
    case = replace(case, task_ids=torch.tensor([4095, 0, 2048, 4095]))
    prompt = case.parameters["short_prompt"]
    got, expected = (case.splice(prompt, name) for name in ("triton", "eager"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    bank = make_case(replace(sizes, tasks=65), dtype=torch.float32)
    got, expected = (bank.reconstruct(name) for name in ("triton", "eager"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensor", "sizes", "says"),
    [
        ("rank", Sizes(r=257), "rank 257 is more than 256"),
        ("tokens", Sizes(m=513), "513 virtual tokens are more than 512"),
        ("spaces", Sizes(k=9, h=64), "9 subspaces of width 64 are more than 512 together"),
    ],
)
def test_sizes_beyond_them_are_refused(tensor: str, sizes: Sizes, says: str) -> None:
    case = make_case(sizes, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=f"backend: 'triton' does not support this call: {says}"):
        case.reconstruct("triton")
    assert case.reconstruct("eager").shape == (sizes.m, sizes.d)


def _sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory that the system hands out page by page, when it is touched."""
    return torch.empty(shape, dtype=dtype)


@pytest.mark.default_algorithms
def test_tables_beyond_two_to_the_31_elements() -> None:
    """Rows of a table and of the text that 32-bit offsets would not reach."""
    width, rows = 64, 2**25 + 3
    weight = _sparse(rows, width, dtype=torch.bfloat16)
    assert weight.numel() > 2**31
    ids = torch.tensor([[rows - 1, 0, rows - 2]])
    weight[ids[0]] = torch.arange(3 * width, dtype=torch.float32).reshape(3, width).bfloat16()
    a, b = torch.ones(3, 1), torch.ones(1, width)
    out = splice_prompt(
        torch.zeros(1, width),
        input_ids=ids,
        weight=weight,
        offset_a=a,
        offset_b=b,
        backend="triton",
    )
    assert torch.equal(out[0, 1:], (weight[ids[0]].float() + 1).bfloat16())


@pytest.mark.default_algorithms
def test_strides_beyond_two_to_the_31_elements() -> None:
    """Every tensor's last row lies past 2**31 elements, in its own memory."""
    far = 2**31 + 7

    def spread(tensor: Tensor) -> Tensor:
        memory = _sparse((tensor.shape[0] - 1) * far + tensor[0].numel(), dtype=tensor.dtype)
        view = memory.as_strided(tensor.shape, (far, *tensor.stride()[1:]))
        return view.copy_(tensor)

    sizes = Sizes(m=2, n=2, r=2, k=2, h=2, d=5, batch=2, length=2)
    case = make_case(sizes, padding="none", dtype=torch.bfloat16)
    cotangent = cotangent_of(case)
    plain = run(case, "triton", cotangent)
    for name in ("short_prompt", "offset_a", "offset_b", "space_down", "space_up"):
        moved = {
            key: (spread(t.detach()) if key == name else t.detach()).requires_grad_()
            for key, t in case.parameters.items()
        }
        got = run(replace(case, parameters=moved), "triton", cotangent)
        for key, tensor in got.items():
            assert torch.equal(tensor, plain[key]), (name, key)
        del moved, got
    for key, tensor in run(case, "triton", spread(cotangent)).items():
        assert torch.equal(tensor, plain[key]), key


# Ids


def test_ids_outside_are_nan_and_never_read() -> None:
    """Where values are not looked at first, as on a GPU."""
    case = make_case(Sizes(tasks=3), dtype=torch.float32, padding="none")
    tasks = torch.tensor([0, 3, 2, -1])
    ids = case.input_ids.clone()
    ids[0, 1], ids[2, 5], ids[2, 0] = 11, -1, 2**62
    inputs = case.inputs(input_ids=ids, task_ids=tasks)
    out = backend.splice_forward(inputs, 0.5)
    text = out[:, 3:]
    bad = torch.zeros(4, 6, dtype=torch.bool)
    bad[0, 1] = bad[2, 5] = bad[2, 0] = True
    bad[1] = bad[3] = True
    assert text[bad].isnan().all()
    assert text[~bad].isfinite().all()
    assert out[[1, 3]].isnan().all()
    assert out[[0, 2], :3].isfinite().all()
    grad = torch.ones_like(out)
    alone = torch.zeros_like(grad)
    alone[[0, 2]] = 1
    none = backend.splice_backward(grad, inputs, 0.5, True, True)
    inputs = inputs._replace(task_ids=torch.tensor([0, 0, 2, 2]))
    kept = eager.splice_backward(alone, inputs, 0.5, True, True)
    for got, expected in zip(none, kept, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# Determinism


@pytest.mark.default_algorithms
@pytest.mark.parametrize("shape", EVERY_ROW)
def test_repeated_runs_agree_to_the_bit(shape: str) -> None:
    case = make_case(SHAPES[shape], padding="holes", dtype=torch.float32)
    cotangent = cotangent_of(case)
    first = run(case, "triton", cotangent)
    for _ in range(2):
        for name, tensor in run(case, "triton", cotangent).items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("amount", [1, 37])
def test_padding_changes_no_bit_of_a_token(side: str, amount: int) -> None:
    sizes = Sizes(n=64, d=21)
    case = make_case(sizes, padding="none", dtype=torch.float32)
    plain = case.splice(case.parameters["short_prompt"], "triton")
    pad = (amount, 0) if side == "left" else (0, amount)
    padded = replace(
        case,
        input_ids=torch.nn.functional.pad(case.input_ids, pad),
        attention_mask=torch.nn.functional.pad(torch.ones_like(case.input_ids), pad),
    )
    out = padded.splice(case.parameters["short_prompt"], "triton")
    text = out[:, 3 + amount :] if side == "left" else out[:, 3 : 3 + 6]
    assert torch.equal(text, plain[:, 3:])


def test_neighbours_change_no_bit_of_a_row() -> None:
    """A row alone, in a batch, in another place of it: the same text out."""
    case = make_case(Sizes(batch=11, n=40, length=35), padding="holes", dtype=torch.float32)
    prompt = case.parameters["short_prompt"]
    whole = case.splice(prompt, "triton")
    assert case.attention_mask is not None
    for rows in ([3], [10, 3], [0, 1, 2, 3]):
        some = replace(
            case, input_ids=case.input_ids[rows], attention_mask=case.attention_mask[rows]
        )
        assert torch.equal(some.splice(prompt, "triton"), whole[rows])


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


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("tasks", [None, 3, 9])
def test_each_element_moves_once(
    tasks: int | None, padding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings are read once, outputs written once, gradients of real tokens read once."""
    sizes = Sizes(m=5, n=40, r=3, d=70, batch=6, length=37, tasks=tasks)
    case = make_case(sizes, padding=padding, dtype=torch.float32)
    embeds = case.weight[case.input_ids]
    real = torch.ones(6, 37) if case.attention_mask is None else case.attention_mask
    traffic = _Traffic(monkeypatch)
    inputs = case.inputs(input_ids=None, weight=None, inputs_embeds=embeds)
    out = backend.splice_forward(inputs, 0.5)
    assert (traffic.of(embeds, traffic.loads) == 1).all()
    assert (traffic.of(out, traffic.stores) == 1).all()
    traffic.loads.clear()
    grad = torch.randn_like(out)
    backend.splice_backward(grad, inputs, 0.5, True, True)
    expected = torch.cat([torch.ones(6, 5), real.float()], 1).unsqueeze(-1).expand(6, 42, 70)
    read = torch.from_numpy(traffic.of(grad, traffic.loads)).reshape(6, 42, 70)
    assert torch.equal(read.float(), expected)


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


NAMED = {
    "t5-base": Sizes(m=40, n=256, r=30, k=4, h=8, d=768, batch=32, length=256),
    "llama-8b": Sizes(m=60, n=2048, r=24, k=4, h=16, d=4096, batch=8, length=2048),
    "long": Sizes(m=60, n=32768, r=24, k=4, h=16, d=4096, batch=1, length=32768),
    "64 tasks": Sizes(m=20, n=256, r=8, k=2, h=8, d=768, batch=64, length=256, tasks=64),
}


class _Counted:
    """Launches by kernel, in order; ``only_count``: none of them runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, only_count: bool = False) -> None:
        from ept_fast.kernels import reconstruct, splice

        self.names: list[str] = []

        def counted(kernel: Any, programs: int, *rest: Any, **options: Any) -> None:
            if programs:
                self.names.append(kernel.fn.__name__)
                assert programs < 2**31
                if not only_count:
                    launch.run(kernel, programs, *rest, **options)

        for module in (reconstruct, splice):
            monkeypatch.setattr(module, "run", counted)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [*SHAPES, "t5-base"])
def test_launches(shape: str, gate: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three each way for the first operation, one and two for the second, whatever the sizes."""
    counted = _Counted(monkeypatch, only_count=True)
    sizes = NAMED[shape] if shape in NAMED else SHAPES[shape]
    case = make_case(sizes, gate=gate, dtype=torch.float32, **PARTS[part])
    prompt = case.reconstruct("triton")
    assert len(counted.names) <= 3
    counted.names.clear()
    out = case.splice(prompt.detach().requires_grad_(), "triton")
    assert len(counted.names) == 1
    counted.names.clear()
    out.backward(cotangent_of(case))
    assert len(counted.names) <= 2
    counted.names.clear()
    prompt.backward(torch.ones_like(prompt))
    assert len(counted.names) <= 3


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


FLAGS = Flags(0.5, "gelu", "token", 1.0)


@pytest.mark.default_algorithms
@pytest.mark.parametrize("name", NAMED)
def test_workspace(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond outputs, gradients and what is saved: under 8 MB, nothing of size n×d or m×K×d.

    One very long row is the exception: its parts of dA and dB take an eighth of the gradient's
    memory, since fewer programs would leave a GPU idle.
    """
    counted = _Counted(monkeypatch, only_count=True)
    s = NAMED[name]
    parameters, inputs = _tensors(s)
    most = 8 * 1024 * 1024
    most_of_splice = s.batch * s.length * s.d * 2 // 8 if name == "long" else most

    def beyond(allocated: _Allocated, *wanted: Tensor) -> int:
        return sum(allocated.sizes) - sum(w.untyped_storage().nbytes() for w in wanted)

    with _Allocated() as allocated:
        prompt, saved = backend.reconstruct_forward(parameters, FLAGS)
    assert beyond(allocated, prompt, *saved) < most
    with _Allocated() as allocated:
        grads = backend.reconstruct_backward(prompt, parameters, saved, FLAGS)
    assert beyond(allocated, *grads) < most
    with _Allocated() as allocated:
        out = backend.splice_forward(inputs, 0.5)
    assert beyond(allocated, out) == 0
    with _Allocated() as allocated:
        three = backend.splice_backward(out, inputs, 0.5, True, True)
    assert beyond(allocated, *three) < most_of_splice
    assert len(counted.names) == 9


LARGEST = {
    "one prompt": Sizes(m=512, n=32768, r=256, k=8, h=64, d=16384, batch=2, length=32768),
    "a bank": Sizes(m=100, n=256, r=30, k=4, h=8, d=768, batch=64, length=256, tasks=4096),
    "more rows": Sizes(m=20, n=64, r=8, k=2, h=8, d=256, batch=8192, length=64, tasks=4096),
}


@pytest.mark.default_algorithms
@pytest.mark.parametrize("name", LARGEST)
def test_grids_of_the_largest_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All limits at once make grids that a GPU can have; no kernel runs, no memory is touched."""
    counted = _Counted(monkeypatch, only_count=True)
    parameters, inputs = _tensors(LARGEST[name])
    prompt, saved = backend.reconstruct_forward(parameters, FLAGS)
    backend.reconstruct_backward(prompt, parameters, saved, FLAGS)
    out = backend.splice_forward(inputs, 0.5)
    backend.splice_backward(out, inputs, 0.5, True, True)
    assert len(counted.names) <= 9


@pytest.mark.parametrize("tasks", [None, 3])
def test_programs_that_take_several_tiles(
    tasks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where memory for the parts is short: each adds to what it has written before."""
    from ept_fast.kernels import reconstruct, splice

    def few(config: Any) -> Any:
        return lambda *sizes: replace(config(*sizes), tiles_d=3, tiles=2, rows=8)

    def fewer(*sizes: int) -> launch.ReconstructConfig:
        return replace(
            launch.reconstruct_config(*sizes), backward_n_chunk=64, groups=1, group_rows=32
        )

    monkeypatch.setattr(splice, "splice_backward_config", few(launch.splice_backward_config))
    monkeypatch.setattr(reconstruct, "reconstruct_config", fewer)
    sizes = Sizes(m=19, n=150, r=5, k=2, h=6, d=300, batch=6, length=70, tasks=tasks)
    cases = (
        make_case(sizes, padding=padding, dtype=torch.float32, seed=seed)
        for seed, padding in enumerate(("right", "holes"))
    )
    assert_as_exact_as_the_definition(cases, "triton")


def test_launches_cover_the_rank_and_the_rows() -> None:
    for s in NAMED.values():
        sizes = (s.batch, s.length, s.m, s.d, s.r, s.tasks or 1)
        config = launch.splice_backward_config(*sizes, True, True)
        assert config.block_r >= s.r
        assert config.rows * -(-s.batch // config.rows) >= s.batch


# Selection


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
    assert backend.supports(tensors, by_name=True) == (True, "fused kernels")
    ok, reason = backend.supports(tensors)
    assert (ok, reason) == (False, "the interpreter serves a CPU only if it is asked for by name")


def test_float64_is_refused() -> None:
    case = make_case(Sizes())
    says = "short_prompt is float64, the kernels compute in float32"
    with pytest.raises(RuntimeError, match=says):
        case.reconstruct("triton")


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    case = make_case(Sizes(), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="CPU tensors, and TRITON_INTERPRET=1 is not set"):
        case.reconstruct("triton")
    assert backend.available() == (False, "no GPU")


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
    assert backend._refusal(version, architecture) == reason
