"""The prompt methods of this package as a method of PEFT.

After ``import ept_fast.peft``, PEFT knows the type ``EPT``: ``get_peft_model`` with an
:class:`EPTPeftConfig`, ``PeftModel.from_pretrained`` and the ``AutoPeftModelFor...`` classes work
as with PEFT's own methods. It is a tuner, as LoRA is, and not one of PEFT's prompt-learning
methods, which do not see the padding. Logits, losses and tokens are those of
:class:`ept_fast.EPTModel` (docs/peft.md).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import peft
import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, set_additional_trainable_modules
from torch import Tensor, nn

from ept_fast.config import EPT, EPTConfig, PromptConfig, check_choice
from ept_fast.prompts.base import config_class, expected_shapes, read_config
from ept_fast.prompts.embedding import embedding_device
from ept_fast.storage.files import CheckpointError
from ept_fast.storage.untrusted import shorten
from ept_fast.transformers import TASKS
from ept_fast.transformers.backbone import embedding_width, load_tokenizer
from ept_fast.transformers.peft_layers import layers_of
from ept_fast.transformers.tasks import EPTModel  # with the classes of all tasks

__all__ = ["EPTPeftConfig", "EPTTuner"]

if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
    raise ImportError(f"peft: expected version 0.21.2 or newer, got {peft.__version__}")

_LAYER = "soft_prompt"  # where the prompts stand in the model
# How a prompt starts if nothing is said.
_START: dict[str, Any] = {
    "init": "vocab",
    "init_text": None,
    "tokenizer_name_or_path": None,
    "prototypes": "kmeans",
    "prototype_layer": None,
}


class _PeftType(str):
    """A member that PEFT's closed enum of methods does not have, with what is asked of members."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    name = value

    def __str__(self) -> str:
        return f"PeftType.{self.value}"


PEFT_TYPE = _PeftType("EPT")


@dataclass
class EPTPeftConfig(peft.PeftConfig):
    """An EPT prompt, or that of another registered method, as a config of PEFT.

    Attributes:
        task_type: ``"SEQ_CLS"``, ``"TOKEN_CLS"``, ``"CAUSAL_LM"``, ``"SEQ_2_SEQ_LM"`` or
            ``"FEATURE_EXTRACTION"``; required.
        num_virtual_tokens, max_length, rank, num_spaces, space_dim, alpha, activation, gate,
            temperature, fusion, offset_tokens: as in :class:`ept_fast.EPTConfig`. The width is the
            model's.
        prompt_type: name of the prompt method.
        settings: fields of the config of another method than EPT.
        init: where the prompt starts, as in :class:`ept_fast.FusedEPTPrompt`: ``"vocab"``,
            ``"text"``, ``"data"``, ``"random"`` or a tensor ``[L, d]``.
        init_text: the text, or for ``"data"`` the texts.
        tokenizer_name_or_path: of the tokenizer for ``init_text``, or the tokenizer itself.
            Where a prompt started is not saved with it.
        prototypes, prototype_layer: for ``"data"``, as in :func:`ept_fast.get_ept_model`.
        labels: names of the classes, in the order of the logits; by default those in the model's
            config. A loaded adapter gives its labels to the model's config.
        modules_to_save: names of further modules to train and to save, as in PEFT. A classifier's
            head is among them without being named.

    Raises:
        TypeError, ValueError: by :func:`peft.get_peft_model`, if the model's width is known: values
            out of their range, or fields that the prompt method does not have.

    Example:
        >>> import transformers
        >>> sizes = dict(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=2)
        >>> gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
        >>> config = EPTPeftConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, rank=2)
        >>> model = peft.get_peft_model(gpt2, config)
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> model(input_ids=ids, labels=ids).logits.shape
        torch.Size([1, 3, 99])
    """

    num_virtual_tokens: int = EPTConfig.num_virtual_tokens
    max_length: int = EPTConfig.max_length
    rank: int = EPTConfig.rank
    num_spaces: int = EPTConfig.num_spaces
    space_dim: int = EPTConfig.space_dim
    alpha: float = EPTConfig.alpha
    activation: str = EPTConfig.activation
    gate: str = EPTConfig.gate
    temperature: float = EPTConfig.temperature
    fusion: bool = EPTConfig.fusion
    offset_tokens: str = EPTConfig.offset_tokens
    prompt_type: str = EPT
    settings: dict[str, Any] = field(default_factory=dict)
    init: Any = "vocab"
    init_text: Any = None
    tokenizer_name_or_path: Any = None
    prototypes: str = "kmeans"
    prototype_layer: int | None = None
    labels: list[str] | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PEFT_TYPE

    @classmethod
    def of(cls, config: PromptConfig, **fields: Any) -> Self:
        """For the config of any prompt method.

        Args:
            config: such as ``EPTConfig.from_budget(...)``. Its width has to be the model's.
            **fields: all others, such as ``task_type``.
        """
        values = config.to_dict()
        values.pop("hidden_size")
        flat = {"prompt_type", "num_virtual_tokens"}
        if config.prompt_type == EPT:
            flat |= {each.name for each in dataclasses.fields(EPTConfig)}
        settings = {name: values.pop(name) for name in list(values) if name not in flat}
        return cls(**values, settings=settings, **fields)

    def prompt_config(self, hidden_size: int) -> PromptConfig:
        """The prompt's config, for embeddings of this width."""
        known = {f.name for f in dataclasses.fields(config_class(self.prompt_type))}
        values = {"prompt_type": self.prompt_type, "hidden_size": hidden_size, **self.settings}
        for each in dataclasses.fields(EPTConfig):
            if each.name == "hidden_size":
                continue
            value = getattr(self, each.name)
            if value == each.default and self.prompt_type != EPT:
                continue  # the method may have another default
            if each.name in known:
                values.setdefault(each.name, value)
            else:
                raise ValueError(
                    f"{each.name}: expected {each.default!r}, as the method {self.prompt_type} has "
                    f"no such field, got {shorten(value)}"
                )
        return read_config(values)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Of a file's fields those that count: the prompt's values are beside it, not its start."""
        return {name: value for name, value in kwargs.items() if name not in _START}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; without what the prompt started from."""
        saved = dataclasses.replace(self, **_START)
        peft.PeftConfig.save_pretrained(saved, save_directory, **kwargs)


