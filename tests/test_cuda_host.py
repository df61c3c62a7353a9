"""The CUDA kernels run on a host, block by block and thread by thread, against the definition."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import shapes
from ept_fast import splice_prompt
from ept_fast.backends import eager
from ept_fast.ops.types import Flags, Saved
from tests import cases
from tests import host_kernels as kernels
from tests.cases import (
    BIASED,
    BIASES,
    GATES,
    LARGEST,
    NAMED,
    PADDINGS,
    SEVEN,
    Sizes,
    make_case,
    run,
)
from tests.parity import HOST, assert_as_exact_as_the_definition, cotangent_of, over
from tests.processes import python

pytestmark = [pytest.mark.usefixtures("one_thread"), kernels.needs_compiler]
SHAPES = {"prime": cases.SHAPES["prime"], **cases.TILES["host"]}


# Rounding


@over(HOST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_matrix_units_keep_what_one_tf32_product_loses(dtype: torch.dtype, backend: str) -> None:
    """Hardly an element of a pure offset is rounded to another number than the exact one is."""
    g = torch.Generator().manual_seed(0)
    prompt, a, b = (torch.randn(*shape, generator=g) for shape in ((1, 64), (80, 33), (33, 64)))
    out = splice_prompt(
        prompt,
        inputs_embeds=torch.zeros(1, 80, 64, dtype=dtype),
        offset_a=a,
        offset_b=b,
        backend=backend,
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


def test_an_unaligned_output() -> None:
    case = make_case(Sizes(d=16), dtype=torch.float32)
    plain, shifted = (
        kernels.splice_forward(case.inputs(), 0.5, shift=shift)[0] for shift in (0, 1)
    )
    assert torch.equal(plain, shifted)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["EPT_CUT_SUMS", "EPT_NO_MATRIX_UNITS"])
@over(HOST)
def test_other_matrix_units(
    flag: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units that cut every sum, and a GPU that has none."""
    path = kernels.build(tmp_path, f"-D{flag}")
    kernels.library.cache_clear()
    monkeypatch.setenv("EPT_HOST_LIBRARY", str(path))
    sizes = [*SHAPES.values(), Sizes(m=3, n=700, r=24, k=2, h=3, d=136, batch=2, length=700)]
    drawn = [
        make_case(each, padding=padding, dtype=torch.float32, seed=seed)
        for seed, (each, padding) in enumerate((s, p) for s in sizes for p in PADDINGS)
    ]
    try:
        for types in ("fp32", "bf16 table"):
            assert_as_exact_as_the_definition([case.typed(types) for case in drawn], backend)
    finally:
        kernels.library.cache_clear()


# The plan


@over(HOST)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.bool], ids=str)
def test_plan_of_a_long_mask(dtype: torch.dtype, backend: str) -> None:
    """Stretches of one row by several blocks, in pieces of 16 bytes or not: every mask as the
    definition reads it."""
    length = 3 * 2048 + 5
    g = torch.Generator().manual_seed(0)
    columns = torch.arange(length)
    masks = {
        "holes": torch.rand(length, generator=g) < 0.5,
        "a hole far away": columns != length - 2,
        "one stretch": (columns >= 2050) & (columns < 4099),
        "right": columns < 2047,
        "all": columns >= 0,
        "none": columns < 0,
    }
    mask = torch.stack(list(masks.values())).to(dtype)
    shifted = torch.nn.functional.pad(mask, (1, 2))[:, 1:-2]
    text = {
        "inputs_embeds": torch.randn(len(masks), length, 8, generator=g),
        "offset_a": torch.randn(length, 2, generator=g),
        "offset_b": torch.randn(2, 8, generator=g),
    }
    for given in (mask, shifted):
        out, expected = (
            splice_prompt(torch.zeros(1, 8), **text, attention_mask=given, backend=name)
            for name in (backend, "reference")
        )
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


# Determinism


