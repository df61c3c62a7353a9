"""EPT soft prompts as fused Triton kernels: reconstruct the prompt, put it before the text, both.

CPU tensors are served by plain PyTorch, and by Triton's interpreter if ``backend="triton"`` asks
for it under ``TRITON_INTERPRET=1``.
"""

from ept_fast.ops.functional import reconstruct_and_splice, reconstruct_prompt, splice_prompt

__all__ = ["reconstruct_and_splice", "reconstruct_prompt", "splice_prompt"]
