"""Triton's cache in one small file, for another machine of the same versions.

    python -m bench.triton_cache pack ARCHIVE      # from TRITON_CACHE_DIR
    python -m bench.triton_cache unpack ARCHIVE    # into it

Of each kernel only the machine code and its description are kept, and the paths that Triton has
written into a kernel's list of files are made those of the new place.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

_GROUP = "__grp__"
_KEPT = (".cubin", ".hsaco", ".json")


def pack(folder: Path, archive: Path) -> int:
    """Write the kernels of a cache folder to an archive, whole or not at all.

    Returns:
        The number of kernels.
    """
    temporary = archive.with_suffix(".tmp")
    count = 0
    with tarfile.open(temporary, "w:gz") as tar:
        for group in sorted(folder.glob(f"*/{_GROUP}*.json")):
            try:
                files = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
                kept = sorted(name for name in files if name.endswith(_KEPT))
                contents = {name: (group.parent / name).read_bytes() for name in kept}
            except (OSError, ValueError, KeyError):
                continue  # a compiler is at work on it
            contents[group.name] = json.dumps({"child_paths": {n: n for n in kept}}).encode()
            for name, content in contents.items():
                entry = tarfile.TarInfo(f"{group.parent.name}/{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            count += 1
    temporary.replace(archive)
    return count


def unpack(archive: Path, folder: Path) -> int:
    """Put an archive's kernels into a cache folder; kernels that are there already stay.

    Returns:
        The number of kernels that were added.
    """
    kernels: dict[str, dict[str, bytes]] = {}
    with tarfile.open(archive) as tar:
        for entry in tar:
            file = tar.extractfile(entry) if entry.isfile() else None
            parts = entry.name.split("/")
            if file is None or len(parts) != 2 or not {"", ".", ".."}.isdisjoint(parts):
                raise ValueError(f"{archive}: expected files of KERNEL/NAME, got {entry.name!r}")
            kernels.setdefault(parts[0], {})[parts[1]] = file.read()
    count = 0
    for kernel, contents in kernels.items():
        place = folder / kernel
        group = next((name for name in contents if name.startswith(_GROUP)), None)
        if group is None or (place / group).exists():
            continue
        names = json.loads(contents.pop(group))["child_paths"]
        paths = {name: str(place / name) for name in names}
        # It comes last: from then on Triton finds the kernel.
        contents[group] = json.dumps({"child_paths": paths}).encode()
        place.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            temporary = place / f"{name}.tmp"
            temporary.write_bytes(content)
            temporary.replace(place / name)
        count += 1
    return count


def main(arguments: list[str]) -> int:
    """The command line."""
    if len(arguments) != 2 or arguments[0] not in ("pack", "unpack"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    from triton import knobs

    work = pack if arguments[0] == "pack" else unpack
    folder, archive = Path(knobs.cache.dir), Path(arguments[1])
    count = pack(folder, archive) if work is pack else unpack(archive, folder)
    print(f"{arguments[0]}ed {count} compiled kernels, {archive.stat().st_size >> 10} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
