"""The supervised contrastive loss, as StablePT has it on its prompts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast.precision import accumulation_dtype

__all__ = ["supervised_contrastive"]


def supervised_contrastive(features: Tensor, labels: Tensor, temperature: float = 0.3) -> Tensor:
    """Rows of one class are to be closer to each other than to the others.

    With s_ij = cos(f_i, f_j)/τ, the mean over pairs i ≠ j of one class of
    -log(exp(s_ij) / Σ_{k≠i} exp(s_ik)), first over j and then over the rows i that have such a j
    (Khosla et al., arXiv 2004.11362; StablePT, arXiv 2404.19335, with τ = 0.3).

    Args:
        features: ``[B, h]``.
        labels: ``[B]`` integers.
        temperature: τ > 0.

    Returns:
        A scalar; 0 if no two rows are of one class.

    Raises:
        ValueError: labels of another shape, or a temperature that is not positive.
    """
    if labels.shape != features.shape[:1]:
        raise ValueError(
            f"labels: expected shape {list(features.shape[:1])}, got {list(labels.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature}")
    rows = F.normalize(features.to(accumulation_dtype(features)), dim=1)
    own = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    scores = rows @ rows.T / temperature
    # Not -inf: of a single row nothing would be finite.
    log_probs = scores.masked_fill(own, torch.finfo(scores.dtype).min).log_softmax(1)
    same = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~own
    counts = same.sum(1)
    of_rows = log_probs.where(same, 0).sum(1) / counts.clamp_min(1)
    return -of_rows.sum() / (counts > 0).sum().clamp_min(1)
