"""The whole training step of a frozen backbone: loss, backward, AdamW; ours and what else there is.

Peers: PEFT's prompt tuning of 100 tokens, DePT's way with as many parameters, and the backbone
alone on embeddings that are there already: ours by that, less 1, is the share of our prompt path
and of the optimizer. The backbones have random weights; at a CPU's sizes layers and vocabularies
are cut (:data:`bench.models.ON_CPU`), which the rows' notes say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from bench import models, parity, peers
from bench.inputs import DTYPES
from bench.models import Backbone, Method
from bench.run import Run


@dataclass(frozen=True)
class Case:
    """One row: a method's step on a backbone, at lengths of :data:`bench.models.LENGTHS`."""

    backbone: Backbone
    lengths: str
    compiled: bool
    peer: str

    @property
    def id(self) -> str:
        """The row's name in pytest."""
        kind = "compiled" if self.compiled else "eager"
        return f"{self.backbone.name}-{self.lengths}-{kind}-{self.peer}"


def cases(run: Run) -> list[Case]:
    """What shares a model side by side; torch.compile last, as it takes the longest to start."""
    ours = peers.backends(run.device)
    names = [*ours, peers.PEFT, peers.DEPT, models.BACKBONE]
    if run.settings.quick:
        found = [Case(b, "20-40", False, name) for b in models.QUICK for name in names]
        compiled = [Case(models.QUICK[-1], "20-40", True, name) for name in (ours[0], peers.PEFT)]
    else:
        backbones = models.ON_GPU if run.on_gpu else models.ON_CPU
        found = [
            Case(b, lengths, False, name)
            for b in backbones
            for lengths in models.LENGTHS
            for name in names
        ]
        # On a CPU compiling takes longer than it is worth at a second length.
        compiled = [
            replace(case, compiled=True) for case in found if run.on_gpu or case.lengths == "20-40"
        ]
    return found + compiled if run.settings.compiled else found


def test_training_step(case: Case, run: Run, benchmark: Any) -> None:
    """Parity of loss and gradients first, then time."""
    run.check_time()
    held = run.hold_for(("training step", case.backbone, case.lengths, case.compiled))
    table = "bfloat16" if run.on_gpu else "float32"
    shape = models.shape_of(case.backbone, case.lengths)
    if "model" not in held:
        held["model"] = models.make_model(case.backbone, DTYPES[table], run.device)
        held["batch"] = models.make_batch(case.backbone, shape, run.device)
        held["exact model"] = models.exact_copy(held["model"])
    model, batch = held["model"], held["batch"]

    def check(name: str) -> tuple[Method, float, str]:
        method = models.make(name, model, case.backbone, batch)
        expected = models.expected_of(method, model, held["exact model"], batch)
        if case.compiled:
            method = replace(method, loss=torch.compile(method.loss, dynamic=False))
        return method, *parity.compare(models.results(method, model, batch), expected)

    run.row(
        benchmark,
        case,
        shape,
        check,
        lambda method: models.step(method, batch),
        tokens=int(batch.attention_mask.sum()),
        note=case.backbone.note,
        suite="training_step",
        operation="training step, compiled" if case.compiled else "training step",
        direction="both",
        embeddings=table,
    )
