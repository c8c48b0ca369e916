"""How are samples stored? Shards, tar headers, indexes, local and remote reads, and writing."""
