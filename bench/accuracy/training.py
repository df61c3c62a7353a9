"""One training run: head, steps, evaluations, and when it stops."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.accuracy.study import EVALUATIONS, PATIENCE

_WARM_UP = 5  # steps in which the rates rise; they stay the same then
_MOST_NORM = 1.0  # of the gradient
_ROWS = 32  # whose features are computed at once


@dataclass(frozen=True)
class Rates:
    """How a method is optimised: AdamW with rates relative to the prompt's, and one of the head."""

    relative: Mapping[str, float]
    head: float
    weight_decay: float

    def optimizer(self, model: Any, rate: float) -> torch.optim.AdamW:
        """The optimizer of a model whose prompt has this rate."""
        names = ("prompt", "offset", "spaces")
        groups = model.parameter_groups(*(rate * self.relative[n] for n in names), self.head)
        return torch.optim.AdamW(groups, weight_decay=self.weight_decay)


def train_step(model: Any, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor]) -> float:
    """One step; the loss before it."""
    loss: Tensor = model(**{name: value.to(model.device) for name, value in batch.items()}).loss
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, _MOST_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def step_seconds(
    model: Any, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor]
) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    train_step(model, optimizer, batch)
    return time.perf_counter() - start


def train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    rows: Any,
    collate: Callable[..., Any],
    *,
    batch_size: int,
    seed: int,
    limits: Mapping[str, int],
    evaluate: Callable[[], dict[str, float]],
) -> dict[str, Any]:
    """Train up to the last limit, or until the validation loss has stopped falling.

    Args:
        model, optimizer: what is trained.
        rows, collate, batch_size, seed: its batches.
        limits: the steps at which methods are compared, by the record's names of them. The model is
            evaluated at every limit, and ``EVALUATIONS`` times on the way to the last.
        evaluate: gives the validation metrics, with ``loss``.

    Returns:
        ``evaluations``, ``losses``, ``seconds_per_step``, and ``weights``: for each point of
        comparison the trained tensors at the lowest validation loss so far.
    """
    from ept_fast.training.batches import GroupedBatches

    steps = max(limits.values())
    marks = {round(steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)} | {*limits.values()}
    weights: dict[str, dict[str, Tensor]] = {}
    evaluations: list[dict[str, Any]] = []
    losses: list[float] = []
    seconds: list[float] = []
    since = 0  # evaluations without a lower loss

    def judge(step: int) -> None:
        nonlocal since
        before = min((float(e["loss"]) for e in evaluations), default=float("inf"))
        evaluations.append({"step": step, **evaluate()})
        model.train()
        since += 1
        if evaluations[-1]["loss"] < before:
            since = 0
            state = trained_tensors(model)
            weights.update({name: state for name, limit in limits.items() if step <= limit})

    start = [group["lr"] for group in optimizer.param_groups]
    for step, indices in enumerate(GroupedBatches(rows.lengths, batch_size, steps, seed=seed), 1):
        for group, rate in zip(optimizer.param_groups, start, strict=True):
            group["lr"] = rate * min(1.0, step / _WARM_UP)
        begun = time.perf_counter()
        losses.append(train_step(model, optimizer, collate([rows[i] for i in indices])))
        seconds.append(time.perf_counter() - begun)
        if step in marks:
            judge(step)
            if since >= PATIENCE:
                break
    return {
        "evaluations": evaluations,
        "losses": [round(loss, 4) for loss in losses],
        "seconds_per_step": statistics.median(seconds),
        "weights": {name.removesuffix("_limit"): state for name, state in weights.items()},
    }


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """Copies on the CPU of all that is trained, by name."""
    return {
        name: parameter.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_tensors(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Bring what :func:`trained_tensors` gave back into a model."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != tensors.keys():
        raise ValueError(f"tensors: expected {sorted(parameters)}, got {sorted(tensors)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


# The linear head


@torch.no_grad()
def features(model: Any, rows: Any, collate: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """What the head of a model sees of each row, ``[N, d]`` float32, and the labels ``[N]``."""
    found: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, given: found.append(given[0].float()))
    model.eval()
    try:
        for batch in _batches(rows, collate):
            model(**{name: value.to(model.device) for name, value in batch.items()})
    finally:
        hook.remove()
        model.train()
    return torch.cat(found).cpu(), torch.tensor(rows.labels)


@torch.no_grad()
def frozen_features(encoder: Any, rows: Any, collate: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """The mean over each row's tokens of the plain encoder's last states, and the labels."""
    found = []
    for batch in _batches(rows, collate):
        batch.pop("labels")
        given = {name: value.to(encoder.device) for name, value in batch.items()}
        states = encoder(**given).last_hidden_state.float()
        real = given["attention_mask"].unsqueeze(-1)
        found.append(((states * real).sum(1) / real.sum(1)).cpu())
    return torch.cat(found), torch.tensor(rows.labels)


def _batches(rows: Any, collate: Callable[..., Any]) -> Any:
    for start in range(0, len(rows), _ROWS):
        yield collate([rows[i] for i in range(start, min(start + _ROWS, len(rows)))])


def fit_head(X: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight ``[C, d]`` and bias ``[C]`` of the least cross-entropy plus penalty/2·|weight|²."""
    weight = torch.zeros(classes, X.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(X @ weight.T + bias, y) + penalty / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()
