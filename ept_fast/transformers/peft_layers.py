"""The adapter that PEFT has put into a backbone's layers, LoRA above all: trained and saved too.

PEFT is imported only to build a saved adapter. A model that has its layers has imported it before.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ept_fast.libraries import MissingLibraryError
from ept_fast.storage.files import CheckpointError, check_shapes
from ept_fast.storage.sharded import fill, gather
from ept_fast.storage.untrusted import shorten
from ept_fast.transformers.adapter import SavedPeft

__all__ = ["PeftAdapter", "base_of", "layers_of", "put_in", "same"]

# Fields of a config that say nothing of what the layers compute.
_ABOUT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_version",
        "revision",
        "task_type",
    }
)
# Initialisations of LoRA that leave the weights of the model as they are.
_PLAIN_INITS = ("gaussian", "orthogonal", "eva")


class PeftAdapter:
    """The one adapter that PEFT has put into a model's layers.

    Attributes:
        name: what PEFT calls it.
        config: PEFT's config of it.
        names: of each of its tensors, the name in PEFT's files and that in the model's state dict.
    """

    def __init__(self, name: str, config: Any, names: dict[str, str], backbone: nn.Module) -> None:
        self.name, self.config, self.names = name, config, names
        self._backbone = backbone
        known = {key for key, _ in backbone.named_parameters(remove_duplicate=False)}
        self._parameter_keys = [key for key in names.values() if key in known]

    @classmethod
    def of(cls, backbone: Any) -> PeftAdapter | None:
        """The adapter in a model, or None.

        Raises:
            TypeError: a method with weights outside of its layers or a forward of its own.
            ValueError: several adapters, a merged or inactive one, or choices that a prompt cannot
                stand above or that could not be saved.
        """
        layers = layers_of(backbone)
        if not layers:
            return None
        configs: Mapping[str, Any] = getattr(backbone, "peft_config", {})
        if len(configs) != 1:
            raise ValueError(
                f"model: expected one PEFT adapter, got {', '.join(configs) or 'none by name'} "
                f"(delete_adapter() removes one, merge_and_unload() puts it into the weights)"
            )
        [(name, config)] = configs.items()
        _check_config(config)
        if any(getattr(layer, "merged", False) for layer in layers):
            raise ValueError(
                "model: expected PEFT layers that are not merged, got merged ones "
                "(unmerge_adapter() separates them, merge_and_unload() gives a plain model)"
            )
        if any(each.disable_adapters or name not in each.active_adapters for each in layers):
            raise ValueError(
                f"model: expected the PEFT adapter {name} active and enabled, got it switched off "
                f"(merge_and_unload() or unload() gives a plain model)"
            )
        return cls(name, config, _names(backbone, name, config), backbone)

    def check_apart(self, head: Mapping[str, nn.Module]) -> None:
        """Raise ValueError if the adapter changes the token embeddings or the trained head."""
        table = _innermost(self._backbone.get_input_embeddings()).weight  # type: ignore[operator]
        for name, module in self._backbone.named_modules():
            if not _is_layer(module):
                continue
            inner = _innermost(module)
            if isinstance(inner, nn.Embedding) and inner.weight is table:
                raise ValueError(
                    f"model: expected a PEFT adapter that leaves the token embeddings alone, got "
                    f"it on {name} (the prompt reads the table itself)"
                )
            if name.partition(".")[0] in head:
                raise ValueError(
                    f"model: expected a PEFT adapter that leaves the head alone, of which a copy "
                    f"is trained with the prompt, got it on {name} (task_type="
                    f'"FEATURE_EXTRACTION" in the config of PEFT leaves heads out)'
                )

    # Use

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, trained or not."""
        return [self._backbone.get_parameter(name) for name in self._parameter_keys]

    def trained(self) -> list[nn.Parameter]:
        """Those that require gradients."""
        return [p for p in self.parameters() if p.requires_grad]

    def set_mode(self, training: bool) -> None:
        """Set the mode of PEFT's layers, for their dropout; not of the layers that they wrap."""
        for layer in layers_of(self._backbone):
            layer.training = training
            for child in layer.children():
                if child is not _inner(layer):
                    child.train(training)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without the adapter, for the length of a ``with`` block."""
        layers = [layer for layer in layers_of(self._backbone) if not layer.disable_adapters]
        flags = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
        _enable(layers, False, flags)
        try:
            yield
        finally:
            _enable(layers, True, flags)

    # Files

    def state(self) -> dict[str, Tensor]:
        """The adapter's tensors by their names in PEFT's files."""
        own = self._backbone.state_dict()
        return {name: own[key] for name, key in self.names.items()}

    def description(self) -> dict[str, Any]:
        """What a state dict says of the adapter besides its tensors."""
        return {"adapter_name": self.name, "config": self._values(), "names": self.names}

    def to_save(self, path: Path) -> SavedPeft:
        """What is to be saved; if tensors are sharded, every process has to call this."""
        return SavedPeft(path, self.name, self._values(), gather(self.state()))

    def _values(self) -> dict[str, Any]:
        return _plain({**self.config.to_dict(), "inference_mode": not self.trained()})

    def check_fits(self, saved: SavedPeft) -> None:
        """Raise CheckpointError unless a saved adapter is of this method and these sizes."""
        for field, expected in self._values().items():
            got = saved.config.get(field, expected)
            if field not in _ABOUT and got != expected:
                raise CheckpointError(
                    f"{saved.path}: peft: {field}: expected {shorten(expected)} as in this model, "
                    f"got {shorten(got)}"
                )
        shapes = {name: tuple(tensor.shape) for name, tensor in saved.tensors.items()}
        check_shapes(
            saved.path, shapes, {name: tuple(tensor.shape) for name, tensor in self.state().items()}
        )

    def check_same(self, saved: SavedPeft) -> None:
        """Raise CheckpointError unless a saved adapter is this very one."""
        self.check_fits(saved)
        for name, own in gather(self.state()).items():
            if not saved.tensors[name].to(own.device, own.dtype).equal(own):
                raise CheckpointError(
                    f"{saved.path}: peft: {name}: expected the values of this model, got others "
                    f"(from_pretrained with a model without the adapter puts the saved one in)"
                )

    def load(self, saved: SavedPeft) -> None:
        """Copy a saved adapter that fits into this one."""
        fill(self.state(), saved.tensors)


def same(first: PeftAdapter | None, second: PeftAdapter | None) -> bool:
    """Whether two models have the same adapter of PEFT, or both none."""
    if first is None or second is None:
        return first is second
    try:
        first.check_same(second.to_save(Path()))
    except CheckpointError:
        return False
    return True


def base_of(model: Any) -> Any:
    """The model itself, or of a PeftModel the one inside, with PEFT's layers in it.

    Raises:
        TypeError: a method that has no layers there, as prompt tuning.
    """
    library = sys.modules.get("peft.peft_model")
    if library is None or not isinstance(model, library.PeftModel):
        return model
    for config in model.peft_config.values():
        _check_method(config)
    base = model.get_base_model()
    if not layers_of(base):
        kinds = ", ".join(str(_kind(config)) for config in model.peft_config.values())
        raise TypeError(f"model: expected PEFT layers in the PeftModel, got none ({kinds})")
    beside = [key for key in model.base_model.state_dict() if not key.startswith("model.")]
    if beside:
        raise TypeError(_other_weights(next(iter(model.peft_config.values()))))
    return base


@contextlib.contextmanager
def put_in(model: nn.Module, saved: SavedPeft | None) -> Iterator[Any]:
    """A PeftModel of a model and a saved adapter; for a ``with`` block, in which more can fail.

    The sizes are compared before anything of them is allocated. If there is no saved adapter, or
    one in the model already, it is the model itself.

    Raises:
        CheckpointError: a config that PEFT does not take or that is not the tensors'.
        MissingLibraryError: PEFT is not installed.
        BaseException: what the block raises; the model is as before it then.
    """
    if saved is None or layers_of(base_of(model)):
        yield model
        return
    if importlib.util.find_spec("peft") is None:
        raise MissingLibraryError(f"peft not installed: pip install peft ({saved.path} needs it)")
    peft: Any = importlib.import_module("peft")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        wrapped = _built(peft, model, saved)
        yield wrapped
    except BaseException:
        _take_out(model)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        raise


def _built(peft: Any, model: nn.Module, saved: SavedPeft) -> Any:
    try:
        _build(peft, model, saved, low_cpu_mem_usage=True)  # shapes alone
        _found(model).check_fits(saved)
        _take_out(model)
        wrapped = _build(peft, model, saved)
        adapter = _found(model)
        adapter.check_fits(saved)
        _assign(model, {adapter.names[name]: value for name, value in saved.tensors.items()})
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{saved.path}: peft: expected an adapter that PEFT {peft.__version__} puts into "
            f"{type(model).__name__}, got {type(error).__name__}: {str(error)[:1000]}"
        ) from None
    return wrapped


def _found(model: nn.Module) -> PeftAdapter:
    adapter = PeftAdapter.of(model)
    if adapter is None:
        raise ValueError("no layers")
    return adapter


def _build(peft: Any, model: nn.Module, saved: SavedPeft, **choices: Any) -> Any:
    config = peft.PeftConfig.from_peft_type(**saved.config)
    _check_config(config)
    config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
    return peft.get_peft_model(
        model, config, saved.adapter_name, autocast_adapter_dtype=False, **choices
    )


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into a model as they are, each on the device of the weight beside it."""
    placed: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if _is_layer(module):
            beside = next(_inner(module).parameters(), None)
            device = torch.device("cpu") if beside is None else beside.device
            below = {k: v for k, v in tensors.items() if k.startswith(f"{name}.")}
            placed |= {key: value.to(device, copy=True) for key, value in below.items()}
    model.load_state_dict(placed, strict=False, assign=True)


