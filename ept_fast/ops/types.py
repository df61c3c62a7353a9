"""What an operation is called with, passed whole from the public function to the backends.

Symbols are METHOD's. Inside the operations every tensor has a task axis T, 1 for a single prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ept_fast.precision import accumulation_dtype

__all__ = [
    "OF_EPT",
    "Flags",
    "Needs",
    "Parameters",
    "Saved",
    "SpliceGrads",
    "SpliceInputs",
    "Text",
]

OF_EPT = 7  # of the parameters, those that a prompt of EPT has: all but the biases after them


class Parameters(NamedTuple):
    """The tensors of operation 1, or their gradients; those that are absent are None.

    Attributes:
        short_prompt: P, ``[T, m, d]``.
        offset_a: A, ``[T, n, r]``.
        offset_b: B, ``[T, r, d]``.
        space_down: D, ``[T, K, d, h]``.
        space_up: U, ``[T, K, h, d]``.
        gate_weight: G, ``[T, d, K]``.
        gate_bias: b, ``[T, K]``.
        space_down_bias: u, ``[T, K, h]``.
        space_up_bias: v, ``[T, K, d]``.
    """

    short_prompt: Tensor
    offset_a: Tensor | None = None
    offset_b: Tensor | None = None
    space_down: Tensor | None = None
    space_up: Tensor | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    space_down_bias: Tensor | None = None
    space_up_bias: Tensor | None = None

    @property
    def has_offset(self) -> bool:
        """Whether the prompt is fused with an offset."""
        return self.offset_a is not None

    @property
    def has_spaces(self) -> bool:
        """Whether there are subspaces."""
        return self.space_down is not None

    @property
    def has_gate(self) -> bool:
        """Whether the subspaces have a gate; a single one may go without."""
        return self.gate_weight is not None

    @property
    def has_biases(self) -> bool:
        """Whether the subspaces have biases."""
        return self.space_down_bias is not None

    def with_task_axis(self) -> Parameters:
        """With the leading axis T, of 1 if there is none."""
        if self.short_prompt.dim() == 3:
            return self
        return Parameters(*(None if t is None else t.unsqueeze(0) for t in self))  # type: ignore[arg-type]

    def seen(self, fusion: bool) -> Parameters:
        """What operation 1 computes with: the offset only if it is fused."""
        return self if fusion else self._replace(offset_a=None, offset_b=None)

    def sizes(self) -> Sizes:
        """METHOD's sizes."""
        tasks, m, d = self.short_prompt.shape
        n, r = (0, 0) if self.offset_a is None else self.offset_a.shape[1:]
        down = self.space_down
        spaces, dim = (0, 1) if down is None else (down.shape[1], down.shape[3])
        return Sizes(tasks, m, n, r, spaces, dim, d)


class Sizes(NamedTuple):
    """METHOD's sizes: T, m, n, r, K, h and d. Without an offset n and r are 0, without subspaces K
    is 0 and h is 1.
    """

    tasks: int
    m: int
    n: int
    r: int
    spaces: int
    dim: int
    d: int


class Flags(NamedTuple):
    """The choices of operation 1.

    Attributes:
        scaling: c.
        activation: φ, a name of :data:`ept_fast.ops.activations.ACTIVATIONS`.
        gate: ``"token"`` or ``"prompt"``.
        temperature: τ.
    """

    scaling: float
    activation: str
    gate: str
    temperature: float


class Saved(NamedTuple):
    """What operation 1 keeps for its backward, in the accumulation type; empty if not needed.

    Attributes:
        query: Q, ``[T, m, r]``.
        stats: ``[T, 2, m]``, row maxima of Q·(c·A)ᵀ and row sums of the softmax's exponentials;
            zeros in the eager backend, whose backward computes the whole softmax again.
        attended: O, ``[T, m, r]``.
        hidden: Hin, ``[T, m, K·h]``, with the bias.
        gates: g, ``[T, m, K]``; without a gate it does not apply.
        cross: S, ``[T, r, K·h + K]``; without a gate ``[T, r, K·h]``.
    """

    query: Tensor
    stats: Tensor
    attended: Tensor
    hidden: Tensor
    gates: Tensor
    cross: Tensor

    @staticmethod
    def shapes(given: Parameters) -> list[tuple[int, ...]]:
        """Of what the forward keeps for these parameters; ``(0,)`` if it does not apply."""
        tasks, m, _, r, spaces, dim, _ = given.sizes()
        dims, offset = spaces * dim, given.has_offset
        gates = spaces if given.has_gate else 0
        none = (0,)
        return [
            (tasks, m, r) if offset else none,
            (tasks, 2, m) if offset else none,
            (tasks, m, r) if offset else none,
            (tasks, m, dims) if given.has_spaces else none,
            (tasks, m, spaces) if given.has_gate else none,
            (tasks, r, dims + gates) if offset and given.has_spaces else none,
        ]

    @classmethod
    def empty(cls, given: Parameters) -> Saved:
        """Empty tensors of the sizes of what the forward keeps for these parameters."""
        p, dtype = given.short_prompt, accumulation_dtype(*given)
        return cls(*(p.new_empty(shape, dtype=dtype) for shape in cls.shapes(given)))


