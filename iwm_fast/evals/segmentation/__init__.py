"""What are encoder and predictor worth for a label in each patch?"""
