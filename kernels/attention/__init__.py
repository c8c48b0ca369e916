"""How do the tokens of sequences with different lengths attend to each other without padding?"""
