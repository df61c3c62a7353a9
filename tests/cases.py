"""Random inputs of the two operations, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ept_fast import reconstruct_and_splice, reconstruct_prompt, splice_prompt
from ept_fast.config import GATES
from ept_fast.ops import activations
from ept_fast.ops.types import OF_EPT, Parameters, SpliceInputs

__all__ = ["GATES"]

SEVEN, BIASES = Parameters._fields[:OF_EPT], Parameters._fields[OF_EPT:]
ACTIVATIONS = tuple(activations.ACTIVATIONS)
PADDINGS = ("none", "right", "left", "holes", "rows")
LAYOUTS = ("plain", "transposed", "reversed axes", "sliced", "shifted", "wide rows")
PARTS: dict[str, dict[str, bool]] = {
    "all": {},
    "no fusion": {"fusion": False},
    "no spaces": {"spaces": False},
    "no offset": {"offset": False},
    "prompt only": {"offset": False, "spaces": False},
}
# What operation 1 alone has.
BIASED: dict[str, dict[str, bool]] = {
    "biases": {"biases": True},
    "biases, no gate": {"biases": True, "gated": False},
    "biases, no offset, no gate": {"biases": True, "gated": False, "offset": False},
    "no gate": {"gated": False},
}
# Of the embeddings and of the parameters.
TYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16 table": (torch.bfloat16, torch.float32),
    "fp16 table": (torch.float16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16 parameters": (torch.float32, torch.bfloat16),
    "fp16 parameters": (torch.float32, torch.float16),
    "fp16 table, bf16 parameters": (torch.float16, torch.bfloat16),
    "bf16 table, fp16 parameters": (torch.bfloat16, torch.float16),
}


@dataclass(frozen=True)
class Sizes:
    """METHOD's symbols; ``tasks=None``: no task axis."""

    m: int = 3
    n: int = 7
    r: int = 2
    k: int = 2
    h: int = 3
    d: int = 5
    batch: int = 4
    length: int = 6
    vocabulary: int = 11
    tasks: int | None = None


# What the tests of several files run over.
SHAPES = {
    "one": Sizes(m=1, n=1, r=1, k=1, h=1, d=1, batch=1, length=1),
    "prime": Sizes(m=7, n=29, r=5, k=3, h=5, d=37, batch=5, length=23),
    "bank": Sizes(m=5, n=17, r=3, k=2, h=4, d=24, batch=7, length=13, tasks=3),
    "more tasks than rows": Sizes(m=3, n=7, r=2, k=2, h=3, d=19, batch=2, length=5, tasks=4),
}
# More than one tile of everything: tokens, positions, channels, rank, columns of the spaces.
TILES = {
    "eager": {"tiles": Sizes(m=4, n=700, r=6, k=2, h=4, d=512, batch=3, length=601)},
    "triton": {
        "tiles": Sizes(m=17, n=66, r=17, k=3, h=11, d=66, batch=2, length=33),
        "rows": Sizes(m=3, n=5, r=2, k=1, h=2, d=9, batch=9, length=5),
    },
    "host": {
        "tiles": Sizes(m=37, n=70, r=35, k=3, h=12, d=136, batch=9, length=67),
        "a bank of tiles": Sizes(m=9, n=40, r=18, k=2, h=9, d=264, batch=6, length=35, tasks=3),
    },
}
# Sizes that results are named after, with a vocabulary cut to what a test needs.
NAMED = {
    "t5-base": Sizes(m=40, n=256, r=30, k=4, h=8, d=768, batch=32, length=256, vocabulary=4096),
    "llama-8b": Sizes(60, 2048, 24, 4, 16, 4096, batch=8, length=2048, vocabulary=4096),
    "long": Sizes(60, 32768, 24, 4, 16, 4096, batch=1, length=32768, vocabulary=4096),
    "bank": Sizes(40, 256, 30, 4, 8, 768, batch=64, length=256, vocabulary=4096, tasks=64),
}
# All limits of the kernels at once.
LARGEST = {
    "one prompt": Sizes(m=512, n=32768, r=256, k=8, h=64, d=16384, batch=2, length=32768),
    "many spaces": Sizes(m=512, n=32768, r=256, k=512, h=1, d=16384, batch=2, length=32768),
    "a bank": Sizes(m=100, n=256, r=30, k=4, h=8, d=768, batch=64, length=256, tasks=4096),
    "more rows": Sizes(m=20, n=64, r=8, k=2, h=8, d=256, batch=8192, length=64, tasks=4096),
}


