"""How far a training with the Trainer of transformers is, for terms whose weight falls."""

from __future__ import annotations

from typing import Any

from ept_fast.libraries import without_peft

with without_peft():
    from transformers.trainer_callback import TrainerCallback

__all__ = ["LossProgress"]


class LossProgress(TrainerCallback):
    """Tells an :class:`ept_fast.EPTModel`, or PEFT's model of one, how far the training is.

    Example:
        >>> trainer.add_callback(LossProgress())  # doctest: +SKIP
    """

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model: Any = kwargs["model"]
        model.set_loss_progress(state.global_step / max(state.max_steps, 1))
