"""Adapter folders: bit-exact round trips, atomic writes, and files that must be refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ept_fast import CheckpointError, EPTConfig, FusedEPTPrompt
from ept_fast.prompts.base import CONFIG_FILE, TENSOR_FILE
from ept_fast.storage import files
from ept_fast.storage.untrusted import read_file, shorten

pytestmark = pytest.mark.usefixtures("one_thread")

D = 8
CONFIG = EPTConfig(
    D, num_virtual_tokens=3, max_length=9, rank=2, num_spaces=2, space_dim=2, alpha=6.5
)
PARTS = {
    "ept": CONFIG,
    "no spaces": dataclasses.replace(CONFIG, num_spaces=0),
    "no offset": dataclasses.replace(CONFIG, rank=0),
    "prompt tuning": dataclasses.replace(CONFIG, rank=0, num_spaces=0),
    "choices": dataclasses.replace(
        CONFIG, activation="silu", gate="prompt", temperature=1e-07, fusion=False, alpha=2
    ),
}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make_prompt(config: EPTConfig = CONFIG, seed: int = 0, **options: Any) -> FusedEPTPrompt:
    """Every parameter at random."""
    generator = torch.Generator().manual_seed(seed)
    table = nn.Embedding(17, D, _weight=torch.randn(17, D, generator=generator))
    prompt = FusedEPTPrompt(config, table, generator=generator, **options)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return prompt


def bits(module: FusedEPTPrompt) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    """Type, shape and bytes of every tensor."""
    return {
        name: (t.dtype, list(t.shape), t.detach().contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in module.state_dict().items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a saved prompt."""
    make_prompt().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# Round trips


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tasks", [None, 1, 3])
@pytest.mark.parametrize("part", PARTS)
def test_round_trip(part: str, tasks: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    prompt = make_prompt(PARTS[part], num_tasks=tasks, dtype=dtype)
    prompt.save_pretrained(tmp_path)
    expected = bits(prompt)
    built = FusedEPTPrompt.from_pretrained(tmp_path, prompt.embedding)
    filled = make_prompt(PARTS[part], seed=9, num_tasks=tasks, dtype=dtype)
    parameters = dict(filled.named_parameters())
    filled.load_pretrained(str(tmp_path))
    for loaded in (built, filled):
        assert bits(loaded) == expected
        assert loaded.config == PARTS[part]
        assert loaded.num_tasks == tasks
        assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    assert list(built.state_dict()) == list(prompt.state_dict())
    assert built.embedding is prompt.embedding
    # an optimizer made before the load goes on with the same objects
    assert all(parameters[name] is p for name, p in filled.named_parameters())
    ids = torch.arange(6).reshape(2, 3)
    task_ids = None if tasks is None else torch.tensor([tasks - 1, 0])
    out = [p(ids, task_ids=task_ids).inputs_embeds for p in (prompt, built)]
    assert torch.equal(*out)


def odd_values(prompt: FusedEPTPrompt) -> None:
    """Negative zero, denormals and the largest numbers."""
    largest = torch.finfo(torch.float32).max
    prompt.gate_bias.data.copy_(torch.tensor([-0.0, 1e-45]))
    prompt.short_prompt.data[0] = torch.tensor([largest, -largest, 0.1, 1 / 3, 0, -0.0, 2, 3])


def several_types(prompt: FusedEPTPrompt) -> None:
    for parameter, dtype in zip(prompt.parameters(), FLOATS * 2, strict=False):
        parameter.data = parameter.data.to(dtype)


def transposed(prompt: FusedEPTPrompt) -> None:
    for name in ("space_down", "offset_b", "short_prompt"):
        parameter = getattr(prompt, name)
        parameter.data = parameter.data.mT.contiguous().mT


@pytest.mark.parametrize("change", [odd_values, several_types, transposed])
def test_round_trip_of_unusual_tensors(
    change: Callable[[FusedEPTPrompt], None], tmp_path: Path
) -> None:
    prompt = make_prompt()
    change(prompt)
    prompt.save_pretrained(tmp_path)
    assert bits(FusedEPTPrompt.from_pretrained(tmp_path, prompt.embedding)) == bits(prompt)


def test_the_files(tmp_path: Path) -> None:
    """Two ordinary files that other tools can read; the table is in neither."""
    folder = tmp_path / "a" / "b"
    prompt = make_prompt(num_tasks=2)
    prompt.save_pretrained(str(folder))
    assert set(contents(folder)) == {CONFIG_FILE, TENSOR_FILE}
    assert json.loads((folder / CONFIG_FILE).read_text()) == {**CONFIG.to_dict(), "num_tasks": 2}
    tensors = safetensors.torch.load_file(folder / TENSOR_FILE)
    assert tensors.keys() == prompt.state_dict().keys()
    for name, tensor in prompt.state_dict().items():
        assert torch.equal(tensors[name], tensor)
    if os.name == "posix":
        assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())


