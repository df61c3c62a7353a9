"""Prompts behind a residual encoder: Residual Prompt Tuning's MLP, and PRE's bidirectional LSTM.

After Razdaibiedina et al., *Residual Prompt Tuning* (ACL Findings 2023), and Pham et al., *PRE*
(arXiv 2309.07760); docs/methods.md says what is theirs and what ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ept_fast.config import PromptConfig, check_choice, check_count, check_flag
from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.ops.functional import reconstruct_prompt
from ept_fast.prompts.base import Prompt, register

__all__ = ["ResidualConfig", "ResidualPrompt"]

_ENCODERS = ("mlp", "lstm")
_LSTM = ("lstm_input_weight", "lstm_hidden_weight", "lstm_input_bias", "lstm_hidden_bias")


@dataclass(frozen=True)
class ResidualConfig(PromptConfig):
    """Sizes and choices of a prompt behind a residual encoder.

    Attributes:
        hidden_size: d; even for ``"lstm"``.
        num_virtual_tokens: m.
        encoder: ``"mlp"``, two linear layers around an activation, or ``"lstm"``, one
            bidirectional layer of d/2 a direction over the m tokens.
        bottleneck: b, width between the layers of the MLP.
        activation: of the MLP, a name of :data:`ept_fast.ops.activations.ACTIVATIONS`.
        layer_norm: whether the MLP's output is normalised before it is added.
        shared: whether all tokens go through one MLP, or each through its own.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of its range, by name.
    """

    prompt_type: ClassVar[str] = "residual"
    methods: ClassVar[tuple[str, ...]] = ("residual", "pre")
    solved: ClassVar[str | None] = "bottleneck"

    encoder: str = "mlp"
    bottleneck: int = 64
    activation: str = "relu"
    layer_norm: bool = True
    shared: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("encoder", self.encoder, _ENCODERS)
        check_count("bottleneck", self.bottleneck, 1)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_flag("layer_norm", self.layer_norm)
        check_flag("shared", self.shared)
        if self.encoder == "lstm" and self.hidden_size % 2:
            raise ValueError(
                f"hidden_size: expected an even number for the encoder lstm, got {self.hidden_size}"
            )

    @property
    def num_parameters(self) -> int:
        """m·d and the encoder's; most of them are not needed once the prompt is folded."""
        m, d, b = self.num_virtual_tokens, self.hidden_size, self.bottleneck
        if self.encoder == "lstm":
            return m * d + 2 * (4 * (d // 2)) * (d + d // 2 + 2)
        mlps = (1 if self.shared else m) * (2 * d * b + b + d)
        return m * d + mlps + (2 * d if self.layer_norm else 0)

    @classmethod
    def choices_of(cls, method: str) -> dict[str, Any]:
        """``"pre"`` is the LSTM."""
        return {"encoder": "lstm"} if method == "pre" else {}

    @classmethod
    def for_method(
        cls, method: str, hidden_size: int, prompt_length: int, **settings: Any
    ) -> PromptConfig:
        """As every method's; an LSTM is of one size, which no budget bounds."""
        encoder = {**cls.choices_of(method), **settings}.get("encoder")
        if encoder == "lstm":
            prompt_length = cls(hidden_size, encoder="lstm").num_parameters
            settings = {"bottleneck": cls.bottleneck, **settings}
        return super().for_method(method, hidden_size, prompt_length, **settings)


@register
class ResidualPrompt(Prompt):
    """P' = P + encoder(P), with trained rows P ``[m, d]``.

    The MLP is φ(P·D + b₁)·U + b₂, normalised if so chosen. One MLP for all tokens and without
    LayerNorm is one subspace of :func:`ept_fast.reconstruct_prompt`, and goes through its kernels.
    Once trained, :meth:`fold` drops the encoder. The arguments are those of
    :class:`ept_fast.FusedEPTPrompt`.
    """

    config_class: ClassVar[type[PromptConfig]] = ResidualConfig
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompt": ("short_prompt",),
        "spaces": (
            *("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias"),
            *_LSTM,
        ),
    }

    config: ResidualConfig
    short_prompt: nn.Parameter

    @classmethod
    def shapes(cls, config: ResidualConfig) -> dict[str, tuple[int, ...]]:
        """The tensors of a single prompt of these sizes, by name."""
        m, d, b = config.num_virtual_tokens, config.hidden_size, config.bottleneck
        shapes: dict[str, tuple[int, ...]] = {"short_prompt": (m, d)}
        if config.encoder == "lstm":
            sizes = ((2 * d, d), (2 * d, d // 2), (2 * d,), (2 * d,))
            return shapes | {name: (2, *size) for name, size in zip(_LSTM, sizes, strict=True)}
        lead = () if config.shared else (m,)
        shapes |= {"down_weight": (*lead, d, b), "down_bias": (*lead, b)}
        shapes |= {"up_weight": (*lead, b, d), "up_bias": (*lead, d)}
        if config.layer_norm:
            shapes |= {"norm_weight": (d,), "norm_bias": (d,)}
        return shapes

    def initial(self, rows: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """The first m rows; encoders start as torch's layers do."""
        c = self.config
        d = c.hidden_size
        fan = dict.fromkeys(("down_weight", "down_bias"), d)
        fan |= dict.fromkeys(("up_weight", "up_bias"), c.bottleneck)
        fan |= dict.fromkeys(_LSTM, d // 2)
        tensors = {}
        for name, shape in self.shapes(c).items():
            if name == "short_prompt":
                tensors[name] = rows[: c.num_virtual_tokens]
            elif name in fan:
                uniform = torch.rand(shape, generator=generator) * 2 - 1
                tensors[name] = uniform / fan[name] ** 0.5
            else:
                tensors[name] = torch.full(shape, float(name == "norm_weight"))
        return tensors

    def reconstruct(self) -> Tensor:
        """P′, ``[(T,) m, d]``; by the fused operation where it is one of its forms."""
        c = self.config
        if c.encoder != "mlp" or c.layer_norm or not c.shared:
            return super().reconstruct()
        t: dict[str, Any] = self.tensors()
        return reconstruct_prompt(
            t["short_prompt"],
            space_down=t["down_weight"].unsqueeze(-3),
            space_up=t["up_weight"].unsqueeze(-3),
            space_down_bias=t["down_bias"].unsqueeze(-2),
            space_up_bias=t["up_bias"].unsqueeze(-2),
            activation=c.activation,
            backend=self.backend,
        )

    def formula(self, t: Mapping[str, Tensor]) -> Tensor:
        """P′ in plain PyTorch."""
        prompt = t["short_prompt"]
        if self.config.encoder == "lstm":
            if prompt.dim() == 2:
                return prompt + _lstm(prompt, [t[name] for name in _LSTM])
            tasks = range(prompt.shape[0])
            encoded = [_lstm(prompt[i], [t[name][i] for name in _LSTM]) for i in tasks]
            return prompt + torch.stack(encoded)
        hidden = _linear(prompt, t["down_weight"], t["down_bias"], self.config.shared)
        hidden = ACTIVATIONS[self.config.activation].function(hidden)
        change = _linear(hidden, t["up_weight"], t["up_bias"], self.config.shared)
        if self.config.layer_norm:
            change = F.layer_norm(change, change.shape[-1:])
            change = change * t["norm_weight"].unsqueeze(-2) + t["norm_bias"].unsqueeze(-2)
        return prompt + change


def _linear(rows: Tensor, weight: Tensor, bias: Tensor, shared: bool) -> Tensor:
    """Rows ``[(T,) m, i]`` through a layer ``[(T,) i, o]``, or each through its own."""
    if shared:
        return rows @ weight + bias.unsqueeze(-2)
    return (rows.unsqueeze(-2) @ weight).squeeze(-2) + bias


def _lstm(rows: Tensor, tensors: list[Tensor]) -> Tensor:
    """A bidirectional LSTM over m rows, ``[m, d]``; both directions side by side."""
    flat = [tensor[direction] for direction in (0, 1) for tensor in tensors]
    start = rows.new_zeros(2, 1, rows.shape[1] // 2)
    layers, dropout, training, bidirectional, batch_first = 1, 0.0, False, True, False
    given = (flat, True, layers, dropout, training, bidirectional, batch_first)
    states: Tensor = torch.lstm(rows.unsqueeze(1), (start, start), *given)[0]
    return states.squeeze(1)
