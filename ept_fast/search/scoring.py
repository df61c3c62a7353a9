"""Candidate prompts times texts, scored by a frozen model in as few forwards as memory allows."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from ept_fast.checks import check_input_ids, check_splice_values, values_are_checked
from ept_fast.config import check_choice, check_count, check_number
from ept_fast.ops.functional import splice_prompt
from ept_fast.ops.types import SpliceInputs
from ept_fast.prompts.embedding import is_plain_table
from ept_fast.transformers.backbone import Profile, check_backbone, embedding_width, text_config
from ept_fast.transformers.outputs import replace_fields
from ept_fast.transformers.padding import Rows, Text, ranks_of, real_tokens

__all__ = ["CandidateScorer", "Head", "LabelEmbeddings", "LabelWords", "Readout"]

PROMPT_FIRST, TEXT_FIRST = ORDERS = ("prompt text", "text prompt")
_POOLINGS = ("mean", "first", "last")


@dataclass(frozen=True)
class Head:
    """A frozen classifier on one state of each row, such as the linear head of an EPTModel.

    Attributes:
        module: maps states ``[R, h]``, in float32 at least, to logits ``[R, C]``.
        pooling: of the text's last hidden states: their ``"mean"``, the ``"first"`` or the
            ``"last"``. Where the prompt stands after the text, ``"last"`` is its last token.

    Raises:
        ValueError: another pooling.
    """

    module: Callable[[Tensor], Tensor]
    pooling: str = "mean"

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, _POOLINGS)

    def __call__(self, states: Tensor) -> Tensor:
        """Logits ``[R, C]`` of states ``[R, h]``."""
        return self.module(states)


@dataclass(frozen=True)
class LabelEmbeddings:
    """Cosine of a row's state to an embedding of each class, as of a sentence encoder.

    Attributes:
        embeddings: ``[C, h]``.
        scale: what the cosines are multiplied by.
        pooling: as of :class:`Head`.

    Raises:
        TypeError, ValueError: another pooling, a scale that is no positive number, a tensor of
            another shape.
    """

    embeddings: Tensor
    scale: float = 20.0
    pooling: str = "mean"

    def __post_init__(self) -> None:
        check_choice("pooling", self.pooling, _POOLINGS)
        check_number("scale", self.scale, positive=True)
        if self.embeddings.dim() != 2:
            got = list(self.embeddings.shape)
            raise ValueError(f"embeddings: expected shape [C, h], got {got}")

    def __call__(self, states: Tensor) -> Tensor:
        """Logits ``[R, C]`` of states ``[R, h]``."""
        classes = F.normalize(self.embeddings.to(states), dim=-1)
        return self.scale * F.normalize(states, dim=-1) @ classes.T


@dataclass(frozen=True)
class LabelWords:
    """The language model's own logits of one word for each class.

    Attributes:
        token_ids: ``[C]`` integers.
        mask_token_id: the answer is read where the text has this token, once; None: at the last
            real token of the row.

    Raises:
        TypeError: ``token_ids`` that are no integers.
        ValueError: ``token_ids`` of another shape.
    """

    token_ids: Tensor
    mask_token_id: int | None = None

    def __post_init__(self) -> None:
        _check_ids("token_ids", self.token_ids, ("C",))

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits ``[R, C]`` of those of the vocabulary, ``[R, V]``."""
        return logits.index_select(1, self.token_ids.to(logits.device))


Readout = Head | LabelEmbeddings | LabelWords


