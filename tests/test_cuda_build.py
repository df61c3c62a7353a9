"""Building the CUDA library: the cache, the lock and the errors with a compiler that only notes its
calls; then the real library, compiled once, loaded with the torch at hand and put into a wheel.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ept_fast
from bench.abi import offences
from ept_fast.backends.cuda import build, library
from ept_fast.backends.cuda.build import ExtensionError
from ept_fast.ops.types import Flags, Needs, Parameters, Text
from tests.test_packaging import copy_of_the_sources, run

ARCHITECTURES = "80;90"
NAMES = ("forward", "backward")

needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="ninja is not installed")


# Architectures


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", ("90",)),
        ("9.0+PTX;80", ("80", "90+PTX")),
        ("sm_100, 90a 75", ("75", "90a", "100")),
        ("80;80", ("80",)),
        ("12.0;86", ("86", "120")),
    ],
)
def test_architectures_are_read(text: str, expected: tuple[str, ...]) -> None:
    assert build.parse_architectures(text) == expected


@pytest.mark.parametrize("text", ["70", "", "hopper", "80;ninety", "90+SASS", "8"])
def test_other_architectures_are_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"^EPT_FAST_CUDA_ARCHS: expected architectures from 75 on"
    ):
        build.parse_architectures(text)


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        (("80",), (80, 86, 89), (75, 90)),
        (("86",), (86, 89), (80, 90)),
        (("80+PTX",), (80, 90, 120), (75,)),
        (("90a",), (90,), (100,)),
        (("90a+PTX",), (90,), (100, 120)),
        (("75", "100"), (75, 100, 103), (80, 110, 120)),
        ((), (), (90,)),
    ],
)
def test_which_gpus_are_covered(
    architectures: tuple[str, ...], runs: tuple[int, ...], does_not: tuple[int, ...]
) -> None:
    assert all(build.covers(architectures, capability) for capability in runs)
    assert not any(build.covers(architectures, capability) for capability in does_not)


# With a compiler that only notes its calls

FAKE_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.1"; exit ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\n'; exit ;;
esac
echo "$*" >> '{log}'
sleep {seconds}
{fail}
while [ $# -gt 1 ]; do [ "$1" = -o ] && touch "$2"; shift; done
"""


