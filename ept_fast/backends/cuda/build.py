"""Builds the CUDA library from ``csrc``: finds the tools, compiles with ninja, keeps the result.

``setup.py`` runs this file before the package is installed, so it imports the standard library only
and reads torch's files without importing torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import mmap
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = [
    "ENVIRONMENT",
    "LIBRARY",
    "SOURCES",
    "STABLE_ABI",
    "WHEEL_ARCHITECTURES",
    "ExtensionError",
    "Record",
    "Tools",
    "build",
    "cached",
    "covers",
    "find_tools",
    "is_built",
    "known_architectures",
    "parse_architectures",
    "read_record",
    "sources_hash",
]

LIBRARY = "ept_fast_cuda.so"
ENVIRONMENT = "EPT_FAST_CUDA_ARCHS"
WHEEL_ARCHITECTURES = ("75", "80", "86", "89", "90", "100+PTX")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # that of torch 2.10
SOURCES = Path(__file__).resolve().parents[2] / "csrc"

_OLDEST_ARCHITECTURE = 75
_OLDEST_NVCC = (12, 4)  # the first with __maxnreg__
_USUAL_NVCC = Path("/usr/local/cuda/bin/nvcc")
_NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    "--fmad=true",  # pinned: contraction decides the last bit of every result
    STABLE_ABI,
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden",
    "-Xcompiler=-Wall,-Wextra,-Wno-unknown-pragmas",  # `#pragma unroll` is nvcc's own
)
_STRICT_FLAGS = ("-Werror=all-warnings", "-Xcompiler=-Werror")
# torch has no symbol that the linker would see a need for in libtorch.so; the GPU's are behind it.
_LINK_FLAGS = (
    "-shared",
    "-cudart=static",
    "-Xlinker=--no-undefined",
    "-Xlinker=--no-as-needed",
    "-ltorch",
    "-ltorch_cpu",
)
_RECORD = b"ept_fast_cuda_record="
_TOLD_LINES = 40

_logger = logging.getLogger("ept_fast")


class ExtensionError(RuntimeError):
    """The CUDA library cannot be built or loaded; the message says why."""


@dataclass(frozen=True)
class Tools:
    """What a build runs, and the torch it compiles against."""

    nvcc: str
    nvcc_version: str
    host_compiler: str
    ninja: str
    torch: str
    torch_version: str


@dataclass(frozen=True)
class Record:
    """What a library says it was built from; it stands in the library itself."""

    architectures: tuple[str, ...]
    nvcc: str
    torch: str
    sources: str


# Architectures: "80", "90a", "100+PTX"


def parse_architectures(text: str) -> tuple[str, ...]:
    """The architectures of ``EPT_FAST_CUDA_ARCHS``, in order and without repeats.

    Example:
        >>> parse_architectures("9.0+PTX;80")
        ('80', '90+PTX')
    """
    found = set()
    for word in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)(\+PTX)?", word)
        if match is None or int(match[1] + match[2]) < _OLDEST_ARCHITECTURE:
            raise ValueError(
                f"{ENVIRONMENT}: expected architectures from {_OLDEST_ARCHITECTURE} on, such as "
                f"'80;90+PTX', got {text!r}"
            )
        found.add("".join(part or "" for part in match.groups()))
    return tuple(sorted(found, key=lambda name: (_number(name), name)))


def _number(architecture: str) -> int:
    return int(re.match(r"\d+", architecture)[0])  # type: ignore[index]  # parsed before


def covers(architectures: tuple[str, ...], capability: int) -> bool:
    """Whether code for these runs on a GPU of this capability (90 for sm_90).

    Machine code runs on later GPUs of its generation, PTX on all later ones, and code for "90a" on
    that capability alone.
    """
    return any(_runs_on(architecture, capability) for architecture in architectures)


def _runs_on(architecture: str, capability: int) -> bool:
    number = _number(architecture)
    if architecture.removesuffix("+PTX").endswith("a"):
        return number == capability
    later = architecture.endswith("+PTX") or number // 10 == capability // 10
    return later and number <= capability


def _gencode(architectures: tuple[str, ...]) -> list[str]:
    flags = []
    for architecture in architectures:
        name = architecture.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


def known_architectures(wanted: tuple[str, ...], tools: Tools) -> tuple[str, ...]:
    """Those that nvcc compiles for; for GPUs newer than it, PTX of the newest it knows."""
    listed = _output_of(tools.nvcc, "--list-gpu-arch")
    known = sorted(int(number) for number in re.findall(r"compute_(\d+)\b", listed))
    chosen = {name for name in wanted if _number(name) in known}
    if len(chosen) < len(wanted):
        below = [number for number in known if number <= max(map(_number, wanted))]
        if not below:
            raise ExtensionError(f"nvcc {tools.nvcc_version} does not know sm {', '.join(wanted)}")
        chosen -= {str(below[-1])}
        chosen.add(f"{below[-1]}+PTX")
    return tuple(sorted(chosen, key=lambda name: (_number(name), name)))


# Tools


def find_tools() -> Tools:
    """The tools of a build; an ExtensionError names the one that is missing."""
    if sys.platform != "linux":
        raise ExtensionError(f"it is built on Linux only, this is {sys.platform}")
    if not SOURCES.joinpath("binding.cpp").is_file():
        raise ExtensionError(f"its sources are not in {SOURCES}")
    nvcc = _find_nvcc()
    version = _nvcc_version(nvcc)
    host = _first_found(os.environ.get("NVCC_CCBIN"), os.environ.get("CXX"), "g++")
    if host is None:
        raise ExtensionError("a C++ compiler was not found: neither CXX nor g++ on the PATH")
    # A ninja that pip installed lies beside the interpreter, which need not be on the PATH.
    ninja = _first_found("ninja", str(Path(sys.executable).parent / "ninja"))
    if ninja is None:
        raise ExtensionError("ninja was not found on the PATH: pip install ninja")
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ExtensionError("torch is not installed")
    torch = Path(spec.origin).parent
    return Tools(nvcc, version, host, ninja, str(torch), _torch_version(torch))


def _first_found(*names: str | None) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    names = [*(str(Path(home, "bin", "nvcc")) for home in homes), "nvcc", str(_USUAL_NVCC)]
    nvcc = _first_found(*names)
    if nvcc is None:
        raise ExtensionError(
            f"nvcc was not found: neither in CUDA_HOME nor on the PATH nor at {_USUAL_NVCC}"
        )
    return nvcc


@functools.cache
def _nvcc_version(nvcc: str) -> str:
    match = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", _output_of(nvcc, "--version"))
    if match is None:
        raise ExtensionError(f"{nvcc} --version tells no version")
    version = ".".join(match.groups())
    if (int(match[1]), int(match[2])) < _OLDEST_NVCC:
        oldest = ".".join(map(str, _OLDEST_NVCC))
        raise ExtensionError(f"nvcc {version} is older than {oldest}")
    return version


@functools.cache
def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise ExtensionError(f"{command[0]} does not start: {error.strerror}") from error
    if done.returncode:
        raise ExtensionError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def _torch_version(torch: Path) -> str:
    match = re.search(r"__version__ = '(.+)'", (torch / "version.py").read_text())
    if match is None:
        raise ExtensionError(f"{torch / 'version.py'} tells no version")
    return match[1]


# What is compiled, and what the result is called


def _compiled() -> list[Path]:
    return [*sorted(SOURCES.glob("*.cu")), SOURCES / "binding.cpp"]


def sources_hash() -> str:
    """A hash of all that the library is compiled from; empty if they are not there."""
    if not SOURCES.joinpath("binding.cpp").is_file():
        return ""
    digest = hashlib.sha256()
    for path in sorted([*_compiled(), *SOURCES.glob("*.h"), *SOURCES.glob("*.cuh")]):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _flags(architectures: tuple[str, ...]) -> list[str]:
    strict = _STRICT_FLAGS if os.environ.get("EPT_FAST_CUDA_STRICT") == "1" else ()
    return [*_NVCC_FLAGS, *strict, *_gencode(architectures)]


def _key(architectures: tuple[str, ...], tools: Tools) -> str:
    host_version = _output_of(tools.host_compiler, "--version").partition("\n")[0]
    facts = [
        sources_hash(),
        *_flags(architectures),
        *_LINK_FLAGS,
        tools.nvcc_version,
        host_version,
        tools.torch_version,
        platform.machine(),
    ]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:20]


def _cache_folder() -> Path:
    """``EPT_FAST_CACHE``, or ``ept_fast`` in the user's cache folder; links followed."""
    chosen = os.environ.get("EPT_FAST_CACHE")
    if chosen:
        return Path(os.path.realpath(chosen))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise ExtensionError(
            f"EPT_FAST_CACHE: expected a folder, as the user's own cache has no absolute path "
            f"({base}), got none"
        )
    return Path(os.path.realpath(os.path.join(base, "ept_fast")))


