"""Peak memory of a training step: the formula of ``docs/memory.md`` against the allocator.

What is compared is every byte that was asked for, so a tensor that lives longer than the formula
says, or that it does not know, fails the test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench import memory_report
from bench.memory import PromptStep, Workspace
from bench.shapes import NAMED, Shape
from ept_fast import EPTConfig, FusedEPTPrompt, get_ept_model
from ept_fast.backends import eager
from tests.architectures import BY_NAME
from tests.cases import make_mask
from tests.memory import Allocations, allocations
from tests.parity import needs_interpreter

# The allocator's figures are those of PyTorch's own choice of algorithms.
pytestmark = [pytest.mark.default_algorithms, pytest.mark.usefixtures("one_thread")]

# The loss, its gradient, and numbers that PyTorch wraps as tensors.
SCALARS = 64
VOCABULARY = 50
MB = 1 << 20
# Of the embeddings and of the parameters.
TYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16 table": (torch.bfloat16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp64": (torch.float64, torch.float64),
}


@dataclass(frozen=True)
class Case:
    """A step, how its rows are padded, and the phase that takes the most."""

    step: PromptStep
    padding: str = "none"
    largest: str = "backbone"

    def of(self, types: str) -> PromptStep:
        """The step in a pair of ``TYPES``."""
        table, parameters = TYPES[types]
        return replace(self.step, table=table, parameters=parameters)


def case(
    batch: int,
    length: int,
    d: int,
    m: int,
    n: int,
    r: int,
    k: int,
    h: int,
    *,
    tasks: int | None = None,
    padding: str = "none",
    largest: str = "backbone",
    **choices: Any,
) -> Case:
    config = EPTConfig(
        d, num_virtual_tokens=m, max_length=n, rank=r, num_spaces=k, space_dim=h, **choices
    )
    kind = padding if padding in ("none", "holes") else "side"
    step = PromptStep(config, batch, length, tasks=tasks, padding=kind)
    return Case(step, padding, largest)


CASES = {
    "usual": case(16, 128, 256, 20, 256, 24, 4, 4),
    "left": case(24, 128, 256, 20, 256, 24, 4, 4, padding="left"),
    "holes": case(24, 128, 256, 20, 256, 24, 4, 4, padding="holes"),
    "no fusion": case(16, 128, 256, 20, 256, 24, 4, 4, fusion=False),
    "DePT": case(16, 128, 256, 20, 256, 24, 0, 1, fusion=False),
    "no subspaces": case(16, 128, 256, 20, 256, 24, 0, 1),
    "no offset": case(16, 128, 256, 20, 256, 0, 4, 4),
    "prompt tuning": case(16, 128, 256, 100, 256, 0, 0, 1),
    "gate of the prompt": case(16, 128, 256, 20, 256, 24, 4, 4, gate="prompt"),
    "several tiles": case(4, 400, 512, 20, 512, 8, 4, 4),
    "bank": case(24, 128, 256, 10, 128, 4, 2, 4, tasks=3, padding="right"),
    "one row": case(1, 128, 1024, 8, 128, 8, 4, 4, largest="splice, forward"),
    "short text": case(4, 8, 256, 20, 256, 24, 4, 4, largest="splice, forward"),
    "many tasks": case(8, 16, 256, 10, 64, 8, 4, 4, tasks=40, largest="reconstruct, backward"),
}


class _Backbone(torch.autograd.Function):
    """What a model does with its input: keeps it for the backward, then makes its gradient."""

    @staticmethod
    def forward(ctx: Any, embeds: Tensor) -> Tensor:
        ctx.save_for_backward(embeds)
        return embeds.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (embeds,) = ctx.saved_tensors
        return torch.ones_like(embeds)


@dataclass(frozen=True)
class Batch:
    """Arguments of a step; rows of a task lie side by side."""

    prompt: FusedEPTPrompt
    input_ids: Tensor
    attention_mask: Tensor | None
    task_ids: Tensor | None

    def embeds(self) -> Tensor:
        return self.prompt(
            self.input_ids, attention_mask=self.attention_mask, task_ids=self.task_ids
        ).inputs_embeds


def make_batch(step: PromptStep, padding: str, backend: str, device: str = "cpu") -> Batch:
    c = step.config
    table = nn.Embedding(VOCABULARY, c.hidden_size).requires_grad_(False).to(device, step.table)
    prompt = FusedEPTPrompt(
        c,
        table,
        init=torch.randn(c.num_virtual_tokens + c.rank, c.hidden_size),
        num_tasks=step.tasks,
        dtype=step.parameters,
        backend=backend,
    )
    mask = make_mask(padding, step.batch, step.length, torch.Generator().manual_seed(0))
    if mask is not None and padding != "holes":
        mask[0] = 1
    tasks = torch.arange(step.batch) * (step.tasks or 1) // step.batch
    return Batch(
        prompt,
        torch.randint(VOCABULARY, (step.batch, step.length), device=device),
        None if mask is None else mask.to(device),
        None if step.tasks is None else tasks.to(device),
    )


def two_steps(batch: Batch) -> None:
    """In the second one the optimizer has its state from the beginning."""
    optimizer = torch.optim.AdamW(batch.prompt.parameters(), lr=1e-3, foreach=False)
    for _ in range(2):
        _Backbone.apply(batch.embeds()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def assert_as_the_formula(step: PromptStep, found: Allocations) -> None:
    """To the byte, scalars apart. The parameters were there before."""
    difference = found.peak + step.parameter_bytes - step.peak
    assert abs(difference) <= SCALARS, f"{difference} bytes of {step.peak}"


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_step(name: str, types: str) -> None:
    step = CASES[name].of(types)
    batch = make_batch(step, CASES[name].padding, "eager")
    assert_as_the_formula(step, allocations(lambda: two_steps(batch)))
    if types == "fp32":
        phases = step.phases()
        assert max(phases, key=phases.__getitem__) == CASES[name].largest


def calls_of(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    """The four calls that a step makes of the eager backend."""
    calls: dict[str, Callable[[], Any]] = {}

    def recorded(name: str) -> Callable[..., Any]:
        function = getattr(eager, name)

        def record(*args: Any, **options: Any) -> Any:
            calls[name] = lambda: function(*args, **options)
            return function(*args, **options)

        return record

    for name in (field.name for field in fields(Workspace)):
        monkeypatch.setattr(eager, name, recorded(name))
    batch.embeds().sum().backward()
    return calls


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_workspace(name: str, types: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each call takes beyond its results; the peak of a step hides most of it."""
    step = CASES[name].of(types)
    calls = calls_of(make_batch(step, CASES[name].padding, "eager"), monkeypatch)
    for call, expected in asdict(step.workspace).items():
        with torch.no_grad():
            found = allocations(calls[call])
        results = [t for t in tree_leaves(found.result) if t is not None]
        beyond = found.peak - sum(result.nbytes for result in results)
        assert beyond <= expected + SCALARS, call
        if step.padding == "none" and step.tasks is None:
            assert beyond >= expected, call


