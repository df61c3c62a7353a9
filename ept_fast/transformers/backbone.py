"""What the wrapper has to know of a frozen ``transformers`` model, and how one is loaded."""

from __future__ import annotations

import inspect
import math
import os
import pickle
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn

from ept_fast.config import check_choice
from ept_fast.transformers import TASKS

__all__ = [
    "Profile",
    "cache_argument",
    "cache_of",
    "check_backbone",
    "embedding_width",
    "load_backbone",
    "load_tokenizer",
    "names_it",
    "output_width",
    "own_head",
    "reads_last_column",
    "take_cache",
    "text_config",
]

# Kinds of layers that keep keys and values of each position and nothing else.
_ATTENTION = frozenset({"attention", "full_attention", "sliding_attention", "chunked_attention"})

# What transformers calls keys and values in arguments and outputs: since 5.24, and before.
_CACHES = ("cache", "past_key_values")

# Fields of a config: what the layers are, and how far they see.
_LAYERS = ("layer_types", "layers_block_type", "block_types")
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
_AUTO = {
    "SEQ_CLS": transformers.AutoModel,
    "TOKEN_CLS": transformers.AutoModel,
    "FEATURE_EXTRACTION": transformers.AutoModel,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
}
_AUTO_WITH_HEAD = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
}
# Names of the classes that have a head for the task themselves.
_HEADED = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}


@dataclass(frozen=True)
class Profile:
    """What the wrapper has to know of a frozen model, found out once when it is wrapped.

    Attributes:
        name: of the model's class, for messages.
        arguments: the names that its forward takes.
        cache_argument: which of them takes keys and values; None if none does.
        other_layers: kinds of its layers that keep something else than keys and values of each
            position; sorted.
        position_table: name of the table of learned absolute positions, or None.
        max_position_embeddings: how many positions the config says there are; None without a limit.
        first_position: where position ids start: RoBERTa and its kin count from padding_idx + 1.
        column_free_length: the longest row whose outputs do not depend on the columns that its
            tokens stand in. A causal model whose attention sees every earlier position goes by its
            position ids alone: no limit. Windows count columns, so a row longer than the shortest
            one depends on them. Without position ids, or if states or convolutions run over the
            columns, every row does: 0.
    """

    name: str
    arguments: frozenset[str]
    cache_argument: str | None
    other_layers: tuple[str, ...]
    position_table: str | None
    max_position_embeddings: int | None
    first_position: int
    column_free_length: float

    @classmethod
    def of(cls, backbone: nn.Module) -> Profile:
        """Find all of it out."""
        config = text_config(backbone)
        arguments = _arguments(backbone)
        values = (getattr(config, name, None) or () for name in _LAYERS)
        others = {kind for kinds in values for kind in kinds} - _ATTENTION
        name, table = _position_table(backbone)
        padding = None if table is None else table.padding_idx
        positions = getattr(config, "max_position_embeddings", None)
        windows = [getattr(config, field, None) for field in _WINDOWS]
        free = min((w for w in windows if isinstance(w, int)), default=math.inf)
        return cls(
            name=type(backbone).__name__,
            arguments=arguments,
            cache_argument=cache_argument(arguments),
            other_layers=tuple(sorted(others)),
            position_table=name,
            # None or a number below 1 stands for relative positions.
            max_position_embeddings=positions if positions and positions > 0 else None,
            first_position=0 if padding is None else padding + 1,
            column_free_length=0 if others or "position_ids" not in arguments else free,
        )

    def text_limit(self, num_virtual_tokens: int) -> int | None:
        """The longest text, in tokens, that fits behind the prompt; None without a limit."""
        positions = self.max_position_embeddings
        return None if positions is None else positions - self.first_position - num_virtual_tokens

    def table_limit(self, num_virtual_tokens: int) -> int | None:
        """As :meth:`text_limit` if positions have a table, which ends; None if they have none."""
        return None if self.position_table is None else self.text_limit(num_virtual_tokens)

    def inputs(
        self, embeds: Tensor, mask: Tensor, ranks: Tensor, **optional: Any
    ) -> dict[str, Any]:
        """The keyword arguments of a call: of the optional ones those that the forward takes.

        Args:
            embeds: ``[B, S, d]``.
            mask: of any form that the backbone takes.
            ranks: ``[B, S]``, from 0 on.
            **optional: left out if None.
        """
        optional["position_ids"] = ranks + self.first_position
        taken = {k: v for k, v in optional.items() if v is not None and k in self.arguments}
        return {"inputs_embeds": embeds, "attention_mask": mask, "return_dict": True, **taken}


