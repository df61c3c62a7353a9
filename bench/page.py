"""Put the measured tables into ``docs/results.md``: ``python -m bench.page``.

The page has a pair of comments around each table; what stands between them is replaced by what the
files under ``bench/results`` say, so no figure on the page is typed by hand.
"""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import first_contact
from bench.compare import is_ours, noise
from bench.plots import fitted_exponents, shape_namer, swept
from bench.record import Row, read
from bench.shapes import is_unpadded

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "bench" / "results"

# The folders that are on the page, in the repository: a reader's own runs do not change it. None:
# every folder.
PUBLISHED: tuple[str, ...] | None = ("intel-xeon-processor-2-cores", "nvidia-h200")

# The folder of ``python -m bench.host_cost`` and its files.
HOST_COST, PATHS, LAUNCHES = "host_cost", "paths.csv", "launches.csv"

_DASH = "–"
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

# A shape or another label, the figure beside it, and whether it meets the goal.
Finding = tuple[str, str, bool]


def _published() -> list[Path]:
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir())
    return [path for path in folders if PUBLISHED is None or path.name in PUBLISHED]


def devices() -> tuple[list[list[Row]], list[str]]:
    """The rows of each published device's folder under ``RESULTS``, and why others were left out.

    A folder without a suite's file is another job's and needs no reason.
    """
    found, reasons = [], []
    for folder in _published():
        try:
            found.append(read(folder))
        except FileNotFoundError:
            continue
        except (ValueError, csv.Error) as error:
            reasons.append(str(error))
    return [rows for rows in found if rows], reasons


def _figure(value: float | None) -> str:
    """Three digits, or all those before the point; a dash for nothing."""
    if value is None or not math.isfinite(value):
        return _DASH
    if value == 0:
        return "0"
    return f"{value:,.{min(6, max(0, 2 - math.floor(math.log10(abs(value)))))}f}"


def _ratio(value: float | None) -> str:
    return _DASH if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2f}"


def _table(header: Sequence[str], body: Iterable[Sequence[str]], texts: int) -> list[str]:
    """A Markdown table whose first ``texts`` columns are text and whose others are figures."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (header, *body)]
    lines = ["| " + " | ".join(cells) + " |" for cells in escaped]
    return [lines[0], "|" + "|".join(rule) + "|", *lines[1:]]


def _values(rows: Iterable[Row], column: str) -> str:
    return ", ".join(dict.fromkeys(value for row in rows if (value := getattr(row, column))))


def _span(values: Iterable[str | int]) -> str:
    ends = sorted(set(values))
    return str(ends[0]) if len(ends) == 1 else f"{ends[0]} to {ends[-1]}"


def origin_line(rows: list[Row]) -> str:
    """Where, when and with what the rows were measured, and how often."""
    parts = [_values(rows, "device"), f"{_values(rows, 'threads')} threads"]
    for column in ("driver", "cuda", "torch", "triton", "transformers", "peft", "python"):
        if text := _values(rows, column):
            parts.append(f"{'CUDA' if column == 'cuda' else column} {text}")
    parts += [f"commit {_values(rows, 'commit')}", _span(row.date for row in rows)]
    if rounds := [row.rounds for row in rows if row.rounds is not None]:
        parts.append(f"{_span(rounds)} rounds")
    if ours := _values(rows, "ours"):
        parts.append(f"our backend: {ours}")
    if measured := noise(rows):
        parts.append(f"ours by ours at most {max(measured.values()):.3f} from 1")
    return ", ".join(parts) + "."


def _for_each_device(suites: Sequence[str], table: Callable[[list[Row]], list[str]]) -> str:
    """A table for each device that has rows of these suites, under its name in bold."""
    lines: list[str] = []
    for every in devices()[0]:
        rows = [row for row in every if row.suite in suites]
        if rows and (made := table(rows)):
            if lines:
                lines.append("")
            lines += [f"**{_values(rows, 'device')}**", "", *made, ""]
            if notes := _notes(rows):
                lines += [f"Notes: {'; '.join(notes)}.", ""]
            lines.append(origin_line(rows))
    return "\n".join(lines or ["Not measured yet."]) + "\n"


def _notes(rows: Iterable[Row]) -> list[str]:
    """What rows say beside their figures; with the peer's name where only one peer says so."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for note in filter(None, row.note.split("; ")):
            found.setdefault(note, set()).add(row.peer)
    return [
        note if len(peers) > 1 else f"{next(iter(peers))}: {note}" for note, peers in found.items()
    ]


