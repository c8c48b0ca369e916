"""Where are the bytes: shards, tar headers, indexes, local and remote reads, writing?"""
