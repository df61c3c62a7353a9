"""Learned contexts before the class names that a frozen CLIP reads, as in CoOp, PRE and LASP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from ept_fast.config import EPTConfig, PromptConfig, check_count, check_flag, check_number
from ept_fast.losses.text_to_text import noisy_templates, text_to_text
from ept_fast.ops.functional import splice_prompt
from ept_fast.ops.types import Text
from ept_fast.precision import accumulation_dtype, without_autocast
from ept_fast.prompts.base import (
    CONFIG_FILE,
    Prompt,
    Seen,
    check_constant,
    prompt_class,
    read_prompt,
)
from ept_fast.prompts.embedding import is_plain_table
from ept_fast.prompts.initial import padded
from ept_fast.storage.files import CheckpointError, TensorFile, tensor_bytes
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
    shown,
    write_described,
)

__all__ = ["CLIP_FILE", "CLIPPrompt", "SentenceEncoder", "TextEncoder"]

CLIP_FILE = "clip.json"
_CORRECTION_FILE = "correction.safetensors"
_FORMAT: dict[str, Any] = {"format": "ept_fast.clip", "format_version": 1}
_START = "a photo of a"  # four tokens of CLIP's


class TextEncoder(nn.Module):
    """What :class:`CLIPPrompt` asks of a frozen model; a subclass says how it encodes.

    Args:
        model: the frozen model.
        features: e, width of what comes out.
        positions: how many tokens a text may have.
        scale: exp(s), the factor of the cosines.

    Raises:
        TypeError: the model's embeddings are not a plain table.
    """

    def __init__(self, model: Any, features: int, positions: int, scale: float) -> None:
        super().__init__()
        self.model = model
        self.features, self.positions, self.scale = features, positions, scale
        if not is_plain_table(self.embedding):
            raise TypeError(
                f"model: expected token embeddings in an nn.Embedding without hooks, "
                f"got {type(self.embedding).__name__}"
            )

    @property
    def embedding(self) -> Any:
        """The layer of the token embeddings."""
        return self.model.get_input_embeddings()

    def forward(self, embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features ``[N, e]``, not normalised.

        Args:
            embeds: ``[N, S, d]``, token embeddings before positions are added.
            input_ids: ``[N, S]``, by which a model may find its end token; the start token's id
                stands where the embeddings are a context's.
            attention_mask: ``[N, S]``, zeros behind a text's end.
        """
        raise NotImplementedError

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Features ``[N, e]`` of plain texts, ``[N, S]`` each; without a gradient."""
        with torch.no_grad():
            features: Tensor = self(self.embedding(input_ids), input_ids, attention_mask)
        return features

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Features ``[B, e]`` of images, not normalised; TypeError if it reads none."""
        raise TypeError(
            f"pixel_values: expected image_features, as a {type(self).__name__} reads no images, "
            f"got {shown(pixel_values)}"
        )


