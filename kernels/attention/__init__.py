"""How do tokens of sequences with their own lengths attend to each other, without padding?"""
