"""What is made from the benchmarks' CSV files: the judgement of two runs, plots and tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench import compare, plots
from bench.rows import SUITES, Book, Row, read, write

DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(Row.__dataclass_fields__),
    "suite": "prompt_path",
    "operation": "prompt path",
    "direction": "both",
    "shape": "t5-base",
    "batch": 32,
    "length": 256,
    "hidden_size": 768,
    "num_virtual_tokens": 40,
    "max_length": 256,
    "rank": 30,
    "num_spaces": 4,
    "space_dim": 8,
    "tasks": 0,
    "embeddings": "float32",
    "parameters": "float32",
    "peer": "eager",
    "ours": "eager",
    "p50_ms": 2.0,
    "peak_mb": 100.0,
    "launches": 50,
    "rounds": 20,
    "ours_to_peer": 1.0,
    "note": "",
    "threads": "2",
    "device": "Processor, 2 cores",
    "driver": "",
    "cuda": "",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "transformers": "5.0.0",
    "peft": "0.19.0",
    "python": "3.11.9",
    "commit": "0123456789",
    "date": "2026-01-02",
}
GPU = {
    "device": "NVIDIA H200",
    "driver": "570.1",
    "cuda": "12.8",
    "embeddings": "bfloat16",
    "ours": "triton",
}


def make_row(**changes: Any) -> Row:
    """Our backend paired with itself, save what is changed."""
    return Row(**{**DEFAULTS, **changes})


def ratio(value: float, peer: str = "reference", **changes: Any) -> Row:
    """A row of another peer, with an interval of a hundredth on both sides."""
    interval = {"ours_to_peer_low": value * 0.99, "ours_to_peer_high": value * 1.01}
    return make_row(**{"peer": peer, "ours_to_peer": value, **interval, **changes})


def save(folder: Path, rows: list[Row]) -> Path:
    """Write the rows to their suites' files."""
    for suite in dict.fromkeys(row.suite for row in rows):
        write(folder / f"{suite}.csv", [row for row in rows if row.suite == suite])
    return folder


def judge(tmp_path: Path, old: list[Row], new: list[Row]) -> Result:
    """The command's result for two runs."""
    folders = [save(tmp_path / name, rows) for name, rows in (("old", old), ("new", new))]
    return CliRunner().invoke(compare.main, [str(folder) for folder in folders])


def last_line(result: Result) -> str:
    return result.output.splitlines()[-1]


# bench.compare


def test_a_run_compared_with_itself_is_unchanged(tmp_path: Path) -> None:
    rows = [make_row(), ratio(0.5), ratio(0.7, "reference-compiled")]
    result = judge(tmp_path, rows, rows)
    assert result.exit_code == 0
    assert last_line(result) == (
        "3 rows in both, 4 values judged: 0 regressions, 0 improvements, "
        "4 unchanged within the noise"
    )


def test_a_single_file_is_as_good_as_a_folder(tmp_path: Path) -> None:
    folder = save(tmp_path, [make_row(), ratio(0.5)])
    file = folder / "prompt_path.csv"
    assert CliRunner().invoke(compare.main, [str(folder), str(file)]).exit_code == 0


def test_a_slower_ratio_is_a_regression(tmp_path: Path) -> None:
    old = [make_row(p50_ms=2.0), ratio(0.50, p50_ms=4.0)]
    new = [make_row(p50_ms=2.2), ratio(0.55, p50_ms=4.1)]
    result = judge(tmp_path, old, new)
    assert result.exit_code == 1
    line = next(line for line in result.output.splitlines() if line.startswith("regression"))
    for text in ("reference's", "prompt path, both, t5-base", "0.550", "2 -> 2.2", "4 -> 4.1"):
        assert text in line
    assert "they are not judged" in result.output
    assert "1 regression, 0 improvements" in last_line(result)


def test_a_faster_ratio_is_an_improvement(tmp_path: Path) -> None:
    result = judge(tmp_path, [make_row(), ratio(0.55)], [make_row(), ratio(0.50)])
    assert result.exit_code == 0
    assert "0 regressions, 1 improvement" in last_line(result)


