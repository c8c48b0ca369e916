"""Which samples and random parameters did training receive? They are logged, and replayed from the log."""
