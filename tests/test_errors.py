"""Each wrong argument: type and whole message of its exception; ``docs/errors.md`` has the table.

``python -m tests.test_errors`` writes the table anew from what is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, ones

from ept_fast import EPTConfig, reconstruct_prompt, splice_prompt
from ept_fast.ops import dispatch
from ept_fast.ops.types import Parameters
from ept_fast.prompts.instance import InstanceConfig

DOCS = Path(__file__).parent.parent / "docs" / "errors.md"

T, M, N, R, K, H, D, B, S, V = 2, 3, 7, 2, 2, 4, 5, 4, 6, 11


RECONSTRUCT: dict[str, Any] = {
    "short_prompt": ones(M, D),
    "offset_a": ones(N, R),
    "offset_b": ones(R, D),
    "space_down": ones(K, D, H),
    "space_up": ones(K, H, D),
    "gate_weight": ones(D, K),
    "gate_bias": ones(K),
}
BIASES: dict[str, Any] = {"space_down_bias": ones(K, H), "space_up_bias": ones(K, D)}
SPLICE: dict[str, Any] = {
    "prompt": ones(M, D),
    "input_ids": torch.zeros(B, S, dtype=torch.int64),
    "weight": ones(V, D),
    "offset_a": ones(N, R),
    "offset_b": ones(R, D),
    "attention_mask": ones(B, S, dtype=torch.int64),
}
EMBEDS: dict[str, Any] = {"input_ids": None, "weight": None, "inputs_embeds": ones(B, S, D)}
BANK: dict[str, Any] = {
    "prompt": ones(T, M, D),
    "offset_a": ones(T, N, R),
    "offset_b": ones(T, R, D),
}


def _with(tensor: Tensor, value: int, *index: int) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


CALLS: dict[Callable[..., object], dict[str, Any]] = {
    reconstruct_prompt: RECONSTRUCT,
    splice_prompt: SPLICE,
    EPTConfig: {"hidden_size": D, "rank": 2},
    InstanceConfig: {"hidden_size": D, "table_rank": 2},
}


class Mistake(NamedTuple):
    """A call that is wrong in one way: the changed arguments, and the exception's message."""

    name: str
    call: Callable[..., object]
    error: type[Exception]
    message: str
    change: dict[str, Any]

    def make(self) -> None:
        self.call(**{**CALLS[self.call], **self.change})


RECON, SPLIT = reconstruct_prompt, splice_prompt
FLOATS = "float64 or float32 or bfloat16 or float16"
INTS = "int64 or int32"
MASKS = f"bool or {INTS} or int16 or int8 or uint8"
ACTIVATIONS = "gelu, relu, silu, identity"
BACKENDS = "triton, cuda, eager, reference"
PROMPT = "expected shape [m, d] or [T, m, d] with d >= 1"
LONG = "expected at most max_length 7 text positions (the rows of offset_a), got 8"
NAN, INF = float("nan"), float("inf")
IDS = torch.zeros(B, S, dtype=torch.int64)
ROWS: dict[str, Any] = {"prompt_rows": IDS}

