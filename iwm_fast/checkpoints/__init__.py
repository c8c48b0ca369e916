"""How are trained weights kept: saved, loaded, exported, and taken over by a new run?"""
