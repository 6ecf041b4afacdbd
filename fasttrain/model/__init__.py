"""The Transformer, and how its blocks run."""
