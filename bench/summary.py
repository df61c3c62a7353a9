"""Ten lines at the end of a run; ``python -m bench.summary FOLDER`` prints a line for each row."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path

from bench.record import SUITES, Row, read


def lines(rows: list[Row], folder: Path) -> list[str]:
    """What was measured, our time by each peer's, the noise, the floor, where the files are.

    Args:
        rows: of this run.
        folder: where they are.

    Returns:
        At most ten lines; what was not measured has none.
    """
    first = rows[0]
    counts = {suite: sum(row.suite == suite for row in rows) for suite in SUITES}
    suites = ", ".join(f"{suite} {count}" for suite, count in counts.items() if count)
    found = [
        f"{first.device}: {len(rows)} rows ({suites})",
        f"torch {first.torch}, triton {first.triton or '-'}, threads {first.threads}, "
        f"commit {first.commit}",
        _floor(rows),
    ]
    path = [row for row in rows if row.suite == "prompt_path"]
    peers = dict.fromkeys(row.peer for row in path if row.peer != row.ours)
    plain = ("reference", "reference-compiled", "reference-max-autotune")
    for title, names in (
        ("the definition", [name for name in peers if name in plain]),
        ("other ways", [name for name in peers if name not in plain]),
    ):
        shares = ", ".join(_range(name, [r for r in path if r.peer == name]) for name in names)
        found.append(f"prompt path, our time by that of {title}: {shares}" if shares else "")
    steps = [row for row in rows if row.suite == "training_step" and row.peer != row.ours]
    shares = ", ".join(
        _range(name, [row for row in steps if row.peer == name])
        for name in dict.fromkeys(row.peer for row in steps)
    )
    found.append(f"training step, our time by: {shares}" if shares else "")
    found += [_noise(rows), _share_of_floor(rows)]
    errors = [row.error for row in rows if row.error is not None]
    if errors:
        found.append(f"parity: largest error {max(errors):.2f} of what is allowed")
    found.append(f"results in {folder}; compare two runs with python -m bench.compare OLD NEW")
    return [line for line in found if line]


def _range(name: str, rows: list[Row]) -> str:
    ratios = [row.ours_to_peer for row in rows if row.ours_to_peer]
    mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    return f"{name} {mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _floor(rows: list[Row]) -> str:
    floor = {row.operation: row for row in rows if row.suite == "floor"}
    if not floor:
        return ""
    copy, empty = floor["copy"], floor["empty launch"]
    assert copy.floor_mb is not None
    assert copy.p50_ms is not None
    assert empty.p50_ms is not None
    return (
        f"floor: copy {copy.floor_mb / copy.p50_ms:.1f} GB/s, "
        f"empty launch {1e3 * empty.p50_ms:.1f} us"
    )


def _noise(rows: list[Row]) -> str:
    against_self = [abs(r.ours_to_peer - 1) for r in rows if r.peer == r.ours and r.ours_to_peer]
    if not against_self:
        return ""
    return f"noise: our time by our own is off by up to {100 * max(against_self):.1f}%"


def _share_of_floor(rows: list[Row]) -> str:
    ours = [row for row in rows if row.peer == row.ours and row.of_floor and row.suite != "sweeps"]
    if not ours:
        return ""

    def said(row: Row) -> str:
        return f"{row.of_floor:.1%} ({row.operation} {row.direction}, {row.shape})"

    ordered = sorted(ours, key=lambda row: row.of_floor or 0)
    return f"of the floor we reach {said(ordered[0])} to {said(ordered[-1])}"


def table(rows: Iterable[Row]) -> list[str]:
    """A line for each row: what, by whom, milliseconds, share of the floor, our time by theirs."""
    lines = []
    for row in rows:
        what = " ".join(x for x in (row.operation, row.direction, row.shape, row.embeddings) if x)
        time = "" if row.p50_ms is None else f"{row.p50_ms:.4g} ms"
        share = "" if row.of_floor is None else f"{row.of_floor:.0%}"
        ratio = "" if row.ours_to_peer is None else f"{row.ours_to_peer:.2f}"
        lines.append(f"{what:44} {row.peer:18} {time:>10} {share:>4} {ratio:>5}")
    return lines


def main(arguments: list[str]) -> int:
    """The command line."""
    try:
        rows = read(Path(arguments[0]))
    except (IndexError, FileNotFoundError, ValueError) as error:
        print(f"expected a folder of results: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
