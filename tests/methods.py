"""The table of prompt methods for the tests: a row for each, with its definition written out.

The definitions are slow and literal: NumPy in float64, loops over tokens, every intermediate of its
full size. They share no code with the package.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import tests.toy_method  # noqa: F401  # registers the toy
from ept_fast import reference
from ept_fast.config import PromptConfig
from ept_fast.prompts.base import Prompt, config_class, prompt_class

Array = np.ndarray[Any, np.dtype[np.float64]]
Arrays = dict[str, Array]


class Given(NamedTuple):
    """A text without padding: its token ids ``[S]`` and their embeddings ``[S, d]``."""

    ids: np.ndarray[Any, np.dtype[np.int64]]
    embeds: Array


# P′ [m, d] of a prompt's tensors and constants, its config, and the text for a method that reads
# it.
Definition = Callable[[Arrays, Any, Given], Array]


@dataclass(frozen=True)
class Row:
    """A method with choices of its own, and what it shall compute.

    Attributes:
        kind: its ``prompt_type``.
        choices: fields of its config.
        definition: see :data:`Definition`.
        method: its name on the command line, if that is another.
        offset: choices that give it an offset to the text, if it can have one.
        reads_text: whether each row has a prompt of its own, made from its text.
        same_bits: whether it computes the same bits with and without gradients; oneDNN's LSTM does
            not.
        of_losses: names of tensors that only the method's terms of the loss have.
    """

    kind: str
    definition: Definition
    choices: dict[str, Any] = field(default_factory=dict)
    method: str | None = None
    offset: dict[str, Any] | None = None
    reads_text: bool = False
    same_bits: bool = True
    of_losses: frozenset[str] = frozenset()

    def config(self, hidden_size: int, **choices: Any) -> PromptConfig:
        """A small config."""
        sizes = {"num_virtual_tokens": 3, **self.choices, **choices}
        return config_class(self.kind)(hidden_size, **sizes)

    def check(self, got: Tensor, wanted: Tensor) -> None:
        """That a prompt with gradients and one without them gave the same."""
        if self.same_bits:
            assert torch.equal(got, wanted)
        else:
            torch.testing.assert_close(got, wanted)


def filled(prompt: Any, seed: int = 3) -> Any:
    """Every tensor with something random added, so that every part has a say."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return prompt


def make(config: PromptConfig, num_tasks: int | None = None, **options: Any) -> Prompt:
    """A prompt with every tensor filled."""
    draw = torch.Generator().manual_seed(5)
    words = torch.randn(20, config.hidden_size, generator=draw, dtype=options.get("dtype"))
    layer = nn.Embedding.from_pretrained(words)
    prompt = prompt_class(config)(config, layer, num_tasks=num_tasks, generator=draw, **options)
    return filled(prompt)  # type: ignore[no-any-return]


def arrays_of(prompt: Prompt, task: int | None = None) -> Arrays:
    """A prompt's tensors and constants, those of one task of a bank."""
    constants = dict(prompt.named_buffers())
    tensors = {**dict(prompt.named_parameters()), **constants}
    if task is not None:
        kept = {*prompt.shared, *constants}
        tensors = {n: t if n in kept else t[task] for n, t in tensors.items()}
    return {name: t.detach().double().numpy() for name, t in tensors.items()}


def _ept(t: Arrays, c: Any, text: Given) -> Array:
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in t.items()}
    kept = ("scaling", "activation", "gate", "temperature", "fusion")
    found: Tensor = reference.reconstruct_prompt(**tensors, **{n: getattr(c, n) for n in kept})
    return found.numpy()


def _toy(t: Arrays, c: Any, text: Given) -> Array:
    return t["rows"] * (1 + np.tanh(c.slope * t["size"]))


def _windows(rows: Array, count: int) -> Array:
    size = len(rows) // count
    return np.stack([rows[i * size : (i + 1) * size].mean(0) for i in range(count)])


def _lamp(t: Arrays, c: Any, text: Given) -> Array:
    rows = t["left"] @ np.diag(t["singular_values"])
    full = rows @ t["right"]  # [l, d]
    mixed = full.copy()
    for i in range(len(full)):
        for j in range(len(full)):
            weight = float(t["product_scale"][0]) / len(full) * float(rows[i] @ rows[j])
            mixed[i] += weight * full[j]
    return _windows(mixed, c.num_virtual_tokens)


def _lamp_sketch(t: Arrays, c: Any, text: Given) -> Array:
    rows = t["left"] @ np.diag(t["singular_values"])
    places = [[int(np.flatnonzero(row)[0]) for row in each] for each in t["hashes"]]
    signs = [[float(row[row != 0][0]) for row in each] for each in t["hashes"]]
    full = rows @ t["right"]
    for i, row in enumerate(rows):
        sketch = np.zeros(c.sketch_size)
        for a in range(c.prompt_rank):
            for b in range(c.prompt_rank):
                place = (places[0][a] + places[1][b]) % c.sketch_size
                sketch[place] += signs[0][a] * signs[1][b] * row[a] * row[b]
        full[i] += sketch @ t["sketch_right"]
    return _windows(full, c.num_virtual_tokens)