@pytest.mark.default_algorithms
@over(HOST)
@pytest.mark.parametrize("types", ["fp32", "bf16"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("part", ["all", "biases", "biases, no gate"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_threads_changes_no_bit(
    shape: str, part: str, gate: str, types: str, backend: str
) -> None:
    """A phase in which a thread read what another one writes would differ, and so would a race
    between blocks."""
    parts = BIASED.get(part, {})
    case = make_case(SHAPES[shape], dtype=torch.float32, gate=gate, **parts).typed(types)
    cotangent = cotangent_of(case)
    upwards = run(case, backend, cotangent)
    with kernels.downwards():
        for name, tensor in run(case, backend, cotangent).items():
            assert torch.equal(tensor, upwards[name]), name


# What is saved


@pytest.mark.parametrize("part", ["all", "biases", "biases, no gate"])
@pytest.mark.parametrize("gate", GATES)
def test_what_is_saved(gate: str, part: str) -> None:
    case = make_case(Sizes(tasks=2, m=9, n=40), dtype=torch.float32, **BIASED.get(part, {}))
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


# Launches and memory

SHARED_BYTES = 48 * 1024  # what a block can have on every GPU without asking for more


def _counts(
    s: Sizes, has_mask: bool = True, gate: str = "token", biases: bool = False
) -> dict[str, kernels.Counted]:
    tasks = {"tasks": s.tasks or 1}
    sizes = {"tokens": s.m, "positions": s.n, "rank": s.r, "width": s.d} | tasks
    prompt = sizes | {"spaces": s.k, "dim": s.h, "gate": GATES.index(gate)}
    splice = {"batch": s.batch, "length": s.length, "tokens": s.m, "width": s.d, "rank": s.r}
    splice |= tasks
    tensors = dict.fromkeys(SEVEN + (BIASES if biases else ()), torch.float32)
    offset = {"offset_a": torch.float32, "offset_b": torch.float32}
    rest = offset | ({"attention_mask": torch.int64} if has_mask else {})
    rest |= {} if s.tasks is None else {"task_ids": torch.int64}
    text = {"prompt": torch.float32, "source": torch.bfloat16, "input_ids": torch.int64}
    grads = ("d_prompt", "d_offset_a", "d_offset_b")
    return {
        "reconstruct_forward": kernels.count("reconstruct_forward", prompt, tensors),
        "reconstruct_backward": kernels.count(
            "reconstruct_backward", prompt, {**tensors, "grad": torch.float32}
        ),
        "splice_forward": kernels.count("splice_forward", splice, {**text, **rest}),
        "splice_backward": kernels.count(
            "splice_backward",
            {**splice, "positions": s.n},
            {"grad": torch.bfloat16, "prompt": torch.float32, **rest},
            *grads,
        ),
    }


@pytest.mark.parametrize("s", [Sizes(), Sizes(tasks=9), *SHAPES.values(), *NAMED.values()])
def test_launches_of_the_splice(s: Sizes) -> None:
    """One and two, and one for a plan of its masks and task ids."""
    for has_mask in (False, True):
        plans = int(has_mask or s.tasks is not None)
        counted = {name: each.launches for name, each in _counts(s, has_mask).items()}
        assert counted["splice_forward"] == 1 + plans
        assert counted["splice_backward"] <= 2 + plans


T5 = NAMED["t5-base"]
# The launches of reconstruct's forward. What its one launch repeats for every block is bounded, so
# each axis has sizes on both sides of the bound.
FORWARD_LAUNCHES = {
    "small": (Sizes(), 1),
    "t5-base": (T5, 1),
    "d": (replace(T5, d=1024), 1),
    "larger d": (replace(T5, d=1280), 2),
    "n": (replace(T5, n=768), 1),
    "larger n": (replace(T5, n=1024), 2),
    "r": (replace(T5, r=32), 1),
    "larger r": (replace(T5, r=33), 2),
    "m": (replace(T5, m=120), 1),
    "larger m": (replace(T5, m=128), 2),
    "K·h": (replace(T5, h=20), 1),
    "larger K·h": (replace(T5, h=32), 2),
    "T": (replace(T5, tasks=3), 1),
    "larger T": (replace(T5, tasks=4), 2),
    "a bank of small prompts": (Sizes(tasks=512), 1),
    **{name: (NAMED[name], 2) for name in ("llama-8b", "long", "bank")},
    **{name: (sizes, 2) for name, sizes in LARGEST.items()},
}


@pytest.mark.parametrize("name", FORWARD_LAUNCHES)
def test_launches_of_reconstruct(name: str) -> None:
    s, launches = FORWARD_LAUNCHES[name]
    for biases in (False, True):
        counted = _counts(s, biases=biases)
        assert counted["reconstruct_forward"].launches == launches
        assert counted["reconstruct_backward"].launches == 2
        assert (counted["reconstruct_forward"].workspace == 0) == (launches == 1)


@pytest.mark.parametrize(("name", "backward"), [("t5-base", 2), ("llama-8b", 3), ("bank", 3)])
def test_launches_with_one_gate_for_all_tokens(name: str, backward: int) -> None:
    """Which needs sums over all tokens: of O in the forward, of dg in the backward."""
    counted = _counts(NAMED[name], gate="prompt")
    assert counted["reconstruct_forward"].launches == 2
    assert counted["reconstruct_backward"].launches == backward


@over(HOST)
def test_the_most_that_one_launch_has_room_for(backend: str) -> None:
    sizes = Sizes(m=9, n=70, r=32, k=4, h=31, d=72, batch=1, length=4)
    assert _counts(sizes)["reconstruct_forward"].launches == 1
    assert _counts(replace(sizes, r=33))["reconstruct_forward"].launches == 2
    assert _counts(replace(sizes, h=32))["reconstruct_forward"].launches == 2
    cases = (make_case(sizes, dtype=torch.float32, seed=seed) for seed in range(4))
    assert_as_exact_as_the_definition(cases, backend)


@over(HOST)
@pytest.mark.parametrize("offset", [True, False])
def test_a_launch_for_the_sums_of_gates(offset: bool, backend: str) -> None:
    """A size at which the backward does not leave them to every block."""
    sizes = Sizes(m=17, n=40, r=5, k=4, h=16, d=1024, batch=1, length=4)
    assert _counts(sizes, gate="prompt")["reconstruct_backward"].launches == 3
    cases = (
        make_case(sizes, offset=offset, dtype=torch.float32, gate="prompt", seed=seed)
        for seed in range(4)
    )
    assert_as_exact_as_the_definition(cases, backend)


@pytest.mark.parametrize("name", NAMED)
def test_workspace(name: str) -> None:
    """Under 8 MB, of the splice's backward under 16 MB, but for one very long row, whose parts of
    dA and dB take an eighth of the gradient's memory: fewer blocks would leave a GPU idle."""
    s = NAMED[name]
    for operation, counted in _counts(s).items():
        most = (16 if operation == "splice_backward" else 8) * 1024 * 1024
        if name == "long" and operation == "splice_backward":
            most = s.batch * s.length * s.d * 2 // 8
        assert counted.workspace < most, operation


@pytest.mark.parametrize("shape", [*shapes.NAMED, *shapes.MANY_TASKS], ids=lambda s: s.name)
def test_enough_blocks(shape: shapes.Shape) -> None:
    """The splice keeps the multiprocessors of a large GPU busy, and no row of a mask is one block's
    to read if it is long."""
    sizes = Sizes(
        *(shape.num_virtual_tokens, shape.max_length, shape.rank, shape.num_spaces),
        *(shape.space_dim, shape.hidden_size, shape.batch, shape.length, shape.vocabulary),
        tasks=shape.tasks or None,
    )
    counted = _counts(sizes)
    blocks = counted["splice_backward"].blocks
    assert blocks["splice_plan"] == shape.batch * -(-shape.length // 2048)
    assert blocks["splice_backward"] >= 128
    assert counted["splice_forward"].blocks["splice_forward"] >= 256


@pytest.mark.parametrize("s", [*NAMED.values(), *LARGEST.values()])
def test_grids_and_shared_memory(s: Sizes) -> None:
    biased = replace(s, k=min(s.k, 256))
    biased = replace(biased, h=min(s.h, 512 // biased.k - 1))  # the most beside a gate
    for gate in GATES:
        of_biases = _counts(biased, gate=gate, biases=True)
        for counted in [*_counts(s, gate=gate).values(), *of_biases.values()]:
            assert counted.grid < 2**31
            assert counted.shared <= SHARED_BYTES


@over(HOST)
@pytest.mark.parametrize("tasks", [None, 3])
def test_blocks_that_take_several_tiles(tasks: int | None, backend: str) -> None:
    """As if memory for the parts is short: each adds to what it has written before."""
    sizes = Sizes(m=19, n=150, r=160, k=2, h=6, d=900, batch=5, length=150, tasks=tasks)
    cases = [make_case(sizes, padding="holes", dtype=torch.float32, seed=seed) for seed in range(4)]
    assert_as_exact_as_the_definition(cases, backend)


# Memory


SANITIZED = """
import torch
from tests import host_kernels as kernels
from ept_fast.ops.types import Flags
from tests.cases import BIASED, SHAPES, TILES, make_case

torch.set_num_threads(1)
parts = [(torch.float32, {}), (torch.bfloat16, {})]
parts += [(torch.float32, part) for part in BIASED.values()]
for shape in (*SHAPES.values(), *TILES["host"].values()):
    for dtype, part in parts:
        case = make_case(shape, dtype=dtype, gate="prompt", **part)
        parameters, flags = case.tensors(), Flags(0.5, "gelu", "prompt", 1.0)
        prompt, saved = kernels.reconstruct_forward(parameters, flags)
        inputs = case.inputs(prompt)
        out, kept = kernels.splice_forward(inputs, 0.5)
        d_prompt, *_ = kernels.splice_backward(out, inputs, kept, 0.5, True, True)
        kernels.reconstruct_backward(d_prompt, parameters, saved, flags)
print("done")
"""


@pytest.mark.slow
def test_no_access_outside_any_tensor(tmp_path: Path) -> None:
    """Under the compiler's sanitizers, which see reads as well as writes."""
    found = kernels.compiler()
    assert found is not None
    asked = subprocess.run([found, "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(asked.stdout.strip())
    if not runtime.is_absolute() or not runtime.exists():
        pytest.skip("the compiler has no address sanitizer")
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    path = kernels.build(tmp_path, *flags)
    done = python(
        *("-c", SANITIZED),
        timeout=1800,
        EPT_HOST_LIBRARY=str(path),
        LD_PRELOAD=str(runtime.resolve()),
        ASAN_OPTIONS="detect_leaks=0",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "done"
