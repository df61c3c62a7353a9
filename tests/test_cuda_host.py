"""The CUDA kernels run on a host, block by block and thread by thread, against the definition."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ept_fast import reconstruct_prompt, splice_prompt
from ept_fast.backends import eager
from ept_fast.ops.types import Flags, Saved
from tests import host_kernels as kernels
from tests import test_golden
from tests.cases import (
    ACTIVATIONS,
    GATES,
    PADDINGS,
    PARTS,
    SEVEN,
    TYPES,
    Sizes,
    make_case,
    run,
    typed,
)
from tests.parity import (
    LARGE_SCORES,
    assert_as_exact_as_the_definition,
    assert_no_slope_at_zero,
    cotangent_of,
    large_scores,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "host"),
    pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler on this machine"),
]
SHAPES = {
    "one": Sizes(m=1, n=1, r=1, k=1, h=1, d=1, batch=1, length=1),
    "prime": Sizes(m=7, n=29, r=5, k=3, h=5, d=37, batch=5, length=23),
    "bank": Sizes(m=5, n=17, r=3, k=2, h=4, d=24, batch=7, length=13, tasks=4),
    "more tasks than rows": Sizes(m=3, n=11, r=2, k=2, h=3, d=19, batch=4, length=9, tasks=9),
    # More than one tile of everything: tokens, positions, channels, rank, columns of the spaces.
    "tiles": Sizes(m=37, n=70, r=35, k=3, h=12, d=136, batch=9, length=67),
    "a bank of tiles": Sizes(m=9, n=40, r=18, k=2, h=9, d=264, batch=6, length=35, tasks=3),
}
TABLE = [
    (shape, padding)
    for shape in SHAPES
    for padding in {"one": ("none", "rows"), "tiles": ("left", "holes")}.get(shape, PADDINGS)
]
EVERY_ROW = ("prime", "tiles", "a bank of tiles")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.as_backend(monkeypatch)


# Parity


@pytest.mark.parametrize("types", TYPES)
def test_parity_of_types(types: str) -> None:
    """Every shape with every padding."""
    cases = (
        make_case(SHAPES[shape], padding=padding, dtype=torch.float32, seed=seed)
        for seed, (shape, padding) in enumerate(TABLE)
    )
    assert_as_exact_as_the_definition((typed(case, types) for case in cases), "host")


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
    assert_as_exact_as_the_definition(cases, "host")


@pytest.mark.parametrize(("scores", "size", "cancels"), LARGE_SCORES)
def test_large_scores(scores: str, size: float, cancels: bool) -> None:
    assert_as_exact_as_the_definition(large_scores(scores, size), "host", cancels=cancels)


def test_relu_has_no_slope_at_zero() -> None:
    assert_no_slope_at_zero("host")


@pytest.mark.parametrize("types", ["bf16 table", "fp16 table", "fp32"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_text_is_rounded_once(types: str, padding: str) -> None:
    """With an offset that float32 holds exactly the result is the rounded sum, bit for bit."""
    case = typed(make_case(Sizes(d=24), padding=padding, dtype=torch.float32), types)
    prompt, a, b = (
        torch.randint(-4, 5, case.parameters[name].shape, generator=torch.Generator()).float()
        for name in SEVEN[:3]
    )
    got, expected = (
        splice_prompt(
            prompt,
            input_ids=case.input_ids,
            weight=case.weight,
            offset_a=a,
            offset_b=b,
            scaling=0.25,
            attention_mask=case.attention_mask,
            backend=name,
        )
        for name in ("host", "reference")
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matrix_units_keep_what_one_tf32_product_loses(dtype: torch.dtype) -> None:
    """Hardly an element of a pure offset is rounded to another number than the exact one is."""
    g = torch.Generator().manual_seed(0)
    prompt, a, b = (torch.randn(*shape, generator=g) for shape in ((1, 64), (80, 33), (33, 64)))
    out = splice_prompt(
        prompt,
        inputs_embeds=torch.zeros(1, 80, 64, dtype=dtype),
        offset_a=a,
        offset_b=b,
        backend="host",
    )
    exact = (a.double() @ b.double()).to(dtype)
    assert (out[0, 1:] != exact).float().mean() < 0.01


def test_conversions_to_sixteen_bits() -> None:
    """Every value of float16, and float32 values around every boundary, round as torch's do."""
    loaded = kernels.library()
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    for bits, expected in enumerate(halves.float().tolist()):
        got = loaded.ept_from_half(bits)
        assert got == expected or (got != got and expected != expected)
    g = torch.Generator().manual_seed(0)
    steps = torch.randint(-(2**31), 2**31 - 1, (20000,), generator=g, dtype=torch.int64)
    some = steps.to(torch.int32).view(torch.float32)
    between = torch.cat([some, halves.float(), halves.float() * (1 + 2**-11)])
    ties = (halves.float()[:-1] + halves.float()[1:]) / 2
    numbers = torch.cat([between, ties, torch.tensor([65519.9, 65520.0, 2**-25, 2**-26, 3e38])])
    numbers = numbers[~numbers.isnan()]
    for dtype, convert in (
        (torch.float16, loaded.ept_half),
        (torch.bfloat16, loaded.ept_bfloat16),
    ):
        expected_bits = numbers.to(dtype).view(torch.int16).int() & 0xFFFF
        assert [convert(number) for number in numbers.tolist()] == expected_bits.tolist()
        bits = torch.tensor([convert(float("nan"))], dtype=torch.int32).to(torch.int16)
        assert bits.view(dtype).isnan().all()