# fmt: off
MISTAKES = tuple(Mistake(*row) for row in (
    # types
    ("no tensor", RECON, TypeError, "short_prompt: expected a tensor, got list",
     {"short_prompt": [[1.0]]}),
    ("integer parameter", RECON, TypeError,
     f"short_prompt: expected dtype {FLOATS}, got torch.int64",
     {"short_prompt": ones(M, D).long()}),
    *((f"integer {name}", RECON, TypeError, f"{name}: expected dtype {FLOATS}, got torch.int32",
       {name: RECONSTRUCT[name].int()}) for name in list(RECONSTRUCT)[1:]),
    *((f"integer {name}", RECON, TypeError, f"{name}: expected dtype {FLOATS}, got torch.int32",
       {**BIASES, name: tensor.int()}) for name, tensor in BIASES.items()),
    ("integer prompt", SPLIT, TypeError, f"prompt: expected dtype {FLOATS}, got torch.int64",
     {"prompt": ones(M, D).long()}),
    ("floating token ids", SPLIT, TypeError,
     f"input_ids: expected dtype {INTS}, got torch.float32", {"input_ids": ones(B, S)}),
    ("integer table", SPLIT, TypeError, f"weight: expected dtype {FLOATS}, got torch.int8",
     {"weight": ones(V, D).to(torch.int8)}),
    ("integer embeddings", SPLIT, TypeError,
     f"inputs_embeds: expected dtype {FLOATS}, got torch.int64",
     {**EMBEDS, "inputs_embeds": ones(B, S, D).long()}),
    ("floating mask", SPLIT, TypeError,
     f"attention_mask: expected dtype {MASKS}, got torch.float32", {"attention_mask": ones(B, S)}),
    ("floating task ids", SPLIT, TypeError,
     f"task_ids: expected dtype {INTS}, got torch.float32", {**BANK, "task_ids": ones(B)}),
    ("floating prompt_rows", SPLIT, TypeError,
     f"prompt_rows: expected dtype {INTS}, got torch.float32", {"prompt_rows": ones(B, 2)}),
    ("scaling of another type", RECON, TypeError, "scaling: expected a real number, got str '1'",
     {"scaling": "1"}),
    ("fusion of another type", RECON, TypeError, "fusion: expected a bool, got int 1",
     {"fusion": 1}),
    # rank and shape
    ("one axis", RECON, ValueError, f"short_prompt: {PROMPT}, got [5]", {"short_prompt": ones(D)}),
    ("four axes", RECON, ValueError, f"short_prompt: {PROMPT}, got [1, 2, 3, 5]",
     {"short_prompt": ones(1, 2, M, D)}),
    ("a width of 0", RECON, ValueError, f"short_prompt: {PROMPT}, got [3, 0]",
     {"short_prompt": ones(M, 0)}),
    ("offset_a with a task axis beside a single prompt", RECON, ValueError,
     "offset_a: expected shape [n, r] to match short_prompt [3, 5], got [2, 7, 2]",
     {"offset_a": ones(T, N, R)}),
    ("another rank", RECON, ValueError,
     "offset_b: expected shape [2, 5] to match offset_a [7, 2] and hidden_size 5, got [3, 5]",
     {"offset_b": ones(3, D)}),
    ("another width of offset_b", RECON, ValueError,
     "offset_b: expected shape [2, 5] to match offset_a [7, 2] and hidden_size 5, got [2, 6]",
     {"offset_b": ones(R, 6)}),
    ("another width of space_down", RECON, ValueError,
     "space_down: expected shape [K, 5, h] to match short_prompt [3, 5], got [2, 6, 4]",
     {"space_down": ones(K, 6, H)}),
    ("space_up the other way round", RECON, ValueError,
     "space_up: expected shape [2, 4, 5] to match space_down [2, 5, 4], got [2, 5, 4]",
     {"space_up": ones(K, D, H)}),
    ("gate for another number of spaces", RECON, ValueError,
     "gate_weight: expected shape [5, 2] to match space_down [2, 5, 4], got [5, 3]",
     {"gate_weight": ones(D, 3)}),
    ("gate_bias of another size", RECON, ValueError,
     "gate_bias: expected shape [2] to match space_down [2, 5, 4], got [3]",
     {"gate_bias": ones(3)}),
    ("space_down_bias of another width", RECON, ValueError,
     "space_down_bias: expected shape [2, 4] to match space_down [2, 5, 4], got [2, 5]",
     {**BIASES, "space_down_bias": ones(K, D)}),
    ("space_up_bias without its spaces", RECON, ValueError,
     "space_up_bias: expected shape [2, 5] to match space_down [2, 5, 4], got [5]",
     {**BIASES, "space_up_bias": ones(D)}),
    ("another number of tasks", RECON, ValueError,
     "offset_a: expected shape [2, n, r] to match short_prompt [2, 3, 5], got [3, 7, 2]",
     {"short_prompt": ones(T, M, D), "offset_a": ones(3, N, R)}),
    ("prompt with one axis", SPLIT, ValueError, f"prompt: {PROMPT}, got [5]",
     {"prompt": ones(D)}),
    ("prompt of width 0", SPLIT, ValueError, f"prompt: {PROMPT}, got [3, 0]",
     {"prompt": ones(M, 0)}),
    ("token ids with one axis", SPLIT, ValueError, "input_ids: expected shape [B, S], got [6]",
     {"input_ids": IDS[0]}),
    ("table of another width", SPLIT, ValueError,
     "weight: expected shape [V, 5] to match prompt [3, 5], got [11, 6]", {"weight": ones(V, 6)}),
    ("embeddings of another width", SPLIT, ValueError,
     "inputs_embeds: expected shape [B, S, 5] to match prompt [3, 5], got [4, 6, 6]",
     {**EMBEDS, "inputs_embeds": ones(B, S, 6)}),
    ("mask of another shape", SPLIT, ValueError,
     "attention_mask: expected shape [4, 6] to match input_ids [4, 6], got [4, 9]",
     {"attention_mask": ones(B, M + S, dtype=torch.int64)}),
    ("text longer than max_length", SPLIT, ValueError, f"input_ids: {LONG}",
     {"input_ids": torch.zeros(B, 8, dtype=torch.int64), "attention_mask": None}),
    ("embeddings longer than max_length", SPLIT, ValueError, f"inputs_embeds: {LONG}",
     {**EMBEDS, "inputs_embeds": ones(B, 8, D), "attention_mask": None}),
    ("task ids for another batch", SPLIT, ValueError,
     "task_ids: expected shape [4] to match input_ids [4, 6], got [5]",
     {**BANK, "task_ids": torch.zeros(5, dtype=torch.int64)}),
    ("a bank beside prompt_rows", SPLIT, ValueError,
     "prompt: expected shape [R, d] beside prompt_rows, got [2, 3, 5]", {**BANK, **ROWS}),
    ("task ids beside prompt_rows", SPLIT, ValueError,
     "task_ids: expected None beside a single prompt [3, 5], got a tensor",
     {**ROWS, "task_ids": IDS[:, 0]}),
    ("prompt_rows for another batch", SPLIT, ValueError,
     "prompt_rows: expected shape [4, m] to match input_ids [4, 6], got [3, 6]",
     {"prompt_rows": IDS[:3]}),
    ("prompt_rows for other embeddings", SPLIT, ValueError,
     "prompt_rows: expected shape [4, m] to match inputs_embeds [4, 6, 5], got [4]",
     {**EMBEDS, "prompt_rows": IDS[:, 0]}),
    # devices
    ("prompt_rows on another device", SPLIT, ValueError,
     "prompt_rows: expected device cpu, got meta", {"prompt_rows": IDS.to("meta")}),
    *((f"{name} on another device", call, ValueError, f"{name}: expected device cpu, got meta",
       {name: CALLS[call][name].to("meta")})
      for call in (RECON, SPLIT) for name in list(CALLS[call])[1:]),
    *((f"{name} on another device", RECON, ValueError, f"{name}: expected device cpu, got meta",
       {**BIASES, name: tensor.to("meta")}) for name, tensor in BIASES.items()),
    # partners
    ("A without B", RECON, ValueError, "offset_b: expected a tensor beside offset_a, got None",
     {"offset_b": None}),
    ("B without A", RECON, ValueError, "offset_a: expected a tensor beside offset_b, got None",
     {"offset_a": None}),
    ("spaces without gate", RECON, ValueError,
     "gate_weight, gate_bias: expected a tensor beside space_down, space_up, got None",
     {"gate_weight": None, "gate_bias": None}),
    ("gate without spaces", RECON, ValueError,
     "space_down, space_up: expected a tensor beside gate_weight, gate_bias, got None",
     {"space_down": None, "space_up": None}),
    ("one bias without the other", RECON, ValueError,
     "space_up_bias: expected a tensor beside space_down_bias, got None",
     {"space_down_bias": BIASES["space_down_bias"]}),
    ("biases without spaces", RECON, ValueError,
     "space_down: expected a tensor beside space_down_bias, space_up_bias, got None",
     {**dict.fromkeys(list(RECONSTRUCT)[3:]), **BIASES}),
    ("half a gate of one space", RECON, ValueError,
     "gate_bias: expected a tensor beside space_down, space_up, gate_weight, got None",
     {"space_down": ones(1, D, H), "space_up": ones(1, H, D), "gate_weight": ones(D, 1),
      "gate_bias": None}),
    ("A without B in the splice", SPLIT, ValueError,
     "offset_b: expected a tensor beside offset_a, got None", {"offset_b": None}),
    ("neither ids nor embeddings", SPLIT, ValueError,
     "input_ids, inputs_embeds: expected exactly one of them, got neither",
     {"input_ids": None, "weight": None}),
    ("both ids and embeddings", SPLIT, ValueError,
     "input_ids, inputs_embeds: expected exactly one of them, got both",
     {"inputs_embeds": ones(B, S, D)}),
    ("ids without a table", SPLIT, ValueError,
     "weight: expected the embedding table beside input_ids, got None", {"weight": None}),
    ("embeddings with a table", SPLIT, ValueError,
     "weight: expected None beside inputs_embeds, got a tensor", {**EMBEDS, "weight": ones(V, D)}),
    ("a bank without task ids", SPLIT, ValueError,
     "task_ids: expected [4] integers to match prompt [2, 3, 5], got None", BANK),
    ("task ids without a bank", SPLIT, ValueError,
     "task_ids: expected None beside a single prompt [3, 5], got a tensor",
     {"task_ids": IDS[:, 0]}),
    # values
    ("token id beyond the vocabulary", SPLIT, IndexError,
     "input_ids: expected ids from 0 to 10, got 11 at row 2, column 3",
     {"input_ids": _with(IDS, V, 2, 3)}),
    ("token id beside an empty table", SPLIT, IndexError,
     "input_ids: expected no ids, as there are 0 rows to choose from, got 0 at row 0, column 0",
     {"weight": ones(0, D)}),
    ("negative token id", SPLIT, IndexError,
     "input_ids: expected ids from 0 to 10, got -100 at row 0, column 5",
     {"input_ids": _with(IDS, -100, 0, 5)}),
    ("mask with another value", SPLIT, ValueError,
     "attention_mask: expected only 0 and 1, got 2 at row 1, column 4",
     {"attention_mask": _with(IDS, 2, 1, 4)}),
    ("additive mask", SPLIT, ValueError,
     "attention_mask: expected only 0 and 1, got -10000 at row 3, column 0",
     {"attention_mask": _with(IDS, -10000, 3, 0)}),
    ("task id beyond the bank", SPLIT, IndexError,
     "task_ids: expected ids from 0 to 1, got 2 at row 3",
     {**BANK, "task_ids": torch.tensor([0, 1, 1, 2])}),
    ("negative task id", SPLIT, IndexError, "task_ids: expected ids from 0 to 1, got -1 at row 0",
     {**BANK, "task_ids": torch.tensor([-1, 1, 1, 1])}),
    ("row beyond the prompt's", SPLIT, IndexError,
     "prompt_rows: expected -1 or ids from 0 to 2, got 3 at row 2, token 1",
     {"prompt_rows": _with(IDS, M, 2, 1)}),
    ("row before -1", SPLIT, IndexError,
     "prompt_rows: expected -1 or ids from 0 to 2, got -2 at row 0, token 5",
     {"prompt_rows": _with(IDS, -2, 0, 5)}),
    *((f"temperature {name}", RECON, ValueError,
       f"temperature: expected a finite number > 0, got {value}", {"temperature": value})
      for name, value in (("nan", NAN), ("infinite", INF), ("zero", 0.0))),
    ("scaling nan", RECON, ValueError, "scaling: expected a finite number, got nan",
     {"scaling": NAN}),
    ("scaling infinite", SPLIT, ValueError, "scaling: expected a finite number, got inf",
     {"scaling": INF}),
    # names
    ("unknown activation", RECON, ValueError,
     f"activation: expected one of {ACTIVATIONS}, got 'tanh'", {"activation": "tanh"}),
    ("unknown gate", RECON, ValueError, "gate: expected one of token, prompt, got 'row'",
     {"gate": "row"}),
    *((name, call, ValueError, f"backend: expected one of {BACKENDS}, got 'tpu'",
       {"backend": "tpu"})
      for name, call in (("unknown backend", RECON), ("unknown backend of the splice", SPLIT))),
    # config
    ("config: unknown tokens for the offset", EPTConfig, ValueError,
     "offset_tokens: expected one of all, given, got 'new'", {"offset_tokens": "new"}),
    ("config: no width", EPTConfig, ValueError, "hidden_size: expected an integer >= 1, got 0",
     {"hidden_size": 0}),
    ("config: negative rank", EPTConfig, ValueError, "rank: expected an integer >= 0, got -1",
     {"rank": -1}),
    ("config: width that no tensor has", EPTConfig, ValueError,
     "hidden_size: expected an integer < 2^63, got 9223372036854775808", {"hidden_size": 2**63}),
    ("config: rank beyond the width", EPTConfig, ValueError,
     "rank: expected at most min(max_length 256, hidden_size 5) = 5, got 6", {"rank": 6}),
    ("config: length of another type", EPTConfig, TypeError,
     "max_length: expected an integer, got float 8.0", {"max_length": 8.0}),
    ("config: unknown activation", EPTConfig, ValueError,
     f"activation: expected one of {ACTIVATIONS}, got 'swish'", {"activation": "swish"}),
    ("config: a table of no rows", InstanceConfig, ValueError,
     "table_size: expected an integer >= 1, got 0", {"table_size": 0}),
    ("config: a table's rank beyond the width", InstanceConfig, ValueError,
     "table_rank: expected at most hidden_size 5, got 6", {"table_rank": 6}),
    ("config: unknown generator", InstanceConfig, ValueError,
     "generator: expected one of none, cnn, mlp, got 'rnn'", {"generator": "rnn"}),
))
# fmt: on


