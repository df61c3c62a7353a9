"""Efficient Prompt Tuning (EPT) soft prompts for frozen language models."""

from ept_fast.checkpoint import CheckpointError
from ept_fast.config import EPTConfig
from ept_fast.functional import reconstruct_prompt, splice_prompt
from ept_fast.module import EPTOutput, FoldedEPTPrompt, FusedEPTPrompt

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "EPTConfig",
    "EPTOutput",
    "FoldedEPTPrompt",
    "FusedEPTPrompt",
    "__version__",
    "reconstruct_prompt",
    "splice_prompt",
]
