"""Offsets of a folded prompt from a table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ept_fast import EPTConfig, FusedEPTPrompt
from ept_fast.prompts.table import offset_table

pytestmark = pytest.mark.usefixtures("one_thread")

D, TEXT = 12, 6
ROWS = 4


def make_prompt(
    tasks: int | None = None, dtype: torch.dtype = torch.float32, **choices: Any
) -> FusedEPTPrompt:
    """A prompt, or a bank of them, with all tensors filled."""
    draw = torch.Generator().manual_seed(1)
    sizes = {"num_virtual_tokens": 3, "max_length": 9, "rank": 4, "num_spaces": 2, **choices}
    table = nn.Embedding(20, D)
    prompt = FusedEPTPrompt(
        EPTConfig(D, **sizes), table, num_tasks=tasks, generator=draw, dtype=dtype
    )
    with torch.no_grad():
        for tensor in prompt.parameters():
            tensor += 0.3 * torch.randn(tensor.shape, generator=draw).to(dtype)
    return prompt


def inputs(tasks: int | None, mask: str) -> dict[str, Tensor | None]:
    draw = torch.Generator().manual_seed(2)
    masks = {
        "none": None,
        "ones": torch.ones(ROWS, TEXT, dtype=torch.int64),
        "left": (torch.arange(TEXT) >= torch.tensor([[0], [3], [6], [1]])).long(),
        "holes": torch.randint(0, 2, (ROWS, TEXT), generator=draw),
    }
    return {
        "input_ids": torch.randint(0, 20, (ROWS, TEXT), generator=draw),
        "attention_mask": masks[mask],
        "task_ids": None if tasks is None else torch.tensor([2, 0, 2, 1]),
    }


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "as on a GPU"])
@pytest.mark.parametrize("mask", ["none", "ones", "left", "holes"])
@pytest.mark.parametrize("tasks", [None, 3], ids=["single", "bank"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_table(
    dtype: torch.dtype,
    tasks: int | None,
    mask: str,
    checked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What A and B give, but for one more rounding: of the table."""
    monkeypatch.setattr("ept_fast.prompts.table.values_are_checked", lambda device: checked)
    prompt = make_prompt(tasks, dtype)
    prompt.embedding.to(dtype)
    folded, plain = prompt.fold(offset="table"), prompt.fold()
    assert not list(folded.parameters())
    assert folded.offset_table.dtype == dtype
    call = inputs(tasks, mask)
    got, expected = folded(**call), plain(**call)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        got.inputs_embeds, expected.inputs_embeds, rtol=2 * eps, atol=4 * eps
    )
    assert got.inputs_embeds.dtype == dtype
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        assert mine.equal(theirs)
    embeds = prompt.embedding(call.pop("input_ids")).detach()
    assert folded(inputs_embeds=embeds, **call).inputs_embeds.equal(got.inputs_embeds)


