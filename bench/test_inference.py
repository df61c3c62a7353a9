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
from torch import Tensor, nn

from bench import parity, peers
from bench.inputs import DTYPES, SCALING, Inputs, make_inputs
from bench.run import Run
from bench.shapes import MANY_TASKS, NAMED, QUICK, Shape
from bench.timing import Work
from ept_fast import EPTConfig, EPTOutput, FoldedEPTPrompt, FusedEPTPrompt, reference

FOLDED, MIXED = "folded prompt", "mixed tasks"
UNFOLDED, PLAIN = "unfolded", "plain prompt"
ONE_TASK, TASK_BY_TASK = "one task", "task by task"

_SHAPES = ("t5-base", "sentences", "llama-8b")


@dataclass(frozen=True)
class Case:
    """One row: an operation at a shape by a peer."""

    operation: str
    shape: Shape
    peer: str

    @property
    def id(self) -> str:
        """The row's name in pytest."""
        return "-".join((self.operation, self.shape.name, self.peer)).replace(" ", "-")


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
        held["inputs"] = [_with_mask(inputs) for inputs in sets]
        held["prompt"] = make_prompt(case.shape, sets[0], backend=None)
    sets = held["inputs"]
    name = peers.ours(run.device)
    ours, _ = _checked(held, case, name)
    peer, error = _checked(held, case, case.peer)
    run.measure(
        benchmark,
        suite="inference",
        operation=case.operation,
        direction="forward",
        shape=case.shape,
        embeddings=table,
        peer=case.peer,
        ours=name,
        work=_work(peer, sets),
        our_work=_work(ours, sets),
        tokens=sum(int(inputs.attention_mask.sum()) for inputs in sets) // len(sets),
        error=error,
        note=peer.note,
    )


@dataclass(frozen=True)
class Served:
    """A peer: ``call`` is timed, ``embeds_of`` what it returns is compared with the definition."""

    call: Callable[[Inputs], Any]
    embeds_of: Callable[[Any], Tensor]
    definition: Callable[[Inputs], Tensor]
    note: str = ""


def make(case: Case, prompt: FusedEPTPrompt, sets: list[Inputs]) -> Served:
    """The case's peer on a prompt with the values of the first set of inputs; any name but those of
    the peers is that of our backend."""
    name = case.peer
    if name == UNFOLDED:
        return Served(_caller(prompt), _embeds, definition)
    if name == PLAIN:
        return _plain(prompt)
    if name == peers.PEFT:
        peer = peers.peft_prompt(sets[0].weight)
        note = f"{peers.PEFT_TOKENS} tokens"
        return Served(peer.forward, lambda out: out, peer.definition, note)
    if name == ONE_TASK:
        folded = make_prompt(case.shape, sets[0], backend=None, task=0).fold()
        call = _caller(folded)
        return Served(
            lambda inputs: call(replace(inputs, task_ids=None)), _embeds, _by_the_first_task
        )
    if name == TASK_BY_TASK:
        return _task_by_task(case.shape, sets)
    folded = make_prompt(case.shape, sets[0], backend=name).fold()
    return Served(_caller(folded), _embeds, definition)


def make_prompt(
    shape: Shape, inputs: Inputs, *, backend: str | None, task: int | None = None
) -> FusedEPTPrompt:
    """A prompt, a bank of them, or one task of the bank, with the values of the inputs."""
    config = EPTConfig(
        shape.hidden_size,
        num_virtual_tokens=shape.num_virtual_tokens,
        max_length=shape.max_length,
        rank=shape.rank,
        num_spaces=shape.num_spaces,
        space_dim=shape.space_dim,
        alpha=SCALING * shape.rank**0.5,
    )
    prompt = FusedEPTPrompt(
        config,
        nn.Embedding.from_pretrained(inputs.weight, freeze=True),
        init=torch.zeros(config.num_virtual_tokens + config.rank, config.hidden_size),
        num_tasks=shape.tasks if shape.tasks and task is None else None,
        backend=backend,
    )
    with torch.no_grad():
        for name, parameter in prompt.named_parameters():
            value = inputs.parameters[name]
            parameter.copy_(value if task is None else value[task])
    return prompt


