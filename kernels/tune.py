"""`ept-fast tune`: launch configurations measured on one device, and the table that keeps them.

Nothing here runs unless it is asked for. The fields of a heuristic's configuration are varied one
after another, each on top of the best so far. A variant counts only if its results are no worse
than the heuristics are tested to be, and replaces the best only where it is faster by more than the
noise of the two.

``EPT_FAST_TUNED`` names the table to use. The heuristics then take a configuration from it where it
has their very arguments, and decide as ever elsewhere. Some of the fields are the partition of a
sum: a table may change the order of sums, and so the last bits of a result, which without one
depend on shapes and types alone.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from ept_fast.backends import eager
from ept_fast.backends import triton as fused
from ept_fast.kernels import launch
from ept_fast.kernels.launch import ReconstructConfig, SpliceConfig
from ept_fast.storage.files import CheckpointError, read_json, write_json

__all__ = ["TuneSizes", "read_tuned", "tune"]

Config = SpliceConfig | ReconstructConfig
Key = dict[str, Any]

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TYPES.values()}
_DTYPE_NAMES: dict[Any, str] = {dtype: name for name, dtype in _DTYPES.items()}
FORMAT = "ept_fast tuned launches"
FORMAT_VERSION = 1

_HEURISTICS: dict[str, Callable[..., Config]] = {
    "splice_forward": inspect.unwrap(launch.splice_forward_config),
    "splice_backward": inspect.unwrap(launch.splice_backward_config),
    "reconstruct": inspect.unwrap(launch.reconstruct_config),
}
# What is varied, in this order. Those of one line change together: a sum's tile and its pieces.
_FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "splice_forward": (
        ("num_warps",),
        ("num_stages",),
        ("block_s",),
        ("block_d",),
        ("block_r",),
        ("rows",),
        ("block_b",),
        ("tiles",),
    ),
    "splice_backward": (
        ("num_warps",),
        ("num_stages",),
        ("block_s",),
        ("block_d",),
        ("rows",),
        ("block_b",),
        ("tiles",),
        ("tiles_d",),
    ),
    "reconstruct": (
        ("warps",),
        ("d_splits", "d_chunk"),
        ("backward_d_splits", "backward_d_chunk"),
        ("positions", "n_splits", "n_chunk"),
        ("n_splits", "n_chunk"),
        ("backward_positions", "backward_n_chunk"),
        ("groups", "group_rows"),
        ("columns",),
        ("expand_depth",),
        ("unroll",),
    ),
}
# Operands of a `tl.dot`, at least 16 in every dimension.
_DOT = (
    "block_s",
    "block_d",
    "block_r",
    "positions",
    "backward_positions",
    "columns",
    "expand_depth",
)
# The most elements of a tile in Triton.
_TILE = 1 << 20
_ROUNDS = {"cpu": 5, "cuda": 40}
# Gains below this part of the time are no gains, however quiet the measurement.
_LEAST_GAIN = 0.01
# More than the caches of any GPU of today; written before every run, so that each starts cold.
_CACHE_BYTES = 512 * 1024 * 1024

_logger = logging.getLogger("ept_fast")


@dataclass(frozen=True)
class TuneSizes:
    """What to tune for: METHOD's sizes, the text's, and the types of embeddings and parameters."""

    batch: int = 32
    length: int = 256
    hidden_size: int = 768
    num_virtual_tokens: int = 40
    max_length: int = 256
    rank: int = 30
    num_spaces: int = 4
    space_dim: int = 8
    tasks: int = 1
    embeddings: str = "bf16"
    parameters: str = "fp32"


@dataclass(frozen=True)
class _Job:
    """One launch, or the launches of one configuration: ``call(backend, convert)`` runs them."""

    operation: str
    title: str
    call: Callable[[Any, Callable[[Any], Any]], dict[str, Tensor]]


def _arguments(operation: str) -> list[str]:
    """The names of a heuristic's arguments."""
    return list(inspect.signature(_HEURISTICS[operation]).parameters)