@pytest.mark.parametrize("tasks", [None, 3], ids=["single", "bank"])
@pytest.mark.parametrize("offset", ["low_rank", "table"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_code_looks_at_values(offset: str, tasks: int | None) -> None:
    torch.compiler.reset()  # every test compiles the same functions, and their number is limited
    prompt = make_prompt(tasks)
    folded = prompt.fold(offset=offset)
    compiled = torch.compile(folded, fullgraph=True, backend="aot_eager")
    call = inputs(tasks, "holes")
    ids, mask, task_ids = call["input_ids"], call["attention_mask"], call["task_ids"]
    assert ids is not None
    assert mask is not None
    assert compiled(**call).inputs_embeds.equal(folded(**call).inputs_embeds)
    embeds = prompt.embedding(ids).detach().requires_grad_()
    out = compiled(inputs_embeds=embeds, attention_mask=mask, task_ids=task_ids).inputs_embeds
    (grad,) = torch.autograd.grad(out.square().sum(), embeds)
    assert grad.equal(2 * out[:, 3:])
    with pytest.raises(ValueError, match="attention_mask: expected only 0 and 1, got 2 at row 0"):
        compiled(**{**call, "attention_mask": mask + 1 + (mask == 0)})
    for wrong in (-1, 20):
        with pytest.raises(IndexError, match=f"input_ids: expected ids from 0 to 19, got {wrong}"):
            compiled(**{**call, "input_ids": ids * 0 + wrong})
    if task_ids is not None:
        with pytest.raises(IndexError, match="task_ids: expected ids from 0 to 2, got -1 at row 0"):
            compiled(**{**call, "task_ids": task_ids * 0 - 1})


def test_table_is_rounded_once() -> None:
    """c·A·B in the widest of its types, then in the type that was asked for."""
    prompt = make_prompt(dtype=torch.bfloat16)
    exact = (prompt.offset_a.double() * prompt.config.scaling) @ prompt.offset_b.double()
    table = prompt.fold(torch.float32, "table").offset_table
    torch.testing.assert_close(table.double(), exact, rtol=1e-6, atol=1e-6)
    assert prompt.fold(offset="table").offset_table.equal(table.to(torch.bfloat16))
    assert prompt.fold(torch.float32, "table").prompt.dtype == torch.float32
    got = offset_table(prompt.offset_a, prompt.offset_b, prompt.config.scaling, torch.float64)
    assert got.dtype == torch.float64


def test_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table if it is faster and small enough."""
    assert make_prompt().fold(offset="auto").offset_table is not None
    assert make_prompt(rank=0).fold(offset="auto").offset_table is None
    prompt = make_prompt()
    prompt.backend = "reference"
    assert prompt.fold(offset="auto").offset_table is None
    monkeypatch.setattr("ept_fast.prompts.table._MOST_BYTES", 9 * D * 4 - 1)
    assert make_prompt().fold(offset="auto").offset_table is None
    assert make_prompt().fold(offset="table").offset_table is not None


@pytest.mark.parametrize("offset", ["low_rank", "table", "none"])
def test_text_longer_than_the_offset_covers(offset: str) -> None:
    folded = make_prompt().fold(offset=offset)
    folded(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"input_ids: expected at most max_length 9 .*got 10"):
        folded(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"inputs_embeds: expected at most max_length 9 .*got 10"):
        folded(inputs_embeds=torch.zeros(1, 10, D))
    make_prompt(rank=0).fold(offset=offset)(torch.zeros(1, 10, dtype=torch.int64))


def test_bad_choices() -> None:
    prompt = make_prompt()
    with pytest.raises(ValueError, match="offset: expected one of low_rank, table, auto, none"):
        prompt.fold(offset="rows")
    with pytest.raises(TypeError, match="dtype: expected a floating dtype"):
        prompt.fold(torch.int64)


class Launches(TorchDispatchMode):
    """The operators that launch a kernel on a GPU: all but views and empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        silent = ("detach", "empty", "new_empty", "expand", "select", "slice", "unsqueeze", "view")
        if not func.overloadpacket.__name__.startswith(silent):
            name = func.overloadpacket.__name__
            self.names += [name] * (2 if name == "constant_pad_nd" else 1)  # it fills, then copies
        return func(*args, **(kwargs or {}))


def plain(prompt: Tensor, table: nn.Embedding, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Prompt tuning as libraries have it: look up, concatenate, extend a mask that is given."""
    out = [torch.cat([prompt.expand(len(ids), -1, -1), table(ids)], 1)]
    if mask is not None:
        out.append(torch.cat([torch.ones(len(ids), len(prompt)), mask], 1))
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", ["low_rank", "none"])
def test_one_launch_more_than_plain_prompt_tuning(
    offset: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that is for the position ids, which plain prompt tuning leaves to the model. If the
    offset goes by a mask, a second one finds the real tokens.

    What a GPU would launch: without the looks at values that a CPU takes, and of the Triton kernel
    its launch.
    """
    prompt = make_prompt()
    prompt.backend = "triton"
    folded, table = prompt.fold(offset=offset), prompt.embedding.requires_grad_(False)
    ids = torch.randint(0, 20, (ROWS, TEXT))
    mask = torch.ones(ROWS, TEXT, dtype=torch.int64) if masked else None
    for module in ("ept_fast.ops.functional", "ept_fast.ops.splice"):
        monkeypatch.setattr(f"{module}.values_are_checked", lambda device: False)
    with Launches() as mine, torch.no_grad():
        monkeypatch.setattr(
            "ept_fast.backends.triton.runtime.Plan.launch_all",
            lambda plan, *_: mine.names.extend(["kernel"] * len(plan.launches)),
        )
        folded(ids, attention_mask=mask)
    with Launches() as theirs:
        plain(folded.prompt, table, ids, mask)
    assert mine.names[0] == "kernel"
    more = 1 + (masked and offset == "low_rank")
    assert len(mine.names) == len(theirs.names) + more, (mine.names, theirs.names)