# Layouts


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values at other strides; what lies between them is NaN."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if layout == "reversed axes":
        axes = tuple(range(tensor.dim()))[::-1]
        return tensor.permute(axes).contiguous().permute(axes)
    fill = float("nan") if tensor.is_floating_point() else 10**6
    if layout in ("shifted", "wide rows"):
        first = 1 if layout == "shifted" else 0
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), fill, dtype=tensor.dtype)
        part = wide[..., first : first + tensor.shape[-1]]
        return part.copy_(tensor)
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), fill, dtype=tensor.dtype)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


@pytest.mark.parametrize("types", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "layout", ["transposed", "reversed axes", "sliced", "shifted", "wide rows"]
)
@pytest.mark.parametrize("tasks", [None, 2])
def test_strides_change_no_bit(layout: str, tasks: int | None, types: str) -> None:
    """d = 24 moves in vectors where it is plain, and element by element where it is not."""
    sizes = Sizes(m=5, n=12, r=3, k=2, h=4, d=24, batch=4, length=9, tasks=tasks)
    case = typed(make_case(sizes, padding="left", dtype=torch.float32), types)
    cotangent = cotangent_of(case)
    plain = run(case, "host", cotangent)
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
    for name, tensor in run(other, "host", _laid_out(cotangent, layout)).items():
        assert torch.equal(tensor, plain[name]), name


def test_an_unaligned_output() -> None:
    case = make_case(Sizes(d=16), dtype=torch.float32)
    plain, shifted = (kernels.splice_forward(case.inputs(), 0.5, shift=shift) for shift in (0, 1))
    assert torch.equal(plain, shifted)


