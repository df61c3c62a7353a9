"""Draw a run from its CSV files alone: ``python -m bench.plots FOLDER``.

Every picture is written next to the files that it shows, and says where and with what they were
measured. A suite without rows has no picture.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.compare import Failure, is_ours
from bench.rows import Row, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# 9 inches at 150 dots: sharp on a screen, and 8 points are still 11 pixels at 900 pixels' width.
_WIDTH, _DPI, _SMALL = 9.0, 150, 8
_RATIO_SUITES = ("prompt_path", "splice", "reconstruct")
_DRAWN = (*_RATIO_SUITES, "training_step", "sweeps")
_BAR = 0.17  # inches

# A value and the low and high end of its interval.
Measured = tuple[float, float, float]


def peers(rows: Iterable[Row]) -> list[str]:
    """The peers in the order in which they come, our backends before the others."""
    rows = list(rows)
    ours = [row.peer for row in rows if is_ours(row)]
    return list(dict.fromkeys([*ours, *(row.peer for row in rows)]))


def shape_namer(rows: Iterable[Row]) -> Callable[[Row], str]:
    """How to name a row's shape: with its types where the rows are not all of the same."""
    rows = list(rows)
    kinds = {row.embeddings for row in rows}, {row.parameters for row in rows}
    several = [len(kind - {""}) > 1 for kind in kinds]

    def name(row: Row) -> str:
        parts = [row.shape]
        if several[0]:
            parts.append(row.embeddings)
        if several[1] and row.parameters:
            parts.append(f"{row.parameters} parameters")
        return ", ".join(filter(None, parts))

    return name


def work_of(row: Row) -> str:
    """The operation and its direction."""
    return ", ".join(filter(None, (row.operation, row.direction)))


def swept(rows: Iterable[Row]) -> dict[str, dict[str, list[tuple[float, Row]]]]:
    """The sweeps as axis -> peer -> sizes with their rows, the sizes ascending.

    An axis that more than one operation, direction or type was swept along is one entry for each
    of them, with that in its name. Sizes that are no positive numbers are left out, as are rows
    without a time: neither has a logarithm.
    """
    rows = [row for row in rows if row.suite == "sweeps" and "=" in row.shape and row.p50_ms]
    kinds = defaultdict(set)
    for row in rows:
        kinds[_axis(row)].add((work_of(row), row.embeddings, row.parameters))
    found: dict[str, dict[str, list[tuple[float, Row]]]] = {}
    for row in rows:
        axis, size = _axis(row), _number(row.shape.partition("=")[2])
        if size is None or size <= 0:
            continue
        if len(kinds[axis]) > 1:
            axis = ", ".join(filter(None, (axis, work_of(row), row.embeddings, row.parameters)))
        found.setdefault(axis, {}).setdefault(row.peer, []).append((size, row))
    for by_peer in found.values():
        for points in by_peer.values():
            points.sort(key=lambda point: point[0])
    return found


def _axis(row: Row) -> str:
    return row.shape.partition("=")[0]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def fitted_exponents(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[float, float]]:
    """How the cost grows along each axis of the sweeps, for each peer.

    The exponent is the slope of the logarithm of the median time over that of the size, by least
    squares: 1 where twice the size takes twice the time, near 0 where a fixed cost hides the work.

    Returns:
        (axis, peer) -> (exponent, R²), for those with at least three different sizes. R² is 1 where
        the time is the same at every size.
    """
    fits = {}
    for axis, by_peer in swept(rows).items():
        for peer, points in by_peer.items():
            sizes = [math.log(size) for size, _ in points]
            times = [math.log(row.p50_ms) for _, row in points if row.p50_ms]
            if len(set(sizes)) < 3:
                continue
            slope = statistics.linear_regression(sizes, times).slope
            constant = len(set(times)) == 1
            r2 = 1.0 if constant else statistics.correlation(sizes, times) ** 2
            fits[axis, peer] = (slope, r2)
    return fits


def draw(folder: Path) -> list[Path]:
    """Draw what the CSV files of a folder hold.

    Returns:
        The pictures written: of ``sweeps.png``, ``ratios-<suite>.png``, ``training_step.png`` and
        ``memory.png`` those that there are rows for.

    Raises:
        FileNotFoundError, ValueError: as ``bench.rows.read`` does.
    """
    rows = read(folder)
    drawn = peers(row for row in rows if row.suite in _DRAWN)
    colours = {peer: f"C{number % 10}" for number, peer in enumerate(drawn)}
    figures: dict[str, Figure | None] = {
        "sweeps": _sweeps(rows, colours),
        **{f"ratios-{suite}": _ratios(rows, suite, colours) for suite in _RATIO_SUITES},
        "training_step": _training_step(rows, colours),
        "memory": _memory(rows, colours),
    }
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=_DPI)
            paths.append(path)
    return paths


