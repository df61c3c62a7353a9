"""The kernels as a repository of Hugging Face's library ``kernels``: built, read and run."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ept_fast
from tests import kernel_repository_child as child
from tools.kernel_repository.__main__ import BACKENDS, MODULE, reduced, write_repository

VARIANTS = [f"torch-{backend}" for backend in BACKENDS]
SETTING = "EPT_FAST_KERNELS_PYTHON"  # a Python that has torch, Triton and the library


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kernel") / "repository"
    write_repository(out, "someone/ept-prompt")
    return out


def cases() -> list[dict[str, Any]]:
    """Each function with all its tensors, on a batch with padding."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) / 2

    m, n, r, spaces, dim, d = 3, 7, 2, 2, 3, 10
    prompt = {
        "short_prompt": normal(m, d),
        "offset_a": normal(n, r),
        "offset_b": normal(r, d),
        "space_down": normal(spaces, d, dim),
        "space_up": normal(spaces, dim, d),
        "gate_weight": normal(d, spaces),
        "gate_bias": normal(spaces),
    }
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    offset = {name: prompt[name] for name in ("offset_a", "offset_b")}
    embedded = {"inputs_embeds": normal(2, 5, d), "attention_mask": mask}
    looked_up = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5], [0, 0, 6, 7, 8]]),
        "weight": normal(9, d),
        "attention_mask": mask,
    }
    frozen = ("weight", "input_ids", "attention_mask")
    found = []
    for function, tensors, choices, shape in (
        ("reconstruct_prompt", prompt, {"scaling": 0.7, "gate": "prompt"}, (m, d)),
        ("splice_prompt", {"prompt": normal(m, d)} | offset | embedded, {}, (2, m + 5, d)),
        ("reconstruct_and_splice", prompt | looked_up, {"scaling": 0.7}, (2, m + 5, d)),
    ):
        found.append(
            {
                "function": function,
                "tensors": tensors,
                "choices": choices,
                "trained": [name for name in tensors if name not in frozen],
                "grad": normal(*shape),
            }
        )
    return found


def wide(case: dict[str, Any]) -> dict[str, Any]:
    """The case in float64."""
    tensors = {k: v.double() if v.is_floating_point() else v for k, v in case["tensors"].items()}
    return {**case, "tensors": tensors, "grad": case["grad"].double()}


