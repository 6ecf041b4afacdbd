"""A training run from step to step."""