class SpliceInputs(NamedTuple):
    """The tensors of operation 2; those that are not given are None.

    Attributes:
        prompt: P′, ``[T, m, d]``; with ``prompt_rows`` the rows to choose from, ``[1, R, d]``.
        input_ids: ``[B, S]``, or else ``inputs_embeds``.
        weight: the embedding table of ``input_ids``, ``[V, d]``.
        inputs_embeds: ``[B, S, d]``.
        offset_a: A, ``[T, n, r]``. In the eager backend, without B, the offset itself,
            ``[T, n, d]``.
        offset_b: B, ``[T, r, d]``.
        attention_mask: ``[B, S]``.
        task_ids: ``[B]``.
        prompt_rows: ``[B, m]``, the row of ``prompt`` for each prompt token; -1 for zeros.
    """

    prompt: Tensor
    input_ids: Tensor | None = None
    weight: Tensor | None = None
    inputs_embeds: Tensor | None = None
    offset_a: Tensor | None = None
    offset_b: Tensor | None = None
    attention_mask: Tensor | None = None
    task_ids: Tensor | None = None
    prompt_rows: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """m."""
        return (self.prompt if self.prompt_rows is None else self.prompt_rows).shape[1]

    @property
    def text(self) -> Tensor:
        """The tensor with the text's axes, ``[B, S]`` or ``[B, S, d]``."""
        text = self.input_ids if self.inputs_embeds is None else self.inputs_embeds
        assert text is not None
        return text

    @property
    def source(self) -> Tensor:
        """The tensor with the text's embeddings, ``[V, d]`` or ``[B, S, d]``."""
        source = self.weight if self.inputs_embeds is None else self.inputs_embeds
        assert source is not None
        return source

    def parts(self) -> tuple[Parameters, Text]:
        """The prompt and the offset, and the text behind the prompt; without ``prompt_rows``."""
        prompt, ids, weight, embeds, a, b, mask, task_ids, _ = self
        return Parameters(prompt, a, b), Text(ids, weight, embeds, mask, task_ids)


class Text(NamedTuple):
    """What a prompt is put before: the tensors of operation 2 that are no parameters.

    Attributes:
        input_ids, weight, inputs_embeds, attention_mask, task_ids: as of :class:`SpliceInputs`.
    """

    input_ids: Tensor | None = None
    weight: Tensor | None = None
    inputs_embeds: Tensor | None = None
    attention_mask: Tensor | None = None
    task_ids: Tensor | None = None

    def behind(self, prompt: Tensor, parameters: Parameters) -> SpliceInputs:
        """The inputs of operation 2 with this prompt, and the offset of these parameters."""
        return SpliceInputs(
            prompt,
            self.input_ids,
            self.weight,
            self.inputs_embeds,
            parameters.offset_a,
            parameters.offset_b,
            self.attention_mask,
            self.task_ids,
        )


class Needs(NamedTuple):
    """What the backward of both operations in a row has to compute.

    Attributes:
        prompt: the gradient of P′, and from it those of what the first operation sees.
        offset: the gradients of A and B from the text.
    """

    prompt: bool
    offset: bool

    @classmethod
    def for_gradients(cls, asked: Sequence[bool], fusion: bool) -> Needs:
        """For those gradients of the parameters, in their order, that are asked for."""
        prompt, a, b, *others = asked
        return cls(prompt or any(others) or (fusion and (a or b)), a or b)

    def of(self, parameters: Parameters, fusion: bool) -> tuple[bool, ...]:
        """Whether the gradient of each parameter is computed."""
        offset = self.offset or (self.prompt and fusion)
        return tuple(
            each is not None and (offset if i in (1, 2) else self.prompt)
            for i, each in enumerate(parameters)
        )


class SpliceGrads(NamedTuple):
    """Gradients of operation 2; those that are not needed are empty.

    Attributes:
        prompt: ``[T, m, d]``.
        offset_a: ``[T, n, r]``.
        offset_b: ``[T, r, d]``.
    """

    prompt: Tensor
    offset_a: Tensor
    offset_b: Tensor
