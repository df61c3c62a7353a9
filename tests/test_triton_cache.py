"""Compiled kernels go to another machine in an archive, and Triton finds them there."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from bench import triton_cache
from tests.processes import python


def kernel(cache: Path, name: str, extensions: tuple[str, ...] = ("cubin", "json", "ptx")) -> Path:
    """A kernel as Triton leaves one behind; its folder."""
    place = cache / f"KEY{name}"
    place.mkdir(parents=True)
    files = [f"{name}.{extension}" for extension in extensions]
    for file in files:
        (place / file).write_text(f"code of {file}")
    listed = {"child_paths": {file: str(place / file) for file in files}}
    (place / f"__grp__{name}.json").write_text(json.dumps(listed))
    return place


def archive_of(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_kernel_is_found_at_its_new_place(tmp_path: Path) -> None:
    """The machine code and its description are kept, and the list names those files."""
    kernel(tmp_path / "old", "one")
    kernel(tmp_path / "old", "two")
    assert triton_cache.pack(tmp_path / "old", tmp_path / "a.tgz") == 2
    shutil.rmtree(tmp_path / "old")
    assert triton_cache.unpack(tmp_path / "a.tgz", tmp_path / "new") == 2
    for name in ("one", "two"):
        place = tmp_path / "new" / f"KEY{name}"
        listed = json.loads((place / f"__grp__{name}.json").read_text())["child_paths"]
        assert listed == {f"{name}.{e}": str(place / f"{name}.{e}") for e in ("cubin", "json")}
        assert {path.name for path in place.iterdir()} == {f"__grp__{name}.json", *listed}
        for file, path in listed.items():
            assert Path(path).read_text() == f"code of {file}"


def test_a_kernel_that_is_there_stays_and_half_of_one_is_replaced(tmp_path: Path) -> None:
    """Without its list a kernel is not there: its files may be cut off."""
    kernel(tmp_path / "old", "one")
    triton_cache.pack(tmp_path / "old", tmp_path / "a.tgz")
    there = kernel(tmp_path / "new", "one")
    (there / "one.cubin").write_text("other code")
    before = files(there)
    assert triton_cache.unpack(tmp_path / "a.tgz", tmp_path / "new") == 0
    assert files(there) == before
    (there / "__grp__one.json").unlink()
    assert triton_cache.unpack(tmp_path / "a.tgz", tmp_path / "new") == 1
    assert (there / "one.cubin").read_text() == "code of one.cubin"


@pytest.mark.parametrize("damaged", ["two.cubin", "two.json", "__grp__two.json", ""])
def test_a_kernel_that_is_half_written_is_left_out(tmp_path: Path, damaged: str) -> None:
    for name in ("one", "two", "three"):
        kernel(tmp_path / "old", name)
    if damaged:
        (tmp_path / "old" / "KEYtwo" / damaged).unlink()
    else:
        (tmp_path / "old" / "KEYtwo" / "__grp__two.json").write_text('{"child')
    assert triton_cache.pack(tmp_path / "old", tmp_path / "a.tgz") == 2
    triton_cache.unpack(tmp_path / "a.tgz", tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"KEYone", "KEYthree"}


@pytest.mark.parametrize(
    "name", ["../escaped", "KEY/../escaped", "..", "/escaped", "KEY/", "KEY/a/b", "escaped"]
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    """Nothing at all is written."""
    good = {"KEY/one.cubin": b"code", "KEY/__grp__one.json": b'{"child_paths": {}}'}
    archive = archive_of(tmp_path / "a.tgz", {**good, name: b"theirs"})
    with pytest.raises(ValueError, match=r"a\.tgz: expected files of KERNEL/NAME, got "):
        triton_cache.unpack(archive, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "escaped").exists()
    with tarfile.open(archive, "w:gz") as tar:
        entry = tarfile.TarInfo("KEY/one.cubin")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(entry)
    with pytest.raises(ValueError, match=r"got 'KEY/one.cubin'"):
        triton_cache.unpack(archive, tmp_path / "new")


def test_packing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier archive stays until the new one is whole."""
    kernel(tmp_path / "old", "one")
    archive = archive_of(tmp_path / "a.tgz", {})
    before = archive.read_bytes()
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(tarfile.TarFile, "addfile", Mock(side_effect=[None, full]))
    with pytest.raises(OSError, match="No space left"):
        triton_cache.pack(tmp_path / "old", archive)
    assert archive.read_bytes() == before


COMPILE = """
from bench import compiled, shapes

case = compiled.Splice(shapes.QUICK[0], ("bf16", "fp32"), mask=None)
uses = compiled.launches([case], ["sm_90"])
(launch,) = {use.launch for use in uses if use.launch.kernel == "splice_forward_kernel"}
print(compiled.problem(launch), end="")
"""


@pytest.mark.slow
def test_triton_finds_a_kernel_of_an_archive(tmp_path: Path) -> None:
    """It would leave its intermediate code beside one that it compiles again."""
    pytest.importorskip("triton", reason="Triton is not installed")

    def compile_into(cache: Path) -> None:
        done = python("-c", COMPILE, TRITON_CACHE_DIR=str(cache))
        assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr

    old, new = tmp_path / "old", tmp_path / "new"
    compile_into(old)
    assert any(name.endswith(".ptx") for name in files(old))
    assert triton_cache.pack(old, tmp_path / "a.tgz") == 1
    shutil.rmtree(old)
    assert triton_cache.unpack(tmp_path / "a.tgz", new) == 1
    before = files(new)
    compile_into(new)
    assert files(new) == before
