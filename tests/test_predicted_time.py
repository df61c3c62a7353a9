"""Times on paper, against numbers worked out by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench.predicted_time import H200, Gpu, Work, markdown, predicted, table

# 1 MB a microsecond, 100 MFLOP a microsecond, ten multiprocessors, launches of 2 µs.
GPU = Gpu(bytes_per_s=1e12, flops_per_s=1e14, multiprocessors=10, launch_s=2e-6)
FULL = Work(moved=50_000_000, flops=1_000_000_000, passes=3, programs=40, warps=4, warps_per_sm=16)


@pytest.mark.parametrize(
    ("change", "memory", "products", "waves", "time"),
    [
        ({}, 50, 30, 1.0, 52),
        ({"passes": 6}, 50, 60, 1.0, 62),
        ({"flops": 0}, 50, 0, 1.0, 52),
        ({"moved": 0}, 0, 30, 1.0, 32),
        ({"warps_per_sm": 8}, 50, 30, 2.0, 52),  # more waves, the same work of each
        ({"warps_per_sm": 15}, 50, 30, 4 / 3, 52),  # three programs fit
        ({"programs": 42}, 50, 30, 1.05, 2 + 50 * 5 / 4.2),  # one multiprocessor has five
        ({"programs": 5}, 50, 30, 0.125, 102),  # half of the multiprocessors have none
    ],
)
def test_the_larger_floor_and_the_busiest_multiprocessor(
    change: dict[str, int], memory: float, products: float, waves: float, time: float
) -> None:
    found = predicted(FULL._replace(**change), GPU)
    assert 1e6 * found.memory_s == pytest.approx(memory)
    assert 1e6 * found.products_s == pytest.approx(products)
    assert 1e6 * found.floor_s == pytest.approx(max(memory, products))
    assert found.waves == pytest.approx(waves)
    assert 1e6 * found.predicted_s == pytest.approx(time)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"programs": 0}, "programs: expected at least 1, got 0"),
        ({"warps_per_sm": 3}, "warps_per_sm: expected at least the 4 of a program, got 3"),
    ],
)
def test_a_launch_that_does_not_run_has_no_time(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        predicted(FULL._replace(**change), GPU)


def test_a_table_has_a_row_for_each_launch() -> None:
    table = markdown({"t5-base": FULL, "long": FULL._replace(programs=5, passes=6)}, GPU)
    header, rule, *rows = table.splitlines()
    assert {line.count("|") for line in (header, rule, *rows)} == {10}
    assert rows == [
        "| t5-base | 50.0 | 50.0 | 30.0 | 40 | 16 | 1.00 | 50.0 | 52.0 |",
        "| long | 50.0 | 50.0 | 60.0 | 5 | 16 | 0.12 | 60.0 | 122.0 |",
    ]


def test_the_h200_is_the_one_that_was_measured(root: Path) -> None:
    with (root / "bench/results/nvidia-h200/floor.csv").open(newline="") as file:
        floor = {row["operation"]: row for row in csv.DictReader(file)}
    copy, launch = floor["copy"], floor["empty launch"]
    measured = 1e9 * float(copy["floor_mb"]) / float(copy["p50_ms"])
    assert pytest.approx(measured, rel=0.01) == H200.bytes_per_s
    assert pytest.approx(1e-3 * float(launch["p50_ms"]), rel=0.01) == H200.launch_s


def test_page() -> None:
    """The table in the documents is that of the plans and the compiled kernels on record."""
    pytest.importorskip("triton", reason="Triton is not installed")
    page = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert table() in page
