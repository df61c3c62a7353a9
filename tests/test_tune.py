"""`ept-fast tune`: what it measures and keeps, when its table is used, and every refusal."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from ept_fast.backends import triton as fused
from ept_fast.cli import main
from ept_fast.kernels import launch, tune
from tests.cases import Sizes, make_case

pytest.importorskip("triton")

from ept_fast.kernels import splice

pytestmark = pytest.mark.usefixtures("one_thread")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
SMALL = tune.TuneSizes(2, 5, 32, 3, 7, 2, 2, 4, 1, "fp32", "fp32")
OPTIONS = (
    "--batch 2 --length 5 --hidden-size 32 --virtual-tokens 3 --max-length 7 --rank 2 "
    f"--num-spaces 2 --space-dim 4 --embeddings fp32 --device {DEVICE.type}"
).split()
PLAIN = ("--rank", "0", "--num-spaces", "0")
# The arguments of the splice's forward, without and with a mask, for the sizes above.
FORWARD = (2, 5, 3, 32, 2, 1, torch.float32, DEVICE, False)
MASKED = (*FORWARD[:-1], True)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table, and none remembered from an earlier test."""

    def forget() -> None:
        launch._tuned.cache_clear()
        launch._tuned_file.cache_clear()

    monkeypatch.delenv("EPT_FAST_TUNED", raising=False)
    forget()
    yield
    forget()


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["tune", *(str(word) for word in words)])


def entry(**change: Any) -> dict[str, Any]:
    """An entry that fits: half the channels of a tile, for the splice's forward."""
    names = [name for name in tune._arguments("splice_forward") if name != "device"]
    sizes = [value for value in FORWARD if not isinstance(value, torch.device)]
    key = dict(zip(names, sizes, strict=True)) | {"dtype": "float32"}
    return {"operation": "splice_forward", "key": key, "fields": {"block_d": 16}, **change}


def table(*entries: Any, **change: Any) -> dict[str, Any]:
    return {
        "format": tune.FORMAT,
        "version": tune.FORMAT_VERSION,
        "device": tune._device_name(DEVICE),
        "triton": tune._triton_version(),
        "entries": list(entries),
        **change,
    }


