"""Serving with a backbone: many adapters in one batch, prefix caches.

The bank's rows are of the prompt path alone, as the backbone's time is the same for any task. The
others are whole calls of a decoder: the logits of the next token after a text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench import models, parity, peers
from bench.inputs import DTYPES, Inputs, make_inputs, make_prompt, with_mask
from bench.run import Run
from bench.run import ServingCase as Case
from bench.shapes import MANY_TASKS, QUICK, Shape
from bench.timing import Work
from ept_fast import FusedEPTPrompt, get_ept_model

BANK = "bank of adapters"
PREFIX = "next token behind a prefix cache"
ONE_TASK, NO_PREFIX = "one task", "no prefix cache"
PLAIN = "plain prompt"

_LENGTHS = "20-40"


def cases(run: Run) -> list[Case]:
    """What shares a backbone side by side, ours first."""
    ours, quick = peers.ours(run.device), run.settings.quick
    backbones = models.QUICK if quick else models.ON_GPU if run.on_gpu else models.ON_CPU
    decoders = [backbone for backbone in backbones if backbone.kind != "t5"]
    banks = QUICK[1:] if quick else [s for s in MANY_TASKS if s.tasks == 64]
    found = [Case(BANK, shape, peer) for shape in banks for peer in (ours, ONE_TASK)]
    for backbone in decoders:
        shape = models.shape_of(backbone, _LENGTHS)
        names = (ours, NO_PREFIX, PLAIN, models.BACKBONE)
        found += [Case(PREFIX, shape, name, backbone) for name in names]
    return found


def test_serving(case: Case, run: Run, benchmark: Any) -> None:
    """Parity first, then time."""
    run.check_time()
    held = run.hold_for(("serving", case.operation, case.shape))
    table = "bfloat16" if run.on_gpu else "float32"
    if "make" not in held:
        make = _make_bank if case.backbone is None else _make_decoder
        held["make"] = make(case, DTYPES[table], run.device)

    @torch.no_grad()
    def check(name: str) -> tuple[Served, float, str]:
        served: Served = held["make"].make(name)
        return served, *parity.compare({"output": served.call()}, served.expected)

    def work_of(served: Served) -> Work:
        call = torch.no_grad()(served.call)
        return Work(lambda i: None, lambda _: call())

    run.row(
        benchmark,
        case,
        case.shape,
        check,
        work_of,
        tokens=held["make"].tokens,
        note=held["make"].note,
        suite="serving",
        operation=case.operation,
        direction="forward",
        embeddings=table,
    )


@dataclass(frozen=True)
class Served:
    """What is timed, what it has to give, and that in plain PyTorch at the same precision."""

    call: Callable[[], Tensor]
    expected: parity.Expected
    note: str = ""


@dataclass(frozen=True)
class Maker:
    """Makes a peer by its name; any name but those of the peers is that of our backend."""

    make: Callable[[str], Served]
    tokens: int
    note: str = ""


# A bank


def _make_bank(case: Case, dtype: torch.dtype, device: torch.device) -> Maker:
    """Adapters of three lengths and two ranks, the largest first."""
    from ept_fast.transformers.bank import BankPrompt

    shape = case.shape
    inputs = with_mask(make_inputs(shape, dtype, device, 1)[0])

    def adapter(task: int) -> FusedEPTPrompt:
        sizes = _sizes(shape, task)
        return make_prompt(sizes, _tensors(sizes, inputs, task), inputs.weight)

    alone = adapter(0).fold()
    table = nn.Embedding.from_pretrained(inputs.weight, freeze=True)
    bank = BankPrompt(alone.config, table, shape.tasks, torch.float32, None, "auto")
    for task in range(shape.tasks):
        bank.write(task, adapter(task).fold())

    def make(name: str) -> Served:
        one = name == ONE_TASK
        prompt, task_ids = (alone, None) if one else (bank, inputs.task_ids)
        rows = [0] * shape.batch if one else inputs.task_ids.tolist()
        return _served(
            lambda: prompt(inputs.input_ids, None, inputs.attention_mask, task_ids).inputs_embeds,
            _rows(shape, inputs.to(torch.float64), rows),
            _rows(shape, inputs, rows),
        )

    tokens = int(inputs.attention_mask.sum())
    return Maker(make, tokens, "lengths and ranks of the adapters differ")


def _sizes(shape: Shape, task: int) -> Shape:
    """Those of the task's adapter."""
    m = max(1, shape.num_virtual_tokens * (4 - task % 3) // 4)
    return replace(shape, tasks=0, rank=max(1, shape.rank // (1 + task % 2)), num_virtual_tokens=m)


def _tensors(sizes: Shape, inputs: Inputs, task: int) -> dict[str, Tensor]:
    """The task's tensors, cut to its sizes."""
    cuts = {
        "short_prompt": (slice(sizes.num_virtual_tokens),),
        "offset_a": (slice(None), slice(sizes.rank)),
        "offset_b": (slice(sizes.rank),),
    }
    return {name: t[task][cuts.get(name, ())] for name, t in inputs.parameters.items()}


def _rows(shape: Shape, inputs: Inputs, tasks: list[int]) -> Tensor:
    """``[B, m + S, d]`` by the definition; before a shorter prompt there are zeros."""
    by_definition = peers.operation_of("prompt path", peers.REFERENCE)
    found = []
    for row, task in enumerate(tasks):
        own = replace(
            inputs,
            parameters=_tensors(_sizes(shape, task), inputs, task),
            input_ids=inputs.input_ids[row : row + 1],
            attention_mask=inputs.attention_mask[row : row + 1],
            task_ids=None,
        )
        one = by_definition(own)
        missing = shape.num_virtual_tokens + shape.length - one.shape[1]
        found.append(nn.functional.pad(one, (0, 0, missing, 0)))
    return torch.cat(found)


# A decoder


def _make_decoder(case: Case, dtype: torch.dtype, device: torch.device) -> Maker:
    """Texts padded on the left, as for ``generate``; what is timed gives ``[B, 1, V]``."""
    backbone = case.backbone
    assert backbone is not None
    model = models.make_model(backbone, dtype, device)
    exact = models.exact_copy(model)
    batch = models.make_batch(backbone, case.shape, device)
    mask, order = batch.attention_mask.sort(dim=1, stable=True)
    inputs = {"input_ids": batch.input_ids.gather(1, order), "attention_mask": mask}
    own = models.make_model(backbone, dtype, device)
    ours = get_ept_model(own, models.our_config(backbone), "CAUSAL_LM", init="random")
    tensors = dict(ours.prompt.named_parameters())
    models.fill(tensors, own)
    ours.fold()
    scaling = models.our_config(backbone).scaling
    plain = {"short_prompt": torch.empty(peers.PEFT_TOKENS, backbone.hidden_size, device=device)}
    models.fill(plain, model)

    def seen(name: str, table: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and mask of prompt and text by the definition, in the table's type."""
        ids = inputs["input_ids"]
        if name == models.BACKBONE:
            return nn.functional.embedding(ids, table), mask
        used = {
            n: t.to(torch.promote_types(t.dtype, table.dtype))
            for n, t in (plain if name == PLAIN else tensors).items()
        }
        embeds = models.embeds_by_definition(used, ids, table, scaling, mask)
        missing = embeds.shape[1] - mask.shape[1]
        return embeds, nn.functional.pad(mask, (missing, 0), value=1)

    @torch.no_grad()
    def by_definition(name: str, model: Any) -> Tensor:
        embeds, whole = seen(name, model.get_input_embeddings().weight)
        positions = (whole.cumsum(1) - 1).clamp_min(0)
        options = {"attention_mask": whole, "position_ids": positions, "logits_to_keep": 1}
        return model(inputs_embeds=embeds, **options).logits  # type: ignore[no-any-return]

    def call_of(name: str) -> Callable[[], Tensor]:
        if name in (models.BACKBONE, PLAIN):
            return lambda: by_definition(name, model)
        more = {"logits_to_keep": 1}
        if name != NO_PREFIX:
            more["prefix"] = ours.prefix_cache()
        return lambda: ours(**inputs, **more).logits

    def make(name: str) -> Served:
        with models.Doubles():
            expected = by_definition(name, exact)
        note = {models.BACKBONE: "no prompt", PLAIN: f"{peers.PEFT_TOKENS} tokens"}.get(name, "")
        return _served(call_of(name), expected, by_definition(name, model), note)

    return Maker(make, int(mask.sum()), backbone.note)


def _served(call: Callable[[], Tensor], exact: Tensor, plain: Tensor, note: str = "") -> Served:
    return Served(call, parity.Expected({"output": exact}, {"output": plain}), note)
