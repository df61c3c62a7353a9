"""A prompt before the encoder of an encoder-decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ept_fast.transformers.generation import generate_seq2seq
from ept_fast.transformers.model import EPTModel
from ept_fast.transformers.outputs import replace_fields, share_of, token_loss
from ept_fast.transformers.padding import Text

__all__ = ["EPTModelForSeq2SeqLM"]


class EPTModelForSeq2SeqLM(EPTModel):
    """A prompt before an encoder-decoder's encoder. ``labels`` [B, T] are the decoder's.

    ``decoder_input_ids`` follow from the labels if they are not given.
    """

    task = "SEQ_2_SEQ_LM"
    generate = generate_seq2seq

    def run(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        num_items = kwargs.pop("num_items_in_batch", None)
        given = ("decoder_input_ids", "decoder_inputs_embeds")
        if labels is not None and all(kwargs.get(name) is None for name in given):
            prepare = getattr(self.backbone, "prepare_decoder_input_ids_from_labels", None)
            if prepare is None:  # the model shifts the labels in its forward
                kwargs["labels"] = labels
            else:
                kwargs["decoder_input_ids"] = prepare(labels=labels)
        # Encoders of this kind count positions by column.
        rows, inputs = self.rows(text.compacted(), kwargs)
        output = self.backbone(**inputs)
        loss = None
        if labels is not None:
            loss = token_loss(output.logits, labels, num_items)
            share = share_of(labels, num_items)
            loss = self.with_terms(loss, rows, share, logits=output.logits, labels=labels)
        return replace_fields(output, loss=loss)
