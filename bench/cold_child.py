"""One measurement in a Python process of its own: ``python -m bench.cold_child WHAT ...`` prints
JSON with ``seconds``, and ``error`` if results were checked."""

from __future__ import annotations

import json
import sys
import time


def seconds_of_import(module: str) -> dict[str, float]:
    """To import a package once torch is there."""
    import torch  # noqa: F401

    begin = time.perf_counter()
    __import__(module)
    return {"seconds": time.perf_counter() - begin}


def seconds_of_compiling_nothing(device: str) -> dict[str, float]:
    """To call a function under torch.compile that does next to nothing: the compiler's start."""
    import torch

    x = torch.ones(1, device=device)
    begin = time.perf_counter()
    torch.compile(lambda x: x + 1, fullgraph=True)(x).cpu()
    return {"seconds": time.perf_counter() - begin}


def seconds_of_first_call(
    peer: str, shape_name: str, table: str, device: str, compiled: bool, check: bool
) -> dict[str, float]:
    """The prompt path forward and backward for the first time, of a backend or the definition.

    Args:
        compiled: under torch.compile(fullgraph=True).
        check: compare the results with the definition afterwards.

    Returns:
        ``seconds`` and, if checked, ``error``: the error by what is allowed.
    """
    import torch

    from bench import parity, peers
    from bench.inputs import DTYPES, cotangent, make_inputs
    from bench.shapes import NAMED, QUICK

    (shape,) = (shape for shape in (*NAMED, *QUICK) if shape.name == shape_name)
    (inputs,) = make_inputs(shape, DTYPES[table], torch.device(device), 1)
    forward = definition = peers.operation_of("prompt path", peer)
    if peer != peers.REFERENCE:
        definition = peers.operation_of("prompt path", peers.REFERENCE)

    def leaves(inputs: peers.Inputs) -> dict[str, torch.Tensor]:
        return peers.trained("prompt path", inputs)

    total = shape.num_virtual_tokens + shape.length
    size = torch.Size((shape.batch, total, shape.hidden_size))
    grad = cotangent(size, DTYPES[table], torch.device(device))
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    begin = time.perf_counter()
    if compiled:
        forward = torch.compile(forward, fullgraph=True)
    grads = torch.autograd.grad(forward(inputs), list(leaves(inputs).values()), grad)
    wait()
    found = {"seconds": time.perf_counter() - begin}
    del grads
    if check:
        made = peers.Peer(peer, forward, leaves, definition)
        found["error"], _ = parity.check(made, inputs, parity.expected_of(made, inputs))
    return found


if __name__ == "__main__":
    what, *rest = json.loads(sys.argv[1])
    functions = {
        "import": seconds_of_import,
        "first call": seconds_of_first_call,
        "empty function": seconds_of_compiling_nothing,
    }
    print(json.dumps(functions[what](*rest)))
