"""The two operations: checks, choice of a backend, registered operators and autograd."""
