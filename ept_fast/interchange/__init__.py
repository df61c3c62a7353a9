"""Prompts of other libraries in, prompts of ours out; needs neither transformers nor PEFT."""

from ept_fast.interchange.dept import import_dept
from ept_fast.interchange.peft import export_peft, import_peft
from ept_fast.interchange.plain import PlainPrompt, export_plain, import_plain
from ept_fast.interchange.vllm import export_vllm

__all__ = [
    "PlainPrompt",
    "export_peft",
    "export_plain",
    "export_vllm",
    "import_dept",
    "import_peft",
    "import_plain",
]
