"""Text to a dataset folder: sources, splits, encoding, shards."""
