"""What does the world model say to a change that I choose myself? A page with sliders."""
