"""What a model is worth on evaluation rows: loss and metrics of a task, and generated samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast.training import parallel
from ept_fast.training.batches import Collator, length_batches
from ept_fast.training.data import Rows
from ept_fast.training.generation import Writer
from ept_fast.training.metrics import (
    classification_metrics,
    exact_match,
    normalised,
    perplexity,
    token_f1,
)
from ept_fast.training.tokens import IGNORED, TextForm, Tokenised, tokenise_inputs

__all__ = [
    "ClassEvaluation",
    "Evaluation",
    "TextEvaluation",
    "generated_metrics",
    "predict_logits",
    "spread",
    "text_metrics",
]


@torch.no_grad()
def predict_logits(
    model: Any, rows: Tokenised, collator: Collator, batch_size: int, *, bf16: bool = False
) -> Tensor:
    """Logits ``[N, C]`` float32 on the CPU, in the order of the rows; in evaluation mode.

    Rows of similar length share a batch; several processes divide the batches among them. No random
    state is touched.
    """
    device, training = model.device, model.training
    model.eval()
    found: dict[int, Tensor] = {}
    for indices in parallel.share(length_batches(rows.lengths, batch_size)):
        batch = collator([rows[i] for i in indices])
        batch.pop("labels", None)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model(**{name: value.to(device) for name, value in batch.items()})
        found |= zip(indices, output.logits.float().cpu(), strict=True)
    model.train(training)
    return torch.stack(list(parallel.gather(found).values()))


@torch.no_grad()
def text_metrics(
    model: Any, rows: Tokenised, collator: Collator, batch_size: int, *, bf16: bool = False
) -> dict[str, float]:
    """Loss, perplexity and accuracy of the rows' label tokens, each given all tokens before it.

    ``loss`` is the mean over all label tokens, so that long targets weigh more than short ones, and
    ``perplexity`` its exponential. ``token_accuracy`` is the fraction of them to which the model
    gives the highest probability; a causal model's first token of a text, which no token of the
    text predicts, is left out of it.
    """
    device, training = model.device, model.training
    model.eval()
    causal = model.task == "CAUSAL_LM"
    found: dict[int, tuple[float, int, int, int]] = {}
    batches = list(enumerate(length_batches(rows.lengths, batch_size)))
    for number, indices in parallel.share(batches):
        batch = collator([rows[i] for i in indices])
        labels = batch["labels"]
        count = int((labels != IGNORED).sum())
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            inputs = {name: value.to(device) for name, value in batch.items()}
            output = model(**inputs, num_items_in_batch=1)  # the sum of the losses
        best = output.logits.argmax(-1).cpu()
        if causal:
            best, labels = best[:, :-1], labels[:, 1:]
        asked = labels != IGNORED
        right = int(((best == labels) & asked).sum())
        found[number] = (float(output.loss), count, right, int(asked.sum()))
    model.train(training)
    total, count, right, asked_for = map(sum, zip(*parallel.gather(found).values(), strict=True))
    loss = total / max(count, 1)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "token_accuracy": right / max(asked_for, 1),
    }


def generated_metrics(samples: list[dict[str, Any]]) -> dict[str, float]:
    """The means of ``exact_match`` and ``f1`` over samples; nothing where there are none."""
    if not samples or "f1" not in samples[0]:
        return {}
    return {
        "exact_match": sum(s["exact_match"] for s in samples) / len(samples),
        "f1": sum(s["f1"] for s in samples) / len(samples),
    }


def spread(rows: Rows, count: int) -> Rows:
    """At most ``count`` of the rows, evenly spread over them, in their order."""
    count = min(count, len(rows))
    return rows.take([i * len(rows) // count for i in range(count)])


class Evaluation:
    """What a training run asks of its evaluation rows."""

    def __call__(self, model: Any) -> dict[str, float]:
        """``loss`` and the task's metrics; the model's mode is left as it is."""
        raise NotImplementedError

    def samples(self, model: Any) -> list[dict[str, Any]]:
        """What the model writes for some of the rows; nothing where it does not write."""
        return []


@dataclass(frozen=True)
class ClassEvaluation(Evaluation):
    """Cross-entropy, accuracy, macro F1 and Matthews correlation."""

    rows: Tokenised
    collator: Collator
    batch_size: int
    bf16: bool = False

    def __call__(self, model: Any) -> dict[str, float]:
        """The metrics of all rows."""
        logits = predict_logits(model, self.rows, self.collator, self.batch_size, bf16=self.bf16)
        labels = torch.tensor(self.rows.labels)
        metrics = classification_metrics(logits.argmax(-1), labels, len(model.labels))
        return {"loss": float(F.cross_entropy(logits, labels)), **metrics}


@dataclass(frozen=True)
class TextEvaluation(Evaluation):
    """Loss, perplexity and token accuracy of all rows; exact match and F1 of what is generated.

    Attributes:
        rows: all rows, with labels.
        collator: makes their batches.
        batch_size: rows of a batch.
        asked: the rows that texts are generated for; none where None.
        form: how they become token ids.
        writer: how texts are generated.
        bf16: whether to run under bfloat16 autocast.
    """

    rows: Tokenised
    collator: Collator
    batch_size: int
    asked: Rows | None
    form: TextForm
    writer: Writer
    bf16: bool = False

    def __call__(self, model: Any) -> dict[str, float]:
        """The metrics; those of generated texts only where rows have targets."""
        metrics = text_metrics(model, self.rows, self.collator, self.batch_size, bf16=self.bf16)
        samples = self.samples(model) if self.form.targets else []
        return {**metrics, **generated_metrics(samples)}

    def samples(self, model: Any) -> list[dict[str, Any]]:
        """``text``, ``target``, ``output``, ``exact_match`` and ``f1`` of each row asked for.

        Without targets, the first half of each text is continued: ``text``, which is that half,
        ``rest``, how it goes on in the data, and ``output``.
        """
        if self.asked is None:
            return []
        tokenizer = self.writer.tokenizer
        inputs = tokenise_inputs(self.asked, tokenizer, self.form)
        if not self.form.targets:
            return self._continued(model, inputs)
        outputs = self.writer(model, inputs)
        samples: list[dict[str, Any]] = [
            {"text": text, "output": output}
            for text, output in zip(self.asked.texts, outputs, strict=True)
        ]
        for sample, target in zip(samples, self.asked.targets or (), strict=False):
            sample["target"] = target
            sample["exact_match"] = exact_match(sample["output"], target)
            tokens = [
                tokenizer(normalised(text), add_special_tokens=False)["input_ids"]
                for text in (sample["output"], target)
            ]
            sample["f1"] = token_f1(*tokens)
        return samples

    def _continued(self, model: Any, inputs: Tokenised) -> list[dict[str, Any]]:
        tokenizer = self.writer.tokenizer
        rows = [row["input_ids"] for row in inputs.features]
        halves = [row[: (len(row) + 1) // 2] for row in rows]
        features = tuple({"input_ids": half} for half in halves)
        outputs = self.writer(model, Tokenised(features, None, 0))
        samples = []
        for row, half, output in zip(rows, halves, outputs, strict=True):
            text, rest = (
                tokenizer.decode(ids, skip_special_tokens=True).strip()
                for ids in (half, row[len(half) :])
            )
            samples.append({"text": text, "rest": rest, "output": output})
        return samples