def test_intervals_that_meet_are_no_regression(tmp_path: Path) -> None:
    assert judge(tmp_path, [ratio(0.500)], [ratio(0.509)]).exit_code == 0
    assert judge(tmp_path, [ratio(0.500)], [ratio(0.512)]).exit_code == 1


@pytest.mark.parametrize(("old_noise", "new_noise"), [(0.06, 0.0), (0.0, -0.06), (0.03, 0.03)])
def test_a_ratio_within_the_noise_of_the_two_runs_is_unchanged(
    tmp_path: Path, old_noise: float, new_noise: float
) -> None:
    old = [make_row(ours_to_peer=1 + old_noise), ratio(0.50)]
    new = [make_row(ours_to_peer=1 + new_noise), ratio(0.53)]
    assert judge(tmp_path, old, new).exit_code == 0
    assert judge(tmp_path, [make_row(), old[1]], [make_row(), new[1]]).exit_code == 1


def test_a_suite_without_noise_of_its_own_takes_the_largest(tmp_path: Path) -> None:
    other = [
        make_row(suite="splice", ours_to_peer=1.02),
        make_row(suite="inference", ours_to_peer=0.9),
    ]
    result = judge(tmp_path, [*other, ratio(0.50)], [*other, ratio(0.55)])
    assert result.exit_code == 0
    assert "prompt_path 10.0% (not measured: the largest of the others)" in result.output
    # A suite with noise of its own is judged by that.
    mine = [make_row(suite="splice", ours_to_peer=1.0), other[1]]
    slower = [ratio(value, suite="splice") for value in (0.50, 0.55)]
    assert judge(tmp_path, [*mine, slower[0]], [*mine, slower[1]]).exit_code == 1


def test_noise_that_was_not_measured_is_none_and_said(tmp_path: Path) -> None:
    result = judge(tmp_path, [ratio(0.50)], [ratio(0.52)])
    assert result.exit_code == 1
    assert "noise of old: not measured, taken as 0" in result.output


def test_a_slower_machine_is_not_a_regression(tmp_path: Path) -> None:
    old = [make_row(p50_ms=2.0), ratio(0.5, p50_ms=4.0)]
    new = [make_row(p50_ms=6.0), ratio(0.5, p50_ms=12.0)]
    assert judge(tmp_path, old, new).exit_code == 0


@pytest.mark.parametrize(
    ("old", "new", "exit_code"),
    [(100.0, 102.0, 1), (100.0, 100.9, 0), (1000.0, 1009.0, 0), (1000.0, 1011.0, 1), (2, 2.9, 0)],
)
def test_memory_growth_is_a_regression(
    tmp_path: Path, old: float, new: float, exit_code: int
) -> None:
    result = judge(tmp_path, [make_row(peak_mb=old)], [make_row(peak_mb=new)])
    assert result.exit_code == exit_code
    back = judge(tmp_path, [make_row(peak_mb=new)], [make_row(peak_mb=old)])
    assert back.exit_code == 0
    assert ("1 improvement" in last_line(back)) == bool(exit_code)


def test_a_launch_more_is_a_regression(tmp_path: Path) -> None:
    result = judge(tmp_path, [make_row(launches=6)], [make_row(launches=7)])
    assert result.exit_code == 1
    assert "launches" in result.output


def test_what_another_peer_needs_is_not_judged(tmp_path: Path) -> None:
    result = judge(tmp_path, [ratio(0.5)], [ratio(0.5, peak_mb=900.0, launches=900)])
    assert result.exit_code == 0


def test_a_peer_of_one_run_that_is_ours_in_the_other_is_not_judged(tmp_path: Path) -> None:
    old = [make_row(), ratio(0.5)]
    new = [ratio(3.0, "eager", ours="triton"), ratio(0.5, ours="triton")]
    result = judge(tmp_path, old, new)
    assert result.exit_code == 0
    assert "note: ours differs: eager -> triton" in result.output


