"""Each wrong argument: type and whole message of its exception; ``docs/errors.md`` has the table.

``python -m tests.test_errors`` writes the table anew from what is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ept_fast import EPTConfig, reconstruct_prompt, splice_prompt

DOCS = Path(__file__).parent.parent / "docs" / "errors.md"

T, M, N, R, K, H, D, B, S, V = 2, 3, 7, 2, 2, 4, 5, 4, 6, 11


def _ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


RECONSTRUCT: dict[str, Any] = {
    "short_prompt": _ones(M, D),
    "offset_a": _ones(N, R),
    "offset_b": _ones(R, D),
    "space_down": _ones(K, D, H),
    "space_up": _ones(K, H, D),
    "gate_weight": _ones(D, K),
    "gate_bias": _ones(K),
}
SPLICE: dict[str, Any] = {
    "prompt": _ones(M, D),
    "input_ids": torch.zeros(B, S, dtype=torch.int64),
    "weight": _ones(V, D),
    "offset_a": _ones(N, R),
    "offset_b": _ones(R, D),
    "attention_mask": torch.ones(B, S, dtype=torch.int64),
}
EMBEDS: dict[str, Any] = {"input_ids": None, "weight": None, "inputs_embeds": _ones(B, S, D)}
BANK: dict[str, Any] = {
    "prompt": _ones(T, M, D),
    "offset_a": _ones(T, N, R),
    "offset_b": _ones(T, R, D),
}


def _with(tensor: Tensor, value: int, *index: int) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@dataclass(frozen=True)
class Mistake:
    """A call that is wrong in one way."""

    name: str
    call: Callable[[], object]
    error: type[Exception]
    message: str


def _reconstruct(name: str, error: type[Exception], message: str, **change: Any) -> Mistake:
    arguments = {**RECONSTRUCT, **change}
    return Mistake(name, lambda: reconstruct_prompt(**arguments), error, message)


def _splice(name: str, error: type[Exception], message: str, **change: Any) -> Mistake:
    arguments = {**SPLICE, **change}
    return Mistake(name, lambda: splice_prompt(**arguments), error, message)


def _config(name: str, error: type[Exception], message: str, **change: Any) -> Mistake:
    return Mistake(
        name, lambda: EPTConfig(**{"hidden_size": D, "rank": 2, **change}), error, message
    )


FLOATS = "float64 or float32 or bfloat16 or float16"
NAN = float("nan")

MISTAKES = (
    # types
    _reconstruct(
        "no tensor",
        TypeError,
        "short_prompt: expected a tensor, got list",
        short_prompt=[[1.0]],
    ),
    _reconstruct(
        "integer parameter",
        TypeError,
        f"short_prompt: expected dtype {FLOATS}, got torch.int64",
        short_prompt=_ones(M, D, dtype=torch.int64),
    ),
    *(
        _reconstruct(
            f"integer {name}",
            TypeError,
            f"{name}: expected dtype {FLOATS}, got torch.int32",
            **{name: RECONSTRUCT[name].int()},
        )
        for name in list(RECONSTRUCT)[1:]
    ),
    _splice(
        "integer prompt",
        TypeError,
        f"prompt: expected dtype {FLOATS}, got torch.int64",
        prompt=_ones(M, D, dtype=torch.int64),
    ),
    _splice(
        "floating token ids",
        TypeError,
        "input_ids: expected dtype int64 or int32, got torch.float32",
        input_ids=_ones(B, S),
    ),
    _splice(
        "integer table",
        TypeError,
        f"weight: expected dtype {FLOATS}, got torch.int8",
        weight=_ones(V, D, dtype=torch.int8),
    ),
    _splice(
        "integer embeddings",
        TypeError,
        f"inputs_embeds: expected dtype {FLOATS}, got torch.int64",
        **{**EMBEDS, "inputs_embeds": _ones(B, S, D, dtype=torch.int64)},
    ),
    _splice(
        "floating mask",
        TypeError,
        "attention_mask: expected dtype bool or int64 or int32 or int16 or int8 or uint8, "
        "got torch.float32",
        attention_mask=_ones(B, S),
    ),
    _splice(
        "floating task ids",
        TypeError,
        "task_ids: expected dtype int64 or int32, got torch.float32",
        **BANK,
        task_ids=_ones(B),
    ),
    _reconstruct(
        "scaling of another type",
        TypeError,
        "scaling: expected a real number, got str '1'",
        scaling="1",
    ),
    _reconstruct(
        "fusion of another type", TypeError, "fusion: expected a bool, got int 1", fusion=1
    ),
    # rank and shape
    _reconstruct(
        "one axis",
        ValueError,
        "short_prompt: expected shape [m, d] or [T, m, d] with d >= 1, got [5]",
        short_prompt=_ones(D),
    ),
    _reconstruct(
        "four axes",
        ValueError,
        "short_prompt: expected shape [m, d] or [T, m, d] with d >= 1, got [1, 2, 3, 5]",
        short_prompt=_ones(1, 2, M, D),
    ),
    _reconstruct(
        "a width of 0",
        ValueError,
        "short_prompt: expected shape [m, d] or [T, m, d] with d >= 1, got [3, 0]",
        short_prompt=_ones(M, 0),
    ),
    _reconstruct(
        "offset_a with a task axis beside a single prompt",
        ValueError,
        "offset_a: expected shape [n, r] to match short_prompt [3, 5], got [2, 7, 2]",
        offset_a=_ones(T, N, R),
    ),
    _reconstruct(
        "another rank",
        ValueError,
        "offset_b: expected shape [2, 5] to match offset_a [7, 2] and hidden_size 5, got [3, 5]",
        offset_b=_ones(3, D),
    ),
    _reconstruct(
        "another width of offset_b",
        ValueError,
        "offset_b: expected shape [2, 5] to match offset_a [7, 2] and hidden_size 5, got [2, 6]",
        offset_b=_ones(R, 6),
    ),
    _reconstruct(
        "another width of space_down",
        ValueError,
        "space_down: expected shape [K, 5, h] to match short_prompt [3, 5], got [2, 6, 4]",
        space_down=_ones(K, 6, H),
    ),
    _reconstruct(
        "space_up the other way round",
        ValueError,
        "space_up: expected shape [2, 4, 5] to match space_down [2, 5, 4], got [2, 5, 4]",
        space_up=_ones(K, D, H),
    ),
    _reconstruct(
        "gate for another number of spaces",
        ValueError,
        "gate_weight: expected shape [5, 2] to match space_down [2, 5, 4], got [5, 3]",
        gate_weight=_ones(D, 3),
    ),
    _reconstruct(
        "gate_bias of another size",
        ValueError,
        "gate_bias: expected shape [2] to match space_down [2, 5, 4], got [3]",
        gate_bias=_ones(3),
    ),
    _reconstruct(
        "another number of tasks",
        ValueError,
        "offset_a: expected shape [2, n, r] to match short_prompt [2, 3, 5], got [3, 7, 2]",
        short_prompt=_ones(T, M, D),
        offset_a=_ones(3, N, R),
    ),
    _splice(
        "prompt with one axis",
        ValueError,
        "prompt: expected shape [m, d] or [T, m, d] with d >= 1, got [5]",
        prompt=_ones(D),
    ),
    _splice(
        "prompt of width 0",
        ValueError,
        "prompt: expected shape [m, d] or [T, m, d] with d >= 1, got [3, 0]",
        prompt=_ones(M, 0),
    ),
    _splice(
        "token ids with one axis",
        ValueError,
        "input_ids: expected shape [B, S], got [6]",
        input_ids=torch.zeros(S, dtype=torch.int64),
    ),
    _splice(
        "table of another width",
        ValueError,
        "weight: expected shape [V, 5] to match prompt [3, 5], got [11, 6]",
        weight=_ones(V, 6),
    ),
    _splice(
        "embeddings of another width",
        ValueError,
        "inputs_embeds: expected shape [B, S, 5] to match prompt [3, 5], got [4, 6, 6]",
        **{**EMBEDS, "inputs_embeds": _ones(B, S, 6)},
    ),
    _splice(
        "mask of another shape",
        ValueError,
        "attention_mask: expected shape [4, 6] to match input_ids [4, 6], got [4, 9]",
        attention_mask=torch.ones(B, M + S, dtype=torch.int64),
    ),
    _splice(
        "text longer than max_length",
        ValueError,
        "input_ids: expected at most max_length 7 text positions (the rows of offset_a), got 8",
        input_ids=torch.zeros(B, 8, dtype=torch.int64),
        attention_mask=None,
    ),
    _splice(
        "embeddings longer than max_length",
        ValueError,
        "inputs_embeds: expected at most max_length 7 text positions (the rows of offset_a), got 8",
        **{**EMBEDS, "inputs_embeds": _ones(B, 8, D)},
        attention_mask=None,
    ),
    _splice(
        "task ids for another batch",
        ValueError,
        "task_ids: expected shape [4] to match input_ids [4, 6], got [5]",
        **BANK,
        task_ids=torch.zeros(5, dtype=torch.int64),
    ),
    # devices
    *(
        _reconstruct(
            f"{name} on another device",
            ValueError,
            f"{name}: expected device cpu, got meta",
            **{name: RECONSTRUCT[name].to("meta")},
        )
        for name in list(RECONSTRUCT)[1:]
    ),
    *(
        _splice(
            f"{name} on another device",
            ValueError,
            f"{name}: expected device cpu, got meta",
            **{name: SPLICE[name].to("meta")},
        )
        for name in list(SPLICE)[1:]
    ),
    # partners
    _reconstruct(
        "A without B",
        ValueError,
        "offset_b: expected a tensor beside offset_a, got None",
        offset_b=None,
    ),
    _reconstruct(
        "B without A",
        ValueError,
        "offset_a: expected a tensor beside offset_b, got None",
        offset_a=None,
    ),
    _reconstruct(
        "spaces without gate",
        ValueError,
        "gate_weight, gate_bias: expected a tensor beside space_down, space_up, got None",
        gate_weight=None,
        gate_bias=None,
    ),
    _reconstruct(
        "gate without spaces",
        ValueError,
        "space_down, space_up: expected a tensor beside gate_weight, gate_bias, got None",
        space_down=None,
        space_up=None,
    ),
    _splice(
        "A without B in the splice",
        ValueError,
        "offset_b: expected a tensor beside offset_a, got None",
        offset_b=None,
    ),
    _splice(
        "neither ids nor embeddings",
        ValueError,
        "input_ids, inputs_embeds: expected exactly one of them, got neither",
        input_ids=None,
        weight=None,
    ),
    _splice(
        "both ids and embeddings",
        ValueError,
        "input_ids, inputs_embeds: expected exactly one of them, got both",
        inputs_embeds=_ones(B, S, D),
    ),
    _splice(
        "ids without a table",
        ValueError,
        "weight: expected the embedding table beside input_ids, got None",
        weight=None,
    ),
    _splice(
        "embeddings with a table",
        ValueError,
        "weight: expected None beside inputs_embeds, got a tensor",
        **{**EMBEDS, "weight": _ones(V, D)},
    ),
    _splice(
        "a bank without task ids",
        ValueError,
        "task_ids: expected [4] integers to match prompt [2, 3, 5], got None",
        **BANK,
    ),
    _splice(
        "task ids without a bank",
        ValueError,
        "task_ids: expected None beside a single prompt [3, 5], got a tensor",
        task_ids=torch.zeros(B, dtype=torch.int64),
    ),
    # values
    _splice(
        "token id beyond the vocabulary",
        IndexError,
        "input_ids: expected ids from 0 to 10, got 11 at row 2, column 3",
        input_ids=_with(SPLICE["input_ids"], V, 2, 3),
    ),
    _splice(
        "token id beside an empty table",
        IndexError,
        "input_ids: expected no ids, as there are 0 rows to choose from, got 0 at row 0, column 0",
        weight=_ones(0, D),
    ),
    _splice(
        "negative token id",
        IndexError,
        "input_ids: expected ids from 0 to 10, got -100 at row 0, column 5",
        input_ids=_with(SPLICE["input_ids"], -100, 0, 5),
    ),
    _splice(
        "mask with another value",
        ValueError,
        "attention_mask: expected only 0 and 1, got 2 at row 1, column 4",
        attention_mask=_with(SPLICE["attention_mask"], 2, 1, 4),
    ),
    _splice(
        "additive mask",
        ValueError,
        "attention_mask: expected only 0 and 1, got -10000 at row 3, column 0",
        attention_mask=_with(SPLICE["attention_mask"], -10000, 3, 0),
    ),
    _splice(
        "task id beyond the bank",
        IndexError,
        "task_ids: expected ids from 0 to 1, got 2 at row 3",
        **BANK,
        task_ids=torch.tensor([0, 1, 1, 2]),
    ),
    _splice(
        "negative task id",
        IndexError,
        "task_ids: expected ids from 0 to 1, got -1 at row 0",
        **BANK,
        task_ids=torch.tensor([-1, 1, 1, 1]),
    ),
    _reconstruct(
        "temperature nan",
        ValueError,
        "temperature: expected a finite number > 0, got nan",
        temperature=NAN,
    ),
    _reconstruct(
        "temperature infinite",
        ValueError,
        "temperature: expected a finite number > 0, got inf",
        temperature=float("inf"),
    ),
    _reconstruct(
        "temperature zero",
        ValueError,
        "temperature: expected a finite number > 0, got 0.0",
        temperature=0.0,
    ),
    _reconstruct(
        "scaling nan", ValueError, "scaling: expected a finite number, got nan", scaling=NAN
    ),
    _splice(
        "scaling infinite",
        ValueError,
        "scaling: expected a finite number, got inf",
        scaling=float("inf"),
    ),
    # names
    _reconstruct(
        "unknown activation",
        ValueError,
        "activation: expected one of gelu, relu, silu, identity, got 'tanh'",
        activation="tanh",
    ),
    _reconstruct(
        "unknown gate", ValueError, "gate: expected one of token, prompt, got 'row'", gate="row"
    ),
    _reconstruct(
        "unknown backend",
        ValueError,
        "backend: expected one of triton, cuda, eager, reference, got 'tpu'",
        backend="tpu",
    ),
    _splice(
        "unknown backend of the splice",
        ValueError,
        "backend: expected one of triton, cuda, eager, reference, got 'tpu'",
        backend="tpu",
    ),
    # config
    _config(
        "config: no width",
        ValueError,
        "hidden_size: expected an integer >= 1, got 0",
        hidden_size=0,
    ),
    _config("config: negative rank", ValueError, "rank: expected an integer >= 0, got -1", rank=-1),
    _config(
        "config: width that no tensor has",
        ValueError,
        "hidden_size: expected an integer < 2^63, got 9223372036854775808",
        hidden_size=2**63,
    ),
    _config(
        "config: rank beyond the width",
        ValueError,
        "rank: expected at most min(max_length 256, hidden_size 5) = 5, got 6",
        rank=6,
    ),
    _config(
        "config: length of another type",
        TypeError,
        "max_length: expected an integer, got float 8.0",
        max_length=8.0,
    ),
    _config(
        "config: unknown activation",
        ValueError,
        "activation: expected one of gelu, relu, silu, identity, got 'swish'",
        activation="swish",
    ),
)


def _table() -> str:
    lines = ["| mistake | exception | message |", "|---|---|---|"]
    for mistake in MISTAKES:
        try:
            mistake.call()
        except Exception as error:  # the table shows whatever comes
            text = str(error).replace("|", "\\|")
            lines.append(f"| {mistake.name} | {type(error).__name__} | `{text}` |")
        else:
            lines.append(f"| {mistake.name} | none | |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_message(mistake: Mistake) -> None:
    with pytest.raises(mistake.error) as caught:
        mistake.call()
    assert type(caught.value) is mistake.error
    assert str(caught.value) == mistake.message


def test_the_right_arguments_pass() -> None:
    """Without the one change, each base call is valid: it is the change that is refused."""
    reconstruct_prompt(**RECONSTRUCT)
    splice_prompt(**SPLICE)
    splice_prompt(**{**SPLICE, **EMBEDS})
    splice_prompt(**{**SPLICE, **BANK}, task_ids=torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_every_backend_checks_values(backend: str) -> None:
    ids = _with(SPLICE["input_ids"], V, 1, 1)
    with pytest.raises(IndexError, match="row 1, column 1"):
        splice_prompt(**{**SPLICE, "input_ids": ids}, backend=backend)


def _ran_on(out: Tensor) -> str:
    """The backend, told from the graph: ours is one node, the definition many."""
    names = set()
    nodes = [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(node.name())
            nodes += [following for following, _ in node.next_functions]
    return "eager" if "_ReconstructBackward" in names else "reference"


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {**RECONSTRUCT, "short_prompt": _ones(M, D).requires_grad_()}
    assert _ran_on(reconstruct_prompt(**arguments)) == "eager"
    monkeypatch.setenv("EPT_FAST_BACKEND", "reference")
    assert _ran_on(reconstruct_prompt(**arguments)) == "reference"
    assert _ran_on(reconstruct_prompt(**arguments, backend="eager")) == "eager"
    monkeypatch.setenv("EPT_FAST_BACKEND", "warp")
    with pytest.raises(
        ValueError, match="EPT_FAST_BACKEND: expected one of triton, cuda, eager, reference"
    ):
        reconstruct_prompt(**arguments)


def test_the_documents_table_is_what_is_raised() -> None:
    assert _table() in DOCS.read_text(encoding="utf-8")


if __name__ == "__main__":
    page = DOCS.read_text(encoding="utf-8")
    start = page.index("| mistake |")
    end = page.index("\n\n", start) + 1  # the first table; another one is written by hand
    DOCS.write_text(page[:start] + _table() + page[end:], encoding="utf-8")