class SentenceEncoder(TextEncoder):
    """A sentence encoder in CLIP's place: the mean of a text's last states, as MiniLM's.

    Args:
        model: a frozen encoder of ``transformers`` that takes ``inputs_embeds``.
        scale: the factor of the cosines; 20 is common in the training of such encoders.

    Example:
        >>> sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> bert = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=64))
        >>> ids = torch.tensor([[101, 2000, 102]])
        >>> SentenceEncoder(bert).encode(ids, torch.ones_like(ids)).shape
        torch.Size([1, 32])
    """

    def __init__(self, model: nn.Module, scale: float = 20.0) -> None:
        check_number("scale", scale, positive=True)
        config: Any = model.config
        super().__init__(model, config.hidden_size, config.max_position_embeddings, scale)

    def forward(self, embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean over the tokens of a text, start and end token too."""
        states = self.model(inputs_embeds=embeds, attention_mask=attention_mask)[0]
        weights = attention_mask.unsqueeze(-1).to(accumulation_dtype(states))
        mean: Tensor = (states * weights).sum(1) / weights.sum(1)
        return mean


class _CLIPEncoder(TextEncoder):
    """Both encoders of a ``CLIPModel``."""

    def __init__(self, model: Any) -> None:
        positions = model.text_model.embeddings.position_embedding.num_embeddings
        scale = float(model.logit_scale.detach().double().exp())
        super().__init__(model, model.projection_dim, positions, scale)

    @property
    def embedding(self) -> Any:
        return self.model.text_model.embeddings.token_embedding

    def forward(self, embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # The text model takes ids alone: by them it finds its end token, while a hook has it read
        # our embeddings. It is causal, so padding behind the end token needs no mask.
        hook = self.embedding.register_forward_hook(lambda *_: embeds)
        try:
            pooled = self.model.text_model(input_ids=input_ids).pooler_output
        finally:
            hook.remove()
        projected: Tensor = self.model.text_projection(pooled)
        return projected

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        vision = self.model.vision_model
        size = vision.embeddings.image_size
        check_images("pixel_values", pixel_values, vision.config.num_channels, (size, size))
        pooled = vision(pixel_values=pixel_values).pooler_output
        projected: Tensor = self.model.visual_projection(pooled)
        return projected


class _Choices(NamedTuple):
    """What a file says of a model besides its tensors; as the arguments of :class:`CLIPPrompt`."""

    classes: Sequence[str]
    virtual_classes: Sequence[str]
    templates: Sequence[str]
    weight: float
    noise: float
    correction: bool

    def check(self) -> None:
        """Raise TypeError or ValueError for the first that does not fit, by name."""
        check_names("classes", self.classes, 2)
        check_names("virtual_classes", self.virtual_classes, 0)
        both = sorted({*self.classes} & {*self.virtual_classes})
        if both:
            raise ValueError(f"virtual_classes: expected names beside classes, got {both} again")
        for template in check_names("templates", self.templates, 0):
            if template.count("{}") != 1:
                raise ValueError(
                    f"templates: expected one {{}} for the name in each, got {shorten(template)}"
                )
        for name in ("weight", "noise"):
            check_number(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")
        check_flag("correction", self.correction)


class CLIPPrompt(PromptedModel):
    """A frozen CLIP that classifies images by class names behind a trainable context.

    The text of class c is [start, context (m tokens), tokens of "name.", end]. An image's logit for
    it is exp(s) times the cosine of both features. In training the loss is the cross-entropy, plus
    ``weight`` times :func:`ept_fast.losses.text_to_text.text_to_text` if there are templates
    (LASP). All classes are encoded once for both. The model is the user's own: frozen, in
    evaluation mode also under ``.train()``, never copied, never saved.

    CoOp is the default; PRE is ``ResidualConfig(width, 4, encoder="lstm")``; LASP has ``templates``
    and ``correction=True``.

    Args:
        model: a ``CLIPModel`` of ``transformers``, or a :class:`TextEncoder`, which reads texts
            alone and is given ``image_features``.
        config: of any registered prompt method whose prompt is the same before every text, of the
            text model's width and without an offset; by default a plain prompt of 4 tokens.
        tokenizer: of the model. It puts a start token before every text.
        classes: names of the classes that images are labelled with.
        virtual_classes: names without images, which compete in both losses (LASP's).
        templates: texts with one ``{}`` for the name, such as ``"a photo of a {}."``. By default
            none, and no second loss.
        weight: of the text-to-text loss, >= 0.
        noise: deviation of :func:`ept_fast.losses.text_to_text.noisy_templates` in training; 0:
            none.
        correction: whether a row ``[1, e]``, zero at first, is trained that is added to the
            features of all classes before they are normalised (LASP's).
        groups: G, contexts of their own (each with an encoder of its own, if the method has one).
            The templates are cut in G parts, of which each context sees one; an image's cosines
            with the G features of a class are averaged.
        init, text: where all contexts start, as of :class:`ept_fast.FusedEPTPrompt`; by default
            from the embeddings of ``"a photo of a"``.
        generator: a CPU generator for the first values; the global one by default.
        dtype: type of the trained parameters.
        backend: as in :func:`ept_fast.splice_prompt`.

    Attributes:
        backbone: the frozen model, as a :class:`TextEncoder`.
        prompt: the method's :class:`ept_fast.prompts.base.Prompt`, a bank of G.
        correction: the trained row, or None.
        classes, virtual_classes, templates, weight, noise: as given.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name; the model is as before then.

    Example:
        >>> words = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo of cat dog .".split()
        >>> tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)})
        >>> sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> text = dict(**sizes, vocab_size=11, bos_token_id=2, eos_token_id=3)
        >>> vision = dict(**sizes, image_size=8, patch_size=4)
        >>> config = transformers.CLIPConfig(text_config=text, vision_config=vision)
        >>> clip = transformers.CLIPModel(config)
        >>> model = CLIPPrompt(clip, tokenizer=tokenizer, classes=["cat", "dog"])
        >>> model(torch.rand(5, 3, 8, 8), labels=torch.tensor([0, 1, 1, 0, 0])).logits.shape
        torch.Size([5, 2])
    """

    trained: ClassVar[tuple[str, ...]] = ("prompt.", "correction")
    class_ids: Tensor
    class_mask: Tensor
    template_features: Tensor | None
    folded_features: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        config: PromptConfig | None = None,
        *,
        tokenizer: Any,
        classes: Sequence[str],
        virtual_classes: Sequence[str] = (),
        templates: Sequence[str] = (),
        weight: float = 5.0,
        noise: float = 0.0,
        correction: bool = False,
        groups: int = 1,
        init: str | Tensor = "text",
        text: str | Sequence[str] | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:
        encoder = _encoder_of(model)
        width = encoder.embedding.embedding_dim
        if config is None:
            config = EPTConfig(width, num_virtual_tokens=4, rank=0, num_spaces=0)
        method = prompt_class(config)
        check_config(config, width)
        _Choices(classes, virtual_classes, templates, weight, noise, correction).check()
        check_count("groups", groups, 1)
        if 0 < len(templates) < groups:
            raise ValueError(
                f"templates: expected at least 1 for each of {groups} groups, got {len(templates)}"
            )
        start = _start_of(tokenizer)
        if isinstance(init, str) and init == "text" and text is None:
            text = _START
        super().__init__(model, encoder)
        self.tokenizer, self.backend = tokenizer, backend
        self.classes, self.virtual_classes = tuple(classes), tuple(virtual_classes)
        self.templates, self.weight, self.noise = tuple(templates), weight, noise
        self.folded_names: tuple[str, ...] | None = None
        self._start = start
        for name in ("template_features", "folded_features"):
            self.register_buffer(name, None, persistent=False)
        try:
            rows: dict[str, Any] = {"init": init, "text": text, "tokenizer": tokenizer}
            how: dict[str, Any] = {"generator": generator, "dtype": dtype, "backend": backend}
            self.prompt: Prompt = method(config, encoder.embedding, num_tasks=groups, **rows, **how)
            check_constant("config", self.prompt)
            device = encoder.embedding.weight.device
            row = torch.zeros(1, encoder.features, dtype=dtype, device=device)
            self.correction = nn.Parameter(row) if correction else None
            for template in self.templates:  # encoded when they are first asked for
                self._tokens("templates", [template.replace("{}", name) for name in self.names])
            tokens = self._class_tokens(self.names)
            for name, tensor in zip(("class_ids", "class_mask"), tokens, strict=True):
                self.register_buffer(name, tensor.to(device), persistent=False)
        except BaseException:
            self.unload()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the logits: classes, then virtual ones."""
        return self.folded_names or (*self.classes, *self.virtual_classes)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        image_features: Tensor | None = None,
    ) -> ImageClassifierOutput:
        """Logits ``[B, C]`` in float32 (or float64), and with labels the loss.

        Args:
            pixel_values: ``[B, channels, H, W]``, as the model takes them.
            labels: ``[B]`` int64, numbers of ``classes`` (once folded: of ``names``).
            image_features: ``[B, e]`` instead of ``pixel_values``, as :meth:`encode_images` or
                another frozen encoder gives them; of any length.

        Raises:
            TypeError, ValueError: inputs that do not fit, by name.
        """
        if (pixel_values is None) == (image_features is None):
            got = "neither" if image_features is None else "both"
            raise ValueError(f"pixel_values, image_features: expected one of them, got {got}")
        if pixel_values is not None:
            images = self.encode_images(pixel_values)
        else:
            images = _unit(_checked_features(image_features, self.backbone.features))
        if labels is not None:
            count = len(self.classes if self.folded_names is None else self.folded_names)
            given = "image_features" if pixel_values is None else "pixel_values"
            check_classes(labels, len(images), count, given)
        features = self.folded_features
        if features is None:
            texts = self.text_features()  # [G, C, e]
            features = texts.mean(0)
        wide = accumulation_dtype(images, features)
        with without_autocast(images.device):
            logits = self.backbone.scale * (images.to(wide) @ features.to(wide).T)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if loss is not None and self.training and self.templates and self.weight:
            h = self._templates()
            loss = loss + self.weight * text_to_text(texts, h, self.backbone.scale)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Unit features ``[B, e]`` of images, in float32 (or float64).

        The encoder is frozen, so images that are seen again need not be encoded again.

        Raises:
            TypeError, ValueError: images that do not fit, or a model that reads none.
        """
        return _unit(self.backbone.encode_images(pixel_values))

    def text_features(self, classes: Sequence[str] | None = None) -> Tensor:
        """Unit features ``[G, C, e]`` of the class texts, by all contexts in one batch.

        Args:
            classes: their names; by default those that are trained with.

        Raises:
            TypeError, ValueError: names that are not different strings, or too long.
        """
        if classes is None:
            return self._features(self.class_ids, self.class_mask)
        tokens = self._class_tokens(check_names("classes", classes, 1))
        return self._features(*(tensor.to(self.class_ids.device) for tensor in tokens))

    def _features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit features ``[G, C, e]`` of the texts with these tokens, ``[C, 1 + m + S]``."""
        encoder, groups = self.backbone, self.prompt.num_tasks or 1
        owner = torch.arange(groups, device=ids.device).repeat_interleave(len(ids))  # [G·C]
        ids, mask = ids.repeat(groups, 1), mask.repeat(groups, 1)
        prompt, read = self.prompt.prompt_for(Text(task_ids=owner), Seen())  # [G, m, d]
        # The start token's row goes before the name as the context's first.
        table = encoder.embedding.weight
        first = behind(table[self._start].unsqueeze(0), prompt)
        embeds = splice_prompt(
            first,
            input_ids=ids[:, first.shape[1] :],
            weight=table,
            task_ids=read.task_ids,
            backend=self.backend,
        )
        features = encoder(embeds, ids, mask)
        features = features.to(accumulation_dtype(features))
        if self.correction is not None:
            features = features + self.correction
        return _unit(features).view(groups, -1, encoder.features)

    def _templates(self) -> Tensor:
        """Unit features ``[L, C, e]`` of every class in every template, encoded once; and noise."""
        if self.template_features is None:
            features = []
            for template in self.templates:
                texts = [template.replace("{}", name) for name in self.names]
                tokens = (t.to(self.class_ids.device) for t in self._tokens("templates", texts))
                features.append(_unit(self.backbone.encode(*tokens)))
            self.template_features = torch.stack(features)
        h = self.template_features
        return noisy_templates(h, self.noise) if self.noise else h

    def _class_tokens(self, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask ``[C, 1 + m + S]``, with the start token's id in the context's places."""
        m = self.prompt.config.num_virtual_tokens
        return self._tokens("classes", [f"{name}." for name in names], m)

    def _tokens(self, name: str, texts: Sequence[str], context: int = 0) -> tuple[Tensor, Tensor]:
        """Ids and mask of texts, the start token ``context`` times more."""
        most = self.backbone.positions
        rows = self.tokenizer(list(texts))["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            if context + len(row) > most:
                raise ValueError(
                    f"{name}: expected at most {most} tokens in a text, got {context + len(row)} "
                    f"({context} of the context) for {shorten(text)}"
                )
        return padded([[self._start] * context + row for row in rows])

    def fold(self, classes: Sequence[str] | None = None) -> None:
        """Compute the class features once, for inference; switches to evaluation mode.

        :meth:`unfold`, :meth:`train` and loading undo it. The text encoder is not called any more.

        Args:
            classes: the classes of the logits, which may be new; by default those that are trained
                with, virtual ones too.

        Raises:
            TypeError, ValueError: as :meth:`text_features`.
        """
        names = (*self.classes, *self.virtual_classes)
        if classes is not None:
            names = check_names("classes", classes, 1)
        ids, mask = (t.to(self.class_ids.device) for t in self._class_tokens(names))
        self.eval()
        with torch.no_grad():
            self.folded_features = self._features(ids, mask).mean(0)
        self.folded_names = names

    def unfold(self) -> None:
        """Use the trainable context again."""
        self.folded_features = self.folded_names = None

    def parameter_groups(
        self, prompt_lr: float, offset_lr: float, space_lr: float, correction_lr: float
    ) -> list[dict[str, Any]]:
        """Optimizer groups of context and correction, as of :class:`ept_fast.EPTModel`."""
        groups = self.prompt.parameter_groups(prompt_lr, offset_lr, space_lr)
        if self.correction is not None:
            groups.append({"name": "correction", "params": [self.correction], "lr": correction_lr})
        return groups

    # Files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write context, correction, names and templates into ``folder``, never the model.

        All files are on the disk under temporary names before any takes the place of an older one,
        the description with their checksums last.

        Raises:
            ValueError: a tensor holds NaN or infinity.
        """
        files = self.prompt.files()
        if self.correction is not None:
            tensors = {"correction": self.correction}
            files[_CORRECTION_FILE] = tensor_bytes(tensors, self.prompt.config.to_json())
        names = (self.classes, self.virtual_classes, self.templates)
        choices = _Choices(*names, self.weight, self.noise, self.correction is not None)
        base = getattr(self.backbone.model.config, "_name_or_path", None) or None
        values = {**_FORMAT, **choices._asdict(), "base_model": base}
        write_described(Path(folder), CLIP_FILE, values, files)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model: nn.Module, tokenizer: Any, *, backend: str | None = None
    ) -> Self:
        """What :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            folder: the folder.
            model: the frozen model that it was trained with. It is not loaded by its name.
            tokenizer: of the model.
            backend: as for the class.

        Raises:
            CheckpointError: a missing, damaged or foreign file, or a model of another width.
            ValueError: a tokenizer by which the class texts are too long for the model.
        """
        folder = Path(folder)
        path = folder / CLIP_FILE
        values, files = read_described(
            path,
            _FORMAT,
            (*_Choices._fields, "base_model"),
            lambda values: [_CORRECTION_FILE] if values["correction"] else [],
        )
        choices = _Choices(*(values[name] for name in _Choices._fields))
        try:
            choices.check()
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from None
        _, config, groups, tensors = read_prompt(folder, files)
        encoder = _encoder_of(model)
        if groups is None:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: num_tasks: expected an integer, got null"
            )
        check_saved_config(folder, config, encoder.embedding.embedding_dim)
        row = None
        if choices.correction:
            file = TensorFile(folder / _CORRECTION_FILE, files[_CORRECTION_FILE])
            row = file.load({"correction": (1, encoder.features)})["correction"]
        found = cls(
            model,
            config,
            tokenizer=tokenizer,
            **choices._asdict(),
            groups=groups,
            init=torch.zeros(config.num_virtual_tokens, config.hidden_size),
            backend=backend,
        )
        found.prompt = prompt_class(config).from_tensors(
            config, tensors, encoder.embedding, num_tasks=groups, backend=backend
        )
        if found.correction is not None and row is not None:
            found.correction = nn.Parameter(row.to(found.correction.device))
        return found.eval()


