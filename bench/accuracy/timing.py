"""Time and memory of a training step, all methods in turn."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.accuracy.records import append_record
from bench.accuracy.study import GRID, METHODS, SIZES, Study
from bench.accuracy.worker import origin
from bench.timing import quantiles


def build(
    study: Study, methods: Sequence[str]
) -> tuple[dict[str, tuple[Any, Any]], list[dict[str, Any]]]:
    """Models of these methods on one frozen encoder, and batches of sst2's training rows."""
    from ept_fast import get_ept_model
    from ept_fast.training.batches import Collator, GroupedBatches
    from ept_fast.training.config import TrainConfig
    from ept_fast.training.data import LabelSet, read_split
    from ept_fast.training.tokens import tokenise
    from ept_fast.transformers.backbone import embedding_width, load_backbone, load_tokenizer

    torch.set_num_threads(study.threads)
    rows = read_split(study.data / "sst2", "train")
    assert rows is not None
    labels = LabelSet.of(rows)
    tokenizer = load_tokenizer(study.model)
    tokens = tokenise(rows, tokenizer, SIZES["max_length"], labels)
    order = GroupedBatches(tokens.lengths, study.batch_size, study.steps, seed=0)
    collate = Collator.of(tokenizer)
    batches = [collate([tokens[i] for i in indices]) for indices in order]
    backbone = load_backbone(study.model)
    models = {}
    for method in methods:
        config = TrainConfig(
            model=study.model, data="-", output="-", **{**SIZES, **METHODS[method]}
        )
        model = get_ept_model(
            backbone,
            config.prompt_config(embedding_width(backbone)),
            "SEQ_CLS",
            labels=labels.names,
            generator=torch.Generator().manual_seed(0),
        )
        rates = GRID["middle"]
        models[method] = (model, torch.optim.AdamW(model.parameter_groups(**rates)))
    return models, batches


def step_seconds(model: Any, optimizer: Any, batch: dict[str, Any]) -> float:
    """Seconds of one training step."""
    start = time.perf_counter()
    model.train()
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    return time.perf_counter() - start


def time_methods(study: Study) -> None:
    """Time all methods in turn, step by step on the same batches, and measure their memory."""
    models, batches = build(study, study.methods)
    seconds: dict[str, list[float]] = {method: [] for method in study.methods}
    for number, batch in enumerate(batches):
        shift = number % len(study.methods)  # no method always runs first
        for method in (*study.methods[shift:], *study.methods[:shift]):
            taken = step_seconds(*models[method], batch)
            if number >= 3:  # the first steps warm up
                seconds[method].append(taken)
    for method in study.methods:
        ratios = [a / b for a, b in zip(seconds[method], seconds["pt"], strict=True)]
        low, middle, high = quantiles(seconds[method])
        record = {
            "kind": "timing",
            "task": "sst2",
            "method": method,
            "steps": len(ratios),
            "batch_size": study.batch_size,
            "threads": study.threads,
            "seconds_p20": low,
            "seconds_p50": middle,
            "seconds_p80": high,
            "ratio_to_pt": statistics.median(ratios),
            **measured_memory(study, method),
            **origin(study.device),
        }
        append_record(study.out, record)
        print(json.dumps(record), flush=True)


def measured_memory(study: Study, method: str) -> dict[str, int]:
    """Peak memory of a fresh process that trains with one method only."""
    command = [
        sys.executable, "-m", "bench.accuracy", "memory", "--method", method,
        "--data", str(study.data), "--model", study.model, "--threads", str(study.threads),
        "--batch-size", str(study.batch_size),
    ]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, int] = json.loads(output.strip().splitlines()[-1])
    return result


def print_memory(study: Study, method: str) -> None:
    """Train a few steps, the longest batch among them, and print the peak memory meanwhile."""
    models, batches = build(study, [method])
    gc.collect()
    before = resident_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading, which is higher
    longest = max(batches, key=lambda batch: batch["input_ids"].shape[1])
    for batch in [*batches[:5], longest, longest]:
        step_seconds(*models[method], batch)
    after = resident_memory("VmHWM")
    print(json.dumps({"peak_bytes": after, "peak_bytes_over_loaded": after - before}))


def resident_memory(name: str) -> int:
    """The process's resident bytes by Linux: VmRSS is now, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"{name}: expected in /proc/self/status, got none")
