"""Ways to damage an adapter's files, each of which has to be noticed.

A damage is a function of the file's path; the dicts here give each a name.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

Damage = Callable[[Path], object]

HUGE = 2**60
LONGEST = 10**4300 - 1  # the largest integer that Python reads and writes
OUTSIDE = "outside"  # a folder beside the checkpoint's
CANARY = "canary"  # a file there that code in a pickle would make


# Any file


def _instead(make: Callable[[Path], object]) -> Damage:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def _link_outside(path: Path) -> None:
    """A whole and fitting file, but not in this folder."""
    outside = path.parent.parent / OUTSIDE
    outside.mkdir(exist_ok=True)
    shutil.move(path, outside / path.name)
    path.symlink_to(outside / path.name)


def _relative_link(path: Path) -> None:
    _link_outside(path)
    path.unlink()
    path.symlink_to(f"../{OUTSIDE}/{path.name}")


FILES: dict[str, Damage] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(300)),
    "noise": lambda path: path.write_bytes(bytes(7 * i % 251 for i in range(900))),
    "a folder": _instead(lambda path: path.mkdir()),
    "a pipe": _instead(lambda path: os.mkfifo(path)),
    "a device": _instead(lambda path: path.symlink_to("/dev/zero")),
    "a link to a system file": _instead(lambda path: path.symlink_to("/etc/passwd")),
    "a link to nothing": _instead(lambda path: path.symlink_to("nothing")),
    "a link to itself": _instead(lambda path: path.symlink_to(path)),
    "a link outside": _link_outside,
    "a relative link outside": _relative_link,
    "2^40 bytes": lambda path: os.truncate(path, 2**40),  # with a hole, which takes no room
}


def truncated(*parts: float) -> dict[str, Damage]:
    """Cut at these parts of the length."""

    def cut(part: float) -> Damage:
        def damage(path: Path) -> None:
            data = path.read_bytes().rstrip() if path.suffix == ".json" else path.read_bytes()
            path.write_bytes(data[: min(int(part * len(data)), len(data) - 1)])

        return damage

    return {
        "cut before its end" if part == 1 else f"cut at {part:.0%}": cut(part) for part in parts
    }


# Bits

Positions = Callable[[bytes], list[int]]


def flips(
    count: int, positions: Positions, meaning: Callable[[bytes], Any] = bytes
) -> dict[str, Damage]:
    """Flips of a bit at one of the ``positions``, no two the same, that change the ``meaning``."""

    def draw(data: bytes) -> Iterator[bytes]:
        seeded, places, known, seen = random.Random(0), positions(data), meaning(data), set()
        while True:
            place = seeded.choice(places), seeded.randrange(8)
            changed = bytearray(data)
            changed[place[0]] ^= 1 << place[1]
            if place not in seen and meaning(bytes(changed)) != known:
                seen.add(place)
                yield bytes(changed)

    def flip(number: int) -> Damage:
        def damage(path: Path) -> None:
            changed = draw(path.read_bytes())
            for _ in range(number):
                next(changed)
            path.write_bytes(next(changed))

        return damage

    return {f"random bit {number}": flip(number) for number in range(count)}


def anywhere(data: bytes) -> list[int]:
    """Every byte."""
    return list(range(len(data)))


def in_fields(*names: str) -> Positions:
    """The bytes of these fields of a JSON object, keys and values."""
    pattern = re.compile(rf'"({"|".join(names)})": ("[^"]*"|[^"{{}}\[\],\n]+)'.encode())
    return lambda data: [i for found in pattern.finditer(data) for i in range(*found.span())]


def in_header(data: bytes) -> list[int]:
    """The header of a safetensors file and its length."""
    return list(range(8 + int.from_bytes(data[:8], "little")))


def in_entries(data: bytes) -> list[int]:
    """As :func:`in_header`, without the metadata."""
    found = re.search(rb'"__metadata__":\{[^}]*\},?', data)
    left_out = range(*found.span()) if found is not None else range(0)
    return [i for i in in_header(data) if i not in left_out]


def of_json(data: bytes) -> Any:
    """What a JSON text says, and the JSON texts in it; ``data`` itself if it is none."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(values, dict):
        return values
    return {n: of_json(v.encode()) if isinstance(v, str) else v for n, v in values.items()}


def of_header(data: bytes) -> Any:
    """What the header of a safetensors file says; ``data`` itself if there is none."""
    length = int.from_bytes(data[:8], "little")
    header = of_json(data[8 : 8 + length])
    if not isinstance(header, dict):
        return data
    metadata = header.get("__metadata__")
    if isinstance(metadata, dict):
        header["__metadata__"] = of_json(json.dumps(metadata).encode())
    return length, header


# Tensors

State = dict[str, Tensor]


