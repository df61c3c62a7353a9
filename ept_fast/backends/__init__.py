"""What computes the operations: modules that each have the same functions.

``available`` and ``supports`` say whether a backend works here and for a call, and why (not); on
tensors with a task axis there are ``reconstruct_forward``, ``reconstruct_backward``,
``splice_forward`` and ``splice_backward``.
"""
