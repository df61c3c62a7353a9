"""The rehearsal of a run on a GPU: its own judgement, not what it rehearses."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import rehearse, stand_ins
from bench.rehearse import Failed, Options

needs_cc = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("cc", "nm", "readelf")),
    reason="no C compiler or no binutils",
)


# The record of findings


def finding(kernel: str = "_kernel", text: str = "6 spills") -> dict[str, str]:
    fields = {"types": "bf16", "target": "sm_90", "shape": "base", "rule": "spills"}
    return {"kernel": kernel, "text": text, **fields}


def test_a_new_finding_fails_until_it_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearse, "RECORDS", tmp_path)

    def compiles(*found: dict[str, str], write: bool = False) -> str:
        def command(
            options: Options, name: str, limit: int, arguments: Sequence[str | Path]
        ) -> tuple[int, str]:
            report = {"triton": "3.6.0", "compilations": 1, "findings": found}
            Path(arguments[-1]).write_text(json.dumps(report))
            return int(bool(found)), ""

        monkeypatch.setattr(rehearse, "command", command)
        return rehearse.compile_kernels(Options(tmp_path, write))

    with pytest.raises(Failed, match="1 findings, 1 new"):
        compiles(finding())
    compiles(finding(), write=True)
    assert "renew" not in compiles(finding())
    with pytest.raises(Failed, match="2 findings, 1 new"):
        compiles(finding(), finding("_other_kernel"))
    assert "renew" in compiles()  # gone
    assert "renew" in compiles(finding(text="8 spills"))
    compiles(finding(text="8 spills"), write=True)
    assert "renew" not in compiles(finding(text="8 spills"))


def test_the_committed_record_is_of_the_machines_triton() -> None:
    (version,) = re.findall("^triton==(.*)$", rehearse.PINS.read_text(), re.MULTILINE)
    (record,) = rehearse.RECORDS.glob("findings-*.csv")
    assert record.name == f"findings-{version}.csv"
    assert {key[2] for key in rehearse.read_record(record)} <= {rehearse.TARGET}


# Versions


def test_differences_from_the_pins_are_found(tmp_path: Path) -> None:
    ours = importlib.metadata.version("pytest")
    pins = tmp_path / "pins.txt"
    pins.write_text(
        f"# pytest==0\n#= python==2.7\npytest=={ours}\nno-such-package==1.0\n"
        f"torch=={importlib.metadata.version('torch')}\n#= torch==0.4\n"
    )
    assert rehearse.version_differences(pins) == [
        f"python: {'.'.join(map(str, sys.version_info[:3]))} here, 2.7 on the machine",
        "no-such-package: missing here, 1.0 on the machine",
        f"torch: {importlib.metadata.version('torch')} here, 0.4 on the machine",
    ]


# Steps


def test_a_failing_step_loses_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(options: Options) -> str:
        raise Failed("two findings")

    def crashes(options: Options) -> str:
        raise ZeroDivisionError("a bug")

    steps = {"fails": fails, "crashes": crashes, "works": lambda options: "all well"}
    monkeypatch.setattr(rehearse, "STEPS", steps)
    assert rehearse.main(["--out", str(tmp_path)]) == 1
    table = capsys.readouterr().out.partition("\nstep ")[2].splitlines()
    assert [line.split()[0] for line in table[1:4]] == list(steps)
    assert "FAILED: two findings" in table[1]
    assert "FAILED: ZeroDivisionError('a bug')" in table[2]
    assert "all well" in table[3]
    assert rehearse.main(["works", "--out", str(tmp_path)]) == 0
    with pytest.raises(SystemExit):
        rehearse.main(["works", "everything"])
    assert "got everything" in capsys.readouterr().err


def test_a_command_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its last words, or if it is out of time; then it ends with what it started."""
    code = "import sys; print('the reason'); sys.exit(3)"
    with pytest.raises(Failed, match="part: exit status 3"):
        rehearse.succeed(Options(tmp_path), "part", 60, (sys.executable, "-c", code))
    assert "the reason" in capsys.readouterr().out
    assert "the reason" in (tmp_path / "part.log").read_text()
    late = tmp_path / "late"
    with pytest.raises(Failed, match="part: out of time after 1 s"):
        rehearse.command(
            Options(tmp_path), "part", 1, ("sh", "-c", f"(sleep 2; touch {late}) & sleep 60")
        )
    time.sleep(1.5)
    assert not late.exists()


# The stand-ins


def call(folder: Path) -> subprocess.CompletedProcess[str]:
    """The library is called in a process of its own, which the linker may end."""
    code = "import ctypes; print(ctypes.CDLL('./libours.so').own(), end='')"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


@needs_cc
def test_a_stand_in_takes_the_place_of_a_library(tmp_path: Path) -> None:
    """A library that calls one of NVIDIA's loads, and is told that there is no device."""

    def cc(*arguments: str) -> None:
        subprocess.run(["cc", "-shared", "-fPIC", *arguments], cwd=tmp_path, check=True)

    (tmp_path / "theirs.c").write_text("int cublasThing(void) { return 0; }")
    (tmp_path / "versions").write_text("libcublas.so.13 { *; };")
    (tmp_path / "ours.c").write_text(
        "int cublasThing(void); int own(void) { return cublasThing(); }"
    )
    name = "libcublas.so.13"
    cc("-o", name, f"-Wl,-soname,{name}", "-Wl,--version-script,versions", "theirs.c")
    cc("-o", "libours.so", "-Wl,-rpath,$ORIGIN", "ours.c", name)
    (tmp_path / name).unlink()
    assert name in call(tmp_path).stderr
    wanted = stand_ins.functions([tmp_path / "libours.so"])
    assert wanted == {name: {name: ["cublasThing"]}}
    stand_ins.build(tmp_path / name, wanted[name])
    done = call(tmp_path)
    assert done.stdout == "100", done.stderr


@needs_cc
def test_a_stand_in_names_its_error_in_a_text(tmp_path: Path) -> None:
    """A number in its place is an address, at which torch would read: a segmentation fault."""
    texts = ["cudaGetErrorString", "cudaGetErrorName", "cudnnGetErrorString"]
    numbers = ["cudaGetDevice", "cuGetErrorString", "nvrtcGetLoweredName"]
    stand_ins.build(tmp_path / "libcudart.so.13", {"libcudart.so.13": texts + numbers})
    library = ctypes.CDLL(str(tmp_path / "libcudart.so.13"))
    for name in texts:
        function = getattr(library, name)
        function.restype = ctypes.c_void_p
        address = function(100)
        assert address != 100
        assert b"no CUDA device" in ctypes.string_at(address)
    assert [getattr(library, name)() for name in numbers] == [100] * 3