class CandidateScorer:
    """Class logits of every text behind, or before, every candidate prompt.

    A chunk is one forward of the frozen model over up to ``max_rows`` pairs. With the prompt first,
    the bank's splice writes the chunk: each row names its candidate by ``task_ids``, and the
    texts are looked up in the frozen table as they are written. With the prompt last, which needs a
    causal model, the keys and values of the texts are computed once and shared by all candidates.
    Texts of like length go together, so that little of a chunk is padding. Neither the side nor the
    amount of padding changes a result, and a result is that of the pair alone, to rounding.

    Args:
        backbone: a model of ``transformers`` in evaluation mode; it is not changed. ``Head`` and
            ``LabelEmbeddings`` take its base model's states, ``LabelWords`` needs its
            language-model head.
        readout: what makes class logits: :class:`Head`, :class:`LabelEmbeddings` or
            :class:`LabelWords`.
        order: ``"prompt text"``, or ``"text prompt"`` with the answer read at the prompt's last
            token.
        max_rows: the most pairs in one forward.
        backend: as of :func:`ept_fast.splice_prompt`.

    Raises:
        TypeError, ValueError: a backbone that cannot be called with embeddings, is in training mode
            or keeps no keys and values where the prompt stands last; other arguments that do not
            fit.

    Example:
        >>> import transformers
        >>> config = transformers.BertConfig(
        ...     vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=16)
        >>> encoder = transformers.BertModel(config).eval()
        >>> scorer = CandidateScorer(encoder, LabelEmbeddings(torch.eye(3, 8)))
        >>> scorer(torch.tensor([[5, 6], [7, 8]]), torch.tensor([[1, 2, 3]])).shape
        torch.Size([2, 1, 3])
    """

    def __init__(
        self,
        backbone: Any,
        readout: Readout,
        *,
        order: str = PROMPT_FIRST,
        max_rows: int = 64,
        backend: str | None = None,
    ) -> None:
        kind = type(readout)
        if kind not in (Head, LabelEmbeddings, LabelWords):
            names = "Head, LabelEmbeddings or LabelWords"
            raise TypeError(f"readout: expected {names}, got {kind.__name__}")
        words = kind is LabelWords
        check_choice("order", order, ORDERS)
        check_count("max_rows", max_rows, 1)
        if words and getattr(backbone, "get_output_embeddings", lambda: None)() is None:
            raise TypeError(
                f"backbone: expected a model with a language-model head for LabelWords, "
                f"got {type(backbone).__name__}"
            )
        model = backbone if words else getattr(backbone, "base_model", backbone)
        check_backbone(model, "CAUSAL_LM" if words else "FEATURE_EXTRACTION")
        if backbone.training:
            raise ValueError("backbone: expected evaluation mode (backbone.eval()), got training")
        self.backbone = model
        self.readout = readout
        self.order = order
        self.max_rows = max_rows
        self.backend = backend
        self.profile = Profile.of(model)
        if order == TEXT_FIRST:
            self._check_text_first()

    def _check_text_first(self) -> None:
        profile, readout = self.profile, self.readout
        # Some causal models say so in the config, some in their attention.
        causal = getattr(text_config(self.backbone), "is_decoder", None) is not False or any(
            getattr(module, "is_causal", False) for module in self.backbone.modules()
        )
        if not causal or profile.other_layers or profile.cache_argument is None:
            raise ValueError(
                f'order: expected "prompt text" for a model that is not a causal one with keys and '
                f'values in every layer, got "text prompt" for {profile.name}'
            )
        if isinstance(readout, LabelWords):
            if readout.mask_token_id is not None:
                raise ValueError(
                    f'mask_token_id: expected None for order "text prompt", which reads the '
                    f"answer at the prompt's last token, got {readout.mask_token_id}"
                )
        elif readout.pooling != "last":
            raise ValueError(
                f'pooling: expected "last" for order "text prompt", got {readout.pooling!r}'
            )

    @torch.no_grad()
    def __call__(
        self,
        prompts: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Score all candidates on all texts, without gradients.

        Args:
            prompts: token ids ``[N, m]``, or soft prompts ``[N, m, d]``. With the prompt first, m
                may be 0: the texts alone.
            input_ids: ``[B, S]`` integers, padded on either side.
            attention_mask: ``[B, S]`` of 0 and 1; ones by default.
            token_type_ids: ``[B, S]``, for backbones that have them; the prompt's are 0.

        Returns:
            Logits ``[N, B, C]``, in float32 at least.

        Raises:
            TypeError, ValueError: tensors that do not fit, no candidate or no text, a text without
                a token, more positions than the model has, a text without its one mask token.
            IndexError: an id outside the vocabulary.
        """
        embeds = self._embedded(prompts)
        rows, mask = self._checked(input_ids, attention_mask, token_type_ids, embeds.shape[1])
        counts = real_tokens(mask)
        by_length = counts.argsort(stable=True)
        # Real tokens to one side, in their order: before the prompt, whatever counts columns counts
        # the same from each of them.
        first = self.order == PROMPT_FIRST
        columns = (mask == 0 if first else mask).argsort(dim=1, stable=True)
        score = self._prompt_first if first else self._text_first
        found = []
        for some in torch.split(by_length, max(1, self.max_rows // len(embeds))):
            longest = int(counts[some[-1]])
            kept = columns[some, :longest] if first else columns[some, -longest:]
            ids, real, kinds = (t if t is None else t[some].gather(1, kept) for t in rows)
            assert ids is not None
            assert real is not None
            parts = score(torch.split(embeds, self.max_rows), ids, real, kinds)
            found.append(torch.cat([part.view(-1, len(some), part.shape[1]) for part in parts]))
        return torch.cat(found, 1).index_select(1, by_length.argsort())

    def _embedded(self, prompts: Tensor) -> Tensor:
        """The candidates' embeddings, ``[N, m, d]``."""
        layer = self.backbone.get_input_embeddings()
        if not isinstance(prompts, Tensor):
            raise TypeError(f"prompts: expected a tensor, got {type(prompts).__name__}")
        if prompts.is_floating_point():
            width = embedding_width(self.backbone)
            _check_shape("prompts", prompts, ("N", "m", width))
            embeds = prompts
        else:
            _check_ids("prompts", prompts, ("N", "m"))
            size = int(layer.weight.shape[0])
            if values_are_checked(prompts.device) and prompts.numel():
                low, high = (int(v) for v in torch.aminmax(prompts))
                if low < 0 or high >= size:
                    got = low if low < 0 else high
                    raise IndexError(f"prompts: expected ids from 0 to {size - 1}, got {got}")
            embeds = layer(prompts)
        least = 0 if self.order == PROMPT_FIRST else 1
        if embeds.shape[0] == 0 or embeds.shape[1] < least:
            shape = list(prompts.shape)
            raise ValueError(f"prompts: expected N >= 1 and m >= {least}, got shape {shape}")
        return embeds

    def _checked(
        self, input_ids: Tensor, mask: Tensor | None, kinds: Tensor | None, m: int
    ) -> tuple[tuple[Tensor | None, ...], Tensor]:
        """Ids, mask and token types ``[B, S]``, and the mask in int64."""
        check_input_ids(input_ids, None)
        shape = tuple(input_ids.shape)
        for name, tensor in (("attention_mask", mask), ("token_type_ids", kinds)):
            if tensor is not None:
                _check_shape(name, tensor, shape, f" to match input_ids {list(shape)}")
        if values_are_checked(input_ids.device):
            table = self.backbone.get_input_embeddings().weight
            check_splice_values(SpliceInputs(table, input_ids, table, None, None, None, mask, None))
        real = torch.ones_like(input_ids) if mask is None else (mask != 0).long()
        counts = real_tokens(real)
        if len(counts) == 0 or int(counts.min()) == 0:
            got = f"none in row {int(counts.argmin())}" if len(counts) else "no text"
            raise ValueError(
                f"input_ids: expected at least one real token in every text, got {got}"
            )
        limit = self.profile.table_limit(m)
        if limit is not None and int(counts.max()) > limit:
            raise ValueError(
                f"input_ids: expected at most {limit} tokens (the model's "
                f"{self.profile.max_position_embeddings} positions without the prompt's {m}), "
                f"got {int(counts.max())}"
            )
        token = getattr(self.readout, "mask_token_id", None)
        if token is not None:
            found = ((input_ids == token) & (real != 0)).sum(1)
            if bool((found != 1).any()):
                row = int((found != 1).nonzero()[0])
                raise ValueError(
                    f"input_ids: expected one mask token {token} in every text, "
                    f"got {int(found[row])} in row {row}"
                )
        return (input_ids, real, kinds), real

    def _prompt_first(
        self, chunks: tuple[Tensor, ...], ids: Tensor, mask: Tensor, kinds: Tensor | None
    ) -> Iterator[Tensor]:
        """The logits ``[n·b, C]`` of each chunk ``[n, m, d]`` before texts padded on the right."""
        layer, (b, _) = self.backbone.get_input_embeddings(), ids.shape
        plain = is_plain_table(layer)
        looked_up = None if plain else layer(ids)  # scaled or quantised layers do it themselves
        for prompts in chunks:
            n, m, _ = prompts.shape
            tasks = torch.arange(n, device=ids.device).repeat_interleave(b)
            many, real = ids.repeat(n, 1), mask.repeat(n, 1)
            embeds = splice_prompt(
                prompts,
                input_ids=many if plain else None,
                weight=layer.weight if plain else None,
                inputs_embeds=None if looked_up is None else looked_up.repeat(n, 1, 1),
                attention_mask=real,
                task_ids=tasks,
                backend=self.backend,
            )
            whole = F.pad(real, (m, 0), value=1)
            text = Text(many, None, real, None if kinds is None else kinds.repeat(n, 1))
            rows = Rows.of((embeds, whole, ranks_of(whole)), text, m)
            inputs = self.profile.inputs(
                *rows[:3], token_type_ids=rows.token_type_ids, use_cache=False
            )
            if isinstance(self.readout, LabelWords):
                token = self.readout.mask_token_id
                at = real_tokens(real) - 1 if token is None else (many == token).int().argmax(1)
                yield self.readout(self._words(inputs, at + m))
            else:
                states = self.backbone(**inputs).last_hidden_state
                yield self._logits(rows.pooled(states, self.readout.pooling))

    def _text_first(
        self, chunks: tuple[Tensor, ...], ids: Tensor, mask: Tensor, kinds: Tensor | None
    ) -> Iterator[Tensor]:
        """The logits ``[n·b, C]`` of each chunk ``[n, m, d]`` behind texts padded on the left."""
        profile, name = self.profile, str(self.profile.cache_argument)
        cache = DynamicCache(config=text_config(self.backbone))
        caching = {"use_cache": True, name: cache, "token_type_ids": kinds, "logits_to_keep": 1}
        embeds = self.backbone.get_input_embeddings()(ids)
        self.backbone(**profile.inputs(embeds, mask, ranks_of(mask), **caching))
        for prompts in chunks:
            n, m, _ = prompts.shape
            b = len(ids)
            whole = F.pad(mask, (0, m), value=1)
            ranks = ranks_of(whole)[:, -m:].repeat(n, 1)
            inputs = profile.inputs(
                prompts.to(embeds.dtype).repeat_interleave(b, 0),
                whole.repeat(n, 1),
                ranks,
                use_cache=True,
                **{name: _shared(cache, n)},
            )
            if isinstance(self.readout, LabelWords):
                last = torch.full((n * b,), m - 1, device=ids.device)
                yield self.readout(self._words(inputs, last))
            else:
                yield self._logits(self.backbone(**inputs).last_hidden_state[:, -1])

    def _logits(self, states: Tensor) -> Tensor:
        assert not isinstance(self.readout, LabelWords)
        return self.readout(states.to(torch.promote_types(states.dtype, torch.float32)))

    def _words(self, inputs: dict[str, Any], at: Tensor) -> Tensor:
        """The vocabulary's logits ``[R, V]`` at columns ``[R]``: the head reads no other column."""
        rows = torch.arange(len(at), device=at.device)

        def picked(module: Any, args: Any, output: Any) -> Any:
            states = output.last_hidden_state[rows, at].unsqueeze(1)
            return replace_fields(output, last_hidden_state=states)

        with _hooked(self.backbone.base_model, picked):
            logits: Tensor = self.backbone(**inputs).logits
        # A model whose head reads states of another module gives all columns.
        chosen = logits[:, 0] if logits.shape[1] == 1 else logits[rows, at]
        return chosen.to(torch.promote_types(chosen.dtype, torch.float32))


@contextlib.contextmanager
def _hooked(module: Any, hook: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _shared(cache: Any, n: int) -> Any:
    """The cache of n times its rows, one copy after another; what it holds stays as it is."""
    wide = copy.copy(cache)
    wide.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in wide.layers:
        for name in ("keys", "values"):
            held = getattr(layer, name)
            setattr(layer, name, held.expand(n, *held.shape).flatten(0, 1))
    return wide


def _check_shape(name: str, tensor: Tensor, shape: tuple[int | str, ...], why: str = "") -> None:
    """Integers in ``shape`` must match; strings are free."""
    fits = tensor.dim() == len(shape) and all(
        isinstance(size, str) or size == got for size, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        sizes = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape [{sizes}]{why}, got {list(tensor.shape)}")


def _check_ids(name: str, ids: object, shape: tuple[int | str, ...]) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: expected a tensor of int64 or int32, got {got}")
    _check_shape(name, ids, shape)
