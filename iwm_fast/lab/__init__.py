"""Does what the paper claims hold here? Grids of small runs and the verdicts on them."""
