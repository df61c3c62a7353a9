"""Checks of the operations' arguments: errors name the argument, what was expected, what came."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ept_fast.config import GATES, check_choice, check_flag, check_number
from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.ops.types import Flags, Parameters, SpliceInputs, Text

__all__ = [
    "check_input_ids",
    "check_reconstruct",
    "check_splice",
    "check_splice_values",
    "check_task_ids",
    "check_text",
    "check_token_ids",
    "constant",
    "values_are_checked",
]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_IDS = (torch.int64, torch.int32)
_MASKS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)

_BIASES = ("space_down_bias", "space_up_bias")

_Size = int | str


def constant(number: float) -> float:
    """The number as Python has it, for the checks and for operators whose numbers are constants.

    If the compiler has made it an input, code is compiled for each value.
    """
    if torch.compiler.is_compiling() and isinstance(number, _NUMBERS):
        from torch.fx.experimental.symbolic_shapes import guard_scalar  # loads the compiler

        return guard_scalar(number)
    return number


def _check_tensor(
    name: str, value: object, dtypes: tuple[torch.dtype, ...], device: torch.device | None
) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_dtype_names(dtypes)}, got {value.dtype}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")
    return value


def _dtype_names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_shape(name: str, tensor: Tensor, expected: tuple[_Size, ...], why: str) -> None:
    """Integers in ``expected`` must match; strings are sizes that this tensor is free to choose."""
    fits = tensor.dim() == len(expected) and all(
        isinstance(size, str) or size == got
        for size, got in zip(expected, tensor.shape, strict=True)
    )
    if not fits:
        shape = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name}: expected shape [{shape}]{why}, got {list(tensor.shape)}")


def _check_prompt(name: str, prompt: object) -> tuple[tuple[int, ...], int]:
    """The leading task axis (empty for a single prompt) and the width of a prompt."""
    tensor = _check_tensor(name, prompt, _FLOATS, None)
    if tensor.dim() not in (2, 3) or tensor.shape[-1] == 0:
        raise ValueError(
            f"{name}: expected shape [m, d] or [T, m, d] with d >= 1, got {list(tensor.shape)}"
        )
    return tuple(tensor.shape[:-2]), tensor.shape[-1]


def _check_together(tensors: Parameters | SpliceInputs, names: tuple[str, ...]) -> bool:
    """Whether the partners are there; an error if only some of them are."""
    missing = [name for name in names if getattr(tensors, name) is None]
    if missing and len(missing) < len(names):
        given = [name for name in names if name not in missing]
        raise ValueError(
            f"{', '.join(missing)}: expected a tensor beside {', '.join(given)}, got None"
        )
    return not missing


def _check_offset(
    tensors: Parameters | SpliceInputs,
    lead: tuple[int, ...],
    width: int,
    device: torch.device,
    partner: str,
) -> None:
    if not _check_together(tensors, ("offset_a", "offset_b")):
        return
    a = _check_tensor("offset_a", tensors.offset_a, _FLOATS, device)
    b = _check_tensor("offset_b", tensors.offset_b, _FLOATS, device)
    _check_shape("offset_a", a, (*lead, "n", "r"), f" to match {partner}")
    rank = a.shape[-1]
    why = f" to match offset_a {list(a.shape)} and hidden_size {width}"
    _check_shape("offset_b", b, (*lead, rank, width), why)


def check_reconstruct(parameters: Parameters, flags: Flags, fusion: bool) -> None:
    """Raise TypeError or ValueError unless operation 1 is defined for these arguments."""
    lead, width = _check_prompt("short_prompt", parameters.short_prompt)
    device = parameters.short_prompt.device
    partner = f"short_prompt {list(parameters.short_prompt.shape)}"
    check_number("scaling", flags.scaling)
    check_choice("activation", flags.activation, tuple(ACTIVATIONS))
    check_choice("gate", flags.gate, GATES)
    check_number("temperature", flags.temperature, positive=True)
    check_flag("fusion", fusion)
    _check_offset(parameters, lead, width, device, partner)
    names: tuple[str, ...] = ("space_down", "space_up", "gate_weight", "gate_bias")
    if not parameters.has_gate and parameters.gate_bias is None and _is_single(parameters, lead):
        names = names[:2]  # a gate of 1
    has_spaces = _check_together(parameters, names)
    if parameters.space_down_bias is not None or parameters.space_up_bias is not None:
        _check_together(parameters, _BIASES)
        _check_together(parameters, ("space_down", *_BIASES))
        names += _BIASES
    if not has_spaces:
        return
    down = _check_tensor("space_down", parameters.space_down, _FLOATS, device)
    _check_shape("space_down", down, (*lead, "K", width, "h"), f" to match {partner}")
    num_spaces, space_dim = down.shape[-3], down.shape[-1]
    shapes = {
        "space_up": (num_spaces, space_dim, width),
        "gate_weight": (width, num_spaces),
        "gate_bias": (num_spaces,),
        "space_down_bias": (num_spaces, space_dim),
        "space_up_bias": (num_spaces, width),
    }
    for name in names[1:]:
        tensor = _check_tensor(name, getattr(parameters, name), _FLOATS, device)
        beside = f" to match space_down {list(down.shape)}"
        _check_shape(name, tensor, (*lead, *shapes[name]), beside)


def _is_single(parameters: Parameters, lead: tuple[int, ...]) -> bool:
    """Whether there is one subspace, which needs no gate."""
    down = parameters.space_down
    return isinstance(down, Tensor) and down.dim() == len(lead) + 3 and down.shape[-3] == 1


def check_input_ids(input_ids: object, device: torch.device | None) -> Tensor:
    """Raise TypeError or ValueError unless these are token ids ``[B, S]`` on the device."""
    ids = _check_tensor("input_ids", input_ids, _IDS, device)
    _check_shape("input_ids", ids, ("B", "S"), "")
    return ids


def check_splice(inputs: SpliceInputs, scaling: float) -> None:
    """Raise TypeError or ValueError unless operation 2 is defined for these types and shapes."""
    prompt, input_ids, weight, inputs_embeds, offset_a, _, attention_mask, task_ids, rows = inputs
    lead, width = _check_prompt("prompt", prompt)
    if rows is not None and lead:
        raise ValueError(
            f"prompt: expected shape [R, d] beside prompt_rows, got {list(prompt.shape)}"
        )
    check_number("scaling", scaling)
    _check_offset(inputs, lead, width, prompt.device, f"prompt {list(prompt.shape)}")
    text = Text(input_ids, weight, inputs_embeds, attention_mask, task_ids)
    check_text(text, "prompt", prompt, offset_a)
    if rows is not None:
        shape = inputs.text.shape
        name = "input_ids" if inputs_embeds is None else "inputs_embeds"
        rows = _check_tensor("prompt_rows", rows, _IDS, prompt.device)
        _check_shape("prompt_rows", rows, (shape[0], "m"), f" to match {name} {list(shape)}")


def check_text(text: Text, name: str, prompt: Tensor, offset_a: Tensor | None) -> None:
    """Raise TypeError or ValueError unless the text fits a prompt and an offset that were checked.

    Args:
        text: what the prompt is put before.
        name: of the argument that is the prompt.
        prompt: ``[(T,) m, d]``.
        offset_a: A, if there is an offset.
    """
    input_ids, weight, inputs_embeds, attention_mask, task_ids = text
    lead, width, device = tuple(prompt.shape[:-2]), prompt.shape[-1], prompt.device
    partner = f"{name} {list(prompt.shape)}"
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        raise ValueError(f"input_ids, inputs_embeds: expected exactly one of them, got {got}")
    if input_ids is not None:
        text_name = "input_ids"
        given = check_input_ids(input_ids, device)
        if weight is None:
            raise ValueError("weight: expected the embedding table beside input_ids, got None")
        table = _check_tensor("weight", weight, _FLOATS, device)
        _check_shape("weight", table, ("V", width), f" to match {partner}")
    else:
        text_name = "inputs_embeds"
        given = _check_tensor("inputs_embeds", inputs_embeds, _FLOATS, device)
        _check_shape("inputs_embeds", given, ("B", "S", width), f" to match {partner}")
        if weight is not None:
            raise ValueError("weight: expected None beside inputs_embeds, got a tensor")
    batch, length = given.shape[0], given.shape[1]
    beside = f" to match {text_name} {list(given.shape)}"
    if offset_a is not None and length > offset_a.shape[-2]:
        raise ValueError(
            f"{text_name}: expected at most max_length {offset_a.shape[-2]} text positions "
            f"(the rows of offset_a), got {length}"
        )
    if attention_mask is not None:
        mask = _check_tensor("attention_mask", attention_mask, _MASKS, device)
        _check_shape("attention_mask", mask, (batch, length), beside)
    if lead and task_ids is None:
        raise ValueError(f"task_ids: expected [{batch}] integers to match {partner}, got None")
    if task_ids is not None:
        if not lead:
            raise ValueError(f"task_ids: expected None beside a single {partner}, got a tensor")
        tasks = _check_tensor("task_ids", task_ids, _IDS, device)
        _check_shape("task_ids", tasks, (batch,), beside)


def values_are_checked(device: torch.device) -> bool:
    """Whether the values of ids and masks are looked at: always on a CPU, elsewhere on request."""
    return device.type == "cpu" or os.environ.get("EPT_FAST_CHECK") == "1"


def check_token_ids(input_ids: Tensor, vocabulary: int) -> None:
    """Raise IndexError unless every id is one of the vocabulary's."""
    if _outside(input_ids, vocabulary):
        row, column = _first((input_ids < 0) | (input_ids >= vocabulary))
        raise IndexError(
            f"input_ids: expected {_ids_below(vocabulary)}, "
            f"got {int(input_ids[row, column])} at row {row}, column {column}"
        )


