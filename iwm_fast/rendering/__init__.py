"""How do results look: HTML, charts, image grids? A library without knowledge of runs."""
