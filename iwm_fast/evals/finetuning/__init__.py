"""Finetuning for classification: what are the encoder and the predictor of a run worth?"""
