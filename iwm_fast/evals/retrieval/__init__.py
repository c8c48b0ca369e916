"""Does the world model apply a transformation? Its predictions are looked up in banks of transformed images."""
