"""Which networks are trained? Encoder, predictor, heads, and the first two together as the student."""
