"""The layer that puts the prompts of several adapters before, and their offsets onto, the tokens.

To vLLM it is a layer with LoRA: its manager fills and frees the slots, and its mapping says which
token has which slot. That is the same in both of vLLM's model runners, so neither is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.lora.layers import BaseLayerWithLoRA

from ept_fast.vllm import Sizes

__all__ = ["PromptedEmbedding"]


class PromptedEmbedding(BaseLayerWithLoRA):  # type: ignore[misc]
    """Embeddings of a batch's tokens, each behind and under the adapter of its request.

    A request's first m positions are its prompt's and get the rows of P′. Text token k stands at
    position m + k and gets row k of c·A·B, if there is one. Tokens without a slot are as before.
    Everything is a function of slot and position, so that it is the same for a token that is read
    in a chunk, once more after a preemption, or that the model generated itself.

    Args:
        sizes: the largest adapter that a slot takes.
        slots: T, number of adapters at a time.
        width: d.
        tokens: the most tokens of a batch.
        dtype: of the embeddings.
        device: of all tensors.
    """

    prompt: Tensor  # [T, m, d]
    offset_a: Tensor  # [T, n, r]
    offset_b: Tensor  # [T * r, d]
    lengths: Tensor  # [T], m of each slot
    embeds: Tensor  # [tokens, d]

    def __init__(
        self,
        sizes: Sizes,
        slots: int,
        width: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        m, n, r = sizes
        # What vLLM asks of a layer when it makes an adapter to warm up with.
        self.base_layer = _Dimensions(width)
        self.lora_a_stacked = (torch.empty(0),)
        kept: dict[str, Any] = {"persistent": False}
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.register_buffer(
            "prompt", torch.zeros(slots, m, width, dtype=dtype, device=device), **kept
        )
        self.register_buffer("offset_a", torch.zeros(slots, n, r, **floats), **kept)
        self.register_buffer("offset_b", torch.zeros(slots * r, width, **floats), **kept)
        self.register_buffer(
            "lengths", torch.zeros(slots, dtype=torch.int64, device=device), **kept
        )
        # In one place: a CUDA graph of the model reads it where it was when the graph was captured.
        self.register_buffer(
            "embeds", torch.zeros(tokens, width, dtype=dtype, device=device), **kept
        )

    def set_mapping(self, punica_wrapper: Any) -> None:
        """Take the object that knows each token's slot."""
        self.punica_wrapper = punica_wrapper

    def reset_lora(self, index: int) -> None:
        """Empty a slot: an adapter without a prompt and without an offset."""
        r = self.sizes.rank
        self.lengths[index] = 0
        self.prompt[index] = 0
        self.offset_a[index] = 0
        self.offset_b[index * r : (index + 1) * r] = 0

    @torch.no_grad()
    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        """Fill a slot.

        Args:
            index: the slot.
            lora_a: A, scaled and transposed, ``[r, n]``.
            lora_b: columns of B, then rows of P′, ``[d, r + m]``.

        Raises:
            TypeError, ValueError: other tensors, or a larger adapter than the engine has room for;
                the slot is as before then.
        """
        m, n, r = self.check(lora_a, lora_b)
        self.reset_lora(index)
        if m == 0:  # vLLM's own, to warm up with: zeros
            return
        self.prompt[index, :m] = lora_b[:, r:].T
        self.offset_a[index, :n, :r] = lora_a.T
        first = index * self.sizes.rank
        self.offset_b[first : first + r] = lora_b[:, :r].T
        self.lengths[index] = m

    def check(self, lora_a: Any, lora_b: Any) -> Sizes:
        """The sizes of an adapter; an error unless its tensors are finite and fit into a slot."""
        width = self.prompt.shape[2]
        for name, tensor in (("lora_A", lora_a), ("lora_B", lora_b)):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise TypeError(f"{name}: expected a floating tensor, got {tensor!r:.80}")
            if tensor.dim() != 2:
                raise ValueError(f"{name}: expected two axes, got {list(tensor.shape)}")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name}: expected finite values, got NaN or infinity")
        r, n = lora_a.shape
        m = lora_b.shape[1] - r
        if lora_b.shape[0] != width or m < 0:
            raise ValueError(
                f"lora_B: expected [{width}, {r} + m] with {r} as in lora_A, "
                f"got {list(lora_b.shape)}"
            )
        if m:  # vLLM's own, to warm up with, has none and any rank
            self.sizes.check(Sizes(m, n, r))
        return Sizes(m, n, r)

    def forward(
        self, input_ids: Tensor, positions: Tensor, embed: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``[N, d]``, in memory that the next call writes over.

        Args:
            input_ids: ``[N]`` integers; a token of any kind stands at the prompt's positions.
            positions: ``[N]`` int64.
            embed: the model's own embedding of tokens.
        """
        slots, n, r = self.offset_a.shape
        count = input_ids.shape[0]
        found = self.punica_wrapper._token_lora_indices[:count]  # as vLLM's own layers do
        used = (found >= 0) & (found < slots)  # those of padding may be anything
        slot = found.clamp(0, slots - 1)
        m = self.lengths[slot] * used
        embeds = embed(input_ids)
        if r:
            rank = positions - m
            covered = used & (rank >= 0) & (rank < n)
            factors = self.offset_a[slot, rank.clamp(0, n - 1)] * covered.unsqueeze(1)  # [N, r]
            # Side by side, a token's own slot filled and zeros elsewhere: one product for them all.
            own = slot.unsqueeze(1) == torch.arange(slots, device=slot.device)  # [N, T]
            factors = (own.unsqueeze(2) * factors.unsqueeze(1)).flatten(1)
            embeds = (embeds + factors @ self.offset_b).to(embeds.dtype)
        rows = self.prompt[slot, positions.clamp(0, self.prompt.shape[1] - 1)]
        out = self.embeds[:count]
        return out.copy_(torch.where((positions < m).unsqueeze(1), rows, embeds))


class _Dimensions(nn.Module):
    """The names of a table of embeddings for its sizes."""

    org_vocab_size = 1

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding_dim = width
