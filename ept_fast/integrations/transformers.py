"""An EPT prompt and a task head on a frozen ``transformers`` encoder."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ept_fast.checkpoint import (
    CheckpointError,
    check_tensors,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from ept_fast.config import EPTConfig, check_choice, check_number
from ept_fast.module import CONFIG_FILE, TENSOR_FILE, FusedEPTPrompt

__all__ = [
    "ADAPTER_FILE",
    "HEAD_FILE",
    "EPTForSequenceClassification",
    "embedding_width",
    "load_backbone",
    "load_tokenizer",
    "read_adapter",
    "text_limit",
]

ADAPTER_FILE = "adapter.json"
HEAD_FILE = "head.safetensors"

_FORMAT = {"format": "ept_fast", "format_version": 1, "task": "sequence_classification"}


def load_backbone(name: str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A pretrained encoder by folder or hub id; the encoder half of an encoder-decoder.

    Raises:
        ValueError: nothing loadable under that name, or no way to hand it embeddings.
    """
    logging: Any = transformers.utils.logging
    bars = logging.is_progress_bar_enabled()
    if Path(name).is_dir():
        logging.disable_progress_bar()  # reading a local file needs none
    try:
        backbone: Any = transformers.AutoModel.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(name, error)) from None
    finally:
        if bars:
            logging.enable_progress_bar()
    return backbone.get_encoder() if backbone.config.is_encoder_decoder else backbone  # type: ignore[no-any-return]


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a pretrained model; ``ValueError`` where there is none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(name, error)) from None


