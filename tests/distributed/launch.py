"""Starts two processes that work together, and what each of them begins and ends with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ["ROOT", "share", "together", "torchrun"]

ROOT = Path(__file__).resolve().parents[2]


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """Run two processes over gloo to their end, on a port that ``torchrun`` finds free."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    return subprocess.run(
        [*command, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@contextmanager
def together() -> Iterator[tuple[Path, int]]:
    """In one of the processes: the folder that it writes to, and its rank.

    The process ends with the block, without the interpreter's own end. PyTorch keeps the groups of
    a sharded model, and with them gloo's threads, and a thread that lets go of a tensor while the
    interpreter ends aborts the process ("terminate called without an active exception").
    """
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield Path(sys.argv[1]), dist.get_rank()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def share() -> slice:
    """This process's rows of a batch of 8; not as many as the other's."""
    return slice(5, 8) if dist.get_rank() else slice(0, 5)
