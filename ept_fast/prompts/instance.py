"""IPT: a prompt of each text, read from a trained table by the text's own tokens.

After Jiang et al., *Instance-wise Prompt Tuning for Pretrained Language Models* (arXiv 2206.01958);
docs/methods.md says what is theirs and what ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ept_fast.checks import check_text
from ept_fast.config import PromptConfig, check_choice, check_count
from ept_fast.ops.functional import splice_prompt
from ept_fast.ops.types import Text
from ept_fast.prompts.base import Prompt, Seen, register
from ept_fast.prompts.initial import repeated
from ept_fast.prompts.reading import by_row, check_tasks
from ept_fast.storage.sharded import check_whole

__all__ = ["InstanceConfig", "InstancePrompt"]

_GENERATORS = ("none", "cnn", "mlp")
_HEIGHTS = (3, 4, 5)  # tokens that each of the convolutions sees at once


@dataclass(frozen=True)
class InstanceConfig(PromptConfig):
    """Sizes and choices of a prompt that is read from a table.

    Attributes:
        hidden_size: d.
        num_virtual_tokens: m; the first m real tokens of a text are read.
        table_size: V′, rows of the table. Token ids count modulo V′.
        table_rank: r, the table is ``[V′, r]`` times ``[r, d]``; 0 for a table as it is.
        generator: what makes the prompt of the rows: ``"none"``, they are the prompt; ``"cnn"``,
            three convolutions over them; ``"mlp"``, two layers behind their mean.
        bottleneck: h, width between the two layers (mlp).

    Raises:
        TypeError, ValueError: a field of the wrong type or out of its range, by name.
    """

    prompt_type: ClassVar[str] = "instance"
    solved: ClassVar[str | None] = "table_size"

    table_size: int = 2048
    table_rank: int = 16
    generator: str = "none"
    bottleneck: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("table_size", self.table_size, 1)
        check_count("table_rank", self.table_rank, 0)
        check_choice("generator", self.generator, _GENERATORS)
        check_count("bottleneck", self.bottleneck, 1)
        if self.table_rank > self.hidden_size:
            raise ValueError(
                f"table_rank: expected at most hidden_size {self.hidden_size}, "
                f"got {self.table_rank}"
            )

    @property
    def initial_rows(self) -> int:
        """As many as the table has, or its right factor."""
        return max(self.num_virtual_tokens, self.table_rank or self.table_size)

    @property
    def num_parameters(self) -> int:
        """Those of the table and of the generator."""
        m, d, r, h = self.num_virtual_tokens, self.hidden_size, self.table_rank, self.bottleneck
        table = r * (self.table_size + d) if r else self.table_size * d
        if self.generator == "none":
            return table
        if self.generator == "mlp":
            return table + h * (d + 1) + (h + 1) * m * d
        return table + sum(_HEIGHTS) * d + len(_HEIGHTS) + (len(_HEIGHTS) + 1) * m * d


@register
class InstancePrompt(Prompt):
    """P'[j] = E[id of the text's j-th real token mod V'], j < m, or what a generator makes of them.

    Padding is passed over, and the rows of a text with fewer than m tokens end in zeros. Each row
    of a batch has a prompt of its own: there is no constant P', and a folded one is a frozen copy.
    A table that is neither factored nor read by a generator is gathered by the splice itself.

    The arguments are those of :class:`ept_fast.FusedEPTPrompt`.
    """

    config_class: ClassVar[type[PromptConfig]] = InstanceConfig
    groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prompt": ("table", "table_codes", "table_basis", "up_bias"),
        "spaces": ("filter_weight", "filter_bias", "down_weight", "down_bias", "up_weight"),
    }

    config: InstanceConfig

    @classmethod
    def shapes(cls, config: InstanceConfig) -> dict[str, tuple[int, ...]]:
        """The tensors of a single prompt of these sizes, by name."""
        m, d, h = config.num_virtual_tokens, config.hidden_size, config.bottleneck
        size, r = config.table_size, config.table_rank
        shapes: dict[str, tuple[int, ...]] = {"table": (size, d)}
        if r:
            shapes = {"table_codes": (size, r), "table_basis": (r, d)}
        if config.generator == "none":
            return shapes
        if config.generator == "mlp":
            shapes |= {"down_weight": (d, h), "down_bias": (h,)}
        else:
            h = len(_HEIGHTS)
            shapes |= {"filter_weight": (sum(_HEIGHTS), d), "filter_bias": (h,)}
        return {**shapes, "up_weight": (h, m, d), "up_bias": (m, d)}

    def initial(self, rows: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        """A table of the rows, or of normal mixtures of r of them; a generator that gives m rows.

        Its last layer starts at zero weights, and what is before it as linear layers of torch do.
        """
        c = self.config
        shapes = self.shapes(c)
        tensors = {"table": repeated(rows, c.table_size)}
        if c.table_rank:
            codes = torch.randn(shapes["table_codes"], generator=generator)
            basis = repeated(rows, c.table_rank)
            tensors = {"table_codes": codes / c.table_rank**0.5, "table_basis": basis}
        for name in ("filter_weight", "filter_bias", "down_weight", "down_bias"):
            if name in shapes:
                size = c.hidden_size * (max(_HEIGHTS) if c.generator == "cnn" else 1)
                values = torch.rand(shapes[name], generator=generator) * 2 - 1
                tensors[name] = values / size**0.5
        if "up_bias" in shapes:
            tensors["up_weight"] = torch.zeros(shapes["up_weight"])
            tensors["up_bias"] = rows[: c.num_virtual_tokens]
        return tensors

    @property
    def depends_on_text(self) -> bool:
        """Always."""
        return True

    def prompt_for(self, text: Text, seen: Seen) -> tuple[Tensor, Text]:
        """A prompt of each row."""
        rows = self._rows(text, seen)
        return by_row(self.computed(lambda t: self._prompts(t, rows, text.task_ids)), text)

    def put_before(self, text: Text, seen: Seen, places: list[Tensor] | None = None) -> Tensor:
        """The embeddings ``[B, m + S, d]``; rows that are the prompt are gathered there."""
        table = self.tensors()["table"]
        if table is None or self.config.generator != "none":
            return super().put_before(text, seen, places)
        check_whole({"embedding.weight": text.weight})
        return splice_prompt(
            table.flatten(0, -2),  # of all tasks
            input_ids=text.input_ids,
            weight=text.weight,
            inputs_embeds=text.inputs_embeds,
            attention_mask=text.attention_mask,
            prompt_rows=self._rows(text, seen),
            backend=self.backend,
        )

    def _rows(self, text: Text, seen: Seen) -> Tensor:
        """The rows that each text's first m real tokens have in the table, ``[B, m]``; then -1.

        The tables of a bank's tasks follow one another.
        """
        ids, c = seen.token_ids, self.config
        if ids is None:
            raise ValueError(
                "input_ids: expected token ids, as the prompt is read from a table by them, got "
                "inputs_embeds"
            )
        tensors = self.tensors()
        table = tensors["table_basis"] if c.table_rank else tensors["table"]
        assert table is not None
        check_text(text, "table", table, None)
        rows = ids.long() % c.table_size
        if text.task_ids is not None:
            check_tasks(text, self.num_tasks)
            rows = rows + c.table_size * text.task_ids.long().unsqueeze(1)
        if text.attention_mask is not None:
            real = text.attention_mask != 0
            order = (~real).int().argsort(dim=1, stable=True)  # real tokens first
            rows = rows.masked_fill(~real, -1).gather(1, order)
        rows = rows[:, : c.num_virtual_tokens]
        return F.pad(rows, (0, c.num_virtual_tokens - rows.shape[1]), value=-1)

    def _prompts(self, t: Mapping[str, Tensor], rows: Tensor, task_ids: Tensor | None) -> Tensor:
        """A prompt for each row, ``[B, m, d]``."""

        def own(name: str) -> Tensor:
            return t[name] if task_ids is None else t[name][task_ids]

        c, there = self.config, rows >= 0
        table = t["table_codes" if c.table_rank else "table"].flatten(0, -2)
        x = F.embedding(rows.clamp_min(0), table).masked_fill(~there.unsqueeze(-1), 0)
        if c.table_rank:
            x = x @ own("table_basis")
        if c.generator == "none":
            return x
        number = there.sum(1, keepdim=True)
        if c.generator == "mlp":
            mean = x.sum(1, keepdim=True) / number.clamp_min(1).unsqueeze(1)
            made = (mean @ own("down_weight") + own("down_bias").unsqueeze(-2)).relu()
        else:
            made = _convolved(x, number, own("filter_weight"), own("filter_bias"))
        prompts = (made @ own("up_weight").flatten(-2)).view(x.shape)
        return prompts + own("up_bias")


def _convolved(x: Tensor, number: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The largest value of each convolution over a text's tokens, after ReLU, ``[B, 1, 3]``.

    Args:
        x: ``[B, m, d]``, zeros behind the tokens. A text shorter than a convolution counts as long
            as that.
        number: ``[B, 1]``, of tokens.
        weight: of the convolutions, one below the other, ``[(B,) 12, d]``.
        bias: ``[(B,) 3]``.
    """
    x = F.pad(x, (0, 0, 0, max(0, max(_HEIGHTS) - x.shape[1])))
    products = x @ weight.mT
    found, first = [], 0
    for i, height in enumerate(_HEIGHTS):
        starts = torch.arange(x.shape[1] - height + 1, device=x.device)
        columns = [products[:, k : k + len(starts), first + k] for k in range(height)]
        values = (torch.stack(columns).sum(0) + bias[..., i : i + 1]).relu()
        inside = starts <= (number - height).clamp_min(0)
        found.append(values.masked_fill(~inside, 0).amax(1))
        first += height
    return torch.stack(found, 1).unsqueeze(1)