def _others(rows: Iterable[Row]) -> list[str]:
    """The peers that are not the backend that they are paired with, in the order they come."""
    return list(dict.fromkeys(row.peer for row in rows if not is_ours(row)))


def _works(
    rows: Iterable[Row], name: Callable[[Row], str]
) -> list[tuple[Row, str, dict[str, Row]]]:
    """For each piece of work one of its rows, its shape's name, and its rows: ours under ""."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.key[:-1], {})["" if is_ours(row) else row.peer] = row
    firsts = [(next(iter(by_peer.values())), by_peer) for by_peer in found.values()]
    return [(first, name(first), by_peer) for first, by_peer in firsts]


def _cell(row: Row | None, column: str, form: Callable[[float | None], str]) -> str:
    return _DASH if row is None else form(getattr(row, column))


def _operations(rows: list[Row]) -> list[str]:
    others = _others(rows)
    header = ["operation", "direction", "shape", "ours (ms)", "share of the floor"]
    header += [f"by {peer}" for peer in others]
    # What a device's rows do not have gets no columns: memory, and on a CPU the host's own time.
    measured = {
        column: unit
        for column, unit in (("peak_mb", "MB"), ("host_ms", "host ms"))
        if any(getattr(row, column) is not None for row in rows)
    }
    both = ("", "reference")
    header += [f"{peer or 'ours'} ({unit})" for unit in measured.values() for peer in both]
    body = []
    for row, shape, found in _works(rows, shape_namer(rows)):
        ours = found.get("")
        cells = [row.operation, row.direction or _DASH, shape or _DASH]
        cells += [_cell(ours, "p50_ms", _figure), _cell(ours, "of_floor", _share)]
        cells += [_cell(found.get(peer), "ours_to_peer", _ratio) for peer in others]
        cells += [_cell(found.get(p), column, _figure) for column in measured for p in both]
        body.append(cells)
    return _table(header, body, 3)


def _training(rows: list[Row]) -> list[str]:
    others = _others(rows)
    header = ["shape", "torch.compile", "ours (ms)", "tokens/s"]
    header += [f"by {peer}" for peer in others] + ["ours (MB)"]
    header += [f"{peer} (MB)" for peer in others]
    body = []
    for row, shape, found in _works(rows, shape_namer(rows)):
        ours = found.get("")
        cells = [shape, "yes" if "compiled" in row.operation else "no"]
        cells += [_cell(ours, "p50_ms", _figure), _cell(ours, "tokens_per_s", _figure)]
        cells += [_cell(found.get(peer), "ours_to_peer", _ratio) for peer in others]
        cells += [_cell(found.get(peer), "peak_mb", _figure) for peer in ("", *others)]
        body.append(cells)
    return _table(header, body, 2)


def _inference(rows: list[Row]) -> list[str]:
    others = _others(rows)
    header = ["operation", "shape", "ours (ms)", "tokens/s", *(f"by {peer}" for peer in others)]
    body = []
    for row, shape, found in _works(rows, shape_namer(rows)):
        ours = found.get("")
        cells = [", ".join(filter(None, (row.operation, row.direction))), shape or _DASH]
        cells += [_cell(ours, "p50_ms", _figure), _cell(ours, "tokens_per_s", _figure)]
        cells += [_cell(found.get(peer), "ours_to_peer", _ratio) for peer in others]
        body.append(cells)
    return _table(header, body, 2)


def _cold_start(rows: list[Row]) -> list[str]:
    others = _others(rows)
    columns = [""] * any(is_ours(row) for row in rows) + others
    header = ["what", "shape", *(f"{peer or 'ours'} (ms)" for peer in columns)]
    body = [
        [row.operation, shape or _DASH, *(_cell(found.get(p), "p50_ms", _figure) for p in columns)]
        for row, shape, found in _works(rows, shape_namer(rows))
    ]
    return _table(header, body, 2)


def _exponents(rows: list[Row]) -> list[str]:
    fits = fitted_exponents(rows)
    if not fits:
        return []
    peers = list(dict.fromkeys(peer for _, peer in fits))
    sizes = {
        axis: [size for points in by_peer.values() for size, _ in points]
        for axis, by_peer in swept(rows).items()
    }
    body = []
    for axis in dict.fromkeys(axis for axis, _ in fits):
        cells = [axis, f"{min(sizes[axis]):g} to {max(sizes[axis]):g}"]
        for peer in peers:
            exponent, r2 = fits.get((axis, peer), (None, 0.0))
            cells.append(_DASH if exponent is None else f"{exponent:.2f} (R² {r2:.3f})")
        body.append(cells)
    return _table(["axis", "sizes", *peers], body, 2)


def _floor(rows: list[Row]) -> list[str]:
    body = []
    for row in rows:
        speed = row.floor_mb / row.p50_ms if row.floor_mb and row.p50_ms else None  # MB/ms = GB/s
        what = ", ".join(filter(None, (row.operation, row.direction, row.shape)))
        body.append([what, *map(_figure, (row.floor_mb, row.p50_ms, speed))])
    return _table(["what", "read and written (MB)", "time (ms)", "GB/s"], body, 1)


def operations_table() -> str:
    """Both operations and the two together: time, share of the floor, ratios, memory."""
    return _for_each_device(("prompt_path", "splice", "reconstruct"), _operations)


def training_table() -> str:
    """The whole training step: time, tokens, ratios, memory."""
    return _for_each_device(("training_step",), _training)


def inference_table() -> str:
    """Inference: time, tokens, ratios."""
    return _for_each_device(("inference",), _inference)


def serving_table() -> str:
    """Banks of adapters, prefix caches and folded positions: time, tokens, ratios."""
    return _for_each_device(("serving",), _inference)


def cold_start_table() -> str:
    """Import, first call and compile time of each peer."""
    return _for_each_device(("cold_start",), _cold_start)


def exponents_table() -> str:
    """How the time grows along each axis of the sweeps."""
    return _for_each_device(("sweeps",), _exponents)


def floor_table() -> str:
    """What the machine itself can do."""
    return _for_each_device(("floor",), _floor)


@dataclass(frozen=True)
class Goal:
    """A figure to reach.

    Attributes:
        text: the goal in words.
        kind: "gpu" or "cpu".
        find: the measured figures among one device's rows.
    """

    text: str
    kind: str
    find: Callable[[list[Row]], list[Finding]]


def _output_bytes(row: Row) -> float:
    """The size of the spliced text: [batch, m + length, d] in the embeddings' type."""
    size = (row.batch or 0) * ((row.num_virtual_tokens or 0) + (row.length or 0))
    return size * (row.hidden_size or 0) * _BYTES.get(row.embeddings, 0)