class Workshop:
    """Sources, a compiler and a cache of a test's own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.log = folder / "calls"
        self.sources = folder / "csrc"
        self.sources.mkdir()
        for name in ("binding.cpp", "launch.cu", "kernels.h", "host.cpp"):
            (self.sources / name).write_text(f"// {name}\n")
        # Characters that a shell and ninja would read as something else.
        self.cache = folder / "a cache: $HOME"
        monkeypatch.setattr(build, "SOURCES", self.sources)
        monkeypatch.setenv("EPT_FAST_CACHE", str(self.cache))
        monkeypatch.delenv("MAX_JOBS", raising=False)
        self.monkeypatch = monkeypatch
        self.use_nvcc("13.0")

    def use_nvcc(self, version: str, fail: str = "", seconds: float = 0) -> Path:
        home = self.folder / f"cuda: $HOME {version}{' failing' if fail else ''}"
        nvcc = home / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True, exist_ok=True)
        script = FAKE_NVCC.format(version=version, log=self.log, fail=fail, seconds=seconds)
        nvcc.write_text(script)
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
        self.monkeypatch.setenv("CUDA_HOME", str(home))
        return nvcc

    def calls(self) -> list[str]:
        """Of the compiler so far: one a source, one that links."""
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return Workshop(tmp_path, monkeypatch)


ONE_BUILD = 4  # binding.cpp, launch.cu, record.cpp, the link


@needs_ninja
def test_a_second_build_is_a_look_into_the_cache(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    built = build.build(("80", "90"))
    assert built.is_file()
    assert built.is_relative_to(workshop.cache)
    assert len(workshop.calls()) == ONE_BUILD
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith("building the CUDA library for sm 80, 90 with nvcc 13.0.1")
    caplog.clear()
    (built.parent / "lock").unlink()  # as in a cache that others may read only
    assert build.build(("80", "90")) == built
    assert len(workshop.calls()) == ONE_BUILD
    assert caplog.messages == []
    assert [p.name for p in built.parent.iterdir()] == [build.LIBRARY]
    assert built.parent.stat().st_mode & 0o777 == 0o700


@needs_ninja
def test_the_compiler_is_given_the_flags(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EPT_FAST_CUDA_STRICT", "1")
    build.build(("80", "90+PTX"))
    (compiled,) = (call for call in workshop.calls() if "launch.cu " in call)
    include = Path(torch.__file__).parent / "include"
    for flag in (
        "-std=c++20 -O3 --fmad=true",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-Werror=all-warnings -Xcompiler=-Werror",
        "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 "
        "-gencode=arch=compute_90,code=compute_90",
        f"-isystem {include}",
    ):
        assert flag in compiled
    (linked,) = (call for call in workshop.calls() if "-shared" in call)
    assert "-cudart=static" in linked
    assert {word for word in linked.split() if word.startswith("-l")} == {"-ltorch", "-ltorch_cpu"}
    assert not [call for call in workshop.calls() if "host.cpp" in call]


CHANGES: dict[str, Callable[[Workshop], object]] = {
    "kernel": lambda shop: (shop.sources / "launch.cu").write_text("// other\n"),
    "header": lambda shop: (shop.sources / "kernels.h").write_text("// other\n"),
    "new header": lambda shop: (shop.sources / "more.h").write_text("// more\n"),
    "nvcc": lambda shop: shop.use_nvcc("13.1"),
    "flags": lambda shop: shop.monkeypatch.setenv("EPT_FAST_CUDA_STRICT", "1"),
    "torch": lambda shop: shop.monkeypatch.setattr(build, "_torch_version", lambda path: "2.99"),
}


@needs_ninja
@pytest.mark.parametrize("what", CHANGES)
def test_what_matters_is_built_anew(what: str, workshop: Workshop) -> None:
    before = build.build(("90",))
    CHANGES[what](workshop)
    after = build.build(("90",))
    assert after != before
    assert len(workshop.calls()) == 2 * ONE_BUILD


@needs_ninja
def test_what_does_not_matter_is_not(workshop: Workshop) -> None:
    before = build.build(("90",))
    (workshop.sources / "host.cpp").write_text("// other\n")
    (workshop.sources / "README.md").write_text("# other\n")
    assert build.build(("90",)) == before
    assert build.build(("80",)) != before


@needs_ninja
def test_a_gpu_newer_than_nvcc_gets_the_newest_ptx(workshop: Workshop) -> None:
    build.build(("120",))
    (compiled,) = (call for call in workshop.calls() if "launch.cu " in call)
    assert "code=sm_90 -gencode=arch=compute_90,code=compute_90" in compiled
    assert "120" not in compiled.replace(str(workshop.folder), "")
    with pytest.raises(ExtensionError, match=r"^nvcc 13\.0\.1 does not know sm 75$"):
        build.build(("75",))


PROCESS = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(message)s")
from ept_fast.backends.cuda import build
build.SOURCES = Path(sys.argv[1])
print(build.build(("90",)))
"""


@needs_ninja
def test_processes_that_start_at_once_build_once(root: Path, workshop: Workshop) -> None:
    workshop.use_nvcc("13.0", seconds=0.5)
    command = (sys.executable, "-c", PROCESS, str(workshop.sources))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, cwd=root, **pipes) for _ in range(3)]
    told = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * 3, told
    assert len({output for output, _ in told}) == 1
    assert len(workshop.calls()) == ONE_BUILD
    assert sum("building the CUDA library" in errors for _, errors in told) == 1


@needs_ninja
def test_a_failing_compiler_is_quoted(workshop: Workshop) -> None:
    workshop.use_nvcc("13.0", fail="seq 100; echo 'error: no such thing' >&2; exit 2")
    with pytest.raises(ExtensionError) as caught:
        build.build(("90",))
    first, *told = str(caught.value).splitlines()
    assert first.startswith("the CUDA library does not compile for sm 90 with ")
    assert first.endswith(" 13.0.1:")
    assert "error: no such thing" in told
    assert len(told) <= 40
    (folder,) = workshop.cache.iterdir()
    assert [p.name for p in folder.iterdir()] == ["lock"]
    workshop.use_nvcc("13.0")
    assert build.build(("90",)).is_file()


@needs_ninja
def test_what_a_killed_process_left_is_removed(workshop: Workshop) -> None:
    workshop.use_nvcc("13.0", seconds=60)
    command = (sys.executable, "-c", PROCESS, str(workshop.sources))
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, start_new_session=True)
    while not workshop.calls():
        assert process.poll() is None
    os.killpg(process.pid, 9)
    process.wait()
    (folder,) = workshop.cache.iterdir()
    assert len(list(folder.glob("building-*"))) == 1
    workshop.use_nvcc("13.0")
    built = build.build(("90",))
    assert sorted(p.name for p in built.parent.iterdir()) == [build.LIBRARY, "lock"]


