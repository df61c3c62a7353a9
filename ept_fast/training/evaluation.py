"""What a model is worth on evaluation rows: loss and metrics of a task, and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ept_fast.training import parallel
from ept_fast.training.batches import Collator, length_batches
from ept_fast.training.data import Rows
from ept_fast.training.metrics import (
    exact_match,
    label_metrics,
    normalised,
    perplexity,
    token_f1,
)
from ept_fast.training.tokens import IGNORED, TextForm, Tokenised, end_token, tokenise_inputs

__all__ = [
    "Evaluation",
    "LabelEvaluation",
    "TextEvaluation",
    "Writer",
    "generated_metrics",
    "predict_logits",
    "spread",
    "text_metrics",
]


@torch.no_grad()
def _in_batches(
    model: Any,
    rows: Tokenised,
    collator: Collator,
    batch_size: int,
    bf16: bool,
    call: Callable[[dict[str, Tensor]], Any],
) -> list[tuple[list[int], Any]]:
    """The rows' numbers and what a call gives, of each batch; the model is in evaluation mode.

    Rows of similar length share a batch; several processes divide the batches among them.
    """
    device, training = model.device, model.training
    model.eval()
    found = {}
    batches = list(enumerate(length_batches(rows.lengths, batch_size)))
    for number, indices in parallel.share(batches):
        batch = collator([rows[i] for i in indices])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            result = call({name: value.to(device) for name, value in batch.items()})
        found[number] = (indices, result)
    model.train(training)
    return list(parallel.gather(found).values())


def _by_row(found: list[tuple[list[int], Any]]) -> list[Any]:
    """What was found of each row, in the order of the rows."""
    rows = {i: row for indices, batch in found for i, row in zip(indices, batch, strict=True)}
    return [rows[i] for i in range(len(rows))]


def predict_logits(
    model: Any, rows: Tokenised, collator: Collator, batch_size: int, *, bf16: bool = False
) -> Tensor:
    """Logits ``[N, C]`` float32 on the CPU, in the order of the rows; in evaluation mode.

    No random state is touched.
    """

    def logits(batch: dict[str, Tensor]) -> Tensor:
        batch.pop("labels", None)
        output: Tensor = model(**batch).logits
        return output.float().cpu()

    return torch.stack(_by_row(_in_batches(model, rows, collator, batch_size, bf16, logits)))


def text_metrics(
    model: Any, rows: Tokenised, collator: Collator, batch_size: int, *, bf16: bool = False
) -> dict[str, float]:
    """Loss, perplexity and accuracy of the rows' label tokens, each given all tokens before it.

    ``loss`` is the mean over all label tokens, so that long targets weigh more than short ones, and
    ``perplexity`` its exponential. ``token_accuracy`` is the fraction of them to which the model
    gives the highest probability; a causal model's first token of a text, which no token of the
    text predicts, is left out of it.
    """

    def sums(batch: dict[str, Tensor]) -> tuple[float, int, int, int]:
        output = model(**batch, num_items_in_batch=1)  # the sum of the losses
        best, labels = output.logits.argmax(-1), batch["labels"]
        count = int((labels != IGNORED).sum())
        if model.task == "CAUSAL_LM":
            best, labels = best[:, :-1], labels[:, 1:]
        asked = labels != IGNORED
        right = int(((best == labels) & asked).sum())
        return float(output.loss), count, right, int(asked.sum())

    found = _in_batches(model, rows, collator, batch_size, bf16, sums)
    total, count, right, asked = map(sum, zip(*(batch for _, batch in found), strict=True))
    loss = total / max(count, 1)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "token_accuracy": right / max(asked, 1),
    }


def generated_metrics(samples: list[dict[str, Any]]) -> dict[str, float]:
    """The means of ``exact_match`` and ``f1`` over samples; nothing if there are none."""
    names = ("exact_match", "f1") if samples and "f1" in samples[0] else ()
    return {name: sum(s[name] for s in samples) / len(samples) for name in names}


def spread(rows: Rows, count: int) -> Rows:
    """At most ``count`` of the rows, evenly spread over them, in their order."""
    count = min(count, len(rows))
    return rows.take([i * len(rows) // count for i in range(count)])


@dataclass(frozen=True)
class Writer:
    """How texts are generated: always the same way, without sampling and without a least length,
    whatever the model's generation config says.

    Attributes:
        tokenizer: of the model.
        batch_size: texts of a batch.
        max_new_tokens: tokens to generate at most.
        num_beams: beams; 1 is greedy.
        bf16: whether to run under bfloat16 autocast.
    """

    tokenizer: Any
    batch_size: int
    max_new_tokens: int
    num_beams: int = 1
    bf16: bool = False

    def __call__(self, model: Any, inputs: Tokenised) -> list[str]:
        """The text that the model writes for each row, in the order of the rows."""
        causal = model.task == "CAUSAL_LM"
        collator = Collator.of(self.tokenizer, "left" if causal else None)
        stops = _stops(model, end_token(self.tokenizer))

        def write(batch: dict[str, Tensor]) -> list[str]:
            output = model.generate(
                **batch,
                max_new_tokens=self.max_new_tokens,
                num_beams=self.num_beams,
                do_sample=False,
                num_return_sequences=1,
                min_length=0,
                min_new_tokens=0,
                eos_token_id=stops,
                pad_token_id=collator.pad_token_id,
            )
            # Behind the text; a decoder's first token of its own only starts it.
            start = batch["input_ids"].shape[1] if causal else 1
            return [self._text(ids, stops) for ids in output[:, start:].tolist()]

        return _by_row(_in_batches(model, inputs, collator, self.batch_size, self.bf16, write))

    def _text(self, ids: list[int], stops: list[int]) -> str:
        end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
        return str(self.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()


def _stops(model: Any, end: int) -> list[int]:
    """The token that training ends targets with, and those that the model stops at by itself."""
    own = getattr(model.generation_config, "eos_token_id", None)
    more = own if isinstance(own, list) else [own]
    return sorted({end, *(int(i) for i in more if i is not None)})


@dataclass(frozen=True)
class LabelEvaluation:
    """The loss and the metrics of labels."""

    rows: Tokenised
    collator: Collator
    batch_size: int
    problem_type: str
    bf16: bool = False

    def __call__(self, model: Any) -> dict[str, float]:
        """The metrics of all rows."""
        from ept_fast.transformers.outputs import label_loss

        logits = predict_logits(model, self.rows, self.collator, self.batch_size, bf16=self.bf16)
        labels = torch.tensor(self.rows.labels)
        metrics = label_metrics(logits, labels, self.problem_type)
        return {"loss": float(label_loss(logits, labels)), **metrics}

    def samples(self, model: Any) -> list[dict[str, Any]]:
        """Nothing: no text is written."""
        return []


@dataclass(frozen=True)
class TextEvaluation:
    """Loss, perplexity and token accuracy of all rows; exact match and F1 of what is generated.

    Attributes:
        rows: all rows, with labels.
        collator: makes their batches.
        asked: the rows that texts are generated for; none if None.
        form: how they become token ids.
        writer: how texts are generated, in batches of which size and type.
    """

    rows: Tokenised
    collator: Collator
    asked: Rows | None
    form: TextForm
    writer: Writer

    def __call__(self, model: Any) -> dict[str, float]:
        """The metrics; those of generated texts only if rows have targets."""
        size, bf16 = self.writer.batch_size, self.writer.bf16
        metrics = text_metrics(model, self.rows, self.collator, size, bf16=bf16)
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


Evaluation = LabelEvaluation | TextEvaluation