def _gradient_bytes(row: Row) -> float:
    """The size of the gradients of all parameters of operation 1 and 2."""
    d, r, k = row.hidden_size or 0, row.rank or 0, row.num_spaces or 0
    one = (row.num_virtual_tokens or 0) * d + ((row.max_length or 0) + d) * r
    one += k * (2 * d * (row.space_dim or 0) + d + 1)
    return max(1, row.tasks or 0) * one * _BYTES.get(row.parameters, 0)


def _of_copy(direction: str, least: float) -> Callable[[list[Row]], list[Finding]]:
    def find(rows: list[Row]) -> list[Finding]:
        return [
            (row.shape, f"{row.of_floor:.2f}", row.of_floor >= least)
            for row in rows
            if row.suite == "splice" and row.direction == direction and is_ours(row)
            if not is_unpadded(row.shape)
            if row.embeddings == "bfloat16" and row.of_floor is not None
            if _output_bytes(row) >= 256e6
        ]

    return find


def _times_faster(peers: Sequence[str], least: float) -> Callable[[list[Row]], list[Finding]]:
    def find(rows: list[Row]) -> list[Finding]:
        return [
            (
                row.shape if len(peers) == 1 else f"{row.shape} ({row.peer})",
                f"{1 / row.ours_to_peer:.1f}",
                1 / row.ours_to_peer >= least,
            )
            for row in rows
            if row.suite == "prompt_path" and row.direction == "both" and row.peer in peers
            if row.embeddings == "bfloat16" and row.shape in ("t5-base", "llama-8b")
            if row.ours_to_peer
        ]

    return find


