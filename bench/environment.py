"""Where a measurement was made: what every row of every result says of its origin."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from functools import cache
from pathlib import Path

import torch


def machine() -> str:
    """The processor and its number of cores."""
    name = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


@cache
def commit() -> str:
    """The source tree's commit, marked if files differ from it; ``COMMIT`` if it is set."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # no git
        return os.environ.get("COMMIT") or "unknown"
    return os.environ.get("COMMIT") or done.stdout.strip() or "unknown"


@cache
def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def origin_of(device: torch.device) -> dict[str, str]:
    """The columns of a row that say where, when and with what it was measured."""
    on_gpu = device.type == "cuda"
    # How threads wait for each other changes the time of every small operation.
    policy = os.environ.get("OMP_WAIT_POLICY", "").lower()
    return {
        "threads": f"{torch.get_num_threads()} {policy}".strip(),
        "device": torch.cuda.get_device_name(device) if on_gpu else machine(),
        "driver": _driver() if on_gpu else "",
        "cuda": (torch.version.cuda or "") if on_gpu else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "peft": _version("peft"),
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def slug(device: str) -> str:
    """The name of a device's folder under ``bench/results``."""
    plain = re.sub(r"\((r|tm)\)|\bcpu\b|@.*?(?=,|$)", " ", device.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
