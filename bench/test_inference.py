"""Serving without a backbone: a folded prompt, and a batch whose rows are of different tasks.

What counts is the text put behind the prompt, with mask and positions, under ``torch.no_grad``.
Every row has its mask, as a tokenizer gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import parity, peers
from bench.inputs import DTYPES, SCALING, Inputs, make_inputs, make_prompt, with_mask
from bench.run import Run
from bench.run import ServingCase as Case
from bench.shapes import MANY_TASKS, NAMED, QUICK, Shape
from bench.timing import Work
from ept_fast import EPTOutput, FoldedEPTPrompt, FusedEPTPrompt, reference

FOLDED, MIXED = "folded prompt", "mixed tasks"
UNFOLDED, PLAIN = "unfolded", "plain prompt"
ONE_TASK, TASK_BY_TASK = "one task", "task by task"

_SHAPES = ("t5-base", "sentences", "llama-8b")


def cases(run: Run) -> list[Case]:
    """What shares its tensors side by side, ours first."""
    ours, quick = peers.ours(run.device), run.settings.quick
    folded = QUICK[:1] if quick else [shape for shape in NAMED if shape.name in _SHAPES]
    mixed = QUICK[1:] if quick else MANY_TASKS
    rows = {
        FOLDED: (folded, (ours, UNFOLDED, peers.REFERENCE, PLAIN, peers.PEFT)),
        MIXED: (mixed, (ours, ONE_TASK, TASK_BY_TASK, peers.REFERENCE)),
    }
    return [
        Case(operation, shape, peer)
        for operation, (shapes, names) in rows.items()
        for shape in shapes
        for peer in names
    ]


def test_inference(case: Case, run: Run, benchmark: Any) -> None:
    """Parity first, then time."""
    run.check_time()
    held = run.hold_for(("inference", case.operation, case.shape))
    table = "bfloat16" if run.on_gpu else "float32"
    if "inputs" not in held:
        sets = make_inputs(case.shape, DTYPES[table], run.device, run.sets_of_inputs)
        held["inputs"] = [with_mask(inputs) for inputs in sets]
    sets = held["inputs"]

    @torch.no_grad()
    def check(name: str) -> tuple[Served, float, str]:
        served, inputs = make(name, case.shape, sets), sets[0]
        if served.definition not in held:
            held[served.definition] = parity.Expected(
                {"embeds": served.definition(inputs.to(torch.float64))},
                {"embeds": served.definition(inputs)},
            )
        found = {"embeds": served.embeds_of(served.call(inputs))}
        return served, *parity.compare(found, held[served.definition])

    run.row(
        benchmark,
        case,
        case.shape,
        check,
        lambda peer: Work(lambda i: sets[i % len(sets)], torch.no_grad()(peer.call)),
        tokens=sum(int(inputs.attention_mask.sum()) for inputs in sets) // len(sets),
        suite="inference",
        operation=case.operation,
        direction="forward",
        embeddings=table,
    )


def _by_definition(inputs: Inputs) -> Tensor:
    return peers.operation_of("prompt path", peers.REFERENCE)(inputs)


def _by_the_first_task(inputs: Inputs) -> Tensor:
    parameters = {name: tensor[0] for name, tensor in inputs.parameters.items()}
    return _by_definition(replace(inputs, parameters=parameters, task_ids=None))


def _prompt_and_text(inputs: Inputs) -> Tensor:
    prompt = reference.reconstruct_prompt(**inputs.parameters, scaling=SCALING)
    return reference.splice_prompt(prompt, input_ids=inputs.input_ids, weight=inputs.weight)


@dataclass(frozen=True)
class Served:
    """A peer: ``call`` is timed, ``embeds_of`` what it returns is compared with the definition."""

    call: Callable[[Inputs], Any]
    embeds_of: Callable[[Any], Tensor] = lambda out: out.inputs_embeds
    definition: Callable[[Inputs], Tensor] = _by_definition
    note: str = ""


def make(name: str, shape: Shape, sets: list[Inputs]) -> Served:
    """A peer on a prompt with the values of the first set of inputs; any name but those of the
    peers is that of our backend."""
    parameters, weight = sets[0].parameters, sets[0].weight
    if name == peers.PEFT:
        peer = peers.peft_prompt(weight)
        note = f"{peers.PEFT_TOKENS} tokens"
        return Served(peer.forward, lambda out: out, peer.definition, note)
    if name == TASK_BY_TASK:
        return _task_by_task(shape, sets)
    if name == ONE_TASK:
        call = _one_task(shape, sets[0], 0)
        return Served(call, definition=_by_the_first_task)
    if name in (UNFOLDED, PLAIN):
        prompt = make_prompt(shape, parameters, weight)
        return _plain(prompt) if name == PLAIN else Served(_caller(prompt))
    return Served(_caller(make_prompt(shape, parameters, weight, name).fold()))


def _caller(prompt: FusedEPTPrompt | FoldedEPTPrompt) -> Callable[[Inputs], EPTOutput]:
    def call(inputs: Inputs) -> EPTOutput:
        out: EPTOutput = prompt(
            inputs.input_ids, attention_mask=inputs.attention_mask, task_ids=inputs.task_ids
        )
        return out

    return call


def _one_task(shape: Shape, inputs: Inputs, task: int) -> Callable[[Inputs], EPTOutput]:
    """A task of the bank as a folded prompt of its own, which serves every row."""
    tensors = {name: tensor[task] for name, tensor in inputs.parameters.items()}
    call = _caller(make_prompt(replace(shape, tasks=0), tensors, inputs.weight).fold())
    return lambda inputs: call(replace(inputs, task_ids=None))


def _plain(prompt: FusedEPTPrompt) -> Served:
    """A constant prompt before the text and nothing else: the least that such a prompt takes."""
    constant = prompt.fold().prompt
    ones = torch.ones(1, len(constant), dtype=torch.int64, device=constant.device)

    def call(inputs: Inputs) -> tuple[Tensor, Tensor]:
        text = F.embedding(inputs.input_ids, inputs.weight)
        head = constant.to(text.dtype).expand(len(text), *constant.shape)
        mask = torch.cat([ones.expand(len(text), -1), inputs.attention_mask], dim=1)
        return torch.cat([head, text], dim=1), mask

    return Served(call, lambda out: out[0], _prompt_and_text, "no offset, no positions")


def _task_by_task(shape: Shape, sets: list[Inputs]) -> Served:
    """The rows of each task apart, by a folded prompt of its own; which rows those are is known
    beforehand, and the texts are not put back in order."""
    rows = {
        id(inputs): {
            task: (inputs.task_ids == task).nonzero().squeeze(1)
            for task in inputs.task_ids.unique().tolist()
        }
        for inputs in sets
    }
    used = {task for found in rows.values() for task in found}
    calls = {task: _one_task(shape, sets[0], task) for task in sorted(used)}

    def call(inputs: Inputs) -> list[EPTOutput]:
        ids, mask = inputs.input_ids, inputs.attention_mask
        return [
            calls[task](replace(inputs, input_ids=ids[own], attention_mask=mask[own]))
            for task, own in rows[id(inputs)].items()
        ]

    def in_order(outputs: list[EPTOutput]) -> Tensor:
        order = torch.cat(list(rows[id(sets[0])].values()))
        return torch.cat([out.inputs_embeds for out in outputs])[order.argsort()]

    return Served(call, in_order, note=f"{len(rows[id(sets[0])])} tasks in the batch")
