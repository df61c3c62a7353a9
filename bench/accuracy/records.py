"""The records of finished runs: one line of ``runs.jsonl`` each."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.accuracy.study import Records, Run

RUNS_FILE = "runs.jsonl"


def read_records(out: Path) -> list[dict[str, Any]]:
    """Every record so far; a last line cut off by a kill is left out."""
    path = out / RUNS_FILE
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise SystemExit(f"{path}, line {number}: expected a JSON record") from None
    return records


def append_record(out: Path, record: dict[str, Any]) -> None:
    """Add one line, and mend a last line that a kill cut off."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / RUNS_FILE
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        last = content[content.rfind(b"\n") + 1 :]
        if last:
            try:
                json.loads(last)
            except ValueError:
                file.truncate(len(content) - len(last))
            else:  # only the end of the line is missing
                file.write(b"\n")
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def device_of(record: dict[str, Any]) -> str:
    """The device that a record was made on; old records name the machine, which was a CPU."""
    return str(record.get("device") or record.get("machine") or "unknown device")


def done_runs(records: Iterable[dict[str, Any]], device: str) -> Records:
    """The records of training runs on one device, by the run's key."""
    names = [field.name for field in dataclasses.fields(Run)]
    return {
        Run(**{name: record[name] for name in names}).key: record
        for record in records
        if device_of(record) == device
    }
