"""The tables and the pictures of the study, from its records alone."""

from __future__ import annotations

from pathlib import Path


def report(out: Path, device: str | None = None) -> None:
    """Write the tables and pictures of one device."""
    raise SystemExit(f"{out}: not written yet ({device})")