def definition(inputs: Inputs) -> Tensor:
    """Both operations by the definition; of a bank, for the tasks that rows have."""
    parameters, task_ids = inputs.parameters, inputs.task_ids
    if task_ids is not None:
        used, task_ids = task_ids.unique(return_inverse=True)
        parameters = {name: tensor[used] for name, tensor in parameters.items()}
    return reference.splice_prompt(
        reference.reconstruct_prompt(**parameters, scaling=SCALING),
        input_ids=inputs.input_ids,
        weight=inputs.weight,
        offset_a=parameters["offset_a"],
        offset_b=parameters["offset_b"],
        scaling=SCALING,
        attention_mask=inputs.attention_mask,
        task_ids=task_ids,
    )


def _by_the_first_task(inputs: Inputs) -> Tensor:
    parameters = {name: tensor[0] for name, tensor in inputs.parameters.items()}
    return definition(replace(inputs, parameters=parameters, task_ids=None))


def _prompt_and_text(inputs: Inputs) -> Tensor:
    prompt = reference.reconstruct_prompt(**inputs.parameters, scaling=SCALING)
    return reference.splice_prompt(prompt, input_ids=inputs.input_ids, weight=inputs.weight)


def _caller(prompt: FusedEPTPrompt | FoldedEPTPrompt) -> Callable[[Inputs], EPTOutput]:
    def call(inputs: Inputs) -> EPTOutput:
        out: EPTOutput = prompt(
            inputs.input_ids, attention_mask=inputs.attention_mask, task_ids=inputs.task_ids
        )
        return out

    return call


def _embeds(out: EPTOutput) -> Tensor:
    return out.inputs_embeds


def _plain(prompt: FusedEPTPrompt) -> Served:
    """A constant prompt before the text and nothing else: who puts a prompt there does no less."""
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
        id(inputs): [
            (task, (inputs.task_ids == task).nonzero().squeeze(1))
            for task in inputs.task_ids.unique().tolist()
        ]
        for inputs in sets
    }
    used = {task for found in rows.values() for task, _ in found}
    calls = {
        task: _caller(make_prompt(shape, sets[0], backend=None, task=task).fold())
        for task in sorted(used)
    }

    def call(inputs: Inputs) -> list[EPTOutput]:
        return [
            calls[task](
                replace(
                    inputs,
                    input_ids=inputs.input_ids[of_task],
                    attention_mask=inputs.attention_mask[of_task],
                    task_ids=None,
                )
            )
            for task, of_task in rows[id(inputs)]
        ]

    def in_order(outputs: list[EPTOutput]) -> Tensor:
        order = torch.cat([of_task for _, of_task in rows[id(sets[0])]])
        return torch.cat([out.inputs_embeds for out in outputs])[order.argsort()]

    note = f"{len(rows[id(sets[0])])} tasks in the batch"
    return Served(call, in_order, definition, note)


def _with_mask(inputs: Inputs) -> Inputs:
    if inputs.attention_mask is not None:
        return inputs
    return replace(inputs, attention_mask=torch.ones_like(inputs.input_ids))


def _work(served: Served, sets: list[Inputs]) -> Work:
    def call(inputs: Inputs) -> Any:
        with torch.no_grad():
            return served.call(inputs)

    return Work(lambda i: sets[i % len(sets)], call)


@torch.no_grad()
def check(served: Served, inputs: Inputs, expected: parity.Expected) -> tuple[float, str]:
    """As :func:`bench.parity.check`, of outputs alone."""
    return parity.compare({"inputs_embeds": served.embeds_of(served.call(inputs))}, expected)


@torch.no_grad()
def expected_of(served: Served, inputs: Inputs) -> parity.Expected:
    """What a peer's output is compared with."""
    exact = served.definition(inputs.to(torch.float64))
    return parity.Expected({"inputs_embeds": exact}, {"inputs_embeds": served.definition(inputs)})


def _checked(held: dict[Any, Any], case: Case, name: str) -> tuple[Served, float]:
    """The peer and its error; made and checked once a shape."""
    if name not in held:
        sets: list[Inputs] = held["inputs"]
        served = make(replace(case, peer=name), held["prompt"], sets)
        if served.definition not in held:
            held[served.definition] = expected_of(served, sets[0])
        held[name] = (served, *check(served, sets[0], held[served.definition]))
    served, error, where = held[name]
    parity.refuse_red(case.id, name, error, where)
    return served, error
