"""A frozen vision transformer with a prompt behind its class token, as in VPT and SPT."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from ept_fast.config import EPTConfig, PromptConfig, check_choice
from ept_fast.ops.functional import splice_prompt
from ept_fast.ops.types import Text
from ept_fast.prompts.base import (
    CONFIG_FILE,
    Prompt,
    Seen,
    SplicedPrompt,
    prompt_class,
    read_prompt,
)
from ept_fast.prompts.initial import check_prototypes
from ept_fast.prompts.prototypes import collect_prototypes
from ept_fast.storage.files import (
    CheckpointError,
    TensorFile,
    tensor_bytes,
)
from ept_fast.storage.untrusted import shorten
from ept_fast.transformers.frozen import (
    PromptedModel,
    behind,
    check_classes,
    check_config,
    check_images,
    check_names,
    check_saved_config,
    read_described,
    read_names,
    shown,
    write_described,
)

__all__ = ["VISION_FILE", "VisionPrompt"]

VISION_FILE = "vision.json"
_HEAD_FILE = "head.safetensors"
_FORMAT: dict[str, Any] = {"format": "ept_fast.vision", "format_version": 1}
_INITS = ("random", "data")


class VisionPrompt(PromptedModel):
    """A frozen ViT that classifies images behind a trainable prompt, with a trainable head.

    The encoder reads the class token, the m prompt tokens and the patches, in this order. Class
    token and patches have their position embeddings, prompt tokens have none. The head sees the
    class token's final state. The model is the user's own: frozen, in evaluation mode also under
    ``.train()``, never copied, never saved.

    Args:
        model: a ``ViTModel`` or ``ViTForImageClassification`` of ``transformers``.
        config: of any registered prompt method, of the model's width and without an offset, which
            is for texts; by default a plain prompt of 20 tokens,
            ``EPTConfig(width, rank=0, num_spaces=0)``.
        labels: names of the classes, for a new linear head. By default those of the model, whose
            own classifier is copied, and the copy trained.
        init: the rows that the prompt starts from: ``"random"`` (uniform within
            ±√(6 / (values of a patch + d)), as VPT), ``"data"`` (prototypes of ``images``), or a
            tensor ``[at least m, d]``.
        images: for ``init="data"``, ``[N, C, H, W]`` as the model takes them. Labels are not asked
            for.
        prototypes: for ``init="data"``: ``"random"``, ``"mean"``, ``"max"`` or ``"kmeans"``, as in
            :func:`ept_fast.from_prototypes`, where an image is a text and a patch is a token.
        prototype_layer: which states the prototypes are of. None: the patch embeddings, before
            position embeddings are added. i: the input of layer i, counted from 0, without the
            class token.
        generator: a CPU generator for everything random; the global one by default.
        dtype: type of the trained parameters.
        backend: as in :func:`ept_fast.splice_prompt`.

    Attributes:
        backbone: the frozen ``ViTModel``.
        prompt: the method's :class:`ept_fast.prompts.base.Prompt`.
        head: the linear head.
        labels: names of the classes, in the order of the logits.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name; the model is as before then.

    Example:
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        ...              intermediate_size=64, image_size=8, patch_size=2, num_channels=1)
        >>> vit = transformers.ViTModel(transformers.ViTConfig(**sizes))
        >>> images = torch.rand(10, 1, 8, 8)
        >>> model = VisionPrompt(vit, labels=["odd", "even"], init="data", images=images)
        >>> model(images, labels=torch.arange(10) % 2).logits.shape
        torch.Size([10, 2])
    """

    trained: ClassVar[tuple[str, ...]] = ("prompt.", "head.")

    def __init__(
        self,
        model: nn.Module,
        config: PromptConfig | None = None,
        *,
        labels: Sequence[str] | None = None,
        init: str | Tensor = "random",
        images: Tensor | None = None,
        prototypes: str = "random",
        prototype_layer: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:
        vit: Any = _check_model(model)
        width = int(vit.config.hidden_size)
        if config is None:
            config = EPTConfig(width, rank=0, num_spaces=0)
        method = prompt_class(config)
        check_config(config, width)
        names = _labels_of(model, labels)
        if isinstance(init, str):
            check_choice("init", init, _INITS)
        from_images = isinstance(init, str) and init == "data"
        if not from_images and prototypes != "random":
            raise ValueError(
                f'prototypes: expected "random" unless init="data", got {shorten(prototypes)}'
            )
        check_prototypes(init, prototypes if from_images else "kmeans", prototype_layer)
        if (images is not None) != from_images:
            expected = "None unless" if images is not None else "a tensor for"
            raise ValueError(f'images: expected {expected} init="data", got {shown(images)}')
        if images is not None:
            _check_pixels("images", images, vit)
            if prototype_layer is not None and prototype_layer >= len(_layers(vit)):
                raise ValueError(
                    f"prototype_layer: expected a layer from 0 to {len(_layers(vit)) - 1}, "
                    f"got {prototype_layer}"
                )
        super().__init__(model, vit)
        self.labels, self.backend = names, backend
        try:
            if images is not None:
                count = config.initial_rows
                init = _prototypes(vit, images, count, prototypes, prototype_layer, generator)
            elif isinstance(init, str):
                init = _uniform(vit, config, generator)
            device = next(vit.parameters()).device
            init = init.to(device)
            self.prompt: Prompt = method(
                config, init=init, generator=generator, dtype=dtype, backend=backend
            )
            self.head = _new_head(model, labels, width, generator).to(device, dtype)
        except BaseException:
            self.unload()
            raise
        self.folded: SplicedPrompt | None = None

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> ImageClassifierOutput:
        """Logits ``[B, C]`` in float32, and with labels the mean cross-entropy.

        Args:
            pixel_values: ``[B, C, H, W]``, as the model takes them.
            labels: ``[B]`` int64, numbers of classes.
            interpolate_pos_encoding: whether images may have another size than the model's.

        Raises:
            TypeError, ValueError: inputs that do not fit, by name.
        """
        vit = self.backbone
        _check_pixels("pixel_values", pixel_values, vit, interpolate_pos_encoding)
        if labels is not None:
            check_classes(labels, len(pixel_values), len(self.labels))
        embeds = vit.embeddings(
            _cast(pixel_values, vit), interpolate_pos_encoding=interpolate_pos_encoding
        )  # [B, 1 + S, d]
        states = self._spliced(embeds)
        for layer in _layers(vit):
            states = layer(states)
        final = vit.layernorm(states[:, 0])
        logits = self.head(final.to(self.head.weight.dtype)).float()
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def _spliced(self, embeds: Tensor) -> Tensor:
        """Class token, prompt and patches, ``[B, 1 + m + S, d]``, in one copy of the patches."""
        patches = embeds[:, 1:]
        source = self.prompt if self.folded is None else self.folded
        text = Text(inputs_embeds=patches)
        prompt, read = source.prompt_for(text, Seen())  # [(B,) m, d]
        # The class token's row is that of every image, so it goes before the patches as the
        # prompt's first.
        first = behind(embeds[0, :1], prompt)
        return splice_prompt(
            first, inputs_embeds=patches, task_ids=read.task_ids, backend=self.backend
        )

    def fold(self, dtype: torch.dtype | None = None) -> None:
        """Compute the prompt once, for inference; switches to evaluation mode.

        :meth:`unfold`, :meth:`train` and loading undo it.

        Args:
            dtype: what it is rounded to; the parameters' type by default.
        """
        folded = self.prompt.fold(dtype, "none")
        self.eval()
        self.folded = folded

    def unfold(self) -> None:
        """Use the trainable prompt again."""
        self.folded = None

    def parameter_groups(
        self, prompt_lr: float, offset_lr: float, space_lr: float, head_lr: float
    ) -> list[dict[str, Any]]:
        """Optimizer groups of prompt and head, as of :class:`ept_fast.EPTModel`."""
        groups = self.prompt.parameter_groups(prompt_lr, offset_lr, space_lr)
        groups.append({"name": "head", "params": list(self.head.parameters()), "lr": head_lr})
        return groups

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write prompt, head and labels into ``folder``, never the backbone.

        All files are on the disk under temporary names before any takes the place of an older one,
        the description with their checksums last.

        Raises:
            ValueError: a tensor holds NaN or infinity.
        """
        config = self.prompt.config
        files = self.prompt.files()
        files[_HEAD_FILE] = tensor_bytes(self.head.state_dict(), config.to_json())
        values = {
            **_FORMAT,
            "labels": list(self.labels),
            "base_model": getattr(self.backbone.config, "_name_or_path", None) or None,
        }
        write_described(Path(folder), VISION_FILE, values, files)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model: nn.Module, *, backend: str | None = None
    ) -> Self:
        """The prompt and head that :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            folder: the folder.
            model: the frozen model that they were trained with. It is not loaded by its name, and
                its own classifier, if it has one, is not used.
            backend: as for the class.

        Raises:
            CheckpointError: a missing, damaged or foreign file, or a model of another width.
        """
        folder = Path(folder)
        path = folder / VISION_FILE
        values, files = read_described(
            path, _FORMAT, ("labels", "base_model"), lambda _: [_HEAD_FILE]
        )
        labels = read_names(path, "labels", values["labels"], 2)
        _, config, num_tasks, tensors = read_prompt(folder, files)
        width = int(_check_model(model).config.hidden_size)
        if num_tasks is not None:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: num_tasks: expected null, got {num_tasks}"
            )
        check_saved_config(folder, config, width)
        head = TensorFile(folder / _HEAD_FILE, files[_HEAD_FILE]).load(
            {"weight": (len(labels), width), "bias": (len(labels),)}
        )
        rows = torch.zeros(config.num_virtual_tokens, width)
        found = cls(model, config, labels=labels, init=rows, backend=backend)
        device = found.head.weight.device
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        found.prompt = prompt_class(config).from_tensors(config, tensors, backend=backend)
        found.prompt.to(device)
        found.head.to(head["weight"].dtype).load_state_dict(head)
        return found.eval()


