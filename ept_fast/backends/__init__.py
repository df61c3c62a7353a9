"""What computes the operations: modules that each have the same functions.

``available`` and ``supports`` say whether a backend works here and for a call, and why (not); on
tensors with a task axis there are ``reconstruct_forward``, ``reconstruct_backward``,
``splice_forward`` and ``splice_backward``, and for both operations in a row ``path_forward``,
``path_backward`` and ``path_kept``, which :mod:`ept_fast.backends.composed` makes from those four.
"""