def test_a_value_of_one_run_only_is_counted(tmp_path: Path) -> None:
    result = judge(tmp_path, [make_row()], [make_row(peak_mb=None)])
    assert result.exit_code == 0
    assert last_line(result).endswith("; 1 value in one run only")


def test_two_devices_cannot_be_compared(tmp_path: Path) -> None:
    result = judge(tmp_path, [ratio(0.5)], [ratio(0.5, device="Another, 4 cores")])
    assert result.exit_code == 2
    assert "different devices" in result.output
    assert "Processor, 2 cores" in result.output
    assert "Another, 4 cores" in result.output


def test_other_versions_are_a_note(tmp_path: Path) -> None:
    result = judge(tmp_path, [ratio(0.5)], [ratio(0.5, torch="2.14.0", threads="1")])
    assert result.exit_code == 0
    assert "note: torch differs: 2.13.0 -> 2.14.0" in result.output
    assert "note: threads differs: 2 -> 1" in result.output
    assert "note: triton" not in result.output


def test_rows_of_one_run_are_counted_and_ten_are_named(tmp_path: Path) -> None:
    more = [ratio(0.5, shape=f"length={2**i}") for i in range(12)]
    result = judge(tmp_path, [ratio(0.5), *more], [ratio(0.5), make_row()])
    assert result.exit_code == 0
    line = next(line for line in result.output.splitlines() if line.startswith("only in old"))
    assert line.startswith("only in old: 12 rows: prompt path, both, length=1, float32, reference")
    assert "length=512," in line
    assert "length=1024," not in line
    assert line.endswith("; and 2 more")
    assert "only in new: 1 row: prompt path, both, t5-base, float32, eager" in result.output


def test_runs_without_a_common_row_cannot_be_compared(tmp_path: Path) -> None:
    result = judge(tmp_path, [ratio(0.5)], [ratio(0.5, shape="long")])
    assert result.exit_code == 2
    assert "no row in common" in result.output


def test_runs_without_a_judged_value_cannot_be_compared(tmp_path: Path) -> None:
    floor = [make_row(suite="floor", operation="copy", peer="torch", ours="", ours_to_peer=None)]
    result = judge(tmp_path, floor, floor)
    assert result.exit_code == 2
    assert "no row of" in result.output


def _header_only(text: str) -> str:
    return text.partition("\n")[0] + "\n"


def _cut_in_the_header(text: str) -> str:
    return text[:100]


def _cut_in_the_numbers(text: str) -> str:
    return text[: text.rindex("float32")]


def _cut_before_the_date(text: str) -> str:
    return text[: text.rindex(",")]


def _not_finite(text: str) -> str:
    return text.replace(",0.5,0.495,", ",nan,0.495,")


@pytest.mark.parametrize(
    "damage",
    [
        _header_only,
        _cut_in_the_header,
        _cut_in_the_numbers,
        _cut_before_the_date,
        _not_finite,
        lambda text: "",
        lambda text: "shape,variant\nbase,eager\n",
        lambda text: text.replace(",20,", ",many,"),
    ],
)
def test_a_file_that_is_not_whole_is_an_error_in_one_line(tmp_path: Path, damage: Any) -> None:
    folder = save(tmp_path / "whole", [make_row(), ratio(0.5)])
    whole = folder / "prompt_path.csv"
    broken = tmp_path / "broken.csv"
    text = damage(whole.read_text())
    assert text != whole.read_text()
    broken.write_text(text)
    for paths in ((whole, broken), (broken, whole)):
        result = CliRunner().invoke(compare.main, [str(path) for path in paths])
        assert result.exit_code == 2
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) == 1
        assert "broken.csv" in result.stderr


