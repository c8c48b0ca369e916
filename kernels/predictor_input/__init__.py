"""How is the predictor's input assembled from context tokens, conditioned mask tokens and action tokens?"""
