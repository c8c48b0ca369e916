"""Encoder, predictor, and the two together as the trained student."""
