"""The package as it is installed: each kind of install really made, in a folder of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ept_fast

KINDS = ("editable", "wheel", "sdist")
SOURCES = ("ept_fast", "kernels", "csrc", "docs")
FOREIGN = ("kernels", "csrc", "bench", "tests")

# The core alone: both operations and the module, forward and backward.
CORE = """
import torch
from ept_fast import EPTConfig, FusedEPTPrompt, reconstruct_prompt, splice_prompt

table = torch.nn.Embedding(11, 8)
prompt = FusedEPTPrompt(EPTConfig(8, num_virtual_tokens=3, max_length=6, rank=2), table)
out = prompt(torch.tensor([[1, 2, 3]]))
out.inputs_embeds.sum().backward()
assert all(each.grad is not None for each in prompt.parameters() if each.requires_grad)
print(list(out.inputs_embeds.shape))
short = reconstruct_prompt(torch.ones(3, 8))
print(list(splice_prompt(short, input_ids=torch.tensor([[1]]), weight=table.weight).shape))
"""

# Imports what is named and prints the file of each module, None for a namespace folder.
PROBE = """
import importlib, json, sys
files = {}
for name in sys.argv[1:]:
    try:
        files[name] = getattr(importlib.import_module(name), "__file__", None)
    except ModuleNotFoundError as error:
        files[name] = f"not found: {error.name}"
print(json.dumps(files))
"""


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
    """The output of a command that has to succeed, without this process's Python path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environ,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def module_files(
    python: str | Path, *names: str, cwd: Path, **environ: str
) -> dict[str, str | None]:
    files: dict[str, str | None] = json.loads(
        run(python, "-c", PROBE, *names, cwd=cwd, **environ).splitlines()[-1]
    )
    return files


def copy_of_the_sources(root: Path, target: Path) -> Path:
    """What a build reads, links kept, so that nothing is written into the tree under test."""
    target.mkdir()
    for path in root.iterdir():
        if path.is_file():
            shutil.copy2(path, target)
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, target / name, symlinks=True, ignore=ignored)
    return target


