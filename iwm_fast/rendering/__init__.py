"""How are results shown? HTML pages, charts and grids of images, without knowledge of runs."""
