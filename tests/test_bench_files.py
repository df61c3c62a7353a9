"""What is made from the benchmarks' CSV files: the rows themselves, the comparison, the plots."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import tests.toy_method  # registers a method  # noqa: F401
from bench import clip, compare, methods, plots, reading
from bench.rows import SUITES, Book, Row, read, read_csv, write
from ept_fast.prompts.base import prompt_methods
from tests.processes import python
from tests.tiny import save_model, write_rows

# Our backend paired with itself.
DEFAULTS: dict[str, Any] = {
    "suite": "prompt_path",
    "operation": "prompt path",
    "direction": "both",
    "shape": "t5-base",
    "batch": 32,
    "embeddings": "float32",
    "parameters": "float32",
    "peer": "eager",
    "ours": "eager",
    "p50_ms": 2.0,
    "peak_mb": 100.0,
    "launches": 50,
    "rounds": 20,
    "ours_to_peer": 1.0,
    "threads": "2",
    "device": "Processor, 2 cores",
    "torch": "2.13.0",
    "commit": "0123456789",
    "date": "2026-01-02",
}


def make_row(**changes: Any) -> Row:
    return Row(**{**DEFAULTS, **changes})


def ratio(value: float, peer: str = "reference", **changes: Any) -> Row:
    """A row of another peer, with an interval of a hundredth on both sides."""
    interval = {"ours_to_peer_low": value * 0.99, "ours_to_peer_high": value * 1.01}
    return make_row(**{"peer": peer, "ours_to_peer": value, **interval, **changes})


def save(folder: Path, rows: list[Row]) -> Path:
    for suite in dict.fromkeys(row.suite for row in rows):
        write(folder / f"{suite}.csv", [row for row in rows if row.suite == suite])
    return folder


# Rows


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [make_row(suite=suite, note='a "b", c', error=0.5) for suite in SUITES]
    assert read(save(tmp_path, rows)) == rows


def test_a_row_takes_the_place_of_the_same_work(tmp_path: Path) -> None:
    first, other = make_row(p50_ms=1.0), make_row(peer="reference", p50_ms=3.0)
    for row in (first, other):
        Book(tmp_path).add(row)
    second = make_row(p50_ms=2.0, commit="9876543210")
    book = Book(tmp_path)
    book.add(second)
    assert read(tmp_path) == [second, other]
    assert book.rows == [second]


def test_a_file_with_other_columns_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "prompt_path.csv"
    path.write_text("shape,variant\nbase,eager\n")
    with pytest.raises(ValueError, match="expected the columns"):
        Book(tmp_path).add(make_row())
    assert path.read_text() == "shape,variant\nbase,eager\n"


# bench.compare


def compared(*paths: Path) -> Result:
    return CliRunner().invoke(compare.main, [str(path) for path in paths])


def judge(tmp_path: Path, old: list[Row], new: list[Row]) -> Result:
    return compared(save(tmp_path / "old", old), save(tmp_path / "new", new))


NOISY = make_row(ours_to_peer=1.06)
SWEPT = [ratio(0.5, shape=f"length={2**i}") for i in range(12)]
FLOOR = [make_row(suite="floor", operation="copy", peer="torch", ours="", ours_to_peer=None)]
OTHERS = [
    make_row(suite="splice", ours_to_peer=1.02),
    make_row(suite="inference", ours_to_peer=0.9),
]


@pytest.mark.parametrize(
    ("old", "new", "status", "said"),
    [
        ([make_row(), ratio(0.5)], [make_row(), ratio(0.5)], 0, "3 values judged: 0 regressions"),
        ([make_row(), ratio(0.50)], [make_row(), ratio(0.55)], 1, "1 regression, 0 improvements"),
        ([make_row(), ratio(0.55)], [make_row(), ratio(0.50)], 0, "0 regressions, 1 improvement"),
        ([ratio(0.5, p50_ms=4.0)], [ratio(0.55, p50_ms=4.1)], 1, "4 -> 4.1"),
        # A slower machine is no regression.
        ([make_row(p50_ms=2.0)], [make_row(p50_ms=6.0)], 0, "0 regressions"),
        # Intervals that meet.
        ([ratio(0.500)], [ratio(0.509)], 0, "0 regressions"),
        ([ratio(0.500)], [ratio(0.512)], 1, "noise of old: not measured, taken as 0"),
        # Within the noise of either run; a suite without noise of its own takes the largest.
        ([NOISY, ratio(0.50)], [make_row(), ratio(0.53)], 0, "0 regressions"),
        ([make_row(), ratio(0.50)], [NOISY, ratio(0.53)], 0, "0 regressions"),
        ([*OTHERS, ratio(0.50)], [*OTHERS, ratio(0.55)], 0, "prompt_path 10.0% (not measured"),
        (
            [*OTHERS, ratio(0.50, suite="splice")],
            [*OTHERS, ratio(0.55, suite="splice")],
            1,
            "1 regression",
        ),
        # Memory by 1% and 1 MB, launches by one, both of ours alone.
        ([make_row(peak_mb=100.0)], [make_row(peak_mb=102.0)], 1, "100.0 MB"),
        ([make_row(peak_mb=102.0)], [make_row(peak_mb=100.0)], 0, "1 improvement"),
        ([make_row(peak_mb=100.0)], [make_row(peak_mb=100.9)], 0, "0 regressions"),
        ([make_row(peak_mb=1000.0)], [make_row(peak_mb=1009.0)], 0, "0 regressions"),
        ([make_row(peak_mb=2.0)], [make_row(peak_mb=2.9)], 0, "0 regressions"),
        ([make_row(launches=6)], [make_row(launches=7)], 1, "launches"),
        ([ratio(0.5)], [ratio(0.5, peak_mb=900.0, launches=900)], 0, "0 regressions"),
        # What differs is said.
        ([make_row()], [make_row(peak_mb=None)], 0, "1 value in one run only"),
        ([ratio(0.5)], [ratio(0.5, torch="2.14.0")], 0, "note: torch differs: 2.13.0 -> 2.14.0"),
        (
            [make_row(), ratio(0.5)],
            [ratio(3.0, "eager", ours="triton"), ratio(0.5, ours="triton")],
            0,
            "note: ours differs: eager -> triton",
        ),
        ([ratio(0.5), *SWEPT], [ratio(0.5)], 0, "only in old: 12 rows: prompt path, both, length"),
        ([ratio(0.5), *SWEPT], [ratio(0.5)], 0, "; and 2 more"),
        # Nothing can be said.
        ([ratio(0.5)], [ratio(0.5, device="Another")], 2, "different devices"),
        ([ratio(0.5)], [ratio(0.5, shape="long")], 2, "no row in common"),
        (FLOOR, FLOOR, 2, "no row of"),
    ],
)
def test_two_runs_are_judged(
    tmp_path: Path, old: list[Row], new: list[Row], status: int, said: str
) -> None:
    result = judge(tmp_path, old, new)
    assert result.exit_code == status, result.output
    assert said in result.output


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.partition("\n")[0] + "\n",
        lambda text: text[:100],
        lambda text: text[: text.rindex("float32")],
        lambda text: text[: text.rindex(",")],
        lambda text: text.replace(",0.5,0.495,", ",nan,0.495,"),
        lambda text: "",
        lambda text: "shape,variant\nbase,eager\n",
        lambda text: text.replace(",20,", ",many,"),
        lambda text: text + "\udcff",
    ],
)
def test_a_file_that_is_not_whole_is_an_error_in_one_line(
    tmp_path: Path, damage: Callable[[str], str]
) -> None:
    whole = save(tmp_path / "whole", [make_row(), ratio(0.5)]) / "prompt_path.csv"
    broken = tmp_path / "broken.csv"
    broken.write_text(damage(whole.read_text()), errors="surrogateescape")
    assert broken.read_bytes() != whole.read_bytes()
    (tmp_path / "empty").mkdir()
    assert compared(whole.parent, whole).exit_code == 0
    for other in (broken, tmp_path / "nowhere", tmp_path / "empty"):
        for paths in ((whole, other), (other, whole)):
            result = compared(*paths)
            assert (result.exit_code, result.stdout) == (2, "")
            assert len(result.stderr.splitlines()) == 1
            assert other.name in result.stderr


# bench.plots


def sweep(axis: str, values: tuple[int, ...], exponent: float, **changes: Any) -> list[Row]:
    """Rows whose time is an exact power of the size."""
    return [
        make_row(suite="sweeps", shape=f"{axis}={v}", p50_ms=0.5 * v**exponent, **changes)
        for v in values
    ]


def test_what_is_on_record_is_read_and_drawn(root: Path, tmp_path: Path) -> None:
    record = root / "bench" / "results" / "intel-xeon-processor-2-cores"
    assert compared(record, record).exit_code == 0
    for path in record.glob("*.csv"):
        shutil.copy(path, tmp_path)
    result = CliRunner().invoke(plots.main, [str(tmp_path)])
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert {Path(line).stem for line in result.stdout.splitlines()} == drawn
    ratios = {f"ratios-{suite}" for suite in ("splice", "reconstruct", "prompt_path")}
    assert drawn == {"sweeps", "training_step", "memory", *ratios}
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_rows_there_is_no_plot(tmp_path: Path) -> None:
    save(tmp_path, [make_row(peak_mb=None), ratio(0.5, ours_to_peer=None, peak_mb=None)])
    assert plots.draw(tmp_path) == []
    result = CliRunner().invoke(plots.main, [str(tmp_path / "nowhere")])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)


def test_plots_show_what_was_measured_and_where() -> None:
    from matplotlib.text import Text

    def texts(figure: Any) -> set[str]:
        return {text.get_text() for text in figure.findobj(Text)}

    rows = [make_row(), ratio(0.25), ratio(0.25, shape="long", commit="9876543210")]
    found = texts(plots._ratios(rows, "prompt_path", dict.fromkeys(plots.peers(rows), "C0")))
    assert "Processor, 2 cores; torch 2.13.0; commit 0123456789, 9876543210" in found
    assert {"4", "t5-base", "long", "reference", "prompt path, both"} <= found
    assert "eager" not in found  # ours by ours is no bar
    assert plots._times_faster(ratio(0.5)) == pytest.approx((2, 1 / 0.505, 1 / 0.495))
    rows = sweep("length", (32, 64, 128), 1.5, floor_ms=0.1) + sweep("K", (1, 2), 1.0)
    found = texts(plots._sweeps(rows, {"eager": "C0"}))
    assert {"length", "K", "floor", "eager ^1.50", "eager"} <= found


def test_importing_the_plots_needs_no_matplotlib() -> None:
    code = "import sys, bench.plots; sys.exit('matplotlib' in sys.modules)"
    assert python("-c", code).returncode == 0


def test_exponents_are_fitted() -> None:
    """Exact for a power, apart for each peer, none for less than three sizes."""
    sizes = (2, 4, 8)
    rows = [
        *sweep("batch", sizes, -0.5),
        *sweep("batch", sizes, 0.5, peer="reference"),
        *sweep("K", sizes, 0.0),
        *sweep("T", sizes[:2], 1.0),
        *(make_row(suite="sweeps", shape=f"T={value}") for value in ("0", "many")),
        make_row(suite="sweeps", shape="T=16", p50_ms=None),
        make_row(suite="sweeps", shape="tiny"),
    ]
    expected = {
        ("batch", "eager"): -0.5,
        ("batch", "reference"): 0.5,
        ("K", "eager"): 0.0,
    }
    fits = plots.fitted_exponents(rows)
    assert {key: exponent for key, (exponent, _) in fits.items()} == pytest.approx(expected)
    assert [r2 for _, r2 in fits.values()] == pytest.approx([1.0] * 3)
    rows = sweep("d", (1, 10, 100), 1.0)
    rows[1] = make_row(suite="sweeps", shape="d=10", p50_ms=0.5)
    assert plots.fitted_exponents(rows)["d", "eager"] == pytest.approx((1.0, 0.75))


# bench.methods


def test_every_registered_method_has_a_row(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    out = tmp_path / "methods.csv"
    command = ("--model", model, "--tokens", 4, "--batch", 3, "--length", 8, "--rounds", 2)
    done = CliRunner().invoke(methods.main, [*map(str, command), "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = {row["method"]: row for row in read_csv(out)}
    assert {*rows} == {*prompt_methods()} >= {"toy", "ept"}  # a new one needs no change there
    assert methods.table(rows.values()) in done.output
    for name, row in rows.items():
        config = methods.config_of(name, 32, 4, 8)
        assert config.num_virtual_tokens == 4
        count = config.num_parameters
        assert count is None or int(row["parameters"]) == count
        assert float(row["ratio_low"]) <= float(row["ratio_to_pt"]) <= float(row["ratio_high"])
        # The trained values and AdamW's two moments at least.
        assert float(row["peak_mb"]) > 3 * 4 * int(row["parameters"]) / 1e6
        assert row["host_ms"] == ""
        assert (row["model"], row["rounds"], row["batch"]) == ("model", "2", "3")
        assert row["torch"]
        assert row["commit"]
    assert float(rows["pt"]["ratio_to_pt"]) == 1
    assert rows["pt"]["parameters"] == str(4 * 32)


def test_the_documentation_has_the_tables_of_the_methods(root: Path) -> None:
    page = (root / "docs" / "results.md").read_text()
    for path in methods.FOLDER.glob("*.csv"):
        assert methods.table(read_csv(path)) in page


# bench.clip


def test_every_context_is_trained_and_tested_on_both_kinds_of_classes(tmp_path: Path) -> None:
    words = {*" ".join((*clip.TEMPLATES, *clip.WORDS)).replace("{}", "").split(), "where", "when"}
    model = save_model(tmp_path / "model", words=words)
    for name in ("13/train", "13/validation", "test"):
        path = tmp_path / clip.TASK / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": f"where {clip.WORDS[i % 6]}", "label": i % 6} for i in range(12)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    out = tmp_path / "clip.csv"
    command = ("--data", tmp_path, "--model", model, "--seeds", 13, "--steps", 2, "--out", out)
    done = CliRunner().invoke(clip.main, list(map(str, command)))
    assert done.exit_code == 0, done.output
    rows = read_csv(out)
    names = [*clip.UNTRAINED, *clip.METHODS]
    virtual = {name for name, method in clip.METHODS.items() if method.virtual}
    expected = [(s, n) for s in clip.SPLITS for n in names if s != "all" or n not in virtual]
    assert [(row["split"], row["method"]) for row in rows] == expected
    assert clip.table(rows) in done.output
    by_name = {row["method"]: row for row in rows}
    # Context, and the correction of LASP; no parameter of the encoder.
    assert by_name["CoOp"]["parameters"] == str(4 * 32)
    assert by_name["LASP, 2 groups"]["parameters"] == str(2 * 4 * 32 + 32)
    for row in rows:
        base, new, h = (float(row[name]) for name in ("base", "new", "H"))
        assert 0 <= base <= 100
        assert row["split"] == "all" or h == pytest.approx(clip.harmonic(base, new), rel=1e-4)


def test_the_documentation_has_the_table_of_the_contexts(root: Path) -> None:
    page = (root / "docs" / "clip.md").read_text()
    for path in clip.FOLDER.glob("*.csv"):
        assert clip.table(read_csv(path)) in page


# bench.reading


@pytest.mark.parametrize("part", ["accuracy", "stability", "information"])
def test_prompts_that_read_the_text_are_trained_and_judged(part: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    for name in ("13/train", "13/validation", "test"):
        rows = [{"text": "good film" if i % 2 else "bad film", "label": i % 2} for i in range(10)]
        write_rows(tmp_path / reading.TASKS[0] / f"{name}.jsonl", rows)
    out = tmp_path / "reading.csv"
    command = ("--data", tmp_path, "--model", model, "--seeds", 13, "--steps", 2, "--out", out)
    done = CliRunner().invoke(reading.main, [part, *map(str, command)])
    assert done.exit_code == 0, done.output
    rows = read_csv(out)
    table = reading.steps_table if part == "information" else reading.spread_table
    assert table(rows) in done.output
    if part == "information":
        assert [row["method"] for row in rows] == [*reading.INFORMATION]
        assert all(row["steps"] in ("", "0") for row in rows)
        assert "A step with kept states by one with a first pass: 0." in done.output
    elif part == "stability":
        every = [(name, str(i)) for name in reading.STABILITY for i in range(5)]
        assert [(row["method"], row["template"]) for row in rows] == every
    else:
        assert [row["method"] for row in rows] == [*reading.METHODS]
        assert all(int(row["parameters"]) <= 100 * 32 for row in rows)


def test_the_documentation_has_the_tables_of_prompts_that_read(root: Path) -> None:
    page = (root / "docs" / "results.md").read_text()
    for path in reading.FOLDER.glob("*.csv"):
        of_steps = path.name.startswith("information")
        table = reading.steps_table if of_steps else reading.spread_table
        assert table(read_csv(path)) in page
