"""A page with sliders: what a world model imagines for any change of an image."""
