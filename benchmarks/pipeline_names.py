"""What the records of the data line are called: tasks and who does them, for those who measure and those who read."""

READ, DECODE, CROP, VIEWS = TASKS = ("read", "read, decode", "read, decode crop, resize", "two views")
SAME_VIEWS = "same views"
"""Our loader beside its plain twin: by how many grey levels pixels differ."""
CONDITIONALS = "decode to views"
SWEEP = "two views, decoder sweep"
LOGGING = "action log"
SHUFFLING, MEMORY, OPENING = "shuffling", "memory", "opening shards"

OURS, LOGGED, TWIN = "ours", "ours, action log", "plain twin"
DALI_READER, LIBRARY_READER = "DALI webdataset", "webdataset library"
PEER = "webdataset + torchvision"

WARM, COLD = "memory", "disk"
"""Where the shards are read from."""
