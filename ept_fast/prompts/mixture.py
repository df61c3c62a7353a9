"""Mixtures of prompts: MP2's modular prompts under gates of a task, ATTEMPT's under attention.

After Sun et al., *MP2* (ACL 2023, arXiv 2210.07565), and Asai et al., *ATTEMPT* (EMNLP 2022);
docs/methods.md says what is theirs and what ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ept_fast.config import PromptConfig, check_choice, check_count, check_flag, check_number
from ept_fast.ops.types import Text
from ept_fast.prompts.base import Prompt, Seen, register
from ept_fast.prompts.initial import repeated
from ept_fast.prompts.reading import by_row, check_tasks, embeddings_of

__all__ = ["MixtureConfig", "MixturePrompt"]

_GATES = ("bernoulli", "attention")
_START = 1e-3  # gate logits and factors start within this of zero
_NO_ZERO = 1e-12  # added to the gates' sum


@dataclass(frozen=True)
class MixtureConfig(PromptConfig):
    """Sizes and choices of a mixture of prompts.

    Attributes:
        hidden_size: d.
        num_virtual_tokens: m.
        num_modules: K, modular prompts of m tokens each.
        num_factors: R, the modules are ``[K, R]`` times ``[R, m, d]``; 0 for modules as they are.
        gates: ``"bernoulli"``, one weight a module, the same before every text, noisy in training;
            or ``"attention"``, weights of each row, from its text, and a target prompt besides.
        temperature: τ > 0, of the gates.
        query_dim: h, width between the two layers that make a text's query (attention).
        attend_to_target: whether the target prompt gets a weight, too (attention).

    Raises:
        TypeError, ValueError: a field of the wrong type or out of its range, by name.
    """

    prompt_type: ClassVar[str] = "mixture"
    methods: ClassVar[tuple[str, ...]] = ("mp2", "attempt")
    solved: ClassVar[str | None] = "num_modules"

    num_modules: int = 4
    num_factors: int = 0
    gates: str = "bernoulli"
    temperature: float = 1.0
    query_dim: int = 16
    attend_to_target: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_modules", self.num_modules, 1)
        check_count("num_factors", self.num_factors, 0)
        check_choice("gates", self.gates, _GATES)
        check_number("temperature", self.temperature, positive=True)
        check_count("query_dim", self.query_dim, 1)
        check_flag("attend_to_target", self.attend_to_target)

    @property
    def initial_rows(self) -> int:
        """m rows for each module."""
        return self.num_modules * self.num_virtual_tokens

    @property
    def num_parameters(self) -> int:
        """Those of the modules and of the gates."""
        k, r, d = self.num_modules, self.num_factors, self.hidden_size
        size = self.num_virtual_tokens * d
        modules = r * (k + size) if r else k * size
        if self.gates == "bernoulli":
            return modules + k
        return modules + size + 2 * d * (self.query_dim + 1)

    @classmethod
    def choices_of(cls, method: str) -> dict[str, Any]:
        """``"attempt"`` has attention for its gates."""
        return {"gates": "attention"} if method == "attempt" else {}

    @classmethod
    def for_method(
        cls, method: str, hidden_size: int, prompt_length: int, **settings: Any
    ) -> PromptConfig:
        """As every method's; factored modules cost so little each that K is not solved for."""
        if settings.get("num_factors"):
            settings = {"num_modules": cls.num_modules, **settings}
        return super().for_method(method, hidden_size, prompt_length, **settings)


