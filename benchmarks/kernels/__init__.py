"""How fast are the fused operations? `python -m benchmarks.kernels`."""