def _residual(t: Arrays, c: Any, text: Given) -> Array:
    prompt = t["short_prompt"]
    out = prompt.copy()
    for i, row in enumerate(prompt):
        d1, b1, d2, b2 = (
            t[name] if c.shared else t[name][i]
            for name in ("down_weight", "down_bias", "up_weight", "up_bias")
        )
        change = np.maximum(row @ d1 + b1, 0) @ d2 + b2
        if c.layer_norm:
            change = (change - change.mean()) / np.sqrt(change.var() + 1e-5)
            change = change * t["norm_weight"] + t["norm_bias"]
        out[i] += change
    return out


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _pre(t: Arrays, c: Any, text: Given) -> Array:
    prompt = t["short_prompt"]
    half = prompt.shape[1] // 2
    out = prompt.copy()
    for direction, order in enumerate((range(len(prompt)), reversed(range(len(prompt))))):
        weight, hidden_weight, b, hidden_b = (
            t[f"lstm_{name}"][direction]
            for name in ("input_weight", "hidden_weight", "input_bias", "hidden_bias")
        )
        hidden, cell = np.zeros(half), np.zeros(half)
        for i in order:
            z = weight @ prompt[i] + b + hidden_weight @ hidden + hidden_b
            entered, forgotten, new, shown = z.reshape(4, half)
            cell = _sigmoid(forgotten) * cell + _sigmoid(entered) * np.tanh(new)
            hidden = _sigmoid(shown) * np.tanh(cell)
            out[i, direction * half : (direction + 1) * half] += hidden
    return out


def _module(t: Arrays, k: int) -> Array:
    if "module_prompts" in t:
        found: Array = t["module_prompts"][k]
        return found
    pairs = zip(t["module_weights"][k], t["module_basis"], strict=True)
    return np.stack([weight * basis for weight, basis in pairs]).sum(0)


def _mp2(t: Arrays, c: Any, text: Given) -> Array:
    gates = _sigmoid(t["gate_logits"])
    gates = gates / (gates.sum() + 1e-12)
    return np.stack([gates[k] * _module(t, k) for k in range(c.num_modules)]).sum(0)


def _attempt(t: Arrays, c: Any, text: Given) -> Array:
    x = text.embeds.max(0)
    hidden = x @ t["query_down"]
    query = (hidden * _sigmoid(hidden)) @ t["query_up"]
    query = (query - query.mean()) / np.sqrt(query.var() + 1e-5)
    query = query * t["norm_weight"] + t["norm_bias"]
    prompts = [_module(t, k) for k in range(c.num_modules)]
    if c.attend_to_target:
        prompts.append(t["target_prompt"])
    logits = np.array([query @ p.max(0) for p in prompts])
    weights = np.exp(logits / (c.temperature * np.sqrt(c.hidden_size)))
    weights = weights / weights.sum()
    return (
        np.stack([w * p for w, p in zip(weights, prompts, strict=True)]).sum(0)
        + (t["target_prompt"])
    )


def _ulpt(t: Arrays, c: Any, text: Given) -> Array:
    return np.diag([1.0] * len(t["codes"])) @ (t["codes"] @ t["basis"]) * t["scale"] + t["shift"]


def _accept(t: Arrays, c: Any, text: Given) -> Array:
    width = c.hidden_size // c.num_blocks
    out = np.zeros((c.num_virtual_tokens, c.hidden_size))
    for i in range(c.num_virtual_tokens):
        for k in range(c.num_blocks):
            for code in range(c.codebook_size):
                weight = t["prompt_weights"][k, i, code]
                out[i, k * width : (k + 1) * width] += weight * t["prompt_codes"][k, code]
    return out


def _gelu(x: Array) -> Array:
    erf = np.vectorize(math.erf)
    found: Array = x * (1 + erf(x / np.sqrt(2))) / 2
    return found


def _layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight + bias


def _infoprompt(t: Arrays, c: Any, text: Given) -> Array:
    pooled = text.embeds.mean(0) if c.pooling == "mean" else text.embeds[0]
    hidden = _gelu(pooled @ t["down_weight"] + t["down_bias"])
    out = t["up_bias"].copy()
    for i in range(len(hidden)):
        out += hidden[i] * t["up_weight"][i]
    return out


def _stable(t: Arrays, c: Any, text: Given) -> Array:
    norms = list(zip(t["norm_weights"], t["norm_biases"], strict=True))
    read = np.stack([_layer_norm(row, *norms[1]) for row in text.embeds])
    out = np.empty_like(t["short_prompt"])
    for i, row in enumerate(t["short_prompt"]):
        x = _layer_norm(row, *norms[0])
        found = []
        for head in range(c.num_heads):
            part = slice(head * c.head_dim, (head + 1) * c.head_dim)
            query = x @ t["query_weight"][:, part]
            scores = read @ t["key_weight"][:, part] @ query / np.sqrt(c.head_dim)
            weights = np.exp(scores) / np.exp(scores).sum()
            found.append(weights @ (read @ t["value_weight"][:, part]))
        z = _layer_norm(x + np.concatenate(found) @ t["output_weight"], *norms[2])
        z = z + _gelu(z @ t["down_weight"] + t["down_bias"]) @ t["up_weight"] + t["up_bias"]
        out[i] = _layer_norm(z, *norms[3])
    return out