def write(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def prefer(
    better: Callable[[Any], bool],
) -> Callable[[Any, Sequence[Any], torch.device], list[list[float]]]:
    """A clock by which some configurations take half as long."""

    def samples(job: Any, configs: Sequence[Any], device: torch.device) -> list[list[float]]:
        return [[50.0 if better(config) else 100.0] * 3 for config in configs]

    return samples


def few_fields(monkeypatch: pytest.MonkeyPatch, **fields: tuple[tuple[str, ...], ...]) -> None:
    monkeypatch.setattr(tune, "_FIELDS", dict.fromkeys(tune._FIELDS, ()) | fields)


def test_fields_are_those_of_the_configurations() -> None:
    kinds = {"reconstruct": launch.ReconstructConfig}
    for operation, groups in tune._FIELDS.items():
        kind = kinds.get(operation, launch.SpliceConfig)
        names = {field.name for field in dataclasses.fields(kind)}
        assert {name for group in groups for name in group} <= names, operation


SIZES = {
    "t5-base": (32, 256, 40, 768, 30, 1),
    "llama-8b": (8, 2048, 60, 4096, 24, 1),
    "bank": (64, 256, 40, 768, 30, 64),
    "rank 256": (3, 17, 512, 96, 256, 2),
    "one of each": (1, 1, 1, 1, 1, 1),
    "no offset": (4, 9, 3, 40, 0, 1),
}


@pytest.mark.parametrize("name", SIZES)
def test_variants_keep_what_the_kernels_ask_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, m, width, rank, tasks = SIZES[name]
    monkeypatch.setattr(launch, "_forced_target", "sm_90")
    n = length if rank else 0
    keys: dict[str, dict[str, Any]] = {}
    for operation in ("splice_forward", "splice_backward"):
        sizes = (batch, length, m, width, rank, tasks, torch.bfloat16)
        flags = (True,) if operation == "splice_forward" else (True, rank > 0)
        names = [n for n in tune._arguments(operation) if n != "device"]
        keys[operation] = dict(zip(names, (*sizes, *flags), strict=True))
    names = tune._arguments("reconstruct")
    keys["reconstruct"] = dict(zip(names, (tasks, m, n, rank, 4, 8, width), strict=True))
    for operation, key in keys.items():
        config = tune._heuristic(operation, key, DEVICE)
        assert tune._problem(operation, key, config) == "", operation
        found = [
            variant
            for fields in tune._FIELDS[operation]
            for variant in tune._variants(operation, key, config, fields)
        ]
        assert len(found) >= 3, operation
        assert config not in found
        for variant in found:
            assert tune._problem(operation, key, variant) == ""
            if isinstance(variant, launch.ReconstructConfig):
                assert variant.d_splits * variant.d_chunk >= width
                assert variant.n_splits * variant.n_chunk >= n
                assert variant.groups * variant.group_rows >= m
                assert variant.rank >= rank
            elif operation == "splice_backward":
                assert variant.block_r >= rank
                assert isinstance(config, launch.SpliceConfig)
                allowed = max(launch._WORKSPACE_BYTES, tune._workspace(key, config))
                assert tune._workspace(key, variant) <= allowed


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(0, id="reconstruct", marks=pytest.mark.slow),
        pytest.param(1, id="splice forward"),
        pytest.param(2, id="splice forward, mask"),
        pytest.param(3, id="splice backward"),
    ],
)
def test_every_variant_gives_right_results(number: int) -> None:
    sizes = dataclasses.replace(SMALL, tasks=2, hidden_size=70, num_virtual_tokens=20)
    job = tune._jobs(sizes, DEVICE)[number]
    judge = tune._Judge(job)
    seen: dict[str, Any] = {}
    with tune._choosing(None, seen):
        job.call(fused, tune._as_it_is)
    key, config = seen[job.operation]
    for fields in tune._FIELDS[job.operation]:
        for variant in tune._variants(job.operation, key, config, fields):
            failed = tune._trial(job, judge, variant, DEVICE)
            assert failed == "", (job.title, tune._changes(config, variant))


def test_command_writes_a_table_of_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_fields(monkeypatch, splice_forward=(("num_warps",),), splice_backward=(("rows",),))
    monkeypatch.setitem(tune._ROUNDS, "cpu", 2)
    output = tmp_path / "new" / "table.json"
    result = call("--output", output, *OPTIONS)
    assert result.exit_code == 0, result.output
    written = json.loads(output.read_text())
    entries = written.pop("entries")
    assert set(written) == {"format", "version", "device", "driver", "triton", "torch", "date"}
    assert written["device"] == tune._device_name(DEVICE)
    assert written["torch"] == torch.__version__
    *lines, last = result.stdout.splitlines()
    assert last == f"table: {output} ({len(entries)} new entries)"
    titles = ["reconstruct", "splice forward", "splice forward, mask", "splice backward"]
    assert [line.partition(": ")[0] for line in lines] == titles
    assert [line.rpartition("(")[2] for line in lines] == [
        "0 variants, 0 dropped)",
        "2 variants, 0 dropped)",
        "2 variants, 0 dropped)",
        "1 variants, 0 dropped)",
    ]
    assert list(output.parent.iterdir()) == [output]


