"""Which samples and which patches does each micro-batch contain? Pure functions of seed, step and slot."""