def _not_found(name: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return f"model: expected a folder or hub id of a pretrained encoder, got {name!r} ({reason})"


def embedding_width(backbone: Any) -> int:
    """d, the width of the backbone's token embeddings (not always its hidden size)."""
    return int(backbone.get_input_embeddings().weight.shape[-1])


def text_limit(backbone: Any, num_virtual_tokens: int) -> int | None:
    """The longest text, in tokens, that fits behind the prompt; None without a limit."""
    positions = getattr(backbone.config, "max_position_embeddings", None)
    if positions is None or positions <= 0:  # relative positions
        return None
    return int(positions) - _first_position(backbone) - num_virtual_tokens


def _first_position(backbone: nn.Module) -> int:
    """Where the backbone's position ids start: RoBERTa and its kin count from padding_idx + 1."""
    for name, layer in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(layer, nn.Embedding):
            return 0 if layer.padding_idx is None else layer.padding_idx + 1
    return 0


class EPTForSequenceClassification(nn.Module):
    """Prompt, frozen encoder, pooling and a linear head.

    The backbone is frozen and stays in evaluation mode, also under ``.train()``: no dropout, no
    gradient to its weights. It may be any module with ``config``, ``get_input_embeddings()`` and a
    forward that takes ``inputs_embeds`` and ``attention_mask``; ``position_ids`` and
    ``token_type_ids`` (zeros for the prompt) are handed on where that forward has them.

    Args:
        backbone: the pretrained encoder.
        config: sizes and choices of the prompt; ``hidden_size`` is the width of the embeddings.
        labels: the names of the classes, in the order of the logits.
        pooling: ``"mean"`` over the text's real tokens, the prompt left out; or ``"model"``, the
            backbone's own ``pooler_output`` (BERT's reads the first position, a prompt token then).
        head_dropout: dropout probability before the head.
        base_model: the backbone's folder or hub id, saved with the adapter.
        init: as in :class:`ept_fast.FusedEPTPrompt`.
        generator: a CPU generator for everything random; the global one where it is not given.
        backend: as in :func:`ept_fast.reconstruct_prompt`.

    Raises:
        TypeError: a backbone that cannot be called with embeddings.
        ValueError: fewer than two or repeated labels, an unknown pooling, no room for the prompt.
    """

    backbone: Any
    prompt: FusedEPTPrompt
    head: nn.Linear

    def __init__(
        self,
        backbone: nn.Module,
        config: EPTConfig,
        labels: Sequence[str],
        *,
        pooling: str = "mean",
        head_dropout: float = 0.0,
        base_model: str | None = None,
        init: str | Tensor = "vocab",
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("pooling", pooling, ("mean", "model"))
        check_number("head_dropout", head_dropout)
        if not 0 <= head_dropout < 1:
            raise ValueError(f"head_dropout: expected 0 <= head_dropout < 1, got {head_dropout}")
        self._check_backbone(backbone)
        self.labels = tuple(labels)
        if len(self.labels) < 2 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels: expected at least 2 different names, got {list(labels)}")
        self.pooling = pooling
        self.base_model = base_model
        self.backbone = backbone.requires_grad_(False).eval()
        self._accepted = frozenset(inspect.signature(backbone.forward).parameters)
        self._first_position = _first_position(backbone)
        self.text_limit = text_limit(backbone, config.num_virtual_tokens)
        if self.text_limit is not None and self.text_limit < 1:
            raise ValueError(
                f"num_virtual_tokens: expected room for text in the model's "
                f"{self.backbone.config.max_position_embeddings} positions, "
                f"got {config.num_virtual_tokens}"
            )
        self.prompt = FusedEPTPrompt(
            config,
            self.backbone.get_input_embeddings(),
            init=init,
            generator=generator,
            backend=backend,
        )
        self.dropout = nn.Dropout(head_dropout)
        weight = torch.randn(len(self.labels), self._pooled_width, generator=generator) * 0.02
        self.head = nn.Linear(self._pooled_width, len(self.labels))
        self.head.weight = nn.Parameter(weight)
        nn.init.zeros_(self.head.bias)
        self.head.to(next(self.prompt.parameters()).device)

    @staticmethod
    def _check_backbone(backbone: nn.Module) -> None:
        accepted = inspect.signature(backbone.forward).parameters
        missing = [name for name in ("inputs_embeds", "attention_mask") if name not in accepted]
        if missing or not hasattr(backbone, "get_input_embeddings"):
            raise TypeError(
                f"backbone: expected an encoder whose forward takes inputs_embeds and "
                f"attention_mask, got {type(backbone).__name__}({', '.join(accepted)})"
            )

    @property
    def _pooled_width(self) -> int:
        return int(self.backbone.config.hidden_size)

    def train(self, mode: bool = True) -> EPTForSequenceClassification:
        """Set the mode of prompt and head; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits ``[B, C]`` in float32 and, with ``labels`` [B], the mean cross-entropy.

        Args:
            input_ids: ``[B, S]`` integers, padded on either side.
            attention_mask: ``[B, S]`` of 0 and 1.
            token_type_ids: ``[B, S]`` integers, for backbones that have them.
            labels: ``[B]`` integers.

        Raises:
            ValueError: more positions than the backbone has, or than the offset covers.
        """
        length = input_ids.shape[-1]
        if self.text_limit is not None and length > self.text_limit:
            raise ValueError(
                f"input_ids: expected at most {self.text_limit} positions (the model's "
                f"{self.backbone.config.max_position_embeddings} without the prompt's "
                f"{self.prompt.config.num_virtual_tokens}), got {length}"
            )
        spliced = self.prompt(input_ids=input_ids, attention_mask=attention_mask)
        inputs = {
            "inputs_embeds": spliced.inputs_embeds,
            "attention_mask": spliced.attention_mask,
        }
        if "position_ids" in self._accepted:
            inputs["position_ids"] = spliced.position_ids + self._first_position
        if token_type_ids is not None and "token_type_ids" in self._accepted:
            m = self.prompt.config.num_virtual_tokens
            inputs["token_type_ids"] = F.pad(token_type_ids, (m, 0))
        output = self.backbone(**inputs, return_dict=True)
        logits = self.head(self.dropout(self._pool(output, attention_mask)))
        logits = logits.float()
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _pool(self, output: Any, attention_mask: Tensor) -> Tensor:
        if self.pooling == "model":
            pooled: Tensor | None = getattr(output, "pooler_output", None)
            if pooled is None:
                raise ValueError(
                    f'pooling: expected a backbone with a pooler for "model", '
                    f"got {type(self.backbone).__name__}"
                )
            return pooled.to(self.head.weight.dtype)
        hidden: Tensor = output.last_hidden_state[:, self.prompt.config.num_virtual_tokens :]
        text = hidden.to(self.head.weight.dtype)
        weights = attention_mask.to(text.dtype)
        total = weights.sum(-1, keepdim=True).clamp_min(1)  # a row of padding only pools to zero
        return (weights.unsqueeze(1) @ text).squeeze(1) / total

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters: ``prompt`` and ``head`` (trained), ``frozen`` (the backbone)."""
        return {
            "prompt": sum(p.numel() for p in self.prompt.parameters()),
            "head": sum(p.numel() for p in self.head.parameters()),
            "frozen": sum(p.numel() for p in self.backbone.parameters()),
        }

    def parameter_groups(
        self, prompt_lr: float, offset_lr: float, space_lr: float, head_lr: float
    ) -> list[dict[str, Any]]:
        """Optimizer groups: those of the prompt, then the head."""
        head = {"name": "head", "params": list(self.head.parameters()), "lr": head_lr}
        return [*self.prompt.parameter_groups(prompt_lr, offset_lr, space_lr), head]

    def save_pretrained(self, folder: str | Path, *, extra: dict[str, Any] | None = None) -> None:
        """Write prompt, head and description into ``folder``; the backbone is never written.

        Each file is written whole or not at all, the description last: it holds the checksums of
        the others, so that a folder cut off half-way is refused by :meth:`from_pretrained`.

        Args:
            folder: made where it is missing.
            extra: further JSON values to keep in the description.

        Raises:
            ValueError: a tensor holds NaN or infinity; nothing is written then.
        """
        folder = Path(folder)
        for name, parameter in (*self.prompt.named_parameters(), *self.head.named_parameters()):
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(f"{name}: expected finite values to save, got NaN or infinity")
        self.prompt.save_pretrained(folder)
        head = {name: p.detach() for name, p in self.head.named_parameters()}
        write_tensors(folder / HEAD_FILE, head, self.prompt.config.to_json())
        values = {
            **_FORMAT,
            "base_model": self.base_model,
            "base_model_type": self.backbone.config.model_type,
            "labels": list(self.labels),
            "pooling": self.pooling,
            "head_dropout": self.dropout.p,
            "sha256": _checksums(folder),
            "extra": extra or {},
        }
        write_json(folder / ADAPTER_FILE, values)

    def load_pretrained(self, folder: str | Path) -> None:
        """Read an adapter of the same sizes and labels into this model.

        Raises:
            CheckpointError: a missing, damaged or mismatched file; the model is unchanged then.
        """
        folder = Path(folder)
        values = read_adapter(folder)
        if tuple(values["labels"]) != self.labels:
            raise CheckpointError(
                f"{folder / ADAPTER_FILE}: labels: expected {list(self.labels)}, "
                f"got {values['labels']}"
            )
        tensors = self._read_head(folder)
        self.prompt.load_pretrained(folder)
        with torch.no_grad():
            for name, parameter in self.head.named_parameters():
                parameter.copy_(tensors[name])

    def _read_head(self, folder: Path) -> dict[str, Tensor]:
        tensors, _ = read_tensors(folder / HEAD_FILE)
        shapes = {name: tuple(p.shape) for name, p in self.head.named_parameters()}
        check_tensors(folder / HEAD_FILE, tensors, shapes)
        return tensors

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        backbone: nn.Module | None = None,
        *,
        base_model: str | None = None,
        backend: str | None = None,
    ) -> EPTForSequenceClassification:
        """The model that :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            folder: the adapter.
            backbone: the frozen encoder, where it is already loaded.
            base_model: where to load it from, in place of the name saved with the adapter.
            backend: as in :func:`ept_fast.reconstruct_prompt`.

        Raises:
            CheckpointError: a missing, damaged or foreign file, or another backbone than it was
                trained on.
            ValueError: the backbone cannot be found.
        """
        folder = Path(folder)
        values = read_adapter(folder)
        name = base_model or values["base_model"]
        if backbone is None:
            if name is None:
                raise ValueError(f"base_model: expected a folder or hub id, {folder} names none")
            backbone = load_backbone(name)
        found: Any = backbone
        if found.config.model_type != values["base_model_type"]:
            raise CheckpointError(
                f"{folder / ADAPTER_FILE}: base_model_type: expected {values['base_model_type']!r} "
                f"as in training, got {found.config.model_type!r}"
            )
        config = EPTConfig.from_dict(
            {k: v for k, v in read_json(folder / CONFIG_FILE).items() if k != "num_tasks"}
        )
        if config.hidden_size != embedding_width(backbone):
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: hidden_size: expected {embedding_width(backbone)} as in "
                f"the backbone, got {config.hidden_size}"
            )
        model = cls(
            backbone,
            config,
            values["labels"],
            pooling=values["pooling"],
            head_dropout=values["head_dropout"],
            base_model=name,
            init=torch.zeros(config.num_virtual_tokens + config.rank, config.hidden_size),
            backend=backend,
        )
        model.load_pretrained(folder)
        return model.eval()


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """The checked description of a sequence-classification adapter.

    Raises:
        CheckpointError: missing or foreign, or a tensor file is not the one it was written with.
    """
    path = Path(folder) / ADAPTER_FILE
    values = read_json(path)
    fields = {*_FORMAT, "base_model", "base_model_type", "labels", "pooling", "head_dropout"}
    missing = sorted(({*fields, "sha256"}) - set(values))
    if missing or any(values[name] != value for name, value in _FORMAT.items()):
        got = f"no {', '.join(missing)}" if missing else str({n: values[n] for n in _FORMAT})
        raise CheckpointError(f"{path}: expected an adapter with {_FORMAT}, got {got}")
    if _checksums(Path(folder)) != values["sha256"]:
        raise CheckpointError(
            f"{path}: sha256: expected the files it was saved with, got others "
            f"(damaged, or a save that was cut off)"
        )
    return values


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for name in (CONFIG_FILE, TENSOR_FILE, HEAD_FILE):
        try:
            sums[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise CheckpointError(
                f"{folder / name}: expected a readable file, got {error.strerror or error}"
            ) from None
    return sums