def test_table_is_used_and_results_stay_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_fields(monkeypatch, splice_forward=(("block_d",),), reconstruct=(("expand_depth",),))
    better = prefer(lambda c: getattr(c, "block_d", 0) == 16 or getattr(c, "expand_depth", 0) == 16)
    monkeypatch.setattr(tune, "_samples", better)
    output = tmp_path / "table.json"
    assert call("--output", output, *OPTIONS).exit_code == 0
    found = {e["operation"]: e for e in json.loads(output.read_text())["entries"]}
    assert found["splice_forward"]["fields"] == {"block_d": 16}
    assert found["reconstruct"]["fields"] == {"expand_depth": 16}
    times = ("microseconds_before", "microseconds_after")
    assert [found["reconstruct"][name] for name in times] == [100.0, 50.0]

    widths: list[int] = []
    real = splice.run

    def recorder(*args: Any, **options: Any) -> None:
        widths.append(options.get("BLOCK_D", 0))
        real(*args, **options)

    monkeypatch.setattr(splice, "run", recorder)
    sizes = Sizes(3, 7, 2, 2, 4, 32, batch=2, length=5)
    case = make_case(sizes, padding="right", dtype=torch.float32)
    if ON_GPU:
        case = dataclasses.replace(
            case,
            parameters={k: v.detach().to(DEVICE) for k, v in case.parameters.items()},
            weight=case.weight.to(DEVICE),
            input_ids=case.input_ids.to(DEVICE),
            attention_mask=case.attention_mask.to(DEVICE),  # type: ignore[union-attr]
        )
    plain = case.both("triton")
    monkeypatch.setenv("EPT_FAST_TUNED", str(output))
    launch._tuned_file.cache_clear()
    tuned = case.both("triton")
    assert widths == [32, 16]
    assert launch.reconstruct_config(1, 3, 7, 2, 2, 4, 32).expand_depth == 16
    assert launch.splice_forward_config(*MASKED).block_d == 16
    # Other arguments than the table's: the heuristic's say.
    assert launch.splice_forward_config(3, *MASKED[1:]).block_d == 32
    assert launch.reconstruct_config(1, 3, 7, 2, 2, 4, width=64).expand_depth == 32
    exact = case.both("eager")
    torch.testing.assert_close(tuned, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tuned, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.default_algorithms
def test_variants_that_fail_are_dropped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_fields(monkeypatch, splice_forward=(("num_warps",), ("num_stages",)))
    monkeypatch.setattr(tune, "_samples", prefer(lambda c: getattr(c, "num_stages", 2) == 3))
    real = splice.run

    def run(*args: Any, **options: Any) -> None:
        warps = options["num_warps"] if "HAS_IDS" in options else None
        if warps == 4:
            return  # leaves its output as it was allocated
        if warps == 16:
            raise RuntimeError("out of resource: shared memory\nand more")
        real(*args, **options)

    monkeypatch.setattr(splice, "run", run)
    output = tmp_path / "table.json"
    result = call("--output", output, *OPTIONS, *PLAIN)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("splice forward: ")]
    assert lines == [
        "splice forward: dropped num_warps=16: RuntimeError: out of resource: shared memory",
        lines[1],
        "splice forward: 100.0 µs, now 50.0 µs with num_stages=3 (4 variants, 2 dropped)",
    ]
    assert lines[1].startswith("splice forward: dropped num_warps=4: wrong: output is off by nan")
    assert {e["operation"] for e in json.loads(output.read_text())["entries"]} == {"splice_forward"}


def test_a_heuristic_that_fails_is_a_defect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_fields(monkeypatch)
    monkeypatch.setattr(splice, "run", lambda *args, **options: None)
    result = call("--output", tmp_path / "table.json", *OPTIONS, *PLAIN)
    assert isinstance(result.exception, RuntimeError)
    assert "splice forward: the heuristic's own configuration fails" in str(result.exception)
    assert launch._chooser is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("before", "after", "faster"),
    [
        ([100, 100, 100], [98, 98, 98], True),
        ([100, 100, 100], [99.5, 99.5, 99.5], False),  # under 1%
        ([90, 100, 110], [85, 85, 85], False),  # the first varies by more than that
        ([100, 100, 100], [80, 90, 110], False),
        ([90, 100, 110], [40, 50, 60], True),
        ([100, 100, 100], [101, 101, 101], False),
    ],
)
def test_faster_by_more_than_the_noise(
    before: list[float], after: list[float], faster: bool
) -> None:
    assert (tune._gain(before, after) > 0) == faster


def test_a_gain_that_does_not_last_is_no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    few_fields(monkeypatch, splice_backward=(("num_warps",),))
    rounds = iter([[[100.0] * 3, [50.0] * 3, [60.0] * 3], [[100.0] * 3, [100.0] * 3]])
    monkeypatch.setattr(tune, "_samples", lambda *_: next(rounds))
    said: list[str] = []
    job = tune._jobs(SMALL, DEVICE)[-1]
    _, heuristic, best, *_ = tune._search(job, DEVICE, said.append)
    assert best == heuristic
    assert said == ["splice backward: 100.0 µs, the heuristic stands (2 variants, 0 dropped)"]


