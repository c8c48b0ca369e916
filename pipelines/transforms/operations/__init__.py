"""Which transformations are there? One file for each."""