def _arguments(backbone: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(backbone.forward).parameters)


def _position_table(backbone: nn.Module) -> tuple[str | None, nn.Embedding | None]:
    """Name and layer of the table of learned absolute positions, or two times None."""
    for name, layer in backbone.named_modules():
        own = name.removesuffix(".base_layer").removesuffix(".original_module")  # inside PEFT's
        last = own.rpartition(".")[2]
        if isinstance(layer, nn.Embedding) and (last == "wpe" or "position" in last):
            return str(name), layer
    return None, None


def cache_argument(accepted: Container[str]) -> str | None:
    """Which of a function's arguments takes keys and values; None if none does."""
    return next((name for name in _CACHES if name in accepted), None)


def load_backbone(
    name: str,
    task: str = "SEQ_CLS",
    *,
    labels: tuple[str, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
) -> nn.Module:
    """A pretrained model by folder or hub id, of the kind that the task needs.

    Args:
        name: folder or hub id.
        task: as in :func:`ept_fast.get_ept_model`. ``"SEQ_CLS"``, ``"TOKEN_CLS"`` and
            ``"FEATURE_EXTRACTION"`` load the model without a head, and of an encoder-decoder the
            encoder.
        labels: names of the classes; then the model is loaded with a head for them.
        dtype: type of the weights.
        trust_remote_code: whether to run the code that a model of an architecture of its own
            brings.
        local_files_only: whether to ask no hub: only for a folder or what the hub's cache has.

    Raises:
        ValueError: nothing loadable under that name, or a model with code that is not trusted.
    """
    check_choice("task", task, TASKS)
    place = _cached(name) if local_files_only and not os.path.isdir(name) else name
    logging: Any = transformers.utils.logging
    bars = logging.is_progress_bar_enabled()
    if os.path.isdir(place) or not sys.stderr.isatty():
        logging.disable_progress_bar()  # reading a local file needs none, and no log does
    try:
        if labels is None:
            backbone: Any = _AUTO[task].from_pretrained(
                place, dtype=dtype, trust_remote_code=trust_remote_code
            )
        else:
            ids = dict(enumerate(labels))
            backbone = _AUTO_WITH_HEAD[task].from_pretrained(
                place, dtype=dtype, id2label=ids, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(_not_found(name, _reason(name, error))) from None
    finally:
        if bars:
            logging.enable_progress_bar()
    whole = task == "SEQ_2_SEQ_LM" or not backbone.config.is_encoder_decoder
    return backbone if whole else backbone.get_encoder()  # type: ignore[no-any-return]


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, local_files_only: bool = False
) -> Any:
    """The tokenizer of a pretrained model; arguments and errors as :func:`load_backbone`."""
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=local_files_only
        )
    except (OSError, ValueError) as error:
        raise ValueError(_not_found(name, _reason(name, error))) from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of no files
        raise ValueError(_not_found(name, "it has no tokenizer"))
    return tokenizer


def _cached(name: str) -> str:
    """The folder of a hub's model in the cache.

    Given its name and ``local_files_only``, transformers still asks the hub, for an adapter of PEFT
    and to have a pickle converted; for a folder it does not.
    """
    try:
        config = try_to_load_from_cache(name, transformers.utils.CONFIG_NAME)
    except ValueError:  # not even a hub id
        config = None
    if isinstance(config, str):
        return str(Path(config).parent)
    gone = "no such folder"
    if not Path(name).is_absolute():
        gone += ", and not in the cache of the Hugging Face hub"
    raise ValueError(_not_found(name, gone))


def names_it(folder: str | Path, name: str, allow_download: bool) -> str:
    """What to add to an error about the model that an adapter names."""
    ways = "base_model (on the command line --model) names another place"
    if not (allow_download or Path(name).is_absolute() or os.path.isdir(name)):
        ways += ", allow_download (--allow-download) loads it from the hub"
    return f"; {folder} names it; {ways}"


def _not_found(name: str, reason: str) -> str:
    return f"model: expected a folder or hub id of a pretrained model, got {name!r} ({reason})"


def _reason(name: str, error: Exception) -> str:
    if Path(name).is_absolute() and not Path(name).exists():
        return "no such folder"
    if "trust_remote_code" in str(error):
        return (
            "it brings code of its own, which is run with trust_remote_code only, on the command "
            "line --trust-remote-code"
        )
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle of more than tensors"
    return str(error).strip().partition("\n")[0]


