"""Judge a run by an older one on the same machine: ``python -m bench.compare OLD NEW``.

What is judged does not depend on how fast the machine was on that day: our time by a peer's in the
same round, and our memory and launches. Ends with 1 if something became worse by more than the
noise that the two runs measured, with 0 if nothing did, with 2 if nothing can be said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click

from bench.rows import Row, aligned, read

# Differences in these do not forbid a comparison, but a reader has to know of them.
_ORIGIN = ("threads", "driver", "cuda", "torch", "triton", "transformers", "peft", "python")
_JUDGED = ("ours_to_peer", "ours_to_peer_low", "ours_to_peer_high", "peak_mb")
_NAMED = 10


class Failure(click.ClickException):
    """One line on standard error and exit code 2."""

    exit_code = 2


@dataclass(frozen=True)
class Change:
    """One judged value that is outside the noise.

    Attributes:
        worse: a regression; otherwise an improvement.
        measure: what was judged.
        old, new: the row in either run.
        values: the judged value in the old and in the new run, for a reader.
    """

    worse: bool
    measure: str
    old: Row
    new: Row
    values: tuple[str, str]


def is_ours(row: Row) -> bool:
    """Whether a row is our backend paired with itself, not with another peer."""
    return row.ours != "" and row.peer == row.ours


def noise(rows: Iterable[Row]) -> dict[str, float]:
    """How far the ratio of our backend to itself is from 1 at most, for each suite that has one.

    The largest of all stands under the empty name: it is that of the other suites.
    """
    found: dict[str, float] = {}
    for row in rows:
        if is_ours(row) and row.ours_to_peer is not None:
            for suite in (row.suite, ""):
                found[suite] = max(found.get(suite, 0.0), abs(row.ours_to_peer - 1))
    return found


def work_name(row: Row) -> str:
    """What was done, in words, without the peer."""
    types = [row.embeddings, row.parameters]
    parts = [row.operation, row.direction, row.shape, "/".join(dict.fromkeys(filter(None, types)))]
    return ", ".join(filter(None, parts))


def _ratio_change(old: Row, new: Row, allowed: float) -> Change | None:
    """A change if the two intervals (the ratio itself, if a run kept none) are that far apart."""
    bounds, texts = [], []
    for row in (old, new):
        low, high = (
            row.ours_to_peer if bound is None else bound
            for bound in (row.ours_to_peer_low, row.ours_to_peer_high)
        )
        bounds += [low or 0.0, high or 0.0]
        texts.append(f"{row.ours_to_peer:.3f} ({low:.3f} to {high:.3f})")
    old_low, old_high, new_low, new_high = bounds
    worse, better = new_low > old_high * (1 + allowed), new_high * (1 + allowed) < old_low
    if not worse and not better:
        return None
    return Change(worse, f"our time by {new.peer}'s", old, new, (texts[0], texts[1]))


def _own_change(measure: str, old: Row, new: Row) -> Change | None:
    """More or less memory, by 1% and 1 MB at least, or launches."""
    was, now = (getattr(row, measure) for row in (old, new))
    least = max(1.0, 0.01 * min(was, now)) if measure == "peak_mb" else 0
    if abs(now - was) <= least:
        return None
    if measure == "peak_mb":
        return Change(now > was, "peak memory", old, new, (f"{was:.1f} MB", f"{now:.1f} MB"))
    return Change(now > was, measure, old, new, (str(was), str(now)))


def judge(old: list[Row], new: list[Row]) -> tuple[list[Change], int, int]:
    """Compare the rows that both runs have.

    Returns:
        The changes beyond the noise, regressions first; how many values were judged; and how many
        were not, as only one of the runs has them.
    """
    noises = noise(old), noise(new)
    before = {row.key: row for row in old}
    changes: list[Change | None] = []
    single = 0
    for now in new:
        was = before.get(now.key)
        # A peer of one run may be our backend in the other.
        if was is None or is_ours(was) != is_ours(now):
            continue
        for name in ("peak_mb", "launches") if is_ours(now) else ("ours_to_peer",):
            missing = [getattr(row, name) is None for row in (was, now)]
            if any(missing):
                single += not all(missing)
            elif is_ours(now):
                changes.append(_own_change(name, was, now))
            else:
                allowed = sum(n.get(now.suite, n.get("", 0.0)) for n in noises)
                changes.append(_ratio_change(was, now, allowed))
    found = sorted(filter(None, changes), key=lambda change: not change.worse)
    return found, len(changes), single


def _load(path: Path) -> list[Row]:
    try:
        rows = read(path)
    except (OSError, ValueError) as error:
        raise Failure(" ".join(f"{path}: {error}".split())) from error
    if not rows:
        raise Failure(f"{path}: expected rows of measurements, got none")
    for row in rows:
        if not row.date:
            raise Failure(f"{path}: a row ends before its date: expected a whole file")
        for name in _JUDGED:
            value = getattr(row, name)
            if value is not None and not math.isfinite(value):
                raise Failure(f"{path}: {name} of {work_name(row)}: not finite: {value}")
    return rows


def _values(rows: Iterable[Row], column: str) -> str:
    return ", ".join(sorted({getattr(row, column) for row in rows})) or "none"


def _milliseconds(old: Row | None, new: Row | None) -> str:
    shown = [
        "-" if row is None or row.p50_ms is None else f"{row.p50_ms:.4g}" for row in (old, new)
    ]
    return " -> ".join(shown)


def _table(changes: list[Change], old: list[Row], new: list[Row]) -> list[str]:
    """A line for each change, with the times of ours and of the peer beside it."""
    ours = [{row.key[:-1]: row for row in rows if is_ours(row)} for rows in (old, new)]
    body = []
    for change in changes:
        own = (rows.get(change.new.key[:-1]) for rows in ours)
        body.append(
            (
                "regression" if change.worse else "improvement",
                change.measure,
                work_name(change.new),
                *change.values,
                _milliseconds(*own),
                "" if is_ours(change.new) else _milliseconds(change.old, change.new),
            )
        )
    header = ("", "what", "work", "old", "new", "our p50 (ms)", "peer's p50 (ms)")
    return aligned(header, body)


def _noise_line(name: str, rows: list[Row], suites: Iterable[str]) -> str:
    measured = noise(rows)
    if not measured:
        return f"noise of {name}: not measured, taken as 0: nothing was paired with itself"
    parts = [
        f"{suite} {measured[suite]:.1%}"
        if suite in measured
        else f"{suite} {measured['']:.1%} (not measured: the largest of the others)"
        for suite in suites
    ]
    return f"noise of {name}: {', '.join(parts)}"


def _only(name: str, rows: list[Row], other: list[Row]) -> list[str]:
    keys = {row.key for row in other}
    alone = [f"{work_name(r)}, {r.peer} [{r.suite}]" for r in rows if r.key not in keys]
    if not alone:
        return []
    more = f"; and {len(alone) - _NAMED} more" if len(alone) > _NAMED else ""
    return [f"only in {name}: {_count(len(alone), 'row')}: {'; '.join(alone[:_NAMED])}{more}"]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@click.command()
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
def main(old: Path, new: Path) -> None:
    """Compare two runs on one device: folders of CSV files, or single files.

    Judged are our time by a peer's in the same round, if the intervals are further apart than
    the noise of the two runs added up, and our own peak memory (more than 1% and 1 MB) and
    launches. Exit code 1: something is worse; 2: the runs cannot be compared.
    """
    before, after = _load(old), _load(new)
    devices = [_values(rows, "device") for rows in (before, after)]
    if len({row.device for row in before + after}) > 1:
        raise Failure(
            "the runs are of different devices, whose ratios say nothing of each other: "
            f"{old}: {devices[0]}; {new}: {devices[1]}"
        )
    common = {row.key for row in before} & {row.key for row in after}
    if not common:
        raise Failure(f"nothing to compare: {old} and {new} have no row in common")
    changes, judged, single = judge(before, after)
    if not judged:
        raise Failure(f"nothing to compare: no row of {old} and {new} has a value to judge")

    lines = [f"device: {devices[0]}"]
    for column in ("commit", "date"):
        lines.append(f"{column}: {_values(before, column)} -> {_values(after, column)}")
    for column in (*_ORIGIN, "ours"):
        was, now = (
            _values([r for r in rows if column != "ours" or (r.key in common and r.ours)], column)
            for rows in (before, after)
        )
        if was != now:
            lines.append(f"note: {column} differs: {was} -> {now}")
    suites = list(dict.fromkeys(row.suite for row in after if row.key in common))
    lines += [_noise_line("old", before, suites), _noise_line("new", after, suites)]
    if changes:
        lines += ["", *_table(changes, before, after)]
        lines += ["Milliseconds stand beside for a reader; they are not judged.", ""]
    lines += _only("old", before, after) + _only("new", after, before)
    click.echo("\n".join(lines))
    worse = sum(change.worse for change in changes)
    better = len(changes) - worse
    alone = f"; {_count(single, 'value')} in one run only" if single else ""
    click.echo(
        f"{_count(len(common), 'row')} in both, {_count(judged, 'value')} judged: "
        f"{_count(worse, 'regression')}, {_count(better, 'improvement')}, "
        f"{judged - worse - better} unchanged within the noise{alone}"
    )
    raise SystemExit(1 if worse else 0)


if __name__ == "__main__":
    main()
