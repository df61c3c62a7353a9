"""EPT: a short prompt, a low-rank offset for the text, and gated subspaces (docs/method.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ept_fast.config import EPTConfig, PromptConfig
from ept_fast.ops.functional import gate_weights, prompt_path, reconstruct_prompt
from ept_fast.ops.types import OF_EPT, Flags, Parameters, Text
from ept_fast.prompts.base import FoldedPrompt, Prompt, Seen, register
from ept_fast.storage.sharded import check_whole

__all__ = ["FoldedEPTPrompt", "FusedEPTPrompt"]

FoldedEPTPrompt = FoldedPrompt
_NAMES = Parameters._fields[:OF_EPT]


@register
class FusedEPTPrompt(Prompt):
    """An EPT prompt for a frozen backbone: the trainable tensors and nothing else.

    With ``num_tasks=T`` it is a bank: every tensor has a leading axis T and ``forward`` takes
    ``task_ids``. The backbone's embedding layer is referenced, not registered, so ``parameters()``,
    ``state_dict()`` and ``to()`` see only the prompt. A layer that does more than a lookup
    (scaling, quantisation, hooks) is called; a plain ``nn.Embedding`` is looked up inside the
    operation.

    Args:
        config: sizes and choices; ``hidden_size`` must be the layer's width.
        embedding: the backbone's embedding layer, as ``model.get_input_embeddings()`` gives it;
            None for a prompt that is called with ``inputs_embeds`` only, and has a tensor as
            ``init``.
        init: the rows that the prompt starts from: ``"vocab"`` (sampled from the table, without its
            padding row), ``"text"`` (of ``text``, repeated as needed), ``"data"`` (of the task's
            own texts: the short prompt is made of ``prototypes`` of their tokens' embeddings,
            ``offset_b`` of the leading directions of what these leave),
            ``"random"`` (normal, with the table's standard deviation), or a tensor ``[L, d]`` or
            ``[T, L, d]`` with L >= m. The first m rows are the short prompt. The rows after them,
            sampled if there are too few, give ``offset_b`` through an SVD (METHOD, Initialisation).
        text: for ``init="text"`` a string, for ``init="data"`` a sequence of strings.
        tokenizer: for these two; called as ``tokenizer(text, add_special_tokens=False)``.
        prototypes: for ``init="data"``: ``"kmeans"`` (the m means of clusters; nothing is random),
            ``"random"``, ``"mean"`` or ``"max"``, as in :func:`ept_fast.from_prototypes`.
        prototype_layer: None here. Models behind a prompt take the states of a layer too:
            :func:`ept_fast.get_ept_model`.
        num_tasks: T, or None for a single prompt.
        generator: a CPU generator for everything random; the global one by default.
        dtype: type of the parameters.
        backend: as in :func:`ept_fast.reconstruct_prompt`.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.

    Example:
        >>> table = nn.Embedding(100, 32)
        >>> config = EPTConfig(32, num_virtual_tokens=4, max_length=16, rank=2)
        >>> prompt = FusedEPTPrompt(config, table)
        >>> prompt(torch.tensor([[5, 6, 7]])).inputs_embeds.shape
        torch.Size([1, 7, 32])
    """

    config_class: ClassVar[type[PromptConfig]] = EPTConfig
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompt": ("short_prompt",),
        "offset": ("offset_a", "offset_b"),
        "spaces": ("space_down", "space_up", "gate_weight", "gate_bias"),
    }

    config: EPTConfig
    short_prompt: nn.Parameter
    offset_a: nn.Parameter | None
    offset_b: nn.Parameter | None
    space_down: nn.Parameter | None
    space_up: nn.Parameter | None
    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None

    @classmethod
    def shapes(cls, config: EPTConfig) -> dict[str, tuple[int, ...]]:
        """The tensors of a single prompt of these sizes, by name."""
        d, k, h = config.hidden_size, config.num_spaces, config.space_dim
        shapes: dict[str, tuple[int, ...]] = {"short_prompt": (config.num_virtual_tokens, d)}
        if config.rank:
            shapes |= {"offset_a": (config.max_length, config.rank), "offset_b": (config.rank, d)}
        if k:
            shapes |= {"space_down": (k, d, h), "space_up": (k, h, d)}
            shapes |= {"gate_weight": (d, k), "gate_bias": (k,)}
        return shapes

    def initial(self, rows: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """METHOD's initial values, with which P′ is the first m rows and the offset is zero."""
        c = self.config
        d, m, k, h = c.hidden_size, c.num_virtual_tokens, c.num_spaces, c.space_dim
        tensors = {"short_prompt": rows[:m]}
        if c.rank:
            _, singular, directions = torch.linalg.svd(rows[m:].double(), full_matrices=False)
            leading = singular[: c.rank].sqrt().unsqueeze(-1) * directions[: c.rank]
            tensors["offset_a"] = torch.zeros(c.max_length, c.rank)
            tensors["offset_b"] = leading.float()
        if k:
            tensors["space_down"] = torch.randn(k, d, h, generator=generator) / d**0.5
            tensors["space_up"] = torch.zeros(k, h, d)
            tensors["gate_weight"] = torch.randn(d, k, generator=generator) * 0.02
            tensors["gate_bias"] = torch.zeros(k)
        return tensors

    def reconstruct(self) -> Tensor:
        """The reconstructed prompt P′, ``[(T,) m, d]``, in the parameters' type."""
        c = self.config
        return reconstruct_prompt(
            **self.tensors(),  # type: ignore[arg-type]
            scaling=c.scaling,
            activation=c.activation,
            gate=c.gate,
            temperature=c.temperature,
            fusion=c.fusion,
            backend=self.backend,
        )

    def put_before(self, text: Text, seen: Seen, places: list[Tensor] | None = None) -> Tensor:
        """The embeddings ``[B, m + S, d]`` of prompt and text, by both operations in one."""
        if type(self).reconstruct is not FusedEPTPrompt.reconstruct:  # a subclass has its own
            return super().put_before(text, seen)
        try:
            tensors = [self._parameters[name] for name in _NAMES]
        except KeyError:  # one is computed from others (torch.nn.utils.parametrize)
            tensors = [getattr(self, name) for name in _NAMES]
        parameters = Parameters(*tensors)  # type: ignore[arg-type]
        c = self.config
        flags = Flags(c.scaling, c.activation, c.gate, c.temperature)
        return prompt_path(
            parameters, text, flags, c.fusion, self.backend, self._first_check, places
        )

    def _first_check(self, text: Text) -> None:
        """That this process holds all of every tensor."""
        check_whole({"embedding.weight": text.weight})
        self.tensors()

    @property
    def has_gate(self) -> bool:
        """Whether the prompt has subspaces, and so a gate."""
        return self.gate_weight is not None

    @torch.no_grad()
    def gate_weights(self) -> Tensor:
        """The gate's weight of every subspace for every prompt token, ``[(T,) m, K]``.

        In float32 (float64 for float64 parameters), as the operation itself computes them.

        Raises:
            ValueError: the prompt has no subspaces.
        """
        if self.gate_weight is None:
            raise ValueError("num_spaces: expected at least 1 for gate weights, got 0")
        c = self.config
        return gate_weights(
            Parameters(**self.tensors()),  # type: ignore[arg-type]
            Flags(c.scaling, c.activation, c.gate, c.temperature),
            fusion=c.fusion,
            backend=self.backend,
        )