def _take_out(model: nn.Module) -> None:
    """Put what PEFT's layers wrap in their places."""
    found = True
    while found:
        found = False
        for name, module in model.named_modules():
            if _is_layer(module):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, _inner(module))
                found = True
                break
    vars(model).pop("peft_config", None)


# PEFT's layers


def _kinds() -> tuple[type, ...]:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    wrappers = sys.modules.get("peft.utils.other")
    if tuners is None or wrappers is None:
        return ()
    return (tuners.BaseTunerLayer, wrappers.AuxiliaryTrainingWrapper)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, _kinds())


def layers_of(model: nn.Module) -> list[Any]:
    """The layers that PEFT has put into a model, and the modules that it trains whole."""
    kinds = _kinds()
    return [module for module in model.modules() if isinstance(module, kinds)] if kinds else []


def _inner(layer: Any) -> Any:
    """The module in whose place a layer of PEFT stands."""
    inner = getattr(layer, "original_module", None)
    return layer.base_layer if inner is None else inner


def _innermost(module: Any) -> Any:
    """The module below all layers of PEFT that stand in its place."""
    while _is_layer(module):
        module = _inner(module)
    return module


def _enable(
    layers: Iterable[Any], enabled: bool, flags: Iterable[tuple[nn.Parameter, bool]]
) -> None:
    """Switch layers on or off. PEFT then changes what requires gradients, which is put back."""
    for layer in layers:
        layer.enable_adapters(enabled)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _check_method(config: Any) -> None:
    """Raise TypeError unless all that a method does is done by its layers."""
    mapping: Mapping[Any, Any] = sys.modules["peft.mapping"].PEFT_TYPE_TO_TUNER_MAPPING
    tuner, base = mapping.get(config.peft_type), sys.modules["peft.tuners.tuners_utils"].BaseTuner
    by_layers = isinstance(tuner, type) and issubclass(tuner, base)
    if by_layers and not config.is_prompt_learning and tuner.forward is base.forward:  # type: ignore[union-attr]
        return
    raise TypeError(
        f"model: expected a PEFT method that works by its layers alone, such as LORA or IA3, got "
        f"{_kind(config)}, which has a forward of its own"
    )


