"""Text to a dataset folder: inputs, documents, splits, encoding, shards."""
