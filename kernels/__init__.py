"""Tensor operations on packed sequences, each beside its plain reference. Knows nothing of the project."""