# Tools


@pytest.fixture
def bare(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on its PATH but what a test puts there."""
    tools = workshop.folder / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    for name in ("CXX", "NVCC_CCBIN", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "_USUAL_NVCC", workshop.folder / "none" / "nvcc")
    monkeypatch.setattr(sys, "executable", str(workshop.folder / "python" / "bin" / "python"))
    return tools


def _put(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o700)


def test_missing_tools_are_named(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExtensionError, match=r"^a C\+\+ compiler was not found"):
        build.find_tools()
    _put(bare, "g++")
    with pytest.raises(
        ExtensionError, match=r"^ninja was not found on the PATH: pip install ninja"
    ):
        build.find_tools()
    _put(bare, "ninja")
    found = build.find_tools()
    assert (found.nvcc_version, found.torch_version) == ("13.0.1", torch.__version__)
    monkeypatch.delenv("CUDA_HOME")
    with pytest.raises(ExtensionError, match=r"^nvcc was not found: neither in CUDA_HOME nor on"):
        build.find_tools()


def test_ninja_is_found_beside_the_interpreter(bare: Path) -> None:
    _put(bare, "g++")
    beside = Path(sys.executable).parent
    beside.mkdir(parents=True)
    _put(beside, "ninja")
    assert build.find_tools().ninja == str(beside / "ninja")


def test_an_old_nvcc_is_refused(workshop: Workshop) -> None:
    workshop.use_nvcc("11.8")
    with pytest.raises(ExtensionError, match=r"^nvcc 11\.8\.1 is older than 12\.4$"):
        build.find_tools()


def test_an_nvcc_that_does_not_run_is_named(workshop: Workshop) -> None:
    workshop.use_nvcc("12.9").write_text("#!/no/such/shell\n")
    with pytest.raises(ExtensionError, match=r"nvcc does not start: No such file"):
        build.find_tools()


@pytest.mark.parametrize("missing", ["sources", "system"])
def test_where_it_cannot_be_built(
    missing: str, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "sources":
        (workshop.sources / "binding.cpp").unlink()
        expected = f"its sources are not in {workshop.sources}"
    else:
        monkeypatch.setattr(sys, "platform", "darwin")
        expected = "it is built on Linux only, this is darwin"
    with pytest.raises(ExtensionError) as caught:
        build.find_tools()
    assert str(caught.value) == expected


@needs_ninja
def test_a_cache_that_is_no_folder_is_named(workshop: Workshop) -> None:
    workshop.cache.write_text("")
    with pytest.raises(ExtensionError) as caught:
        build.build(("90",))
    user = "0" if os.geteuid() == 0 else f"0 or {os.geteuid()}"
    assert re.fullmatch(
        rf"EPT_FAST_CACHE: expected {re.escape(str(workshop.cache))} to be a folder of user {user} "
        rf"that no other can write, got -rw-r-.r-- of user {os.geteuid()}",
        str(caught.value),
    )
    assert workshop.calls() == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EPT_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build._cache_folder() == tmp_path / "ept_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build._cache_folder() == Path.home() / ".cache" / "ept_fast"


@pytest.mark.parametrize(
    ("home", "xdg"), [(None, None), ("here", None), ("", None), (None, "here"), ("/home/me", "./x")]
)
def test_without_a_home_there_is_no_cache(
    home: str | None, xdg: str | None, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workshop.folder)
    for name, value in (("EPT_FAST_CACHE", None), ("HOME", home), ("XDG_CACHE_HOME", xdg)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if not home:  # as of a user whom the system does not know
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ExtensionError, match=r"^EPT_FAST_CACHE: expected a folder, as the user's"):
        build.build(("90",))
    monkeypatch.setattr(library, "_capabilities", lambda: (90,))
    monkeypatch.setattr(library, "_PACKAGED", workshop.folder / "none")
    assert "EPT_FAST_CACHE: expected a folder" in library.state().text
    assert not library.state().usable
    assert {p.name for p in workshop.folder.iterdir()} <= {"csrc", "cuda: $HOME 13.0"}


# Who may have written it


def give_away(place: Path, shop: Workshop) -> None:
    """Make it another user's; only root really can."""
    if os.geteuid() == 0:
        os.chown(place, 54321, -1)
        return
    plain = Path.lstat

    def lstat(path: Path) -> os.stat_result:
        found = plain(path)
        return found if path != place else os.stat_result((*found[:4], 54321, *found[5:]))

    shop.monkeypatch.setattr(Path, "lstat", lstat)


def make_link(place: Path, shop: Workshop) -> None:
    """Leave a link there to what was there, which is as good as it was."""
    target = shop.cache / "elsewhere"
    place.rename(target)
    place.symlink_to(target)


def chmod(mode: int) -> Callable[[Path, Workshop], None]:
    return lambda place, shop: place.chmod(mode)


# What is done to the library (0), its folder (1), the cache (2) or the folder that is in (3), and
# how the error shows it.
HOLES: dict[str, tuple[int, Callable[[Path, Workshop], None], str]] = {
    "the library is another user's": (0, give_away, "a file ~ -rwxr-xr-x of user 54321"),
    "its folder is": (1, give_away, "a folder ~ drwx------ of user 54321"),
    "the cache is": (2, give_away, "a folder ~ drwx------ of user 54321"),
    "the folder above is": (3, give_away, "a folder ~ drwx------ of user 54321"),
    "the group can write the library": (0, chmod(0o775), "a file ~ -rwxrwxr-x of user "),
    "others can write it": (0, chmod(0o757), "a file ~ -rwxr-xrwx of user "),
    "the group can write its folder": (1, chmod(0o770), "a folder ~ drwxrwx--- of user "),
    "its folder is a /tmp": (1, chmod(0o1777), "a folder ~ drwxrwxrwt of user "),
    "the group can write the cache": (2, chmod(0o770), "a folder ~ drwxrwx--- of user "),
    "others can write above it": (3, chmod(0o707), "a folder ~ drwx---rwx of user "),
    "the library is a link": (0, make_link, "a file ~ lrwxrwxrwx of user "),
    "its folder is a link": (1, make_link, "a folder ~ lrwxrwxrwx of user "),
}


@needs_ninja
@pytest.mark.parametrize("built", [True, False], ids=["built", "to build"])
@pytest.mark.parametrize("hole", HOLES)
def test_what_others_can_write_is_neither_loaded_nor_built_in(
    hole: str, built: bool, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth, damage, shown = HOLES[hole]
    path = build.build(("90",))
    if depth and not built:
        path.unlink()
    place = (path, *path.parents)[depth]
    damage(place, workshop)
    before = workshop.calls()
    expected, _, got = shown.partition(" ~ ")
    message = f"EPT_FAST_CACHE: expected {re.escape(str(place))} to be {expected} of user .*{got}"
    with pytest.raises(ExtensionError, match=f"^{message}"):
        build.build(("90",))
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_capabilities", lambda: (90,))
    monkeypatch.setattr(library, "_PACKAGED", workshop.folder / "none")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"loaded {path}"))
    assert not library.state().usable
    assert re.search(message, library.state().text)
    with pytest.raises(ExtensionError, match=f"^{message}"):
        library.load()
    assert workshop.calls() == before


