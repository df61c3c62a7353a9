"""Who is measured: our backends, the definition (plain and compiled), PEFT, and DePT's way.

A peer is a forward function of :class:`bench.inputs.Inputs`, the tensors that it trains, and a
definition: what its results have to agree with. Those that compute the same as we do share ours;
PEFT's and DePT's are the definition at their own sizes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ept_fast
from bench.inputs import SCALING, Inputs
from ept_fast import reference
from ept_fast.ops import dispatch
from ept_fast.ops.types import Parameters

REFERENCE = "reference"
COMPILED = {"reference-compiled": "default", "reference-max-autotune": "max-autotune"}
PEFT_TOKENS = 100
PEFT = f"peft-{PEFT_TOKENS}"
DEPT = "dept"

Forward = Callable[[Inputs], Tensor]
Leaves = Callable[[Inputs], dict[str, Tensor]]


@dataclass(frozen=True)
class Peer:
    """One way to do one piece of work.

    ``definition`` and its ``leaves`` run on inputs in float64 (the exact result) and as they are
    (the error that plain PyTorch makes).
    """

    name: str
    forward: Forward
    leaves: Leaves
    definition: Forward
    same_work: bool = True
    note: str = ""


# What the package has for a GPU.
_FOR_A_GPU = ("triton", "cuda", "eager")


def backends(device: torch.device) -> list[str]:
    """The package's backends that are measured on this device; first the one that a user gets."""
    if device.type == "cuda" and not torch.cuda.is_available():  # its rows are only listed
        return list(_FOR_A_GPU)
    first = dispatch.select(None, Parameters(torch.empty(1, 1, 1, device=device)))
    if device.type != "cuda" and first == "eager":
        return [first]
    working = [name for name, works, _ in dispatch.describe() if works]
    return [first, *(n for n in working if n in _FOR_A_GPU and n != first)]


def ours(device: torch.device) -> str:
    """The backend that a user gets on this device."""
    return backends(device)[0]


def names(operation: str, device: torch.device) -> list[str]:
    """The peers of an operation, ours first."""
    found = [*backends(device), REFERENCE, "reference-compiled"]
    if device.type == "cuda":
        found.append("reference-max-autotune")
    if operation != "reconstruct":
        found.append(DEPT)
    if operation == "prompt path" and importlib.util.find_spec("peft") is not None:
        found.append(PEFT)
    return found


def make(operation: str, name: str, inputs: Inputs) -> Peer:
    """A peer for inputs like these, which only tell the frozen table.

    Raises:
        ValueError: an unknown operation.
    """
    if name == DEPT:
        return _dept(operation)
    if name == PEFT:
        return peft_prompt(inputs.weight)
    definition = operation_of(operation, REFERENCE)
    if name == REFERENCE:
        forward = definition
    elif name in COMPILED:
        forward = torch.compile(definition, dynamic=False, mode=COMPILED[name])
    else:
        forward = operation_of(operation, name)
    return Peer(name, forward, lambda inputs: trained(operation, inputs), definition)