def _path_ratio(peer: str, most: float) -> Callable[[list[Row]], list[Finding]]:
    def find(rows: list[Row]) -> list[Finding]:
        name = shape_namer([row for row in rows if row.suite == "prompt_path"])
        return [
            (name(row), f"{row.ours_to_peer:.2f}", row.ours_to_peer <= most)
            for row in rows
            if row.suite == "prompt_path" and row.direction == "both" and row.peer == peer
            if row.ours_to_peer is not None and not is_unpadded(row.shape)
        ]

    return find


def _step_ratio(
    peer: str, most: float, backbone: str = "", lengths: str = ""
) -> Callable[[list[Row]], list[Finding]]:
    """Training shapes are named by their backbone and their lengths, with a space between."""

    def find(rows: list[Row]) -> list[Finding]:
        found = []
        for row in rows:
            model, _, text = row.shape.partition(" ")
            if row.suite != "training_step" or row.peer != peer or row.ours_to_peer is None:
                continue
            if backbone in ("", model) and lengths in ("", text):
                compiled = " compiled" if "compiled" in row.operation else ""
                figure = f"{row.ours_to_peer:.3f}"
                found.append((f"{row.shape}{compiled}", figure, row.ours_to_peer <= most))
        return found

    return find


def _workspace(most_mb: float) -> Callable[[list[Row]], list[Finding]]:
    def find(rows: list[Row]) -> list[Finding]:
        found = []
        for row in rows:
            if row.suite != "prompt_path" or row.direction != "both" or not is_ours(row):
                continue
            if is_unpadded(row.shape):
                continue
            if row.embeddings == "bfloat16" and row.peak_mb is not None:
                beyond = row.peak_mb - (_output_bytes(row) + _gradient_bytes(row)) / 1e6
                found.append((row.shape, f"{beyond:.1f} MB", beyond < most_mb))
        return found

    return find


_COMPILED = ("reference-compiled", "reference-max-autotune")
GOALS = (
    Goal(
        "splice forward: at least 0.90 of the copy bandwidth from 256 MB on",
        "gpu",
        _of_copy("forward", 0.90),
    ),
    Goal(
        "splice backward: at least 0.85 of the copy bandwidth from 256 MB on",
        "gpu",
        _of_copy("backward", 0.85),
    ),
    Goal(
        "prompt path, forward and backward: at least 5 times faster than the reference",
        "gpu",
        _times_faster(("reference",), 5),
    ),
    Goal(
        "prompt path, forward and backward: at least 2 times faster than the compiled reference",
        "gpu",
        _times_faster(_COMPILED, 2),
    ),
    Goal(
        "training step at T5-base: at most 1.01 of the frozen backbone's at the same length",
        "gpu",
        _step_ratio("backbone", 1.01, backbone="t5-base"),
    ),
    Goal(
        "prompt path: under 8 MB beyond the output and the gradients",
        "gpu",
        _workspace(8),
    ),
    Goal(
        "prompt path, forward and backward: at most 0.50 of the reference",
        "cpu",
        _path_ratio("reference", 0.50),
    ),
    Goal(
        "prompt path, forward and backward: at most 0.75 of the compiled reference",
        "cpu",
        _path_ratio("reference-compiled", 0.75),
    ),
    Goal(
        "training step, 20 to 40 tokens: at most 0.65 of PEFT's with 100 tokens",
        "cpu",
        _step_ratio("peft-100", 0.65, lengths="20-40"),
    ),
    Goal(
        "training step, 256 tokens: at most 0.95 of PEFT's with 100 tokens",
        "cpu",
        _step_ratio("peft-100", 0.95, lengths="256"),
    ),
)