def check(repository: Path, folder: Path, python: str, *options: str) -> str:
    """Run the cases in another process; the name of the module there."""
    given = cases()
    torch.save(given, folder / "cases.pt")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    program = (child.__file__, str(repository), "cases.pt", "results.pt", *options)
    done = subprocess.run(
        [python, "-P", "-B", *program],
        cwd=folder,
        env=environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(folder / "results.pt")
    assert found["all"] == sorted(child.FUNCTIONS)
    for case, result in zip(given, found["results"], strict=True):
        # The definition in float64; the same code here; and plain PyTorch where nothing is named.
        for name, got in result.items():
            expected = child.results(ept_fast, wide(case), "reference")
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(
                    one.double(), other, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
        if os.environ.get("TRITON_INTERPRET") != "1":
            continue  # with a GPU, the package's kernels do not run on a CPU in this process
        same = child.results(ept_fast, case, "triton")
        for name in result.keys() - {"default"}:
            assert all(map(torch.equal, result[name], same)), name
    name: str = found["name"]
    return name


@pytest.mark.slow
def test_runs_without_the_package(repository: Path, tmp_path: Path) -> None:
    """Forward and backward in Triton's interpreter, in plain PyTorch and compiled."""
    name = check(repository, tmp_path, sys.executable)
    assert re.fullmatch(rf"_{MODULE}_cpu_[0-9a-f]{{12}}", name)


def library_python() -> str | None:
    """A Python that finds the library; the folder of that name in the tree is not it."""
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None:
        return sys.executable
    named = os.environ.get(SETTING)
    return named and os.path.abspath(named)


@pytest.mark.slow
def test_the_library_loads_it(repository: Path, tmp_path: Path) -> None:
    python = library_python()
    if python is None:
        pytest.skip(f"kernels is not installed here, and {SETTING} names no Python that has it")
    assert check(repository, tmp_path, python, "--library").startswith(f"_{MODULE}_")
    command = "from kernels.cli import main; main()"
    told = subprocess.run(
        [python, "-P", "-c", command, "info", str(repository), "--json"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert json.loads(told.stdout)["name"] == "ept-prompt"


def test_it_stands_beside_the_package(repository: Path) -> None:
    """In one process: no operator has the name of one of the package's, nor of another variant."""
    modules = [child.load(repository / "build" / variant) for variant in VARIANTS]
    case = cases()[2]
    expected = child.results(ept_fast, case, "eager")
    for module in modules:
        assert all(map(torch.equal, child.results(module, case, "eager"), expected))
        assert hasattr(getattr(torch.ops, module.__name__), "path_forward")
    assert len({module.__name__ for module in modules}) == len(BACKENDS)


def code_of(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(folder.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", [f"torch-ext/{MODULE}", *(f"build/{v}" for v in VARIANTS)])
def test_imports_are_relative_or_of_torch_triton_and_python(repository: Path, folder: str) -> None:
    root = repository / folder
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for path, tree in code_of(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert str(node.module).split(".")[0] in allowed, path
            elif isinstance(node, ast.ImportFrom):
                parent = path.parents[node.level - 1]
                assert parent.is_relative_to(root), path
                module = parent.joinpath(*(node.module or "").split("."))
                if module != root / "_ops" or folder.startswith("build"):  # the builder writes it
                    assert module.with_suffix(".py").is_file() or module.is_dir(), path


def test_layout(repository: Path) -> None:
    assert {path.name for path in repository.iterdir()} == {
        *("CARD.md", "LICENSE", "README.md", "build", "build.toml", "flake.nix", "torch-ext"),
    }
    described = tomllib.loads((repository / "build.toml").read_text())
    assert described["general"].pop("hub") == {"repo-id": "someone/ept-prompt"}
    assert described == {
        "general": {
            "name": "ept-prompt",
            "version": 0,
            "edition": 5,
            "license": "Apache-2.0",
            "backends": ["cpu", "cuda"],
        },
        "torch-noarch": {},
    }
    card = (repository / "README.md").read_text()
    assert card.startswith(
        "---\nlibrary_name: kernels\nlicense: apache-2.0\ntags:\n  - kernel\n---"
    )
    assert 'get_kernel("someone/ept-prompt", version=0)' in card
    assert "{{" not in card
    source = repository / "torch-ext" / MODULE
    files = {path.relative_to(source): path.read_bytes() for path in source.rglob("*.py")}
    for backend in BACKENDS:
        variant = repository / "build" / f"torch-{backend}"
        values = json.loads((variant / "metadata.json").read_text())
        assert values["id"] in (variant / "_ops.py").read_text()
        assert values["backend"] == {"type": backend}
        digests = values["digest"]["files"]
        built = {p.relative_to(variant): p.read_bytes() for p in variant.rglob("*.py")}
        assert {
            path.as_posix(): base64.b64encode(hashlib.sha256(data).digest()).decode()
            for path, data in built.items()
        } == digests
        del built[Path("_ops.py")]
        assert built == files


def test_kernels_are_the_packages(root: Path, repository: Path) -> None:
    """All but where they import from: the same lines."""
    source = repository / "torch-ext" / MODULE

    def lines(path: Path, package: str) -> list[str]:
        return re.sub(rf"from {package}", "from ", path.read_text(encoding="utf-8")).splitlines()

    own = sorted(path.relative_to(root) for path in (root / "kernels").rglob("*.py"))
    assert len(own) > 10
    for path in own:
        dots = r"\." * len(path.parts)
        assert lines(root / path, r"ept_fast\.?") == lines(source / path, dots), path


def test_nothing_else_is_in_it(repository: Path) -> None:
    source = repository / "torch-ext" / MODULE
    text = "".join(path.read_text(encoding="utf-8") for path in source.rglob("*.py"))
    assert '"ept_fast::' not in text
    assert len(re.findall(r'custom_op\(\s*add_op_namespace_prefix\("', text)) == 6
    assert "class EPTConfig" not in text
    folders = {path.relative_to(source).parts[0] for path in source.rglob("*") if path.is_dir()}
    assert folders == {"backends", "kernels", "ops", "storage"}
    assert {path.name for path in (source / "backends").iterdir()} == {
        *("__init__.py", "eager", "fused.py", "triton"),
    }


def test_a_folder_with_something_in_it_is_refused(repository: Path) -> None:
    before = sorted(repository.rglob("*"))
    with pytest.raises(FileExistsError, match=r"^out: expected an empty folder, got "):
        write_repository(repository, "someone/ept-prompt")
    assert sorted(repository.rglob("*")) == before


def test_reduced_keeps_what_names_need() -> None:
    source = '''"""Two sums."""
import math
import os
from a import b, c

UNUSED = os.sep
FACTOR = 2  # of the inner one


def inner(x):
    return FACTOR * math.floor(b(x))


@c
def outer(x):
    return inner(x)


class Other:
    pass
'''
    found = reduced(source, {"outer"})
    assert "UNUSED" not in found
    assert "os" not in found
    assert "Other" not in found
    names: dict[str, Any] = {"b": float, "c": lambda f: f}
    exec(found.replace("from a import b, c", ""), names)
    assert names["outer"](1.5) == 2
    assert "import b, c" in found
    assert "Two sums." in found
