"""A process without ept_fast that loads a kernel repository, and what it computes.

python kernel_repository_child.py REPOSITORY CASES OUT [--library]
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FUNCTIONS = ("reconstruct_prompt", "splice_prompt", "reconstruct_and_splice")


class Absent(importlib.abc.MetaPathFinder):
    """Has no ept_fast found, wherever it is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "ept_fast":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load(variant: Path) -> ModuleType:
    """The module as the library ``kernels`` imports it: by its file, under its id."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def load_by_library(repository: Path) -> ModuleType:
    """The same by the library, which also reads the description and checks the digests."""
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    from kernels import get_local_kernel

    build = Build.open(repository)
    for backend in build.general.backends:
        variant = repository / "build" / f"torch-{str(backend).lower().removeprefix('backend.')}"
        described = Metadata.read_from_file(variant / "metadata.json")
        described.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    module: ModuleType = get_local_kernel(repository)
    return module


def results(module: Any, case: dict[str, Any], backend: str | None) -> list[torch.Tensor]:
    """The output and the gradients of all tensors that have one."""
    tensors = {
        name: value.clone().requires_grad_() if name in case["trained"] else value
        for name, value in case["tensors"].items()
    }
    out = getattr(module, case["function"])(**tensors, **case["choices"], backend=backend)
    trained = [tensors[name] for name in case["trained"]]
    return [out.detach(), *torch.autograd.grad(out, trained, case["grad"].to(out.dtype))]


class Compiled:
    """A module's functions, each compiled as one graph."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return torch.compile(getattr(self.module, name), fullgraph=True, backend="aot_eager")


def main() -> None:
    repository, cases, out = map(Path, sys.argv[1:4])
    sys.meta_path.insert(0, Absent())
    by_library = "--library" in sys.argv
    module = load_by_library(repository) if by_library else load(repository / "build/torch-cpu")
    given = torch.load(cases)
    found = [
        {"triton": results(module, case, "triton"), "default": results(module, case, None)}
        for case in given
    ]
    if not by_library:
        found[-1]["compiled"] = results(Compiled(module), given[-1], "triton")
    assert not [name for name in sys.modules if name.split(".")[0] == "ept_fast"]
    torch.save({"name": module.__name__, "all": module.__all__, "results": found}, out)


if __name__ == "__main__":
    main()