@pytest.mark.parametrize("shape", NAMED, ids=lambda shape: shape.name)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_workspace_of_named_shapes(shape: Shape, backend: str) -> None:
    """Under 16 MB, but for the longest text: its sums, or its softmax, take more."""
    names = ("hidden_size", "num_virtual_tokens", "max_length", "rank", "num_spaces", "space_dim")
    config = EPTConfig(**{name: getattr(shape, name) for name in names})
    step = PromptStep(config, shape.batch, shape.length, torch.bfloat16, backend=backend)
    most = step.output_bytes // 8 if shape.name == "long" else 16 * MB
    taken = step.of_kernels if backend == "triton" else asdict(step.workspace).values()
    assert max(taken) < most


# Sizes far apart: n·d, B·S·r and m·n elements are more than any tile.
APART = case(32, 64, 256, 8, 4096, 128, 4, 4)


def test_nothing_large() -> None:
    """Of the size of the text there is the output and its gradient, of n×d nothing."""
    step = APART.step
    c, tile = step.config, 512 * 1024
    assert 4 * step.batch * step.length * c.rank > tile
    assert 4 * c.max_length * c.hidden_size > step.output_bytes
    batch = make_batch(step, "none", "eager")
    found = allocations(lambda: two_steps(batch))
    large = [size for size in found.sizes if size > tile]
    offset_a = 4 * c.max_length * c.rank  # a parameter, with gradients and moments of its own
    assert set(large) == {step.output_bytes, offset_a}
    assert large.count(step.output_bytes) == 2 * 2


def test_the_definition_needs_more() -> None:
    """Its offset of n×d elements, more than once, and the text more often."""
    step = APART.step
    ours, definition = (
        allocations(functools.partial(two_steps, make_batch(step, "none", backend)))
        for backend in ("eager", "reference")
    )
    n_by_d = 4 * step.config.max_length * step.config.hidden_size
    assert n_by_d in definition.sizes
    assert n_by_d not in ours.sizes
    assert definition.peak > ours.peak + 2 * n_by_d


