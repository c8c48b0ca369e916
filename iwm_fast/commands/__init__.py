"""What does each further subcommand of `iwm` do? One module per subcommand."""
