"""Efficient Prompt Tuning (EPT) soft prompts for frozen language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ept_fast.checkpoint import CheckpointError
from ept_fast.config import EPTConfig
from ept_fast.functional import reconstruct_prompt, splice_prompt
from ept_fast.module import EPTOutput, FoldedEPTPrompt, FusedEPTPrompt

if TYPE_CHECKING:
    from ept_fast.integrations.models import EPTModel, get_ept_model

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "EPTConfig",
    "EPTModel",
    "EPTOutput",
    "FoldedEPTPrompt",
    "FusedEPTPrompt",
    "__version__",
    "get_ept_model",
    "reconstruct_prompt",
    "splice_prompt",
]

# Imported on first use: they need transformers, which the core does without.
_LAZY = {
    "EPTModel": "ept_fast.integrations.models",
    "get_ept_model": "ept_fast.integrations.models",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