def _heuristic(operation: str, key: Key, device: torch.device) -> Config:
    place = {"device": device} if "device" in _arguments(operation) else {}
    return _HEURISTICS[operation](**key, **place)


def _changed(config: Config, fields: dict[str, Any]) -> Config:
    if isinstance(config, SpliceConfig):
        return dataclasses.replace(config, **fields)
    return dataclasses.replace(config, **fields)


# What a configuration has to keep


def _problem(operation: str, key: Key, config: Config) -> str:
    """Why the kernels cannot run with this configuration; empty where they can."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "input_precision":
            continue
        dot, warps = field.name in _DOT, field.name.endswith("warps")
        if value < 1:
            return f"{field.name}: expected an integer >= 1, got {value}"
        if (dot or warps or field.name == "block_b") and value & (value - 1):
            return f"{field.name}: expected a power of two, got {value}"
        if dot and value < 16:
            return f"{field.name}: expected at least 16, got {value}"
        if warps and value > 16:
            return f"{field.name}: expected at most 16, got {value}"
        if field.name.endswith("stages") and value > 8:
            return f"{field.name}: expected at most 8, got {value}"
    if isinstance(config, SpliceConfig):
        return _splice_problem(operation, key, config)
    return _reconstruct_problem(key, config)


def _splice_problem(operation: str, key: Key, config: SpliceConfig) -> str:
    largest = config.block_b * max(config.block_s * config.block_d, config.block_c)
    if largest > _TILE:
        return f"block_b, block_s, block_d: expected tiles of at most {_TILE}, got {largest}"
    if operation == "splice_forward":
        return ""
    if key["has_offset"] and config.block_r < key["rank"]:
        return f"block_r: expected at least the rank {key['rank']}, got {config.block_r}"
    if config.block_s * config.block_r > _TILE:
        return f"block_s: expected tiles of at most {_TILE} elements, got {config.block_s}"
    return ""


def _reconstruct_problem(key: Key, config: ReconstructConfig) -> str:
    if config.rank < key["rank"]:
        return f"rank: expected at least {key['rank']}, got {config.rank}"
    if config.unroll > 16:
        return f"unroll: expected at most 16, got {config.unroll}"
    for length, pieces, chunk, block in (
        ("width", "d_splits", "d_chunk", "reduce_depth"),
        ("width", "backward_d_splits", "backward_d_chunk", "reduce_depth"),
        ("n", "n_splits", "n_chunk", "positions"),
        ("m", "groups", "group_rows", "rows"),
    ):
        number, size, step = (getattr(config, name) for name in (pieces, chunk, block))
        total = max(1, key[length])
        if size % step:
            return f"{chunk}: expected a multiple of {block} {step}, got {size}"
        expected = launch._ceil(total, size)
        if number != expected:
            return f"{pieces}: expected {expected} of {size} for {total}, got {number}"
    if config.backward_n_chunk % config.backward_positions:
        return (
            f"backward_n_chunk: expected a multiple of backward_positions "
            f"{config.backward_positions}, got {config.backward_n_chunk}"
        )
    return ""


def _workspace(key: Key, config: SpliceConfig) -> int:
    """Bytes of the partial sums of the splice's backward."""
    chunks_b: int = launch._ceil(key["batch"], config.rows)
    chunks_s = launch._ceil(key["length"], config.block_s * config.tiles)
    chunks_d = launch._ceil(key["hidden_size"], config.block_d * config.tiles_d)
    parts: int = key["num_virtual_tokens"] * key["hidden_size"] if key["has_prompt"] else 0
    if key["has_offset"]:
        parts += key["rank"] * (chunks_d * key["length"] + chunks_s * key["hidden_size"])
    chunks_b *= min(key["tasks"], key["batch"])
    return 4 * chunks_b * parts


# Variants


