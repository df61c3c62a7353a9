"""EPTConfig: what it accepts and refuses, its JSON form, and what it counts."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from ept_fast import EPTConfig, FusedEPTPrompt
from ept_fast.config import GATES, OFFSET_TOKENS
from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.training.config import TrainConfig

NAMES = ", ".join(ACTIVATIONS)

FIELDS = tuple(field.name for field in dataclasses.fields(EPTConfig))
BEYOND_FLOAT = 10**400
BEYOND_TEXT = 10**5000  # of which Python writes no digits


@st.composite
def configs(draw: st.DrawFn) -> EPTConfig:
    """Small configs, every field at random."""
    hidden_size, max_length = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    finite = st.floats(allow_nan=False, allow_infinity=False)
    return EPTConfig(
        hidden_size,
        num_virtual_tokens=draw(st.integers(1, 6)),
        max_length=max_length,
        rank=draw(st.integers(0, min(hidden_size, max_length))),
        num_spaces=draw(st.integers(0, 3)),
        space_dim=draw(st.integers(1, 4)),
        alpha=draw(finite | st.integers(-100, 100)),
        activation=draw(st.sampled_from(tuple(ACTIVATIONS))),
        gate=draw(st.sampled_from(GATES)),
        temperature=draw(st.floats(1e-300, 1e300)),
        fusion=draw(st.booleans()),
        offset_tokens=draw(st.sampled_from(OFFSET_TOKENS)),
    )


REFUSED = [
    ("hidden_size", "8", TypeError, "expected an integer, got str '8'"),
    ("hidden_size", True, TypeError, "expected an integer, got bool True"),
    ("hidden_size", 0, ValueError, "expected an integer >= 1, got 0"),
    ("hidden_size", 2**63, ValueError, "expected an integer < 2^63, got 9223372036854775808"),
    ("num_virtual_tokens", None, TypeError, "expected an integer, got NoneType None"),
    ("num_virtual_tokens", 0, ValueError, "expected an integer >= 1, got 0"),
    ("max_length", 1.5, TypeError, "expected an integer, got float 1.5"),
    ("max_length", 0, ValueError, "expected an integer >= 1, got 0"),
    ("rank", "2", TypeError, "expected an integer, got str '2'"),
    ("rank", -1, ValueError, "expected an integer >= 0, got -1"),
    (
        "rank",
        7,
        ValueError,
        "expected at most min(max_length 6, hidden_size 8) = 6, got 7",
    ),
    ("num_spaces", 1.0, TypeError, "expected an integer, got float 1.0"),
    ("num_spaces", -2, ValueError, "expected an integer >= 0, got -2"),
    ("space_dim", [4], TypeError, "expected an integer, got list [4]"),
    ("space_dim", 0, ValueError, "expected an integer >= 1, got 0"),
    ("alpha", "8", TypeError, "expected a real number, got str '8'"),
    ("alpha", True, TypeError, "expected a real number, got bool True"),
    ("alpha", math.nan, ValueError, "expected a finite number, got nan"),
    ("alpha", -math.inf, ValueError, "expected a finite number, got -inf"),
    ("alpha", BEYOND_FLOAT, ValueError, "expected a finite number, got an integer of 1329 bits"),
    ("activation", "tanh", ValueError, f"expected one of {NAMES}, got 'tanh'"),
    ("activation", "GELU", ValueError, f"expected one of {NAMES}, got 'GELU'"),
    ("activation", None, ValueError, f"expected one of {NAMES}, got None"),
    ("gate", "row", ValueError, "expected one of token, prompt, got 'row'"),
    ("temperature", None, TypeError, "expected a real number, got NoneType None"),
    ("temperature", 0.0, ValueError, "expected a finite number > 0, got 0.0"),
    ("temperature", -1, ValueError, "expected a finite number > 0, got -1"),
    ("temperature", math.inf, ValueError, "expected a finite number > 0, got inf"),
    ("temperature", math.nan, ValueError, "expected a finite number > 0, got nan"),
    ("fusion", 1, TypeError, "expected a bool, got int 1"),
    ("fusion", "true", TypeError, "expected a bool, got str 'true'"),
    ("offset_tokens", "new", ValueError, "expected one of all, given, got 'new'"),
    ("offset_tokens", None, ValueError, "expected one of all, given, got None"),
]


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    REFUSED,
    ids=[f"{field}={value!r:.20}" for field, value, _, _ in REFUSED],
)
def test_refused(field: str, value: Any, error: type[Exception], message: str) -> None:
    values = {"hidden_size": 8, "max_length": 6, "rank": 2, field: value}
    for build in (lambda: EPTConfig(**values), lambda: EPTConfig.from_dict(values)):
        with pytest.raises(error) as caught:
            build()
        assert str(caught.value) == f"{field}: {message}"


@pytest.mark.parametrize("field", FIELDS)
def test_integers_that_are_not_written_out(field: str) -> None:
    for value in (BEYOND_TEXT, -BEYOND_TEXT, [BEYOND_TEXT]):
        with pytest.raises((TypeError, ValueError), match=rf"^{field}: .*an integer of 16610 bits"):
            EPTConfig(**{"hidden_size": 8, field: value})


def test_every_field_is_refused_something() -> None:
    assert {field for field, *_ in REFUSED} == set(FIELDS)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 1, "num_virtual_tokens": 1, "max_length": 1, "rank": 1},
        {"hidden_size": 8, "max_length": 6, "rank": 6},
        {"hidden_size": 6, "max_length": 8, "rank": 6},
        {"hidden_size": 8, "rank": 0, "num_spaces": 0},
        {"hidden_size": 8, "rank": 0, "alpha": -3, "temperature": 5e-324, "num_spaces": 1},
    ],
    ids=str,
)
def test_edges_are_accepted(values: dict[str, Any]) -> None:
    config = EPTConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


@given(configs())
def test_round_trips(config: EPTConfig) -> None:
    values = config.to_dict()
    assert tuple(values) == FIELDS
    assert EPTConfig.from_dict(values) == config
    assert EPTConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json()) == values


def test_from_dict_fills_in_defaults() -> None:
    assert EPTConfig.from_dict({"hidden_size": 32, "gate": "prompt"}) == EPTConfig(
        32, gate="prompt"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "config: expected the field hidden_size, got none"),
        ({"rank": 1}, "config: expected the field hidden_size, got none"),
        (
            {"hidden_size": 8, "heads": 2, "bias": 0},
            f"config: expected the fields {sorted(FIELDS)}, got also ['bias', 'heads']",
        ),
    ],
)
def test_from_dict_names_the_fields(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        EPTConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ValueError, "config: expected a JSON object, got text that is not JSON"),
        ('{"hidden_size": 8', ValueError, "config: expected a JSON object, got text that is not"),
        ("1" * 5000, ValueError, "config: expected a JSON object, got text that is not JSON"),
        ("[" * 100_000, ValueError, "config: expected a JSON object, got text that is not JSON"),
        ("[8]", ValueError, "config: expected a JSON object, got list"),
        ("null", ValueError, "config: expected a JSON object, got NoneType"),
        (
            '{"hidden_size": 8, "alpha": NaN}',
            ValueError,
            "alpha: expected a finite number, got nan",
        ),
        ('{"hidden_size": 8, "alpha": 1e999}', ValueError, "alpha: expected a finite number"),
        ('{"hidden_size": 8, "fusion": 1}', TypeError, "fusion: expected a bool, got int 1"),
        ('{"hidden_size": "8"}', TypeError, "hidden_size: expected an integer, got str '8'"),
        ('{"hidden_size": 8, "x": 1}', ValueError, "config: expected the fields"),
    ],
    ids=lambda value: f"{value!r:.30}" if isinstance(value, str) else value.__name__,
)
def test_from_json_refuses(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)) as caught:
        EPTConfig.from_json(text)
    assert type(caught.value) is error


@given(configs())
@settings(max_examples=100)
def test_num_parameters_is_the_modules(config: EPTConfig) -> None:
    # the values do not matter here, and given rows cost less than sampled ones
    rows = torch.ones(config.num_virtual_tokens + config.rank, config.hidden_size)
    prompt = FusedEPTPrompt(config, nn.Embedding(13, config.hidden_size), init=rows)
    sizes = [parameter.numel() for parameter in prompt.parameters()]
    assert config.num_parameters == sum(sizes)
    assert all(sizes)


@pytest.mark.parametrize(("alpha", "rank", "scaling"), [(8.0, 16, 2.0), (3, 1, 3.0), (8.0, 0, 0.0)])
def test_scaling(alpha: float, rank: int, scaling: float) -> None:
    assert EPTConfig(32, alpha=alpha, rank=rank).scaling == scaling


@given(
    hidden_size=st.integers(1, 2048),
    prompt_length=st.integers(1, 300),
    num_virtual_tokens=st.integers(1, 120),
    max_length=st.integers(1, 600),
    num_spaces=st.integers(0, 6),
    space_dim=st.integers(1, 16),
)
@settings(max_examples=400)
def test_from_budget_uses_up_the_budget(
    hidden_size: int, prompt_length: int, num_virtual_tokens: int, **sizes: int
) -> None:
    """Never above the budget, and one rank more would be, or is more than the sizes allow."""
    budget = prompt_length * hidden_size
    fixed = EPTConfig(hidden_size, num_virtual_tokens=num_virtual_tokens, rank=0, **sizes)
    arguments = {"num_virtual_tokens": num_virtual_tokens, **sizes}
    if fixed.num_parameters > budget:
        with pytest.raises(
            ValueError, match=r"^prompt_length: expected a budget of at least"
        ) as caught:
            EPTConfig.from_budget(hidden_size, prompt_length, **arguments)
        assert f"at least {fixed.num_parameters} parameters" in str(caught.value)
        assert str(caught.value).endswith(f"got {prompt_length} * {hidden_size} = {budget}")
        return
    config = EPTConfig.from_budget(hidden_size, prompt_length, **arguments)
    assert config == dataclasses.replace(fixed, rank=config.rank)
    assert config.num_parameters <= budget
    if config.rank < min(sizes["max_length"], hidden_size):
        assert dataclasses.replace(config, rank=config.rank + 1).num_parameters > budget


def test_from_budget_at_its_edge() -> None:
    """One parameter less than the least that is needed, and exactly that many."""
    sizes = {"num_virtual_tokens": 4, "num_spaces": 1, "space_dim": 3, "max_length": 2}
    with pytest.raises(ValueError, match=r"^prompt_length: .* at least 353 .* = 352$"):
        EPTConfig.from_budget(32, 11, **sizes)
    exact = EPTConfig.from_budget(32, 4, num_virtual_tokens=4, num_spaces=0)
    assert (exact.rank, exact.num_parameters) == (0, 4 * 32)


def test_from_budget_hands_on_the_choices() -> None:
    choices = {"alpha": 4.0, "activation": "silu", "gate": "prompt", "fusion": False}
    choices["offset_tokens"] = "given"
    config = EPTConfig.from_budget(768, **choices)
    assert {name: getattr(config, name) for name in choices} == choices
    assert config.rank > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 3}, TypeError, "rank: from_budget solves for it, got it as an argument"),
        ({"prompt_length": 0}, ValueError, "prompt_length: expected an integer >= 1, got 0"),
        ({"prompt_length": 9.5}, TypeError, "prompt_length: expected an integer, got float 9.5"),
        ({"hidden_size": -1}, ValueError, "hidden_size: expected an integer >= 1, got -1"),
        ({"gate": "x"}, ValueError, "gate: expected one of token, prompt, got 'x'"),
        ({"heads": 2}, TypeError, "heads"),
    ],
    ids=str,
)
def test_from_budget_refuses(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        EPTConfig.from_budget(**{"hidden_size": 64, **arguments})


def test_defaults_of_a_prompt_are_the_same_everywhere() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(EPTConfig)}
    run = TrainConfig(model="m", data="d", output="o")
    budget = inspect.signature(EPTConfig.from_budget).parameters
    for name in ("num_virtual_tokens", "num_spaces", "space_dim"):
        assert getattr(run, name) == budget[name].default == fields[name], name
    assert budget["max_length"].default == fields["max_length"]
    for name in ("alpha", "activation", "gate", "temperature", "fusion", "offset_tokens"):
        assert getattr(run, name) == fields[name], name
    assert run.prompt_config(768).num_spaces == 4
