"""Both operations, forward and backward, against the definition: ``python -m bench.prompt_path``.

One process, interleaved: every round runs each variant once, in turn, and a variant's ratio is the
median over the rounds of its time by that of the reference in the same round, so a machine whose
speed drifts still compares like with like. Before a shape is timed, outputs and gradients of every
variant are checked against the reference in float64; a variant that fails is not timed.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

import ept_fast
from bench.environment import commit, machine
from ept_fast import reference


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement, in METHOD's symbols; ``padding`` is the share of padded columns."""

    name: str
    batch: int
    length: int
    num_virtual_tokens: int
    max_length: int
    rank: int
    num_spaces: int
    space_dim: int
    hidden_size: int
    padding: float = 0.0


SHAPES = (
    Shape("base", 32, 128, 40, 256, 30, 4, 8, 768),
    Shape("wide", 8, 512, 60, 512, 24, 4, 16, 2048),
    Shape("base-right-padded", 32, 128, 40, 256, 30, 4, 8, 768, 0.5),
    Shape("short", 32, 24, 20, 128, 30, 4, 4, 384, 0.5),
)
_VOCABULARY = 30522
_SCALING = 0.5


@dataclass(frozen=True)
class Case:
    """The tensors of one shape: parameters that train, a frozen table, a batch, a cotangent."""

    parameters: dict[str, Tensor]
    weight: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    cotangent: Tensor


def make_case(shape: Shape) -> Case:
    """Random tensors of one shape, the same on every call."""
    g = torch.Generator().manual_seed(0)
    d, k, h = shape.hidden_size, shape.num_spaces, shape.space_dim
    sizes = {
        "short_prompt": (shape.num_virtual_tokens, d),
        "offset_a": (shape.max_length, shape.rank),
        "offset_b": (shape.rank, d),
        "space_down": (k, d, h),
        "space_up": (k, h, d),
        "gate_weight": (d, k),
        "gate_bias": (k,),
    }
    parameters = {
        name: (torch.randn(size, generator=g) * 0.05).requires_grad_()
        for name, size in sizes.items()
    }
    batch, length = shape.batch, shape.length
    mask = torch.ones(batch, length, dtype=torch.int64)
    if shape.padding:
        low = max(1, round(length * (1 - shape.padding)))
        lengths = torch.randint(low, length + 1, (batch, 1), generator=g)
        mask = (torch.arange(length) < lengths).long()
    return Case(
        parameters,
        torch.randn(_VOCABULARY, d, generator=g) * 0.05,
        torch.randint(_VOCABULARY, (batch, length), generator=g),
        mask,
        torch.randn(batch, shape.num_virtual_tokens + length, d, generator=g),
    )


PromptPath = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor], Tensor]


def _definition(p: dict[str, Tensor], weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    prompt = reference.reconstruct_prompt(**p, scaling=_SCALING)
    a, b = p["offset_a"], p["offset_b"]
    return reference.splice_prompt(
        prompt,
        input_ids=ids,
        weight=weight,
        offset_a=a,
        offset_b=b,
        scaling=_SCALING,
        attention_mask=mask,
    )


def _eager(p: dict[str, Tensor], weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    prompt = ept_fast.reconstruct_prompt(**p, scaling=_SCALING, backend="eager")
    a, b = p["offset_a"], p["offset_b"]
    return ept_fast.splice_prompt(
        prompt,
        input_ids=ids,
        weight=weight,
        offset_a=a,
        offset_b=b,
        scaling=_SCALING,
        attention_mask=mask,
        backend="eager",
    )


def step(path: PromptPath, case: Case) -> tuple[float, float]:
    """Seconds of one forward and of one backward."""
    for parameter in case.parameters.values():
        parameter.grad = None
    begin = time.perf_counter()
    out = path(case.parameters, case.weight, case.input_ids, case.attention_mask)
    middle = time.perf_counter()
    out.backward(case.cotangent)
    return middle - begin, time.perf_counter() - middle


def check(path: PromptPath, case: Case) -> float:
    """Largest error of output and gradients against float64, by that of the float32 definition."""

    def run(path: PromptPath, dtype: torch.dtype) -> list[Tensor]:
        p = {name: t.detach().to(dtype).requires_grad_() for name, t in case.parameters.items()}
        out = path(p, case.weight.to(dtype), case.input_ids, case.attention_mask)
        out.backward(case.cotangent.to(dtype))
        return [out.detach(), *(t.grad for t in p.values() if t.grad is not None)]

    exact = run(_definition, torch.float64)
    ours, plain = run(path, torch.float32), run(_definition, torch.float32)
    worst = 0.0
    for e, o, q in zip(exact, ours, plain, strict=True):
        own = (o.double() - e).abs().max().item()
        floor = max((q.double() - e).abs().max().item(), 1e-7 * e.abs().max().item())
        worst = max(worst, own / floor)
    return worst


@dataclass(frozen=True)
class Row:
    """One variant at one shape: milliseconds (medians) and the median ratios to the reference."""

    shape: str
    variant: str
    forward_ms: float
    backward_ms: float
    total_ms: float
    ratio_to_reference: float
    ratio_to_compiled: float
    rounds: int
    threads: int
    device: str
    torch: str
    commit: str


def measure(shape: Shape, rounds: int) -> list[Row]:
    """Time all variants of one shape, interleaved."""
    case = make_case(shape)
    torch.compiler.reset()
    paths: dict[str, PromptPath] = {
        "reference": _definition,
        "reference-compiled": torch.compile(_definition, dynamic=False),
        "eager": _eager,
    }
    for name, path in paths.items():
        error = check(path, case)
        if error > 4:
            raise SystemExit(f"{shape.name}: {name}: parity failed: {error:.1f}x the float32 error")
    for _ in range(3):
        for path in paths.values():
            step(path, case)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in paths.items():
            times[name].append(step(path, case))
    total = {name: [f + b for f, b in pairs] for name, pairs in times.items()}

    def ratio(name: str, base: str) -> float:
        return statistics.median(x / y for x, y in zip(total[name], total[base], strict=True))

    return [
        Row(
            shape.name,
            name,
            1e3 * statistics.median(f for f, _ in times[name]),
            1e3 * statistics.median(b for _, b in times[name]),
            1e3 * statistics.median(total[name]),
            ratio(name, "reference"),
            ratio(name, "reference-compiled"),
            rounds,
            torch.get_num_threads(),
            machine(),
            torch.__version__,
            commit(),
        )
        for name in paths
    ]


@click.command()
@click.option("--shape", "names", multiple=True, help="Only these shapes.")
@click.option("--rounds", default=40, show_default=True)
@click.option("--csv", "target", type=click.Path(path_type=Path), help="Write the rows here.")
def main(names: tuple[str, ...], rounds: int, target: Path | None) -> None:
    """Time the prompt path's backends against the definition, eager and compiled."""
    rows: list[Row] = []
    for shape in SHAPES:
        if names and shape.name not in names:
            continue
        for row in measure(shape, rounds):
            rows.append(row)
            click.echo(
                f"{row.shape:18} {row.variant:19} forward {row.forward_ms:7.2f} ms  backward "
                f"{row.backward_ms:7.2f} ms  / reference {row.ratio_to_reference:5.2f}  "
                f"/ compiled {row.ratio_to_compiled:5.2f}"
            )
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
