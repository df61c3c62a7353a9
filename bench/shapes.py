"""The sizes that are measured, by name, and the sweeps over each of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Shape:
    """Sizes in METHOD's words.

    Attributes:
        tasks: T; 0: a single prompt without a task axis.
        shortest: rows have from this many to ``length`` real tokens, padded on the right; 0: all
            rows are full.
    """

    name: str
    batch: int
    length: int
    hidden_size: int
    num_virtual_tokens: int
    max_length: int
    rank: int
    num_spaces: int
    space_dim: int
    vocabulary: int
    tasks: int = 0
    shortest: int = 0

    @property
    def columns(self) -> dict[str, int]:
        """The sizes as columns of a row."""
        return {n: v for n, v in asdict(self).items() if n not in ("name", "shortest")}


_T5 = Shape("t5-base", 32, 256, 768, 40, 256, 30, 4, 8, 32128, shortest=128)
_SENTENCES = replace(_T5, name="sentences", length=40, num_virtual_tokens=20, shortest=20)
_LLAMA_8B = Shape("llama-8b", 8, 2048, 4096, 60, 2048, 24, 4, 16, 128256, shortest=1024)
_LONG = 32768

# Rows are padded, as those of a real batch are. `sentences` is what most classification data looks
# like: short rows under a long offset.
NAMED = (
    _T5,
    replace(_T5, name="t5-large", hidden_size=1024),
    _SENTENCES,
    replace(_LLAMA_8B, name="llama-1b", hidden_size=2048),
    _LLAMA_8B,
    replace(_LLAMA_8B, name="long", batch=1, length=_LONG, max_length=_LONG, shortest=_LONG // 2),
)
# Rows of the batch have tasks at random, so at most 64 of 512 are used at once.
MANY_TASKS = tuple(
    replace(_T5, name=f"tasks-{tasks}", batch=64, tasks=tasks) for tasks in (1, 8, 64, 512)
)
# Those whose times are worked out on paper.
PREDICTED = (_T5, _LLAMA_8B, NAMED[-1], MANY_TASKS[2])
# The same sizes without a mask.
UNPADDED = tuple(
    replace(shape, name=f"{shape.name}, unpadded", shortest=0)
    for shape in (*NAMED, *MANY_TASKS)
    if shape is not _SENTENCES
)
# Small, odd and padded: a smoke test's sizes, and a rehearsal's in Triton's interpreter.
QUICK = (
    Shape("tiny", 3, 9, 32, 4, 12, 3, 2, 4, 50, shortest=4),
    Shape("tiny-bank", 5, 9, 32, 4, 12, 3, 2, 4, 50, tasks=2),
)

_SWEPT = replace(_T5, name="swept", batch=8, length=128, max_length=512, rank=16, shortest=0)
_SWEPT_ON_GPU = replace(_SWEPT, batch=32, length=512, max_length=4096)
_AXES = {
    "batch": ("batch", (2, 4, 8, 16, 32)),
    "length": ("length", (32, 64, 128, 256, 512)),
    "d": ("hidden_size", (256, 512, 1024, 2048, 4096)),
    "m": ("num_virtual_tokens", (8, 16, 32, 64, 128)),
    "r": ("rank", (4, 8, 16, 32, 64)),
    "K": ("num_spaces", (1, 2, 4, 8, 16)),
    "T": ("tasks", (1, 4, 16, 64)),
}
_AXES_ON_GPU = {
    **_AXES,
    "batch": ("batch", (8, 16, 32, 64, 128)),
    "length": ("length", (256, 512, 1024, 2048, 4096)),
}


def sweeps(on_gpu: bool) -> list[Shape]:
    """One shape for each value of each axis, named "axis=value"; the other sizes stand still."""
    base, axes = (_SWEPT_ON_GPU, _AXES_ON_GPU) if on_gpu else (_SWEPT, _AXES)
    return [
        replace(base, name=f"{axis}={value}", **{field: value})
        for axis, (field, values) in axes.items()
        for value in values
    ]
