"""How fast are frozen features extracted? `python -m benchmarks.features`."""
