"""Image World Models: model, method, training, and what one does with the result."""