def goals_table() -> str:
    """Each goal with what was measured, on each device of its kind."""
    by_kind: dict[str, list[list[Row]]] = {"gpu": [], "cpu": []}
    for rows in devices()[0]:
        by_kind["gpu" if _values(rows, "driver") else "cpu"].append(rows)
    body = []
    for goal in GOALS:
        kind = goal.kind.upper()
        if not by_kind[goal.kind]:
            body.append([goal.text, kind, f"not yet run on a {kind}", _DASH])
        for rows in by_kind[goal.kind]:
            found = goal.find(rows)
            missed = [label for label, _, met in found if not met]
            verdict = "yes" if not missed else f"no: {'; '.join(missed)}"
            body.append(
                [
                    goal.text,
                    _values(rows, "device"),
                    "; ".join(f"{label}: {figure}" for label, figure, _ in found) or "not measured",
                    verdict if found else _DASH,
                ]
            )
    body += _host_goals()
    return "\n".join(_table(["goal", "machine", "measured", "met"], body, 4)) + "\n"


def accuracy_table() -> str:
    """What ``python -m bench.accuracy report`` wrote."""
    return (RESULTS / "accuracy" / "results.md").read_text(encoding="utf-8")


def _ran_on() -> dict[str, str]:
    """The kernels that a first contact has launched, and on which devices."""
    found: dict[str, list[str]] = {}
    for folder in _published():
        facts = first_contact.Facts(folder / first_contact.FILE).read()
        of = next((fact for fact in facts if "device" in fact), {})
        for name in {name for fact in facts for name, _ in fact.get("launches", ())}:
            found.setdefault(name, []).append(f"{of.get('device')}, commit {of.get('commit')}")
    return {name: f"run on {'; '.join(devices)}" for name, devices in found.items()}


