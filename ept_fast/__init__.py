"""Efficient Prompt Tuning (EPT) soft prompts for frozen language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ept_fast.config import EPTConfig
from ept_fast.ops.functional import reconstruct_and_splice, reconstruct_prompt, splice_prompt
from ept_fast.prompts.base import EPTOutput
from ept_fast.prompts.ept import FoldedEPTPrompt, FusedEPTPrompt
from ept_fast.prompts.prototypes import from_prototypes
from ept_fast.storage.files import CheckpointError

if TYPE_CHECKING:
    from ept_fast.interchange import (
        PlainPrompt,
        export_peft,
        export_plain,
        export_vllm,
        import_dept,
        import_peft,
        import_plain,
    )
    from ept_fast.transformers.bank import EPTBank
    from ept_fast.transformers.clip import CLIPPrompt
    from ept_fast.transformers.tasks import EPTModel, get_ept_model
    from ept_fast.transformers.vision import VisionPrompt

__version__ = "0.1.0"

__all__ = [
    "CLIPPrompt",
    "CheckpointError",
    "EPTBank",
    "EPTConfig",
    "EPTModel",
    "EPTOutput",
    "FoldedEPTPrompt",
    "FusedEPTPrompt",
    "PlainPrompt",
    "VisionPrompt",
    "__version__",
    "export_peft",
    "export_plain",
    "export_vllm",
    "from_prototypes",
    "get_ept_model",
    "import_dept",
    "import_peft",
    "import_plain",
    "reconstruct_and_splice",
    "reconstruct_prompt",
    "splice_prompt",
]

# Imported on first use, since they take longer. All but _INTERCHANGE need transformers, which the
# core does without.
_INTERCHANGE = "ept_fast.interchange"
_LAZY = {
    "CLIPPrompt": "ept_fast.transformers.clip",
    "EPTBank": "ept_fast.transformers.bank",
    "EPTModel": "ept_fast.transformers.tasks",
    "PlainPrompt": _INTERCHANGE,
    "VisionPrompt": "ept_fast.transformers.vision",
    "export_peft": _INTERCHANGE,
    "export_plain": _INTERCHANGE,
    "export_vllm": _INTERCHANGE,
    "get_ept_model": "ept_fast.transformers.tasks",
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