@needs_ninja
def test_a_cache_in_a_folder_for_all(workshop: Workshop) -> None:
    """As /tmp is: others cannot rename what is ours there."""
    workshop.cache.mkdir()
    workshop.cache.chmod(0o1777)
    assert build.build(("90",)) == build.build(("90",))
    assert len(workshop.calls()) == ONE_BUILD


@needs_ninja
@pytest.mark.parametrize("umask", [0o002, 0o000, 0o077], ids=oct)
def test_no_umask_opens_what_is_built(umask: int, workshop: Workshop) -> None:
    workshop.monkeypatch.setenv("EPT_FAST_CACHE", str(workshop.cache / "deep" / "down"))
    before = os.umask(umask)
    try:
        path = build.build(("90",))
        assert build.build(("90",)) == path
    finally:
        os.umask(before)
    assert len(workshop.calls()) == ONE_BUILD
    folders = list(path.parents)[:4]
    assert folders[3] == workshop.cache
    assert {stat.S_IMODE(p.stat().st_mode) for p in folders} == {0o700}
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert stat.S_IMODE((path.parent / "lock").stat().st_mode) == 0o600


@needs_ninja
def test_a_lock_is_neither_followed_nor_emptied(workshop: Workshop) -> None:
    path = build.build(("90",))
    path.unlink()
    lock, other = path.parent / "lock", workshop.folder / "other"
    lock.write_text("kept")
    assert build.build(("90",)) == path
    assert lock.read_text() == "kept"
    path.unlink()
    lock.rename(other)
    lock.symlink_to(other)
    with pytest.raises(
        ExtensionError, match=r"^EPT_FAST_CACHE: expected a folder to build .*: Too"
    ):
        build.build(("90",))
    assert other.read_text() == "kept"
    lock.unlink()
    lock.symlink_to(workshop.folder / "new")
    with pytest.raises(
        ExtensionError, match=r"^EPT_FAST_CACHE: expected a folder to build .*: Too"
    ):
        build.build(("90",))
    assert not (workshop.folder / "new").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_what_another_puts_there_meanwhile_is_not_loaded(workshop: Workshop) -> None:
    """In a folder for all, between the look into the cache and the lock."""
    workshop.cache.mkdir()
    workshop.cache.chmod(0o1777)
    plain = build._lock

    def late(path: Path) -> Any:
        (path.parent / build.LIBRARY).write_text("planted")
        for place in (path.parent, path.parent / build.LIBRARY):
            os.chown(place, 54321, 54321)
        return plain(path)

    workshop.monkeypatch.setattr(build, "_lock", late)
    with pytest.raises(ExtensionError, match="to be a file of user 0 that no other can write, got"):
        build.build(("90",))


