"""Put the measured tables into ``docs/results.md``: ``python -m bench.page``.

The page has a pair of comments around each table; what stands between them is replaced by what the
files under ``bench/results`` say, so no figure on the page is typed by hand.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "bench" / "results"


def prompt_path_table() -> str:
    """Milliseconds and ratios of the prompt path on a CPU."""
    with (RESULTS / "cpu" / "prompt_path.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| shape | variant | forward (ms) | backward (ms) | to the reference | to it compiled |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for r in rows:
        forward, backward = float(r["forward_ms"]), float(r["backward_ms"])
        eager, compiled = float(r["ratio_to_reference"]), float(r["ratio_to_compiled"])
        lines.append(
            f"| {r['shape']} | {r['variant']} | {forward:.2f} | {backward:.2f} "
            f"| {eager:.2f} | {compiled:.2f} |"
        )
    first = rows[0]
    lines += [
        "",
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, "
        f"commit {first['commit']}, {first['rounds']} rounds.",
    ]
    return "\n".join(lines) + "\n"


def accuracy_table() -> str:
    """What ``python -m bench.accuracy report`` wrote."""
    return (RESULTS / "accuracy" / "results.md").read_text(encoding="utf-8")


def compiled_table() -> str:
    """A line for each kernel from the table of ``python -m bench.compiled``."""
    with (RESULTS / "compiled" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = [
        f"| kernel | {' | '.join(targets)} | shared memory (bytes) | spills | on a GPU |",
        f"|---|{'---:|' * len(targets)}---:|---:|---|",
    ]
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
            f"| compiled, not yet run on a GPU |"
        )
    first = rows[0]
    lines += ["", f"triton {first['triton']}, {first['date']}, commit {first['commit']}."]
    return "\n".join(lines) + "\n"


TABLES = {
    "prompt-path": prompt_path_table,
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


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