# The model


def _check_model(model: Any) -> Any:
    """The ViTModel in it; TypeError if there is none."""
    if isinstance(model, transformers.ViTForImageClassification):
        return model.vit
    if not isinstance(model, transformers.ViTModel):
        raise TypeError(
            f"model: expected a ViTModel or a ViTForImageClassification, got {type(model).__name__}"
        )
    return model


def _layers(vit: Any) -> Any:
    """The encoder's layers, whose place differs between versions of transformers."""
    return vit.layers if hasattr(vit, "layers") else vit.encoder.layer


def _cast(pixels: Tensor, vit: Any) -> Tensor:
    """The pixels where the model is, in its type, as the model itself casts them."""
    weight = vit.embeddings.patch_embeddings.projection.weight
    return pixels.to(weight.dtype)


# Where training starts


@torch.no_grad()
def _prototypes(
    vit: Any,
    images: Tensor,
    count: int,
    how: str,
    layer: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    weight = vit.embeddings.patch_embeddings.projection.weight

    def states_of(numbers: Tensor) -> tuple[Tensor, Tensor]:
        pixels = _cast(images[numbers.to(images.device)].to(weight.device), vit)
        if layer is None:
            states = vit.embeddings.patch_embeddings(pixels)
        else:
            states = vit.embeddings(pixels)
            for each in _layers(vit)[:layer]:
                states = each(states)
            states = states[:, 1:]
        return states, torch.ones(states.shape[:2], device=states.device)

    lengths = torch.full((len(images),), vit.embeddings.patch_embeddings.num_patches)
    return collect_prototypes(lengths, states_of, count, how, generator)


def _uniform(vit: Any, config: PromptConfig, generator: torch.Generator | None) -> Tensor:
    inputs = vit.embeddings.patch_embeddings.projection.weight[0].numel()  # C·p·p
    bound = (6 / (inputs + config.hidden_size)) ** 0.5
    rows = torch.rand(config.initial_rows, config.hidden_size, generator=generator)
    uniform: Tensor = (2 * rows - 1) * bound
    return uniform


def _labels_of(model: Any, labels: Sequence[str] | None) -> tuple[str, ...]:
    if labels is None:
        if not isinstance(getattr(model, "classifier", None), nn.Linear):
            raise ValueError(
                "labels: expected names of the classes, as the model has no classifier, got None"
            )
        return tuple(str(name) for _, name in sorted(model.config.id2label.items()))
    return check_names("labels", labels, 2)


def _new_head(
    model: Any, labels: Sequence[str] | None, width: int, generator: torch.Generator | None
) -> nn.Linear:
    if labels is None:
        copied: nn.Linear = copy.deepcopy(model.classifier)
        return copied.requires_grad_(True).train()
    head = nn.Linear(width, len(labels), device="meta").to_empty(device="cpu")
    with torch.no_grad():
        head.weight.copy_(torch.randn(len(labels), width, generator=generator) * 0.02)
        head.bias.zero_()
    return head


# Inputs


def _check_pixels(name: str, pixels: Any, vit: Any, any_size: bool = False) -> None:
    """Raise TypeError or ValueError unless these are images of the model's size."""
    patches = vit.embeddings.patch_embeddings
    size = None if any_size else patches.image_size
    check_images(name, pixels, patches.num_channels, size)