def test_equal_prompts_are_equal_files(saved: Path, tmp_path: Path) -> None:
    """So that a checksum tells whether two adapters are the same."""
    expected = contents(saved)
    for i in range(5):
        make_prompt().save_pretrained(tmp_path / str(i))
        assert contents(tmp_path / str(i)) == expected


def test_saving_again_replaces(saved: Path) -> None:
    other = make_prompt(PARTS["no spaces"], seed=5)
    other.save_pretrained(saved)
    assert set(contents(saved)) == {CONFIG_FILE, TENSOR_FILE}
    assert bits(FusedEPTPrompt.from_pretrained(saved, other.embedding)) == bits(other)


def test_loading_leaves_the_global_generator(saved: Path) -> None:
    before = torch.get_rng_state()
    FusedEPTPrompt.from_pretrained(saved, nn.Embedding(17, D, _weight=torch.zeros(17, D)))
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_onto_another_width(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"^embedding: expected width hidden_size 8, got 9$"):
        FusedEPTPrompt.from_pretrained(saved, nn.Embedding(17, 9))


# Writing whole or not at all


class Interrupted(BaseException):
    """Like KeyboardInterrupt: no Exception."""


# Which function fails, and at which of its calls: one call for each of the two files.
BREAKS: dict[str, tuple[Any, str, int]] = {
    "rename": (files.os, "replace", 1),
    "flush to disk": (files.os, "fsync", 1),
    "flush of the second file": (files.os, "fsync", 2),
    "permissions": (files.os, "chmod", 1),
    "permissions of the second file": (files.os, "chmod", 2),
    "serialisation": (files, "serialize_tensors", 1),
    "config": (files.json, "dumps", 1),
}


def fail_at(
    patch: pytest.MonkeyPatch, module: Any, function: str, nth: int, error: BaseException
) -> None:
    real, calls = getattr(module, function), itertools.count(1)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            raise error
        return real(*args, **kwargs)

    patch.setattr(module, function, failing)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interrupted()], ids=repr)
@pytest.mark.parametrize("step", BREAKS)
def test_a_failure_leaves_the_old_files(
    step: str, error: BaseException, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved)
    with monkeypatch.context() as patch:
        fail_at(patch, *BREAKS[step], error)
        with pytest.raises(type(error)):
            make_prompt(PARTS["choices"], seed=5).save_pretrained(saved)
    assert contents(saved) == before