def test_tables_merge_by_sizes_and_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_fields(monkeypatch, splice_forward=(("block_d",),))
    monkeypatch.setattr(tune, "_samples", prefer(lambda _: False))
    other = entry(key={**entry()["key"], "batch": 9})
    output = write(tmp_path / "table.json", table(entry(), other))
    result = call("--output", output, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text())["entries"] == [other]
    assert call("--output", output, *OPTIONS, "--overwrite").exit_code == 0
    assert json.loads(output.read_text())["entries"] == []


FOREIGN: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "expected a JSON object, got damaged text"),
    "a list": ([1], "expected a JSON object, got list"),
    "another file": ({"a": 1}, "expected a table that ept-fast tune wrote, got another file"),
}
UNSUITED: dict[str, tuple[Any, str]] = {
    "another GPU": (table(device="Abacus"), "device: expected"),
    "another Triton": (table(triton="2.0.0"), "triton: expected"),
    "another format": (table(version=2), "version: expected 1, got 2"),
    "no entries": (table(entries=None), "entries: expected a list, got NoneType"),
    "no operation": (table(entry(operation="sort")), "expected an operation of splice_forward"),
    "a string for an entry": (table("splice_forward"), "expected an operation of"),
    "unknown field": (table(entry(fields={"warps": 4})), "splice_forward: unknown field 'warps'"),
    "precision": (table(entry(fields={"input_precision": "tf32"})), "unknown field"),
    "no fields": (table(entry(fields=4)), "fields: expected an object, got 4"),
    "no integer": (table(entry(fields={"num_warps": 4.0})), "num_warps: expected an integer"),
    "true": (table(entry(fields={"num_warps": True})), "num_warps: expected an integer"),
    "zero": (table(entry(fields={"rows": 0})), "rows: expected an integer >= 1, got 0"),
    "odd": (table(entry(fields={"block_d": 48})), "block_d: expected a power of two, got 48"),
    "too small": (table(entry(fields={"block_s": 8})), "block_s: expected at least 16, got 8"),
    "too wide": (table(entry(fields={"block_d": 1 << 18})), "expected tiles of at most"),
    "many warps": (table(entry(fields={"num_warps": 64})), "num_warps: expected at most 16"),
    "deep": (table(entry(fields={"num_stages": 9})), "num_stages: expected at most 8, got 9"),
    "no key": (table(entry(key=None)), "key: expected the names batch, length"),
    "part of a key": (table(entry(key={"batch": 1})), "key: expected the names batch, length"),
    "negative size": (
        table(entry(key={**entry()["key"], "batch": -1})),
        "batch: expected a size or true or false, got -1",
    ),
    "unknown type": (
        table(entry(key={**entry()["key"], "dtype": "float64"})),
        "dtype: expected one of float32, bfloat16, float16, got 'float64'",
    ),
}


@pytest.mark.parametrize("case", UNSUITED | FOREIGN)
def test_output_that_is_no_table_for_here_is_refused(case: str, tmp_path: Path) -> None:
    values, expected = (UNSUITED | FOREIGN)[case]
    output = write(tmp_path / "table.json", values)
    before = output.read_bytes()
    result = call("--output", output, *OPTIONS)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: output: ")
    assert expected in result.stderr
    assert result.stderr.endswith("(--overwrite replaces the file)\n")
    assert output.read_bytes() == before


