"""Which samples and patches come when? Pure functions of seed, step and slot."""
