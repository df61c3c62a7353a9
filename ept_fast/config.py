"""The sizes and choices of a prompt, validated once: those of every method, and EPT's."""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ept_fast.ops.activations import ACTIVATIONS
from ept_fast.storage.untrusted import shorten

__all__ = [
    "GATES",
    "OFFSET_TOKENS",
    "EPTConfig",
    "PromptConfig",
    "check_choice",
    "check_count",
    "check_flag",
    "check_number",
]

GATES = ("token", "prompt")
OFFSET_TOKENS = ("all", "given")
EPT = "ept"  # the method of files that do not name one


def check_count(name: str, value: object, minimum: int) -> None:
    """Raise unless ``value`` is an integer (no bool) of at least ``minimum`` that int64 holds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {shorten(value)}")
    if value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {shorten(value)}")
    if value >= 2**63:
        raise ValueError(f"{name}: expected an integer < 2^63, got {shorten(value)}")


def check_number(name: str, value: object, *, positive: bool = False) -> None:
    """Raise unless ``value`` is a finite real number (no bool), above zero if asked."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        got = f"{type(value).__name__} {shorten(value)}"
        raise TypeError(f"{name}: expected a real number, got {got}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond the range of a float
        finite = False
    if not finite or (positive and value <= 0):
        expected = "a finite number > 0" if positive else "a finite number"
        raise ValueError(f"{name}: expected {expected}, got {shorten(value)}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {shorten(value)}")


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__} {shorten(value)}")