def cached(architectures: tuple[str, ...], tools: Tools) -> Path:
    """The path of the library for these architectures, built or not.

    Raises:
        ExtensionError: this user has no cache folder.
    """
    return _cache_folder() / f"cuda-{_key(architectures, tools)}" / LIBRARY


def is_built(library: Path) -> bool:
    """Whether the cache has the library.

    Raises:
        ExtensionError: another user than this one and root could have put it there or could replace
            it, by owning it or a folder above it, or by a mode that lets others write. In a folder
            with the sticky bit, such as ``/tmp``, others replace nothing of ours; the library's own
            folder may not be one.
    """
    users = sorted({0, os.geteuid()})
    for depth, place in enumerate((library, *library.parents)):
        try:
            found = place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ExtensionError(
                f"EPT_FAST_CACHE: expected a folder to look into, got {place}: {error.strerror}"
            ) from error
        kind, expected = (stat.S_ISDIR, "a folder") if depth else (stat.S_ISREG, "a file")
        sticky = depth > 1 and found.st_mode & stat.S_ISVTX
        open_to_others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky
        if not kind(found.st_mode) or found.st_uid not in users or open_to_others:
            raise ExtensionError(
                f"EPT_FAST_CACHE: expected {place} to be {expected} of user "
                f"{' or '.join(map(str, users))} that no other can write, got "
                f"{stat.filemode(found.st_mode)} of user {found.st_uid}"
            )
    return library.exists()


