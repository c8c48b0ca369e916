"""Semantic segmentation: what do the tokens of encoder and predictor know of the regions of an image?"""