@needs_interpreter
@pytest.mark.parametrize("types", ["fp32", "bf16 table"])
@pytest.mark.parametrize("name", CASES)
def test_step_of_the_kernels(name: str, types: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their launches ask for memory; what would be launched is left out."""
    from ept_fast.backends.triton import runtime

    monkeypatch.setattr(runtime.Plan, "launch_all", lambda *arguments: None)
    step = replace(CASES[name].of(types), backend="triton")
    batch = make_batch(step, CASES[name].padding, "triton")
    assert_as_the_formula(step, allocations(lambda: two_steps(batch)))


@pytest.mark.gpu
@pytest.mark.parametrize("types", ["fp32", "bf16 table"])
@pytest.mark.parametrize("name", CASES)
def test_step_on_a_gpu(name: str, types: str) -> None:
    step = replace(CASES[name].of(types), backend="triton")
    batch = make_batch(step, CASES[name].padding, "triton", "cuda")
    two_steps(batch)  # compiles the kernels
    assert_as_the_formula(step, allocations(lambda: two_steps(batch), "cuda"))


def test_a_tensor_that_stays_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparisons above are worth."""
    step = CASES["usual"].of("fp32")
    batch = make_batch(step, "none", "eager")
    forward = eager.reconstruct_forward

    def keeping(*arguments: Any) -> Any:
        results = forward(*arguments)
        held.append(torch.empty(100))
        return results

    held: list[Tensor] = []
    monkeypatch.setattr(eager, "reconstruct_forward", keeping)
    with pytest.raises(AssertionError, match="808 bytes"):
        assert_as_the_formula(step, allocations(lambda: two_steps(batch)))


@pytest.mark.parametrize("name", ["BERT", "T5", "Llama"])
def test_on_top_of_a_backbone(name: str) -> None:
    """Beyond the backbone's own step on given embeddings: parameters, moments, what is saved.

    The output stands in place of the given embeddings, and its gradient is gone by the time that
    the prompt's gradients are there.
    """
    architecture = BY_NAME[name]
    backbone = architecture.build("FEATURE_EXTRACTION", bare=True).requires_grad_(False).eval()
    given = case(8, 40, architecture.width, 6, 40, 4, 2, 4).step
    batch = make_batch(given, "none", "eager")
    optimizer = torch.optim.AdamW(batch.prompt.parameters(), lr=1e-3, foreach=False)
    shape = (given.batch, given.config.num_virtual_tokens + given.length)

    def step(embeds: Tensor) -> None:
        backbone(inputs_embeds=embeds).last_hidden_state.sum().backward()

    def of_the_backbone() -> None:
        step(torch.zeros(*shape, given.config.hidden_size, requires_grad=True))

    def with_the_prompt() -> None:
        for _ in range(2):
            step(batch.embeds())
            optimizer.step()
            optimizer.zero_grad()

    without, found = allocations(of_the_backbone), allocations(with_the_prompt)
    expected = given.optimizer_bytes + given.saved_bytes
    assert 0 <= found.peak - without.peak - expected <= SCALARS


SMALL = memory_report.Model(
    "small",
    {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    batch=4,
    length=96,
)
SMALL_PROMPT = EPTConfig(64, num_virtual_tokens=8, max_length=96, rank=8, num_spaces=2)


def small_step(backend: str) -> PromptStep:
    kind = {"padding": "side", "backend": backend}
    return PromptStep(SMALL_PROMPT, SMALL.batch, SMALL.length, torch.bfloat16, **kind)


@needs_interpreter
@pytest.mark.parametrize("checkpointing", [False, True])
def test_report_without_data(checkpointing: bool) -> None:
    """Counted on tensors without data: the prompt's share of a model's step."""
    prompt = memory_report.measure(SMALL, SMALL_PROMPT, checkpointing)
    backbone = memory_report.measure_backbone(SMALL, 8, checkpointing)
    step = small_step("triton")
    share = step.parameter_bytes + step.optimizer_bytes + step.saved_bytes
    mask = 8 * SMALL.batch * SMALL.length  # of ones, if none is given
    # Layers that are recomputed hold their positions, which the backbone alone was given.
    positions = checkpointing * 8 * SMALL.batch * (8 + SMALL.length)
    assert prompt.peak - backbone.peak == share + mask + positions


def test_report_with_data() -> None:
    """The same step on real tensors, by the allocator: rows of which one is padded."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**SMALL.config)
    backbone = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    wrapped = get_ept_model(backbone, SMALL_PROMPT, "CAUSAL_LM")
    ids = torch.randint(512, (SMALL.batch, SMALL.length))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    optimizer = torch.optim.AdamW(wrapped.prompt.parameters(), lr=1e-3, foreach=False)

    def steps() -> None:
        for _ in range(2):
            wrapped(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    parameters = sum(p.nbytes for p in wrapped.prompt.parameters())
    found = allocations(steps).peak + parameters
    counted = memory_report.measure(SMALL, SMALL_PROMPT).peak
    kernels, eager = (small_step(backend).saved_bytes for backend in ("triton", "eager"))
    # Of the kernels, with a mask of ones if none is given; found: of the eager backend.
    assert 0 <= counted - found - (kernels - eager) <= ids.nbytes


def test_page() -> None:
    """The prompt's share is the formula's, whatever the versions of the libraries."""
    assert memory_report.share_table() in memory_report.PAGE.read_text(encoding="utf-8")
