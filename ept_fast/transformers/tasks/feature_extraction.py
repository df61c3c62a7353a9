"""A prompt before a bare model, for its last hidden states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ept_fast.transformers.model import EPTModel
from ept_fast.transformers.outputs import replace_fields
from ept_fast.transformers.padding import Text

__all__ = ["EPTModelForFeatureExtraction"]


class EPTModelForFeatureExtraction(EPTModel):
    """A prompt before a bare model: ``last_hidden_state`` [B, S, h] of the text."""

    task = "FEATURE_EXTRACTION"
    accepts_loss_kwargs = False

    def run(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        if labels is not None:
            raise ValueError(f"labels: expected None for task {self.task}, got some")
        text = text.compacted()
        rows, inputs = self.rows(text, kwargs)
        output = self.backbone(**inputs)
        hidden = rows.of_text(output.last_hidden_state)
        return replace_fields(output, last_hidden_state=text.restore(hidden))
