"""Efficient Prompt Tuning (EPT) soft prompts for frozen language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ept_fast.checkpoint import CheckpointError
from ept_fast.config import EPTConfig
from ept_fast.functional import reconstruct_prompt, splice_prompt
from ept_fast.module import EPTOutput, FoldedEPTPrompt, FusedEPTPrompt

if TYPE_CHECKING:
    from ept_fast.integrations.bank import EPTBank
    from ept_fast.integrations.interchange import (
        PlainPrompt,
        export_peft,
        export_plain,
        import_dept,
        import_peft,
        import_plain,
    )
    from ept_fast.integrations.models import EPTModel, get_ept_model

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "EPTBank",
    "EPTConfig",
    "EPTModel",
    "EPTOutput",
    "FoldedEPTPrompt",
    "FusedEPTPrompt",
    "PlainPrompt",
    "__version__",
    "export_peft",
    "export_plain",
    "get_ept_model",
    "import_dept",
    "import_peft",
    "import_plain",
    "reconstruct_prompt",
    "splice_prompt",
]

# Imported on first use, since they take longer. All but _INTERCHANGE need transformers, which the
# core does without.
_INTERCHANGE = "ept_fast.integrations.interchange"
_LAZY = {
    "EPTBank": "ept_fast.integrations.bank",
    "EPTModel": "ept_fast.integrations.models",
    "PlainPrompt": _INTERCHANGE,
    "export_peft": _INTERCHANGE,
    "export_plain": _INTERCHANGE,
    "get_ept_model": "ept_fast.integrations.models",
    "import_dept": _INTERCHANGE,
    "import_peft": _INTERCHANGE,
    "import_plain": _INTERCHANGE,
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _LAZY[name] != _INTERCHANGE:
        from ept_fast.libraries import require

        require("transformers")
    return getattr(importlib.import_module(_LAZY[name]), name)