@dataclass(frozen=True)
class Built:
    """The distributions: the wheel made from the tree, the sdist, and the wheel made from that."""

    wheel: Path
    sdist: Path
    sdist_wheel: Path


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    source = copy_of_the_sources(root, folder / "source")
    build = (sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check")
    run(*build, "--wheel", "--outdir", folder / "direct", source, cwd=folder)
    shutil.rmtree(source)
    copy_of_the_sources(root, source)  # so that nothing of the first build reaches the second
    run(*build, "--outdir", folder / "through_sdist", source, cwd=folder)
    (wheel,) = (folder / "direct").glob("*.whl")
    (sdist,) = (folder / "through_sdist").glob("*.tar.gz")
    (sdist_wheel,) = (folder / "through_sdist").glob("*.whl")
    return Built(wheel, sdist, sdist_wheel)


@dataclass(frozen=True)
class Install:
    """A virtual environment with one install of the package, and where its files should be."""

    python: Path
    package: Path


@pytest.fixture(scope="module")
def installs(
    root: Path, built: Built, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Install]:
    folder = tmp_path_factory.mktemp("installs")
    source = copy_of_the_sources(root, folder / "source")
    return {
        "editable": install(folder / "editable", "--editable", source),
        "wheel": install(folder / "wheel", built.wheel),
        "sdist": install(folder / "sdist", built.sdist),
    }


def install(home: Path, *what: str | Path) -> Install:
    """An environment with the package, and all that the one has that the tests run in."""
    home.parent.mkdir(exist_ok=True)
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    python = home / "bin" / "python"
    (packages,) = home.glob("lib/python*/site-packages")
    # The build backend is imported by the environment's own Python.
    (packages / "parent.pth").write_text(parent_packages())
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet")
    run(*pip, "--no-build-isolation", *what, cwd=home.parent)
    at = Path(what[-1]) if what[0] == "--editable" else packages
    return Install(python, at / "ept_fast")


@pytest.fixture(scope="module")
def core_installs(built: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Install]:
    """Environments with the package and its declared requirements, and theirs, alone."""
    folder = tmp_path_factory.mktemp("core")
    lent = folder / "lent"
    lent.mkdir()
    for entry in declared_files(built.wheel):
        (lent / entry.name).symlink_to(entry)
    installs = {
        "wheel": install(folder / "wheel", built.wheel),
        "sdist": install(folder / "sdist", built.sdist),
    }
    for each in installs.values():
        (each.package.parent / "parent.pth").write_text(f"{lent}\n")
    return installs


def declared_files(wheel: Path) -> set[Path]:
    """The top-level files and folders of the requirements without extras, and of theirs."""
    asked = metadata_of(wheel).get_all("Requires-Dist") or []
    found: dict[str, importlib.metadata.Distribution] = {}
    while asked:
        requirement = Requirement(asked.pop())
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[name] = importlib.metadata.distribution(name)
        asked += found[name].requires or []
    entries = set()
    for distribution in found.values():
        for file in distribution.files or ():
            if file.parts[0] not in ("..", "__pycache__"):
                entries.add(Path(str(distribution.locate_file(file.parts[0]))))
    return entries


def parent_packages() -> str:
    """A .pth file that lends the requirements of the environment the tests run in.

    Such a file adds folders only: the .pth files inside them, and so an editable install there,
    have no effect.
    """
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return "\n".join(sorted(paths)) + "\n"


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def metadata_of(wheel: Path, file: str = "METADATA") -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{file}"))
        return HeaderParser().parsestr(archive.read(name).decode())


def modules_of(root: Path) -> list[str]:
    """Every module of the package, by the files of the tree."""
    files = [p.relative_to(root) for p in (root / "ept_fast").rglob("*.py")]
    files += [Path("ept_fast") / p.relative_to(root) for p in (root / "kernels").rglob("*.py")]
    names = {".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in files}
    return sorted(name for name in names if not name.endswith("__main__"))


def test_wheel_holds_the_package_and_nothing_else(root: Path, built: Built) -> None:
    information = f"ept_fast-{ept_fast.__version__}.dist-info/"
    package = [name for name in names_in(built.wheel) if not name.startswith(information)]
    in_tree = {
        p.relative_to(root).as_posix()
        for p in (root / "ept_fast").rglob("*")
        if p.is_file() and p.suffix in {".py", ".typed", ".jsonl"}
    }
    in_tree |= {f"ept_fast/{p.relative_to(root)}" for p in (root / "kernels").rglob("*.py")}
    in_tree |= {f"ept_fast/csrc/{name}" for name in cuda_sources(root)}
    assert set(package) == in_tree


def cuda_sources(root: Path) -> set[str]:
    """What the CUDA library is built from, without what is for the tests."""
    names = {p.name for p in (root / "csrc").iterdir() if p.suffix in {".h", ".cu"}}
    assert "kernels.h" in names
    return names | {"binding.cpp"}


def test_wheel_is_pure(built: Built) -> None:
    assert built.wheel.name == f"ept_fast-{ept_fast.__version__}-py3-none-any.whl"
    assert not [name for name in names_in(built.wheel) if name.endswith((".so", ".o"))]
    assert metadata_of(built.wheel, "WHEEL")["Root-Is-Purelib"] == "true"


def test_both_wheels_hold_the_same(built: Built) -> None:
    assert names_in(built.wheel) == names_in(built.sdist_wheel)
    with zipfile.ZipFile(built.wheel) as one, zipfile.ZipFile(built.sdist_wheel) as other:
        for name in one.namelist():
            if not name.endswith("/RECORD"):
                assert one.read(name) == other.read(name), name


def test_sdist_holds_the_kernels_and_cuda_sources_once_and_no_links(
    root: Path, built: Built
) -> None:
    with tarfile.open(built.sdist) as archive:
        members = archive.getmembers()
    assert not [m.name for m in members if not (m.isfile() or m.isdir())]
    files = [m.name.split("/", 1)[1] for m in members if m.isfile()]
    assert {f for f in files if f.endswith(".py") and "kernels/" in f} == {
        f"ept_fast/{p.relative_to(root)}" for p in (root / "kernels").rglob("*.py")
    }
    suffixes = (".h", ".cu", ".cpp")
    assert {f for f in files if f.endswith(suffixes)} == {
        f"ept_fast/csrc/{name}" for name in cuda_sources(root)
    }
    documents = {"CITATION.cff", "LICENSE", "README.md", "SECURITY.md", "docs/index.md"}
    assert documents | {"pyproject.toml", "setup.py"} <= set(files)
    # The site shows files that the distribution does not have.
    assert not {"mkdocs.yml", "docs/hooks.py", "docs/docstrings.py"} & set(files)


def test_metadata(built: Built) -> None:
    metadata = metadata_of(built.wheel)
    assert metadata["Name"] == "ept-fast"
    assert metadata["Version"] == ept_fast.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    requirements = metadata.get_all("Requires-Dist") or []
    core = sorted(r for r in requirements if "extra ==" not in r)
    names = [Requirement(r).name for r in core]
    assert names == ["click", "numpy", "safetensors", "torch", "triton"]
    assert str(Requirement(core[-1]).marker) == 'platform_system == "Linux"'
    extras = {"train", "demo", "test", "bench", "docs", "dev"}
    assert extras <= set(metadata.get_all("Provides-Extra") or [])


def test_constraints_pin_every_requirement(root: Path, built: Built) -> None:
    pins = {}
    for line in (root / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    assert "+" not in "".join(pins.values())
    assert "ept-fast" not in pins
    for text in metadata_of(built.wheel).get_all("Requires-Dist") or []:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name not in {"ept-fast", "pip"}:
            assert requirement.specifier.contains(pins[name]), text


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_install(kind: str, root: Path, installs: dict[str, Install], tmp_path: Path) -> None:
    """Imports come from where it was put, no other top-level name does, and the script runs."""
    python, package = installs[kind].python, installs[kind].package
    names = {"ept_fast", "ept_fast.kernels.tiles", "ept_fast.reference"}
    if kind == "wheel":  # once is enough for those that import transformers
        assert names <= set(modules_of(root))
        names = set(modules_of(root))
    files = module_files(python, *FOREIGN, *names, cwd=tmp_path)
    for name in FOREIGN:
        # Another package of that name may be installed beside ours, and is then the one found.
        file = files.pop(name)
        assert file is not None, f"{name} is a namespace folder"
        mine = f"{package.parent}/{name}"
        assert file == f"not found: {name}" or not file.startswith(mine), file
    if kind == "wheel" and importlib.util.find_spec("vllm") is None:
        inside = ("adapters", "endpoints", "layer", "models", "scheduler")
        for name in (f"ept_fast.vllm.{part}" for part in inside):
            assert files.pop(name) == "not found: vllm"
    for name, file in files.items():
        assert file is not None, name
        expected = package.joinpath(*name.split(".")[1:])
        assert Path(file) in {expected.with_suffix(".py"), expected / "__init__.py"}, name
    assert ept_fast.__version__ in run(python.parent / "ept-fast", "--version", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_core_computes_with_what_it_declares(
    kind: str, core_installs: dict[str, Install], tmp_path: Path
) -> None:
    """The files of the requirements are lent by the environment the tests run in, and whatever the
    package does not declare is not there. tests/test_readme.py has pip download them instead.
    """
    python, package = core_installs[kind].python, core_installs[kind].package
    undeclared = ("transformers", "accelerate", "matplotlib", "peft", "packaging", "pytest")
    files = module_files(python, "ept_fast", *undeclared, cwd=tmp_path)
    assert files.pop("ept_fast") == str(package / "__init__.py")
    assert files == {name: f"not found: {name}" for name in undeclared}
    assert run(python, "-W", "error", "-c", CORE, cwd=tmp_path) == "[1, 6, 8]\n[1, 4, 8]\n"
    assert "transformers not installed" in run(python.parent / "ept-fast", "info", cwd=tmp_path)


def test_in_tree(root: Path) -> None:
    files = module_files(sys.executable, "ept_fast", "ept_fast.kernels.tiles", cwd=root)
    assert files["ept_fast"] == str(root / "ept_fast" / "__init__.py")
    assert files["ept_fast.kernels.tiles"] == str(root / "ept_fast" / "kernels" / "tiles.py")


@pytest.mark.slow
@pytest.mark.parametrize("order", ["tree first", "package first"])
@pytest.mark.parametrize("form", ["package", "module"])
def test_a_real_kernels_package_wins_in_the_tree(
    order: str, form: str, root: Path, tmp_path: Path
) -> None:
    real = tmp_path / ("kernels.py" if form == "module" else "kernels/__init__.py")
    real.parent.mkdir(exist_ok=True)
    real.write_text("")
    paths = [str(root), str(tmp_path)]
    if order == "package first":
        paths.reverse()
    # -P: the path is what PYTHONPATH says, without the current folder in front.
    probe = (sys.executable, "-P", "-c", PROBE, "kernels", "ept_fast.kernels.tiles")
    output = run(*probe, cwd=tmp_path, PYTHONPATH=os.pathsep.join(paths))
    files = json.loads(output.splitlines()[-1])
    assert files["kernels"] == str(real)
    assert files["ept_fast.kernels.tiles"] == str(root / "ept_fast" / "kernels" / "tiles.py")


def test_transformers_does_not_take_our_folder_for_the_kernels_package(root: Path) -> None:
    pytest.importorskip("transformers")
    code = (
        "import importlib.util\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(spec.origin is None, is_kernels_available())\n"
    )
    namespace, available = run(sys.executable, "-c", code, cwd=root).split()[-2:]
    if namespace != "True":
        pytest.skip("a package called kernels is installed here")
    assert available == "False"