@dataclass(frozen=True)
class Case:
    """Arguments of both operations; ``flags`` are those of the first.

    With ``prompt_rows`` there is the second alone, and ``short_prompt`` is the rows to choose from.
    """

    sizes: Sizes
    parameters: dict[str, Tensor]
    weight: Tensor
    input_ids: Tensor
    attention_mask: Tensor | None
    task_ids: Tensor | None
    flags: dict[str, Any] = field(default_factory=dict)
    prompt_rows: Tensor | None = None

    def each_parameter(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The case with every parameter changed, new leaves of the graph."""
        changed = {n: change(t.detach()).requires_grad_() for n, t in self.parameters.items()}
        return replace(self, parameters=changed)

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another type."""
        return replace(self.each_parameter(lambda t: t.to(dtype)), weight=self.weight.to(dtype))

    def typed(self, types: str) -> Case:
        """The same values in a pair of ``TYPES``."""
        table, parameters = TYPES[types]
        case = self.to(parameters)
        return replace(case, weight=case.weight.to(table))

    def each_tensor(self, change: Callable[[Tensor], Tensor]) -> Case:
        """The case with every parameter, the table and what says where the text is changed."""
        case = self._each_of_the_text(change)
        return replace(case.each_parameter(change), weight=change(self.weight))

    def _each_of_the_text(self, change: Callable[[Tensor], Tensor]) -> Case:
        names = ("input_ids", "attention_mask", "task_ids", "prompt_rows")
        have = {name: t for name in names if (t := getattr(self, name)) is not None}
        return replace(self, **{name: change(t) for name, t in have.items()})

    def laid_out(self, layout: str) -> Case:
        """The same values in tensors of a layout."""
        return self if layout == "plain" else self.each_tensor(lambda t: laid_out(t, layout))

    def rows(self, rows: list[int]) -> Case:
        """These rows of the batch."""
        case = self._each_of_the_text(lambda t: t[rows])
        return replace(case, sizes=replace(self.sizes, batch=len(rows)))

    def padded(self, left: int, right: int) -> Case:
        """The same texts with padding around them."""
        mask = torch.ones_like(self.input_ids)
        ids, mask = (torch.nn.functional.pad(t, (left, right)) for t in (self.input_ids, mask))
        sizes = replace(self.sizes, length=ids.shape[1])
        return replace(self, sizes=sizes, input_ids=ids, attention_mask=mask)

    def reconstruct(self, backend: str) -> Tensor:
        if self.prompt_rows is not None:
            return self.parameters["short_prompt"]
        return reconstruct_prompt(**self.parameters, **self.flags, backend=backend)

    def splice(self, prompt: Tensor, backend: str, **text: Tensor) -> Tensor:
        """Operation 2; ``inputs_embeds=`` in place of the case's ids."""
        return splice_prompt(
            prompt,
            **(text or {"input_ids": self.input_ids, "weight": self.weight}),
            offset_a=self.parameters.get("offset_a"),
            offset_b=self.parameters.get("offset_b"),
            scaling=self.flags.get("scaling", 1.0),
            attention_mask=self.attention_mask,
            task_ids=self.task_ids,
            prompt_rows=self.prompt_rows,
            backend=backend,
        )

    def tensors(self) -> Parameters:
        """Of the first operation as a backend gets them, outside of the graph."""
        found = {name: t.detach() for name, t in self.parameters.items()}
        if self.sizes.tasks is None:
            found = {name: t.unsqueeze(0) for name, t in found.items()}
        return Parameters(**found)

    def inputs(self, prompt: Tensor | None = None, **others: Tensor | None) -> SpliceInputs:
        """Of the second as a backend gets them; the short prompt as prompt if none is given."""
        own = self.tensors()
        given = SpliceInputs(
            own.short_prompt if prompt is None else prompt,
            input_ids=self.input_ids,
            weight=self.weight,
            offset_a=own.offset_a,
            offset_b=own.offset_b,
            attention_mask=self.attention_mask,
            task_ids=self.task_ids,
            prompt_rows=self.prompt_rows,
        )
        return given._replace(**others)  # type: ignore[arg-type]

    def both(self, backend: str) -> Tensor:
        return self.splice(self.reconstruct(backend), backend)

    def path(self, backend: str, **text: Tensor) -> Tensor:
        """Both operations by one function; ``inputs_embeds=`` in place of the case's ids."""
        return reconstruct_and_splice(
            **self.parameters,
            **(text or {"input_ids": self.input_ids, "weight": self.weight}),
            attention_mask=self.attention_mask,
            task_ids=self.task_ids,
            **self.flags,
            backend=backend,
        )


def flat(
    backend: str,
    parameters: dict[str, Tensor],
    weight: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    task_ids: Tensor | None,
) -> Tensor:
    """Both operations as a user's model would call them, for the compiler to trace."""
    prompt = reconstruct_prompt(**parameters, scaling=0.4, temperature=0.7, backend=backend)
    return splice_prompt(
        prompt,
        input_ids=input_ids,
        weight=weight,
        offset_a=parameters["offset_a"],
        offset_b=parameters["offset_b"],
        scaling=0.4,
        attention_mask=attention_mask,
        task_ids=task_ids,
        backend=backend,
    )


def shapes_of(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Of the first operation's seven tensors, without the task axis."""
    return {
        "short_prompt": (s.m, s.d),
        "offset_a": (s.n, s.r),
        "offset_b": (s.r, s.d),
        "space_down": (s.k, s.d, s.h),
        "space_up": (s.k, s.h, s.d),
        "gate_weight": (s.d, s.k),
        "gate_bias": (s.k,),
    }


def biases_of(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Of the biases, without the task axis."""
    return dict(zip(BIASES, ((s.k, s.h), (s.k, s.d)), strict=True))


def make_mask(padding: str, batch: int, length: int, generator: torch.Generator) -> Tensor | None:
    """``rows``: full rows and rows of padding only, in turn."""
    if padding == "none":
        return None
    lengths = torch.randint(0, length + 1, (batch, 1), generator=generator)
    column = torch.arange(length)
    if padding == "right":
        return (column < lengths).long()
    if padding == "left":
        return (column >= length - lengths).long()
    if padding == "holes":
        return torch.randint(0, 2, (batch, length), generator=generator)
    return (torch.arange(batch) % 2).unsqueeze(1).expand(batch, length).clone()


def make_case(
    sizes: Sizes,
    *,
    offset: bool = True,
    spaces: bool = True,
    biases: bool = False,
    gated: bool = True,
    padding: str = "holes",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **flags: Any,
) -> Case:
    """Normal tensors of these sizes; the flags are those of ``reconstruct_prompt``.

    ``biases``: with those of the subspaces; ``gated``: else there is one subspace and no gate.

    What is multiplied along d or h is scaled by its root, as at initialisation: otherwise the gate
    sits at the edge of a tie, where any two ways to round disagree a hundredfold.
    """
    g = torch.Generator().manual_seed(seed)
    s = sizes if gated else replace(sizes, k=1)
    lead = () if s.tasks is None else (s.tasks,)
    shapes = {
        name: shape
        for name, shape in shapes_of(s).items()
        if name == "short_prompt"
        or (offset if name in SEVEN[1:3] else spaces and (gated or name not in SEVEN[5:]))
    } | (biases_of(s) if biases else {})
    scales = {"space_down": s.d, "gate_weight": s.d, "space_up": s.h}
    parameters = {
        name: torch.randn(*lead, *shape, generator=g, dtype=torch.float64)
        .div(max(1, scales.get(name, 1)) ** 0.5)
        .to(dtype)
        for name, shape in shapes.items()
    }
    return Case(
        s,
        {name: t.requires_grad_() for name, t in parameters.items()},
        torch.randn(s.vocabulary, s.d, generator=g, dtype=torch.float64).to(dtype),
        torch.randint(s.vocabulary, (s.batch, s.length), generator=g),
        make_mask(padding, s.batch, s.length, g),
        None if s.tasks is None else torch.randint(s.tasks, (s.batch,), generator=g),
        {"scaling": 0.4, "temperature": 0.7, **flags},
    )


def make_gathered(sizes: Sizes, count: int, seed: int = 0, **options: Any) -> Case:
    """A case of R = ``count`` rows, in float32 if nothing else is said; -1 among the ids."""
    options = {"dtype": torch.float32, "padding": "holes", "spaces": False, **options}
    case = make_case(replace(sizes, m=count), seed=seed, **options)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(-1, count, (sizes.batch, sizes.m), generator=draw)
    return replace(case, sizes=sizes, prompt_rows=rows)


def sharp_case(case: Case, scores: str, size: float, large: str) -> Case:
    """The case with fusion's scores up to ``size``, by a larger tensor ``large``, in float32.

    Args:
        case: in float64.
        scores: ``"tied"``: those of all positions alike; ``"pairs"``: two and two alike;
            ``"apart"``: far from each other, so that one weight is 1 where they are large.
        size: of the largest score.
        large: ``"short_prompt"``, ``"offset_a"`` or ``"offset_b"``.
    """
    p = {name: t.detach().clone() for name, t in case.parameters.items()}
    a = p["offset_a"]
    if scores == "tied":
        a[:] = a[..., :1, :].clone()
    elif scores == "pairs":
        a[..., 1::2, :] = a[..., : a.shape[-2] // 2 * 2 : 2, :].clone()
    largest = (p["short_prompt"] @ p["offset_b"].mT @ a.mT).abs().max()
    p[large] *= size * case.sizes.d**0.5 / (case.flags["scaling"] * largest)
    return replace(case, parameters=p).to(torch.float32)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values at the strides of one of ``LAYOUTS``; what lies between them is NaN."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    if layout == "reversed axes":
        axes = tuple(range(tensor.dim()))[::-1]
        return tensor.permute(axes).contiguous().permute(axes)
    fill = float("nan") if tensor.is_floating_point() else 99
    *lead, last = tensor.shape
    if layout == "sliced":
        return tensor.new_full((*lead, 2 * last + 1), fill)[..., 1::2].copy_(tensor)
    first = {"shifted": 1, "wide rows": 0}[layout]
    return tensor.new_full((*lead, last + 3), fill)[..., first : first + last].copy_(tensor)


def run(
    case: Case,
    backend: str,
    cotangent: Tensor,
    forward: Callable[[Case, str], Tensor] = Case.both,
) -> dict[str, Tensor]:
    """Output and gradients of both operations in a row."""
    out = forward(case, backend)
    leaves = {name: t for name, t in case.parameters.items() if t.requires_grad}
    found = torch.autograd.grad(
        out, list(leaves.values()), cotangent.to(out.dtype), allow_unused=True
    )
    grads = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
    return {"output": out.detach(), **grads}
