"""How are trained weights stored: saved, loaded, exported, and used to initialise a new run?"""