def test_both_files_are_on_the_disk_before_a_rename(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        events.append(("flushed", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def noting_replace(source: str, target: Path) -> None:
        events.append(("renamed", os.stat(source).st_size))
        assert Path(source).parent == target.parent
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", noting_fsync)
    monkeypatch.setattr(files.os, "replace", noting_replace)
    make_prompt(seed=5).save_pretrained(saved)
    sizes = [(saved / file).stat().st_size for file in (TENSOR_FILE, CONFIG_FILE)]
    assert events == [(event, size) for event in ("flushed", "renamed") for size in sizes]


@pytest.mark.parametrize("same_config", [True, False])
def test_a_failure_between_the_renames_is_never_silent(
    same_config: bool, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new values load if the config is the old one; else an error."""
    other = make_prompt(CONFIG if same_config else PARTS["choices"], seed=5)
    with monkeypatch.context() as patch:
        fail_at(patch, files.os, "replace", 2, OSError(5, "Input/output error"))
        with pytest.raises(OSError, match="Input/output"):
            other.save_pretrained(saved)
    assert set(contents(saved)) == {CONFIG_FILE, TENSOR_FILE}
    if same_config:
        assert bits(FusedEPTPrompt.from_pretrained(saved, other.embedding)) == bits(other)
    else:
        with pytest.raises(
            CheckpointError, match="expected the config the tensors were saved with"
        ):
            FusedEPTPrompt.from_pretrained(saved, other.embedding)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", list(make_prompt().state_dict()))
def test_values_that_would_not_load_are_not_saved(name: str, value: float, saved: Path) -> None:
    before = contents(saved)
    prompt = make_prompt(seed=5)
    with torch.no_grad():
        getattr(prompt, name)[..., -1] = value
    with pytest.raises(ValueError, match=f"^{name}: expected finite values to save, got NaN or"):
        prompt.save_pretrained(saved)
    assert contents(saved) == before


# Files that are refused; tests/test_damaged.py has more kinds of damage


def assert_refused(folder: Path, message: str, config: EPTConfig = CONFIG, **options: Any) -> None:
    """Both ways of loading raise, naming the file, and the module keeps every bit."""
    prompt = make_prompt(config, seed=5, **options)
    before = bits(prompt)
    for load in (
        lambda: prompt.load_pretrained(folder),
        lambda: FusedEPTPrompt.from_pretrained(folder, prompt.embedding),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            load()
        assert str(folder) in str(caught.value)
    assert bits(prompt) == before


def naming(folder: Path, file: str, rest: str = "") -> str:
    return "^" + re.escape(f"{folder / file}: ") + rest


def header_size(path: Path) -> int:
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    return 8 + int(size)


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSOR_FILE])
def test_truncated(file: str, saved: Path) -> None:
    """At every second length of the text and the header, and now and then among the values."""
    whole = (saved / file).read_bytes()
    prompt = make_prompt(seed=5)
    before = bits(prompt)
    # without its last line break a JSON file is still whole
    end = len(whole.rstrip()) if file == CONFIG_FILE else len(whole)
    head = end if file == CONFIG_FILE else header_size(saved / file)
    for length in [*range(1, head, 2), *range(head, end, 23), end - 1]:
        (saved / file).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=naming(saved, file)):
            prompt.load_pretrained(saved)
    assert bits(prompt) == before
    for length in (0, 7, 8, head - 1, head - 2, end - 1):
        (saved / file).write_bytes(whole[:length])
        assert_refused(saved, naming(saved, file))


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSOR_FILE])
def test_flipped_bits(file: str, saved: Path) -> None:
    """One bit of every byte of the config and of the header: names, types, shapes, places."""
    path = saved / file
    whole = path.read_bytes()
    prompt = make_prompt(seed=5)
    before = bits(prompt)
    for position in range(len(whole) if file == CONFIG_FILE else header_size(path)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << 3 * position % 8
        path.write_bytes(damaged)
        try:
            prompt.load_pretrained(saved)
        except CheckpointError as error:
            assert str(saved) in str(error)  # noqa: PT017
        else:
            # some other blank for a blank
            assert file == CONFIG_FILE
            assert json.loads(damaged) == json.loads(whole)
            prompt = make_prompt(seed=5)
        assert bits(prompt) == before


def write(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> None:
    ours = None if metadata is None else {"ept_fast": json.dumps(metadata)}
    safetensors.torch.save_file(tensors, folder / TENSOR_FILE, metadata=ours)


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(folder / TENSOR_FILE, framework="pt") as file:
        names = file.keys()
        metadata = json.loads(file.metadata()["ept_fast"])
        return {name: file.get_tensor(name) for name in names}, metadata


def test_a_file_rewritten_by_another_tool_still_loads(saved: Path) -> None:
    """So that the refusals below are for what they change."""
    expected = bits(FusedEPTPrompt.from_pretrained(saved, nn.Embedding(17, D)))
    write(saved, *read(saved))
    assert bits(FusedEPTPrompt.from_pretrained(saved, nn.Embedding(17, D))) == expected


WRONG_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (
        lambda t: t.pop("offset_a"),
        r"expected the tensors .* \(missing \['offset_a'\], foreign \[\]\)",
    ),
    "extra": (
        lambda t: t.update(weight=torch.zeros(2)),
        r"expected the tensors .*foreign \['weight'\]",
    ),
    "transposed": (
        lambda t: t.update(offset_b=t["offset_b"].mT.contiguous()),
        r"offset_b: expected shape \(2, 8\), got \(8, 2\)",
    ),
    "task axis": (
        lambda t: t.update(short_prompt=t["short_prompt"][None]),
        r"short_prompt: expected shape \(3, 8\), got \(1, 3, 8\)",
    ),
    "scalar": (
        lambda t: t.update(gate_bias=torch.tensor(1.0)),
        r"gate_bias: expected shape \(2,\), got \(\)",
    ),
    "nan": (
        lambda t: t["space_up"].view(-1)[3].fill_(float("nan")),
        "space_up: expected finite values, got NaN or infinity",
    ),
    "integers": (
        lambda t: t.update(gate_bias=torch.zeros(2, dtype=torch.int64)),
        "gate_bias: expected a floating dtype, got torch.int64",
    ),
    "float8": (
        lambda t: t.update(gate_bias=torch.zeros(2).to(torch.float8_e4m3fn)),
        "gate_bias: expected a floating dtype, got torch.float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors(case: str, saved: Path) -> None:
    """All but the one tensor are as they should be: still none of them is taken."""
    change, message = WRONG_TENSORS[case]
    tensors, metadata = read(saved)
    change(tensors)
    write(saved, tensors, metadata)
    assert_refused(saved, naming(saved, TENSOR_FILE, message))


def test_missing_folder(tmp_path: Path) -> None:
    message = "expected a readable file, got No such file or directory"
    assert_refused(tmp_path / "none", naming(tmp_path / "none", CONFIG_FILE, message))


WRONG_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "unknown field": (
        lambda v: v.update(heads=2),
        r"config: expected the fields .* got also \['heads'\]",
    ),
    "no hidden_size": (
        lambda v: v.pop("hidden_size"),
        "config: expected the field hidden_size, got none",
    ),
    "real for integer": (lambda v: v.update(rank=2.0), "rank: expected an integer, got float 2.0"),
    "integer for bool": (lambda v: v.update(fusion=1), "fusion: expected a bool, got int 1"),
    "choice": (lambda v: v.update(gate="row"), "gate: expected one of token, prompt, got 'row'"),
    "num_tasks 0": (lambda v: v.update(num_tasks=0), "num_tasks: expected an integer >= 1, got 0"),
    "beyond float": (
        lambda v: v.update(alpha=10**400),
        "alpha: expected a finite number, got an integer of 1329 bits",
    ),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_wrong_config_in_both_files(case: str, saved: Path) -> None:
    """Both files agree, and still the config is none."""
    change, message = WRONG_CONFIGS[case]
    values = json.loads((saved / CONFIG_FILE).read_text())
    change(values)
    tensors, metadata = read(saved)
    write(saved, tensors, {**metadata, "config": json.dumps(values)})
    (saved / CONFIG_FILE).write_text(json.dumps(values))
    assert_refused(saved, naming(saved, CONFIG_FILE, message))


# Each is a config of its own, most with the very same shapes.
OTHERS: dict[str, Any] = {
    "hidden_size": 7,
    "num_virtual_tokens": 4,
    "max_length": 10,
    "rank": 1,
    "num_spaces": 3,
    "space_dim": 1,
    "alpha": 6.0,
    "activation": "relu",
    "gate": "prompt",
    "temperature": 2.0,
    "fusion": False,
    "offset_tokens": "given",
    "num_tasks": 1,
}


@pytest.mark.parametrize("field", OTHERS)
def test_config_at_odds_with_the_tensors(field: str, saved: Path) -> None:
    assert OTHERS.keys() == {*CONFIG.to_dict(), "num_tasks"}
    values = json.loads((saved / CONFIG_FILE).read_text())
    values[field] = OTHERS[field]
    (saved / CONFIG_FILE).write_text(json.dumps(values))
    message = "expected the config the tensors were saved with"
    assert_refused(saved, naming(saved, CONFIG_FILE, message))


@pytest.mark.parametrize("field", sorted(set(OTHERS) - {"hidden_size"}))
def test_checkpoint_at_odds_with_the_module(field: str, saved: Path) -> None:
    """The folder is whole, but of another prompt: nothing is loaded into this one."""
    tasks = OTHERS[field] if field == "num_tasks" else None
    values = {} if field == "num_tasks" else {field: OTHERS[field]}
    prompt = make_prompt(dataclasses.replace(CONFIG, **values), seed=5, num_tasks=tasks)
    before = bits(prompt)
    with pytest.raises(CheckpointError, match="^" + re.escape(f"{saved}: expected ")) as caught:
        prompt.load_pretrained(saved)
    assert f"{field}={OTHERS[field]!r}" in str(caught.value) or "num_tasks 1, got" in str(
        caught.value
    )
    assert bits(prompt) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_into_another_type(dtype: torch.dtype, saved: Path) -> None:
    """The module keeps its type."""
    prompt = make_prompt(seed=5, dtype=dtype)
    prompt.load_pretrained(saved)
    assert bits(prompt) == bits(make_prompt().to(dtype))


def test_values_beyond_the_modules_type(tmp_path: Path) -> None:
    source = make_prompt()
    with torch.no_grad():
        source.gate_bias[1] = 70_000.0  # float16 ends at 65504
    source.save_pretrained(tmp_path)
    prompt = make_prompt(seed=5, dtype=torch.float16)
    before = bits(prompt)
    with pytest.raises(CheckpointError, match=naming(tmp_path, TENSOR_FILE, "gate_bias: expected")):
        prompt.load_pretrained(tmp_path)
    assert bits(prompt) == before


# The writers and readers by themselves


def test_write_bytes_makes_the_folder_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for data in (b"first", b"", b"third"):
        files.write_bytes(path, data)
        assert contents(path.parent) == {"file": data}


def test_write_json_refuses_what_is_not_json(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"a": [1, None, "é"]})
    before = contents(tmp_path)
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises((TypeError, ValueError)):
            files.write_json(tmp_path / "x.json", {"a": value})
    assert contents(tmp_path) == before
    assert files.read_json(tmp_path / "x.json") == {"a": [1, None, "é"]}


# Values in messages


@pytest.mark.parametrize("suffix", ["", "x" * 300, ["y"] * 100], ids=["short", "long", "longer"])
def test_values_in_messages(suffix: Any) -> None:
    values = {
        "a": [],
        "b": [1, (), (2,), (3, 4)],
        "c": {"d'": None, "e\n": True},
        "f": (1e9, suffix),
    }
    text = repr(values)
    assert shorten(values, 1 << 12) == text
    assert shorten(values) == (text if len(text) <= 300 else f"{text[:300]}...")
    assert shorten([10**5000, -1]) == "[an integer of 16610 bits, -1]"


@pytest.mark.parametrize("make", [lambda v: {"a": v, "b": v}, lambda v: [v, v], lambda v: (v, v)])
def test_no_more_of_a_value_is_written_than_a_message_shows(make: Callable[[Any], Any]) -> None:
    """Whose ``repr`` has a million parts."""
    value: Any = "a"
    for _ in range(20):
        value = make(value)
    tracemalloc.start()
    try:
        text = shorten(value)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()
    assert len(text) == len("...") + 300


def test_a_link_that_takes_a_files_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After it was found to lie in its folder, and before it is opened."""
    path, outside = tmp_path / "folder/file", tmp_path / "secret"
    path.parent.mkdir()
    path.write_bytes(b"its own")
    outside.write_bytes(b"secret")
    assert read_file(path) == b"its own"
    really_open = os.open

    def swapped(name: Any, *arguments: Any) -> int:
        path.unlink()
        path.symlink_to(outside)
        return really_open(name, *arguments)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(CheckpointError, match="file: expected a readable file, got "):
        read_file(path)
    assert path.read_bytes() == b"secret"