def test_a_file_without_rows_is_called_that(tmp_path: Path) -> None:
    write(tmp_path / "floor.csv", [])
    result = CliRunner().invoke(compare.main, [str(tmp_path), str(tmp_path)])
    assert result.exit_code == 2
    assert "expected rows of measurements, got none" in result.stderr


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    whole = save(tmp_path, [ratio(0.5)]) / "prompt_path.csv"
    picture = tmp_path / "picture.csv"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    result = CliRunner().invoke(compare.main, [str(whole), str(picture)])
    assert result.exit_code == 2
    assert "picture.csv" in result.stderr


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_a_missing_file_is_an_error_in_one_line(tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    whole = save(tmp_path / "whole", [ratio(0.5)])
    result = CliRunner().invoke(compare.main, [str(whole), str(tmp_path / missing)])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert missing in result.stderr


# bench.plots


def sweep(axis: str, values: tuple[int, ...], exponent: float, **changes: Any) -> list[Row]:
    """Rows whose time is an exact power of the size."""
    return [
        make_row(suite="sweeps", shape=f"{axis}={v}", p50_ms=0.5 * v**exponent, **changes)
        for v in values
    ]


def every_suite() -> list[Row]:
    """Some rows of each suite that is drawn."""
    rows = sweep("length", (32, 64, 128), 1.0, floor_ms=0.1)
    rows += sweep("length", (32, 64, 128), 0.9, peer="reference")
    for suite in ("prompt_path", "splice", "reconstruct"):
        for direction in ("forward", "backward"):
            work = {"suite": suite, "operation": suite, "direction": direction}
            rows += [make_row(**work), ratio(0.3, **work), ratio(1.0, "dept", **work)]
    for operation in ("training step", "training step, compiled"):
        work = {"suite": "training_step", "operation": operation, "shape": "t5-base 256"}
        rows += [make_row(**work), ratio(0.9, "peft-100", **work), ratio(1.02, "backbone", **work)]
    return rows


ALL_PLOTS = {
    "sweeps.png",
    "ratios-prompt_path.png",
    "ratios-splice.png",
    "ratios-reconstruct.png",
    "training_step.png",
    "memory.png",
}


def test_every_suite_is_drawn(tmp_path: Path) -> None:
    paths = plots.draw(save(tmp_path, every_suite()))
    assert {path.name for path in paths} == ALL_PLOTS
    assert {path.name for path in tmp_path.glob("*.png")} == ALL_PLOTS
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(
    ("suite", "expected"),
    [
        ("sweeps", {"sweeps.png"}),
        ("splice", {"ratios-splice.png"}),
        ("prompt_path", {"ratios-prompt_path.png", "memory.png"}),
        ("training_step", {"training_step.png", "memory.png"}),
    ],
)
def test_a_missing_suite_is_not_drawn(tmp_path: Path, suite: str, expected: set[str]) -> None:
    save(tmp_path, [row for row in every_suite() if row.suite == suite])
    assert {path.name for path in plots.draw(tmp_path)} == expected


def test_rows_without_what_is_drawn_make_no_plot(tmp_path: Path) -> None:
    save(tmp_path, [make_row(peak_mb=None), ratio(0.5, ours_to_peer=None, peak_mb=None)])
    assert plots.draw(tmp_path) == []


def texts_of(figure: Any) -> set[str]:
    """Every text in a figure."""
    from matplotlib.text import Text

    return {text.get_text() for text in figure.findobj(Text)}


def test_a_plot_says_where_and_with_what_it_was_measured() -> None:
    rows = [make_row(), ratio(0.25), ratio(0.25, shape="long", commit="9876543210")]
    colours = dict.fromkeys(plots.peers(rows), "C0")
    figure = plots._ratios(rows, "prompt_path", colours)
    texts = texts_of(figure)
    assert "Processor, 2 cores; torch 2.13.0; commit 0123456789, 9876543210" in texts
    assert {"4", "t5-base", "long", "reference", "prompt path, both"} <= texts
    assert "eager" not in texts  # ours by ours is no bar


def test_times_faster_is_the_ratio_turned_over_with_its_interval() -> None:
    assert plots._times_faster(ratio(0.5)) == pytest.approx((2, 1 / 0.505, 1 / 0.495))


def test_sweeps_show_the_floor_and_the_exponent() -> None:
    rows = sweep("length", (32, 64, 128), 1.5, floor_ms=0.1) + sweep("K", (1, 2), 1.0)
    figure = plots._sweeps(rows, {"eager": "C0"})
    assert figure is not None
    assert len(figure.axes) == 2
    assert {"length", "K", "floor", "eager ^1.50", "eager"} <= texts_of(figure)


def test_the_plots_command(tmp_path: Path) -> None:
    save(tmp_path, [make_row(), ratio(0.5)])
    result = CliRunner().invoke(plots.main, [str(tmp_path)])
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2
    result = CliRunner().invoke(plots.main, [str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_importing_the_plots_needs_no_matplotlib(root: Path) -> None:
    code = "import sys, bench.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.25, 1.0, 2.0])
def test_the_exponent_of_a_power_is_exact(exponent: float) -> None:
    fits = plots.fitted_exponents(sweep("length", (32, 48, 128, 512), exponent))
    assert list(fits) == [("length", "eager")]
    assert fits["length", "eager"] == pytest.approx((exponent, 1.0), abs=1e-12)


def test_exponents_are_kept_apart() -> None:
    sizes = (2, 4, 8)
    rows = [
        *sweep("batch", sizes, 1.0),
        *sweep("batch", sizes, 0.5, peer="reference"),
        *sweep("K", sizes, 0.0, direction="forward"),
        *sweep("K", sizes, 2.0, direction="backward"),
    ]
    found = {key: round(value[0], 6) for key, value in plots.fitted_exponents(rows).items()}
    assert found == {
        ("batch", "eager"): 1.0,
        ("batch", "reference"): 0.5,
        ("K, prompt path, forward, float32, float32", "eager"): 0.0,
        ("K, prompt path, backward, float32, float32", "eager"): 2.0,
    }


def test_what_is_no_power_has_a_smaller_r2() -> None:
    rows = sweep("d", (1, 10, 100), 1.0)
    rows[1] = make_row(suite="sweeps", shape="d=10", p50_ms=0.5)
    exponent, r2 = plots.fitted_exponents(rows)["d", "eager"]
    assert exponent == pytest.approx(1.0)
    assert r2 == pytest.approx(0.75)


def test_less_than_three_sizes_have_no_exponent() -> None:
    rows = [
        *sweep("K", (1, 2), 1.0),
        make_row(suite="sweeps", shape="K=0", p50_ms=1.0),
        make_row(suite="sweeps", shape="K=4", p50_ms=None),
        make_row(suite="sweeps", shape="K=many", p50_ms=1.0),
        make_row(suite="sweeps", shape="tiny", p50_ms=1.0),
    ]
    assert plots.fitted_exponents(rows) == {}


# bench.rows


def test_a_book_replaces_what_was_measured_again(tmp_path: Path) -> None:
    old = [make_row(), ratio(0.5), ratio(0.6, "dept"), ratio(0.7, suite="splice")]
    save(tmp_path, old)
    book = Book(tmp_path)
    again = ratio(0.4, date="2026-03-04")
    book.add(again)
    first = read(tmp_path / "prompt_path.csv")
    assert [row.key for row in first] == [row.key for row in old[:3]]
    assert [row.ours_to_peer for row in first] == [1.0, 0.4, 0.6]
    assert first[1].date == "2026-03-04"
    more = ratio(0.9, shape="long")
    book.add(more)
    assert [row.key for row in read(tmp_path / "prompt_path.csv")][3:] == [more.key]
    assert [row.ours_to_peer for row in read(tmp_path / "splice.csv")] == [0.7]
    assert book.rows == [again, more]


def test_a_book_does_not_write_over_a_file_with_other_columns(tmp_path: Path) -> None:
    file = tmp_path / "prompt_path.csv"
    file.write_text("shape,variant\nbase,eager\n")
    with pytest.raises(ValueError, match=r"prompt_path\.csv: expected the columns"):
        Book(tmp_path).add(make_row())
    assert file.read_text() == "shape,variant\nbase,eager\n"
    assert list(tmp_path.iterdir()) == [file]


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        make_row(note='a comma, a "quote"', p50_ms=1.25, tokens_per_s=None),
        ratio(0.5, suite="floor"),
    ]
    save(tmp_path, rows)
    assert read(tmp_path) == sorted(rows, key=lambda row: SUITES.index(row.suite))