def _put(make: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    """Another value for the first tensor."""

    def change(state: State) -> None:
        first = min(state)
        state[first] = make(state[first])

    return change


def _rename(state: State) -> None:
    first = min(state)
    state[f"{first}_"] = state.pop(first)


def beyond_float32(state: State) -> None:
    """A finite value, in float64, that float32 does not have."""
    first = min(state)
    state[first] = state[first].double()
    state[first].view(-1)[0] = 1e300


STATES: dict[str, Callable[[State], object]] = {
    "a row more": _put(lambda t: torch.cat([t, t[:1]])),
    "one value": _put(lambda t: t.reshape(-1)[0].clone()),
    "another axis": _put(lambda t: t[None].clone()),
    "int64": _put(lambda t: t.long()),
    "complex": _put(lambda t: t.to(torch.complex64)),
    "NaN": _put(lambda t: torch.full_like(t, float("nan"))),
    "a last minus infinity": lambda state: state[max(state)].view(-1)[-1:].fill_(-float("inf")),
    "no first": lambda state: state.pop(min(state)),
    "none at all": lambda state: state.clear(),
    "a foreign one": lambda state: state.update(foreign=torch.zeros(2)),
    "another name": _rename,
}

# JSON

TEXTS = {
    "a list": b"[1, 2]",
    "a number": b"1",
    "nested lists": b"[" * 100_000,
    "closed nested lists": b'{"a":' + b"[" * 500 + b"]" * 500 + b"}",
    "not UTF-8": b'{"a": "\xff"}',
    "a comment": b"{} // and more",
    "two objects": b"{}{}",
    "more than 4 MB": b"{" + b" " * (4 << 20) + b"}",
    "100,000 lists": b'{"a":[' + b"[]," * 100_000 + b"[]]}",
    "a pickle": pickle.dumps({"hidden_size": 8}),
}


def texts() -> dict[str, Damage]:
    """Another text in place of the file's."""

    def write(data: bytes) -> Damage:
        return lambda path: path.write_bytes(data)

    return {name: write(data) for name, data in TEXTS.items()}


VALUES = {
    "10^12": "1" + "0" * 12,
    "2^60": str(HUGE),
    "10^400": "1" + "0" * 400,
    "10^5000": "1" + "0" * 5000,
    "negative": "-1",
    "real": "3.0",
    "text": '"3"',
    "null": "null",
    "list": "[3]",
    "object": '{"3": 3}',
    "nested": "[" * 200 + "]" * 200,
    "NaN": "NaN",
    "infinite": "1e999",
    "a path": '"../../secret"',
}
FEW = ("10^12", "text", "nested", "NaN")


def raw_value(name: str, text: str) -> Damage:
    """A field's value replaced by a text."""

    def damage(path: Path) -> None:
        pattern = re.compile(rf'("{name}": *)("[^"]*"|[^,\n}}]+)')
        changed, count = pattern.subn(lambda found: found[1] + text, path.read_text())
        assert count == 1
        path.write_text(changed)

    return damage


def fields(*names: str, few: tuple[str, ...] = (), but: tuple[str, ...] = ()) -> dict[str, Damage]:
    """Every wrong value in each of ``names``, some in each of ``few``, without those in ``but``."""
    damages: dict[str, Damage] = {}
    for name, values in [*((n, VALUES) for n in names), *((n, FEW) for n in few)]:
        damages |= {f"{name} {v}": raw_value(name, VALUES[v]) for v in values if v not in but}
        damages[f"{name} twice"] = _twice(name)
        damages[f"no {name}"] = _without(name)
    return damages


def _twice(name: str) -> Damage:
    def damage(path: Path) -> None:
        value = json.dumps(json.loads(path.read_text())[name])
        path.write_text(path.read_text().replace("{", f'{{"{name}": {value}, ', 1))

    return damage


def _without(name: str) -> Damage:
    def damage(path: Path) -> None:
        values = json.loads(path.read_text())
        del values[name]
        path.write_text(json.dumps(values))

    return damage


# safetensors


def _split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(path: Path, header: bytes, values: bytes, length: int | None = None) -> None:
    size = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + header + values)


def _lengths() -> dict[str, Damage]:
    def declare(change: Callable[[int], int]) -> Damage:
        def damage(path: Path) -> None:
            data = path.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            path.write_bytes(struct.pack("<Q", change(length)) + data[8:])

        return damage

    return {
        "header of 0 bytes": declare(lambda n: 0),
        "header a byte short": declare(lambda n: n - 1),
        "header a byte long": declare(lambda n: n + 1),
        "header of 90 MB": declare(lambda n: 90_000_000),
        "header of 2^64 - 1 bytes": declare(lambda n: (1 << 64) - 1),
    }


