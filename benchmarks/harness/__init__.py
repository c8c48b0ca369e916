"""How is something measured? In turns, with its machine, against goals and limits."""
