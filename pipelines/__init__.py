"""Shards in, `Batch` out: reading, drawing, rendering. Knows nothing of models."""
