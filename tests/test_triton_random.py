"""The Triton kernels under Triton's interpreter: shapes and flags at random."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from tests.cases import ACTIVATIONS, GATES, PADDINGS, Sizes, make_case, run
from tests.parity import cotangent_of, needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.usefixtures("one_thread")]


def _draw_sizes(data: st.DataObject) -> Sizes:
    n = data.draw(st.integers(1, 50), "n")
    return Sizes(
        m=data.draw(st.integers(1, 20), "m"),
        n=n,
        r=data.draw(st.integers(1, 35), "r"),
        k=data.draw(st.integers(1, 5), "k"),
        h=data.draw(st.integers(1, 12), "h"),
        d=data.draw(st.integers(1, 70), "d"),
        batch=data.draw(st.integers(1, 6), "batch"),
        length=data.draw(st.integers(1, min(n, 40)), "length"),
        tasks=data.draw(st.sampled_from([None, 1, 3, 7]), "tasks"),
    )


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=200)
def test_random_cases(data: st.DataObject) -> None:
    """Shapes and flags at random in float32: output and every gradient, against float64."""
    case = make_case(
        _draw_sizes(data),
        offset=data.draw(st.booleans(), "offset"),
        spaces=data.draw(st.booleans(), "spaces"),
        padding=data.draw(st.sampled_from(PADDINGS), "padding"),
        fusion=data.draw(st.booleans(), "fusion"),
        activation=data.draw(st.sampled_from(ACTIVATIONS), "activation"),
        gate=data.draw(st.sampled_from(GATES), "gate"),
        seed=data.draw(st.integers(0, 99), "seed"),
        dtype=torch.float32,
    )
    cotangent = cotangent_of(case)
    exact = run(case.to(torch.float64), "reference", cotangent)
    got = run(case, "triton", cotangent)
    assert got.keys() == exact.keys()
    for name, tensor in got.items():
        scale = max(1.0, exact[name].abs().max().item())
        torch.testing.assert_close(
            tensor.double(),
            exact[name],
            rtol=0,
            atol=5e-6 * scale,
            msg=lambda m, n=name: f"{n} {m}",
        )
