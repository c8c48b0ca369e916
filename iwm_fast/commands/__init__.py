"""What does each further subcommand of `iwm` do? One file for each."""
