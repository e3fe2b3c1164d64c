"""Text to batches: from raw files to token shards on disk, and from token shards to the rows of every step."""