@dataclass(frozen=True)
class PromptConfig:
    """The sizes and choices of a prompt: what every method has.

    A method's config is a frozen dataclass below this one. A method that adds a low-rank offset to
    the text has the fields ``rank`` and ``max_length`` and the property ``scaling``; and
    ``offset_tokens``, if some tokens may go without.

    Attributes:
        prompt_type: the method's name, in files and in the registry.
        methods: its names on the command line; ``prompt_type`` alone if there are none.
        solved: the integer field that :meth:`for_method` solves from a budget, if there is one; the
            config has the property ``num_parameters`` then.
        hidden_size: d, width of the backbone's embeddings.
        num_virtual_tokens: m, length of the prompt that the backbone sees.
    """

    prompt_type: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = ()
    solved: ClassVar[str | None] = None
    rank = 0
    max_length = 2**63 - 1
    offset_tokens = "all"

    hidden_size: int
    num_virtual_tokens: int = 20

    def __post_init__(self) -> None:
        check_count("hidden_size", self.hidden_size, 1)
        check_count("num_virtual_tokens", self.num_virtual_tokens, 1)

    @property
    def scaling(self) -> float:
        """The factor of the offset; 0 without one."""
        return 0.0

    @property
    def num_parameters(self) -> int | None:
        """Trainable parameters of one prompt; None if the method does not say."""
        return None

    @property
    def initial_rows(self) -> int:
        """How many rows the initial values are made from; at least m + r."""
        return self.num_virtual_tokens

    @classmethod
    def tokens_of(cls, method: str, prompt_length: int, num_virtual_tokens: int) -> int:
        """m of :meth:`for_method`, which a run needs before it knows ``max_length``."""
        return num_virtual_tokens

    @classmethod
    def for_method(
        cls, method: str, hidden_size: int, prompt_length: int, **settings: Any
    ) -> PromptConfig:
        """The config of a training run: the settings that are fields of the config, and the rest.

        The field ``solved`` gets the largest value that the budget allows, unless it is given.

        Args:
            method: which of ``methods``.
            hidden_size: d.
            prompt_length: l; the budget is l·d parameters.
            **settings: fields of the config, and ``max_length``. Those that :class:`EPTConfig` has
                and this config has not are left out.

        Raises:
            ValueError: settings that the method cannot have, or that cost more than the budget.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        of_ept = {field.name for field in dataclasses.fields(EPTConfig)}
        foreign = sorted(settings.keys() - known - of_ept)
        if foreign:
            raise ValueError(
                f"settings: expected fields of the method {method} ({', '.join(sorted(known))}), "
                f"got {shorten(foreign)}"
            )
        given = {name: value for name, value in settings.items() if name in known}
        given = {**cls.choices_of(method), **given}
        solved, budget = cls.solved, prompt_length * hidden_size
        config = cls(hidden_size, **(given if solved is None else {solved: 1, **given}))
        least = config.num_parameters
        if least is not None and least > budget:
            raise ValueError(
                f"prompt_length: expected a budget of at least {least} parameters for {config}, "
                f"got {prompt_length} * {hidden_size} = {budget}"
            )
        if solved is None or solved in given:
            return config

        def fits(size: int) -> bool:
            try:
                count = dataclasses.replace(config, **{solved: size}).num_parameters
            except ValueError:  # beyond what the field may be
                return False
            return count is not None and count <= budget

        most = 1
        while fits(2 * most):
            most *= 2
        # most fits and 2 * most does not: the largest that fits, by halving what lies between
        size = bisect.bisect(range(most, 2 * most), False, key=lambda n: not fits(n)) + most - 1
        return dataclasses.replace(config, **{solved: size})

    @classmethod
    def choices_of(cls, method: str) -> dict[str, Any]:
        """The fields that one of ``methods`` stands for."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values; with ``prompt_type``, if the method is not EPT."""
        kind = {} if self.prompt_type == EPT else {"prompt_type": self.prompt_type}
        return {**kind, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config with these fields; an unknown or a missing required name is an error."""
        values = dict(values)
        kind = values.pop("prompt_type", EPT)
        if kind != cls.prompt_type:
            raise ValueError(f"prompt_type: expected {cls.prompt_type}, got {shorten(kind)}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"config: expected the fields {sorted(known)}, got also {shorten(unknown)}"
            )
        if "hidden_size" not in values:
            raise ValueError("config: expected the field hidden_size, got none")
        return cls(**values)

    def to_json(self) -> str:
        """All fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config that :meth:`to_json` wrote.

        Raises:
            ValueError: not a JSON object, unknown fields, or a field out of its range.
            TypeError: a field of the wrong type.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"config: expected a JSON object, got text that is not JSON ({error})"
            ) from None
        if not isinstance(values, dict):
            raise ValueError(f"config: expected a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


@dataclass(frozen=True)
class EPTConfig(PromptConfig):
    """Sizes and choices of an EPT prompt; the symbols are METHOD's.

    ``rank=0`` leaves out the offset and the fusion, ``num_spaces=0`` the subspaces, so plain prompt
    tuning is ``EPTConfig(d, num_virtual_tokens=l, rank=0, num_spaces=0)`` and DePT is
    ``fusion=False, num_spaces=0``. The default sizes are this project's choice.

    Attributes:
        hidden_size: d, width of the backbone's embeddings.
        num_virtual_tokens: m, length of the short prompt.
        max_length: n, text positions that the offset covers; with rank > 0, longer text is an
            error.
        rank: r, rank of the offset; at most ``min(max_length, hidden_size)``.
        num_spaces: K, number of subspaces.
        space_dim: h, width of each subspace.
        alpha: the offset is scaled by alpha / sqrt(rank).
        activation: φ, a name of :data:`ept_fast.ops.activations.ACTIVATIONS`, such as
            ``"gelu"``.
        gate: ``"token"`` or ``"prompt"``.
        temperature: τ > 0, divides the gate's logits.
        fusion: whether the short prompt attends to the offset.
        offset_tokens: of a causal language model, the tokens that get the offset: ``"all"``, or
            those that are ``"given"``. These stand before the first labelled token of a row;
            without labels they are all of the text but what ``generate`` adds. Other models do not
            generate behind the prompt: all of their text is given, whatever this says, and without
            an offset (rank 0) it says nothing.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a field out of its range.

    Example:
        >>> EPTConfig.from_budget(768, prompt_length=100).num_parameters <= 100 * 768
        True
    """

    prompt_type: ClassVar[str] = EPT
    methods: ClassVar[tuple[str, ...]] = ("ept", "dept", "pt")

    hidden_size: int
    num_virtual_tokens: int = 20
    max_length: int = 256
    rank: int = 24
    num_spaces: int = 4
    space_dim: int = 4
    alpha: float = 8.0
    activation: str = "gelu"
    gate: str = "token"
    temperature: float = 1.0
    fusion: bool = True
    offset_tokens: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("max_length", self.max_length, 1)
        check_count("rank", self.rank, 0)
        check_count("num_spaces", self.num_spaces, 0)
        check_count("space_dim", self.space_dim, 1)
        check_number("alpha", self.alpha)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("gate", self.gate, GATES)
        check_number("temperature", self.temperature, positive=True)
        check_flag("fusion", self.fusion)
        check_choice("offset_tokens", self.offset_tokens, OFFSET_TOKENS)
        most = min(self.max_length, self.hidden_size)
        if self.rank > most:
            raise ValueError(
                f"rank: expected at most min(max_length {self.max_length}, hidden_size "
                f"{self.hidden_size}) = {most}, got {self.rank}"
            )

    @property
    def scaling(self) -> float:
        """c = alpha / sqrt(rank), the factor of A·B; 0 without an offset."""
        return self.alpha / math.sqrt(self.rank) if self.rank else 0.0

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of one prompt: m·d + (n + d)·r + K·(2·d·h + d + 1)."""
        return (
            self.num_virtual_tokens * self.hidden_size
            + (self.max_length + self.hidden_size) * self.rank
            + _space_parameters(self.hidden_size, self.num_spaces, self.space_dim)
        )

    @property
    def initial_rows(self) -> int:
        """As many as the plain prompt of the same budget has: the offset starts from those."""
        if not self.rank:
            return self.num_virtual_tokens
        budget = -(-self.num_parameters // self.hidden_size)
        return max(budget, self.num_virtual_tokens + self.rank)

    @classmethod
    def tokens_of(cls, method: str, prompt_length: int, num_virtual_tokens: int) -> int:
        """The whole budget of ``"pt"``, else the short prompt."""
        return prompt_length if method == "pt" else num_virtual_tokens

    @classmethod
    def for_method(
        cls, method: str, hidden_size: int, prompt_length: int, **settings: Any
    ) -> EPTConfig:
        """The config whose rank is solved from the budget, as in :meth:`from_budget`.

        Args:
            method: ``"ept"``; ``"dept"``, without fusion and subspaces; ``"pt"``, a plain prompt.
            hidden_size: d.
            prompt_length: l.
            **settings: fields of the config.

        Raises:
            ValueError: the sizes cost more than the budget, or leave a rank of 0 if the method
                has an offset.
        """
        if method == "pt":
            kept = ("max_length", "alpha", "offset_tokens")
            settings = {name: settings[name] for name in kept if name in settings}
            settings |= {"rank": 0, "num_spaces": 0, "space_dim": 1}
            return cls(hidden_size, num_virtual_tokens=prompt_length, **settings)
        if method == "dept":
            settings = {**settings, "num_spaces": 0, "space_dim": 1, "fusion": False}
        config = cls.from_budget(hidden_size, prompt_length, **settings)
        if config.rank == 0:
            raise ValueError(
                f"prompt_length: expected a budget that leaves a rank >= 1 for the offset, got "
                f"{prompt_length} tokens for {config.num_virtual_tokens} virtual tokens, "
                f"{config.num_spaces} spaces of width {config.space_dim} and "
                f"{config.max_length} positions"
            )
        return config

    @classmethod
    def from_budget(
        cls,
        hidden_size: int,
        prompt_length: int = 100,
        *,
        num_virtual_tokens: int = num_virtual_tokens,
        max_length: int = max_length,
        num_spaces: int = num_spaces,
        space_dim: int = space_dim,
        **choices: Any,
    ) -> EPTConfig:
        """The config whose rank uses up what a plain prompt of ``prompt_length`` tokens would cost.

        Args:
            hidden_size: d.
            prompt_length: l; the budget is l·d parameters.
            num_virtual_tokens: m < l.
            max_length: n.
            num_spaces: K.
            space_dim: h.
            **choices: ``alpha``, ``activation``, ``gate``, ``temperature``, ``fusion``,
                ``offset_tokens``.

        Returns:
            A config with ``num_parameters <= prompt_length * hidden_size`` and the largest such
            rank (at most ``min(max_length, hidden_size)``).

        Raises:
            ValueError: the short prompt and the subspaces alone cost more than the budget.
        """
        check_count("prompt_length", prompt_length, 1)
        if "rank" in choices:
            raise TypeError("rank: from_budget solves for it, got it as an argument")
        base = cls(
            hidden_size,
            num_virtual_tokens=num_virtual_tokens,
            max_length=max_length,
            rank=0,
            num_spaces=num_spaces,
            space_dim=space_dim,
            **choices,
        )
        budget = prompt_length * hidden_size
        left = budget - base.num_parameters
        if left < 0:
            raise ValueError(
                f"prompt_length: expected a budget of at least {base.num_parameters} parameters "
                f"for {num_virtual_tokens} virtual tokens and {num_spaces} spaces of width "
                f"{space_dim}, got {prompt_length} * {hidden_size} = {budget}"
            )
        rank = min(left // (max_length + hidden_size), max_length, hidden_size)
        return dataclasses.replace(base, rank=rank)


def _space_parameters(hidden_size: int, num_spaces: int, space_dim: int) -> int:
    return num_spaces * (2 * hidden_size * space_dim + hidden_size + 1)
