"""Where do the metrics of a run go besides `metrics.jsonl`?"""