def _read(t: Arrays, c: Any, text: Given) -> Array:
    table = t["table"] if "table" in t else t["table_codes"] @ t["table_basis"]
    rows = np.zeros((c.num_virtual_tokens, c.hidden_size))
    for j, token in enumerate(text.ids[: c.num_virtual_tokens]):
        rows[j] = table[token % c.table_size]
    return rows


def _expanded(made: Array, t: Arrays) -> Array:
    prompt = t["up_bias"].copy()
    for value, each in zip(made, t["up_weight"], strict=True):
        prompt += value * each
    return prompt


def _instance_cnn(t: Arrays, c: Any, text: Given) -> Array:
    rows = _read(t, c, text)[: len(text.ids)]
    made, first = [], 0
    for bias, height in zip(t["filter_bias"], (3, 4, 5), strict=True):
        weight = t["filter_weight"][first : first + height]
        first += height
        short = np.zeros((max(0, height - len(rows)), c.hidden_size))
        seen = np.concatenate([rows, short])
        starts = range(len(seen) - height + 1)
        values = [float((seen[s : s + height] * weight).sum() + bias) for s in starts]
        made.append(max(max(values), 0.0))
    return _expanded(np.array(made), t)


def _instance_mlp(t: Arrays, c: Any, text: Given) -> Array:
    rows = _read(t, c, text)[: len(text.ids)]
    mean = rows.sum(0) / max(1, len(rows))
    return _expanded(np.maximum(mean @ t["down_weight"] + t["down_bias"], 0), t)


ROWS: dict[str, Row] = {
    "ept": Row("ept", _ept, {"rank": 0}, offset={"rank": 2, "max_length": 9}),
    "lamp": Row("lamp", _lamp, {"prompt_rank": 4, "window": 2}),
    "lamp, sketch": Row(
        "lamp", _lamp_sketch, {"prompt_rank": 4, "window": 2, "product": "sketch", "sketch_size": 5}
    ),
    "residual": Row("residual", _residual, {"bottleneck": 5}),
    "residual, an MLP a token": Row("residual", _residual, {"bottleneck": 5, "shared": False}),
    "residual, no LayerNorm": Row("residual", _residual, {"bottleneck": 5, "layer_norm": False}),
    "pre": Row("residual", _pre, {"encoder": "lstm"}, method="pre", same_bits=False),
    "mp2": Row("mixture", _mp2, {"num_modules": 3}, method="mp2"),
    "mp2, factored": Row("mixture", _mp2, {"num_modules": 3, "num_factors": 2}),
    "attempt": Row(
        "mixture",
        _attempt,
        {"num_modules": 2, "gates": "attention", "query_dim": 4, "temperature": 0.7},
        method="attempt",
        reads_text=True,
    ),
    "attempt, no weight for the target": Row(
        "mixture",
        _attempt,
        {
            "num_modules": 2,
            "num_factors": 2,
            "gates": "attention",
            "query_dim": 4,
            "attend_to_target": False,
        },
        reads_text=True,
    ),
    "ulpt": Row("ulpt", _ulpt, {"prompt_rank": 2}),
    "accept": Row(
        "accept",
        _accept,
        {"num_blocks": 2, "codebook_size": 3, "offset_size": 0},
        offset={"offset_size": 2, "max_length": 9},
    ),
    "infoprompt": Row(
        "infoprompt",
        _infoprompt,
        {"bottleneck": 3, "latent_size": 2},
        reads_text=True,
        of_losses=frozenset({"mean_weight", "mean_bias", "std_weight", "std_bias", "critic"}),
    ),
    "infoprompt, the first token": Row(
        "infoprompt",
        _infoprompt,
        {"bottleneck": 2, "pooling": "first", "first_pass": False, "representation_weight": 0},
        reads_text=True,
    ),
    "stable": Row(
        "stable", _stable, {"num_heads": 2, "head_dim": 3, "mlp_dim": 4}, reads_text=True
    ),
    "instance": Row("instance", _read, {"table_size": 7, "table_rank": 2}, reads_text=True),
    "instance, dense": Row("instance", _read, {"table_size": 7, "table_rank": 0}, reads_text=True),
    "instance, cnn": Row(
        "instance",
        _instance_cnn,
        {"table_size": 7, "table_rank": 2, "generator": "cnn"},
        reads_text=True,
    ),
    "instance, mlp": Row(
        "instance",
        _instance_mlp,
        {"table_size": 7, "table_rank": 2, "generator": "mlp", "bottleneck": 3},
        reads_text=True,
    ),
    "toy": Row("toy", _toy),
}


def with_offset(row: Row) -> Row:
    """The same method with its offset to the text."""
    return dataclasses.replace(row, choices={**row.choices, **(row.offset or {})})
