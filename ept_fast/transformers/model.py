"""A frozen ``transformers`` model with prompts before it: what all tasks share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ept_fast.config import PromptConfig, check_choice
from ept_fast.losses.terms import LossInputs, LossTerm
from ept_fast.precision import without_autocast
from ept_fast.prompts.base import EPTOutput, prompt_class
from ept_fast.prompts.embedding import check_width
from ept_fast.prompts.initial import check_prototypes
from ept_fast.transformers.adapter_set import check_adapter_name
from ept_fast.transformers.backbone import (
    Profile,
    check_backbone,
    embedding_width,
    own_head,
    take_cache,
)
from ept_fast.transformers.checkpointing import Checkpointing, Own, set_mode
from ept_fast.transformers.padding import Rows, Text, before_labels, ranks_of
from ept_fast.transformers.peft_layers import PeftAdapter, base_of
from ept_fast.transformers.pretrained import PretrainedInterface
from ept_fast.transformers.prototypes import layer_prototypes
from ept_fast.transformers.quantised import allow_packing, prevent_packing
from ept_fast.transformers.saving import AdapterFiles
from ept_fast.transformers.states import PlainReader

__all__ = ["EPTModel"]

_OFFSETS = ("low_rank", "table", "auto")


class EPTModel(PretrainedInterface, Checkpointing, AdapterFiles):
    """A frozen model, named adapters of prompt and head, and one of them active.

    Made by :func:`ept_fast.get_ept_model` or :meth:`from_pretrained`; the class is the task's. The
    backbone is the user's own model: frozen, in evaluation mode also under ``.train()`` (no
    dropout), never copied, never saved. Of the adapters only the active one requires gradients.

    A PeftModel may be given too, or a model with PEFT's layers in it. Weights of these layers that
    required gradients go on requiring them, their dropout follows ``.train()``, and they are saved.

    Attributes:
        backbone: the frozen model; of a PeftModel the one inside.
        peft: the adapter that PEFT has put into it, or None.
        prompts: the adapters' :class:`ept_fast.FusedEPTPrompt`, by name.
        heads: the adapters' heads, by name, if the task has one.
        base_model_name: folder or hub id of the backbone, saved with adapters; or None.
        active_adapter: name of the adapter that forward uses.
        descriptions: what each adapter is besides its tensors, by name.
        profile: what is known of the backbone.
        disabled: whether calls go to the plain backbone (:meth:`disable_adapter`).
    """

    has_head: ClassVar[bool] = False
    accepts_loss_kwargs = True  # transformers' Trainer then gives num_items_in_batch

    def __init__(
        self, model: nn.Module, *, base_model: str | None = None, backend: str | None = None
    ) -> None:
        super().__init__()
        self._given: tuple[Any] = (model,)  # in a tuple, as no module of this one
        model = base_of(model)
        check_backbone(model, self.task)
        self.peft = PeftAdapter.of(model)
        if self.peft is not None:
            self.peft.check_apart(own_head(model, self.task))
        trained = [] if self.peft is None else self.peft.trained()
        self._packing = prevent_packing(model)
        self._checkpointing = Own(model)
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._modes = [(m, m.training) for m in model.modules()]
        self.backbone = model.requires_grad_(False).eval()
        for parameter in trained:
            parameter.requires_grad_(True)
        name = getattr(self.backbone.config, "_name_or_path", None) or None
        if base_model is None and name is not None and Path(name).is_dir():
            name = str(Path(name).resolve())
        self.base_model_name = base_model or name
        self.backend = backend
        self.profile = Profile.of(model)
        self.disabled = False
        self._plain = PlainReader(model)
        self._loss_terms: list[LossTerm] = []
        self._progress = torch.zeros(())  # of the training; a tensor, so that nothing recompiles
        if self._checkpointing.options is not None:
            self.gradient_checkpointing_enable(self._checkpointing.options)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Read by DDP, which would send the frozen model's buffers before every forward.

        Its parameters are sent once, when DDP is made: if a part of them was drawn at random,
        as a pooler that no checkpoint has, the processes then agree.
        """
        return [f"backbone.{name}" for name, _ in self.backbone.named_buffers()]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Make ``value`` the backbone's embedding layer, frozen; every prompt uses it from now on.

        Raises:
            ValueError: the layer has another width.
        """
        check_width(value, embedding_width(self.backbone))
        self._plain.forget()
        self.backbone.set_input_embeddings(value)
        self._flags += [(p, p.requires_grad) for p in value.parameters()]
        self._modes += [(m, m.training) for m in value.modules()]
        value.requires_grad_(False).eval()

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Resize the backbone's table of embeddings, and its language-model head if it has one.

        What is new is frozen; :meth:`unload` gives it the ``requires_grad`` of what it replaced.

        Args:
            new_num_tokens, pad_to_multiple_of, mean_resizing: as for the backbone's own method.

        Returns:
            The embedding layer.
        """
        self._plain.forget()
        before = dict(self.backbone.named_parameters())
        flags = {id(p): flag for p, flag in self._flags}
        modules = set(self.backbone.modules())
        layer = self.backbone.resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        for name, parameter in self.backbone.named_parameters():
            old = before.get(name)
            if parameter is not old:
                self._flags.append((parameter, flags.get(id(old), True)))
                parameter.requires_grad_(False)
        for module in self.backbone.modules():
            if module not in modules:
                self._modes.append((module, module.training))
                module.training = False
        return layer

    def train(self, mode: bool = True) -> EPTModel:
        """Set the mode of prompts, heads and PEFT's layers; the backbone stays in evaluation."""
        super().train(mode)
        for name, child in self.named_children():
            if name not in ("prompts", "heads"):
                child.eval()
        set_mode(self.backbone, mode)
        if self.peft is not None:
            self.peft.set_mode(mode)
        for name, head in self.heads.items():
            head.train(mode and name == self.active_adapter)
        if mode:
            self.unfold()
        return self

    # Adapters

    @property
    def text_limit(self) -> int | None:
        """The longest text, in tokens, that the backbone has positions for; None without a limit.

        Only where positions have a table of their own is longer text an error.
        """
        return self.profile.text_limit(self.prompt.config.num_virtual_tokens)

    def add_adapter(
        self,
        adapter_name: str,
        config: PromptConfig,
        *,
        labels: Sequence[str] | None = None,
        pooling: str | None = None,
        head_dropout: float = 0.0,
        init: str | Tensor = "vocab",
        text: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        prototypes: str = "kmeans",
        prototype_layer: int | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Add an adapter; the first one becomes active.

        Args:
            adapter_name: letters, digits, ``_`` and ``-``.
            config: sizes and choices of the prompt.
            labels, pooling, head_dropout: as in :func:`ept_fast.get_ept_model`.
            init, text, tokenizer, prototypes, prototype_layer, generator, dtype: as in
                :func:`ept_fast.get_ept_model`.

        Raises:
            TypeError, ValueError: arguments that do not fit; the model is as before then.
        """
        check_adapter_name(adapter_name, self.descriptions)
        described = self.describe(labels, pooling, head_dropout)
        limit = self.profile.table_limit(0)
        method = prompt_class(config)
        if limit is not None and config.num_virtual_tokens >= limit:
            raise ValueError(
                f"num_virtual_tokens: expected room for text in the model's "
                f"{self.profile.max_position_embeddings} positions, got {config.num_virtual_tokens}"
            )
        check_prototypes(init, prototypes, prototype_layer)
        if prototype_layer is not None:
            init = self._of_layer(prototype_layer, config, prototypes, text, tokenizer, generator)
            text, tokenizer, prototypes = None, None, "kmeans"
        prompt = method(
            config,
            self.get_input_embeddings(),
            init=init,
            text=text,
            tokenizer=tokenizer,
            prototypes=prototypes,
            generator=generator,
            dtype=dtype,
            backend=self.backend,
        )
        head = self.new_head(described, generator)
        if head is not None:
            head.to(next(prompt.parameters()).device)
        self.place(adapter_name, prompt, head, described)

    def _of_layer(
        self,
        layer: int,
        config: PromptConfig,
        how: str,
        texts: Any,
        tokenizer: Any,
        generator: torch.Generator | None,
    ) -> Tensor:
        """Prototypes of the plain backbone's states, without dropout of PEFT's layers."""
        mode = self.training
        try:
            self.eval()
            return layer_prototypes(self.backbone, layer, config, how, texts, tokenizer, generator)
        finally:
            if mode:
                self.train()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[EPTModel]:
        """The plain backbone, also without PEFT's adapter, for the length of a ``with`` block."""
        before, self.disabled = self.disabled, True
        self.place_active()
        without_peft = contextlib.nullcontext() if self.peft is None else self.peft.disabled()
        try:
            with without_peft:
                yield self
        finally:
            self.disabled = before
            self.place_active()

    def unload(self) -> Any:
        """Take the backbone out: the model that was given, as it was; this object is done with.

        Its head, the ``requires_grad`` of its parameters and its modules' modes are restored.
        """
        self.gradient_checkpointing_disable()
        self.disabled = True
        self.place_active()
        allow_packing(self._packing)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode
        self._checkpointing.give_back()
        self.backbone = None
        (given,), self._given = self._given, (None,)
        return given

    def fold(self, dtype: torch.dtype | None = None, offset: str = "low_rank") -> None:
        """Compute every adapter's prompt once, for inference; switches to evaluation mode.

        :meth:`unfold`, :meth:`train` and loading undo it.

        Args:
            dtype: as in :meth:`ept_fast.FusedEPTPrompt.fold`.
            offset: ``"low_rank"``, ``"table"`` or ``"auto"``, as there.

        Raises:
            TypeError, ValueError: another dtype or offset. Nothing is folded then.
        """
        check_choice("offset", offset, _OFFSETS)
        self.eval()
        self.unfold()
        try:
            for name, prompt in self.prompts.items():
                self.folded[name] = prompt.fold(dtype, offset)  # type: ignore[operator]
        except BaseException:
            self.unfold()
            raise

    # Forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's output behind the active prompt; what belongs to a token is the text's.

        Args:
            input_ids: ``[B, S]`` integers, padded on either side; or else ``inputs_embeds``.
            attention_mask: ``[B, S]`` of 0 and 1; ones by default.
            inputs_embeds: ``[B, S, d]``, as the backbone's embedding layer gives them.
            token_type_ids: ``[B, S]`` integers, for backbones that have them.
            labels: what the task is trained on; gives the output a ``loss``.
            **kwargs: handed on to the backbone, but for those that are None.

        Returns:
            The backbone's output class, or with ``return_dict=False`` a tuple of its fields, with
            ``logits`` or ``last_hidden_state`` of the text alone: ``[B, S, ...]``. Hidden states
            and attentions, if asked for, are those of the row that the backbone saw: prompt and
            text, padded on the right.

        Raises:
            TypeError, ValueError: inputs that do not fit, by name; more positions than the backbone
                has, or than the offset covers.
            IndexError: an id outside the vocabulary.
        """
        if self.disabled:
            given = {"token_type_ids": token_type_ids, "labels": labels}
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if "position_ids" in kwargs:
            raise ValueError("position_ids: expected None (they follow from the mask), got one")
        name, cache = take_cache(kwargs)
        if cache is not None:
            raise ValueError(f"{name}: expected None (see generate()), got one")
        return_dict = kwargs.pop("return_dict", True)
        text = Text.of(input_ids, inputs_embeds, attention_mask, token_type_ids)
        limit = self.profile.table_limit(m := self.prompt.config.num_virtual_tokens)
        if limit is not None and text.length > limit:
            raise ValueError(
                f"input_ids: expected at most {limit} positions (the model's "
                f"{self.profile.max_position_embeddings} without the prompt's {m}), "
                f"got {text.length}"
            )
        output = self.run(text, labels, kwargs)
        return output if return_dict else output.to_tuple()

    def run(self, text: Text, labels: Tensor | None, kwargs: dict[str, Any]) -> Any:
        """The task's output; ``kwargs`` are for the backbone."""
        raise NotImplementedError

    def rows(
        self,
        text: Text,
        kwargs: dict[str, Any],
        compact: bool = True,
        labels: Tensor | None = None,
    ) -> tuple[Rows, dict[str, Any]]:
        """Prompt and text, and the keyword arguments that the backbone is called with.

        Args:
            text: rows padded in any way.
            kwargs: ``task_ids``, for a bank; all others are for the backbone.
            compact: whether padding before the shorter prompts of a bank goes behind the text, for
                models that go by columns.
            labels: as in :meth:`splice`.
        """
        task_ids = kwargs.pop("task_ids", None)
        states = self._plain_states(text)
        spliced = self.splice(
            text.input_ids, text.inputs_embeds, text.attention_mask, task_ids, states, labels
        )
        rows = Rows.of(spliced, text, self.prompt.config.num_virtual_tokens)
        rows = rows._replace(plain_states=states)
        if compact and not self.active_prompt.equal_lengths:
            rows = rows.compacted()
        embeds, mask, ranks, kinds, *_ = rows
        inputs = self.profile.inputs(embeds, mask, ranks, token_type_ids=kinds, use_cache=False)
        return rows, inputs | kwargs

    def splice(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        states: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> EPTOutput:
        """The active prompt before the text, as :meth:`ept_fast.FusedEPTPrompt.forward`.

        The text's ``states`` are computed if the prompt reads them and they are not given. With
        ``offset_tokens="given"`` in the prompt's config, tokens from a row's first one of the
        ``labels`` ``[B, S]`` on get no offset.
        """
        prompt: Callable[..., EPTOutput] = self.active_prompt
        if states is None:
            states = self._plain_states(Text.of(input_ids, inputs_embeds, attention_mask, None))
        if labels is None or self.prompt.config.offset_tokens == "all":
            return prompt(input_ids, inputs_embeds, attention_mask, task_ids, states)
        mask = Text.of(input_ids, inputs_embeds, attention_mask, None).attention_mask
        # The splice leaves padding as it is, and so what is labelled, if it is told that it is
        # padding. It comes last, so the ranks of the tokens before it stay the same.
        given = before_labels(mask, labels)
        embeds, *_ = prompt(input_ids, inputs_embeds, given, task_ids, states)
        mask = torch.constant_pad_nd(mask, (self.prompt.config.num_virtual_tokens, 0), 1)
        return EPTOutput(embeds, mask, ranks_of(mask))

    def _plain_states(self, text: Text) -> Tensor | None:
        """The text's states in the plain backbone, if the prompt reads them.

        In training they are kept, unless layers of PEFT change them.
        """
        if not self.active_prompt.reads_states:
            return None
        return self._plain.states(text, keep=self.training and self.peft is None)

    # Further terms of the loss

    def add_loss(self, term: LossTerm) -> None:
        """Add a term to the loss of every adapter, in training mode; it is not saved.

        A prompt method has terms of its own (``Prompt.loss_terms``) without this.

        Example:
            >>> from ept_fast.losses.terms import LossTerm
            >>> size = LossTerm("size", lambda inputs: inputs.prompt.square().mean(), 0.01)
            >>> model.add_loss(size)  # doctest: +SKIP
        """
        if not isinstance(term, LossTerm):
            raise TypeError(f"term: expected a LossTerm, got {type(term).__name__}")
        self._loss_terms.append(term)

    def set_loss_progress(self, progress: float) -> None:
        """Say how far the training is, from 0 to 1, for terms whose weight falls.

        ``ept_fast.training.trainer`` does so, and in the Trainer of ``transformers`` the callback
        :class:`ept_fast.transformers.loss.LossProgress`.
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"progress: expected a number from 0 to 1, got {progress!r}")
        self._progress = torch.tensor(float(progress))

    @property
    def loss_terms(self) -> tuple[LossTerm, ...]:
        """What is added to the loss now: nothing in evaluation mode, and no term of weight 0."""
        if not self.training:
            return ()
        terms = (*self.prompt.loss_terms(), *self._loss_terms)
        return tuple(term for term in terms if term.weight)

    def with_terms(self, loss: Tensor | None, rows: Rows, share: Any = None, **of_task: Any) -> Any:
        """The task's loss and the weighted terms.

        Args:
            loss: the task's; None, and so is what is returned, without labels.
            rows: what the backbone has read.
            share: of the batch, in the whole step, if the loss is a part of it.
            **of_task: fields of :class:`ept_fast.losses.terms.LossInputs`.
        """
        terms = self.loss_terms
        if loss is None or not terms:
            return loss
        m, embeds = rows.num_virtual_tokens, rows.inputs_embeds
        inputs = LossInputs(
            prompt=embeds[:, :m],
            embeds=embeds[:, m:],
            attention_mask=rows.text.attention_mask,
            plain_states=rows.plain_states,
            **of_task,
        )
        with without_autocast(embeds.device):
            added = sum(term(inputs, self._progress) for term in terms)
        return loss + (added if share is None else added * share)
