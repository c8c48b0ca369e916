"""Which networks are trained? The encoder and the predictor, together the student, and heads for evaluations."""
