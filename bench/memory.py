"""How much memory a training step of the prompt takes: the formula of ``docs/memory.md``.

Bytes, in METHOD's symbols. ``e``, ``p`` and ``t`` are the bytes of one element of the embeddings,
of the parameters and of what sums accumulate in. What a call takes beyond its results is followed
through the code: of the moments that can be its largest, each is added up and the most counts.
``tests/test_memory.py`` holds all of it to what the allocator says.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ept_fast import EPTConfig, FusedEPTPrompt
from ept_fast.backends.eager.splice import tile_config
from ept_fast.ops.types import Flags, Needs, Parameters

__all__ = ["OfKernels", "PromptStep", "Workspace"]


class OfKernels(NamedTuple):
    """What the two calls of the kernels take beyond their results, in bytes: as their plans say.

    Attributes:
        kept: what the forward keeps for the backward.
        forward, backward: workspace of each.
    """

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Workspace:
    """What each of the eager backend's four calls takes beyond its results, in bytes."""

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
        if self.backend == "triton":
            return self.of_kernels.kept
        return self._sizes[0] * self._bytes[2] * self._core

    @property
    def workspace(self) -> Workspace:
        """Of the eager backend."""
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
        c = self.config
        held = self.parameter_bytes + self.optimizer_bytes
        between = held + self.saved_bytes
        of_space = d * c.num_spaces * c.space_dim
        sizes = m * d, n * c.rank, d * c.rank, of_space, of_space
        # One tensor after the other: the root of its second moment and that divided, while the
        # tensor before is still there divided.
        steps = p * tasks * max(a + 2 * b for a, b in pairwise((0, *sizes)))
        backbone = {"backbone": between + 2 * self.output_bytes}
        optimizer = {"optimizer": held + self.parameter_bytes + steps}
        if self.backend == "triton":
            k, once = self.of_kernels, between + self.output_bytes
            return {
                "forward": once + k.forward,
                **backbone,
                "backward": once + self.parameter_bytes + k.backward,
                **optimizer,
            }
        w = self.workspace
        prompt = tasks * p * m * d  # P′
        half = tasks * (n + d) * t  # of the gradients of A and B; their sum is rounded
        spliced = prompt + half * c.rank  # with the gradient of P′
        rest = self.parameter_bytes - tasks * p * (n + d) * c.rank
        return {
            "reconstruct, forward": between + prompt + w.reconstruct_forward,
            "splice, forward": between + prompt + self.output_bytes + w.splice_forward,
            **backbone,
            "splice, backward": between + self.output_bytes + spliced + w.splice_backward,
            "reconstruct, backward": between
            + self.output_bytes
            + spliced
            + rest
            + half * self._fused
            + w.reconstruct_backward,
            **optimizer,
        }

    @property
    def of_kernels(self) -> OfKernels:
        """Of the kernels, from their plans for tensors without memory."""
        from ept_fast.backends.triton import calls
        from ept_fast.backends.triton.runtime import Plan

        c, (tasks, *_) = self.config, self._sizes
        kind: dict[str, Any] = {"device": "meta"}
        lead = () if self.tasks is None else (tasks,)
        shapes = FusedEPTPrompt.shapes(c)
        tensors = (shapes.get(name) for name in Parameters._fields)
        parameters = [
            None if s is None else torch.empty(*lead, *s, dtype=self.parameters, **kind)
            for s in tensors
        ]
        ids = torch.empty(self.batch, self.length, dtype=torch.int64, **kind)
        table = torch.empty(1, c.hidden_size, dtype=self.table, **kind)
        mask = None if self.padding == "none" else ids
        task_ids = None if self.tasks is None else ids[:, 0]
        flags = Flags(c.scaling, c.activation, c.gate, c.temperature)
        forward = Plan((*parameters, ids, table, None, mask, task_ids))
        calls.describe_path_forward(
            forward, flags, c.fusion, calls.reconstruct_forward_config, calls.forward_config
        )
        kept, workspace = forward.sizes
        size = (self.batch, c.num_virtual_tokens + self.length, c.hidden_size)
        grad = torch.empty(size, dtype=self.table, **kind)
        memory = torch.empty(kept, dtype=torch.uint8, **kind)
        backward = Plan((grad, *parameters, None, None, None, mask, task_ids, memory))
        needs = Needs(True, bool(c.rank))
        calls.describe_path_backward(
            backward,
            flags,
            c.fusion,
            needs,
            calls.reconstruct_backward_config,
            calls.backward_config,
        )
        return OfKernels(kept, workspace, backward.sizes[1])

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
