"""InfoPrompt's losses: what a prompt tells of the head, and of the text's representation.

After Wu et al., *InfoPrompt* (NeurIPS 2023, arXiv 2306.04933), in the form that its text means;
docs/methods.md lists where its release does something else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ept_fast.precision import accumulation_dtype

__all__ = [
    "gaussian_divergence",
    "head_information",
    "info_nce",
    "representation_information",
]


def info_nce(
    positive: Tensor,
    negatives: Tensor,
    mask: Tensor | None = None,
    clamp_log_prob: float | None = None,
) -> Tensor:
    """The mean of -log softmax of a positive score among negative ones.

    log(1 + negatives) minus it is a lower bound of the mutual information of the pair.

    Args:
        positive: scores ``[B]``.
        negatives: scores ``[B, N]``.
        mask: ``[B, N]`` of 0 and 1, the negatives that count; all by default.
        clamp_log_prob: the smallest log-probability; None for no limit. Below a limit there is no
            gradient: the release has -2, and with 33 candidates starts below it.

    Returns:
        A scalar, at least 0.
    """
    if mask is not None:
        negatives = negatives.masked_fill(mask == 0, -torch.inf)
    scores = torch.cat([positive.unsqueeze(1), negatives], 1)
    scores = scores.to(accumulation_dtype(scores))
    found = scores.log_softmax(1)[:, 0]
    if clamp_log_prob is not None:
        found = found.clamp_min(clamp_log_prob)
    return -found.mean()


def head_information(
    prompt: Tensor,
    class_weights: Tensor,
    embeds: Tensor,
    attention_mask: Tensor | None = None,
    clamp_log_prob: float | None = None,
) -> Tensor:
    """How badly the prompt is told from the row's own tokens by the head's mean class.

    With H̄ = mean_c H_c, the positive is mean_j ⟨P_j, H̄⟩/√d and the negatives are ⟨E_s, H̄⟩/√d of
    the row's real tokens. It bounds the mutual information of prompt and head from below.

    Args:
        prompt: ``[B, m, d]``, or ``[m, d]`` for one prompt before every row.
        class_weights: H, ``[C, d]``.
        embeds: the text's embeddings, ``[B, S, d]``.
        attention_mask: ``[B, S]`` of 0 and 1; ones by default.
        clamp_log_prob: as in :func:`info_nce`.

    Returns:
        A scalar.

    Raises:
        ValueError: a head of another width than the embeddings.
    """
    width = embeds.shape[-1]
    if class_weights.shape[-1] != width:
        raise ValueError(
            f"class_weights: expected width {width} as of the embeddings, "
            f"got {class_weights.shape[-1]}"
        )
    dtype = accumulation_dtype(prompt, class_weights)
    mean = class_weights.to(dtype).mean(0) / width**0.5
    positive = (prompt.to(dtype) @ mean).mean(-1).expand(embeds.shape[0])
    return info_nce(positive, embeds.to(dtype) @ mean, attention_mask, clamp_log_prob)


def representation_information(
    context: Tensor,
    positive: Tensor,
    negatives: Tensor,
    clamp_log_prob: float | None = None,
) -> Tensor:
    """How badly a prompted representation is told from unprompted ones by the prompt.

    Args:
        context: what the prompt says of the representation, ``[B, z]``.
        positive: a draw of the representation behind the prompt, ``[B, z]``.
        negatives: draws of the same rows' representations without a prompt, ``[B, N, z]``.
        clamp_log_prob: as in :func:`info_nce`.

    Returns:
        A scalar.
    """
    scale = context.shape[-1] ** -0.5
    own = (positive * context).sum(-1) * scale
    others = (negatives @ context.unsqueeze(-1)).squeeze(-1) * scale
    return info_nce(own, others, None, clamp_log_prob)


def gaussian_divergence(mean: Tensor, log_std: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of N(mean, exp(log_std)²) from N(0, 1).

    Args:
        mean, log_std: of any one shape.

    Returns:
        The mean over all elements.
    """
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std).mean()