@register
class MixturePrompt(Prompt):
    """P' = Σ_k g_k·M_k, with modules M ``[K, m, d]`` that all tasks share.

    Gates of a task (``"bernoulli"``): with s = σ(logits), g = s / Σ s. In training mode, s is a
    draw of the relaxed Bernoulli distribution, σ((logits + log(u / (1 - u))) / τ) with u uniform,
    from torch's generator of the device, as dropout's: ``torch.manual_seed`` makes it
    reproducible. :meth:`mixed` takes u as an input.

    Gates of a row (``"attention"``): x is the maximum over the text's tokens, q =
    LayerNorm(W_up·SiLU(W_down·x)), and g the softmax over k of q·max(M_k) / (τ·√d); the target
    prompt is added. Such a prompt has no constant P', and a folded one is a frozen copy.

    The arguments are those of :class:`ept_fast.FusedEPTPrompt`.
    """

    config_class: ClassVar[type[PromptConfig]] = MixtureConfig
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompt": ("module_prompts", "module_weights", "module_basis", "target_prompt"),
        "spaces": ("gate_logits", "query_down", "query_up", "norm_weight", "norm_bias"),
    }
    shared: ClassVar[tuple[str, ...]] = (
        *("module_prompts", "module_weights", "module_basis"),
        *("query_down", "query_up", "norm_weight", "norm_bias"),
    )

    config: MixtureConfig
    gate_logits: nn.Parameter | None

    @classmethod
    def shapes(cls, config: MixtureConfig) -> dict[str, tuple[int, ...]]:
        """The tensors of a single prompt of these sizes, by name."""
        m, d, h = config.num_virtual_tokens, config.hidden_size, config.query_dim
        k, r = config.num_modules, config.num_factors
        shapes: dict[str, tuple[int, ...]] = {"module_prompts": (k, m, d)}
        if r:
            shapes = {"module_weights": (k, r), "module_basis": (r, m, d)}
        if config.gates == "bernoulli":
            return {**shapes, "gate_logits": (k,)}
        shapes |= {"target_prompt": (m, d), "query_down": (d, h), "query_up": (h, d)}
        return {**shapes, "norm_weight": (d,), "norm_bias": (d,)}

    def initial(self, rows: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Modules of m rows each, or their best approximation; gates that are nearly equal."""
        c = self.config
        m, d, k, r = c.num_virtual_tokens, c.hidden_size, c.num_modules, c.num_factors
        modules = repeated(rows, k * m).reshape(k, m, d)
        tensors = {"module_prompts": modules}
        if r:
            weights = torch.randn(k, r, generator=generator) / r**0.5
            basis = torch.linalg.pinv(weights.double()) @ modules.double().flatten(1)
            tensors = {"module_weights": weights, "module_basis": basis.float().view(r, m, d)}
        if c.gates == "bernoulli":
            logits = (torch.rand(k, generator=generator) * 2 - 1) * _START
            return {**tensors, "gate_logits": logits}
        down, up = (
            (torch.rand(shape, generator=generator) * 2 - 1) / shape[0] ** 0.5
            for shape in ((d, c.query_dim), (c.query_dim, d))
        )
        tensors |= {"target_prompt": modules.mean(0), "query_down": down, "query_up": up}
        return {**tensors, "norm_weight": torch.ones(d), "norm_bias": torch.zeros(d)}

    @property
    def depends_on_text(self) -> bool:
        """Whether the gates are attention's."""
        return self.config.gates == "attention"

    @property
    def has_gate(self) -> bool:
        """Whether the gates are a task's."""
        return self.config.gates == "bernoulli"

    @torch.no_grad()
    def gate_weights(self) -> Tensor:
        """The weight of every module, the same for all tokens, ``[(T,) m, K]``."""
        gates = self.computed(self._gates)
        m = self.config.num_virtual_tokens
        return gates.unsqueeze(-2).expand(*gates.shape[:-1], m, gates.shape[-1])

    def mixed(self, noise: Tensor) -> Tensor:
        """P′ of one draw of the gates, ``[(T,) m, d]``.

        Args:
            noise: u, uniform in (0, 1), ``[(T,) K]``; the values 0 and 1 count as the nearest ones
                between them.

        Raises:
            ValueError: another shape, or gates that are not a task's.
        """
        logits = self.gate_logits
        if logits is None or noise.shape != logits.shape:
            if logits is None:
                raise ValueError("gates: expected bernoulli for noise, got attention")
            raise ValueError(f"noise: expected shape {list(logits.shape)}, got {list(noise.shape)}")
        return self.computed(lambda t: _mix(self._gates(t, noise), t))

    def formula(self, t: Mapping[str, Tensor]) -> Tensor:
        """P′ of a task's gates, without noise."""
        return _mix(self._gates(t), t)

    def prompt_for(self, text: Text, seen: Seen) -> tuple[Tensor, Text]:
        """The prompt of a task, noisy in training mode; or a prompt of each row."""
        if self.depends_on_text:
            check_tasks(text, self.num_tasks)
            return by_row(self.computed(lambda t: self._attend(t, text)), text)
        logits = self.gate_logits
        if not self.training or logits is None:
            return self.reconstruct(), text
        return self.mixed(torch.rand(logits.shape, device=logits.device)), text

    def _gates(self, t: Mapping[str, Tensor], noise: Tensor | None = None) -> Tensor:
        """``[(T,) K]``, of sum 1."""
        logits = t["gate_logits"]
        if noise is not None:
            smallest = torch.finfo(logits.dtype).eps
            u = noise.to(logits.dtype).clamp(smallest, 1 - smallest)
            logits = (logits + u.logit()) / self.config.temperature
        gates = logits.sigmoid()
        return gates / (gates.sum(-1, keepdim=True) + _NO_ZERO)

    def _attend(self, t: Mapping[str, Tensor], text: Text) -> Tensor:
        """A prompt for each row, ``[B, m, d]``."""
        c = self.config
        x = _largest(text).to(t["query_down"].dtype)
        query = F.silu(x @ t["query_down"]) @ t["query_up"]
        query = F.layer_norm(query, query.shape[-1:], t["norm_weight"], t["norm_bias"])
        target = t["target_prompt"]
        target = target.expand(len(x), -1, -1) if target.dim() == 2 else target[text.task_ids]
        modules = _modules(t)
        logits = query @ modules.amax(1).T  # [B, K]
        if c.attend_to_target:
            own = (query * target.amax(1)).sum(1, keepdim=True)
            logits = torch.cat([logits, own], 1)
        gates = (logits / (c.temperature * c.hidden_size**0.5)).softmax(1)
        mixed = torch.einsum("bk,kmd->bmd", gates[:, : c.num_modules], modules)
        if c.attend_to_target:
            target = target * (1 + gates[:, -1:, None])
        return mixed + target


def _modules(t: Mapping[str, Tensor]) -> Tensor:
    """M, ``[K, m, d]``."""
    if "module_prompts" in t:
        return t["module_prompts"]
    return torch.einsum("kr,rmd->kmd", t["module_weights"], t["module_basis"])


def _mix(gates: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    """Σ_k g_k·M_k; of factored modules without forming them, as (g·weights)·basis."""
    if "module_prompts" in t:
        return torch.einsum("...k,kmd->...md", gates, t["module_prompts"])
    return torch.einsum("...r,rmd->...md", gates @ t["module_weights"], t["module_basis"])


def _largest(text: Text) -> Tensor:
    """For each row and channel the largest value among the embeddings of its real tokens.

    Zeros for a row without any.
    """
    embeds = embeddings_of(text)
    if not embeds.shape[1]:
        return embeds.new_zeros(embeds.shape[0], embeds.shape[2])
    if text.attention_mask is None:
        return embeds.amax(1)
    real = (text.attention_mask != 0).unsqueeze(-1)
    found = embeds.masked_fill(~real, -torch.inf).amax(1)
    return found.where(real.any(1), 0)
