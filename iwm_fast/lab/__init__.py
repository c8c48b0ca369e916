"""Labs: do the paper's claims hold in grids of small runs?"""
