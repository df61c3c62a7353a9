"""The encoder and the task data in one small folder, for a machine that has neither."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

LIMIT = 60 * 2**20  # bytes
_WEIGHTS = "model.safetensors"
# What loading the model and its tokenizer reads beside the weights, always or if it is there.
_FILES = ("config.json", "tokenizer.json")
_OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def pack(model: str, data: Path, out: Path, files: Sequence[str], limit: int = LIMIT) -> int:
    """Write ``out/model``, with float16 weights, and ``out/data`` with these files of the data.

    Nothing of ``out`` changes if this fails.

    Returns:
        Their size in bytes.

    Raises:
        SystemExit: a missing file, weights beyond float16, or more bytes than the limit.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        work = Path(folder)
        (work / "data").mkdir()
        _pack_model(Path(model), work / "model")
        for name in files:
            (work / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            _copy("--data", data / name, work / "data" / name)
        size = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
        if size > limit:
            raise SystemExit(
                f"--out: expected at most {limit / 2**20:.1f} MiB, got {size / 2**20:.1f} MiB"
            )
        for name in ("model", "data"):
            shutil.rmtree(out / name, ignore_errors=True)
        out.mkdir(exist_ok=True)
        for name in ("model", "data"):
            (work / name).rename(out / name)
    return size


def _pack_model(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    if not (source / _WEIGHTS).is_file():
        raise SystemExit(f"--model: expected a folder with {_WEIGHTS}, got {source}")
    target.mkdir(parents=True)
    tensors = load_file(source / _WEIGHTS)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.to(torch.float16)
            if not bool(torch.isfinite(tensors[name]).all()):
                raise SystemExit(f"--model: expected weights within float16, {name} is beyond")
    save_file(tensors, target / _WEIGHTS, metadata={"format": "pt"})
    for name in (*_FILES, *_OPTIONAL):
        if name in _FILES or (source / name).is_file():
            _copy("--model", source / name, target / name)


def _copy(option: str, source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise SystemExit(f"{option}: expected the file {source} ({error.strerror})") from None
