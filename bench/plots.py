"""Draw a run from its CSV files alone: ``python -m bench.plots FOLDER``.

Every picture is written next to the files that it shows, and says where and with what they were
measured. A suite without rows has no picture.
"""

from __future__ import annotations

import math
import re
import statistics
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
    """How to name a row's shape: with its types if the rows differ in them."""
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

    Rows without a time or a positive size have no logarithm: they are left out.
    """
    points = []
    for row in rows:
        axis, _, size = row.shape.partition("=")
        if row.suite == "sweeps" and row.p50_ms and re.fullmatch(r"\d*[1-9]\d*", size):
            points.append((float(size), axis, row))
    found: dict[str, dict[str, list[tuple[float, Row]]]] = {}
    for size, axis, row in sorted(points, key=lambda point: point[0]):
        found.setdefault(axis, {}).setdefault(row.peer, []).append((size, row))
    return found


def fitted_exponents(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[float, float]]:
    """How the cost grows along each axis of the sweeps, for each peer.

    The exponent is the slope of the logarithm of the median time over that of the size, by least
    squares: 1 if twice the size takes twice the time, near 0 if a fixed cost hides the work.

    Returns:
        (axis, peer) -> (exponent, R²), for those with at least three different sizes. R² is 1 if
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
        "training_step": _ratios(rows, "training_step", colours),
        "memory": _memory(rows, colours),
    }
    drawings = {folder / f"{name}.png": figure for name, figure in figures.items() if figure}
    for path, figure in drawings.items():
        figure.savefig(path, dpi=_DPI)
    return list(drawings)


def _figure(height: float, rows: list[Row]) -> Figure:
    """An empty figure that says where its rows were measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    parts = []
    for label, column in (("", "device"), ("torch ", "torch"), ("commit ", "commit")):
        parts.append(label + ", ".join(dict.fromkeys(getattr(row, column) for row in rows)))
    figure.supxlabel("; ".join(parts), fontsize=_SMALL, color="0.35", wrap=True)
    return figure


def _grid(figure: Figure, count: int, columns: int, **options: Any) -> list[Any]:
    """As many panels as asked for, row by row: no empty ones at the end."""
    panels = list(
        figure.subplots(math.ceil(count / columns), columns, squeeze=False, **options).flat
    )
    for panel in panels[count:]:
        panel.remove()
    for panel in panels[:count]:
        panel.tick_params(labelsize=_SMALL)
        panel.grid(True, color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
    return panels[:count]


def _log_scale(axis: Any, *steps: int) -> None:
    """Plain numbers at these multiples of each power of ten; the axis is logarithmic already."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _sweeps(rows: list[Row], colours: dict[str, str]) -> Figure | None:
    """Time against size along each axis, with the floor."""
    from matplotlib.ticker import NullLocator

    axes = swept(rows)
    if not axes:
        return None
    fits = fitted_exponents(rows)
    mine = [row for row in rows if row.suite == "sweeps"]
    figure = _figure(0.8 + 2.8 * math.ceil(len(axes) / 2), mine)
    figure.suptitle("Median time against size; ^: the fitted exponent", fontsize=11)
    for panel, (axis, by_peer) in zip(_grid(figure, len(axes), 2), axes.items(), strict=True):
        floor: dict[float, float] = {}
        for peer, points in by_peer.items():
            label = f"{peer} ^{fits[axis, peer][0]:.2f}" if (axis, peer) in fits else peer
            times = [row.p50_ms for _, row in points]
            sizes = [size for size, _ in points]
            panel.plot(sizes, times, "o-", color=colours[peer], label=label, markersize=3)
            floor |= {size: row.floor_ms for size, row in points if row.floor_ms}
        panel.set_xscale("log")
        panel.set_yscale("log")
        if floor:
            panel.plot(*zip(*sorted(floor.items()), strict=True), "--", color="0.3", label="floor")
        panel.set_xticks(sorted({size for points in by_peer.values() for size, _ in points}))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter("{x:g}")
        _log_scale(panel.yaxis, 1, 2, 5)
        panel.margins(y=0.3)  # room for the legend
        panel.set_title(axis, fontsize=9)
        panel.set_ylabel("ms", fontsize=_SMALL)
        panel.legend(fontsize=7, loc="upper left", frameon=False, ncols=2)
    return figure