def _encoder_of(model: Any) -> TextEncoder:
    """The model as a TextEncoder; TypeError if it is none."""
    if isinstance(model, transformers.CLIPModel):
        return _CLIPEncoder(model)
    if not isinstance(model, TextEncoder):
        raise TypeError(f"model: expected a CLIPModel or a TextEncoder, got {type(model).__name__}")
    return model


def _start_of(tokenizer: Any) -> int:
    """The id that the tokenizer puts before a text."""
    if not callable(tokenizer):
        raise TypeError(f"tokenizer: expected a tokenizer, got {type(tokenizer).__name__}")
    (none, some) = tokenizer(["", _START])["input_ids"]
    if not none or none[0] != some[0]:
        raise ValueError(
            f"tokenizer: expected one that puts a start token before every text, "
            f"got the ids {shorten(some)} for {_START!r}"
        )
    return int(some[0])


def _checked_features(features: Any, width: int) -> Tensor:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise TypeError(f"image_features: expected a floating tensor, got {shown(features)}")
    if features.dim() != 2 or features.shape[1] != width or not len(features):
        raise ValueError(
            f"image_features: expected shape [at least 1, {width}], got {list(features.shape)}"
        )
    return features


def _unit(features: Tensor) -> Tensor:
    """Of length 1, in float32 or float64."""
    return F.normalize(features.to(accumulation_dtype(features)), dim=-1)