@pytest.mark.parametrize("case", UNSUITED)
def test_table_that_does_not_suit_is_ignored_with_one_warning(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values, expected = UNSUITED[case]
    path = write(tmp_path / "table.json", values)
    heuristic = launch.splice_forward_config(*FORWARD)
    monkeypatch.setenv("EPT_FAST_TUNED", str(path))
    launch._tuned_file.cache_clear()
    with caplog.at_level(logging.WARNING, "ept_fast"):
        assert launch.splice_forward_config(*FORWARD) == heuristic
        assert launch.splice_forward_config(*MASKED).block_d == 32
    (message,) = caplog.messages
    assert message.startswith(f"EPT_FAST_TUNED: {path} is not used: ")
    assert expected in message


def reconstruct_table(**fields: int) -> dict[str, Any]:
    key = {"tasks": 1, "m": 40, "n": 256, "rank": 30, "spaces": 4, "dim": 8, "width": 768}
    return table({"operation": "reconstruct", "key": key, "fields": fields})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (reconstruct_table(d_chunk=100), "d_chunk: expected a multiple of reduce_depth"),
        (reconstruct_table(d_splits=1, d_chunk=256), "d_splits: expected 3 of 256 for 768, got 1"),
        (reconstruct_table(n_splits=9, n_chunk=128), "n_splits: expected 2 of 128 for 256, got 9"),
        (reconstruct_table(unroll=64), "unroll: expected at most 16, got 64"),
        (
            table(
                {
                    "operation": "splice_backward",
                    "key": {
                        **{k: v for k, v in entry()["key"].items() if k != "has_mask"},
                        "has_prompt": True,
                        "has_offset": True,
                        "tasks": 0,
                    },
                    "fields": {},
                }
            ),
            "key: expected sizes of tensors",
        ),
    ],
)
def test_pieces_have_to_cover_what_they_cut(
    values: dict[str, Any],
    expected: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write(tmp_path / "table.json", values)
    assert tune.read_tuned(str(path), DEVICE) == {}
    assert expected in caplog.text


@pytest.mark.parametrize("case", [*FOREIGN, "no file"])
def test_table_that_cannot_be_read_is_an_error(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, expected = FOREIGN.get(case, ("", "expected a readable file, got No such file"))
    path = tmp_path / "table.json"
    if case != "no file":
        write(path, values)
    monkeypatch.setenv("EPT_FAST_TUNED", str(path))
    launch._tuned_file.cache_clear()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^EPT_FAST_TUNED: .*table\.json: ") as caught:
            launch.splice_forward_config(*FORWARD)
        assert expected in str(caught.value)


def test_without_the_variable_no_table_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(
        launch, "_tuned", type("", (), {"__call__": refuse, "cache_clear": print})()
    )
    before = launch.splice_forward_config(*FORWARD)
    monkeypatch.setenv("EPT_FAST_TUNED", "nowhere")  # read once, and that was it
    assert launch.splice_forward_config(*FORWARD) == before


def test_lookup_imports_no_triton(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from ept_fast.kernels import launch\n"
        "sizes = (2, 5, 3, 32, 2, 1, torch.float32, torch.device('cpu'), False)\n"
        "print(launch.splice_forward_config(*sizes).block_d, 'triton' in sys.modules)"
    )
    path = write(tmp_path / "table.json", table(entry(), device="cpu"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "EPT_FAST_TUNED": str(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "16 False\n", done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--device meta", "device: expected a GPU, or cpu under TRITON_INTERPRET=1, got 'meta'"),
        (
            "--device abacus",
            "device: expected a GPU, or cpu under TRITON_INTERPRET=1, got 'abacus'",
        ),
        ("--device cuda:99", "device: expected a GPU, or cpu under TRITON_INTERPRET=1, got"),
        ("--length 8", "length: expected at most max_length 7, got 8"),
        ("--rank 257", "device: expected one that the triton backend serves, got rank 257 is more"),
        ("--output {folder}", "output: expected a file, got the folder"),
        ("--rank -1", "Invalid value for '--rank'"),
        ("--embeddings fp64", "Invalid value for '--embeddings'"),
    ],
)
def test_mistakes_are_exit_code_2(words: str, expected: str, tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    result = call("--output", output, *OPTIONS, *words.format(folder=tmp_path).split())
    assert result.exit_code == 2, result.output
    assert expected in result.stderr
    assert result.stdout == ""
    assert not output.exists()


def test_a_cpu_serves_only_under_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = call("--output", tmp_path / "table.json", *OPTIONS, "--device", "cpu")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: device: expected ")


def test_sizes_without_offset_or_spaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_fields(monkeypatch)
    monkeypatch.setattr(tune, "_samples", prefer(lambda _: False))
    result = call("--output", tmp_path / "t.json", *OPTIONS, *PLAIN)
    assert result.exit_code == 0, result.output
    lines = [line.partition(": ")[0] for line in result.stdout.splitlines()]
    assert lines == ["splice forward", "splice backward", "table"]


def test_help() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert "EPT_FAST_TUNED" in result.stdout