def _bars(
    rows: list[Row],
    title: str,
    value: Callable[[Row], Measured],
    start: float,
    colours: dict[str, str],
) -> tuple[Figure, list[Any]]:
    """Horizontal bars from ``start``, grouped by shape, a panel for each operation and direction.

    Returns:
        The figure and its panels.
    """
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(work_of(row), []).append(row)
    names = {work: shape_namer(mine) for work, mine in panels.items()}
    shapes = {w: list(dict.fromkeys(map(names[w], mine))) for w, mine in panels.items()}
    shown = {w: [p for p in colours if p in peers(mine)] for w, mine in panels.items()}
    heights = [0.5 + _BAR * len(shapes[w]) * (len(shown[w]) + 1) for w in panels]
    figure = _figure(1.3 + sum(heights), rows)
    axes = _grid(figure, len(panels), 1, height_ratios=heights)
    handles: dict[str, Any] = {}
    for panel, (work, mine) in zip(axes, panels.items(), strict=True):
        group = len(shown[work]) + 1  # one bar's height between two groups
        for row in mine:
            place = shapes[work].index(names[work](row)) * group + shown[work].index(row.peer)
            middle, low, high = value(row)
            handles[row.peer] = panel.barh(
                place,
                middle - start,
                left=start,
                color=colours[row.peer],
                xerr=[[max(0.0, middle - low)], [max(0.0, high - middle)]],
                error_kw={"linewidth": 0.8, "ecolor": "0.25"},
            )
            panel.annotate(
                f"{middle:.3g}",
                (max(middle, high, start), place),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6.5,
            )
        panel.set_yticks([i * group + (group - 2) / 2 for i in range(len(shapes[work]))])
        panel.set_yticklabels(shapes[work])
        panel.set_ylim(len(shapes[work]) * group - 1, -1)
        panel.margins(x=0.15)  # room for the figures
        panel.grid(False, axis="y")
        panel.set_title(work, fontsize=9)
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
    return figure, axes


def _interval(row: Row) -> Measured:
    ratio = row.ours_to_peer or math.nan
    return ratio, row.ours_to_peer_low or ratio, row.ours_to_peer_high or ratio


def _times_faster(row: Row) -> Measured:
    ratio, low, high = _interval(row)
    return 1 / ratio, 1 / high, 1 / low


def _ratios(rows: list[Row], suite: str, colours: dict[str, str]) -> Figure | None:
    """Times faster than each peer on a logarithmic axis; of whole steps, our share of its time."""
    mine = [r for r in rows if r.suite == suite and not is_ours(r) and r.ours_to_peer]
    if not mine:
        return None
    if suite == "training_step":
        title = "Our training step by that of each peer: below 1 we are faster (95% intervals)"
        figure, axes = _bars(mine, title, _interval, 0, colours)
    else:
        name = suite.replace("_", " ").capitalize()
        title = f"{name}: times faster than each peer (95% intervals)"
        figure, axes = _bars(mine, title, _times_faster, 1, colours)
    for panel in axes:
        if suite != "training_step":
            panel.set_xscale("log")
            _log_scale(panel.xaxis, 1, 2, 5)
        panel.axvline(1, color="black", linewidth=0.8)
    return figure


def _memory(rows: list[Row], colours: dict[str, str]) -> Figure | None:
    path = [row for row in rows if row.suite == "prompt_path" and row.peak_mb]
    path = [row for row in path if row.direction == "both"] or path
    mine = path + [row for row in rows if row.suite == "training_step" and row.peak_mb]
    if not mine:
        return None
    title = "Most memory at once beyond what was there before (MB)"
    figure, axes = _bars(mine, title, lambda row: (row.peak_mb or 0.0,) * 3, 0, colours)
    for panel in axes:
        panel.set_xscale("log")
        _log_scale(panel.xaxis, 1, 3)
    return figure


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Draw the CSV files of a folder, next to them."""
    try:
        paths = draw(folder)
    except (OSError, ValueError, ImportError) as error:
        raise Failure(" ".join(str(error).split())) from error
    for path in paths:
        click.echo(path)


if __name__ == "__main__":
    main()
