"""The activations φ of the subspaces: one table for the definition and the eager backend.

A new one is a row here, its code of the same name in ``kernels/activations.py`` (Triton) and
``csrc/activations.h`` (CUDA), and a line in ``docs/method.md``. The tests take the names from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation"]


class Activation(NamedTuple):
    """An activation and its derivative.

    Attributes:
        function: φ(x).
        backward: the gradient of x, from that of φ(x) and x.
    """

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    # The exact, erf form.
    "gelu": Activation(F.gelu, lambda grad, x: torch.ops.aten.gelu_backward(grad, x)),
    # The slope at 0 is 0.
    "relu": Activation(F.relu, lambda grad, x: torch.where(x > 0, grad, 0)),
    "silu": Activation(F.silu, lambda grad, x: torch.ops.aten.silu_backward(grad, x)),
    "identity": Activation(lambda x: x, lambda grad, x: grad),
}