# The real library


def _real_tools() -> build.Tools:
    try:
        return build.find_tools()
    except ExtensionError as error:
        pytest.skip(f"the CUDA library cannot be built here: {error}")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What builds of this module share, so that the library is compiled once."""
    _real_tools()
    return {
        "EPT_FAST_CACHE": str(tmp_path_factory.mktemp("a cache")),
        "EPT_FAST_CUDA_STRICT": "1",
        build.ENVIRONMENT: ARCHITECTURES,
    }


# Loads the library in a process of its own and tells what is there then.
LOAD = """
import json, sys
from pathlib import Path
import ept_fast, torch
from ept_fast.backends.cuda import library
exec(sys.argv.pop(1))
before = library.state()
library.load()
library.load()
after = library.state()
names = sys.argv[1:]
schemas = {n: str(getattr(torch.ops.ept_fast, f"cuda_{n}").default._schema) for n in names}
keys = {
    n: [k for k in ("CPU", "CUDA", "CompositeImplicitAutograd")
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"ept_fast::cuda_{n}", k)]
    for n in names
}
print(json.dumps({
    "before": before.text, "after": after.text, "path": str(after.path),
    "architectures": after.architectures, "schemas": schemas, "keys": keys,
}))
"""


@pytest.fixture(scope="module")
def loaded(root: Path, environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, "library._PACKAGED = Path('/none')", *NAMES],
        cwd=root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "building the CUDA library for sm 80, 90" in done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.mark.slow
def test_it_compiles_without_warnings_and_loads(loaded: dict[str, Any]) -> None:
    assert "would be built for sm_80, sm_90 on first use" in loaded["before"]
    assert loaded["after"].startswith("the CUDA library is built for sm_80, sm_90, loaded from")
    assert loaded["architectures"] == ["80", "90"]


@pytest.mark.slow
def test_operators_take_what_the_tuples_hold(loaded: dict[str, Any]) -> None:
    """The fields of the NamedTuples in their order, one by one."""

    def optional(*names: str) -> str:
        return "".join(f"Tensor? {name}, " for name in names)

    prompt, *others = Parameters._fields
    parameters = f"Tensor {prompt}, {optional(*others)}"
    needs = "".join(f"bool need_{name}, " for name in Needs._fields)
    types = {"scaling": "float", "activation": "int", "gate": "int", "temperature": "float"}
    flags = "".join(f"{types[name]} {name}, " for name in Flags._fields)
    assert loaded["schemas"] == {
        "forward": f"ept_fast::cuda_forward({parameters}{optional(*Text._fields)}{flags}"
        "bool fusion) -> Tensor[]",
        "backward": f"ept_fast::cuda_backward(Tensor grad, {parameters}"
        f"{optional('attention_mask', 'task_ids')}Tensor[] kept, {needs}{flags}"
        "bool fusion) -> Tensor[]",
    }


@pytest.mark.slow
def test_the_library_says_what_it_was_built_from(loaded: dict[str, Any]) -> None:
    tools = build.find_tools()
    assert build.read_record(Path(loaded["path"])) == build.Record(
        architectures=("80", "90"),
        nvcc=tools.nvcc_version,
        torch=torch.__version__,
        sources=build.sources_hash(),
    )


@pytest.mark.slow
def test_the_library_keeps_to_the_stable_abi(loaded: dict[str, Any]) -> None:
    assert offences(Path(loaded["path"])) == []


TOYS = {
    "c10": (
        "namespace c10 { void* allocator(); } void* toy() { return c10::allocator(); }",
        "_ZN3c109allocatorEv is not of the stable ABI",
    ),
    "python": (
        'extern "C" void Py_Initialize(); void toy() { Py_Initialize(); }',
        "Py_Initialize is not of the stable ABI",
    ),
    "no such function": (
        'extern "C" int aoti_torch_made_up(); int toy() { return aoti_torch_made_up(); }',
        "aoti_torch_made_up is not of the stable ABI",
    ),
    "newer than the target": (
        'extern "C" int torch_tag_core(); int toy() { return torch_tag_core(); }',
        "torch_tag_core is not of the stable ABI",
    ),
    "strong": (
        'extern "C" int aoti_torch_get_current_cuda_stream(int, void**); '
        "int toy() { return aoti_torch_get_current_cuda_stream(0, nullptr); }",
        "aoti_torch_get_current_cuda_stream is not weak, and a torch for CPUs has none",
    ),
}


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_the_abi_check_catches(toy: str, tmp_path: Path) -> None:
    source, offence = TOYS[toy]
    (tmp_path / "toy.cpp").write_text(source)
    built = tmp_path / "toy.so"
    compile_toy(tmp_path / "toy.cpp", built)
    assert offences(built) == [offence]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_the_abi_check_catches_a_library(tmp_path: Path) -> None:
    (tmp_path / "toy.cpp").write_text(
        'extern "C" int aoti_torch_device_type_cuda(); '
        "int toy() { return aoti_torch_device_type_cuda(); }"
    )
    folder = Path(torch.__file__).parent / "lib"
    built = tmp_path / "toy.so"
    compile_toy(tmp_path / "toy.cpp", built, "-Wl,--no-as-needed", f"-L{folder}", "-lc10")
    assert offences(built) == ["it is linked with libc10.so"]
    with pytest.raises(SystemExit, match="readelf failed"):
        offences(tmp_path / "toy.cpp")


def compile_toy(source: Path, built: Path, *options: str) -> None:
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", built, *options], check=True)


@pytest.mark.slow
def test_the_wheel_with_the_library(
    root: Path, environment: dict[str, str], loaded: dict[str, Any], tmp_path: Path
) -> None:
    source = copy_of_the_sources(root, tmp_path / "source")
    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--skip-dependency-check"),
        *("--outdir", tmp_path / "wheels", source),
        cwd=tmp_path,
        EPT_FAST_BUILD_CUDA="1",
        **environment,
    )
    (wheel,) = (tmp_path / "wheels").iterdir()
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, version, python, abi) == ("ept_fast", ept_fast.__version__, "py3", "none")
    assert platform.startswith("linux_")
    inside = f"ept_fast/backends/cuda/{build.LIBRARY}"
    with zipfile.ZipFile(wheel) as archive:
        assert [n for n in archive.namelist() if n.endswith((".so", ".o"))] == [inside]
        # Nothing is compiled twice: it is the one that was loaded above.
        assert archive.read(inside) == Path(loaded["path"]).read_bytes()
        archive.extractall(tmp_path / "site")
    # Where there is no compiler, and for a GPU that the library is built for.
    told = run(
        *(sys.executable, "-c", LOAD, "library._capabilities = lambda: (90,)", *NAMES),
        cwd=tmp_path / "site",
        PATH="/none",
        CUDA_HOME="/none",
        EPT_FAST_CACHE=str(tmp_path / "none"),
    )
    facts = json.loads(told.splitlines()[-1])
    assert facts["before"] == "the CUDA library is built for sm_80, sm_90, in the package"
    assert facts["path"] == str(tmp_path / "site" / inside)
    assert facts["schemas"] == loaded["schemas"]
    assert not (tmp_path / "none").exists()


def test_a_library_that_does_not_load_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / build.LIBRARY
    record = build.Record(("90",), "13.0.88", torch.__version__, build.sources_hash())
    broken.write_text(f"no library{build._record_text(record)}\0")
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_capabilities", lambda: (90,))
    monkeypatch.setattr(library, "_PACKAGED", broken)
    with pytest.raises(ExtensionError, match=rf"^the CUDA library {broken} does not load: "):
        library.load()