def _figure(height: float, rows: list[Row]) -> Figure:
    """An empty figure that says where its rows were measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    parts = []
    for label, column in (("", "device"), ("torch ", "torch"), ("commit ", "commit")):
        parts.append(label + ", ".join(dict.fromkeys(getattr(row, column) for row in rows)))
    figure.supxlabel("; ".join(parts), fontsize=_SMALL, color="0.35", wrap=True)
    return figure


def _grid(figure: Figure, count: int, columns: int) -> list[Any]:
    """As many axes as there are panels, row by row: no empty ones at the end."""
    lines = math.ceil(count / columns)
    axes = [figure.add_subplot(lines, columns, number + 1) for number in range(count)]
    for panel in axes:
        panel.tick_params(labelsize=_SMALL)
        panel.grid(True, color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
    return axes


def _legend(figure: Figure, title: str, handles: dict[str, Any]) -> None:
    """The title and, below it, the peers."""
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=min(5, len(handles)),
        title=title,
        title_fontsize=11,
        fontsize=_SMALL,
        frameon=False,
    )


def _log_scale(axis: Any, steps: tuple[int, ...]) -> None:
    """Plain numbers at these multiples of each power of ten; the axis is logarithmic already."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _sweeps(rows: list[Row], colours: dict[str, str]) -> Figure | None:
    """Time against size along each axis, with the floor."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes = swept(rows)
    if not axes:
        return None
    mine = [row for row in rows if row.suite == "sweeps"]
    fits = fitted_exponents(rows)
    figure = _figure(0.8 + 2.8 * math.ceil(len(axes) / 2), mine)
    figure.suptitle("Median time against size; ^: the fitted exponent", fontsize=11)
    for panel, (axis, by_peer) in zip(_grid(figure, len(axes), 2), axes.items(), strict=True):
        floor: dict[float, float] = {}
        for peer in [peer for peer in colours if peer in by_peer]:
            points = by_peer[peer]
            label = peer
            if (axis, peer) in fits:
                label += f" ^{fits[axis, peer][0]:.2f}"
            times = [row.p50_ms for _, row in points]
            sizes = [size for size, _ in points]
            panel.plot(sizes, times, "o-", color=colours[peer], label=label, markersize=3)
            for size, row in points:
                if row.floor_ms:
                    floor.setdefault(size, row.floor_ms)
        if floor:
            sizes = sorted(floor)
            panel.plot(sizes, [floor[s] for s in sizes], "--", color="0.3", label="floor")
        panel.set_xscale("log")
        panel.set_yscale("log")
        ticks = sorted({size for points in by_peer.values() for size, _ in points})
        panel.xaxis.set_major_locator(FixedLocator(ticks))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        _log_scale(panel.yaxis, (1, 2, 5))
        low, high = panel.get_ylim()
        panel.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
        panel.set_title(axis, fontsize=9)
        panel.set_ylabel("ms", fontsize=_SMALL)
        panel.legend(fontsize=7, loc="upper left", frameon=False, ncols=2)
    return figure


def _panels(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows by operation and direction."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(work_of(row), []).append(row)
    return found


def _bars(
    rows: list[Row],
    title: str,
    value: Callable[[Row], Measured],
    start: float,
    colours: dict[str, str],
    columns: int,
) -> tuple[Figure, list[Any]]:
    """Horizontal bars, grouped by shape, a panel for each operation and direction."""
    name = shape_namer(rows)
    panels = _panels(rows)
    shapes = list(dict.fromkeys(name(row) for row in rows))
    shown = [peer for peer in colours if any(row.peer == peer for row in rows)]
    group = len(shown) + 1  # one bar's height between two groups
    columns = min(columns, len(panels))
    figure = _figure(
        1.3 + math.ceil(len(panels) / columns) * (0.5 + _BAR * len(shapes) * group), rows
    )
    axes = _grid(figure, len(panels), columns)
    handles: dict[str, Any] = {}
    for number, (panel, (work, mine)) in enumerate(zip(axes, panels.items(), strict=True)):
        for row in mine:
            place = shapes.index(name(row)) * group + shown.index(row.peer)
            middle, low, high = value(row)
            whiskers = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
            handles[row.peer] = panel.barh(
                place,
                middle - start,
                left=start,
                color=colours[row.peer],
                xerr=whiskers,
                error_kw={"linewidth": 0.8, "ecolor": "0.25"},
            )
            panel.annotate(
                f"{middle:.3g}",
                (max(middle, high, start), place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        panel.axvline(1, color="black", linewidth=0.8)
        centres = [i * group + (len(shown) - 1) / 2 for i in range(len(shapes))]
        panel.set_yticks(centres, shapes if number % columns == 0 else [""] * len(shapes))
        panel.set_ylim(len(shapes) * group - 1, -1)
        panel.grid(False, axis="y")
        panel.set_title(work, fontsize=9)
    _legend(figure, title, {peer: handles[peer] for peer in shown})
    return figure, axes


def _interval(row: Row) -> Measured:
    ratio = row.ours_to_peer or math.nan
    return ratio, row.ours_to_peer_low or ratio, row.ours_to_peer_high or ratio


def _times_faster(row: Row) -> Measured:
    ratio, low, high = _interval(row)
    return 1 / ratio, 1 / high, 1 / low


def _against_others(rows: Iterable[Row], suite: str) -> list[Row]:
    """The rows of a suite that compare our backend with something else."""
    return [r for r in rows if r.suite == suite and not is_ours(r) and r.ours_to_peer]


def _ratios(rows: list[Row], suite: str, colours: dict[str, str]) -> Figure | None:
    mine = _against_others(rows, suite)
    if not mine:
        return None
    title = f"{suite.replace('_', ' ').capitalize()}: times faster than each peer (95% intervals)"
    figure, axes = _bars(mine, title, _times_faster, 1, colours, 3)
    for panel in axes:
        panel.set_xscale("log")
        low, high = panel.get_xlim()
        panel.set_xlim(min(low, 0.95), high * (high / low) ** 0.15)  # room for the figures
        _log_scale(panel.xaxis, (1, 2, 5))
    return figure


def _training_step(rows: list[Row], colours: dict[str, str]) -> Figure | None:
    mine = _against_others(rows, "training_step")
    if not mine:
        return None
    title = "Our training step by that of each peer: below 1 we are faster (95% intervals)"
    figure, axes = _bars(mine, title, _interval, 0, colours, 2)
    for panel in axes:
        panel.set_xlim(0, panel.get_xlim()[1] * 1.12)  # room for the figures
    return figure


def _memory(rows: list[Row], colours: dict[str, str]) -> Figure | None:
    """The most memory at once: points, as the axis is logarithmic where shapes differ much."""
    from matplotlib.lines import Line2D

    path = [row for row in rows if row.suite == "prompt_path" and row.peak_mb]
    path = [row for row in path if row.direction == "both"] or path
    mine = path + [row for row in rows if row.suite == "training_step" and row.peak_mb]
    if not mine:
        return None
    panels = _panels(mine)
    names = {work: shape_namer(part) for work, part in panels.items()}
    shapes = {w: list(dict.fromkeys(names[w](r) for r in part)) for w, part in panels.items()}
    columns = min(2, len(panels))
    tallest = 0.7 + 0.27 * max(map(len, shapes.values()))
    figure = _figure(1.3 + math.ceil(len(panels) / columns) * tallest, mine)
    axes = _grid(figure, len(panels), columns)
    for panel, (work, part) in zip(axes, panels.items(), strict=True):
        shown = [peer for peer in colours if any(row.peer == peer for row in part)]
        for row in part:
            # A little apart, so that peers with the same memory are all seen.
            beside = shown.index(row.peer) - (len(shown) - 1) / 2
            place = shapes[work].index(names[work](row)) + 0.6 * beside / len(shown)
            panel.plot(row.peak_mb, place, "o", color=colours[row.peer], markersize=4.5)
        values = [row.peak_mb for row in part if row.peak_mb]
        if max(values) > 10 * min(values):
            panel.set_xscale("log")
            _log_scale(panel.xaxis, (1,) if max(values) > 1000 * min(values) else (1, 3))
        else:
            panel.set_xlim(0, 1.08 * max(values))
        panel.set_yticks(range(len(shapes[work])), shapes[work])
        panel.set_ylim(len(shapes[work]) - 0.5, -0.5)
        panel.set_title(work, fontsize=9)
        panel.set_xlabel("MB", fontsize=_SMALL)
    dots = {
        peer: Line2D([], [], marker="o", linestyle="", color=colours[peer])
        for peer in colours
        if any(row.peer == peer for row in mine)
    }
    _legend(figure, "Most memory at once beyond what was there before", dots)
    return figure


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Draw the CSV files of a folder, next to them."""
    try:
        paths = draw(folder)
    except (OSError, ValueError, csv.Error, ImportError) as error:
        raise Failure(" ".join(str(error).split())) from error
    for path in paths:
        click.echo(path)


if __name__ == "__main__":
    main()
