"""How is performance measured? In interleaved rounds, with a record of the machine, against goals and rooflines."""