def _padded(path: Path) -> None:
    header, values = _split(path)
    _join(path, json.dumps(header).encode() + b" " * (2 << 20), values)


def _header(change: Callable[[dict[str, Any], str], object]) -> Damage:
    """The header changed, given it and the name of its first tensor."""

    def damage(path: Path) -> None:
        header, values = _split(path)
        first = min(name for name in header if name != "__metadata__")
        change(header, first)
        _join(path, json.dumps(header).encode(), values)

    return damage


def _entry(**changes: Any) -> Damage:
    return _header(lambda header, first: header[first].update(changes))


def _renamed(name: str) -> Damage:
    return _header(lambda header, first: header.update({name: header.pop(first)}))


def _header_twice(path: Path) -> None:
    header, values = _split(path)
    first = min(name for name in header if name != "__metadata__")
    again = f"{{{json.dumps(first)}: {json.dumps(header[first])}, "
    _join(path, json.dumps(header).replace("{", again, 1).encode(), values)


def _overlap(header: dict[str, Any], first: str) -> None:
    start, end = header[first]["data_offsets"]
    header[first]["data_offsets"] = [start + 4, end + 4]


def _filled(value: float) -> Damage:
    def damage(path: Path) -> None:
        header, values = _split(path)
        first = min(name for name in header if name != "__metadata__")
        start, end = header[first]["data_offsets"]
        changed = values[: end - 4] + struct.pack("<f", value) + values[end:]
        assert start <= end - 4
        _join(path, json.dumps(header).encode(), changed)

    return damage


def rewritten(change: Callable[[State], object]) -> Damage:
    """A whole file of other tensors, with the metadata as it was."""

    def damage(path: Path) -> None:
        header, _ = _split(path)
        state = safetensors.torch.load(path.read_bytes())
        change(state)
        path.write_bytes(safetensors.torch.save(state, metadata=header.get("__metadata__")))

    return damage


def with_metadata(metadata: dict[str, str]) -> Damage:
    """Other metadata."""
    return _header(lambda header, first: header.update(__metadata__=metadata))


