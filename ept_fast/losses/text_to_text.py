"""LASP's text-to-text loss: every template's text has to pick the learned prompt of its class.

After Bulat and Tzimiropoulos, *LASP* (CVPR 2023, arXiv 2210.01115), and its published code;
docs/clip.md says what is theirs and what ours. With t the prompts' features, h the templates' and
s the scale, the logits of the text of template l for class j are

    logits[l, i, j] = s · <t_i, h[l, j]>,

and the cross-entropy runs over i, the learned prompts, with target j.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ept_fast.config import check_number
from ept_fast.precision import accumulation_dtype, without_autocast

__all__ = ["noisy_templates", "text_to_text"]

_LOGITS = 1 << 20  # that are there at once: 4 MiB in float32
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def text_to_text(prompt_features: Tensor, template_features: Tensor, scale: float = 1.0) -> Tensor:
    """The mean cross-entropy of choosing, for the text of each template and class, its class.

    All L·C·C logits are never there at once: rows of templates are taken in chunks of about a
    million logits, and the gradient is summed up with the loss. Differentiable once, in
    ``prompt_features``. Products and sums accumulate in float32, or float64 if a tensor is.

    Args:
        prompt_features: t, ``[C, d]``, or of G contexts ``[G, C, d]``. The templates are then cut
            in G parts in their order, as even as can be, and context g sees those of part g.
        template_features: h, ``[L, C, d]``, frozen. L >= G.
        scale: s, exp of CLIP's logit scale.

    Features are float64, float32, bfloat16 or float16, their types may differ, and none is
    normalised here: for cosines give unit vectors.

    Returns:
        The mean over all L·C texts of templates, a float32 (or float64) scalar.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit; fewer templates than contexts; template features that
            ask for a gradient; a scale that is not finite.

    Example:
        >>> t = torch.eye(3)
        >>> text_to_text(t, t.expand(8, 3, 3), scale=100.0)
        tensor(0.)
    """
    for name, tensor in (
        ("prompt_features", prompt_features),
        ("template_features", template_features),
    ):
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a floating tensor, got {got}")
    check_number("scale", scale)
    t, h = prompt_features, template_features
    if t.dim() not in (2, 3) or 0 in t.shape:
        raise ValueError(
            f"prompt_features: expected shape [C, d] or [G, C, d] without empty axes, "
            f"got {list(t.shape)}"
        )
    groups = t if t.dim() == 3 else t.unsqueeze(0)
    fits = h.dim() == 3 and h.shape[1:] == groups.shape[1:] and h.device == t.device
    if not fits or len(h) < len(groups):
        raise ValueError(
            f"template_features: expected shape [at least {len(groups)}, {groups.shape[1]}, "
            f"{groups.shape[2]}] on {t.device} to match prompt_features {list(t.shape)}, "
            f"got {list(h.shape)} on {h.device}"
        )
    if h.requires_grad:
        raise ValueError(
            "template_features: expected a tensor without a gradient, as templates are frozen "
            "(detach() gives one), got requires_grad True"
        )
    loss: Tensor = _TextToText.apply(groups, h, float(scale))  # type: ignore[no-untyped-call]
    return loss


def noisy_templates(
    template_features: Tensor,
    deviation: float = 0.05,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """With probability 1/2 all features plus normal noise, else as they are.

    As LASP's published code does before each step's :func:`text_to_text`; the sum is not normalised
    again. The choice is made on the features' device, which the host does not wait for.

    Args:
        template_features: h, of any shape and floating type.
        deviation: of the noise.
        generator: of the features' device; the global one by default.

    Returns:
        A new tensor like h.

    Example:
        >>> noisy_templates(torch.zeros(8, 3, 4), generator=torch.Generator().manual_seed(0)).shape
        torch.Size([8, 3, 4])
    """
    h = template_features
    kind: dict[str, Any] = {"generator": generator, "device": h.device}
    chosen = torch.rand((), **kind) < 0.5
    noise = torch.randn(h.shape, dtype=h.dtype, **kind)
    return h + noise * (deviation * chosen)


class _TextToText(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: Tensor, templates: Tensor, scale: float) -> Tensor:
        """The loss, and with it its gradient, which is all that the backward needs."""
        wide = accumulation_dtype(groups, templates)
        contexts, classes, width = groups.shape
        texts = len(templates) * classes
        gradient = groups.new_zeros(groups.shape, dtype=wide) if ctx.needs_input_grad[0] else None
        loss = groups.new_zeros((), dtype=wide)
        step = max(1, _LOGITS // classes)
        with without_autocast(groups.device):
            for g, part in enumerate(templates.tensor_split(contexts)):
                prompts = groups[g].to(wide)
                rows = part.reshape(-1, width)  # [L_g·C, d]
                for begin in range(0, len(rows), step):
                    chunk = rows[begin : begin + step].to(wide)
                    numbers = torch.arange(begin, begin + len(chunk), device=chunk.device)
                    target = (numbers % classes).unsqueeze(1)
                    logits = (chunk @ prompts.T).mul_(scale)  # [n, C], over the learned prompts
                    total = logits.logsumexp(1, keepdim=True)
                    loss += (total - logits.gather(1, target)).sum()
                    if gradient is not None:
                        share = logits.sub_(total).exp_()
                        share.scatter_(1, target, share.gather(1, target) - 1)
                        gradient[g].addmm_(share.T, chunk, alpha=scale / texts)
        if gradient is not None:
            ctx.save_for_backward(gradient)
            ctx.dtype = groups.dtype
        return loss / texts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad).to(ctx.dtype), None, None
