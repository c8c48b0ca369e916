"""How is the predictor's input put together: context tokens, conditioned mask tokens, action tokens?"""