def cache_of(output: Mapping[str, Any]) -> Any:
    """The keys and values in a model's output, or None."""
    fields = dict(output)  # asked by its old name, the output itself would warn
    return next((fields[name] for name in _CACHES if fields.get(name) is not None), None)


def take_cache(kwargs: dict[str, Any]) -> tuple[str, Any]:
    """Remove the keys and values from a call's arguments, by whichever name a version has.

    Returns:
        The name that the call gives them, for messages, and the keys and values, or None.

    Raises:
        ValueError: two of them, or a cache under another name, in which it would not be seen.
    """
    taken = {name: kwargs.pop(name) for name in _CACHES if name in kwargs}
    given = {name: value for name, value in taken.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)}: expected one cache, got two")
    for name, value in kwargs.items():
        if isinstance(value, transformers.Cache):
            raise ValueError(
                f"{name}: expected keys and values as {' or '.join(_CACHES)}, "
                f"got {type(value).__name__} under another name"
            )
    return next(iter(given.items()), (_CACHES[0], None))


def check_backbone(backbone: Any, task: str) -> None:
    """Raise TypeError unless the model can be called with embeddings and has what the task needs.

    Models that are not of ``transformers`` are asked for their signature only.
    """
    accepted = _arguments(backbone) if isinstance(backbone, nn.Module) else frozenset()
    missing = [name for name in ("inputs_embeds", "attention_mask") if name not in accepted]
    if missing or not _has_embeddings(backbone) or not hasattr(backbone, "config"):
        raise TypeError(
            f"model: expected a model with a config, get_input_embeddings() and a forward that "
            f"takes inputs_embeds and attention_mask, got {type(backbone).__name__}"
            f"({', '.join(sorted(accepted))})"
        )
    name = type(backbone).__name__
    if ("decoder_input_ids" in accepted) != (task == "SEQ_2_SEQ_LM"):
        expected = (
            "an encoder-decoder"
            if task == "SEQ_2_SEQ_LM"
            else "a model without a decoder_input_ids (of an encoder-decoder, its get_encoder())"
        )
        raise TypeError(f"model: expected {expected} for task {task}, got {name}")
    if not isinstance(backbone, transformers.PreTrainedModel):
        return
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        if backbone.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
            raise TypeError(
                f"model: expected a model with a language-model head for task {task}, got {name}"
            )
    elif backbone.base_model is not backbone and not own_head(backbone, task):
        suffix = f" or a model {_HEADED[task]}" if task in _HEADED else ""
        raise TypeError(
            f"model: expected a model without a head{suffix} for task {task}, got {name}"
        )


def _has_embeddings(backbone: Any) -> bool:
    """Whether there is a layer that token ids become embeddings in."""
    try:
        return backbone.get_input_embeddings() is not None
    except (AttributeError, NotImplementedError):  # as of a model of characters
        return False


def reads_last_column(backbone: Any) -> bool:
    """Whether a classifier's own head takes the last column of its rows, as XLNet's does."""
    summary = getattr(backbone.config, "summary_type", None)
    return hasattr(backbone, "sequence_summary") and summary == "last"


def own_head(backbone: nn.Module, task: str) -> dict[str, nn.Module]:
    """The modules of a classifier model that are not in its encoder; none of a bare encoder."""
    if task not in _HEADED or _HEADED[task] not in type(backbone).__name__:
        return {}
    prefix = getattr(backbone, "base_model_prefix", "")
    return {
        name: child
        for name, child in backbone.named_children()
        if name != prefix and any(True for _ in child.parameters())
    }


def embedding_width(backbone: Any) -> int:
    """d, the width of the backbone's token embeddings (not always its hidden size)."""
    layer = backbone.get_input_embeddings()
    return int(getattr(layer, "embedding_dim", layer.weight.shape[-1]))


def text_config(backbone: Any) -> Any:
    """The config of what reads the text: a part of the whole one in models that also see."""
    config = backbone.config
    if not hasattr(config, "get_text_config") or config.is_encoder_decoder:
        return config
    return config.get_text_config(decoder=True)


def output_width(backbone: Any) -> int:
    """Width of the last hidden states; OPT may project them back to its embeddings' width."""
    config = text_config(backbone)
    return int(getattr(config, "word_embed_proj_dim", None) or config.hidden_size)
