"""How fast is the data pipeline? `python -m benchmarks.pipelines`."""