def compiled_table() -> str:
    """A line for each kernel from the table of ``python -m bench.compiled``."""
    with (RESULTS / "compiled" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = [
        f"| kernel | {' | '.join(targets)} | shared memory (bytes) | spills | on a GPU |",
        f"|---|{'---:|' * len(targets)}---:|---:|---|",
    ]
    ran = _ran_on()
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        mine = [row for row in rows if row["kernel"] == kernel]
        registers = [
            str(max(int(row["registers"]) for row in mine if row["target"] == target))
            for target in targets
        ]
        shared = max(int(row["shared"]) for row in mine)
        spills = sum(int(row["spills"]) for row in mine)
        lines.append(
            f"| `{kernel}` | {' | '.join(registers)} | {shared} | {spills} "
            f"| {ran.get(kernel, 'compiled, not yet run on a GPU')} |"
        )
    first = rows[0]
    lines += ["", f"triton {first['triton']}, {first['date']}, commit {first['commit']}."]
    return "\n".join(lines) + "\n"


def _host_cost() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of both files of ``python -m bench.host_cost``; none where it has not run."""
    found = []
    for name in (PATHS, LAUNCHES):
        path = RESULTS / HOST_COST / name
        if not path.is_file():
            return [], []
        with path.open(newline="", encoding="utf-8") as file:
            found.append(list(csv.DictReader(file)))
    return found[0], found[1]


def _with_interval(row: dict[str, str], column: str) -> str:
    middle, low, high = (row[column + end] for end in ("", "_low", "_high"))
    return f"{float(middle):.2f} ({float(low):.2f} to {float(high):.2f})" if middle else _DASH


def host_cost_lines(rows: list[dict[str, str]], launches: list[dict[str, str]]) -> list[str]:
    """A line for each path, direction and mask, and one for each launch."""
    works: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        work = (row["path"], row["direction"], row["mask"])
        works.setdefault(work, {})[row["peer"]] = row
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    header = ["what", "direction", "mask", *(f"{peer} (µs)" for peer in peers)]
    header += ["triton by reference", "triton by reference-compiled", "eager by reference"]
    header += ["launches", "allocations", "allocations of reference"]
    body = []
    for work, found in works.items():
        ours, plain = found["triton"], found["reference"]
        cells = [*work, *(_figure(float(found[peer]["p50_us"])) for peer in peers)]
        cells += [_with_interval(ours, f"by_{name}") for name in ("reference", "compiled")]
        cells += [_with_interval(found["eager"], "by_reference"), ours["launches"]]
        body.append([*cells, ours["allocations"], plain["allocations"]])
    lines = [*_table(header, body, 3), ""]
    body = [
        [f"`{row['kernel']}`", row["direction"], row["arguments"]]
        + [_figure(float(row[name])) for name in ("front_us", "launcher_us")]
        for row in launches
    ]
    sums = [sum(float(row[name]) for row in launches) for name in ("front_us", "launcher_us")]
    body.append(["all", "both", "", *map(_figure, sums)])
    header = ["kernel", "direction", "arguments", "front (µs)", "launcher below (µs)"]
    lines += [*_table(header, body, 2), ""]
    first = rows[0]
    parts = [first["device"], f"{first['threads']} thread", f"load {first['load']}"]
    parts += [f"{name} {first[name]}" for name in ("torch", "triton", "python", "commit")]
    parts += [first["date"], f"{first['rounds']} rounds of {first['calls']} calls"]
    return [*lines, ", ".join(parts) + "."]


def host_cost_table() -> str:
    """What ``python -m bench.host_cost`` wrote."""
    rows, launches = _host_cost()
    return "\n".join(host_cost_lines(rows, launches) if rows else ["Not measured yet."]) + "\n"


# The most that our host time may be, by the columns of the file.
_HOST_GOALS = {"reference": ("by_reference", 0.35), "compiled reference": ("by_compiled", 0.50)}


def _host_goals() -> list[list[str]]:
    """The lines of the goals in host time, with what was measured."""
    ours = [r for r in _host_cost()[0] if r["peer"] == "triton" and r["direction"] == "both"]
    body = []
    for peer, (column, most) in _HOST_GOALS.items():
        text = f"host time, forward and backward: at most {most:.2f} of the {peer}'s"
        found = [
            (f"{row['path']}{'' if row['mask'] == 'yes' else ', no mask'}", float(row[column]))
            for row in ours
            if row[column]
        ]
        missed = [label for label, value in found if value > most]
        body.append(
            [
                text,
                f"{ours[0]['device']}, libcuda a stub" if ours else "CPU",
                "; ".join(f"{label}: {value:.2f}" for label, value in found) or "not measured",
                (f"no: {'; '.join(missed)}" if missed else "yes") if found else _DASH,
            ]
        )
    return body


TABLES = {
    "goals": goals_table,
    "operations": operations_table,
    "training": training_table,
    "inference": inference_table,
    "serving": serving_table,
    "cold-start": cold_start_table,
    "host-cost": host_cost_table,
    "exponents": exponents_table,
    "floor": floor_table,
    "accuracy": accuracy_table,
    "compiled": compiled_table,
}


def fill(page: str) -> str:
    """The page with every table anew."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        page, found = pattern.subn(lambda m, t=table: f"{m[1]}\n{t()}\n{m[2]}", page)
        if found != 1:
            raise SystemExit(f"{PAGE}: expected one pair of comments for {name}, got {found}")
    return page


def main() -> None:
    """Rewrite the page in place; say which folders are not on it."""
    for reason in devices()[1]:
        print(f"left out: {reason}", file=sys.stderr)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