def test_expanded_inputs_and_gradients() -> None:
    """Stride-0 parameters, embeddings, mask and gradient (that of a plain sum)."""
    grads = {}
    g = torch.Generator().manual_seed(0)
    prompt = torch.randn(1, 24, generator=g).expand(3, 24).requires_grad_()
    a = torch.randn(1, 2, generator=g).expand(9, 2).requires_grad_()
    b = torch.randn(2, 1, generator=g).expand(2, 24).requires_grad_()
    embeds = torch.randn(1, 1, 24, generator=g).expand(4, 6, 24)
    mask = torch.ones(1, 1, dtype=torch.int64).expand(4, 6)
    for name in ("host", "reference"):
        fused = reconstruct_prompt(prompt, a, b, backend=name)
        out = splice_prompt(
            fused, inputs_embeds=embeds, offset_a=a, offset_b=b, attention_mask=mask, backend=name
        )
        grads[name] = [out.detach(), *torch.autograd.grad(out.sum(), [prompt, a, b])]
    for got, expected in zip(grads["host"], grads["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str
)
def test_masks_and_ids_of_every_type(dtype: torch.dtype) -> None:
    case = make_case(Sizes(tasks=3), padding="holes", dtype=torch.float32)
    assert case.attention_mask is not None
    assert case.task_ids is not None
    cotangent = cotangent_of(case)
    expected = run(case, "host", cotangent)
    other = replace(
        case,
        attention_mask=case.attention_mask.to(dtype),
        input_ids=case.input_ids.int(),
        task_ids=case.task_ids.int(),
    )
    for name, tensor in run(other, "host", cotangent).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("padding", PADDINGS)
def test_inputs_embeds_get_what_a_lookup_gets(padding: str) -> None:
    case = make_case(Sizes(tasks=2), padding=padding, dtype=torch.float32)
    embeds = case.weight[case.input_ids].requires_grad_()
    looked_up = case.splice(case.parameters["short_prompt"], "host")
    given_ = case.splice(case.parameters["short_prompt"], "host", inputs_embeds=embeds)
    assert torch.equal(looked_up, given_)


# Limits

LIMITS = {
    "d": (Sizes(m=1, n=2, r=2, k=1, h=2, d=16384, batch=1, length=1), {}),
    "n": (Sizes(m=2, n=32768, r=2, k=1, h=2, d=8, batch=1, length=40), {}),
    "S": (Sizes(m=1, n=5000, r=2, k=1, h=2, d=8, batch=2, length=5000), {"padding": "holes"}),
    "r": (Sizes(m=9, n=40, r=256, k=2, h=3, d=33, batch=5, length=40), {}),
    "r in a bank": (Sizes(m=9, n=70, r=100, k=2, h=3, d=260, batch=5, length=70, tasks=2), {}),
    "K·h": (Sizes(m=2, n=5, r=3, k=8, h=64, d=33, batch=1, length=4), {}),
    "K": (Sizes(m=2, n=5, r=256, k=512, h=1, d=17, batch=1, length=4), {}),
    "K, one gate": (
        Sizes(m=2, n=5, r=256, k=512, h=1, d=17, batch=1, length=4),
        {"gate": "prompt"},
    ),
    "m": (Sizes(m=600, n=5, r=3, k=2, h=2, d=17, batch=1, length=4), {}),
    "m, one gate": (Sizes(m=512, n=3, r=2, k=1, h=2, d=5, batch=1, length=1), {"gate": "prompt"}),
    "batch": (Sizes(m=1, n=2, r=1, k=1, h=1, d=8, batch=600, length=2), {}),
    "batch of a bank": (Sizes(m=1, n=2, r=1, k=1, h=1, d=8, batch=300, length=2, tasks=5), {}),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_largest_sizes(limit: str) -> None:
    """Twice the error of plain PyTorch, or what a float32 sum of such a length may lose."""
    sizes, flags = LIMITS[limit]
    case = make_case(sizes, dtype=torch.float32, **{"padding": "none", **flags})
    cotangent = cotangent_of(case)
    exact = run(case.to(torch.float64), "reference", cotangent)
    others = [run(case, name, cotangent) for name in ("reference", "eager")]
    for name, tensor in run(case, "host", cotangent).items():
        scale = exact[name].abs().max().item()
        theirs = max((other[name].double() - exact[name]).abs().max().item() for other in others)
        error = (tensor.double() - exact[name]).abs().max().item()
        assert error <= max(5e-6 * scale, 2 * theirs), name


def test_the_largest_bank() -> None:
    """4096 tasks, of which three have rows."""
    sizes = Sizes(m=1, n=4, r=1, k=1, h=1, d=3, batch=4, length=4, tasks=4096)
    case = make_case(sizes, dtype=torch.float32, padding="left")
    case = replace(case, task_ids=torch.tensor([4095, 0, 2048, 4095]))
    cotangent = cotangent_of(case)
    expected = run(case, "eager", cotangent)
    for name, tensor in run(case, "host", cotangent).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.default_algorithms
def test_beyond_two_to_the_31_elements() -> None:
    """Rows of a table, and every tensor's last row, that 32-bit offsets would not reach."""
    width, rows = 64, 2**25 + 3
    weight = torch.empty(rows, width, dtype=torch.bfloat16)
    ids = torch.tensor([[rows - 1, 0, rows - 2]])
    weight[ids[0]] = torch.arange(3 * width, dtype=torch.float32).reshape(3, width).bfloat16()
    a, b = torch.ones(3, 1), torch.ones(1, width)
    out = splice_prompt(
        torch.zeros(1, width), input_ids=ids, weight=weight, offset_a=a, offset_b=b, backend="host"
    )
    assert torch.equal(out[0, 1:], (weight[ids[0]].float() + 1).bfloat16())
    del weight

    far = 2**31 + 7

    def spread(tensor: Tensor) -> Tensor:
        size = (tensor.shape[0] - 1) * far + tensor[0].numel()
        view = torch.empty(size, dtype=tensor.dtype).as_strided(
            tensor.shape, (far, *tensor.stride()[1:])
        )
        return view.copy_(tensor)

    sizes = Sizes(m=2, n=2, r=2, k=2, h=2, d=5, batch=2, length=2)
    case = make_case(sizes, padding="none", dtype=torch.bfloat16)
    cotangent = cotangent_of(case)
    plain = run(case, "host", cotangent)
    for name in SEVEN[:6]:
        moved = {
            key: (spread(t.detach()) if key == name else t.detach()).requires_grad_()
            for key, t in case.parameters.items()
        }
        got = run(replace(case, parameters=moved), "host", cotangent)
        for key, tensor in got.items():
            assert torch.equal(tensor, plain[key]), (name, key)
        del moved, got
    for key, tensor in run(case, "host", spread(cotangent)).items():
        assert torch.equal(tensor, plain[key]), key


# Ids


def test_ids_outside_are_nan_and_never_read() -> None:
    case = make_case(Sizes(tasks=3), dtype=torch.float32, padding="none")
    tasks = torch.tensor([0, 3, 2, -1])
    ids = case.input_ids.clone()
    ids[0, 1], ids[2, 5], ids[2, 0] = 11, -1, 2**62
    out = kernels.splice_forward(case.inputs(input_ids=ids, task_ids=tasks), 0.5)
    text = out[:, 3:]
    bad = torch.zeros(4, 6, dtype=torch.bool)
    bad[0, 1] = bad[2, 5] = bad[2, 0] = True
    bad[1] = bad[3] = True
    assert text[bad].isnan().all()
    assert text[~bad].isfinite().all()
    assert out[[1, 3]].isnan().all()
    assert out[[0, 2], :3].isfinite().all()


@pytest.mark.parametrize("tasks", [1, 3, 9])
def test_rows_without_a_task_get_no_gradient(tasks: int) -> None:
    case = make_case(Sizes(tasks=tasks), dtype=torch.float32, padding="none")
    last = tasks - 1
    ids = torch.tensor([0, tasks, last, -1])
    grad = torch.ones(4, 9, 5)
    alone = torch.zeros_like(grad)
    alone[[0, 2]] = 1
    rest = (0.5, True, True)
    got = kernels.splice_backward(grad, case.inputs(task_ids=ids), *rest)
    kept = torch.tensor([0, 0, last, last])
    expected = eager.splice_backward(alone, case.inputs(task_ids=kept), *rest)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# Determinism


@pytest.mark.default_algorithms
@pytest.mark.parametrize("types", ["fp32", "bf16"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", EVERY_ROW)
def test_the_order_of_threads_changes_no_bit(shape: str, gate: str, types: str) -> None:
    """A phase in which a thread read what another one writes would differ, and so would a race
    between blocks."""
    case = make_case(SHAPES[shape], padding="holes", dtype=torch.float32, gate=gate)
    case = typed(case, types)
    cotangent = cotangent_of(case)
    upwards = run(case, "host", cotangent)
    with kernels.downwards():
        for name, tensor in run(case, "host", cotangent).items():
            assert torch.equal(tensor, upwards[name]), name
    for name, tensor in run(case, "host", cotangent).items():
        assert torch.equal(tensor, upwards[name]), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("amount", [1, 37])
def test_padding_changes_no_bit_of_a_token(side: str, amount: int) -> None:
    case = make_case(Sizes(n=64, d=21), padding="none", dtype=torch.float32)
    plain = case.splice(case.parameters["short_prompt"], "host")
    pad = (amount, 0) if side == "left" else (0, amount)
    padded = replace(
        case,
        input_ids=torch.nn.functional.pad(case.input_ids, pad),
        attention_mask=torch.nn.functional.pad(torch.ones_like(case.input_ids), pad),
    )
    out = padded.splice(case.parameters["short_prompt"], "host")
    text = out[:, 3 + amount :] if side == "left" else out[:, 3 : 3 + 6]
    assert torch.equal(text, plain[:, 3:])


def test_neighbours_change_no_bit_of_a_row() -> None:
    """A row alone, in a batch, in another place of it: the same text out."""
    case = make_case(Sizes(batch=11, n=40, length=35), padding="holes", dtype=torch.float32)
    prompt = case.parameters["short_prompt"]
    whole = case.splice(prompt, "host")
    assert case.attention_mask is not None
    for rows in ([3], [10, 3], [0, 1, 2, 3]):
        some = replace(
            case, input_ids=case.input_ids[rows], attention_mask=case.attention_mask[rows]
        )
        assert torch.equal(some.splice(prompt, "host"), whole[rows])


# What is saved


@pytest.mark.parametrize("gate", GATES)
def test_what_is_saved(gate: str) -> None:
    case = make_case(Sizes(tasks=2, m=9, n=40), dtype=torch.float32)
    parameters, flags = case.tensors(), Flags(0.4, "gelu", gate, 0.7)
    got, expected = (
        (prompt, *saved)
        for prompt, saved in (m.reconstruct_forward(parameters, flags) for m in (kernels, eager))
    )
    assert parameters.offset_a is not None
    scores = expected[1] @ (0.4 * parameters.offset_a).mT
    top = scores.amax(-1)
    total = ((scores - top.unsqueeze(-1)) / case.sizes.d**0.5).exp().sum(-1)
    expected = (*expected[:2], torch.stack([top, total], 1), *expected[3:])
    names = ("prompt", *Saved._fields)
    for name, one, other in zip(names, got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("name", test_golden.CASES)
def test_golden_vectors(shared_golden: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as the Triton kernels are checked, in whose place these stand here."""
    kernels.as_backend(monkeypatch, "triton")
    test_golden.test_reconstruct(shared_golden, name, "triton")
    for lookup in (True, False):
        test_golden.test_splice(shared_golden, name, lookup, "triton")


# Launches and memory

NAMED = {
    "t5-base": Sizes(m=40, n=256, r=30, k=4, h=8, d=768, batch=32, length=256),
    "llama-8b": Sizes(m=60, n=2048, r=24, k=4, h=16, d=4096, batch=8, length=2048),
    "long": Sizes(m=60, n=32768, r=24, k=4, h=16, d=4096, batch=1, length=32768),
    "64 tasks": Sizes(m=20, n=256, r=8, k=2, h=8, d=768, batch=64, length=256, tasks=64),
}
LARGEST = {
    "one prompt": Sizes(m=512, n=32768, r=256, k=8, h=64, d=16384, batch=2, length=32768),
    "many spaces": Sizes(m=512, n=32768, r=256, k=512, h=1, d=16384, batch=2, length=32768),
    "a bank": Sizes(m=100, n=256, r=30, k=4, h=8, d=768, batch=64, length=256, tasks=4096),
    "more rows": Sizes(m=20, n=64, r=8, k=2, h=8, d=256, batch=8192, length=64, tasks=4096),
}
SHARED_BYTES = 48 * 1024  # what a block can have on every GPU without asking for more


def _counts(s: Sizes, has_mask: bool = True) -> dict[str, kernels.Counted]:
    tasks = {"tasks": s.tasks or 1}
    sizes = {"tokens": s.m, "positions": s.n, "rank": s.r, "width": s.d} | tasks
    prompt = sizes | {"spaces": s.k, "dim": s.h}
    splice = {"batch": s.batch, "length": s.length, "tokens": s.m, "width": s.d, "rank": s.r}
    splice |= tasks
    seven = dict.fromkeys(SEVEN, torch.float32)
    offset = {"offset_a": torch.float32, "offset_b": torch.float32}
    rest = offset | ({"attention_mask": torch.int64} if has_mask else {})
    rest |= {} if s.tasks is None else {"task_ids": torch.int64}
    text = {"prompt": torch.float32, "source": torch.bfloat16, "input_ids": torch.int64}
    grads = ("d_prompt", "d_offset_a", "d_offset_b")
    return {
        "reconstruct_forward": kernels.count("reconstruct_forward", prompt, seven),
        "reconstruct_backward": kernels.count(
            "reconstruct_backward", prompt, {**seven, "grad": torch.float32}
        ),
        "splice_forward": kernels.count("splice_forward", splice, {**text, **rest}),
        "splice_backward": kernels.count(
            "splice_backward",
            {**splice, "positions": s.n},
            {"grad": torch.bfloat16, "prompt": torch.float32, **rest},
            *grads,
        ),
    }


@pytest.mark.parametrize("shape", [*SHAPES, *NAMED])
def test_launches(shape: str) -> None:
    """Three each way for the first operation; one and two for the second, and one for a plan of
    its masks and task ids."""
    s = NAMED.get(shape) or SHAPES[shape]
    for has_mask in (False, True):
        plans = int(has_mask or s.tasks is not None)
        counted = {name: each.launches for name, each in _counts(s, has_mask).items()}
        assert counted["reconstruct_forward"] == 3
        assert counted["reconstruct_backward"] == 3
        assert counted["splice_forward"] == 1 + plans
        assert counted["splice_backward"] <= 2 + plans


@pytest.mark.parametrize("name", NAMED)
def test_workspace(name: str) -> None:
    """Under 8 MB, but for one very long row, whose parts of dA and dB take an eighth of the
    gradient's memory: fewer blocks would leave a GPU idle."""
    s = NAMED[name]
    for operation, counted in _counts(s).items():
        most = 8 * 1024 * 1024
        if name == "long" and operation == "splice_backward":
            most = s.batch * s.length * s.d * 2 // 8
        assert counted.workspace < most, operation


@pytest.mark.parametrize("name", [*NAMED, *LARGEST])
def test_grids_and_shared_memory(name: str) -> None:
    for counted in _counts(NAMED.get(name) or LARGEST[name]).values():
        assert counted.grid < 2**31
        assert counted.shared <= SHARED_BYTES


@pytest.mark.parametrize("tasks", [None, 3])
def test_blocks_that_take_several_tiles(tasks: int | None) -> None:
    """As where memory for the parts is short: each adds to what it has written before."""
    sizes = Sizes(m=19, n=150, r=160, k=2, h=6, d=900, batch=5, length=150, tasks=tasks)
    case = make_case(sizes, padding="holes", dtype=torch.float32)
    assert_as_exact_as_the_definition([case], "host")


# Memory


SANITIZED = """
import torch
from tests import host_kernels as kernels
from tests import test_golden
from tests.test_cuda_host import SHAPES
from ept_fast.ops.types import Flags
from tests.cases import make_case

torch.set_num_threads(1)
for shape in SHAPES.values():
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(shape, dtype=dtype, gate="prompt")
        parameters, flags = case.tensors(), Flags(0.5, "gelu", "prompt", 1.0)
        prompt, saved = kernels.reconstruct_forward(parameters, flags)
        inputs = case.inputs(prompt)
        out = kernels.splice_forward(inputs, 0.5)
        d_prompt, *_ = kernels.splice_backward(out, inputs, 0.5, True, True)
        kernels.reconstruct_backward(d_prompt, parameters, saved, flags)
print("done")
"""


@pytest.mark.slow
def test_no_access_outside_any_tensor(tmp_path: Path, root: Path) -> None:
    """Under the compiler's sanitizers, which see reads as well as writes."""
    found = kernels.compiler()
    assert found is not None
    asked = subprocess.run([found, "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(asked.stdout.strip())
    if not runtime.is_absolute() or not runtime.exists():
        pytest.skip("the compiler has no address sanitizer")
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    path = kernels.build(tmp_path, *flags)
    environment = os.environ | {
        "EPT_HOST_LIBRARY": str(path),
        "LD_PRELOAD": str(runtime.resolve()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED], capture_output=True, text=True, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "done"
