"""How much memory a training step of the prompt takes: the formula of ``docs/memory.md``.

Bytes, in METHOD's symbols. ``e``, ``p`` and ``t`` are the bytes of one element of the embeddings,
of the parameters and of what sums accumulate in. What a call takes beyond its results is followed
through the code: of the moments that can be its largest, each is added up and the most counts.
``tests/test_memory.py`` holds all of it to what the allocator says.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from ept_fast.kernels.launch import (
    reconstruct_config,
    splice_backward_config,
)

from ept_fast import EPTConfig
from ept_fast.backends.eager.splice import tile_config

__all__ = ["PromptStep", "Workspace"]


@dataclass(frozen=True)
class Workspace:
    """What each of the four calls takes beyond its results, in bytes."""

    reconstruct_forward: int
    splice_forward: int
    splice_backward: int
    reconstruct_backward: int


@dataclass(frozen=True)
class PromptStep:
    """One training step of a prompt on a batch of token ids.

    Attributes:
        config: the prompt's sizes.
        batch: B.
        length: S, columns of the batch.
        table: type of the embeddings.
        parameters: type of the prompt's parameters.
        tasks: T; None: a single prompt.
        padding: ``"none"``, no mask is given; ``"side"``, before or after the text; ``"holes"``,
            also within it.
        backend: ``"eager"`` on a CPU, or ``"triton"``.
    """

    config: EPTConfig
    batch: int
    length: int
    table: torch.dtype = torch.float32
    parameters: torch.dtype = torch.float32
    tasks: int | None = None
    padding: str = "none"
    backend: str = "eager"

    @property
    def parameter_bytes(self) -> int:
        """N·p: the prompt's tensors. Their gradients take as much again."""
        return self.config.num_parameters * (self.tasks or 1) * self._bytes[1]

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's two moments, and a float32 counter of steps for each tensor."""
        tensors = 1 + 2 * bool(self.config.rank) + 4 * bool(self.config.num_spaces)
        return 2 * self.parameter_bytes + 4 * tensors

    @property
    def output_bytes(self) -> int:
        """E: the embeddings that the backbone gets, [B, m + S, d]. Their gradient takes as much."""
        c, (e, _, _) = self.config, self._bytes
        return self.batch * (c.num_virtual_tokens + self.length) * c.hidden_size * e

    @property
    def saved_bytes(self) -> int:
        """What lies between forward and backward: the core's small matrices."""
        return self._sizes[0] * self._bytes[2] * self._core

    @property
    def workspace(self) -> Workspace:
        """Of the backend."""
        if self.backend == "triton":
            return self._triton_workspace()
        tasks, (forward, backward) = self._sizes[0], self._eager_reconstruct()
        return Workspace(
            tasks * forward,
            self._eager_splice_forward(),
            self._eager_splice_backward(),
            tasks * backward,
        )

    def phases(self) -> dict[str, int]:
        """The most that is live at once in each part of a step, in its order.

        The backbone is taken to keep its input for its own backward and to let it go there before
        it hands back the gradient. What it holds besides is left out. Gradients are dropped before
        the forward, as ``zero_grad`` does.
        """
        (tasks, m, n, d, _, _), (_, p, t) = self._sizes, self._bytes
        c, w = self.config, self.workspace
        held = self.parameter_bytes + self.optimizer_bytes
        between = held + self.saved_bytes
        prompt = tasks * p * m * d  # P′
        # Halves of the gradients of A and B: the eager backend rounds their sum only.
        half = tasks * (n + d) * (t if self.backend == "eager" else p)
        spliced = prompt + half * c.rank  # with the gradient of P′
        rest = self.parameter_bytes - tasks * p * (n + d) * c.rank
        of_space = d * c.num_spaces * c.space_dim
        sizes = m * d, n * c.rank, d * c.rank, of_space, of_space
        return {
            "reconstruct, forward": between + prompt + w.reconstruct_forward,
            "splice, forward": between + prompt + self.output_bytes + w.splice_forward,
            "backbone": between + 2 * self.output_bytes,
            "splice, backward": between + self.output_bytes + spliced + w.splice_backward,
            "reconstruct, backward": between
            + self.output_bytes
            + spliced
            + rest
            + half * self._fused
            + w.reconstruct_backward,
            # One tensor after the other: the root of its second moment and that divided, while the
            # tensor before is still there divided.
            "optimizer": held
            + self.parameter_bytes
            + p * tasks * max(a + 2 * b for a, b in pairwise((0, *sizes))),
        }

    @property
    def peak(self) -> int:
        """The most that is live at once in a step: its largest phase."""
        return max(self.phases().values())

    @property
    def _sizes(self) -> tuple[int, int, int, int, int, int]:
        """T, m, n, d, K·h and K."""
        c = self.config
        spaces, dims = c.num_spaces, c.num_spaces * c.space_dim
        return self.tasks or 1, c.num_virtual_tokens, c.max_length, c.hidden_size, dims, spaces

    @property
    def _bytes(self) -> tuple[int, int, int]:
        """e, p and t."""
        types = self.table, self.parameters
        return self.table.itemsize, self.parameters.itemsize, 8 if torch.float64 in types else 4

    @property
    def _fused(self) -> int:
        """r if the prompt is fused with the offset, else 0."""
        return self.config.rank if self.config.fusion else 0

    @property
    def _core(self) -> int:
        """Elements of one task saved beside P′: Q, O, Hin, g, S, and two for each softmax row."""
        (_, m, _, _, dims, spaces), r = self._sizes, self._fused
        return 2 * (r + bool(r)) * m + (m + r) * dims + (m + r) * spaces

    def _eager_reconstruct(self) -> tuple[int, int]:
        """Of one task, forward and backward."""
        (_, m, n, d, dims, spaces), (_, p, t), r = self._sizes, self._bytes, self._fused
        cast, width = p != t, dims + spaces
        scores = t * m * n if r else 0
        prompt, side_by_side = t * m * d, t * d * width  # any [m, d]; [D | G]
        a, b, up = t * n * r, t * r * d, t * dims * d
        small = t * (m * width + r * width + 3 * m * dims + m * spaces)

        held = cast * (prompt + a + b)  # P, A and B in the accumulation type
        rows = 2 * t * m if r else 0  # what the kernels keep of the softmax
        fused = prompt if r else 0  # P + O·B
        # Scores and weights, then weights beside W·A and O; Q is there throughout.
        moments = [held + rows + t * m * r + max(2 * scores, scores + 2 * t * m * r)]
        held += rows + 2 * t * m * r  # with Q and O, to the end
        if spaces:
            # D is brought into order, unless it is one matrix, then cast, then joined with G.
            order = p * d * dims * (spaces > 1) + cast * t * d * width
            moments.append(held + fused + order + side_by_side)
            moments.append(held + fused + side_by_side + small + cast * up + prompt)
        else:
            moments.append(held + (fused + cast * p * m * d if r else p * m * d))
        forward = max(moments) - p * m * d - t * self._core

        held = cast * (2 * prompt + a + b) + t * m * r + b  # dL/dP′, P, A and B; dO and dB
        own = 0  # dP, once it is no longer dL/dP′ itself
        moments = []
        if spaces:
            held += side_by_side + cast * up + small
            own = prompt
            grads = up + p * spaces + prompt  # dU, db and dP
            moments.append(held + grads + side_by_side + (max(side_by_side, b) if r else 0))
            d_down, d_gate_weight = p * d * dims, p * d * spaces
            moments.append(held + grads + side_by_side + d_gate_weight + (1 + cast) * d_down)
            held += p * (dims * d + spaces) + d_down + d_gate_weight
        if r:
            held += 2 * scores
            query = t * m * r  # dQ; of the sizes of A and B are dA and dB
            moments += [
                held + own + scores + a,
                held + own + query + a + prompt,
                held + prompt + query + a + b,
            ]
        else:
            moments.append(held + own + p * m * d * (cast or not own))
        results = p * (m * d + d * (dims + width) + spaces) + t * (n + d) * r
        return forward, max(moments) - results

    def _eager_splice_forward(self) -> int:
        """A·c and B, tiles of the offset and of the text that it is added to."""
        (_, _, n, d, _, _), (e, p, t) = self._sizes, self._bytes
        r = self.config.rank
        tiles = tile_config(self.length, d, t, "cpu")
        looked_up = e * tiles.positions * tiles.rows * d
        if not r:
            return looked_up
        tile = t * tiles.positions * d
        # A sum into another type copies both of what it adds up.
        beside = (e != t) * 2 * tile * min(tiles.rows, self.batch)
        if self.padding == "holes":
            # The columns of every row, and one row's sum, which goes where they say.
            gathered = tile + (e != t) * (t + e) * tiles.positions * d
            beside = 8 * self.batch * self.length + max(beside, gathered)
        return t * (n * r + (p != t) * r * d) + looked_up + tile + beside

    def _eager_splice_backward(self) -> int:
        """A·c and B·c, and a tile of summed gradients."""
        (tasks, m, n, d, _, _), (e, p, t) = self._sizes, self._bytes
        r, cast = self.config.rank, p != t
        tiles = tile_config(self.length, d, t, "cpu")
        prompt, offset = m * d, (n + d) * r
        tile = tiles.positions * d
        # A sum over rows of another type copies all of them first.
        rows = t * prompt * (1 + (e != t) * self.batch)
        moments = [cast * (t - p) * tasks * prompt + rows - t * tasks * offset]
        if r:
            scaled = offset * (2 if tasks > 1 else 1)  # those of a task are there until the next's
            read = (e != t) * t * tile
            if self.padding != "none":
                # The mask as flags, and as integers while they are counted.
                planning = (9 * self.length + 8) * self.batch
                moments.append(t * tile + planning)
            if self.padding == "holes":
                read += e * tile + 8 * self.batch * self.length
            moments += [
                t * (scaled + tile) + read,
                cast * t * (scaled + r * d + tile + tasks * prompt),
            ]
        return max(moments)

    def _triton_workspace(self) -> Workspace:
        """Partial sums, as the launches ask for them."""
        (tasks, m, n, d, dims, spaces), r = self._sizes, self._fused
        width, rows = dims + spaces, m + (r if spaces else 0)
        dim = self.config.space_dim if spaces else 1
        forward = backward = 0
        if r or spaces:
            config = reconstruct_config(tasks, m, n if r else 0, r, spaces, dim, d)
            forward = config.d_splits * rows * (r + width) + m * width
            backward = config.backward_d_splits * m * (r + dims) + m * width
        if r:
            forward += config.n_splits * m * (r + 2)
            backward += -(-n // config.backward_n_chunk) * m * r
            backward += config.groups * n * r if config.groups > 1 else 0

        r = self.config.rank
        splice = splice_backward_config(self.batch, self.length, m, d, r, tasks, True, bool(r))
        of_batch = -(-self.batch // splice.rows)
        of_a = of_batch * -(-d // (splice.block_d * splice.tiles_d))
        of_b = of_batch * -(-self.length // (splice.block_s * splice.tiles))
        parts = m * d * of_batch if of_batch > 1 else 0
        if r and (of_a > 1 or splice.tiles_d > 1):
            parts += self.length * r * of_a
        if r and of_b > 1:
            parts += r * d * of_b
        groups = min(tasks, self.batch)
        return Workspace(4 * tasks * forward, 0, 4 * groups * parts, 4 * tasks * backward)
