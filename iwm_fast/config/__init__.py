"""Which settings can YAML and the command line change, and what do they mean? Imports no torch."""
