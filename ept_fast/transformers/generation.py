"""``generate`` of ``transformers`` behind a prompt.

A decoder's own ``generate`` runs on a view of it: an object of a subclass of its class that shares
all of its state. The loop sees token ids and the text's mask only, so lengths, caches, beams,
logits processors and streamers mean what they mean without a prompt. Two of its methods differ:
what a step is fed, which is ``[padding | prompt | text]`` first and then each new token, with its
offset if it has one, and the length of a static cache. The backbone itself is not touched, so
several threads may generate with it, each with an adapter of its own.
"""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin

from ept_fast.ops.functional import splice_prompt
from ept_fast.transformers.backbone import Profile, cache_argument, take_cache
from ept_fast.transformers.padding import (
    LeftPadded,
    layout_of,
    left_padded,
    mark_layout,
    mask_of_ids,
    right_padded,
)
from ept_fast.transformers.prefix_cache import PrefixCache

__all__ = ["generate_causal", "generate_seq2seq"]

# Modes that call the model past what a step is fed, or change the text: the prompt would be lost.
_REFUSED = (
    "assistant_early_exit",
    "guidance_scale",
    "prefill_chunk_size",
    "speculation_type",
    "token_healing",
    "use_mtp",
)
# What ``generate`` and the methods that it calls name keys and values.
_CACHE: Any = cache_argument(
    inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)
_COMPUTED = ("inputs_embeds", "position_ids", "token_type_ids", "encoder_outputs")


@torch.no_grad()
def generate_causal(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
    task_ids: Tensor | None = None,
    prefix: PrefixCache | None = None,
    **kwargs: Any,
) -> Any:
    """What the decoder's ``generate`` gives for these arguments, behind the active prompt.

    ``generate`` of :class:`ept_fast.transformers.tasks.EPTModelForCausalLM`. Every token has its
    offset by its rank among the row's real tokens, generated ones too, up to ``max_length`` of the
    prompt's config; a token generated later than that gets none. With ``offset_tokens="given"`` in
    the config no generated token gets one.

    Args:
        model: the causal model.
        input_ids: ``[B, S]``, padded in any way.
        attention_mask: ``[B, S]`` of 0 and 1. By default zeros at the padding token if
            the generation config names one that does not end texts too, as ``generate`` does.
        inputs: another name of ``input_ids``.
        task_ids: ``[B]`` integers, for a bank of prompts.
        prefix: the prompt's keys and values, from ``prefix_cache()``: they are then not computed
            again. Every row needs a token; if there is padding, it comes between prompt and
            text, which has to be nothing to the model.
        **kwargs: of the backbone's ``generate``. ``max_length`` and ``min_length`` count text and
            new tokens; the prompt does not count.

    Returns:
        What ``generate`` returns: ``[B, S + new]``, the text as it was given and the new tokens, or
        an output object with such ``sequences``.

    Raises:
        TypeError: a backbone that cannot generate.
        ValueError: text longer than the offset covers or than the backbone has positions for; more
            new tokens than it has positions or a given cache has room for; an argument that is not
            supported behind a prompt.
        IndexError: an id outside the vocabulary.
    """
    input_ids = _ids(input_ids, inputs)
    if model.disabled:
        given = {"task_ids": task_ids, "prefix": prefix}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return model.backbone.generate(input_ids, attention_mask=attention_mask, **kwargs)
    backbone = _generating(model)
    if "generate" in vars(backbone):
        raise TypeError(
            f"model: expected the generate of {type(backbone).__name__}'s class, "
            f"got another one set on the model itself"
        )
    _refuse(backbone, kwargs)
    given_as, given = _given_cache(kwargs)
    if prefix is not None:
        prefix.check(model, task_ids)
        if given is not None:
            raise ValueError(f"{given_as}: expected None beside prefix, got a cache")
        if kwargs.get("use_cache") is None:
            kwargs["use_cache"] = True
    spliced, mask = _spliced(model, input_ids, attention_mask, task_ids, kwargs)
    prompt_first = prefix is not None or layout_of(given) == "prompt first"
    rows, text_mask = left_padded(spliced, mask, input_ids, prompt_first)
    lengths = ("max_length", "max_new_tokens")
    run = _Run(
        backbone,
        model.profile,
        model.active_prompt,
        rows,
        task_ids,
        default_length=all(_setting(backbone, kwargs, name) is None for name in lengths),
        prefix=prefix,
        given_as=given_as,
    )
    output = _view(backbone, run).generate(rows.input_ids, attention_mask=text_mask, **kwargs)
    sequences = output if isinstance(output, Tensor) else output.sequences
    copies = sequences.shape[0] // input_ids.shape[0]
    sequences[:, : rows.length] = input_ids.repeat_interleave(copies, 0)  # padded as it was given
    return output