def trained(operation: str, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors that an operation gives gradients to."""
    if operation == "splice":
        offset = {name: inputs.parameters[name] for name in ("offset_a", "offset_b")}
        return {"prompt": inputs.prompt, **offset}
    return inputs.parameters


def operation_of(operation: str, backend: str) -> Forward:
    """An operation's forward by one backend, or by the definition."""
    plain = backend == REFERENCE
    module: Any = reference if plain else ept_fast
    options = {} if plain else {"backend": backend}

    def reconstruct(inputs: Inputs) -> Tensor:
        out: Tensor = module.reconstruct_prompt(**inputs.parameters, scaling=SCALING, **options)
        return out

    def splice(inputs: Inputs, prompt: Tensor) -> Tensor:
        out: Tensor = module.splice_prompt(
            prompt,
            input_ids=inputs.input_ids,
            weight=inputs.weight,
            offset_a=inputs.parameters["offset_a"],
            offset_b=inputs.parameters["offset_b"],
            scaling=SCALING,
            attention_mask=inputs.attention_mask,
            task_ids=inputs.task_ids,
            **options,
        )
        return out

    def both(inputs: Inputs) -> Tensor:
        if plain:
            return splice(inputs, reconstruct(inputs))
        return ept_fast.reconstruct_and_splice(
            **inputs.parameters,
            input_ids=inputs.input_ids,
            weight=inputs.weight,
            attention_mask=inputs.attention_mask,
            task_ids=inputs.task_ids,
            scaling=SCALING,
            backend=backend,
        )

    forwards: dict[str, Forward] = {
        "reconstruct": reconstruct,
        "splice": lambda inputs: splice(inputs, inputs.prompt),
        "prompt path": both,
    }
    if operation not in forwards:
        raise ValueError(f"operation: expected one of {', '.join(forwards)}, got {operation!r}")
    return forwards[operation]


def dept_embeds(
    prompt: Tensor, a: Tensor, b: Tensor, scaling: float, ids: Tensor, table: Tensor
) -> Tensor:
    """DePT's way: rows padded to the offset's whole length, an offset by column for all of it."""
    text = F.embedding(F.pad(ids, (0, len(a) - ids.shape[1])), table)
    offset = scaling * (a @ b)
    # As PEFT does it: the gradient is summed over the batch before it is rounded again.
    head = prompt.expand(len(ids), *prompt.shape).to(text.dtype)
    return torch.cat([head, text + offset.to(text.dtype)], dim=1)


def dept_definition(
    prompt: Tensor, a: Tensor, b: Tensor, scaling: float, ids: Tensor, table: Tensor
) -> Tensor:
    """The same by our definition."""
    ids = F.pad(ids, (0, len(a) - ids.shape[1]))
    options = {"offset_a": a, "offset_b": b, "scaling": scaling}
    return reference.splice_prompt(prompt, input_ids=ids, weight=table, **options)


def _dept(operation: str) -> Peer:
    def leaves(inputs: Inputs) -> dict[str, Tensor]:
        used = trained("splice", inputs)
        if operation != "splice":
            used["prompt"] = inputs.parameters["short_prompt"]
        return used

    def by(embeds: Callable[..., Tensor]) -> Forward:
        return lambda x: embeds(*leaves(x).values(), SCALING, x.input_ids, x.weight)

    return Peer(DEPT, by(dept_embeds), leaves, by(dept_definition), same_work=False)


def peft_prompt(table: Tensor) -> Peer:
    """PEFT's prompt tuning on a model that hands its embeddings on, so only the prompt is timed."""
    import peft
    from transformers import PretrainedConfig, PreTrainedModel

    class Embeddings(PreTrainedModel):
        config_class = PretrainedConfig
        base_model_prefix = ""

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.embedding = nn.Embedding.from_pretrained(table, freeze=True)

        def get_input_embeddings(self) -> nn.Module:
            return self.embedding

        def forward(
            self,
            input_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            attention_mask: Tensor | None = None,
            **options: Any,
        ) -> Tensor | None:
            return inputs_embeds

    rows, width = table.shape
    config = PretrainedConfig(
        vocab_size=rows, hidden_size=width, num_hidden_layers=1, num_attention_heads=1
    )
    model = peft.get_peft_model(
        Embeddings(config),
        peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=PEFT_TOKENS),
    )
    (prompt,) = (p for p in model.parameters() if p.requires_grad)
    exact = prompt.detach().double().requires_grad_()

    def forward(inputs: Inputs) -> Tensor:
        out: Tensor = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        return out

    def chosen(inputs: Inputs) -> Tensor:
        return exact if inputs.prompt.dtype == torch.float64 else prompt

    def definition(inputs: Inputs) -> Tensor:
        return reference.splice_prompt(
            chosen(inputs), input_ids=inputs.input_ids, weight=inputs.weight
        )

    return Peer(
        PEFT, forward, lambda inputs: {"prompt": chosen(inputs)}, definition, same_work=False
    )