def _long(foreign: bool) -> Damage:
    """A tensor of 2^40 bytes that are really there: a hole, which takes no room on the disk."""

    def damage(path: Path) -> None:
        header, values = _split(path)
        start, length = len(values), 2**40
        entry = {"dtype": "F32", "shape": [length // 4], "data_offsets": [start, start + length]}
        if foreign:
            header["x"] = entry
        else:
            first = min(name for name in header if name != "__metadata__")
            entry["shape"] = header[first]["shape"]
            header[first] = entry
        _join(path, json.dumps(header).encode(), values)
        os.truncate(path, path.stat().st_size + length)

    return damage


TENSORS: dict[str, Damage] = {
    **_lengths(),
    **truncated(0.01, 0.3, 0.7, 1),
    "a padded header": _padded,
    "bytes behind the end": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 64),
    "another type of value": _entry(dtype="I64"),
    "an unknown type": _entry(dtype="F99"),
    "no place": _header(lambda header, first: header[first].pop("data_offsets")),
    "a shape of 2^60 by 2^60": _entry(shape=[HUGE, HUGE]),
    "a negative shape": _entry(shape=[-1, 4]),
    "a shape of 100,000 nines": _entry(shape=[9] * 100_000),
    "64 axes more": _header(lambda h, f: h[f].update(shape=[1] * 64 + h[f]["shape"])),
    "a shape of 10^4300 - 1": _entry(shape=[LONGEST, LONGEST]),
    "a shape of zero": _entry(shape=[0]),
    "places that overlap": _header(_overlap),
    "places beyond the end": _entry(data_offsets=[0, 2**40]),
    "negative places": _entry(data_offsets=[-8, 8]),
    "an entry that is a list": _header(lambda header, first: header.update({first: [1]})),
    "places of 2^40 bytes": _long(foreign=False),
    "a foreign tensor of 2^40 bytes": _long(foreign=True),
    "a missing tensor": _header(lambda header, first: header.pop(first)),
    "a foreign tensor": _header(lambda h, f: h.update(x=h[f])),
    "a name that is a path": _renamed("../../etc/passwd"),
    "a name with NUL": _renamed("a\0b"),
    "a name of 100 kB": _renamed("n" * 100_000),
    "a tensor twice": _header_twice,
    "metadata that is a list": _header(lambda h, f: h.update(__metadata__=[1])),
    "NaN": _filled(float("nan")),
    "minus infinity": _filled(float("-inf")),
    "a file of torch.save": lambda path: torch.save({"x": torch.zeros(2)}, path),
    **{f"{name} rewritten": rewritten(change) for name, change in STATES.items()},
}


# torch.save


class _Call:
    """Pickled as a call of a function, which a careless reader would make."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _saved_again(change: Callable[[State], object]) -> Damage:
    def damage(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damage


def _prompt(make: Callable[[Tensor], Any]) -> Damage:
    """Another value for the prompt."""
    return _saved_again(lambda s: s.update(prompt_embeddings=make(s["prompt_embeddings"])))


def _instead_of_the_dict(make: Callable[[str], Any]) -> Damage:
    """Another content, given the path of the canary."""
    return lambda path: torch.save(make(str(path.parent.parent / CANARY)), path)


def _expanded_in_both(path: Path) -> None:
    """One value for 2^40 rows, and a config that asks for them."""
    _prompt(lambda prompt: torch.zeros(1, 1).expand(2**40, 16))(path)
    config = path.with_name("adapter_config.json")
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "num_virtual_tokens": 2**40}))


def _rezip(change: Callable[[dict[str, bytes]], object], kind: int = zipfile.ZIP_STORED) -> Damage:
    """The archive's records changed."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        change(records)
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, data in records.items():
                archive.writestr(name, data)

    return damage


def _gigabyte_before(path: Path) -> None:
    """Other bytes, which an archive may have before it: a hole, which takes no room on disk."""
    data = path.read_bytes()
    path.write_bytes(b"")
    os.truncate(path, 1 << 30)
    with path.open("ab") as file:
        file.write(data)


def _values_twice(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile about the second record of a name
        archive.writestr("adapter_model/data/0", bytes(48 * 4))


def _flip_record(name: str) -> Damage:
    """A bit in the middle of a record, which its checksum tells."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            record = archive.read(f"adapter_model/{name}")
        data = bytearray(path.read_bytes())
        data[data.index(record) + len(record) // 2] ^= 16
        path.write_bytes(data)

    return damage


PICKLES: dict[str, Damage] = {
    **truncated(0.01, 0.4, 0.8, 1),
    # code
    "os.system": _instead_of_the_dict(lambda canary: {"a": _Call(os.system, f"touch {canary}")}),
    "eval": _instead_of_the_dict(lambda canary: {"a": _Call(eval, f"open({canary!r}, 'w')")}),
    "torch.load": _instead_of_the_dict(lambda canary: {"a": _Call(torch.load, canary)}),
    # memory
    "an expanded shape of 2^40 in both files": _expanded_in_both,
    "a gigabyte before the archive": _gigabyte_before,
    "a compressed record": _rezip(
        lambda r: r.update({"adapter_model/data/9": bytes(1 << 22)}), zipfile.ZIP_DEFLATED
    ),
    # other contents
    "a list": _instead_of_the_dict(lambda _: [1]),
    "a tensor alone": _instead_of_the_dict(lambda _: torch.zeros(3, 16)),
    "a key that is a number": _instead_of_the_dict(lambda _: {3: torch.zeros(3, 16)}),
    "a number for a tensor": _prompt(lambda _: 3),
    "a dict for a tensor": _prompt(lambda _: {}),
    "a negated view": _prompt(torch._neg_view),
    "a sparse tensor": _prompt(lambda prompt: prompt.to_sparse()),
    # the archive
    "no instructions": _rezip(lambda r: r.update({"adapter_model/data.pkl": b""})),
    "no data.pkl": _rezip(lambda r: r.pop("adapter_model/data.pkl")),
    "no values": _rezip(lambda r: r.pop("adapter_model/data/0")),
    "short values": _rezip(
        lambda r: r.update({"adapter_model/data/0": r["adapter_model/data/0"][:-4]})
    ),
    "values twice": _values_twice,
    "a flipped bit in the values": _flip_record("data/0"),
    "a flipped bit in the instructions": _flip_record("data.pkl"),
    "before PyTorch 1.6": lambda path: torch.save(
        torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False
    ),
    "a plain pickle": lambda path: path.write_bytes(pickle.dumps({"prompt_embeddings": [1.0]})),
    **{f"{name} saved again": _saved_again(change) for name, change in STATES.items()},
}


# What has to load all the same: it changes nothing, by the way in which the damages do it.


def _link_inside(path: Path) -> None:
    inside = path.parent / "inside"
    inside.mkdir()
    shutil.move(path, inside / path.name)
    path.symlink_to(f"inside/{path.name}")


def _same(values: object) -> None:
    pass


def _json_again(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text())))


HARMLESS: dict[str, dict[str, Damage]] = {
    "": {"nothing": _same, "a link inside": _link_inside},
    ".json": {"written again": _json_again},
    ".safetensors": {
        "another header": _header(lambda header, first: None),
        "rewritten": rewritten(_same),
    },
    ".bin": {
        "rezipped": _rezip(_same),
        "saved again": _saved_again(_same),
    },
}