def check_task_ids(task_ids: Tensor, num_tasks: int) -> None:
    """Raise IndexError unless every id is one of the bank's."""
    if _outside(task_ids, num_tasks):
        (row,) = _first((task_ids < 0) | (task_ids >= num_tasks))
        raise IndexError(
            f"task_ids: expected {_ids_below(num_tasks)}, got {int(task_ids[row])} at row {row}"
        )


def check_splice_values(inputs: SpliceInputs) -> None:
    """Raise IndexError for ids out of range, ValueError for a mask with values other than 0 and 1.

    Waits for the device: call it only if :func:`values_are_checked` says so.
    """
    if inputs.input_ids is not None and inputs.weight is not None:
        check_token_ids(inputs.input_ids, inputs.weight.shape[0])
    attention_mask, task_ids = inputs.attention_mask, inputs.task_ids
    num_tasks = inputs.prompt.shape[0] if inputs.prompt.dim() == 3 else 1
    if (
        attention_mask is not None
        and attention_mask.dtype != torch.bool
        and _outside(attention_mask, 2)
    ):
        row, column = _first((attention_mask != 0) & (attention_mask != 1))
        raise ValueError(
            f"attention_mask: expected only 0 and 1, "
            f"got {int(attention_mask[row, column])} at row {row}, column {column}"
        )
    if task_ids is not None:
        check_task_ids(task_ids, num_tasks)
    rows, count = inputs.prompt_rows, inputs.prompt.shape[-2]
    if rows is not None and _outside(rows + 1, count + 1):
        row, token = _first((rows < -1) | (rows >= count))
        raise IndexError(
            f"prompt_rows: expected -1 or {_ids_below(count)}, "
            f"got {int(rows[row, token])} at row {row}, token {token}"
        )


def _ids_below(size: int) -> str:
    return f"ids from 0 to {size - 1}" if size else "no ids, as there are 0 rows to choose from"


def _outside(values: Tensor, size: int) -> bool:
    if values.numel() == 0:
        return False
    low, high = torch.aminmax(values)
    return int(low) < 0 or int(high) >= size


def _first(bad: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in bad.nonzero()[0])
