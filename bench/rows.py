"""Rows of measurements and their files: ``bench/results/<device>/<suite>.csv``.

``python -m bench.rows FOLDER`` prints a line for each row.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

# The most wanted first: time may be too short for all.
SUITES = (
    "floor",
    "prompt_path",
    "splice",
    "training_step",
    "reconstruct",
    "inference",
    "serving",
    "cold_start",
    "sweeps",
)


_KEY = ("suite", "operation", "direction", "shape", "embeddings", "parameters", "peer")


@dataclass(frozen=True)
class Row:
    """One peer doing one piece of work; what does not apply is None or empty.

    A round times our backend and then the peer, on the same inputs. Ratios are our time by the
    peer's in the same round: below 1 we are faster. The peer that is ``ours`` itself is timed
    against itself, which shows the run's noise.

    Attributes:
        suite: one of ``SUITES``; names the file.
        operation: what is done, such as "splice" or "training step, compiled".
        direction: "forward", "backward", "both", or empty.
        shape: the name of the sizes, or "axis=value" in a sweep.
        batch, length, hidden_size, num_virtual_tokens, max_length, rank, num_spaces, space_dim,
            vocabulary, tasks: the sizes, in METHOD's words; ``tasks`` 0: a single prompt.
        embeddings, parameters: types.
        peer: who does the work.
        ours: the backend that it is paired with.
        p20_ms, p50_ms, p80_ms: quantiles of the time over the rounds; device time by events on a
            GPU, elapsed time on a CPU.
        host_ms: median until the call returns.
        elapsed_ms: median until the device is done, called alone.
        peak_mb: most memory allocated at once beyond what was there before (10⁶ bytes).
        launches: kernels, copies and fills on the device, as the profiler counts them.
        rounds: how many pairs.
        floor_mb: what has to be read and written once (10⁶ bytes).
        floor_ms: the time of that at the run's copy bandwidth, no less than an empty launch.
        of_floor: floor_ms / p50_ms; 1 is the best possible.
        ours_to_peer: median ratio of the pairs; ``_low`` and ``_high`` its 95% interval.
        tokens_per_s: real text tokens.
        error: the parity check's error by what it allows.
        note: anything that a reader has to know.
        threads ... date: where, when and with what.
    """

    suite: str = ""
    operation: str = ""
    direction: str = ""
    shape: str = ""
    batch: int | None = None
    length: int | None = None
    hidden_size: int | None = None
    num_virtual_tokens: int | None = None
    max_length: int | None = None
    rank: int | None = None
    num_spaces: int | None = None
    space_dim: int | None = None
    vocabulary: int | None = None
    tasks: int | None = None
    embeddings: str = ""
    parameters: str = ""
    peer: str = ""
    ours: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    host_ms: float | None = None
    elapsed_ms: float | None = None
    peak_mb: float | None = None
    launches: int | None = None
    rounds: int | None = None
    floor_mb: float | None = None
    floor_ms: float | None = None
    of_floor: float | None = None
    ours_to_peer: float | None = None
    ours_to_peer_low: float | None = None
    ours_to_peer_high: float | None = None
    tokens_per_s: float | None = None
    error: float | None = None
    note: str = ""
    threads: str = ""
    device: str = ""
    driver: str = ""
    cuda: str = ""
    torch: str = ""
    triton: str = ""
    transformers: str = ""
    peft: str = ""
    python: str = ""
    commit: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What a row is the measurement of: the same in two runs that can be compared."""
        return tuple(getattr(self, name) for name in _KEY)


def read(path: Path) -> list[Row]:
    """The rows of one file, or of every suite's file in a folder.

    Raises:
        FileNotFoundError: neither a file nor a folder with at least one suite's file.
        ValueError: a file with other columns, or a value that should be a number and is not.
    """
    if path.is_dir():
        files = [path / f"{suite}.csv" for suite in SUITES if (path / f"{suite}.csv").is_file()]
        if not files:
            raise FileNotFoundError(f"{path}: expected a suite's CSV file, got none")
        return [row for file in files for row in read(file)]
    names = [field.name for field in fields(Row)]
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        raise ValueError(f"{path}: expected a line break at the end, got a file that was cut off")
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        if reader.fieldnames != names:
            raise ValueError(f"{path}: expected the columns of bench.rows.Row, got others")
        return [_row(f"{path}, line {number}", v) for number, v in enumerate(reader, 2)]
    except csv.Error as error:
        raise ValueError(f"{path}: expected a CSV file, got one with an error: {error}") from None


def _row(place: str, values: dict[str, str]) -> Row:
    if None in values or None in values.values():
        raise ValueError(f"{place}: expected {len(fields(Row))} columns, got others")
    converted: dict[str, Any] = dict(values)
    for field in fields(Row):
        if field.type == "str":
            continue
        kind, text = int if str(field.type).startswith("int") else float, values[field.name]
        try:
            converted[field.name] = kind(text) if text else None
        except ValueError:
            raise ValueError(f"{place}: {field.name}: expected a number, got {text!r}") from None
    return Row(**converted)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to one file, whole or not at all; numbers to five digits."""
    write_csv(path, [field.name for field in fields(Row)], (rounded(asdict(row)) for row in rows))


def rounded(row: Mapping[str, Any], digits: int = 5) -> dict[str, Any]:
    """The row with its floats as texts of so many digits."""
    return {k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in row.items()}


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file that :func:`write_csv` wrote, all values as texts."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of these columns, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


class Book:
    """The rows of one run. Each is on the disk as soon as it is added; a row takes the place of an
    older one of the same work, and older rows of other work stay."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Keep a row and write its suite's file."""
        self.rows.append(row)
        path = self.folder / f"{row.suite}.csv"
        kept = {old.key: old for old in (read(path) if path.is_file() else [])}
        write(path, (kept | {row.key: row}).values())


def aligned(header: Sequence[str], body: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table in columns; numbers to four digits, nothing for None."""
    texts = [
        [f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x) for x in line]
        for line in (header, *body)
    ]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in texts]


if __name__ == "__main__":
    work = ("operation", "direction", "shape", "embeddings", "peer")
    columns = (*work, "p50_ms", "of_floor", "ours_to_peer")
    found = [[getattr(row, name) for name in columns] for row in read(Path(sys.argv[1]))]
    print("\n".join(aligned(columns, found)))