def _check_config(config: Any) -> None:
    """Raise an error for a method or a choice that cannot be used or saved under a prompt."""
    _check_method(config)
    # Read by PEFT's own forward; copies layers; names a module that PEFT would import.
    for field in ("alora_invocation_tokens", "layer_replication", "megatron_config"):
        if getattr(config, field, None):
            raise ValueError(
                f"{field}: expected None under a prompt, got {shorten(getattr(config, field))}"
            )
    bias = getattr(config, "bias", "none")
    if bias not in ("none", None, False, True):
        raise ValueError(
            f'bias: expected "none" under a prompt, as others are weights of the frozen model, '
            f"got {bias!r}"
        )
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init not in _PLAIN_INITS:
        raise ValueError(
            f"init_lora_weights: expected one that leaves the model's own weights as they are "
            f"(True, False, {', '.join(_PLAIN_INITS)}), got {init!r}"
        )


def _names(backbone: nn.Module, adapter_name: str, config: Any) -> dict[str, str]:
    """Of each tensor of the adapter, the name in PEFT's files and that in the state dict."""
    state = backbone.state_dict()
    keys = {id(tensor): key for key, tensor in state.items()}
    try:
        found = sys.modules["peft"].get_peft_model_state_dict(
            backbone, state_dict=state, adapter_name=adapter_name, save_embedding_layers=False
        )
    except (KeyError, ValueError):  # what is not in the layers is not in this state dict
        found = {}
    names = {name: keys.get(id(tensor), "") for name, tensor in found.items()}
    trained = {k for k, p in backbone.named_parameters(remove_duplicate=False) if p.requires_grad}
    within = tuple(f"{n}." for n, module in backbone.named_modules() if _is_layer(module))
    own = {key for key in trained if key.startswith(within)}
    whole = all(names.values()) and all(t.is_floating_point() for t in found.values())
    mapping: Mapping[Any, Any] = sys.modules["peft.mapping"].PEFT_TYPE_TO_TUNER_MAPPING
    shared = getattr(mapping[config.peft_type], "uses_shared_state", False)
    if not names or not whole or own - set(names.values()) or shared:
        raise TypeError(_other_weights(config))
    return names


def _other_weights(config: Any) -> str:
    return (
        f"model: expected a PEFT method whose weights are all floats in its layers, got "
        f"{_kind(config)}, which has others"
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=_as_json))
    return plain


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else asdict(value)
