"""Benchmarks of the package, which does not import them."""