class _PromptLayer(nn.Module, BaseTunerLayer):
    """The prompts, by adapter. It stands in the model, where PEFT looks for what it manages."""

    adapter_layer_names = ("ept_prompts",)

    def __init__(self, prompts: nn.ModuleDict) -> None:
        super().__init__()
        self.ept_prompts = prompts
        self.merged_adapters = []

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("soft_prompt: expected calls of the model, got one of this layer")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Called after values were assigned to a prompt that was made without any."""
        prompt: Any = self.ept_prompts[adapter_name]
        prompt.to(embedding_device(prompt.embedding) if device is None else device)


class _ManagedByPeft:
    """What PEFT does in place of an EPTModel: it trains heads and says what requires gradients."""

    active_adapter: str

    def new_head(self, description: Any, generator: Any) -> None:
        return None

    def place_head(self, own: bool) -> None:
        pass

    def set_adapter(self, adapter_name: str) -> None:
        self.active_adapter = adapter_name


@functools.cache
def _model_class(task: str) -> Any:
    kind = EPTModel.of_task(task)
    return type(kind.__name__, (_ManagedByPeft, kind), {"__module__": __name__})


class EPTTuner(BaseTuner):
    """PEFT's tuner of the type ``EPT``: the model's forward and ``generate`` behind the prompt.

    Made by PEFT. Besides PEFT's methods, a ``PeftModel`` of it has ``fold``, ``unfold``,
    ``prefix_cache``, ``parameter_groups`` and the switches of gradient checkpointing of
    :class:`ept_fast.EPTModel`; ``ept_model`` is such a model of the same backbone and prompts.
    """

    prefix = "ept_"
    tuner_layer_cls = _PromptLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (so it is in PEFT)
    uses_shared_state = True  # a model without this tuner around it would not use the prompts

    # What a PeftModel has from an EPTModel.
    _FORWARDED = frozenset(
        {
            "activation_checkpointing_disable",
            "activation_checkpointing_enable",
            "add_loss",
            "disable_input_require_grads",
            "enable_input_require_grads",
            "gradient_checkpointing_disable",
            "gradient_checkpointing_enable",
            "is_gradient_checkpointing",
            "parameter_groups",
            "prefix_cache",
            "resize_token_embeddings",
            "set_input_embeddings",
            "set_loss_progress",
            "text_limit",
            "unfold",
        }
    )

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if layers_of(model):
            raise ValueError(
                "model: expected one without layers of PEFT, got some (get_ept_model puts a prompt "
                "before such a model)"
            )
        try:
            super().__init__(model, *args, **kwargs)
        except BaseException:
            if self._ept_model:
                self._take_out()
            raise

    def __getattr__(self, name: str) -> Any:
        if name == "_ept_model":  # before the model was wrapped
            return ()
        if name in self._FORWARDED:
            return getattr(self.ept_model, name)
        return super().__getattr__(name)

    @property
    def ept_model(self) -> EPTModel:
        """An EPTModel of the backbone and its prompts, which PEFT does not register."""
        model: EPTModel = self._ept_model[0]
        return model

    # Adapters

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        check_choice("task_type", config.task_type, TASKS)
        wrapped = _model_class(str(getattr(config.task_type, "value", config.task_type)))(model)
        self._ept_model = (wrapped,)
        setattr(model, _LAYER, _PromptLayer(wrapped.prompts))

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Any = None,
    ) -> None:
        """Add a prompt. It is in use, and requires gradients, if its name is active."""
        config: Any = self.peft_config[adapter_name]
        wrapped = self.ept_model
        if config.task_type != wrapped.task:
            raise ValueError(
                f"task_type: expected {wrapped.task} as of the model's first adapter, "
                f"got {config.task_type}"
            )
        self._check_modules_to_save(model, config)
        named = config.labels is None or isinstance(config.labels, (list, tuple))
        if not named or not all(isinstance(label, str) for label in config.labels or ()):
            raise TypeError(f"labels: expected strings in a list, got {shorten(config.labels)}")
        tokenizer = config.tokenizer_name_or_path
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        wrapped.add_adapter(
            adapter_name,
            config.prompt_config(embedding_width(model)),
            labels=config.labels,
            init=config.init,
            text=config.init_text,
            tokenizer=tokenizer,
            prototypes=config.prototypes,
            prototype_layer=config.prototype_layer,
        )
        labels = wrapped.descriptions[adapter_name].labels
        config.labels = None if labels is None else list(labels)
        active = adapter_name in self.active_adapters
        if active:
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        else:
            wrapped.prompts[adapter_name].requires_grad_(False)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=self.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=active,
        )

    @staticmethod
    def _check_modules_to_save(model: Any, config: Any) -> None:
        table = model.get_input_embeddings()
        names = [name for name, module in model.named_modules() if module is table]
        for wanted in config.modules_to_save or ():
            if any(name.endswith(wanted) for name in names):
                raise ValueError(
                    f"modules_to_save: expected no token embeddings, which a prompt reads as they "
                    f"are, got {wanted!r}"
                )

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        """Make one adapter the active one."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if len(names) > 1:
            raise ValueError(f"adapter_name: expected one adapter, got {names}")
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._follow()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; another one becomes active if it was."""
        super().delete_adapter(adapter_name)
        wrapped = self.ept_model
        del wrapped.descriptions[adapter_name]
        if adapter_name in wrapped.folded:
            del wrapped.folded[adapter_name]
        self._follow()

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._follow()

    def _follow(self) -> None:
        """Have the EPTModel use the adapter that is active in PEFT, and show its labels."""
        wrapped, layer = self.ept_model, getattr(self.model, _LAYER)
        wrapped.active_adapter = next(iter(layer.active_adapters), "")
        wrapped.disabled = layer.disable_adapters or not wrapped.active_adapter
        wrapped.place_active()

    # Calls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`ept_fast.EPTModel.forward`."""
        return self.ept_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As ``generate`` of an EPTModel of the task."""
        wrapped: Any = self.ept_model
        return wrapped.generate(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of prompts and of what PEFT trains; the rest stays in evaluation mode."""
        self.training = mode
        self.ept_model.train(mode)
        for module in self.model.modules():
            if isinstance(module, (_PromptLayer, AuxiliaryTrainingWrapper)):
                module.train(mode)
        return self

    def fold(self, dtype: torch.dtype | None = None, offset: str = "low_rank") -> None:
        """As :meth:`ept_fast.EPTModel.fold`."""
        self.eval()
        self.ept_model.fold(dtype, offset)

    # The end

    def _check_merge_allowed(self) -> None:
        raise ValueError(
            "merge: expected a method that changes weights, got EPT, a prompt before the text; "
            "fold() makes it as fast as it gets"
        )

    def unload(self) -> Any:
        """The model that was given, without prompts; trained heads stay in it, as in PEFT."""
        model: Any = super().unload()
        self._take_out()
        return model

    def _take_out(self) -> None:
        wrapped: Any = self.ept_model
        model = wrapped.backbone
        delattr(model, _LAYER)
        wrapped.unload()

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("EPT replaces no module of the model")

    # Files

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """As PEFT's, after the prompt's tensors have been checked: all are there, and finite."""
        loaded: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=dict(state_dict)
        )
        prefix = f".{_LAYER}.ept_prompts."
        values = {k.partition(prefix)[2]: v for k, v in loaded.items() if prefix in k}
        values = {k.removeprefix(f"{adapter_name}."): v for k, v in values.items()}
        prompt = getattr(model.get_base_model(), _LAYER).ept_prompts[adapter_name]
        expected = expected_shapes(prompt.config, None)
        shapes = {name: tuple(value.shape) for name, value in values.items()}
        if shapes != expected:
            raise CheckpointError(
                f"{adapter_name}: expected the tensors {shorten(expected)}, got {shorten(shapes)}"
            )
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise CheckpointError(f"{adapter_name}: {name}: expected finite values, got others")
        return loaded


def _register() -> None:
    """As ``peft.utils.register_peft_method``, which takes members of PEFT's closed enum only."""
    methods: Any = peft.mapping
    methods.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = EPTTuner.prefix
    methods.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = EPTPeftConfig
    methods.PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = EPTTuner


_register()