def read_record(library: Path) -> Record | None:
    """What the library was built from, read from its file; None if it does not say."""
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
            start = m.find(_RECORD)
            if start < 0:
                return None
            start += len(_RECORD)
            facts = json.loads(m[start : m.find(b"\0", start)])
            return Record(**facts | {"architectures": tuple(facts["architectures"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


# Building


def build(architectures: tuple[str, ...]) -> Path:
    """The library for these architectures, compiled unless the cache has it.

    Of several processes that ask at once, one compiles and the others wait for it.

    Raises:
        ExtensionError: a tool is missing, the cache cannot be written or is open to others, or the
            compiler fails.
    """
    tools = find_tools()
    architectures = known_architectures(architectures, tools)
    library = cached(architectures, tools)
    if is_built(library):
        return library
    try:
        for folder in (*reversed(library.parent.parents), library.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        with _lock(library.parent / "lock"):
            if not is_built(library):
                _compile(library, architectures, tools)
    except OSError as error:
        raise ExtensionError(
            f"EPT_FAST_CACHE: expected a folder to build the CUDA library in, got "
            f"{library.parent.parent}: {error.strerror}"
        ) from error
    return library


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time, and let go when a process ends in whatever way."""
    import fcntl

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.warning("another process builds the CUDA library: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _compile(library: Path, architectures: tuple[str, ...], tools: Tools) -> None:
    names = ", ".join(architectures)
    _logger.warning(
        "building the CUDA library for sm %s with nvcc %s, once, into %s: this can take minutes",
        names,
        tools.nvcc_version,
        library.parent,
    )
    for left in library.parent.glob("building-*"):  # by a process that was ended
        shutil.rmtree(left, ignore_errors=True)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="building-", dir=library.parent))
    try:
        record = Record(architectures, tools.nvcc_version, tools.torch_version, sources_hash())
        (folder / "record.cpp").write_text(_record_source(record))
        (folder / "build.ninja").write_text(_ninja_file(folder, architectures, tools))
        jobs = os.environ.get("MAX_JOBS")
        command = [tools.ninja, "-C", str(folder), *(["-j", jobs] if jobs else [])]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
        if done.returncode:
            told = "\n".join(done.stdout.rstrip().splitlines()[-_TOLD_LINES:])
            raise ExtensionError(
                f"the CUDA library does not compile for sm {names} with {tools.nvcc} "
                f"{tools.nvcc_version}:\n{told}"
            )
        (folder / LIBRARY).chmod(0o755)  # whatever the umask: others must not write to it
        os.replace(folder / LIBRARY, library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _logger.info("built the CUDA library in %.0f s", time.monotonic() - began)


def _record_text(record: Record) -> str:
    return _RECORD.decode() + json.dumps(asdict(record))


def _record_source(record: Record) -> str:
    return (
        'extern "C" {\n'
        '__attribute__((visibility("default"))) extern const char ept_fast_cuda_record[];\n'
        f"const char ept_fast_cuda_record[] = {json.dumps(_record_text(record))};\n"
        "}\n"
    )


def _ninja_file(folder: Path, architectures: tuple[str, ...], tools: Tools) -> str:
    compiler = [tools.nvcc, f"-ccbin={tools.host_compiler}"]
    torch = ["-isystem", f"{tools.torch}/include"]
    compile_command = _escaped([*compiler, *_flags(architectures), *torch])
    link_command = _escaped([*compiler, *_gencode(architectures), f"-L{tools.torch}/lib"])
    objects = {f"{path.name}.o": path for path in (*_compiled(), folder / "record.cpp")}
    lines = [
        "rule compile",
        f"  command = {compile_command} -c $in -o $out",
        "rule link",
        f"  command = {link_command} $in -o $out {_escaped(list(_LINK_FLAGS))}",
        *(f"build {name}: compile {_escaped_path(path)}" for name, path in objects.items()),
        f"build {LIBRARY}: link {' '.join(objects)}",
        f"default {LIBRARY}",
    ]
    return "\n".join(lines) + "\n"


def _escaped(command: list[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _escaped_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))
