"""Parameters whose values are spread over processes: by FSDP2, or by DeepSpeed ZeRO-3."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_whole", "fill", "gather", "has_values", "reshard", "writing_process"]

_PLAIN = (nn.Parameter, Tensor)


def check_whole(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError if this process holds a part of a tensor only."""
    if torch.compiler.is_compiling():
        return
    for name, tensor in tensors.items():
        if tensor is None or (type(tensor) in _PLAIN and not _is_partitioned(tensor)):
            continue  # soon, since every forward pass asks
        if _is_sharded(tensor):
            raise ValueError(
                f"{name}: expected a whole tensor, got one sharded by FSDP2: call the sharded "
                f"model itself, or name the method to "
                f"torch.distributed.fsdp.register_fsdp_forward_method"
            )
        if _is_partitioned(tensor):
            raise ValueError(
                f"{name}: expected a whole tensor, got one partitioned by DeepSpeed ZeRO-3, which "
                f"is not supported (FSDP2 is)"
            )


def has_values(tensor: Tensor) -> bool:
    """Whether this process holds all of the tensor's values: no part, and no shape alone."""
    return type(tensor) in _PLAIN and not tensor.is_meta and not _is_partitioned(tensor)


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors; if they are sharded, every process has to call this.

    Raises:
        ValueError: a partition of DeepSpeed ZeRO-3.
    """
    whole = {}
    for name, tensor in tensors.items():
        if _is_sharded(tensor):
            sharded: Any = tensor.detach()
            # Parameters kept on the CPU are gathered on a device that the processes can send from.
            whole[name] = sharded.to(sharded.device_mesh.device_type).full_tensor()
        else:
            check_whole({name: tensor})
            whole[name] = tensor.detach()
    return whole


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy whole values, which every process has, into tensors or this process's parts of them.

    Raises:
        ValueError: a partition of DeepSpeed ZeRO-3; no tensor is changed then.
    """
    check_whole({name: t for name, t in tensors.items() if not _is_sharded(t)})
    for name, tensor in tensors.items():
        value = values[name]
        if _is_sharded(tensor):
            from torch.distributed.tensor import distribute_tensor

            to: Any = tensor
            value = distribute_tensor(
                value.to(to.device), to.device_mesh, to.placements, src_data_rank=None
            )
        tensor.copy_(value)


def reshard(module: nn.Module) -> None:
    """Have FSDP2 free the whole tensors that a forward pass left, so that its own are in place.

    Otherwise a value copied into a parameter would be lost with the next step.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for child in module.modules():
            if isinstance(child, fsdp.FSDPModule):
                child.reshard()


@contextmanager
def writing_process(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """Whether this process is the one to write files; the others wait until it has.

    If nothing is sharded, every process that comes here writes.

    Raises:
        RuntimeError: on the processes that wait, if the one that writes failed.
    """
    meshes: list[Any] = [t.device_mesh for t in tensors if _is_sharded(t)]  # type: ignore[attr-defined]
    if not meshes:
        yield True
        return
    mesh = meshes[0]
    try:
        yield not any(mesh.get_coordinate())
    except BaseException:
        _any_failed(mesh, True)
        raise
    if _any_failed(mesh, False):
        raise RuntimeError(
            "save_pretrained: expected the process that writes to succeed, it failed"
        )


def _any_failed(mesh: Any, failed: bool) -> bool:
    import torch.distributed as dist

    flag = torch.tensor(int(failed), device=mesh.device_type)
    for group in mesh.get_all_groups():
        dist.all_reduce(flag, dist.ReduceOp.MAX, group)
    return bool(flag)


def _is_sharded(tensor: Tensor) -> bool:
    # Not imported here: it takes longer than the rest of the package, and without it none exist.
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(tensor, library.DTensor)


def _is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed, which keeps its state on the tensor, holds the values elsewhere."""
    status: Any = vars(tensor).get("ds_status")
    return status is not None and status.name != "AVAILABLE"