def _table() -> str:
    lines = ["| mistake | exception | message |", "|---|---|---|"]
    for mistake in MISTAKES:
        try:
            mistake.make()
        except Exception as error:  # the table shows whatever comes
            text = str(error).replace("|", "\\|")
            lines.append(f"| {mistake.name} | {type(error).__name__} | `{text}` |")
        else:
            lines.append(f"| {mistake.name} | none | |")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_message(mistake: Mistake) -> None:
    with pytest.raises(mistake.error) as caught:
        mistake.make()
    assert type(caught.value) is mistake.error
    assert str(caught.value) == mistake.message


def test_the_right_arguments_pass() -> None:
    """Without the one change, each base call is valid: it is the change that is refused."""
    reconstruct_prompt(**RECONSTRUCT)
    reconstruct_prompt(**RECONSTRUCT, **BIASES)
    one = {name: tensor[:1] for name, tensor in BIASES.items()}
    single = {"space_down": ones(1, D, H), "space_up": ones(1, H, D)}
    reconstruct_prompt(ones(M, D), **single)
    reconstruct_prompt(ones(M, D), **single, **one)
    splice_prompt(**SPLICE)
    splice_prompt(**{**SPLICE, **EMBEDS})
    splice_prompt(**SPLICE, **ROWS)
    splice_prompt(**{**SPLICE, **BANK}, task_ids=torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_every_backend_checks_values(backend: str) -> None:
    ids = _with(SPLICE["input_ids"], V, 1, 1)
    with pytest.raises(IndexError, match="row 1, column 1"):
        splice_prompt(**{**SPLICE, "input_ids": ids}, backend=backend)


def test_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Parameters(ones(M, D))
    monkeypatch.setenv("EPT_FAST_BACKEND", "reference")
    assert dispatch.select(None, given) == "reference"
    assert dispatch.select("eager", given) == "eager"
    monkeypatch.setenv("EPT_FAST_BACKEND", "warp")
    with pytest.raises(ValueError, match=f"EPT_FAST_BACKEND: expected one of {BACKENDS}"):
        reconstruct_prompt(**RECONSTRUCT)


def test_the_documents_table_is_what_is_raised() -> None:
    assert _table() in DOCS.read_text(encoding="utf-8")


if __name__ == "__main__":
    page = DOCS.read_text(encoding="utf-8")
    start = page.index("| mistake |")
    end = page.index("\n\n", start) + 1  # the first table; another one is written by hand
    DOCS.write_text(page[:start] + _table() + page[end:], encoding="utf-8")
