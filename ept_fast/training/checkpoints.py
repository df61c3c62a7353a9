"""The checkpoints of a run: what marks one as whole, and which one a run goes on from."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from pathlib import Path

from ept_fast.storage.files import CheckpointError, read_adapter_json, write_json
from ept_fast.storage.untrusted import open_inside, shorten

__all__ = [
    "COMPLETE_FILE",
    "check_complete",
    "complete_checkpoints",
    "mark_complete",
    "newest_checkpoint",
    "remove_checkpoint",
    "sound_checkpoint",
]

# Written last and removed first: a checkpoint without it was cut off.
COMPLETE_FILE = "complete.json"

_logger = logging.getLogger("ept_fast")


def mark_complete(folder: Path) -> None:
    """Write the marker of a checkpoint, the SHA-256 of every file in it.

    Raises:
        CheckpointError: a file cannot be read.
        WriteError: the marker cannot be written.
    """
    write_json(folder / COMPLETE_FILE, {"sha256": _digests(folder)})


def check_complete(folder: Path) -> None:
    """Check every file of a checkpoint against its marker.

    Raises:
        CheckpointError: the marker is damaged or without digests, or a file is missing, unreadable
            or not the one that was written.
    """
    path = folder / COMPLETE_FILE
    written = read_adapter_json(path).get("sha256")
    if not isinstance(written, dict) or not written:
        raise CheckpointError(
            f"{path}: sha256: expected the digests of the checkpoint's files, "
            f"got {shorten(written)}"
        )
    found = _digests(folder)
    others = [name for name, digest in written.items() if found.get(name) != digest]
    if others:
        raise CheckpointError(
            f"{path}: sha256: expected the files that were written, "
            f"got others or none for {shorten(others)}"
        )


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file but the marker, by its name relative to the checkpoint."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / COMPLETE_FILE:
            with open_inside(path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            digests[path.relative_to(folder).as_posix()] = digest
    return digests


def complete_checkpoints(folder: Path, most: float = math.inf) -> list[Path]:
    """The checkpoints with a marker, of at most so many steps, from the oldest to the newest."""
    found = {}
    for path in folder.glob(f"checkpoint-*/{COMPLETE_FILE}"):
        steps = path.parent.name.removeprefix("checkpoint-")
        if steps.isdecimal() and int(steps) <= most:
            found[int(steps)] = path.parent
    return [found[steps] for steps in sorted(found)]


def newest_checkpoint(folder: Path, most: float = math.inf) -> Path | None:
    """The last of :func:`complete_checkpoints`, or None. Its files are not read."""
    found = complete_checkpoints(folder, most)
    return found[-1] if found else None


def sound_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint whose files are those that were written.

    Newer ones that are damaged are named in one warning each, and stay as they are. None if no
    checkpoint is complete.

    Raises:
        CheckpointError: every complete checkpoint is damaged.
    """
    damaged: list[str] = []
    for path in reversed(complete_checkpoints(folder)):
        try:
            check_complete(path)
        except (CheckpointError, OSError) as error:  # of a disk, too
            damaged.append(str(error))
            continue
        for reason in damaged:
            _logger.warning("%s; going on from %s", reason, path.name)
        return path
    if damaged:
        raise CheckpointError(
            f"{folder}: expected a checkpoint to resume from, got damaged ones only "
            f"(overwrite starts anew): {'; '.join(damaged)}"
        )
    return None


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, or what is left of one; nothing happens if there is none."""
    (folder / COMPLETE_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
