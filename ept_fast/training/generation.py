"""Texts that a trained model writes for the rows of a text task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ept_fast.training import parallel
from ept_fast.training.batches import Collator, length_batches
from ept_fast.training.tokens import Tokenised, end_token

__all__ = ["Writer"]


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

    @torch.no_grad()
    def __call__(self, model: Any, inputs: Tokenised) -> list[str]:
        """The text that the model writes for each row, in the order of the rows.

        Rows of similar length share a batch; several processes divide the batches among them.
        """
        training = model.training
        model.eval()
        causal = model.task == "CAUSAL_LM"
        collator = Collator.of(self.tokenizer, "left" if causal else None)
        stops = _stops(model, end_token(self.tokenizer))
        texts: dict[int, str] = {}
        for indices in parallel.share(length_batches(inputs.lengths, self.batch_size)):
            batch = collator([inputs[i] for i in indices])
            skipped = batch["input_ids"].shape[1] if causal else 0
            with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
                output = model.generate(
                    **{name: value.to(model.device) for name, value in batch.items()},
                    max_new_tokens=self.max_new_tokens,
                    num_beams=self.num_beams,
                    do_sample=False,
                    num_return_sequences=1,
                    min_length=0,
                    min_new_tokens=0,
                    eos_token_id=stops,
                    pad_token_id=collator.pad_token_id,
                )
            rows = output[:, skipped:].tolist()
            for index, ids in zip(indices, rows, strict=True):
                texts[index] = self._text(ids, stops, causal)
        model.train(training)
        return list(parallel.gather(texts).values())

    def _text(self, ids: list[int], stops: list[int], causal: bool) -> str:
        start = 0 if causal else 1  # a decoder's first token only starts it
        end = next((i for i in range(start, len(ids)) if ids[i] in stops), len(ids))
        return str(self.tokenizer.decode(ids[start:end], skip_special_tokens=True)).strip()


def _stops(model: Any, end: int) -> list[int]:
    """The token that training ends targets with, and those that the model stops at by itself."""
    own = getattr(model.generation_config, "eos_token_id", None)
    more = own if isinstance(own, list) else [own]
    return sorted({end, *(int(i) for i in more if i is not None)})
