"""The adapters of an engine, by name: what a request is given as its LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from ept_fast.interchange.vllm import read_vllm_adapter
from ept_fast.vllm import SIZES, Sizes, adapter_folders, check_fits

__all__ = ["Adapters", "check_folder"]


def check_folder(folder: str | Path, vllm_config: Any) -> None:
    """Read an adapter whole, before the engine does.

    Raises:
        CheckpointError: a missing, damaged or foreign file, or values that are not finite.
        ValueError: the engine has no room for it, or its model another width.
    """
    adapter, _ = read_vllm_adapter(folder)
    width = vllm_config.model_config.get_hidden_size()
    check_fits(adapter, width, Sizes(**vllm_config.additional_config[SIZES]))


class Adapters:
    """Named adapters of a ``vllm.LLM`` that was made with :func:`engine_arguments`.

    A request keeps the adapter that it began with, whole, also if the name is given to another
    one meanwhile. Until it has finished, the folder of its adapter has to stay.

    Args:
        llm: the engine.
        adapters: as for :func:`ept_fast.vllm.adapter_folders`.

    Raises:
        CheckpointError, ValueError: as for :meth:`add`.

    Example:
        >>> llm = vllm.LLM(**engine_arguments("model", "adapters"))  # doctest: +SKIP
        >>> adapters = Adapters(llm, "adapters")  # doctest: +SKIP
        >>> llm.generate(["a", "b"], lora_request=adapters["mail", None])  # doctest: +SKIP
    """

    def __init__(self, llm: Any, adapters: str | Path | Mapping[str, str | Path]) -> None:
        self._engine = llm.llm_engine
        self._numbers = count(1)
        self._requests: dict[str, LoRARequest] = {}
        for name, folder in adapter_folders(adapters).items():
            self.add(name, folder)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order they came."""
        return tuple(self._requests)

    def __getitem__(self, names: Any) -> Any:
        """``lora_request`` of ``generate``: of one name, or a list for several; None is no adapter.

        Raises:
            KeyError: an unknown name; the message lists the known ones.
        """
        if not isinstance(names, str) and names is not None:
            return [self[name] for name in names]
        if names is not None and names not in self._requests:
            known = ", ".join(self._requests) or "none"
            raise KeyError(f"expected a name among {known}, got {names!r}")
        return None if names is None else self._requests[names]

    def add(self, name: str, folder: str | Path) -> None:
        """Load an adapter under a new name.

        Raises:
            CheckpointError: a missing, damaged or foreign file, or values that are not finite.
            ValueError: a name that is taken; an adapter that does not fit.
        """
        if name in self._requests:
            raise ValueError(f"name: expected a new one, got {name!r} (see replace)")
        self._load(name, folder)

    def replace(self, name: str, folder: str | Path) -> None:
        """Give a name to another adapter, in another folder; errors as for :meth:`add`."""
        if Path(folder).resolve() == Path(self[name].lora_path):
            raise ValueError(f"folder: expected another than that of {name!r} now, got {folder}")
        self._load(name, folder)

    def remove(self, name: str) -> None:
        """Forget a name; KeyError if it is unknown. vLLM drops the tensors when it needs room."""
        self[name]
        del self._requests[name]

    def _load(self, name: str, folder: str | Path) -> None:
        check_folder(folder, self._engine.vllm_config)
        request = LoRARequest(name, next(self._numbers), str(Path(folder).resolve()))
        self._engine.add_lora(request)
        self._requests[name] = request
