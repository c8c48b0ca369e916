"""How fast is a training step under each engine? `python -m benchmarks.train_step`."""