@torch.no_grad()
def generate_seq2seq(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs: Tensor | None = None,
    task_ids: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """What the encoder-decoder's ``generate`` gives for these arguments, behind the active prompt.

    The prompt goes before the encoder's text. What is generated is the decoder's own and has no
    offset.

    Args:
        model: of the class :class:`ept_fast.transformers.tasks.EPTModelForSeq2SeqLM`.
        input_ids: ``[B, S]``, padded in any way.
        attention_mask: ``[B, S]`` of 0 and 1; by default as in :func:`generate_causal`.
        inputs: another name of ``input_ids``.
        task_ids: ``[B]`` integers, for a bank of prompts.
        **kwargs: of the backbone's ``generate``.

    Returns:
        What ``generate`` returns: the decoder's ids, or an output object with ``sequences``.

    Raises:
        TypeError: a backbone that cannot generate.
        ValueError: text longer than the offset covers or than the backbone has positions for.
        IndexError: an id outside the vocabulary.
    """
    input_ids = _ids(input_ids, inputs)
    if model.disabled:
        if task_ids is not None:
            kwargs["task_ids"] = task_ids
        return model.backbone.generate(input_ids, attention_mask=attention_mask, **kwargs)
    backbone = _generating(model)
    _refuse(backbone, kwargs, ())
    _given_cache(kwargs)
    spliced, mask = _spliced(model, input_ids, attention_mask, task_ids, kwargs)
    m = spliced.shape[1] - input_ids.shape[1]
    limit = model.profile.table_limit(m)
    if limit is not None and input_ids.shape[1] > limit:
        raise ValueError(
            f"input_ids: expected at most {limit} positions, which the model has without the "
            f"prompt's {m}, got {input_ids.shape[1]}"
        )
    _check_answer(backbone, model.profile.table_limit(0), kwargs)
    # Encoders count positions by column.
    rows, mask = right_padded(spliced, mask)
    return backbone.generate(inputs_embeds=rows, attention_mask=mask, **kwargs)


def _check_answer(backbone: Any, limit: int | None, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if the decoder's positions would run out."""
    if limit is None:
        return
    given = kwargs.get("decoder_input_ids")
    start = 1 if given is None else given.shape[1]
    new = _setting(backbone, kwargs, "max_new_tokens")
    length = _setting(backbone, kwargs, "max_length") if new is None else start + new
    if length is not None and length - 1 > limit:  # the last new token is not fed
        raise ValueError(
            f"max_length: expected at most {limit + 1} for the decoder's start and new tokens, for "
            f"which the model has positions, got {length}"
        )


def _generating(model: Any) -> Any:
    """The backbone, if it can generate now."""
    backbone = model.backbone
    if not isinstance(backbone, GenerationMixin):
        raise TypeError(
            f"model: expected a transformers model that can generate, got {type(backbone).__name__}"
        )
    if _CACHE is None:
        raise TypeError(
            f"transformers: expected a generate that takes cache or past_key_values, "
            f"got that of version {transformers.__version__}"
        )
    model.check_keeps_cache()
    return backbone


def _ids(input_ids: Tensor | None, inputs: Tensor | None) -> Any:
    """The token ids under whichever name they are given."""
    if (input_ids is None) == (inputs is None):
        got = "neither" if inputs is None else "both"
        raise ValueError(f"input_ids, inputs: expected exactly one of them, got {got}")
    return inputs if input_ids is None else input_ids


def _given_cache(kwargs: dict[str, Any]) -> tuple[str, Any]:
    """As :func:`take_cache`, with the keys and values put back under the name in ``generate``."""
    given_as, given = take_cache(kwargs)
    if given is not None:
        kwargs[_CACHE] = given
    return given_as, given


def _setting(backbone: Any, kwargs: dict[str, Any], name: str) -> Any:
    """A choice as ``generate`` finds it: its arguments, a given config, the model's config."""
    given = getattr(kwargs.get("generation_config"), name, None)
    own = getattr(backbone.generation_config, name, None)
    return next((v for v in (kwargs.get(name), given, own) if v is not None), None)


def _refuse(backbone: Any, kwargs: dict[str, Any], settings: tuple[str, ...] = _REFUSED) -> None:
    for name in _COMPUTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: expected None (generate takes input_ids), got one")
    for name in settings:
        value = _setting(backbone, kwargs, name)
        if value and not (name == "guidance_scale" and value == 1):
            raise ValueError(f"{name}: expected None behind a prompt, got {value!r}")
    if _setting(backbone, kwargs, "cache_implementation") == "paged":
        raise ValueError("cache_implementation: expected another one behind a prompt, got 'paged'")


def _spliced(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """``[B, m + S, d]`` as in a forward pass, and its mask ``[B, m + S]`` of int64."""
    if attention_mask is None and isinstance(input_ids, Tensor):
        pad, end = (_setting(model.backbone, kwargs, f"{n}_token_id") for n in ("pad", "eos"))
        attention_mask = mask_of_ids(input_ids, pad, end)
    spliced = model.splice(input_ids=input_ids, attention_mask=attention_mask, task_ids=task_ids)
    return spliced.inputs_embeds, spliced.attention_mask.long()


@dataclass(frozen=True)
class _Run:
    """What the view of a backbone has besides the backbone's own state.

    Attributes:
        backbone: what the view calls.
        profile: what is known of it.
        prompt: the active prompt.
        rows: prompt and text.
        task_ids: ``[B]``, for a bank of prompts.
        default_length: whether the caller left the length open.
        prefix: the prompt's keys and values, or None.
        given_as: the argument by which a cache was given, for messages.
    """

    backbone: Any
    profile: Profile
    prompt: Any
    rows: LeftPadded
    task_ids: Tensor | None
    default_length: bool
    prefix: PrefixCache | None
    given_as: str

    def new(self, input_ids: Tensor, ranks: Tensor, copies: int) -> Tensor:
        """Generated tokens ``[N, k]`` of these ranks: with the offset below n, else without.

        Without any, if the prompt's offsets are for given tokens only.
        """
        prompt = self.prompt
        embeds: Tensor = prompt.embedding(input_ids)
        a, b = prompt.offset_a, prompt.offset_b
        if a is None or embeds.numel() == 0 or prompt.config.offset_tokens == "given":
            return embeds
        covered = (ranks < a.shape[-2]).unsqueeze(-1)
        at = ranks.clamp_max(a.shape[-2] - 1)  # [N, k]
        tasks = None if self.task_ids is None else self.task_ids.repeat_interleave(copies, 0)
        if getattr(prompt, "some_only_given", False):  # a bank
            covered = covered & ~prompt.only_given[tasks].view(-1, 1, 1)
        row = (at,) if tasks is None else (tasks.unsqueeze(1), at)
        table = getattr(prompt, "offset_table", None)
        if table is not None:
            return (embeds + table[row] * covered).to(embeds.dtype)  # type: ignore[no-any-return]
        options: dict[str, Any] = {"scaling": prompt.config.scaling, "backend": prompt.backend}
        offset, head = a[row] * covered, self.rows.head[:, :1]
        if tasks is None:
            # All of them are spliced as one row of text, each with its own row of A as its offset.
            options["inputs_embeds"] = embeds.flatten(0, 1).unsqueeze(0)
            options["offset_a"], options["offset_b"] = offset.flatten(0, 1), b
            return splice_prompt(head[0], **options)[0, 1:].view_as(embeds)
        # Each row is a task of its own, with its own rows of A.
        options["offset_a"], options["offset_b"] = offset, b[tasks]
        options["task_ids"] = torch.arange(len(tasks), device=tasks.device)
        head = head.repeat_interleave(copies, 0)
        return splice_prompt(head, inputs_embeds=embeds, **options)[:, 1:]

    def check_length(self, config: Any) -> None:
        """Raise ValueError if positions would run out; shorten a length that nobody chose."""
        m, length = self.rows.num_virtual_tokens, self.rows.length
        limit = self.profile.table_limit(m)
        if limit is None:
            return
        # The last new token is not fed, and padding takes no position.
        limit += 1 + self.rows.least_empty
        if self.default_length and limit > length:
            config.max_length = min(config.max_length, limit)
        if config.max_length > limit:
            raise ValueError(
                f"max_length: expected at most {limit} for text and new tokens, as the prompt "
                f"takes {m} of the model's positions, got {config.max_length} "
                f"({length} and {config.max_length - length})"
            )

    def check_cache(self, cache: Any, config: Any) -> None:
        """Raise ValueError for a given cache that is too short or does not begin as the text does.

        One that holds the beginning of this conversation goes on from there.
        """
        m, length = self.rows.num_virtual_tokens, self.rows.length
        layers = [layer for layer in cache.layers if not getattr(layer, "is_sliding", False)]
        room = min(
            (getattr(layer, "max_cache_len", math.inf) for layer in layers), default=math.inf
        )
        if m + config.max_length - 1 > room:
            raise ValueError(
                f"{self.given_as}: expected room for {m + config.max_length - 1} positions (the "
                f"prompt's {m} and all but the last of max_length {config.max_length}), got {room}"
            )
        seen = int(cache.get_seq_length())
        if seen and not m <= seen < m + length:
            raise ValueError(
                f"{self.given_as}: expected {m} positions of the prompt and fewer than {length} "
                f"of the text, got {seen} positions"
            )
        padding = self.rows.most_padding
        if not seen:
            mark_layout(cache, "padding first")
        elif padding and layout_of(cache) == "text first":
            raise ValueError(
                f"{self.given_as}: expected rows of one length in a cache that a model's own call "
                f"made, which puts padding behind the text, got padding"
            )
        if self.rows.prompt_first:
            self.check_padding(config)
        if seen and (self.rows.moved or padding > seen - m):
            raise ValueError(
                f"attention_mask: expected padding on the left only, all of it in the columns "
                f"that {self.given_as} holds, got other padding"
            )

    def check_prefix(self, config: Any) -> None:
        """Raise ValueError for rows that cannot go behind a prompt that is computed already."""
        if self.rows.most_padding == self.rows.length:
            raise ValueError("input_ids: expected a token in every row beside prefix, got none")
        self.check_padding(config)

    def check_padding(self, config: Any) -> None:
        """Raise ValueError if there is padding between prompt and text that the model sees."""
        longest = self.rows.num_virtual_tokens + config.max_length
        limit = self.profile.column_free_length
        if self.rows.most_padding and longest > limit:
            raise ValueError(
                f"attention_mask: expected rows of one length behind a prompt that is computed "
                f"already, as this model tells columns apart in rows longer than {limit}, got "
                f"padding and {longest} columns"
            )

    def seed(self, cache: Any, copies: int) -> None:
        """Begin an empty cache with the prompt, ``copies`` times for each row."""
        assert self.prefix is not None
        if cache is None:
            raise ValueError("use_cache: expected True beside prefix, got False")
        slots = self.task_ids
        if slots is None:
            slots = self.rows.input_ids.new_zeros(len(self.rows.input_ids), dtype=torch.int64)
        self.prefix.write(cache, slots.repeat_interleave(copies, 0))


class _Prompted:
    """The methods of a view, before those of the backbone's class."""

    _ept_run: _Run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("input_ids") is not None:
            raise ValueError(
                "generate: expected a mode that prepares the model's inputs step by step, "
                "got one that calls the model with token ids, past the prompt"
            )
        return self._ept_run.backbone(**kwargs)

    def get_compiled_call(self, compile_config: Any) -> Any:
        """The backbone's, which it keeps from one call to the next."""
        return self._ept_run.backbone.get_compiled_call(compile_config)

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        next_sequence_length: int | None = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the backbone is fed: all columns that its cache does not hold, as embeddings."""
        run, m = self._ept_run, self._ept_run.rows.num_virtual_tokens
        if next_sequence_length is not None and not is_first_iteration:
            start = m + input_ids.shape[1] - next_sequence_length
        else:
            cache = kwargs.get(_CACHE)
            start = 0 if cache is None else int(cache.get_seq_length())
        rows, ranks = run.rows.inputs(input_ids, start, run.new)
        mask = run.rows.mask(attention_mask, input_ids)  # generate drops a mask of ones
        if mask is not None:
            kwargs["attention_mask"] = mask
        if position_ids is not None:
            kwargs["position_ids"] = ranks + run.profile.first_position
        prepare: Any = super().prepare_inputs_for_generation  # type: ignore[misc]
        if start == 0:
            return prepare(input_ids, inputs_embeds=rows, is_first_iteration=True, **kwargs)  # type: ignore[no-any-return]
        new = input_ids[:, input_ids.shape[1] - rows.shape[1] :]
        inputs = prepare(new, is_first_iteration=is_first_iteration, **kwargs)
        return {**inputs, "input_ids": None, "inputs_embeds": rows}

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Room for the prompt; here all lengths are known, and nothing has been computed yet."""
        run = self._ept_run
        run.check_length(generation_config)
        given = model_kwargs.get(_CACHE)
        if given is not None:
            run.check_cache(given, generation_config)
        max_cache_length += run.rows.num_virtual_tokens
        prepare: Any = super()._prepare_cache_for_generation  # type: ignore[misc]
        prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        if run.prefix is not None:
            run.check_prefix(generation_config)
            copies = max(generation_config.num_beams, generation_config.num_return_sequences)
            run.seed(model_kwargs.get(_CACHE), copies)


@functools.cache
def _view_class(kind: Any) -> Any:
    # transformers goes by the names of classes in places.
    return type(kind.__name__, (_Prompted, kind), {"__module__": kind.__module__})


def _view(backbone: Any, run: _Run) -> Any:
    """The backbone's state under a class that generates behind the prompt."""
    kind: Any = type(backbone)
    view = object.__new__(_view_class(kind))
    vars(view).update(vars(backbone), _ept_run=run)
    return view
