"""Launch configurations from documented heuristics: how much of a tensor one step works on.

A configuration depends on shapes and types alone, so the order of every sum, and with it every bit
of the result, is the same on each run.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EagerSpliceConfig", "eager_splice_config"]

# One tile of the text and the offset tile that is added to it stay together in the second-level
# caches of a few cores (1 MiB and more each on current server CPUs).
_TILE_BYTES = 512 * 1024
# Under this many positions the fixed cost of a tensor operation outweighs the cache.
_MIN_POSITIONS = 16
_DEVICE_TILE_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True)
class EagerSpliceConfig:
    """Tiles of the splice on a CPU.

    Attributes:
        positions: text positions a tile covers.
        rows: most rows of the batch that one tensor operation covers, where they lie side by side.
    """

    positions: int
    rows: int


def eager_splice_config(
    length: int, width: int, itemsize: int, device: str = "cpu"
) -> EagerSpliceConfig:
    """The tile for text of ``length`` positions, ``width`` channels, ``itemsize`` bytes an element.

    Tiles of one text are of nearly equal size. A device that is no CPU gets tiles large enough to
    fill it.
    """
    row_bytes = max(1, width * itemsize)
    budget = _TILE_BYTES if device == "cpu" else _DEVICE_TILE_BYTES
    most = max(budget // row_bytes, _MIN_POSITIONS)
    tiles = max(1, -(-length // most))
    positions = max(1, -(-length // tiles))
    return EagerSpliceConfig(positions=positions, rows=max(1, budget // (positions * row_bytes)))