def _more_and_less(fields: Sequence[str], key: Key, config: Config) -> Iterator[dict[str, int]]:
    """Changes of these fields, one step up and one step down."""
    name = fields[0]
    value = getattr(config, name)
    for wanted in (value + 1, value - 1) if name.endswith("stages") else (2 * value, value // 2):
        if not isinstance(config, ReconstructConfig) or len(fields) == 1:
            yield {name: wanted}
        elif name == "positions":
            # As many pieces as before, of whole tiles again.
            pieces, chunk = launch._pieces(key["n"], max(1, wanted), config.n_splits)
            yield {"positions": wanted, "n_splits": pieces, "n_chunk": chunk}
        elif name == "backward_positions":
            pieces = launch._ceil(key["n"], config.backward_n_chunk)
            _, chunk = launch._pieces(key["n"], max(1, wanted), pieces)
            yield {"backward_positions": wanted, "backward_n_chunk": chunk}
        else:
            length, block = {
                "n_splits": (key["n"], config.positions),
                "groups": (key["m"], config.rows),
            }.get(name, (key["width"], config.reduce_depth))
            pieces, chunk = launch._pieces(length, block, wanted)
            yield {fields[0]: pieces, fields[1]: chunk}


def _variants(operation: str, key: Key, config: Config, fields: Sequence[str]) -> list[Config]:
    """The configurations one step away in these fields that the kernels can run."""
    found: list[Config] = []
    for change in _more_and_less(fields, key, config):
        variant = _changed(config, change)
        if variant == config or variant in found or _problem(operation, key, variant):
            continue
        if _beyond(operation, key, config, variant):
            continue
        found.append(variant)
    return found


def _beyond(operation: str, key: Key, config: Config, variant: Config) -> bool:
    """Whether it only covers more than there is, or takes more memory than a launch may."""
    there: dict[str, int]
    if isinstance(variant, SpliceConfig):
        there = {
            "block_s": max(key["length"], 1),
            "block_d": key["hidden_size"],
            "block_r": max(key["rank"], 1),
            "rows": key["batch"],
            "block_b": key["batch"],
            "tiles": launch._ceil(key["hidden_size"], variant.block_d),
        }
        if operation == "splice_backward":
            assert isinstance(config, SpliceConfig)
            there["tiles"] = launch._ceil(key["length"], variant.block_s)
            there["tiles_d"] = launch._ceil(key["hidden_size"], variant.block_d)
            allowed = max(launch._WORKSPACE_BYTES, _workspace(key, config))
            if _workspace(key, variant) > allowed:
                return True
    else:
        there = {
            "positions": max(key["n"], 1),
            "backward_positions": max(key["n"], 1),
            "columns": max(key["spaces"] * (key["dim"] + 1), 1),
            "expand_depth": key["width"],
        }
    return any(
        getattr(variant, name) > getattr(config, name) >= size for name, size in there.items()
    )


# Check and time


@contextmanager
def _choosing(config: Config | None, seen: dict[str, tuple[Key, Config]]) -> Iterator[None]:
    """Have the heuristics give this configuration; note their arguments and what they say."""

    def choose(operation: str, given: Key) -> Config:
        heuristic = _HEURISTICS[operation](**given)
        key = {name: value for name, value in given.items() if name != "device"}
        seen[operation] = key, heuristic
        return heuristic if config is None else config

    launch._chooser = choose
    try:
        yield
    finally:
        launch._chooser = None


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New tensors full of NaN: what a kernel leaves out must not look right from an earlier run."""
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before, warn_only=warn)


def _as_it_is(value: Any) -> Any:
    return value


def _as_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Judge:
    """The eager backend in float64, and how far its own results in the given types are from it."""

    def __init__(self, job: _Job) -> None:
        self.exact = job.call(eager, _as_float64)
        plain = job.call(eager, _as_it_is)
        self.allowed = {}
        for name, expected in self.exact.items():
            if expected.numel() == 0:
                continue
            error = (plain[name].double() - expected).abs().max().item()
            eps = max(torch.finfo(plain[name].dtype).eps, 4 * torch.finfo(torch.float32).eps)
            self.allowed[name] = 2 * error + eps * expected.abs().max().item()

    def verdict(self, got: dict[str, Tensor]) -> str:
        """What is wrong with these results; empty where nothing is."""
        for name, allowed in self.allowed.items():
            error = (got[name].double() - self.exact[name]).abs().max().item()
            if not error <= allowed:  # NaN is worse as well
                return f"wrong: {name} is off by {error:.3g}, expected at most {allowed:.3g}"
        return ""


def _trial(job: _Job, judge: _Judge, config: Config | None, device: torch.device) -> str:
    """Run it once: why it cannot be used, or nothing."""
    try:
        with _choosing(config, {}), _poisoned_memory():
            got = job.call(fused, _as_it_is)
        _synchronize(device)
    except torch.AcceleratorError:  # the device itself is lost to this process
        raise
    except Exception as error:  # compilers raise what they like
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return judge.verdict(got)


def _call(job: _Job, config: Config) -> None:
    with _choosing(config, {}):
        job.call(fused, _as_it_is)


def _timer(job: _Job, config: Config, device: torch.device) -> Callable[[], float]:
    """A function that runs it once and says how many µs that took."""
    if device.type == "cpu":

        def wall_clock() -> float:
            begin = time.perf_counter()
            _call(job, config)
            return (time.perf_counter() - begin) * 1e6

        return wall_clock

    # A graph, so that it is the device's time and not the host's.
    cuda: Any = torch.cuda
    side = cuda.Stream(device)
    side.wait_stream(cuda.current_stream(device))
    with cuda.stream(side):
        _call(job, config)
    cuda.current_stream(device).wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        _call(job, config)
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))

    def events() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end) * 1e3)

    return events


def _samples(job: _Job, configs: Sequence[Config], device: torch.device) -> list[list[float]]:
    """Times in µs of each configuration, taken in turn."""
    size = _CACHE_BYTES if device.type == "cuda" else 0
    cache = torch.empty(size, dtype=torch.uint8, device=device)
    timers = [_timer(job, config, device) for config in configs]
    times: list[list[float]] = [[] for _ in timers]
    for _ in range(1 + _ROUNDS[device.type]):
        for timer, taken in zip(timers, times, strict=True):
            cache.zero_()
            taken.append(timer())
    return [taken[1:] for taken in times]


def _gain(before: Sequence[float], after: Sequence[float]) -> float:
    """How many µs the second takes less, beyond the noise of the two; 0 or less where none."""

    def spread(times: Sequence[float]) -> float:
        low, _, high = statistics.quantiles(times, n=4)
        return high - low

    median = statistics.median(before)
    noise = max(spread(before), spread(after), _LEAST_GAIN * median)
    return median - statistics.median(after) - noise


def _search(
    job: _Job, device: torch.device, say: Callable[[str], None]
) -> tuple[Key, Config, Config, list[float], list[float]]:
    """Key, the heuristic's configuration, the best one found, and the times of both."""
    judge = _Judge(job)
    seen: dict[str, tuple[Key, Config]] = {}
    with _choosing(None, seen):
        job.call(fused, _as_it_is)
    key, heuristic = seen[job.operation]
    failed = _trial(job, judge, None, device)
    if failed:
        raise RuntimeError(f"{job.title}: the heuristic's own configuration fails here: {failed}")
    best, tried, dropped = heuristic, 0, 0
    for fields in _FIELDS[job.operation]:
        variants = []
        for variant in _variants(job.operation, key, best, fields):
            tried += 1
            failed = _trial(job, judge, variant, device)
            if failed:
                dropped += 1
                say(f"{job.title}: dropped {_words(_changes(best, variant))}: {failed}")
            else:
                variants.append(variant)
        if not variants:
            continue
        before, *others = _samples(job, [best, *variants], device)
        gains = [_gain(before, after) for after in others]
        if max(gains) > 0:
            best = variants[gains.index(max(gains))]
    before, after = _samples(job, [heuristic, best], device)
    if best != heuristic and _gain(before, after) <= 0:
        best = heuristic
    say(_outcome(job, heuristic, best, before, after, tried, dropped))
    return key, heuristic, best, before, after


def _changes(before: Config, after: Config) -> dict[str, int]:
    names = [field.name for field in dataclasses.fields(before)]
    return {n: getattr(after, n) for n in names if getattr(after, n) != getattr(before, n)}


def _words(fields: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def _outcome(
    job: _Job,
    heuristic: Config,
    best: Config,
    before: Sequence[float],
    after: Sequence[float],
    tried: int,
    dropped: int,
) -> str:
    of = f"({tried} variants, {dropped} dropped)"
    old, new = statistics.median(before), statistics.median(after)
    if best == heuristic:
        return f"{job.title}: {old:.1f} µs, the heuristic stands {of}"
    return (
        f"{job.title}: {old:.1f} µs, now {new:.1f} µs with {_words(_changes(heuristic, best))} {of}"
    )


# The launches


_GRADIENTS = (
    "d_short_prompt",
    "d_offset_a",
    "d_offset_b",
    "d_space_down",
    "d_space_up",
    "d_gate_weight",
    "d_gate_bias",
)


def _jobs(sizes: TuneSizes, device: torch.device) -> list[_Job]:
    """The launches on random tensors; those that these sizes have no use for are left out."""
    g = torch.Generator(device).manual_seed(0)
    s, scaling, flags = sizes, 0.5, ("gelu", "token", 1.0)
    table_type, parameter_type = TYPES[s.embeddings], TYPES[s.parameters]

    def normal(*shape: int, dtype: torch.dtype = parameter_type, along: int = 1) -> Tensor:
        return torch.randn(shape, generator=g, device=device).div_(along**0.5).to(dtype)

    t, m, n, r, d = s.tasks, s.num_virtual_tokens, s.max_length, s.rank, s.hidden_size
    k, h = s.num_spaces, s.space_dim
    p = normal(t, m, d)
    a, b = (normal(t, n, r), normal(t, r, d)) if r else (None, None)
    down, up = (normal(t, k, d, h, along=d), normal(t, k, h, d, along=h)) if k else (None, None)
    weight_gate, bias = (normal(t, d, k, along=d), normal(t, k)) if k else (None, None)
    seven = (p, a, b, down, up, weight_gate, bias)
    vocabulary = min(32768, 4 * s.batch * s.length)
    table = normal(vocabulary, d, dtype=table_type)
    ids = torch.randint(vocabulary, (s.batch, s.length), generator=g, device=device)
    real = torch.randint(-(-s.length // 2), s.length + 1, (s.batch, 1), generator=g, device=device)
    mask = (torch.arange(s.length, device=device) < real).long()
    tasks = None
    if t > 1:
        tasks = torch.randint(t, (s.batch,), generator=g, device=device)
    y = normal(t, m, d)
    grad = normal(s.batch, m + s.length, d, dtype=table_type)

    ok, reason = fused.supports(
        {
            "short_prompt": p,
            "offset_a": a,
            "offset_b": b,
            "space_down": down,
            "space_up": up,
            "weight": table,
        },
        by_name=True,
    )
    if not ok:
        raise ValueError(f"device: expected one that the triton backend serves, got {reason}")

    def reconstruct(backend: Any, convert: Callable[[Any], Any]) -> dict[str, Tensor]:
        given = [convert(tensor) for tensor in seven]
        out, *saved = backend.reconstruct_forward(*given, scaling, *flags)
        grads = backend.reconstruct_backward(convert(y), *given, *saved, scaling, *flags)
        return {"prompt": out, **dict(zip(_GRADIENTS, grads, strict=True))}

    def forward(masked: Tensor | None) -> Callable[..., dict[str, Tensor]]:
        def call(backend: Any, convert: Callable[[Any], Any]) -> dict[str, Tensor]:
            given = (convert(p), ids, convert(table), None, convert(a), convert(b))
            return {"output": backend.splice_forward(*given, masked, tasks, scaling)}

        return call

    def backward(backend: Any, convert: Callable[[Any], Any]) -> dict[str, Tensor]:
        given = (convert(grad), convert(p), convert(a), convert(b))
        grads = backend.splice_backward(*given, mask, tasks, scaling, True, r > 0)
        return dict(zip(("d_prompt", "d_offset_a", "d_offset_b"), grads, strict=True))

    jobs = []
    if r or k:
        jobs.append(_Job("reconstruct", "reconstruct", reconstruct))
    jobs.append(_Job("splice_forward", "splice forward", forward(None)))
    if r:  # the mask only says where the offset goes
        jobs.append(_Job("splice_forward", "splice forward, mask", forward(mask)))
    jobs.append(_Job("splice_backward", "splice backward", backward))
    return jobs


def _current(device: torch.device) -> Any:
    """Its streams and events are the current ones, inside."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


# The table


def _device_name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def _triton_version() -> str:
    return ".".join(str(part) for part in fused._VERSION or ())


def _driver(device: torch.device) -> str:
    if device.type == "cpu":
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _read(path: Path) -> dict[str, Any]:
    """A table; ValueError where the file is none."""
    try:
        table = read_json(path)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    if table.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a table that ept-fast tune wrote, got another file")
    return table


def _foreign(table: dict[str, Any], device: torch.device) -> str:
    """Why the table is not for this device and this version of Triton; empty where it is."""
    for name, here in (
        ("version", FORMAT_VERSION),
        ("device", _device_name(device)),
        ("triton", _triton_version()),
    ):
        if table.get(name) != here:
            return f"{name}: expected {here!r}, got {table.get(name)!r}"
    return ""


def _entry(entry: Any, device: torch.device) -> tuple[str, Key, Config]:
    """Operation, key and configuration of one entry; ValueError where it is no good."""
    if not isinstance(entry, dict) or entry.get("operation") not in _HEURISTICS:
        raise ValueError(f"entries: expected an operation of {', '.join(_HEURISTICS)}")
    operation: str = entry["operation"]
    given, fields = entry.get("key"), entry.get("fields")
    names = [name for name in _arguments(operation) if name != "device"]
    if not isinstance(given, dict) or sorted(given) != sorted(names):
        raise ValueError(f"{operation}: key: expected the names {', '.join(names)}")
    key: Key = {}
    for name in names:
        value = given[name]
        if name == "dtype":
            if not isinstance(value, str) or value not in _DTYPES:
                raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {value!r}")
            key[name] = _DTYPES[value]
        else:
            if type(value) is not (bool if name.startswith("has_") else int) or value < 0:
                raise ValueError(
                    f"{operation}: {name}: expected a size or true or false, got {value!r}"
                )
            key[name] = value
    if not isinstance(fields, dict):
        raise ValueError(f"{operation}: fields: expected an object, got {fields!r}")
    known = {name for group in _FIELDS[operation] for name in group}
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"{operation}: unknown field {name!r}")
        if type(value) is not int:
            raise ValueError(f"{operation}: {name}: expected an integer, got {value!r}")
    try:
        config = _changed(_heuristic(operation, key, device), fields)
    except ArithmeticError:
        raise ValueError(f"{operation}: key: expected sizes of tensors, got {given}") from None
    problem = _problem(operation, key, config)
    if problem:
        raise ValueError(f"{operation}: {problem}")
    return operation, key, config


def _entries(table: dict[str, Any]) -> list[Any]:
    entries = table.get("entries")
    if not isinstance(entries, list):
        raise ValueError(f"entries: expected a list, got {type(entries).__name__}")
    return entries


def read_tuned(path: str, device: torch.device) -> dict[tuple[Any, ...], Config]:
    """The configurations of a table, by operation and the arguments of its heuristic.

    A table of another device or another version of Triton, and one with a field or a value that the
    kernels do not have, is left alone as a whole: one warning says why.

    Raises:
        ValueError: the file cannot be read, or is no such table.
    """
    try:
        table = _read(Path(path))
    except ValueError as error:
        raise ValueError(f"EPT_FAST_TUNED: {error}") from None
    try:
        foreign = _foreign(table, device)
        if foreign:
            raise ValueError(foreign)
        found = [_entry(entry, device) for entry in _entries(table)]
    except ValueError as error:
        _logger.warning("EPT_FAST_TUNED: %s is not used: %s", path, error)
        return {}
    return {(operation, *key.values()): config for operation, key, config in found}


def _kept(path: Path, device: torch.device) -> list[dict[str, Any]]:
    """The entries of an older table that the new ones join; ValueError where they must not."""
    if not path.exists():
        return []
    try:
        table = _read(path)
        foreign = _foreign(table, device)
        if foreign:
            raise ValueError(f"{path}: {foreign}")
        entries = _entries(table)
        for entry in entries:
            _entry(entry, device)
    except ValueError as error:
        raise ValueError(f"output: {error} (--overwrite replaces the file)") from None
    return entries


def tune(
    output: Path,
    sizes: TuneSizes,
    device: str,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measure the launches for these sizes and keep in ``output`` what beats the heuristics.

    Entries of an older table for the same device and version of Triton stay, those of the same
    sizes and types excepted. On a GPU the times are its own, from events, each run with cold
    caches; on a CPU, under Triton's interpreter, they are wall clock and good for tests only.

    Args:
        output: the table, written whole or not at all.
        sizes: what to tune for.
        device: "cuda", "cuda:1"; "cpu" under the interpreter.
        overwrite: replace an older table, whatever it holds.
        say: gets a line for each launch and each variant that was dropped.

    Returns:
        The new entries.

    Raises:
        ValueError: the device is none that the kernels run on, the sizes are beyond them, or
            ``output`` is not a table for this device and this version of Triton.
    """
    place = _place(device)
    if output.is_dir():
        raise ValueError(f"output: expected a file, got the folder {output}")
    if sizes.rank > 0 and sizes.max_length < sizes.length:
        raise ValueError(
            f"length: expected at most max_length {sizes.max_length}, got {sizes.length}"
        )
    older = [] if overwrite else _kept(output, place)
    entries = []
    measured = []
    with torch.no_grad(), _current(place):
        for job in _jobs(sizes, place):
            key, heuristic, best, before, after = _search(job, place, say)
            written = {n: _DTYPE_NAMES.get(value, value) for n, value in key.items()}
            measured.append((job.operation, written))
            if best != heuristic:
                entries.append(
                    {
                        "operation": job.operation,
                        "key": written,
                        "fields": _changes(heuristic, best),
                        "microseconds_before": round(statistics.median(before), 2),
                        "microseconds_after": round(statistics.median(after), 2),
                    }
                )
    kept = [e for e in older if (e["operation"], e["key"]) not in measured]
    write_json(
        output,
        {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "device": _device_name(place),
            "driver": _driver(place),
            "triton": _triton_version(),
            "torch": torch.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "entries": [*kept, *entries],
        },
    )
    return entries


def _place(name: str) -> torch.device:
    """The device, with its index; ValueError where it is none that can be tuned for."""
    expected = "device: expected a GPU, or cpu under TRITON_INTERPRET=1"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{expected}, got {name!r}") from None
    works, reason = fused.available()
    if device.type == "cuda" and works and not torch.cuda.is_available():
        works, reason = False, "no GPU"
    if device.type not in ("cpu", "cuda") or not works:
        raise ValueError(f"{expected}, got {name!r} ({reason})")
    if device.type == "cpu":
        return device
    index = torch.cuda.current_device() if name == "cuda" else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"{expected}, got {name!r} of {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)
