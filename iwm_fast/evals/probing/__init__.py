"""How good are frozen features? k-NN, a linear and an attentive probe classify images from them."""
